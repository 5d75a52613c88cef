"""Run the complete recipe, on two cores: data, encoder, language model, Q-Former, stages I to IV, marks.

    python -m minigpt3d.recipes.open_objects CLOUDS [--wordnet DIR] [--work_dir build/open]

A step whose result exists is skipped, and encoder and language model continue where they stopped. The result is
WORK_DIR/checkpoint; marks on the validation objects are in WORK_DIR/marks. The test objects are marked by hand, a handful
of times: `python -m minigpt3d.recipes.open_objects.marks --split test`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import option, run_script
from minigpt3d.recipes.household.__main__ import Steps, run_module

from .captioned_objects import CAPTIONS_FILE


PACKAGE = "minigpt3d.recipes.open_objects"


@dataclass(frozen=True)
class RecipeOptions:
    """Options of the command."""

    clouds: Path = option("folder of the .npz shards, or of the packs", positional=True, metavar="CLOUDS")
    captions: Path = option("captions of the objects, .jsonl.gz", default=CAPTIONS_FILE, metavar="FILE")
    wordnet: Path | None = option("folder with WordNet's index.noun and data.noun", default=None, metavar="DIR")
    work_dir: Path = option("folder for data, stages and the checkpoint", default=Path("build/open"), metavar="DIR")
    max_steps: int | None = option("maximum steps of every training, to try the recipe out", default=None)


def run_recipe(options: RecipeOptions):
    """Run all steps.

    Raises:
        ValueError: there is no folder of clouds.
        SystemExit: a step failed; its own message is above.
    """
    if not options.clouds.is_dir():
        raise ValueError(
            f"`clouds` {options.clouds} is no folder. Give the folder of the .npz shards of the captions."
        )
    work, steps = options.work_dir, Steps(options.work_dir)
    data, encoder, language, base = (work / name for name in ("data", "encoder", "language", "base"))
    views = ["--views", 1] if options.max_steps else []
    limit = ["--steps", options.max_steps] if options.max_steps else []
    wordnet = ["--wordnet", options.wordnet] if options.wordnet else []
    build = [
        f"{PACKAGE}.build",
        options.clouds,
        "--output_dir",
        data,
        "--captions",
        options.captions,
        *wordnet,
        *views,
    ]
    steps.run("data", data / "report.json", lambda: run_module(*build))
    for name, folder in (("encoder", encoder), ("language", language)):
        command = [f"{PACKAGE}.{name}", "--data", data, "--output_dir", folder, *limit]
        steps.run(name, folder / "scores.json", lambda command=command: run_module(*command))
    parts = ["--encoder", encoder, "--language", language, "--output_dir", base]
    qformer = [f"{PACKAGE}.qformer", "--data", data, *parts, *views, *limit]
    steps.run("Q-Former", base / "pretrain.json", lambda: run_module(*qformer))
    few_steps = ["--steps", *[options.max_steps] * 4] if options.max_steps else []
    stages = [f"{PACKAGE}.stages", "--data", data, "--base", base, "--output_dir", work, *views, *few_steps]
    steps.run("stages", work / "checkpoint", lambda: run_module(*stages))
    (work / "marks").mkdir(exist_ok=True)
    for name in ("stage1", "stage2", "stage3", "checkpoint"):
        marks = work / "marks" / f"{name}.json"
        command = [f"{PACKAGE}.marks", "--model", work / name, "--data", data, "--out", marks]
        steps.run(f"marks of {name}", marks, lambda command=command: run_module(*command))
    print(f"{work / 'checkpoint'} is done; minutes: {json.dumps(steps.times)}, sum {sum(steps.times.values()):.1f}")


def main(argv: list[str] | None = None):
    run_script(run_recipe, RecipeOptions, argv, __doc__, PACKAGE)


if __name__ == "__main__":
    main()
