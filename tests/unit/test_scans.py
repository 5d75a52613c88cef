"""Scans: PLY points, PCD, LAS, LAZ and E57; what headers promise, and damaged files."""

import gzip
import itertools
import struct
import sys
import time

import laspy
import lzf
import numpy as np
import pytest
from plyfile import PlyData, PlyElement
from point_cases import CASES, make_normals, make_object, what_is_seen

from minigpt3d.point_cloud_minigpt3d import PointCloudError, load_point_cloud


COORD, COLOR = make_object()


@pytest.mark.parametrize("path", sorted((CASES / "hostile").iterdir()), ids=lambda path: path.name)
def test_hostile_files_are_refused_at_once(path):
    start = time.perf_counter()
    assert (what_is_seen(path) == "refuse") == (path.name != "good.laz")
    assert time.perf_counter() - start < 2


# PLY


def ply_bytes(names, table, text=False, types=None, byte_order="<", end="\n", comments=()) -> bytes:
    types = types or ["float"] * 3 + ["uchar"] * (len(names) - 3)
    kinds = {"float": "f4", "double": "f8", "uchar": "u1", "ushort": "u2", "uint8": "u1", "int": "i4", "float32": "f4"}
    form = "ascii" if text else "binary_little_endian" if byte_order == "<" else "binary_big_endian"
    lines = ["ply", f"format {form} 1.0", *(f"comment {text}" for text in comments), f"element vertex {len(table)}"]
    lines += [f"property {kind} {name}" for kind, name in zip(types, names, strict=True)] + ["end_header", ""]
    if text:
        content = "".join(" ".join(f"{value:.6g}" for value in row) + end for row in table).encode()
    else:
        dtype = [(name, byte_order + kinds[kind]) for kind, name in zip(types, names, strict=True)]
        content = np.array([tuple(row) for row in table], dtype).tobytes()
    return end.join(lines).encode() + content


COLORED = np.column_stack([COORD, COLOR])
RGB = ["red", "green", "blue"]
PLY_NAMES = {
    "upper": (["X", "Y", "Z", "Red", "Green", "Blue"], COLORED, None),
    "short": ([*"xyz", *"rgb"], COLORED, None),
    "diffuse": ([*"xyz", *[f"diffuse_{name}" for name in RGB]], COLORED, None),
    "scalar": ([*"xyz", *[f"scalar_{name}" for name in RGB]], COLORED, ["float"] * 6),
    "float255": ([*"xyz", *RGB], COLORED, ["float32"] * 6),
    "float1": ([*"xyz", *RGB], np.column_stack([COORD, COLOR / 255]), ["float"] * 6),
    "ushort": ([*"xyz", *RGB], np.column_stack([COORD, COLOR.astype(int) * 257]), ["float"] * 3 + ["ushort"] * 3),
    "int": ([*"xyz", *RGB], COLORED, ["double"] * 3 + ["int"] * 3),
    "alpha": ([*"xyz", *RGB, "alpha"], np.column_stack([COLORED, np.full(200, 255)]), None),
    "normals": (
        [*"xyz", "nx", "ny", "nz", *RGB],
        np.column_stack([COORD, make_normals(), COLOR]),
        ["float"] * 6 + ["uchar"] * 3,
    ),
}


@pytest.mark.parametrize("form", ["text", "<", ">"])
@pytest.mark.parametrize("name", PLY_NAMES)
def test_ply_names_and_types(tmp_path, name, form):
    names, table, types = PLY_NAMES[name]
    path = tmp_path / "cloud.ply"
    path.write_bytes(ply_bytes(names, table, form == "text", types, form if form != "text" else "<"))
    assert what_is_seen(path) == "AB"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("text", [True, False])
def test_ply_headers_of_any_length_and_line_end(tmp_path, text, end):
    path = tmp_path / "cloud.ply"
    path.write_bytes(
        ply_bytes([*"xyz", *RGB], COLORED, text, end=end, comments=["end_header is near", "y" * 90] * 2000)
    )
    assert what_is_seen(path) == "AB"


def test_ply_with_other_elements(tmp_path):
    vertices = np.array([tuple(row) for row in COLORED], [(name, "f4") for name in [*"xyz", *RGB]])
    camera = np.zeros(3, [("view_px", "f4"), ("depth", "O")])
    camera["depth"] = [np.arange(2, dtype=np.int32)] * 3
    for text, order in itertools.product([True, False], [1, -1]):
        elements = [PlyElement.describe(vertices, "vertex"), PlyElement.describe(camera, "camera")][::order]
        PlyData(elements, text=text).write(tmp_path / "cloud.ply")
        assert what_is_seen(tmp_path / "cloud.ply") == "AB"


def test_gaussian_splats(tmp_path):
    names = [
        *"xyz",
        "nx",
        "ny",
        "nz",
        *[f"f_dc_{i}" for i in range(3)],
        *[f"f_rest_{i}" for i in range(45)],
        "opacity",
    ]
    dc = (COLOR / 255 - 0.5) / 0.28209479177387814
    table = np.column_stack([COORD, np.zeros((200, 3)), dc, np.zeros((200, 45)), np.full(200, -9)])
    (tmp_path / "splat.ply").write_bytes(ply_bytes(names, table, types=["float"] * len(names)))
    assert what_is_seen(tmp_path / "splat.ply") == "AB"


def test_wrong_contents_have_true_reasons(tmp_path):
    packed = gzip.compress(ply_bytes([*"xyz", *RGB], COLORED))
    for name, content, reason in (
        ("cloud.ply", packed, "compressed with gzip"),
        ("cloud.ply", b"ply\nelement vertex 1\nend_header\n", "no 'format' line"),
        ("cloud.ply", b"ply\nformat ascii 1.0\nelement vertex 9\n", "does not end"),
        ("cloud.las", ply_bytes([*"xyz", *RGB], COLORED), "content is .ply"),
        ("cloud.txt", ply_bytes([*"xyz", *RGB], COLORED), "content is .ply"),
        ("cloud.csv", packed, "compressed with gzip"),
        ("cloud.ply", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("cloud.xyz", b"<!DOCTYPE html>\n<html>", "web page"),
        ("cloud.laz", b"x" * 300, "no LAS"),
        ("cloud.e57", b"x" * 99, "no E57"),
        ("cloud.npy", ply_bytes([*"xyz", *RGB], COLORED), "content is .ply"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PointCloudError, match=reason):
            load_point_cloud(tmp_path / name)


@pytest.mark.parametrize("element", ["vertex 400000000", "other 2000000000", "vertex -1"])
def test_ply_counts_are_compared_with_the_size(tmp_path, element):
    for form in ("ascii", "binary_little_endian"):
        content = f"ply\nformat {form} 1.0\nelement {element}\nproperty float x\nend_header\n".encode() + bytes(999)
        (tmp_path / "cloud.ply").write_bytes(content)
        with pytest.raises(PointCloudError, match="its header says"):
            load_point_cloud(tmp_path / "cloud.ply")


# PCD

PACKED = (COLOR.astype(np.uint32) * [65536, 256, 1]).sum(1).astype(np.uint32)
PCD_FIELDS = {
    "r_g_b": ("x y z r g b", "4 4 4 1 1 1", "F F F U U U", COLORED),
    "rgb_uint": ("x y z rgb", "4 4 4 4", "F F F U", np.column_stack([COORD, PACKED])),
    "rgba_uint": ("x y z rgba", "4 4 4 4", "F F F U", np.column_stack([COORD, PACKED.astype(np.int64) + 0xFF000000])),
    "double": ("x y z rgb", "8 8 8 4", "F F F U", np.column_stack([COORD, PACKED])),
    "normals": (
        "rgb normal_x normal_y normal_z x y z",
        "4 4 4 4 4 4 4",
        "U F F F F F F",
        np.column_stack([PACKED, make_normals(), COORD]),
    ),
}


def pcd_bytes(fields, sizes, types, table, data="binary", end="\n", drop=(), names="FIELDS") -> bytes:
    count = " ".join("1" for _ in sizes.split())
    header = {"VERSION": "0.7", names: fields, "SIZE": sizes, "TYPE": types, "COUNT": count, "WIDTH": len(table)}
    header |= {"HEIGHT": 1, "VIEWPOINT": "0 0 0 1 0 0 0", "POINTS": len(table), "DATA": data}
    lines = ["# .PCD v.7 - Point Cloud Data file format"]
    lines += [f"{key} {value}" for key, value in header.items() if key not in drop]
    kinds = [f"<{kind.lower()}{size}" for kind, size in zip(types.split(), sizes.split(), strict=True)]
    columns = [table[:, index].astype(kind) for index, kind in enumerate(kinds)]
    if data == "ascii":
        content = end.join("\t".join(map(str, row)) for row in zip(*columns, strict=True)).encode()
    elif data == "binary":
        content = np.rec.fromarrays(columns).tobytes()
    else:
        plain = b"".join(column.tobytes() for column in columns)
        packed = lzf.compress(plain)
        content = struct.pack("<II", len(packed), len(plain)) + packed
    return (end.join(lines) + end).encode() + content


@pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("name", PCD_FIELDS)
def test_pcd_fields(tmp_path, name, data):
    for end, drop in (("\n", ()), ("\r\n", ("COUNT", "VIEWPOINT")), ("\n", ("VERSION", "POINTS")), ("\n", ("WIDTH",))):
        (tmp_path / "cloud.pcd").write_bytes(pcd_bytes(*PCD_FIELDS[name], data, end, drop))
        assert what_is_seen(tmp_path / "cloud.pcd") == "AB"
    (tmp_path / "cloud.pcd").write_bytes(pcd_bytes(*PCD_FIELDS[name], data, names="COLUMNS"))
    assert what_is_seen(tmp_path / "cloud.pcd") == "AB"


def test_pcd_rgb_as_float_in_text(tmp_path):
    """Open3D prints the float whose bits are the color, PCL prints the bits."""
    for numbers in (PACKED.view(np.float32).astype(np.float64), PACKED):
        rows = ("".join(f"{value:.10g} " for value in row) for row in np.column_stack([COORD, numbers]))
        head = pcd_bytes("x y z rgb", "4 4 4 4", "F F F F", np.zeros((200, 4)), "ascii").partition(b"ascii\n")[0]
        (tmp_path / "cloud.pcd").write_bytes(head + b"ascii\n" + "\n".join(rows).encode())
        assert what_is_seen(tmp_path / "cloud.pcd") == "AB"


def test_pcd_needs_lzf_only_where_it_is_compressed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzf", None)
    (tmp_path / "cloud.pcd").write_bytes(pcd_bytes(*PCD_FIELDS["r_g_b"]))
    assert what_is_seen(tmp_path / "cloud.pcd") == "AB"
    (tmp_path / "cloud.pcd").write_bytes(pcd_bytes(*PCD_FIELDS["r_g_b"], "binary_compressed"))
    with pytest.raises(ImportError, match="python-neo-lzf"):
        load_point_cloud(tmp_path / "cloud.pcd")


def test_sparse_scans_are_read_and_empty_ones_refused(tmp_path):
    coord = COORD.copy()
    coord[np.arange(200) % 10 > 0] = np.nan
    (tmp_path / "cloud.pcd").write_bytes(pcd_bytes("x y z", "4 4 4", "F F F", coord))
    with pytest.warns(UserWarning, match="180 of 200 points"):
        load_point_cloud(tmp_path / "cloud.pcd")
    (tmp_path / "cloud.pcd").write_bytes(pcd_bytes("x y z", "4 4 4", "F F F", coord * np.nan))
    with pytest.raises(PointCloudError, match="200 of 200"):
        load_point_cloud(tmp_path / "cloud.pcd")


# LAS and LAZ


def write_las(path, color=COLOR, version="1.2", point_format=2, origin=0.0):
    scan = laspy.LasData(laspy.LasHeader(point_format=point_format, version=version))
    scan.header.scales, scan.header.offsets = [1e-4] * 3, [origin] * 3
    scan.x, scan.y, scan.z = (COORD + origin).T
    if color is not None:
        scan.red, scan.green, scan.blue = color.astype(np.uint16).T
    scan.write(str(path))


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize(("version", "point_format"), [("1.2", 2), ("1.2", 3), ("1.4", 7), ("1.4", 8)])
def test_las_colors(tmp_path, suffix, version, point_format):
    path = tmp_path / f"scan{suffix}"
    for factor in (1, 256, 257):
        write_las(path, COLOR.astype(int) * factor, version, point_format, origin=4_000_000.0)
        assert what_is_seen(path) == "AB"
    stray = COLOR.astype(int)
    stray[5] = [256, 300, 60_000]
    write_las(path, stray, version, point_format)
    assert what_is_seen(path) == "AB"


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes that were changed, removed, inserted, or cut off."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, min(len(content), 500) if rng.random() < 0.6 else len(content)))
        kind = rng.integers(0, 5)
        if kind == 0:
            content[at] = int(rng.integers(0, 256))
        elif kind == 1:
            content[at : at + 4] = b"\xff" * 4
        elif kind == 2:
            del content[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            content[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            del content[max(at, 1) :]
    return bytes(content)


@pytest.mark.parametrize("suffix", [".las", ".ply", ".pcd", ".csv", ".npy", ".xyz"])
def test_damaged_files_are_clouds_or_refused(tmp_path, suffix):
    """LAZ is left out: a damaged one can abort the process in lazrs, so it is read in a process of its own."""
    seeds = {
        ".las": lambda: write_las(tmp_path / "seed.las", version="1.4", point_format=7),
        ".ply": lambda: (tmp_path / "seed.ply").write_bytes(ply_bytes([*"xyz", *RGB], COLORED)),
        ".pcd": lambda: (tmp_path / "seed.pcd").write_bytes(pcd_bytes(*PCD_FIELDS["rgb_uint"], "binary_compressed")),
        ".csv": lambda: np.savetxt(tmp_path / "seed.csv", COLORED, "%g", ",", header="x,y,z,r,g,b", comments=""),
        ".xyz": lambda: np.savetxt(tmp_path / "seed.xyz", COLORED, "%g"),
        ".npy": lambda: np.save(tmp_path / "seed.npy", COLORED),
    }
    seeds[suffix]()
    content, rng, path = (tmp_path / f"seed{suffix}").read_bytes(), np.random.default_rng(1), tmp_path / f"bad{suffix}"
    for _ in range(60):
        path.write_bytes(damaged(content, rng))
        what_is_seen(path)


def test_las_sizes_are_compared(tmp_path):
    write_las(tmp_path / "scan.laz")
    content = bytearray((tmp_path / "scan.laz").read_bytes())
    content[107:111] = (4_000_000_000).to_bytes(4, "little")
    (tmp_path / "scan.laz").write_bytes(content)
    with pytest.raises(PointCloudError, match="would unpack to"):
        load_point_cloud(tmp_path / "scan.laz")
    content[107:111] = (100_001).to_bytes(4, "little")
    (tmp_path / "scan.laz").write_bytes(content)
    with pytest.raises(PointCloudError, match="chunk table"):
        load_point_cloud(tmp_path / "scan.laz")


def test_e57_scans_at_their_poses(tmp_path):
    pye57 = pytest.importorskip("pye57")
    file = pye57.E57(str(tmp_path / "scan.e57"), mode="w")
    for part in (COORD[:, 0] < 0, COORD[:, 0] >= 0):
        columns = dict(zip(("cartesianX", "cartesianY", "cartesianZ"), (COORD[part] - [5, 0, 0]).T, strict=True))
        columns |= dict(zip(("colorRed", "colorGreen", "colorBlue"), COLOR[part].T, strict=True))
        file.write_scan_raw(columns, translation=np.array([5.0, 0, 0]), rotation=np.array([1.0, 0, 0, 0]))
    file.close()
    assert what_is_seen(tmp_path / "scan.e57") == "AB"
    content = (tmp_path / "scan.e57").read_bytes()
    (tmp_path / "scan.e57").write_bytes(content[: len(content) // 2])
    with pytest.raises(PointCloudError, match="truncated"):
        load_point_cloud(tmp_path / "scan.e57")


@pytest.mark.parametrize("suffix", [".ply", ".pcd"])
def test_text_that_ends_or_breaks_early(tmp_path, suffix):
    """Rows are compared with the header, and what Windows prints for NaN is read."""
    headers = {
        ".ply": "ply\nformat ascii 1.0\nelement vertex 200\nproperty float x\nproperty float y\nproperty float z\n"
        "end_header\n",
        ".pcd": "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nPOINTS 200\nDATA ascii\n",
    }
    rows = [f"{x:.9f} {y:.9f} {z:.9f}" for x, y, z in COORD]
    path = tmp_path / f"cloud{suffix}"

    def read(rows: list[str]) -> str:
        path.write_text(headers[suffix] + "\n".join(rows))
        with pytest.raises(PointCloudError) as caught:
            load_point_cloud(path)
        return str(caught.value)

    message = read([*rows[:150], rows[150][:18]])
    assert "200" in message and "150 follow" in message
    message = read([*rows[:150], "0.1 chair 0.2", *rows[151:]])
    assert "row 151" in message and "chair" in message
    path.write_text(headers[suffix] + "\n".join(["-nan(ind) 1.#QNAN 1.#INF", *rows[1:]]))
    with pytest.warns(UserWarning, match="1 of 200"):
        load_point_cloud(path)


def test_a_pcd_with_an_endless_field(tmp_path):
    path = tmp_path / "cloud.pcd"
    path.write_text(
        "FIELDS x y z f\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 2000000000\nPOINTS 1\nDATA ascii\n1 2 3 4\n"
    )
    with pytest.raises(PointCloudError, match="2,000,000,000 values"):
        load_point_cloud(path)
