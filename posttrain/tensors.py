"""Pure tensor functions. They import torch and nothing else.

Axes: N counted tokens of a batch (flat), B samples, R response length, V vocabulary, d width.
"""

import torch
from torch import Tensor

CHUNK = 1024  # tokens whose logits exist at the same time


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / t)[target] without keeping the logits: the backward pass makes each chunk's again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        picked = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(picked)
        for i in range(0, len(targets), CHUNK):
            logits = _logits(hidden[i:i + CHUNK], weight, temperature)
            lse[i:i + CHUNK] = torch.logsumexp(logits, dim=-1)
            picked[i:i + CHUNK] = logits.gather(1, targets[i:i + CHUNK, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, lse)
        kind = hidden.device.type
        ctx.temperature, ctx.autocast = temperature, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return picked - lse

    @staticmethod
    def backward(ctx, grad):
        kind, dtype, on = ctx.autocast  # the backward pass runs outside the caller's autocast
        with torch.autocast(kind, dtype=dtype, enabled=on):
            return _TokenLogprobs._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx, grad):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i in range(0, len(targets), CHUNK):
            h, g = hidden[i:i + CHUNK], grad[i:i + CHUNK] / ctx.temperature
            d = _logits(h, weight, ctx.temperature).sub_(lse[i:i + CHUNK, None]).exp_().mul_(-g[:, None])
            d.scatter_add_(1, targets[i:i + CHUNK, None], g[:, None])
            if grad_hidden is not None:
                grad_hidden[i:i + CHUNK] = d.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight += d.t() @ h.float()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden.to(weight.dtype) @ weight.t()).float().div_(temperature)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target token, in nats.

    hidden (N, d): the states that predict the targets; weight (V, d): the vocabulary head; targets (N,) token ids.
    Returns (N,) float32. Softmax in float32. Differentiable in hidden and weight; peak memory is CHUNK * V floats.
    """
    return _TokenLogprobs.apply(hidden, weight, targets, float(temperature))


def token_entropy(hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution at each position, in nats. hidden (N, d) -> (N,). Not differentiable."""
    out = []
    with torch.no_grad():
        for i in range(0, len(hidden), CHUNK):
            logp = torch.log_softmax(_logits(hidden[i:i + CHUNK], weight, temperature), dim=-1)
            out.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(out) if out else hidden.new_zeros(0, dtype=torch.float32)


def token_kl(hidden: Tensor, weight: Tensor, other_hidden: Tensor, other_weight: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the next-token distribution to the other one at each position, over the whole vocabulary, in nats. hidden (N, d), weight (V, d), the
    other's of any width -> (N,). Not differentiable."""
    out, step = [], CHUNK // 4  # four tables of logits exist at the same time
    with torch.no_grad():
        for i in range(0, len(hidden), step):
            p, q = (torch.log_softmax(_logits(h[i:i + step], w, temperature), dim=-1) for h, w in ((hidden, weight), (other_hidden, other_weight)))
            out.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(out) if out else hidden.new_zeros(0, dtype=torch.float32)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True; both of the same shape. The mask must count something."""
    if not mask.any():
        raise ValueError("masked_mean: the mask counts nothing")
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the counted entries (population variance); others become 0.

    The paper whitens the merged scores over the whole PPO batch before the KL term (section 3.2.3; method.md 10.1 a).
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(var + eps) * mask


def unflatten(flat: Tensor, owner: Tensor, slot: Tensor, rows: int, width: int) -> Tensor:
    """Scatter per-token values (N,) to (rows, width): value n goes to [owner[n], slot[n]]; the rest is 0."""
    out = flat.new_zeros(rows, width)
    return out.index_put((owner, slot), flat)
