"""What commands that run a model on files share: their options, the pipeline, and reading a file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minigpt3d.arguments import option, positive_int, with_flags
from minigpt3d.data.reading import LimitOptions
from minigpt3d.data.reading_options import ReadingOptions
from minigpt3d.messages import one_line
from minigpt3d.sources_minigpt3d import source_name

from .console import complain, quiet


if TYPE_CHECKING:
    from minigpt3d.data.reading import FileReader, FileResult


@dataclass(kw_only=True)
class ModelOptions(ReadingOptions, LimitOptions):
    """Which model runs, where, and how its files are read."""

    model: str | None = option("folder or Hub id of the model (default: the bundled one)", default=None)
    device: str | None = option("cpu, cuda, cuda:1, mps (default: the accelerator if there is one)", default=None)
    dtype: Literal["float16", "bfloat16", "float32"] | None = option(
        "of the weights (default: as stored, but float32 on a CPU)", default=None
    )
    up_axis: Literal["x", "y", "z", "auto"] | None = option(
        "axis that points up in your files; they are rotated so that y points up; auto: the model chooses (default: the "
        "model's setting, else no rotation)",
        default=None,
    )


@dataclass(kw_only=True)
class InferenceOptions(ModelOptions):
    """How a model answers."""

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
    dtype = options.dtype or "auto"
    model, processor = load_model(options.model or default_model(), dtype=dtype)
    try:
        return PointCloudToTextPipeline(model=model, processor=processor, device=options.device, dtype=dtype)
    except Exception as error:
        raise ValueError(f"cannot use the device {options.device}: {one_line(error)} (leave out --device)") from error


def read_clouds(
    reader: "FileReader", pipeline, paths: Iterable[Path | str], options: ModelOptions, ahead: int = 1, **more
) -> Iterator["FileResult"]:
    """A result for each file, whose content is an `Orientation`, y up, and `CloudFacts`; warnings are printed.

    Clouds are read before the pipeline gets them, so that a file that cannot be read and a model that fails are reported
    differently, and a conversation reads its file once.

    Args:
        reader: of `load_orientations`, or of `load`.
        more: arguments of its function. What else it returns follows the two in the content.
    """
    for result in reader.read_files(paths, ahead, **pipeline.reading_arguments(**options.reading), **more):
        name = source_name(result.path)
        if result.error is None:
            result = _choose_orientation(pipeline, result)
        texts = (with_flags(text, ModelOptions, "-") for text in result.warnings)
        result = replace(result, warnings=tuple(" ".join(text.split()) for text in texts))
        for text in result.warnings:
            complain(f"{name}: warning: {text.removeprefix(f'{name}: ')}")
        yield result


def _choose_orientation(pipeline, result: "FileResult") -> "FileResult":
    orientations, *rest = result.content
    try:
        chosen = pipeline.choose_orientation(orientations)
    except Exception as error:  # out of memory, for example
        return replace(
            result, error=ValueError(f"{source_name(result.path)}: no choice of an up axis: {one_line(error)}")
        )
    return replace(result, content=(chosen, *rest), warnings=(*result.warnings, *chosen.notes))


def read_file(path: Path | str, options: ModelOptions) -> tuple:
    """The pipeline, and the cloud of one file, (P, 6), y up. Raises as `load_pipeline` and `read_points`."""
    check_file(path)
    pipeline = load_pipeline(options)
    return pipeline, read_points(pipeline, path, options)


def read_points(pipeline, path: Path | str, options: ModelOptions):
    """The cloud of one file, (P, 6), y up.

    Raises:
        ValueError: the file cannot be read.
    """
    from minigpt3d.data.reading import FileReader
    from minigpt3d.point_cloud_minigpt3d import load_orientations

    check_file(path)
    with FileReader(load_orientations, limits=options.limits) as reader:
        (result,) = read_clouds(reader, pipeline, [path], options)
    if result.error is not None:
        raise result.error
    orientation, _ = result.content
    return orientation.cloud


def check_file(path: Path | str):
    """
    Raises:
        ValueError: it is neither a file nor a URL.
    """
    if isinstance(path, Path) and not path.is_file():
        problem = "this is a folder; pass one of the files in it" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {problem}")
