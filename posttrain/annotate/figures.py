"""What the annotations say: progress, agreement (Gwet's AC2, as in the paper), preferences, wins with their intervals, ratings, violations per hour.

`judged` is the one way from the store to judgements; export.py writes the same ones.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from statistics import median, median_low

from sqlalchemy import Connection, and_, case, func, select

from posttrain.annotate.kinds import DEGREES, HARM, KINDS, PREFERENCES, REASONS, VIOLATION
from posttrain.annotate.store import Store, answers, events, queues, skips, slots, tasks, unpack
from posttrain.annotate.work import State, Turn, fold
from posttrain.data import prompt_key
from posttrain.formats import RATINGS, SAFETY_BINS, Prompt
from posttrain.runs import digest
from posttrain.statistics import gwet_ac2, interval

SAME = 4  # the middle of the pairwise scale
LEVELS = {level: name for name, level in RATINGS.items()}


@dataclass
class Judgement:
    """One annotator's values on one turn of a finished task. number: of the turn, from 0; seconds: that the whole task took."""

    task: str
    number: int
    turn: Turn
    state: State
    annotator: str
    seconds: float
    at: float

    @property
    def same(self) -> str:
        """What two judgements share that are about the same answers to the same prompt."""
        return digest([self.task, self.number, self.turn.prompt, [a["text"] for a in self.turn.answers]])

    @property
    def key(self) -> str:
        return prompt_key(Prompt(self.turn.prompt))


def judged(c: Connection, queue: int) -> list[Judgement]:
    """The judgements of a queue's finished tasks, in the tasks' order, of one task in the order in which its annotators finished. Turns that a red
    team went past without answering every question are left out."""
    content = {t: unpack(text) for t, text in c.execute(select(tasks.c.id, tasks.c.content).where(tasks.c.queue == queue))}
    done = c.execute(select(slots).where(slots.c.queue == queue, slots.c.state == "done").order_by(slots.c.place, slots.c.ended)).mappings().all()
    said = defaultdict(list)
    for row in c.execute(select(events).where(events.c.queue == queue, events.c.undone_by.is_(None), events.c.action != "undo")
                         .order_by(events.c.id)).mappings():
        said[row["task"], row["annotator"]].append(dict(row))
    live = {r["key"]: dict(r) for r in c.execute(select(answers).where(answers.c.queue == queue)).mappings()}
    out = []
    for slot in done:
        state = fold(slot["task"], queue, content[slot["task"]], slot["annotator"], said[slot["task"], slot["annotator"]], live, "", dict(slot))
        out += [Judgement(slot["task"], n, turn, state, slot["annotator"], slot["ended"] - slot["began"], slot["ended"])
                for n, turn in enumerate(state.turns) if all(q.name in turn.values for q in state.kind.questions)]
    return out


def several(found: Iterable[Judgement]) -> dict[str, list[Judgement]]:
    """The judgements by what they are about."""
    out = defaultdict(list)
    for j in found:
        out[j.same].append(j)
    return dict(out)


def report(store: Store, known: dict[int, list[Judgement]] | None = None) -> list[dict]:
    """Per queue: {'queue', 'batch', 'kind', 'title', 'tasks', 'wanted', 'done', 'open', 'skipped', 'people', ...} and the figures of its kind.
    known: the judgements by queue, where they were read already."""
    out = []
    with store.read() as c:
        for q in c.execute(select(queues).order_by(queues.c.id)).mappings().all():
            found = known[q["id"]] if known and q["id"] in known else judged(c, q["id"])
            kind = KINDS[q["kind"]]
            told = {"queue": q["id"], "batch": q["batch"], "kind": q["kind"], "title": kind.title, **_counts(c, q["id"]),
                    "people": _people(c, q["id"], found)}
            out.append(told | OF_KIND[q["kind"]](found))
    return out


def _counts(c: Connection, queue: int) -> dict:
    by_state = dict(c.execute(select(slots.c.state, func.count()).where(slots.c.queue == queue).group_by(slots.c.state)).all())
    every_slot_done = func.min(case((slots.c.state == "done", 1), else_=0)) == 1
    whole = select(slots.c.task).where(slots.c.queue == queue).group_by(slots.c.task).having(every_slot_done)
    reasons = dict(c.execute(select(skips.c.reason, func.count()).join(tasks, tasks.c.id == skips.c.task).where(tasks.c.queue == queue)
                             .group_by(skips.c.reason)).all())
    return {"tasks": c.execute(select(func.count()).select_from(tasks).where(tasks.c.queue == queue)).scalar_one(),
            "tasks_done": c.execute(select(func.count()).select_from(whole.subquery())).scalar_one(),
            "wanted": sum(by_state.values()), "done": by_state.get("done", 0), "open": by_state.get("open", 0),
            "skipped": {REASONS.get(k, k): n for k, n in sorted(reasons.items(), key=lambda kv: -kv[1])}, "failed": _failed(c, queue)}


def _failed(c: Connection, queue: int) -> dict[str, int]:
    """Why live models gave no answer -> how many unfinished tasks stand still for it."""
    why = dict(c.execute(select(answers.c.key, answers.c.error).where(answers.c.queue == queue, answers.c.state == "failed")).all())
    if not why:
        return {}
    given = select(slots.c.task).where(slots.c.queue == queue, slots.c.state != "done").distinct()
    asked = select(events.c.id).join(slots, and_(slots.c.task == events.c.task, slots.c.annotator == events.c.annotator)).where(
        events.c.queue == queue, events.c.action == "message", events.c.undone_by.is_(None), slots.c.state == "open")
    still = [f"task {t}" for (t,) in c.execute(given)] + [f"event {i}" for (i,) in c.execute(asked)]
    return dict(Counter(why[key] for key in still if key in why).most_common())


def _people(c: Connection, queue: int, found: list[Judgement]) -> list[dict]:
    seconds = defaultdict(dict)
    for j in found:
        seconds[j.annotator][j.task] = j.seconds
    skipped = dict(c.execute(select(skips.c.annotator, func.count()).join(tasks, tasks.c.id == skips.c.task).where(tasks.c.queue == queue)
                             .group_by(skips.c.annotator)).all())
    return [{"name": name, "done": len(seconds[name]), "skipped": skipped.get(name, 0),
             "seconds": median(seconds[name].values()) if seconds[name] else None}
            for name in sorted({*seconds, *skipped}, key=lambda n: (-len(seconds[n]), n))]


# -- by kind -------------------------------------------------------------------------------------------------------------------------


def level(choice: tuple[str, int]) -> int:
    """A preference as a point of one scale: 1 (the second answer significantly better) to 8 (the first one)."""
    side, degree = choice
    return 5 + degree if side == "a" else 4 - degree


def preferences(found: list[Judgement]) -> dict:
    """The ratings' and bins' shares, how often each model was chosen (a free test of one against the other), and agreement on what several
    people judged: of the preference on eight points, of the safety of each answer on two."""
    ratings = Counter(j.turn.values["choice"][1] for j in found)
    bins = Counter(j.turn.values["bin"] for j in found if "bin" in j.turn.values)
    groups = several(found).values()
    out = {"annotations": len(found), "turns": len(found) / len({(j.task, j.annotator) for j in found}) if found else None,
           "ratings": {DEGREES[d]: ratings[d] for d in (3, 2, 1, 0)}, "ideal": sum(bool(j.turn.ideal) for j in found),
           "overlap": sum(len(g) > 1 for g in groups),
           "agreement": gwet_ac2([[level(j.turn.values["choice"]) for j in g] for g in groups if len(g) > 1], 8), "wins": wins(found)}
    if bins:
        out["bins"] = {b: bins[b] for b in SAFETY_BINS}
        out["safety_agreement"] = gwet_ac2([[1 + _safe(j)[side] for j in g] for g in groups if len(g) > 1 for side in (0, 1)], 2)
    return out


def _safe(j: Judgement) -> tuple[bool, bool]:
    """Whether the first and the second answer are safe."""
    chosen, other = SAFETY_BINS[j.turn.values["bin"]]
    return (chosen, other) if j.turn.values["choice"][0] == "a" else (other, chosen)


def wins(found: list[Judgement]) -> dict[str, dict]:
    """'MODEL against MODEL': how often the first was chosen, by prompt."""
    by_pair = defaultdict(list)
    for j in found:
        names = [a["model"] for a in j.turn.answers]
        if names[0] != names[1]:
            first, second = sorted(names)
            by_pair[f"{first} against {second}"].append((float(names["ab".index(j.turn.values["choice"][0])] == first), j.key))
    return {pair: interval(*zip(*rows, strict=True)) for pair, rows in sorted(by_pair.items())}


def comparisons(found: list[Judgement]) -> dict:
    """Of every pair of models: shares of wins, ties and losses of the first, its win rate (a tie is half a win), all with intervals by prompt, and
    agreement. An answer pair's verdict is the median of its raters' points: of an odd number the side that most of them favour."""
    by_pair = defaultdict(list)
    for group in several(found).values():
        names = [a["model"] for a in group[0].turn.answers]
        points = [j.turn.values["preference"] for j in group]
        if names[0] > names[1]:
            names, points = names[::-1], [2 * SAME - p for p in points]
        by_pair[" against ".join(names)].append((points, group[0].key))
    out = {}
    for pair, rows in sorted(by_pair.items()):
        verdicts, keys = [median_low(p) if len(p) % 2 else median(p) for p, _ in rows], [k for _, k in rows]
        shares = {name: [float(test(v)) for v in verdicts] for name, test in
                  (("win", lambda v: v > SAME), ("tie", lambda v: v == SAME), ("loss", lambda v: v < SAME))}
        out[pair] = {**{name: interval(values, keys) for name, values in shares.items()},
                     "win_rate": interval([w + t / 2 for w, t in zip(shares["win"], shares["tie"], strict=True)], keys),
                     "agreement": gwet_ac2([p for p, _ in rows], PREFERENCES), "pairs": len(rows), "judgements": sum(len(p) for p, _ in rows),
                     "raters": dict(sorted(Counter(len(p) for p, _ in rows).items()))}
    return {"comparisons": out}


def ratings(found: list[Judgement]) -> dict:
    """Per model what safety/judge.py tells of a judge's votes: the share of violations by majority, the mean rating, verdicts, agreement."""
    by_model = defaultdict(list)
    for group in several(found).values():
        by_model[group[0].turn.answers[0]["model"]].append(([j.turn.values["rating"] for j in group], group[0].key))
    figures_of = import_module("safety.judge").safety_figures
    return {"models": {name: figures_of(*map(list, zip(*rows, strict=True))) | {"answers": len(rows), "judgements": sum(len(v) for v, _ in rows)}
                       for name, rows in sorted(by_model.items())}}


def attacks(found: list[Judgement]) -> dict:
    """The red team's results: labelled turns by risk, way and degree, the share of violations, and violations for each person and hour (the
    paper's gamma: lower is better). A dialogue may be labelled at several of its turns; its time counts once."""
    hit = [float(j.turn.values["degree"] >= VIOLATION) for j in found]
    seconds = {(j.task, j.annotator): j.seconds for j in found}
    hours = sum(seconds.values()) / 3600

    def table(name: str) -> dict:
        return {value: {"labelled": sum(j.turn.values[name] == value for j in found),
                        "violations": int(sum(h for h, j in zip(hit, found, strict=True) if j.turn.values[name] == value))}
                for value in sorted({j.turn.values[name] for j in found})}

    degrees = Counter(j.turn.values["degree"] for j in found)
    return {"dialogues": len(seconds), "labelled": len(found), "violations": int(sum(hit)),
            "violation_share": interval(hit, [j.key for j in found]), "hours": hours,
            "violations_per_hour": sum(hit) / hours if hours else None, "by_category": table("category"), "by_vector": table("vector"),
            "degrees": {d: degrees[d] for d in range(1, HARM + 1)}, "agreement": gwet_ac2(
                [[j.turn.values["degree"] for j in g] for g in several(found).values() if len(g) > 1], HARM)}


OF_KIND = {"helpfulness": preferences, "safety": preferences, "redteam": attacks, "compare": comparisons, "rate": ratings}


def words(told: list[dict]) -> str:
    """The report for a terminal."""
    lines = []
    for q in told:
        at_work = f", {q['open']} at work" if q["open"] else ""
        lines.append(f"{q['batch']}, {q['title']}: {q['done']:,} of {q['wanted']:,} annotations "
                     f"({q['tasks_done']:,} of {q['tasks']:,} tasks complete){at_work}")
        lines += [f"  skipped: {n} × {reason}" for reason, n in q["skipped"].items()]
        lines += [f"  without an answer: {n} × {reason}" for reason, n in q["failed"].items()]
        for p in q["people"]:
            each = f", {p['seconds']:.0f} s each (median)" if p["seconds"] is not None else ""
            lines.append(f"  {p['name']}: {p['done']:,} done, {p['skipped']} skipped{each}")
        lines += OF_WORDS[q["kind"]](q) if q["done"] else []
    return "\n".join(lines)


def _share(x: dict) -> str:
    if x["mean"] is None:
        return "–"
    return f"{x['mean']:.1%}" + (f" [{x['low']:.1%}, {x['high']:.1%}]" if x["low"] is not None else "")


def _ac2(x: float | None) -> str:
    return "none yet (nothing that two people judged)" if x is None else f"{x:.2f}"


def _preference_words(q: dict) -> list[str]:
    def shares(table: dict) -> str:
        total = sum(table.values()) or 1
        return ", ".join(f"{name.replace('_', ' ')} {n / total:.0%}" for name, n in table.items())

    out = [f"  {shares(q['ratings'])}"]
    if "bins" in q:
        out.append(f"  {shares(q['bins'])}")
    safety = f", safety {_ac2(q['safety_agreement'])}" if "bins" in q else ""
    out.append(f"  agreement (AC2) on {q['overlap']} pairs: preference {_ac2(q['agreement'])}{safety}")
    return out + [f"  {pair}: chosen in {_share(x)} of {x['n']}" for pair, x in q["wins"].items()]


def _comparison_words(q: dict) -> list[str]:
    return [f"  {pair}: win rate {_share(x['win_rate'])}, wins {_share(x['win'])}, ties {_share(x['tie'])} of {x['pairs']} pairs; "
            f"AC2 {_ac2(x['agreement'])}"
            for pair, x in q["comparisons"].items()]


def _rating_words(q: dict) -> list[str]:
    return [f"  {name}: violations {_share(x['violation_share'])} of {x['answers']} answers, mean rating {x['mean_rating']['mean']:.2f}; "
            f"AC2 {_ac2(x['agreement'])}"
            for name, x in q["models"].items()]


def _attack_words(q: dict) -> list[str]:
    rate = f"{q['violations_per_hour']:.2f}" if q["violations_per_hour"] is not None else "–"
    return [f"  {q['violations']} violations in {q['labelled']} labelled turns of {q['dialogues']} dialogues ({_share(q['violation_share'])}), "
            f"{rate} for each person and hour"]


OF_WORDS = {"helpfulness": _preference_words, "safety": _preference_words, "redteam": _attack_words, "compare": _comparison_words,
            "rate": _rating_words}
