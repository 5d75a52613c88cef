"""Training on the tiny model: its stages, a small release, options and what a run leaves."""

import json
from dataclasses import replace

import numpy as np
import torch
from tiny_model import make_tiny_config, make_tiny_model, make_tiny_processor

from minigpt3d.data.sources import open_sources
from minigpt3d.hub import save_pretrained
from minigpt3d.training.run_options import RunOptions
from minigpt3d.training.stages import RECIPES, Lora, Stage
from minigpt3d.training.stream import StageStream, split_micro_batches
from minigpt3d.training.weights import named_parameters, prepare_model


STAGES = RECIPES["paper"]
ADAPTER = "adapter_model.safetensors"

# Conversation types of PointLLM by the names of the sources.
TYPES = {
    "brief": "simple_description",
    "detailed": "detailed_description",
    "single_round": "single_round",
    "multi_round": "multi_round",
}


def tiny(stage: Stage, **changes) -> Stage:
    """A row for the tiny model: small factors, few steps, three samples a step, a rate that shows."""
    changes = {"steps_per_epoch": 4, "epochs": 1, "warmup_steps": 1, "warmup_lr": 1e-3, "peak_lr": 1e-2} | changes
    return replace(
        stage,
        mixture=tuple(replace(source, batch=3) for source in stage.mixture),
        language_lora=Lora(rank=4, alpha=16, dropout=0.05),
        qformer_lora=Lora(rank=2, alpha=4, dropout=0.1),
        **changes,
    )


# ---- Data -----------------------------------------------------------------------------------------------------------


def record(object_id="a", kind="simple_description", rounds=(("What is it?", "A chair."),)) -> dict:
    """An annotation in PointLLM's layout."""
    conversations = []
    for question, answer in rounds:
        question = question if conversations else f"<point>\n{question}"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"object_id": object_id, "conversation_type": kind, "conversations": conversations}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_release(folder, num_objects=6):
    """Objects in PointLLM's layout: (folder of clouds, annotation files)."""
    rng, records = np.random.default_rng(0), []
    for i in range(num_objects):
        cloud = np.concatenate([rng.normal(size=(128, 3)), rng.random((128, 3))], 1).astype(np.float32)
        np.save(folder / f"o{i}_8192.npy", cloud)
        for source, kind in TYPES.items():
            rounds = [("What is it?", f"A red chair {i}." + i * " Yes."), ("Why?", "So.")]
            records.append(record(f"o{i}", kind, rounds if source == "multi_round" else rounds[:1]))
    return folder, [write(folder / "annotations.json", records)]


def open_stream(stage, release, processor, **kwargs) -> StageStream:
    data_dir, annotations = release
    sources = open_sources([source.name for source in stage.mixture], data_dir, annotations)
    return StageStream(stage, sources, processor, 0, **kwargs)


def first_batches(stage, release, processor, device_batch=None, **kwargs) -> list[list[dict]]:
    stream = open_stream(stage, release, processor, **kwargs)
    samples = [stream.encode(0, slot) for slot in stream.slots(0)]
    return split_micro_batches(samples, device_batch, share=len(samples))


# ---- Models ---------------------------------------------------------------------------------------------------------


def make_base(**changes):
    """The tiny model that stage I starts from: not routed."""
    return make_tiny_model(make_tiny_config(router_type="none", **changes))


def write_base(folder, **changes):
    save_pretrained(make_base(**changes), make_tiny_processor(), folder)
    return folder


def prepared(stage: Stage) -> torch.nn.Module:
    """The tiny model prepared for a stage, with LoRA factors that are not zero."""
    model = prepare_model(make_base(), stage)
    for name, parameter in named_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def logits(model, point_clouds) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([[5, *[293] * 6, 7, 8]]), "point_clouds": point_clouds[:1]}
    with torch.no_grad():
        return model.eval()(**inputs).logits


# ---- Runs -----------------------------------------------------------------------------------------------------------


def options(init, output_dir, release, **changes) -> RunOptions:
    data_dir, annotations = release
    return RunOptions(str(init), str(data_dir), output_dir, annotations, **{"num_workers": 0} | changes)


def history(folder) -> list[dict]:
    """The entries of a run's history, without its speed."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in lines]


def same_run(one, other) -> bool:
    """Whether two runs have the same adapter, bit for bit, and the same history."""
    return (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes() and history(one) == history(other)
