"""Write a planned conversion: tensors are read one at a time, into shards that are written as they fill.

The folder appears complete or not at all.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

from minigpt3d.files import write_json, written_whole
from minigpt3d.hub import ADAPTER_DIR, BASE_DIR, check_model_dir, write_all_but_weights
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration

from .lora import import_peft, write_adapter
from .names import STAGE_3_TENSORS, STAGE_4_TENSORS, matches
from .release import ConversionPlan, provenance


SHARD_SIZE = 2 * 10**9  # bytes; a shard is built in memory, so it is most of the memory that a conversion needs
MAPPED_SIZE = 3 * 10**8  # bytes of the inputs that stay in memory at a time
PROVENANCE_FILE = "provenance.json"


def write_release(
    plan: ConversionPlan,
    output_dir: Path,
    dtype: torch.dtype,
    lora: str = "merge",
    command: Iterable[str] = (),
    before_rename: Callable[[Path], None] = lambda folder: None,
):
    """Write the folder. Its model card is the caller's to write, in `before_rename`.

    Args:
        plan: from `make_plan`.
        output_dir: a new folder, or a model's, which is replaced.
        dtype: of the weights; an adapter's are float32.
        lora: "merge" adds the products to their weights; "keep" writes `base/` and a PEFT `adapter/`.
        command: the command line, for provenance.json.
        before_rename: called with the complete folder while it still has its temporary name.

    Raises:
        ValueError: there is no LoRA to keep, or a value does not fit the dtype.
        ImportError: LoRA is to be kept, and peft is not installed.
        OSError: the disk is full, or will be.
    """
    output_dir = check_model_dir(output_dir, [source.checkpoint.path for source in plan.sources])
    if lora == "keep":
        import_peft()
        if not plan.accounted.lora:
            raise ValueError('`lora` is "keep", but there are no LoRA factors in these files; use "merge".')
    _check_space(plan, output_dir, dtype, adapter=lora == "keep")
    settings = {"dtype": str(dtype).removeprefix("torch."), "lora": lora, "router_type": plan.config.router_type}
    record = provenance(plan, list(command), settings)
    with written_whole(output_dir) as partial:
        folder = partial / BASE_DIR if lora == "keep" else partial
        folder.mkdir(exist_ok=True)
        plan.config.dtype = dtype
        with torch.device("meta"):
            model = MiniGPT3DForConditionalGeneration(plan.config)
        write_all_but_weights(folder, model, plan.processor)
        plan.config.architectures = [type(model).__name__]
        plan.config.save_pretrained(folder)
        write_weights(folder, plan, dtype, merge_lora=lora == "merge")
        write_json(folder / PROVENANCE_FILE, record)
        if lora == "keep":
            adapter = partial / ADAPTER_DIR
            _write_adapter(adapter, plan, output_dir / BASE_DIR)
            write_json(adapter / PROVENANCE_FILE, record)
            for name in ("LICENSE", "NOTICE"):
                shutil.copyfile(folder / name, adapter / name)
        before_rename(partial)


def _check_space(plan: ConversionPlan, output_dir: Path, dtype: torch.dtype, adapter: bool):
    """
    Raises:
        OSError: the disk has no room for the result.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(shape.numel() for shape in plan.expected.values()) * dtype.itemsize
    if adapter:
        needed += 3 * 10**8  # LoRA factors and trained modules of the paper's size in float32
    free = shutil.disk_usage(output_dir.parent).free
    if needed > free:
        raise OSError(
            f"{output_dir.parent} has {free / 1e9:.3g} GB free, the result needs {needed / 1e9:.3g} GB. Free some space, "
            "or write to another disk."
        )


def write_weights(folder: Path, plan: ConversionPlan, dtype: torch.dtype, merge_lora: bool):
    """Write `model.safetensors`, or shards and their index, with at most one shard in memory."""
    read = plan.reader()
    with torch.device("meta"):
        shapes = {name: torch.empty(shape, dtype=dtype) for name, shape in plan.expected.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_SIZE)
    with tqdm(total=len(shapes), desc="weights", unit="tensor", disable=None) as progress:
        for filename, names in split.filename_to_tensors.items():
            tensors, mapped = {}, 0
            for name in names:
                tensors[name] = _cast(read(name, merge_lora), dtype, name)
                mapped += tensors[name].nbytes
                if mapped > MAPPED_SIZE:
                    plan.release()
                    mapped = 0
                progress.update()
            save_file(tensors, folder / filename, metadata={"format": "pt"})
            tensors.clear()
            plan.release()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A copy in the dtype on disk.

    Raises:
        ValueError: a value is not finite, or not in this dtype.
    """
    cast = tensor.to(dtype, copy=True).contiguous()
    if not cast.isfinite().all():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite. Its file is damaged; download it again.")
        largest = tensor.abs().max().item()
        raise ValueError(f"{name} holds {largest:.3g}, too large for {dtype}. Use a `dtype` of bfloat16 or float32.")
    return cast


def _write_adapter(folder: Path, plan: ConversionPlan, base: Path):
    """Write LoRA factors and the modules that the stages train; with stage.json if a stage made them."""
    read, patterns = plan.reader(), STAGE_3_TENSORS
    if plan.config.router_type != "none":
        patterns += STAGE_4_TENSORS
    modules = {name.rpartition(".")[0] for name in plan.expected if matches(name, patterns)}
    names = [*plan.accounted.lora, *(name for name in plan.expected if name.rpartition(".")[0] in modules)]
    tensors = {name: _cast(read(name), torch.float32, name) for name in names}
    name = {"stage4": "IV", "stage3": "III"}.get(plan.sources[-1].file.slot)
    stage = name and {"stage": name, "init": "minigpt3d convert", "router_type": plan.config.router_type}
    write_adapter(folder, tensors, plan.scale, base, stage)  # the next stage reads stage.json
    plan.release()
