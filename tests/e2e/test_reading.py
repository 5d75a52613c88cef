"""Files are read in other processes: crashes, hangs and memory bombs cost one file, and no process is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bad_readers
import numpy as np
import pytest

from minigpt3d.data.reading import LIMITS, CrashError, FileReader, LimitOptions, Limits
from minigpt3d.point_cloud_minigpt3d import PointCloudError, load_point_cloud


SHORT = Limits(seconds=3, memory=512 * 1024**2)
MISBEHAVING = ["aborts", "allocates", "exits", "loops", "raises", "sleeps"]


def write_clouds(folder: Path, names) -> list[Path]:
    paths = [folder / f"{name}.npy" for name in names]
    for path in paths:
        np.save(path, np.random.default_rng(0).random((50, 6)))
    return paths


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, but nobody has asked


@pytest.mark.parametrize("num_processes", [1, 2])
def test_bad_files_cost_themselves_only(num_processes, tmp_path):
    names = [name for bad in MISBEHAVING for name in (f"before_{bad}", bad)] + ["last"]
    paths = write_clouds(tmp_path, names)
    start = time.monotonic()
    with FileReader(bad_readers.load_point_cloud, num_processes, SHORT) as reader:
        results = list(reader.read_files(paths, num_points=60))
    assert time.monotonic() - start < 60
    assert [result.path for result in results] == paths
    for path, result in zip(paths, results, strict=True):
        if path.stem in MISBEHAVING:
            assert isinstance(result.error, PointCloudError) and str(result.error).startswith(f"{path}: ")
            assert result.content is None
        else:
            np.testing.assert_array_equal(result.content, load_point_cloud(path, 60))
            assert result.error is None
    errors = {result.path.stem: result.error for result in results}
    assert "SIGABRT" in str(errors["aborts"]) and "memory" in str(errors["allocates"])
    assert all(
        isinstance(errors[name], CrashError) and "3 seconds" in str(errors[name]) for name in ("loops", "sleeps")
    )


def test_reading_that_is_not_wanted_any_more_ends(tmp_path, monkeypatch):
    """Whether it has begun or waits for a process; and no temporary file is left."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    sleeps, good = write_clouds(tmp_path, ["sleeps", "good"])

    async def leave(reader):
        first = await reader.read(good, num_points=60)
        tasks = [asyncio.ensure_future(reader.read(sleeps)) for _ in range(3)]
        await asyncio.sleep(1)
        pid = reader._processes[0]._process.pid
        assert [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        second = await asyncio.wait_for(reader.read(good, num_points=60), 30)
        return first, second, pid

    with FileReader(bad_readers.load_point_cloud) as reader:
        first, second, pid = asyncio.run(leave(reader))
    assert first.error is second.error is None and not is_running(pid)
    np.testing.assert_array_equal(first.content, second.content)
    assert not list((tmp_path / "temporary").iterdir())


def test_what_libraries_print_stays_in_the_process(tmp_path, capfd):
    (path,) = write_clouds(tmp_path, ["talks"])
    with FileReader(bad_readers.load_point_cloud) as reader:
        (result,) = reader.read_files([path])
    assert result.error is None and result.warnings == ("a warning for users",)
    assert capfd.readouterr() == ("", "")


def test_the_error_of_a_reader_arrives_as_it_is(tmp_path):
    path = tmp_path / "a\x1b[31m\nb.npy"
    path.write_bytes(b"not an array")
    with FileReader(load_point_cloud) as reader:
        bad, missing = reader.read_files([path, tmp_path / "missing.ply"])
        with pytest.raises(PointCloudError) as error:
            load_point_cloud(path)
    assert str(bad.error) == str(error.value) and str(bad.error).isprintable()
    assert type(bad.error) is PointCloudError and "no such file" in str(missing.error)


def test_large_files_are_allowed_more(tmp_path):
    path = tmp_path / "large.xyz"
    with open(path, "wb") as file:
        file.truncate(10**9)
    seconds, memory = LIMITS.of(path)
    assert LIMITS.of(tmp_path / "missing") == (LIMITS.seconds, LIMITS.memory)
    assert seconds >= LIMITS.seconds + 500 and memory >= LIMITS.memory + 10 * 10**9


def test_options_change_the_limits():
    assert LimitOptions().limits == LIMITS
    changed = LimitOptions(max_seconds=5, max_memory=0.5).limits
    assert changed == LIMITS._replace(seconds=5, memory=512 * 1024**2)


def test_a_reader_that_cannot_start_says_why(tmp_path, monkeypatch):
    (path,) = write_clouds(tmp_path, ["a"])
    monkeypatch.setattr("minigpt3d.data.reading._Process.PROGRAM", "raise ValueError('broken')")
    with FileReader(load_point_cloud) as reader, pytest.raises(OSError, match="broken"):
        list(reader.read_files([path]))


def test_damaged_files_are_read_or_refused():
    tool = Path(__file__).parents[1] / "tools" / "mutate.py"
    cases = tool.parents[1] / "cases"
    seeds = [cases / name for name in ("g_texture.glb", "npz_points_colors.npz")]
    done = subprocess.run(
        [sys.executable, tool, *seeds, "--number", "12"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines()[2:]]
    assert [sum(map(int, row[1:3])) for row in rows] == [12, 12, 24]


PROGRAM = """
import sys
import bad_readers
from minigpt3d.data.reading import FileReader
with FileReader(bad_readers.load_point_cloud, 2) as reader:
    for result in reader.read_files(sys.argv[1:]):
        print(*(process._process.pid for process in reader._processes), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(number, tmp_path):
    paths = write_clouds(tmp_path, ["first"])
    paths += write_clouds(tmp_path, ["sleeps", "loops"])
    paths += [paths[0]] * 10  # so that the first result is given out
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, paths)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert len(children) == 2 and all(map(is_running, children))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(timeout=20) != 0
        deadline = time.monotonic() + 20
        while any(map(is_running, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_running, children))
    finally:
        process.kill()
        process.stdout.close()
