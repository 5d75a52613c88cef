"""The four stages of MiniGPT-3D as a table: what trains, on which data, with which learning rates. Paper: §3.3, table 1.

A fifth row, "own", trains a finished model on your own objects.

A stage is one row, derived from the row before it. A recipe is read and changed here; the command line changes only how
a run is carried out. Patterns are regular expressions that match complete parameter names; LoRA factors are named as in
an adapter's file (`….query.lora_A.weight`).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace


# ---- What a stage is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One kind of conversation in a stage's mixture.

    Args:
        name: "brief", "detailed", "single_round" or "multi_round".
        batch: samples of one optimizer step, over all devices.
        weight: share of the steps that draw this source, relative to the other sources.
    """

    name: str
    batch: int
    weight: float


@dataclass(frozen=True)
class Lora:
    """Size of the LoRA factors: B·A of this rank, times alpha / rank; dropout acts on A's input, in training only."""

    rank: int
    alpha: int
    dropout: float


def title_of(name: str) -> str:
    """What messages call a stage."""
    return "Fine-tuning" if name == "own" else f"Stage {name}"


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: "I" to "IV", or "own".
        starts_from: the model to start from: "base" (the pretrained parts), the result of a stage, by its name, or "any"
            model.
        teaches: what is learned, as a sentence.
        trainable: patterns of the trainable parameters. All others are frozen.
        mixture: the sources, of which one is drawn for each step, or for each sample.
        draw_each: "step", as the authors do, or "sample", for which all sources need the same batch.
        exports: whether the result is merged into a complete model.
        any_source: whether data may lack some sources of the mixture, which are then left out.
        warmup_lr, peak_lr, min_lr: learning rates at the first step, at the end of warm-up, and at the last step.
        warmup_steps: steps of the linear warm-up.
        steps_per_epoch, epochs: their product is the length of the stage in optimizer steps.
        router_type: routing of the query experts; "none" uses expert 0 alone; None: as the model has it.
        language_lora, qformer_lora: sizes of the LoRA factors, in the language model and in the Q-Former.
        augment: whether clouds are rotated, scaled and thinned out at random (see `data.clouds.augment`).
        max_text_length: maximum number of tokens after the first prompt of a conversation.
        betas, weight_decay: AdamW's; the decay acts on tensors with two or more dimensions only.
        eval_every: steps between measurements of the loss on held-out data; None: only before and after the stage.
    """

    name: str
    starts_from: str
    teaches: str
    trainable: tuple[str, ...]
    mixture: tuple[Source, ...]
    warmup_lr: float
    peak_lr: float
    min_lr: float
    warmup_steps: int
    steps_per_epoch: int
    epochs: int = 1
    router_type: str | None = "none"
    draw_each: str = "step"
    exports: bool = False
    any_source: bool = False
    language_lora: Lora = Lora(rank=64, alpha=16, dropout=0.05)
    qformer_lora: Lora = Lora(rank=8, alpha=16, dropout=0.1)
    augment: bool = False
    max_text_length: int = 1024
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    eval_every: int | None = None

    @property
    def title(self) -> str:
        return title_of(self.name)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def trains_lora(self) -> bool:
        return any("lora" in pattern for pattern in self.trainable)


# ---- What trains ----------------------------------------------------------------------------------------------------

POINT_PROJECTION = (r"model\.point_projection\..*",)
# Norm weights train and norm biases do not; the first LayerNorm of the Q-Former, outside its encoder, does not either.
QFORMER = (r"model\.qformer\..*\.lora_[AB]\.weight", r"model\.qformer\.encoder\..*\.LayerNorm\.weight")
QUERY_TOKENS = (r"model\.query_experts\.0\.weight",)
LANGUAGE_PROJECTION = (r"model\.language_projection\..*",)
LANGUAGE_MODEL = (r"model\.language_model\..*\.lora_[AB]\.weight", r"model\.language_model\..*norm\.weight")
MIXTURE_OF_QUERY_EXPERTS = (r"model\.query_experts\.\d+\.weight", r"model\.router\..*")


def select_trainable(stage: Stage, names: Iterable[str]) -> set[str]:
    """The names that the stage trains.

    Raises:
        ValueError: a pattern of the stage matches none of the names.
    """
    names = list(names)
    chosen = set()
    for pattern in stage.trainable:
        matches = {name for name in names if re.fullmatch(pattern, name)}
        if not matches:
            raise ValueError(
                f"{stage.title}: the trainable pattern {pattern!r} matches none of the model's {len(names)} "
                f"parameters (such as {', '.join(names[:3])}). Correct the pattern in training/stages.py."
            )
        chosen |= matches
    return chosen


# ---- Learning rate --------------------------------------------------------------------------------------------------


def learning_rate(stage: Stage, step: int) -> float:
    """Learning rate of a step, counted from 0 over the whole stage, as in the authors' runs.

    Two details of theirs are kept. Warm-up uses the step *within the epoch*, so a warm-up longer than an epoch starts
    again. The cosine counts from step 0, not from the end of warm-up, so the rate drops a little where warm-up ends.
    """
    if step < stage.warmup_steps:
        step_in_epoch = step % stage.steps_per_epoch
        return stage.warmup_lr + (stage.peak_lr - stage.warmup_lr) * step_in_epoch / stage.warmup_steps
    return stage.min_lr + (stage.peak_lr - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))


# ---- The paper's recipe ---------------------------------------------------------------------------------------------

STAGE_1 = Stage(
    name="I",
    starts_from="base",
    teaches="the point projection carries the encoder's features to a frozen Q-Former and language model",
    trainable=POINT_PROJECTION,
    mixture=(Source("brief", batch=9, weight=1),),
    warmup_lr=1e-6,
    peak_lr=3e-5,
    min_lr=1e-5,
    warmup_steps=7_000,
    steps_per_epoch=70_000,
)
STAGE_2 = replace(
    STAGE_1,
    name="II",
    starts_from="I",
    teaches="Q-Former, projections and language model learn to name objects together",
    trainable=POINT_PROJECTION + QFORMER + QUERY_TOKENS + LANGUAGE_PROJECTION + LANGUAGE_MODEL,
)
STAGE_3 = replace(
    STAGE_2,
    name="III",
    starts_from="II",
    teaches="the same parameters learn detailed descriptions and conversations",
    mixture=(
        Source("detailed", batch=6, weight=2),
        Source("single_round", batch=10, weight=3),
        Source("multi_round", batch=4, weight=3),
    ),
    peak_lr=1e-5,
    min_lr=1e-6,
    warmup_steps=3_000,
    steps_per_epoch=10_000,
    epochs=3,
)
STAGE_4 = replace(
    STAGE_3,
    name="IV",
    starts_from="III",
    teaches="eight query experts, copies of stage III's queries, specialize while a router learns to choose among them",
    trainable=MIXTURE_OF_QUERY_EXPERTS,
    peak_lr=5e-6,
    warmup_steps=1_000,
    epochs=1,
    router_type="sparse",
    exports=True,
)
OWN = replace(
    STAGE_3,
    name="own",
    starts_from="any",
    teaches="a finished model learns your own objects; query experts and router stay frozen",
    trainable=POINT_PROJECTION + QFORMER + LANGUAGE_PROJECTION + LANGUAGE_MODEL,
    mixture=tuple(Source(name, batch=8, weight=1) for name in ("brief", "detailed", "single_round", "multi_round")),
    any_source=True,
    peak_lr=3e-5,
    warmup_steps=100,
    steps_per_epoch=1_000,
    epochs=1,
    router_type=None,
)


# ---- Other values for a run on your own objects -----------------------------------------------------------------------

# What `--set NAME=VALUE` takes: type and least value. Epochs are passes over the data.
SETTINGS = {
    "lr": (float, 0),
    "min_lr": (float, 0),
    "warmup_steps": (int, 0),
    "steps": (int, 1),
    "epochs": (float, 0),
    "batch": (int, 1),
    "weight_decay": (float, 0),
    "eval_every": (int, 1),
}


def parse_settings(texts: Iterable[str]) -> dict[str, float]:
    """Values by name from `NAME=VALUE`.

    Raises:
        ValueError: another name, no number, or one out of range; a name is given twice, or both steps and epochs.
    """
    settings = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in SETTINGS:
            raise ValueError(f"`set` {text}: expected NAME=VALUE with a NAME of {', '.join(SETTINGS)}.")
        kind, least = SETTINGS[name]
        try:
            number = kind(value)
        except ValueError:
            number = math.nan
        is_positive = name in ("lr", "epochs")
        if not least <= number < math.inf or (is_positive and number == 0):
            what = "a whole number" if kind is int else "a number"
            what += " greater than 0" if is_positive else f" of at least {least}"
            raise ValueError(f"`set` {text}: expected NAME=VALUE, and for {name} {what}.")
        if name in settings:
            raise ValueError(f"`set`: {name} is given twice.")
        settings[name] = number
    if {"steps", "epochs"} <= settings.keys():
        raise ValueError("`set`: steps and epochs both say how long the run is; give one of them.")
    return settings


def change_stage(stage: Stage, settings: dict[str, float], num_rows: int) -> Stage:
    """The stage with other values. A warm-up that is not set is at most a tenth of a run whose length is set.

    Args:
        settings: of `parse_settings`.
        num_rows: of the training data.
    """
    if "batch" in settings:
        stage = replace(stage, mixture=tuple(replace(source, batch=settings["batch"]) for source in stage.mixture))
    steps = settings.get("steps")
    if "epochs" in settings:
        steps = max(1, round(settings["epochs"] * num_rows / stage.mixture[0].batch))
    if steps is not None:
        warmup_steps = min(stage.warmup_steps, steps // 10)
        stage = replace(stage, steps_per_epoch=steps, epochs=1, warmup_steps=warmup_steps)
    if "lr" in settings:  # the rates before and after stay below it
        lr = settings["lr"]
        stage = replace(stage, peak_lr=lr, warmup_lr=min(stage.warmup_lr, lr), min_lr=min(stage.min_lr, lr))
    plain = {
        name: settings[name] for name in ("min_lr", "warmup_steps", "weight_decay", "eval_every") if name in settings
    }
    return replace(stage, **plain)


def departures(stage: Stage, row: Stage) -> dict[str, list]:
    """What differs from the row: [value of the row, value] by name."""
    values = {"batch": [s.mixture[0].batch for s in (row, stage)], "steps": [row.steps, stage.steps]}
    for name in ("peak_lr", "warmup_lr", "min_lr", "warmup_steps", "weight_decay", "eval_every"):
        values[name] = [getattr(row, name), getattr(stage, name)]
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


# ---- The recipes of bundled models: the same stages for a small model and two cores ---------------------------------


def _small(stage: Stage, batch: int = 32, augment: bool = True, **changes) -> Stage:
    return replace(
        stage,
        mixture=tuple(replace(source, batch=batch) for source in stage.mixture),
        warmup_lr=1e-5,
        peak_lr=1e-3 * stage.peak_lr / STAGE_1.peak_lr,  # later stages take smaller steps, as in the paper
        min_lr=1e-5,
        warmup_steps=30,
        epochs=1,
        language_lora=Lora(rank=16, alpha=16, dropout=0.05),
        qformer_lora=Lora(rank=8, alpha=16, dropout=0.1),
        augment=augment,
        **changes,
    )


RECIPES: dict[str, dict[str, Stage]] = {
    "paper": {stage.name: stage for stage in (STAGE_1, STAGE_2, STAGE_3, STAGE_4, OWN)},
    "household": {
        "I": _small(STAGE_1, steps_per_epoch=300),
        "II": _small(STAGE_2, steps_per_epoch=800),
        "III": _small(STAGE_3, steps_per_epoch=500),
        "IV": _small(STAGE_4, steps_per_epoch=200),
        "own": _small(OWN, batch=8, steps_per_epoch=200),
    },
    # Its views are augmented when the data are built, so that texts hold for them.
    "open": {
        "I": _small(STAGE_1, augment=False, steps_per_epoch=400),
        "II": _small(STAGE_2, augment=False, steps_per_epoch=2_000),
        "III": _small(STAGE_3, augment=False, steps_per_epoch=1_500),
        "IV": _small(STAGE_4, augment=False, steps_per_epoch=400),
        "own": _small(OWN, batch=8, steps_per_epoch=200),
    },
}
