"""The report's part on Ghost Attention: the rows that were made, and the paper's Table 30 and Fig. 28 for the models that were compared."""

from posttrain import plots
from posttrain.plots import Line
from posttrain.report_pieces import Figure, Part, Table, at, drawn, facts, named, said, table
from posttrain.report_views import Interval, View, cell, dig, fixed, interval, listed, loose, number, percent, plain, rows_of, table_of, word


def gatt_part(vs: list[View]) -> Part:
    part = Part("gatt", "Ghost Attention", "An instruction stands in the first user turn alone. The rows teach to keep to it; the comparison asks for it "
                "after other turns, and an exact checker reads the answers.")
    made, compared = ([v for v in vs if v.kind == kind] for kind in ("gatt", "gatt_eval"))
    for v in compared:
        part.figures += recall_figure(compared, v)
        part.tables += (turns_table(compared, v, "attributes", "Attributes recalled by turn") + turns_table(compared, v, "forms", "Forms kept by turn")
                        + pairs_table(compared, v))
    part.facts = facts("Rows with an instruction", made, [v.name for v in made], [
        ("dialogues", at("dialogues")), ("rows", at("rows")), ("kept", at("kept")), ("earlier answers", said("context")),
        ("terse", at("terse_share", form=percent)), ("asked about", at("asked")), ("user turns, mean", at("user_turns", form=fixed, digits=1)),
        *((f"with a {kind}", at("kinds", kind)) for kind in ("hobby", "language", "figure")),
        *((f"keep the {label}", at("complies", label, "share", form=percent)) for label in ("language", "hobby, asked", "figure, asked")),
        *((f"dropped: {why}", at("dropped", why)) for why in dict.fromkeys(why for v in made for why in dropped(v)))],
        "Told by the checker, which reads the language of an answer and the names in it.")
    return part


def dropped(v: View) -> list[str]:
    found = v.results.get("dropped")
    return [k for k, n in found.items() if number(n) is not None] if isinstance(found, dict) else []


def by_turn(value) -> dict[str, Interval]:
    """{turn: share} of what a comparison stored, by turn."""
    found = {t: share for t, s in table_of(value).items() if t.isdecimal() and (share := interval(s))}
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def recall_of(v: View, group: str = "attributes") -> dict[str, dict[str, Interval]]:
    """Model -> turn -> share kept."""
    return {name: found for name, m in table_of(v.results.get("models")).items() if (found := by_turn(m.get(group)))}


def recall_figure(vs: list[View], v: View) -> list[Figure]:
    """Table 30 as curves."""
    found = recall_of(v)
    if not found:
        return []
    series = [Line(name, [int(t) for t in shares], [s.mean for s in shares.values()], i, *_ends(shares)) for i, (name, shares) in enumerate(found.items())]
    turns = list(next(iter(found.values())))
    ends = list(dict.fromkeys((turns[0], turns[-1])))
    words = [f"{name} recalls " + " and ".join(f"{percent(shares[t].mean)} at turn {t}" for t in ends) for name, shares in found.items()
             if {*ends} <= {*shares}]
    return drawn(named(vs, v, "Attributes recalled by turn"), f"Of the attributes set in the first turn, {'; '.join(words)}",
                 "Share of dialogues whose attribute is recalled, against the user turn that asks for it",
                 plots.lines(f"recall-{v.name}", series, "user turn of the question", "recalled", percent=True, zero=True),
                 "The shade is the 95 % interval by dialogue." if any(s.low for s in series) else "")


def _ends(shares: dict[str, Interval]) -> tuple:
    whole = all(s.bounded for s in shares.values())
    return ([s.low for s in shares.values()], [s.high for s in shares.values()]) if whole else (None, None)


def turns_table(vs: list[View], v: View, group: str, caption: str) -> list[Table]:
    """A row a model and, below it, one for each kind of attribute or form."""
    rows: dict[str, dict[str, Interval]] = {}
    singles = {"attributes": "by_attribute", "forms": "by_form"}[group]
    for name, m in table_of(v.results.get("models")).items():
        rows[name] = by_turn(m.get(group))
        rows |= {f"{name}: {plain(kind)}": by_turn(shares) for kind, shares in table_of(m.get(singles)).items()}
        rows |= {f"{name}: by chance": by_turn(m.get("chance"))} if group == "attributes" else {}
    rows = {name: shares for name, shares in rows.items() if shares}
    turns = sorted({t for shares in rows.values() for t in shares}, key=int)
    notes = {"attributes": "By chance: how often an answer names another dialogue's attribute.", "forms": "Forms that no row was made with."}
    looks = table_of(dig(v.results, "attention", "on_instruction")) if group == "attributes" else {}
    look = (" Largest attention weight of the last answer on the instruction at turn " + loose(v.get("attention", "turn")) + ": "
            + listed([f"{name} {fixed(number(s.get('mean')), 3)}" for name, s in looks.items()]) + f" ({v.name}/attention.png).") if looks else ""
    return table(named(vs, v, caption), "model", list(rows), [(f"turn {t}", [cell(s.get(t), percent) for s in rows.values()]) for t in turns],
                 f"Ranges are 95 % intervals, by dialogue. {notes[group]}{look}")


def pairs_table(vs: list[View], v: View) -> list[Table]:
    rows = rows_of(v.results.get("paired"))
    return table(named(vs, v, "Differences, paired by dialogue"), "pair", [
        f"{word(r.get('a'))} − {word(r.get('b'))}, {word(r.get('group'), '')} at turn {loose(r.get('turn'))}" for r in rows], [
        ("difference", [cell(interval(r.get("difference")), percent, sign=True) for r in rows]),
        ("the first alone", [loose(number(r.get("only_a"))) for r in rows]), ("the second alone", [loose(number(r.get("only_b"))) for r in rows]),
        ("McNemar p", [loose(number(r.get("p"))) for r in rows])],
        "The first alone: dialogues that only the first model gets right. p: McNemar's exact test, two-sided.")
