"""Run the complete recipe of `checkpoints/household`, on two cores in at most 90 minutes: `make household LIBRARIES="…"`.

    python -m minigpt3d.recipes.household A.sh3f B.sh3f [--work_dir build/household] [--output_dir checkpoints/household]

Steps: build and pack the data; pre-train encoder, Q-Former and language model; train stages I to IV; score every stage;
write the checkpoint with its model card. A step whose result exists is skipped, so a stopped run resumes; remove the work
directory to start again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt3d.arguments import option, run_script
from minigpt3d.conversion import verification
from minigpt3d.data.records import SOURCES
from minigpt3d.data.shards import pack, release_entries
from minigpt3d.files import locked, read_json, write_json, written_whole
from minigpt3d.hub import check_model_dir, load_model, save_pretrained

from .build_data import build
from .heldout import write_heldout
from .recipe_card import write_model_card
from .stage_scores import evaluate_models, to_table


STAGES = ("I", "II", "III", "IV")
# By default glibc returns every large tensor to the system and allocates it anew: 0.97 instead of 0.66 s per encoder step.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
_LAUNCH = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
           "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "2", "--module")  # fmt: skip


@dataclass(frozen=True)
class RecipeOptions:
    """Options of the command."""

    libraries: list[Path] = option("Sweet Home 3D furniture libraries, .sh3f", positional=True, metavar="FILE.sh3f")
    work_dir: Path = option("folder for data and stages", default=Path("build/household"), metavar="DIR")
    output_dir: Path = option("folder for the checkpoint", default=Path("checkpoints/household"), metavar="DIR")
    held_out_library: str | None = option(
        "stem of a library to score on instead of training on it", default=None, metavar="STEM"
    )
    max_steps: int | None = option(
        "maximum steps of every training, and generated objects, to try the recipe out", default=None
    )


class Steps:
    """Runs steps whose result does not exist yet, and keeps their times in times.json.

    Args:
        work_dir: folder of the results.
    """

    def __init__(self, work_dir: Path):
        work_dir.mkdir(parents=True, exist_ok=True)
        self.times_file = work_dir / "times.json"
        advice = "Remove it; the steps that are done keep their results."
        self.times = read_json(self.times_file, advice=advice) if self.times_file.exists() else {}  # minutes
        if not all(isinstance(minutes, (int, float)) for minutes in self.times.values()):
            raise ValueError(f"{self.times_file}: expected minutes by step, got {self.times!r:.80}. {advice}")

    def run(self, name: str, result: Path, action: Callable[[], object]):
        """Call `action` unless `result` exists, which must appear, complete, at its end."""
        if result.exists():
            print(f"== {name}: {result} exists", flush=True)
            return
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        action()
        self.times[name] = round((time.perf_counter() - started) / 60, 2)
        write_json(self.times_file, self.times)
        print(f"== {name}: {self.times[name]} minutes", flush=True)


def run_module(*command: str | Path | int):
    """Run a Python module in a process of its own, offline and on the CPU.

    Raises:
        SystemExit: it failed; its own message is above.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"} | _MALLOC
    completed = subprocess.run([sys.executable, "-m", *map(str, command)], env=environment, check=False)
    if completed.returncode:
        module = next(str(word) for word in command if str(word).startswith("minigpt3d."))
        raise SystemExit(f"error: {module} ended with code {completed.returncode}.")


def train_stage(number: int, init: Path, packed: Path, output_dir: Path, max_steps: int | None):
    options = ["--recipe", "household", "--init", init, "--data", packed, "--output_dir", output_dir]
    options += ["--num_workers", 1, "--resume", "auto"]
    if max_steps:
        options += ["--max_steps", max_steps]
    run_module(*_LAUNCH, f"minigpt3d.training.stage{number}", *options)


def export(source: Path, output_dir: Path):
    """Write the last stage's model in half precision, without training files, with the result that `verify` expects."""
    model, processor = load_model(source, dtype=torch.float32)
    with written_whole(output_dir) as partial:
        save_pretrained(model.half(), processor, partial)
        verification.store(partial, verification.compute(partial))


def run_recipe(options: RecipeOptions):
    """Run all steps.

    Raises:
        ValueError: a library is missing or unreadable, another process is running this recipe, or the output folder is
            not a model's.
        SystemExit: a training failed.
    """
    if missing := [str(path) for path in options.libraries if not path.is_file()]:
        raise ValueError(f"no such file: {', '.join(missing)}. Give paths of .sh3f libraries.")
    check_model_dir(options.output_dir)
    with locked(options.work_dir):
        _run_steps(options)


def _run_steps(options: RecipeOptions):
    steps = Steps(options.work_dir)
    data, stages, checkpoint = train(options, steps)
    scores_file, reports = options.work_dir / "scores.json", options.work_dir / "reports"
    heldout = options.work_dir / "heldout.parquet"
    steps.run("held-out objects", heldout, lambda: write_heldout(data, heldout))
    steps.run(
        "scores",
        scores_file,
        lambda: write_json(scores_file, evaluate_models(data, heldout, stages | {"shipped": checkpoint}, reports)),
    )
    scores = read_json(scores_file)
    with written_whole(options.output_dir) as partial:
        shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
    pretraining = read_json(options.work_dir / "base" / "pretrain.json")
    write_model_card(options.output_dir, data, scores, reports / "shipped", steps.times, pretraining)
    print(to_table(scores))
    print(f"\n{options.output_dir} is done; minutes: {json.dumps(steps.times)}, sum {sum(steps.times.values()):.1f}")


def train(options: RecipeOptions, steps: Steps) -> tuple[Path, dict[str, Path], Path]:
    """Build the data and train.

    Returns:
        The folders of the data, of every stage by name, and of the exported checkpoint.
    """
    data, packed, base, checkpoint = (options.work_dir / name for name in ("data", "packed", "base", "checkpoint"))
    # counts.json is written last, and so is pretrain.json.
    steps.run("data", data / "counts.json", lambda: build(options.libraries, data, options.held_out_library))
    annotations = [data / f"{source}.json" for source in SOURCES.values()]
    steps.run("packing", packed, lambda: pack(release_entries(data / "clouds", annotations), packed))
    pretrain = ["minigpt3d.recipes.household.pretrain", "--data", data, "--output_dir", base]
    if options.max_steps:
        for name in ("encoder_steps", "qformer_steps", "language_steps", "num_procedural"):
            pretrain += [f"--{name}", options.max_steps]
    steps.run("encoder, Q-Former and language model", base / "pretrain.json", lambda: run_module(*pretrain))
    stages, init = {}, base
    for number, stage in enumerate(STAGES, start=1):
        folder = stages[stage] = options.work_dir / f"stage{number}"
        steps.run(
            f"stage {stage}",
            folder,
            lambda number=number, init=init, folder=folder: train_stage(
                number, init, packed, folder, options.max_steps
            ),
        )
        init = folder
    steps.run("export", checkpoint, lambda: export(stages["IV"], checkpoint))
    return data, stages, checkpoint


def main(argv: list[str] | None = None):
    run_script(run_recipe, RecipeOptions, argv, __doc__, "minigpt3d.recipes.household")


if __name__ == "__main__":
    main()
