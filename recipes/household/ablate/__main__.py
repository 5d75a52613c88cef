"""What does each part of the recipe contribute? Variants of it, trained and scored side by side from one table.

    python training/ablate.py --base DIR --data PACKED --out DIR [--seeds 0 1 2] [--scale 0.25]

Every variant is the household recipe with one thing changed. What variants have in common is trained once: a stage is known
by its row, its seed and the stages before it. The encoder is frozen in every stage, so each cloud is encoded once for a few
augmented views, and steps cost what the Q-Former and the language model cost. A run that was stopped goes on, and several
processes with seeds of their own may share OUT.

Shapes: S seeds, O held-out objects, B samples, N points, G groups, D width of the encoder.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from scipy import stats
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from minigpt3d.data.clouds import augment
from minigpt3d.data.records import Sample
from minigpt3d.data.sources import fingerprint, open_sources
from minigpt3d.evaluation.ask import encode_question
from minigpt3d.evaluation.objects import EvalObject, read_household
from minigpt3d.evaluation.statistics import CONFIDENCE, SIGNIFICANT, holm
from minigpt3d.evaluation.suites import CAPTION_PROMPT
from minigpt3d.evaluation.vocabulary.colors import names_color
from minigpt3d.evaluation.vocabulary.kinds import names_kind
from minigpt3d.hub import fingerprint_model, load_weights
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT, END_OF_ANSWER, MiniGPT3DProcessor
from minigpt3d.training.loop import make_optimizer, reseed, train_step
from minigpt3d.training.stages import RECIPES, Lora, Stage, learning_rate
from minigpt3d.training.stream import StageStream, encode_sample, pack_batch
from minigpt3d.training.weights import (
    Start,
    adapter_names,
    gather_parameters,
    lora_scales,
    prepare_model,
    save_adapter,
)


# ---- The table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """The household recipe with one thing changed.

    Args:
        name: in the table.
        group: the question that it answers.
        stages: that are trained, in order.
        changes: of every stage's row.
        last: changes of stage IV's row.
        num_experts: query experts; None: as many as the recipe has.
        random_queries: whether the query tokens start at random, not from the pre-trained ones.
    """

    name: str
    group: str
    stages: tuple[str, ...] = ("I", "II", "III", "IV")
    changes: dict = field(default_factory=dict)
    last: dict = field(default_factory=dict)
    num_experts: int | None = None
    random_queries: bool = False


def without_norms(stage: Stage) -> Stage:
    return replace(stage, trainable=tuple(p for p in stage.trainable if "norm" not in p.lower()))


FULL = Variant("full recipe", "")
FROZEN_NORMS = "norms"  # a key of `changes`, which takes the norms out of a row's patterns
VARIANTS = (
    FULL,
    *(
        Variant(f"without stage {left_out}", "stages", tuple(s for s in ("I", "II", "III", "IV") if s != left_out))
        for left_out in ("I", "II", "III", "IV")
    ),
    *(Variant(f"{n} expert{'s' * (n > 1)}", "experts", num_experts=n) for n in (1, 2, 4)),
    *(Variant(f"router {kind}", "router", last={"router_type": kind}) for kind in ("none", "constant", "soft")),
    *(
        Variant(f"LoRA rank {rank}", "LoRA rank", changes={"language_lora": Lora(rank, alpha=16, dropout=0.05)})
        for rank in (2, 64)
    ),
    Variant("norms frozen", "norms", changes={FROZEN_NORMS: "frozen"}),
    Variant("random queries", "queries", random_queries=True),
)
# What the recipe itself is, in each question's words.
REFERENCE = {"stages": "all four", "experts": "8 experts", "router": "router sparse", "LoRA rank": "LoRA rank 16",
             "norms": "norms trained", "queries": "pre-trained queries"}  # fmt: skip


def rows_of(variant: Variant, scale: float) -> list[Stage]:
    """The stage rows that the variant trains, `scale` times as long."""
    rows = []
    for name in variant.stages:
        row = RECIPES["household"][name]
        changes = variant.changes if name != "I" else {}  # there is nothing yet that they would change
        changes = {key: value for key, value in changes.items() if key != FROZEN_NORMS}
        row = replace(row, **changes | (variant.last if name == "IV" else {}))
        if FROZEN_NORMS in variant.changes:
            row = without_norms(row)
        row = replace(
            row,
            steps_per_epoch=max(2, round(row.steps_per_epoch * scale)),
            warmup_steps=max(1, round(row.warmup_steps * scale)),
        )
        rows.append(row)
    return rows


# ---- Clouds, encoded once -------------------------------------------------------------------------------------------


class EncodedClouds(nn.Module):
    """In the place of the 3D encoder: gives back the features that it is given as clouds, (B, N, 6) → (B, 1+G, D)."""

    def __init__(self, config):
        super().__init__()
        self.shape = (1 + config.num_groups, config.hidden_size)

    def forward(self, point_clouds: torch.Tensor, fps_start=None) -> torch.Tensor:
        return point_clouds.flatten(1)[:, : math.prod(self.shape)].unflatten(1, self.shape)


def as_cloud(features: torch.Tensor) -> torch.Tensor:
    """Features (B, 1+G, D) in the shape of clouds, (B, N, 6), the last one filled up with zeros."""
    flat = features.flatten(1)
    return nn.functional.pad(flat, (0, -flat.shape[1] % 6)).unflatten(1, (-1, 6))


@torch.inference_mode()
def encode_clouds(model, processor, clouds: Iterator[np.ndarray], total: int, what: str) -> torch.Tensor:
    """Clouds → their features in the shape of clouds, (clouds, N, 6)."""
    features, batch = [], []
    for number, cloud in enumerate(tqdm(clouds, total=total, desc=what, unit="cloud", disable=None), start=1):
        batch.append(processor.feature_extractor(cloud)["point_clouds"][0])
        if len(batch) == 32 or number == total:
            features.append(as_cloud(model.model.point_encoder(torch.from_numpy(np.stack(batch)))))
            batch = []
    return torch.cat(features)


class EncodedViews:
    """`views` augmented views of each training cloud, encoded.

    Args:
        sources: of the packed data.
        path: where they are kept between runs.
    """

    def __init__(self, model, processor, sources: dict, views: int, path: Path):
        self.views = views
        places: dict[str, tuple[str, int, int]] = {}
        self.samples: dict[tuple[str, int, int], Sample] = {}
        for name, source in sources.items():
            for shard, rows in enumerate(source.rows):
                for row in range(rows):
                    sample = self.samples[name, shard, row] = source.read_sample(shard, row)
                    places.setdefault(sample.object_id, (name, shard, row))
        self.index = {object_id: number for number, object_id in enumerate(sorted(places))}
        self.texts: dict[tuple[str, int, int], dict] = {}  # tokenised once

        def draw() -> Iterator[np.ndarray]:
            for object_id in self.index:
                name, shard, row = places[object_id]
                _, cloud = sources[name].read(shard, row)
                for view in range(views):
                    yield augment(cloud, np.random.default_rng([view, *object_id.encode()]))

        if not path.exists():
            features = encode_clouds(model, processor, draw(), len(places) * views, "views")
            write_whole(path, lambda partial: torch.save(features, partial))
        self.features = torch.load(path, weights_only=True)

    def get(self, object_id: str, view: int) -> torch.Tensor:
        """(1, N, 6)."""
        return self.features[self.index[object_id] * self.views + view][None]


class EncodedStream(StageStream):
    """A stage's samples with encoded views for clouds."""

    def __init__(self, *args, views: EncodedViews, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoded_views = views

    def encode(self, step: int, slot: int) -> dict[str, torch.Tensor]:
        name, address = self.draw(step, slot)
        views, key = self.encoded_views, (name, *address)
        sample = views.samples[key]
        if key not in views.texts:
            views.texts[key] = encode_text(self.processor, sample, self.stage)
        view = int(self._rng("augment", step, slot).integers(views.views))
        return views.texts[key] | {"point_clouds": views.get(sample.object_id, view)}


_STAND_IN = np.eye(2, 6, dtype=np.float32)


def encode_text(processor, sample: Sample, stage: Stage) -> dict[str, torch.Tensor]:
    return encode_sample(processor, sample, _STAND_IN, stage)


# ---- Training -------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write):
    """`write(temporary)`, then rename. Processes that share a folder have temporary files of their own."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(partial)
    os.replace(partial, path)


def build_model(base: str, variant: Variant, seed: int) -> MiniGPT3DForConditionalGeneration:
    """The base, with as many experts as the variant has, and an encoder that only gives back what was encoded."""
    model = load_weights(base, dtype=torch.float32)
    torch.manual_seed(seed)
    if variant.random_queries:
        for expert in model.model.query_experts:
            nn.init.normal_(expert.weight, std=model.config.qformer_config.initializer_range)
    if variant.num_experts is not None:
        count, router = variant.num_experts, model.model.router
        model.model.query_experts = model.model.query_experts[:count]
        model.config.num_query_experts = count
        model.config.num_experts_per_cloud = min(count, model.config.num_experts_per_cloud)
        narrow = nn.Linear(router.linear_2.in_features, count)
        with torch.no_grad():
            narrow.weight.copy_(router.linear_2.weight[:count])
            narrow.bias.copy_(router.linear_2.bias[:count])
        router.linear_2 = narrow
    model.model.point_encoder = EncodedClouds(model.config.point_config)
    return model


def train_stage(accelerator: Accelerator, model, stage: Stage, stream: StageStream, seed: int, what: str) -> float:
    """Train what the row says; returns the mean loss of the last tenth of the steps."""
    optimizer = make_optimizer(stage, model)
    losses = []
    for step in tqdm(range(stage.steps), desc=what, unit="step", disable=None):
        samples = [stream.encode(step, slot) for slot in stream.slots(step)]
        reseed(seed, step, 0)
        loss, _ = train_step(accelerator, model, optimizer, [samples], learning_rate(stage, step))
        losses.append(loss)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def chain_key(variant: Variant, rows: list[Stage], seed: int) -> str:
    """By which a sequence of stages is known: whatever decides about its result."""
    experts = variant.num_experts if rows and rows[-1].name == "IV" else None  # before, there is expert 0 alone
    facts = [[asdict(row) for row in rows], seed, experts, variant.random_queries]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Lab:
    """Trains chains of stages, each once.

    Args:
        base: the model that all variants start from.
        data: packed data.
        work_dir: for what is kept between runs.
        scale: of the stages' lengths.
        views: augmented views of a cloud.
    """

    def __init__(self, base: str, data: str, work_dir: Path, scale: float, views: int):
        self.base, self.work_dir, self.scale = base, work_dir, scale
        self.accelerator = Accelerator()
        self.processor = MiniGPT3DProcessor.from_pretrained(base)
        names = {source.name for row in rows_of(FULL, scale) for source in row.mixture}
        self.sources = open_sources(sorted(names), data, [])
        work_dir.mkdir(parents=True, exist_ok=True)
        model = load_weights(base, dtype=torch.float32)
        self.views = EncodedViews(model, self.processor, self.sources, views, work_dir / f"views-{views}.pt")
        self.objects = read_household()
        clouds = (each.read() for each in self.objects)
        self.clouds = encode_clouds(model, self.processor, clouds, len(self.objects), "held-out clouds")

    def train(self, variant: Variant, seed: int) -> nn.Module:
        """The variant's model, from the longest part of its stages that was trained before."""
        rows, start = rows_of(variant, self.scale), Start(self.base)
        for done in range(1, len(rows) + 1):
            folder = self.work_dir / f"stages-{chain_key(variant, rows[:done], seed)}"
            row = rows[done - 1]
            if not folder.exists():
                model = prepare_model(build_model(self.base, variant, seed), row, start.adapter, start.stage)
                stream = EncodedStream(row, self.sources, self.processor, seed, views=self.views)
                what = f"{variant.name}, seed {seed}, stage {row.name}"
                loss = train_stage(self.accelerator, model, row, stream, seed, what)
                run = {"stage": row.name, "router_type": row.router_type, "loss": loss, "seed": seed}
                tensors = gather_parameters(model, adapter_names(model, start))
                save_adapter(folder, tensors, lora_scales(model), self.base, run)
            start = Start(self.base, folder, json.loads((folder / "stage.json").read_text()))
        return prepare_model(build_model(self.base, variant, seed), rows[-1], start.adapter, start.stage).eval()

    @torch.inference_mode()
    def score(self, model: nn.Module) -> dict[str, list[float]]:
        """Kind and color named or not, and the loss of the reference caption, for each held-out object."""
        said, losses = [], []
        for first in range(0, len(self.objects), 50):
            inputs = encode_question(
                self.processor, [_STAND_IN] * len(self.clouds[first : first + 50]), DEFAULT_PROMPT, "default"
            )
            inputs["point_clouds"] = self.clouds[first : first + 50]
            output = model.generate(
                **inputs,
                max_new_tokens=24,
                do_sample=False,
                stop_strings=[END_OF_ANSWER],
                tokenizer=self.processor.tokenizer,
            )
            texts = self.processor.tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            said += [text.split(END_OF_ANSWER)[0] for text in texts]
        for number, each in enumerate(self.objects):
            losses.append(self._caption_loss(model, each, self.clouds[number][None]))
        return {
            "kind": [float(names_kind(text, each.label)) for text, each in zip(said, self.objects, strict=True)],
            "color": [float(names_color(text, each.color)) for text, each in zip(said, self.objects, strict=True)],
            "loss": losses,
        }

    def _caption_loss(self, model: nn.Module, each: EvalObject, cloud: torch.Tensor) -> float:
        sample = Sample(each.object_id, ((CAPTION_PROMPT, each.caption),))
        encoded = encode_text(self.processor, sample, rows_of(FULL, self.scale)[-1]) | {"point_clouds": cloud}
        return float(model(**pack_batch([encoded]), use_cache=False).loss)


# ---- What differs ---------------------------------------------------------------------------------------------------

RUNS_DIR, SETTINGS_FILE = "runs", "settings.json"
REPORT_FILE = "ablation.json"
MEASURES = {"kind": "kind named", "color": "main color named", "loss": "loss of the caption, nats a token"}


def estimate_mean(values: np.ndarray) -> dict[str, float]:
    """Mean of (S, O) values with its 95 % interval and the p of being 0, for other seeds and other objects than these.

    Both are random: the variance of the mean is that of the seeds' means over S plus that of the objects' means over O, and
    Student's t has Satterthwaite's degrees of freedom. A bootstrap of three or four seeds is no substitute: where they
    agree in sign, as they do by chance once in 8 times if there are four, no resample has another, and p is at its least.
    """
    parts = np.array([values.mean(1 - axis).var(ddof=1) / values.shape[axis] for axis in (0, 1)])
    mean, variance = values.mean(), parts.sum()
    if variance == 0:
        return {"mean": mean, "low": mean, "high": mean, "p": float(mean == 0)}
    freedom = variance**2 / (parts**2 / (np.array(values.shape) - 1)).sum()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
    p = 2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


def find_same(runs: list[dict]) -> list[tuple[str, str]]:
    """Pairs of variants that came out alike to the last bit for every object and seed: two names of one computation."""
    results = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        results.setdefault(run["variant"], []).append([run["seed"], *(run[measure] for measure in MEASURES)])
    return [(a, b) for a, b in combinations(results, 2) if results[a] == results[b]]


def summarize(runs: list[dict]) -> list[dict]:
    """For each variant and measure the mean and the difference to the full recipe, with 95 % intervals and p.

    Variants that have less than two seeds in common with the full recipe are left out.

    Raises:
        ValueError: there are less than two runs of the full recipe.
    """
    values = {}
    for name in dict.fromkeys(run["variant"] for run in runs):
        found = sorted((run for run in runs if run["variant"] == name), key=lambda run: run["seed"])
        for measure in MEASURES:
            values[name, measure] = {run["seed"]: run[measure] for run in found}
    if len(values.get((FULL.name, "kind"), {})) < 2:
        raise ValueError(
            f"an interval over seeds takes two runs of the {FULL.name!r} to compare with, got "
            f"{len(values.get((FULL.name, 'kind'), {}))}. Give more --seeds, and leave it in --variants. What was run is kept."
        )
    rows = []
    for (name, measure), by_seed in values.items():
        full = values[FULL.name, measure]
        seeds = sorted(by_seed.keys() & full.keys())
        if len(seeds) < 2:  # another process may be at it
            continue
        own = np.array([by_seed[seed] for seed in seeds])  # (S, O)
        found = estimate_mean(own)
        row = {"variant": name, "measure": measure, "seeds": len(seeds)}
        row |= {"value": found["mean"], "low": found["low"], "high": found["high"]}
        if name != FULL.name:
            found = estimate_mean(own - np.array([full[seed] for seed in seeds]))
            row |= {"difference": found["mean"], "difference_low": found["low"], "difference_high": found["high"]}
            row["p"] = found["p"]
        rows.append(
            {key: each if isinstance(each, str) or key == "p" else round(float(each), 4) for key, each in row.items()}
        )
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["p"] = round(float(p), 4)  # of all differences in the table together
    return rows


# ---- What is shown --------------------------------------------------------------------------------------------------


def draw(rows: list[dict], path: Path):
    """The differences to the full recipe, a panel for each measure, a line for each variant."""
    found = {(row["variant"], row["measure"]): row for row in rows}
    shown = [v for v in VARIANTS[1:] if (v.name, "kind") in found]
    places, labels, place, group = [], [], 0.0, None
    for variant in shown:
        place += 1.0 if variant.group == group else 1.6
        group = variant.group
        places.append(-place)
        labels.append(variant.name)
    figure = Figure(figsize=(10, 0.34 * place + 1.2), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        scale = 1 if measure == "loss" else 100
        axes.axvline(0, color="black", linewidth=0.8)
        for variant, height in zip(shown, places, strict=True):
            row = found[variant.name, measure]
            middle, low, high = (scale * row[key] for key in ("difference", "difference_low", "difference_high"))
            color = "#c0392b" if row["p"] < SIGNIFICANT else "#7f8c8d"
            axes.plot([low, high], [height, height], color=color, linewidth=2)
            axes.plot(middle, height, "o", color=color, markersize=5)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("nats" if measure == "loss" else "percentage points", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=9)
    panels[0].set_yticks(places, labels)
    figure.suptitle("Difference to the full recipe, 95 % intervals; red: more than noise", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})


Told = Callable[[str, dict, str], str]  # (text, row, key of the row that it tells) → as it is written


def _plain(text: str, row: dict, key: str) -> str:
    return text


def to_text(row: dict, prefix: str = "", told: Told = _plain) -> str:
    """ "71.0 (62.1 to 79.3)": of a row's value, or with the prefix "difference_" of its difference."""
    name = "difference" if prefix else "value"
    scale, digits = (1, 3) if row["measure"] == "loss" else (100, 1)
    sign = "+" if prefix else ""
    numbers = [
        told(f"{scale * row[key]:{sign}.{digits}f}", row, key) for key in (name, f"{prefix}low", f"{prefix}high")
    ]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def to_table(rows: list[dict], told: Told = _plain) -> str:
    """All variants with their differences, as a Markdown table."""
    found = {(row["variant"], row["measure"]): row for row in rows}
    header = ["variant", *(f"{title}{'' if m == 'loss' else ', %'} | difference" for m, title in MEASURES.items())]
    lines = ["| " + " | ".join(header) + " |", "|" + "-|" * (1 + 2 * len(MEASURES))]
    for variant in VARIANTS:
        if (variant.name, "kind") not in found:
            continue
        cells = [told(variant.name, found[variant.name, "kind"], "variant")]
        for measure in MEASURES:
            row = found[variant.name, measure]
            cells.append(to_text(row, told=told))
            difference = to_text(row, "difference_", told) if "p" in row else ""
            cells.append(f"**{difference}**" if row.get("p", 1) < SIGNIFICANT else difference)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_words(rows: list[dict], told: Told, cite: Callable[[str, str], str]) -> list[str]:
    """A sentence for each question: which differences are more than noise. `cite` is that of `to_markdown`."""
    sentences = []
    for group, reference in REFERENCE.items():
        names = [variant.name for variant in VARIANTS if variant.group == group]
        found = [row for row in rows if row["variant"] in names]
        if not found:
            continue
        clear = [row for row in found if row["p"] < SIGNIFICANT]
        clearly = "; ".join(
            f"{told(row['variant'], row, 'variant')}: {MEASURES[row['measure']]} {to_text(row, 'difference_', told)}"
            for row in clear
        )
        halves = [(row["difference_high"] - row["difference_low"]) / 2 for row in found if row["measure"] == "kind"]
        safe = cite(f"{100 * max(halves):.1f}", f"half of the widest interval of a difference in kinds, {group}")
        rest = (
            f"{'No other' if clearly else 'No'} difference is told apart from noise: for kinds one would have to be above "
            f"{safe} points to be safe, and more after Holm's correction."
        )
        reference = cite(reference, "training/ablate.py: REFERENCE")
        sentences.append(
            f"**{group}** (the recipe: {reference}). {f'More than noise: {clearly}. ' if clearly else ''}{rest}"
        )
    return sentences


def command_of(runs: list[dict], facts: dict) -> str:
    """One that does what all processes that shared the folder did."""
    words = ["--base", facts["given"]["base"], "--data", facts["given"]["data"], "--out", "DIR", "--seeds"]
    words += [*map(str, facts["seeds"]), "--scale", f"{facts['scale']:g}", "--views", str(facts["views"])]
    names = {run["variant"] for run in runs}
    if len(names) < len(VARIANTS):
        words += ["--variants", *(variant.name for variant in VARIANTS if variant.name in names)]
    return shlex.join(["python", "training/ablate.py", *words])


def write_report(runs: list[dict], facts: dict, out: Path):
    """ablation.json from the runs, and ablation.md and ablation.png from that; nothing is trained."""
    rows = summarize(runs)
    minutes = sum(run["minutes"] for run in runs)
    facts = facts | {"seeds": sorted({run["seed"] for run in runs}), "objects": len(runs[0]["kind"])}
    facts["command"] = command_of(runs, facts)
    del facts["given"]
    content = facts | {"minutes": round(minutes, 1), "same": [list(pair) for pair in find_same(runs)], "rows": rows}
    write_whole(out / REPORT_FILE, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))
    draw(rows, out / "ablation.png")
    write_whole(out / "ablation.md", lambda p: p.write_text(to_markdown(content), encoding="utf-8"))


def to_markdown(content: dict, cite: Callable[[str, str], str] = lambda text, place: text) -> str:
    """What ablation.json holds, as people read it; a model card takes it in.

    Args:
        content: of ablation.json.
        cite: (a text that holds a number, its place: `FILE#/POINTER`, or in words) → what is written.
    """

    def fact(key: str, text: str | None = None) -> str:
        return cite(str(content[key]) if text is None else text, f"{REPORT_FILE}#/{key}")

    def told(text: str, row: dict, key: str) -> str:
        return cite(text, f"{REPORT_FILE}#/rows/{content['rows'].index(row)}/{key}")

    seeds = ", ".join(cite(str(seed), f"{REPORT_FILE}#/seeds/{i}") for i, seed in enumerate(content["seeds"]))
    num_seeds = cite(str(len(content["seeds"])), f"{REPORT_FILE}: number of seeds")
    level = cite(f"{100 * CONFIDENCE:.0f} %", "minigpt3d.evaluation.statistics: CONFIDENCE")
    alarms = cite(f"{100 * SIGNIFICANT:.0f} %", "minigpt3d.evaluation.statistics: SIGNIFICANT")
    twins = "; ".join(
        " and ".join(f"*{cite(name, f'{REPORT_FILE}#/same/{i}/{j}')}*" for j, name in enumerate(pair))
        for i, pair in enumerate(content["same"])
    )
    twins = (
        f"- Two names for one computation, alike to the last bit for every object and seed: {twins}.\n"
        if twins
        else ""
    )
    return f"""# What each part of the recipe contributes

Variants of the household recipe, each with one thing changed, {num_seeds} seeds ({seeds}), scored on the
{fact("objects")} held-out objects. Made by

```bash
{content["command"]}
```

on {fact("date")} in {fact("minutes", f"{content['minutes']:.0f}")} minutes, summed over the processes that shared the work, on {fact("cpus")} CPU cores ({fact("versions")}). The stages are {fact("scale", f"{content['scale']:g}")} times as long as
the recipe's, on {fact("views")} encoded views of each cloud instead of fresh ones.

![Differences to the full recipe](ablation.png)

{to_table(content["rows"], told)}

*kind* and *color*: share of greedy answers to "What is this?" that name them. *loss*: of the reference caption, lower is better.
In brackets {level} intervals (Student's t) for other seeds and other objects than these; **bold**: more than noise, at {alarms} for all
differences of the table together (Holm).

## What it shows

{chr(10).join(f"- {sentence}" for sentence in in_words(content["rows"], told, cite))}
{twins}
## What it cannot show

- Anything about the paper's own tables. This model has a thousandth of the size, names the kinds of household things, and
  starts from an encoder, a Q-Former and a language model that were trained on the same objects, so that less is left for the
  stages to do than in the paper, and pre-trained queries are pre-trained for this.
- Differences below its noise. A part whose interval holds zero may matter all the same.
- What longer training would do: the stages are shorter than the recipe's, and no learning rate was tuned for a variant.
- More than a few seeds can: their own scatter is known poorly, which the intervals allow for by being wide. All seeds see
  the same encoded views.
- Whether experts and routers matter, unless *without stage IV* differs from the full recipe: they are trained in that stage
  alone, and where it changes nothing, its variants cannot differ.
- The number of experts by itself: of fewer experts the two that are used have a larger sum of weights, which are not
  renormalized. Nor the rank by itself: alpha stays, so that a smaller rank has a larger scale, and the Q-Former's rank stays.
"""


# ---- All of it ------------------------------------------------------------------------------------------------------


def run(lab: Lab, variants: list[Variant], seeds: list[int], runs_dir: Path):
    """Train and score what is not there yet; a seed's file is written after every variant.

    Raises:
        ValueError: another process is at work on a seed.
    """
    for seed in seeds:
        path = runs_dir / f"seed-{seed}.json"
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                run_seed(lab, variants, seed, path)
        except Timeout:
            raise ValueError(
                f"another process is at work on seed {seed} in {runs_dir.parent}. Give each --seeds of its own."
            ) from None


def run_seed(lab: Lab, variants: list[Variant], seed: int, path: Path):
    """All variants with one seed."""
    runs = json.loads(path.read_text()) if path.exists() else []
    for variant in variants:
        if variant.name in [each["variant"] for each in runs]:
            continue
        started = time.perf_counter()
        scores = lab.score(lab.train(variant, seed))
        minutes = (time.perf_counter() - started) / 60
        runs.append({"variant": variant.name, "seed": seed, "minutes": round(minutes, 2)} | scores)
        write_whole(path, lambda partial, runs=runs: partial.write_text(json.dumps(runs) + "\n"))
        shown = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in scores.items())
        print(f"{variant.name}, seed {seed}: {shown} ({minutes:.1f} minutes)", flush=True)


def read_runs(runs_dir: Path) -> list[dict]:
    """All runs of all seeds.

    Raises:
        ValueError: there are none.
    """
    runs = [each for path in sorted(runs_dir.glob("seed-*.json")) for each in json.loads(path.read_text())]
    if not runs:
        raise ValueError(f"{runs_dir} holds no runs. Run without --report_only first.")
    return runs


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="what the recipe starts from: build/household/base")
    parser.add_argument("--data", help="its packed data: build/household/packed")
    parser.add_argument("--out", type=Path, required=True, help="folder for results, table and picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of every variant for each")
    parser.add_argument("--scale", type=float, default=0.25, help="length of the stages; 1 is the recipe's")
    parser.add_argument("--views", type=int, default=4, help="augmented views that a cloud is encoded for")
    parser.add_argument(
        "--variants", nargs="+", default=[v.name for v in VARIANTS], metavar="NAME", help="all by default"
    )
    parser.add_argument("--report_only", action="store_true", help="table and picture of the runs that are there")
    args = parser.parse_args(argv)
    try:
        ablate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def ablate(args: argparse.Namespace):
    """
    Raises:
        ValueError: with what is wrong and what to do, before anything heavy.
    """
    names = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in args.variants if name not in names]:
        raise ValueError(f"--variants {unknown[0]!r}: expected some of {', '.join(map(repr, names))}.")
    if not 0 < args.scale < math.inf or args.views < 1:
        raise ValueError(f"--scale and --views must be above 0, got {args.scale:g} and {args.views}.")
    runs_dir, settings_file = args.out / RUNS_DIR, args.out / SETTINGS_FILE
    if args.report_only:
        write_report(read_runs(runs_dir), json.loads(settings_file.read_text()), args.out)
        return
    if args.base is None or args.data is None:
        raise ValueError("give --base and --data, which `make household` leaves in build/household.")
    settings = {"scale": args.scale, "views": args.views}
    settings |= {"base": fingerprint_model(args.base), "data": fingerprint(args.data, [])}
    settings |= describe_machine()
    # For readers: a path that begins at the root says something about somebody's disk.
    settings["given"] = {
        name: Path(path).name if Path(path).is_absolute() else path
        for name, path in (("base", args.base), ("data", args.data))
    }
    runs_dir.mkdir(parents=True, exist_ok=True)
    if settings_file.exists():
        theirs = json.loads(settings_file.read_text())
        for name in ("scale", "views", "base", "data"):
            if theirs[name] != settings[name]:
                raise ValueError(
                    f"--out {args.out} holds runs with {name} {theirs[name]!r}, now it is {settings[name]!r}. Give a new folder."
                )
    write_whole(settings_file, lambda partial: partial.write_text(json.dumps(settings, indent=1) + "\n"))
    logging.disable_progress_bar()
    lab = Lab(args.base, args.data, args.out / "work", args.scale, args.views)
    run(lab, [names[name] for name in args.variants], args.seeds, runs_dir)
    write_report(read_runs(runs_dir), settings, args.out)
    print(to_table(summarize(read_runs(runs_dir))))


def describe_machine() -> dict:
    """What a reader needs to repeat it."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return {
        "date": date.today().isoformat(),
        "cpus": os.cpu_count(),
        "versions": f"Python {platform.python_version()}, {packages}",
    }


if __name__ == "__main__":
    main()
