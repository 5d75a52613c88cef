"""Time encoding, from a cloud to the language model's vectors: a plain version of the published algorithm beside ours.

    python benchmarks/encode.py --batch 4 --repeats 5 --threads 2

Both run in turn in this one process, on the same clouds with the same full-size random weights (the language model is
left out), and must give the same numbers: the table has the largest difference over the largest value, and more than
1e-5 in fp32 (on a GPU 1e-4) ends the run. The plain side is what the paper and its authors' code describe (§3.1.1, §3.1.2, §3.2):
farthest point sampling as a loop of torch operations, neighbors from the full distance matrix, 1×1 convolutions with
BatchNorm, softmax attention written out, one Q-Former pass for each cloud and chosen expert with its keys and values
computed anew.

Shapes: B clouds, N points, G groups, K neighbors, Q query tokens, E experts, D width.
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from minigpt3d.arguments import positive_int
from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig, MiniGPT3DPhiConfig
from minigpt3d.grouping_minigpt3d import group
from minigpt3d.modeling_minigpt3d import MiniGPT3DModel
from minigpt3d.point_bert_minigpt3d import MiniPointNet


# Largest difference over largest value.
FP32_TOLERANCE = 1e-5
GPU_FP32_TOLERANCE = 1e-4  # whose attention may multiply in pieces of TF32
BF16_TOLERANCE = 1e-1


# ---- The published algorithm, plainly -------------------------------------------------------------------------------

# Weights are read from our model, so that both sides have the same.


def plain_group(point_clouds: torch.Tensor, num_groups: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N, C) → neighborhoods (B, G, K, C), xyz relative to the center, and centers (B, G, 3)."""
    coord = point_clouds[..., :3]
    rows = torch.arange(len(coord), device=coord.device)
    distance = coord.new_full(coord.shape[:2], torch.inf)  # (B, N)
    farthest = rows.new_zeros(len(coord))
    indices = []
    for _ in range(num_groups):
        indices.append(farthest)
        difference = coord - coord[rows, farthest][:, None]  # (B, N, 3)
        # Added one by one: a GPU's `sum` rounds in another order, and then to other points.
        x, y, z = difference.pow(2).unbind(-1)
        distance = torch.minimum(distance, x + y + z)
        farthest = distance.argmax(-1)
    center = coord[rows[:, None], torch.stack(indices, dim=1)]  # (B, G, 3)
    # From differences: |a|² + |b|² - 2ab, as published, rounds to other neighbors where two are nearly equally far.
    matrix = torch.cdist(center, coord, compute_mode="donot_use_mm_for_euclid_dist")  # (B, G, N)
    neighbors = matrix.topk(group_size, largest=False).indices  # (B, G, K)
    neighborhood = point_clouds[rows[:, None, None], neighbors]  # (B, G, K, C)
    relative = neighborhood[..., :3] - center[:, :, None]
    return torch.cat([relative, neighborhood[..., 3:]], dim=-1), center


def _convolve(weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv1d:
    """A linear layer, (out, in) and (out,), as a 1×1 convolution."""
    convolution = nn.Conv1d(weight.shape[1], len(weight), 1)
    convolution.load_state_dict({"weight": weight[:, :, None], "bias": bias})
    return convolution


def _convolve_and_normalize(weight: torch.Tensor, bias: torch.Tensor) -> tuple[nn.Conv1d, nn.BatchNorm1d]:
    """A convolution and a BatchNorm, with random weights and variances, which together equal a linear layer."""
    norm = nn.BatchNorm1d(len(weight)).to(weight.device)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return _convolve(weight / scale[:, None], bias / scale), norm


class PlainMiniPointNet(nn.Module):
    """Two pairs of 1×1 convolutions over points with BatchNorm between, the group's maximum concatenated to each point."""

    def __init__(self, ours: MiniPointNet):
        super().__init__()
        weight_3 = torch.cat([ours.group_linear_3.weight, ours.point_linear_3.weight], dim=1)
        self.first = nn.Sequential(
            *_convolve_and_normalize(ours.point_linear_1.weight, ours.point_linear_1.bias),
            nn.ReLU(inplace=True),
            _convolve(ours.point_linear_2.weight, ours.point_linear_2.bias),
        )
        self.second = nn.Sequential(
            *_convolve_and_normalize(weight_3, ours.group_linear_3.bias),
            nn.ReLU(inplace=True),
            _convolve(ours.point_linear_4.weight, ours.point_linear_4.bias),
        )
        self.to(weight_3.device).eval()

    def forward(self, neighborhood: torch.Tensor) -> torch.Tensor:
        """(B, G, K, C) → (B, G, D)."""
        points = self.first(neighborhood.flatten(0, 1).transpose(1, 2))  # (B*G, 256, K)
        maximum = points.amax(2, keepdim=True).expand_as(points)  # (B*G, 256, K)
        points = self.second(torch.cat([maximum, points], dim=1))  # (B*G, D, K)
        return points.amax(2).unflatten(0, neighborhood.shape[:2])


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Softmax attention, (B, T, D) and twice (B, S, D) → (B, T, D)."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)  # (B, H, T, S)
    return (weights @ value).transpose(1, 2).flatten(2)


def plain_transformer(encoder: nn.Module, groups: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Embedded groups (B, G, D_group) around centers (B, G, 3) → (B, 1+G, D), the cls token first."""
    tokens = encoder.group_projection(groups)  # (B, G, D)
    tokens = torch.cat([encoder.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)  # (B, 1+G, D)
    position = encoder.position_embedding(center)
    position = torch.cat([encoder.cls_position.expand(len(tokens), -1, -1), position], dim=1)
    for block in encoder.blocks:
        tokens = tokens + position
        query, key, value = block.attention.qkv(block.norm_1(tokens)).chunk(3, dim=-1)
        attended = plain_attention(query, key, value, encoder.config.num_attention_heads)
        tokens = tokens + block.attention.proj(attended)
        tokens = tokens + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm_2(tokens))))
    return encoder.norm(tokens)


def plain_qformer(qformer: nn.Module, queries: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
    """One pass: queries (B, Q, D) read (B, 1+G, D_encoder) → (B, Q, D)."""
    num_heads = qformer.config.num_attention_heads

    def attend(attention: nn.Module, hidden_states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        projection, output = attention.attention, attention.output
        attended = plain_attention(
            projection.query(hidden_states), projection.key(source), projection.value(source), num_heads
        )
        return output.LayerNorm(output.dense(attended) + hidden_states)

    hidden_states = qformer.layernorm(queries)
    for layer in qformer.encoder.layer:
        hidden_states = attend(layer.attention, hidden_states, hidden_states)
        if layer.has_cross_attention:
            hidden_states = attend(layer.crossattention, hidden_states, encoder_hidden_states)
        inner = nn.functional.gelu(layer.intermediate_query.dense(hidden_states))
        output = layer.output_query
        hidden_states = output.LayerNorm(output.dense(inner) + hidden_states)
    return hidden_states


def plain_query_output(model: MiniGPT3DModel, point_features: torch.Tensor, router_type: str) -> torch.Tensor:
    """Point features (B, 1+G, D_point) → mixture of query experts (B, Q, D), one pass per cloud and chosen expert."""
    config = model.config
    encoder_hidden_states = model.point_projection(point_features)  # (B, 1+G, D_encoder)
    queries = torch.stack([expert.weight for expert in model.query_experts])  # (E, Q, D)
    if router_type == "none":
        return plain_qformer(model.qformer, queries[:1].expand(len(point_features), -1, -1), encoder_hidden_states)
    feature = torch.cat([point_features[:, 0], point_features[:, 1:].amax(1)], dim=-1)  # (B, 2*D_point)
    router = model.router
    probabilities = router.linear_2(nn.functional.gelu(router.linear_1(feature))).softmax(-1)  # (B, E)
    num_used = config.num_experts_per_cloud if router_type == "sparse" else config.num_query_experts
    weights, experts = probabilities.topk(num_used, dim=-1)  # (B, S)
    mixed = []
    for row, source in enumerate(encoder_hidden_states.split(1)):  # (1, 1+G, D_encoder)
        outputs = [plain_qformer(model.qformer, queries[expert][None], source) for expert in experts[row]]
        mixed.append(sum(weight * output for weight, output in zip(weights[row], outputs, strict=True)))
    return torch.cat(mixed)


# ---- Both, side by side ---------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table. Times are medians in seconds per cloud; difference is relative to the largest value."""

    part: str
    plain_seconds: float
    ours_seconds: float
    ratio: float
    difference: float


def make_model(config: MiniGPT3DConfig | None = None, seed: int = 0) -> MiniGPT3DModel:
    """Random weights. By default full size, with a language model of no layers."""
    if config is None:
        text_config = MiniGPT3DPhiConfig(
            vocab_size=2, num_hidden_layers=0, bos_token_id=1, eos_token_id=1, pad_token_id=1
        )
        config = MiniGPT3DConfig(text_config=text_config, point_token_id=0)
    torch.manual_seed(seed)
    return MiniGPT3DModel(config).eval()


def make_point_clouds(batch_size: int, num_points: int, num_channels: int = 6, seed: int = 0) -> torch.Tensor:
    """(B, N, C): points on the surface of bent ellipsoids, normalized, the other channels in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coord = nn.functional.normalize(torch.randn(batch_size, num_points, 3, generator=generator), dim=-1)
    coord *= 0.3 + torch.rand(batch_size, 1, 3, generator=generator)
    coord[..., 2] += 0.5 * coord[..., 0].pow(2)
    coord -= coord.mean(1, keepdim=True)
    coord /= coord.norm(dim=-1).amax(1)[:, None, None]
    rest = torch.rand(batch_size, num_points, num_channels - 3, generator=generator)
    return torch.cat([coord, rest], dim=-1)


def print_setup(device: torch.device, **settings):
    """Print what times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    setup = {"device": f"{device.type} ({name})", "threads": torch.get_num_threads()} | settings
    setup |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in setup.items()), flush=True)


def measure(function: Callable, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(part: str, plain: Callable, ours: Callable, view: Callable, batch_size: int, repeats: int) -> Row:
    """Run both in turn after one warm-up each, so that other load on the machine affects both."""
    expected, got = view(plain()), view(ours())
    device = expected.device
    difference = float((got - expected).abs().max() / expected.abs().max())
    sides = (plain, ours)
    times = [[measure(side, device) / batch_size for side in sides] for _ in range(repeats)]
    plain_seconds, ours_seconds = (statistics.median(seconds) for seconds in zip(*times, strict=True))
    return Row(part, plain_seconds, ours_seconds, plain_seconds / ours_seconds, difference)


def view_groups(result: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The parts of (B, G, K, C) and (B, G, 3) that must agree in any order of the neighbors."""
    neighborhood, center = result
    return torch.cat([neighborhood.amax(2), neighborhood.amin(2), neighborhood.mean(2), center], dim=-1)


@torch.inference_mode()
def run(model: MiniGPT3DModel, point_clouds: torch.Tensor, repeats: int = 5) -> list[Row]:
    """Compare every part in fp32, then the complete encoder in bf16 with the plain algorithm in fp32.

    Args:
        model: in eval mode, fp32, on the device of the clouds.
        point_clouds: (B, N, C) float32.
        repeats: timed runs of each side; the median counts.

    Raises:
        RuntimeError: a part whose two results differ by more than rounding in fp32.
    """
    encoder = model.point_encoder
    sizes = encoder.config.num_groups, encoder.config.group_size
    plain_mini_pointnet = PlainMiniPointNet(encoder.mini_pointnet)
    transformer = copy.deepcopy(encoder)
    transformer.mini_pointnet = nn.Identity()
    model_bf16 = copy.deepcopy(model).to(torch.bfloat16)
    rows = []

    fp32_tolerance = GPU_FP32_TOLERANCE if point_clouds.is_cuda else FP32_TOLERANCE

    def add(part: str, plain: Callable, ours: Callable, view: Callable = torch.Tensor.float, tolerance=fp32_tolerance):
        row = compare(part, plain, ours, view, len(point_clouds), repeats)
        if not row.difference <= tolerance:
            raise RuntimeError(
                f"{part}: ours differs from the plain algorithm by {row.difference:.1e} of the largest value, "
                f"{tolerance:.0e} is allowed. If it starts at grouping, two points may be equally far within rounding: "
                "try another --seed. Otherwise the model's code is wrong."
            )
        rows.append(row)

    def plain_encoder() -> torch.Tensor:
        neighborhood, center = plain_group(point_clouds, *sizes)
        return plain_transformer(encoder, plain_mini_pointnet(neighborhood), center)

    def plain_vectors() -> torch.Tensor:
        return model.language_projection(plain_query_output(model, plain_encoder(), "sparse"))

    neighborhood, center = plain_group(point_clouds, *sizes)
    groups = plain_mini_pointnet(neighborhood)
    point_features = plain_transformer(encoder, groups, center)

    add("grouping", lambda: plain_group(point_clouds, *sizes), lambda: group(point_clouds, *sizes), view_groups)
    add("mini-PointNet", lambda: plain_mini_pointnet(neighborhood), lambda: encoder.mini_pointnet(neighborhood))
    add(
        "transformer",
        lambda: plain_transformer(encoder, groups, center),
        lambda: transformer.encode_groups(groups, center),
    )
    add("point encoder as a whole", plain_encoder, lambda: encoder(point_clouds).last_hidden_state)
    for router_type in ("none", "sparse", "soft"):
        model.config.router_type = router_type
        add(
            f"Q-Former, {router_type}",
            lambda router_type=router_type: plain_query_output(model, point_features, router_type),
            lambda: model.get_query_output(point_features).last_hidden_state,
        )
    model.config.router_type = model_bf16.config.router_type = "sparse"
    add("cloud to vectors, sparse", plain_vectors, lambda: model.get_point_features(point_clouds).pooler_output)
    add(
        "the same, ours in bf16",
        plain_vectors,
        lambda: model_bf16.get_point_features(point_clouds).pooler_output,
        tolerance=BF16_TOLERANCE,
    )
    return rows


def format_table(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = ["| seconds per cloud | plain | ours | ratio | largest difference |", "|-|-|-|-|-|"]
    lines += [
        f"| {row.part} | {row.plain_seconds:.4f} | {row.ours_seconds:.4f} | {row.ratio:.2f} | {row.difference:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=positive_int, default=4, help="clouds per batch (default: 4)")
    parser.add_argument("--points", type=positive_int, default=8192, help="points per cloud (default: 8192)")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=5,
        help="timed runs of each side; the table has their median (default: 5)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and clouds (default: 0)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 on both sides is fp32
    device = torch.device(args.device)
    print_setup(device, batch=args.batch, points=args.points, repeats=args.repeats)
    model = make_model(seed=args.seed).to(device)
    point_clouds = make_point_clouds(args.batch, args.points, model.config.point_config.num_channels, args.seed)
    print(format_table(run(model, point_clouds.to(device), args.repeats)))


if __name__ == "__main__":
    main()
