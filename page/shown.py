"""Objects of the page: files that people drop → the cloud that the model sees, and what they are told about it.

Files are read in processes of their own, so that a damaged one costs its own reading and not the page.
"""

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt3d.data.reading import FileReader, Limits
from minigpt3d.hub import PACKAGE_DIR
from minigpt3d.point_cloud_minigpt3d import CloudFacts, is_readable, load_orientations

from .surface import write_surface


EXAMPLES = PACKAGE_DIR / "demo" / "objects"


@dataclass(frozen=True)
class ShownObject:
    """An object as the model sees it.

    Args:
        path: the file.
        cloud: (P, 6), y up, as `load_point_cloud` returns it.
        up_axis: the axis of the file that points up; None if it was not turned.
        facts: about the file.
        warnings: of the reader, and what cleaning removed.
    """

    path: Path
    cloud: np.ndarray
    up_axis: str | None
    facts: CloudFacts
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.name


def example_files() -> list[Path]:
    """The objects that ship with this package."""
    return sorted(path for path in EXAMPLES.iterdir() if is_readable(path)) if EXAMPLES.is_dir() else []


class Objects:
    """Reads objects for a page.

    Args:
        pipeline: `PointCloudToTextPipeline`, which has the settings of the model, and chooses an up axis if it is "auto".
        lock: held while the model computes.
        limits: of reading one file.
    """

    def __init__(self, pipeline, lock: threading.Lock, limits: Limits | None = None):
        self._pipeline, self._lock = pipeline, lock
        self._clouds = FileReader(load_orientations, limits=limits)
        self._surfaces = FileReader(write_surface, limits=limits)
        self._folder = tempfile.TemporaryDirectory(prefix="minigpt3d-")
        self.folder = Path(self._folder.name)  # of files that were dropped, and of surfaces
        self._gathered: set[Path] = set()  # folders in it, one for files that were dropped together

    def __enter__(self) -> "Objects":
        return self

    def __exit__(self, *error):
        self._clouds.__exit__(*error)
        self._surfaces.__exit__(*error)
        self._folder.cleanup()

    def gather(self, uploads: Sequence[str | Path]) -> list[Path]:
        """Put files that were dropped together into one folder, where a mesh finds its materials and textures.

        Returns:
            Those that hold objects; all of them if none does, so that reading says what is wrong.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self._gathered.add(folder)
        paths = []
        for upload in map(Path, uploads):
            paths.append(folder / upload.name)
            if paths[-1].exists():  # two files of the same name from different folders
                paths[-1] = Path(tempfile.mkdtemp(dir=folder)) / upload.name
            try:
                os.link(upload, paths[-1])
            except OSError:  # another disk
                shutil.copyfile(upload, paths[-1])
        return [path for path in paths if is_readable(path)] or paths

    def remove(self, paths: Sequence[Path]):
        """Delete the folders into which `gather` put these files; other files, such as the examples, stay."""
        for folder in {parent for path in paths for parent in path.parents} & self._gathered:
            self._gathered.discard(folder)
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, path: Path, **reading) -> ShownObject:
        """Read an object.

        Args:
            reading: `up_axis`, `missing_color` and `clean`, see `load_point_cloud`; None leaves the choice to the model's
                settings.

        Raises:
            ValueError: it cannot be read; the message names the file without its folder.
        """
        arguments = self._pipeline.reading_arguments(**reading)
        (result,) = self._clouds.read_files([path], **arguments)
        if result.error is not None:
            raise ValueError(_without_folder(str(result.error), path)) from result.error
        orientations, facts = result.content
        with self._lock:
            chosen = self._pipeline.choose_orientation(orientations)
        texts = (
            _without_folder(text, path).removeprefix(f"{path.name}: ") for text in (*result.warnings, *chosen.notes)
        )
        return ShownObject(path, chosen.cloud, chosen.up_axis, facts, tuple(dict.fromkeys(texts)))

    def surface(self, shown: ShownObject, missing_color: str) -> Path:
        """A GLB with the surface of an object that has faces, not turned; written when it is first asked for.

        Args:
            missing_color: a name in `NAMED_COLORS` for faces without color.

        Raises:
            ValueError: it cannot be read.
        """
        folder = shown.path.parent if shown.path.is_relative_to(self.folder) else self.folder
        target = folder / f"{shown.name}.{missing_color}.shown.glb"
        if not target.exists():
            (result,) = self._surfaces.read_files([shown.path], target=target, missing_color=missing_color)
            if result.error is not None:
                raise ValueError(_without_folder(str(result.error), shown.path)) from result.error
        return target


def _without_folder(message: str, path: Path) -> str:
    """A message for people who know the name of the file that they dropped, but not where it lies."""
    return re.sub(rf"{re.escape(str(path.parent))}{re.escape(os.sep)}", "", message)
