"""Preparing a model for a stage: LoRA, dropout, adapters of other recipes, other language models."""

from dataclasses import replace

import pytest
import torch
from tiny_model import make_tiny_config, make_tiny_model
from training_runs import STAGES, make_base, prepared, tiny
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from minigpt3d.conversion.lora import lora_targets
from minigpt3d.hub import ModelFiles, load_weights
from minigpt3d.training.stages import Lora
from minigpt3d.training.weights import (
    adapter_names,
    gather_parameters,
    lora_scales,
    named_parameters,
    prepare_model,
    save_adapter,
)


@pytest.mark.parametrize(("config", "per_layer"), [(LlamaConfig, 2), (Qwen3Config, 4)])
def test_other_language_models_train_too(config, per_layer):
    """LoRA finds the attention and the norms of other families."""
    text_config = config(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    model = prepare_model(make_base(text_config=text_config), tiny(STAGES["II"]))
    trainable = [name for name, p in named_parameters(model).items() if p.requires_grad and "language_model" in name]
    assert sum("lora_A" in name for name in trainable) == 2 * 4
    assert sum("lora" not in name for name in trainable) == 2 * per_layer + 1


def test_unknown_language_model_is_named():
    with pytest.raises(ValueError, match=r"'gpt2'.*LANGUAGE_LORA_TARGETS"):
        lora_targets(GPT2Config().model_type)


def test_dropout_acts_where_the_authors_have_it(point_clouds):
    """LoRA's in training; the Q-Former's own never, whatever its configuration says; none in evaluation."""
    config = make_tiny_config(router_type="none")
    config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = 0.5

    def repeats(model):
        features = model.base_model.model if hasattr(model, "merge_and_unload") else model
        return torch.equal(
            features.get_point_features(point_clouds).pooler_output,
            features.get_point_features(point_clouds).pooler_output,
        )

    assert repeats(prepare_model(make_tiny_model(config), tiny(STAGES["I"])))
    model = prepare_model(make_tiny_model(config), tiny(STAGES["II"]))
    for name, parameter in named_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    assert not repeats(model)
    assert repeats(model.eval())


def test_early_stages_refuse_a_routed_model(tiny_model):
    with pytest.raises(ValueError, match="sparse.*training.finetune"):
        prepare_model(tiny_model, tiny(STAGES["II"]))


def test_an_adapter_of_another_recipe_is_refused(base, tmp_path):
    second = tiny(STAGES["II"])
    model = prepared(second)
    tensors = gather_parameters(model, adapter_names(model, ModelFiles(str(base))))
    save_adapter(tmp_path / "II", tensors, lora_scales(model), base, {"stage": "II"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*expected"):
        prepare_model(load_weights(base, dtype=torch.float32), STAGES["III"], tmp_path / "II")
    other = replace(second, language_lora=Lora(rank=4, alpha=8, dropout=0.05))
    with pytest.raises(ValueError, match="scaled by 4, expected 2"):
        prepare_model(load_weights(base, dtype=torch.float32), other, tmp_path / "II")


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_a_damaged_adapter_is_named(content, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        prepare_model(make_base(), STAGES["II"], tmp_path)
