"""Cleaning a point cloud of what a scan adds to an object: far outliers and the floor below it.

Every rule is deterministic, ignores units and position, and removes nothing where it is in doubt, so that an object
keeps its parts: a table top lies above the rest, a lamp's base is round or no wider than its shade.

Shapes: N points.
"""

from typing import NamedTuple

import numpy as np
import torch


try:
    from scipy.spatial import cKDTree
except ImportError:  # slower, same neighbors
    cKDTree = None


CLEANINGS = ("none", "outliers", "floor", "all")
# Cleaning looks at so many points of a larger cloud: enough for its rules, and quick.
CLEANING_POINTS = 32768
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

_AXES = {"x": 0, "y": 1, "z": 2}


class Cleaned(NamedTuple):
    """What `clean` did: `keep` (N,) bool, and a text that says what was removed, or None if nothing was."""

    keep: np.ndarray
    removed: str | None


def clean(coord: np.ndarray, cleaning: str, up_axis: str | None = None) -> Cleaned:
    """Find the points that belong to the object.

    Args:
        coord: (N, 3) finite coordinates in any unit.
        cleaning: "none"; "outliers": drop points far from all others; "floor": drop a plane below the object; "all".
        up_axis: the axis that points up, "x", "y" or "z"; None counts as "y".

    Raises:
        ValueError: an unknown cleaning.
    """
    check_cleaning(cleaning)
    keep, parts = np.ones(len(coord), dtype=bool), []
    if cleaning in ("outliers", "all"):
        outliers = find_outliers(coord)
        if outliers.any():
            keep &= ~outliers
            parts.append(f"{outliers.sum():,} far outliers")
    if cleaning in ("floor", "all"):
        floor = find_floor(coord[keep], up_axis)
        if floor.any():
            keep[np.flatnonzero(keep)[floor]] = False
            parts.append(f"{floor.sum():,} of a floor below the object")
    return Cleaned(keep, f"removed {(~keep).sum():,} of {len(coord):,} points: {' and '.join(parts)}" if parts else None)


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
    if cKDTree is not None:
        distance = cKDTree(distinct).query(distinct, k=[_NUM_NEIGHBORS + 1])[0][:, 0]  # the nearest is the point itself
    else:
        points = torch.from_numpy(distinct - distinct.mean(0))
        distance = torch.cat(
            [
                torch.cdist(rows, points).kthvalue(_NUM_NEIGHBORS + 1, dim=1).values
                for rows in points.split(1024)
            ]
        ).numpy()
    return distance[inverse.reshape(-1)]


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
    inside = [(middle > a) & (middle < b) for a, b in zip((rest_low - low) / size, (rest_high - low) / size, strict=True)]
    around = ~(inside[0][:, None] & inside[1][None])
    return bool(filled[around].mean() >= _FLOOR_COVER)


# ---- Scenes ---------------------------------------------------------------------------------------------------------


def suspect_scene(coord: np.ndarray) -> str | None:
    """Say why a cloud may show more than one object, or None.

    Args:
        coord: (N, 3) finite coordinates in any unit.
    """
    for name in _AXES:
        share = find_floor(coord, name).mean() if len(coord) else 0
        if share:
            return (
                f"{share:.0%} of its points lie in one plane below the rest ({name} pointing up), like a floor. Pass "
                f"clean='floor' with up_axis={name!r} to remove it"
            )
    count = count_clusters(coord)
    if count > 1:
        return f"its points form {count} separate clusters, like a scene of several objects. Pass one object at a time"
    return None


def count_clusters(coord: np.ndarray) -> int:
    """Number of groups of points that are far apart, each with a tenth of all points or more."""
    if len(coord) < MIN_POINTS:
        return 1
    low, high = coord.min(axis=0), coord.max(axis=0)
    size = (high - low).max()
    if not size > 0:
        return 1
    cells, inverse, counts = np.unique(
        np.floor((coord - low) / (_CLUSTER_GAP * size)).astype(int), axis=0, return_inverse=True, return_counts=True
    )
    # Cells that touch, at corners, too, belong together: the smallest label spreads until nothing changes.
    touch = (np.abs(cells[:, None] - cells[None]).max(axis=-1) <= 1)
    label = np.arange(len(cells))
    while True:
        spread = np.where(touch, label[None], len(cells)).min(axis=1)
        if (spread == label).all():
            break
        label = spread
    shares = np.bincount(label, weights=counts) / len(coord)
    return max(1, int((shares >= _MIN_CLUSTER_SHARE).sum()))


__all__ = ["CLEANINGS", "CLEANING_POINTS", "clean", "check_cleaning", "suspect_scene"]
