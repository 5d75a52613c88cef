"""Lists of labels: one on each line of a text file, or the kinds of the bundled model."""

from collections.abc import Sequence
from pathlib import Path

from minigpt3d.evaluation.suites import HOUSEHOLD


def read_labels(path: Path | None) -> dict[str, Sequence[str]]:
    """Labels with their names: of a file, or the kinds of household objects if there is none.

    Raises:
        ValueError: the file cannot be read, is empty, or repeats a label.
    """
    if path is None:
        return HOUSEHOLD.classes
    expected = "Expected a text file in UTF-8 with a label on each line."
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"`labels` {path}: not UTF-8 ({error}). {expected}") from error
    except OSError as error:
        raise ValueError(f"`labels` {path}: cannot be read ({error.strerror or error}). {expected}") from error
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        label = " ".join(line.split())
        if label in labels:
            raise ValueError(
                f"`labels` {path}, line {number}: {label!r} is on line {labels[label]} already. Delete one."
            )
        if label:
            labels[label] = number
    if not labels:
        raise ValueError(f"`labels` {path} is empty. {expected}")
    return {label: (label,) for label in labels}
