"""Models in folders and on the Hub: resolve a name, load a model or an adapter, fingerprint weights, save a folder.

Importing this module is cheap. torch and transformers are imported by the functions that load or save.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt3d.files import read_json, sha256, written_whole
from minigpt3d.messages import one_line


if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
    from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor


PACKAGE_DIR = Path(__file__).resolve().parent
BUNDLED_MODEL = PACKAGE_DIR / "checkpoints" / "household"

CONFIG_FILE = "config.json"
# A model with its LoRA factors separate: these folders, the files of a PEFT adapter, what a training stage writes there.
BASE_DIR, ADAPTER_DIR = "base", "adapter"
ADAPTER_CONFIG, ADAPTER_FILE, STAGE_FILE = "adapter_config.json", "adapter_model.safetensors", "stage.json"


# ---- Names ----------------------------------------------------------------------------------------------------------


HUB_ID_RULES = (
    "a repository on the Hub is named OWNER/NAME, with letters from a to z, digits, '-', '_' and '.', at most 96 in NAME, "
    "no '-' or '.' at its ends, no '--', no '..'."
)


def is_hub_id(name: str | Path) -> bool:
    """Whether a name has the form of a Hub id, OWNER/NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # takes half a second

    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return "/" in str(name)


def portable_name(name: str | Path) -> str:
    """A name for a file that may move: a Hub id, or a folder's path relative to the working directory, as PEFT reads it."""
    if is_hub_id(name) and not Path(name).is_dir():
        return str(name)
    path = Path(os.path.relpath(name)).as_posix()
    return path if path.startswith(".") else f"./{path}"  # unlike OWNER/NAME


def public_name(name: str | Path) -> str:
    """A name for publication: a local path is shortened to its last part, since the rest describes somebody's disk."""
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() or ".." in path.parts else str(name)


def default_model() -> str:
    """The folder of the bundled model.

    Raises:
        ValueError: this installation lacks it.
    """
    if not (BUNDLED_MODEL / CONFIG_FILE).is_file():
        raise ValueError(f"the bundled model is missing from {BUNDLED_MODEL}; pass a folder or a Hub id as `model`.")
    return str(BUNDLED_MODEL)


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a model are.

    Args:
        base: folder or Hub id of a complete model.
        adapter: local folder of a PEFT adapter for it; None if the model has none.
        stage: contents of stage.json, which the training stage wrote that made the model; None if no stage did.
        offline: whether the Hub cannot be reached, so that only its local cache is used.
    """

    base: str
    adapter: Path | None = None
    stage: dict | None = None
    offline: bool = False


def find_model(name: str | Path) -> ModelFiles:
    """Locate a complete model, a PEFT adapter, or a folder with `base/` and `adapter/`.

    Args:
        name: folder or Hub id.

    Raises:
        ValueError: there is no such model, or the base of an adapter is not where the adapter says.
    """
    if not str(name).strip():
        raise ValueError("the name of the model is empty; a model is a folder, or OWNER/NAME on the Hub.")
    folder, offline = Path(name), False
    if folder.is_file():
        raise ValueError(f"{name} is a file; a model is a folder, or OWNER/NAME on the Hub.")
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        offline = not hub_has(str(name))
        small_files = [CONFIG_FILE, ADAPTER_CONFIG, ADAPTER_FILE, STAGE_FILE]
        folder = Path(snapshot_download(str(name), allow_patterns=small_files, local_files_only=offline))
    stage = _read_stage(folder)
    if (folder / CONFIG_FILE).is_file():
        return ModelFiles(str(name), None, stage, offline)
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else folder / ADAPTER_DIR
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{name} holds neither a {CONFIG_FILE} of a model nor an {ADAPTER_CONFIG} of a PEFT adapter.")
    return ModelFiles(_find_base(adapter), adapter, stage or _read_stage(adapter), offline)


def _find_base(adapter: Path) -> str:
    """The base model of an adapter: `base/` beside it, else what adapter_config.json names, a Hub id or a path.

    A path is relative to the working directory, as PEFT reads it, or to the adapter's folder.
    """
    if adapter.name == ADAPTER_DIR and (beside := adapter.parent / BASE_DIR / CONFIG_FILE).is_file():
        return str(beside.parent)
    config = read_json(adapter / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise ValueError(f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path must be a text, got {base!r:.80}.")
    for path in (Path(base), adapter / base):
        if base and path.is_dir():
            return str(path.resolve())
    if not is_hub_id(base):
        raise ValueError(
            f"{adapter}: its base model {base} is not there. Correct base_model_name_or_path in {adapter / ADAPTER_CONFIG}."
        )
    return base


def _read_stage(folder: Path) -> dict | None:
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    stage = read_json(path)
    if not isinstance(stage.get("stage"), str):
        raise ValueError(
            f"{path}: expected what a training stage writes, with its name as 'stage', got {stage!r:.80}."
        )
    return stage


def hub_has(name: str) -> bool:
    """Whether the Hub has a model; False if the Hub cannot be reached and the local cache has a copy.

    The clients themselves would try for a minute before they give up.

    Raises:
        ValueError: the Hub has no such model, or it cannot be reached and there is no copy.
    """
    if not is_hub_id(name):
        raise ValueError(f"there is no folder {name}, and a model on the Hub is named OWNER/NAME.")
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub has no model {name}: {one_line(error)}") from error
    except Exception as error:  # being offline raises many different errors
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in (CONFIG_FILE, ADAPTER_CONFIG)):
            raise ValueError(
                f"there is no folder {name}, and the Hub cannot be reached for a model of that name: {one_line(error)}"
            ) from error
        return False
    return True


# ---- Load -----------------------------------------------------------------------------------------------------------


def load_model(name: str | Path, **options) -> tuple[MiniGPT3DForConditionalGeneration, MiniGPT3DProcessor]:
    """The model, with its adapter if it has one, and the processor of a folder or Hub id.

    Args:
        name: folder or Hub id.
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: there is no such model, it cannot be read, or weights are missing.
    """
    files = find_model(name)
    model = load_weights(files.base, local_files_only=files.offline, **options)
    if files.adapter is not None:
        load_adapter(model, files.adapter)
    return model, load_processor(files)


def check_device(name: str | None):
    """
    Raises:
        ValueError: `device` is none of this machine; None is any.
    """
    if name is None:
        return
    import torch

    devices = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        devices += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in devices:
        raise ValueError(f"`device` {name!r}: this machine has {', '.join(devices)}. Leave it out for the default.")


def load_processor(files: ModelFiles) -> MiniGPT3DProcessor:
    """The processor of a model; an adapter uses the one of its base.

    Raises:
        ValueError: it cannot be read.
    """
    from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor

    try:
        options = {"local_files_only": files.offline, "trust_remote_code": False}
        return MiniGPT3DProcessor.from_pretrained(files.base, **options)
    except Exception as error:
        raise ValueError(f"cannot load the processor of {files.base}: {one_line(error)}") from error


def load_weights(name: str | Path, **options) -> MiniGPT3DForConditionalGeneration:
    """A model, after a check that every weight comes from its files.

    Args:
        name: folder or Hub id of a complete model.
        options: of `from_pretrained`.

    Raises:
        ValueError: it cannot be read, or files and configuration do not agree.
    """
    from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration

    try:
        model, loading = MiniGPT3DForConditionalGeneration.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:
        raise ValueError(f"cannot load the model {name}: {one_line(error)}") from error
    _check_loading(name, loading)
    return model


def load_adapter(model: MiniGPT3DForConditionalGeneration, adapter: Path):
    """Add a PEFT adapter to a model, after a check that its files have every weight of it.

    Raises:
        ValueError: it cannot be read, or its files and configuration do not agree.
    """
    try:
        loading = model.load_adapter(str(adapter)).to_dict()
    except Exception as error:
        raise ValueError(f"cannot load the adapter {adapter}: {one_line(error)}") from error
    _check_loading(adapter, loading)


def _check_loading(name: str | Path, loading: dict):
    for problem, keys in loading.items():
        if keys:
            example = sorted(map(str, keys))[0]
            raise ValueError(
                f"cannot load the model {name}: {len(keys)} {problem.replace('_', ' ')}, such as {example}. "
                "Download or save it again."
            )


def fingerprint_model(name: str | Path) -> str:
    """Digest of a folder's weights and configuration, or of a file of answers; for a Hub id its commit.

    Raises:
        ValueError: there is no such folder, file or Hub id.
    """
    path = Path(name)
    if not path.exists():
        return _hub_commit(str(name))[:16]
    files = [path] if path.is_file() else [*path.rglob("*.safetensors"), *path.glob("*config.json")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {sha256(file)}".encode())
    return digest.hexdigest()[:16]


def _hub_commit(name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils.hub import extract_commit_hash

    offline, missing = not hub_has(name), None
    for file in (CONFIG_FILE, ADAPTER_CONFIG):
        try:
            return extract_commit_hash(hf_hub_download(name, file, local_files_only=offline), None)
        except EntryNotFoundError as error:
            missing = error
    raise ValueError(f"{name} holds neither a {CONFIG_FILE} nor an {ADAPTER_CONFIG}.") from missing


# ---- Save -----------------------------------------------------------------------------------------------------------


# What a model's folder may hold that would be lost when it is replaced.
_IRREPLACEABLE = (".git", "history.jsonl")


def check_model_dir(output_dir: str | Path, sources: Iterable[str | Path] = ()) -> Path:
    """Check the folder that a model is to be written to; returns its absolute path.

    Args:
        sources: files and folders that are read to fill it.

    Raises:
        ValueError: it exists and is not a model's folder, holds what would be lost, or contains one of its sources.
    """
    output_dir = Path(output_dir).resolve()
    for source in (Path(source).resolve() for source in sources):
        if output_dir == source or output_dir in source.parents or source in output_dir.parents:
            raise ValueError(f"{output_dir} and its source {source} lie in each other; pass another folder.")
    ancestor = next(parent for parent in output_dir.parents if parent.exists())
    if not ancestor.is_dir() or output_dir.is_file():
        raise ValueError(f"{output_dir if ancestor.is_dir() else ancestor} is a file; pass the name of a folder.")
    if output_dir.exists() and any(output_dir.iterdir()):
        if not (_is_minigpt3d(output_dir) or _is_minigpt3d(output_dir / BASE_DIR)):
            raise ValueError(
                f"{output_dir} holds other files than a model; pass a new folder, or the folder of a model."
            )
        irreplaceable = [name for name in _IRREPLACEABLE if (output_dir / name).exists()]
        if irreplaceable or output_dir in (cwd := Path.cwd(), *cwd.parents):
            reason = f"holds {irreplaceable[0]}" if irreplaceable else "contains the working directory"
            raise ValueError(f"{output_dir} {reason}, so it is not replaced; pass a new folder.")
    return output_dir


def _is_minigpt3d(folder: Path) -> bool:
    try:
        return read_json(folder / CONFIG_FILE)["model_type"] == "minigpt3d"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_pretrained(model: MiniGPT3DForConditionalGeneration, processor: ProcessorMixin, output_dir: str | Path):
    """Write a folder that `from_pretrained(..., trust_remote_code=True)` and `pipeline` read without this package.

    The folder appears complete or not at all. An existing one is replaced.

    Args:
        model: its dtype is the dtype on disk.
        processor: tokenizer, chat template and point cloud settings.
        output_dir: a model's folder, or a new name.

    Raises:
        ValueError: `output_dir` exists and is not a model's folder, or the processor is for another model.
    """
    with written_whole(check_model_dir(output_dir)) as partial:
        write_all_but_weights(partial, model, processor)
        model.save_pretrained(partial)


def write_all_but_weights(folder: Path, model: MiniGPT3DForConditionalGeneration, processor: ProcessorMixin):
    """Write generation config, processor, chat template and licenses; the code comes with config.json.

    Raises:
        ValueError: the processor is for another model.
    """
    for name in ("num_query_tokens", "point_token_id"):
        of_model, of_processor = getattr(model.config, name), getattr(processor, name)
        if of_model != of_processor:
            raise ValueError(
                f"model and processor do not belong together: {name} is {of_model} in the model and {of_processor} in the "
                "processor."
            )
    set_generation_defaults(model, processor)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in ("LICENSE", "NOTICE"):
        if (PACKAGE_DIR / name).exists():
            shutil.copyfile(PACKAGE_DIR / name, folder / name)


def write_code(folder: Path):
    """Copy the flat files of this package, which `trust_remote_code=True` runs, into a folder."""
    for source in sorted(PACKAGE_DIR.glob("*_minigpt3d.py")):
        shutil.copyfile(source, folder / source.name)


def has_package_code(name: str | Path) -> bool:
    """Whether a model is a folder whose code, which `trust_remote_code=True` runs, is this package's, byte for byte."""
    folder = Path(name)
    configs = [read_json(path) for path in folder.glob("*config.json")]
    return (
        folder.is_dir()
        and all(_is_package_file(path) for path in folder.rglob("*.py"))
        and "--" not in json.dumps(configs)  # OTHER/MODEL--module.Class is the code of another model
    )


def _is_package_file(path: Path) -> bool:
    source = PACKAGE_DIR / path.name
    return source.is_file() and source.read_bytes() == path.read_bytes()


def set_generation_defaults(model: MiniGPT3DForConditionalGeneration, processor: MiniGPT3DProcessor):
    """Make generation stop where an answer ends: at eos, and at every token that ends in `###` by itself.

    With a tokenizer that splits `###` into several tokens, generation also needs
    `generate(stop_strings=["###"], tokenizer=tokenizer)`, which the pipeline passes.
    """
    tokenizer, end = processor.tokenizer, processor.end_of_answer
    ends = [index for token, index in tokenizer.get_vocab().items() if token.endswith(end)]
    config = model.generation_config
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = sorted({index for index in (tokenizer.eos_token_id, *ends) if index is not None})
    config.suppress_tokens = [model.config.point_token_id]  # a placeholder is never an answer
