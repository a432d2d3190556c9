"""The reward PPO maximises, before the KL term (paper Eq. 3-4): R~_c = WHITEN(LOGIT(R_c)). Pure: torch and nothing else.

LOGIT(sigma(r)) = r, so the reward models' raw scalars are used and no sigmoid is ever computed (method.md 4.2, 10.2).
"""

import torch
from torch import Tensor

PAPER_THRESHOLD = -1.7346010553881064  # logit(0.15)


def merge(safety: Tensor, helpfulness: Tensor, is_safety: Tensor, threshold: float = PAPER_THRESHOLD) -> tuple[Tensor, Tensor]:
    """R_c: the safety score where the prompt is tagged or R_s is below the threshold, else the helpfulness score.

    safety, helpfulness (B,) raw scores; is_safety (B,) bool; threshold on the raw scale. Returns (merged (B,), by_threshold (B,)
    bool: routed to safety by the threshold alone).
    """
    low = safety < threshold
    return torch.where(is_safety | low, safety, helpfulness), low & ~is_safety


def whiten_scores(scores: Tensor, eps: float = 1e-8) -> Tensor:
    """(B,) -> zero mean, unit (population) variance over the whole PPO batch (method.md 10.1 a)."""
    mean = scores.mean()
    return (scores - mean) * torch.rsqrt(((scores - mean) ** 2).mean() + eps)


def update_moments(moments: tuple[float, float, float], scores: Tensor) -> tuple[float, float, float]:
    """Running (count, mean, sum of squared deviations) after these scores (Chan et al.; method.md 10.1 b)."""
    n0, mean0, m0 = moments
    n1, mean1 = len(scores), scores.double().mean().item()
    m1 = ((scores.double() - mean1) ** 2).sum().item()
    n, gap = n0 + n1, mean1 - mean0
    return n, mean0 + gap * n1 / n, m0 + m1 + gap * gap * n0 * n1 / n


def whiten_running(scores: Tensor, moments: tuple[float, float, float], eps: float = 1e-8) -> Tensor:
    """Scores (B,) against the running moments, for batches too small to whiten by themselves."""
    n, mean, m = moments
    return (scores - mean) / (m / n + eps) ** 0.5


def cap_unfinished(whitened: Tensor, finished: Tensor, ceiling: float = -1.0) -> Tensor:
    """An answer that was cut off scores at most `ceiling` on the whitened scale (method.md 10.9)."""
    return torch.where(finished, whitened, whitened.clamp_max(ceiling))
