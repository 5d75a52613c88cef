"""Sources besides paths: bytes, open files, URLs, rows of data sets, gzip, objects of other libraries; and their limits."""

import contextlib
import gzip
import http.server
import io
import os
import shutil
import ssl
import subprocess
import threading
import time
import types
import warnings

import bad_readers
import numpy as np
import pytest
from point_cases import CASES, make_object, what_is_seen
from test_scans import COLORED, PCD_FIELDS, RGB, pcd_bytes, ply_bytes, write_las

from minigpt3d import sources_minigpt3d
from minigpt3d.data.reading import FileReader, Limits
from minigpt3d.point_cloud_minigpt3d import PointCloudError, ReadingLimits, is_readable, load_point_cloud


COORD, COLOR = make_object()
PLY = ply_bytes([*"xyz", *RGB], COLORED)
TEXT = "".join(" ".join(f"{value:g}" for value in row) + "\n" for row in COLORED).encode()
OBJ = "".join(f"v {' '.join(f'{value:g}' for value in row)}\n" for row in COLORED / [1, 1, 1, 255, 255, 255]).encode()


def refused(source, *words, **arguments) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PointCloudError) as caught:
            load_point_cloud(source, **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def contents(folder) -> dict[str, bytes]:
    """The object in every format of points."""
    np.save(folder / "a.npy", COLORED)
    np.savez(folder / "a.npz", COLORED)
    write_las(folder / "a.las")
    write_las(folder / "a.laz")
    files = {path.suffix: path.read_bytes() for path in folder.glob("a.*")}
    return files | {".ply": PLY, ".pcd": pcd_bytes(*PCD_FIELDS["r_g_b"]), ".txt": TEXT, ".obj": OBJ}


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".las", ".laz", ".ply", ".pcd", ".txt", ".obj"])
def test_bytes_open_files_rows_and_gzip(tmp_path, suffix):
    content = contents(tmp_path)[suffix]
    named = io.BytesIO(content)
    named.name = f"somewhere/cloud{suffix}"
    (tmp_path / f"cloud{suffix}.gz").write_bytes(gzip.compress(content))
    (tmp_path / "cloud.gz").write_bytes(gzip.compress(content))
    (tmp_path / f"cloud{suffix}").write_bytes(content)
    sources = [content, bytearray(content), memoryview(content), io.BytesIO(content), named]
    sources += [{"bytes": content, "path": None}, {"bytes": content, "path": f"cloud{suffix}"}]
    sources += [{"bytes": None, "path": str(tmp_path / f"cloud{suffix}")}]
    sources += [tmp_path / f"cloud{suffix}.gz", tmp_path / "cloud.gz", (tmp_path / f"cloud{suffix}").as_uri()]
    for source in sources:
        assert what_is_seen(source) == "AB"
    with open(tmp_path / f"cloud{suffix}", "rb") as stream:
        assert what_is_seen(stream) == "AB"


def test_messages_name_the_source():
    refused(b"\0\1\2\3", "the given bytes: its format cannot be told")
    refused(io.StringIO("0 0 0\n1 1 1\n"), "open as text")
    broken = io.BytesIO(b"ply\n")
    broken.name = "/there/broken.ply"
    refused(broken, "/there/broken.ply:")
    refused({"bytes": b"ply\n", "path": "row.ply"}, "row.ply:")
    refused({"bytes": None, "path": None}, "the given row: ", "neither bytes nor a path")
    refused({"data": PLY}, "the given row: ", "neither bytes nor a path")
    refused(b"", "the given bytes: ", "empty")
    refused("x" * 5000, "cannot be opened")
    refused("", "empty")


def test_home_and_file_urls(tmp_path, monkeypatch):
    (tmp_path / "my cloud.ply").write_bytes(PLY)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert what_is_seen("~/my cloud.ply") == "AB"
    assert what_is_seen((tmp_path / "my cloud.ply").as_uri()) == "AB"
    refused("file://elsewhere/cloud.ply", "another machine")
    refused("file:///absent/cloud.ply", "no such file")
    refused("http://example.org/cloud.ply", "https://")
    refused("s3://bucket/cloud.ply", "https://")


def test_control_characters_are_escaped(tmp_path):
    name = "a\x1b[31m\nb\r\x07.ply"
    (tmp_path / name).write_bytes(b"ply\n")
    message = refused(tmp_path / name, r"a\x1b[31m\nb\r\x07.ply")
    assert message.isprintable()
    (tmp_path / "x\x1b.txt").write_bytes(b"0 0 0\n0 0 1\n0 1 \x1b[31m\n")
    assert refused(tmp_path / "x\x1b.txt").isprintable()
    (tmp_path / "y\x1b.xyz").write_bytes(b"0 0 0\n0 0 1\nnan 0 0\n")
    with pytest.warns(UserWarning) as warned:
        load_point_cloud(tmp_path / "y\x1b.xyz")
    assert len(warned) == 2 and all(str(warning.message).isprintable() for warning in warned)
    undecodable = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.ply")
    assert refused(undecodable, "no such file").encode()


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "cloud.ply")
    refused(tmp_path / "cloud.ply", "pipe, socket or device")
    (tmp_path / "zero.ply").symlink_to("/dev/zero")
    refused(tmp_path / "zero.ply", "pipe, socket or device")


def test_gzip_bombs_and_damage(tmp_path):
    path = tmp_path / "cloud.xyz.gz"
    path.write_bytes(gzip.compress(TEXT)[:-200])
    refused(path, "truncated or corrupt")
    path.write_bytes(b"no gzip at all")
    refused(path, "cannot be unpacked as .gz")
    path.write_bytes(gzip.compress(bytes(5_000_000)))
    refused(path, "would unpack to", limits=ReadingLimits(ratio_floor_bytes=100_000))
    (tmp_path / "cloud.gz.gz").write_bytes(gzip.compress(gzip.compress(TEXT)))
    refused(tmp_path / "cloud.gz.gz", "twice")


@pytest.mark.parametrize("name", ["obj_map_so.obj", "mply_tex_wedge_space_name.ply", "g_external_percent20.gltf"])
def test_files_beside_a_gz_are_found(tmp_path, name):
    for path in CASES.iterdir():
        if path.suffix in (".mtl", ".png", ".bin"):
            shutil.copy(path, tmp_path)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((CASES / name).read_bytes()))
    assert what_is_seen(tmp_path / f"{name}.gz") == "AB"


def test_open_files_are_read_to_a_limit():
    refused(io.BytesIO(PLY), "1,000 bytes allowed", limits=ReadingLimits(max_unpacked_bytes=1000))


@pytest.mark.parametrize("name", ["g_external_percent20.gltf", "mply_tex_wedge_space_name.ply", "obj_map_so.obj"])
def test_meshes_are_read_to_a_limit(name):
    assert what_is_seen(CASES / name) == "AB"
    refused(CASES / name, "faces", limits=ReadingLimits(max_faces=1))


def test_headers_are_read_to_a_limit():
    refused(PLY, "10 bytes", limits=ReadingLimits(max_header_bytes=10))


@pytest.mark.parametrize("limit", [{"max_faces": -1}, {"max_bad_share": float("nan")}])
def test_limits_are_not_negative(limit):
    with pytest.raises(ValueError, match="max_"):
        ReadingLimits(**limit)


def test_objects_with_points_and_colors():
    cloud = types.SimpleNamespace(points=COORD.tolist(), colors=(COLOR / 255).tolist())
    assert what_is_seen(cloud) == "AB"
    assert what_is_seen(types.SimpleNamespace(points=COORD, colors=np.zeros((0, 3)))) == "none"
    refused(types.SimpleNamespace(points=COORD, colors=COLOR[:9]), "shapes (200, 3) and (9, 3)")
    refused(types.SimpleNamespace(points=["a"], colors=[]), "no arrays of numbers")


def test_missing_color_is_reported_once_and_only_for_files(tmp_path):
    np.savetxt(tmp_path / "cloud.xyz", COORD)
    with pytest.warns(UserWarning, match=r"cloud\.xyz: .*no color") as warned:
        load_point_cloud(tmp_path / "cloud.xyz")
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_point_cloud(COORD)


def test_warnings_name_the_source_and_not_a_temporary_copy(tmp_path):
    obj = b"mtllib none.mtl\nusemtl \x1b[31m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    (tmp_path / "mesh.obj.gz").write_bytes(gzip.compress(obj))
    row = {"bytes": obj, "path": "row/mesh.obj"}
    sources = {str(tmp_path / "mesh.obj.gz"): tmp_path / "mesh.obj.gz", "row/mesh.obj": row, "the given bytes": obj}
    for name, source in sources.items():
        with pytest.warns(UserWarning) as warned:
            load_point_cloud(source, 10)
        texts = [str(warning.message) for warning in warned]
        assert len(texts) == 2 and len(set(texts)) == 2  # what is missing or not read, and no color
        assert all(text.startswith(f"{name}: ") and text.isprintable() for text in texts), texts


def test_names_that_are_readable():
    assert all(map(is_readable, ("a.PLY", "a.ply.gz", "folder/a.b.Obj.GZ", ".fbx.glb")))
    assert not any(map(is_readable, ("a", "a.gz", "a.gz.gz", "a.wrl", "ply", "notes.md.gz")))


# Downloads


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        routes = {
            "/cloud.ply": (200, PLY),
            "/cloud": (200, PLY),
            "/my%20cloud.ply": (200, PLY),
            "/short.ply": (200, PLY),
            "/huge.ply": (200, b""),
            "/sleeps.ply": (200, PLY),
        }
        status, body = routes.get(self.path.partition("?")[0], (404, b""))
        location = {
            "/moved": "/cloud.ply",
            "/loop": "/loop",
            "/down": "http://localhost/cloud.ply",
            "/inside": "https://10.0.0.1/cloud.ply",
            "/file": "file:///etc/passwd",
        }.get(self.path)
        if self.path.startswith("/slow"):
            self.drip()
            return
        self.send_response(302 if location else status)
        if location:
            self.send_header("Location", location)
        size = {"/huge.ply": 1 << 50, "/short.ply": len(PLY) + 9}.get(self.path, len(body))
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(body)

    def drip(self):
        """Send a header or a body a byte at a time."""
        self.send_response(200)
        if self.path == "/slow_body.ply":
            self.send_header("Content-Length", str(len(PLY)))
            self.end_headers()
        with contextlib.suppress(OSError):  # the other side has left
            self.wfile.flush()
            for _ in range(100):
                self.wfile.write(b"p")
                self.wfile.flush()
                time.sleep(0.1)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An https server on this machine, whose certificate is valid for localhost."""
    folder = tmp_path_factory.mktemp("server")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9 -subj /CN=localhost"
    command += (
        f" -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {folder}/key.pem -out {folder}/certificate.pem"
    )
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl to make a certificate")
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    service.socket = context.wrap_socket(service.socket, server_side=True)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"https://localhost:{service.server_port}", folder / "certificate.pem"
    service.shutdown()


@pytest.fixture
def trusted(server, monkeypatch):
    url, certificate = server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("MINIGPT3D_ALLOW_PRIVATE_URLS", "1")
    real = sources_minigpt3d.socket.getaddrinfo
    monkeypatch.setattr(  # the server listens on IPv4 alone
        sources_minigpt3d.socket, "getaddrinfo", lambda host, *args, **kwargs: real(host, args[0], family=2, type=1)
    )
    return url


@pytest.mark.parametrize(
    "path", ["/cloud.ply", "/cloud", "/my cloud.ply", "/my%20cloud.ply", "/moved", "/cloud.ply?a=1#b"]
)
def test_downloads(trusted, path):
    assert what_is_seen(trusted + path) == "AB"


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/absent.ply", "404"),
        ("/loop", "redirected more than"),
        ("/down", "only https://"),
        ("/file", "only https://"),
        ("/huge.ply", "more than the"),
        ("/short.ply", "ended after"),
    ],
)
def test_downloads_that_are_refused(trusted, path, word):
    refused(trusted + path, word)


@pytest.mark.parametrize("path", ["/slow_body.ply", "/slow_header.ply"])
def test_downloads_end_in_time(trusted, path):
    start = time.perf_counter()
    refused(trusted + path, "1.5 seconds", limits=ReadingLimits(max_download_seconds=1.5))
    assert time.perf_counter() - start < 4


def test_downloads_in_processes_have_their_own_limits(trusted):
    """Reading is limited by the size of what was downloaded, and does not count the seconds of the download."""
    url = trusted.replace("localhost", "127.0.0.1")
    limits = Limits(seconds=0.5, max_download_seconds=1.5, max_download_bytes=len(PLY) + 100)
    paths = [
        url + path for path in ("/cloud.ply", "/slow_body.ply", "/huge.ply", "/sleeps.ply", "/absent.ply?token=secret")
    ]
    with FileReader(bad_readers.load_point_cloud, limits=limits) as reader:
        start = time.perf_counter()
        read, slow, huge, sleeps, absent = reader.read_files(paths, num_points=8)
    assert time.perf_counter() - start < 20
    assert read.error is None and read.path == paths[0] and read.content.shape == (8, 6)
    assert [url + "/cloud.ply" in text and "/tmp" not in text for text in read.warnings] == [True] * len(read.warnings)
    assert f"{url}/slow_body.ply: " in str(slow.error) and "download was not complete after 1.5 seconds" in str(
        slow.error
    )
    assert f"more than the {len(PLY) + 100:,}" in str(huge.error)
    assert "not read within" in str(sleeps.error) and sleeps.seconds < 10
    assert "secret" not in str(absent.error) and "404" in str(absent.error)


def test_a_url_without_a_host():
    refused("https:///cloud.ply", "no host")


def test_names_in_messages_have_no_secrets(trusted):
    message = refused(
        trusted.replace("https://", "https://user:secret@") + "/absent.ply?token=secret", "/absent.ply: "
    )
    assert "secret" not in message


def test_private_addresses_are_refused(server, trusted, monkeypatch):
    monkeypatch.delenv("MINIGPT3D_ALLOW_PRIVATE_URLS")
    refused(trusted + "/cloud.ply", "not a public address", "MINIGPT3D_ALLOW_PRIVATE_URLS")
    monkeypatch.undo()
    start = time.perf_counter()
    for host in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]", "0.0.0.0"):
        refused(f"https://{host}/cloud.ply", "not a public address")
    for host in ("[64:ff9b::7f00:1]", "[2002:7f00:1::]"):  # gateways to 127.0.0.1
        refused(f"https://{host}/cloud.ply", "127.0.0.1")
    assert time.perf_counter() - start < 5


def test_redirects_are_checked(server, trusted, monkeypatch):
    real = sources_minigpt3d._public_address

    def first_is_allowed(host, port):
        monkeypatch.setenv("MINIGPT3D_ALLOW_PRIVATE_URLS", "1" if host == "localhost" else "0")
        return real(host, port)

    monkeypatch.setattr(sources_minigpt3d, "_public_address", first_is_allowed)
    refused(trusted + "/inside", "10.0.0.1", "not a public address")


def test_a_certificate_of_nobody_is_refused(server, trusted, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    refused(trusted + "/cloud.ply", "cannot be downloaded", "certificate")
