"""`minigpt3d describe --out` and `minigpt3d classify` with a tiny random model: forms, resuming, hostile names, labels."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import trimesh
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.catalog.journal import Journal, Key
from minigpt3d.catalog.rows import Question, safe_cell, to_cells
from minigpt3d.cli import catalog, classify, describe, embed, search
from minigpt3d.cli.main import main
from minigpt3d.data.reading import FileResult
from minigpt3d.hub import save_pretrained


ASK = ["--ask", "color=What color is it?", "--ask", "use=What is it for?"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("catalog") / "model"
    save_pretrained(make_seeing_model(), make_processor(), output_dir)
    return output_dir


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    path.write_text("\ufeffchair\n\n table \nwashing machine\n", encoding="utf-8")
    return path


@pytest.fixture
def objects(tmp_path):
    """Two clouds, one without color, a broken file, a text, and another program's file."""
    folder = tmp_path / "objects"
    (folder / "more").mkdir(parents=True)
    np.save(folder / "a.npy", make_cloud(0))
    np.save(folder / "more" / "b.npy", make_cloud(1)[:, :3])
    (folder / "broken.ply").write_bytes(b"ply\nnothing")
    (folder / "notes.txt").write_text("These are chairs.")
    (folder / "scene.max").write_text("x")
    return folder


@pytest.fixture
def run(model_dir, labels, capsys):
    """Run a command → exit code, lines of stdout, lines of stderr."""

    def call(command, *args):
        words = [command, *map(str, args), "--model", str(model_dir), "--device", "cpu"]
        words += [] if command == "search" else ["--labels", str(labels)]
        words += ["--max-new-tokens", "4"] if command == "describe" else []
        code = main(words)
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err.splitlines()

    return call


def read_csv(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_has_a_row_for_every_file(run, objects, tmp_path):
    out, pictures = tmp_path / "catalog.csv", tmp_path / "pictures"
    code, lines, err = run("describe", objects, "--out", out, *ASK, "--thumbnails", pictures, "--min-confidence", 0)
    assert (code, lines) == (1, [])
    assert err[-1] == "minigpt3d: 2 described, 1 failed, 2 skipped: 1 .max, 1 .txt"
    first, broken, second = read_csv(out)
    assert [row["file"] for row in (first, broken, second)] == [
        str(objects / name) for name in ("a.npy", "broken.ply", "more/b.npy")
    ]
    assert first["color"] and first["use"] and "answer" not in first
    assert first["kind"] in ("chair", "table", "washing machine") and 1 / 3 <= float(first["confidence"]) <= 1
    assert float(first["side_x"]) <= 1 and first["main_color"] and "%" in first["colors"]
    assert (first["has_color"], second["has_color"]) == ("True", "False")
    assert "no color" in second["warnings"] and second["colors"] == ""
    assert "broken.ply" in broken["error"] and broken["color"] == broken["kind"] == "" and not first["error"]
    assert sorted(row["thumbnail"] for row in (first, second)) == sorted(map(str, pictures.iterdir()))
    assert not list(tmp_path.glob(".*"))


def test_forms_agree(run, objects, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in ("csv", "jsonl", "parquet", "html"):
        run("describe", objects, "--out", tmp_path / f"catalog.{suffix}", "--min-confidence", 1)
    table = read_csv(tmp_path / "catalog.csv")
    lines = [json.loads(line) for line in (tmp_path / "catalog.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = parquet.read_table(tmp_path / "catalog.parquet").to_pylist()
    assert [row["answer"] or "" for row in lines] == [row["answer"] for row in table]
    assert [row["answer"] for row in lines] == [row["answer"] for row in rows]
    assert {row["kind"] for row in lines} == {"not sure", None}
    assert rows[0]["side_x"] == lines[0]["sides"]["x"] and rows[0]["num_points"] == lines[0]["num_points"]
    assert len({frozenset(row) for row in lines}) == 1 and list(rows[0]) == list(table[0])
    page = (tmp_path / "catalog.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 and page.count("<article") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "default-src 'none'" in page


def test_a_stopped_run_continues(run, objects, tmp_path, monkeypatch):
    for number in range(3):
        np.save(objects / f"c{number}.npy", make_cloud(2 + number))
    out, asked = tmp_path / "catalog.jsonl", []
    make_row = catalog.make_row

    def stop(result, *args):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(str(result.path))
        return make_row(result, *args)

    monkeypatch.setattr(catalog, "make_row", stop)
    code, _, err = run("describe", objects, "--out", out, "--batch-size", 1)
    assert code == 130 and not out.exists() and "continues" in err[-1]
    with open(tmp_path / ".catalog.jsonl.unfinished", "ab") as journal:
        journal.write(b'{"key": ["torn')
    np.save(objects / "a.npy", make_cloud(9))  # has changed, so it is read again
    code, _, err = run("describe", objects, "--out", out, "--prompt", "What color is it?")
    assert code == 1 and "questions" in err[-1] and "Delete" in err[-1]
    done = list(asked)
    asked.clear()
    monkeypatch.setattr(
        catalog, "make_row", lambda result, *args: asked.append(str(result.path)) or make_row(result, *args)
    )
    code, _, err = run("describe", objects, "--out", out)
    assert code == 1 and "5 described, 1 failed" in err[-1]
    kept = set(done) - {str(objects / name) for name in ("a.npy", "broken.ply")}
    assert len(kept) == 1 and not kept & set(asked) and len(asked) == 5
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows) and len(rows) == 6


class Page(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_hostile_names_are_harmless(run, tmp_path, monkeypatch):
    folder = tmp_path / "objects"
    folder.mkdir()
    names = [
        '=1+1".npy',
        "<img src=x onerror=alert(1)>.npy",
        "</script><script>alert(1)</script>"[:9] + ".npy",
        "@a\nb\x1b.npy",
    ]
    names = [name.replace("/", "∕") for name in names] + ["b\udcff.npy"]
    for number, name in enumerate(names):
        np.save(folder / name, make_cloud(number))
    monkeypatch.chdir(folder)
    for suffix in ("csv", "html", "jsonl"):
        code, _, _ = run("describe", *names, "--out", tmp_path / f"c.{suffix}", "--thumbnails", tmp_path / "pictures")
        assert code == 0
    rows = read_csv(tmp_path / "c.csv")
    assert len(rows) == len(names) and all(row["file"][0] in "'<b" for row in rows)
    assert not any(value.startswith(("=", "@", "+", "-")) for row in rows for value in row.values())
    assert all(row["file"].isprintable() for row in rows)
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert {attributes["src"][:10] for tag, attributes in page.elements if tag == "img"} == {"data:image"}
    assert "<img src=x onerror=alert(1)>.npy" in page.texts
    assert [
        json.loads(line)["file"] for line in (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()
    ] == names
    assert all(re.fullmatch(r"[\w.-]+\.png", path.name, re.ASCII) for path in (tmp_path / "pictures").iterdir())


URL = "https://user:passw0rd@127.0.0.1/chair.ply?token=secret"


def test_urls_are_listed_without_secrets(run, model_dir, labels, tmp_path, monkeypatch, capsys):
    """In every form, in the journal of a run that goes on, and in names of pictures."""

    def work(outcome):
        def answer(*args, **more):
            yield [(FileResult(URL), outcome)]

        return answer

    monkeypatch.setattr(describe, "facts_of", lambda result: {})
    monkeypatch.setattr(describe, "work_on_files", work("A chair."))
    monkeypatch.setattr(
        classify,
        "work_on_files",
        work([{"label": name, "score": 0.1} for name in ("chair", "table", "washing machine")]),
    )
    monkeypatch.setattr(search, "work_on_files", work([-1.0]))
    monkeypatch.setattr(embed, "work_on_files", work(np.ones(3)))
    texts = []
    for words in (
        ["describe", URL, "--json"],
        ["classify", URL, "--json", "--labels", str(labels)],
        ["classify", URL, "--csv", "--labels", str(labels)],
        ["search", "a", URL, "--json"],
    ):
        assert main([*words, "--model", str(model_dir)]) == 0
        output = capsys.readouterr()
        assert "https://127.0.0.1/chair.ply" in output.out
        texts += output
    for suffix in ("csv", "jsonl", "html"):  # not read, since its address is private
        code, out, err = run("describe", URL, "--out", tmp_path / f"c.{suffix}")
        texts += [*out, *err, (tmp_path / f"c.{suffix}").read_text(encoding="utf-8")]
        assert code == 1 and "127.0.0.1/chair.ply" in texts[-1]
    assert main(["embed", URL, "--out", str(tmp_path / "e.npz"), "--model", str(model_dir)]) == 0
    texts += np.load(tmp_path / "e.npz")["path"].tolist()
    with Journal(tmp_path / "c.csv", {}) as journal:
        journal.add([(Key.of(URL), {"file": "x"})])
        texts.append(journal.path.read_text())
        assert Key.of(URL) in journal and Key.of(URL + "2") not in journal
    texts.append(catalog.thumbnail_name(URL))
    assert texts[-1].startswith("chair.ply-")
    assert not [text for text in texts if "passw0rd" in text or "secret" in text]


def test_each_node_has_a_row(run, tmp_path):
    scene = trimesh.Scene()
    for number, name in enumerate(("stool", "board")):
        box = trimesh.creation.box(extents=(1, 1 + 3 * number, 1))
        scene.add_geometry(box, geom_name=name, node_name=name, transform=np.diag([1, 1, 1, 1.0]))
    scene.export(tmp_path / "scene.glb")
    np.save(tmp_path / "whole.npy", make_cloud(0))
    code, _, err = run("describe", tmp_path, "--out", tmp_path / "c.csv", "--each-node")
    rows = read_csv(tmp_path / "c.csv")
    assert code == 0 and {"stool", "board", ""} <= {row["node"] for row in rows}
    heights = {row["node"]: float(row["side_x"]) for row in rows}
    assert heights["stool"] > 0.9 and heights["board"] < 0.4
    assert {row["file"] for row in rows} == {str(tmp_path / name) for name in ("scene.glb", "whole.npy")}
    assert f"{len(rows)} described, 0 failed" in err[-1]  # its own table, too, is not read
    code, _, err = run("describe", tmp_path, "--out", tmp_path / "c.csv", "--each-node")
    assert code == 0 and "skipped" not in err[-1]


def test_a_stopped_run_over_nodes_continues(run, tmp_path, monkeypatch):
    scene, make_row, asked = trimesh.Scene(), catalog.make_row, []
    for name in ("a", "b\ud83d", "c"):
        scene.add_geometry(trimesh.creation.box(), geom_name=name, node_name=name)
    scene.export(tmp_path / "scene.glb")

    def stop(result, *args):
        if asked:
            raise KeyboardInterrupt
        asked.append(result)
        return make_row(result, *args)

    words = "describe", tmp_path, "--out", tmp_path / "c.jsonl", "--each-node", "--batch-size", 1
    with monkeypatch.context() as patched:
        patched.setattr(catalog, "make_row", stop)
        assert run(*words)[0] == 130
    code, _, _ = run(*words)
    text = (tmp_path / "c.jsonl").read_bytes().decode("utf-8")
    nodes = [json.loads(line)["node"] for line in text.splitlines()]
    assert code == 0 and {"a", "c"} <= set(nodes) and not any("\ud83d" in (node or "") for node in nodes)


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--out", "c.xlsx"], ".parquet"),
        (["--out", "missing/c.csv"], "no folder"),
        (["--out", "c.csv", "--json"], "--json"),
        (["--out", "c.csv", "--ask", "kind=What?"], "kind"),
        (["--out", "c.csv", "--ask", "a=What?", "--ask", "a=Why?"], "column a"),
        (["--thumbnails", "pictures"], "--out"),
        (["--ask", "a=What?"], "--out"),
    ],
)
def test_mistakes_are_told_before_the_model_loads(words, problem, objects, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["describe", str(objects), *words, "--model", "no-such-model"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_classify_prints_probabilities(run, objects):
    code, out, err = run("classify", objects, "--json")
    assert code == 1 and "2 classified, 1 failed" in err[-1]
    for record in map(json.loads, out):
        shares = record["probabilities"]
        assert set(shares) == {"chair", "table", "washing machine"} and sum(shares.values()) == pytest.approx(
            1, abs=1e-5
        )
        assert record["label"] == next(iter(shares)) and record["probability"] == max(shares.values())
    _, table, _ = run("classify", objects, "--csv")
    rows = list(csv.DictReader(table))
    assert [float(row["chair"]) for row in rows] == [json.loads(line)["probabilities"]["chair"] for line in out]
    _, text, _ = run("classify", objects / "a.npy", "--phrase", "It is a {}.")
    assert len(text) == 1 and re.match(r"\w[\w ]* [01]\.\d\d, ", text[0])


def test_search_prints_the_best_first(run, objects):
    np.save(objects / "c.npy", make_cloud(5))
    code, out, err = run("search", "a red chair", objects, "--json")
    records = [json.loads(line) for line in out]
    assert code == 1 and "3 searched, 1 failed" in err[-1]
    assert {record["file"] for record in records} == {str(objects / name) for name in ("a.npy", "c.npy", "more/b.npy")}
    scores = [record["score"] for record in records]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-4)
    _, out, _ = run("search", "The red chair.", objects, "--top", 1)  # articles and full stops change nothing
    assert out == [f"{scores[0]:.2f} {records[0]['file']}"]


@pytest.mark.parametrize("content, problem", [(b"", "empty"), (b"a\nb\na\n", "line 3"), (b"\xff\xfe", "UTF-8")])
def test_lists_of_labels_that_cannot_be_used(content, problem, tmp_path, capsys):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    for chosen in (path, tmp_path / "missing.txt"):
        assert main(["classify", "x.npy", "--labels", str(chosen), "--model", "no-such-model"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert str(chosen) in line and (chosen != path or problem in line)


def test_cells_are_safe_in_spreadsheets():
    assert [safe_cell(text) for text in ("=1", "+1", "-1", "@a", "\t=1", " =1")] == [
        "'=1",
        "'+1",
        "'-1",
        "'@a",
        "'\t=1",
        "' =1",
    ]
    assert [safe_cell(value) for value in ("a=1", -1.5, None, True)] == ["a=1", -1.5, None, True]
    assert to_cells(
        {"file": "a\nb", "colors": {"red": 0.75, "blue": 0.25}, "warnings": []}, ["file", "main_color", "colors", "x"]
    )[:3] == [
        "a\\nb",
        "red",
        "red 75%, blue 25%",
    ]


def test_a_journal_keeps_what_is_on_disk(tmp_path):
    key = Key("a", None, 1, 2)
    with Journal(tmp_path / "c.csv", {"questions": dict([Question("a", "b")])}) as journal:
        journal.add([(key, {"x": "é\n"})])
        journal.add([(key._replace(node=3), {"x": 2})])
    with Journal(tmp_path / "c.csv", {"questions": {"a": "b"}}) as journal:
        assert journal[key] == {"x": "é\n"} and journal[key._replace(node=3)] == {"x": 2}
        assert key._replace(size=5) not in journal
        assert len(journal) == 2
        with pytest.raises(ValueError, match="questions"):
            Journal(tmp_path / "c.csv", {"questions": {}})
        journal.remove()
    with Journal(tmp_path / "c.csv", {}) as journal:  # nothing was finished, so nothing is left
        assert len(journal) == 0
    assert not list(tmp_path.iterdir())
