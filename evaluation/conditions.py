"""What a model is shown of an object: the object as it is, controls that take something away, and corruptions.

    seeing              the object as it is
    blind, no_color     controls: nothing at all; no colors
    NAME-SEVERITY       a row of `CORRUPTIONS` at severity 1 (least) to 5, such as jitter-3

The corruptions are in the spirit of ModelNet40-C (arXiv 2201.12296), for clouds with colors. They happen to the object,
before the processor takes as many points of it as its model reads: a model that reads 1,024 of 8,192 points hardly
notices that half of them are gone, and that is its due.

Chances hang on seed, corruption and object alone, not on the severity: a severer one does more of the same to the same
places, so the points of a curve differ by the severity and not by luck.

Shapes: N points of a cloud, M points that are left of it, P points that the model reads, B clouds.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from minigpt3d.point_cloud_minigpt3d import load_point_cloud
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor

from .suites import BLIND, NO_COLOR, SEEING, SHUFFLED


# Of `holes`: the share of the object's points that a hole takes.
HOLE_SHARE = 0.05
# Of `occlusion`: how far the scanner looks down, in degrees; how far away it is, the largest norm being 1; and the radius
# of the mirror in terms of the farthest point. A larger one lets points shine through, a smaller one hides what is seen at a
# grazing angle; at 30 a sphere of 256 to 8,192 points shows its front, all of it, and of its back next to nothing.
SCANNER_ELEVATION = 20.0
SCANNER_DISTANCE = 3.0
MIRROR_RADIUS = 30.0


# ---- What happens to a cloud: (N, 6) float64, amount, rng → (M, 6), M <= N ---------------------------------------------


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
        azimuth, elevation = np.radians(start + 144 * view), np.radians(SCANNER_ELEVATION)  # two fifths of a turn on
        side, up = np.cos(elevation), np.sin(elevation)
        seen |= visible(cloud[:, :3], np.array([side * np.cos(azimuth), up, side * np.sin(azimuth)]))
    return cloud[seen]


def visible(coord: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Which points a scanner sees, by Katz et al., Direct Visibility of Point Sets (2007): (N,) bool.

    Points are mirrored to beyond a sphere around the scanner; those on the convex hull of them and the scanner have
    nothing before them.

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
    # Colors stay those of the object, or this would attack them as well.
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
    """(3,), norm 1, every direction alike."""
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


@dataclass(frozen=True)
class Corruption:
    """One way in which a scan may be worse than its object.

    Args:
        what: what happens, for people.
        severities: the amounts of severity 1 to 5.
        unit: of these amounts.
        change: a cloud (N, 6), an amount and where chances come from → at most N points, in any position and size.
    """

    what: str
    severities: tuple[float, float, float, float, float]
    unit: str
    change: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


# Lengths are in units of the cloud's largest norm, which is 1.
CORRUPTIONS = {
    "jitter": Corruption(
        "every point is off at random", (0.01, 0.02, 0.03, 0.04, 0.05), "standard deviation, largest norm = 1", _jitter
    ),
    "dropout": Corruption(
        "points are lost at random, the others are repeated", (0.1, 0.3, 0.5, 0.7, 0.9), "share of the points", _dropout
    ),
    "holes": Corruption(
        f"holes, each the nearest {HOLE_SHARE:.0%} of the points", (1, 2, 4, 6, 8), "holes", _holes
    ),
    "occlusion": Corruption(
        "seen from some sides only, what is hidden is gone", (5, 4, 3, 2, 1), "sides", _occlusion
    ),
    "outliers": Corruption(
        "points of the background, anywhere in the cube around", (0.01, 0.02, 0.05, 0.1, 0.2), "share of the points",
        _outliers,
    ),
    "density": Corruption(
        "denser towards one side, at random which", (2, 4, 8, 16, 32), "densest over sparsest", _density
    ),
    "turn": Corruption("turned about the up axis", (15, 30, 60, 90, 180), "degrees", _turn),
    "rotation": Corruption("turned about any axis", (15, 30, 60, 90, 180), "degrees", _rotation),
    "scale": Corruption("one axis is stretched or squeezed", (1.25, 1.5, 2, 3, 4), "times", _scale),
    "color_loss": Corruption(
        "points without color: black", (0.1, 0.25, 0.5, 0.75, 0.95), "share of the points", _color_loss
    ),
    "fewer_points": Corruption(
        "a sparse scan, its points repeated", (4096, 2048, 1024, 512, 256), "points", _fewer_points
    ),
}  # fmt: skip
CORRUPTION_CONDITIONS = tuple(
    f"{name}-{severity}" for name, row in CORRUPTIONS.items() for severity in range(1, len(row.severities) + 1)
)


def check_condition(condition: str):
    """Before heavy work: is this something that a model can be shown?

    Raises:
        ValueError: it is not.
    """
    known = (SEEING, BLIND, NO_COLOR, *CORRUPTION_CONDITIONS)
    if condition not in known:
        hint = " Shuffled is no condition of a cloud: seeing answers are scored against another object." * (
            condition == SHUFFLED
        )
        raise ValueError(
            f"condition must be {SEEING}, {BLIND}, {NO_COLOR}, or NAME-SEVERITY with a severity of 1 to 5 and one of the "
            f"names {', '.join(CORRUPTIONS)}; got {condition!r}.{hint}"
        )


def apply(condition: str, cloud: np.ndarray, object_id: str, seed: int = 0) -> np.ndarray:
    """A cloud under a condition: the same one always, whatever else has been asked for.

    Args:
        condition: see the head of this file.
        cloud: (N, 6), xyz centered with largest norm 1, rgb in [0, 1], y up. It is left as it is.
        object_id: which object this is, for its chances.
        seed: of the chances.

    Returns:
        (N, 6) float32: lost points made up by repeating others, and normalised, both as the processor does. "blind" is zero
        everywhere, which the processor refuses to read; `read_clouds` lets it pass.

    Raises:
        ValueError: an unknown condition, or a cloud of another shape.
    """
    check_condition(condition)
    cloud = np.asarray(cloud)
    if cloud.ndim != 2 or cloud.shape[1] != 6:
        raise ValueError(
            f"object_id {object_id!r}: a cloud must have shape (points, 6), xyz and rgb; got {cloud.shape}."
        )
    if condition == SEEING:
        return cloud.astype(np.float32)
    if condition == BLIND:
        return np.zeros(cloud.shape, dtype=np.float32)
    if condition == NO_COLOR:
        return (cloud * [1, 1, 1, 0, 0, 0]).astype(np.float32)
    name, _, severity = condition.partition("-")
    corruption = CORRUPTIONS[name]
    key = hashlib.sha256(f"{seed} {name} {object_id}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
    changed = corruption.change(cloud.astype(np.float64), corruption.severities[int(severity) - 1], rng)
    return load_point_cloud(changed, num_points=len(cloud))


def read_clouds(processor: MiniGPT3DProcessor, clouds: list[np.ndarray], up_axis: str | None = None) -> torch.Tensor:
    """Clouds as the model reads them: sampled and normalised by the processor, but for blind ones, which stay zero.

    Args:
        processor: of the model.
        clouds: B clouds (N, 6), of any number of points.
        up_axis: of the clouds; None for the processor's own.

    Returns:
        (B, P, 6) float32.
    """
    reader = processor.feature_extractor
    blind = torch.zeros(reader.num_points, 6)

    def read(cloud: np.ndarray) -> torch.Tensor:
        if not np.any(cloud):
            return blind
        # A benchmark's clouds are prepared, and its corruptions are what it measures.
        return reader(cloud, return_tensors="pt", up_axis=up_axis, clean="none")["point_clouds"][0]

    return torch.stack([read(cloud) for cloud in clouds])
