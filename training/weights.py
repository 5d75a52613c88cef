"""The weights of a stage: what is loaded, what trains, what is kept for resuming and what the stage leaves behind.

A stage's result is a PEFT adapter, small beside the model that it belongs to:

    adapter_config.json           sizes of the LoRA factors, and the base model: what stage I started from
    adapter_model.safetensors     LoRA factors, and whole every module that this stage or one before it has trained
    stage.json                    which stage made it, from what

`PeftModel.from_pretrained` and `AutoModel.from_pretrained` load it. So does the next stage, which goes on with the same
factors, to the bit. The last stage's result, and with `--export` any other's, is merged into a folder for the Hub, which
keeps the adapter as `adapter/`.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minigpt3d.conversion import lora_config
from minigpt3d.conversion.lora import PEFT_PREFIX, lora_targets, peft_scale, read_lora_config
from minigpt3d.files import sha256, written_whole
from minigpt3d.hub import ADAPTER_FILE, STAGE_FILE, ModelFiles
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration

from .stages import Stage, select_trainable


TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


def own_name(name: str) -> str:
    """Our name of a parameter, without what PEFT puts around it: `model.qformer.….query.lora_A.weight`."""
    return re.sub(r"^base_model\.model\.|\.base_layer\b|\.default\b", "", name)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {own_name(name): parameter for name, parameter in model.named_parameters()}


# ---- Before training ------------------------------------------------------------------------------------------------


def prepare_model(
    model: MiniGPT3DForConditionalGeneration, stage: Stage, adapter: Path | None = None, run: dict | None = None
) -> nn.Module:
    """Make a model ready for a stage: routing, LoRA, what was trained before, gradients for the table's parameters alone.

    Args:
        model: in float32; it is changed in place.
        stage: the row.
        adapter: folder of what the stages before have trained.
        run: what is known of the stage that made the start (`ModelFiles.stage`).

    Returns:
        The model, as a `PeftModel` if it has LoRA factors.

    Raises:
        ValueError: the adapter is of another model or recipe.
    """
    if stage.router_type == "none" != model.config.router_type:
        raise ValueError(
            f"Stage {stage.name} trains expert 0 alone, but the model to start from is routed "
            f"({model.config.router_type}). Start from one of a stage before, with router_type none in its config.json; "
            "to teach a finished model your own objects, use training/finetune.py."
        )
    router_before = (run or {}).get("router_type", model.config.router_type)
    model.config.router_type = stage.router_type or router_before
    has_lora = adapter is not None and any(".lora_A." in name for name in _read_names(adapter))
    inner = model
    if stage.trains_lora or has_lora:
        model = add_lora(model, stage)
    if adapter is not None:
        load_adapter(model, adapter)
    if router_before == "none" and model.config.router_type != "none":
        copy_expert_0(inner)
    parameters = named_parameters(model)
    trainable = select_trainable(stage, parameters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    set_training_mode(model)
    return model


def copy_expert_0(model: MiniGPT3DForConditionalGeneration):
    """Experts that no router has used yet start as copies of the queries that the stages before have trained.

    The authors copy BLIP-2's queries instead, before they load stage III (DESIGN: the four stages).
    """
    first, *others = model.model.query_experts
    with torch.no_grad():
        for expert in others:
            expert.weight.copy_(first.weight)


def add_lora(model: MiniGPT3DForConditionalGeneration, stage: Stage) -> PeftModel:
    """LoRA on the Q-Former's and the language model's attention, at the sizes of the row; B starts at zero."""
    language, qformer = stage.language_lora, stage.qformer_lora
    config = LoraConfig(
        target_modules=lora_targets(model.config.text_config.model_type),
        r=language.rank,
        lora_alpha=language.alpha,
        lora_dropout=language.dropout,
        rank_pattern={r"model\.qformer\..*": qformer.rank},
        alpha_pattern={r"model\.qformer\..*": qformer.alpha},
    )
    model = get_peft_model(model, config)
    # PEFT has one dropout for all modules.
    for module in model.base_model.model.model.qformer.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(qformer.dropout)
    return model


def set_training_mode(model: nn.Module):
    """Dropout where the authors have it: in LoRA and in the language model. Encoder and Q-Former run as in evaluation."""
    model.train()
    inner = model.base_model.model.model if isinstance(model, PeftModel) else model.model
    inner.point_encoder.eval()
    inner.qformer.eval()
    for module in inner.qformer.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()


def trainable_table(model: nn.Module) -> str:
    """How many parameters train, are frozen, and are there in all, module by module."""
    counts: dict[str, list[int]] = {}
    for name, parameter in named_parameters(model).items():
        module = name.removeprefix("model.").split(".")[0]
        counts.setdefault(module, [0, 0])[not parameter.requires_grad] += parameter.numel()
    rows = [(module, trainable, frozen) for module, (trainable, frozen) in counts.items()]
    rows.append(("in all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [f"{'module':<20}{'trainable':>15}{'frozen':>15}{'total':>15}"]
    lines += [f"{module:<20}{train:>15,}{frozen:>15,}{train + frozen:>15,}" for module, train, frozen in rows]
    return "\n".join(lines)


# ---- Adapters -------------------------------------------------------------------------------------------------------


def _read_names(adapter: Path) -> list[str]:
    """Our names of the tensors in an adapter's file."""
    with safe_open(adapter / ADAPTER_FILE, framework="pt") as file:
        return [name.removeprefix(PEFT_PREFIX) for name in file.keys()]


def load_adapter(model: nn.Module, adapter: Path):
    """Put LoRA factors and trained modules back. LoRA modules of which the file has nothing keep their new factors.

    (The parts that stage I starts from have factors for the language model and none for the Q-Former.)

    Raises:
        ValueError: the adapter is for other modules, other ranks or other scales.
    """
    tensors = {name.removeprefix(PEFT_PREFIX): t for name, t in load_file(adapter / ADAPTER_FILE).items()}
    parameters = named_parameters(model)
    _copy_tensors({name: parameters[name] for name in tensors if name in parameters}, tensors, adapter / ADAPTER_FILE)
    config = read_lora_config(adapter)
    for module, scale in lora_scales(model).items():
        theirs = peft_scale(config, module)
        if f"{module}.lora_A.weight" in tensors and abs(theirs - scale) > 1e-6:
            raise ValueError(
                f"{adapter} does not fit the model of this stage and recipe: LoRA of {module} is scaled by {theirs:g}, "
                f"expected {scale:g}. Use the recipe that made it."
            )


def lora_scales(model: nn.Module) -> dict[str, float]:
    """Factor of the LoRA product of every module that has one, by our names."""
    return {own_name(n): m.scaling["default"] for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def adapter_names(model: nn.Module, start: ModelFiles) -> list[str]:
    """What a stage's adapter holds: LoRA factors, and all parameters of the modules that it or a stage before has trained."""
    parameters = named_parameters(model)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    trained |= set(_read_names(start.adapter)) if start.adapter else set()
    modules = {name.rpartition(".")[0] for name in trained if ".lora_" not in name}
    return sorted(name for name in parameters if ".lora_" in name or name.rpartition(".")[0] in modules)


def save_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], scales: dict[str, float], base: str | Path, run: dict
):
    """Write a stage's result (see the top of this file); the folder is whole or not there.

    Args:
        tensors: of `adapter_names`, by our names, on the CPU.
        scales: factor of each module's LoRA product.
        base: folder or Hub id of the model that the adapter is for.
        run: for stage.json.
    """
    factors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    modules = sorted({name.rpartition(".")[0] for name in tensors.keys() - factors.keys()})
    options = {
        # Without "model.", so that the ends of the names fit the model with its head and the one without.
        "modules_to_save": [module.removeprefix("model.") for module in modules],
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else str(base),
        "inference_mode": True,
    }
    if factors:
        config = lora_config(factors, lambda module, rank: scales[module], **options)
    else:
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, **options)
    with written_whole(folder) as partial:
        config.save_pretrained(partial)
        contents = {f"{PEFT_PREFIX}{name}": tensors[name].float().contiguous() for name in sorted(tensors)}
        save_file(contents, partial / ADAPTER_FILE, metadata={"format": "pt"})
        (partial / STAGE_FILE).write_text(json.dumps(run, indent=1) + "\n")


def _copy_tensors(into: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], path: Path):
    """Copy tensors in place; names and shapes must agree, every one."""
    if unpaired := sorted(into.keys() ^ tensors.keys()):
        where = "the file" if unpaired[0] in into else "the model"
        raise ValueError(
            f"{path} does not fit the model of this stage and recipe: {len(unpaired)} names differ; {unpaired[0]} is "
            f"not in {where}. Use the recipe that made it."
        )
    for name, tensor in tensors.items():
        if tensor.shape != into[name].shape:
            raise ValueError(
                f"{path} does not fit the model of this stage and recipe: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(into[name].shape)}. Use the recipe that made it."
            )
        with torch.no_grad():
            into[name].copy_(tensor)


# ---- While training -------------------------------------------------------------------------------------------------


def gather_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters by our names, whole and on the CPU.

    Where they are sharded over processes (FSDP2, DeepSpeed), every process must call this; one is put together at a time.
    """
    parameters = named_parameters(model)
    return {name: _whole(parameters[name]).detach().cpu().clone() for name in names}


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def save_checkpoint(folder: Path, trained: dict[str, torch.Tensor], optimizer_state: dict, run: dict):
    """What a killed run goes on from: the trainable tensors, the optimizer, and `run` (its step and settings)."""
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would have been gone on from
    with written_whole(folder) as temporary:
        save_file(trained, temporary / TRAINED_FILE)
        torch.save(optimizer_state, temporary / OPTIMIZER_FILE)
        hashes = {name: sha256(temporary / name) for name in (TRAINED_FILE, OPTIMIZER_FILE)}
        (temporary / STAGE_FILE).write_text(json.dumps(run | {"sha256": hashes}, indent=1))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where they are as they were written."""
    try:
        hashes = json.loads((checkpoint / STAGE_FILE).read_text())["sha256"]
        changed = [name for name, digest in hashes.items() if sha256(checkpoint / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{changed[0]} has changed" if changed else None


def load_checkpoint(folder: Path, model: nn.Module) -> dict:
    """Put a checkpoint's tensors back into the model; returns the optimizer's state."""
    trainable = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    tensors = load_file(folder / TRAINED_FILE)
    _copy_tensors(trainable, tensors, folder / TRAINED_FILE)
    return torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
