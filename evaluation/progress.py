"""Progress of long work: a bar for who watches, a line now and then in a log."""

import sys

from tqdm import tqdm


def progress(total: int, what: str, unit: str, initial: int = 0, shown: bool = True) -> tqdm:
    """A bar with units per second; in a file or a pipe it is renewed every half minute.

    Args:
        shown: False on all processes but one.
    """
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=initial, desc=what, unit=unit, disable=not shown, mininterval=seconds, maxinterval=60
    )
