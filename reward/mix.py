"""The two mixes (paper section 3.2.2): helpfulness own : other = 50 : 50, safety 90 : 10, by rows, the larger side sub-sampled."""

import random

from posttrain.data import content, first_prompts, pick
from posttrain.formats import Pair
from posttrain.plan import fraction_rows


def mix(own: list[Pair], other: list[Pair], own_share: float, seed: int, fraction: float = 1.0) -> tuple[list[Pair], dict]:
    """One pass's rows and their composition. A row present on both sides counts as own. fraction: of each side of the mix, see `part`."""
    rng, mine = random.Random(seed), {content(p) for p in own}
    other = [p for p in other if content(p) not in mine]
    if not other or own_share >= 1:
        chosen_own, chosen_other = list(own), []
    else:
        wanted_other = round(len(own) * (1 - own_share) / own_share)
        wanted_own = len(own)
        if wanted_other > len(other):
            wanted_other, wanted_own = len(other), min(len(own), max(1, round(len(other) * own_share / (1 - own_share))))
        chosen_own = pick(own, wanted_own, rng)
        chosen_other = pick(other, wanted_other, rng)
    chosen_own, chosen_other = part(chosen_own, fraction, seed), part(chosen_other, fraction, seed)
    by_source: dict[str, int] = {}
    for pair in [*chosen_own, *chosen_other]:
        by_source[pair.source] = by_source.get(pair.source, 0) + 1
    return [*chosen_own, *chosen_other], {"own": len(chosen_own), "other": len(chosen_other), "by_source": by_source}


def part(pairs: list[Pair], fraction: float, seed: int) -> list[Pair]:
    """A fraction of the pairs, by prompt: the pairs of 0.25 contain those of 0.125."""
    return pairs if fraction >= 1 else [pairs[i] for i in first_prompts(pairs, fraction_rows(len(pairs), fraction), seed)]


def without_unsafe_preferred(pairs: list[Pair]) -> tuple[list[Pair], int]:
    """The pairs but for those whose chosen answer is labelled unsafe and whose other is safe (paper section 3.2.1), and how many those are."""
    kept = [p for p in pairs if not p.unsafe_preferred]
    return kept, len(pairs) - len(kept)
