"""Points from tables of numbers: NumPy arrays and files, structured arrays and data frames.

Columns are found by name where there are names, in any order, and else by their number and values (`split_columns`).

Shapes: N points, C columns.
"""

import contextlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .readers_minigpt3d import (
    PointCloudError,
    Points,
    check_unpacked_size,
    check_zip,
    color_names,
    coord_names,
    named_columns,
    printable,
    too_few,
)


POINT_NAMES = (
    "points",
    "point_cloud",
    "pointcloud",
    "xyz",
    "coord",
    "coords",
    "pos",
    "position",
    "positions",
    "vertices",
)
POINT_NAMES += ("pts", "pc", "pcd", "cloud", "xyzrgb")
COLOR_NAMES = ("colors", "color", "rgb", "rgbs", "colours", "colour", "vertex_colors", "point_colors")

# How far the length of a normal may be from 1: normals are printed with two digits, or stored in half precision.
_NORMAL_SLACK = 0.01
_SHAPES = "(points, 3) for xyz, (points, 4) with an intensity or (points, 6) for xyz and rgb"


# ---- Columns without names ------------------------------------------------------------------------------------------


def split_columns(array: np.ndarray, in_text: bool = False) -> Points:
    """xyz and colors of an array with 3, 4, 6, 7 or 9 columns, or with named fields.

    4: intensity last. 6: rgb, or normals if all rows have length 1. 7: x y z r g b and alpha or label, x y z intensity
    r g b, or normals and a label. 9: rgb and normals in either order.

    Args:
        array: (N, C), or (N,) with named fields.
        in_text: whether columns of zeros and ones are normals along an axis, as in a text file, and not pure colors.

    Raises:
        PointCloudError: it has another shape or no real numbers.
    """
    if array.dtype.names is not None:
        return _split_fields(array)
    if array.ndim != 2 or array.shape[1] not in (3, 4, 6, 7, 9):
        is_turned = array.ndim == 2 and len(array) in (3, 4, 6, 7, 9)
        remedy = "Pass its transpose, array.T." if is_turned else "Pass one cloud at a time, with these columns only."
        raise PointCloudError(f"a cloud has shape {_SHAPES}, got {array.shape}. {remedy}")
    if array.dtype.kind not in "fiu":
        raise PointCloudError(f"a cloud holds real numbers, got dtype {array.dtype}.")
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.compress_rows(array)  # drops points with a masked value
    return Points(array[:, :3], _find_color(array[:, 3:], in_text))


def _split_fields(array: np.ndarray) -> Points:
    """The fields of a structured array; "pos" of shape (N, 3) counts as "pos:0", "pos:1", "pos:2"."""
    columns = {}
    for name in array.dtype.names:
        values = array[name].reshape(array.size, -1)
        parts = [name] if values.shape[1] == 1 else [f"{name}:{index}" for index in range(values.shape[1])]
        columns |= dict(zip(parts, values.T, strict=False))
    used = (coord_names(list(columns)) or []) + (color_names(list(columns)) or [])
    for name in used:
        values = columns[name]
        if values.dtype.kind == "O":  # of a data frame: numbers beside None
            with contextlib.suppress(TypeError, ValueError):
                values = columns[name] = values.astype(np.float64)
        if values.dtype.kind not in "fiu":
            raise PointCloudError(
                f"its column '{printable(str(name))[:80]}' holds {values.dtype} and no real numbers, such as "
                f"{printable(repr(values[0]))[:80] if len(values) else 'none'}. Convert it to numbers."
            )
    points = named_columns(columns, list(columns))
    if points is None:
        raise PointCloudError(f"its fields have no x, y, z, got {printable(', '.join(columns))[:200]}.")
    return points


def _find_color(extra: np.ndarray, in_text: bool) -> np.ndarray | None:
    """rgb (N, 3) among the columns after xyz, or None."""
    width = extra.shape[1]
    if width in (0, 1) or width < 6 and _are_normals(extra[:, :3], in_text):
        return None
    if width == 3:
        return extra
    first, last = extra[:, :3], extra[:, -3:]
    if width == 6:
        if _are_normals(first, in_text):
            return last if _may_be_color(last) else None
        return first
    return last if _intensity_is_first(extra) else first


def _are_normals(columns: np.ndarray, in_text: bool) -> bool:
    """Whether rows (N, 3) have length 1; a few may be zero or NaN, where no normal was found."""
    if columns.dtype.kind != "f" or not len(columns):
        return False
    few = np.linalg.norm(columns[:16].astype(np.float64), axis=1)
    if (np.abs(few[few > 0] - 1) > _NORMAL_SLACK).any():  # of most clouds a look at the first rows is enough
        return False
    sample = columns[:: max(1, len(columns) // 10_000)].astype(np.float64)
    length = np.sqrt((sample**2).sum(axis=1))
    measured = np.isfinite(length) & (length > 0)
    if measured.sum() * 2 < len(sample) or (np.abs(length[measured] - 1) > _NORMAL_SLACK).any():
        return False
    sample = sample[measured]
    if (sample < 0).any():
        return True
    on_axis = (sample.max(axis=1) > 1 - 1e-6).all()
    # Colors by themselves: pure red in an array, or one gray of length 1 everywhere.
    return in_text if on_axis else bool((sample != sample[0]).any())


def _may_be_color(columns: np.ndarray) -> bool:
    low, high = np.nanmin(columns), np.nanmax(columns)
    return bool(low >= 0 and high <= (65535 if (columns == np.rint(columns)).all() else 255))


def _intensity_is_first(extra: np.ndarray) -> bool:
    """Of four columns (N, 4): whether they are intensity r g b, and not r g b and alpha or label."""
    first, last = _may_be_color(extra[:, :3]), _may_be_color(extra[:, 1:])
    if first != last:
        return last
    edges = extra[:, [0, 3]]
    is_constant = (edges == edges[0]).all(axis=0)
    if is_constant.any():
        return bool(is_constant[0] and not is_constant[1])
    high = extra.max(axis=0)
    if (high[:3] <= 1).all() != (high[1:] <= 1).all():  # 0–1 colors beside something larger
        return bool((high[1:] <= 1).all())
    if _is_brightness(extra[:, 0], extra[:, 1:]):
        return True
    # Red, green and blue of an object vary together, more than a color and an intensity or label.
    centered = extra - extra.mean(axis=0)
    norms = np.linalg.norm(centered, axis=0)
    relation = np.abs(centered.T @ centered / np.maximum(np.outer(norms, norms), 1e-300))  # (4, 4)
    return bool(relation[3, 1:3].max() > relation[0, 1:3].max() + 1e-9)


def _is_brightness(values: np.ndarray, color: np.ndarray) -> bool:
    """Whether values (N,) are the brightness of colors (N, 3), by one of its usual weightings, up to rounding."""
    weights = np.array([(0.299, 0.587, 0.114), (0.2126, 0.7152, 0.0722), (1 / 3, 1 / 3, 1 / 3)])
    distance = np.abs(color @ weights.T - values[:, None]).max(axis=0)
    return bool(distance.min() <= 0.01 * color.max())


# ---- NumPy ----------------------------------------------------------------------------------------------------------


def _read_array(stream: io.BufferedIOBase, num_bytes: int) -> np.ndarray:
    """A .npy of `num_bytes` bytes. Nothing is unpickled, and memory is allocated only for values that are there."""
    version = np.lib.format.read_magic(stream)
    read_2_0 = np.lib.format.read_array_header_2_0  # 3.0 differs in the encoding of names
    header_readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): read_2_0, (3, 0): read_2_0}
    if version not in header_readers:
        raise PointCloudError(f".npy format {version} is not known. Save it again with numpy.save.")
    shape, fortran_order, dtype = header_readers[version](stream)
    if dtype.hasobject:
        raise PointCloudError(
            "it holds pickled Python objects, which can run any code when read, so it is refused. "
            "Save a plain array: numpy.save(path, array.astype('float32'))."
        )
    expected = int(np.prod([int(size) for size in shape], dtype=object)) * dtype.itemsize
    remaining = num_bytes - stream.tell()
    if expected > remaining:
        raise too_few(f"{shape} of {dtype}, {expected:,} bytes", f"{remaining:,} follow")
    check_unpacked_size(expected, "this array")
    array = np.frombuffer(stream.read(expected), dtype=dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_npy(path: Path) -> Points:
    with open(path, "rb") as stream:
        return split_columns(_read_array(stream, path.stat().st_size))


def _read_npz(path: Path) -> Points:
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        members = {
            member.filename.removesuffix(".npy"): member
            for member in archive.infolist()
            if member.filename.endswith(".npy")
        }

        def read(name: str) -> np.ndarray:
            with archive.open(members[name]) as stream:
                return _read_array(stream, members[name].file_size)

        if not members:
            raise PointCloudError("it holds no array. Save one: numpy.savez(path, points=array).")
        if len(members) == 1:
            return split_columns(read(*members))
        by_name = {name.lower(): name for name in reversed(members)}
        point_name = next((by_name[name] for name in POINT_NAMES if name in by_name), None)
        color_name = next((by_name[name] for name in COLOR_NAMES if name in by_name), None)
        channels = color_names(list(members))
        if point_name is None:
            axes = coord_names(list(members))  # an array for each column
            if axes is None:
                raise PointCloudError(
                    f"which of its arrays holds the points? Got {printable(', '.join(sorted(members)))[:200]}; expected "
                    "one array, or 'points' and, if there are colors, 'colors'."
                )
            points = np.stack([read(name).reshape(-1) for name in axes], axis=1)
        else:
            points = read(point_name)
        if points.ndim != 2 or points.shape[1] != 3:
            return split_columns(points)
        if color_name is not None:
            color = read(color_name)
            color = color[:, :3] if color.ndim == 2 and color.shape[1] == 4 else color  # alpha is not used
        elif channels is not None and len(channels) == 3:
            color_name, color = ", ".join(channels), np.stack([read(name).reshape(-1) for name in channels], axis=1)
        else:
            return split_columns(points)
        if color.shape != points.shape:
            raise PointCloudError(f"'{color_name}' must have one rgb per point, {points.shape}, got {color.shape}.")
        return Points(split_columns(points).coord, color)


TABLE_READERS: dict[str, Callable[[Path], Points]] = {".npy": _read_npy, ".npz": _read_npz}
