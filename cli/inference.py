"""What `describe` and `chat` share: the model's options, the pipeline, and reading a file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt3d.arguments import option, positive_int
from minigpt3d.data.reading_options import ReadingOptions
from minigpt3d.messages import one_line
from minigpt3d.sources_minigpt3d import source_name

from .console import complain, quiet


if TYPE_CHECKING:
    from minigpt3d.data.reading import FileReader, FileResult


@dataclass(kw_only=True)
class ModelOptions:
    """Which model answers, and how."""

    model: str | None = option("folder or Hub id of the model (default: the bundled one)", default=None)
    device: str | None = option("cpu, cuda, cuda:1, mps (default: the accelerator if there is one)", default=None)
    max_new_tokens: int = option("longest answer, in tokens", default=150, type=positive_int, metavar="N")


def load_pipeline(options: ModelOptions):
    """The pipeline of a model.

    Raises:
        ValueError: there is no such model, or it cannot be read.
        ValueError: the device cannot be used.
    """
    from minigpt3d.hub import check_device, default_model, load_model

    check_device(options.device)  # before transformers is imported
    from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline

    quiet()
    model, processor = load_model(options.model or default_model())
    try:
        return PointCloudToTextPipeline(model=model, processor=processor, device=options.device)
    except Exception as error:
        raise ValueError(f"cannot use the device {options.device}: {one_line(error)} (leave out --device)") from error


def read_clouds(
    reader: "FileReader", pipeline, paths: Iterable[Path | str], options: ReadingOptions
) -> Iterator["FileResult"]:
    """What `load_with_facts` returns for each file: the cloud, (P, 6), y up, and facts; warnings are printed.

    Clouds are read before the pipeline gets them, so that a file that cannot be read and a model that fails are reported
    differently, and a conversation reads its file once.
    """
    extractor = pipeline.processor.feature_extractor
    settings = {name: getattr(extractor, name) for name in ("num_points", "missing_color", "up_axis", "seed")}
    for result in reader.read_files(paths, **settings | options.reading):
        name = source_name(result.path)
        for text in result.warnings:
            complain(f"{name}: warning: {' '.join(text.removeprefix(f'{name}: ').split())}")
        yield result
