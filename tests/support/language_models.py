"""Small language models in folders, as their makers publish them: weights, tokenizer, and a chat template if they have one."""

import torch
from tokenizers_of_others import llama_style, qwen_style
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


# In the style of Qwen and SmolLM2; the last turn of Qwen3 begins with empty reasoning.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ system }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ reasoning }}{% endif %}"
    "{{ message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_qwen3():
    """Padded vocabulary: `<point>` finds a row."""
    tokenizer = qwen_style()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    reasoning = "{% set system = '' %}{% set reasoning = '<think>\n\n</think>\n\n' %}"
    tokenizer.chat_template = reasoning + CHATML
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, vocab_size=448)), tokenizer


def make_llama():
    """No chat template, no pad token, no row for `<point>`."""
    tokenizer = llama_style()
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer))), tokenizer


def make_smollm2():
    """A system message by default, tied embeddings, no row for `<point>`."""
    tokenizer = qwen_style()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    system = "{% set system = '<|im_start|>system\nYou help.<|im_end|>\n' %}{% set reasoning = '' %}"
    tokenizer.chat_template = system + CHATML
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), tie_word_embeddings=True)), tokenizer


LANGUAGE_MODELS = {"qwen3": make_qwen3, "llama": make_llama, "smollm2": make_smollm2}


def write_language_model(name: str, folder):
    torch.manual_seed(0)
    model, tokenizer = LANGUAGE_MODELS[name]()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
