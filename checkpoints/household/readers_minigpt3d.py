"""Points from files: .npy, .npz, .ply, .pcd, .las, .laz and text.

A reader takes a path and returns `Points`, as stored. To add a format, write its reader and list it in `POINT_READERS`.
What a header promises is compared with the size of its file before memory is allocated for it.

Shapes: N points.
"""

import importlib
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


# What a file may unpack to. A scan of 10 million points in double precision takes 480 MB.
MAX_UNPACKED_BYTES = 4 * 1024**3
# And how many times its own size, once it unpacks to a lot: coordinates and meshes shrink to a tenth at best.
MAX_UNPACK_RATIO = 200
RATIO_FLOOR_BYTES = 100 * 1000**2
# Above this share of NaN or infinite points the file is considered broken, below they are dropped.
MAX_BAD_SHARE = 0.5

POINT_NAMES = ("points", "point_cloud", "xyz", "coord", "coords", "pos", "vertices")
COLOR_NAMES = ("colors", "color", "rgb")
COLOR_COLUMNS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))


class PointCloudError(ValueError):
    """A source that is no usable point cloud; the message says what is wrong with it and what to do."""


class Points(NamedTuple):
    """What a reader returns: coord (N, 3) of any real dtype; color (N, 3) as stored, or None."""

    coord: np.ndarray
    color: np.ndarray | None


# ---- For all readers ------------------------------------------------------------------------------------------------


def import_reader(module: str, package: str | None = None):
    """Import a library only when a file needs it, so that importing this package stays light."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise ImportError(
            f"Reading this file needs {package.split('[')[0]}, which cannot be imported ({error}). "
            f"Install it: pip install '{package}'"
        ) from error


def check_unpacked_size(num_bytes: int, what: str, packed_bytes: int | None = None):
    """Refuse data that would unpack to too much, or to too many times its size.

    Raises:
        PointCloudError: it would.
    """
    limit = MAX_UNPACKED_BYTES
    if packed_bytes is not None:
        limit = min(limit, max(RATIO_FLOOR_BYTES, MAX_UNPACK_RATIO * packed_bytes))
    if num_bytes > limit:
        size = "" if packed_bytes is None else f" for its {packed_bytes:,}"
        raise PointCloudError(
            f"{what} would unpack to {num_bytes:,} bytes, more than the {limit:,} allowed{size}. It is not "
            "opened: if it is not a zip bomb, reduce the number of points first."
        )


def check_zip(path: Path):
    """Check the sizes that a zip states before unpacking it (zipfile never reads more than is stated)."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        check_unpacked_size(unpacked, "this archive", path.stat().st_size)


def report_dropped(good: np.ndarray, what: str, name: str):
    """Warn that the points or faces that are not `good` (bool) are dropped.

    Raises:
        PointCloudError: they are too many.
    """
    num_bad, total = int((~good).sum()), len(good)
    if num_bad > MAX_BAD_SHARE * total:
        raise PointCloudError(
            f"{num_bad:,} of {total:,} {what} are NaN or infinite. Too many to drop; export the object again."
        )
    warnings.warn(f"{name}: {num_bad:,} of {total:,} {what} are NaN or infinite and were dropped.", stacklevel=4)


def split_columns(array: np.ndarray) -> Points:
    """(N, 3) or (N, 6) → xyz, and rgb if there are six columns."""
    if array.ndim != 2 or array.shape[1] not in (3, 6):
        raise PointCloudError(
            f"a cloud has shape (points, 3) for xyz or (points, 6) for xyz and rgb, got {array.shape}. "
            "Pass one cloud at a time, with these columns only."
        )
    if array.dtype.kind not in "fiu":
        raise PointCloudError(f"a cloud holds real numbers, got dtype {array.dtype}.")
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.compress_rows(array)  # drops points with a masked value
    return Points(array[:, :3], array[:, 3:] if array.shape[1] == 6 else None)


def _named_columns(table: Any, names: list[str]) -> Points | None:
    """xyz and, if there are all three, red, green, blue of a table with named columns; None without xyz."""
    lookup = {name.lower(): name for name in names}

    def pick(columns: tuple[str, ...]) -> np.ndarray | None:
        if not set(columns) <= lookup.keys():
            return None
        return np.stack([np.asarray(table[lookup[column]]) for column in columns], axis=1)  # (N, 3)

    coord = pick(("x", "y", "z"))
    if coord is None:
        return None
    colors = (pick(columns) for columns in COLOR_COLUMNS)
    return Points(coord, next((color for color in colors if color is not None), None))


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(count)


def _too_few(expected: str, actual: str) -> PointCloudError:
    return PointCloudError(
        f"its header says {expected}, but {actual}. The file is truncated or corrupt; export it again."
    )


# ---- NumPy ----------------------------------------------------------------------------------------------------------


def _read_array(stream: io.BufferedIOBase, num_bytes: int) -> np.ndarray:
    """A .npy of `num_bytes` bytes. Nothing is unpickled, and memory is allocated only for values that are there."""
    version = np.lib.format.read_magic(stream)
    header_readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
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
        raise _too_few(f"{shape} of {dtype}, {expected:,} bytes", f"{remaining:,} follow")
    check_unpacked_size(expected, "this array")
    array = np.frombuffer(stream.read(expected), dtype=dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_npy(path: Path) -> Points:
    with open(path, "rb") as stream:
        return split_columns(_read_array(stream, path.stat().st_size))


def _read_npz(path: Path) -> Points:
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}

        def read(name: str) -> np.ndarray:
            with archive.open(members[name]) as stream:
                return _read_array(stream, members[name].file_size)

        if not members:
            raise PointCloudError("it holds no array. Save one: numpy.savez(path, points=array).")
        if len(members) == 1:
            return split_columns(read(*members))
        point_name = next((name for name in POINT_NAMES if name in members), None)
        color_name = next((name for name in COLOR_NAMES if name in members), None)
        if point_name is None:
            raise PointCloudError(
                f"which of its arrays holds the points? Got {', '.join(sorted(members))}; expected one array, or "
                "'points' and, if there are colors, 'colors'."
            )
        points = read(point_name)
        if color_name is None or points.ndim != 2 or points.shape[1] != 3:
            return split_columns(points)
        color = read(color_name)
        if color.shape != points.shape:
            raise PointCloudError(f"'{color_name}' must have one rgb per point, {points.shape}, got {color.shape}.")
        return Points(split_columns(points).coord, color)


# ---- PLY ------------------------------------------------------------------------------------------------------------


class PlyHeader(NamedTuple):
    """The header of a PLY: its `format`, `element` and `property` lines as words, and the rows of each element."""

    lines: list[list[str]]
    counts: dict[str, int]


def read_ply_header(path: Path) -> PlyHeader:
    """Read the header of a PLY.

    Raises:
        PointCloudError: there is none, or it promises more vertices than the file can hold.
    """
    header = _first_bytes(path, 1 << 16)
    if not header.startswith(b"ply") or b"end_header" not in header:
        raise PointCloudError("this is no PLY: it must begin with 'ply' and a header that ends with 'end_header'.")
    lines = [line.split() for line in header.decode("latin-1").split("end_header")[0].splitlines()]
    lines = [line for line in lines if line and line[0] in ("format", "element", "property")]
    counts = {line[1]: int(line[2]) for line in lines if line[0] == "element"}
    num_vertices, num_bytes = counts.get("vertex", 0), path.stat().st_size
    if num_vertices * 3 > num_bytes:  # a vertex takes at least three bytes
        raise _too_few(f"{num_vertices:,} vertices", f"the file has {num_bytes:,} bytes")
    return PlyHeader(lines, counts)


def read_ply_points(path: Path, header: PlyHeader) -> Points:
    """The vertices of a PLY without faces."""
    lines, counts = header
    is_plain = list(counts) == ["vertex"] and not any("list" in line for line in lines)
    if counts.get("vertex") and lines[0][1] == "ascii" and is_plain:
        vertices = _read_ascii_vertices(path, lines[2:], counts["vertex"])
    else:
        vertices = import_reader("plyfile").PlyData.read(str(path))["vertex"].data
    points = _named_columns(vertices, list(vertices.dtype.names))
    if points is None:
        raise PointCloudError(f"its vertices have no x, y, z, got {', '.join(vertices.dtype.names)}.")
    return points


def _read_ascii_vertices(path: Path, properties: list[list[str]], count: int) -> np.ndarray:
    """The only table of an ascii PLY, (count,) with named fields. plyfile reads it too, but takes ten times as long."""
    dtype = [(name, {"char": "i1", "uchar": "u1"}.get(type_name, type_name)) for _, type_name, name in properties]
    with open(path, encoding="latin-1") as lines:
        for line in lines:
            if line.strip() == "end_header":
                break
        vertices = np.loadtxt(lines, dtype=dtype, comments=None, max_rows=count, ndmin=1)
    if len(vertices) != count:
        raise _too_few(f"{count:,} vertices", f"{len(vertices):,} follow")
    return vertices


# ---- Scans and text -------------------------------------------------------------------------------------------------


def _read_pcd(path: Path) -> Points:
    _, mark, tail = _first_bytes(path, 1 << 14).partition(b"DATA binary_compressed\n")
    if mark and len(tail) >= 8:
        check_unpacked_size(int.from_bytes(tail[4:8], "little"), "this .pcd", path.stat().st_size)
    table = import_reader("pypcd4").PointCloud.from_path(path)
    if table.pc_data.size != table.metadata.points:
        raise _too_few(f"{table.metadata.points:,} points", f"{table.pc_data.size:,} follow")
    columns = {name: table.pc_data[name].reshape(-1) for name in table.fields}
    packed = next((name for name in ("rgb", "rgba") if name in columns), None)
    if packed:  # three bytes in the bits of a float or an integer, blue lowest
        bits = np.ascontiguousarray(columns[packed])
        bits = bits.view(np.uint32) if bits.dtype.itemsize == 4 else bits.astype(np.uint32)
        for name, shift in (("red", 16), ("green", 8), ("blue", 0)):
            columns[name] = (bits >> shift & 255).astype(np.uint8)
    points = _named_columns(columns, list(columns))
    if points is None:
        raise PointCloudError(f"its points have no x, y, z, got {', '.join(table.fields)}.")
    return points


def _read_las(path: Path) -> Points:
    laspy = import_reader("laspy", "laspy[lazrs]")
    with laspy.open(path) as reader:
        num_points, num_bytes = reader.header.point_count, reader.header.point_format.size
        check_unpacked_size(num_points * num_bytes, "this scan")
        if path.suffix.lower() == ".las" and num_points * num_bytes > path.stat().st_size:
            raise _too_few(f"{num_points:,} points", f"the file has {path.stat().st_size:,} bytes")
        if not num_points:
            return Points(np.zeros((0, 3)), None)
        if path.suffix.lower() == ".laz":
            import_reader("lazrs")
        scan = reader.read()
    coord = np.stack([scan.x, scan.y, scan.z], axis=1)  # float64, with offset and scale applied
    if "red" not in scan.point_format.dimension_names:
        return Points(coord, None)
    color = np.stack([scan.red, scan.green, scan.blue], axis=1)
    return Points(coord, color if color.any() else None)  # all zero: the format has colors, but none were recorded


def _read_text(path: Path) -> Points:
    """Rows of numbers between commas, semicolons, tabs or blanks; a header may name the columns; '#' comments."""
    num_skipped, names, first_row = _find_table(path)
    delimiter = next((mark for mark in ",;" if mark in first_row), None)
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        table = np.loadtxt(lines, delimiter=delimiter, comments="#", skiprows=num_skipped, ndmin=2, dtype=np.float64)
    if names is not None and len(names) == table.shape[1]:
        points = _named_columns(dict(zip(names, table.T, strict=True)), names)
        if points is not None:
            return points
    if table.shape[1] not in (3, 6):
        raise PointCloudError(
            f"expected 3 columns (x y z) or 6 (x y z r g b), got {table.shape[1]}. "
            "Name them in a first line, such as 'x,y,z,intensity,red,green,blue'."
        )
    return split_columns(table)


def _find_table(path: Path) -> tuple[int, list[str] | None, str]:
    """Lines before a text file's first row of numbers, names of the columns if a line has them, and that row."""
    num_skipped, names = 0, None
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            words = line.partition("#")[0].replace(",", " ").replace(";", " ").split()
            if words and not _are_numbers(words):
                if names is not None:
                    raise PointCloudError(f"line {num_skipped + 1} must be numbers, got {line.strip()[:60]!r}.")
                names = [word.strip("\"'/ ") for word in words]
            elif len(words) > 1:  # a single number is a count of points, as .pts files have it
                return num_skipped, names, line
            num_skipped += 1
    raise PointCloudError("there are no rows of numbers in it; expected 'x y z' or 'x y z r g b' on each line.")


def _are_numbers(words: list[str]) -> bool:
    try:
        return [float(word) for word in words] != []
    except ValueError:
        return False


# PLY is missing: it may hold a mesh (`read_ply` in meshes_minigpt3d.py).
POINT_READERS: dict[str, Callable[[Path], Points]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pcd": _read_pcd,
    ".xyz": _read_text,
    ".txt": _read_text,
    ".csv": _read_text,
    ".las": _read_las,
    ".laz": _read_las,
}
