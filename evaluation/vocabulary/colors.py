"""The main color of a point cloud, one of eleven basic names, and a test whether an answer names it.

Each point gets a color name by fixed limits in hue, saturation and value; the name of most points is the main color. The limits
between similar colors are a convention:

    black                  value below 0.20
    white, gray            low saturation; white from value 0.80
    brown                  dark or dull hues from red to yellow: wood, leather, cardboard, skin
    pink                   light reds and magentas
    orange, yellow, red    only where bright and saturated
"""

import re

import numpy as np


COLORS = ("black", "white", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
_INDEX = {name: index for index, name in enumerate(COLORS)}
OTHER_WORDS = {"grey": "gray", "violet": "purple", "magenta": "pink", "silver": "gray"}


def color_indices(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) RGB in [0, 1] -> (...) int64 indices into `COLORS`."""
    rgb = np.asarray(rgb, dtype=np.float32)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = rgb.max(-1)
    chroma = value - rgb.min(-1)
    saturation = chroma / np.maximum(value, 1e-6)
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(
        value == red,
        ((green - blue) / safe) % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = hue * 60 % 360
    limits = np.array([12, 42, 70, 165, 255, 290, 345, 360])
    names = np.array([_INDEX[n] for n in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "red", "red")])
    index = names[np.searchsorted(limits, hue, side="right")]
    light_red = ((hue < 12) | (hue >= 320)) & (saturation < 0.55) & (value >= 0.7)
    index = np.where(light_red, _INDEX["pink"], index)
    index = np.where((hue >= 290) & (hue < 345) & (value < 0.55), _INDEX["purple"], index)
    warm = (hue < 50) | (hue >= 350)
    index = np.where(warm & (hue >= 12) & (hue < 50) & ((value < 0.75) | (saturation < 0.6)), _INDEX["brown"], index)
    index = np.where((hue >= 50) & (hue < 70) & ((value < 0.55) | (saturation < 0.3)), _INDEX["brown"], index)
    index = np.where(warm & ((hue < 12) | (hue >= 350)) & (value < 0.6) & (saturation < 0.65), _INDEX["brown"], index)
    plain = saturation < np.where((hue >= 12) & (hue < 70), 0.18, 0.14)
    index = np.where(plain, np.where(value >= 0.8, _INDEX["white"], _INDEX["gray"]), index)
    return np.where(value < 0.2, _INDEX["black"], index)


def color_shares(rgb: np.ndarray) -> np.ndarray:
    """(N, 3) RGB in [0, 1] -> (11,) shares of the points with each name of `COLORS`."""
    return np.bincount(color_indices(rgb).ravel(), minlength=len(COLORS)) / max(1, rgb.size // 3)


def main_color(rgb: np.ndarray) -> str:
    """The name of most points of (N, 3) RGB in [0, 1]; if two tie, the first in `COLORS`."""
    return COLORS[int(color_shares(rgb).argmax())]


def first_color(answer: str) -> str | None:
    """The first color that an answer names; None if it names none."""
    for word in re.findall(r"[a-z]+", answer.lower()):
        word = OTHER_WORDS.get(word, word)
        if word in _INDEX:
            return word
    return None


def names_color(answer: str, color: str) -> bool:
    """Whether this is the first color that the answer names. Only the first counts, so that naming all does not help."""
    return first_color(answer) == color
