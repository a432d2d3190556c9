"""What a run tells: metrics.jsonl (the only place numbers live), samples.jsonl, progress with ETA, plain sentences."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from posttrain import distributed

PROGRESS = ".progress.json"  # in the run's folder, while something long is under way

_console = Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())  # of several processes one speaks


def say(text: str = "", style: str | None = None) -> None:
    """One line for the person watching."""
    _console.print(text, style=style, markup=False)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """'42 s', '3 min 10 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def rate_words(rate: float | None) -> list[str]:
    """['812 tokens/s'], or nothing."""
    return [] if rate is None else [f"{rate:,.0f} tokens/s"]


def append_line(path: Path, row: dict) -> None:
    """Append one JSON line. After a crash in the middle of a line the broken tail is cut off first. Of several processes one writes."""
    if not distributed.is_main():
        return
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as f:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.seek(0)
                whole = f.read().rfind(b"\n") + 1
                f.truncate(whole)
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; a line cut short by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines would also cut at U+2028 and U+0085 inside an answer
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read_whole(path: Path) -> dict:
    """A JSON object in a file, or {} where it is not there, not whole or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Log:
    """One section's metrics, samples and progress."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def metrics(self, step: int, values: dict) -> None:
        """Append {'step', 'time', 'stage/thing': number, ...} to metrics.jsonl. Numbers must be finite or None."""
        clean = {}
        for key, value in values.items():
            value = value.item() if hasattr(value, "item") else value
            clean[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        append_line(self.folder / "metrics.jsonl", {"step": step, "time": round(time.time(), 3), **clean})

    def samples(self, rows: list[dict]) -> None:
        for row in rows:
            append_line(self.folder / "samples.jsonl", row)

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed section says everything once."""
        for name in ("metrics.jsonl", "samples.jsonl") if distributed.is_main() else ():
            path = self.folder / name
            kept = [r for r in read_lines(path) if r.get("step", 0) <= step]
            if path.exists():
                text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
                tmp = path.with_suffix(".tmp")
                tmp.write_text(text, encoding="utf-8")
                tmp.replace(path)

    def say(self, text: str) -> None:
        say(f"  {text}")

    def progress(self, total: int, what: str, unit: str = "step", done: int = 0, together: bool = False) -> "Ticker":
        return Ticker(total, f"{self.name}: {what}", unit, done, together=together, file=self.folder.parent / PROGRESS)


class Ticker:
    """Progress of long work: a live bar on a terminal, a plain line every few seconds elsewhere. Use as a context manager.

    together: several processes share the work, each tells its own part, and all of it is shown. file: where it stands, for who looks on from another
    program; there while the work lasts.
    """

    def __init__(self, total: int, what: str, unit: str, done: int = 0, every: float = 15.0, together: bool = False, file: Path | None = None):
        self.total, self.what, self.unit, self.first, self.every = max(total, 1), what, unit, done, every
        self.steps, self.tokens = distributed.Count(together), distributed.Count(together)
        self.start = self.last = self.told = time.time()
        self.untold, self.note = 0, ""
        self.file, self.kept = file if distributed.is_main() else None, 0.0
        self.bar = None
        if _console.is_terminal:  # rich's own estimate looks back 30 seconds: it has none where a step takes longer
            self.bar = Progress(TextColumn("  {task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(),
                                TextColumn("{task.fields[left]} left  {task.fields[note]}"), console=_console, transient=True)
            self.task = self.bar.add_task(what, total=self.total, completed=done, left="?", note="")

    def __enter__(self):
        if self.bar:
            self.bar.start()
        self._keep(self.start, self.first, None, None)
        return self

    def __exit__(self, kind, *_):
        if self.bar:
            self.bar.stop()
        if self.file:
            with suppress(OSError):
                self.file.unlink()
        if kind is None:
            done, took = self._done(), time.time() - self.start
            say(f"  {', '.join([f'{self.what}: {done} {self.unit}s in {duration(took)}', *rate_words(self._rate(took))])}")

    def advance(self, n: int = 1, note: str = "") -> None:
        """n units more are done. note: what to say of them."""
        self.steps.add(n)
        self.note = note
        self._show()

    def made(self, tokens: int) -> None:
        """That many tokens more, as a unit is being made: for the tokens per second."""
        self.untold += tokens
        if time.time() - self.told >= 1:
            self._show()

    def _done(self) -> int:
        return self.first + self.steps.add(0)

    def _rate(self, seconds: float) -> float | None:
        """Tokens per second, where tokens are told."""
        made, self.untold = self.tokens.add(self.untold), 0
        return made / max(seconds, 1e-9) if made else None

    def _keep(self, now: float, done: int, left: float | None, rate: float | None) -> None:
        """Write the file, at most every two seconds. It is no part of the work: a full disk does not stop it."""
        if self.file and now - self.kept >= 2:
            self.kept = now
            with suppress(OSError):
                tmp = self.file.with_suffix(".tmp")
                tmp.write_text(json.dumps({"what": self.what, "unit": self.unit, "done": done, "total": self.total, "left": left,
                                           "tokens_per_second": rate, "note": self.note, "time": now}), encoding="utf-8")
                tmp.replace(self.file)

    def _show(self) -> None:
        now, done = time.time(), self._done()
        self.told = now
        rate = self._rate(now - self.start)
        notes = [*rate_words(rate), *([self.note] if self.note else [])]
        seconds = (self.total - done) * (now - self.start) / (done - self.first) if done > self.first else None
        left = "?" if seconds is None else duration(seconds)
        self._keep(now, done, seconds, rate)
        if self.bar:
            self.bar.update(self.task, completed=done, left=left, note=", ".join(notes))
        elif now - self.last >= self.every and done < self.total:
            self.last = now
            say(f"  {', '.join([f'{self.what}: {done}/{self.total} {self.unit}s, {left} left', *notes])}")
