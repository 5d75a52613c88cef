"""How a run is carried out, option by option: dtypes, memory, compilation, trackers, held-out data, what is shown."""

import json
import os
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_config, make_tiny_model
from training_runs import ADAPTER, STAGES, history, options, tiny

from minigpt3d.conversion import save_pretrained
from minigpt3d.data.shards import pack, release_entries
from minigpt3d.training import loop
from minigpt3d.training.history import read_history
from minigpt3d.training.loop import train
from minigpt3d.training.run_state import Stopped, claim


@pytest.fixture
def base(tmp_path, tiny_processor):
    save_pretrained(make_tiny_model(make_tiny_config(router_type="none")), tiny_processor, tmp_path / "base")
    return tmp_path / "base"


def run(stage, base, tmp_path, release, name, **changes):  # noqa: F811
    folder = train(stage, options(base, tmp_path / name, release, **changes))
    return [entry["loss"] for entry in history(folder)], load_file(folder / ADAPTER)


def test_half_precision_is_near_full_precision(base, release, tmp_path, launched):  # noqa: F811
    """What trains stays float32; the frozen matrices are held in half precision. (fp16 needs a GPU: tests/test_gpu.py.)"""
    stage = tiny(STAGES["II"], peak_lr=1e-3)
    losses, tensors = run(stage, base, tmp_path, release, "full")
    launched(mixed_precision="bf16", use_cpu="true")
    held = {}
    build = loop.build_model

    def look(*args):
        model = build(*args)
        held.update({name: (p.dtype, p.requires_grad, p.ndim) for name, p in model.named_parameters()})
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_model", look)
        half_losses, half = run(stage, base, tmp_path, release, "half")
    for name, (dtype, trains, ndim) in held.items():
        assert dtype == (torch.float32 if trains or ndim < 2 else torch.bfloat16), name
    assert half_losses == pytest.approx(losses, rel=0.02) and half_losses != losses
    assert all(tensor.dtype == torch.float32 for tensor in half.values()) and half.keys() == tensors.keys()


@pytest.mark.parametrize("name", ["I", "II", "IV"])
def test_gradient_checkpointing_changes_nothing(name, base, release, tmp_path):  # noqa: F811
    stage = tiny(STAGES[name], router_type="soft" if name == "IV" else "none", exports=False)
    losses, tensors = run(stage, base, tmp_path, release, "plain")
    again, checkpointed = run(stage, base, tmp_path, release, "checkpointed", gradient_checkpointing=True)
    assert again == pytest.approx(losses, rel=1e-5)
    for key, tensor in tensors.items():
        torch.testing.assert_close(checkpointed[key], tensor, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_keeps_fewer_activations(base, release, tmp_path):  # noqa: F811
    kept = {}
    for checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            stage = tiny(STAGES["II"], steps_per_epoch=1)
            run(stage, base, tmp_path, release, str(checkpointing), gradient_checkpointing=checkpointing)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_compiled_runs_are_the_same_runs(base, release, tmp_path, launched):  # noqa: F811
    """torch.compile comes from Accelerate: `accelerate launch --dynamo_backend inductor`."""
    stage = tiny(STAGES["II"], steps_per_epoch=2)
    losses, tensors = run(stage, base, tmp_path, release, "plain")
    launched(dynamo_backend="aot_eager", use_cpu="true")
    compiled_losses, compiled = run(stage, base, tmp_path, release, "compiled")
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    assert compiled.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(compiled[key], tensor, rtol=1e-2, atol=1e-3)


def test_a_language_model_in_four_bits_trains(base, release, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    stage = tiny(STAGES["II"], peak_lr=1e-3)
    losses, tensors = run(stage, base, tmp_path, release, "plain")
    classes = {}
    prepare = loop.prepare_model

    def look(model, *args):
        classes.update({name: type(module).__name__ for name, module in model.named_modules()})
        return prepare(model, *args)

    monkeypatch.setattr(loop, "prepare_model", look)
    four_bit_losses, four_bit = run(stage, base, tmp_path, release, "four_bit", load_in_4bit=True)
    four_bit_layers = {name for name, kind in classes.items() if kind == "Linear4bit"}
    assert len(four_bit_layers) == 3 * 4 and all("language_model.layers" in name for name in four_bit_layers)
    assert four_bit_losses == pytest.approx(losses, rel=0.05) and four_bit_losses != losses
    assert four_bit.keys() == tensors.keys() and all(tensor.dtype == torch.float32 for tensor in four_bit.values())
    monkeypatch.setattr(loop, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'minigpt3d\[quantization\]'"):
        run(stage, base, tmp_path, release, "missing", load_in_4bit=True)


def test_trackers_get_every_number(base, release, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = tiny(STAGES["IV"])
    folder = train(stage, options(base, tmp_path / "out", release, report_to=["tensorboard"]))
    accumulator = EventAccumulator(str(folder / "logs" / "minigpt3d-stage-IV"))
    accumulator.Reload()
    for tag, value in (
        ("loss", lambda entry: entry["loss"]),
        ("update_ratio/router", lambda entry: entry["update_ratio"]["router"]),
        ("router/load/expert_1", lambda entry: entry["router"]["load"][1]),
    ):
        logged = {event.step: event.value for event in accumulator.Scalars(tag)}
        expected = {entry["step"]: value(entry) for entry in read_history(folder / "history.jsonl")}
        assert logged == pytest.approx(expected)
    with pytest.raises(ValueError, match="--report_to nonsense: expected one of .*tensorboard"):
        train(stage, options(base, tmp_path / "other", release, report_to=["nonsense"]))


def test_the_history_tells_what_happened(base, release, tmp_path):  # noqa: F811
    stage = tiny(STAGES["IV"], weight_decay=0.0)
    folder = train(stage, options(base, tmp_path / "out", release))
    entries = read_history(folder / "history.jsonl")
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    for entry in entries:
        assert entry["grad_norm"] > 0 and set(entry["update_ratio"]) == {"router", "query_experts"}
        router = entry["router"]
        assert sum(router["load"]) == pytest.approx(2) and sum(router["weight"]) == pytest.approx(1)
        assert 0 <= router["between"] < router["entropy"] < torch.tensor(4.0).log() + 1e-6
    # Adam's first step is the rate itself, whatever the gradient.
    base_weights = load_file(base / "model.safetensors")
    weights = torch.cat([t.flatten() for n, t in base_weights.items() if n.startswith("model.router")])
    expected = entries[0]["lr"] * len(weights) ** 0.5 / weights.norm().item()
    assert entries[0]["update_ratio"]["router"] == pytest.approx(expected, rel=0.02)
    assert (folder / "report.png").stat().st_size > 10_000
    card = (folder / "README.md").read_text()
    assert "stage IV" in card and "report.png" in card and str(tmp_path) not in card


def test_held_out_data_is_measured_before_and_after(base, release, tmp_path):  # noqa: F811
    data_dir, annotations = release
    pack(release_entries(data_dir, annotations), tmp_path / "held_out", num_workers=1)
    stage = tiny(STAGES["I"], steps_per_epoch=8)
    held_out = {"validation_data": str(tmp_path / "held_out")}
    entries = read_history(train(stage, options(base, tmp_path / "one", release, **held_out)) / "history.jsonl")
    assert entries[0]["validation_before"] > entries[-1]["validation_after"] > 0
    assert sum("validation" in key for entry in entries for key in entry) == 2
    # Looking changes nothing, and does not depend on how many are looked at at once.
    plain = train(stage, options(base, tmp_path / "two", release))
    ours = train(stage, options(base, tmp_path / "three", release, device_batch=1, **held_out))
    assert (plain / ADAPTER).read_bytes() == (tmp_path / "one" / ADAPTER).read_bytes()
    again = read_history(ours / "history.jsonl")
    assert again[0]["validation_before"] == pytest.approx(entries[0]["validation_before"], rel=1e-5)
    with pytest.raises(ValueError, match="no packed.json there"):
        train(stage, options(base, tmp_path / "four", release, validation_data=str(tmp_path)))


def test_a_lost_worker_is_named(base, release, tmp_path, monkeypatch):  # noqa: F811
    encode = loop.StageStream.encode

    def dies(self, step, slot):
        if step == 2 and torch.utils.data.get_worker_info() is not None:
            time.sleep(1)
            os._exit(1)
        return encode(self, step, slot)

    stage, settings = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1, resume="auto")
    monkeypatch.setitem(loop.RECIPES["paper"], "I", stage)
    monkeypatch.setattr(loop.StageStream, "encode", dies)
    data_dir, (annotations,) = release
    command = ["--init", base, "--data", data_dir, "--annotations", annotations, "--output_dir", tmp_path / "out"]
    command = [*map(str, command), "--save_every", "1", "--num_workers", "1"]
    child = os.fork()
    if child == 0:
        os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        try:
            loop.main("I", command)
        except SystemExit as error:
            os.write(2, str(error).encode())
        finally:
            os._exit(3)
    os.waitpid(child, 0)
    assert "error: a process that reads clouds ahead was lost" in (tmp_path / "stderr").read_text()
    monkeypatch.undo()
    assert list((tmp_path / "out.unfinished").glob("checkpoint-*"))
    resumed = train(stage, settings)
    straight = train(stage, options(base, tmp_path / "straight", release))
    assert (straight / ADAPTER).read_bytes() == (resumed / ADAPTER).read_bytes()


def test_settings_for_clusters_are_accelerates():
    """Every file of training/accelerate is one that `accelerate launch --config_file` takes."""
    from pathlib import Path

    import yaml
    from accelerate.commands.config import config_args

    files = sorted((Path(loop.__file__).parent / "accelerate").glob("*.yaml"))
    assert [path.stem for path in files] == [
        "ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2", "single_gpu", "two_nodes"
    ]  # fmt: skip
    for path in files:
        assert path.read_text().startswith("# "), "each is explained in a line"
        config = config_args.load_config_from_file(str(path))
        assert config.mixed_precision == "bf16"
        json.dumps(yaml.safe_load(path.read_text()))


def test_two_runs_do_not_share_a_folder(base, release, tmp_path):  # noqa: F811
    work_dir = tmp_path / "out.unfinished"
    child = os.fork()
    if child == 0:
        claim(work_dir)
        time.sleep(60)
        os._exit(0)
    while not (work_dir / "running.json").exists() or not (work_dir / "running.json").read_text():
        time.sleep(0.01)
    try:
        with pytest.raises(ValueError, match=f"is being worked in by process {child}"):
            train(tiny(STAGES["I"]), options(base, tmp_path / "out", release, resume="auto"))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    folder = train(tiny(STAGES["I"]), options(base, tmp_path / "out", release, resume="auto"))
    assert not (folder / "running.json").exists() and not work_dir.exists()


def test_the_end_of_a_launcher_ends_the_run(base, release, tmp_path, monkeypatch):  # noqa: F811
    """`accelerate launch` that is killed leaves its processes behind."""
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["python", "accelerate", "launch"])
    stage, settings = tiny(STAGES["I"]), options(base, tmp_path / "out", release, resume="auto")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(Stopped, match="Stopped at step 1 .SIGTERM"):
        train(stage, settings)
    monkeypatch.undo()
    resumed, straight = train(stage, settings), train(stage, options(base, tmp_path / "straight", release))
    assert (straight / ADAPTER).read_bytes() == (resumed / ADAPTER).read_bytes()


def test_the_language_models_attention_can_be_chosen(base, release, tmp_path, monkeypatch):  # noqa: F811
    stage, chosen = tiny(STAGES["II"]), []
    losses, _ = run(stage, base, tmp_path, release, "plain")
    prepare = loop.prepare_model
    monkeypatch.setattr(
        loop,
        "prepare_model",
        lambda model, *args: chosen.append(model.config.text_config._attn_implementation) or prepare(model, *args),
    )
    again, _ = run(stage, base, tmp_path, release, "eager", attn_implementation="eager")
    assert chosen == ["eager"] and again == pytest.approx(losses, rel=1e-4)
    with pytest.raises(ValueError, match="nonsense"):
        run(stage, base, tmp_path, release, "nonsense", attn_implementation="nonsense")
