"""Read Sweet Home 3D's furniture libraries (`.sh3f`): zip archives of a catalog, models and their textures."""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np


# Limits against zip bombs, above what any real model needs.
MAX_MODEL_BYTES = 500_000_000
MAX_COMPRESSION_RATIO = 2_000
_MODEL_SUFFIXES = (".obj", ".dae", ".3ds", ".glb", ".gltf", ".stl", ".ply", ".off")
_CATALOG = "PluginFurnitureCatalog.properties"


@dataclass(frozen=True)
class Piece:
    """One piece of furniture in a catalog.

    Args:
        object_id: unique among the libraries read together; letters, digits and dashes.
        name, category, creator, license: from the catalog.
        library: stem of the library's file name.
        model: path of the model inside the archive.
        size: width, height and depth in centimeters, along x, y (up) and z.
        rotation: (3, 3), of the model's coordinates.
    """

    object_id: str
    name: str
    category: str
    creator: str
    license: str
    library: str
    model: str
    size: tuple[float, float, float]
    rotation: np.ndarray


def read_properties(text: str) -> dict[str, str]:
    """A Java `.properties` file: `key=value` lines, `#` comments, `\\uXXXX` and other escapes, continued lines."""
    properties = {}
    for line in re.sub(r"\\\r?\n[ \t]*", "", text).splitlines():
        line = line.strip()
        if not line or line[0] in "#!":
            continue
        match = re.match(r"((?:\\.|[^=:\s\\])+)\s*[=:\s]\s*(.*)", line)
        if match:
            key, value = (re.sub(r"\\(u[0-9a-fA-F]{4}|.)", _unescape, part) for part in match.groups())
            properties[key] = value.strip()
    return properties


def _unescape(match: re.Match) -> str:
    escaped = match[1]
    if len(escaped) == 5:
        return chr(int(escaped[1:], 16))
    return {"n": "\n", "t": "\t", "r": "\r"}.get(escaped, escaped)


class FurnitureLibrary:
    """An open `.sh3f` file.

    Raises:
        ValueError: not a zip, or a zip without a catalog.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.archive = zipfile.ZipFile(self.path)
            catalog = self.archive.read(_CATALOG).decode("latin-1")
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(
                f"{self.path}: not a furniture library ({error}). Expected a .sh3f file of Sweet Home 3D: a zip that "
                f"holds {_CATALOG}."
            ) from error
        self.properties = read_properties(catalog)

    def __enter__(self) -> "FurnitureLibrary":
        return self

    def __exit__(self, *_):
        self.archive.close()

    def pieces(self) -> Iterator[Piece]:
        """The catalog's entries that have a name and a model, in its order."""
        get = self.properties.get
        numbers = sorted(int(key[6:]) for key in self.properties if re.fullmatch(r"model#\d+", key))
        license_name = re.sub(r"\s+", " ", get("license", "")) or "not stated"
        for number in numbers:
            name = get(f"name#{number}")
            if not name:
                continue
            piece_id = get(f"id#{number}", f"{number}").rsplit("#", 1)[-1]
            slug = re.sub(r"[^a-z0-9]+", "-", f"{self.path.stem}-{piece_id}".lower()).strip("-")
            yield Piece(
                object_id=slug,
                name=name,
                category=get(f"category#{number}", ""),
                creator=get(f"creator#{number}", "not stated"),
                license=license_name,
                library=self.path.stem,
                model=get(f"model#{number}").lstrip("/"),
                size=tuple(float(get(f"{side}#{number}", "nan")) for side in ("width", "height", "depth")),
                rotation=_rotation(get(f"modelRotation#{number}"), name),
            )

    def extract(self, piece: Piece, folder: str | Path) -> Path:
        """Write the model and the files beside it, such as textures, into `folder`.

        Returns:
            The path of the model's file.

        Raises:
            ValueError: the model is missing or suspiciously large, or a path leads out of the folder.
        """
        folder = Path(folder)
        if PurePosixPath(piece.model).suffix.lower() != ".zip":
            return self._extract_beside(self.archive, piece.model, folder)
        inner_path = self._extract_members(self.archive, [piece.model], folder)[0]
        with zipfile.ZipFile(inner_path) as inner:
            models = [name for name in inner.namelist() if name.lower().endswith(_MODEL_SUFFIXES)]
            if not models:
                raise ValueError(f"{piece.model} holds no model of a known format ({', '.join(_MODEL_SUFFIXES)}).")
            return self._extract_beside(inner, models[0], folder / "model")

    def _extract_beside(self, archive: zipfile.ZipFile, model: str, folder: Path) -> Path:
        parent = str(PurePosixPath(model).parent)
        prefix = "" if parent == "." else parent + "/"
        names = [name for name in archive.namelist() if name.startswith(prefix) and not name.endswith("/")]
        if model not in names:
            raise ValueError(f"the archive has no file {model}.")
        if not prefix:  # a model at the top of an archive: leave out all other folders
            names = [name for name in names if "/" not in name]
        written = dict(zip(names, self._extract_members(archive, names, folder), strict=True))
        return written[model]

    @staticmethod
    def _extract_members(archive: zipfile.ZipFile, names: list[str], folder: Path) -> list[Path]:
        """Write members by name; zip bombs and names that lead out of the folder are refused."""
        paths = []
        members = [archive.getinfo(name) for name in names]
        total = sum(member.file_size for member in members)
        packed = sum(member.compress_size for member in members)
        if total > MAX_MODEL_BYTES or total > MAX_COMPRESSION_RATIO * max(packed, 1):
            raise ValueError(
                f"the model unpacks from {packed} to {total} bytes; at most {MAX_MODEL_BYTES} bytes and "
                f"{MAX_COMPRESSION_RATIO} times are read. It looks like a zip bomb."
            )
        for member in members:
            target = (folder / member.filename).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise ValueError(f"the archive's member {member.filename!r} leads out of its folder.")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))
            paths.append(target)
        return paths


def _rotation(text: str | None, name: str) -> np.ndarray:
    if not text:
        return np.eye(3)
    numbers = np.array(text.split(), dtype=float)
    if numbers.shape != (9,):
        raise ValueError(f"modelRotation of {name!r} must be 9 numbers, got {text!r}.")
    return numbers.reshape(3, 3)
