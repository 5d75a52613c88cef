"""Progress of long work: a bar in a terminal, a line every half minute in a log."""

import sys

from tqdm import tqdm


def progress(total: int, title: str, unit: str, initial: int = 0, shown: bool = True) -> tqdm:
    """A bar with units per second; in a file or pipe it is printed every half minute.

    Args:
        shown: False on all processes but one.
    """
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=initial, desc=title, unit=unit, disable=not shown, mininterval=seconds, maxinterval=60
    )
