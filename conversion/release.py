"""What a conversion is made of: the authors' release, or a training stage's result, with every tensor accounted for.

From names, shapes and dtypes alone, before anything is written (`write` does that). Paper: figure 2 for the parts, §3.3
for the stages that the files come from.
"""

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoTokenizer

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.files import sha256
from minigpt3d.hub import ADAPTER_FILE, find_model
from minigpt3d.modeling_minigpt3d import PointProjection, QueryExpertRouter
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor, prepare_tokenizer

from .checkpoints import Checkpoint
from .lora import lora_modules, lora_scale, peft_scale, read_lora_config
from .names import FILES, ZEROS, File
from .state_dict import Account, Reader, account, authors_name, expected_shapes, is_ignored, our_name


PEFT_PREFIX = "base_model.model."  # of the names in an adapter's file


@dataclass
class Source:
    """One input: what it should hold, where it lies, and where it was downloaded from."""

    file: File
    checkpoint: Checkpoint
    origin: str = "local"  # or Hub id @ revision, or address
    to_key: Callable[[str], str] = field(default=lambda key: key)  # name in the account → key in the checkpoint
    to_name: Callable[[str], str] = field(default=lambda key: key)  # and back
    scales: dict[str, float] = field(
        default_factory=dict
    )  # of LoRA products by module, where they are not the authors'

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.to_name(key): shape for key, shape in self.checkpoint.shapes.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {self.to_name(key): dtype for key, dtype in self.checkpoint.dtypes.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self.to_key(name))


def release_sources(paths: dict[str, Path], origins: dict[str, str] | None = None) -> list[Source]:
    """The authors' files, by slot.

    Raises:
        ValueError, FileNotFoundError: a slot is empty that may not be; a file cannot be read (see `Checkpoint`).
    """
    absent = [file.slot for file in FILES[:4] if file.slot not in paths]
    if "stage4" in paths and "stage3" not in paths:
        absent.append("stage3")
    if absent:
        options = ", ".join(f"--{slot.replace('_', '-')}" for slot in absent)
        raise ValueError(f"files are missing: give {options}. (Stages 3 and 4 may be left out together, or 4 alone.)")
    return [
        Source(file, Checkpoint(paths[file.slot], file.container), (origins or {}).get(file.slot, "local"))
        for file in FILES
        if file.slot in paths
    ]


def stage_sources(folder: Path) -> tuple[list[Source], MiniGPT3DConfig, list[str]]:
    """What a run of `training/` left behind: a base model with an adapter on it, or one whole model.

    Returns:
        The files, the configuration of what they make, and the modules that have LoRA factors.

    Raises:
        ValueError, FileNotFoundError: no result of a stage, or as `Checkpoint`.
        ImportError: peft is not installed.
    """
    files = find_model(folder)
    base, adapter = Path(files.base), files.adapter
    if not base.is_dir():
        base = Path(snapshot_download(files.base, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    renamed = {"to_key": lambda name: our_name(name) or name, "to_name": lambda key: authors_name(key) or key}
    sources = [Source(File("model", "a whole model", gives=(r"(?!.*lora_).*",)), Checkpoint(base), **renamed)]
    config = MiniGPT3DConfig.from_pretrained(base)
    if adapter is None:
        return sources, config, []
    peft_config, checkpoint = read_lora_config(adapter), Checkpoint(adapter / ADAPTER_FILE)
    names = {key: key.removeprefix(PEFT_PREFIX) for key in checkpoint.shapes}
    modules = [name.removesuffix(".lora_A.weight") for name in names.values() if name.endswith(".lora_A.weight")]
    # What the stages have trained supersedes the base's; every LoRA module has both of its factors.
    file = File("adapter", "a PEFT adapter", gives=(r".*\.lora_[AB]\.weight",), may_give=(r".*",))
    renamed = {
        "to_key": lambda name: PEFT_PREFIX + (our_name(name) or name),
        "to_name": lambda key: authors_name(names[key]) or names[key],
    }
    scales = {module: peft_scale(peft_config, module) for module in modules}
    sources.append(Source(file, checkpoint, **renamed, scales=scales))
    config.router_type = (files.stage or {}).get("router_type", config.router_type)
    if not isinstance(peft_config.target_modules, str):  # names, of which none may be missing
        modules = sorted(f"model.{name}" for name in peft_config.target_modules)
    return sources, config, modules


# ---- Planning -------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """A conversion whose every tensor is accounted for and whose shapes fit."""

    sources: list[Source]
    config: MiniGPT3DConfig
    processor: MiniGPT3DProcessor
    accounted: Account
    expected: dict[str, torch.Size]
    idle_patterns: list[str]  # of --ignore, that no key needed

    def reader(self) -> Reader:
        by_slot = {source.file.slot: source for source in self.sources}
        linear = _fresh_linear_layers(self.config)

        def fresh(name: str) -> torch.Tensor:
            return linear[name] if name in linear else read("model.query_experts.0.weight")

        read_key = lambda slot, key: by_slot[slot].read(key)  # noqa: E731
        read = Reader(self.accounted, self.config, self.expected, read_key, fresh, self.scale)
        return read

    def scale(self, module: str, rank: int) -> float:
        """Factor of a module's LoRA product."""
        known = self.sources[-1].scales
        return known[module] if known else lora_scale(module, rank)

    def release(self):
        for source in self.sources:
            source.checkpoint.release()


def make_plan(
    sources: list[Source],
    config: MiniGPT3DConfig,
    processor: MiniGPT3DProcessor,
    router_type: str | None = None,
    ignore: Iterable[str] = (),
    lora: Iterable[str] = (),
) -> Plan:
    """Account for all tensors; nothing is written.

    Args:
        lora: modules that have LoRA factors; the authors' files have them where the stages train them.
        router_type: of the result; by default "sparse" where the experts are trained, "none" before.

    Raises:
        ValueError: see `account`; or experts are asked for that no file has trained.
    """
    by_slot = {source.file.slot: source for source in sources}
    of_release = "phi" in by_slot
    if of_release and "stage4" not in by_slot:
        if router_type not in (None, "none"):
            raise ValueError(f"--router {router_type} needs the experts that stage IV trains: give --stage4 too.")
        router_type = "none"
    if not of_release and config.router_type == "none" and router_type not in (None, "none"):
        raise ValueError(
            f"--router {router_type} needs the experts that stage IV trains; this result is of a stage before."
        )
    config.router_type = router_type or config.router_type
    config.point_token_id = processor.point_token_id
    expected = expected_shapes(config)
    # Before the stage that first trains it, a part is in no file.
    new = () if not of_release or "stage4" in by_slot else ("model.router.", "model.query_experts.")
    new += () if not of_release or "stage3" in by_slot else ("model.point_projection.",)
    accounted = account(
        {source.file: source.shapes for source in sources},
        expected,
        lora_modules(config, expected) if of_release else lora,
        lambda name: name.startswith(new),
        ignore,
        lambda slot, key, original: torch.equal(by_slot[slot].read(key), by_slot[slot].read(original)),
        {slot: source.dtypes for slot, source in by_slot.items()},
    )
    idle = [pattern for pattern in ignore if not any(is_ignored([pattern], *each) for each in accounted.ignored)]
    plan = Plan(sources, config, processor, accounted, expected, idle)
    plan.release()
    return plan


def _fresh_linear_layers(config: MiniGPT3DConfig) -> dict[str, torch.Tensor]:
    """First weights of what training has yet to learn: PyTorch's own for linear layers, as the authors have them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = {"model.point_projection": PointProjection(config), "model.router": QueryExpertRouter(config)}
    return {f"{part}.{name}": p.detach() for part, module in modules.items() for name, p in module.named_parameters()}


def load_processor(phi_dir: Path, config: MiniGPT3DConfig) -> MiniGPT3DProcessor:
    """The processor around Phi's tokenizer.

    Raises:
        ValueError: the folder has no tokenizer, or its configuration is of another model.
    """
    if not phi_dir.is_dir():
        raise ValueError(f"{phi_dir}: no such folder; --phi is Phi-2's, with its weights, config.json and tokenizer.")
    _check_phi(phi_dir, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(phi_dir, local_files_only=True)
    except Exception as error:  # what is missing shows in as many ways as there are tokenizers
        raise ValueError(
            f"{phi_dir}: no tokenizer can be loaded ({' '.join(str(error).split())[:150]}). The folder needs Phi-2's "
            "tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json beside its weights."
        ) from error
    feature_extractor = MiniGPT3DPointCloudProcessor()
    return MiniGPT3DProcessor(
        feature_extractor, prepare_tokenizer(tokenizer), num_query_tokens=config.num_query_tokens
    )


def _check_phi(phi_dir: Path, config: MiniGPT3DConfig):
    """What shapes do not show: head count, rotary share and epsilons in Phi's own configuration."""
    path = phi_dir / "config.json"
    if not path.exists():
        return
    try:
        theirs = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a configuration ({error}). Download it again.") from error
    ours = config.text_config.to_dict()
    ours |= ours.get("rope_parameters") or {}
    theirs |= theirs.get("rope_parameters") or {}
    for key in ("num_attention_heads", "partial_rotary_factor", "rope_theta", "layer_norm_eps", "hidden_act"):
        if key in theirs and theirs[key] != ours[key]:
            raise ValueError(f"{path}: {key} is {theirs[key]!r}, the configuration says {ours[key]!r}. Is it Phi-2?")


# ---- What was found -------------------------------------------------------------------------------------------------


def summary(plan: Plan) -> str:
    """Which file gave what, as a table and a few lines."""
    accounted = plan.accounted
    used, superseded = Counter(), Counter()
    for origin in accounted.origins.values():
        used[origin.file] += len(origin.keys)
    by = Counter()
    for origin, name in accounted.superseded:
        superseded[origin.file] += len(origin.keys)
        by[origin.file, accounted.origins[name].file] += len(origin.keys)
    rows = [("file", "tensors", "used", "superseded", "alias", "left over", "ignored")]
    for source in plan.sources:
        slot = source.file.slot
        keys = {key for key in source.shapes}
        counts = [
            len(keys),
            used[slot],
            superseded[slot],
            sum(file == slot for file, *_ in accounted.aliases),
            sum(file == slot for file, *_ in accounted.leftovers),
            sum(file == slot and key in keys for file, key in accounted.ignored),
        ]
        if counts[0] != sum(counts[1:]):
            raise AssertionError(f"{slot}: {counts[0]} tensors, but {sum(counts[1:])} are accounted for")
        rows.append((slot, *map(str, counts)))
    lines = [f"{row[0]:<16}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]
    lines += [f"{count} of {old} are superseded by {new}" for (old, new), count in sorted(by.items())]
    reasons = Counter((file, reason) for file, _, reason in accounted.leftovers)
    lines += [f"{count} of {file} are left over: {reason}" for (file, reason), count in sorted(reasons.items())]
    for source in plan.sources:
        lines += [
            f"{source.file.slot} also has the {why}: not used" for why in source.checkpoint.trainer_state.values()
        ]
    lines += [f"{file}: {key}: ignored, as asked" for file, key in accounted.ignored]
    lines += [f"--ignore {pattern}: no key needed it" for pattern in plan.idle_patterns]
    if accounted.zeros:
        lines.append(f"{len(accounted.zeros)} parameters are in no file and zero: {next(iter(ZEROS.values()))}")
    if accounted.new:
        parts = sorted({name.split(".")[1] for name in accounted.new})
        lines.append(f"{len(accounted.new)} parameters are in no file and new, for training: {', '.join(parts)}")
    model = sum(name in plan.expected for name in accounted.origins) + len(accounted.zeros) + len(accounted.new)
    lines.append(f"{model} tensors of the model, each from one place; {len(accounted.lora)} LoRA factors")
    return "\n".join(lines)


def provenance(plan: Plan, command: list[str], settings: dict) -> dict:
    """Where everything comes from, for people who want to repeat it; of paths the last part only."""
    files = {}
    for source in tqdm(plan.sources, desc="sha256", unit="file", disable=None):
        paths = source.checkpoint.files
        files[source.file.slot] = {
            "source": source.origin,
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths},
        }
    accounted = plan.accounted
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["minigpt3d", *(Path(word).name if "/" in word else word for word in command)],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("minigpt3d", "torch", "transformers", "safetensors")},
        **settings,
        "files": files,
        "summary": summary(plan).splitlines(),
        "ignored": [f"{file}: {key}" for file, key in accounted.ignored],
        "zero": accounted.zeros,
        "new": accounted.new,
        "origins": {name: str(origin) for name, origin in accounted.origins.items()},
    }
