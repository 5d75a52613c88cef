"""Pack training data and stream it: size and precision, resuming, order, and the tables that name one's own objects."""

import json
import os
import shutil
from functools import partial

import bad_readers
import numpy as np
import pytest
import torch
import trimesh
from datasets import load_dataset
from hub_double import serve
from huggingface_hub import HfFileSystem

from minigpt3d.cli.main import main
from minigpt3d.data import shards as packing
from minigpt3d.data.clouds import decode_cloud, encode_cloud
from minigpt3d.data.reading import Limits
from minigpt3d.data.records import to_messages
from minigpt3d.data.sources import open_sources, read_manifest
from minigpt3d.files import locked
from minigpt3d.point_cloud_minigpt3d import load_point_cloud
from minigpt3d.training.stages import RECIPES
from minigpt3d.training.stream import Order, StageStream, read_ahead


CONVERSATION_TYPES = ("simple_description", "detailed_description", "single_round", "multi_round")
NUM_OBJECTS = 40


def make_record(object_id: str, conversation_type: str, index: int) -> dict:
    rounds = [("What is it?", f"Chair {index}.")] * (2 if conversation_type == "multi_round" else 1)
    turns = []
    for question, answer in rounds:
        turns.append({"from": "human", "value": question if turns else f"<point>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"object_id": object_id, "conversation_type": conversation_type, "conversations": turns}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A release in PointLLM's layout; one object is broken and one missing, one is known to be corrupt."""
    folder = tmp_path_factory.mktemp("release")
    rng = np.random.default_rng(0)
    names = [f"o{i:02}" for i in range(NUM_OBJECTS)] + ["broken", "6760e543e1d645d5aaacd3803bcae524"]
    for name in names:
        cloud = np.concatenate([rng.normal(size=(8192, 3)) * 5 + 3, rng.integers(0, 256, (8192, 3)) / 255], 1)
        cloud[0] = np.nan if name == "broken" else cloud[0]
        cloud[:, :3] *= np.nan if name == "broken" else 1
        np.save(folder / f"{name}_8192.npy", cloud.astype(np.float32))
    records = [make_record(name, t, i) for i, name in enumerate([*names, "missing"]) for t in CONVERSATION_TYPES]
    (folder / "annotations.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def packed(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "data"
    options = ["--data", str(release), "--annotations", str(release / "annotations.json"), "--out", str(out)]
    assert main(["pack", *options, "--max-broken", "0.1", "--num-workers", "2"]) == 0
    return out


def test_a_file_that_ends_or_blocks_its_process_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "load_encoded", bad_readers.load_encoded)
    monkeypatch.setattr("minigpt3d.data.reading.LIMITS", Limits(seconds=3, memory=512 * 1024**2))
    bad = ["aborts", "allocates", "loops"]
    names = [*bad, *(f"o{i}" for i in range(5))]
    for name in names:
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).random((50, 6)))
    lines = [json.dumps({"file": f"{name}.npy", "caption": "A chair."}) for name in names]
    (tmp_path / "chairs.jsonl").write_text("\n".join(lines))
    manifest = packing.pack(packing.table_entries(tmp_path / "chairs.jsonl"), tmp_path / "out", max_broken=0.5)
    assert manifest["rows"] == 5 and len(manifest["broken"]) == 3
    assert {line.split("'")[1] for line in manifest["broken"]} == set(bad)


def test_a_packed_cloud_is_small_and_precise():
    cloud = load_point_cloud(np.random.default_rng(0).normal(size=(8192, 6)) % 1, num_points=8192)
    cloud[:, 3:] = np.round(cloud[:, 3:] * 255) / 255
    coord, color = encode_cloud(cloud)
    assert len(coord) + len(color) == 9 * 8192
    again = decode_cloud(coord, color)
    assert np.abs(again[:, :3] - cloud[:, :3]).max() <= 1.6e-5
    np.testing.assert_allclose(again[:, 3:], cloud[:, 3:], atol=1e-7)


def test_the_release_is_packed_completely(packed, release):
    manifest = read_manifest(str(packed))
    assert {name: sum(rows) for name, rows in manifest["shards"].items()} == dict.fromkeys(
        ("brief", "detailed", "single_round", "multi_round"), NUM_OBJECTS
    )
    assert sorted(line.split(":")[0] for line in manifest["broken"]) == sorted(
        ["object_id 'broken'"] * 4 + ["object_id 'missing'"] * 4
    )
    assert manifest["bytes_per_row"] < 9.2 * 8192 and manifest["max_coord_error"] <= 1.6e-5
    rows = list(load_dataset(str(packed), "multi_round", split="train", streaming=True))
    assert sorted(row["object_id"] for row in rows) == [f"o{i:02}" for i in range(NUM_OBJECTS)]
    assert [row["object_id"] for row in rows] != sorted(row["object_id"] for row in rows), "shuffled once"
    record = json.loads((release / "annotations.json").read_text())[int(rows[0]["object_id"][1:]) * 4 + 3]
    assert rows[0]["conversations"] == record["conversations"]
    cloud = load_point_cloud(release / f"{rows[0]['object_id']}_8192.npy", num_points=8192)
    np.testing.assert_allclose(decode_cloud(rows[0]["coord"], rows[0]["color"]), cloud, atol=2e-5)


def test_too_many_broken_clouds_stop_packing_and_a_second_run_resumes(release, tmp_path, capsys):
    options = [
        "--data",
        str(release),
        "--annotations",
        str(release / "annotations.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["pack", *options]) == 1
    printed = capsys.readouterr().err
    assert "missing or broken, more than" in printed and "object_id" in printed
    assert not (tmp_path / "out").exists()
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").rglob("*.parquet")}
    assert begun
    assert main(["pack", *options, "--seed", "1"]) == 1
    assert "other data or settings" in capsys.readouterr().err
    assert main(["pack", *options, "--max-broken", "0.1"]) == 0
    assert "8 skipped" in capsys.readouterr().out
    for path, written in begun.items():
        assert (tmp_path / "out" / path.relative_to(tmp_path / "out.partial")).stat().st_mtime_ns == written


def test_packing_is_repeatable(packed, release, tmp_path):
    entries = packing.release_entries(release, [release / "annotations.json"])
    packing.pack(entries, tmp_path / "again", max_broken=0.1, num_workers=1)
    for path in packed.rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(packed)).read_bytes(), path


def shard(data, number: int, source="brief"):
    return sorted((data / source).iterdir())[number]


def flip(path, place: int):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def exchange(data):
    first, second = shard(data, 0), shard(data, 1)
    first.rename(data / "kept")
    second.rename(first)
    (data / "kept").rename(second)


@pytest.mark.parametrize(
    "damage",
    [
        exchange,
        lambda data: shutil.copy(shard(data, 0, "detailed"), shard(data, 0)),  # of the same objects
        lambda data: shard(data, 2).unlink(),
        lambda data: shard(data, 2).write_bytes(b""),
        lambda data: shard(data, 2).write_bytes(shard(data, 2).read_bytes()[:-1000]),
        lambda data: shard(data, 2).write_bytes(shard(data, 2).read_bytes()[1000:]),
        lambda data: flip(shard(data, 2), -300),
    ],
)
def test_damaged_shards_are_noticed_at_once(damage, packed, tmp_path):
    data = shutil.copytree(packed, tmp_path / "data")
    damage(data)
    with pytest.raises(ValueError, match=r"brief/train-0000\d-of-00005.parquet is damaged or missing"):
        open_sources(["brief"], str(data), [])


def test_a_flipped_bit_is_noticed_when_its_row_is_read(packed, tmp_path, tiny_processor):
    data = shutil.copytree(packed, tmp_path / "data")
    for source in ("detailed", "single_round", "multi_round"):
        shutil.rmtree(data / source)
    manifest = read_manifest(str(data))
    manifest["shards"] = {"brief": manifest["shards"]["brief"]}
    (data / "packed.json").write_text(json.dumps(manifest))
    (source,) = open_sources(["brief"], str(data), []).values()
    expected = [source.read(0, row) for row in range(source.rows[0])]
    path = shard(data, 0)
    whole, noticed = path.read_bytes(), 0
    for place in np.random.default_rng(0).integers(4, len(whole), 60).tolist():
        flip(path, place)
        try:
            (source,) = open_sources(["brief"], str(data), []).values()
            rows = [source.read(0, row) for row in range(source.rows[0])]
        except ValueError as error:
            assert path.name in str(error)
            noticed += 1
        else:  # of a page's header, which is not needed
            assert all(one == two and np.array_equal(a, b) for (one, a), (two, b) in zip(rows, expected, strict=True))
        path.write_bytes(whole)
    assert noticed > 50
    flip(path, len(whole) // 2)
    for num_workers in (0, 2):
        with pytest.raises(ValueError, match=f"^{path} is damaged or missing: [^\n]*$"):
            stream = StageStream(RECIPES["paper"]["I"], open_sources(["brief"], str(data), []), tiny_processor, 0)
            list(read_ahead(stream, range(8), num_workers))


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"shards": []}', '{"shards": {"brief": "1"}, "num_points": 1}']
)
def test_damaged_manifests_are_refused(content, tmp_path):
    (tmp_path / "packed.json").write_text(content)
    with pytest.raises(ValueError, match="packed.json"):
        open_sources(["brief"], str(tmp_path), [])


def test_a_resumed_pack_checks_its_shards(packed, release, tmp_path, monkeypatch):
    entries, out = packing.release_entries(release, [release / "annotations.json"])["brief"], tmp_path / "out"
    entries = {"brief": entries}
    write, written = packing.write_shard, []

    def stopped(shard, *args):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(shard.path)
        return write(shard, *args)

    monkeypatch.setattr(packing, "write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        packing.pack(entries, out, max_broken=0.1, num_workers=1)
    with locked(out), pytest.raises(ValueError, match="in use"):
        packing.pack(entries, out)
    first, second, third, _ = written
    flip(first, 100_000)
    second.rename(second.with_name("kept"))
    third.rename(second)
    second.with_name("kept").rename(third)
    plan = tmp_path / "out.partial" / "plan.json"
    whole = plan.read_text()
    for content in ("", "[]"):
        plan.write_text(content)
        with pytest.raises(ValueError, match="plan.json.* Remove"):
            packing.pack(entries, out)
    plan.write_text(whole)
    written.clear()
    monkeypatch.setattr(packing, "write_shard", lambda shard, *args: written.append(shard.path) or write(shard, *args))
    packing.pack(entries, out, max_broken=0.1, num_workers=1)
    assert written[:3] == [first, second, third] and len(written) == 4, "the fourth is kept"
    for path in (packed / "brief").iterdir():
        assert path.read_bytes() == (out / path.relative_to(packed)).read_bytes(), path
    assert not (out / "plan.json").exists() and os.listdir(tmp_path) == ["out"]


def test_meshes_with_captions_from_json_lines(tmp_path, capsys):
    trimesh.creation.box().export(tmp_path / "box.glb")
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "rock.npy", np.random.default_rng(0).random((500, 6)))
    lines = [
        {"file": "box.glb", "caption": "A box."},
        {"file": "scans/rock.npy", "conversations": make_record("x", "single_round", 0)["conversations"]},
    ]
    (tmp_path / "objects.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert main(["pack", "--from", str(tmp_path / "objects.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert "2 rows (brief 1, single_round 1)" in capsys.readouterr().out
    (source,) = open_sources(["brief"], str(tmp_path / "out"), []).values()
    sample, cloud = source.read(0, 0)
    assert (sample.object_id, sample.rounds) == ("box", (("what is this?", "A box."),)) and cloud.shape == (8192, 6)
    with pytest.raises(ValueError, match="'detailed' conversations.*none"):
        open_sources(["detailed"], str(tmp_path / "out"), [])


def test_files_are_turned_and_colored_as_the_options_say(tmp_path, capsys):
    np.save(tmp_path / "tower.npy", np.random.default_rng(0).uniform(-1, 1, (500, 3)) * [0.2, 0.4, 1.0])
    (tmp_path / "own.csv").write_text("file,caption\ntower.npy,A tower.\n")
    turned = ["--up-axis", "z", "--missing-color", "white"]
    for out, options, longest_axis, color in (("plain", [], 2, 0), ("turned", turned, 1, 1)):
        assert main(["pack", "--from", str(tmp_path / "own.csv"), "--out", str(tmp_path / out), *options]) == 0
        (source,) = open_sources(["brief"], str(tmp_path / out), []).values()
        _, cloud = source.read(0, 0)
        assert np.ptp(cloud[:, :3], axis=0).argmax() == longest_axis and (cloud[:, 3:] == color).all()
    assert sum("no color" in line for line in capsys.readouterr().err.split("\n")) == 2
    manifest = json.loads((tmp_path / "turned" / "packed.json").read_text())
    assert manifest["reading"] == {"up_axis": "z", "missing_color": "white"}
    entries = packing.table_entries(tmp_path / "own.csv")
    for shard in packing.plan_shards(tmp_path / "begun.partial", entries, 0, 1):
        packing.begin_plan(tmp_path / "begun.partial", [shard], [0, 8192, {}])
    with pytest.raises(ValueError, match="other data or settings"):
        packing.pack(entries, tmp_path / "begun", num_workers=1, reading={"up_axis": "z"})
    release = ["--data", str(tmp_path), "--annotations", str(tmp_path / "own.csv"), "--out", str(tmp_path / "no")]
    assert main(["pack", *release, "--up-axis", "z"]) == 1
    printed = capsys.readouterr().err
    assert "--up-axis" in printed and "--missing-color" not in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: expected 'file'"),
        ('{"caption": "A box."}', "line 1: expected 'file'"),
        ('{"file": "", "caption": "A box."}', "line 1: expected 'file'"),
        ('{"file": "a.glb"}', "line 1: expected either"),
        ('{"file": "a.glb", "caption": " "}', "'caption'"),
        ('{"file": "a.glb", "conversations": []}', "object_id 'a'"),
    ],
)
def test_malformed_lines_are_named(line, message, tmp_path, capsys):
    (tmp_path / "objects.jsonl").write_text(line)
    assert main(["pack", "--from", str(tmp_path / "objects.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def test_bad_texts_are_skipped_and_marks_are_text(tmp_path, capsys, tiny_processor):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((50, 6)))
    marks = "A <point> cloud ### of a [/INST] box </PC>"
    good = [{"caption": marks}, {"conversations": turns("<point>Is ### it?", marks, "And [/INST]?", "Yes.")}]
    bad = [
        ({"caption": " "}, "'caption' must be a text"),
        ({"caption": "A \ud83d."}, "lone surrogate"),
        ({"caption": 3}, "'caption' must be a text"),
        ({}, "expected either"),
        ({"conversations": turns("<point>What?", " ")}, "answer in 'conversations' is empty"),
        ({"conversations": turns("What?", "A box.")}, "must stand once, in the first question"),
        ({"conversations": turns("<point>What?", "A box.", "<point>And this?", "A ball.")}, "and in no other"),
        ({"conversations": turns("<point>What?")}, "question and answer in turn"),
        ({"file": " ", "caption": "A box."}, "expected 'file'"),
    ]
    rows = [{"file": "a.npy"} | row for row in [*good, *(row for row, _ in bad)]]
    table, out = tmp_path / "a.jsonl", tmp_path / "out"
    table.write_text("\n".join(map(json.dumps, rows)))
    assert main(["pack", "--from", str(table), "--out", str(out)]) == 1
    assert f"9 of 11 texts or clouds are missing or broken, more than --max-broken 0.01:\n  {table}, line 3" in (
        capsys.readouterr().err
    )
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.npy"], "nothing was begun"
    assert main(["pack", "--from", str(table), "--out", str(out), "--max-broken", "0.9"]) == 0
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt3d: skipped: ")]
    for number, (line, (_, reason)) in enumerate(zip(skipped, bad, strict=True), start=3):
        assert f"{table}, line {number}" in line and reason in line
    assert [f"minigpt3d: skipped: {line}" for line in read_manifest(str(out))["broken"]] == skipped
    for source in open_sources(["brief", "multi_round"], str(out), []).values():
        sample, cloud = source.read(0, 0)
        encoded = tiny_processor.encode_training([to_messages(sample)], [cloud])
        ids, labels = encoded["input_ids"][0], encoded["labels"][0]
        assert (ids == tiny_processor.point_token_id).sum() == tiny_processor.num_query_tokens
        answers = tiny_processor.tokenizer.decode(labels[labels != -100])
        assert answers == "".join(f"{answer}###" for _, answer in sample.rounds) and marks in answers


def test_wrong_options(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for options, message in (
        ([], "--annotations"),
        (["--data", str(tmp_path)], "--annotations"),
        (["--from", str(tmp_path / "no.jsonl")], "no such file"),
        (["--from", "x", "--max-broken", "2"], "--max-broken"),
        (["--data", str(tmp_path / "no"), "--annotations", "x"], "is no folder"),
    ):
        assert main(["pack", *options, *out]) == 1
        assert message in capsys.readouterr().err


# ---- Streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "batch"),
    [
        ([5] * 8, 4),
        ([5, 6, 5, 6, 6, 5, 5, 6, 6], 4),
        ([7, 5], 4),
        ([200, 200], 2),
        ([64] * 17 + [3, 0], 9),
        ([2, 1], 4),
    ],
)
def test_an_epoch_takes_every_row_once(rows, batch):
    """Except for fewer rows than a batch, which the next epoch may take."""
    order = Order(rows, batch, [0])
    turns = max(sum(rows) // batch, 1)
    epochs = [
        [order.address(turn, slot) for turn in range(e * turns, (e + 1) * turns) for slot in range(batch)]
        for e in (0, 1)
    ]
    if sum(rows) < batch:
        assert sorted(set(epochs[0])) == [(0, 0), (0, 1), (1, 0)]
        return
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) > sum(rows) - batch
        assert all(0 <= row < rows[shard] for shard, row in epoch)
    assert epochs[0] != epochs[1], "reshuffled"
    # A slot reads the shards of its own piece: as many as the piece is long, and one that it begins in.
    for slot in range(batch):
        assert len({shard for shard, _ in epochs[0][slot::batch]}) <= turns // min(filter(lambda n: n > 3, rows)) + 3


def open_stream(data, processor, rank=0, ranks=1) -> StageStream:
    stage = RECIPES["paper"]["III"]
    sources = open_sources([source.name for source in stage.mixture], str(data), [])
    return StageStream(stage, sources, processor, 0, rank, ranks)


def test_packed_data_stream_alike_for_any_number_of_workers_and_processes(packed, tiny_processor):
    steps = range(3, 9)
    whole = list(read_ahead(open_stream(packed, tiny_processor), steps, 0))
    assert len({name for name, _ in whole}) > 1, "the mixture of stage III"
    for num_workers in (2, 3):
        again = list(read_ahead(open_stream(packed, tiny_processor), steps, num_workers))
        for (name, samples), (other, others) in zip(whole, again, strict=True):
            assert name == other and len(samples) == len(others)
            for one, two in zip(samples, others, strict=True):
                assert all(torch.equal(one[key], two[key]) for key in one)
    ranks = [list(read_ahead(open_stream(packed, tiny_processor, rank, 2), steps, 0)) for rank in range(2)]
    for (_, samples), (_, first), (_, second) in zip(whole, *ranks, strict=True):
        dealt = [None] * len(samples)
        dealt[0::2], dealt[1::2] = first, second
        for one, two in zip(samples, dealt, strict=True):
            assert all(torch.equal(one[key], two[key]) for key in one)


def test_packed_clouds_are_not_normalized_again(packed, tiny_processor, monkeypatch):
    tiny_processor.feature_extractor.num_points = 8192
    stream = open_stream(packed, tiny_processor)
    monkeypatch.delattr("minigpt3d.processing_minigpt3d.load_point_cloud")
    taken = stream.encode(0, 0)["point_clouds"]
    name, address = stream.draw(0, 0)
    assert torch.equal(taken[0], torch.from_numpy(stream.sources[name].read(*address)[1]))
    monkeypatch.undo()
    stream.sources[name].is_normalized = False
    again = stream.encode(0, 0)["point_clouds"]
    assert 0 < (again - taken).abs().max() < 2e-5
    for cloud in (taken[0, :10].numpy(), taken[0].double().numpy()):
        messages = [[{"role": "user", "content": [{"type": "point_cloud"}]}, {"role": "assistant", "content": "A."}]]
        with pytest.raises(ValueError, match=r"do_normalize=False .*\(8192, 6\) .*float32"):
            tiny_processor.encode_training(messages, [cloud], do_normalize=False)


def test_packed_data_stream_from_the_hub(packed, monkeypatch):
    """Row groups are read when they are needed, from a Hub on loopback."""
    files = {str(path.relative_to(packed)): path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    (source,) = open_sources(["brief"], str(packed), []).values()
    expected_sample, expected_cloud = source.read(1, 0)
    with serve(datasets={"somebody/chairs": files}) as hub:
        file_system = partial(HfFileSystem, endpoint=hub.address, token=False, skip_instance_cache=True)
        monkeypatch.setattr("huggingface_hub.HfFileSystem", file_system)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        (source,) = open_sources(["brief"], "somebody/chairs", []).values()
        sample, cloud = source.read(1, 0)
    assert sample == expected_sample and np.array_equal(cloud, expected_cloud)
    fetched = {path.rpartition("/")[2] for method, path, *_ in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"packed.json", "train-00001-of-00005.parquet"}, "no other shard"


def test_a_csv_gives_entries(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).random((50, 6)))
    table = tmp_path / "captions.csv"
    table.write_text('\ufefffile,caption,note\na.npy,"A red, round box.",x\nb.npy,A chair.,\n', encoding="utf-8")
    (one, two), *others = packing.table_entries(table).values()
    assert [turn["value"] for turn in one.conversations] == ["<point>\nWhat is this?", "A red, round box."]
    assert (two.object_id, two.path) == ("b", str(tmp_path / "b.npy")) and not any(others)
    for text, message in (
        ("name,text\na,b\n", "columns file and caption, .* got name,text"),
        ("", "columns file and caption, .* got nothing"),
        ("file,caption\na.npy,\n", "line 2: expected either a 'caption' or 'conversations'"),
        ("file,caption\n,A box.\n", "line 2: expected 'file'"),
        ("file,caption\na.npy,A red, round box.\n", "line 2: more values"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            packing.table_entries(table)
