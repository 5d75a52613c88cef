"""A point cloud from whatever holds a 3D object: file, array, tensor or mesh → float32 (num_points, 6), normalized.

The order: find the source (sources_minigpt3d.py) → read (tables_, text_, scans_, scenes_, gltf_, formats_minigpt3d.py) →
drop points that are not finite → colors to [0, 1] → clean, if asked to (cleaning_minigpt3d.py) → sample or repeat to
`num_points` → turn the up axis → normalize. Surfaces are sampled by area instead.

Shapes: N points in the source, P points of the cloud.
"""

import copy
import numbers
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cleaning_minigpt3d import (
    CLEANING_POINTS,
    SCENE_POINTS,
    check_cleaning,
    clean as clean_points,
    find_floor,
    suspect_scene,
)
from .formats_minigpt3d import CONVERSIONS, FORMAT_READERS
from .gltf_minigpt3d import GLTF_READERS
from .meshes_minigpt3d import Surface, check_num_faces, open_trimesh, sample_surface
from .readers_minigpt3d import PointCloudError, Points, ReadingLimits, called, limited, printable, report_dropped, warn
from .scans_minigpt3d import SCAN_READERS
from .scenes_minigpt3d import SURFACE_READERS
from .sources_minigpt3d import check_content, is_file_like, local_file, sniff_suffix, source_name
from .tables_minigpt3d import TABLE_READERS, split_columns
from .text_minigpt3d import TEXT_READERS


# From "this axis points up" to "y points up", as in the training data: new = coord @ matrix.T,
# each a rotation (no mirror).
_UP_ROTATIONS = {
    "x": np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "y": np.eye(3),
    "z": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]),
}
# What "auto" tries; "y" first: of equals the first is chosen.
UP_AXES = ("y", "z", "x")
NAMED_COLORS = {"black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5), "white": (1.0, 1.0, 1.0)}
# What arithmetic may add to a float color of 0 or 1; it is clipped.
COLOR_SLACK = 1e-3
# Up to this share of 16-bit values may exceed 255 in a scan whose colors have 8 bits; they are clipped.
STRAY_SHARE = 0.01
# Above it whole numbers have 16 bits, also where they are stored as floats.
_LEAST_16_BIT = 1023

_READERS: dict[str, Callable[[Path], Points | list[Surface]]] = (
    TABLE_READERS | TEXT_READERS | SCAN_READERS | SURFACE_READERS | GLTF_READERS | FORMAT_READERS
)
READABLE_SUFFIXES = tuple(_READERS)


def is_readable(path: str | Path) -> bool:
    """Whether a file's name has a suffix that is read, also before .gz."""
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    return suffix.lower() in READABLE_SUFFIXES


def load_point_cloud(
    source: Any,
    num_points: int = 8192,
    missing_color: str | tuple[float, float, float] = "black",
    up_axis: str | None = None,
    seed: int = 0,
    clean: str = "none",
    limits: ReadingLimits | None = None,
) -> np.ndarray:
    """Read, sample and normalize a 3D object. The same source and arguments always give the same cloud.

    Args:
        source: the content of a file (see `READABLE_SUFFIXES`, each also with .gz): a path, an `https://` or `file://`
            URL, bytes, a binary file open for reading, or a row `{"bytes", "path"}` of a data set; an array or tensor
            (N, 3) of xyz or (N, 6) of xyz and rgb, or what else `split_columns` knows; a trimesh `Trimesh`,
            `PointCloud` or `Scene`; or an object with `points` and `colors`, as in Open3D. Coordinates in any unit,
            colors in 0–1 or 0–255 (16-bit ones in 0–65535), told apart by dtype and range.
        num_points: P. More points are sampled, fewer are repeated, exactly as many keep their order.
        missing_color: for points without color: "black", as ModelNet40 is read in the paper; "gray"; "white"; or
            (r, g, b) in [0, 1]. The model sees it as the object's color and will call a bare mesh black.
        up_axis: the axis that points up in `source`, "x", "y" or "z"; the object is turned so that y points up, as in
            the training data. None does not turn it.
        seed: of the sampling.
        clean: "outliers" drops points far from all others, "floor" a plane below the object, "all" both; "none" keeps
            all points. A warning says what was removed.
        limits: what the source may take, such as `ReadingLimits(max_faces=50_000_000)`; `ReadingLimits()` by default.

    Returns:
        (num_points, 6) float32: xyz minus its mean, divided by the largest norm; rgb in [0, 1].

    Raises:
        PointCloudError: (a ValueError) the source cannot be read, or holds no usable cloud.
        ValueError: an argument out of its range.
        MissingReaderError: (also an ImportError) a package that reads this kind of file is missing; the message says
            which.
    """
    if up_axis == "auto":
        raise ValueError(
            "up_axis='auto' asks the model, which only the pipeline 'point-cloud-to-text' has. Use it, or pass 'x', 'y' or 'z'."
        )
    with limited(limits or ReadingLimits()):
        ((orientation,), _) = load_orientations(source, num_points, missing_color, up_axis, seed, clean)
    for note in orientation.notes:
        warnings.warn(note, stacklevel=2)
    return orientation.cloud


class Orientation(NamedTuple):
    """An object as it is if one of its axes points up.

    Args:
        cloud: (num_points, 6), as `load_point_cloud` returns it.
        up_axis: the axis, None if the object was not turned.
        has_floor: whether it stands on a floor, which is gone if cleaning removes floors; not looked for if this is the
            only orientation and floors stay.
        notes: warnings about this orientation.
    """

    cloud: np.ndarray
    up_axis: str | None
    has_floor: bool
    notes: list[str]


class CloudFacts(NamedTuple):
    """What a source holds.

    Args:
        num_points: N; None for surfaces.
        num_faces: triangles of surfaces; None for points.
        has_color: whether it has colors, be it in materials or textures.
    """

    num_points: int | None
    num_faces: int | None
    has_color: bool


def load_orientations(
    source: Any,
    num_points: int,
    missing_color: str | tuple[float, float, float],
    up_axis: str | None,
    seed: int,
    clean: str,
    content: Points | list[Surface] | None = None,
) -> tuple[list[Orientation], CloudFacts]:
    """Read as `load_point_cloud` does, with the same arguments and errors; `up_axis` may also be "auto".

    Args:
        content: of the source, or a part of it, if it has been read already.

    Returns:
        The only orientation, or for "auto" one for each of `UP_AXES`, from which the pipeline chooses; and facts about the
        source. The notes of an orientation are not among the warnings.
    """
    if not isinstance(num_points, numbers.Integral) or num_points < 1:
        raise ValueError(f"num_points must be a whole number of at least 1, got {num_points!r}.")
    if up_axis not in (None, "auto", *_UP_ROTATIONS):
        raise ValueError(f"up_axis must be 'x', 'y', 'z' or None (not turned), got {up_axis!r}.")
    check_cleaning(clean)
    up_axes = UP_AXES if up_axis == "auto" else (up_axis,)
    fill = _rgb(missing_color)
    rng = np.random.default_rng(seed)
    name = source_name(source)
    looks_closer = clean != "none" or up_axis == "auto"  # for outliers and floors
    count = max(num_points, CLEANING_POINTS) if looks_closer else num_points
    try:
        with called(name):
            content = _read(source) if content is None else content
            if isinstance(content, Points):
                coord, color = _sample_points(content, count, rng)
                counts = len(content.coord), None
            else:
                coord, color = sample_surface(content, count, rng)
                counts = None, sum(len(surface.corners) for surface in content)
            has_no_color = np.isnan(color)
            facts = CloudFacts(*counts, has_color=not has_no_color.all())
            if not facts.has_color and is_file_like(source):
                what = "points have" if isinstance(content, Points) else "surface has"
                warn(
                    f"its {what} no color, so all points are {missing_color}. What is answered about its color is not to "
                    "be believed."
                )
        if has_no_color.any():
            color = np.where(has_no_color, fill, color)
        shape = _normalize(coord)
        orientations = []
        for axis, cleaned in zip(up_axes, clean_points(shape, clean, up_axes), strict=True):
            keep = cleaned.keep
            notes = [cleaned.removed]
            if is_file_like(source):
                seen = shape[keep] if count >= SCENE_POINTS else _scene_points(content, seed)
                notes.append(suspect_scene(seen, clean))
            orientations.append(
                Orientation(
                    cloud=_finish(coord[keep], color[keep], num_points, axis, copy.deepcopy(rng)),
                    up_axis=axis,
                    has_floor=cleaned.has_floor or up_axis == "auto" and bool(find_floor(shape[keep], axis).any()),
                    notes=[printable(f"{name}: {note}.") for note in notes if note],
                )
            )
        return orientations, facts
    except PointCloudError as error:
        raise type(error)(f"{name}: {printable(str(error))}") from error


def read_content(source: Any) -> Points | list[Surface]:
    """What a source holds, not sampled yet. Raises as `load_point_cloud`."""
    name = source_name(source)
    try:
        with called(name):
            return _read(source)
    except PointCloudError as error:
        raise type(error)(f"{name}: {printable(str(error))}") from error


def _scene_points(content: Points | list[Surface], seed: int) -> np.ndarray:
    """About `SCENE_POINTS` points (N, 3), to suspect a scene where the model sees fewer; warnings have been given."""
    if isinstance(content, Points):
        coord = content.coord[:: max(1, len(content.coord) // SCENE_POINTS)]
        return coord[np.isfinite(coord).all(axis=1)].astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sample_surface(content, SCENE_POINTS, np.random.default_rng(seed))[0]


def _finish(
    coord: np.ndarray, color: np.ndarray, num_points: int, up_axis: str | None, rng: np.random.Generator
) -> np.ndarray:
    """Points (N, 3) with colors (N, 3) → cloud (P, 6): choose, turn, normalize."""
    chosen = _choose(len(coord), num_points, rng)
    coord, color = coord[chosen], color[chosen]
    if up_axis is not None:
        coord = coord @ _UP_ROTATIONS[up_axis].T
    cloud = np.empty((6, num_points), dtype=np.float32)
    cloud[:3], cloud[3:] = _normalize(coord).T, color.T
    return np.ascontiguousarray(cloud.T)


# ---- Reading --------------------------------------------------------------------------------------------------------


def _read(source: Any) -> Points | list[Surface]:
    """What a source holds as stored, see `load_point_cloud`: `Points`, or surfaces with at least one face."""
    if is_file_like(source):
        with local_file(source) as path:
            return _read_file(path)
    if hasattr(source, "detach"):  # a tensor; torch is not imported, which takes longer than reading a file
        source = source.detach().cpu()
        source = (source.double() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return split_columns(source)
    if type(source).__module__.split(".")[0] == "trimesh":
        return open_trimesh(source)
    if hasattr(source, "points") and hasattr(source, "colors"):
        return _read_object(source)
    if hasattr(source, "to_records"):  # a data frame
        return split_columns(source.to_records(index=False))
    raise PointCloudError(
        f"objects of type {type(source).__name__} cannot be read. Pass a path, an array or tensor (N, 3) or (N, 6), or a trimesh object."
    )


def _read_object(source: Any) -> Points:
    """An object with `points` and `colors`, such as Open3D's `PointCloud`, where colors may be empty."""
    try:
        coord, color = np.asarray(source.points, np.float64), np.asarray(source.colors, np.float64)
    except (TypeError, ValueError) as error:
        raise PointCloudError(
            f"its points and colors are no arrays of numbers ({printable(str(error))[:200]})."
        ) from error
    if not color.size:
        return split_columns(coord)._replace(color=None)
    if (
        coord.ndim != 2
        or coord.shape[1] != 3
        or color.ndim != 2
        or len(color) != len(coord)
        or color.shape[1] not in (3, 4)
    ):
        raise PointCloudError(f"it must have xyz and rgb of each point, got shapes {coord.shape} and {color.shape}.")
    return Points(coord, color[:, :3])


def _read_file(path: Path) -> Points | list[Surface]:
    suffix = path.suffix.lower()
    if suffix in CONVERSIONS:
        raise PointCloudError(f"files of type '{suffix}' are not read. {CONVERSIONS[suffix]}")
    if suffix not in _READERS:
        raise PointCloudError(
            f"files of type '{printable(suffix) or '(no extension)'}' are not known. Expected one of "
            f"{' '.join(READABLE_SUFFIXES)}; convert it, or pass its points as an array."
        )
    if path.stat().st_size == 0:
        raise PointCloudError("the file is empty (0 bytes).")
    check_content(path)
    try:
        content = _READERS[suffix](path)
        if not isinstance(content, Points):
            check_num_faces(sum(len(surface.corners) for surface in content))
        return content
    except PointCloudError as error:
        if suffix in SURFACE_READERS and _other_content(path, suffix):
            raise _unreadable(path, suffix, error) from error
        raise
    except MemoryError as error:
        raise PointCloudError("it needs more memory than is available; the file is corrupt or too large.") from error
    except RecursionError as error:
        raise PointCloudError("its parts are nested too deeply; the file is corrupt.") from error
    except Exception as error:  # every reader has exceptions of its own for a broken file
        raise _unreadable(path, suffix, error) from error
    except BaseException as error:  # what a library in Rust makes of a panic
        if type(error).__name__ != "PanicException":
            raise
        raise _unreadable(path, suffix, error) from error


def _unreadable(path: Path, suffix: str, error: BaseException) -> PointCloudError:
    detail = printable(" ".join(str(error).split()) or type(error).__name__)[:200]
    if actual := _other_content(path, suffix):
        return PointCloudError(f"its content is {actual}, though its name ends in {suffix}. Rename it.")
    return PointCloudError(
        f"it cannot be read as {suffix} ({detail}). The file is truncated or corrupt, or its "
        "name does not match its format; export it again."
    )


def _other_content(path: Path, suffix: str) -> str | None:
    """The suffix that fits a file's content, if that is known and another one."""
    actual = sniff_suffix(path)
    return None if actual in (None, suffix, ".txt") or {actual, suffix} == {".las", ".laz"} else actual


# ---- Points ---------------------------------------------------------------------------------------------------------


def _sample_points(points: Points, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(N, …) → coord (P, 3) float64 and color (P, 3) in [0, 1], NaN if there is none; P is N, or `most` if that is less."""
    coord, color, may_be_sparse = points
    if not len(coord):
        raise PointCloudError("the cloud is empty (0 points).")
    if color is not None and _is_all_nan(color):  # columns that are named, but empty
        color = None
    coord = np.ascontiguousarray(coord)  # otherwise all that follows is several times slower
    color = None if color is None else np.ascontiguousarray(color)
    if not (np.isfinite(coord).all() and (color is None or np.isfinite(color).all())):
        good = np.isfinite(coord).all(axis=1)
        if color is not None:
            good &= np.isfinite(color).all(axis=1)
        report_dropped(good, "points", may_be_sparse)
        coord, color = coord[good], None if color is None else color[good]
    if color is not None:
        scale = _color_scale(color)  # over all points: a sample might have another range
    chosen = _choose(len(coord), min(most, len(coord)), rng)
    coord = coord[chosen].astype(np.float64)
    if color is None:
        return coord, np.full(coord.shape, np.nan)
    color = color[chosen] if scale == 1 else color[chosen] / scale
    return coord, np.clip(color, 0, 1)


def _is_all_nan(color: np.ndarray) -> bool:
    return color.dtype.kind == "f" and len(color) > 0 and bool(np.isnan(color[0]).all() and np.isnan(color).all())


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
        is_whole = not is_float or high > _LEAST_16_BIT and bool((color == np.rint(color)).all())
        if is_whole and high <= 65535:
            return 255.0 if np.count_nonzero(color > 255) <= STRAY_SHARE * color.size else 65535.0
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
    fill = np.asarray(NAMED_COLORS.get(color, ()) if isinstance(color, str) else color, dtype=np.float64)
    if fill.shape != (3,) or not ((fill >= 0) & (fill <= 1)).all():
        raise ValueError(
            f"missing_color must be one of {', '.join(NAMED_COLORS)} or (r, g, b) in [0, 1], got {color!r}."
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


__all__ = ["READABLE_SUFFIXES", "PointCloudError", "ReadingLimits", "is_readable", "load_point_cloud"]
