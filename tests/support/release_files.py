"""The golden model as the authors would have released it: six files, split as their runner splits them.

Values that a later stage trains are random in the earlier files, so that a test sees if the wrong one is taken.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_model import GOLDEN_DIR, make_tiny_config

from minigpt3d.conversion.names import FILES, matches, our_name
from minigpt3d.training.stages import STAGE_3, STAGE_4


PHI = "llama_model.base_model.model."
ADDED_NORMS = (".q_layernorm.weight", ".k_layernorm.weight", ".post_layernorm.weight")


def trained_by(stage, key: str) -> bool:
    name = our_name(key)
    return name is not None and matches(name, stage.trainable)


def split_qkv(key: str, tensor: torch.Tensor, num_heads: int) -> dict[str, torch.Tensor]:
    """The authors' fused matrix (heads, 3, head_dim) as the official q, k and v."""
    parts = tensor.unflatten(0, (num_heads, 3, -1))
    return {
        key.replace("query_key_value", f"{n}_proj"): parts[:, i].flatten(0, 1).contiguous()
        for i, n in enumerate("qkv")
    }


def release_contents(state: dict[str, torch.Tensor] | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of each slot's file, by the keys in it."""
    state = state or load_file(GOLDEN_DIR / "full.state.safetensors")
    generator = torch.Generator().manual_seed(0)
    older = lambda key: torch.randn(state[key].shape, generator=generator)  # noqa: E731
    files = {file.slot: {} for file in FILES}
    for key, tensor in state.items():
        in_3, in_4 = trained_by(STAGE_3, key), trained_by(STAGE_4, key)
        is_buffer = "running_" in key or "num_batches" in key or "position_ids" in key
        before = older(key) if in_3 or in_4 else tensor
        if key.startswith(PHI) and ".lora_" not in key and not key.endswith(ADDED_NORMS):
            # The golden's biases of the q and k norms are not zero, so a file must hold them; in the release none does.
            files["phi"][key.removeprefix(PHI)] = before
        elif key.startswith(PHI) or key.startswith("llama_proj"):
            files["tinygpt_v"][key] = before
        elif key == "query_tokens" or (key.startswith("Qformer.") and ".lora_" not in key):
            files["blip2"][key] = before
        if key.startswith("pc_encoder."):
            files["point_encoder"][key.removeprefix("pc_encoder.")] = tensor
        for stage, trains in (("stage3", in_3), ("stage4", in_4)):
            if trains and not (stage == "stage3" and key.startswith(("query_expert_dict", "query_router"))):
                files[stage][key] = older(key) if stage == "stage3" and in_4 else tensor
            if is_buffer:
                files[stage][key] = tensor
            if key.startswith("pc_encoder."):
                files[stage][key.replace("pc_encoder", "point_encoder", 1)] = tensor
    files["stage4"]["query_expert_dict.0"] = files["stage4"]["query_tokens"]
    files["tinygpt_v"] |= {"visual_encoder.cls_token": torch.zeros(1, 1, 4), "ln_vision.weight": torch.ones(4)}
    files["blip2"] |= {"ln_vision.bias": torch.ones(4), "t5_proj.weight": torch.ones(4, 4)}
    return files


def write_release_files(folder: Path, contents: dict | None = None, phi: str = "fused") -> dict[str, Path]:
    """Write the files; returns the path of each slot.

    Args:
        contents: as of `release_contents`, which is the default.
        phi: "fused" safetensors in one file, or "official": separate q, k and v in two `.bin` shards.
    """
    contents = contents or release_contents()
    paths = {slot: folder / f"{slot}.pth" for slot in contents} | {"phi": folder / "Phi_2"}
    paths["phi"].mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN_DIR / "tokenizer" / name, paths["phi"] / name)
    settings = {"architectures": ["PhiForCausalLM"], "num_attention_heads": 4, "partial_rotary_factor": 0.5}
    (paths["phi"] / "config.json").write_text(json.dumps(settings | {"model_type": "phi", "layer_norm_eps": 1e-05}))
    if phi == "fused":
        save_file(contents["phi"], paths["phi"] / "model.safetensors")
    else:
        write_official_phi(paths["phi"], contents["phi"])
    for slot, tensors in contents.items():
        if slot != "phi":
            container = "base_model" if slot == "point_encoder" else "model"
            extra = {"optimizer": {"state": {0: torch.ones(2)}}, "epoch": 2} if slot == "stage4" else {}
            torch.save({container: tensors} | extra, paths[slot])
    return paths


def write_official_phi(folder: Path, fused: dict[str, torch.Tensor]):
    """Two `.bin` shards with separate q, k and v."""
    num_heads, tensors = make_tiny_config().text_config.num_attention_heads, {}
    for key, tensor in fused.items():
        tensors |= split_qkv(key, tensor, num_heads) if "query_key_value" in key else {key: tensor}
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, shard in shards.items():
        torch.save(shard, folder / name)
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def release_options(paths: dict[str, Path]) -> list[str]:
    """The options of `minigpt3d convert` for files."""
    return [str(word) for slot, path in paths.items() for word in ("--" + slot.replace("_", "-"), path)]
