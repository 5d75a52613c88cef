"""Training on the tiny model: its stages, a small release, options and what a run leaves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_model import make_tiny_config, make_tiny_model

from minigpt3d.conversion import save_pretrained
from minigpt3d.data.sources import open_sources
from minigpt3d.training.loop import RunOptions
from minigpt3d.training.stages import RECIPES, Lora, Stage
from minigpt3d.training.stream import StageStream, split_micro_batches
from minigpt3d.training.weights import named_parameters, prepare_model


STAGES = RECIPES["paper"]


KINDS = {
    "brief": "simple_description",
    "detailed": "detailed_description",
    "single_round": "single_round",
    "multi_round": "multi_round",
}


def tiny(stage: Stage, **changes) -> Stage:
    """A row for the tiny model: small factors, few steps, two samples a step, a rate that shows."""
    changes = {"steps_per_epoch": 4, "epochs": 1, "warmup_steps": 1, "warmup_lr": 1e-3, "peak_lr": 1e-2} | changes
    return replace(
        stage,
        mixture=tuple(replace(source, batch=3) for source in stage.mixture),
        language_lora=Lora(rank=4, alpha=16, dropout=0.05),
        qformer_lora=Lora(rank=2, alpha=4, dropout=0.1),
        **changes,
    )


def record(object_id="a", kind="simple_description", rounds=(("What is it?", "A chair."),)) -> dict:
    conversations = []
    for question, answer in rounds:
        question = question if conversations else f"<point>\n{question}"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"object_id": object_id, "conversation_type": kind, "conversations": conversations}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def open_stream(stage, release, processor, **kwargs) -> StageStream:
    data_dir, annotations = release
    sources = open_sources([source.name for source in stage.mixture], data_dir, annotations)
    return StageStream(stage, sources, processor, 0, **kwargs)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Six objects in PointLLM's layout: (folder of clouds, annotation files)."""
    folder = tmp_path_factory.mktemp("release")
    rng = np.random.default_rng(0)
    records = []
    for i in range(6):
        cloud = np.concatenate([rng.normal(size=(128, 3)), rng.random((128, 3))], 1).astype(np.float32)
        np.save(folder / f"o{i}_8192.npy", cloud)
        for kind in KINDS.values():
            rounds = [("What is it?", f"A red chair {i}." + i * " Yes."), ("Why?", "So.")][
                : 1 + (kind == "multi_round")
            ]
            records.append(record(f"o{i}", kind, rounds))
    return folder, [write(folder / "annotations.json", records)]


def prepared(stage: Stage) -> torch.nn.Module:
    """The tiny model made ready for a stage, with LoRA factors that are not zero."""
    model = prepare_model(make_tiny_model(make_tiny_config(router_type="none")), stage)
    for name, parameter in named_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def first_batches(stage, release, processor, device_batch=None, **kwargs) -> list[list[dict]]:
    stream = open_stream(stage, release, processor, **kwargs)
    return split_micro_batches([stream.encode(0, slot) for slot in stream.slots(0)], device_batch)


@pytest.fixture
def base(tmp_path, tiny_processor):
    save_pretrained(make_tiny_model(make_tiny_config(router_type="none")), tiny_processor, tmp_path / "base")
    return tmp_path / "base"


def options(init, output_dir, release, **changes) -> RunOptions:
    data_dir, annotations = release
    return RunOptions(str(init), str(data_dir), output_dir, annotations, **{"num_workers": 0} | changes)


ADAPTER = "adapter_model.safetensors"


def history(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in lines]


def logits(model, point_clouds) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([[5, *[293] * 6, 7, 8]]), "point_clouds": point_clouds[:1]}
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture
def launched(monkeypatch):
    """Settings as `accelerate launch` passes them."""

    def set_settings(**settings):
        AcceleratorState._reset_state(True)
        for name, value in settings.items():
            monkeypatch.setenv(f"ACCELERATE_{name.upper()}", value)

    yield set_settings
    AcceleratorState._reset_state(True)
