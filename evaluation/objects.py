"""The objects of a suite: what they look like, and what is true of them.

Readers for what the benchmarks are distributed as (PointLLM's ModelNet40 file and annotations), for the bundled
checkpoint's held-out objects, for one's own, and for answers that another program has given.
"""

import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from minigpt3d.data.clouds import decode_cloud, point_cloud_path, read_point_cloud
from minigpt3d.data.reading import FileReader
from minigpt3d.data.records import read_annotations
from minigpt3d.data.sources import MANIFEST_FILE, PackedSource, read_manifest
from minigpt3d.data.tables import TABLE_SUFFIXES, UNREADABLE_SUFFIXES, read_table
from minigpt3d.messages import MultilineError
from minigpt3d.point_cloud_minigpt3d import load_point_cloud
from minigpt3d.readers_minigpt3d import printable

from .options import EvaluateOptions
from .progress import progress
from .suites import MODELNET40_CLASSES
from .vocabulary.colors import COLORS


NUM_POINTS = 8192
HOUSEHOLD_FILE = Path(__file__).with_name("household.parquet")


@dataclass(frozen=True)
class EvalObject:
    """An object, and what an answer about it is compared with.

    Args:
        object_id: unique in its suite.
        read: gives the cloud, (N, 6) float32: xyz in any unit, rgb in [0, 1].
        label: its class, or a short name.
        caption: what a good description says.
        color: its main color, one of `COLORS`.
    """

    object_id: str
    read: Callable[[], np.ndarray] | None
    label: str | None = None
    caption: str | None = None
    color: str | None = None


@dataclass(frozen=True)
class CloudFile:
    """Reads one's own file, see `load_point_cloud`.

    Args:
        path: of any format.
        reading: `up_axis` and `missing_color`, the same for all objects.
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


def check_clouds(objects: Collection[EvalObject]) -> str:
    """Read every cloud once; returns a hash of ids, references and clouds.

    Raises:
        MultilineError: some cannot be read.
    """
    digest, broken = hashlib.sha256(), []
    with progress(len(objects), "reading", "object") as bar, closing(_read_all(objects)) as clouds:
        for each, cloud in zip(objects, clouds, strict=True):
            bar.update()
            digest.update(json.dumps([each.object_id, each.label, each.caption, each.color]).encode())
            if isinstance(cloud, Exception):
                broken.append(f"{each.object_id}: {' '.join(str(cloud).split())[:200]}")
            else:
                digest.update(np.ascontiguousarray(cloud, dtype=np.float32).tobytes())
    if broken:
        listed = "\n  ".join(broken)
        raise MultilineError(
            f"{len(broken)} of {len(objects)} objects cannot be read:\n  {listed}\nRepair them or leave them out."
        )
    return digest.hexdigest()[:16]


def _read_all(objects: Collection[EvalObject]) -> Iterator[np.ndarray | Exception]:
    """Clouds, or why there is none. Files of any format are read in a process of their own, since some end it."""
    files = [each.read for each in objects if isinstance(each.read, CloudFile)]
    if not files:
        for each in objects:
            try:
                yield each.read()
            except (ValueError, OSError) as error:
                yield error
        return
    with FileReader(load_point_cloud) as reader:
        for result in reader.read_files([file.path for file in files], num_points=NUM_POINTS, **files[0].reading):
            for text in result.warnings:
                warnings.warn(text, stacklevel=2)
            yield result.content if result.error is None else result.error


# ---- ModelNet40 -----------------------------------------------------------------------------------------------------


class _Dtype:
    """Of a dtype what a pickle may say: a plain number's kind, size and byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code, align=False, copy=True):
        if not re.fullmatch("[fiu][1248]", code):
            raise pickle.UnpicklingError(f"it holds an array of dtype {code!r}, no plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        order, *others = state[1:]
        if order not in "<>|=" or any(other not in (None, -1, 0) for other in others):
            raise pickle.UnpicklingError("it holds an array of a dtype that is none of plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array in the making; numpy's own would take any state, such as addresses for objects."""

    __slots__ = ("array",)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class _Maker:
    """What a pickle may call. It has no attributes that a pickle could set."""

    __slots__ = ("_make",)

    def __init__(self, make):
        object.__setattr__(self, "_make", make)

    def __call__(self, *args):
        return self._make(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"it would set {name} of a function")


def _from_buffer(data, dtype, shape, order):
    if not isinstance(data, (bytes, bytearray)):  # of a number, `bytes` would make as many zeros
        raise pickle.UnpicklingError(f"it holds an array of {type(data).__name__}, no bytes")
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


class _ArraysOnly(pickle.Unpickler):
    """Unpickles lists, numbers and arrays of numbers, with stand-ins for what of numpy their pickles name.

    Whatever else a pickle asks for is refused, and not imported.
    """

    STAND_INS = {
        **{
            (f"numpy.{core}.{module}", name): _Maker(make)
            for core in ("core", "_core")
            for module, name, make in (
                ("multiarray", "_reconstruct", lambda *_: _Array()),
                ("multiarray", "scalar", lambda dtype, data: np.frombuffer(data, dtype.dtype)[0].item()),
                ("numeric", "_frombuffer", _from_buffer),
            )
        },
        ("numpy", "ndarray"): None,  # an argument, and nothing to call
        ("numpy", "dtype"): _Maker(_Dtype),
        ("_codecs", "encode"): _Maker(lambda text, encoding: text.encode("latin-1")),  # how protocol 2 writes bytes
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, which arrays do not need")
        return self.STAND_INS[module, name]


def read_modelnet40(path: Path) -> list[EvalObject]:
    """The test objects in PointLLM's `modelnet40_test_8192pts_fps.dat`: a pickle of clouds (xyz, normals) and labels.

    They have no color, so it is black, as in the paper.

    Raises:
        ValueError: the file is no such pickle, or one that wants more than arrays of numbers.
    """
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(io.BufferedReader(file)).load()
    except OSError as error:
        raise ValueError(
            f"`data` {path}: cannot be read ({error.strerror}). Give the file modelnet40_test_8192pts_fps.dat of PointLLM's data."
        ) from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        raise ValueError(f"`data` {path}: refused or damaged: {' '.join(str(error).split())[:200]}.") from error
    try:
        clouds, labels = ([each.array if isinstance(each, _Array) else each for each in half] for half in content)
        labels = [_as_index(label) for label in labels]
        fits = len(clouds) == len(labels) > 0 and all(_is_modelnet_cloud(cloud) for cloud in clouds)
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits or not all(0 <= label < len(MODELNET40_CLASSES) for label in labels):
        raise ValueError(
            f"`data` {path}: expected a list of clouds (points, 3 or more) and a list of labels below "
            f"{len(MODELNET40_CLASSES)}, as in PointLLM's modelnet40_test_8192pts_fps.dat."
        )
    return [
        EvalObject(f"{index:04d}", partial(_without_color, cloud), label=MODELNET40_CLASSES[label])
        for index, (cloud, label) in enumerate(zip(clouds, labels, strict=True))
    ]


def _as_index(label) -> int:
    """A label, alone or in an array of one; a ValueError unless it is a whole number."""
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

    The caption is what a classification is compared with, too: Objaverse has no classes.

    Raises:
        ValueError: records out of schema, none at all, or clouds that are not there.
    """
    samples = [sample for source in read_annotations(annotations).values() for sample in source]
    found = {sample.object_id: sample.rounds[0][1] for sample in reversed(samples)}  # the first of each
    missing = [object_id for object_id in found if not point_cloud_path(data_dir, object_id).is_file()]
    if not found or missing:
        problem = f"has no {point_cloud_path(data_dir, missing[0]).name}" if missing else "is not annotated"
        raise ValueError(
            f"`data` {data_dir} {problem} ({len(missing)} of {len(found)} missing). Give the folder of the clouds that belong "
            "to `annotations`."
        )
    return [
        EvalObject(object_id, partial(read_point_cloud, data_dir, object_id), label=caption, caption=caption)
        for object_id, caption in reversed(found.items())
    ]


# ---- Household ------------------------------------------------------------------------------------------------------


def read_household(path: Path = HOUSEHOLD_FILE) -> list[EvalObject]:
    """The bundled checkpoint's held-out objects (see `recipes/household/heldout.py`).

    Raises:
        ValueError: the file is not there, or another one.
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
            f"`data` {path}: not the household's held-out objects ({' '.join(str(error).split())[:150]}). They lie in the "
            "project's checkout, evaluation/household.parquet."
        ) from error


# ---- One's own ------------------------------------------------------------------------------------------------------


def read_own(data: str, reading: dict[str, str] | None = None) -> list[EvalObject]:
    """Objects from a table or lines of JSON (`file`, and `label`, `caption` or `color`), or from a packed data set.

    Args:
        data: path, or a packed data set's Hub id.
        reading: `up_axis` and `missing_color` of the table's files, see `load_point_cloud`.

    Raises:
        ValueError: a line out of schema, with its number; no objects; an id that is there twice.
    """
    path = Path(data)
    if path.is_dir() and not (path / MANIFEST_FILE).is_file():
        raise ValueError(
            f"`data` {data}: a folder without {MANIFEST_FILE}. Give a .csv or .jsonl that names your files and says what "
            "they show, or what `minigpt3d pack` wrote."
        )
    if not path.exists() and path.suffix.lower() in (*TABLE_SUFFIXES, *UNREADABLE_SUFFIXES):  # no data set on the Hub
        raise ValueError(f"`data` {data}: there is no such file.")
    if not path.is_file() and reading:
        raise ValueError(
            f"`data` {data}: packed data are turned and colored already. Give `up_axis` and `missing_color` to `minigpt3d pack` instead."
        )
    objects = _read_lines(path, reading or {}) if path.is_file() else _read_packed(data)
    ids = [each.object_id for each in objects]
    twice = sorted({each for each in ids if ids.count(each) > 1}) if len(set(ids)) < len(ids) else []
    if twice or not objects:
        problem = (
            f"object_id {twice[0]!r} is there twice; give lines an object_id of their own"
            if twice
            else "holds no objects: expected a line for each, with 'file' and 'label', 'caption' or 'color'"
        )
        raise ValueError(f"`data` {data}: {problem}.")
    return objects


OWN_COLUMNS = ("file", "label", "caption", "color", "object_id")


def _read_lines(path: Path, reading: dict) -> list[EvalObject]:
    objects, spelling, unknown = [], {}, {}
    for where, line in read_table(path, {"file"}):
        facts = {name: line.get(name) for name in ("label", "caption", "color")} if isinstance(line, dict) else {}
        unknown |= dict.fromkeys(name for name in line if name not in OWN_COLUMNS) if facts else {}
        if not facts or not isinstance(line.get("file"), str) or not any(facts.values()):
            raise ValueError(
                f"{where}: expected 'file' and at least one of 'label', 'caption' and 'color', got {json.dumps(line)[:80]}."
            )
        for name, value in facts.items():
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ValueError(f"{where}: {name!r} must be a text, got {value!r:.80}.")
        facts = {name: value and value.strip() for name, value in facts.items()}
        if facts["label"]:  # "Chair" is what "chair" is: as it was first written
            facts["label"] = " ".join(facts["label"].split())
            facts["label"] = spelling.setdefault(facts["label"].casefold(), facts["label"])
        if facts["color"] and (color := facts["color"].lower()) in COLORS:
            facts["color"] = color
        elif facts["color"]:
            raise ValueError(f"{where}: 'color' must be one of {', '.join(COLORS)}, got {facts['color']!r}.")
        file = path.parent / line["file"]
        if not file.is_file():
            raise ValueError(f"{where}: there is no file {file}.")
        object_id = printable(str(line.get("object_id") or Path(line["file"]).stem))
        objects.append(EvalObject(object_id, CloudFile(file, reading), **facts))
    if unknown:
        warnings.warn(
            f"{path}: of each object, {', '.join(OWN_COLUMNS)} are read; not read: {', '.join(unknown)}.", stacklevel=4
        )
    return objects


def _read_packed(data: str) -> list[EvalObject]:
    """The first description of each object, the detailed ones if there are any."""
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
