"""Caption overlap: words that a description shares with its references, as BLEU-1, BLEU-4, ROUGE-L and METEOR.

As the field computes them for 3D captions: BLEU and METEOR over words separated by blanks, sentence by sentence, BLEU
smoothed by method 1; then the mean over objects. Paper: §4.
"""

import unicodedata
from collections.abc import Callable, Sequence

from .checks import check_pairs


SCORES = ("bleu_1", "bleu_4", "rouge_l", "meteor")


def caption_overlap(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], *, scores: Sequence[str] = SCORES
) -> dict:
    """Words in common of descriptions and their references: BLEU-1, BLEU-4, ROUGE-L and METEOR.

    Args:
        predictions: the descriptions, one text per object.
        references: per object a text or a list of texts; BLEU counts all of them, the other scores take the best.
        scores: which to compute, of bleu_1, bleu_4, rouge_l and meteor.

    Returns:
        bleu_1, bleu_4, rouge_l, meteor: the mean over objects, between 0 and 1, of each requested score.
        values: {score: one number per object}.

    Raises:
        ImportError: nltk or rouge-score is missing.
        LookupError: nltk does not find WordNet, which METEOR needs.
    """
    check_pairs(predictions, references, several_references=True)
    unknown = [score for score in scores if score not in SCORES]
    if isinstance(scores, str) or unknown or not scores:
        raise ValueError(f"`scores` must be a list of one or more of {', '.join(SCORES)}, got {scores!r}.")
    try:  # all libraries and data, before anything is computed
        functions = {score: _FUNCTIONS[score]() for score in scores}
    except ImportError as error:
        package = error.name.partition(".")[0].replace("_", "-")
        raise ImportError(f'caption_overlap needs {package}: pip install "minigpt3d[eval]"') from error
    references = [[texts] if isinstance(texts, str) else texts for texts in references]
    values = {
        score: [float(function(texts, answer)) for texts, answer in zip(references, predictions, strict=True)]
        for score, function in functions.items()
    }
    return {score: sum(numbers) / len(numbers) for score, numbers in values.items()} | {"values": values}


# ---- Per score, a function that makes a function (references, answer) -> score --------------------------------------


def _bleu(order: int) -> Callable:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    weights = [1 / order] * order
    smoothing = SmoothingFunction().method1
    return lambda references, answer: sentence_bleu(
        [text.split() for text in references], answer.split(), weights, smoothing_function=smoothing
    )


def _rouge_l() -> Callable:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda references, answer: scorer.score_multi(references, answer)["rougeL"].fmeasure


class _Words:
    """A tokenizer for rouge-score that supports all scripts; the default one keeps English letters only."""

    def tokenize(self, text):
        text = unicodedata.normalize("NFC", text.lower())
        return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()


def _meteor() -> Callable:
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise LookupError(
            "METEOR needs WordNet, which nltk does not find. Run python -m nltk.downloader wordnet, or leave meteor out of "
            "`scores`."
        ) from error
    return lambda references, answer: meteor_score(
        [text.split() for text in references], answer.split(), wordnet=wordnet
    )


_FUNCTIONS = {"bleu_1": lambda: _bleu(1), "bleu_4": lambda: _bleu(4), "rouge_l": _rouge_l, "meteor": _meteor}
