"""Point-BERT, the 3D encoder: groups of a cloud's points become tokens, a transformer relates them. Paper: §3.1.1.

Frozen in every stage, so neither dropout nor the authors' drop path is ever active here. BatchNorm behind the linear layers
of the mini-PointNet, which older checkpoints and the authors' files have, is folded into them.

Shapes: B clouds, N points, G groups, K neighbors, C channels, D width, H heads.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.phi.modeling_phi import eager_attention_forward
from transformers.utils.output_capturing import capture_outputs

from .configuration_minigpt3d import MiniGPT3DPointConfig
from .grouping_minigpt3d import find_groups, gather_groups


class MiniPointNet(nn.Module):
    """Embed each neighborhood: a point-wise MLP and a max over the group, twice; the second MLP also reads the first max.

    The authors' 1×1 convolutions are matrix products over points, with their BatchNorms folded in. The half of the third
    layer that reads the group's maximum is a layer of its own, applied once per group.
    """

    def __init__(self, config: MiniGPT3DPointConfig):
        super().__init__()
        self.point_linear_1 = nn.Linear(config.num_channels, 128)
        self.point_linear_2 = nn.Linear(128, 256)
        self.group_linear_3 = nn.Linear(256, 512)
        self.point_linear_3 = nn.Linear(256, 512, bias=False)
        self.point_linear_4 = nn.Linear(512, config.group_embedding_size)

    def forward(self, neighborhood: torch.Tensor) -> torch.Tensor:
        """(B, G, K, C) → (B, G, D). The order of the neighbors does not matter."""
        points = neighborhood.flatten(0, 1)  # (B*G, K, C)
        points = self.point_linear_2(self.point_linear_1(points).relu_())  # (B*G, K, 256)
        groups = self.group_linear_3(points.amax(1, keepdim=True))  # (B*G, 1, 512)
        points = self.point_linear_3(points).add_(groups).relu_()  # (B*G, K, 512)
        points = self.point_linear_4(points)  # (B*G, K, D)
        return points.amax(1).unflatten(0, neighborhood.shape[:2])  # (B, G, D)


class PositionEmbedding(nn.Module):
    """Learned embedding of the groups' centers: Linear 3→128, GELU, Linear 128→D."""

    def __init__(self, config: MiniGPT3DPointConfig):
        super().__init__()
        self.linear_1 = nn.Linear(3, 128)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(128, config.hidden_size)

    def forward(self, center: torch.Tensor) -> torch.Tensor:
        """(B, G, 3) → (B, G, D)."""
        return self.linear_2(self.act(self.linear_1(center)))


class PointBertAttention(nn.Module):
    """Multi-head self-attention; the fused qkv has no bias, the output projection has one."""

    is_causal = False

    def __init__(self, config: MiniGPT3DPointConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 1+G, D) → (B, 1+G, D) and the attention weights, if the implementation returns them."""
        qkv = self.qkv(hidden_states).unflatten(-1, (3, -1, self.head_dim))  # (B, 1+G, 3, H, D/H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, 1+G, D/H)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        hidden_states, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.proj(hidden_states.flatten(2)), weights


class PointBertMLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: MiniGPT3DPointConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class PointBertBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: MiniGPT3DPointConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PointBertAttention(config)
        self.norm_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PointBertMLP(config)

    def forward(self, hidden_states: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """(B, 1+G, D) twice → (B, 1+G, D). The positions are added before every block and stay in the residual."""
        hidden_states = hidden_states + position
        hidden_states = hidden_states + self.attention(self.norm_1(hidden_states))[0]
        return hidden_states + self.mlp(self.norm_2(hidden_states))


@dataclass
class PointBertOutput(BaseModelOutput):
    """Output of the 3D encoder.

    Args:
        last_hidden_state: (B, 1+G, D), the cls token first.
        hidden_states, attentions: of the blocks, (B, 1+G, D) and (B, H, 1+G, 1+G) each, if requested.
        center: (B, G, 3), around which the points of each group lie.
    """

    center: torch.Tensor | None = None


class PointBert(PreTrainedModel):
    """The 3D encoder: neighborhoods become tokens, a transformer relates them. Paper: §3.1.1."""

    config: MiniGPT3DPointConfig
    config_class = MiniGPT3DPointConfig
    main_input_name = "point_clouds"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PointBert"]  # its parameters beside the layers are on no module of their own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": PointBertBlock, "attentions": PointBertAttention}

    def __init__(self, config: MiniGPT3DPointConfig):
        super().__init__(config)
        self.mini_pointnet = MiniPointNet(config)
        self.group_projection = nn.Linear(config.group_embedding_size, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = PositionEmbedding(config)
        self.blocks = nn.ModuleList([PointBertBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PointBert):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.normal_(module.cls_position, std=self.config.initializer_range)

    def encode_groups(self, neighborhood: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """Neighborhoods (B, G, K, C) around centers (B, G, 3) → (B, 1+G, D), the cls token first."""
        tokens = self.group_projection(self.mini_pointnet(neighborhood))  # (B, G, D)
        cls_token, cls_position = (
            x.expand(tokens.shape[0], -1, -1).to(tokens) for x in (self.cls_token, self.cls_position)
        )
        tokens = torch.cat([cls_token, tokens], dim=1)  # (B, 1+G, D)
        position = torch.cat([cls_position, self.position_embedding(center).to(tokens)], dim=1)  # (B, 1+G, D)
        for block in self.blocks:
            tokens = block(tokens, position)
        return self.norm(tokens)

    @capture_outputs
    def forward(
        self,
        point_clouds: torch.Tensor,
        fps_start: torch.Tensor | int | None = None,
        group_indices: torch.Tensor | None = None,
        **kwargs,
    ) -> PointBertOutput:
        """(B, N, C) float32 → (B, 1+G, D), the cls token first. The Q-Former reads all of them.

        Args:
            point_clouds: xyz centered on the mean with largest norm 1, then rgb in [0, 1].
            fps_start: index of the first center, one or (B,); 0 by default, where the authors draw it at random.
            group_indices: (B, G, 1+K) of any integer type, indices into N of each group's center and then of its
                neighbors, if they are known; found otherwise.
            output_hidden_states: whether to return the inputs of all blocks, and the last output.
            output_attentions: whether to return the attention weights of all blocks, which the eager implementation has.

        Raises:
            ValueError: the indices are of another number of clouds, groups or neighbors.
        """
        # Distances need the full precision of the coordinates, whatever the model's dtype.
        point_clouds = point_clouds.float()
        if group_indices is None:
            groups = find_groups(point_clouds[..., :3], self.config.num_groups, self.config.group_size, fps_start)
        else:
            expected = (len(point_clouds), self.config.num_groups, 1 + self.config.group_size)
            if group_indices.shape != expected:
                raise ValueError(
                    f"group_indices must have shape {expected}, a center and its neighbors for each group; got "
                    f"{tuple(group_indices.shape)}. Leave them out, and they are found."
                )
            groups = group_indices[..., 0].long(), group_indices[..., 1:].long()
        neighborhood, center = gather_groups(point_clouds, *groups)
        dtype = self.cls_token.dtype
        tokens = self.encode_groups(neighborhood.to(dtype), center.to(dtype))  # (B, 1+G, D)
        return PointBertOutput(last_hidden_state=tokens, center=center)


# ---- Older checkpoints and the authors' files -----------------------------------------------------------------------


# Layers of the mini-PointNet in older checkpoints → those of today.
FOLDED_LAYERS = {
    ("linear_1", "norm_1"): ("point_linear_1",),
    ("linear_2",): ("point_linear_2",),
    ("linear_3", "norm_2"): ("group_linear_3", "point_linear_3"),
    ("linear_4",): ("point_linear_4",),
}


def unfolded_names(layers: tuple[str, ...]) -> tuple[str, ...]:
    """The tensors of a linear layer, and of the BatchNorm behind it if there is one."""
    leaves = ("weight", "bias", "running_mean", "running_var")
    return tuple(f"{layer}.{leaf}" for layer, end in zip(layers, (2, 4), strict=False) for leaf in leaves[:end])


def folded_names(layers: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of the layers that read one layer's inputs: the weight of each, and the first one's bias."""
    return (f"{layers[0]}.weight", f"{layers[0]}.bias", *(f"{layer}.weight" for layer in layers[1:]))


def fold_batch_norm(tensors: Sequence[torch.Tensor], layers: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Linear layers that equal a linear layer with BatchNorm behind it, which uses its running statistics.

    Args:
        tensors: weight (out, in) and bias (out,); then weight, bias, running mean and variance (out,) of the BatchNorm,
            if there is one.
        layers: names of the results, each of which reads its share of the inputs.

    Returns:
        The parameters by `folded_names(layers)`, in the dtype of the weight.
    """
    weight, bias, *norm = (tensor.cpu().double() for tensor in tensors)
    if norm:
        norm_weight, norm_bias, mean, variance = norm
        scale = norm_weight * (variance + 1e-5).rsqrt()
        weight, bias = weight * scale[:, None], (bias - mean) * scale + norm_bias
    weight, *rest = weight.chunk(len(layers), dim=1)
    results = zip(folded_names(layers), (weight, bias, *rest), strict=True)
    return {name: tensor.contiguous().to(tensors[0]) for name, tensor in results}


class FoldBatchNorm(ConversionOps):
    """`fold_batch_norm` while transformers loads a checkpoint."""

    def __init__(self, layers: tuple[str, ...]):
        self.layers = layers

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        tensors = [input_dict[pattern][0] for pattern in source_patterns if "num_batches" not in pattern]
        return {f"mini_pointnet.{name}": tensor for name, tensor in fold_batch_norm(tensors, self.layers).items()}


class OlderLayers(WeightConverter):
    """Layers that older checkpoints have with BatchNorm. What was loaded from them is saved with the names of today."""

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("mini_pointnet", "mini_pointnet")


def convert_older_layers() -> list[OlderLayers]:
    """How transformers loads encoders of older checkpoints."""
    converters = []
    for old, new in FOLDED_LAYERS.items():
        sources = [*unfolded_names(old), *(f"{norm}.num_batches_tracked" for norm in old[1:])]
        sources = [re.escape(f"mini_pointnet.{name}") for name in sources]
        converters.append(OlderLayers(sources, f"mini_pointnet.{new[0]}.weight", operations=[FoldBatchNorm(new)]))
    return converters


register_checkpoint_conversion_mapping(MiniGPT3DPointConfig.model_type, convert_older_layers(), overwrite=True)
