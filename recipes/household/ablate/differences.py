"""How far the variants are from the full recipe: means, intervals and tests over seeds and objects.

Shapes: S seeds, O held-out objects.
"""

import math
from itertools import combinations

import numpy as np
from scipy import stats

from minigpt3d.evaluation.statistics import CONFIDENCE, holm

from .variants import FULL, VARIANTS


MEASURES = {
    "kind": {"title": "kind named", "unit": "share"},
    "color": {"title": "main color named", "unit": "share"},
    "loss": {"title": "loss of the caption, nats a token", "unit": "nats"},
}
DIGITS = 4


def estimate_mean(values: np.ndarray) -> dict[str, float]:
    """Mean of (S, O) values with its 95 % interval and the p of being 0, over seeds and objects.

    Both are random: the variance of the mean is that of the seeds' means over S plus that of the objects' means over O, and
    Student's t has Satterthwaite's degrees of freedom. A bootstrap of three or four seeds does not replace it: if they
    agree in sign, as four do by chance once in 8 times, every resample does, and p is minimal.
    """
    parts = np.array([values.mean(1 - axis).var(ddof=1) / values.shape[axis] for axis in (0, 1)])
    mean, variance = values.mean(), parts.sum()
    if variance == 0:
        return {"mean": mean, "low": mean, "high": mean, "p": float(mean == 0)}
    freedom = variance**2 / (parts**2 / (np.array(values.shape) - 1)).sum()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
    p = 2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


def find_equal(runs: list[dict]) -> list[tuple[str, str]]:
    """Pairs of variants with equal results for every object and seed: two names for one computation."""
    results = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        results.setdefault(run["variant"], []).append([run["seed"], *(run[measure] for measure in MEASURES)])
    return [(a, b) for a, b in combinations(results, 2) if results[a] == results[b]]


def summarize(runs: list[dict]) -> list[dict]:
    """For each variant and measure the mean and the difference to the full recipe, with 95 % intervals and p.

    p is corrected by Holm's method for all differences. Variants with fewer than two seeds in common with the full recipe
    are left out.

    Raises:
        ValueError: there are fewer than two runs of the full recipe.
    """
    by_name = {
        variant.name: {run["seed"]: run for run in runs if run["variant"] == variant.name} for variant in VARIANTS
    }
    full = by_name[FULL.name]
    if len(full) < 2:
        raise ValueError(
            f"expected at least two runs of the {FULL.name!r} for an interval over seeds, got {len(full)}. Give more "
            "`seeds`, and keep it in `variants`. Finished runs are kept."
        )
    rows = []
    for name, by_seed in by_name.items():
        seeds = sorted(by_seed.keys() & full.keys())
        if len(seeds) < 2:  # never run, or another process is still working on it
            continue
        for measure in MEASURES:
            values, reference = (np.array([of[seed][measure] for seed in seeds]) for of in (by_seed, full))  # (S, O)
            rows.append(_row(name, measure, values, None if name == FULL.name else reference))
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["p"] = round(float(p), DIGITS)
    return rows


def _row(name: str, measure: str, values: np.ndarray, reference: np.ndarray | None) -> dict:
    """One measure of a variant; without a reference no difference."""
    mean = estimate_mean(values)
    numbers = {"seeds": len(values), "value": mean["mean"], "low": mean["low"], "high": mean["high"]}
    if reference is not None:
        difference = estimate_mean(values - reference)
        numbers |= {
            "difference": difference["mean"],
            "difference_low": difference["low"],
            "difference_high": difference["high"],
        }
    row = {"variant": name, "measure": measure} | {key: round(float(value), DIGITS) for key, value in numbers.items()}
    return row if reference is None else row | {"p": difference["p"]}
