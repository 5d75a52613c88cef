"""Several processes, on a CPU with gloo: the same training as one process, resumed bit for bit, and with sharded weights."""

import json
import os
import re
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, PrepareForLaunch, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from tiny_model import tiny_phi_config
from training_runs import ADAPTER, STAGES, first_batches, history, options, prepared, same_run, tiny, write_base

from minigpt3d import point_bert_minigpt3d
from minigpt3d.data.shards import pack, release_entries
from minigpt3d.hub import ModelFiles
from minigpt3d.training import loop
from minigpt3d.training.launch import make_accelerator, prepare
from minigpt3d.training.loop import make_optimizer, train
from minigpt3d.training.stages import Lora
from minigpt3d.training.stream import pack_batch
from minigpt3d.training.weights import gather_parameters, load_stage_model, named_parameters


pytestmark = pytest.mark.slow
CONFIGS = Path(loop.__file__).parent / "accelerate"
TIMEOUT = 600  # seconds, of the processes of one launch; a busy machine takes minutes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Without dropout in the language model."""
    return write_base(tmp_path_factory.mktemp("base") / "base", text_config=tiny_phi_config(resid_pdrop=0.0))


def launch(function, *args, processes: int = 2):
    """Call a function in forked processes, as `accelerate.debug_launcher` does, but not for ever."""
    with tempfile.NamedTemporaryFile() as rendezvous:
        environment = {"accelerate_mixed_precision": "no", "accelerate_use_cpu": "yes", "world_size": processes}
        environment |= {
            "master_addr": "127.0.0.1",
            "master_port": "29500",
            "accelerate_debug_rdv_file": rendezvous.name,
        }
        with patch_environment(**environment):
            context = torch.multiprocessing.start_processes(
                PrepareForLaunch(_guarded, debug=True), (function, *args), processes, join=False, start_method="fork"
            )
            deadline = time.monotonic() + TIMEOUT
            try:
                while not context.join(timeout=1):  # which raises what a process raised
                    assert time.monotonic() < deadline, "the processes wait for each other"
            finally:
                for process in context.processes:
                    process.kill()


def _guarded(function, *args):
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # of the parent, which is a single process
    try:
        function(*args)
    except KeyboardInterrupt:
        pass
    except Exception:
        traceback.print_exc()
        raise


def as_on_gpus(config: str, function, *args, mixed_precision: str):
    """Call a function under a configuration of `training/accelerate`, of which Accelerate leaves sharding out on a CPU."""
    arguments = ["--config_file", str(CONFIGS / config), "script.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(arguments))[0]
    arguments.deepspeed_fields_from_accelerate_config = []
    environment = prepare_multi_gpu_env(arguments)
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.MULTI_GPU
    if arguments.use_deepspeed:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ for minutes
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
        state.distributed_type = DistributedType.DEEPSPEED
    names = [name for name in environment if name.startswith(("ACCELERATE_", "FSDP_"))]
    changes = {"ACCELERATE_MIXED_PRECISION": mixed_precision, "FSDP_SYNC_MODULE_STATES": "false"}
    changes["ACCELERATE_USE_CPU"] = "false"  # known by now, and DeepSpeed is left out where it is set
    os.environ.update({name: environment[name] for name in names} | changes)
    function(*args)


def without_dropout(stage):
    """Dropout is drawn by each process for itself: without it, runs can be compared."""
    lora = {name: replace(getattr(stage, name), dropout=0.0) for name in ("language_lora", "qformer_lora")}
    return replace(stage, **lora)


def test_two_processes_equal_one(base, release, tmp_path):
    """The batch is divided, so neither the weights nor the history depend on the number of processes."""
    stage = without_dropout(tiny(STAGES["II"]))
    one = train(stage, options(base, tmp_path / "one", release))
    launch(train, stage, options(base, tmp_path / "two", release))
    of_one, of_two = history(one), history(tmp_path / "two")
    assert [entry["source"] for entry in of_two] == [entry["source"] for entry in of_one]
    for name in ("loss", "lr", "grad_norm"):
        assert [entry[name] for entry in of_two] == pytest.approx([entry[name] for entry in of_one], rel=1e-4)
    expected, got = load_file(one / ADAPTER), load_file(tmp_path / "two" / ADAPTER)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam's first steps are the rate's size whatever the gradient's: compare with that.
        assert (got[name] - tensor).abs().mean() < 0.02 * stage.peak_lr, name


def test_more_processes_than_samples_equal_one(base, release, tmp_path):
    """Three samples for four processes: one is idle and does not count."""
    stage = without_dropout(tiny(STAGES["IV"], exports=False))
    one = train(stage, options(base, tmp_path / "one", release, max_steps=2))
    launch(train, stage, options(base, tmp_path / "four", release, max_steps=2), processes=4)
    for of_one, of_four in zip(history(one), history(tmp_path / "four"), strict=True):
        assert of_four["loss"] == pytest.approx(of_one["loss"], rel=1e-4)
        assert of_four["grad_norm"] == pytest.approx(of_one["grad_norm"], rel=1e-3)
        assert of_four["router"]["load"] == pytest.approx(of_one["router"]["load"])


def test_the_router_is_measured_over_all_processes(base, release, tmp_path):
    stage = without_dropout(tiny(STAGES["IV"], exports=False))
    one = train(stage, options(base, tmp_path / "one", release, max_steps=1))
    launch(train, stage, options(base, tmp_path / "two", release, max_steps=1))
    (of_one,), (of_two,) = history(one), history(tmp_path / "two")
    assert of_two["router"]["load"] == pytest.approx(of_one["router"]["load"])
    assert of_two["router"]["between"] == pytest.approx(of_one["router"]["between"], abs=1e-5)


def _interrupted(stage, settings, last_step: int):
    """End like a killed run, in every process after the same step."""
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
def test_a_killed_run_of_two_processes_resumes_exactly(num_workers, base, release, tmp_path):
    """In the mixture of stage III, over the end of an epoch (6 objects, 3 a step), with dropout."""
    stage = tiny(STAGES["III"], steps_per_epoch=10, augment=True)
    pack(release_entries(release[0], release[1]), tmp_path / "packed", rows_per_shard=2, num_workers=1)
    packed = tmp_path / "packed", []
    launch(train, stage, options(base, tmp_path / "straight", packed))
    settings = options(base, tmp_path / "killed", packed, save_every=3, num_workers=num_workers)
    launch(_interrupted, stage, settings, 7)
    work_dir = tmp_path / "killed.unfinished"
    assert (work_dir / "checkpoint-6").is_dir()
    assert len((work_dir / "history.jsonl").read_text().splitlines()) == 6, (
        "a step is logged while the next is computed"
    )
    launch(train, stage, replace(settings, resume="auto"))
    assert same_run(tmp_path / "straight", tmp_path / "killed")


def _on_own_disks(function, stage, settings, *args):
    """Each process as on a machine of its own."""
    rank = torch.distributed.get_rank()
    function(stage, replace(settings, output_dir=settings.output_dir / f"disk{rank}" / "run"), *args)


def test_processes_without_a_shared_disk_resume_together(base, release, tmp_path):
    """Only the main process writes checkpoints."""
    stage = tiny(STAGES["II"])
    for rank in (0, 1):
        (tmp_path / f"disk{rank}").mkdir()
    launch(train, stage, options(base, tmp_path / "straight", release))
    settings = options(base, tmp_path, release, save_every=2)
    launch(_on_own_disks, _interrupted, stage, settings, 3)
    assert not (tmp_path / "disk1" / "run.unfinished").exists()
    launch(_on_own_disks, train, stage, replace(settings, resume="auto"))
    assert same_run(tmp_path / "straight", tmp_path / "disk0" / "run")


def _train_and_record_dtypes(config: str, mixed_precision: str, stage, settings, out: Path):
    seen = {}

    def record(name):
        def hook(module, args, kwargs, output):
            inputs = kwargs.get("point_clouds", args[0] if args else None)
            loss = output.loss if name == "model" else None
            seen[name] = str(inputs.dtype), str(getattr(loss, "dtype", None))
            seen["sharded"] = type(module).__name__.startswith("FSDP") | seen.get("sharded", False)

        return hook

    prepare = loop.prepare

    def hooked(*args):
        model, optimizer = prepare(*args)
        model.register_forward_hook(record("model"), with_kwargs=True)
        encoder = model.base_model.model.model.point_encoder
        encoder.register_forward_hook(record("encoder"), with_kwargs=True)
        grouping = point_bert_minigpt3d.find_groups

        def find_groups(coord, *args):
            seen["grouping"] = str(coord.dtype)
            assert torch.equal(coord, clouds_of_step.pop()[..., :3]), "no other values than those of the data"
            return grouping(coord, *args)

        point_bert_minigpt3d.find_groups = find_groups
        return model, optimizer

    clouds_of_step = []
    pack = loop.pack_batch

    def packed(*args):
        batch = pack(*args)
        clouds_of_step[:0] = [batch["point_clouds"]]
        return batch

    loop.prepare, loop.pack_batch = hooked, packed
    as_on_gpus(config, train, stage, settings, mixed_precision=mixed_precision)
    if not out.exists():
        out.write_text(json.dumps(seen))


@pytest.mark.parametrize(("mixed_precision", "tolerance"), [("no", 1e-4), ("bf16", 0.01)])
def test_fsdp2_of_accelerate_equals_one_process(mixed_precision, tolerance, base, release, tmp_path):
    """With the configuration as it is launched. Clouds are grouped in float32 whatever the weights are cast to."""
    stage = without_dropout(tiny(STAGES["II"]))
    one = train(stage, options(base, tmp_path / "one", release))
    settings = options(base, tmp_path / "two", release)
    launch(_train_and_record_dtypes, "fsdp2.yaml", mixed_precision, stage, settings, tmp_path / "seen.json")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["sharded"] and seen["grouping"] == "torch.float32"
    assert seen["encoder"][0] == "torch.float32" and seen["model"] == ["torch.float32", "torch.float32"]
    for of_one, of_two in zip(history(one), history(tmp_path / "two"), strict=True):
        assert of_two["loss"] == pytest.approx(of_one["loss"], rel=tolerance)
        assert of_two["grad_norm"] == pytest.approx(of_one["grad_norm"], rel=10 * tolerance)
    for name, tensor in load_file(tmp_path / "two" / ADAPTER).items():
        assert tensor.dtype == torch.float32, name


def _load_and_measure(base, stage, settings):
    """Write how much more memory this process has to itself after loading, beside the size of the parameters."""
    accelerator = make_accelerator()
    before = private_memory()
    model = load_stage_model(accelerator, stage, ModelFiles(str(base)), settings)
    growth = private_memory() - before
    size = sum(parameter.nbytes for parameter in model.parameters())
    model, _ = prepare(accelerator, model, make_optimizer(stage, model), device_batch=1)
    model = accelerator.unwrap_model(model)
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED  # which gathers only what its optimizer has
    names = [name for name, parameter in named_parameters(model).items() if parameter.requires_grad or not deepspeed]
    weights = gather_parameters(model, names)
    torch.save((growth, size, weights), settings.output_dir / f"{accelerator.process_index}.pt")


def private_memory() -> int:
    """Bytes of this process that no other one shares."""
    found = re.findall(r"Private_\w+: *([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())
    return 1024 * sum(map(int, found))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_one_process_reads_the_weights(config, release, tmp_path):
    """And sends them to the others, which have loaded none."""
    if "deepspeed" in config:
        pytest.importorskip("deepspeed")
    base = write_base(tmp_path / "base", text_config=tiny_phi_config(vocab_size=100_000))
    settings = options(base, tmp_path, release)
    arguments = base, without_dropout(tiny(STAGES["II"])), settings
    launch(partial(as_on_gpus, f"{config}.yaml", mixed_precision="no"), _load_and_measure, *arguments)
    (of_main, size, expected), (growth, _, weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    print(f"{config}: weights {size / 1e6:.0f} MB, main process {of_main / 1e6:.0f} MB, other {growth / 1e6:.0f} MB")
    assert size > 50e6 and growth < of_main - 0.8 * size, "imports take memory in both"
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    original = load_file(base / "model.safetensors")
    same = [name for name in original if name in weights]
    assert same and all(torch.equal(weights[name], original[name]) for name in same)


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize(("mixed_precision", "tolerance"), [("no", 1e-4), ("bf16", 0.01)])
def test_deepspeed_equals_one_process(zero_stage, mixed_precision, tolerance, base, release, tmp_path):
    """With the configurations as they are launched. The adapter holds what the optimizer keeps in float32."""
    pytest.importorskip("deepspeed")
    stage = without_dropout(tiny(STAGES["II"]))
    one = train(stage, options(base, tmp_path / "one", release, device_batch=1))
    settings = options(
        base, tmp_path / "two", release, device_batch=1
    )  # the second process has one sample, the first two
    config = f"deepspeed_zero{zero_stage}.yaml"
    launch(_train_and_record_dtypes, config, mixed_precision, stage, settings, tmp_path / "seen.json")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["grouping"] == seen["model"][1] == "torch.float32"
    for of_one, of_two in zip(history(one), history(tmp_path / "two"), strict=True):
        assert of_two["loss"] == pytest.approx(of_one["loss"], rel=tolerance)
        assert of_two["grad_norm"] == pytest.approx(of_one["grad_norm"], rel=10 * tolerance)
    expected = load_file(one / ADAPTER)
    for name, tensor in load_file(tmp_path / "two" / ADAPTER).items():
        assert tensor.dtype == torch.float32 and tensor.shape == expected[name].shape, name
        if "lora_A" in name:
            assert not torch.equal(tensor, tensor.bfloat16().float()), "more digits than the model's weights have"


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_deepspeed_resumes(zero_stage, base, release, tmp_path):
    pytest.importorskip("deepspeed")
    stage, config = without_dropout(tiny(STAGES["II"])), f"deepspeed_zero{zero_stage}.yaml"
    run = partial(_as_with_deepspeed, config)
    launch(run, train, stage, options(base, tmp_path / "straight", release))
    settings = options(base, tmp_path / "killed", release, save_every=2)
    launch(run, _interrupted, stage, settings, 3)
    launch(run, train, stage, replace(settings, resume="auto"))
    assert same_run(tmp_path / "straight", tmp_path / "killed")


def _as_with_deepspeed(config: str, function, *args):
    as_on_gpus(config, function, *args, mixed_precision="no")


def _shard(stage, batches: list, out: str):
    """Two steps with FSDP2's shards on a mesh of CPUs, with a stop in between. (Accelerate knows FSDP2 on GPUs only.)"""
    import torch.distributed as dist
    from accelerate import PartialState
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from minigpt3d.training.run_state import FULL_STATE

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
    state = get_optimizer_state_dict(model, optimizer, options=FULL_STATE)
    if dist.get_rank() == 0:  # only rank 0 has the state; all read the file
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
    set_optimizer_state_dict(again, again_optimizer, state, options=FULL_STATE)
    step(model, optimizer, batches[1])
    step(again, again_optimizer, batches[1])
    results = [gather_parameters(model, names), gather_parameters(again, names)]
    if dist.get_rank() == 0:
        torch.save({"once": trained, "twice": results}, out)
        Path(out + ".json").write_text(json.dumps([sharded, whole]))


def test_sharded_weights_train_and_are_gathered(release, tiny_processor, tmp_path):
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
