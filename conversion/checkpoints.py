"""Tensors in files: `.pth`, `.bin` and `.safetensors`, one file or a folder of shards.

Files are mapped into memory, and a pickle is read only if it holds nothing but tensors.
"""

import pickletools
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minigpt3d.files import read_json
from minigpt3d.messages import one_line

from .names import TRAINER_STATE


_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I64": "int64"}
# What a pickle that holds only tensors imports.
_HARMLESS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"} | {
    f"torch.{name}Storage" for name in ("Half", "BFloat16", "Float", "Double", "Long", "Int", "Byte", "Bool")
}


class Checkpoint:
    """The tensors of one file, or of a transformers folder of shards.

    A tensor's values are read when `read` asks for them.

    Args:
        path: file or folder.
        container: key of the dictionary in a `.pth` file that holds the tensors.

    Raises:
        FileNotFoundError: there is no such file, or a folder without weights.
        ValueError: the file is truncated, not of its format, or would run code when unpickled.
    """

    def __init__(self, path: str | Path, container: str | None = None):
        self.path, self.container = Path(path), container
        self.files = _weight_files(self.path)
        self._open: dict[Path, object] = {}
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # such as "float16"
        self.trainer_state: dict[str, str] = {}
        for file in self.files:
            self._list_tensors(file)
        self.release()

    def _list_tensors(self, file: Path):
        if file.suffix == ".safetensors":
            slices = {key: self._safetensors(file).get_slice(key) for key in self._safetensors(file).keys()}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {key: _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()) for key, part in slices.items()}
        else:
            tensors = self._pickled(file)
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
        for key in shapes.keys() & self._file_of.keys():
            raise ValueError(
                f"{self.path}: {key} is in {self._file_of[key].name} and in {file.name}. Remove one of them."
            )
        self._file_of |= dict.fromkeys(shapes, file)
        self.shapes |= shapes
        self.dtypes |= dtypes

    def read(self, key: str) -> torch.Tensor:
        """A mapped tensor; copy it to keep it after `release`."""
        file = self._file_of[key]
        return self._safetensors(file).get_tensor(key) if file.suffix == ".safetensors" else self._pickled(file)[key]

    def release(self):
        """Close the mapped files, so that they do not count as memory in use."""
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
            self._open[file] = _check_tensors(file, self._unpack(file, _load(file)), self.container)
        return self._open[file]

    def _unpack(self, file: Path, content):
        """What lies under the container's key, if the file has it."""
        if self.container is None or not isinstance(content, dict) or self.container not in content:
            return content
        self.trainer_state |= {key: reason for key, reason in TRAINER_STATE.items() if key in content}
        rest = [key for key in content if key != self.container and key not in TRAINER_STATE]
        if unknown := [key for key in rest if _holds_tensors(content[key])]:
            raise ValueError(
                f"{file}: beside {self.container!r} there are unknown tensors under {', '.join(map(repr, unknown))}. "
                "Save the file again without them if they do not belong to the model."
            )
        return content[self.container]


def _check_tensors(file: Path, content, container: str | None) -> dict[str, torch.Tensor]:
    where = f" under {container!r}" if container else ""
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a dictionary of tensors{where}.")
    others = [
        key
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided)
    ]
    if others or not content:
        got = f"the keys {', '.join(map(str, others[:5]))}" if others else "an empty one"
        raise ValueError(f"{file}: expected a dictionary of tensors{where}, got {got}.")
    return content


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
                weight_map = read_json(path / name)["weight_map"]
                shards = sorted(set(weight_map.values()))
                files = [path / shard for shard in shards]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path / name}: not an index of shards ({error!r}). Download it again.") from error
            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise ValueError(f"{path / name}: names {', '.join(outside)}, which is no file of this folder.")
            if absent := [file.name for file in files if not file.exists()]:
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
    except Exception as error:  # a damaged file can raise anything
        unsafe = _unsafe_names(file)
        if not unsafe:
            raise ValueError(_damaged(file, error)) from error
        raise ValueError(
            f"{file}: refused: unpickling it would call {', '.join(unsafe)}, which a file of tensors does not need. Do not "
            "use it, or have its owner save it again as safetensors."
        ) from error


def _unsafe_names(file: Path) -> list[str]:
    """What a pickle would import besides tensors; found without importing or calling anything."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not a zip file of torch's: read the pickle's operations
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
    size, reason = f"{file.stat().st_size:,} bytes", one_line(error)[:150]
    return f"{file} ({size}) is truncated, damaged or not of its format. Download it again. ({reason})"
