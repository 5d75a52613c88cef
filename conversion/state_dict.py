"""The authors' state dict and ours: one table of names, read in both directions.

Every key is accounted for: what comes in is used, or is a named alias or leftover; what the model needs is filled, once.
"""

import re

import torch
from peft import LoraConfig

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration


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

# What holds nothing that the network computes with.
LEFTOVERS = {"Qformer.bert.embeddings.position_ids": "positions 0, 1, 2, …; the queries have no position embedding"}

# alpha / r. The Q-Former's alpha is 2r in the authors' code whatever their YAML says; the LLM's is 16.
LORA_ALPHA = {"model.qformer": lambda rank: 2 * rank, "model.language_model": lambda rank: 16}
LORA_DROPOUT = {"model.qformer": 0.1, "model.language_model": 0.05}

_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")


def _rename(name: str, table: dict[str, str]) -> str | None:
    """`name` with the table's longest matching beginning replaced; None where nothing matches."""
    for old, new in sorted(table.items(), key=lambda item: -len(item[0])):
        pattern = re.escape(old).replace(r"\#", r"(\d+)")
        if match := re.match(rf"{pattern}(?=\.|$)", name):
            return new.replace("#", match[1] if "#" in old else "#") + name[match.end() :]
    return None


def our_name(name: str) -> str | None:
    """Our name of the authors' tensor, old and new peft spellings alike; None where the table has none."""
    name = _rename(name.replace(".base_layer.", "."), NAMES)
    return name and re.sub(r"\.lora_([AB])\.default\.", r".lora_\1.", name)


def authors_name(name: str) -> str | None:
    """The authors' name of our tensor (the inverse of `our_name`); None where the table has none."""
    inverse = {ours: theirs for theirs, ours in NAMES.items() if theirs != "query_expert_dict.#"}
    inverse["model.query_experts.#.weight"] = "query_expert_dict.#"
    name = _rename(name, inverse)
    return name and re.sub(r"\.lora_([AB])\.", r".lora_\1.default.", name)


def _our_shape(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """1×1 convolutions are linear layers here, and query tokens have no batch dimension."""
    if ".mini_pointnet.linear_" in name and tensor.ndim == 3:
        return tensor.squeeze(-1)
    if name.startswith("model.query_experts.") and tensor.ndim == 3:
        return tensor.squeeze(0)
    return tensor


def _part(name: str) -> str:
    return next(part for part in LORA_ALPHA if name.startswith(part))


def _merge(converted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add every LoRA product to its weight, in float32: W + alpha/r · B A."""
    merged = {name: tensor for name, tensor in converted.items() if not _LORA_KEY.fullmatch(name)}
    for name, lora_b in converted.items():
        match = _LORA_KEY.fullmatch(name)
        if match is None or match["matrix"] == "A":
            continue
        lora_a, weight = converted[f"{match['module']}.lora_A.weight"], merged[f"{match['module']}.weight"]
        rank = len(lora_a)
        scale = LORA_ALPHA[_part(name)](rank) / rank
        merged[f"{match['module']}.weight"] = (weight.float() + scale * (lora_b.float() @ lora_a.float())).to(
            weight.dtype
        )
    return merged


def _expected_shapes(config: MiniGPT3DConfig, part: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = MiniGPT3DForConditionalGeneration(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith(part)}


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], config: MiniGPT3DConfig, merge_lora: bool = True, part: str = ""
) -> dict[str, torch.Tensor]:
    """The authors' state dict as ours.

    Args:
        state_dict: the authors' names, LoRA matrices as peft wrote them (old spelling or new).
        config: the model that the result is for.
        merge_lora: add the LoRA products to their weights; otherwise they stay, as `….lora_A.weight` and
            `….lora_B.weight` under our names, for the adapter of `lora_config`.
        part: only this part of the model is in the file, by our name, such as "model.qformer"; by default all of it.

    Returns:
        State dict of `MiniGPT3DForConditionalGeneration` (of `part` alone where given), complete and nothing else.

    Raises:
        ValueError: keys that nothing knows, keys that are missing, LoRA halves, aliases that differ, wrong shapes;
            all of them in one message.
    """
    problems, converted, authors = [], {}, {}
    for key, tensor in state_dict.items():
        if key in LEFTOVERS:
            continue
        if (original := _rename(key, ALIASES)) is not None:
            if original in state_dict and not torch.equal(tensor, state_dict[original]):
                problems.append(f"{key} should be the same tensor as {original}, but differs from it")
            if original in state_dict:
                continue
        name = our_name(original or key)
        if name is None:
            problems.append(f"{key} is no tensor of MiniGPT-3D")
        elif name in converted:
            problems.append(f"{key} and {authors[name]} are both {name}")
        else:
            converted[name], authors[name] = _our_shape(tensor, name), key
    expected = _expected_shapes(config, part)
    if not expected:
        raise ValueError(f"part must be the beginning of our names, such as 'model.qformer', got {part!r}.")
    lora = {name for name in converted if _LORA_KEY.fullmatch(name)}
    for name in lora:
        match = _LORA_KEY.fullmatch(name)
        other = f"{match['module']}.lora_{'B' if match['matrix'] == 'A' else 'A'}.weight"
        if other not in lora:
            problems.append(f"{authors[name]} has no partner: {authors_name(other)} is missing")
        weight = expected.get(f"{match['module']}.weight")
        if weight is None:
            problems.append(f"{authors[name]} belongs to no weight of this configuration")
        elif (other in lora) and match["matrix"] == "A":
            got = (len(converted[other]), *converted[name].shape[1:])
            if got != tuple(weight) or converted[other].shape[1] != len(converted[name]):
                problems.append(
                    f"{authors[name]} and its partner have shapes {tuple(converted[name].shape)} and "
                    f"{tuple(converted[other].shape)}, their product does not fit {tuple(weight)}"
                )
    for name in expected.keys() - converted.keys():
        problems.append(f"{authors_name(name)} is missing (it becomes {name})")
    for name in converted.keys() - expected.keys() - lora:
        problems.append(f"{authors[name]} (here {name}) is not in this configuration")
    for name in converted.keys() & expected.keys():
        if converted[name].shape != expected[name]:
            got, wanted = tuple(converted[name].shape), tuple(expected[name])
            problems.append(f"{authors[name]} has shape {got}, the configuration needs {wanted}")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(
            f"this state dict is not one of the given configuration; {len(problems)} keys do not fit:\n  {listed}\n"
            "Check that the file and the configuration belong together."
        )
    return _merge(converted) if merge_lora else converted


def lora_config(converted: dict[str, torch.Tensor]) -> LoraConfig:
    """The PEFT configuration of the LoRA matrices in an unmerged state dict: ranks read off, alphas the authors'.

    Raises:
        ValueError: there are no LoRA matrices.
    """
    ranks = {}
    for name, tensor in converted.items():
        if (match := _LORA_KEY.fullmatch(name)) and match["matrix"] == "A":
            ranks[match["module"]] = len(tensor)
    if not ranks:
        raise ValueError("no lora_A matrices among the tensors. Convert with merge_lora=False to keep them.")
    alphas = {module: LORA_ALPHA[_part(module)](rank) for module, rank in ranks.items()}
    rank = next(iter(ranks.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alphas[next(iter(ranks))],
        target_modules=sorted(ranks),
        rank_pattern={f"^{re.escape(module)}$": r for module, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(module)}$": alpha for module, alpha in alphas.items()},
    )
