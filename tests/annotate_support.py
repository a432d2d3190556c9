"""What the tests of the annotation page share: task files, one annotator behind the test client, and answers in the place of live models."""

import json
import os
import re
import tempfile
from html import unescape
from itertools import count
from pathlib import Path

from sqlalchemy import select, update

from posttrain.annotate import tasks
from posttrain.annotate.store import Store, answers, events, pack, slots
from posttrain.annotate.work import Desk

_number = count(1)


def quick_folder():
    """A folder in memory, where there is one: every click waits for the disk, and most tests are about something else. A fixture's body."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


def token() -> str:
    return f"token-{next(_number):08d}"


def rows(n: int, safety: bool = False, **more) -> list[dict]:
    return [{"prompt": f"Question {i}?", "answer_a": f"First {i}.", "answer_b": f"Second {i}.", "model_a": "v4 at 1", "model_b": "v3 at 0.8",
             "is_safety": safety, **more} for i in range(n)]


def write(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")
    return path


def filled(folder: Path, found: list[dict], kind: str = "auto", batch: str = "week_1", raters: int | None = None, share: float = 1.0,
           name: str = "a.db") -> Store:
    """A store with the tasks of these rows."""
    store = Store(folder / name)
    tasks.load(store, batch, tasks.read(write(folder / f"{batch}.jsonl", found), kind), raters, share)
    return store


class Person:
    """One annotator at the desk, below HTTP. do('answer choice 1') clicks on the task at hand."""

    def __init__(self, store: Store, name: str = "ann", queue: int = 1, live: bool = False, **more):
        self.desk, self.name, self.queue = Desk(store, live, **more), name, queue

    def look(self):
        return self.desk.look(self.queue, self.name)

    def do(self, what: str, text: str = "", sent: str | None = None, task: str | None = None, turn: int | None = None):
        state = self.look()
        at = (state.task, len(state.turns)) if state else ("", 0)
        return self.desk.act(self.queue, self.name, sent or token(), at[0] if task is None else task, at[1] if turn is None else turn, what, text)

    def prefer(self, side: str, degree: int) -> None:
        """Choose the first ('a') or second answer, wherever it stands."""
        state = self.look()
        question = state.kind.questions[0]
        self.do(f"answer choice {question.shown((side, degree), state.swapped(len(state.turns) - 1))}")

    def judge(self, side: str = "a", degree: int = 2, bin_: int | None = None, ideal: str = "") -> str:
        """A whole task; returns its id."""
        task = self.look().task
        self.prefer(side, degree)
        if bin_:
            self.do(f"answer bin {bin_}")
        if ideal:
            self.do("ideal", ideal)
        self.do("finish")
        return task


def reply(store: Store) -> list[str]:
    """Write the answers that wait, as a worker does. Returns their keys."""
    with store.write() as c:
        waiting = c.execute(select(answers).where(answers.c.state == "waiting").order_by(answers.c.asked)).mappings().all()
        for r in waiting:
            said = [{"text": f"Reply {next(_number)}.", "model": name} for name in ("new at 0.8", "old at 1")[:r["wanted"]]]
            c.execute(update(answers).where(answers.c.key == r["key"]).values(state="ready", answers=pack(said)))
    return [r["key"] for r in waiting]


def stored(store: Store) -> list[tuple]:
    """(annotator, task, action) of every event that counts."""
    with store.read() as c:
        return [tuple(r) for r in c.execute(select(events.c.annotator, events.c.task, events.c.action).where(events.c.undone_by.is_(None))
                                            .order_by(events.c.id))]


def slots_of(store: Store) -> list[dict]:
    with store.read() as c:
        return [dict(r) for r in c.execute(select(slots).order_by(slots.c.place, slots.c.number)).mappings()]


# -- the page over HTTP ----------------------------------------------------------------------------------------------------------------


def hidden(html: str) -> dict[str, str]:
    return {k: unescape(v) for k, v in re.findall(r'<input type="hidden" name="(token|task|turn)" value="([^"]*)"', html)}


def buttons(html: str) -> list[str]:
    return [unescape(v) for v in re.findall(r'<button[^>]*name="do" value="([^"]*)"', html)]


def notice(html: str) -> str:
    found = re.search(r'<p class="notice" role="alert">(.*?)</p>', html, re.DOTALL)
    return unescape(found[1]) if found else ""
