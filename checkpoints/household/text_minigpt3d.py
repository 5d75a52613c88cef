"""Points from text with a row for each point: .txt, .csv, .xyz, .pts and so on.

Text is parsed by numpy.loadtxt. Only rows that it cannot parse (quotes, decimal commas, empty cells) pass through Python
first, at half the speed.

Shapes: N points, C columns.
"""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .readers_minigpt3d import (
    WINDOWS_NAN,
    NotACloudError,
    PointCloudError,
    Points,
    color_names,
    coord_names,
    limits,
    named_columns,
    printable,
    unpack_rgb,
)
from .tables_minigpt3d import split_columns


_MISSING_WORDS = {"", "na", "n/a", "#n/a", "null", "none", "-", "--", "?"}
# Of a .pts, which only scanners write: three points are at most a triangle.
_MIN_SCAN_POINTS = 4
# Rows in the order of larger numbers are in the order of their time: coordinates of maps in meters stay below.
_LEAST_TIME = 1e7
_COMMENT_MARKS = ("#", "//", "%", "!")


# ---- Layout ---------------------------------------------------------------------------------------------------------


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
    names, cells, is_scan = layout.names, layout.cells, path.suffix.lower() == ".pts"
    hexadecimal = [index for index, cell in enumerate(cells) if _HEX_COLOR.fullmatch(cell)][:1]
    if names is not None:
        columns = (coord_names(names) or []) + ([] if hexadecimal else color_names(names) or [])
        chosen = [names.index(name) for name in columns]
    else:
        filled = [index for index, cell in enumerate(cells) if _is_value(cell) and any(map(str.isalnum, cell))]
        chosen = [index for index in range(filled[0], filled[-1] + 1) if _is_value(cells[index])]
    table = _load_rows(path, layout, chosen + hexadecimal)
    if is_scan and len(table) < _MIN_SCAN_POINTS:
        raise PointCloudError(
            f"its scan has {len(table)} points, expected {_MIN_SCAN_POINTS} or more: fewer show no object."
        )
    packed = unpack_rgb(table[:, -1]) if hexadecimal else None
    table = table[:, : len(chosen)]
    if names is not None:
        points = named_columns(dict(zip(columns, table.T, strict=True)), columns)
    elif is_scan and table.shape[1] == 7:
        points = Points(table[:, :3], table[:, 4:])  # by definition x y z intensity r g b
    else:
        table = _drop_index(table)
        if table.shape[1] not in (3, 4, 6, 7, 9):
            raise PointCloudError(
                f"expected 3 columns (x y z), 4 (x y z intensity), 6 (x y z r g b), 7 or 9, got {table.shape[1]}. "
                "Name them in a first line, such as 'x,y,z,intensity,red,green,blue'."
            )
        points = split_columns(table, in_text=True)
    color = points.color if packed is None else packed
    return points._replace(color=color, may_be_sparse=True)


def _find_layout(path: Path) -> _Layout:
    """Read up to the first row of numbers.

    Raises:
        PointCloudError: there is none, so the file is text of another kind.
    """
    encoding = _find_encoding(path)
    headers: list[tuple[list[str], bool]] = []  # lines that name x, y and z, the last one first
    last, num_before, is_raster = "", 0, False
    with open(path, encoding=encoding, errors="replace") as stream:
        lines = _short_lines(stream)
        for line in lines:
            if num_before > limits().max_header_lines:
                break
            is_raster = is_raster or line.lower().startswith("ncols")
            cells, delimiter, decimal_comma, is_plain = _split_row(line)
            num_numbers = sum(map(_is_number, cells))
            # Where columns have names, the first row may be one of missing values.
            is_empty = bool(headers) and len(cells) >= 3 and any(map(str.isalnum, line)) and all(map(_is_value, cells))
            if (num_numbers >= 3 or is_empty) and not _is_comment(line):
                if is_raster:
                    raise PointCloudError(
                        "it is a raster of heights (ESRI ASCII grid), not a cloud. Convert it to x, y, z first."
                    )
                names, is_ragged = _fit_names(headers, cells)
                if names is not None or num_numbers >= 3 and _is_table(cells):
                    if names is None:
                        _check_header(last, cells)
                    num_skipped = num_before + _is_numbering(cells, next(lines, ""))
                    return _Layout(encoding, num_skipped, delimiter, decimal_comma, is_plain, names, is_ragged, cells)
            names, is_ragged = _split_names(line)
            if coord_names(names) is not None:
                headers.insert(0, (names, is_ragged))
            last, num_before = line if line.strip() else last, num_before + 1
    raise NotACloudError(
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
    longest = limits().max_line_characters
    while line := stream.readline(longest):
        if len(line) == longest:
            raise NotACloudError(f"it has a line of more than {longest:,} characters, so it is no table.")
        yield line


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith(_COMMENT_MARKS)


_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?")
_QUOTED_COMMA = re.compile(r"""["']([-+]?\d*),(\d+(?:[eE][-+]?\d+)?)["']""")
_HEX_COLOR = re.compile(r"(?:#|0[xX])([0-9a-fA-F]{6})")
_COMMENT = re.compile(r"(?:^|\s)#(?![0-9a-fA-F]{6}\b)")
_FORTRAN_EXPONENT = re.compile(r"(?<=[\d.])[dD](?=[-+]\d)")


def _bare(line: str) -> str:
    """A row without quotes, brackets around it, and comment."""
    if '"' in line or "'" in line:
        line = _QUOTED_COMMA.sub(r"\1.\2", line).replace('"', "").replace("'", "")
    line = _FORTRAN_EXPONENT.sub("e", line)
    if "#" in line:
        line = _COMMENT.split(line)[0]
    line = line.strip("\r\n ")
    return line.strip("[](){},; ") if line[:1] in ("[", "(", "{") else line


def _split_row(line: str) -> tuple[list[str], str | None, bool, bool]:
    """Cells, delimiter, whether the comma is decimal, and whether numpy.loadtxt can read the row as it is."""
    plain = _bare(line)
    is_plain = plain == line.partition("#")[0].strip("\r\n ")
    delimiter = _find_mark(plain.strip(), ";|\t")
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
    return cells, delimiter, decimal_comma, is_plain and not decimal_comma and delimiter != "\t\t"


def _find_mark(line: str, marks: str) -> str | None:
    """What separates cells: the first of the marks that is in the line, two tabs if they never stand alone."""
    mark = next((mark for mark in marks if mark in line), None)
    return "\t\t" if mark == "\t" and "\t" not in line.replace("\t\t", "") else mark


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _are_numbers(cells: list[str]) -> bool:
    return all(map(_is_number, cells))


def _is_missing(cell: str) -> bool:
    return cell.lower() in _MISSING_WORDS or WINDOWS_NAN.fullmatch(cell) is not None


def _is_value(cell: str) -> bool:
    return _is_number(cell) or _is_missing(cell)


def _split_names(line: str) -> tuple[list[str], bool]:
    """The words of a header, and whether a list follows them in each row."""
    line = line.strip().lstrip("#/%! \t")
    line, _, rest = line.partition("[]")  # COLMAP: "…, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"
    return [name.strip("\"' \t") for name in line.split(_find_mark(line, ",;|\t"))], bool(rest)


def _fit_names(headers: list[tuple[list[str], bool]], cells: list[str]) -> tuple[list[str] | None, bool]:
    """Names of the columns: of the last line that names x, y, z and fits the first row."""
    for names, is_ragged in headers:
        surplus = len(cells) - len(names)
        if is_ragged and surplus >= -1 or surplus > 0 and not any(cells[len(names) :]):
            names = names + [""] * max(surplus, 0)
        elif surplus == 1 and _is_index(cells[0]):  # R and pandas: row names have no name
            names = ["", *names]
        elif surplus < 0 and not any(names[len(cells) :]):
            names = names[: len(cells)]
        elif surplus:
            continue
        return names, is_ragged
    return None, False


def _check_header(line: str, cells: list[str]):
    """Refuse a table whose header names all of its columns, but not x, y and z.

    Raises:
        PointCloudError: it names some of them.
        NotACloudError: it names none.
    """
    names, _ = _split_names(line)
    lacking = [axis for axis in "xyz" if axis not in [name.lower() for name in names]]
    is_header = len(names) == len(cells) and all(names[1:]) and not any(map(_is_number, names))
    if not is_header or _is_comment(line) and len(lacking) > 1:  # a comment may have as many words by chance
        return
    kind = NotACloudError if len(lacking) == 3 else PointCloudError
    raise kind(
        f"its columns are {printable(', '.join(names))[:200]}; none is named {' or '.join(lacking)}. If it is a cloud, "
        "name its coordinates x, y and z in this line."
    )


def _is_index(cell: str) -> bool:
    return cell.isdecimal() or not _is_number(cell)


def _is_table(cells: list[str]) -> bool:
    """Whether a row without names for its columns can be read by their number: words only first or last, at most one."""
    words = [index for index, cell in enumerate(cells) if not _is_value(cell) and not _HEX_COLOR.fullmatch(cell)]
    return words in ([], [0], [len(cells) - 1])


def _is_numbering(cells: list[str], following: str) -> bool:
    """Whether the first row numbers its columns, as data frames without names are saved: "0,1,2" or ",0,1,2"."""
    numbers = cells[1:] if cells[0] == "" else cells
    has_fractions = any("." in cell or "e" in cell.lower() for cell in _split_row(following)[0])
    return numbers == [str(index) for index in range(len(numbers))] and has_fractions


def _drop_index(table: np.ndarray) -> np.ndarray:
    """Without a first column that counts the rows.

    Raises:
        PointCloudError: the first column may be a time or another counter, or a coordinate.
    """
    num_rows, width = table.shape
    is_counter = (
        width in (4, 5, 7, 8, 10) and num_rows > 3 and (np.diff(table[:, 0]) == 1).all() and table[0, 0] in (0, 1)
    )
    if is_counter:
        return table[:, 1:]
    first, steps = table[:, 0], np.diff(table[:, 0])
    if width in (4, 7) and num_rows > 3 and (steps >= 0).all():
        are_whole = (table[:, :3] == np.rint(table[:, :3])).all(axis=0)
        is_count = (steps > 0).all() and are_whole.tolist() == [True, False, False]
        if is_count or not steps.any() or first[0] > _LEAST_TIME:
            raise PointCloudError(
                f"its first column, {first[0]:.10g} to {first[-1]:.10g}, looks like a time or a counter and not like x. Name "
                "the columns in a first line, such as 'time,x,y,z,red,green,blue'."
            )
    return table


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
    if match := _HEX_COLOR.fullmatch(cell):
        return str(int(match[1], 16))
    float(cell)
    return cell


def _bad_row(number: int, line: str, width: int) -> PointCloudError:
    if "\0" in line:
        return PointCloudError(
            f"from line {number} on it holds zero bytes instead of text: it was not saved completely. Copy or export it again."
        )
    if not any(map(_is_number, re.split(r"[\s,;|]+", line))) or len(re.findall(r"[^\W\d_]{2,}", line)) > 1:
        return PointCloudError(
            f"line {number} is no row of {width} numbers: '{printable(line.strip()[:60])}'. Remove this line if the rows "
            "around it are points; else it is text and not a cloud."
        )
    return PointCloudError(
        f"line {number} must be {width} numbers, got '{printable(line.strip()[:60])}'. The file is truncated or corrupt, "
        "or it is text and not a cloud."
    )


TEXT_READERS: dict[str, Callable[[Path], Points]] = dict.fromkeys(
    (".xyz", ".xyzn", ".xyzrgb", ".txt", ".csv", ".tsv", ".pts", ".asc", ".dat"), _read_text
)
