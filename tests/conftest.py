"""Shared fixtures: the tiny model of the goldens, on one CPU thread, offline."""

import json
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import GOLDEN_DIR, make_tiny_config, make_tiny_model, make_tiny_processor, make_tiny_tokenizer

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """`golden("full.loss.io")` → dict of tensors, `golden("full.loss.json")` → dict."""

    def load(name: str):
        if name.endswith(".json"):
            return json.loads((GOLDEN_DIR / name).read_text())
        return load_file(GOLDEN_DIR / f"{name}.safetensors")

    return load


@pytest.fixture
def tiny_config() -> MiniGPT3DConfig:
    return make_tiny_config()


@pytest.fixture
def tiny_model() -> MiniGPT3DForConditionalGeneration:
    return make_tiny_model()


@pytest.fixture
def tiny_tokenizer():
    return make_tiny_tokenizer()


@pytest.fixture
def tiny_processor():
    return make_tiny_processor()


@pytest.fixture
def point_clouds() -> torch.Tensor:
    """(3, 128, 6): normalized clouds of the goldens."""
    return load_file(GOLDEN_DIR / "full.encode_pc.io.safetensors")["points"]


# ---- Training: imported when it is used, since peft and Accelerate take seconds ---------------------------------------


@pytest.fixture(scope="session")
def release(tmp_path_factory) -> tuple[Path, list[Path]]:
    """Six objects in PointLLM's layout: (folder of clouds, annotation files)."""
    from training_runs import write_release

    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """Folder of the tiny model that stage I starts from; not to be changed."""
    from training_runs import write_base

    return write_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, base, release):
    """`trained(stage, **options)` → result of an uninterrupted run, which is made once; not to be changed."""
    from training_runs import options

    from minigpt3d.training.loop import train

    results = {}

    def run(stage, **changes) -> Path:
        key = repr((stage, changes))
        if key not in results:
            results[key] = train(stage, options(base, tmp_path_factory.mktemp("run") / "result", release, **changes))
        return results[key]

    return run


@pytest.fixture
def launched(monkeypatch):
    """`launched(name=value)` sets what `accelerate launch` passes to its processes."""
    from accelerate.state import AcceleratorState

    def set_settings(**settings):
        AcceleratorState._reset_state(True)
        for name, value in settings.items():
            monkeypatch.setenv(f"ACCELERATE_{name.upper()}", value)

    yield set_settings
    AcceleratorState._reset_state(True)
