"""`minigpt3d describe` and `chat` with a tiny random model: output, errors on one line, exit codes."""

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bad_readers
import numpy as np
import pytest
import trimesh
from safetensors.torch import load_file, save_file
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.cli import chat
from minigpt3d.cli.main import main
from minigpt3d.data.reading import Limits
from minigpt3d.hub import save_pretrained
from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A folder with a tiny random model."""
    output_dir = tmp_path_factory.mktemp("cli") / "model"
    save_pretrained(make_seeing_model(), make_processor(), output_dir)
    return output_dir


@pytest.fixture
def objects(tmp_path):
    """A folder with two readable clouds, one of them in a subfolder, and other files."""
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
        code = main(arguments)
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err.splitlines()

    return call


def test_one_file_gives_its_answer(run, objects):
    code, out, err = run("describe", objects / "b.npy")
    assert (code, err) == (0, [])
    assert "".join(out).strip()
    other = run("describe", objects / "b.npy", "--prompt", "What color is it?")
    assert other[1] != out


def test_a_folder_gives_one_json_line_for_each_readable_file(run, objects):
    code, out, err = run("describe", objects, "--json", "--prompt", "What color is it?")
    assert (code, err) == (0, ["minigpt3d: 2 described, 0 failed, 1 skipped: 1 .md"])
    records = [json.loads(line) for line in out]
    assert [record["file"] for record in records] == [str(objects / "b.npy"), str(objects / "more" / "a.npy")]
    fields = {"file", "prompt", "answer", "num_points", "num_faces", "has_color"}
    fields |= {"up_axis", "sides", "colors", "warnings"}
    assert all(set(record) == fields for record in records)
    assert {record["prompt"] for record in records} == {"What color is it?"}
    assert all(record["answer"] for record in records)


def test_a_bad_file_is_one_line_and_the_others_are_described(run, objects):
    (objects / "bad.npy").write_bytes(b"not an array")
    code, out, err = run("describe", objects / "missing.ply", objects, "--json")
    assert code == 1
    assert len(out) == 2
    assert err[2:] == ["minigpt3d: 2 described, 2 failed, 1 skipped: 1 .md"]
    for line, path in zip(err[:2], [objects / "missing.ply", objects / "bad.npy"], strict=True):
        assert line.startswith(f"minigpt3d: {path}: ")


def test_a_folder_without_objects(run, tmp_path):
    code, out, err = run("describe", tmp_path)
    assert (code, out) == (1, [])
    assert len(err) == 1 and ".ply" in err[0]


def test_a_file_that_ends_or_blocks_the_reader_costs_itself_only(run, objects, monkeypatch):
    monkeypatch.setattr("minigpt3d.point_cloud_minigpt3d.load_orientations", bad_readers.load_orientations)
    monkeypatch.setattr("minigpt3d.data.reading.LIMITS", Limits(seconds=3, memory=512 * 1024**2))
    bad = ["aborts", "allocates", "loops"]
    for name in bad:
        np.save(objects / f"{name}.npy", make_cloud(2))
    start = time.monotonic()
    code, out, err = run("describe", objects, "--json")
    assert code == 1 and time.monotonic() - start < 60
    assert [Path(json.loads(line)["file"]).name for line in out] == ["b.npy", "a.npy"]
    assert [line.startswith(f"minigpt3d: {objects / name}.npy: ") for line, name in zip(err, bad, strict=False)] == [
        True
    ] * 3
    assert "2 described, 3 failed" in err[3]


def test_other_files_of_a_folder_are_counted_by_type(run, objects):
    for name in ("a.fbq", "b.fbq", "c.mtl", "d.png", "e.dxq"):
        (objects / name).write_text("nothing to see")
    (objects / "README.txt").write_text("These are chairs.")
    (objects / "captions.csv").write_text("object_id,caption\n1,A red chair.\n2,A chair.\n")
    code, _, err = run("describe", objects)
    assert code == 0 and len(err) == 1
    assert err[0].endswith("2 described, 0 failed, 6 skipped: 2 .fbq, 1 .csv, 1 .dxq, 1 .md, 1 .txt")
    for name in ("README.txt", "captions.csv"):
        code, _, err = run("describe", objects, objects / name)
        assert code == 1 and name in err[0] and "text" in err[0]


@pytest.mark.skipif(sys.platform == "win32", reason="such names are not allowed")
def test_control_characters_in_file_names_are_escaped(run, objects):
    name = "a\x1b[31m\n\x9b\U000e0001.npy"
    np.save(objects / name, make_cloud(2))
    (objects / "bad\x1b\n.npy").write_bytes(b"not an array")
    code, out, err = run("describe", objects)
    assert code == 1 and len(out) == 3 and len(err) == 2
    assert out[0].startswith(f"{objects}/a\\x1b[31m\\n\\x9b\\U000e0001.npy: ")
    assert "bad\\x1b\\n.npy: " in err[0]
    _, out, _ = run("describe", objects, "--json")
    assert all(line.isprintable() for line in out) and json.loads(out[0])["file"] == str(objects / name)


def test_json_says_what_the_file_holds(run, tmp_path):
    coord = np.random.default_rng(0).uniform(-1, 1, (1000, 3)) * [1, 0.5, 0.25]
    color = np.tile([1.0, 0, 0], (1000, 1))
    color[:250] = [0, 0, 1]
    np.save(tmp_path / "slab.npy", np.concatenate([coord, color], 1))
    np.save(tmp_path / "bare.npy", coord)
    trimesh.creation.box().export(tmp_path / "box.stl")
    _, out, err = run("describe", *(tmp_path / name for name in ("slab.npy", "bare.npy", "box.stl")), "--json")
    slab, bare, box = map(json.loads, out)
    assert (slab["num_points"], slab["num_faces"], slab["has_color"], slab["warnings"]) == (1000, None, True, [])
    assert slab["up_axis"] is None
    assert slab["sides"] == {"x": 1, "y": pytest.approx(0.5, abs=0.02), "z": pytest.approx(0.25, abs=0.02)}
    assert slab["colors"] == {"red": pytest.approx(0.75, abs=0.02), "blue": pytest.approx(0.25, abs=0.02)}
    assert (bare["has_color"], bare["colors"], len(bare["warnings"])) == (False, {}, 1)
    assert (box["num_points"], box["num_faces"], box["has_color"]) == (None, 12, False)
    assert len(err) == 2 and all("no color" in line for line in err)


def test_dropped_points_are_a_warning(run, tmp_path):
    cloud = make_cloud(0)
    cloud[3, 0] = np.nan
    np.save(tmp_path / "hole.npy", cloud)
    code, out, err = run("describe", tmp_path / "hole.npy")
    assert code == 0 and out
    assert len(err) == 1 and "hole.npy: warning: " in err[0]


def test_a_missing_model_is_one_line(run, objects, tmp_path):
    for command in ("describe", "chat"):
        code, out, err = run(command, objects / "b.npy", model=tmp_path / "nowhere")
        assert (code, out) == (1, [])
        assert len(err) == 1 and "nowhere" in err[0] and "OWNER/NAME" in err[0]


@pytest.fixture(scope="module")
def incomplete_model_dir(model_dir, tmp_path_factory):
    """The tiny model, less one of its weights."""
    folder = tmp_path_factory.mktemp("cli") / "incomplete"
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_projection.linear_2.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_incomplete_checkpoint_does_not_answer(run, objects, incomplete_model_dir):
    for command in ("describe", "chat"):
        code, out, err = run(command, objects / "b.npy", model=incomplete_model_dir)
        assert (code, out) == (1, [])
        assert len(err) == 1 and "1 missing keys" in err[0] and "language_projection.linear_2.weight" in err[0]


def test_the_demo_needs_a_complete_checkpoint(objects, incomplete_model_dir, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    options = ["--model", incomplete_model_dir, "--objects", objects, "--pictures", tmp_path / "pictures"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, options)])
    with pytest.raises(SystemExit, match="demo: .*1 missing keys"):
        runpy.run_path(str(Path(__file__).parents[2] / "demo" / "demo.py"), run_name="__main__")
    assert not (tmp_path / "pictures").exists()


def test_a_model_that_fails_on_one_file_continues_with_the_next(run, objects, monkeypatch):
    from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline

    forward, calls = PointCloudToTextPipeline._forward, []

    def fail_twice(self, *args, **kwargs):  # on the batch, then on its first cloud alone
        calls.append(1)
        if len(calls) <= 2:
            raise RuntimeError("out of\nmemory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PointCloudToTextPipeline, "_forward", fail_twice)
    code, out, err = run("describe", objects, "--json")
    assert code == 1
    assert [json.loads(line)["file"] for line in out] == [str(objects / "more" / "a.npy")]
    assert str(objects / "b.npy") in err[0] and "out of memory" in err[0]
    assert len(err) == 2 and "1 described, 1 failed" in err[1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_file_names_that_are_not_utf8(run, objects):
    name = os.fsdecode(b"a\xff.npy")
    np.save(objects / name, make_cloud(2))
    (objects / os.fsdecode(b"bad\xff.npy")).write_bytes(b"not an array")
    code, out, err = run("describe", objects, "--json")
    assert code == 1 and len(out) == 3
    assert os.fsencode(json.loads(out[0])["file"]) == os.fsencode(objects / name)
    assert len(err) == 2 and "bad\\udcff.npy: " in err[0]
    code, out, err = run("describe", objects / name, objects / "b.npy")
    assert (code, len(out), err) == (0, 2, [])
    assert out[0].startswith(f"{objects}/a\\udcff.npy: ")


def test_missing_color_and_up_axis_reach_the_reader(run, tmp_path):
    np.save(tmp_path / "xyz.npy", make_cloud(0)[:, :3])
    answers = [
        run("describe", tmp_path / "xyz.npy", *options)
        for options in ([], ["--missing-color", "white"], ["--up-axis", "x"])
    ]
    assert all(code == 0 and len(err) == 1 and "no color" in err[0] for code, _, err in answers)
    assert len({tuple(out) for _, out, _ in answers}) == 3


def test_a_cloud_is_turned_once(run, model_dir, tmp_path, monkeypatch):
    """By --up-axis if it is given, else by the model's own setting; and the model keeps its setting."""
    np.save(tmp_path / "cloud.npy", make_cloud(0)[:, :3])  # whose answers differ by the axis
    turned = shutil.copytree(model_dir, tmp_path / "turned")
    config = json.loads((turned / "processor_config.json").read_text())
    config["feature_extractor"]["up_axis"] = "x"
    (turned / "processor_config.json").write_text(json.dumps(config))

    def answers(*options, model=model_dir):
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?"))
        _, described, _ = run("describe", tmp_path / "cloud.npy", *options, model=model)
        _, chatted, _ = run("chat", tmp_path / "cloud.npy", *options, model=model)
        assert [line.strip() for line in chatted] == described
        return described

    assert answers(model=turned) == answers("--up-axis", "x") != answers()
    assert answers("--up-axis", "y", model=turned) == answers()


def make_scan() -> np.ndarray:
    """A box of three heights with z up, on a floor."""
    rng = np.random.default_rng(0)
    coord = np.concatenate(
        [rng.uniform([-1, -1, 0], [1, 1, 3], (3000, 3)), rng.uniform([-2, -2, 0], [2, 2, 0.01], (2000, 3))]
    )
    return np.concatenate([coord, np.full((5000, 3), 0.5)], axis=1)


def test_a_scan_is_cleaned_and_turned_if_asked(run, model_dir, tmp_path, monkeypatch):
    np.save(tmp_path / "scan.npy", make_scan())
    (left,) = run("describe", tmp_path / "scan.npy", "--json")[2]
    assert "like a floor" in left and "--clean" in left and "--up-axis" in left
    code, described, err = run("describe", tmp_path / "scan.npy", "--clean", "floor", "--up-axis", "auto", "--json")
    (warning,) = err
    assert code == 0 and "removed 2" in warning and "of a floor" in warning
    record = json.loads(described[0])
    assert record["up_axis"] == "z" and record["sides"]["y"] == 1 and len(record["warnings"]) == 1
    given = run("describe", tmp_path / "scan.npy", "--clean", "floor", "--up-axis", "z", "--json")
    assert given == (code, described, err)
    cleaned = shutil.copytree(model_dir, tmp_path / "cleaned")
    config = json.loads((cleaned / "processor_config.json").read_text())
    config["feature_extractor"] |= {"clean": "floor", "up_axis": "auto"}
    (cleaned / "processor_config.json").write_text(json.dumps(config))
    assert run("describe", tmp_path / "scan.npy", "--json", model=cleaned) == given
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?"))
    _, chatted, err = run("chat", tmp_path / "scan.npy", "--clean", "floor", "--up-axis", "auto")
    assert [line.strip() for line in chatted] == [record["answer"]] and err == [warning]


def test_a_model_that_fails_to_choose_the_up_axis_costs_one_file(run, objects, monkeypatch):
    choose = PointCloudToTextPipeline.choose_orientation
    calls = []

    def fail_once(self, orientations):
        calls.append(len(orientations))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return choose(self, orientations)

    monkeypatch.setattr(PointCloudToTextPipeline, "choose_orientation", fail_once)
    code, out, err = run("describe", objects, "--up-axis", "auto")
    assert code == 1 and set(calls) == {3} and len(out) == len(calls) - 1
    assert "out of memory" in err[0]


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


def test_chat_drops_a_bad_question_and_continues(run, objects, monkeypatch):
    def ask(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return run("chat", objects / "b.npy")

    good = ask("What is this?", "What color is it?")[1]
    code, out, err = ask("What is this?", "what " * 3000, "What color is it?")
    assert (code, out) == (1, good)
    assert len(err) == 1 and "the context has" in err[0]


def test_chat_has_commands(run, objects, monkeypatch):
    def ask(*lines, path=objects / "b.npy"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return run("chat", path)

    first, second = "What is this?", "What color is it?"
    fresh = ask(second)[1]
    assert ask(first, second)[1][-len(fresh) :] != fresh, "the first question counts"
    assert ask(first, "/reset", second)[1][-len(fresh) :] == fresh
    other = objects / "more" / "a.npy"
    about_other = ask(first, path=other)[1]
    assert ask(second, f"/file {other}", first)[1] == fresh + about_other != fresh + ask(first)[1]
    code, out, err = ask(f"/file {objects}/none.npy", "/nothing", "/file", second)
    assert (code, out) == (1, fresh) and "none.npy" in err[0] and "/help" in err[1] and "name" in err[2]
    code, out, err = ask("/help")
    assert (code, err) == (0, []) and all(any(command in line for line in out) for command in chat.COMMANDS)


def test_chat_about_a_bad_file(run, tmp_path, monkeypatch):
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\n"))
    for path in (tmp_path / "missing.npy", tmp_path / "bad.npy"):
        code, out, err = run("chat", path)
        assert (code, out) == (1, [])
        assert len(err) == 1 and path.name in err[0]


def test_a_closed_pipe_is_quiet(objects, model_dir):
    """As in `minigpt3d describe … | head -0`."""
    command = [sys.executable, "-m", "minigpt3d.cli", "describe", str(objects), "--model", str(model_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (1, b"")


def test_a_long_chat_forgets_its_beginning(run, objects, monkeypatch):
    """More questions than the context holds: every one is answered."""
    questions = "\n".join(["what " * 100] * 40)
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    code, _, err = run("chat", objects / "b.npy", "--max-new-tokens", "3")
    assert code == 0 and err and all("its beginning is left out" in line for line in err)
