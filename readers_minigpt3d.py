"""What all readers share: errors, warnings, limits, columns by name; and the points of a .ply.

A reader takes a path and returns `Points`, as stored, or a list of `Surface`s (meshes_minigpt3d.py). To add a format,
write its reader and list it in the table at the end of its file. What a header promises is compared with the size of its
file before memory is allocated for it.

PLY is read by plyfile, text without lists by numpy, which takes a tenth of the time.

Shapes: N points.
"""

import contextlib
import contextvars
import importlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


# ---- Limits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadingLimits:
    """What a source may take; one that exceeds a limit is refused, as early as the format tells.

    ```python
    load_point_cloud("city.glb", limits=ReadingLimits(max_faces=50_000_000))
    ```

    Attributes:
        max_unpacked_bytes: content of an archive, scan or open file. A scan of 10 million points in double precision
            takes 480 MB.
        max_unpack_ratio: unpacked size relative to the file, above `ratio_floor_bytes`. Coordinates and meshes shrink to
            a tenth at best.
        ratio_floor_bytes: what may be unpacked from a file of any size.
        max_bad_share: share of NaN or infinite points in arrays and of such faces; fewer are dropped.
        max_header_bytes: of a PLY or PCD. Exporters write settings and licenses into comments.
        max_header_lines: of a text before its first row of numbers.
        max_line_characters: of a line of a table.
        max_download_bytes: of a download.
        max_download_seconds: for a complete download.
        url_timeout_seconds: for each answer of a server.
        max_redirects: of a URL.
        max_faces: of a scene, each mesh counted at every place; 72 bytes each.
        max_nodes: of a scene (glTF, USD, assimp).
        max_texture_pixels: of all textures of a file: eight of 4096 × 4096; decoding them takes 1.1 GB.
        max_texture_bytes: of an image file.
        max_lost_textures: missing textures; no more are looked for.
        max_material_files: MTL files of an OBJ.
        max_material_bytes: of an MTL file.
        max_json_bytes: JSON of a glTF.
        max_json_values: in the JSON of a glTF.
        max_decoded_bytes: of all compressed, sparse and empty values of a glTF.
        max_primitives: parts of a glTF.
        max_instances: places of the meshes of a glTF.
        max_depth: objects within objects of a 3MF.
        max_objects: that a 3MF places.
    """

    max_unpacked_bytes: int = 4 * 1024**3
    max_unpack_ratio: int = 200
    ratio_floor_bytes: int = 100 * 1000**2
    max_bad_share: float = 0.5
    max_header_bytes: int = 16 * 1024**2
    max_header_lines: int = 1000
    max_line_characters: int = 1_000_000
    max_download_bytes: int = 1024**3
    max_download_seconds: float = 600
    url_timeout_seconds: float = 20
    max_redirects: int = 5
    max_faces: int = 16_000_000
    max_nodes: int = 200_000
    max_texture_pixels: int = 2**27
    max_texture_bytes: int = 1024**3
    max_lost_textures: int = 64
    max_material_files: int = 64
    max_material_bytes: int = 64 * 1024**2
    max_json_bytes: int = 200 * 1000**2
    max_json_values: int = 10_000_000
    max_decoded_bytes: int = 512 * 1024**2
    max_primitives: int = 50_000
    max_instances: int = 1_000_000
    max_depth: int = 32
    max_objects: int = 100_000

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}.")


_DEFAULT_LIMITS = ReadingLimits()
_LIMITS = contextvars.ContextVar("limits of the source that is being read", default=_DEFAULT_LIMITS)


def limits() -> ReadingLimits:
    """The limits of the source that is being read."""
    return _LIMITS.get()


@contextlib.contextmanager
def limited(by: ReadingLimits) -> Iterator[None]:
    """Within this context `limits` returns these."""
    token = _LIMITS.set(by)
    try:
        yield
    finally:
        _LIMITS.reset(token)


class PointCloudError(ValueError):
    """A source that is no usable point cloud; the message says what is wrong with it and what to do."""


class NotACloudError(PointCloudError):
    """A text of another kind, such as notes beside the clouds."""


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


class Node(NamedTuple):
    """A named node of a scene.

    Args:
        number: tells nodes of one name apart.
        name: as stored.
    """

    number: int
    name: str


_APART = contextvars.ContextVar("whether the nodes of a scene are kept apart", default=False)


def keeps_nodes() -> bool:
    """Whether surfaces must know their nodes; otherwise readers may join what looks alike."""
    return _APART.get()


@contextlib.contextmanager
def nodes_kept() -> Iterator[None]:
    """Within this context surfaces know their nodes."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


WINDOWS_NAN = re.compile(r"[-+]?1\.#\w+|[-+]?nan\(\w*\)", re.I)  # NaN or infinity, as its programs print them

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


_NAME = contextvars.ContextVar("name of the source")


@contextlib.contextmanager
def called(name: str) -> Iterator[None]:
    """Within this context `warn` calls the source so; its file may be a temporary copy with another name."""
    token = _NAME.set(name)
    try:
        yield
    finally:
        _NAME.reset(token)


_PACKED_IN = contextvars.ContextVar("folder of the .gz that is being read", default=None)


@contextlib.contextmanager
def packed_in(folder: Path) -> Iterator[None]:
    """Within this context `folders_beside` also returns this folder."""
    token = _PACKED_IN.set(folder)
    try:
        yield
    finally:
        _PACKED_IN.reset(token)


def folders_beside(path: Path) -> list[Path]:
    """Where the files that `path` names are: in its folder or, if it was unpacked, beside the .gz."""
    packed = _PACKED_IN.get()
    return [path.parent] if packed is None else [path.parent, packed]


def warn(text: str):
    """Warn about the source that is being read."""
    warnings.warn(printable(f"{_NAME.get('the source')}: {text}"), UserWarning, stacklevel=3)


def unpacked_limit(packed_bytes: int | None) -> int:
    """How many bytes may come out of a file of so many; None if that is unknown."""
    if packed_bytes is None:
        return limits().max_unpacked_bytes
    return min(limits().max_unpacked_bytes, max(limits().ratio_floor_bytes, limits().max_unpack_ratio * packed_bytes))


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


def report_dropped(good: np.ndarray, what: str, may_be_sparse: bool = False):
    """Warn that the points or faces that are not `good` (bool) are dropped.

    Raises:
        PointCloudError: they are all, or more than `max_bad_share` unless there may be any number of them.
    """
    max_share = 1 if may_be_sparse else limits().max_bad_share
    num_bad, total = int((~good).sum()), len(good)
    if num_bad > max_share * total or num_bad == total:
        raise PointCloudError(
            f"{num_bad:,} of {total:,} {what} are NaN or infinite. Too many to drop; export the object again."
        )
    warn(f"{num_bad:,} of {total:,} {what} are NaN or infinite and were dropped.")


def too_few(expected: str, actual: str) -> PointCloudError:
    """The error of a file that holds less than its header says."""
    return PointCloudError(
        f"its header says {expected}, but {actual}. The file is truncated or corrupt; export it again."
    )


def bad_table(lines: Iterator[str], count: int, what: str, width: int) -> PointCloudError:
    """The error of a table in text that numpy.loadtxt does not read: its first row that is not `width` numbers."""
    rows = (line.strip() for line in lines if line.strip())
    number = 0
    for number, row in enumerate(rows, start=1):
        cells = row.split()
        try:
            is_complete = len([float(cell) for cell in cells]) == width
        except ValueError:
            is_complete = False
        if not is_complete and next(rows, None) is not None:
            return PointCloudError(
                f"row {number:,} of its {count:,} {what} must be {width} numbers, got '{printable(row[:60])}'. The file is "
                "corrupt; export it again."
            )
        number -= not is_complete
    return too_few(f"{count:,} {what}", f"{number:,} follow")


# ---- Columns by name ------------------------------------------------------------------------------------------------

# "Points:0", "pos_x", "X (m)" and "x" are all the first coordinate; "diffuse_red", "RGB:0", "Rf" the first of rgb.
_COORD_NAME = re.compile(
    r"(?P<set>points?|pointsmxyz|position|pos|p|coords?|coordinates?|loc|location|vertex|vertices|xyz|cartesian|center)?"
    r"(?P<axis>[xyz012])(?:m|mm|cm|coord|coordinate|koordinate|pos|position)?"
)
_COLOR_NAME = re.compile(
    r"(?P<set>rgba?|bgra?|colou?rs?|col|diffuse|scalar|scalarfield|vertexcolou?r|pointcolou?r)?"
    r"(?P<axis>red|green|blue|[rgb012])(?:f|channel|value|colou?r|8|16)?"
)
_MAP_NAMES = {"easting": 0, "east": 0, "northing": 1, "north": 1, "elevation": 2, "altitude": 2, "height": 2}
_MAP_NAMES |= {"e": 0, "n": 1, "h": 2, "rechtswert": 0, "hochwert": 1, "höhe": 2, "hoehe": 2}
_GERMAN_COLORS = {"rot": "red", "grün": "green", "gruen": "green", "blau": "blue"}
_PACKED_NAMES = ("rgb", "rgba", "packedrgb", "packedrgba", "packedcolor")
# Gaussian splats: color = 0.5 + f_dc times the first spherical harmonic.
_SPLAT_NAMES = ("fdc0", "fdc1", "fdc2")
_SPLAT_FACTOR = 0.28209479177387814


def _plain_name(name: str) -> str:
    """A column's name without case, quotes, unit and separators: "Points:0" → "points0", "X (m)" → "x", "Rot" → "red"."""
    name = re.sub(r"\[(\d)\]", r"\1", name.lower())
    name = re.sub(r"[\s\"'/#%_.:\-]+", "", re.sub(r"[\[(].*?[\])]", "", name))
    return _GERMAN_COLORS.get(name, name)


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
    return Points(coord, named_colors(table, names))


def named_colors(table: Mapping[str, np.ndarray] | np.ndarray, names: list[str]) -> np.ndarray | None:
    """red, green, blue (N, 3) of a table with named columns, or None."""
    columns = color_names(names)
    if columns is None:
        return None
    if len(columns) == 1:
        return unpack_rgb(np.asarray(table[columns[0]]))
    color = np.stack([np.asarray(table[name]) for name in columns], axis=1)
    if _plain_name(columns[0]) in _SPLAT_NAMES:
        color = np.clip(0.5 + _SPLAT_FACTOR * color, 0, 1)
    return color


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
        PointCloudError: nothing matches within `max_header_bytes`.
    """
    num_bytes, most = path.stat().st_size, limits().max_header_bytes
    length = min(1 << 14, most)
    with open(path, "rb") as stream:
        header = stream.read(length)
        while not (match := end.search(header)) and len(header) < min(num_bytes, most):
            length = min(4 * length, most - len(header))
            header += stream.read(length)
    if not match:
        raise PointCloudError(
            f"its header does not end within {min(num_bytes, most):,} bytes. The file is truncated, corrupt, or "
            "of another format than its name says."
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

    def rows() -> Iterator[str]:
        with open(path, encoding="latin-1") as lines:
            for line in lines:
                if line.strip() == "end_header":
                    break
            yield from lines

    try:
        vertices = np.loadtxt(rows(), dtype=dtype, comments=None, max_rows=count, ndmin=1)
    except ValueError:  # some programs print whole numbers as "255.0" or "-1.#IND"
        dtype = [(name, "f8") for name, _ in dtype]
        numbers = (WINDOWS_NAN.sub("nan", row) for row in rows())
        try:
            vertices = np.loadtxt(numbers, dtype=dtype, comments=None, max_rows=count, ndmin=1)
        except ValueError as error:
            raise bad_table(rows(), count, "vertices", len(dtype)) from error
    if len(vertices) != count:
        raise too_few(f"{count:,} vertices", f"{len(vertices):,} follow")
    return vertices
