"""Samples per second that one process reads from packed data, and the time of each part.

    python benchmarks/stream_shards.py [--objects 512] [--steps 60]

Random clouds of 8192 points with brief descriptions are packed into a temporary folder and read as a worker of stage I
reads them. Times are processor times, which other work on the machine does not lengthen.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from minigpt3d.arguments import positive_int
from minigpt3d.data import shards, sources
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
    stage, spent = RECIPES["paper"]["I"], {}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args.objects)
        opened = sources.open_sources(["brief"], f"{folder}/packed", [])
        samples = stream.StageStream(stage, opened, processor, seed=0)
        timed(sources.PackedSource, "_group", "row groups from disk", spent)
        timed(sources, "decode_cloud", "clouds from 9 bytes a point", spent)
        timed(processor, "_render", "chat template", spent)
        timed(processor, "_tokenize", "tokenizer", spent)
        timed(processor, "feature_extractor", "clouds checked and normalized", spent)
        started = time.process_time()
        count = sum(len(samples.encode(step, slot)) > 0 for step in range(args.steps) for slot in samples.slots(step))
        seconds = time.process_time() - started
    spent["everything else"] = seconds - sum(spent.values())
    print(f"{count} samples, {count / seconds:.0f} a second, {1e3 * seconds / count:.2f} ms each:")
    for name, part in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {name:<32}{1e3 * part / count:>6.2f} ms {part / seconds:>5.0%}")


def write_data(folder: Path, count: int):
    rng, lines = np.random.default_rng(0), ["file,caption"]
    for index in range(count):
        cloud = np.concatenate([rng.normal(size=(shards.NUM_POINTS, 3)), rng.random((shards.NUM_POINTS, 3))], 1)
        np.save(folder / f"{index}.npy", cloud.astype(np.float32))
        lines.append(f"{index}.npy,This is number {index} of several objects with two colors and four legs.")
    (folder / "captions.csv").write_text("\n".join(lines))
    shards.pack(shards.table_entries(folder / "captions.csv"), folder / "packed")


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
