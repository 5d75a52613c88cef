"""Results as the Hub reads them: `model-index` in a card's metadata, and files of `.eval_results/`.

Both are made from `results.json`; nothing is typed. The value is the score of the objects as they are, in per cent or
points of 100; interval, judge and the blind control stand beside it.
"""

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from minigpt3d.evaluation.conditions import BLIND, SEEING
from minigpt3d.evaluation.results import prompt_hash
from minigpt3d.evaluation.suites import METRICS

from .words import same_judge, scaled


HUB_DATASETS = {suite: "RunsenXu/PointLLM" for suite in ("modelnet40", "objaverse", "caption")}
HUB_OBJECTS = {"modelnet40": 2468, "objaverse": 200, "caption": 200}  # a part of them is another data set
TASK = {"task_type": "image-text-to-text", "task_name": "Point cloud to text"}


def model_index(results: list[dict]) -> list[dict]:
    """The `model-index` of one model's runs: give it to `ModelCardData(**{"model-index": …})`, or to a YAML dump.

    Args:
        results: each the content of a `results.json`.

    Raises:
        ValueError: there are none, or they are of different models.
    """
    model = _only_model(results)
    entries = []
    for name, result in zip(_names(results), results, strict=True):
        for score in _seeing(result):
            entries.append(
                EvalResult(
                    **TASK,
                    dataset_type=_hub_id(result, HUB_DATASETS) or result["dataset"]["name"],
                    dataset_name=result["suite"],
                    dataset_config=name,  # the Hub's library lumps together what only has another `dataset_name`
                    dataset_args={
                        "objects": result["dataset"]["objects"],
                        "of": result["dataset"]["of"],
                        "fingerprint": result["dataset"]["fingerprint"],
                        "decoding": result["decoding"],
                        "template": result["template"],
                        "seed": result["seed"],
                        "date": result["date"],
                    },
                    metric_type=score["metric"],
                    metric_name=_title(result, score),
                    metric_value=_value(score["value"], score),
                    metric_args=_details(result, score),
                )
            )
    return eval_results_to_model_index(model, entries)


def eval_results(results: list[dict], hub_datasets: dict[str, str] = HUB_DATASETS) -> dict[str, str]:
    """`.eval_results/` of a model's folder: {file name: YAML}, a file for each run and judge.

    Args:
        results: each the content of a `results.json`.
        hub_datasets: {suite: id of its data set on the Hub}. The Hub counts a score for a data set of its own, so a run
            on others, or on a part of them, is left out; so is `household`, until somebody publishes its objects.

    Raises:
        ValueError: there are none, or they are of different models.
    """
    _only_model(results)
    files = {}
    for name, result in zip(_names(results), results, strict=True):
        dataset_id = _hub_id(result, hub_datasets)
        if dataset_id is None:
            continue
        for score in _seeing(result):
            details = _details(result, score)
            notes = [f"{detail.replace('_', ' ')} {value}" for detail, value in details.items()]
            judge = same_judge(score["judge"])
            entry = EvalResultEntry(
                dataset_id=dataset_id,
                task_id="-".join([result["suite"], score["question"], score["metric"]]),
                value=_value(score["value"], score),
                date=result["date"],
                notes="; ".join([_title(result, score), *notes]),
            )
            files.setdefault("-".join([name, *([judge] if judge else [])]) + ".yaml", []).append(entry)
    return {
        name: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        for name, entries in files.items()
    }


def _hub_id(result: dict, hub_datasets: dict[str, str]) -> str | None:
    """Of the data set that the run is on, all of it; else None."""
    objects, suite = result["dataset"]["objects"], result["suite"]
    return hub_datasets.get(suite) if objects == HUB_OBJECTS.get(suite, objects) else None


def _only_model(results: list[dict]) -> str:
    models = {(result["model"]["name"], result["model"]["fingerprint"]) for result in results}
    if len(models) != 1:
        found = ", ".join(f"{name} ({fingerprint})" for name, fingerprint in sorted(models, key=str)) or "none"
        raise ValueError(
            f"A card is about one model: expected results of one, got {found}. Give that model's runs only."
        )
    return models.pop()[0]


def _names(results: list[dict]) -> list[str]:
    """The suites; a second run of one (with another judge, or other decoding) gets a number."""
    suites = [result["suite"] for result in results]
    counts = [suites[: place + 1].count(suite) for place, suite in enumerate(suites)]
    return [suite if count == 1 else f"{suite}-{count}" for suite, count in zip(suites, counts, strict=True)]


def _seeing(result: dict) -> list[dict]:
    return [score for score in result["scores"] if score["condition"] == SEEING]


def _title(result: dict, score: dict) -> str:
    return f"{METRICS[score['metric']].title}, “{result['questions'][score['question']].strip()}”"


def _details(result: dict, score: dict) -> dict:
    """What must not be parted from a score: its interval, who judged it, and the score without seeing the object."""
    low, high = (_value(score[end], score) for end in ("low", "high"))
    details = {"interval": f"{low} to {high} (95 %, {score['interval']})", "objects": score["objects"]}
    details["unparsed"] = score["unparsed"]
    if score["judge"]:
        prompt = prompt_hash(result, score["metric"])
        details["judge"] = f"{score['judge']}, {result['judge']['date']}, prompt sha256 {prompt}"
    for other in result["scores"]:
        if (other["question"], other["metric"], other["condition"]) == (score["question"], score["metric"], BLIND):
            details["blind_control"] = _value(other["value"], other)
    return details


def _value(value: float, score: dict) -> float:
    return round(scaled(value, score["unit"]), 2)
