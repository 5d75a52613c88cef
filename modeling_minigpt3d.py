"""MiniGPT-3D: a small language model that sees 3D (arXiv 2405.01413), box by box in the order of the paper's figure 2.

    point cloud ─ grouping ─ mini-PointNet ─ Point-BERT ─ point projection ─┐
                                                │                           │ keys, values
                                             router ─ query experts ─ Q-Former ─ language projection ─ LLM ─ text

Grouping is in `grouping_minigpt3d.py`, mini-PointNet and Point-BERT are in `point_bert_minigpt3d.py`.

Shapes: B clouds, N points, G groups, K neighbors, Q query tokens, E experts, S experts used per cloud, T text tokens,
D width (of whichever part the line is in), H heads, V vocabulary.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Blip2QFormerModel, initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, load_state_dict
from transformers.models.phi.modeling_phi import (
    PhiAttention,
    PhiDecoderLayer,
    PhiModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_minigpt3d import MiniGPT3DConfig, MiniGPT3DPhiConfig
from .point_bert_minigpt3d import (  # noqa: F401  what others imported from here before it had a file of its own
    FOLDED_LAYERS,
    FoldBatchNorm,
    MiniPointNet,
    OlderLayers,
    PointBert,
    PointBertAttention,
    PointBertBlock,
    PointBertMLP,
    PointBertOutput,
    PositionEmbedding,
    convert_older_layers,
    fold_batch_norm,
    folded_names,
    unfolded_names,
)


# ----------------------------------------------------------------------------------------------------------------------
# Point projection (paper: §3.1.2): the one new part of stage I
# ----------------------------------------------------------------------------------------------------------------------


class PointProjection(nn.Module):
    """MLP from the 3D encoder's width to the width that the Q-Former's cross-attention reads: Linear, GELU, Linear."""

    def __init__(self, config: MiniGPT3DConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.point_config.hidden_size, config.point_projection_hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(config.point_projection_hidden_size, config.qformer_config.encoder_hidden_size)

    def forward(self, point_features: torch.Tensor) -> torch.Tensor:
        """(B, 1+G, D_point) → (B, 1+G, D_encoder)."""
        return self.linear_2(self.act(self.linear_1(point_features)))


# ----------------------------------------------------------------------------------------------------------------------
# Mixture of query experts (paper: §3.2): the experts differ in their queries alone
# ----------------------------------------------------------------------------------------------------------------------


class QueryTokens(nn.Module):
    """One expert: its query tokens. A module, because PEFT saves modules and skips bare parameters."""

    def __init__(self, config: MiniGPT3DConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_query_tokens, config.qformer_config.hidden_size))

    def forward(self) -> torch.Tensor:
        """(Q, D)."""
        return self.weight


class QueryExpertRouter(nn.Module):
    """Choose the experts of each cloud and their weights from the frozen encoder's features. Paper: §3.2."""

    def __init__(self, config: MiniGPT3DConfig):
        super().__init__()
        self.config = config
        self.linear_1 = nn.Linear(2 * config.point_config.hidden_size, config.router_hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(config.router_hidden_size, config.num_query_experts)

    def __setattr__(self, name: str, value):
        super().__setattr__(name, value)
        # PEFT puts stage IV's router on a base that has none; a model that is merged later keeps it.
        if name == "linear_1" and hasattr(value, "modules_to_save") and self.config.router_type == "none":
            self.config.router_type = "sparse"

    def get_logits(self, point_features: torch.Tensor) -> torch.Tensor:
        """(B, 1+G, D) → (B, E), from the cls feature beside the maximum over the others."""
        global_feature = torch.cat([point_features[:, 0], point_features[:, 1:].amax(1)], dim=-1)  # (B, 2*D)
        return self.linear_2(self.act(self.linear_1(global_feature)))

    def forward(self, point_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1+G, D) → chosen experts (B, S) int64 and their weights (B, S), most probable first."""
        num_experts, router_type = self.config.num_query_experts, self.config.router_type
        if router_type in ("sparse", "soft"):
            probabilities = self.get_logits(point_features).softmax(-1, dtype=torch.float32)  # (B, E)
            num_used = self.config.num_experts_per_cloud if router_type == "sparse" else num_experts
            weights, experts = probabilities.topk(num_used, dim=-1)  # (B, S); as they are, not renormalized
            return experts, weights.to(point_features.dtype)
        num_used = num_experts if router_type == "constant" else 1  # "none" is expert 0 alone
        experts = torch.arange(num_used, device=point_features.device).expand(point_features.shape[0], -1)
        return experts, point_features.new_full(experts.shape, 1 / num_used)


@dataclass
class QueryOutput(ModelOutput):
    """Output of the mixture of query experts.

    Args:
        last_hidden_state: (B, Q, D_qformer), mixed over the chosen experts.
        experts: (B, S) int64, the chosen experts, most probable first.
        router_weights: (B, E), the weight of each expert in the mix, 0 for those that are not chosen.
        cross_attentions: of each layer that has one, (B, H, S*Q, 1+G), if requested: the queries of the chosen experts
            one after the other, to the tokens of the 3D encoder.
    """

    last_hidden_state: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    router_weights: torch.Tensor | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


def block_diagonal_mask(num_blocks: int, block_size: int, like: torch.Tensor) -> torch.Tensor:
    """Additive attention mask (1, 1, S*Q, S*Q) under which each of S blocks of Q tokens sees itself alone."""
    block = torch.arange(num_blocks, device=like.device).repeat_interleave(block_size)
    hidden = block[:, None] != block[None]
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, torch.finfo(like.dtype).min)[None, None]


# ----------------------------------------------------------------------------------------------------------------------
# Q-Former (paper: §3.1.2) is transformers' Blip2QFormerModel. Language projection (paper: §3.1.3)
# ----------------------------------------------------------------------------------------------------------------------


class LanguageProjection(nn.Module):
    """From the Q-Former's width to the LLM's: TinyGPT-V's linear layer, then a new one, no activation between."""

    def __init__(self, config: MiniGPT3DConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.qformer_config.hidden_size, config.language_projection_hidden_size)
        self.linear_2 = nn.Linear(config.language_projection_hidden_size, config.text_config.hidden_size)

    def forward(self, query_output: torch.Tensor) -> torch.Tensor:
        """(B, Q, D_qformer) → (B, Q, D_text)."""
        return self.linear_2(self.linear_1(query_output))


# ----------------------------------------------------------------------------------------------------------------------
# Phi-2 as TinyGPT-V changed it (paper: §3.1.3): the differences from transformers' Phi
# ----------------------------------------------------------------------------------------------------------------------


class MiniGPT3DPhiAttention(PhiAttention):
    """Phi's attention with a fused projection, laid out (heads, 3, head_dim) per token, and normed queries and keys."""

    def __init__(self, config: MiniGPT3DPhiConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) → (B, T, D) and the attention weights, if the implementation returns them."""
        qkv = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))  # (B, T, H, 3, D/H)
        query, key, value = qkv.permute(3, 0, 2, 1, 4)  # each (B, H, T, D/H)
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        query_rotary, query_pass = query.split([self.rotary_ndims, self.head_dim - self.rotary_ndims], dim=-1)
        key_rotary, key_pass = key.split([self.rotary_ndims, self.head_dim - self.rotary_ndims], dim=-1)
        query_rotary, key_rotary = apply_rotary_pos_emb(query_rotary, key_rotary, *position_embeddings)
        query, key = torch.cat([query_rotary, query_pass], dim=-1), torch.cat([key_rotary, key_pass], dim=-1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.dense(output.flatten(2)), weights


class RMSNorm(nn.RMSNorm):
    """In the dtype of its weight: the fused kernel takes no other, and without it the norm is seven kernels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype))


class MiniGPT3DPhiDecoderLayer(PhiDecoderLayer):
    """Phi's parallel block with an RMSNorm on the attention branch: x + rmsnorm(attn(ln(x))) + mlp(ln(x))."""

    def __init__(self, config: MiniGPT3DPhiConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = MiniGPT3DPhiAttention(config, layer_idx)
        if config.hidden_act == "gelu_new":
            self.mlp.activation_fn = nn.GELU(approximate="tanh")  # the same in one kernel instead of eight
        self.post_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        normed = self.input_layernorm(hidden_states)
        attention = self.post_layernorm(self.self_attn(normed, **kwargs)[0])
        return hidden_states + self.resid_dropout(attention) + self.resid_dropout(self.mlp(normed))


class MiniGPT3DPhiModel(PhiModel):
    """The paper's language model, without its head."""

    config: MiniGPT3DPhiConfig
    config_class = MiniGPT3DPhiConfig
    _no_split_modules = ["MiniGPT3DPhiDecoderLayer"]

    def __init__(self, config: MiniGPT3DPhiConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([MiniGPT3DPhiDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


# ----------------------------------------------------------------------------------------------------------------------
# The complete model
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class MiniGPT3DPointFeatures(BaseModelOutputWithPooling):
    """What the model has seen of clouds.

    Args:
        last_hidden_state: (B, 1+G, D_point), the 3D encoder's tokens, the cls token first.
        pooler_output: (B, Q, D_text), the vectors that the language model reads in place of a cloud.
        hidden_states: of the 3D encoder, (B, 1+G, D_point) before each block and at the end, if requested.
        attentions: of the 3D encoder, (B, H, 1+G, 1+G) in each block, if requested.
        cross_attentions: of each layer of the Q-Former that has one, (B, H, S*Q, 1+G), if requested: the queries of the
            chosen experts one after the other, to the tokens in `last_hidden_state`.
        center: (B, G, 3), around which the points of each group lie; token 1+g is of group g.
        experts: (B, S) int64, the query experts that the router chose, most probable first.
        router_weights: (B, E), the weight of each expert in the mix, 0 for those that are not chosen.
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    center: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    router_weights: torch.Tensor | None = None


@dataclass
class MiniGPT3DCausalLMOutputWithPast(ModelOutput):
    """Output of the language model, and the vectors of the clouds.

    Args:
        loss: scalar, if labels were given.
        logits: (B, T, V).
        past_key_values: the cache.
        hidden_states, attentions: of the language model, if requested.
        point_features: (clouds, Q, D_text), if clouds were given.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    point_features: torch.Tensor | None = None


@dataclass
class MiniGPT3DModelOutputWithPast(BaseModelOutputWithPast):
    """A decoder's output, and the vectors of the clouds, `point_features` (clouds, Q, D_text)."""

    point_features: torch.Tensor | None = None


def pin_qformer_attention(config: MiniGPT3DConfig):
    """Keep the Q-Former on eager or sdpa attention: other implementations take no block-diagonal mask."""
    if config.qformer_config._attn_implementation not in (None, "eager"):
        config.qformer_config._attn_implementation = "sdpa"


# One thread at a time changes the implementation of attention in a config that others read.
_EAGER_ATTENTION = threading.Lock()


@contextmanager
def eager_attention(*configs: PreTrainedConfig) -> Iterator[None]:
    """Compute attention eagerly within the block: other implementations return no weights."""
    with _EAGER_ATTENTION:
        implementations = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation = "eager"
            yield
        finally:
            for config, implementation in zip(configs, implementations, strict=True):
                config._attn_implementation = implementation


def leave_alone(config: QuantizationConfigMixin | dict, modules: list[str]) -> QuantizationConfigMixin:
    """A copy of the configuration of a quantization, with the modules to leave alone if it names none."""
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy(config)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):  # of bitsandbytes, and of the others
        if field in vars(config) and getattr(config, field) is None:
            setattr(config, field, list(modules))
    return config


def check_files(model: PreTrainedModel, files: list[str], compare_sizes: bool):
    """Compare a model without memory, on the meta device, with the files that its weights are to come from.

    Raises:
        ValueError: a file lies outside of the model's folder; the model is larger than what the files hold, or a shape
            differs.
    """
    folder = os.path.abspath(model.config.name_or_path)
    for file in files:
        if os.path.isdir(folder) and os.path.commonpath([folder, os.path.abspath(file)]) != folder:
            raise ValueError(f"{folder}: its index of weights names {file}, which is outside of the folder.")
    if not (compare_sizes and files):
        return
    in_files = {
        name: tuple(t.shape) for file in files for name, t in load_state_dict(file, map_location="meta").items()
    }
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        stored = in_files.get(name, in_files.get(f"{model.base_model_prefix}.{name}", shape))
        if stored != shape:
            raise ValueError(
                f"{folder}: config.json needs {name} of shape {shape}, the weights have {stored}. One of them is of "
                "another model."
            )
    needed, present = (sum(map(math.prod, shapes.values())) for shapes in (expected, in_files))
    if needed > 2 * present:  # less is missing where a head is new
        raise ValueError(
            f"{folder}: config.json describes {needed:,} parameters, the weights are {present:,}. One of them is of "
            "another model."
        )


def check_finite(model: PreTrainedModel):
    """
    Raises:
        ValueError: a weight is infinite or no number.
    """
    for name, parameter in model.named_parameters():
        is_plain = type(parameter.data) is torch.Tensor and not parameter.is_meta  # not quantized, not on disk
        if is_plain and parameter.is_floating_point() and not parameter.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{name} holds values that are not finite. The weights are damaged; download them again.")


class MiniGPT3DPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization."""

    config: MiniGPT3DConfig
    config_class = MiniGPT3DConfig
    base_model_prefix = "model"
    input_modalities = ("point_cloud", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["PointBert", "Blip2QFormerLayer"]  # the language model adds its own
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # A twentieth of the paper's model, on which every answer depends. A quantization that names other modules to leave
    # alone decides for itself. Regular expressions: this class may be the whole model or the model without its head.
    modules_not_to_quantize = [
        rf"(model\.)?{name}"
        for name in ("point_encoder", "point_projection", "router", "query_experts", "qformer", "language_projection")
    ] + ["lm_head"]

    @classmethod
    def from_pretrained(cls, *args, quantization_config: QuantizationConfigMixin | dict | None = None, **kwargs):
        """See `PreTrainedModel.from_pretrained`.

        Args:
            quantization_config: by default the modules of `modules_not_to_quantize` are left alone.

        Raises:
            ValueError: the files hold weights that are not finite, do not fit the sizes in config.json, or lie outside
                of the folder.
        """
        if quantization_config is not None:
            quantization_config = leave_alone(quantization_config, cls.modules_not_to_quantize)
        return super().from_pretrained(*args, quantization_config=quantization_config, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        if not model._hf_peft_config_loaded:  # an adapter's one file has a name of its own and a part of the weights
            compare_sizes = not (load_config.is_quantized or load_config.ignore_mismatched_sizes)
            check_files(model, checkpoint_files or [], compare_sizes)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        check_finite(model)
        return loaded

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        pin_qformer_attention(self.config)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, QueryTokens):
            init.normal_(module.weight, std=self.config.qformer_config.initializer_range)


class MiniGPT3DModel(MiniGPT3DPreTrainedModel):
    """From cloud and text to the language model's last hidden states. Paper: figure 2."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: MiniGPT3DConfig):
        super().__init__(config)
        pin_qformer_attention(config)
        self.point_encoder = PointBert(config.point_config)
        self.point_projection = PointProjection(config)
        self.router = QueryExpertRouter(config)
        self.query_experts = nn.ModuleList([QueryTokens(config) for _ in range(config.num_query_experts)])
        self.qformer = Blip2QFormerModel(config.qformer_config)
        self.qformer._no_split_modules = ["Blip2QFormerLayer"]  # FSDP refuses those that only the rest of BLIP-2 has
        self.language_projection = LanguageProjection(config)
        if config.text_config.model_type == MiniGPT3DPhiConfig.model_type:
            self.language_model = MiniGPT3DPhiModel(config.text_config)
        else:
            self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_query_output(self, point_features: torch.Tensor, output_attentions: bool = False) -> QueryOutput:
        """Mixture of query experts: each chosen expert's queries go through the Q-Former, the outputs are mixed.

        All of a cloud's experts share one Q-Former call, and with it the cross-attention's keys and values; a
        block-diagonal mask separates them, so the result equals one call per expert. Paper: §3.2.

        Args:
            point_features: (B, 1+G, D_point) from the 3D encoder.
            output_attentions: whether to return the cross-attention, which the eager implementation has.
        """
        experts, weights = self.router(point_features)  # (B, S), (B, S)
        queries = torch.stack([expert() for expert in self.query_experts])  # (E, Q, D)
        num_used, num_queries = experts.shape[1], queries.shape[1]
        queries = queries[experts.to(queries.device)].flatten(1, 2)  # (B, S*Q, D)
        output = self.qformer(
            query_embeds=queries,
            attention_mask=block_diagonal_mask(num_used, num_queries, like=queries) if num_used > 1 else None,
            encoder_hidden_states=self.point_projection(point_features),
            output_attentions=output_attentions,
            return_dict=True,
        )
        of_experts = output.last_hidden_state.unflatten(1, (num_used, num_queries))  # (B, S, Q, D)
        mixed = torch.einsum("bs,bsqd->bqd", weights.to(of_experts.device, of_experts.dtype), of_experts)
        return QueryOutput(
            last_hidden_state=mixed,  # (B, Q, D)
            experts=experts,
            router_weights=weights.new_zeros(experts.shape[0], len(self.query_experts)).scatter(1, experts, weights),
            cross_attentions=output.get("cross_attentions"),
        )

    @can_return_tuple
    def get_point_features(
        self,
        point_clouds: torch.Tensor,
        fps_start: torch.Tensor | int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        group_indices: torch.Tensor | None = None,
    ) -> MiniGPT3DPointFeatures:
        """Compute the vectors that the language model reads in place of a cloud, `pooler_output`.

        Args:
            point_clouds: (B, N, 6) float32, B > 0, xyz centered on the mean with largest norm 1, then rgb in [0, 1].
            fps_start: index of the first center, one or (B,); 0 by default.
            output_attentions: whether to return attention weights of the 3D encoder and of the Q-Former. They are computed
                eagerly, whatever the implementation of attention is.
            output_hidden_states: whether to return hidden states of the 3D encoder.
            group_indices: see `PointBert.forward`.
            return_dict: False for a tuple of what is not None.

        Raises:
            ValueError: the tensor has another shape, or no cloud.
        """
        num_channels = self.config.point_config.num_channels
        if point_clouds.ndim != 3 or point_clouds.shape[-1] != num_channels or point_clouds.shape[0] == 0:
            raise ValueError(
                f"point_clouds must have shape (clouds, points, {num_channels}): xyz and rgb of at least one cloud; "
                f"got {tuple(point_clouds.shape)}. MiniGPT3DProcessor makes it from files, arrays and meshes; text alone "
                "has point_clouds=None."
            )
        configs = (self.config.point_config, self.config.qformer_config)
        with eager_attention(*configs) if output_attentions else nullcontext():
            encoded = self.point_encoder(
                point_clouds,
                fps_start,
                group_indices=group_indices,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
            queries = self.get_query_output(encoded.last_hidden_state, output_attentions)
        return MiniGPT3DPointFeatures(
            last_hidden_state=encoded.last_hidden_state,  # (B, 1+G, D_point)
            pooler_output=self.language_projection(queries.last_hidden_state),  # (B, Q, D_text)
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=queries.cross_attentions,
            center=encoded.center,
            experts=queries.experts,
            router_weights=queries.router_weights,
        )

    def find_placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Find the placeholders that point vectors replace: (B, T) bool."""
        token_id = self.config.point_token_id
        if input_ids is not None:
            return input_ids == token_id
        placeholder = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, point_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Find the placeholders, and check that there is one for each point vector: (B, T, 1) bool.

        Raises:
            ValueError: more or fewer placeholders than vectors, with both counts.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds)
        num_clouds = 0 if point_features is None else point_features.shape[0]
        num_vectors = num_clouds * self.config.num_query_tokens
        torch_compilable_check(
            mask.sum() == num_vectors,
            lambda: (
                f"the text holds {int(mask.sum())} point placeholders, but {num_clouds} point clouds of "
                f"{self.config.num_query_tokens} vectors each need {num_vectors}. Pass as many point_clouds as the "
                "text has <point> marks; MiniGPT3DProcessor writes the right number of placeholders."
            ),
        )
        return mask[..., None]

    def embed(
        self,
        input_ids: torch.Tensor | None = None,
        point_clouds: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        point_positions: torch.Tensor | None = None,
        group_indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed text and clouds as the language model reads them: (B, T, D), and point features or None.

        With `point_positions` (clouds*Q,), those of the placeholders in the flattened rows, nothing is searched or checked,
        and a GPU does not have to wait for it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        point_features = None
        if point_clouds is not None:
            features = self.get_point_features(point_clouds, group_indices=group_indices, return_dict=True)
            point_features = features.pooler_output
            point_features = point_features.to(inputs_embeds.device, inputs_embeds.dtype)
            if point_positions is None:
                mask = self.get_placeholder_mask(input_ids, inputs_embeds, point_features)
                inputs_embeds = inputs_embeds.masked_scatter(mask, point_features)
            else:
                flat = inputs_embeds.flatten(0, 1).index_copy(0, point_positions, point_features.flatten(0, 1))
                inputs_embeds = flat.view_as(inputs_embeds)
        elif input_ids is not None and input_ids.shape[1] > 1:  # a single token is a step of generation
            self.get_placeholder_mask(input_ids, inputs_embeds, None)
        return inputs_embeds, point_features

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        point_clouds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        point_positions: torch.Tensor | None = None,
        group_indices: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniGPT3DModelOutputWithPast:
        """Args and errors as `MiniGPT3DForConditionalGeneration.forward`; returns (B, T, D_text) hidden states."""
        for name, tensor in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)):
            if tensor is not None and 0 in tensor.shape[:2]:
                raise ValueError(
                    f"{name} must have at least one row of at least one token, got shape {tuple(tensor.shape)}. Leave an "
                    "empty batch out."
                )
        inputs_embeds, point_features = self.embed(
            input_ids, point_clouds, inputs_embeds, point_positions, group_indices
        )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        return MiniGPT3DModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            point_features=point_features,
        )


def build_lm_head(text_config: PreTrainedConfig) -> nn.Linear:
    """Build the head of the backbone's own causal language model: with a bias (Phi) or without (Llama).

    Raises:
        ValueError: the backbone computes its logits by more than one linear layer.
    """
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"text_config.{name} is {getattr(text_config, name)}: {text_config.model_type} changes its logits after "
                "its head, which MiniGPT-3D does not support. Choose a backbone with a plain head, such as Phi, Llama or Qwen3."
            )
    with torch.device("meta"):  # only its shape matters
        if text_config.model_type == MiniGPT3DPhiConfig.model_type:
            bias = True
        else:
            backbone = AutoModelForCausalLM.from_config(text_config, trust_remote_code=False)
            bias = backbone.get_output_embeddings().bias is not None
    return nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=bias)


class StreamerWithoutEnd(BaseStreamer):
    """Passes an answer on to another streamer, without the text that ends it.

    Args:
        streamer: of transformers.
        tokenizer: the model's, or its processor.
        ends: texts that end an answer. Of those that contain others, only the others count.
    """

    def __init__(self, streamer: BaseStreamer, tokenizer, ends: list[str]):
        ends = {end for end in ends if end}
        self.streamer = streamer
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.ends = [end for end in ends if not any(other in end for other in ends - {end})]
        self.held: list[int] | None = None  # tokens that may begin the end; None before the prompt

    def put(self, value: torch.Tensor):
        """The prompt (1, T), then new tokens (K,)."""
        if self.held is None:
            self.held = []
            self.streamer.put(value)
            return
        self.held += value.flatten().tolist()
        text = self.tokenizer.decode(self.held)
        may_end = any(text.endswith(end[:length]) for end in self.ends for length in range(1, len(end)))
        if not may_end and self._find_end(text) is None:
            self._pass_on(self.held)

    def end(self):
        text = self.tokenizer.decode(self.held or [])
        end = self._find_end(text)
        # A token may hold the last letters of the answer and the beginning of its end.
        self._pass_on(self.held if end is None else self.tokenizer(text[:end], add_special_tokens=False)["input_ids"])
        self.streamer.end()

    def _find_end(self, text: str) -> int | None:
        return min((text.index(end) for end in self.ends if end in text), default=None)

    def _pass_on(self, tokens: list[int] | None):
        if tokens:
            self.streamer.put(torch.tensor(tokens))
        self.held = []


class MiniGPT3DForConditionalGeneration(MiniGPT3DPreTrainedModel, GenerationMixin):
    """MiniGPT-3D: reads a point cloud and text, writes text. Paper: §3."""

    _tp_plan = {"lm_head": "colwise_gather_output"}  # a tied head is its language model's embedding, which is split

    def __init__(self, config: MiniGPT3DConfig):
        super().__init__(config)
        self.model = MiniGPT3DModel(config)
        self.lm_head = build_lm_head(config.text_config)
        embedding = self.get_input_embeddings()  # its name depends on the backbone
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}  # applies if text_config ties them
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def get_point_features(self, *args, **kwargs) -> MiniGPT3DPointFeatures:
        """See `MiniGPT3DModel.get_point_features`."""
        return self.model.get_point_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        point_clouds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        answer_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniGPT3DCausalLMOutputWithPast:
        """Score text about point clouds.

        Args:
            input_ids: (B, T) int64; each cloud is `num_query_tokens` placeholders (`config.point_token_id`).
            attention_mask: (B, T), 0 at padding.
            point_clouds: (clouds in the batch, N, 6) float32 in the order of their placeholders, xyz centered with
                largest norm 1, rgb in [0, 1].
            labels: (B, T) int64, -100 at positions without loss; the loss function shifts them.
            position_ids: (B, T); by default 0, 1, 2 … regardless of the mask (generation counts from the mask).
            past_key_values: cache of an earlier call.
            inputs_embeds: (B, T, D_text) instead of `input_ids`.
            logits_to_keep: number of last positions that get logits; 0 for all.
            answer_positions: (K,) int64, positions in the flattened rows that get logits, (1, K, V); `labels` are then
                (1, K), the tokens that follow them.
            point_positions: (clouds*Q,) int64, positions of the placeholders in the flattened rows, if they are known:
                they are then neither searched nor counted. Training passes both kinds, so that a GPU never waits.
            group_indices: (clouds, G, 1+K), see `PointBert.forward`; training on data that were packed with groups passes
                them.

        Raises:
            ValueError: placeholders and clouds do not match, clouds have a wrong shape, or the batch is empty.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            point_clouds=point_clouds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if answer_positions is None:
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, positions]  # (B, T, D_text)
        else:
            hidden_states = hidden_states.flatten(0, 1)[answer_positions][None]  # (1, K, D_text)
            kwargs["shift_labels"] = labels
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return MiniGPT3DCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            point_features=outputs.point_features,
        )

    def generate(self, inputs: torch.Tensor | None = None, *args, streamer: BaseStreamer | None = None, **kwargs):
        """See `GenerationMixin.generate`.

        Args:
            streamer: gets the answer without the text that ends it; the sequences returned hold it.
            past_key_values: cache of earlier turns. `input_ids` are then (B, T) the complete conversations, or only the
                tokens behind the cache together with the complete `attention_mask`. Not with an assistant or prompt
                lookup.
            point_clouds: those of all placeholders in `input_ids`. If these are complete conversations, the clouds that
                the cache holds may be left out; None if that leaves none.
            prefill_chunk_size: number of prompt tokens in a pass. Not with `inputs_embeds`.

        Raises:
            ValueError: the batch is empty, the clouds do not match the placeholders, or arguments exclude each other.
        """
        for name, tensor in {"input_ids": inputs, **kwargs}.items():
            if name in ("input_ids", "inputs_embeds", "point_clouds") and tensor is not None and not len(tensor):
                raise ValueError(f"{name} is empty, got shape {tuple(tensor.shape)}. Leave an empty batch out.")
        kwargs["num_cached"] = self._count_cached(inputs, **kwargs)
        tokenizer = kwargs.get("tokenizer", getattr(streamer, "tokenizer", None))
        if streamer is not None and tokenizer is not None:
            config = kwargs.get("generation_config") or self.generation_config
            stops = kwargs.get("stop_strings") or config.stop_strings or []
            ends = kwargs.get("eos_token_id", config.eos_token_id)
            ends = tokenizer.batch_decode(
                [[end] for end in torch.tensor([] if ends is None else ends).flatten().tolist()],
                skip_special_tokens=True,
            )
            streamer = StreamerWithoutEnd(
                streamer, tokenizer, [*([stops] if isinstance(stops, str) else stops), *ends]
            )
        return super().generate(inputs, *args, streamer=streamer, **kwargs)

    @staticmethod
    def _count_cached(
        inputs: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> int:
        """Count the first tokens of the text that the cache holds: 0 if the text is only what follows the cache.

        As transformers tells them apart, which has dropped a mask without padding when it asks for this model's inputs.
        """
        if past_key_values is None:
            return 0
        input_ids = inputs if input_ids is None else input_ids
        if inputs_embeds is None and input_ids is not None and attention_mask is not None:
            if attention_mask.shape[1] != input_ids.shape[1]:
                return 0
        return past_key_values.get_seq_length()

    def _expand_inputs_for_generation(self, expand_size: int = 1, input_ids=None, point_clouds=None, **kwargs):
        """Leave the clouds that the cache does not hold; copy a row's clouds with the row, for beams and several answers."""
        if point_clouds is not None:
            point_clouds, clouds_per_row = self._clouds_to_encode(point_clouds, input_ids, **kwargs)
        if point_clouds is not None and expand_size > 1:
            point_clouds = torch.cat([row.repeat(expand_size, 1, 1) for row in point_clouds.split(clouds_per_row)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        model_kwargs.setdefault("prompt_length", input_ids.shape[1])  # an assistant is told its model's
        return input_ids, model_kwargs | {"point_clouds": point_clouds}

    def _clouds_to_encode(
        self,
        point_clouds: torch.Tensor,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        num_cached: int = 0,
        prompt_length: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor | None, list[int]]:
        """Choose each row's last clouds, as many as there are placeholders behind the cache.

        Args:
            point_clouds: the clouds of the text (B, T), or only those that the cache does not hold.

        Returns:
            The clouds, or None if the cache holds all, and their number for each row.

        Raises:
            ValueError: the number of clouds is neither of both.
        """
        mask = self.model.find_placeholders(None if inputs_embeds is not None else input_ids, inputs_embeds)  # (B, T)
        mask = mask[:, :prompt_length]  # what an assistant has written shows no cloud
        in_text, left = ((m.sum(1) // self.config.num_query_tokens).tolist() for m in (mask, mask[:, num_cached:]))
        if len(point_clouds) == sum(in_text):
            rows = point_clouds.split(in_text)
            point_clouds = torch.cat([row[len(row) - count :] for row, count in zip(rows, left, strict=True)])
        elif len(point_clouds) != sum(left):
            raise ValueError(
                f"got {len(point_clouds)} point clouds for a text that shows {sum(in_text)}, {sum(left)} of them behind "
                "the cache. Pass all of them, or those behind the cache."
            )
        return (point_clouds if len(point_clouds) else None), left

    def _prefill(self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict, **kwargs):
        """Chunks of a prompt (`prefill_chunk_size`) share its clouds, which are encoded once."""
        size = generation_config.prefill_chunk_size
        if size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"got prefill_chunk_size={size} with inputs_embeds, but only token ids are read in chunks. "
                "Pass input_ids instead of inputs_embeds, or no prefill_chunk_size."
            )
        if size is not None and model_kwargs.get("point_clouds") is not None:
            new_ids = input_ids[:, model_kwargs["num_cached"] :]
            embeds, _ = self.model.embed(new_ids, model_kwargs["point_clouds"])
            model_kwargs = model_kwargs | {"point_clouds": None, "prompt_chunks": iter(embeds.split(size, dim=1))}
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        """Refuse a cache of earlier turns, whose tokens transformers would read again before it checks candidates."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"got past_key_values that hold {cache.get_seq_length()} tokens together with an assistant or prompt "
                "lookup, which must begin without a cache. Pass the complete conversation without past_key_values, or "
                "neither assistant_model nor prompt_lookup_num_tokens."
            )
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        point_clouds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        num_cached: int = 0,
        prompt_length: int | None = None,
        prompt_chunks: Iterator[torch.Tensor] | None = None,
        **kwargs,
    ) -> dict:
        """Pass the clouds together with their placeholders; afterwards they are in the cache."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        ids = model_inputs.get("input_ids")
        if prompt_chunks is not None:
            model_inputs |= {"input_ids": None, "inputs_embeds": next(prompt_chunks)}
        elif ids is None:
            model_inputs["point_clouds"] = point_clouds
        elif is_first_iteration or ids.shape[1] > 1:
            split = (
                ids.shape[1] if prompt_length is None else max(0, prompt_length - input_ids.shape[1] + ids.shape[1])
            )
            is_placeholder = self.model.find_placeholders(ids, None)
            if is_placeholder[:, :split].any():
                model_inputs["point_clouds"] = point_clouds
            if is_placeholder[:, split:].any():  # of a candidate, which shows no cloud
                prompt, _ = self.model.embed(ids[:, :split], model_inputs.pop("point_clouds", None))
                embeds = torch.cat([prompt, self.get_input_embeddings()(ids[:, split:])], dim=1)
                model_inputs |= {"input_ids": None, "inputs_embeds": embeds}
        return model_inputs


__all__ = [
    "MiniGPT3DForConditionalGeneration",
    "MiniGPT3DModel",
    "MiniGPT3DPhiModel",
    "MiniGPT3DPreTrainedModel",
]
