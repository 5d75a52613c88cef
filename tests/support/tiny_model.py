"""The tiny model of the goldens: its configuration, the model with random weights, tokenizer and processor."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig, MiniGPT3DPhiConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor, prepare_tokenizer


GOLDEN_DIR = Path(__file__).parents[1] / "golden"


POINT_TOKEN_ID = 293  # the golden tokenizer has 293 entries, the golden model 300 rows


def tiny_phi_config(**changes) -> MiniGPT3DPhiConfig:
    fields = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 512,
        "bos_token_id": 292,
        "eos_token_id": 292,
        "pad_token_id": 292,
    }
    return MiniGPT3DPhiConfig(**fields | changes)


def make_tiny_config(**changes) -> MiniGPT3DConfig:
    """The sizes of the golden model."""
    fields = {
        "point_config": {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 192,
            "num_groups": 16,
            "group_size": 8,
            "group_embedding_size": 32,
        },
        "qformer_config": {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "encoder_hidden_size": 40,
        },
        "num_query_tokens": 6,
        "num_query_experts": 4,
        "router_hidden_size": 20,
        "point_projection_hidden_size": 36,
        "language_projection_hidden_size": 56,
        "point_token_id": POINT_TOKEN_ID,
    }
    return MiniGPT3DConfig(**{"text_config": tiny_phi_config()} | fields | changes)


def make_tiny_model(config: MiniGPT3DConfig | None = None) -> MiniGPT3DForConditionalGeneration:
    torch.manual_seed(1)  # one whose answers depend on the cloud
    model = MiniGPT3DForConditionalGeneration(config or make_tiny_config())
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():  # random weights everywhere, so that nothing is an identity by chance
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model.eval()


def make_tiny_tokenizer():
    return prepare_tokenizer(AutoTokenizer.from_pretrained(GOLDEN_DIR / "tokenizer"))


def make_tiny_processor() -> MiniGPT3DProcessor:
    return MiniGPT3DProcessor(MiniGPT3DPointCloudProcessor(num_points=128), make_tiny_tokenizer(), num_query_tokens=6)
