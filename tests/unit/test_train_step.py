"""One optimizer step: what moves, what gets a gradient, weight decay, accumulation."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny_model import tiny_phi_config
from training_runs import STAGES, first_batches, make_base, prepared, tiny

from minigpt3d.training.loop import make_optimizer, train_step
from minigpt3d.training.stages import select_trainable
from minigpt3d.training.stream import pack_batch
from minigpt3d.training.weights import named_parameters, prepare_model


@pytest.mark.parametrize("name", STAGES)
def test_a_step_moves_exactly_the_parameters_of_the_table(name, release, tiny_processor):
    stage = tiny(STAGES[name])
    accelerator = Accelerator(cpu=True)
    model = prepared(stage)
    before = {name: parameter.clone() for name, parameter in named_parameters(model).items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model, optimizer = accelerator.prepare(model, make_optimizer(stage, model))
    (samples,) = first_batches(stage, release, tiny_processor)
    train_step(accelerator, model, optimizer, [pack_batch(samples)], lr=1e-2)
    moved = {name for name, p in named_parameters(model).items() if not torch.equal(p, before[name])}
    assert moved == select_trainable(stage, before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("name", STAGES)
def test_every_trainable_parameter_gets_a_gradient(name, release, tiny_processor):
    """No other parameter does: the encoder and all below the trained parts are outside the graph."""
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
    )(batch["point_clouds"]).last_hidden_state.requires_grad


def test_weight_decay_acts_on_matrices_only():
    stage = tiny(STAGES["II"])
    decayed, others = make_optimizer(stage, prepared(stage)).param_groups
    assert decayed["weight_decay"] == 0.05 and all(p.ndim >= 2 for p in decayed["params"])
    assert others["weight_decay"] == 0 and all(p.ndim < 2 for p in others["params"])
    assert decayed["betas"] == (0.9, 0.999)


def test_accumulated_gradients_equal_the_full_batch(release, tiny_processor):
    """Micro-batches with unequal numbers of answer tokens: the same loss, the same step."""
    stage = tiny(STAGES["I"])
    accelerator = Accelerator(cpu=True)
    results = []
    for device_batch in (None, 2):
        model = prepare_model(make_base(text_config=tiny_phi_config(resid_pdrop=0.0)), stage)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0, fused=True))
        batches = first_batches(stage, release, tiny_processor, device_batch=device_batch)
        loss, _ = train_step(accelerator, model, optimizer, [pack_batch(part) for part in batches], lr=1.0)
        results.append((loss.item(), [p.detach().clone() for p in model.parameters() if p.requires_grad]))
    (loss, whole), (loss_of_parts, parts) = results
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
