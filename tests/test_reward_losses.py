"""The reward models' losses against numbers worked out by hand, float64 definitions and TRL's own line."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from reward import losses


def test_margins_are_table_27():
    table = {3: (1, 3), 2: (2 / 3, 2), 1: (1 / 3, 1), 0: (0, 0), None: (0, 0)}
    for rating, (small, large) in table.items():
        assert losses.margin(rating, "small") == pytest.approx(small) and losses.margin(rating, "large") == large
        assert losses.margin(rating, "none") == 0
    from posttrain.formats import RATINGS

    names = ("significantly_better", "better", "slightly_better", "negligibly_better")
    assert [losses.margin(RATINGS[n], "large") for n in names] == [3, 2, 1, 0]


@pytest.mark.parametrize("chosen, rejected, margin, expected", [
    (0.0, 0.0, 0.0, math.log(2)),  # a coin toss
    (math.log(3), 0.0, 0.0, math.log(4 / 3)),  # sigmoid(ln 3) = 3/4
    (1 + math.log(3), 0.0, 1.0, math.log(4 / 3)),  # the margin takes its part of the gap
    (0.0, 0.0, math.log(3), math.log(4)),  # sigmoid(-ln 3) = 1/4
    (0.0, 1000.0, 3.0, 1003.0), (1000.0, 0.0, 3.0, 0.0)])  # no overflow at either end
def test_ranking_by_hand(chosen, rejected, margin, expected):
    got = losses.ranking(*(torch.tensor([x]) for x in (chosen, rejected, margin)))
    assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_ranking_is_trl_s_formula_row_by_row():
    """trl's RewardTrainer: -logsigmoid(rewards_chosen - rewards_rejected - margin).mean()."""
    from trl import RewardTrainer

    source = inspect.getsource(RewardTrainer.compute_loss)
    assert "logsigmoid(rewards_chosen - rewards_rejected - inputs[\"margin\"])" in source  # where this test's reference comes from
    g = torch.Generator().manual_seed(0)
    chosen, rejected, margins = (torch.randn(64, generator=g) * 3 for _ in range(3))
    ours = losses.ranking(chosen, rejected, margins)
    assert ours.shape == (64,)
    torch.testing.assert_close(ours.mean(), -F.logsigmoid(chosen - rejected - margins).mean())
    rows = zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True)
    slow = [-math.log(1 / (1 + math.exp(-(c - r - m)))) for c, r, m in rows]
    assert ours.tolist() == pytest.approx(slow, rel=1e-5)


def test_a_column_of_scores_is_refused_instead_of_mixing_all_pairs():
    """(B, 1) minus (B,) broadcasts to (B, B): ms-swift#9927 trained on that for months."""
    chosen, rejected, margins = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])
    wrong = F.softplus(-(chosen[:, None] - rejected[:, None] - margins))
    assert wrong.shape == (2, 2)  # the trap
    for args in ((chosen[:, None], rejected[:, None], margins), (chosen, rejected, margins[:, None]), (chosen, rejected[:1], margins)):
        with pytest.raises(ValueError, match="shapes differ"):
            losses.ranking(*args)


def test_the_gradient_of_the_ranking_loss_by_hand():
    """d/dr_c = -sigmoid(-(r_c - r_r - m)), d/dr_r its negative."""
    chosen, rejected = torch.tensor([0.3, -2.0], requires_grad=True), torch.tensor([0.1, 1.0], requires_grad=True)
    losses.ranking(chosen, rejected, torch.tensor([1.0, 0.0])).sum().backward()
    expected = [-1 / (1 + math.exp(0.3 - 0.1 - 1.0)), -1 / (1 + math.exp(-2.0 - 1.0))]
    assert chosen.grad.tolist() == pytest.approx(expected, rel=1e-5)
    assert rejected.grad.tolist() == pytest.approx([-x for x in expected], rel=1e-5)


def test_safety_loss_by_hand():
    """safe: -ln sigmoid(s); unsafe: -ln(1 - sigmoid(s)); unlabelled: nothing, and no gradient."""
    scores = torch.tensor([0.0, math.log(3), math.log(3), -40.0, 7.0], requires_grad=True)
    got = losses.safety(scores, torch.tensor([1, 1, 0, 1, -1]))
    assert got.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4), 40.0, 0.0], rel=1e-6)
    got.sum().backward()
    assert scores.grad.tolist() == pytest.approx([-0.5, -0.25, 0.75, -1.0, 0.0], rel=1e-6)  # sigmoid(s) - label


def test_every_clear_pair_of_a_safety_bin_pulls_its_own_way():
    """Bin 1 (safe, unsafe), bin 2 (safe, safe), bin 3 (unsafe, unsafe): the signs of the gradient."""
    labels = torch.tensor([[1, 0], [1, 1], [0, 0]])
    scores = torch.zeros(3, 2, requires_grad=True)
    losses.safety(scores.flatten(), labels.flatten()).sum().backward()
    assert torch.equal(scores.grad.sign(), 1.0 - 2.0 * labels)
