"""What a training run shows: its curves as a picture, and the known ways to fail in words.

A history has one entry for each optimizer step:

    step, source            counted from 0; the source that the step drew
    loss                    mean cross-entropy over the answer tokens, in nats
    lr, grad_norm           learning rate; norm of the gradient over all that trains
    samples_per_second      with the wait for data
    update_ratio            {module group: norm of the step's update / norm of the weights}
    router                  only where there is a router, over the clouds of the step:
        load, weight        [E], share of the clouds that use an expert; mean softmax weight
        entropy, between    mean entropy of a cloud's weights; entropy of the mean weights minus that. In nats
    validation_before       loss on held-out samples, in the first entry, if it was measured
    validation_after        the same, in the last entry
"""

import json
import math
from itertools import cycle
from pathlib import Path

import numpy as np

from .stages import Stage


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_history(path: str | Path) -> list[dict]:
    """The entries of a history.jsonl. A last line that was torn when the run was killed is left out.

    Raises:
        ValueError: another line is no JSON object.
    """
    lines = Path(path).read_bytes().split(b"\n")  # a whole line ends in a newline, so the last one is empty or torn
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            history.append(entry)
        elif number < len(lines):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {line[:60]!r}. Only the last line may be torn; "
                "remove this one, or the file."
            )
    return history


# ---- In words -------------------------------------------------------------------------------------------------------

USUAL_FIRST_LOSS = "2 to 2.5"  # nats; the language model is trained already, only the cloud is new to it
MAX_FIRST_LOSS = 4.0  # twice that, beyond the scatter of a batch; guessing among Phi-2's 51,200 tokens costs 10.8
MIN_STEPS = 20  # fewer say nothing; float16's loss scaler alone may skip up to 16 at the start
MIN_STEPS_TO_LEARN = 200  # at a useful rate; in the household recipe stage I's loss falls by a quarter in 300
STALL_WINDOW = 50  # steps; batches scatter by 0.1 to 0.2 of the loss, the medians of so many by 0.02 to 0.04
OPENING_STEPS = 200  # "the beginning" is no longer than this: a tenth of 70,000 steps would hide most of the fall
MIN_FALL = 0.1  # of the loss; beyond the scatter of two such medians, and half of what stage I falls in 300 steps
SAME_EXPERTS_LOAD = 0.98  # mean load of the most used experts: all clouds, but for a stray one, use these
SAME_WEIGHTS_BETWEEN = 0.01  # nats; about where a cloud's weights differ from the mean ones by 15 % of their size
MAX_GRADIENT_GROWTH = 100  # a healthy run's gradient changes by less than 10 times
DECAY_ALONE = (
    2  # times lr · weight decay, what AdamW moves without a gradient; with one it moves at least 10 times that
)


def diagnose(history: list[dict], stage: Stage) -> list[str]:
    """Signs that a run has failed, each with what was seen, what it usually means and what to do; none if all is well."""
    if not history:
        return []
    findings = [_find_missing_weights(history, stage)]
    if len(history) >= MIN_STEPS:
        findings += [_find_broken_gradient(history), *_find_idle_groups(history, stage)]
    # During warm-up, which starts at a rate near zero, a loss or a router that stands still means nothing.
    if len(history) >= max(MIN_STEPS_TO_LEARN, 2 * stage.warmup_steps):
        findings += [_find_stalled_loss(history, stage), _find_equal_routing(history, stage)]
    return [finding for finding in findings if finding]


def _find_missing_weights(history: list[dict], stage: Stage) -> str | None:
    loss = history[0]["loss"]
    if loss <= MAX_FIRST_LOSS:
        return None
    before = "the base weights" if stage.starts_from == "base" else f"stage {stage.starts_from}'s weights"
    return (
        f"The loss of the first step is {loss:.2f}, where {USUAL_FIRST_LOSS} is usual or, in later stages, less. Usually "
        f"{before} were not loaded, or the language model and the tokenizer do not belong together. Check --init: let "
        "the model it holds continue a plain sentence."
    )


def _find_broken_gradient(history: list[dict]) -> str | None:
    norms = _values(history, "grad_norm")
    norms = np.where(np.isnan(norms), np.inf, norms)  # a median passes over the odd step that overflows in float16
    first, last = (float(np.median(part)) for part in _ends(norms))
    if last == 0:
        return (
            "The gradient norm is 0 in the last tenth of the steps: nothing learns. Usually the loss does not depend on "
            "what trains (a frozen or detached part between them), or gradients underflow in float16. Check the "
            "trainable table, and train in bfloat16 or float32."
        )
    if 0 < first and MAX_GRADIENT_GROWTH * first < last:
        return (
            f"The gradient norm rose from {first:.2g} in the first tenth of the steps to {last:.2g} in the last: "
            "training diverges. Usually the learning rate is too high for this batch, or the dtype too narrow. Start "
            "again from a checkpoint before the rise, with a lower rate or in a wider dtype."
        )
    return None


def _find_idle_groups(history: list[dict], stage: Stage) -> list[str]:
    findings = []
    for group in _groups(history):
        ratios = [(entry["update_ratio"].get(group, 0.0), entry["lr"]) for entry in history]
        if all(ratio <= DECAY_ALONE * lr * stage.weight_decay for ratio, lr in ratios):
            findings.append(
                f"The module group {group} does not learn: its updates are at most {max(ratios)[0]:.1g} of its weights, "
                f"no more than weight decay alone, in all {len(history):,} steps. Usually no gradient reaches it, or the "
                "optimizer does not hold its parameters. Check that the loss depends on it and that it stands in the "
                "trainable table."
            )
    return findings


def _find_stalled_loss(history: list[dict], stage: Stage) -> str | None:
    if stage.starts_from != "base":  # later stages start from a trained model, so their loss may fall by little
        return None
    loss = _values(history, "loss")
    size = max(len(loss) // 10, STALL_WINDOW)
    first, last = float(np.median(loss[: min(size, OPENING_STEPS)])), float(np.median(loss[-size:]))
    if last <= (1 - MIN_FALL) * first:
        return None
    return (
        f"The loss of stage {stage.name} stalls: {first:.2f} at the beginning, {last:.2f} at the end of "
        f"{len(history):,} steps. Usually the Q-Former or the projections behind it do not hold their pretrained "
        "weights, so nothing of a cloud gets through. Check that --init was built with them and that the point "
        "projection's updates are about 1e-3 of its weights. It is as it should be only if --init was trained on this "
        "data before."
    )


def _find_equal_routing(history: list[dict], stage: Stage) -> str | None:
    if stage.router_type not in ("sparse", "soft") or "router" not in history[0]:  # "constant" has no choice
        return None
    load, weight, entropy = (
        _ends(_values(history, "router", name))[1].mean(0) for name in ("load", "weight", "entropy")
    )
    num_used = round(load.sum())
    used = np.argsort(-load)[:num_used]
    if num_used < len(load):
        alike = load[used].mean() >= SAME_EXPERTS_LOAD
        seen = f"experts {_listed(sorted(used))} serve {load[used].mean():.0%} of the clouds"
    else:
        # Over all steps of the tenth: within a step of one cloud, nothing can differ.
        between = max(0.0, float(-(weight * np.log(np.maximum(weight, 1e-12))).sum() - entropy))
        alike = between < SAME_WEIGHTS_BETWEEN
        seen = f"the weights of different clouds differ by {between:.4f} nats, out of {math.log(len(load)):.2f}"
    if not alike:
        return None
    return (
        f"All clouds use the same experts: in the last tenth of {len(history):,} steps, {seen}. Usually the router sees "
        "too little difference between clouds (an encoder without its weights, clouds that are not normalised or have "
        "lost their colours), or has learned for too short a time to leave the experts that were ahead at the start. "
        f"Check the clouds and the encoder; if they are right, give stage {stage.name} more steps or a higher rate."
    )


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last tenth of the steps, but at least half of `MIN_STEPS` each."""
    size = max(len(values) // 10, MIN_STEPS // 2)
    return values[:size], values[-size:]


def _values(history: list[dict], *names: str) -> np.ndarray:
    """One value of each entry, by its path of names: (steps,), or (steps, E) for those of the experts."""
    values = history
    for name in names:
        values = [value[name] for value in values]
    return np.array(values, dtype=float)


def _groups(history: list[dict]) -> list[str]:
    return list(dict.fromkeys(group for entry in history for group in entry["update_ratio"]))


def _listed(items) -> str:
    *others, last = map(str, items)
    return f"{', '.join(others)} and {last}" if others else last


# ---- As a picture ---------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow: it is too faint on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
MAX_POINTS = 500  # of a curve; more would not show at this width


def draw_report(history: list[dict], title: str, path: str | Path):
    """Write the picture of a run, a PNG: loss, gradient, updates, learning rate, speed and, where there is one, the router.

    It appears whole or not at all.

    Raises:
        ValueError: the history is empty.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The report needs matplotlib: pip install "minigpt3d[train]"') from error
    if not history:
        raise ValueError(f"The history is empty: there is nothing to draw in {path}.")
    rows = [["loss", "loss"], ["gradient", "update"], ["lr", "speed"]]
    if "router" in history[0]:
        rows.append(["load", "entropy"])
    figure = Figure(figsize=(11, 1 + 2.5 * len(rows)), facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, fontsize=14, weight="bold", parse_math=False)
    panels = figure.subplot_mosaic(rows, height_ratios=[1.4] + [1] * (len(rows) - 1))
    steps = _values(history, "step")
    for panel in panels.values():
        panel.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.tick_params(which="both", labelsize=8, color="#999999")
        panel.grid(color="#e5e5e5", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#999999")
    for name in rows[-1]:
        panels[name].set_xlabel("optimizer step", fontsize=9)

    _draw_loss(panels["loss"], steps, history)
    _draw_gradient(panels["gradient"], steps, history)
    _draw_updates(panels["update"], steps, history)
    _name(panels["lr"], "Learning rate", "rate")
    panels["lr"].yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    shown = _centers(len(steps))
    panels["lr"].plot(steps[shown], _values(history, "lr")[shown], color=COLORS[0], **_line(len(steps)))
    panels["lr"].set_ylim(bottom=0)
    _name(panels["speed"], "Speed, with the wait for data", "samples / s")
    _draw_curve(panels["speed"], steps, _values(history, "samples_per_second"), COLORS[0])
    panels["speed"].set_ylim(bottom=0)
    if "router" in history[0]:
        _draw_load(panels["load"], steps, _values(history, "router", "load"))
        _draw_entropy(panels["entropy"], steps, history)

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        canvas.print_figure(unfinished, dpi=110, format="png", metadata={"Software": None})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_loss(panel, steps: np.ndarray, history: list[dict]):
    """A curve for each source, for they differ in how hard they are; validation as marked heights."""
    _name(panel, "Loss", "nats per answer token")
    sources = np.array([entry["source"] for entry in history])
    names = list(dict.fromkeys(sources.tolist()))
    loss = _values(history, "loss")
    for name, color in zip(names, cycle(COLORS), strict=False):
        _draw_curve(panel, steps[sources == name], loss[sources == name], color, name.replace("_", " "))
    for entry, when, marker, end in ((history[0], "before", "D", 0), (history[-1], "after", "s", 1)):
        value = entry.get(f"validation_{when}")
        if value is not None:
            panel.plot(
                [0, 1],
                [value, value],
                transform=panel.get_yaxis_transform(),  # from the left edge to the right one
                label=f"validation {when}: {value:.2f}",
                color="#555555",
                linewidth=1,
                linestyle=(0, (5, 3)),
                marker=marker,
                markevery=[end],
                clip_on=False,
            )
    panel.legend(title="each step faint,\nmedian around it strong", **_LEGEND)


def _draw_gradient(panel, steps: np.ndarray, history: list[dict]):
    _name(panel, "Gradient norm", "norm (log scale)")
    norms = _values(history, "grad_norm")
    if ((norms > 0) & (norms < np.inf)).any():  # a log scale needs something to show
        panel.set_yscale("log", nonpositive="mask")
    _draw_curve(panel, steps, norms, COLORS[0])


def _draw_updates(panel, steps: np.ndarray, history: list[dict]):
    _name(panel, "Size of a step's update", "update / weights (log scale)")
    panel.set_yscale("log", nonpositive="mask")
    panel.axhspan(3e-4, 3e-3, color="#f2f2f2", zorder=0, label="usual, about 1e-3")
    for group, color in zip(_groups(history), cycle(COLORS), strict=False):
        ratios = np.array([entry["update_ratio"].get(group, 0.0) for entry in history])
        name = group.replace("_", " ") + ("" if ratios.any() else " (0 throughout)")
        panel.plot(steps[_centers(len(steps))], _smooth(ratios), color=color, label=name, **_line(len(steps)))
    panel.legend(**_LEGEND)


def _draw_load(panel, steps: np.ndarray, load: np.ndarray):
    """load (steps, E) as stacked shares of all choices, each band named at its right end, with its last share."""
    _name(panel, "Load of the experts", "share of the choices")
    shares = _smooth(load / load.sum(1, keepdims=True))
    edges = np.concatenate([steps[_centers(len(steps))] - 0.5, steps[-1:] + 0.5])  # a single step has a width too
    panel.stackplot(
        edges, np.concatenate([shares, shares[-1:]]).T, colors=COLORS, alpha=0.8, edgecolor="white", linewidth=0.5
    )
    panel.set_ylim(0, 1)
    panel.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    middles = np.cumsum(shares[-1]) - shares[-1] / 2
    for expert, height in enumerate(_spread(middles, 1 / 11)):
        panel.text(
            1.015,
            height,
            f"expert {expert}: {shares[-1, expert]:.0%}",
            color=COLORS[expert % len(COLORS)],
            fontsize=8,
            va="center",
            transform=panel.transAxes,
        )


def _draw_entropy(panel, steps: np.ndarray, history: list[dict]):
    _name(panel, "Entropy of the routing weights", "nats")
    inside, between = _values(history, "router", "entropy"), _values(history, "router", "between")
    highest = math.log(len(history[0]["router"]["load"]))
    x, inside, mean = steps[_centers(len(steps))], _smooth(inside), _smooth(inside + between)
    panel.axhline(highest, color="#555555", linewidth=1, linestyle=(0, (5, 3)), label=f"all alike: {highest:.2f}")
    panel.plot(x, mean, color=COLORS[5], label="of the mean weights", **_line(len(steps)))
    panel.fill_between(x, inside, mean, color=COLORS[5], alpha=0.15, linewidth=0, label="gap: clouds differ")
    panel.plot(x, inside, color=COLORS[0], label="of a cloud's weights, mean", **_line(len(steps)))
    panel.set_ylim(0, 1.1 * highest)
    panel.legend(**_LEGEND)


_LEGEND = {
    "loc": "center left",
    "bbox_to_anchor": (1.0, 0.5),
    "frameon": False,
    "fontsize": 8,
    "title_fontsize": 8,
    "alignment": "left",
}


def _name(panel, title: str, unit: str):
    panel.set_title(title, fontsize=10, weight="bold", loc="left")
    panel.set_ylabel(unit, fontsize=9)


def _line(num_steps: int) -> dict:
    return {"linewidth": 1.8, "marker": "o" if num_steps == 1 else None}


def _draw_curve(panel, steps: np.ndarray, values: np.ndarray, color: str, label: str | None = None):
    """Every step faint, and on it the median around it, which a lone spike does not move."""
    starts = np.unique(np.linspace(0, len(values), MAX_POINTS, endpoint=False).astype(int))
    # Both ends of each bin, so that thinning hides no spike.
    ends = np.stack([np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)], axis=1)  # (bins, 2)
    panel.plot(np.repeat(steps[starts], 2), ends.ravel(), color=color, alpha=0.25, linewidth=0.7)
    panel.plot(steps[_centers(len(steps))], _smooth(values, np.median), color=color, label=label, **_line(len(steps)))


def _centers(num_steps: int) -> np.ndarray:
    """Indices of the steps that a curve is drawn through, the first and the last among them."""
    return np.unique(np.linspace(0, num_steps - 1, MAX_POINTS).astype(int))


def _smooth(values: np.ndarray, average=np.mean) -> np.ndarray:
    """(steps, …) → (points, …): the average around each of `_centers`, over a twentieth of the run or 11 steps."""
    half = max(len(values) // 40, 5)
    return np.array([average(values[max(0, i - half) : i + half + 1], axis=0) for i in _centers(len(values))])


def _spread(heights: np.ndarray, gap: float) -> list[float]:
    """Ascending heights in [0, 1], moved apart until labels there do not touch."""
    heights = heights.tolist()
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights
