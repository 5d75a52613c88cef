"""Cleaning: far outliers and floors go, parts of objects stay; scenes are suspected; the pipeline finds the up axis."""

import sys
import warnings

import numpy as np
import pytest
import torch
from repository import ROOT
from ways_in import make_processor, make_seeing_model

from minigpt3d import cleaning_minigpt3d as cleaning, load_point_cloud
from minigpt3d.evaluation.objects import read_household
from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline
from minigpt3d.point_cloud_minigpt3d import UP_AXES
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor


AXES = {"x": 0, "y": 1, "z": 2}


def make_box(size, middle, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points on the surface of a box, (count, 3)."""
    size = np.asarray(size, dtype=float)
    area = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
    points = rng.uniform(-0.5, 0.5, (count, 3))
    axis = rng.choice(3, count, p=area / area.sum())
    points[np.arange(count), axis] = rng.choice([-0.5, 0.5], count)
    return points * size + middle


def make_table(rng: np.random.Generator) -> np.ndarray:
    """A top on four legs, y up; the top is wider than everything below."""
    legs = [make_box((0.06, 0.7, 0.06), (x, 0.35, z), 400, rng) for x in (-0.5, 0.5) for z in (-0.3, 0.3)]
    return np.concatenate([make_box((1.3, 0.03, 0.9), (0, 0.715, 0), 2400, rng), *legs])


def make_lamp(rng: np.random.Generator) -> np.ndarray:
    """A thin round base, wider than the pole and the bulb on it."""
    radius, angle = 0.2 * np.sqrt(rng.random(1500)), rng.uniform(0, 2 * np.pi, 1500)
    base = np.stack([radius * np.cos(angle), rng.choice([0, 0.01], 1500), radius * np.sin(angle)], axis=1)
    return np.concatenate(
        [
            base,
            make_box((0.03, 1.5, 0.03), (0, 0.75, 0), 1500, rng),
            make_box((0.15, 0.2, 0.15), (0, 1.6, 0), 1000, rng),
        ]
    )


def make_floor(coord: np.ndarray, rng: np.random.Generator, side: float = 1.5, axis: int = 1) -> np.ndarray:
    """30 % of points in the plane below an object."""
    low, high = coord.min(axis=0), coord.max(axis=0)
    floor = rng.uniform(-side / 2, side / 2, (round(0.3 * len(coord)), 3)) * (high - low) + (low + high) / 2
    floor[:, axis] = low[axis]
    return floor


def make_outliers(coord: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    low, high = coord.min(axis=0), coord.max(axis=0)
    return rng.uniform(2 * low - high, 2 * high - low, (round(0.01 * len(coord)), 3))


OBJECTS = [make_table, make_lamp]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("make", OBJECTS)
def test_objects_keep_their_parts(make, rng):
    coord = make(rng)
    for up_axis in AXES:
        (cleaned,) = cleaning.clean(coord, "all", [up_axis])
        assert cleaned.removed is None and cleaned.keep.all() and not cleaned.has_floor
    assert cleaning.suspect_scene(coord) is None


@pytest.mark.parametrize("make", OBJECTS)
def test_outliers_are_removed(make, rng):
    coord = make(rng)
    together = np.concatenate([coord, make_outliers(coord, rng)])
    (cleaned,) = cleaning.clean(together, "outliers")
    assert cleaned.keep[: len(coord)].all() and cleaned.keep[len(coord) :].mean() < 0.05
    assert cleaned.removed == f"removed {(~cleaned.keep).sum()} of {len(together):,} points: " + (
        f"{(~cleaned.keep).sum()} far outliers"
    )
    assert "far from all others" in cleaning.suspect_scene(together)
    assert cleaning.suspect_scene(together, "outliers") is None


@pytest.mark.parametrize("up_axis", AXES)
@pytest.mark.parametrize("side", [1.25, 1.5, 3])
def test_a_floor_is_removed_under_the_object_only(up_axis, side, rng):
    axis = AXES[up_axis]
    coord = np.roll(make_table(rng), axis - 1, axis=1)
    together = np.concatenate([coord, make_floor(coord, rng, side, axis)]) * 250 + [1e5, -3e5, 10]
    for other in AXES:
        (cleaned,) = cleaning.clean(together, "floor", [other])
        assert cleaned.has_floor == (other == up_axis)
    keep = cleaning.clean(together, "floor", [up_axis])[0].keep
    assert not keep[len(coord) :].any() and keep[: len(coord)].mean() > 0.98
    assert f"({up_axis} pointing up)" in cleaning.suspect_scene(together)


def test_both_are_removed_and_reported(rng):
    coord = make_table(rng)
    together = np.concatenate([coord, make_floor(coord, rng), make_outliers(coord, rng)])
    (cleaned,) = cleaning.clean(together, "all")
    assert "far outliers and" in cleaned.removed and "of a floor" in cleaned.removed
    assert cleaned.keep[: len(coord)].mean() > 0.98 and cleaned.keep[len(coord) :].mean() < 0.01


@pytest.mark.parametrize("shape", ["few", "equal", "line", "plane", "grid"])
@pytest.mark.parametrize("how", cleaning.CLEANINGS)
def test_degenerate_clouds_are_kept(shape, how, rng):
    coord = {
        "few": rng.random((5, 3)),
        "equal": np.ones((500, 3)),
        "line": rng.random((500, 1)) * [1, 0, 0],
        "plane": rng.random((500, 3)) * [1, 0, 1],
        "grid": np.stack(np.meshgrid(*[np.arange(8.0)] * 3), axis=-1).reshape(-1, 3),
    }[shape]
    assert cleaning.clean(coord, how)[0].keep.all()
    cleaning.suspect_scene(coord)
    assert cleaning.mirror_distance(coord, "y") > 0 or shape == "equal"


def test_separate_objects_are_suspected(rng):
    table = make_table(rng)
    assert cleaning.count_clusters(table) == 1
    assert cleaning.count_clusters(np.concatenate([table, table + [3, 0, 0]])) == 2
    assert "2 separate clusters" in cleaning.suspect_scene(np.concatenate([table, table + [3, 0, 0]]))


@pytest.mark.parametrize("up_axis", AXES)
def test_a_room_is_suspected(up_axis, rng):
    room = rng.uniform([0, 0, 0], [5, 0.02, 4], (2000, 3))
    room = np.concatenate([room, rng.uniform([0, 0, 0], [5, 2.5, 0.02], (1200, 3)), make_table(rng) + [2.5, 0, 2]])
    assert "2 separate clusters" in cleaning.suspect_scene(np.roll(room, AXES[up_axis] - 1, axis=1))


@pytest.mark.parametrize("count", [128, 200, 500, 2000])
def test_points_in_a_volume_are_no_scene(count, rng):
    for points in (rng.random((count, 3)), rng.random((count, 3)) * [1, 0.4, 0.2]):
        assert cleaning.suspect_scene(points) is None
        assert cleaning.suspect_scene(np.resize(points, (8192, 3))) is None


def test_files_of_real_objects_are_not_suspected():
    demo = ROOT / "demo" / "objects"
    for path in [demo / "drawersCabinet.npy", demo / "oakTable.ply", demo / "osakaChair.obj"]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_point_cloud(path)


def test_held_out_objects_are_not_suspected():
    pytest.importorskip("pyarrow")
    suspected = [item.object_id for item in read_household() if cleaning.suspect_scene(item.read()[:, :3])]
    assert not suspected


def test_without_scipy_neighbors_are_the_same(rng, monkeypatch):
    coord = np.concatenate([make_table(rng), rng.uniform(-3, 3, (40, 3))])
    (expected,) = cleaning.clean(coord, "all")
    distance = cleaning.mirror_distance(coord, "y")
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    assert (cleaning.clean(coord, "all")[0].keep == expected.keep).all()
    assert cleaning.mirror_distance(coord, "y") == pytest.approx(distance)


def test_unknown_cleaning():
    with pytest.raises(ValueError, match="clean must be one of 'none', .*got 'some'"):
        load_point_cloud(np.random.default_rng(0).random((200, 3)), 100, clean="some")


# Reading


def test_reading_reports_what_it_removed_once(rng, tmp_path):
    coord = make_table(rng)
    together = np.concatenate([coord, make_floor(coord, rng), make_outliers(coord, rng)])
    np.save(tmp_path / "scan.npy", together)
    with pytest.warns(UserWarning) as caught:
        cloud = load_point_cloud(tmp_path / "scan.npy", 1024, clean="all")
    (bare, message) = [str(warning.message) for warning in caught]
    assert "no color" in bare
    assert message.startswith(str(tmp_path / "scan.npy")) and "removed" in message and "of a floor" in message
    assert cloud.shape == (1024, 6) and np.linalg.norm(cloud[:, :3], axis=1).max() == pytest.approx(1)
    with pytest.warns(UserWarning, match="like a floor"):
        assert not np.allclose(load_point_cloud(tmp_path / "scan.npy", 1024), cloud)


def test_a_clean_cloud_is_read_as_without_cleaning(rng):
    coord = make_table(rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (1024, 4000, 6000):
            assert (load_point_cloud(coord, count) == load_point_cloud(coord, count, clean="all")).all()


def test_a_large_scan_and_a_mesh_are_cleaned(rng):
    trimesh = pytest.importorskip("trimesh")
    coord = np.concatenate([make_table(rng) for _ in range(20)])
    scan = np.concatenate([coord, make_floor(coord, rng)])
    with pytest.warns(UserWarning, match="of a floor"):
        load_point_cloud(scan, 1024, clean="floor")
    table = [trimesh.creation.box((1.3, 0.03, 0.9)), trimesh.creation.box((0.3, 0.7, 0.3))]
    table[1].apply_translation((0, -0.35, 0))
    floor = trimesh.Trimesh([[-1, -0.7, -1], [1, -0.7, -1], [1, -0.7, 1], [-1, -0.7, 1]], [[0, 1, 2], [0, 2, 3]])
    with pytest.warns(UserWarning, match="of a floor"):
        cloud = load_point_cloud(trimesh.util.concatenate([*table, floor]), 1024, clean="all")
    assert cloud.shape == (1024, 6)


def test_the_processor_keeps_and_takes_the_option(rng, tmp_path):
    coord = make_table(rng)
    together = np.concatenate([coord, make_floor(coord, rng)])
    MiniGPT3DPointCloudProcessor(num_points=512, clean="floor").save_pretrained(tmp_path)
    reader = MiniGPT3DPointCloudProcessor.from_pretrained(tmp_path)
    assert reader.clean == "floor" and MiniGPT3DPointCloudProcessor().clean == "none"
    with pytest.warns(UserWarning, match="removed"):
        cleaned = reader(together)["point_clouds"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not np.allclose(reader(together, clean="none")["point_clouds"], cleaned)
    with pytest.raises(ValueError, match="up_axis='auto' asks the model"):
        reader(together, up_axis="auto")


# Pipeline


@pytest.fixture(scope="module")
def describe() -> PointCloudToTextPipeline:
    return PointCloudToTextPipeline(
        model=make_seeing_model(), processor=make_processor(), device="cpu", max_new_tokens=8
    )


def test_the_pipeline_cleans(describe, rng):
    coord = make_table(rng)
    together = np.concatenate([coord, make_floor(coord, rng)])
    (cleaned,) = cleaning.clean(together, "floor")
    with pytest.warns(UserWarning, match="of a floor"):
        cloud = describe.read_point_cloud(together, clean="floor")
    assert (cloud == describe.read_point_cloud(together[cleaned.keep])).all()
    with pytest.warns(UserWarning, match="of a floor"):
        assert describe(together, clean="floor") == describe(cloud, up_axis="y", clean="none")


@pytest.mark.parametrize("up_axis", AXES)
def test_a_floor_shows_where_up_is(describe, up_axis, rng):
    axis = AXES[up_axis]
    coord = np.roll(make_table(rng), axis - 1, axis=1)
    together = np.concatenate([coord, make_floor(coord, rng, axis=axis)])
    expected = load_point_cloud(together, describe.processor.feature_extractor.num_points, up_axis=up_axis)
    assert (describe.read_point_cloud(together, up_axis="auto") == expected).all()


@pytest.mark.parametrize("wanted", UP_AXES)
def test_the_likeliest_axis_is_chosen(describe, wanted, rng, monkeypatch):
    coord = make_table(rng)
    scores = np.where([axis == wanted for axis in UP_AXES], 0.0, -9.0)
    monkeypatch.setattr(describe, "_answer_log_likelihoods", lambda clouds: scores.copy())
    expected = load_point_cloud(coord, describe.processor.feature_extractor.num_points, up_axis=wanted)
    assert (describe.read_point_cloud(coord, up_axis="auto") == expected).all()
    chat = [
        {"role": "user", "content": [{"type": "point_cloud", "point_cloud": coord}, {"type": "text", "text": "?"}]}
    ]
    assert describe(chat, up_axis="auto") == describe(chat, up_axis=wanted)
    monkeypatch.setattr(describe.processor.feature_extractor, "up_axis", "auto")
    assert describe([coord, coord], batch_size=2) == [describe(coord, up_axis=wanted)] * 2


def test_likelihood_of_greedy_answers(describe, rng):
    """As the model's loss on the same answer."""
    clouds = np.stack([load_point_cloud(make_table(rng), 128, up_axis=axis) for axis in UP_AXES])
    scores = describe._answer_log_likelihoods(clouds)
    for cloud, score in zip(clouds, scores, strict=True):
        inputs = describe.processor.apply_chat_template(
            describe._messages(cloud, None), tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        arguments = describe._generation_arguments({})
        ids = describe.model.generate(**inputs, **arguments, tokenizer=describe.processor.tokenizer)
        number = describe._answer_length(ids[0, length:].tolist())
        ids = ids[:, : length + number]
        with torch.inference_mode():
            logits = describe.model(ids, point_clouds=inputs["point_clouds"]).logits[0, length - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(-1, ids[0, length:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-3)
