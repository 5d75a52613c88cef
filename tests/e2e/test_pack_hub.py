"""Packing objects of a data set on the Hub, and uploading what is packed, on a Hub on loopback.

The clients read their environment at import, and this process is offline, so each scenario is one new process.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import trimesh
from datasets import Dataset, Features, Mesh, Value
from hub_double import serve

from minigpt3d.cli.main import main
from minigpt3d.data.sources import open_sources


MESHES, TARGET = "org/meshes", "org/packed"

PACK_AND_UPLOAD = f"""
import sys
from minigpt3d.cli.main import main

folder = sys.argv[1]
hub = ["pack", "--from", "hf://datasets/{MESHES}", "--mesh-column", "model", "--text-column", "text"]
assert main([*hub, "--out", folder + "/packed", "--num-workers", "1", "--preview"]) == 0
assert main(["pack", "--out", folder + "/packed", "--push-to-hub", "{TARGET}"]) == 0
assert main([*hub[:-1], "none", "--out", folder + "/wrong"]) == 1
assert main(["pack", "--from", "hf://datasets/org/none", "--out", folder + "/wrong"]) == 1
"""

READ = f"""
import json
from datasets import load_dataset

rows = load_dataset("{TARGET}", "brief", split="train", streaming=True)
shown = []
for row in rows:
    (cloud,) = row["preview"].geometry.values()
    shown.append([row["object_id"], type(rows.features["preview"]).__name__, len(cloud.vertices), cloud.visual.vertex_colors[0].tolist()])
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a data set of a red box, a green ball and a file that is broken, captioned."""
    folder = tmp_path_factory.mktemp("meshes")
    cells = []
    for mesh, color in ((trimesh.creation.box(), [255, 0, 0, 255]), (trimesh.creation.icosphere(), [0, 255, 0, 255])):
        mesh.visual.vertex_colors = color
        cells.append({"bytes": mesh.export(file_type="ply"), "path": "a.ply"})
    cells.append({"bytes": b"ply\nnothing", "path": "b.ply"})
    table = {"model": cells, "text": ["A red box.", "A green ball.", "Nothing."], "note": ["", "", ""]}
    features = Features({"model": Mesh(decode=False), "text": Value("string"), "note": Value("string")})
    Dataset.from_dict(table, features=features).cast_column("model", Mesh()).to_parquet(folder / "train.parquet")
    files = {"data/train-00000-of-00001.parquet": (folder / "train.parquet").read_bytes()}
    with serve(datasets={MESHES: files}) as hub:
        yield hub


def run(code, hub, tmp_path, *arguments):
    changes = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}
    environment = os.environ | changes | {"HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_data_set_is_packed_previewed_and_uploaded(hub, tmp_path):
    code = PACK_AND_UPLOAD.replace('"--preview"', '"--preview", "--max-broken", "0.4"')
    done = run(code, hub, tmp_path, tmp_path)
    assert "2 rows (brief 2)" in done.stdout and "datasets/org/packed/commit" in done.stdout
    assert "--text-column" in done.stderr and "model, text, note" in done.stderr and "org/none" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "packed"]
    (source,) = open_sources(["brief"], str(tmp_path / "packed"), []).values()
    samples = {sample.object_id: (sample, cloud) for sample, cloud in (source.read(0, row) for row in range(2))}
    assert samples["0000000"][0].rounds == (("what is this?", "A red box."),)
    np.testing.assert_allclose(samples["0000001"][1][:, 3:], [[0, 1, 0]] * 8192, atol=0.02)

    shown = json.loads(run(READ, hub, tmp_path).stdout)
    assert sorted(shown) == [
        ["0000000", "Mesh", 2048, [255, 0, 0, 255]],
        ["0000001", "Mesh", 2048, [0, 255, 0, 255]],
    ]


def test_wrong_addresses_and_folders(tmp_path, capsys):
    for arguments, message in (
        (["--from", "hf://models/org/x", "--out", str(tmp_path / "out")], "hf://datasets/OWNER/NAME"),
        (["--out", str(tmp_path), "--push-to-hub", "org/x"], "packed.json"),
        (["--out", str(tmp_path / "out")], "--from"),
    ):
        assert main(["pack", *arguments]) == 1
        assert message in capsys.readouterr().err
