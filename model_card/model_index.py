"""Results for the Hub: `model-index` in a card's metadata, and the files of `.eval_results/`.

Both are made from results.json. The value is the score on the original objects, in percent or points of 100, with its
interval, its judge and the score of the blind control.
"""

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from .words import same_judge, scaled


HUB_DATASETS = {suite: "RunsenXu/PointLLM" for suite in ("modelnet40", "objaverse", "caption")}
HUB_OBJECTS = {"modelnet40": 2468, "objaverse": 200, "caption": 200}  # a subset is another data set
TASK = {"task_type": "image-text-to-text", "task_name": "Point cloud to text"}


def model_index(results: list[dict]) -> list[dict]:
    """The `model-index` of one model's runs, for `ModelCardData(**{"model-index": …})` or a YAML dump.

    Args:
        results: contents of results.json files.

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
                    dataset_config=name,  # the Hub's library merges entries that differ in `dataset_name` only
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
    """The files of a model's `.eval_results/`, one for each run and judge: {file name: YAML}.

    Args:
        results: contents of results.json files.
        hub_datasets: {suite: id of its data set on the Hub}. The Hub lists scores of its own data sets only, so runs on
            others, or on a subset, are left out.

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
    """Id of the run's data set; None if it is not on the Hub or the run used a subset."""
    objects, suite = result["dataset"]["objects"], result["suite"]
    return hub_datasets.get(suite) if objects == HUB_OBJECTS.get(suite, objects) else None


def _only_model(results: list[dict]) -> str:
    models = {(result["model"]["name"], result["model"]["fingerprint"]) for result in results}
    if len(models) != 1:
        names = ", ".join(f"{name} ({fingerprint})" for name, fingerprint in sorted(models, key=str)) or "none"
        raise ValueError(
            f"A card is about one model: expected results of one, got {names}. Give runs of one model only."
        )
    return models.pop()[0]


def _names(results: list[dict]) -> list[str]:
    """The suites; further runs of one suite get a number."""
    suites = [result["suite"] for result in results]
    counts = [suites[: place + 1].count(suite) for place, suite in enumerate(suites)]
    return [suite if count == 1 else f"{suite}-{count}" for suite, count in zip(suites, counts, strict=True)]


def _seeing(result: dict) -> list[dict]:
    return [score for score in result["scores"] if score["condition"] == "seeing"]


def _title(result: dict, score: dict) -> str:
    return f"{result['metrics'][score['metric']]['title']}, “{result['questions'][score['question']].strip()}”"


def _details(result: dict, score: dict) -> dict:
    """What belongs to a score: interval, judge and the score of the blind control."""
    low, high = (_value(score[end], score) for end in ("low", "high"))
    details = {
        "interval": f"{low} to {high} ({100 * result['confidence']:.0f} %, {score['interval']})",
        "objects": score["objects"],
    }
    details["unparsed"] = score["unparsed"]
    if score["judge"]:
        prompt = result["judge"]["prompts"].get(result["metrics"][score["metric"]]["prompt"])
        details["judge"] = f"{score['judge']}, {result['judge']['date']}, prompt sha256 {prompt}"
    for other in result["scores"]:
        if (other["question"], other["metric"], other["condition"]) == (score["question"], score["metric"], "blind"):
            details["blind_control"] = _value(other["value"], other)
    return details


def _value(value: float, score: dict) -> float:
    return round(scaled(value, score["unit"]), 2)
