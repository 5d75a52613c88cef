"""`minigpt3d convert` and `verify`: the golden model, released as the authors would, becomes a folder that computes the same."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import test_golden
import torch
from hub_double import serve
from peft import PeftModel
from release_files import release_contents, write_release
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_config, make_tiny_model
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from minigpt3d.cli.main import main
from minigpt3d.conversion import authors_name, our_name, save_pretrained, write
from minigpt3d.conversion.download import AUTHORS_ID, PATHS
from minigpt3d.hub import find_model, load_weights
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.training.stages import RECIPES, Lora
from minigpt3d.training.weights import (
    Start,
    adapter_names,
    gather_parameters,
    lora_scales,
    named_parameters,
    prepare_model,
    save_adapter,
)


STAGES = RECIPES["paper"]


OPTIONS = {
    slot: "--" + slot.replace("_", "-") for slot in ("phi", "blip2", "point_encoder", "tinygpt_v", "stage3", "stage4")
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    make_tiny_config().to_json_file(path)
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def convert(config_file, tmp_path, capsys):
    """Run the command; returns exit code, the folder, and what was printed."""

    def run(paths: dict, *options: str, out=tmp_path / "out"):
        options += ("--overwrite",)
        arguments = [str(a) for slot, path in paths.items() for a in (OPTIONS[slot], path)]
        code = main(
            ["convert", *arguments, "--out", str(out), "--config", str(config_file), "--dtype", "float32", *options]
        )
        printed = capsys.readouterr()
        return code, out, printed.out + printed.err

    return run


# ---- Exactness -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(released, config_file, tmp_path_factory):
    return run_whole(released, config_file, tmp_path_factory.mktemp("merged") / "model", "--verify")


@pytest.fixture(scope="module")
def kept(released, config_file, tmp_path_factory):
    return run_whole(released, config_file, tmp_path_factory.mktemp("kept") / "model", "--lora", "keep", "--verify")


def run_whole(paths, config_file, out, *options):
    arguments = [str(a) for slot, path in paths.items() for a in (OPTIONS[slot], path)]
    command = ["convert", *arguments, "--out", str(out), "--config", str(config_file), "--dtype", "float32", *options]
    assert main(command) == 0
    return out


def load_converted(folder, router_type, lora):
    """What stands in for `full_model` of tests/test_golden.py."""
    if lora == "merge":
        model, loading = MiniGPT3DForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()), loading
    else:
        base = MiniGPT3DForConditionalGeneration.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, folder / "adapter")
    inner = model if lora == "merge" else model.base_model.model
    inner.config.router_type = router_type
    if router_type == "none" and lora != "merge":  # an adapter with a router means to be routed
        inner.model.router.linear_1 = inner.model.router.linear_1.original_module
    return model.eval()


@pytest.fixture(params=["merge", "adapter"])
def converted(request, merged, kept, monkeypatch):
    """The goldens' tests, on what was converted."""
    folder = merged if request.param == "merge" else kept
    load = lambda golden, router_type="sparse", lora="merge": load_converted(folder, router_type, request.param)  # noqa: E731
    monkeypatch.setattr(test_golden, "full_model", load)
    return request.param


@pytest.mark.parametrize("router_type", ["none", "sparse", "soft", "constant"])
def test_golden_features(converted, golden, router_type):
    test_golden.test_point_features(golden, router_type, converted)


@pytest.mark.parametrize("case", ["single.none", "single.sparse", "multi.sparse"])
def test_golden_losses_and_gradients(converted, golden, tiny_processor, case):
    if converted == "merge":
        test_golden.test_loss_and_gradients(golden, tiny_processor, case, converted)
    else:
        # PEFT keeps the base's copy of a module that it replaces, so names differ: the loss alone.
        inputs, points = test_golden.training_inputs(golden, tiny_processor, case)
        if case.startswith("multi"):
            inputs["attention_mask"] *= inputs["input_ids"] != 292
            inputs["attention_mask"][:, 0] = 1
        inputs["point_clouds"] = points
        model = test_golden.full_model(golden, case.split(".")[1])
        loss = torch.tensor(golden("full.loss.json")["results"][case]["loss"])
        test_golden.close(model(**inputs).loss, loss, **test_golden.LOGITS)


@pytest.mark.parametrize("run", ["greedy", "beam2_minlen10"])
def test_golden_generations(converted, golden, tiny_processor, run, monkeypatch):
    if converted == "adapter":  # the adapter's layers stay in the model that PEFT wrapped
        load = test_golden.full_model
        monkeypatch.setattr(test_golden, "full_model", lambda *args: load(*args).base_model.model)
    test_golden.test_generation(golden, tiny_processor, run)


def test_official_phi_gives_the_same_weights(merged, convert, tmp_path):
    code, out, printed = convert(write_release(tmp_path / "release", phi="official"))
    assert code == 0, printed
    ours, theirs = load_file(out / "model.safetensors"), load_file(merged / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_kept_lora_computes_what_merged_lora_does(merged, kept, point_clouds):
    whole = AutoModelForImageTextToText.from_pretrained(merged).eval()
    apart = AutoModelForImageTextToText.from_pretrained(kept / "adapter").eval()  # the adapter names its base
    inputs = {"input_ids": torch.tensor([[5, *[293] * 6, 7, 8]]), "point_clouds": point_clouds[:1]}
    with torch.no_grad():
        expected, got = whole(**inputs).logits, apart(**inputs).logits
    test_golden.relative_close(got, expected)
    assert any("lora_A" in name for name in apart.state_dict())


def test_the_adapter_fits_the_model_without_its_head(merged, kept, point_clouds):
    whole, apart = AutoModel.from_pretrained(merged).eval(), AutoModel.from_pretrained(kept / "adapter").eval()
    test_golden.relative_close(
        apart.get_point_features(point_clouds).detach(), whole.get_point_features(point_clouds).detach()
    )
    inputs = {"input_ids": torch.tensor([[5, *[293] * 6, 7, 8]]), "point_clouds": point_clouds[:1]}
    with torch.no_grad():
        test_golden.relative_close(apart(**inputs).last_hidden_state, whole(**inputs).last_hidden_state)


def test_the_adapter_is_what_is_verified(merged, kept, capsys):
    stored = json.loads((kept / "verification.json").read_text())
    reference = json.loads((merged / "verification.json").read_text())
    for part in ("features", "logits"):
        assert stored[part] == pytest.approx(reference[part], rel=1e-4, abs=1e-5)
    assert main(["verify", str(kept)]) == 0, capsys.readouterr()


def test_the_command_line_takes_the_adapter(merged, kept, tmp_path, capsys):
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).random((200, 6)))

    def describe(model) -> tuple[int, str]:
        code = main(["describe", str(tmp_path / "cloud.npy"), "--model", str(model), "--max-new-tokens", "8"])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    assert describe(kept) == describe(kept / "adapter") == describe(merged)
    moved = shutil.copytree(kept / "adapter", tmp_path / "adapter")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    code, printed = describe(moved)
    assert code == 1 and "its base /gone/base is not there" in printed


def test_the_adapter_goes_on_training(kept):
    base = MiniGPT3DForConditionalGeneration.from_pretrained(kept / "base")
    model = PeftModel.from_pretrained(base, kept / "adapter", is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in ("lora_A", "query_experts", "router", "point_projection", "language_projection", "final_layernorm"):
        assert any(part in name for name in trainable), part


def test_half_precision_is_merged_before_it_is_cast(merged, convert, released):
    code, out, printed = convert(released, "--dtype", "bfloat16")
    assert code == 0, printed
    ours, exact = load_file(out / "model.safetensors"), load_file(merged / "model.safetensors")
    for name, tensor in ours.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
    assert AutoModelForImageTextToText.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_shards_hold_the_same(merged, convert, released, monkeypatch):
    monkeypatch.setattr(write, "SHARD_SIZE", 500_000)
    code, out, printed = convert(released)
    assert code == 0, printed
    assert len(list(out.glob("model-*.safetensors"))) > 2 and (out / "model.safetensors.index.json").exists()
    sharded = MiniGPT3DForConditionalGeneration.from_pretrained(out).state_dict()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in load_file(merged / "model.safetensors").items())


# ---- Less than everything --------------------------------------------------------------------------------------------


def test_without_the_stages_it_is_what_stage_1_starts_from(convert, released, point_clouds):
    base = {slot: path for slot, path in released.items() if not slot.startswith("stage")}
    code, out, printed = convert(base)
    assert code == 0, printed
    assert "new, for training: point_projection, query_experts, router" in printed
    start, contents = find_model(out), release_contents()
    assert start.adapter == out / "adapter" and start.stage is None
    model = MiniGPT3DForConditionalGeneration.from_pretrained(out / "base")
    assert model.config.router_type == "none"
    queries = contents["blip2"]["query_tokens"][0]
    assert all(torch.equal(expert.weight, queries) for expert in model.model.query_experts)
    projection = model.model.language_projection.linear_1.weight
    assert torch.equal(projection, contents["tinygpt_v"]["llama_proj.weight"])
    # What training/stage1.py --init does with it: TinyGPT-V's LoRA stays apart, and computes what it did.
    stage = replace(STAGES["I"], language_lora=Lora(8, 16, 0.0), qformer_lora=Lora(4, 8, 0.0))
    trained = prepare_model(load_weights(start.base, dtype=torch.float32), stage, start.adapter)
    factor = contents["tinygpt_v"][LORA]
    assert torch.equal(named_parameters(trained)[our_name(LORA)], factor) and factor.any()
    inputs = {"input_ids": torch.tensor([[5, *[293] * 6, 7, 8]]), "point_clouds": point_clouds[:1]}
    apart = AutoModelForImageTextToText.from_pretrained(out / "adapter").eval()
    code, merged, printed = convert(base, "--lora", "merge")
    assert code == 0, printed
    merged = MiniGPT3DForConditionalGeneration.from_pretrained(merged).eval()
    for other in (trained.eval(), apart):
        test_golden.relative_close(other(**inputs).logits, merged(**inputs).logits)


def test_stage_3_without_stage_4(convert, released):
    code, out, printed = convert({slot: path for slot, path in released.items() if slot != "stage4"})
    assert code == 0, printed
    assert find_model(out).stage["stage"] == "III"
    model = MiniGPT3DForConditionalGeneration.from_pretrained(out / "adapter")  # loads what it names as its base
    queries = release_contents()["stage3"]["query_tokens"]
    assert model.config.router_type == "none"
    first = named_parameters(model)
    assert any(torch.equal(tensor, queries[0]) for name, tensor in first.items() if "query_experts.0" in name)


@pytest.mark.parametrize(
    ("left_out", "options", "message"),
    [
        (["blip2"], [], "give --blip2"),
        (["phi", "tinygpt_v"], [], "give --phi, --tinygpt-v"),
        (["stage3"], [], "give --stage3"),
        (["stage4"], ["--router", "sparse"], "give --stage4 too"),
        ([], ["--stage-result", "somewhere"], "stands alone"),
    ],
)
def test_options_that_do_not_add_up(left_out, options, message, convert, released):
    code, out, printed = convert({s: p for s, p in released.items() if s not in left_out}, *options)
    assert code == 1 and message in printed
    assert not out.exists()


def test_a_stage_result_converts_too(tmp_path, tiny_model, tiny_processor, capsys):
    """An adapter of another alpha than the authors', on a base model."""
    stage = replace(STAGES["II"], language_lora=Lora(4, 32, 0.0), qformer_lora=Lora(4, 16, 0.0))
    base, result = tmp_path / "base", tmp_path / "stage2"
    tiny_model.config.router_type = "none"
    save_pretrained(tiny_model, tiny_processor, base)
    model = prepare_model(load_weights(base, dtype=torch.float32), stage)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    names = adapter_names(model, Start(str(base)))
    run = {"stage": "II", "router_type": "none"}
    save_adapter(result, gather_parameters(model, names), lora_scales(model), base, run)
    expected = model.merge_and_unload().state_dict()
    for lora in ("merge", "keep"):
        out = tmp_path / lora
        arguments = ["--stage-result", str(result), "--out", str(out), "--dtype", "float32", "--lora", lora]
        assert main(["convert", *arguments]) == 0, capsys.readouterr().err
        model = MiniGPT3DForConditionalGeneration.from_pretrained(out if lora == "merge" else out / "base")
        if lora == "keep":
            model = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    keep = ["convert", "--stage-result", str(result), "--out", str(tmp_path / "again"), "--lora", "keep"]
    assert main([*keep, "--router", "sparse"]) == 1
    assert "this result is of a stage before" in capsys.readouterr().err
    path = result / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    own = name.removeprefix("base_model.model.")
    assert main(keep) == 1 and f"{authors_name(own)} is missing" in capsys.readouterr().err
    assert main(["convert", "--stage-result", str(result), "--out", str(result)]) == 1
    assert "lie in each other" in capsys.readouterr().err


def test_a_stage_result_with_another_language_model(tmp_path, tiny_processor, capsys):
    """q, k and v stay apart where the language model has them apart, and tied weights are not missing."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = LlamaConfig(**sizes, vocab_size=300, bos_token_id=292, eos_token_id=292, tie_word_embeddings=True)
    model = make_tiny_model(make_tiny_config(text_config=language))
    save_pretrained(model, tiny_processor, tmp_path / "result")
    out = tmp_path / "out"
    arguments = ["--stage-result", str(tmp_path / "result"), "--out", str(out), "--dtype", "float32"]
    assert main(["convert", *arguments]) == 0, capsys.readouterr().err
    converted, loading = MiniGPT3DForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in converted.state_dict().items())
    assert converted.lm_head.weight is converted.model.language_model.embed_tokens.weight


# ---- Accounting ------------------------------------------------------------------------------------------------------


def change(slot, key, value):
    def mutate(contents):
        if value is None:
            del contents[slot][key]
        else:
            contents[slot][key] = value
        return contents

    return mutate


def swap(one, other):
    def mutate(contents):
        contents[one], contents[other] = contents[other], contents[one]
        return contents

    return mutate


LORA = "llama_model.base_model.model.model.layers.1.self_attn.dense.lora_A.default.weight"


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (change("phi", "lm_head.bias", None), "phi: lm_head.bias is missing (it becomes lm_head.bias)"),
        (change("blip2", "query_tokens", None), "blip2: query_tokens is missing"),
        (change("stage3", LORA, None), f"stage3: {LORA} is missing"),
        (change("stage4", "query_router.2.bias", None), "stage4: query_router.2.bias is missing"),
        (change("stage3", "llama_proj3.weight", torch.ones(2)), "stage3: llama_proj3.weight is no tensor of MiniGPT-3D"),
        (change("stage3", "query_router.0.bias", torch.ones(20)), "query_router.0.bias (model.router.linear_1.bias) is not what this file should hold"),
        (change("phi", "lm_head.bias", torch.ones(7)), "phi: lm_head.bias has shape (7,), the configuration needs (300,)"),
        (change("stage3", LORA, torch.ones(8, 3)), "their product does not fit (64, 64)"),
        (change("blip2", "query_tokens", torch.ones(1, 7, 32)), "blip2: query_tokens has shape (7, 32), the configuration needs (6, 32)"),
        (change("stage4", "query_router.0.bias", torch.ones(20, dtype=torch.int64)), "query_router.0.bias is int64, expected float16"),
        (change("blip2", "Qformer.bert.embeddings.LayerNorm.gamma", torch.ones(32)), "is not in this configuration"),
        (change("stage4", "query_expert_dict.0", torch.ones(1, 6, 32)), "query_expert_dict.0 should be the same tensor as query_tokens"),
        (swap("stage3", "stage4"), "stage3: this looks like the file of --stage4"),
        (swap("stage3", "stage4"), "stage4: this looks like the file of --stage3"),
        (swap("blip2", "tinygpt_v"), "blip2: this looks like the file of --tinygpt-v"),
        (change("phi", "model.layers.0.self_attn.q_proj.weight", torch.ones(64, 64)), "needs k_proj, v_proj beside it"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_named(mutate, message, convert, tmp_path):
    code, out, printed = convert(write_release(tmp_path / "release", mutate(release_contents())))
    assert code == 1 and message in printed
    assert not out.exists() and not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_everything_is_said_at_once_and_can_be_ignored(convert, tmp_path):
    contents = release_contents()
    contents["tinygpt_v"] |= {"Qformer.bert.pooler.weight": torch.ones(2), "strange.one": torch.ones(2)}
    contents["stage3"] |= {"strange.two": torch.ones(2)}
    paths = write_release(tmp_path / "release", contents)
    code, _, printed = convert(paths)
    assert code == 1
    assert all(key in printed for key in ("Qformer.bert.pooler.weight", "strange.one", "strange.two", "--ignore"))
    assert len(printed.splitlines()) == 5, "a line each"
    code, out, printed = convert(
        paths, "--ignore", "strange.*", "--ignore", "tinygpt_v:Qformer.bert.pooler.*", "--ignore", "nothing.*"
    )
    assert code == 0, printed
    assert "--ignore nothing.*: no key needed it" in printed
    recorded = json.loads((out / "provenance.json").read_text())["ignored"]
    assert sorted(recorded) == [
        "stage3: strange.two", "tinygpt_v: Qformer.bert.pooler.weight", "tinygpt_v: strange.one"
    ]  # fmt: skip


def test_a_missing_tensor_can_be_ignored_where_another_file_has_it(convert, tmp_path):
    contents = release_contents()
    before = contents["tinygpt_v"]["llama_proj.bias"]
    del contents["stage3"]["llama_proj.bias"]
    paths = write_release(tmp_path / "release", contents)
    assert convert(paths)[0] == 1
    code, out, printed = convert(paths, "--ignore", "stage3:llama_proj.bias")
    assert code == 0, printed
    assert torch.equal(load_file(out / "model.safetensors")["model.language_projection.linear_1.bias"], before)


def test_old_and_new_peft_spellings(convert, merged, tmp_path):
    contents = release_contents()
    for slot in ("tinygpt_v", "stage3"):
        contents[slot] = {key.replace(".default.", "."): tensor for key, tensor in contents[slot].items()}
    contents["blip2"] = {
        re.sub(r"\.(query|key|value)\.(weight|bias)$", r".\1.base_layer.\2", key): tensor
        for key, tensor in contents["blip2"].items()
    }
    code, out, printed = convert(write_release(tmp_path / "release", contents))
    assert code == 0, printed
    ours, theirs = load_file(out / "model.safetensors"), load_file(merged / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_biases_that_no_file_has_are_zero(convert, tmp_path):
    contents = release_contents()
    contents["phi"] = {
        key: t for key, t in contents["phi"].items() if not key.endswith(("q_layernorm.bias", "k_layernorm.bias"))
    }
    code, out, printed = convert(write_release(tmp_path / "release", contents))
    assert code == 0 and "6 parameters are in no file and zero" in printed
    tensors = load_file(out / "model.safetensors")
    biases = [tensors[f"model.language_model.layers.{i}.self_attn.{n}_layernorm.bias"] for i in range(3) for n in "qk"]
    assert not any(bias.any() for bias in biases)


def test_the_table_adds_up(convert, released):
    _, out, printed = convert(released)
    rows = [line.split() for line in printed.splitlines()[1:7]]
    assert [row[0] for row in rows] == list(OPTIONS)
    for slot, *counts in rows:
        total, *parts = map(int, counts)
        assert total == sum(parts), slot
    contents = release_contents()
    assert {row[0]: int(row[1]) for row in rows} == {slot: len(tensors) for slot, tensors in contents.items()}
    origins = json.loads((out / "provenance.json").read_text())["origins"]
    assert origins["model.query_experts.0.weight"] == "stage4: query_tokens"
    assert origins["model.qformer.encoder.layer.0.attention.attention.query.weight"].startswith("blip2: ")
    assert origins["model.language_model.layers.0.input_layernorm.weight"].startswith("stage3: ")
    assert "stage4 also has the state of the optimizer: not used" in printed


# ---- Files from strangers --------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda paths, tmp: torch.save({"model": {"a": Malicious(tmp / "done")}}, paths["stage3"]), "system"),
        (lambda paths, tmp: paths["stage3"].write_bytes(pickle.dumps({"model": Malicious(tmp / "done")})), "system"),
        (lambda paths, tmp: torch.save({"model": Malicious(tmp / "done")}, paths["stage3"], _use_new_zipfile_serialization=False), "system"),
        (lambda paths, tmp: torch.save({"model": {1: torch.ones(2)}}, paths["stage3"]), "expected a dictionary of tensors"),
        (lambda paths, tmp: torch.save({"model": {"a": torch.eye(2).to_sparse()}}, paths["stage3"]), "expected a dictionary of tensors"),
        (lambda paths, tmp: (paths["phi"] / "model.safetensors.index.json").write_text("{}"), "not an index of shards"),
        (lambda paths, tmp: (paths["phi"] / "config.json").write_text("{"), "not a configuration"),
        (lambda paths, tmp: cut(paths["blip2"]), "blip2.pth"),
        (lambda paths, tmp: cut(paths["phi"] / "model.safetensors"), "cut off, damaged"),
        (lambda paths, tmp: paths["stage4"].write_text("<html>not found</html>"), "cut off, damaged"),
        (lambda paths, tmp: paths["stage4"].write_bytes(b""), "0 bytes) is cut off"),
        (lambda paths, tmp: paths["stage4"].unlink(), "no such file"),
        (lambda paths, tmp: torch.save({"state_dict": {}}, paths["stage4"]), "expected a dictionary of tensors under 'model', got the keys state_dict"),
        (lambda paths, tmp: torch.save([torch.ones(2)], paths["stage4"]), "holds a list"),
        (lambda paths, tmp: torch.save({"model": release_contents()["stage4"], "ema": {"a": torch.ones(2)}}, paths["stage4"]), "tensors under 'ema'"),
        (lambda paths, tmp: (paths["phi"] / "model.safetensors").unlink(), "holds no weights"),
        (lambda paths, tmp: (paths["phi"] / "tokenizer.json").unlink(), "no tokenizer can be loaded"),
        (lambda paths, tmp: (paths["phi"] / "config.json").write_text('{"model_type": "phi", "num_attention_heads": 8}'), "num_attention_heads is 8"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_trusted(spoil, message, convert, tmp_path):
    paths = write_release(tmp_path / "release")
    spoil(paths, tmp_path)
    code, out, printed = convert(paths)
    assert code == 1 and message in printed
    assert "Traceback" not in printed
    assert not out.exists() and not (tmp_path / "done").exists()


def test_values_that_do_not_fit_are_refused(convert, tmp_path):
    contents = release_contents()
    contents["phi"]["lm_head.weight"] = torch.full((300, 64), 1e6)
    paths = write_release(tmp_path / "release", contents)
    code, out, printed = convert(paths, "--dtype", "float16")
    assert code == 1 and "too large for torch.float16. Use --dtype bfloat16" in printed and not out.exists()
    contents["phi"]["lm_head.weight"] = torch.full((300, 64), torch.nan)
    code, out, printed = convert(write_release(tmp_path / "again", contents))
    assert code == 1 and "not finite" in printed and not out.exists()


# ---- Nothing half-made -----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(convert, released, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=10))
    code, out, printed = convert(released)
    assert code == 1 and "Free some space" in printed and not out.exists()
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    code, out, printed = convert(released)
    assert code == 1 and "is full; free some space" in printed
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_killed_conversion_leaves_the_old_folder_whole(released, config_file, tmp_path):
    out = tmp_path / "out"
    run_whole(released, config_file, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    program = (
        "import os, sys\n"
        "from minigpt3d.conversion import write\n"
        "write.save_file = lambda *args, **kwargs: os._exit(9)\n"
        "from minigpt3d.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [str(a) for slot, path in released.items() for a in (OPTIONS[slot], path)]
    command = [
        sys.executable,
        "-c",
        program,
        "convert",
        *arguments,
        "--out",
        out,
        "--config",
        config_file,
        "--overwrite",
    ]
    assert subprocess.run(list(map(str, command)), capture_output=True).returncode == 9
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    run_whole(
        released, config_file, out, "--overwrite"
    )  # what the killed one left in its temporary folder is no hindrance
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_is_replaced_only_when_asked(merged, released, config_file, capsys):
    before = (merged / "provenance.json").read_bytes()
    arguments = [str(a) for slot, path in released.items() for a in (OPTIONS[slot], path)]
    assert main(["convert", *arguments, "--out", str(merged), "--config", str(config_file)]) == 1
    assert "holds a model already; pass a new folder, or --overwrite" in capsys.readouterr().err
    assert (merged / "provenance.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({".git/HEAD": "ref"}, "holds .git"),
        ({"history.jsonl": ""}, "holds history.jsonl"),
        ({"config.json": '{"model_type": "phi"}'}, "holds other files than a model"),
        ({"config.json": "{"}, "holds other files than a model"),
    ],
)
def test_what_would_be_lost_is_not_replaced(content, message, merged, convert, released, tmp_path):
    shutil.copytree(merged, tmp_path / "out")
    for name, text in content.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    code, out, printed = convert(released)
    assert code == 1 and message in printed
    assert all((out / name).read_text() == text for name, text in content.items())


def test_a_folder_is_not_made_of_itself(convert, released, tmp_path):
    for out in (released["phi"], released["phi"] / "inside", released["phi"].parent):
        code, _, printed = convert(released, out=out)
        assert code == 1 and "lie in each other" in printed
    (tmp_path / "file").write_text("")
    code, _, printed = convert(released, out=tmp_path / "file" / "out")
    assert code == 1 and "file is a file" in printed


def test_other_peoples_files_are_not_replaced(convert, released, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    code, out, printed = convert(released)
    assert code == 1 and "holds other files than a model" in printed
    assert (out / "thesis.tex").read_text() == "years"


# ---- The folder ------------------------------------------------------------------------------------------------------


def test_the_folder_has_all_the_hub_needs(merged):
    names = {path.name for path in merged.iterdir()}
    assert names >= {
        "README.md", "LICENSE", "NOTICE", "config.json", "generation_config.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "model.safetensors", "provenance.json", "verification.json",
        "modeling_minigpt3d.py", "configuration_minigpt3d.py", "processing_minigpt3d.py", "pipeline_minigpt3d.py",
    }  # fmt: skip
    assert any("chat_template" in name for name in names)
    card = (merged / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card and "base_model: microsoft/phi-2" in card and "superseded" in card
    record = json.loads((merged / "provenance.json").read_text())
    assert record["files"]["stage4"]["files"]["stage4.pth"]["sha256"] and record["versions"]["torch"]
    assert record["command"][:2] == ["minigpt3d", "convert"] and not any("/" in word for word in record["command"])
    assert record["dtype"] == "float32" and record["lora"] == "merge"
    assert AutoProcessor.from_pretrained(merged).point_token_id == 293


# ---- Without paths ---------------------------------------------------------------------------------------------------


def test_without_paths_the_release_is_downloaded(released, merged, config_file, tmp_path):
    """From a Hub on loopback; BLIP-2's file, which is not on the Hub, goes on where it was cut off."""
    files = {PATHS[slot]: path.read_bytes() for slot, path in released.items() if slot not in ("phi", "blip2")}
    files |= {PATHS["phi"] + path.name: path.read_bytes() for path in released["phi"].iterdir()}
    blip2 = released["blip2"].read_bytes()
    program = (
        "import sys\n"
        "from minigpt3d.conversion import download\n"
        "download.BLIP2_URL = sys.argv.pop(1)\n"
        "from minigpt3d.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    half = tmp_path / "hf" / "hub" / "minigpt3d" / "blip2.pth.partial"
    half.parent.mkdir(parents=True)
    half.write_bytes(blip2[: len(blip2) // 2])
    out = tmp_path / "out"
    with serve({AUTHORS_ID: files}, {"/blip2.pth": blip2}) as hub:
        revision = hub.repositories["models", AUTHORS_ID].revision("main")
        environment = os.environ | {
            "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

        def run(*options):
            command = [sys.executable, "-c", program, f"{hub.address}/blip2.pth", "convert", "--out", out, *options]
            command += ["--config", config_file, "--dtype", "float32"]
            return subprocess.run(
                list(map(str, command)), env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )

        asked = run()
        assert asked.returncode == 1 and "pass --yes" in asked.stderr
        assert f"{AUTHORS_ID} at {revision}" in asked.stdout and "blip2" in asked.stdout and "in all" in asked.stdout
        assert not any(method == "GET" and "/resolve/" in path for method, path, *_ in hub.requests), (
            "only asked so far"
        )
        done = run("--yes")
        assert done.returncode == 0, done.stderr
    assert ("GET", "/blip2.pth", f"bytes={len(blip2) // 2}-", None) in hub.requests, (
        "it goes on, and the token stays here"
    )
    assert not any(token for _, path, _, token in hub.requests if path == "/blip2.pth")
    ours, theirs = load_file(out / "model.safetensors"), load_file(merged / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    record = json.loads((out / "provenance.json").read_text())["files"]
    assert record["stage4"]["source"] == f"{AUTHORS_ID}@{revision}/{PATHS['stage4']}"


def test_a_release_that_cannot_be_reached(config_file, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "minigpt3d.cli", "convert", "--out", tmp_path / "out", "--yes"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot ask for the released files" in done.stderr
    assert "Traceback" not in done.stderr


# ---- Verification ----------------------------------------------------------------------------------------------------


def test_verify_agrees_and_finds_what_changed(merged, tmp_path, capsys):
    assert main(["verify", str(merged)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((merged / "verification.json").read_text())
    assert "agrees" in printed and f"{stored['parameters']:,} parameters, float32" in printed
    assert stored["parameters"] == sum(
        p.numel() for p in MiniGPT3DForConditionalGeneration.from_pretrained(merged).parameters()
    )

    # Libraries that compute something else: the same folder, with an encoder that pools another way.
    other = shutil.copytree(merged, tmp_path / "other")
    source = (other / "modeling_minigpt3d.py").read_text()
    assert "self.scaling = self.head_dim**-0.5" in source
    (other / "modeling_minigpt3d.py").write_text(source.replace("self.head_dim**-0.5", "self.head_dim**-0.4", 1))
    assert main(["verify", str(other)]) == 1
    printed = capsys.readouterr().err
    assert "features: off by" in printed and "computes something else here" in printed

    (other / "verification.json").unlink()
    assert main(["verify", str(other)]) == 1
    assert "nothing to compare with" in capsys.readouterr().err
    (other / "model.safetensors").unlink()
    assert main(["verify", str(other)]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"features": [1.0]}, {"text": None}, {"dtype": "int8"}])
def test_a_damaged_verification_is_named(change, merged, tmp_path, capsys):
    stored = json.loads((merged / "verification.json").read_text()) | change
    (tmp_path / "config.json").write_text("{}")
    kept = {key: value for key, value in stored.items() if value is not None}
    (tmp_path / "verification.json").write_text(json.dumps(kept))
    assert main(["verify", str(tmp_path)]) == 1
    assert "verification.json: not written by" in capsys.readouterr().err


def test_verify_does_not_run_strangers_code(capsys):
    assert main(["verify", "somebody/model"]) == 1
    assert "pass --trust-remote-code" in capsys.readouterr().err


def test_a_killed_verification_keeps_the_folder(convert, released, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "", "Loading weights: 40%")
    monkeypatch.setattr("minigpt3d.conversion.verification.subprocess.run", lambda *args, **kwargs: killed)
    code, out, printed = convert(released, "--verify")
    assert code == 1 and "not verified" in printed and "for want of memory" in printed
    assert (out / "model.safetensors").exists() and not (out / "verification.json").exists()


def test_verify_of_nothing(capsys):
    assert main(["verify", "no-such-folder"]) == 1
    assert "there is no folder no-such-folder" in capsys.readouterr().err
