"""How alike a model's answers to one prompt are at each temperature: Self-BLEU, by kind of prompt, for several models (paper 5.1, Fig. 21).

RLHF was seen to rescale temperature by context: answers to factual prompts stay alike as the temperature rises, the more so with each version,
while those to creative prompts grow apart as before. A column of the data says which kind a prompt is.

Self-BLEU of a prompt's answers is the mean of each one's BLEU against all the others (Zhu et al. 2018): 1 where all are the same. It rises with
their number, so compare figures of one `samples_per_prompt`. Every answer stays on disk, in chunks/ and samples.jsonl, a row for each prompt,
temperature and model. A prompt draws with the same random numbers everywhere. Intervals are by prompt.
"""

import math
import re
from collections import Counter

import numpy as np

from posttrain import chat
from posttrain.chunks import derive_seed, in_parts, through_chunks
from posttrain.data import prompt_key
from posttrain.generate import Sampling, rows_at_once, sample
from posttrain.models import Roles, add_models, roles_for
from posttrain.runs import Section, write_lines
from posttrain.statistics import interval
from posttrain.training import budget_of
from reward.score import Scorer, load_scorer
from safety.bold import Asked, encode
from safety.distill import MERGE_THRESHOLD

ORDER, FLOOR = 4, 0.1  # n-grams up to four; matches that stand for none (nltk's smoothing method 1)
WORDS = re.compile(r"\w+|[^\w\s]")
MEASURES = ("self_bleu", "helpfulness", "safety")


def run(section: Section) -> None:
    config = section.config
    prompts, temperatures = section.evaluated("prompts", "prompts"), sorted({*config.temperature})
    roles = roles_for(section)
    asked = encode(section, roles, prompts, "chat")
    models = add_models(section, roles)
    budget = budget_of(section, roles, roles["model_0"])
    scorer = load_scorer(section, roles, config.helpfulness, config.safety, MERGE_THRESHOLD, budget) if config.helpfulness else None
    rows_at_once(section, roles, max(len(a.ids) for a in asked))  # decided here, where all prompts are known
    kinds = Counter(kind_of(config, a) for a in asked)
    section.log.say(f"{len(models)} models x {len(asked)} prompts ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}) x {len(temperatures)} "
                    f"temperatures x {config.samples_per_prompt} answers; {len(prompts) - len(asked)} prompts too long")

    # 1. the answers and how alike they are
    rows = {name: answer(section, roles, role, name, asked, temperatures, scorer) for name, role in models.items()}
    write_lines(section.folder / "samples.jsonl", [{"model": name, **row} for name, mine in rows.items() for row in mine])

    # 2. curves and their slopes
    told = {"prompts": dict(kinds), "too_long": len(prompts) - len(asked), "temperatures": temperatures, **results(config, rows)}
    section.finish(told)
    tell(section, told)


def kind_of(config, a: Asked) -> str:
    return str(a.prompt.meta.get(config.column, "unnamed")) or "unnamed"


# -- answers -----------------------------------------------------------------------------------------------------------------------------


def answer(section: Section, roles: Roles, role: str, name: str, asked: list[Asked], temperatures: list[float], scorer: Scorer | None) -> list[dict]:
    """One model's rows, by temperature and prompt, by way of chunks/NAME-TEMPERATURE-nnnnn.json."""
    config, parts = section.config, in_parts(asked, section.config.chunk)
    work = [(t, i) for t in temperatures for i in range(len(parts))]

    def make(n: int, tick) -> list[dict]:
        temperature, i = work[n]
        drawn = sample(roles, role, [a.ids for a in parts[i]], config.samples_per_prompt, Sampling(config.max_new_tokens, temperature, config.top_p),
                       derive_seed(section.seed, "diversity", i), stop=chat.end_of_turn(roles.tokenizer),
                       batch=rows_at_once(section, roles, max(len(a.ids) for a in asked)), tick=tick)
        scores = scorer([a.ids for a in parts[i]], [[c.ids for c in group] for group in drawn]) if scorer else {}
        out = []
        for j, (a, group) in enumerate(zip(parts[i], drawn, strict=True)):
            texts = [chat.decode(roles.tokenizer, c.ids) for c in group]
            out.append({"number": a.number, "key": prompt_key(a.prompt), "kind": kind_of(config, a), "temperature": temperature,
                        "prompt": a.prompt.messages, "answers": texts, "finished": [c.finished for c in group],
                        "self_bleu": self_bleu([WORDS.findall(t) for t in texts]), **{measure: told[j] for measure, told in scores.items()}})
        return out

    paths = [section.folder / "chunks" / f"{name}-{t:g}-{i:05d}.json" for t, i in work]
    return through_chunks(section, paths, make, f"answers of {name}")


# -- Self-BLEU ---------------------------------------------------------------------------------------------------------------------------


def self_bleu(texts: list[list[str]]) -> float | None:
    """Mean over texts, given as words, of BLEU against all the others. Empty texts are left out; None with fewer than two others.

    BLEU of one text (Papineni et al. 2002): the geometric mean of the shares of its n-grams that another has as often, times exp(1 - r / c) where
    it is shorter (c words) than the other of nearest length (r; of two, the shorter). Only orders that it has n-grams of count, so that equal short
    texts score 1. A share of none counts as 0.1 matches, but a text that shares no word at all scores 0.
    """
    texts = [t for t in texts if t]
    if len(texts) < 2:
        return None
    counts = [[Counter(zip(*(t[k:] for k in range(n)), strict=False)) for n in range(1, ORDER + 1)] for t in texts]
    most: list[dict] = [{} for _ in range(ORDER)]  # n-gram -> its two highest counts in a text
    for own in counts:
        for n, grams in enumerate(own):
            for gram, count in grams.items():
                most[n][gram] = sorted((count, *most[n].get(gram, (0, 0))))[:0:-1]
    lengths = [len(t) for t in texts]
    return sum(_bleu(own, most, lengths[i], lengths[:i] + lengths[i + 1:]) for i, own in enumerate(counts)) / len(texts)


def _bleu(own: list[Counter], most: list[dict], length: int, others: list[int]) -> float:
    """Of one text against the others. Among those an n-gram's highest count is the second highest of all where the text's own is the highest."""
    logs = []
    for n, grams in enumerate(own[:length]):
        matches = sum(min(count, most[n][gram][1] if most[n][gram][0] == count else most[n][gram][0]) for gram, count in grams.items())
        if n == 0 and not matches:
            return 0.0
        logs.append(math.log((matches or FLOOR) / grams.total()))
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / length))


# -- curves and slopes -------------------------------------------------------------------------------------------------------------------


def slopes(rows: list[dict]) -> dict[int, float]:
    """By prompt, the least-squares slope of Self-BLEU over the temperature (per degree); of prompts that have it at two temperatures or more."""
    points: dict[int, list[tuple[float, float]]] = {}
    for r in rows:
        if r["self_bleu"] is not None:
            points.setdefault(r["number"], []).append((r["temperature"], r["self_bleu"]))
    return {n: float(np.polyfit(*zip(*found, strict=True), 1)[0]) for n, found in points.items() if len(found) > 1}


def curve(rows: list[dict], temperatures: list[float]) -> list[dict]:
    """At each temperature, the means over prompts with intervals. Without Self-BLEU: prompts with fewer than two answers that hold a word."""
    out = []
    for t in temperatures:
        at = [r for r in rows if r["temperature"] == t]
        point = {"temperature": t, "finished": float(np.mean([f for r in at for f in r["finished"]])),
                 "without": sum(r["self_bleu"] is None for r in at)}
        for m in MEASURES:
            found = [(np.mean(r[m]), r["key"]) for r in at if r.get(m) is not None]
            if found:
                point[m] = interval(*zip(*found, strict=True))
        out.append(point)
    return out


def results(config, rows: dict[str, list[dict]]) -> dict:
    """models: by kind, a curve and its slope; paired: how much flatter `after` falls than `before` on the same prompts; the checks."""
    temperatures, models, paired = sorted({*config.temperature}), {}, []
    key, kind = ({r["number"]: r[column] for r in next(iter(rows.values()))} for column in ("key", "kind"))
    kinds, slope = list(dict.fromkeys(kind.values())), {name: slopes(mine) for name, mine in rows.items()}

    def mean(values: dict[int, float], k: str) -> dict:
        own = [n for n in values if kind[n] == k]
        return interval([values[n] for n in own], [key[n] for n in own])

    for name, mine in rows.items():
        models[name] = {k: {"curve": curve([r for r in mine if r["kind"] == k], temperatures), "slope": mean(slope[name], k)} for k in kinds}
    for after, before in config.compare:
        gaps = {n: slope[after][n] - slope[before][n] for n in slope[after] if n in slope[before]}
        paired += [{"a": after, "b": before, "kind": k, "slope": mean(gaps, k)} for k in kinds]
    return {"samples_per_prompt": config.samples_per_prompt, "top_p": config.top_p, "max_new_tokens": config.max_new_tokens, "models": models,
            "paired": paired, "checks": [_check(p) for p in paired if p["kind"] == "factual"]}


def _check(p: dict) -> dict:
    gap = p["slope"]
    sure = gap["low"] is not None
    return {"name": f"{p['a']} over {p['b']}: Self-BLEU of factual prompts falls less with the temperature (Fig. 21)", "met": sure and gap["low"] > 0,
            "detail": f"slope {gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if sure else "fewer than two factual prompts with a slope"}


def tell(section: Section, told: dict) -> None:
    for name, kinds in told["models"].items():
        for kind, found in kinds.items():
            ends = [f"{p['self_bleu']['mean']:.2f} at {p['temperature']:g}" for p in (found["curve"][0], found["curve"][-1]) if "self_bleu" in p]
            section.log.say(f"{name:>12}: {kind}: Self-BLEU {', '.join(dict.fromkeys(ends)) or 'of no prompt'}")
    for check in told["checks"]:
        section.log.say(f"{'met' if check['met'] else 'NOT MET'}: {check['name']} ({check['detail']})")
