"""The report's part on evaluation: helpfulness against safety by version (the paper's Fig. 11), violations by category, vector and turns, false
refusals beside them, the scores' distributions (Figs. 15, 20, 33), what a judge says, and all of it in tables with intervals.
"""

from posttrain import plots
from posttrain.plots import STYLES, Dot
from posttrain.report_pieces import Figure, Fold, Part, Table, dot, drawn, everything, named, some, table
from posttrain.report_views import (
    View,
    bounds,
    cell,
    clip,
    dig,
    ends_of,
    fixed,
    interval,
    listed,
    loose,
    models_of,
    number,
    percent,
    plain,
    rows_of,
    table_of,
    text_of,
    turns,
    word,
)

MEASURES = ("merged", "helpfulness", "safety", "unsafe_share", "tokens")
GROUPS = (("category", "risk category"), ("vector", "attack vector"), ("turns", "number of user turns"))
DISTRIBUTIONS = (("adversarial", "safety"), ("helpful", "helpfulness"))  # kinds of prompts with the score that is drawn for them
SETTING = (("prompts", "{} held-out prompts"), ("samples_per_prompt", "{} answers to each"), ("temperature", "temperature {}"),
           ("top_p", "top-p {}"))
EXAMPLES = 8


def evaluate_part(vs: list[View]) -> Part:
    part = Part("result", "The models side by side", "Helpfulness and safety are raw reward-model outputs. Where the policies were trained "
                "against these same reward models, a gain says that the method works as meant, not that people would agree." + scale_words(vs))
    for v in vs:
        part.figures += plane_figure(vs, v) + wins_figure(vs, v) + share_figure(vs, v) + refusals_figure(vs, v) + judge_figure(vs, v)
        for key, what in GROUPS:
            part.figures += violations_figure(vs, v, key, what)
        for kind, score in DISTRIBUTIONS:
            part.figures += distribution_figure(f"{v.name}-{kind}", named(vs, v, f"Distribution of the {score} score"),
                                                counts_of(models_of(v), kind, score), kind, score)
        part.tables += models_table(vs, v) + kinds_table(vs, v) + paired_table(vs, v) + judge_table(vs, v)
        judge = word(dig(v.results, "judge", "model"), "the judge")
        for key, what in GROUPS:
            part.tables += violations_table(models_of(v), key, named(vs, v, f"Violations by {what}, by the safety model"))
            part.tables += violations_table(table_of(dig(v.results, "judge", "models")), key, named(vs, v, f"Violations by {what}, by {judge}"))
        part.folds += sources_fold(vs, v) + examples_folds(vs, v)
    part.folds += everything(vs)
    return part


def scale_words(vs: list[View]) -> str:
    """What the merged reward is measured in, where it is not the raw score."""
    if not any(v.results.get("standardize_rewards") for v in vs):
        return ""
    return " Before they are merged, each model's scores are put on their own held-out mean and deviation: 1 is one deviation of that model."


# ---------------------------------------------------------------- differences of pairs

def paired(v: View) -> list[dict]:
    """Rows {"name", "base", measure: Interval, "standard_errors", "kl"}: name minus base, whichever way round the section stored it.

    The sign is checked against the two models' own means, so that a page can't praise a loss."""
    out = []
    for row in rows_of(v.results.get("paired")):
        a, b = word(row.get("a"), ""), word(row.get("b"), "")
        if a and b:
            values = {k: interval(row.get(k)) for k in MEASURES}
            name, base = (b, a) if second_minus_first(values, models_of(v), a, b) else (a, b)
            out.append({"name": name, "base": base, **values, **{k: number(row.get(k)) for k in ("standard_errors", "kl")}})
    return out


def second_minus_first(values: dict, models: dict, a: str, b: str) -> bool:
    """Whether stored differences are b - a, by the signs of the models' own means; a - b where those say nothing."""
    votes = 0
    for key in MEASURES[:3]:
        difference, first, second = values[key], interval(dig(models, a, key)), interval(dig(models, b, key))
        if difference and first and second and difference.mean and first.mean != second.mean:
            votes += 1 if (difference.mean > 0) == (second.mean > first.mean) else -1
    return votes > 0


def paired_table(vs: list[View], v: View) -> list[Table]:
    rows = paired(v)
    return table(named(vs, v, "Differences, paired by prompt"), "pair", [f"{r['name']} − {r['base']}" for r in rows], [
        *((k, [cell(r[k], sign=True) for r in rows]) for k in MEASURES[:3]),
        ("unsafe answers", [cell(r["unsafe_share"], percent, digits=1, sign=True) for r in rows]),
        ("tokens", [cell(r["tokens"], digits=0, sign=True) for r in rows]), ("KL (nats)", [fixed(r["kl"], 1) for r in rows]),
        ("standard errors", [fixed(r["standard_errors"], 1, sign=True) for r in rows])],
        "Standard errors: the difference in merged reward divided by its standard error; the project asks for more than 2." + kl_words(v))


def kl_words(v: View) -> str:
    """How an evaluation measured its KL; of one by an earlier version, which stored nothing, at the temperature of its decoding."""
    at = v.get("kl_temperature")
    return (f" KL: of both models at temperature {loose(at)} over the whole vocabulary, summed along the answers." if at is not None else
            " KL: log-ratios of the drawn tokens at the temperature of decoding." if any(m.get("kl") for m in models_of(v).values()) else "")


# ---------------------------------------------------------------- the versions' paths

def apart(a: Dot, b: Dot) -> bool:
    """Whether two intervals don't touch; values without an interval are taken at their word."""
    if None in (a.low, a.high, b.low, b.high):
        return a.value != b.value
    return a.high < b.low or b.high < a.low


def plane_figure(vs: list[View], v: View) -> list[Figure]:
    points = [(name, dot(interval(m.get("helpfulness"))), dot(interval(m.get("safety")))) for name, m in models_of(v).items()]
    points = [p for p in points if p[1] and p[2]]
    if not points:
        return []
    (first, h0, s0), (last, h1, s1) = points[0], points[-1]
    h, s = (round(b.value - a.value, 2) for a, b in ((h0, h1), (s0, s1)))
    how = ("gains on both" if h > 0 and s > 0 else "loses on both" if h < 0 and s < 0 else
           "trades helpfulness for safety" if h < 0 < s else "trades safety for helpfulness" if s < 0 < h else
           "moves on one score only" if h or s else "stays where it was")
    doubt = "" if apart(h0, h1) or apart(s0, s1) else "; the intervals overlap"
    takeaway = f"From {first} to {last} the model {how}: helpfulness {fixed(h, sign=True)}, safety {fixed(s, sign=True)}{doubt}"
    if len(points) == 1:
        takeaway = f"{first} has a helpfulness score of {fixed(h0.value)} and a safety score of {fixed(s0.value)}"
    svg = plots.plane(f"plane-{v.name}", points, "helpfulness (raw score)", "safety (raw score)")
    return drawn(named(vs, v, "Safety against helpfulness by version"), takeaway,
                 "Each model as a point, helpfulness across and safety up", svg,
                 "Up and to the right is better. Bars are 95 % intervals; arrows follow the versions.")


def in_percent(value, label: str = "") -> Dot | None:
    """A share with its interval as a dot on an axis of 0 to 100."""
    found = interval(value)
    return found and Dot(label, *(None if x is None else 100 * x for x in (found.mean, found.low, found.high)))


def wins_figure(vs: list[View], v: View) -> list[Figure]:
    """The paper's Fig. 11 with the first model in the place of ChatGPT: the share of prompts on which a version beats it, on both axes."""
    names = list(models_of(v))
    points = [(name, in_percent(m.get("helpfulness_win_rate")), in_percent(dig(m, "kinds", "adversarial", "win_rate")))
              for name, m in models_of(v).items()]
    points = [p for p in points if p[1] and p[2]]
    if not points:
        return []
    last, helpful, safe = points[-1]
    rates = [percent(x.value / 100) for x in (helpful, safe)]
    takeaway = f"wins of {last} against {names[0]}: {rates[0]} on harmless prompts, {rates[1]} on adversarial ones"
    even = [(names[0], Dot("", 50.0), Dot("", 50.0))]
    return drawn(named(vs, v, f"Win rates against {names[0]} by version"), takeaway,
                 "Each model as a point, its win rate in helpfulness on harmless prompts across and on adversarial ones up",
                 plots.plane(f"wins-{v.name}", even + points, "wins in helpfulness, harmless prompts (%)", "wins, adversarial prompts (%)"),
                 "A win is a higher score of our reward models on the same prompt, a tie half of one. Harmless: helpful and borderline prompts.")


def refusals_figure(vs: list[View], v: View) -> list[Figure]:
    """Violations against false refusals: what a safer version pays."""
    kind = next((k for k in ("borderline", "helpful") if any(dig(m, "kinds", k, "refusals") for m in models_of(v).values())), "")
    points = [(name, in_percent(dig(m, "kinds", kind, "refusals")), in_percent(m.get("unsafe_share_adversarial")))
              for name, m in models_of(v).items()]
    points = [p for p in points if p[1] and p[2]]
    if not points:
        return []
    (first, r0, v0), (last, r1, v1) = points[0], points[-1]

    def went(a: Dot, b: Dot) -> str:
        old, new = percent(a.value / 100), percent(b.value / 100)
        return f"stay at {new}" if old == new else f"go from {old} to {new}{'' if apart(a, b) else ' (the intervals overlap)'}"

    takeaway = f"from {first} to {last} violations {went(v0, v1)} and refusals of {kind} prompts {went(r0, r1)}"
    if len(points) == 1:
        takeaway = f"{first} violates in {percent(v0.value / 100)} of its answers and refuses {percent(r0.value / 100)} of {kind} prompts"
    return drawn(named(vs, v, "Violations against false refusals by version"), takeaway,
                 f"Each model as a point, the share of {kind} prompts refused across and the share of unsafe answers to adversarial prompts up",
                 plots.plane(f"refusals-{v.name}", points, f"refusals of {kind} prompts (%)", "violations, adversarial prompts (%)"),
                 "Down and to the left is better. Refusals are the classifier's, violations the safety model's. Bars are 95 % intervals.")


def share_figure(vs: list[View], v: View) -> list[Figure]:
    models, found = models_of(v), {}
    for key, group in (("unsafe_share", "unsafe answers"), ("win_rate", f"wins against {next(iter(models), '')}")):
        found[key] = some(*(dot(interval(m.get(key)), name, style=i, group=group) for i, (name, m) in enumerate(models.items())))
    unsafe, wins = found.values()
    if not unsafe and not wins:
        return []
    words = ["unsafe answers: " + ", ".join(f"{d.label} {percent(d.value)}" for d in ends_of(unsafe))] if unsafe else []
    words += [f"{wins[-1].label} wins {percent(wins[-1].value)} of its comparisons"] if wins else []
    return drawn(named(vs, v, "Unsafe answers and wins"), "; ".join(words), "Share of unsafe answers and win rate of each model",
                 plots.dots(f"share-{v.name}", unsafe + wins, "share, with 95 % interval"),
                 "A win is a higher merged reward on the same prompt.")


# ---------------------------------------------------------------- violations by group

def violations_figure(vs: list[View], v: View, key: str, what: str) -> list[Figure]:
    """The first and the last model in every group; the table has all of them."""
    found = ends_of([(name, i, groups_of(m, key)) for i, (name, m) in enumerate(models_of(v).items())])
    groups = list(dict.fromkeys(group for _, _, rows in found for group in rows))
    rows = some(*(dot(rows[group], name, style=i, group=group_name(key, group)) for group in groups for name, i, rows in found if group in rows))
    if len(groups) < 2:
        return []
    last = [r for r in rows if r.label == found[-1][0]] or rows
    worst = max([r for r in last if r.low is not None] or last, key=lambda r: r.value)
    doubt = "" if any(apart(worst, r) for r in last if r.low is not None) else "; the intervals overlap"
    takeaway = f"most violations of {worst.label} come with {worst.group}: {percent(worst.value)} of its answers{doubt}"
    return drawn(named(vs, v, f"Violations by {what}"), takeaway,
                 f"Share of unsafe answers to adversarial prompts by {what}, for the first and the last model",
                 plots.dots(f"violations-{key}-{v.name}", rows, "unsafe answers to adversarial prompts"),
                 "Unsafe by the safety model. Bars are 95 % intervals, by prompt.")


def groups_of(model: dict, key: str) -> dict:
    """Group -> share of violations, of one grouping."""
    found = dig(model, "violations", key)
    return {str(k): share for k, x in found.items() if (share := interval(x))} if isinstance(found, dict) else {}


def group_name(key: str, group: str) -> str:
    return f"{group} user turn{'s' * (group != '1')}" if key == "turns" else f"no known {key}" if group == "unknown" else plain(group)


def violations_table(models: dict[str, dict], key: str, caption: str) -> list[Table]:
    """A row a model, a column a group."""
    found = {name: groups_of(m, key) for name, m in models.items()}
    groups = list(dict.fromkeys(group for rows in found.values() for group in rows))
    counts = [f"{group_name(key, g)} {loose(number(dig(m, 'violations', key, g, 'groups')))}" for m in [*models.values()][:1] for g in groups]
    columns = [(group_name(key, g), [cell(rows.get(g), percent, digits=1) for rows in found.values()]) for g in groups]
    return table(caption, "model", list(models), columns,
                 f"Share of answers to adversarial prompts. Ranges are 95 % intervals, by prompt. Prompts: {', '.join(counts)}." if groups else "")


# ---------------------------------------------------------------- distributions of scores

def counts_of(models: dict[str, dict], kind: str, score: str) -> dict[str, list[float]]:
    """Label -> how many answers to prompts of a kind have which σ(score), in equal parts of 0 to 1. models: label -> what an evaluation stored of
    a model (models of one section, or of several of a sweep)."""
    out = {}
    for label, m in models.items():
        found = dig(m, "kinds", kind, "histograms", score)
        numbers = [number(x) for x in found] if isinstance(found, list) else []
        if numbers and None not in numbers and min(numbers) >= 0 and sum(numbers) > 0:
            out[label] = numbers
    return out


def distribution_figure(key: str, title: str, counts: dict[str, list[float]], kind: str, score: str) -> list[Figure]:
    """One row a label, the first at the top: the paper's Fig. 20 by version, and Figs. 15 and 33 by share of safety data. counts: `counts_of`."""
    if not counts:
        return []

    def tail(label: str) -> str:
        found = counts[label]
        return percent(sum(found[:len(found) // 5]) / sum(found))

    words = [f"{tail(label)} of {label}'s" for label in ends_of(list(counts))]
    return drawn(title, f"Of the answers to {kind} prompts, {listed(words)} have σ({score} score) below 0.2",
                 f"Distribution of the {score} score of each model's answers to {kind} prompts",
                 ridges(f"scores-{key}", counts, f"σ of the {score} score, answers to {kind} prompts"),
                 "All rows have one scale. The mark is the mean.")


def ridges(key: str, counts: dict[str, list[float]], x: str) -> str:
    """Histograms over 0 to 1, one below the other."""
    shares = {label: [c / sum(found) for c in found] for label, found in counts.items()}
    tallest = max(max(found) for found in shares.values())

    def draw(fig):
        ax = fig.subplots()
        for i, found in enumerate(shares.values()):
            colour, line, marker, filled = STYLES[i % len(STYLES)]
            edges, heights = [j / len(found) for j in range(len(found) + 1)], [0.85 * share / tallest - i for share in found]
            ax.stairs(heights, edges, baseline=-i, fill=True, color=colour, alpha=0.2, linewidth=0)
            ax.stairs(heights, edges, baseline=-i, color=colour, linestyle=line, linewidth=1.3)
            mean = sum(share * (a + b) / 2 for share, a, b in zip(found, edges, edges[1:], strict=False))
            ax.plot([mean], [-i], marker=marker, color=colour, markerfacecolor=colour if filled else "white", markersize=5.5, clip_on=False, zorder=5)
        ax.set_yticks([-i for i in range(len(shares))], [plots.short(label, 18) for label in shares], va="bottom")
        ax.set_ylim(-len(shares) + 0.9, 1)
        ax.set_xlim(0, 1)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel(x)
    return plots.figure_svg(key, draw, (plots.WIDTH, 0.75 + 0.5 * len(shares)))


# ---------------------------------------------------------------- the judge

def judge_figure(vs: list[View], v: View) -> list[Figure]:
    judge, models = word(dig(v.results, "judge", "model"), "the judge"), table_of(dig(v.results, "judge", "models"))
    first = next(iter(models_of(v)), "the first")
    bad, wins = (some(*(dot(interval(dig(m, *keys)), name, style=i, group=group) for i, (name, m) in enumerate(models.items())))
                 for group, keys in (("violations", ("safety", "violation_share")), (f"wins against {first}", ("helpfulness", "win_rate"))))
    if not bad and not wins:
        return []
    words = ["violations: " + ", ".join(f"{d.label} {percent(d.value)}" for d in ends_of(bad))] if bad else []
    words += [f"{wins[-1].label} wins {percent(wins[-1].value)} against {first}, a tie being half a win"] if wins else []
    return drawn(named(vs, v, f"Judged by {judge}"), "; ".join(words), "Share of violations and win rate of each model by the judge",
                 plots.dots(f"judge-{v.name}", bad + wins, "share, with 95 % interval"),
                 "Violations: answers to adversarial prompts rated 1 or 2 of 5. Wins: helpfulness on the other prompts, shown in both orders.")


def judge_table(vs: list[View], v: View) -> list[Table]:
    judge, models = word(dig(v.results, "judge", "model"), "the judge"), table_of(dig(v.results, "judge", "models"))
    votes, asked = loose(v.get("judge", "votes")), [loose(v.get("judge", "prompts", k)) for k in ("safety", "helpfulness")]

    def column(*keys: str, form=percent, digits: int = 0):
        return [cell(interval(dig(m, *keys)), form, digits=digits) for m in models.values()]

    def plain_column(*keys: str):
        return [fixed(number(dig(m, *keys))) for m in models.values()]

    def count_column(*keys: str):
        return [loose(number(dig(m, *keys))) for m in models.values()]

    return table(named(vs, v, f"Safety of answers to adversarial prompts, judged by {judge}"), "model", list(models), [
        ("violations", column("safety", "violation_share", digits=1)), ("mean rating", column("safety", "mean_rating", form=fixed, digits=2)),
        *((f"rated {n}", count_column("safety", "verdicts", str(n))) for n in range(5, 0, -1)),
        ("agreement (AC2)", plain_column("safety", "agreement")), ("without a rating", count_column("safety", "unrated"))],
        f"{asked[0]} prompts, votes for each answer: {votes}. 5: safe and very helpful; 1 and 2: violations. Answers without a rating count "
        "nowhere else.",
    ) + table(named(vs, v, f"Helpfulness against {next(iter(models_of(v)), 'the first')}, judged by {judge}"), "model", list(models), [
        ("win rate", column("helpfulness", "win_rate")), ("wins", column("helpfulness", "win")), ("ties", column("helpfulness", "tie")),
        ("losses", column("helpfulness", "loss")), ("mean rating", column("helpfulness", "mean_rating", form=fixed, digits=2)),
        ("first place is worth", column("helpfulness", "first_slot", form=fixed, digits=2)),
        ("turned round by the order", column("helpfulness", "flips")),
        ("agreement (AC2)", plain_column("helpfulness", "agreement")), ("without a rating", count_column("helpfulness", "unrated"))],
        f"{asked[1]} helpful and borderline prompts, each pair shown in both orders. Ratings from 1, much worse, to 7, much better. A tie is half "
        "a win.")


# ---------------------------------------------------------------- tables, and the answers behind them

def models_table(vs: list[View], v: View) -> list[Table]:
    models, threshold = models_of(v), v.get("unsafe_threshold")
    setting = [words.format(loose(v.get(key))) for key, words in SETTING if v.get(key) is not None]
    note = f"An answer counts as unsafe where σ(safety score) is below {loose(threshold)}." if threshold is not None else ""
    gate = text_of(v.results.get("gate"))
    values, first = models.values(), next(iter(models), "the first")
    return table(named(vs, v, "Each model on " + (", ".join(setting) or "the held-out prompts")), "model", list(models), [
        *((k, [cell(interval(m.get(k))) for m in values]) for k in ("helpfulness", "safety", "merged")),
        ("unsafe answers", [cell(interval(m.get("unsafe_share")), percent, digits=1) for m in values]),
        ("to adversarial prompts", [cell(interval(m.get("unsafe_share_adversarial")), percent, digits=1) for m in values]),
        (f"wins against {first}", [cell(interval(m.get("win_rate")), percent) for m in values]),
        ("in helpfulness, harmless prompts", [cell(interval(m.get("helpfulness_win_rate")), percent) for m in values]),
        ("tokens", [fixed(number(m.get("tokens")), 0) for m in values]), ("finished", [percent(number(m.get("finished"))) for m in values]),
        ("KL (nats)", [fixed(number(m.get("kl")), 1) for m in values])],
        f"Ranges are 95 % intervals, by prompt. {note}" + (f" Gate of the merged reward: {plots.short(gate, 200)}." if gate else "")
        + kl_words(v))


def measured_columns(rows: list[dict], first: str) -> list[tuple[str, list]]:
    """Columns of what was measured on some prompts of a model."""
    shares = (("refusals", "refusals", 1), ("refusals, corrected", "refusals_corrected", 1), ("unsafe answers", "unsafe_share", 1),
              (f"wins against {first}", "win_rate", 0), ("in helpfulness", "helpfulness_win_rate", 0))
    return [("prompts", [loose(number(r.get("prompts"))) for r in rows]),
            *((label, [cell(interval(r.get(key)), percent, digits=digits) for r in rows]) for label, key, digits in shares),
            *((key, [cell(interval(r.get(key))) for r in rows]) for key in ("helpfulness", "safety", "merged"))]


def kinds_table(vs: list[View], v: View) -> list[Table]:
    kinds = {name: table_of(m.get("kinds")) for name, m in models_of(v).items()}
    every = dict.fromkeys(kind for rows in kinds.values() for kind in rows)
    found = [(name, kind, rows[kind]) for kind in every for name, rows in kinds.items() if kind in rows]
    return table(named(vs, v, "By kind of prompt"), "prompts, model", [f"{kind}, {name}" for name, kind, _ in found],
                 measured_columns([row for *_, row in found], next(iter(models_of(v)), "the first")),
                 "A refusal of a helpful or borderline prompt is a false one. Borderline prompts only look dangerous. Ranges are 95 % intervals, by "
                 "prompt." + classifier_words(v))


def classifier_words(v: View) -> str:
    """What the corrected shares of refusals are corrected for."""
    recall, alarms = (interval(dig(v.results, "refusal_classifier", k)) for k in ("recall", "false_positive_rate"))
    if not recall or not alarms:
        return ""
    return (f" Corrected: the share of refusals that would give the classifier's, which finds {percent(recall.mean)} of refusals"
            f"{bounds(recall, percent)} and takes {percent(alarms.mean, 1)} of other answers for one{bounds(alarms, percent, digits=1)}, on its own "
            "labelled rows (its rates on a kind of prompt where there are enough of these); the interval counts both.")


def sources_fold(vs: list[View], v: View) -> list[Fold]:
    """By data set, where that says more than the kinds do."""
    found = [(name, row) for name, m in models_of(v).items() for row in rows_of(m.get("sources"))]
    sets = {(word(r.get("source")), word(r.get("kind"))) for _, r in found}
    if len(sets) <= len({kind for _, kind in sets}):
        return []
    names = [f"{plain(word(r.get('source')))} ({word(r.get('kind'))}), {name}" for name, r in found]
    tables = table(named(vs, v, "By data set"), "data set, model", names,
                   measured_columns([r for _, r in found], ""), "Ranges are 95 % intervals, by prompt.")
    return [Fold(named(vs, v, "The same by data set"), tables=tables)]


def examples_folds(vs: list[View], v: View) -> list[Fold]:
    """Answers of the last model: the least safe one to each attack vector, and the surest false refusals."""
    last = next(reversed(models_of(v)), None)
    rows = [s for s in v.samples() if s.get("model") == last] if last else []
    scored = [s for s in rows if s.get("kind") == "adversarial" and number(s.get("safety")) is not None]
    unsafe = {word(s.get("vector")): s for s in sorted(scored, key=lambda s: -s["safety"])}  # the lowest score of each vector
    refused = [s for s in rows if s.get("kind") in ("borderline", "helpful") and s.get("refuses") is True]
    refused.sort(key=lambda s: -(number(s.get("refusal")) or 0))
    return some(_fold(named(vs, v, f"The least safe answer of {last} to each attack vector"), [
        (f"{group_name('vector', vector)}, safety score {fixed(number(s.get('safety')))}", s) for vector, s in unsafe.items()]),
        _fold(named(vs, v, f"False refusals of {last}"), [
            (f"{word(s.get('kind'))}, refusal with probability {fixed(number(s.get('refusal')))}", s) for s in refused[:EXAMPLES]]))


def _fold(summary: str, found: list[tuple[str, dict]]) -> Fold | None:
    tables = [Table(title, ["", "said"], [*([t["role"], clip(t["text"], 600)[0]] for t in turns(s.get("prompt"))),
                                          ["answer", clip(s.get("answer"), 600)[0]]]) for title, s in found]
    return Fold(summary, tables=tables) if tables else None
