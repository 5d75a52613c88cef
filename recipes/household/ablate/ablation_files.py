"""Write the results of an ablation: ablation.json, and from it ablation.md and ablation.png."""

import shlex
from pathlib import Path

from matplotlib.figure import Figure

from minigpt3d.evaluation.statistics import CONFIDENCE, SIGNIFICANT
from minigpt3d.files import write_json, write_text
from minigpt3d.model_card.ablation import ablation_report

from .differences import MEASURES, find_equal, summarize
from .variants import REFERENCES, VARIANTS


def write_ablation(runs: list[dict], settings: dict, out: Path) -> dict:
    """Write the three files from the scores and settings that `__main__.py` keeps; returns the content of ablation.json."""
    seeds = sorted({run["seed"] for run in runs})
    content = {key: value for key, value in settings.items() if key != "given"} | {
        "seeds": seeds,
        "objects": len(runs[0]["kind"]),
        "command": command_of(runs, seeds, settings),
        "minutes": round(sum(run["minutes"] for run in runs), 1),
        "same": [list(pair) for pair in find_equal(runs)],
        "confidence": CONFIDENCE,
        "significance": SIGNIFICANT,
        "measures": MEASURES,
        "groups": [
            {"name": group, "recipe": reference, "variants": [v.name for v in VARIANTS if v.group == group]}
            for group, reference in REFERENCES.items()
        ],
        "rows": summarize(runs),
    }
    write_json(out / "ablation.json", content)
    draw(content["rows"], out / "ablation.png")
    write_text(out / "ablation.md", ablation_report(content))
    return content


def command_of(runs: list[dict], seeds: list[int], settings: dict) -> str:
    """One command that does the work of all processes that shared the folder."""
    words = ["--base", settings["given"]["base"], "--data", settings["given"]["data"], "--out", "DIR", "--seeds"]
    words += [*map(str, seeds), "--scale", f"{settings['scale']:g}", "--views", str(settings["views"])]
    names = {run["variant"] for run in runs}
    if len(names) < len(VARIANTS):
        words += ["--variants", *(variant.name for variant in VARIANTS if variant.name in names)]
    return shlex.join(["python", "-m", "minigpt3d.recipes.household.ablate", *words])


def draw(rows: list[dict], path: Path):
    """Draw the differences to the full recipe: a panel for each measure, a line for each variant."""
    by_name = {(row["variant"], row["measure"]): row for row in rows}
    variants = [variant for variant in VARIANTS[1:] if (variant.name, "kind") in by_name]
    heights, height, group = [], 0.0, None
    for variant in variants:
        height -= 1.0 if variant.group == group else 1.6
        group = variant.group
        heights.append(height)
    figure = Figure(figsize=(10, 1.2 - 0.34 * height), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (name, measure) in zip(panels, MEASURES.items(), strict=True):
        _draw_panel(axes, [by_name[variant.name, name] for variant in variants], heights, measure)
    panels[0].set_yticks(heights, [variant.name for variant in variants])
    figure.suptitle("Difference to the full recipe, 95 % intervals; red: significant", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_panel(axes, rows: list[dict], heights: list[float], measure: dict):
    scale, unit = (100, "percentage points") if measure["unit"] == "share" else (1, measure["unit"])
    axes.axvline(0, color="black", linewidth=0.8)
    for row, height in zip(rows, heights, strict=True):
        middle, low, high = (scale * row[key] for key in ("difference", "difference_low", "difference_high"))
        color = "#c0392b" if row["p"] < SIGNIFICANT else "#7f8c8d"
        axes.plot([low, high], [height, height], color=color, linewidth=2)
        axes.plot(middle, height, "o", color=color, markersize=5)
    axes.set_title(measure["title"], fontsize=10)
    axes.set_xlabel(unit, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(labelsize=9)
