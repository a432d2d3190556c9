"""Means with intervals. A row is never alone: rows that share a prompt are resampled together."""

import math

import numpy as np

Z2 = 1.959964 ** 2  # of a 95 % interval


def interval(values, groups=None, resamples: int = 2000, seed: int = 0) -> dict:
    """Mean and 95 % percentile interval by bootstrap over groups. values (n,) numbers; groups (n,) labels or None (every row its own).

    Returns {'mean', 'low', 'high', 'n', 'groups'}; low and high are None with fewer than two groups.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}
    sums, counts = _by_group(values, groups)
    out = {"mean": float(values.mean()), "low": None, "high": None, "n": len(values), "groups": len(sums)}
    if len(sums) > 1:
        pick = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
        means = sums[pick].sum(1) / counts[pick].sum(1)
        out["low"], out["high"] = (float(x) for x in np.percentile(means, [2.5, 97.5]))
    return out


def share_interval(values, groups=None) -> dict:
    """`interval` of a share (values 0 to 1), at each end the wider of the bootstrap and of Wilson's score interval with every group as one trial: the
    bootstrap has no width where all values are equal, such as 0 of n, and too little near that."""
    out = interval(values, groups)
    if out["low"] is not None:
        low, high = wilson(out["mean"], out["groups"])
        out["low"], out["high"] = max(0.0, min(out["low"], low)), min(1.0, max(out["high"], high))
    return out


def wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share p of n trials."""
    middle, half = p + Z2 / (2 * n), math.sqrt(Z2 * (p * (1 - p) + Z2 / (4 * n)) / n)
    return (middle - half) / (1 + Z2 / n), (middle + half) / (1 + Z2 / n)


def difference_interval(values, groups=None, most: float = 1.0, limit: bool = True) -> dict:
    """`interval` of differences from -most to most. Where no group lies below 0 the bootstrap draws none that does, though groups that were not drawn
    may (the rule of three): then as many of them as Wilson's upper end of 0 of n may lie at the far end, and likewise above 0. limit: the interval is
    held against a limit ("no worse than"); else it is widened, at both ends, only where all groups agree."""
    out = interval(values, groups)
    if out["low"] is not None:
        sums, unseen, equal = _by_group(np.asarray(values, dtype=float), groups)[0], Z2 / (out["groups"] + Z2), out["high"] - out["low"] < 1e-9
        if equal or (limit and sums.min() >= 0):
            out["low"] = min(out["low"], out["mean"] - unseen * (out["mean"] + most))
        if equal or (limit and sums.max() <= 0):
            out["high"] = max(out["high"], out["mean"] + unseen * (most - out["mean"]))
    return out


def standard_error(values, groups=None) -> float | None:
    """Of the mean, from the spread between groups' means (groups of equal weight)."""
    values = np.asarray(values, dtype=float)
    sums, counts = _by_group(values, groups)
    means = sums / counts
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None


def balanced_interval(values, sides, groups=None, resamples: int = 2000, seed: int = 0) -> dict:
    """Mean of the two sides' means (length-balanced accuracy: sides say whether the chosen answer is the longer one), with its
    95 % interval by bootstrap over groups. A resample that lacks a side is left out."""
    values, sides = np.asarray(values, dtype=float), np.asarray(sides, dtype=bool)
    if not sides.any() or sides.all():
        return {"mean": None, "low": None, "high": None, "n": len(values), "groups": 0}
    a, na = _by_group(values * sides, groups, sides.astype(float))
    b, nb = _by_group(values * ~sides, groups, (~sides).astype(float))
    mean = (a.sum() / na.sum() + b.sum() / nb.sum()) / 2
    pick = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (a[pick].sum(1) / na[pick].sum(1) + b[pick].sum(1) / nb[pick].sum(1)) / 2
    means = means[np.isfinite(means)]
    low, high = (float(x) for x in np.percentile(means, [2.5, 97.5])) if len(means) and len(a) > 1 else (None, None)
    return {"mean": float(mean), "low": low, "high": high, "n": len(values), "groups": len(a)}


def mcnemar(a, b) -> dict:
    """McNemar's exact test of two models on the same cases. a, b (n,) booleans, case by case.

    Returns {'only_a', 'only_b', 'p'}: the cases that one of them alone gets right, and the two-sided p of so uneven a split of those by coin.
    """
    pairs = [(bool(x), bool(y)) for x, y in zip(a, b, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    n, least = only_a + only_b, min(only_a, only_b)
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2 ** n)}


def gwet_ac2(ratings, levels: int) -> float | None:
    """Gwet's AC2: agreement of several raters on an ordered scale beyond chance, quadratic weights (Gwet, Handbook of Inter-Rater Reliability, 2014).

    ratings: per case the ratings it got, whole numbers from 1 to `levels`, any number of them. None where no case has two.
    """
    counts = np.array([np.bincount(r, minlength=levels + 1)[1:] for r in ratings if len(r)], dtype=float).reshape(-1, levels)
    raters = counts.sum(1)
    several = raters > 1
    if not several.any():
        return None
    at = np.arange(levels)
    weights = 1 - ((at[:, None] - at) / (levels - 1)) ** 2
    c, r = counts[several], raters[several]
    agreed = float(((c * (c @ weights - 1)).sum(1) / (r * (r - 1))).mean())
    shares = (counts / raters[:, None]).mean(0)
    chance = float(weights.sum() / (levels * (levels - 1)) * (shares * (1 - shares)).sum())
    return (agreed - chance) / (1 - chance)


def _by_group(values, groups, weights=None):
    weights = np.ones(len(values)) if weights is None else weights
    index = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    return np.bincount(index, values), np.bincount(index, weights)
