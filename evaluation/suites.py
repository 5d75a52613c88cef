"""The suites as a table: questions, classes, decoding, and the metrics of each question. Paper: §4.

Prompts and decoding are those of the paper's benchmarks: `DECODING` is the default, `GREEDY` an option.
"""

from dataclasses import dataclass, replace

from minigpt3d.model_card.words import CONDITIONS

from .vocabulary.articles import with_article
from .vocabulary.colors import COLORS
from .vocabulary.kinds import KINDS


# min_length is 10 in the authors' code, where it counts new tokens only: they pass embeddings.
DECODING = {"num_beams": 2, "do_sample": True, "top_p": 0.7, "temperature": 0.2, "min_new_tokens": 10}
GREEDY = {"num_beams": 1, "do_sample": False}

# See `conditions`. Under SHUFFLED, the answers about objects as they are (SEEING) are scored against other objects.
SEEING, BLIND, NO_COLOR, SHUFFLED = CONDITIONS
CONTROLS = {name: title for name, title in CONDITIONS.items() if name != SEEING}

# In the order of the labels in PointLLM's file.
MODELNET40_CLASSES = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower pot", "glass box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night stand", "person", "piano", "plant", "radio", "range hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv stand", "vase", "wardrobe", "xbox",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question of a suite.

    Args:
        name: in results and files.
        prompt: the text, as in the paper's benchmarks.
        metrics: names of `METRICS`, the main one first.
    """

    name: str
    prompt: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Args:
        name: on the command line.
        title: in reports.
        questions: the main one first.
        max_new_tokens: of an answer.
        classes: the names of each class; None without a closed set.
        judges_classes: whether a judge, if there is one, picks the class of an answer, as for the paper's ModelNet40.
        phrases: answers whose likelihoods are added up per class, with {} for the class's name.
        has_color: whether the clouds have colors that can be removed.
    """

    name: str
    title: str
    questions: tuple[Question, ...]
    max_new_tokens: int
    classes: dict[str, tuple[str, ...]] | None = None
    judges_classes: bool = False
    phrases: tuple[str, ...] = ()
    has_color: bool = True


# Forms of an answer, whose likelihoods are added up per class (see `likelihood`). Some class names need "a", others "an".
PLAIN_PHRASES = ("{}", "This is a {}.", "This is an {}.", "A 3D model of a {}.", "A 3D model of an {}.")
COLOR_PHRASES = tuple(f"This is {with_article(color)} {{}}." for color in COLORS)

INSTRUCTION_PROMPT = "What is this?"
COMPLETION_PROMPT = "This is an object of "
CAPTION_PROMPT = "Caption this 3D model in detail."
COLOR_PROMPT = "What color is it?"
ENCODED = ("s_bert", "simcse")
JUDGED_CAPTION = ("caption_score", "correctness", "hallucination", "precision")
OVERLAP = ("rouge_l", "bleu_1", "bleu_4", "meteor")

MODELNET40 = Suite(
    name="modelnet40",
    title="ModelNet40, zero-shot classification",
    questions=(
        Question("instruction", INSTRUCTION_PROMPT, ("closed_set_accuracy",)),
        Question("completion", COMPLETION_PROMPT, ("closed_set_accuracy",)),
    ),
    max_new_tokens=100,
    classes={name: (name,) for name in MODELNET40_CLASSES},
    judges_classes=True,
    phrases=PLAIN_PHRASES,
    has_color=False,
)
OBJAVERSE = Suite(
    name="objaverse",
    title="Objaverse, open-vocabulary classification",
    questions=(
        Question("instruction", INSTRUCTION_PROMPT, ("open_vocabulary_accuracy", *ENCODED)),
        Question("completion", COMPLETION_PROMPT, ("open_vocabulary_accuracy", *ENCODED)),
    ),
    max_new_tokens=150,
)
CAPTION = Suite(
    name="caption",
    title="Objaverse, captions",
    questions=(Question("caption", CAPTION_PROMPT, (*JUDGED_CAPTION, *OVERLAP, *ENCODED)),),
    max_new_tokens=150,
)
HOUSEHOLD = Suite(
    name="household",
    title="Household things that the bundled checkpoint has not seen",
    questions=(
        Question("what", INSTRUCTION_PROMPT, ("closed_set_accuracy", "open_vocabulary_accuracy", "color_accuracy")),
        Question("color", COLOR_PROMPT, ("color_accuracy",)),
        Question("caption", CAPTION_PROMPT, (*OVERLAP, *JUDGED_CAPTION, *ENCODED)),
    ),
    max_new_tokens=100,
    # A kind has several names; the most likely one is used.
    classes={kind: tuple(answers) for kind, answers in KINDS.items()},
    # The form that the checkpoint was trained on, with any color.
    phrases=COLOR_PHRASES,
)
OWN = replace(
    HOUSEHOLD,
    name="own",
    title="Own objects",
    classes=None,
    phrases=(*PLAIN_PHRASES, *COLOR_PHRASES),
    max_new_tokens=150,
)

SUITES = {suite.name: suite for suite in (MODELNET40, OBJAVERSE, CAPTION, HOUSEHOLD, OWN)}
