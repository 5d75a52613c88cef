"""Evaluations as the card reports them: a run's results.json, its table of scores, and the limits that it shows."""

from collections.abc import Iterator
from pathlib import Path

from .facts import Fact, read_fact
from .words import CONDITIONS, number


RESULTS_FILE, SCHEMA = "results.json", 2


class CardError(ValueError):
    """The card would contain something false or unsourced."""


def read_results(path: Path, fingerprint: str | None) -> Fact:
    """A run's results.json.

    Args:
        fingerprint: of the card's weights; None accepts results of any weights.

    Raises:
        ValueError: there is no such file, or it has another schema.
        CardError: the results are of other weights.
    """
    results = read_fact(path, f"{path.resolve().parent.name}/{path.name}")
    if results is None:
        raise ValueError(f"`results` {path}: no such file. Give the folder of a finished `minigpt3d evaluate` run.")
    if results.raw.get("schema") != SCHEMA:
        raise ValueError(
            f"`results` {path}: expected schema {SCHEMA} of {RESULTS_FILE}, got {results.raw.get('schema')!r}. Run "
            "`minigpt3d evaluate` with this version again."
        )
    evaluated = results.raw["model"]
    if fingerprint is not None and evaluated["fingerprint"] != fingerprint:
        raise CardError(
            f"`results` {path}: expected results of weights {fingerprint}, got those of {evaluated['name']} with weights "
            f"{evaluated['fingerprint']}. Evaluate this folder."
        )
    return results


def score_rows(run: Fact) -> list[dict[str, Fact | None]]:
    """Rows of the table, one for each question and metric: scores by condition, None for conditions without a score.

    Corruptions have no column: only the worst one is reported, as a limit.
    """
    rows = {}
    for score in run["scores"]:
        row = rows.setdefault((score["question"].raw, score["metric"].raw), dict.fromkeys(CONDITIONS))
        if score["condition"].raw in row:
            row[score["condition"].raw] = score
    return [row for row in rows.values() if row["seeing"] is not None]


def find_limits(runs: list[Fact]) -> list[str]:
    """Limits of the model that the results show, as sentences with marks."""
    return [
        f"{run['title'] if 'title' in run else run['suite']}{limit}"
        for run in runs
        for find in (_limits_of_objects, _limits_of_control, _limits_of_answers, _limits_of_corruptions)
        for limit in find(run)
    ]


def _limits_of_objects(run: Fact) -> Iterator[str]:
    dataset = run["dataset"]
    if dataset["objects"].raw < dataset["of"].raw:
        yield f": only the first {dataset['objects']} of {dataset['of']} objects were evaluated."
    if any(score["objects"].raw < run["few_objects"].raw for score in run["scores"]):
        yield f": fewer than {run['few_objects']} objects, so that only large differences are significant."


def _limits_of_control(run: Fact) -> Iterator[str]:
    conclusion = "so the scores do not show that geometry is used."
    tests = [test for test in run["tests"] if (test["a"], test["b"]) == ("seeing", "blind")]
    if not tests:
        yield f": there is no blind control, {conclusion}"
    for test in tests:
        if not test["gain"]:
            yield f"{_subject(test)}: no better than blind, {conclusion}"


def _limits_of_answers(run: Fact) -> Iterator[str]:
    for score in run["scores"]:
        if score["condition"] == "seeing" and score["unparsed"]:
            unparsed = f"{score['unparsed']} of {score['objects']} answers"
            yield f"{_subject(score)}: {unparsed} could not be parsed and count as wrong."
    if "cut" in run["generation"] and run["generation"]["cut"]:
        yield f": {run['generation']['cut']} answers were cut off at the maximum length."


def _limits_of_corruptions(run: Fact) -> Iterator[str]:
    """The worst score of the main metric on corrupted objects."""
    main = next((score for score in run["scores"] if score["condition"] == "seeing"), None)
    corrupted = [
        score
        for score in run["scores"]
        if main is not None
        and score["condition"].raw not in CONDITIONS
        and (score["question"], score["metric"]) == (main["question"], main["metric"])
    ]
    if not corrupted:
        return
    worst = max if run["metrics"][main["metric"].raw]["lower_is_better"] else min
    score = worst(corrupted, key=lambda score: score["value"].raw)
    low, original = (entry["value"].says(number(entry["value"].raw, entry["unit"].raw)) for entry in (score, main))
    yield f"{_subject(score)}: {low} instead of {original} under the most harmful corruption, `{score['condition']}`."


def _subject(score: Fact) -> str:
    return f", `{score['question']}`, `{score['metric']}`"
