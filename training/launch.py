"""Accelerate's configurations (`training/accelerate/*.yaml`), completed with what this model needs."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs


WAIT = timedelta(hours=1)  # for a process that loads weights or writes a checkpoint while the others wait


def make_accelerator(**kwargs) -> Accelerator:
    """The accelerator of the configuration that `accelerate launch` was given.

    Under FSDP2 with mixed precision, weights are gathered in half precision and gradients are reduced in float32. Inputs
    are not cast: point clouds stay float32 until their groups are made, and so does the loss.

    Raises:
        ValueError: FSDP1, whose flattened parameters cannot be trained in part.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)], **kwargs)
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator
    plugin = accelerator.state.fsdp_plugin
    if vars(plugin).get("fsdp_version") != 2:
        raise ValueError(
            "`fsdp_version` must be 2, as in training/accelerate/fsdp2.yaml, with accelerate 1.6 or later; FSDP1 cannot "
            "train a part of the parameters."
        )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
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
        config["train_micro_batch_size_per_gpu"] = device_batch
    return accelerator.prepare(model, optimizer)
