"""What `describe` and `chat` share: the model's options, the pipeline, and reading a file."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt3d.arguments import option, positive_int
from minigpt3d.messages import one_line

from .console import CommandError, complain, quiet


@dataclass(kw_only=True)
class ModelOptions:
    """Which model answers, and how."""

    model: str | None = option("folder or Hub id of the model (default: the bundled one)", default=None)
    device: str | None = option("cpu, cuda, cuda:1, mps (default: the accelerator if there is one)", default=None)
    max_new_tokens: int = option("longest answer, in tokens", default=150, type=positive_int, metavar="N")


@dataclass(kw_only=True)
class ReadingOptions:
    """How to read files that lack an up axis or colors."""

    up_axis: Literal["x", "y", "z"] | None = option(
        "axis that points up in your files; they are rotated so that y points up (default: the model's setting, else no "
        "rotation)",
        default=None,
    )
    missing_color: Literal["black", "gray", "white"] | None = option(
        "color of points that have none (default: black)", default=None
    )

    @property
    def reading(self) -> dict[str, str]:
        """Arguments of the reader that were given."""
        given = {"up_axis": self.up_axis, "missing_color": self.missing_color}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(kw_only=True)
class CleaningOptions(ReadingOptions):
    """How to read files for a model that answers: it can choose the up axis, and scans can be cleaned."""

    up_axis: Literal["x", "y", "z", "auto"] | None = option(
        "axis that points up in your files; they are rotated so that y points up; auto: the model chooses (default: the "
        "model's setting, else no rotation)",
        default=None,
    )
    clean: Literal["none", "outliers", "floor", "all"] | None = option(
        "what is removed from your files: points far from all others, a floor below the object, or both (default: the "
        "model's setting, else none)",
        default=None,
    )

    @property
    def reading(self) -> dict[str, str]:
        """Arguments of the reader that were given."""
        return super().reading | ({} if self.clean is None else {"clean": self.clean})


def load_pipeline(options: ModelOptions):
    """The pipeline of a model.

    Raises:
        ValueError: there is no such model, or it cannot be read.
        CommandError: the device cannot be used.
    """
    from minigpt3d.hub import default_model, load_model
    from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline

    quiet()
    model, processor = load_model(options.model or default_model())
    try:
        return PointCloudToTextPipeline(model=model, processor=processor, device=options.device)
    except Exception as error:
        raise CommandError(
            f"cannot use the device {options.device}: {one_line(error)} (leave out --device)"
        ) from error


def read_cloud(pipeline, path: Path, options: CleaningOptions):
    """The point cloud of a file, (N, 6), y up; warnings about it are printed.

    A cloud is read before the pipeline gets it, so that a file that cannot be read and a model that fails are reported
    differently, and a conversation reads its file once.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            cloud = pipeline.read_point_cloud(path, **options.reading)
    except Exception as error:  # whatever is wrong with a file, the others are still read
        text = one_line(error).removeprefix(f"{path}: ")  # the reader names its file
        raise CommandError(f"{path}: {text}") from error
    for warning in caught:
        text = str(warning.message).removeprefix(f"{path}: ")
        complain(f"{path}: warning: {' '.join(text.split())}")
    return cloud
