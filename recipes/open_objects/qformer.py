"""Train the Q-Former behind the frozen encoder, and put the base model together, from which stage I starts.

    python -m minigpt3d.recipes.open_objects.qformer --data DATA --encoder RUN --language RUN --output_dir BASE

Heads on the mean of the query tokens' outputs name kind, noun, colors and proportions, find the object's text, and each
word of the captions by itself: what the language model is to say later. The views that `build` wrote are encoded once, into
BASE.features, for this training and for all stages. Stage I trains the projection
between encoder and Q-Former further.

Shapes: V views of each of M training objects, G groups, D width, Q queries, W words.
"""

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minigpt3d.arguments import option, run_script
from minigpt3d.data.clouds import point_cloud_path
from minigpt3d.evaluation.vocabulary.colors import COLORS
from minigpt3d.files import write_json
from minigpt3d.hub import save_pretrained
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import prepare_tokenizer
from minigpt3d.recipes.household.pretrain import (
    MovingAverage,
    NormedMiniPointNet,
    adamw,
    cosine,
    fold_mini_pointnet,
    reset_projection,
)

from .augment import normalize
from .build import VIEWS_FILE, read_lines, to_described
from .captioned_objects import FURNITURE_SOURCE
from .encoder import TEXT_SIZE, Objects, to_groups
from .network import CLOUD_POINTS, make_config, make_processor
from .nothing import NOTHING
from .text import SHAPES


PEAK_LR = 1e-3
WORDS = 600  # most frequent words of the captions
BATCH = 64  # clouds encoded at once


@dataclass(frozen=True)
class QFormerOptions:
    """Options of the command."""

    data: Path = option("folder that `build` wrote", metavar="DIR")
    encoder: Path = option("folder of the encoder's run", metavar="DIR")
    language: Path = option("folder of the language model's run", metavar="DIR")
    output_dir: Path = option("folder for the base model", metavar="DIR")
    views: int = option("views of each object that are used", default=6)
    steps: int = option("steps", default=2000)
    batch_size: int = option("views of a step", default=48)
    seed: int = option("seed", default=0)
    threads: int = option("threads of torch; 1 where other programs use the cores", default=1)


# ---- The parts ------------------------------------------------------------------------------------------------------


def assemble(options: QFormerOptions):
    """A model with the trained encoder, all else random, and its processor."""
    tokenizer = prepare_tokenizer(PreTrainedTokenizerFast.from_pretrained(options.language / "tokenizer"))
    processor = make_processor(tokenizer)
    torch.manual_seed(options.seed)
    config = make_config(len(tokenizer), processor.point_token_id, tokenizer.eos_token_id)
    model = MiniGPT3DForConditionalGeneration(config)
    average = torch.load(options.encoder / "checkpoint.pt", weights_only=True)["average"]
    prefix = "point_encoder."
    encoder = {name.removeprefix(prefix): value for name, value in average.items() if name.startswith(prefix)}
    model.model.point_encoder.mini_pointnet = NormedMiniPointNet(config.point_config)
    model.model.point_encoder.load_state_dict(encoder)
    fold_mini_pointnet(model.model.point_encoder)
    model.model.point_encoder.requires_grad_(False)
    for module in model.model.qformer.modules():
        if isinstance(module, nn.Linear):  # transformers' initial weights are too small for so few steps
            module.reset_parameters()
    reset_projection(model.model)
    return model, processor


def load_language(model, run: Path):
    """Load the trained language model."""
    language = nn.ModuleList([model.model.language_model, model.lm_head])
    language.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["language"])


# ---- Encoded views --------------------------------------------------------------------------------------------------


class EncodedViews:
    """The views that `build` wrote, encoded once: the encoder is frozen in all that follows.

    Args:
        data: folder that `build` wrote.
        folder: of the features.
        views: of each object that are used, the first ones.
    """

    def __init__(self, data: Path, folder: Path, views: int):
        lines = [line for line in read_lines(data, VIEWS_FILE) if view_number(line["object_id"]) < views]
        self.ids = [line["object_id"] for line in lines]
        self.colors = torch.tensor([line["colors"] for line in lines])  # (M·V, 11) shares
        self.shapes = torch.tensor([SHAPES.index(line["shape"]) for line in lines])  # (M·V,)
        self.data, self.folder, self.views = data, folder, views

    @torch.no_grad()
    def encode(self, encoder: nn.Module):
        """Write the features, or those that a stopped run lacks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        progress_file = self.folder / "done.json"
        done = json.loads(progress_file.read_text()) if progress_file.exists() else 0
        shape = (len(self.ids), 1 + encoder.config.num_groups, encoder.config.hidden_size)
        features = np.lib.format.open_memmap(
            self.folder / "features.npy", mode="r+" if done else "w+", dtype=np.float16, shape=shape
        )
        for first in tqdm(range(done, len(self.ids), BATCH), desc="encoding", unit="batch", mininterval=10):
            ids = self.ids[first : first + BATCH]
            clouds = np.stack([np.load(point_cloud_path(self.data / "views", i)).astype(np.float32) for i in ids])
            groups = to_groups(clouds, encoder.config)
            features[first : first + len(ids)] = encoder.encode_groups(*groups).half().numpy()
            write_json(progress_file, first + len(ids))

    @property
    def features(self) -> np.ndarray:
        """(M·V, 1+G, D) float16, mapped into memory; view v of object m is in row m·V + v."""
        return np.load(self.folder / "features.npy", mmap_mode="r")


def view_number(object_id: str) -> int:
    """The number in the id of a view."""
    return int(object_id.rpartition("-v")[2])


def features_of(base: Path) -> Path:
    """Folder of the features beside a base model."""
    return base.with_name(base.name + ".features")


# ---- Training -------------------------------------------------------------------------------------------------------


class QFormerWithHeads(nn.Module):
    """Projection, queries and Q-Former, and a head on the mean of the queries' outputs."""

    def __init__(self, model, sizes: dict[str, int]):
        super().__init__()
        self.point_projection, self.qformer = model.point_projection, model.qformer
        self.queries, self.sizes = model.query_experts[0], sizes
        self.head = nn.Linear(model.config.qformer_config.hidden_size, sum(sizes.values()))
        self.text = nn.Linear(TEXT_SIZE, TEXT_SIZE, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 1+G, D) → outputs by target."""
        queries = self.qformer(
            query_embeds=self.queries.weight.expand(len(features), -1, -1),
            encoder_hidden_states=self.point_projection(features),
        ).last_hidden_state  # (B, Q, D)
        return dict(zip(self.sizes, self.head(queries.mean(1)).split(list(self.sizes.values()), dim=-1), strict=True))


def words_of(objects: Objects) -> tuple[list[str], torch.Tensor]:
    """The most frequent words of the captions, and which of them each training object's captions have, (M, W)."""
    documents = []
    for index in objects.train:
        line = objects.lines[index]
        documents.append(set(re.findall("[a-z]{4,}", f"{line['brief']} {line['detailed']}".lower())))
    counts = Counter(word for document in documents for word in document)
    words = [word for word, count in counts.most_common(WORDS + 40) if count < len(documents) / 4][:WORDS]
    return words, torch.tensor([[word in document for word in words] for document in documents]).float()


def train_qformer(model, objects: Objects, views: EncodedViews, options: QFormerOptions) -> dict:
    """Train projection, queries and Q-Former in place; returns the accuracies on validation objects."""
    words, has_word = words_of(objects)
    targets = {name: torch.from_numpy(getattr(objects, name)[objects.train]) for name in ("kind", "noun")}
    texts = objects.texts()
    sizes = {
        "kind": len(objects.kinds), "noun": len(objects.nouns), "color": len(COLORS), "shape": len(SHAPES),
        "text": TEXT_SIZE, "word": len(words),
    }  # fmt: skip
    network = QFormerWithHeads(model.model, sizes)
    average, optimizer, weights = MovingAverage(network, decay=0.998), adamw(network), objects.weights()
    features = views.features
    progress = tqdm(range(options.steps), desc="Q-Former", unit="step", mininterval=10)
    for step in progress:
        rng = np.random.default_rng([options.seed, step])
        rows = rng.choice(len(weights), options.batch_size, p=weights)
        numbers = rows * views.views + rng.integers(views.views, size=len(rows))
        outputs = network(torch.from_numpy(features[numbers]).float())
        loss = nn.functional.cross_entropy(outputs["kind"], targets["kind"][rows], label_smoothing=0.1)
        noun = targets["noun"][rows]
        if (noun >= 0).any():
            loss = loss + 0.5 * nn.functional.cross_entropy(outputs["noun"], noun, label_smoothing=0.1)
        loss = loss + 0.5 * nn.functional.cross_entropy(outputs["shape"], views.shapes[numbers])
        loss = loss - 0.5 * (views.colors[numbers] * outputs["color"].log_softmax(-1)).sum(-1).mean()
        known = nn.functional.normalize(network.text(texts), dim=-1)
        likeness = nn.functional.normalize(outputs["text"], dim=-1) @ known.T * network.log_scale.exp()
        loss = loss + 0.5 * nn.functional.cross_entropy(likeness, torch.from_numpy(rows), label_smoothing=0.1)
        loss = loss + 5 * nn.functional.binary_cross_entropy_with_logits(outputs["word"], has_word[rows])
        for parameters in optimizer.param_groups:
            parameters["lr"] = cosine(step, options.steps, PEAK_LR)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")
    network.load_state_dict(average.average.state_dict())
    return score(network.eval(), model.model.point_encoder, objects)


@torch.no_grad()
def score(network: QFormerWithHeads, encoder: nn.Module, objects: Objects) -> dict[str, float]:
    """Accuracies on the validation objects as they are: kind on packs and on furniture, proportions and main color."""
    chosen = np.flatnonzero([line["split"] == "validation" and line["source"] != NOTHING for line in objects.lines])
    outputs = []
    for part in np.array_split(chosen, -(-len(chosen) // BATCH)):
        clouds = np.stack([normalize(objects.cloud(index)[:CLOUD_POINTS]) for index in part])
        outputs.append(network(encoder.encode_groups(*to_groups(clouds, encoder.config))))
    outputs = {name: torch.cat([output[name] for output in outputs]) for name in network.sizes}
    outputs["kind"][:, -1] = -torch.inf
    furniture = np.array([objects.lines[index]["source"] == FURNITURE_SOURCE for index in chosen])
    kind = outputs["kind"].argmax(-1).numpy() == objects.kind[chosen]
    items = [to_described(objects.lines[index]) for index in chosen]
    shape = [SHAPES[i] == item.shape for i, item in zip(outputs["shape"].argmax(-1), items, strict=True)]
    color = [COLORS[i] == item.colors[0] for i, item in zip(outputs["color"].argmax(-1), items, strict=True)]
    scores = {"kind": kind[~furniture], "furniture_kind": kind[furniture], "shape": shape, "color": color}
    return {f"qformer_{name}": round(float(np.mean(hits)), 3) for name, hits in scores.items()}


def pretrain(options: QFormerOptions) -> dict:
    """Train the Q-Former and write the base model; returns its scores.

    Raises:
        ValueError: the data have fewer views.
    """
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    model, processor = assemble(options)
    objects = Objects(options.data)
    views = EncodedViews(options.data, features_of(options.output_dir), options.views)
    if len(views.ids) != options.views * len(objects.train):
        raise ValueError(
            f"`views` is {options.views}, but {options.data} has fewer of each object. Build more, or use less."
        )
    views.encode(model.model.point_encoder.eval())
    report = train_qformer(model, objects, views, options)
    load_language(model, options.language)  # as it is now: it may have been trained meanwhile
    for expert in model.model.query_experts[1:]:
        expert.load_state_dict(model.model.query_experts[0].state_dict())
    save_pretrained(model.eval(), processor, options.output_dir)
    report["parameters"] = model.num_parameters()
    report["minutes"] = round((time.perf_counter() - started) / 60, 1)
    write_json(options.output_dir / "pretrain.json", report)
    print(json.dumps(report))
    return report


def main(argv: list[str] | None = None):
    run_script(pretrain, QFormerOptions, argv, __doc__, "minigpt3d.recipes.open_objects.qformer")


if __name__ == "__main__":
    main()
