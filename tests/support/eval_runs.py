"""Folders of runs as `minigpt3d evaluate` leaves them, made of drawn answers: for reports, comparisons and cards."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from minigpt3d.evaluation.statistics import bootstrap, in_words, paired_difference, wilson
from minigpt3d.evaluation.suites import SUITES


# Class: objects of it among the household's 100 validation objects.
KINDS = {
    "animal": 3, "appliance": 4, "bed": 4, "bike": 3, "cabinet": 8, "car": 5, "chair": 16, "door": 2, "lamp": 8,
    "person": 7, "plant": 10, "sink": 4, "sofa": 6, "table": 13, "toilet": 3, "window": 4,
}  # fmt: skip
COLORS = ("white", "brown", "black", "gray", "green")
CORRUPTIONS = (
    "jitter", "dropout", "local_holes", "occlusion", "outliers", "density", "rotation", "scale", "color_loss", "fewer_points",
)  # fmt: skip
BINARY = ("closed_set_accuracy", "open_vocabulary_accuracy", "color_accuracy", "likelihood_top_1", "likelihood_top_5")
UNITS = {"caption_score": "score100", "correctness": "count", "hallucination": "count"}
JUDGED = ("open_vocabulary_accuracy", "caption_score", "correctness", "hallucination", "precision")


def household_run(folder: Path, seed: int = 0, skill: float = 0.71, controls=True, corruptions=True) -> Path:
    """Kinds and colors said of 100 objects, with controls, corruptions and classes by likelihood."""
    generator = np.random.default_rng(seed)
    labels = [kind for kind, count in KINDS.items() for _ in range(count)]
    colors = np.random.default_rng(7).choice(COLORS, len(labels)).tolist()  # the objects are the same in every run
    names = list(KINDS)
    chances = {"seeing": skill}
    if controls:
        chances |= {"blind": 0.08, "no_color": skill - 0.05, "shuffled": 0.09}
    if corruptions:
        for place, corruption in enumerate(CORRUPTIONS):
            for severity in range(1, 6):
                chances[f"{corruption}-{severity}"] = max(0.08, skill - 0.012 * (place + 1) * severity)
    rows, confusion = [], np.zeros((len(names), len(names)), int)
    for condition, chance in chances.items():
        for index, (label, color) in enumerate(zip(labels, colors, strict=True)):
            said = label if generator.random() < chance else str(generator.choice(names))
            said_color = color if generator.random() < min(1, chance + 0.1) else str(generator.choice(COLORS))
            scores = {"closed_set_accuracy": float(said == label)}
            if condition in ("seeing", "blind", "no_color"):
                guess = said if generator.random() < 0.8 else str(generator.choice(names))
                scores["likelihood_top_1"] = float(guess == label)
                scores["likelihood_top_5"] = max(scores["likelihood_top_1"], float(generator.random() < 0.6))
                if condition == "seeing":
                    confusion[names.index(label), names.index(guess)] += 1
            shared = {"object_id": f"scopia-{index:03}", "condition": condition, "label": label, "reasons": {}}
            shared["caption"] = f"A {color} {label}."
            answer = f"This is a {said_color} {said}."
            rows.append(shared | {"question": "what", "prompt": "What is this?", "answer": answer, "scores": scores})
            if not condition[-1].isdigit():
                rows.append(
                    shared
                    | {"question": "color", "prompt": "What color is it?", "answer": f"It is {said_color}."}
                    | {"scores": {"color_accuracy": float(said_color == color)}}
                )
    results = results_of(rows, suite="household", questions={"what": "What is this?", "color": "What color is it?"})
    results["classes"] = {
        "question": "what", "method": "likelihood", "names": names, "confusion": confusion.tolist(),
        "phrases": list(SUITES["household"].phrases), "top_1": mean(rows, "likelihood_top_1"), "top_5": mean(rows, "likelihood_top_5"),
    }  # fmt: skip
    return write(folder, results, rows)


def judged_run(
    folder: Path, suite="objaverse", judge="Qwen2-72B-Instruct", skill=0.65, seed=0, name="me/MiniGPT-3D", num=200
) -> Path:
    """A benchmark with a judge, its reasons among them, and without corruptions."""
    generator = np.random.default_rng(seed)
    metric = {"objaverse": "open_vocabulary_accuracy", "modelnet40": "closed_set_accuracy"}.get(suite)
    questions = {"instruction": "What is this?", "completion": "This is an object of "}
    if suite == "caption":
        questions = {"caption": "Caption this 3D model in detail."}
    rows = []
    for condition, chance in {"seeing": skill, "blind": 0.05, "shuffled": 0.06}.items():
        for index in range(num):
            for question, prompt in questions.items():
                right = float(generator.random() < chance)
                row = {"object_id": f"{index:04x}", "question": question, "prompt": prompt, "condition": condition}
                row |= {
                    "label": "airplane" if suite == "modelnet40" else f"thing {index}",
                    "caption": "A red toy car.",
                }
                row |= {"answer": "A small red car with black wheels." if right else "A wooden chair."}
                if metric:
                    row |= {"scores": {metric: right}, "reasons": {metric: "T#the same" if right else "F#another"}}
                else:
                    points = float(np.clip(100 * chance + 20 * generator.normal(), 0, 100).round())
                    good, bad = float(generator.integers(1, 5)), float(generator.integers(0, 3))
                    row["scores"] = {"caption_score": points, "correctness": good, "hallucination": bad}
                    row["scores"] |= {"precision": good / (good + bad), "s_bert": points / 110, "simcse": points / 105}
                    row["reasons"] = {"caption_score": f"{points:.0f}#partly"}
                rows.append(row)
    results = results_of(rows, suite=suite, questions=questions, judge=judge)
    results["model"]["name"] = name
    results["scores"][0]["unparsed"] = results["judge"]["unparsed"] = 2
    return write(folder, results, rows)


def foreign_run(folder: Path) -> Path:
    """Somebody else's answers to the household questions: no model here, hence no controls but the shuffled one."""
    household_run(folder, seed=5, skill=0.6, corruptions=False)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "objects.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["condition"] in ("seeing", "shuffled")]
    for row in rows:
        row["scores"] = {name: value for name, value in row["scores"].items() if "likelihood" not in name}
    foreign = results_of(rows, suite="household", questions=results["questions"])
    foreign |= {"model": {"name": "PointLLM-7B", "parameters": None, "dtype": None, "fingerprint": None}}
    foreign |= {"decoding": None, "template": None, "device": None}
    unknown = dict.fromkeys(("new_tokens", "objects_per_second", "cut"))
    foreign["generation"] = {"answers": len(rows), "seconds": 0.0} | unknown  # as `sum_up_answers` has it
    return write(folder, foreign, rows)


def results_of(rows: list[dict], suite: str, questions: dict, judge: str | None = None) -> dict:
    """results.json of scored answers."""
    values = defaultdict(list)
    for row in rows:
        for metric, value in row["scores"].items():
            values[row["question"], row["condition"], metric].append(value)
    scores, tests = [], []
    for (question, condition, metric), found in values.items():
        binary = metric in BINARY
        low, high = wilson(int(sum(found)), len(found)) if binary else bootstrap(found)
        unit = UNITS.get(metric, "share")
        judged = judge if metric in JUDGED or suite == "modelnet40" else None
        scores.append(
            {"question": question, "condition": condition, "metric": metric, "value": float(np.mean(found)),
             "low": low, "high": high, "unit": unit, "objects": len(found), "unparsed": 0, "judge": judged,
             "interval": "Wilson" if binary else "bootstrap"}
        )  # fmt: skip
        if condition in ("blind", "no_color", "shuffled"):
            seeing = values[question, "seeing", metric]
            test = {"question": question, "metric": metric, "a": "seeing", "b": condition} | paired_difference(
                seeing, found
            )
            numbers = [test[key] for key in ("difference", "low", "high", "p")]
            tests.append(test | {"words": in_words(*numbers, unit, "seeing", condition)})
    objects = len({row["object_id"] for row in rows})
    return {
        "schema": 1, "suite": suite, "title": SUITES[suite].title, "date": "2026-11-23", "seed": 0,
        "command": f"minigpt3d evaluate {suite} --model checkpoints/{suite} --out run",
        "dataset": {"name": suite, "objects": objects, "of": objects, "fingerprint": "0123456789abcdef"},
        "model": {"name": f"checkpoints/{suite}", "parameters": 3607193, "dtype": "float32", "fingerprint": "ff" * 8},
        "decoding": {"num_beams": 2, "do_sample": True, "top_p": 0.7, "temperature": 0.2, "min_new_tokens": 10,
                     "max_new_tokens": 100},
        "template": "default", "questions": questions,
        "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"}, "device": "cpu",
        "generation": {"answers": len(rows), "seconds": 41.2, "objects_per_second": 2.4, "cut": 3},
        "judge": judge and {
            "model": judge, "endpoint": "127.0.0.1", "date": "2026-11-23", "prompts": {"caption_score": "aa" * 8,
            "open_vocabulary_accuracy": "bb" * 8, "closed_set_accuracy": "cc" * 8, "hallucination": "dd" * 8}, "replies": 200, "cut": 4, "sampled": 196,
            "served_models": [judge], "files": None,
            "prompt_tokens": 61234, "completion_tokens": 2345, "cost": None},
        "scores": scores, "tests": tests, "classes": None,
    }  # fmt: skip


def mean(rows: list[dict], metric: str) -> float:
    return float(
        np.mean([row["scores"][metric] for row in rows if row["condition"] == "seeing" and metric in row["scores"]])
    )


def write(folder: Path, results: dict, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (folder / "objects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def read_cloud(object_id: str) -> np.ndarray:
    """A colored box (2000, 6), of other proportions for each object."""
    generator = np.random.default_rng(sum(object_id.encode()))
    coord = generator.uniform(-1, 1, (2000, 3))
    side = generator.integers(0, 3, 2000)
    coord[np.arange(2000), side] = np.sign(coord[np.arange(2000), side])
    coord *= generator.uniform(0.2, 1, 3)
    coord /= np.linalg.norm(coord, axis=1).max()
    color = generator.uniform(0, 1, (3, 3))[side]
    return np.concatenate([coord, color], axis=1).astype(np.float32)
