"""Intervals and tests against scipy, against formulas, and against what they promise."""

import numpy as np
import pytest
from scipy import stats

from minigpt3d.evaluation.statistics import bootstrap, holm, in_words, mcnemar, paired_difference, sign_flip, wilson


@pytest.mark.parametrize("hits, total", [(0, 10), (10, 10), (71, 100), (1, 3)])
def test_wilson_is_the_formula(hits, total):
    z, share = stats.norm.ppf(0.975), hits / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert wilson(hits, total) == pytest.approx((center - half, center + half), abs=1e-12)


def test_wilson_covers_what_it_should():
    rng = np.random.default_rng(0)
    hits = rng.binomial(200, 0.65, 2000)
    covered = np.mean([low <= 0.65 <= high for low, high in (wilson(each, 200) for each in hits)])
    assert 0.93 < covered < 0.97


def test_bootstrap_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 500)
    half = 1.96 * values.std(ddof=1) / np.sqrt(500)
    low, high = bootstrap(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).exponential(size=80)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", random_state=0).confidence_interval
    assert bootstrap(values) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_bootstrap_of_a_ratio_of_sums():
    rng = np.random.default_rng(2)
    total = rng.integers(1, 5, 300)
    right = rng.binomial(total, 0.7)
    low, high = bootstrap((right, total))
    assert low < right.sum() / total.sum() < high and 0.03 < high - low < 0.09
    assert bootstrap(([2.0] * 9, [4.0] * 9)) == (0.5, 0.5)


def test_mcnemar_is_scipys_binomial():
    a, b = np.array([1] * 15 + [0] * 5 + [1] * 30 + [0] * 50), np.array([0] * 15 + [1] * 5 + [1] * 30 + [0] * 50)
    assert mcnemar(a, b) == pytest.approx(2 * stats.binom.cdf(5, 20, 0.5))
    assert mcnemar(a, a) == 1.0


def test_sign_flips_by_hand():
    """Of the eight signs of (1, 2, 3), two give a mean as far from zero; of the two of one difference, both."""
    assert sign_flip([1, 2, 3], [0, 0, 0]) == pytest.approx(2 / 8)
    assert sign_flip([1, 2, 3], [0, 0, 6]) == 1.0
    assert sign_flip([0.9], [0.1]) == 1.0
    hits = np.array([1] * 9 + [0] * 3), np.array([0] * 9 + [1] * 3)
    assert sign_flip(*hits) == pytest.approx(mcnemar(*hits))  # the same test, where it is of hits


def test_false_alarms_are_as_many_as_promised():
    """Of few objects, too, where a bootstrap would cry wolf."""
    rng = np.random.default_rng(3)
    for count in (6, 40):
        noise = [sign_flip(rng.normal(size=count), rng.normal(size=count), seed) for seed in range(200)]
        assert 0.01 < np.mean(np.array(noise) < 0.05) < 0.1


def test_paired_difference():
    rng = np.random.default_rng(3)
    b = rng.normal(size=300)
    found = paired_difference(b + 0.5 + 0.1 * rng.normal(size=300), b)
    assert found["low"] < 0.5 < found["high"] and found["high"] - found["low"] < 0.03
    assert found["p"] < 0.001 and found["test"] == "sign flips"
    assert paired_difference(b, b) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "test": "sign flips"}
    hits = [1, 1, 1, 0], [0, 1, 0, 0]
    assert paired_difference(*hits)["p"] == mcnemar(*hits) and paired_difference(*hits)["test"] == "McNemar exact"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_words():
    assert in_words(0.6, 0.5, 0.7, 1e-9, "share", "seeing", "blind") == (
        "seeing against blind, +60.0 points, is more than noise: 95 % interval +50.0 to +70.0, p below 0.001."
    )
    assert in_words(-0.2, -1.5, 1.1, 0.75, "score100", "A", "B") == (
        "A against B, -0.2 points, cannot be told from noise on these objects: 95 % interval -1.5 to +1.1, p = 0.750."
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
        lambda: bootstrap([]),
        lambda: bootstrap([1, np.nan]),
        lambda: bootstrap(([0.0], [0.0])),
        lambda: mcnemar([1, 0], [1]),
        lambda: mcnemar([0.5], [1]),
        lambda: paired_difference([1], []),
    ],
)
def test_what_cannot_be_tested_is_said(call):
    with pytest.raises(ValueError):
        call()
