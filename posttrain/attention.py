"""Attention for short sequences on a CPU, registered with transformers as 'short_cpu'.

torch's CPU flash kernel is built for long sequences: at 64 to 256 bf16 tokens its backward pass costs more than the matrix products
it saves. Here the scores are made outright: float32 scores and softmax, probabilities in the input's dtype, the query heads of one
key/value head side by side in one product (so grouped keys are never repeated). A decoding step does the same. Longer sequences and
other dtypes go to transformers' sdpa function as they are.
"""

import torch
from torch import Tensor

NAME = "short_cpu"
LONGEST = 512  # tokens; scores of a layer are B * heads * T * T floats


def short_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
                    scaling: float | None = None, **kwargs) -> tuple[Tensor, None]:
    """query (B, H, T, d); key, value (B, G, T, d) with G dividing H; attention_mask None (causal) or bool (B, 1, T, T).
    Returns (B, T, H, d), as transformers' attention functions do."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    b, h, t, d = query.shape
    g = key.shape[1]
    if t == 1 and attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1:
        return _one_token(query, key, value, attention_mask, scaling or d ** -0.5), None
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if query.dtype != torch.bfloat16 or key.shape[2] != t or not 1 < t <= LONGEST or dropout or not boolean or kwargs.get("is_causal") is False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    q = query.reshape(b * g, h // g * t, d).float()
    k = key.reshape(b * g, t, d).float()
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1) if attention_mask is None else ~attention_mask
    if attention_mask is None:
        bias = torch.zeros(t, t).masked_fill_(hidden, float("-inf")).repeat(h // g, 1)[None]
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scaling or d ** -0.5)
    else:
        scores = torch.bmm(q * (scaling or d ** -0.5), k.transpose(1, 2)).view(b, h, t, t).masked_fill(hidden, float("-inf")).view(b * g, -1, t)
    out = torch.softmax(scores, dim=-1).to(value.dtype) @ value.reshape(b * g, t, d)
    return out.view(b, h, t, d).transpose(1, 2), None


def _one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """A decoding step: query (B, H, 1, d), key and value (B, G, T, d), mask bool (B, 1, 1, T). Returns (B, 1, H, d)."""
    b, h, _, d = query.shape
    g = key.shape[1]
    scores = torch.matmul(query.reshape(b, g, h // g, d), key.transpose(2, 3)).float().mul_(scaling)
    weights = torch.softmax(scores.masked_fill_(~mask, float("-inf")), dim=-1).to(value.dtype)
    return torch.matmul(weights, value).view(b, 1, h, d)


def register() -> str:
    """Make the function known to transformers, masks included; returns its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, short_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
