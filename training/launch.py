"""Accelerate's configurations (`training/accelerate/*.yaml`), completed with what this model needs."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from transformers.integrations import unset_hf_deepspeed_config

from minigpt3d.files import written_whole


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by Accelerate's names of mixed precision
WAIT = timedelta(hours=1)  # for a process that loads weights or writes a checkpoint while the others wait


def make_accelerator(**kwargs) -> Accelerator:
    """The accelerator of the configuration that `accelerate launch` was given.

    Under FSDP2 with mixed precision, weights are gathered in half precision and gradients are reduced in float32. Inputs
    are not cast: point clouds stay float32 until their groups are made, and so does the loss.

    Raises:
        ValueError: FSDP1, which flattens the parameters that stages choose by name.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)], **kwargs)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unset_hf_deepspeed_config()  # ZeRO-3 divides the weights after a stage has prepared them, not while they load
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator
    plugin = accelerator.state.fsdp_plugin
    if vars(plugin).get("fsdp_version") != 2:
        raise ValueError(
            "`fsdp_version` must be 2, as in training/accelerate/fsdp2.yaml, with accelerate 1.6 or later. FSDP1 flattens "
            "parameters, which the stages choose and save by name."
        )
    half = HALF.get(accelerator.mixed_precision)
    if half is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    return accelerator


def prepare(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device_batch: int):
    """`accelerator.prepare` for model and optimizer.

    Args:
        device_batch: the most samples that a device processes at once, which DeepSpeed wants to know.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        # Accelerate reads a clipping of 0 in its own configuration as the default, 1; the paper clips nothing.
        config |= {"train_micro_batch_size_per_gpu": device_batch, "gradient_clipping": 0.0}
    return accelerator.prepare(model, optimizer)


def on_main(accelerator: Accelerator, function: Callable, *args):
    """What a function returns that the main process alone calls; every process gets it, or the function's ValueError."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*args)
        except ValueError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def share_folder(accelerator: Accelerator, folder: Path):
    """Copy a folder of the main process to machines that do not see it, where processes have disks of their own."""
    if all(gather_object([folder.is_dir()])):
        return
    files = on_main(accelerator, lambda: {path.name: path.read_bytes() for path in folder.iterdir()})
    if accelerator.is_local_main_process and not folder.is_dir():
        with written_whole(folder) as partial:
            for name, content in files.items():
                (partial / name).write_bytes(content)
    accelerator.wait_for_everyone()
