"""Whole runs: stages one after another, exports, and mistakes that are found before the first step."""

import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training_runs import ADAPTER, STAGES, history, logits, make_base, options, record, tiny, write
from transformers import AutoModelForImageTextToText

from minigpt3d.hub import find_model, load_weights
from minigpt3d.training import loop
from minigpt3d.training.loop import LossError, train
from minigpt3d.training.stages import learning_rate, select_trainable
from minigpt3d.training.weights import named_parameters, prepare_model


def test_a_dry_run_prints_time_and_memory_and_keeps_nothing(base, release, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    train(tiny(STAGES["II"], steps_per_epoch=60), options(base, tmp_path / "out", release, dry_run=True))
    printed = capsys.readouterr().out
    seconds, minutes = (float(x) for x in re.search(r"takes ([\d.]+) s .*take ([\d.]+) minutes", printed).groups())
    assert minutes == pytest.approx(seconds, abs=0.1) and "GB; 60 steps" in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def four_stages(tmp_path_factory, base, release):
    """The results of the four stages, each trained from the one before: adapters by name, and the complete model."""
    folder, adapters = base, {}
    for name in ("I", "II", "III", "IV"):
        stage = tiny(STAGES[name])
        output_dir = tmp_path_factory.mktemp("stages") / name
        folder = adapters[name] = train(stage, options(folder, output_dir, release, max_steps=2))
        assert [line["lr"] for line in history(folder)] == [learning_rate(stage, step) for step in range(2)]
    return adapters | {"IV": folder / "adapter"}, folder


def tensors_of(adapter) -> dict[str, torch.Tensor]:
    """Tensors of an adapter by their plain names."""
    return {name.removeprefix("base_model.model."): t for name, t in load_file(adapter / ADAPTER).items()}


def test_each_stage_changes_what_it_trains_and_nothing_else(base, four_stages):
    before = load_file(base / "model.safetensors")
    for name, adapter in four_stages[0].items():
        parameters = named_parameters(prepare_model(make_base(), tiny(STAGES[name])))
        tensors = tensors_of(adapter)
        changed = {key for key, tensor in tensors.items() if key not in before or not torch.equal(tensor, before[key])}
        new_factors = {key for key in parameters if "lora" in key} if name == "II" else set()
        assert changed and changed <= select_trainable(STAGES[name], parameters) | new_factors
        before = before | tensors
    assert not any("lora" in name for name in tensors_of(four_stages[0]["I"]))
    assert set(tensors) >= {name for name in named_parameters(make_base()) if re.search("router|query_experts", name)}


@pytest.mark.parametrize("name", ["I", "II", "III", "IV"])
def test_a_result_is_one_model_for_every_loader(name, base, four_stages, point_clouds):
    """Continued by the next stage, loaded by PEFT and by the Auto classes, and merged."""
    (adapters, whole), tensors = four_stages, tensors_of(four_stages[0][name])
    start = find_model(adapters[name])
    assert start.stage["stage"] == name and start.base == str(base)
    resumed = prepare_model(
        load_weights(start.base, dtype=torch.float32), tiny(STAGES[name]), start.adapter, start.stage
    )
    expected, parameters = logits(resumed, point_clouds), named_parameters(resumed)
    assert all(torch.equal(parameters[key], tensor) for key, tensor in tensors.items())
    loaded = AutoModelForImageTextToText.from_pretrained(adapters[name])
    torch.testing.assert_close(logits(loaded, point_clouds), expected, rtol=1e-5, atol=1e-6)
    wrapped = PeftModel.from_pretrained(load_weights(base, dtype=torch.float32), adapters[name])
    torch.testing.assert_close(logits(wrapped, point_clouds), expected, rtol=1e-5, atol=1e-6)
    if name == "IV":
        merged = load_weights(whole, dtype=torch.float32)
        assert merged.config.router_type == "sparse"
        torch.testing.assert_close(logits(merged, point_clouds), expected, rtol=1e-4, atol=1e-5)


def test_experts_start_as_copies_of_the_third_stages_queries(base, four_stages):
    start = find_model(four_stages[0]["III"])
    model = prepare_model(load_weights(base, dtype=torch.float32), tiny(STAGES["IV"]), start.adapter, start.stage)
    experts = [p for name, p in named_parameters(model).items() if "query_experts" in name]
    assert all(torch.equal(expert, experts[0]) for expert in experts)
    assert torch.equal(experts[0], tensors_of(start.adapter)["model.query_experts.0.weight"])


def test_a_stage_refuses_the_result_of_a_later_one(four_stages, release, tmp_path):
    with pytest.raises(ValueError, match="(?i)stage II.*`init`.*stage IV.*training.finetune"):
        train(tiny(STAGES["III"]), options(four_stages[1], tmp_path / "out", release))


def test_a_finished_model_trains_on_own_objects(four_stages, release, tmp_path, point_clouds):
    whole = four_stages[1]
    result = train(tiny(STAGES["own"]), options(whole, tmp_path / "own", release, max_steps=2))
    assert find_model(result).base == str(whole)
    loaded = AutoModelForImageTextToText.from_pretrained(result)
    assert loaded.config.router_type == "sparse"
    before = logits(load_weights(whole, dtype=torch.float32), point_clouds)
    assert not torch.equal(logits(loaded, point_clouds), before)


def test_export_merges_any_stage(base, release, tmp_path, point_clouds):
    folder = train(tiny(STAGES["II"]), options(base, tmp_path / "II", release, max_steps=2, export=True))
    adapter = AutoModelForImageTextToText.from_pretrained(folder / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(folder)
    torch.testing.assert_close(logits(merged, point_clouds), logits(adapter, point_clouds), rtol=1e-4, atol=1e-5)
    assert {"README.md", "curves.png", "history.jsonl", "stage.json", "processor_config.json"} <= set(
        os.listdir(folder)
    )


def test_a_missing_start_is_reported(base, release, tmp_path):
    for init, message in (
        (tmp_path / "none", "no folder"),
        ("nonsense", "no folder.*OWNER/NAME"),
        (tmp_path, "config.json.*PEFT adapter"),
    ):
        with pytest.raises(ValueError, match=f"`init`.*{message}"):
            train(tiny(STAGES["I"]), options(init, tmp_path / "out", release))
    folder = train(tiny(STAGES["I"]), options(shutil.copytree(base, tmp_path / "base"), tmp_path / "I", release))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="`init`.*base_model_name_or_path"):
        train(tiny(STAGES["II"]), options(folder, tmp_path / "out", release))


@pytest.mark.parametrize(
    ("records", "message"),
    [([record("o0")], "'detailed' conversations"), ([record("o0"), record("ghost")], "1 of 2 .*'ghost'")],
)
def test_incomplete_data_is_reported_before_the_model_is_loaded(
    records, message, base, release, tmp_path, monkeypatch
):
    monkeypatch.delattr(loop, "load_stage_model")
    annotations = [write(tmp_path / "annotations.json", records)]
    stage = tiny(STAGES["III" if len(records) == 1 else "I"])
    with pytest.raises(ValueError, match=message):
        train(stage, replace(options(base, tmp_path / "out", release), annotations=annotations))


def test_a_nan_loss_stops_the_run(base, release, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", lambda *args: torch.tensor([float("nan"), 1.0]))
    with pytest.raises(LossError, match="step 0 .*nan"):
        train(tiny(STAGES["I"]), options(base, tmp_path / "out", release))
    assert not (tmp_path / "out").exists()
