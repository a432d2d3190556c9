"""Attention for short sequences on a CPU, registered with transformers as 'short_cpu'.

torch's CPU flash kernel is built for long sequences: at 64 to 2,048 bf16 tokens its backward pass costs more than the matrix products it saves.
Here the scores are made outright, block of rows by block of rows, so that what the causal mask hides is hardly ever computed: scores and
probabilities in the input's dtype, the softmax float32 inside (measured: log-probabilities no further from float32 than with torch's kernel), the
keys less their mean, since an offset that all scores of a row share would cost them their digits (the smoothing of SageAttention,
https://arxiv.org/abs/2410.02367), the query heads of one key/value head side by side in one product (so grouped keys are never repeated). In a
tree, a later answer's rows meet the prompt's keys and their own, never the other answers'. The backward pass is written out: autograd's slices
would fill and add whole tensors for every block. A decoding step does the same for one row. Longer sequences and other dtypes go to transformers'
sdpa function as they are.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NAME = "short_cpu"
LONGEST = 2048  # tokens; scores of a block are B * heads * BLOCK * T floats
BLOCK = 128  # rows whose scores are made at once
APART = 192  # tokens from which a batch's trees are taken one by one; shorter ones together, under their mask


def short_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
                    scaling: float | None = None, tree_spans=None, **kwargs) -> tuple[Tensor, None]:
    """query (B, H, T, d); key, value (B, G, T, d) with G dividing H; attention_mask None (causal) or bool (B, 1, T, T); tree_spans:
    for each row its answers' (start, end), where the mask says no more than that. Returns (B, T, H, d), as transformers' functions do."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    t, scaling = query.shape[2], scaling or query.shape[3] ** -0.5
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if t == 1 and attention_mask is not None and boolean and attention_mask.shape[1] == 1:
        return _one_token(query, key, value, attention_mask, scaling), None
    if query.dtype != torch.bfloat16 or key.shape[2] != t or not 1 < t <= LONGEST or dropout or not boolean or kwargs.get("is_causal") is False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    apart = attention_mask is not None and tree_spans is not None and t >= APART
    mask = None if apart else attention_mask
    return _Attention.apply(query, key, value, scaling, mask, _blocks(t, len(query), key.shape[1], mask, tree_spans if apart else None)), None


@dataclass(frozen=True)
class _Block:
    """Rows whose scores are made at once. They see the keys [0, prompt) and [own, end), and of the last of these no later ones than
    themselves. at: which of the B * G key/value heads; causal False: a mask says what they see."""

    at: slice
    start: int
    end: int
    prompt: int = 0
    own: int = 0
    causal: bool = True

    def keys(self, x: Tensor) -> Tensor:
        """(at, keys, d) of (B * G, T, d)."""
        x = x[self.at]
        return x[:, :self.end] if self.own == self.prompt else torch.cat([x[:, :self.prompt], x[:, self.own:self.end]], 1)

    def add(self, total: Tensor, x: Tensor) -> None:
        """The reverse: add x (at, keys, d) to total (B * G, T, d)."""
        total = total[self.at]
        if self.own == self.prompt:
            total[:, :self.end] += x
        else:
            total[:, :self.prompt] += x[:, :self.prompt]
            total[:, self.own:self.end] += x[:, self.prompt:]


def _blocks(t: int, batch: int, groups: int, mask: Tensor | None, spans: list | None) -> list[_Block]:
    """Without spans all rows of the batch together; with them row by row, the prompt with its first answer, then answer by answer."""
    if mask is not None:
        return [_Block(slice(None), 0, t, causal=False)]
    if spans is None:
        return [_Block(slice(None), i, min(i + BLOCK, t)) for i in range(0, t, BLOCK)]
    out = []
    for row, answers in enumerate(spans):
        at, prompt = slice(row * groups, (row + 1) * groups), answers[0][0]
        for start, end, own in [(0, answers[0][1], prompt), *((a, b, a) for a, b in answers[1:])]:
            out += [_Block(at, i, min(i + BLOCK, end), prompt, own) for i in range(start, end, BLOCK)]
    return out


class _Attention(torch.autograd.Function):
    """query (B, H, T, d); key, value (B, G, T, d); mask None or bool (B, 1, T, T); blocks cover the rows that matter, the others come
    out as zeros. Returns (B, T, H, d). Inside, the rows of a key/value head are T * H/G query heads, token by token."""

    @staticmethod
    def forward(ctx, query, key, value, scaling, mask, blocks):
        b, h, t, d = query.shape
        g, m = key.shape[1], h // key.shape[1]
        q = query.view(b, g, m, t, d).transpose(2, 3).reshape(b * g, t * m, d)
        k, v = key.reshape(b * g, t, d), value.reshape(b * g, t, d)
        k = (k.float() - k.mean(1, keepdim=True, dtype=torch.float32)).to(k.dtype)  # no row's softmax changes, nor a gradient
        q_scaled, out, kept = q * scaling, torch.zeros_like(q), []
        for block in blocks:
            rows, size = slice(block.start * m, block.end * m), block.end - block.start
            scores = q_scaled[block.at, rows] @ block.keys(k).transpose(1, 2)
            if block.causal:
                scores.view(len(scores), size, m, -1)[..., -size:].add_(_later(size, scores.dtype))
            else:
                scores.view(b, g, t, m, t).masked_fill_(~mask[:, :, :, None], float("-inf"))
            kept.append(torch.softmax(scores, dim=-1))
            out[block.at, rows] = kept[-1] @ block.keys(v)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.blocks, ctx.scaling, ctx.shape = blocks, scaling, (b, g, m, t, d)
        return out.view(b, g, t, m, d).transpose(1, 2).reshape(b, t, h, d)

    @staticmethod
    def backward(ctx, grad):
        (q, k, v, *kept), (b, g, m, t, d) = ctx.saved_tensors, ctx.shape
        grad = grad.view(b, t, g, m, d).transpose(1, 2).reshape(b * g, t * m, d)
        dq, (dk, dv) = torch.zeros_like(q), (torch.zeros(k.shape) for _ in range(2))
        for block, weights in zip(ctx.blocks, kept, strict=True):
            rows = slice(block.start * m, block.end * m)
            d_out = grad[block.at, rows]
            d_scores = torch._softmax_backward_data(d_out @ block.keys(v).transpose(1, 2), weights, -1, weights.dtype)
            dq[block.at, rows] = d_scores @ block.keys(k)
            block.add(dk, d_scores.transpose(1, 2) @ q[block.at, rows])
            block.add(dv, weights.transpose(1, 2) @ d_out)
        dq = dq.mul_(ctx.scaling).view(b, g, t, m, d).transpose(1, 2).reshape(b, t, g * m, d)
        dk, dv = (x.view(b, g, t, d).transpose(1, 2).to(q.dtype) for x in (dk.mul_(ctx.scaling), dv))
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None, None


@lru_cache(maxsize=BLOCK)
def _later(rows: int, dtype: torch.dtype) -> Tensor:
    """-inf at the keys that come after a row: (rows, 1, rows)."""
    return torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(1)[:, None]


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
