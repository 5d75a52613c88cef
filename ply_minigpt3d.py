"""Meshes from .ply: triangles, polygons and strips of triangles, with the colors of vertices, faces or textures.

plyfile 1.1 and trimesh 5.2 read lists of mixed lengths row by row; here rows with lists of the same lengths are read at
once. Text is read as a table of numbers and then as if it were binary.

Shapes: V vertices, F triangles.
"""

import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .meshes_minigpt3d import Material, Surface, check_num_faces
from .readers_minigpt3d import (
    PointCloudError,
    Points,
    folders_beside,
    named_colors,
    read_ply_header,
    read_ply_points,
    warn,
)
from .surfaces_minigpt3d import (
    TextureFiles,
    check_indices,
    decode_text,
    parse_numbers,
    says_color,
    split_groups,
    split_polygons,
    unit_colors,
)


_TYPES = {
    **{
        "char": "i1",
        "uchar": "u1",
        "short": "i2",
        "ushort": "u2",
        "int": "i4",
        "uint": "u4",
        "float": "f4",
        "double": "f8",
    },
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float32": "f4", "float64": "f8", "int64": "i8", "uint64": "u8"},
}
_STRUCT_CODES = {
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "i4": "i",
    "u4": "I",
    "i8": "q",
    "u8": "Q",
    "f4": "f",
    "f8": "d",
}
_UV_NAMES = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"), ("texture_s", "texture_t"), ("tex_u", "tex_v"))


class _Property(NamedTuple):
    name: str
    type: str  # of numpy, as "u1"
    count_type: str | None  # of a list's length


class _Element(NamedTuple):
    name: str
    count: int
    properties: list[_Property]


class _List(NamedTuple):
    """A list per row: how many values each has, and all of them."""

    counts: np.ndarray
    values: np.ndarray


def read_ply(path: Path) -> Points | list[Surface]:
    """A PLY: its surface if it has faces or strips of triangles, else its points."""
    header = read_ply_header(path)
    if header.counts.get("face") or header.counts.get("tristrips"):
        check_num_faces(header.counts.get("face", 0))
        return _read_surface(path)
    return read_ply_points(path, header)


def _read_surface(path: Path) -> list[Surface]:
    """The surface of a PLY with faces or strips of triangles."""
    data = path.read_bytes()
    end = re.search(rb"[\r\n][ \t]*end_header[ \t]*(\r\n|\r|\n|$)", data)
    if not data.startswith(b"ply") or not end:
        raise PointCloudError("this is no PLY: it must begin with 'ply' and a header that ends with 'end_header'.")
    form, elements, texture_names = _parse_header(data[: end.start()])
    tables = _read_tables(path, data, end.end(), form, elements)
    vertices = {name.lower(): column for name, column in tables.get("vertex", {}).items()}
    if not {"x", "y", "z"} <= vertices.keys():
        raise PointCloudError(f"its vertices have no x, y, z, got {', '.join(vertices) or 'none'}.")
    coord = np.stack([vertices[axis].astype(np.float64) for axis in "xyz"], axis=1)  # (V, 3)
    color = _pick_colors(vertices)

    counts, indices, faces = _polygons(tables)
    check_indices(indices, len(coord))
    corners, polygon = split_polygons(counts)
    triangles = indices[corners]  # (F, 3)
    corner_color = None if color is None else color[triangles]
    face_color = _pick_colors(faces) if faces else None
    if face_color is not None and len(face_color) == len(counts) and not says_color(color):
        if says_color(face_color) or color is None:
            corner_color = face_color[polygon][:, None]
    if not texture_names:
        return [Surface(coord[triangles], corner_color)]
    uv = _uv(vertices, faces, triangles, counts, corners, polygon)
    if uv is None:
        return [Surface(coord[triangles], corner_color)]
    return _textured(path, coord[triangles], corner_color, uv, faces.get("texnumber"), polygon, texture_names)


def _textured(
    path: Path,
    corners: np.ndarray,
    color: np.ndarray | None,
    uv: np.ndarray,
    number: np.ndarray | None,
    polygon: np.ndarray,
    names: list[str],
) -> list[Surface]:
    """One surface per texture; where it is missing, in the colors of the vertices or faces."""
    number = np.zeros(len(corners), dtype=np.int64) if number is None else number[polygon].astype(np.int64)
    number = np.clip(number, -1, len(names))
    number[~np.isfinite(uv).all(axis=(1, 2))] = -1
    textures, surfaces = TextureFiles(), []
    for index, here in split_groups(number):
        texture = None
        if 0 <= index < len(names):
            texture = textures.find(names[index], folders_beside(path))
        elif index >= 0:
            textures.lose(f"number {index} and above", "not named in the header")
        if texture is None:
            surfaces.append(Surface(corners[here], None if color is None else color[here]))
        else:
            surfaces.append(Surface(corners[here], None, uv[here], Material(texture=texture)))
    textures.warn_missing()
    return surfaces


# ---- Header and tables ----------------------------------------------------------------------------------------------


def _parse_header(header: bytes) -> tuple[str, list[_Element], list[str]]:
    form, elements, textures = "", [], []
    for line in header.splitlines()[1:]:
        words = decode_text(line).split()
        comment = re.match(
            r"\s*(?:comment|obj_info)\s+(?:TextureFile|texture_file|texture):?\s+(.+)", decode_text(line), re.I
        )
        if comment:
            textures.append(comment[1].strip())
        elif words[:1] == ["format"] and len(words) > 1:
            form = words[1]
        elif words[:1] == ["element"] and len(words) == 3 and words[2].isdigit():
            elements.append(_Element(words[1], int(words[2]), []))
        elif words[:1] == ["property"] and elements and len(words) in (3, 5):
            types = [_TYPES.get(word.lower()) for word in words[1:-1] if word != "list"]
            if None in types or len(types) != len(words) // 2:
                raise PointCloudError(f"its header has an unknown property {' '.join(words)[:80]!r}.")
            elements[-1].properties.append(_Property(words[-1], types[-1], types[0] if len(words) == 5 else None))
    if form not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise PointCloudError(f"its format {form[:40]!r} is not known.")
    return form, elements, textures


def _read_tables(path: Path, data: bytes, start: int, form: str, elements: list[_Element]) -> dict[str, dict]:
    """The columns of vertices, faces and strips, by element and property: an array (rows,) or a `_List`."""
    order = ">" if form == "binary_big_endian" else "<"
    types = {}
    if form == "ascii":
        data, start = parse_numbers(data[start:]).astype("<f8").tobytes(), 0
        types = {(element.name, prop.name): prop.type for element in elements for prop in element.properties}
        elements = [
            _Element(name, count, [_Property(p.name, "f8", p.count_type and "f8") for p in properties])
            for name, count, properties in elements
        ]
    geometry = [index for index, element in enumerate(elements) if element.name in ("vertex", "face", "tristrips")]
    tables: dict[str, dict] = {}
    for index, element in enumerate(elements[: geometry[-1] + 1 if geometry else 0]):
        table, start = _read_rows(data, start, element, order)
        if index in geometry and element.count:
            if types:
                table = {name: _as_declared(column, types[element.name, name]) for name, column in table.items()}
            tables[element.name] = table
    if form == "ascii" and geometry and geometry[-1] == len(elements) - 1 and start != len(data):
        warn(f"{(len(data) - start) // 8:,} numbers after its last row were not read.")
    return tables


def _as_declared(column: np.ndarray | _List, type_name: str) -> np.ndarray | _List:
    """Whole numbers of a text file in their type, since it tells the range of colors."""
    if isinstance(column, _List) or type_name[0] == "f":
        return column
    info = np.iinfo(type_name)
    fits = len(column) and np.isfinite(column).all() and info.min <= column.min() and column.max() <= info.max
    return column.astype(type_name) if fits and (column == np.rint(column)).all() else column


def _read_rows(data: bytes, start: int, element: _Element, order: str) -> tuple[dict, int]:
    """One element's columns, and where the next element begins."""
    name, count, properties = element
    least = sum(np.dtype(prop.count_type or prop.type).itemsize for prop in properties)
    if count * least > len(data) - start:
        raise _too_few(element)
    if not count or not properties:
        return {}, start
    lists = [index for index, prop in enumerate(properties) if prop.count_type]
    try:
        lengths = _row_lengths(data, start, 1, properties, order)[0] if lists else np.zeros((1, 0), np.int64)
    except struct.error:
        raise _too_few(element) from None
    dtype = _row_type(properties, lengths[0], order)
    if count * dtype.itemsize <= len(data) - start:  # all rows like the first one
        rows = np.frombuffer(data, dtype, count=count, offset=start)
        if all((rows[f"n{index}"] == length).all() for index, length in zip(lists, lengths[0], strict=True)):
            return _columns(properties, [(slice(None), rows)], np.repeat(lengths, count, axis=0)), start + rows.nbytes
    if not lists:
        raise _too_few(element)
    try:
        lengths, starts, end = _row_lengths(data, start, count, properties, order)
    except struct.error:
        raise _too_few(element) from None
    groups, buffer = [], np.frombuffer(data, np.uint8)
    kinds, kind = np.unique(lengths, axis=0, return_inverse=True)
    for number, here in split_groups(kind.reshape(-1)):
        dtype = _row_type(properties, kinds[number], order)
        rows = buffer[starts[here][:, None] + np.arange(dtype.itemsize)]
        groups.append((here, rows.view(dtype).reshape(-1)))
    return _columns(properties, groups, lengths), end


def _too_few(element: _Element) -> PointCloudError:
    return PointCloudError(
        f"its header says {element.count:,} rows of {element.name[:40]!r}, but fewer follow. "
        "The file is truncated or corrupt; export it again."
    )


def _row_lengths(
    data: bytes, start: int, count: int, properties: list[_Property], order: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """The lengths of each row's lists (count, lists), where each row begins (count,), and where the last one ends."""
    steps, skip = [], 0  # bytes before a list, its length's reader and size, the size of a value
    for prop in properties:
        size = np.dtype(prop.type).itemsize
        if prop.count_type:
            reader = struct.Struct(order + _STRUCT_CODES[prop.count_type])
            steps.append((skip, reader.unpack_from, reader.size, size))
            skip = 0
        else:
            skip += size
    lengths, starts, position = [], [], start
    for _ in range(count):
        starts.append(position)
        for before, unpack, count_size, size in steps:
            position += before
            (length,) = unpack(data, position)
            if not 0 <= length <= len(data):
                raise struct.error
            lengths.append(int(length))
            position += count_size + int(length) * size
        position += skip
    if position > len(data):
        raise struct.error
    return np.array(lengths).reshape(count, -1), np.array(starts), position


def _row_type(properties: list[_Property], lengths: np.ndarray, order: str) -> np.dtype:
    fields, lengths = [], iter(lengths)
    for index, prop in enumerate(properties):
        if prop.count_type:
            fields.append((f"n{index}", order + prop.count_type))
            fields.append((f"p{index}", order + prop.type, (int(next(lengths)),)))
        else:
            fields.append((f"p{index}", order + prop.type))
    return np.dtype(fields)


def _columns(properties: list[_Property], groups: list[tuple], lengths: np.ndarray) -> dict[str, np.ndarray | _List]:
    """Columns of groups of rows, each the numbers of the rows and the rows themselves, which are alike."""
    columns, column = {}, 0
    for index, prop in enumerate(properties):
        if not prop.count_type:
            values = np.empty(len(lengths), prop.type)
            for here, rows in groups:
                values[here] = rows[f"p{index}"]
            columns[prop.name] = values
            continue
        counts = lengths[:, column]
        column += 1
        starts, values = np.cumsum(counts) - counts, np.empty(counts.sum(), prop.type)
        for here, rows in groups:
            values[starts[here][:, None] + np.arange(rows[f"p{index}"].shape[1])] = rows[f"p{index}"]
        columns[prop.name] = _List(counts, values)
    return columns


# ---- Faces, colors and texture coordinates --------------------------------------------------------------------------


def _polygons(tables: dict[str, dict]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Corners of each polygon, the vertices of all corners, and the columns of the faces ({} for strips)."""
    faces = tables.get("face", {})
    names = [name for name in ("vertex_indices", "vertex_index") if name in faces]
    names += [name for name, column in faces.items() if isinstance(column, _List) and name != "texcoord"]
    if names:
        counts, indices = faces[names[0]]
        return counts, _whole(indices), faces
    strips = tables.get("tristrips", {})
    column = next((column for column in strips.values() if isinstance(column, _List)), None)
    if column is None:
        raise PointCloudError("its faces have no list of vertices. The file is corrupt; export it again.")
    strip = np.repeat(np.arange(len(column.counts)), column.counts)
    indices = _whole(column.values)
    triangles = np.stack([indices[:-2], indices[1:-1], indices[2:]], axis=1)
    triangles = triangles[(triangles >= 0).all(axis=1) & (strip[:-2] == strip[2:])]  # -1 ends a strip
    return np.full(len(triangles), 3), triangles.reshape(-1), {}


def _whole(indices: np.ndarray) -> np.ndarray:
    if indices.dtype.kind == "f":
        indices = np.where(np.abs(indices) < 2**53, indices, -1)
    return indices.astype(np.int64)


def _pick_colors(columns: dict[str, np.ndarray | _List]) -> np.ndarray | None:
    """(rows, 4) in [0, 1] or uint8 from red, green and blue under any of their usual names."""
    table = {name: column for name, column in columns.items() if not isinstance(column, _List)}
    color = named_colors(table, list(table))
    return None if color is None else unit_colors(color)


def _uv(
    vertices: dict, faces: dict, triangles: np.ndarray, counts: np.ndarray, corners: np.ndarray, polygon: np.ndarray
) -> np.ndarray | None:
    """Texture coordinates (F, 3, 2), NaN where a face has none: of the faces' corners, else of the vertices."""
    wedges = faces.get("texcoord")
    if isinstance(wedges, _List) and wedges.counts.any():
        starts = np.cumsum(wedges.counts) - wedges.counts
        corner = corners - (np.cumsum(counts) - counts)[polygon][:, None]  # within its polygon
        has_uv = (wedges.counts >= 2 * counts)[polygon]
        index = np.where(has_uv[:, None], starts[polygon][:, None] + 2 * corner, 0)
        values = np.append(wedges.values.astype(np.float64), [np.nan, np.nan])
        uv = np.stack([values[index], values[index + 1]], axis=-1)
        return np.where(has_uv[:, None, None], uv, np.nan)
    for names in _UV_NAMES:
        if all(isinstance(vertices.get(name), np.ndarray) for name in names):
            return np.stack([vertices[name].astype(np.float64) for name in names], axis=1)[triangles]
    return None
