"""Curves of a run: loss, gradient, updates, learning rate, speed and routing, as a picture."""

import math
from itertools import cycle
from pathlib import Path

import numpy as np

from minigpt3d.files import written_file

from .history import column, module_groups


# Okabe and Ito's colors, which color-blind readers can distinguish, without yellow: it is too faint on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
MAX_POINTS = 500  # of a curve; more would not show at this width


def draw_curves(history: list[dict], title: str, path: str | Path):
    """Write the picture (PNG); the panels of the routing are left out if there is no router.

    Raises:
        ValueError: the history is empty.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The curves need matplotlib: pip install "minigpt3d[train]"') from error
    if not history:
        raise ValueError(f"The history is empty: there is nothing to draw in {path}.")
    has_router = "router" in history[0]
    rows = [["loss", "loss"], ["gradient", "update"], ["lr", "speed"]] + has_router * [["load", "entropy"]]
    figure = Figure(figsize=(11, 1 + 2.5 * len(rows)), facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, fontsize=14, weight="bold", parse_math=False)
    panels = figure.subplot_mosaic(rows, height_ratios=[1.4] + [1] * (len(rows) - 1))
    steps = column(history, "step")
    for panel in panels.values():
        _style(panel, steps)
    for name in rows[-1]:
        panels[name].set_xlabel("optimizer step", fontsize=9)
    drawings = {"loss": _draw_loss, "gradient": _draw_gradient, "update": _draw_updates, "lr": _draw_rate}
    drawings |= {"speed": _draw_speed, "load": _draw_load, "entropy": _draw_entropy}
    for name, panel in panels.items():
        drawings[name](panel, steps, history)
    with written_file(path) as unfinished:
        canvas.print_figure(unfinished, dpi=110, format="png", metadata={"Software": None})


def _style(panel, steps: np.ndarray):
    panel.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.tick_params(which="both", labelsize=8, color="#999999")
    panel.grid(color="#e5e5e5", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#999999")


def _draw_loss(panel, steps: np.ndarray, history: list[dict]):
    """A curve for each source, since their losses differ; validation losses as horizontal lines."""
    _name(panel, "Loss", "nats per answer token")
    sources = np.array([entry["source"] for entry in history])
    names = list(dict.fromkeys(sources.tolist()))
    loss = column(history, "loss")
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
    between = [(entry["step"], entry["validation"]) for entry in history if "validation" in entry]
    if between:
        panel.plot(
            *zip(*between, strict=True), label="validation", color="#555555", linewidth=1, marker="o", markersize=4
        )
    panel.legend(title="each step faint,\nmedian around it strong", **_LEGEND)


def _draw_gradient(panel, steps: np.ndarray, history: list[dict]):
    _name(panel, "Gradient norm", "norm (log scale)")
    norms = column(history, "grad_norm")
    if ((norms > 0) & (norms < np.inf)).any():  # a log scale needs something to show
        panel.set_yscale("log", nonpositive="mask")
    _draw_curve(panel, steps, norms, COLORS[0])


def _draw_updates(panel, steps: np.ndarray, history: list[dict]):
    _name(panel, "Size of a step's update", "update / weights (log scale)")
    panel.set_yscale("log", nonpositive="mask")
    panel.axhspan(3e-4, 3e-3, color="#f2f2f2", zorder=0, label="usual, about 1e-3")
    measured = steps[["update_ratio" in entry for entry in history]]
    for group, color in zip(module_groups(history), cycle(COLORS), strict=False):
        ratios = np.array([entry["update_ratio"].get(group, 0.0) for entry in history if "update_ratio" in entry])
        name = group.replace("_", " ") + ("" if ratios.any() else " (0 throughout)")
        shown = measured[_centers(len(measured))]
        panel.plot(shown, _smooth(ratios), color=color, label=name, **_line(len(measured)))
    panel.legend(**_LEGEND)


def _draw_rate(panel, steps: np.ndarray, history: list[dict]):
    _name(panel, "Learning rate", "rate")
    panel.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    shown = _centers(len(steps))
    panel.plot(steps[shown], column(history, "lr")[shown], color=COLORS[0], **_line(len(steps)))
    panel.set_ylim(bottom=0)


def _draw_speed(panel, steps: np.ndarray, history: list[dict]):
    _name(panel, "Speed, with the wait for data", "samples / s")
    _draw_curve(panel, steps, column(history, "samples_per_second"), COLORS[0])
    panel.set_ylim(bottom=0)


def _draw_load(panel, steps: np.ndarray, history: list[dict]):
    """Stacked shares of all choices; each band is labeled at its right end with its last share."""
    _name(panel, "Load of the experts", "share of the choices")
    load = column(history, "router", "load")  # (steps, E)
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
    inside, between = column(history, "router", "entropy"), column(history, "router", "between")
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
    """Every step, faint, and the running median, which a single spike does not move."""
    starts = np.unique(np.linspace(0, len(values), MAX_POINTS, endpoint=False).astype(int))
    # Both ends of each bin, so that thinning hides no spike.
    ends = np.stack([np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)], axis=1)  # (bins, 2)
    panel.plot(np.repeat(steps[starts], 2), ends.ravel(), color=color, alpha=0.25, linewidth=0.7)
    panel.plot(steps[_centers(len(steps))], _smooth(values, np.median), color=color, label=label, **_line(len(steps)))


def _centers(num_steps: int) -> np.ndarray:
    """Indices of the steps that a curve is drawn through, including the first and the last."""
    return np.unique(np.linspace(0, num_steps - 1, MAX_POINTS).astype(int))


def _smooth(values: np.ndarray, average=np.mean) -> np.ndarray:
    """(steps, …) → (points, …): the average around each of `_centers`, over a twentieth of the run or 11 steps."""
    half = max(len(values) // 40, 5)
    return np.array([average(values[max(0, i - half) : i + half + 1], axis=0) for i in _centers(len(values))])


def _spread(heights: np.ndarray, gap: float) -> list[float]:
    """Move ascending heights in [0, 1] apart until labels at these heights do not touch."""
    heights = heights.tolist()
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights
