"""Points from binary files: .ply, .pcd, .las, .laz and .e57; and what all readers share: errors, limits, names of columns.

A reader takes a path and returns `Points`, as stored. To add a format, write its reader and list it in `POINT_READERS`.
What a header promises is compared with the size of its file before memory is allocated for it.

PLY is read by plyfile (text without lists by numpy, ten times as fast), LAS by laspy, LAZ by lazrs, E57 by pye57.
PCD is read here: pypcd4 1.5.1 needs COUNT and FIELDS, splits text at single blanks, and expands a COUNT of any size.

Shapes: N points.
"""

import contextlib
import importlib
import io
import logging
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


# ---- Limits (docs/reading.md lists them) ----------------------------------------------------------------------------

# What a file may unpack to. A scan of 10 million points in double precision takes 480 MB.
MAX_UNPACKED_BYTES = 4 * 1024**3
# And how many times its own size, once it unpacks to a lot: coordinates and meshes shrink to a tenth at best.
MAX_UNPACK_RATIO = 200
RATIO_FLOOR_BYTES = 100 * 1000**2
# Above this share of NaN or infinite points the file is considered broken, below they are dropped.
MAX_BAD_SHARE = 0.5
# Header of a PLY or PCD. Exporters write settings and licenses into comments.
MAX_HEADER_BYTES = 16 * 1024**2
# Lines of a text before its first row of numbers, and characters in one of its lines.
MAX_HEADER_LINES = 1000
MAX_LINE_CHARACTERS = 1_000_000
# Seconds to wait for a server, and for a complete download; redirects that are followed.
URL_TIMEOUT_SECONDS = 20
MAX_DOWNLOAD_SECONDS = 600
MAX_DOWNLOAD_BYTES = 1024**3
MAX_REDIRECTS = 5


class PointCloudError(ValueError):
    """A source that is no usable point cloud; the message says what is wrong with it and what to do."""


class MissingReaderError(PointCloudError, ImportError):
    """A library that reads this format is not installed; the message says how to install it."""


class Points(NamedTuple):
    """What a reader returns.

    Args:
        coord: (N, 3) of any real dtype.
        color: (N, 3) as stored, or None.
        may_be_sparse: whether NaN marks a missing measurement in this format, so that most points may be NaN.
    """

    coord: np.ndarray
    color: np.ndarray | None
    may_be_sparse: bool = False


# ---- For all readers ------------------------------------------------------------------------------------------------


def import_reader(module: str, package: str | None = None):
    """Import a library only when a file needs it, so that importing this package stays light.

    Args:
        module: the name it is imported by.
        package: the name it is installed by, if that is another.

    Raises:
        MissingReaderError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise MissingReaderError(
            f"Reading this file needs {package.split('[')[0]}, which cannot be imported ({error}). "
            f"Install it: pip install '{package}'"
        ) from error


def printable(text: str) -> str:
    """A text with control characters escaped, so that the name of a file can neither move the cursor nor add a line."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )


def unpacked_limit(packed_bytes: int | None) -> int:
    """How many bytes may come out of a file of so many; None if that is unknown."""
    if packed_bytes is None:
        return MAX_UNPACKED_BYTES
    return min(MAX_UNPACKED_BYTES, max(RATIO_FLOOR_BYTES, MAX_UNPACK_RATIO * packed_bytes))


def check_unpacked_size(num_bytes: int, what: str, packed_bytes: int | None = None):
    """Refuse data that would unpack to too much, or to too many times its size.

    Raises:
        PointCloudError: it would.
    """
    limit = unpacked_limit(packed_bytes)
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


def report_dropped(good: np.ndarray, what: str, name: str, max_share: float = MAX_BAD_SHARE):
    """Warn that the points or faces that are not `good` (bool) are dropped.

    Raises:
        PointCloudError: they are all, or more than `max_share`.
    """
    num_bad, total = int((~good).sum()), len(good)
    if num_bad > max_share * total or num_bad == total:
        raise PointCloudError(
            f"{num_bad:,} of {total:,} {what} are NaN or infinite. Too many to drop; export the object again."
        )
    warnings.warn(
        f"{printable(name)}: {num_bad:,} of {total:,} {what} are NaN or infinite and were dropped.", stacklevel=4
    )


def too_few(expected: str, actual: str) -> PointCloudError:
    """The error of a file that holds less than its header says."""
    return PointCloudError(
        f"its header says {expected}, but {actual}. The file is truncated or corrupt; export it again."
    )


# ---- Columns by name ------------------------------------------------------------------------------------------------

# "Points:0", "pos_x", "X (m)" and "x" are all the first coordinate; "diffuse_red", "RGB:0", "Rf" the first of rgb.
_COORD_NAME = re.compile(
    r"(?P<set>points?|position|pos|p|coords?|coordinates?|loc|location|vertex|vertices|xyz|cartesian|center)?"
    r"(?P<axis>[xyz012])(?:m|mm|cm|coord|coordinate|pos|position)?"
)
_COLOR_NAME = re.compile(
    r"(?P<set>rgba?|bgra?|colou?rs?|col|diffuse|scalar|scalarfield|vertexcolou?r|pointcolou?r)?"
    r"(?P<axis>red|green|blue|[rgb012])(?:f|channel|value|colou?r|8|16)?"
)
_MAP_NAMES = {"easting": 0, "east": 0, "northing": 1, "north": 1, "elevation": 2, "altitude": 2, "height": 2}
_PACKED_NAMES = ("rgb", "rgba", "packedrgb", "packedrgba", "packedcolor")
# Gaussian splats: color = 0.5 + f_dc times the first spherical harmonic.
_SPLAT_NAMES = ("fdc0", "fdc1", "fdc2")
_SPLAT_FACTOR = 0.28209479177387814


def _plain_name(name: str) -> str:
    """A column's name without case, quotes, unit and separators: "Points:0" → "points0", "X (m)" → "x"."""
    name = re.sub(r"\[(\d)\]", r"\1", name.lower())
    return re.sub(r"[\s\"'/#%_.:\-]+", "", re.sub(r"[\[(].*?[\])]", "", name))


def _triple(names: list[str], pattern: re.Pattern, letters: dict[str, int]) -> list[str] | None:
    """The first complete triple of columns whose names match; plain "x", "y", "z" before those with a prefix."""
    sets: dict[str, dict[int, str]] = {"": {}}
    for name in names:
        plain = _plain_name(name)
        match = pattern.fullmatch(plain)
        if match and (match["set"] or match["axis"] not in "012"):
            sets.setdefault(match["set"] or "", {}).setdefault(letters[match["axis"]], name)
        elif letters.get("x") == 0 and plain in _MAP_NAMES:
            sets.setdefault("map", {}).setdefault(_MAP_NAMES[plain], name)
    if "map" in sets:  # "easting, northing, z"
        sets["map"] = sets[""] | sets["map"]
    return next(([columns[axis] for axis in range(3)] for columns in sets.values() if len(columns) == 3), None)


def coord_names(names: list[str]) -> list[str] | None:
    """Which columns hold x, y, z."""
    return _triple(names, _COORD_NAME, {"x": 0, "y": 1, "z": 2, "0": 0, "1": 1, "2": 2})


def color_names(names: list[str]) -> list[str] | None:
    """Which columns hold red, green, blue: three, or one with all of them packed into its bits."""
    letters = {"red": 0, "r": 0, "0": 0, "green": 1, "g": 1, "1": 1, "blue": 2, "b": 2, "2": 2}
    triple = _triple(names, _COLOR_NAME, letters)
    if triple is not None:
        return triple
    lookup = {_plain_name(name): name for name in names}
    if set(_SPLAT_NAMES) <= lookup.keys():
        return [lookup[name] for name in _SPLAT_NAMES]
    return next(([lookup[name]] for name in _PACKED_NAMES if name in lookup), None)


def named_columns(table: Mapping[str, np.ndarray] | np.ndarray, names: list[str]) -> Points | None:
    """xyz and, if there are all three, red, green, blue of a table with named columns; None without xyz."""
    columns = coord_names(names)
    if columns is None:
        return None
    coord = np.stack([np.asarray(table[name]) for name in columns], axis=1)  # (N, 3)
    columns = color_names(names)
    if columns is None:
        return Points(coord, None)
    if len(columns) == 1:
        return Points(coord, unpack_rgb(np.asarray(table[columns[0]])))
    color = np.stack([np.asarray(table[name]) for name in columns], axis=1)
    if _plain_name(columns[0]) in _SPLAT_NAMES:
        color = np.clip(0.5 + _SPLAT_FACTOR * color, 0, 1)
    return Points(coord, color)


def unpack_rgb(packed: np.ndarray) -> np.ndarray | None:
    """Three bytes in the bits of a float or an integer, blue lowest (N,) → (N, 3) uint8.

    PCL prints the bits of a float as a whole number into text, and other programs print the float itself.
    """
    if packed.dtype.kind == "f":
        finite = packed[np.isfinite(packed)]
        if packed.dtype.itemsize == 4 and not (len(finite) and _are_whole(finite)):
            bits = np.ascontiguousarray(packed).view(np.uint32)
        elif len(finite) and _are_whole(finite):
            bits = np.where(np.isfinite(packed), packed, 0).astype(np.int64)
        else:
            with np.errstate(under="ignore", over="ignore"):
                bits = packed.astype(np.float32).view(np.uint32)
    else:
        bits = packed.astype(np.int64)
    return np.stack([bits >> shift & 255 for shift in (16, 8, 0)], axis=1).astype(np.uint8)


def _are_whole(values: np.ndarray) -> bool:
    """Whether floats are colors as whole numbers: black may be 0, and no bits of a color make a whole float below 2^25."""
    return bool((values == np.rint(values)).all() and np.abs(values).max() < 2**32)


# ---- PLY ------------------------------------------------------------------------------------------------------------


class PlyHeader(NamedTuple):
    """The header of a PLY: its `format`, `element` and `property` lines as words, and the rows of each element."""

    lines: list[list[str]]
    counts: dict[str, int]


_PLY_END = re.compile(rb"[\r\n][ \t]*end_header[ \t]*(\r\n|\r|\n|$)")
_PLY_BYTES = {"char": 1, "uchar": 1, "int8": 1, "uint8": 1, "short": 2, "ushort": 2, "int16": 2, "uint16": 2}
_PLY_BYTES |= {"double": 8, "float64": 8}


def read_header(path: Path, end: re.Pattern) -> tuple[bytes, int]:
    """The beginning of a file up to and including what matches `end`, and the file's size.

    Raises:
        PointCloudError: nothing matches within `MAX_HEADER_BYTES`.
    """
    num_bytes, length = path.stat().st_size, 1 << 14
    with open(path, "rb") as stream:
        header = stream.read(length)
        while not (match := end.search(header)) and len(header) < min(num_bytes, MAX_HEADER_BYTES):
            length *= 4
            header += stream.read(length)
    if not match:
        raise PointCloudError(
            f"its header does not end within {min(num_bytes, MAX_HEADER_BYTES):,} bytes. The file is truncated, corrupt, "
            "or of another format than its name says."
        )
    return header[: match.end()], num_bytes


def read_ply_header(path: Path) -> PlyHeader:
    """Read the header of a PLY.

    Raises:
        PointCloudError: there is none, or it promises more than the file can hold.
    """
    with open(path, "rb") as stream:
        start = stream.read(3)
    if start != b"ply":
        raise PointCloudError("this is no PLY: it must begin with 'ply' and a header that ends with 'end_header'.")
    header, num_bytes = read_header(path, _PLY_END)
    lines = [line.split() for line in header.decode("latin-1").splitlines()]
    lines = [line for line in lines if line and line[0] in ("format", "element", "property")]
    if not lines or lines[0][0] != "format" or len(lines[0]) < 2:
        raise PointCloudError("the header of this PLY has no 'format' line. The file is corrupt; export it again.")
    counts = {line[1]: int(line[2]) for line in lines if line[0] == "element"}
    _check_ply_size(lines, num_bytes - len(header))
    return PlyHeader(lines, counts)


def _check_ply_size(lines: list[list[str]], num_bytes: int):
    """Compare the least that every element takes with what follows the header."""
    is_text, name, count, row_bytes, expected = lines[0][1] == "ascii", "", 0, 0, 0
    for line in [*lines[1:], ["element", "", "0"]]:
        if line[0] == "property":  # in text a digit and what separates it; of a list at least its length
            row_bytes += 2 if is_text else _PLY_BYTES.get(line[2] if line[1] == "list" else line[1], 4)
            continue
        expected += count * max(row_bytes, 1)
        if count < 0 or expected > num_bytes + is_text:  # the last row may lack its end of line
            rows = f"{count:,} vertices" if name == "vertex" else f"{count:,} rows of {name[:40]!r}"
            raise too_few(rows, f"the file has {num_bytes:,} bytes for them")
        name, count, row_bytes = line[1], int(line[2]), 0


def read_ply_points(path: Path, header: PlyHeader) -> Points:
    """The vertices of a PLY without faces."""
    lines, counts = header
    names = list(counts)
    if "packed_position" in (line[-1] for line in lines):
        raise PointCloudError(
            "it holds compressed Gaussian splats (packed_position), which are not read. Export it as an uncompressed PLY."
        )
    properties = [line for line in lines[2:] if line[0] == "property"]
    ends = [index for index, line in enumerate(lines) if line[0] == "element"][1:]
    if ends:
        properties = lines[2 : ends[0]]
    is_table = names[:1] == ["vertex"] and not any("list" in line for line in properties)
    if counts.get("vertex") and lines[0][1] == "ascii" and is_table:
        vertices = _read_ascii_vertices(path, properties, counts["vertex"])
    else:
        data = import_reader("plyfile").PlyData.read(str(path))
        if "vertex" not in data:
            raise PointCloudError(f"it has no vertices, got the elements {', '.join(names) or 'none'}.")
        vertices = data["vertex"].data
    points = named_columns(vertices, list(vertices.dtype.names))
    if points is None:
        raise PointCloudError(f"its vertices have no x, y, z, got {', '.join(vertices.dtype.names)}.")
    return points._replace(may_be_sparse=True)


def _read_ascii_vertices(path: Path, properties: list[list[str]], count: int) -> np.ndarray:
    """The first table of an ascii PLY, (count,) with named fields. plyfile reads it too, but takes ten times as long."""
    dtype = [(name, {"char": "i1", "uchar": "u1"}.get(type_name, type_name)) for _, type_name, name in properties]

    def read(dtype: list) -> np.ndarray:
        with open(path, encoding="latin-1") as lines:
            for line in lines:
                if line.strip() == "end_header":
                    break
            return np.loadtxt(lines, dtype=dtype, comments=None, max_rows=count, ndmin=1)

    try:
        vertices = read(dtype)
    except ValueError:  # some programs print whole numbers as "255.0" or "-1.#IND"
        vertices = read([(name, "f8") for name, _ in dtype])
    if len(vertices) != count:
        raise too_few(f"{count:,} vertices", f"{len(vertices):,} follow")
    return vertices


# ---- PCD ------------------------------------------------------------------------------------------------------------


class _PcdField(NamedTuple):
    """A field: the bytes and the columns before it in a row, and how many values it has in each point."""

    name: str
    dtype: np.dtype
    start: int
    column: int
    count: int


class _PcdHeader(NamedTuple):
    fields: list[_PcdField]
    row_bytes: int
    num_columns: int
    num_points: int
    encoding: str
    num_bytes: int


_PCD_END = re.compile(rb"(?:^|[\r\n])[ \t]*DATA[ \t]+\w+[ \t]*(\r\n|\r|\n|$)")
_PCD_MAX_COUNT = 4  # of a field that can hold coordinates or a color; longer ones are padding and descriptors


def _read_pcd_header(path: Path) -> _PcdHeader:
    """Fields and sizes, with what old versions and sloppy writers leave out.

    Raises:
        PointCloudError: it contradicts itself, or promises more than the file holds.
    """
    header, file_bytes = read_header(path, _PCD_END)
    lines = (line.split() for line in header.decode("latin-1").splitlines())
    values = {line[0].upper(): line[1:] for line in lines if len(line) > 1 and not line[0].startswith("#")}
    names = values.get("FIELDS") or values.get("COLUMNS") or []  # COLUMNS until version 0.5
    types = values.get("TYPE", ["F"] * len(names))
    sizes, counts = ([int(number) for number in values.get(key, ())] for key in ("SIZE", "COUNT"))
    sizes, counts = sizes or [4] * len(names), counts or [1] * len(names)
    if not names or not len(names) == len(sizes) == len(types) == len(counts):
        raise PointCloudError(
            f"its header must give name, SIZE, TYPE and COUNT of each field, got {len(names)}, {len(sizes)}, {len(types)} "
            f"and {len(counts)}. The file is corrupt; export it again."
        )
    width, height = (int(values.get(key, ["1"])[0]) for key in ("WIDTH", "HEIGHT"))
    num_points = int(values["POINTS"][0]) if "POINTS" in values else width * height
    if min(*counts, *sizes, num_points) < 0:
        raise PointCloudError("its header has a negative number. The file is corrupt; export it again.")
    fields, start, column = [], 0, 0
    for name, size, kind, count in zip(names, sizes, types, counts, strict=True):
        if name != "_" and 1 <= count <= _PCD_MAX_COUNT:
            fields.append(_PcdField(name, np.dtype(f"<{kind.lower()}{size}"), start, column, count))
        start, column = start + size * count, column + count
    encoding, num_bytes = values["DATA"][0].lower(), file_bytes - len(header)
    least = {"ascii": 2 * column, "binary": start}.get(encoding, 0)  # in text a digit and a blank
    if least * num_points > num_bytes + 1:  # the last row may lack its end of line
        raise too_few(f"{num_points:,} points", f"{num_bytes // least:,} follow")
    return _PcdHeader(fields, start, column, num_points, encoding, len(header))


def _read_pcd(path: Path) -> Points:
    header = _read_pcd_header(path)
    if not header.num_points:
        return Points(np.zeros((0, 3)), None)
    if header.encoding == "ascii":
        rows = _read_pcd_text(path, header)
        columns = {
            field.name: [rows[:, field.column + index] for index in range(field.count)] for field in header.fields
        }
    else:
        columns = _read_pcd_bytes(path, header)
    table = {}
    for name, parts in columns.items():
        table |= {name if len(parts) == 1 else f"{name}:{index}": part for index, part in enumerate(parts)}
    points = named_columns(table, list(table))
    if points is None:
        raise PointCloudError(f"its points have no x, y, z, got {', '.join(table)}.")
    return points._replace(may_be_sparse=True)


def _read_pcd_text(path: Path, header: _PcdHeader) -> np.ndarray:
    with open(path, "rb") as stream:
        stream.seek(header.num_bytes)
        lines = io.TextIOWrapper(stream, encoding="latin-1")
        rows = np.loadtxt(lines, ndmin=2, max_rows=header.num_points)
    if len(rows) != header.num_points:
        raise too_few(f"{header.num_points:,} points", f"{len(rows):,} follow")
    if rows.shape[1] != header.num_columns:
        raise PointCloudError(
            f"its header has {header.num_columns} columns, but its rows have {rows.shape[1]}. Export the file again."
        )
    return rows


def _read_pcd_bytes(path: Path, header: _PcdHeader) -> dict[str, list[np.ndarray]]:
    num_points, row_bytes = header.num_points, header.row_bytes
    with open(path, "rb") as stream:
        stream.seek(header.num_bytes)
        if header.encoding == "binary":
            content = stream.read(num_points * row_bytes)
        elif header.encoding in ("binary_compressed", "binaryscompressed"):
            content = _unpack_pcd(stream, header, path.stat().st_size)
        else:
            raise PointCloudError(f"DATA must be ascii, binary or binary_compressed, got {header.encoding[:40]!r}.")
    columns = {}
    for name, dtype, start, _, count in header.fields:
        # Point after point; or, compressed, field after field, each of all points.
        first, step = (
            (start, row_bytes) if header.encoding == "binary" else (start * num_points, dtype.itemsize * count)
        )
        columns[name] = [
            np.ndarray(num_points, dtype, content, first + index * dtype.itemsize, step) for index in range(count)
        ]
    return columns


def _unpack_pcd(stream: io.BufferedIOBase, header: _PcdHeader, file_bytes: int) -> bytes:
    sizes = stream.read(8)
    packed_bytes, unpacked_bytes = struct.unpack("<II", sizes) if len(sizes) == 8 else (0, 0)
    check_unpacked_size(unpacked_bytes, "this .pcd", file_bytes)
    packed = stream.read(min(packed_bytes, file_bytes))
    if len(packed) < packed_bytes:
        raise too_few(f"{packed_bytes:,} compressed bytes", f"{len(packed):,} follow")
    if unpacked_bytes < header.num_points * header.row_bytes:
        raise too_few(f"{header.num_points:,} points", f"{unpacked_bytes:,} bytes follow")
    unpacked = import_reader("lzf", "python-neo-lzf").decompress(packed, unpacked_bytes)
    if unpacked is None or len(unpacked) != unpacked_bytes:
        raise PointCloudError("its points cannot be unpacked. The file is truncated or corrupt; export it again.")
    return unpacked


# ---- LAS, LAZ, E57 --------------------------------------------------------------------------------------------------


class _LasHeader(NamedTuple):
    is_packed: bool
    num_points: int
    record_bytes: int
    offset: int
    laszip: bytes | None


_VLR_BYTES = 54
_ANY_CHUNK_SIZE = 0xFFFFFFFF  # of a LAZ whose chunk table states the points of each chunk


def _read_las_header(path: Path) -> _LasHeader:
    """What must be checked before laspy and lazrs read a scan: they loop over, and allocate, whatever a header says.

    Raises:
        PointCloudError: it is no LAS, or promises more than the file holds.
    """
    file_bytes = path.stat().st_size
    with open(path, "rb") as stream:
        header = stream.read(375)
        if header[:4] != b"LASF" or len(header) < 227:
            raise PointCloudError("this is no LAS: it must begin with 'LASF' and a header of at least 227 bytes.")
        header_bytes, offset, num_vlrs, kind, record_bytes, num_points = struct.unpack_from("<HIIBHI", header, 94)
        if header[25] >= 4 and len(header) >= 255:
            num_points = struct.unpack_from("<Q", header, 247)[0]
        if not 227 <= header_bytes <= offset <= file_bytes:
            raise too_few(f"its points begin at byte {offset:,}", f"the file has {file_bytes:,} bytes")
        if num_vlrs * _VLR_BYTES > offset - header_bytes:
            raise too_few(f"{num_vlrs:,} records precede the points", f"{offset - header_bytes:,} bytes are there")
        laszip = None
        stream.seek(header_bytes)
        for _ in range(num_vlrs):
            record = stream.read(_VLR_BYTES)
            owner, record_id, length = struct.unpack_from("<16sHH", record, 2)
            content = stream.read(length)
            if stream.tell() > offset:
                raise PointCloudError("its records overlap its points. The file is corrupt; export it again.")
            if owner.startswith(b"laszip encoded") and record_id == 22204:
                laszip = content
    is_packed, size = bool(kind & 0x80), num_points * record_bytes
    if is_packed:
        check_unpacked_size(size, "this scan", file_bytes)
    elif size > file_bytes - offset:
        raise too_few(f"{num_points:,} points", f"the file has {file_bytes:,} bytes")
    return _LasHeader(is_packed, num_points, record_bytes, offset, laszip)


def _check_chunks(path: Path, header: _LasHeader):
    """Compare the chunk table of a LAZ with its points: lazrs allocates what it says, and aborts where it cannot.

    Raises:
        PointCloudError: they disagree.
    """
    broken = PointCloudError(
        "its chunk table does not fit its points. The file is truncated or corrupt; export it again."
    )
    file_bytes, laszip = path.stat().st_size, header.laszip
    if laszip is None or len(laszip) < 34:
        raise PointCloudError("it has no record of how it is compressed. The file is corrupt; export it again.")
    chunk_size, num_items = struct.unpack_from("<I", laszip, 12)[0], struct.unpack_from("<H", laszip, 32)[0]
    items = [
        struct.unpack_from("<HHH", laszip, 34 + 6 * index) for index in range(min(num_items, (len(laszip) - 34) // 6))
    ]
    if len(items) != num_items or sum(size for _, size, _ in items) != header.record_bytes or not chunk_size:
        raise broken
    with open(path, "rb") as stream:
        stream.seek(header.offset)
        start = int.from_bytes(stream.read(8), "little", signed=True)
        if start == -1:  # written by a stream: the offset is at the end
            stream.seek(-8, 2)
            start = int.from_bytes(stream.read(8), "little", signed=True)
        num_bytes = start - header.offset - 8
        if num_bytes < 0 or start + 8 > file_bytes:
            raise broken
        stream.seek(start)
        num_chunks = struct.unpack("<II", stream.read(8))[1]
        if chunk_size == _ANY_CHUNK_SIZE:
            most = num_bytes // header.record_bytes  # a chunk begins with a point that is not compressed
        else:
            most = -(-header.num_points // chunk_size)
        if num_chunks > most + 1:
            raise broken
        stream.seek(header.offset)
        lazrs = import_reader("lazrs")
        chunks = lazrs.read_chunk_table(stream, lazrs.LazVlr(laszip))
    if sum(size for _, size in chunks) > num_bytes or sum(count for count, _ in chunks) < header.num_points:
        raise broken


def _read_las(path: Path) -> Points:
    laspy = import_reader("laspy", "laspy[lazrs]")
    logging.getLogger("laspy").addHandler(logging.NullHandler())  # what it logs is in its exception, too
    header = _read_las_header(path)
    if not header.num_points:
        return Points(np.zeros((0, 3)), None)
    if header.is_packed:
        _check_chunks(path, header)
    with laspy.open(path, read_evlrs=False) as reader:
        scan = reader.read_points(-1)
    if len(scan) != header.num_points:
        raise too_few(f"{header.num_points:,} points", f"{len(scan):,} follow")
    coord = np.stack([scan.x, scan.y, scan.z], axis=1)  # float64, with offset and scale applied
    if "red" not in scan.point_format.dimension_names:
        return Points(coord, None)
    color = np.stack([scan.red, scan.green, scan.blue], axis=1)
    return Points(coord, color if color.any() else None)  # all zero: the format has colors, but none were recorded


def _read_e57(path: Path) -> Points:
    """All scans of a file, each at its pose."""
    with open(path, "rb") as stream:
        header = stream.read(48)
    if header[:8] != b"ASTM-E57" or len(header) < 48:
        raise PointCloudError("this is no E57: it must begin with 'ASTM-E57'.")
    length, xml_start, xml_bytes = struct.unpack_from("<QQQ", header, 16)
    if max(length, xml_start + xml_bytes) > path.stat().st_size:
        raise too_few(f"{length:,} bytes", f"the file has {path.stat().st_size:,}")
    pye57 = import_reader("pye57")
    with contextlib.closing(pye57.E57(str(path))) as file:
        counts = [file.get_header(index).point_count for index in range(file.scan_count)]
        check_unpacked_size(sum(counts) * 8 * 6, "this scan", path.stat().st_size)
        scans = [
            file.read_scan(index, colors=True, ignore_missing_fields=True)
            for index, count in enumerate(counts)
            if count
        ]
    if not scans:
        return Points(np.zeros((0, 3)), None)
    points = [named_columns(scan, list(scan)) for scan in scans]
    if None in points:
        raise PointCloudError(f"its points have no x, y, z, got {', '.join(scans[points.index(None)])}.")
    has_color = all(cloud.color is not None for cloud in points)
    color = np.concatenate([cloud.color for cloud in points]) if has_color else None
    return Points(np.concatenate([cloud.coord for cloud in points]), color, may_be_sparse=True)


# PLY is missing: it may hold a mesh (`read_ply`). Tables are in tables_minigpt3d.py.
POINT_READERS: dict[str, Callable[[Path], Points]] = {
    ".pcd": _read_pcd,
    ".las": _read_las,
    ".laz": _read_las,
    ".e57": _read_e57,
}
