"""Surfaces: files and trimesh objects with faces, points sampled evenly over them, and the colors of those points.

Colors come from faces, vertices, textures or materials, whichever the mesh has.

Shapes: V vertices, F faces, P points sampled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .readers_minigpt3d import (
    PointCloudError,
    Points,
    check_zip,
    import_reader,
    read_ply_header,
    read_ply_points,
    report_dropped,
)


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_ply(path: Path) -> Points | Any:
    """A PLY: as a trimesh `Scene` if it has faces, else its points."""
    header = read_ply_header(path)
    return _read_mesh(path) if header.counts.get("face") else read_ply_points(path, header)


def _read_mesh(path: Path) -> Points | Any:
    if path.suffix.lower() == ".3mf":
        check_zip(path)
        import_reader("networkx")
        import_reader("lxml")
    return open_trimesh(import_reader("trimesh").load(str(path), process=False))


MESH_READERS: dict[str, Callable[[Path], Any]] = dict.fromkeys(
    (".obj", ".stl", ".off", ".glb", ".gltf", ".3mf"), _read_mesh
)


def open_trimesh(source: Any) -> Points | Any:
    """A trimesh object as a `Scene`; if it has no faces, its vertices as `Points`."""
    trimesh = import_reader("trimesh")
    scene = source if isinstance(source, trimesh.Scene) else trimesh.Scene([source])
    if any(isinstance(geometry, trimesh.Trimesh) and len(geometry.faces) for geometry in scene.geometry.values()):
        return scene
    clouds = [
        Points(_transform(geometry.vertices, matrix), _vertex_colors(geometry))
        for geometry, matrix in _instances(scene)
        if hasattr(geometry, "visual") and len(geometry.vertices)  # paths have none
    ]
    if not clouds:
        return Points(np.zeros((0, 3)), None)
    all_colored = all(cloud.color is not None for cloud in clouds)
    color = np.concatenate([cloud.color for cloud in clouds]) if all_colored else None
    return Points(np.concatenate([cloud.coord for cloud in clouds]), color)


def _instances(scene: Any) -> list[tuple[Any, np.ndarray]]:
    """Every geometry at every place where the scene graph puts it, in an order that is independent of node names."""
    order = {name: index for index, name in enumerate(scene.geometry)}
    placed = [scene.graph[node] for node in scene.graph.nodes_geometry]  # (matrix, geometry's name)
    placed.sort(key=lambda item: (order[item[1]], np.asarray(item[0]).tolist()))
    return [(scene.geometry[name], np.asarray(matrix)) for matrix, name in placed]


def _transform(vertices: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.asarray(vertices, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]  # (V, 3)


def _vertex_colors(geometry: Any) -> np.ndarray | None:
    """(V, 3) uint8 colors of a trimesh geometry's vertices, or None where it has none."""
    if geometry.visual.kind != "vertex":
        return None
    color = np.asarray(geometry.visual.vertex_colors)
    return color[:, :3] if len(color) == len(geometry.vertices) else None


# ---- Sampling -------------------------------------------------------------------------------------------------------


def sample_surface(
    scene: Any, num_points: int, missing_color: np.ndarray, rng: np.random.Generator, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sample points evenly over the surface of a scene's meshes.

    Args:
        scene: a trimesh `Scene` with at least one mesh.
        num_points: P.
        missing_color: (3,) in [0, 1], for surfaces without color.
        rng: chooses the points.
        name: of the source, for warnings.

    Returns:
        coord (P, 3) float64 and color (P, 3) in [0, 1].

    Raises:
        PointCloudError: most faces are not finite, or none has an area.
    """
    meshes = [(mesh, matrix) for mesh, matrix in _instances(scene) if len(getattr(mesh, "faces", ()))]
    corners = np.concatenate([_transform(mesh.vertices, matrix)[mesh.faces] for mesh, matrix in meshes])  # (F, 3, 3)
    good = np.isfinite(corners).all(axis=(1, 2))
    if not good.all():
        report_dropped(good, "faces", name)
        corners[~good] = 0  # no area, never chosen
    edges = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    cumulative = np.cumsum(area)
    if not cumulative[-1] > 0:
        raise PointCloudError(f"none of its {len(area):,} faces has an area, so there is no surface to sample.")
    chosen = np.searchsorted(cumulative, rng.random(num_points) * cumulative[-1], side="right")  # (P,)

    # Uniform in a triangle: https://www.cs.princeton.edu/~funk/tog02.pdf, §4.2
    root, along = np.sqrt(rng.random(num_points)), rng.random(num_points)
    weights = np.stack([1 - root, root * (1 - along), root * along], axis=1)  # (P, 3)
    coord = np.einsum("pk,pkd->pd", weights, corners[chosen])

    color = np.empty((num_points, 3))
    starts = np.cumsum([0, *(len(mesh.faces) for mesh, _ in meshes)])
    for (mesh, _), start, end in zip(meshes, starts, starts[1:], strict=False):
        here = (start <= chosen) & (chosen < end)
        if here.any():
            mesh_color = _surface_colors(mesh, chosen[here] - start, weights[here])
            color[here] = np.where(np.isnan(mesh_color), missing_color, mesh_color)
    return coord, color


# ---- Colors ---------------------------------------------------------------------------------------------------------


def _surface_colors(mesh: Any, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Colors (P, 3) in [0, 1] at points of a mesh, given by face (P,) and barycentric weights (P, 3); NaN where it has none."""
    visual = mesh.visual
    if visual.kind == "face":
        return visual.face_colors[faces, :3] / 255
    if visual.kind == "vertex":
        return np.einsum("pk,pkd->pd", weights, visual.vertex_colors[mesh.faces[faces], :3] / 255)
    color = np.full((len(faces), 3), np.nan)
    if visual.kind != "texture":
        return color
    uv = visual.uv
    if uv is not None and len(uv) == len(mesh.vertices):
        uv = np.einsum("pk,pkd->pd", weights, np.asarray(uv, dtype=np.float64)[mesh.faces[faces], :2])  # (P, 2)
    else:
        uv = None
    materials, index = [visual.material], np.zeros(len(faces), dtype=int)
    if getattr(visual, "face_materials", None) is not None:
        materials, index = visual.material.materials, np.asarray(visual.face_materials)[faces]
    for number in np.unique(index):
        here = index == number
        color[here] = _material_colors(materials[number], None if uv is None else uv[here])
    return color


def _material_colors(material: Any, uv: np.ndarray | None) -> np.ndarray:
    """A material's texture at uv (P, 2) → (P, 3), times its color where the format says so; without texture its color, (3,)."""
    is_pbr = hasattr(material, "baseColorFactor")
    image = material.baseColorTexture if is_pbr else getattr(material, "image", None)
    if is_pbr and material.baseColorFactor is None:
        base = np.ones(3)  # glTF's default
    else:
        base = np.asarray(material.main_color, dtype=np.float64)[:3] / 255
    if not is_pbr and _is_placeholder(material, image):
        return np.full(3, np.nan)
    if image is None or uv is None:
        return base
    pixels = np.asarray(image.convert("RGB"))  # (height, width, 3), the first row is v = 1
    height, width = pixels.shape[:2]
    uv = np.where(np.isfinite(uv), uv, 0) % 1  # textures repeat
    column = np.minimum((uv[:, 0] * width).astype(int), width - 1)
    row = np.minimum(((1 - uv[:, 1]) * height).astype(int), height - 1)
    color = pixels[row, column] / 255
    # glTF multiplies both. In MTL many exporters leave Kd at black beside a texture, so there the texture counts alone.
    return color * base if is_pbr else color


def _is_placeholder(material: Any, image: Any) -> bool:
    """Whether trimesh made the color up: a gray where the file names no material, or a material no color."""
    properties = getattr(material, "kwargs", {})
    if properties.get("kd") is not None:
        return False
    visual = import_reader("trimesh").visual
    if image is None:
        return np.array_equal(material.main_color, visual.color.DEFAULT_COLOR)
    default = visual.material.empty_material().image
    return not properties and image.size == default.size and image.tobytes() == default.tobytes()
