"""The pictures of a report, as PNG bytes: objects, scores with intervals, robustness curves, confusion matrix."""

import warnings
from io import BytesIO

import numpy as np
from PIL import Image

from minigpt3d.data.thumbnails import direction_matrix
from minigpt3d.model_card.words import CONDITIONS, scaled

from .metrics.table import METRICS
from .results import Results, Score, as_corruption
from .suites import BLIND, NO_COLOR, SEEING, SHUFFLED


# Okabe and Ito's palette for color-blind readers. A condition has the same color in every picture.
COLORS = {SEEING: "#0072B2", BLIND: "#000000", NO_COLOR: "#E69F00", SHUFFLED: "#CC79A7"}
CORRUPTED = "#D55E00"
MAX_NAMED_CLASSES = 60  # of a confusion matrix; more names are too small to read
MAX_COUNTED_CLASSES = 45  # likewise for the counts in its cells


def draw_cloud(cloud: np.ndarray) -> bytes:
    """An object in its own colors, from the front and from behind, y up.

    Args:
        cloud: (N, 6), xyz and rgb in [0, 1]. If all points have the same color, as in ModelNet40, they are shaded by depth.
    """
    coord, rgb = cloud[:, :3] - (cloud[:, :3].max(0) + cloud[:, :3].min(0)) / 2, cloud[:, 3:].clip(0, 1)
    radius = max(np.linalg.norm(coord, axis=1).max(), 1e-6)
    plain = not np.ptp(rgb, axis=0).any()
    figure = _figure(4.8, 2.4)
    figure.set_facecolor("#c9ced6")  # contrasts with white and with black objects
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(-2, 2), ylim=(-1, 1))
    for center, azimuth in ((-1, 30), (1, 210)):
        right, up, depth = direction_matrix(azimuth, elevation=20) @ coord.T / radius
        order = np.argsort(depth)  # near points cover far ones
        color = np.repeat(0.1 + 0.35 * (1 - depth[:, None]), 3, axis=1).clip(0, 1) if plain else rgb
        axes.scatter(
            center + 0.97 * right[order], 0.97 * up[order], c=color[order], s=np.clip(45000 / len(cloud), 3, 30),
            linewidths=0,
        )  # fmt: skip
    return _png(figure, dpi=100, num_colors=256)  # a third of the size: a page has twenty pictures


def draw_scores(results: Results) -> bytes | None:
    """The scores of the objects as they are and of the controls, with intervals; None if there are none.

    Counts of details are left out, since they have another scale.
    """
    conditions = list(CONDITIONS)
    rows = {}
    for score in results.scores:
        if score.condition in conditions and score.unit != "count":
            rows.setdefault(score.key, {})[score.condition] = score
    if not rows:
        return None
    shown = [condition for condition in conditions if any(condition in row for row in rows.values())]
    names = [f"{METRICS[metric].title}\n{_short(results.questions[question])}" for question, metric in rows]
    figure = _figure(8, 1.1 + 0.62 * len(rows), layout="constrained")
    panel = figure.add_subplot()
    gap = 0.68 / max(len(shown), 3)
    for height, row in enumerate(rows.values()):
        for position, condition in enumerate(shown):
            if condition not in row:
                continue
            score, y = row[condition], height + (position - (len(shown) - 1) / 2) * gap
            value, low, high = (scaled(number, score.unit) for number in (score.value, score.low, score.high))
            first = condition == SEEING
            panel.plot([low, high], [y, y], color=COLORS[condition], linewidth=2.2 if first else 1.2, alpha=0.8)
            panel.plot(
                value, y, "o" if first else "D", color=COLORS[condition], markersize=6 if first else 4, clip_on=False
            )
            panel.text(high + 1.5, y, f"{value:.1f}", fontsize=7, va="center", color=COLORS[condition])
    for height in range(1, len(rows)):
        panel.axhline(height - 0.5, color="#e5e5e5", linewidth=0.8)
    panel.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(min([0, *(scaled(s.low, s.unit) for row in rows.values() for s in row.values())]), 109)
    panel.set_xticks(range(0, 101, 20))
    panel.set_xlabel("per cent, or points of 100; lines are 95 % intervals", fontsize=8)
    handles = [
        panel.plot([], [], "o" if c == SEEING else "D", color=COLORS[c], label=CONDITIONS[c], markersize=5)[0]
        for c in shown
    ]
    _tidy(panel, axis="x")
    figure.legend(handles=handles, loc="outside upper center", ncols=len(shown), frameon=False, fontsize=8)
    return _png(figure)


def draw_robustness(scores: list[Score], title: str) -> bytes | None:
    """One metric over the severities, with a panel per corruption; None without corruptions.

    Args:
        scores: of one question and metric, under all conditions.
    """
    by_condition = {score.condition: score for score in scores}
    curves = {}
    for condition, score in by_condition.items():
        if corruption := as_corruption(condition):
            curves.setdefault(corruption[0], []).append((corruption[1], score))
    if not curves:
        return None
    unit = scores[0].unit
    columns = min(5, len(curves))
    lines = -(-len(curves) // columns)
    figure = _figure(max(4.5, 0.5 + 2.1 * columns), 1.2 + 1.75 * lines, layout="constrained")
    figure.suptitle(title, fontsize=10, weight="bold", parse_math=False)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    severities = sorted({severity for curve in curves.values() for severity, _ in curve})
    for panel, (name, curve) in zip(panels, curves.items(), strict=False):
        for condition, style in ((SEEING, "-"), (BLIND, (0, (4, 3)))):
            if score := by_condition.get(condition):
                value, low, high = (scaled(number, unit) for number in (score.value, score.low, score.high))
                panel.axhspan(low, high, color=COLORS[condition], alpha=0.1, linewidth=0)
                panel.axhline(
                    value, color=COLORS[condition], linewidth=1, linestyle=style, label=CONDITIONS[condition]
                )
        curve.sort(key=lambda point: point[0])
        x = [severity for severity, _ in curve]
        points = [[scaled(number, unit) for number in (score.value, score.low, score.high)] for _, score in curve]
        value, low, high = np.array(points).T
        panel.errorbar(
            x, value, [value - low, high - value], color=CORRUPTED, marker="o", markersize=4, linewidth=1.6,
            elinewidth=1, capsize=2, label="corrupted",
        )  # fmt: skip
        panel.set_title(name.replace("_", " "), fontsize=9, parse_math=False)
        panel.set_xticks(severities)
        panel.set_xlim(severities[0] - 0.5, severities[-1] + 0.5)
        _tidy(panel, axis="y")
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    panels[0].set_ylim(bottom=min(0, panels[0].get_ylim()[0]))
    for panel in panels[len(curves) - columns : len(curves)]:
        panel.set_xlabel("severity", fontsize=8)
        panel.tick_params(labelbottom=True)  # also above an empty panel of the last row
    figure.supylabel({"share": "per cent", "score100": "points of 100", "count": "details"}[unit], fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _png(figure)


def draw_confusion(names: list[str], confusion: list[list[int]]) -> bytes:
    """Confusion matrix: true class (row), predicted class (column). Cells have counts; the color is the share of the row.

    Classes without true or predicted objects are left out.
    """
    counts = np.array(confusion)
    occurs = counts.any(0) | counts.any(1)
    names, counts = [name for name, is_used in zip(names, occurs, strict=True) if is_used], counts[occurs][:, occurs]
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    size = np.clip(0.33 * len(names), 2.5, 10)
    font = np.clip(72 * size / len(names) * 0.55, 3, 8)
    figure = _figure(size + 2.4, size + 1.6, layout="compressed")
    panel = figure.add_subplot()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MAX_NAMED_CLASSES:
        rows = [f"{name} ({total})" for name, total in zip(names, totals[:, 0], strict=True)]
        panel.set_xticks(range(len(names)), names, fontsize=font, rotation=90, parse_math=False)
        panel.set_yticks(range(len(names)), rows, fontsize=font, parse_math=False)
    if len(names) <= MAX_COUNTED_CLASSES:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            panel.text(column, row, counts[row, column], ha="center", va="center", fontsize=font, color=color)
    panel.tick_params(length=0)
    panel.spines[:].set_color("#cccccc")
    panel.set_title("rows: true class (objects)\ncolumns: predicted class", fontsize=9, loc="left")
    bar = figure.colorbar(
        image, fraction=0.04, pad=0.02, label="share of the row", format=lambda share, _: f"{share:.0%}"
    )
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    return _png(figure)


def _figure(width: float, height: float, **settings):
    """A figure in inches with its own canvas, which needs no display and does not change pyplot's state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The report\'s pictures need matplotlib: pip install "minigpt3d[eval]"') from error
    figure = Figure(figsize=(width, height), facecolor="white", **settings)
    FigureCanvasAgg(figure)
    return figure


def _png(figure, dpi: int = 110, num_colors: int | None = None) -> bytes:
    figure.set_dpi(dpi)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # missing in the font; the tables show the text
        figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    if num_colors:
        image = image.quantize(num_colors, dither=Image.Dither.NONE)
    file = BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _tidy(panel, axis: str):
    panel.tick_params(length=0, labelsize=8)
    panel.grid(axis=axis, color="#e5e5e5", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#bbbbbb")


def _short(text: str, length: int = 34) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
