"""The captions of the recipe, and the clouds of its objects.

The captions travel with the project; the clouds do not. They are read from a folder, which holds either

- `.npz` shards, each with `xyz` (M, 4096, 3) int16, divided by 32767, and `rgb` (M, 4096, 3) uint8, or
- the packs as their creators publish them: `{pack}/…/{file}` of the captions, and Sweet Home 3D's libraries, `{pack}.sh3f`.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt3d.point_cloud_minigpt3d import load_point_cloud
from minigpt3d.recipes.household.build_data import read_cloud
from minigpt3d.recipes.household.library import FurnitureLibrary


FURNITURE_SOURCE = "sh3d"
CAPTIONS_FILE = Path(__file__).with_name("captions.jsonl.gz")
NUM_POINTS = 4096


@dataclass(frozen=True)
class CaptionedObject:
    """An object of a free pack with its texts.

    Args:
        object_id: unique.
        source, pack, file: where the model comes from.
        creator, license: of the model.
        noun: a common word for it.
        kind: one of 53.
        brief, detailed: captions.
        questions: question and answer pairs; the first is a yes/no question.
        colors: named in the caption.
        material: in one word.
        shard, row: where the folder of clouds keeps it.
    """

    object_id: str
    source: str
    pack: str
    file: str
    creator: str
    license: str
    noun: str
    kind: str
    brief: str
    detailed: str
    questions: tuple[tuple[str, str], ...]
    colors: tuple[str, ...]
    material: str
    shard: str
    row: int


def read_captions(path: Path = CAPTIONS_FILE) -> list[CaptionedObject]:
    """All captioned objects."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [
        CaptionedObject(
            object_id=line["id"],
            questions=tuple((question, answer) for question, answer in line["qa"]),
            colors=tuple(line["attributes"]["colors"]),
            material=line["attributes"]["material"] or "",
            **{
                name: line[name]
                for name in (
                    "source", "pack", "file", "creator", "license", "noun", "kind", "brief", "detailed", "shard", "row"
                )
            },
        )
        for line in lines
    ]  # fmt: skip


def read_clouds(folder: Path, objects: list[CaptionedObject]) -> tuple[list[CaptionedObject], np.ndarray, np.ndarray]:
    """The objects that the folder holds, with coordinates (M, 4096, 3) int16 and colors (M, 4096, 3) uint8.

    A folder of shards holds all of them; of packs, those that somebody has.

    Raises:
        ValueError: a shard is missing or holds fewer rows, or the folder holds none of the models.
    """
    if any(folder.glob("*.npz")):
        return objects, *_read_shards(folder, objects)
    return _read_packs(folder, objects)


def _read_shards(folder: Path, objects: list[CaptionedObject]) -> tuple[np.ndarray, np.ndarray]:
    coord = np.empty((len(objects), NUM_POINTS, 3), dtype=np.int16)
    color = np.empty((len(objects), NUM_POINTS, 3), dtype=np.uint8)
    rows_by_shard: dict[str, list[int]] = {}
    for index, item in enumerate(objects):
        rows_by_shard.setdefault(item.shard, []).append(index)
    for shard, indices in sorted(rows_by_shard.items()):
        path = folder / shard
        if not path.is_file():
            raise ValueError(f"`clouds` {folder} has no {shard}. Give the folder of the .npz shards of the captions.")
        rows = [objects[index].row for index in indices]
        with np.load(path) as content:
            xyz, rgb = content["xyz"], content["rgb"]
        if xyz.shape[1:] != (NUM_POINTS, 3) or len(xyz) <= max(rows):
            raise ValueError(f"{path}: expected xyz (more than {max(rows)}, {NUM_POINTS}, 3), got {xyz.shape}.")
        coord[indices], color[indices] = xyz[rows], rgb[rows]
    return coord, color


def _read_packs(folder: Path, objects: list[CaptionedObject]) -> tuple[list[CaptionedObject], np.ndarray, np.ndarray]:
    found, clouds = [], []
    furniture = {item.object_id.split("/", 1)[1]: item for item in objects if item.source == FURNITURE_SOURCE}
    for path in sorted(folder.rglob("*.sh3f")):
        with FurnitureLibrary(path) as library:
            pieces = [piece for piece in library.pieces() if piece.object_id in furniture]
        for piece in pieces:
            cloud, error = read_cloud((path, piece), NUM_POINTS)
            if error:
                raise ValueError(f"{path}: {piece.name} cannot be read ({error}). Download the library again.")
            found.append(furniture[piece.object_id])
            clouds.append(cloud)
    packs = {path.name: path for path in folder.iterdir() if path.is_dir()}
    for item in objects:
        path = packs[item.pack] / item.file if item.pack in packs else None
        if path and path.is_file():
            found.append(item)
            clouds.append(load_point_cloud(path, NUM_POINTS))
    if not found:
        raise ValueError(
            f"`clouds` {folder} holds none of the {len(objects)} models. Give the folder of the .npz shards, or a folder "
            f"with packs, such as {objects[0].pack}/{objects[0].file}."
        )
    clouds = np.stack(clouds)
    return found, np.round(clouds[..., :3] * 32767).astype(np.int16), np.round(clouds[..., 3:] * 255).astype(np.uint8)


def to_cloud(coord: np.ndarray, color: np.ndarray) -> np.ndarray:
    """(N, 3) int16 and uint8 → (N, 6) float32, xyz with largest norm 1 and rgb in [0, 1]."""
    return np.concatenate([coord / np.float32(32767), color / np.float32(255)], axis=1).astype(np.float32)
