"""Progress of long work: what is done, what is left, tokens per second; on a terminal and elsewhere."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from posttrain import log
from posttrain.log import Ticker


@pytest.fixture
def clock(monkeypatch):
    """clock.now is the time; clock.said the lines."""
    told = SimpleNamespace(now=1000.0, said=[])
    monkeypatch.setattr(log, "time", SimpleNamespace(time=lambda: told.now))
    monkeypatch.setattr(log, "say", told.said.append)
    return told


def test_tokens_are_told_while_a_unit_is_being_made(clock):
    """By hand: 2,000 tokens in 20 s; then one chunk in 40 s, of which two are left; 4,500 tokens in 60 s."""
    with Ticker(4, "s: sampling", "chunk", done=1) as ticker:
        for clock.now, tokens in ((1000.5, 100), (1010, 900), (1020, 1000)):
            ticker.made(tokens)
        assert clock.said.pop() == "  s: sampling: 1/4 chunks, ? left, 100 tokens/s" and not clock.said
        clock.now = 1025
        ticker.made(500)
        clock.now = 1040
        ticker.made(1500)
        ticker.advance()
        assert clock.said == ["  s: sampling: 1/4 chunks, ? left, 100 tokens/s"]  # one line in 15 seconds
        clock.now = 1060
        ticker.made(500)
        assert clock.said[1:] == ["  s: sampling: 2/4 chunks, 2 min 00 s left, 75 tokens/s"]
    assert clock.said[2:] == ["  s: sampling: 2 chunks in 1 min 00 s, 75 tokens/s"]


def test_a_note_stands_by_what_is_left(clock):
    with Ticker(3, "ppo: PPO", "iteration") as ticker:
        clock.now += 20
        ticker.advance(1, note="reward 0.500")
        clock.now += 40
        ticker.advance(2, note="reward 0.600")
    assert clock.said == ["  ppo: PPO: 1/3 iterations, 40 s left, reward 0.500", "  ppo: PPO: 3 iterations in 1 min 00 s"]


def test_a_terminal_shows_what_is_left_of_units_that_take_minutes(clock, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr(log, "_console", screen)
    with Ticker(10, "s: sampling", "chunk") as ticker:
        for _ in range(4):
            clock.now += 45
            ticker.made(9000)
            ticker.advance(1, note="fine")
        ticker.bar.refresh()
    assert "4 min 30 s left  200 tokens/s, fine" in screen.file.getvalue()
