"""Plan a conversion of the authors' release or of a training stage's result, with every tensor accounted for.

A plan needs names, shapes and dtypes only; nothing is written (`write` does that). Paper: figure 2 for the parts, §3.3 for
the stages that the files come from.
"""

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
from minigpt3d.files import read_json, sha256
from minigpt3d.hub import ADAPTER_CONFIG, ADAPTER_FILE, CONFIG_FILE, find_model
from minigpt3d.messages import one_line, public_word
from minigpt3d.modeling_minigpt3d import LanguageProjection, PointProjection, QueryExpertRouter
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor, prepare_tokenizer

from .accounting import Account, account, is_ignored
from .checkpoints import Checkpoint
from .lora import PEFT_PREFIX, lora_modules, lora_scale, peft_scale, read_lora_config
from .names import FILES, ZEROS, File, authors_name, our_name
from .state_dict import Reader, expected_shapes


# ---- Sources --------------------------------------------------------------------------------------------------------


@dataclass
class WeightSource:
    """One input of a conversion.

    Args:
        file: what it should hold.
        checkpoint: its tensors.
        origin: where it was downloaded from: Hub id @ revision, or an address; "local" otherwise.
        to_key: name in the account → key in the checkpoint.
        to_name: key in the checkpoint → name in the account.
        scales: factors of LoRA products by module, if they are not the authors'.
    """

    file: File
    checkpoint: Checkpoint
    origin: str = "local"
    to_key: Callable[[str], str] = field(default=lambda name: name)
    to_name: Callable[[str], str] = field(default=lambda key: key)
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.to_name(key): shape for key, shape in self.checkpoint.shapes.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {self.to_name(key): dtype for key, dtype in self.checkpoint.dtypes.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self.to_key(name))


def release_sources(paths: dict[str, Path], origins: dict[str, str] | None = None) -> list[WeightSource]:
    """The authors' files as sources.

    Args:
        paths: by slot.
        origins: where they were downloaded from, by slot.

    Raises:
        ValueError, FileNotFoundError: a required slot is missing; a file cannot be read (see `Checkpoint`).
    """
    absent = [file.slot for file in FILES[:4] if file.slot not in paths]
    if "stage4" in paths and "stage3" not in paths:
        absent.append("stage3")
    if absent:
        arguments = ", ".join(f"`{slot}`" for slot in absent)
        raise ValueError(
            f"files are missing: give {arguments}. (Stages 3 and 4 may be left out together, or 4 alone.)"
        )
    return [
        WeightSource(file, Checkpoint(paths[file.slot], file.container), (origins or {}).get(file.slot, "local"))
        for file in FILES
        if file.slot in paths
    ]


def stage_sources(folder: Path) -> tuple[list[WeightSource], MiniGPT3DConfig, list[str]]:
    """The result of a training stage as sources: a base model with an adapter, or one complete model.

    Returns:
        The sources, the configuration of the model, and the modules that have LoRA factors.

    Raises:
        ValueError, FileNotFoundError: this is no result of a stage; or as `Checkpoint`.
        ImportError: peft is not installed.
    """
    files = find_model(folder)
    base = Path(files.base)
    if not base.is_dir():
        base = Path(snapshot_download(files.base, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    file = File("model", "a complete model", gives=(r"(?!.*lora_).*",))
    to_key, to_name = lambda name: our_name(name) or name, lambda key: authors_name(key) or key
    source = WeightSource(file, Checkpoint(base), to_key=to_key, to_name=to_name)
    config = MiniGPT3DConfig.from_pretrained(base)
    if files.adapter is None:
        return [source], config, []
    adapter, modules = _adapter_source(files.adapter)
    config.router_type = (files.stage or {}).get("router_type", config.router_type)
    return [source, adapter], config, modules


def _adapter_source(folder: Path) -> tuple[WeightSource, list[str]]:
    """A PEFT adapter as a source, and the modules that have LoRA factors. What it holds supersedes the base's."""
    peft_config, checkpoint = read_lora_config(folder), Checkpoint(folder / ADAPTER_FILE)
    names = {key: key.removeprefix(PEFT_PREFIX) for key in checkpoint.shapes}
    modules = [name.removesuffix(".lora_A.weight") for name in names.values() if name.endswith(".lora_A.weight")]
    source = WeightSource(
        File("adapter", "a PEFT adapter", gives=(r".*\.lora_[AB]\.weight",), may_give=(r".*",)),
        checkpoint,
        to_key=lambda name: PEFT_PREFIX + (our_name(name) or name),
        to_name=lambda key: authors_name(names[key]) or names[key],
        scales={module: peft_scale(peft_config, module) for module in modules},
    )
    if not isinstance(peft_config.target_modules, str):  # a list of names, of which none may be missing
        modules = sorted(f"model.{name}" for name in peft_config.target_modules)
    return source, modules


# ---- Planning -------------------------------------------------------------------------------------------------------


@dataclass
class ConversionPlan:
    """A conversion whose every tensor is accounted for and whose shapes fit."""

    sources: list[WeightSource]
    config: MiniGPT3DConfig
    processor: MiniGPT3DProcessor
    accounted: Account
    expected: dict[str, torch.Size]
    unused_patterns: list[str]  # of `ignore`, which no key matched

    def reader(self) -> Reader:
        by_slot = {source.file.slot: source for source in self.sources}
        linear = new_linear_layers(self.config)

        def make_new(name: str) -> torch.Tensor:
            return linear[name] if name in linear else read("model.query_experts.0.weight")

        read_key = lambda slot, key: by_slot[slot].read(key)  # noqa: E731
        read = Reader(self.accounted, self.config, self.expected, read_key, make_new, self.scale)
        return read

    def scale(self, module: str, rank: int) -> float:
        """Factor of a module's LoRA product."""
        scales = self.sources[-1].scales
        return scales[module] if scales else lora_scale(module, rank)

    @property
    def default_lora(self) -> str:
        """How to write LoRA factors: "keep" for the authors' files without stage IV's, to train further; else "merge"."""
        slots = {source.file.slot for source in self.sources}
        return "keep" if "phi" in slots and "stage4" not in slots else "merge"

    def release(self):
        """Close mapped files, so that they do not count as memory in use."""
        for source in self.sources:
            source.checkpoint.release()


def plan_release(
    paths: dict[str, Path],
    origins: dict[str, str] | None = None,
    config: Path | None = None,
    router: str | None = None,
    ignore: Iterable[str] = (),
) -> ConversionPlan:
    """Plan the conversion of the authors' files.

    Args:
        paths, origins: see `release_sources`.
        config: config.json of a model of other sizes than the paper's.
        router, ignore: see `make_plan`.

    Raises:
        ValueError: `config` is no configuration; or as `release_sources`, `make_processor` and `make_plan`.
    """
    try:
        sizes = MiniGPT3DConfig() if config is None else MiniGPT3DConfig.from_json_file(config)
    except Exception as error:  # configurations raise errors of several classes
        raise ValueError(f"`config` {config}: {one_line(error)}") from error
    sources = release_sources(paths, origins)
    return make_plan(sources, sizes, make_processor(paths["phi"], sizes), router, ignore)


def plan_stage_result(folder: Path, router: str | None = None, ignore: Iterable[str] = ()) -> ConversionPlan:
    """Plan the conversion of a training stage's result.

    Raises:
        ValueError: the folder is no such result; or as `stage_sources` and `make_plan`.
    """
    if not any((folder / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG)):
        raise ValueError(f"{folder}: no {CONFIG_FILE} or {ADAPTER_CONFIG}; give the output folder of a training stage")
    sources, config, lora = stage_sources(folder)
    processor = MiniGPT3DProcessor.from_pretrained(sources[0].checkpoint.path, trust_remote_code=False)
    return make_plan(sources, config, processor, router, ignore, lora)


def make_plan(
    sources: list[WeightSource],
    config: MiniGPT3DConfig,
    processor: MiniGPT3DProcessor,
    router: str | None = None,
    ignore: Iterable[str] = (),
    lora: Iterable[str] = (),
) -> ConversionPlan:
    """Account for all tensors; nothing is written.

    Args:
        router: how the result mixes its query experts; by default "sparse" if the experts are trained, else "none".
        ignore: patterns of keys, see `account`.
        lora: modules that have LoRA factors; in the authors' files these are the ones that the stages train.

    Raises:
        ValueError: see `account`; or `router` needs experts that no file has trained.
    """
    by_slot = {source.file.slot: source for source in sources}
    of_release = "phi" in by_slot
    config.router_type = _choose_router(router, by_slot, config)
    config.point_token_id = processor.point_token_id
    expected = expected_shapes(config)
    # Parts that are in no file before the stage that first trains them.
    new = () if not of_release or "stage4" in by_slot else ("model.router.", "model.query_experts.")
    new += () if not of_release or "stage3" in by_slot else ("model.point_projection.",)
    accounted = account(
        {source.file: source.shapes for source in sources},
        expected,
        lora_modules(config, expected) if of_release else lora,
        lambda name: name.startswith(new),
        ignore,
        lambda slot, key, first: torch.equal(by_slot[slot].read(key), by_slot[slot].read(first)),
        {slot: source.dtypes for slot, source in by_slot.items()},
    )
    unused = [pattern for pattern in ignore if not any(is_ignored([pattern], *key) for key in accounted.ignored)]
    plan = ConversionPlan(sources, config, processor, accounted, expected, unused)
    plan.release()
    return plan


def _choose_router(router: str | None, by_slot: dict[str, WeightSource], config: MiniGPT3DConfig) -> str:
    if "phi" in by_slot and "stage4" not in by_slot:
        if router not in (None, "none"):
            raise ValueError(f"`router` {router} needs the experts that stage IV trains: give `stage4` too.")
        return "none"
    if "phi" not in by_slot and config.router_type == "none" and router not in (None, "none"):
        raise ValueError(
            f"`router` {router} needs the experts that stage IV trains; this is the result of an earlier stage."
        )
    return router or config.router_type


def new_linear_layers(config: MiniGPT3DConfig) -> dict[str, torch.Tensor]:
    """Initial weights of new parts: PyTorch's defaults for linear layers, as in the authors' code."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = {
            "model.point_projection": PointProjection(config),
            "model.router": QueryExpertRouter(config),
            "model.language_projection": LanguageProjection(config),
        }
    return {f"{part}.{name}": p.detach() for part, module in modules.items() for name, p in module.named_parameters()}


def make_processor(phi_dir: Path, config: MiniGPT3DConfig) -> MiniGPT3DProcessor:
    """The processor around Phi's tokenizer.

    Raises:
        ValueError: the folder has no tokenizer, or its configuration is of another model.
    """
    if not phi_dir.is_dir():
        raise ValueError(f"`phi`: {phi_dir} is no folder; expected Phi-2's, with weights, config.json and tokenizer.")
    _check_phi(phi_dir, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(phi_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # every tokenizer class has its own way to fail
        raise ValueError(
            f"{phi_dir}: no tokenizer can be loaded ({one_line(error)[:150]}). The folder needs Phi-2's tokenizer.json, or "
            "vocab.json and merges.txt, and tokenizer_config.json beside its weights."
        ) from error
    feature_extractor = MiniGPT3DPointCloudProcessor()
    return MiniGPT3DProcessor(
        feature_extractor, prepare_tokenizer(tokenizer), num_query_tokens=config.num_query_tokens
    )


def _check_phi(phi_dir: Path, config: MiniGPT3DConfig):
    """Compare what shapes do not show: head count, rotary share and epsilons in Phi's config.json."""
    path = phi_dir / "config.json"
    if not path.exists():
        return
    of_phi = read_json(path, advice="Download it again.")
    expected = config.text_config.to_dict()
    expected |= expected.get("rope_parameters") or {}
    of_phi |= of_phi.get("rope_parameters") or {}
    for key in ("num_attention_heads", "partial_rotary_factor", "rope_theta", "layer_norm_eps", "hidden_act"):
        if key in of_phi and of_phi[key] != expected[key]:
            raise ValueError(f"{path}: {key} is {of_phi[key]!r}, expected {expected[key]!r}. Is it Phi-2?")


# ---- Records --------------------------------------------------------------------------------------------------------


def summary(plan: ConversionPlan) -> str:
    """Which file gave what, as a table and a few lines."""
    lines = [f"{row[0]:<16}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in _count_keys(plan)]
    return "\n".join([*lines, *_summarize(plan)])


def _count_keys(plan: ConversionPlan) -> list[tuple[str, ...]]:
    """How many keys of each file were used or not, and why not; first a row of titles."""
    accounted = plan.accounted
    used = {(origin.file, key) for origin in accounted.origins.values() for key in origin.keys}
    superseded = {(origin.file, key) for origin, _ in accounted.superseded for key in origin.keys}
    used, superseded = (Counter(file for file, _ in keys) for keys in (used, superseded - used))
    rows = [("file", "tensors", "used", "superseded", "alias", "left over", "ignored")]
    for source in plan.sources:
        slot, keys = source.file.slot, set(source.shapes)
        total, *parts = [
            len(keys),
            used[slot],
            superseded[slot],
            sum(file == slot for file, *_ in accounted.aliases),
            sum(file == slot for file, *_ in accounted.leftovers),
            sum(file == slot and key in keys for file, key in accounted.ignored),
        ]
        assert total == sum(parts), f"{slot}: {total} tensors, but {sum(parts)} are accounted for"
        rows.append((slot, *map(str, [total, *parts])))
    return rows


def _summarize(plan: ConversionPlan) -> list[str]:
    accounted = plan.accounted
    replaced = {
        (origin.file, accounted.origins[name].file, key)
        for origin, name in accounted.superseded
        for key in origin.keys
    }
    by = Counter((old, new) for old, new, _ in replaced)
    lines = [f"{count} of {old} are superseded by {new}" for (old, new), count in sorted(by.items())]
    reasons = Counter((file, reason) for file, _, reason in accounted.leftovers)
    lines += [f"{count} of {file} are left over: {reason}" for (file, reason), count in sorted(reasons.items())]
    for source in plan.sources:
        lines += [
            f"{source.file.slot} also has the {title}: not used" for title in source.checkpoint.trainer_state.values()
        ]
    lines += [f"{file}: {key}: ignored, as asked" for file, key in accounted.ignored]
    lines += [f"ignore pattern {pattern}: no key needed it" for pattern in plan.unused_patterns]
    if accounted.zeros:
        lines.append(f"{len(accounted.zeros)} parameters are in no file and zero: {next(iter(ZEROS.values()))}")
    if accounted.new:
        parts = sorted({name.split(".")[1] for name in accounted.new})
        lines.append(f"{len(accounted.new)} parameters are in no file and new, for training: {', '.join(parts)}")
    model = sum(name in plan.expected for name in accounted.origins) + len(accounted.zeros) + len(accounted.new)
    return [*lines, f"{model} tensors of the model, each from one place; {len(accounted.lora)} LoRA factors"]


def provenance(plan: ConversionPlan, command: list[str], settings: dict) -> dict:
    """Where everything comes from, so that the conversion can be repeated; paths are shortened to their last part."""
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
        "command": ["minigpt3d", *map(public_word, command)],
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
