"""CPU seconds an object of `minigpt3d describe`, beside the path of `minigpt3d evaluate`, in one run.

Both answer "What is this?" greedily about the bundled model's held-out objects: `describe` reads each from a file, in a process
of its own whose time is counted; `evaluate` reads them from one table. Both times include loading the model.

    python benchmarks/describe_files.py
"""

import argparse
import contextlib
import io
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from minigpt3d.cli.describe import Options, run as describe
from minigpt3d.evaluation.ask import generate, load_for_evaluation
from minigpt3d.evaluation.evaluate_options import EvaluateOptions
from minigpt3d.evaluation.objects import check_clouds, read_objects
from minigpt3d.evaluation.suites import GREEDY
from minigpt3d.hub import default_model
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT


def seconds() -> np.ndarray:
    """CPU seconds of this process and its children, and seconds by the clock."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([sum(usage.ru_utime + usage.ru_stime for usage in usages), time.perf_counter()])


def describe_folder(folder: Path, device: str, batch_size: int | None = None) -> list[str]:
    """The answers of `minigpt3d describe` about the files of a folder."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        describe(Options(paths=[folder], device=device, batch_size=batch_size), [])
    return [line.partition(": ")[2] for line in printed.getvalue().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=100)
    parser.add_argument("--batch-size", type=int, help="of describe; by default its own")
    arguments = parser.parse_args()
    options = EvaluateOptions(suite="household", out=Path("unused"), greedy=True, device="cpu")
    objects = read_objects(options)[: arguments.objects]
    with tempfile.TemporaryDirectory() as folder:
        for number, item in enumerate(objects):
            np.save(os.path.join(folder, f"{number:03}.npy"), item.read())
        for name in ("warm-up", "evaluate", "describe"):
            start = seconds()
            if name == "describe":
                answers = describe_folder(Path(folder), "cpu", arguments.batch_size)
            else:
                model, processor = load_for_evaluation(default_model(), options)
                size = 1 if name == "warm-up" else options.batch_size
                chosen = objects[:1] if name == "warm-up" else objects
                check_clouds(chosen)  # evaluate reads every cloud once before it asks
                for first in range(0, len(chosen), size):
                    clouds = [item.read() for item in chosen[first : first + size]]
                    generate(model, processor, clouds, DEFAULT_PROMPT, "default", GREEDY | {"max_new_tokens": 150}, 0)
            cpu, clock = (seconds() - start) / len(objects)
            if name != "warm-up":
                print(f"{name:<10}{cpu:.4f} CPU s, {clock:.3f} s an object, {torch.get_num_threads()} threads")
    assert len(answers) == len(objects)


if __name__ == "__main__":
    main()
