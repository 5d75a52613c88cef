"""Time training steps: this project's beside a plain padded loop, on the same samples and weights.

    python benchmarks/train.py [--size small|paper] [--stage II] [--batch 9] [--steps 5] [--device cuda] [--dtype bfloat16]

plain: the published encoder (`benchmarks/encode.py`); one row per sample, padded to the longest; logits and loss at every
position. padded: the same batches with this project's encoder. ours: concatenated samples, logits only where the next
token belongs to an answer (`training/stream.py`). Lengths are drawn like those of PointLLM's brief descriptions, or, for
stages III and IV, of its detailed descriptions and conversations. Clouds are noise. The losses are compared.

The three take turns, batch by batch, so that other work on the machine slows all of them; rates are medians, and so are the
ratios of a turn, with their range. Operators and waits are those of this step; `benchmarks/operators.py` counts the paper's.

Tokens are those of the samples, without padding. MFU counts 4N (no gradients of frozen weights, as in these stages) and
6N operations a token, for the N weights in the layers of the language model, relative to the speed of a large
matrix product on this device in the same dtype.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from accelerate.utils import send_to_device
from counting import OperatorCounter
from encode import PlainMiniPointNet, plain_group, plain_transformer

from minigpt3d.arguments import positive_int
from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration, PointBertOutput
from minigpt3d.training.loop import make_optimizer
from minigpt3d.training.stages import RECIPES, Stage
from minigpt3d.training.stream import Packing, pack_batch, pad_batch
from minigpt3d.training.weights import halve_frozen, prepare_model


# A quarter of the paper's widths, with its vocabulary: trains on a CPU in seconds.
SMALL = {
    "point_config": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
    "qformer_config": {
        "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768,
        "encoder_hidden_size": 352,
    },
    "text_config": {
        "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 8,
    },
    "language_projection_hidden_size": 1024,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "paper"], default="small", help="of the model (default: small)")
    parser.add_argument("--stage", choices=list(RECIPES["paper"]), default="II")
    parser.add_argument(
        "--batch", type=positive_int, default=9, help="samples a step (default: 9, the paper's in stage II)"
    )
    parser.add_argument("--steps", type=positive_int, default=5, help="timed steps of each way (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default=None, help="of the autocast (default: none)"
    )
    args = parser.parse_args()
    stage, device = RECIPES["paper"][args.stage], torch.device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else torch.float32

    torch.manual_seed(0)
    config = MiniGPT3DConfig(router_type="none", **(SMALL if args.size == "small" else {}))
    model = prepare_model(MiniGPT3DForConditionalGeneration(config), stage).to(device)
    if dtype != torch.float32:
        halve_frozen(model, dtype)
    model.eval()  # without dropout, so that the losses can be compared
    rng = np.random.default_rng(0)
    batches = [make_samples(stage, config, args.batch, 8192, rng) for _ in range(args.steps)]
    tokens = sum(len(sample["input_ids"]) for batch in batches for sample in batch) / args.steps
    inner = model.base_model.model if hasattr(model, "merge_and_unload") else model
    num_parameters = num_weights(model)
    peak = matmul_peak(device, dtype)

    print(
        f"stage {stage.name}, {args.size}, {args.batch} samples of {tokens / args.batch:.0f} tokens, {device}, {dtype}"
    )
    ways = make_ways(inner)
    run(model, stage, batches, ways, device, dtype)
    print(
        f"{'':<8}{'samples/s':>12}{'tokens/s':>12}{'MFU 4N':>9}{'MFU 6N':>9}{'peak GB':>9}{'operators':>11}{'waits':>7}{'loss':>9}"
    )
    for name, way in ways.items():
        seconds = median(way.seconds)
        operations = num_parameters * tokens / seconds / peak
        print(
            f"{name:<8}{args.batch / seconds:>12.2f}{tokens / seconds:>12.0f}{4 * operations:>9.1%}{6 * operations:>9.1%}"
            f"{way.memory / 1e9:>9.2f}{way.operators:>11,}{way.waits:>7}{way.loss:>9.4f}"
        )
    for name in ("plain", "padded"):
        ratios = [theirs / ours for theirs, ours in zip(ways[name].seconds, ways["ours"].seconds, strict=True)]
        print(f"ours / {name}: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"difference of the losses {abs(ways['ours'].loss - ways['plain'].loss):.1e}")


@dataclass
class Way:
    """A way to train, and what is measured of it."""

    collate: Callable
    encode: Callable
    seconds: list[float] = field(default_factory=list)
    memory: float = float("nan")
    operators: int = 0
    waits: int = 0
    loss: float = float("nan")


def make_ways(model: MiniGPT3DForConditionalGeneration) -> dict[str, Way]:
    """The three ways to train a model."""
    packing, encoder = Packing.of(model), model.model.point_encoder
    pad = lambda samples: pad_batch(samples, model.config.text_config.pad_token_id)  # noqa: E731
    return {
        "plain": Way(pad, plain_encoder(encoder)),
        "padded": Way(pad, encoder.forward),
        "ours": Way(lambda samples: pack_batch(samples, packing), encoder.forward),
    }


def plain_encoder(encoder: torch.nn.Module) -> Callable:
    """The published algorithm with the weights of ours, in place of its forward."""
    config, embed = encoder.config, PlainMiniPointNet(encoder.mini_pointnet)

    @torch.no_grad()
    def forward(point_clouds: torch.Tensor, *args, **kwargs) -> PointBertOutput:
        neighborhood, center = plain_group(point_clouds, config.num_groups, config.group_size)
        return PointBertOutput(last_hidden_state=plain_transformer(encoder, embed(neighborhood), center))

    return forward


def make_samples(stage: Stage, config: MiniGPT3DConfig, count: int, num_points: int, rng) -> list[dict]:
    """Random samples with lengths like PointLLM's: a prompt of about 50 tokens with the cloud, and an answer."""
    median, spread = (22, 0.4) if stage.name in ("I", "II") else (90, 0.6)
    samples = []
    for _ in range(count):
        prompt = config.num_query_tokens + int(rng.integers(12, 28))
        answer = int(np.clip(rng.lognormal(np.log(median), spread), 5, 400))
        ids = torch.from_numpy(rng.integers(100, min(50_000, config.point_token_id), prompt + answer))
        ids[5 : 5 + config.num_query_tokens] = config.point_token_id
        labels = ids.clone()
        labels[:prompt] = -100
        cloud = rng.normal(size=(1, num_points, 6)).astype(np.float32)
        cloud[..., :3] /= np.linalg.norm(cloud[..., :3], axis=-1).max()
        cloud[..., 3:] = cloud[..., 3:] % 1
        samples.append({"input_ids": ids, "labels": labels, "point_clouds": torch.from_numpy(cloud)})
    return samples


def run(model, stage: Stage, batches: list, ways: dict[str, Way], device: torch.device, dtype: torch.dtype):
    """Measure the ways in turn: loss of the first batch with the same weights, seconds of each batch, peak of a GPU."""
    inner = model.base_model.model if hasattr(model, "merge_and_unload") else model
    optimizer = make_optimizer(stage, model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trainable]
    for group in optimizer.param_groups:
        group["lr"] = stage.peak_lr

    def step(way: Way, batch: dict) -> torch.Tensor:
        inner.model.point_encoder.forward = way.encode
        batch = send_to_device(batch, device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for way in ways.values():  # not timed: kernels are chosen and memory is allocated
        way.loss = step(way, way.collate(batches[0])).item()
        with torch.no_grad():
            torch._foreach_copy_(trainable, before)
    for samples in batches:
        for way in ways.values():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            step(way, way.collate(samples))
            if device.type == "cuda":
                torch.cuda.synchronize()
                way.memory = max(torch.cuda.max_memory_allocated(), 0 if math.isnan(way.memory) else way.memory)
            way.seconds.append(time.perf_counter() - started)
    for way in ways.values():
        batch = way.collate(batches[0])
        with OperatorCounter() as counter:
            step(way, batch)
        way.operators, way.waits = counter.operators.total(), counter.waits.total()


def num_weights(model: torch.nn.Module) -> int:
    """Weights of the matrices in the layers of the language model, without LoRA; those in 4 bits are counted in full."""
    inner = model.base_model.model if hasattr(model, "merge_and_unload") else model
    modules = inner.model.language_model.named_modules()
    linear = [m for name, m in modules if isinstance(m, torch.nn.Linear) and "lora" not in name]
    return sum(module.in_features * module.out_features for module in linear)


def matmul_peak(device, dtype, size: int = 4096) -> float:
    """Operations per second of a large matrix product."""
    size = size if device.type == "cuda" else size // 2
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
