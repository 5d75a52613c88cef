"""Generated furniture from boxes, cylinders and spheres with random proportions and materials.

Real libraries hold a few dozen objects of a kind; generated ones show the encoder how far proportions vary. They are used
in the encoder's pre-training only, not in captions or scores.
"""

from collections.abc import Callable

import numpy as np


NUM_POINTS = 2048
CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))  # x, z
Part = tuple[str, np.ndarray, np.ndarray, int]  # shape, center (3,), size (3,), material


class _Builder:
    """Collects parts; y is up and the floor is y = 0."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.parts: list[Part] = []

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def add(self, shape: str, x: float, y: float, z: float, w: float, h: float, d: float, material: int = 0):
        """Add a part with center x, z, lowest point y and size w, h, d."""
        self.parts.append((shape, np.array([x, y + h / 2, z]), np.array([w, h, d]), material))

    def legs(self, w: float, h: float, d: float, material: int = 1):
        """Add four legs, a column on a foot, or two side panels under a top of this size."""
        style, t = self.rng.integers(5), self.u(0.02, 0.05)
        if style <= 2:
            shape = "cylinder" if style else "box"
            for x, z in CORNERS:
                self.add(shape, x * (w / 2 - t), 0, z * (d / 2 - t), 1.5 * t, h, 1.5 * t, material)
        elif style == 3:
            foot = self.u(0.4, 0.8) * min(w, d)
            self.add("cylinder", 0, 0, 0, 2 * t, h, 2 * t, material)
            self.add("cylinder", 0, 0, 0, foot, t, foot, material)
        else:
            for x in (-1, 1):
                self.add("box", x * (w / 2 - t), 0, 0, t, h, d * 0.9, material)


def _chair(b: _Builder) -> str:
    w, d, h = b.u(0.38, 0.6), b.u(0.38, 0.6), b.u(0.38, 0.5)
    b.legs(w, h, d)
    b.add("box", 0, h, 0, w, b.u(0.02, 0.1), d)
    back, t = b.u(0.3, 0.7), b.u(0.02, 0.08)
    style = b.rng.integers(3)
    if style == 0:
        b.add("box", 0, h, -d / 2, w, back, t)
    elif style == 1:
        for x in np.linspace(-w / 2, w / 2, b.rng.integers(3, 7)):
            b.add("box", x, h, -d / 2, 0.03, back, 0.03, 1)
        b.add("box", 0, h + back, -d / 2, w, 0.06, 0.03, 1)
    else:
        for x in (-w / 2, w / 2):
            b.add("box", x, h, -d / 2, 0.03, back, 0.03, 1)
        b.add("box", 0, h + back * 0.5, -d / 2, w, back * 0.5, t)
    if b.chance(0.35):
        for x in (-w / 2, w / 2):
            b.add("box", x, h + 0.2, 0, 0.05, 0.04, d, 1)
            b.add("box", x, h, d / 2 - 0.05, 0.04, 0.2, 0.04, 1)
    return "chair"


def _stool(b: _Builder) -> str:
    w, h = b.u(0.3, 0.45), b.u(0.4, 0.85)
    b.legs(w, h, w)
    b.add(("cylinder", "box")[b.rng.integers(2)], 0, h, 0, w, b.u(0.03, 0.1), w)
    return "stool"


def _seat_with_arms(b: _Builder, w: float):
    d, h, arm = b.u(0.7, 1.0), b.u(0.3, 0.48), b.u(0.08, 0.25)
    legs = b.u(0.0, 0.15)
    if legs > 0.03:
        b.legs(w, legs, d)
    b.add("box", 0, legs, 0, w, h - legs, d)
    b.add("box", 0, h, -d / 2 + 0.1, w, b.u(0.3, 0.55), b.u(0.12, 0.25))
    for x in (-1, 1):
        b.add("box", x * (w - arm) / 2, legs, 0, arm, h - legs + b.u(0.12, 0.28), d)
    cushions = max(1, round(w / 0.75))
    for i in range(cushions):
        width = (w - 2 * arm) / cushions
        b.add(
            "box", -w / 2 + arm + (i + 0.5) * width, h, 0.05, width * 0.95, 0.12, d * 0.75, 2 if b.chance(0.5) else 0
        )


def _armchair(b: _Builder) -> str:
    _seat_with_arms(b, b.u(0.65, 1.0))
    return "armchair"


def _sofa(b: _Builder) -> str:
    w = b.u(1.4, 2.8)
    _seat_with_arms(b, w)
    if b.chance(0.25):
        side = b.rng.choice((-1, 1))
        b.add("box", side * (w / 2 - 0.4), 0, 0.9, 0.8, 0.42, 1.0)
    return "sofa"


def _table(b: _Builder) -> str:
    w, d, h = b.u(0.5, 2.2), b.u(0.5, 1.1), b.u(0.32, 0.8)
    round_top = b.chance(0.3)
    d = w if round_top else d
    b.legs(w * (0.75 if round_top else 1), h, d * (0.75 if round_top else 1))
    b.add("cylinder" if round_top else "box", 0, h, 0, w, b.u(0.02, 0.08), d)
    if b.chance(0.25):
        b.add("box", 0, h * 0.3, 0, w * 0.8, 0.03, d * 0.8)
    return "table"


def _desk(b: _Builder) -> str:
    w, d, h = b.u(1.0, 1.8), b.u(0.5, 0.9), b.u(0.68, 0.8)
    b.add("box", 0, h, 0, w, 0.04, d)
    for x in (-1, 1):
        width = b.u(0.3, 0.5) if b.chance(0.5) else 0.05
        b.add("box", x * (w - width) / 2, 0, 0, width, h, d * 0.95, 1)
    if b.chance(0.5):
        b.add("box", 0, 0.2, -d / 2, w, h - 0.2, 0.03, 1)
    return "desk"


def _bed(b: _Builder) -> str:
    w, d, h = b.u(0.8, 2.0), b.u(1.8, 2.3), b.u(0.2, 0.45)
    b.add("box", 0, 0 if b.chance(0.6) else 0.15, 0, w, h * 0.7, d, 1)
    b.add("box", 0, h, 0.03, w * 0.97, b.u(0.1, 0.28), d * 0.95)
    b.add("box", 0, 0, -d / 2, w, b.u(0.5, 1.2), b.u(0.03, 0.1), 1)
    if b.chance(0.4):
        b.add("box", 0, 0, d / 2, w, b.u(0.3, 0.7), 0.05, 1)
    for x in (-0.25, 0.25) if w > 1.2 else (0,):
        b.add("ball" if b.chance(0.5) else "box", x * w, h + 0.22, -d / 2 + 0.3, 0.42 * min(w, 1), 0.13, 0.35, 2)
    if b.chance(0.15):  # bunk
        b.add("box", 0, h + 0.9, 0, w, 0.25, d)
        for x, z in CORNERS:
            b.add("box", x * w / 2, 0, z * d / 2, 0.06, h + 1.4, 0.06, 1)
    return "bed"


def _lamp(b: _Builder) -> str:
    style = b.rng.integers(4)
    shade, base = b.u(0.2, 0.5), b.u(0.12, 0.35)
    if style <= 1:  # on a foot: table or floor
        h = b.u(0.2, 0.5) if style else b.u(1.0, 1.7)
        b.add("cylinder", 0, 0, 0, base, 0.03, base, 1)
        b.add(("cylinder", "ball")[b.rng.integers(2)], 0, 0.03, 0, b.u(0.02, 0.16) if style else 0.03, h, 0.03, 1)
        b.add(("cone", "cylinder", "ball")[b.rng.integers(3)], 0, h, 0, shade, b.u(0.15, 0.4), shade)
    elif style == 2:  # hanging
        h = b.u(0.3, 1.0)
        b.add(("cone", "ball", "cylinder")[b.rng.integers(3)], 0, 0, 0, shade, b.u(0.12, 0.4), shade)
        b.add("cylinder", 0, 0.15, 0, 0.015, h, 0.015, 1)
        b.add("cylinder", 0, 0.15 + h, 0, 0.1, 0.03, 0.1, 1)
    else:  # street or desk lamp with an arm
        h, reach = b.u(0.4, 3.0), b.u(0.15, 0.5)
        b.add("cylinder", 0, 0, 0, base, 0.04, base, 1)
        b.add("cylinder", 0, 0, 0, 0.03, h, 0.03, 1)
        b.add("box", 0, h, reach / 2, 0.03, 0.03, reach, 1)
        b.add(("cone", "ball", "box")[b.rng.integers(3)], 0, h - 0.1, reach, 0.15, 0.12, 0.2)
    return "lamp"


def _cabinet(b: _Builder) -> str:
    w, h, d = b.u(0.4, 1.6), b.u(0.5, 1.2), b.u(0.3, 0.65)
    _box_with_fronts(b, w, h, d, rows=int(b.rng.integers(1, 5)), columns=int(b.rng.integers(1, 4)))
    return "cabinet"


def _wardrobe(b: _Builder) -> str:
    w = b.u(0.8, 2.4)
    _box_with_fronts(b, w, b.u(1.7, 2.4), b.u(0.5, 0.65), rows=1, columns=max(2, round(w / 0.5)))
    return "wardrobe"


def _box_with_fronts(b: _Builder, w: float, h: float, d: float, rows: int, columns: int):
    foot = b.u(0.0, 0.12)
    if foot > 0.05:
        b.legs(w, foot, d)
    b.add("box", 0, foot, 0, w, h, d)
    material = 1 if b.chance(0.4) else 0
    for row in range(rows):
        for column in range(columns):
            x, y = ((column + 0.5) / columns - 0.5) * w, foot + row / rows * h + 0.01
            b.add("box", x, y, d / 2, w / columns * 0.94, h / rows * 0.94, 0.04, material)
            b.add("box", x + 0.3 * w / columns, y + h / rows / 2, d / 2 + 0.04, 0.02, 0.08, 0.03, 2)


def _shelf(b: _Builder) -> str:
    w, h, d, t = b.u(0.5, 1.8), b.u(0.8, 2.2), b.u(0.2, 0.4), 0.025
    for y in np.linspace(0, h, b.rng.integers(3, 7)):
        b.add("box", 0, y, 0, w, t, d)
        if b.chance(0.35):
            b.add("box", b.u(-0.2, 0.2) * w, y, 0, b.u(0.2, 0.6) * w, 0.22, d * 0.7, 2)
    for x in (-1, 1):
        b.add("box", x * w / 2, 0, 0, t, h, d)
    if b.chance(0.5):
        b.add("box", 0, 0, -d / 2, w, h, 0.01, 1)
    return "bookcase"


def _door(b: _Builder) -> str:
    w, h = b.u(0.7, 1.0) * (2 if b.chance(0.25) else 1), b.u(1.95, 2.2)
    b.add("box", 0, 0, 0, w, h, b.u(0.03, 0.06))
    for x in (-1, 1):
        b.add("box", x * (w / 2 + 0.04), 0, 0, 0.08, h, 0.12, 1)
    b.add("box", 0, h, 0, w + 0.16, 0.08, 0.12, 1)
    b.add("cylinder", 0.4 * w, 1.0, 0.06, 0.05, 0.05, 0.1, 2)
    for row in range(int(b.rng.integers(0, 4))):
        b.add("box", 0, 0.15 + row * 0.6, 0.03, w * 0.7, 0.45, 0.03, 3)
    return "door"


def _window(b: _Builder) -> str:
    w, h, t = b.u(0.5, 2.2), b.u(0.6, 1.8), b.u(0.04, 0.09)
    for x in np.linspace(-w / 2, w / 2, b.rng.integers(2, 6)):
        b.add("box", x, 0, 0, t, h, t)
    for y in np.linspace(0, h, b.rng.integers(2, 5)):
        b.add("box", 0, y, 0, w, t, t)
    if b.chance(0.7):
        b.add("box", 0, 0, 0, w, h, 0.01, 1)
    if b.chance(0.4):
        b.add("box", 0, -0.04, 0.1, w * 1.1, 0.04, 0.25, 0)
    return "window"


def _sink(b: _Builder) -> str:
    w, d, h = b.u(0.4, 0.8), b.u(0.35, 0.55), b.u(0.1, 0.2)
    top = b.u(0.7, 0.85)
    if b.chance(0.6):
        b.add("cylinder", 0, 0, -0.05, 0.18, top, 0.18)
    b.add(("bowl", "box", "ball")[b.rng.integers(3)], 0, top, 0, w, h, d)
    b.add("cylinder", 0, top + h, -d / 2 + 0.05, 0.03, 0.15, 0.03, 1)
    b.add("box", 0, top + h + 0.14, -d / 2 + 0.1, 0.03, 0.03, 0.14, 1)
    return "sink"


def _bath(b: _Builder) -> str:
    w, d, h, t = b.u(1.4, 1.9), b.u(0.65, 0.9), b.u(0.45, 0.65), 0.06
    b.add("box", 0, 0, 0, w, 0.08, d)
    for x in (-1, 1):
        b.add("box", x * (w / 2), 0, 0, t, h, d)
    for z in (-1, 1):
        b.add("box", 0, 0, z * d / 2, w, h, t)
    b.add("cylinder", -w / 2 + 0.1, h, 0, 0.04, 0.15, 0.04, 1)
    return "bath"


def _toilet(b: _Builder) -> str:
    h = b.u(0.35, 0.43)
    b.add("ball" if b.chance(0.5) else "cylinder", 0, 0, 0.1, 0.3, h, 0.4)
    b.add("cylinder", 0, h, 0.12, 0.38, 0.05, 0.5, 1)
    b.add("box", 0, h * b.u(0.3, 1), -0.25, b.u(0.35, 0.5), b.u(0.3, 0.5), 0.2)
    if b.chance(0.4):
        b.add("box", 0, h, -0.1, 0.38, 0.42, 0.04, 1)
    return "toilet"


def _stove(b: _Builder) -> str:
    w, h, d = b.u(0.5, 0.9), b.u(0.8, 0.95), b.u(0.5, 0.65)
    b.add("box", 0, 0, 0, w, h, d)
    b.add("box", 0, h * 0.15, d / 2, w * 0.8, h * 0.5, 0.02, 1)
    b.add("box", 0, h * 0.7, d / 2 + 0.03, w * 0.7, 0.03, 0.03, 2)
    for x, z in CORNERS:
        b.add("cylinder", 0.25 * x * w, h, 0.25 * z * d, 0.3 * w, 0.02, 0.3 * w, 1)
    for x in np.linspace(-0.35, 0.35, 5):
        b.add("ball", x * w, h * 0.85, d / 2, 0.04, 0.04, 0.05, 2)
    return "stove"


def _fridge(b: _Builder) -> str:
    w, h, d = b.u(0.5, 0.95), b.u(1.3, 2.0), b.u(0.55, 0.75)
    split = b.u(0.3, 0.75) * h
    b.add("box", 0, 0, 0, w, h, d)
    b.add("box", 0, 0.03, d / 2, w, split - 0.05, 0.06, 1 if b.chance(0.3) else 0)
    b.add("box", 0, split, d / 2, w, h - split, 0.06, 1 if b.chance(0.3) else 0)
    for y in (split * 0.6, split + 0.1):
        b.add("box", -0.4 * w, y, d / 2 + 0.06, 0.03, 0.3, 0.04, 2)
    return "fridge"


def _washing_machine(b: _Builder) -> str:
    w, h = b.u(0.55, 0.65), b.u(0.8, 0.9)
    b.add("box", 0, 0, 0, w, h, w)
    b.add("disc", 0, h * 0.25, w / 2, w * 0.6, w * 0.6, 0.05, 1)
    b.add("box", 0, h * 0.85, w / 2, w * 0.9, h * 0.1, 0.02, 2)
    return "washing"


def _plant(b: _Builder) -> str:
    pot, h = b.u(0.12, 0.35), b.u(0.1, 0.35)
    b.add(("cylinder", "bowl", "box")[b.rng.integers(3)], 0, 0, 0, pot, h, pot, 4)
    top = h + b.u(0.2, 1.2)
    if b.chance(0.5):
        b.add("cylinder", 0, h, 0, 0.03, top - h, 0.03, 5)
    spread = b.u(0.15, 0.5)
    for _ in range(int(b.rng.integers(6, 20))):
        x, z = b.rng.normal(0, spread / 2, 2)
        b.add("ball", x, b.u(h, top), z, b.u(0.03, 0.25), b.u(0.05, 0.35), b.u(0.03, 0.25), 3)
    return "plant"


def _tree(b: _Builder) -> str:
    h, crown = b.u(0.8, 3.0), b.u(0.6, 1.6)
    b.add("cylinder", 0, 0, 0, 0.12, h, 0.12, 5)
    if b.chance(0.35):
        for i in range(4):
            b.add(
                "cone", 0, h * 0.3 + i * crown * 0.4, 0, crown * (1 - 0.2 * i), crown * 0.7, crown * (1 - 0.2 * i), 3
            )
    else:
        for _ in range(int(b.rng.integers(4, 14))):
            x, y, z = b.rng.normal(0, crown / 3, 3)
            size = b.u(0.3, 0.8) * crown
            b.add("ball", x, max(0.2, h + y), z, size, size * b.u(0.6, 1), size, 3)
    return "tree"


def _car(b: _Builder) -> str:
    w, length, h = b.u(1.6, 1.9), b.u(3.2, 4.8), b.u(0.5, 0.7)
    tall = b.chance(0.25)
    b.add("box", 0, 0.25, 0, w, h, length)
    cabin = length * (0.85 if tall else b.u(0.4, 0.6))
    b.add(
        "box" if tall else "ball",
        0,
        0.25 + h - (0 if tall else 0.5),
        -0.05 * length,
        w * 0.9,
        b.u(0.45, 0.6) * (1.5 if tall else 2),
        cabin,
        1 if b.chance(0.5) else 0,
    )
    for x, z in CORNERS:
        b.add("wheel", x * w * 0.48, 0, 0.32 * z * length, 0.2, 0.62, 0.62, 2)
    return "car"


def _bike(b: _Builder) -> str:
    wheel, length = b.u(0.5, 0.7), b.u(0.9, 1.2)
    thick = b.u(0.03, 0.14)
    for z in (-1, 1):
        b.add("ring", 0, 0, z * length / 2, thick, wheel, wheel, 1)
    b.add("box", 0, wheel * 0.6, 0, thick, thick, length * 0.8)
    b.add("box", 0, wheel * 0.6, -0.15 * length, thick, 0.35, thick)
    b.add("box", 0, wheel * 0.6, 0.4 * length, thick, 0.45, thick)
    b.add("box", 0, wheel * 0.6 + 0.42, 0.38 * length, b.u(0.4, 0.6), 0.03, 0.04, 1)
    b.add("ball", 0, wheel * 0.6 + 0.33, -0.17 * length, 0.15, 0.07, 0.27, 1)
    if thick > 0.09:
        b.add("box", 0, wheel * 0.4, 0, 0.25, 0.4, length * 0.5)
    return "bicycle" if thick < 0.08 else "motorbike"


def _person(b: _Builder) -> str:
    h, sitting = b.u(0.85, 1.05), b.chance(0.3)
    hips = 0.45 if sitting else h * 0.85
    for x in (-0.1, 0.1):
        if sitting:
            b.add("cylinder", x, 0, 0.42, 0.12, hips, 0.12, 1)
            b.add("box", x, hips - 0.06, 0.2, 0.14, 0.14, 0.5, 1)
        else:
            b.add("cylinder", x * b.u(0.8, 1.4), 0, 0, 0.14, hips, 0.14, 1)
    b.add("ball", 0, hips - 0.1, 0, b.u(0.34, 0.46), 0.72, 0.24)
    b.add("ball", 0, hips + 0.68, 0, 0.17, 0.25, 0.2, 6)
    b.add("ball", 0, hips + 0.78, -0.03, 0.19, 0.18, 0.2, 2)
    lift = b.u(0.0, 0.3)
    for x in (-1, 1):
        b.add(
            "cylinder", x * b.u(0.22, 0.32), hips + lift * b.u(0, 1), lift, 0.09, 0.6, 0.09, 0 if b.chance(0.6) else 6
        )
    return "person"


def _animal(b: _Builder) -> str:
    length, h, t = b.u(0.5, 1.0), b.u(0.2, 0.8), b.u(0.05, 0.1)
    for x, z in CORNERS:
        b.add("cylinder", x * 0.1, 0, z * length * 0.38, t, h, t)
    b.add("ball", 0, h * 0.85, 0, 0.3, 0.35, length * 1.05)
    b.add("ball", 0, h + 0.25, length * 0.55, 0.17, 0.2, 0.32)
    b.add("cylinder", 0, h, -length * 0.55, 0.04, b.u(0.1, 0.35), 0.06)
    return "animal"


_MAKERS: dict[str, tuple[Callable[[_Builder], str], ...]] = {
    "chair": (_chair, _chair, _armchair, _stool),
    "table": (_table, _table, _desk),
    "sofa": (_sofa,),
    "bed": (_bed,),
    "lamp": (_lamp,),
    "cabinet": (_cabinet, _wardrobe, _shelf),
    "door": (_door,),
    "window": (_window,),
    "plant": (_plant, _tree),
    "car": (_car,),
    "bike": (_bike,),
    "person": (_person,),
    "animal": (_animal,),
    "sink": (_sink, _bath),
    "toilet": (_toilet,),
    "appliance": (_stove, _fridge, _washing_machine),
}
# Materials 3 to 6 have natural colors: leaves, pots, wood, skin.
_NATURAL = {3: (0.2, 0.45, 0.15), 4: (0.6, 0.35, 0.2), 5: (0.4, 0.27, 0.15), 6: (0.85, 0.65, 0.5)}


def make_object(rng: np.random.Generator) -> tuple[str, str, np.ndarray]:
    """One object: noun, kind, and its cloud (2048, 6) float32, normalized, y up."""
    kind = list(_MAKERS)[rng.integers(len(_MAKERS))]
    builder = _Builder(rng)
    makers = _MAKERS[kind]
    noun = makers[rng.integers(len(makers))](builder)
    colors = rng.choice([0.15, 0.5, 0.9], (8, 1)) + rng.normal(0, 0.12, (8, 3))
    for material, color in _NATURAL.items():
        colors[material] = np.array(color) + rng.normal(0, 0.06, 3)
    areas = np.array([_area(shape, size) for shape, _, size, _ in builder.parts])
    counts = rng.multinomial(NUM_POINTS, areas / areas.sum())
    points = [
        np.concatenate(
            [_sample(shape, size, count, rng) + center, np.tile(colors[material], (count, 1)) * rng.normal(1, 0.03)],
            axis=1,
        )
        for (shape, center, size, material), count in zip(builder.parts, counts, strict=True)
    ]
    cloud = rng.permutation(np.concatenate(points))
    cloud[:, :3] -= cloud[:, :3].mean(0)
    cloud[:, :3] /= np.linalg.norm(cloud[:, :3], axis=1).max()
    cloud[:, 3:] = cloud[:, 3:].clip(0, 1)
    return noun, kind, cloud.astype(np.float32)


def _area(shape: str, size: np.ndarray) -> float:
    w, h, d = size
    box = 2 * (w * h + h * d + w * d)
    return box * {"box": 1.0, "ring": 0.3}.get(shape, 0.7)


def _sample(shape: str, size: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3) points on a shape of this size about the origin."""
    unit = rng.uniform(-1, 1, (count, 3))
    angle = rng.uniform(0, 2 * np.pi, count)
    cos, sin = np.cos(angle), np.sin(angle)
    if shape == "box":
        w, h, d = size
        face = rng.choice(3, count, p=np.array([h * d, w * d, w * h]) / (h * d + w * d + w * h))
        unit[np.arange(count), face] = np.sign(unit[np.arange(count), face])
    elif shape in ("ball", "bowl"):
        unit = rng.normal(size=(count, 3))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        if shape == "bowl":
            unit[:, 1] = 1 - 2 * np.abs(unit[:, 1])
    elif shape in ("cylinder", "cone"):
        cap = rng.random(count) < 0.2
        radius = np.where(cap, np.sqrt(rng.random(count)), 1.0)
        height = np.where(cap, np.sign(unit[:, 1]), unit[:, 1])
        if shape == "cone":
            radius = radius * (0.65 - 0.35 * height)
        unit = np.stack([radius * cos, height, radius * sin], axis=1)
    elif shape == "disc":
        radius = np.sqrt(rng.random(count))
        unit = np.stack([radius * cos, radius * sin, np.sign(unit[:, 2])], axis=1)
    else:  # wheels and rings; their axis is x
        radius = np.sqrt(rng.random(count)) if shape == "wheel" else rng.uniform(0.85, 1.0, count)
        unit = np.stack([np.sign(unit[:, 0]), radius * cos, radius * sin], axis=1)
    return unit * size / 2
