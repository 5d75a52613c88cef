"""The authors' state dicts as ours: tensors renamed, reshaped, and with their LoRA products merged if asked for; and back."""

from collections.abc import Callable

import torch

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.point_bert_minigpt3d import FOLDED_LAYERS, fold_batch_norm, folded_names, unfolded_names

from .accounting import Account, account, converted_shape
from .lora import lora_scale, merge_lora_factors
from .names import MINI_POINTNET, File, authors_name


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], config: MiniGPT3DConfig, merge_lora: bool = True, part: str = ""
) -> dict[str, torch.Tensor]:
    """The authors' state dict as ours.

    Args:
        state_dict: the authors' names; LoRA matrices as PEFT wrote them, in its old or new spelling.
        config: the model that the result is for.
        merge_lora: add the LoRA products to their weights; otherwise they stay, as `….lora_A.weight` and
            `….lora_B.weight` under our names, for the adapter of `lora_config`.
        part: the beginning of our names, such as "model.qformer", if the file holds only this part of the model.

    Returns:
        The complete state dict of `MiniGPT3DForConditionalGeneration`, or of its `part`, in the dtypes of the input.

    Raises:
        ValueError: unknown keys, missing keys, LoRA halves, unequal aliases or wrong shapes, all in one message.
    """
    expected = expected_shapes(config, part)
    if not expected:
        raise ValueError(f"`part` must be the beginning of our names, such as 'model.qformer', got {part!r}.")
    file = File("state dict", "a state dict", gives=(r"(?!.*lora_).*",), may_give=(r".*",))
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    are_equal = lambda slot, key, first: torch.equal(state_dict[key], state_dict[first])  # noqa: E731
    accounted = account({file: shapes}, expected, are_equal=are_equal)
    reader = Reader(accounted, config, expected, lambda slot, key: state_dict[key])
    names = [*expected, *([] if merge_lora else accounted.lora)]
    result = {name: reader(name, merge_lora) for name in names}
    for name in result.keys() & accounted.origins.keys():  # merged weights are float32
        result[name] = result[name].to(state_dict[accounted.origins[name].keys[0]].dtype)
    return result


def expected_shapes(config: MiniGPT3DConfig, part: str = "") -> dict[str, torch.Size]:
    """Names and shapes in a model's files, or of its part whose names begin so; tied weights count once."""
    with torch.device("meta"):
        model = MiniGPT3DForConditionalGeneration(config)
    tied = model.all_tied_weights_keys
    return {name: t.shape for name, t in model.state_dict().items() if name.startswith(part) and name not in tied}


class Reader:
    """Tensors of the model by our names, read one at a time from where the account says.

    Args:
        accounted: of the files.
        config: of the model.
        expected: our names and shapes.
        read: (file's slot, key) → tensor.
        make_new: our name → initial value of a parameter that is new.
        scale: (module, rank) → factor of its LoRA product.
    """

    def __init__(
        self,
        accounted: Account,
        config: MiniGPT3DConfig,
        expected: dict[str, torch.Size],
        read: Callable[[str, str], torch.Tensor],
        make_new: Callable[[str], torch.Tensor] | None = None,
        scale: Callable[[str, int], float] = lora_scale,
    ):
        self.accounted, self.config, self.expected, self.make_new = accounted, config, expected, make_new
        self.read, self.scale = read, scale
        self.lora = set(accounted.lora)

    def __call__(self, name: str, merge_lora: bool = False) -> torch.Tensor:
        """The parameter. With `merge_lora`, its LoRA product is added if it has one; the sum is float32."""
        origin = self.accounted.origins.get(name)
        if origin is None:
            return torch.zeros(self.expected[name]) if name in self.accounted.zeros else self.make_new(name)
        tensor = convert_tensor([self.read(origin.file, key) for key in origin.keys], name, self.config)
        module = name.removesuffix(".weight")
        if merge_lora and f"{module}.lora_A.weight" in self.lora:
            lora_a, lora_b = self(f"{module}.lora_A.weight"), self(f"{module}.lora_B.weight")
            tensor = merge_lora_factors(tensor, lora_a, lora_b, self.scale(module, len(lora_a)))
        return tensor


def convert_tensor(tensors: list[torch.Tensor], name: str, config: MiniGPT3DConfig) -> torch.Tensor:
    """One tensor of ours from the authors' tensor, or from its parts in their file.

    1×1 convolutions become linear layers with their BatchNorm folded in (float32), query tokens lose their batch
    dimension, and q, k and v of shape (D, ...) become (3*D, ...), laid out as (heads, 3, head_dim) like TinyGPT-V's.
    """
    if len(tensors) == 1:
        return tensors[0].reshape(converted_shape([tuple(tensors[0].shape)], name))
    for layers in FOLDED_LAYERS.values():
        if (leaf := name.removeprefix(f"{MINI_POINTNET}.")) in folded_names(layers):
            weight, *vectors = (tensor.float() for tensor in tensors)
            return fold_batch_norm([weight.reshape(weight.shape[:2]), *vectors], layers)[leaf]
    parts = [part.unflatten(0, (config.text_config.num_attention_heads, -1)) for part in tensors]
    return torch.stack(parts, dim=1).flatten(0, 2)


def authors_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict by the authors' names and shapes, for their code: the inverse of `convert_state_dict`.

    What was folded into the linear layers of the mini-PointNet stays there: the BatchNorms behind them change nothing.

    Args:
        state_dict: of `MiniGPT3DForConditionalGeneration`; LoRA factors as `….lora_A.weight`.
    """
    result = {}
    for name, tensor in (state_dict | _unfold(state_dict)).items():
        if name.startswith(f"{MINI_POINTNET}.linear_") and tensor.ndim == 2:
            tensor = tensor[..., None]
        elif name.startswith("model.query_experts."):
            tensor = tensor[None]
        if (key := authors_name(name)) is not None:
            result[key] = tensor
    return result


def _unfold(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear layers with BatchNorms behind them that change nothing, from the layers of `MiniPointNet`."""
    result = {}
    for old, new in FOLDED_LAYERS.items():
        weight, bias, *rest = (state_dict[f"{MINI_POINTNET}.{name}"] for name in folded_names(new))
        one, zero = torch.ones_like(bias), torch.zeros_like(bias)
        tensors = (torch.cat([weight, *rest], dim=1), bias, one, zero, zero, one - 1e-5)
        names = (f"{MINI_POINTNET}.{name}" for name in unfolded_names(old))
        result |= dict(zip(names, tensors, strict=False))
        result |= {f"{MINI_POINTNET}.{norm}.num_batches_tracked": torch.tensor(0) for norm in old[1:]}
    return result
