"""The suites and metrics as tables: questions, classes, decoding, and the metrics of each question. Paper: §4.

Prompts and decoding are those of the paper's benchmarks: `DECODING` is the default, `GREEDY` an option.
"""

from dataclasses import dataclass, replace

from .vocabulary.articles import with_article
from .vocabulary.colors import COLORS
from .vocabulary.kinds import KINDS


# min_length is 10 in the authors' code, where it counts new tokens only: they pass embeddings.
DECODING = {"num_beams": 2, "do_sample": True, "top_p": 0.7, "temperature": 0.2, "min_new_tokens": 10}
GREEDY = {"num_beams": 1, "do_sample": False}

# Conditions, see `conditions`: objects as they are, and controls with their names in reports. Under SHUFFLED, the answers about
# objects as they are (SEEING) are scored against other objects.
SEEING, BLIND, NO_COLOR, SHUFFLED = "seeing", "blind", "no_color", "shuffled"
CONTROLS = {BLIND: "blind", NO_COLOR: "color removed", SHUFFLED: "another object's answer"}

# In the order of the labels in PointLLM's file.
MODELNET40_CLASSES = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower pot", "glass box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night stand", "person", "piano", "plant", "radio", "range hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv stand", "vase", "wardrobe", "xbox",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A score of answers.

    Args:
        title: in reports.
        function: in `evaluation.metrics`; empty for likelihoods.
        reference: the field of `EvalObject` that answers are compared with: "label", "caption" or "color".
        result, values: keys of the score and of the objects' values in what the function returns, where `result` is not
            the metric's name and `values` is not a plain list.
        unit: "share" in [0, 1], "score100" in [0, 100], or "count".
        is_hit: whether an object's value is 0 or 1, so that the score is a share of objects.
        is_ratio: whether the score is a ratio of two sums instead of a mean over objects. It has no paired test; its two
            parts are tested.
        lower_is_better: for counts of mistakes.
        needs: "judge", "wordnet", the Hub id of a sentence encoder, or nothing.
        prompt: name of the prompt that a judge replies to; one reply may give several scores.
    """

    title: str
    function: str
    reference: str
    unit: str = "share"
    result: str = ""
    values: str = ""
    is_hit: bool = False
    is_ratio: bool = False
    lower_is_better: bool = False
    needs: str = ""
    prompt: str = ""


# In the order of reports. The main score of a run is the first one that it has.
METRICS = {
    "closed_set_accuracy": Metric(
        "closed-set accuracy", "closed_set_accuracy", "label", result="accuracy", is_hit=True, prompt="closed_set_accuracy"
    ),
    "open_vocabulary_accuracy": Metric(
        "open-vocabulary accuracy", "open_vocabulary_accuracy", "label", result="accuracy", is_hit=True, needs="judge",
        prompt="open_vocabulary_accuracy",
    ),
    "caption_score": Metric(
        "caption score", "caption_judge_score", "caption", "score100", result="score", needs="judge", prompt="caption_score"
    ),
    "precision": Metric(
        "precision of details", "hallucination", "caption", is_ratio=True, needs="judge", prompt="hallucination"
    ),
    "correctness": Metric(
        "right details", "hallucination", "caption", "count", values="correct", needs="judge", prompt="hallucination"
    ),
    "hallucination": Metric(
        "wrong details", "hallucination", "caption", "count", values="wrong", lower_is_better=True, needs="judge",
        prompt="hallucination",
    ),
    "color_accuracy": Metric("color accuracy", "closed_set_accuracy", "color", result="accuracy", is_hit=True),
    "likelihood_top_1": Metric("likelihood, top 1", "", "label", is_hit=True),
    "likelihood_top_5": Metric("likelihood, top 5", "", "label", is_hit=True),
    "s_bert": Metric(
        "S-BERT", "sentence_similarity", "caption", result="similarity", needs="sentence-transformers/all-mpnet-base-v2"
    ),
    "simcse": Metric(
        "SimCSE", "sentence_similarity", "caption", result="similarity", needs="princeton-nlp/sup-simcse-roberta-large"
    ),
    "meteor": Metric("METEOR", "caption_overlap", "caption", values="meteor", needs="wordnet"),
    "rouge_l": Metric("ROUGE-L", "caption_overlap", "caption", values="rouge_l"),
    "bleu_4": Metric("BLEU-4", "caption_overlap", "caption", values="bleu_4"),
    "bleu_1": Metric("BLEU-1", "caption_overlap", "caption", values="bleu_1"),
}  # fmt: skip
JUDGE_PROMPTS = tuple(dict.fromkeys(metric.prompt for metric in METRICS.values() if metric.prompt))


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
