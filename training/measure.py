"""Measurements of a run beside the training loss: size of the updates, routing, and loss on held-out data."""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from .stages import Stage
from .stream import Packing, encode_row, pack_batch
from .weights import named_parameters, set_training_mode


VALIDATION_ROWS = 256  # of each source


# ---- Updates --------------------------------------------------------------------------------------------------------


class UpdateMeter:
    """Relative size of a step's update, by module of a model without Accelerate's wrappers, every `EVERY`-th step."""

    EVERY = 10

    def __init__(self, model: torch.nn.Module):
        self.groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in named_parameters(model).items():
            if parameter.requires_grad and not hasattr(parameter, "ds_id"):  # DeepSpeed's are sharded
                self.groups.setdefault(name.removeprefix("model.").split(".")[0], []).append(parameter)
        self.before: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def remember(self, step: int):
        """Call before the step."""
        if step % self.EVERY == 0:
            self.before = {name: [p.detach().clone() for p in group] for name, group in self.groups.items()}

    @torch.no_grad()
    def ratios(self) -> dict[str, torch.Tensor]:
        """Norm of the update over norm of the weights, by module; none if nothing was remembered. Call after the step."""
        result = {}
        for name, before in self.before.items():
            size = total_norm(before)
            updates = torch._foreach_sub([p.detach() for p in self.groups[name]], before)
            result[name] = total_norm(updates) / size.clamp(min=1e-12)
        self.before = {}
        return result


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Norm of all tensors together, a scalar on their device; sharded ones are summed over processes."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ---- Routing --------------------------------------------------------------------------------------------------------


class RouterMeter:
    """Which experts of a model, without Accelerate's wrappers, serve the clouds of a step."""

    def __init__(self, model: torch.nn.Module):
        config = model.config
        self.num_used = {"sparse": config.num_experts_per_cloud, "soft": config.num_query_experts}.get(
            config.router_type
        )
        self.logits: list[torch.Tensor] = []
        if self.num_used:
            inner = model.base_model.model.model if hasattr(model, "merge_and_unload") else model.model
            inner.router.linear_2.register_forward_hook(self._collect)

    def _collect(self, module: torch.nn.Module, inputs: tuple, logits: torch.Tensor):
        if module.training:
            self.logits.append(logits.detach())

    @torch.no_grad()
    def read(self, num_clouds: int) -> torch.Tensor | None:
        """Sums over all clouds since the last call, for `router_entry`: (2E + 2,); None without a router.

        Args:
            num_clouds: that count; those behind them are copies, which let this process take part in the step.
        """
        if not self.logits:
            return None
        weights = torch.cat(self.logits).float().softmax(-1)[:num_clouds]  # (B, E)
        self.logits.clear()
        used = torch.zeros_like(weights).scatter_(1, weights.topk(self.num_used).indices, 1.0)
        count = weights.new_full((1,), num_clouds)
        return torch.cat([used.sum(0), weights.sum(0), _entropy(weights).sum()[None], count])


def router_entry(sums: list[float]) -> dict:
    """The entry `router` of the history, from `RouterMeter.read`, added up over all processes."""
    *sums, count = sums
    means = [value / count for value in sums]
    experts = len(means) // 2
    load, weight, entropy = means[:experts], means[experts:-1], means[-1]
    between = max(0.0, _entropy(torch.tensor(weight)).item() - entropy)
    return {"load": load, "weight": weight, "entropy": entropy, "between": between}


def _entropy(weights: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(weights).sum(-1)


# ---- Held-out data --------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(accelerator: Accelerator, model, stage: Stage, sources: dict, processor, batch: int) -> float:
    """Mean loss over the answer tokens of the first rows of each source, without dropout and augmentation.

    Args:
        sources: of the held-out data, by name.
        batch: samples that a device takes at once.
    """
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    packing = Packing.of(inner)
    addresses = [
        (name, shard, row)
        for name, source in sources.items()
        for shard, row in [(s, r) for s, rows in enumerate(source.rows) for r in range(rows)][:VALIDATION_ROWS]
    ]
    assigned = addresses[accelerator.process_index :: accelerator.num_processes]
    inner.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for first in range(0, math.ceil(len(addresses) / accelerator.num_processes), batch):
        # A process without samples repeats one, uncounted: sharded models need all processes.
        chosen = assigned[first : first + batch] or addresses[:1]
        samples = [encode_row(processor, sources[name], address, stage) for name, *address in chosen]
        packed = pack_batch(samples, packing)
        tokens = int((packed["labels"] != -100).sum())
        inputs = send_to_device(packed, accelerator.device, non_blocking=True)
        loss = model(**inputs, use_cache=False, num_items_in_batch=tokens).loss
        if assigned[first : first + batch]:
            total += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64, device=accelerator.device)
    set_training_mode(inner)
    loss, tokens = accelerator.reduce(total).tolist()
    return loss / max(tokens, 1)
