"""The network of the recipe: the paper's, at the size that two cores train. At most 40 MB in half precision."""

from transformers import PreTrainedTokenizerFast

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor


CLOUD_POINTS = 1024
NUM_QUERY_TOKENS = 16
CONTEXT = 512
# 64 groups of 16 neighbors see every one of 1024 points about once.
POINT_CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "num_groups": 64,
    "group_size": 16,
    "group_embedding_size": 128,
    "absolute_coordinates": True,
}


def make_config(vocab_size: int, point_token_id: int, end_token_id: int) -> MiniGPT3DConfig:
    """About a two-hundredth of the paper's network."""
    return MiniGPT3DConfig(
        point_config=POINT_CONFIG,
        qformer_config={
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "encoder_hidden_size": 256,
            "cross_attention_frequency": 2,
            "vocab_size": 1,  # the Q-Former has no word embeddings
            "max_position_embeddings": 1,
        },
        text_config={
            "model_type": "minigpt3d_phi",
            "vocab_size": vocab_size,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "resid_pdrop": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "bos_token_id": end_token_id,
            "eos_token_id": end_token_id,
            "pad_token_id": end_token_id,
        },
        num_query_tokens=NUM_QUERY_TOKENS,
        num_query_experts=8,
        num_experts_per_cloud=2,
        router_type="none",
        router_hidden_size=64,
        point_projection_hidden_size=256,
        language_projection_hidden_size=256,
        point_token_id=point_token_id,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> MiniGPT3DProcessor:
    """The processor with a tokenizer that `prepare_tokenizer` prepared."""
    feature_extractor = MiniGPT3DPointCloudProcessor(num_points=CLOUD_POINTS)
    return MiniGPT3DProcessor(feature_extractor, tokenizer, num_query_tokens=NUM_QUERY_TOKENS)
