"""The report's figures on a sweep over the share of safety demonstrations: the paper's Figs. 15 and 33. The scores' distributions by model are
drawn with every evaluation (report_evaluate.py)."""

from dataclasses import dataclass

from posttrain import plots
from posttrain.plots import Line
from posttrain.report_evaluate import evaluate_part
from posttrain.report_pieces import Figure, Part, Table, drawn, named, some, table
from posttrain.report_reward import sigma
from posttrain.report_views import Interval, View, cell, dig, fixed, interval, listed, loose, models_of, number, percent, word
from posttrain.statistics import interval as measured

SCORES = (("adversarial", "safety"), ("helpful", "helpfulness"))  # kind of prompts, and the score that counts there
SHARES = (("adversarial", "unsafe_share", "violations"), ("borderline", "refusals", "refusals of borderline prompts"),
          ("helpful", "refusals", "refusals of helpful prompts"))  # and what is counted there


@dataclass
class Member:
    """A model of the sweep: its share of the safety demonstrations, how many those are and their share of its training rows, and what an
    evaluation stored of it."""

    fraction: float
    rows: float | None
    of_all: float | None
    told: dict


def result_part(vs: list[View]) -> Part:
    part = evaluate_part(vs)
    for v in vs:
        if found := sweep_of(v):
            part.figures = scores_figure(vs, v, found) + shares_figure(vs, v, found) + part.figures
            part.tables = sweep_table(vs, v, found) + part.tables
    return part


def sweep_of(v: View) -> dict[str, Member]:
    """Model -> what it is of a sweep over safety_fraction, the smallest share first; none where the models do not differ in it."""
    inputs, start = v.manifest.get("inputs"), f"stages.{word(v.manifest.get('section'), v.name)}.models."
    sections, found = {o.name: o for o in v.run}, {}
    for name, told in models_of(v).items():
        source = sections.get(str(dig(inputs, start + name)).removeprefix("@"))
        safety = source.results.get("safety") if source is not None and source.kind == "sft" else None
        fraction = number(dig(safety, "fraction"))
        if fraction is None:
            return {}
        found[name] = Member(fraction, number(dig(safety, "rows")), number(dig(safety, "share")), told)
    return dict(sorted(found.items(), key=lambda item: item[1].fraction)) if len({m.fraction for m in found.values()}) == len(found) > 1 else {}


def mean_scores(v: View, found: dict[str, Member]) -> dict[str, dict[str, Interval]]:
    """Score -> model -> mean sigma(score) of the answers to its kind of prompts, with its interval by prompt."""
    values: dict[tuple[str, str], tuple[list[float], list[str]]] = {}
    for r in v.samples():
        for kind, score in SCORES:
            if r.get("kind") == kind and (x := number(r.get(score))) is not None:
                xs, keys = values.setdefault((score, word(r.get("model"))), ([], []))
                xs.append(sigma(x))
                keys.append(word(r.get("key"), ""))
    return {score: {name: interval(measured(*values[score, name])) for name in found if (score, name) in values} for _, score in SCORES}


def line(found: dict[str, Member], values: dict[str, Interval], label: str, style: int) -> Line | None:
    known = [(100 * found[name].fraction, x) for name, x in values.items() if x]
    whole = all(x.bounded for _, x in known)
    return Line(label, [at for at, _ in known], [x.mean for _, x in known], style, [x.low for _, x in known] if whole else None,
                [x.high for _, x in known] if whole else None) if len(known) > 1 else None


def went(what: str, values: list[Interval], form) -> str:
    """'violations go from 60 % to 10 %'; what: the words before the values."""
    a, b = values[0], values[-1]
    doubt = "" if not (a.bounded and b.bounded) or a.high < b.low or b.high < a.low else " (the intervals overlap)"
    return f"{what} from {form(a.mean)} to {form(b.mean)}{doubt}"


def ends(found: dict[str, Member]) -> str:
    shares = [m.fraction for m in found.values()]
    return f"from {percent(shares[0])} to {percent(shares[-1])} of the safety demonstrations"


def scores_figure(vs: list[View], v: View, found: dict[str, Member]) -> list[Figure]:
    """Fig. 15, left: mean scores against the share."""
    means = mean_scores(v, found)
    series = some(*(line(found, means[score], score, i) for i, (_, score) in enumerate(SCORES)))
    told = [went(f"the mean {score} score goes", list(values.values()), fixed) for score, values in means.items() if len(values) > 1]
    if not series:
        return []
    return drawn(named(vs, v, "Scores by share of safety demonstrations"), f"{listed(told)}, {ends(found)}",
                 "Mean σ of the safety score on adversarial prompts and of the helpfulness score on helpful ones against the share",
                 plots.lines(f"sweep-scores-{v.name}", series, "share of the safety demonstrations (%)", "mean σ(score)"),
                 "Safety of answers to adversarial prompts, helpfulness of answers to helpful ones. Shades are 95 % intervals, by prompt. All "
                 "else in training is the same. The paper's Fig. 15.")


def shares_figure(vs: list[View], v: View, found: dict[str, Member]) -> list[Figure]:
    """Fig. 33 with the violations beside it."""
    values = {label: {name: interval(dig(m.told, "kinds", kind, key)) for name, m in found.items()} for kind, key, label in SHARES}
    values = {label: {name: x for name, x in xs.items() if x} for label, xs in values.items()}
    series = some(*(line(found, xs, label.removeprefix("refusals of ").removesuffix(" prompts"), i) for i, (label, xs) in enumerate(values.items())))
    told = [went(f"{label} go", list(xs.values()), lambda x: percent(x, 1)) for label, xs in values.items() if len(xs) > 1]
    if not series:
        return []
    return drawn(named(vs, v, "Violations and false refusals by share of safety demonstrations"), f"{listed(told)}, {ends(found)}",
                 "Unsafe answers to adversarial prompts, and refusals of borderline and helpful ones, against the share of safety demonstrations",
                 plots.lines(f"sweep-shares-{v.name}", series, "share of the safety demonstrations (%)", "share of answers", percent=True, zero=True),
                 "Borderline and helpful: prompts that are refused, which is a false refusal. Shades are 95 % intervals, by prompt. The paper's "
                 "Fig. 33.")


def sweep_table(vs: list[View], v: View, found: dict[str, Member]) -> list[Table]:
    means, members = mean_scores(v, found), list(found.values())
    return table(named(vs, v, "The sweep over safety demonstrations"), "model", list(found), [
        ("of the safety demonstrations", [percent(m.fraction) for m in members]), ("rows", [loose(m.rows) for m in members]),
        ("of all training rows", [percent(m.of_all, 1) for m in members]),
        *((f"mean σ({score}), {kind}", [cell(means[score].get(name)) for name in found]) for kind, score in SCORES),
        *((label, [cell(interval(dig(m.told, "kinds", kind, key)), percent, digits=1) for m in members]) for kind, key, label in SHARES)],
        "Ranges are 95 % intervals, by prompt.")
