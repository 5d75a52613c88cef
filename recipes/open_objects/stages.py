"""Train stages I to IV on encoded views: from the base model to a complete one.

    python -m minigpt3d.recipes.open_objects.stages --data DATA --base BASE --output_dir RUN

The 3D encoder is frozen in all stages, so the features that `qformer` wrote beside BASE take the place of the clouds; rows,
samples and losses are those of `training`. RUN/stage1 to RUN/stage4 are adapters, RUN/checkpoint is the complete model in
half precision. A stage whose folder exists is skipped.
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from minigpt3d.arguments import option, run_script
from minigpt3d.data.records import SOURCES, read_annotations
from minigpt3d.data.sources import FolderSource
from minigpt3d.files import read_json, written_whole
from minigpt3d.hub import STAGE_FILE, ModelFiles, load_processor, load_weights
from minigpt3d.recipes.household.__main__ import export
from minigpt3d.recipes.household.ablate.encoded_clouds import EncodedClouds, EncodedStream, as_clouds
from minigpt3d.recipes.household.ablate.lab import train_stage
from minigpt3d.training.stages import RECIPES, Stage
from minigpt3d.training.weights import (
    adapter_names,
    export_model,
    gather_parameters,
    lora_scales,
    prepare_model,
    save_adapter,
)

from .qformer import EncodedViews, features_of


STAGES = ("I", "II", "III", "IV")


@dataclass(frozen=True)
class StageOptions:
    """Options of the command."""

    data: Path = option("folder that `build` wrote", metavar="DIR")
    base: Path = option("folder of the base model", metavar="DIR")
    output_dir: Path = option("folder for the stages and the complete model", metavar="DIR")
    views: int = option("views of each object that were encoded", default=6)
    steps: list[int] | None = option(
        "steps of the four stages; by default those of the recipe's rows", default=None, nargs=4, metavar="N"
    )
    seed: int = option("seed", default=0)
    threads: int = option("threads of torch; 1 where other programs use the cores", default=1)


class ViewSamples:
    """Records about encoded views, and their features, as `EncodedStream` reads them.

    Args:
        views: of the training objects.
        names: of the sources.
    """

    views = 1  # the object of a record is one view

    def __init__(self, views: EncodedViews, names: list[str]):
        samples = read_annotations([views.data / f"{name}.json" for name in names])
        self.features, self.row = views.features, {object_id: row for row, object_id in enumerate(views.ids)}
        self.sources, self.samples, self.texts = {}, {}, {}
        for name in names:
            encoded = [sample for sample in samples[name] if sample.object_id in self.row]
            self.sources[name] = FolderSource(encoded, views.data / "views")
            self.samples |= {(name, 0, row): sample for row, sample in enumerate(encoded)}

    def get(self, object_id: str, view: int) -> torch.Tensor:
        """Features of a view in the shape of a cloud, (1, N, 6)."""
        return as_clouds(torch.from_numpy(np.array(self.features[self.row[object_id]], dtype=np.float32))[None])


def train_stages(options: StageOptions) -> dict[str, float]:
    """Train the stages that are missing; returns their losses."""
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    processor = load_processor(ModelFiles(str(options.base)))
    samples = ViewSamples(EncodedViews(options.data, features_of(options.base), options.views), list(SOURCES.values()))
    losses, start = {}, ModelFiles(str(options.base))
    for number, name in enumerate(STAGES, start=1):
        row, folder = RECIPES["open"][name], options.output_dir / f"stage{number}"
        if options.steps:
            row = replace(row, steps_per_epoch=options.steps[number - 1] // row.epochs)
        if not folder.exists():
            train_one(options, row, start, processor, samples, folder)
        start = ModelFiles(str(options.base), folder, read_json(folder / STAGE_FILE))
        losses[name] = start.stage["loss"]
    if not (options.output_dir / "checkpoint").exists():
        complete(folder, processor, options.output_dir)
    print(json.dumps(losses))
    return losses


def train_one(options: StageOptions, row: Stage, start: ModelFiles, processor, samples: ViewSamples, folder: Path):
    """Train a stage from the result of the one before, and write its adapter."""
    started = time.perf_counter()
    model = load_weights(str(options.base), dtype=torch.float32)
    model.model.point_encoder = EncodedClouds(model.config.point_config)
    torch.manual_seed(options.seed)  # new LoRA factors
    model = prepare_model(model, row, start.adapter, start.stage)
    sources = {source.name: samples.sources[source.name] for source in row.mixture}
    stream = EncodedStream(row, sources, processor, options.seed, encoded_views=samples)
    loss = train_stage(Accelerator(cpu=True), model, row, stream, options.seed, f"stage {row.name}")
    run = {"stage": row.name, "router_type": row.router_type, "loss": round(loss, 4), "seed": options.seed}
    run |= {"steps": row.steps, "minutes": round((time.perf_counter() - started) / 60, 1)}
    tensors = gather_parameters(model, adapter_names(model, start))
    save_adapter(folder, tensors, lora_scales(model), options.base, run)
    print(json.dumps(run), flush=True)


def complete(last: Path, processor, output_dir: Path):
    """Merge the last stage's adapter into the base model."""
    merged = output_dir / "merged"
    with written_whole(output_dir / "adapter") as adapter:
        shutil.copytree(last, adapter, dirs_exist_ok=True)
    export_model(output_dir / "adapter", processor, merged)
    export(merged, output_dir / "checkpoint")
    shutil.rmtree(merged)


def main(argv: list[str] | None = None):
    run_script(train_stages, StageOptions, argv, __doc__, "minigpt3d.recipes.open_objects.stages")


if __name__ == "__main__":
    main()
