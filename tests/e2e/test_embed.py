"""`minigpt3d embed`: a vector for each file, as the model computes it."""

import numpy as np
import pytest
import torch
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.cli.main import main
from minigpt3d.hub import save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and objects: three clouds, a broken file, and a text."""
    folder = tmp_path_factory.mktemp("embed")
    save_pretrained(make_seeing_model(), make_processor(), folder / "model")
    objects = folder / "objects"
    (objects / "below").mkdir(parents=True)
    for number, name in enumerate(("a", "below/é", "c")):
        np.save(objects / f"{name}.npy", make_cloud(number))
    (objects / "b.ply").write_bytes(b"ply\nformat ascii 1.0\n")
    (objects / "notes.md").write_text("none")
    return folder


def read_table(path) -> tuple[list[str], np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return arrays["path"].tolist(), arrays["embedding"]
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    assert str(table.schema.field("embedding").type.value_type) == "float"
    return table["path"].to_pylist(), np.stack(table["embedding"].to_numpy())


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_row_for_each_file(suffix, folder, tmp_path, capsys):
    out = tmp_path / f"table{suffix}"
    arguments = ["--model", str(folder / "model"), "--device", "cpu", "--batch-size", "2", "--out", str(out)]
    assert main(["embed", str(folder / "objects"), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "b.ply" in printed.err and "3 embedded, 1 failed, 1 skipped: 1 .md" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    paths, embeddings = read_table(out)
    files = [str(folder / "objects" / name) for name in ("a.npy", "below/é.npy", "c.npy")]
    assert paths == files and embeddings.dtype == np.float32
    clouds = make_processor().feature_extractor(files, return_tensors="pt")["point_clouds"]
    expected = make_seeing_model().get_point_features(clouds).last_hidden_state[:, 0].detach()
    expected = torch.nn.functional.normalize(expected, dim=-1)
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=1e-5)


def test_the_table_of_an_earlier_run_is_no_object(folder, tmp_path, capsys):
    np.save(tmp_path / "a.npy", make_cloud(0))
    out = tmp_path / "table.npz"
    for _ in range(2):
        assert (
            main(["embed", str(tmp_path), "--model", str(folder / "model"), "--device", "cpu", "--out", str(out)]) == 0
        )
        assert "1 embedded, 0 failed" in capsys.readouterr().err
    assert read_table(out)[0] == [str(tmp_path / "a.npy")]


def test_a_table_without_rows_is_not_written(folder, tmp_path, capsys):
    out = tmp_path / "table.npz"
    arguments = ["--model", str(folder / "model"), "--device", "cpu", "--out", str(out)]
    assert main(["embed", str(folder / "objects" / "b.ply"), *arguments]) == 1
    assert "b.ply" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("out", "words"), [("a.csv", [".csv", ".parquet"]), ("a", [".npz"]), ("no/a.npz", ["folder"])]
)
def test_mistakes_are_found_before_the_model_is_loaded(out, words, folder, tmp_path, capsys):
    assert main(["embed", str(folder / "objects"), "--out", str(tmp_path / out), "--model", "no/model"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--out" in line and [word for word in words if word not in line] == []


def test_what_is_read_is_not_replaced(tmp_path, capsys):
    cloud = tmp_path / "a.npz"
    np.savez(cloud, make_cloud(0))
    content = cloud.read_bytes()
    for command in ("embed", "describe"):
        out = cloud if command == "embed" else tmp_path / "a.csv"
        out.touch()
        assert main([command, str(out), "--out", str(out), "--model", "no/model"]) == 1
        assert "lost" in capsys.readouterr().err
    assert cloud.read_bytes() == content
    (tmp_path / "folder.npz").mkdir()
    assert main(["embed", str(cloud), "--out", str(tmp_path / "folder.npz"), "--model", "no/model"]) == 1
    assert "is a folder" in capsys.readouterr().err
