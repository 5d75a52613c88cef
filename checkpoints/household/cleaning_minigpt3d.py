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
SCENE_POINTS = 2048  # are looked at to suspect a scene
MIN_POINTS = 128  # fewer show neither outliers nor a plane

# An outlier's 8th nearest neighbor is so many times farther than that of nine points in ten.
_NUM_NEIGHBORS = 8
_OUTLIER_FACTOR = 3.0
_MAX_OUTLIER_SHARE = 0.08  # more are a part of the object

# A floor holds this share of the points within this share of the height, is wider than what stands on it in both
# directions by this factor, and covers this share of the area around the object. A disk does not reach the corners of its
# square, which hold 9 % of a full one.
_MIN_FLOOR_SHARE = 0.08
_FLOOR_THICKNESS = 0.02
_FLOOR_MARGIN = 1.1
_FLOOR_COVER = 0.9
_CORNER = 0.146
_MIN_CORNER_SHARE = 0.04
_MAX_BELOW = 0.01  # share of the points below a floor

# Parts of a scene lie a cell of a grid apart, and each holds this share of its points. The grid has so many cells a side, or
# fewer, so that points on one side of a box have at least about this number in a cell.
_MAX_CELLS = 16
_POINTS_PER_CELL = 5
_MIN_CLUSTER_SHARE = 0.1
_MIN_CLUSTER_POINTS = 24
_MIN_FURNITURE_SHARE = 0.02  # of what stands on a ground as wide as all of it
# Outliers are searched for if the box of all points is so much larger than that of 98 % of them.
_TAILS = 2

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
    nothing = np.zeros(len(coord), dtype=bool)
    outliers = find_outliers(coord) if cleaning in ("outliers", "all") else nothing
    results = []
    for up_axis in up_axes:
        floor = nothing.copy()
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
    nothing = np.zeros(len(coord), dtype=bool)
    if len(coord) < MIN_POINTS:
        return nothing
    distance = _neighbor_distance(coord)
    usual = np.quantile(distance, 0.9)
    outliers = distance > _OUTLIER_FACTOR * usual
    return outliers if 0 < usual and outliers.mean() <= _MAX_OUTLIER_SHARE else nothing


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
    axis = _AXES[up_axis or "y"]
    floor, above = _lowest_plane(coord[:, axis])
    ground = np.delete(coord, axis, axis=1)
    return floor if floor.any() and _surrounds(ground[floor], ground[above]) else np.zeros_like(floor)


def _lowest_plane(height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) → (N,) bool, (N,) bool: points of a horizontal plane below all others, and those others. None if too few."""
    nothing = np.zeros(len(height), dtype=bool)
    if len(height) < MIN_POINTS:
        return nothing, nothing
    low, high = np.quantile(height, [_MAX_BELOW / 2, 1 - _MAX_BELOW / 2])
    tolerance = _FLOOR_THICKNESS * (high - low)
    if not tolerance > 0:
        return nothing, nothing
    level = _densest_level(height[height <= low + 0.15 * (high - low)], tolerance)
    floor, above = np.abs(height - level) <= tolerance, height > level + tolerance
    if min(floor.mean(), above.mean()) < _MIN_FLOOR_SHARE or 1 - floor.mean() - above.mean() > _MAX_BELOW:
        return nothing, nothing
    return floor, above


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
    in_corner = (np.abs((floor - low) / size - 0.5) > 0.5 - _CORNER).all(axis=1)
    if in_corner.mean() < _MIN_CORNER_SHARE:
        return False
    filled = _fills(floor, low, high)
    middle = (np.arange(len(filled)) + 0.5) / len(filled)
    inside = [
        (middle > a) & (middle < b) for a, b in zip((rest_low - low) / size, (rest_high - low) / size, strict=True)
    ]
    around = ~(inside[0][:, None] & inside[1][None])
    return bool(around.any() and filled[around].mean() >= _FLOOR_COVER)


def _fills(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which cells of the rectangle between two corners (2,) hold any of the points (N, 2): (cells, cells) bool."""
    cells = int(np.clip(np.sqrt(len(points) / 6), 5, 12))
    place = np.floor((points - low) / (high - low) * cells)
    place = place[((place >= 0) & (place < cells)).all(axis=1)].astype(int)
    filled = np.zeros((cells, cells), dtype=bool)
    filled[place[:, 0], place[:, 1]] = True
    return filled


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
    _, distinct = np.unique(coord @ [1, 2**0.5, 3**0.5], return_index=True)  # small clouds may have been repeated
    coord = coord[np.sort(distinct)][:: max(1, len(distinct) // SCENE_POINTS)]
    count = 1
    for name, axis in _AXES.items():
        floor, above = _lowest_plane(coord[:, axis])
        if not floor.any():
            continue
        ground = np.delete(coord, axis, axis=1)
        if _surrounds(ground[floor], ground[above]):
            return (
                f"{floor.mean():.0%} of its points lie in one plane below the rest ({name} pointing up), like a floor. To "
                f"remove it, set `clean` to floor and `up_axis` to {name}"
            )
        # The walls and the furniture of a room stand on a plane as wide as all of them.
        if _fills(ground[floor], *np.quantile(ground, [0.005, 0.995], axis=0)).mean() >= _FLOOR_COVER:
            count = max(count, count_clusters(coord[above], _MIN_FURNITURE_SHARE))
    share = find_outliers(coord).mean() if cleaning in ("none", "floor") and _has_tails(coord) else 0
    if share:
        return f"about {share:.1%} of its points are far from all others. To remove them, set `clean` to outliers"
    count = max(count, count_clusters(coord))
    if count > 1:
        return f"its points form {count} separate clusters, like a scene of several objects. Pass one object at a time"
    return None


def _has_tails(coord: np.ndarray) -> bool:
    """Whether a few points stretch the box in some direction: a quick test before neighbors are searched."""
    if len(coord) < MIN_POINTS:
        return False
    low, high = np.quantile(coord, [0.01, 0.99], axis=0)
    return bool((coord.max(axis=0) - coord.min(axis=0) > _TAILS * (high - low)).any())


def count_clusters(coord: np.ndarray, min_share: float = _MIN_CLUSTER_SHARE) -> int:
    """Number of groups of points that are far apart, each with at least this share of all points."""
    if len(coord) < MIN_POINTS:
        return 1
    low = coord.min(axis=0)
    size = (coord.max(axis=0) - low).max()
    if not size > 0:
        return 1
    cells = int(np.clip(np.sqrt(len(coord) / _POINTS_PER_CELL), 1, _MAX_CELLS))
    width = cells + 3  # one empty cell on each side
    place = np.floor((coord - low) / size * cells).astype(int) @ [width * width, width, 1] + width * width + width + 1
    occupied, place = np.unique(place, return_inverse=True)
    number = np.full(width**3, -1)
    number[occupied] = np.arange(len(occupied))
    offsets = np.array([(a * width + b) * width + c for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)])
    neighbors = number[occupied[:, None] + offsets]  # (cells, 27)
    label = np.arange(len(occupied))
    neighbors = np.where(neighbors < 0, label[:, None], neighbors)
    while True:  # cells that touch, also at corners, belong together: the smallest label spreads until nothing changes
        spread = label[neighbors].min(axis=1)
        spread = spread[spread]
        if (spread == label).all():
            break
        label = spread
    sizes = np.bincount(label[place])
    return max(1, int((sizes >= max(_MIN_CLUSTER_POINTS, min_share * len(coord))).sum()))


__all__ = [
    "CLEANINGS",
    "CLEANING_POINTS",
    "SCENE_POINTS",
    "check_cleaning",
    "clean",
    "count_clusters",
    "find_floor",
    "find_outliers",
    "mirror_distance",
    "suspect_scene",
]
