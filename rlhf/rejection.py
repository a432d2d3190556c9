"""Rejection sampling (paper section 3.2.3): K answers a prompt, scored by both reward models, the best kept as a demonstration.

Of a list of temperatures the best is found on a few prompts first (Fig. 8). From V4 on the paper lets the answers of all earlier
versions compete, scored by the newest reward models: `pool`. `fresh` leaves out the prompts of earlier rounds.

Everything sampled or scored anew stays on disk with its scores, in chunks/ and pool/. The unit of resume is a chunk with a seed of its
own; several processes take chunks in turns, and the files are those of one (on the same kind of machine and as many threads each).
data.jsonl holds the kept answers as ordinary demonstrations: a later section names "@SECTION", and a recipe of another model
(a smaller one learns from a larger one's answers) names the file, with format: messages.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from posttrain import chat
from posttrain.chunks import derive_seed, in_parts, read_chunk, through_chunks, usable, why_unusable, write_samples
from posttrain.config import ancestors
from posttrain.data import content, naming, pick, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Demonstration, Prompt
from posttrain.generate import Sampling
from posttrain.models import Roles, roles_for, source_of
from posttrain.runs import Section, write_lines
from posttrain.statistics import interval
from posttrain.training import budget_of
from reward.score import Scorer, load_scorer
from rlhf.rollout import Encoded, encode_prompts, merge_scores, rows_at_once, sample_and_score


def run(section: Section) -> None:
    config = section.config
    prompts = _prompts(section)
    demonstrations = {name: _demonstrations(section, name) for name in config.pool if not _is_round(section, name)}
    roles = roles_for(section)
    left = encode_prompts(section, prompts, roles, config.max_prompt_tokens)
    roles.add("policy", source_of(section, config.policy))
    budget = budget_of(section, roles, roles["policy"])
    scorer = load_scorer(section, roles, config.helpfulness, config.safety, config.safety_threshold, budget)
    rows_at_once(section, roles, left)  # decided here, where all prompts are known
    k, temperature, tried, rows = config.samples_per_prompt, config.temperature, None, []
    tries = sorted(temperature) if isinstance(temperature, list) else [temperature]
    section.log.say(f"{len(left)} prompts x {k} samples; temperature {', '.join(f'{t:g}' for t in tries)}; safety gate: {scorer.threshold_note}")

    # 1. the temperature: each is tried on the same prompts, and what was sampled at the best is part of the round
    if isinstance(temperature, list):
        first, left = sweep_prompts(section, left)
        swept = in_parts(sample_chunks(section, roles, scorer, first, tries, sweep=True), k)
        bags = dict(zip(tries, in_parts(swept, len(first)), strict=True))
        temperature, tried = best_temperature(section, bags)
        rows = [r for bag in bags[temperature] for r in bag]
        section.log.say(f"temperature {temperature:g} is used: best of {k} by temperature "
                        + ", ".join(f"{c['temperature']:g}: {c['best_of_n'][-1]['max']:.3f}" for c in tried) + f" ({len(first)} prompts)")

    # 2. the round
    rows += sample_chunks(section, roles, scorer, left, [temperature])
    bags = in_parts(rows, k)

    # 3. the answers of earlier rounds, scored anew
    pooled = [r for name in config.pool for r in pool(section, roles, scorer, name, demonstrations.get(name))]

    # 4. the best of every prompt
    contest = join(bags, pooled)
    kept = select(contest)
    write_outputs(section, bags, contest, kept)
    told = results(section, bags, contest, kept, scorer, temperature)
    told |= {"temperature_sweep": {"prompts": len(first), "curves": tried}} if tried else {}
    told |= {"pool": by_origin(section, rows, pooled, kept)} if config.pool else {}
    section.finish(told)
    section.log.say(f"{len(kept)} of {len(contest)} prompts keep their best answer; mean merged reward of their answers "
                    f"{told['mean_reward_of_kept_prompts']:.3f} -> {told['mean_reward_kept']:.3f}; "
                    f"of {len(rows)} samples {why_unusable(rows)}")
    if config.pool:
        section.log.say("kept answers by origin: " + ", ".join(f"{name} {o['kept']} of {o['answers']}" for name, o in told["pool"].items()))


# -- the prompts -------------------------------------------------------------------------------------------------------------------


def _prompts(section: Section) -> list[Prompt]:
    found = [p for name in section.config.prompts for p in section.run.data_of(name).train]
    return pick(_fresh(section, found) if section.config.fresh else found, section.config.rows, random.Random(section.seed))


def _fresh(section: Section, found: list[Prompt]) -> list[Prompt]:
    """The prompts that no earlier round has sampled: the same conversation to the letter, in any rejection section this one descends from."""
    earlier = earlier_rounds(section)
    used = {_asked(r) for parent in earlier for path in _chunks(parent) for r in _stored(parent, path)}
    left = [p for p in found if content(p) not in used]
    names = ", ".join(s.name for s in earlier) or "no earlier round"
    if not left:
        raise PosttrainError(f"{section.place}.fresh", f"all {len(found)} prompts were sampled by {names}", "prompts that no earlier round has sampled",
                             "Add prompts, give the earlier sections fewer rows, or set fresh: false.")
    section.log.say(f"{len(found) - len(left)} of {len(found)} prompts were sampled by {names} and are left out; {len(left)} are fresh")
    return left


def earlier_rounds(section: Section) -> list[Section]:
    """The rejection sections that this one descends from, through any reference (policy, reward models, pool), by name."""
    found = [section.parent(name) for name in ancestors(section.recipe, section.config)]
    return [s for s in found if s.kind == section.kind]


def sweep_prompts(section: Section, encoded: list[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Some of the round's prompts by lot, on which temperatures are tried, and the others."""
    first = {*pick(range(len(encoded)), section.config.sweep_prompts, random.Random(derive_seed(section.seed, section.name, "sweep")))}
    return [e for i, e in enumerate(encoded) if i in first], [e for i, e in enumerate(encoded) if i not in first]


# -- chunks ------------------------------------------------------------------------------------------------------------------------


def sample_chunks(section: Section, roles: Roles, scorer: Scorer, prompts: list[Encoded], temperatures: list[float], sweep: bool = False) -> list[dict]:
    """K rows a prompt, in the prompts' order, temperature after temperature, by way of chunks/nnnnn.json (a sweep's: sweep-T-nnnnn.json). A
    sweep's temperatures share their random numbers, so that they differ in temperature alone."""
    config, parts = section.config, in_parts(prompts, section.config.chunk)
    chunks = [(t, i) for t in temperatures for i in range(len(parts))]

    def make(n: int, tick) -> list[dict]:
        t, i = chunks[n]
        seed = derive_seed(section.seed, section.name, *(["sweep"] if sweep else []), i)
        scored = sample_and_score(roles, "policy", scorer, parts[i], config.samples_per_prompt, Sampling(config.max_new_tokens, t), seed,
                                  rows_at_once(section, roles, prompts), tick)
        rows = scored.rows(roles.tokenizer)
        for row, p in zip(rows, [p for p in parts[i] for _ in range(config.samples_per_prompt)], strict=True):
            row |= {"is_safety": p.prompt.safety, "spells": chat.spelled_token(roles.tokenizer, row["answer"])}
        return rows

    paths = [section.folder / "chunks" / f"{f'sweep-{t}-' if sweep else ''}{i:05d}.json" for t, i in chunks]
    return through_chunks(section, paths, make, "sampling at each temperature" if sweep else "sampling")


def _chunks(section: Section) -> list[Path]:
    """Everything a rejection section sampled, the sweep of its temperatures too."""
    return sorted((section.folder / "chunks").glob("*.json"))


def _stored(section: Section, path: Path) -> list[dict]:
    """A finished section's chunk."""
    rows = read_chunk(path)
    if rows is None:
        raise PosttrainError(str(path), "damaged", "the chunk its section wrote",
                             f"Delete {section.folder / 'DONE'} and run again: this chunk alone is sampled again, to the same bytes.")
    return rows


# -- the pool ----------------------------------------------------------------------------------------------------------------------


def _is_round(section: Section, name: str) -> bool:
    return name.startswith("@") and section.parent(name).kind == section.kind


def _demonstrations(section: Section, name: str) -> list[Demonstration]:
    """A data set in the pool: the last turn of each demonstration is an answer like those of an earlier round."""
    items = section.run.data_of(name).train
    if any(not isinstance(i, Demonstration) for i in items):
        raise PosttrainError(f"{section.place}.pool", f"'{name}' holds {type(items[0]).__name__.lower()}s", "a rejection section or demonstrations",
                             'Name "@SECTION", or a data set of demonstrations.')
    return items


def pool(section: Section, roles: Roles, scorer: Scorer, name: str, demonstrations: list[Demonstration] | None) -> list[dict]:
    """All usable answers of an earlier round, or demonstrations, with the scores of this section's reward models, by way of
    pool/NAME-nnnnn.json: rows like those sampled, and `from`. Stored ids are used as they are: all sections of a recipe share its tokenizer."""
    label = name.removeprefix("@")
    if demonstrations is None:
        parent = section.parent(name)
        paths = _chunks(parent)
        parts = [lambda path=path: _stored(parent, path) for path in paths]
    else:
        size = section.config.chunk * section.config.samples_per_prompt
        parts = [lambda which=which: list(_as_rows(roles, demonstrations, which)) for which in in_parts(range(len(demonstrations)), size)]

    def make(i: int, tick) -> list[dict]:
        rows = rescore(section, roles, scorer, [r for r in parts[i]() if usable(r)], label)
        tick(sum(len(r["ids"]) for r in rows))
        return rows

    paths = [section.folder / "pool" / f"{label}-{i:05d}.json" for i in range(len(parts))]
    return through_chunks(section, paths, make, f"scoring the answers of {label}")


def _as_rows(roles: Roles, items: list[Demonstration], which: range) -> Iterator[dict]:
    for i in which:
        prompt, answer = items[i].messages[:-1], items[i].messages[-1]["content"]
        with naming(items, i):
            ids = chat.encode_answer(roles.tokenizer, prompt, answer)
        yield {"prompt": prompt, "answer": answer, "ids": ids, "finished": True, "is_safety": items[i].safety, "spells": None}


def rescore(section: Section, roles: Roles, scorer: Scorer, rows: list[dict], label: str) -> list[dict]:
    """The rows under this section's reward models, prompt by prompt."""
    groups = list(_by_prompt(rows).values())
    if not groups:
        return []
    raw = scorer([chat.encode_prompt(roles.tokenizer, g[0]["prompt"]) for g in groups], [[r["ids"] for r in g] for g in groups])
    rows = [r for g in groups for r in g]
    h, s = (torch.tensor([x for g in raw[name] for x in g]) for name in ("helpfulness", "safety"))
    merged, _ = merge_scores(scorer, f"{section.place}.pool, {label}", h, s, torch.tensor([r["is_safety"] for r in rows]))
    return [r | {"helpfulness": h[i].item(), "safety": s[i].item(), "merged": merged[i].item(), "from": label} for i, r in enumerate(rows)]


def _asked(row: dict) -> tuple:
    return content(Prompt(messages=row["prompt"]))


def _by_prompt(rows: list[dict]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault(_asked(r), []).append(r)
    return groups


def join(bags: list[list[dict]], pooled: list[dict]) -> list[list[dict]]:
    """A bag for each prompt with its own answers and the pooled ones; the prompts that only the pool has come last. Own answers stand
    first: of equals they are kept."""
    return list(_by_prompt([r for bag in bags for r in bag] + pooled).values()) if pooled else bags


# -- the choice --------------------------------------------------------------------------------------------------------------------


def select(bags: list[list[dict]]) -> dict[int, dict]:
    """The usable answer with the highest merged reward of every bag; a bag without one keeps none."""
    out = {}
    for i, bag in enumerate(bags):
        if able := [r for r in bag if usable(r)]:
            out[i] = max(able, key=lambda r: r["merged"])
    return out


def write_outputs(section: Section, bags: list[list[dict]], contest: list[list[dict]], kept: dict[int, dict]) -> None:
    """data.jsonl: the kept answers as demonstrations (loss on the sampled reply alone). samples.jsonl: every sample of this round."""
    if not kept:
        raise _nothing(section, [r for bag in contest for r in bag])
    write_lines(section.folder / "data.jsonl", [{"messages": [*r["prompt"], {"role": "assistant", "content": r["answer"]}], "loss": "last",
                                                 "source": r.get("from", section.name), "merged": r["merged"]} for _, r in sorted(kept.items())])
    write_samples(section, [r for bag in bags for r in bag], kept.values())


def _nothing(section: Section, rows: list[dict]) -> PosttrainError:
    return PosttrainError(section.place, f"no sample can be kept: {why_unusable(rows)}", "finished answers",
                          "Raise max_new_tokens, or train the policy to end its answers.")


# -- what was measured -------------------------------------------------------------------------------------------------------------


def expected_rank(values: list[float], n: int, rank: int) -> float:
    """Mean over all subsets of n of the sorted values of their rank-th smallest (1 .. n): exact, by counting subsets."""
    k = len(values)
    return sum(math.comb(i, rank - 1) * math.comb(k - 1 - i, n - rank) / math.comb(k, n) * x for i, x in enumerate(values))


def best_of_n(bags: list[list[dict]], sizes: list[int], floors: list[float] | None = None) -> list[dict]:
    """Expected maximum and median of n of a prompt's K answers (paper Fig. 7), with the maximum's interval over prompts.

    An unusable answer is never kept, so it counts as its prompt's floor, by default its prompt's lowest score."""
    groups = [prompt_key(Prompt(messages=b[0]["prompt"])) for b in bags]
    floors = floors or [min(r["merged"] for r in b) for b in bags]
    values = [sorted(r["merged"] if usable(r) else floor for r in b) for b, floor in zip(bags, floors, strict=True)]
    out = []
    for n in sizes:
        ci = interval([expected_rank(v, n, n) for v in values], groups)
        middles = [(expected_rank(v, n, (n + 1) // 2) + expected_rank(v, n, n // 2 + 1)) / 2 for v in values]
        out.append({"n": n, "max": ci["mean"], "max_low": ci["low"], "max_high": ci["high"], "median": float(np.mean(middles))})
    return out


def sizes_of(k: int) -> list[int]:
    """1, 2, 4 ... up to K, and K."""
    return sorted({1, k, *(2 ** i for i in range(1, 10) if 2 ** i < k)})


def best_temperature(section: Section, bags: dict[float, list[list[dict]]]) -> tuple[float, list[dict]]:
    """The temperature with the highest mean best of K (of equals the lowest), and best_of_n at each (paper Fig. 8). bags: temperature ->
    the same prompts' bags. An unusable answer counts as the lowest score its prompt got at any temperature."""
    every = [[r for b in bags.values() for r in b[i]] for i in range(len(next(iter(bags.values()))))]
    if not any(usable(r) for rows in every for r in rows):
        raise _nothing(section, [r for rows in every for r in rows])
    floors = [min(r["merged"] for r in rows) for rows in every]
    sizes = sizes_of(len(every[0]) // len(bags))
    curves = [{"temperature": t, "usable": float(np.mean([usable(r) for bag in b for r in bag])), "best_of_n": best_of_n(b, sizes, floors)}
              for t, b in bags.items()]
    return max(curves, key=lambda c: c["best_of_n"][-1]["max"])["temperature"], curves


def by_origin(section: Section, rows: list[dict], pooled: list[dict], kept: dict[int, dict]) -> dict[str, dict]:
    """Of this round and of each pooled one: usable answers, their mean merged reward under this section's models, and how many are kept."""
    out = {}
    for name in [section.name, *(n.removeprefix("@") for n in section.config.pool)]:
        answers = [r for r in (rows if name == section.name else pooled) if usable(r) and r.get("from", section.name) == name]
        out[name] = {"answers": len(answers), "mean_reward": _mean(answers) if answers else None,
                     "kept": sum(r.get("from", section.name) == name for r in kept.values())}
    return out


def results(section: Section, bags: list[list[dict]], contest: list[list[dict]], kept: dict[int, dict], scorer: Scorer, temperature: float) -> dict:
    config, rows = section.config, [r for b in bags for r in b]
    k = config.samples_per_prompt
    routed = [r["is_safety"] or r["safety"] < scorer.threshold for r in rows]
    return {"prompts": len(bags), "samples_per_prompt": k, "temperature": temperature, "samples": len(rows), "kept": len(kept),
            "unfinished": sum(not r["finished"] for r in rows), "spelling_a_turn_token": sum(bool(r.get("spells")) for r in rows),
            "share_routed_safety": float(np.mean(routed)),
            "routed_by_tag": float(np.mean([r["is_safety"] for r in rows])),
            "routed_by_threshold": float(np.mean([not r["is_safety"] and r["safety"] < scorer.threshold for r in rows])),
            "safety_threshold": scorer.threshold_note, "standardize_rewards": config.standardize_rewards,
            "best_of_n": best_of_n(bags, sizes_of(k)), "mean_reward_all": _mean(rows),
            "mean_reward_of_kept_prompts": _mean([r for i in kept for r in contest[i]]), "mean_reward_kept": _mean(kept.values()),
            "answer_tokens": float(np.mean([len(r["ids"]) for r in rows]))}


def _mean(rows) -> float:
    return float(np.mean([r["merged"] for r in rows]))
