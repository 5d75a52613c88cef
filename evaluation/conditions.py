"""Conditions under which a model sees an object: as it is, controls that remove information, and corruptions.

    seeing              the object as it is
    blind, no_color     controls: all points and colors zero; colors zero
    NAME-SEVERITY       a row of `CORRUPTIONS` at severity 1 (least) to 5, such as jitter-3

The corruptions follow ModelNet40-C (arXiv 2201.12296), extended to clouds with colors. They change the object before the
processor samples it, so a model that reads 1,024 of 8,192 points is hardly affected if half of them are removed.

The random numbers depend on seed, corruption and object, and not on the severity: a higher severity changes the same places
more, so that the points of a curve differ by the severity alone.

Shapes: N points of a cloud, M points that a corruption leaves, P points that the model reads, B clouds.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from minigpt3d.point_cloud_minigpt3d import load_point_cloud
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor

from .suites import BLIND, NO_COLOR, SEEING


HOLE_SHARE = 0.05  # `holes`: share of the points that one hole removes
# `occlusion`: elevation of the scanner in degrees, and its distance (the cloud's largest norm is 1).
SCANNER_ELEVATION = 20.0
SCANNER_DISTANCE = 3.0
# Radius of the mirror sphere in units of the farthest point's distance. If it is larger, hidden points count as visible; if
# smaller, points at a grazing angle count as hidden. At 30, the complete front of a sphere of 256 to 8,192 points is visible
# and nearly nothing of its back.
MIRROR_RADIUS = 30.0


# ---- Corruptions: (N, 6) float64, amount, rng → (M, 6), M <= N ------------------------------------------------------


def _jitter(cloud: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    noise = deviation * rng.standard_normal((len(cloud), 3))
    return np.concatenate([cloud[:, :3] + noise, cloud[:, 3:]], axis=1)


def _dropout(cloud: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    return _fewer_points(cloud, round((1 - share) * len(cloud)), rng)


def _fewer_points(cloud: np.ndarray, count: float, rng: np.random.Generator) -> np.ndarray:
    return cloud[np.sort(rng.permutation(len(cloud))[: int(count)])]


def _holes(cloud: np.ndarray, count: float, rng: np.random.Generator) -> np.ndarray:
    size = round(HOLE_SHARE * len(cloud))
    for _ in range(int(count)):
        distance = np.linalg.norm(cloud[:, :3] - cloud[rng.integers(len(cloud)), :3], axis=1)
        cloud = cloud[np.sort(np.argsort(distance, kind="stable")[size:])]
    return cloud


def _occlusion(cloud: np.ndarray, num_views: float, rng: np.random.Generator) -> np.ndarray:
    start, seen = rng.uniform(0, 360), np.zeros(len(cloud), dtype=bool)
    for view in range(int(num_views)):
        azimuth, elevation = (
            np.radians(start + 144 * view),
            np.radians(SCANNER_ELEVATION),
        )  # the views are two fifths of a turn apart
        side, up = np.cos(elevation), np.sin(elevation)
        seen |= visible(cloud[:, :3], np.array([side * np.cos(azimuth), up, side * np.sin(azimuth)]))
    return cloud[seen]


def visible(coord: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Which points are visible from a scanner, by Katz et al., Direct Visibility of Point Sets (2007): (N,) bool.

    The points are mirrored outward at a sphere around the scanner. Those on the convex hull of mirrored points and scanner are
    visible.

    Args:
        coord: (N, 3), largest norm about 1.
        direction: (3,) from the object's center to the scanner, norm 1.
    """
    ray = coord - SCANNER_DISTANCE * direction
    distance = np.linalg.norm(ray, axis=1, keepdims=True)
    mirrored = ray * (2 * MIRROR_RADIUS * distance.max() / distance - 1)
    hull = ConvexHull(np.concatenate([mirrored, np.zeros((1, 3))]), qhull_options="QJ")  # flat objects have no volume
    return np.isin(np.arange(len(coord)), hull.vertices)


def _outliers(cloud: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    chosen = rng.permutation(len(cloud))[: round(share * len(cloud))]
    background = rng.uniform(-1, 1, (len(cloud), 3))
    cloud = cloud.copy()
    # The points keep their colors: this corruption is about geometry only.
    cloud[chosen, :3] = background[: len(chosen)]
    return cloud


def _density(cloud: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
    along = cloud[:, :3] @ _random_axis(rng)
    along = (along - along.min()) / np.ptp(along)
    return cloud[rng.random(len(cloud)) < ratio**-along]


def _turn(cloud: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    return _rotate(cloud, np.array([0.0, rng.choice([-1.0, 1.0]), 0.0]), degrees)


def _rotation(cloud: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    return _rotate(cloud, _random_axis(rng), degrees)


def _rotate(cloud: np.ndarray, axis: np.ndarray, degrees: float) -> np.ndarray:
    coord = Rotation.from_rotvec(np.radians(degrees) * axis).apply(cloud[:, :3])
    return np.concatenate([coord, cloud[:, 3:]], axis=1)


def _random_axis(rng: np.random.Generator) -> np.ndarray:
    """(3,), norm 1, uniformly distributed."""
    axis = rng.standard_normal(3)
    return axis / np.linalg.norm(axis)


def _scale(cloud: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    factors = np.ones(6)
    factors[rng.integers(3)] = factor ** rng.choice([-1.0, 1.0])
    return cloud * factors


def _color_loss(cloud: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    cloud = cloud.copy()
    cloud[rng.permutation(len(cloud))[: round(share * len(cloud))], 3:] = 0
    return cloud


# ---- The table ------------------------------------------------------------------------------------------------------


class Corruption(NamedTuple):
    """A defect of a scan.

    Args:
        change: (cloud (N, 6), amount, rng) → at most N points, in any position and size.
        amounts: of severity 1 to 5.
    """

    change: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    amounts: tuple[float, float, float, float, float]


# Lengths are in units of the cloud's largest norm. Lost points are replaced by repeating others.
CORRUPTIONS = {
    # standard deviation of the noise of each coordinate
    "jitter": Corruption(_jitter, (0.01, 0.02, 0.03, 0.04, 0.05)),
    # share of the points that are removed at random
    "dropout": Corruption(_dropout, (0.1, 0.3, 0.5, 0.7, 0.9)),
    # number of holes, each of the nearest `HOLE_SHARE` of the points
    "holes": Corruption(_holes, (1, 2, 4, 6, 8)),
    # number of sides from which the object is seen; hidden points are removed
    "occlusion": Corruption(_occlusion, (5, 4, 3, 2, 1)),
    # share of the points that are moved to any place in the cube around the object
    "outliers": Corruption(_outliers, (0.01, 0.02, 0.05, 0.1, 0.2)),
    # ratio of the densest to the sparsest place along a random direction
    "density": Corruption(_density, (2, 4, 8, 16, 32)),
    # degrees about the up axis
    "turn": Corruption(_turn, (15, 30, 60, 90, 180)),
    # degrees about a random axis
    "rotation": Corruption(_rotation, (15, 30, 60, 90, 180)),
    # factor by which one axis is stretched or compressed
    "scale": Corruption(_scale, (1.25, 1.5, 2, 3, 4)),
    # share of the points that become black
    "color_loss": Corruption(_color_loss, (0.1, 0.25, 0.5, 0.75, 0.95)),
    # number of points that are left
    "fewer_points": Corruption(_fewer_points, (4096, 2048, 1024, 512, 256)),
}
CORRUPTION_CONDITIONS = tuple(f"{name}-{severity}" for name in CORRUPTIONS for severity in range(1, 6))


def apply(condition: str, cloud: np.ndarray, object_id: str, seed: int = 0) -> np.ndarray:
    """A cloud under a condition; equal arguments give equal results.

    Args:
        condition: see the head of this file.
        cloud: (N, 6), xyz centered with largest norm 1, rgb in [0, 1], y up. It is not changed.
        object_id: of the object; the random numbers depend on it.
        seed: of the random numbers.

    Returns:
        (N, 6) float32, normalized as the processor does; points that replace removed ones repeat others. "blind" is zero
        everywhere, which the processor refuses to read and `read_clouds` accepts.

    Raises:
        ValueError: an unknown condition.
    """
    if condition == SEEING:
        return cloud.astype(np.float32)
    if condition == BLIND:
        return np.zeros(cloud.shape, dtype=np.float32)
    if condition == NO_COLOR:
        return (cloud * [1, 1, 1, 0, 0, 0]).astype(np.float32)
    if condition not in CORRUPTION_CONDITIONS:
        raise ValueError(
            f"`condition` must be {SEEING}, {BLIND}, {NO_COLOR}, or NAME-SEVERITY with a severity of 1 to 5 and one of the "
            f"names {', '.join(CORRUPTIONS)}; got {condition!r}."
        )
    name, _, severity = condition.partition("-")
    corruption = CORRUPTIONS[name]
    key = hashlib.sha256(f"{seed} {name} {object_id}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
    changed = corruption.change(cloud.astype(np.float64), corruption.amounts[int(severity) - 1], rng)
    return load_point_cloud(changed, num_points=len(cloud))


def read_clouds(processor: MiniGPT3DProcessor, clouds: list[np.ndarray], up_axis: str | None = None) -> torch.Tensor:
    """Sample and normalize clouds for the model, with its processor; blind ones stay zero.

    Args:
        clouds: B clouds (N, 6), of any number of points each.
        up_axis: of the clouds; None for the processor's own, where "auto" counts as "y".

    Returns:
        (B, P, 6) float32.
    """
    reader = processor.feature_extractor
    blind = torch.zeros(reader.num_points, 6)
    if up_axis is None and reader.up_axis == "auto":
        up_axis = "y"

    def read(cloud: np.ndarray) -> torch.Tensor:
        if not np.any(cloud):
            return blind
        # Own files have been cleaned where they were read, and corruptions are what is measured.
        return reader(cloud, return_tensors="pt", up_axis=up_axis, clean="none")["point_clouds"][0]

    return torch.stack([read(cloud) for cloud in clouds])
