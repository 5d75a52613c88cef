"""Caption overlap: words that a description shares with its references, as BLEU-1, BLEU-4, ROUGE-L and METEOR.

As the field computes them for 3D captions: BLEU and METEOR over words between blanks, sentence by sentence, BLEU
smoothed by method 1; then the mean over objects.
"""

import unicodedata

import datasets
import evaluate


SCORES = ("bleu_1", "bleu_4", "rouge_l", "meteor")


class CaptionOverlap(evaluate.Metric):
    """Words that descriptions share with their references, as BLEU-1, BLEU-4, ROUGE-L and METEOR."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="""
Args:
    predictions: the descriptions, one text for each object.
    references: for each object a text, or a list of texts, of which BLEU counts all and the others the best.
    scores: which to compute, of bleu_1, bleu_4, rouge_l and meteor; all of them if left out.

Returns:
    bleu_1, bleu_4, rouge_l, meteor: the mean over objects, between 0 and 1, of each that was asked for.
    values: {score: one number for each object}.
""",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **others):
        """Add descriptions and references."""
        _check_texts("predictions", predictions)
        if isinstance(references, str) or not hasattr(references, "__len__"):
            raise ValueError(
                f"references must be a list with a text or a list of texts for each object, got {references!r}."
            )
        references = [[texts] if isinstance(texts, str) else texts for texts in references]
        for number, texts in enumerate(references):
            _check_texts(f"references[{number}]", texts)
        super().add_batch(predictions=predictions, references=references, **others)

    def _compute(self, predictions, references, scores=SCORES):
        strangers = [score for score in scores if score not in SCORES]
        if isinstance(scores, str) or strangers or not scores:
            raise ValueError(f"scores must be one or more of {', '.join(SCORES)} in a list, got {scores!r}.")
        # Each looks for its library and data first: nothing is computed before all are known to be there.
        functions = {score: _FUNCTIONS[score]() for score in scores}
        values = {
            score: [float(function(texts, answer)) for texts, answer in zip(references, predictions, strict=True)]
            for score, function in functions.items()
        }
        return {score: sum(numbers) / len(numbers) for score, numbers in values.items()} | {"values": values}


# ---- Each a function of (references, answer), made when its library is there ----------------------------------------


def _bleu(order):
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError as error:
        raise ImportError(_missing("BLEU", "nltk")) from error
    weights = [1 / order] * order
    smoothing = SmoothingFunction().method1
    return lambda references, answer: sentence_bleu(
        [text.split() for text in references], answer.split(), weights, smoothing_function=smoothing
    )


def _rouge_l():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(_missing("ROUGE-L", "rouge-score")) from error
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda references, answer: scorer.score_multi(references, answer)["rougeL"].fmeasure


class _Words:
    """As rouge-score's own, which knows the letters of English alone: of a text in another script it leaves nothing."""

    def tokenize(self, text):
        text = unicodedata.normalize("NFC", text.lower())
        return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()


def _meteor():
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score
    except ImportError as error:
        raise ImportError(_missing("METEOR", "nltk")) from error
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise LookupError(
            "METEOR needs WordNet, which nltk does not find: python -m nltk.downloader wordnet. Or leave meteor "
            "out of scores."
        ) from error
    return lambda references, answer: meteor_score(
        [text.split() for text in references], answer.split(), wordnet=wordnet
    )


_FUNCTIONS = {"bleu_1": lambda: _bleu(1), "bleu_4": lambda: _bleu(4), "rouge_l": _rouge_l, "meteor": _meteor}


def _missing(score, package):
    return f'{score} needs {package}: pip install "minigpt3d[eval]", or pip install {package}'


# ---- The same in every metric of this family, each of which is loaded alone -----------------------------------------


def _check_texts(name, texts):
    """A ValueError unless it is a list of one text or more."""
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ValueError(f"{name} must be a list of texts, got {texts!r}.")
    if len(texts) == 0:
        raise ValueError(f"{name} is empty: there is nothing to score.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{number}] must be a text, got {text!r}.")
