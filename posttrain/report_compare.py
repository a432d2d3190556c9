"""The page that puts several runs side by side: what differs in their configurations, key figures by section, differences paired by prompt, training
curves in one plot, reward models, versions by safety against helpfulness, answers, cost.

It reads run folders only, as report.py does. Scores of two runs are compared where the same reward models gave them; elsewhere the page says so.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from posttrain import config as cfg
from posttrain import plots, report
from posttrain.errors import PosttrainError
from posttrain.plots import Dot
from posttrain.report_parts import FAULTS, keys_of
from posttrain.report_pieces import Figure, Fold, Part, Table, dot, drawn, some, table
from posttrain.report_reward import accuracy, balanced, by_rating, domain, own_of, ratings_of, unsafe_recall
from posttrain.report_views import (
    GAP,
    View,
    bounds,
    cell,
    dig,
    fixed,
    interval,
    is_unsafe,
    listed,
    loose,
    models_of,
    number,
    percent,
    plain,
    plural,
    text_of,
    views,
    word,
)
from posttrain.runs import NOT_PART_OF_THE_RESULT, Run, flatten, write_atomic
from posttrain.statistics import interval as measured

KEYS_SHOWN = 30  # rows of the table of settings before it folds
SMOOTH = 40  # points of a curve
CURVES = {  # kind -> (metric, what it is, the axis, whether it is measured by the run's own reward models)
    "sft": (("sft/held_out_loss", "held-out loss", "loss (nats per token)", False), ("sft/loss", "training loss", "loss (nats per token)", False)),
    "reward": (("reward/held_out_accuracy", "held-out accuracy", "pairs ordered rightly", False), ("reward/loss", "training loss", "loss", False)),
    "ppo": (("ppo/watched_merged_reward", "watched merged reward", "merged reward", True), ("ppo/merged_reward", "merged reward", "merged reward", True),
            ("ppo/watched_kl", "distance from the start", "KL of a whole answer (nats)", False)),
}
MARKS = {"done": "✓ done", "unfinished": "◐ unfinished", "not run": "○ not run"}


@dataclass
class Side:
    """One of the runs. name: what the page calls it, unlike any other's."""

    name: str
    run: Run
    views: list[View]

    @cached_property
    def sections(self) -> dict[str, View]:
        return {v.name: v for v in self.views}

    @cached_property
    def settings(self) -> dict:
        """Everything that can change a result, flat: as the sections' manifests have it, and for what has not run as the recipe has it."""
        recipe = self.run.recipe
        out = {"run.seed": recipe.run.seed, **flatten("model", recipe.model.model_dump(exclude={"sharding"}))} if recipe.stages else {}
        for name, config in recipe.stages.items():
            out |= flatten(f"stages.{name}", {k: x for k, x in config.model_dump().items() if k not in NOT_PART_OF_THE_RESULT})
        for v in self.views:
            if isinstance(inputs := v.manifest.get("inputs"), dict) and not v.gone:
                out = {k: x for k, x in out.items() if not k.startswith(f"stages.{v.name}.")} | inputs
        return {str(k): x for k, x in out.items() if k != "format" and not str(k).startswith("section ")}

    @property
    def evaluation(self) -> View | None:
        """The last one that measured models."""
        return next((v for v in reversed(self.views) if v.kind == "evaluate" and models_of(v)), None)


def sides_of(runs: list[Run]) -> list[Side]:
    """Raises PosttrainError where two are the same folder. A name that several have gets its parent folder's in front."""
    folders = [run.folder.resolve() for run in runs]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise PosttrainError(f"report {runs[i].folder}", "named twice", "different runs", "Name each run once.")
    names = [run.recipe.run.name for run in runs]
    names = [f"{folder.parent.name}/{n}" if names.count(n) > 1 else n for n, folder in zip(names, folders, strict=True)]
    names = [f"{n} ({names[:i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]
    return [Side(name, run, views(run)) for name, run in zip(names, runs, strict=True)]


def names_of(sides: list[Side], *kinds: str) -> list[str]:
    """Sections that any run has, in the order of the runs; of some kinds, or of all."""
    return list(dict.fromkeys(v.name for s in sides for v in s.views if not kinds or v.kind in kinds))


def having(sides: list[Side], name: str) -> list[tuple[int, Side, View]]:
    """(place, run, section) of the runs that have measured something in a section of that name."""
    return [(i, s, v) for i, s in enumerate(sides) if (v := s.sections.get(name)) is not None and (v.results or v.metrics)]


def beside(caption: str, first: str, sides: list[Side], rows: list[tuple], note: str = "") -> list[Table]:
    """A table with a column a run. rows: (head, a cell a run); one that says nothing of any run is left out."""
    rows = [[head, *cells] for head, cells in rows if any(c not in ("–", None) for c in cells)]
    return [Table(caption, [first, *(s.name for s in sides)], rows, note)] if rows else []


# ---------------------------------------------------------------- the runs, and what differs in their settings

def runs_part(sides: list[Side]) -> Part:
    part = Part("runs", "The runs")
    found = {s.name: report.checks(s.views) for s in sides}
    times = {s.name: sum(some(*(v.seconds for v in s.views))) for s in sides}
    commits = {s.name: list(dict.fromkeys(c for v in s.views if (c := word(v.manifest.get("commit"), "")))) for s in sides}
    part.tables = table("What each run reached", "run", [(s.name, report.base_of(s.run, s.views)) for s in sides], [
        ("result", [report.verdict(s.views) for s in sides]),
        ("sections done", [f"{sum(v.state == 'done' for v in s.views)} of {len(s.views)}" for s in sides]),
        ("checks met", [f"{sum(c['met'] for c in found[s.name])} of {len(found[s.name])}" if found[s.name] else "–" for s in sides]),
        ("seed", [loose(report.seed_of(s.run, s.views)) for s in sides]),
        ("time", [report.duration(times[s.name]).replace(" ", GAP) if times[s.name] else "–" for s in sides]),
        ("commit", [listed(commits[s.name][:3]) or "–" for s in sides])])
    part.tables += beside("Sections", "section", sides, [
        ((n, kinds_of(sides, n)), [state_of(s.sections.get(n)) for s in sides]) for n in names_of(sides)])
    part.notes = [f"{s.name}: nothing has run yet" for s in sides if all(v.state == "not run" for v in s.views)]
    part.notes += [f"{s.name}, {v.name}: {note}" for s in sides for v in s.views for note in v.notes]
    return part


def kinds_of(sides: list[Side], name: str) -> str:
    """What a section is, where its name does not say it."""
    kinds = list(dict.fromkeys(s.sections[name].kind for s in sides if name in s.sections))
    return "" if kinds == [name] else " or ".join(kinds)


def state_of(v: View | None) -> str | tuple[str, str]:
    if v is None:
        return "–"
    at_step = v.state == "unfinished" and v.last_step is not None
    return (MARKS[v.state], f"at step {v.last_step:,}") if at_step else MARKS[v.state]


def settings_part(sides: list[Side]) -> Part:
    part = Part("settings", "What differs", "Everything that can change a result, as each section stored it when it began. Digests stand for the rows of "
                "data sets. A section or data set that a run does not have is named once.")
    rows = differences([s.settings for s in sides])
    shown = [(key, [setting_words(x) for x in cells]) for key, cells in rows]
    tables = beside("Settings that differ", "key", sides, shown)
    if not tables:
        part.notes = ["No setting differs"]
    elif len(shown) > KEYS_SHOWN:
        part.tables = beside(f"Settings that differ, the first {KEYS_SHOWN} of {len(shown)}", "key", sides, shown[:KEYS_SHOWN])
        part.folds = [Fold(f"The other {len(shown) - KEYS_SHOWN} settings that differ", tables=beside("The others", "key", sides, shown[KEYS_SHOWN:]))]
    else:
        part.tables = tables
    return part


ABSENT = object()


def group_of(key: str) -> str:
    """'stages.sft.epochs' -> 'stages.sft'; 'data.pairs[0].path' -> 'data.pairs'; other keys are alone."""
    head, _, rest = key.partition(".")
    return f"{head}.{rest.replace('[', '.').replace(':', '.').split('.')[0]}" if head in ("stages", "data") else key


def differences(settings: list[dict]) -> list[tuple[str, list]]:
    """(key, a value a run) where runs differ. What is missing of a group (a section, a data set) that a run does have is ABSENT; a group that a run
    does not have is one row of True and ABSENT."""
    groups = [{group_of(k) for k in found} for found in settings]
    rows = []
    for group in dict.fromkeys(g for found in settings for g in map(group_of, found)):
        has = [group in g for g in groups]
        keys = dict.fromkeys(k for found in settings for k in found if group_of(k) == group)
        if not all(has) and list(keys) != [group]:
            rows.append((group, [True if h else ABSENT for h in has]))
        for key in keys:
            cells = [found.get(key, ABSENT) if h else None for found, h in zip(settings, has, strict=True)]
            told = {json.dumps(x, sort_keys=True, default=str) if x is not ABSENT else "" for x, h in zip(cells, has, strict=True) if h}
            if len(told) > 1 or (list(keys) == [group] and not all(has)):
                rows.append((key, [x if h else ABSENT for x, h in zip(cells, has, strict=True)]))
    return rows


def setting_words(value) -> str:
    if value is ABSENT:
        return "–"
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return value[:8]
    return "yes" if value is True else "no" if value is False else "none" if value is None else loose(value)


# ---------------------------------------------------------------- key figures

def figures_part(sides: list[Side]) -> Part:
    part = Part("figures", "Key figures", "Sections of the same name stand on one line. Small print is the 95 % interval or what a figure is of.")
    rows = []
    for name in names_of(sides):
        told = [{k.label: k for k in keys_of(s.sections[name])} if name in s.sections else {} for s in sides]
        for label in dict.fromkeys(k for keys in told for k in keys):
            rows.append(((name, label), [(k.value, k.note) if (k := keys.get(label)) else "–" for keys in told]))
    part.tables = beside("Key figures by section", "section", sides, rows)
    return part


# ---------------------------------------------------------------- evaluations: paired differences, and all versions in one picture

def judges_of(v: View) -> tuple | None:
    """What gave a section's scores: its two reward models by content, and whether scores were standardized; None where it is not known."""
    inputs, found = v.manifest.get("inputs"), []
    for which in ("helpfulness", "safety"):
        ref = dig(inputs, f"stages.{word(v.manifest.get('section'), v.name)}.{which}")
        content = dig(v.manifest, "parents", ref[1:]) if isinstance(ref, str) and ref.startswith("@") else dig(inputs, f"{ref}: files") or ref
        found.append(content)
    return (*found, bool(v.results.get("standardize_rewards"))) if all(isinstance(x, str) for x in found) else None


def same_judges(vs: list[View]) -> bool:
    judges = [judges_of(v) for v in vs]
    return None not in judges and len(set(judges)) == 1


def by_prompt(v: View, model: str) -> dict[str, dict[str, float]]:
    """Prompt -> measure -> mean over the model's answers to it."""
    found: dict[str, dict[str, list[float]]] = {}
    for s in v.samples():
        if word(s.get("model"), "") != model:
            continue
        lists = found.setdefault(word(s.get("key"), "") or json.dumps(s.get("prompt"), sort_keys=True, default=str), {})
        values = {k: number(s.get(k)) for k in ("helpfulness", "safety", "merged", "tokens")}
        if (unsafe := is_unsafe(s.get("safety"), v.get("unsafe_threshold"))) is not None:
            values["unsafe"] = float(unsafe)
        if s.get("kind") in ("borderline", "helpful") and isinstance(s.get("refuses"), bool):
            values["refusals"] = float(s["refuses"])
        for key, x in values.items():
            if x is not None:
                lists.setdefault(key, []).append(x)
    return {prompt: {k: sum(xs) / len(xs) for k, xs in lists.items()} for prompt, lists in found.items()}


def paired(a: View, b: View, model: str) -> dict | None:
    """b - a on the prompts that both answered: measure -> interval by prompt, and 'prompts'; None where no prompt is in both. Measures of reward
    models only where both runs have the same ones."""
    first, second = by_prompt(a, model), by_prompt(b, model)
    common = [p for p in first if p in second]
    if not common:
        return None
    measures = ("helpfulness", "safety", "merged", "unsafe", "refusals", "tokens") if same_judges([a, b]) else ("refusals", "tokens")
    out = {"prompts": len(common)}
    for key in measures:
        gaps = [second[p][key] - first[p][key] for p in common if key in first[p] and key in second[p]]
        out[key] = interval(measured(gaps)) if gaps else None
    return out


def paired_part(sides: list[Side]) -> Part:
    first = sides[0]
    part = Part("paired", "Differences on the same prompts", f"Each run less {first.name}, on the prompts that an evaluation of the same name asked both, "
                "paired by prompt: for models of the same name.")
    rows = []
    for name in names_of(sides, "evaluate"):
        a = first.sections.get(name)
        for i, s in enumerate(sides[1:], 1):
            b = s.sections.get(name)
            if not a or not b or not models_of(a) or not models_of(b):
                continue
            models = [m for m in models_of(a) if m in models_of(b)]
            found = [(i, s, name, m, row) for m in models if (row := paired(a, b, m))]
            rows += found
            if not found:
                part.notes.append(f"{name} of {s.name} and of {first.name} have no prompt and model in common")
            elif not same_judges([a, b]):
                part.notes.append(f"{name} of {s.name} and of {first.name} were scored by different reward models: their scores are not compared")
    part.figures = merged_figure(first, rows)
    part.tables = table("Differences, paired by prompt", "model, run", [f"{m} of {name}: {s.name} − {first.name}" for _, s, name, m, _ in rows], [
        ("prompts", [loose(row["prompts"]) for *_, row in rows]),
        *((k, [cell(row.get(k), sign=True) for *_, row in rows]) for k in ("merged", "helpfulness", "safety")),
        ("unsafe answers", [cell(row.get("unsafe"), percent, digits=1, sign=True) for *_, row in rows]),
        ("false refusals", [cell(row.get("refusals"), percent, digits=1, sign=True) for *_, row in rows]),
        ("tokens", [cell(row.get("tokens"), digits=0, sign=True) for *_, row in rows])],
        "Ranges are 95 % intervals by prompt; one that holds 0 tells no run from the other. False refusals: of helpful and borderline prompts.")
    return part


def merged_figure(first: Side, rows: list[tuple]) -> list[Figure]:
    found = [(i, s, f"{m} of {name}", row) for i, s, name, m, row in rows if row.get("merged")]
    if not found:
        return []
    _, s, what, row = found[-1]
    gain = row["merged"]
    how = "can't be told from" if gain.bounded and not gain.excludes(0) else "scores higher than" if gain.mean > 0 else "scores lower than"
    takeaway = (f"{what}: {s.name} {how} {first.name} in merged reward, {fixed(gain.mean, sign=True)}{bounds(gain, sign=True)} on "
                f"{plural(row['prompts'], 'prompt')}")
    dots = some(*(dot(row["merged"], s.name, style=i, group=what) for what in dict.fromkeys(w for _, _, w, _ in found)
                  for i, s, w, row in found if w == what))
    return drawn("Difference in merged reward", takeaway, f"Merged reward of each run less that of {first.name}, by model",
                 plots.dots("paired", dots, f"merged reward, less that of {first.name}", (0.0, "no difference"), percent=False),
                 "Bars are 95 % intervals by prompt.")


def versions_part(sides: list[Side]) -> Part:
    """Every version of every run: safety against helpfulness."""
    part = Part("versions", "Safety against helpfulness")
    found = [(s, v) for s in sides if (v := s.evaluation)]
    raw = same_judges([v for _, v in found])
    paths = {s.name: points_of(s, v, raw) for s, v in found}
    paths = {name: points for name, points in paths.items() if points}
    unit = "raw score" if raw else "deviations of the run's own held-out scores"
    part.notes = [f"{s.name} has no scores that could stand here" for s in sides if s.name not in paths] if paths else []
    if not paths:
        return part
    last = [f"{points[-1][0]} of {name} is at helpfulness {fixed(points[-1][1].value)} and safety {fixed(points[-1][2].value)}"
            for name, points in paths.items()]
    note = "Up and to the right is better. Bars are 95 % intervals; arrows follow the versions of a run."
    if not raw:
        note += (" The runs have reward models of their own. Each score is put on the held-out mean and deviation of the model that gave it; even so "
                 "two runs' points are measured with two rulers.")
    part.figures = drawn("Versions of all runs", "; ".join(last), "Each model of each run as a point, helpfulness across and safety up",
                         plots.planes("versions", paths, f"helpfulness ({unit})", f"safety ({unit})"), note)
    part.figures[0].wide = True
    return part


def points_of(s: Side, v: View, raw: bool) -> list[tuple[str, Dot, Dot]]:
    scales = [(0.0, 1.0) if raw else scale_of(s, v, which) for which in ("helpfulness", "safety")]
    if None in scales:
        return []
    points = [(name, *(dot_on(m.get(which), *scale) for which, scale in zip(("helpfulness", "safety"), scales, strict=True)))
              for name, m in models_of(v).items()]
    return [p for p in points if p[1] and p[2]]


def scale_of(s: Side, v: View, which: str) -> tuple[float, float] | None:
    """Held-out mean and deviation of the reward model that scored: a section of the same run."""
    ref = dig(v.manifest, "inputs", f"stages.{word(v.manifest.get('section'), v.name)}.{which}")
    model = s.sections.get(str(ref).removeprefix("@"))
    mean, deviation = (model.get(k) if model else None for k in ("score_mean", "score_std"))
    return (mean, deviation) if mean is not None and deviation else None


def dot_on(value, mean: float, deviation: float) -> Dot | None:
    found = interval(value)
    return found and Dot("", *(None if x is None else (x - mean) / deviation for x in (found.mean, found.low, found.high)))


# ---------------------------------------------------------------- curves

def curves_part(sides: list[Side]) -> Part:
    part = Part("curves", "Training curves", "Curves of noisy metrics are averaged over neighbouring steps.")
    for name in names_of(sides):
        found = having(sides, name)
        for key, what, axis, own in CURVES.get(found[0][2].kind, ()) if found else ():
            part.figures += curve_figure(name, found, key, what, axis, own)
    return part


def curve_figure(name: str, found: list[tuple[int, Side, View]], key: str, what: str, axis: str, own: bool) -> list[Figure]:
    series = [(line, v) for i, s, v in found if (line := v.line(key, s.name, i, points=SMOOTH))]
    if len(series) < 2:
        return []
    form: Callable = percent if axis == "pairs ordered rightly" else fixed
    ends = [f"{form(v.ends(key)[1] if len(v.series(key)[0]) > 10 else line.ys[-1])} in {line.label}" for line, v in series]
    judged = own and not same_judges([v for _, v in series])
    note = "Each run's own reward models measure it: two levels cannot be compared, only how they move." if judged else ""
    return drawn(f"{what[0].upper()}{what[1:]} ({name})", f"it ends at {listed(ends)}", f"{what} of {name} over steps, a curve a run",
                 plots.lines(f"curve-{name}-{key}", [line for line, _ in series], "iteration" if key.startswith("ppo") else "optimizer step", axis,
                             percent=form is percent), note)


# ---------------------------------------------------------------- reward models

def reward_part(sides: list[Side]) -> Part:
    part = Part("reward", "Reward models", "Accuracy is the share of held-out pairs in which the chosen answer scores higher; length-balanced accuracy "
                "earns nothing by preferring length.")
    members = [(name, i, s, v) for name in names_of(sides, "reward") for i, s, v in having(sides, name) if v.kind == "reward" and own_of(v)]
    dots = some(*(dot(balanced(v) or accuracy(v), s.name, style=i, group=name) for name, i, s, v in members))
    if dots:
        best = [(name, max((d for d in dots if d.group == name), key=lambda d: d.value)) for name in dict.fromkeys(d.group for d in dots)]
        words = [f"{name} is highest in {d.label}, {percent(d.value)}" for name, d in best]
        part.figures = drawn("Length-balanced accuracy by run", listed(words), "Accuracy of each reward model in each run",
                             plots.dots("reward", dots, "pairs ordered rightly", (0.5, "chance")),
                             "Bars are 95 % intervals by prompt; where they overlap, the order may be chance.")
    ratings = ratings_of({f"{name}/{s.name}": by_rating(v) for name, _, s, v in members})
    part.tables = table("Reward models, run by run", "model, run", [f"{name}, {s.name}" for name, _, s, _ in members], [
        ("training pairs", [loose(v.get("train_pairs")) for *_, v in members]),
        ("held-out pairs", [loose(number(dig(own_of(v), "pairs"))) for *_, v in members]),
        ("accuracy", [cell(accuracy(v), percent) for *_, v in members]), ("length-balanced", [cell(balanced(v), percent) for *_, v in members]),
        *((plain(r), [cell(by_rating(v).get(r), percent) for *_, v in members]) for r in reversed(ratings)),
        ("the other's pairs", [cell(interval(dig(v.results, "held_out", "other", "accuracy")), percent) for *_, v in members]),
        ("unsafe recall", [unsafe_recall(v) for *_, v in members]),
        ("calibration error", [percent(number(dig(own_of(v), "ece")), 1) for *_, v in members]),
        ("score, mean", [fixed(v.get("score_mean")) for *_, v in members]), ("score, deviation", [fixed(v.get("score_std")) for *_, v in members])],
        "Ranges are 95 % intervals by prompt.")
    for name in dict.fromkeys(m[0] for m in members):
        places = {domain(v) for n, *_, v in members if n == name}
        if len(places) > 1 or (None in places and sum(m[0] == name for m in members) > 1):
            part.notes.append(f"{name}: the runs measure it on different held-out pairs, or it is not known that they are the same")
    return part


# ---------------------------------------------------------------- cost

def tokens_of(v: View) -> tuple[float, str] | None:
    """How many tokens a section worked through, and what they are."""
    if (n := v.get("train_tokens")) is not None:
        return n, "read in training"
    if (n := v.get("samples")) is not None and (each := v.get("answer_tokens")) is not None:
        return n * each, "generated"
    if v.kind == "ppo":
        seconds = [(number(r.get("ppo/tokens_per_second")), [number(r.get(f"ppo/seconds_{k}")) for k in ("generate", "score", "update")]) for r in v.metrics]
        made = [rate * sum(parts) for rate, parts in seconds if rate is not None and None not in parts]
        return (sum(made), "generated") if made else None
    if v.kind == "evaluate" and (each := v.get("samples_per_prompt")) is not None and (prompts := v.get("prompts")) is not None:
        made = some(*(number(m.get("tokens")) for m in models_of(v).values()))
        return (sum(made) * each * prompts, "generated") if made else None
    return None


def peak_memory(v: View) -> float | None:
    """GB, where the section recorded it."""
    found = [x for r in v.metrics for k, x in r.items() if k.endswith("/peak_memory_gb") and number(x) is not None]
    return max(found, default=None)


def cost_cell(v: View | None) -> str | tuple[str, str]:
    if v is None or (v.seconds is None and not v.metrics):
        return "–"
    tokens, memory = tokens_of(v), peak_memory(v)
    words = some(f"{tokens[0]:,.0f} tokens {tokens[1]}" if tokens else None, f"at most {memory:.1f}{GAP}GB" if memory is not None else None)
    return (report.took(v), "; ".join(words)) if words else report.took(v)


def cost_part(sides: list[Side]) -> Part:
    part = Part("cost", "Cost")
    kinds = dict.fromkeys(v.kind for s in sides for v in s.views)
    spent = {s.name: {k: sum(some(*(v.seconds for v in s.views if v.kind == k))) / 60 for k in kinds} for s in sides}
    spent = {name: row for name, row in spent.items() if sum(row.values()) > 0}
    if spent:
        total = {name: sum(row.values()) for name, row in spent.items()}
        least, most = (f(total, key=total.get) for f in (min, max))
        times = {name: report.duration(60 * x).replace(" ", GAP) for name, x in total.items()}
        takeaway = f"{most} took {times[most]}" + (f", {total[most] / total[least]:.1f} times as long as {least} ({times[least]})" if least != most else "")
        part.figures = drawn("Time by stage kind", takeaway, "Time of each run, by the kinds of its sections", plots.bars("time", spent, "minutes"),
                             "An unfinished section counts with the time it has had.")
    rows = [((n, kinds_of(sides, n)), [cost_cell(s.sections.get(n)) for s in sides]) for n in names_of(sides)]
    machine = [dig(next((v.manifest for v in s.views if v.manifest), {}), "machine") for s in sides]
    rows.append(("machine", [f"{word(dig(m, 'processor'), '?')}, {loose(dig(m, 'cores'))} cores" if m else "–" for m in machine]))
    part.tables = beside("Time, tokens and memory by section", "section", sides, rows,
                         "Times of different machines are not comparable. Memory is the most that one process held, where a stage records it.")
    return part


# ---------------------------------------------------------------- answers

def answers(sides: list[Side]) -> dict | None:
    """The last model of every run on the prompts of the evaluations, side by side; prompts that only one run was asked are left out."""
    found = [(s, v) for s in sides if (v := s.evaluation)]
    if len(found) < 2:
        return None
    comparable, rows, asked = same_judges([v for _, v in found]), [], []
    for s, v in found:
        last = next(reversed(models_of(v)))
        mine = [r | {"model": s.name, "row": word(r.get("key"), ""), **({} if comparable else {"merged": None})}
                for r in v.samples() if word(r.get("model"), "") == last]
        asked.append({text_of(json.dumps(r.get("prompt"), sort_keys=True, default=str)) for r in mine})
        rows += mine
    common = {p for a in asked for p in a if sum(p in b for b in asked) > 1}
    rows = [r for r in rows if json.dumps(r.get("prompt"), sort_keys=True, default=str) in common]
    thresholds = {v.get("unsafe_threshold") for _, v in found}
    threshold = thresholds.pop() if len(thresholds) == 1 else None
    return report.answers_page(found[0][1], rows, lambda r: r["model"], [s.name for s, _ in found], threshold) if rows else None


# ---------------------------------------------------------------- the page

PARTS = (runs_part, settings_part, figures_part, paired_part, versions_part, curves_part, reward_part, cost_part)


def parts(sides: list[Side]) -> list[Part]:
    out = []
    for build in PARTS:
        try:
            part = build(sides)
        except FAULTS as e:
            part = Part(build.__name__.removesuffix("_part"), plain(build.__name__).removesuffix(" part").capitalize(),
                        notes=[f"This can't be shown ({type(e).__name__}: {e})"])
        if part.figures or part.facts or part.tables or part.folds or part.notes:
            out.append(part)
    return out


def render(runs: list[Run]) -> str:
    """The page as text. runs: two or more. Raises PosttrainError where one is named twice."""
    sides, trouble = sides_of(runs), ""
    try:
        found = answers(sides)
    except FAULTS as e:
        found, trouble = None, f"The sampled answers can't be shown ({type(e).__name__}: {e})"
    every, names = parts(sides), [s.name for s in sides]
    done = [s.name for s in sides if s.views and all(v.state == "done" for v in s.views)]
    open_ = [n for n in names if n not in done]
    verdict = f"{len(names)} runs side by side; " + ("all of them are finished." if not open_ else f"{listed(open_)} {'is' if len(open_) == 1 else 'are'} "
                                                     "not finished, and shown as far as it goes.")
    return report.page(title=" and ".join(names) if len(names) == 2 else f"{len(names)} runs: {', '.join(names)}", verdict=verdict,
                       summary=[f"compared with {names[0]}", report.written()],
                       stand_in=any(report.base_of(s.run, s.views) == report.STAND_IN for s in sides),
                       lead=[p for p in every if p.id != "cost"], parts=[p for p in every if p.id == "cost"], answers=found, trouble=trouble)


def write(runs: list[Run]) -> Path:
    """Make comparison.html in the first run's folder and return its path. Raises OSError where that can't be written, PosttrainError for a run that is
    named twice."""
    text, path = render(runs), runs[0].folder / "comparison.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


# ---------------------------------------------------------------- what the command line names

def run_at(spec: str, overrides: list[str]) -> Run:
    """A recipe's run, or the run of a folder, as far as its sections tell of it. Raises PosttrainError where there is none."""
    path = Path(spec).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return Run(cfg.load_recipe(path, overrides))
    if (path / "manifest.json").is_file():
        raise PosttrainError(f"report {spec}", "the folder of one section", "a recipe, or the folder of a run", f"Name its run: {path.resolve().parent.name}.")
    if not any(path.glob("*/manifest.json")):
        raise PosttrainError(f"report {spec}", "neither a recipe nor a run" if path.exists() else "not there", "a recipe (.yaml), or the folder of a run",
                             "Check the path.")
    folder = path.resolve()
    run = cfg.RunConfig.model_construct(name=folder.name, dir=str(path.parent if path.name == folder.name else folder.parent))
    return Run(cfg.Recipe(run=run, model={"name_or_path": "unknown"}, stages={}, path=spec))


def runs_of(words: list[str]) -> list[Run]:
    """The runs that a command line names. words: recipes, folders of runs, and key=value for the recipes."""
    overrides = [w for w in words if "=" in w and not Path(w).exists()]
    specs = [w for w in words if w not in overrides]
    if not specs:
        raise PosttrainError(f"report {words[0]}", "no recipe and no run", "a recipe (.yaml), or the folder of a run", "Name one first.")
    if overrides and not any(Path(s).suffix in (".yaml", ".yml") for s in specs):
        raise PosttrainError(f"report {overrides[0]}", "a key of a recipe, and no recipe", "recipes with overrides, or folders of runs alone",
                             "A finished run keeps the settings it had.")
    return [run_at(s, overrides) for s in specs]


def one_of(words: list[str]) -> Run:
    """The run that a page which follows one run is of."""
    runs = runs_of(words)
    if len(runs) > 1:
        raise PosttrainError("report --live", f"{len(runs)} runs", "one", "Leave --live out to compare them.")
    return runs[0]


def of_words(words: list[str], beside: list[Path]) -> Path:
    """Write the page that a command line asks for: of one run, or of several side by side. beside: recipes whose reward models join the one run's."""
    runs = runs_of(words)
    if beside and len(runs) > 1:
        raise PosttrainError("report --beside", f"{len(runs)} runs", "one run with the reward models of others beside its own",
                             "Leave --beside out: a page of several runs has all their reward models.")
    return write(runs) if len(runs) > 1 else report.write(runs[0], [run_at(str(b), []) for b in beside])
