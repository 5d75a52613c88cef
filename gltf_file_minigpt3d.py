"""The parts of a glTF 2.0 file: its JSON, and the values, materials and images that the JSON names.

Everything in a file may be wrong: numbers are checked where they are used, sizes before memory is allocated.

Shapes: N values, C components of a value.
"""

import base64
import json
import posixpath
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .meshes_minigpt3d import Material, TextureLimitError, Textures
from .readers_minigpt3d import (
    MissingReaderError,
    PointCloudError,
    check_unpacked_size,
    folders_beside,
    import_reader,
    limits,
    warn,
)
from .surfaces_minigpt3d import leads_outside


_COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_WRAPS = {33071: "clamp", 33648: "mirror", 10497: "repeat"}
_BASIS = "KHR_texture_basisu"
_MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")
_IMAGE_EXTENSIONS = ("EXT_texture_webp", "EXT_texture_avif", "MSFT_texture_dds")


class Values(NamedTuple):
    """(N, C) as stored, often a view of the file; `normalized` integers stand for 0–1 or −1–1."""

    stored: np.ndarray
    normalized: bool

    def take(self, rows: np.ndarray | slice, dtype: type = np.float64) -> np.ndarray:
        values = self.stored[rows]
        if not self.normalized or values.dtype.kind == "f":
            return values.astype(dtype)
        return np.maximum(values / np.iinfo(values.dtype).max, -1).astype(dtype)


class Paint(NamedTuple):
    """A material of the file: how it paints, and which texture coordinates it takes, after which transform."""

    material: Material | None
    coordinates: str
    transform: np.ndarray | None  # (2, 3)


# ---- The file and its values ----------------------------------------------------------------------------------------


class GltfFile:
    """A parsed glTF file and the values that its JSON names. Everything in it may be wrong."""

    def __init__(self, path: Path):
        self.path = path
        text, self._binary = _split(np.memmap(path, np.uint8, mode="r"))
        if sum(text.count(mark) for mark in b",[{") > limits().max_json_values:
            raise PointCloudError(f"its JSON has more than the {limits().max_json_values:,} values allowed.")
        self.json = json.loads(text)  # also UTF-16, and UTF-8 with a byte order mark
        if not isinstance(self.json, dict):
            raise ValueError("its JSON is no object")
        version = str(
            self.json.get("asset", {}).get("version", "1.0" if isinstance(self.json.get("meshes"), dict) else 2)
        )
        if not version.startswith("2"):
            raise PointCloudError(
                f"it is glTF {version}, and 2.0 is read. Convert it to glTF 2.0, with Blender for example."
            )
        self.textures = Textures()
        self._failed_textures: dict[str, None] = {}
        self._decoded_bytes = 0
        self._buffers: dict[int, np.ndarray] = {}
        self._views: dict[int, np.ndarray] = {}
        self._values: dict[int, Values] = {}
        self._paints: dict[int, Paint] = {}

    def items(self, kind: str) -> list:
        items = self.json.get(kind, [])
        if not isinstance(items, list):
            raise ValueError(f"its {kind} are no list")
        return items

    def item(self, kind: str, index: Any) -> dict:
        items = self.items(kind)
        if type(index) is not int or not 0 <= index < len(items) or not isinstance(items[index], dict):
            raise PointCloudError(
                f"it names entry {index!r} of its {kind}, and there are {len(items):,}. It is damaged; export it again."
            )
        return items[index]

    def allocate(self, num_bytes: int):
        """Count what is decoded.

        Raises:
            PointCloudError: it is more than `max_decoded_bytes`.
        """
        self._decoded_bytes += num_bytes
        if self._decoded_bytes > limits().max_decoded_bytes:
            raise PointCloudError(
                f"its values would unpack to {self._decoded_bytes:,} bytes or more, more than the "
                f"{limits().max_decoded_bytes:,} allowed. Simplify it first."
            )

    def find(self, uri: str) -> Path:
        """A file beside this one. Exporters write blanks as %20 or not, backslashes, another case, and paths of their
        own machine; of those only the name counts."""
        names = [text.replace("\\", "/") for text in (urllib.parse.unquote(uri), uri)]
        for name in [
            *(name for name in names if not leads_outside(name)),
            *(posixpath.basename(name) for name in names),
        ]:
            for folder in folders_beside(self.path):
                path = folder / name.replace("\0", "")
                if path.is_file():
                    return path
                if path.parent.is_dir():
                    for other in path.parent.iterdir():
                        if other.name.casefold() == path.name.casefold() and other.is_file():
                            return other
        reason = "outside of its folder, where nothing is read" if leads_outside(names[0]) else "missing"
        raise PointCloudError(f"its file {names[0][:200]!r} is {reason}. Put it beside this one.")

    def load(self, uri: Any) -> np.ndarray:
        """The bytes behind a URI, (N,) uint8."""
        if not isinstance(uri, str):
            raise ValueError(f"a URI is text, got {uri!r}"[:200])
        if uri.startswith("data:"):
            head, _, body = uri.partition(",")
            is_base64 = head.endswith(";base64")
            data = base64.b64decode(body + "==") if is_base64 else urllib.parse.unquote_to_bytes(body)
            return np.frombuffer(data, np.uint8)
        if uri.split("://")[0].lower() in ("http", "https", "ftp"):
            raise PointCloudError(f"it refers to {uri[:200]!r}; download that file and put it beside this one.")
        path = self.find(uri)
        return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)

    def buffer(self, index: Any) -> np.ndarray:
        if index not in self._buffers:
            uri = self.item("buffers", index).get("uri")
            if uri is None and (index != 0 or self._binary is None):
                raise PointCloudError(f"its buffer {index} has no data: neither a URI nor the binary part of a .glb.")
            self._buffers[index] = self._binary if uri is None else self.load(uri)
        return self._buffers[index]

    def _slice(self, view: dict, what: str) -> np.ndarray:
        data = self.buffer(view.get("buffer"))
        start, length = _whole(view, "byteOffset"), _whole(view, "byteLength")
        if start + length > len(data):
            raise PointCloudError(
                f"its {what} takes bytes {start:,} to {start + length:,} of a buffer that has {len(data):,}. "
                "The file is truncated or damaged; export it again."
            )
        return data[start : start + length]

    def view(self, index: Any) -> np.ndarray:
        """The bytes of a buffer view, (N,) uint8, decoded if they are compressed."""
        view = self.item("bufferViews", index)
        extensions = view.get("extensions", {})
        packed = next((extensions[name] for name in _MESHOPT if name in extensions), None)
        if packed is None:
            return self._slice(view, f"buffer view {index}")
        if index not in self._views:
            self._views[index] = self._unpack(packed)
        return self._views[index]

    def _unpack(self, packed: dict) -> np.ndarray:
        meshopt = import_decoder("meshopt", "meshopt", _MESHOPT[0])
        count, stride = _whole(packed, "count"), _whole(packed, "byteStride")
        data = self._slice(packed, "compressed buffer view")
        check_unpacked_size(count * stride, "its compressed buffer", len(data))
        self.allocate(count * stride)
        try:
            rows = meshopt.decode_gltf_buffer(
                np.ascontiguousarray(data), count, stride, packed.get("mode"), packed.get("filter", "NONE")
            )
        except Exception as error:
            raise PointCloudError(
                f"a buffer with {_MESHOPT[0]} cannot be decoded ({error}); export it again."
            ) from error
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)

    def count(self, index: Any) -> int:
        return _whole(self.item("accessors", index), "count")

    def accessor(self, index: Any) -> Values:
        """Values (N, C), a view of the file where it can be one."""
        if index in self._values:
            return self._values[index]
        accessor = self.item("accessors", index)
        count, dtype, width = _layout(accessor)
        if "bufferView" in accessor:
            stride = _whole(self.item("bufferViews", accessor["bufferView"]), "byteStride")
            data = self.view(accessor["bufferView"])
            values = _table(data, _whole(accessor, "byteOffset"), stride, count, dtype, width, f"accessor {index}")
        else:
            self.allocate(count * width * dtype.itemsize)
            values = np.zeros((count, width), dtype)
        if "sparse" in accessor:
            self.allocate(count * width * dtype.itemsize)
            values = self._fill(values.copy(), accessor["sparse"], index)
        self._values[index] = Values(values, accessor.get("normalized") is True)
        return self._values[index]

    def _fill(self, values: np.ndarray, sparse: dict, index: int) -> np.ndarray:
        count, what = _whole(sparse, "count"), f"sparse accessor {index}"
        parts = []
        for key, dtype, width in (
            ("indices", np.dtype(_COMPONENTS[sparse["indices"]["componentType"]]), 1),
            ("values", values.dtype, values.shape[1]),
        ):
            data = self.view(sparse[key].get("bufferView"))
            parts.append(_table(data, _whole(sparse[key], "byteOffset"), 0, count, dtype, width, what))
        rows = parts[0][:, 0]
        if count and (rows.dtype.kind != "u" or rows.max() >= len(values)):
            raise PointCloudError(f"its {what} replaces values that are not there. It is damaged; export it again.")
        values[rows] = parts[1]
        return values

    # Materials and images

    def paint(self, index: Any) -> Paint:
        """A material by its number, None for none."""
        if index is None:
            return Paint(None, "", None)
        if index not in self._paints:
            self._paints[index] = self._read_material(self.item("materials", index))
        return self._paints[index]

    def _read_material(self, material: dict) -> Paint:
        factor, texture = _base_color(material)
        mode = material.get("alphaMode", "OPAQUE")
        cutoff = {"MASK": material.get("alphaCutoff", 0.5), "BLEND": 1 / 512}.get(
            mode
        )  # blended: only what is invisible
        color = read_vector(factor, [1, 1, 1, 1])
        if texture is None:
            return Paint(Material(color, alpha_cutoff=cutoff, linear=True), "", None)
        pixels, wrap = self._read_texture(texture.get("index"))
        if pixels is None and (color[:3] == 1).all():  # the factor alone says nothing
            return Paint(None, "", None)
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        number = transform.get("texCoord", texture.get("texCoord", 0))
        matrix = None
        if transform:
            angle = float(transform.get("rotation", 0))
            # The listing in the extension's text turns the other way: https://github.com/KhronosGroup/glTF/issues/1563
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            scale, offset = read_vector(transform.get("scale"), [1, 1]), read_vector(transform.get("offset"), [0, 0])
            matrix = np.column_stack([turn * scale, offset])
        return Paint(Material(color, pixels, wrap, cutoff, linear=True), f"TEXCOORD_{number}", matrix)

    def measure_textures(self, materials: set):
        """Count the pixels of all textures before the first is decoded.

        Raises:
            TextureLimitError: they are too many.
        """
        for index in sorted(materials, key=str):
            texture = _base_color(self.item("materials", index))[1]
            for source in () if texture is None else self._sources(self.item("textures", texture.get("index"))):
                try:
                    image = self.item("images", source)
                    self.textures.measure(source, self._image_data(image))
                    break
                except TextureLimitError:
                    raise
                except Exception:  # reported when it is decoded
                    continue

    @staticmethod
    def _sources(texture: dict) -> list:
        """The images of a texture, those that need no library of their own first."""
        extensions = texture.get("extensions", {})
        sources = [extensions.get(name, {}).get("source") for name in _IMAGE_EXTENSIONS]
        sources += [texture.get("source"), extensions.get(_BASIS, {}).get("source")]
        return [source for source in sources if source is not None]

    def _image_data(self, image: dict) -> np.ndarray:
        return self.load(image["uri"]) if "uri" in image else self.view(image.get("bufferView"))

    def _read_texture(self, index: Any) -> tuple[np.ndarray | None, tuple[str, str]]:
        texture = self.item("textures", index)
        sampler = self.item("samplers", texture["sampler"]) if "sampler" in texture else {}
        wrap = (_WRAPS.get(sampler.get("wrapS"), "repeat"), _WRAPS.get(sampler.get("wrapT"), "repeat"))
        failures = []
        for source in self._sources(texture):
            image = self.item("images", source)
            try:
                return self._decode(source, self._image_data(image)), wrap
            except TextureLimitError:
                raise
            except Exception as error:
                name = image.get("name") or str(image.get("uri", f"image {source}"))
                failures.append(f"{name[:80]}: {' '.join(str(error).split())[:200]}")
        self._failed_textures |= dict.fromkeys(failures or [f"texture {index} names no image"])
        return None, wrap

    def _decode(self, index: int, data: np.ndarray) -> np.ndarray:
        if bytes(data[:7]) != b"\xabKTX 20":
            return self.textures.decode(index, data)
        if index not in self.textures.decoded:
            texture = import_decoder("opengl_basisu", "opengl_basisu", _BASIS).open(data.tobytes())
            self.textures.count(texture.width * texture.height)
            self.textures.decoded[index] = texture.transcode("rgba8").data
        return self.textures.decoded[index]

    def warn_of_textures(self):
        """One warning for all textures that were not found or not decoded."""
        if self._failed_textures:
            first, *others = self._failed_textures
            more = f", and {len(others)} more" if others else ""
            warn(f"a texture cannot be used; the color of its material is taken if it has one ({first}{more}).")


def _split(data: np.ndarray) -> tuple[bytes, np.ndarray | None]:
    """The JSON of a file and, of a .glb, its binary part."""
    chunks: dict[bytes, np.ndarray] = {}
    if bytes(data[:4]) != b"glTF":
        chunks[b"JSON"] = data
    else:
        version = int.from_bytes(data[4:8].tobytes(), "little")
        if version != 2:
            raise PointCloudError(
                f"it is glTF {version}, and 2.0 is read. Convert it to glTF 2.0, with Blender for example."
            )
        start = 12
        while start + 8 <= len(data):
            size, kind = (
                int.from_bytes(data[start : start + 4].tobytes(), "little"),
                data[start + 4 : start + 8].tobytes(),
            )
            if start + 8 + size > len(data):
                raise PointCloudError(
                    f"a part of {size:,} bytes begins at byte {start:,}, and the file has {len(data):,}. It is truncated; "
                    "export it again."
                )
            chunks.setdefault(kind, data[start + 8 : start + 8 + size])
            start += 8 + size
        if b"JSON" not in chunks:
            raise PointCloudError("it has no JSON part. It is truncated; export it again.")
    if len(chunks[b"JSON"]) > limits().max_json_bytes:
        raise PointCloudError(
            f"its JSON has more than the {limits().max_json_bytes:,} bytes allowed. Convert it to .glb."
        )
    text = chunks[b"JSON"].tobytes()
    return text if chunks[b"JSON"] is data else text.rstrip(b"\0 "), chunks.get(b"BIN\0")


def _base_color(material: dict) -> tuple[Any, dict | None]:
    """The factor and the texture of a material's color."""
    diffuse = material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
    if diffuse is not None:
        return diffuse.get("diffuseFactor"), diffuse.get("diffuseTexture")
    base = material.get("pbrMetallicRoughness", {})
    factor, texture = base.get("baseColorFactor"), base.get("baseColorTexture")
    glows = "emissiveTexture" in material or any(material.get("emissiveFactor", ()))
    if glows and factor is not None and not any(factor[:3]):  # how exporters write surfaces without shading
        return [*material.get("emissiveFactor", [0, 0, 0]), factor[3]], material.get("emissiveTexture")
    return factor, texture


def _whole(entry: dict, key: str) -> int:
    """A count or offset, 0 if it is left out."""
    value = entry.get(key, 0)
    if type(value) is not int or value < 0:
        raise PointCloudError(f"its {key} must be a whole number of at least 0, got {value!r:.60}; export it again.")
    return value


def read_vector(value: Any, default: list) -> np.ndarray:
    array = np.asarray(default if value is None else value, dtype=np.float64)
    if array.shape != np.shape(default):
        raise PointCloudError(f"expected {len(default)} numbers, got {value!r:.60}; export it again.")
    return array


def _layout(accessor: dict) -> tuple[int, np.dtype, int]:
    """Count, type and number of components of an accessor's values."""
    component, kind = accessor.get("componentType"), accessor.get("type")
    if component not in _COMPONENTS or kind not in _WIDTHS:
        raise PointCloudError(f"an accessor has unknown type {kind!r:.20} of {component!r:.20}; export it again.")
    return _whole(accessor, "count"), np.dtype(_COMPONENTS[component]), _WIDTHS[kind]


def _table(
    data: np.ndarray, start: int, stride: int, count: int, dtype: np.dtype, width: int, what: str
) -> np.ndarray:
    """(N, C) values in bytes (uint8), without a copy."""
    size = dtype.itemsize * width
    stride = stride or size
    needed = start + (count - 1) * stride + size if count else 0
    if needed > len(data):
        raise PointCloudError(
            f"its {what} says {count:,} values, {needed:,} bytes, but {len(data):,} follow. The file is truncated or "
            "damaged; export it again."
        )
    if not count:
        return np.zeros((0, width), dtype)
    return np.ndarray((count, width), dtype, data, start, (stride, dtype.itemsize))


def import_decoder(module: str, package: str, extension: str) -> Any:
    """A library for a compressed part.

    Raises:
        MissingReaderError: it is not installed; the message names the extension and the command.
    """
    try:
        return import_reader(module, package)
    except ImportError as error:
        raise MissingReaderError(
            f"it is compressed with {extension}, which needs {package}. Install it: pip install '{package}'"
        ) from error
