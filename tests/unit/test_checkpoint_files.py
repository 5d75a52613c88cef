"""Weights from strangers: damaged, of another model, or outside of their folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_config, make_tiny_model

from minigpt3d.conversion.checkpoints import Checkpoint
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration, MiniGPT3DModel


@pytest.fixture
def folder(tmp_path):
    make_tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, part: str | None, **fields):
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def no_weights_in_memory(monkeypatch):
    """Fail where transformers would give memory to weights."""

    def fail(*args, **kwargs):
        raise AssertionError("memory was allocated")

    monkeypatch.setattr("transformers.modeling_utils.convert_and_load_state_dict_in_model", fail)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel._move_missing_keys_from_meta_to_device", fail)


@pytest.mark.parametrize("loaded", [MiniGPT3DForConditionalGeneration, MiniGPT3DModel])
@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("text_config", {"intermediate_size": 1 << 40}),
        ("text_config", {"vocab_size": 1 << 40}),
        ("text_config", {"num_hidden_layers": 900}),
        ("text_config", {"num_hidden_layers": 1 << 40}),
        ("point_config", {"num_hidden_layers": 1 << 40}),
        ("point_config", {"group_embedding_size": 31}),
        ("qformer_config", {"encoder_hidden_size": 1 << 40}),
        (None, {"num_query_experts": 1 << 40}),
        (None, {"num_query_tokens": 1 << 40}),
        (None, {"router_hidden_size": 21}),
        (None, {"language_projection_hidden_size": 1 << 40}),
    ],
)
def test_sizes_that_do_not_fit_the_weights_are_refused(folder, loaded, part, fields, no_weights_in_memory):
    change_config(folder, part, **fields)
    with pytest.raises(Exception, match=r"of shape|parameters|at most 1000"):
        loaded.from_pretrained(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_no_numbers_are_refused(folder, value, dtype):
    state = load_file(folder / "model.safetensors")
    state["model.router.linear_1.weight"][3, 2] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.router.linear_1.weight .*not finite"):
        MiniGPT3DForConditionalGeneration.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_names_files_of_its_folder(folder, tmp_path, absolute):
    outside = tmp_path / "model-of-someone.safetensors"
    (folder / "model.safetensors").rename(outside)
    shard = str(outside) if absolute else f"../{outside.name}"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(outside), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=outside.name):
        MiniGPT3DForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match=outside.name):
        Checkpoint(folder)


def test_a_config_of_one_folder_serves_weights_of_another(folder, tmp_path):
    make_tiny_config().save_pretrained(tmp_path / "config")
    config = type(make_tiny_config()).from_pretrained(tmp_path / "config")
    model = MiniGPT3DForConditionalGeneration.from_pretrained(folder, config=config)
    assert torch.equal(model.lm_head.weight, make_tiny_model().lm_head.weight)
