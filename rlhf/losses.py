"""PPO's losses per token (Schulman et al. 2017, Eq. 7; the value clip as in its public implementation). Pure: torch alone.

All arguments flat (N,), one number per counted token; the caller sums and divides by the mini-batch's token count, so that the
split into micro-batches changes nothing.
"""

import torch
from torch import Tensor


def policy(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """-min(ratio * A, clip(ratio, 1 - c, 1 + c) * A). Returns (loss (N,), ratio (N,), clipped (N,) bool)."""
    ratio = torch.exp(logprobs - old_logprobs)
    plain, cut = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain, cut), ratio.detach(), (cut > plain).detach()


def value(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> tuple[Tensor, Tensor]:
    """0.5 * max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2); c None: 0.5 * (v - R)^2. Returns (loss (N,), clipped (N,) bool)."""
    clip_range = float("inf") if clip_range is None else clip_range
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    plain, cut = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(plain, cut), (cut > plain).detach()
