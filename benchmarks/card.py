"""Check and measure everything on a GPU, in one prepared run: one line of JSON a part, as it ends.

    python benchmarks/card.py [--minutes 8] [--out build/card.jsonl] [--only PART ...]

On a GPU: the paper's model with random weights, whose base is written to a temporary folder (6 GB). Without one: a tiny model
on the CPU, which shows that every part runs. Nothing is downloaded. The parts that tell most come first:

setup          versions, device, speed of a large matrix product
grouping       sampling and neighbors beside the CPU's: random clouds, real objects, NaN, a large batch
encoder        cloud to vectors in float32, float16 and bfloat16 beside the CPU in float32
answers        greedy answers of the bundled model beside those of the CPU
stage_II …     training steps in bfloat16 as `training/stage2.py` takes them: samples/s, MFU, peak memory, kernels, share of the
               time that the GPU computes, waits
fsdp2          the same under `training/accelerate/fsdp2.yaml`, with one process
four_bit, checkpointing, flash, compile    stage II with these
describe       files a second of `minigpt3d describe`, with loading the model
speed          `benchmarks/encode.py`
other_gpus     grouping and encoder on cuda:1 and so on
generation     `benchmarks/generate.py` with the bundled model; of a static cache, transformers compiles each step on a GPU

`status` of a line: done; wrong (`wrong` says what differs); failed (an error, with its traceback); left out (`reason` says why).
The exit code is 1 if a part is wrong or failed. MFU is relative to the measured matrix product, see `benchmarks/train.py`.
"""

import argparse
import copy
import gc
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate.utils import DistributedType
from counting import OperatorCounter
from describe_files import describe_folder
from encode import BF16_TOLERANCE, make_model, make_point_clouds, measure, run as compare_encoders
from generate import make_inputs, run as compare_generation
from operators import THIN
from torch.profiler import ProfilerActivity, profile
from train import make_samples, matmul_peak, num_weights
from transformers.utils import is_flash_attn_2_available

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig, MiniGPT3DPhiConfig
from minigpt3d.evaluation.ask import generate
from minigpt3d.evaluation.objects import HOUSEHOLD_FILE, read_household
from minigpt3d.evaluation.suites import GREEDY
from minigpt3d.grouping_minigpt3d import farthest_point_sampling, nearest_neighbors
from minigpt3d.hub import BUNDLED_MODEL, ModelFiles, load_model
from minigpt3d.messages import one_line
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT
from minigpt3d.training import launch
from minigpt3d.training.loop import Reading, make_optimizer, train_step
from minigpt3d.training.run_options import RunOptions
from minigpt3d.training.stages import RECIPES, Stage
from minigpt3d.training.stream import Packing, pack_batch
from minigpt3d.training.weights import (
    compile_layers,
    gather_parameters,
    half_precision,
    halve_frozen,
    is_sharded,
    load_stage_model,
    lora_scales,
    named_parameters,
    prepare_model,
    save_adapter,
)


FSDP2 = Path(launch.__file__).parent / "accelerate" / "fsdp2.yaml"
STAGES = RECIPES["paper"]
# Largest difference to the CPU over the largest value.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: BF16_TOLERANCE}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        config: arguments of `MiniGPT3DConfig`.
        num_points: of a cloud.
        large_batch: clouds whose neighbors are searched at once.
        num_objects: household objects that are grouped and asked about.
        max_new_tokens, batches: of `generation`.
        repeats: blocks of training steps, and timed calls of other parts.
        block: training steps of a block.
        matmul: rows of the matrices whose product is timed.
    """

    config: dict
    num_points: int
    large_batch: int
    num_objects: int
    max_new_tokens: int
    batches: tuple[int, ...]
    repeats: int
    block: int
    matmul: int


PAPER = Sizes({}, 8192, 512, 64, 150, (1, 64), 3, 8, 8192)
SHALLOW = {part: fields | {"num_hidden_layers": 2} for part, fields in THIN.items() if isinstance(fields, dict)}
SHALLOW["text_config"] |= {
    "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
TINY = Sizes(THIN | SHALLOW | {"num_query_tokens": 4, "point_token_id": 500}, 128, 4, 2, 8, (2,), 1, 2, 256)


class LeftOut(Exception):
    """Why a part cannot run here."""


class Card:
    """What the parts share.

    Args:
        device: the first GPU, or the CPU.
        folder: for temporary files.
        ends: when the time is over, by `time.monotonic()`.
    """

    def __init__(self, device: torch.device, folder: Path, ends: float):
        self.device, self.folder, self.ends = device, folder, ends
        self.sizes = PAPER if device.type == "cuda" else TINY

    @cached_property
    def base(self) -> Path:
        """Folder of the model that the stages start from: random weights in bfloat16."""
        torch.manual_seed(0)
        with self.device:
            model = MiniGPT3DForConditionalGeneration(MiniGPT3DConfig(router_type="none", **self.sizes.config))
        model.to(torch.bfloat16).save_pretrained(self.folder / "base")
        return self.folder / "base"

    @cached_property
    def third_stage(self) -> ModelFiles:
        """The model that stage IV starts from: the base, and an adapter as stage III leaves it."""
        model = MiniGPT3DForConditionalGeneration.from_pretrained(
            self.base, dtype=torch.float32, device_map={"": self.device}
        )
        model = prepare_model(model, STAGES["III"])
        names = [name for name, parameter in named_parameters(model).items() if parameter.requires_grad]
        adapter, run = self.folder / "adapter", {"stage": "III", "router_type": "none"}
        save_adapter(adapter, gather_parameters(model, names), lora_scales(model), self.base, run)
        return ModelFiles(str(self.base), adapter, run)

    @cached_property
    def peak(self) -> float:
        """Operations a second of a large matrix product in bfloat16."""
        return matmul_peak(self.device, torch.bfloat16, self.sizes.matmul)

    @cached_property
    def clouds(self) -> list[np.ndarray]:
        """Clouds of household objects, each (N, 6)."""
        return [item.read() for item in read_household(HOUSEHOLD_FILE)[: self.sizes.num_objects]]


# ---- Parts ----------------------------------------------------------------------------------------------------------

# Each returns the values of its line; `wrong` lists what differs.


def setup(card: Card) -> dict:
    names = ("torch", "transformers", "accelerate", "peft", "numpy")
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(card.device),
        "model": "paper" if card.sizes is PAPER else "tiny",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "threads": torch.get_num_threads(),
        "matmul_tflops": {
            "bfloat16": card.peak / 1e12,
            "float32": matmul_peak(card.device, torch.float32, card.sizes.matmul) / 1e12,
        },
    }
    if card.device.type == "cuda":
        properties = torch.cuda.get_device_properties(card.device)
        result |= {"name": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
        result |= {"capability": f"{properties.major}.{properties.minor}", "gpus": torch.cuda.device_count()}
    return result


def grouping(card: Card, device: torch.device | None = None) -> dict:
    """The same points are sampled as on the CPU, and neighbors are as near."""
    device = device or card.device
    config = MiniGPT3DConfig(**card.sizes.config).point_config
    num_groups, group_size = config.num_groups, config.group_size
    random = make_point_clouds(9, card.sizes.num_points)[..., :3]
    damaged = random[:2].clone()
    damaged[0, 17, 1] = torch.nan
    real = torch.from_numpy(np.stack(card.clouds))[..., :3].float().contiguous()
    result, wrong = {}, []
    for name, coord in {"random": random, "nan": damaged, "real": real}.items():
        expected = farthest_point_sampling(coord, num_groups)
        got = farthest_point_sampling(coord.to(device), num_groups).cpu()
        result[f"sampling_{name}"] = (got == expected).float().mean().item()
        if not torch.equal(got, expected):
            wrong.append(f"sampling, {name}: {result[f'sampling_{name}']:.2%} of the points are the CPU's")
        if name == "nan":
            continue
        center = coord.gather(1, expected[..., None].expand(-1, -1, 3))
        ours = nearest_neighbors(coord.to(device), center.to(device), group_size).cpu()
        theirs = nearest_neighbors(coord, center, group_size)
        result[f"neighbors_{name}"] = (ours.sort().values == theirs.sort().values).float().mean().item()
        # Of points that are equally far within rounding, others may be chosen.
        far = [neighbor_distances(coord, center, neighbors) for neighbors in (ours, theirs)]
        if not torch.allclose(*far, rtol=1e-5, atol=1e-7):
            wrong.append(f"neighbors, {name}: distances differ by up to {(far[0] - far[1]).abs().max():.1e}")
    many = make_point_clouds(card.sizes.large_batch, card.sizes.num_points)[..., :3].to(device)
    center, coord = many[:, :num_groups], random.to(device)
    for name, function in {
        "sampling": partial(farthest_point_sampling, coord, num_groups),
        "neighbors": partial(nearest_neighbors, coord, coord[:, :num_groups], group_size),
        "neighbors_large_batch": partial(nearest_neighbors, many, center, group_size),
    }.items():
        function()
        seconds = statistics.median(measure(function, device) for _ in range(card.sizes.repeats))
        result[f"{name}_ms"] = 1000 * seconds
    return result | {"clouds": len(random), "large_batch": len(many), "wrong": wrong}


def neighbor_distances(coord: torch.Tensor, center: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
    """Sorted distances (B, G, K) from centers (B, G, 3) to the neighbors (B, G, K) among (B, N, 3)."""
    chosen = coord.gather(1, neighbors.flatten(1)[..., None].expand(-1, -1, 3)).unflatten(1, neighbors.shape[1:])
    return (chosen - center[:, :, None]).norm(dim=-1).sort().values


@torch.inference_mode()
def encoder(card: Card, device: torch.device | None = None) -> dict:
    """The vectors that the language model reads, beside those of the CPU in float32."""
    device = device or card.device
    model, point_clouds = encoder_model(card), make_point_clouds(4, card.sizes.num_points)
    model.config.router_type = "soft"  # rounding may choose other experts, but hardly changes their weights
    expected = model.get_point_features(point_clouds).pooler_output
    result, wrong = {}, []
    for dtype, tolerance in TOLERANCES.items():
        got = copy.deepcopy(model).to(device, dtype).get_point_features(point_clouds.to(device)).pooler_output
        difference = float((got.cpu().float() - expected).abs().max() / expected.abs().max())
        name = str(dtype).removeprefix("torch.")
        result[f"difference_{name}"] = difference
        if not difference <= tolerance:
            wrong.append(f"{name} differs by {difference:.1e} of the largest value, {tolerance:.0e} is allowed")
    return result | {"wrong": wrong}


def encoder_model(card: Card) -> torch.nn.Module:
    """On the CPU, with a language model of no layers."""
    if card.sizes is PAPER:
        return make_model()
    text = MiniGPT3DPhiConfig(**card.sizes.config["text_config"] | {"num_hidden_layers": 0})
    return make_model(MiniGPT3DConfig(**card.sizes.config | {"text_config": text}))


def answers(card: Card) -> dict:
    """Shares of the bundled model's greedy answers that are those of the CPU in float32; in float32, all must be."""
    model, processor = load_model(BUNDLED_MODEL, dtype=torch.float32)
    model.eval()

    def ask(model: torch.nn.Module) -> list[str]:
        decoding = GREEDY | {"max_new_tokens": card.sizes.max_new_tokens}
        return [
            one["answer"] for one in generate(model, processor, card.clouds, DEFAULT_PROMPT, "default", decoding, 0)
        ]

    expected, result, wrong = ask(model), {"objects": len(card.clouds), "example": None}, []
    for dtype in (torch.float32, torch.bfloat16):
        got = ask(copy.deepcopy(model).to(card.device, dtype))
        name = str(dtype).removeprefix("torch.")
        result[f"same_{name}"] = statistics.fmean(map(str.__eq__, got, expected))
        if dtype == torch.float32 and got != expected:
            one, other = next(pair for pair in zip(got, expected, strict=True) if pair[0] != pair[1])
            wrong.append(f"{name}: {one!r} where the CPU says {other!r}")
    return result | {"example": expected[0], "wrong": wrong}


def load_training(accelerator, stage: Stage, start: ModelFiles, options: RunOptions, compiled: bool) -> tuple:
    """Model and optimizer as the loop prepares them, how it packs batches, and the number of its weights."""
    model = load_stage_model(accelerator, stage, start, options)
    if not is_sharded(accelerator):
        halve_frozen(model, half_precision(accelerator))
    packing, weights = Packing.of(model), num_weights(model)
    if compiled:
        compile_layers(model, "inductor" if accelerator.device.type == "cuda" else "eager")
    prepared = launch.prepare(accelerator, model, make_optimizer(stage, model), stage.mixture[0].batch)
    return *prepared, packing, weights


def training(
    card: Card, name: str, four_bit: bool = False, checkpointing: bool = False, attention: str | None = None,
    compiled: bool = False,
) -> dict:  # fmt: skip
    """Steps of a stage at its batch, in bfloat16, as its command takes them: the loss is read one step late.

    Args:
        name: of the stage.
        four_bit, checkpointing, attention: see `RunOptions`.
        compiled: whether the repeated layers are compiled.
    """
    stage, sizes = STAGES[name], card.sizes
    accelerator = launch.make_accelerator(mixed_precision="bf16")
    device, source = accelerator.device, stage.mixture[0]
    options = RunOptions(
        init=str(card.base), data="", output_dir=card.folder / "unused", load_in_4bit=four_bit,
        gradient_checkpointing=checkpointing, attn_implementation=attention,
    )  # fmt: skip
    start = card.third_stage if name == "IV" else ModelFiles(str(card.base))
    started = time.perf_counter()
    model, optimizer, packing, weights = load_training(accelerator, stage, start, options, compiled)
    loading = time.perf_counter() - started
    rng = np.random.default_rng(0)
    config = MiniGPT3DConfig(**sizes.config)
    batches = [make_samples(stage, config, source.batch, sizes.num_points, rng) for _ in range(sizes.block)]

    def step(batch: dict) -> Reading:
        return Reading(torch.stack(train_step(accelerator, model, optimizer, [batch], stage.peak_lr)))

    def block() -> list[list[float]]:
        results, pending = [], None
        for samples in batches:
            latest = step(pack_batch(samples, packing))
            if pending is not None:
                results.append(pending.wait())
            pending = latest
        return [*results, pending.wait()]

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    first = block()  # allocates memory, and compiles
    warm_up = time.perf_counter() - started
    seconds = sorted(measure(block, device) / sizes.block for _ in range(sizes.repeats))
    last = block()
    rates = [source.batch / second for second in seconds]
    tokens = sum(len(sample["input_ids"]) for batch in batches for sample in batch) / sizes.block
    second = statistics.median(seconds)
    result = {
        "batch": source.batch,
        "tokens_per_sample": tokens / source.batch,
        "samples_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "mfu_4n": 4 * weights * tokens / second / card.peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "loading_s": loading,
        "warm_up_s": warm_up,
        "loss": [first[0][0], last[-1][0]],
    }
    once = partial(step, pack_batch(batches[0], packing))
    result |= count_gpu(once, second) if device.type == "cuda" else count_cpu(once)
    if accelerator.distributed_type == DistributedType.FSDP:
        result["sharded"] = all(hasattr(p, "full_tensor") for p in model.parameters() if p.requires_grad)
    wrong = [] if all(map(math.isfinite, sum(first + last, []))) else ["a loss or norm is not finite"]
    if result.get("sharded") is False:
        wrong.append("parameters that are trained are not sharded")
    return result | {"wrong": wrong}


def count_gpu(step: Callable, seconds: float) -> dict:
    """Kernels of a step with memory copies, the share of its seconds that they take, and how often the CPU waits."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        reading = step()
        torch.cuda.synchronize()
    reading.wait()
    events = profiler.events()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy") for event in events)
    return {"kernels": len(kernels), "busy": busy / seconds, "waits": waits}


def count_cpu(step: Callable) -> dict:
    """Operators of a step, and those that would wait for a GPU."""
    with OperatorCounter() as counter:
        step()
    return {"operators": counter.operators.total(), "waits": counter.waits.total()}


def fsdp2(card: Card) -> dict:
    """Stage II under Accelerate's configuration, in a process that `accelerate launch` starts."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # this is that process
        return training(card, "II")
    if card.device.type != "cuda":
        raise LeftOut("Accelerate shards nothing on a CPU")
    out = card.folder / "fsdp2.jsonl"
    minutes = max((card.ends - time.monotonic()) / 60 - 0.2, 0.1)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", "1"]
    command += [__file__, "--only", "fsdp2", "--minutes", f"{minutes:.2f}", "--out", str(out)]
    process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if not (out.exists() and out.stat().st_size):
        raise RuntimeError(f"accelerate launch ended with {process.returncode}: {process.stderr[-2000:]}")
    return json.loads(out.read_text().splitlines()[-1])


def four_bit(card: Card) -> dict:
    if find_spec("bitsandbytes") is None:
        raise LeftOut("bitsandbytes is not installed: pip install 'minigpt3d[quantization]'")
    return training(card, "II", four_bit=True)


def flash(card: Card) -> dict:
    if not is_flash_attn_2_available():
        raise LeftOut("flash attention needs a GPU and the package flash-attn")
    return training(card, "II", attention="flash_attention_2")


def generation(card: Card) -> dict:
    model, processor = load_model(BUNDLED_MODEL, dtype=torch.float32)
    model, rows = model.to(card.device).eval(), []
    for batch in card.sizes.batches:
        inputs = make_inputs(processor, batch, DEFAULT_PROMPT, card.device)
        rows += compare_generation(model, processor, inputs, card.sizes.max_new_tokens, card.sizes.repeats)
    return {"rows": [asdict(row) for row in rows]}


def describe(card: Card) -> dict:
    folder = card.folder / "objects"
    folder.mkdir()
    for number, cloud in enumerate(card.clouds):
        np.save(folder / f"{number:03}.npy", cloud)
    found = []
    seconds = measure(lambda: found.extend(describe_folder(folder, card.device.type)), card.device)
    wrong = [] if len(found) == len(card.clouds) else [f"{len(found)} answers about {len(card.clouds)} files"]
    return {"files": len(found), "files_per_second": len(found) / seconds, "wrong": wrong}


def speed(card: Card) -> dict:
    torch.backends.cudnn.allow_tf32 = False
    clouds = make_point_clouds(4, card.sizes.num_points).to(card.device)
    rows = compare_encoders(encoder_model(card).to(card.device), clouds, card.sizes.repeats)
    return {"rows": [asdict(row) for row in rows]}


def other_gpus(card: Card) -> dict:
    count = torch.cuda.device_count()
    if count < 2:
        raise LeftOut(f"{count} GPUs, 2 are needed")
    devices = {f"cuda:{index}": torch.device("cuda", index) for index in range(1, count)}
    result = {name: grouping(card, device) | encoder(card, device) for name, device in devices.items()}
    result["wrong"] = [f"{name}: {text}" for name in devices for text in result[name].pop("wrong")]
    return result


PARTS: dict[str, Callable[[Card], dict]] = {
    "setup": setup,
    "grouping": grouping,
    "encoder": encoder,
    "answers": answers,
    "stage_II": partial(training, name="II"),
    "fsdp2": fsdp2,
    "four_bit": four_bit,
    "stage_III": partial(training, name="III"),
    "stage_I": partial(training, name="I"),
    "stage_IV": partial(training, name="IV"),
    "checkpointing": partial(training, name="II", checkpointing=True),
    "flash": flash,
    "describe": describe,
    "speed": speed,
    "other_gpus": other_gpus,
    "compile": partial(training, name="II", compiled=True),
    "generation": generation,
}


# ---- The run --------------------------------------------------------------------------------------------------------


def run_part(name: str, card: Card) -> dict:
    """The line of a part."""
    left = card.ends - time.monotonic()
    line = {"part": name, "status": "left out", "reason": "--minutes were over"}
    if left <= 0:
        return line
    started = time.monotonic()
    try:
        with time_limit(left):
            values = PARTS[name](card)
    except LeftOut as reason:
        return line | {"reason": str(reason)}
    except Exception as error:
        seconds = time.monotonic() - started
        line |= {"status": "failed", "reason": one_line(error)[:500], "seconds": seconds}
        return line | {"traceback": traceback.format_exc()[-4000:]}
    finally:
        gc.collect()
        if card.device.type == "cuda":
            torch.cuda.empty_cache()
    status = "wrong" if values.get("wrong") else "done"
    return {"part": name, "status": status} | values | {"part": name, "seconds": time.monotonic() - started}


@contextmanager
def time_limit(seconds: float):
    """Raise TimeoutError in a part that takes longer, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError("--minutes were over before the part ended")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rounded(value):
    """Four digits of every number in lists and dictionaries; null for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=8, help="parts that do not end in time are left out (default: 8)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/card.jsonl"),
        help="file that gets the lines, too (default: %(default)s)",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="these parts")
    args = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * args.minutes
    if not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ok = True
    with tempfile.TemporaryDirectory() as folder, open(args.out, "a", encoding="utf-8") as file:
        card = Card(device, Path(folder), ends)
        for name in args.only:
            line = run_part(name, card)
            ok &= line["status"] in ("done", "left out")
            text = json.dumps(rounded(line), ensure_ascii=False)
            print(text, flush=True)
            print(text, file=file, flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
