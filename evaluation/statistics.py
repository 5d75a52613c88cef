"""How sure a number is: 95 % intervals, paired tests, and what they mean in words.

Shapes: N objects, R resamples.
"""

import math

import numpy as np
from scipy.stats import binomtest, permutation_test


CONFIDENCE = 0.95
RESAMPLES = 10_000
SIGNIFICANT = 0.05
_CHUNK = 1_000  # resamples at once, so that thousands of objects do not fill the memory


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share: it holds at 0 and at 1, too, where the usual standard error is none.

    Raises:
        ValueError: no objects, or more hits than those.
    """
    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"expected hits between 0 and a total of at least 1, got {hits} of {total}.")
    interval = binomtest(int(hits), int(total)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of (N, K) values over objects that are drawn anew, with replacement: (R, K)."""
    rng, count = np.random.default_rng(seed), len(values)
    weights = np.full(count, 1 / count)
    chunks = [rng.multinomial(count, weights, _CHUNK) @ values / count for _ in range(RESAMPLES // _CHUNK)]
    return np.concatenate(chunks)


def _check(values: np.ndarray, what: str):
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"{what}: expected one finite number for each of at least one object, got {values[:5]!r} …")


def bootstrap(values, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a mean, or of a ratio of sums.

    Args:
        values: (N,) one number for each object; or a pair of such, whose sums are divided, the first by the second.
        seed: of the resamples.

    Raises:
        ValueError: no objects, numbers that are not finite, or a second sum of zero.
    """
    if isinstance(values, tuple):
        values = np.stack([np.asarray(each, dtype=float) for each in values], axis=1)  # (N, 2)
        _check(values, "bootstrap")
        if values[:, 1].sum() <= 0:
            raise ValueError("bootstrap: a ratio needs a second sum above zero.")
        means = _resampled(values, seed)
        means = means[means[:, 1] > 0]  # a resample without any has no ratio
        means = means[:, 0] / means[:, 1]
    else:
        values = np.asarray(values, dtype=float)[:, None]
        _check(values, "bootstrap")
        means = _resampled(values, seed)[:, 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def _paired(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    _check(a, "a")
    _check(b, "b")
    if a.shape != b.shape:
        raise ValueError(f"a paired test needs both numbers of each object, got {len(a)} and {len(b)} numbers.")
    return a, b


def mcnemar(a, b) -> float:
    """Exact p of two shares over the same objects being equal: of those where a and b differ, each way half the time.

    Args:
        a, b: (N,) hits, 0 or 1.
    """
    a, b = _hits(a, b)
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def newcombe(a, b) -> tuple[float, float]:
    """Newcombe's interval of the difference of two shares over the same objects, made of Wilson's of each.

    With few objects or none that differ it stays as wide as that, where a bootstrap shrinks to nothing. (Method 10 of
    Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired data, 1998.)

    Args:
        a, b: (N,) hits, 0 or 1.
    """
    a, b = _hits(a, b)
    n, share_a, share_b = len(a), a.mean(), b.mean()
    (low_a, high_a), (low_b, high_b) = wilson(int(a.sum()), n), wilson(int(b.sum()), n)
    both, neither = (a * b).sum(), ((1 - a) * (1 - b)).sum()
    agreement = both * neither - (a * (1 - b)).sum() * ((1 - a) * b).sum()
    agreement = max(agreement - n / 2, 0) if agreement > 0 else agreement  # corrected for continuity
    spread = math.sqrt(a.sum() * (n - a.sum()) * b.sum() * (n - b.sum()))
    phi = agreement / spread if spread else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    difference = share_a - share_b
    low, high = reach(share_a - low_a, high_b - share_b), reach(high_a - share_a, share_b - low_b)
    return float(difference - low), float(difference + high)


def _hits(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = _paired(a, b)
    if not set(np.unique([a, b])) <= {0.0, 1.0}:
        raise ValueError("expected hits of both: every number must be 0 or 1.")
    return a, b


def sign_flip(a, b, seed: int = 0) -> float:
    """p of scores over the same objects being equal but for chance, which would give each difference either sign.

    Exact for few objects, where a bootstrap sees differences that are none; else by `RESAMPLES` draws of signs, and beyond
    what those can tell by Hoeffding's bound, lest a correction for many tests drown what is certain.

    Args:
        a, b: (N,) scores.
        seed: of the draws.
    """
    difference = np.subtract(*_paired(a, b))
    if len(difference) < 2:
        return 1.0
    found = permutation_test(
        (difference,),
        lambda values, axis: values.mean(axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_CHUNK,
        rng=seed,
    )
    bound = 2 * math.exp(-(difference.sum() ** 2) / (2 * (difference**2).sum())) if difference.any() else 1.0
    return float(min(found.pvalue, bound))


def paired_difference(a, b, seed: int = 0) -> dict:
    """How far two scores over the same objects are apart, and whether chance explains it.

    Args:
        a, b: (N,) scores.
        seed: of resamples and draws.

    Returns:
        "difference": mean of a - b; "low", "high": its interval, of hits by `newcombe`, of other scores by `bootstrap`; "p" of
        there being none, by the "test": hits by `mcnemar`, other scores by `sign_flip`.
    """
    a, b = _paired(a, b)
    hits = np.isin([a, b], (0, 1)).all()
    low, high = newcombe(a, b) if hits else bootstrap(a - b, seed)
    p, test = (mcnemar(a, b), "McNemar exact") if hits else (sign_flip(a, b, seed), "sign flips")
    return {"difference": float((a - b).mean()), "low": low, "high": high, "p": p, "test": test}


def holm(p_values) -> list[float]:
    """p of several tests that are made at once, corrected by Holm's method: as many false alarms in all as in one."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    factors = len(p) - np.arange(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return corrected.tolist()


def in_words(difference: float, low: float, high: float, p: float, unit: str, a: str, b: str) -> str:
    """Whether a difference is more than noise, or cannot be told from it.

    Args:
        difference, low, high: a - b and its 95 % interval, in the unit.
        p: of there being none, corrected for other tests.
        unit: "share", "score100" or "count".
        a, b: what is compared.
    """
    scale, name, digits = (100, "points", 1) if unit == "share" else (1, "" if unit == "count" else "points", 2)
    digits = 1 if unit == "score100" else digits
    amount = f"{scale * difference:+.{digits}f} {name}".strip()
    interval = f"95 % interval {scale * low:+.{digits}f} to {scale * high:+.{digits}f}"
    chance = "p below 0.001" if p < 0.001 else f"p = {p:.3f}"
    if p < SIGNIFICANT:
        return f"{a} against {b}, {amount}, is more than noise: {interval}, {chance}."
    return f"{a} against {b}, {amount}, cannot be told from noise on these objects: {interval}, {chance}."
