"""Small pictures of point clouds on a transparent ground: points as disks that close the surface, lit by their normals.

Shapes: N points, S pixels along a side of the canvas.
"""

from io import BytesIO

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree


SIZE = 256  # pixels along a side
_OVERSAMPLING = 2
_MARGIN = 0.04  # of the side, on each edge
_NEUTRAL = 0.78  # gray of objects without color: shading would not show on black
_DISK = 1.0  # radius of a point's disk, in distances of points that would fill the picture
_NEIGHBORS = 12  # of a point, to which a plane is fitted
_LAMP = np.array([0.25, 0.6, 0.76])  # right, up, toward the viewer
_AMBIENT = 0.4
_NUM_COLORS = 96  # of a PNG, a third of its size


def direction_matrix(azimuth: float, elevation: float) -> np.ndarray:
    """(3, 3): the directions right, up and toward a viewer at these angles in degrees; y is up."""
    a, e = np.radians([azimuth, elevation])
    toward = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
    right = np.array([np.cos(a), 0, -np.sin(a)])
    return np.stack([right, np.cross(toward, right), toward])


def draw_thumbnail(cloud: np.ndarray, has_color: bool = True, size: int = SIZE) -> bytes:
    """A picture of an object from the front, the right and above.

    Args:
        cloud: (N, 6), xyz with y up in any unit, and rgb in [0, 1].
        has_color: whether its colors are the object's; otherwise it is gray.
        size: pixels along a side.

    Returns:
        A square PNG.
    """
    side = _OVERSAMPLING * size
    coord = direction_matrix(azimuth=30, elevation=20) @ cloud[:, :3].T.astype(np.float64)  # (3, N) right, up, toward
    nearest = _splat(coord, side)  # (S, S)
    visible = nearest >= 0
    rgb = cloud[:, 3:] if has_color else np.full((len(cloud), 3), _NEUTRAL)
    pixels = np.zeros((side, side, 4), dtype=np.uint8)
    pixels[visible, :3] = np.rint(255 * (rgb * _shade(coord)[:, None]).clip(0, 1)).astype(np.uint8)[nearest[visible]]
    pixels[visible, 3] = 255
    # Scaled with premultiplied alpha, or the invisible black of the ground would show at the edges.
    image = Image.fromarray(pixels, "RGBA").convert("RGBa").resize((size, size), Image.Resampling.BOX).convert("RGBA")
    file = BytesIO()
    image.quantize(_NUM_COLORS, Image.Quantize.FASTOCTREE).save(file, format="PNG")
    return file.getvalue()


def _splat(coord: np.ndarray, side: int) -> np.ndarray:
    """The nearest point of each pixel, (S, S), -1 for none; each of (3, N) points covers a disk."""
    right, up, toward = coord
    scale = side * (1 - 2 * _MARGIN) / max(np.ptp(right), np.ptp(up), 1e-9)
    order = np.argsort(toward)  # of points that cover one pixel, the last assignment counts
    column = np.rint((right - (right.max() + right.min()) / 2) * scale + side / 2).astype(int)[order]
    row = np.rint(((up.max() + up.min()) / 2 - up) * scale + side / 2).astype(int)[order]
    radius = max(1, round(_DISK * side / np.sqrt(len(right))))
    margin = radius + 1
    width = side + 2 * margin
    steps = np.arange(-radius, radius + 1)
    disk = np.array([i * width + j for i in steps for j in steps if i * i + j * j <= radius * radius])
    ranks = np.full(width * width, -1, dtype=np.int32)  # place in the order: the larger the nearer
    pixel = (row + margin) * width + column + margin
    ranks[(pixel[:, None] + disk).ravel()] = np.repeat(np.arange(len(order), dtype=np.int32), len(disk))
    ranks = ranks.reshape(width, width)[margin:-margin, margin:-margin]
    return np.where(ranks < 0, -1, order[ranks])


def _shade(coord: np.ndarray) -> np.ndarray:
    """Brightness (N,) of points (3, N) in the light of a lamp above the viewer; surfaces are lit from both sides."""
    points = coord.T
    count = min(_NEIGHBORS, len(points))
    neighbors = cKDTree(points).query(points, k=np.arange(1, count + 1))[1]  # (N, k)
    near = points[neighbors]
    near -= near.mean(axis=1, keepdims=True)
    normal = np.linalg.eigh(np.einsum("nki,nkj->nij", near, near))[1][:, :, 0]  # (N, 3), of the smallest variance
    light = np.abs(normal @ _LAMP)
    return _AMBIENT + (1 - _AMBIENT) * light[neighbors].mean(axis=1)  # smooth: normals of points are noisy
