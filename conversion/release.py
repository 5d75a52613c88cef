"""The authors' release, or a training stage's result, as one Hub folder: `minigpt3d convert`.

First everything is accounted for from names and shapes alone; then tensors stream through one at a time, into shards
that are written as they fill. Paper: figure 2 for the parts, §3.3 for the stages that the files come from.
"""

import json
import platform
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer

from minigpt3d import HUB_ID
from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration, PointProjection, QueryExpertRouter
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor, prepare_tokenizer
from minigpt3d.training.stages import STAGE_3, STAGE_4

from .checkpoints import Checkpoint, sha256
from .hub_folder import check_folder, write_all_but_weights, written_whole
from .state_dict import (
    Account,
    Reader,
    account,
    authors_name,
    check_aliases,
    expected_shapes,
    lora_config,
    lora_modules,
    our_name,
)
from .tables import FILES, ZEROS, File


SHARD_SIZE = 2 * 10**9  # bytes; a shard is built in memory, so it is much of what a conversion needs
PROVENANCE_FILE = "provenance.json"
ADAPTER_DIR, BASE_DIR = "adapter", "base"
_CARD = Path(__file__).with_name("model_card.jinja")


@dataclass
class Source:
    """One input: what it should hold, where it lies, and where it was downloaded from."""

    file: File
    checkpoint: Checkpoint
    origin: str = "local"  # or Hub id @ revision, or address
    to_key: Callable[[str], str] = field(default=lambda key: key)  # name in the account → key in the checkpoint
    to_name: Callable[[str], str] = field(default=lambda key: key)  # and back

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.to_name(key): shape for key, shape in self.checkpoint.shapes.items()}

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


def stage_sources(folder: Path) -> list[Source]:
    """What `training/stage*.py` left behind: the model, and its LoRA factors beside the weights without them.

    Raises:
        ValueError, FileNotFoundError: as `Checkpoint`.
    """
    renamed = {"to_key": our_name, "to_name": authors_name}
    model = File("model", "a stage's result", gives=(r"(?!.*lora_).*",))
    sources = [Source(model, Checkpoint(folder), **renamed)]
    lora = folder / "training_state" / "lora.safetensors"
    if lora.exists():
        sources.append(Source(File("lora", "its LoRA", gives=(), may_give=(r".*",)), Checkpoint(lora), **renamed))
    return sources


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

        read = Reader(self.accounted, self.config, self.expected, lambda slot, key: by_slot[slot].read(key), fresh)
        return read

    def release(self):
        for source in self.sources:
            source.checkpoint.release()


def make_plan(
    sources: list[Source],
    config: MiniGPT3DConfig,
    processor: MiniGPT3DProcessor,
    router_type: str | None = None,
    ignore: Iterable[str] = (),
) -> Plan:
    """Account for all tensors; nothing is written.

    Args:
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
    config.router_type = router_type or config.router_type
    config.point_token_id = processor.point_token_id
    expected = expected_shapes(config)
    # Before the stage that first trains it, a part is in no file.
    new = () if not of_release or "stage4" in by_slot else ("model.router.", "model.query_experts.")
    new += () if not of_release or "stage3" in by_slot else ("model.point_projection.",)
    accounted = account(
        {source.file: source.shapes for source in sources},
        expected,
        lora_modules(config, expected) if of_release else (),
        lambda name: name.startswith(new),
        ignore,
    )
    check_aliases(accounted, lambda slot, key: by_slot[slot].read(key))
    idle = [pattern for pattern in ignore if not any(fnmatchcase(key, pattern) for _, key in accounted.ignored)]
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(phi_dir, local_files_only=True)
    except Exception as error:  # what is missing shows in as many ways as there are tokenizers
        raise ValueError(
            f"{phi_dir}: no tokenizer can be loaded ({' '.join(str(error).split())[:150]}). The folder needs Phi-2's "
            "tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json beside its weights."
        ) from error
    _check_phi(phi_dir, config)
    feature_extractor = MiniGPT3DPointCloudProcessor()
    return MiniGPT3DProcessor(
        feature_extractor, prepare_tokenizer(tokenizer), num_query_tokens=config.num_query_tokens
    )


def _check_phi(phi_dir: Path, config: MiniGPT3DConfig):
    """What shapes do not show: head count, rotary share and epsilons in Phi's own configuration."""
    path = phi_dir / "config.json"
    if not path.exists():
        return
    theirs, ours = json.loads(path.read_text(encoding="utf-8")), config.text_config.to_dict()
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


def provenance(plan: Plan, settings: dict) -> dict:
    """Where everything comes from, for people who want to repeat it."""
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
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("minigpt3d", "torch", "transformers", "safetensors")},
        **settings,
        "files": files,
        "ignored": [f"{file}: {key}" for file, key in accounted.ignored],
        "zero": accounted.zeros,
        "new": accounted.new,
        "origins": {name: str(origin) for name, origin in accounted.origins.items()},
    }


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_release(
    plan: Plan,
    output_dir: Path,
    dtype: torch.dtype,
    lora: str = "merge",
    before_rename: Callable[[Path], None] = lambda folder: None,
):
    """Write the folder, whole or not at all.

    Args:
        plan: from `make_plan`.
        output_dir: a new folder, or a model's, which is replaced.
        dtype: of the weights; an adapter's are float32.
        lora: "merge" adds the products to their weights; "keep" writes `base/` and a PEFT `adapter/`.
        before_rename: called with the finished folder (`base/` of it) while it still has its temporary name.

    Raises:
        ValueError: there is no LoRA to keep, or a value does not fit the dtype.
        OSError: the disk is full, or will be.
    """
    output_dir = check_folder(output_dir)
    if lora == "keep" and not plan.accounted.lora:
        raise ValueError("--lora keep: there are no LoRA factors in these files. Use --lora merge.")
    _check_space(plan, output_dir, dtype)
    adapter_config = make_adapter_config(plan, output_dir / BASE_DIR) if lora == "keep" else None
    settings = {"dtype": str(dtype).removeprefix("torch."), "lora": lora, "router_type": plan.config.router_type}
    record = provenance(plan, settings)
    with written_whole(output_dir) as partial:
        folder = partial / BASE_DIR if lora == "keep" else partial
        folder.mkdir(exist_ok=True)
        plan.config.dtype = dtype
        with torch.device("meta"):
            model = MiniGPT3DForConditionalGeneration(plan.config)
        write_all_but_weights(folder, model, plan.processor)
        plan.config.architectures = [type(model).__name__]
        plan.config.save_pretrained(folder)
        _write_card(folder, plan, record)
        (folder / PROVENANCE_FILE).write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        write_weights(folder, plan, dtype, merge_lora=lora == "merge")
        if lora == "keep":
            write_adapter(partial / ADAPTER_DIR, plan, adapter_config)
        before_rename(folder)


def _check_space(plan: Plan, output_dir: Path, dtype: torch.dtype):
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(shape.numel() for shape in plan.expected.values()) * dtype.itemsize
    free = shutil.disk_usage(output_dir.parent).free
    if needed > free:
        raise OSError(
            f"{output_dir.parent} has {free / 1e9:.1f} GB free, the model needs {needed / 1e9:.1f} GB. Free some space, "
            "or give --out on another disk."
        )


def write_weights(folder: Path, plan: Plan, dtype: torch.dtype, merge_lora: bool):
    """`model.safetensors`, or shards and their index, in at most a shard's memory."""
    read = plan.reader()
    with torch.device("meta"):
        shapes = {
            name: torch.empty(shape, dtype=torch.int64 if name.endswith("num_batches_tracked") else dtype)
            for name, shape in plan.expected.items()
        }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_SIZE)
    with tqdm(total=len(shapes), desc="weights", unit="tensor", disable=None) as progress:
        for filename, names in split.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensors[name] = _cast(read(name, merge_lora), dtype, name)
                progress.update()
            save_file(tensors, folder / filename, metadata={"format": "pt"})
            tensors.clear()
            plan.release()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A copy in the dtype on disk.

    Raises:
        ValueError: a value is not finite, or not in this dtype.
    """
    if not tensor.is_floating_point():
        return tensor.clone()
    cast = tensor.to(dtype, copy=True).contiguous()
    if not cast.isfinite().all():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite. Its file is damaged; download it again.")
        largest = tensor.abs().max().item()
        raise ValueError(f"{name} holds {largest:.3g}, too large for {dtype}. Use --dtype bfloat16 or float32.")
    return cast


def make_adapter_config(plan: Plan, base: Path):
    """The PEFT configuration: LoRA as in the files, and whole every module of which the stages train a parameter.

    Raises:
        ImportError: peft is not installed.
    """
    read, patterns = plan.reader(), (*STAGE_3.trainable, *STAGE_4.trainable)
    trained = [name for name in plan.expected if any(re.fullmatch(pattern, name) for pattern in patterns)]
    modules = sorted({name.rpartition(".")[0] for name in trained})
    shapes = {name: read(name).shape for name in plan.accounted.lora}
    return lora_config(shapes, modules_to_save=modules, base_model_name_or_path=str(base), inference_mode=True)


def write_adapter(folder: Path, plan: Plan, adapter_config):
    """A PEFT adapter: LoRA factors, and beside them the modules that the stages train, in float32."""
    read, modules = plan.reader(), set(adapter_config.modules_to_save)
    names = [*plan.accounted.lora, *(name for name in plan.expected if name.rpartition(".")[0] in modules)]
    tensors = {f"base_model.model.{name}": _cast(read(name), torch.float32, name) for name in names}
    folder.mkdir()
    adapter_config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plan.release()


def _write_card(folder: Path, plan: Plan, record: dict):
    of_release = "phi" in record["files"]
    data = ModelCardData(
        license="cc-by-nc-sa-4.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model="microsoft/phi-2" if of_release else None,
        tags=["point-cloud", "3d", "minigpt3d", "arxiv:2405.01413"],
    )
    trained = of_release and "stage4" in record["files"]
    card = ModelCard.from_template(
        data,
        template_path=str(_CARD),
        model_id=HUB_ID,
        of_release=of_release,
        trained=trained,
        parameters=f"{sum(shape.numel() for shape in plan.expected.values()):,}",
        record=record,
        summary=summary(plan),
    )
    card.save(folder / "README.md")
