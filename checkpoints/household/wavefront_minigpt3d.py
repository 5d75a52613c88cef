"""Meshes from .obj with their .mtl files and textures.

Of 25 colored OBJ files, trimesh 5.2 reads 18 (the first MTL file only, no `.\\`), assimp-py 1.1 20 and tinyobjloader
2.0rc13 18 (both take colors of 0–255 for 0–1, and miss an MTL file after a byte-order mark).

Shapes: V vertices, C corners of all polygons, F triangles.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .meshes_minigpt3d import Material, Surface
from .readers_minigpt3d import Node, PointCloudError, Points, folders_beside, keeps_nodes, limits, warn
from .surfaces_minigpt3d import (
    TextureFiles,
    count_words,
    decode_text,
    find_file,
    list_missing,
    parse_numbers,
    read_lines,
    says_color,
    split_groups,
    split_polygons,
    unit_colors,
    why_not_found,
)


@dataclass
class _Rows:
    """The lines of an OBJ by their keyword, and where the faces' materials change."""

    vertices: list[bytes] = field(default_factory=list)
    uvs: list[bytes] = field(default_factory=list)
    faces: list[bytes] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)
    # (faces, vertices, uvs) before each run of faces, and the run's material
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    materials: list[str] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)  # object and group of each run


@dataclass
class _Paint:
    """A material of an MTL file."""

    color: np.ndarray | None = None  # Kd, (3,)
    map: str | None = None  # map_Kd, or else map_Ka, which is all that some exporters write
    folders: list[Path] = field(default_factory=list)  # where its texture may be
    material: Material | None = None  # with the texture
    scale: np.ndarray = field(default_factory=lambda: np.ones(2))
    offset: np.ndarray = field(default_factory=lambda: np.zeros(2))


def read_obj(path: Path) -> Points | list[Surface]:
    """An OBJ: its polygons with materials, textures and vertex colors; without faces its vertices."""
    rows = _sort_lines(read_lines(path, joins=True))
    if not rows.vertices:
        raise PointCloudError("it has no vertices, no line that begins with 'v'.")
    coord, color = _vertices(rows.vertices)
    if not rows.faces:
        return Points(coord, None if color is None else color[:, :3])
    counts, indices, uv_indices = _corners(rows)
    is_wrong = (indices < 0) | (indices >= len(coord))
    if is_wrong.any():
        line = rows.faces[np.searchsorted(np.cumsum(counts), is_wrong.argmax(), side="right")]
        raise PointCloudError(
            f"its line {'f ' + decode_text(line[:60]).strip()!r} names a vertex that is not there: {len(coord):,} are, counted "
            "from 1. The file is truncated or corrupt; export it again."
        )
    corners, polygon = split_polygons(counts)
    faces = indices[corners]  # (F, 3)
    uv = None
    if uv_indices is not None and rows.uvs:
        table = _columns(rows.uvs, 1)
        table = np.pad(table, ((0, 0), (0, max(0, 2 - table.shape[1]))))[:, :2]
        uv_indices = uv_indices[corners]
        has_uv = ((uv_indices >= 0) & (uv_indices < len(table))).all(axis=1)
        uv = table[np.where(has_uv[:, None], uv_indices, 0)]
    else:
        has_uv = np.zeros(len(faces), dtype=bool)

    textures = TextureFiles()
    paints, is_complete = _read_libraries(path, rows.libraries, any(rows.materials))
    numbers: dict[str, int] = {}
    number = np.array([numbers.setdefault(name, len(numbers)) for name in rows.materials])  # of each run
    if is_complete:
        _report_unknown(path, [name for name in numbers if name], paints)
    for paint in {id(paint): paint for paint in map(paints.find, numbers) if paint is not None}.values():
        _read_map(paint, textures)
    targets, flat_colors, materials = _choose(list(numbers), paints, says_color(color))
    lengths = np.diff([*(run[0] for run in rows.runs), len(rows.faces)])
    number = np.repeat(number, lengths)[polygon]  # of each triangle
    target_of = targets[number, has_uv.astype(int)]
    nodes, num_targets = [()], int(target_of.max(initial=0)) + 1
    if keeps_nodes():
        nodes, node_of = _named_nodes(rows.names)
        target_of = target_of + num_targets * np.repeat(node_of, lengths)[polygon]
    surfaces = []
    for chosen, here in split_groups(target_of):
        place, target = divmod(chosen, num_targets)
        paint = materials.get(target)
        surface_color, surface_uv = None, None
        if target == _VERTEX_COLOR and color is not None:
            surface_color = color[faces[here]]
        elif target == _FLAT_COLOR:
            surface_color = flat_colors[number[here]][:, None]
        elif paint is not None:
            surface_uv = uv[here] * paint.scale + paint.offset
        surfaces.append(Surface(coord[faces[here]], surface_color, surface_uv, paint and paint.material, nodes[place]))
    textures.warn_missing()
    return surfaces


# ---- Lines ----------------------------------------------------------------------------------------------------------


def _sort_lines(lines: list[bytes]) -> _Rows:
    rows, material, is_new_run = _Rows(), "", True
    keeps_names, name, group_name = keeps_nodes(), "", ""
    vertices, uvs, faces = rows.vertices, rows.uvs, rows.faces
    for line in lines:
        if line[:1] == b" ":
            line = line.lstrip()
        key = line[:2]
        if key == b"v ":
            vertices.append(line[2:])
            is_new_run = True
        elif key == b"vt" and line[2:3] == b" ":
            uvs.append(line[3:])
            is_new_run = True
        elif key == b"f ":
            if is_new_run:
                rows.runs.append((len(faces), len(vertices), len(uvs)))
                rows.materials.append(material)
                rows.names.append((name, group_name))
                is_new_run = False
            faces.append(line[2:])
        elif key in (b"us", b"mt"):
            word, _, text = line.partition(b" ")
            if word == b"usemtl":
                material, is_new_run = decode_text(text).strip(), True
            elif word == b"mtllib":
                rows.libraries.append(decode_text(text).strip())
        elif keeps_names and key in (b"o ", b"o\t", b"g ", b"g\t", b"g"):
            is_new_run = True
            if line[:1] == b"o":
                name, group_name = decode_text(line[2:]).strip(), ""
            else:
                group_name = decode_text(line[2:]).strip()
    return rows


def _named_nodes(names: list[tuple[str, str]]) -> tuple[list[tuple[Node, ...]], np.ndarray]:
    """Object and group of each run of faces → the nodes of each different pair, and the pair of each run (R,)."""
    numbers: dict[tuple[str, ...], int] = {}
    pairs: dict[tuple[str, str], tuple[Node, ...]] = {}
    for pair in names:
        keys = [pair[:1], pair] if pair[1] else [pair[:1]]
        pairs[pair] = tuple(Node(numbers.setdefault(key, len(numbers)), key[-1]) for key in keys if key[-1])
    order = {pair: index for index, pair in enumerate(pairs)}
    return list(pairs.values()), np.array([order[pair] for pair in names], dtype=np.int64)


def _without_comments(lines: list[bytes]) -> bytes:
    text = b"\n".join(lines)
    return re.sub(rb"#[^\n]*", b"", text) if b"#" in text else text


def _columns(lines: list[bytes], least: int) -> np.ndarray:
    """Lines of numbers as a table, NaN where a line has fewer than the longest."""
    text = _without_comments(lines)
    # "3.1+e2" and "3.1-e2" occur as well
    text = re.sub(rb"([+-])e(?=\d)", rb"e\1", text) if b"+e" in text or b"-e" in text else text
    counts, values = count_words(text), parse_numbers(text)
    if counts.min() < least:
        raise PointCloudError(
            f"a line has {counts.min()} numbers, expected {least}. The file is truncated or corrupt; export it again."
        )
    width = min(counts.max(), 8)
    if counts.min() == counts.max():
        return values.reshape(len(counts), -1)[:, :width]
    table = np.full((len(counts), width), np.nan)
    starts = np.cumsum(counts) - counts
    for column in range(width):
        has = counts > column
        table[has, column] = values[starts[has] + column]
    return table


def _vertices(lines: list[bytes]) -> tuple[np.ndarray, np.ndarray | None]:
    """xyz (V, 3), and color (V, 4) or None. x y z, then w, r g b, r g b a or w r g b."""
    table = _columns(lines, 3)
    coord, extra = np.ascontiguousarray(table[:, :3]), table[:, 3:]
    if extra.shape[1] < 3:
        return coord, None
    if extra.shape[1] == 4 and np.nanmin(extra[:, 0]) == np.nanmax(extra[:, 0]) == 1 and np.ptp(extra[:, 3]) > 0:
        extra = extra[:, 1:]
    extra = np.where(np.isnan(extra[:, 2:3]), np.nan, extra)[:, :3]  # a single number is w
    return coord, unit_colors(extra)


def _corners(rows: _Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Corners of each polygon, and of each corner the vertex (C,) and the uv (C,), counted from 0; -1 is none."""
    text = _without_comments(rows.faces)
    counts = count_words(text)
    num_corners = int(counts.sum())
    num_slashes, num_doubles = text.count(b"/"), text.count(b"//")
    table = None
    if num_slashes == 0:
        table = parse_numbers(text, np.int64)[:, None]
    elif num_slashes in (num_corners, 2 * num_corners) and num_doubles in (0, num_corners):
        flat = parse_numbers(text.replace(b"/", b" "), np.int64)
        width = 2 if num_doubles or num_slashes == num_corners else 3
        if len(flat) == width * num_corners:
            table = flat.reshape(-1, width)[:, : 1 if num_doubles else 2]
    if table is None:  # corners of several forms
        words = ((*word.split(b"/"), b"") for word in text.split())
        flat = b" ".join((word[0] or b"0") + b" " + (word[1] or b"0") for word in words)
        table = parse_numbers(flat, np.int64).reshape(-1, 2)
    runs = np.array(rows.runs)  # (R, 3)
    run = np.repeat(np.repeat(np.arange(len(runs)), np.diff(runs[:, 0], append=len(counts))), counts)
    result = []
    for column in range(table.shape[1]):  # negative ones count backwards from their line
        index = table[:, column]
        index = np.where(index > 0, index - 1, np.where(index < 0, index + runs[run, column + 1], -1))
        result.append(index)
    return counts, result[0], result[1] if len(result) > 1 else None


# ---- Materials ------------------------------------------------------------------------------------------------------


class _Paints(dict):
    """Materials by name; `find` also in another case, and with a comment after the name."""

    def __init__(self):
        self._folded: dict[str, str] | None = None

    def find(self, name: str) -> _Paint | None:
        if self._folded is None:
            self._folded = {key.casefold(): key for key in self}
        for spelling in (name, re.split(r"\s#", name)[0].strip()):
            key = self._folded.get(spelling.casefold())
            if spelling in self or key is not None:
                return self.get(spelling) or self[key]
        return None


# Where a triangle's color comes from; higher numbers are textures.
_VERTEX_COLOR, _FLAT_COLOR = 0, 1


def _choose(
    names: list[str], paints: _Paints, use_vertex_color: bool
) -> tuple[np.ndarray, np.ndarray, dict[int, _Paint]]:
    """Where the color comes from: of each material, without and with uv (M, 2); Kd (M, 4); the materials with texture.

    Many exporters leave Kd at black or gray beside a texture or vertex colors, so they are not multiplied.
    """
    targets, flat_colors, materials = np.zeros((len(names), 2), np.int64), np.ones((len(names), 4)), {}
    seen: dict[tuple, int] = {}  # textures that are used in the same way
    for index, name in enumerate(names):
        paint = paints.find(name)
        if paint is None:
            continue
        is_gray = paint.color is None or np.ptp(paint.color) <= 1e-3
        if not use_vertex_color and not (is_gray and (paint.color is None or paint.map is not None)):
            targets[index] = _FLAT_COLOR
            flat_colors[index, :3] = paint.color
        if paint.material is not None:
            key = (id(paint.material.texture), paint.material.wrap, *paint.scale, *paint.offset)
            targets[index, 1] = seen.setdefault(key, len(seen) + 2)
            materials.setdefault(seen[key], paint)
    return targets, flat_colors, materials


def _report_unknown(path: Path, names: list[str], paints: _Paints):
    unknown = [name for name in names if paints.find(name) is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        warn(f"materials are in none of its MTL files: {', '.join(map(repr, unknown[:3]))}{more}.")


def _read_libraries(path: Path, lines: list[str], uses_materials: bool) -> tuple[_Paints, bool]:
    """The materials of all MTL files, and whether all files were found."""
    files, missing = [], []
    for line in list(dict.fromkeys(lines))[: limits().max_material_files]:
        uncommented = re.split(r"\s#", line)[0].strip()
        for spelling in dict.fromkeys((line, uncommented)):  # a name may hold blanks
            file = find_file(spelling, folders_beside(path))
            if file is not None:
                files.append(file)
                break
        else:
            found = {
                name: find_file(name, folders_beside(path))
                for name in uncommented.split()[: limits().max_material_files]
            }
            files += [file for file in found.values() if file is not None]
            lost = [name for name, file in found.items() if file is None]
            missing += [line] if len(lost) == len(found) else lost
    if not files and (missing or uses_materials):
        for name in (f"{path.stem}.mtl", f"{path.name}.mtl"):
            files += [file] if (file := find_file(name, folders_beside(path))) else []
        missing = [] if files else missing
    if missing:
        warn(f"material files are missing: {list_missing({name: why_not_found(name) for name in missing})}.")
    paints = _Paints()
    for file in dict.fromkeys(files):
        if file.stat().st_size > limits().max_material_bytes:
            raise PointCloudError(f"its material file {file.name} has {file.stat().st_size:,} bytes.")
        _read_mtl(file, [file.parent, *folders_beside(path)], paints)
    return paints, not missing


def _read_mtl(path: Path, folders: list[Path], paints: _Paints):
    paint, ambient = _Paint(), {}
    for line in read_lines(path):
        key, _, rest = decode_text(line).strip().partition(" ")
        key, rest = key.lower(), rest.strip()
        if key == "newmtl":
            paint = paints.setdefault(rest, _Paint(folders=folders))
        elif key == "kd":
            paint.color = _diffuse(rest)
        elif key == "map_kd" and rest:
            paint.map = rest
        elif key == "map_ka" and rest:
            ambient[id(paint)] = (paint, rest)
    for paint, rest in ambient.values():
        paint.map = paint.map or rest


def _diffuse(text: str) -> np.ndarray | None:
    words = re.split(r"\s#", text)[0].replace(",", ".").split()[:3]
    try:
        color = np.array([float(word) for word in words])
    except ValueError:  # spectral or xyz
        return None
    if len(color) not in (1, 3) or not np.isfinite(color).all() or color.min() < 0:
        return None
    return np.broadcast_to(color / 255 if 1.001 < color.max() <= 255 else np.minimum(color, 1), 3)


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_MAP_OPTION = re.compile(
    rf"-(?:(?P<uvw>s|o|t)(?P<numbers>(?:\s+{_NUMBER}(?=\s)){{1,3}})"
    rf"|mm\s+(?P<base>{_NUMBER})\s+(?P<gain>{_NUMBER})"
    rf"|(?:boost|texres|bm)\s+{_NUMBER}"
    r"|clamp\s+(?P<clamp>on|off)|(?:blendu|blendv|cc)\s+(?:on|off)|(?:imfchan|type|colorspace)\s+\S+)\s+",
    re.IGNORECASE,
)


def _read_map(paint: _Paint, textures: TextureFiles):
    """Find the texture of a material: after options, the name of a file, which may hold blanks."""
    if paint.map is None:
        return
    wrap, base, gain, rest = "repeat", 0.0, 1.0, paint.map
    while match := _MAP_OPTION.match(rest):
        rest = rest[match.end() :]
        if match["uvw"] in ("s", "o"):
            numbers = [float(number) for number in match["numbers"].split()[:2]]
            target = paint.scale if match["uvw"] == "s" else paint.offset
            target[: len(numbers)] = numbers
        elif match["clamp"]:
            wrap = "clamp" if match["clamp"].lower() == "on" else "repeat"
        elif match["base"]:
            base, gain = float(match["base"]), float(match["gain"])
    name = re.split(r"\s#", rest)[0].strip()
    if rest != name and find_file(rest, paint.folders):
        name = rest
    texture = textures.find(name, paint.folders)
    if texture is None:
        return
    if (base, gain) != (0, 1):
        texture = texture.copy()
        texture[..., :3] = np.clip(base * 255 + gain * texture[..., :3], 0, 255).round()
    paint.material = Material(texture=texture, wrap=(wrap, wrap))
