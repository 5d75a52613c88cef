"""Controls and corruptions: effects, amounts, repeatable random numbers, and that the processor reads the results."""

import numpy as np
import pytest

from minigpt3d.evaluation import conditions
from minigpt3d.evaluation.conditions import (
    BLIND,
    CORRUPTION_CONDITIONS,
    CORRUPTIONS,
    NO_COLOR,
    SEEING,
    apply,
    read_clouds,
)
from minigpt3d.point_cloud_minigpt3d import load_point_cloud


ALL = (SEEING, BLIND, NO_COLOR, *CORRUPTION_CONDITIONS)
NUM_POINTS = 8192


def make_cloud(num_points: int = NUM_POINTS, seed: int = 0) -> np.ndarray:
    """An ellipsoid's surface in random colors other than black, normalized."""
    rng = np.random.default_rng(seed)
    coord = rng.normal(size=(num_points, 3))
    coord = coord / np.linalg.norm(coord, axis=1, keepdims=True) * [1.0, 0.8, 0.6]
    return load_point_cloud(np.concatenate([coord, rng.uniform(0.1, 1, (num_points, 3))], axis=1), num_points)


@pytest.fixture(scope="module")
def cloud():
    return make_cloud()


def changed(name: str, severity: int, cloud: np.ndarray, seed: int = 0) -> np.ndarray:
    """A corrupted cloud before it is filled up and normalized: (M, 6)."""
    row = CORRUPTIONS[name]
    return row.change(cloud.astype(np.float64), row.amounts[severity - 1], np.random.default_rng(seed))


def all_changed(name: str, cloud: np.ndarray) -> list[np.ndarray]:
    return [changed(name, severity, cloud) for severity in range(1, 6)]


def rows_of(cloud: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in np.ascontiguousarray(cloud, dtype=np.float64)}


# ---- All conditions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [c for c in ALL if c != "blind"])
def test_clouds_stay_clouds(cloud, condition, tiny_processor):
    before = cloud.copy()
    result = apply(condition, cloud, "chair-7", seed=3)
    assert np.array_equal(cloud, before)
    assert result.shape == cloud.shape and result.dtype == np.float32
    assert np.abs(result[:, :3].mean(0)).max() < 1e-5
    assert np.linalg.norm(result[:, :3], axis=1).max() == pytest.approx(1, abs=1e-5)
    assert result[:, 3:].min() >= 0 and result[:, 3:].max() <= 1
    assert np.array_equal(result, cloud) == (condition == "seeing")
    assert read_clouds(tiny_processor, [result]).shape == (1, 128, 6)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_random_numbers_depend_on_seed_and_object_only(name):
    cloud = make_cloud(512)
    condition = f"{name}-{5 if name == 'fewer_points' else 4}"  # only severity 5 leaves fewer than 512
    first = apply(condition, cloud, "a", seed=1)
    apply("jitter-2", cloud, "b")
    assert np.array_equal(apply(condition, cloud, "a", seed=1), first)
    # `turn` has only two directions, so some of these agree.
    for others in ([("a", seed) for seed in range(2, 12)], [(object_id, 1) for object_id in "bcdefghijk"]):
        assert any(not np.array_equal(apply(condition, cloud, *other), first) for other in others)


def test_random_numbers_are_the_same_on_every_machine():
    """Python's own `hash` would differ between processes."""
    result = apply("jitter-1", np.eye(3, 6, dtype=np.float32), "a")
    np.testing.assert_allclose(result[0, :3], [0.821277, -0.403308, -0.403543], atol=1e-5)


def test_every_corruption_has_its_conditions():
    assert len(CORRUPTION_CONDITIONS) == len(set(CORRUPTION_CONDITIONS)) == 5 * len(CORRUPTIONS) == 55
    assert all(len(row.amounts) == 5 for row in CORRUPTIONS.values())


@pytest.mark.parametrize(
    "condition", ["shuffled", "jitter", "jitter-0", "jitter-6", "jitter-2-3", "Blind", "", "fog-1"]
)
def test_unknown_conditions(cloud, condition):
    with pytest.raises(ValueError, match="`condition` must be") as error:
        apply(condition, cloud, "a")
    assert repr(condition) in str(error.value)


# ---- Controls ---------------------------------------------------------------------------------------------------------


def test_blind_clouds_reach_the_model_as_zeros(cloud, tiny_processor):
    blind = apply("blind", cloud, "a")
    assert blind.shape == cloud.shape and not blind.any()
    with pytest.raises(ValueError, match="all its points are equal"):  # so read_clouds does not call it
        tiny_processor.feature_extractor(blind)
    read = read_clouds(tiny_processor, [cloud, blind, make_cloud(50)])
    assert read.shape == (3, 128, 6) and not read[1].any()
    for index, source in ((0, cloud), (2, make_cloud(50))):
        expected = tiny_processor.feature_extractor(source, return_tensors="pt")["point_clouds"][0]
        assert read[index].equal(expected)


def test_settings_for_scans_do_not_reach_a_benchmark(cloud, tiny_processor):
    expected = read_clouds(tiny_processor, [cloud])
    tiny_processor.feature_extractor.clean = "unknown, so it would be refused"
    tiny_processor.feature_extractor.up_axis = "auto"
    assert read_clouds(tiny_processor, [cloud]).equal(expected)


def test_no_color_removes_colors_only(cloud):
    result = apply("no_color", cloud, "a")
    assert np.array_equal(result[:, :3], cloud[:, :3]) and not result[:, 3:].any()


# ---- Corruptions, one by one ------------------------------------------------------------------------------------------


def test_jitter(cloud):
    noise = [result - cloud for result in all_changed("jitter", cloud)]
    for level, moved in zip(CORRUPTIONS["jitter"].amounts, noise, strict=True):
        assert moved[:, :3].std(axis=0) == pytest.approx([level] * 3, rel=0.03)
        assert not moved[:, 3:].any()
    np.testing.assert_allclose(noise[4][:, :3], 5 * noise[0][:, :3], atol=1e-9)  # the same noise, scaled


@pytest.mark.parametrize(
    ("name", "counts"),
    [("dropout", (7373, 5734, 4096, 2458, 819)), ("fewer_points", (4096, 2048, 1024, 512, 256))],
)
def test_lost_points(cloud, name, counts):
    results = all_changed(name, cloud)
    assert tuple(map(len, results)) == counts
    kept = [rows_of(result) for result in results]
    assert kept[4] < kept[3] < kept[2] < kept[1] < kept[0] < rows_of(cloud)
    filled = apply(f"{name}-5", cloud, "a")
    _, repeats = np.unique(filled, axis=0, return_counts=True)
    assert len(repeats) == counts[4] and repeats.max() - repeats.min() <= 1


def test_fewer_points_keeps_clouds_that_have_fewer():
    assert len(changed("fewer_points", 1, make_cloud(300))) == 300


def test_holes(cloud):
    results = all_changed("holes", cloud)
    assert [len(result) for result in results] == [NUM_POINTS - 410 * n for n in (1, 2, 4, 6, 8)]
    kept = [rows_of(result) for result in results]
    assert kept[4] < kept[3] < kept[2] < kept[1] < kept[0]
    # A hole is a ball around a removed point: all removed points are nearer to it than all remaining ones.
    removed = np.array([row for row in cloud.astype(np.float64) if row.tobytes() not in kept[0]])
    distance_removed = np.linalg.norm(removed[:, None, :3] - removed[None, :, :3], axis=-1).max(1)
    distance_left = np.linalg.norm(removed[:, None, :3] - results[0][None, :, :3], axis=-1).min(1)
    assert (distance_removed <= distance_left).any()


def test_occlusion(cloud):
    kept = [rows_of(result) for result in all_changed("occlusion", cloud)]
    assert kept[4] < kept[3] < kept[2] < kept[1] <= kept[0] < rows_of(cloud)
    assert 0.3 < len(kept[4]) / NUM_POINTS < 0.45
    # One view shows two fifths of a sphere's belt, and five views all of it.
    sphere = make_sphere()
    five_views, one_view, total = (
        (abs(points[:, 1]) < 0.3).sum()
        for points in (changed("occlusion", 1, sphere), changed("occlusion", 5, sphere), sphere)
    )
    assert five_views == total and 0.3 * total < one_view < 0.45 * total
    # A view keeps the complete front and removes the back.
    result = changed("occlusion", 5, make_sphere(), seed=5)
    mean = result[:, :3].mean(0)
    mean /= np.linalg.norm(mean)
    assert np.degrees(np.arcsin(mean[1])) == pytest.approx(conditions.SCANNER_ELEVATION, abs=2)
    front = make_sphere()[:, :3] @ mean
    assert (front > 0.4).sum() == (result[:, :3] @ mean > 0.4).sum()
    assert (result[:, :3] @ mean > 0.2).all()


def make_sphere() -> np.ndarray:
    cloud = np.random.default_rng(1).normal(size=(4000, 6))
    cloud[:, :3] /= np.linalg.norm(cloud[:, :3], axis=1, keepdims=True)
    cloud[:, 3:] = 0.5
    return cloud


@pytest.mark.parametrize("num_points", [256, 1024, 8192])
def test_a_wall_hides_points_behind_it(num_points):
    """Two parallel squares, the nearer one larger; also if they are sparse."""
    rng = np.random.default_rng(0)
    front = np.c_[np.full(num_points // 2, 0.3), rng.uniform(-0.6, 0.6, (num_points // 2, 2))]
    back = np.c_[np.full(num_points // 2, -0.3), rng.uniform(-0.3, 0.3, (num_points // 2, 2))]
    seen = conditions.visible(np.concatenate([front, back]), np.array([1.0, 0.0, 0.0]))
    assert seen[: num_points // 2].all() and seen[num_points // 2 :].mean() < 0.03


def test_a_flat_object_can_be_seen_from_its_edge():
    flat = np.random.default_rng(0).uniform(-0.7, 0.7, (500, 3))
    flat[:, 2] = 0
    seen = conditions.visible(flat, np.array([1.0, 0.0, 0.0]))
    assert 0 < seen.sum() < 500


def test_outliers(cloud):
    results = all_changed("outliers", cloud)
    moved = [(result[:, :3] != cloud[:, :3]).any(1) for result in results]
    assert [int(m.sum()) for m in moved] == [82, 164, 410, 819, 1638]
    assert (moved[4] >= moved[0]).all() and np.array_equal(results[4][:, 3:], cloud[:, 3:].astype(np.float64))
    background = results[4][moved[4], :3]
    assert np.abs(background).max() <= 1
    assert background.var(axis=0) == pytest.approx([1 / 3] * 3, rel=0.1)  # of a uniform distribution over [-1, 1]


def test_density(cloud):
    for severity, ratio in enumerate(CORRUPTIONS["density"].amounts, start=1):
        rng = np.random.default_rng(0)
        axis = rng.standard_normal(3)
        axis /= np.linalg.norm(axis)

        def along(points, axis=axis):
            low, high = (cloud[:, :3] @ axis).min(), (cloud[:, :3] @ axis).max()
            return np.histogram((points[:, :3] @ axis - low) / (high - low), bins=10, range=(0, 1))[0]

        left = along(changed("density", severity, cloud)) / along(cloud)
        middles = np.arange(0.05, 1, 0.1)
        np.testing.assert_allclose(left, ratio**-middles, rtol=0.25)


@pytest.mark.parametrize("name", ["turn", "rotation"])
def test_rotations(cloud, name):
    coord = cloud[:, :3].astype(np.float64)
    axes = []
    for degrees, result in zip(CORRUPTIONS[name].amounts, all_changed(name, cloud), strict=True):
        matrix = np.linalg.lstsq(coord, result[:, :3], rcond=None)[0].T
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(matrix) == pytest.approx(1)
        assert np.trace(matrix) == pytest.approx(1 + 2 * np.cos(np.radians(degrees)), abs=1e-6)
        assert np.array_equal(result[:, 3:], cloud[:, 3:].astype(np.float64))
        axes.append([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    axes = np.array(axes[:4]) / np.linalg.norm(axes[:4], axis=1, keepdims=True)  # half a turn hides its axis
    np.testing.assert_allclose(axes, axes[:1].repeat(4, 0), atol=1e-6)
    assert (np.abs(axes[0, 1]) == pytest.approx(1)) == (name == "turn")


def test_turn_has_both_directions(cloud):
    directions = {np.sign(changed("turn", 1, cloud, seed)[0, 0] - cloud[0, 0]) for seed in range(20)}
    assert directions == {-1, 1}


def test_scale(cloud):
    stretched = []
    for factor, result in zip(CORRUPTIONS["scale"].amounts, all_changed("scale", cloud), strict=True):
        factors = np.ptp(result, axis=0) / np.ptp(cloud, axis=0)
        (axis,) = np.flatnonzero(np.abs(factors - 1) > 1e-6)
        assert axis < 3 and max(factors[axis], 1 / factors[axis]) == pytest.approx(factor, rel=1e-5)
        stretched.append((axis, factors[axis] > 1))
    assert len(set(stretched)) == 1
    many = [np.ptp(changed("scale", 3, cloud, seed), axis=0) / np.ptp(cloud, axis=0) for seed in range(30)]
    assert {(int(np.abs(f - 1).argmax()), bool(f.max() > 1.1)) for f in many} == {
        (a, s) for a in range(3) for s in (0, 1)
    }


def test_color_loss(cloud):
    results = all_changed("color_loss", cloud)
    black = [(result[:, 3:] == 0).all(1) for result in results]
    assert [int(b.sum()) for b in black] == [819, 2048, 4096, 6144, 7782]
    assert all((more >= less).all() for less, more in zip(black, black[1:], strict=False))
    for result, lost in zip(results, black, strict=True):
        assert np.array_equal(result[~lost], cloud[~lost].astype(np.float64))
        assert np.array_equal(result[:, :3], cloud[:, :3].astype(np.float64))
