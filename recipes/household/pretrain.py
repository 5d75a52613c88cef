"""Train what the paper takes ready-made: the tokenizer, the language model, the 3D encoder and the Q-Former.

    python -m minigpt3d.recipes.household.pretrain --data DIR --output_dir BASE

Order: a byte-level tokenizer from the captions; the language model, on text alone; the encoder and the Q-Former together,
by classifying kind, noun, category and colors of objects; the Q-Former again behind the frozen encoder. The heads are
discarded, and so is the projection between encoder and Q-Former, which stage I trains. The result is a folder for
`training/stage1.py --init`.

Shapes: B objects, G groups, K neighbors, D width, Q queries, V views, M objects with their views.
"""

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minigpt3d.arguments import option, run_script
from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig, MiniGPT3DPointConfig
from minigpt3d.data.clouds import point_cloud_path
from minigpt3d.evaluation.vocabulary.colors import COLORS
from minigpt3d.evaluation.vocabulary.kinds import KINDS, head_noun
from minigpt3d.files import write_json
from minigpt3d.hub import save_pretrained
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration, MiniGPT3DModel
from minigpt3d.point_bert_minigpt3d import FOLDED_LAYERS, MiniPointNet, fold_batch_norm, unfolded_names
from minigpt3d.processing_minigpt3d import (
    MiniGPT3DPointCloudProcessor,
    MiniGPT3DProcessor,
    clean_question,
    prepare_tokenizer,
)

from .build_data import read_metadata
from .captions import PLACES, USES, Facts, annotate, get_facts, keywords
from .procedural import make_object
from .views import augment_views, color_shares, group_views


# 64 groups of 16 neighbors see every one of 1024 points about once, at an eighth of the paper's density.
CLOUD_POINTS = 1024
NUM_QUERY_TOKENS = 8
VOCABULARY = 1200
CONTEXT = 320


@dataclass(frozen=True)
class PretrainOptions:
    """Options of the command."""

    data: Path = option("folder that build_data wrote", metavar="DIR")
    output_dir: Path = option("folder for the model, from which stage I starts", metavar="DIR")
    encoder_steps: int = option("steps of encoder and Q-Former", default=2400)
    qformer_steps: int = option("steps of the Q-Former alone", default=700)
    batch_size: int = option("views per step of encoder and Q-Former", default=48)
    num_procedural: int = option("generated objects beside the real ones", default=1500)
    language_steps: int = option("steps of the language model", default=450)
    seed: int = option("seed", default=0)
    threads: int = option("threads of torch; 1 where other programs use the cores", default=2)


def make_config(vocab_size: int, point_token_id: int, end_token_id: int) -> MiniGPT3DConfig:
    """The paper's network, about a thousandth of its size."""
    return MiniGPT3DConfig(
        point_config={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "num_groups": 64,
            "group_size": 16,
            "group_embedding_size": 128,
        },
        qformer_config={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "encoder_hidden_size": 128,
            "cross_attention_frequency": 2,
            "vocab_size": 1,  # the Q-Former has no word embeddings
            "max_position_embeddings": 1,
        },
        text_config={
            "model_type": "minigpt3d_phi",
            "vocab_size": vocab_size,
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "resid_pdrop": 0.0,
            "bos_token_id": end_token_id,
            "eos_token_id": end_token_id,
            "pad_token_id": end_token_id,
        },
        num_query_tokens=NUM_QUERY_TOKENS,
        num_query_experts=8,
        num_experts_per_cloud=2,
        router_type="none",
        router_hidden_size=64,
        point_projection_hidden_size=128,
        language_projection_hidden_size=256,
        point_token_id=point_token_id,
    )


# ---- Data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Object:
    """An object of the release, with its cloud (8192, 6)."""

    name: str
    kind: str | None
    category: str
    is_validation: bool
    cloud: np.ndarray


def read_release(data_dir: Path) -> list[Object]:
    """The objects of a release."""
    objects = []
    for row in read_metadata(data_dir):
        is_validation = row["split"] == "validation"
        folder = data_dir / ("validation" if is_validation else "clouds")
        cloud = np.load(point_cloud_path(folder, row["object_id"]))
        objects.append(Object(row["name"], row["kind"], row["category"], is_validation, cloud))
    return objects


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up to `peak`, then a cosine down to a hundredth of it."""
    return peak * min(1, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class MovingAverage:
    """Exponential moving average of a module's parameters, over fewer steps at the start."""

    def __init__(self, module: nn.Module, decay: float = 0.998):
        self.module, self.decay, self.steps = module, decay, 0
        self.average = copy.deepcopy(module).eval()

    @torch.no_grad()
    def update(self):
        self.steps += 1
        weight = 1 - min(self.decay, self.steps / (self.steps + 10))
        for average, current in zip(self.average.parameters(), self.module.parameters(), strict=True):
            average.lerp_(current, weight)


def adamw(module: nn.Module, weight_decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW; weight decay on tensors with two or more dimensions only."""
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )


# ---- Encoder and Q-Former -------------------------------------------------------------------------------------------


class EncoderTraining(nn.Module):
    """The parts of the model between cloud and queries, with heads on the encoder's and on the Q-Former's output."""

    def __init__(self, model: MiniGPT3DModel, head_sizes: dict[str, int]):
        super().__init__()
        self.point_encoder, self.point_projection = model.point_encoder, model.point_projection
        self.queries, self.qformer = model.query_experts[0], model.qformer
        self.head_sizes = head_sizes
        total = sum(head_sizes.values())
        self.encoder_head = nn.Linear(3 * model.config.point_config.hidden_size, total)
        self.qformer_head = nn.Linear(model.config.qformer_config.hidden_size, total)

    def forward(self, neighborhood: torch.Tensor, center: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """(B, G, K, 6), (B, G, 3) → logits by target, from the encoder and from the Q-Former."""
        features = self.point_encoder.encode_groups(neighborhood, center)  # (B, 1+G, D)
        pooled = torch.cat([features[:, 0], features[:, 1:].amax(1), features[:, 1:].mean(1)], dim=-1)  # (B, 3*D)
        query_output = self.qformer(
            query_embeds=self.queries.weight.expand(len(features), -1, -1),
            encoder_hidden_states=self.point_projection(features),
        ).last_hidden_state  # (B, Q, D)
        sizes = list(self.head_sizes.values())
        both = (self.encoder_head(pooled), self.qformer_head(query_output.mean(1)))
        return [dict(zip(self.head_sizes, logits.split(sizes, dim=-1), strict=True)) for logits in both]


class NormedMiniPointNet(nn.Module):
    """The mini-PointNet as it is trained: with BatchNorms, whose running statistics come from data once."""

    def __init__(self, config: MiniGPT3DPointConfig):
        super().__init__()
        self.linear_1, self.norm_1 = nn.Linear(config.num_channels, 128), nn.BatchNorm1d(128)
        self.linear_2 = nn.Linear(128, 256)
        self.linear_3, self.norm_2 = nn.Linear(512, 512), nn.BatchNorm1d(512)
        self.linear_4 = nn.Linear(512, config.group_embedding_size)
        self._folded = (MiniPointNet(config).to("meta"),)  # not a submodule: it has no weights of its own

    def forward(self, neighborhood: torch.Tensor) -> torch.Tensor:
        """(B, G, K, C) → (B, G, D)."""
        return torch.func.functional_call(self._folded[0], self.fold(), neighborhood)

    def fold(self) -> dict[str, torch.Tensor]:
        """The state dict of the `MiniPointNet` that equals this one."""
        state, folded = dict(self.named_parameters()) | dict(self.named_buffers()), {}
        for old, new in FOLDED_LAYERS.items():
            folded |= fold_batch_norm([state[name] for name in unfolded_names(old)], new)
        return folded

    @torch.no_grad()
    def calibrate(self, neighborhood: torch.Tensor):
        """Set the running statistics, which are never updated, from (B, G, K, C)."""
        points = self.linear_1(neighborhood.flatten(0, 2))  # (B*G*K, 128)
        _set_statistics(self.norm_1, points)
        points = self.norm_1.eval()(points).relu()
        points = self.linear_2(points).unflatten(0, (-1, neighborhood.shape[2]))  # (B*G, K, 256)
        points = torch.cat([points.amax(1, keepdim=True).expand_as(points), points], dim=-1)
        _set_statistics(self.norm_2, self.linear_3(points).flatten(0, 1))


def _set_statistics(norm: nn.BatchNorm1d, values: torch.Tensor):
    norm.running_mean.copy_(values.mean(0))
    norm.running_var.copy_(values.var(0))


WEIGHTS = {"kind": 1.0, "noun": 0.5, "category": 0.3, "color": 0.5}
OTHER_SHARE = 0.25  # of the views, objects of no kind
PROCEDURAL_SHARE = 0.3
KEPT_GROUPS = 0.75  # of a view, drawn at each step: faster, and the model cannot rely on single groups
QFORMER_LR = 2e-3


@dataclass
class Views:
    """Grouped views of all objects, real and generated, with targets and probabilities."""

    neighborhoods: list[torch.Tensor]  # (V, G, K, 6) each
    centers: list[torch.Tensor]  # (V, G, 3) each
    targets: torch.Tensor  # (M, 3) kind, noun and category, -100 where there is none
    weights: np.ndarray  # (M,), adding up to 1
    head_sizes: dict[str, int]
    rng: np.random.Generator
    generator: torch.Generator

    def reseed(self, seed: int):
        """Reset the random state, so that a training does not depend on the length of the one before it."""
        self.rng, self.generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def batch(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A random part of the groups of augmented views: neighborhoods (B, G, K, 6), centers (B, G, 3), targets (B, 3)."""
        chosen = self.rng.choice(len(self.targets), batch_size, p=self.weights)
        numbers = [int(self.rng.integers(len(self.centers[index]))) for index in chosen]
        picked = list(zip(chosen, numbers, strict=True))
        neighborhood = torch.stack([self.neighborhoods[index][view] for index, view in picked]).float()
        center = torch.stack([self.centers[index][view] for index, view in picked])
        neighborhood, center = augment_views(neighborhood, center, self.generator)
        kept = torch.randperm(center.shape[1], generator=self.generator)[: round(KEPT_GROUPS * center.shape[1])]
        return neighborhood[:, kept], center[:, kept], self.targets[chosen]


def make_views(config: MiniGPT3DPointConfig, objects: list[Object], num_procedural: int, seed: int) -> Views:
    """Group every object a few times; validation objects once, with probability 0."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    procedural = [make_object(rng) for _ in tqdm(range(num_procedural), desc="procedural objects", unit="")]
    nouns = sorted({head_noun(o.name) for o in objects if not o.is_validation} | {name for name, _, _ in procedural})
    categories = sorted({o.category for o in objects if not o.is_validation})
    kinds = [*KINDS, None]

    def index_in(names: list[str], name: str | None) -> int:
        return names.index(name) if name in names else -100

    rows = [(o.cloud, 1 if o.is_validation else 16, o.kind, head_noun(o.name), o.category) for o in objects]
    rows += [(cloud, 2, kind, noun, None) for noun, kind, cloud in procedural]
    neighborhoods, centers, targets = [], [], []
    for cloud, num_views, kind, noun, category in tqdm(rows, desc="grouping", unit="", mininterval=5):
        neighborhood, center = group_views(cloud, config, CLOUD_POINTS, num_views, rng)
        neighborhoods.append(neighborhood.half())
        centers.append(center)
        targets.append((kinds.index(kind), index_in(nouns, noun), index_in(categories, category)))
    targets = torch.tensor(targets)  # (M, 3)
    weights = np.array([not o.is_validation for o in objects] + [True] * num_procedural, dtype=float)  # (M,)
    weights = balance(weights, targets[:, 0].numpy(), len(objects), len(kinds))
    sizes = {"kind": len(kinds), "noun": len(nouns), "category": len(categories), "color": len(COLORS)}
    return Views(neighborhoods, centers, targets, weights, sizes, rng, generator)


def balance(weights: np.ndarray, kinds: np.ndarray, num_real: int, num_kinds: int) -> np.ndarray:
    """Probabilities of objects: fixed shares of real, generated and other objects, rare kinds above their frequency.

    Args:
        weights: (M,) 1 for training objects, 0 for validation objects; the first `num_real` are real.
        kinds: (M,) indices; the last index is "other".

    Returns:
        (M,), with sum 1.
    """
    is_real, is_other = np.arange(len(kinds)) < num_real, kinds == num_kinds - 1
    procedural_share = PROCEDURAL_SHARE if num_real < len(kinds) else 0
    weights = weights.copy()
    for part, share in (
        (is_real & is_other, OTHER_SHARE),
        (~is_real, procedural_share),
        (is_real & ~is_other, 1 - OTHER_SHARE - procedural_share),
    ):
        counts = np.bincount(kinds[part], weights[part], minlength=num_kinds)
        weights[part] /= np.sqrt(np.maximum(counts[kinds[part]], 1))
        weights[part] *= share / max(weights[part].sum(), 1e-9)
    return weights / weights.sum()


def train_encoder(model: MiniGPT3DModel, objects: list[Object], views: Views, steps: int, batch_size: int) -> dict:
    """Train point encoder, query tokens and Q-Former in place; returns the accuracy of the heads on validation objects."""
    encoder = model.point_encoder
    encoder.mini_pointnet = normed = NormedMiniPointNet(encoder.config)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):  # transformers' initial weights are too small: positions have no effect
            module.reset_parameters()
    training = EncoderTraining(model, views.head_sizes)
    first = views.rng.choice(len(views.targets), 64, p=views.weights)
    normed.calibrate(torch.stack([views.neighborhoods[i][0].float() for i in first]))
    scores = _train_heads("encoder", training, objects, views, steps, batch_size, peak_lr=2e-3)
    encoder.mini_pointnet = MiniPointNet(encoder.config)
    encoder.mini_pointnet.load_state_dict(normed.fold())
    return scores


def train_qformer(model: MiniGPT3DModel, objects: list[Object], views: Views, steps: int, batch_size: int) -> dict:
    """Train query tokens and Q-Former in place behind the frozen encoder, from new, larger weights.

    Trained together with the encoder they lag behind: 0.54 of the kinds right against its 0.64 (validation objects).
    """
    model.point_encoder.requires_grad_(False)
    for module in model.qformer.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    reset_projection(model)
    training = EncoderTraining(model, views.head_sizes)
    return _train_heads("Q-Former", training, objects, views, steps, batch_size, peak_lr=QFORMER_LR)


def _train_heads(
    title: str,
    training: EncoderTraining,
    objects: list[Object],
    views: Views,
    steps: int,
    batch_size: int,
    peak_lr: float,
) -> dict:
    average, optimizer = MovingAverage(training), adamw(training)
    progress = tqdm(range(steps), desc=title, unit="step", mininterval=5)
    for step in progress:
        neighborhood, center, targets = views.batch(batch_size)
        shares = color_shares(neighborhood[..., 3:])
        losses = [_loss(logits, targets, shares) for logits in training(neighborhood, center)]
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak_lr)
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        average.update()
        if step % 10 == 0:
            progress.set_postfix(encoder=f"{losses[0].item():.2f}", qformer=f"{losses[1].item():.2f}")
        if (step + 1) % max(1, steps // 6) == 0 or step + 1 == steps:
            scores = score_heads(average.average, objects, views)
            progress.write(f"step {step + 1}: {json.dumps(scores)}")
    training.load_state_dict(average.average.state_dict())
    return scores


def _loss(logits: dict[str, torch.Tensor], targets: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    loss = 0.0
    for column, target in enumerate(("kind", "noun", "category")):
        value = targets[:, column]
        if (value >= 0).any():
            loss = loss + WEIGHTS[target] * nn.functional.cross_entropy(logits[target], value, label_smoothing=0.1)
    color = logits["color"].log_softmax(-1)
    soft, hard = -(shares * color).sum(-1).mean(), nn.functional.nll_loss(color, shares.argmax(-1))
    return loss + WEIGHTS["color"] * (soft + hard)


@torch.no_grad()
def score_heads(training: EncoderTraining, objects: list[Object], views: Views) -> dict:
    """Kind and main-color accuracy of both heads on validation objects, and on training objects for comparison."""
    scores = {}
    for suffix, is_validation in (("", True), ("_train", False)):
        chosen = [i for i, o in enumerate(objects) if o.is_validation == is_validation and o.kind is not None]
        if not chosen:
            continue
        neighborhood = torch.stack([views.neighborhoods[i][0].float() for i in chosen])
        color = torch.stack([color_shares(torch.from_numpy(objects[i].cloud[None, None, :, 3:]))[0] for i in chosen])
        outputs = training(neighborhood, torch.stack([views.centers[i][0] for i in chosen]))
        for part, logits in zip(("encoder", "qformer"), outputs, strict=True):
            kind = logits["kind"][:, :-1].argmax(-1)  # "other" is never an answer
            hits = {"kind": kind == views.targets[chosen, 0], "color": logits["color"].argmax(-1) == color.argmax(-1)}
            scores |= {f"{part}_{name}{suffix}": round(hit.float().mean().item(), 3) for name, hit in hits.items()}
    return scores


# ---- Language -------------------------------------------------------------------------------------------------------


class TextSource:
    """Conversations about objects of the release, half of them in random colors.

    A list of keywords replaces the cloud, so that the language model learns to answer from what is between `<PC>` and
    `</PC>`. Stages I and II put vectors there.
    """

    def __init__(self, objects: list[Object], rng: np.random.Generator):
        self.rng = rng
        self.facts = [get_facts(o.name, o.category, o.cloud) for o in objects if not o.is_validation]
        self.named = [facts for facts in self.facts if facts.kind]

    def conversation(self) -> list[dict]:
        """Chat messages. Half of the single rounds have cleaned questions: both forms occur in training and use."""
        pool = self.named if self.rng.random() < 0.75 else self.facts
        facts = pool[self.rng.integers(len(pool))]
        if self.rng.random() < 0.5:
            number = 1 + int(self.rng.integers(3))
            colors = tuple(COLORS[i] for i in self.rng.permutation(len(COLORS))[:number])
            facts = Facts(facts.noun, facts.name, facts.kind, facts.category, colors, facts.extent)
        records = annotate("text", facts, 4, self.rng)
        record = records[self.rng.integers(len(records))]
        turns = [turn["value"].replace("<point>\n", "") for turn in record["conversations"]]
        clean = record["conversation_type"] != "multi_round" and self.rng.random() < 0.5
        messages = []
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            hint = "" if messages else f"<PC>{' '.join(keywords(facts, self.rng))}</PC> "
            messages.append({"role": "user", "content": hint + (clean_question(question) if clean else question)})
            messages.append({"role": "assistant", "content": answer})
        return messages


def train_tokenizer(texts: TextSource, num_texts: int = 6000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the captions; `<|endoftext|>` is bos, eos and padding, as in Phi-2."""
    end = "<|endoftext|>"
    frames = {"user": "[INST] {}  [/INST]", "assistant": "{}###"}
    messages = [message for _ in range(num_texts) for message in texts.conversation()]
    corpus = [frames[message["role"]].format(message["content"]) for message in messages]
    corpus += [*PLACES.values(), *filter(None, USES.values())]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus, vocab_size=VOCABULARY, special_tokens=[end], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=CONTEXT,
    )
    return prepare_tokenizer(tokenizer)


def train_language_model(
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    texts: TextSource,
    steps: int,
    batch_size: int,
) -> float:
    """Train the language model in place on text alone, with loss on the answers; returns the last mean loss."""
    language_model = nn.ModuleList([model.model.language_model, model.lm_head])
    optimizer, losses = adamw(language_model), []
    progress = tqdm(range(steps), desc="language model", unit="step", mininterval=5)
    for step in progress:
        conversations = [texts.conversation() for _ in range(batch_size)]
        batch = processor.encode_training(conversations, [])  # without clouds
        loss = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = cosine(step, steps, 2e-3, warmup=50)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(language_model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    return float(np.mean(losses[-20:])) if losses else math.nan


# ---- All parts ------------------------------------------------------------------------------------------------------


def pretrain(options: PretrainOptions) -> dict:
    """Train the parts and write the model's folder.

    Returns:
        Number of parameters, scores, and minutes of each training; also written as pretrain.json.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    objects = read_release(options.data)
    texts = TextSource(objects, np.random.default_rng(options.seed))
    model, processor = make_model(train_tokenizer(texts))
    record = {"parameters": sum(p.numel() for p in model.parameters())}
    started = time.perf_counter()
    record["language_loss"] = train_language_model(model, processor, texts, options.language_steps, batch_size=32)
    record["language_minutes"] = _minutes_since(started)
    started = time.perf_counter()
    views = make_views(model.config.point_config, objects, options.num_procedural, options.seed)
    train_encoder(model.model, objects, views, options.encoder_steps, options.batch_size)
    record["encoder_minutes"] = _minutes_since(started)
    started = time.perf_counter()
    torch.manual_seed(options.seed + 1)
    views.reseed(options.seed + 1)
    record |= train_qformer(model.model, objects, views, options.qformer_steps, options.batch_size)
    record["qformer_minutes"] = _minutes_since(started)
    reset_projection(model.model)
    for expert in model.model.query_experts[1:]:
        expert.load_state_dict(model.model.query_experts[0].state_dict())
    save_pretrained(model.eval(), processor, options.output_dir)
    write_json(options.output_dir / "pretrain.json", record)
    return record


def _minutes_since(started: float) -> float:
    return (time.perf_counter() - started) / 60


def make_model(tokenizer: PreTrainedTokenizerFast) -> tuple[MiniGPT3DForConditionalGeneration, MiniGPT3DProcessor]:
    """A model with random weights, and its processor."""
    feature_extractor = MiniGPT3DPointCloudProcessor(num_points=CLOUD_POINTS)
    processor = MiniGPT3DProcessor(feature_extractor, tokenizer, num_query_tokens=NUM_QUERY_TOKENS)
    config = make_config(len(tokenizer), processor.point_token_id, tokenizer.eos_token_id)
    return MiniGPT3DForConditionalGeneration(config), processor


def reset_projection(model: MiniGPT3DModel):
    """New random weights for the point projection, which stage I trains."""
    for layer in (model.point_projection.linear_1, model.point_projection.linear_2):
        layer.reset_parameters()


def main(argv: list[str] | None = None):
    def action(options: PretrainOptions):
        print(json.dumps(pretrain(options), indent=1))

    run_script(action, PretrainOptions, argv, __doc__, "minigpt3d.recipes.household.pretrain")


if __name__ == "__main__":
    main()
