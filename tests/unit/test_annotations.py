"""Annotations and clouds of the release: read as the authors read them, checked, augmented."""

import json

import numpy as np
import pytest
from training_runs import TYPES, record, write

from minigpt3d.data.clouds import augment, read_point_cloud
from minigpt3d.data.records import read_annotations, to_messages


def test_annotations_equal_the_authors_samples(golden, tmp_path):
    facts = golden("data_facts.json")["dataset_items"]
    samples = read_annotations([write(tmp_path / "a.json", facts["annotations"])])
    assert {source: len(s) for source, s in samples.items()} == {
        "brief": 1,  # the record without a type; the two corrupt objects are gone
        "detailed": 0,
        "single_round": 1,
        "multi_round": 1,
    }
    for source in ("brief", "single_round"):
        item, (sample,) = facts["items"][TYPES[source]]["item"], samples[source]
        assert f"<PC><PointCloudHere></PC> {sample.rounds[0][0]} " == item["instruction_input"]
        assert (sample.rounds[0][1], sample.object_id) == (item["answer"], item["PC_id"])
    item, (sample,) = facts["items"]["multi_round"]["item"], samples["multi_round"]
    questions, answers = zip(*sample.rounds, strict=True)
    assert "<PC><PointCloudHere></PC> " + "!@#".join(f"{q} " for q in questions) == item["conv_q"]
    assert "!@#".join(answers) == item["conv_a"]
    roles = [(m["role"], [part["type"] for part in m["content"]]) for m in to_messages(sample)]
    assert roles == [("user", ["point_cloud", "text"]), ("assistant", ["text"])] + 2 * [
        ("user", ["text"]),
        ("assistant", ["text"]),
    ]


BROKEN = {
    "no list": ({"a": 1}, "expected a JSON list"),
    "no JSON": ("{", "not JSON"),
    "no id": ([{"conversations": []}], "record 0: expected an object with a string 'object_id'"),
    "kind": ([record(kind="poem")], "object_id 'a'.*conversation_type must be one of.*'poem'"),
    "odd": ([record() | {"conversations": record()["conversations"][:1]}], "object_id 'a'.*question and answer"),
    "order": ([record() | {"conversations": record()["conversations"][::-1]}], "object_id 'a'.*'from': 'human'"),
    "surrogate": (
        "["
        + json.dumps(record())
        + ",\n\n"
        + json.dumps(record("b", rounds=[("What?", "A \ud83d.")]), indent=1)
        + "]",
        r"^object_id 'b' \(.*a.json, line 3, record 1\): half of a character.*ud83d",
    ),
    "surrogate in the id": ('[{"object_id": "\\udfff", "conversations": []}]', "a.json, line 1, record 0"),
    "two <point>": (
        [record(rounds=[("<point> twice", "yes")])],
        "object_id 'a'.*'<point>' must stand once, in the first question",
    ),
    "a later <point>": (
        [record(kind="multi_round", rounds=[("What?", "A box."), ("And <point>?", "A ball.")])],
        "object_id 'a'.*and in no other",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_annotations_name_the_object(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_annotations([write(tmp_path / "a.json", content)])


@pytest.mark.parametrize(
    ("cloud", "message"),
    [
        (np.zeros((8, 3)), r"shape \(points, 6\), got \(8, 3\)"),
        (np.full((8, 6), np.nan), "NaN"),
        (np.full((8, 6), 255.0), r"colors in \[0, 1\]"),
        (np.array([{}]), "cannot read"),
        (np.array([["a"] * 6]), "must hold numbers, got <U1"),
        (np.zeros((8, 6), complex), "must hold numbers"),
        (b"", "cannot read"),
        (b"PK\x05\x06" + bytes(18), "must hold numbers"),  # an empty .npz
        (None, "cannot read"),
    ],
)
def test_broken_clouds_name_the_object(cloud, message, tmp_path):
    if isinstance(cloud, bytes):
        (tmp_path / "a_8192.npy").write_bytes(cloud)
    elif cloud is not None:
        np.save(tmp_path / "a_8192.npy", cloud)
    with pytest.raises(ValueError, match=rf"object_id 'a'.*{message}"):
        read_point_cloud(tmp_path, "a")


def test_augmentation_is_seeded_and_keeps_height_and_colors():
    rng = np.random.default_rng(0)
    cloud = np.concatenate([rng.normal(size=(200, 3)) * [1, 3, 1], rng.random((200, 3))], 1).astype(np.float32)
    before = cloud.copy()
    augmented = [augment(cloud, np.random.default_rng(seed)) for seed in range(40)]
    assert (cloud == before).all()
    for seed, one in enumerate(augmented):
        assert one.shape == cloud.shape and one.dtype == np.float32
        assert (one == augment(cloud, np.random.default_rng(seed))).all()
        assert 0 <= one[:, 3:].min() and one[:, 3:].max() <= 1
        assert one[:, 1].std() > 1.5 * max(one[:, 0].std(), one[:, 2].std())  # upright objects stay upright
        assert np.isin(one[:, 3:], cloud[:, 3:]).all()  # captions of colors stay true
    fewer = sum(len(np.unique(one, axis=0)) < 200 for one in augmented)
    assert 10 < fewer < 40
