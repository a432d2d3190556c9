"""The report's part on safety context distillation: the paper's Fig. 16, what the gate kept and what it held back."""

from posttrain import plots
from posttrain.plots import Line
from posttrain.report_pieces import Figure, Fold, Part, Table, at, ci, dot, drawn, facts, named, said, some, table
from posttrain.report_views import View, bounds, cell, clip, dig, fixed, interval, listed, loose, number, percent, plain, rows_of, table_of, turns, word

LABELS = {"none": "no preprompt", "generic": "generic preprompt", "template": "answer template"}
SCORE = "safety score, σ(R_s)"


def distill_part(vs: list[View]) -> Part:
    part = Part("distill", "Safety context distillation", "Adversarial prompts are answered with and without a safety preprompt. The safety model scores "
                "every answer as one to the prompt alone; where the answer with a preprompt scores higher, it is learnt without the preprompt.")
    drawn_once = [v for i, v in enumerate(vs) if v.results.get("modes") not in [w.results.get("modes") for w in vs[:i]]]  # one sampling, two gates
    for v in drawn_once:
        part.figures += modes_figure(drawn_once, v) + gain_figure(drawn_once, v)
    part.facts = facts("Distillation in numbers", vs, [v.name for v in vs], [
        ("adversarial prompts", at("prompts")), ("other prompts, left out", at("left_out", "not adversarial")),
        ("without a known risk category", at("categories", "unknown")), ("answers to each, each mode", at("samples_per_prompt")), ("gate", said("gate", "on")),
        ("distilled answers", at("distilled")), ("cannot be demonstrations", at("unusable")), ("kept", at("kept")),
        ("score higher than the original", ci("gate", "share_higher", form=percent)), ("mean gain, all", ci("gate", "gain_of_all", sign=True)),
        ("mean gain, higher ones", ci("gate", "gain_of_higher", sign=True)), ("held back by the gate", at("gate", "held_back")),
        ("mean loss, held back", ci("gate", "loss_held_back")), ("largest loss", at("gate", "largest_loss", form=fixed)),
        ("a second try scores higher", ci("gate", "second_try_share_higher", form=percent)),
        ("mean gain, second try", ci("gate", "second_try_gain", sign=True))],
        "Gains and losses are in σ(R_s). Held back: no higher than the original; with the gate off they are kept."
        + " A second try is another answer without a preprompt." * any(v.get("gate", "second_try_gain", "mean") is not None for v in vs))
    for v in drawn_once:
        part.tables += paired_table(drawn_once, v) + bins_table(drawn_once, v) + categories_table(drawn_once, v)
        examples = distill_examples(v)
        part.folds += [Fold(f"Answers of {v.name} to its first prompts", tables=examples)] if examples else []
    return part


def modes_figure(vs: list[View], v: View) -> list[Figure]:
    """Fig. 16a: the mean safety score without, with a generic and with a targeted preprompt."""
    modes = table_of(v.results.get("modes"))
    rows = some(*(dot(interval(m.get("safety")), LABELS.get(name, name), style=i) for i, (name, m) in enumerate(modes.items())))
    if not rows:
        return []
    steps = [(word(p.get("a")), interval(p.get("safety"))) for p in rows_of(v.results.get("paired")) if p.get("b") == "none"]
    words = [f"the {LABELS.get(name, name)} {fixed(d.mean, sign=True)}{bounds(d, sign=True)}" for name, d in steps if d]
    takeaway = f"Against no preprompt, {listed(words)}" if words else f"Without a preprompt the mean score is {fixed(rows[0].value)}"
    return drawn(named(vs, v, "Safety score by preprompt"), takeaway, "Mean safety score of answers without a preprompt, with a generic one and with an answer "
                 "template", plots.dots(f"modes-{v.name}", rows, f"mean {SCORE}", percent=False),
                 f"Means over {loose(v.get('compared_prompts'))} prompts that were answered under every mode, with 95 % intervals by prompt.")


def gain_figure(vs: list[View], v: View) -> list[Figure]:
    """Fig. 16b: what the preprompt gains against the score of the original answer."""
    bins = [b for b in rows_of(v.results.get("by_original_score")) if number(b.get("original")) is not None]
    series = some(*(gain_line(bins, *which) for which in (("gain", "with a preprompt", 0), ("second_try_gain", "a second try without", 1))))
    if not series or len(series[0].xs) < 2:
        return []
    xs, ys = series[0].xs, series[0].ys
    takeaway = f"Where the original answer scored {fixed(xs[0])} in the mean, the distilled one gains {fixed(ys[0], sign=True)}; " \
               f"where it scored {fixed(xs[-1])}, {fixed(ys[-1], sign=True)}"
    takeaway += "".join(f"; a second try without a preprompt gains {fixed(s.ys[0], sign=True)} and {fixed(s.ys[-1], sign=True)} there" for s in series[1:])
    note = "Answers in bins of equal number by the original's score; the shade is the 95 % interval by prompt." + (
        " An answer that scored low by chance is followed by a higher one even without a preprompt: the dashed line shows how much." if len(series) > 1 else "")
    return drawn(named(vs, v, "Gain against the original score"), takeaway, "Mean gain of the distilled answers against the score of the original ones",
                 plots.lines(f"gain-{v.name}", series, f"original answer's {SCORE}", "gain in the score", level=(0.0, ""), whole=False), note)


def gain_line(bins: list[dict], key: str, label: str, style: int) -> Line | None:
    found = [(b["original"], gain) for b in bins if (gain := interval(b.get(key)))]
    shade = all(g.bounded for _, g in found)
    return Line(label, [x for x, _ in found], [g.mean for _, g in found], style, [g.low for _, g in found] if shade else None,
                [g.high for _, g in found] if shade else None) if found else None


def paired_table(vs: list[View], v: View) -> list[Table]:
    rows = rows_of(v.results.get("paired"))
    names = [f"{LABELS.get(word(r.get('a')), word(r.get('a')))} − {LABELS.get(word(r.get('b')), word(r.get('b')))}" for r in rows]
    return table(named(vs, v, "Differences between preprompts, paired by prompt"), "pair", names, [
        ("σ(safety score)", [cell(interval(r.get("safety")), sign=True) for r in rows]),
        ("safety, raw score", [cell(interval(r.get("raw_safety")), sign=True) for r in rows]),
        ("helpfulness, raw score", [cell(interval(r.get("helpfulness")), sign=True) for r in rows])], "Ranges are 95 % intervals, by prompt.")


def bins_table(vs: list[View], v: View) -> list[Table]:
    bins = rows_of(v.results.get("by_original_score"))
    names = [f"{fixed(number(b.get('low')))} to {fixed(number(b.get('high')))}" for b in bins]
    return table(named(vs, v, "What the gate holds back, by the original's score"), "original score", names, [
        ("answers", [loose(number(b.get("answers"))) for b in bins]), ("mean gain, all", [cell(interval(b.get("gain")), sign=True) for b in bins]),
        ("held back", [loose(number(b.get("held_back"))) for b in bins]), ("their mean loss", [fixed(number(b.get("loss_held_back"))) for b in bins])],
        "Scores are σ(R_s). Held back: the distilled answer scores no higher than the original.")


def categories_table(vs: list[View], v: View) -> list[Table]:
    found = table_of(v.results.get("by_category"))
    return table(named(vs, v, "By risk category"), "category", [plain(name) for name in found], [
        ("answers", [loose(number(c.get("answers"))) for c in found.values()]),
        ("mean gain, all", [cell(interval(c.get("gain")), sign=True) for c in found.values()]),
        ("kept", [loose(number(c.get("kept"))) for c in found.values()])], "Answers that can be demonstrations; gains are in σ(R_s).")


def distill_examples(v: View) -> list[Table]:
    """The first sample under each mode of the first prompts."""
    groups: dict[object, list[dict]] = {}
    for s in v.first_samples(200):
        if number(s.get("safety")) is not None and s.get("sample") == 0:
            groups.setdefault(number(s.get("number")), []).append(s)
    return [Table(plots.short(turns(rows[0].get("prompt"))[-1]["text"], 200), ["", "raw safety score", "answer"], [
        [LABELS.get(word(s.get("mode")), word(s.get("mode"))) + ", kept" * bool(s.get("kept")), fixed(number(s["safety"])), clip(s.get("answer"), 600)[0]]
        for s in rows]) for rows in list(groups.values())[:3]]


def distill_gain(v: View):
    """The most targeted preprompt's gain over none, for the section's key figures."""
    rows = [p for p in rows_of(v.results.get("paired")) if p.get("b") == "none"]
    return interval(dig(rows[-1], "safety")) if rows else None
