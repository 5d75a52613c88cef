"""The main colour of a coloured point cloud, as one of eleven basic names, and the test whether an answer names it.

Every point gets the name of its colour by fixed limits in hue, saturation and value; the name that most points have
is the main colour. The limits between neighbours are matters of taste, so they are decided here, once:

    black    value below 0.20
    white    nearly without hue, value from 0.80        gray   the same, in between
    brown    hues from red to yellow that are dark or dull: wood, leather, cardboard, skin
    pink     light reds and magentas                    orange, yellow, red: only where bright and saturated
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # numpy is imported by the functions that compute, so that importing the words stays cheap
    import numpy as np


COLORS = ("black", "white", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
_INDEX = {name: index for index, name in enumerate(COLORS)}
OTHER_WORDS = {"grey": "gray", "violet": "purple", "magenta": "pink", "silver": "gray"}


def color_indices(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) colours in [0, 1] → (...) int64 indices into `COLORS`."""
    import numpy as np

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
    """(N, 3) colours in [0, 1] → (11,) share of the points with each name of `COLORS`."""
    import numpy as np

    return np.bincount(color_indices(rgb).ravel(), minlength=len(COLORS)) / max(1, rgb.size // 3)


def main_color(rgb: np.ndarray) -> str:
    """The name that most points have; the first of `COLORS` where two tie."""
    return COLORS[int(color_shares(rgb).argmax())]


def first_color(answer: str) -> str | None:
    """The first colour that an answer names; None if it names none."""
    for word in re.findall(r"[a-z]+", answer.lower()):
        word = OTHER_WORDS.get(word, word)
        if word in _INDEX:
            return word
    return None


def names_color(answer: str, color: str) -> bool:
    """Whether the first colour that the answer names is this one: naming them all does not help."""
    return first_color(answer) == color
