"""Clouds that are encoded once: the 3D encoder is frozen in every stage, so its features replace the clouds.

Features (B, 1+G, D) travel in the shape of clouds, (B, N, 6), filled up with zeros, so that streams, batches and the model
handle them like clouds.

Shapes: B samples, N points, G groups, D width of the encoder.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minigpt3d.data.clouds import augment
from minigpt3d.data.records import Sample
from minigpt3d.files import written_file
from minigpt3d.point_bert_minigpt3d import PointBertOutput
from minigpt3d.training.stages import Stage
from minigpt3d.training.stream import StageStream, encode_sample


BATCH = 32
PLACEHOLDER = np.eye(2, 6, dtype=np.float32)  # a cloud that a processor accepts, where features follow


class EncodedClouds(nn.Module):
    """Replaces the 3D encoder: returns the features in its input, (B, N, 6) → (B, 1+G, D)."""

    def __init__(self, config):
        super().__init__()
        self.shape = (1 + config.num_groups, config.hidden_size)

    def forward(self, point_clouds: torch.Tensor, *args, **kwargs) -> PointBertOutput:
        return PointBertOutput(point_clouds.flatten(1)[:, : math.prod(self.shape)].unflatten(1, self.shape))


def as_clouds(features: torch.Tensor) -> torch.Tensor:
    """Features (B, 1+G, D) in the shape of clouds, (B, N, 6)."""
    flat = features.flatten(1)
    return nn.functional.pad(flat, (0, -flat.shape[1] % 6)).unflatten(1, (-1, 6))


@torch.inference_mode()
def encode_clouds(model, processor, clouds: Iterable[np.ndarray], total: int, title: str) -> torch.Tensor:
    """Features of `total` clouds, (total, N, 6); `title` names the progress bar."""
    features, batch = [], []
    for number, cloud in enumerate(tqdm(clouds, total=total, desc=title, unit="cloud", disable=None), start=1):
        batch.append(processor.feature_extractor(cloud)["point_clouds"][0])
        if len(batch) == BATCH or number == total:
            features.append(as_clouds(model.model.point_encoder(torch.from_numpy(np.stack(batch))).last_hidden_state))
            batch = []
    return torch.cat(features)


def encode_text(processor, sample: Sample, stage: Stage) -> dict[str, torch.Tensor]:
    """A sample's tokens; its cloud is the placeholder."""
    return encode_sample(processor, sample, PLACEHOLDER, stage)


class EncodedViews:
    """Augmented views of every training cloud, encoded.

    Args:
        model, processor: with the encoder.
        sources: of the packed data, by name.
        views: number of views of a cloud.
        path: file that keeps the features between runs.
    """

    def __init__(self, model, processor, sources: dict, views: int, path: Path):
        self.views = views
        self.samples = {
            (name, shard, row): source.read_sample(shard, row)
            for name, source in sources.items()
            for shard, rows in enumerate(source.rows)
            for row in range(rows)
        }
        addresses: dict[str, tuple[str, int, int]] = {}  # of the first sample of each object
        for address, sample in self.samples.items():
            addresses.setdefault(sample.object_id, address)
        self.index = {object_id: number for number, object_id in enumerate(sorted(addresses))}
        self.texts: dict[tuple[str, int, int], dict] = {}  # tokenized once
        if not path.exists():
            clouds = self._draw(sources, addresses)
            features = encode_clouds(model, processor, clouds, len(addresses) * views, "views")
            with written_file(path) as partial:
                torch.save(features, partial)
        self.features = torch.load(path, weights_only=True)

    def _draw(self, sources: dict, addresses: dict[str, tuple[str, int, int]]) -> Iterator[np.ndarray]:
        for object_id in self.index:
            name, shard, row = addresses[object_id]
            _, cloud = sources[name].read(shard, row)
            for view in range(self.views):
                yield augment(cloud, np.random.default_rng([view, *object_id.encode()]))

    def get(self, object_id: str, view: int) -> torch.Tensor:
        """Features of one view, (1, N, 6)."""
        return self.features[self.index[object_id] * self.views + view][None]


class EncodedStream(StageStream):
    """A stage's samples with encoded views instead of clouds."""

    def __init__(self, *args, encoded_views: EncodedViews, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoded_views = encoded_views

    def encode(self, step: int, slot: int) -> dict[str, torch.Tensor]:
        name, address = self.draw(step, slot)
        views, key = self.encoded_views, (name, *address)
        sample = views.samples[key]
        if key not in views.texts:
            views.texts[key] = encode_text(self.processor, sample, self.stage)
        view = int(self._rng("augment", step, slot).integers(views.views))
        return views.texts[key] | {"point_clouds": views.get(sample.object_id, view)}
