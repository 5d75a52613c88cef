"""Named nodes of scenes: which there are, what each holds, and pictures."""

import io
import json
import zipfile

import numpy as np
import pytest
import trimesh
from PIL import Image

from minigpt3d.data.reading import FileReader
from minigpt3d.data.scene import SceneNode, load, may_have_nodes, split_scenes
from minigpt3d.data.thumbnails import SIZE, draw_thumbnail
from minigpt3d.point_cloud_minigpt3d import load_orientations, read_content
from minigpt3d.readers_minigpt3d import PointCloudError


ARGUMENTS = {"num_points": 256, "missing_color": "black", "up_axis": None, "seed": 0, "clean": "none"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BOX = """v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0
o flat
f 1 2 3 4
v 5 0 0\nv 6 0 0\nv 6 0 9\nv 5 0 9
o long
g top
f 5 6 7
g bottom
f 5 7 8
"""
DAE = """<?xml version="1.0"?><COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">
<asset><up_axis>Y_UP</up_axis></asset><library_geometries><geometry id="m"><mesh>
<source id="p"><float_array id="a" count="9">0 0 0 1 0 0 0 1 0</float_array><technique_common>
<accessor source="#a" count="3" stride="3"><param name="X" type="float"/><param name="Y" type="float"/>
<param name="Z" type="float"/></accessor></technique_common></source><vertices id="v"><input semantic="POSITION" source="#p"/>
</vertices><triangles count="1"><input semantic="VERTEX" source="#v" offset="0"/><p>0 1 2</p></triangles></mesh></geometry>
</library_geometries><library_visual_scenes><visual_scene id="s" name="s">
<node id="first" name="first"><instance_geometry url="#m"/></node>
<node id="second" name="second"><translate>5 0 0</translate><instance_geometry url="#m"/></node>
</visual_scene></library_visual_scenes><scene><instance_visual_scene url="#s"/></scene></COLLADA>"""
MESH = """  def Mesh "%s" {
    int[] faceVertexCounts = [3]
    int[] faceVertexIndices = [0, 1, 2]
    point3f[] points = [(0, 0, 0), (1, 0, 0), (0, %d, 0)]
  }
"""
USD = '#usda 1.0\ndef Xform "room" {\n' + MESH % ("one", 1) + MESH % ("two", 2) + "}\n"
MODEL = """<model unit="millimeter" xmlns="http://schemas.microsoft.com/3dmanufacturing/core/2015/02"><resources>
<object id="1" name="leg" type="model"><mesh><vertices><vertex x="0" y="0" z="0"/><vertex x="1" y="0" z="0"/>
<vertex x="0" y="1" z="2"/></vertices><triangles><triangle v1="0" v2="1" v3="2"/></triangles></mesh></object>
<object id="2" name="table" type="model"><components><component objectid="1"/>
<component objectid="1" transform="1 0 0 0 1 0 0 0 1 7 0 0"/></components></object></resources>
<build><item objectid="2"/></build></model>"""


def write_glb(path, nodes: list[dict]):
    """A glTF whose only mesh is a triangle (1 × 2)."""
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0]], dtype=np.float32).tobytes()
    content = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": nodes,
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": len(points)}],
        "buffers": [{"byteLength": len(points)}],
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    body = len(text).to_bytes(4, "little") + b"JSON" + text + len(points).to_bytes(4, "little") + b"BIN\0" + points
    path.write_bytes(b"glTF" + (2).to_bytes(4, "little") + (12 + len(body)).to_bytes(4, "little") + body)


def names(path) -> list[str]:
    return [name for _, name in load(path, lists_nodes=True)]


def sides(path, name: str) -> np.ndarray:
    """Of the bounding box of the first node of this name, relative to the longest."""
    number = next(number for number, of_node in load(path, lists_nodes=True) if of_node == name)
    (orientation,), _, _ = load(SceneNode(path, number, name), **ARGUMENTS)
    extent = np.ptp(orientation.cloud[:, :3], axis=0)
    return extent / extent.max()


def test_nodes_of_a_gltf(tmp_path):
    path = tmp_path / "scene.glb"
    write_glb(
        path,
        [
            {"name": "room", "children": [1, 2, 4, 5]},
            {"name": "a", "mesh": 0},
            {"children": [3], "translation": [9, 0, 0]},
            {"name": "b", "mesh": 0, "scale": [8, 1, 1]},
            {"name": "a", "mesh": 0},
            {"name": "camera"},
        ],
    )
    # Of one name there may be several; an unnamed node has no row, nor one without a surface.
    assert sorted(names(path)) == ["a", "a", "b", "room"]
    assert sides(path, "a")[0] == pytest.approx(0.5, abs=0.05)
    assert sides(path, "b")[1] == pytest.approx(0.25, abs=0.05)
    assert len(read_content(path)) == 1  # without nodes, places of one mesh are read together


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("scene.obj", BOX, ["bottom", "flat", "long", "top"]),
        ("scene.dae", DAE, ["first", "second"]),
        ("scene.usda", USD, ["one", "room", "two"]),
        ("scene.3mf", MODEL, ["leg", "leg", "table"]),
    ],
)
def test_nodes_of_other_formats(tmp_path, name, content, expected):
    if name.endswith((".dae", ".usda")):
        pytest.importorskip("assimp_py" if name.endswith("dae") else "pxr")
    path = tmp_path / name
    path.write_text(content)
    if name.endswith("3mf"):
        path.unlink()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("3D/3dmodel.model", content)
    assert sorted(set(names(path)) - {"s"}) == sorted(set(expected))
    assert len([one for one in names(path) if one != "s"]) == len(expected)
    whole, _ = load_orientations(path, **ARGUMENTS)
    assert len(whole) == 1
    if name == "scene.obj":
        assert sides(path, "flat")[2] == 0 and sides(path, "long")[1] == 0
        assert sides(path, "long")[0] == pytest.approx(1 / 9, abs=0.02)


def test_files_without_nodes_stay_whole(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(50, 3)))
    trimesh.creation.box().export(tmp_path / "box.stl")
    (tmp_path / "broken.glb").write_bytes(b"glTF")
    write_glb(tmp_path / "scene.glb", [{"name": "x", "mesh": 0}])
    paths = [tmp_path / name for name in ("points.npy", "box.stl", "broken.glb", "scene.glb")]
    with FileReader(load) as reader:
        sources = list(split_scenes(reader, [*paths, "https://example.com/scene.glb"]))
        assert sources[:3] == paths[:3] and sources[3] == SceneNode(paths[3], 0, "x")
        (result,) = reader.read_files(sources[3:4], **ARGUMENTS)
        assert result.error is None and result.content[0][0].cloud.shape == (256, 6)
    assert may_have_nodes(tmp_path / "a.OBJ.gz") and not may_have_nodes(tmp_path / "a.ply")


def test_a_node_that_is_gone(tmp_path):
    write_glb(tmp_path / "scene.glb", [{"name": "x", "mesh": 0}])
    with pytest.raises(PointCloudError, match="no such node"):
        load(SceneNode(tmp_path / "scene.glb", 5, "y"), **ARGUMENTS)


def test_pictures():
    rng = np.random.default_rng(0)
    cloud = np.zeros((2000, 6), dtype=np.float32)
    cloud[:, :2] = rng.uniform(-1, 1, (2000, 2))
    cloud[:, 3] = 1
    image = np.asarray(Image.open(io.BytesIO(draw_thumbnail(cloud))).convert("RGBA"), dtype=int)
    assert image.shape == (SIZE, SIZE, 4)
    seen = image[..., 3] > 128
    assert 0.3 < seen.mean() < 0.95 and not seen[0].any()
    assert (image[seen][:, 0] > 60).all() and (image[seen][:, 1:3] < 30).all()
    gray = np.asarray(Image.open(io.BytesIO(draw_thumbnail(cloud, has_color=False))).convert("RGBA"), dtype=int)
    assert np.ptp(gray[gray[..., 3] > 128][:, :3], axis=1).max() < 25


@pytest.mark.parametrize("cloud", [np.zeros((1, 6)), np.ones((5, 6)), np.eye(6)[:3]])
def test_pictures_of_hardly_any_points(cloud):
    assert Image.open(io.BytesIO(draw_thumbnail(cloud))).size == (SIZE, SIZE)
