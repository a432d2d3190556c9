"""Log-probabilities, entropy, masked means and whitening against float64 definitions written out, and autograd as the reference."""

import math

import pytest
import torch

from posttrain import tensors
from posttrain.tensors import masked_mean, token_entropy, token_logprobs, unflatten, whiten

N, D, V = 11, 8, 37


def data(dtype=torch.float32, n=N, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, D, generator=g) * scale).to(dtype)
    weight = torch.randn(V, D, generator=g).to(dtype)
    return hidden, weight, torch.randint(0, V, (n,), generator=g), torch.randn(n, generator=g)


def oracle(hidden, weight, targets, cotangent, temperature):
    """log softmax in float64, and the gradients of cotangent . logprobs by autograd."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax(h @ w.t() / temperature, -1)[torch.arange(len(targets)), targets]
    (logp * cotangent.double()).sum().backward()
    return logp.detach(), h.grad, w.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("chunk", [1, 4, N - 1, N, N + 1, 1024])
def test_token_logprobs_and_gradients_are_log_softmax_in_float64(monkeypatch, chunk, temperature):
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    hidden, weight, targets, cotangent = data()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    got = token_logprobs(h, w, targets, temperature)
    (got * cotangent).sum().backward()
    logp, grad_h, grad_w = oracle(hidden, weight, targets, cotangent, temperature)
    assert got.dtype == torch.float32
    for a, b in ((got, logp), (h.grad, grad_h), (w.grad, grad_w)):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


def test_a_value_by_hand():
    """Two words with logits 0 and ln 3: probabilities 1/4 and 3/4; at temperature 1/2 they are 1/10 and 9/10."""
    hidden, weight, targets = torch.tensor([[1.0]]).repeat(2, 1), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([0, 1])
    torch.testing.assert_close(token_logprobs(hidden, weight, targets).exp(), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(token_logprobs(hidden, weight, targets, 0.5).exp(), torch.tensor([0.1, 0.9]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_rounds_the_logits_and_nothing_after(temperature):
    """The model's own head gives bf16 logits; from there on everything is float32, so the oracle starts from the rounded logits."""
    hidden, weight, targets, cotangent = data(torch.bfloat16, n=40)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    got = token_logprobs(h, w, targets, temperature)
    (got * cotangent).sum().backward()
    logits = (hidden @ weight.t()).double()
    expected = torch.log_softmax(logits / temperature, -1)[torch.arange(40), targets]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    _, grad_h, grad_w = oracle(hidden, weight, targets, cotangent, temperature)
    assert h.grad.dtype == w.grad.dtype == torch.bfloat16
    for a, b in ((h.grad, grad_h), (w.grad, grad_w)):  # bf16 has 8 bits: 2^-8 of the largest entry, a few roundings deep
        assert (a.double() - b).abs().max() < 0.02 * b.abs().max()


def test_only_the_gradients_that_are_wanted_are_made():
    hidden, weight, targets, _ = data()
    h = hidden.requires_grad_()
    token_logprobs(h, weight, targets).sum().backward()
    assert h.grad is not None and weight.grad is None
    w = weight.clone().requires_grad_()
    token_logprobs(hidden.detach(), w, targets).sum().backward()
    assert w.grad is not None


def test_gradcheck_by_finite_differences(monkeypatch):
    """Independent of autograd: central differences of the float64 definition."""
    monkeypatch.setattr(tensors, "CHUNK", 2)
    hidden, weight, targets, cotangent = data(n=3)
    h = hidden.clone().requires_grad_()
    (token_logprobs(h, weight, targets, 1.3) * cotangent[:3]).sum().backward()

    def value(x):
        logits = x @ weight.double().t() / 1.3
        return sum(cotangent[n].item() * (logits[n, targets[n]] - logits[n].exp().sum().log()).item() for n in range(3))

    for n in range(3):
        for k in range(D):
            step = torch.zeros(3, D, dtype=torch.float64)
            step[n, k] = 1e-5
            numeric = (value(hidden.double() + step) - value(hidden.double() - step)) / 2e-5
            assert h.grad[n, k].item() == pytest.approx(numeric, rel=1e-3, abs=1e-5)


def test_large_logits_stay_finite():
    hidden, weight, targets, _ = data(scale=300.0)
    h = hidden.clone().requires_grad_()
    got = token_logprobs(h, weight, targets)
    got.sum().backward()
    logits = hidden.double() @ weight.double().t()
    expected = torch.log_softmax(logits, -1)[torch.arange(N), targets]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.isfinite(h.grad).all()


def test_no_target_gives_an_empty_result_and_zero_gradients():
    hidden, weight, _, _ = data(n=0)
    w = weight.clone().requires_grad_()
    got = token_logprobs(hidden, w, torch.zeros(0, dtype=torch.long))
    got.sum().backward()
    assert got.shape == (0,) and not w.grad.any()
    assert token_entropy(hidden, weight).shape == (0,)


def test_autocast_reaches_the_backward_pass():
    """backward() runs outside the caller's autocast: softmax made again in float32 would not fit the log-sum-exp of bf16 logits."""
    hidden, weight, targets, _ = data(n=64, scale=4.0)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_logprobs(h, w, targets).sum()
    loss.backward()
    h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(h2, w2).float()
        reference = torch.log_softmax(logits, -1)[torch.arange(64), targets].sum()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert (h.grad - h2.grad).abs().max() < 0.02 * h2.grad.abs().max()
    assert (w.grad - w2.grad).abs().max() < 0.02 * w2.grad.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_in_float64(monkeypatch, temperature):
    monkeypatch.setattr(tensors, "CHUNK", 3)
    hidden, weight, _, _ = data()
    p = torch.softmax(hidden.double() @ weight.double().t() / temperature, -1)
    torch.testing.assert_close(token_entropy(hidden, weight, temperature).double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)


def test_masked_mean_and_whiten_by_hand():
    x = torch.tensor([[1.0, 2.0, 100.0], [3.0, 6.0, -50.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert masked_mean(x, mask).item() == 3.0  # (1 + 2 + 3 + 6) / 4
    deviation = math.sqrt((4 + 1 + 0 + 9) / 4)
    expected = torch.tensor([[-2, -1, 0], [0, 3, 0]]) / deviation
    torch.testing.assert_close(whiten(x, mask), expected)
    assert whiten(x[:, :2]).mean().abs() < 1e-6 and whiten(x[:, :2]).var(unbiased=False).item() == pytest.approx(1)
    assert not whiten(torch.full((4,), 7.0)).any()
    with pytest.raises(ValueError, match="counts nothing"):
        masked_mean(x, torch.zeros_like(mask))


def test_unflatten_puts_every_value_in_its_place_and_keeps_gradients():
    flat = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = unflatten(flat, torch.tensor([0, 2, 2]), torch.tensor([1, 0, 2]), 3, 3)
    assert out.tolist() == [[0, 1, 0], [0, 0, 0], [2, 0, 3]]
    (out * torch.arange(9.0).view(3, 3)).sum().backward()
    assert flat.grad.tolist() == [1, 6, 8]
