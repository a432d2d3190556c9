"""Prompts -> sampled, scored answers: what rejection sampling and PPO have in common."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain import chat, distributed, generate
from posttrain.data import naming, only
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.generate import Completion, Sampling, sample
from posttrain.models import Roles
from posttrain.packing import MicroBatch, Tree, collate, token_budget, tree
from posttrain.runs import Section
from posttrain.tensors import token_kl, unflatten
from posttrain.training import budget_of, smaller_budget
from reward.score import Scorer
from rlhf import gate


@dataclass(frozen=True)
class Encoded:
    """A prompt and its ids, ready for an answer."""

    prompt: Prompt
    ids: list[int]


def encode_prompts(section: Section, prompts: list[Prompt], roles: Roles, max_tokens: int) -> list[Encoded]:
    """Encode; leave out, and name, prompts longer than max_tokens."""
    out, long = [], []
    for i, p in enumerate(only(prompts, Prompt, f"{section.place}.prompts")):
        with naming(prompts, i):
            ids = chat.encode_prompt(roles.tokenizer, p.messages)
        (out if len(ids) <= max_tokens else long).append(Encoded(p, ids))
    if long:
        section.log.say(f"{len(long)} prompts are longer than max_prompt_tokens {max_tokens} and left out (first: "
                        f"{long[0].prompt.messages[-1]['content'][:50]!r}...)")
    if not out:
        raise PosttrainError(f"{section.place}.prompts", "no prompt is left", "at least one", "Check the data and max_prompt_tokens.")
    return out


def rows_at_once(section: Section, roles: Roles, prompts: list[Encoded]) -> int:
    """Samples of these prompts decoded side by side: generate.rows_at_once, where the longest prompt decides."""
    return generate.rows_at_once(section, roles, max(len(p.ids) for p in prompts))


@dataclass(frozen=True)
class Scored:
    """Answers of some prompts with their raw scores. All lists are (prompts, K)."""

    prompts: list[Encoded]
    answers: list[list[Completion]]
    helpfulness: Tensor
    safety: Tensor
    merged: Tensor
    by_tag: Tensor  # (prompts, K) bool: routed to the safety score by the prompt's tag
    by_threshold: Tensor  # routed by the threshold alone
    finished: Tensor
    sampling_seconds: float = 0.0  # without the scoring

    def rows(self, tokenizer) -> list[dict]:
        """One plain row per answer, for disk."""
        out = []
        for i, p in enumerate(self.prompts):
            for k, answer in enumerate(self.answers[i]):
                out.append({"prompt": p.prompt.messages, "answer": chat.decode(tokenizer, answer.ids), "ids": answer.ids,
                            "helpfulness": self.helpfulness[i, k].item(), "safety": self.safety[i, k].item(),
                            "merged": self.merged[i, k].item(), "finished": answer.finished})
        return out


def finite(place: str, name: str, x: Tensor) -> None:
    if not torch.isfinite(x).all():
        raise PosttrainError(place, f"{name} not finite", "numbers", "Check the models this stage loads; model.dtype: float32 may help.")


def merge_scores(scorer: Scorer, place: str, helpfulness: Tensor, safety: Tensor, tagged: Tensor) -> tuple[Tensor, Tensor]:
    """Raw scores of one shape and which prompts are tagged -> R_c and where the threshold alone chose the safety score (gate.merge).

    With scorer.statistics each model's score is on its own held-out mean and deviation; the gate's test stays on raw R_s. Raises on a
    score that is not finite: a NaN is not below the threshold, it would pass the gate unseen.
    """
    finite(place, "the helpfulness scores are", helpfulness)
    finite(place, "the safety scores are", safety)
    merged, by_threshold = gate.merge(safety, helpfulness, tagged, scorer.threshold)
    if scorer.statistics:
        (hm, hs), (sm, ss) = (scorer.statistics[n] for n in ("helpfulness", "safety"))
        merged = torch.where(tagged | by_threshold, (safety - sm) / ss, (helpfulness - hm) / hs)
    return merged, by_threshold


def sample_and_score(roles: Roles, role: str, scorer: Scorer, prompts: list[Encoded], samples: int, sampling: Sampling, seed: int,
                     batch: int, tick=None, judged: list[list[int]] | None = None) -> Scored:
    """K answers per prompt under a role, with both reward models' scores and the gate's choice.

    judged: ids of the prompts as the reward models read them, where those are not the ones answered. Several processes share the prompts, and
    each returns all answers, but for a process that works `distributed.alone`; what a prompt draws does not depend on their number.
    """
    began, mine = time.perf_counter(), distributed.share(len(prompts))
    answers = sample(roles, role, [p.ids for p in prompts], samples, sampling, seed, stop=chat.end_of_turn(roles.tokenizer), batch=batch, tick=tick,
                     only=mine)
    seconds = max(distributed.gather(time.perf_counter() - began))
    told = torch.tensor([lp for group in answers for a in group for lp in a.logprobs])
    finite(role, "the policy's log-probabilities are", told)
    judged = judged or [p.ids for p in prompts]
    raw = scorer([judged[i] for i in mine], [[a.ids for a in group] for group in answers])
    answers = distributed.assemble(answers)
    h, s = (torch.tensor(distributed.assemble(raw[name])) for name in ("helpfulness", "safety"))
    tagged = torch.tensor([[p.prompt.safety] * samples for p in prompts])
    merged, by_threshold = merge_scores(scorer, role, h, s, tagged)
    return Scored(prompts, answers, h, s, merged, tagged, by_threshold, torch.tensor([[a.finished for a in group] for group in answers]),
                  seconds)


@dataclass(frozen=True)
class Batches:
    """An iteration's answers cut into mini-batches of micro-batches, made once: every pass reads the same tensors, so that the
    trainer's first ratio is exactly 1. where[m][j] (S,) is the answer number of each answer of a micro-batch.

    Of several processes each has its share of every mini-batch; answer numbers, response_mask and counts are of the whole."""

    mini: list[list[MicroBatch]]
    where: list[list[Tensor]]
    response_mask: Tensor  # (B, R)
    counts: list[int]  # tokens of each mini-batch, over all processes
    budget: int  # tokens of a micro-batch
    smaller: Callable[[int], "Batches"] | None = None  # the same mini-batches in micro-batches of so many tokens

    def flat(self):
        for batches, wheres in zip(self.mini, self.where, strict=True):
            yield from zip(batches, wheres, strict=True)

    def spread(self, batch: MicroBatch, where: Tensor, flat: Tensor) -> Tensor:
        """Per-token numbers of a micro-batch (N,) -> (B, R)."""
        return unflatten(flat, where[batch.owner], batch.slot, *self.response_mask.shape)

    def of(self, batch: MicroBatch, where: Tensor, full: Tensor) -> Tensor:
        """(B, R) -> this micro-batch's (N,)."""
        return full[where[batch.owner], batch.slot]

    def table(self, per_token, device) -> Tensor:
        """(B, R) of what per_token(micro-batch) (N,) gives, over all processes."""
        full = torch.zeros(self.response_mask.shape, device=device)
        for batch, where in self.flat():
            full += self.spread(batch, where, per_token(batch).detach())
        distributed.add(full)
        return full


def make_batches(trees: list[Tree], mini_batch: int, budget: int, roles: Roles, order: list[int]) -> Batches:
    """Trees of K answers each, in mini-batches of about `mini_batch` answers (whole prompts), in the given order of trees."""
    k = len(trees[0].ends)
    per = max(1, mini_batch // k)
    widest = max(b - a for t in trees for a, b in t.spans)
    mask = torch.zeros(len(trees) * k, widest, dtype=torch.bool)
    for i, t in enumerate(trees):
        for j, (a, b) in enumerate(t.spans):
            mask[i * k + j, :b - a] = True
    mini, where, counts = [], [], []
    for start in range(0, len(order), per):
        counts.append(sum(len(c) for i in order[start:start + per] for c in trees[i].counted))
        chosen = distributed.share_by_length(order[start:start + per], trees)
        some = [trees[i] for i in chosen]
        batches, wheres = [], []
        for group in token_budget(some, budget, roles.layout):
            batches.append(collate(some, group, roles.layout, roles.tokenizer.pad_token_id).to(roles.device))
            wheres.append(torch.tensor([chosen[i] * k + j for i in group for j in range(k)], device=roles.device))
        mini.append(batches)
        where.append(wheres)
    return Batches(mini, where, mask.to(roles.device), counts, budget, lambda tokens: make_batches(trees, mini_batch, tokens, roles, order))


@dataclass(frozen=True)
class Rollout:
    """One PPO iteration's tensors. (B, R) unless said: what the update reads, nothing else."""

    response_mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor  # (B,) whitened and capped
    entropy: float | None = None  # of the policy's distribution, mean over response tokens, in nats; where it was asked for

    def check(self) -> "Rollout":
        """Shapes agree, every number is finite, every answer has a token, nothing stands outside the mask."""
        b, r = self.response_mask.shape
        for name in ("old_logprobs", "ref_logprobs", "values"):
            x = getattr(self, name)
            if x.shape != (b, r) or not torch.isfinite(x).all() or (x * ~self.response_mask).any():
                raise PosttrainError("PPO rollout", f"{name} is {tuple(x.shape)}, finite: {bool(torch.isfinite(x).all())}",
                                     f"finite numbers of shape {(b, r)} inside the mask", "Please report this; dtype: float32 may help.")
        if self.scores.shape != (b,) or not torch.isfinite(self.scores).all() or not self.response_mask[:, 0].all():
            raise PosttrainError("PPO rollout", "a score is not finite or an answer is empty", "one finite score per answer", "Check the reward models.")
        if (self.old_logprobs > 1e-3).any():
            raise PosttrainError("PPO rollout", "a log-probability above 0", "numbers up to 0", "Please report this.")
        return self


def answer_trees(scored: Scored) -> list[Tree]:
    return [tree(p.ids, [a.ids for a in group]) for p, group in zip(scored.prompts, scored.answers, strict=True)]


def table(section: Section, roles: Roles, batches: Batches, per_token: Callable[[MicroBatch], Tensor]) -> tuple[Batches, Tensor]:
    """Batches.table. Where the GPU's memory runs out, of smaller micro-batches from now on (training.smaller_budget), which come back with it."""
    while True:
        try:
            return batches, batches.table(per_token, roles.device)
        except torch.OutOfMemoryError:
            pass
        batches = batches.smaller(smaller_budget(section, batches.budget, [b for b, _ in batches.flat()]))  # the exception and what it held are gone


def exact_kl(section: Section, roles: Roles, role: str, reference: str, scored: Scored, temperature: float = 1.0) -> list[float]:
    """Per answer the sum over its tokens of KL(role || reference) of the next token, over the whole vocabulary at `temperature`, in nats.

    Every term is a KL whichever token was drawn. The log-ratio of the drawn tokens estimates it only where they were drawn at that temperature with
    top-p 1. Of answers drawn so the mean estimates the KL of whole answers, with less variance (Amini et al. 2025, arXiv 2504.10637,
    Rao-Blackwellization); of others it is the KL along what the decoding gives."""
    if role == reference:
        return [0.0] * scored.merged.numel()

    def per_token(batch: MicroBatch) -> Tensor:
        sides = [x for name in (role, reference) for x in (roles.hidden(name, batch)[batch.predictors], roles.vocabulary(name))]
        return token_kl(*sides, temperature)

    trees = answer_trees(scored)
    batches = make_batches(trees, len(trees) * len(trees[0].ends), budget_of(section, roles, roles[role]), roles, list(range(len(trees))))
    with torch.inference_mode():
        return table(section, roles, batches, per_token)[1].sum(1).tolist()
