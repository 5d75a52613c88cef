"""The surface of a mesh as a GLB file that a browser shows, in the colors that the reader found.

Shapes: F faces, V = 3F corners.
"""

from pathlib import Path

import numpy as np

from minigpt3d.files import write_bytes
from minigpt3d.meshes_minigpt3d import Material, Surface, paint, to_linear
from minigpt3d.point_cloud_minigpt3d import NAMED_COLORS, read_content


# A browser turns so many faces fluently; more are merged.
MAX_FACES = 1_000_000
MAX_TEXTURE_SIDE = 2048
FINEST_GRID = 2048  # cells along the longest side


def write_surface(source: str | Path, target: Path, missing_color: str):
    """Write what a file with faces looks like.

    Args:
        source: a file whose facts have `num_faces`.
        target: GLB to write, as the file is, without turning.
        missing_color: a name in `NAMED_COLORS` for faces without color.

    Raises:
        PointCloudError: the file cannot be read.
    """
    surfaces = merge_faces(read_content(source), MAX_FACES)
    write_bytes(target, to_scene(surfaces, NAMED_COLORS[missing_color]).export(file_type="glb"))


def merge_faces(surfaces: list[Surface], most: int) -> list[Surface]:
    """Surfaces with at most about this number of faces: corners move to the cells of a grid, and faces that lose their area are
    dropped. Surfaces that are small enough stay as they are; faces that are not finite are dropped."""
    surfaces = [_choose(surface, np.isfinite(surface.corners).all(axis=(1, 2))) for surface in surfaces]
    surfaces = [surface for surface in surfaces if len(surface.corners)]
    cells = FINEST_GRID
    low = np.min([surface.corners.min(axis=(0, 1)) for surface in surfaces], axis=0)
    size = np.max([surface.corners.max(axis=(0, 1)) for surface in surfaces], axis=0) - low
    while sum(len(surface.corners) for surface in surfaces) > most:
        cell = size.max() / cells
        surfaces = [_on_grid(surface, low, cell) for surface in surfaces]
        cells //= 2
    return surfaces


def _on_grid(surface: Surface, low: np.ndarray, cell: float) -> Surface:
    place = np.rint((surface.corners - low) / cell)
    a, b, c = place[:, 0], place[:, 1], place[:, 2]
    keep = (a != b).any(axis=1) & (b != c).any(axis=1) & (c != a).any(axis=1)
    moved = Surface(low + cell * place, surface.color, surface.uv, surface.material)
    return _choose(moved, keep)


def _choose(surface: Surface, keep: np.ndarray) -> Surface:
    color, uv = (None if values is None else values[keep] for values in (surface.color, surface.uv))
    return Surface(surface.corners[keep], color, uv, surface.material)


def to_scene(surfaces: list[Surface], fill: tuple[float, float, float]):
    """A trimesh scene with one mesh for each material.

    Args:
        fill: color of faces that have none, sRGB in [0, 1].
    """
    import trimesh

    by_material: dict[tuple, list[Surface]] = {}
    for surface in surfaces:
        textured = surface.uv is not None and surface.material is not None and surface.material.texture is not None
        by_material.setdefault((id(surface.material) if textured else None), []).append(surface)
    meshes = []
    for key, parts in by_material.items():
        corners = np.concatenate([part.corners for part in parts]).reshape(-1, 3)  # (V, 3)
        faces = np.arange(len(corners)).reshape(-1, 3)
        if key is None:
            color = np.concatenate([_corner_colors(part, fill) for part in parts])
            visual = trimesh.visual.ColorVisuals(vertex_colors=_linear_bytes(color))
        else:
            visual = _textured(parts, trimesh)
        meshes.append(trimesh.Trimesh(corners, faces, visual=visual, process=False))
    return trimesh.Scene(meshes)


def _corner_colors(surface: Surface, fill: tuple[float, float, float]) -> np.ndarray:
    """(V, 3) sRGB."""
    count = 3 * len(surface.corners)
    color = _own_colors(surface)
    if surface.material is not None:
        color, _ = paint(surface.material, color, np.full((count, 2), np.nan))
    return np.where(np.isnan(color[:, :3]), fill, color[:, :3])


def _own_colors(surface: Surface) -> np.ndarray:
    """Colors of vertices or faces, (V, 4), NaN where there are none."""
    if surface.color is None:
        return np.full((3 * len(surface.corners), 4), np.nan)
    color = surface.color / 255 if surface.color.dtype == np.uint8 else surface.color
    return np.broadcast_to(color, (len(color), 3, 4)).reshape(-1, 4)


def _linear_bytes(color: np.ndarray) -> np.ndarray:
    """sRGB (V, 3) → linear (V, 4) uint8, as glTF stores colors of vertices."""
    opaque = np.ones((len(color), 1))
    return np.rint(255 * np.concatenate([to_linear(np.clip(color, 0, 1)), opaque], axis=1)).astype(np.uint8)


def _textured(parts: list[Surface], trimesh):
    """The look of surfaces with one textured material; colors of their vertices are multiplied."""
    material = parts[0].material
    uv = np.concatenate([part.uv for part in parts]).reshape(-1, 2).astype(np.float64)
    visual = trimesh.visual.TextureVisuals(
        uv=_wrapped(uv, material) * [1, -1] + [0, 1], material=_pbr(material, trimesh)
    )
    color = np.concatenate([_own_colors(part) for part in parts])
    if not np.isnan(color).all():
        visual.vertex_attributes["color"] = _linear_bytes(np.where(np.isnan(color), 1, color)[:, :3])
    return visual


def _wrapped(uv: np.ndarray, material: Material) -> np.ndarray:
    """uv (V, 2) for a texture that repeats, which is what trimesh writes. Faces that cross a mirrored edge are approximate."""
    uv = np.where(np.isfinite(uv), uv, 0)
    for axis, wrap in enumerate(material.wrap):
        if wrap == "clamp":
            uv[:, axis] = np.clip(uv[:, axis], 1e-3, 1 - 1e-3)
        elif wrap == "mirror":
            uv[:, axis] = 1 - np.abs(uv[:, axis] % 2 - 1)
    return uv


def _pbr(material: Material, trimesh):
    from PIL import Image

    image = Image.fromarray(material.texture)
    image.thumbnail((MAX_TEXTURE_SIDE, MAX_TEXTURE_SIDE))
    has_mask = material.alpha_cutoff is not None
    if not has_mask:
        image = image.convert("RGB")
        image.format = "JPEG"  # a tenth of a PNG's size
    base = np.asarray(material.color, dtype=np.float64)
    base = np.append(base[:3] if material.linear else to_linear(base[:3]), base[3] if has_mask else 1.0)
    return trimesh.visual.material.PBRMaterial(
        baseColorFactor=np.clip(base, 0, 1),
        baseColorTexture=image,
        alphaMode="MASK" if has_mask else "OPAQUE",
        alphaCutoff=material.alpha_cutoff,
        doubleSided=True,
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
