"""Train the variants and score them on the held-out objects.

What variants have in common is trained once: a chain of stages is known by its rows, its seed and the parts that it changes.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from minigpt3d.data.records import Sample
from minigpt3d.data.sources import open_sources
from minigpt3d.evaluation.ask import encode_question
from minigpt3d.evaluation.objects import EvalObject, read_household
from minigpt3d.evaluation.suites import CAPTION_PROMPT
from minigpt3d.evaluation.vocabulary.colors import names_color
from minigpt3d.evaluation.vocabulary.kinds import names_kind
from minigpt3d.files import read_json
from minigpt3d.hub import STAGE_FILE, ModelFiles, load_weights
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT, END_OF_ANSWER, MiniGPT3DProcessor
from minigpt3d.training.loop import make_optimizer, reseed, train_step
from minigpt3d.training.stages import Stage, learning_rate
from minigpt3d.training.stream import StageStream, pack_batch
from minigpt3d.training.weights import adapter_names, gather_parameters, lora_scales, prepare_model, save_adapter

from .encoded_clouds import PLACEHOLDER, EncodedClouds, EncodedStream, EncodedViews, encode_clouds, encode_text
from .variants import FULL, Variant, stage_rows


BATCH = 50  # of questions
MAX_NEW_TOKENS = 24


def build_variant(base: str, variant: Variant, seed: int) -> MiniGPT3DForConditionalGeneration:
    """The base with the variant's experts and queries, for encoded clouds."""
    model = load_weights(base, dtype=torch.float32)
    torch.manual_seed(seed)
    if variant.random_queries:
        for expert in model.model.query_experts:
            nn.init.normal_(expert.weight, std=model.config.qformer_config.initializer_range)
    if variant.num_experts is not None:
        _keep_experts(model, variant.num_experts)
    model.model.point_encoder = EncodedClouds(model.config.point_config)
    return model


def _keep_experts(model: MiniGPT3DForConditionalGeneration, count: int):
    """Remove all query experts but the first `count`, and their rows of the router."""
    router = model.model.router
    model.model.query_experts = model.model.query_experts[:count]
    model.config.num_query_experts = count
    model.config.num_experts_per_cloud = min(count, model.config.num_experts_per_cloud)
    narrow = nn.Linear(router.linear_2.in_features, count)
    with torch.no_grad():
        narrow.weight.copy_(router.linear_2.weight[:count])
        narrow.bias.copy_(router.linear_2.bias[:count])
    router.linear_2 = narrow


def train_stage(accelerator: Accelerator, model, stage: Stage, stream: StageStream, seed: int, title: str) -> float:
    """Train a stage; returns the mean loss of the last tenth of its steps."""
    optimizer = make_optimizer(stage, model)
    losses = []
    for step in tqdm(range(stage.steps), desc=title, unit="step", disable=None):
        samples = [stream.encode(step, slot) for slot in stream.slots(step)]
        reseed(seed, step, 0)
        loss, _ = train_step(accelerator, model, optimizer, [pack_batch(samples)], learning_rate(stage, step))
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def chain_key(variant: Variant, rows: list[Stage], seed: int) -> str:
    """Digest of all that decides the result of a chain of stages."""
    experts = variant.num_experts if rows and rows[-1].name == "IV" else None  # earlier stages use expert 0 only
    facts = [[asdict(row) for row in rows], seed, experts, variant.random_queries]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Lab:
    """Trains and scores variants.

    Args:
        base: the model that all variants start from.
        data: folder of packed data.
        work_dir: folder for features and stages, which later runs use again.
        scale: length of the stages; 1 is the recipe's.
        views: augmented views of a cloud.
    """

    def __init__(self, base: str, data: str, work_dir: Path, scale: float, views: int):
        self.base, self.work_dir, self.scale = base, work_dir, scale
        self.accelerator = Accelerator()
        self.processor = MiniGPT3DProcessor.from_pretrained(base, trust_remote_code=False)
        names = {source.name for row in stage_rows(FULL, scale) for source in row.mixture}
        self.sources = open_sources(sorted(names), data, [])
        work_dir.mkdir(parents=True, exist_ok=True)
        model = load_weights(base, dtype=torch.float32)
        self.views = EncodedViews(model, self.processor, self.sources, views, work_dir / f"views-{views}.pt")
        self.objects = read_household()
        clouds = (item.read() for item in self.objects)
        self.clouds = encode_clouds(model, self.processor, clouds, len(self.objects), "held-out clouds")

    def train(self, variant: Variant, seed: int) -> nn.Module:
        """The variant's model, trained from the longest chain of its stages that exists."""
        rows, start = stage_rows(variant, self.scale), ModelFiles(self.base)
        for count, row in enumerate(rows, start=1):
            folder = self.work_dir / f"stages-{chain_key(variant, rows[:count], seed)}"
            if not folder.exists():
                self._train_stage(variant, row, start, seed, folder)
            stage = read_json(folder / STAGE_FILE)
            start = ModelFiles(self.base, folder, stage)
        model = build_variant(self.base, variant, seed)
        return prepare_model(model, rows[-1], start.adapter, start.stage).eval()

    def _train_stage(self, variant: Variant, row: Stage, start: ModelFiles, seed: int, folder: Path):
        model = prepare_model(build_variant(self.base, variant, seed), row, start.adapter, start.stage)
        stream = EncodedStream(row, self.sources, self.processor, seed, encoded_views=self.views)
        title = f"{variant.name}, seed {seed}, stage {row.name}"
        loss = train_stage(self.accelerator, model, row, stream, seed, title)
        run = {"stage": row.name, "router_type": row.router_type, "loss": loss, "seed": seed}
        tensors = gather_parameters(model, adapter_names(model, start))
        save_adapter(folder, tensors, lora_scales(model), self.base, run)

    @torch.inference_mode()
    def score(self, model: nn.Module) -> dict[str, list[float]]:
        """Scores for each held-out object: kind and color named (0 or 1), loss of the reference caption."""
        answers = self._answer(model)
        return {
            "kind": [float(names_kind(text, item.label)) for text, item in zip(answers, self.objects, strict=True)],
            "color": [float(names_color(text, item.color)) for text, item in zip(answers, self.objects, strict=True)],
            "loss": [
                self._caption_loss(model, item, cloud[None])
                for item, cloud in zip(self.objects, self.clouds, strict=True)
            ],
        }

    def _answer(self, model: nn.Module) -> list[str]:
        """Greedy answers to "What is this?"."""
        answers, tokenizer = [], self.processor.tokenizer
        for clouds in self.clouds.split(BATCH):
            inputs = encode_question(self.processor, [PLACEHOLDER] * len(clouds), DEFAULT_PROMPT, "default")
            inputs["point_clouds"] = clouds
            output = model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                stop_strings=[END_OF_ANSWER],
                tokenizer=tokenizer,
            )
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += [text.split(END_OF_ANSWER)[0] for text in texts]
        return answers

    def _caption_loss(self, model: nn.Module, item: EvalObject, cloud: torch.Tensor) -> float:
        sample = Sample(item.object_id, ((CAPTION_PROMPT, item.caption),))
        encoded = encode_text(self.processor, sample, stage_rows(FULL, self.scale)[-1]) | {"point_clouds": cloud}
        return float(model(**pack_batch([encoded]), use_cache=False).loss)
