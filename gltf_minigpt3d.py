"""glTF 2.0 files (.gltf and .glb) as surfaces, or points if they have no triangles.

Read here, on numpy, since no library reads it all. Of 41 test files, trimesh 5.2 read 18 with their true colors: it drops
vertex colors beside a material, takes factors for sRGB, and knows no second texture coordinate, texture transform, wrap
mode, alpha mask, sparse accessor, fan or skin. assimp-py 1.1 gives no embedded textures, refuses 9 and crashes on 1.
Compressed parts need a library each: DracoPy (KHR_draco_mesh_compression), meshopt (EXT_meshopt_compression) and
opengl_basisu (KHR_texture_basisu).

The specification calls `COLOR_0` linear, but scanners and most exporters store sRGB in it, so it is read as sRGB, except
from Blender, which follows the specification. `baseColorFactor` is linear.

Shapes: V vertices, F faces, I instances of a mesh, C components of a value.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .gltf_file_minigpt3d import GltfFile, Values, import_decoder, read_vector
from .meshes_minigpt3d import Material, Surface, check_num_faces, paint, to_srgb
from .readers_minigpt3d import Node, PointCloudError, Points, keeps_nodes, limits, warn


_DRACO = "KHR_draco_mesh_compression"
_FACES_AT_ONCE = 4096
# Those that are read, and those that change neither shape nor color.
_KNOWN_EXTENSIONS = (
    "KHR_materials_",
    "KHR_texture_",
    "EXT_texture_",
    "MSFT_texture_",
    "KHR_mesh_quantization",
    _DRACO,
)
_KNOWN_EXTENSIONS += (
    "EXT_meshopt_",
    "KHR_meshopt_",
    "EXT_mesh_gpu_instancing",
    "KHR_lights_",
    "KHR_animation_",
    "KHR_xmp",
)
_READ_ATTRIBUTES = ("POSITION", "COLOR_0", "TEXCOORD_", "JOINTS_", "WEIGHTS_")
_NUM_COMPONENTS = {"POSITION": (3,), "COLOR": (3, 4), "TEXCOORD": (2,), "JOINTS": (4,), "WEIGHTS": (4,)}

# ---- The scene ------------------------------------------------------------------------------------------------------


def _locals(nodes: list[dict]) -> np.ndarray:
    """The matrices (N, 4, 4) of nodes below their parents, all at once: one by one takes ten times as long."""
    defaults = {"translation": (0, 0, 0), "rotation": (0, 0, 0, 1), "scale": (1, 1, 1)}
    columns = (
        np.array([node.get(key, default) for node in nodes], dtype=np.float64).reshape(len(nodes), len(default))
        for key, default in defaults.items()
    )
    matrices = _matrices(*columns)
    for index, node in enumerate(nodes):
        if "matrix" in node:
            matrices[index] = read_vector(node["matrix"], [0] * 16).reshape(4, 4).T
    return matrices


def _matrices(move: np.ndarray, turn: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Translations (I, 3), quaternions (I, 4) and scales (I, 3) as matrices (I, 4, 4)."""
    norm = np.linalg.norm(turn, axis=1, keepdims=True)
    x, y, z, w = np.where(norm > 0, turn / np.where(norm > 0, norm, 1), [0, 0, 0, 1]).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrices = np.tile(np.eye(4), (len(move), 1, 1))
    matrices[:, :3, :3] = np.moveaxis(np.array(rows), 2, 0) * scale[:, None]
    matrices[:, :3, 3] = move
    return matrices


def _world(file: GltfFile) -> tuple[dict[int, np.ndarray], list[int]]:
    """The matrix (4, 4) of every node, and the nodes of the default scene, in their order.

    Raises:
        PointCloudError: a node has two parents or is below itself.
    """
    nodes = file.items("nodes")
    if len(nodes) > limits().max_nodes:
        raise PointCloudError(
            f"it has {len(nodes):,} nodes, more than the {limits().max_nodes:,} allowed. Join its objects first."
        )
    below = {child for node in nodes for child in node.get("children", ())}
    roots = [index for index in range(len(nodes)) if index not in below]
    scene_roots = file.item("scenes", file.json.get("scene", 0)).get("nodes", []) if file.items("scenes") else roots
    world: dict[int, np.ndarray] = {}
    local = _locals(nodes)

    def walk(index: int):
        stack = [(index, None)]
        while stack:
            index, parent = stack.pop()
            if index in world:
                raise PointCloudError(
                    f"its node {index} is below itself or has two parents. It is damaged; export it again."
                )
            children = file.item("nodes", index).get("children", [])
            world[index] = local[index] if parent is None else parent @ local[index]
            stack += [(child, world[index]) for child in reversed(children)]

    for index in scene_roots:
        walk(index)
    in_scene = list(world)
    for index in roots:  # joints may be outside
        if index not in world:
            walk(index)
    return world, in_scene


def _named_nodes(file: GltfFile) -> dict[int, tuple[Node, ...]]:
    """Of every node itself and those above it that have names, outermost first; nothing if they are not asked for."""
    nodes = file.items("nodes")
    if not keeps_nodes():
        return dict.fromkeys(range(len(nodes)), ())
    above = {child: index for index, node in enumerate(nodes) for child in node.get("children", ())}
    chains: dict[int, tuple[Node, ...]] = {}
    for index in range(len(nodes)):
        path = [index]  # `_world` has checked that there is no cycle
        while path[-1] in above and path[-1] not in chains:
            path.append(above[path[-1]])
        for number in reversed(path):
            name = nodes[number].get("name")
            own = (Node(number, name),) if isinstance(name, str) and name.strip() else ()
            chains.setdefault(number, chains.get(above.get(number), ()) + own)
    return chains


def _placements(file: GltfFile, world: dict[int, np.ndarray], in_scene: list[int]) -> dict[tuple, list[np.ndarray]]:
    """(mesh, skin, weights of its morph targets, nodes) → matrices (I, 4, 4) of the places where it stands."""
    nodes = _named_nodes(file)
    placements: dict[tuple, list[np.ndarray]] = {}
    num_instances = 0
    for index in in_scene:
        node = file.item("nodes", index)
        if "mesh" not in node:
            continue
        weights = node.get("weights", file.item("meshes", node["mesh"]).get("weights")) or ()
        matrices = world[index][None]
        instancing = node.get("extensions", {}).get("EXT_mesh_gpu_instancing")
        if instancing is not None:
            attributes = instancing.get("attributes", {})
            count = min((file.count(number) for number in attributes.values()), default=0)
            num_instances += count
            if num_instances > limits().max_instances:
                raise PointCloudError(
                    f"it has {num_instances:,} instances or more, more than the {limits().max_instances:,} allowed."
                )
            parts = [
                file.accessor(attributes[name]).take(slice(count))
                if name in attributes
                else np.tile(np.array(default, dtype=np.float64), (count, 1))
                for name, default in (("TRANSLATION", [0, 0, 0]), ("ROTATION", [0, 0, 0, 1]), ("SCALE", [1, 1, 1]))
            ]
            matrices = matrices @ _matrices(*parts)
        if "skin" in node:  # it stands where its joints are, wherever its node is
            matrices = np.eye(4)[None]
        placements.setdefault((node["mesh"], node.get("skin"), tuple(weights), nodes[index]), []).append(matrices)
    return placements


def _joints(file: GltfFile, skin_index: int, world: dict[int, np.ndarray]) -> np.ndarray:
    """(J, 4, 4) from a vertex in the pose of the binding to its place at rest."""
    skin = file.item("skins", skin_index)
    joints = skin.get("joints", [])
    if not set(joints) <= world.keys():
        raise PointCloudError(
            f"its skin {skin_index} names joints that are not there. It is damaged; export it again."
        )
    matrices = np.array([world[joint] for joint in joints]).reshape(-1, 4, 4)
    if "inverseBindMatrices" in skin:
        inverse = file.accessor(skin["inverseBindMatrices"]).take(slice(None))
        if len(inverse) < len(joints) or inverse.shape[1] != 16:
            raise PointCloudError(
                f"its skin {skin_index} has {len(joints)} joints and {len(inverse)} matrices; export it again."
            )
        matrices = matrices @ inverse[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
    return matrices


# ---- Meshes ---------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A primitive at all its places."""

    primitive: dict
    mode: int
    num_elements: int  # faces or points at one place
    matrices: np.ndarray  # (I, 4, 4)
    weights: tuple
    joints: np.ndarray | None
    nodes: tuple[Node, ...]


def _parts(file: GltfFile, world: dict[int, np.ndarray], in_scene: list[int]) -> list[_Part]:
    """All primitives of the scene, in the order of its nodes.

    Raises:
        PointCloudError: they are too many; nothing has been read of them yet.
    """
    parts, total = [], 0
    skins: dict[int | None, np.ndarray | None] = {None: None}
    for (mesh, skin, weights, nodes), places in _placements(file, world, in_scene).items():
        matrices = np.concatenate(places)
        if skin not in skins:
            skins[skin] = _joints(file, skin, world)
        for primitive in file.item("meshes", mesh).get("primitives", []):
            mode, position = primitive.get("mode", 4), primitive.get("attributes", {}).get("POSITION")
            if position is None:
                raise PointCloudError(f"its mesh {mesh} has no POSITION; export it again.")
            count = file.count(primitive.get("indices", position))
            if mode not in (0, 1, 2, 3, 4, 5, 6):
                raise PointCloudError(f"its mesh {mesh} has the unknown mode {mode!r:.20}; export it again.")
            elements = {0: count, 4: count // 3, 5: max(count - 2, 0), 6: max(count - 2, 0)}.get(mode, 0)
            total += elements * len(matrices)
            if len(parts) == limits().max_primitives:
                raise PointCloudError(
                    f"its meshes have more than the {limits().max_primitives:,} parts allowed. Join them first."
                )
            parts.append(_Part(primitive, mode, elements, matrices, weights, skins[skin], nodes))
    check_num_faces(total)
    return parts


def _attributes(file: GltfFile, part: _Part) -> tuple[dict[str, Values], np.ndarray]:
    """The values of a primitive by name, and the vertices that its elements name in turn, (N,)."""
    primitive, names = part.primitive, part.primitive["attributes"]
    packed = primitive.get("extensions", {}).get(_DRACO)
    if packed is not None and "bufferView" not in file.item("accessors", names["POSITION"]):
        return _unpack_draco(file, primitive, packed)
    values = {name: file.accessor(number) for name, number in names.items() if name.startswith(_READ_ATTRIBUTES)}
    if "indices" in primitive:
        return values, file.accessor(primitive["indices"]).stored[:, 0]
    return values, np.arange(len(values["POSITION"].stored))


def _unpack_draco(file: GltfFile, primitive: dict, packed: dict) -> tuple[dict[str, Values], np.ndarray]:
    draco = import_decoder("DracoPy", "DracoPy", _DRACO)
    try:
        mesh = draco.decode(file.view(packed.get("bufferView")).tobytes())
        values = {
            name: Values(
                np.asarray(mesh.get_attribute_by_unique_id(number)["data"]),
                file.item("accessors", primitive["attributes"][name]).get("normalized") is True,
            )
            for name, number in packed.get("attributes", {}).items()
            if name.startswith(_READ_ATTRIBUTES)
        }
    except PointCloudError:
        raise
    except Exception as error:
        raise PointCloudError(f"a mesh with {_DRACO} cannot be decoded ({error}); export it again.") from error
    faces = getattr(mesh, "faces", None)
    position = primitive["attributes"]["POSITION"]
    count = len(values["POSITION"].stored)
    order = np.arange(count) if faces is None else np.asarray(faces).reshape(-1)
    expected = file.count(position), file.count(primitive.get("indices", position))
    if (count, len(order)) != expected:
        raise PointCloudError(
            f"a mesh with {_DRACO} holds {count:,} vertices and {len(order):,} corners of faces, and its accessors say "
            f"{expected[0]:,} and {expected[1]:,}. It is damaged; export it again."
        )
    file.allocate(order.nbytes + sum(value.stored.nbytes for value in values.values()))
    return values, order


def _triangles(mode: int, rows: np.ndarray) -> np.ndarray:
    """Vertices in turn, (N,), as faces (F, 3)."""
    if mode == 4:
        return rows[: len(rows) // 3 * 3].reshape(-1, 3)
    first = rows[:-2] if mode == 5 else np.broadcast_to(rows[:1], (max(len(rows) - 2, 0),))
    return np.stack([first, rows[1:-1], rows[2:]], axis=1)


def _vertices(file: GltfFile, part: _Part, values: dict[str, Values], rows: np.ndarray | slice) -> np.ndarray:
    """Positions (V, 3) in double precision, morph targets and joints applied."""
    position = values["POSITION"].take(rows)
    for weight, target in zip(part.weights, part.primitive.get("targets", ()), strict=False):
        if weight and "POSITION" in target:
            position += float(weight) * file.accessor(target["POSITION"]).take(rows)
    if part.joints is None or "JOINTS_0" not in values or "WEIGHTS_0" not in values:
        return position
    placed, total = np.zeros_like(position), np.zeros((len(position), 1))
    for number in range(4):
        if f"JOINTS_{number}" not in values or f"WEIGHTS_{number}" not in values:
            break
        joints, weights = values[f"JOINTS_{number}"].stored[rows], values[f"WEIGHTS_{number}"].take(rows)
        if joints.dtype.kind != "u" or joints.size and joints.max() >= len(part.joints):
            raise PointCloudError("its vertices name joints that are not there. It is damaged; export it again.")
        for joint, weight in zip(joints.T, weights.T, strict=True):
            matrix = part.joints[joint]  # (V, 4, 4)
            placed += weight[:, None] * (np.einsum("vij,vj->vi", matrix[:, :3, :3], position) + matrix[:, :3, 3])
            total += weight[:, None]
    return placed / np.where(total == 0, 1, total)


def _colors(file: GltfFile, values: Values, rows: np.ndarray | slice) -> np.ndarray:
    """(V, 4) of COLOR_0: bytes as they are, else float32 in [0, 1]."""
    color = values.stored[rows]
    if color.dtype.kind == "u":
        color = color if color.dtype == np.uint8 else Values(color, True).take(slice(None), np.float32)
    opaque = 255 if color.dtype == np.uint8 else 1
    if color.shape[1] == 3:
        color = np.column_stack([color, np.full(len(color), opaque, color.dtype)])
    if "Blender" in str(file.json.get("asset", {}).get("generator")):
        color = color / np.float32(opaque)
        color[:, :3] = to_srgb(color[:, :3])
    return color


def _read_part(file: GltfFile, part: _Part) -> list[Surface] | list[Points]:
    values, order = _attributes(file, part)
    for name, value in values.items():
        if value.stored.shape[1] not in _NUM_COMPONENTS[name.partition("_")[0]]:
            raise PointCloudError(f"its {name} has {value.stored.shape[1]} components; export it again.")
    paint_with = file.paint(part.primitive.get("material"))
    num_vertices = min(len(value.stored) for value in values.values())
    if len(order) and (order.dtype.kind not in "ui" or order.max() >= num_vertices):
        raise PointCloudError(
            f"a face names vertex {order.max():,}, and there are {num_vertices:,}. It is damaged; export it again."
        )
    rows: np.ndarray | slice = slice(None)
    if num_vertices > len(order):  # parts may share the vertices of a large mesh
        rows, order = np.unique(order, return_inverse=True)
    position = _vertices(file, part, values, rows)
    if values["POSITION"].stored.dtype == np.float32 and part.joints is None and not part.weights:
        position = position.astype(
            np.float32
        )  # no digit is lost, and an object that is not moved takes half the memory
    color = _colors(file, values["COLOR_0"], rows) if "COLOR_0" in values else None
    uv = values[paint_with.coordinates].take(rows, np.float32) if paint_with.coordinates in values else None
    if uv is not None and paint_with.transform is not None:
        uv = (uv @ paint_with.transform[:, :2].T + paint_with.transform[:, 2]).astype(np.float32)
    elements = order[:, None] if part.mode == 0 else _triangles(part.mode, order)  # (F, 3), or (N, 1) for points
    # np.take is several times faster here than indexing.
    color, uv = (None if stored is None else np.take(stored, elements, axis=0) for stored in (color, uv))
    contents = []
    step = max(1, _FACES_AT_ONCE // max(len(elements), 1))  # large meshes share their colors at all places
    for start in range(0, len(part.matrices), step):
        matrices = part.matrices[start : start + step]
        corners = np.take(_placed(position, matrices), elements, axis=1).reshape(-1, *elements.shape[1:], 3)
        times = (len(matrices), 1, 1)
        content = [
            stored if stored is None or len(matrices) == 1 else np.tile(stored, times) for stored in (color, uv)
        ]
        make = _points if part.mode == 0 else Surface
        contents.append(make(corners, *content, paint_with.material, part.nodes))
    return contents


def _placed(position: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Vertices (V, 3) at all their places, (I, V, 3)."""
    if len(matrices) == 1 and (matrices[0] == np.eye(4)).all():
        return position[None]
    placed = np.matmul(position.astype(np.float64), matrices[:, :3, :3].transpose(0, 2, 1))
    placed += matrices[:, None, :3, 3]
    return placed


def _points(
    corners: np.ndarray, color: np.ndarray | None, uv: np.ndarray | None, material: Material | None, nodes: tuple
) -> Points:
    coord = corners[:, 0]
    if material is None:
        return Points(coord, None if color is None else color[:, 0, :3])
    painted = (
        np.full((len(coord), 4), np.nan) if color is None else color[:, 0] / (255 if color.dtype == np.uint8 else 1)
    )
    uv = np.full((len(coord), 2), np.nan) if uv is None else uv[:, 0]
    return Points(coord, np.clip(paint(material, painted, uv)[0][:, :3], 0, 1))


def read_gltf(path: Path) -> Points | list[Surface]:
    """A glTF file: the surfaces of its default scene, or its points if there are none.

    Raises:
        PointCloudError: it is damaged, holds no object, exceeds a limit, or needs a library that is not installed.
    """
    file = GltfFile(path)
    try:
        with np.errstate(all="ignore"):  # what is not finite is dropped when it is sampled
            return _read_scene(file)
    except PointCloudError:
        raise
    except (
        AttributeError,
        TypeError,
        KeyError,
        ValueError,
        OverflowError,
    ) as error:  # an entry of another type than the format has there
        raise PointCloudError(f"its JSON is not valid glTF 2.0 ({error}). It is damaged; export it again.") from error


def _read_scene(file: GltfFile) -> Points | list[Surface]:
    unknown = [name for name in file.items("extensionsRequired") if not str(name).startswith(_KNOWN_EXTENSIONS)]
    if unknown:
        warn(f"it requires {', '.join(map(str, unknown))[:200]}, which is not read, so parts may be missing.")
    parts = _parts(file, *_world(file))
    has_faces = any(part.mode > 3 and part.num_elements for part in parts)
    parts_read = [part for part in parts if part.num_elements and (part.mode > 3) == has_faces]
    file.measure_textures({part.primitive.get("material") for part in parts_read} - {None})
    contents = [content for part in parts_read for content in _read_part(file, part)]
    file.warn_of_textures()
    if not contents:
        raise PointCloudError("its scene has no triangles and no points. Choose what to export, and export it again.")
    num_skipped = sum(part.mode in ((0, 1, 2, 3) if has_faces else (1, 2, 3)) for part in parts)
    if num_skipped:
        skipped = "points and lines beside its surfaces" if has_faces else "lines"
        warn(f"its {skipped} ({num_skipped} parts) are not read.")
    if has_faces:
        return contents
    colors = [cloud.color for cloud in contents]
    color = None if any(part is None for part in colors) else np.concatenate([_unit(part) for part in colors])
    return Points(np.concatenate([cloud.coord for cloud in contents]), color)


def _unit(color: np.ndarray) -> np.ndarray:
    return color / np.float32(255) if color.dtype == np.uint8 else color


GLTF_READERS = {".glb": read_gltf, ".gltf": read_gltf}
