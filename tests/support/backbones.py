"""Small configurations of other language models."""

from transformers import GPT2Config, LlamaConfig, OPTConfig, Qwen3Config


SPECIAL = {"vocab_size": 300, "bos_token_id": 292, "eos_token_id": 292, "pad_token_id": 292}


SMALL_TEXT = SPECIAL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


BACKBONES = {
    "phi": {},
    "llama": {"text_config": LlamaConfig(**SMALL_TEXT)},
    "llama-tied": {"text_config": LlamaConfig(**SMALL_TEXT, tie_word_embeddings=True)},
    "qwen3": {"text_config": Qwen3Config(**SMALL_TEXT, head_dim=16)},
    "gpt2-tied": {"text_config": GPT2Config(**SPECIAL, n_embd=64, n_layer=2, n_head=4, n_positions=512)},
    "opt-tied": {
        "text_config": OPTConfig(
            **SPECIAL, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4
        )
    },
}
