"""The suites as a table: what is asked about which objects, and what answers are compared with. Paper: §4.

A suite is one row. Prompts and decoding are those of the paper's benchmarks; `DECODING` is theirs, `GREEDY` the option.
"""

from dataclasses import dataclass, replace

from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT

from .objects import MODELNET40_CLASSES
from .vocabulary.colors import COLORS
from .vocabulary.kinds import KINDS, with_article


# min_length is 10 in the authors' code, where it counts new tokens only: they pass embeddings.
DECODING = {"num_beams": 2, "do_sample": True, "top_p": 0.7, "temperature": 0.2, "min_new_tokens": 10}
GREEDY = {"num_beams": 1, "do_sample": False}


@dataclass(frozen=True)
class Metric:
    """What is measured of an answer.

    Args:
        title: in reports.
        module: function of evaluation.metrics; none for likelihoods.
        reference: the field of `EvalObject` that holds the truth: "label", "caption" or "color".
        unit: "share" in [0, 1], "score100" in [0, 100], or "count".
        is_hit: whether an object's value is 0 or 1, so that the score is a share of objects.
        is_ratio: whether it is no mean over objects but a sum divided by a sum. Pairs of objects say nothing of such a one;
            its two parts are tested.
        lower_is_better: as of mistakes.
        needs: what it needs beside answers and references: "judge", "wordnet", the Hub id of a sentence encoder, or nothing.
        prompt: name of the prompt that a judge answers; one reply may give several scores.
    """

    title: str
    module: str
    reference: str
    unit: str = "share"
    is_hit: bool = False
    is_ratio: bool = False
    lower_is_better: bool = False
    needs: str = ""
    prompt: str = ""


# In the order in which a report has them. A run's main score is the first that it has.
METRICS = {
    "closed_set_accuracy": Metric(
        "closed-set accuracy", "closed_set_accuracy", "label", is_hit=True, prompt="closed_set_accuracy"
    ),
    "open_vocabulary_accuracy": Metric(
        "open-vocabulary accuracy", "open_vocabulary_accuracy", "label", is_hit=True, needs="judge",
        prompt="open_vocabulary_accuracy",
    ),
    "caption_score": Metric(
        "caption score", "caption_judge_score", "caption", "score100", needs="judge", prompt="caption_score"
    ),
    "precision": Metric(
        "precision of details", "hallucination", "caption", is_ratio=True, needs="judge", prompt="hallucination"
    ),
    "correctness": Metric("right details", "hallucination", "caption", "count", needs="judge", prompt="hallucination"),
    "hallucination": Metric(
        "wrong details", "hallucination", "caption", "count", lower_is_better=True, needs="judge", prompt="hallucination"
    ),
    "color_accuracy": Metric("color accuracy", "closed_set_accuracy", "color", is_hit=True),
    "likelihood_top_1": Metric("likelihood, top 1", "", "label", is_hit=True),
    "likelihood_top_5": Metric("likelihood, top 5", "", "label", is_hit=True),
    "s_bert": Metric(
        "S-BERT", "sentence_similarity", "caption", needs="sentence-transformers/all-mpnet-base-v2"
    ),
    "simcse": Metric("SimCSE", "sentence_similarity", "caption", needs="princeton-nlp/sup-simcse-roberta-large"),
    "meteor": Metric("METEOR", "caption_overlap", "caption", needs="wordnet"),
    "rouge_l": Metric("ROUGE-L", "caption_overlap", "caption"),
    "bleu_4": Metric("BLEU-4", "caption_overlap", "caption"),
    "bleu_1": Metric("BLEU-1", "caption_overlap", "caption"),
}  # fmt: skip
JUDGE_PROMPTS = tuple(dict.fromkeys(metric.prompt for metric in METRICS.values() if metric.prompt))


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        name: in results and files.
        prompt: as the paper's benchmarks have it.
        metrics: names of `METRICS`, the main one first.
    """

    name: str
    prompt: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    Args:
        name: on the command line.
        title: in reports.
        questions: the main one first.
        max_new_tokens: of an answer.
        classes: each class with the names it goes by; None where there is no closed set.
        judges_classes: whether a judge, if there is one, says which class an answer means, as in the paper's ModelNet40.
        phrases: the answers whose likelihood is taken, all together, with {} for a class's name.
        has_color: whether the clouds have colors to take away.
    """

    name: str
    title: str
    questions: tuple[Question, ...]
    max_new_tokens: int
    classes: dict[str, tuple[str, ...]] | None = None
    judges_classes: bool = False
    phrases: tuple[str, ...] = ()
    has_color: bool = True


# Forms that an answer may have: of each class they count together, so that what a model was never taught to say costs it
# nothing beside what it says. A name takes one of the two articles, and finds its own.
PLAIN_PHRASES = ("{}", "This is a {}.", "This is an {}.", "A 3D model of a {}.", "A 3D model of an {}.")
COLOR_PHRASES = tuple(f"This is {with_article(color)} {{}}." for color in COLORS)

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
        Question("instruction", DEFAULT_PROMPT, ("closed_set_accuracy",)),
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
        Question("instruction", DEFAULT_PROMPT, ("open_vocabulary_accuracy", *ENCODED)),
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
        Question("what", DEFAULT_PROMPT, ("closed_set_accuracy", "open_vocabulary_accuracy", "color_accuracy")),
        Question("color", COLOR_PROMPT, ("color_accuracy",)),
        Question("caption", CAPTION_PROMPT, (*OVERLAP, *JUDGED_CAPTION, *ENCODED)),
    ),
    max_new_tokens=100,
    # A kind goes by several names, and the most likely one counts.
    classes={kind: tuple(answers) for kind, answers in KINDS.items()},
    # As the checkpoint has learned to say it: with a color, whichever.
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
