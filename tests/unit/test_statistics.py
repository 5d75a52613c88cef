"""Intervals and tests: equal to scipy and to formulas, and with the promised coverage and error rates."""

import re

import numpy as np
import pytest
from scipy import stats

from minigpt3d.evaluation.statistics import (
    bootstrap,
    holm,
    in_words,
    mcnemar,
    newcombe,
    paired_difference,
    sign_flip,
    wilson,
)


@pytest.mark.parametrize("hits, total", [(0, 10), (10, 10), (71, 100), (1, 3)])
def test_wilson_is_the_formula(hits, total):
    z, share = stats.norm.ppf(0.975), hits / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert wilson(hits, total) == pytest.approx((center - half, center + half), abs=1e-12)


@pytest.mark.slow
def test_coverage_of_wilson():
    rng = np.random.default_rng(0)
    hits = rng.binomial(200, 0.65, 2000)
    covered = np.mean([low <= 0.65 <= high for low, high in (wilson(count, 200) for count in hits)])
    assert 0.93 < covered < 0.97


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 500)
    half = 1.96 * values.std(ddof=1) / np.sqrt(500)
    low, high = bootstrap(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).exponential(size=80)
    expected = stats.bootstrap((values,), np.mean, method="percentile", random_state=0).confidence_interval
    assert bootstrap(values) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_of_a_ratio_of_sums():
    rng = np.random.default_rng(2)
    total = rng.integers(1, 5, 300)
    right = rng.binomial(total, 0.7)
    low, high = bootstrap((right, total))
    assert low < right.sum() / total.sum() < high and 0.03 < high - low < 0.09
    assert bootstrap(([2.0] * 9, [4.0] * 9)) == (0.5, 0.5)
    # A third of the objects has all details: three of ten resamples miss it and have no ratio.
    assert bootstrap(([2.0, 0, 0], [4.0, 0, 0])) == (0.5, 0.5)


def test_mcnemar_is_scipys_binomial():
    a, b = np.array([1] * 15 + [0] * 5 + [1] * 30 + [0] * 50), np.array([0] * 15 + [1] * 5 + [1] * 30 + [0] * 50)
    assert mcnemar(a, b) == pytest.approx(2 * stats.binom.cdf(5, 20, 0.5))
    assert mcnemar(a, a) == 1.0


def hits_of(both: int, only_a: int, only_b: int, neither: int):
    """Pairs of hits with these counts."""
    return [1] * (both + only_a) + [0] * (only_b + neither), [1] * both + [0] * only_a + [1] * only_b + [0] * neither


def test_newcombe_by_hand():
    """One pair: the half-widths of Wilson's intervals of 1 of 1 and 0 of 1 are 0.7935, and phi is 0."""
    reach = 1 - wilson(1, 1)[0]
    assert newcombe([1], [0]) == pytest.approx((1 - np.sqrt(2) * reach, 1))
    # As published for this table (Fagerland, Lydersen and Laake, 2014, the study of airways).
    assert newcombe(*hits_of(1, 1, 7, 12)) == pytest.approx((-0.507, -0.026), abs=5e-4)
    # An example by Newcombe (1998) with a negative correlation.
    assert newcombe(*hits_of(36, 12, 2, 0)) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    # Both hit the same two of four: phi, corrected, is 1 - 4 / 8, and Wilson's interval is symmetric.
    reach = 0.5 - wilson(2, 4)[0]
    assert newcombe(*hits_of(2, 0, 0, 2)) == pytest.approx((-reach, reach))
    low, high = newcombe(*hits_of(1, 7, 1, 12))
    assert (-high, -low) == pytest.approx(newcombe(*hits_of(1, 1, 7, 12)))
    with pytest.raises(ValueError, match="0 or 1"):
        newcombe([0.5], [1])


@pytest.mark.slow
def test_coverage_of_newcombe():
    """A bootstrap of as few objects has too little coverage."""
    rng, covered = np.random.default_rng(5), {newcombe: [], bootstrap: []}
    for _ in range(400):
        table = rng.multinomial(8, (0.7, 0.2, 0.02, 0.08))
        a, b = hits_of(*table)
        for method, interval in ((newcombe, newcombe(a, b)), (bootstrap, bootstrap(np.subtract(a, b)))):
            covered[method].append(interval[0] <= 0.18 <= interval[1])
    assert np.mean(covered[newcombe]) > 0.93 and np.mean(covered[bootstrap]) < 0.87


@pytest.mark.slow
def test_large_differences_stay_significant_among_many_tests():
    """10,000 draws alone give p of at least 0.0002, which is not significant after a correction for 250 tests."""
    rng = np.random.default_rng(6)
    certain = [sign_flip(0.4 + 0.1 * rng.normal(size=100), np.zeros(100)) for _ in range(250)]
    assert max(holm(certain)) < 1e-15
    few = rng.normal(0.5, 1, 12)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 12)).reshape(12, -1)
    assert sign_flip(few, np.zeros(12)) == pytest.approx(np.mean(abs(few @ signs) >= abs(few.sum()) - 1e-9))


def test_sign_flips_by_hand():
    """Two of the eight sign patterns of (1, 2, 3) have a mean as far from zero; both patterns of a single difference do."""
    assert sign_flip([1, 2, 3], [0, 0, 0]) == pytest.approx(2 / 8)
    assert sign_flip([1, 2, 3], [0, 0, 6]) == 1.0
    assert sign_flip([0.9], [0.1]) == 1.0
    hits = np.array([1] * 9 + [0] * 3), np.array([0] * 9 + [1] * 3)
    assert sign_flip(*hits) == pytest.approx(mcnemar(*hits))  # the same test for hits


@pytest.mark.slow
def test_false_positive_rate():
    """Also with few objects, where a bootstrap has too many."""
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
    found = paired_difference(*hits)
    assert found["p"] == mcnemar(*hits) and found["test"] == "McNemar exact"
    assert (found["low"], found["high"]) == newcombe(*hits)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_words():
    clear = in_words(0.6, 0.5, 0.7, 1e-9, "share", "seeing", "blind")
    assert re.search(
        r"seeing .*blind, \+60.0 points, .*more than noise.* 95 % .*\+50.0 to \+70.0, p below 0.001", clear
    )
    noise = in_words(-0.2, -1.5, 1.1, 0.75, "score100", "A", "B")
    assert re.search(r"A .*B, -0.2 points, cannot .*noise.* 95 % .*-1.5 to \+1.1, p = 0.750", noise)


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
def test_invalid_numbers_are_refused(call):
    with pytest.raises(ValueError):
        call()
