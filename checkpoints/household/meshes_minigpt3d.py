"""Surfaces: what a reader of meshes returns, points sampled evenly over it, and the colors of those points.

A reader returns a list of `Surface`s, or `Points` if there are no faces. trimesh objects become surfaces here too.

Shapes: F faces, P points sampled, V vertices.
"""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .readers_minigpt3d import Node, PointCloudError, Points, import_reader, limits, report_dropped, warn


# Draws for points that replace transparent ones; each is four times the number of points that are missing.
MAX_REDRAWS = 16
_CHUNK = 1 << 15  # faces whose area is computed at once
_ROWS_AT_ONCE = 256  # of an image whose pixels are converted
# Images that textures are; PIL opens others with programs of their own, such as Ghostscript.
_IMAGE_FORMATS = (
    *("PNG", "JPEG", "WEBP", "BMP", "DIB", "TGA", "TIFF", "GIF", "DDS", "JPEG2000", "PPM", "PCX", "SGI", "PSD", "ICO"),
    "AVIF",  # last: a pillow without it stops here
)


@dataclass(frozen=True, eq=False)
class Material:
    """How a surface is painted. Surfaces that share a material should share the object: each is looked up once.

    Attributes:
        color: (4,) rgba, the factor of vertex color and texture.
        texture: (H, W, 4) uint8 sRGB and alpha, or None. Its first row is at v = 0, as in glTF; for a format whose v
            grows upwards (OBJ, PLY, 3MF, COLLADA, FBX) pass `pixels[::-1]`.
        wrap: of u and v outside 0–1: "repeat", "mirror" or "clamp".
        alpha_cutoff: points whose alpha is lower are transparent and not sampled; None ignores alpha.
        linear: whether `color` is linear and everything is multiplied in linear light, as in glTF.
    """

    color: np.ndarray = field(default_factory=lambda: np.ones(4))
    texture: np.ndarray | None = None
    wrap: tuple[str, str] = ("repeat", "repeat")
    alpha_cutoff: float | None = None
    linear: bool = False


@dataclass(frozen=True, eq=False)
class Surface:
    """A piece of a mesh with one material. Without color and material it has no color.

    Attributes:
        corners: (F, 3, 3) float, in their place in the scene.
        color: sRGB and alpha, uint8 or float in [0, 1], multiplied with the material: (F, 3, 4) per corner,
            (F, 1, 4) per face, or None.
        uv: (F, 3, 2) float texture coordinates, the reader's transforms applied, or None.
        material: None counts as white.
        nodes: the named nodes of the scene that it belongs to, outermost first, if `keeps_nodes`.
    """

    corners: np.ndarray
    color: np.ndarray | None = None
    uv: np.ndarray | None = None
    material: Material | None = None
    nodes: tuple[Node, ...] = ()


# ---- Colors ---------------------------------------------------------------------------------------------------------


def to_linear(color: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] as linear light."""
    return np.where(color <= 0.04045, color / 12.92, ((np.maximum(color, 0) + 0.055) / 1.055) ** 2.4)


def to_srgb(color: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] as sRGB."""
    return np.where(color <= 0.0031308, color * 12.92, 1.055 * np.maximum(color, 0) ** (1 / 2.4) - 0.055)


def image_pixels(image: Any) -> np.ndarray:
    """A PIL image as (H, W, 4) uint8, first row on top."""
    pixels = np.full((image.height, image.width, 4), 255, dtype=np.uint8)
    for top in range(0, image.height, _ROWS_AT_ONCE):
        strip = image.crop((0, top, image.width, min(top + _ROWS_AT_ONCE, image.height)))
        here = pixels[top : top + _ROWS_AT_ONCE]
        if image.mode.startswith("I"):  # 16 bits of gray, which PIL would clip at 255
            here[..., :3] = np.clip(np.asarray(strip) >> 8, 0, 255)[..., None]
        else:
            here[:] = np.asarray(strip.convert("RGBA"))
    return pixels


class TextureLimitError(PointCloudError):
    """The textures of a file are too large to decode."""


class Textures:
    """The decoded textures of one file, each once: `decoded` by key, (H, W, 4) uint8, first row on top."""

    def __init__(self):
        self.decoded: dict[Any, np.ndarray] = {}
        self._opened: dict[Any, Any] = {}
        self._num_pixels = 0

    def decode(self, key: Any, data: bytes | np.ndarray) -> np.ndarray:
        """The content of an image file as pixels; the same array for the same `key`.

        Raises:
            TextureLimitError: all textures together have more pixels than `max_texture_pixels`.
            Exception: PIL cannot decode it.
        """
        if key not in self.decoded:
            self.measure(key, data)
            self.decoded[key] = image_pixels(self._opened.pop(key))
        return self.decoded[key]

    def measure(self, key: Any, data: bytes | np.ndarray):
        """Count the pixels of an image file without decoding them. Reads all textures of a file that has many first."""
        if key in self._opened or key in self.decoded:
            return
        if len(data) > 4 * limits().max_texture_pixels:
            raise TextureLimitError(f"a texture has {len(data):,} bytes. Make it smaller first.")
        pil = import_reader("PIL.Image", "pillow")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own limit is lower
            try:
                image = pil.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
            except pil.DecompressionBombError as error:
                raise TextureLimitError(f"a texture has too many pixels ({error}). Make it smaller first.") from error
        self.count(image.width * image.height)
        self._opened[key] = image

    def count(self, num_pixels: int):
        """Add to the pixels of this file, before they are decoded.

        Raises:
            TextureLimitError: they are too many.
        """
        self._num_pixels += num_pixels
        most = limits().max_texture_pixels
        if self._num_pixels > most:
            raise TextureLimitError(
                f"its textures have {self._num_pixels:,} pixels or more, more than the {most:,} allowed. Make them smaller "
                "first."
            )


def check_num_faces(count: int):
    """Refuse a scene with more than `max_faces` faces, before they are put in their places."""
    most = limits().max_faces
    if count > most:
        raise PointCloudError(
            f"its scene has {count:,} faces, each mesh counted at every place, more than the {most:,} allowed. "
            "Simplify it first."
        )


# ---- Sampling -------------------------------------------------------------------------------------------------------


def sample_surface(
    surfaces: list[Surface], num_points: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sample points evenly over surfaces: by area over all faces, in the order of the list.

    Args:
        surfaces: at least one face in all.
        num_points: P.
        rng: chooses the points. Drawn in this order: faces, two weights; again for what is transparent.

    Returns:
        coord (P, 3) float64 and color (P, 3) in [0, 1], NaN where the surface has none.

    Raises:
        PointCloudError: most faces are not finite, or none has an area.
    """
    if not any(len(surface.corners) for surface in surfaces):
        raise PointCloudError("it has no faces.")
    cumulative = np.cumsum(_areas(surfaces))
    starts = np.cumsum([0, *(len(surface.corners) for surface in surfaces)])
    if not 0 < cumulative[-1] < np.inf:
        if cumulative[-1] > 0:
            raise PointCloudError("its coordinates are too large to compute the area of its faces.")
        raise PointCloudError(f"none of its {starts[-1]:,} faces has an area, so there is no surface to sample.")

    def draw(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")  # (P,)
        chosen = np.minimum(chosen, len(cumulative) - 1)
        # Uniform in a triangle: https://www.cs.princeton.edu/~funk/tog02.pdf, §4.2
        root, along = np.sqrt(rng.random(count)), rng.random(count)
        weights = np.stack([1 - root, root * (1 - along), root * along], axis=1)  # (P, 3)
        with np.errstate(over="ignore", invalid="ignore"):
            return _look_up(surfaces, starts, chosen, weights)

    coord, color, visible = draw(num_points)
    if visible.all():
        return coord, color
    parts = [(coord[visible], color[visible])]
    num_visible = len(parts[0][0])
    for _ in range(MAX_REDRAWS):
        if num_visible >= num_points:
            break
        more_coord, more_color, visible = draw(max(4096, 4 * (num_points - num_visible)))
        parts.append((more_coord[visible], more_color[visible]))
        num_visible += int(visible.sum())
    if not num_visible:
        warn("its surface is transparent everywhere and was read as opaque.")
        return coord, color
    keep = np.arange(num_points) % num_visible
    return np.concatenate([part for part, _ in parts])[keep], np.concatenate([part for _, part in parts])[keep]


def _areas(surfaces: list[Surface]) -> np.ndarray:
    """Twice the area of every face, (F,); 0 for those that are not finite."""
    areas, good = [], []
    for corners in _chunks(surfaces):
        finite = np.isfinite(corners).all(axis=(1, 2))
        corners[~finite] = 0  # never chosen
        x, y, z = np.ascontiguousarray(corners.T)  # (3 corners, F) each: half the time of np.cross
        with np.errstate(over="ignore", invalid="ignore"):
            ax, ay, az, bx, by, bz = x[1] - x[0], y[1] - y[0], z[1] - z[0], x[2] - x[0], y[2] - y[0], z[2] - z[0]
            cx, cy, cz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
            areas.append(np.sqrt(cx * cx + cy * cy + cz * cz))
        good.append(finite)
    good = np.concatenate(good)
    if not good.all():
        report_dropped(good, "faces")
    return np.concatenate(areas)


def _chunks(surfaces: list[Surface]) -> Iterator[np.ndarray]:
    """All corners in their order, (about `_CHUNK`, 3, 3) at a time: one by one is slow, all together takes much memory."""
    waiting, count = [], 0
    for surface in surfaces:
        for start in range(0, len(surface.corners), _CHUNK):
            waiting.append(surface.corners[start : start + _CHUNK])
            count += len(waiting[-1])
            if count >= _CHUNK:
                yield np.concatenate(waiting, dtype=np.float64)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting, dtype=np.float64)


def _look_up(
    surfaces: list[Surface], starts: np.ndarray, chosen: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points by their face (P,) and barycentric weights (P, 3) → coord (P, 3), color (P, 3), visible (P,)."""
    count = len(chosen)
    coord, uv = np.empty((count, 3)), np.full((count, 2), np.nan)
    color = np.full((count, 4), np.nan)  # of vertices or faces
    by_material: dict[int, list[np.ndarray]] = {}
    order = np.argsort(chosen, kind="stable")
    bounds = np.searchsorted(chosen[order], starts)
    for index in np.flatnonzero(np.diff(bounds)):
        surface, here = surfaces[index], order[bounds[index] : bounds[index + 1]]
        faces, part = chosen[here] - starts[index], weights[here]
        coord[here] = np.einsum("pk,pkd->pd", part, surface.corners[faces])
        if surface.color is not None:
            corner_colors = surface.color[faces]
            if corner_colors.dtype == np.uint8:
                corner_colors = corner_colors / 255
            is_flat = corner_colors.shape[1] == 1
            color[here] = corner_colors[:, 0] if is_flat else np.einsum("pk,pkd->pd", part, corner_colors)
        if surface.uv is not None:
            uv[here] = np.einsum("pk,pkd->pd", part, np.asarray(surface.uv[faces], dtype=np.float64))
        if surface.material is not None:
            by_material.setdefault(id(surface.material), [index]).append(here)
    visible = np.ones(count, dtype=bool)
    for index, *here in by_material.values():
        here, material = np.concatenate(here), surfaces[index].material
        color[here], visible[here] = paint(material, color[here], uv[here])
    return coord, np.clip(color[:, :3], 0, 1), visible


def paint(material: Material, vertex_color: np.ndarray, uv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertex colors (P, 4), NaN where there are none, times factor times texture → color (P, 4), visible (P,)."""
    factors = [np.where(np.isnan(vertex_color), 1, vertex_color)] if not np.isnan(vertex_color).all() else []
    if material.texture is not None:
        texels = np.ones_like(vertex_color)
        has_uv = np.isfinite(uv).all(axis=1)
        texels[has_uv] = _texels(material, uv[has_uv])
        factors.append(texels)
    base = np.asarray(material.color, dtype=np.float64)
    if material.linear and (len(factors) > 1 or (base[:3] != 1).any()):
        color = np.tile(base, (len(uv), 1))
        for factor in factors:
            color[:, :3] *= to_linear(factor[:, :3])
            color[:, 3] *= factor[:, 3]
        color[:, :3] = to_srgb(np.clip(color[:, :3], 0, 1))
    else:
        color = np.tile(base, (len(uv), 1))
        for factor in factors:
            color *= factor
    cutoff = material.alpha_cutoff
    return color, np.ones(len(uv), dtype=bool) if cutoff is None else color[:, 3] >= cutoff


def _texels(material: Material, uv: np.ndarray) -> np.ndarray:
    """The nearest texels at uv (P, 2) → (P, 4) in [0, 1]."""
    height, width = material.texture.shape[:2]
    index = []
    for axis, size in ((0, width), (1, height)):
        value, wrap = uv[:, axis], material.wrap[axis]
        if wrap == "clamp":
            value = np.clip(value, 0, 1)
        elif wrap == "mirror":
            value = 1 - np.abs(value % 2 - 1)
        else:
            value = value % 1
        index.append(np.minimum((value * size).astype(int), size - 1))
    return material.texture[index[1], index[0]] / 255


# ---- trimesh objects ------------------------------------------------------------------------------------------------


def open_trimesh(source: Any) -> Points | list[Surface]:
    """A trimesh object as surfaces; if it has no faces, its vertices as `Points`."""
    trimesh = import_reader("trimesh")
    scene = source if isinstance(source, trimesh.Scene) else trimesh.Scene([source])
    placed = _instances(scene)
    meshes = [(mesh, matrix) for mesh, matrix in placed if len(getattr(mesh, "faces", ()))]
    if meshes:
        check_num_faces(sum(len(mesh.faces) for mesh, _ in meshes))
        materials: dict[tuple, Material | None] = {}
        return [surface for mesh, matrix in meshes for surface in _mesh_surfaces(mesh, matrix, materials)]
    clouds = [
        Points(_transform(geometry.vertices, matrix), _vertex_colors(geometry))
        for geometry, matrix in placed
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


def _mesh_surfaces(mesh: Any, matrix: np.ndarray, materials: dict[tuple, Material | None]) -> list[Surface]:
    """A trimesh mesh as surfaces, one per material, faces in their order. `materials` keeps those seen."""
    visual, faces = mesh.visual, np.asarray(mesh.faces)
    if faces.min() < 0 or faces.max() >= len(mesh.vertices):
        raise PointCloudError(
            f"a face names vertex {faces.max():,}, but there are {len(mesh.vertices):,}; export it again."
        )
    corners = _transform(mesh.vertices, matrix)[faces]  # (F, 3, 3)
    if visual.kind == "face":
        return [Surface(corners, np.asarray(visual.face_colors)[:, None])]
    if visual.kind == "vertex":
        return [Surface(corners, np.asarray(visual.vertex_colors)[faces])]
    if visual.kind != "texture":
        return [Surface(corners)]
    uv = None
    if visual.uv is not None and len(visual.uv) == len(mesh.vertices):
        uv = np.asarray(visual.uv, dtype=np.float64)[faces, :2]
    parts = [(visual.material, slice(None))]
    if getattr(visual, "face_materials", None) is not None:
        numbers = np.asarray(visual.face_materials)
        parts = [(visual.material.materials[number], numbers == number) for number in np.unique(numbers)]
    surfaces = []
    for material, here in parts:
        key = (id(material), uv is None)
        if key not in materials:
            materials[key] = _material(material, uv is not None)
        surfaces.append(Surface(corners[here], None, None if uv is None else uv[here], materials[key]))
    return surfaces


def _material(material: Any, has_uv: bool) -> Material | None:
    """A trimesh material; None if trimesh made its color up."""
    is_pbr = hasattr(material, "baseColorFactor")
    image = material.baseColorTexture if is_pbr else getattr(material, "image", None)
    if not is_pbr and _is_placeholder(material, image):
        return None
    texture = image_pixels(image)[::-1] if image is not None and has_uv else None  # v grows upwards
    base = np.ones(4)
    if not is_pbr or material.baseColorFactor is not None:
        base = np.asarray(material.main_color, dtype=np.float64) / 255
    if not is_pbr:
        # In MTL many exporters leave Kd at black beside a texture, so there the texture counts alone.
        return Material(base) if texture is None else Material(texture=texture)
    cutoff = None
    if material.alphaMode == "MASK":
        cutoff = 0.5 if material.alphaCutoff is None else material.alphaCutoff
    return Material(base, texture, alpha_cutoff=cutoff, linear=True)


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
