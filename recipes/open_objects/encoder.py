"""Train the 3D encoder with heads, and score it on held-out packs.

    python -m minigpt3d.recipes.open_objects.encoder --data DATA --output_dir RUN

The heads name kind, noun and color shares, and predict descriptors of shape and color (see `descriptors`); a projection
finds the object's own text among those of all training objects (captions as TF-IDF, reduced to 128 dimensions). The heads
are discarded later. Clouds are augmented and grouped
anew at every step. During the first part of the training the encoder sees a random part of the groups, which lowers the
cost. A stopped run continues from RUN/checkpoint.pt; RUN/scores.jsonl has the scores of the held-out objects.

Shapes: B clouds, G groups, K neighbors, D width, M training objects.
"""

import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from minigpt3d.arguments import option, run_script
from minigpt3d.configuration_minigpt3d import MiniGPT3DPointConfig
from minigpt3d.evaluation.vocabulary.colors import COLORS, color_shares
from minigpt3d.files import write_json, written_file
from minigpt3d.grouping_minigpt3d import group
from minigpt3d.modeling_minigpt3d import PointBert
from minigpt3d.recipes.household.pretrain import MovingAverage, NormedMiniPointNet, adamw, cosine

from .augment import augment, normalize
from .build import read_lines
from .captioned_objects import FURNITURE_SOURCE, to_cloud
from .descriptors import describe
from .network import CLOUD_POINTS, POINT_CONFIG
from .nothing import NOTHING


TEXT_SIZE = 128
NUM_NOUNS = 235  # three objects or more have each of them
NOTHING_SHARE = 0.06
PEAK_LR = 1.5e-3
CALIBRATION_BATCHES = 8
PARTIAL_SHARE = 0.95  # of the steps, at which the encoder sees a part of the groups
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class EncoderOptions:
    """Options of the command."""

    data: Path = option("folder that `build` wrote", metavar="DIR")
    output_dir: Path = option("folder of the run", metavar="DIR")
    steps: int = option("steps", default=9000)
    batch_size: int = option("clouds of a step", default=32)
    width: int = option("width of the encoder", default=POINT_CONFIG["hidden_size"])
    layers: int = option("layers of the encoder", default=POINT_CONFIG["num_hidden_layers"])
    group_size: int = option("neighbors of a group", default=POINT_CONFIG["group_size"])
    absolute_coordinates: Literal["yes", "no"] = option(
        "whether the mini-PointNet reads where each point is in the cloud",
        default="yes" if POINT_CONFIG["absolute_coordinates"] else "no",
    )
    kept_groups: float = option(
        "share of the groups that the encoder sees in the first 95 % of the steps", default=0.25
    )
    text_weight: float = option("weight of the loss that finds an object's text", default=0.5)
    descriptor_weight: float = option("weight of the loss that predicts descriptors", default=1.0)
    augment_share: float = option("share of the clouds that are augmented", default=0.85)
    drop_path: float = option("probability to skip the last layer's branches; it rises linearly from 0", default=0.1)
    score_every: int = option("steps between scores", default=500)
    seed: int = option("seed", default=0)
    threads: int = option("threads of torch; 1 where other programs use the cores", default=1)


# ---- Data -----------------------------------------------------------------------------------------------------------


class Objects:
    """The objects of a release with their targets; clouds are mapped into memory.

    Args:
        data: folder that `build` wrote.
    """

    def __init__(self, data: Path):
        self.lines = read_lines(data)
        self.coord, self.color = (np.load(data / f"{name}.npy", mmap_mode="r") for name in ("coord", "color"))
        self.kinds = [*sorted({line["kind"] for line in self.lines} - {NOTHING}), NOTHING]
        train = [line for line in self.lines if line["split"] == "train"]
        self.nouns = sorted(noun for noun, _ in Counter(map(head, train)).most_common(NUM_NOUNS))
        self.kind = np.array([self.kinds.index(line["kind"]) for line in self.lines])
        number = {noun: index for index, noun in enumerate(self.nouns)}
        self.noun = np.array([number.get(head(line), -100) for line in self.lines])
        self.train = np.flatnonzero([line["split"] == "train" for line in self.lines])

    def cloud(self, index: int) -> np.ndarray:
        """(4096, 6) float32."""
        return to_cloud(self.coord[index], self.color[index])

    def weights(self) -> np.ndarray:
        """(M,) probabilities of the training objects: rare kinds and nouns above their frequency."""
        kinds, nouns = self.kind[self.train], [self.lines[index]["noun"] for index in self.train]
        by_kind, by_noun = np.bincount(kinds), Counter(nouns)
        weights = np.array([(by_kind[k] * by_noun[n]) ** -0.5 for k, n in zip(kinds, nouns, strict=True)])
        nothing = kinds == self.kinds.index(NOTHING)
        weights[nothing] = NOTHING_SHARE * weights[~nothing].sum() / nothing.sum()
        return weights / weights.sum()

    def texts(self) -> torch.Tensor:
        """(M, 128) unit vectors of the training objects' captions: TF-IDF of their words, reduced by SVD."""
        documents = []
        for index in self.train:
            line = self.lines[index]
            text = (
                f"{line['noun']} {line['noun']} {line['kind']} {line['brief']} {line['detailed']} {line['material']}"
            )
            documents.append(Counter(re.findall("[a-z]{3,}", text.lower())))
        frequency = Counter(word for document in documents for word in document)
        column = {word: number for number, word in enumerate(sorted(w for w, n in frequency.items() if 3 <= n < 1200))}
        matrix = torch.zeros(len(documents), max(len(column), TEXT_SIZE))
        for row, document in enumerate(documents):
            for word, count in document.items():
                if word in column:
                    matrix[row, column[word]] = np.log1p(count) * np.log(len(documents) / frequency[word])
        matrix = nn.functional.normalize(matrix, dim=1)
        torch.manual_seed(0)
        size = min(TEXT_SIZE, len(documents))
        left, values, _ = torch.svd_lowrank(matrix, q=size, niter=3)
        return nn.functional.pad(nn.functional.normalize(left * values.sqrt(), dim=1), (0, TEXT_SIZE - size))


def head(line: dict) -> str:
    """The last word of a noun."""
    return line["noun"].split()[-1].removesuffix("s")


def to_groups(clouds: np.ndarray, config: MiniGPT3DPointConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N, 6) → neighborhood (B, G, K, 6) and center (B, G, 3)."""
    return group(torch.from_numpy(clouds).float(), config.num_groups, config.group_size)


class Batches:
    """Random batches by step: a thread prepares the next one while the network trains.

    Args:
        objects: of the release.
        config: of the encoder.
        options: of the command.
    """

    def __init__(self, objects: Objects, config: MiniGPT3DPointConfig, options: EncoderOptions):
        self.objects, self.config, self.options = objects, config, options
        self.weights = objects.weights()
        self.pool = ThreadPoolExecutor(1)
        self.next: tuple | None = None

    def make(self, step: int) -> tuple:
        """Neighborhoods, centers, rows among the training objects, color shares and descriptors of one step."""
        rng = np.random.default_rng([self.options.seed, step])
        rows = rng.choice(len(self.weights), self.options.batch_size, p=self.weights)
        clouds, shares, descriptors = [], [], []
        for row in rows:
            cloud = self.objects.cloud(self.objects.train[row])
            if rng.random() < self.options.augment_share:
                cloud, item = augment(cloud, CLOUD_POINTS, rng)
            else:
                cloud = item = normalize(cloud[rng.permutation(len(cloud))[:CLOUD_POINTS]])
            clouds.append(cloud)
            item = item[:CLOUD_POINTS]  # in random order
            shares.append(color_shares(item[:, 3:]))
            descriptors.append(np.concatenate(list(describe(normalize(item)).values())))
        neighborhood, center = to_groups(np.stack(clouds), self.config)
        if step < PARTIAL_SHARE * self.options.steps:
            kept = rng.permutation(center.shape[1])[: round(self.options.kept_groups * center.shape[1])]
            neighborhood, center = neighborhood[:, kept], center[:, kept]
        return neighborhood, center, rows, *(torch.from_numpy(np.stack(x)).float() for x in (shares, descriptors))

    def get(self, step: int) -> tuple:
        """The batch of a step; starts to prepare the one after it."""
        batch = self.next[1].result() if self.next and self.next[0] == step else self.make(step)
        self.next = (step + 1, self.pool.submit(self.make, step + 1))
        return batch


# ---- Network --------------------------------------------------------------------------------------------------------


class DropPath:
    """Hook that drops a branch's output for some of the clouds in training (stochastic depth).

    Args:
        probability: to drop it.
    """

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, module: nn.Module, _, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if not module.training or not self.probability:
            return output
        if isinstance(output, tuple):  # attention also returns its weights
            return self(module, _, output[0]), *output[1:]
        kept = torch.rand(len(output), 1, 1) >= self.probability
        return output * kept / (1 - self.probability)


class EncoderWithHeads(nn.Module):
    """The encoder, and linear heads on its pooled features."""

    def __init__(self, config: MiniGPT3DPointConfig, sizes: dict[str, int], drop_path: float = 0.0):
        super().__init__()
        self.point_encoder = PointBert(config)
        self.point_encoder.mini_pointnet = NormedMiniPointNet(config)
        for module in self.point_encoder.modules():
            if isinstance(module, nn.Linear):  # transformers' initial weights are too small: positions have no effect
                module.reset_parameters()
        blocks = self.point_encoder.blocks
        for depth, block in enumerate(blocks):
            for branch in (block.attention, block.mlp):
                branch.register_forward_hook(DropPath(drop_path * depth / max(len(blocks) - 1, 1)))
        self.sizes = sizes
        self.norm = nn.LayerNorm(3 * config.hidden_size)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(3 * config.hidden_size, sum(sizes.values()))
        self.text = nn.Linear(TEXT_SIZE, TEXT_SIZE, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.register_buffer("descriptor_mean", torch.zeros(sizes["descriptor"]))
        self.register_buffer("descriptor_scale", torch.ones(sizes["descriptor"]))

    def pool(self, neighborhood: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """Groups → (B, 3·D): the cls feature, and maximum and mean of the others."""
        features = self.point_encoder.encode_groups(neighborhood, center)  # (B, 1+G, D)
        return self.norm(torch.cat([features[:, 0], features[:, 1:].amax(1), features[:, 1:].mean(1)], dim=-1))

    def forward(self, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3·D) → outputs by target."""
        outputs = self.head(self.dropout(pooled))
        return dict(zip(self.sizes, outputs.split(list(self.sizes.values()), dim=-1), strict=True))


def make_network(objects: Objects, options: EncoderOptions) -> EncoderWithHeads:
    """A network with random weights."""
    sizes_of_encoder = {
        "hidden_size": options.width,
        "intermediate_size": 4 * options.width,
        "num_attention_heads": options.width // 64,
        "num_hidden_layers": options.layers,
        "group_size": options.group_size,
        "absolute_coordinates": options.absolute_coordinates == "yes",
    }
    config = MiniGPT3DPointConfig(**POINT_CONFIG | sizes_of_encoder)
    sizes = {"kind": len(objects.kinds), "noun": len(objects.nouns), "color": len(COLORS), "text": TEXT_SIZE}
    sizes["descriptor"] = sum(map(len, describe(objects.cloud(0)).values()))
    return EncoderWithHeads(config, sizes, options.drop_path)


def loss_of(
    outputs: dict, network: EncoderWithHeads, batch: tuple, targets: dict, options: EncoderOptions
) -> torch.Tensor:
    """The sum of the heads' losses."""
    _, _, rows, shares, descriptors = batch
    loss = nn.functional.cross_entropy(outputs["kind"], targets["kind"][rows], label_smoothing=0.1)
    noun = targets["noun"][rows]
    if (noun >= 0).any():
        loss = loss + 0.5 * nn.functional.cross_entropy(outputs["noun"], noun, label_smoothing=0.1)
    color = outputs["color"].log_softmax(-1)
    loss = loss - 0.3 * (shares * color).sum(-1).mean()
    if options.descriptor_weight:
        expected = (descriptors - network.descriptor_mean) * network.descriptor_scale
        loss = loss + options.descriptor_weight * nn.functional.mse_loss(outputs["descriptor"], expected)
    if options.text_weight:
        texts = nn.functional.normalize(network.text(targets["text"]), dim=-1)
        likeness = nn.functional.normalize(outputs["text"], dim=-1) @ texts.T * network.log_scale.exp()  # (B, M)
        loss = loss + options.text_weight * nn.functional.cross_entropy(
            likeness, torch.from_numpy(rows), label_smoothing=0.1
        )
    return loss


# ---- Scores ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled_features(network: EncoderWithHeads, objects: Objects, indices: np.ndarray, batch_size: int = 64):
    """Features (len(indices), 3·D) of clouds as they are."""
    config, features = network.point_encoder.config, []
    for part in np.array_split(indices, max(1, -(-len(indices) // batch_size))):
        clouds = np.stack([normalize(objects.cloud(index)[:CLOUD_POINTS]) for index in part])
        features.append(network.pool(*to_groups(clouds, config)))
    return torch.cat(features)


@torch.no_grad()
def score(network: EncoderWithHeads, objects: Objects, split: str = "validation") -> dict[str, float]:
    """Accuracies of the heads on the objects of a split: of packs, of furniture, and of nothing-shapes."""
    chosen = np.flatnonzero([line["split"] == split for line in objects.lines])
    outputs = network(pooled_features(network, objects, chosen))
    kind, truth = outputs["kind"].clone(), torch.from_numpy(objects.kind[chosen])
    source = np.array([objects.lines[index]["source"] for index in chosen])
    said_nothing = kind.argmax(-1) == len(objects.kinds) - 1
    kind[:, -1] = -torch.inf
    hit = kind.argmax(-1) == truth
    among_five = (kind.topk(5).indices == truth[:, None]).any(-1)
    shares = np.stack([color_shares(objects.color[index] / np.float32(255)) for index in chosen])
    color = outputs["color"].argmax(-1).numpy() == shares.argmax(-1)
    furniture, nothing = source == FURNITURE_SOURCE, source == NOTHING
    packs = ~furniture & ~nothing
    noun, known = outputs["noun"].argmax(-1).numpy() == objects.noun[chosen], objects.noun[chosen] >= 0
    return {
        "packs": packs.sum().item(),
        "kind": _mean(hit[packs]),
        "kind_top5": _mean(among_five[packs]),
        "noun": _mean(noun[packs & known]),
        "furniture": furniture.sum().item(),
        "furniture_kind": _mean(hit[furniture]),
        "color": _mean(color[~nothing]),
        "nothing_found": _mean(said_nothing[nothing]),
        "nothing_false": _mean(said_nothing[~nothing]),
    }


def _mean(hits) -> float | None:
    return round(float(np.asarray(hits, dtype=float).mean()), 3) if len(hits) else None


def linear_probe(network: EncoderWithHeads, objects: Objects, split: str = "validation", steps: int = 300) -> float:
    """Accuracy on packs of a linear classifier of kinds, trained on the features of the training objects as they are."""
    train = objects.train[objects.kind[objects.train] < len(objects.kinds) - 1]
    chosen = np.flatnonzero(
        [line["split"] == split and line["source"] not in (FURNITURE_SOURCE, NOTHING) for line in objects.lines]
    )
    features, held_out = pooled_features(network, objects, train), pooled_features(network, objects, chosen)
    mean, deviation = features.mean(0), features.std(0) + 1e-5
    features, held_out = (features - mean) / deviation, (held_out - mean) / deviation
    torch.manual_seed(0)
    classifier = nn.Linear(features.shape[1], len(objects.kinds) - 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.3)
    truth = torch.from_numpy(objects.kind[train])
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(features), truth).backward()
        optimizer.step()
    return _mean(classifier(held_out).argmax(-1).numpy() == objects.kind[chosen])


# ---- Training -------------------------------------------------------------------------------------------------------


def train(options: EncoderOptions) -> dict:
    """Train, or continue; returns the last scores, which are also the last line of scores.jsonl."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    objects = Objects(options.data)
    network = make_network(objects, options)
    batches = Batches(objects, network.point_encoder.config, options)
    targets = {
        "kind": torch.from_numpy(objects.kind[objects.train]),
        "noun": torch.from_numpy(objects.noun[objects.train]),
        "text": objects.texts(),
    }
    average, optimizer = MovingAverage(network, decay=0.999), adamw(network, WEIGHT_DECAY)
    checkpoint, first, seconds = options.output_dir / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        average.average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, average.steps = state["step"], state["seconds"], state["step"]
    else:
        encoder, descriptors = network.point_encoder, []
        for step in range(CALIBRATION_BATCHES):
            neighborhood, center, *_, described = batches.make(step)
            descriptors.append(described)
        encoder.mini_pointnet.calibrate(encoder.add_coordinates(neighborhood, center))
        descriptors = torch.cat(descriptors)
        network.descriptor_mean.copy_(descriptors.mean(0))
        network.descriptor_scale.copy_(1 / (descriptors.std(0) + 0.02))
        average.average.load_state_dict(network.state_dict())
    count = sum(p.numel() for p in network.point_encoder.parameters())
    print(
        f"{count} parameters, {len(objects.train)} objects, {len(objects.nouns)} nouns; from step {first}", flush=True
    )
    network.train()
    scores, losses, started = {}, [], time.perf_counter()
    for step in range(first, options.steps):
        batch = batches.get(step)
        loss = loss_of(network(network.pool(*batch[:2])), network, batch, targets, options)
        for parameters in optimizer.param_groups:
            parameters["lr"] = cosine(step, options.steps, PEAK_LR)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update()
        losses.append(loss.item())
        done = step + 1
        if done % options.score_every == 0 or done == options.steps:
            total = seconds + time.perf_counter() - started
            scores = {"step": done, "minutes": round(total / 60, 1), "loss": round(float(np.mean(losses[-100:])), 3)}
            scores |= score(average.average, objects)
            if done == options.steps:
                scores["linear_probe"] = linear_probe(average.average, objects)
            print(json.dumps(scores), flush=True)
            with open(options.output_dir / "scores.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(scores) + "\n")
            state = {"network": network.state_dict(), "average": average.average.state_dict(), "step": done}
            state |= {"optimizer": optimizer.state_dict(), "seconds": total}
            with written_file(checkpoint) as partial:
                torch.save(state, partial)
    write_json(options.output_dir / "scores.json", scores)
    return scores


def main(argv: list[str] | None = None):
    run_script(train, EncoderOptions, argv, __doc__, "minigpt3d.recipes.open_objects.encoder")


if __name__ == "__main__":
    main()
