"""Shared fixtures: the tiny model of the goldens, on one CPU thread, offline."""

import json
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import GOLDEN_DIR, make_tiny_config, make_tiny_model
from transformers import AutoTokenizer

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN_DIR


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
    from minigpt3d.processing_minigpt3d import prepare_tokenizer

    return prepare_tokenizer(AutoTokenizer.from_pretrained(GOLDEN_DIR / "tokenizer"))


@pytest.fixture
def tiny_processor(tiny_tokenizer):
    from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor

    feature_extractor = MiniGPT3DPointCloudProcessor(num_points=128)
    return MiniGPT3DProcessor(feature_extractor, tiny_tokenizer, num_query_tokens=6)


@pytest.fixture
def point_clouds() -> torch.Tensor:
    """(3, 128, 6): normalized clouds of the goldens."""
    return load_file(GOLDEN_DIR / "full.encode_pc.io.safetensors")["points"]
