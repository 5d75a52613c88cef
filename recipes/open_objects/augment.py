"""Random variants of a cloud, as another scan of the same object could give and as scans spoil them."""

import numpy as np


LOST_COLOR = 0.3  # share of the clouds


def augment(
    cloud: np.ndarray, num_points: int, rng: np.random.Generator, recolored: float = 0.4
) -> tuple[np.ndarray, np.ndarray]:
    """Turn, stretch, spoil and recolor a cloud.

    Half of the clouds turn about the up axis y by at most 15°, the others by any angle; 15 % have another up axis. Each axis
    is stretched by up to 15 %, a quarter are mirrored, half are bent by smooth waves. Colors: some get new ones part by part, three in ten lose them, the others
    shift a little. Points: 512 to all of them, noise of up to 1 %, a side missing from a third, 1 to 5 % outliers in a
    quarter, a floor under a tenth.

    Args:
        cloud: (N, 6), xyz centered with largest norm 1 and y up, rgb in [0, 1]; not changed.
        num_points: P, of the result.
        rng: source of randomness.
        recolored: share of the clouds with new colors; 0 where texts name the colors.

    Returns:
        The variant (P, 6) float32, normalized, and its object alone, without floor and outliers, which decides its texts.
    """
    count = int(np.exp(rng.uniform(np.log(512), np.log(len(cloud)))))
    cloud = cloud[rng.permutation(len(cloud))[:count]]
    coord, color = _turn(_bend(cloud[:, :3], rng), rng), _recolor(cloud[:, 3:], rng, recolored)
    coord = coord + rng.normal(scale=0.01 * rng.random() ** 2, size=coord.shape)
    if rng.random() < 0.33:
        along = coord @ rng.normal(size=3)
        kept = along <= np.quantile(along, rng.uniform(2 / 3, 1))
        coord, color = coord[kept], color[kept]
    item = points = np.concatenate([coord, color], axis=1)
    if rng.random() < 0.1:
        points = np.concatenate([points, make_floor(points, rng.uniform(0.1, 0.4), rng)])
    if rng.random() < 0.25:
        points = np.concatenate([points, make_outliers(points, rng.uniform(0.01, 0.05), rng)])
    return normalize(resample(points, num_points, rng)), item


def resample(points: np.ndarray, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """`num_points` of the points (N, C), repeated if they are fewer."""
    return points[np.resize(rng.permutation(len(points)), num_points)]


def normalize(points: np.ndarray) -> np.ndarray:
    """(N, 6) float32 with xyz centered on its mean and largest norm 1."""
    points = points.astype(np.float32)
    points[:, :3] -= points[:, :3].mean(0)
    points[:, :3] /= max(np.linalg.norm(points[:, :3], axis=1).max(), 1e-6)
    return points


def _turn(coord: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle = np.radians(rng.uniform(-15, 15) if rng.random() < 0.5 else rng.uniform(-180, 180))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    matrix = matrix * rng.uniform(0.85, 1.15, size=(3, 1)) + rng.normal(scale=0.02, size=(3, 3))
    if rng.random() < 0.25:
        matrix[0] *= -1
    if rng.random() < 0.15:
        # z up, x up, or upside down: proper turns, so that letters and screws stay as they are
        axes = (
            ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
            ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
            ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
        )
        matrix = matrix @ np.array(axes[rng.choice(3, p=(0.6, 0.25, 0.15))]).T
    return coord @ matrix


def _bend(coord: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the clouds: each point moved along a random direction by a wave of low frequency, twice."""
    if rng.random() < 0.5:
        return coord
    for _ in range(2):
        wave = np.sin(coord @ rng.normal(scale=2, size=3) + rng.uniform(0, 2 * np.pi))
        coord = coord + 0.08 * rng.random() * wave[:, None] * rng.normal(size=3)
    return coord


def _recolor(color: np.ndarray, rng: np.random.Generator, recolored: float) -> np.ndarray:
    chance = rng.random()
    if chance < LOST_COLOR:
        return np.zeros_like(color)
    if chance < LOST_COLOR + recolored:
        parts = color[rng.integers(len(color), size=rng.integers(1, 5))]
        nearest = ((color[:, None] - parts) ** 2).sum(-1).argmin(1)
        new = rng.random(parts.shape) if rng.random() < 0.7 else parts[rng.permutation(len(parts))]
        color = new[nearest] + 0.7 * (color - parts[nearest])
    light = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, size=3)
    return (color * light + rng.normal(scale=0.01, size=color.shape)).clip(0, 1)


def make_floor(points: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A plane of one color under the object (N, 6), of a share of its points."""
    low, high = points[:, :3].min(0), points[:, :3].max(0)
    reach = np.abs(points[:, [0, 2]]).max() * rng.uniform(1, 1.5)
    floor = np.empty((int(len(points) * share), 6))
    floor[:, [0, 2]] = rng.uniform(-reach, reach, size=(len(floor), 2))
    floor[:, 1] = low[1] + rng.normal(scale=0.005 * (high[1] - low[1]) + 1e-6, size=len(floor))
    floor[:, 3:] = (rng.random(3) + rng.normal(scale=0.03, size=(len(floor), 3))).clip(0, 1)
    return floor


def make_outliers(points: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Points of any color anywhere in a box around the object (N, 6), of a share of its points."""
    count = max(1, int(len(points) * share))
    low, high = points[:, :3].min(0), points[:, :3].max(0)
    reach = 0.25 * rng.random() * (high - low)
    return np.concatenate([rng.uniform(low - reach, high + reach, size=(count, 3)), rng.random((count, 3))], axis=1)
