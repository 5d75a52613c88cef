"""Shapes that are nothing: primitives, blobs and broken pieces, from which a model learns to say that it is not sure."""

import numpy as np

from .captioned_objects import NUM_POINTS


NOTHING = "nothing"


def make_nothing(clouds: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A shape without a name.

    Args:
        clouds: (N, 6) each, to break pieces off.
        rng: source of randomness.

    Returns:
        (4096, 6) float32, xyz centered with largest norm 1, rgb in [0, 1].
    """
    maker = (_primitive, _primitives, _blob, _blob, _scatter, None)[rng.integers(6)]
    if maker is None:
        cloud = _piece(clouds[rng.integers(len(clouds))], rng)
    else:
        cloud = maker(rng)
    coord = cloud[:, :3] - cloud[:, :3].mean(0)
    coord /= max(np.linalg.norm(coord, axis=1).max(), 1e-6)
    return np.concatenate([coord, cloud[:, 3:].clip(0, 1)], axis=1).astype(np.float32)


def _color(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(rng.random(3) + rng.normal(scale=rng.uniform(0, 0.04), size=(count, 3)), 0, 1)


def _sphere(rng: np.random.Generator, count: int) -> np.ndarray:
    coord = rng.normal(size=(count, 3))
    return coord / np.linalg.norm(coord, axis=1, keepdims=True)


def _primitive(rng: np.random.Generator, count: int = NUM_POINTS) -> np.ndarray:
    """A sphere, box, cylinder, cone, torus or plane, stretched, of one color."""
    u, v = rng.random((2, count))
    angle, shape = 2 * np.pi * u, rng.integers(6)
    if shape == 0:
        coord = _sphere(rng, count)
    elif shape == 1:
        coord = rng.uniform(-1, 1, size=(count, 3))
        side = rng.integers(3, size=count)
        coord[np.arange(count), side] = np.where(v < 0.5, -1, 1)
    elif shape == 2:
        lid, radius = rng.random(count) < 0.33, np.sqrt(rng.random(count))
        radius = np.where(lid, radius, 1)
        height = np.where(lid, np.where(v < 0.5, -1, 1), 2 * v - 1)
        coord = np.stack([radius * np.cos(angle), height, radius * np.sin(angle)], axis=1)
    elif shape == 3:
        radius = np.sqrt(v)
        height = np.where(rng.random(count) < 0.3, -1, 1 - 2 * radius)
        coord = np.stack([radius * np.cos(angle), height, radius * np.sin(angle)], axis=1)
    elif shape == 4:
        ring = 1 + rng.uniform(0.15, 0.5) * np.cos(2 * np.pi * v)
        coord = np.stack([ring * np.cos(angle), 0.3 * np.sin(2 * np.pi * v), ring * np.sin(angle)], axis=1)
    else:
        coord = np.stack([2 * u - 1, np.zeros(count), 2 * v - 1], axis=1)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return np.concatenate([coord * rng.uniform(0.3, 1, size=3) @ turn, _color(rng, count)], axis=1)


def _primitives(rng: np.random.Generator) -> np.ndarray:
    """A heap of two to six primitives."""
    parts = []
    for count in np.diff(np.linspace(0, NUM_POINTS, rng.integers(3, 8)).astype(int)):
        part = _primitive(rng, count)
        part[:, :3] = part[:, :3] * rng.uniform(0.3, 1) + rng.normal(scale=0.7, size=3)
        parts.append(part)
    return np.concatenate(parts)


def _blob(rng: np.random.Generator) -> np.ndarray:
    """A sphere whose radius waves, with colors that wave too."""
    coord = _sphere(rng, NUM_POINTS)
    waves = [np.sin(coord @ rng.normal(scale=rng.uniform(1, 4), size=3) + rng.uniform(0, 6)) for _ in range(6)]
    radius = 1 + rng.uniform(0.1, 0.35) * sum(waves[:4])
    mix = (0.5 + 0.5 * waves[4])[:, None]
    color = mix * _color(rng, NUM_POINTS) + (1 - mix) * _color(rng, NUM_POINTS)
    return np.concatenate([coord * np.abs(radius)[:, None] * rng.uniform(0.5, 1, size=3), color], axis=1)


def _scatter(rng: np.random.Generator) -> np.ndarray:
    """Points around a few random centers or along a random walk, of random colors."""
    if rng.random() < 0.5:
        center = rng.normal(size=(rng.integers(2, 12), 3))
        coord = center[rng.integers(len(center), size=NUM_POINTS)]
        coord = coord + rng.normal(scale=rng.uniform(0.1, 0.5), size=coord.shape)
    else:
        walk = np.cumsum(rng.normal(size=(64, 3)), axis=0)
        coord = walk[rng.integers(64, size=NUM_POINTS)] + rng.normal(scale=0.4, size=(NUM_POINTS, 3))
    color = rng.random((NUM_POINTS, 3)) if rng.random() < 0.3 else _color(rng, NUM_POINTS)
    return np.concatenate([coord, color], axis=1)


def _piece(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The points nearest to a random one: a twelfth to a fifth of an object, turned at random."""
    distance = np.linalg.norm(cloud[:, :3] - cloud[rng.integers(len(cloud)), :3], axis=1)
    kept = np.argsort(distance)[: int(len(cloud) * rng.uniform(1 / 12, 1 / 5))]
    piece = cloud[rng.choice(kept, NUM_POINTS)].copy()
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    piece[:, :3] = piece[:, :3] @ turn + rng.normal(scale=0.002, size=(NUM_POINTS, 3))
    return piece
