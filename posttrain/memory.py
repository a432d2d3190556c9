"""Bytes that a step holds at its peak beside the weights, counted by hand from a model's shape. No torch.

What autograd keeps of one layer for one token, by the operations that keep it (transformers' Llama layer; tests compare with allocations):
what two norms scale and by how much (posttrain/adapted.py); the inputs of the matrices; queries, keys, values (repeated for grouped heads) and the output of
attention; gate, its activation, up and their product; the low-rank products of adapters.
"""

from dataclasses import dataclass

from posttrain.shape import Shape

CHUNK = 1024  # tokens whose logits exist at the same time (posttrain.tensors)
PREFILL = 4096  # padded tokens of prompts that are read at once (posttrain.generate)
FEWEST, MOST = 512, 16384  # tokens of a micro-batch that is chosen by memory, on a GPU


@dataclass(frozen=True)
class Way:
    """How a model computes. width: bytes of a number in its matrix products; full: all weights are trained; mixed: float32 weights and residual
    stream, matrix products in bfloat16 (width 2); rank: of the adapters, 0 without; quantized: matrices are unpacked for every product; rows: the
    turn tokens' rows are trained beside adapters, in a copy of the vocabulary whose gradient is made whole."""

    width: int
    full: bool = False
    mixed: bool = False
    rank: int = 0
    quantized: bool = False
    rows: bool = False


def layer(s: Shape, way: Way) -> int:
    """Bytes that one layer keeps of one token for its backward pass, without the mask."""
    both = s.q_width + s.kv_width
    norms = (2 * s.hidden + (both if s.qk_norm else 0)) * (4 if way.mixed else way.width)
    inputs = (5 if way.mixed else 2) * s.hidden * way.width  # mixed: cast anew for each of the matrices that share an input
    products = 4 * (s.q_width + s.ffn) * way.width
    return norms + inputs + products + 4 * s.heads + len(s.linears) * way.rank * way.width


def mask(tokens: int, way: Way) -> int:
    """Bytes of the mask of a packed micro-batch, as a layer's attention adds it to its scores."""
    return tokens * tokens * way.width


def forward(s: Shape, way: Way, tokens: int) -> float:
    """Peak bytes of a pass over `tokens` that keeps nothing: the widest moment of a layer."""
    widest = (max(3 * s.ffn, 6 * s.q_width) + 4 * s.hidden) * way.width
    return tokens * widest + unpacked(s, way)


def unpacked(s: Shape, way: Way) -> int:
    """The largest matrix of a layer, unpacked for a product."""
    return max(i * o for i, o in s.linears.values()) * way.width if way.quantized else 0


def head(s: Shape, way: Way, tokens: int, logits: bool) -> float:
    """Bytes of the vocabulary's products of one chunk: float32 logits and their exponentials; with trained rows its gradient in two pieces."""
    if not logits:
        return 0
    table = s.vocab * s.hidden
    return 8 * min(tokens, CHUNK) * s.vocab + (8 * table if way.full or way.rows else 0) + (table * way.width if way.rows else 0)


def training(s: Shape, way: Way, tokens: int, checkpointing: bool, logits: bool = True) -> float:
    """Peak bytes of one micro-batch's forward and backward pass, without the gradients of the weights."""
    stream = 4 if way.mixed else way.width
    largest = max(i * o for i, o in s.linears.values())
    passing = tokens * s.ffn * way.width + unpacked(s, way) + (4 * largest if way.full else 0)
    ends = tokens * s.hidden * (8 if way.full else 3 * way.width) + tokens * tokens
    copies = s.lora_weights(way.rank) * way.width if way.rank and way.width < 4 else 2 * (s.body + s.vocab * s.hidden) if way.mixed else 0
    one = tokens * layer(s, way) + mask(tokens, way)
    if checkpointing:
        kept = s.layers * tokens * s.hidden * stream + ends
        return kept + max(head(s, way, tokens, logits) + (copies if way.mixed else 0), one + copies / s.layers + passing)
    return s.layers * one + ends + copies + max(head(s, way, tokens, logits), passing)


def decoding(s: Shape, way: Way, rows: int, width: int, prompt: int) -> float:
    """Peak bytes of decoding beside the keys and values: reading prompts, or a step with its logits and one layer's keys in another order."""
    step = rows * width * s.kv_width * way.width + rows * s.vocab * (16 + way.width)
    table = s.vocab * s.hidden * way.width if way.rows else 0
    return table + max(forward(s, way, max(PREFILL, prompt) if rows * prompt > PREFILL else rows * prompt), step)


def micro_batch(s: Shape, way: Way, room: float, fewest: int = FEWEST, most: int = MOST) -> int:
    """The most tokens of a micro-batch whose backward pass fits in `room` bytes, without checkpointing."""
    fitting = (t for t in range(most, fewest, -256) if training(s, way, t, False) <= room)
    return next(fitting, fewest)
