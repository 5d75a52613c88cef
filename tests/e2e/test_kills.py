"""A run that is killed before any of its changes to the disk, and started again, leaves the same files.

A crash point is a call that changes a name or opens a file for writing; Python's audit hooks see all of them.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm
from training_runs import STAGES, history, options, tiny

from minigpt3d.cli.main import main
from minigpt3d.files import sha256
from minigpt3d.training.loop import train


TIMEOUT = 120  # seconds, of every process that a test waits for
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
TIMED = {"history.jsonl", "curves.png", "README.md", "card_sources.json", "provenance.json"}  # hold times and dates


def run_killed(action, root: Path, point: int) -> int:
    """Run the action in a process that is killed before its `point`-th change below `root`; returns the changes made."""
    reader, writer = os.pipe()

    def watch(event, args):
        if event == "open":
            is_change = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            is_change = event in CHANGES
        if is_change and str(args[0]).startswith(str(root)):
            os.write(writer, b".")
            changes.append(event)
            if len(changes) == point:
                os.kill(os.getpid(), signal.SIGKILL)

    def call():
        tqdm.set_lock(threading.RLock())  # else shared with the other children, and locked for ever by a killed one
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.addaudithook(watch)
        with contextlib.suppress(SystemExit):
            action()
        os._exit(0)

    changes = []
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    os.close(writer)
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode in (0, -signal.SIGKILL)
    with open(reader, "rb") as pipe:
        return len(pipe.read())


def digests(folder: Path) -> dict[str, str]:
    """Digests of the files of a result, with its history instead of what holds times."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    found = {name: sha256(path) for name, path in files.items() if path.name not in TIMED}
    return found | {name: "" for name in files.keys() - found} | {"": json.dumps(history_of(folder))}


def history_of(folder: Path) -> list:
    return history(folder) if (folder / "history.jsonl").exists() else []


@pytest.fixture(scope="module")
def start_of(base, release, tmp_path_factory):
    """`start_of(name)` → the folder that a stage starts from, made by the stages before it."""
    folders, order, root = {"I": base}, ["I", "II", "III", "IV", "own"], tmp_path_factory.mktemp("chain")

    def find(name: str) -> Path:
        if name not in folders:
            before = order[order.index(name) - 1]
            folders[name] = train(short(before), options(find(before), root / before, release))
        return folders[name]

    return find


def short(name: str):
    return tiny(STAGES[name], steps_per_epoch=2)


def action_of(name: str, start_of, release, out: Path):
    """A command that is the same at every start."""
    if name == "convert":
        result = start_of("III")
        return lambda: main(["convert", "--stage-result", str(result), "--out", str(out)])
    run = options(start_of(name), out, release, save_every=1, keep_checkpoints=1, resume="auto", export=name == "I")
    return lambda: out.exists() or train(short(name), run)


def check_kills(name: str, start_of, release, root: Path, number: int):
    """Kill it at a number of points, evenly spaced over the run."""
    (root / "whole").mkdir()
    whole = root / "whole" / "out"
    total = run_killed(action_of(name, start_of, release, whole), root / "whole", -1)
    assert total > 20
    for point in np.linspace(1, total, number + 2, dtype=int)[1:-1].tolist():
        folder = root / str(point)
        folder.mkdir()
        action = action_of(name, start_of, release, folder / "out")
        assert run_killed(action, folder, point) == point
        action()
        assert digests(folder / "out") == digests(whole), f"killed before change {point} of {total}"
        left = {path.name for path in folder.iterdir()} - {"out", "out.unfinished", ".out.lock"}
        assert not left, f"killed before change {point} of {total}"


def test_a_killed_stage_and_its_export_lose_nothing(start_of, release, tmp_path):
    check_kills("I", start_of, release, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*"I II III IV own convert".split()])
def test_no_kill_loses_anything(name, start_of, release, tmp_path):
    check_kills(name, start_of, release, tmp_path, 2)
