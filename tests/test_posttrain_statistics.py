"""Intervals against slow definitions, and against what a textbook says about coverage."""

import math

import numpy as np
import pytest

from posttrain.statistics import balanced_interval, difference_interval, gwet_ac2, interval, share_interval, standard_error

VALUES = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.5]
GROUPS = ["a", "a", "b", "c", "c", "c", "d", "e"]
SIDES = [True, False, True, True, True, False, False, False]


def slow(values, groups, statistic, resamples, seed):
    """Draw whole groups with replacement, pool their rows, take the statistic. The draws are the library's, the rest is written out."""
    names = sorted(set(groups))
    rows = [[i for i, g in enumerate(groups) if g == name] for name in names]
    picks = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    found = [statistic([i for k in pick for i in rows[k]]) for pick in picks]
    found = sorted(x for x in found if x is not None)

    def percentile(q):
        place = q / 100 * (len(found) - 1)
        low = math.floor(place)
        return found[low] + (place - low) * (found[min(low + 1, len(found) - 1)] - found[low])

    return percentile(2.5), percentile(97.5)


@pytest.mark.parametrize("groups", [GROUPS, None], ids=["by prompt", "by row"])
def test_interval_is_the_percentiles_of_resampled_groups(groups):
    labels = groups or [str(i) for i in range(8)]
    low, high = slow(VALUES, labels, lambda at: sum(VALUES[i] for i in at) / len(at), 500, 3)
    got = interval(VALUES, groups, resamples=500, seed=3)
    assert got == {"mean": pytest.approx(4.5 / 8), "low": pytest.approx(low), "high": pytest.approx(high), "n": 8,
                   "groups": len(set(labels))}


def test_balanced_interval_is_the_mean_of_the_two_sides_means():
    def statistic(at):
        sides = [[VALUES[i] for i in at if SIDES[i] is side] for side in (True, False)]
        return None if not all(sides) else sum(sum(s) / len(s) for s in sides) / 2

    low, high = slow(VALUES, GROUPS, statistic, 500, 3)
    got = balanced_interval(VALUES, SIDES, GROUPS, resamples=500, seed=3)
    assert got["mean"] == pytest.approx((3 / 4 + 1.5 / 4) / 2)  # longer: 1, 1, 1, 0; not longer: 0, 0, 1, 0.5
    assert (got["low"], got["high"], got["n"], got["groups"]) == (pytest.approx(low), pytest.approx(high), 8, 5)


def test_a_side_that_is_missing_has_no_balanced_mean():
    for sides in ([True] * 3, [False] * 3):
        assert balanced_interval([1, 0, 1], sides) == {"mean": None, "low": None, "high": None, "n": 3, "groups": 0}


def test_too_little_for_an_interval():
    assert interval([]) == {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}
    assert interval([0.25, 0.75], ["a", "a"]) == {"mean": 0.5, "low": None, "high": None, "n": 2, "groups": 1}
    assert standard_error([1.0]) is None and standard_error([1, 2], ["a", "a"]) is None


def test_standard_error_by_hand():
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3) / 2)  # variance 5/3
    assert standard_error([1.0, 3.0, 3.0, 4.0], ["a", "a", "b", "c"]) == pytest.approx(1 / math.sqrt(3))  # means 2, 3, 4


def test_rows_that_share_a_prompt_widen_the_interval():
    """Ten copies of each row are no more evidence than one."""
    values = np.random.default_rng(0).random(30)
    copies, groups = [v for v in values for _ in range(10)], [i for i in range(30) for _ in range(10)]
    once, many, naive = interval(values), interval(copies, groups), interval(copies)
    width = [x["high"] - x["low"] for x in (once, many, naive)]
    assert width[0] == pytest.approx(width[1], rel=0.05) and width[2] < 0.5 * width[1]


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        got = interval(rng.random(60) < 0.3, resamples=400, seed=trial)
        hits += got["low"] <= 0.3 <= got["high"]
    assert 0.89 < hits / 300 < 0.985


def test_the_same_data_give_the_same_interval():
    values = np.random.default_rng(0).random(8)
    assert interval(values) == interval(values) != interval(values, seed=1)


def test_a_share_of_nothing_or_all_has_a_width():
    """Wilson's interval of 0 of 20 and of 81 of 263 (Newcombe, Statistics in Medicine 17, 1998, table I: 0 to 0.1611, 0.2553 to 0.3662)."""
    none, every = share_interval([0] * 20), share_interval([1] * 20)
    assert interval([0] * 20)["high"] == 0.0  # what the bootstrap alone says
    assert (none["mean"], none["low"], round(none["high"], 4)) == (0.0, 0.0, 0.1611)
    assert (round(every["low"], 4), every["high"]) == (0.8389, 1.0)
    some = share_interval([1] * 81 + [0] * 182)
    assert some["low"] <= 0.2554 and some["high"] >= 0.3661 and some["high"] - some["low"] < 0.12
    four_each = share_interval([0] * 20, [i // 4 for i in range(20)])
    assert four_each["high"] == share_interval([0] * 5)["high"] and four_each["groups"] == 5  # rows of one prompt are one trial
    assert share_interval([1.0], ["a"])["low"] is None and share_interval([])["mean"] is None


def test_a_share_is_covered_where_it_is_rare():
    rng = np.random.default_rng(0)
    drawn = rng.random((150, 100)) < 0.02
    found = [[f(x) for x in drawn] for f in (interval, share_interval)]
    covered = [sum(x["low"] <= 0.02 <= x["high"] for x in many) / 150 for many in found]
    assert covered[0] < 0.9 < 0.93 < covered[1]


def test_no_difference_anywhere_is_not_known_exactly():
    """0 of 200 may hide up to Wilson's 1.88 % either way."""
    same = difference_interval([0.0] * 200)
    assert same["mean"] == 0 and same["high"] == pytest.approx(share_interval([0] * 200)["high"]) == pytest.approx(0.01885, abs=1e-5) == -same["low"]
    up = difference_interval([1.0] * 20)
    assert up["high"] == 1.0 and up["low"] == pytest.approx(1 - 2 * 0.1611, abs=1e-4)
    assert difference_interval([0.5] * 20, most=0.5)["high"] == 0.5
    assert difference_interval([-1.0, 1.0] * 10) == interval([-1.0, 1.0] * 10)
    assert difference_interval([0.0, 1.0] * 10, limit=False) == interval([0.0, 1.0] * 10)
    assert difference_interval([0.0])["low"] is None


@pytest.mark.parametrize("better, n", [(1, 7), (2, 30)])
def test_one_better_group_does_not_show_that_none_is_worse(better, n):
    values = [1.0] * better + [0.0] * (n - better)
    assert interval(values)["low"] == 0.0
    up, down, unseen = difference_interval(values), difference_interval([-x for x in values]), share_interval([0] * n)["high"]
    assert up["low"] == pytest.approx(better / n - unseen * (better / n + 1)) and up["low"] < -0.02 and up["high"] == interval(values)["high"]
    assert down["high"] == pytest.approx(-up["low"]) and down["low"] == interval([-x for x in values])["low"]
    assert difference_interval(values, [i // 2 for i in range(n)])["low"] < up["low"]  # rows of one prompt are one trial


def test_gwet_ac2_gives_the_published_value():
    """Gwet's data of 12 cases and four raters with gaps (irrCAC: cac.raw4raters): 0.914 with quadratic weights."""
    ratings = [[1, 1, 1], [2, 2, 3, 2], [3] * 4, [3] * 4, [2] * 4, [1, 2, 3, 4], [4] * 4, [1, 1, 2, 1], [2] * 4, [5] * 3, [1, 1], [3]]
    assert gwet_ac2(ratings, 5) == pytest.approx(0.914, abs=1e-5)


def test_gwet_ac2_by_hand():
    """Two levels, as AC1: 40 and 45 agree, 15 differ; shares 0.475 and 0.525, chance 2 * 0.475 * 0.525."""
    chance = 2 * 0.475 * 0.525
    assert gwet_ac2([[1, 1]] * 40 + [[2, 2]] * 45 + [[1, 2]] * 10 + [[2, 1]] * 5, 2) == pytest.approx((0.85 - chance) / (1 - chance))
    assert gwet_ac2([[5, 5, 5], [5, 5]], 5) == 1 and gwet_ac2([[5], []], 5) is None and gwet_ac2([], 5) is None
