"""The picture of a run."""

import json
import sys
import warnings

import numpy as np
import pytest
from made_up_histories import HOUSEHOLD, PAPER, healthy
from PIL import Image

from minigpt3d.training import curves
from minigpt3d.training.curves import draw_curves


def pixels(history: list[dict], path) -> np.ndarray:
    """(height, width, 3) of the picture, drawn without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(history, "Stage $I$ of a run", path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("name", "num_steps"), [("I", 1), ("I", 2), ("III", 500), ("IV", 1), ("IV", 200)])
def test_picture(tmp_path, name, num_steps):
    image = pixels(healthy(PAPER[name], num_steps), tmp_path / "curves.png")
    assert image.shape == ((1210 if name == "IV" else 935), 1210, 3)


def test_picture_of_the_papers_length(tmp_path):
    history = healthy(PAPER["I"], 1000) * 70
    for step, entry in enumerate(history):
        history[step] = entry | {"step": step}
    assert pixels(history, tmp_path / "curves.png").shape == (935, 1210, 3)


def test_panels_show_their_own_data(tmp_path):
    """Other numbers of one kind change their panel, and leave the other rows as they are."""
    path = tmp_path / "curves.png"
    history = healthy(HOUSEHOLD["IV"], 50)
    before = pixels(history, path)

    def changed(change) -> tuple[bool, bool, bool, bool]:
        """In which quarters of the picture: top left, top right, bottom left, bottom right."""
        other = json.loads(json.dumps(history))
        for entry in other:
            change(entry)
        different = (pixels(other, path) != before).any(-1)
        halves = np.array_split(different, 2)
        return tuple(bool(part.any()) for half in halves for part in np.array_split(half, 2, axis=1))

    assert changed(lambda entry: entry.update(loss=entry["loss"] ** 0.9)) == (True, True, False, False)
    assert changed(lambda entry: entry["update_ratio"].update(router=1e-3))[:2] == (False, True)
    assert changed(lambda entry: entry.update(samples_per_second=41.0)) == (False, False, False, True)
    assert changed(lambda entry: entry["router"]["load"].reverse()) == (False, False, True, False)


def test_nan_and_infinity_can_be_drawn(tmp_path):
    history = healthy(PAPER["IV"], 50)
    for entry in history:
        entry["update_ratio"]["router"] = 0.0
        entry["grad_norm"] = 0.0
    history[7]["grad_norm"] = history[20]["grad_norm"] = np.nan
    history[30]["grad_norm"] = np.inf
    assert np.ptp(pixels(history, tmp_path / "curves.png")) > 0


def test_a_failed_drawing_leaves_nothing(tmp_path):
    history = healthy(PAPER["I"], 3)
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(OSError):
        draw_curves(history, "Stage I", tmp_path / "curves.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "minigpt3d\[train\]"'):
        draw_curves(healthy(PAPER["I"], 3), "Stage I", tmp_path / "curves.png")


def test_labels_are_spread_apart():
    for heights in ([0.0, 0.0, 0.0, 1.0, 1.0], [0.5] * 8, [0.02, 0.9, 0.95, 0.99]):
        spread = curves._spread(np.array(heights), 1 / 11)
        assert np.diff(spread).min() >= 1 / 11 - 1e-9 and -1e-9 <= spread[0] and spread[-1] <= 1


def test_an_empty_history_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        draw_curves([], "Stage I", tmp_path / "curves.png")
