"""Training: the stage table against the paper's facts, data, what moves in a step, resuming, and stages one after another."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from tiny_model import make_tiny_config, make_tiny_model
from training_runs import (
    ADAPTER,
    KINDS,
    STAGES,
    first_batches,
    history,
    logits,
    open_stream,
    options,
    prepared,
    record,
    tiny,
    write,
)
from transformers import AutoModelForImageTextToText, GPT2Config, LlamaConfig, Qwen3Config

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.conversion import authors_name
from minigpt3d.conversion.lora import lora_targets
from minigpt3d.data.clouds import augment, read_point_cloud
from minigpt3d.data.records import read_annotations, to_messages
from minigpt3d.hub import find_model, load_weights
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.training import loop, weights
from minigpt3d.training.loop import make_optimizer, train, train_step
from minigpt3d.training.run_state import list_checkpoints
from minigpt3d.training.stages import Lora, Source, learning_rate, select_trainable
from minigpt3d.training.stream import pack_batch, pad_batch
from minigpt3d.training.weights import (
    Start,
    adapter_names,
    gather_parameters,
    lora_scales,
    named_parameters,
    prepare_model,
    save_adapter,
    trainable_table,
)


FACTS = {"I": "stage_1", "II": "stage_2", "III": "stage_3", "IV": "stage_4"}


# The stage table


@pytest.mark.parametrize("name", FACTS)
def test_trainable_parameters_are_the_papers(name, golden):
    """At full size: names, shapes and counts of facts/trainable_full.json, one to one."""
    facts = golden("trainable_full.json")[FACTS[name]]
    with torch.device("meta"):
        model = prepare_model(MiniGPT3DForConditionalGeneration(MiniGPT3DConfig(router_type="none")), STAGES[name])
    ours = {authors_name(n): list(p.shape) for n, p in named_parameters(model).items() if p.requires_grad}
    theirs = facts["trainable_shapes"]
    assert ours.keys() == theirs.keys()
    for key, shape in theirs.items():  # their query tokens have a batch dimension
        assert ours[key] == (shape[1:] if key.startswith("query_") and len(shape) == 3 else shape), key
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = {"I": 1_378_432, "II": 47_417_984, "III": 47_417_984, "IV": 395_528}[name]
    assert total == expected == facts["trainable_total"]
    assert f"{expected:,}" in trainable_table(model).splitlines()[-1]


def test_union_of_the_stages_is_the_papers(golden):
    facts = golden("trainable_full.json")
    assert facts["union"]["total"] == 47_788_936
    with torch.device("meta"):
        model = prepare_model(MiniGPT3DForConditionalGeneration(MiniGPT3DConfig(router_type="none")), STAGES["II"])
    sizes = {name: parameter.numel() for name, parameter in named_parameters(model).items()}
    union = set().union(*(select_trainable(stage, sizes) for stage in STAGES.values()))
    assert sum(sizes[name] for name in union) == 47_788_936


def test_learning_rates_are_the_authors(golden):
    facts = golden("data_facts.json")["lr_schedule"]["values"]
    for name, key in FACTS.items():
        for value in facts[key]["values"]:
            assert learning_rate(STAGES[name], value["global_step"]) == pytest.approx(value["lr"], rel=1e-12)
    case = facts["synthetic_warmup_crosses_epoch"]
    stage = replace(
        STAGES["I"],
        peak_lr=case["init_lr"],
        min_lr=case["min_lr"],
        warmup_lr=case["warmup_lr"],
        warmup_steps=case["warmup_steps"],
        steps_per_epoch=case["iters_per_epoch"],
        epochs=case["max_epoch"],
    )
    rates = [learning_rate(stage, step) for step in range(stage.steps)]
    assert rates == pytest.approx(case["values"], rel=1e-12)


def test_paper_sees_a_million_and_a_half_samples():
    def samples(stage):
        weights = sum(source.weight for source in stage.mixture)
        return stage.steps * sum(source.batch * source.weight for source in stage.mixture) / weights

    assert sum(samples(STAGES[name]) for name in FACTS) == pytest.approx(1.53e6, rel=0.01)


def test_a_pattern_that_matches_nothing_is_an_error():
    stage = replace(STAGES["I"], trainable=(r"model\.point_projection\..*", r"model\.proj2\..*"))
    with pytest.raises(ValueError, match=r"model\\\\\.proj2.*matches none of the model's 1 parameters"):
        select_trainable(stage, ["model.point_projection.linear_1.weight"])


@pytest.mark.parametrize(("config", "per_layer"), [(LlamaConfig, 2), (Qwen3Config, 4)])
def test_other_language_models_train_too(config, per_layer):
    """LoRA finds the attention and the norms of other families."""
    text_config = config(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    model = prepare_model(
        make_tiny_model(make_tiny_config(router_type="none", text_config=text_config)), tiny(STAGES["II"])
    )
    trainable = [name for name, p in named_parameters(model).items() if p.requires_grad and "language_model" in name]
    assert sum("lora_A" in name for name in trainable) == 2 * 4
    assert sum("lora" not in name for name in trainable) == 2 * per_layer + 1


def test_unknown_language_model_is_named():
    with pytest.raises(ValueError, match=r"'gpt2'.*LANGUAGE_LORA_TARGETS"):
        lora_targets(GPT2Config().model_type)


# Data


def test_annotations_are_read_as_the_authors_read_them(golden, tmp_path):
    facts = golden("data_facts.json")["dataset_items"]
    samples = read_annotations([write(tmp_path / "a.json", facts["annotations"])])
    assert {source: len(s) for source, s in samples.items()} == {
        "brief": 1,  # the record without a type; the two corrupt objects are gone
        "detailed": 0,
        "single_round": 1,
        "multi_round": 1,
    }
    for source in ("brief", "single_round"):
        item, (sample,) = facts["items"][KINDS[source]]["item"], samples[source]
        assert f"<PC><PointCloudHere></PC> {sample.rounds[0][0]} " == item["instruction_input"]
        assert (sample.rounds[0][1], sample.object_id) == (item["answer"], item["PC_id"])
    item, (sample,) = facts["items"]["multi_round"]["item"], samples["multi_round"]
    questions, answers = zip(*sample.rounds, strict=True)
    assert "<PC><PointCloudHere></PC> " + "!@#".join(f"{q} " for q in questions) == item["conv_q"]
    assert "!@#".join(answers) == item["conv_a"]
    roles = [(m["role"], [part["type"] for part in m["content"]]) for m in to_messages(sample)]
    assert roles == [("user", ["point_cloud", "text"]), ("assistant", ["text"])] + 2 * [
        ("user", ["text"]),
        ("assistant", ["text"]),
    ]


BROKEN = {
    "no list": ({"a": 1}, "expected a JSON list"),
    "no JSON": ("{", "not a JSON file"),
    "no id": ([{"conversations": []}], "record 0: expected an object with a string 'object_id'"),
    "kind": ([record(kind="poem")], "object_id 'a'.*conversation_type must be one of.*'poem'"),
    "odd": ([record() | {"conversations": record()["conversations"][:1]}], "object_id 'a'.*question and answer"),
    "order": ([record() | {"conversations": record()["conversations"][::-1]}], "object_id 'a'.*'from': 'human'"),
    "no <point>": (
        [record(rounds=[("<point> twice", "yes")])],
        "object_id 'a'.*'<point>' must stand once, in the first question",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_annotations_name_the_object(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_annotations([write(tmp_path / "a.json", content)])


@pytest.mark.parametrize(
    ("cloud", "message"),
    [
        (np.zeros((8, 3)), r"shape \(points, 6\), got \(8, 3\)"),
        (np.full((8, 6), np.nan), "NaN"),
        (np.full((8, 6), 255.0), r"colors in \[0, 1\]"),
        (np.array([{}]), "cannot read"),
        (None, "cannot read"),
    ],
)
def test_broken_clouds_name_the_object(cloud, message, tmp_path):
    if cloud is not None:
        np.save(tmp_path / "a_8192.npy", cloud)
    with pytest.raises(ValueError, match=rf"object_id 'a'.*{message}"):
        read_point_cloud(tmp_path, "a")


def test_augmented_clouds_are_seeded_and_of_the_same_kind():
    rng = np.random.default_rng(0)
    cloud = np.concatenate([rng.normal(size=(200, 3)) * [1, 3, 1], rng.random((200, 3))], 1).astype(np.float32)
    before = cloud.copy()
    again = [augment(cloud, np.random.default_rng(seed)) for seed in range(40)]
    assert (cloud == before).all()
    for seed, one in enumerate(again):
        assert one.shape == cloud.shape and one.dtype == np.float32
        assert (one == augment(cloud, np.random.default_rng(seed))).all()
        assert 0 <= one[:, 3:].min() and one[:, 3:].max() <= 1
        assert one[:, 1].std() > 1.5 * max(one[:, 0].std(), one[:, 2].std())  # what was upright still is
        assert np.isin(one[:, 3:], cloud[:, 3:]).all()  # what is said of its colours still is true
    fewer = sum(len(np.unique(one, axis=0)) < 200 for one in again)
    assert 10 < fewer < 40


def test_processes_share_the_steps_and_epochs_go_through_everything(release, tiny_processor):
    stage = tiny(STAGES["III"], steps_per_epoch=30)
    whole = open_stream(stage, release, tiny_processor)
    shares = [open_stream(stage, release, tiny_processor, process_index=rank, num_processes=2) for rank in range(2)]
    assert [list(share.slots(0)) for share in shares] == [[0, 2], [1]]
    for rank, share in enumerate(shares):
        assert share.source_name(0) == whole.source_name(0)
        for slot in share.slots(0):
            ours, theirs = share.encode(0, slot), whole.encode(0, slot)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), (rank, slot)
    seen = {name: [] for name in whole.sources}
    for step in range(30):
        name = whole.source_name(step)
        for slot in whole.slots(step):
            _, row = whole.orders[name].address(int(whole.turns[step, 0]), slot)
            seen[name].append(row)
    for rows in seen.values():
        assert sorted(rows[:6]) == sorted(rows[6:12]) == list(range(6))
        assert rows[:6] != rows[6:12]


def test_sources_can_be_drawn_for_each_sample(release, tiny_processor):
    stage = tiny(STAGES["III"], steps_per_epoch=400, draw_each="sample")
    stream = open_stream(stage, release, tiny_processor)
    weights = np.array([source.weight for source in stage.mixture])
    assert stream.draws.shape == (400, 3) and stream.source_name(0) == "mixed"
    shares = np.bincount(stream.draws.ravel()) / stream.draws.size
    assert np.abs(shares - weights / weights.sum()).max() < 0.05
    assert (stream.draws != stream.draws[:, :1]).any(), "within a step too"
    for index, source in enumerate(stage.mixture):  # each source goes through all its rows before one comes again
        turns = stream.turns[stream.draws == index]
        assert (turns == np.arange(len(turns))).all()
        rows = [stream.orders[source.name].address(int(turn), 0)[1] for turn in turns[:12]]
        assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    kinds = {len(stream.encode(step, slot)["labels"]) for step in range(5) for slot in range(3)}
    assert len(kinds) > 1
    with pytest.raises(ValueError, match="give all sources the same batch"):
        open_stream(replace(STAGES["III"], draw_each="sample"), release, tiny_processor)


# One step


@pytest.mark.parametrize("name", STAGES)
def test_a_step_moves_exactly_the_tables_parameters(name, release, tiny_processor):
    stage = tiny(STAGES[name])
    accelerator = Accelerator(cpu=True)
    model = prepared(stage)
    before = {name: parameter.clone() for name, parameter in named_parameters(model).items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model, optimizer = accelerator.prepare(model, make_optimizer(stage, model))
    train_step(accelerator, model, optimizer, first_batches(stage, release, tiny_processor), lr=1e-2)
    moved = {name for name, p in named_parameters(model).items() if not torch.equal(p, before[name])}
    assert moved == select_trainable(stage, before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("name", STAGES)
def test_every_trainable_parameter_gets_a_gradient(name, release, tiny_processor):
    """… and nothing else does: the encoder, and what lies below the trained parts, is outside the graph."""
    stage = replace(tiny(STAGES[name]), router_type="soft" if name == "IV" else "none")
    model = prepared(stage)
    (samples,) = first_batches(stage, release, tiny_processor)
    batch = pack_batch(samples)
    model(**batch).loss.backward()
    for parameter_name, parameter in named_parameters(model).items():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
        else:
            assert parameter.grad is None, parameter_name
    assert not model.get_submodule(
        "base_model.model.model.point_encoder" if stage.trains_lora else "model.point_encoder"
    )(batch["point_clouds"]).requires_grad


def test_weight_decay_acts_on_matrices_only():
    stage = tiny(STAGES["II"])
    decayed, others = make_optimizer(stage, prepared(stage)).param_groups
    assert decayed["weight_decay"] == 0.05 and all(p.ndim >= 2 for p in decayed["params"])
    assert others["weight_decay"] == 0 and all(p.ndim < 2 for p in others["params"])
    assert decayed["betas"] == (0.9, 0.999)


def test_dropout_acts_where_the_authors_have_it(point_clouds):
    """LoRA's in training; the Q-Former's own never, whatever its configuration says; none in evaluation."""
    config = make_tiny_config(router_type="none")
    config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = 0.5

    def repeats(model):
        features = model.base_model.model if hasattr(model, "merge_and_unload") else model
        return torch.equal(features.get_point_features(point_clouds), features.get_point_features(point_clouds))

    assert repeats(prepare_model(make_tiny_model(config), tiny(STAGES["I"])))
    model = prepare_model(make_tiny_model(config), tiny(STAGES["II"]))
    for name, parameter in named_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    assert not repeats(model)
    assert repeats(model.eval())


def test_accumulated_gradients_equal_the_whole_batch(release, tiny_processor):
    """Micro-batches with unequal numbers of answer tokens: the same loss, the same step."""
    stage = tiny(STAGES["I"])
    accelerator = Accelerator(cpu=True)
    results = []
    for device_batch in (None, 2):
        model = make_tiny_model(make_tiny_config(router_type="none"))
        model.config.text_config.resid_pdrop = 0.0
        model = prepare_model(
            make_tiny_model(make_tiny_config(router_type="none", text_config=model.config.text_config)), stage
        )
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
        batches = first_batches(stage, release, tiny_processor, device_batch=device_batch)
        loss, _ = train_step(accelerator, model, optimizer, batches, lr=1.0)
        results.append((loss, [p.detach().clone() for p in model.parameters() if p.requires_grad]))
    (loss, whole), (loss_of_parts, parts) = results
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["II", "IV"])
def test_packed_batches_equal_padded_ones(name, release, tiny_processor):
    """Loss and gradients, with several samples in a row, and with all in one."""
    stage = replace(tiny(STAGES[name]), mixture=(Source("multi_round", batch=6, weight=1),))
    stream = open_stream(stage, release, tiny_processor)
    samples = [stream.encode(0, slot) for slot in stream.slots(0)]
    model = prepared(stage).eval()
    results = []
    for batch in (pad_batch(samples, 292), pack_batch(samples), pack_batch(samples, one_row=True)):
        model.zero_grad()
        output = model(**batch, use_cache=False)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.loss.detach(), gradients, batch["input_ids"].shape, output.logits.shape))
    (loss, gradients, padded, _), *others = results
    assert len(others[1][1]) == len(gradients) and others[1][2][0] == 1 and others[0][2][0] < padded[0]
    for packed_loss, packed_gradients, _, answer_logits in others:
        torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-6)
        assert answer_logits[1] == sum((sample["labels"] != -100).sum() for sample in samples), (
            "no logits but the answers'"
        )
        for parameter, gradient in gradients.items():
            scale = gradient.abs().max() + 1e-12
            assert (packed_gradients[parameter] - gradient).abs().max() <= 1e-5 * scale + 1e-8, parameter


# Whole runs


def same_files(one, other) -> bool:
    return (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()


def test_a_killed_run_goes_on_exactly(base, release, tmp_path, monkeypatch):
    """Twice the same run gives the same bits, and so does a run killed behind its checkpoint and resumed."""
    stage = tiny(STAGES["II"], augment=True)
    straight = train(stage, options(base, tmp_path / "straight", release))
    again = train(stage, options(base, tmp_path / "again", release, num_workers=2))
    assert same_files(straight, again) and history(straight) == history(again)

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_step(*args)

    calls = []
    monkeypatch.setattr(loop, "train_step", killed)
    run = options(base, tmp_path / "killed", release, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(stage, run)
    monkeypatch.undo()
    assert not (tmp_path / "killed").exists()
    with pytest.raises(ValueError, match="unfinished run.*--resume auto"):
        train(stage, run)
    with pytest.raises(ValueError, match="seed 42, but now it is 1"):
        train(stage, replace(run, resume="auto", seed=1))
    resumed = train(stage, replace(run, resume="auto"))
    assert same_files(straight, resumed) and history(straight) == history(resumed)
    assert not (tmp_path / "killed.unfinished").exists()


def test_twenty_kills_at_random_moments_lose_nothing(base, release, tmp_path):
    """kill -9, twenty times, then the end: the same bits as the run never stopped."""
    stage = tiny(STAGES["III"], steps_per_epoch=120)
    straight = train(stage, options(base, tmp_path / "straight", release))
    run = options(base, tmp_path / "killed", release, save_every=1, resume="auto")
    rng, kept, lines = np.random.default_rng(0), [], tmp_path / "killed.unfinished" / "history.jsonl"

    def count_lines(path) -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for _ in range(20):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                train(stage, run)
            finally:
                os._exit(0)
        wanted = count_lines(lines) + rng.integers(0, 5)  # some steps on, at no particular moment of the next
        deadline = time.monotonic() + 30
        while count_lines(lines) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if (tmp_path / "killed").exists():
            break
        newest = list_checkpoints(tmp_path / "killed.unfinished")
        kept.append(int(newest[0].name.removeprefix("checkpoint-")) if newest else 0)
        assert count_lines(lines) - kept[-1] <= 1, "lost is at most the step behind the last checkpoint"
    assert len(kept) == 20 and kept == sorted(kept) and len(set(kept)) > 5, "the kills came in the middle"
    if not (tmp_path / "killed").exists():
        train(stage, run)
    assert same_files(straight, tmp_path / "killed") and history(straight) == history(tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_last_step(number, base, release, tmp_path, monkeypatch):
    stage = tiny(STAGES["I"])
    straight = train(stage, options(base, tmp_path / "straight", release))
    calls = []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 2:
            for process in (*psutil.Process().children(), psutil.Process()):  # schedulers tell all of them
                process.send_signal(number)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", signalled)
    before = signal.getsignal(number)
    run = options(base, tmp_path / "stopped", release, num_workers=2)
    with pytest.raises(loop.Stopped, match="Stopped at step 2 .*--resume auto"):
        train(stage, run)
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    resumed = train(stage, replace(run, resume="auto"))
    assert same_files(straight, resumed)
    assert history(straight) == history(resumed)


def test_damaged_checkpoints_are_passed_over(base, release, tmp_path, monkeypatch, capsys):
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(stage, run)
    monkeypatch.undo()
    work_dir = tmp_path / "out.unfinished"
    assert sorted(path.name for path in work_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    state = work_dir / "checkpoint-3" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-10])
    kept = shutil.copytree(work_dir, tmp_path / "kept")
    resumed = train(stage, replace(run, resume="auto"))
    printed = capsys.readouterr().out
    assert "checkpoint-3 is damaged (optimizer.pt has changed)" in printed and "checkpoint-2 at step 2" in printed
    straight = train(stage, options(base, tmp_path / "straight", release))
    assert same_files(straight, resumed)

    shutil.rmtree(resumed)
    kept.rename(work_dir)
    (work_dir / "checkpoint-2" / "stage.json").write_text("{")
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged"):
        train(stage, replace(run, resume="auto"))


def test_a_dry_run_says_what_the_stage_needs_and_keeps_nothing(base, release, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    train(tiny(STAGES["II"], steps_per_epoch=60), options(base, tmp_path / "out", release, dry_run=True))
    printed = capsys.readouterr().out
    seconds, minutes = (float(x) for x in re.search(r"takes ([\d.]+) s .*take ([\d.]+) minutes", printed).groups())
    assert minutes == pytest.approx(seconds, abs=0.1) and "GB; 60 steps" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_keeps_the_checkpoint_before(base, release, tmp_path, monkeypatch):
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1)
    save = weights.save_file

    def full(tensors, path, **kwargs):
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path, **kwargs)

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="is full; free some space"):
        train(stage, run)
    assert [path.name for path in (tmp_path / "out.unfinished").glob("*checkpoint*")] == ["checkpoint-1"]
    monkeypatch.undo()
    train(stage, replace(run, resume="auto"))


def test_four_stages_one_after_another(base, release, tmp_path, point_clouds):
    """Each starts from the adapter of the one before and goes on with its factors; the experts start from stage III's."""
    folder, folders = base, {}
    for name in STAGES:
        if name != "own":
            stage = tiny(STAGES[name])
            folder = folders[name] = train(stage, options(folder, tmp_path / name, release, max_steps=2))
            assert [line["lr"] for line in history(folder)] == [learning_rate(stage, step) for step in range(2)]
    folders["IV"], whole = folders["IV"] / "adapter", folders["IV"]
    tensors = {name: load_file(folder / ADAPTER) for name, folder in folders.items()}
    assert not any("lora" in name for name in tensors["I"])

    # What a stage has trained, and nothing else, differs from what the one before has left.
    base_tensors = {f"base_model.model.{name}": t for name, t in load_file(base / "model.safetensors").items()}
    fresh = {n for n in named_parameters(prepare_model(make_tiny_model(make_tiny_config(router_type="none")), tiny(STAGES["II"]))) if "lora" in n}  # fmt: skip
    before = base_tensors
    for name, now in tensors.items():
        moved = {key for key, tensor in now.items() if key not in before or not torch.equal(tensor, before[key])}
        ours = {key.removeprefix("base_model.model.") for key in moved}
        parameters = named_parameters(
            prepare_model(make_tiny_model(make_tiny_config(router_type="none")), tiny(STAGES[name]))
        )
        assert ours and ours <= select_trainable(STAGES[name], parameters) | ({*fresh} if name == "II" else set())
        before = before | now
    fourth = {key.removeprefix("base_model.model.") for key in tensors["IV"]}
    assert fourth >= {
        name
        for name in named_parameters(make_tiny_model(make_tiny_config(router_type="none")))
        if re.search("router|query_experts", name)
    }

    # Resumed by the next stage, loaded by PEFT and by the Auto classes, and merged: the same model.
    for name, folder in folders.items():
        start = find_model(folder)
        assert start.stage["stage"] == name and start.base == str(base)
        resumed = prepare_model(
            load_weights(start.base, dtype=torch.float32), tiny(STAGES[name]), start.adapter, start.stage
        )
        expected = logits(resumed, point_clouds)
        parameters = named_parameters(resumed)
        for key, tensor in tensors[name].items():
            assert torch.equal(parameters[key.removeprefix("base_model.model.")], tensor)
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
        torch.testing.assert_close(logits(loaded, point_clouds), expected, rtol=1e-5, atol=1e-6)
        wrapped = PeftModel.from_pretrained(load_weights(base, dtype=torch.float32), folder)
        torch.testing.assert_close(logits(wrapped, point_clouds), expected, rtol=1e-5, atol=1e-6)
        if name == "IV":
            merged = load_weights(whole, dtype=torch.float32)
            assert merged.config.router_type == "sparse"
            torch.testing.assert_close(logits(merged, point_clouds), expected, rtol=1e-4, atol=1e-5)

    start = find_model(folders["III"])
    fresh = prepare_model(load_weights(base, dtype=torch.float32), tiny(STAGES["IV"]), start.adapter, start.stage)
    experts = [p for name, p in named_parameters(fresh).items() if "query_experts" in name]
    assert all(torch.equal(expert, experts[0]) for expert in experts)
    assert torch.equal(experts[0], tensors["III"]["base_model.model.model.query_experts.0.weight"])
    with pytest.raises(ValueError, match="starts from stage II's result.*is the result of stage IV.*finetune.py"):
        train(tiny(STAGES["III"]), options(whole, tmp_path / "wrong", release))
    # And one's own objects, on the whole model.
    own = train(tiny(STAGES["own"]), options(whole, tmp_path / "own", release, max_steps=2))
    assert find_model(own).base == str(whole)
    loaded = AutoModelForImageTextToText.from_pretrained(own)
    assert loaded.config.router_type == "sparse"
    assert not torch.equal(
        logits(loaded, point_clouds), logits(load_weights(whole, dtype=torch.float32), point_clouds)
    )


def test_a_routed_model_is_no_start_for_the_first_stages(tiny_model):
    with pytest.raises(ValueError, match="trains expert 0 alone.*routed .sparse.*finetune.py"):
        prepare_model(tiny_model, tiny(STAGES["II"]))


def test_export_merges_any_stage(base, release, tmp_path, point_clouds):
    folder = train(tiny(STAGES["II"]), options(base, tmp_path / "II", release, max_steps=2, export=True))
    adapter = AutoModelForImageTextToText.from_pretrained(folder / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(folder)
    torch.testing.assert_close(logits(merged, point_clouds), logits(adapter, point_clouds), rtol=1e-4, atol=1e-5)
    assert {"README.md", "report.png", "history.jsonl", "stage.json", "processor_config.json"} <= set(
        os.listdir(folder)
    )


def test_a_recipe_with_other_ranks_is_refused(base, tmp_path):
    second = tiny(STAGES["II"])
    model = prepared(second)
    tensors = gather_parameters(model, adapter_names(model, Start(str(base))))
    save_adapter(tmp_path / "II", tensors, lora_scales(model), base, {"stage": "II"})
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors does not fit.*expected.*Use the recipe that made it"
    ):
        prepare_model(load_weights(base, dtype=torch.float32), STAGES["III"], tmp_path / "II")
    other = replace(second, language_lora=Lora(rank=4, alpha=8, dropout=0.05))
    with pytest.raises(ValueError, match="is scaled by 4, expected 2. Use the recipe that made it"):
        prepare_model(load_weights(base, dtype=torch.float32), other, tmp_path / "II")


def test_a_start_that_is_not_there_is_named(tmp_path, base, release):
    for init, message in (
        (tmp_path / "none", "no such folder"),
        ("nonsense", "no such folder.*OWNER/NAME"),
        (tmp_path, "holds neither a model's config.json nor a PEFT adapter's"),
    ):
        with pytest.raises(ValueError, match=f"--init .*{message}"):
            train(tiny(STAGES["I"]), options(init, tmp_path / "out", release))
    folder = train(tiny(STAGES["I"]), options(base, tmp_path / "I", release, max_steps=1))
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="its base model .* is not there. Correct base_model_name_or_path"):
        train(tiny(STAGES["II"]), options(folder, tmp_path / "out", release))


def test_mistakes_are_told_before_anything_is_loaded(base, release, tmp_path, capsys):
    stage = tiny(STAGES["III"])
    good = options(base, tmp_path / "out", release)
    for changes, message in (
        ({"data": tmp_path / "nowhere"}, "--data .*nowhere is no folder"),
        ({"annotations": [tmp_path / "no.json"]}, "--annotations .*no.json is no file"),
        ({"output_dir": base}, "--output_dir .* exists already"),
        ({"max_steps": 0}, "--max_steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(stage, replace(good, **changes))
    brief = write(tmp_path / "brief.json", [record("o0")])
    with pytest.raises(ValueError, match="'detailed' conversations, but there are none"):
        train(stage, replace(good, annotations=[brief]))
    unknown = write(tmp_path / "unknown.json", [record("o0"), record("ghost")])
    with pytest.raises(ValueError, match="1 of 2 annotated objects have no cloud.*'ghost'"):
        train(tiny(STAGES["I"]), replace(good, annotations=[unknown]))
    arguments = ["--init", str(base), "--data", "nowhere", "--annotations", "x", "--output_dir", str(tmp_path / "o")]
    with pytest.raises(SystemExit, match="error: --data nowhere is no folder"):
        loop.main("I", arguments)
    with pytest.raises(SystemExit):
        loop.main("III", ["--help"])
    text = capsys.readouterr().out
    assert "Stage III" in text and "multi_round (4 a step)" in text and "--resume" in text


def test_a_loss_that_is_no_number_stops_the_run(base, release, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", lambda *args: (float("nan"), 1.0))
    with pytest.raises(loop.LossError, match="At step 0 the loss is nan"):
        train(tiny(STAGES["I"]), options(base, tmp_path / "out", release))
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_no_number_is_not_applied(base, release, tmp_path, monkeypatch):
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1)
    backward, calls = Accelerator.backward, []

    def broken(self, loss):
        backward(self, loss)
        calls.append(1)
        if len(calls) == 3:
            self._models[0].model.point_projection.linear_1.weight.grad[0, 0] = torch.nan

    monkeypatch.setattr(Accelerator, "backward", broken)
    with pytest.raises(loop.LossError, match="At step 2 the loss is 5.* and the norm of its gradient nan"):
        train(stage, run)
    monkeypatch.undo()
    for checkpoint in list_checkpoints(tmp_path / "out.unfinished"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "trained.safetensors").values())
    resumed = train(stage, replace(run, resume="auto"))
    assert same_files(resumed, train(stage, options(base, tmp_path / "straight", release)))


def test_a_run_does_not_go_on_with_other_data(base, release, tmp_path, monkeypatch):
    data_dir, (annotations,) = release
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1)
    monkeypatch.setattr(loop.Run, "finish", lambda self: None)
    train(stage, run)
    other = write(tmp_path / "other.json", json.loads(annotations.read_text())[:-1])
    with pytest.raises(ValueError, match="is of a run on other data. Give it the --data it had"):
        train(stage, replace(run, resume="auto", annotations=[other]))
