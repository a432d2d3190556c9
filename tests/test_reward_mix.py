"""The two mixes, by counting rows."""

import pytest

from posttrain.formats import Pair
from reward.mix import mix


def pairs(n: int, source: str) -> list[Pair]:
    return [Pair([{"role": "user", "content": f"{source} {i}"}], "a", "b", source=source) for i in range(n)]


@pytest.mark.parametrize("own, other, share, expected", [
    (100, 100, 0.5, (100, 100)), (100, 400, 0.5, (100, 100)),  # the other side is cut to as many
    (100, 30, 0.5, (30, 30)),  # other is short: own is cut
    (90, 500, 0.9, (90, 10)), (180, 10, 0.9, (90, 10)), (9, 5, 0.9, (9, 1)), (900, 100, 0.9, (900, 100)),
    (5, 100, 0.9, (5, 1)),  # 0.56 rounds up to one
    (4, 100, 0.9, (4, 0)),  # and 0.44 down to none
    (100, 0, 0.5, (100, 0)), (100, 50, 1.0, (100, 0)),
    (10, 1000, 0.25, (10, 30)), (1000, 30, 0.25, (10, 30)), (3, 1, 0.5, (1, 1))])
def test_row_counts(own, other, share, expected):
    rows, told = mix(pairs(own, "own"), pairs(other, "other"), share, 0)
    assert (told["own"], told["other"]) == expected and len(rows) == sum(expected)
    assert told["by_source"] == {k: v for k, v in zip(("own", "other"), expected, strict=True) if v}
    assert len({p.prompt[0]["content"] for p in rows}) == len(rows)  # no row twice
    if min(expected) >= 10:
        assert expected[0] / sum(expected) == pytest.approx(share, abs=0.02)


def test_the_sample_is_fixed_by_the_seed_and_spreads_over_the_rows():
    own, other = pairs(50, "own"), pairs(500, "other")
    first, again, another = (mix(own, other, 0.5, seed)[0] for seed in (0, 0, 1))
    assert first == again != another and first[:50] == own
    places = [int(p.prompt[0]["content"].split()[1]) for p in first[50:]]
    assert places == sorted(places) and max(places) > 400 and min(places) < 100


def test_sources_are_counted():
    rows, told = mix(pairs(2, "a") + pairs(2, "b"), pairs(9, "c"), 0.5, 0)
    assert told == {"own": 4, "other": 4, "by_source": {"a": 2, "b": 2, "c": 4}} and len(rows) == 8


def test_a_row_on_both_sides_counts_as_own():
    both = pairs(6, "both")
    rows, told = mix(both, [*both[:4], *pairs(20, "other")], 0.5, 0)
    assert (told["own"], told["other"]) == (6, 6) and len({p.prompt[0]["content"] for p in rows}) == 12
    rows, told = mix(both, both[:4], 0.5, 0)
    assert (told["own"], told["other"]) == (6, 0)
