"""How a run is carried out, option by option: dtypes, memory, compilation, trackers, held-out data, what is shown."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from training_runs import ADAPTER, STAGES, history, options, tiny

from minigpt3d.data.shards import pack, release_entries
from minigpt3d.training import loop, weights
from minigpt3d.training.history import read_history
from minigpt3d.training.loop import train


@pytest.fixture
def run(base, release, tmp_path):
    """`run(stage, name, **options)` → losses and adapter."""

    def train_and_read(stage, name, **changes):
        return read_run(train(stage, options(base, tmp_path / name, release, **changes)))

    return train_and_read


def read_run(folder):
    return [entry["loss"] for entry in history(folder)], load_file(folder / ADAPTER)


def test_half_precision_is_near_full_precision(run, trained, launched):
    """What trains stays float32; the frozen matrices are held in half precision. (fp16 needs a GPU: test_gpu.py.)"""
    stage = tiny(STAGES["II"], peak_lr=1e-3)
    losses, tensors = read_run(trained(stage))
    launched(mixed_precision="bf16", use_cpu="true")
    held = {}
    halve = loop.halve_frozen

    def halve_and_look(model, half):
        halve(model, half)
        held.update({name: (p.dtype, p.requires_grad, p.ndim) for name, p in model.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "halve_frozen", halve_and_look)
        half_losses, half = run(stage, "half")
    assert held
    for name, (dtype, trains, ndim) in held.items():
        assert dtype == (torch.float32 if trains or ndim < 2 else torch.bfloat16), name
    assert half_losses == pytest.approx(losses, rel=0.02) and half_losses != losses
    assert all(tensor.dtype == torch.float32 for tensor in half.values()) and half.keys() == tensors.keys()


def test_half_precision_keeps_what_earlier_stages_trained(trained, release, tmp_path, launched):
    """Their LoRA factors are frozen matrices, which the model holds in half precision; the adapter does not."""
    before = trained(tiny(STAGES["II"]))
    launched(mixed_precision="bf16", use_cpu="true")
    stage = tiny(STAGES["IV"], exports=False, starts_from="II")
    folder = train(stage, options(before, tmp_path / "out", release, max_steps=1))
    tensors = load_file(folder / ADAPTER)
    kept = {name: tensor for name, tensor in load_file(before / ADAPTER).items() if "query_experts" not in name}
    assert any("lora_A" in name for name in kept)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("name", ["I", "II", "IV"])
def test_gradient_checkpointing_changes_nothing(name, run, trained):
    stage = tiny(STAGES[name], router_type="soft" if name == "IV" else "none", exports=False)
    losses, tensors = read_run(trained(stage))
    again, checkpointed = run(stage, "checkpointed", gradient_checkpointing=True)
    assert again == pytest.approx(losses, rel=1e-5)
    for key, tensor in tensors.items():
        torch.testing.assert_close(checkpointed[key], tensor, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_keeps_fewer_activations(run):
    kept = {}
    for checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            stage = tiny(STAGES["II"], steps_per_epoch=1)
            run(stage, str(checkpointing), gradient_checkpointing=checkpointing)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.slow
def test_compiled_runs_equal_plain_ones(run, trained, monkeypatch):
    stage = tiny(STAGES["II"], steps_per_epoch=2)
    losses, tensors = read_run(trained(stage))
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(weights, "compile_layers", partial(weights.compile_layers, backend=graphs))
    compiled_losses, compiled = run(stage, "compiled", compile=True)
    assert graphs.frame_count > 0
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    assert compiled.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(compiled[key], tensor, rtol=1e-2, atol=1e-3)


def test_a_language_model_in_four_bits_trains(run, trained, monkeypatch):
    pytest.importorskip("bitsandbytes")
    stage = tiny(STAGES["II"], peak_lr=1e-3)
    losses, tensors = read_run(trained(stage))
    classes = {}
    prepare = weights.prepare_model

    def look_and_prepare(model, *args):
        classes.update({name: type(module).__name__ for name, module in model.named_modules()})
        return prepare(model, *args)

    monkeypatch.setattr(weights, "prepare_model", look_and_prepare)
    four_bit_losses, four_bit = run(stage, "four_bit", load_in_4bit=True)
    four_bit_layers = {name for name, class_name in classes.items() if class_name == "Linear4bit"}
    assert len(four_bit_layers) == 3 * 4 and all("language_model.layers" in name for name in four_bit_layers)
    assert four_bit_losses == pytest.approx(losses, rel=0.05) and four_bit_losses != losses
    assert four_bit.keys() == tensors.keys() and all(tensor.dtype == torch.float32 for tensor in four_bit.values())


def test_trackers_get_every_number(base, release, tmp_path):
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
        entries = read_history(folder / "history.jsonl")[: 1 if tag.startswith("update_ratio") else None]
        expected = {entry["step"]: value(entry) for entry in entries}
        assert logged == pytest.approx(expected)
    with pytest.raises(ValueError, match="`report_to` nonsense.*tensorboard"):
        train(stage, options(base, tmp_path / "other", release, report_to=["nonsense"]))


def test_the_history_holds_every_measurement(base, release, tmp_path):
    stage = tiny(STAGES["IV"], weight_decay=0.0)
    folder = train(stage, options(base, tmp_path / "out", release))
    entries = read_history(folder / "history.jsonl")
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    for entry in entries:
        assert entry["grad_norm"] > 0 and ("update_ratio" in entry) == (entry["step"] == 0), "every tenth step"
        router = entry["router"]
        assert sum(router["load"]) == pytest.approx(2) and sum(router["weight"]) == pytest.approx(1)
        assert 0 <= router["between"] < router["entropy"] < torch.tensor(4.0).log() + 1e-6
    # Adam's first step is the rate itself, whatever the gradient.
    base_weights = load_file(base / "model.safetensors")
    weights = torch.cat([t.flatten() for n, t in base_weights.items() if n.startswith("model.router")])
    expected = entries[0]["lr"] * len(weights) ** 0.5 / weights.norm().item()
    assert set(entries[0]["update_ratio"]) == {"router", "query_experts"}
    assert entries[0]["update_ratio"]["router"] == pytest.approx(expected, rel=0.02)
    assert (folder / "curves.png").stat().st_size > 10_000
    card = (folder / "README.md").read_text()
    assert "stage IV" in card and "curves.png" in card and str(tmp_path) not in card


def test_held_out_data_is_measured_before_and_after(base, release, trained, tmp_path):
    data_dir, annotations = release
    pack(release_entries(data_dir, annotations), tmp_path / "held_out", num_workers=1)
    stage = tiny(STAGES["I"], steps_per_epoch=8)
    held_out = {"validation_data": str(tmp_path / "held_out")}
    entries = read_history(train(stage, options(base, tmp_path / "one", release, **held_out)) / "history.jsonl")
    assert entries[0]["validation_before"] > entries[-1]["validation_after"] > 0
    assert sum("validation" in key for entry in entries for key in entry) == 2
    # Measuring changes nothing, and does not depend on the number of samples measured at once.
    assert (trained(stage) / ADAPTER).read_bytes() == (tmp_path / "one" / ADAPTER).read_bytes()
    again = read_history(
        train(stage, options(base, tmp_path / "three", release, device_batch=1, **held_out)) / "history.jsonl"
    )
    assert again[0]["validation_before"] == pytest.approx(entries[0]["validation_before"], rel=1e-5)
    with pytest.raises(ValueError, match="packed.json"):
        train(stage, options(base, tmp_path / "four", release, validation_data=str(tmp_path)))


def test_cluster_settings_are_valid_for_accelerate():
    """Every file of training/accelerate is one that `accelerate launch --config_file` takes."""
    import yaml
    from accelerate.commands.config import config_args

    files = sorted((Path(loop.__file__).parent / "accelerate").glob("*.yaml"))
    assert [path.stem for path in files] == [
        "ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2", "single_gpu", "two_nodes"
    ]  # fmt: skip
    for path in files:
        assert path.read_text().startswith("# "), "the first line explains the file"
        config = config_args.load_config_from_file(str(path))
        assert config.mixed_precision == "bf16"
        assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_attention_of_the_language_model_can_be_chosen(run, trained, monkeypatch):
    stage, chosen = tiny(STAGES["II"]), []
    losses, _ = read_run(trained(stage))
    prepare = weights.prepare_model
    monkeypatch.setattr(
        weights,
        "prepare_model",
        lambda model, *args: chosen.append(model.config.text_config._attn_implementation) or prepare(model, *args),
    )
    again, _ = run(stage, "eager", attn_implementation="eager")
    assert chosen == ["eager"] and again == pytest.approx(losses, rel=1e-4)
    with pytest.raises(ValueError, match="nonsense"):
        run(stage, "nonsense", attn_implementation="nonsense")
