"""Scans: the points of .pcd, .las, .laz and .e57.

LAS is read by laspy, LAZ by lazrs, E57 by pye57. PCD is read here: pypcd4 1.5.1 needs COUNT and FIELDS, splits text at
single blanks, and expands a COUNT of any size.

Shapes: N points.
"""

import contextlib
import io
import logging
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .readers_minigpt3d import (
    WINDOWS_NAN,
    PointCloudError,
    Points,
    bad_table,
    check_unpacked_size,
    import_reader,
    named_columns,
    read_header,
    too_few,
)


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
    if max(counts) > file_bytes:
        raise PointCloudError(
            f"its header says {max(counts):,} values of one field in each point, more than the file has bytes. It is corrupt; "
            "export it again."
        )
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
    def lines() -> Iterator[str]:
        with open(path, "rb") as stream, io.TextIOWrapper(stream, encoding="latin-1") as text:
            stream.seek(header.num_bytes)
            for line in text:
                yield WINDOWS_NAN.sub("nan", line) if "#" in line or "(" in line else line

    try:
        rows = np.loadtxt(lines(), comments=None, ndmin=2, max_rows=header.num_points)
    except ValueError as error:
        raise bad_table(lines(), header.num_points, "points", header.num_columns) from error
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


SCAN_READERS: dict[str, Callable[[Path], Points]] = {
    ".pcd": _read_pcd,
    ".las": _read_las,
    ".laz": _read_las,
    ".e57": _read_e57,
}
