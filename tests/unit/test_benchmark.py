"""The benchmarks run, and what they compare agrees. Times are not checked."""

import importlib.util
import json
import math
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import make_tiny_config

from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor
from minigpt3d.training.stages import RECIPES


MAX_OPERATORS = 7_500
CARD_BATCHES = {
    "stage_I": 9,
    "stage_II": 9,
    "stage_III": 6,
    "stage_IV": 6,
    "four_bit": 9,
    "checkpointing": 9,
    "compile": 9,
}
FOLDER = Path(__file__).parents[2] / "benchmarks"


@contextmanager
def loaded(name: str):
    """A benchmark as a module, with its folder on the import path."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def encode():
    with loaded("encode") as module:
        yield module


def test_ways_to_train_have_the_same_loss():
    stage, config = RECIPES["paper"]["II"], make_tiny_config(router_type="none")
    model = MiniGPT3DForConditionalGeneration(config).eval()
    with loaded("train") as train:
        batches = [train.make_samples(stage, config, 2, 128, np.random.default_rng(0))]
        ways = train.make_ways(model)
        train.run(model, stage, batches, ways, torch.device("cpu"), torch.float32)
    losses = [way.loss for way in ways.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4) and all(way.operators for way in ways.values())


@pytest.fixture(scope="module")
def generate():
    with loaded("generate") as module:
        yield module


def test_plain_and_ours_agree(encode):
    model = encode.make_model(make_tiny_config())
    rows = encode.run(model, encode.make_point_clouds(batch_size=3, num_points=256), repeats=1)
    assert [row.part for row in rows] == [
        "grouping",
        "mini-PointNet",
        "transformer",
        "point encoder as a whole",
        "Q-Former, none",
        "Q-Former, sparse",
        "Q-Former, soft",
        "cloud to vectors, sparse",
        "the same, ours in bf16",
    ]
    assert all(row.difference <= encode.FP32_TOLERANCE for row in rows[:-1])
    assert all(row.plain_seconds > 0 and row.ours_seconds > 0 for row in rows)
    table = encode.format_table(rows).splitlines()
    assert len(table) == 2 + len(rows)


def test_a_difference_ends_the_run(encode, monkeypatch):
    model = encode.make_model(make_tiny_config())
    right = model.get_query_output

    def wrong(features, **kwargs):
        output = right(features, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1.001
        return output

    monkeypatch.setattr(model, "get_query_output", wrong)
    with pytest.raises(RuntimeError, match="Q-Former, none: ours differs"):
        encode.run(model, encode.make_point_clouds(batch_size=2, num_points=128), repeats=1)


def test_clouds_are_normalized(encode):
    point_clouds = encode.make_point_clouds(batch_size=2, num_points=500)
    assert point_clouds.shape == (2, 500, 6)
    assert torch.allclose(point_clouds[..., :3].mean(1), torch.zeros(2, 3), atol=1e-6)
    assert torch.allclose(point_clouds[..., :3].norm(dim=-1).amax(1), torch.ones(2))
    assert point_clouds[..., 3:].min() >= 0 and point_clouds[..., 3:].max() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batches", "0"], "at least 1, got '0'"),
        (["--repeats", "x"], "at least 1, got 'x'"),
        (["--model", "nope"], "folder nope"),
    ],
)
def test_wrong_arguments_are_reported(generate, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        generate.main(arguments)
    assert message in f"{end.value.code} {capsys.readouterr().err}"


# ---- Generation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    folder = FOLDER.parent / "checkpoints" / "household"
    model = MiniGPT3DForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, MiniGPT3DProcessor.from_pretrained(folder)


def test_stopping_gives_the_same_texts(generate, bundled):
    model, processor = bundled
    inputs = generate.make_inputs(processor, 4, "What is this?", model.device)
    assert inputs["point_clouds"].shape == (4, 1024, 6)
    rows = generate.run(model, processor, inputs, max_new_tokens=20, repeats=1)
    assert [row.way for row in rows] == ["limit", "stop", "stop, static cache", "stop, bf16"]
    assert all(row.batch == 4 and row.objects_per_second > 0 for row in rows)
    assert [row.same_texts for row in rows[:3]] == [1, 1, 1] and rows[0].ratio == 1
    per_object = [row.tokens_per_second / row.objects_per_second for row in rows]
    assert per_object[:3] == pytest.approx([20, per_object[1], per_object[1]]) and 3 < per_object[1] < 15
    assert model.dtype == torch.float32
    assert len(generate.format_table(rows).splitlines()) == 2 + len(rows)


def test_other_texts_end_the_run(generate, bundled, monkeypatch):
    model, processor = bundled
    right = model.generate

    def wrong(stop_strings=None, **kwargs):
        answers = right(stop_strings=stop_strings, **kwargs)
        return answers[:, :-3] if stop_strings else answers

    monkeypatch.setattr(model, "generate", wrong)
    inputs = generate.make_inputs(processor, 2, "What is this?", model.device)
    with pytest.raises(RuntimeError, match="stop: .*limit"):
        generate.run(model, processor, inputs, max_new_tokens=20, repeats=1)


def test_a_training_step_never_waits_for_the_device():
    """At full depth, with LoRA. What it counted before these numbers were read late: 18 waits and 9,980 operators."""
    with loaded("operators") as operators:
        counter = operators.count_step(RECIPES["paper"]["II"], batch=3)
    assert not counter.waits
    assert counter.operators.total() < MAX_OPERATORS


# ---- On a GPU, here at tiny size --------------------------------------------------------------------------------------


def card_lines(card, out, *parts, minutes="8") -> tuple[int, dict[str, dict]]:
    """Exit code of the command, and its lines by part."""
    code = card.main(["--only", *parts, "--minutes", minutes, "--out", str(out)])
    return code, {line["part"]: line for line in map(json.loads, out.read_text().splitlines())}


@pytest.mark.slow
def test_the_card_measures_part_by_part(tmp_path, capsys, monkeypatch, launched):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launched(use_cpu="true")
    with loaded("card") as card:
        parts = tuple(card.PARTS)
        code, lines = card_lines(card, tmp_path / "card.jsonl", *parts)
    assert code == 0 and tuple(lines) == parts
    assert [json.loads(line)["part"] for line in capsys.readouterr().out.splitlines()] == list(parts)
    assert lines["grouping"]["sampling_real"] == lines["grouping"]["neighbors_real"] == 1
    assert lines["encoder"]["difference_float32"] <= 1e-5 < lines["encoder"]["difference_bfloat16"]
    left_out = {"fsdp2", "flash", "other_gpus"} | (set() if find_spec("bitsandbytes") else {"four_bit"})
    assert {name for name in parts if lines[name]["status"] != "done"} == left_out
    assert all(lines[name]["reason"] for name in left_out)
    assert lines["setup"]["model"] == "tiny" and lines["answers"]["same_float32"] == 1
    for name, batch in CARD_BATCHES.items():
        if name in left_out:
            continue
        assert lines[name]["batch"] == batch
        assert lines[name]["loss"] == pytest.approx([math.log(512)] * 2, rel=0.02), "of random weights"
        assert lines[name]["samples_per_second"] > 0 and lines[name]["waits"] == 0
    assert lines["describe"]["files"] == 2
    assert {row["way"] for row in lines["generation"]["rows"]} >= {"limit", "stop"}
    assert lines["speed"]["rows"][0]["part"] == "grouping"


def test_the_card_tells_wrong_failed_and_late_parts(tmp_path, monkeypatch):
    def fail(card):
        raise RuntimeError("no kernel image")

    with loaded("card") as card:
        wrong_parts = {"setup": lambda card: {"wrong": ["sampling differs"], "share": math.nan}, "encoder": fail}
        for name, part in wrong_parts.items():
            monkeypatch.setitem(card.PARTS, name, part)
        code, lines = card_lines(card, tmp_path / "card.jsonl", "setup", "encoder")
        late_code, late = card_lines(card, tmp_path / "late.jsonl", "setup", minutes="1e-9")
    assert code == 1 and late_code == 0
    assert lines["setup"]["status"] == "wrong" and lines["setup"]["share"] is None
    assert lines["encoder"]["status"] == "failed" and "no kernel image" in lines["encoder"]["reason"]
    assert "in fail" in lines["encoder"]["traceback"]
    assert late["setup"]["status"] == "left out" and "--minutes" in late["setup"]["reason"]
