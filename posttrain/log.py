"""What a run tells: metrics.jsonl (the only place numbers live), samples.jsonl, progress with ETA, plain sentences."""

import json
import math
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from posttrain import distributed

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
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines would also cut at U+2028 and U+0085 inside an answer
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


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

    def progress(self, total: int, what: str, unit: str = "step", done: int = 0) -> "Ticker":
        return Ticker(total, f"{self.name}: {what}", unit, done)


class Ticker:
    """Progress of long work: a live bar on a terminal, a plain line every few seconds elsewhere. Use as a context manager."""

    def __init__(self, total: int, what: str, unit: str, done: int = 0, every: float = 15.0):
        self.total, self.what, self.unit, self.done, self.every = max(total, 1), what, unit, done, every
        self.start = self.last = time.time()
        self.first = done
        self.bar = None
        if _console.is_terminal:
            self.bar = Progress(TextColumn("  {task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
                                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                                console=_console, transient=True)
            self.task = self.bar.add_task(what, total=self.total, completed=done, note="")

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind, *_):
        if self.bar:
            self.bar.stop()
        if kind is None:
            took = time.time() - self.start
            say(f"  {self.what}: {self.done} {self.unit}s in {duration(took)}")

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=note)
            return
        now = time.time()
        if now - self.last >= self.every and self.done < self.total:
            self.last = now
            rate = (self.done - self.first) / max(now - self.start, 1e-9)
            left = duration((self.total - self.done) / rate) if rate else "?"
            say(f"  {self.what}: {self.done}/{self.total} {self.unit}s, {left} left{', ' + note if note else ''}")
