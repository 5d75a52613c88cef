"""glTF: colors, textures, scenes and compressed parts as the specification says, and damaged or excessive files.

`tests/cases/` has files of known colors: (200, 100, 50) where x is smallest, (20, 40, 220) where it is largest. The
.ktx2 files there are a picture of these two halves, made with Basis Universal.
"""

import base64
import copy
import io
import json
import random
import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from point_cases import read_expected

from minigpt3d import gltf_minigpt3d, meshes_minigpt3d
from minigpt3d.meshes_minigpt3d import to_linear, to_srgb
from minigpt3d.point_cloud_minigpt3d import PointCloudError, ReadingLimits, load_point_cloud


pytestmark = pytest.mark.filterwarnings("ignore:.*no color", "ignore:.*beside its surfaces")
CASES = Path(__file__).parent.parent / "cases"
LEFT, RIGHT = np.array([200, 100, 50]) / 255, np.array([20, 40, 220]) / 255
REFUSED = {
    "g_external_missing_bin.gltf": "nothere.bin",
    "x_index_out_of_range.glb": "vertex 9,999",
    "x_no_position.glb": "POSITION",
}
SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)


class Builder:
    """A .glb put together from arrays and JSON."""

    def __init__(self):
        self.data = bytearray()
        self.json = {"asset": {"version": "2.0"}, "accessors": [], "bufferViews": [], "buffers": [{}]}

    def view(self, content: bytes, **fields) -> int:
        self.json["bufferViews"].append(
            {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(content), **fields}
        )
        self.data += content + bytes(-len(content) % 4)
        return len(self.json["bufferViews"]) - 1

    def accessor(self, array: np.ndarray, **fields) -> int:
        array = np.asarray(array)
        component = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}[array.dtype.str[1:]]
        kind = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}[1 if array.ndim == 1 else array.shape[1]]
        entry = {
            "bufferView": self.view(array.tobytes()),
            "componentType": component,
            "type": kind,
            "count": len(array),
        }
        self.json["accessors"].append(entry | fields)
        return len(self.json["accessors"]) - 1

    def image(self, pixels: np.ndarray) -> "Builder":
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        self.json.setdefault("images", []).append(
            {"bufferView": self.view(stream.getvalue()), "mimeType": "image/png"}
        )
        return self

    def scene(self, attributes: dict, nodes: list | None = None, **primitive) -> "Builder":
        self.json["meshes"] = [{"primitives": [{"attributes": attributes, **primitive}]}]
        self.json["nodes"] = nodes or [{"mesh": 0}]
        self.json["scenes"] = [{"nodes": [0]}]
        return self

    def square(self, uv=None, color=None, material: dict | None = None, position=SQUARE, **primitive) -> "Builder":
        attributes = {"POSITION": self.accessor(np.asarray(position, np.float32))}
        if uv is not None:
            attributes["TEXCOORD_0"] = self.accessor(np.broadcast_to(np.asarray(uv, np.float32), (len(position), 2)))
        if color is not None:
            attributes["COLOR_0"] = self.accessor(
                np.tile(color, (len(position), 1)), normalized=color.dtype.kind == "u"
            )
        if material is not None:
            self.json["materials"], primitive["material"] = [material], 0
        return self.scene(attributes, **primitive)

    def save(self, folder: Path) -> Path:
        self.json["buffers"][0]["byteLength"] = len(self.data)
        return write_glb(folder / "built.glb", self.json, bytes(self.data))


def write_glb(path: Path, content: dict, data: bytes) -> Path:
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I", len(text)) + b"JSON" + text + struct.pack("<I", len(data)) + b"BIN\0" + data
    path.write_bytes(b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks)
    return path


def split_glb(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<I", content[12:16])[0]
    return json.loads(content[20 : 20 + size]), content[28 + size :]


def read_color(path: Path, num_points: int = 64) -> np.ndarray:
    """The color (3,) that all points have."""
    color = load_point_cloud(path, num_points)[:, 3:]
    np.testing.assert_allclose(color, np.broadcast_to(color[:1], color.shape), atol=1e-6)
    return color[0]


def halves(path: Path, num_points: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Median colors where x is small and where it is large."""
    cloud = load_point_cloud(path, num_points)
    x, color = cloud[:, 0], cloud[:, 3:]
    return np.median(color[x < np.quantile(x, 0.3)], 0), np.median(color[x > np.quantile(x, 0.7)], 0)


def refused(path: Path, *words: str, **arguments):
    with pytest.raises(PointCloudError) as caught:
        load_point_cloud(path, 64, **arguments)
    for word in (str(path), *words):
        assert word in str(caught.value), caught.value


def texture(**fields) -> dict:
    return {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0, **fields}}}


@pytest.mark.parametrize("path", sorted(CASES.glob("*.gl*")), ids=lambda path: path.name)
def test_cases(path):
    if path.name.split(".")[0].endswith(("draco", "meshopt")):
        pytest.importorskip("DracoPy" if "draco" in path.name else "meshopt")
    if path.name in REFUSED:
        refused(path, REFUSED[path.name])
    elif read_expected()[path.name] == "none":
        with pytest.warns(UserWarning, match="no color"):
            assert not load_point_cloud(path, 64)[:, 3:].any()
    else:
        left, right = halves(path)
        np.testing.assert_allclose(left, LEFT, atol=0.02)
        np.testing.assert_allclose(right, RIGHT, atol=0.02)


# ---- Colors ---------------------------------------------------------------------------------------------------------


def test_srgb_and_linear_are_inverse():
    values = np.linspace(0, 1, 256)
    np.testing.assert_allclose(to_srgb(to_linear(values)), values, atol=1e-7)
    np.testing.assert_allclose(to_linear(np.array([0.5])), 0.21404, atol=1e-5)


def test_factor_texture_and_vertex_color_multiply_in_linear_light(tmp_path):
    pixels = np.full((2, 2, 3), [100, 200, 50], np.uint8)
    material = texture() | {"alphaMode": "OPAQUE"}
    material["pbrMetallicRoughness"]["baseColorFactor"] = [0.5, 0.25, 1, 1]
    builder = Builder().image(pixels).square([0.5, 0.5], np.array([[255, 128, 64]], np.uint8), material)
    builder.json["textures"] = [{"source": 0}]
    linear = to_linear(np.array([100, 200, 50]) / 255) * [0.5, 0.25, 1] * to_linear(np.array([255, 128, 64]) / 255)
    np.testing.assert_allclose(read_color(builder.save(tmp_path)), to_srgb(linear), atol=1e-5)


@pytest.mark.parametrize(
    "color",
    [
        np.array([[51, 102, 204]], np.uint8),
        np.array([[51, 102, 204, 255]], np.uint8),
        np.array([[13107, 26214, 52428]], np.uint16),
        np.array([[0.2, 0.4, 0.8, 1]], np.float32),
    ],
)
@pytest.mark.parametrize("material", [None, {}])
def test_vertex_colors_are_srgb_and_linear_from_blender(tmp_path, color, material):
    builder = Builder().square(None, color, material)
    np.testing.assert_allclose(read_color(builder.save(tmp_path)), [0.2, 0.4, 0.8], atol=1e-5)
    builder.json["asset"]["generator"] = "Khronos glTF Blender I/O v4.2.57"
    np.testing.assert_allclose(read_color(builder.save(tmp_path)), to_srgb(np.array([0.2, 0.4, 0.8])), atol=1e-5)


def test_a_material_that_says_nothing_is_white(tmp_path):
    np.testing.assert_array_equal(read_color(Builder().square(material={}).save(tmp_path)), [1, 1, 1])


def test_a_black_surface_that_glows_has_the_color_of_its_light(tmp_path):
    material = {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 0, 1]}, "emissiveFactor": [1, 0.5, 0]}
    color = read_color(Builder().square(material=material).save(tmp_path))
    np.testing.assert_allclose(color, to_srgb(np.array([1, 0.5, 0])), atol=1e-6)


def test_transparent_parts_are_sampled_elsewhere(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, :2], pixels[:, 2:] = [255, 0, 0, 10], [0, 255, 0, 200]
    for mode, num_red in (("MASK", 0), ("BLEND", 1), ("OPAQUE", 1)):
        builder = Builder().image(pixels).square(material=texture() | {"alphaMode": mode})
        builder.json["textures"] = [{"source": 0}]
        builder.json["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_0"] = builder.accessor(SQUARE[:, :2])
        cloud = load_point_cloud(builder.save(tmp_path), 500)
        red = cloud[:, 3] == 1
        assert len(cloud) == 500 and bool(red.any()) == bool(num_red)
        assert len(np.unique(cloud, axis=0)) == 500
    pixels[:, :2, 3] = 0
    builder = Builder().image(pixels).square([0.1, 0.1], material=texture() | {"alphaMode": "BLEND"})
    builder.json["textures"] = [{"source": 0}]
    with pytest.warns(UserWarning, match="transparent everywhere"):
        np.testing.assert_array_equal(read_color(builder.save(tmp_path)), [1, 0, 0])


# ---- Textures -------------------------------------------------------------------------------------------------------

TEXELS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)  # top row, bottom row


@pytest.mark.parametrize(
    ("uv", "wrap", "transform", "texel"),
    [
        ((0.0, 0.0), 10497, None, (0, 0)),  # the first row is on top, also at the very edge
        ((0.75, 0.25), 10497, None, (0, 1)),
        ((0.25, 0.75), 10497, None, (1, 0)),
        ((1.25, -0.25), 10497, None, (1, 0)),
        ((1.25, -0.25), 33071, None, (0, 1)),
        ((1.25, -0.25), 33648, None, (0, 1)),
        ((2.25, 1.75), 33648, None, (0, 0)),
        ((0.25, 0.25), 10497, {"offset": [0.5, 0]}, (0, 1)),
        ((0.5, 0.1), 10497, {"scale": [0.5, 6]}, (1, 0)),
        ((0.25, 0.1), 10497, {"rotation": np.pi / 2}, (1, 0)),  # (u, v) becomes (v, -u)
        ((0.1, 0.35), 10497, {"rotation": np.pi / 2, "scale": [2, 2], "offset": [0, 0.1]}, (1, 1)),
    ],
)
def test_wrap_modes_and_transforms(tmp_path, uv, wrap, transform, texel):
    fields = {} if transform is None else {"extensions": {"KHR_texture_transform": transform}}
    builder = Builder().image(TEXELS).square(uv, material=texture(**fields))
    builder.json |= {"textures": [{"source": 0, "sampler": 0}], "samplers": [{"wrapS": wrap, "wrapT": wrap}]}
    np.testing.assert_allclose(read_color(builder.save(tmp_path)), TEXELS[texel] / 255, atol=1e-6)


def test_a_texture_that_is_missing_or_broken_is_reported_once(tmp_path):
    material = texture()
    material["pbrMetallicRoughness"]["baseColorFactor"] = [0, 1, 0, 1]
    builder = Builder().square([0.5, 0.5], material=material)
    builder.json |= {"textures": [{"source": 0}], "images": [{"uri": "gone%20away.png"}]}
    builder.json["materials"].append(material)
    builder.json["meshes"][0]["primitives"] *= 2
    path = builder.save(tmp_path)
    for content, word in ((None, "gone away.png"), (b"no picture", "gone%20away.png")):
        if content:
            (tmp_path / "gone away.png").write_bytes(content)
        with pytest.warns(UserWarning, match=word) as caught:
            np.testing.assert_array_equal(read_color(path), [0, 1, 0])
        assert len(caught) == 1 and str(path) in str(caught[0].message)


@pytest.mark.parametrize(
    "uri",
    [
        "a b.png",
        "a%20b.png",
        ".\\sub\\A.png",
        "A%20B.PNG",
        "sub/a.png",
        "C:\\Users\\me\\a b.png",
        "file:///x/a%20b.png",
    ],
)
def test_images_beside_the_file(tmp_path, uri):
    (tmp_path / "sub").mkdir()
    for name in ("a b.png", "sub/A.png"):
        Image.fromarray(TEXELS[:1, :1]).save(tmp_path / name)
    builder = Builder().square([0.5, 0.5], material=texture())
    builder.json |= {"textures": [{"source": 0}], "images": [{"uri": uri}]}
    np.testing.assert_array_equal(read_color(builder.save(tmp_path)), [1, 0, 0])


def test_one_conversion_for_many_materials(tmp_path, monkeypatch):
    builder = Builder().image(np.full((64, 64, 3), [255, 0, 0], np.uint8)).square([0.5, 0.5], material=texture())
    builder.json |= {"textures": [{"source": 0}] * 400, "materials": [texture() for _ in range(400)]}
    primitive = builder.json["meshes"][0]["primitives"][0]
    builder.json["meshes"][0]["primitives"] = [primitive | {"material": index} for index in range(400)]
    calls = []
    convert = meshes_minigpt3d.image_pixels
    monkeypatch.setattr(meshes_minigpt3d, "image_pixels", lambda image: calls.append(1) or convert(image))
    np.testing.assert_array_equal(read_color(builder.save(tmp_path), 2000), [1, 0, 0])
    assert len(calls) == 1


def test_sixteen_bits_of_gray():
    gray = np.array([[0, 65535], [32896, 257]], np.uint16)
    pixels = meshes_minigpt3d.image_pixels(Image.fromarray(gray))
    np.testing.assert_array_equal(pixels[..., 0], [[0, 255], [128, 1]])
    assert pixels.shape == (2, 2, 4) and (pixels[..., 3] == 255).all()


@pytest.mark.parametrize("codec", ["etc1s", "uastc"])
def test_basis_textures(tmp_path, codec, monkeypatch):
    builder = Builder().square(material=texture())
    builder.json["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_0"] = builder.accessor(SQUARE[:, :2])
    view = builder.view((CASES / f"two_{codec}.ktx2").read_bytes())
    builder.json["textures"] = [{"extensions": {"KHR_texture_basisu": {"source": 0}}}]
    builder.json["images"] = [{"bufferView": view, "mimeType": "image/ktx2"}]
    path = builder.save(tmp_path)
    pytest.importorskip("opengl_basisu")
    left, right = halves(path)
    np.testing.assert_allclose(left, LEFT, atol=0.02)
    np.testing.assert_allclose(right, RIGHT, atol=0.02)
    monkeypatch.setitem(sys.modules, "opengl_basisu", None)
    with pytest.warns(UserWarning, match="KHR_texture_basisu.*pip install 'opengl_basisu'"):
        np.testing.assert_array_equal(read_color(path), [0, 0, 0])  # white is its factor's default and no color


# ---- Scenes and geometry --------------------------------------------------------------------------------------------


def extent(path: Path) -> np.ndarray:
    """Side lengths, the largest 1."""
    side = np.ptp(load_point_cloud(path, 4000)[:, :3], axis=0)
    return side / side.max()


def test_nodes_multiply_and_a_matrix_is_column_major(tmp_path):
    nodes = [
        {"children": [1], "scale": [2, 1, 1]},
        {"children": [2, 3], "rotation": [0, 0, np.sqrt(0.5), np.sqrt(0.5)]},
        {"mesh": 0},
        {"mesh": 0, "matrix": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 3, 0, 0, 1]},
    ]
    path = Builder().square(nodes=nodes).save(tmp_path)  # turned, x becomes y: 4 high and 1 wide, then twice as wide
    np.testing.assert_allclose(extent(path), [0.5, 1, 0], atol=0.02)


def test_the_default_scene_is_read(tmp_path):
    builder = Builder().square(nodes=[{"mesh": 0, "scale": [9, 1, 1]}, {"mesh": 0, "scale": [1, 4, 1]}])
    builder.json |= {"scene": 1, "scenes": [{"nodes": [0]}, {"nodes": [1]}]}
    np.testing.assert_allclose(extent(builder.save(tmp_path)), [0.25, 1, 0], atol=0.02)
    del builder.json["scene"]
    np.testing.assert_allclose(extent(builder.save(tmp_path)), [1, 1 / 9, 0], atol=0.02)
    del builder.json["scenes"]
    np.testing.assert_allclose(extent(builder.save(tmp_path)), [1, 4 / 9, 0], atol=0.02)


def test_instances_with_and_without_all_attributes(tmp_path):
    builder = Builder()
    attributes = {
        "TRANSLATION": builder.accessor(np.array([[0, 0, 0], [3, 0, 0]], np.float32)),
        "SCALE": builder.accessor(np.array([[1, 1, 1], [1, 2, 1]], np.float32)),
    }
    node = {"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": attributes}}, "scale": [1, 3, 1]}
    path = builder.square(color=np.array([[255, 0, 0]], np.uint8), nodes=[node]).save(tmp_path)
    np.testing.assert_allclose(extent(path), [4 / 6, 1, 0], atol=0.02)
    np.testing.assert_array_equal(read_color(path), [1, 0, 0])


def test_large_meshes_share_their_colors_at_all_places(tmp_path, monkeypatch):
    builder = Builder().square(color=np.array([[255, 0, 0]], np.uint8), nodes=[{"children": [1, 2]}, {"mesh": 0}])
    builder.json["nodes"].append({"mesh": 0, "translation": [9, 0, 0]})
    path = builder.save(tmp_path)
    together = load_point_cloud(path, 500)
    monkeypatch.setattr(gltf_minigpt3d, "_FACES_AT_ONCE", 1)
    assert len(gltf_minigpt3d.read_gltf(path)) == 2
    np.testing.assert_array_equal(load_point_cloud(path, 500), together)


def test_skins_ignore_their_node_and_follow_their_joints(tmp_path):
    builder = Builder()
    attributes = {
        "POSITION": builder.accessor(SQUARE),
        "JOINTS_0": builder.accessor(np.column_stack([SQUARE[:, 0] > 0.5, np.zeros((6, 3))]).astype(np.uint8)),
        "WEIGHTS_0": builder.accessor(np.tile(np.array([[1, 0, 0, 0]], np.float32), (6, 1))),
    }
    inverse = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    inverse[1, 3, 0] = -1  # column-major: moves x by −1
    builder.scene(attributes, [{"mesh": 0, "skin": 0, "scale": [1, 50, 1]}, {}, {"translation": [4, 0, 0]}])
    builder.json["skins"] = [{"joints": [1, 2], "inverseBindMatrices": builder.accessor(inverse.reshape(2, 16))}]
    builder.json["scenes"] = [{"nodes": [0, 1]}]  # a joint may be outside
    np.testing.assert_allclose(extent(builder.save(tmp_path)), [1, 0.25, 0], atol=0.02)


def test_morph_targets_at_rest(tmp_path):
    builder = Builder()
    target = {"POSITION": builder.accessor(SQUARE * np.float32([2, 0, 0]))}
    builder.square(targets=[target])
    builder.json["meshes"][0]["weights"] = [0.5]
    np.testing.assert_allclose(extent(builder.save(tmp_path)), [1, 0.5, 0], atol=0.02)
    builder.json["nodes"][0]["weights"] = [1.0]
    np.testing.assert_allclose(extent(builder.save(tmp_path)), [1, 1 / 3, 0], atol=0.02)


@pytest.mark.parametrize(("mode", "rows"), [(4, [0, 1, 2, 0, 2, 3]), (5, [0, 1, 3, 2]), (6, [0, 1, 2, 3])])
def test_triangles_strips_and_fans(tmp_path, mode, rows):
    corners = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]], np.float32)
    for indexed in (True, False):
        builder = Builder()
        attributes = {"POSITION": builder.accessor(corners if indexed else corners[rows])}
        indices = {"indices": builder.accessor(np.array(rows, np.uint16))} if indexed else {}
        path = builder.scene(attributes, mode=mode, **indices).save(tmp_path)
        np.testing.assert_allclose(extent(path), [1, 0.5, 0], atol=0.01)
        above = load_point_cloud(path, 4000)
        assert abs((above[:, 0] / 2 > above[:, 1]).mean() - 0.5) < 0.05  # both triangles are there


def test_quantized_and_interleaved_positions(tmp_path):
    builder = Builder()
    rows = np.zeros(6, [("position", "<i2", 3), ("pad", "<u2"), ("color", "u1", 4)])
    rows["position"], rows["color"] = SQUARE * [32767, 16383, 0], [0, 255, 0, 255]
    view = builder.view(rows.tobytes(), byteStride=12)
    builder.json["accessors"] = [
        {"bufferView": view, "componentType": 5122, "type": "VEC3", "count": 6, "normalized": True},
        {"bufferView": view, "componentType": 5121, "type": "VEC4", "count": 6, "normalized": True, "byteOffset": 8},
    ]
    path = builder.scene({"POSITION": 0, "COLOR_0": 1}).save(tmp_path)
    np.testing.assert_allclose(extent(path), [1, 0.5, 0], atol=0.02)
    np.testing.assert_array_equal(read_color(path), [0, 1, 0])


def test_points_with_vertex_colors_and_with_a_material(tmp_path):
    color = np.array([[255, 0, 0]], np.uint8)
    np.testing.assert_array_equal(read_color(Builder().square(color=color, mode=0).save(tmp_path)), [1, 0, 0])
    green = {"pbrMetallicRoughness": {"baseColorFactor": [0, 1, 0, 1]}}
    np.testing.assert_array_equal(read_color(Builder().square(material=green, mode=0).save(tmp_path)), [0, 1, 0])
    path = Builder().square(mode=0).save(tmp_path)
    np.testing.assert_array_equal(load_point_cloud(path, 6, missing_color="white")[:, 3:], np.ones((6, 3)))
    refused(Builder().square(mode=1).save(tmp_path), "no triangles and no points")


def test_far_from_the_origin_the_shape_is_kept(tmp_path):
    near = load_point_cloud(Builder().square().save(tmp_path), 500)
    nodes = [{"mesh": 0, "translation": [500_000.25, 5_400_000.5, 300]}]
    np.testing.assert_allclose(load_point_cloud(Builder().square(nodes=nodes).save(tmp_path), 500), near, atol=1e-6)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_gltf_as_text_with_a_data_uri(tmp_path, encoding):
    builder = Builder().square(color=np.array([[0, 0, 255]], np.uint8))
    text = base64.b64encode(bytes(builder.data)).decode().rstrip("=")
    builder.json["buffers"] = [
        {"uri": f"data:application/octet-stream;base64,{text}", "byteLength": len(builder.data)}
    ]
    (tmp_path / "scene.gltf").write_bytes(json.dumps(builder.json).encode(encoding))
    np.testing.assert_array_equal(read_color(tmp_path / "scene.gltf"), [0, 0, 1])


# ---- Compressed parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "extension"),
    [
        ("c_g_texture_draco.glb", "DracoPy", "KHR_draco_mesh_compression"),
        ("c_g_texture_meshopt.glb", "meshopt", "EXT_meshopt_compression"),
    ],
)
def test_a_missing_decoder_is_named_with_its_install_command(monkeypatch, name, module, extension):
    monkeypatch.setitem(sys.modules, module, None)
    refused(CASES / name, extension, f"pip install '{module}'")
    with pytest.raises(ImportError):  # so that callers can tell it from a damaged file
        load_point_cloud(CASES / name)


def test_meshopt_with_a_filter_and_index_sequences(tmp_path):
    meshopt = pytest.importorskip("meshopt")
    builder = Builder()
    packed = [
        (meshopt.encode_filter_exp(SQUARE * np.float32([2, 1, 1]), 15), 12, "ATTRIBUTES", "EXPONENTIAL"),
        (np.arange(6, dtype=np.uint32), 4, "INDICES", "NONE"),
    ]
    for content, stride, mode, filter_name in packed:
        data = meshopt.encode_gltf_buffer(content, mode)
        view = builder.view(data)
        entry = builder.json["bufferViews"][view]
        packing = entry | {"byteStride": stride, "count": 6, "mode": mode, "filter": filter_name}
        builder.json["bufferViews"][view] = {
            "buffer": 1, "byteLength": 6 * stride, "extensions": {"EXT_meshopt_compression": packing}
        }  # fmt: skip
    builder.json["buffers"].append({"byteLength": 96, "extensions": {"EXT_meshopt_compression": {"fallback": True}}})
    builder.json["accessors"] = [
        {"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": 6},
        {"bufferView": 1, "componentType": 5125, "type": "SCALAR", "count": 6},
    ]
    path = builder.scene({"POSITION": 0}, indices=1).save(tmp_path)
    np.testing.assert_allclose(extent(path), [1, 0.5, 0], atol=0.02)


# ---- Damaged and excessive files ------------------------------------------------------------------------------------


def changed(tmp_path: Path, change) -> Path:
    builder = Builder().square([0.5, 0.5], np.array([[255, 0, 0]], np.uint8), {})
    change(builder.json)
    return builder.save(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda j: j["asset"].update(version="1.0"), ("glTF 1.0", "glTF 2.0")),
        (lambda j: j["nodes"][0].update(children=[0]), ("node 0", "below itself")),
        (lambda j: j.update(nodes=[{"children": [2]}, {"children": [2]}, {"mesh": 0}], scenes=[{"nodes": [0, 1]}]), ("two parents",)),
        (lambda j: j["accessors"][0].update(count=10**6), ("accessor 0", "1,000,000 values")),
        (lambda j: j["accessors"][0].update(count=10**12), ("333,333,333,333 faces",)),
        (lambda j: j["accessors"][0].update(count=4.5), ("count", "4.5")),
        (lambda j: j["accessors"][0].update(byteOffset=-12), ("byteOffset", "-12")),
        (lambda j: j["bufferViews"][0].update(byteLength=10**9), ("buffer view 0", "truncated")),
        (lambda j: j["accessors"].__setitem__(0, {"componentType": 5126, "type": "VEC3", "count": 46_000_000}), ("would unpack to",)),
        (lambda j: j["accessors"][0].update(sparse={"count": 10**11, "indices": {"bufferView": 0, "componentType": 5125}, "values": {"bufferView": 0}}), ("sparse",)),
        (lambda j: j["meshes"][0]["primitives"][0].update(mode=9), ("mode 9",)),
        (lambda j: j["meshes"][0]["primitives"][0].update(material=4), ("entry 4 of its materials",)),
        (lambda j: j["nodes"][0].update(rotation="turned"), ("not valid glTF",)),
        (lambda j: j["nodes"][0].update(skin=0), ("skins",)),
        (lambda j: j.update(scene=7), ("entry 7 of its scenes",)),
        (lambda j: j["buffers"][0].update(uri="https://host.example/a.bin"), ("https://host.example", "download")),
        (lambda j: j["buffers"][0].update(uri="/dev/zero"), ("zero", "outside")),
        (lambda j: j["buffers"][0].update(uri="../../../../../../etc/passwd"), ("passwd", "outside")),
        (lambda j: j.update(meshes=[], nodes=[], scenes=[{}]), ("no triangles",)),
    ],
)  # fmt: skip
def test_damaged_files_name_the_reason(tmp_path, change, words):
    refused(changed(tmp_path, change), *words)


def test_an_unknown_required_extension_is_reported(tmp_path):
    path = changed(tmp_path, lambda j: j.update(extensionsRequired=["KHR_materials_unlit", "ACME_hologram"]))
    with pytest.warns(UserWarning, match="requires ACME_hologram,"):
        load_point_cloud(path, 64)


def test_version_one_and_truncated_binaries(tmp_path):
    path = Builder().square().save(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<I", 1) + content[8:])
    refused(path, "glTF 1")
    path.write_bytes(content[: len(content) - 20])
    refused(path, "truncated")
    path.write_bytes(b'{"asset": ' + b"[" * 100_000)
    refused(path, "nested too deeply")


@pytest.mark.parametrize(
    ("limit", "value", "word"),
    [
        ("max_nodes", 1, "2 nodes"),
        ("max_primitives", 1, "more than the 1 parts"),
        ("max_faces", 3, "4 faces"),
        ("max_texture_pixels", 4095, "4,096 pixels"),
        ("max_json_values", 10, "values allowed"),
        ("max_json_bytes", 10, "bytes allowed"),
    ],
)
def test_limits(tmp_path, limit, value, word):
    builder = Builder().image(np.zeros((64, 64, 3), np.uint8)).square([0.5, 0.5], material=texture())
    builder.json |= {
        "nodes": [{"mesh": 0}, {"mesh": 0, "weights": [1]}],
        "scenes": [{"nodes": [0, 1]}],
        "textures": [{"source": 0}],
    }
    path = builder.save(tmp_path)
    load_point_cloud(path, 64)
    refused(path, word, limits=ReadingLimits(**{limit: value}))
    load_point_cloud(path, 64)


def test_draco_holds_what_its_accessors_say(tmp_path):
    draco = pytest.importorskip("DracoPy")
    grid = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0), [0.0]), -1).reshape(-1, 3)
    corner = np.array([row * 9 + column for row in range(8) for column in range(8)])
    data = draco.encode(grid, np.stack([corner, corner + 1, corner + 9], axis=1).astype(np.uint32))
    mesh = draco.decode(data)
    counts = len(mesh.points), 3 * len(mesh.faces)
    for factor in (1, 0.5):
        builder = Builder()
        view = builder.view(data)
        builder.json["accessors"] = [
            {"componentType": 5126, "type": "VEC3", "count": int(factor * counts[0])},
            {"componentType": 5125, "type": "SCALAR", "count": int(factor * counts[1])},
        ]
        packed = {"KHR_draco_mesh_compression": {"bufferView": view, "attributes": {"POSITION": 0}}}
        path = builder.scene({"POSITION": 0}, indices=1, extensions=packed).save(tmp_path)
        if factor == 1:
            load_point_cloud(path, 64)
            refused(path, "would unpack", limits=ReadingLimits(max_decoded_bytes=1000))
        else:
            refused(path, "its accessors say")


def test_files_outside_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "object").mkdir()
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "secret.png")
    builder = Builder().square([0.5, 0.5], material=texture())
    builder.json |= {"images": [{"uri": "../secret.png"}], "textures": [{"source": 0}]}
    with pytest.warns(UserWarning, match="outside of its folder"):
        assert not load_point_cloud(builder.save(tmp_path / "object"), 64)[:, 3:].any()
    (tmp_path / "object" / "secret.png").write_bytes((tmp_path / "secret.png").read_bytes())
    np.testing.assert_array_equal(read_color(builder.save(tmp_path / "object")), [1, 0, 0])


def test_instances_are_counted_before_they_are_made(tmp_path):
    builder = Builder()
    builder.json["accessors"] = [{"componentType": 5126, "type": "VEC3", "count": 10**9}]
    node = {"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": 0}}}}
    refused(builder.square(nodes=[node]).save(tmp_path), "1,000,000,000 instances")


DAMAGE = [-1, 0, 1, 255, 10**9, 2**63, 10**30, 0.5, 1e308, float("nan"), None, True, "", "x", [], {}, [1], {"a": 1}]


def test_any_damage_ends_in_a_cloud_or_a_named_error(tmp_path):
    rng = random.Random(0)
    seeds = [path for path in sorted(CASES.glob("*.glb")) if path.name not in REFUSED]
    path, outcomes = tmp_path / "damaged.glb", {"cloud": 0, "error": 0}
    for _ in range(200):
        content, data = split_glb(rng.choice(seeds).read_bytes())
        places = []
        waiting = [content]
        while waiting:
            entry = waiting.pop()
            keys = list(entry) if isinstance(entry, dict) else range(len(entry))
            places += [(entry, key) for key in keys]
            waiting += [entry[key] for key in keys if isinstance(entry[key], (dict, list))]
        entry, key = rng.choice(places)
        entry[key] = copy.deepcopy(rng.choice(DAMAGE))
        write_glb(path, content, data)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert np.isfinite(load_point_cloud(path, 64)).all()
                outcomes["cloud"] += 1
            except PointCloudError as error:
                assert str(path) in str(error)
                outcomes["error"] += 1
        assert time.perf_counter() - start < 10
    assert min(outcomes.values()) > 20
