"""The notebooks run from start to end, in a folder of their own."""

import os
import sys
from pathlib import Path

import pytest
from repository import ROOT


nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("plotly")
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def run(name: str, folder, monkeypatch) -> tuple[str, list]:
    """What the cells of a notebook print, and the kinds of their results."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = read(name)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return text, [kind for output in outputs for kind in output.get("data", {})]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
    assert "%pip install" in cells[0].source, "Colab has no minigpt3d"


@pytest.mark.slow
def test_describe_your_objects(tmp_path, monkeypatch):
    text, kinds = run("describe_your_objects", tmp_path, monkeypatch)
    assert "This is a brown chair." in text and "It is brown." in text and "This is a white table." in text
    assert "application/vnd.plotly.v1+json" in kinds or "text/html" in kinds


@pytest.mark.slow
def test_train_on_your_objects(tmp_path, monkeypatch):
    text, _ = run("train_on_your_objects", tmp_path, monkeypatch)
    assert "12 of 12 are right" in text


@pytest.mark.slow
def test_look_inside(tmp_path, monkeypatch):
    text, kinds = run("look_inside", tmp_path, monkeypatch)
    assert "This is a brown chair." in text and "expert " in text and "height " in text
    assert "text/html" in kinds and (tmp_path / "attention.html").stat().st_size > 1_000_000
