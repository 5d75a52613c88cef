"""Points from tables: text with a row for each point, NumPy arrays, structured arrays and data frames.

Columns are found by name where there are names, in any order, and else by their number and values (`split_columns`).
Text is parsed by numpy.loadtxt. Only rows that it cannot parse (quotes, decimal commas, empty cells) pass through Python
first, at half the speed.

Shapes: N points, C columns.
"""

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .readers_minigpt3d import (
    MAX_HEADER_LINES,
    MAX_LINE_CHARACTERS,
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
_MISSING_WORDS = {"", "na", "n/a", "null", "none", "-", "--", "?"}
_COMMENT_MARKS = ("#", "//", "%", "!")
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
        raise PointCloudError(
            f"a cloud has shape {_SHAPES}, got {array.shape}. Pass one cloud at a time, with these columns only."
        )
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
    # Red, green and blue of an object vary together, more than a color and an intensity or label.
    centered = extra - extra.mean(axis=0)
    norms = np.linalg.norm(centered, axis=0)
    relation = np.abs(centered.T @ centered / np.maximum(np.outer(norms, norms), 1e-300))  # (4, 4)
    return bool(relation[3, 1:3].max() > relation[0, 1:3].max() + 1e-9)


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


# ---- Text -----------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How a text file is written.

    Args:
        encoding: of its characters.
        num_skipped: lines before the first row of numbers.
        delimiter: between cells; None for blanks.
        decimal_comma: whether "0,5" is a half.
        is_plain: whether numpy.loadtxt reads its rows as they are.
        names: of the columns, or None.
        is_ragged: whether rows may have more cells than there are names, as a list at their end.
        cells: of the first row.
    """

    encoding: str
    num_skipped: int
    delimiter: str | None
    decimal_comma: bool
    is_plain: bool
    names: list[str] | None
    is_ragged: bool
    cells: list[str]


def _read_text(path: Path) -> Points:
    """Rows of numbers, with or without a header; see docs/reading.md for what is understood."""
    layout = _find_layout(path)
    names, chosen = layout.names, None
    if names is not None:
        columns = (coord_names(names) or []) + (color_names(names) or [])
        chosen = [names.index(name) for name in columns]
    else:
        numbers = _number_columns(layout.cells)
        chosen = [i for i in range(1, max(numbers)) if i in numbers or _is_missing(layout.cells[i])] + [max(numbers)]
        chosen = [0, *chosen] if 0 in numbers else chosen
    table = _load_rows(path, layout, chosen)
    if names is not None:
        return named_columns(dict(zip(columns, table.T, strict=True)), columns)._replace(may_be_sparse=True)
    table = _drop_index(table)
    if table.shape[1] not in (3, 4, 6, 7, 9):
        raise PointCloudError(
            f"expected 3 columns (x y z), 4 (x y z intensity), 6 (x y z r g b), 7 or 9, got {table.shape[1]}. "
            "Name them in a first line, such as 'x,y,z,intensity,red,green,blue'."
        )
    return split_columns(table, in_text=True)._replace(may_be_sparse=True)


def _find_layout(path: Path) -> _Layout:
    """Read up to the first row of numbers.

    Raises:
        PointCloudError: there is none, so the file is text of another kind.
    """
    encoding = _find_encoding(path)
    before: list[str] = []
    with open(path, encoding=encoding, errors="replace") as stream:
        lines = _short_lines(stream)
        for line in lines:
            if len(before) > MAX_HEADER_LINES:
                break
            cells, delimiter, decimal_comma, is_plain = _split_row(line)
            numbers = _number_columns(cells)
            if len(numbers) >= 3 and not _is_comment(line):
                if any(text.lower().startswith("ncols") for text in before):
                    raise PointCloudError(
                        "it is a raster of heights (ESRI ASCII grid), not a cloud. Convert it to x, y, z first."
                    )
                names, is_ragged = _find_names(before, cells)
                if names is None and not _is_table(cells, numbers):
                    before.append(line)
                    continue
                num_skipped = len(before) + _is_numbering(cells, next(lines, ""))
                return _Layout(encoding, num_skipped, delimiter, decimal_comma, is_plain, names, is_ragged, cells)
            before.append(line)
    raise PointCloudError(
        "it is text, not a cloud: there are no rows of numbers in it; expected 'x y z' or 'x y z r g b' on each line."
    )


def _find_encoding(path: Path) -> str:
    with open(path, "rb") as stream:
        start = stream.read(4096)
    for mark, encoding in ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if start.startswith(mark):
            return encoding
    if start[1::2].count(0) * 2 > len(start[1::2]) and not start[::2].count(0):
        return "utf-16-le"
    if start[::2].count(0) * 2 > len(start[::2]) and not start[1::2].count(0):
        return "utf-16-be"
    if b"\0" in start or sum(byte < 32 and byte not in b"\t\n\r\f\v\x1a" for byte in start) * 20 > len(start):
        raise PointCloudError(
            "it holds binary data, not text. The file is truncated or corrupt, or its name does not match its format."
        )
    return "utf-8-sig"


def _short_lines(stream: io.TextIOBase) -> Iterator[str]:
    while line := stream.readline(MAX_LINE_CHARACTERS):
        if len(line) == MAX_LINE_CHARACTERS:
            raise PointCloudError(f"it has a line of more than {MAX_LINE_CHARACTERS:,} characters, so it is no table.")
        yield line


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith(_COMMENT_MARKS)


_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?")
_QUOTED_COMMA = re.compile(r'"([-+]?\d*),(\d+(?:[eE][-+]?\d+)?)"')


_COMMENT = re.compile(r"(?:^|\s)#")
_NOT_A_NUMBER = re.compile(r"[-+]?1\.#\w+")  # as Windows prints it


def _bare(line: str) -> str:
    """A row without quotes, brackets around it, and comment."""
    if '"' in line:
        line = _QUOTED_COMMA.sub(r"\1.\2", line).replace('"', "")
    if "#" in line:
        line = _COMMENT.split(line)[0]
    line = line.strip("\r\n ")
    return line.strip("[](){},; ") if line[:1] in ("[", "(", "{") else line


def _split_row(line: str) -> tuple[list[str], str | None, bool, bool]:
    """Cells, delimiter, whether the comma is decimal, and whether numpy.loadtxt can read the row as it is."""
    plain = _bare(line)
    is_plain = plain == line.partition("#")[0].strip("\r\n ")
    delimiter = ";" if ";" in plain else "\t" if "\t" in plain.strip() else None
    cells = [cell.strip() for cell in plain.split(delimiter)]
    decimal_comma = False
    if "," in plain:
        with_comma = [cell for cell in cells if "," in cell]
        decimal_comma = len(cells) >= 3 and all(_DECIMAL_COMMA.fullmatch(cell) for cell in with_comma)
        if not decimal_comma and delimiter != ";":
            delimiter = ","
        cells = [cell.strip() for cell in plain.split(delimiter)]
    if decimal_comma:
        cells = [cell.replace(",", ".") for cell in cells]
    parts = [re.split(r"[\s,]+", cell) for cell in cells if cell]
    if delimiter is not None and any(len(part) > 1 and _are_numbers(part) for part in parts):  # "x y z, r g b"
        return re.split(r"[\s,;]+", plain.strip(" ,;\t")), " ", False, False
    return cells, delimiter, decimal_comma, is_plain and not decimal_comma


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _are_numbers(cells: list[str]) -> bool:
    return all(map(_is_number, cells))


def _is_missing(cell: str) -> bool:
    return cell.lower() in _MISSING_WORDS or _NOT_A_NUMBER.fullmatch(cell) is not None


def _number_columns(cells: list[str]) -> list[int]:
    return [index for index, cell in enumerate(cells) if _is_number(cell)]


def _find_names(lines: list[str], cells: list[str]) -> tuple[list[str] | None, bool]:
    """Names of the columns out of the lines before the first row; the last line that names x, y, z and fits counts."""
    for line in reversed(lines):
        line = line.strip().lstrip("#/%! \t")
        line, _, rest = line.partition("[]")  # COLMAP: "…, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"
        is_ragged = bool(rest)
        delimiter = next((mark for mark in ",;\t" if mark in line), None)
        names = [name.strip("\"' \t") for name in line.split(delimiter)]
        if coord_names(names) is None:
            continue
        surplus = len(cells) - len(names)
        if is_ragged and surplus >= -1 or surplus > 0 and not any(cells[len(names) :]):
            names += [""] * max(surplus, 0)
        elif surplus == 1 and _is_index(cells[0]):  # R and pandas: row names have no name
            names = ["", *names]
        elif surplus < 0 and not any(names[len(cells) :]):
            names = names[: len(cells)]
        elif surplus:
            continue
        return names, is_ragged
    return None, False


def _is_index(cell: str) -> bool:
    return cell.isdecimal() or not _is_number(cell)


def _is_table(cells: list[str], numbers: list[int]) -> bool:
    """Whether a row without names for its columns can be read by their number: words only first or last, at most one."""
    others = [index for index in range(len(cells)) if index not in numbers and not _is_missing(cells[index])]
    return others in ([], [0], [len(cells) - 1])


def _is_numbering(cells: list[str], following: str) -> bool:
    """Whether the first row numbers its columns, as data frames without names are saved: "0,1,2" or ",0,1,2"."""
    numbers = cells[1:] if cells[0] == "" else cells
    has_fractions = any("." in cell or "e" in cell.lower() for cell in _split_row(following)[0])
    return numbers == [str(index) for index in range(len(numbers))] and has_fractions


def _drop_index(table: np.ndarray) -> np.ndarray:
    """Without a first column that counts the rows."""
    num_rows, width = table.shape
    is_counter = (
        width in (4, 5, 7, 8, 10) and num_rows > 3 and (np.diff(table[:, 0]) == 1).all() and table[0, 0] in (0, 1)
    )
    return table[:, 1:] if is_counter else table


# ---- Rows -----------------------------------------------------------------------------------------------------------


def _load_rows(path: Path, layout: _Layout, chosen: list[int]) -> np.ndarray:
    """The chosen columns (N, C) as float64, NaN where a cell is empty."""
    if layout.is_plain and not layout.is_ragged:
        try:
            return _load_plain(path, layout, chosen)
        except ValueError:
            pass  # an empty cell, perhaps
    with open(path, encoding=layout.encoding, errors="replace") as lines:
        rows = _clean_rows(lines, layout, chosen, path.suffix.lower() == ".pts")
        return np.loadtxt(rows, comments=None, ndmin=2, dtype=np.float64)


def _load_plain(path: Path, layout: _Layout, chosen: list[int]) -> np.ndarray:
    num_columns = len(layout.cells)
    options = {"delimiter": layout.delimiter, "comments": "#", "skiprows": layout.num_skipped}
    with open(path, encoding=layout.encoding, errors="replace") as lines:
        if _are_numbers(layout.cells):
            table = np.loadtxt(lines, ndmin=2, dtype=np.float64, **options)
            return table if chosen == list(range(num_columns)) else table[:, chosen]
        # A structured type requires as many cells of each row; of other columns one character is kept.
        dtype = [(str(index), "f8" if index in chosen else "U1") for index in range(num_columns)]
        table = np.loadtxt(lines, ndmin=1, dtype=dtype, **options)
        return np.stack([table[str(index)] for index in chosen], axis=1)


def _clean_rows(lines: io.TextIOBase, layout: _Layout, chosen: list[int], has_counts: bool) -> Iterator[str]:
    """Rows as numpy.loadtxt reads them: numbers with decimal points between blanks."""
    width = len(layout.cells)
    for number, line in enumerate(_short_lines(lines), start=1):
        if number <= layout.num_skipped or not line.strip() or _is_comment(line):
            continue
        line = _bare(line)
        if layout.delimiter == " ":
            cells = re.split(r"[\s,;]+", line.strip(" ,;\t"))
        else:
            cells = [cell.strip() for cell in line.split(layout.delimiter)]
        if has_counts and len(cells) == 1 and cells[0].isdecimal():  # of the points of the next scan
            continue
        fits = len(cells) > max(chosen) if layout.is_ragged else len(cells) >= width and not any(cells[width:])
        if not fits:
            raise _bad_row(number, line, width)
        try:
            yield " ".join([_clean_cell(cells[index], layout.decimal_comma) for index in chosen])
        except ValueError:
            raise _bad_row(number, line, width) from None


def _clean_cell(cell: str, decimal_comma: bool) -> str:
    if _is_missing(cell):
        return "nan"
    if decimal_comma:
        cell = cell.replace(",", ".")
    float(cell)
    return cell


def _bad_row(number: int, line: str, width: int) -> PointCloudError:
    return PointCloudError(
        f"line {number} must be {width} numbers, got '{printable(line.strip()[:60])}'. The file is truncated or corrupt, "
        "or it is text and not a cloud."
    )


TABLE_READERS: dict[str, Callable[[Path], Points]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    **dict.fromkeys((".xyz", ".xyzn", ".xyzrgb", ".txt", ".csv", ".tsv", ".pts", ".asc", ".dat"), _read_text),
}
