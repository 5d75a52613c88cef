"""`minigpt3d convert` and `verify`: the golden model, released as the authors would, becomes a folder that computes the same.

The parts are tested in tests/unit/test_conversion.py. Here are the command line, what others load from the folders, a
killed run, and the download.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from hub_double import serve
from peft import PeftModel
from release_files import release_contents, release_options, write_release_files
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_config, make_tiny_model
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from minigpt3d.cli.main import main
from minigpt3d.conversion import verification, write
from minigpt3d.conversion.download import AUTHORS_ID, PATHS
from minigpt3d.conversion.names import authors_name, our_name
from minigpt3d.conversion.state_dict import convert_state_dict
from minigpt3d.hub import ModelFiles, find_model, load_weights, save_pretrained
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.training.stages import RECIPES, Lora
from minigpt3d.training.weights import (
    adapter_names,
    gather_parameters,
    lora_scales,
    named_parameters,
    prepare_model,
    save_adapter,
)


STAGES = RECIPES["paper"]
LORA = "llama_model.base_model.model.model.layers.1.self_attn.dense.lora_A.default.weight"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    make_tiny_config().to_json_file(path)
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_release_files(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def make_command(config_file):
    def make(paths, out, *options) -> list[str]:
        fixed = ["--out", str(out), "--config", str(config_file), "--dtype", "float32"]
        return ["convert", *release_options(paths), *fixed, *options]

    return make


@pytest.fixture(scope="module")
def merged(released, make_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "model"
    assert main(make_command(released, out, "--verify")) == 0
    return out


@pytest.fixture(scope="module")
def kept(released, make_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept") / "model"
    assert main(make_command(released, out, "--lora", "keep")) == 0
    return out


@pytest.fixture
def run(capsys):
    """Run a command; returns its exit code and what it printed."""

    def run(command) -> tuple[int, str]:
        code = main(command)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def close(actual, expected, tolerance=1e-5):
    """Relative to the largest value."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def contents_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- Exactness -------------------------------------------------------------------------------------------------------


def test_the_merged_model_is_the_golden_one(merged, golden):
    """Bit for bit what the goldens' own tests compute with (tests/golden)."""
    model, loading = MiniGPT3DForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not any(loading.values()), loading
    expected = convert_state_dict(golden("full.state"), make_tiny_config())
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert model.config.router_type == "sparse"
    features = golden("full.encode_pc.io")
    close(model.eval().get_point_features(features["points"]).pooler_output.detach(), features["sparse.inputs_llama"])


def test_base_and_adapter_hold_the_golden_tensors(kept, golden):
    expected = convert_state_dict(golden("full.state"), make_tiny_config(), merge_lora=False)
    tensors = load_file(kept / "base" / "model.safetensors")
    assert tensors.keys() == {name for name in expected if ".lora_" not in name}
    trained = load_file(kept / "adapter" / "adapter_model.safetensors")
    trained = {name.removeprefix("base_model.model."): tensor for name, tensor in trained.items()}
    assert {name for name in trained if ".lora_" in name} == {name for name in expected if ".lora_" in name}
    for name, tensor in expected.items():
        assert torch.equal(trained.get(name, tensors.get(name)), tensor), name
    base = MiniGPT3DForConditionalGeneration.from_pretrained(kept / "base")
    parameters = named_parameters(PeftModel.from_pretrained(base, kept / "adapter"))
    assert all(torch.equal(parameters[name], tensor) for name, tensor in trained.items() if ".lora_" in name)


def test_kept_lora_computes_what_merged_lora_does(merged, kept, point_clouds):
    whole = AutoModelForImageTextToText.from_pretrained(merged).eval()
    adapted = AutoModelForImageTextToText.from_pretrained(kept / "adapter").eval()  # the adapter names its base
    inputs = {"input_ids": torch.tensor([[5, *[293] * 6, 7, 8]]), "point_clouds": point_clouds[:1]}
    with torch.no_grad():
        close(adapted(**inputs).logits, whole(**inputs).logits)
    assert any("lora_A" in name for name in adapted.state_dict())


def test_the_adapter_fits_the_model_without_its_head(merged, kept, point_clouds):
    whole, adapted = AutoModel.from_pretrained(merged).eval(), AutoModel.from_pretrained(kept / "adapter").eval()
    inputs = {"input_ids": torch.tensor([[5, *[293] * 6, 7, 8]]), "point_clouds": point_clouds[:1]}
    with torch.no_grad():
        close(
            adapted.get_point_features(point_clouds).pooler_output,
            whole.get_point_features(point_clouds).pooler_output,
        )
        close(adapted(**inputs).last_hidden_state, whole(**inputs).last_hidden_state)


def test_the_adapter_can_be_trained_further(kept):
    base = MiniGPT3DForConditionalGeneration.from_pretrained(kept / "base")
    model = PeftModel.from_pretrained(base, kept / "adapter", is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in ("lora_A", "query_experts", "router", "point_projection", "language_projection", "final_layernorm"):
        assert any(part in name for name in trainable), part


def test_describe_takes_model_and_adapter(merged, kept, tmp_path, run):
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).random((200, 6)))

    def describe(model):
        return run(["describe", str(tmp_path / "cloud.npy"), "--model", str(model), "--max-new-tokens", "8"])

    assert describe(kept) == describe(kept / "adapter") == describe(merged)
    adapter = shutil.copytree(kept / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    code, printed = describe(adapter)
    assert code == 1 and "/gone/base" in printed


# ---- Less than everything --------------------------------------------------------------------------------------------


def test_without_the_stages_it_is_what_stage_1_starts_from(make_command, released, point_clouds, tmp_path, run):
    paths = {slot: path for slot, path in released.items() if not slot.startswith("stage")}
    code, printed = run(make_command(paths, tmp_path / "kept"))
    assert code == 0, printed
    assert "new, for training: point_projection, query_experts, router" in printed
    start, contents = find_model(tmp_path / "kept"), release_contents()
    assert start.adapter == tmp_path / "kept" / "adapter" and start.stage is None
    model = MiniGPT3DForConditionalGeneration.from_pretrained(tmp_path / "kept" / "base")
    assert model.config.router_type == "none"
    queries = contents["blip2"]["query_tokens"][0]
    assert all(torch.equal(expert.weight, queries) for expert in model.model.query_experts)
    projection = model.model.language_projection.linear_1.weight
    assert torch.equal(projection, contents["tinygpt_v"]["llama_proj.weight"])
    # What training/stage1.py --init does with it: TinyGPT-V's LoRA stays separate, and computes what it did.
    stage = replace(STAGES["I"], language_lora=Lora(8, 16, 0.0), qformer_lora=Lora(4, 8, 0.0))
    trained = prepare_model(load_weights(start.base, dtype=torch.float32), stage, start.adapter)
    factor = contents["tinygpt_v"][LORA]
    assert torch.equal(named_parameters(trained)[our_name(LORA)], factor) and factor.any()
    code, printed = run(make_command(paths, tmp_path / "merged", "--lora", "merge"))
    assert code == 0, printed
    inputs = {"input_ids": torch.tensor([[5, *[293] * 6, 7, 8]]), "point_clouds": point_clouds[:1]}
    merged = MiniGPT3DForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    adapted = AutoModelForImageTextToText.from_pretrained(tmp_path / "kept" / "adapter").eval()
    for other in (trained.eval(), adapted):
        close(other(**inputs).logits, merged(**inputs).logits)


def test_stage_3_without_stage_4(make_command, released, tmp_path, run):
    out = tmp_path / "out"
    code, printed = run(make_command({s: path for s, path in released.items() if s != "stage4"}, out))
    assert code == 0, printed
    assert find_model(out).stage["stage"] == "III"
    model = MiniGPT3DForConditionalGeneration.from_pretrained(out / "adapter")  # loads what it names as its base
    queries = release_contents()["stage3"]["query_tokens"]
    assert model.config.router_type == "none"
    experts = [tensor for name, tensor in named_parameters(model).items() if "query_experts.0" in name]
    assert any(torch.equal(tensor, queries[0]) for tensor in experts)


def test_problems_end_the_command_before_anything_is_written(make_command, released, tmp_path, run):
    """Each on a line of its own, without a traceback."""
    contents = release_contents()
    del contents["phi"]["lm_head.bias"], contents["stage4"]["query_router.2.bias"]
    broken = write_release_files(tmp_path / "release", contents)
    code, printed = run(make_command(broken, tmp_path / "out"))
    lines = printed.splitlines()
    assert code == 1 and len(lines) == 4
    assert "lm_head.bias is missing" in lines[1] and "query_router.2.bias is missing" in lines[2]
    for paths, options, word in [
        ({slot: path for slot, path in released.items() if slot != "tinygpt_v"}, [], "tinygpt"),
        (released, ["--stage-result", "somewhere"], "--stage-result"),
    ]:
        code, printed = run(make_command(paths, tmp_path / "out", *options))
        assert code == 1 and word in printed and "Traceback" not in printed
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_stage_result_converts_too(tmp_path, tiny_model, tiny_processor, run):
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
    names = adapter_names(model, ModelFiles(str(base)))
    facts = {"stage": "II", "router_type": "none"}
    save_adapter(result, gather_parameters(model, names), lora_scales(model), base, facts)
    expected = model.merge_and_unload().state_dict()
    for lora in ("merge", "keep"):
        out = tmp_path / lora
        options = ["--out", str(out), "--dtype", "float32", "--lora", lora]
        code, printed = run(["convert", "--stage-result", str(result), *options])
        assert code == 0, printed
        model = MiniGPT3DForConditionalGeneration.from_pretrained(out if lora == "merge" else out / "base")
        if lora == "keep":
            model = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    keep = ["convert", "--stage-result", str(result), "--out", str(tmp_path / "again"), "--lora", "keep"]
    code, printed = run([*keep, "--router", "sparse"])
    assert code == 1 and "experts" in printed
    path = result / "adapter_model.safetensors"
    tensors = load_file(path)
    removed = next(name for name in tensors if "lora_A" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != removed}, path)
    code, printed = run(keep)
    assert code == 1 and f"{authors_name(removed.removeprefix('base_model.model.'))} is missing" in printed
    code, printed = run(["convert", "--stage-result", str(result), "--out", str(result)])
    assert code == 1 and "lie in each other" in printed


def test_a_stage_result_with_another_language_model(tmp_path, tiny_processor, run):
    """q, k and v stay separate if the language model has them separately, and tied weights are not missing."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = LlamaConfig(**sizes, vocab_size=300, bos_token_id=292, eos_token_id=292, tie_word_embeddings=True)
    model = make_tiny_model(make_tiny_config(text_config=language))
    save_pretrained(model, tiny_processor, tmp_path / "result")
    out = tmp_path / "out"
    code, printed = run(
        ["convert", "--stage-result", str(tmp_path / "result"), "--out", str(out), "--dtype", "float32"]
    )
    assert code == 0, printed
    converted, loading = MiniGPT3DForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in converted.state_dict().items())
    assert converted.lm_head.weight is converted.model.language_model.embed_tokens.weight


# ---- The folder ------------------------------------------------------------------------------------------------------


def test_the_folder_has_all_that_the_hub_needs(merged):
    names = {path.name for path in merged.iterdir()}
    assert names >= {
        "README.md", "LICENSE", "NOTICE", "config.json", "generation_config.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "model.safetensors", "provenance.json", "verification.json",
        "modeling_minigpt3d.py", "configuration_minigpt3d.py", "processing_minigpt3d.py", "pipeline_minigpt3d.py",
        "point_bert_minigpt3d.py", "grouping_minigpt3d.py",
    }  # fmt: skip
    assert any("chat_template" in name for name in names)
    card = (merged / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card and "base_model: microsoft/phi-2" in card and "superseded" in card
    record = json.loads((merged / "provenance.json").read_text())
    assert record["files"]["stage4"]["files"]["stage4.pth"]["sha256"] and record["versions"]["torch"]
    assert record["command"][:2] == ["minigpt3d", "convert"] and not any("/" in word for word in record["command"])
    assert record["dtype"] == "float32" and record["lora"] == "merge"
    assert record["origins"]["model.query_experts.0.weight"] == "stage4: query_tokens"
    assert AutoProcessor.from_pretrained(merged).point_token_id == 293


def test_base_and_adapter_have_cards_of_their_own(kept):
    base, adapter = ((kept / part / "README.md").read_text() for part in ("base", "adapter"))
    assert base != adapter and "library_name: peft" in adapter
    for card in (base, adapter):
        assert "license: cc-by-nc-sa-4.0" in card and "superseded" in card
    for name in ("LICENSE", "NOTICE", "provenance.json"):
        assert (kept / "adapter" / name).read_bytes() == (kept / "base" / name).read_bytes()
    assert {path.name for path in kept.iterdir()} == {"base", "adapter"}


def test_a_model_is_replaced_only_if_asked(merged, make_command, released, run):
    before = contents_of(merged)
    code, printed = run(make_command(released, merged))
    assert code == 1 and "--overwrite" in printed
    assert contents_of(merged) == before


def convert_until_weights(command: list[str]):
    """In a process of its own, which is killed where the first weights would be written."""
    write.save_file = lambda *args, **options: os._exit(9)
    main(command)


def test_a_killed_conversion_leaves_the_old_folder(merged, make_command, released, tmp_path):
    out = shutil.copytree(merged, tmp_path / "out")
    before = contents_of(out)
    command = make_command(released, out, "--overwrite")
    process = get_context("fork").Process(target=convert_until_weights, args=(command,))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 9
    assert contents_of(out) == before and len(list(tmp_path.iterdir())) == 3, (
        "out, and what the killed run left, with its lock"
    )
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_bytes() == before["model.safetensors"]


# ---- Download --------------------------------------------------------------------------------------------------------

# argv: address of BLIP-2's file, and a command. First without consent, then with it.
DOWNLOAD = """
import sys
from minigpt3d.conversion import download
download.BLIP2_URL = sys.argv.pop(1)
from minigpt3d.cli.main import main
print("exit code", main(sys.argv[1:]), flush=True)
sys.exit(main([*sys.argv[1:], "--yes"]))
"""


@pytest.mark.slow
def test_without_paths_the_release_is_downloaded(released, merged, make_command, tmp_path):
    """From a Hub on loopback; the download of BLIP-2's file, which is not on the Hub, is resumed."""
    files = {PATHS[slot]: path.read_bytes() for slot, path in released.items() if slot not in ("phi", "blip2")}
    files |= {PATHS["phi"] + path.name: path.read_bytes() for path in released["phi"].iterdir()}
    blip2 = released["blip2"].read_bytes()
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
        command = [sys.executable, "-c", DOWNLOAD, f"{hub.address}/blip2.pth", *make_command({}, out)]
        settings = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 240}
        done = subprocess.run(command, env=environment, **settings)
    assert done.returncode == 0, done.stderr
    shown, _, _ = done.stdout.partition("exit code 1")
    assert f"{AUTHORS_ID} at {revision}" in shown and "blip2" in shown and "in all" in shown
    assert "--yes" in done.stderr
    assert ("GET", "/blip2.pth", f"bytes={len(blip2) // 2}-", None) in hub.requests, (
        "the first half is not fetched again"
    )
    assert not any(token for _, path, _, token in hub.requests if path == "/blip2.pth"), "the Hub's token stays here"
    gets = [path for method, path, *_ in hub.requests if method == "GET"]
    second_run = [index for index, path in enumerate(gets) if path.startswith("/api/models/")][1]
    fetched = [index for index, path in enumerate(gets) if path.startswith("/store/") or "/resolve/" in path]
    assert len(fetched) == len(files) and min(fetched) > second_run, "nothing is fetched without consent"
    converted, expected = load_file(out / "model.safetensors"), load_file(merged / "model.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())
    record = json.loads((out / "provenance.json").read_text())["files"]
    assert record["stage4"]["source"] == f"{AUTHORS_ID}@{revision}/{PATHS['stage4']}"


def test_a_release_that_cannot_be_reached(make_command, tmp_path, run):
    code, printed = run(make_command({}, tmp_path / "out", "--yes"))  # the tests are offline
    assert code == 1 and "network" in printed


# ---- Verification ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verify_agrees(merged, run):
    code, printed = run(["verify", str(merged)])
    stored = json.loads((merged / "verification.json").read_text())
    assert code == 0, printed
    assert "agrees" in printed and f"{stored['parameters']:,} parameters, float32" in printed
    model = MiniGPT3DForConditionalGeneration.from_pretrained(merged)
    assert stored["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_the_adapter_is_verified_with_its_base(merged, kept):
    computed = verification.compute(kept)
    stored = json.loads((merged / "verification.json").read_text())
    for part in ("features", "logits"):
        assert computed[part] == pytest.approx(stored[part], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_verify_finds_what_changed(merged, tmp_path, run):
    """As if a library computed something else: the same weights, with an encoder that scales differently."""
    other = shutil.copytree(merged, tmp_path / "other")
    source = (other / "point_bert_minigpt3d.py").read_text()
    assert "self.scaling = self.head_dim**-0.5" in source
    (other / "point_bert_minigpt3d.py").write_text(source.replace("self.head_dim**-0.5", "self.head_dim**-0.4", 1))
    code, printed = run(["verify", str(other), "--trust-remote-code"])
    assert code == 1 and "features: off by" in printed


def finish_with(monkeypatch, code: int, output: str = "", error: str = ""):
    """Let the process that computes the digest end in this way."""
    done = subprocess.CompletedProcess([], code, output, error)
    monkeypatch.setattr("minigpt3d.conversion.verification.subprocess.run", lambda *args, **options: done)


def test_verify_without_something_to_compare_with(merged, tmp_path, run, monkeypatch):
    finish_with(monkeypatch, 0, (merged / "verification.json").read_text().replace("\n", " "))
    assert run(["verify", str(merged)])[0] == 0
    shutil.copyfile(merged / "config.json", tmp_path / "config.json")
    code, printed = run(["verify", str(tmp_path)])
    assert code == 1 and "nothing to compare with" in printed


def test_a_model_that_cannot_be_loaded_or_is_killed(merged, make_command, released, tmp_path, run, monkeypatch):
    finish_with(monkeypatch, 1, error="Traceback\nOSError: no weights")
    code, printed = run(["verify", str(merged)])
    assert code == 1 and "OSError: no weights" in printed
    finish_with(monkeypatch, -9, error="Loading weights: 40%")
    code, printed = run(make_command(released, tmp_path / "out", "--verify"))
    assert code == 1 and "not verified" in printed and "memory" in printed
    assert (tmp_path / "out" / "model.safetensors").exists(), "hours of work are kept"
    assert not (tmp_path / "out" / "verification.json").exists()


def test_verify_runs_no_strangers_code(merged, tmp_path, run):
    other = shutil.copytree(merged, tmp_path / "other")
    (other / "configuration_minigpt3d.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    for model in ("somebody/model", str(other)):
        code, printed = run(["verify", model])
        assert code == 1 and "--trust-remote-code" in printed
    assert not (tmp_path / "evil").exists()
    code, printed = run(["verify", "no-such-folder"])
    assert code == 1 and "no-such-folder" in printed
