"""A point cloud from whatever holds a 3D object: file, array, tensor or mesh → float32 (num_points, 6), normalized.

The order: read (readers_minigpt3d.py, meshes_minigpt3d.py) → drop points that are not finite → colors to [0, 1] →
clean, if asked to (cleaning_minigpt3d.py) → sample or repeat to `num_points` → turn the up axis → normalize. Surfaces
are sampled by area instead.

Shapes: N points in the source, P points of the cloud.
"""

import copy
import numbers
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .cleaning_minigpt3d import CLEANING_POINTS, check_cleaning, clean as clean_points, find_floor, suspect_scene
from .meshes_minigpt3d import MESH_READERS, open_trimesh, read_ply, sample_surface
from .readers_minigpt3d import POINT_READERS, PointCloudError, Points, report_dropped, split_columns


# From "this axis points up" to "y points up", as in the training data: new = coord @ matrix.T,
# each a rotation (no mirror).
_UP_ROTATIONS = {
    "x": np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "y": np.eye(3),
    "z": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]),
}
_NAMED_COLORS = {"black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5), "white": (1.0, 1.0, 1.0)}
# What arithmetic may add to a float color of 0 or 1; it is clipped.
COLOR_SLACK = 1e-3

_READERS: dict[str, Callable[[Path], Any]] = {".ply": read_ply} | POINT_READERS | MESH_READERS
READABLE_SUFFIXES = tuple(_READERS)


def load_point_cloud(
    source: Any,
    num_points: int = 8192,
    missing_color: str | tuple[float, float, float] = "black",
    up_axis: str | None = None,
    seed: int = 0,
    clean: str = "none",
) -> np.ndarray:
    """Read, sample and normalize a 3D object. The same source and arguments always give the same cloud.

    Args:
        source: a path (see `READABLE_SUFFIXES`); an array or tensor (N, 3) of xyz or (N, 6) of xyz and rgb; or a
            trimesh `Trimesh`, `PointCloud` or `Scene`. Coordinates in any unit, colors in 0–1 or 0–255 (16-bit ones in
            0–65535), told apart by dtype and range.
        num_points: P. More points are sampled, fewer are repeated, exactly as many keep their order.
        missing_color: for points without color: "black", as ModelNet40 is read in the paper; "gray"; "white"; or
            (r, g, b) in [0, 1]. The model sees it as the object's color and will call a bare mesh black.
        up_axis: the axis that points up in `source`, "x", "y" or "z"; the object is turned so that y points up, as in
            the training data. None does not turn it.
        seed: of the sampling.
        clean: "outliers" drops points far from all others, "floor" a plane below the object, "all" both; "none" keeps
            all points. A warning says what was removed.

    Returns:
        (num_points, 6) float32: xyz minus its mean, divided by the largest norm; rgb in [0, 1].

    Raises:
        PointCloudError: (a ValueError) the source cannot be read, or holds no usable cloud.
        ValueError: an argument out of its range.
        ImportError: a package that reads this kind of file is missing; the message says which.
    """
    (reading,) = load_orientations(source, [up_axis], num_points, missing_color, seed, clean)
    for note in reading.notes:
        warnings.warn(note, stacklevel=2)
    return reading.cloud


class Orientation(NamedTuple):
    """A source read with one up axis: `cloud` as `load_point_cloud` returns it, what is to be said about it, and
    (if several axes are compared) whether it stands on a floor, which is gone if cleaning removes floors."""

    cloud: np.ndarray
    notes: list[str]
    has_floor: bool


def load_orientations(
    source: Any,
    up_axes: Sequence[str | None],
    num_points: int = 8192,
    missing_color: str | tuple[float, float, float] = "black",
    seed: int = 0,
    clean: str = "none",
) -> list[Orientation]:
    """Read a 3D object once, and turn it for each of several up axes. Arguments and errors as `load_point_cloud`."""
    if not isinstance(num_points, numbers.Integral) or num_points < 1:
        raise ValueError(f"num_points must be a whole number of at least 1, got {num_points!r}.")
    for up_axis in up_axes:
        if up_axis is not None and up_axis not in _UP_ROTATIONS:
            raise ValueError(f"up_axis must be 'x', 'y', 'z' or None (not turned), got {up_axis!r}.")
    check_cleaning(clean)
    fill = _rgb(missing_color)
    rng = np.random.default_rng(seed)
    name = str(source) if isinstance(source, (str, os.PathLike)) else f"the given {type(source).__name__}"
    looks_closer = clean != "none" or len(up_axes) > 1  # for outliers and floors
    count = max(num_points, CLEANING_POINTS) if looks_closer else num_points
    try:
        content = _read(source)
        if isinstance(content, Points):
            coord, color = _sample_points(content, count, fill, rng, name, repeat=not looks_closer)
        else:
            coord, color = sample_surface(content, count, fill, rng, name)
        orientations = []
        for up_axis, cleaned in zip(up_axes, clean_points(coord, clean, up_axes), strict=True):
            kept = (coord, color) if cleaned.removed is None else (coord[cleaned.keep], color[cleaned.keep])
            cloud = _finish(*kept, num_points, up_axis, copy.deepcopy(rng) if len(up_axes) > 1 else rng)
            notes = [cleaned.removed]
            if isinstance(source, (str, os.PathLike)):
                notes.append(suspect_scene(kept[0], clean))
            # One axis needs no comparison.
            has_floor = cleaned.has_floor or len(up_axes) > 1 and bool(find_floor(kept[0], up_axis).any())
            orientations.append(Orientation(cloud, [f"{name}: {note}." for note in notes if note], has_floor))
        return orientations
    except PointCloudError as error:
        raise PointCloudError(f"{name}: {error}") from error


def _finish(
    coord: np.ndarray, color: np.ndarray, num_points: int, up_axis: str | None, rng: np.random.Generator
) -> np.ndarray:
    """Points (N, 3) with colors (N, 3) → cloud (P, 6): choose, turn, normalize."""
    chosen = _choose(len(coord), num_points, rng)
    coord, color = coord[chosen], color[chosen]
    if up_axis is not None:
        coord = coord @ _UP_ROTATIONS[up_axis].T
    coord = _normalize(coord)
    cloud = np.empty((6, num_points), dtype=np.float32)
    cloud[:3], cloud[3:] = coord.T, color.T
    return np.ascontiguousarray(cloud.T)


# ---- Reading --------------------------------------------------------------------------------------------------------


def _read(source: Any) -> Points | Any:
    """`Points`, or a trimesh `Scene` that holds faces."""
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.double() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return split_columns(source)
    if type(source).__module__.split(".")[0] == "trimesh":
        return open_trimesh(source)
    raise PointCloudError(
        f"a {type(source).__name__} cannot be read. Pass a path, an array or tensor (N, 3) or (N, 6), or a trimesh object."
    )


def _read_file(path: Path) -> Points | Any:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise PointCloudError("this is a folder. Pass one of the files in it.")
    if not path.is_file():
        raise PointCloudError("there is no such file. Check the path.")
    if suffix not in _READERS:
        raise PointCloudError(
            f"files of type {suffix or '(no extension)'!r} are not known. Expected one of {' '.join(READABLE_SUFFIXES)}; "
            "convert it, or pass its points as an array."
        )
    if path.stat().st_size == 0:
        raise PointCloudError("the file is empty (0 bytes).")
    try:
        return _READERS[suffix](path)
    except (PointCloudError, ImportError):
        raise
    except MemoryError as error:
        raise PointCloudError("it needs more memory than is available; the file is corrupt or too large.") from error
    except Exception as error:  # every reader has exceptions of its own for a broken file
        detail = " ".join(str(error).split()) or type(error).__name__
        raise PointCloudError(
            f"it cannot be read as {suffix} ({detail[:200]}). The file is truncated or corrupt, or its "
            "name does not match its format; export it again."
        ) from error


# ---- Points ---------------------------------------------------------------------------------------------------------


def _sample_points(
    points: Points, num_points: int, fill: np.ndarray, rng: np.random.Generator, name: str, repeat: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(N, …) → coord (P, 3) float64 and color (P, 3) in [0, 1]; without `repeat` P is at most N."""
    coord, color = points
    if not len(coord):
        raise PointCloudError("the cloud is empty (0 points).")
    coord = np.ascontiguousarray(coord)  # otherwise all that follows is several times slower
    color = None if color is None else np.ascontiguousarray(color)
    if not (np.isfinite(coord).all() and (color is None or np.isfinite(color).all())):
        good = np.isfinite(coord).all(axis=1)
        if color is not None:
            good &= np.isfinite(color).all(axis=1)
        report_dropped(good, "points", name)
        coord, color = coord[good], None if color is None else color[good]
    if color is not None:
        scale = _color_scale(color)  # over all points: a sample might have another range
    if not repeat:
        num_points = min(num_points, len(coord))
    chosen = _choose(len(coord), num_points, rng)
    coord = coord[chosen].astype(np.float64)
    if color is None:
        return coord, np.tile(fill, (num_points, 1))
    color = color[chosen] if scale == 1 else color[chosen] / scale
    return coord, np.clip(color, 0, 1)


def _color_scale(color: np.ndarray) -> float:
    """The largest value of the colors' range: 1, 255 or 65535."""
    low, high = color.min(), color.max()
    is_float = color.dtype.kind == "f"
    slack = COLOR_SLACK if is_float else 0
    if low >= -slack:
        if is_float and high <= 1 + slack:
            return 1.0
        if high <= 255 + slack:
            return 255.0
        if color.dtype == np.uint16:
            return 65535.0
    raise PointCloudError(
        f"its colors are out of range: got {low:g} to {high:g} ({color.dtype}), expected 0 to 1 or 0 to 255 (16 bits: "
        "0 to 65535, as whole numbers). If these columns are not colors (but normals, say), pass xyz alone."
    )


def _choose(count: int, num_points: int, rng: np.random.Generator) -> np.ndarray | slice:
    """Indices of `num_points` out of `count`: a uniform sample without repeats, or all, repeated as evenly as possible."""
    if count == num_points:
        return slice(None)  # order and values are kept
    if count > num_points:
        # In the order of the file; costs O(num_points), however large the scan is.
        return np.sort(rng.choice(count, num_points, replace=False, shuffle=False))
    repeats, rest = divmod(num_points, count)
    return np.concatenate([np.tile(np.arange(count), repeats), rng.choice(count, rest, replace=False)])


def _rgb(color: str | tuple[float, float, float]) -> np.ndarray:
    fill = np.asarray(_NAMED_COLORS.get(color, ()) if isinstance(color, str) else color, dtype=np.float64)
    if fill.shape != (3,) or not ((fill >= 0) & (fill <= 1)).all():
        raise ValueError(
            f"missing_color must be one of {', '.join(_NAMED_COLORS)} or (r, g, b) in [0, 1], got {color!r}."
        )
    return fill


def _normalize(coord: np.ndarray) -> np.ndarray:
    """xyz minus its mean, divided by the largest norm. In float64, or clouds far from the origin lose their shape."""
    if (coord[-1] == coord[0]).all() and (coord == coord[0]).all():
        raise PointCloudError(f"all its points are equal, {coord[0].tolist()}; an object has some extent.")
    columns = np.ascontiguousarray(coord.T)  # (3, P): numpy is several times faster along rows
    with np.errstate(over="ignore", invalid="ignore"):
        columns -= columns.mean(axis=1, keepdims=True)
        largest = np.sqrt(columns[0] ** 2 + columns[1] ** 2 + columns[2] ** 2).max()
    if not 0 < largest < np.inf:
        raise PointCloudError(f"its coordinates are too large or too small to compute with (up to {coord.max():g}).")
    return (columns / largest).T


__all__ = ["READABLE_SUFFIXES", "PointCloudError", "load_point_cloud"]
