"""Every failure pattern is recognized, and healthy runs with noise give no warning."""

from dataclasses import replace

import numpy as np
import pytest
from made_up_histories import GROUPS, HOUSEHOLD, PAPER, healthy

from minigpt3d.training.diagnosis import diagnose


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", HOUSEHOLD)
def test_healthy_runs_give_no_warning(name, seed):
    stage = HOUSEHOLD[name]
    for num_steps in (1, 19, 20, 60, stage.steps):
        assert diagnose(healthy(stage, num_steps, seed), stage) == []


def test_a_healthy_run_of_the_papers_length_gives_no_warning():
    """Nearly all of the fall lies in the first tenth; the rate of the first 7,000 steps is next to none."""
    history = healthy(PAPER["I"], 70_000)
    assert diagnose(history, PAPER["I"]) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["II", "III", "IV"])
def test_later_stages_may_stay_constant(name, seed):
    history = healthy(HOUSEHOLD[name], HOUSEHOLD[name].steps, seed, first_loss=0.4, last_loss=0.4)
    assert diagnose(history, HOUSEHOLD[name]) == []


def test_warm_up_may_stay_constant():
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
    assert "stalls, 2." in finding and "20,000 steps" in finding


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
    assert "experts 2 and 6 serve 100%" in finding


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


def test_overflows_of_float16_are_no_divergence():
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
    assert "module qformer does not learn" in finding


def test_a_run_without_steps_gives_no_warning():
    assert diagnose([], PAPER["I"]) == []
