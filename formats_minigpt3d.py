"""Further formats with faces through libraries of the extra `formats`, and what is not read; below, how to add a format.

assimp-py 1.1 reads FBX, COLLADA, Blender (before 2.8), 3DS, X3D, AC3D, LightWave, DirectX, ASE, B3D, MilkShape and AMF:
162 of 176 such files of assimp's own test corpus, the others being empty, broken or of lines. It has no VRML and does not
show embedded textures; those of FBX are found here. usd-core 26.11 reads USD.

Shapes: V vertices, F triangles.

To add a format: a reader and its row in scans_minigpt3d.py or text_minigpt3d.py (points), in scenes_minigpt3d.py (surfaces)
or here (through a library); point_cloud_minigpt3d.py joins the tables.
"""

import base64
import gzip
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .meshes_minigpt3d import Material, Surface, check_num_faces, to_srgb
from .readers_minigpt3d import (
    Node,
    PointCloudError,
    check_zip,
    folders_beside,
    import_reader,
    keeps_nodes,
    limits,
    too_few,
    warn,
)
from .surfaces_minigpt3d import (
    OUTSIDE,
    TextureFiles,
    check_indices,
    list_missing,
    says_color,
    split_groups,
    split_polygons,
    why_not_found,
)


_ASSIMP_SUFFIXES = (
    ".fbx",
    ".dae",
    ".zae",
    ".blend",
    ".3ds",
    ".x3d",
    ".ac",
    ".lwo",
    ".x",
    ".ase",
    ".b3d",
    ".ms3d",
    ".amf",
)
# What assimp names the material that it adds, in gray, where a file has none.
_NO_MATERIAL = ("DefaultMaterial", "%%%DEFAULT", "")
_DIFFUSE, _BASE_COLOR = 1, 12  # kinds of textures


# ---- assimp ---------------------------------------------------------------------------------------------------------


def _read_assimp(path: Path) -> list[Surface]:
    assimp = import_reader("assimp_py", "assimp-py")
    if path.suffix.lower() == ".x3d" and re.search(rb"<\s*([\w.-]+:)?Inline\b", path.read_bytes().replace(b"\0", b"")):
        # assimp opens what it names, wherever it is, but not the lists of names that X3D prescribes
        raise PointCloudError(
            "it shows other files (Inline), which are not read. Export it as .glb, with everything in it."
        )
    if path.suffix.lower() in (".dae", ".zae", ".x3d", ".amf"):
        _check_num_places(path)
    try:
        scene = assimp.import_file(str(path), assimp.Process_Triangulate | assimp.Process_SortByPType)
    except (RuntimeError, ValueError) as error:
        detail = " ".join(re.sub(r"^Assimp error loading '.*?':", "", str(error)).split()) or "no mesh is found in it"
        if "triangulated" in detail:
            detail = "it holds lines or points"
        if path.suffix.lower() == ".blend" and _is_new_blend(path):
            raise PointCloudError(
                "it was written by Blender 2.8 or later, whose files assimp-py does not read. Open it in Blender and export "
                "it as .glb."
            ) from error
        raise PointCloudError(
            f"assimp-py cannot read it ({detail[:200]}). Export it as .glb or .obj, with Blender for example."
        ) from error
    placed = list(_walk(scene.root_node))
    check_num_faces(sum(scene.meshes[index].num_faces for index, _, _ in placed))
    textures = TextureFiles()
    embedded = _embedded_textures(path) if path.suffix.lower() == ".fbx" else {}
    materials: dict[int, Material | None] = {}
    surfaces = []
    for index, matrix, nodes in placed:
        mesh = scene.meshes[index]
        if mesh.material_index not in materials:
            properties = scene.materials[mesh.material_index]
            materials[mesh.material_index] = _assimp_material(path, properties, textures, embedded)
        surface = _assimp_surface(mesh, matrix, materials[mesh.material_index])
        surfaces.append(replace(surface, nodes=nodes) if nodes else surface)
    textures.warn_missing()
    if not surfaces:
        raise PointCloudError("it holds no mesh.")
    return surfaces


# Elements that stand for objects of a scene in COLLADA, X3D and AMF.
_PLACES = {"node", "Transform", "Group", "StaticGroup", "Switch", "Collision", "Shape", "constellation", "instance"}


def _check_num_places(path: Path):
    """Count the nodes of a scene whose nodes stand for others by name: a few lines can place 2 ** 24.

    Raises:
        PointCloudError: they are more than `max_nodes`, or a node stands for itself.
    """
    texts = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        check_zip(path)
        with zipfile.ZipFile(path) as archive:
            texts = [archive.read(name) for name in archive.namelist()]
    for text in texts:
        if re.search(rb"instance_node|USE\s*=|<instance", text.replace(b"\0", b"")):  # also in UTF-16
            etree = import_reader("lxml.etree", "lxml")
            root = etree.fromstring(text, etree.XMLParser(recover=True, resolve_entities=False, huge_tree=True))
            if root is not None:
                _check_num_nodes(root)


def _check_num_nodes(root: Any):
    by_name: dict[str, list] = {}
    for element in root.iter("*"):
        for name in {element.get(key) for key in ("id", "name", "sid", "DEF")} - {None}:
            by_name.setdefault(name, []).append(element)
    counts: dict[Any, int] = {}  # 0 while it is counted

    def count(element: Any) -> int:
        if element not in counts:
            counts[element] = 0
            kind = element.tag.rpartition("}")[2]
            name = element.get("USE") or {
                "instance_node": element.get("url", "").removeprefix("#"),
                "instance": element.get("objectid"),
            }.get(kind)
            used = max((count(other) for other in by_name.get(name, ())), default=0)
            counts[element] = (kind in _PLACES) + used + sum(map(count, element.iterchildren("*")))
            if counts[element] > limits().max_nodes:
                raise PointCloudError(f"its scene has more than the {limits().max_nodes:,} nodes allowed.")
        return counts[element]

    count(root)


def _is_new_blend(path: Path) -> bool:
    """Whether Blender 2.80 or later wrote a file; since 3.0 it may be compressed with Zstandard."""
    with open(path, "rb") as stream:
        start = stream.read(17)
    if start.startswith(b"\x1f\x8b"):
        with gzip.open(path) as stream:
            start = stream.read(17)
    version = re.match(rb"BLENDER[^v]*v(\d+)|BLENDER[^V]*V(\d+)", start)  # "BLENDER-v293", "BLENDER17-01v0500"
    return start.startswith(b"\x28\xb5\x2f\xfd") or version is not None and int(version[1] or version[2]) >= 280


def _walk(root: Any) -> Iterator[tuple[int, np.ndarray, tuple[Node, ...]]]:
    """Every mesh at every place, by the number of the mesh, its matrix (4, 4), and its nodes, if they are asked for."""
    stack, num_nodes = [(root, np.eye(4), ())], 0
    while stack:
        node, matrix, above = stack.pop()
        num_nodes += 1
        if num_nodes > limits().max_nodes:
            raise PointCloudError(f"its scene has more than the {limits().max_nodes:,} nodes allowed.")
        matrix = matrix @ np.array(node.transformation)
        nodes = (*above, Node(num_nodes, node.name)) if keeps_nodes() and node.name.strip() else above
        yield from ((index, matrix, nodes) for index in node.mesh_indices)
        stack.extend((child, matrix, nodes) for child in reversed(node.children))


def _assimp_surface(mesh: Any, matrix: np.ndarray, material: Material | None) -> Surface:
    coord = np.asarray(mesh.vertices, dtype=np.float64).reshape(-1, 3)
    faces = np.asarray(mesh.indices, dtype=np.int64).reshape(-1, 3)
    check_indices(faces, len(coord))
    corners = (coord @ matrix[:3, :3].T + matrix[:3, 3])[faces]
    if material is not None and material.texture is not None and mesh.texcoords:
        uv = np.asarray(mesh.texcoords[0], dtype=np.float64).reshape(len(coord), -1)[faces][..., :2]
        return Surface(corners, None, uv, material)
    if mesh.colors:
        color = np.clip(np.asarray(mesh.colors[0], dtype=np.float32).reshape(len(coord), -1), 0, 1)
        if says_color(color):  # many exporters leave a gray or white material beside them
            return Surface(corners, np.concatenate([color[:, :3], np.ones_like(color[:, :1])], axis=1)[faces])
    if material is not None and material.texture is not None:
        material = None
    return Surface(corners, None, None, material)


def _assimp_material(
    path: Path, properties: dict, textures: TextureFiles, embedded: dict[str, bytes]
) -> Material | None:
    """A texture if it has one, which counts alone, as in MTL; else its color."""
    color = np.asarray(properties.get("COLOR_DIFFUSE", ()), dtype=np.float64)[:3]
    has_color = len(color) == 3 and np.isfinite(color).all()
    kinds = properties.get("TEXTURES", {})
    names = kinds.get(_DIFFUSE) or kinds.get(_BASE_COLOR)
    if names:
        name = re.split(r'"+', names[0].strip('"'))[0].removeprefix("file://").removeprefix("//")
        data = embedded.get(_base_name(name))
        if name.startswith("*"):
            textures.lose(name, "embedded, which assimp-py does not show")
            texture = None
        else:
            texture = textures.find(name, folders_beside(path)) if data is None else textures.decode(name, data)
        if texture is not None:
            return Material(texture=texture)
        if not has_color or np.ptp(color) < 1e-3:  # a gray that stood beside the texture
            return None
    if not has_color or (properties.get("NAME", "") in _NO_MATERIAL and np.ptp(color) < 1e-3):
        return None
    return Material(np.append(np.clip(color, 0, 1), 1.0))


def _base_name(name: str) -> str:
    return re.split(r"[\\/]", name)[-1].lower()


def _embedded_textures(path: Path) -> dict[str, bytes]:
    """The images inside an FBX by their names without folders: a name, then the content."""
    data = path.read_bytes()
    images, name = {}, ""
    if data.startswith(b"Kaydara"):  # binary: the type R or S, a length of 4 bytes, and the value
        for match in re.finditer(rb"RelativeFilenameS|ContentR", data):
            start = match.end() + 4
            value = data[start : start + int.from_bytes(data[match.end() : start], "little")]
            if match[0] == b"ContentR":
                images[name] = value
            else:
                name = _base_name(value.decode("utf-8", "replace"))
        return images
    for match in re.finditer(rb'(?:RelativeFilename|Content):\s*,?\s*"([^"]*)"((?:\s*,\s*"[^"]*")*)', data):
        if match[0].startswith(b"C"):
            text = re.sub(rb'[\s",]', b"", match[1] + match[2])
            images[name] = base64.b64decode(text + b"=" * (-len(text) % 4))
        else:
            name = _base_name(match[1].decode("utf-8", "replace"))
    return images


# ---- USD ------------------------------------------------------------------------------------------------------------


def _check_usd(path: Path):
    """Compare the table of contents of each binary part with its size: usd-core allocates what it says.

    Raises:
        PointCloudError: they disagree.
    """
    if zipfile.is_zipfile(path):
        check_zip(path)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.lower().endswith((".usd", ".usdc"))]
            parts = [archive.read(name) for name in names]
    else:
        parts = [path.read_bytes()]
    for part in parts:
        if part.startswith(b"PXR-USDC"):
            start = int.from_bytes(part[16:24], "little")
            num_sections = int.from_bytes(part[start : start + 8], "little")
            if start + 8 + 32 * num_sections > len(part):
                raise too_few(f"{num_sections:,} sections from byte {start:,}", f"it has {len(part):,} bytes")


class _UsdFolder:
    """A USD file, and what it names in its folder.

    usd-core opens whatever a layer names (sublayers, references, payloads, value clips): absolute paths, those that lead out
    of the folder, and names that are in the working directory only. So each layer is opened alone first, and names of other
    layers are taken out of it, in memory. usd-core then composes these very layers. Textures are checked where they are read.

    Attributes:
        root: the layer of the file.
        missing: the names that were taken out, and why.
    """

    def __init__(self, path: Path):
        self._sdf, self._ar, self._utils = (
            import_reader(f"pxr.{name}", "usd-core") for name in ("Sdf", "Ar", "UsdUtils")
        )
        self._folder = path.parent.resolve()
        self._checked: set[str] = set()
        self.missing: dict[str, str] = {}
        self._layers: dict[str, Any] = {}  # usd-core forgets a layer that nobody holds
        self._waiting: list[Any] = []
        self.root = self._open(str(path.absolute()))
        while self._waiting:
            layer = self._waiting.pop()
            self._utils.ModifyAssetPaths(layer, partial(self._confine, layer))

    def has(self, resolved: str) -> bool:
        """Whether a file, which may be in a package, is in the folder."""
        file = self._ar.SplitPackageRelativePathOuter(resolved)[0]
        return bool(file) and Path(file).resolve().is_relative_to(self._folder)

    def _open(self, identifier: str) -> Any:
        file = self._ar.SplitPackageRelativePathOuter(identifier)[0]
        if file not in self._checked:
            self._checked.add(file)
            _check_usd(Path(file))
        layer = self._sdf.Layer.FindOrOpen(identifier)
        if layer.identifier not in self._layers:
            self._layers[layer.identifier] = layer
            self._waiting.append(layer)
        return layer

    def _confine(self, layer: Any, name: str) -> str:
        """What stands in a layer for the path of a file: of another layer its own path, or nothing if it is not read.

        Raises:
            PointCloudError: it leads out of a package, in which nothing can be replaced.
        """
        bare = self._sdf.Layer.SplitIdentifier(name)[0]
        suffix = bare and self._sdf.FileFormat.GetFileExtension(bare)
        if not suffix or self._sdf.FileFormat.FindByExtension(suffix) is None:
            return name
        path = layer.ComputeAbsolutePath(bare)
        resolved = self._ar.GetResolver().Resolve(path).GetPathString()
        package, packed = self._ar.SplitPackageRelativePathOuter(layer.realPath)
        is_template = "#" in bare and not resolved  # of value clips, with digits in their place
        if packed or layer.GetFileFormat().IsPackage():
            if self._ar.SplitPackageRelativePathOuter(resolved or path)[0] != package and (resolved or is_template):
                raise PointCloudError(
                    f"a file in this package names {name!r}, which is outside of it. Export it again."
                )
            return name
        if is_template:
            resolved = str(Path(layer.realPath).parent / bare)
        if not resolved:
            self.missing[name] = why_not_found(name)
        elif not self.has(resolved):
            self.missing[name] = OUTSIDE
        elif is_template:
            return resolved
        else:
            try:
                return self._open(resolved).identifier
            except (_usd_error(), PointCloudError):
                self.missing[name] = "corrupt"
        return ""


def _usd_error() -> type[Exception]:
    """What usd-core raises; the text has several lines."""
    return import_reader("pxr.Tf", "usd-core").ErrorException


def _read_usd(path: Path) -> list[Surface]:
    usd = import_reader("pxr.Usd", "usd-core")
    geometry, shading = import_reader("pxr.UsdGeom", "usd-core"), import_reader("pxr.UsdShade", "usd-core")
    try:
        folder = _UsdFolder(path)
        stage = usd.Stage.Open(folder.root)
    except _usd_error() as error:
        raise PointCloudError("usd-core cannot open it. The file is corrupt; export it again.") from error
    if folder.missing:
        warn(f"parts are missing: {list_missing(folder.missing)}.")
    textures, surfaces, num_faces = TextureFiles(), [], 0
    numbers: dict[str, int] = {}  # of prims by their path
    materials: dict[str, Material | None] = {}
    time = usd.TimeCode.EarliestTime()  # what is not animated has one value for all times
    transforms = geometry.XformCache(time)
    for num_prims, prim in enumerate(usd.PrimRange(stage.GetPseudoRoot(), usd.TraverseInstanceProxies())):
        if num_prims > limits().max_nodes:
            raise PointCloudError(f"its scene has more than the {limits().max_nodes:,} nodes allowed.")
        imageable = geometry.Imageable(prim)
        if not prim.IsA(geometry.Mesh) or imageable.ComputePurpose() in ("proxy", "guide"):
            continue
        if imageable.ComputeVisibility(time) == "invisible":
            continue
        mesh = geometry.Mesh(prim)
        coord = np.array(mesh.GetPointsAttr().Get(time) or (), dtype=np.float64).reshape(-1, 3)
        counts = np.array(mesh.GetFaceVertexCountsAttr().Get(time) or (), dtype=np.int64)
        indices = np.array(mesh.GetFaceVertexIndicesAttr().Get(time) or (), dtype=np.int64)
        if counts.sum() != len(indices) or (counts < 0).any():
            raise PointCloudError("a mesh has faces with missing corners. The file is corrupt; export it again.")
        check_indices(indices, len(coord))
        num_faces += int(np.maximum(counts - 2, 0).sum())
        check_num_faces(num_faces)
        corners, polygon = split_polygons(counts)
        matrix = np.array(transforms.GetLocalToWorldTransform(prim))
        coord = coord @ matrix[:3, :3] + matrix[3, :3]
        whole = _UsdMesh(coord[indices[corners]], geometry.PrimvarsAPI(prim), time, indices, corners, polygon)
        pieces = [(prim, np.arange(len(polygon)))]
        subsets = shading.MaterialBindingAPI(prim).GetMaterialBindSubsets()
        if subsets:
            owner = np.zeros(len(counts), dtype=np.int64)
            for number, subset in enumerate(subsets, start=1):
                chosen = np.array(subset.GetIndicesAttr().Get(time) or (), dtype=np.int64)
                owner[chosen[(chosen >= 0) & (chosen < len(counts))]] = number
            prims = [prim, *(subset.GetPrim() for subset in subsets)]
            pieces = [(prims[number], np.arange(len(polygon))[here]) for number, here in split_groups(owner[polygon])]
        for owner_prim, here in pieces:
            bound = shading.MaterialBindingAPI(owner_prim).ComputeBoundMaterial()[0]
            key = str(bound.GetPath()) if bound else ""
            if key not in materials:
                materials[key] = _usd_material(bound, time, textures, folder, path) if bound else None
            surface = whole.surface(here, materials[key])
            surfaces.append(replace(surface, nodes=_usd_nodes(prim, numbers)) if keeps_nodes() else surface)
    textures.warn_missing()
    if not surfaces:
        raise PointCloudError("it holds no mesh.")
    return surfaces


def _usd_nodes(prim: Any, numbers: dict[str, int]) -> tuple[Node, ...]:
    """A prim and those above it, outermost first."""
    paths = [path for path in prim.GetPath().GetPrefixes() if path.IsPrimPath()]
    return tuple(Node(numbers.setdefault(str(path), len(numbers)), path.name) for path in paths)


class _UsdMesh:
    """A mesh's triangles (F, 3, 3), and what it says about their corners."""

    def __init__(
        self,
        corners: np.ndarray,
        primvars: Any,
        time: Any,
        indices: np.ndarray,
        positions: np.ndarray,
        polygon: np.ndarray,
    ):
        self.corners, self._time = corners, time
        self._indices, self._positions, self._polygon = indices, positions, polygon
        self._color = self._values(primvars.GetPrimvar("displayColor"), 3)
        names = ("st", "UVMap", "st0", "uv", "st1")
        self._uv = next(
            (uv for uv in (self._values(primvars.GetPrimvar(name), 2) for name in names) if uv is not None), None
        )

    def _values(self, primvar: Any, width: int) -> np.ndarray | None:
        """Of every triangle's corners, (F, 3, width)."""
        values = primvar.ComputeFlattened(self._time) if primvar and primvar.HasValue() else None
        values = np.array([] if values is None else values, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != width or not len(values):
            return None
        by = {
            "constant": np.zeros((len(self._polygon), 3), dtype=np.int64),
            "uniform": np.repeat(self._polygon[:, None], 3, axis=1),
            "faceVarying": self._positions,
        }
        index = by.get(primvar.GetInterpolation(), self._indices[self._positions])
        return values[index] if index.size and index.max() < len(values) else None

    def surface(self, here: np.ndarray, material: Material | None) -> Surface:
        if material is not None and (material.texture is None or self._uv is not None):
            return Surface(self.corners[here], None, None if self._uv is None else self._uv[here], material)
        if self._color is None:
            return Surface(self.corners[here])
        color = to_srgb(np.clip(self._color[here], 0, 1))  # displayColor is linear
        return Surface(self.corners[here], np.concatenate([color, np.ones_like(color[..., :1])], axis=-1))


def _usd_material(bound: Any, time: Any, textures: TextureFiles, folder: _UsdFolder, path: Path) -> Material | None:
    """The texture or color of a UsdPreviewSurface."""
    shader = bound.ComputeSurfaceSource()[0]
    entry = shader.GetInput("diffuseColor") if shader else None
    if not entry:
        return None
    source = entry.GetConnectedSources()[0] if entry.HasConnectedSource() else []
    if source:
        file = import_reader("pxr.UsdShade", "usd-core").Shader(source[0].source.GetPrim()).GetInput("file")
        asset = file.Get(time) if file else None
        name = asset.path if asset else ""
        resolution = import_reader("pxr.Ar", "usd-core")
        resolved = asset.resolvedPath if asset else ""
        is_inside = folder.has(resolved)
        opened = resolution.GetResolver().OpenAsset(resolution.ResolvedPath(resolved)) if is_inside else None
        if opened is not None:
            texture = textures.decode(name, bytes(opened.GetBuffer()))
        else:
            texture = textures.find(name, folders_beside(path))
        return None if texture is None else Material(texture=texture)
    color = entry.Get(time)
    return None if color is None else Material(np.append(np.clip(np.array(color), 0, 1), 1.0), linear=True)


# ---- Tables ---------------------------------------------------------------------------------------------------------

FORMAT_READERS: dict[str, Callable[[Path], Any]] = dict.fromkeys(_ASSIMP_SUFFIXES, _read_assimp) | dict.fromkeys(
    (".usd", ".usda", ".usdc", ".usdz"), _read_usd
)
# Known formats that are not read, and what to do.
CONVERSIONS: dict[str, str] = {
    suffix: remedy
    for remedy, suffixes in {
        "Export it as .glb, .obj or .ply from the program that wrote it, or with Blender or MeshLab.": (
            ".wrl .vrml .wrz .x3dv .x3db .x3dz .acc .max .ma .mb .c4d .skp .lxo .jt .3dm .blend1 .vtk .vtp .drc"
        ),
        "It holds exact shapes and no mesh. Export it as .stl, .3mf or .obj from a CAD program, FreeCAD for example.": (
            ".step .stp .iges .igs .brep .ifc .dwg .dxf .sldprt .ipt .f3d .fcstd .scad"
        ),
        "Export it as an uncompressed .ply.": ".splat .spz .ksplat .sog .bag .mcap .pcap",
        "Export it as .e57 or .pts.": ".ptx .rcp .rcs .fls .lsproj .zfs .imp",
        "Save it as .csv.": ".parquet .feather .xls .xlsx .ods .mat .h5 .hdf5",
        "Save its points as .npy.": ".pt .pth .pkl .pickle .safetensors",
        "Unpack it.": ".zip .tar .tgz .7z .rar .bz2 .xz .zst",
        "It is a picture and not a 3D object.": ".png .jpg .jpeg .heic .tif .tiff .webp",
    }.items()
    for suffix in suffixes.split()
}
