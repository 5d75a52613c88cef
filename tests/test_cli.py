"""`minigpt3d describe` and `chat`: output, errors on one line, exit codes, and a `--help` that waits for nothing."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from ways_in import make_cloud, make_processor, make_seeing_model

import minigpt3d_cli
from minigpt3d.conversion import save_pretrained


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A folder with a tiny random model."""
    output_dir = tmp_path_factory.mktemp("cli") / "model"
    save_pretrained(make_seeing_model(), make_processor(), output_dir)
    return output_dir


@pytest.fixture
def objects(tmp_path):
    """A folder with two readable clouds, one of them in a subfolder, and files that are none."""
    folder = tmp_path / "objects"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(["b.npy", "more/a.npy"]):
        np.save(folder / name, make_cloud(seed))
    (folder / "notes.md").write_text("nothing to see")
    (folder / ".hidden.npy").write_text("nothing to see")
    return folder


@pytest.fixture
def run(model_dir, capsys):
    """Run a command with the tiny model → exit code, lines of stdout, lines of stderr."""

    def call(command: str, *args, model=model_dir):
        arguments = [command, *map(str, args), "--model", str(model), "--device", "cpu", "--max-new-tokens", "6"]
        code = minigpt3d_cli.main(arguments)
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err.splitlines()

    return call


def test_help_imports_nothing_heavy():
    program = """
import sys, time
start = time.perf_counter()
import minigpt3d_cli
try:
    minigpt3d_cli.main(["describe", "--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "transformers", "numpy", "trimesh", "minigpt3d"} & sys.modules.keys()
assert not heavy, heavy
assert time.perf_counter() - start < 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--prompt" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["describe"], ["paint", "x"], ["describe", "x", "--max-new-tokens", "0"]])
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        minigpt3d_cli.main(arguments)
    assert end.value.code == 2
    assert "usage: minigpt3d" in capsys.readouterr().err


def test_one_file_gives_its_answer(run, objects):
    code, out, err = run("describe", objects / "b.npy")
    assert (code, err) == (0, [])
    assert "".join(out).strip()
    other = run("describe", objects / "b.npy", "--prompt", "What color is it?")
    assert other[1] != out


def test_a_folder_gives_one_json_line_for_each_readable_file(run, objects):
    code, out, err = run("describe", objects, "--json", "--prompt", "What color is it?")
    assert (code, err) == (0, [])
    records = [json.loads(line) for line in out]
    assert [record["file"] for record in records] == [str(objects / "b.npy"), str(objects / "more" / "a.npy")]
    assert all(set(record) == {"file", "prompt", "answer"} for record in records)
    assert {record["prompt"] for record in records} == {"What color is it?"}
    assert all(record["answer"] for record in records)


def test_a_bad_file_costs_one_line_and_the_others_are_done(run, objects):
    (objects / "bad.npy").write_bytes(b"not an array")
    code, out, err = run("describe", objects / "missing.ply", objects, "--json")
    assert code == 1
    assert len(out) == 2
    assert len(err) == 2
    for line, path in zip(err, [objects / "missing.ply", objects / "bad.npy"], strict=True):
        assert line.startswith(f"minigpt3d: {path}: ")


def test_a_folder_without_objects(run, tmp_path):
    code, out, err = run("describe", tmp_path)
    assert (code, out) == (1, [])
    assert len(err) == 1 and ".ply" in err[0]


def test_dropped_points_are_reported_and_the_file_is_done(run, tmp_path):
    cloud = make_cloud(0)
    cloud[3, 0] = np.nan
    np.save(tmp_path / "hole.npy", cloud)
    code, out, err = run("describe", tmp_path / "hole.npy")
    assert code == 0 and out
    assert len(err) == 1 and "hole.npy: warning: " in err[0]


def test_a_missing_model_is_one_line_with_the_fix(run, objects, tmp_path):
    for command in ("describe", "chat"):
        code, out, err = run(command, objects / "b.npy", model=tmp_path / "nowhere")
        assert (code, out) == (1, [])
        assert len(err) == 1 and "nowhere" in err[0] and "--model" in err[0]


def test_the_model_in_the_checkout_goes_before_the_hub(tmp_path, monkeypatch):
    from minigpt3d import HUB_ID

    monkeypatch.setattr(minigpt3d_cli, "BUNDLED_MODEL", tmp_path)
    assert minigpt3d_cli.resolve_model(None) == HUB_ID
    (tmp_path / "config.json").write_text("{}")
    assert minigpt3d_cli.resolve_model(None) == str(tmp_path)
    assert minigpt3d_cli.resolve_model("mine") == "mine"


def test_points_are_read_as_told(run, tmp_path):
    """`--missing-color` and `--up-axis` reach the reader."""
    np.save(tmp_path / "xyz.npy", make_cloud(0)[:, :3])
    answers = [
        run("describe", tmp_path / "xyz.npy", *options)
        for options in ([], ["--missing-color", "white"], ["--up-axis", "x"])
    ]
    assert all(code == 0 and not err for code, _, err in answers)
    assert len({tuple(out) for _, out, _ in answers}) == 3


def test_chat_answers_each_line_and_remembers(run, objects, monkeypatch):
    def ask(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return run("chat", objects / "b.npy")

    code, both, err = ask("What is this?", "", "What color is it?")
    assert (code, err) == (0, [])
    first = ask("What is this?", "/quit", "What color is it?")[1]
    assert both[: len(first)] == first
    assert both[len(first) :] and both[len(first) :] != ask("What color is it?")[1]
    assert ask()[:2] == (0, [])


def test_chat_about_a_bad_file(run, tmp_path, monkeypatch):
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\n"))
    for path in (tmp_path / "missing.npy", tmp_path / "bad.npy"):
        code, out, err = run("chat", path)
        assert (code, out) == (1, [])
        assert len(err) == 1 and path.name in err[0]


def test_interrupt_and_closed_pipe_are_quiet(monkeypatch, capfd):
    def raise_error(error):
        def run(args):
            raise error

        return run

    monkeypatch.setattr(minigpt3d_cli, "run_describe", raise_error(KeyboardInterrupt()))
    assert minigpt3d_cli.main(["describe", "x"]) == 130
    assert capfd.readouterr() == ("", "")


def test_output_that_nobody_reads(objects, model_dir):
    """`minigpt3d describe … | head -0` ends without a word."""
    program = f"import minigpt3d_cli; raise SystemExit(minigpt3d_cli.main({['describe', str(objects), '--model', str(model_dir)]!r}))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
