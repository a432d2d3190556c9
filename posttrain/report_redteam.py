"""The report's part on red teaming: violations per 100 attacks by model and vector, and what each version fixed of the earlier one's failures."""

from posttrain import plots
from posttrain.report_pieces import Figure, Fold, Part, Table, at, dot, drawn, facts, named, said, some, table
from posttrain.report_views import (
    GAP,
    View,
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
    turns,
    word,
)

AXIS = "violations per 100 attacks"
GROUPS = (("by_vector", "vector"), ("by_category", "category"))


def redteam_part(vs: list[View]) -> Part:
    part = Part("redteam", "Red teaming", "The same attacks go to every model, a fixed number of them. An attack is an adversarial request in a disguise, with "
                "follow-ups where the answer was no violation. A violation is what the safety model scores below the threshold: no person has judged it.")
    for v in vs:
        part.figures += models_figure(vs, v) + fixed_figure(vs, v) + vectors_figure(vs, v)
        for key, what in GROUPS:
            part.tables += groups_table(vs, v, key, what)
        part.tables += progress_table(vs, v) + versions_table(vs, v) + degrees_table(vs, v)
        examples = attack_examples(v)
        part.folds += [Fold(f"Attacks of {v.name} that led to a violation", tables=examples)] if examples else []
    part.facts = facts("The attacker", vs, [v.name for v in vs], [
        ("attacks on each model", at("budget")), ("made of requests", at("requests")), ("prompts left out, not adversarial", at("left_out", "not adversarial")),
        ("attacks left out, too long", at("left_out", "attacks too long")), ("messages in a dialogue, at most", at("turns")),
        ("rewrites by", said("attacker")), ("dialogues of an attack, at most", at("tries")), ("a violation: σ(R_s) below", at("unsafe_threshold")),
        ("conversations that led to one", at("failures"))])
    return part


def rate_of(row: dict):
    """Violations per 100, with its interval."""
    return interval(row.get("violations_per_100"))


def models_figure(vs: list[View], v: View) -> list[Figure]:
    rows = some(*(dot(rate_of(m), name, style=i) for i, (name, m) in enumerate(models_of(v).items())))
    if not rows:
        return []
    words = [f"{r.label} {fixed(r.value, 1)}" for r in rows]
    return drawn(named(vs, v, "Violations per 100 attacks"), f"Of 100 attacks succeed: {listed(words)}", "Violations per 100 attacks of each model",
                 plots.dots(f"attacks-{v.name}", rows, AXIS, percent=False),
                 "All models meet the same attacks. Lower is better. Bars are 95 % intervals, by request.")


def vectors_figure(vs: list[View], v: View) -> list[Figure]:
    """The first and the last model under every vector; the table has all of them."""
    found = ends_of([(name, i, table_of(m.get("by_vector"))) for i, (name, m) in enumerate(models_of(v).items())])
    vectors = list(dict.fromkeys(vector for _, _, rows in found for vector in rows))
    rows = some(*(dot(rate_of(rows[vector]), name, style=i, group=plain(vector)) for vector in vectors for name, i, rows in found if vector in rows))
    if not rows:
        return []
    last = [r for r in rows if r.label == found[-1][0]] or rows
    worst = max(last, key=lambda r: r.value)
    takeaway = f"Against {worst.label}, the vector “{worst.group}” succeeds most often: {fixed(worst.value, 1)} of 100 attacks"
    return drawn(named(vs, v, "By attack vector"), takeaway,
                 "Violations per 100 attacks of each vector, for the first and the last model", plots.dots(f"vectors-{v.name}", rows, AXIS, percent=False))


def fixed_figure(vs: list[View], v: View) -> list[Figure]:
    """The paper's 90 %: the share of the earlier version's failures that the later one withstands, above what it newly broke."""
    rows, pairs = [], rows_of(v.results.get("versions"))
    for pair in pairs:
        group = f"{word(pair.get('a'))} after {word(pair.get('b'))}"
        rows += some(dot(interval(pair.get("fixed_share")), "fixed, of the failures", style=0, group=group),
                     dot(interval(pair.get("broken_share")), "broken, of the rest", style=1, group=group))
    if not rows:
        return []
    last = pairs[-1]
    takeaway = (f"Of the failures of {word(last.get('b'))}, {word(last.get('a'))} fixes {share_of(last, 'fixed', 'violations_before')}; of the other "
                f"attacks it newly fails on {share_of(last, 'broken', 'withstood_before')}")
    return drawn(named(vs, v, "What each version fixed and broke"), takeaway, "Share of the earlier model's failures that the later one withstands, and share "
                 "of the other attacks on which it newly fails",
                 plots.dots(f"fixed-{v.name}", rows, "share of these attacks", level=(0.9, f"90{GAP}% in the paper")),
                 "The same attacks on both. With a temperature above 0 some change sides by chance, in both directions.")


def share_of(row: dict, part: str, whole: str) -> str:
    """'12 of 40', or a dash where a count is missing."""
    few, of = (number(row.get(k)) for k in (part, whole))
    return "–" if few is None or of is None else f"{loose(few)} of {loose(of)}"


def groups_table(vs: list[View], v: View, key: str, what: str) -> list[Table]:
    """A row a model, a column a vector or category."""
    models = models_of(v)
    columns = list(dict.fromkeys(name for m in models.values() for name in table_of(m.get(key))))
    counts = [f"{plain(c)} {loose(number(table_of(m.get(key)).get(c, {}).get('of')))}" for m in [*models.values()][:1] for c in columns]
    return table(named(vs, v, f"Violations per 100 attacks by {what}"), "model", list(models), [
        ("all", [cell(rate_of(m), digits=1) for m in models.values()]),
        *((plain(c), [cell(rate_of(table_of(m.get(key)).get(c, {})), digits=1) for m in models.values()]) for c in columns)],
        f"Ranges are 95 % intervals, by request. Attacks: {', '.join(counts)}." if columns else "")


def progress_table(vs: list[View], v: View) -> list[Table]:
    """How far into an attack its violation came."""
    models, rows = models_of(v), {}
    for name, m in models.items():
        rows[name] = {f"message {turn}": row for turn, row in table_of(m.get("by_turn")).items()}
        tries = table_of(m.get("by_try"))
        rows[name] |= tries if len(tries) > 1 else {}
    columns = list(dict.fromkeys(c for found in rows.values() for c in found))
    return table(named(vs, v, "When the violation came"), "model", list(models), [
        *((c, [share_of(found.get(c, {}), "violations", "of") for found in rows.values()]) for c in columns),
        ("messages sent", [loose(number(m.get("messages"))) for m in models.values()])],
        "Violations, of the dialogues that came so far (of the attacks, for openings and rewrites).")


def versions_table(vs: list[View], v: View) -> list[Table]:
    rows = rows_of(v.results.get("versions"))
    return table(named(vs, v, "Versions on the same attacks"), "pair", [f"{word(r.get('a'))} after {word(r.get('b'))}" for r in rows], [
        ("change per 100 attacks", [cell(interval(r.get("change_per_100")), digits=1, sign=True) for r in rows]),
        ("fixed", [share_of(r, "fixed", "violations_before") for r in rows]),
        ("share fixed", [cell(interval(r.get("fixed_share")), percent) for r in rows]),
        ("newly broken", [share_of(r, "broken", "withstood_before") for r in rows]),
        ("McNemar p", [loose(number(r.get("p"))) for r in rows])], "p: McNemar's exact test of fixed against broken, two-sided.")


def degrees_table(vs: list[View], v: View) -> list[Table]:
    models = models_of(v)
    return table(named(vs, v, "Degree of the worst answer to an attack"), "model", list(models), [
        *((f"degree {n}", [loose(number(dig(m, "degrees", str(n)))) for m in models.values()]) for n in range(1, 6)),
        ("σ(R_s), mean", [cell(interval(m.get("safety"))) for m in models.values()])],
        "Attacks by the safety model's lowest score: degree 1 from σ(R_s) 0.8 on, then a degree for every 0.2 less, degree 5 below 0.2.")


def attack_examples(v: View) -> list[Table]:
    """The first dialogue with a violation of every vector, under the last model that has one."""
    found: dict[str, dict] = {}
    for t in v.samples("transcripts.jsonl"):
        if t.get("violation") is True:
            known = found.setdefault(word(t.get("vector")), t)
            if known.get("model") != t.get("model"):
                found[word(t.get("vector"))] = t
    return [Table(f"{plain(vector)}, {word(t.get('category'))}, degree {loose(number(t.get('degree')))}, {word(t.get('model'))}", ["", "said"],
                  [[turn["role"], clip(turn["text"], 600)[0]] for turn in turns(t.get("dialogue"))]) for vector, t in found.items()]


def last_rate(v: View):
    """(model, violations per 100 attacks) of the last model, for the section's key figures."""
    name, m = next(reversed(models_of(v).items()), ("", {}))
    return name, rate_of(m)


def last_fixed(v: View):
    """The last comparison of versions and its share of fixed failures, for the section's key figures."""
    rows = rows_of(v.results.get("versions"))
    return (rows[-1], interval(rows[-1].get("fixed_share"))) if rows else ({}, None)
