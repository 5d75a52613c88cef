"""Several processes, on a CPU with gloo: the same training as one process, resumed to the bit, and with sharded weights."""

import json
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_model import make_tiny_config, make_tiny_model, tiny_phi_config
from training_runs import ADAPTER, STAGES, first_batches, history, options, prepared, tiny

from minigpt3d.conversion import save_pretrained
from minigpt3d.data.shards import pack, release_entries
from minigpt3d.training import loop
from minigpt3d.training.loop import make_optimizer, train
from minigpt3d.training.stages import Lora
from minigpt3d.training.stream import pack_batch
from minigpt3d.training.weights import gather_parameters, named_parameters


@pytest.fixture
def base(tmp_path, tiny_processor):
    """Without dropout in the language model."""
    config = make_tiny_config(router_type="none", text_config=tiny_phi_config(resid_pdrop=0.0))
    save_pretrained(make_tiny_model(config), tiny_processor, tmp_path / "base")
    return tmp_path / "base"


def launch(function, *args, processes: int = 2):
    """In processes of their own; what goes wrong there is told here."""
    debug_launcher(_guarded, (function, *args), num_processes=processes)


def _guarded(function, *args):
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # the parent's, who is alone
    try:
        function(*args)
    except KeyboardInterrupt:
        pass
    except Exception:
        traceback.print_exc()
        raise


def without_dropout(stage):
    """Dropout is drawn by each process for itself: without it, runs can be compared."""
    lora = {name: replace(getattr(stage, name), dropout=0.0) for name in ("language_lora", "qformer_lora")}
    return replace(stage, **lora)


def test_two_processes_train_as_one_does(base, release, tmp_path):  # noqa: F811
    """The batch is shared, so what is learned does not depend on the number of processes; nor does what is shown."""
    stage = without_dropout(tiny(STAGES["II"]))
    one = train(stage, options(base, tmp_path / "one", release))
    launch(train, stage, options(base, tmp_path / "two", release))
    ours, theirs = history(one), history(tmp_path / "two")
    assert [entry["source"] for entry in ours] == [entry["source"] for entry in theirs]
    for name in ("loss", "lr", "grad_norm"):
        assert [entry[name] for entry in theirs] == pytest.approx([entry[name] for entry in ours], rel=1e-4)
    expected, got = load_file(one / ADAPTER), load_file(tmp_path / "two" / ADAPTER)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam's first steps are the rate's size whatever the gradient's: compare with that.
        assert (got[name] - tensor).abs().mean() < 0.02 * stage.peak_lr, name


def test_more_processes_than_samples_train_as_one_does(base, release, tmp_path):  # noqa: F811
    """Three samples for four processes: one is idle, and counts nowhere."""
    stage = without_dropout(tiny(STAGES["IV"], exports=False))
    one = train(stage, options(base, tmp_path / "one", release, max_steps=2))
    launch(train, stage, options(base, tmp_path / "four", release, max_steps=2), processes=4)
    for ours, theirs in zip(history(one), history(tmp_path / "four"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
        assert theirs["router"]["load"] == pytest.approx(ours["router"]["load"])


def test_the_router_is_measured_over_all_processes(base, release, tmp_path):  # noqa: F811
    stage = without_dropout(tiny(STAGES["IV"], exports=False))
    one = train(stage, options(base, tmp_path / "one", release, max_steps=1))
    launch(train, stage, options(base, tmp_path / "two", release, max_steps=1))
    (ours,), (theirs,) = history(one), history(tmp_path / "two")
    assert theirs["router"]["load"] == pytest.approx(ours["router"]["load"])
    assert theirs["router"]["between"] == pytest.approx(ours["router"]["between"], abs=1e-5)


def _interrupted(stage, settings, last_step: int):
    """Ends like a killed run, in every process behind the same step."""
    calls = []
    step = loop.train_step

    def interrupt(*args):
        if len(calls) == last_step:
            raise KeyboardInterrupt
        calls.append(1)
        return step(*args)

    loop.train_step = interrupt
    train(stage, settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_of_two_processes_goes_on_exactly(num_workers, base, release, tmp_path):  # noqa: F811
    """In the mixture of stage III, over the end of an epoch (6 objects, 3 a step), with dropout."""
    stage = tiny(STAGES["III"], steps_per_epoch=10, augment=True)
    pack(release_entries(release[0], release[1]), tmp_path / "packed", rows_per_shard=2, num_workers=1)
    packed = tmp_path / "packed", []
    launch(train, stage, options(base, tmp_path / "straight", packed))
    settings = options(base, tmp_path / "killed", packed, save_every=3, num_workers=num_workers)
    launch(_interrupted, stage, settings, 7)
    work_dir = tmp_path / "killed.unfinished"
    assert (work_dir / "checkpoint-6").is_dir() and len((work_dir / "history.jsonl").read_text().splitlines()) == 7
    launch(train, stage, replace(settings, resume="auto"))
    assert (tmp_path / "straight" / ADAPTER).read_bytes() == (tmp_path / "killed" / ADAPTER).read_bytes()
    assert history(tmp_path / "straight") == history(tmp_path / "killed")


def _shard(stage, batches: list, out: str):
    """Two steps with FSDP2's shards on a mesh of CPUs, with a stop in between. (Accelerate knows FSDP2 on GPUs only.)"""
    import torch.distributed as dist
    from accelerate import PartialState
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from minigpt3d.training.run_state import _WHOLE

    PartialState(cpu=True)
    mesh = init_device_mesh("cpu", (2,))

    def build():
        torch.manual_seed(0)
        model = prepared(stage)
        for module in reversed(list(model.modules())):  # the inner ones first
            if type(module).__name__ in model.base_model.model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, make_optimizer(stage, model)

    def step(model, optimizer, samples):
        torch.manual_seed(1)  # dropout
        loss = model(**pack_batch(samples), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build()
    step(model, optimizer, batches[0])
    names = [name for name, parameter in named_parameters(model).items() if parameter.requires_grad]
    trained = gather_parameters(model, names)
    state = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if dist.get_rank() == 0:  # which alone has it; all read the file
        torch.save(state, out)
    dist.barrier()
    state = torch.load(out, weights_only=True)
    sharded = sum(parameter.to_local().numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())

    again, again_optimizer = build()
    with torch.no_grad():
        for name, parameter in named_parameters(again).items():
            if name in trained:
                tensor = torch.distributed.tensor.distribute_tensor(trained[name], mesh, parameter.placements)
                parameter.copy_(tensor)
    set_optimizer_state_dict(again, again_optimizer, state, options=_WHOLE)
    for each, its_optimizer in ((model, optimizer), (again, again_optimizer)):
        step(each, its_optimizer, batches[1])
    results = [gather_parameters(each, names) for each in (model, again)]
    if dist.get_rank() == 0:
        torch.save({"once": trained, "twice": results}, out)
        Path(out + ".json").write_text(json.dumps([sharded, whole]))


def test_sharded_weights_train_and_are_gathered(release, tiny_processor, tmp_path):  # noqa: F811
    stage = replace(tiny(STAGES["II"]), language_lora=Lora(4, 16, 0.0), qformer_lora=Lora(2, 4, 0.0))
    (samples,) = first_batches(stage, release, tiny_processor)
    out = str(tmp_path / "out.pt")
    launch(_shard, stage, [samples, samples[::-1]], out)
    result = torch.load(out)
    torch.manual_seed(0)
    model = prepared(stage)
    optimizer = make_optimizer(stage, model)
    torch.manual_seed(1)
    model(**pack_batch(samples), use_cache=False).loss.backward()
    optimizer.step()
    parameters = named_parameters(model)
    for name, tensor in result["once"].items():
        assert tensor.shape == parameters[name].shape
        assert (tensor - parameters[name]).abs().mean() < 0.02 * stage.warmup_lr, name
    straight, resumed = result["twice"]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    sharded, whole = json.loads(Path(out + ".json").read_text())
    assert sharded < 0.6 * whole, "each process holds about half"
