"""Tensors in files: `.pth`, `.bin` and `.safetensors`, one file or a folder of shards, mapped and never unpickled freely."""

import json
import pickletools
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .names import TRAINER_STATE


_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I64": "int64"}
# What a pickle of nothing but tensors imports.
_HARMLESS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"} | {
    f"torch.{kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double", "Long", "Int", "Byte", "Bool")
}
_SINGLES = ("model.safetensors", "pytorch_model.bin")


class Checkpoint:
    """The tensors of one file, or of a transformers folder of shards.

    Nothing is read before it is asked for: `.pth` and `.bin` files are mapped into memory, `.safetensors` read in part.

    Args:
        path: file or folder.
        container: key of the dictionary in a `.pth` file that holds the tensors.

    Raises:
        FileNotFoundError: there is no such file, or a folder without weights.
        ValueError: the file is cut off, not of its format, or would run code when unpickled.
    """

    def __init__(self, path: str | Path, container: str | None = None):
        self.path, self.container = Path(path), container
        self.files = _weight_files(self.path)
        self._open: dict[Path, object] = {}
        self._where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # such as "float16"
        self.trainer_state: dict[str, str] = {}
        for file in self.files:
            if file.suffix == ".safetensors":
                slices = {key: self._safetensors(file).get_slice(key) for key in self._safetensors(file).keys()}
                shapes = {key: tuple(each.get_shape()) for key, each in slices.items()}
                self.dtypes |= {
                    key: _SAFETENSORS_DTYPES.get(each.get_dtype(), each.get_dtype()) for key, each in slices.items()
                }
            else:
                shapes = {key: tuple(tensor.shape) for key, tensor in self._pickled(file).items()}
                self.dtypes |= {k: str(t.dtype).removeprefix("torch.") for k, t in self._pickled(file).items()}
            for key in shapes.keys() & self._where.keys():
                raise ValueError(
                    f"{self.path}: {key} is in {self._where[key].name} and in {file.name}. Remove one of them."
                )
            self._where |= dict.fromkeys(shapes, file)
            self.shapes |= shapes
        self.release()

    def read(self, key: str) -> torch.Tensor:
        """A tensor, mapped: copy it to keep it beyond `release`."""
        file = self._where[key]
        return self._safetensors(file).get_tensor(key) if file.suffix == ".safetensors" else self._pickled(file)[key]

    def release(self):
        """Let go of what was mapped, so that it does not count as memory in use."""
        self._open.clear()

    def _safetensors(self, file: Path):
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(_damaged(file, error)) from error
        return self._open[file]

    def _pickled(self, file: Path) -> dict[str, torch.Tensor]:
        if file not in self._open:
            self._open[file] = self._tensors(file, _load(file))
        return self._open[file]

    def _tensors(self, file: Path, content) -> dict[str, torch.Tensor]:
        if not isinstance(content, dict):
            raise ValueError(f"{file}: holds a {type(content).__name__}, expected a dictionary of tensors.")
        if self.container is not None and self.container in content:
            self.trainer_state |= {key: why for key, why in TRAINER_STATE.items() if key in content}
            rest = [key for key in content if key != self.container and key not in TRAINER_STATE]
            strange = [key for key in rest if _holds_tensors(content[key])]
            if strange:
                raise ValueError(
                    f"{file}: beside {self.container!r} there are tensors under {', '.join(map(repr, strange))}, which "
                    "nothing is known about. Save the file again without them if they do not belong to the model."
                )
            content = content[self.container]
        if not isinstance(content, dict):
            raise ValueError(
                f"{file}: {self.container!r} is a {type(content).__name__}, expected a dictionary of tensors."
            )
        tensors = {
            key: value
            for key, value in content.items()
            if isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        }
        if len(tensors) < len(content) or not tensors:
            others = [key for key in content if key not in tensors][:5]
            expected = f" under {self.container!r}" if self.container else ""
            raise ValueError(
                f"{file}: expected a dictionary of tensors{expected}, got the keys {', '.join(map(str, others)) or 'of nothing'}."
            )
        return tensors


def _holds_tensors(value) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    for name in _INDEXES:
        if (path / name).exists():
            try:
                weight_map = json.loads((path / name).read_text(encoding="utf-8"))["weight_map"]
                files = [path / shard for shard in sorted(set(weight_map.values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path / name}: not an index of shards ({error!r}). Download it again.") from error
            absent = [file.name for file in files if not file.exists()]
            if absent:
                raise FileNotFoundError(f"{path}: {name} names {', '.join(absent)}, which is not there. Download it.")
            return files
    for name in _SINGLES:
        if (path / name).exists():
            return [path / name]
    raise FileNotFoundError(f"{path}: holds no weights; expected one of {', '.join((*_INDEXES, *_SINGLES))}.")


def _load(file: Path):
    """
    Raises:
        ValueError: see `Checkpoint`.
    """
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # older than torch 1.6: not a zip file
    except Exception as error:  # a damaged file fails wherever its bytes happen to lead the reader
        wanted = _unsafe_names(file)
        if not wanted:
            raise ValueError(_damaged(file, error)) from error
        raise ValueError(
            f"{file}: refused: unpickling it would call {', '.join(wanted)}. A file of tensors does not need that. Do not "
            "use it, or have its owner save it again as safetensors."
        ) from error


def _unsafe_names(file: Path) -> list[str]:
    """What a pickle wants to import beyond tensors; nothing is imported or called to find out."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not a zip file of torch's: read the first pickle's operations
        names, strings = set(), []
        try:
            with open(file, "rb") as stream:
                while True:  # torch's older format is several pickles in a row, then the tensors' bytes
                    for operation, argument, _ in pickletools.genops(stream):
                        if operation.name == "GLOBAL":
                            names.add(argument.replace(" ", "."))
                        elif operation.name == "STACK_GLOBAL":
                            names.add(".".join(strings[-2:]))
                        elif isinstance(argument, str):
                            strings.append(argument)
        except Exception:  # the end, or no pickle
            return sorted(names - _HARMLESS)


def _damaged(file: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:150]
    return f"{file} ({file.stat().st_size:,} bytes) is cut off, damaged or not of its format. Download it again. ({reason})"
