"""PPO's losses in every clip quadrant by hand, with gradients, and against plain Python and finite differences."""

import math

import pytest
import torch

from rlhf import losses

CLIP = 0.2

# ratio, advantage -> loss, d loss / d log-probability, clipped. Loss = -min(r A, clip(r) A); its gradient is -r A where r A is the
# smaller one, else 0.
POLICY = [
    (1.5, 2.0, -2.4, 0.0, True),  # above the range, good: the clipped 1.2 * 2 is less than 3
    (1.5, -2.0, 3.0, 3.0, False),  # above the range, bad: the full penalty, and a gradient back
    (0.5, 2.0, -1.0, -1.0, False),  # below the range, good: the full loss, and a gradient back
    (0.5, -2.0, 1.6, 0.0, True),  # below the range, bad: 0.8 * 2, no further push
    (1.1, 2.0, -2.2, -2.2, False),  # inside: plain policy gradient
    (0.9, -2.0, 1.8, 1.8, False),
    (1.0, 3.0, -3.0, -3.0, False),  # the first step of every iteration
    (1.0, -3.0, 3.0, 3.0, False),
    (1.5, 0.0, 0.0, 0.0, False),
]

# value, old value, return -> loss, d loss / d value, clipped. Loss = max((v - R)^2, (clip(v) - R)^2) / 2 with v kept within 0.2 of old.
VALUE = [
    (0.5, 0.0, 1.0, 0.32, 0.0, True),  # above the range, return further up: (0.2 - 1)^2 / 2 is larger, no gradient
    (0.5, 0.0, -1.0, 1.125, 1.5, False),  # above, return below: (0.5 + 1)^2 / 2, pulled back
    (-0.5, 0.0, 1.0, 1.125, -1.5, False),  # below, return above
    (-0.5, 0.0, -1.0, 0.32, 0.0, True),  # below, return further down
    (0.1, 0.0, 1.0, 0.405, -0.9, False),  # inside
    (-0.1, 0.0, -1.0, 0.405, 0.9, False),
    (2.0, 1.9, 2.0, 0.0, 0.0, False),  # a perfect value
    (0.5, 0.0, 0.3, 0.02, 0.2, False),  # the return lies between clip and value: 0.2^2 / 2 against 0.1^2 / 2
]


def gradient_of(loss, x) -> list[float]:
    loss.sum().backward()
    return x.grad.tolist()


@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped", POLICY)
def test_policy_loss_by_hand(ratio, advantage, loss, gradient, clipped):
    old = torch.tensor([-1.3], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    got, r, cut = losses.policy(logprobs, old, torch.tensor([advantage], dtype=torch.float64), CLIP)
    assert got.item() == pytest.approx(loss, abs=1e-12) and r.item() == pytest.approx(ratio) and cut.item() is clipped
    assert not r.requires_grad and not cut.requires_grad
    assert gradient_of(got, logprobs)[0] == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("value, old, target, loss, gradient, clipped", VALUE)
def test_value_loss_by_hand(value, old, target, loss, gradient, clipped):
    v, o, r = (torch.tensor([x], dtype=torch.float64) for x in (value, old, target))
    got, cut = losses.value(v.requires_grad_(), o, r, CLIP)
    assert got.item() == pytest.approx(loss, abs=1e-12) and cut.item() is clipped and not cut.requires_grad
    assert gradient_of(got, v)[0] == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.5])
def test_both_losses_in_plain_python_and_by_finite_differences(clip):
    g = torch.Generator().manual_seed(0)
    x, old, target = (torch.randn(200, generator=g, dtype=torch.float64) for _ in range(3))

    def policy(lp, o, a):
        r = math.exp(lp - o)
        return -min(r * a, min(max(r, 1 - clip), 1 + clip) * a)

    def value(v, o, r):
        return max((v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2) / 2

    for loss, plain in ((losses.policy, policy), (losses.value, value)):
        at = x.clone().requires_grad_()
        got = loss(at, old, target, clip)[0]
        rows = list(zip(x.tolist(), old.tolist(), target.tolist(), strict=True))
        assert got.tolist() == pytest.approx([plain(*row) for row in rows], abs=1e-12)
        numeric = [(plain(v + 1e-6, o, t) - plain(v - 1e-6, o, t)) / 2e-6 for v, o, t in rows]
        assert gradient_of(got, at) == pytest.approx(numeric, rel=1e-4, abs=1e-4)


def test_the_share_of_clipped_tokens_is_counted_where_the_clip_bites():
    """Outside the range half of the signs are clipped; inside none is."""
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.19, 0.81], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    clipped = losses.policy(ratios.log(), torch.zeros(6, dtype=torch.float64), signs, CLIP)[2]
    assert clipped.tolist() == [True, False, False, True, False, False]


def test_only_the_new_numbers_carry_gradients():
    old, target = torch.zeros(2, requires_grad=True), torch.ones(2)
    for loss in (losses.policy(torch.full((2,), 0.1, requires_grad=True), old.detach(), target, CLIP)[0],
                 losses.value(torch.full((2,), 0.1, requires_grad=True), old.detach(), target, CLIP)[0]):
        loss.sum().backward()
    assert old.grad is None and loss.shape == (2,)
