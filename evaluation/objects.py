"""The objects of a suite, with their clouds and references: PointLLM's files, the bundled household objects, or your own."""

import hashlib
import io
import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from minigpt3d.data.clouds import decode_cloud, point_cloud_path, read_point_cloud
from minigpt3d.data.reading import FileReader, Limits
from minigpt3d.data.records import read_annotations
from minigpt3d.data.sources import MANIFEST_FILE, PackedSource, read_manifest
from minigpt3d.data.tables import TABLE_SUFFIXES, UNREADABLE_SUFFIXES, read_table
from minigpt3d.messages import MultilineError
from minigpt3d.point_cloud_minigpt3d import load_point_cloud
from minigpt3d.readers_minigpt3d import printable

from .evaluate_options import EvaluateOptions
from .progress import progress
from .suites import MODELNET40_CLASSES
from .vocabulary.colors import COLORS


NUM_POINTS = 8192
HOUSEHOLD_FILE = Path(__file__).with_name("household.parquet")


@dataclass(frozen=True)
class EvalObject:
    """An object, and the references that answers are compared with.

    Args:
        object_id: unique in its suite.
        read: returns the cloud, (N, 6) float32: xyz in any unit, rgb in [0, 1].
        label: its class, or a short name.
        caption: a reference description.
        color: its main color, one of `COLORS`.
    """

    object_id: str
    read: Callable[[], np.ndarray]
    label: str | None = None
    caption: str | None = None
    color: str | None = None


@dataclass(frozen=True)
class CloudFile:
    """Reads one's own file, see `load_point_cloud`.

    Args:
        path: of any format.
        reading: arguments of `load_point_cloud`, the same for all objects.
    """

    path: Path
    reading: dict

    def __call__(self) -> np.ndarray:
        return load_point_cloud(self.path, NUM_POINTS, **self.reading)


def read_objects(options: EvaluateOptions) -> list[EvalObject]:
    """All objects of a suite; see the readers below."""
    if options.suite in ("objaverse", "caption"):
        return read_objaverse(Path(options.data), options.annotations)
    if options.suite == "modelnet40":
        return read_modelnet40(Path(options.data))
    if options.suite == "own":
        return read_own(options.data, options.reading)
    return read_household(HOUSEHOLD_FILE if options.data is None else Path(options.data))


def check_clouds(objects: Collection[EvalObject], limits: Limits | None = None) -> str:
    """Read every cloud once, own files within limits; returns a hash of ids, references and clouds.

    Raises:
        MultilineError: some cannot be read.
    """
    digest, broken = hashlib.sha256(), []
    with progress(len(objects), "reading", "object") as bar, closing(_read_all(objects, limits)) as clouds:
        for item, cloud in zip(objects, clouds, strict=True):
            bar.update()
            digest.update(json.dumps([item.object_id, item.label, item.caption, item.color]).encode())
            if isinstance(cloud, Exception):
                broken.append(f"{item.object_id}: {' '.join(str(cloud).split())[:200]}")
            else:
                digest.update(np.ascontiguousarray(cloud, dtype=np.float32).tobytes())
    if broken:
        listed = "\n  ".join(broken)
        raise MultilineError(
            f"{len(broken)} of {len(objects)} objects cannot be read:\n  {listed}\nRepair them or leave them out."
        )
    return digest.hexdigest()[:16]


def _read_all(objects: Collection[EvalObject], limits: Limits | None) -> Iterator[np.ndarray | Exception]:
    """Clouds, or why there is none. Files of any format are read in a process of their own, since some end it."""
    files = [item.read for item in objects if isinstance(item.read, CloudFile)]
    if not files:
        for item in objects:
            try:
                yield item.read()
            except (ValueError, OSError) as error:
                yield error
        return
    with FileReader(load_point_cloud, limits=limits) as reader:
        for result in reader.read_files([file.path for file in files], num_points=NUM_POINTS, **files[0].reading):
            for text in result.warnings:
                warnings.warn(text, stacklevel=2)
            yield result.content if result.error is None else result.error


# ---- ModelNet40 -----------------------------------------------------------------------------------------------------


class _Dtype:
    """Stand-in for numpy's dtype: kind, size and byte order of a plain number, and nothing else."""

    __slots__ = ("dtype",)

    def __init__(self, code, align=False, copy=True):
        if not re.fullmatch("[fiu][1248]", code):
            raise pickle.UnpicklingError(f"it contains an array of dtype {code!r}, expected plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        order, *others = state[1:]
        if order not in "<>|=" or any(other not in (None, -1, 0) for other in others):
            raise pickle.UnpicklingError("it contains an array of a structured dtype, expected plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in for an unfinished array; numpy's own accepts any state, such as addresses of objects."""

    __slots__ = ("array",)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class _Callable:
    """A function that a pickle may call. The pickle cannot set its attributes."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"it would set {name} of a function")


def _from_buffer(data, dtype, shape, order):
    if not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError(f"it contains an array made of {type(data).__name__}, expected bytes")
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


class _ArraysOnly(pickle.Unpickler):
    """Unpickles lists, numbers and arrays of numbers, with stand-ins for the parts of numpy that their pickles name.

    Everything else that a pickle names is refused without importing it.
    """

    STAND_INS = {
        **{
            (f"numpy.{core}.{module}", name): _Callable(function)
            for core in ("core", "_core")
            for module, name, function in (
                ("multiarray", "_reconstruct", lambda *_: _Array()),
                ("multiarray", "scalar", lambda dtype, data: np.frombuffer(data, dtype.dtype)[0].item()),
                ("numeric", "_frombuffer", _from_buffer),
            )
        },
        ("numpy", "ndarray"): None,  # only an argument
        ("numpy", "dtype"): _Callable(_Dtype),
        ("_codecs", "encode"): _Callable(lambda text, encoding: text.encode("latin-1")),  # bytes in protocol 2
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which arrays do not need")
        return self.STAND_INS[module, name]


def read_modelnet40(path: Path) -> list[EvalObject]:
    """The test objects in PointLLM's `modelnet40_test_8192pts_fps.dat`: a pickle of clouds (xyz, normals) and labels.

    They have no color, so they are black, as in the paper.

    Raises:
        ValueError: the file is damaged, another one, or a pickle of something else than arrays of numbers.
    """
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(io.BufferedReader(file)).load()
    except OSError as error:
        raise ValueError(
            f"`data` {path}: cannot be read ({error.strerror}). Give the file modelnet40_test_8192pts_fps.dat of PointLLM's data."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"`data` {path}: refused or damaged: {' '.join(str(error).split())[:200]}.") from error
    try:
        clouds, labels = ([item.array if isinstance(item, _Array) else item for item in items] for items in content)
        labels = [_as_index(label) for label in labels]
        is_valid = len(clouds) == len(labels) > 0 and all(_is_modelnet_cloud(cloud) for cloud in clouds)
    except (AttributeError, TypeError, ValueError):
        is_valid = False
    if not is_valid or not all(0 <= label < len(MODELNET40_CLASSES) for label in labels):
        raise ValueError(
            f"`data` {path}: expected a list of clouds (points, 3 or more) and a list of labels below "
            f"{len(MODELNET40_CLASSES)}, as in PointLLM's modelnet40_test_8192pts_fps.dat."
        )
    return [
        EvalObject(f"{index:04d}", partial(_without_color, cloud), label=MODELNET40_CLASSES[label])
        for index, (cloud, label) in enumerate(zip(clouds, labels, strict=True))
    ]


def _as_index(label) -> int:
    """A label, which may be in an array of one; ValueError unless it is a whole number."""
    label = np.asarray(label)
    if label.dtype.kind not in "iu":
        raise ValueError(f"expected a whole number, got {label!r}")
    return label.item()


def _is_modelnet_cloud(cloud) -> bool:
    return isinstance(cloud, np.ndarray) and cloud.dtype.kind == "f" and cloud.ndim == 2 and cloud.shape[1] >= 3


def _without_color(cloud: np.ndarray) -> np.ndarray:
    return load_point_cloud(np.ascontiguousarray(cloud[:, :3]), len(cloud))


# ---- Objaverse ------------------------------------------------------------------------------------------------------


def read_objaverse(data_dir: Path, annotations: Iterable[Path]) -> list[EvalObject]:
    """Objects of a PointLLM annotation file, such as the 200 of `PointLLM_brief_description_val_200_GT.json`.

    Objaverse has no classes, so the caption is also the label.

    Raises:
        ValueError: malformed records, no records, or missing clouds.
    """
    samples = [sample for source in read_annotations(annotations).values() for sample in source]
    captions = {sample.object_id: sample.rounds[0][1] for sample in reversed(samples)}  # the first of each object
    missing = [object_id for object_id in captions if not point_cloud_path(data_dir, object_id).is_file()]
    if not captions or missing:
        problem = f"has no {point_cloud_path(data_dir, missing[0]).name}" if missing else "is not annotated"
        raise ValueError(
            f"`data` {data_dir} {problem} ({len(missing)} of {len(captions)} missing). Give the folder of the clouds that belong "
            "to `annotations`."
        )
    return [
        EvalObject(object_id, partial(read_point_cloud, data_dir, object_id), label=caption, caption=caption)
        for object_id, caption in reversed(captions.items())
    ]


# ---- Household ------------------------------------------------------------------------------------------------------


def read_household(path: Path = HOUSEHOLD_FILE) -> list[EvalObject]:
    """The bundled checkpoint's held-out objects (see `recipes/household/heldout.py`).

    Raises:
        ValueError: the file is missing or another one.
    """
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [
            EvalObject(
                row["object_id"],
                partial(decode_cloud, row["coord"], row["rgb"]),
                label=row["kind"],
                caption=row["caption"],
                color=row["main_color"],
            )
            for row in rows
        ]
    except (OSError, KeyError, pyarrow.ArrowInvalid) as error:
        raise ValueError(
            f"`data` {path}: not the household's held-out objects ({' '.join(str(error).split())[:150]}). They are in "
            "evaluation/household.parquet of the project."
        ) from error


# ---- Own objects ----------------------------------------------------------------------------------------------------


def read_own(data: str, reading: dict[str, str] | None = None) -> list[EvalObject]:
    """Objects of a table (`file`, and `label`, `caption` or `color`), or of a packed data set.

    Args:
        data: path of a .csv or .jsonl, or path or Hub id of a packed data set.
        reading: arguments of `load_point_cloud` for the table's files.

    Raises:
        ValueError: a malformed line, with its number; no objects; a repeated id.
    """
    path = Path(data)
    if path.is_dir() and not (path / MANIFEST_FILE).is_file():
        raise ValueError(
            f"`data` {data}: a folder without {MANIFEST_FILE}. Give a .csv or .jsonl with your files and their "
            "labels, captions or colors, or what `minigpt3d pack` wrote."
        )
    if not path.exists() and path.suffix.lower() in (*TABLE_SUFFIXES, *UNREADABLE_SUFFIXES):  # not a Hub id
        raise ValueError(f"`data` {data}: no such file.")
    if not path.is_file() and reading:
        names = ", ".join(f"`{name}`" for name in reading)
        raise ValueError(
            f"`data` {data}: packed data have been read already. Give {names} to `minigpt3d pack` instead."
        )
    objects = _read_lines(path, reading or {}) if path.is_file() else _read_packed(data)
    if not objects:
        raise ValueError(
            f"`data` {data}: no objects. Expected a line for each, with 'file' and 'label', 'caption' or 'color'."
        )
    object_id, count = Counter(item.object_id for item in objects).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"`data` {data}: object_id {object_id!r} is given {count} times. Give each line a different one."
        )
    return objects


OWN_COLUMNS = ("file", "label", "caption", "color", "object_id")


def _read_lines(path: Path, reading: dict) -> list[EvalObject]:
    objects, spellings, unknown = [], {}, {}
    for where, line in read_table(path, {"file"}):
        references = {name: line.get(name) for name in ("label", "caption", "color")} if isinstance(line, dict) else {}
        if not any(references.values()) or not isinstance(line.get("file"), str):
            raise ValueError(
                f"{where}: expected 'file' and at least one of 'label', 'caption' and 'color', got {json.dumps(line)[:80]}."
            )
        unknown |= dict.fromkeys(line.keys() - set(OWN_COLUMNS))
        for name, value in references.items():
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ValueError(f"{where}: {name!r} must be a text, got {value!r:.80}.")
        references = {name: value and value.strip() for name, value in references.items()}
        if label := references["label"] and " ".join(references["label"].split()):
            references["label"] = spellings.setdefault(label.casefold(), label)  # "Chair" and "chair" are one class
        if color := references["color"]:
            references["color"] = color.lower()
            if color.lower() not in COLORS:
                raise ValueError(f"{where}: 'color' must be one of {', '.join(COLORS)}, got {color!r}.")
        file = path.parent / line["file"]
        if not file.is_file():
            raise ValueError(f"{where}: no such file: {file}.")
        object_id = printable(str(line.get("object_id") or Path(line["file"]).stem))
        objects.append(EvalObject(object_id, CloudFile(file, reading), **references))
    if unknown:
        warnings.warn(f"{path}: columns that are not used: {', '.join(sorted(unknown))}.", stacklevel=4)
    return objects


def _read_packed(data: str) -> list[EvalObject]:
    """The first description of each object, a detailed one if there are any."""
    manifest = read_manifest(data)
    name = next((name for name in ("detailed", "brief") if sum(manifest["shards"].get(name, ()))), None)
    if name is None:
        raise ValueError(f"`data` {data}: {MANIFEST_FILE} names no detailed or brief descriptions to compare with.")
    source = PackedSource(data, manifest, name)
    objects = {}
    for shard, rows in enumerate(source.rows):
        for row in range(rows):
            sample = source.read_sample(shard, row)
            objects.setdefault(
                sample.object_id,
                EvalObject(sample.object_id, partial(_packed_cloud, source, shard, row), caption=sample.rounds[0][1]),
            )
    return list(objects.values())


def _packed_cloud(source: PackedSource, shard: int, row: int) -> np.ndarray:
    return source.read(shard, row)[1]
