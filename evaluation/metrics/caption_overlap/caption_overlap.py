"""BLEU-1, BLEU-4, ROUGE-L and METEOR of captions, as PointLLM's evaluation computes them, which the paper follows.

Means over objects of sentence scores, with nltk and rouge-score. Words are what stands between blanks; BLEU is smoothed by
method 1. ROUGE-L, which PointLLM takes from another package, is the F-measure of rouge-score, without stemming.
"""

import datasets
import evaluate


_INPUTS = """
Args:
    predictions: captions, one text for each object.
    references: a true caption of each object.
    scores: some of "bleu_1", "bleu_4", "rouge_l", "meteor".
Returns:
    each score in [0, 1], and values ({score: …}, for each object).
"""
SCORES = ("bleu_1", "bleu_4", "rouge_l", "meteor")


class CaptionOverlap(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, scores=SCORES):
        unknown = [score for score in scores if score not in SCORES]
        if unknown or not scores:
            raise ValueError(f"scores: expected some of {', '.join(SCORES)}, got {list(scores)}.")
        # All that may be missing is missed before anything is computed.
        measures = {score: _MEASURES[score]() for score in scores}
        pairs = list(zip(predictions, references, strict=True))
        values = {
            score: [float(measure(answer, truth)) for answer, truth in pairs] for score, measure in measures.items()
        }
        return {score: sum(each) / len(each) for score, each in values.items()} | {"values": values}


def _require(package: str, module: str):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(
            f'caption_overlap needs {package}: pip install "minigpt3d[eval]", or {package} alone.'
        ) from error


def _bleu(order: int):
    def make():
        bleu = _require("nltk", "nltk.translate.bleu_score")
        smoothing, weights = bleu.SmoothingFunction().method1, (1 / order,) * order

        def measure(answer: str, truth: str) -> float:
            words = answer.split()
            return bleu.sentence_bleu([truth.split()], words, weights, smoothing) if words else 0.0

        return measure

    return make


def _rouge_l():
    scorer = _require("rouge-score", "rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return lambda answer, truth: scorer.score(truth, answer)["rougeL"].fmeasure


def _meteor():
    meteor = _require("nltk", "nltk.translate.meteor_score")
    corpus = _require("nltk", "nltk.corpus")
    try:
        corpus.wordnet.ensure_loaded()
    except LookupError as error:
        raise LookupError("METEOR needs WordNet, which is not there: python -m nltk.downloader wordnet") from error
    return lambda answer, truth: meteor.meteor_score([truth.split()], answer.split())


_MEASURES = {"bleu_1": _bleu(1), "bleu_4": _bleu(4), "rouge_l": _rouge_l, "meteor": _meteor}
