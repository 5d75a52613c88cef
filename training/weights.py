"""The weights of a stage: what is loaded, what trains, what is kept for resuming and what the stage leaves behind.

A stage's result is one folder:

    config.json, model.safetensors, …      the model with LoRA merged in: `from_pretrained` reads it, the Hub takes it
    training_state/lora.safetensors        LoRA factors and their scales, and beside each the weight without them
    training_state/stage.json              which stage made it
    history.jsonl                          loss and learning rate of every step

The next stage loads the folder and puts the unmerged weights and their factors back. So LoRA goes on where the stage
before left it, to the bit, and the folder needs no other folder. A folder without `training_state/` starts with new,
empty factors on its weights.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from minigpt3d.conversion import save_pretrained
from minigpt3d.conversion.checkpoints import sha256
from minigpt3d.conversion.hub_folder import written_whole
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration

from .stages import Stage, lora_targets, select_trainable


STATE_DIR = "training_state"
LORA_FILE = "lora.safetensors"
STAGE_FILE = "stage.json"
TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


def own_name(name: str) -> str:
    """Our name of a parameter, without what PEFT puts around it: `model.qformer.….query.lora_A.weight`."""
    return re.sub(r"^base_model\.model\.|\.base_layer\b|\.default\b", "", name)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {own_name(name): parameter for name, parameter in model.named_parameters()}


# ---- Before training ------------------------------------------------------------------------------------------------


def load_model(init: str | Path) -> MiniGPT3DForConditionalGeneration:
    """The model of a folder or Hub id, in float32.

    Raises:
        ValueError: the folder holds another model than its configuration says.
    """
    model, report = MiniGPT3DForConditionalGeneration.from_pretrained(
        init, dtype=torch.float32, output_loading_info=True
    )
    for problem, keys in report.items():
        if keys:
            raise ValueError(f"--init {init}: {len(keys)} {problem.replace('_', ' ')}, such as {sorted(keys)[0]}.")
    return model


def read_stage(folder: str | Path) -> dict | None:
    """What `training_state/stage.json` says about the stage that made a folder; None where there is none."""
    path = Path(folder) / STATE_DIR / STAGE_FILE
    return json.loads(path.read_text()) if path.exists() else None


def prepare_model(model: MiniGPT3DForConditionalGeneration, stage: Stage, init: str | Path) -> nn.Module:
    """Make a model ready for a stage: routing, LoRA, and gradients for the table's parameters alone.

    Args:
        model: as `load_model(init)` returns it; it is changed in place.
        stage: the row.
        init: the folder that the model came from, for its unmerged LoRA factors.

    Returns:
        The model, as a `PeftModel` if it has LoRA factors.
    """
    if model.config.router_type == "none" and stage.router_type != "none":
        copy_expert_0(model)
    model.config.router_type = stage.router_type
    lora_path = Path(init) / STATE_DIR / LORA_FILE
    if stage.trains_lora or lora_path.exists():
        model = add_lora(model, stage)
    if lora_path.exists():
        load_lora(model, lora_path)
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


# ---- LoRA beside the weights it is merged into -----------------------------------------------------------------------


def _lora_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Factors and unmerged weights of every module with LoRA, by our names."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = own_name(name)
            tensors[f"{name}.weight"] = module.base_layer.weight
            tensors[f"{name}.lora_A.weight"] = module.lora_A["default"].weight
            tensors[f"{name}.lora_B.weight"] = module.lora_B["default"].weight
    return tensors


def load_lora(model: PeftModel, path: Path):
    """Put unmerged weights and factors back. Modules of which the file has nothing keep their new factors.

    (The parts that stage I starts from have factors for the language model and none for the Q-Former.)

    Raises:
        ValueError: the file is for other modules or other ranks.
    """
    into, tensors = _lora_tensors(model), load_file(path)
    known = {re.sub(r"(\.lora_[AB])?\.weight$", "", name) for name in tensors}
    into = {name: tensor for name, tensor in into.items() if re.sub(r"(\.lora_[AB])?\.weight$", "", name) in known}
    _copy_tensors(into, tensors, path)


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


def save_checkpoint(folder: Path, model: nn.Module, optimizer_state: dict, run: dict):
    """What a killed run goes on from: the trainable tensors, the optimizer, and `run` (its step and settings)."""
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would have been gone on from
    with written_whole(folder) as temporary:
        trained = {name: p.detach().cpu() for name, p in named_parameters(model).items() if p.requires_grad}
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
    _copy_tensors(trainable, load_file(folder / TRAINED_FILE), folder / TRAINED_FILE)
    return torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)


# ---- After training -------------------------------------------------------------------------------------------------


def save_result(folder: Path, model: nn.Module, processor, run: dict):
    """Write a stage's result (see the top of this file). LoRA is merged into `model`, which ends here."""
    lora = {name: tensor.detach().cpu().clone() for name, tensor in _lora_tensors(model).items()}
    # The only key: two would be written in an order drawn at random.
    scales = {own_name(n): m.scaling["default"] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    save_pretrained(merged, processor, folder)
    (folder / STATE_DIR).mkdir()
    if lora:
        save_file(lora, folder / STATE_DIR / LORA_FILE, metadata={"scales": json.dumps(scales)})
    (folder / STATE_DIR / STAGE_FILE).write_text(json.dumps(run, indent=1))
