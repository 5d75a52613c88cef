"""A run that was stopped, in any way, resumes and ends with the same bits as an uninterrupted one."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tqdm import tqdm
from training_runs import STAGES, options, same_run, tiny, write

from minigpt3d.files import locked
from minigpt3d.training import command, loop, run_state
from minigpt3d.training.loop import LossError, train, train_step
from minigpt3d.training.run_state import (
    _FACTS,
    Stopped,
    _write_checkpoint,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
)


TIMEOUT = 60  # seconds, of every process that a test waits for


def start_process(function, *args) -> multiprocessing.Process:
    """Call a function in a forked process, quietly."""

    def call():
        tqdm.set_lock(threading.RLock())  # else shared with the other children, and locked for ever by a killed one
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with contextlib.suppress(BaseException):
            function(*args)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


@pytest.fixture(autouse=True)
def children_end_with_their_test():
    """A child that hangs is killed; multiprocessing would wait for it at exit without a limit."""
    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join(TIMEOUT)


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def interrupt(monkeypatch, call: int):
    """Make the n-th optimizer step end like a killed run."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)


def test_a_killed_run_resumes_exactly(base, release, trained, tmp_path, monkeypatch):
    """The same run twice gives the same bits, and so does a run that was killed after its checkpoint and resumed."""
    stage = tiny(STAGES["II"], augment=True)
    assert same_run(trained(stage), trained(stage, num_workers=2))
    run = options(base, tmp_path / "killed", release, save_every=2)
    interrupt(monkeypatch, call=4)
    with pytest.raises(KeyboardInterrupt):
        train(stage, run)
    monkeypatch.undo()
    assert not (tmp_path / "killed").exists()
    with pytest.raises(ValueError, match="unfinished run.*`resume`"):
        train(stage, run)
    with pytest.raises(ValueError, match="seed 42.*1"):
        train(stage, replace(run, resume="auto", seed=1))
    assert same_run(train(stage, replace(run, resume="auto")), trained(stage))
    assert not (tmp_path / "killed.unfinished").exists()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(base, release, trained, tmp_path):
    """SIGKILL, twenty times, then the end: the same bits as an uninterrupted run."""
    stage = tiny(STAGES["III"], steps_per_epoch=120)
    result, work_dir = tmp_path / "killed", tmp_path / "killed.unfinished"
    run = options(base, result, release, save_every=1, resume="auto")
    rng, kept, lines = np.random.default_rng(0), [], work_dir / "history.jsonl"

    def count_lines() -> int:
        return lines.read_bytes().count(b"\n") if lines.exists() else 0

    for _ in range(20):
        goal = count_lines() + rng.integers(0, 5)  # a few steps later, at a random moment of the next
        process = start_process(train, stage, run)
        wait_until(lambda goal=goal: count_lines() >= goal or result.exists())
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join(TIMEOUT)
        assert process.exitcode is not None
        if result.exists():
            break
        newest = list_checkpoints(work_dir)
        kept.append(int(newest[0].name.removeprefix("checkpoint-")) if newest else 0)
        assert count_lines() - kept[-1] <= 1, "at most the step after the last checkpoint is lost"
    assert len(kept) == 20 and kept == sorted(kept) and len(set(kept)) > 5, "the kills came in the middle"
    if not result.exists():
        train(stage, run)
    assert same_run(result, trained(stage))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_last_step(number, base, release, trained, tmp_path, monkeypatch):
    stage, calls = tiny(STAGES["I"]), []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 2:
            for process in (*psutil.Process().children(), psutil.Process()):  # schedulers signal all of them
                process.send_signal(number)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", signalled)
    handler = signal.getsignal(number)
    run = options(base, tmp_path / "stopped", release, num_workers=2)
    with pytest.raises(Stopped, match="step 2 .*`resume`"):
        train(stage, run)
    assert signal.getsignal(number) == handler
    monkeypatch.undo()
    assert same_run(train(stage, replace(run, resume="auto")), trained(stage))


def test_the_end_of_the_launcher_ends_the_run(base, release, trained, tmp_path, monkeypatch):
    """A killed `accelerate launch` leaves its processes running."""
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["python", "accelerate", "launch"])
    monkeypatch.setattr(os, "getppid", lambda: 1)
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, resume="auto")
    with pytest.raises(Stopped, match="step 1 .SIGTERM"):
        train(stage, run)
    monkeypatch.undo()
    assert same_run(train(stage, run), trained(stage))


def test_damaged_checkpoints_are_skipped(base, release, trained, tmp_path, monkeypatch, capsys):
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1)
    interrupt(monkeypatch, call=4)
    with pytest.raises(KeyboardInterrupt):
        train(stage, run)
    monkeypatch.undo()
    work_dir = tmp_path / "out.unfinished"
    assert sorted(path.name for path in work_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    state = work_dir / "checkpoint-3" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-10])
    (work_dir / "history.jsonl").unlink()
    resumed = train(stage, replace(run, resume="auto"))
    printed = capsys.readouterr().out
    assert "checkpoint-3 is damaged (optimizer.pt" in printed and "checkpoint-2 at step 2" in printed
    assert "history.jsonl was missing or damaged" in printed
    assert same_run(resumed, trained(stage))


@pytest.mark.parametrize("name", ["stage.json", "trained.safetensors", "optimizer.pt", "history.jsonl"])
def test_every_damage_of_a_checkpoint_is_found(name, tmp_path):
    folder, history, facts = tmp_path / "checkpoint-3", tmp_path / "history.jsonl", dict.fromkeys(_FACTS, "x")
    history.write_text("{}\n" * 3)
    _write_checkpoint(folder, {"a": torch.zeros(2)}, {"b": 1}, history, facts | {"step": 3})
    assert find_damage(folder) is None and newest_checkpoint(tmp_path, print) == folder
    content = (folder / name).read_bytes()
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    changed = [b"", b"[]", b"{}", b"null", b'"text"', b'{"sha256": []}', b'{"step": 3}', content[:-9]]
    changed += [content.replace(b'"step": 3', b'"step": 4'), flipped] if name == "stage.json" else [flipped]
    for damaged in changed:
        (folder / name).write_bytes(damaged)
        assert find_damage(folder), damaged
    (folder / name).unlink()
    assert find_damage(folder)
    with pytest.raises(ValueError, match="all checkpoints .* damaged"):
        newest_checkpoint(tmp_path, lambda text: None)


def test_a_full_disk_keeps_the_checkpoint_before(base, release, trained, tmp_path, monkeypatch):
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1)
    save = run_state.save_file

    def full(tensors, path, **kwargs):
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path, **kwargs)

    monkeypatch.setattr(run_state, "save_file", full)
    with pytest.raises(OSError, match="full"):
        train(stage, run)
    assert [path.name for path in (tmp_path / "out.unfinished").glob("*checkpoint*")] == ["checkpoint-1"]
    monkeypatch.undo()
    assert same_run(train(stage, replace(run, resume="auto")), trained(stage))


def test_a_nan_gradient_is_not_applied(base, release, trained, tmp_path, monkeypatch):
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1)
    backward, calls = Accelerator.backward, []

    def broken(self, loss):
        backward(self, loss)
        calls.append(1)
        if len(calls) == 3:
            self._models[0].model.point_projection.linear_1.weight.grad[0, 0] = torch.nan

    monkeypatch.setattr(Accelerator, "backward", broken)
    with pytest.raises(LossError, match="step 2 .*loss is 5.*gradient norm nan"):
        train(stage, run)
    monkeypatch.undo()
    for checkpoint in list_checkpoints(tmp_path / "out.unfinished"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "trained.safetensors").values())
    assert same_run(train(stage, replace(run, resume="auto")), trained(stage))


def test_a_run_does_not_resume_with_other_data(base, release, tmp_path, monkeypatch):
    _, (annotations,) = release
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1)
    monkeypatch.setattr(loop.Training, "finish", lambda self: None)
    train(stage, run)
    other = write(tmp_path / "other.json", json.loads(annotations.read_text())[:-1])
    with pytest.raises(ValueError, match="other data.*`data`"):
        train(stage, replace(run, resume="auto", annotations=[other]))


def test_a_lost_worker_is_reported(base, release, trained, tmp_path, monkeypatch):
    encode, stage = loop.StageStream.encode, tiny(STAGES["I"])

    def dies(self, step, slot):
        if step == 2 and torch.utils.data.get_worker_info() is not None:
            time.sleep(1)
            os._exit(1)
        return encode(self, step, slot)

    def run_command():
        try:
            command.main("I", arguments)
        except SystemExit as error:
            (tmp_path / "message").write_text(str(error))

    monkeypatch.setitem(command.RECIPES["paper"], "I", stage)
    monkeypatch.setattr(loop.StageStream, "encode", dies)
    data_dir, (annotations,) = release
    arguments = ["--init", base, "--data", data_dir, "--annotations", annotations, "--output_dir", tmp_path / "out"]
    arguments = [*map(str, arguments), "--save_every", "1", "--num_workers", "1"]
    process = start_process(run_command)
    process.join(TIMEOUT)
    assert process.exitcode == 0
    message = (tmp_path / "message").read_text()
    assert message.startswith("error:") and "--num_workers" in message
    monkeypatch.undo()
    assert list((tmp_path / "out.unfinished").glob("checkpoint-*"))
    run = options(base, tmp_path / "out", release, save_every=1, resume="auto")
    assert same_run(train(stage, run), trained(stage))


def test_two_runs_do_not_share_a_folder(base, release, tmp_path):
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, resume="auto")
    reader, writer = os.pipe()

    def work():
        with locked(run.output_dir):
            os.write(writer, b"locked")
            time.sleep(TIMEOUT)

    process = start_process(work)
    try:
        assert os.read(reader, 6) == b"locked"
        with pytest.raises(ValueError, match="out is in use"):
            train(stage, run)
    finally:
        process.kill()
        process.join(TIMEOUT)
    train(stage, replace(run, max_steps=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_ended_before_the_lock_is_not_repeated(base, release, tmp_path, monkeypatch):
    run = options(base, tmp_path / "out", release)

    @contextlib.contextmanager
    def waited_for_another(path):
        path.mkdir()  # it ends between the check of the options and the lock
        yield

    monkeypatch.setattr(loop, "locked", waited_for_another)
    with pytest.raises(ValueError, match="exists already"):
        train(tiny(STAGES["I"]), run)


def test_a_checkpoint_beyond_the_end_is_refused(base, release, trained, tmp_path, monkeypatch):
    stage, run = tiny(STAGES["I"]), options(base, tmp_path / "out", release, save_every=1, resume="auto")
    interrupt(monkeypatch, call=4)
    with pytest.raises(KeyboardInterrupt):
        train(stage, run)
    monkeypatch.undo()
    work_dir = tmp_path / "out.unfinished"
    shutil.copytree(work_dir / "checkpoint-3", work_dir / "checkpoint-3.bak")
    (work_dir / "checkpoint-9").write_text("no folder")
    before = sorted(work_dir.rglob("*"))
    with pytest.raises(ValueError, match="`max_steps` 2: .*3 steps"):
        train(stage, replace(run, max_steps=2))
    assert sorted(work_dir.rglob("*")) == before
    (work_dir / "history.jsonl").write_text("damaged\n")
    assert same_run(train(stage, run), trained(stage))
