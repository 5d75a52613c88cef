"""Score models of the household recipe on its held-out objects, as `minigpt3d evaluate household --greedy` does.

The baseline is the majority answer: the most common kind and color of the training objects, for every object.
"""

import json
from collections import Counter
from pathlib import Path

from minigpt3d.evaluation.evaluate_options import EvaluateOptions
from minigpt3d.evaluation.objects import read_household
from minigpt3d.evaluation.results import Results
from minigpt3d.evaluation.run import evaluate
from minigpt3d.evaluation.statistics import CONFIDENCE
from minigpt3d.files import write_text

from .build_data import read_metadata


# Columns of the table: a question of evaluation/suites.py and a metric.
COLUMNS = {
    "kind": ("what", "closed_set_accuracy"),
    "color": ("what", "color_accuracy"),
    "color_asked": ("color", "color_accuracy"),
}
MAJORITY = "majority"


def evaluate_models(data_dir: Path, heldout: Path, models: dict[str, Path], out: Path) -> dict:
    """Scores of the models and of the majority answer; the reports stay in `out`, in a folder for each.

    Args:
        data_dir: the release that the models were trained on.
        heldout: its held-out objects, as `write_heldout` writes them.
        models: folders by name.

    Returns:
        `{"objects", "confidence", "majority": {"answer", COLUMN: {"value", "low", "high"}},
        "models": {name: {"seeing": {COLUMN: …}, "blind": {COLUMN: …}, "by_kind": {kind: "3/4"}}}}`
    """
    shared = {"suite": "household", "data": str(heldout)}
    summary = {"objects": len(read_household(heldout)), "confidence": CONFIDENCE, "majority": {}, "models": {}}
    for name, folder in models.items():
        command = f"minigpt3d evaluate household --model {folder.name} --greedy --data {heldout.name} --out {name}"
        options = EvaluateOptions(out=out / name, model=str(folder), greedy=True, device="cpu", **shared)
        results = evaluate(options, command=command, name=name)
        summary["models"][name] = {
            "seeing": select_scores(results, "seeing"),
            "blind": select_scores(results, "blind"),
            "by_kind": hits_by_kind(out / name / "objects.jsonl"),
        }
    text = majority_answer(data_dir)
    answers = write_majority(text, heldout, out / "majority.jsonl")
    results = evaluate(EvaluateOptions(out=out / MAJORITY, answers=answers, **shared), name=MAJORITY)
    summary["majority"] = {"answer": text} | select_scores(results, "seeing")
    return summary


def majority_answer(data_dir: Path) -> str:
    """The most common kind and color of the training objects of a kind (of all objects of a kind, if none train)."""
    rows = [row for row in read_metadata(data_dir) if row["kind"]]
    rows = [row for row in rows if row["split"] == "train"] or rows
    kind, color = (Counter(row[key] for row in rows).most_common(1)[0][0] for key in ("kind", "main_color"))
    return f"This is a {color} {kind}."


def write_majority(text: str, heldout: Path, path: Path) -> Path:
    """Write a file of answers with one text for all questions about all objects."""
    lines = [
        {"object_id": item.object_id, "question": question, "answer": text}
        for item in read_household(heldout)
        for question in ("what", "color")
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def select_scores(results: Results, condition: str) -> dict:
    """Value and interval by column."""
    entries = {
        score.key: {"value": round(score.value, 4), "low": round(score.low, 4), "high": round(score.high, 4)}
        for score in results.scores
        if score.condition == condition
    }
    return {column: entries[key] for column, key in COLUMNS.items()}


def hits_by_kind(objects_file: Path) -> dict[str, str]:
    """ "13/16" by kind: right answers and objects."""
    question, metric = COLUMNS["kind"]
    hits: dict[str, list[float]] = {}
    for line in map(json.loads, objects_file.read_text(encoding="utf-8").splitlines()):
        if line["question"] == question and line["condition"] == "seeing":
            hits.setdefault(line["label"], []).append(line["scores"][metric])
    return {kind: f"{sum(values):.0f}/{len(values)}" for kind, values in sorted(hits.items())}


def to_table(summary: dict) -> str:
    """The scores as a Markdown table with 95 % intervals."""
    rows = [(f"stage {name}" if name in ("I", "II", "III", "IV") else name, model["seeing"])
            for name, model in summary["models"].items()]  # fmt: skip
    name, last = list(summary["models"].items())[-1]
    rows += [(f"{name}, blind", last["blind"]), ("majority answer", summary["majority"])]
    lines = ["| | kind | main color | main color, asked for it |", "|-|-|-|-|"]
    for label, scores in rows:
        cells = ["{value:.2f} ({low:.2f} to {high:.2f})".format(**scores[column]) for column in COLUMNS]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(
        [*lines, "", f"{summary['objects']} held-out objects, greedy; in brackets 95 % Wilson intervals."]
    )
