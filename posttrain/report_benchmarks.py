"""The report's parts on the automatic benchmarks: BOLD's sentiment by group, Self-BLEU against the temperature, lm-evaluation-harness."""

from posttrain import plots
from posttrain.plots import Line
from posttrain.report_pieces import Figure, Fold, Part, Table, at, dot, drawn, facts, named, said, some, table
from posttrain.report_views import (
    View,
    cell,
    clip,
    dig,
    fixed,
    interval,
    listed,
    loose,
    models_of,
    moved,
    number,
    percent,
    plain,
    rows_of,
    table_of,
    text_of,
    word,
)

ENDS = 3  # answers of lowest and of highest sentiment that are shown


def checks_table(vs: list[View], v: View) -> list[Table]:
    rows = rows_of(v.results.get("checks"))
    return table(named(vs, v, "Checks"), "check", [word(r.get("name"), "unnamed check") for r in rows], [
        ("", ["met" if r.get("met") is True else "not met" for r in rows]), ("detail", [text_of(r.get("detail")) for r in rows])])


# ---------------------------------------------------------------- BOLD and classifiers

def bold_part(vs: list[View]) -> Part:
    part = Part("bold", "Sentiment and labels by group", "Models go on with BOLD's prompts; VADER gives prompt and answer a sentiment "
                "between −1 and 1, where 0 is neutral. A classifier, where one is named, says what share of the answers has its label. No person "
                "has judged the answers.")
    for v in vs:
        part.figures += sentiment_figure(vs, v) + label_figure(vs, v)
        for domain in domains_of(v):
            part.tables += domain_table(vs, v, domain, "sentiment") + domain_table(vs, v, domain, "labelled")
        part.tables += checks_table(vs, v)
        examples = sentiment_examples(v)
        part.folds += [Fold(f"Answers of {v.name} with the lowest and the highest sentiment", tables=examples)] if examples else []
    part.facts = facts("The prompts and the answers", vs, [v.name for v in vs], [
        ("prompts", at("prompts")), ("answers to each", at("samples_per_prompt")), ("prompt as", said("form")),
        ("of groups left out", at("left_out", "groups left out")), ("left out, too long", at("left_out", "too long")),
        ("tokens of an answer, at most", at("max_new_tokens")), ("temperature", at("temperature")), ("top-p", at("top_p")),
        ("classifier", said("classifier")), ("its label", said("label"))])
    for v in vs:
        models = models_of(v)
        part.facts += table(named(vs, v, "All answers"), "model", list(models), [
            ("sentiment", [cell(interval(m.get("sentiment"))) for m in models.values()]),
            (text_of(v.results.get("label")) or "label", [cell(interval(m.get("labelled")), percent, digits=1) for m in models.values()]),
            ("tokens", [fixed(number(m.get("tokens")), 0) for m in models.values()]),
            ("ended", [percent(number(m.get("finished"))) for m in models.values()]),
            ("empty", [percent(number(m.get("empty"))) for m in models.values()])], "Ranges are 95 % intervals, by prompt.")
    return part


def domains_of(v: View) -> list[str]:
    return list(dict.fromkeys(d for m in models_of(v).values() for d in table_of(m.get("domains"))))


def sentiment_figure(vs: list[View], v: View) -> list[Figure]:
    models = models_of(v)
    rows = some(*(dot(interval(dig(m, "domains", d, "sentiment")), name, style=i, group=plain(d)) for d in domains_of(v)
                  for i, (name, m) in enumerate(models.items())))
    if not rows:
        return []
    means = [(name, mean) for name, m in models.items() if (mean := interval(m.get("sentiment")))]
    words = f"{rows[0].label} has a mean sentiment of {fixed(rows[0].value)} in {rows[0].group}"
    if len(means) > 1:
        words = f"{moved('The mean sentiment', means[0][1].mean, means[-1][1].mean)} from {means[0][0]} to {means[-1][0]}"
    pairs = rows_of(v.results.get("paired"))
    if pairs and number(pairs[-1].get("groups")):
        up, of = (loose(number(pairs[-1].get(k))) for k in ("up", "groups"))
        words += f"; it rises in {up} of {of} groups ({word(pairs[-1].get('a'))} − {word(pairs[-1].get('b'))})"
    return drawn(named(vs, v, "Sentiment by domain"), words, "Mean sentiment of prompt and continuation in each domain, for every model",
                 plots.dots(f"sentiment-{v.name}", rows, "mean VADER compound score", level=(0.0, "neutral"), percent=False),
                 "Bars are 95 % intervals, by prompt. Higher is friendlier, not better: what matters is that no group falls behind.")


def label_figure(vs: list[View], v: View) -> list[Figure]:
    label = text_of(v.results.get("label"))
    rows = some(*(dot(interval(m.get("labelled")), name, style=i) for i, (name, m) in enumerate(models_of(v).items())))
    if not rows:
        return []
    return drawn(named(vs, v, f"Answers with the label {label}"), f"{label}: {listed([f'{r.label} {percent(r.value, 1)}' for r in rows])}",
                 f"Share of answers that the classifier gives the label {label}", plots.dots(f"label-{v.name}", rows, "share, with 95 % interval"))


def domain_table(vs: list[View], v: View, domain: str, measure: str) -> list[Table]:
    """A row a group, a column a model, as Tables 46-50 turned; then the paired differences."""
    models, form = models_of(v), fixed if measure == "sentiment" else percent
    found = {name: dig(m, "domains", domain, "groups") for name, m in models.items()}
    pairs = [(f"{word(p.get('a'))} − {word(p.get('b'))}", dig(p, "domains", domain, "groups")) for p in rows_of(v.results.get("paired"))]
    groups = sorted({g for of in found.values() for g in table_of(of)})
    counts = [f"{plain(g)} {loose(number(dig(next(iter(found.values())), g, measure, 'n')))}" for g in groups] if found else []
    what = "Sentiment" if measure == "sentiment" else f"Share with the label {text_of(v.results.get('label'))}"
    return table(named(vs, v, f"{what}: {plain(domain)}"), "group", [plain(g) for g in groups], [
        *((name, [cell(interval(dig(of, g, measure)), form) for g in groups]) for name, of in found.items()),
        *((name, [cell(interval(dig(of, g, measure)), form, sign=True) for g in groups]) for name, of in pairs)],
        f"Ranges are 95 % intervals, by prompt. Answers: {', '.join(counts)}.")


def sentiment_examples(v: View) -> list[Table]:
    """The last model's."""
    name = next(reversed(models_of(v)), None)
    rows = sorted((r for r in v.samples() if r.get("model") == name and number(r.get("sentiment")) is not None), key=lambda r: r["sentiment"])
    shown = [*rows[:ENDS], *rows[ENDS:][-ENDS:]]
    cells = [[fixed(r["sentiment"]), plain(word(r.get("group"))), clip(r.get("prompt"), 300)[0], clip(r.get("answer"), 300)[0]] for r in shown]
    return [Table(f"Of {name}", ["sentiment", "group", "prompt", "answer"], cells)] if cells else []


def last_sentiment(v: View):
    """(model, its mean sentiment) of the last model, and the last comparison, for the section's key figures."""
    name, m = next(reversed(models_of(v).items()), ("", {}))
    return name, interval(m.get("sentiment")), next(reversed(rows_of(v.results.get("paired"))), {})


# ---------------------------------------------------------------- diversity

def diversity_part(vs: list[View]) -> Part:
    part = Part("diversity", "Diversity against temperature", "Self-BLEU says how alike the answers to one prompt are: 1 where all are the same. "
                "After RLHF the paper saw it stay high for factual prompts as the temperature rises, and fall as before for creative ones.")
    for v in vs:
        for kind in kinds_of(v):
            part.figures += curve_figure(vs, v, kind)
            part.tables += curve_table(vs, v, kind)
        part.tables += slopes_table(vs, v) + checks_table(vs, v)
    part.facts = facts("The prompts and the answers", vs, [v.name for v in vs], [
        *((f"{plain(k)} prompts", at("prompts", k)) for k in dict.fromkeys(k for v in vs for k in kinds_of(v))),
        ("left out, too long", at("too_long")), ("answers to each", at("samples_per_prompt")), ("temperatures", said("temperatures")),
        ("top-p", at("top_p")), ("tokens of an answer, at most", at("max_new_tokens"))])
    return part


def kinds_of(v: View) -> list[str]:
    return list(dict.fromkeys(k for m in models_of(v).values() for k in table_of(m)))


def points(v: View, name: str, kind: str, measure: str = "self_bleu") -> list[tuple]:
    """(temperature, mean with interval) of one model and kind, where it was measured."""
    found = [(number(p.get("temperature")), interval(p.get(measure))) for p in rows_of(dig(models_of(v), name, kind, "curve"))]
    return sorted((p for p in found if p[0] is not None and p[1]), key=lambda p: p[0])


def curve_figure(vs: list[View], v: View, kind: str) -> list[Figure]:
    """Fig. 21 for one kind of prompt."""
    found = {name: points(v, name, kind) for name in models_of(v)}
    found = {name: ps for name, ps in found.items() if ps}
    if not found:
        return []
    series = []
    for i, (name, ps) in enumerate(found.items()):
        whole = all(value.bounded for _, value in ps)
        low, high = ([getattr(value, end) for _, value in ps] if whole else None for end in ("low", "high"))
        series.append(Line(name, [t for t, _ in ps], [value.mean for _, value in ps], i, low, high))
    words = [f"{name} has " + listed([f"{fixed(value.mean)} at {loose(t)}" for t, value in (ps if len(ps) < 2 else (ps[0], ps[-1]))])
             for name, ps in found.items()]
    return drawn(named(vs, v, f"Self-BLEU of {plain(kind)} prompts"), f"By temperature, {'; '.join(words)}",
                 f"Self-BLEU of answers to {plain(kind)} prompts against the temperature",
                 plots.lines(f"diversity-{v.name}-{kind}", series, "temperature", "Self-BLEU", whole=False),
                 "The shade is the 95 % interval, by prompt." if any(s.low for s in series) else "")


def curve_table(vs: list[View], v: View, kind: str) -> list[Table]:
    """A row a model and measure, a column a temperature."""
    rows, columns = {}, []
    for name in models_of(v):
        for measure, what in (("self_bleu", "Self-BLEU"), ("helpfulness", "helpfulness"), ("safety", "safety")):
            found = dict(points(v, name, kind, measure))
            columns += found
            rows |= {f"{name}: {what}": {t: cell(value) for t, value in found.items()}} if found else {}
        ended = {number(p.get("temperature")): number(p.get("finished")) for p in rows_of(dig(models_of(v), name, kind, "curve"))}
        rows[f"{name}: answers that ended"] = {t: percent(x) for t, x in ended.items()}
    return table(named(vs, v, f"{plain(kind)} prompts by temperature"), "model", list(rows), [
        (loose(t), [cells.get(t, "–") for cells in rows.values()]) for t in sorted({*columns})],
        "Means over prompts with 95 % intervals, by prompt. Scores are raw, means of a prompt's answers.")


def slopes_table(vs: list[View], v: View) -> list[Table]:
    kinds, rows = kinds_of(v), {name: {k: dig(m, k, "slope") for k in table_of(m)} for name, m in models_of(v).items()}
    for p in rows_of(v.results.get("paired")):
        rows.setdefault(f"{word(p.get('a'))} − {word(p.get('b'))}", {})[word(p.get("kind"))] = p.get("slope")
    return table(named(vs, v, "Slope of Self-BLEU over the temperature"), "model", list(rows), [
        (plain(k), [cell(interval(of.get(k)), digits=3, sign=True) for of in rows.values()]) for k in kinds],
        "Least squares for each prompt, then the mean; ranges are 95 % intervals, by prompt. A difference above 0: the later model falls less.")


def last_slopes(v: View):
    """The last model and its slope by kind, for the section's key figures."""
    name, m = next(reversed(models_of(v).items()), ("", {}))
    return name, {k: slope for k, of in table_of(m).items() if (slope := interval(of.get("slope")))}


# ---------------------------------------------------------------- lm-evaluation-harness

def lm_eval_part(vs: list[View]) -> Part:
    part = Part("lm_eval", "Tasks of lm-evaluation-harness", "The harness loads each merged model by itself. Its TruthfulQA scores given answers and "
                "its ToxiGen asks whether a statement is hateful: neither is the paper's measure, which judges what a model writes.")
    for v in vs:
        models = models_of(v)
        names = list(dict.fromkeys(task for m in models.values() for task in table_of(m)))
        part.figures += tasks_figure(vs, v, names)
        part.tables += table(named(vs, v, "Results"), "task and metric", names, [
            *((name, [cell(interval(m.get(task)), digits=3) for task in names]) for name, m in models.items()),
            ("rows", [next((loose(n) for m in models.values() if (n := number(dig(m, task, "n"))) is not None), "–") for task in names]),
            ("better", [_direction(models, task) for task in names])],
            "Ranges are 95 % intervals from the harness's standard errors.")
    part.facts = facts("The harness", vs, [v.name for v in vs], [
        ("version", said("harness")), ("through the chat template", said("chat")), ("rows of a task, at most (a trial)", at("limit"))])
    return part


def _direction(models: dict[str, dict], task: str) -> str:
    up = next((x for m in models.values() if isinstance(x := dig(m, task, "higher_is_better"), bool)), None)
    return {True: "higher", False: "lower", None: "–"}[up]


def tasks_figure(vs: list[View], v: View, names: list[str]) -> list[Figure]:
    """Every metric that is a share."""
    rows = some(*(dot(value, name, style=i, group=task) for task in names for i, (name, m) in enumerate(models_of(v).items())
                  if (value := interval(m.get(task))) and 0 <= value.mean <= 1))
    if not rows:
        return []
    first = [r for r in rows if r.group == rows[0].group]
    return drawn(named(vs, v, "By task"), f"{first[0].group}: {listed([f'{r.label} {fixed(r.value, 3)}' for r in first])}",
                 "Results of each task, for every model", plots.dots(f"tasks-{v.name}", rows, "value, with 95 % interval", percent=False))


def first_task(v: View):
    """(model, task, value) of the last model's first task, for the section's key figures."""
    name, m = next(reversed(models_of(v).items()), ("", {}))
    task, told = next(iter(table_of(m).items()), ("", None))
    return name, task, interval(told)
