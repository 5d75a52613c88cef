"""What a run found, read from its folder: `results.json`, the scores, and `objects.jsonl`, every answer with its own."""

import hashlib
import json
from pathlib import Path

from minigpt3d.model_card.words import same_judge

from .conditions import SEEING
from .statistics import SIGNIFICANT
from .suites import METRICS, SUITES


FEW = 20  # objects, of which no interval and no test can say much
RESULTS_FILE, OBJECTS_FILE = "results.json", "objects.jsonl"
_AGAIN = "Delete this file and run `minigpt3d evaluate` again: the answers are kept, only the scores are made anew."


def read_results(folder: str | Path) -> dict:
    """A run's `results.json`.

    Raises:
        ValueError: the folder is no finished run.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {RESULTS_FILE}: expected the folder of a finished run. Let `minigpt3d evaluate … --out "
            f"{folder}` come to its end; it goes on where it stopped."
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected what `minigpt3d evaluate` writes, got {error!r}. {_AGAIN}") from error
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema is None:
        raise ValueError(
            f"{path} is somebody else's: expected what `minigpt3d evaluate` writes. Give the folder of a run."
        )
    if schema != 1:
        raise ValueError(f"{path}: expected schema 1, got {schema!r}. It is from another version. {_AGAIN}")
    return results


def read_objects(folder: str | Path) -> list[dict]:
    """A run's `objects.jsonl`: a dict for each (object, question, condition).

    Raises:
        ValueError: it is missing, or a line is no JSON object.
    """
    path = Path(folder) / OBJECTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {OBJECTS_FILE}: `minigpt3d evaluate` writes it beside {RESULTS_FILE}.")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                row["object_id"], row["question"], row["condition"], row["scores"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a scored answer, got {line[:60]!r} ({error!r}). {_AGAIN}"
                ) from error
            rows.append(row)
    return rows


def read_run(folder: str | Path) -> tuple[dict, list[dict]]:
    """A run's results and its scored answers, which belong together.

    Raises:
        ValueError: the folder is no finished run, or answers are missing.
    """
    results, rows = read_results(folder), read_objects(folder)
    for score in results["scores"]:
        found = len(values_of(rows, score["question"], score["metric"], score["condition"]))
        if (
            found != score["objects"] and not METRICS[score["metric"]].is_ratio
        ):  # an object without details has no ratio
            raise ValueError(
                f"{Path(folder) / OBJECTS_FILE} is damaged: it holds {found:,} of {score['objects']:,} scores for "
                f"{score['metric']}. {_AGAIN}"
            )
    return results, rows


def values_of(rows: list[dict], question: str, metric: str, condition: str = SEEING) -> dict[str, float]:
    """{object_id: score} of one metric, in the order of the rows; objects without that score are not in it."""
    return {
        row["object_id"]: row["scores"][metric]
        for row in rows
        if row["question"] == question and row["condition"] == condition and metric in row["scores"]
    }


def as_corruption(condition: str) -> tuple[str, int] | None:
    """ "jitter-3" → ("jitter", 3); None for what is no corruption."""
    name, dash, severity = condition.rpartition("-")
    return (name, int(severity)) if dash and severity.isdecimal() else None


def main_score(results: dict) -> dict:
    """The score that a suite is about; ties between questions go to the one that is asked first."""
    order = list(METRICS)
    questions = list(results["questions"])
    seeing = [score for score in results["scores"] if score["condition"] == SEEING]
    if not seeing:
        raise ValueError(f"The {results['suite']} run holds no score of the objects as they are: there is no result.")
    return min(seeing, key=lambda score: (order.index(score["metric"]), questions.index(score["question"])))


def is_mute(score: dict) -> bool:
    """Whether the judge gave no verdict at all, so that the score says nothing of the model."""
    return bool(score["judge"]) and score["unparsed"] == score["objects"]


def is_gain(test: dict) -> bool:
    """Whether the objects as they are do better than the control, by more than noise."""
    gain = -test["difference"] if METRICS[test["metric"]].lower_is_better else test["difference"]
    return test["p"] < SIGNIFICANT and gain > 0


def cautions(results: dict) -> list[str]:
    """What holds for all numbers of a run, and who reads one must know."""
    words, dataset = [], results["dataset"]
    if dataset["objects"] < dataset["of"]:
        words.append(
            f"These are the first {dataset['objects']:,} of {dataset['of']:,} objects: no result of the whole."
        )
    if any(score["objects"] < FEW for score in results["scores"]):
        words.append(
            f"With fewer than {FEW} objects only the largest differences can be told from noise, and the intervals of scores "
            "that are no accuracies are too narrow: trust none of them."
        )
    if dataset.get("labels") == 1:
        words.append("All labels are the same: an accuracy says no more than whether answers name it.")
    return words


def hash_prompt(text: str) -> str:
    """What a judge's prompt is known by in results."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_hash(results: dict, metric: str) -> str | None:
    """Of the prompt that the judge scored a metric with."""
    return results["judge"]["prompts"].get(METRICS[metric].prompt)


# ---- As people read them --------------------------------------------------------------------------------------------


def judge_of(results: dict, score: dict) -> tuple[tuple[str, ...], str] | None:
    """Who judged a score, as far as is known: scores that differ in this are different measures. None: nobody judged.

    An endpoint's model may have another name than it is asked for by, and other files may lie in a folder of one name.
    """
    if not score["judge"]:
        return None
    judge = results["judge"]
    served = tuple(sorted({same_judge(name) for name in judge["served_models"]}))
    return served or (same_judge(score["judge"]),), judge.get("files") or ""


def variant_of(results: dict, score: dict) -> str | None:
    """What of a metric was chosen otherwise than by default, which makes it another measure: encoder, or phrases."""
    metric = score["metric"]
    if encoder := results.get("encoders", {}).get(metric):
        return None if same_judge(encoder) == same_judge(METRICS[metric].needs) else encoder
    if METRICS[metric].module or not results["classes"]:
        return None
    phrases = tuple(results["classes"]["phrases"])
    return None if phrases == SUITES[results["suite"]].phrases else ", ".join(f"“{phrase}”" for phrase in phrases)
