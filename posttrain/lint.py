"""What is wrong with a data set, row by row, before any GPU is used: the `check-data` command.

`check_recipe` and `check_file` read everything, stop at nothing, and return a Report; `render` and `to_json` show it.
A bad row cannot be used; a warning (duplicates, overlap, length bias, template tokens ...) can, and is worth a look.
"""

import difflib
import math
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice, pairwise
from pathlib import Path
from statistics import mean, median

from posttrain.config import DataEntry, HeldOut, Recipe
from posttrain.data import (
    HELD_OUT_FIELD,
    SUFFIXES,
    Finding,
    Item,
    Loaded,
    content,
    file_kind,
    held_out_keys,
    load_entry,
    prompt_key,
    read_rows,
    renamed,
)
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS, RATINGS, Demonstration, Pair, RowError, Skip, fitting, name_columns

TEMPLATE_TOKENS = re.compile(
    r"<\|(?:im_start|im_end|im_sep|eot_id|eom_id|start_header_id|end_header_id|begin_of_text|end_of_text|endoftext|user|assistant|system|end)\|>"
    r"|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|<extra_id_\d+>")
LENGTH_BINS = (1, 10, 20, 50, 100, 200, 500, 1000)  # words; a bin reaches up to the next one
_NUMBERS_SHOWN = 10


@dataclass
class Lengths:
    """Words of one part of every item. histogram: rows whose length is at least LENGTH_BINS[i] and below the next."""

    mean: float
    median: float
    p90: int
    max: int
    histogram: list[int]


@dataclass
class EntryReport:
    """One file or hub data set. kept: items after sampling; skipped: rightly no items (ties), by reason, with their row numbers."""

    file: str
    format: str
    rows: int = 0
    kept: int = 0
    bad: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_rows: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class SetReport:
    """One data set: its entries and what its kept items are like."""

    name: str
    kind: str
    entries: list[EntryReport]
    kept: int = 0
    held_out: int = 0
    removed: int = 0  # from training, because another data set holds their prompt out
    by_source: dict[str, int] = field(default_factory=dict)
    ratings: dict[str, int] = field(default_factory=dict)
    safety_bins: dict[str, int] = field(default_factory=dict)
    safety_prompts: int = 0
    lengths: dict[str, Lengths] = field(default_factory=dict)
    longer_chosen: float | None = None  # share of the pairs whose answers differ in length
    one_sided_models: dict[str, str] = field(default_factory=dict)
    shared_prompts: dict[str, int] = field(default_factory=dict)  # between two sources of this set


@dataclass
class Report:
    """rows: read; bad: findings of severity bad. shared_prompts: between two data sets, "a & b" -> prompts."""

    place: str
    sets: list[SetReport]
    findings: list[Finding]
    rows: int
    bad: int
    shared_prompts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Set:
    """A data set while it is looked at: where every item comes from, and its prompt's key."""

    name: str
    report: SetReport
    items: list[Item]
    places: list[tuple[str, int]]  # file, row
    keys: list[str]

    def warn(self, reason: str, i: int | None, detail: str) -> Finding:
        file, row = self.places[i] if i is not None else (self.name, None)
        return Finding("warning", reason, file, row, detail)


# -- row by row ----------------------------------------------------------------------------------------------------------------------


def _answers(item: Item) -> list[str]:
    if isinstance(item, Pair):
        return [item.chosen, item.rejected]
    return [m["content"] for m in item.messages if m["role"] == "assistant"] if isinstance(item, Demonstration) else []


def _asked(item: Item) -> list[str]:
    """What system and user say."""
    turns = item.prompt if isinstance(item, Pair) else item.messages
    return [m["content"] for m in turns if m["role"] != "assistant"]


def looks_truncated(answer: str) -> bool:
    """An open code fence, or a last line of prose (8 words and more, no list item) that stops inside a sentence."""
    if answer.count("```") % 2:
        return True
    last = answer.rsplit("\n", 1)[-1].strip()
    prose = len(last.split()) >= 8 and not re.match(r"[-*•>+]|\d+[.)]|//", last) and "|" not in last and "#" not in last
    return prose and "```" not in answer and (last[-1].isalpha() or last[-1] in ",;(-–")


def _row_warnings(s: _Set):
    """Template tokens, answers that break off, unsafe answers preferred to safe ones."""
    for i, item in enumerate(s.items):
        if isinstance(item, Pair) and item.unsafe_preferred:
            yield s.warn("unsafe_preferred", i, "the chosen answer is labelled unsafe, the rejected one safe: a safety reward model leaves the pair out")
        for who, texts in (("asking", _asked(item)), ("answering", _answers(item))):
            tokens = sorted({t for text in texts for t in TEMPLATE_TOKENS.findall(text)})
            if tokens:
                yield s.warn("template_token", i, f"the {who} side holds {', '.join(tokens)}")
        if any(map(looks_truncated, _answers(item))):
            yield s.warn("truncated_answer", i, "an answer stops inside a sentence or a code block")


def _repeats(s: _Set):
    """Rows that say the same as an earlier one, and pairs that say the opposite."""
    first: dict[tuple, int] = {}
    for i, item in enumerate(s.items):
        said = content(item)
        if said in first:
            if s.places[first[said]] != s.places[i]:
                file, row = s.places[first[said]]
                yield s.warn("duplicate", i, f"the same as row {row}" + (f" of {file}" if file != s.places[i][0] else ""))
            continue
        first[said] = i
        if isinstance(item, Pair):
            opposite = first.get((*said[:-2], said[-1], said[-2]))
            if opposite is not None:
                file, row = s.places[opposite]
                yield s.warn("contradictory", i, f"the opposite of row {row}" + (f" of {file}" if file != s.places[i][0] else ""))


# -- the set as a whole --------------------------------------------------------------------------------------------------------------


def _words(text: str) -> int:
    return len(text.split())


def _lengths(counts: list[int]) -> Lengths:
    ends = (*LENGTH_BINS[1:], math.inf)
    histogram = [sum(low <= max(c, 1) < high for c in counts) for low, high in zip(LENGTH_BINS, ends, strict=True)]
    return Lengths(mean(counts), median(counts), sorted(counts)[math.ceil(0.9 * len(counts)) - 1], max(counts), histogram)


def _describe(s: _Set) -> None:
    """Counts, lengths and label distributions of the kept items."""
    r, items = s.report, s.items
    r.kept, r.by_source, r.safety_prompts = len(items), dict(Counter(i.source for i in items)), sum(i.safety for i in items)
    if not items:
        return
    r.lengths["prompt"] = _lengths([sum(map(_words, _asked(i))) for i in items])
    if r.kind == "demonstration":
        r.lengths["answers"] = _lengths([sum(map(_words, _answers(i))) for i in items])
    if r.kind == "pair":
        r.lengths["chosen"], r.lengths["rejected"] = (_lengths([_words(t) for t in side]) for side in zip(*map(_answers, items), strict=True))
        names = {level: name for name, level in RATINGS.items()} | {None: "no rating"}
        ratings = Counter(i.rating for i in items)
        r.ratings = {name: ratings[level] for level, name in names.items() if ratings[level]}
        label = {True: "safe", False: "unsafe", None: "unlabelled"}
        bins = Counter(f"chosen {label[i.chosen_safe]}, rejected {label[i.rejected_safe]}" for i in items)
        r.safety_bins = dict(bins.most_common()) if set(bins) != {"chosen unlabelled, rejected unlabelled"} else {}


def _length_bias(s: _Set):
    """A share of pairs with the longer answer (in characters) chosen that is off one half by 5 points and by two standard errors."""
    signs = [len(i.chosen) - len(i.rejected) for i in s.items]
    unequal = [d > 0 for d in signs if d]
    if not unequal:
        return
    share = s.report.longer_chosen = mean(unequal)
    if abs(share - 0.5) > max(0.05, 1 / math.sqrt(len(unequal))):
        yield s.warn("length_bias", None, f"the longer answer is chosen in {share:.0%} of {len(unequal)} pairs: report length-balanced accuracy")


def _one_sided(s: _Set):
    """Answering models (meta chosen_model and rejected_model) that stand on one side in all of 10 pairs and more."""
    won, lost = (Counter(i.meta[k] for i in s.items if isinstance(i.meta.get(k), str) and i.meta[k]) for k in ("chosen_model", "rejected_model"))
    for side, here, there in (("chosen", won, lost), ("rejected", lost, won)):
        for model, count in here.most_common():
            if count >= 10 and not there[model]:
                s.report.one_sided_models[model] = f"{side} {count} of {count}"
                yield s.warn("one_sided_model", None, f"{model} is {side} {count} of {count} times: a model can learn who wrote it")


def _shared(parts: dict[str, set[str]]) -> dict[str, int]:
    """Prompts that two parts have in common."""
    both = {f"{a} & {b}": len(parts[a] & parts[b]) for a, b in combinations(parts, 2)}
    return {names: count for names, count in both.items() if count}


def _held_out(sets: list[_Set], held_out: HeldOut, seed: int, place: str):
    """What is held out, and what training loses because another set or source holds its prompt out."""
    kept_from: dict[str, frozenset[str]] = {}
    for s in sets:
        try:
            wish = getattr(held_out, HELD_OUT_FIELD[s.report.kind])
            kept_from[s.name] = held_out_keys(s.keys, wish if s.keys else 0, seed, f"{place}: data.{s.name}")
        except PosttrainError as e:
            kept_from[s.name] = frozenset()
            yield Finding("bad", "held_out", s.name, None, str(e))
    every = frozenset().union(*kept_from.values())
    for s in sets:
        s.report.held_out = sum(key in kept_from[s.name] for key in s.keys)
        for i, key in enumerate(s.keys):
            if key in every and key not in kept_from[s.name]:
                s.report.removed += 1
                holder = next(name for name, keys in kept_from.items() if key in keys)
                yield s.warn("overlap", i, f"its prompt is held out by data.{holder}, so training does not see it")


def _across_sources(s: _Set) -> None:
    parts = defaultdict(set)
    for item, key in zip(s.items, s.keys, strict=True):
        parts[item.source].add(key)
    s.report.shared_prompts = _shared(parts)


# -- the whole -----------------------------------------------------------------------------------------------------------------------


def _load(entry: DataEntry, recipe_dir: Path, seed: int, place: str) -> Loaded:
    """load_entry, with a file or data set that cannot be opened as one finding."""
    try:
        return load_entry(entry, recipe_dir, seed, place)
    except PosttrainError as e:
        finding = Finding("bad", "unreadable", entry.path, None, str(e))
        return Loaded([], [finding], 0, {}, "", FORMATS[entry.format].kind, [])


def _set(name: str, entries: list[DataEntry], loaded: list[Loaded]) -> _Set:
    reports = [EntryReport(e.path, e.format, p.rows, len(p.items), len(p.findings), p.skipped, p.skipped_rows)
               for e, p in zip(entries, loaded, strict=True)]
    items = [i for p in loaded for i in p.items]
    places = [(e.path, row) for e, p in zip(entries, loaded, strict=True) for row in p.row_numbers]
    return _Set(name, SetReport(name, loaded[0].kind, reports), items, places, [prompt_key(i) for i in items])


def check(data_sets: dict[str, list[DataEntry]], recipe_dir: Path, place: str, held_out: HeldOut | None = None, seed: int = 0) -> Report:
    """Look at every row of every data set."""
    sets, findings, rows = [], [], 0
    for name, entries in data_sets.items():
        loaded = [_load(entry, recipe_dir, seed, f"{place}: data.{name}[{i}]") for i, entry in enumerate(entries)]
        findings += [f for part in loaded for f in part.findings]
        rows += sum(part.rows for part in loaded)
        kinds = sorted({part.kind for part in loaded})
        if len(kinds) > 1:
            findings.append(Finding("bad", "mixed_kinds", name, None, f"holds {' and '.join(k + 's' for k in kinds)}: make a data set of each"))
        elif entries:
            sets.append(_set(name, entries, loaded))
    for s in sets:
        _describe(s)
        _across_sources(s)
        findings += [*_row_warnings(s), *_repeats(s)]
        if s.report.kind == "pair":
            findings += [*_length_bias(s), *_one_sided(s)]
    findings += _held_out(sets, held_out or HeldOut(), seed, place)
    bad = sum(f.severity == "bad" for f in findings)
    return Report(place, [s.report for s in sets], findings, rows, bad, _shared({s.name: set(s.keys) for s in sets}))


def check_recipe(recipe: Recipe) -> Report:
    """Every data set of a recipe."""
    return check(recipe.data_sets, Path(recipe.path).parent, recipe.path, recipe.held_out, recipe.run.seed)


def check_file(path: str | Path, format: str | None = None, columns: dict[str, str] | None = None) -> Report:
    """One local file (or hub name with a format). Without a format, the one that fits its first rows."""
    chosen = choose_format(Path(path), format, columns or {}, "check-data")
    report = check({Path(path).name: [DataEntry(path=str(path), format=chosen, columns=columns or {})]}, Path(), str(path))
    if format is None:
        report.notes.append(f"format: {chosen} (guessed from the columns; --format takes another)")
    return report


def _usable(name: str, row: dict) -> bool:
    try:
        FORMATS[name].read(row)
    except RowError:
        return False
    except Skip:
        pass
    return True


def choose_format(path: Path, format: str | None, columns: dict[str, str], place: str) -> str:
    """The format asked for, if there is such a one; without one, the one that fits the first rows."""
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        raise PosttrainError(place, f"unknown format '{format}'", f"one of {', '.join(FORMATS)}", f"Did you mean '{near[0]}'?" if near else "")
    return format or guess_format(path, columns)


def guess_format(path: Path, columns: dict[str, str]) -> str:
    """Of the formats that can read half of the first 20 rows, the one that needs most columns; else one whose columns are there.

    Of formats that need the same columns only the first, native one counts, and `prompt`, which looks at nothing but the prompt, only
    where no other fits: rows with bad labels are not to be taken for a kind that has none."""
    if file_kind(path) is None:
        raise PosttrainError(str(path), "not a kind of file we read", f"a name that ends in {', '.join(SUFFIXES)}, or one of these with .gz",
                             "For a hub data set give its format.")
    try:
        rows = list(islice((row for _, row in read_rows(path) if isinstance(row, dict)), 20))
        rows = [renamed(row, columns) for row in rows]
    except RowError as e:
        raise PosttrainError(str(path), str(e)) from None
    except OSError as e:
        raise PosttrainError(str(path), f"cannot be read ({e.strerror})", "a readable file", "Check the path and its permissions.") from None
    if not rows:
        return "messages"  # nothing to tell formats apart by: every row is broken, which any format reports
    names = list({f.columns: name for name, f in reversed(FORMATS.items())}.values())[::-1]
    there = [name for name in names if sum(name in fitting(row) for row in rows) * 2 >= len(rows)]
    able = [name for name in names if sum(_usable(name, row) for row in rows) * 2 >= len(rows)]
    able = [n for n in able if n != "prompt"] or [n for n in there if n != "prompt"] or able or there
    if not able:
        raise PosttrainError(str(path), f"its columns fit no format ({name_columns(rows[0])})", f"those of one of {', '.join(FORMATS)}",
                             "Give --format, and map the names with columns.")
    return max(able, key=lambda name: len(FORMATS[name].columns))


def exit_code(report: Report, strict: bool = False) -> int:
    """1 when any row cannot be used, or with `strict` when there is any warning."""
    return int(any(f.severity == "bad" or strict for f in report.findings))


def to_json(report: Report) -> dict:
    """Everything in the report, every finding with its row, in types that JSON has."""
    return asdict(report) | {"warnings": len(report.findings) - report.bad}


# -- text ----------------------------------------------------------------------------------------------------------------------------


def _table(rows: list[list], indent: str = "  ") -> list[str]:
    """Aligned columns: text to the left, numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [not isinstance(c, str) for c in rows[-1]]
    return [(indent + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))).rstrip() for row in cells]


def _histogram(lengths: dict[str, Lengths]) -> list[str]:
    """One row a bin, one bar a part, in per cent of the items."""
    names = [f"{low}-{high - 1}" for low, high in pairwise(LENGTH_BINS)] + [f"{LENGTH_BINS[-1]}+"]
    lines = ["  " + "words".ljust(9) + "".join(part.ljust(28) for part in lengths).rstrip()]
    for i, name in enumerate(names):
        shares = [part.histogram[i] / sum(part.histogram) for part in lengths.values()]
        if any(shares):
            bars = [f"{share:4.0%} {'#' * round(share * 20)}" for share in shares]
            lines.append("  " + name.rjust(7) + "  " + "".join(bar.ljust(28) for bar in bars).rstrip())
    return lines


def _counted(title: str, counts: dict[str, int]) -> list[str]:
    total = sum(counts.values())
    return [f"  {title}", *_table([[name, n, f"{n / total:.0%}"] for name, n in counts.items()], "    ")] if counts else []


def _rows_of(findings: list[Finding]) -> str:
    """file: row, row, row and 12 more; file: ..."""
    by_file = defaultdict(list)
    for f in findings:
        by_file[f.file].append(f.row)
    return "; ".join(name + _numbers(rows) for name, rows in by_file.items())


def _numbers(rows: list[int | None]) -> str:
    known = [str(r) for r in rows if r is not None]
    more = f" and {len(known) - _NUMBERS_SHOWN} more" if len(known) > _NUMBERS_SHOWN else ""
    return f": row {', '.join(known[:_NUMBERS_SHOWN])}{more}" if known else ""


def _findings(title: str, findings: list[Finding]) -> list[str]:
    """By reason, most frequent first, with rows and the first one's words."""
    groups = defaultdict(list)
    for f in findings:
        groups[f.reason].append(f)
    lines = [title] if groups else []
    for reason, group in sorted(groups.items(), key=lambda g: -len(g[1])):
        lines.append(f"  {reason} ({len(group)})  {_rows_of(group)}")
        alike = len({f.detail for f in group}) == 1
        lines += ["    " + (f"row {f.row}: " if f.row and not alike else "") + f.detail for f in group[:1 if alike else 3]]
    return [*lines, ""] if lines else []


def _render_set(s: SetReport) -> list[str]:
    lines = [f"{s.name}: {s.kept} {s.kind}s"]
    lines += _table([["file", "format", "rows", "kept", "bad", "skipped"],
                     *([e.file, e.format, e.rows, e.kept, e.bad, sum(e.skipped.values())] for e in s.entries)])
    for e in s.entries:
        lines += [f"  skipped, {reason} ({len(rows)})  {e.file}{_numbers(rows)}" for reason, rows in e.skipped_rows.items()]
    if s.held_out or s.removed:
        lines.append(f"  {s.held_out} rows held out, {s.kept - s.held_out - s.removed} to train on"
                     + (f", {s.removed} removed from training because another data set holds their prompt out" if s.removed else ""))
    if s.safety_prompts:
        lines.append(f"  {s.safety_prompts} rows carry the safety tag")
    lines += [f"  {n} prompts are in both {names}" for names, n in s.shared_prompts.items()]
    lines += _counted("ratings", s.ratings) + _counted("safety", s.safety_bins)
    if s.lengths:
        lines += _table([["length in words", "mean", "median", "90 %", "max"],
                         *([part, round(v.mean), round(v.median), v.p90, v.max] for part, v in s.lengths.items())])
        lines += _histogram(s.lengths)
    if s.longer_chosen is not None:
        lines.append(f"  the longer answer is chosen in {s.longer_chosen:.1%} of the pairs (in characters)")
    return [*lines, ""]


def render(report: Report) -> str:
    """Plain text for a terminal. The last line reads `N bad of M rows`."""
    lines = [report.place, *report.notes, ""]
    for s in report.sets:
        lines += _render_set(s)
    lines += [f"{n} prompts are in both {names}" for names, n in report.shared_prompts.items()] + [""] * bool(report.shared_prompts)
    lines += _findings("Rows that cannot be used", [f for f in report.findings if f.severity == "bad"])
    lines += _findings("Warnings", [f for f in report.findings if f.severity == "warning"])
    return "\n".join([*lines, f"{report.bad} bad of {report.rows} rows"])
