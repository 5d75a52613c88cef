"""Checks of the texts that a metric is given."""

from collections.abc import Sequence


def check_texts(name: str, texts: Sequence[str]):
    """Check that an argument is a list of at least one text.

    Args:
        name: the argument's, for the message.

    Raises:
        ValueError: it is no list, is empty, or holds something else than texts.
    """
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ValueError(f"`{name}` must be a list of texts, got {texts!r}.")
    if len(texts) == 0:
        raise ValueError(f"`{name}` is empty: there is nothing to score.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`{name}[{index}]` must be a text, got {text!r}.")


def check_pairs(predictions: Sequence[str], references: Sequence):
    """Check predictions and references, which must be as many; each reference is a text or a list of texts.

    Raises:
        ValueError: one of them is not what it should be, or their numbers differ.
    """
    check_texts("predictions", predictions)
    if isinstance(references, str) or not hasattr(references, "__len__"):
        raise ValueError(f"`references` must be a list with one entry per prediction, got {references!r}.")
    if len(references) != len(predictions):
        raise ValueError(
            f"There must be as many predictions ({len(predictions)}) as references ({len(references)}): one per object."
        )
    if len(references) and not all(isinstance(reference, str) for reference in references):
        for index, reference in enumerate(references):
            check_texts(f"references[{index}]", [reference] if isinstance(reference, str) else reference)
