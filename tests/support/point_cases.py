"""The object of the case files: (200, 100, 50) where x is smallest and (20, 40, 220) where it is largest, called "AB"."""

import json
import warnings
from pathlib import Path

import numpy as np

from minigpt3d.point_cloud_minigpt3d import PointCloudError, load_point_cloud


CASES = Path(__file__).parents[1] / "cases"
LEFT, RIGHT = np.array([200, 100, 50]), np.array([20, 40, 220])


def read_expected() -> dict[str, str]:
    """Names of the case files → what is expected: "AB", "none" (no color) or "refuse"."""
    return json.loads((CASES / "expected.json").read_text())


def make_object(num_points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """xyz (N, 3), rgb (N, 3) uint8."""
    rng = np.random.default_rng(3)
    coord = np.round((rng.random((num_points, 3)) - 0.5) * [4, 2, 1], 4)
    return coord, np.where(coord[:, :1] < 0, LEFT, RIGHT).astype(np.uint8)


def make_normals(num_points: int = 200) -> np.ndarray:
    normals = np.random.default_rng(4).normal(size=(num_points, 3))
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def what_is_seen(source) -> str:
    """ "AB", "none", "refuse", or the two colors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cloud = load_point_cloud(source, num_points=1024)
    except PointCloudError as error:
        assert not isinstance(source, Path) or source.name in str(error)
        return "refuse"
    x, color = cloud[:, 0], cloud[:, 3:]
    left, right = np.median(color[x < np.quantile(x, 0.3)], 0), np.median(color[x > np.quantile(x, 0.7)], 0)
    if np.allclose(left, LEFT / 255, atol=0.02) and np.allclose(right, RIGHT / 255, atol=0.02):
        return "AB"
    return "none" if color.max() < 0.01 else f"{(255 * left).round()} {(255 * right).round()}"
