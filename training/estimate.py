"""What a stage needs before there is a device to try it on: memory of the card, and hours.

    python training/estimate.py --stage II --gpu h200
    python training/estimate.py --stage II --gpu 3090 --base 4bit --device_batch 3

Nothing is derived by hand. The model is built and takes one step of the stage, forward and backward, on tensors that have
shapes and no contents (`FakeTensorMode`), so any configuration and any language model is counted as it is: operations
by torch's own counter, memory by the storages that are alive at once. What is assumed stands in the constants below.
"""

import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from weakref import finalize

import psutil
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import HfArgumentParser

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.training.stages import RECIPES, Stage, select_trainable
from minigpt3d.training.stream import pack_batch
from minigpt3d.training.train import ArgumentDefaultsShown
from minigpt3d.training.weights import add_lora, named_parameters, set_training_mode


# ---- What is assumed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device as its vendor describes it.

    Args:
        memory: GB.
        half_tflops: dense, of the tensor cores in bfloat16 (T4: float16) with float32 accumulation.
        float_tflops: in float32, without TF32.
        has_bf16: whether it computes in bfloat16.
    """

    memory: float
    half_tflops: float
    float_tflops: float
    has_bf16: bool = True


# NVIDIA's data sheets and architecture white papers; SXM where there are several, dense where they print "with sparsity".
GPUS = {
    "h200": Device(141, 989, 67),
    "h100": Device(80, 989, 67),
    "a100": Device(80, 312, 19.5),
    "a100-40gb": Device(40, 312, 19.5),
    "l40s": Device(48, 362, 91.6),
    "a6000": Device(48, 155, 38.7),
    "l4": Device(24, 121, 30.3),
    "4090": Device(24, 165, 82.6),
    "3090": Device(24, 71, 35.6),
    "t4": Device(16, 65, 8.1, has_bf16=False),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Lengths of PointLLM's samples, as benchmarks/train.py draws them: a prompt of 12 to 27 tokens beside the cloud's, and an
# answer whose length is log-normal with this median and spread.
PROMPT_TOKENS = 19.5
ANSWER_TOKENS = {"brief": (22, 0.4)}
LONGER_ANSWER_TOKENS = (90, 0.6)  # the other sources

LONGEST_STEP = 4  # standard deviations by which the longest step of a stage exceeds the mean
CONTEXT_BYTES = 0.8e9  # CUDA's context, kernels and the allocator's gaps; typical of PyTorch on current cards
FOUR_BIT_BYTES = 0.5 + 4 / 64  # NF4: 4 bits, and a float32 scale for 64 weights
# Handing a kernel to the device from PyTorch's eager mode; typical, not measured here. Small steps are bound by it.
LAUNCH_SECONDS = 8e-6


# ---- One step without contents --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """One forward and backward on a micro-batch.

    Args:
        operations: floating-point operations of the matrix products.
        kernels: of the device, about.
        peak_bytes: alive at once, beside the parameters and their gradients; the logits are among them.
        logits_bytes: of them the log-softmax of the logits and the gradients of both, in float32.
    """

    operations: float
    kernels: int
    peak_bytes: float
    logits_bytes: float


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made under it and are still alive, and the most of them there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.kernels = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_new = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.add(storage)
                    is_new = True
        self.kernels += is_new or func._schema.is_mutable  # the rest are views
        return result

    def ignore(self, model: nn.Module):
        """Parameters and buffers are counted elsewhere."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.known.add(tensor.untyped_storage()._cdata)

    def add(self, storage: torch.UntypedStorage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int):
        self.known.discard(key)
        self.now -= size


def norm_in_float32(model: nn.Module):
    """CUDA's autocast computes norms in float32 and the CPU's does not; it changes the dtype of what is saved."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.register_forward_pre_hook(lambda module, args: (args[0].float(),))


def count_attention(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """Attention on a CPU, which torch's counter passes over."""
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def count_attention_backward(grad_shape, query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products for each of the forward's, and the scores once more."""
    return 5 * sdpa_flop_count(query_shape, key_shape, value_shape) // 2


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: count_attention_backward,
}


def build_model(
    config: MiniGPT3DConfig, stage: Stage, recipe: dict[str, Stage], half: torch.dtype | None
) -> nn.Module:
    """The stage's model on the meta device, as training prepares it: LoRA where this stage or the one before trains it,
    frozen matrices in `half`, if given."""
    with torch.device("meta"):
        model = MiniGPT3DForConditionalGeneration(deepcopy(config))
    model.config.router_type = stage.router_type or model.config.router_type
    before = recipe.get(stage.starts_from)
    if stage.trains_lora or (before is not None and before.trains_lora):
        with torch.device("meta"):
            model = add_lora(model, stage)
    parameters = named_parameters(model)
    trainable = select_trainable(stage, parameters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
        if half is not None and name not in trainable and parameter.ndim >= 2:
            parameter.data = parameter.data.to(half)
    set_training_mode(model)
    return model


def make_fake(model: nn.Module):
    """Move a model from the meta device, in place, to where the current `FakeTensorMode` believes it to be: the CPU, whose
    autocast and attention kernels a tensor on the meta device does not get."""
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = fakes.get(id(tensor))  # tied weights stay tied
                    if fake is None:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, tensor.requires_grad)
                        fakes[id(tensor)] = fake
                    tensors[name] = fake


@dataclass(frozen=True)
class BatchShape:
    """Of a packed micro-batch: clouds, rows and tokens of a row, and answer tokens of all."""

    clouds: int
    rows: int
    width: int
    answers: int


def shape_batch(config: MiniGPT3DConfig, num_samples: int, num_tokens: int, num_answer_tokens: int) -> BatchShape:
    """Samples of equal length, packed as training packs them."""
    ids = torch.zeros(num_tokens, dtype=torch.long)
    ids[: config.num_query_tokens] = config.point_token_id
    labels = ids.clone()
    labels[:-num_answer_tokens] = -100
    sample = {"input_ids": ids, "labels": labels, "point_clouds": torch.zeros(1, 1, config.point_config.num_channels)}
    batch = pack_batch([sample] * num_samples)
    return BatchShape(num_samples, *batch["input_ids"].shape, int(batch["logits_to_keep"].sum()))


def take_step(model: nn.Module, batch: BatchShape, cast: torch.dtype | None) -> int:
    """Forward and backward of the model's parts one after the other, without what looks at values: grouping, the checks
    of the placeholders and the choice of the answers' positions.

    Returns:
        The number of logits.
    """
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    network, point_config = inner.model, inner.config.point_config
    rows, width = batch.rows, batch.width
    dtype = network.point_encoder.cls_token.dtype
    neighborhood = torch.empty(
        batch.clouds, point_config.num_groups, point_config.group_size, point_config.num_channels, dtype=dtype
    )
    with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
        features = network.point_encoder.encode_groups(neighborhood, neighborhood[:, :, 0, :3])  # (B, 1+G, D)
        points = network.language_projection(network.get_query_output(features))  # (B, Q, D_text)
        embeds = network.get_input_embeddings()(torch.empty(rows, width, dtype=torch.long))  # (R, T, D_text)
        mask = torch.empty(rows, width, 1, dtype=torch.bool)
        embeds = embeds.masked_scatter(mask, points.to(embeds.dtype))
        hidden_states = network.language_model(
            inputs_embeds=embeds,
            attention_mask=torch.empty(rows, 1, width, width, dtype=torch.bool),
            position_ids=torch.empty(rows, width, dtype=torch.long),
            use_cache=False,
        ).last_hidden_state
        hidden_states = hidden_states.flatten(0, 1)[torch.empty(batch.answers, dtype=torch.long)][
            None
        ]  # (1, K, D_text)
        logits = inner.lm_head(hidden_states)
        labels = torch.empty(1, batch.answers, dtype=torch.long)
        count = torch.empty((), dtype=torch.long)
        loss = inner.loss_function(
            logits, None, vocab_size=logits.shape[-1], shift_labels=labels, num_items_in_batch=count
        )
        num_logits = logits.numel()
        del features, points, embeds, hidden_states, logits  # as when the model's forward has returned
    loss.backward()
    return num_logits


def trace(model: nn.Module, batch: BatchShape, cast: torch.dtype | None, as_cuda: bool) -> Trace:
    """Count one step of a model from `build_model`, which is of no use afterwards."""
    with FakeTensorMode():
        make_fake(model)
        return _trace(model, batch, cast, as_cuda)


def _trace(model: nn.Module, batch: BatchShape, cast: torch.dtype | None, as_cuda: bool) -> Trace:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    live, counter = LiveBytes(), FlopCounterMode(display=False, custom_mapping=ATTENTION)
    live.ignore(model)
    for parameter in model.parameters():
        if parameter.grad is not None:
            live.known.add(parameter.grad.untyped_storage()._cdata)
    if as_cuda and cast is not None:
        norm_in_float32(model)
    with counter, live:
        num_logits = take_step(model, batch, cast)
    return Trace(counter.get_total_flops(), live.kernels, live.peak, 12 * num_logits)


# ---- What it means for a stage --------------------------------------------------------------------------------------


@dataclass
class EstimateOptions:
    """Which stage, on what, and how."""

    stage: str = field(
        metadata={"help": "Row of the stage table (training/stages.py).", "choices": list(RECIPES["paper"])}
    )
    gpu: str = field(metadata={"help": f"The device: {', '.join(GPUS)}, or cpu for this machine's."})
    recipe: Literal["paper", "household"] = field(default="paper", metadata={"help": "Rows of the stage table."})
    config: Path | None = field(
        default=None, metadata={"help": "Folder or config.json of the model; without it the paper's."}
    )
    gpus: int = field(default=1, metadata={"help": "Devices that share the table's batch."})
    device_batch: int | None = field(
        default=None,
        metadata={"help": "Most samples that a device takes at once, as in training; without it its whole share."},
    )
    dtype: Literal["bf16", "fp16", "fp32"] = field(
        default="bf16",
        metadata={"help": "Mixed precision, in which the frozen matrices are held too; fp32: all in float32."},
    )
    base: Literal["16bit", "4bit"] = field(
        default="16bit",
        metadata={"help": "4bit: the language model's frozen matrices in 4 bits; 16bit: as --dtype says."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward instead of keeping them."}
    )
    mfu: float = field(
        default=0.35,
        metadata={
            "help": "Share of the device's peak that the matrix products reach. The paper's 26.8 h on a 3090 are 0.23 "
            "by this count, its 16.8 h on a 4090 are 0.16."
        },
    )


@dataclass(frozen=True)
class Estimate:
    """What a stage needs: bytes of each device by what they are for, operations, seconds; `launch_bound` where most steps
    wait for kernels to be launched."""

    memory: dict[str, float]
    operations_per_sample: float
    num_samples: int
    step_seconds: float
    num_steps: int
    device_batch: int
    launch_bound: bool

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        return self.step_seconds * self.num_steps


def estimate(stage: Stage, config: MiniGPT3DConfig, device: Device, options: EstimateOptions) -> Estimate:
    """Memory is that of the longest step, time that of the mean one.

    Checked in tests/test_estimate.py on a small model, stages I to IV, on a CPU. Operations: 3 % above torch's counter around
    a real step with plain attention, because the fused kernel computes its scores again. Peak beside weights and gradients,
    float32: within 0.1 % of torch's allocator; it lies 4 to 9 % above what autograd keeps, in float32 and bfloat16. Weights,
    gradients and AdamW's moments: equal. CUDA was not at hand: its float32 norms are imitated, and its workspaces, what
    dequantization keeps, and kernel times are assumed, not measured.
    """
    cast = None if options.dtype == "fp32" else DTYPES[options.dtype]
    batch = max(source.batch for source in stage.mixture)
    device_batch = min(options.device_batch or batch, math.ceil(batch / options.gpus))
    total = sum(source.weight for source in stage.mixture)

    def run(num_samples: int, tokens: tuple[int, int]) -> Trace:
        model = build_model(config, stage, RECIPES[options.recipe], cast)
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return trace(model, shape_batch(config, num_samples, *tokens), cast, options.gpu != "cpu")

    seconds = operations = samples = launch_bound = 0.0
    longest: Trace | None = None
    for source in stage.mixture:
        share = source.weight / total
        num_samples = min(device_batch, math.ceil(source.batch / options.gpus))
        mean = run(num_samples, sample_tokens(source.name, config, stage))
        peak = run(num_samples, sample_tokens(source.name, config, stage, LONGEST_STEP / math.sqrt(num_samples)))
        if longest is None or peak.peak_bytes > longest.peak_bytes:
            longest = peak
        per_sample = mean.operations / num_samples
        micro_batches = math.ceil(source.batch / options.gpus / num_samples)
        flops = (device.float_tflops if cast is None else device.half_tflops) * 1e12
        computed = per_sample * math.ceil(source.batch / options.gpus) / (flops * options.mfu)
        launched = mean.kernels * micro_batches * LAUNCH_SECONDS if options.gpu != "cpu" else 0.0
        seconds += share * max(computed, launched)
        launch_bound += share * (launched > computed)
        operations += share * source.batch * per_sample
        samples += share * source.batch

    memory = weigh(build_model(config, stage, RECIPES[options.recipe], cast), options.base, options.gpus)
    if options.base == "4bit":
        text = config.text_config
        memory["one matrix out of 4 bits"] = 2.0 * text.hidden_size * text.intermediate_size
    memory["activations at the peak"] = longest.peak_bytes - longest.logits_bytes
    memory["logits and their gradients"] = longest.logits_bytes
    if options.gpu != "cpu":
        memory["CUDA context"] = CONTEXT_BYTES
    return Estimate(
        memory,
        operations / samples,
        round(samples * stage.steps),
        seconds,
        stage.steps,
        device_batch,
        launch_bound > 0.5,
    )


def sample_tokens(source: str, config: MiniGPT3DConfig, stage: Stage, deviations: float = 0.0) -> tuple[int, int]:
    """Tokens of a source's mean sample and of its answer, or of one so many standard deviations longer."""
    median, spread = ANSWER_TOKENS.get(source, LONGER_ANSWER_TOKENS)
    mean = median * math.exp(spread**2 / 2)
    answer = min(mean * (1 + deviations * math.sqrt(math.exp(spread**2) - 1)), stage.max_text_length)
    return math.ceil(config.num_query_tokens + PROMPT_TOKENS + answer), math.ceil(answer)


def weigh(model: nn.Module, base: str, gpus: int = 1) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer of a model from `build_model`."""
    in_4_bit = set()
    if base == "4bit":
        inner = model.base_model.model if hasattr(model, "peft_config") else model
        in_4_bit = {
            id(module.weight)
            for module in inner.model.language_model.modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad
        }
    memory: dict[str, float] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.requires_grad:
            name, size = "trainable weights, float32", 4
        elif not tensor.is_floating_point():
            name, size = "counters", tensor.itemsize
        elif id(tensor) in in_4_bit:
            name, size = "frozen weights, 4 bits", FOUR_BIT_BYTES
        else:
            name, size = f"frozen weights, {str(tensor.dtype).removeprefix('torch.')}", tensor.itemsize
        memory[name] = memory.get(name, 0.0) + size * tensor.numel()
    trainable = memory["trainable weights, float32"]
    memory["gradients"] = trainable * (2 if gpus > 1 else 1)  # DistributedDataParallel has a copy in its buckets
    memory["AdamW's two moments"] = 2 * trainable
    return memory


# ---- The command ----------------------------------------------------------------------------------------------------


def find_device(options: EstimateOptions) -> Device:
    """The device by its name; of this machine's CPU what a matrix product reaches.

    Raises:
        ValueError: an unknown name, or a dtype that the device does not have.
    """
    if options.gpu == "cpu":
        rates = [measure_matmul(dtype) / 1e12 for dtype in (DTYPES["bf16"], torch.float32)]
        return Device(psutil.virtual_memory().total / 1e9, *rates)
    if options.gpu not in GPUS:
        raise ValueError(f"--gpu {options.gpu!r} is not known; known: {', '.join(GPUS)}, cpu.")
    device = GPUS[options.gpu]
    if options.dtype == "bf16" and not device.has_bf16:
        raise ValueError(f"--gpu {options.gpu} does not compute in bfloat16. Pass --dtype fp16.")
    return device


def measure_matmul(dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second of a large matrix product on this CPU, as in benchmarks/train.py."""
    a = torch.randn(size, size, dtype=dtype)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def check_options(stage: Stage, options: EstimateOptions):
    """Refuse what training would refuse."""
    for name in ("gpus", "device_batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu must lie between 0 and 1, got {options.mfu}.")
    smallest = min(source.batch for source in stage.mixture)
    if options.gpus > smallest:
        raise ValueError(
            f"--gpus {options.gpus}: a batch of stage {stage.name} has {smallest} samples; pass at most that."
        )
    if options.base == "4bit" and options.dtype == "fp32":
        raise ValueError("--base 4bit computes in half precision. Pass --dtype bf16 or fp16.")


def load_config(path: Path | None) -> MiniGPT3DConfig:
    if path is None:
        return MiniGPT3DConfig()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"--config {path} is neither a folder with a config.json nor a file.")
    return MiniGPT3DConfig.from_dict(json.loads(file.read_text()))


def smaller(options: EstimateOptions, batch: int) -> list[EstimateOptions]:
    """What to change where the stage does not fit, the cheapest in time first."""
    halves = [replace(options, device_batch=size) for size in (batch // 2, 1) if 0 < size < batch]
    ways = halves[:1]
    if not options.gradient_checkpointing:
        ways.append(replace(options, gradient_checkpointing=True))
    ways += halves[1:]
    if options.base != "4bit" and options.dtype != "fp32":
        ways.append(replace(options, base="4bit"))
    last = replace(options, gradient_checkpointing=True, device_batch=1)
    ways.append(last if options.dtype == "fp32" else replace(last, base="4bit"))
    return ways


def describe_change(before: EstimateOptions, after: EstimateOptions) -> str:
    changes = []
    if after.device_batch != before.device_batch:
        changes.append(f"--device_batch {after.device_batch}")
    if after.gradient_checkpointing != before.gradient_checkpointing:
        changes.append("--gradient_checkpointing")
    if after.base != before.base:
        changes.append(f"--base {after.base}")
    return " ".join(changes)


def format_estimate(stage: Stage, result: Estimate, device: Device, options: EstimateOptions) -> str:
    lines = [
        f"Stage {stage.name}, {options.recipe} recipe, {options.gpus} × {options.gpu}, {options.dtype}, "
        f"{result.device_batch} samples at once on a device",
        "",
    ]
    # Some rows are next to nothing.
    lines += [f"{name:<32}{size / 1e9:>9.2f} GB" for name, size in result.memory.items() if size >= 5e6]
    how = (
        f"bound by launching kernels, {LAUNCH_SECONDS * 1e6:g} µs each"
        if result.launch_bound
        else "bound by arithmetic"
    )
    lines += [
        f"{'in all, on each device':<32}{result.bytes / 1e9:>9.2f} GB of {device.memory:.0f} GB: "
        f"{'fits' if fits(result, device) else 'does not fit'}",
        "",
        f"{result.operations_per_sample / 1e12:.3g} T operations a sample, {result.num_samples:,} samples in "
        f"{result.num_steps:,} steps of {result.step_seconds * 1e3:,.0f} ms:",
        f"{format_hours(result)} at a utilisation of {options.mfu:g} ({how})",
    ]
    return "\n".join(lines)


def format_hours(result: Estimate) -> str:
    hours = result.seconds / 3600
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"


def fits(result: Estimate, device: Device) -> bool:
    return result.bytes <= device.memory * 1e9


def main(argv: list[str] | None = None):
    parser = HfArgumentParser(
        EstimateOptions,
        description="Estimate the device memory and the hours of a training stage, without a GPU, weights or data.",
        formatter_class=ArgumentDefaultsShown,
    )
    (options,) = parser.parse_args_into_dataclasses(argv)
    stage = RECIPES[options.recipe][options.stage]
    try:
        check_options(stage, options)
        device, config = find_device(options), load_config(options.config)
        result = estimate(stage, config, device, options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(format_estimate(stage, result, device, options))
    if not fits(result, device):
        print("\nTo make it fit:")
        for change in smaller(options, result.device_batch):
            other = estimate(stage, config, device, change)
            verdict = "fits" if fits(other, device) else "does not fit"
            print(
                f"  {describe_change(options, change):<56}{other.bytes / 1e9:>7.2f} GB, {format_hours(other)}: {verdict}"
            )
            if fits(other, device):
                break
    print("\nMeasured instead of estimated, on the device itself: training/stage*.py --dry_run.")


if __name__ == "__main__":
    main()
