"""The reward models' losses, term by term (paper Eq. 2, Table 27, appendix A.3.4). Pure: torch and nothing else."""

import torch.nn.functional as F
from torch import Tensor

MARGINS = {  # by rating: 3 significantly better, 2 better, 1 slightly better, 0 negligibly better or unsure
    "small": (0.0, 1 / 3, 2 / 3, 1.0),
    "large": (0.0, 1.0, 2.0, 3.0),
    "none": (0.0, 0.0, 0.0, 0.0),
}


def margin(rating: int | None, kind: str) -> float:
    """m(rating) of Table 27; 0 for an unrated pair (method.md 10.11)."""
    return 0.0 if rating is None else MARGINS[kind][rating]


def ranking(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(r_c - r_r - m) of every pair (paper Eq. 2). All (B,), raw scores; returns (B,)."""
    if not chosen.shape == rejected.shape == margins.shape:  # (B, 1) minus (B,) would silently mix all pairs
        raise ValueError(f"shapes differ: {tuple(chosen.shape)}, {tuple(rejected.shape)}, {tuple(margins.shape)}")
    return F.softplus(-(chosen - rejected - margins))


def safety(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of sigma(score) against 'safe' for labelled answers, 0 for others (method.md 3.2; lambda outside).

    scores (S,) raw; labels (S,): 1 safe, 0 unsafe, -1 unlabelled. Returns (S,).
    """
    known = labels >= 0
    return F.binary_cross_entropy_with_logits(scores, labels.clamp_min(0).to(scores), reduction="none") * known
