"""The metrics as a table: title, function, what answers are compared with, unit, and what a metric needs."""

from dataclasses import dataclass


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
