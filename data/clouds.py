"""Clouds of training data: read from `.npy`, pack into bytes, augment at random."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt3d.messages import one_line
from minigpt3d.point_cloud_minigpt3d import load_point_cloud


PREVIEW_POINTS = 2048


def point_cloud_path(data_dir: str | Path, object_id: str) -> Path:
    """The file of an object's cloud, as PointLLM names it."""
    return Path(data_dir) / f"{object_id}_8192.npy"


def read_point_cloud(data_dir: str | Path, object_id: str) -> np.ndarray:
    """(8192, 6) float32 of an object: xyz in any unit, rgb in [0, 1].

    Raises:
        ValueError: the file is missing or does not hold such a cloud; the message names the object.
    """
    path = point_cloud_path(data_dir, object_id)
    try:
        cloud = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"object_id {object_id!r}: cannot read {path} ({one_line(error)[:200]}).") from error
    if not isinstance(cloud, np.ndarray) or cloud.dtype.kind not in "fiu":
        got = getattr(cloud, "dtype", type(cloud).__name__)
        raise ValueError(f"object_id {object_id!r}: {path} must hold numbers, got {got}.")
    if cloud.ndim != 2 or cloud.shape[1] != 6 or not len(cloud):
        raise ValueError(f"object_id {object_id!r}: {path} must have shape (points, 6), got {cloud.shape}.")
    if not np.isfinite(cloud).all():
        raise ValueError(f"object_id {object_id!r}: {path} holds NaN or infinite values.")
    if cloud[:, 3:].min() < 0 or cloud[:, 3:].max() > 1:
        raise ValueError(f"object_id {object_id!r}: {path} must have colors in [0, 1], got some outside.")
    return cloud.astype(np.float32)


def encode_cloud(cloud: np.ndarray) -> tuple[bytes, bytes]:
    """(N, 6), xyz in [-1, 1] and rgb in [0, 1] → 6 bytes a point of coordinates, 3 of colors."""
    coord = np.round((cloud[:, :3].astype(np.float64) + 1) * 32767.5)
    return coord.astype("<u2").tobytes(), np.round(cloud[:, 3:] * 255).astype(np.uint8).tobytes()


def load_encoded(path: str | Path, num_points: int, **reading) -> tuple[bytes, bytes, float]:
    """Read a file of any format; returns what `encode_cloud` makes of it, and the largest error of its coordinates."""
    cloud = load_point_cloud(path, num_points, **reading)
    coord, color = encode_cloud(cloud)
    return coord, color, float(np.abs(decode_cloud(coord, color)[:, :3] - cloud[:, :3]).max())


def decode_cloud(coord: bytes, color: bytes) -> np.ndarray:
    """What `encode_cloud` packed, (N, 6) float32; coordinates are off by at most 1.6e-5."""
    cloud = np.empty((len(color) // 3, 6), dtype=np.float32)
    cloud[:, :3] = np.frombuffer(coord, "<u2").reshape(-1, 3) * np.float32(1 / 32767.5) - np.float32(1)
    cloud[:, 3:] = np.frombuffer(color, np.uint8).reshape(-1, 3) * np.float32(1 / 255)
    return cloud


def choose_points(cloud: np.ndarray, num_points: int, seed: int) -> np.ndarray:
    """A packed cloud (N, 6) as a model reads it, (num_points, 6) float32, normalized.

    Packing has normalized a cloud of as many points; fewer are sampled as the model's processor does, with its seed.
    """
    return cloud if len(cloud) == num_points else load_point_cloud(cloud, num_points, seed=seed)


@dataclass(frozen=True)
class Grouping:
    """What the groups of a packed cloud depend on.

    Args:
        num_points, seed: of the model's processor, see `choose_points`.
        num_groups, group_size: of its 3D encoder, G and K.
    """

    num_points: int
    seed: int
    num_groups: int
    group_size: int

    def __post_init__(self):
        if not all(isinstance(number, int) for number in vars(self).values()):
            raise TypeError(f"a grouping has whole numbers, got {self}")

    @classmethod
    def of(cls, config, processor) -> "Grouping":
        """The one of a model, of its `MiniGPT3DConfig` and `MiniGPT3DProcessor`."""
        extractor, encoder = processor.feature_extractor, config.point_config
        return cls(extractor.num_points, extractor.seed, encoder.num_groups, encoder.group_size)

    def __str__(self) -> str:
        return f"{self.num_groups} groups of {self.group_size} among {self.num_points} points (seed {self.seed})"


def to_glb(point_cloud: np.ndarray) -> bytes:
    """A small `.glb` of about `PREVIEW_POINTS` of a cloud's points (N, 6)."""
    import trimesh

    shown = point_cloud[:: max(1, len(point_cloud) // PREVIEW_POINTS)]
    colors = np.round(255 * np.column_stack([shown[:, 3:], np.ones(len(shown))])).astype(np.uint8)
    return trimesh.PointCloud(shown[:, :3], colors=colors).export(file_type="glb")


def augment(point_cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random variant of a cloud, as another scan of the same object could give, so that the same answers hold.

    The proportions change by up to 15 % along each axis. The object turns about the up axis y, half of the time by at most
    15°, since most objects stand straight. Points move by up to 1 % of the size. Half of the clouds lose up to a third of
    their points on one side, as scans do; one in four has fewer points; both are filled up by repeating points. Colors
    stay, because answers mention them. Without augmentation the encoder overfits: it was pretrained on the same objects
    that the stages train on.

    Args:
        point_cloud: (N, 6) float32, xyz and rgb; it is not changed.
        rng: source of randomness.

    Returns:
        (N, 6) float32, not normalized again.
    """
    coord, color = point_cloud[:, :3], point_cloud[:, 3:]
    coord = (coord - coord.mean(0)) * rng.uniform(0.85, 1.15, size=3)
    angle = np.radians(rng.uniform(-15, 15) if rng.random() < 0.5 else rng.uniform(-180, 180))
    cos, sin = np.cos(angle), np.sin(angle)
    coord = coord @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    noise = rng.uniform(0, 0.01) * np.linalg.norm(coord, axis=1).max()
    cloud = np.concatenate([coord + rng.normal(scale=noise, size=coord.shape), color], axis=1).astype(np.float32)
    kept = np.arange(len(cloud))
    if rng.random() < 0.5:
        along = coord @ rng.normal(size=3)
        kept = np.flatnonzero(along <= np.quantile(along, rng.uniform(2 / 3, 1)))
    if rng.random() < 0.25:
        kept = rng.permutation(kept)[: rng.integers(len(kept) // 8 + 1, len(kept) + 1)]
    return cloud[np.resize(kept, len(cloud))]
