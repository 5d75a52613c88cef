"""Grouped views of clouds and their augmentation, for the pre-training of the encoder.

Farthest point sampling and neighbor search cost more than the network, and rotation and color do not change them. So each
object is grouped a few times from random subsets of its points, and every batch rotates, stretches, jitters and recolors
the groups.

Shapes: B views, G groups, K neighbors.
"""

import numpy as np
import torch

from minigpt3d.configuration_minigpt3d import MiniGPT3DPointConfig
from minigpt3d.evaluation.vocabulary.colors import COLORS, color_indices
from minigpt3d.grouping_minigpt3d import group
from minigpt3d.point_cloud_minigpt3d import load_point_cloud


def group_views(
    cloud: np.ndarray, config: MiniGPT3DPointConfig, num_points: int, num_views: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group random subsets of a cloud; the first view equals the input of inference.

    Args:
        cloud: (N, 6), normalized.
        config: for the number and size of the groups.
        num_points: P, points that the model reads.
        num_views: V.
        rng: draws the subsets; a quarter of them have fewer than P points, repeated up to P.

    Returns:
        neighborhood (V, G, K, 6) and center (V, G, 3), float32.
    """
    views = [load_point_cloud(cloud, num_points)]
    for _ in range(num_views - 1):
        size = num_points if rng.random() < 0.75 else int(rng.integers(num_points // 5, num_points))
        views.append(cloud[np.resize(rng.permutation(len(cloud))[:size], num_points)])
    points = torch.from_numpy(np.stack(views)).float()  # (V, P, 6)
    return group(points, config.num_groups, config.group_size)


def color_shares(color: torch.Tensor) -> torch.Tensor:
    """(B, G, K, 3) colors → (B, 11) share of the points with each name."""
    index = torch.from_numpy(color_indices(color.numpy())).flatten(1)  # (B, G*K)
    return (
        torch.zeros(len(index), len(COLORS)).scatter_add_(1, index, torch.ones(1).expand(index.shape)) / index.shape[1]
    )


def augment_views(
    neighborhood: torch.Tensor, center: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate, stretch, jitter and recolor views without changing their kind.

    Half of the views rotate about the up axis y by at most 15°, the others by any angle; a quarter are mirrored; each axis
    is stretched by up to 15 %; half get new colors part by part, 12 % lose theirs (black), and brightness changes by up to
    10 %.

    Args:
        neighborhood: (B, G, K, 6), xyz relative to the center and rgb.
        center: (B, G, 3).
        generator: source of randomness.

    Returns:
        neighborhood and center.
    """
    batch_size = len(center)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    angle = (uniform(batch_size) * 2 - 1) * torch.where(uniform(batch_size) < 0.5, torch.pi / 12, torch.pi)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(batch_size), torch.ones(batch_size)
    matrix = torch.stack([cos, zero, -sin, zero, one, zero, sin, zero, cos], dim=1).view(-1, 3, 3)
    tilt = torch.randn(batch_size, 3, 3, generator=generator) * 0.03  # up axes and shapes of scans are not exact
    stretch = torch.diag_embed(1 + 0.15 * (uniform(batch_size, 3) * 2 - 1))
    stretch[:, 0] *= torch.where(uniform(batch_size, 1) < 0.25, -1.0, 1.0)
    matrix = stretch @ (matrix + tilt)  # (B, 3, 3)
    coord = torch.einsum("bgkc,bcd->bgkd", neighborhood[..., :3], matrix)
    center = center @ matrix
    center = center + 0.01 * torch.randn(batch_size, 1, 3, generator=generator)
    scale = center.norm(dim=-1).amax(1).clamp_min(1e-6).reciprocal()[:, None, None]  # the largest norm stays about 1
    scale = scale * (1 - 0.06 * uniform(batch_size, 1, 1))
    coord, center = coord * scale[..., None], center * scale
    noise = 0.01 * uniform(batch_size, 1, 1, 1) ** 2
    coord = coord + noise * torch.randn(coord.shape, generator=generator)

    color = recolor(neighborhood[..., 3:], uniform(batch_size) < 0.5, generator)
    light = 1 + 0.1 * (uniform(batch_size, 1, 1, 1) * 2 - 1)
    colored = uniform(batch_size) >= 0.12
    color = (color * light).clamp(0, 1) * colored[:, None, None, None]
    return torch.cat([coord, color], dim=-1), center


def recolor(color: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator, num_parts: int = 4) -> torch.Tensor:
    """New colors for the parts of the chosen clouds; similar points stay similar, and texture and shading remain.

    Args:
        color: (B, ..., 3) in [0, 1].
        chosen: (B,) bool.
        generator: source of randomness.
        num_parts: colors drawn from each cloud; every point follows the nearest of them.
    """
    batch_size, flat = len(color), color.flatten(1, -2)  # (B, P, 3)
    drawn = torch.randint(flat.shape[1], (batch_size, num_parts), generator=generator)
    old = flat.gather(1, drawn[..., None].expand(-1, -1, 3))  # (B, parts, 3)
    part = torch.cdist(flat, old).argmin(-1)[..., None].expand(-1, -1, 3)  # (B, P, 3)
    new = random_colors((batch_size, num_parts), generator)
    moved = new.gather(1, part) + 0.7 * (flat - old.gather(1, part))
    return torch.where(chosen[:, None, None], moved.clamp(0, 1), flat).view_as(color)


# A point inside the range of each name, in the order of COLORS, to draw around.
_PALETTE = torch.tensor(
    [[0.1, 0.1, 0.1], [0.92, 0.92, 0.9], [0.5, 0.5, 0.5], [0.75, 0.1, 0.1], [0.95, 0.5, 0.1], [0.92, 0.82, 0.15],
     [0.2, 0.5, 0.2], [0.15, 0.3, 0.75], [0.5, 0.2, 0.6], [0.95, 0.6, 0.7], [0.45, 0.28, 0.15]]
)  # fmt: skip


def random_colors(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """(..., 3) colors: a named color with some deviation, or any color at all."""
    basic = _PALETTE[torch.randint(len(_PALETTE), shape, generator=generator)]
    basic = basic + 0.12 * torch.randn(*shape, 3, generator=generator)
    anything = torch.rand(*shape, 3, generator=generator)
    return torch.where(torch.rand(*shape, 1, generator=generator) < 0.8, basic, anything).clamp(0, 1)
