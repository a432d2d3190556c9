"""GPUs: their memory, what their data sheets promise, and how long work takes on them. No torch.

A time is a range: work / published peak at the shares of it that eager transformers code reaches. No GPU of a reader has been timed for it.
"""

import re
import shutil
import subprocess
from typing import NamedTuple

from posttrain.errors import PosttrainError


class Card(NamedTuple):
    """gigabytes of memory; flops: dense bf16 products a second with float32 sums; bandwidth: bytes a second; both as published, of one card."""

    name: str
    gigabytes: float
    flops: float
    bandwidth: float
    count: int = 1


# NVIDIA's data sheets and architecture white papers; without the sparsity that doubles the printed figures
CARDS = (Card("L4", 24, 121e12, 300e9), Card("A10", 24, 125e12, 600e9), Card("RTX 3090", 24, 71e12, 936e9), Card("RTX 4090", 24, 165e12, 1008e9),
         Card("RTX 5090", 32, 209e12, 1792e9), Card("A100 40GB", 40, 312e12, 1555e9), Card("RTX A6000", 48, 155e12, 768e9),
         Card("L40S", 48, 362e12, 864e9), Card("A100 80GB", 80, 312e12, 2039e9), Card("H100", 80, 989e12, 3350e9), Card("H200", 141, 989e12, 4800e9),
         Card("B200", 180, 2250e12, 8000e9))
TYPICAL = ("RTX 3090", "RTX 5090", "A100 40GB", "RTX A6000", "A100 80GB", "H200", "B200")  # where only the memory is given
COMPUTE, READING = (0.6, 0.2), (0.7, 0.1)  # shares of the published peaks, best and worst: training and scoring; decoding, which reads weights


def parse(gpu: str | float) -> Card:
    """'24GB', 24, 'RTX 4090' or '8x80GB' -> a card. Of a memory alone: a typical card with so much. Raises PosttrainError."""
    count, _, what = re.fullmatch(r"\s*(?:(\d{1,5})\s*(x)\s*)?(.*?)\s*", str(gpu), re.IGNORECASE | re.DOTALL).groups()
    amount = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(?:gi?b?)?", what, re.IGNORECASE)
    found = named(what)
    if amount and float(amount[1]) > 0:
        size = float(amount[1])
        typical = [c for c in CARDS if c.name in TYPICAL]
        found = next((c for c in typical if c.gigabytes >= size), typical[-1])._replace(gigabytes=size)
    if found is None or count == "0":
        raise PosttrainError(f"--gpu {gpu}", "not an amount of memory and not a card that is known", "gigabytes, such as 24GB or 8x80GB, or one of "
                             + ", ".join(c.name for c in CARDS), "Write --gpu 24GB.")
    return found._replace(count=int(count or 1))


def named(text: str, gigabytes: float | None = None) -> Card | None:
    """The card whose name's words are all in a text, such as nvidia-smi's 'NVIDIA A100-SXM4-80GB'; of several the one nearest in memory."""
    words = set(re.findall(r"[a-z0-9]+", text.lower()))
    fitting = [c for c in CARDS if set(re.findall(r"[a-z0-9]+", re.sub(r" \d+GB", "", c.name).lower())) <= words]
    size = gigabytes or next((float(w[:-2]) for w in words if re.fullmatch(r"\d{1,4}gb", w)), None)
    return min(fitting, key=lambda c: (abs(c.gigabytes - size) if size else 0, -len(c.name)), default=None)


def present() -> Card | None:
    """The smallest NVIDIA GPU of this machine; None: there is none, or nvidia-smi does not say."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        told = subprocess.run(["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10)
        size, name = min((float(mib) * 2**20 / 1e9, name.strip()) for mib, name in (line.split(",", 1) for line in told.stdout.strip().splitlines()))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    known = named(name, size) or parse(size)
    return known._replace(name=name, gigabytes=size)


def seconds(card: Card, flop: float, read: float) -> tuple[float, float]:
    """(least, most) seconds of so many operations and, one after the other, bytes read by decoding."""
    return tuple((flop / card.flops / c + read / card.bandwidth / r) / card.count for c, r in zip(COMPUTE, READING, strict=True))


def span(low: float, high: float) -> str:
    """'2 to 7 hours', '40 seconds to 3 minutes'."""
    def words(value: float) -> tuple[str, str]:
        size, unit = next(((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes")) if value >= 2 * s), (1, "seconds"))
        return f"{value / size:.0f}", unit

    (a, unit), (b, other) = words(low), words(high)
    return f"{a} to {b} {unit}" if unit == other else f"{a} {unit} to {b} {other}"
