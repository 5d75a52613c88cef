"""Samples per second that one process reads from packed data, and the time of each part.

    python benchmarks/stream_shards.py [--objects 512] [--steps 60]

Random clouds of 8192 points with brief descriptions are packed into a temporary folder and read as a worker of stage I
reads them. plain: clouds are checked and normalized again, as those of other sources are. ours: they are taken as they were
packed. with groups: the groups of the paper's model are read, too. The three take turns, step by step; ratios are of a turn.
Times are processor times. Other work on the machine lengthens them, too, and the fastest step the least.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from minigpt3d.arguments import positive_int
from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.data import shards, sources
from minigpt3d.data.clouds import Grouping
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor
from minigpt3d.training import stream
from minigpt3d.training.stages import RECIPES


PROCESSOR = Path(__file__).parent.parent / "checkpoints" / "household"  # for its tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=positive_int, default=512, help="in the data set (default: 512)")
    parser.add_argument("--steps", type=positive_int, default=60, help="of 9 samples each (default: 60)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = MiniGPT3DProcessor.from_pretrained(PROCESSOR)
    processor.feature_extractor.num_points = shards.NUM_POINTS
    grouping = Grouping.of(MiniGPT3DConfig(), processor)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args.objects, grouping)
        ways = {name: open_stream(f"{folder}/packed", processor) for name in ("plain", "ours", "with groups")}
        ways["plain"].sources["brief"].is_normalized = False
        sources.use_groups(ways["with groups"].sources, grouping)
        clouds = [way.encode(0, 0)["point_clouds"] for way in ways.values()]
        print(f"largest difference of a coordinate, plain to ours: {(clouds[0] - clouds[1]).abs().max():.1e}")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(1, args.steps + 1):
            for name, way in ways.items():
                seconds[name].append(read_step(way, step))
        slots = len(ways["ours"].slots(0))
        for name, of_steps in seconds.items():
            ratios = [plain / one for plain, one in zip(seconds["plain"], of_steps, strict=True)]
            low, high = np.quantile(ratios, [0.1, 0.9])
            print(
                f"{name:<12}{slots * args.steps / sum(of_steps):>6.0f} objects a second, {slots / min(of_steps):.0f} in "
                f"the fastest step; plain / {name} {median(ratios):.2f} ({low:.2f} to {high:.2f})"
            )
        print_parts(open_stream(f"{folder}/packed", processor), args.steps)


def open_stream(data: str, processor) -> stream.StageStream:
    return stream.StageStream(RECIPES["paper"]["I"], sources.open_sources(["brief"], data, []), processor, seed=0)


def read_step(way: stream.StageStream, step: int) -> float:
    """Seconds for the samples of a step."""
    started = time.process_time()
    for slot in way.slots(step):
        way.encode(step, slot)
    return time.process_time() - started


def print_parts(way: stream.StageStream, steps: int):
    spent: dict[str, float] = {}
    timed(sources.PackedSource, "_group", "row groups from disk", spent)
    timed(sources, "decode_cloud", "clouds from 9 bytes a point", spent)
    timed(way.processor, "_render", "chat template", spent)
    timed(way.processor, "_tokenize", "tokenizer", spent)
    timed(way.processor, "_pad", "rows of tokens", spent)
    seconds = sum(read_step(way, step) for step in range(steps))
    spent["everything else"] = seconds - sum(spent.values())
    count = steps * len(way.slots(0))
    print(f"ours, {1e3 * seconds / count:.2f} ms each:")
    for name, part in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {name:<32}{1e3 * part / count:>6.2f} ms {part / seconds:>5.0%}")


def write_data(folder: Path, count: int, grouping: Grouping):
    rng, lines = np.random.default_rng(0), ["file,caption"]
    for index in range(count):
        cloud = np.concatenate([rng.normal(size=(shards.NUM_POINTS, 3)), rng.random((shards.NUM_POINTS, 3))], 1)
        np.save(folder / f"{index}.npy", cloud.astype(np.float32))
        lines.append(f"{index}.npy,This is number {index} of several objects with two colors and four legs.")
    (folder / "captions.csv").write_text("\n".join(lines))
    shards.pack(shards.table_entries(folder / "captions.csv"), folder / "packed", grouping=grouping)


def timed(owner, name: str, label: str, spent: dict[str, float]):
    """Make a function or a callable attribute record its processor time. The timed functions do not call each other."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        started = time.process_time()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[label] = spent.get(label, 0.0) + time.process_time() - started

    setattr(owner, name, outer)


if __name__ == "__main__":
    main()
