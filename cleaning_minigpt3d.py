"""Cleaning a point cloud of what a scan adds to an object: far outliers and the floor below it.

Every rule is deterministic, ignores units and position, and removes nothing where it is in doubt, so that an object
keeps its parts: a table top lies above the rest, a lamp's base is round or no wider than its shade.

Shapes: N points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .readers_minigpt3d import MissingReaderError, import_reader


CLEANINGS = ("none", "outliers", "floor", "all")
# Cleaning looks at so many points of a larger cloud: enough for its rules, and quick.
CLEANING_POINTS = 16384
MIN_POINTS = 128  # fewer show neither outliers nor a plane

# An outlier's 8th nearest neighbor is so many times farther than that of nine points in ten.
_NUM_NEIGHBORS = 8
_OUTLIER_FACTOR = 3.0
_MAX_OUTLIER_SHARE = 0.08  # more are a part of the object

# A floor holds this share of the points within this share of the height, is wider than what stands on it in both
# directions by this factor, and covers this share of the area around the object. A disk covers less of its square.
_MIN_FLOOR_SHARE = 0.08
_FLOOR_THICKNESS = 0.02
_FLOOR_MARGIN = 1.1
_FLOOR_COVER = 0.9
_MAX_BELOW = 0.01  # share of the points below a floor

# Parts of a scene lie this share of its size apart, and each holds this share of its points.
_CLUSTER_GAP = 1 / 16
_MIN_CLUSTER_SHARE = 0.1
_SCENE_POINTS = 2048
# Outliers are searched for if the box of all points is so much larger than that of 98 % of them.
_TAILS = 1.5

_AXES = {"x": 0, "y": 1, "z": 2}


class Cleaned(NamedTuple):
    """What `clean` did: `keep` (N,) bool, a text that says what was removed (None: nothing), whether a floor was."""

    keep: np.ndarray
    removed: str | None
    has_floor: bool


def clean(coord: np.ndarray, cleaning: str, up_axes: Sequence[str | None] = (None,)) -> list[Cleaned]:
    """Find the points that belong to the object, for each of several up axes.

    Args:
        coord: (N, 3) finite coordinates in any unit.
        cleaning: "none"; "outliers": drop points far from all others; "floor": drop a plane below the object; "all".
        up_axes: the axes that may point up, "x", "y" or "z"; None counts as "y".

    Raises:
        ValueError: an unknown cleaning.
    """
    check_cleaning(cleaning)
    nobody = np.zeros(len(coord), dtype=bool)
    outliers = find_outliers(coord) if cleaning in ("outliers", "all") else nobody
    results = []
    for up_axis in up_axes:
        floor = nobody.copy()
        if cleaning in ("floor", "all"):
            floor[~outliers] = find_floor(coord[~outliers], up_axis)
        parts = [(outliers, "far outliers"), (floor, "of a floor below the object")]
        parts = [f"{part.sum():,} {what}" for part, what in parts if part.any()]
        keep = ~(outliers | floor)
        removed = f"removed {(~keep).sum():,} of {len(coord):,} points: {' and '.join(parts)}" if parts else None
        results.append(Cleaned(keep, removed, bool(floor.any())))
    return results


def check_cleaning(cleaning: str):
    """
    Raises:
        ValueError: it is none of `CLEANINGS`.
    """
    if cleaning not in CLEANINGS:
        raise ValueError(f"clean must be one of {', '.join(map(repr, CLEANINGS))}, got {cleaning!r}.")


# ---- Outliers -------------------------------------------------------------------------------------------------------


def find_outliers(coord: np.ndarray) -> np.ndarray:
    """(N, 3) → (N,) bool: points whose nearest neighbors are much farther than those of the others."""
    nobody = np.zeros(len(coord), dtype=bool)
    if len(coord) < MIN_POINTS:
        return nobody
    distance = _neighbor_distance(coord)
    usual = np.quantile(distance, 0.9)
    outliers = distance > _OUTLIER_FACTOR * usual
    return outliers if 0 < usual and outliers.mean() <= _MAX_OUTLIER_SHARE else nobody


def _neighbor_distance(coord: np.ndarray) -> np.ndarray:
    """(N, 3) → (N,) distance to the 8th nearest neighbor; equal points count as one."""
    distinct, inverse = np.unique(coord, axis=0, return_inverse=True)
    if len(distinct) <= _NUM_NEIGHBORS:
        return np.zeros(len(coord))
    return _nearest(distinct, distinct, _NUM_NEIGHBORS + 1)[inverse.reshape(-1)]  # the nearest is the point itself


def _nearest(queries: np.ndarray, points: np.ndarray, number: int) -> np.ndarray:
    """(Q, 3), (N, 3) → (Q,) distance from each query to its nearest point of this number, counted from 1."""
    try:
        return import_reader("scipy.spatial").cKDTree(points).query(queries, k=[number])[0][:, 0]
    except MissingReaderError:  # slower, same neighbors
        import torch  # imported where it is needed: most files are read without it

    targets, rows = torch.from_numpy(points).double(), torch.from_numpy(queries).double().split(1024)
    distance = [
        torch.cdist(row, targets, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(number, dim=1).values
        for row in rows
    ]
    return torch.cat(distance).numpy()


# ---- Floor ----------------------------------------------------------------------------------------------------------


def find_floor(coord: np.ndarray, up_axis: str | None = None) -> np.ndarray:
    """(N, 3) → (N,) bool: points of a plane that is below all others, wider than these, and around all of them."""
    nobody = np.zeros(len(coord), dtype=bool)
    if len(coord) < MIN_POINTS:
        return nobody
    axis = _AXES[up_axis or "y"]
    height, ground = coord[:, axis], np.delete(coord, axis, axis=1)
    low, high = np.quantile(height, [_MAX_BELOW / 2, 1 - _MAX_BELOW / 2])
    tolerance = _FLOOR_THICKNESS * (high - low)
    if not tolerance > 0:
        return nobody
    level = _densest_level(height[height <= low + 0.15 * (high - low)], tolerance)
    floor, above = np.abs(height - level) <= tolerance, height > level + tolerance
    if floor.mean() < _MIN_FLOOR_SHARE or above.mean() < _MIN_FLOOR_SHARE:
        return nobody
    if 1 - floor.mean() - above.mean() > _MAX_BELOW:
        return nobody
    return floor if _surrounds(ground[floor], ground[above]) else nobody


def _densest_level(height: np.ndarray, width: float) -> float:
    """The middle of the interval of this width that holds most values; the lowest of several."""
    height = np.sort(height)
    first = np.argmax(np.searchsorted(height, height + width, side="right") - np.arange(len(height)))
    return float(np.median(height[first : np.searchsorted(height, height[first] + width, side="right")]))


def _surrounds(floor: np.ndarray, rest: np.ndarray) -> bool:
    """Whether the points (F, 2) of a plane cover the area around the other points (R, 2), and not theirs alone."""
    low, high = np.quantile(floor, [0.005, 0.995], axis=0)
    rest_low, rest_high = np.quantile(rest, [0.005, 0.995], axis=0)
    size, rest_size = high - low, rest_high - rest_low
    if not (size > _FLOOR_MARGIN * rest_size).all():
        return False
    if (rest_low < low - 0.05 * size).any() or (rest_high > high + 0.05 * size).any():
        return False
    cells = int(np.clip(np.sqrt(len(floor) / 6), 5, 12))
    place = np.floor((floor - low) / size * cells)
    place = place[((place >= 0) & (place < cells)).all(axis=1)].astype(int)
    filled = np.zeros((cells, cells), dtype=bool)
    filled[place[:, 0], place[:, 1]] = True
    middle = (np.arange(cells) + 0.5) / cells
    inside = [
        (middle > a) & (middle < b) for a, b in zip((rest_low - low) / size, (rest_high - low) / size, strict=True)
    ]
    around = ~(inside[0][:, None] & inside[1][None])
    return bool(filled[around].mean() >= _FLOOR_COVER)


# ---- Up axis --------------------------------------------------------------------------------------------------------


def mirror_distance(coord: np.ndarray, up_axis: str) -> float:
    """How far a cloud is from its image upside down: the mean distance to the nearest point, above 0.

    Most objects are alike left and right, many front and back, few above and below.

    Args:
        coord: (N, 3) finite coordinates in any unit.
        up_axis: "x", "y" or "z".
    """
    low, high = np.quantile(coord, [0.01, 0.99], axis=0)
    coord = coord - (low + high) / 2
    mirrored = coord * (1 - 2 * np.eye(3)[_AXES[up_axis]])
    rounding = np.finfo(np.float32).eps * np.abs(coord).max() + np.finfo(np.float64).tiny
    return float(_nearest(mirrored, coord, 1).mean() + rounding)


# ---- Scenes ---------------------------------------------------------------------------------------------------------


def suspect_scene(coord: np.ndarray, cleaning: str = "none") -> str | None:
    """Say why a cloud may show more than one object and nothing else, or None.

    Args:
        coord: (N, 3) finite coordinates in any unit; about two thousand are looked at.
        cleaning: how they have been cleaned; outliers are not searched for twice.
    """
    coord = coord[:: max(1, len(coord) // _SCENE_POINTS)]
    for name in _AXES:
        share = find_floor(coord, name).mean() if len(coord) else 0
        if share:
            return (
                f"{share:.0%} of its points lie in one plane below the rest ({name} pointing up), like a floor. Pass "
                f"clean='floor' with up_axis={name!r} to remove it"
            )
    share = find_outliers(coord).mean() if cleaning in ("none", "floor") and _has_tails(coord) else 0
    if share:
        return f"about {share:.1%} of its points are far from all others. Pass clean='outliers' to remove them"
    count = count_clusters(coord)
    if count > 1:
        return f"its points form {count} separate clusters, like a scene of several objects. Pass one object at a time"
    return None


def _has_tails(coord: np.ndarray) -> bool:
    """Whether a few points stretch the box in some direction: a quick test before neighbors are searched."""
    if len(coord) < MIN_POINTS:
        return False
    low, high = np.quantile(coord, [0.01, 0.99], axis=0)
    return bool((coord.max(axis=0) - coord.min(axis=0) > _TAILS * (high - low)).any())


def count_clusters(coord: np.ndarray) -> int:
    """Number of groups of points that are far apart, each with a tenth of all points or more."""
    if len(coord) < MIN_POINTS:
        return 1
    low = coord.min(axis=0)
    size = (coord.max(axis=0) - low).max()
    if not size > 0:
        return 1
    # One empty cell on each side, so that shifts do not wrap around.
    place = tuple(np.floor((coord - low) / (_CLUSTER_GAP * size)).astype(int).T + 1)
    occupied = np.zeros([round(1 / _CLUSTER_GAP) + 3] * 3, dtype=bool)
    occupied[place] = True
    label = np.where(occupied, np.arange(1, occupied.size + 1).reshape(occupied.shape), 0)
    while True:  # cells that touch, also at corners, belong together: the largest label spreads until nothing changes
        spread = label
        for axis in range(3):
            spread = np.maximum(spread, np.maximum(np.roll(spread, 1, axis), np.roll(spread, -1, axis)))
        spread = np.where(occupied, spread, 0)
        if (spread == label).all():
            break
        label = spread
    shares = np.unique(label[place], return_counts=True)[1] / len(coord)
    return max(1, int((shares >= _MIN_CLUSTER_SHARE).sum()))


__all__ = [
    "CLEANINGS",
    "CLEANING_POINTS",
    "check_cleaning",
    "clean",
    "count_clusters",
    "find_floor",
    "find_outliers",
    "mirror_distance",
    "suspect_scene",
]
