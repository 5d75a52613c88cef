"""What `describe` and `embed` share: their options, and the way of many files through the model in batches."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt3d.arguments import option, path_or_url, positive_int
from minigpt3d.messages import one_line
from minigpt3d.readers_minigpt3d import NotACloudError, printable
from minigpt3d.sources_minigpt3d import source_name

from .console import FAILED, complain
from .inference import ModelOptions, load_pipeline, read_clouds


if TYPE_CHECKING:
    from minigpt3d.data.reading import FileResult


# Files that belong to meshes; in a folder they are not called skipped.
PARTS = ".mtl .bin .png .jpg .jpeg .tga .bmp .gif .tif .tiff .webp .dds .ktx2".split()
CPU_BATCH, ACCELERATOR_BATCH = 16, 64


@dataclass(kw_only=True)
class BatchOptions(ModelOptions):
    """Which files, and how many at once."""

    paths: list[Path | str] = option(
        "point cloud, mesh, a folder, or an https:// URL", positional=True, type=path_or_url, metavar="FILE_OR_FOLDER"
    )
    batch_size: int | None = option(
        "files that the model reads at once (default: 16 on a CPU, 64 on an accelerator)",
        default=None,
        type=positive_int,
        metavar="N",
    )


@dataclass
class Progress:
    """What became of the files."""

    files: list[Path | str] = field(default_factory=list)
    in_folders: set[Path] = field(default_factory=set)
    has_folder: bool = False
    done: int = 0
    failed: int = 0
    skipped: Counter = field(default_factory=Counter)  # by type

    def add(self, path: Path | str):
        """Add a file, a URL, or all readable files in a folder and its subfolders, sorted.

        Raises:
            ValueError: there are none in the folder.
        """
        if isinstance(path, str) or not path.is_dir():
            self.files.append(path)
            return
        from minigpt3d.point_cloud_minigpt3d import READABLE_SUFFIXES, is_readable

        self.has_folder = True
        visible = [file for file in sorted(path.rglob("*")) if not file.name.startswith(".") and not file.is_dir()]
        special = sum(not file.is_file() for file in visible)
        visible = [file for file in visible if file.is_file()]
        readable = [file for file in visible if is_readable(file)]
        others = Counter(file.suffix.lower() for file in visible if not is_readable(file))
        if special:
            others["pipes and broken links"] = special
        self.skipped += others
        if not readable:
            content = f" but {by_type(others)}" if others else ""
            raise ValueError(
                f"{path}: no point cloud or mesh in this folder{content}; expected {' '.join(READABLE_SUFFIXES)}"
            )
        self.files += readable
        self.in_folders.update(readable)

    def fail(self, message: str):
        self.failed += 1
        complain(message)

    def summary(self, done: str) -> str:
        """3 described, 1 failed, 40 skipped: 21 .dae, 19 .fbx"""
        skipped = Counter({suffix: count for suffix, count in self.skipped.items() if suffix not in PARTS})
        end = f", {skipped.total()} skipped: {by_type(skipped)}" if skipped else ""
        return f"{self.done} {done}, {self.failed} failed{end}"


def by_type(counts: Counter) -> str:
    """The most frequent type first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {printable(suffix) or 'without extension'}" for suffix, count in ordered)


def find_files(paths: list[Path | str]) -> Progress:
    """The files, and those in folders; folders without any are reported."""
    progress = Progress()
    for path in paths:
        try:
            progress.add(path)
        except ValueError as error:
            progress.fail(str(error))
    progress.in_folders.difference_update(paths)
    return progress


def run_batches(
    progress: Progress,
    options: BatchOptions,
    compute: Callable[[Any, list], list],
    keep: Callable[["FileResult", Any], None],
    product: str,
    done: str,
) -> int:
    """Read every file and take the clouds through the model; returns the exit code.

    Args:
        progress: of `find_files`.
        compute: (pipeline, list of clouds (P, 6), y up) → a product for each cloud.
        keep: takes a result of `read_clouds` and its product, in the order of the files.
        product: its name, for messages.
        done: what has been done with a file, for the summary.
    """
    if progress.files:
        _run_files(progress, options, compute, keep, product)
        if progress.has_folder:
            complain(progress.summary(done))
    return FAILED if progress.failed else 0


def _run_files(progress: Progress, options: BatchOptions, compute: Callable, keep: Callable, product: str):
    """The next files are read while the model works on a batch."""
    from tqdm import tqdm

    from minigpt3d.data.reading import FileReader
    from minigpt3d.point_cloud_minigpt3d import load_orientations

    files = progress.files
    with FileReader(load_orientations, limits=options.limits) as reader:  # it starts while the model loads
        pipeline = load_pipeline(options)
        # Without a terminal (disable=None) nobody watches the bar, and a log keeps to its lines.
        bar = tqdm(total=len(files), unit="file", file=sys.stderr, disable=None if len(files) > 1 else True)
        size = options.batch_size or (CPU_BATCH if pipeline.device.type == "cpu" else ACCELERATOR_BATCH)
        results = read_clouds(reader, pipeline, files, options, ahead=size)
        with bar:
            while batch := list(islice(results, size)):
                clouds = [result.content[0].cloud for result in batch if result.error is None]
                products = iter(_compute(compute, pipeline, clouds))
                for result in batch:
                    bar.update()
                    made = next(products) if result.error is None else result.error
                    if isinstance(made, NotACloudError) and result.path in progress.in_folders:
                        progress.skipped[result.path.suffix.lower()] += 1
                    elif isinstance(made, Exception):
                        unread = result.error is not None
                        name = source_name(result.path)
                        progress.fail(str(made) if unread else f"{name}: no {product}: {one_line(made)}")
                    else:
                        progress.done += 1
                        keep(result, made)


def _compute(compute: Callable, pipeline, clouds: list) -> list:
    """For each cloud the product, or the exception that says why there is none."""
    if not clouds:
        return []
    try:
        return compute(pipeline, clouds)
    except Exception as error:
        if len(clouds) == 1:
            return [error]
        # Out of memory, for example: a cloud alone may fit.
        return [made for cloud in clouds for made in _compute(compute, pipeline, [cloud])]
