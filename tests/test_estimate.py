"""The estimate of a stage's memory and time against what torch counts, keeps and allocates in a real step."""

import json

import pytest
import torch
from conftest import make_tiny_config
from test_training import tiny
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.training import estimate as module
from minigpt3d.training.estimate import (
    GPUS,
    EstimateOptions,
    build_model,
    estimate,
    main,
    shape_batch,
    trace,
    weigh,
)
from minigpt3d.training.stages import RECIPES, select_trainable
from minigpt3d.training.stream import pack_batch
from minigpt3d.training.train import make_optimizer
from minigpt3d.training.weights import add_lora, named_parameters, set_training_mode


PAPER = RECIPES["paper"]
STAGES = ("I", "II", "III", "IV")


def small_config(num_hidden_layers: int = 4) -> MiniGPT3DConfig:
    """Wide enough that matrix products outweigh what small models spend on the rest."""
    return make_tiny_config(
        text_config={
            "model_type": "minigpt3d_phi", "vocab_size": 1000, "hidden_size": 192, "intermediate_size": 768,
            "num_hidden_layers": num_hidden_layers, "num_attention_heads": 4, "partial_rotary_factor": 0.5,
            "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
        },
        qformer_config={
            "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384,
            "encoder_hidden_size": 128,
        },
    )  # fmt: skip


def real_model(config: MiniGPT3DConfig, stage, attention: str) -> torch.nn.Module:
    config._attn_implementation = attention
    model = MiniGPT3DForConditionalGeneration(config)
    model.config.router_type = stage.router_type
    if stage.name != "I":
        model = add_lora(model, stage)
    parameters = named_parameters(model)
    trainable = select_trainable(stage, parameters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    set_training_mode(model)
    return model


def real_batch(config: MiniGPT3DConfig, count: int = 4, length: int = 90, answer: int = 30) -> dict:
    torch.manual_seed(0)
    samples = []
    for _ in range(count):
        ids = torch.randint(2, 290, (length,))
        ids[: config.num_query_tokens] = config.point_token_id
        labels = ids.clone()
        labels[:-answer] = -100
        samples.append({"input_ids": ids, "labels": labels, "point_clouds": torch.rand(1, 128, 6)})
    return pack_batch(samples)


def estimated(stage, cast=None):
    return trace(build_model(small_config(), stage, PAPER, cast), shape_batch(small_config(), 4, 90, 30), cast, False)


@pytest.mark.parametrize("name", STAGES)
def test_operations_are_those_of_a_real_step(name):
    """With plain attention, whose products torch's counter sees; ours counts the fused kernel by a formula."""
    stage = tiny(PAPER[name])
    model = real_model(small_config(), stage, "eager")
    with FlopCounterMode(display=False) as counter:
        model(**real_batch(small_config()), use_cache=False).loss.backward()
    assert estimated(stage).operations == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", STAGES)
def test_activations_are_what_autograd_keeps(name, cast):
    stage = tiny(PAPER[name])
    model = real_model(small_config(), stage, "sdpa")
    if cast is not None:
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.ndim >= 2:
                parameter.data = parameter.data.to(cast)
    ignored = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = real_batch(small_config())
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=cast, enabled=cast is not None),
    ):
        loss = model(**batch, use_cache=False).loss
    result = estimated(stage, cast)
    assert result.peak_bytes == pytest.approx(sum(saved.values()), rel=0.2)
    loss.backward()


@pytest.mark.parametrize("name", STAGES)
def test_peak_is_the_allocators(name):
    """Everything that torch allocates in a step beside the parameters: activations, logits, gradients."""
    stage = tiny(PAPER[name])
    model = real_model(small_config(), stage, "sdpa")
    batch = real_batch(small_config())
    model(**batch, use_cache=False).loss.backward()  # gradients are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        model(**batch, use_cache=False).loss.backward()
    now = peak = 0
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert estimated(stage).peak_bytes == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("name", STAGES)
def test_weights_gradients_and_optimizer_are_the_real_ones(name):
    stage = tiny(PAPER[name])
    model = real_model(small_config(), stage, "sdpa")
    optimizer = make_optimizer(stage, model)
    # A parameter that this batch does not reach, such as an expert that no cloud is sent to, has a moment soon as well.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    memory = weigh(build_model(small_config(), stage, PAPER, None), "16bit")
    trained = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    assert memory["trainable weights, float32"] == memory["gradients"] == trained
    assert memory["AdamW's two moments"] == sum(moment.nbytes for moment in moments)
    frozen = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    held = sum(size for name, size in memory.items() if name.startswith("frozen"))
    assert held == pytest.approx(frozen, rel=0.01)


def test_the_papers_trainable_parameters():
    counts = {"I": 1_378_432, "II": 47_417_984, "III": 47_417_984, "IV": 395_528}
    for name, count in counts.items():
        model = build_model(MiniGPT3DConfig(), PAPER[name], PAPER, torch.bfloat16)
        assert weigh(model, "16bit")["trainable weights, float32"] == 4 * count
        assert all(parameter.is_meta for parameter in model.parameters())


def options(**changes) -> EstimateOptions:
    return EstimateOptions(**{"stage": "II", "gpu": "h200"} | changes)


def test_each_option_moves_the_estimate_its_way():
    def run(**changes):
        return estimate(PAPER["II"], small_config(num_hidden_layers=12), GPUS["h200"], options(**changes))

    plain = run()
    fewer, again, four_bit, pair = (
        run(device_batch=3),
        run(gradient_checkpointing=True),
        run(base="4bit"),
        run(gpus=3),
    )
    activations = "activations at the peak"
    assert fewer.memory[activations] < 0.5 * plain.memory[activations]
    assert fewer.operations_per_sample == pytest.approx(
        plain.operations_per_sample, rel=0.25
    )  # other rows, other padding
    assert again.memory[activations] < plain.memory[activations]
    assert again.operations_per_sample > 1.1 * plain.operations_per_sample
    assert four_bit.memory["frozen weights, 4 bits"] > 0
    assert pair.memory["gradients"] == 2 * plain.memory["gradients"]
    assert run(dtype="fp32").memory[activations] > plain.memory[activations]
    slow = estimate(PAPER["II"], small_config(), GPUS["t4"], options(mfu=1e-6))
    slower = estimate(PAPER["II"], small_config(), GPUS["t4"], options(mfu=5e-7))
    assert slower.seconds == pytest.approx(2 * slow.seconds)


def test_the_command_says_what_to_change(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_dict()))
    monkeypatch.setattr(module, "CONTEXT_BYTES", 0.0)
    monkeypatch.setitem(GPUS, "tiny", module.Device(memory=0.03, half_tflops=1, float_tflops=1))
    main(["--stage", "II", "--gpu", "tiny", "--config", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "--device_batch 4" in printed
    assert "--dry_run" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "h2000"], "known: h200, h100"),
        (["--gpu", "t4"], "--dtype fp16"),
        (["--gpu", "h200", "--gpus", "10"], "at most"),
        (["--gpu", "h200", "--mfu", "35"], "between 0 and 1"),
        (["--gpu", "h200", "--base", "4bit", "--dtype", "fp32"], "half precision"),
        (["--gpu", "h200", "--config", "nowhere"], "neither a folder"),
    ],
)
def test_mistakes_are_told(argv, message):
    with pytest.raises(SystemExit, match=message):
        main(["--stage", "II", *argv])
