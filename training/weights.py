"""The weights of a stage: what is loaded, what trains, what the stage leaves behind.

The result of a stage is a PEFT adapter, small beside its base model:

    adapter_config.json           sizes of the LoRA factors, and the base model: what stage I started from
    adapter_model.safetensors     LoRA factors, and every module that this stage or one before it has trained, complete
    stage.json                    which stage made it, from what

`PeftModel.from_pretrained` and `AutoModel.from_pretrained` load it. So does the next stage, which continues with the
same factors, bit for bit. The result of the last stage, and with `export` that of any other, is merged into a folder for
the Hub, which keeps the adapter as `adapter/`.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.conversion.lora import PEFT_PREFIX, lora_targets, peft_scale, read_lora_config, write_adapter
from minigpt3d.conversion.release import make_plan, stage_sources
from minigpt3d.conversion.write import write_release
from minigpt3d.files import written_whole
from minigpt3d.hub import ADAPTER_DIR, ADAPTER_FILE, STAGE_FILE, ModelFiles, load_weights
from minigpt3d.messages import one_line
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration

from .launch import HALF
from .run_options import RunOptions
from .stages import Stage, select_trainable


def plain_name(name: str) -> str:
    """Name of a parameter without the parts that PEFT adds: `model.qformer.….query.lora_A.weight`."""
    return re.sub(r"^base_model\.model\.|\.base_layer\b|\.default\b", "", name)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their plain names."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


# ---- Before training ------------------------------------------------------------------------------------------------


def load_stage_model(accelerator: Accelerator, stage: Stage, start: ModelFiles, options: RunOptions) -> nn.Module:
    """Load the model of `start` in float32 and prepare it for the stage.

    Where the weights are sent to this process (`receives_weights`), memory is allocated for them and never touched.

    Raises:
        ValueError: the model or its adapter cannot be read or do not fit; options exclude each other.
    """
    if options.compile and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "`compile` does not go together with DeepSpeed, which runs code around every layer. Leave one out."
        )
    loading = {"dtype": torch.float32, "local_files_only": start.offline}
    if options.attn_implementation is not None:
        loading["attn_implementation"] = {"text_config": options.attn_implementation}
    if options.load_in_4bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=half_precision(accelerator) or torch.float32,
        )
    if options.load_in_4bit or (accelerator.device.type == "cuda" and not is_sharded(accelerator)):
        loading["device_map"] = {"": accelerator.device}  # tensor by tensor: the processes of a machine keep no copies
    if receives_weights(accelerator, options):
        half = HALF.get(accelerator.mixed_precision)
        if accelerator.distributed_type == DistributedType.DEEPSPEED and half:
            loading["dtype"] = half  # to which DeepSpeed casts: it would touch all memory
        model = allocate_weights(start.base, **loading)
    else:
        model = load_weights(start.base, **loading)
    model = prepare_model(model, stage, start.adapter, start.stage)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.compile:
        compile_layers(model)
    return model


def receives_weights(accelerator: Accelerator, options: RunOptions) -> bool:
    """Whether `accelerator.prepare` sends the main process's weights to this one, so that it need not read them."""
    if accelerator.is_main_process or options.load_in_4bit:
        return False
    if accelerator.distributed_type == DistributedType.FSDP:
        return bool(accelerator.state.fsdp_plugin.cpu_ram_efficient_loading)
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def allocate_weights(name: str | Path, local_files_only: bool = False, **options) -> MiniGPT3DForConditionalGeneration:
    """The model that `load_weights` returns, with right buffers and without values in its parameters.

    The system provides memory when it is first written, which is not before the weights arrive.
    """
    config = MiniGPT3DConfig.from_pretrained(name, local_files_only=local_files_only)
    with init.no_init_weights():
        model = MiniGPT3DForConditionalGeneration._from_config(config, **options)
    model.tie_weights()
    return model


def compile_layers(model: nn.Module, backend: str = "inductor"):
    """Compile every layer of encoder, Q-Former and language model by itself, in place.

    Layers of one kind have one code, and a length that changes becomes a variable of it. Hooks around a layer, such as those
    of FSDP, are not compiled.
    """
    # The layers' kinds, with gradients and without, of one cloud and more: what exceeds the limit would not be compiled.
    torch._dynamo.config.cache_size_limit = 64  # recompile_limit since torch 2.7
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = torch.compile(layer.forward, backend=backend)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP or DeepSpeed places and casts the weights."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def half_precision(accelerator: Accelerator) -> torch.dtype | None:
    """The dtype of autocast; None without it, for example for float16 on a CPU."""
    return HALF.get(accelerator.mixed_precision) if accelerator.native_amp else None


def halve_frozen(model: nn.Module, half: torch.dtype):
    """Keep frozen matrices in the dtype of autocast, which would otherwise cast them in every step."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim >= 2 and parameter.is_floating_point():
            parameter.data = parameter.data.to(half)


def prepare_model(
    model: MiniGPT3DForConditionalGeneration, stage: Stage, adapter: Path | None = None, run: dict | None = None
) -> nn.Module:
    """Prepare a model for a stage: routing, LoRA, earlier results, gradients for the parameters of the table only.

    Args:
        model: in float32; it is changed in place.
        stage: the row.
        adapter: folder with the result of the stage before (`ModelFiles.adapter`).
        run: content of its stage.json (`ModelFiles.stage`).

    Returns:
        The model, as a `PeftModel` if it has LoRA factors.

    Raises:
        ValueError: the adapter is of another model or recipe.
    """
    if stage.router_type == "none" != model.config.router_type:
        raise ValueError(
            f"{stage.title} trains expert 0 only, but the model to start from has a router "
            f"({model.config.router_type}). Start from the result of an earlier stage, with router_type none in its "
            "config.json; to train a finished model on your own objects, use minigpt3d.training.finetune."
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
    """Initialize the experts with the queries that the stages before have trained.

    The authors copy BLIP-2's queries instead, before they load stage III.
    """
    first, *others = model.model.query_experts
    with torch.no_grad():
        for expert in others:
            expert.weight.copy_(first.weight)


def add_lora(model: MiniGPT3DForConditionalGeneration, stage: Stage) -> PeftModel:
    """Add LoRA to the attention of Q-Former and language model, at the sizes of the row; B starts at zero."""
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
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # to float32, and autocast would cast it back
    # PEFT has one dropout for all modules.
    for module in model.base_model.model.model.qformer.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(qformer.dropout)
    return model


def set_training_mode(model: nn.Module):
    """Dropout where the authors have it: in LoRA and in the language model. Encoder and Q-Former stay in eval mode."""
    model.train()
    inner = model.base_model.model.model if isinstance(model, PeftModel) else model.model
    inner.point_encoder.eval()
    inner.qformer.eval()
    for module in inner.qformer.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()


def trainable_table(model: nn.Module) -> str:
    """Numbers of trainable and frozen parameters and their total, by module."""
    counts: dict[str, list[int]] = {}
    for name, parameter in named_parameters(model).items():
        module = name.removeprefix("model.").split(".")[0]
        counts.setdefault(module, [0, 0])[not parameter.requires_grad] += parameter.numel()
    rows = [(module, trainable, frozen) for module, (trainable, frozen) in counts.items()]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [f"{'module':<20}{'trainable':>15}{'frozen':>15}{'total':>15}"]
    lines += [f"{module:<20}{train:>15,}{frozen:>15,}{train + frozen:>15,}" for module, train, frozen in rows]
    return "\n".join(lines)


# ---- Adapters -------------------------------------------------------------------------------------------------------


def _read_names(adapter: Path) -> list[str]:
    """Plain names of the tensors in an adapter's file.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safe_open(adapter / ADAPTER_FILE, framework="pt") as file:
            return [name.removeprefix(PEFT_PREFIX) for name in file.keys()]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{adapter / ADAPTER_FILE} is missing or damaged ({one_line(error)}). Copy it again, or train its stage again."
        ) from error


def load_adapter(model: nn.Module, adapter: Path):
    """Load LoRA factors and trained modules. LoRA modules that the file lacks keep their new factors.

    (The parts that stage I starts from have factors for the language model and none for the Q-Former.)

    Raises:
        ValueError: the adapter is for other modules, other ranks or other scales.
    """
    tensors = {name.removeprefix(PEFT_PREFIX): t for name, t in load_file(adapter / ADAPTER_FILE).items()}
    parameters = named_parameters(model)
    copy_tensors({name: parameters[name] for name in tensors if name in parameters}, tensors, adapter / ADAPTER_FILE)
    config = read_lora_config(adapter)
    for module, scale in lora_scales(model).items():
        adapter_scale = peft_scale(config, module)
        if f"{module}.lora_A.weight" in tensors and abs(adapter_scale - scale) > 1e-6:
            raise ValueError(
                f"{adapter} does not fit the model of this stage and recipe: LoRA of {module} is scaled by {adapter_scale:g}, "
                f"expected {scale:g}. Use the recipe that made it."
            )


def lora_scales(model: nn.Module) -> dict[str, float]:
    """Factor of the LoRA product of every module that has one, by plain name."""
    return {plain_name(n): m.scaling["default"] for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def adapter_names(model: nn.Module, start: ModelFiles) -> list[str]:
    """Parameters in a stage's adapter: LoRA factors, and those of every module that it or an earlier stage has trained."""
    parameters = named_parameters(model)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    trained |= set(_read_names(start.adapter)) if start.adapter else set()
    modules = {name.rpartition(".")[0] for name in trained if ".lora_" not in name}
    return sorted(name for name in parameters if ".lora_" in name or name.rpartition(".")[0] in modules)


def save_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], scales: dict[str, float], base: str | Path, run: dict
):
    """Write the adapter of a stage, see `write_adapter`; the folder appears complete or not at all.

    Args:
        tensors: of `adapter_names`, by plain names, on the CPU.
        scales: factor of each module's LoRA product.
    """
    with written_whole(folder) as partial:
        write_adapter(partial, tensors, lambda module, rank: scales[module], base, run)


def export_model(adapter: Path, processor, output_dir: Path):
    """Merge an adapter into its base model and write a folder for the Hub; the adapter moves into it, as `adapter/`."""
    sources, config, lora = stage_sources(adapter)
    plan = make_plan(sources, config, processor, lora=lora)
    write_release(plan, output_dir, getattr(torch, str(config.dtype or "float32").removeprefix("torch.")))
    shutil.copyfile(adapter / STAGE_FILE, output_dir / STAGE_FILE)
    adapter.rename(output_dir / ADAPTER_DIR)


def copy_tensors(into: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], path: Path):
    """Copy tensors in place.

    Raises:
        ValueError: names or shapes differ.
    """
    if different := sorted(into.keys() ^ tensors.keys()):
        where = "the file" if different[0] in into else "the model"
        raise ValueError(
            f"{path} does not fit the model of this stage and recipe: {len(different)} names differ; {different[0]} is "
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
    """Complete parameters by plain names, on the CPU.

    If they are sharded over processes (FSDP2, DeepSpeed), every process must call this; one is gathered at a time. Of
    DeepSpeed's, the copy of the optimizer is taken: those of the model are in half precision.
    """
    parameters = named_parameters(model)
    return {name: _gathered(parameters[name]).detach().cpu().clone() for name in names}


def _gathered(parameter: nn.Parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # the optimizer's, in float32
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
