"""The page of `minigpt3d demo`, without a server or a browser."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hub_double import serve
from repository import ROOT
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.cli.main import main
from minigpt3d.evaluation.attention import spread
from minigpt3d.meshes_minigpt3d import Material, Surface, to_srgb
from minigpt3d.page.content import LABELS, chat_about, file_url, heat_colors, with_labels
from minigpt3d.page.shown import Objects, example_files
from minigpt3d.page.space import write_space
from minigpt3d.page.streaming import Answerer, Stop, to_messages
from minigpt3d.page.surface import merge_faces, to_scene, write_surface
from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline


CHAIR = ROOT / "demo" / "objects" / "osakaChair.obj"
CONTROLS = ("y", "none", "black")


@pytest.fixture(scope="module")
def pipeline():
    return PointCloudToTextPipeline(model=make_seeing_model(), processor=make_processor(), device="cpu")


@pytest.fixture(scope="module")
def objects(pipeline):
    with Objects(pipeline, threading.Lock()) as objects:
        yield objects
    assert not objects.folder.exists()


@pytest.fixture(scope="module")
def page():
    """The module of what happens on the page."""
    return pytest.importorskip("minigpt3d.page.actions", reason="gradio is not installed", exc_type=ImportError)


@pytest.fixture
def talk(page, pipeline, objects, tmp_path):
    """Actions, and a session that has an object open."""
    np.save(tmp_path / "a.npy", make_cloud(2))
    actions, session = page.Actions(pipeline, objects, threading.Lock(), 5), page.Session()
    actions.open(session, [tmp_path / "a.npy"], *CONTROLS)
    return actions, session


# ---- Objects --------------------------------------------------------------------------------------------------------


def test_files_dropped_together_find_each_other(objects, tmp_path, pipeline):
    uploads = []
    for name in ("Wood_013_COLOR.jpg", "osakaChair.mtl", "osakaChair.obj"):  # gradio has a folder for each
        (tmp_path / name).mkdir()
        uploads.append(shutil.copy(CHAIR.parent / name, tmp_path / name / name))
    (path,) = objects.gather(uploads)
    shown = objects.read(path)
    assert shown.name == "osakaChair.obj" and shown.facts.has_color and shown.warnings == ()
    np.testing.assert_array_equal(shown.cloud, pipeline.read_point_cloud(CHAIR))


def test_files_of_one_name_are_kept_apart(objects, tmp_path):
    uploads = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        uploads.append(tmp_path / str(number) / "a.npy")
        np.save(uploads[-1], make_cloud(number))
    first, second = (objects.read(path).cloud for path in objects.gather(uploads))
    assert not np.array_equal(first, second)


def test_every_warning_is_told_with_the_name_that_people_know(objects, tmp_path):
    cloud = make_cloud(0, 2000)[:, :3]
    np.savetxt(tmp_path / "scan.xyz", np.concatenate([cloud, cloud[:3] + 50]))
    shown = objects.read(tmp_path / "scan.xyz", clean="outliers", up_axis="z", missing_color="white")
    assert any("no color" in text for text in shown.warnings)
    assert any("removed 3 of 2,003 points" in text for text in shown.warnings)
    assert not any(str(tmp_path) in text for text in shown.warnings)
    assert shown.up_axis == "z" and (shown.cloud[:, 3:] == 1).all()


@pytest.mark.parametrize(("name", "content"), [("a.ply", b"ply\nnothing"), ("a.jpg", b"\xff\xd8"), ("a.glb", b"")])
def test_a_file_that_cannot_be_read_gives_its_sentence(objects, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        objects.read(objects.gather([tmp_path / name])[0])
    assert str(error.value).startswith(f"{name}: ") and str(objects.folder) not in str(error.value)


def test_examples_ship(objects):
    assert {path.name for path in example_files()} >= {"oakTable.ply", "osakaChair.obj", "drawersCabinet.npy"}


# ---- Surfaces -------------------------------------------------------------------------------------------------------


def test_a_surface_has_the_colors_of_the_cloud(tmp_path, pipeline):
    """Read again, the GLB gives the same points in the same colors."""
    write_surface(CHAIR, tmp_path / "chair.glb", "black")
    before, after = (pipeline.read_point_cloud(path) for path in (CHAIR, tmp_path / "chair.glb"))
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=1e-4)
    assert np.abs(after[:, 3:] - before[:, 3:]).mean() < 0.03  # the texture is a JPEG once more


def test_colors_of_faces_and_materials_are_shown():
    corners = np.random.default_rng(0).uniform(-1, 1, (20, 3, 3))
    red, gray = np.tile([255, 0, 0, 255], (20, 1, 1)).astype(np.uint8), Material(np.array([0.5, 0.5, 0.5, 1]))
    (mesh,) = to_scene(
        [Surface(corners, red), Surface(corners, material=gray), Surface(corners)], (0, 0, 1)
    ).geometry.values()
    srgb = to_srgb(np.asarray(mesh.visual.vertex_colors)[:, :3] / 255)  # glTF stores linear colors
    expected = np.repeat([[1, 0, 0], [0.5, 0.5, 0.5], [0, 0, 1]], 60, axis=0)
    np.testing.assert_allclose(srgb, expected, atol=0.01)


def test_a_surface_with_many_faces_is_merged():
    sphere = trimesh.creation.icosphere(subdivisions=5)  # 20,480 faces
    surface = Surface(np.asarray(sphere.vertices)[sphere.faces])
    (same,) = merge_faces([surface], 30_000)
    assert same.corners is surface.corners or np.array_equal(same.corners, surface.corners)
    (merged,) = merge_faces([surface], 5_000)
    assert 500 < len(merged.corners) <= 5_000
    distance = np.linalg.norm(merged.corners, axis=-1)
    np.testing.assert_allclose(distance, 1, atol=0.1)
    area = np.linalg.norm(np.cross(*np.diff(merged.corners, axis=1).transpose(1, 0, 2)), axis=1).sum() / 2
    assert area > 0.9 * 4 * np.pi, "it has no holes"


# ---- Conversation ---------------------------------------------------------------------------------------------------


def test_an_answer_is_streamed(pipeline):
    cloud = pipeline.read_point_cloud(make_cloud(1))
    texts = list(Answerer(pipeline, threading.Lock(), 20).stream(cloud, [], "What is this?", Stop()))
    (expected,) = pipeline(cloud, prompt="What is this?", up_axis="y", clean="none", max_new_tokens=20)
    assert texts[-1] == expected["generated_text"] and len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))


def test_an_answer_is_stopped(pipeline):
    cloud, stop = pipeline.read_point_cloud(make_cloud(1)), Stop()
    lock = threading.Lock()
    stream = Answerer(pipeline, lock, 200).stream(cloud, [], "What is this?", stop)
    next(stream)
    stop.asked = True
    assert len(list(stream)) < 100 and not lock.locked()
    abandoned = Answerer(pipeline, lock, 200).stream(cloud, [], "What is this?", Stop())
    next(abandoned)
    abandoned.close()  # the browser was closed
    assert not lock.locked()


def test_a_conversation_that_is_too_long_loses_its_beginning(pipeline, monkeypatch):
    cloud, turns = pipeline.read_point_cloud(make_cloud(1)), [(f"Question {i}?", "An answer.") for i in range(8)]
    long = pipeline.preprocess({"messages": to_messages(cloud, turns, "What?")}, up_axis="y")["input_ids"].shape[1]
    monkeypatch.setattr(pipeline.processor.tokenizer, "model_max_length", long - 1)
    assert list(Answerer(pipeline, threading.Lock(), 5).stream(cloud, turns, "What?", Stop()))
    monkeypatch.setattr(pipeline.processor.tokenizer, "model_max_length", 10)
    with pytest.raises(ValueError, match="context"):
        list(Answerer(pipeline, threading.Lock(), 5).stream(cloud, turns, "What?", Stop()))


# ---- What the browser gets ------------------------------------------------------------------------------------------


def test_what_the_viewer_gets(page, objects, pipeline, tmp_path):
    np.save(tmp_path / "<b>.npy", make_cloud(2))
    session = page.Session()
    actions = page.Actions(pipeline, objects, threading.Lock(), 5)
    _, payload, _, facts, *_ = actions.open(session, [tmp_path / "<b>.npy"], *CONTROLS)
    payload = json.loads(payload)
    coord = np.frombuffer(base64.b64decode(payload["coord"]), "<f4").reshape(-1, 3)
    color = np.frombuffer(base64.b64decode(payload["color"]), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(coord, session.shown.cloud[:, :3])
    np.testing.assert_allclose(color / 255, session.shown.cloud[:, 3:], atol=1 / 255)
    assert "&lt;b&gt;.npy" in facts and "<b>.npy" not in facts
    heat = json.loads(actions.draw(session, page.ATTENTION, 1, "black")[0])["heat"]
    values = spread(session.attention, coord)[0]
    most = np.frombuffer(base64.b64decode(heat), np.uint8).reshape(-1, 3)[values.argmax()]
    assert most.tolist() == heat_colors(np.ones(1))[0].tolist(), "the most attention has the last color"


def test_advice_names_the_controls_of_the_page():
    text = with_labels("set `clean` to floor and `up_axis` to y, not `other`")
    assert "`clean`" not in text and LABELS["clean"] in text and LABELS["up_axis"] in text and "`other`" in text


def test_the_viewer_is_bundled_from_its_source():
    """Run `make viewer` after a change."""
    digest, bundle = hashlib.sha256(), (ROOT / "page" / "static" / "viewer.js").read_text()
    for name in ("viewer.js", "build.js", "package-lock.json"):
        digest.update((ROOT / "page" / "viewer" / name).read_bytes())
    assert digest.hexdigest() in bundle.splitlines()[0] and "Three.js Authors" in bundle


def test_names_and_texts_are_no_markup():
    assert file_url(Path("/a b/50%#1?.glb")).endswith("=/a%20b/50%25%231%3F.glb")
    asked, answered = chat_about([("<img src=x onerror=alert(1)>", "It's <b>red</b> & new.")])
    assert "<" not in asked["content"] + answered["content"] and "It's &lt;b&gt;" in answered["content"]


# ---- Conversations --------------------------------------------------------------------------------------------------


def stream_of(monkeypatch, *pieces):
    """Let the model answer with these texts; an exception is raised. Returns the calls' questions and whether they drew."""
    calls = []

    def stream(self, cloud, turns, question, stop, sample=False):
        calls.append((question, sample))
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    monkeypatch.setattr(Answerer, "stream", stream)
    return calls


@pytest.mark.parametrize("ending", ["close", "forget", "open", "reread"])
def test_an_answer_does_not_outlive_its_conversation(talk, monkeypatch, tmp_path, ending):
    actions, session = talk
    stream_of(monkeypatch, "A", "A table.")
    answer = actions.ask(session, "What is this?")
    for _ in range(2):
        next(answer)
    arguments = {"open": ([tmp_path / "a.npy"], *CONTROLS), "reread": CONTROLS}.get(ending, ())
    getattr(actions, ending)(session, *arguments)
    assert [chat for _, chat, _ in answer] == [[]] and session.turns == []


def test_what_was_wanted_last_is_shown(talk, page, objects, monkeypatch, tmp_path):
    """Reading and drawing take time; a visitor who goes on meanwhile does not get what they showed."""
    actions, session = talk
    meanwhile, skipped = [], [page.gr.skip()] * 7

    def slow(function):
        def call(*arguments, **more):
            result = function(*arguments, **more)
            if meanwhile:
                meanwhile.pop()()
            return result

        return call

    np.save(tmp_path / "b.npy", make_cloud(3))
    monkeypatch.setattr(objects, "read", slow(objects.read))
    monkeypatch.setattr(page, "measure_attention", slow(page.measure_attention))
    meanwhile.append(lambda: actions.open(session, [tmp_path / "b.npy"], *CONTROLS))
    assert list(actions.reread(session, *CONTROLS)) == skipped and session.shown.name == "b.npy"
    meanwhile.append(lambda: actions.open(session, [tmp_path / "a.npy"], *CONTROLS))
    assert list(actions.draw(session, page.ATTENTION, 0, "black")) == skipped[:2] and session.attention is None
    meanwhile.append(lambda: actions.close(session))
    assert list(actions.reread(session, *CONTROLS)) == skipped and session.shown is None


def test_retry_asks_the_question_that_failed(talk, monkeypatch):
    actions, session = talk
    stream_of(monkeypatch, "A table.")
    list(actions.ask(session, "What is this?"))
    for failure in ([RuntimeError("no memory")], ["Half", RuntimeError("no memory")], []):
        stream_of(monkeypatch, *failure)
        *_, (_, chat, _) = actions.ask(session, "What color is it?")
        assert chat[-1]["content"].startswith("No answer") and ("no memory" in chat[-1]["content"]) == bool(failure)
        calls = stream_of(monkeypatch, "Brown.")
        *_, (_, chat, _) = actions.retry(session)
        assert calls == [("What color is it?", False)]
        assert [turn["content"] for turn in chat] == ["What is this?", "A table.", "What color is it?", "Brown."]
        calls = stream_of(monkeypatch, "Red.")
        *_, (_, chat, _) = actions.retry(session)
        assert calls == [("What color is it?", True)] and len(session.turns) == 2, "another answer is drawn"
        session.turns.pop()


@pytest.mark.parametrize("ending", ["close", "open", "leave"])
def test_files_are_deleted_with_their_object(talk, tmp_path, ending):
    actions, session = talk
    folder = session.path.parent
    assert folder.is_dir()
    getattr(actions, ending)(session, *(([tmp_path / "a.npy"], *CONTROLS) if ending == "open" else ()))
    assert not folder.exists() and (tmp_path / "a.npy").exists()


def test_only_gathered_files_are_deleted(objects, tmp_path):
    others = [tmp_path / "a" / "example.ply", objects.folder / "kept" / "surface.glb"]
    for path in others:
        path.parent.mkdir()
        path.write_text("kept")
    objects.remove(others)
    assert all(path.exists() for path in others)


# ---- Space ----------------------------------------------------------------------------------------------------------


def test_a_space_names_its_model(tmp_path, capsys):
    pytest.importorskip("gradio")
    assert main(["demo", "--space", str(tmp_path / "space"), "--model", "org/model"]) == 0
    assert "org/model" in (tmp_path / "space" / "app.py").read_text()
    readme = (tmp_path / "space" / "README.md").read_text()
    assert "sdk: gradio" in readme and "- org/model" in readme and "app_file: app.py" in readme
    needed = (tmp_path / "space" / "requirements.txt").read_text()
    assert "gradio" in needed and "peft" in needed and "extra" not in needed
    assert not (tmp_path / "space" / "minigpt3d" / "checkpoints").exists()
    assert main(["demo", "--space", str(tmp_path / "space")]) == 0, "it is written again"
    assert (tmp_path / "space" / "minigpt3d" / "checkpoints" / "household" / "config.json").is_file()


def test_a_space_has_the_options_that_were_given(tmp_path):
    pytest.importorskip("gradio")
    options = [
        "--up-axis",
        "z",
        "--max-new-tokens",
        "20",
        "--max-seconds",
        "5.0",
        "--clean",
        "floor",
        "--dtype",
        "float32",
    ]
    assert main(["demo", "--space", str(tmp_path / "space"), "--model", "org/model", *options]) == 0
    program = (tmp_path / "space" / "app.py").read_text()
    arguments = json.loads(program[program.index("[") : program.rindex("]") + 1])
    assert arguments[:5] == ["demo", "--host", "0.0.0.0", "--model", "org/model"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert dict(zip(arguments[5::2], arguments[6::2], strict=True)) == given


def test_what_others_wrote_into_a_space_stays(tmp_path):
    pytest.importorskip("gradio")
    space = tmp_path / "space"
    for path in (".git/config", ".gitattributes"):  # a clone of an empty repository
        (space / path).parent.mkdir(parents=True, exist_ok=True)
        (space / path).write_text("mine")
    write_space(space, "org/model")
    (space / "notes.txt").write_text("mine")
    (space / "minigpt3d" / "old.py").write_text("")
    write_space(space, "org/model")
    assert all((space / path).read_text() == "mine" for path in (".git/config", ".gitattributes", "notes.txt"))
    assert not (space / "minigpt3d" / "old.py").exists()
    (space / "minigpt3d" / ".git").mkdir()
    with pytest.raises(ValueError, match="git repository"):
        write_space(space, "org/model")


def test_mistakes_about_a_space_are_told(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio")
    mine = (
        "notes.txt",
        "README.md",
        "minigpt3d/page/layout.py",
        "minigpt3d/.git/config",
    )  # beside a clone of this project
    for path in mine:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("mine")
    new = ["--space", str(tmp_path / "new")]
    for arguments, word in (
        (["--push", "org/space"], "--space"),
        (["--space", str(tmp_path)], "git repository"),
        (["--space", str(tmp_path / "minigpt3d")], "something else"),
        (["--space", str(tmp_path / "notes.txt")], "is a file"),
        ([*new, "--model", str(tmp_path)], "--model"),
        ([*new, "--port", "8000"], "--port"),
        ([*new, "--host", "0.0.0.0"], "--host"),
        ([*new, "--push", "space"], "OWNER/NAME"),
        ([*new, "--push", "org/a/b"], "OWNER/NAME"),
    ):
        assert main(["demo", *arguments]) == 1
        assert word in capsys.readouterr().err
    assert all((tmp_path / path).read_text() == "mine" for path in mine) and not (tmp_path / "new").exists()
    monkeypatch.setattr("minigpt3d.cli.page.find_spec", lambda name: None)
    assert main(["demo", *new]) == 1
    assert "minigpt3d[demo]" in capsys.readouterr().err


PUSH = """
import os, sys
from minigpt3d.cli.main import main

command = ["demo", "--space", sys.argv[1], "--model", "org/model", "--push", "org/space"]
codes = [main(command), main(command)]  # a second time over the first
os.environ["HF_TOKEN"] = ""
print(*codes, main(command))
"""


def test_a_space_is_published(tmp_path):
    pytest.importorskip("gradio")
    space = tmp_path / "space"
    write_space(space, "org/model")
    (space / ".env").write_text("mine")
    with serve() as hub:
        changes = {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_secret",
        }
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(space)],
            env=os.environ | changes | {"HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        files = hub.repositories["spaces", "org/space"].files("main")
    assert done.stdout.splitlines()[-1] == "0 0 1" and "hf upload" in done.stderr, done.stderr
    assert f"{hub.address}/spaces/org/space" in done.stdout
    written = {path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file()}
    assert written - {".env"} == files.keys() - {".gitattributes"} and b"org/model" in files["app.py"]
