"""The history of a run: history.jsonl, one entry for every optimizer step.

step, source            counted from 0; the source that the step drew
loss                    mean cross-entropy over the answer tokens, in nats
lr, grad_norm           learning rate; norm of the gradient over all that trains
samples_per_second      with the wait for data
update_ratio            {module group: norm of the step's update / norm of the weights}, in every tenth entry
router                  only where there is a router, over the clouds of the step:
    load, weight        (E,): share of the clouds that use an expert; mean softmax weight
    entropy, between    mean entropy of a cloud's weights; entropy of the mean weights minus that, 0 if all clouds have the
                        same weights; in nats
validation_before       loss on held-out samples, in the first entry, if it was measured
validation              the same, after each `eval_every`-th step between
validation_after        the same, in the last entry
"""

import json
from pathlib import Path

import numpy as np

from minigpt3d.files import write_bytes


HISTORY_FILE = "history.jsonl"


def read_history(path: str | Path) -> list[dict]:
    """The entries of a history.jsonl. An incomplete last line, left by a killed run, is ignored.

    Raises:
        ValueError: another line is not a JSON object.
    """
    lines = Path(path).read_bytes().split(b"\n")  # every complete line ends in a newline
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            history.append(entry)
        elif number < len(lines):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {line[:60]!r}. Only the last line may be incomplete; "
                "remove this line or the file."
            )
    return history


def restore_history(path: Path, kept: Path | None) -> bool:
    """Begin the history as a checkpoint has kept it: steps after the checkpoint are repeated.

    Args:
        kept: the checkpoint's history; None to begin with no steps.

    Returns:
        Whether the steps up to the checkpoint were there, unchanged.
    """
    content = kept.read_bytes() if kept else b""
    is_whole = not content or (path.is_file() and path.read_bytes().startswith(content))
    write_bytes(path, content)
    return is_whole


def column(history: list[dict], *names: str) -> np.ndarray:
    """One value of every entry, by its path of names: (steps,), or (steps, E) for values of the experts."""
    values = history
    for name in names:
        values = [value[name] for value in values]
    return np.array(values, dtype=float)


def module_groups(history: list[dict]) -> list[str]:
    """Names of the modules that train, in the order of their appearance."""
    return list(dict.fromkeys(group for entry in history for group in entry.get("update_ratio", {})))
