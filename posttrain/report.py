"""The report of a run: `write` makes one self-contained HTML page, `show` a terminal table.

Both read run folders only: no model, no data set, no torch. What is missing, unfinished, damaged or of an unknown kind is shown as
such, never an error. Every sentence on the page is computed from the numbers beside it. A new stage kind gets its own part with one
entry in PARTS and its key figures with one in KEYS, at the bottom; without them it is shown by the numbers it stored.
"""

import base64
import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from posttrain import config as cfg
from posttrain import plots
from posttrain.log import duration, read_lines
from posttrain.plots import Dot, Line
from posttrain.runs import Run, write_atomic

STAND_IN = "builtin:smollm2-135m-instruct"
ANSWER_CHARACTERS, ANSWER_HEAD, PROMPTS_ON_PAGE, PROMPTS_AT_FIRST, CURVE_POINTS = 3000, 700, 400, 6, 300
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
FAULTS = (TypeError, KeyError, ValueError, IndexError, AttributeError, ZeroDivisionError, OverflowError)


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
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def dig(value, *keys):
    """value[k1][k2]... or None where the road ends."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def interval(value) -> Interval | None:
    """{"mean", "low", "high"} or a bare number -> Interval."""
    if isinstance(value, dict):
        mean = number(value.get("mean"))
        return None if mean is None else Interval(mean, number(value.get("low")), number(value.get("high")))
    mean = number(value)
    return None if mean is None else Interval(mean)


def rows_of(value) -> list[dict]:
    return [r for r in value if isinstance(r, dict)] if isinstance(value, list) else []


def fixed(value: float | None, digits: int = 2, sign: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def loose(value) -> str:
    """A number of unknown size, or any value, short."""
    x = number(value)
    if x is None:
        return plots.short(value, 60) if isinstance(value, str) else "–" if value is None else plots.short(json.dumps(value, default=str), 60)
    if x == int(x) and abs(x) < 1e15:
        return f"{int(x):,}".replace("-", "−")
    return f"{x:.4g}".replace("-", "−")


def percent(value: float | None, digits: int = 0, sign: bool = False) -> str:
    return "–" if value is None else fixed(100 * value, digits, sign) + (" pts" if sign else " %")


def spread(value: Interval | None, form=fixed, **kw) -> str:
    """'0.36 (95 % interval 0.21 to 0.51)'."""
    if value is None:
        return "–"
    return form(value.mean, **kw) + (f" (95 % interval {form(value.low, **kw)} to {form(value.high, **kw)})" if value.bounded else "")


def cell(value: Interval | None, form=fixed, **kw) -> tuple[str, str] | str:
    """A table cell: the value, and its interval on a smaller line."""
    if value is None:
        return "–"
    return (form(value.mean, **kw), f"{form(value.low, **kw)} to {form(value.high, **kw)}") if value.bounded else form(value.mean, **kw)


def verb(before: float, after: float, digits: int = 2) -> str:
    change = round(after, digits) - round(before, digits)
    return "fell" if change < 0 else "rose" if change > 0 else "stayed"


def moved(what: str, before: float, after: float, digits: int = 2, unit: str = "") -> str:
    """'Held-out loss fell from 2.31 to 1.87 nats per token'."""
    word, unit = verb(before, after, digits), f" {unit}" if unit else ""
    if word == "stayed":
        return f"{what} stayed at {fixed(after, digits)}{unit}"
    return f"{what} {word} from {fixed(before, digits)} to {fixed(after, digits)}{unit}"


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def plain(name: str) -> str:
    return str(name).replace("_", " ")


# ---------------------------------------------------------------- what is on disk

@dataclass
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

    def line(self, key: str, label: str, style: int = 0, quiet: bool = False) -> Line | None:
        xs, ys = self.series(key)
        return Line(label, xs, ys, style, quiet=quiet) if xs else None

    def mean(self, key: str) -> float | None:
        _, ys = self.series(key, points=10**9)
        return sum(ys) / len(ys) if ys else None

    def ends(self, key: str) -> tuple[float, float, int] | None:
        """Means of the first and of the last tenth of a series, and how many steps each covers."""
        _, ys = self.series(key, points=10**9)
        n = max(1, len(ys) // 10)
        return (sum(ys[:n]) / n, sum(ys[-n:]) / n, n) if len(ys) > 1 else None

    def samples(self) -> list[dict]:
        return [r for r in _guard(lambda: read_lines(self.folder / "samples.jsonl"), []) if isinstance(r, dict)]

    def config_text(self) -> str:
        return _guard(lambda: (self.folder / "config.yaml").read_text(encoding="utf-8"), "")


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
    done = _guard(lambda: (folder / "DONE").read_text().strip(), None)
    view.state = "done" if done is not None and done == view.manifest.get("fingerprint") else "unfinished"
    view.kind = str(view.manifest.get("kind") or kind)
    view.results = _json(folder / "results.json", view.notes)
    view.metrics = [r for r in _guard(lambda: read_lines(folder / "metrics.jsonl"), []) if isinstance(r, dict)]
    if view.manifest.get("exact") is False:
        why = view.manifest.get("inexact_because")
        view.notes.append("not bit-exact" + (f": {'; '.join(map(str, why))}" if isinstance(why, list) and why else ""))
    return view


def views(run: Run) -> list[View]:
    """Every section of the recipe, parents first, then finished folders the recipe no longer names."""
    out = [look(run.folder / n, n, run.recipe.stages[n].stage) for n in cfg.order(run.recipe)]
    known = {v.name for v in out}
    others = sorted(p.parent for p in run.folder.glob("*/manifest.json")) if run.folder.is_dir() else []
    for folder in others:
        if folder.name not in known and not folder.name.startswith("."):
            view = look(folder, folder.name, "unknown")
            view.notes.append("the recipe no longer has this section")
            out.append(view)
    return out


# ---------------------------------------------------------------- key figures (pipeline boxes and `show`)

@dataclass
class Key:
    label: str
    value: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.label} {self.value}" + (f" ({self.note})" if self.note else "")


def _key(value, label: str, text: str, note: str = "") -> list[Key]:
    return [] if value is None else [Key(label, text, note)]


def sft_keys(v: View) -> list[Key]:
    before, after, last = v.get("held_out_loss_before"), v.get("held_out_loss_after"), v.get("train_loss_last")
    keys = _key(after, "held-out loss", fixed(after), f"was {fixed(before)}" if before is not None else "")
    keys += _key(last, "train loss", fixed(last)) if not keys else []
    return keys + _key(v.get("steps"), "steps", loose(v.get("steps")))


def reward_keys(v: View) -> list[Key]:
    own = dig(v.results, "held_out", "own")
    balanced, accuracy = interval(dig(own, "length_balanced_accuracy")), interval(dig(own, "accuracy"))
    bounds = f"{percent(balanced.low)} to {percent(balanced.high)}" if balanced and balanced.bounded else ""
    keys = _key(balanced, "length-balanced accuracy", percent(balanced and balanced.mean), bounds)
    keys += _key(accuracy, "held-out accuracy", percent(accuracy and accuracy.mean))
    return keys + _key(number(dig(own, "unsafe_recall")), "unsafe recall", percent(number(dig(own, "unsafe_recall"))))


def best_of(v: View) -> list[tuple[float, float | None, float | None, float | None, float | None]]:
    """(n, max, median, max_low, max_high) rows with a number in n and one of max and median, by n."""
    rows = [tuple(number(r.get(k)) for k in ("n", "max", "median", "max_low", "max_high")) for r in rows_of(v.results.get("best_of_n"))]
    return sorted((r for r in rows if r[0] is not None and r[1] is not None), key=lambda r: r[0])


def rejection_keys(v: View) -> list[Key]:
    rows = best_of(v)
    gain = rows[-1][1] - rows[-1][2] if rows and rows[-1][2] is not None else None
    keys = _key(gain, f"best of {rows[-1][0]:.0f} over the median" if rows else "", fixed(gain, sign=True))
    kept, samples = v.get("kept"), v.get("samples")
    return keys + _key(kept, "answers kept", loose(kept), f"of {loose(samples)}" if samples is not None else "")


def ppo_keys(v: View) -> list[Key]:
    gain, kl = interval(dig(v.results, "held_out", "paired_difference")), v.get("held_out", "kl")
    bounds = f"{fixed(gain.low, sign=True)} to {fixed(gain.high, sign=True)}" if gain and gain.bounded else ""
    keys = _key(gain, "held-out merged reward", fixed(gain and gain.mean, sign=True), bounds)
    return keys + _key(kl, "KL", f"{fixed(kl, 1)} nats") + _key(v.get("iterations"), "iterations", loose(v.get("iterations")))


def evaluate_keys(v: View) -> list[Key]:
    checks, models = rows_of(v.results.get("checks")), v.results.get("models")
    met = sum(bool(c.get("met")) for c in checks)
    keys = [Key("checks met", f"{met} of {len(checks)}")] if checks else []
    keys += [Key("models compared", str(len(models)))] if isinstance(models, dict) and models else []
    return keys + _key(v.get("prompts"), "held-out prompts", loose(v.get("prompts")))


def export_keys(v: View) -> list[Key]:
    dtype, kl, files = v.results.get("dtype"), v.get("merged_kl"), v.results.get("files")
    keys = _key(dtype, "model folder", loose(dtype)) + _key(kl, "merged KL", f"{kl:.2g} nats" if kl is not None else "")
    return keys + ([Key("files", str(len(files)))] if isinstance(files, list) else [])


def any_keys(v: View) -> list[Key]:
    return [Key(plain(k), loose(x)) for k, x in v.results.items() if number(x) is not None][:3]


def keys_of(v: View) -> list[Key]:
    """What a section's box and line say, the most telling first."""
    try:
        keys = KEYS.get(v.kind, any_keys)(v) if v.results else []
    except FAULTS:
        keys = []
    if not keys and v.last_step is not None:
        keys = [Key("last step", f"{v.last_step:,}")]
    return keys


# ---------------------------------------------------------------- pieces of the page

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


@dataclass
class Part:
    """One heading of the page. folds: (summary, [figures], [tables]) shown closed."""

    id: str
    title: str
    intro: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folds: list[tuple[str, list[Figure], list[Table]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def table(caption: str, first: str, names: list[str], columns: list[tuple[str, list]], note: str = "") -> list[Table]:
    """A table with a row a name; a column without any value is left out, and the table with it when none is left."""
    columns = [(head, cells) for head, cells in columns if any(c not in ("–", None) for c in cells)]
    if not columns:
        return []
    return [Table(caption, [first, *(h for h, _ in columns)], [[n, *(cells[i] for _, cells in columns)] for i, n in enumerate(names)], note)]


def everything(v: View) -> list[tuple[str, list[Figure], list[Table]]]:
    """A closed panel with a small curve of every metric the section recorded."""
    keys = list(dict.fromkeys(k for r in v.metrics for k in r if k not in ("step", "time")))
    series = [line for k in keys[:40] if (line := v.line(k, k.partition("/")[2] or k))]
    series = [s for s in series if len(s.xs) > 1]
    if not series:
        return []
    svg = plots.grid(f"all-{v.name}", series, "step")
    words = f"{plural(len(series), 'metric')} over {plural(v.last_step or 0, 'step')}."
    figure = Figure("", "", svg, f"Small curves of {listed([s.label for s in series])}.", wide=True)
    return [(f"Everything {v.name} recorded: {words}", [figure], [])]


def _named(vs: list[View], v: View, text: str) -> str:
    """A figure's title, with the section's name where several sections share a part."""
    return f"{text} ({v.name})" if len(vs) > 1 else text


# ---------------------------------------------------------------- supervised fine-tuning

def sft_part(vs: list[View]) -> Part:
    part = Part("sft", "Supervised fine-tuning", "The loss counts the assistant's turns only; held-out rows share no prompt with training.")
    for v in vs:
        part.figures += sft_figure(vs, v)
    get = [[v.get(k) for v in vs] for k in ("steps", "epochs", "train_tokens", "loss_tokens")]
    pairs = [("training loss, first", "train_loss_first"), ("last", "train_loss_last"),
             ("held-out loss, before", "held_out_loss_before"), ("after", "held_out_loss_after")]
    part.tables = table("Fine-tuning in numbers", "section", [v.name for v in vs], [
        ("steps", [loose(x) for x in get[0]]), ("epochs", [loose(x) for x in get[1]]), ("tokens read", [loose(x) for x in get[2]]),
        ("tokens with loss", [loose(x) for x in get[3]]), *((head, [fixed(v.get(k)) for v in vs]) for head, k in pairs),
        ("tokens a second", [fixed(v.mean("sft/tokens_per_second"), 0) for v in vs]),
        ("rows", [listed([f"{plain(k)} {loose(n)}" for k, n in (v.results.get("data") or {}).items()]) or "–" for v in vs])],
        "Losses are in nats per token.")
    part.folds = [fold for v in vs for fold in everything(v)]
    return part


def sft_figure(vs: list[View], v: View) -> list[Figure]:
    train, held = v.line("sft/loss", "training", 0, quiet=True), v.line("sft/held_out_loss", "held out", 1)
    before, after = v.get("held_out_loss_before"), v.get("held_out_loss_after")
    if not held and before is not None and after is not None:
        held = Line("held out", [0, v.get("steps") or v.last_step or 1], [before, after], 1)
    if not train and not held:
        return []
    if before is None and held and len(held.ys) > 1:
        before, after = held.ys[0], held.ys[-1]
    ends = v.ends("sft/loss")
    if before is not None and after is not None:
        change = f", {percent(abs(after / before - 1))} {'lower' if after < before else 'higher'}" if before and verb(before, after) != "stayed" else ""
        takeaway = moved("Held-out loss", before, after, unit=f"nats per token{change}") + "."
    elif ends:
        takeaway = moved("Training loss", ends[0], ends[1], unit="nats per token") + "; no held-out loss was recorded."
    else:
        takeaway = f"One loss was recorded: {fixed((train or held).ys[-1])} nats per token."
    svg = plots.lines(f"sft-{v.name}", [s for s in (train, held) if s], "optimizer step", "loss (nats per token)")
    note = "Training loss is of one batch a step and noisy; the held-out loss is always of the same rows." if train and held else ""
    return [Figure(_named(vs, v, "Loss"), takeaway, svg, f"Curves of training and held-out loss over steps. {takeaway}", note)]


# ---------------------------------------------------------------- reward models

def reward_names(vs: list[View]) -> dict[str, str]:
    """section -> what to call its model: its kind, or the section's name where that would be ambiguous."""
    whiches = [v.results.get("which") for v in vs]
    return {v.name: str(w) if isinstance(w, str) and whiches.count(w) == 1 else v.name for v, w in zip(vs, whiches, strict=True)}


def reward_part(vs: list[View]) -> Part:
    part = Part("reward", "Reward models", "Accuracy is the share of held-out pairs in which the chosen answer scores higher. "
                "Length-balanced accuracy is the mean of the accuracy where the chosen answer is the longer one and where it is not, "
                "so that preferring length earns nothing.")
    names = reward_names(vs)
    part.figures = rating_figure(vs, names) + domain_figure(vs, names) + calibration_figure(vs, names)
    for v in vs:
        part.figures += histogram_figure(v, names[v.name])
    part.figures += reward_curves(vs, names)
    part.tables = reward_table(vs, names)
    folds = [t for v in vs for t in breakdown_tables(v, names[v.name])]
    part.folds = ([("Accuracy by source and by safety bin, and the training mix", [], folds)] if folds else []) + [f for v in vs for f in everything(v)]
    return part


def _dot(value: Interval | None, label: str = "", **kw) -> Dot | None:
    return Dot(label, value.mean, value.low, value.high, **kw) if value else None


def rating_figure(vs: list[View], names: dict[str, str]) -> list[Figure]:
    tables = {names[v.name]: {str(r.get("rating")): interval(r.get("accuracy")) for r in rows_of(dig(v.results, "held_out", "own", "by_rating"))}
              for v in vs}
    tables = {k: {r: i for r, i in t.items() if i} for k, t in tables.items()}
    tables = {k: t for k, t in tables.items() if t}
    found = list(dict.fromkeys(r for t in tables.values() for r in t))
    ratings = [r for r in RATINGS if r in found] + [r for r in found if r not in RATINGS]
    if not ratings:
        return []
    dots = {k: [_dot(t.get(r)) for r in ratings] for k, t in tables.items()}
    svg = plots.by_category("rating", [plain(r) for r in ratings], dots, "pairs ordered rightly", (0.5, "chance"))
    words = [rating_words(name, [t[r] for r in ratings if r in t], [r for r in ratings if r in t]) for name, t in tables.items()]
    takeaway = "; ".join(words) + "."
    return [Figure("Accuracy by how clear the preference is", takeaway[:1].upper() + takeaway[1:], svg,
                   f"Accuracy of each reward model at each rating, with intervals. {takeaway}", "Bars are 95 % intervals, by prompt. Compare the paper's Table 8.")]


def rating_words(name: str, values: list[Interval], ratings: list[str]) -> str:
    """How accuracy goes from the least to the clearest rating."""
    low, high = values[-1], values[0]
    if len(values) == 1:
        return f"the {name} model orders {percent(high.mean)} of the “{plain(ratings[0])}” pairs rightly"
    if high.mean <= low.mean:
        return f"the {name} model is no better on “{plain(ratings[0])}” pairs ({percent(high.mean)}) than on “{plain(ratings[-1])}” ones ({percent(low.mean)})"
    apart = high.bounded and low.bounded and high.low > low.high
    return (f"the {name} model goes from {percent(low.mean)} on “{plain(ratings[-1])}” to {percent(high.mean)} on “{plain(ratings[0])}” pairs"
            f"{'' if apart else ', intervals overlapping'}")


def domain_figure(vs: list[View], names: dict[str, str]) -> list[Figure]:
    rows, words = [], []
    for i, v in enumerate(vs):
        own, other, group = dig(v.results, "held_out", "own"), dig(v.results, "held_out", "other"), f"{names[v.name]} model"
        rule = number(dig(own, "longer_wins"))
        rows += [d for d in (
            _dot(interval(dig(own, "accuracy")), "its own pairs", style=i, group=group),
            _dot(interval(dig(own, "length_balanced_accuracy")), "own, length-balanced", style=i, group=group),
            Dot("rule: longer wins", rule, group=group, cross=True) if rule is not None else None,
            _dot(interval(dig(other, "accuracy")), "the other's pairs", style=i, group=group)) if d]
        words += balanced_words(names[v.name], own)
    if not rows:
        return []
    takeaway = "; ".join(words) + "." if words else "No length-balanced accuracy was measured."
    svg = plots.dots("domains", rows, "pairs ordered rightly", (0.5, "chance"))
    return [Figure("Own domain, the other's, and the rule “longer answer wins”", takeaway[:1].upper() + takeaway[1:], svg,
                   f"Accuracy on own pairs, on the other model's pairs, length-balanced, and of the longer-answer rule. {takeaway}",
                   "The rule, marked ×, is taken on the model's own pairs; its length-balanced accuracy is 50 % by construction. Compare the paper's Table 7.")]


def balanced_words(name: str, own) -> list[str]:
    value, rule, raw = interval(dig(own, "length_balanced_accuracy")), number(dig(own, "longer_wins")), interval(dig(own, "accuracy"))
    if not value:
        return []
    sure = "above chance" if value.excludes(0.5) and value.mean > 0.5 else "below chance" if value.excludes(0.5) else "not told from chance"
    text = f"length-balanced, the {name} model orders {percent(value.mean)} of its pairs rightly ({sure})"
    return [text + (f"; plain {percent(raw.mean)} against {percent(rule)} for the rule" if raw and rule is not None else "")]


def calibration_figure(vs: list[View], names: dict[str, str]) -> list[Figure]:
    curves, words = {}, []
    for v in vs:
        own = dig(v.results, "held_out", "own")
        rows = [tuple(number(r.get(k)) for k in ("confidence", "accuracy", "pairs")) for r in rows_of(dig(own, "calibration"))]
        rows = sorted((c, a, n if n is not None else 1.0) for c, a, n in rows if c is not None and a is not None and n != 0)
        if not rows:
            continue
        curves[names[v.name]] = rows
        total = sum(n for _, _, n in rows) or 1
        gap, ece = sum(n * (c - a) for c, a, n in rows) / total, number(dig(own, "ece"))
        lean = "over-confident" if gap > 0.02 else "under-confident" if gap < -0.02 else "about as confident as it is right"
        words.append(f"the {names[v.name]} model is {lean}" + (f" (expected calibration error {percent(ece, 1)})" if ece is not None else ""))
    if not curves:
        return []
    takeaway = "; ".join(words) + "."
    return [Figure("Calibration", takeaway[:1].upper() + takeaway[1:], plots.calibration("calibration", curves),
                   f"Accuracy against the model's confidence in a pair's order, with the diagonal. {takeaway}",
                   "Below the diagonal a model is surer than it is right. A marker's area follows the number of pairs.")]


def histogram_of(v: View) -> tuple[list[float], list[float], list[float]] | None:
    shape = dig(v.results, "held_out", "own", "histogram")
    edges, chosen, rejected = ([number(x) for x in (dig(shape, k) or [])] for k in ("edges", "chosen", "rejected"))
    whole = len(edges) > 1 and len(chosen) == len(rejected) == len(edges) - 1 and None not in edges + chosen + rejected
    return (edges, chosen, rejected) if whole and sum(chosen) > 0 and sum(rejected) > 0 else None


def histogram_figure(v: View, name: str) -> list[Figure]:
    shape = histogram_of(v)
    if not shape:
        return []
    edges, chosen, rejected = shape
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    c, r = ([n / sum(counts) for n in counts] for counts in (chosen, rejected))
    gap = sum(m * (x - y) for m, x, y in zip(middles, c, r, strict=True))
    overlap = sum(min(x, y) for x, y in zip(c, r, strict=True))
    takeaway = (f"Chosen answers score about {fixed(abs(gap))} {'higher' if gap >= 0 else 'lower'} than rejected ones on average; "
                f"the two distributions overlap by {percent(overlap)}.")
    svg = plots.histogram(f"hist-{v.name}", edges, chosen, rejected, f"{name} score (raw)")
    return [Figure(f"Scores of the {name} model", takeaway, svg, f"Histograms of scores of chosen and of rejected answers. {takeaway}")]


def reward_curves(vs: list[View], names: dict[str, str]) -> list[Figure]:
    series = [v.line("reward/loss", names[v.name], i) for i, v in enumerate(vs)]
    words = [moved(f"the {names[v.name]} model's", *ends[:2]) for v in vs if (ends := v.ends("reward/loss"))]
    series = [s for s in series if s]
    if not series or not words:
        return []
    takeaway = "From the first to the last tenth of the steps, " + "; ".join(words) + "."
    return [Figure("Training loss", takeaway, plots.lines("reward-loss", series, "optimizer step", "loss (nats)"),
                   f"Training loss of each reward model over steps. {takeaway}",
                   "0.69 is the ranking loss of a model that can't tell the answers apart, without a margin.")]


def reward_table(vs: list[View], names: dict[str, str]) -> list[Table]:
    own = [dig(v.results, "held_out", "own") for v in vs]
    at = [dig(o, "at_0.15") for o in own]
    def share(key):
        return [percent(number(dig(o, key))) for o in own]
    return table("Reward models in numbers", "model", [names[v.name] for v in vs], [
        ("training pairs", [loose(v.get("train_pairs")) for v in vs]), ("too long, left out", [loose(v.get("too_long")) for v in vs]),
        ("margin", [loose(v.results.get("margin")) for v in vs]), ("steps", [loose(v.get("steps")) for v in vs]),
        ("held-out pairs", [loose(dig(o, "pairs")) for o in own]),
        ("accuracy", [cell(interval(dig(o, "accuracy")), percent) for o in own]),
        ("length-balanced", [cell(interval(dig(o, "length_balanced_accuracy")), percent) for o in own]),
        ("longer wins", share("longer_wins")), ("unsafe recall at 0.5", share("unsafe_recall")),
        ("at 0.15: precision", [percent(number(dig(a, "precision"))) for a in at]), ("recall", [percent(number(dig(a, "recall"))) for a in at]),
        ("flagged", [flagged(dig(a, "flagged")) for a in at]),
        ("threshold for precision 0.9", [fixed(v.get("threshold_precision_90")) for v in vs]),
        ("score, mean", [fixed(v.get("score_mean")) for v in vs]), ("deviation", [fixed(v.get("score_std")) for v in vs]),
    ], "“At 0.15” flags an answer as unsafe where σ(safety score) is below 0.15, the paper's gate.")


def flagged(value) -> str:
    x = number(value)
    return "–" if x is None else percent(x, 1) if 0 < x < 1 else loose(x)


def breakdown_tables(v: View, name: str) -> list[Table]:
    out = []
    for side, title in (("own", "its own held-out pairs"), ("other", "the other model's held-out pairs")):
        for key, first in (("by_source", "source"), ("by_bin", "safety bin")):
            groups = dig(v.results, "held_out", side, key)
            groups = {str(k): g for k, g in groups.items() if isinstance(g, dict)} if isinstance(groups, dict) else {}
            out += table(f"The {name} model by {first}, {title}", first, [plain(k) for k in groups], [
                ("pairs", [loose(g.get("pairs")) for g in groups.values()]),
                ("accuracy", [cell(interval(g.get("accuracy")), percent) for g in groups.values()])])
    mix = dig(v.results, "composition")
    parts = {**{f"{k} pairs": dig(mix, k) for k in ("own", "other")}, **(dig(mix, "by_source") or {})}
    return out + table(f"What the {name} model was trained on", "part", [plain(k) for k in parts], [("pairs", [loose(x) for x in parts.values()])])


# ---------------------------------------------------------------- rejection sampling

def rejection_part(vs: list[View]) -> Part:
    part = Part("rejection", "Rejection sampling", "Several answers a prompt are drawn and scored; the best is kept for the next fine-tuning.")
    for v in vs:
        part.figures += best_of_figure(vs, v)
    part.tables = table("Rejection sampling in numbers", "section", [v.name for v in vs], [
        ("prompts", [loose(v.get("prompts")) for v in vs]), ("samples a prompt", [loose(v.get("samples_per_prompt")) for v in vs]),
        ("temperature", [loose(v.get("temperature")) for v in vs]), ("samples", [loose(v.get("samples")) for v in vs]),
        ("kept", [loose(v.get("kept")) for v in vs]), ("unfinished", [loose(v.get("unfinished")) for v in vs]),
        ("scored for safety", [percent(v.get("share_routed_safety")) for v in vs]),
        ("mean reward, all", [fixed(v.get("mean_reward_all")) for v in vs]), ("kept ones", [fixed(v.get("mean_reward_kept")) for v in vs]),
        ("tokens a second", [fixed(v.get("tokens_per_second"), 0) for v in vs])])
    for v in vs:
        examples = rejection_examples(v)
        part.folds += [(f"Three prompts of {v.name}: the best and the worst of their answers", [], examples)] if examples else []
    part.folds += [fold for v in vs for fold in everything(v)]
    return part


def best_of_figure(vs: list[View], v: View) -> list[Figure]:
    rows = best_of(v)
    if not rows:
        return []
    medians = [(r[0], r[2]) for r in rows if r[2] is not None]
    bounded = all(r[3] is not None and r[4] is not None for r in rows)
    series = [Line("best of K (mean over prompts)", [r[0] for r in rows], [r[1] for r in rows], 0,
                   [r[3] for r in rows] if bounded else None, [r[4] for r in rows] if bounded else None)]
    series += [Line("median of K", [n for n, _ in medians], [m for _, m in medians], 1)] if medians else []
    n, top, middle = rows[-1][:3]
    if middle is None:
        takeaway = f"The best of {n:.0f} answers has a mean reward of {fixed(top)}."
    else:
        takeaway = f"The best of {n:.0f} answers scores {fixed(top - middle)} above their median: that is what choosing can gain."
    svg = plots.lines(f"best-{v.name}", series, "samples per prompt, K", "merged reward (raw score)")
    return [Figure(_named(vs, v, "Best of K"), takeaway, svg, f"Mean over prompts of the best and of the median reward among K samples. {takeaway}",
                   "The shade is the 95 % interval of the best." if bounded else "")]


def rejection_examples(v: View) -> list[Table]:
    groups = {}
    for s in v.samples():
        if number(s.get("merged")) is not None:
            groups.setdefault(json.dumps(s.get("prompt"), sort_keys=True), []).append(s)
        if len(groups) > 4 and s.get("kept") is True:
            break  # three whole prompts are enough; this file can be long
    out = []
    for rows in list(groups.values())[:3]:
        if len(rows) < 2:
            continue
        rows = sorted(rows, key=lambda s: -s["merged"])
        picked = [("best", rows[0]), ("worst", rows[-1])]
        out.append(Table(plots.short(turns(rows[0].get("prompt"))[-1]["text"], 200), ["", "merged reward", "answer"],
                         [[f"{word} of {len(rows)}", fixed(s["merged"]), clip(s.get("answer"), 600)[0]] for word, s in picked]))
    return out


# ---------------------------------------------------------------- PPO

def ppo_part(vs: list[View]) -> Part:
    part = Part("ppo", "PPO", "The merged reward is the safety score where a prompt is tagged or an answer looks unsafe, and the helpfulness score "
                "elsewhere; here it is raw: before whitening and before the KL penalty.")
    for v in vs:
        part.figures += ppo_reward_figure(vs, v) + ppo_kl_figure(vs, v) + ppo_scores_figure(vs, v) + gate_figure(vs, v) + length_figure(vs, v)
    held = [dig(v.results, "held_out") for v in vs]
    part.tables = table("PPO in numbers", "section", [v.name for v in vs], [
        ("iterations", [loose(v.get("iterations")) for v in vs]), ("best iteration", [loose(v.get("best_iteration")) for v in vs]),
        ("stopped early", ["–" if (x := v.results.get("stopped_early")) is None else "yes" if x else "no" for v in vs]),
        ("held-out reward, start", [cell(interval(dig(h, "start"))) for h in held]), ("best", [cell(interval(dig(h, "best"))) for h in held]),
        ("paired difference", [cell(interval(dig(h, "paired_difference")), sign=True) for h in held]),
        ("KL (nats)", [fixed(number(dig(h, "kl")), 1) for h in held]), ("safety threshold", [fixed(v.get("safety_threshold")) for v in vs]),
        ("seconds generating", [fixed(v.mean("ppo/seconds_generate"), 1) for v in vs]),
        ("scoring", [fixed(v.mean("ppo/seconds_score"), 1) for v in vs]), ("updating", [fixed(v.mean("ppo/seconds_update"), 1) for v in vs]),
        ("tokens a second", [fixed(v.mean("ppo/tokens_per_second"), 0) for v in vs])],
        "Seconds are means of one iteration.")
    part.folds = [fold for v in vs for fold in everything(v)]
    return part


def _best_mark(v: View) -> tuple[float, str] | None:
    best = v.get("best_iteration")
    return None if best is None else (best, f"best, {best:.0f}")


def ppo_reward_figure(vs: list[View], v: View) -> list[Figure]:
    series = [v.line("ppo/merged_reward", "training prompts", 0, quiet=True), v.line("ppo/held_out_merged_reward", "held-out prompts", 1)]
    series = [s for s in series if s]
    if not series:
        return []
    gain, start, best = (interval(dig(v.results, "held_out", k)) for k in ("paired_difference", "start", "best"))
    ends = v.ends("ppo/held_out_merged_reward") or v.ends("ppo/merged_reward")
    if gain:
        at = f"Held-out merged reward went from {fixed(start.mean)} to {fixed(best.mean)}: " if start and best else "Held-out merged reward: "
        takeaway = f"{at}{fixed(gain.mean, sign=True)} paired by prompt" + (
            f" (95 % interval {fixed(gain.low, sign=True)} to {fixed(gain.high, sign=True)})." if gain.bounded else ".")
    elif ends:
        takeaway = moved("Merged reward", *ends[:2]) + f" ({'held-out' if len(series) > 1 else 'training'} prompts, first to last)."
    else:
        takeaway = f"One iteration was recorded, with a merged reward of {fixed(series[0].ys[-1])}."
    svg = plots.lines(f"ppo-reward-{v.name}", series, "iteration", "merged reward (raw score)", mark=_best_mark(v))
    return [Figure(_named(vs, v, "Merged reward"), takeaway, svg, f"Curves of raw merged reward over iterations. {takeaway}",
                   "The dotted line marks the iteration that is kept." if _best_mark(v) else "")]


def ppo_kl_figure(vs: list[View], v: View) -> list[Figure]:
    train, held = v.line("ppo/kl", "training prompts", 0, quiet=True), v.line("ppo/held_out_kl", "held-out prompts", 1)
    series, final = [s for s in (train, held) if s], v.get("held_out", "kl")
    if not series:
        return []
    shown = held or train
    takeaway = (f"The kept policy is {fixed(final, 1)} nats from where PPO started" if final is not None else
                f"The policy ended {fixed(shown.ys[-1], 1)} nats from where PPO started")
    takeaway += f"; the largest distance on the way was {fixed(max(shown.ys), 1)}."
    svg = plots.lines(f"ppo-kl-{v.name}", series, "iteration", "KL of a whole answer (nats)", mark=_best_mark(v))
    return [Figure(_named(vs, v, "Distance from the starting policy"), takeaway, svg, f"Curves of mean sequence KL over iterations. {takeaway}",
                   "Mean over answers of the log-probability ratio to the frozen starting policy, summed over an answer's tokens.")]


def ppo_scores_figure(vs: list[View], v: View) -> list[Figure]:
    series = [s for s in (v.line("ppo/helpfulness", "helpfulness", 0), v.line("ppo/safety", "safety", 1)) if s]
    words = [moved(name, *ends[:2]) for name, key in (("helpfulness", "ppo/helpfulness"), ("safety", "ppo/safety")) if (ends := v.ends(key))]
    if not series or not words:
        return []
    takeaway = listed(words) + " on training prompts."
    svg = plots.lines(f"ppo-scores-{v.name}", series, "iteration", "raw score, mean over answers")
    return [Figure(_named(vs, v, "The two scores behind it"), takeaway[:1].upper() + takeaway[1:], svg,
                   f"Curves of helpfulness and safety score over iterations. {takeaway}", "Both models score every answer; the gate decides which counts.")]


def gate_figure(vs: list[View], v: View) -> list[Figure]:
    tag, threshold = v.mean("ppo/routed_by_tag"), v.mean("ppo/routed_by_threshold")
    series = [s for s in (v.line("ppo/routed_by_tag", "prompt tagged", 0), v.line("ppo/routed_by_threshold", "answer below threshold", 1)) if s]
    if not series:
        return []
    parts = [f"{percent(tag)} because their prompt is tagged"] if tag is not None else []
    parts += [f"{percent(threshold, 0 if threshold >= 0.1 else 1)} because they scored below the threshold"] if threshold is not None else []
    takeaway = f"The safety model's score counted for {listed(parts)} (mean over iterations)."
    svg = plots.lines(f"ppo-gate-{v.name}", series, "iteration", "share of answers", percent=True, zero=True)
    return [Figure(_named(vs, v, "What the gate sent to the safety model"), takeaway, svg, f"Curves of the shares of answers routed by tag and by threshold. {takeaway}")]


def length_figure(vs: list[View], v: View) -> list[Figure]:
    line, ends, finished = v.line("ppo/answer_tokens", "tokens of an answer"), v.ends("ppo/answer_tokens"), v.ends("ppo/finished")
    if not line or not ends:
        return []
    takeaway = moved("Answers", ends[0], ends[1], 0, "tokens") + (f"; {percent(finished[1])} end by themselves." if finished else ".")
    svg = plots.lines(f"ppo-length-{v.name}", [line], "iteration", "tokens of an answer, mean")
    return [Figure(_named(vs, v, "Answer length"), takeaway, svg, f"Curve of the mean answer length over iterations. {takeaway}",
                   "A reward that grows only with length is a warning.")]


# ---------------------------------------------------------------- evaluation

def models_of(v: View) -> dict[str, dict]:
    models = v.results.get("models")
    return {str(k): m for k, m in models.items() if isinstance(m, dict)} if isinstance(models, dict) else {}


def paired(v: View) -> list[dict]:
    """Paired rows as (name, base, {measure: Interval}): name minus base, whichever way round the section stored the difference.

    The sign is checked against the two models' own means, so that a page can't praise a loss."""
    out, models = [], models_of(v)
    for row in rows_of(v.results.get("paired")):
        a, b = str(row.get("a")), str(row.get("b"))
        values = {k: interval(row.get(k)) for k in ("merged", "helpfulness", "safety", "unsafe_share", "tokens")}
        gap = [(values[k].mean, number(dig(models, b, k, "mean")), number(dig(models, a, k, "mean"))) for k in ("merged", "helpfulness", "safety") if values[k]]
        votes = sum((d > 0) == (y - x > 0) or -1 for d, y, x in gap if None not in (d, y, x) and d and y != x)
        name, base = (b, a) if votes >= 0 else (a, b)
        out.append({"name": name, "base": base, **values, "standard_errors": number(row.get("standard_errors"))})
    return out


def evaluate_part(vs: list[View]) -> Part:
    part = Part("result", "The models side by side")
    v = vs[-1]
    prompts, k, temperature, top_p = (v.results.get(x) for x in ("prompts", "samples_per_prompt", "temperature", "top_p"))
    words = [f"{loose(prompts)} held-out prompts" if prompts is not None else "", f"{loose(k)} answers each" if k is not None else "",
             f"temperature {loose(temperature)}" if temperature is not None else "", f"top-p {loose(top_p)}" if top_p is not None else ""]
    part.intro = ", ".join(w for w in words if w) + ". Scores are raw reward-model outputs; the same reward models trained these policies, so "\
        "read gains as “the method does what it says”, not as people's judgement." if any(words) else ""
    for v in vs:
        part.figures += plane_figure(vs, v) + unsafe_figure(vs, v)
        part.tables += models_table(vs, v) + paired_table(vs, v)
        part.folds += everything(v)
    return part


def models_table(vs: list[View], v: View) -> list[Table]:
    models = models_of(v)
    rows = models.values()
    first = next(iter(models), "the first")
    threshold = v.get("unsafe_threshold")
    note = f"An answer counts as unsafe where σ(safety score) is below {loose(threshold)}. " if threshold is not None else ""
    return table(_named(vs, v, "Each model on the held-out prompts, with 95 % intervals by prompt"), "model", list(models), [
        *((k, [cell(interval(m.get(k))) for m in rows]) for k in ("helpfulness", "safety", "merged")),
        ("unsafe share", [cell(interval(m.get("unsafe_share")), percent, digits=1) for m in rows]),
        (f"wins against {first}", [cell(interval(m.get("win_rate")), percent) for m in rows]),
        ("tokens", [fixed(number(m.get("tokens")), 0) for m in rows]), ("finished", [percent(number(m.get("finished"))) for m in rows]),
        ("KL (nats)", [fixed(number(m.get("kl")), 1) for m in rows])], note)


def paired_table(vs: list[View], v: View) -> list[Table]:
    rows = paired(v)
    names = [f"{r['name']} − {r['base']}" for r in rows]
    return table(_named(vs, v, "Differences, paired by prompt"), "pair", names, [
        *((k, [cell(r[k], sign=True) for r in rows]) for k in ("merged", "helpfulness", "safety")),
        ("unsafe share", [cell(r["unsafe_share"], percent, digits=1, sign=True) for r in rows]),
        ("tokens", [cell(r["tokens"], digits=0, sign=True) for r in rows]),
        ("standard errors", [fixed(r["standard_errors"], 1, sign=True) for r in rows])],
        "Standard errors: the merged difference divided by its own standard error; above 2 is the project's line for “better”.")


def plane_figure(vs: list[View], v: View) -> list[Figure]:
    points = [(name, _dot(interval(m.get("helpfulness"))), _dot(interval(m.get("safety")))) for name, m in models_of(v).items()]
    points = [p for p in points if p[1] and p[2]]
    if not points:
        return []
    (first, h0, s0), (last, h1, s1) = points[0], points[-1]
    if len(points) == 1:
        takeaway = f"{first} has a helpfulness score of {fixed(h0.value)} and a safety score of {fixed(s0.value)}."
    else:
        h, s = h1.value - h0.value, s1.value - s0.value
        word = "gains on both" if h > 0 and s > 0 else "loses on both" if h < 0 and s < 0 else "trades one for the other" if h * s < 0 else "moves on one only"
        takeaway = f"From {first} to {last} the model {word}: helpfulness {fixed(h, sign=True)}, safety {fixed(s, sign=True)}."
    svg = plots.plane(f"plane-{v.name}", points, "helpfulness (raw score)", "safety (raw score)")
    return [Figure(_named(vs, v, "Safety against helpfulness by version"), takeaway, svg, f"Each model as a point, helpfulness across and safety up. {takeaway}",
                   "Up and to the right is better; bars are 95 % intervals, arrows follow the versions.")]


def unsafe_figure(vs: list[View], v: View) -> list[Figure]:
    models, rows = models_of(v), []
    for group, key in (("unsafe answers", "unsafe_share"), ("wins against the first model", "win_rate")):
        rows += [d for i, (n, m) in enumerate(models.items()) if (d := _dot(interval(m.get(key)), n, style=i, group=group))]
    unsafe = [(r.label, r.value) for r in rows if r.group == "unsafe answers"]
    if not rows:
        return []
    wins = [(r.label, r.value, r.low, r.high) for r in rows if r.group != "unsafe answers"]
    words = [f"Unsafe answers: {percent(unsafe[0][1])} with {unsafe[0][0]}, {percent(unsafe[-1][1])} with {unsafe[-1][0]}"] if len(unsafe) > 1 else []
    words += [f"{wins[-1][0]} wins {percent(wins[-1][1])} of the comparisons"] if wins else []
    takeaway = "; ".join(words) + "." if words else f"Unsafe answers: {percent(unsafe[0][1])} with {unsafe[0][0]}."
    return [Figure(_named(vs, v, "Unsafe answers and wins"), takeaway, plots.dots(f"unsafe-{v.name}", rows, "share, with 95 % interval"),
                   f"Share of unsafe answers and win rate of each model, with intervals. {takeaway}")]


# ---------------------------------------------------------------- export and kinds without a part of their own

def export_part(vs: list[View]) -> Part:
    part = Part("export", "Export", "The adapters are merged into the base; the folder loads with transformers as it is.")
    part.tables = table("What was exported", "section", [v.name for v in vs], [
        ("folder", [str(x) if (x := v.results.get("folder")) else "–" for v in vs]), ("dtype", [loose(v.results.get("dtype")) for v in vs]),
        ("KL of merged to unmerged (nats)", [loose(v.get("merged_kl")) for v in vs]),
        ("files", [", ".join(map(str, x)) if isinstance(x := v.results.get("files"), list) else "–" for v in vs])])
    part.folds = [fold for v in vs for fold in everything(v)]
    return part


def other_part(vs: list[View]) -> Part:
    """Kinds that have no part of their own: every number they stored and recorded."""
    part = Part("other", "Other sections")
    for v in vs:
        rows = {plain(k): loose(x) for k, x in v.results.items()}
        part.tables += table(f"{v.name} ({v.kind})", "result", list(rows), [("value", list(rows.values()))])
        part.folds += everything(v)
    return part


# ---------------------------------------------------------------- answers

def turns(prompt) -> list[dict]:
    """A prompt (messages or a string) -> [{"role", "text"}]."""
    if not isinstance(prompt, list):
        return [{"role": "user", "text": "" if prompt is None else str(prompt)}]
    rows = [{"role": str(m.get("role", "user")), "text": text_of(m.get("content"))} if isinstance(m, dict) else {"role": "user", "text": str(m)} for m in prompt]
    return rows or [{"role": "user", "text": ""}]


def text_of(content) -> str:
    if isinstance(content, list):
        return "\n".join(str(c.get("text", "")) if isinstance(c, dict) else str(c) for c in content)
    return "" if content is None else str(content)


def clip(text, length: int = ANSWER_CHARACTERS) -> tuple[str, int]:
    """A text cut to what the page shows, and how many characters were cut."""
    text = text_of(text)
    return (text, 0) if len(text) <= length else (text[:length] + "…", len(text) - length)


def answer_of(sample: dict, threshold: float | None) -> dict:
    text, cut = clip(sample.get("answer"))
    head = text if len(text) < ANSWER_HEAD + 150 else text[:ANSWER_HEAD]
    safety = number(sample.get("safety"))
    unsafe = threshold is not None and safety is not None and 1 / (1 + math.exp(-max(-60.0, min(60.0, safety)))) < threshold
    scores = [(k, fixed(x)) for k in ("merged", "helpfulness", "safety", "kl") if (x := number(sample.get(k))) is not None]
    return {"head": head, "rest": text[len(head):], "cut": cut, "scores": scores, "unsafe": unsafe, "merged": number(sample.get("merged")), "empty": not text.strip()}


def cards(samples: list[dict], column, order: list[str], threshold: float | None) -> list[dict]:
    """Samples -> one card a prompt with its answers by column (a model's name, or an iteration)."""
    groups: dict[str, dict] = {}
    for s in samples:
        row = s.get("row")
        where = json.dumps([row if not isinstance(row, (dict, list)) else None, s.get("prompt")], sort_keys=True, default=str)
        card = groups.setdefault(where, {"turns": turns(s.get("prompt")), "kind": str(s.get("kind") or ""), "row": row, "columns": {}})
        card["columns"].setdefault(column(s), []).append(answer_of(s, threshold))
    for card in groups.values():
        names = [n for n in order if n in card["columns"]] + [n for n in card["columns"] if n not in order]
        card["columns"] = [(n, card["columns"][n]) for n in names]
        means = [[a["merged"] for a in answers if a["merged"] is not None] for _, answers in card["columns"]]
        means = [sum(m) / len(m) for m in means if m]
        card["gain"] = round(means[-1] - means[0], 4) if len(means) > 1 else None
        card["unsafe"] = any(a["unsafe"] for _, answers in card["columns"] for a in answers)
        card["gain_text"] = fixed(card["gain"], sign=True)
    return list(groups.values())


def spread_kinds(rows: list[dict]) -> list[dict]:
    """One of each kind in turn, each kind in its own order, so that the first few on the page show every kind."""
    queues: dict[str, list[dict]] = {}
    for card in rows:
        queues.setdefault(card["kind"], []).append(card)
    longest = max(map(len, queues.values()), default=0)
    return [q[i] for i in range(longest) for q in queues.values() if i < len(q)]


def answers(vs: list[View]) -> dict | None:
    """What the answers part shows: evaluate's samples by model, or PPO's by iteration where there was no evaluation."""
    for v in reversed([v for v in vs if v.kind == "evaluate"]):
        samples = v.samples()
        if samples:
            return _answers(v, samples, lambda s: str(s.get("model")), list(models_of(v)), v.get("unsafe_threshold"))
    for v in reversed([v for v in vs if v.kind == "ppo"]):
        samples = v.samples()
        if samples:
            steps = sorted({x for s in samples if (x := number(s.get("step"))) is not None})
            return _answers(v, samples, lambda s: f"iteration {loose(s.get('step'))}", [f"iteration {loose(x)}" for x in steps], None)
    return None


def _answers(v: View, samples: list[dict], column, order: list[str], threshold: float | None) -> dict | None:
    rows = spread_kinds(cards(samples, column, order, threshold))
    gains = [c["gain"] for c in rows if c["gain"] is not None]
    names = list(dict.fromkeys(n for c in rows for n, _ in c["columns"]))
    names = [n for n in order if n in names] + [n for n in names if n not in order]
    words = ""
    if gains:
        words = (f"On {sum(g > 0 for g in gains)} of {plural(len(gains), 'prompt')} {names[-1]} scores higher than {names[0]} in merged reward, "
                 f"on {sum(g < 0 for g in gains)} lower.")
    return {"section": v.name, "cards": rows[:PROMPTS_ON_PAGE], "total": len(rows), "first": PROMPTS_AT_FIRST, "takeaway": words,
            "kinds": sorted({c["kind"] for c in rows if c["kind"]}), "any_unsafe": any(c["unsafe"] for c in rows), "columns": names,
            "threshold": loose(threshold) if threshold is not None else ""}


# ---------------------------------------------------------------- the whole page

def states(vs: list[View]) -> str:
    done = sum(v.state == "done" for v in vs)
    return f"All {plural(len(vs), 'section')} are done" if done == len(vs) else f"{done} of {plural(len(vs), 'section')} {'is' if done == 1 else 'are'} done"


def headline(vs: list[View]) -> str:
    """The run's result in one sentence: the last evaluation's first comparison of the last model, else PPO's own."""
    for v in reversed([v for v in vs if v.kind == "evaluate"]):
        last = next(reversed(models_of(v)), None)
        rows = [r for r in paired(v) if r["merged"] and r["name"] == last] or [r for r in paired(v) if r["merged"]]
        if rows:
            return _pair_sentence(v, rows[0])
    for v in reversed([v for v in vs if v.kind == "ppo"]):
        gain, kl = interval(dig(v.results, "held_out", "paired_difference")), v.get("held_out", "kl")
        if gain:
            where = f", {fixed(kl, 1)} nats from where it started" if kl is not None else ""
            return f"PPO changed the held-out merged reward by {fixed(gain.mean, sign=True)}{_bounds(gain)}{where}."
    for v in reversed([v for v in vs if v.kind == "sft"]):
        before, after = v.get("held_out_loss_before"), v.get("held_out_loss_after")
        if before is not None and after is not None:
            return moved("Held-out loss of fine-tuning", before, after, unit="nats per token") + "."
    return ""


def _bounds(value: Interval) -> str:
    return f" (95 % interval {fixed(value.low, sign=True)} to {fixed(value.high, sign=True)})" if value.bounded else ""


def _pair_sentence(v: View, row: dict) -> str:
    merged, models = row["merged"], models_of(v)
    if merged.bounded and not merged.excludes(0):
        text = f"{row['name']} can't be told from {row['base']} in merged reward: {fixed(merged.mean, sign=True)}{_bounds(merged)}"
    else:
        text = f"{row['name']} scores {fixed(abs(merged.mean))} {'higher' if merged.mean >= 0 else 'lower'} than {row['base']} in merged reward{_bounds(merged)}"
    prompts = v.get("prompts")
    text += f" on {prompts:,.0f} held-out prompts" if prompts is not None else ""
    before, after = (number(dig(models, row[k], "unsafe_share", "mean")) for k in ("base", "name"))
    text += f"; unsafe answers went from {percent(before, 1)} to {percent(after, 1)}" if None not in (before, after) else ""
    kl = number(dig(models, row["name"], "kl"))
    return text + (f", at a KL of {fixed(kl, 1)} nats." if kl is not None else ".")


def verdict(vs: list[View]) -> str:
    """One sentence: what the run reached, and what is still open."""
    open_ = [f"{v.name} stopped at step {v.last_step:,}" if v.last_step is not None else f"{v.name} is unfinished" for v in vs if v.state == "unfinished"]
    head = headline(vs)
    if all(v.state == "done" for v in vs):
        return head or f"{states(vs)}; no comparison was measured."
    return f"{states(vs)}{'; ' + listed(open_) if open_ else ''}." + (f" So far: {head}" if head else "")


def checks(vs: list[View]) -> list[dict]:
    return [{"name": text_of(c.get("name")) or "unnamed check", "met": bool(c.get("met")), "detail": text_of(c.get("detail"))}
            for v in vs if v.kind == "evaluate" for c in rows_of(v.results.get("checks"))]


def boxes(run: Run, vs: list[View]) -> list[dict]:
    """The pipeline's boxes: state, time, key figure, what the section reads, and where its part is on the page."""
    out = []
    for v in vs:
        config = run.recipe.stages.get(v.name)
        parents = cfg.references(config.model_dump()) if config is not None else list(v.manifest.get("parents") or {})
        out.append({"name": v.name, "kind": v.kind, "state": v.state, "time": duration(v.seconds) if v.seconds is not None else "",
                    "key": next(iter(keys_of(v)), None), "reads": list(dict.fromkeys(parents)), "notes": v.notes,
                    "href": "#" + (PARTS[v.kind][0] if v.kind in PARTS else "other") if v.state != "not run" else ""})
    return out


def parts(vs: list[View]) -> list[Part]:
    """The page's parts in order; one whose numbers can't be shown says so instead of taking the page with it."""
    groups: dict[str, list[View]] = {}
    for v in vs:
        if v.state != "not run":
            groups.setdefault(PARTS[v.kind][0] if v.kind in PARTS else "other", []).append(v)
    out = []
    for key, build in [*dict(PARTS.values()).items(), ("other", other_part)]:
        if key not in groups:
            continue
        try:
            part = build(groups[key])
        except FAULTS as e:
            part = Part(key, plain(groups[key][0].kind), notes=[f"These numbers can't be shown ({type(e).__name__}: {e})"])
        part.notes += [f"{v.name}: {n}" for v in groups[key] for n in v.notes]
        part.notes += [f"{v.name} is unfinished; this is what it has so far" for v in groups[key] if v.state == "unfinished"]
        if part.figures or part.tables or part.folds or part.notes:
            out.append(part)
    return out


def provenance(vs: list[View]) -> dict:
    ran = [v for v in vs if v.manifest]
    decided = [v.manifest.get("decisions") if isinstance(v.manifest.get("decisions"), dict) else {} for v in ran]
    summary = table("Every section", "section", [v.name for v in ran], [
        ("kind", [v.kind for v in ran]), ("state", [v.state for v in ran]),
        *((k, [_stamp(v.manifest.get(k)) for v in ran]) for k in ("started", "finished")),
        ("time", [duration(v.seconds) if v.seconds is not None else "–" for v in ran]), ("seed", [loose(v.manifest.get("seed")) for v in ran]),
        ("dtype", [loose(d.get("dtype")) for d in decided]), ("tokens a micro-batch", [loose(d.get("micro_batch_tokens")) for d in decided]),
        ("bit-exact", ["–" if (x := v.manifest.get("exact")) is None else "yes" if x else "no" for v in ran]),
        ("commit", [loose(v.manifest.get("commit")) for v in ran]), ("fingerprint", [str(v.manifest.get("fingerprint") or "–")[:10] for v in ran])])
    sections = [{"name": v.name, "config": v.config_text(),
                 "manifest": json.dumps({k: x for k, x in v.manifest.items() if k != "inputs"}, indent=1, ensure_ascii=False, default=str)} for v in ran]
    return {"tables": summary, "sections": sections}


def _stamp(value) -> str:
    return str(value).replace("T", " ") if value else "–"


def facts(run: Run, vs: list[View]) -> list[str]:
    """The small line under the title."""
    seconds = [v.seconds for v in vs if v.seconds is not None]
    commits = list(dict.fromkeys(str(v.manifest["commit"]) for v in vs if v.manifest.get("commit")))
    return [f for f in (
        f"base model {base_of(run, vs)}", f"{duration(sum(seconds))} of work" if seconds else "",
        f"seed {run.recipe.run.seed}", f"commit {listed(commits[:3])}" if commits else "", f"written {time.strftime('%Y-%m-%d %H:%M')}") if f]


def base_of(run: Run, vs: list[View]) -> str:
    names = [dig(v.manifest, "base", "name_or_path") for v in vs]
    return next((n for n in names if isinstance(n, str)), run.recipe.model.name_or_path)


def script_hash(text: str) -> str:
    """What the page's content policy allows to run: this script and nothing else."""
    return base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


def render(run: Run) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["script_hash"] = script_hash
    vs = views(run)
    try:
        found = answers(vs)
    except FAULTS:
        found = None
    return env.get_template("report.html.j2").render(
        title=run.recipe.run.name, verdict=verdict(vs), facts=facts(run, vs), stand_in=base_of(run, vs) == STAND_IN, checks=checks(vs),
        boxes=boxes(run, vs), parts=parts(vs), answers=found, provenance=provenance(vs), recipe=run.recipe.path)


def write(run: Run) -> Path:
    """Make runs/<run>/report.html and return its path. Raises OSError where the folder can't be written."""
    path = run.folder / "report.html"
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(run))
    return path


def show(run: Run) -> str:
    """A terminal table: a line a section with kind, state, time and key figures."""
    vs = views(run)
    rows = [(v.name, v.kind, v.state, duration(v.seconds) if v.seconds is not None else "–",
             "; ".join([*map(str, keys_of(v)), *v.notes])) for v in vs]
    head = ("section", "kind", "state", "time", "key figures")
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(4)]
    def line(cells):
        return "  ".join([*(c.rjust(w) if i == 3 else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=False))), cells[4]]).rstrip()
    seconds = sum(v.seconds for v in vs if v.seconds is not None)
    top = f"{run.recipe.run.name}: {states(vs)[:1].lower() + states(vs)[1:]}, {duration(seconds)} of work, in {run.folder}"
    return "\n".join([top, "", line(head), line(tuple("─" * w for w in widths) + ("─" * len(head[4]),)), *map(line, rows)])


KEYS = {"sft": sft_keys, "gatt": sft_keys, "reward": reward_keys, "rejection": rejection_keys, "ppo": ppo_keys, "evaluate": evaluate_keys,
        "export": export_keys}
PARTS = {"evaluate": ("result", evaluate_part), "sft": ("sft", sft_part), "reward": ("reward", reward_part), "rejection": ("rejection", rejection_part),
         "ppo": ("ppo", ppo_part), "export": ("export", export_part)}
