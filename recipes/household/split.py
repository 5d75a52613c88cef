"""Hold objects out by name and by base model, so that no validation object has a variant in training."""

import hashlib
import re
from collections import defaultdict

import numpy as np


# Words that distinguish variants of one object.
_VARIANT_WORDS = frozenset(
    "small large little big double triple quadruple high low lower upper short long old new modern classic "
    "black white gray grey red orange yellow green blue purple pink brown left right open opened "
    "rounded round square rectangle rectangular wall simple".split()
)
_VOXELS = 24
_SAME_SHAPE = 0.85


def normalized_name(name: str) -> str:
    """A name without numbers, colors, sizes and plural: "Concept Sedan 02" and "Concept sedans" are equal."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    kept = [word for word in words if word not in _VARIANT_WORDS] or words
    return " ".join(word.removesuffix("s") for word in kept)


def occupancy(coord: np.ndarray) -> np.ndarray:
    """(N, 3) coordinates with largest norm 1 → (24³,) bool, the voxels that hold points."""
    index = np.clip(((coord + 1) / 2 * _VOXELS).astype(int), 0, _VOXELS - 1)
    grid = np.zeros((_VOXELS,) * 3, dtype=bool)
    grid[tuple(index.T)] = True
    return grid.ravel()


def group_objects(names: list[str], kinds: list[str | None], coords: list[np.ndarray]) -> list[int]:
    """Number the groups of objects that must not be separated by a split.

    Two objects are in one group if their normalized names are equal, or if they have the same kind and fill nearly the
    same voxels (intersection over union of at least 0.85).

    Args:
        names, kinds: of each object.
        coords: (N, 3) of each object, centered, largest norm 1.

    Returns:
        One group number per object.
    """
    parent = list(range(len(names)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    by_name = defaultdict(list)
    for index, name in enumerate(names):
        by_name[normalized_name(name)].append(index)
    for members in by_name.values():
        for index in members[1:]:
            parent[root(index)] = root(members[0])
    voxels = np.stack([occupancy(coord) for coord in coords]).astype(np.float32)  # (M, 24³)
    common = voxels @ voxels.T
    sizes = voxels.sum(1)
    same_shape = common >= _SAME_SHAPE * (sizes[:, None] + sizes[None] - common)
    for first, second in zip(*np.nonzero(np.triu(same_shape, 1)), strict=True):
        if kinds[first] == kinds[second]:
            parent[root(int(second))] = root(int(first))
    return [root(index) for index in range(len(names))]


def choose_validation(
    names: list[str], kinds: list[str | None], groups: list[int], share: float = 0.25, other_share: float = 0.1
) -> list[bool]:
    """Choose groups for validation, in an order that depends on their names only.

    A group of more than a quarter of the objects that its kind should hold out (all objects named just "Chair") stays in
    training.

    Args:
        names, kinds, groups: of each object.
        share: of each kind, about.
        other_share: of the objects of no known kind, which are not scored by kind.

    Returns:
        For each object whether it is held out.
    """
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    held_out = [False] * len(names)
    by_kind = defaultdict(list)
    for group in members.values():
        kind_votes = [kinds[index] for index in group]
        kind = max(set(kind_votes), key=lambda k: (kind_votes.count(k), str(k)))
        by_kind[kind].append(group)
    for kind, kind_groups in by_kind.items():
        target = max(3, round((share if kind else other_share) * sum(len(group) for group in kind_groups)))
        kind_groups.sort(key=lambda group: hashlib.sha256(min(names[i] for i in group).encode()).digest())
        taken = 0
        for group in kind_groups:
            if taken < target and len(group) <= max(2, target // 4) and len(group) + taken <= target + 1:
                taken += len(group)
                for index in group:
                    held_out[index] = True
    return held_out
