"""The report of a run: `write` makes one self-contained HTML page, `show` a terminal table.

Both read run folders only: no model, no data set, no torch. What is missing, unfinished, damaged or of an unknown kind is shown as
such, never an error. report_views.py reads the folders, report_parts.py has a part for each stage kind, plots.py draws, and
report.html.j2 is the page. report_compare.py puts several runs side by side.
"""

import base64
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from posttrain import config as cfg
from posttrain.log import duration
from posttrain.plots import UNSHOWN
from posttrain.report_directions import counted, directions_of
from posttrain.report_evaluate import paired
from posttrain.report_parts import FAULTS, PARTS, keys_of, optimistic, other_part
from posttrain.report_pieces import Part, some, table
from posttrain.report_views import (
    GAP,
    LONGEST,
    View,
    bounds,
    clip,
    dig,
    fixed,
    interval,
    is_unsafe,
    listed,
    loose,
    models_of,
    moved,
    number,
    percent,
    plain,
    plural,
    rows_of,
    sentence,
    text_of,
    turns,
    views,
    views_beside,
    word,
)
from posttrain.runs import Run, write_atomic

STAND_IN = "builtin:smollm2-135m-instruct"
ANSWER_HEAD = 700  # characters of an answer before it folds
PROMPTS_ON_PAGE, PROMPTS_AT_FIRST = 400, 6


# ---------------------------------------------------------------- answers

def answer_of(sample: dict, threshold: float | None) -> dict:
    """An answer as its card shows it. unsafe: σ(safety score) is below the threshold."""
    text, cut = clip(sample.get("answer"), LONGEST)
    head = text if len(text) < ANSWER_HEAD + 150 else text[:ANSWER_HEAD]
    scores = [(k, fixed(x)) for k in ("merged", "helpfulness", "safety", "kl", "refusal") if (x := number(sample.get(k))) is not None]
    return {"head": head, "rest": text[len(head):], "cut": cut, "scores": scores, "unsafe": is_unsafe(sample.get("safety"), threshold) or False,
            "merged": number(sample.get("merged")), "empty": not text.strip()}


def cards(samples: list[dict], column: Callable, order: list[str], threshold: float | None) -> list[dict]:
    """Samples -> one card a prompt with its answers by column (a model's name, or an iteration)."""
    groups: dict[str, dict] = {}
    for s in samples:
        where = json.dumps([word(s.get("row"), ""), s.get("prompt")], sort_keys=True, default=str)
        card = groups.setdefault(where, {"turns": turns(s.get("prompt")), "kind": word(s.get("kind"), ""), "columns": {}})
        card["columns"].setdefault(column(s), []).append(answer_of(s, threshold))
    for card in groups.values():
        found = card["columns"]
        card["columns"] = [(n, found[n]) for n in in_order(found, order)]
        card["unsafe"] = any(a["unsafe"] for answers in found.values() for a in answers)
        card["gain"], card["gain_text"] = gain_of(card["columns"])
    return list(groups.values())


def in_order(names, order: list[str]) -> list[str]:
    return [n for n in order if n in names] + [n for n in names if n not in order]


def gain_of(columns: list[tuple[str, list[dict]]]) -> tuple[float | None, str]:
    """Mean merged reward of the last column less that of the first, and the words for it."""
    means = [(n, [a["merged"] for a in answers if a["merged"] is not None]) for n, answers in columns]
    means = [(n, sum(m) / len(m)) for n, m in means if m]
    if len(means) < 2:
        return None, ""
    gain, several = round(means[-1][1] - means[0][1], 4), any(len(answers) > 1 for _, answers in columns)
    return gain, f"{'mean ' if several else ''}merged {fixed(gain, sign=True)} from {means[0][0]} to {means[-1][0]}"


def spread_kinds(rows: list[dict]) -> list[dict]:
    """One of each kind in turn, each kind in its own order, so that the first few on the page show every kind."""
    queues: dict[str, list[dict]] = {}
    for card in rows:
        queues.setdefault(card["kind"], []).append(card)
    longest = max(map(len, queues.values()), default=0)
    return [q[i] for i in range(longest) for q in queues.values() if i < len(q)]


def answers(vs: list[View]) -> dict | None:
    """What the answers part shows: evaluate's samples by model, or PPO's by iteration where nothing was evaluated."""
    for v in reversed(vs):
        if v.kind == "evaluate" and (samples := v.samples()):
            return answers_page(v, samples, lambda s: word(s.get("model"), "unnamed model"), list(models_of(v)), v.get("unsafe_threshold"))
    for v in reversed(vs):
        if v.kind == "ppo" and (samples := v.samples()):
            steps = sorted({x for s in samples if (x := number(s.get("step"))) is not None})
            return answers_page(v, samples, lambda s: f"iteration {loose(s.get('step'))}", [f"iteration {loose(x)}" for x in steps], None)
    return None


def answers_page(v: View, samples: list[dict], column: Callable, order: list[str], threshold: float | None) -> dict:
    rows = spread_kinds(cards(samples, column, order, threshold))
    gains = [c["gain"] for c in rows if c["gain"] is not None]
    names = in_order(list(dict.fromkeys(n for c in rows for n, _ in c["columns"])), order)
    takeaway = (f"“{names[-1]}” has the higher mean merged reward on {sum(g > 0 for g in gains)} of {plural(len(gains), 'prompt')}, "
                f"“{names[0]}” on {sum(g < 0 for g in gains)}.") if gains else ""
    return {"section": v.name, "cards": rows[:PROMPTS_ON_PAGE], "total": len(rows), "first": PROMPTS_AT_FIRST, "takeaway": takeaway,
            "kinds": sorted({c["kind"] for c in rows if c["kind"]}), "any_unsafe": any(c["unsafe"] for c in rows),
            "threshold": loose(threshold) if threshold is not None else ""}


# ---------------------------------------------------------------- the whole page

def states(vs: list[View]) -> str:
    done = sum(v.state == "done" for v in vs)
    if done == len(vs) > 1:
        return f"all {done} sections are done"
    return f"{done} of {plural(len(vs), 'section')} {'is' if done == 1 else 'are'} done"


def headline(vs: list[View]) -> str:
    """The run's result: the last evaluation's first comparison of its last model, else PPO's own, else fine-tuning's."""
    last_first = list(reversed(vs))
    for v in (v for v in last_first if v.kind == "evaluate"):
        rows = [r for r in paired(v) if r["merged"]]
        rows = [r for r in rows if r["name"] == next(reversed(models_of(v)), None)] or rows
        if rows:
            return pair_words(v, rows[0])
    for v in (v for v in last_first if v.kind == "ppo"):
        gain, kl = interval(dig(v.results, "watched", "paired_difference")), v.get("watched", "kl")
        if gain:
            return f"PPO changed the watched merged reward by {fixed(gain.mean, sign=True)}{bounds(gain, sign=True)}" + (
                f", {fixed(kl, 1)}{GAP}nats from where it started" if kl is not None else "") + optimistic(v, "; the")
    for v in (v for v in last_first if v.kind == "sft"):
        before, after = v.get("held_out_loss_before"), v.get("held_out_loss_after")
        if before is not None and after is not None:
            return moved("held-out loss of fine-tuning", before, after, unit="nats per token")
    return ""


def pair_words(v: View, row: dict) -> str:
    merged, name, base = row["merged"], row["name"], row["base"]
    text = f"“{name}” scores {fixed(abs(merged.mean))} {'higher' if merged.mean >= 0 else 'lower'} than “{base}” in merged reward"
    if merged.bounded and not merged.excludes(0):
        text = f"“{name}” can't be told from “{base}” in merged reward, {fixed(merged.mean, sign=True)}"
    text += bounds(merged, sign=True) + (f" on {v.get('prompts'):,.0f} held-out prompts" if v.get("prompts") is not None else "")
    before, after = (interval(dig(models_of(v), n, "unsafe_share")) for n in (base, name))
    if before and after:
        old, new = percent(before.mean, 1), percent(after.mean, 1)
        text += f"; unsafe answers {f'went from {old} to {new}' if old != new else f'stayed at {new}'}"
    kl = row["kl"] if row["kl"] is not None else number(dig(models_of(v), name, "kl"))
    return text + (f", at a KL of {fixed(kl, 1)}{GAP}nats" if kl is not None else "")


def verdict(vs: list[View]) -> str:
    """One sentence: what the run reached, which checks it missed, and what is still open."""
    found, head = checks(vs), headline(vs)
    if found:
        missed = sum(not c["met"] for c in found)
        count = f"{missed} of {plural(len(found), 'check')} {'is' if missed == 1 else 'are'} not met"
        count = count if missed else f"every check is met ({len(found)})"
        head = f"{head}; {count}" if head else count
    if all(v.state == "done" for v in vs):
        return sentence(head or f"{states(vs)}; no comparison was measured")
    at_work = [v for v in vs if v.state == "unfinished"]
    stopped = [f"“{v.name}” is {'unfinished' if v.last_step is None else f'at step {v.last_step:,}'}" for v in at_work]
    return sentence("; ".join([states(vs), *([listed(stopped)] if stopped else []), *([f"so far, {head}"] if head else [])]))


def checks(vs: list[View]) -> list[dict]:
    """Every check of the run's evaluations, the failed gates among them named as such, and one for each table of the paper's directions: that
    something there is met and nothing is not met."""
    out = []
    for v in vs:
        for c in rows_of(v.results.get("checks")) if v.kind in ("evaluate", "gatt_eval") else []:
            met, gate = c.get("met") is True, word(c.get("gate"), "")
            words = [text_of(c.get("detail")), f"the gate {gate} stops the run here" if gate and not met else ""]
            out.append({"name": word(c.get("name"), "unnamed check"), "met": met, "detail": "; ".join(filter(None, words))})
        if v.kind == "directions" and (rows := directions_of(v)):
            counts = counted(rows)
            out.append({"name": f"{plain(v.name)}: every direction of the paper that could be judged is met",
                        "met": counts["met"] > 0 and not counts["not met"], "detail": ", ".join(f"{n} {status}" for status, n in counts.items())})
    return out


def part_of(v: View) -> str:
    return PARTS[v.kind][0] if v.kind in PARTS else "other"


def boxes(run: Run, vs: list[View]) -> list[dict]:
    """The pipeline's boxes: state, time, key figure, what the section reads, and where its part is on the page."""
    out = []
    for v in vs:
        config, parents = run.recipe.stages.get(v.name), v.manifest.get("parents")
        reads = cfg.references(config.model_dump()) if config is not None else parents if isinstance(parents, dict) else []
        out.append({"name": v.name, "kind": v.kind, "state": v.state, "time": took(v, ""), "key": next(iter(keys_of(v)), None),
                    "reads": list(dict.fromkeys(reads)), "href": f"#{part_of(v)}" if v.state != "not run" else ""})
    return out


def took(v: View, otherwise: str = "–") -> str:
    return duration(v.seconds).replace(" ", GAP) if v.seconds is not None else otherwise


def parts(vs: list[View], beside: list[View] = ()) -> list[Part]:
    """The page's parts in order; one whose numbers can't be shown says so instead of taking the page with it.

    beside: reward sections of other runs, which join this run's in the curves over data and model size."""
    groups: dict[str, list[View]] = {}
    for v in vs:
        if v.state != "not run":
            groups.setdefault(part_of(v), []).append(v)
    if "reward" in groups:
        groups["reward"] += beside
    out = []
    for key, build in [*dict(PARTS.values()).items(), ("other", other_part)]:
        if key not in groups:
            continue
        try:
            part = build(groups[key])
        except FAULTS as e:
            part = Part(key, plain(groups[key][0].kind), notes=[f"These numbers can't be shown ({type(e).__name__}: {e})"])
        part.id = key
        part.notes += [f"{v.name}: {note}" for v in groups[key] for note in v.notes if not v.elsewhere]
        part.notes += [f"{v.name} is unfinished; this is what it has so far" for v in groups[key] if v.state == "unfinished"]
        if not (part.figures or part.facts or part.tables or part.folds or part.notes):
            part.notes = ["Nothing was recorded"]
        out.append(part)
    return out


def provenance(vs: list[View]) -> dict:
    ran = [v for v in vs if v.manifest]
    manifests = [v.manifest for v in ran]
    tables = table("Every section", "section", [v.name for v in ran], [
        ("kind", [v.kind for v in ran]), ("state", [v.state for v in ran]),
        ("started", [word(m.get("started"), "–").replace("T", " ")[:16] for m in manifests]), ("time", [took(v) for v in ran]),
        ("seed", [loose(m.get("seed")) for m in manifests]), ("dtype", [loose(dig(m, "decisions", "dtype")) for m in manifests]),
        ("micro-batch tokens", [loose(dig(m, "decisions", "micro_batch_tokens")) for m in manifests]),
        ("bit-exact", ["yes" if m.get("exact") is True else "no" if m.get("exact") is False else "–" for m in manifests]),
        ("commit", [loose(m.get("commit")) for m in manifests]),
        ("fingerprint", [word(m.get("fingerprint"), "–")[:10] for m in manifests])])
    sections = [{"name": v.name, "config": v.config_text(), "manifest": json.dumps(
        {k: x for k, x in v.manifest.items() if k != "inputs"}, indent=1, ensure_ascii=False, default=str)} for v in ran]
    return {"tables": tables, "sections": sections}


def summary(run: Run, vs: list[View]) -> list[str]:
    """The small line under the title."""
    seconds = sum(some(*(v.seconds for v in vs)))
    commits = list(dict.fromkeys(c for v in vs if (c := word(v.manifest.get("commit"), ""))))
    work = [f"{duration(seconds)} of work".replace(" ", GAP)] if seconds else []
    commit = [f"commit {listed(commits[:3])}"] if commits else []
    return [f"base model {base_of(run, vs)}", *work, f"seed {seed_of(run, vs)}", *commit, written()]


def written() -> str:
    return f"written {time.strftime('%Y-%m-%d %H:%M')}"


def base_of(run: Run, vs: list[View]) -> str:
    names = [dig(v.manifest, "base", "name_or_path") for v in vs]
    return next((n for n in names if isinstance(n, str)), run.recipe.model.name_or_path)


def seed_of(run: Run, vs: list[View]) -> int:
    return next((int(n) for v in vs if (n := number(v.manifest.get("seed"))) is not None), run.recipe.run.seed)


def script_hash(text: str) -> str:
    """What the page's content policy allows to run: this script and nothing else."""
    return base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


def breakable(name: str):
    """A section's name that a narrow box may break after an underscore."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def render(run: Run, beside: list[Run] = ()) -> str:
    """The page as text. beside: runs whose reward models stand beside this run's, such as those of bases of other sizes."""
    vs, trouble = views(run), ""
    try:
        found = answers(vs)
    except FAULTS as e:
        found, trouble = None, f"The sampled answers can't be shown ({type(e).__name__}: {e})"
    every = parts(vs, [v for other in beside for v in views_beside(other, "reward")])
    return page(title=run.recipe.run.name, verdict=verdict(vs), summary=summary(run, vs), stand_in=base_of(run, vs) == STAND_IN, checks=checks(vs),
                boxes=boxes(run, vs), lead=[p for p in every if p.id == "result"], parts=[p for p in every if p.id != "result"],
                answers=found, trouble=trouble, provenance=provenance(vs), source=run.recipe.path)


def page(*, boxes: list[dict] = (), checks: list[dict] = (), provenance: dict | None = None, source: str = "", **filled) -> str:
    """report.html.j2 filled in. boxes: the pipeline of one run; lead and parts: Parts before and after the answers."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"script_hash": script_hash, "breakable": breakable}
    text = env.get_template("report.html.j2").render(
        boxes=boxes, columns=-(-len(boxes) // -(-len(boxes) // 6)) if boxes else 1, checks=checks, provenance=provenance, source=source, **filled)
    return UNSHOWN.sub("\ufffd", text).strip() + "\n"


def write(run: Run, beside: list[Run] = ()) -> Path:
    """Make runs/<run>/report.html and return its path. Raises OSError where the folder can't be written. beside: see `render`."""
    path = run.folder / "report.html"
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(run, beside))
    return path


def show(run: Run) -> str:
    """A terminal table: a line a section with kind, state, time and key figures."""
    vs = views(run)
    head = ("section", "kind", "state", "time", "key figures")
    rows = [(v.name, v.kind, v.state, took(v), "; ".join([*map(str, keys_of(v)), *v.notes])) for v in vs]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(4)]
    rule = tuple("─" * w for w in [*widths, len(head[4])])
    lines = ["  ".join([r[0].ljust(widths[0]), r[1].ljust(widths[1]), r[2].ljust(widths[2]), r[3].rjust(widths[3]), r[4]]).rstrip()
             for r in [head, rule, *rows]]
    top = f"{run.recipe.run.name}: {states(vs)}, {duration(sum(some(*(v.seconds for v in vs))))} of work, in {run.folder}"
    return "\n".join([top, "", *lines]).replace(GAP, " ")
