"""Conversion of the authors' files without the command line: names, accounting, unsafe files, and what is written."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from release_files import release_contents, write_release_files
from safetensors.torch import load_file
from tiny_model import make_tiny_config

from minigpt3d.conversion import verification, write
from minigpt3d.conversion.download import find_release
from minigpt3d.conversion.names import NAMES, STAGE_3_TENSORS, STAGE_4_TENSORS, authors_name, our_name
from minigpt3d.conversion.release import ConversionPlan, make_plan, make_processor, release_sources, summary
from minigpt3d.conversion.state_dict import convert_state_dict
from minigpt3d.conversion.write import write_release
from minigpt3d.training.stages import RECIPES


LORA = "llama_model.base_model.model.model.layers.1.self_attn.dense.lora_A.default.weight"


def plan_conversion(paths: dict, **options) -> ConversionPlan:
    config = make_tiny_config()
    sources = release_sources(paths)
    return make_plan(sources, config, make_processor(paths["phi"], config), **options)


def read_merged(plan: ConversionPlan) -> dict[str, torch.Tensor]:
    """Copies of all tensors of the model."""
    read = plan.reader()
    return {name: read(name, merge_lora=True).clone() for name in plan.expected}


def assert_equal(tensors: dict, expected: dict):
    assert tensors.keys() == expected.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], expected[name])]
    assert not different


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_release_files(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def expected(golden):
    """The golden model with its LoRA products merged, which the goldens' own tests compute with."""
    return convert_state_dict(golden("full.state"), make_tiny_config())


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_names_are_inverse():
    for theirs in NAMES:
        for leaf in ("weight", "bias", "lora_A.default.weight"):
            name = f"{theirs}.{leaf}".replace("#", "3")
            if theirs != "query_tokens":
                assert authors_name(our_name(name)) == name
    assert our_name("llama_proj3.weight") is None and authors_name("model.unknown") is None


def test_stage_files_hold_what_the_stages_train():
    stages = RECIPES["paper"]
    assert sorted(STAGE_3_TENSORS) == sorted(stages["III"].trainable)
    assert sorted(STAGE_4_TENSORS) == sorted(stages["IV"].trainable)


# ---- Exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", ["fused", "official"])
def test_the_release_converts_to_the_golden_model(phi, expected, tmp_path):
    assert_equal(read_merged(plan_conversion(write_release_files(tmp_path / "release", phi=phi))), expected)


def test_old_and_new_peft_spellings(expected, tmp_path):
    contents = release_contents()
    for slot in ("tinygpt_v", "stage3"):
        contents[slot] = {key.replace(".default.", "."): tensor for key, tensor in contents[slot].items()}
    contents["blip2"] = {
        re.sub(r"\.(query|key|value)\.(weight|bias)$", r".\1.base_layer.\2", key): tensor
        for key, tensor in contents["blip2"].items()
    }
    assert_equal(read_merged(plan_conversion(write_release_files(tmp_path / "release", contents))), expected)


def test_biases_that_no_file_has_are_zero(tmp_path):
    contents = release_contents()
    biases = ("q_layernorm.bias", "k_layernorm.bias")
    contents["phi"] = {key: tensor for key, tensor in contents["phi"].items() if not key.endswith(biases)}
    plan = plan_conversion(write_release_files(tmp_path / "release", contents))
    assert len(plan.accounted.zeros) == 6 and all(name.endswith(biases) for name in plan.accounted.zeros)
    assert not any(plan.reader()(name).any() for name in plan.accounted.zeros)
    assert re.search("^6 parameters .*zero", summary(plan), re.M)


def test_half_precision_is_merged_before_it_is_cast(released, expected, tmp_path):
    write_release(plan_conversion(released), tmp_path / "out", torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in expected.items()}
    assert_equal(tensors, cast)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_hold_the_same(released, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_SIZE", 500_000)
    write_release(plan_conversion(released), tmp_path / "out", torch.float32)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert_equal({name: tensor for shard in shards for name, tensor in load_file(shard).items()}, expected)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(1e6, torch.float16, "too large for torch.float16"), (torch.nan, torch.float32, "not finite")],
)
def test_values_that_do_not_fit_are_refused(value, dtype, message, tmp_path):
    contents = release_contents()
    contents["phi"]["lm_head.weight"] = torch.full((300, 64), value)
    plan = plan_conversion(write_release_files(tmp_path / "release", contents))
    with pytest.raises(ValueError, match=message):
        write_release(plan, tmp_path / "out", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_a_full_disk_leaves_nothing(released, monkeypatch, tmp_path):
    plan = plan_conversion(released)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(OSError, match="GB free, the result needs"):
            write_release(plan, tmp_path / "out", torch.float32)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_file", fail)
    with pytest.raises(OSError, match="disk .* is full"):
        write_release(plan, tmp_path / "out", torch.float32)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (change("phi", "lm_head.bias", None), "phi: lm_head.bias is missing"),
        (change("blip2", "query_tokens", None), "blip2: query_tokens is missing"),
        (change("stage3", LORA, None), f"stage3: {LORA} is missing"),
        (change("stage4", "query_router.2.bias", None), "stage4: query_router.2.bias is missing"),
        (change("stage3", "llama_proj3.weight", torch.ones(2)), "stage3: llama_proj3.weight is no tensor"),
        (change("stage3", "query_router.0.bias", torch.ones(20)), "query_router.0.bias (model.router.linear_1.bias)"),
        (change("phi", "lm_head.bias", torch.ones(7)), "phi: lm_head.bias has shape (7,), the configuration needs (300,)"),
        (change("stage3", LORA, torch.ones(8, 3)), "their product does not fit (64, 64)"),
        (change("blip2", "query_tokens", torch.ones(1, 7, 32)), "blip2: query_tokens has shape (7, 32), the configuration needs (6, 32)"),
        (change("stage4", "query_router.0.bias", torch.ones(20, dtype=torch.int64)), "query_router.0.bias is int64, expected float16"),
        (change("blip2", "Qformer.bert.embeddings.LayerNorm.gamma", torch.ones(32)), "is not in this configuration"),
        (change("stage4", "query_expert_dict.0", torch.ones(1, 6, 32)), "query_expert_dict.0 should be the same tensor as query_tokens"),
        (change("point_encoder", "encoder.first_conv.1.running_var", None), "needs encoder.first_conv.1.running_var beside it"),
        (change("point_encoder", "encoder.second_conv.1.bias", torch.ones(7)), "have shapes that do not fit"),
        (change("point_encoder", "encoder.second_conv.3.bias", None), "encoder.second_conv.3.weight needs encoder.second_conv.3.bias"),
        (swap("stage3", "stage4"), "stage3: this looks like the file of `stage4`"),
        (swap("stage3", "stage4"), "stage4: this looks like the file of `stage3`"),
        (swap("blip2", "tinygpt_v"), "blip2: this looks like the file of `tinygpt_v`"),
        (change("phi", "model.layers.0.self_attn.q_proj.weight", torch.ones(64, 64)), "q_proj.weight needs model.layers.0.self_attn.k_proj.weight"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_add_up_are_named(mutate, message, tmp_path):
    paths = write_release_files(tmp_path / "release", mutate(release_contents()))
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_conversion(paths)


def test_all_problems_are_reported_at_once_and_can_be_ignored(tmp_path):
    contents = release_contents()
    contents["tinygpt_v"] |= {"Qformer.bert.pooler.weight": torch.ones(2), "strange.one": torch.ones(2)}
    contents["stage3"] |= {"strange.two": torch.ones(2)}
    paths = write_release_files(tmp_path / "release", contents)
    with pytest.raises(ValueError) as error:
        plan_conversion(paths)
    title, *problems, advice = str(error.value).splitlines()
    assert len(problems) == 3 and "`ignore`" in advice
    plan = plan_conversion(paths, ignore=["strange.*", "tinygpt_v:Qformer.bert.pooler.*", "nothing.*"])
    assert plan.unused_patterns == ["nothing.*"]
    assert sorted(plan.accounted.ignored) == [
        ("stage3", "strange.two"), ("tinygpt_v", "Qformer.bert.pooler.weight"), ("tinygpt_v", "strange.one")
    ]  # fmt: skip


def test_a_missing_tensor_can_be_ignored_where_another_file_has_it(tmp_path):
    contents = release_contents()
    older = contents["tinygpt_v"]["llama_proj.bias"]
    del contents["stage3"]["llama_proj.bias"]
    paths = write_release_files(tmp_path / "release", contents)
    with pytest.raises(ValueError, match="llama_proj.bias is missing"):
        plan_conversion(paths)
    plan = plan_conversion(paths, ignore=["stage3:llama_proj.bias"])
    assert torch.equal(plan.reader()("model.language_projection.linear_1.bias"), older)


def test_the_summary_counts_every_tensor(released):
    plan = plan_conversion(released)
    rows = [line.split() for line in summary(plan).splitlines()[1:7]]
    contents = release_contents()
    assert {row[0]: int(row[1]) for row in rows} == {slot: len(tensors) for slot, tensors in contents.items()}
    for slot, *counts in rows:
        total, *parts = map(int, counts)
        assert total == sum(parts), slot
    origins = {name: str(origin) for name, origin in plan.accounted.origins.items()}
    assert origins["model.query_experts.0.weight"] == "stage4: query_tokens"
    assert origins["model.qformer.encoder.layer.0.attention.attention.query.weight"].startswith("blip2: ")
    assert origins["model.language_model.layers.0.input_layernorm.weight"].startswith("stage3: ")
    assert re.search("^stage4 .*optimizer", summary(plan), re.M)


@pytest.mark.parametrize(
    ("left_out", "router", "message"),
    [
        (["blip2"], None, "`blip2`"),
        (["phi", "tinygpt_v"], None, "`phi`, `tinygpt_v`"),
        (["stage3"], None, "`stage3`"),
        (["stage4"], "sparse", "`stage4`"),
    ],
)
def test_missing_files_are_named(left_out, router, message, released):
    paths = {slot: path for slot, path in released.items() if slot not in left_out}
    with pytest.raises(ValueError, match=f"give {message}"):
        plan_conversion(paths, router=router)


# ---- Files from strangers --------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NOT_TENSORS = "expected a dictionary of tensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda paths, mark: torch.save({"model": {"a": Malicious(mark)}}, paths["stage3"]), "system"),
        (lambda paths, mark: paths["stage3"].write_bytes(pickle.dumps({"model": Malicious(mark)})), "system"),
        (lambda paths, mark: torch.save({"model": Malicious(mark)}, paths["stage3"], _use_new_zipfile_serialization=False), "system"),
        (lambda paths, mark: torch.save({"model": {1: torch.ones(2)}}, paths["stage3"]), NOT_TENSORS),
        (lambda paths, mark: torch.save({"model": {"a": torch.eye(2).to_sparse()}}, paths["stage3"]), NOT_TENSORS),
        (lambda paths, mark: torch.save({"model": [torch.ones(2)]}, paths["stage3"]), NOT_TENSORS),
        (lambda paths, mark: torch.save({"model": {}}, paths["stage3"]), NOT_TENSORS),
        (lambda paths, mark: torch.save([torch.ones(2)], paths["stage4"]), "holds a list"),
        (lambda paths, mark: torch.save({"state_dict": {}}, paths["stage4"]), "under 'model', got the keys state_dict"),
        (lambda paths, mark: torch.save({"model": release_contents()["stage4"], "ema": {"a": torch.ones(2)}}, paths["stage4"]), "tensors under 'ema'"),
        (lambda paths, mark: (paths["phi"] / "model.safetensors.index.json").write_text("{}"), "not an index of shards"),
        (lambda paths, mark: (paths["phi"] / "config.json").write_text("{"), "not JSON"),
        (lambda paths, mark: (paths["phi"] / "config.json").write_text('{"num_attention_heads": 8}'), "num_attention_heads is 8"),
        (lambda paths, mark: (paths["phi"] / "model.safetensors").unlink(), "holds no weights"),
        (lambda paths, mark: (paths["phi"] / "tokenizer.json").unlink(), "no tokenizer can be loaded"),
        (lambda paths, mark: truncate(paths["blip2"]), "blip2.pth .* truncated"),
        (lambda paths, mark: truncate(paths["phi"] / "model.safetensors"), "truncated"),
        (lambda paths, mark: paths["stage4"].write_text("<html>not found</html>"), "truncated"),
        (lambda paths, mark: paths["stage4"].write_bytes(b""), r"\(0 bytes\) is truncated"),
        (lambda paths, mark: paths["stage4"].unlink(), "no such file"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_trusted(spoil, message, tmp_path):
    paths = write_release_files(tmp_path / "release")
    spoil(paths, tmp_path / "mark")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan_conversion(paths)
    assert not (tmp_path / "mark").exists(), "code in the file was run"


# ---- Download and verification ---------------------------------------------------------------------------------------


def test_a_release_that_cannot_be_reached():
    with pytest.raises(ValueError, match="network"):
        find_release()  # the tests are offline


def stored_verification(**changes) -> dict:
    digest = [1.0, *[0.1] * 7]
    versions = {"torch": "2.13.0"}
    stored = {
        "parameters": 10,
        "dtype": "float32",
        "features": digest,
        "logits": digest,
        "text": "",
        "versions": versions,
    }
    return {key: value for key, value in (stored | changes).items() if value is not None}


def test_differences_are_compared_with_the_scale():
    stored = stored_verification()
    assert not verification.differences(stored_verification(features=[1.0, *[0.10005] * 7]), stored)
    (line,) = verification.differences(stored_verification(features=[1.0, *[0.1002] * 7]), stored)
    assert line.startswith("features")
    assert len(verification.differences(stored_verification(parameters=11, logits=[torch.nan] * 8), stored)) == 2


def test_a_stored_verification_is_read_back(tmp_path):
    verification.store(tmp_path, stored_verification())
    (tmp_path / "config.json").write_text("{}")
    assert verification.read_stored(tmp_path) == stored_verification()


@pytest.mark.parametrize("change", [{"features": [1.0]}, {"text": None}, {"dtype": "int8"}])
def test_a_damaged_verification_is_named(change, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    verification.store(tmp_path, stored_verification(**change))
    with pytest.raises(ValueError, match=verification.VERIFICATION_FILE):
        verification.read_stored(tmp_path)
