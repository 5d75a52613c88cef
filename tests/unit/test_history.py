"""The report of a run: reading its history, the picture, and each sign of failure against healthy runs with noise."""

import json
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minigpt3d.training import history as report
from minigpt3d.training.history import diagnose, draw_report, read_history
from minigpt3d.training.stages import RECIPES, learning_rate


PAPER, HOUSEHOLD = RECIPES["paper"], RECIPES["household"]
GROUPS = {
    "I": ["point_projection"],
    "II": ["point_projection", "qformer", "query_experts", "language_projection", "language_model"],
    "III": ["point_projection", "qformer", "query_experts", "language_projection", "language_model"],
    "IV": ["query_experts", "router"],
    "own": ["point_projection", "qformer", "language_projection", "language_model"],
}


def route(generator, preference: np.ndarray, spread: float, num_used: int = 2) -> dict:
    """A step's routing: 8 clouds whose logits lie around `preference` (E,), `spread` apart."""
    logits = preference + spread * generator.normal(size=(8, len(preference)))
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.argsort(-weights, axis=1)[:, :num_used]
    mean = weights.mean(0)
    entropy = -(weights * np.log(weights)).sum(1).mean()
    return {
        "load": (np.bincount(chosen.ravel(), minlength=len(mean)) / 8).tolist(),
        "weight": mean.tolist(),
        "entropy": float(entropy),
        "between": float(-(mean * np.log(mean)).sum() - entropy),
    }


def healthy(stage, num_steps: int, seed: int = 0, first_loss: float = 2.3, last_loss: float = 1.3) -> list[dict]:
    """A run as it should be, with the scatter of small batches and a gradient spike now and then."""
    generator = np.random.default_rng(seed)
    preference = generator.normal(size=8)
    history = []
    for step in range(num_steps):
        level = last_loss + (first_loss - last_loss) * np.exp(-5 * step / num_steps)
        lr = learning_rate(stage, step)
        spike = 30 if generator.random() < 0.01 else 1
        entry = {
            "step": step,
            "source": str(generator.choice([source.name for source in stage.mixture])),
            "loss": float(level * np.exp(0.2 * generator.normal())),
            "lr": lr,
            "grad_norm": float(spike * np.exp(0.4 * generator.normal())),
            "samples_per_second": float(40 + 5 * generator.normal()),
            "update_ratio": {g: float(30 * lr * np.exp(0.3 * generator.normal())) for g in GROUPS[stage.name]},
        }
        if stage.router_type != "none":
            entry["router"] = route(generator, preference, spread=1.5 * step / num_steps)
        history.append(entry)
    history[0]["loss"] = first_loss
    history[0]["validation_before"] = first_loss
    history[-1]["validation_after"] = last_loss
    return history


# ---- Reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["", '{"step": 3, "lo', '{"step": 3, "router": {"load": [0.5]}'])
def test_a_torn_last_line_is_left_out(tmp_path, rest):
    history = healthy(PAPER["I"], 3)
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history) + rest)
    assert read_history(path) == history


def test_a_whole_last_line_needs_no_newline(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"step": 1}')
    assert read_history(tmp_path / "history.jsonl") == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("broken", ['{"step": 1, "lo', "", "7", "\x00\x00\x00\x00"])
def test_another_broken_line_is_named(tmp_path, broken):
    path = tmp_path / "history.jsonl"
    path.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl, line 2: expected a JSON object"):
        read_history(path)


def test_no_steps(tmp_path):
    (tmp_path / "history.jsonl").write_text("")
    assert read_history(tmp_path / "history.jsonl") == []
    assert diagnose([], PAPER["I"]) == []
    with pytest.raises(ValueError, match="empty"):
        draw_report([], "Stage I", tmp_path / "report.png")


# ---- In words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", HOUSEHOLD)
def test_healthy_runs_yield_nothing(name, seed):
    stage = HOUSEHOLD[name]
    for num_steps in (1, 19, 20, 60, stage.steps):
        assert diagnose(healthy(stage, num_steps, seed), stage) == []


def test_healthy_run_of_the_papers_length_yields_nothing():
    """Nearly all of the fall lies in the first tenth; the rate of the first 7,000 steps is next to none."""
    history = healthy(PAPER["I"], 70_000)
    assert diagnose(history, PAPER["I"]) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["II", "III", "IV"])
def test_later_stages_may_stand_still(name, seed):
    history = healthy(HOUSEHOLD[name], HOUSEHOLD[name].steps, seed, first_loss=0.4, last_loss=0.4)
    assert diagnose(history, HOUSEHOLD[name]) == []


def test_warm_up_may_stand_still():
    """300 steps of the paper's schedule are all warm-up."""
    assert diagnose(healthy(PAPER["I"], 300, first_loss=2.3, last_loss=2.3), PAPER["I"]) == []
    history = healthy(PAPER["IV"], 300)
    for entry in history:
        entry["router"] = same_experts(0.01)
    assert diagnose(history, PAPER["IV"]) == []


@pytest.mark.parametrize("num_steps", [1, 300])
@pytest.mark.parametrize(("name", "weights"), [("I", "the base weights"), ("III", "stage II's weights")])
def test_missing_weights(name, weights, num_steps):
    history = healthy(HOUSEHOLD[name], num_steps)
    history[0]["loss"] = 10.4
    (finding,) = diagnose(history, HOUSEHOLD[name])
    assert "10.40" in finding and weights in finding and "tokenizer" in finding


@pytest.mark.parametrize("seed", range(5))
def test_stalled_loss(seed):
    stage = HOUSEHOLD["I"]
    (finding,) = diagnose(healthy(stage, stage.steps, seed, first_loss=2.3, last_loss=2.35), stage)
    assert "stalls" in finding and "Q-Former" in finding and "300 steps" in finding


def test_stalled_loss_at_the_papers_length():
    (finding,) = diagnose(healthy(PAPER["I"], 20_000, first_loss=2.3, last_loss=2.25), PAPER["I"])
    assert "stalls: 2." in finding and "20,000 steps" in finding


def same_experts(between: float, num_used: int = 2) -> dict:
    load = [0.0] * 8
    for expert in (6, 2, 0, 1, 3, 4, 5, 7)[:num_used]:
        load[expert] = 1.0
    weight = [0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.2, 0.1]
    of_the_mean = -sum(w * np.log(w) for w in weight)
    return {"load": load, "weight": weight, "entropy": of_the_mean - between, "between": between}


@pytest.mark.parametrize("seed", range(5))
def test_same_experts_for_all_clouds(seed):
    """As in a run whose router kept to the two experts that were ahead at the start."""
    stage = HOUSEHOLD["IV"]
    history = healthy(stage, stage.steps, seed)
    for entry in history[100:]:
        entry["router"] = same_experts(between=0.007)
    (finding,) = diagnose(history, stage)
    assert "experts 2 and 6 serve 100% of the clouds" in finding


@pytest.mark.parametrize("between", [0.0, 0.005, 0.1])
def test_equal_weights_of_a_soft_router(between):
    stage = replace(HOUSEHOLD["IV"], router_type="soft")
    history = healthy(stage, stage.steps)
    for entry in history:
        entry["router"] = same_experts(between, num_used=8)
    findings = diagnose(history, stage)
    assert len(findings) == (between < 0.01)
    assert all(f"differ by {between:.4f} nats" in finding for finding in findings)


def test_soft_routing_of_one_cloud_a_step():
    """Within such a step nothing differs, but between steps it does."""
    stage = replace(HOUSEHOLD["IV"], router_type="soft")
    history = healthy(stage, stage.steps)
    for entry in history:
        weight = [0.3, 0.1] * 4 if entry["step"] % 2 else [0.1, 0.3] * 4
        weight = [w / sum(weight) for w in weight]
        entropy = -sum(w * np.log(w) for w in weight)
        entry["router"] = {"load": [1.0] * 8, "weight": weight, "entropy": entropy, "between": 0.0}
    assert diagnose(history, stage) == []


def test_constant_routing_is_no_failure():
    stage = replace(HOUSEHOLD["IV"], router_type="constant")
    history = healthy(stage, stage.steps)
    for entry in history:
        entry["router"] = {"load": [1.0] * 8, "weight": [1 / 8] * 8, "entropy": np.log(8), "between": 0.0}
    assert diagnose(history, stage) == []


@pytest.mark.parametrize(("last", "sign"), [(0.0, "is 0"), (500.0, "diverges"), (np.nan, "diverges"), (np.inf, "inf")])
def test_broken_gradient(last, sign):
    history = healthy(HOUSEHOLD["II"], 100)
    for entry in history[80:]:
        entry["grad_norm"] = last
    (finding,) = diagnose(history, HOUSEHOLD["II"])
    assert "gradient norm" in finding and sign in finding


def test_overflows_of_float16_are_no_explosion():
    history = healthy(HOUSEHOLD["II"], 100)
    for entry in history[:4] + history[90::3]:
        entry["grad_norm"] = np.nan
        entry["update_ratio"] = dict.fromkeys(GROUPS["II"], 0.0)
    assert diagnose(history, HOUSEHOLD["II"]) == []


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_idle_group(decay):
    """AdamW's weight decay moves even weights that get no gradient."""
    stage = HOUSEHOLD["II"]
    history = healthy(stage, 100)
    for entry in history:
        entry["update_ratio"]["qformer"] = decay * entry["lr"] * stage.weight_decay
    (finding,) = diagnose(history, stage)
    assert "module group qformer does not learn" in finding


# ---- As a picture ---------------------------------------------------------------------------------------------------


def pixels(history: list[dict], path) -> np.ndarray:
    """(height, width, 3) of the report, drawn without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_report(history, "Stage $I$ of a run", path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("name", "num_steps"), [("I", 1), ("I", 2), ("III", 500), ("IV", 1), ("IV", 200)])
def test_picture(tmp_path, name, num_steps):
    image = pixels(healthy(PAPER[name], num_steps), tmp_path / "report.png")
    assert image.shape == ((1210 if name == "IV" else 935), 1210, 3)


def test_picture_of_the_papers_length(tmp_path):
    history = healthy(PAPER["I"], 1000) * 70
    for step, entry in enumerate(history):
        history[step] = entry | {"step": step}
    assert pixels(history, tmp_path / "report.png").shape == (935, 1210, 3)


def test_panels_show_their_own_data(tmp_path):
    """Other numbers of one kind change their panel, and leave the other rows as they are."""
    path = tmp_path / "report.png"
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


def test_numbers_that_are_none_can_be_drawn(tmp_path):
    history = healthy(PAPER["IV"], 50)
    for entry in history:
        entry["update_ratio"]["router"] = 0.0
        entry["grad_norm"] = 0.0
    history[7]["grad_norm"] = history[20]["grad_norm"] = np.nan
    history[30]["grad_norm"] = np.inf
    pixels(history, tmp_path / "report.png")


def test_nothing_is_left_where_drawing_fails(tmp_path):
    history = healthy(PAPER["I"], 3)
    (tmp_path / "report.png").mkdir()
    with pytest.raises(OSError):
        draw_report(history, "Stage I", tmp_path / "report.png")
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "minigpt3d\[train\]"'):
        draw_report(healthy(PAPER["I"], 3), "Stage I", tmp_path / "report.png")


def test_labels_are_spread_apart():
    for heights in ([0.0, 0.0, 0.0, 1.0, 1.0], [0.5] * 8, [0.02, 0.9, 0.95, 0.99]):
        spread = report._spread(np.array(heights), 1 / 11)
        assert np.diff(spread).min() >= 1 / 11 - 1e-9 and -1e-9 <= spread[0] and spread[-1] <= 1
