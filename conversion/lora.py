"""LoRA of MiniGPT-3D: which modules have factors, how their products are scaled, and the files of a PEFT adapter."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.files import write_json
from minigpt3d.hub import ADAPTER_FILE, STAGE_FILE, portable_name


LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


# ---- Modules --------------------------------------------------------------------------------------------------------

# The Q-Former's self- and cross-attention, and the language model's attention by its family.
QFORMER_LORA_TARGETS = r"model\.qformer\..*\.(query|key|value)"
_SPLIT_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LANGUAGE_LORA_TARGETS = {
    "minigpt3d_phi": ("query_key_value", "dense"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
    "phi3": ("qkv_proj", "o_proj"),
    "gpt_neox": ("query_key_value", "dense"),
    "llama": _SPLIT_ATTENTION,
    "mistral": _SPLIT_ATTENTION,
    "qwen2": _SPLIT_ATTENTION,
    "qwen3": _SPLIT_ATTENTION,
    "smollm3": _SPLIT_ATTENTION,
}


def lora_targets(language_model_type: str) -> str:
    """Pattern of the modules that get LoRA factors, for a language model of this `model_type`.

    Raises:
        ValueError: the family has no row in `LANGUAGE_LORA_TARGETS`.
    """
    if language_model_type not in LANGUAGE_LORA_TARGETS:
        raise ValueError(
            f"No LoRA targets are known for a language model of type {language_model_type!r}; known: "
            f"{', '.join(LANGUAGE_LORA_TARGETS)}. Add the names of its attention's linear layers to "
            "LANGUAGE_LORA_TARGETS in conversion/lora.py."
        )
    attention = "|".join(LANGUAGE_LORA_TARGETS[language_model_type])
    return rf"{QFORMER_LORA_TARGETS}|model\.language_model\..*\.({attention})"


def lora_modules(config: MiniGPT3DConfig, parameters: Iterable[str]) -> list[str]:
    """The modules to which the stages add LoRA factors, by our names."""
    pattern = re.compile(lora_targets(config.text_config.model_type))
    modules = (name.removesuffix(".weight") for name in parameters if name.endswith(".weight"))
    return [module for module in modules if pattern.fullmatch(module)]


# ---- Scale ----------------------------------------------------------------------------------------------------------

# The Q-Former's alpha is 2r in the authors' code, whatever their YAML says; the language model's is 16.
LORA_ALPHA = {"model.qformer": lambda rank: 2 * rank, "model.language_model": lambda rank: 16}


def lora_scale(module: str, rank: int) -> float:
    """alpha / r of a module in the authors' code, by our name."""
    return next(alpha(rank) for part, alpha in LORA_ALPHA.items() if module.startswith(part)) / rank


def peft_scale(config, module: str) -> float:
    """alpha / r of a module, by our name, in an adapter with this `peft.LoraConfig`."""
    get_pattern_key, short = import_peft().utils.other.get_pattern_key, module.removeprefix("model.")
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, short), config.r)
    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, short), config.lora_alpha) / rank


# ---- PEFT's files ---------------------------------------------------------------------------------------------------

PEFT_PREFIX = "base_model.model."  # of the names in an adapter's file
# PEFT has one dropout for all modules; training sets the Q-Former's, 0.1, itself.
LANGUAGE_LORA_DROPOUT = 0.05


def merge_lora_factors(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + alpha/r · B A, in float32."""
    return weight.float() + scale * (lora_b.float() @ lora_a.float())


def lora_config(
    converted: dict[str, torch.Tensor] | dict[str, torch.Size],
    scale: Callable[[str, int], float] = lora_scale,
    **options,
):
    """The PEFT configuration for the LoRA matrices in an unmerged state dict; ranks are read off the shapes.

    Args:
        converted: our names → tensors or shapes.
        scale: (module, rank) → factor of its LoRA product; by default the authors'.
        **options: further fields of `peft.LoraConfig`.

    Raises:
        ValueError: there are no LoRA matrices.
        ImportError: peft is not installed.
    """
    LoraConfig = import_peft().LoraConfig
    ranks = {}
    for name, value in converted.items():
        if (match := LORA_KEY.fullmatch(name)) and match["matrix"] == "A":
            ranks[match["module"]] = getattr(value, "shape", value)[0]
    if not ranks:
        raise ValueError("no lora_A matrices among the tensors. Convert with merge_lora=False to keep them.")
    alphas = {module: round(scale(module, rank) * rank) for module, rank in ranks.items()}
    (rank, alpha), _ = Counter((ranks[module], alphas[module]) for module in ranks).most_common(1)[0]
    # PEFT compares ends of names. Without "model." they fit the model with its head and the one without.
    short = {module: module.removeprefix("model.") for module in ranks}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=LANGUAGE_LORA_DROPOUT,
        target_modules=sorted(short.values()),
        rank_pattern={re.escape(short[module]): r for module, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(short[module]): a for module, a in alphas.items() if a != alpha},
        **options,
    )


def write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    scale: Callable[[str, int], float],
    base: str | Path,
    stage: dict | None = None,
):
    """Write a PEFT adapter in float32: LoRA factors, and all parameters of every module that is trained without LoRA.

    Args:
        tensors: our names → tensors on the CPU.
        scale: (module, rank) → factor of its LoRA product.
        base: folder or Hub id of the model that the adapter is for.
        stage: for stage.json, if a stage made the adapter.
    """
    factors = {name: tensor for name, tensor in tensors.items() if LORA_KEY.fullmatch(name)}
    modules = sorted({name.rpartition(".")[0] for name in tensors.keys() - factors.keys()})
    options = {
        # Without "model.", as for the LoRA targets (see `lora_config`).
        "modules_to_save": [module.removeprefix("model.") for module in modules],
        "base_model_name_or_path": portable_name(base),
        "inference_mode": True,
    }
    peft = import_peft()
    no_targets = peft.utils.constants.DUMMY_TARGET_MODULES
    config = (
        lora_config(factors, scale, **options) if factors else peft.LoraConfig(target_modules=no_targets, **options)
    )
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    contents = {f"{PEFT_PREFIX}{name}": tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(contents, folder / ADAPTER_FILE, metadata={"format": "pt"})
    if stage is not None:
        write_json(folder / STAGE_FILE, stage)


def read_lora_config(adapter: Path):
    """The `peft.LoraConfig` of an adapter's folder.

    Raises:
        ValueError: the folder has none, or the adapter is no LoRA.
        ImportError: peft is not installed.
    """
    peft = import_peft()
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{adapter}: adapter_config.json cannot be read ({error}).") from error
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"{adapter}: expected a LoRA adapter, got {config.peft_type}.")
    return config


def import_peft():
    """
    Raises:
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA adapters need peft: pip install 'minigpt3d[train]'") from error
    return peft
