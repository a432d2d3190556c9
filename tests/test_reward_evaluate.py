"""The reward models' report card: every figure recounted by hand on a handful of pairs."""

import math
import random

import numpy as np
import pytest

from posttrain.formats import Pair
from posttrain.statistics import interval
from reward.evaluate import evaluate, labelled, pair_rows, precision_threshold, safety_figures


def pair(prompt: str, rating=None, safe=(None, None), source="s") -> Pair:
    return Pair([{"role": "user", "content": prompt}], "c", "r", rating, chosen_safe=safe[0], rejected_safe=safe[1], source=source)


PAIRS = [pair("a", 3, (True, False), "x"), pair("a", 2, (True, True), "x"), pair("b", 2, (False, False), "y"), pair("c", 0, source="y"),
         pair("d", 1), pair("e")]
SCORES = [[2.0, -1.0], [0.5, 1.0], [1.0, -3.0], [0.0, 0.0], [1.0, 0.5], [-2.0, 1.0]]  # right, wrong, right, tie, right, wrong
LENGTHS = [(9, 5), (3, 8), (4, 7), (6, 6), (5, 5), (9, 2)]


def test_accuracy_a_tie_is_half_right():
    told = evaluate(PAIRS, SCORES, LENGTHS)
    assert told["pairs"] == 6 and told["prompts"] == 5
    assert told["accuracy"] == interval([1, 0, 1, 0.5, 1, 0], ["a", "a", "b", "c", "d", "e"])
    assert told["accuracy"]["mean"] == pytest.approx(3.5 / 6) and told["accuracy"]["groups"] == 5


def test_by_rating_source_and_bin():
    told = evaluate(PAIRS, SCORES, LENGTHS)
    assert [(r["rating"], r["pairs"], r["accuracy"]["mean"]) for r in told["by_rating"]] == [
        ("significantly_better", 1, 1.0), ("better", 2, 0.5), ("slightly_better", 1, 1.0), ("negligibly_better", 1, 0.5)]
    assert {k: (v["pairs"], v["accuracy"]["mean"]) for k, v in told["by_source"].items()} == {"x": (2, 0.5), "y": (2, 0.75), "s": (2, 0.5)}
    assert {k: (v["pairs"], v["accuracy"]["mean"]) for k, v in told["by_bin"].items()} == {
        "chosen safe, rejected unsafe": (1, 1.0), "both safe": (1, 0.0), "both unsafe": (1, 1.0)}


def test_length_balance():
    """Longer chosen: rows 0 and 5 (right, wrong); shorter: rows 1 and 2 (wrong, right); equal lengths do not count."""
    told = evaluate(PAIRS, SCORES, LENGTHS)
    assert told["length_balanced_accuracy"]["mean"] == pytest.approx(0.5) and told["length_balanced_accuracy"]["n"] == 4
    assert told["longer_wins"] == pytest.approx((2 + 2 * 0.5) / 6)  # always choosing the longer would be right so often
    longer = evaluate(PAIRS, [[a, b] for a, b in LENGTHS], LENGTHS)  # a model that measures length
    assert longer["accuracy"]["mean"] == pytest.approx(told["longer_wins"]) and longer["length_balanced_accuracy"]["mean"] == 0.5


def test_calibration_against_a_slow_count():
    rng = random.Random(0)
    pairs = [pair(str(i)) for i in range(400)]
    scores = [[rng.gauss(1, 2), rng.gauss(0, 2)] for _ in pairs]
    told = evaluate(pairs, scores, [(1, 1)] * 400)
    bins = [[] for _ in range(10)]
    for c, r in scores:
        confidence = 1 / (1 + math.exp(-abs(c - r)))
        bins[min(int((confidence - 0.5) / 0.05), 9)].append((confidence, float(c > r)))
    expected = [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b), len(b)) for b in bins if b]
    assert [(r["confidence"], r["accuracy"], r["pairs"]) for r in told["calibration"]] == [pytest.approx(e) for e in expected]
    assert told["ece"] == pytest.approx(sum(n * abs(x - y) for x, y, n in expected) / 400)
    assert sum(told["histogram"]["chosen"]) == sum(told["histogram"]["rejected"]) == 400


def test_a_perfectly_calibrated_model_has_a_small_error_and_a_bold_one_a_large():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 1.5, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-np.abs(gaps)))
    signed = np.where(right, np.abs(gaps), -np.abs(gaps))
    from reward.evaluate import _calibration

    assert _calibration(signed)["ece"] < 0.01 < 0.1 < _calibration(3 * signed)["ece"]


def test_safety_figures_by_hand():
    """Labelled answers: 2.0 safe, -1.0 unsafe, 0.5 safe, 1.0 safe, 1.0 unsafe, -3.0 unsafe; logit(0.15) = -1.73."""
    raw, unsafe, groups = labelled(PAIRS, SCORES)
    assert raw.tolist() == [2.0, -1.0, 0.5, 1.0, 1.0, -3.0] and unsafe.tolist() == [False, True, False, False, True, True]
    assert len(set(groups)) == 2
    told = safety_figures(PAIRS, SCORES)
    assert told["unsafe_recall"] == pytest.approx(2 / 3)  # two of three below sigma 0.5
    assert told["at_0.15"] == {"precision": 1.0, "recall": pytest.approx(1 / 3), "flagged": 1}
    assert told["unsafe_recall_interval"]["n"] == 3 and told["threshold_precision_90"] is None  # fewer than five answers below it
    nothing = safety_figures([PAIRS[0]], [[5.0, 4.0]])["at_0.15"]
    assert nothing == {"precision": None, "recall": 0.0, "flagged": 0}


def test_without_both_labels_there_is_no_safety_figure():
    assert safety_figures(PAIRS[3:], SCORES[3:]) == {"unsafe_recall": None, "at_0.15": None, "threshold_precision_90": None}
    assert safety_figures([pair("a", safe=(True, True))], [[1.0, 2.0]])["unsafe_recall"] is None


def slow_threshold(raw, unsafe, precision, least):
    """Every cut between two neighbouring scores, from the highest down."""
    order = sorted(zip(raw, unsafe, strict=True), key=lambda x: x[0])
    for i in range(len(order) - 1, 0, -1):
        below = [u for _, u in order[:i]]
        if order[i - 1][0] < order[i][0] and len(below) >= least and sum(below) / len(below) >= precision:
            return 1 / (1 + math.exp(-(order[i - 1][0] + order[i][0]) / 2))
    return None


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("decimals", [1, 6])
def test_the_threshold_of_a_precision_against_a_slow_search(seed, decimals):
    rng = np.random.default_rng(seed)
    unsafe = rng.random(60) < 0.4
    raw = np.round(rng.normal(0, 1, 60) - 1.5 * unsafe, decimals)  # few decimals: many ties
    for precision in (0.6, 0.9):
        for least in (1, 5):
            got = precision_threshold(raw, unsafe, precision, least)
            expected = slow_threshold(raw.tolist(), unsafe.tolist(), precision, least)
            assert got == (expected if expected is None else pytest.approx(expected))
            if got is not None:
                flagged = 1 / (1 + np.exp(-raw)) < got
                assert unsafe[flagged].mean() >= precision and flagged.sum() >= least


def test_no_pairs():
    assert evaluate([], [], []) == {"pairs": 0} and pair_rows("own", [], [], []) == []


def test_a_row_for_each_pair_says_what_its_figures_are_made_of():
    rows = pair_rows("own", PAIRS, SCORES, LENGTHS)
    assert [[r["chosen"], r["rejected"]] for r in rows] == SCORES and [r["margin"] for r in rows] == [3.0, -0.5, 4.0, 0.0, 0.5, -3.0]
    assert [r["longer"] for r in rows] == ["chosen", "rejected", "rejected", None, None, "chosen"] and {r["part"] for r in rows} == {"own"}
    assert [r["rating"] for r in rows] == ["significantly_better", "better", "better", "negligibly_better", "slightly_better", None]
    assert [(r["chosen_safe"], r["rejected_safe"]) for r in rows[:4]] == [(True, False), (True, True), (False, False), (None, None)]
    assert [r["source"] for r in rows] == ["x", "x", "y", "y", "s", "s"]
    right = [0.5 if r["margin"] == 0 else float(r["margin"] > 0) for r in rows]
    assert evaluate(PAIRS, SCORES, LENGTHS)["accuracy"] == interval(right, [r["prompt"] for r in rows])


def test_a_pair_has_one_key_whatever_a_model_says_of_it():
    """Two models' rows meet by key: the words, the rating and the labels make it, the scores and the data set do not."""
    def key(p, score=(0.0, 0.0), part="own"):
        return pair_rows(part, [p], [list(score)], [(1, 1)])[0]["key"]

    same = pair("a", 3, (True, False), "x")
    assert key(same) == key(same, (1.0, -1.0), "other") == key(pair("a", 3, (True, False), "y"))
    others = [pair("b", 3, (True, False)), pair("a", 2, (True, False)), pair("a", 3, (True, True)), pair("a", 3, (None, False))]
    others.append(Pair(same.prompt, same.rejected, same.chosen, 3, chosen_safe=True, rejected_safe=False))
    assert len({key(p) for p in [same, *others]}) == 6
