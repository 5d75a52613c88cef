"""Measure cleaning and the choice of the up axis: kinds named on clean and spoiled held-out objects.

    python benchmarks/clean.py [--model DIR] [--batch 16] [--limit N]

The objects of `minigpt3d evaluate household` are spoiled in three ways: 1 % far outliers (uniform in a box of three times
the object's size), a floor (30 % more points, in a horizontal plane under the object with sides 1.5 times as long), and z up
(turned, not said). Each is read in three ways: as it is, with clean="all", and with clean="all" and up_axis="auto". Greedy
answers to "What is this?"; 95 % Wilson intervals.
"""

import argparse
import datetime
import platform
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import transformers

from minigpt3d.arguments import positive_int
from minigpt3d.evaluation.objects import read_household
from minigpt3d.evaluation.statistics import wilson
from minigpt3d.evaluation.vocabulary.kinds import names_kind
from minigpt3d.hub import default_model, load_model
from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline


def keep(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A cloud (N, 6) as it is."""
    return cloud


def add_outliers(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add 1 % of points in three times the box, in colors of the object."""
    low, high = cloud[:, :3].min(axis=0), cloud[:, :3].max(axis=0)
    outliers = cloud[rng.choice(len(cloud), round(0.01 * len(cloud)))].copy()
    outliers[:, :3] = rng.uniform(2 * low - high, 2 * high - low, (len(outliers), 3))
    return np.concatenate([cloud, outliers])


def add_floor(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add 30 % of gray points in the plane of the lowest one, with sides 1.5 times as long as the object's."""
    low, high = cloud[:, :3].min(axis=0), cloud[:, :3].max(axis=0)
    floor = np.full((round(0.3 * len(cloud)), 6), 0.5)
    floor[:, :3] = rng.uniform(1.25 * low - 0.25 * high, 1.25 * high - 0.25 * low, (len(floor), 3))
    floor[:, 1] = low[1]
    return np.concatenate([cloud, floor])


def turn_z_up(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn a cloud so that z points up instead of y."""
    return np.concatenate([cloud[:, :1], -cloud[:, 2:3], cloud[:, 1:2], cloud[:, 3:]], axis=1)


SPOILS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "clean": keep,
    "1 % far outliers": add_outliers,
    "a floor": add_floor,
    "z up": turn_z_up,
    "all three": lambda cloud, rng: turn_z_up(add_floor(add_outliers(cloud, rng), rng), rng),
}
READINGS = {
    "as it is": {"clean": "none"},
    'clean="all"': {"clean": "all"},
    'clean="all", up_axis="auto"': {"clean": "all", "up_axis": "auto"},
}


def share(hits: int, total: int) -> str:
    low, high = wilson(hits, total)
    return f"{hits / total:.2f} ({low:.2f} to {high:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of the model (default: the bundled one)")
    parser.add_argument("--batch", type=positive_int, default=16, help="objects per batch (default: 16)")
    parser.add_argument("--limit", type=positive_int, help="only the first N objects, as a trial")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, processor = load_model(args.model or default_model())
    except ValueError as error:
        sys.exit(f"error: {error}")
    describe = PointCloudToTextPipeline(model=model.float().eval(), processor=processor)
    objects = read_household()[: args.limit]
    clouds = [item.read() for item in objects]
    warnings.simplefilter("ignore", UserWarning)  # what was removed from each cloud
    start = time.perf_counter()
    print(f"| {len(objects)} objects | {' | '.join(READINGS)} |\n|-|{'-|' * len(READINGS)}")
    for spoil, change in SPOILS.items():
        spoiled = [change(cloud, np.random.default_rng(number)) for number, cloud in enumerate(clouds)]
        cells = []
        for reading in READINGS.values():
            outputs = describe(spoiled, batch_size=args.batch, **reading)
            answers = [output["generated_text"] for (output,) in outputs]
            hits = sum(names_kind(answer, item.label) for answer, item in zip(answers, objects, strict=True))
            cells.append(share(hits, len(objects)))
        print(f"| {spoil} | {' | '.join(cells)} |", flush=True)
    print(
        f"\n{datetime.date.today()}, {describe.device.type}, float32, {time.perf_counter() - start:.0f} seconds, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
