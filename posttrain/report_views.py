"""What the report reads: section folders as they are, numbers that may be missing, and the words for them.

Nothing here raises on what a stage wrote: a value that is absent, null, not finite or of the wrong type reads as None.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from posttrain import config as cfg
from posttrain.log import read_lines
from posttrain.plots import UNSHOWN, Line, short
from posttrain.runs import Run, is_done

CURVE_POINTS = 300
LONGEST = 3000  # characters of an answer or a turn on the page
GAP = "\u00a0"  # keeps a number and its unit on one line


# ---------------------------------------------------------------- numbers and words

@dataclass
class Interval:
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def bounded(self) -> bool:
        return self.low is not None and self.high is not None

    def excludes(self, value: float) -> bool:
        return self.bounded and not self.low <= value <= self.high


def number(value) -> float | None:
    """A finite float of a size worth printing, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e15 else None  # nan and inf compare false


def is_unsafe(safety, threshold) -> bool | None:
    """Whether sigma(safety score) is below the threshold, a share; None where one of them is not known."""
    score, share = number(safety), number(threshold)
    return score < math.log(share / (1 - share)) if score is not None and share is not None and 0 < share < 1 else None


def word(value, otherwise: str = "unnamed") -> str:
    """A name from data: a string or a number, else `otherwise`."""
    return value if isinstance(value, str) and value else loose(value) if number(value) is not None else otherwise


def dig(value, *keys):
    """value[k1][k2]... or None where the road ends."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def table_of(value) -> dict[str, dict]:
    """The entries of a dict that are dicts themselves."""
    return {str(k): v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def ends_of(found: list) -> list:
    """The first and the last."""
    return found[:1] + found[1:][-1:]


def rows_of(value) -> list[dict]:
    """The entries of a list that are dicts."""
    return [r for r in value if isinstance(r, dict)] if isinstance(value, list) else []


def interval(value) -> Interval | None:
    """{"mean", "low", "high"} or a bare number -> Interval."""
    if not isinstance(value, dict):
        value = {"mean": value}
    mean, low, high = (number(value.get(k)) for k in ("mean", "low", "high"))
    return None if mean is None else Interval(mean, low, high)


def fixed(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """'1,234.50', '−0.36', '+0.36'; a zero has no sign; '–' for None."""
    if value is None:
        return "–"
    if abs(value) >= 1e9:
        return loose(value)
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return (text if text.strip("+-0.,") else text.lstrip("+-")).replace("-", "−")


def loose(value) -> str:
    """A number of unknown size in four digits, or any other value in few words."""
    x = number(value)
    if x is None:
        if value is None or isinstance(value, float):
            return "–"
        return short(value if isinstance(value, str) else json.dumps(value, default=str), 60)
    return (f"{int(x):,}" if x == int(x) else f"{x:.4g}").replace("-", "−")


def percent(value: float | None, digits: int = 0, sign: bool = False) -> str:
    """A share as '63 %'; a difference of shares (sign) as '+8 pts'."""
    return "–" if value is None else fixed(100 * value, digits, sign) + GAP + ("pts" if sign else "%")


def bounds(value: Interval, form: Callable = fixed, **kw) -> str:
    """' (95 % interval 0.21 to 0.51)', or nothing."""
    return f" (95{GAP}% interval {form(value.low, **kw)} to {form(value.high, **kw)})" if value.bounded else ""


def cell(value: Interval | None, form: Callable = fixed, **kw) -> tuple[str, str] | str:
    """A table cell: the value, and its interval on a smaller line."""
    if value is None:
        return "–"
    mean = form(value.mean, **kw)
    return (mean, f"{form(value.low, **kw)} to {form(value.high, **kw)}") if value.bounded else mean


def moved(what: str, before: float, after: float, digits: int = 2, unit: str = "") -> str:
    """'Held-out loss fell from 2.31 to 1.87 nats per token', judged on the digits shown."""
    old, new, unit = fixed(before, digits), fixed(after, digits), f" {unit}" if unit else ""
    if old == new:
        return f"{what} stayed at {new}{unit}"
    return f"{what} {'fell' if after < before else 'rose'} from {old} to {new}{unit}"


def listed(words: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")


def plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def plain(name) -> str:
    return str(name).replace("_", " ")


def text_of(content) -> str:
    """A message's content: a string, or parts with a text each."""
    if isinstance(content, str):
        return UNSHOWN.sub("\ufffd", content)
    if isinstance(content, list):
        return "\n".join(text_of(c.get("text") if isinstance(c, dict) else c) for c in content)
    return word(content, "")


def clip(text, length: int) -> tuple[str, int]:
    """A text cut to what the page shows, and how many characters were cut."""
    text = text_of(text)
    return (text, 0) if len(text) <= length else (text[:length] + "…", len(text) - length)


def turns(prompt) -> list[dict]:
    """A prompt (messages or a string) -> [{"role", "text"}], at least one."""
    messages = prompt if isinstance(prompt, list) and prompt else [prompt]
    rows = [(word(m.get("role"), "user"), m.get("content")) if isinstance(m, dict) else ("user", m) for m in messages]
    return [{"role": role, "text": clip(content, LONGEST)[0]} for role, content in rows]


# ---------------------------------------------------------------- what is on disk

@dataclass(eq=False)
class View:
    """One section as its folder shows it."""

    name: str
    kind: str
    folder: Path
    state: str = "not run"  # 'done', 'unfinished' or 'not run'
    manifest: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    run: list["View"] = field(default_factory=list, repr=False)  # every section of its run, parents first
    gone: bool = False  # left over: the recipe no longer has it
    elsewhere: bool = False  # of another run, shown beside this one

    @property
    def seconds(self) -> float | None:
        return number(self.manifest.get("seconds"))

    @property
    def last_step(self) -> int | None:
        steps = [s for s in (number(r.get("step")) for r in self.metrics) if s is not None]
        return int(max(steps)) if steps else None

    def get(self, *keys) -> float | None:
        return number(dig(self.results, *keys))

    def series(self, key: str, points: int = CURVE_POINTS) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric; long series are averaged down to about `points`."""
        found = [(number(r.get("step")), number(r.get(key))) for r in self.metrics]
        found = sorted((x, y) for x, y in found if x is not None and y is not None)
        size = -(-len(found) // points) or 1
        chunks = [found[i:i + size] for i in range(0, len(found), size)]
        return [sum(x for x, _ in c) / len(c) for c in chunks], [sum(y for _, y in c) / len(c) for c in chunks]

    def line(self, key: str, label: str, style: int = 0, quiet: bool = False, points: int = CURVE_POINTS) -> Line | None:
        """A metric as a plot's series, or None where it was never recorded."""
        xs, ys = self.series(key, points)
        return Line(label, xs, ys, style, quiet=quiet) if xs else None

    def mean(self, key: str) -> float | None:
        _, ys = self.series(key, points=10**9)
        return sum(ys) / len(ys) if ys else None

    def ends(self, key: str) -> tuple[float, float, int] | None:
        """Means of the first and of the last tenth of a series, and how many steps each covers."""
        _, ys = self.series(key, points=10**9)
        n = max(1, len(ys) // 10)
        return (sum(ys[:n]) / n, sum(ys[-n:]) / n, n) if len(ys) > 1 else None

    def samples(self, file: str = "samples.jsonl") -> list[dict]:
        return [r for r in _guard(lambda: read_lines(self.folder / file), []) if isinstance(r, dict)]

    def first_samples(self, lines: int) -> list[dict]:
        """The first rows of a file that may be long."""
        def read():
            with (self.folder / "samples.jsonl").open(encoding="utf-8") as f:
                return [json.loads(line) for line in islice(f, lines)]
        return rows_of(_guard(read, []))

    def config_text(self) -> str:
        return _guard(lambda: (self.folder / "config.yaml").read_text(encoding="utf-8"), "")


def models_of(v: View) -> dict[str, dict]:
    """What a section measured of each of its models."""
    return table_of(v.results.get("models"))


def _guard(read, otherwise):
    try:
        return read()
    except (OSError, ValueError):
        return otherwise


def _json(path: Path, notes: list[str]) -> dict:
    if not path.exists():
        return {}
    value = _guard(lambda: json.loads(path.read_text(encoding="utf-8")), None)
    if not isinstance(value, dict):
        notes.append(f"{path.name} can't be read; its numbers are left out")
    return value if isinstance(value, dict) else {}


def look(folder: Path, name: str, kind: str) -> View:
    """A section's folder -> View. The state is what the folder says; whether the recipe changed since is for `run` to judge."""
    view = View(name, kind, folder)
    view.manifest = _json(folder / "manifest.json", view.notes)
    if not view.manifest:
        view.state = "unfinished" if view.notes else "not run"
        return view
    view.state = "done" if _guard(lambda: is_done(folder, view.manifest.get("fingerprint")), False) else "unfinished"
    view.kind = word(view.manifest.get("kind"), kind)
    view.results = _json(folder / "results.json", view.notes)
    view.metrics = [r for r in _guard(lambda: read_lines(folder / "metrics.jsonl"), []) if isinstance(r, dict)]
    if view.manifest.get("exact") is False:
        why = view.manifest.get("inexact_because")
        view.notes.append("not bit-exact" + (f": {'; '.join(map(str, why))}" if isinstance(why, list) and why else ""))
    return view


def views(run: Run) -> list[View]:
    """Every section of the recipe, parents first, then finished folders the recipe no longer names. A run known by its folder alone (no stages): its
    sections in the order in which they began."""
    out = [look(run.folder / n, n, run.recipe.stages[n].stage) for n in cfg.order(run.recipe)]
    known = {v.name for v in out}
    others = sorted(p.parent for p in run.folder.glob("*/manifest.json")) if run.folder.is_dir() else []
    for folder in others:
        if folder.name not in known and not folder.name.startswith("."):
            view = look(folder, folder.name, "unknown")
            if run.recipe.stages:
                view.notes.append("the recipe no longer has this section")
                view.gone = True
            out.append(view)
    if not run.recipe.stages:
        out.sort(key=lambda v: word(v.manifest.get("started"), "~"))
    for view in out:
        view.run = out
    return out


def views_beside(run: Run, kind: str) -> list[View]:
    """The sections of one kind of another run, named with it."""
    out = [v for v in views(run) if v.kind == kind and v.results]
    for view in out:
        view.name, view.elsewhere = f"{run.recipe.run.name}/{view.name}", True
        view.manifest.setdefault("section", view.name.rpartition("/")[2])
    return out
