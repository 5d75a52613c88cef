"""Training, validation and test objects: chosen by pack, creator and name, never at random.

Validation packs are looked at as often as needed; test packs and names are scored a handful of times. Of furniture, the
household suite's objects validate. An object that has a twin (a like shape of its kind, or the same name by the same
creator) on a stricter side of the split is left out.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection

import numpy as np

from minigpt3d.recipes.household.split import normalized_name, occupancy

from .captioned_objects import FURNITURE_SOURCE, CaptionedObject


SPLITS = ("train", "validation", "test", "left_out")
VALIDATION_PACKS = frozenset(
    {
        # Quaternius
        "RPG Asset Pack", "Realistic Car Pack", "Farm Animals Animated", "Public Transport Pack", "Pirate Pack",
        "Furniture Pack March 2019", "Nature Pack Essentials vol.3", "Spaceship Pack Jan 2018", "Suburban Pack 1",
        "Posed Background Characters", "Updated Modular Dungeon", "Food Pack Vol.1", "Animated FPS Guns",
        # Kay Lousberg, Kenney
        "Halloween Bits", "Castle Kit",
    }
)  # fmt: skip
TEST_PACKS = frozenset(
    {
        "medieval village pack", "Farm Buildings", "Animal Pack Vol.2", "Easy Animated Enemy Pack", "Weapons Pack",
        "Potion Pack", "Animated Women Characters", "Animated Men Characters", "Snow Nature Pack", "SpacePack",
        "Buildings Pack Jan 2019", "Starter Kit Racing", "Graveyard Kit", "Character Pack Adventures", "mech pack",
    }
)  # fmt: skip
# Creators of whom nothing is trained on: all of the market but Kenney.
APART_SOURCE, ITS_TRAINING_CREATOR = "market", "kenney"
FURNITURE_TEST_SHARE = 0.13
SAME_SHAPE = 0.85


def split_objects(
    objects: list[CaptionedObject], coords: list[np.ndarray], furniture_validation: Collection[str]
) -> list[str]:
    """The split of each object, one of `SPLITS`.

    Args:
        objects: all captioned objects.
        coords: (N, 3) of each, centered, largest norm 1.
        furniture_validation: ids of the household suite's objects.
    """
    splits = [_by_pack(item, furniture_validation) for item in objects]
    _hold_out_furniture(objects, splits)
    for index in find_twins(objects, coords, splits):
        splits[index] = "left_out"
    return splits


def _by_pack(item: CaptionedObject, furniture_validation: Collection[str]) -> str:
    if item.source == FURNITURE_SOURCE:
        return "validation" if item.object_id.split("/", 1)[1] in furniture_validation else "train"
    if item.pack in TEST_PACKS or item.source == APART_SOURCE and item.creator != ITS_TRAINING_CREATOR:
        return "test"
    return "validation" if item.pack in VALIDATION_PACKS else "train"


def _hold_out_furniture(objects: list[CaptionedObject], splits: list[str]):
    """Move whole names of furniture from training to the test split, in an order that the names decide."""
    by_noun = defaultdict(list)
    for index, item in enumerate(objects):
        if item.source == FURNITURE_SOURCE and splits[index] == "train":
            by_noun[item.noun].append(index)
    target = FURNITURE_TEST_SHARE * sum(map(len, by_noun.values()))
    taken = 0
    for noun in sorted(by_noun, key=lambda noun: hashlib.sha256(noun.encode()).digest()):
        if taken < target and len(by_noun[noun]) <= 3:
            taken += len(by_noun[noun])
            for index in by_noun[noun]:
                splits[index] = "test"


def find_twins(objects: list[CaptionedObject], coords: list[np.ndarray], splits: list[str]) -> set[int]:
    """Objects that would leak: training twins of held-out objects, and validation twins of test objects.

    Twins of packs are removed from the held-out side, so that training keeps its objects; twins of the household suite
    are removed from training, since the suite is fixed.
    """
    voxels = np.stack([occupancy(coord) for coord in coords]).astype(np.float32)  # (M, 24³)
    sizes = voxels.sum(1)
    names = [(item.creator.lower(), normalized_name(item.file.rsplit("/", 1)[-1])) for item in objects]
    twins = set()
    train = np.flatnonzero([split == "train" for split in splits])
    for held_out in ("validation", "test"):
        rows = np.flatnonzero([split == held_out for split in splits])
        common = voxels[rows] @ voxels[train].T
        same_shape = common >= SAME_SHAPE * (sizes[rows][:, None] + sizes[train][None] - common)
        for row, likeness in zip(rows, same_shape, strict=True):
            is_twin = [
                objects[row].kind == objects[other].kind
                and (alike or names[row] == names[other] and objects[row].source != FURNITURE_SOURCE)
                for other, alike in zip(train, likeness, strict=True)
            ]
            if not any(is_twin):
                continue
            fixed = objects[row].source == FURNITURE_SOURCE
            twins |= set(train[is_twin].tolist()) if fixed else {int(row)}
    return twins
