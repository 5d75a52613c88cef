"""Checks of the texts that a metric gets."""

from collections.abc import Sequence


def check_pairs(predictions: Sequence[str], references: Sequence, several_references: bool = False):
    """Check that predictions and references are lists of the same number of texts.

    Args:
        several_references: whether a reference may also be a list of texts.

    Raises:
        ValueError: one of them is empty, is no list or holds something other than texts, or their numbers differ.
    """
    check_texts("predictions", predictions)
    if several_references and not isinstance(references, str) and hasattr(references, "__len__"):
        for index, texts in enumerate(references):
            check_texts(f"references[{index}]", [texts] if isinstance(texts, str) else texts)
    else:
        check_texts("references", references)
    if len(predictions) != len(references):
        raise ValueError(
            f"got {len(predictions)} `predictions` and {len(references)} `references`; expected one of each per object"
        )


def check_texts(name: str, texts: Sequence[str]):
    """Check that the argument `name` is a list of at least one text.

    Raises:
        ValueError: it is empty, is no list or holds something other than texts.
    """
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ValueError(f"`{name}` must be a list of texts, got {texts!r}")
    if len(texts) == 0:
        raise ValueError(f"`{name}` is empty: there is nothing to score")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`{name}[{index}]` must be a text, got {text!r}")
