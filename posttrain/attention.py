"""Attention for short sequences on a CPU, registered with transformers as 'short_cpu'.

torch's CPU flash kernel is built for long sequences: at 64 to 700 bf16 tokens its backward pass costs more than the matrix products
it saves. Here the scores are made outright, block of rows by block of rows, so that what the causal mask hides is hardly ever computed:
float32 scores and softmax, probabilities in the input's dtype, the query heads of one key/value head side by side in one product (so
grouped keys are never repeated). In a tree, a later answer's rows meet the prompt's keys and their own, never the other answers'. A
decoding step does the same for one row. Longer sequences and other dtypes go to transformers' sdpa function as they are.
"""

from functools import lru_cache

import torch
from torch import Tensor

NAME = "short_cpu"
LONGEST = 1024  # tokens; scores of a block are B * heads * BLOCK * T floats
BLOCK = 128  # rows whose scores are made at once
APART = 192  # tokens from which a batch's trees are taken one by one; shorter ones together, under their mask


def short_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
                    scaling: float | None = None, tree_spans=None, **kwargs) -> tuple[Tensor, None]:
    """query (B, H, T, d); key, value (B, G, T, d) with G dividing H; attention_mask None (causal) or bool (B, 1, T, T); tree_spans:
    for each row its answers' (start, end), where the mask says no more than that. Returns (B, T, H, d), as transformers' functions do."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    b, h, t, d = query.shape
    g, scaling = key.shape[1], scaling or d ** -0.5
    if t == 1 and attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1:
        return _one_token(query, key, value, attention_mask, scaling), None
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if query.dtype != torch.bfloat16 or key.shape[2] != t or not 1 < t <= LONGEST or dropout or not boolean or kwargs.get("is_causal") is False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    q = query.reshape(b * g, h // g, t, d).float() * scaling
    k, v = key.reshape(b * g, t, d).float(), value.reshape(b * g, t, d)
    if attention_mask is None:
        out = _causal(q, k, v)
    elif tree_spans is not None and t >= APART:
        rows = [slice(i * g, i * g + g) for i in range(b)]
        out = torch.cat([_tree(q[at], k[at], v[at], spans) for at, spans in zip(rows, tree_spans, strict=True)])
    else:
        scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2)).view(b, h, t, t).masked_fill(~attention_mask, float("-inf"))
        out = torch.softmax(scores, dim=-1).to(v.dtype).view(b * g, -1, t) @ v
    return out.reshape(b, h, t, d).transpose(1, 2), None


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, m, t, d), scaled: the last t positions of the keys' s; k, v (N, s, d). Returns (N, m, t, d)."""
    n, m, t, d = q.shape
    before, parts = k.shape[1] - t, []
    for start in range(0, t, BLOCK):
        rows = min(BLOCK, t - start)
        keys = before + start + rows
        scores = torch.baddbmm(_hidden(rows, keys, m), q[:, :, start:start + rows].reshape(n, m * rows, d), k[:, :keys].transpose(1, 2))
        parts.append((torch.softmax(scores, dim=-1).to(v.dtype) @ v[:, :keys]).view(n, m, rows, d))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@lru_cache(maxsize=256)
def _hidden(rows: int, keys: int, repeats: int) -> Tensor:
    """-inf where a row, the last of which sees all keys, may not look: (1, repeats * rows, keys)."""
    return torch.zeros(rows, keys).masked_fill_(torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1), float("-inf")).repeat(repeats, 1)[None]


def _tree(q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """One row: the prompt and its first answer are causal; each later answer sees the prompt and itself. Padding comes out as zeros."""
    prompt, first = spans[0]
    parts, end = [_causal(q[:, :, :first], k[:, :first], v[:, :first])], first
    for a, end in spans[1:]:
        k_own, v_own = (torch.cat([x[:, :prompt], x[:, a:end]], 1) for x in (k, v))
        parts.append(_causal(q[:, :, a:end], k_own, v_own))
    if end < q.shape[2]:
        parts.append(v.new_zeros(*q.shape[:2], q.shape[2] - end, q.shape[3]))
    return torch.cat(parts, 2)


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
