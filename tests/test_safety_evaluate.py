"""The comparison's checks and their words."""

from types import SimpleNamespace

import pytest

from safety.evaluate import _checks, difference


def rows(*merged: float) -> list[dict]:
    return [{"merged": m, "helpfulness": m, "safety": 0.0, "tokens": 5} for m in merged]


@pytest.mark.parametrize("after, before, groups, met, detail", [
    (rows(1, 2, 3), rows(1, 2, 3), "abc", False, "+0.000, no difference at all"),
    (rows(1, 2), rows(0, 3), "aa", False, "+0.000, one prompt only"),
    (rows(2, 3, 4), rows(1, 2, 3), "abc", True, "+1.000, the same for every prompt"),
    (rows(0, 1, 2), rows(1, 2, 3), "abc", False, "-1.000, the same for every prompt"),
    (rows(1, 2, 4), rows(0, 2, 2), "abc", False, "+1.000, 1.7 standard errors"),
])
def test_the_rise_is_told_truly_where_there_is_no_spread(after, before, groups, met, detail):
    row = difference(after, before, list(groups), 0.0) | {"kl": 0.0, "a": "new", "b": "old"}
    check = _checks(SimpleNamespace(max_sequence_kl=None), row)[0]
    assert check == {"name": "new over old: merged reward rises by more than two standard errors", "met": met, "detail": detail}
