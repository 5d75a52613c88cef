"""The model card of a stage's result: what the run knows, and no more."""

import platform
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from huggingface_hub import ModelCard, ModelCardData

from .stages import Stage
from .weights import Start


_TEMPLATE = Path(__file__).with_name("model_card.jinja")


def write_card(folder: Path, stage: Stage, start: Start, run: dict, history: list[dict], model_id: str, data: str):
    """Write README.md into a result's folder.

    Args:
        folder: with an adapter, or with a whole model.
        stage: the row.
        start: what the stage began with.
        run: as in stage.json.
        history: of all steps.
        model_id: what others will load it by: a Hub id, or the folder's name.
        data: what it was trained on.
    """
    whole = (folder / "config.json").exists()
    # A path says something about somebody's disk, and nothing to others.
    shown = {name: Path(value).name if Path(value).exists() else value
             for name, value in (("base", start.base), ("data", data), ("init", run["init"]))}  # fmt: skip
    card_data = ModelCardData(
        library_name="transformers" if whole else "peft",
        pipeline_tag="image-text-to-text",
        base_model=None if Path(start.base).exists() else start.base,
        tags=["point-cloud", "3d", "minigpt3d", "arxiv:2405.01413"],
    )
    losses = [entry["loss"] for entry in history]
    some = max(1, len(losses) // 20)
    before, after = history[0].get("validation_before"), history[-1].get("validation_after")
    names = ("torch", "transformers", "peft", "accelerate")
    card = ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        stage=stage,
        run=run | {"init": shown["init"]},
        base=shown["base"],
        data=shown["data"],
        model_id=model_id,
        whole=whole,
        first_loss=fmean(losses[:some]),
        last_loss=fmean(losses[-some:]),
        validation=None if before is None or after is None else (before, after),
        versions=", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]),
    )
    card.save(folder / "README.md")
