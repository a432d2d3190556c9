"""Which tokens share a forward pass: trees (a prompt and the answers that share it), length buckets, token budgets.

The shift lives here and nowhere else: a target at position t is predicted by the state at t-1, and the first token of every
answer by the last token of the prompt. Two layouts give the same numbers:

rows    CPU: sequences of similar length side by side, padded on the right. Causal attention never looks right, so no mask is
        needed; a tree gets a boolean mask that keeps its answers from seeing each other.
packed  GPU: everything in one row with position ids that restart. transformers keeps the documents apart only when there is no
        attention mask and no cache (masking_utils.py, packed sequence detection); tests hold that. Trees are unrolled: with K
        answers the prompt is there K times. With sdpa transformers' own mask is as large as the row is long, squared; where a prompt
        is shared, reward models therefore score in rows on a GPU too (reward/score.py:laid_out; docs/scaling.md counts both).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PASS_COST = 64  # tokens that a pass costs by itself: a smaller micro-batch must save more padding than that


@dataclass(frozen=True)
class Tree:
    """A prompt and the answers that continue it. ids: prompt, then every answer; counted: positions that are targets."""

    ids: list[int]
    prompt: int  # length of the shared part
    ends: tuple[int, ...]  # end position of each answer in ids
    counted: tuple[tuple[int, ...], ...]  # for each answer, the positions (in ids) of its counted tokens

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def spans(self) -> list[tuple[int, int]]:
        return list(zip((self.prompt, *self.ends[:-1]), self.ends, strict=True))


def tree(prompt: list[int], answers: list[list[int]]) -> Tree:
    """Every answer token counts. Raises ValueError on an empty prompt or answer."""
    if not prompt or not answers or not all(answers):
        raise ValueError("a tree needs a prompt and at least one answer, none of them empty")
    ids, ends = list(prompt), []
    for answer in answers:
        ids += answer
        ends.append(len(ids))
    spans = zip((len(prompt), *ends[:-1]), ends, strict=True)
    return Tree(ids, len(prompt), tuple(ends), tuple(tuple(range(a, b)) for a, b in spans))


def dialogue(ids: list[int], loss_mask: list[bool]) -> Tree:
    """One sequence whose counted tokens are those with loss_mask True. Position 0 can't be a target."""
    counted = tuple(t for t, on in enumerate(loss_mask) if on)
    if not counted or counted[0] == 0 or len(ids) != len(loss_mask):
        raise ValueError("a dialogue needs a loss mask of its length that counts something, but not its first token")
    return Tree(list(ids), counted[0], (len(ids),), (counted,))


@dataclass
class MicroBatch:
    """One forward pass. Flat indices point into (B*T); owners number the answers of the batch 0..S-1 in order.

    input_ids (B, T); position_ids (B, T) or None; attention_mask None or bool (B, 1, T, T), True = visible;
    predictors (N,) flat index of the state that predicts targets (N,) token ids; owner (N,), slot (N,): which answer, which
    token of it; last (S,) flat index of each answer's last token; items: the caller's index of the tree of every answer.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    predictors: Tensor
    targets: Tensor
    owner: Tensor
    slot: Tensor
    last: Tensor
    items: list[int]
    tokens: int  # real ones
    tree_spans: list[list[tuple[int, int]]] | None = None  # of rows with several answers: each row's answers' (start, end)

    def to(self, device) -> "MicroBatch":
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


def cost(t: Tree, layout: str) -> int:
    """Tokens a tree puts through the model."""
    return len(t) if layout == "rows" else sum(t.prompt + b - a for a, b in t.spans)


def token_budget(trees: list[Tree], budget: int, layout: str = "rows") -> list[list[int]]:
    """Split indices into micro-batches of at most `budget` tokens, padding included. Longest first, so that memory trouble shows
    early. A tree longer than the budget goes alone. Deterministic.
    """
    order = sorted(range(len(trees)), key=lambda i: (-cost(trees[i], layout), i))
    sizes = [cost(trees[i], layout) for i in order]
    cuts = _least_padding(sizes, budget) if layout == "rows" else _filled(sizes, budget)
    return [order[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]


def _filled(sizes: list[int], budget: int) -> list[int]:
    """Ends of groups, each filled up to the budget."""
    cuts, used = [], 0
    for i, size in enumerate(sizes):
        if i and used + size > budget:
            cuts.append(i)
            used = 0
        used += size
    return [*cuts, len(sizes)] if sizes else []


def _least_padding(sizes: list[int], budget: int) -> list[int]:
    """Ends of groups of falling sizes, each padded to its first, such that padding and PASS_COST per group are least."""
    best, start = [0], [0]
    for end in range(1, len(sizes) + 1):
        options = [(best[end - 1] + sizes[end - 1] + PASS_COST, end - 1)]
        for i in range(end - 2, -1, -1):
            if (end - i) * sizes[i] > budget:
                break
            options.append((best[i] + (end - i) * sizes[i] + PASS_COST, i))
        cost_here, first = min(options)
        best.append(cost_here)
        start.append(first)
    cuts, end = [], len(sizes)
    while end:
        cuts.append(end)
        end = start[end]
    return cuts[::-1]


def collate(trees: list[Tree], indices: list[int], layout: str = "rows", pad: int = 0) -> MicroBatch:
    """The micro-batch of these trees."""
    return _rows(trees, indices, pad) if layout == "rows" else _packed(trees, indices)


def _rows(trees: list[Tree], indices: list[int], pad: int) -> MicroBatch:
    width = max(len(trees[i]) for i in indices)
    ids = torch.full((len(indices), width), pad, dtype=torch.long)
    branching = any(len(trees[i].ends) > 1 for i in indices)
    positions = torch.arange(width).repeat(len(indices), 1) if branching else None
    mask = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(indices), 1, 1, 1) if branching else None
    flat = _Flat()
    for row, i in enumerate(indices):
        t = trees[i]
        ids[row, :len(t)] = torch.tensor(t.ids)
        for k, (a, b) in enumerate(t.spans):
            if k:  # a later answer follows the prompt, not the answers before it
                positions[row, a:b] = torch.arange(t.prompt, t.prompt + b - a)
                mask[row, 0, a:, t.prompt:a] = False
            flat.add(i, row * width, [t.prompt - 1 if p == a else p - 1 for p in t.counted[k]], [t.ids[p] for p in t.counted[k]], b - 1)
    batch = flat.batch(ids, positions, mask, sum(len(trees[i]) for i in indices))
    batch.tree_spans = [trees[i].spans for i in indices] if branching else None
    return batch


def _packed(trees: list[Tree], indices: list[int]) -> MicroBatch:
    ids, positions, flat = [], [], _Flat()
    for i in indices:
        t = trees[i]
        for k, (a, b) in enumerate(t.spans):
            start, shift = len(ids), a - t.prompt
            ids += t.ids[:t.prompt] + t.ids[a:b]
            positions += range(t.prompt + b - a)
            flat.add(i, start, [p - shift - 1 for p in t.counted[k]], [t.ids[p] for p in t.counted[k]], b - 1 - shift)
    return flat.batch(torch.tensor([ids]), torch.tensor([positions]), None, len(ids))


class _Flat:
    """Collects the flat indices of a micro-batch answer by answer."""

    def __init__(self):
        self.predictors, self.targets, self.owner, self.slot, self.last, self.items = [], [], [], [], [], []

    def add(self, item: int, offset: int, predictors: list[int], targets: list[int], last: int) -> None:
        self.predictors += [offset + p for p in predictors]
        self.targets += targets
        self.owner += [len(self.items)] * len(targets)
        self.slot += range(len(targets))
        self.last.append(offset + last)
        self.items.append(item)

    def batch(self, ids, positions, mask, tokens) -> MicroBatch:
        long = [torch.tensor(x, dtype=torch.long) for x in (self.predictors, self.targets, self.owner, self.slot, self.last)]
        return MicroBatch(ids, positions, mask, *long, items=self.items, tokens=tokens)
