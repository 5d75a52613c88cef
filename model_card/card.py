"""Write a model card, from the files in a folder and from what is given beside them. Nothing in it is typed by hand.

What a folder may hold, all of it optional, and what each says:

    config.json, processor_config.json   a whole model, and what it reads
    adapter_config.json                  a PEFT adapter, and the model that it belongs to
    *.safetensors                        how many parameters there are
    provenance.json                      `minigpt3d convert`: where the weights come from
    stage.json, history.jsonl            a training stage: what was asked for, and what happened
    recipe.json, scores.json             a recipe of several trainings: its own words, counts and minutes; its scores

The text is in `card.jinja`. What it prints are `facts`, and it may hold no number that is none: such a card is refused.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, StrictUndefined
from safetensors import safe_open

import minigpt3d
from minigpt3d import HUB_ID
from minigpt3d.evaluation.results import FEW, is_gain
from minigpt3d.evaluation.statistics import CONFIDENCE
from minigpt3d.evaluation.suites import METRICS
from minigpt3d.files import write_text
from minigpt3d.point_cloud_minigpt3d import READABLE_SUFFIXES

from .facts import Fact, find_unsourced, read_fact, take_marks
from .words import escaped


CARD_FILE, SOURCES_FILE = "README.md", "card_sources.json"
RECIPE_FILE = "recipe.json"
_TEMPLATE = Path(__file__).with_name("card.jinja")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms: they are no parameters
_CONDITIONS = {
    "seeing": "as they are",
    "blind": "blind: no geometry, no color",
    "no_color": "without colors",
    "shuffled": "answers to other objects",
}

# Whose the parts of a conversion are: by the name of its file, as in NOTICE.
_COMPONENTS = {
    "phi": ("Phi-2, the language model", "Microsoft", "MIT"),
    "blip2": ("BLIP-2's Q-Former and queries", "Salesforce", "BSD-3-Clause"),
    "point_encoder": ("Point-BERT, as ULIP-2 trained it", "its authors", "as MiniGPT-3D's authors redistribute it"),
    "tinygpt_v": ("TinyGPT-V's LoRA, norms and projection", "its authors", "as MiniGPT-3D's authors redistribute them"),
    "stage3": ("weights of MiniGPT-3D's stage III", "the authors of MiniGPT-3D", "CC BY-NC-SA 4.0"),
    "stage4": ("weights of MiniGPT-3D's stage IV", "the authors of MiniGPT-3D", "CC BY-NC-SA 4.0"),
    "data": ("the data of their training, not in this folder", "the authors of MiniGPT-3D", "CC BY-NC-SA 4.0"),
    "model": ("the model it was made from", "see its card", "its own"),
    "adapter": ("what was trained on top", "whoever trained it", "theirs to say; that of the model and of the data binds"),
}  # fmt: skip


class CardError(ValueError):
    """The card would say something that it must not."""


# ---- What is given --------------------------------------------------------------------------------------------------

# What the energy and the emissions of a training are computed from: unit and meaning.
GIVEN = {
    "hours": ("h", "wall time of the training"),
    "watts": ("W", "mean power of all devices together"),
    "pue": ("", "what the building takes, for each watt of the devices"),
    "grid": ("g CO2e/kWh", "emissions of the electricity"),
}


@dataclass(frozen=True)
class Given:
    """A number that no file tells, and who says so."""

    value: float
    source: str


def read_given(options: Iterable[str]) -> dict[str, Given]:
    """`NAME=VALUE:SOURCE`, as in "watts=285:nvidia-smi, mean of the run" → by name.

    Raises:
        ValueError: an option is not of this form, or its source is missing.
    """
    given = {}
    for option in options:
        name, _, rest = option.partition("=")
        value, _, source = rest.partition(":")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in GIVEN or not 0 <= number < float("inf") or (name == "pue" and number < 1) or not source.strip():
            raise ValueError(
                f"--co2 {option!r}: expected NAME=VALUE:SOURCE with a name of {', '.join(GIVEN)}, a number (pue: at least 1) "
                'and who says so, as in "watts=285:nvidia-smi, mean of the run".'
            )
        given[name] = Given(number, source.strip())
    return given


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_card(
    folder: str | Path,
    results: Iterable[str | Path] = (),
    given: Mapping[str, Given] | None = None,
    ablation: str | Path | None = None,
    model_id: str | None = None,
    fingerprint: str | None = None,
) -> Path:
    """Write README.md, and card_sources.json with the source of every number in it, in order.

    Args:
        folder: a whole model or an adapter; see the head of this file.
        results: folders of evaluations, or their results.json.
        given: see `GIVEN`.
        ablation: what `training/ablate.py` wrote, or its ablation.json; the picture beside it comes along.
        model_id: what others load the model by: a Hub id or a folder (default: the folder's name).
        fingerprint: of the folder's weights, as evaluations write it; results of other weights are refused.

    Returns:
        The path of README.md.

    Raises:
        ValueError: the folder holds no model, a file is damaged or something else, or results are given twice.
        CardError: results are of other weights, or a number has no source.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder}: holds neither a model's config.json nor an adapter's adapter_config.json.")
    paths = [path / "results.json" if path.is_dir() else path for path in map(Path, results)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(
            f"A run is given twice: {', '.join(str(path.parent) for path in paths)}. Give each folder once."
        )
    runs = [_read_results(path, fingerprint) for path in paths]
    facts = read_folder(folder)
    if model_id is not None and not Path(model_id).is_dir():
        try:
            validate_repo_id(model_id)
        except HFValidationError as error:
            raise ValueError(
                f"model_id {model_id!r}: expected a Hub id, such as {HUB_ID}, or a folder. {error}"
            ) from error
    facts["model_id"] = model_id or _public(folder)
    facts["runs"] = runs
    facts["ablation"] = None if ablation is None else _take_ablation(Path(ablation), folder)
    facts["limits"] = find_limits(runs)
    facts["emissions"] = estimate_emissions(facts["hours"], given or {})
    facts["command"] = _command(_public(folder), model_id, paths, given or {}, ablation)
    facts["metadata"] = make_metadata(facts)
    marked = render(_TEMPLATE.read_text(encoding="utf-8"), facts)
    unsourced = find_unsourced(marked)
    if unsourced:
        raise CardError(
            f"The card of {folder} would hold numbers without a source: {'; '.join(f'“{words}”' for words in unsourced)}. "
            f"Take them from a file (see {_TEMPLATE.name}); in {RECIPE_FILE}, put them into counts, minutes or figures."
        )
    card, sources = take_marks(marked)
    write_text(folder / CARD_FILE, card)
    write_text(folder / SOURCES_FILE, json.dumps(sources, indent=1, ensure_ascii=False) + "\n")
    _write_eval_results(folder, [run.raw for run in runs])
    return folder / CARD_FILE


def render(template: str, facts: Mapping) -> str:
    """The template's text, with marks around what is a fact."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "fixed": fixed,
        "count": count,
        "rough": rough,
        "score": score,
        "row": in_row,
        "plain": as_plain_text,
        "block": as_block,
        "words": in_words,
        "titled": titled,
        "by_condition": by_condition,
    }
    return environment.from_string(template).render(facts)


def fixed(fact: Fact, digits: int) -> Fact:
    return fact.says(f"{fact.raw:,.{digits}f}")


def count(fact: Fact) -> Fact:
    return fact.says(f"{fact.raw:,}")


def rough(fact: Fact) -> Fact:
    """Three digits, or all before the point."""
    return fact.says(f"{fact.raw:,.0f}" if abs(fact.raw) >= 100 else f"{fact.raw:.3g}")


def score(fact: Fact, unit: Fact) -> Fact:
    """A score in its unit: shares as percentages."""
    if unit == "share":
        return fact.says(f"{100 * fact.raw:.1f} %")
    return fact.says(f"{fact.raw:.1f}" if unit == "score100" else f"{fact.raw:.2f}")


def in_row(fact: Fact) -> Fact:
    """A text that may stand in a table's row."""
    return fact.says(" ".join(str(fact.raw).split()).replace("|", "\\|"))


def as_plain_text(fact: Fact) -> Fact:
    """What a model or a judge is called, or a sentence about it, with nothing in it that becomes markup."""
    return fact.says(escaped(fact.raw))


def as_block(command: Fact) -> str:
    """A command as a block of code, which none of its words ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command.raw)), default=0))
    return f"{fence}bash\n{command}\n{fence}"


def in_words(fact: Fact) -> Fact:
    return fact.says(fact.raw.replace("_", " "))


def titled(fact: Fact) -> Fact:
    """A metric's title."""
    return fact.says(METRICS[fact.raw].title)


def by_condition(run: Fact) -> list[dict[str, Fact | None]]:
    """The scores of a run, a row for each question and metric: by condition, None where one was not tried."""
    rows = {}
    for line in run["scores"]:
        row = rows.setdefault((line["question"].raw, line["metric"].raw), dict.fromkeys(_CONDITIONS))
        if line["condition"].raw in row:
            row[line["condition"].raw] = line
    return [row for row in rows.values() if row["seeing"] is not None]


def _command(
    folder: str, model_id: str | None, paths: list[Path], given: Mapping[str, Given], ablation: str | Path | None
) -> str:
    """What writes this card again. A path says something about somebody's disk: relative ones stay, of others the end."""
    words = ["minigpt3d", "card", folder]
    if model_id is not None:
        words += ["--model-id", model_id]
    if paths:
        words += ["--results", *(_public(path.parent) for path in paths)]
    for name, each in given.items():
        words += ["--co2", f"{name}={each.value:g}:{each.source}"]
    if ablation is not None:
        words += ["--ablation", _public(Path(ablation))]
    return shlex.join(words)


def _public(path: Path) -> str:
    return path.resolve().name if path.is_absolute() or ".." in path.parts else str(path)


def make_metadata(facts: Mapping) -> str:
    """The YAML at the card's head."""
    data = ModelCardData(
        license=facts["license"],
        library_name="transformers" if facts["whole"] else "peft",
        pipeline_tag="image-text-to-text",
        base_model=facts["base_model"],
        tags=["point-cloud", "3d", "minigpt3d", "arxiv:2405.01413"],
    )
    if facts["runs"]:
        from .model_index import model_index

        data["model-index"] = model_index([run.raw for run in facts["runs"]])
    return data.to_yaml()


def _write_eval_results(folder: Path, runs: list[dict]):
    """In the place of those that an earlier card came with."""
    from .model_index import HUB_DATASETS, eval_results

    where = folder / ".eval_results"
    for path in where.glob("*.yaml"):
        if path.stem.partition("-")[0] in HUB_DATASETS:
            path.unlink()
    for name, text in (eval_results(runs) if runs else {}).items():
        where.mkdir(exist_ok=True)
        write_text(where / name, text)


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> dict:
    """What the template knows of the folder."""
    config = read_fact(folder / "config.json")
    adapter = read_fact(folder / "adapter_config.json")
    record, stage, recipe, scores = (
        read_fact(folder / name) for name in ("provenance.json", "stage.json", RECIPE_FILE, "scores.json")
    )
    files = record.raw["files"] if record else {}
    apart = record is not None and record["lora"] == "keep"
    of_release = "phi" in files
    base = (read_fact(folder / "adapter" / "adapter_config.json") if config else adapter) or {}
    base = base["base_model_name_or_path"].raw if base else None
    is_path = base is None or Path(base).is_absolute() or Path(base).exists() or base.count("/") != 1
    public_base = "microsoft/phi-2" if of_release else None if is_path else base
    history = _read_history(folder / "history.jsonl")
    return {
        "whole": config is not None,
        "part": "" if not apart else "base" if config else "adapter",
        "config": config,
        "processor": read_fact(folder / "processor_config.json"),
        "record": record,
        "of_release": of_release,
        "trained": "stage4" in files,
        "stage": stage,
        "recipe": recipe,
        "scores": scores,
        "base": Path(base).name if base and is_path else base,
        "base_model": public_base,
        "license": "cc-by-nc-sa-4.0" if of_release else recipe.raw["license"] if recipe else None,
        "components": [
            _COMPONENTS[slot] for slot in (*files, *(["data"] if of_release else [])) if slot in _COMPONENTS
        ],
        "weights": _count_weights(folder),
        "losses": _mean_losses(history),
        "validation": _validation(history),
        "hours": _measure_hours(history, stage, recipe),
        "has_report": (folder / "report.png").is_file(),
        "suffixes": READABLE_SUFFIXES,
        "conditions": _CONDITIONS,
        "level": Fact(round(100 * CONFIDENCE), "minigpt3d.evaluation.statistics: CONFIDENCE"),
        "sources_file": SOURCES_FILE,
        "version": minigpt3d.__version__,
    }


def _count_weights(folder: Path) -> dict[str, Fact] | None:
    """Number of parameters, and bytes, of the weights in the folder itself."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    number = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if not name.endswith(_BUFFERS):
                    size = 1
                    for length in tensors.get_slice(name).get_shape():
                        size *= length
                    number += size
    where = files[0].name if len(files) == 1 else "model-*.safetensors"
    size = sum(file.stat().st_size for file in files)
    return {
        "parameters": Fact(number, f"{where}: shapes of its tensors"),
        "megabytes": Fact(size / 1e6, f"{where}: size of the file"),
    }


def _read_history(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _mean_losses(history: list[dict]) -> tuple[Fact, Fact] | None:
    """Of the first and of the last twentieth of the steps."""
    if not history:
        return None
    losses = [entry["loss"] for entry in history]
    some = max(1, len(losses) // 20)
    return (
        Fact(fmean(losses[:some]), f"history.jsonl: mean loss of the first {some} steps"),
        Fact(fmean(losses[-some:]), f"history.jsonl: mean loss of the last {some} steps"),
    )


def _validation(history: list[dict]) -> tuple[Fact, Fact] | None:
    before, after = (
        (history[0].get("validation_before"), history[-1].get("validation_after")) if history else (None, None)
    )
    if before is None or after is None:
        return None
    return (
        Fact(before, "history.jsonl: validation_before of the first step"),
        Fact(after, "history.jsonl: validation_after of the last step"),
    )


def _measure_hours(history: list[dict], stage: Fact | None, recipe: Fact | None) -> Fact | None:
    """Wall time: of a recipe's steps, or of the stage's optimizer steps with the wait for data and checkpoints."""
    if recipe is not None:
        return Fact(sum(recipe.raw["minutes"].values()) / 60, f"{RECIPE_FILE}: sum of minutes")
    if not history or stage is None or "row" not in stage:
        return None
    batch = {source["name"]: source["batch"] for source in stage.raw["row"]["mixture"]}
    if any(not entry["samples_per_second"] or entry["source"] not in batch for entry in history):
        return None
    seconds = sum(batch[entry["source"]] / entry["samples_per_second"] for entry in history)
    return Fact(seconds / 3600, "history.jsonl: batch of each step / samples_per_second, summed")


def estimate_emissions(hours: Fact | None, given: Mapping[str, Given]) -> dict:
    """Energy and emissions of the training, where all that they are made of is known.

    Returns:
        "inputs": what is known, as (meaning, fact, unit, who says so); "missing": the meanings of what is not; "energy" in
        kWh and "emissions" in kg CO2e, or None.
    """
    known = {name: Fact(each.value, f"{each.source} (given: {name})") for name, each in given.items()}
    said = {name: Fact(each.source, f"given: the source of {name}") for name, each in given.items()}
    if hours is not None and "hours" not in known:
        known["hours"], said["hours"] = hours, Fact(hours.place, hours.place)
    emissions = {
        "inputs": [(GIVEN[name][1], known[name], GIVEN[name][0], said[name]) for name in GIVEN if name in known],
        "missing": [meaning for name, (_, meaning) in GIVEN.items() if name not in known],
        "energy": None,
        "emissions": None,
    }
    if {"hours", "watts", "pue"} <= set(known):
        energy = known["hours"].raw * known["watts"].raw * known["pue"].raw / 1000
        emissions["energy"] = Fact(energy, "hours × watts × pue")
        if "grid" in known:
            emissions["emissions"] = Fact(energy * known["grid"].raw / 1000, "hours × watts × pue × grid")
    return emissions


def _read_results(path: Path, fingerprint: str | None) -> Fact:
    """
    Raises:
        ValueError: there is no such file, or it is of another layout.
        CardError: the results are of other weights.
    """
    results = read_fact(path, f"{path.resolve().parent.name}/{path.name}")
    if results is None:
        raise ValueError(f"{path}: no such file. Give the --out DIR of a finished `minigpt3d evaluate`.")
    if results.raw.get("schema") != 1:
        raise ValueError(f"{path}: expected results.json of layout 1, got {results.raw.get('schema')!r}.")
    theirs = results.raw["model"]["fingerprint"]
    if fingerprint is not None and theirs != fingerprint:
        raise CardError(
            f"{path}: these are results of {results.raw['model']['name']} with weights {theirs}, the card is for weights "
            f"{fingerprint}. Evaluate this folder."
        )
    return results


def find_limits(runs: list[Fact]) -> list[str]:
    """What the results say against the model, in words, with marks."""
    limits = []
    for run in runs:
        suite, dataset = f"{run['title'] if 'title' in run else run['suite']}", run["dataset"]
        if dataset["objects"].raw < dataset["of"].raw:
            limits.append(
                f"{suite}: the first {dataset['objects']} of {dataset['of']} objects only, no result of the whole."
            )
        if any(line["objects"].raw < FEW for line in run["scores"]):
            limits.append(f"{suite}: so few objects that only the largest differences can be told from noise.")
        blind = [test for test in run["tests"] if (test["a"], test["b"]) == ("seeing", "blind")]
        if not blind:
            limits.append(f"{suite}: without a blind control, so it does not show that geometry is used.")
        for test in blind:
            if not is_gain(test.raw):
                limits.append(
                    f"{suite}, `{test['question']}`, `{test['metric']}`: no better than blind, so it does not show that "
                    "geometry is used."
                )
        seeing = [line for line in run["scores"] if line["condition"] == "seeing"]
        for line in seeing:
            if line["unparsed"]:
                limits.append(
                    f"{suite}, `{line['question']}`, `{line['metric']}`: {line['unparsed']} of {line['objects']} answers "
                    "could not be parsed, and count as wrong."
                )
        if "cut" in run["generation"] and run["generation"]["cut"]:
            limits.append(f"{suite}: {run['generation']['cut']} answers were cut off at the longest length allowed.")
        if worst := _find_worst_corruption(run, seeing[0]):
            unit = worst["unit"]
            limits.append(
                f"{suite}, `{worst['question']}`, `{worst['metric']}`: {score(worst['value'], unit)} instead of "
                f"{score(seeing[0]['value'], unit)} under the corruption that does most harm, `{worst['condition']}`."
            )
    return limits


def _find_worst_corruption(run: Fact, main: Fact) -> Fact | None:
    """The worst score of the main metric on corrupted objects."""
    corrupted = [
        line
        for line in run["scores"]
        if line["condition"].raw not in _CONDITIONS
        and (line["question"], line["metric"]) == (main["question"], main["metric"])
    ]
    worst = max if METRICS[main["metric"].raw].lower_is_better else min
    return worst(corrupted, key=lambda line: line["value"].raw, default=None)


def _take_ablation(path: Path, folder: Path) -> str:
    """Its report with marks, without a title of its own, its headings below the card's; its picture comes into the folder.

    Raises:
        ValueError: `training/ablate.py` wrote no such file.
    """
    from minigpt3d.recipes.household.ablate import REPORT_FILE, to_markdown

    path = path / REPORT_FILE if path.is_dir() else path
    try:
        text = to_markdown(json.loads(path.read_bytes()), cite=lambda text, place: str(Fact(text, place)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"--ablation {path}: expected the folder, or the ablation.json, that training/ablate.py wrote, got {error!r:.100}."
        ) from error
    picture = path.with_suffix(".png")
    if picture.is_file() and picture.resolve() != (folder / picture.name).resolve():
        shutil.copyfile(picture, folder / picture.name)
    parts = text.partition("\n")[2].strip().split("```")  # every other one is code
    parts[::2] = [re.sub(r"^#(?=#+ )", "###", part, flags=re.MULTILINE) for part in parts[::2]]
    return "```".join(parts)
