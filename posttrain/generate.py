"""Prompts -> completions with log-probabilities: our own decoding loop over the transformers model (or vLLM's: vllm_engine.py).

One prefill per prompt, shared by its K samples; key/value memory with a fixed row per running sample; finished rows retire, the
queue refills them, and the batch shrinks when the queue is empty. Every sample draws its uniforms from its own place in a table
made beforehand from the seed, so its randomness does not depend on who runs beside it. A chunk of prompts is the unit of
resume: its result depends on its own seed and prompts alone.
"""

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import Cache

from posttrain import distributed
from posttrain.errors import PosttrainError
from posttrain.models import Roles
from posttrain.shape import shape_of

CANDIDATES = 512  # top-p looks at this many tokens first; more only if they hold less than top_p
KV_SHARE = 0.5  # of free memory for keys and values; the rest is for activations, logits and a merged copy of the policy


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token. Log-probabilities are recorded at `temperature`, before top_p cuts."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """ids end with the end-of-turn token when finished; logprobs has one number per id, in nats."""

    ids: list[int]
    logprobs: list[float]
    finished: bool


class RowCache(Cache):
    """Key/value memory per layer: values (rows, heads, width, d), keys with their last two axes exchanged, as a decoding step reads
    them. In prefill it hands through and keeps; in decoding it writes each row at its own length and returns the part in use.
    In 16 bits on a CPU keys are less their prompt's mean, `offsets`, as in attention.py: softmax takes no notice, and digits are kept."""

    def __init__(self, rows: int, width: int):
        super().__init__(layers=[])
        self.rows, self.width = rows, width
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.offsets: list[Tensor] = []  # (rows, heads, d)
        self.lengths: Tensor | None = None  # (rows,) tokens stored, decoding only
        self.row_ids: Tensor | None = None
        self.fill: list | None = None  # prefill: (source row, its length, target rows)
        self.used = 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if len(self.keys) <= layer_idx:
            heads, d = key_states.shape[1], key_states.shape[3]
            self.keys.append(key_states.new_zeros(self.rows, heads, d, self.width))
            self.values.append(value_states.new_zeros(self.rows, heads, self.width, value_states.shape[3]))
            self.offsets.append(key_states.new_zeros(self.rows, heads, d))
        k, v, offset = self.keys[layer_idx], self.values[layer_idx], self.offsets[layer_idx]
        centred = k.dtype.itemsize == 2 and k.device.type == "cpu"
        if self.fill is not None:
            for source, n, targets in self.fill:
                own = key_states[source, :, :n]
                if centred:
                    offset[targets] = own.mean(1)
                    own = own - offset[targets[:1]].transpose(0, 1)
                k[targets, :, :, :n] = own.transpose(-1, -2)
                v[targets, :, :n] = value_states[source, :, :n]
            return key_states, value_states
        k[self.row_ids, :, :, self.lengths] = key_states[:, :, 0] - offset if centred else key_states[:, :, 0]
        v[self.row_ids, :, self.lengths] = value_states[:, :, 0]
        return k[..., :self.used].transpose(-1, -2), v[:, :, :self.used]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def keep(self, rows: Tensor) -> None:
        """Shrink to these rows, layer by layer so that old and new memory never stand side by side."""
        for memory in (self.keys, self.values, self.offsets):
            for layer, kept in enumerate(memory):
                memory[layer] = kept[rows]
        self.rows = len(rows)
        self.lengths = self.lengths[rows]
        self.row_ids = torch.arange(self.rows, device=rows.device)


def free_memory(roles: Roles) -> int:
    """Bytes this process can still take where the models are: of its GPU, the allocator's spare blocks too, or its share of the machine's memory."""
    if roles.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return psutil.virtual_memory().available // distributed.on_this_machine()


def row_bytes(roles: Roles, width: int) -> int:
    """Key/value memory of one row of `width` tokens."""
    model = next(iter(roles.roles.values())).net.config
    return width * shape_of(model.to_dict()).kv(roles.dtype.itemsize)


def rows_at_once(section, roles: Roles, longest: int) -> int:
    """Samples decoded side by side, of prompts of at most `longest` tokens: the recipe's `batch`, or as many as keep their keys and values in
    half of the free memory. Decided at the section's first sampling and kept in its manifest: the batch schedule of a chunk is the same after a
    resume, whatever is free then."""
    def choose() -> int:
        wanted, width = section.config.batch, longest + section.config.max_new_tokens
        if getattr(section.config, "engine", "ours") == "server":
            return wanted
        each, free = row_bytes(roles, width), free_memory(roles)
        fit = int(free * KV_SHARE / each)
        if fit < 1:
            raise PosttrainError(f"{section.place}.max_new_tokens", f"the keys and values of one sample of {width} tokens take {each / 1e9:.1f} GB, and "
                                 f"{free / 1e9:.1f} GB are free", "half of the free memory to hold one", "Lower max_new_tokens or max_prompt_tokens.")
        if fit < wanted:
            section.log.say(f"note: {fit} samples side by side instead of batch {wanted}: keys and values take {each / 1e6:.1f} MB a sample of up to "
                            f"{width} tokens, and {free / 1e9:.1f} GB are free")
        return min(wanted, fit)

    return section.decide("rows_at_once", choose)


def sample(roles: Roles, role: str, prompts: list[list[int]], samples: int, sampling: Sampling, seed: int, *, stop: int,
           batch: int = 64, tick=None, only: list[int] | None = None) -> list[list[Completion]]:
    """Draw `samples` completions of every prompt. prompts: token ids that end where the answer begins; stop: end-of-turn id;
    batch: rows in flight; tick(tokens): called as tokens are made; only: numbers of the prompts to answer here, each with the randomness it
    has among all. Returns one list of `samples` completions per prompt answered.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    only = range(len(prompts)) if only is None else only
    if roles.engine is not None:
        return roles.engine.sample(roles, role, prompts, samples, sampling, seed, stop=stop, batch=batch, tick=tick, only=only)
    with torch.inference_mode():
        return Loop(roles, role, prompts, samples, sampling, seed, stop, batch, tick, only).run()


class Loop:
    def __init__(self, roles, role, prompts, samples, sampling, seed, stop, batch, tick, only):
        self.roles, self.role, self.prompts, self.sampling, self.stop, self.tick = roles, role, prompts, sampling, stop, tick
        self.device, self.body, self.logits = roles.device, roles.decoder(role), roles.logits_of(role)
        self.queue = [(p, s) for p in sorted(only, key=lambda i: (len(prompts[i]), i)) for s in range(samples)]
        self.only, self.batch = only, min(batch, len(self.queue))
        generator = torch.Generator().manual_seed(seed)
        self.uniforms = torch.rand(len(prompts), samples, sampling.max_new_tokens, generator=generator, dtype=torch.float64)
        self.ids = [[[] for _ in range(samples)] for _ in prompts]
        self.logprobs = [[[] for _ in range(samples)] for _ in prompts]
        self.cache = RowCache(self.batch, max(map(len, prompts)) + sampling.max_new_tokens)
        self.rows: list[tuple[int, int] | None] = [None] * self.batch  # which sample each row runs
        self.tokens = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.lengths = torch.zeros(self.batch, dtype=torch.long, device=self.device)

    def run(self) -> list[list[Completion]]:
        while self.queue or any(self.rows):
            free = [i for i, r in enumerate(self.rows) if r is None]
            if self.queue and (len(free) * 4 >= len(self.rows) or len(free) >= len(self.queue)):
                self._prefill(free)
            elif not self.queue and len(free) * 4 >= len(self.rows) and len(self.rows) > 4:
                self._shrink()
            if any(self.rows):
                self._step()
        out = []
        for p in self.only:
            out.append([Completion(i, lp, i[-1] == self.stop) for i, lp in zip(self.ids[p], self.logprobs[p], strict=True)])
        return out

    def _prefill(self, free: list[int]) -> None:
        """Fill free rows from the queue: every distinct prompt goes through the model once."""
        taken, self.queue = self.queue[:len(free)], self.queue[len(free):]
        targets: dict[int, list[int]] = {}
        for row, (p, s) in zip(free, taken, strict=False):
            targets.setdefault(p, []).append(row)
            self.rows[row] = (p, s)
        order = list(targets)
        for group in _groups(order, self.prompts, 4096):
            width = max(len(self.prompts[p]) for p in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            for i, p in enumerate(group):
                ids[i, :len(self.prompts[p])] = torch.tensor(self.prompts[p])
            where = torch.tensor([len(self.prompts[p]) - 1 for p in group], device=self.device)
            self.cache.fill = [(i, len(self.prompts[p]), torch.tensor(targets[p], device=self.device)) for i, p in enumerate(group)]
            hidden = self.body(input_ids=ids.to(self.device), past_key_values=self.cache, use_cache=True).last_hidden_state
            self.cache.fill = None
            last = hidden[torch.arange(len(group), device=self.device), where]
            rows = [r for p in group for r in targets[p]]
            spread = torch.tensor([i for i, p in enumerate(group) for _ in targets[p]], device=self.device)
            self.lengths[rows] = where[spread] + 1
            self._choose(last[spread], rows)

    def _step(self) -> None:
        """One token for every row; a retired row that waits for the queue runs along and is ignored."""
        alive = [i for i, r in enumerate(self.rows) if r is not None]
        cache = self.cache
        cache.lengths = self.lengths
        cache.row_ids = torch.arange(len(self.rows), device=self.device)
        cache.used = int(self.lengths.max()) + 1
        mask = (torch.arange(cache.used, device=self.device)[None, :] <= self.lengths[:, None])[:, None, None]
        hidden = self.body(input_ids=self.tokens[:, None], position_ids=self.lengths[:, None], attention_mask=mask,
                      past_key_values=cache, use_cache=True).last_hidden_state[:, 0]
        self.lengths[alive] += 1
        self._choose(hidden[alive], alive)

    def _choose(self, hidden: Tensor, rows: list[int]) -> None:
        """Sample the next token of `rows` from their states (len(rows), d); retire those that end."""
        owners = [self.rows[r] for r in rows]
        steps = [len(self.ids[p][s]) for p, s in owners]
        u = torch.stack([self.uniforms[p, s, t] for (p, s), t in zip(owners, steps, strict=True)]).to(self.device)
        token, logprob = choose(self.logits(hidden), u, self.sampling.temperature, self.sampling.top_p)
        self.tokens[rows] = token
        for row, (p, s), t, lp in zip(rows, owners, token.tolist(), logprob.tolist(), strict=True):
            self.ids[p][s].append(t)
            self.logprobs[p][s].append(lp)
            if t == self.stop or len(self.ids[p][s]) >= self.sampling.max_new_tokens:
                self.rows[row] = None
                self.lengths[row] = 0
        if self.tick:
            self.tick(len(rows))

    def _shrink(self) -> None:
        """Drop retired rows from the batch."""
        alive = [i for i, r in enumerate(self.rows) if r is not None]
        keep = torch.tensor(alive, device=self.device)
        self.cache.lengths = self.lengths
        self.cache.keep(keep)
        self.rows = [self.rows[i] for i in alive]
        self.tokens, self.lengths = self.tokens[keep], self.lengths[keep]


def _groups(order: list[int], prompts: list[list[int]], budget: int):
    """Prompts in batches of at most `budget` padded tokens."""
    group: list[int] = []
    for p in order:
        if group and max(len(prompts[q]) for q in [*group, p]) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(p)
    if group:
        yield group


def choose(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at u. logits (B, V) float32, changed in place; u (B,) in [0, 1).

    Returns token (B,) and its log-probability (B,) at `temperature` over the whole vocabulary (temperature 0: at temperature 1).
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.gather(1, token[:, None]).squeeze(1) - torch.logsumexp(logits, -1)
    logits.div_(temperature)
    top = logits.max(-1, keepdim=True).values
    if top_p < 1:
        lse = torch.logsumexp(logits, -1, keepdim=True)
        k = min(CANDIDATES, logits.shape[1])
        values, index = logits.topk(k, dim=-1)
        p = (values - lse).exp().double()
        if (p.sum(-1) < top_p).any():
            values, index = logits.sort(dim=-1, descending=True)
            p = (values - lse).exp().double()
        before = p.cumsum(-1) - p
        p = p * (before < top_p)  # the smallest set whose probability reaches top_p
        pick = _invert(p, u)
        token = index.gather(1, pick[:, None]).squeeze(1)
        return token, (values.gather(1, pick[:, None]) - lse).squeeze(1).float()
    weights = (logits - top).exp_()
    blocks = -(-weights.shape[1] // 256)
    padded = torch.nn.functional.pad(weights, (0, blocks * 256 - weights.shape[1])).view(len(weights), blocks, 256)
    sums = padded.sum(-1).double()
    total = sums.sum(-1)
    cumulative = sums.cumsum(-1)
    target = u * total
    block = torch.searchsorted(cumulative, target[:, None], right=True).clamp_(max=blocks - 1)
    rest = target[:, None] - (cumulative - sums).gather(1, block)
    inner = padded.gather(1, block[:, :, None].expand(-1, 1, 256)).squeeze(1).double()
    place = torch.searchsorted(inner.cumsum(-1), rest, right=True)
    last = (inner > 0).double().mul(torch.arange(1, 257, device=inner.device)).max(-1, keepdim=True).values.long() - 1
    place = torch.minimum(place, last.clamp_(min=0))
    token = (block * 256 + place).squeeze(1)
    return token, (logits.gather(1, token[:, None]) - top).squeeze(1) - total.log().float()


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """Index whose cumulative weight first exceeds u * total, never one of weight 0. p (B, k) float64."""
    cumulative = p.cumsum(-1)
    pick = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True).squeeze(1)
    last = (p > 0).double().mul(torch.arange(1, p.shape[1] + 1, device=p.device)).max(-1).values.long() - 1
    return torch.minimum(pick, last)
