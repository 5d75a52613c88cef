"""Known failure patterns of a run, found in its history and reported as warnings."""

import math

import numpy as np

from .history import column, module_groups
from .stages import Stage


USUAL_FIRST_LOSS = "2 to 2.5"  # nats; the language model is pretrained, only the point cloud is new to it
MAX_FIRST_LOSS = 4.0  # twice that, beyond the scatter of a batch; guessing among Phi-2's 51,200 tokens costs 10.8
MIN_STEPS = 20  # fewer are not conclusive; float16's loss scaler alone may skip up to 16 at the start
MIN_STEPS_TO_LEARN = 200  # at a useful rate; in the household recipe stage I's loss falls by a quarter in 300
STALL_WINDOW = 50  # steps; batches scatter by 0.1 to 0.2 of the loss, medians over this window by 0.02 to 0.04
OPENING_STEPS = 200  # "the beginning" is no longer than this: a tenth of 70,000 steps would hide most of the fall
MIN_FALL = 0.1  # of the loss; beyond the scatter of two such medians, and half of what stage I falls in 300 steps
SAME_EXPERTS_LOAD = 0.98  # mean load of the most used experts: all clouds but a few use these
SAME_WEIGHTS_BETWEEN = 0.01  # nats; about where a cloud's weights differ from the mean weights by 15 %
MAX_GRADIENT_GROWTH = 100  # a healthy run's gradient changes by less than 10 times
# Times lr · weight decay, which is what AdamW moves without a gradient; with one it moves at least 10 times that.
DECAY_ALONE = 2


def diagnose(history: list[dict], stage: Stage) -> list[str]:
    """Warnings about a run: what was observed, the usual cause and what to do; an empty list for a healthy run."""
    if not history:
        return []
    findings = [_find_missing_weights(history, stage)]
    if len(history) >= MIN_STEPS:
        findings += [_find_broken_gradient(history), *_find_idle_groups(history, stage)]
    # During warm-up, which starts at a rate near zero, a constant loss or router is no failure.
    if len(history) >= max(MIN_STEPS_TO_LEARN, 2 * stage.warmup_steps):
        findings += [_find_stalled_loss(history, stage), _find_equal_routing(history, stage)]
    return [finding for finding in findings if finding]


def _find_missing_weights(history: list[dict], stage: Stage) -> str | None:
    loss = history[0]["loss"]
    if loss <= MAX_FIRST_LOSS:
        return None
    weights = {"base": "the base weights", "any": "the model's weights"}.get(
        stage.starts_from, f"stage {stage.starts_from}'s weights"
    )
    return (
        f"The loss of the first step is {loss:.2f}; {USUAL_FIRST_LOSS} is usual, or less in later stages. Usually "
        f"{weights} were not loaded, or language model and tokenizer do not match. Check that the model of `init` "
        "completes a plain sentence."
    )


def _find_broken_gradient(history: list[dict]) -> str | None:
    norms = column(history, "grad_norm")
    norms = np.where(np.isnan(norms), np.inf, norms)  # the median ignores single steps that overflow in float16
    first, last = (float(np.median(part)) for part in _ends(norms))
    if last == 0:
        return (
            "The gradient norm is 0 in the last tenth of the steps: nothing learns. Usually the loss does not depend on "
            "the trainable parameters (a frozen or detached part between them), or gradients underflow in float16. "
            "Check the table of trainable parameters, and train in bfloat16 or float32."
        )
    if 0 < first and MAX_GRADIENT_GROWTH * first < last:
        return (
            f"The gradient norm rose from {first:.2g} in the first tenth of the steps to {last:.2g} in the last: "
            "training diverges. Usually the learning rate is too high for this batch, or the dtype too narrow. "
            "Restart from a checkpoint before the rise, with a lower rate or in a wider dtype."
        )
    return None


def _find_idle_groups(history: list[dict], stage: Stage) -> list[str]:
    findings = []
    for group in module_groups(history):
        ratios = [(entry["update_ratio"].get(group, 0.0), entry["lr"]) for entry in history if "update_ratio" in entry]
        if all(ratio <= DECAY_ALONE * lr * stage.weight_decay for ratio, lr in ratios):
            findings.append(
                f"The module {group} does not learn: its updates are at most {max(ratios)[0]:.1g} of its weights in all "
                f"{len(history):,} steps, no more than weight decay alone. Usually no gradient reaches it, or the "
                "optimizer lacks its parameters. Check that the loss depends on it and that the table of trainable "
                "parameters lists it."
            )
    return findings


def _find_stalled_loss(history: list[dict], stage: Stage) -> str | None:
    if stage.starts_from != "base":  # later stages start from a trained model, so their loss may fall by little
        return None
    loss = column(history, "loss")
    size = max(len(loss) // 10, STALL_WINDOW)
    first, last = float(np.median(loss[: min(size, OPENING_STEPS)])), float(np.median(loss[-size:]))
    if last <= (1 - MIN_FALL) * first:
        return None
    return (
        f"{stage.title}: the loss stalls, {first:.2f} at the beginning, {last:.2f} at the end of "
        f"{len(history):,} steps. Usually the Q-Former or the projections after it lack their pretrained weights, so "
        "the language model gets no information about the cloud. Check that the model of `init` has them and that the "
        "updates of the point projection are about 1e-3 of its weights. Ignore this if that model was trained on the "
        "same data before."
    )


def _find_equal_routing(history: list[dict], stage: Stage) -> str | None:
    if stage.router_type not in ("sparse", "soft") or "router" not in history[0]:  # "constant" has no choice
        return None
    load, weight, entropy = (
        _ends(column(history, "router", name))[1].mean(0) for name in ("load", "weight", "entropy")
    )
    num_used = round(load.sum())
    used = np.argsort(-load)[:num_used]
    if num_used < len(load):
        equal = load[used].mean() >= SAME_EXPERTS_LOAD
        observed = f"experts {_listed(sorted(used))} serve {load[used].mean():.0%} of the clouds"
    else:
        # Over all steps of the last tenth: the clouds of one step may be a single one.
        between = max(0.0, float(-(weight * np.log(np.maximum(weight, 1e-12))).sum() - entropy))
        equal = between < SAME_WEIGHTS_BETWEEN
        observed = f"the weights of different clouds differ by {between:.4f} nats, out of {math.log(len(load)):.2f}"
    if not equal:
        return None
    return (
        f"All clouds use the same experts: in the last tenth of {len(history):,} steps, {observed}. Usually the "
        "features of different clouds are too similar (an encoder without its weights, clouds that are not normalized "
        "or have no colors), or the router was trained too briefly to leave the experts it preferred at the start. "
        f"Check clouds and encoder; if they are right, train for more steps or at a higher rate."
    )


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last tenth of the steps, but at least half of `MIN_STEPS` each."""
    size = max(len(values) // 10, MIN_STEPS // 2)
    return values[:size], values[-size:]


def _listed(items) -> str:
    """ "1, 2 and 3"."""
    *others, last = map(str, items)
    return f"{', '.join(others)} and {last}" if others else last
