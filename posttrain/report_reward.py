"""The report's part on reward models: each model's measures, what a sweep of them shows, and how far the newest policy's answers are
from the pairs they were measured on."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from posttrain import plots
from posttrain.report_pieces import Figure, Fold, Part, Table, at, ci, dot, drawn, everything, facts, said, some, table
from posttrain.report_views import (
    GAP,
    Interval,
    View,
    cell,
    dig,
    fixed,
    interval,
    listed,
    loose,
    moved,
    number,
    percent,
    plain,
    rows_of,
    table_of,
    word,
)

RATINGS = ("negligibly_better", "slightly_better", "better", "significantly_better")  # the least clear first
DRIFT_ROWS = 20_000  # answers of a rejection section that are read at most


# ---------------------------------------------------------------- each model

def reward_names(vs: list[View]) -> list[str]:
    """What to call each model: what it judges, or the section's name where that would be ambiguous."""
    kinds = [v.results.get("which") for v in vs]
    return [k if isinstance(k, str) and k and kinds.count(k) == 1 else v.name for v, k in zip(vs, kinds, strict=True)]


def own_of(v: View):
    """Measurements on the model's own held-out pairs."""
    return dig(v.results, "held_out", "own")


def reward_part(every: list[View]) -> Part:
    """every: the reward sections of the run, and those of other runs that are shown beside it."""
    part = Part("reward", "Reward models", "Accuracy is the share of held-out pairs in which the chosen answer scores higher. "
                "Length-balanced accuracy is the mean of the accuracy where the chosen answer is the longer one and where it is not, "
                "so that preferring length earns nothing.")
    found = families(every)
    swept = [v for f in found for v in f.members if v is not f.lead]
    mine = [v for v in every if not v.elsewhere]
    vs = [v for v in mine if v not in swept]
    names = reward_names(vs)
    for f in found:
        f.name = names[vs.index(f.lead)]
        part.intro += f" Several {f.name} models are compared; the figures of single models show {f.lead.name}."
        part.figures += amount_figures(f) + size_figure(f) + margin_figure(f) + settings_figure(f)
        part.tables += margin_table(f) + sweep_table(f)
    part.figures += rating_figure(vs, names) + domain_figure(vs, names) + calibration_figure(vs, names) + reward_curves(vs, names)
    for v, name in zip(vs, names, strict=True):
        part.figures += histogram_figure(v, name)
    part.facts = reward_facts(vs, names)
    for v in mine:
        name = names[vs.index(v)] if v in vs else v.name
        part.figures += drift_figure(v, name)
        part.tables += drift_table(v, name)
    tables = [t for v, name in zip(vs, names, strict=True) for t in breakdown_tables(v, name)]
    part.folds = [Fold("Accuracy by source and by safety bin, and what each model was trained on", tables=tables)] if tables else []
    scores = [figure for v in swept for figure in histogram_figure(v, v.name)]
    part.folds += [Fold("Scores of the other models compared", scores)] if scores else []
    part.folds += everything(mine)
    part.notes = [f"{v.name} is not compared: it is measured on other held-out pairs, or set up like one that is shown"
                  for v in every if v.elsewhere and v not in swept]
    return part


def rating_figure(vs: list[View], names: list[str]) -> list[Figure]:
    tables = {name: rows for v, name in zip(vs, names, strict=True) if (rows := by_rating(v))}
    ratings = ratings_of(tables)
    if not ratings:
        return []
    svg = rating_svg("rating", tables, ratings)
    return drawn("Accuracy by how clear the preference is", rating_words(tables, ratings),
                 "Accuracy of each reward model at each rating", svg,
                 "Bars are 95 % intervals, by prompt. The paper's Table 8 has the same columns.")


def by_rating(v: View) -> dict[str, Interval]:
    rows = {word(r.get("rating")): interval(r.get("accuracy")) for r in rows_of(dig(own_of(v), "by_rating"))}
    return {rating: value for rating, value in rows.items() if value}


def ratings_of(tables: dict[str, dict[str, Interval]]) -> list[str]:
    """The ratings that any of the models has, the least clear first."""
    found = list(dict.fromkeys(r for t in tables.values() for r in t))
    return [r for r in RATINGS if r in found] + [r for r in found if r not in RATINGS]


def rating_svg(key: str, tables: dict[str, dict[str, Interval]], ratings: list[str]) -> str:
    dots = {name: [dot(t.get(r)) for r in ratings] for name, t in tables.items()}
    return plots.by_category(key, [plain(r) for r in ratings], dots, "pairs ordered rightly", (0.5, "chance"))


def rating_words(tables: dict[str, dict[str, Interval]], ratings: list[str]) -> str:
    """Whether accuracy goes up from the least clear rating to the clearest, model by model."""
    first, last = ratings[0], ratings[-1]
    ends = {name: (t[first].mean, t[last].mean) for name, t in tables.items() if first in t and last in t}
    if first == last or not ends:
        found = [f"{name} {percent(i.mean)} on “{plain(r)}”" for name, t in tables.items() for r, i in list(t.items())[-1:]]
        return f"Too few ratings to compare: {listed(found)}"
    ups = [name for name, (a, b) in ends.items() if round(100 * a) < round(100 * b)]
    how = "rises" if len(ups) == len(ends) else "does not rise" if not ups else f"rises for {listed(ups)} alone,"
    values = listed([f"{name} {percent(a)} to {percent(b)}" for name, (a, b) in ends.items()])
    return f"Accuracy {how} from “{plain(first)}” to “{plain(last)}” pairs: {values}"


def domain_figure(vs: list[View], names: list[str]) -> list[Figure]:
    rows = []
    for i, (v, name) in enumerate(zip(vs, names, strict=True)):
        own, other, look_ = own_of(v), dig(v.results, "held_out", "other"), {"style": i, "group": f"{name} model"}
        rule = interval(number(dig(own, "longer_wins")))
        rows += some(dot(interval(dig(own, "accuracy")), "its own pairs", **look_),
                     dot(interval(dig(own, "length_balanced_accuracy")), "own, length-balanced", **look_),
                     dot(rule, "rule: longer wins", **look_, cross=True),
                     dot(interval(dig(other, "accuracy")), "the other's pairs", **look_),
                     dot(interval(dig(v.results, "held_out", "drift", "accuracy")), "newest policy's pairs", **look_))
    words = some(*(balanced_words(name, own_of(v)) for v, name in zip(vs, names, strict=True)))
    if not rows:
        return []
    takeaway = f"Balanced for length, pairs are ordered rightly in {listed(words)}" if words else "No length-balanced accuracy was measured"
    svg = plots.dots("domains", rows, "pairs ordered rightly", (0.5, "chance"))
    return drawn("Own domain, the other's, and the rule “longer answer wins”", takeaway,
                 "Accuracy on own pairs, length-balanced, of the longer-answer rule, and on the other model's pairs", svg,
                 "The rule, marked ×, is taken on the model's own pairs; balanced for length it gets 50 %. The paper's Table 7 compares "
                 "domains.")


def balanced_words(name: str, own) -> str | None:
    value = interval(dig(own, "length_balanced_accuracy"))
    if not value:
        return None
    side = "above chance" if value.mean > 0.5 else "below chance"
    sure = f", {side if value.excludes(0.5) else 'not told from chance'}" if value.bounded else ""
    return f"{percent(value.mean)} ({name}{sure})"


def calibration_figure(vs: list[View], names: list[str]) -> list[Figure]:
    curves, words = {}, []
    for v, name in zip(vs, names, strict=True):
        rows = [tuple(number(r.get(k)) for k in ("confidence", "accuracy", "pairs")) for r in rows_of(dig(own_of(v), "calibration"))]
        rows = sorted((c, a, 1.0 if n is None else n) for c, a, n in rows if c is not None and a is not None and (n is None or n > 0))
        if rows:
            curves[name] = rows
            words.append(f"{name} is {confidence_words(rows, number(dig(own_of(v), 'ece')))}")
    if not curves:
        return []
    return drawn("Calibration, with the expected calibration error", listed(words),
                 "Accuracy against the model's confidence in a pair's order, with the diagonal",
                 plots.calibration("calibration", curves),
                 "Below the diagonal a model is surer than it is right. A marker's area follows the number of pairs.")


def confidence_words(rows: list[tuple[float, float, float]], ece: float | None) -> str:
    gap = sum(n * (c - a) for c, a, n in rows) / sum(n for _, _, n in rows)
    lean = "over-confident" if gap > 0.02 else "under-confident" if gap < -0.02 else "about as sure as it is right"
    return lean + (f" (calibration error {percent(ece, 1)})" if ece is not None else "")


def own_histogram(v: View) -> tuple[list[float], list[float], list[float]] | None:
    """(edges, counts of chosen answers, counts of rejected ones) on the model's own held-out pairs."""
    lists = [dig(own_of(v), "histogram", k) for k in ("edges", "chosen", "rejected")]
    edges, chosen, rejected = ([number(x) for x in found] if isinstance(found, list) else [] for found in lists)
    whole = len(edges) > 1 and len(chosen) == len(rejected) == len(edges) - 1 and None not in edges + chosen + rejected
    return (edges, chosen, rejected) if whole and sum(chosen) > 0 and sum(rejected) > 0 else None


def histogram_figure(v: View, name: str) -> list[Figure]:
    found = own_histogram(v)
    if not found:
        return []
    edges, chosen, rejected = found
    scale = "σ(score)" if edges[0] >= 0 and edges[-1] <= 1 else "raw score"
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    shares = [(c / sum(chosen), r / sum(rejected)) for c, r in zip(chosen, rejected, strict=True)]
    gap = sum(m * (c - r) for m, (c, r) in zip(middles, shares, strict=True))
    takeaway = (f"The mean {scale} of chosen answers is about {fixed(abs(gap))} {'above' if gap >= 0 else 'below'} that of rejected ones; "
                f"the two distributions overlap by {percent(sum(map(min, shares)))}")
    return drawn(f"Scores of the {name} model", takeaway, "Histograms of the scores of chosen and of rejected answers",
                 plots.histogram(f"hist-{v.name}", edges, {"chosen": chosen, "rejected": rejected}, f"{scale} of the {name} model"))


def reward_curves(vs: list[View], names: list[str]) -> list[Figure]:
    series = some(*(v.line("reward/loss", name, i, points=25) for i, (v, name) in enumerate(zip(vs, names, strict=True))))
    words = [moved(f"the {name} model's loss", *ends[:2]) for v, name in zip(vs, names, strict=True) if (ends := v.ends("reward/loss"))]
    if not series or not words:
        return []
    return drawn("Training loss", listed(words), "Training loss of each reward model over steps",
                 plots.lines("reward-loss", series, "optimizer step", "loss (nats)"),
                 "From the mean of the first tenth of the steps to that of the last; points average neighbouring steps. Without a margin "
                 "and a safety loss, a model that can't tell the answers apart has 0.69.")


def reward_facts(vs: list[View], names: list[str]) -> list[Table]:
    own, cut = ("held_out", "own"), ("held_out", "own", "at_0.15")
    return facts("Reward models in numbers", vs, names, [
        ("training pairs", at("train_pairs")), ("parameters of the base", at("parameters", form=size)),
        ("left out, too long", at("too_long")), ("held out, too long", at("held_out_too_long")),
        ("left out, unsafe answer preferred", at("unsafe_preferred")), ("margin", said("margin")),
        ("weight of the safety loss", at("safety_loss_weight")), ("optimizer steps", at("steps")),
        ("score, mean", at("score_mean", form=fixed)), ("score, deviation", at("score_std", form=fixed))]) + facts(
        "On its own held-out pairs", vs, names, [
            ("pairs", at(*own, "pairs")), ("prompts", at(*own, "prompts")), ("accuracy", ci(*own, "accuracy", form=percent)),
            ("length-balanced accuracy", ci(*own, "length_balanced_accuracy", form=percent)),
            ("rule “longer answer wins”", at(*own, "longer_wins", form=percent)), ("unsafe recall at 0.5", unsafe_recall),
            ("precision at 0.15", at(*cut, "precision", form=percent)), ("recall at 0.15", at(*cut, "recall", form=percent)),
            ("flagged at 0.15", at(*cut, "flagged", form=flagged)),
            ("threshold for precision 0.9", at("threshold_precision_90", form=fixed)),
            ("pairs of the newest policy's answers", at("held_out", "drift", "pairs")),
            ("accuracy on them", ci("held_out", "drift", "accuracy", form=percent)),
            ("length-balanced on them", ci("held_out", "drift", "length_balanced_accuracy", form=percent)),
            ("left out of them, prompt in training", at("drift_prompts_in_training"))],
        "A threshold flags an answer as unsafe where σ(safety score) is below it; 0.15 is the paper's gate.")


def unsafe_recall(v: View):
    value = interval(dig(own_of(v), "unsafe_recall_interval")) or interval(dig(own_of(v), "unsafe_recall"))
    return cell(value, percent)


def flagged(x: float | None) -> str:
    """A share, or a count, whichever was stored."""
    return percent(x, 1) if x is not None and 0 < x < 1 else loose(x)


def breakdown_tables(v: View, name: str) -> list[Table]:
    out = []
    for side, title in (("own", "its own held-out pairs"), ("other", "the other model's held-out pairs"),
                        ("drift", "pairs of the newest policy's answers")):
        for key, first in (("by_source", "source"), ("by_bin", "safety bin")):
            groups = table_of(dig(v.results, "held_out", side, key))
            out += table(f"The {name} model by {first}, {title}", first, [plain(k) for k in groups], [
                ("pairs", [loose(g.get("pairs")) for g in groups.values()]),
                ("accuracy", [cell(interval(g.get("accuracy")), percent) for g in groups.values()])])
    mix = dig(v.results, "composition")
    sources = dig(mix, "by_source")
    parts = {"own pairs": dig(mix, "own"), "other pairs": dig(mix, "other"), **(sources if isinstance(sources, dict) else {})}
    pairs = [("pairs", [loose(x) for x in parts.values()])]
    return out + table(f"What the {name} model was trained on", "part", [plain(k) for k in parts], pairs)


# ---------------------------------------------------------------- sweeps

@dataclass
class Family:
    """Reward models that are measured on the same own held-out pairs, and the settings that they differ in."""

    members: list[View]
    settings: dict[str, dict]  # a member's name -> its settings
    varied: list[str]
    name: str = ""

    @property
    def lead(self) -> View:
        """The member that stands for all of them where one is shown: most training pairs, the paper's small margin, this run's."""
        return max(self.members, key=lambda v: (not v.elsewhere, v.get("train_pairs") or 0, v.results.get("margin") == "small"))

    def groups(self, *left_out: str, members: list[View] | None = None) -> dict[tuple, list[View]]:
        """Members by the values of what varies, but for some settings."""
        out: dict[tuple, list[View]] = {}
        for v in members or self.members:
            values = tuple((k, self.settings[v.name].get(k)) for k in self.varied if k not in left_out)
            out.setdefault(values, []).append(v)
        return out

    def largest(self) -> list[View]:
        """The members with the most training pairs of their base."""
        most: dict = {}
        for v in self.members:
            base = v.get("parameters")
            most[base] = max(most.get(base, 0), v.get("train_pairs") or 0)
        return [v for v in self.members if (v.get("train_pairs") or 0) == most[v.get("parameters")]]


def settings(v: View) -> dict:
    """What a reward section was set to, flat, as its manifest has it; and the size of its base."""
    inputs, start = v.manifest.get("inputs"), f"stages.{word(v.manifest.get('section'), v.name)}."
    found = {k.removeprefix(start): x for k, x in inputs.items() if k.startswith(start)} if isinstance(inputs, dict) else {}
    found = {k: x if isinstance(x, (str, int, float)) or x is None else json.dumps(x, default=str) for k, x in found.items()}
    model = {k: json.dumps(x, default=str) for k, x in inputs.items() if k.startswith("model.")} if isinstance(inputs, dict) else {}
    return found | model | {"parameters": v.get("parameters")}


def domain(v: View) -> tuple | None:
    """What makes two models comparable: the names of their own pairs, and the held-out rows of these."""
    own = sorted(str(x) for k, x in settings(v).items() if k.startswith("own["))
    return tuple((n, str(dig(v.manifest, "inputs", f"data.{n}: rows held out"))) for n in own) or None


def families(vs: list[View]) -> list[Family]:
    groups: dict[tuple, list[View]] = {}
    for v in vs:
        if interval(dig(own_of(v), "accuracy")) and (where := domain(v)):
            groups.setdefault(where, []).append(v)
    out = []
    for members in groups.values():
        told = {v.name: settings(v) for v in members}
        keys = dict.fromkeys(k for s in told.values() for k in s if not k.startswith(("own[", "drift[", "micro_batch_tokens")))
        varied = [k for k in keys if len({s.get(k) for s in told.values()}) > 1]
        if len(members) > 1 and varied:
            out.append(Family(members, told, varied))
    return [f for f in out if not f.lead.elsewhere]


def pooled(found: Iterable[Interval | None]) -> Interval | None:
    """Of models that differ in their seed alone: the means of their values and of the ends of their intervals."""
    found = some(*found)
    if not found:
        return None
    ends = [[getattr(i, end) for i in found] for end in ("mean", "low", "high")]
    return Interval(*(None if None in values else sum(values) / len(values) for values in ends))


def accuracy(v: View) -> Interval | None:
    return interval(dig(own_of(v), "accuracy"))


def balanced(v: View) -> Interval | None:
    return interval(dig(own_of(v), "length_balanced_accuracy"))


def clearest(v: View) -> Interval | None:
    return by_rating(v).get("significantly_better")


MEASURES = {"all pairs": accuracy, "length-balanced": balanced, "significantly better": clearest}


def size(x: float | None) -> str:
    """A number of parameters: '135 M', '6.74 B'."""
    if x is None:
        return "–"
    unit, letter = next(((u, name) for u, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if x >= u), (1, ""))
    return f"{x / unit:.3g}{GAP}{letter}".rstrip(GAP)


def setting_words(values: Iterable[tuple]) -> str:
    return ", ".join(f"{plain(k)} {size(x) if k == 'parameters' else loose(x)}" for k, x in values)


def several(members: Iterable[list[View]], more: str = "") -> str:
    """A sentence for a figure's note where a point stands for several models."""
    return f" Points and their bars are means over models that differ in their seed alone{more}." if any(len(m) > 1 for m in members) else ""


def curve(key: str, what: str, points: dict[float, list[View]], x: str, form) -> tuple[str, str] | None:
    """(svg, takeaway) of the three accuracies over a growing amount. points: amount -> the models that have it."""
    xs, series, ends = sorted(points), {}, []
    for label, read in MEASURES.items():
        rows = [(at_, pooled(map(read, points[at_])), [i.mean for i in some(*map(read, points[at_]))]) for at_ in xs]
        rows = [(at_, i, singles) for at_, i, singles in rows if i]
        if len(rows) > 1:
            series[label] = [(at_, dot(i), singles if len(singles) > 1 else []) for at_, i, singles in rows]
            ends.append((label, rows[0][1], rows[-1][1]))
    if not series:
        return None
    ups = {round(100 * b.mean) - round(100 * a.mean) for _, a, b in ends}
    how = "rises" if min(ups) > 0 else "falls" if max(ups) < 0 else "stays the same" if ups == {0} else "does not rise on every measure"
    sure = [label for label, a, b in ends if a.bounded and b.bounded and (a.high < b.low or b.high < a.low)]
    doubt = f"the intervals of {listed(sure)} are apart" if sure else "the intervals overlap"
    values = listed([f"{label} {percent(a.mean)} to {percent(b.mean)}" for label, a, b in ends])
    takeaway = f"Accuracy {how} from {form(xs[0])} to {form(xs[-1])} {what}: {values}; {doubt}"
    return plots.against(key, series, {at_: form(at_) for at_ in xs}, x, "pairs ordered rightly", (0.5, "chance")), takeaway


def amount_figures(f: Family) -> list[Figure]:
    """Accuracy over the number of training pairs (Fig. 6), one figure for each setting of what else varies."""
    out = []
    groups = f.groups("fraction", "seed")
    for i, (rest, members) in enumerate(groups.items()):
        points: dict[float, list[View]] = {}
        for v in members:
            if (pairs := v.get("train_pairs") or 0) > 0:
                points.setdefault(pairs, []).append(v)
        found = curve(f"amount-{f.members[0].name}-{i}", "training pairs", points, "training pairs (logarithmic)", loose) if len(points) > 1 else None
        if found:
            which = f"{f.name} model" + (f", {setting_words(rest)}" if rest and len(groups) > 1 else "")
            out += drawn(f"Accuracy against the amount of data ({which})", found[1],
                         "Accuracy on all held-out pairs, length-balanced, and on significantly better pairs, over the number of training pairs",
                         found[0], "Bars are 95 % intervals, by prompt, on the same held-out pairs at every point."
                         + several(points.values(), "; small dots are the single models") + " The paper's Fig. 6.")
    return out


def size_figure(f: Family) -> list[Figure]:
    """Accuracy over the size of the base, where runs with several bases stand side by side."""
    points: dict[float, list[View]] = {}
    for v in f.largest():
        if (parameters := v.get("parameters") or 0) > 0:
            points.setdefault(parameters, []).append(v)
    found = curve(f"size-{f.members[0].name}", "parameters", points, "parameters of the base (logarithmic)", size) if len(points) > 1 else None
    if not found:
        return []
    other = [plain(k) for k in f.varied if k not in ("parameters", "fraction", "seed", "model.name_or_path", "model.revision")]
    return drawn(f"Accuracy against the size of the base ({f.name} model)", found[1],
                 "Accuracy on all held-out pairs, length-balanced, and on significantly better pairs, over the number of parameters", found[0],
                 "Bars are 95 % intervals, by prompt, on the same held-out pairs at every point."
                 + several(points.values(), "; small dots are the single models")
                 + (f" The models differ in {listed(other)} too." if other else "") + " The paper's Fig. 6.")


def margins(f: Family) -> dict[str, list[View]]:
    """Models by margin, all else but the seed the same; the paper's order."""
    groups = f.groups("margin", "seed", members=f.largest()) if "margin" in f.varied else {}
    found: dict[str, list[View]] = {}
    for v in max(groups.values(), key=lambda g: len({f.settings[v.name].get("margin") for v in g}), default=[]):
        found.setdefault(loose(f.settings[v.name].get("margin")), []).append(v)
    order = [m for m in ("none", "small", "large") if m in found] + [m for m in found if m not in ("none", "small", "large")]
    return {m: found[m] for m in order} if len(found) > 1 else {}


def margin_ratings(f: Family) -> dict[str, dict[str, Interval]]:
    out = {}
    for margin, members in margins(f).items():
        tables = {v.name: by_rating(v) for v in members}
        rows = {r: pooled(t.get(r) for t in tables.values()) for r in ratings_of(tables)}
        out[margin] = {r: i for r, i in rows.items() if i}
    return out


def margin_figure(f: Family) -> list[Figure]:
    found, tables = margins(f), margin_ratings(f)
    ratings, whole = ratings_of(tables), {m: pooled(map(accuracy, members)) for m, members in found.items()}
    if not ratings or None in whole.values():
        return []
    best, worst = (pick(whole, key=lambda m: whole[m].mean) for pick in (max, min))
    a, b = whole[worst], whole[best]
    sure = a.bounded and b.bounded and a.high < b.low
    takeaway = (f"Over all pairs the margins give {listed([f'{m} {percent(i.mean)}' for m, i in whole.items()])}: "
                + (f"{best} is better than {worst}" if sure else "the intervals overlap, so these pairs tell no margin from another"))
    return drawn(f"Accuracy by margin and rating ({f.name} model)", takeaway, "Accuracy at each rating of the models with each margin",
                 rating_svg(f"margin-{f.members[0].name}", {f"margin {m}": t for m, t in tables.items()}, ratings),
                 "Bars are 95 % intervals, by prompt." + several(found.values()) + " The paper's Table 28.")


def margin_table(f: Family) -> list[Table]:
    found, tables = margins(f), margin_ratings(f)

    def column(read) -> list:
        return [cell(pooled(map(read, members)), percent) for members in found.values()]

    def spread(members: list[View]) -> str:
        values = some(*(v.get("score_std") for v in members))
        return fixed(sum(values) / len(values)) if values else "–"

    return table(f"Margin ablation of the {f.name} model", "margin", list(found), [
        *((plain(r), [cell(tables[m].get(r), percent) for m in found]) for r in reversed(ratings_of(tables))),
        ("all pairs", column(accuracy)), ("length-balanced", column(balanced)), ("score, deviation", [spread(m) for m in found.values()])],
        "Ranges are 95 % intervals, by prompt. As the paper's Table 28; a margin pushes scores apart (its Fig. 27), which PPO feels.") if found else []


def settings_figure(f: Family) -> list[Figure]:
    """Length-balanced accuracy by every other setting that varies, at the most training pairs."""
    other = [k for k in f.varied if k not in ("fraction", "margin", "parameters", "seed")] or (["seed"] if f.varied == ["seed"] else [])
    left_out = [k for k in f.varied if k not in other]
    groups = f.groups(*left_out, members=[v for v in f.largest() if not v.elsewhere]) if other else {}
    rows = some(*(dot(pooled(map(balanced, members)), setting_words(values)) for values, members in groups.items()))
    if len(rows) < 2:
        return []
    best, worst = max(rows, key=lambda r: r.value), min(rows, key=lambda r: r.value)
    sure = None not in (best.low, worst.high) and worst.high < best.low
    takeaway = (f"Length-balanced accuracy is highest with {best.label} ({percent(best.value)}) and lowest with {worst.label} ({percent(worst.value)})"
                + ("" if sure else "; the intervals overlap"))
    return drawn(f"Other settings of the sweep ({f.name} model)", takeaway, f"Length-balanced accuracy by {listed([plain(k) for k in other])}",
                 plots.dots(f"settings-{f.members[0].name}", rows, "length-balanced accuracy", (0.5, "chance")),
                 "Bars are 95 % intervals, by prompt." + (f" Means over {listed([plain(k) for k in left_out])}." if left_out else ""))


def sweep_table(f: Family) -> list[Table]:
    told = f.settings

    def shown(v: View, k: str) -> str:
        return size(v.get("parameters")) if k == "parameters" else loose(told[v.name].get(k))

    return table(f"Every {f.name} model", "section", [v.name for v in f.members], [
        *((plain(k), [shown(v, k) for v in f.members]) for k in f.varied), ("training pairs", [loose(v.get("train_pairs")) for v in f.members]),
        ("steps", [loose(v.get("steps")) for v in f.members]),
        *((label, [cell(read(v), percent) for v in f.members]) for label, read in MEASURES.items()),
        ("score, deviation", [fixed(v.get("score_std")) for v in f.members]),
        ("newest policy's pairs", [cell(interval(dig(v.results, "held_out", "drift", "accuracy")), percent) for v in f.members])],
        "Accuracies are on the models' own held-out pairs; ranges are 95 % intervals, by prompt.")


# ---------------------------------------------------------------- drift

def policy_scores(v: View) -> tuple[View, dict[str, list[float]]] | None:
    """The run's last section that scored answers with this model, and its raw scores by policy, the newest policy last. Answers under a
    safety preprompt or to attacks are not those that a reward model meets in training a policy."""
    reference = f"@{word(v.manifest.get('section'), v.name)}"
    for other in reversed([o for o in v.run if not o.gone and o.kind not in ("distill", "redteam")]):
        start = f"stages.{word(other.manifest.get('section'), other.name)}."
        score = next((k for k in ("helpfulness", "safety") if dig(other.manifest, "inputs", start + k) == reference), None)
        if score is None:
            continue
        rows = other.first_samples(DRIFT_ROWS) if other.kind == "rejection" else other.samples()
        groups: dict[str, list[float]] = {n: [] for n in table_of(other.results.get("models"))}
        for r in sorted(rows, key=lambda r: number(r.get("step")) or 0):
            model = word(r.get("model"), "")
            policy = model or (f"{other.name}, iteration {loose(r.get('step'))}" if other.kind == "ppo" else f"the policy of {other.name}")
            if (x := number(r.get(score))) is not None:
                groups.setdefault(policy, []).append(x)
        groups = {n: xs for n, xs in groups.items() if xs}
        if groups:
            return other, groups
    return None


def moments(xs: list[float]) -> tuple[float, float]:
    mean = sum(xs) / len(xs)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in xs) / len(xs))


def usual_range(v: View) -> tuple[float, float] | None:
    """The 1st and the 99th percentile of the model's raw scores of its own held-out answers."""
    ends = v.results.get("score_range_98")
    low, high = (map(number, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None))
    return None if low is None or high is None else (low, high)


def outside(xs: list[float], ends: tuple[float, float] | None) -> float | None:
    return sum(not ends[0] <= x <= ends[1] for x in xs) / len(xs) if ends else None


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, x))))


def drift_figure(v: View, name: str) -> list[Figure]:
    found, shape, ends = policy_scores(v), own_histogram(v), usual_range(v)
    if not found or not shape or shape[0][0] < 0 or shape[0][-1] > 1:
        return []
    (section, groups), (edges, chosen, rejected) = found, shape
    policy, xs = list(groups.items())[-1]
    counts = [0] * (len(edges) - 1)
    for x in map(sigma, xs):
        counts[max(0, sum(e <= x for e in edges[:-1]) - 1)] += 1
    (mean, _), usual, deviation, share = moments(xs), v.get("score_mean"), v.get("score_std"), outside(xs, ends)
    words = [f"answers of {policy} score {fixed(mean)} on average"]
    if usual is not None and deviation:
        words = [f"{words[0]}, {fixed(abs(mean - usual) / deviation, 1)} deviations {'above' if mean >= usual else 'below'} the {fixed(usual)} "
                 "of held-out answers"]
    if share is not None:
        words.append(f"{percent(share)} of them are outside the range of 98{GAP}% of held-out scores")
    measured, pairs = (interval(dig(v.results, "held_out", side, "accuracy")) for side in ("drift", "own"))
    if measured and pairs:
        words.append(f"accuracy is {percent(measured.mean)} on pairs of such answers and {percent(pairs.mean)} on held-out pairs")
    svg = plots.histogram(f"drift-{v.name}", edges, {"held-out pairs": [a + b for a, b in zip(chosen, rejected, strict=True)],
                                                     f"answers of {policy}": counts},
                          f"σ(score) of the {name} model", list(map(sigma, ends)) if ends else [])
    return drawn(f"Drift of the {name} model", "; ".join(words), "Histograms of the scores of held-out answers and of the newest policy's answers",
                 svg, ("Dotted lines: the 1st and the 99th percentile of held-out scores. " if ends else "")
                 + f"The policy's answers are those in {section.name}, to prompts of its own"
                 + (": the table has every policy on those." if section.kind == "evaluate" else "."))


def drift_table(v: View, name: str) -> list[Table]:
    found, ends = policy_scores(v), usual_range(v)
    if not found:
        return []
    section, groups = found
    rows = {policy: (len(xs), *moments(xs), outside(xs, ends)) for policy, xs in groups.items()}
    own = number(dig(own_of(v), "pairs"))
    rows = {"held-out pairs": (None if own is None else 2 * own, v.get("score_mean"), v.get("score_std"), 0.02 if ends else None), **rows}
    return table(f"Scores of the {name} model, policy by policy", "answers of", list(rows), [
        ("answers", [loose(r[0]) for r in rows.values()]), ("mean", [fixed(r[1]) for r in rows.values()]),
        ("deviation", [fixed(r[2]) for r in rows.values()]), ("outside the usual range", [percent(r[3]) for r in rows.values()])],
        f"Raw scores, from {section.name}." + (" The usual range holds 98 % of the scores of held-out answers, so 2 % of these are outside." if ends else ""))
