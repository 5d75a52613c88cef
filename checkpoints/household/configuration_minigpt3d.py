"""Configuration of MiniGPT-3D (arXiv 2405.01413): the architecture only. The defaults are the paper's model."""

from copy import deepcopy
from typing import TYPE_CHECKING, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2QFormerConfig, PhiConfig
from transformers.configuration_utils import PreTrainedConfig


if TYPE_CHECKING:  # transformers copies the files that a file names: with these two lines, every copy has all of them
    from .modeling_minigpt3d import MiniGPT3DForConditionalGeneration  # noqa: F401
    from .pipeline_minigpt3d import PointCloudToTextPipeline  # noqa: F401


# The published model.
HUB_ID = "org/minigpt3d"
PAPER_POINT_TOKEN_ID = 50295  # the first row of Phi-2's embedding that its tokenizer does not use

# Of layers or experts: more is a mistake, or meant to fill the memory.
MAX_COUNT = 1000

CUSTOM_PIPELINES = {
    "point-cloud-to-text": {
        "impl": "pipeline_minigpt3d.PointCloudToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


@strict
class MiniGPT3DPointConfig(PreTrainedConfig):
    """The 3D encoder, Point-BERT as ULIP-2 trained it. Paper: §3.1.1.

    Args:
        hidden_size: width of the transformer.
        num_hidden_layers: transformer blocks.
        num_attention_heads: heads of each block; divides `hidden_size`.
        intermediate_size: width inside each block's MLP.
        num_groups: centers chosen by farthest point sampling, one token each.
        group_size: nearest neighbors gathered around each center, itself among them.
        group_embedding_size: width of the mini-PointNet's output.
        num_channels: 3 coordinates and 3 colors.
        absolute_coordinates: whether the mini-PointNet also reads where each point is in the cloud, not only where it is
            in its group. A small encoder learns faster with it; the paper's has none.
        layer_norm_eps: epsilon of every LayerNorm.
    """

    model_type = "minigpt3d_point"
    base_config_key = "point_config"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    num_groups: int = 512
    group_size: int = 32
    group_embedding_size: int = 256
    num_channels: int = 6
    absolute_coordinates: bool = False
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"point_config: hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}."
            )


@strict
class MiniGPT3DPhiConfig(PhiConfig):
    """Phi-2 as TinyGPT-V changed it: fused `query_key_value`, normed queries and keys, an RMSNorm after attention.

    All fields are those of `PhiConfig`; the defaults are Phi-2's (hidden 2560, 32 layers, vocabulary 51200).
    """

    model_type = "minigpt3d_phi"
    base_model_tp_plan = None
    base_model_pp_plan = None

    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    resid_pdrop: float | int = 0.1
    qk_layernorm: bool = True
    rms_norm_eps: float = 1e-6
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = 50256

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            kwargs.setdefault("partial_rotary_factor", 0.4)
        super().__post_init__(**kwargs)


def _build(config: dict | PreTrainedConfig | None, default: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Build a sub-configuration from None, a dict (as in config.json), or a configuration."""
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config or {})
    model_type = config.pop("model_type", default.model_type)
    if model_type == default.model_type:  # ours are not in AutoConfig when this file comes from the Hub
        return default(**config)
    return AutoConfig.for_model(model_type, **config)


@strict
class MiniGPT3DConfig(PreTrainedConfig):
    """MiniGPT-3D: Point-BERT, point projection, Q-Former over a mixture of query experts, language projection, LLM.

    Args:
        point_config: the 3D encoder, a `MiniGPT3DPointConfig` or its fields as a dict. Paper: §3.1.1.
        qformer_config: the Q-Former, a `Blip2QFormerConfig` or its fields. Its dropout is 0: the authors never
            activate it. Paper: §3.1.2.
        text_config: any causal language model's configuration; the paper's is a `MiniGPT3DPhiConfig`. Paper: §3.1.3.
        num_query_tokens: vectors per cloud.
        num_query_experts: sets of query tokens. Expert 0 is the only one in stages I to III. Paper: §3.2.
        num_experts_per_cloud: experts that the sparse router chooses for each cloud.
        router_type: *sparse*: the chosen experts' softmax weights, not renormalized; *soft*: all experts with their
            softmax weights; *constant*: all experts, each 1/E; *none*: expert 0 alone, as before stage IV (an adapter
            with a trained router turns *none* into *sparse*).
        router_hidden_size: width inside the router.
        point_projection_hidden_size: width inside the point projection; by default twice the 3D encoder's, as in the
            paper (768).
        language_projection_hidden_size: width between the two linear layers of the language projection; by default 8/5 of
            the language model's, as in the paper (4096).
        point_token_id: the placeholder in `input_ids` that a cloud's vectors replace, one each; by default the paper's in
            its language model, and the last row of the embedding in another one.

    Raises:
        ValueError: impossible sizes, with their values.
    """

    model_type = "minigpt3d"
    _auto_class: ClassVar[str] = "AutoConfig"  # so that every save comes with the code
    sub_configs = {
        "point_config": MiniGPT3DPointConfig,
        "qformer_config": Blip2QFormerConfig,
        "text_config": AutoConfig,
    }
    # Outputs that not every batch has: Trainer joins the outputs of batches for compute_metrics.
    keys_to_ignore_at_inference = ["past_key_values", "point_features"]

    point_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    num_query_experts: int = 8
    num_experts_per_cloud: int = 2
    router_type: Literal["sparse", "soft", "constant", "none"] = "sparse"
    router_hidden_size: int = 256
    point_projection_hidden_size: int | None = None
    language_projection_hidden_size: int | None = None
    point_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.point_config = _build(self.point_config, MiniGPT3DPointConfig)
        if not isinstance(self.qformer_config, PreTrainedConfig):
            no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            self.qformer_config = _build(no_dropout | dict(self.qformer_config or {}), Blip2QFormerConfig)
        self.text_config = _build(self.text_config, MiniGPT3DPhiConfig)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if self.point_projection_hidden_size is None:
            self.point_projection_hidden_size = 2 * self.point_config.hidden_size
        if self.language_projection_hidden_size is None:
            self.language_projection_hidden_size = 8 * self.text_config.hidden_size // 5
        if self.point_token_id is None:
            of_paper = isinstance(self.text_config, MiniGPT3DPhiConfig)
            self.point_token_id = PAPER_POINT_TOKEN_ID if of_paper else self.text_config.vocab_size - 1
        self._validate()
        kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        # register_for_auto_class keeps only one Auto class; this lists all of them.
        self.auto_map = {
            "AutoConfig": "configuration_minigpt3d.MiniGPT3DConfig",
            "AutoModel": "modeling_minigpt3d.MiniGPT3DModel",
            "AutoModelForImageTextToText": "modeling_minigpt3d.MiniGPT3DForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_minigpt3d.MiniGPT3DForConditionalGeneration",
        }
        # Where this package is installed, its registered pipeline is used and needs no trust_remote_code.
        if __name__.startswith("transformers_modules."):
            self.custom_pipelines = deepcopy(CUSTOM_PIPELINES)  # transformers writes into it

    def to_dict(self) -> dict:
        """As in config.json, with the pipeline's file."""
        return super().to_dict() | {"custom_pipelines": deepcopy(CUSTOM_PIPELINES)}

    def _validate(self):
        counts = {
            f"{name}.num_hidden_layers": getattr(self, name).to_dict().get("num_hidden_layers", 0)
            for name in ("point_config", "qformer_config", "text_config")
        } | {"num_query_experts": self.num_query_experts}
        for name, count in counts.items():
            if count > MAX_COUNT:  # every one is built before its weights are looked for
                raise ValueError(f"{name} must be at most {MAX_COUNT}, got {count}.")
        if not 1 <= self.num_experts_per_cloud <= self.num_query_experts:
            raise ValueError(
                f"num_experts_per_cloud must be between 1 and num_query_experts ({self.num_query_experts}), "
                f"got {self.num_experts_per_cloud}."
            )
        if not 0 <= self.point_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"point_token_id must be a row of the language model's embedding, 0 to "
                f"{self.text_config.vocab_size - 1}, got {self.point_token_id}. Set it to the tokenizer's id of "
                "'<point>', and vocab_size to hold it."
            )


__all__ = ["HUB_ID", "MiniGPT3DConfig", "MiniGPT3DPhiConfig", "MiniGPT3DPointConfig"]
