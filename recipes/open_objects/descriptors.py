"""Descriptors of shape and color without learning, and how far a small classifier gets on them.

    python -m minigpt3d.recipes.open_objects.descriptors --data DATA

The scores are the line that an encoder has to beat on the held-out packs; they take a minute. The descriptors are also
targets of the encoder's training, see `encoder`: a dense signal that needs no labels.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minigpt3d.arguments import option, run_script
from minigpt3d.evaluation.vocabulary.colors import color_shares

from .build import read_lines
from .captioned_objects import FURNITURE_SOURCE, to_cloud
from .nothing import NOTHING


VOXELS, RINGS, DISTANCES = 12, 12, 24


@dataclass(frozen=True)
class DescriptorOptions:
    """Options of the command."""

    data: Path = option("folder that `build` wrote", metavar="DIR")
    turns: int = option("turns about the up axis, by up to 15°, of each training object", default=4)
    epochs: int = option("epochs of the classifier", default=30)
    seeds: int = option("classifiers, whose scores are averaged", default=3)


def shape_descriptors(coord: np.ndarray) -> dict[str, np.ndarray]:
    """Descriptors of (N, 3) coordinates, centered with largest norm 1 and y up.

    Returns:
        "voxels" (1728,): roots of the shares of the points in each of 12³ voxels; "rings" (144,): the same by distance from
        the up axis and height; "distances" (24,): histogram of the distances of random pairs; "extent" (6,): sides of the
        bounding box, as they are and sorted.
    """
    cells = np.clip(((coord + 1) / 2 * VOXELS).astype(int), 0, VOXELS - 1)
    cells = np.bincount(cells @ (VOXELS**2, VOXELS, 1), minlength=VOXELS**3) / len(coord)
    radius = np.hypot(coord[:, 0], coord[:, 2])
    rings, _, _ = np.histogram2d(radius, coord[:, 1], bins=RINGS, range=((0, 1), (-1, 1)))
    pairs = np.random.default_rng(0).integers(len(coord), size=(2, 2048))
    lengths = np.linalg.norm(coord[pairs[0]] - coord[pairs[1]], axis=1)
    extent = np.ptp(coord, axis=0)
    return {
        "voxels": np.sqrt(cells).astype(np.float32),
        "rings": np.sqrt(rings.ravel() / len(coord)).astype(np.float32),
        "distances": (np.histogram(lengths, bins=DISTANCES, range=(0, 2))[0] / 2048).astype(np.float32),
        "extent": np.concatenate([extent, np.sort(extent)]).astype(np.float32),
    }


def color_descriptors(cloud: np.ndarray) -> np.ndarray:
    """(N, 6) → (119,): color names in all and by quarters of the height, and a histogram of 4³ colors."""
    color = cloud[:, 3:]
    names = [color_shares(color)]
    for low in (-1, -0.5, 0, 0.5):
        names.append(color_shares(color[(cloud[:, 1] >= low) & (cloud[:, 1] < low + 0.5)]))
    histogram = np.histogramdd(color, bins=4, range=((0, 1),) * 3)[0].ravel() / len(color)
    return np.concatenate([*names, np.sqrt(histogram)]).astype(np.float32)


def describe(cloud: np.ndarray, angle: float = 0.0) -> dict[str, np.ndarray]:
    """All descriptors of a cloud turned about the up axis by an angle in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    turned = cloud[:, :3] @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], dtype=np.float32)
    return shape_descriptors(turned) | {"colors": color_descriptors(cloud)}


def baseline(options: DescriptorOptions) -> dict:
    """Accuracy of a two-layer classifier of kinds on each set of descriptors: of packs and furniture, and among five."""
    torch.set_num_threads(1)
    lines = read_lines(options.data)
    coord, color = (np.load(options.data / f"{name}.npy", mmap_mode="r") for name in ("coord", "color"))
    kinds = sorted({line["kind"] for line in lines} - {NOTHING})
    known = [i for i, line in enumerate(lines) if line["kind"] != NOTHING]
    train = [i for i in known if lines[i]["split"] == "train"]
    held_out = [i for i in known if lines[i]["split"] == "validation"]
    rng = np.random.default_rng(0)
    turns = [(i, rng.uniform(-np.pi / 12, np.pi / 12) if turn else 0) for turn in range(options.turns) for i in train]
    seen = [describe(to_cloud(coord[i][:2048], color[i][:2048]), angle) for i, angle in turns]
    asked = [describe(to_cloud(coord[i][:2048], color[i][:2048]), 0) for i in held_out]
    truth = torch.tensor([kinds.index(lines[i]["kind"]) for i, _ in turns])
    target = torch.tensor([kinds.index(lines[i]["kind"]) for i in held_out])
    furniture = torch.tensor([lines[i]["source"] == FURNITURE_SOURCE for i in held_out])
    shape = ["rings", "distances", "extent"]
    scores = {}
    for names in (["extent"], ["colors"], ["voxels"], shape, [*shape, "colors"], ["voxels", *shape, "colors"]):
        inputs, questions = (
            torch.from_numpy(np.stack([np.concatenate([item[name] for name in names]) for item in items]))
            for items in (seen, asked)
        )
        mean, deviation = inputs.mean(0), inputs.std(0) + 0.02
        hits = []
        for seed in range(options.seeds):
            outputs = _classify(
                (inputs - mean) / deviation, truth, (questions - mean) / deviation, options.epochs, seed
            )
            among_five = (outputs.topk(5).indices == target[:, None]).any(1)
            hits.append([(outputs.argmax(1) == target).float(), among_five.float()])
        best, five = (torch.stack(column).mean(0) for column in zip(*hits, strict=True))
        scores["+".join(names)] = {
            "kind": round(best[~furniture].mean().item(), 3),
            "kind_top5": round(five[~furniture].mean().item(), 3),
            "furniture_kind": round(best[furniture].mean().item(), 3),
            "furniture_top5": round(five[furniture].mean().item(), 3),
        }
        print("+".join(names), json.dumps(scores["+".join(names)]), flush=True)
    return scores


def _classify(inputs: torch.Tensor, truth: torch.Tensor, questions: torch.Tensor, epochs: int, seed: int):
    torch.manual_seed(seed)
    size, count = inputs.shape[1], int(truth.max()) + 1
    network = nn.Sequential(nn.Dropout(0.3), nn.Linear(size, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, count))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(epochs):
        for part in torch.randperm(len(inputs)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[part]), truth[part], label_smoothing=0.1).backward()
            optimizer.step()
    with torch.no_grad():
        return network.eval()(questions)


def main(argv: list[str] | None = None):
    run_script(baseline, DescriptorOptions, argv, __doc__, "minigpt3d.recipes.open_objects.descriptors")


if __name__ == "__main__":
    main()
