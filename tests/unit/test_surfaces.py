"""Meshes from OBJ, OFF, STL, 3MF, PLY and the further formats: colors, names of files, and files that do harm.

In tests/cases/ an object is (200, 100, 50) where x is smallest and (20, 40, 220) where it is largest.
"""

import gzip
import io
import re
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt3d.formats_minigpt3d import _read_usd
from minigpt3d.meshes_minigpt3d import Textures, image_pixels
from minigpt3d.point_cloud_minigpt3d import PointCloudError, ReadingLimits, load_point_cloud
from minigpt3d.scenes_minigpt3d import _ModelTarget, read_3mf


CASES = Path(__file__).parents[1] / "cases"
LEFT, RIGHT = np.array([200, 100, 50]) / 255, np.array([20, 40, 220]) / 255


def verdict(path: Path) -> str:
    """ "colored" as it should be, "colorless", or what it is instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cloud = load_point_cloud(path, num_points=2048)
    x, color = cloud[:, 0], cloud[:, 3:]
    low, high = (np.median(color[part], 0) for part in (x < np.quantile(x, 0.3), x > np.quantile(x, 0.7)))
    if np.allclose(low, LEFT, atol=0.02) and np.allclose(high, RIGHT, atol=0.02):
        return "colored"
    return "colorless" if color.max() < 0.01 else f"{(255 * low).round()} {(255 * high).round()}"


# ---- OBJ ------------------------------------------------------------------------------------------------------------


def lines_of(name: str) -> str:
    """An OBJ without its mtllib."""
    return re.sub(r"(?m)^mtllib.*\n", "", (CASES / name).read_text())


MATERIALS = "newmtl ma\nKd 0.784314 0.392157 0.196078\nnewmtl mb\nKd 0.0784314 0.156863 0.862745\n"


@pytest.mark.parametrize(
    "mtllib",
    [
        "A.MTL",
        '"a.mtl"',
        "C:\\\\Users\\\\me\\\\a.mtl",
        "./x/../a.mtl",
        "none.mtl a.mtl",
        "a.mtl # the colors",
        "%61.mtl",
    ],
)
def test_mtl_names(tmp_path, mtllib):
    (tmp_path / "x").mkdir()
    (tmp_path / "a.mtl").write_text(MATERIALS)
    (tmp_path / "a.obj").write_text(f"mtllib {mtllib}\n".replace("\\\\", "\\") + lines_of("obj_kd.obj"))
    assert verdict(tmp_path / "a.obj") == "colored"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace(" ", "\t").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: re.sub(r"(?m)^", "  ", text).encode(),
        lambda text: re.sub(r"(?m)^f (\S+) ", r"f \1 \\" + "\n", text).encode(),
        lambda text: re.sub(r"(?m)^f (\S+) (\S+) (\S+)", r"f \1/ \2// \3", text).encode(),
        lambda text: text.replace("usemtl ma", "usemtl MA  # left").encode(),
        lambda text: ("# ends with a backslash \\\n" + text).encode(),
    ],
)
def test_forms_of_obj_text(tmp_path, change):
    (tmp_path / "a.mtl").write_text(MATERIALS)
    (tmp_path / "a.obj").write_bytes(change("mtllib a.mtl\n" + lines_of("obj_kd.obj")))
    assert verdict(tmp_path / "a.obj") == "colored"


@pytest.mark.parametrize(
    "left, right",
    [
        ("-s 1 1 1 -o 0 0 0 tex.png", "-clamp on tex.png"),
        ("-blendu on -mm 0 1 -bm 1 ./tex.png # c", "-texres 512 -imfchan l TEX.PNG"),
        ("textures\\tex.png", "C:\\work\\tex.png"),
    ],
)
def test_map_options(tmp_path, left, right):
    (tmp_path / "tex.png").write_bytes((CASES / "tex.png").read_bytes())
    (tmp_path / "a.mtl").write_text(f"newmtl ma\nKd 0 0 0\nmap_Kd {left}\nnewmtl mb\n  map_kd {right}\n")
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + lines_of("obj_map.obj"))
    assert verdict(tmp_path / "a.obj") == "colored"


def test_map_scale_and_offset_move_the_texture(tmp_path):
    (tmp_path / "tex.png").write_bytes((CASES / "tex.png").read_bytes())
    (tmp_path / "a.mtl").write_text(
        "newmtl ma\nmap_Kd -s .5 1 -o .25 0 tex.png\nnewmtl mb\nmap_Kd -o .25 -s .5 tex.png\n"
    )
    moved = re.sub(r"(?m)^vt (\S+)", lambda match: f"vt {float(match[1]) * 2 - 0.5}", lines_of("obj_map.obj"))
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + moved)
    assert verdict(tmp_path / "a.obj") == "colored"


@pytest.mark.parametrize("columns", [r"\1 1.0 \2", r"\1 \2 1.0"])
def test_vertex_colors_beside_w_and_alpha(tmp_path, columns):
    text = re.sub(r"(?m)^(v \S+ \S+ \S+) (.*)$", columns, lines_of("obj_vcol_and_meshlab_mtl.obj"))
    (tmp_path / "a.obj").write_text(text)
    assert verdict(tmp_path / "a.obj") == "colored"


def test_white_vertex_colors_leave_the_material(tmp_path):
    (tmp_path / "a.mtl").write_text(MATERIALS)
    text = re.sub(r"(?m)^(v \S+ \S+ \S+).*$", r"\1 1 1 1", lines_of("obj_kd.obj"))
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + text)
    assert verdict(tmp_path / "a.obj") == "colored"


@pytest.mark.parametrize("missing", ["a.mtl", "tex.png"])
def test_one_warning_for_what_is_missing(tmp_path, missing):
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + lines_of("obj_map.obj"))
    if missing == "tex.png":
        (tmp_path / "a.mtl").write_text("newmtl ma\nKd .8 .8 .8\nmap_Kd tex.png\nnewmtl mb\nmap_Kd tex.png\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cloud = load_point_cloud(tmp_path / "a.obj", 100)
    messages = [str(warning.message) for warning in caught if missing in str(warning.message)]
    assert len(messages) == 1 and str(tmp_path / "a.obj") in messages[0]
    assert cloud[:, 3:].max() == 0  # the gray beside the texture is no color


def test_textures_of_unused_materials_are_not_looked_for(tmp_path):
    (tmp_path / "a.mtl").write_text(MATERIALS + "newmtl unused\nmap_Kd no.png\nmap_Ka neither.png\n")
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + lines_of("obj_kd.obj"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_point_cloud(tmp_path / "a.obj", 100)


@pytest.mark.parametrize("outside", ["../secret.mtl", "{folder}/secret.mtl", "x/../../secret.mtl", "../../secret.mtl"])
def test_files_outside_of_the_folder_are_not_read(tmp_path, outside):
    folder = tmp_path / "object"
    folder.mkdir()
    (tmp_path / "secret.mtl").write_text(MATERIALS)
    name = outside.format(folder=tmp_path)
    (folder / "a.obj").write_text(f"mtllib {name}\nmtllib b.mtl\n" + lines_of("obj_kd.obj"))
    with pytest.warns(UserWarning, match=r"secret.mtl.*outside of the folder.*b.mtl.*not found"):
        cloud = load_point_cloud(folder / "a.obj", 100)
    assert not cloud[:, 3:].any()
    (folder / "secret.mtl").write_text(MATERIALS)  # the name is looked for inside
    assert verdict(folder / "a.obj") == "colored"


def test_names_of_textures_outside_of_the_folder(tmp_path):
    folder = tmp_path / "object"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    (folder / "a.mtl").write_text("newmtl ma\nmap_Kd ../secret.png\nnewmtl mb\nmap_Kd ../secret.png\n")
    (folder / "a.obj").write_text("mtllib a.mtl\n" + lines_of("obj_map.obj"))
    with pytest.warns(UserWarning, match=r"secret.png.*outside of the folder"):
        load_point_cloud(folder / "a.obj", 100)


# ---- Images ---------------------------------------------------------------------------------------------------------


def test_sixteen_bits_of_gray_and_many_rows():
    gray = (np.arange(600, dtype=np.uint16) * 109)[:, None].repeat(2, axis=1)
    for image in (Image.fromarray(gray), Image.fromarray(gray.astype(np.int32))):
        pixels = image_pixels(image)
        np.testing.assert_array_equal(pixels[..., 0], gray >> 8)
        assert (pixels[..., 3] == 255).all() and (pixels[..., 1] == pixels[..., 2]).all()
    color = np.random.default_rng(0).integers(0, 256, (600, 3, 4), dtype=np.uint8)
    np.testing.assert_array_equal(image_pixels(Image.fromarray(color)), color)


def test_images_that_need_other_programs_are_not_opened(monkeypatch):
    """Pillow gives EPS to Ghostscript."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(Exception, match="cannot identify|AVIF"):
        Textures().decode("a", data)


# ---- OFF and STL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("COFF\n85", "COFF85"),
        lambda text: text.replace("COFF\n85", "COFF 85"),
        lambda text: text.replace("COFF", "OFF"),
        lambda text: text.replace("COFF", "CnOFF\n3"),
        lambda text: text.replace("\n", " # comment\r\n"),
    ],
)
def test_off_headers(tmp_path, change):
    (tmp_path / "a.off").write_text(change((CASES / "off_coff.off").read_text()), newline="")
    assert verdict(tmp_path / "a.off") == "colored"


@pytest.mark.parametrize("normal", ["0 0.6 0.8", "0.577 0.577 0.577", "0 0 -1"])
@pytest.mark.parametrize("kind, scale", [("NC", 1), ("CN", 1), ("NC", 255), ("STCN", 255)])
@pytest.mark.parametrize("is_first", [True, False])
def test_off_with_normals_on_either_side_of_colors(tmp_path, normal, kind, scale, is_first):
    lines = [f"{kind}OFF", "8 2 0"]
    for x, color in ((0, LEFT), (1, LEFT), (1, RIGHT), (2, RIGHT)):
        text = " ".join(f"{value * scale:.4g}" for value in (*color, 1))
        extra = f"{normal} {text}" if is_first else f"{text} {normal}"
        lines += [f"{x} {y} 0 {extra}" + (" 0.6 0.8" if "ST" in kind else "") for y in (0, 1)]
    (tmp_path / "a.off").write_text("\n".join([*lines, "4 0 1 3 2", "4 4 5 7 6"]))
    assert verdict(tmp_path / "a.off") == "colored"


def test_stl_with_a_wrong_count(tmp_path):
    content = bytearray((CASES / "stl_viscam_color.stl").read_bytes())
    for count, said in ((1, "says 1 facets"), (0, "")):
        content[80:84] = count.to_bytes(4, "little")
        (tmp_path / "a.stl").write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_point_cloud(tmp_path / "a.stl", 100)
        assert any(said in str(warning.message) for warning in caught) if said else not caught
        assert verdict(tmp_path / "a.stl") == "colored"


def test_stl_of_several_solids(tmp_path):
    binary, text = (CASES / "stl_viscam_color.stl").read_bytes(), (CASES / "stl_ascii.stl").read_bytes()
    (tmp_path / "a.stl").write_bytes(binary * 2)
    assert verdict(tmp_path / "a.stl") == "colored"
    (tmp_path / "b.stl").write_bytes(text + text.replace(b"solid a", b"solid with a vertex"))
    assert verdict(tmp_path / "b.stl") == "colorless"


# ---- PLY ------------------------------------------------------------------------------------------------------------


def write_mixed_ply(path: Path, form: str, colors: tuple[str, str], face_colors: bool = False):
    """Two rows of triangles and quads: the left two faces in one color, the right two in the other."""
    x = np.array([0, 1, 2, 3, 4])
    coord = np.concatenate([np.stack([x, 0 * x + y, 0 * x], axis=1) for y in (0, 1)])
    faces = [[0, 1, 6, 5], [1, 2, 7], [1, 7, 6], [2, 3, 8, 7], [3, 4, 9], [3, 9, 8]]
    kind, names = colors
    scale = {"uchar": 255, "ushort": 65535, "float": 1, "double": 255}[kind]

    def paint(position: float) -> list[float]:
        color = (LEFT if position < 2 else RIGHT) * scale
        return [round(float(value), 9 if scale == 1 else 0) for value in color]

    properties = "".join(f"property {kind} {name}\n" for name in names.split())
    header = (
        f"ply\nformat {form} 1.0\nelement vertex 10\nproperty float x\nproperty float y\nproperty float z\n"
        f"{'' if face_colors else properties}element face 6\nproperty list uchar int vertex_index\n"
        f"{properties if face_colors else ''}end_header\n"
    )
    types = {"uchar": "u1", "ushort": "u2", "float": "f4", "double": "f8"}
    order, body = ">" if "big" in form else "<", []
    for point in coord:
        color = [] if face_colors else paint(point[0])
        body.append([(point, "f4"), (color, types[kind])])
    for face in faces:
        color = paint(coord[face, 0].mean()) if face_colors else []
        body.append([([len(face)], "u1"), (face, "i4"), (color, types[kind])])
    if form == "ascii":
        rows = (" ".join(str(value) for values, _ in row for value in np.asarray(values).tolist()) for row in body)
        path.write_text(header + "\n".join(rows) + "\n")
    else:
        content = b"".join(np.asarray(values).astype(order + dtype).tobytes() for row in body for values, dtype in row)
        path.write_bytes(header.encode() + content)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("face_colors", [False, True])
def test_ply_of_triangles_and_quads(tmp_path, form, face_colors):
    for kind, names in [
        ("uchar", "red green blue"),
        ("ushort", "diffuse_red diffuse_green diffuse_blue"),
        ("float", "r g b"),
        ("double", "scalar_red scalar_green scalar_blue"),
    ]:
        write_mixed_ply(tmp_path / "a.ply", form, (kind, names), face_colors)
        assert verdict(tmp_path / "a.ply") == "colored", (kind, names)


def test_ply_with_two_textures(tmp_path):
    for name, color in (("left one.png", LEFT), ("right.png", RIGHT)):
        Image.new("RGB", (4, 4), tuple((color * 255).round().astype(int).tolist())).save(tmp_path / name)
    (tmp_path / "a.ply").write_text(
        "ply\nformat ascii 1.0\ncomment TextureFile left one.png\ncomment TextureFile right.png\nelement vertex 6\n"
        "property float x\nproperty float y\nproperty float z\nelement face 2\nproperty list uchar int vertex_indices\n"
        "property list uchar float texcoord\nproperty int texnumber\nend_header\n0 0 0\n1 0 0\n2 0 0\n0 1 0\n1 1 0\n2 1 0\n"
        "4 0 1 4 3 8 0 0 1 0 1 1 0 1 0\n4 1 2 5 4 8 0 0 1 0 1 1 0 1 1\n"
    )
    assert verdict(tmp_path / "a.ply") == "colored"


# ---- 3MF ------------------------------------------------------------------------------------------------------------

NAMESPACES = (
    'xmlns="http://schemas.microsoft.com/3dmanufacturing/core/2015/02" '
    'xmlns:m="http://schemas.microsoft.com/3dmanufacturing/material/2015/02"'
)
SQUARE = "".join(f'<vertex x="{x}" y="{y}" z="0"/>' for x, y in ((0, 0), (1, 0), (1, 1), (0, 1)))
TRIANGLES = '<triangle v1="0" v2="1" v3="2"/><triangle v1="0" v2="2" v3="3"/>'
MESH = f"<mesh><vertices>{SQUARE}</vertices><triangles>{TRIANGLES}</triangles></mesh>"
COLORS = '<m:colorgroup id="1"><m:color color="#C86432"/><m:color color="#1428DCFF"/></m:colorgroup>'
MULTI = '<m:multiproperties id="7" pids="5 1"><m:multi pindices="0 0"/><m:multi pindices="0 1"/></m:multiproperties>'


def write_3mf(path: Path, resources: str, build: str, before: str = ""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        model = f"<model {NAMESPACES}><resources>{resources}</resources><build>{build}</build></model>"
        archive.writestr("3D/3dmodel.model", f'<?xml version="1.0"?>{before}{model}')


@pytest.mark.parametrize("pid", [1, 7])
def test_3mf_color_groups_nested_components_and_transforms(tmp_path, pid):
    base = '<basematerials id="5"><base name="a" displaycolor="#00FF00"/></basematerials>'
    objects = "".join(f'<object id="{2 + side}" pid="{pid}" pindex="{side}">{MESH}</object>' for side in (0, 1))
    pair = (
        '<object id="9"><components><component objectid="2"/>'
        '<component objectid="3" transform="1 0 0 0 1 0 0 0 1 1 0 0"/></components></object>'
        '<object id="10"><components><component objectid="9" transform="2 0 0 0 2 0 0 0 2 5 0 0"/></components></object>'
    )
    write_3mf(tmp_path / "a.3mf", base + COLORS + MULTI + objects + pair, '<item objectid="10"/>')
    assert verdict(tmp_path / "a.3mf") == "colored"
    assert np.ptp(load_point_cloud(tmp_path / "a.3mf")[:, :3], axis=0) == pytest.approx([1.79, 0.89, 0], abs=0.1)


def nested(inner: str) -> str:
    """Objects that hold ten of the one before, 12 times."""
    outer = (
        f'<object id="{i}"><components>{f"<component objectid={chr(34)}{i - 1}{chr(34)}/>" * 10}</components></object>'
        for i in range(3, 15)
    )
    return f'<object id="2">{inner}</object>' + "".join(outer)


@pytest.mark.parametrize(
    "resources, before, reason",
    [
        (nested(MESH), "", "faces"),
        (nested(""), "", "objects"),
        ('<object id="14"><components><component objectid="14"/></components></object>', "", "themselves"),
        ('<object id="14" name="&a;">' + MESH + "</object>", '<!DOCTYPE x [<!ENTITY a "b">]>', "document type"),
        ('<object id="14"><components><component objectid="3"/></components></object>', "", "does not have"),
    ],
)
def test_harmful_3mf(tmp_path, resources, before, reason):
    write_3mf(tmp_path / "a.3mf", resources, '<item objectid="14"/>', before)
    with pytest.raises(PointCloudError, match=f"a.3mf.*{reason}"):
        load_point_cloud(tmp_path / "a.3mf")


def test_a_3mf_cannot_use_a_list_twice(tmp_path):
    """The reader leaves numbers of lists in the text; a file cannot name them."""
    copies = '<triangles minigpt3d_list="1"/>' * 3
    write_3mf(tmp_path / "a.3mf", f'<object id="1">{MESH}{copies}</object>', '<item objectid="1"/>')
    assert sum(len(surface.corners) for surface in read_3mf(tmp_path / "a.3mf")) == MESH.count("<triangle ")
    names = {_ModelTarget("a").take_lists(b'<vertices><vertex x="0" y="0" z="0"/></vertices>') for _ in range(9)}
    assert len(names) == 9


# ---- Harm in the other formats --------------------------------------------------------------------------------------

PLY_HEADER = (
    "ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    "element face {faces}\nproperty list {count} int vertex_indices\nend_header\n"
)
CORNERS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.ply", PLY_HEADER.format(faces=1, count="uint").encode() + CORNERS + b"\xff\xff\xff\x7f", "fewer follow"),
        ("a.ply", PLY_HEADER.format(faces=2, count="uchar").encode() + CORNERS + b"\3" + bytes(12), "fewer follow"),
        ("a.ply", PLY_HEADER.format(faces=1, count="uchar").encode() + CORNERS + b"\3" + b"\xff" * 12, "vertex -1"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3000000000 0 1 2\n", "fewer corners"),
        ("a.off", b"OFF\n3000000000 1 0\n0 0 0\n", "header says 3,000,000,000"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nf 1 2 1\nf 1 2 3 # x\nf 1 1 1\n", "'f 1 2 3.* 2 are, counted from 1"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nf 1 2 -3\n", "'f 1 2 -3' names a vertex"),
        ("a.ply", b"# x\nv 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 3\n", "its content is .obj"),
        ("a.ply", b"solid x\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\n", "its content is .stl"),
        ("a.obj", b"v 0 0 zero\nv 1 0 0\nf 1 2 2\n", "'zero'"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nf 1 2\n", "no faces"),
        ("a.stl", b"solid\nfacet\nvertex 0 0 0\nvertex 1 0 0\nendsolid", "fewer than three"),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PointCloudError, match=f"{name}.*{reason}"):
        load_point_cloud(tmp_path / name)


def test_many_materials_take_little_time(tmp_path):
    count = 3000
    (tmp_path / "a.mtl").write_text("".join(f"newmtl m{i}\nmap_Kd no/{i}.png\n" for i in range(count)))
    faces = "".join(f"usemtl m{i}\nf 1/1 2/1 3/1\n" for i in range(count))
    (tmp_path / "a.obj").write_text("mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\n" + faces)
    with pytest.warns(UserWarning, match="no/0.png"):
        load_point_cloud(tmp_path / "a.obj", 10)


# ---- Further formats ------------------------------------------------------------------------------------------------


def test_gz_holds_any_format(tmp_path):
    (tmp_path / "a.ply.gz").write_bytes(gzip.compress((CASES / "mply_vcol.ply").read_bytes()))
    assert verdict(tmp_path / "a.ply.gz") == "colored"
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(PointCloudError, match="b.gz: .*text"):
        load_point_cloud(tmp_path / "b.gz")
    (tmp_path / "c.ply.gz").write_bytes(gzip.compress(bytes(120_000_000)))
    with pytest.raises(PointCloudError, match="c.ply.gz.*zip bomb"):
        load_point_cloud(tmp_path / "c.ply.gz")


def test_formats_that_are_not_read_say_how_to_convert(tmp_path):
    for suffix, remedy in ((".step", "CAD"), (".wrl", "Blender"), (".spz", "uncompressed"), (".XLSX", "csv")):
        (tmp_path / f"a{suffix}").write_text("x")
        with pytest.raises(PointCloudError, match=remedy):
            load_point_cloud(tmp_path / f"a{suffix}")
    (tmp_path / "a.fbx").write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "assimp_py", None)
        with pytest.raises(ImportError, match="pip install 'assimp-py'"):
            load_point_cloud(tmp_path / "a.fbx")


@pytest.mark.parametrize("suffix", [".usdc", ".usdz"])
def test_contents_of_usd_fit_its_size(tmp_path, suffix):
    """usd-core allocates 2.7 GB for these 40 bytes."""
    pytest.importorskip("pxr")
    content = b"PXR-USDC" + bytes(8) + (32).to_bytes(8, "little") + bytes(8) + (83_886_079).to_bytes(8, "little")
    path = tmp_path / f"a{suffix}"
    if suffix == ".usdz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.usdc", content)
    else:
        path.write_bytes(content)
    with pytest.raises(PointCloudError, match="83,886,079 sections"):
        load_point_cloud(path)


@pytest.mark.parametrize("start", [b"BLENDER-v293RENDH", b"BLENDER17-01v0500", b"\x28\xb5\x2f\xfd", b"BLENDER_v280"])
def test_files_of_new_blender_are_named(tmp_path, start):
    pytest.importorskip("assimp_py")
    (tmp_path / "a.blend").write_bytes(start + bytes(500))
    with pytest.raises(PointCloudError, match=r"Blender 2\.8.*\.glb"):
        load_point_cloud(tmp_path / "a.blend")
    (tmp_path / "a.blend").write_bytes(b"BLENDER-v279" + bytes(500))
    with pytest.raises(PointCloudError) as caught:
        load_point_cloud(tmp_path / "a.blend")
    assert "2.8" not in str(caught.value)


def branching(depth: int, form: str) -> str:
    """A scene of 2 ** depth nodes in a few lines."""
    start, node, use, end = {
        "dae": ("<COLLADA><library_nodes>", '<node id="n{0}">{1}</node>', '<instance_node url="#n{0}"/>', "</library_nodes>"
                '<library_visual_scenes><visual_scene><node><instance_node url="#n0"/></node></visual_scene>'
                "</library_visual_scenes></COLLADA>"),
        "amf": ("<amf>", '<constellation id="n{0}">{1}</constellation>', '<instance objectid="n{0}"/>', "</amf>"),
        "x3d": ("<X3D><Scene>", '<Group DEF="n{0}">{1}</Group>', '<Group USE="n{0}"/>', "</Scene></X3D>"),
    }[form]  # fmt: skip
    nodes = [node.format(i, use.format(i + 1) * 2) for i in range(depth)]
    return start + "".join([*nodes, node.format(depth, "")]) + end


@pytest.mark.parametrize("form", ["dae", "amf", "x3d"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_nodes_of_assimp_are_counted_before_it_places_them(tmp_path, monkeypatch, form, encoding):
    def import_file(*_):
        raise RuntimeError("placed")

    library = types.SimpleNamespace(Process_Triangulate=8, Process_SortByPType=1, import_file=import_file)
    monkeypatch.setitem(sys.modules, "assimp_py", library)
    path = tmp_path / f"a.{form}"
    for depth, reason in ((4, "placed"), (24, "200,000 nodes")):
        path.write_bytes(branching(depth, form).encode(encoding))
        with pytest.raises(PointCloudError, match=reason):
            load_point_cloud(path, 100)
    with pytest.raises(PointCloudError, match="20 nodes"):
        path.write_bytes(branching(4, form).encode(encoding))
        load_point_cloud(path, 100, limits=ReadingLimits(max_nodes=20))


def test_scene_of_assimp(tmp_path, monkeypatch):
    """What assimp-py shows of a file becomes surfaces in their places, also where its library is absent."""
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)

    def mesh(material: int, uv: bool) -> types.SimpleNamespace:
        texcoords = [memoryview(np.zeros((4, 2), np.float32).reshape(-1))] if uv else None
        return types.SimpleNamespace(
            vertices=memoryview(square.reshape(-1)),
            indices=memoryview(np.array([0, 1, 2, 0, 2, 3], np.uint32)),
            num_faces=2,
            material_index=material,
            colors=None,
            texcoords=texcoords,
        )

    def node(meshes: list[int], shift: float, children: tuple = ()) -> types.SimpleNamespace:
        matrix = np.eye(4)
        matrix[0, 3] = shift
        return types.SimpleNamespace(mesh_indices=meshes, transformation=matrix.tolist(), children=list(children))

    Image.new("RGB", (2, 2), (20, 40, 220)).save(tmp_path / "B.png")
    materials = [
        {"NAME": "a", "COLOR_DIFFUSE": LEFT.tolist(), "TEXTURES": {}},
        {"NAME": "b", "COLOR_DIFFUSE": [0.8] * 3, "TEXTURES": {1: ["C:\\work\\b.png"]}},
    ]
    scene = types.SimpleNamespace(
        meshes=[mesh(0, False), mesh(1, True)],
        materials=materials,
        root_node=node([0], 5.0, (node([1], 1.0),)),
    )
    library = types.SimpleNamespace(Process_Triangulate=8, Process_SortByPType=1, import_file=lambda *_: scene)
    monkeypatch.setitem(sys.modules, "assimp_py", library)
    (tmp_path / "a.dae").write_text("x")
    assert verdict(tmp_path / "a.dae") == "colored"


def test_usd_when_its_library_is_there(tmp_path):
    usd, geometry = pytest.importorskip("pxr.Usd"), pytest.importorskip("pxr.UsdGeom")
    stage = usd.Stage.CreateNew(str(tmp_path / "a.usda"))
    mesh = geometry.Mesh.Define(stage, "/a")
    mesh.CreatePointsAttr([(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0), (1, 1, 0), (2, 1, 0)])
    mesh.CreateFaceVertexCountsAttr([4, 4])
    mesh.CreateFaceVertexIndicesAttr([0, 1, 4, 3, 1, 2, 5, 4])
    linear = [[((value + 0.055) / 1.055) ** 2.4 for value in color] for color in (LEFT, RIGHT)]
    mesh.CreateDisplayColorPrimvar("uniform").Set([tuple(color) for color in linear])
    stage.Save()
    assert verdict(tmp_path / "a.usda") == "colored"
    hidden = geometry.Mesh.Define(stage, "/hidden")
    hidden.CreatePointsAttr([(0, 0, 0), (9, 0, 0), (9, 9, 0)])
    hidden.CreateFaceVertexCountsAttr([3])
    hidden.CreateFaceVertexIndicesAttr([0, 1, 2])
    hidden.CreateVisibilityAttr("invisible")
    points = mesh.GetPointsAttr()
    values = points.Get()
    points.Clear()
    points.Set(values, usd.TimeCode(3))  # animated
    geometry.Xformable(mesh).AddTranslateOp().Set((5, 0, 0), usd.TimeCode(3))
    stage.Save()
    assert verdict(tmp_path / "a.usda") == "colored"


def usd(faces: int, header: str = "", prims: str = "", times: str = " = {}") -> str:
    """A layer whose default prim is a mesh of triangles, and further prims."""
    values = {
        "int[] faceVertexCounts": [3] * faces,
        "int[] faceVertexIndices": [0, 1, 2] * faces,
        "point3f[] points": [(0, 0, 0), (1, 0, 0), (0, 1, 0)],
    }
    mesh = 'def Mesh "mesh" {\n' + "\n".join(name + times.format(value) for name, value in values.items()) + "\n}"
    return f'#usda 1.0\n(\ndefaultPrim = "mesh"\n{header}\n)\n{mesh if faces else ""}\n{prims}\n'


def num_usd_faces(path: Path) -> int:
    return sum(len(surface.corners) for surface in _read_usd(path))


USD_WAYS = {
    "sublayer": ("subLayers = [@{}@]", ""),
    "reference": ("", 'def "a" (references = @{}@) {{}}'),
    "arguments": ("", 'def "a" (references = @{}:SDF_FORMAT_ARGS:a=b@) {{}}'),
    "expression": ('expressionVariables = {{ string X = "{}" }}', 'def "a" (references = @`"${{X}}"`@) {{}}'),
    "payload": ("", 'def "a" (payload = @{}@</mesh>) {{}}'),
    "variant": (
        "",
        'def "a" (\nvariants = {{ string v = "x" }}\nprepend variantSets = "v"\n) {{\nvariantSet "v" = {{\n"x" (payload = @{}@) '
        "{{\n}}\n}}\n}}",
    ),
    "clip": (
        "",
        'def Mesh "a" (clips = {{ dictionary default = {{ asset[] assetPaths = [@{0}@]\nasset manifestAssetPath = @{0}@\n'
        'double2[] active = [(0, 0)]\ndouble2[] times = [(0, 0), (1, 1)]\nstring primPath = "/mesh" }} }}) {{\n}}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", USD_WAYS)
def test_usd_reaches_files_in_its_folder_only(tmp_path, monkeypatch, way):
    """By a path that is relative, absolute or leads out, through a file beside it, and in the working directory."""
    pytest.importorskip("pxr")
    for name in ("objects/parts", "outside", "working"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "working")
    near, far = tmp_path / "objects" / "parts" / "near.usda", tmp_path / "outside" / "far.usda"
    content = usd(4, times=".timeSamples = {{ 0: {} }}" if way == "clip" else " = {}")
    for path in (near, far, tmp_path / "working" / "there.usda"):
        path.write_text(content)
    (tmp_path / "objects" / "link.usda").symlink_to(far)

    def read(target: str) -> tuple[int, str]:
        header, prims = (text.format(target) for text in USD_WAYS[way])
        (tmp_path / "objects" / "a.usda").write_text(usd(1 if way != "sublayer" else 0, header, prims))
        (tmp_path / "objects" / "b.usda").write_text(usd(0, "subLayers = [@./parts/../a.usda@]"))
        faces, texts = set(), []
        for name in ("a.usda", "b.usda"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    faces.add(num_usd_faces(tmp_path / "objects" / name))
                except PointCloudError as error:
                    assert "no mesh" in str(error)
                    faces.add(0)
            texts.append(" ".join(str(warning.message) for warning in caught))
        assert len(faces) == 1 and texts[0] == texts[1]
        return *faces, texts[0]

    own = 0 if way == "sublayer" else 1
    for target in ("./parts/near.usda", "parts/near.usda", str(near), "parts/../parts/near.usda"):
        assert read(target) == (own + 4, "")
    for target in ("../outside/far.usda", str(far), "./parts/../../outside/far.usda", "link.usda", "there.usda"):
        faces, text = read(target)
        assert faces == own and "outside of the folder" in text
    assert read("./parts/missing.usda") == (own, read("./parts/missing.usda")[1])
    assert "not found" in read("./parts/missing.usda")[1]
    near.write_text("#usda 1.0\nnonsense")
    assert "corrupt" in read("./parts/near.usda")[1]


def write_usdz(path: Path, **layers: str):
    """A package; the content of each file begins at a multiple of 64 bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in layers.items():
            member = zipfile.ZipInfo(f"{name}.usda")
            gap = -(archive.fp.tell() + 30 + len(member.filename) + 4) % 64
            member.extra = b"\x86\x19" + gap.to_bytes(2, "little") + bytes(gap)
            archive.writestr(member, text)


def test_packages_of_usd_are_read_and_hold_all_of_themselves(tmp_path):
    pytest.importorskip("pxr")
    (tmp_path / "objects").mkdir()
    package, far = tmp_path / "objects" / "a.usdz", tmp_path / "far.usda"
    far.write_text(usd(4))
    write_usdz(package, a=usd(0, "subLayers = [@./b.usda@]", 'def "c" (references = @b.usda@) {}'), b=usd(2))
    assert num_usd_faces(package) == 4
    (tmp_path / "objects" / "b.usda").write_text(usd(1, "", 'def "a" (references = @./a.usdz@) {}'))
    assert num_usd_faces(tmp_path / "objects" / "b.usda") == 1 + 2
    for target in (str(far), "../far.usda", "../../far.usda"):
        write_usdz(package, a=usd(1, "subLayers = [@./b.usda@]"), b=usd(0, f"subLayers = [@{target}@]"))
        try:
            assert num_usd_faces(package) == 1  # it leads nowhere within the package
        except PointCloudError as error:
            assert target == str(far) and "outside" in str(error)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_x3d_shows_no_other_files(tmp_path, encoding):
    """assimp opens what Inline names."""
    pytest.importorskip("assimp_py")
    shape = (
        "<Shape><IndexedFaceSet coordIndex='0 1 2 -1'><Coordinate point='0 0 0 1 0 0 0 1 0'/></IndexedFaceSet></Shape>"
    )
    (tmp_path / "b.x3d").write_text(f"<X3D><Scene>{shape}</Scene></X3D>")
    assert len(load_point_cloud(tmp_path / "b.x3d", num_points=8)) == 8
    text = f"<X3D><Scene>{shape}<Inline load='true' url='{tmp_path}/b.x3d'/></Scene></X3D>"
    (tmp_path / "a.x3d").write_text(text, encoding=encoding)
    with pytest.raises(PointCloudError, match="Inline"):
        load_point_cloud(tmp_path / "a.x3d")
