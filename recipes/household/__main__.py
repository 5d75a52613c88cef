"""The whole recipe of `checkpoints/household`, on two cores in at most 90 minutes: `make household LIBRARIES="…"`.

    python -m minigpt3d.recipes.household A.sh3f B.sh3f [--work_dir build/household] [--output_dir checkpoints/household]

Steps: build the data and pack it; pre-train encoder, Q-Former and language model; stages I to IV by `training/stage1.py` to
`stage4.py`; score every stage; write the checkpoint with its model card. A step whose result is there is not done
again, so a run that was stopped goes on where it was; remove the work directory to start afresh.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minigpt3d.conversion import save_pretrained, verification as verify
from minigpt3d.data.shards import pack, release_entries
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor

from .build_data import SOURCES, build
from .heldout import write_heldout
from .recipe_card import write_model_card
from .stage_scores import evaluate_models, to_table


STAGES = ("I", "II", "III", "IV")
_REPOSITORY = Path(__file__).resolve().parents[2]


class Recipe:
    """Carries out steps that are not done yet, and notes how long each took."""

    def __init__(self, work_dir: Path):
        self.work_dir = work_dir
        work_dir.mkdir(parents=True, exist_ok=True)
        self.times_file = work_dir / "times.json"
        self.times = json.loads(self.times_file.read_text()) if self.times_file.exists() else {}

    def step(self, name: str, result: Path, action: Callable[[], object]):
        """Do `action` unless `result` exists; the action makes it appear, as a whole, at its end."""
        if result.exists():
            print(f"== {name}: {result} is there", flush=True)
            return
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        action()
        self.times[name] = round((time.perf_counter() - started) / 60, 2)
        self.times_file.write_text(json.dumps(self.times, indent=1))
        print(f"== {name}: {self.times[name]} minutes", flush=True)


def run_module(*command: str | Path):
    """Run a Python program of ours in a process of its own.

    Raises:
        SystemExit: it failed; its own message stands above.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    # glibc would give every large tensor back and fetch it anew: 0.97 against 0.66 seconds a step of the encoder.
    environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    completed = subprocess.run([sys.executable, "-m", *map(str, command)], env=environment, check=False)
    if completed.returncode:
        raise SystemExit(f"error: {' '.join(map(str, command[:4]))} … ended with code {completed.returncode}.")


def pack_data(data_dir: Path, output_dir: Path):
    """The training objects as the stages read them."""
    pack(
        release_entries(data_dir / "clouds", [data_dir / f"{source}.json" for source in SOURCES.values()]), output_dir
    )


def train_stage(number: int, init: Path, packed: Path, output_dir: Path, max_steps: int | None):
    script = _REPOSITORY / "training" / f"stage{number}.py"
    options = ["--recipe", "household", "--init", init, "--data", packed, "--output_dir", output_dir]
    options += ["--num_workers", 1, "--resume", "auto"]
    if max_steps:
        options += ["--max_steps", max_steps]
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 2]
    run_module(*launch, script, *options)


def export(source: Path, output_dir: Path):
    """The last stage's model in half precision, without what only training needs, with what it computes (`verify`)."""
    model = MiniGPT3DForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    whole = output_dir.with_name(output_dir.name + ".unverified")
    save_pretrained(model.half(), MiniGPT3DProcessor.from_pretrained(source), whole)
    verify.store(whole, verify.compute(whole))
    whole.rename(output_dir)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m minigpt3d.recipes.household",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("libraries", type=Path, nargs="+", help="Sweet Home 3D furniture libraries, .sh3f")
    parser.add_argument("--work_dir", type=Path, default=Path("build/household"), help="for data and stages")
    parser.add_argument("--output_dir", type=Path, default=Path("checkpoints/household"), help="for the checkpoint")
    parser.add_argument("--held_out_library", help="stem of a library to score on instead of training on it")
    parser.add_argument("--max_steps", type=int, help="at most so many steps in every training, to try the recipe out")
    args = parser.parse_args(argv)
    missing = [str(path) for path in args.libraries if not path.is_file()]
    if missing:
        raise SystemExit(f"error: no such file: {', '.join(missing)}. Give paths of .sh3f libraries.")

    recipe = Recipe(args.work_dir)
    data, packed, base = (args.work_dir / name for name in ("data", "packed", "base"))
    scores = args.work_dir / "scores.json"
    stages = {stage: args.work_dir / f"stage{number}" for number, stage in enumerate(STAGES, start=1)}
    try:
        recipe.step(
            "data",
            data / "report.json",  # written last
            lambda: build(args.libraries, data, args.held_out_library),
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    recipe.step("packing", packed, lambda: pack_data(data, packed))
    pretrain_options = ["--data", data, "--output_dir", base]
    if args.max_steps:
        for name in ("encoder", "qformer", "language"):
            pretrain_options += [f"--{name}_steps", args.max_steps]
    recipe.step(
        "encoder, Q-Former and language model",
        base / "pretrain.json",  # written last
        lambda: run_module("minigpt3d.recipes.household.pretrain", *pretrain_options),
    )
    init = base
    for number, stage in enumerate(STAGES, start=1):
        recipe.step(
            f"stage {stage}",
            stages[stage],
            lambda number=number, init=init, stage=stage: train_stage(
                number, init, packed, stages[stage], args.max_steps
            ),
        )
        init = stages[stage]
    checkpoint = args.work_dir / "checkpoint"
    recipe.step("export", checkpoint, lambda: export(stages["IV"], checkpoint))

    heldout, reports = args.work_dir / "heldout.parquet", args.work_dir / "reports"
    recipe.step("held-out objects", heldout, lambda: write_heldout(data, heldout))

    def score():
        found = evaluate_models(data, heldout, stages | {"shipped": checkpoint}, reports)
        scores.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    recipe.step("scores", scores, score)
    found = json.loads(scores.read_text(encoding="utf-8"))
    partial = args.output_dir.with_name(args.output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    partial.rename(args.output_dir)
    pretraining = json.loads((base / "pretrain.json").read_text())
    write_model_card(args.output_dir, data, found, reports / "shipped", recipe.times, pretraining)
    print(to_table(found))
    print(f"\n{args.output_dir} is done; minutes: {json.dumps(recipe.times)}, in all {sum(recipe.times.values()):.1f}")


if __name__ == "__main__":
    main()
