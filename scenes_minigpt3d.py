"""Meshes from .3mf, and the table of the mesh formats that are read here.

trimesh 5.2 reads no colors from 3MF, and assimp-py 1.1 neither textures nor further parts of the archive.

Shapes: V vertices, F triangles.
"""

import array
import posixpath
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .meshes_minigpt3d import Material, Surface, check_num_faces
from .ply_minigpt3d import read_ply
from .readers_minigpt3d import Node, PointCloudError, Points, check_zip, import_reader, limits
from .surfaces_minigpt3d import TextureFiles, check_indices, parse_numbers, read_off, read_stl, split_groups
from .wavefront_minigpt3d import read_obj


# ---- Models of a 3MF ------------------------------------------------------------------------------------------------


class _Use(NamedTuple):
    """An object at a place: of a component or a build item."""

    part: str  # name of the archive's member with the object
    object_id: str
    matrix: np.ndarray  # (4, 3), for row vectors


@dataclass
class _Group:
    """Properties that triangles refer to by number: colors, or positions in a texture, or choices of other groups."""

    kind: str
    attributes: dict[str, str]
    rows: list = field(default_factory=list)


@dataclass
class _Object:
    vertices: array.array
    triangles: array.array  # v1 v2 v3 p1 p2 p3 and the number of the pid; -1 is none
    components: list[_Use]
    name: str = ""


# Elements that differ in their numbers only.
_LIST = re.compile(rb"<(vertices|triangles)\s*>\s*(?=<\w+\s)")


def _read_list(text: bytes) -> dict[str, np.ndarray] | None:
    """The attributes of a list of elements that are all written as the first one is, (N,) each; None if they are not.

    lxml takes 5 µs for an element, and a mesh may have millions.
    """
    names = re.findall(rb'\s(\w+)="', text[: text.index(b">")])
    first, *others = re.split(rb'"[^"]*"', text[: text.index(b">") + 1])
    count = text.count(b"<")
    separators = [first + b'"', *(b'"' + other + b'"' for other in others[:-1]), b'"' + others[-1]]
    for separator in separators:
        if text.count(separator) != count:
            return None
        text = text.replace(separator, b" ")
    try:
        values = parse_numbers(text)
    except PointCloudError:  # lxml's words about it are better
        return None
    if len(values) != count * len(names):
        return None
    return {name.decode(): column for name, column in zip(names, values.reshape(count, -1).T, strict=True)}


class _ModelTarget:
    """Collects a .model while lxml parses it, without a tree in memory."""

    def __init__(self, part: str):
        self.part = part
        self.objects: dict[str, _Object] = {}
        self.groups: dict[str, _Group] = {}
        self.textures: dict[str, dict[str, str]] = {}
        self.items: list[_Use] = []
        self.pids: dict[str, int] = {}
        self._object: _Object | None = None
        self._group: _Group | None = None
        self._tags: dict[str, str] = {}  # without their namespace
        self._default = (-1, -1)  # pid and pindex of the object
        self._lists: list[dict[str, np.ndarray]] = []
        self._list_name = f"list_{secrets.token_hex(16)}"  # no file can hold it

    def take_lists(self, text: bytes) -> bytes:
        """Read lists before lxml sees them, and leave their numbers in their places."""
        parts, start = [], 0
        while match := _LIST.search(text, start):
            end = text.find(b"</", match.end())
            columns = _read_list(text[match.end() : end])
            parts.append(text[start : match.end()])
            if columns is not None and set(columns) in ({"x", "y", "z"}, {"v1", "v2", "v3"}):
                parts[-1] = text[start : match.start()] + b'<%b %b="%d">' % (
                    match[1],
                    self._list_name.encode(),
                    len(self._lists),
                )
                self._lists.append(columns)
            else:
                end = match.end()
            start = end
        return b"".join([*parts, text[start:]])

    def doctype(self, *_):
        raise PointCloudError("it has a document type with entities, which 3MF does not allow.")

    def start(self, tag: str, attributes: Any):
        tag = self._tags.get(tag) or self._tags.setdefault(tag, tag.rpartition("}")[2])
        read = attributes.get
        if tag == "vertex" and self._object:
            self._object.vertices.extend((float(read("x")), float(read("y")), float(read("z"))))
        elif tag == "triangle" and self._object:
            self._add_triangle(read)
        elif self._object and (number := read(self._list_name)):
            self._add_list(self._lists[int(number)])
        elif tag == "object":
            self._object = _Object(array.array("d"), array.array("q"), [], read("name", "").strip())
            self._default = (self._number(read("pid")), int(read("pindex", 0)))
            self.objects[read("id", "")] = self._object
        elif tag == "component" and self._object:
            self._object.components.append(self._use(attributes))
        elif tag == "item":
            self.items.append(self._use(attributes))
        elif tag == "texture2d":
            self.textures[read("id", "")] = dict(attributes)
        elif tag in _ROW_READERS:
            if self._group is not None:
                self._group.rows.append(_ROW_READERS[tag](attributes))
        elif tag in ("basematerials", "colorgroup", "texture2dgroup", "compositematerials", "multiproperties"):
            self._group = self.groups[read("id", "")] = _Group(tag, dict(attributes))

    def end(self, tag: str):
        tag = tag.rpartition("}")[2]
        if tag == "object":
            self._object = None
        elif self._group is not None and tag == self._group.kind:
            self._group = None

    def data(self, text: str):
        pass

    def close(self) -> "_ModelTarget":
        return self

    def _number(self, pid: str | None) -> int:
        return -1 if pid is None else self.pids.setdefault(pid, len(self.pids))

    def _add_triangle(self, read: Callable):
        pid, first = self._number(read("pid")), read("p1")
        if pid < 0:
            pid = self._default[0]
        first = self._default[1] if first is None else int(first)
        corners = (int(read("v1")), int(read("v2")), int(read("v3")))
        self._object.triangles.extend((*corners, first, int(read("p2", first)), int(read("p3", first)), pid))

    def _add_list(self, columns: dict[str, np.ndarray]):
        if "x" in columns:
            self._object.vertices.frombytes(np.column_stack([columns[axis] for axis in "xyz"]).tobytes())
            return
        pid, first = self._default
        corners = np.column_stack([columns[name] for name in ("v1", "v2", "v3")])
        table = np.full((len(corners), 7), first, dtype=np.int64)
        table[:, :3], table[:, 6] = np.where(np.abs(corners) < 2**53, corners, -1), pid
        self._object.triangles.frombytes(table.tobytes())

    def _use(self, attributes: Any) -> _Use:
        path = next((value for name, value in attributes.items() if name.rpartition("}")[2] == "path"), None)
        part = self.part if path is None else path
        numbers = attributes.get("transform", "1 0 0 0 1 0 0 0 1 0 0 0").split()
        if len(numbers) != 12:
            raise PointCloudError(f"a transform must have 12 numbers, got {len(numbers)}.")
        return _Use(part, attributes.get("objectid", ""), np.array(numbers, dtype=np.float64).reshape(4, 3))


def _take(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows of a table, NaN for those that it does not have."""
    values = np.concatenate([values, np.full((1, values.shape[1]), np.nan)])
    return values[np.where((rows >= 0) & (rows < len(values) - 1), rows, len(values) - 1)]


def _hex_color(text: str | None) -> tuple[float, ...]:
    """#RRGGBB or #RRGGBBAA as (3,) in [0, 1], NaN if it is neither."""
    try:
        return tuple(int((text or "").strip()[start : start + 2], 16) / 255 for start in (1, 3, 5))
    except ValueError:
        return (np.nan,) * 3


def _integers(text: str | None) -> list[int]:
    return [int(word) for word in (text or "").split()]


_ROW_READERS: dict[str, Callable] = {
    "base": lambda attributes: _hex_color(attributes.get("displaycolor")),
    "color": lambda attributes: _hex_color(attributes.get("color")),
    "tex2coord": lambda attributes: (float(attributes.get("u")), float(attributes.get("v"))),
    "composite": lambda attributes: [float(word) for word in attributes.get("values", "").split()],
    "multi": lambda attributes: _integers(attributes.get("pindices")),
}


# ---- 3MF ------------------------------------------------------------------------------------------------------------


def read_3mf(path: Path) -> Points | list[Surface]:
    """A 3MF: what its build places, with base materials, color groups and textures."""
    check_zip(path)
    with zipfile.ZipFile(path) as archive_file:
        reader = _Reader(path, archive_file)
        surfaces = reader.read()
    reader.textures.warn_missing()
    return surfaces if surfaces else Points(np.zeros((0, 3)), None)


class _Reader:
    """An open 3MF: its members, and its models, each parsed once."""

    def __init__(self, path: Path, archive_file: zipfile.ZipFile):
        self.archive = archive_file
        self.textures = TextureFiles()
        self._members = {self._key(name): name for name in archive_file.namelist()}
        self._models: dict[str, _ModelTarget] = {}
        self._counts: dict[tuple[str, str], tuple[int, int]] = {}
        self._materials: dict[tuple[str, str], Material | None] = {}
        self._meshes: dict[tuple[str, str], list[Surface]] = {}
        self._num_placed = 0

    @staticmethod
    def _key(name: str) -> str:
        return posixpath.normpath("/" + name.replace("\\", "/").lstrip("/")).lower()

    def read(self) -> list[Surface]:
        models = [key for key in self._members if key.endswith(".model")]
        root = "/3d/3dmodel.model" if "/3d/3dmodel.model" in models else min(models, key=len, default=None)
        relations = self._members.get("/_rels/.rels")
        if relations is not None:
            tree = self._xml(self.archive.read(relations))
            targets = [self._key(e.get("Target", "")) for e in tree.iter() if str(e.get("Type")).endswith("/3dmodel")]
            root = next((target for target in targets if target in self._members), root)
        if root is None:
            raise PointCloudError("this is no 3MF: its archive holds no .model.")
        model = self._model(root)
        items = model.items or [_Use(root, object_id, np.eye(4, 3)) for object_id in self._top_objects(model)]
        totals = [self._count((self._key(item.part), item.object_id), ()) for item in items]
        check_num_faces(sum(faces for faces, _ in totals))
        if sum(uses for _, uses in totals) > limits().max_objects:
            raise PointCloudError(
                f"it places more than the {limits().max_objects:,} objects allowed. Merge them first."
            )
        return [surface for item in items for surface in self._place(item, np.eye(4))]

    @staticmethod
    def _top_objects(model: _ModelTarget) -> list[str]:
        inner = {use.object_id for item in model.objects.values() for use in item.components}
        return [object_id for object_id in model.objects if object_id not in inner]

    @staticmethod
    def _xml(data: bytes) -> Any:
        etree = import_reader("lxml.etree", "lxml")
        if b"<!DOCTYPE" in data:
            raise PointCloudError("it has a document type with entities, which 3MF does not allow.")
        return etree.fromstring(data, etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False))

    def _model(self, key: str) -> _ModelTarget:
        if key not in self._models:
            if key not in self._members:
                raise PointCloudError(f"its part {key!r} is missing in the archive. Export it again.")
            etree, target = import_reader("lxml.etree", "lxml"), _ModelTarget(key)
            parser = etree.XMLParser(target=target, resolve_entities=False, no_network=True, huge_tree=False)
            parser.feed(target.take_lists(self.archive.read(self._members[key])))
            self._models[key] = parser.close()
        return self._models[key]

    def _object(self, key: tuple[str, str]) -> _Object:
        item = self._model(key[0]).objects.get(key[1])
        if item is None:
            raise PointCloudError(f"it places object {key[1][:40]!r}, which {key[0]} does not have. Export it again.")
        return item

    def _count(self, key: tuple[str, str], above: tuple) -> tuple[int, int]:
        """Faces and objects that placing an object places, before anything is placed."""
        if key in above or len(above) > limits().max_depth:
            raise PointCloudError(
                f"its objects contain themselves, or are nested deeper than {limits().max_depth} times."
            )
        if key not in self._counts:
            item = self._object(key)
            inner = [self._count((self._key(use.part), use.object_id), (*above, key)) for use in item.components]
            faces = len(item.triangles) // 7 + sum(faces for faces, _ in inner)
            self._counts[key] = (faces, 1 + sum(uses for _, uses in inner))
        return self._counts[key]

    def _place(self, use: _Use, outer: np.ndarray, above: tuple[Node, ...] = ()) -> Iterator[Surface]:
        key = (self._key(use.part), use.object_id)
        matrix = np.column_stack([use.matrix, [0, 0, 0, 1]]) @ outer
        self._num_placed += 1
        nodes = (*above, Node(self._num_placed, name)) if (name := self._object(key).name) else above
        if key not in self._meshes:
            self._meshes[key] = self._mesh_surfaces(key[0], self._object(key))
        for surface in self._meshes[key]:
            corners = surface.corners @ matrix[:3, :3] + matrix[3, :3]
            yield Surface(corners, surface.color, surface.uv, surface.material, nodes)
        for inner in self._object(key).components:
            yield from self._place(inner, matrix, nodes)

    def _mesh_surfaces(self, part: str, item: _Object) -> list[Surface]:
        """An object's own triangles, those with a texture apart."""
        if not len(item.triangles):
            return []
        model = self._models[part]
        coord = np.frombuffer(item.vertices).reshape(-1, 3)
        table = np.frombuffer(item.triangles, dtype=np.int64).reshape(-1, 7)
        check_indices(table[:, :3], len(coord))
        color = np.full((len(table), 3, 4), np.nan, dtype=np.float32)
        is_flat, surfaces = np.ones(len(table), dtype=bool), []
        names = [name if name in model.groups else None for name in model.pids]
        numbers = np.append([-1 if name is None else number for number, name in enumerate(names)], -1)[table[:, 6]]
        for number, here in split_groups(numbers.astype(np.int64)):
            if number < 0:
                continue
            values, material = self._properties(model, names[number])
            values = _take(values, table[here, 3:6])  # (F, 3, 2 or 3)
            if material is None:
                color[here] = np.concatenate([values, np.ones_like(values[..., :1])], axis=-1)
            else:
                surfaces.append(Surface(coord[table[here, :3]], None, values, material))
                is_flat[here] = False
        if is_flat.any():
            has_color = np.isfinite(color[is_flat]).all(axis=-1).any()
            surfaces.append(Surface(coord[table[is_flat, :3]], color[is_flat] if has_color else None))
        return surfaces

    def _properties(self, model: _ModelTarget, pid: str, depth: int = 0) -> tuple[np.ndarray, Material | None]:
        """Rows of a group: colors (K, 3), or with a material positions in its texture (K, 2)."""
        group = model.groups.get(pid)
        nothing = np.zeros((0, 3))
        if group is None or not group.rows or depth > 1:
            return nothing, None
        read = group.attributes.get
        if group.kind == "texture2dgroup":
            material = self._texture(model, read("texid", ""))
            return (nothing, None) if material is None else (np.array(group.rows), material)
        if group.kind in ("basematerials", "colorgroup"):
            return np.array(group.rows), None
        if group.kind == "compositematerials":
            base, _ = self._properties(model, read("matid", ""), depth + 1)
            chosen = _integers(read("matindices"))
            if base.shape[1] != 3 or not all(0 <= index < len(base) for index in chosen):
                return nothing, None
            shares = np.array([(row + [0.0] * len(chosen))[: len(chosen)] for row in group.rows])
            return shares @ base[chosen] / np.maximum(shares.sum(axis=1, keepdims=True), 1e-9), None
        layers = [self._properties(model, inner, depth + 1) for inner in read("pids", "").split()]
        order = [index for index, layer in enumerate(layers) if len(layer[0])]
        if not order:
            return nothing, None
        top = next((index for index in order if layers[index][1] is not None), order[-1])  # a texture, else the last
        values, material = layers[top]
        rows = np.array([row[top] if top < len(row) else -1 for row in group.rows])
        return _take(values, rows), material

    def _texture(self, model: _ModelTarget, texture_id: str) -> Material | None:
        key = (model.part, texture_id)
        if key not in self._materials:
            attributes = model.textures.get(texture_id, {})
            name, pixels = attributes.get("path", ""), None
            member = self._members.get(self._key(name)) or self._members.get(
                self._key(posixpath.join(posixpath.dirname(model.part), name))
            )
            if member is None:
                self.textures.lose(name, "not found")
            else:
                pixels = self.textures.decode(name, self.archive.read(member))
            styles = {"mirror": "mirror", "clamp": "clamp", "none": "clamp"}
            wrap = tuple(styles.get(attributes.get(f"tilestyle{axis}", ""), "repeat") for axis in "uv")
            self._materials[key] = None if pixels is None else Material(texture=pixels, wrap=wrap)
        return self._materials[key]


# ---- Table ----------------------------------------------------------------------------------------------------------

SURFACE_READERS: dict[str, Callable[[Path], Any]] = {
    ".ply": read_ply,
    ".obj": read_obj,
    ".off": read_off,
    ".stl": read_stl,
    ".3mf": read_3mf,
}
