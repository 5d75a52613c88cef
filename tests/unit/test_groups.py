"""Groups that are packed with clouds: those that the encoder would find, used if they are the model's."""

import json
import shutil

import numpy as np
import pytest
import torch
from training_runs import STAGES, history, options, same_run, tiny

from minigpt3d import point_bert_minigpt3d
from minigpt3d.cli.main import main
from minigpt3d.data import shards as packing
from minigpt3d.data.clouds import Grouping
from minigpt3d.data.groups import grouping_of, load_grouped
from minigpt3d.data.sources import open_sources, read_manifest, use_groups
from minigpt3d.grouping_minigpt3d import find_groups
from minigpt3d.hub import PACKAGE_DIR, default_model, load_model
from minigpt3d.training.loop import train
from minigpt3d.training.stream import Packing, encode_row, pack_batch


OBJECTS = sorted(
    path for path in (PACKAGE_DIR / "demo" / "objects").iterdir() if path.suffix in (".npy", ".obj", ".ply")
)


def write_table(folder):
    lines = [json.dumps({"file": str(path), "caption": f"A {path.stem}."}) for path in OBJECTS]
    (folder / "objects.jsonl").write_text("\n".join(lines))
    return folder / "objects.jsonl"


def live(clouds: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    centers, neighbors = find_groups(clouds[..., :3], grouping.num_groups, grouping.group_size)
    return torch.cat([centers[..., None], neighbors], dim=-1)


def test_packed_groups_are_those_of_the_bundled_model(tmp_path, capsys):
    table, out = write_table(tmp_path), str(tmp_path / "out")
    assert main(["pack", "--from", str(table), "--out", out, "--num-workers", "1", "--preview", "--groups"]) == 0
    grouping = grouping_of(default_model())
    assert str(grouping) in capsys.readouterr().out
    assert grouping == Grouping(num_points=1024, seed=0, num_groups=64, group_size=16)
    model, processor = load_model(default_model(), dtype=torch.float32)
    sources = open_sources(["brief"], out, [])
    (source,) = sources.values()
    without = [encode_row(processor, source, (0, row), STAGES["I"]) for row in range(len(OBJECTS))]
    assert not any("group_indices" in sample for sample in without)
    assert use_groups(sources, grouping) is None
    samples = [encode_row(processor, source, (0, row), STAGES["I"]) for row in range(len(OBJECTS))]
    for row, sample in enumerate(samples):
        assert torch.equal(sample["group_indices"].long(), live(sample["point_clouds"], grouping))
        normalized = processor.feature_extractor(source.read(0, row)[1], return_tensors="pt")["point_clouds"]
        assert torch.equal(sample["point_clouds"], normalized), "1024 of the points are sampled and normalized"
    packing_of_model = Packing.of(model)
    with torch.no_grad():
        losses = [model(**pack_batch(batch, packing_of_model)).loss for batch in (without, samples)]
    assert torch.equal(*losses)


def test_packed_groups_are_those_of_the_papers_model():
    grouping = Grouping(num_points=8192, seed=0, num_groups=512, group_size=32)
    coord, color, _, groups = load_grouped(OBJECTS[0], packing.NUM_POINTS, grouping)
    assert len(groups) == 2 * 512 * 33
    cloud = torch.from_numpy(packing.decode_cloud(coord, color))[None]
    assert torch.equal(
        torch.from_numpy(np.frombuffer(groups, "<i2").reshape(1, 512, 33).astype(int)), live(cloud, grouping)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    """The objects, packed with the groups of the tiny model."""
    folder = tmp_path_factory.mktemp("groups")
    entries, grouping = packing.table_entries(write_table(folder)), grouping_of(base)
    packing.pack(entries, folder / "packed", num_workers=1, grouping=grouping)
    return folder / "packed"


def test_a_run_with_packed_groups_equals_one_that_finds_them(base, data, tmp_path, monkeypatch, capsys):
    stage = tiny(STAGES["II"])
    plain = shutil.copytree(data, tmp_path / "plain")
    (plain / "packed.json").write_text(json.dumps(read_manifest(str(data)) | {"groups": None}))
    runs = {"validation_data": str(data), "max_steps": 2}
    found = train(stage, options(base, tmp_path / "found", (plain, []), **runs | {"validation_data": str(plain)}))
    with monkeypatch.context() as patched:
        patched.delattr(point_bert_minigpt3d, "find_groups")
        given = train(stage, options(base, tmp_path / "given", (data, []), **runs))
    assert "not used" not in capsys.readouterr().out
    assert len(history(given)) == 2 and same_run(found, given)


def test_groups_that_do_not_fit_are_not_used(base, data, tmp_path, capsys):
    train(tiny(STAGES["I"], augment=True), options(base, tmp_path / "augmented", (data, []), max_steps=1))
    assert "at random: the groups" in capsys.readouterr().out
    other = shutil.copytree(data, tmp_path / "other")
    manifest = read_manifest(str(data))
    manifest["groups"]["seed"] = 1
    (other / "packed.json").write_text(json.dumps(manifest))
    train(tiny(STAGES["I"]), options(base, tmp_path / "seed", (other, []), max_steps=1))
    printed = capsys.readouterr().out
    assert "not used: 16 groups of 8 among 128 points (seed 1)" in printed and "(seed 0)" in printed


def test_wrong_groups_are_refused(data, tmp_path, tiny_model, point_clouds, capsys):
    with pytest.raises(ValueError, match=r"group_indices must have shape \(3, 16, 9\).* got \(3, 16, 8\)"):
        tiny_model.get_point_features(point_clouds, group_indices=torch.zeros(3, 16, 8, dtype=torch.int16))
    (source,) = open_sources(["brief"], str(data), []).values()
    source.use_groups()
    source.grouping = Grouping(num_points=10, seed=0, num_groups=16, group_size=8)
    with pytest.raises(ValueError, match="row 0: .*16 groups of 8 among 10 points"):
        source.read_groups(0, 0)
    for groups in ({}, {"num_points": 1}, [], 3):
        (tmp_path / "packed.json").write_text(json.dumps(read_manifest(str(data)) | {"groups": groups}))
        with pytest.raises(ValueError, match="packed.json: damaged"):
            read_manifest(str(tmp_path))
    too_many = Grouping(num_points=9000, seed=0, num_groups=16, group_size=8)
    with pytest.raises(ValueError, match="`groups`.* 9000 points.* 8192"):
        packing.pack({}, tmp_path / "out", grouping=too_many)
    table = write_table(tmp_path)
    assert main(["pack", "--from", str(table), "--out", str(tmp_path / "out"), "--groups", "nobody/nothing"]) == 1
    assert "nobody/nothing" in capsys.readouterr().err
