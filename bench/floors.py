"""The least seconds that a machine of measured speed needs for a stage: FLOP over the fastest matrix product, bytes over the copy.

The count on paper: L layers of B = sum of their matrices' weights, a head of V * d, attention over H heads of width h.
A forward pass is 2 B a token, 2 V d a head position and 4 L H h for each pair of positions that see one another; its backward
pass with adapters costs the same again (the product to the input) and attention twice; adapters, norms and embeddings are left
out. A decoding step reads all weights and the keys and values of every row, or computes, whichever takes longer.
"""

from dataclasses import dataclass

from posttrain.shape import Shape

BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Machine:
    """FLOP/s and bytes/s as measured in the same run, and bytes of a number."""

    flops: float
    bandwidth: float
    width: int


def machine(peak: dict[str, float], dtype: str) -> Machine:
    """peak: what `harness.peaks` told; dtype: 'bfloat16' or 'float32'."""
    return Machine(max(v for k, v in peak.items() if k != "copy"), peak["copy"], BYTES[dtype])


def attention(shape: Shape, pairs: float) -> float:
    return 4.0 * shape.layers * shape.linears["q_proj"][1] * pairs


def forward(shape: Shape, jobs: list[tuple[int, list[int]]], head: int = 0, shared: bool = False) -> float:
    """FLOP of one pass over prompts with their answers; jobs: (prompt tokens, tokens of each answer); head: positions that go
    through the vocabulary. shared: a prompt goes through once for all its answers."""
    tokens = sum((p if shared else p * len(answers)) + sum(answers) for p, answers in jobs)
    return 2.0 * shape.body * tokens + 2.0 * shape.vocab * shape.hidden * head + attention(shape, _pairs(jobs, shared))


def _pairs(jobs, shared: bool) -> float:
    whole = sum((p + t) * (p + t + 1) / 2 for p, answers in jobs for t in answers)
    return whole - (sum(p * (p + 1) / 2 * (len(answers) - 1) for p, answers in jobs) if shared else 0)


def train(shape: Shape, jobs, head: int, shared: bool = False) -> float:
    """FLOP of a pass and its backward pass, adapters alone trained, nothing computed twice. shared: as in `forward`."""
    return 2.0 * forward(shape, jobs, head, shared) + attention(shape, _pairs(jobs, shared))


def decode(shape: Shape, m: Machine, jobs, rows: int, shared: bool = False) -> float:
    """Seconds to sample answers of given lengths with at most `rows` in flight (longest side by side), one prefill a prompt.

    The first token comes out of the prefill. shared: the keys and values of a prompt are read once for all of its rows.
    """
    seconds = forward(shape, [(p, [0]) for p, _ in jobs], head=len(jobs)) / m.flops
    queue = sorted(((t, i, p) for i, (p, answers) in enumerate(jobs) for t in answers), reverse=True)
    weights = shape.body + shape.vocab * shape.hidden
    for start in range(0, len(queue), rows):
        wave = queue[start:start + rows]
        for step in range(1, wave[0][0]):
            alive = [(i, p) for t, i, p in wave if t > step]
            prompts = sum(p for _, p in (set(alive) if shared else alive))
            read = weights * m.width + (prompts + len(alive) * step) * shape.kv(m.width)
            flop = 2.0 * weights * len(alive) + attention(shape, sum(p + step for _, p in alive))
            seconds += max(read / m.bandwidth, flop / m.flops)
    return seconds


def best_of(shape: Shape, m: Machine, jobs, rows: int, shared: bool = False) -> float:
    """Seconds to sample K answers a prompt and to score each with one reward model."""
    return decode(shape, m, jobs, rows, shared) + forward(shape, jobs, shared=shared) / m.flops


def ppo(shape: Shape, m: Machine, jobs, rows: int, epochs: int = 1) -> dict[str, float]:
    """Seconds of one iteration, by part: reference, critic and one reward model score; old log-probabilities are the sampler's;
    policy and critic, adapters of their own, train."""
    answers = sum(t for _, group in jobs for t in group)
    out = {"generate": decode(shape, m, jobs, rows),
           "score": (forward(shape, jobs, head=answers) + 2 * forward(shape, jobs)) / m.flops,
           "update": epochs * (train(shape, jobs, answers) + train(shape, jobs, 0)) / m.flops}
    return out | {"total": sum(out.values())}


def sft(shape: Shape, m: Machine, jobs) -> float:
    """Seconds to train on demonstrations once, loss on the answers alone."""
    return train(shape, jobs, sum(t for _, answers in jobs for t in answers)) / m.flops
