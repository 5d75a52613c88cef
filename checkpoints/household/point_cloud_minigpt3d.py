"""A point cloud from whatever holds a 3D object: file, array, tensor or mesh → float32 (num_points, 6), normalised.

The order: read (`_read_file`, or the array or mesh itself) → drop points that are not finite → colours to [0, 1] →
sample or repeat to `num_points` → turn the up axis → normalise. Meshes are sampled by area where points are chosen.

Shapes: N points in the source, P points of the cloud, F faces, V vertices.
"""

import importlib
import io
import numbers
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


# From "this axis points up" to "y points up", as in the objects that the model is trained on: new = coord @ matrix.T,
# each a rotation (no mirror).
_UP_ROTATIONS = {
    "x": np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "y": np.eye(3),
    "z": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]),
}
_NAMED_COLORS = {"black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5), "white": (1.0, 1.0, 1.0)}
# What a file may unpack to. A scan of 10 million points in double precision takes 480 MB.
MAX_UNPACKED_BYTES = 4 * 1024**3
# And how many times its own size, once it unpacks to a lot: coordinates and meshes shrink to a tenth at best.
MAX_UNPACK_RATIO = 200
RATIO_FLOOR_BYTES = 100 * 1000**2
# Above this share of NaN or infinite points the file is taken for broken, below they are dropped.
MAX_BAD_SHARE = 0.5
# What arithmetic may add to a float colour of 0 or 1; it is clipped.
COLOR_SLACK = 1e-3


class PointCloudError(ValueError):
    """A source that is no usable point cloud; the message says what is wrong with it and what to do."""


class _Points(NamedTuple):
    """What a reader returns for points: coord (N, 3) of any real dtype; color (N, 3) as stored, or None."""

    coord: np.ndarray
    color: np.ndarray | None


def load_point_cloud(
    source: Any,
    num_points: int = 8192,
    missing_color: str | tuple[float, float, float] = "black",
    up_axis: str | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Read, sample and normalise a 3D object. The same source and arguments always give the same cloud.

    Args:
        source: a path (see `READABLE_SUFFIXES`); an array or tensor (N, 3) of xyz or (N, 6) of xyz and rgb; or a
            trimesh `Trimesh`, `PointCloud` or `Scene`. Coordinates in any unit, colours in 0–1 or 0–255 (16-bit ones in
            0–65535), told apart by dtype and range.
        num_points: P. More points are sampled, fewer are repeated, exactly as many keep their order.
        missing_color: for points without colour: "black", as ModelNet40 is read in the paper; "gray"; "white"; or
            (r, g, b) in [0, 1]. The model takes it for the object's colour, and will say that a bare mesh is black.
        up_axis: the axis that points up in `source`, "x", "y" or "z"; the object is turned so that y does, as in the
            training data. None leaves it as it is.
        seed: of the sampling.

    Returns:
        (num_points, 6) float32: xyz minus its mean, divided by the largest norm; rgb in [0, 1].

    Raises:
        PointCloudError: (a ValueError) the source cannot be read, or holds no usable cloud.
        ValueError: an argument out of its range.
        ImportError: a package that reads this kind of file is missing; the message says which.
    """
    if not isinstance(num_points, numbers.Integral) or num_points < 1:
        raise ValueError(f"num_points must be a whole number of at least 1, got {num_points!r}.")
    if up_axis is not None and up_axis not in _UP_ROTATIONS:
        raise ValueError(f"up_axis must be 'x', 'y', 'z' or None (leave it as it is), got {up_axis!r}.")
    fill = _missing_color(missing_color)
    rng = np.random.default_rng(seed)
    name = str(source) if isinstance(source, (str, os.PathLike)) else f"the given {type(source).__name__}"
    try:
        content = _read(source)
        if isinstance(content, _Points):
            coord, color = _sample_points(content, num_points, fill, rng, name)
        else:
            coord, color = _sample_scene(content, num_points, fill, rng, name)
        if up_axis is not None:
            coord = coord @ _UP_ROTATIONS[up_axis].T
        coord = _normalize(coord)
    except PointCloudError as error:
        raise PointCloudError(f"{name}: {error}") from error
    cloud = np.empty((6, num_points), dtype=np.float32)
    cloud[:3], cloud[3:] = coord.T, color.T
    return np.ascontiguousarray(cloud.T)


# ---- Reading --------------------------------------------------------------------------------------------------------


def _read(source: Any) -> "_Points | Any":
    """`_Points`, or a trimesh object that holds faces."""
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.double() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return _split_columns(source)
    if type(source).__module__.split(".")[0] == "trimesh":
        return _open_trimesh(source)
    raise PointCloudError(
        f"a {type(source).__name__} cannot be read. Pass a path, an array or tensor (N, 3) or (N, 6), or a trimesh object."
    )


def _read_file(path: Path) -> "_Points | Any":
    suffix = path.suffix.lower()
    if path.is_dir():
        raise PointCloudError("this is a folder. Pass one of the files in it.")
    if not path.is_file():
        raise PointCloudError("there is no such file. Check the path.")
    if suffix not in _READERS:
        raise PointCloudError(
            f"files of type {suffix or '(no extension)'!r} are not known. Expected one of {' '.join(READABLE_SUFFIXES)}; "
            "convert it, or pass its points as an array."
        )
    if path.stat().st_size == 0:
        raise PointCloudError("the file is empty (0 bytes).")
    try:
        return _READERS[suffix](path)
    except (PointCloudError, ImportError):
        raise
    except MemoryError as error:
        raise PointCloudError("it asks for more memory than there is; the file is corrupt or too large.") from error
    except Exception as error:  # every reader has exceptions of its own for a broken file
        detail = " ".join(str(error).split()) or type(error).__name__
        raise PointCloudError(
            f"it cannot be read as {suffix} ({detail[:200]}). The file is truncated or corrupt, or of "
            "another format than its name says; export it again."
        ) from error


def _import(module: str, package: str | None = None):
    """Import a reader only when its kind of file comes, so that importing this file stays light."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise ImportError(
            f"Reading this file needs {package.split('[')[0]}, which cannot be imported ({error}). "
            f"Install it: pip install '{package}'"
        ) from error


def _split_columns(array: np.ndarray) -> _Points:
    """(N, 3) or (N, 6) → xyz, and rgb if there are six columns."""
    if array.ndim != 2 or array.shape[1] not in (3, 6):
        raise PointCloudError(
            f"a cloud has shape (points, 3) for xyz or (points, 6) for xyz and rgb, got {array.shape}. "
            "Pass one cloud at a time, with these columns only."
        )
    if array.dtype.kind not in "fiu":
        raise PointCloudError(f"a cloud holds real numbers, got dtype {array.dtype}.")
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.compress_rows(array)  # a point with a masked value is no point
    return _Points(array[:, :3], array[:, 3:] if array.shape[1] == 6 else None)


def _check_unpacked_size(num_bytes: int, what: str, packed_bytes: int | None = None):
    limit = MAX_UNPACKED_BYTES
    if packed_bytes is not None:
        limit = min(limit, max(RATIO_FLOOR_BYTES, MAX_UNPACK_RATIO * packed_bytes))
    if num_bytes > limit:
        size = "" if packed_bytes is None else f" for its {packed_bytes:,}"
        raise PointCloudError(
            f"{what} would unpack to {num_bytes:,} bytes, more than the {limit:,} allowed{size}. It is not "
            "opened: if it is not a zip bomb, thin the cloud out first."
        )


def _check_zip(path: Path):
    """Look at what a zip says it holds before anything is unpacked (and zipfile reads no more than was said)."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        _check_unpacked_size(unpacked, "this archive", path.stat().st_size)


def _read_array(stream: io.BufferedIOBase, num_bytes: int) -> np.ndarray:
    """A .npy of `num_bytes` bytes. Nothing is unpickled, and no memory taken for values that are not there."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise PointCloudError(f".npy format {version} is not known. Save it again with numpy.save.")
    shape, fortran_order, dtype = readers[version](stream)
    if dtype.hasobject:
        raise PointCloudError(
            "it holds pickled Python objects, which can run any code when read, so it is refused. "
            "Save a plain array: numpy.save(path, array.astype('float32'))."
        )
    expected = int(np.prod([int(size) for size in shape], dtype=object)) * dtype.itemsize
    remaining = num_bytes - stream.tell()
    if expected > remaining:
        raise PointCloudError(
            f"its header says {shape} of {dtype}, {expected:,} bytes, but {remaining:,} follow. "
            "The file is truncated or corrupt."
        )
    _check_unpacked_size(expected, "this array")
    array = np.frombuffer(stream.read(expected), dtype=dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_npy(path: Path) -> _Points:
    with open(path, "rb") as stream:
        return _split_columns(_read_array(stream, path.stat().st_size))


def _read_npz(path: Path) -> _Points:
    _check_zip(path)
    with zipfile.ZipFile(path) as archive:
        names = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}

        def read(name: str) -> np.ndarray:
            with archive.open(names[name]) as stream:
                return _read_array(stream, names[name].file_size)

        point_names = [n for n in ("points", "point_cloud", "xyz", "coord", "coords", "pos", "vertices") if n in names]
        color_names = [n for n in ("colors", "color", "rgb") if n in names]
        if not names:
            raise PointCloudError("it holds no array. Save one: numpy.savez(path, points=array).")
        if len(names) == 1:
            return _split_columns(read(*names))
        if not point_names:
            raise PointCloudError(
                f"which of its arrays holds the points? Got {', '.join(sorted(names))}; expected one array, or "
                "'points' and, if there are colours, 'colors'."
            )
        points = read(point_names[0])
        if color_names and points.ndim == 2 and points.shape[1] == 3:
            color = read(color_names[0])
            if color.shape != points.shape:
                raise PointCloudError(
                    f"'{color_names[0]}' must have one rgb per point, {points.shape}, got {color.shape}."
                )
            return _Points(_split_columns(points).coord, color)
        return _split_columns(points)


def _columns(table: Any, names: list[str]) -> _Points | None:
    """xyz and, if all three are there, red, green, blue of a table with named columns; None without xyz."""
    lookup = {name.lower(): name for name in names}

    def pick(*wanted: str) -> np.ndarray | None:
        if not set(wanted) <= lookup.keys():
            return None
        return np.stack([np.asarray(table[lookup[name]]) for name in wanted], axis=1)  # (N, 3)

    coord = pick("x", "y", "z")
    if coord is None:
        return None
    for wanted in (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")):
        color = pick(*wanted)
        if color is not None:
            return _Points(coord, color)
    return _Points(coord, None)


def _read_ply(path: Path) -> "_Points | Any":
    header = path.open("rb").read(1 << 16)
    if not header.startswith(b"ply") or b"end_header" not in header:
        raise PointCloudError("this is no PLY: it must begin with 'ply' and a header that ends with 'end_header'.")
    lines = [line.split() for line in header.decode("latin-1").split("end_header")[0].splitlines()]
    lines = [line for line in lines if line and line[0] in ("format", "element", "property")]
    counts = {line[1]: int(line[2]) for line in lines if line[0] == "element"}
    num_vertices, num_bytes = counts.get("vertex", 0), path.stat().st_size
    if num_vertices * 3 > num_bytes:  # a vertex takes three bytes at the very least
        raise PointCloudError(
            f"its header says {num_vertices:,} vertices, but the file has {num_bytes:,} bytes. "
            "It is truncated or corrupt; export it again."
        )
    if counts.get("face"):
        return _read_mesh(path)
    if num_vertices and lines[0][1] == "ascii" and list(counts) == ["vertex"] and not any("list" in x for x in lines):
        vertices = _read_ascii_vertices(path, lines[2:], num_vertices)
    else:
        vertices = _import("plyfile").PlyData.read(str(path))["vertex"].data
    points = _columns(vertices, list(vertices.dtype.names))
    if points is None:
        raise PointCloudError(f"its vertices have no x, y, z, got {', '.join(vertices.dtype.names)}.")
    return points


def _read_ascii_vertices(path: Path, properties: list[list[str]], count: int) -> np.ndarray:
    """The only table of an ascii PLY, (count,) with named fields: what plyfile reads too, in ten times the time."""
    dtype = [(name, {"char": "i1", "uchar": "u1"}.get(kind, kind)) for _, kind, name in properties]
    with open(path, encoding="latin-1") as lines:
        for line in lines:
            if line.strip() == "end_header":
                break
        vertices = np.loadtxt(lines, dtype=dtype, comments=None, max_rows=count, ndmin=1)
    if len(vertices) != count:
        raise PointCloudError(
            f"its header says {count:,} vertices, but {len(vertices):,} follow. "
            "It is truncated or corrupt; export it again."
        )
    return vertices


def _read_pcd(path: Path) -> _Points:
    raw = path.open("rb").read(1 << 14)
    head, mark, tail = raw.partition(b"DATA binary_compressed\n")
    if mark and len(tail) >= 8:
        _check_unpacked_size(int.from_bytes(tail[4:8], "little"), "this .pcd", path.stat().st_size)
    table = _import("pypcd4").PointCloud.from_path(path)
    if table.pc_data.size != table.metadata.points:
        raise PointCloudError(
            f"its header says {table.metadata.points:,} points, but {table.pc_data.size:,} follow. "
            "It is truncated or corrupt; export it again."
        )
    columns = {name: table.pc_data[name].reshape(-1) for name in table.fields}
    packed = next((name for name in ("rgb", "rgba") if name in columns), None)
    if packed:  # three bytes in the bits of a float or an integer, blue lowest
        bits = np.ascontiguousarray(columns[packed])
        bits = bits.view(np.uint32) if bits.dtype.itemsize == 4 else bits.astype(np.uint32)
        for name, shift in (("red", 16), ("green", 8), ("blue", 0)):
            columns[name] = (bits >> shift & 255).astype(np.uint8)
    points = _columns(columns, list(columns))
    if points is None:
        raise PointCloudError(f"its points have no x, y, z, got {', '.join(table.fields)}.")
    return points


def _read_text(path: Path) -> _Points:
    """Rows of numbers between commas, semicolons, tabs or blanks; a header may name the columns; '#' comments."""
    skipped, names, first = 0, None, None
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            words = _words(line)
            if not words:
                skipped += 1
            elif _are_numbers(words):
                if len(words) > 1:
                    first = line
                    break
                skipped += 1  # a count of points in front, as .pts files have it
            elif names is None:
                names = [word.strip("\"'/ ") for word in words]
                skipped += 1
            else:
                raise PointCloudError(f"line {skipped + 1} must be numbers, got {line.strip()[:60]!r}.")
    if first is None:
        raise PointCloudError("there are no rows of numbers in it; expected 'x y z' or 'x y z r g b' on each line.")
    delimiter = next((mark for mark in ",;" if mark in first), None)
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        table = np.loadtxt(lines, delimiter=delimiter, comments="#", skiprows=skipped, ndmin=2, dtype=np.float64)
    if names is not None and len(names) == table.shape[1]:
        points = _columns(dict(zip(names, table.T, strict=True)), names)
        if points is not None:
            return points
    if table.shape[1] not in (3, 6):
        raise PointCloudError(
            f"expected 3 columns (x y z) or 6 (x y z r g b), got {table.shape[1]}. "
            "Name them in a first line, such as 'x,y,z,intensity,red,green,blue'."
        )
    return _split_columns(table)


def _words(line: str) -> list[str]:
    return line.partition("#")[0].replace(",", " ").replace(";", " ").split()


def _are_numbers(words: list[str]) -> bool:
    try:
        return [float(word) for word in words] != []
    except ValueError:
        return False


def _read_las(path: Path) -> _Points:
    laspy = _import("laspy", "laspy[lazrs]")
    with laspy.open(path) as reader:
        num_points, num_bytes = reader.header.point_count, reader.header.point_format.size
        _check_unpacked_size(num_points * num_bytes, "this scan")
        if path.suffix.lower() == ".las" and num_points * num_bytes > path.stat().st_size:
            raise PointCloudError(
                f"its header says {num_points:,} points, but the file has {path.stat().st_size:,} bytes. "
                "It is truncated or corrupt; export it again."
            )
        if not num_points:
            return _Points(np.zeros((0, 3)), None)
        if path.suffix.lower() == ".laz":
            _import("lazrs")
        scan = reader.read()
    coord = np.stack([scan.x, scan.y, scan.z], axis=1)  # float64: offset and scale are in
    if "red" not in scan.point_format.dimension_names:
        return _Points(coord, None)
    color = np.stack([scan.red, scan.green, scan.blue], axis=1)
    return _Points(coord, color if color.any() else None)  # a point format with colours, and nobody filled them in


def _read_mesh(path: Path) -> "_Points | Any":
    if path.suffix.lower() == ".3mf":
        _check_zip(path)
        _import("networkx")
        _import("lxml")
    return _open_trimesh(_import("trimesh").load(str(path), process=False))


def _open_trimesh(source: Any) -> "_Points | Any":
    """A trimesh object → its vertices as `_Points` if it has no faces, or a scene."""
    trimesh = _import("trimesh")
    scene = source if isinstance(source, trimesh.Scene) else trimesh.Scene([source])
    if any(isinstance(g, trimesh.Trimesh) and len(g.faces) for g in scene.geometry.values()):
        return scene
    clouds = [
        _Points(_transform(geometry.vertices, matrix), _vertex_colors(geometry))
        for geometry, matrix in _instances(scene)
        if hasattr(geometry, "visual") and len(geometry.vertices)  # paths have none
    ]
    if not clouds:
        return _Points(np.zeros((0, 3)), None)
    colored = all(cloud.color is not None for cloud in clouds)
    color = np.concatenate([cloud.color for cloud in clouds]) if colored else None
    return _Points(np.concatenate([cloud.coord for cloud in clouds]), color)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".ply": _read_ply,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pcd": _read_pcd,
    ".xyz": _read_text,
    ".txt": _read_text,
    ".csv": _read_text,
    ".las": _read_las,
    ".laz": _read_las,
    ".obj": _read_mesh,
    ".stl": _read_mesh,
    ".off": _read_mesh,
    ".glb": _read_mesh,
    ".gltf": _read_mesh,
    ".3mf": _read_mesh,
}
READABLE_SUFFIXES = tuple(_READERS)


# ---- Points ---------------------------------------------------------------------------------------------------------


def _sample_points(
    points: _Points, num_points: int, fill: np.ndarray, rng: np.random.Generator, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """(N, …) → coord (P, 3) float64 and color (P, 3) in [0, 1]."""
    coord, color = points
    if not len(coord):
        raise PointCloudError("the cloud is empty (0 points).")
    coord = np.ascontiguousarray(coord)  # as columns of a table, all that follows is several times slower
    color = None if color is None else np.ascontiguousarray(color)
    if not (np.isfinite(coord).all() and (color is None or np.isfinite(color).all())):
        good = np.isfinite(coord).all(axis=1)
        if color is not None:
            good &= np.isfinite(color).all(axis=1)
        _warn_or_raise_about_bad(int((~good).sum()), len(good), "points", name)
        coord, color = coord[good], None if color is None else color[good]
    if color is not None:
        scale = _color_scale(color)  # over the whole cloud: a sample of it might look like another range
    chosen = _choose(len(coord), num_points, rng)
    coord = coord[chosen].astype(np.float64)
    if color is None:
        return coord, np.tile(fill, (num_points, 1))
    color = color[chosen] if scale == 1 else color[chosen] / scale
    return coord, np.clip(color, 0, 1)


def _warn_or_raise_about_bad(num_bad: int, total: int, what: str, name: str):
    if num_bad > MAX_BAD_SHARE * total:
        raise PointCloudError(
            f"{num_bad:,} of {total:,} {what} are NaN or infinite. Too many to drop; export the object again."
        )
    warnings.warn(f"{name}: {num_bad:,} of {total:,} {what} are NaN or infinite and were dropped.", stacklevel=4)


def _color_scale(color: np.ndarray) -> float:
    """What to divide colours by: 1 (they are in 0–1), 255 or 65535."""
    low, high = color.min(), color.max()
    is_float = color.dtype.kind == "f"
    slack = COLOR_SLACK if is_float else 0
    if low >= -slack:
        if is_float and high <= 1 + slack:
            return 1.0
        if high <= 255 + slack:
            return 255.0
        if color.dtype == np.uint16:
            return 65535.0
    raise PointCloudError(
        f"its colours are out of range: got {low:g} to {high:g} ({color.dtype}), expected 0 to 1 or 0 to 255 (16 bits: "
        "0 to 65535, as whole numbers). If these columns are no colours (normals, say), pass xyz alone."
    )


def _choose(count: int, num_points: int, rng: np.random.Generator) -> np.ndarray | slice:
    """Indices of `num_points` out of `count`: a uniform sample without repeats, or all, repeated as evenly as can be."""
    if count == num_points:
        return slice(None)  # order and values stay as they are
    if count > num_points:
        # In the order of the file; costs O(num_points), however large the scan is.
        return np.sort(rng.choice(count, num_points, replace=False, shuffle=False))
    repeats, rest = divmod(num_points, count)
    return np.concatenate([np.tile(np.arange(count), repeats), rng.choice(count, rest, replace=False)])


def _missing_color(color: str | tuple[float, float, float]) -> np.ndarray:
    fill = np.asarray(_NAMED_COLORS.get(color, ()) if isinstance(color, str) else color, dtype=np.float64)
    if fill.shape != (3,) or not ((fill >= 0) & (fill <= 1)).all():
        raise ValueError(
            f"missing_color must be one of {', '.join(_NAMED_COLORS)} or (r, g, b) in [0, 1], got {color!r}."
        )
    return fill


def _normalize(coord: np.ndarray) -> np.ndarray:
    """xyz minus its mean, divided by the largest norm. In float64, or clouds far from the origin lose their shape."""
    if (coord[-1] == coord[0]).all() and (coord == coord[0]).all():
        raise PointCloudError(f"all its points are equal, {coord[0].tolist()}; an object has some extent.")
    columns = np.ascontiguousarray(coord.T)  # (3, P): numpy is several times faster along rows
    with np.errstate(over="ignore", invalid="ignore"):
        columns -= columns.mean(axis=1, keepdims=True)
        largest = np.sqrt(columns[0] ** 2 + columns[1] ** 2 + columns[2] ** 2).max()
    if not 0 < largest < np.inf:
        raise PointCloudError(f"its coordinates are too large or too small to compute with (up to {coord.max():g}).")
    return (columns / largest).T


# ---- Meshes ---------------------------------------------------------------------------------------------------------


def _transform(vertices: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.asarray(vertices, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]  # (V, 3)


def _instances(scene: Any) -> list[tuple[Any, np.ndarray]]:
    """Every geometry at every place where the scene graph puts it, in an order that does not hang on node names."""
    order = {name: index for index, name in enumerate(scene.geometry)}
    placed = [scene.graph[node] for node in scene.graph.nodes_geometry]  # (matrix, geometry's name)
    placed.sort(key=lambda item: (order[item[1]], np.asarray(item[0]).tolist()))
    return [(scene.geometry[name], np.asarray(matrix)) for matrix, name in placed]


def _sample_scene(
    scene: Any, num_points: int, fill: np.ndarray, rng: np.random.Generator, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Points spread evenly over the surface of a scene's meshes → coord (P, 3) float64 and color (P, 3) in [0, 1]."""
    meshes = [(mesh, matrix) for mesh, matrix in _instances(scene) if len(getattr(mesh, "faces", ()))]
    corners = np.concatenate([_transform(mesh.vertices, matrix)[mesh.faces] for mesh, matrix in meshes])  # (F, 3, 3)
    good = np.isfinite(corners).all(axis=(1, 2))
    if not good.all():
        _warn_or_raise_about_bad(int((~good).sum()), len(good), "faces", name)
        corners[~good] = 0  # no area, never chosen
    edges = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    cumulative = np.cumsum(area)
    if not cumulative[-1] > 0:
        raise PointCloudError(f"none of its {len(area):,} faces has an area, so there is no surface to sample.")
    chosen = np.searchsorted(cumulative, rng.random(num_points) * cumulative[-1], side="right")  # (P,)

    # Uniform in a triangle: https://www.cs.princeton.edu/~funk/tog02.pdf, §4.2
    root, along = np.sqrt(rng.random(num_points)), rng.random(num_points)
    weights = np.stack([1 - root, root * (1 - along), root * along], axis=1)  # (P, 3)
    coord = np.einsum("pk,pkd->pd", weights, corners[chosen])

    color = np.empty((num_points, 3))
    starts = np.cumsum([0, *(len(mesh.faces) for mesh, _ in meshes)])
    for (mesh, _), start, end in zip(meshes, starts, starts[1:], strict=False):
        here = (start <= chosen) & (chosen < end)
        if here.any():
            found = _surface_colors(mesh, chosen[here] - start, weights[here])
            color[here] = np.where(np.isnan(found), fill, found)
    return coord, color


def _vertex_colors(geometry: Any) -> np.ndarray | None:
    """(V, 3) uint8 colours of a trimesh geometry's vertices, or None where it has none."""
    if geometry.visual.kind != "vertex":
        return None
    color = np.asarray(geometry.visual.vertex_colors)
    return color[:, :3] if len(color) == len(geometry.vertices) else None


def _surface_colors(mesh: Any, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Colours (P, 3) in [0, 1] at points of a mesh, given by face (P,) and barycentric weights (P, 3); NaN where it has none."""
    visual = mesh.visual
    if visual.kind == "face":
        return visual.face_colors[faces, :3] / 255
    if visual.kind == "vertex":
        return np.einsum("pk,pkd->pd", weights, visual.vertex_colors[mesh.faces[faces], :3] / 255)
    color = np.full((len(faces), 3), np.nan)
    if visual.kind != "texture":
        return color
    uv = visual.uv
    if uv is not None and len(uv) == len(mesh.vertices):
        uv = np.einsum("pk,pkd->pd", weights, np.asarray(uv, dtype=np.float64)[mesh.faces[faces], :2])  # (P, 2)
    else:
        uv = None
    materials, index = [visual.material], np.zeros(len(faces), dtype=int)
    if getattr(visual, "face_materials", None) is not None:
        materials, index = visual.material.materials, np.asarray(visual.face_materials)[faces]
    for number in np.unique(index):
        here = index == number
        color[here] = _material_colors(materials[number], None if uv is None else uv[here])
    return color


def _material_colors(material: Any, uv: np.ndarray | None) -> np.ndarray:
    """A material's texture at uv, (P, 3), times its colour where the format says so; without texture its colour alone, (3,)."""
    is_pbr = hasattr(material, "baseColorFactor")
    image = material.baseColorTexture if is_pbr else getattr(material, "image", None)
    if is_pbr and material.baseColorFactor is None:
        base = np.ones(3)  # what glTF takes for it
    else:
        base = np.asarray(material.main_color, dtype=np.float64)[:3] / 255
    if not is_pbr and _is_placeholder(material, image):
        return np.full(3, np.nan)
    if image is None or uv is None:
        return base
    pixels = np.asarray(image.convert("RGB"))  # (height, width, 3), the first row is v = 1
    height, width = pixels.shape[:2]
    uv = np.where(np.isfinite(uv), uv, 0) % 1  # textures repeat
    column = np.minimum((uv[:, 0] * width).astype(int), width - 1)
    row = np.minimum(((1 - uv[:, 1]) * height).astype(int), height - 1)
    color = pixels[row, column] / 255
    # glTF multiplies both. In MTL many exporters leave Kd at black beside a texture, so there the texture counts alone.
    return color * base if is_pbr else color


def _is_placeholder(material: Any, image: Any) -> bool:
    """Whether trimesh made the colour up: a grey where the file names no material, or a material no colour."""
    given = getattr(material, "kwargs", {})
    if given.get("kd") is not None:
        return False
    if image is None:
        return np.array_equal(material.main_color, _import("trimesh").visual.color.DEFAULT_COLOR)
    made_up = _import("trimesh").visual.material.empty_material().image
    return not given and image.size == made_up.size and image.tobytes() == made_up.tobytes()


__all__ = ["READABLE_SUFFIXES", "PointCloudError", "load_point_cloud"]
