"""Read what the card states from the files of a model's folder. All of them are optional, except one of the configs:

config.json, processor_config.json   a whole model and its processor
adapter_config.json                  a PEFT adapter and its base model
*.safetensors                        number of parameters
provenance.json                      `minigpt3d convert`: origin of the weights
stage.json, history.jsonl            a training stage: its settings and its steps
recipe.json, scores.json             a recipe of several trainings: texts, counts, minutes and scores
"""

import math
from pathlib import Path
from statistics import fmean

from safetensors import safe_open

from minigpt3d.files import read_json_lines
from minigpt3d.hub import is_hub_id

from .facts import Fact, read_fact


RECIPE_FILE = "recipe.json"

# Origin of the parts of a conversion, by the name of their file, as in NOTICE.
_COMPONENTS = {
    "phi": ("Phi-2, the language model", "Microsoft", "MIT"),
    "blip2": ("BLIP-2's Q-Former and queries", "Salesforce", "BSD-3-Clause"),
    "point_encoder": ("Point-BERT, trained by ULIP-2", "its authors", "as the authors of MiniGPT-3D redistribute it"),
    "tinygpt_v": ("TinyGPT-V's LoRA, norms and projection", "its authors", "as the authors of MiniGPT-3D redistribute them"),
    "stage3": ("weights of MiniGPT-3D's stage III", "the authors of MiniGPT-3D", "CC BY-NC-SA 4.0"),
    "stage4": ("weights of MiniGPT-3D's stage IV", "the authors of MiniGPT-3D", "CC BY-NC-SA 4.0"),
    "data": ("training data of these weights, not in this folder", "the authors of MiniGPT-3D", "CC BY-NC-SA 4.0"),
    "model": ("the model that it was made from", "see its card", "see its card"),
    "adapter": ("the trained adapter", "its trainer", "set by its trainer, within the licenses of model and data"),
}  # fmt: skip


def read_folder(folder: Path) -> dict:
    """What the template states about the folder.

    Raises:
        ValueError: the folder holds no model, or a file is damaged.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: there is no such folder; expected the folder of a model or an adapter, as `minigpt3d convert` or "
            "a training stage writes it."
        )
    config, adapter, record, stage, recipe = (
        read_fact(folder / name)
        for name in ("config.json", "adapter_config.json", "provenance.json", "stage.json", RECIPE_FILE)
    )
    if config is None and adapter is None:
        raise ValueError(f"{folder}: expected a model's config.json or an adapter's adapter_config.json, got neither.")
    history_file = folder / "history.jsonl"
    history = read_json_lines(history_file) if history_file.is_file() else []
    return _read_origin(folder, config, adapter, record, recipe) | {
        "config": config,
        "processor": read_fact(folder / "processor_config.json"),
        "record": record,
        "stage": stage,
        "recipe": recipe,
        "scores": read_fact(folder / "scores.json"),
        "weights": _count_weights(folder),
        "losses": _mean_losses(history),
        "validation": _validation_losses(history),
        "hours": _measure_hours(history, stage, recipe),
        "has_curves": (folder / "curves.png").is_file(),
    }


def _read_origin(
    folder: Path, config: Fact | None, adapter: Fact | None, record: Fact | None, recipe: Fact | None
) -> dict:
    """Whole model, adapter or one of the two parts of a conversion; its base, components and license."""
    files = record.raw["files"] if record else {}
    of_release = "phi" in files
    in_two_parts = record is not None and record["lora"] == "keep"
    base_config = read_fact(folder / "adapter" / "adapter_config.json") if config else adapter
    named = base_config["base_model_name_or_path"] if base_config else None
    base = named.raw if named else None
    language_model = record.raw.get("language_model") if record else None
    is_path = base is None or Path(base).is_absolute() or Path(base).exists() or not is_hub_id(base)
    return {
        "whole": config is not None,
        "part": "" if not in_two_parts else "base" if config else "adapter",
        "of_release": of_release,
        "trained": "stage4" in files,
        "base": named and named.says(Path(base).name if is_path else base),
        "base_model": "microsoft/phi-2"
        if of_release
        else language_model
        if language_model and is_hub_id(language_model)
        else None
        if is_path
        else base,
        "license": "cc-by-nc-sa-4.0" if of_release else recipe.raw["license"] if recipe else None,
        "components": [
            _COMPONENTS[slot] for slot in (*files, *(["data"] if of_release else [])) if slot in _COMPONENTS
        ],
    }


def _count_weights(folder: Path) -> dict[str, Fact] | None:
    """Number of parameters and megabytes of the weights in the folder itself."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    number = 0
    for file in files:
        with safe_open(file, "np") as tensors:
            number += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    source = files[0].name if len(files) == 1 else "model-*.safetensors"
    size = sum(file.stat().st_size for file in files)
    return {
        "parameters": Fact(number, f"{source}: shapes of its tensors"),
        "megabytes": Fact(size / 1e6, f"{source}: size of the file"),
    }


# ---- History of a stage: one line of history.jsonl for each step ----------------------------------------------------


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


def _validation_losses(history: list[dict]) -> tuple[Fact, Fact] | None:
    """On held-out data, before and after the training."""
    if not history or history[0].get("validation_before") is None or history[-1].get("validation_after") is None:
        return None
    return (
        Fact(history[0]["validation_before"], "history.jsonl: validation_before of the first step"),
        Fact(history[-1]["validation_after"], "history.jsonl: validation_after of the last step"),
    )


def _measure_hours(history: list[dict], stage: Fact | None, recipe: Fact | None) -> Fact | None:
    """Wall time of a recipe's steps, or of a stage's optimizer steps with waits for data and checkpoints."""
    if recipe is not None:
        return Fact(sum(recipe.raw["minutes"].values()) / 60, f"{RECIPE_FILE}: sum of minutes")
    if not history or stage is None or "row" not in stage:
        return None
    batch = {source["name"]: source["batch"] for source in stage.raw["row"]["mixture"]}
    if any(not entry["samples_per_second"] or entry["source"] not in batch for entry in history):
        return None
    seconds = sum(batch[entry["source"]] / entry["samples_per_second"] for entry in history)
    return Fact(seconds / 3600, "history.jsonl: batch of each step / samples_per_second, summed")
