"""Train and score variants of the household recipe, to show what each of its parts contributes.

    python -m minigpt3d.recipes.household.ablate --base DIR --data PACKED --out DIR [--seeds 0 1 2] [--scale 0.25]

Every variant is the recipe with one thing changed. Stages that variants have in common are trained once, and clouds are
encoded once, since the encoder is frozen. A stopped run resumes, and several processes with different seeds may share OUT.
"""

import math
import os
import platform
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from transformers.utils import logging

from minigpt3d.arguments import option, run_script
from minigpt3d.data.sources import fingerprint
from minigpt3d.files import read_json, write_json
from minigpt3d.hub import fingerprint_model
from minigpt3d.messages import public_word
from minigpt3d.model_card.ablation import ablation_table

from .ablation_files import write_ablation
from .lab import Lab
from .variants import VARIANTS, Variant


RUNS_DIR, SETTINGS_FILE = "runs", "settings.json"


@dataclass(frozen=True)
class AblateOptions:
    """Options of the command."""

    out: Path = option("folder for runs, table and picture", metavar="DIR")
    base: str | None = option("initial model of the recipe: build/household/base", default=None, metavar="DIR")
    data: str | None = option("packed data of the recipe: build/household/packed", default=None, metavar="DIR")
    seeds: list[int] = option("train every variant once with each seed (default: 0 1 2)", default=[0, 1, 2])
    scale: float = option("length of the stages; 1 is the recipe's", default=0.25)
    views: int = option("encoded augmented views of each cloud", default=4)
    variants: list[str] = option(
        "names of variants (default: all)", default=[v.name for v in VARIANTS], metavar="NAME"
    )
    report_only: bool = option("write the report of finished runs, and train nothing", default=False)


def ablate(options: AblateOptions):
    """Train and score the variants, and write the report.

    Raises:
        ValueError: an option is wrong, OUT holds runs with other settings, or another process works on a seed.
    """
    variants = _check_options(options)
    runs_dir, settings_file = options.out / RUNS_DIR, options.out / SETTINGS_FILE
    if options.report_only:
        write_ablation(read_runs(runs_dir), read_json(settings_file), options.out)
        return
    settings = _describe_run(options)
    runs_dir.mkdir(parents=True, exist_ok=True)
    if settings_file.exists():
        _check_settings(settings, read_json(settings_file), options.out)
    write_json(settings_file, settings)
    logging.disable_progress_bar()
    lab = Lab(options.base, options.data, options.out / "work", options.scale, options.views)
    run_variants(lab, variants, options.seeds, runs_dir)
    print(ablation_table(write_ablation(read_runs(runs_dir), settings, options.out)))


def _check_options(options: AblateOptions) -> list[Variant]:
    """The variants that the options name.

    Raises:
        ValueError: an option is wrong.
    """
    by_name = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in options.variants if name not in by_name]:
        raise ValueError(f"`variants` {unknown[0]!r}: expected some of {', '.join(map(repr, by_name))}.")
    if not 0 < options.scale < math.inf or options.views < 1:
        raise ValueError(f"`scale` and `views` must be above 0, got {options.scale:g} and {options.views}.")
    if not options.report_only and (options.base is None or options.data is None):
        raise ValueError("give `base` and `data`, which `make household` leaves in build/household.")
    return [by_name[name] for name in options.variants]


def _describe_run(options: AblateOptions) -> dict:
    """What decides the results, and what a reader needs to repeat the run."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return {
        "scale": options.scale,
        "views": options.views,
        "base": fingerprint_model(options.base),
        "data": fingerprint(options.data, []),
        "date": date.today().isoformat(),
        "cpus": os.cpu_count(),
        "versions": f"Python {platform.python_version()}, {packages}",
        "given": {"base": public_word(options.base), "data": public_word(options.data)},
    }


def _check_settings(settings: dict, earlier: dict, out: Path):
    """
    Raises:
        ValueError: the runs in the folder have other settings.
    """
    for name in ("scale", "views", "base", "data"):
        if earlier.get(name) != settings[name]:
            raise ValueError(
                f"`out` {out} holds runs with {name} {earlier.get(name)!r}, expected {settings[name]!r}. Give a new folder."
            )


def run_variants(lab: Lab, variants: list[Variant], seeds: list[int], runs_dir: Path):
    """Train and score the variants that have no result yet; a seed's file is written after every variant.

    Raises:
        ValueError: another process works on a seed.
    """
    for seed in seeds:
        path = runs_dir / f"seed-{seed}.json"
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                _run_seed(lab, variants, seed, path)
        except Timeout:
            raise ValueError(
                f"another process works on seed {seed} in {runs_dir.parent}. Give each process its own `seeds`."
            ) from None


def _run_seed(lab: Lab, variants: list[Variant], seed: int, path: Path):
    runs = _read_seed(path) if path.exists() else []
    finished = {run["variant"] for run in runs}
    for variant in variants:
        if variant.name in finished:
            continue
        started = time.perf_counter()
        scores = lab.score(lab.train(variant, seed))
        minutes = (time.perf_counter() - started) / 60
        runs.append({"variant": variant.name, "seed": seed, "minutes": round(minutes, 2)} | scores)
        write_json(path, runs, indent=None)
        means = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in scores.items())
        print(f"{variant.name}, seed {seed}: {means} ({minutes:.1f} minutes)", flush=True)


def _read_seed(path: Path) -> list[dict]:
    """
    Raises:
        ValueError: the file is damaged.
    """
    advice = "Remove it to run its variants again."
    runs = read_json(path, list, advice)
    for run in runs:
        if not isinstance(run, dict) or not {"variant", "seed", "minutes"} <= run.keys():
            raise ValueError(f"{path}: expected runs of variants, got {run!r:.80}. {advice}")
    return runs


def read_runs(runs_dir: Path) -> list[dict]:
    """All runs of all seeds.

    Raises:
        ValueError: there are none.
    """
    runs = [run for path in sorted(runs_dir.glob("seed-*.json")) for run in _read_seed(path)]
    if not runs:
        raise ValueError(f"{runs_dir} holds no runs. Run without `report_only` first.")
    return runs


def main(argv: list[str] | None = None):
    run_script(ablate, AblateOptions, argv, __doc__, "minigpt3d.recipes.household.ablate")


if __name__ == "__main__":
    main()
