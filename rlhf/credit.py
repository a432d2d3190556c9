"""From a score per answer to an advantage per token. Pure: torch and nothing else. The KL penalty enters here, once.

Shapes: (B, R) with response_mask True on generated tokens, the end token included; scores (B,).
"""

import torch
from torch import Tensor

ESTIMATORS = {  # of a token's KL from x = log policy - log reference; k1 and k3 are unbiased (Schulman, "Approximating KL Divergence")
    "k1": lambda x: x, "abs": torch.abs, "k2": lambda x: x * x / 2, "k3": lambda x: torch.expm1(-x) + x}


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float,
                  estimator: str = "k1") -> tuple[Tensor, Tensor]:
    """-beta * KL on every token and the score on the last (method.md 10.4, 10.9). Returns (rewards (B, R), sequence KL (B,) in nats).

    With k1 and gamma = 1 the token terms add up to the sequence penalty of paper Eq. 4. The sequence KL is k1's whatever is paid for.
    """
    kl = (logprobs - ref_logprobs) * response_mask
    last = response_mask.size(1) - 1 - response_mask.int().flip(1).argmax(1)
    rewards = -kl_coef * ESTIMATORS[estimator](kl)
    return rewards.index_put((torch.arange(len(scores), device=scores.device), last), scores.to(rewards), accumulate=True), kl.sum(1)


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, Eq. 16) over the counted tokens. Returns (advantages, returns), (B, R)."""
    advantages = torch.zeros_like(rewards)
    running, next_value = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.size(1))):
        on = response_mask[:, t]
        here = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running
        running, next_value = torch.where(on, here, running), torch.where(on, values[:, t], next_value)
        advantages[:, t] = here * on
    return advantages, (advantages + values) * response_mask


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the counted tokens; 0 for returns without variance."""
    r, v = returns[response_mask], values[response_mask]
    var = r.var(unbiased=False)
    return 0.0 if var == 0 else (1 - (r - v).var(unbiased=False) / var).item()
