"""Folders of finished runs with random answers, for tests of reports, comparisons and cards."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from minigpt3d.evaluation.metrics.table import METRICS
from minigpt3d.evaluation.results import (
    Classes,
    ControlTest,
    Dataset,
    Generation,
    JudgeFacts,
    ModelFacts,
    Results,
    Score,
    ScoredAnswer,
)
from minigpt3d.evaluation.run_folder import RunFolder
from minigpt3d.evaluation.statistics import bootstrap, in_words, paired_difference, wilson
from minigpt3d.evaluation.suites import DECODING, SUITES


# Number of the household's 100 validation objects by class.
KINDS = {
    "animal": 3, "appliance": 4, "bed": 4, "bike": 3, "cabinet": 8, "car": 5, "chair": 16, "door": 2, "lamp": 8,
    "person": 7, "plant": 10, "sink": 4, "sofa": 6, "table": 13, "toilet": 3, "window": 4,
}  # fmt: skip
COLORS = ("white", "brown", "black", "gray", "green")
CORRUPTIONS = (
    "jitter", "dropout", "local_holes", "occlusion", "outliers", "density", "rotation", "scale", "color_loss", "fewer_points",
)  # fmt: skip
JUDGED = ("open_vocabulary_accuracy", "caption_score", "correctness", "hallucination", "precision")


def household_run(folder: Path, seed: int = 0, skill: float = 0.71, controls=True, corruptions=True) -> Path:
    """Answers about kinds and colors of 100 objects, with controls, corruptions and classes by likelihood."""
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
            answer_kind = label if generator.random() < chance else str(generator.choice(names))
            answer_color = color if generator.random() < min(1, chance + 0.1) else str(generator.choice(COLORS))
            scores = {"closed_set_accuracy": float(answer_kind == label)}
            if condition in ("seeing", "blind", "no_color"):
                guess = answer_kind if generator.random() < 0.8 else str(generator.choice(names))
                scores["likelihood_top_1"] = float(guess == label)
                scores["likelihood_top_5"] = max(scores["likelihood_top_1"], float(generator.random() < 0.6))
                if condition == "seeing":
                    confusion[names.index(label), names.index(guess)] += 1
            object_id, truth = f"scopia-{index:03}", (label, f"A {color} {label}.", color)
            answer = f"This is a {answer_color} {answer_kind}."
            rows.append(ScoredAnswer(object_id, "what", "What is this?", condition, answer, *truth, scores))
            if not condition[-1].isdigit():
                answer, scores = f"It is {answer_color}.", {"color_accuracy": float(answer_color == color)}
                rows.append(ScoredAnswer(object_id, "color", "What color is it?", condition, answer, *truth, scores))
    results = results_of(rows, suite="household", questions={"what": "What is this?", "color": "What color is it?"})
    results.classes = Classes(
        "what", "likelihood", list(SUITES["household"].phrases), names, confusion.tolist(), mean(rows, "likelihood_top_1"),
        mean(rows, "likelihood_top_5"),
    )  # fmt: skip
    return write(folder, results, rows)


def judged_run(
    folder: Path, suite="objaverse", judge="Qwen2-72B-Instruct", skill=0.65, seed=0, name="me/MiniGPT-3D", num=200
) -> Path:
    """A benchmark with a judge and its reasons, without corruptions."""
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
                label = "airplane" if suite == "modelnet40" else f"thing {index}"
                answer = "A small red car with black wheels." if right else "A wooden chair."
                row = ScoredAnswer(f"{index:04x}", question, prompt, condition, answer, label, "A red toy car.", None)
                if metric:
                    row.scores, row.reasons = {metric: right}, {metric: "T#the same" if right else "F#another"}
                else:
                    points = float(np.clip(100 * chance + 20 * generator.normal(), 0, 100).round())
                    good, bad = float(generator.integers(1, 5)), float(generator.integers(0, 3))
                    row.scores = {"caption_score": points, "correctness": good, "hallucination": bad}
                    row.scores |= {"precision": good / (good + bad), "s_bert": points / 110, "simcse": points / 105}
                    row.reasons = {"caption_score": f"{points:.0f}#partly"}
                rows.append(row)
    results = results_of(rows, suite=suite, questions=questions, judge=judge)
    results.model.name, results.scores[0].unparsed = name, 2
    return write(folder, results, rows)


def foreign_run(folder: Path) -> Path:
    """Answers of another program to the household questions; without a model, the shuffled control is the only one."""
    household_run(folder, seed=5, skill=0.6, corruptions=False)
    results, rows = RunFolder(folder).read()
    rows = [row for row in rows if row.condition in ("seeing", "shuffled")]
    for row in rows:
        row.scores = {name: value for name, value in row.scores.items() if "likelihood" not in name}
    foreign = results_of(rows, suite="household", questions=results.questions)
    foreign.model = ModelFacts("PointLLM-7B", "ee" * 8, None, None)
    foreign.decoding = foreign.template = foreign.batch_size = foreign.device = None
    foreign.generation = Generation(len(rows), None, 0.0, None, None)
    return write(folder, foreign, rows)


def results_of(rows: list[ScoredAnswer], suite: str, questions: dict, judge: str | None = None) -> Results:
    """The results of scored answers."""
    values = defaultdict(list)
    for row in rows:
        for metric, value in row.scores.items():
            values[row.question, row.condition, metric].append(value)
    scores, tests = [], []
    for (question, condition, metric), group in values.items():
        is_hit, unit = METRICS[metric].is_hit, METRICS[metric].unit
        low, high = wilson(int(sum(group)), len(group)) if is_hit else bootstrap(group)
        judged = judge if metric in JUDGED or suite == "modelnet40" else None
        method = "Wilson" if is_hit else "bootstrap"
        value = float(np.mean(group))
        scores.append(Score(question, condition, metric, value, low, high, unit, len(group), 0, judged, method))
        if condition in ("blind", "no_color", "shuffled"):
            difference = paired_difference(values[question, "seeing", metric], group)
            numbers = [difference[key] for key in ("difference", "low", "high", "p")]
            words = in_words(*numbers, unit, "seeing", condition)
            tests.append(ControlTest(question, metric, "seeing", condition, **difference, words=words))
    objects = len({row.object_id for row in rows})
    hashes = {
        "caption_score": "aa",
        "open_vocabulary_accuracy": "bb",
        "closed_set_accuracy": "cc",
        "hallucination": "dd",
    }
    return Results(
        suite=suite,
        title=SUITES[suite].title,
        date="2026-11-23",
        command=f"minigpt3d evaluate {suite} --model checkpoints/{suite} --out run",
        versions={"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"},
        device="cpu",
        seed=0,
        model=ModelFacts(f"checkpoints/{suite}", "ff" * 8, 3607193, "float32"),
        decoding=DECODING | {"max_new_tokens": 100},
        template="default",
        batch_size=16,
        questions=questions,
        generation=Generation(len(rows), None, 41.2, 2.4, 3),
        encoders={},
        judge=judge
        and JudgeFacts(
            model=judge,
            files=None,
            prompts={name: digest * 8 for name, digest in hashes.items()},
            replies=200,
            cut=4,
            sampled=196,
            date="2026-11-23",
            endpoint="127.0.0.1",
            served_models=[judge],
            prompt_tokens=61234,
            completion_tokens=2345,
            cost=None,
        ),
        dataset=Dataset(suite, objects, objects, "0123456789abcdef", 16),
        not_scored={},
        scores=scores,
        tests=tests,
        classes=None,
    )


def mean(rows: list[ScoredAnswer], metric: str) -> float:
    return float(np.mean([row.scores[metric] for row in rows if row.condition == "seeing" and metric in row.scores]))


def write(folder: Path, results: Results, rows: list[ScoredAnswer]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder(folder).write(results, rows)
    return folder


def read_cloud(object_id: str) -> np.ndarray:
    """A colored box (2000, 6), with different proportions per object."""
    generator = np.random.default_rng(sum(object_id.encode()))
    coord = generator.uniform(-1, 1, (2000, 3))
    side = generator.integers(0, 3, 2000)
    coord[np.arange(2000), side] = np.sign(coord[np.arange(2000), side])
    coord *= generator.uniform(0.2, 1, 3)
    coord /= np.linalg.norm(coord, axis=1).max()
    color = generator.uniform(0, 1, (3, 3))[side]
    return np.concatenate([coord, color], axis=1).astype(np.float32)
