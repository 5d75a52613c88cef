"""The authors' release as tables: their names and ours of every tensor, and which file holds what.

Read this beside the paper: `NAMES` follows figure 2 from left to right. `FILES` is in the order in which the authors' code
loads its checkpoints, each over the ones before.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from minigpt3d.point_bert_minigpt3d import FOLDED_LAYERS, folded_names, unfolded_names


# ---- Names ----------------------------------------------------------------------------------------------------------

# The authors' names → ours, in data-flow order (paper: figure 2). `#` is a number. A name stands for every name that
# begins with it: its weight, bias, running statistics and LoRA matrices. `parts_of` joins some of them.
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

# A second name → the first name of the same tensor. Both may be in a file if the tensors are equal.
ALIASES = {"query_expert_dict.0": "query_tokens", "point_encoder": "pc_encoder"}

# The official Phi-2 has three matrices where the authors have one (heads, 3, head_dim).
SPLIT_ATTENTION = ("q_proj", "k_proj", "v_proj")
FUSED_ATTENTION = "query_key_value"

# Our parameter → the tensors that it is folded from, as older checkpoints of ours name them: the authors' convolutions
# with BatchNorm are linear layers here. `authors_state_dict` is the inverse.
MINI_POINTNET = "model.point_encoder.mini_pointnet"
FOLDED = {
    f"{MINI_POINTNET}.{name}": tuple(f"{MINI_POINTNET}.{part}" for part in unfolded_names(old))
    for old, new in FOLDED_LAYERS.items()
    for name in folded_names(new)
}


def parts_of(name: str) -> tuple[str, ...]:
    """The tensors that a parameter of ours is made from where a file has it in parts; () for most."""
    fused = re.fullmatch(rf"(.+\.self_attn)\.{FUSED_ATTENTION}\.(weight|bias)", name)
    return tuple(f"{fused[1]}.{part}.{fused[2]}" for part in SPLIT_ATTENTION) if fused else FOLDED.get(name, ())


def _compile(table: dict[str, str]) -> list[tuple[re.Pattern, str, str]]:
    """Rows of a table of names, the longest beginning first."""
    rows = sorted(table.items(), key=lambda item: -len(item[0]))
    return [(re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), old, new) for old, new in rows]


def _rename(name: str, rows: list[tuple[re.Pattern, str, str]]) -> str | None:
    """`name` with the first matching beginning replaced; None if no row matches."""
    for pattern, old, new in rows:
        if match := pattern.match(name):
            return new.replace("#", match[1] if "#" in old else "#") + name[match.end() :]
    return None


_TO_OURS, _TO_FIRST = _compile(NAMES), _compile(ALIASES)
_TO_AUTHORS = _compile(
    {ours: theirs for theirs, ours in NAMES.items() if theirs != "query_expert_dict.#"}
    | {"model.query_experts.#.weight": "query_expert_dict.#"}
)


def our_name(name: str) -> str | None:
    """Our name of the authors' tensor, in the old or new spelling of PEFT; None if the table has no such tensor."""
    name = _rename(name.replace(".base_layer.", "."), _TO_OURS)
    return name and re.sub(r"\.lora_([AB])\.default\.", r".lora_\1.", name)


def authors_name(name: str) -> str | None:
    """The authors' name of our tensor (the inverse of `our_name`); None if the table has no such tensor."""
    name = _rename(name, _TO_AUTHORS)
    return name and re.sub(r"\.lora_([AB])\.", r".lora_\1.default.", name)


def first_name(name: str) -> str | None:
    """The first name of a tensor, for one of its second names (`ALIASES`); None for any other name."""
    return _rename(name, _TO_FIRST)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regular expressions matches the complete name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


# ---- Files ----------------------------------------------------------------------------------------------------------

# Tensors of any file that the network does not compute with: pattern of the authors' names → reason.
LEFTOVERS = {
    r"Qformer\.bert\.embeddings\.position_ids": "positions 0, 1, 2, …; the queries have no position embedding",
    r".*\.rotary_emb\.inv_freq": "rotary frequencies, computed from the configuration",
    r".*\.num_batches_tracked": "a counter of BatchNorm, which is folded into the layer before it",
}
_IMAGE_SIDE = {r"(visual_encoder|ln_vision|vision_proj)\..*": "image side: MiniGPT-3D has points instead"}
# What a `.pth` file holds under other keys, beside the tensors of the model.
TRAINER_STATE = {"optimizer": "state of the optimizer", "scaler": "state of the loss scaler"}

# Parameters that are in no file: pattern of our names → reason. All of them are zero.
ZEROS = {r"model\.language_model\..*\.[qk]_layernorm\.bias": "frozen at their initial zero, so no file has them"}


@dataclass(frozen=True, eq=False)
class File:
    """One file of the release.

    Args:
        slot: short name of the file, and the argument that takes its path.
        title: what it is, for people.
        gives: patterns of our names; every parameter that one of them matches must be in the file.
        may_give: patterns of our names that it may hold as well.
        prefix: put in front of the file's keys, it makes them names of the complete model.
        container: the key of the tensors in a `.pth` file.
        leftovers: patterns of keys that MiniGPT-3D has no use for → reason.
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
# A stage's file holds what the stage trains. A test compares these with the table in training/stages.py.
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
    File("point_encoder", "Point-BERT", gives=(_POINT_ENCODER,), prefix="pc_encoder.", container="base_model"),
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
