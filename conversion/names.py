"""The authors' release as data: what their tensors are called here, and which file gives what.

Read beside the paper: `NAMES` follows figure 2 from left to right, `FILES` is the order in which the authors' code loads
its checkpoints, each over the ones before.
"""

from dataclasses import dataclass, field


# The authors' names → ours, in data-flow order (paper: figure 2). `#` is a number; a name stands for all that begins
# with it: its weight, bias, running statistics and LoRA matrices.
NAMES = {
    # Point-BERT
    "pc_encoder.cls_token": "model.point_encoder.cls_token",
    "pc_encoder.cls_pos": "model.point_encoder.cls_position",
    "pc_encoder.encoder.first_conv.0": "model.point_encoder.mini_pointnet.linear_1",
    "pc_encoder.encoder.first_conv.1": "model.point_encoder.mini_pointnet.norm_1",
    "pc_encoder.encoder.first_conv.3": "model.point_encoder.mini_pointnet.linear_2",
    "pc_encoder.encoder.second_conv.0": "model.point_encoder.mini_pointnet.linear_3",
    "pc_encoder.encoder.second_conv.1": "model.point_encoder.mini_pointnet.norm_2",
    "pc_encoder.encoder.second_conv.3": "model.point_encoder.mini_pointnet.linear_4",
    "pc_encoder.reduce_dim": "model.point_encoder.group_projection",
    "pc_encoder.pos_embed.0": "model.point_encoder.position_embedding.linear_1",
    "pc_encoder.pos_embed.2": "model.point_encoder.position_embedding.linear_2",
    "pc_encoder.blocks.blocks.#.norm1": "model.point_encoder.blocks.#.norm_1",
    "pc_encoder.blocks.blocks.#.attn": "model.point_encoder.blocks.#.attention",
    "pc_encoder.blocks.blocks.#.norm2": "model.point_encoder.blocks.#.norm_2",
    "pc_encoder.blocks.blocks.#.mlp": "model.point_encoder.blocks.#.mlp",
    "pc_encoder.norm": "model.point_encoder.norm",
    # point projection
    "point_2_Qformer_proj.0": "model.point_projection.linear_1",
    "point_2_Qformer_proj.2": "model.point_projection.linear_2",
    # mixture of query experts
    "query_router.0": "model.router.linear_1",
    "query_router.2": "model.router.linear_2",
    "query_tokens": "model.query_experts.0.weight",
    "query_expert_dict.#": "model.query_experts.#.weight",
    # Q-Former
    "Qformer.bert.embeddings.LayerNorm": "model.qformer.layernorm",
    "Qformer.bert.encoder.layer.#.attention.self": "model.qformer.encoder.layer.#.attention.attention",
    "Qformer.bert.encoder.layer.#.attention.output": "model.qformer.encoder.layer.#.attention.output",
    "Qformer.bert.encoder.layer.#.crossattention.self": "model.qformer.encoder.layer.#.crossattention.attention",
    "Qformer.bert.encoder.layer.#.crossattention.output": "model.qformer.encoder.layer.#.crossattention.output",
    "Qformer.bert.encoder.layer.#.intermediate_query": "model.qformer.encoder.layer.#.intermediate_query",
    "Qformer.bert.encoder.layer.#.output_query": "model.qformer.encoder.layer.#.output_query",
    # language projection
    "llama_proj": "model.language_projection.linear_1",
    "llama_proj2": "model.language_projection.linear_2",
    # Phi
    "llama_model.base_model.model.model": "model.language_model",
    "llama_model.base_model.model.lm_head": "lm_head",
}

# The same tensor under a second name: accepted where it is equal, else refused.
ALIASES = {"query_expert_dict.0": "query_tokens", "point_encoder": "pc_encoder"}

# The official Phi-2 has three matrices where the authors have one (heads, 3, head_dim).
SPLIT_ATTENTION = ("q_proj", "k_proj", "v_proj")
FUSED_ATTENTION = "query_key_value"

# What holds nothing that the network computes with, whatever file it is in: pattern → reason.
LEFTOVERS = {
    r"Qformer\.bert\.embeddings\.position_ids": "positions 0, 1, 2, …; the queries have no position embedding",
    r".*\.rotary_emb\.inv_freq": "rotary frequencies, computed from the configuration",
}
_IMAGE_SIDE = {r"(visual_encoder|ln_vision|vision_proj)\..*": "image side: MiniGPT-3D has points instead"}
# Beside the tensors of the model, under the file's other keys.
TRAINER_STATE = {"optimizer": "state of the optimizer", "scaler": "state of the loss scaler"}

# In no file: pattern of our names → reason. All of them are zero.
ZEROS = {r"model\.language_model\..*\.[qk]_layernorm\.bias": "frozen at their initial zero, so no file has them"}

# alpha / r. The Q-Former's alpha is 2r in the authors' code whatever their YAML says; the LLM's is 16.
LORA_ALPHA = {"model.qformer": lambda rank: 2 * rank, "model.language_model": lambda rank: 16}


@dataclass(frozen=True, eq=False)
class File:
    """One file of the release.

    Args:
        slot: its option on the command line, without the dashes.
        title: what it is, for people.
        gives: patterns of our names; every parameter that one of them matches must be in the file.
        may_give: patterns of our names that it may hold as well.
        prefix: what is put before its keys to make them names of the whole model.
        container: the key under which the tensors lie in a `.pth` file.
        leftovers: patterns of its keys that MiniGPT-3D has no use for → reason.
    """

    slot: str
    title: str
    gives: tuple[str, ...]
    may_give: tuple[str, ...] = ()
    prefix: str = ""
    container: str = "model"
    leftovers: dict[str, str] = field(default_factory=dict)


_LORA = r"model\.language_model\..*\.lora_[AB]\.weight"
_ADDED_NORMS = r"model\.language_model\..*\.(q_layernorm|k_layernorm|post_layernorm)\.weight"
_NORMS = r"model\.language_model\..*norm\.(weight|bias)"
# A stage's file holds what the stage trains (a test compares with training/stages.py).
STAGE_3_TENSORS = (
    r"model\.point_projection\..*",
    r"model\.qformer\..*\.lora_[AB]\.weight",
    r"model\.qformer\.encoder\..*\.LayerNorm\.weight",
    r"model\.query_experts\.0\.weight",
    r"model\.language_projection\..*",
    _LORA,
    r"model\.language_model\..*norm\.weight",
)
STAGE_4_TENSORS = (r"model\.query_experts\.\d+\.weight", r"model\.router\..*")
_POINT_ENCODER = r"model\.point_encoder\..*"  # frozen, but stage files carry it under its second name

# In the order of loading: a later file's tensor supersedes an earlier one's.
FILES = (
    File(
        "phi",
        "Phi-2",
        gives=(
            r"model\.language_model\.(embed_tokens|final_layernorm)\..*",
            r"model\.language_model\.layers\.\d+\.(input_layernorm|mlp\.fc[12])\.(weight|bias)",
            r"model\.language_model\.layers\.\d+\.self_attn\.(query_key_value|dense)\.(weight|bias)",
            r"lm_head\..*",
        ),
        may_give=(_NORMS,),
        prefix="llama_model.base_model.model.",
    ),
    File(
        "blip2",
        "BLIP-2's Q-Former and query tokens",
        gives=(r"model\.qformer\.(?!.*lora_).*", r"model\.query_experts\.0\.weight"),
        leftovers=_IMAGE_SIDE | {r"(t5_proj|t5_model|opt_proj)\..*": "BLIP-2's own language model"},
    ),
    File(
        "point_encoder",
        "Point-BERT",
        gives=(_POINT_ENCODER,),
        prefix="pc_encoder.",
        container="base_model",
    ),
    File(
        "tinygpt_v",
        "TinyGPT-V's stage 3",
        gives=(_LORA, _ADDED_NORMS, r"model\.language_projection\..*"),
        may_give=(_NORMS,),
        leftovers=_IMAGE_SIDE,
    ),
    File("stage3", "MiniGPT-3D's stage III", gives=STAGE_3_TENSORS, may_give=(_POINT_ENCODER, _NORMS)),
    File("stage4", "MiniGPT-3D's stage IV", gives=STAGE_4_TENSORS, may_give=(_POINT_ENCODER,)),
)
