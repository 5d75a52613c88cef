"""Tables of points: text, arrays, structured arrays; columns by name and by shape."""

import time

import numpy as np
import pytest
from point_cases import make_normals, make_object, what_is_seen

from minigpt3d.point_cloud_minigpt3d import PointCloudError, load_point_cloud
from minigpt3d.readers_minigpt3d import NotACloudError


COORD, COLOR = make_object()
NORMALS = make_normals()
COUNTER = np.arange(len(COORD))[:, None]


def rows(*columns, sep=" ", decimal=".") -> list[str]:
    """Rows of text; integers are printed without a point."""
    cells = [column.reshape(len(COORD), -1).T for column in columns]
    texts = [
        [(str(value) if values.dtype.kind in "iu" else f"{value:.6g}").replace(".", decimal) for value in values]
        for column in cells
        for values in column
    ]
    return [sep.join(row) for row in zip(*texts, strict=True)]


def save(path, lines, encoding="utf-8", newline="\n"):
    path.write_bytes((newline.join(lines) + newline).encode(encoding))
    return path


RANDOM = np.random.default_rng(5)
BRIGHTNESS = np.rint(COLOR @ [0.299, 0.587, 0.114]).astype(int)[:, None]
INTENSITY, REFLECTANCE = RANDOM.integers(0, 256, (200, 1)), RANDOM.integers(-2000, 500, (200, 1))
LABEL, ALPHA = RANDOM.integers(0, 13, (200, 1)), np.full((200, 1), 255)
HEADERS = {
    "points_in_paraview": ('"Points:0","Points:1","Points:2","RGB:0","RGB:1","RGB:2"', (COORD, COLOR), ","),
    "units": ("X (m);Y (m);Z (m);Red;Green;Blue", (COORD, COLOR), ";"),
    "any_order": (
        "blue,z,red,label,y,green,x",
        (COLOR[:, 2], COORD[:, 2], COLOR[:, 0], LABEL, COORD[:, 1], COLOR[:, 1], COORD[:, 0]),
        ",",
    ),
    "comment": ("# x y z intensity r g b", (COORD, INTENSITY, COLOR), " "),
    "slashes": ("//X,Y,Z,R,G,B,Nx,Ny,Nz", (COORD, COLOR, NORMALS), ","),
    "cloudcompare_float": ("//X Y Z Rf Gf Bf", (COORD, COLOR / 255), " "),
    "bgr": ("x y z blue green red", (COORD, COLOR[:, ::-1]), " "),
    "map": ("Easting,Northing,Height,R,G,B", (COORD, COLOR), ","),
    "prefixes": ("pos_x,pos_y,pos_z,color_r,color_g,color_b", (COORD, COLOR), ","),
    "scalar": ("x y z scalar_red scalar_green scalar_blue", (COORD, COLOR * 1.0), " "),
    "sixteen_bits": ("x y z red green blue", (COORD, COLOR.astype(int) * 257), " "),
    "pandas": (",x,y,z,r,g,b", (COUNTER, COORD, COLOR), ","),
    "r_language": ('"x" "y" "z" "r" "g" "b"', (COUNTER + 1, COORD, COLOR), " "),
    "normals_first": ("nx,ny,nz,x,y,z,red,green,blue", (NORMALS, COORD, COLOR), ","),
    "two_sets": ("Rf,Gf,Bf,x,y,z,normal_x,normal_y,normal_z", (COLOR / 255, COORD, NORMALS), ","),
    "german": ("X-Koordinate;Y-Koordinate;Z-Koordinate;Rot;Grün;Blau", (COORD, COLOR), ";"),
    "letters_of_a_map": ("E N H R G B", (COORD, COLOR), " "),
    "veloview": ("Points_m_XYZ:0,Points_m_XYZ:1,Points_m_XYZ:2,r,g,b", (COORD, COLOR), ","),
    "packed": ("x y z rgb", (COORD, (COLOR.astype(int) * [65536, 256, 1]).sum(1)), " "),
}


@pytest.mark.parametrize("name", HEADERS)
def test_columns_by_name(tmp_path, name):
    header, columns, sep = HEADERS[name]
    assert what_is_seen(save(tmp_path / "cloud.csv", [header, *rows(*columns, sep=sep)])) == "AB"


SHAPES = {
    "4_intensity": ((COORD, INTENSITY), "none"),
    "4_float_intensity": ((COORD, INTENSITY / 255), "none"),
    "6_rgb": ((COORD, COLOR), "AB"),
    "6_float": ((COORD, COLOR / 255), "AB"),
    "6_normals": ((COORD, NORMALS), "none"),
    "6_normals_up": ((COORD, np.tile([0, 0, 1], (200, 1))), "none"),
    "6_16_bits": ((COORD, COLOR.astype(int) * 257), "AB"),
    "7_intensity_rgb": ((COORD, REFLECTANCE, COLOR), "AB"),
    "7_byte_intensity_rgb": ((COORD, INTENSITY, COLOR), "AB"),
    "7_float_intensity_rgb": ((COORD, INTENSITY / 255, COLOR), "AB"),
    "7_alpha": ((COORD, COLOR, ALPHA), "AB"),
    "7_float_alpha": ((COORD, COLOR / 255, ALPHA / 255), "AB"),
    "7_label": ((COORD, COLOR, LABEL), "AB"),
    "7_normals_label": ((COORD, NORMALS, LABEL), "none"),
    "9_rgb_normals": ((COORD, COLOR, NORMALS), "AB"),
    "9_normals_rgb": ((COORD, NORMALS, COLOR), "AB"),
    "9_normals_float": ((COORD, NORMALS, COLOR / 255), "AB"),
    "counter_rgb": ((COUNTER, COORD, COLOR), "AB"),
    "counter": ((COUNTER + 1, COORD), "none"),
}


@pytest.mark.parametrize("sep", [" ", ",", "\t", "  ", "; "])
@pytest.mark.parametrize("name", SHAPES)
def test_columns_by_shape(tmp_path, name, sep):
    columns, expected = SHAPES[name]
    assert what_is_seen(save(tmp_path / "cloud.xyz", rows(*columns, sep=sep))) == expected


@pytest.mark.parametrize("name", [name for name in SHAPES if "counter" not in name and name != "6_normals_up"])
def test_arrays_by_shape(name):
    columns, expected = SHAPES[name]
    array = np.column_stack(columns)
    assert what_is_seen(array) == expected
    assert what_is_seen(array.astype(np.float32)) == expected


def test_pure_colors_in_arrays_are_no_normals():
    cloud = load_point_cloud(np.column_stack([COORD, np.tile([1.0, 0, 0], (200, 1))]), 200)
    assert (cloud[:, 3:] == [1, 0, 0]).all()
    gray = load_point_cloud(np.column_stack([COORD, np.full((200, 3), 147 / 255)]), 200)
    np.testing.assert_allclose(gray[:, 3:], 147 / 255, atol=1e-6)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, newline):
    lines = ["# Größe in m", "x,y,z,r,g,b", *rows(COORD, COLOR, sep=",")]
    assert what_is_seen(save(tmp_path / "cloud.csv", lines, encoding, newline)) == "AB"


HEX_COLORS = ["{:02x}{:02x}{:02x}".format(*color) for color in COLOR.astype(int)]
TEXTS = {
    "decimal_commas": rows(COORD, COLOR, sep=";", decimal=","),
    "decimal_commas_and_blanks": rows(COORD, COLOR, sep=" ", decimal=","),
    "decimal_commas_and_tabs": ["x\ty\tz\tr\tg\tb", *rows(COORD, COLOR / 255, sep="\t", decimal=",")],
    "quoted_decimal_commas": [
        ",".join(f'"{cell}"' for cell in row.split(";")) for row in rows(COORD, COLOR, sep=";", decimal=",")
    ],
    "quoted": [",".join(f'"{cell}"' for cell in row.split()) for row in rows(COORD, COLOR)],
    "trailing_commas": [row + "," for row in rows(COORD, COLOR, sep=",")],
    "trailing_blanks": [row + "  \t" for row in rows(COORD, COLOR)],
    "groups": [f"{a}\t{b}" for a, b in zip(rows(COORD), rows(COLOR), strict=True)],
    "groups_of_commas": [f"{a} {b}" for a, b in zip(rows(COORD, sep=","), rows(COLOR, sep=","), strict=True)],
    "empty_rows": ["x,y,z,r,g,b", *[f"{row}\n,,,,," for row in rows(COORD, COLOR, sep=",")]],
    "empty_cell": ["0.5,,0.25,20,40,220", *rows(COORD, COLOR, sep=","), ",0.1,0.2,20,40,220", "0,0,0,20,,220"],
    "missing_words": ["x;y;z;r;g;b", "NA;NA;NA;NA;NA;NA", "NaN;0;0;1;1;1", *rows(COORD, COLOR, sep=";")],
    "count": ["200", *rows(COORD, COLOR)],
    "counts": ["100", *rows(COORD, COLOR)[:100], "100", *rows(COORD, COLOR)[100:]],
    "sizes": ["200 6", *rows(COORD, COLOR)],
    "names_of_points": [f"p{index} {row}" for index, row in enumerate(rows(COORD, COLOR))],
    "last_word": ["x,y,z,r,g,b,class", *[row + ",chair leg" for row in rows(COORD, COLOR, sep=",")]],
    "first_word": ["name,x,y,z,r,g,b", *["leg," + row for row in rows(COORD, COLOR, sep=",")]],
    "numbered_columns": ["0,1,2,3,4,5", *rows(COORD, COLOR, sep=",")],
    "numbered_columns_and_rows": [",0,1,2,3,4,5", *rows(COUNTER, COORD, COLOR, sep=",")],
    "title": ["Scan of 2020, done with care", "in three parts", "x y z r g b", *rows(COORD, COLOR)],
    "units_line": ["x,y,z,r,g,b", "m,m,m,,,", *rows(COORD, COLOR, sep=",")],
    "comments_between": ["# a", *rows(COORD, COLOR)[:9], "# b", "// c", *rows(COORD, COLOR)[9:]],
    "brackets": [f"[{row}]," for row in rows(COORD, COLOR, sep=", ")],
    "windows": [*rows(COORD, COLOR), "-1.#IND 0 0 1 2 3", "1.#QNAN000 0 0 1 2 3"],
    "separator_line": ["sep=;", "x;y;z;r;g;b", *rows(COORD, COLOR, sep=";", decimal=",")],
    "tecplot": ['VARIABLES = "X" "Y" "Z"', "ZONE I=200", *rows(COORD, COLOR)],
    "bars": ["x|y|z|r|g|b", *rows(COORD, COLOR, sep="|")],
    "two_tabs": rows(COORD, COLOR, sep="\t\t"),
    "two_tabs_and_names": ["x\t\ty\t\tz\t\tr\t\tg\t\tb", *rows(COORD, COLOR, sep="\t\t")],
    "apostrophes": [",".join(f"'{cell}'" for cell in row.split()) for row in rows(COORD, COLOR)],
    "hex_colors": ["x,y,z,rgb", *[f"{a},#{b}" for a, b in zip(rows(COORD, sep=","), HEX_COLORS, strict=True)]],
    "hex_numbers": ["x y z paint", *[f"{a} 0x{b}" for a, b in zip(rows(COORD), HEX_COLORS, strict=True)]],
    "hex_without_names": [f"{a} #{b}" for a, b in zip(rows(COORD), HEX_COLORS, strict=True)],
    "windows_first": ["-nan(ind) 1.#QNAN 1.#INF 0 0 0", *rows(COORD, COLOR)],
    "brightness": rows(COORD, BRIGHTNESS, COLOR),
    "fortran": [" ".join(f"{value:.4E}" for value in row).replace("E", "D") for row in np.hstack([COORD, COLOR])],
    "exponents": [" ".join(f"{value:.4E}" for value in row) for row in np.column_stack([COORD, COLOR])],
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(tmp_path, name):
    suffix = ".pts" if name == "counts" else ".txt"
    assert what_is_seen(save(tmp_path / f"cloud{suffix}", TEXTS[name])) == "AB"


def test_colmap(tmp_path):
    lines = [
        "# 3D point list with one line of data per point:",
        "#   POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)",
        "# Number of points: 200, mean track length: 3.3",
    ]
    lines += [f"{7 * index} {row} 0.8" + " 16 6542" * (index % 4) for index, row in enumerate(rows(COORD, COLOR))]
    assert what_is_seen(save(tmp_path / "points3D.txt", lines)) == "AB"
    cameras = ["#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]", "1 SIMPLE_PINHOLE 3072 2304 2559.81 1536 1152"]
    assert what_is_seen(save(tmp_path / "cameras.txt", cameras)) == "refuse"


def test_empty_cells_are_dropped_with_a_warning(tmp_path):
    path = save(tmp_path / "cloud.csv", ["x,y,z,r,g,b", *rows(COORD, COLOR, sep=","), "0.1,,0.3,1,2,3"])
    with pytest.warns(UserWarning, match=r"cloud\.csv: 1 of 201 points"):
        assert len(load_point_cloud(path, 200)) == 200


def test_columns_of_colors_that_are_empty(tmp_path):
    path = save(tmp_path / "cloud.csv", ["x,y,z,r,g,b", *[row + ",,," for row in rows(COORD, sep=",")]])
    assert what_is_seen(path) == "none"


def test_a_mostly_empty_grid_is_read(tmp_path):
    coord = COORD.copy()
    coord[: int(0.7 * len(coord))] = np.nan
    with pytest.warns(UserWarning, match="140 of 200"):
        load_point_cloud(save(tmp_path / "depth.txt", rows(coord)))


@pytest.mark.parametrize(
    "text",
    [
        "Hello.\nThis is a note.\n",
        "key = 1\nother = 2 3 4\n",
        "1 2\n3 4\n",
        "{}\n",
        "a,b,c\nd,e,f\n",
        "step 1 of 3 2 1\nend\n",
    ],
)
def test_text_that_is_no_cloud_is_refused(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(PointCloudError, match=r"notes\.txt: .*text"):
        load_point_cloud(path)


def test_rows_of_other_lengths_are_refused(tmp_path):
    for header in ([], ["x y z r g b"]):
        path = save(tmp_path / "cloud.txt", [*header, *rows(COORD, COLOR), "1 2 3 4 5 6 7"])
        with pytest.raises(PointCloudError, match="line 20[12] .* 6 numbers"):
            load_point_cloud(path)


def test_a_raster_is_named(tmp_path):
    path = save(tmp_path / "grid.asc", ["ncols 4", "nrows 2", "cellsize 1", "1 2 3 4", "2 3 4 5"])
    assert what_is_seen(path) == "refuse"


def test_bytes_are_no_text(tmp_path):
    (tmp_path / "cloud.xyz").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(PointCloudError, match="binary data"):
        load_point_cloud(tmp_path / "cloud.xyz")


def test_one_endless_line_is_refused_quickly(tmp_path):
    (tmp_path / "cloud.txt").write_bytes(b"1 " * 20_000_000)
    start = time.perf_counter()
    assert what_is_seen(tmp_path / "cloud.txt") == "refuse"
    assert time.perf_counter() - start < 2


STRUCTURED = [
    [(name, "f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")],
    [(name, "f8") for name in "zyx"] + [("intensity", "f4")] + [(name, "u1") for name in "bgr"],
    [("pos", "f4", 3), ("color", "u1", 3)],
    [("xyz", "f4", 3), ("normal", "f4", 3), ("rgb", "u1", 3)],
]


@pytest.mark.parametrize("dtype", STRUCTURED, ids=range(4))
def test_structured_arrays(tmp_path, dtype):
    table = np.zeros(200, dtype)
    for axis in range(3):
        if "x" in table.dtype.names:
            table["xyz"[axis]] = COORD[:, axis]
            table[
                next(name for name in (("red", "green", "blue")[axis], "rgb"[axis]) if name in table.dtype.names)
            ] = COLOR[:, axis]
        else:
            table[dtype[0][0]], table[dtype[-1][0]] = COORD, COLOR
    np.save(tmp_path / "cloud.npy", table)
    assert what_is_seen(table) == what_is_seen(tmp_path / "cloud.npy") == "AB"
    with pytest.raises(PointCloudError, match="no x, y, z"):
        load_point_cloud(np.zeros(5, [("u", "f4"), ("v", "f4")]))


def test_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.column_stack([COORD, COLOR]), columns=["x", "y", "z", "r", "g", "b"])
    assert what_is_seen(frame) == "AB"


ARCHIVES = {
    "point_e": {"coords": COORD, **{name: COLOR[:, axis] / 255 for axis, name in enumerate("RGB")}},
    "alpha": {"points": COORD, "colors": np.column_stack([COLOR, ALPHA])},
    "upper": {"XYZ": COORD, "RGB": COLOR},
    "columns": {
        **{name: COORD[:, axis] for axis, name in enumerate("xyz")},
        **{name: COLOR[:, axis] for axis, name in enumerate("rgb")},
    },
    "inside": {"pc": np.column_stack([COORD, COLOR]), "label": np.array(3)},
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_of_arrays(tmp_path, name):
    np.savez(tmp_path / "cloud.npz", **ARCHIVES[name])
    assert what_is_seen(tmp_path / "cloud.npz") == "AB"


def test_scans_as_pts_with_a_count(tmp_path):
    """Four points are read; three are at most a triangle, though text of another name may hold them."""
    scan = "0 0 0 -900 200 100 50\n1 0 0 -900 200 100 50\n0 1 0 -900 200 100 50\n"
    (tmp_path / "scan.pts").write_text("4\n" + scan + "0 0 1 -900 200 100 50\n")
    np.testing.assert_allclose(
        load_point_cloud(tmp_path / "scan.pts", 4)[:, 3:] * 255, [[200, 100, 50]] * 4, atol=0.01
    )
    (tmp_path / "scan.pts").write_text("3\n" + scan)
    with pytest.raises(PointCloudError, match=r"scan\.pts: .* 3 points.* 4 or more"):
        load_point_cloud(tmp_path / "scan.pts")
    (tmp_path / "scan.txt").write_text(scan)
    assert len(load_point_cloud(tmp_path / "scan.txt", 3)) == 3


@pytest.mark.parametrize("intensity", [BRIGHTNESS, INTENSITY, BRIGHTNESS * 0, LABEL], ids=range(4))
def test_the_fourth_column_of_a_pts_is_the_intensity(tmp_path, intensity):
    path = save(tmp_path / "scan.pts", ["200", *rows(COORD, intensity, COLOR)])
    assert what_is_seen(path) == "AB"


@pytest.mark.parametrize(
    "first",
    [np.full((200, 1), 1699999.123), COUNTER * 2 + 1.7e9, COUNTER * 3 + 50],
    ids=["constant", "time", "counter"],
)
def test_a_first_column_that_is_no_coordinate_needs_a_name(tmp_path, first):
    lines = [f"{value!r} {row}" for value, row in zip(first[:, 0].tolist(), rows(COORD, COLOR), strict=True)]
    with pytest.raises(PointCloudError, match="time"):
        load_point_cloud(save(tmp_path / "cloud.txt", lines))
    assert what_is_seen(save(tmp_path / "cloud.txt", ["time x y z r g b", *lines])) == "AB"


@pytest.mark.parametrize(
    ("header", "error"),
    [("sepal,width,length", NotACloudError), ("a,b,c", NotACloudError), ("x,y,depth", PointCloudError)],
)
def test_a_header_of_other_columns(tmp_path, header, error):
    with pytest.raises(PointCloudError, match=header.replace(",", ", ")) as caught:
        load_point_cloud(save(tmp_path / "table.csv", [header, *rows(COORD, sep=",")]))
    assert type(caught.value) is error


@pytest.mark.parametrize("line", ["end", "Total rows: 200", "x y z r g b"])
def test_a_line_between_the_rows_is_named(tmp_path, line):
    with pytest.raises(PointCloudError, match=r"line 201 .*Remove this line"):
        load_point_cloud(save(tmp_path / "cloud.txt", [*rows(COORD, COLOR), line]))


def test_a_tail_of_zero_bytes_is_named(tmp_path):
    with pytest.raises(PointCloudError, match="line 201 .*zero bytes"):
        load_point_cloud(save(tmp_path / "cloud.txt", [*rows(COORD, COLOR), "\0" * 5000]))


def test_a_first_row_of_missing_values_counts(tmp_path):
    path = save(tmp_path / "cloud.csv", ["x,y,z", "NA,NA,NA", *rows(COORD, sep=",")])
    with pytest.warns(UserWarning, match="1 of 201 points"):
        load_point_cloud(path)


@pytest.mark.parametrize("row", ["a0 58 1c d8 df 9c 34 75 2f 31 32", ",".join(["1", "a"] * 1500)], ids=["hex", "wide"])
def test_time_grows_with_the_length_of_the_text(tmp_path, row):
    path = save(tmp_path / "notes.txt", [row] * (200_000 // len(row)))
    start = time.process_time()
    assert what_is_seen(path) == "refuse"
    assert time.process_time() - start < 5


def test_a_column_of_words_in_a_data_frame_is_named():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": [0.0, 1.0], "height": ["low", "high"], "y": [0.0, 1.0]})
    with pytest.raises(PointCloudError, match="'height'"):
        load_point_cloud(frame)
