"""Work on many files: find them in folders, read the next ones while the model works on a batch, count what became of them."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt3d.arguments import option, path_or_url, positive_int
from minigpt3d.messages import one_line
from minigpt3d.readers_minigpt3d import NotACloudError, printable
from minigpt3d.sources_minigpt3d import source_name

from .console import complain
from .inference import ModelOptions, load_pipeline, read_clouds


if TYPE_CHECKING:
    from minigpt3d.data.reading import FileResult

# Files that belong to meshes; in a folder they are not called skipped.
PARTS = ".mtl .bin .png .jpg .jpeg .tga .bmp .gif .tif .tiff .webp .dds .ktx2".split()
CPU_BATCH, ACCELERATOR_BATCH = 16, 64


@dataclass(kw_only=True)
class FilesOptions(ModelOptions):
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
    """What became of the files.

    Args:
        verb: what a file is that did not fail, in the summary.
    """

    verb: str = "described"
    files: list[Path | str] = field(default_factory=list)
    in_folders: set[Path] = field(default_factory=set)
    has_folder: bool = False
    done: int = 0
    failed: int = 0
    skipped: Counter = field(default_factory=Counter)  # by type

    @classmethod
    def of(cls, paths: Collection[Path | str], own: Collection[Path] = (), verb: str = "described") -> "Progress":
        """All files of paths; folders without any are reported as failed.

        Args:
            own: files that the command writes; in a folder they are left out.
        """
        progress = cls(verb)
        for path in paths:
            try:
                progress.add(path, {file.resolve() for file in own})
            except ValueError as error:
                progress.fail(str(error))
        progress.in_folders.difference_update(paths)
        return progress

    def add(self, path: Path | str, own: Collection[Path] = ()):
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
        visible = [file for file in visible if file.is_file() and not (own and file.resolve() in own)]
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

    def count(self, result: "FileResult", outcome: Any) -> bool:
        """Count a file as done, failed or skipped; returns whether it was an object.

        Args:
            outcome: what came of it; an exception is printed.
        """
        if isinstance(outcome, NotACloudError) and result.path in self.in_folders:
            self.skipped[result.path.suffix.lower()] += 1
            return False
        if isinstance(outcome, Exception):
            is_read = result.error is None
            self.fail(f"{source_name(result.path)}: not {self.verb}: {one_line(outcome)}" if is_read else str(outcome))
        else:
            self.done += 1
        return True

    def summary(self) -> str:
        """3 described, 1 failed, 40 skipped: 21 .dae, 19 .fbx"""
        skipped = Counter({suffix: count for suffix, count in self.skipped.items() if suffix not in PARTS})
        end = f", {skipped.total()} skipped: {by_type(skipped)}" if skipped else ""
        return f"{self.done} {self.verb}, {self.failed} failed{end}"


def file_of(source: Path | str) -> str:
    """What a table calls a file: its path as it is, or its URL without user, password and query."""
    return source_name(source) if isinstance(source, str) else os.fspath(source)


def by_type(counts: Counter) -> str:
    """The most frequent type first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {printable(suffix) or 'without extension'}" for suffix, count in ordered)


def work_on_files(
    progress: Progress,
    options: FilesOptions,
    prepare: Callable[[Any], Callable[[list], list]],
    each_node: bool = False,
    has_pictures: bool = False,
    is_done: Callable[[Any], bool] = lambda source: False,
) -> Iterator[list[tuple["FileResult", Any]]]:
    """Batches of what came of each file, in order. Failures are printed and counted; texts that are no clouds, found in
    folders, are counted as skipped and left out.

    Args:
        prepare: pipeline → a function from clouds (N, 6), y up, to an outcome for each.
        each_node: of scenes, work on every named node by itself, a `SceneNode`.
        has_pictures: also draw each object; the pictures by up axis are the last of a result's content.
        is_done: whether a file or node needs no work, because an earlier run has done it; asked in order.

    Its processes end when it does: close it if it is left early.

    Yields:
        Pairs of a result of `read_clouds` and its outcome; an exception if reading or working on it failed.
    """
    from tqdm import tqdm

    from minigpt3d.data.reading import FileReader
    from minigpt3d.data.scene import load, split_scenes
    from minigpt3d.point_cloud_minigpt3d import load_orientations

    files = progress.files
    function, more = (load, {"has_picture": has_pictures}) if each_node or has_pictures else (load_orientations, {})
    with FileReader(function, limits=options.limits) as reader:  # it starts while the model loads
        pipeline = load_pipeline(options)
        work = prepare(pipeline)
        # Without a terminal (disable=None) nobody watches the bar, and a log keeps to its lines.
        is_long = each_node or len(files) > 1
        total = None if each_node else len(files)
        bar = tqdm(total=total, unit="object", file=sys.stderr, disable=None if is_long else True)
        size = options.batch_size or (CPU_BATCH if pipeline.device.type == "cpu" else ACCELERATOR_BATCH)

        def undone() -> Iterator:
            for source in split_scenes(reader, files) if each_node else files:
                if is_done(source):
                    progress.done += 1
                    if bar.total is not None:
                        bar.total -= 1
                else:
                    yield source

        results = read_clouds(reader, pipeline, undone(), options, ahead=size, **more)
        with bar:
            while batch := list(islice(results, size)):
                clouds = [result.content[0].cloud for result in batch if result.error is None]
                outcomes = iter(one_by_one(work, clouds))
                bar.update(len(batch))
                pairs = [(result, next(outcomes) if result.error is None else result.error) for result in batch]
                yield [pair for pair in pairs if progress.count(*pair)]


def one_by_one(work: Callable[[list], list], clouds: list) -> list:
    """What `work` returns for clouds together or, if that fails, for each alone; what fails alone gets its exception."""
    if not clouds:
        return []
    try:
        return work(clouds)
    except Exception as error:
        if len(clouds) == 1:
            return [error]
        # Out of memory, for example: a cloud alone may fit.
        return [outcome for cloud in clouds for outcome in one_by_one(work, [cloud])]
