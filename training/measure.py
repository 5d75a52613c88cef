"""Measurements of a run beside the training loss: size of the updates, routing, and loss on held-out data."""

import math

import torch
from accelerate import Accelerator

from .stages import Stage
from .stream import encode_sample, pack_batch, takes_one_row
from .weights import named_parameters, set_training_mode


VALIDATION_ROWS = 256  # of each source


# ---- Updates --------------------------------------------------------------------------------------------------------


class UpdateMeter:
    """Relative size of a step's update, by module of a model without Accelerate's wrappers."""

    def __init__(self, model: torch.nn.Module):
        self.groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in named_parameters(model).items():
            if parameter.requires_grad and not hasattr(parameter, "ds_id"):  # DeepSpeed's are sharded
                self.groups.setdefault(name.removeprefix("model.").split(".")[0], []).append(parameter)

    @torch.no_grad()
    def remember(self):
        """Call before the step."""
        self.before = {name: [p.detach().clone() for p in group] for name, group in self.groups.items()}

    @torch.no_grad()
    def ratios(self) -> dict[str, float]:
        """Norm of the update over norm of the weights, by module. Call after the step."""
        result = {}
        for name, group in self.groups.items():
            updates = [now - old for now, old in zip(group, self.before[name], strict=True)]
            result[name] = _norm(updates) / max(_norm(self.before[name]), 1e-12)
        self.before = {}
        return result


def _norm(tensors: list[torch.Tensor]) -> float:
    norm = torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors])
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


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
    def read(self, accelerator: Accelerator, idle: bool = False) -> dict | None:
        """The entry `router` of the history over all clouds since the last call, on every process; None without a router.

        Args:
            idle: whether the clouds of this process are copies of another process's and do not count.
        """
        if not self.logits:
            return None
        weights = torch.cat(self.logits).float().softmax(-1)  # (B, E)
        self.logits.clear()
        used = torch.zeros_like(weights).scatter_(1, weights.topk(self.num_used).indices, 1.0)
        sums = torch.cat(
            [used.sum(0), weights.sum(0), _entropy(weights).sum()[None], weights.new_tensor([len(weights)])]
        )
        *sums, count = accelerator.reduce(sums * (not idle)).tolist()
        means = [value / count for value in sums]
        experts = weights.shape[1]
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
    one_row = takes_one_row(inner)
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
        samples = [encode_sample(processor, *sources[name].read(*address), stage) for name, *address in chosen]
        tokens = sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)
        inputs = {name: tensor.to(accelerator.device) for name, tensor in pack_batch(samples, one_row).items()}
        loss = model(**inputs, use_cache=False, num_items_in_batch=torch.tensor(tokens)).loss
        if assigned[first : first + batch]:
            total += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64, device=accelerator.device)
    set_training_mode(inner)
    loss, tokens = accelerator.reduce(total).tolist()
    return loss / max(tokens, 1)
