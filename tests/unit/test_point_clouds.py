"""Point clouds: formats, colors, sampling, normalization, and a message for each kind of bad input."""

import hashlib
import io
import re
import subprocess
import sys
import time
import zipfile

import laspy
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from plyfile import PlyData, PlyElement
from pypcd4 import Encoding, PointCloud

from minigpt3d.point_cloud_minigpt3d import READABLE_SUFFIXES, PointCloudError, ReadingLimits, load_point_cloud


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def make_cloud(num_points: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """xyz (N, 3) float32 in a box of unequal sides, rgb (N, 3) uint8."""
    rng = np.random.default_rng(seed)
    coord = (rng.random((num_points, 3)) * [4, 2, 1] + [10, -3, 5]).astype(np.float32)
    coord = np.round(coord * 64) / 64  # so that a compressed file of it is smaller
    return coord, rng.integers(0, 256, (num_points, 3), dtype=np.uint8)


def normalized(coord: np.ndarray) -> np.ndarray:
    coord = coord.astype(np.float64) - coord.astype(np.float64).mean(0)
    return coord / np.linalg.norm(coord, axis=1).max()


def check(cloud: np.ndarray, num_points: int):
    assert cloud.shape == (num_points, 6) and cloud.dtype == np.float32
    np.testing.assert_allclose(cloud[:, :3].mean(0, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(cloud[:, :3], axis=1).max(), 1, atol=1e-6)
    assert cloud[:, 3:].min() >= 0 and cloud[:, 3:].max() <= 1


# Files of points


def write_ply(path, coord, color, text):
    columns = [("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    rows = np.array([(*c, *r) for c, r in zip(coord, color, strict=True)], dtype=columns)
    PlyData([PlyElement.describe(rows, "vertex")], text=text).write(path)


def write_pcd(path, coord, color, encoding):
    packed = PointCloud.encode_rgb(color).astype(np.float32)
    cloud = PointCloud.from_xyzrgb_points(np.column_stack([coord, packed]))
    cloud.save(path, encoding)
    if (
        encoding == Encoding.ASCII
    ):  # pypcd4 prints ten decimals, which lose the bits of a packed color; PCL prints digits
        head = path.read_text().partition("DATA ascii\n")[0]
        rows = (" ".join(f"{value:.9g}" for value in row) for row in np.column_stack([coord, packed]))
        path.write_text(head + "DATA ascii\n" + "\n".join(rows) + "\n")
    assert f"DATA {encoding.value}\n".encode() in path.read_bytes()


def write_las(path, coord, color, scale=257):
    header = laspy.LasHeader(point_format=2, version="1.2")
    header.scales, header.offsets = [1e-5] * 3, coord.astype(np.float64).min(0)
    scan = laspy.LasData(header)
    scan.x, scan.y, scan.z = coord.astype(np.float64).T
    scan.red, scan.green, scan.blue = color.astype(np.uint16).T * scale
    scan.write(str(path))


def write_text(path, coord, color, delimiter=" ", header="", colors_as=int):
    rows = [
        delimiter.join([*(repr(float(v)) for v in c), *(str(colors_as(v)) for v in r)])
        for c, r in zip(coord, color, strict=True)
    ]
    path.write_text("\n".join([*([header] if header else []), *rows]) + "\n")


WRITERS = {
    "ascii.ply": lambda p, c, r: write_ply(p, c, r, True),
    "binary.ply": lambda p, c, r: write_ply(p, c, r, False),
    "float.npy": lambda p, c, r: np.save(p, np.concatenate([c, r / np.float32(255)], axis=1)),
    "byte_colors.npy": lambda p, c, r: np.save(p, np.concatenate([c, r.astype(np.float32)], axis=1)),
    "fortran.npy": lambda p, c, r: np.save(p, np.asfortranarray(np.concatenate([c, r / np.float32(255)], axis=1))),
    "one.npz": lambda p, c, r: np.savez_compressed(p, anything=np.concatenate([c, r / 255], axis=1)),
    "named.npz": lambda p, c, r: np.savez(p, points=c, colors=r, labels=np.zeros(3)),
    "ascii.pcd": lambda p, c, r: write_pcd(p, c, r, Encoding.ASCII),
    "binary.pcd": lambda p, c, r: write_pcd(p, c, r, Encoding.BINARY),
    "compressed.pcd": lambda p, c, r: write_pcd(p, c, r, Encoding.BINARY_COMPRESSED),
    "blanks.xyz": lambda p, c, r: write_text(p, c, r),
    "comment.txt": lambda p, c, r: write_text(p, c, r, "\t", f"# made by hand\n{len(c)}"),
    "plain.csv": lambda p, c, r: write_text(p, c, r, ","),
    "header.csv": lambda p, c, r: write_text(p, c, r, ", ", "X,Y,Z,Red,Green,Blue"),
    "semicolons.csv": lambda p, c, r: write_text(p, c, r, ";", '"x";"y";"z";"r";"g";"b"'),
    "unit_colors.txt": lambda p, c, r: write_text(p, c, r / 255, " ", "//x y z r g b", float),
    "scan.las": write_las,
    "scan.laz": write_las,
    "byte_colors.las": lambda p, c, r: write_las(p, c, r, scale=1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_points(tmp_path, name):
    coord, color = make_cloud()
    WRITERS[name](tmp_path / name, coord, color)
    cloud = load_point_cloud(tmp_path / name, num_points=200)
    check(cloud, 200)
    np.testing.assert_allclose(cloud[:, :3], normalized(coord), atol=1e-5)
    np.testing.assert_allclose(cloud[:, 3:], color / 255, atol=1e-6)
    np.testing.assert_array_equal(cloud, load_point_cloud(str(tmp_path / name), num_points=200))


def test_columns_are_found_by_name(tmp_path):
    coord, color = make_cloud()
    path = tmp_path / "scan.csv"
    rows = np.column_stack([np.arange(200), color, coord])
    np.savetxt(path, rows, delimiter=",", header="intensity,red,green,blue,x,y,z", comments="")
    cloud = load_point_cloud(path, num_points=200)
    np.testing.assert_allclose(cloud[:, :3], normalized(coord), atol=1e-5)
    np.testing.assert_allclose(cloud[:, 3:], color / 255, atol=1e-6)


def test_arrays_tensors_and_trimesh_point_clouds(tmp_path):
    coord, color = make_cloud()
    array = np.concatenate([coord, color / np.float32(255)], axis=1)
    expected = load_point_cloud(array, num_points=200)
    np.testing.assert_allclose(expected[:, :3], normalized(coord), atol=1e-6)
    sources = [torch.from_numpy(array), torch.from_numpy(array).requires_grad_(), trimesh.PointCloud(coord, color)]
    for source in sources:
        np.testing.assert_allclose(load_point_cloud(source, num_points=200), expected, atol=1e-6)
    half = load_point_cloud(torch.from_numpy(array).bfloat16(), num_points=200)
    np.testing.assert_allclose(half, expected, atol=0.03)
    scene = trimesh.Scene([trimesh.PointCloud(coord[:100], color[:100]), trimesh.PointCloud(coord[100:], color[100:])])
    np.testing.assert_allclose(np.sort(load_point_cloud(scene, num_points=200), 0), np.sort(expected, 0), atol=1e-6)


def test_vertices_without_faces_are_points(tmp_path):
    coord = make_cloud(100)[0]
    (tmp_path / "points.obj").write_text("".join(f"v {x!r} {y!r} {z!r}\n" for x, y, z in coord.tolist()))
    for source in (trimesh.PointCloud(coord), tmp_path / "points.obj"):
        cloud = load_point_cloud(source, 100, missing_color="white")
        np.testing.assert_allclose(cloud[:, :3], normalized(coord), atol=1e-6)
        assert (cloud[:, 3:] == 1).all()


def test_masked_points_are_dropped():
    coord, color = make_cloud(100)
    array = np.concatenate([coord, color], axis=1)
    mask = np.zeros(array.shape, bool)
    mask[[3, 70], [0, 4]] = True
    expected = load_point_cloud(np.delete(array, [3, 70], axis=0), 98)
    np.testing.assert_array_equal(load_point_cloud(np.ma.array(array, mask=mask), 98), expected)


def test_ascii_ply_reads_as_binary_does_without_plyfile(tmp_path, monkeypatch):
    """plyfile would take ten times as long for text."""
    coord, color = make_cloud()
    write_ply(tmp_path / "binary.ply", coord, color // 128, text=False)  # bytes of 0 and 1 are still bytes
    write_ply(tmp_path / "ascii.ply", coord, color // 128, text=True)
    expected = load_point_cloud(tmp_path / "binary.ply")
    monkeypatch.setitem(sys.modules, "plyfile", None)
    np.testing.assert_allclose(load_point_cloud(tmp_path / "ascii.ply"), expected, atol=1e-6)


def test_comments_in_another_encoding(tmp_path):
    (tmp_path / "cloud.txt").write_bytes("# caf\xe9\n0 0 0\n1 1 1\n".encode("latin1"))
    check(load_point_cloud(tmp_path / "cloud.txt", 10), 10)


# Meshes


def box(color=None, by="vertex") -> trimesh.Trimesh:
    mesh = trimesh.creation.box(extents=(1, 2, 4))
    if color is not None:
        setattr(
            mesh.visual,
            f"{by}_colors",
            np.tile([*color, 255], (len(getattr(mesh, {"vertex": "vertices", "face": "faces"}[by])), 1)),
        )
    return mesh


def on_box_surface(cloud: np.ndarray) -> bool:
    """Whether a normalized sample of the 1 × 2 × 4 box lies on its surface, up to the sample's own mean and norm."""
    coord = cloud[:, :3]
    half = (coord.max(0) - coord.min(0)) / 2
    middle = (coord.max(0) + coord.min(0)) / 2
    np.testing.assert_allclose(half / half[0], [1, 2, 4], rtol=0.02)
    return np.isclose(np.abs(coord - middle) / half, 1, atol=0.02).any(1).all()


@pytest.mark.parametrize("suffix", [".stl", ".off", ".obj", ".glb", ".gltf", ".3mf", ".ply", "ascii.ply"])
def test_meshes_are_sampled_on_their_surface(tmp_path, suffix):
    path = tmp_path / f"box{'.' if suffix[0] != '.' else ''}{suffix}"
    if suffix == ".gltf":
        path = tmp_path / "box.gltf"
        for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene([box()])).items():
            (tmp_path / ("box.gltf" if name.endswith(".gltf") else name)).write_bytes(content)
    elif suffix == "ascii.ply":
        path.write_bytes(trimesh.exchange.ply.export_ply(box(), encoding="ascii"))
    elif suffix == ".3mf":
        write_3mf(path, box())
    else:
        box().export(path)
    cloud = load_point_cloud(path, num_points=4000)
    check(cloud, 4000)
    assert on_box_surface(cloud)
    np.testing.assert_array_equal(cloud, load_point_cloud(path, num_points=4000))
    assert not np.array_equal(cloud, load_point_cloud(path, num_points=4000, seed=1))


def write_3mf(path, mesh):
    vertices = "".join(f'<vertex x="{x}" y="{y}" z="{z}"/>' for x, y, z in mesh.vertices)
    triangles = "".join(f'<triangle v1="{a}" v2="{b}" v3="{c}"/>' for a, b, c in mesh.faces)
    model = (
        '<?xml version="1.0"?><model unit="millimeter" xmlns="http://schemas.microsoft.com/3dmanufacturing/core/2015/02">'
        f'<resources><object id="1" type="model"><mesh><vertices>{vertices}</vertices><triangles>{triangles}</triangles>'
        '</mesh></object></resources><build><item objectid="1"/></build></model>'
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("3D/3dmodel.model", model)


def test_faces_are_sampled_by_area():
    cloud = load_point_cloud(trimesh.creation.box(extents=(1, 2, 4)), num_points=20000)
    coord = cloud[:, :3] / (cloud[:, 2].max() - cloud[:, 2].min()) * 4
    on_end = np.isclose(np.abs(coord[:, 2]), 2, atol=0.03).mean()  # two faces of 2, of 28 in all
    assert abs(on_end - 4 / 28) < 0.02


@pytest.mark.parametrize("by", ["vertex", "face"])
def test_vertex_and_face_colors(tmp_path, by):
    cloud = load_point_cloud(box(RED, by), num_points=500)
    np.testing.assert_array_equal(cloud[:, 3:], np.tile([1, 0, 0], (500, 1)))
    box(RED, by).export(tmp_path / "box.ply")
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "box.ply", num_points=500)[:, 3:], cloud[:, 3:])


def test_vertex_colors_are_interpolated():
    mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    mesh.visual.vertex_colors = [[*RED, 255], [*GREEN, 255], [*BLUE, 255]]
    cloud = load_point_cloud(mesh, num_points=1000)
    np.testing.assert_allclose(cloud[:, 3:].sum(1), 1, atol=1e-6)
    shift = cloud[:, :3] / (cloud[:, 0].max() - cloud[:, 0].min())
    green = cloud[:, 4] - cloud[:, 4].mean()
    assert np.corrcoef(green, shift[:, 0])[0, 1] > 0.999  # green grows along x, to the second vertex


def write_obj(folder, texture=True, texture_file=True):
    """Two squares side by side along x: the left one textured (left half red, right half green), the right one blue."""
    mtl = "newmtl painted\nKd 1 1 0\n" + ("map_Kd picture.png\n" if texture else "") + "newmtl plain\nKd 0 0 1\n"
    (folder / "square.mtl").write_text(mtl)
    if texture_file:
        image = np.zeros((32, 64, 3), np.uint8)
        image[:, :32], image[:, 32:] = RED, GREEN
        Image.fromarray(image).save(folder / "picture.png")
    (folder / "square.obj").write_text(
        "mtllib square.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 2 0 0\nv 2 1 0\n"
        "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        "usemtl painted\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\nusemtl plain\nf 2 5 6\nf 2 6 3\n"
    )
    return folder / "square.obj"


def thirds(cloud: np.ndarray) -> list[np.ndarray]:
    """Colors in x of 0–0.5, 0.5–1 and 1–2 of `write_obj`, borders left out."""
    x = cloud[:, 0]
    x = (x - x.min()) / (x.max() - x.min()) * 2
    return [cloud[(low + 0.05 < x) & (x < high - 0.05), 3:] for low, high in ((0, 0.5), (0.5, 1), (1, 2))]


def assert_colors(parts, *expected):
    for part, color in zip(parts, expected, strict=True):
        assert len(part) > 50
        np.testing.assert_allclose(part, np.tile(np.array(color) / 255, (len(part), 1)), atol=0.01)


def test_obj_with_texture_and_materials(tmp_path):
    assert_colors(thirds(load_point_cloud(write_obj(tmp_path), num_points=2000)), RED, GREEN, BLUE)


def test_obj_without_texture_takes_the_diffuse_color(tmp_path):
    yellow = (255, 255, 0)
    assert_colors(thirds(load_point_cloud(write_obj(tmp_path, texture=False), 2000)), yellow, yellow, BLUE)


def test_obj_whose_texture_file_is_missing_takes_the_diffuse_color(tmp_path):
    yellow = (255, 255, 0)
    assert_colors(thirds(load_point_cloud(write_obj(tmp_path, texture_file=False), 2000)), yellow, yellow, BLUE)


def test_obj_without_its_mtl_has_no_color(tmp_path):
    path = write_obj(tmp_path)
    (tmp_path / "square.mtl").unlink()
    white = load_point_cloud(path, 500, missing_color="white")
    np.testing.assert_array_equal(white[:, 3:], np.ones((500, 3)))


def test_texture_runs_top_to_bottom_and_repeats():
    image = np.zeros((2, 1, 3), np.uint8)
    image[0], image[1] = RED, GREEN  # the first row of an image is its top, v = 1
    square = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    uv = np.array([[0, 3], [1, 3], [1, 4], [0, 4]], float)  # three repeats away
    visual = trimesh.visual.TextureVisuals(uv=uv, image=Image.fromarray(image))
    mesh = trimesh.Trimesh(square, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)
    cloud = load_point_cloud(mesh, num_points=1000)
    above = cloud[:, 1] > (cloud[:, 1].max() + cloud[:, 1].min()) / 2 + 0.02
    below = cloud[:, 1] < (cloud[:, 1].max() + cloud[:, 1].min()) / 2 - 0.02
    np.testing.assert_array_equal(np.unique(cloud[above, 3:], axis=0), [[1, 0, 0]])
    np.testing.assert_array_equal(np.unique(cloud[below, 3:], axis=0), [[0, 1, 0]])


def test_several_materials_in_one_mesh():
    materials = [trimesh.visual.material.SimpleMaterial(diffuse=[*color, 255]) for color in (RED, BLUE)]
    visual = trimesh.visual.TextureVisuals(
        uv=np.zeros((6, 2)), material=trimesh.visual.material.MultiMaterial(materials), face_materials=[0, 1]
    )
    vertices = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [6, 0, 0], [5, 1, 0]]
    mesh = trimesh.Trimesh(vertices, [[0, 1, 2], [3, 4, 5]], visual=visual, process=False)
    cloud = load_point_cloud(mesh, num_points=400)
    left = cloud[:, 0] < 0
    np.testing.assert_array_equal(cloud[left, 3:], np.tile([1, 0, 0], (left.sum(), 1)))
    np.testing.assert_array_equal(cloud[~left, 3:], np.tile([0, 0, 1], ((~left).sum(), 1)))


def test_glb_with_texture_and_base_color(tmp_path):
    image = np.full((4, 4, 3), 255, np.uint8)
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(image), baseColorFactor=[0, 255, 0, 255]
    )
    mesh = box()
    mesh.visual = trimesh.visual.TextureVisuals(uv=np.random.default_rng(0).random((8, 2)), material=material)
    mesh.export(tmp_path / "box.glb")
    cloud = load_point_cloud(tmp_path / "box.glb", num_points=300)
    np.testing.assert_allclose(cloud[:, 3:], np.tile([0, 1, 0], (300, 1)), atol=0.01)


def placed_boxes() -> trimesh.Scene:
    """One red box used twice, the second time 10 to the right and twice as large, and a bare box 10 up."""
    scene = trimesh.Scene()
    right = trimesh.transformations.translation_matrix([10, 0, 0]) @ trimesh.transformations.scale_matrix(2)
    scene.add_geometry(
        trimesh.creation.box(), geom_name="bare", transform=trimesh.transformations.translation_matrix([0, 10, 0])
    )
    red = trimesh.creation.box()
    red.visual.face_colors = [*RED, 255]
    scene.add_geometry(red, geom_name="red", node_name="first")
    scene.graph.update("second", matrix=right, geometry="red")
    return scene


@pytest.mark.parametrize("as_file", [False, True])
def test_scenes_keep_their_transforms(tmp_path, as_file):
    source = placed_boxes()
    if as_file:
        source.export(tmp_path / "scene.glb")
        source = tmp_path / "scene.glb"
    cloud = load_point_cloud(source, num_points=6000, missing_color="white")
    check(cloud, 6000)
    coord = cloud[:, :3] / (cloud[:, 0].max() - cloud[:, 0].min()) * 11.5
    coord = coord - coord.min(0) - [0.5, 0.5, 1]  # the first box about the origin
    right, up = coord[:, 0] > 5, coord[:, 1] > 5
    np.testing.assert_allclose(np.ptp(coord[right], axis=0), 2, atol=0.05)
    np.testing.assert_allclose(np.ptp(coord[up], axis=0), 1, atol=0.05)
    assert abs(right.mean() - 24 / 36) < 0.03 and abs(up.mean() - 6 / 36) < 0.03
    if not as_file:
        np.testing.assert_array_equal(np.unique(cloud[up, 3:], axis=0), [[1, 1, 1]])
        np.testing.assert_array_equal(np.unique(cloud[~up, 3:], axis=0), [[1, 0, 0]])


def test_another_process_makes_the_same_cloud_and_imports_only_what_it_needs(tmp_path):
    placed_boxes().export(tmp_path / "scene.glb")
    program = """
import sys, hashlib, numpy
from minigpt3d.point_cloud_minigpt3d import load_point_cloud
print([reader for reader in ("trimesh", "plyfile", "laspy", "pypcd4") if reader in sys.modules])
numpy.random.seed(7)
print(hashlib.sha256(load_point_cloud(sys.argv[1]).tobytes()).hexdigest())
"""
    environment = {"PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", program, str(tmp_path / "scene.glb")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    here = hashlib.sha256(load_point_cloud(tmp_path / "scene.glb").tobytes()).hexdigest()
    assert done.stdout.splitlines()[-2:] == ["[]", here]


# Colors


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.array([0.0, 0.5, 1.0]), [0, 0.5, 1]),
        (np.array([0.0, 51.0, 255.0]), [0, 0.2, 1]),
        (np.array([0, 51, 255], np.uint8), [0, 0.2, 1]),
        (np.array([0, 1, 1], np.uint8), [0, 1 / 255, 1 / 255]),  # bytes, however dark
        (np.array([0, 13107, 65535], np.uint16), [0, 0.2, 1]),
        (np.array([0, 51, 255], np.int64), [0, 0.2, 1]),
        (np.array([-1e-8, 0.5, 1.0000001]), [0, 0.5, 1]),  # rounding of interpolation
        (np.array([-1e-3, 0.5, 1.001]), [0, 0.5, 1]),
        (np.array([-1e-8, 51, 255.0001]), [0, 0.2, 1]),
    ],
)
def test_color_range_by_dtype_and_range(tmp_path, stored, expected):
    path = tmp_path / "cloud.npz"
    np.savez(path, points=make_cloud(3)[0], colors=np.repeat(stored[:, None], 3, axis=1))
    cloud = load_point_cloud(path, 3)
    check(cloud, 3)
    np.testing.assert_allclose(cloud[:, 3], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("missing_color", "expected"),
    [
        ("black", 0),
        ("gray", 0.5),
        ("white", 1),
        ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3)),
        ([0.1, 0.2, 0.3], (0.1, 0.2, 0.3)),
    ],
)
def test_missing_color(missing_color, expected):
    for source in (make_cloud()[0], box()):
        cloud = load_point_cloud(source, 50, missing_color=missing_color)
        np.testing.assert_allclose(cloud[:, 3:], np.broadcast_to(np.float32(expected), (50, 3)))


def test_missing_color_is_black_by_default():
    assert not load_point_cloud(make_cloud()[0])[:, 3:].any()


def test_las_with_colors_that_are_all_zero(tmp_path):
    coord, color = make_cloud()
    write_las(tmp_path / "scan.las", coord, color * 0)
    assert (load_point_cloud(tmp_path / "scan.las", 200, missing_color="white")[:, 3:] == 1).all()


# Sampling


def test_more_points_are_sampled_without_repeats_and_keep_shape():
    coord, color = make_cloud(50_000)
    cloud = load_point_cloud(np.concatenate([coord, color], axis=1), num_points=8192)
    check(cloud, 8192)
    assert len(np.unique(cloud, axis=0)) == 8192
    side = np.ptp(cloud[:, :3], axis=0)
    np.testing.assert_allclose(side / side[2], [4, 2, 1], rtol=0.02)
    np.testing.assert_allclose(cloud[:, 3:].mean(0), color.mean(0) / 255, atol=0.01)


def test_sampling_does_not_touch_the_global_generator():
    state = np.random.get_state()[1].copy()
    torch_state = torch.get_rng_state()
    load_point_cloud(make_cloud(1000)[0], 100)
    load_point_cloud(box(), 100)
    assert (np.random.get_state()[1] == state).all() and torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("count", [2, 63, 64, 150, 199])
def test_fewer_points_are_repeated_evenly(count):
    coord = make_cloud(count)[0]
    _, repeats = np.unique(load_point_cloud(coord, 200), axis=0, return_counts=True)
    assert len(repeats) == count and repeats.max() - repeats.min() <= 1


def test_as_many_points_keep_their_order():
    coord = make_cloud(128)[0]
    np.testing.assert_allclose(load_point_cloud(coord, 128)[:, :3], normalized(coord), atol=1e-6)


def test_a_scan_of_millions_of_points_is_read_within_seconds(tmp_path):
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).random((2_000_000, 6), np.float32))
    start = time.perf_counter()
    check(load_point_cloud(tmp_path / "scan.npy"), 8192)
    assert time.perf_counter() - start < 5


# Normalization


def test_normalization_equals_the_authors(golden):
    facts = golden("data_facts.io")
    for stored, expected in (
        ("pc_norm.input", "pc_norm.output"),
        ("dataset.simple_description.stored", "dataset.simple_description.pc"),
        ("dataset.single_round.stored", "dataset.single_round.pc"),
    ):
        cloud, expected = facts[stored].clone(), facts[expected]
        out_of_range = bool(cloud[:, 3:].min() < 0)
        if out_of_range:  # the authors keep colors out of range; this reader refuses them
            cloud[:, 3:] = 0
        ours = load_point_cloud(cloud, num_points=len(cloud))
        np.testing.assert_allclose(ours[:, :3], expected[:, :3], atol=1e-6)
        if not out_of_range:
            np.testing.assert_allclose(ours[:, 3:], expected[:, 3:], atol=1e-7)


def test_modelnet_clouds_are_black(golden):
    facts = golden("data_facts.io")
    ours = load_point_cloud(facts["modelnet.input"][:, :3], num_points=48)  # its other columns are normals
    np.testing.assert_allclose(ours, facts["modelnet.output_color"], atol=1e-6)


@pytest.mark.parametrize("shift", [(0, 0, 0), (500_000.0, 5_400_000.0, 300.0), (-1e7, 0, 1e7)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_normalization_ignores_translation_and_scale(shift, scale):
    coord = make_cloud(300)[0].astype(np.float64)
    expected = load_point_cloud(coord, 300)
    if scale < 1:
        shift = np.multiply(shift, scale)  # double precision limits the shape that a shift leaves
    np.testing.assert_allclose(load_point_cloud(coord * scale + shift, 300), expected, atol=1e-6)


def test_far_away_scans_keep_their_shape(tmp_path):
    coord, color = make_cloud()
    far = coord.astype(np.float64) + [500_000, 5_400_000, 300]
    write_las(tmp_path / "far.las", far, color)
    np.testing.assert_allclose(load_point_cloud(tmp_path / "far.las", 200)[:, :3], normalized(coord), atol=1e-4)
    mesh = box()
    near = load_point_cloud(mesh, 500)
    mesh.apply_translation([500_000, 5_400_000, 300])
    np.testing.assert_allclose(load_point_cloud(mesh, 500), near, atol=1e-6)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_up_axis_becomes_y_without_a_mirror(axis):
    coord = make_cloud(100)[0]
    turned = load_point_cloud(coord, 100, up_axis=axis)[:, :3]
    plain = load_point_cloud(coord, 100)[:, :3]
    np.testing.assert_allclose(turned[:, 1], plain[:, "xyz".index(axis)], atol=1e-6)
    rotation = np.linalg.lstsq(plain, turned, rcond=None)[0]
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-4)
    if axis == "y":
        np.testing.assert_array_equal(turned, plain)


# Bad input


def refused(source, *words, **arguments):
    with pytest.raises(PointCloudError) as caught:
        load_point_cloud(source, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, *([str(source)] if not hasattr(source, "shape") and not isinstance(source, list) else [])):
        assert word in message, message
    return message


def saved(tmp_path, array, name="cloud.npy", **arguments):
    np.save(tmp_path / name, array, **arguments)
    return tmp_path / name


def test_empty_clouds(tmp_path):
    refused(np.zeros((0, 6)), "empty (0 points)")
    refused(saved(tmp_path, np.zeros((0, 3))), "empty (0 points)")
    (tmp_path / "nothing.ply").touch()
    refused(tmp_path / "nothing.ply", "empty (0 bytes)")
    (tmp_path / "nothing.txt").write_text("# x y z\n\n")
    refused(tmp_path / "nothing.txt", "no rows of numbers")
    (tmp_path / "nothing.obj").write_text("# no vertices\n")
    refused(tmp_path / "nothing.obj")
    PlyData([PlyElement.describe(np.zeros(0, [("x", "f4"), ("y", "f4"), ("z", "f4")]), "vertex")]).write(
        tmp_path / "zero.ply"
    )
    refused(tmp_path / "zero.ply", "empty (0 points)")
    header = laspy.LasHeader(point_format=2, version="1.2")
    laspy.LasData(header).write(str(tmp_path / "zero.las"))
    refused(tmp_path / "zero.las", "empty (0 points)")


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 5), (5, 8), (2, 5, 6), ()])
def test_wrong_shapes(tmp_path, shape):
    refused(np.ones(shape), "(points, 3)", "(points, 6)", str(shape))
    refused(saved(tmp_path, np.ones(shape)), "(points, 3)", str(shape))


def test_wrong_columns(tmp_path):
    (tmp_path / "cloud.txt").write_text("1 2 3 4 5\n5 6 7 8 9\n")
    refused(tmp_path / "cloud.txt", "expected 3 columns", "got 5")
    np.savez(tmp_path / "cloud.npz", a=np.ones((5, 3)), b=np.ones((5, 3)))
    refused(tmp_path / "cloud.npz", "which of its arrays", "a, b")
    np.savez(tmp_path / "unequal.npz", points=np.ones((5, 3)), colors=np.ones((4, 3)))
    refused(tmp_path / "unequal.npz", "one rgb per point", "(4, 3)")
    rows = np.ones(4, [("u", "f4"), ("v", "f4")])
    PlyData([PlyElement.describe(rows, "vertex")]).write(tmp_path / "uv.ply")
    refused(tmp_path / "uv.ply", "no x, y, z", "u, v")


def test_wrong_types():
    refused(np.full((5, 3), "a"), "real numbers")
    refused(np.ones((5, 3), complex), "real numbers")
    with pytest.raises(PointCloudError, match="neither bytes nor a path"):
        load_point_cloud({"points": 1})
    for num_points in (0, "8", 2.5, None):
        with pytest.raises(ValueError, match=f"num_points.*at least 1.* {num_points!r}"):
            load_point_cloud(make_cloud()[0], num_points=num_points)
    with pytest.raises(ValueError, match="up_axis .*'x', 'y', 'z'.*'up'"):
        load_point_cloud(make_cloud()[0], up_axis="up")
    for color in ("pink", (0, 0, 255), (1, 1)):
        with pytest.raises(ValueError, match="missing_color must be one of"):
            load_point_cloud(make_cloud()[0], missing_color=color)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_few_bad_points_are_dropped_and_many_refused(tmp_path, bad):
    coord = make_cloud(100)[0]
    coord[[3, 70], [0, 2]] = bad
    with pytest.warns(UserWarning, match="2 of 100 points.*dropped"):
        cloud = load_point_cloud(saved(tmp_path, coord), 98)
    np.testing.assert_allclose(cloud[:, :3], normalized(np.delete(coord, [3, 70], axis=0)), atol=1e-6)
    coord[:60, 1] = bad
    refused(saved(tmp_path, coord), "61 of 100 points are NaN or infinite")


def test_bad_colors_and_vertices_are_bad_points():
    coord, color = make_cloud(100)
    array = np.concatenate([coord, color / np.float32(255)], axis=1)
    array[5, 4] = np.nan
    with pytest.warns(UserWarning, match="1 of 100 points"):
        check(load_point_cloud(array, 99), 99)
    mesh = trimesh.creation.icosphere()
    vertices = mesh.vertices.copy()
    vertices[0] = np.nan
    broken = trimesh.Trimesh(vertices, mesh.faces, process=False)
    with pytest.warns(UserWarning, match="faces are NaN or infinite"):
        check(load_point_cloud(broken, 500), 500)


def test_points_without_extent(tmp_path):
    refused(np.full((50, 3), 0.1), "all its points are equal", "0.1")
    refused(saved(tmp_path, np.full((1, 3), 5.0)), "all its points are equal")
    refused(np.array([[1e308, 0, 0], [-1e308, 0, 0], [0, 1e308, 0]]), "too large")
    flat = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
    with pytest.raises(PointCloudError, match="1 faces.*area"):
        load_point_cloud(flat)


@pytest.mark.parametrize(
    "color",
    [np.full((9, 3), -0.1), np.full((9, 3), 256.0), np.full((9, 3), 70000, np.int64), np.full((9, 3), -1, np.int8)],
)
def test_colors_out_of_range(tmp_path, color):
    np.savez(tmp_path / "cloud.npz", points=make_cloud(9)[0], colors=color)
    refused(tmp_path / "cloud.npz", "colors are out of range", f"{color.min():g}", "0 to 255")


def test_unknown_extensions_missing_files_and_folders(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    refused(tmp_path / "notes.md", "'.md' are not known", *READABLE_SUFFIXES)
    (tmp_path / "noname").write_text("hello")
    refused(tmp_path / "noname", "(no extension)")
    refused(tmp_path / "absent.ply", "no such file")
    refused(tmp_path, "this is a folder")


def all_files(folder) -> list:
    """A good file of every kind."""
    coord, color = make_cloud(400)
    for name, write in WRITERS.items():
        write(folder / name, coord, color)
    ball = trimesh.creation.icosphere(subdivisions=2)
    for suffix in (".stl", ".off", ".glb"):
        ball.export(folder / f"mesh{suffix}")
    (folder / "mesh.ply").write_bytes(trimesh.exchange.ply.export_ply(ball))
    write_3mf(folder / "mesh.3mf", ball)
    return sorted(folder.iterdir())


def test_truncated_files(tmp_path):
    """Half a file is an error, also in text formats once a row has other columns."""
    lines = {".xyz", ".txt", ".csv"}
    for path in all_files(tmp_path):
        content = path.read_bytes()
        if path.suffix in lines:
            path.write_bytes(content[: len(content) // 2] + b" 1 2 3 4 5 6 7 8\n")
        else:
            path.write_bytes(content[: len(content) // 2])
        refused(path)


@pytest.mark.parametrize("name", ["ascii.pcd", "binary.pcd", "ascii.ply", "binary.ply"])
def test_files_that_end_after_a_complete_row(tmp_path, name):
    path, short = tmp_path / name, tmp_path / f"short.{name}"
    WRITERS[name](path, *make_cloud(5))
    WRITERS[name](short, *make_cloud(2))
    header = {"pcd": rb"(?s).*?DATA \w+\n", "ply": rb"(?s).*?end_header\r?\n"}[path.suffix[1:]]
    promise = re.match(header, path.read_bytes())[0]
    path.write_bytes(promise + re.sub(header, b"", short.read_bytes(), count=1))
    refused(path, "truncated or corrupt")
    if name != "binary.ply":  # plyfile has another message
        refused(path, "header says 5", "but 2 follow")


def test_corrupt_files(tmp_path):
    noise = np.random.default_rng(0).bytes(2000)
    for suffix in READABLE_SUFFIXES:
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(noise)
        refused(path)


def test_a_corrupt_file_names_its_type_and_the_remedy(tmp_path):
    path = tmp_path / "noise.glb"
    path.write_bytes(b"not a model")
    refused(path, "cannot be read as .glb", "truncated or corrupt", "export it again")


def test_pickles_are_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    path = saved(tmp_path, np.array([Trap()], dtype=object), allow_pickle=True)
    refused(path, "pickled Python objects", "numpy.save")
    np.savez(tmp_path / "cloud.npz", points=np.array([Trap()], dtype=object))
    refused(tmp_path / "cloud.npz", "pickled Python objects")
    assert not (tmp_path / "sprung").exists()


def npy_header(shape: tuple) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_headers_that_promise_more_than_the_file_holds(tmp_path):
    promise = npy_header((10**12, 6))
    (tmp_path / "cloud.npy").write_bytes(promise + bytes(240))
    refused(tmp_path / "cloud.npy", "header says (1000000000000, 6)", "truncated or corrupt")
    with zipfile.ZipFile(tmp_path / "cloud.npz", "w") as archive:
        archive.writestr("points.npy", promise + bytes(240))
    refused(tmp_path / "cloud.npz", "header says (1000000000000, 6)")
    write_ply(tmp_path / "cloud.ply", *make_cloud(), text=False)
    content = (tmp_path / "cloud.ply").read_bytes()
    (tmp_path / "cloud.ply").write_bytes(content.replace(b"element vertex 200", b"element vertex 2000000000"))
    refused(tmp_path / "cloud.ply", "2,000,000,000 vertices")
    write_las(tmp_path / "cloud.las", *make_cloud())
    content = bytearray((tmp_path / "cloud.las").read_bytes())
    content[107:111] = (100_000_000).to_bytes(4, "little")  # the header's number of points
    (tmp_path / "cloud.las").write_bytes(content)
    refused(tmp_path / "cloud.las", "header says 100,000,000 points")


def test_zip_bombs(tmp_path):
    """40 MB of zeros in 40 kB, with a limit of 10 MB, are refused before anything is unpacked."""
    limits = ReadingLimits(max_unpacked_bytes=10_000_000)
    np.savez_compressed(tmp_path / "cloud.npz", points=np.zeros((10_000_000, 1), np.float32))
    with zipfile.ZipFile(tmp_path / "mesh.3mf", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("3D/3dmodel.model", bytes(40_000_000))
    for name in ("cloud.npz", "mesh.3mf"):
        assert (tmp_path / name).stat().st_size < 100_000
        start = time.perf_counter()
        refused(tmp_path / name, "would unpack to 40,0", "zip bomb", limits=limits)
        assert time.perf_counter() - start < 0.5
    write_pcd(tmp_path / "cloud.pcd", *make_cloud(), Encoding.BINARY_COMPRESSED)
    content = (tmp_path / "cloud.pcd").read_bytes()
    head, mark, tail = content.partition(b"DATA binary_compressed\n")
    (tmp_path / "cloud.pcd").write_bytes(head + mark + tail[:4] + (4_000_000_000).to_bytes(4, "little") + tail[8:])
    refused(tmp_path / "cloud.pcd", "would unpack to 4,000,000,000 bytes", limits=limits)


def test_zip_bombs_by_their_ratio(tmp_path):
    """5 MB from 5 kB are refused; from a tenth of their size, or below the floor, they are read."""
    zeros = np.zeros((200_000, 6), np.float32)
    zeros[0] = 1
    np.savez_compressed(tmp_path / "bomb.npz", points=zeros)
    check(load_point_cloud(tmp_path / "bomb.npz", 500_000), 500_000)
    limits = ReadingLimits(ratio_floor_bytes=1_000_000)
    refused(tmp_path / "bomb.npz", "would unpack to 4,800,128 bytes", "zip bomb", limits=limits)
    zeros[:40_000, :3] = make_cloud(40_000)[0]
    np.savez_compressed(tmp_path / "cloud.npz", points=zeros)
    check(load_point_cloud(tmp_path / "cloud.npz", limits=limits), 8192)


def test_a_missing_reader_is_named_with_its_install_command(tmp_path, monkeypatch):
    WRITERS["binary.ply"](tmp_path / "cloud.ply", *make_cloud())
    monkeypatch.setitem(sys.modules, "plyfile", None)
    with pytest.raises(ImportError, match=r"pip install 'plyfile'"):
        load_point_cloud(tmp_path / "cloud.ply")
