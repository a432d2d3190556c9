"""Token rewards and advantages against definitions written out: plain Python loops in float64 over the counted tokens alone."""

import math
import statistics

import pytest
import torch

from rlhf import credit

JUNK = (1e3, -7e2, 5e2)  # stands wherever the mask says that nothing counts, another number in every tensor


def example(seed=0, rows=6, width=9, holes=False):
    """Random (rewards or log-probabilities, values, mask) with answers of every length, and junk outside the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for i in range(rows):
        mask[i, :1 + (i * 5 + seed) % width] = True
    mask[0, :] = True
    if holes:  # tokens in the middle that do not count
        mask[0, 3] = mask[0, 4] = mask[3, 1] = False
    a, b, c = (torch.randn(rows, width, generator=g, dtype=torch.float64) for _ in range(3))
    return [x.masked_fill(~mask, junk) for x, junk in zip((a, b, c), JUNK, strict=True)], mask


def counted(x, mask) -> list[list[float]]:
    return [[v for v, on in zip(row, flags, strict=True) if on] for row, flags in zip(x.tolist(), mask.tolist(), strict=True)]


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, Eq. 16: A_t = sum of (gamma lam)^l delta_{t+l}; delta_t = r_t + gamma V_{t+1} - V_t, V = 0 at the end."""
    v = [*values, 0.0]
    out = []
    for t in range(len(rewards)):
        total = 0.0
        for step in range(len(rewards) - t):
            total += (gamma * lam) ** step * (rewards[t + step] + gamma * v[t + step + 1] - v[t + step])
        out.append(total)
    return out


# -- token rewards -----------------------------------------------------------------------------------------------------------------


def test_token_rewards_by_hand():
    """beta 1/2. First answer: gaps 1, -2 -> rewards -0.5, 1 + score 3. Second: one token, gap 0.5 -> -0.25 + score -1."""
    logprobs = torch.tensor([[-1.0, -3.0, 0.0], [-0.5, 0.0, 0.0]])
    reference = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards, kl = credit.token_rewards(torch.tensor([3.0, -1.0]), logprobs, reference, mask, 0.5)
    assert rewards.tolist() == [[-0.5, 4.0, 0.0], [-1.25, 0.0, 0.0]]
    assert kl.tolist() == [-1.0, 0.5]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.7])
def test_token_rewards_add_up_to_the_score_less_beta_times_the_kl(beta, holes):
    (logprobs, reference, _), mask = example(holes=holes)
    scores = torch.arange(6.0, dtype=torch.float64) - 2
    rewards, kl = credit.token_rewards(scores, logprobs, reference, mask, beta)
    for i, (lp, ref) in enumerate(zip(counted(logprobs, mask), counted(reference, mask), strict=True)):
        sequence = math.fsum(lp) - math.fsum(ref)  # log pi(answer) - log pi_0(answer)
        assert kl[i].item() == pytest.approx(sequence, abs=1e-9)
        assert rewards[i].sum().item() == pytest.approx(scores[i].item() - beta * sequence, abs=1e-9)
    assert not (rewards * ~mask).any()


@pytest.mark.parametrize("holes", [False, True])
def test_the_score_stands_on_the_last_counted_token_alone(holes):
    (logprobs, _, _), mask = example(holes=holes)
    rewards, _ = credit.token_rewards(torch.full((6,), 5.0, dtype=torch.float64), logprobs, logprobs, mask, 0.3)
    for i, flags in enumerate(mask.tolist()):
        last = max(t for t, on in enumerate(flags) if on)
        assert [(t, r) for t, r in enumerate(rewards[i].tolist()) if r] == [(last, 5.0)]


def test_a_token_the_policy_likes_more_than_the_reference_costs():
    one = torch.ones(1, 1, dtype=torch.bool)
    more, kl = credit.token_rewards(torch.zeros(1), torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), one, 0.1)
    less, _ = credit.token_rewards(torch.zeros(1), torch.tensor([[-3.0]]), torch.tensor([[-1.0]]), one, 0.1)
    assert more.item() == pytest.approx(-0.2) and kl.item() == 2.0 and less.item() == pytest.approx(0.2)


def test_token_rewards_leave_their_arguments_alone():
    (logprobs, reference, _), mask = example()
    before = [x.clone() for x in (logprobs, reference, mask)]
    credit.token_rewards(torch.ones(6), logprobs, reference, mask, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, (logprobs, reference, mask), strict=True))


# -- advantages --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.8), (0.99, 0.0), (1.0, 0.0)])
def test_gae_equals_its_definition(gamma, lam, holes):
    for seed in range(4):
        (rewards, values, _), mask = example(seed, holes=holes)
        advantages, returns = credit.gae(rewards, values, mask, gamma, lam)
        for i, (r, v) in enumerate(zip(counted(rewards, mask), counted(values, mask), strict=True)):
            expected = by_definition(r, v, gamma, lam)
            assert counted(advantages, mask)[i] == pytest.approx(expected, abs=1e-9)
            assert counted(returns, mask)[i] == pytest.approx([a + b for a, b in zip(expected, v, strict=True)], abs=1e-9)
        assert not (advantages * ~mask).any() and not (returns * ~mask).any()


def test_gae_by_hand():
    """gamma 1, lambda 1/2, rewards 1 2 3, values 1 1 2: deltas 1 3 1, advantages 1 + 3/2 + 1/4, 3 + 1/2, 1."""
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 1.0, 2.0]])
    advantages, returns = credit.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.5)
    assert advantages.tolist() == [[2.75, 3.5, 1.0]] and returns.tolist() == [[3.75, 4.5, 3.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_with_lambda_one_returns_are_the_rewards_to_go_whatever_the_values(gamma):
    (rewards, values, other), mask = example(3)
    _, returns = credit.gae(rewards, values, mask, gamma, 1.0)
    _, again = credit.gae(rewards, other, mask, gamma, 1.0)
    for i, r in enumerate(counted(rewards, mask)):
        to_go = [math.fsum(gamma ** (u - t) * r[u] for u in range(t, len(r))) for t in range(len(r))]
        assert counted(returns, mask)[i] == pytest.approx(to_go, abs=1e-9)
        assert counted(again, mask)[i] == pytest.approx(to_go, abs=1e-9)


def test_advantages_of_perfect_values_are_zero():
    (rewards, _, _), mask = example(2)
    values = torch.zeros_like(rewards)
    for i, r in enumerate(counted(rewards, mask)):
        values[i, :len(r)] = torch.tensor([math.fsum(r[t:]) for t in range(len(r))], dtype=torch.float64)
    for lam in (0.0, 0.95, 1.0):
        advantages, _ = credit.gae(rewards, values, mask, 1.0, lam)
        assert advantages.abs().max() < 1e-9


@pytest.mark.parametrize("holes", [False, True])
def test_batch_mates_and_padding_change_nothing(holes):
    (rewards, values, _), mask = example(1, holes=holes)
    advantages, returns = credit.gae(rewards, values, mask, 1.0, 0.95)
    scores = torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    shaped, _ = credit.token_rewards(scores, rewards, values, mask, 0.1)
    for i, flags in enumerate(mask.tolist()):
        n = 1 + max(t for t, on in enumerate(flags) if on)
        alone = (rewards[i:i + 1, :n], values[i:i + 1, :n], mask[i:i + 1, :n])
        a, r = credit.gae(*alone, 1.0, 0.95)
        assert torch.equal(a[0], advantages[i, :n]) and torch.equal(r[0], returns[i, :n])
        assert torch.equal(credit.token_rewards(scores[i:i + 1], *alone, 0.1)[0][0], shaped[i, :n])


def test_what_stands_outside_the_mask_is_never_read():
    (rewards, values, _), mask = example(2, holes=True)
    other = [x.masked_fill(~mask, -7.0) for x in (rewards, values)]
    for a, b in zip(credit.gae(rewards, values, mask, 1.0, 0.9), credit.gae(*other, mask, 1.0, 0.9), strict=True):
        assert torch.equal(a, b)


# -- explained variance --------------------------------------------------------------------------------------------------------------


def test_explained_variance_by_definition():
    (values, returns, _), mask = example(1, holes=True)
    v, r = ([x for row in counted(tensor, mask) for x in row] for tensor in (values, returns))
    expected = 1 - statistics.pvariance([a - b for a, b in zip(r, v, strict=True)]) / statistics.pvariance(r)
    assert credit.explained_variance(values, returns, mask) == pytest.approx(expected, abs=1e-9)


def test_explained_variance_of_known_critics():
    returns, mask = torch.tensor([[1.0, 2.0, 6.0, 1e3]]), torch.tensor([[True, True, True, False]])
    assert credit.explained_variance(returns, returns, mask) == 1.0
    assert credit.explained_variance(returns + 5, returns, mask) == pytest.approx(1.0)  # a constant error has no variance
    assert credit.explained_variance(torch.zeros_like(returns), returns, mask) == 0.0
    assert credit.explained_variance(returns / 2, returns, mask) == pytest.approx(0.75)  # half the error, a quarter of its variance
    assert credit.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert credit.explained_variance(returns, torch.ones_like(returns), mask) == 0.0  # nothing to explain
