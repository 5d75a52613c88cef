"""Confidence intervals and paired tests of scores, and what they mean in words.

Shapes: N objects, R resamples.
"""

import math

import numpy as np
from scipy.stats import binomtest, permutation_test


CONFIDENCE = 0.95
RESAMPLES = 10_000
SIGNIFICANT = 0.05
_CHUNK = 1_000  # resamples at a time, to limit memory with thousands of objects


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share, which is valid at 0 and 1, too.

    Raises:
        ValueError: no objects, or more hits than objects.
    """
    interval = binomtest(int(hits), int(total)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(values, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a mean, or of a ratio of sums.

    Args:
        values: (N,) one number per object; or a tuple of two such lists, for the sum of the first divided by that of the second.
        seed: of the resamples.

    Raises:
        ValueError: no objects, numbers that are not finite, or a second sum of zero.
    """
    is_ratio = isinstance(values, tuple)
    columns = np.stack([_checked(column) for column in (values if is_ratio else (values,))], axis=1)  # (N, 1 or 2)
    if is_ratio and columns[:, 1].sum() <= 0:
        raise ValueError("bootstrap: a ratio needs a second sum above zero.")
    rng, count = np.random.default_rng(seed), len(columns)
    weights = np.full(count, 1 / count)
    chunks = [rng.multinomial(count, weights, _CHUNK) @ columns / count for _ in range(RESAMPLES // _CHUNK)]
    means = np.concatenate(chunks)  # (R, 1 or 2)
    if is_ratio:
        means = means[means[:, 1] > 0]  # a ratio needs a denominator
        means = means[:, 0] / means[:, 1]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def mcnemar(a, b) -> float:
    """McNemar's exact test: p of two shares over the same objects being equal.

    Args:
        a, b: (N,) hits, 0 or 1.
    """
    a, b = _paired(a, b, hits=True)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def newcombe(a, b) -> tuple[float, float]:
    """Newcombe's interval of the difference of two shares over the same objects, from Wilson's interval of each.

    Unlike a bootstrap, it does not shrink to nothing if few or no objects differ. (Method 10 of Newcombe, Improved confidence
    intervals for the difference between binomial proportions based on paired data, 1998.)

    Args:
        a, b: (N,) hits, 0 or 1.
    """
    a, b = _paired(a, b, hits=True)
    n, share_a, share_b = len(a), a.mean(), b.mean()
    (low_a, high_a), (low_b, high_b) = wilson(int(a.sum()), n), wilson(int(b.sum()), n)
    both, neither = (a * b).sum(), ((1 - a) * (1 - b)).sum()
    agreement = both * neither - (a * (1 - b)).sum() * ((1 - a) * b).sum()
    agreement = max(agreement - n / 2, 0) if agreement > 0 else agreement  # continuity correction
    spread = math.sqrt(a.sum() * (n - a.sum()) * b.sum() * (n - b.sum()))
    phi = agreement / spread if spread else 0.0

    def distance(from_a: float, from_b: float) -> float:
        return math.sqrt(max(0.0, from_a**2 - 2 * phi * from_a * from_b + from_b**2))

    difference = share_a - share_b
    low, high = distance(share_a - low_a, high_b - share_b), distance(high_a - share_a, share_b - low_b)
    return float(difference - low), float(difference + high)


def sign_flip(a, b, seed: int = 0) -> float:
    """Sign-flip permutation test: p of the mean difference of two scores over the same objects being zero.

    Exact for few objects, else from `RESAMPLES` random draws of signs. Hoeffding's bound replaces p where it is smaller, since
    draws cannot give a p small enough to remain significant after a correction for many tests.

    Args:
        a, b: (N,) scores.
        seed: of the draws.
    """
    difference = np.subtract(*_paired(a, b))
    if len(difference) < 2:
        return 1.0
    test = permutation_test(
        (difference,),
        lambda values, axis: values.mean(axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_CHUNK,
        rng=seed,
    )
    bound = 2 * math.exp(-(difference.sum() ** 2) / (2 * (difference**2).sum())) if difference.any() else 1.0
    return float(min(test.pvalue, bound))


def paired_difference(a, b, seed: int = 0) -> dict:
    """The difference of two scores over the same objects, with its interval and a test.

    Args:
        a, b: (N,) scores.
        seed: of resamples and draws.

    Returns:
        "difference": mean of a - b; "low", "high": its interval, for hits by `newcombe`, for other scores by `bootstrap`; "p" of
        no difference; "test": its name, for hits `mcnemar`, for other scores `sign_flip`.
    """
    a, b = _paired(a, b)
    if np.isin([a, b], (0, 1)).all():
        (low, high), p, test = newcombe(a, b), mcnemar(a, b), "McNemar exact"
    else:
        (low, high), p, test = bootstrap(a - b, seed), sign_flip(a, b, seed), "sign flips"
    return {"difference": float((a - b).mean()), "low": low, "high": high, "p": p, "test": test}


def _paired(a, b, hits: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(N,) numbers of the same objects as arrays; with `hits`, each must be 0 or 1."""
    a, b = _checked(a), _checked(b)
    if a.shape != b.shape:
        raise ValueError(f"a paired test needs both numbers of each object, got {len(a)} and {len(b)} numbers.")
    if hits and not np.isin([a, b], (0, 1)).all():
        raise ValueError("expected hits: every number must be 0 or 1.")
    return a, b


def _checked(values) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected one finite number per object and at least one object, got {values[:5]!r} …")
    return values


def holm(p_values) -> list[float]:
    """Correct p of several tests by Holm's method, which limits the chance of any false positive among them."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    factors = len(p) - np.arange(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return corrected.tolist()


def in_words(difference: float, low: float, high: float, p: float, unit: str, a: str, b: str) -> str:
    """Whether a difference is significant, with its interval and p.

    Args:
        difference, low, high: a - b and its 95 % interval, in the unit.
        p: corrected for other tests.
        unit: "share", "score100" or "count".
        a, b: names of what is compared.
    """
    scale, name, digits = {"share": (100, " points", 1), "score100": (1, " points", 1), "count": (1, "", 2)}[unit]
    amount, low, high = (f"{scale * number:+.{digits}f}" for number in (difference, low, high))
    chance = "p below 0.001" if p < 0.001 else f"p = {p:.3f}"
    verdict = "is more than noise" if p < SIGNIFICANT else "cannot be told from noise on these objects"
    return f"{a} against {b}, {amount}{name}, {verdict}: 95 % interval {low} to {high}, {chance}."
