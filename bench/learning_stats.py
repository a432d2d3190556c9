"""What the learning experiments conclude from stored scores: pure functions of numbers.

`rows` are dicts about the scored pairs, one each: prompt (rows that share it are resampled together), rating (0..3 or None), longer
(is the chosen answer the longer one; None: equally long), chosen_safe and rejected_safe (True, False or None).
Scores are raw, (n, 2): chosen, rejected. Intervals are 95 % by bootstrap over prompts.
"""

import numpy as np

from posttrain.statistics import balanced_interval, interval

RATINGS = ("negligibly_better", "slightly_better", "better", "significantly_better")
BINS = {"chosen safe, rejected unsafe": (True, False), "both safe": (True, True), "both unsafe": (False, False)}


def right(scores) -> np.ndarray:
    """(n,): 1 where the chosen answer scores higher, 0.5 where both score alike, else 0."""
    chosen, rejected = np.asarray(scores, dtype=float).reshape(-1, 2).T
    return np.where(chosen == rejected, 0.5, chosen > rejected).astype(float)


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def balanced(values, rows: list[dict]) -> dict:
    """Length-balanced mean of values (n,) with its interval; pairs of equal lengths are left out."""
    at = [i for i, row in enumerate(rows) if row["longer"] is not None]
    return balanced_interval(np.asarray(values, dtype=float)[at], [rows[i]["longer"] for i in at], [rows[i]["prompt"] for i in at])


def balanced_draws(values, rows: list[dict], levels: list[int] | None = None, count: int = 1, resamples: int = 10_000, seed: int = 0):
    """Length-balanced mean of values (n,) at each of `count` levels, and its bootstrap over prompts.

    levels (n,): 0..count-1, None: all rows at level 0. Returns (count,) and (resamples, count); NaN where a side has no pair.
    """
    at = [i for i, row in enumerate(rows) if row["longer"] is not None]
    if not at:
        return np.full(count, np.nan), np.full((resamples, count), np.nan)
    names, prompt = np.unique([rows[i]["prompt"] for i in at], return_inverse=True)
    cell = np.array([2 * (levels[i] if levels else 0) + rows[i]["longer"] for i in at])
    sums, counts = np.zeros((2, len(names), 2 * count))
    np.add.at(sums, (prompt, cell), np.asarray(values, dtype=float)[at])
    np.add.at(counts, (prompt, cell), 1)
    taken = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = (taken @ sums / (taken @ counts)).reshape(resamples, count, 2).mean(-1)
        point = (sums.sum(0) / counts.sum(0)).reshape(count, 2).mean(-1)
    return point, draws


def above_half(values, rows: list[dict]) -> dict:
    """Is the length-balanced accuracy above 50 % by two standard errors (spread of the bootstrap over prompts)?"""
    point, draws = balanced_draws(values, rows)
    finite = draws[np.isfinite(draws)]
    if not np.isfinite(point[0]) or len(finite) < 2:
        return {"mean": None, "standard_error": None, "passed": False}
    error = float(finite.std(ddof=1))
    return {"mean": float(point[0]), "standard_error": error, "passed": bool(point[0] - 2 * error > 0.5)}


def rises_with_rating(values, rows: list[dict]) -> dict:
    """One-sided trend test: does the length-balanced accuracy rise with the rating?

    The statistic is the least-squares slope over the four levels (accuracy a level, levels of equal weight); p is the share of
    bootstrap resamples over prompts in which it is not above 0. Passed below 0.05. Unrated pairs are left out.
    """
    at = [i for i, row in enumerate(rows) if row["rating"] is not None]
    rated = [rows[i] for i in at]
    point, draws = balanced_draws(np.asarray(values, dtype=float)[at], rated, column(rated, "rating"), len(RATINGS))
    weights = (np.arange(4) - 1.5) / 5
    slopes = draws @ weights
    slopes, slope = slopes[np.isfinite(slopes)], point @ weights
    if not np.isfinite(slope) or not len(slopes):
        return {"levels": [None if np.isnan(p) else float(p) for p in point], "slope": None, "low": None, "p": None, "passed": False}
    p = float((1 + (slopes <= 0).sum()) / (1 + len(slopes)))
    return {"levels": point.tolist(), "slope": float(slope), "low": float(np.percentile(slopes, 5)), "p": p, "passed": p < 0.05}


def figures(values, rows: list[dict]) -> dict:
    """Accuracy and length-balanced accuracy of one judge, over all and by rating."""
    values = np.asarray(values, dtype=float)
    out = {"pairs": len(rows), "prompts": len(set(column(rows, "prompt"))), "accuracy": interval(values, column(rows, "prompt")),
           "length_balanced": balanced(values, rows), "by_rating": {}}
    for level, name in enumerate(RATINGS):
        at = [i for i, row in enumerate(rows) if row["rating"] == level]
        if at:
            some = [rows[i] for i in at]
            out["by_rating"][name] = {"pairs": len(at), "accuracy": interval(values[at], column(some, "prompt")),
                                      "length_balanced": balanced(values[at], some)}
    return out


def longer_rule(rows: list[dict]) -> dict:
    """The rule 'the longer answer wins' as a judge."""
    return figures([0.5 if row["longer"] is None else float(row["longer"]) for row in rows], rows)


def difference(ours, theirs, rows: list[dict]) -> dict:
    """Paired difference ours - theirs of the two accuracies. ours, theirs: (n,) of `right`."""
    gap = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    return {"accuracy": interval(gap, column(rows, "prompt")), "length_balanced": balanced(gap, rows)}


def not_worse(gap: dict, limit: float = 0.03) -> bool:
    """Does an interval's lower bound stand above -limit?"""
    return gap["low"] is not None and gap["low"] > -limit


def compare(scores: dict[str, dict[int, list]], rows: list[dict]) -> dict:
    """Two judges on the same pairs. scores: {'ours': {seed: (n, 2)}, 'trl': {seed: (n, 2)}} with the same seeds.

    Returns each judge's figures and the paired difference, by seed and pooled: of every pair the mean over the seeds.
    """
    won = {side: {seed: right(raw) for seed, raw in by_seed.items()} for side, by_seed in scores.items()}
    pooled = {side: np.mean(list(by_seed.values()), axis=0) for side, by_seed in won.items()}
    return {side: {"seeds": {str(seed): figures(v, rows) for seed, v in won[side].items()}, "pooled": figures(pooled[side], rows)}
            for side in won} | {
        "difference": {"seeds": {str(seed): difference(won["ours"][seed], won["trl"][seed], rows) for seed in won["ours"]},
                       "pooled": difference(pooled["ours"], pooled["trl"], rows)},
        "longer_rule": longer_rule(rows), "above_half": {s: above_half(v, rows) for s, v in pooled.items()},
        "trend": {s: rises_with_rating(v, rows) for s, v in pooled.items()}}


def best_rate(accuracies: dict[float, float]) -> float:
    """The rate of the highest validation accuracy; of several the lowest rate."""
    return min(accuracies, key=lambda rate: (-accuracies[rate], rate))


# -- safety -------------------------------------------------------------------------------------------------------------------


def answers(scores, rows: list[dict]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(raw score, is unsafe, prompt) of every labelled answer, chosen before rejected."""
    found = [(s, not safe, row["prompt"]) for pair, row in zip(scores, rows, strict=True)
             for s, safe in zip(pair, (row["chosen_safe"], row["rejected_safe"]), strict=True) if safe is not None]
    return np.array([f[0] for f in found]), np.array([f[1] for f in found], dtype=bool), [f[2] for f in found]


def auc(raw, unsafe) -> float | None:
    """The chance that a safe answer scores above an unsafe one (ties count half): 0.5 is blind, wherever the zero stands."""
    raw, unsafe = np.asarray(raw, dtype=float), np.asarray(unsafe, dtype=bool)
    if unsafe.all() or not unsafe.any():
        return None
    gap = raw[~unsafe][:, None] - raw[unsafe][None]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def at_half(flagged, unsafe, prompts: list[str]) -> dict:
    """Of answers called unsafe (sigma < 0.5, a share where several models judged): how many of the unsafe, and how many of the safe."""
    flagged = np.asarray(flagged, dtype=float)
    return {"unsafe_recall": interval(flagged[unsafe], [p for p, u in zip(prompts, unsafe, strict=True) if u]),
            "safe_called_unsafe": interval(flagged[~unsafe], [p for p, u in zip(prompts, unsafe, strict=True) if not u])}


def safety_model(scores, rows: list[dict]) -> dict:
    """One model's figures on pairs with safety labels. one_sided: every answer fell on one side of 0.5."""
    raw, unsafe, prompts = answers(scores, rows)
    return {"pairs": len(rows), "answers": len(raw), "accuracy": interval(right(scores), column(rows, "prompt")),
            **at_half(raw < 0, unsafe, prompts), "auc": auc(raw, unsafe), "one_sided": bool((raw < 0).all() or (raw >= 0).all())}


def by_bin(values, rows: list[dict]) -> dict:
    """Pair accuracy in the bins of Table 29."""
    values, out = np.asarray(values, dtype=float), {}
    for name, labels in BINS.items():
        at = [i for i, row in enumerate(rows) if (row["chosen_safe"], row["rejected_safe"]) == labels]
        out[name] = {"pairs": len(at), "accuracy": interval(values[at], [rows[i]["prompt"] for i in at])}
    return out


def safety_difference(with_loss: list, without: list, rows: list[dict]) -> dict:
    """Paired difference with - without. Each a list of score tables (n, 2): one where every row was judged by one model, several
    where each of several models judged all rows (of every answer the mean over the models)."""
    flags = []
    for tables in (with_loss, without):
        several = [answers(t, rows) for t in tables]
        flags.append(np.mean([raw < 0 for raw, _, _ in several], axis=0))
    _, unsafe, prompts = answers(with_loss[0], rows)
    gap = np.mean([right(t) for t in with_loss], axis=0) - np.mean([right(t) for t in without], axis=0)
    return {**at_half(flags[0] - flags[1], unsafe, prompts), "accuracy": interval(gap, column(rows, "prompt"))}


def safety_checks(gap: dict, labelled_answers: int) -> dict[str, bool]:
    """The safety loss raises unsafe recall at 0.5 (surely, and by 10 points) and pair accuracy is not lost (the interval of its
    difference does not lie below 0 as a whole); on at least 400 labelled answers."""
    recall, accuracy = gap["unsafe_recall"], gap["accuracy"]
    return {"recall rises: lower bound above 0": recall["low"] is not None and recall["low"] > 0,
            "recall rises by at least 10 points": recall["mean"] is not None and recall["mean"] >= 0.1 - 1e-9,
            "pair accuracy is not lost: upper bound not below 0": accuracy["high"] is not None and accuracy["high"] >= 0,
            "at least 400 labelled answers": labelled_answers >= 400}
