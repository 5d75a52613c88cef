"""What the processes that read files return for a catalog: the objects of a scene one by one, and their pictures."""

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from minigpt3d.formats_minigpt3d import FORMAT_READERS
from minigpt3d.gltf_minigpt3d import GLTF_READERS
from minigpt3d.meshes_minigpt3d import Surface
from minigpt3d.point_cloud_minigpt3d import CloudFacts, Orientation, load_orientations, read_content
from minigpt3d.readers_minigpt3d import PointCloudError, nodes_kept, printable

from .thumbnails import draw_thumbnail


PICTURE_POINTS = 8192  # the model may see fewer
_SCENES = {*GLTF_READERS, *FORMAT_READERS, ".obj", ".3mf"}  # formats with named nodes


@dataclass(frozen=True)
class SceneNode(os.PathLike):
    """A named node of a scene: what it and the nodes below it hold.

    Args:
        path: of the file.
        number: see `readers_minigpt3d.Node`.
        name: as stored.
    """

    path: Path
    number: int
    name: str

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return f"{self.path} ({printable(self.name)})"


def load(
    source: Any, lists_nodes: bool = False, has_picture: bool = False, **arguments
) -> tuple[list[Orientation], CloudFacts, dict[str | None, bytes]] | list[tuple[int, str]]:
    """Read a file or a node of its scene.

    Args:
        lists_nodes: number and name of every named node that holds a surface, instead; in the order of the file.
        has_picture: also draw it.
        arguments: of `load_orientations`.

    Returns:
        As `load_orientations`, and a PNG of each orientation by its up axis.
    """
    if lists_nodes:
        content = _scene(source, os.stat(source).st_mtime_ns)
        surfaces = content if isinstance(content, list) else []
        return list({node.number: (node.number, node.name) for part in surfaces for node in part.nodes}.values())
    content = None
    if isinstance(source, SceneNode):
        content = [part for part in _scene(source.path, os.stat(source).st_mtime_ns) if _is_in(source.number, part)]
        if not content:
            raise PointCloudError(f"{source}: the file has changed and has no such node any more.")
    elif has_picture:
        content = read_content(source)
    orientations, facts = load_orientations(source, content=content, **arguments)
    if not has_picture:
        return orientations, facts, {}
    pictured = orientations
    if arguments["num_points"] < PICTURE_POINTS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they have been given
            pictured, _ = load_orientations(source, content=content, **arguments | {"num_points": PICTURE_POINTS})
    return orientations, facts, {view.up_axis: draw_thumbnail(view.cloud, facts.has_color) for view in pictured}


def _is_in(number: int, surface: Surface) -> bool:
    return any(node.number == number for node in surface.nodes)


@lru_cache(maxsize=1)
def _scene(path: Path, modified: int):
    """The content of the file that was read last: its nodes follow one another."""
    with nodes_kept():
        return read_content(path)


def may_have_nodes(path: Path | str) -> bool:
    """Whether a file's format names the nodes of a scene."""
    return isinstance(path, Path) and path.name.lower().removesuffix(".gz").endswith(tuple(_SCENES))


def split_scenes(reader: Any, paths: Iterable[Path | str]) -> Iterator[Path | str | SceneNode]:
    """The named nodes of every file in its place; files without any, or that cannot be read, stay as they are.

    Args:
        reader: a `FileReader` of `load`.
    """
    for path in paths:
        nodes = []
        if may_have_nodes(path):
            (result,) = reader.read_files([path], lists_nodes=True)
            for text in result.warnings:
                warnings.warn(text, stacklevel=2)
            nodes = result.content or []
        yield from (SceneNode(path, number, name) for number, name in nodes) if nodes else [path]
