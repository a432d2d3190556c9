"""The gate and the whitening against the paper's own form (Eq. 3-4, in probabilities) and figures worked out by hand."""

import math
import statistics

import pytest
import torch

from rlhf import gate


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_the_paper(rs: float, rh: float, tagged: bool, threshold: float) -> float:
    """LOGIT(R_c) with R_c = sigma(R_s) if the prompt is tagged or sigma(R_s) < threshold, else sigma(R_h)."""
    r = sigmoid(rs) if tagged or sigmoid(rs) < threshold else sigmoid(rh)
    return math.log(r / (1 - r))


# -- the gate ----------------------------------------------------------------------------------------------------------------------


def test_the_papers_threshold_is_the_logit_of_015():
    assert math.log(0.15 / 0.85) == pytest.approx(gate.PAPER_THRESHOLD, abs=1e-15)
    assert sigmoid(gate.PAPER_THRESHOLD) == pytest.approx(0.15, abs=1e-15)
    assert round(gate.PAPER_THRESHOLD, 4) == -1.7346


@pytest.mark.parametrize("share", [0.15, 0.02, 0.5, 0.9])
def test_raw_scores_give_what_the_probability_form_gives(share):
    g = torch.Generator().manual_seed(int(share * 100))
    rs, rh = torch.randn(400, generator=g) * 3, torch.randn(400, generator=g) * 3
    tagged = torch.rand(400, generator=g) < 0.3
    merged, by_threshold = gate.merge(rs, rh, tagged, math.log(share / (1 - share)))
    rows = list(zip(rs.tolist(), rh.tolist(), tagged.tolist(), strict=True))
    assert merged.tolist() == pytest.approx([by_the_paper(*row, share) for row in rows], abs=1e-6)
    assert by_threshold.tolist() == [sigmoid(s) < share and not t for s, _, t in rows]
    assert {(s < math.log(share / (1 - share)), t) for s, _, t in rows} == {(a, b) for a in (False, True) for b in (False, True)}


def test_the_four_cases_by_hand():
    """low and tagged, low, tagged, neither: safety, safety, safety, helpfulness; only the second is routed by the threshold alone."""
    rs, rh = torch.tensor([-2.0, -2.0, 1.5, 1.5]), torch.tensor([9.0, 8.0, 7.0, 6.0])
    merged, by_threshold = gate.merge(rs, rh, torch.tensor([True, False, True, False]))
    assert merged.tolist() == [-2.0, -2.0, 1.5, 6.0]
    assert by_threshold.tolist() == [False, True, False, False]


@pytest.mark.parametrize("threshold", [0.0, -0.5, -1.75])
def test_a_score_on_the_threshold_is_not_below_it(threshold):
    at = torch.tensor(threshold)
    scores = torch.stack([at, torch.nextafter(at, torch.tensor(-math.inf)), torch.nextafter(at, torch.tensor(math.inf))])
    merged, by_threshold = gate.merge(scores, torch.full((3,), 5.0), torch.zeros(3, dtype=torch.bool), threshold)
    assert by_threshold.tolist() == [False, True, False]
    assert merged.tolist() == [5.0, scores[1].item(), 5.0]


def test_routing_by_tag_and_by_threshold_never_counts_an_answer_twice():
    g = torch.Generator().manual_seed(5)
    rs, tagged = torch.randn(300, generator=g) - 1, torch.rand(300, generator=g) < 0.4
    merged, by_threshold = gate.merge(rs, torch.full((300,), 99.0), tagged)
    routed = sum(x != 99.0 for x in merged.tolist())
    assert not (by_threshold & tagged).any() and 0 < int(by_threshold.sum()) < int(tagged.sum())
    assert routed == int(by_threshold.sum()) + int(tagged.sum())


def test_the_gate_takes_any_shape():
    rs, rh = torch.tensor([[-3.0, 1.0], [0.0, -2.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tagged = torch.tensor([[False, False], [True, True]])
    merged, by_threshold = gate.merge(rs, rh, tagged)
    assert merged.tolist() == [[-3.0, 2.0], [0.0, -2.0]] and by_threshold.tolist() == [[True, False], [False, False]]


# -- whitening ---------------------------------------------------------------------------------------------------------------------


def test_whitening_by_hand():
    """Mean 3, deviations -2 -1 0 3, population variance 14/4."""
    got = gate.whiten_scores(torch.tensor([1.0, 2.0, 3.0, 6.0])).tolist()
    assert got == pytest.approx([d / math.sqrt(3.5) for d in (-2, -1, 0, 3)], abs=1e-6)


def test_whitened_scores_have_no_mean_and_a_population_variance_of_one_whatever_the_scale():
    x = torch.randn(128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for scale, shift in ((1.0, 0.0), (20.0, -7.0), (0.1, 300.0)):
        got = gate.whiten_scores(x * scale + shift).tolist()
        assert statistics.fmean(got) == pytest.approx(0, abs=1e-9)
        assert statistics.pvariance(got) == pytest.approx(1, abs=1e-5)
        assert got == pytest.approx(gate.whiten_scores(x).tolist(), abs=1e-5)


def test_equal_scores_whiten_to_zero():
    assert gate.whiten_scores(torch.full((7,), 2.5)).tolist() == [0.0] * 7
    moments = gate.update_moments((0, 0.0, 0.0), torch.full((7,), 2.5))
    assert gate.whiten_running(torch.full((7,), 2.5), moments).tolist() == [0.0] * 7


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_running_moments_equal_those_of_everything_at_once(shift):
    """In any pieces, one score included; also where a sum of squares would lose every digit (deviation 1 around a million)."""
    g = torch.Generator().manual_seed(2)
    pieces = [torch.randn(n, generator=g, dtype=torch.float64) + shift for n in (16, 1, 5, 64, 2)]
    moments, seen = (0, 0.0, 0.0), []
    for piece in pieces:
        moments = gate.update_moments(moments, piece)
        seen += piece.tolist()
        assert moments[0] == len(seen)
        assert moments[1] == pytest.approx(statistics.fmean(seen), rel=1e-14, abs=1e-14)
        assert moments[2] / moments[0] == pytest.approx(statistics.pvariance(seen), rel=1e-8)
    got = gate.whiten_running(pieces[-1], moments).tolist()
    mean, deviation = statistics.fmean(seen), statistics.pstdev(seen)
    assert got == pytest.approx([(x - mean) / deviation for x in pieces[-1].tolist()], abs=1e-6)


def test_the_first_running_batch_is_whitened_as_a_batch_and_later_ones_keep_their_level():
    first, better = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([10.0, 12.0, 14.0])
    moments = gate.update_moments((0, 0.0, 0.0), first)
    assert gate.whiten_running(first, moments).tolist() == pytest.approx(gate.whiten_scores(first).tolist(), abs=1e-6)
    moments = gate.update_moments(moments, better)  # mean 7, variance (49+25+9+9+25+49)/6
    assert gate.whiten_running(better, moments).tolist() == pytest.approx([d / math.sqrt(166 / 6) for d in (3, 5, 7)], abs=1e-6)
    assert gate.whiten_scores(better).mean().abs() < 1e-6  # a batch's own statistics would hide the rise


def test_unfinished_answers_get_at_most_the_ceiling():
    whitened = torch.tensor([2.0, 2.0, -3.0, -3.0, -1.0])
    finished = torch.tensor([True, False, True, False, False])
    assert gate.cap_unfinished(whitened, finished).tolist() == [2.0, -1.0, -3.0, -3.0, -1.0]
    assert gate.cap_unfinished(whitened, finished, ceiling=0.5).tolist() == [2.0, 0.5, -3.0, -3.0, -1.0]
