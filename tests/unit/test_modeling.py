"""Properties of the network that the goldens do not cover."""

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from backbones import BACKBONES, SMALL_TEXT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import POINT_TOKEN_ID, make_tiny_config, make_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, LlamaConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt3d import modeling_minigpt3d, point_bert_minigpt3d
from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig, MiniGPT3DPointConfig
from minigpt3d.conversion.names import our_name
from minigpt3d.conversion.state_dict import convert_state_dict
from minigpt3d.grouping_minigpt3d import (
    _nearest_neighbors_in_parts,
    farthest_point_sampling,
    group,
    nearest_neighbors,
)
from minigpt3d.hub import load_weights
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration, MiniGPT3DModel, eager_attention
from minigpt3d.point_bert_minigpt3d import PointBert
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor


DEMO_OBJECTS = [
    Path(__file__).parents[2] / "demo" / "objects" / name for name in ("drawersCabinet.npy", "oakTable.ply")
]


@pytest.fixture(params=BACKBONES)
def backbone_model(request):
    return make_tiny_model(make_tiny_config(**BACKBONES[request.param]))


def make_inputs(point_clouds, lengths=(5, 9, 3), padding_side="left"):
    """One cloud a row, its placeholders, then random text; padded to one length."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.cat([torch.full((6,), POINT_TOKEN_ID), torch.randint(0, 280, (length,), generator=generator)])
        for length in lengths
    ]
    width = max(map(len, rows))
    input_ids, attention_mask = torch.full((len(rows), width), 292), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
        input_ids[index, span], attention_mask[index, span] = row, 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "point_clouds": point_clouds[: len(rows)]}


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 292}


def test_cache_equals_no_cache(backbone_model, point_clouds):
    inputs = make_inputs(point_clouds)
    with_cache = backbone_model.generate(**inputs, **GREEDY, use_cache=True)
    assert with_cache.shape[1] == inputs["input_ids"].shape[1] + 8
    assert torch.equal(with_cache, backbone_model.generate(**inputs, **GREEDY, use_cache=False))
    assert torch.equal(with_cache, backbone_model.generate(**inputs, **GREEDY, cache_implementation="static"))


def test_left_padded_batch_equals_its_rows(backbone_model, point_clouds):
    inputs = make_inputs(point_clouds)
    batch = backbone_model.generate(**inputs, **GREEDY)[:, -8:]
    for row in range(3):
        seen = inputs["attention_mask"][row].bool()
        alone = backbone_model.generate(
            input_ids=inputs["input_ids"][row][seen][None], point_clouds=point_clouds[row : row + 1], **GREEDY
        )
        assert torch.equal(alone[0, -8:], batch[row])


@pytest.mark.parametrize("bias_of_placeholder", [0, 2])
def test_candidates_change_nothing(tiny_model, point_clouds, bias_of_placeholder):
    """Also if a model writes placeholders, which show no cloud."""
    tiny_model.lm_head.bias.data[POINT_TOKEN_ID] += bias_of_placeholder
    inputs = make_inputs(point_clouds, lengths=(9,))
    plain = tiny_model.generate(**inputs, **GREEDY)
    assert torch.equal(tiny_model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), plain)
    assert torch.equal(tiny_model.generate(**inputs, **GREEDY, assistant_model=make_tiny_model()), plain)


def test_a_cache_of_earlier_turns(tiny_model, point_clouds):
    """Rows with one and two clouds, then one and no further cloud: the caller passes all, or only the new ones."""
    placeholders, words = torch.full((6,), POINT_TOKEN_ID), torch.arange(10, 16)
    first = torch.stack([torch.cat([placeholders, words, words]), torch.cat([placeholders, placeholders, words])])
    second = torch.stack([torch.cat([words, placeholders]), torch.cat([words, words])])
    clouds = point_clouds[[0, 1, 2, 0]]  # row 0: the first and, in its second turn, the second
    turn = tiny_model.generate(input_ids=first, point_clouds=clouds[[0, 2, 3]], **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([turn.sequences, second], dim=1)
    ids[:, first.shape[1] : turn.sequences.shape[1]].clamp_(max=280)
    expected = tiny_model.generate(input_ids=ids, point_clouds=clouds, **GREEDY)
    for given in (clouds, clouds[1:2]):
        cache = tiny_model(input_ids=ids[:, :-13], point_clouds=clouds[[0, 2, 3]]).past_key_values
        assert torch.equal(
            tiny_model.generate(input_ids=ids, point_clouds=given, past_key_values=cache, **GREEDY), expected
        )
    more = torch.cat([expected, second[1:].expand(2, -1)], dim=1)
    more[:, ids.shape[1] :].clamp_(max=280)
    expected = tiny_model.generate(input_ids=more, point_clouds=clouds, **GREEDY)
    for given in (clouds, None):
        cache = tiny_model(input_ids=more[:, :-13], point_clouds=clouds).past_key_values
        assert torch.equal(
            tiny_model.generate(input_ids=more, point_clouds=given, past_key_values=cache, **GREEDY), expected
        )
    with pytest.raises(ValueError, match="2 point clouds"):
        tiny_model.generate(input_ids=ids, point_clouds=clouds[:2], **GREEDY)


def test_trainer_joins_batches_with_and_without_clouds(tiny_model, point_clouds, tmp_path):
    with_cloud = {name: value[0] for name, value in make_inputs(point_clouds, lengths=(9,)).items()}
    rows = [with_cloud, {"input_ids": torch.arange(15), "attention_mask": torch.ones(15, dtype=torch.long)}]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    seen = []
    trainer = Trainer(
        tiny_model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True),
        eval_dataset=rows,
        compute_metrics=lambda prediction: seen.append(prediction.predictions.shape) or {},
    )
    trainer.evaluate()
    assert seen == [(2, 15, 300)]


@pytest.mark.parametrize("with_embeds", [False, True])
def test_beams_keep_the_clouds_of_their_row(tiny_model, point_clouds, with_embeds):
    """Rows with two, no and one cloud, each copied for several answers."""
    placeholders = torch.full((6,), POINT_TOKEN_ID)
    words = torch.arange(10, 16)
    rows = [torch.cat([placeholders, placeholders, words]), torch.cat([words, words, words])]
    rows.append(torch.cat([words, words, placeholders]))
    input_ids = torch.stack(rows)
    inputs = {"input_ids": input_ids, "point_clouds": point_clouds}
    if with_embeds:
        inputs["inputs_embeds"] = tiny_model.get_input_embeddings()(inputs.pop("input_ids"))
    expected = tiny_model.generate(input_ids=input_ids, point_clouds=point_clouds, **GREEDY)[:, -8:]
    repeated = tiny_model.generate(**inputs, **GREEDY | {"do_sample": True, "top_k": 1, "num_return_sequences": 2})[
        :, -8:
    ]
    assert torch.equal(repeated, expected.repeat_interleave(2, 0))


@pytest.mark.parametrize("router_type", ["none", "sparse", "soft", "constant"])
def test_batch_of_clouds_equals_one_by_one(point_clouds, router_type):
    model = make_tiny_model(make_tiny_config(router_type=router_type))
    together = model.get_point_features(point_clouds).pooler_output
    for row in range(3):
        alone = model.get_point_features(point_clouds[row : row + 1]).pooler_output[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router_type", ["sparse", "soft", "constant"])
def test_experts_together_equal_experts_one_by_one(point_clouds, router_type):
    """One masked Q-Former call over all chosen experts, against one call per cloud and expert."""
    model = make_tiny_model(make_tiny_config(router_type=router_type)).model
    features = model.point_encoder(point_clouds).last_hidden_state
    experts, weights = model.router(features)
    context = model.point_projection(features)
    for row in range(3):
        mixed = sum(
            weight
            * model.qformer(
                query_embeds=model.query_experts[expert].weight[None], encoder_hidden_states=context[row : row + 1]
            ).last_hidden_state[0]
            for expert, weight in zip(experts[row].tolist(), weights[row], strict=True)
        )
        torch.testing.assert_close(
            model.get_query_output(features).last_hidden_state[row], mixed, rtol=1e-5, atol=1e-5
        )


def test_save_and_load_is_identity(backbone_model, point_clouds, tmp_path):
    backbone_model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith(("model.", "lm_head.")) for name in on_disk)
    again, loading_info = MiniGPT3DForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading_info["missing_keys"] and not loading_info["unexpected_keys"]
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in backbone_model.state_dict().items())
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == on_disk.keys()
    inputs = make_inputs(point_clouds)
    expected = backbone_model(**inputs)
    assert torch.equal(expected.logits, again(**inputs).logits)
    base, loading_info = MiniGPT3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading_info["missing_keys"] and loading_info["unexpected_keys"] <= {"lm_head.weight", "lm_head.bias"}
    assert torch.equal(base.get_point_features(point_clouds).pooler_output, expected.point_features)
    base.save_pretrained(tmp_path / "base")
    base = MiniGPT3DModel.from_pretrained(tmp_path / "base")
    hidden = base(**inputs).last_hidden_state
    assert torch.equal(backbone_model.get_output_embeddings()(hidden), expected.logits)


@pytest.mark.parametrize("router_type", ["sparse", "soft", "none"])
def test_point_features_show_what_the_model_has_seen(router_type, point_clouds):
    model = make_tiny_model(make_tiny_config(router_type=router_type)).requires_grad_(False)
    config = model.config
    plain = model.get_point_features(point_clouds)
    assert isinstance(plain, BaseModelOutputWithPooling)
    assert plain.hidden_states is None and plain.attentions is None and plain.cross_attentions is None
    output = model.get_point_features(point_clouds, output_attentions=True, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(output[name], plain[name])
    assert config.qformer_config._attn_implementation == "sdpa", "eager attention is left again"
    batch, encoder, tokens = len(point_clouds), config.point_config, 1 + config.point_config.num_groups
    assert output.last_hidden_state.shape == (batch, tokens, encoder.hidden_size)
    assert output.pooler_output.shape == (batch, config.num_query_tokens, config.text_config.hidden_size)
    _, center = group(point_clouds, encoder.num_groups, encoder.group_size)
    assert torch.equal(output.center, center)
    experts, weights = model.model.router(output.last_hidden_state)
    assert torch.equal(output.experts, experts)
    torch.testing.assert_close(output.router_weights.gather(1, experts), weights)
    assert ((output.router_weights > 0).sum(1) == experts.shape[1]).all()
    assert len(output.hidden_states) == 1 + encoder.num_hidden_layers
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    queries, heads = experts.shape[1] * config.num_query_tokens, config.qformer_config.num_attention_heads
    layers = range(0, config.qformer_config.num_hidden_layers, config.qformer_config.cross_attention_frequency)
    assert [tuple(x.shape) for x in output.cross_attentions] == [(batch, heads, queries, tokens)] * len(layers)
    assert [tuple(x.shape) for x in output.attentions] == [
        (batch, encoder.num_attention_heads, tokens, tokens)
    ] * encoder.num_hidden_layers
    for weights in (*output.attentions, *output.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    as_tuple = model.get_point_features(point_clouds, return_dict=False)
    assert torch.equal(as_tuple[0], plain.last_hidden_state) and torch.equal(as_tuple[1], plain.pooler_output)


def test_the_centers_are_those_of_their_tokens(tiny_model, point_clouds):
    """Moved points change the token, as the first block reads it, of their center, and no other."""
    encoder = tiny_model.model.point_encoder.requires_grad_(False)
    neighborhood, center = group(point_clouds, encoder.config.num_groups, encoder.config.group_size)
    seen = []
    hook = encoder.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(sum(inputs)))
    encoder(point_clouds)
    for place in (0, 5):
        moved, shifted = neighborhood.clone(), center.clone()
        moved[:, place] += 0.1
        shifted[:, place] += 0.1
        for inputs in ((moved, center), (neighborhood, shifted)):
            encoder.encode_groups(*inputs)
            changed = (seen[-1] != seen[0]).any(-1)  # (B, 1+G)
            assert changed[:, 1 + place].all() and changed.sum() == len(point_clouds)
    hook.remove()


def test_threads_leave_the_implementation_of_attention():
    """The first to begin ends first, so that without a lock the second would restore what the first has set."""
    config = make_tiny_config().point_config
    config._attn_implementation = "sdpa"
    entered, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def compute(index: int):
        with eager_attention(config):
            entered[index].set()
            leave[index].wait(60)

    threads = [threading.Thread(target=compute, args=(index,)) for index in range(2)]
    threads[0].start()
    assert entered[0].wait(60)
    threads[1].start()
    entered[1].wait(0.2)
    for thread, event in zip(threads, leave, strict=True):
        event.set()
        thread.join(60)
    assert entered[1].is_set() and config._attn_implementation == "sdpa"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_parameter_gets_a_gradient(backbone_model, point_clouds, checkpointing):
    """With the soft router, which uses every expert."""
    backbone_model.config.router_type = "soft"
    if checkpointing:
        backbone_model.gradient_checkpointing_enable()
    backbone_model.train()
    inputs = make_inputs(point_clouds, padding_side="right")
    backbone_model(
        **inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ).loss.backward()
    without = [name for name, p in backbone_model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not without


def test_gradient_checkpointing_changes_nothing(tiny_model, point_clouds):
    inputs = make_inputs(point_clouds, padding_side="right")
    gradients = []
    for enable in (False, True):
        tiny_model.zero_grad()
        if enable:
            tiny_model.gradient_checkpointing_enable()
            assert tiny_model.model.point_encoder.blocks[0].gradient_checkpointing
        tiny_model.train()
        for module in tiny_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        tiny_model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


def test_two_passes_are_bit_equal(tiny_model, point_clouds):
    inputs = make_inputs(point_clouds)
    assert torch.equal(tiny_model(**inputs).logits, tiny_model(**inputs).logits)
    assert torch.equal(tiny_model.generate(**inputs, **GREEDY), tiny_model.generate(**inputs, **GREEDY))


def test_the_encoder_computes_the_same_in_training(tiny_model, point_clouds):
    """BatchNorms are folded, and nothing in it is dropped out."""
    expected = tiny_model.model.point_encoder(point_clouds).last_hidden_state
    tiny_model.train()
    assert torch.equal(tiny_model.model.point_encoder(point_clouds).last_hidden_state, expected)


@pytest.fixture
def older_checkpoint(golden, tmp_path):
    """The golden model as a folder of a version that kept the BatchNorms."""
    converted = convert_state_dict(golden("full.state"), make_tiny_config())
    model = make_tiny_model()
    model.load_state_dict(converted)
    model.save_pretrained(tmp_path / "older")
    folded = {name for name in converted if "mini_pointnet" in name}
    unfolded = {our_name(key): tensor for key, tensor in golden("full.state").items() if ".encoder." in key}
    unfolded = {name: tensor for name, tensor in unfolded.items() if name and "mini_pointnet" in name}
    unfolded = {name: tensor.squeeze(-1) if tensor.ndim == 3 else tensor for name, tensor in unfolded.items()}
    assert len(unfolded) == 18 and any("running_var" in name for name in unfolded)
    state = {name: tensor for name, tensor in converted.items() if name not in folded} | unfolded
    save_file(state, tmp_path / "older" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "older", converted


@pytest.mark.parametrize("placement", [{}, {"device_map": "cpu"}, {"device_map": {"": "disk"}}])
def test_checkpoints_with_batch_norms_load(older_checkpoint, point_clouds, placement, tmp_path):
    folder, converted = older_checkpoint
    if "disk" in str(placement):
        pytest.importorskip("accelerate", minversion="1.15")  # 1.3 refuses to put a whole model on disk
        placement = placement | {"offload_folder": tmp_path / "offload"}
    model, report = MiniGPT3DForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **placement)
    assert not any(report.values())
    expected = make_tiny_model()
    expected.load_state_dict(converted)
    assert torch.equal(
        model.get_point_features(point_clouds).pooler_output, expected.get_point_features(point_clouds).pooler_output
    )


def test_checkpoints_with_batch_norms_are_saved_without(older_checkpoint, tmp_path):
    folder, converted = older_checkpoint
    for number, loaded in enumerate((MiniGPT3DForConditionalGeneration, MiniGPT3DModel)):
        loaded.from_pretrained(folder).save_pretrained(tmp_path / str(number))
        saved = load_file(tmp_path / str(number) / "model.safetensors")
        saved = {"model." * number + name: tensor for name, tensor in saved.items()}
        assert saved.keys() == {name for name in converted if not (number and name.startswith("lm_head."))}
        assert all(torch.equal(tensor, converted[name]) for name, tensor in saved.items())


def test_an_incomplete_checkpoint_with_batch_norms_is_refused(older_checkpoint):
    folder, _ = older_checkpoint
    state = load_file(folder / "model.safetensors")
    del state["model.point_encoder.mini_pointnet.norm_2.running_var"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot load"):
        load_weights(folder)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(point_clouds, attention):
    inputs = make_inputs(point_clouds)
    expected = make_tiny_model()(**inputs).logits
    model = make_tiny_model()
    model.set_attn_implementation(attention)
    assert model.model.point_encoder.blocks[0].attention.config._attn_implementation == attention
    assert model.model.qformer.config._attn_implementation == attention
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, point_clouds, dtype):
    make_tiny_model().save_pretrained(tmp_path)
    model = MiniGPT3DForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    features = model.get_point_features(point_clouds).pooler_output
    assert features.dtype == dtype
    expected = make_tiny_model().get_point_features(point_clouds).pooler_output
    assert (features - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert model.generate(**make_inputs(point_clouds), **GREEDY).shape == (3, 23)


def test_the_qformer_keeps_an_attention_that_takes_its_mask(tiny_model, monkeypatch):
    """Only encoder and language model use flash attention and the like."""
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda self, name: _set_everywhere(self, name))
    tiny_model.set_attn_implementation("flash_attention_2")
    assert tiny_model.config.qformer_config._attn_implementation == "sdpa"
    assert tiny_model.config.point_config._attn_implementation == "flash_attention_2"
    with pytest.raises(ValueError, match="flex"):
        MiniGPT3DForConditionalGeneration._from_config(make_tiny_config(), attn_implementation="flex_attention")


def _set_everywhere(model, name):
    for config in (model.config.point_config, model.config.qformer_config, model.config.text_config):
        config._attn_implementation = name


def test_a_merged_router_stays_a_router(point_clouds):
    """PEFT puts stage IV's router on a base that has none."""
    base = make_tiny_model(make_tiny_config(router_type="none"))
    modules = ["router.linear_1", "router.linear_2", "query_experts.0", "query_experts.1"]
    adapted = get_peft_model(base, LoraConfig(target_modules=["query_key_value"], modules_to_save=modules))
    with torch.no_grad():
        expected = adapted.base_model.model.get_point_features(point_clouds).pooler_output
        merged = adapted.merge_and_unload()
        assert torch.equal(merged.get_point_features(point_clouds).pooler_output, expected)
    assert merged.config.router_type == "sparse"


def test_offloaded_query_experts(tmp_path, point_clouds):
    make_tiny_model().save_pretrained(tmp_path)
    device_map = {"model.point_encoder": "cpu", "model.point_projection": "cpu", "model.router": "cpu"}
    device_map |= {"model.query_experts": "disk", "model.qformer": "disk", "model.language_projection": "cpu"}
    device_map |= {"model.language_model": "cpu", "lm_head": "cpu"}
    model = MiniGPT3DForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    expected = make_tiny_model().get_point_features(point_clouds).pooler_output
    torch.testing.assert_close(model.get_point_features(point_clouds).pooler_output, expected)


def test_backbones_that_change_their_logits_are_refused():
    with pytest.raises(ValueError, match="final_logit_softcapping is 30.0: gemma2"):
        make_tiny_model(make_tiny_config(text_config=Gemma2Config(**SMALL_TEXT, head_dim=16)))


def test_device_map(tmp_path, point_clouds):
    """`device_map` needs the names of blocks that are not split."""
    make_tiny_model().save_pretrained(tmp_path)
    model = MiniGPT3DForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(
        model.get_point_features(point_clouds).pooler_output,
        make_tiny_model().get_point_features(point_clouds).pooler_output,
    )
    names = {type(module).__name__ for module in model.modules()}
    assert set(MiniGPT3DForConditionalGeneration._no_split_modules) <= names


def test_a_new_model_from_a_config_computes(point_clouds):
    """Nothing is left uninitialized."""
    torch.manual_seed(0)
    model = MiniGPT3DForConditionalGeneration(make_tiny_config()).eval()
    assert model(**make_inputs(point_clouds)).logits.isfinite().all()
    assert model.model.query_experts[0].weight.std() > 0


def test_generation_stops_at_the_end_sign(tiny_processor, point_clouds):
    """`###` ends each row's answer; the rest of the row is padding."""
    model = make_tiny_model()
    end = tiny_processor.tokenizer("###", add_special_tokens=False)["input_ids"]
    head = model.get_output_embeddings()
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[end[0]] = 1.0  # the model writes `#`, or whatever begins `###`, forever
    inputs = make_inputs(point_clouds)
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 292, "eos_token_id": 292}
    unstopped = model.generate(**inputs, **arguments)
    model.generation_config.stop_strings = ["###"]
    stopped = model.generate(**inputs, **arguments, tokenizer=tiny_processor.tokenizer)
    new = stopped[:, inputs["input_ids"].shape[1] :]
    assert unstopped.shape[1] - inputs["input_ids"].shape[1] == 20
    texts = tiny_processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert all(text.endswith("###") and text.count("###") == 1 for text in texts)
    assert new.shape[1] <= 3


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(point_clouds=i["point_clouds"][:2]), "18 point placeholders, but 2 point clouds"),
        (lambda i: i.pop("point_clouds"), "18 point placeholders, but 0 point clouds"),
        (lambda i: i.update(point_clouds=i["point_clouds"][..., :3]), r"\(clouds, points, 6\)"),
        (lambda i: i.update(point_clouds=i["point_clouds"][0]), r"got \(128, 6\)"),
        (lambda i: i.update(point_clouds=i["point_clouds"][:, :10]), "10 points cannot give 16"),
        (lambda i: i.update(inputs_embeds=torch.zeros(1)), "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_wrong_inputs_are_refused(tiny_model, point_clouds, change, message):
    inputs = make_inputs(point_clouds)
    change(inputs)
    with pytest.raises(ValueError, match=message):
        tiny_model(**inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_cloud": 5}, "between 1 and num_query_experts .4., got 5"),
        ({"router_type": "hard"}, "hard"),
        ({"point_token_id": 300}, "0 to 299, got 300"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        make_tiny_config(**fields)
    with pytest.raises(ValueError, match="multiple of num_attention_heads"):
        MiniGPT3DPointConfig(hidden_size=50, num_attention_heads=4)


def test_config_round_trip(tmp_path):
    config = make_tiny_config(router_type="soft", text_config=LlamaConfig(**SMALL_TEXT))
    config.save_pretrained(tmp_path)
    again = MiniGPT3DConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.text_config, LlamaConfig) and again.router_type == "soft"


def test_default_config_is_the_paper(golden):
    """The number of parameters without LoRA, at full size, as the authors count them; BatchNorms are folded here."""
    with torch.device("meta"):
        model = MiniGPT3DForConditionalGeneration(MiniGPT3DConfig())
    facts = golden("trainable_full.json")
    lora = sum(facts["stage_2"]["trainable_by_group"][name] for name in ("llm_lora", "Qformer_lora"))
    batch_norms = 2 * (128 + 512)  # weights and biases
    assert model.num_parameters() == facts["stage_4"]["all_params_total_dedup"] - lora - batch_norms


# Grouping


def test_sampled_points_are_distinct_and_exact():
    generator = torch.Generator().manual_seed(0)
    coord = torch.rand(2, 500, 3, generator=generator)
    indices = farthest_point_sampling(coord, 500, torch.tensor([3, 490]))
    assert all(len(set(row.tolist())) == 500 for row in indices)
    assert indices[:, 0].tolist() == [3, 490]
    indices = farthest_point_sampling(coord, 64)
    for row in range(2):  # by definition, without the running minimum
        chosen = [0]
        for _ in range(63):
            chosen.append(torch.cdist(coord[row], coord[row, chosen]).amin(1).argmax().item())
        assert indices[row].tolist() == chosen


KERNEL_IN_INTERPRETER = """
import contextlib, torch
from minigpt3d import grouping_minigpt3d as grouping
torch.cuda.device = lambda device: contextlib.nullcontext()
for num_points in (100, 9000):  # in one block, and in two
    coord = torch.randn(3, num_points, 3, generator=torch.Generator().manual_seed(0))
    coord[1, 5, 1] = torch.nan
    coord[2, 7:20] = coord[2, 3]
    arguments = coord.permute(2, 0, 1).contiguous(), 40, torch.tensor([0, 0, 3])
    expected = grouping._farthest_point_sampling_loop(*arguments)
    assert torch.equal(grouping._farthest_point_sampling_triton(*arguments), expected), num_points
print("equal")
"""


@pytest.mark.slow
def test_the_sampling_kernel_equals_the_loop_in_tritons_interpreter():
    """With NaN, equal points and other starts. No GPU is needed, only Triton."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", KERNEL_IN_INTERPRETER]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_repeated_points_do_not_break_grouping():
    coord = torch.rand(1, 4, 3).repeat(1, 8, 1)
    assert farthest_point_sampling(coord, 16).shape == (1, 16)
    assert nearest_neighbors(coord, coord[:, :4], 32).sort(-1).values.equal(torch.arange(32).expand(1, 4, 32))


def test_neighbors_by_distance_equal_those_of_the_tree():
    """As a GPU computes them, in parts, on real objects and on many clouds."""
    objects = MiniGPT3DPointCloudProcessor(num_points=1024)(DEMO_OBJECTS, return_tensors="pt")["point_clouds"]
    many = torch.rand(512, 64, 3, generator=torch.Generator().manual_seed(0))
    limit = 1 << 14
    for coord, num_groups, num_neighbors in ((objects[..., :3], 128, 32), (many, 8, 4)):
        center = coord[:, :num_groups]
        with LargestTensor() as largest:
            indices = _nearest_neighbors_in_parts(coord, center, num_neighbors, limit)
        assert largest.numel <= max(limit, coord.numel(), indices.numel())
        expected = nearest_neighbors(coord, center, num_neighbors)
        found, distances = (
            (coord[torch.arange(len(coord))[:, None, None], i] - center[:, :, None])
            .double()
            .norm(dim=-1)
            .sort(-1)
            .values
            for i in (indices, expected)
        )
        torch.testing.assert_close(found, distances, rtol=1e-6, atol=1e-7)
        assert all(len(set(row.tolist())) == num_neighbors for row in indices.flatten(0, 1))


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.numel = max(self.numel, tensor.numel() if torch.is_tensor(tensor) else 0)
        return result


def test_a_cloud_with_nan_does_not_change_others():
    coord = torch.rand(2, 200, 3, generator=torch.Generator().manual_seed(0))
    neighborhood, center = group(coord, 16, 8)
    coord[0, 5, 1] = torch.nan
    with_nan, nan_center = group(coord, 16, 8)
    assert torch.equal(with_nan[1], neighborhood[1]) and torch.equal(nan_center[1], center[1])
    assert nan_center[0].isnan().any(), "NaN is the farthest"


def test_wrong_grouping_is_refused():
    coord = torch.rand(1, 8, 3)
    with pytest.raises(ValueError, match="fps_start.* 0 and 7"):
        farthest_point_sampling(coord, 4, 8)
    with pytest.raises(ValueError, match="has no 9 neighbors"):
        nearest_neighbors(coord, coord, 9)


def test_return_dict_says_whether_a_tuple_is_returned(tiny_model, point_clouds):
    inputs = make_inputs(point_clouds) | {"use_cache": False}
    inputs["labels"] = inputs["input_ids"]
    expected = tiny_model(**inputs)
    generated = tiny_model.generate(**make_inputs(point_clouds), **GREEDY)
    model = copy.deepcopy(tiny_model)
    for config in (model.config, model.config.text_config, model.config.point_config):
        config.return_dict = False
    for output in (tiny_model(**inputs, return_dict=False), model(**inputs)):
        assert type(output) is tuple and len(output) == 3
        assert all(torch.equal(one, two) for one, two in zip(output, expected.to_tuple(), strict=True))
    del inputs["labels"]
    assert type(model.model(**inputs)) is tuple and torch.equal(
        model(**inputs, return_dict=True).logits, expected.logits
    )
    assert torch.equal(model.generate(**make_inputs(point_clouds), **GREEDY), generated)


def test_empty_batches_are_refused(tiny_model, point_clouds):
    empty = {name: tensor[:0] for name, tensor in make_inputs(point_clouds).items()}
    for inputs in (empty, empty | {"point_clouds": None}, {"input_ids": torch.ones(2, 0, dtype=torch.long)}):
        with pytest.raises(ValueError, match=r"input_ids must .* got shape \([02], \d+\)"):
            tiny_model(**inputs)
    text_alone = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    for inputs in (empty, {"inputs_embeds": torch.ones(0, 3, 64)}, text_alone | {"point_clouds": point_clouds[:0]}):
        with pytest.raises(ValueError, match="is empty, got shape"):
            tiny_model.generate(**inputs)
    with pytest.raises(ValueError, match=r"at least one cloud; got \(0, 128, 6\)"):
        tiny_model.get_point_features(point_clouds[:0])


def test_the_encoder_can_be_imported_from_its_old_place():
    own = {n: p for n, p in vars(point_bert_minigpt3d).items() if getattr(p, "__module__", "") == PointBert.__module__}
    assert {"PointBert", "MiniPointNet", "fold_batch_norm"} <= own.keys()
    assert all(getattr(modeling_minigpt3d, name) is part for name, part in own.items())
