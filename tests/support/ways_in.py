"""A tiny model whose answers depend on the cloud, its processor, and clouds."""

import numpy as np
import torch
from tiny_model import GOLDEN_DIR, make_tiny_model
from transformers import AutoTokenizer

from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor, prepare_tokenizer


def make_seeing_model() -> MiniGPT3DForConditionalGeneration:
    """The tiny random model with larger weights before its language model, so that its answer depends on the cloud."""
    model = make_tiny_model()
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("language_model"):
                parameter.mul_(8)
    return model


def make_processor() -> MiniGPT3DProcessor:
    """For the tiny model: 128 points, 6 query tokens, the golden tokenizer."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(GOLDEN_DIR / "tokenizer"))
    return MiniGPT3DProcessor(MiniGPT3DPointCloudProcessor(num_points=128), tokenizer, num_query_tokens=6)


def make_cloud(seed: int, num_points: int = 200) -> np.ndarray:
    """(N, 6): a box, whose proportions and color depend on the seed."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(-1, 1, (num_points, 3)) * rng.uniform(0.2, 1, 3)
    return np.concatenate([xyz, np.tile(rng.uniform(0, 1, 3), (num_points, 1))], axis=1).astype(np.float32)
