"""Write a model as a folder that is ready for the Hub: weights, configuration, processor and the code that reads them."""

import errno
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase, ProcessorMixin

import minigpt3d
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration


END_SIGN = "###"


def set_generation_defaults(model: MiniGPT3DForConditionalGeneration, tokenizer: PreTrainedTokenizerBase):
    """Stop at the end sign without being asked: every token that completes it by itself ends a sequence, as eos does.

    A tokenizer that spells the sign in several tokens needs `generate(stop_strings=["###"], tokenizer=tokenizer)`,
    which is what the pipeline passes.
    """
    ends = [index for token, index in tokenizer.get_vocab().items() if token.endswith(END_SIGN)]
    config = model.generation_config
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = sorted({index for index in (tokenizer.eos_token_id, *ends) if index is not None})
    config.suppress_tokens = [model.config.point_token_id]  # a placeholder is never an answer


# What a folder of a model may hold that is lost when the folder is replaced.
_KEPT_APART = (".git", "history.jsonl")


def check_folder(output_dir: str | Path, sources: Iterable[str | Path] = ()) -> Path:
    """The folder's absolute path.

    Args:
        sources: files and folders that are read to fill it.

    Raises:
        ValueError: it exists and is something other than a model's folder, holds what would be lost, or what it is to be
            made of.
    """
    output_dir = Path(output_dir).resolve()
    for source in (Path(source).resolve() for source in sources):
        if output_dir == source or output_dir in source.parents or source in output_dir.parents:
            raise ValueError(
                f"{output_dir} and {source}, which it is made of, lie in each other; pass another folder."
            )
    above = next(parent for parent in output_dir.parents if parent.exists())
    if not above.is_dir() or output_dir.is_file():
        raise ValueError(f"{above if not above.is_dir() else output_dir} is a file; pass the name of a folder.")
    if output_dir.exists() and any(output_dir.iterdir()):
        if not (_is_ours(output_dir) or _is_ours(output_dir / "base")):
            raise ValueError(
                f"{output_dir} holds other files than a model; pass a new folder, or the folder of a model."
            )
        lost = [name for name in _KEPT_APART if (output_dir / name).exists()]
        if lost or output_dir in (cwd := Path.cwd(), *cwd.parents):
            what = f"holds {lost[0]}" if lost else "is where this runs"
            raise ValueError(f"{output_dir} {what}, so it is not replaced; pass a new folder.")
    return output_dir


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "minigpt3d"
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def written_whole(output_dir: str | Path) -> Iterator[Path]:
    """A temporary folder that takes `output_dir`'s name, and its place, once everything is in it.

    Raises:
        ValueError: as `check_folder`.
        OSError: the disk is full; nothing of what was written is left.
    """
    output_dir = check_folder(output_dir)
    partial = output_dir.with_name(f".{output_dir.name}.minigpt3d-partial")
    replaced = output_dir.with_name(f".{output_dir.name}.minigpt3d-replaced")
    if replaced.exists() and not output_dir.exists():  # a run was killed between the two renames below
        replaced.rename(output_dir)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if re.search("No space left on device|Disk quota exceeded", str(error)):  # safetensors raises its own class
            full = f"the disk of {output_dir.parent} is full; free some space and run it again"
            raise OSError(errno.ENOSPC, full) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if output_dir.exists():
        output_dir.rename(replaced)
    partial.rename(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)


def write_all_but_weights(folder: Path, model: MiniGPT3DForConditionalGeneration, processor: ProcessorMixin):
    """Generation config, processor, chat template, code and licences.

    Raises:
        ValueError: the processor is for another model.
    """
    for name, ours, theirs in (
        ("num_query_tokens", model.config.num_query_tokens, processor.num_query_tokens),
        ("point_token_id", model.config.point_token_id, processor.point_token_id),
    ):
        if ours != theirs:
            raise ValueError(f"model and processor do not belong together: {name} is {ours} there and {theirs} here.")
    set_generation_defaults(model, processor.tokenizer)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    package_dir = Path(minigpt3d.__file__).parent
    for source in sorted(package_dir.glob("*_minigpt3d.py")):
        shutil.copyfile(source, folder / source.name)
    for name in ("LICENSE", "NOTICE"):
        if (package_dir / name).exists():
            shutil.copyfile(package_dir / name, folder / name)


def save_pretrained(model: MiniGPT3DForConditionalGeneration, processor: ProcessorMixin, output_dir: str | Path):
    """Write a folder that `from_pretrained(..., trust_remote_code=True)` and `pipeline` read without this package.

    The folder is complete or not there: it is written under a temporary name and renamed. One that exists is replaced.

    Args:
        model: its dtype is the dtype on disk.
        processor: tokenizer, chat template and point cloud settings.
        output_dir: a model's folder, or a new name.

    Raises:
        ValueError: `output_dir` exists and is something other than a model's folder, or the processor is for another
            model.
    """
    with written_whole(output_dir) as partial:
        write_all_but_weights(partial, model, processor)
        model.save_pretrained(partial)
