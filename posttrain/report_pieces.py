"""What the report's parts are made of: figures with their findings, tables, folds, and the rows that fill a table."""

from collections.abc import Callable
from dataclasses import dataclass, field

from posttrain import plots
from posttrain.plots import Dot
from posttrain.report_views import Interval, View, cell, dig, fixed, interval, listed, loose, plural, sentence, text_of

LONG_CELL = 60  # characters from which a cell is text to read


@dataclass
class Figure:
    title: str
    takeaway: str
    svg: str
    alt: str
    note: str = ""
    wide: bool = False


@dataclass
class Table:
    caption: str
    head: list[str]
    rows: list[list]
    note: str = ""

    @property
    def texts(self) -> set[int]:
        """Places of the columns that hold texts to read."""
        return {i for row in self.rows for i, c in enumerate(row) if isinstance(c, str) and len(c) > LONG_CELL}


@dataclass
class Fold:
    """Something shown closed."""

    summary: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def prose(self) -> bool:
        """Whether its tables hold texts and not numbers alone."""
        return any(t.texts for t in self.tables)


@dataclass
class Part:
    """One heading of the page. facts: narrow tables that stand among the figures; tables: wide ones below them."""

    id: str
    title: str
    intro: str = ""
    figures: list[Figure] = field(default_factory=list)
    facts: list[Table] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def drawn(title: str, takeaway: str, what: str, svg: str, note: str = "") -> list[Figure]:
    """A figure whose words for the blind are what it shows, then what it says."""
    takeaway = sentence(takeaway)
    return [Figure(title, takeaway, svg, f"{sentence(what)} {takeaway}", note)]


def named(vs: list[View], v: View, text: str) -> str:
    """A title, with the section's name where several sections share a part."""
    return f"{text} ({v.name})" if len(vs) > 1 else text


def table(caption: str, first: str, names: list, columns: list[tuple[str, list]], note: str = "") -> list[Table]:
    """A table with a row a name; a column without any value is left out, and the table with it when none is left."""
    columns = [(head, cells) for head, cells in columns if any(c not in ("–", None) for c in cells)]
    rows = [[name, *(cells[i] for _, cells in columns)] for i, name in enumerate(names)]
    return [Table(caption, [first, *(head for head, _ in columns)], rows, note)] if columns else []


def facts(caption: str, vs: list[View], names: list[str], rows: list[tuple[str, Callable]], note: str = "") -> list[Table]:
    """A table with a column a section and a row a measure; a row without any value is left out."""
    filled = [[label, *(read(v) for v in vs)] for label, read in rows]
    filled = [row for row in filled if any(c != "–" for c in row[1:])]
    return [Table(caption, ["", *names], filled, note)] if filled else []


def at(*keys: str, form: Callable = loose, **kw) -> Callable:
    """A row of `facts`: a number of results.json."""
    return lambda v: form(v.get(*keys), **kw)


def ci(*keys: str, form: Callable = fixed, **kw) -> Callable:
    """A row of `facts`: a value of results.json with its interval."""
    return lambda v: cell(interval(dig(v.results, *keys)), form, **kw)


def average(key: str, digits: int = 0) -> Callable:
    """A row of `facts`: a metric's mean over all steps."""
    return lambda v: fixed(v.mean(key), digits)


def said(*keys: str) -> Callable:
    """A row of `facts`: a word, a switch or a list of results.json."""
    def read(v: View) -> str:
        value = dig(v.results, *keys)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return plots.short(value, 200)
        return ", ".join(text_of(x) for x in value) or "–" if isinstance(value, list) else loose(value)
    return read


def everything(vs: list[View]) -> list[Fold]:
    """A closed panel a section, with a small curve of every metric it recorded."""
    out = []
    for v in vs:
        keys = list(dict.fromkeys(k for r in v.metrics for k in r if k not in ("step", "time")))
        series = [s for k in keys[:40] if (s := v.line(k, k.partition("/")[2] or k, points=120)) and len(s.xs) > 1]
        if series:
            alt = f"Small curves of {listed([s.label for s in series])}."
            figure = Figure("", "", plots.grid(f"all-{v.name}", series, "step"), alt, wide=True)
            out.append(Fold(f"Everything {v.name} recorded ({plural(len(series), 'metric')})", [figure]))
    return out


def some(*found):
    """The values that are there."""
    return [x for x in found if x is not None]


def dot(value: Interval | None, label: str = "", **kw) -> Dot | None:
    return Dot(label, value.mean, value.low, value.high, **kw) if value else None
