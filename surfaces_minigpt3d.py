"""Meshes from .off, .stl and .ply, and what all readers of meshes share: rows of numbers, polygons, colors, textures.

No library reads the colors that people have in these files. Of 50 colored OBJ, OFF, STL, 3MF and PLY meshes, trimesh 5.2
reads 32, assimp-py 1.1 33, pymeshlab 2025.7 33, and tinyobjloader 2.0rc13 18 of the 25 OBJ; each misses others.

Shapes: V vertices, F triangles.
"""

import posixpath
import re
import unicodedata
import urllib.parse
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .meshes_minigpt3d import Surface, Textures
from .readers_minigpt3d import PointCloudError, Points, limits, warn


# Where programs put textures that a file names without their folder.
_TEXTURE_FOLDERS = ("", "textures", "texture", "images", "../textures")
# Why a file that another names is not read.
OUTSIDE = "outside of the folder, not read"
# What a color may exceed its range by.
_SLACK = 1e-3


# ---- Text -----------------------------------------------------------------------------------------------------------


def read_lines(path: Path, comment: bytes | None = None, joins: bool = False) -> list[bytes]:
    """The lines of a text file in any encoding and with any line ends, tabs as blanks, without comments.

    Args:
        comment: what begins a comment.
        joins: whether a line that ends in a backslash, and is no comment, continues on the next one.
    """
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16", "replace").encode()
    data = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\t", b" ")
    if comment is not None and comment in data:
        data = re.sub(re.escape(comment) + rb"[^\n]*", b"", data)
    if joins and b"\\\n" in data:
        data = re.sub(rb"(?m)^ *#.*\\$", b"", data).replace(b"\\\n", b" ")
    return data.split(b"\n")


def decode_text(data: bytes) -> str:
    """Text in UTF-8 or, if it is not, in the encoding of Western Windows programs."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def parse_numbers(text: bytes, dtype: type = np.float64) -> np.ndarray:
    """Numbers between white space as one array; what C prints for NaN and infinity counts as NaN.

    Raises:
        PointCloudError: something else stands among them.
    """
    for attempt in range(2):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return np.fromstring(text, dtype=dtype, sep=" ")
        except (ValueError, DeprecationWarning):
            if attempt == 0:
                text = re.sub(rb"(?i)[+-]?(1\.#|nan\()[\w.#)]*", b"nan", text)
    for match in re.finditer(rb"\S+", text):
        word = match[0]
        try:
            float(word)
        except ValueError:
            raise PointCloudError(
                f"{decode_text(word[:40])!r} stands where a number is expected. The file is corrupt; export it again."
            ) from None
    raise PointCloudError("its numbers cannot be read. The file is corrupt; export it again.")


def count_words(text: bytes) -> np.ndarray:
    """How many words each line has."""
    chars = np.frombuffer(text, dtype=np.uint8)
    begins = chars > 32
    begins[1:] &= chars[:-1] <= 32
    begins = np.flatnonzero(begins)
    line_ends = np.append(np.flatnonzero(chars == 10), len(chars))
    return np.diff(np.searchsorted(begins, line_ends), prepend=0)


# ---- Geometry and colors --------------------------------------------------------------------------------------------


def split_polygons(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Triangles of polygons with `counts` corners each, a fan from the first corner.

    Returns:
        corners (F, 3): positions in the list of all polygons' corners; polygon (F,): the one that each belongs to.
    """
    counts = np.asarray(counts, dtype=np.int64)
    num_triangles = np.maximum(counts - 2, 0)
    polygon = np.repeat(np.arange(len(counts)), num_triangles)
    step = np.arange(len(polygon)) - np.repeat(np.cumsum(num_triangles) - num_triangles, num_triangles)
    first = (np.cumsum(counts) - counts)[polygon]
    corners = np.stack([first, first + step + 1, first + step + 2], axis=1)
    half = (counts[polygon] == 4) & (step == 1)  # trimesh's order, so that clouds stay as they were
    corners[half] = np.roll(corners[half], -1, axis=1)
    return corners, polygon


def split_groups(numbers: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
    """Every number that occurs, and where; a slice if it is the only one."""
    values, counts = np.unique(numbers, return_counts=True)
    if len(values) == 0:
        return []
    if len(values) == 1:
        return [(int(values[0]), slice(None))]
    order = np.argsort(numbers, kind="stable")
    return list(zip(values.tolist(), np.split(order, np.cumsum(counts)[:-1]), strict=True))


def check_indices(indices: np.ndarray, num_vertices: int):
    """Refuse faces with vertices that do not exist."""
    if len(indices) and (indices.min() < 0 or indices.max() >= num_vertices):
        wrong = indices.max() if indices.max() >= num_vertices else indices.min()
        raise PointCloudError(
            f"a face names vertex {wrong:,} (counted from 0), but there are {num_vertices:,}. "
            "The file is truncated or corrupt; export it again."
        )


def unit_colors(color: np.ndarray) -> np.ndarray | None:
    """Colors in 0–1, 0–255 or 0–65535, by dtype and range, as (…, 4) in [0, 1] or uint8; None if they are no colors."""
    if not np.isfinite(color).any():
        return None
    high = np.nanmax(color)
    if np.nanmin(color) < -_SLACK or high > 65535:
        return None
    opaque = np.ones_like(color[..., :1])
    if color.dtype == np.uint8:
        return np.concatenate([color[..., :3], 255 * opaque], axis=-1)
    is_whole = color.dtype.kind in "iu"
    if color.dtype.kind == "f" and high > 1 + _SLACK:
        is_whole = high > 2 or bool((color[np.isfinite(color)] % 1 == 0).all())  # brighter than white, or 0–255
    scale = 255 if is_whole else 1
    if high > 255 + _SLACK:
        scale = 65535
    return np.concatenate([color[..., :3] / scale, opaque], axis=-1).astype(np.float32)


def says_color(color: np.ndarray | None) -> bool:
    """Whether colors (…, 4) are more than one gray, as programs write it where there is no color."""
    if color is None:
        return False
    color = color.reshape(-1, color.shape[-1])[:, :3].astype(np.float32)
    color = color[np.isfinite(color).all(axis=1)]
    return bool(len(color) and (np.ptp(color, axis=0).max() > _SLACK or np.ptp(color[0]) > _SLACK))


# ---- Files beside a file --------------------------------------------------------------------------------------------


def find_file(name: str, folders: Iterable[Path]) -> Path | None:
    """The file that another names: as written, then without its leading folders, in any case and with %20 as a blank.

    Of a name that leads out of `folders`, only what comes after is looked for in them.
    """
    name = name.strip().strip("\"'").replace("\\", "/")
    if not name or "\0" in name:
        return None
    folders = list(dict.fromkeys(folders))
    for spelling in dict.fromkeys((name, urllib.parse.unquote(name))):
        is_absolute = spelling.startswith("/") or spelling[1:2] == ":"
        parts = [part for part in posixpath.normpath(spelling).split("/") if part not in ("", ".", "..")][-16:]
        for first in range(1 if is_absolute and len(parts) > 1 else 0, len(parts)):
            for folder in folders:
                path = _walk(folder, parts[first:])
                if path is not None:
                    return path
    return None


def leads_outside(name: str) -> bool:
    """Whether a file's name in another file is absolute, or climbs out of the folder of that file."""
    name = posixpath.normpath(name.strip().strip("\"'").replace("\\", "/"))
    return name.startswith(("/", "../")) or name[1:2] == ":"


def why_not_found(name: str) -> str:
    return OUTSIDE if leads_outside(name) else "not found"


def list_missing(reasons: dict[str, str]) -> str:
    """The first names of files, with the reason why each is not read."""
    names = [f"{name[:200]!r} ({reason})" for name, reason in reasons.items()]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _walk(folder: Path, parts: list[str]) -> Path | None:
    """`folder` / `parts`, each as written or else in another case or Unicode form."""
    try:
        for number, part in enumerate(parts, start=1):
            path = folder / part
            if not path.exists():
                folded = unicodedata.normalize("NFC", part).casefold()
                path = next(
                    (p for p in sorted(folder.iterdir()) if unicodedata.normalize("NFC", p.name).casefold() == folded),
                    None,
                )
            if path is None or not (path.is_file() if number == len(parts) else path.is_dir()):
                return None
            folder = path
    except OSError:  # a name that is too long, a folder that may not be read
        return None
    return folder


class TextureFiles:
    """The textures that one file names. What is missing or not decoded is collected for one warning."""

    def __init__(self):
        self._textures = Textures()
        self._lost: dict[str, str] = {}
        self._by_name: dict[tuple, np.ndarray | None] = {}

    def find(self, name: str, folders: Iterable[Path]) -> np.ndarray | None:
        """The texture `name` as (H, W, 4) uint8 with its first row at v = 0, or None."""
        key = (name, *folders)
        if key not in self._by_name:
            self._by_name[key] = self._find(name, folders) if len(self._lost) < limits().max_lost_textures else None
        return self._by_name[key]

    def _find(self, name: str, folders: Iterable[Path]) -> np.ndarray | None:
        path = find_file(name, [folder / below for below in _TEXTURE_FOLDERS for folder in folders])
        if path is None:
            self._lost[name] = why_not_found(name)
            return None
        if path.stat().st_size > limits().max_texture_bytes:
            raise PointCloudError(f"its texture {name!r} has {path.stat().st_size:,} bytes. Make it smaller first.")
        return self.decode(name, path.read_bytes(), path)

    def decode(self, name: str, data: bytes, key: Any = None) -> np.ndarray | None:
        """An image file as (H, W, 4) uint8 with its first row at v = 0, or None."""
        try:
            return self._textures.decode(key or name, data)[::-1]
        except (PointCloudError, ImportError, MemoryError):
            raise
        except Exception:  # PIL has exceptions of its own for every format
            self._lost[name] = "not decoded"
            return None

    def lose(self, name: str, reason: str):
        self._lost[name] = reason

    def warn_missing(self):
        """Warn about the textures that are missing."""
        if self._lost:
            warn(f"textures are missing: {list_missing(self._lost)}.")


# ---- OFF ------------------------------------------------------------------------------------------------------------

# ModelNet40 has the numbers behind OFF without a blank between them.
_OFF_HEADER = re.compile(rb"((?:ST|C|N|U|4|n)*)(?:OFF|off)(.*)")


def read_off(path: Path) -> Points | list[Surface]:
    """An OFF: with colors of vertices or faces, normals, texture coordinates, and polygons of any size."""
    rows = [row.strip() for row in read_lines(path, comment=b"#")]
    rows = [row for row in rows if row]
    header = _OFF_HEADER.match(rows[0]) if rows else None
    if header:
        kind, rest = header.groups()
        rows = [rest.strip(), *rows[1:]] if rest.strip() else rows[1:]
    elif rows and re.fullmatch(rb"\d+ +\d+( +\d+)?", rows[0]):
        kind = b""
    else:
        raise PointCloudError("this is no OFF: it must begin with 'OFF', or COFF, NOFF, STOFF and so on.")
    if rows and rows[0].upper().startswith(b"BINARY"):
        raise PointCloudError("binary OFF is not read. Save it as text, or as PLY.")
    if b"n" in kind and rows and len(rows[0].split()) == 1:
        if parse_numbers(rows.pop(0))[0] != 3:
            raise PointCloudError("its points do not have 3 dimensions.")
    sizes = parse_numbers(rows[0])[:2] if rows else np.zeros(0)
    num_vertices, num_faces = (
        (int(size) if 0 <= size < 2**53 else -1 for size in sizes) if len(sizes) == 2 else (-1, 0)
    )
    if num_vertices < 0 or num_faces < 0:
        raise PointCloudError("the line after 'OFF' must hold the numbers of vertices and faces.")
    rows = rows[1:]
    if len(rows) < num_vertices + num_faces:
        raise PointCloudError(
            f"its header says {num_vertices:,} vertices and {num_faces:,} faces, but {len(rows):,} lines follow. "
            "The file is truncated or corrupt; export it again."
        )
    coord, color = _off_vertices(b"\n".join(rows[:num_vertices]), kind)
    if not num_faces:
        return Points(coord, None if color is None else color[:, :3])
    return _off_faces(b"\n".join(rows[num_vertices : num_vertices + num_faces]), coord, color)


def _off_vertices(text: bytes, kind: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """xyz (V, 3) and color (V, 4) or None."""
    if not text:
        return np.zeros((0, 3)), None
    counts = count_words(text)
    table = parse_numbers(text)
    if counts.min() < 3:
        raise PointCloudError("a vertex has fewer than 3 coordinates. The file is corrupt; export it again.")
    width = counts.min()
    starts = np.cumsum(counts) - counts
    table = table[starts[:, None] + np.arange(width)]
    coord, first = table[:, :3], 3
    if b"4" in kind and width > 3:  # homogeneous
        with np.errstate(divide="ignore", invalid="ignore"):
            coord, first = coord / table[:, 3:4], 4
    extra = table[:, first : width - 2 if b"ST" in kind else width]
    layouts = [extra]
    if b"N" in kind:  # Geomview has normals before colors, MeshLab after them, and not always of length 1
        layouts = [extra[:, 3:], extra[:, :-3]]
        if _share_of_units(extra[:, -3:]) > _share_of_units(extra[:, :3]):
            layouts.reverse()
    colors = (unit_colors(layout) for layout in layouts if layout.shape[1] in (3, 4))
    return coord, next((color for color in colors if color is not None), None)


def _share_of_units(vectors: np.ndarray) -> float:
    """The share of vectors (V, 3) of length 1."""
    return (np.abs(np.linalg.norm(vectors, axis=1) - 1) < 0.01).mean()


def _off_faces(text: bytes, coord: np.ndarray, vertex_color: np.ndarray | None) -> list[Surface]:
    counts, values = count_words(text), parse_numbers(text)
    starts = np.cumsum(counts) - counts
    sizes = values[starts]
    if not ((sizes >= 0) & (sizes < counts)).all():
        raise PointCloudError(
            "a face has fewer corners than it says. The file is truncated or corrupt; export it again."
        )
    sizes = sizes.astype(np.int64)
    first = np.repeat(starts + 1 - (np.cumsum(sizes) - sizes), sizes)
    indices = values[first + np.arange(sizes.sum())].astype(np.int64)
    check_indices(indices, len(coord))
    corners, polygon = split_polygons(sizes)
    faces = indices[corners]  # (F, 3)
    num_extra = counts - sizes - 1
    has_color = num_extra >= 3  # a single number is an index into a color map that nobody has
    if has_color.any():
        color = np.full((len(sizes), 3), np.nan)
        color[has_color] = values[(starts + sizes + 1)[has_color][:, None] + np.arange(3)]
        color = unit_colors(color)
        if color is not None and (says_color(color) or not says_color(vertex_color)):
            return [Surface(coord[faces], color[polygon][:, None])]
    return [Surface(coord[faces], None if vertex_color is None else vertex_color[faces])]


# ---- STL ------------------------------------------------------------------------------------------------------------

_STL_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def read_stl(path: Path) -> list[Surface]:
    """An STL, text or binary, of one or several solids; binary with the colors of VisCAM or Magics."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    num_facets = int.from_bytes(data[80:84], "little")
    is_exact = len(data) >= 84 and len(data) == 84 + 50 * num_facets
    if not is_exact and re.match(rb"\s*solid\b", data[:512], re.IGNORECASE) and re.search(rb"(?i)\bvertex\s", data):
        return [Surface(_stl_text(data))]
    solids, start = [], 0  # (start, number of facets)
    while len(data) - start >= 84:
        count = int.from_bytes(data[start + 80 : start + 84], "little")
        end = start + 84 + 50 * count
        if end > len(data) or (start and not count):
            break
        solids.append((start, count))
        start = end
    most, rest = divmod(len(data) - 84, 50)
    if solids and start < len(data) and not rest:  # one solid, written before its facets were counted
        if num_facets:
            warn(f"its header says {num_facets:,} facets, but {most:,} follow, which were all read.")
        solids, start = [(0, most)], len(data)
    if not solids:
        raise PointCloudError(
            f"its header says {num_facets:,} facets, but the file has {len(data):,} bytes for them. "
            "The file is truncated or corrupt, or no STL; export it again."
        )
    if len(data) - start > 84:
        warn(f"{len(data) - start:,} bytes after its facets were not read.")
    return [_stl_solid(data, start, count) for start, count in solids]


def _stl_solid(data: bytes, start: int, count: int) -> Surface:
    facets = np.frombuffer(data, _STL_FACET, count=count, offset=start + 84)
    return Surface(facets["corners"].copy(), _stl_colors(data[start : start + 80], facets["attribute"]))


def _stl_text(data: bytes) -> np.ndarray:
    data = re.sub(rb"(?im)^\s*(end)?solid\b[^\r\n]*", b"", data)
    if 12 * data.lower().count(b"vertex") > len(data):
        raise PointCloudError("its corners have no coordinates. The file is corrupt; export it again.")
    words = [piece.split(None, 3)[:3] for piece in re.split(rb"(?i)\bvertex\b", data)[1:]]
    if len(words) % 3 or min(map(len, words), default=3) < 3:
        raise PointCloudError(
            "a facet has fewer than three corners. The file is truncated or corrupt; export it again."
        )
    return parse_numbers(b" ".join(word for triple in words for word in triple)).reshape(-1, 3, 3)


def _stl_colors(header: bytes, attribute: np.ndarray) -> np.ndarray | None:
    """(F, 1, 4) colors of facets from 5 bits each, or None."""
    levels = np.stack([attribute >> shift & 31 for shift in (0, 5, 10)], axis=1) / 31  # lowest bits first
    is_marked = attribute >> 15 == 1
    default = header.find(b"COLOR=")
    color = np.full((len(attribute), 1, 4), np.nan, dtype=np.float32)
    if default < 0:  # VisCAM: red in the highest bits, and the mark means that there is a color
        if not is_marked.any():
            return None
        color[is_marked, 0] = _opaque(levels[is_marked, ::-1])
        return color
    # Magics: red in the lowest bits, and the mark means the default color, but MeshLab marks every facet that has one.
    fill = _opaque(np.frombuffer(header[default + 6 : default + 9].ljust(3), np.uint8) / 255)
    if says_color(fill[None]):
        color[:] = fill
    elif not attribute.any():
        return None
    has_own = ~is_marked
    if is_marked.all():
        has_own, levels = is_marked, levels * 31 * 8 / 255  # MeshLab rounds down
    if (attribute & 0x7FFF).any():
        color[has_own, 0] = _opaque(levels[has_own])
    return color


def _opaque(color: np.ndarray) -> np.ndarray:
    return np.concatenate([color, np.ones_like(color[..., :1])], axis=-1)
