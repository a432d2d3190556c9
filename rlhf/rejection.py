"""Rejection sampling (paper section 3.2.3): K answers a prompt, scored by both reward models, the best kept as a demonstration.

Everything sampled stays on disk with its scores. The unit of resume is a chunk of prompts with a seed of its own.
"""

import json
import math
import random

import numpy as np

from posttrain import chat
from posttrain.data import prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.generate import Sampling
from posttrain.log import append_line
from posttrain.models import roles_for, source_of
from posttrain.runs import Section, digest, write_atomic
from posttrain.statistics import interval
from posttrain.training import choose_budget
from reward.score import load_scorer
from rlhf.rollout import derive_seed, encode_prompts, sample_and_score


def run(section: Section) -> None:
    config = section.config
    prompts = _prompts(section)
    roles = roles_for(section)
    roles.add("policy", source_of(section, config.policy))
    budget = config.micro_batch_tokens or section.decide("micro_batch_tokens", lambda: choose_budget(roles, roles["policy"]))
    scorer = load_scorer(section, roles, config.helpfulness, config.safety, config.safety_threshold, budget)
    encoded = encode_prompts(section, prompts, roles, config.max_prompt_tokens)
    chunks = [encoded[i:i + config.chunk] for i in range(0, len(encoded), config.chunk)]
    section.log.say(f"{len(encoded)} prompts x {config.samples_per_prompt} samples in {len(chunks)} chunks; temperature {config.temperature:g}; "
                    f"safety gate: {scorer.threshold_note}")

    folder = section.folder / "chunks"
    folder.mkdir(exist_ok=True)
    sampling = Sampling(config.max_new_tokens, config.temperature)
    have = [read_chunk(folder / f"{i:05d}.json") for i in range(len(chunks))]
    with section.log.progress(len(chunks), "sampling", "chunk", sum(h is not None for h in have)) as ticker:
        for i, chunk in enumerate(chunks):
            if have[i] is None:
                scored = sample_and_score(roles, "policy", scorer, chunk, config.samples_per_prompt, sampling,
                                          derive_seed(section.seed, section.name, i), config.batch, config.standardize_rewards)
                have[i] = scored.rows(roles.tokenizer)
                for row, p in zip(have[i], [p for p in chunk for _ in range(config.samples_per_prompt)], strict=True):
                    row |= {"is_safety": p.prompt.safety, "spells": chat.spelled_token(roles.tokenizer, row["answer"])}
                write_chunk(folder / f"{i:05d}.json", have[i])
                ticker.advance(1, note=f"{sum(len(r['ids']) for r in have[i])} tokens")
    rows = [r for chunk in have for r in chunk]
    bags = [rows[i:i + config.samples_per_prompt] for i in range(0, len(rows), config.samples_per_prompt)]
    kept = select(bags)
    write_outputs(section, bags, kept)
    told = results(config, bags, kept, scorer)
    section.finish(told)
    section.log.say(f"{len(kept)} of {len(bags)} prompts keep their best answer; mean merged reward of their answers "
                    f"{told['mean_reward_of_kept_prompts']:.3f} -> {told['mean_reward_kept']:.3f}; "
                    f"of {len(rows)} samples {why_unusable(rows)}")


def _prompts(section: Section) -> list[Prompt]:
    found = [p for name in section.config.prompts for p in section.run.data_of(name).train]
    if section.config.rows and section.config.rows < len(found):
        pick = sorted(random.Random(section.seed).sample(range(len(found)), section.config.rows))
        found = [found[i] for i in pick]
    return found


def write_chunk(path, rows: list[dict]) -> None:
    write_atomic(path, json.dumps({"sha256": digest(rows), "rows": rows}, ensure_ascii=False))


def read_chunk(path) -> list[dict] | None:
    """A chunk's rows, or None when it is absent or damaged (then it is sampled again, to the same bytes)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value["rows"] if digest(value["rows"]) == value["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def usable(row: dict) -> bool:
    """Whether a sample can become a demonstration: finished, not empty, and not spelling a turn token, which no stage reads as text."""
    return bool(row["finished"] and row["answer"] and not row.get("spells"))


def why_unusable(rows: list[dict]) -> str:
    """'12 were cut off, 1 empty, 0 spelled a turn token'."""
    finished = [r for r in rows if r["finished"]]
    return (f"{len(rows) - len(finished)} were cut off, {sum(not r['answer'] for r in finished)} empty, "
            f"{sum(bool(r.get('spells')) for r in finished)} spelled a turn token")


def select(bags: list[list[dict]]) -> dict[int, dict]:
    """The usable answer with the highest merged reward of every bag; a bag without one keeps none."""
    out = {}
    for i, bag in enumerate(bags):
        if able := [r for r in bag if usable(r)]:
            out[i] = max(able, key=lambda r: r["merged"])
    return out


def write_outputs(section: Section, bags: list[list[dict]], kept: dict[int, dict]) -> None:
    """data.jsonl: the kept answers as demonstrations (loss on the sampled reply alone). samples.jsonl: every sample."""
    if not kept:
        raise PosttrainError(section.place, f"no sample can be kept: {why_unusable([r for bag in bags for r in bag])}", "finished answers",
                             "Raise max_new_tokens, or train the policy to end its answers.")
    lines = [json.dumps({"messages": [*r["prompt"], {"role": "assistant", "content": r["answer"]}], "loss": "last", "source": section.name,
                         "merged": r["merged"]}, ensure_ascii=False) for _, r in sorted(kept.items())]
    write_atomic(section.folder / "data.jsonl", "\n".join(lines) + "\n")
    (section.folder / "samples.jsonl").unlink(missing_ok=True)
    for i, bag in enumerate(bags):
        for r in bag:
            append_line(section.folder / "samples.jsonl", {"step": 0, "kept": kept.get(i) is r, **{k: v for k, v in r.items() if k != "ids"}})


def expected_rank(values: list[float], n: int, rank: int) -> float:
    """Mean over all subsets of n of the sorted values of their rank-th smallest (1 .. n): exact, by counting subsets."""
    k = len(values)
    return sum(math.comb(i, rank - 1) * math.comb(k - 1 - i, n - rank) / math.comb(k, n) * x for i, x in enumerate(values))


def best_of_n(bags: list[list[dict]], sizes: list[int]) -> list[dict]:
    """Expected maximum and median of n of a prompt's K answers (paper Fig. 7), with the maximum's interval over prompts.

    An unusable answer is never kept, so it counts as its prompt's lowest score."""
    groups = [prompt_key(Prompt(messages=b[0]["prompt"])) for b in bags]
    values = [sorted(r["merged"] if usable(r) else min(x["merged"] for x in b) for r in b) for b in bags]
    out = []
    for n in sizes:
        ci = interval([expected_rank(v, n, n) for v in values], groups)
        middles = [(expected_rank(v, n, (n + 1) // 2) + expected_rank(v, n, n // 2 + 1)) / 2 for v in values]
        out.append({"n": n, "max": ci["mean"], "max_low": ci["low"], "max_high": ci["high"], "median": float(np.mean(middles))})
    return out


def results(config, bags, kept, scorer) -> dict:
    rows = [r for b in bags for r in b]
    k = config.samples_per_prompt
    sizes = sorted({1, k, *(2 ** i for i in range(1, 10) if 2 ** i < k)})
    routed = [r["is_safety"] or r["safety"] < scorer.threshold for r in rows]
    return {"prompts": len(bags), "samples_per_prompt": k, "temperature": config.temperature, "samples": len(rows), "kept": len(kept),
            "unfinished": sum(not r["finished"] for r in rows), "spelling_a_turn_token": sum(bool(r.get("spells")) for r in rows),
            "share_routed_safety": float(np.mean(routed)),
            "routed_by_tag": float(np.mean([r["is_safety"] for r in rows])),
            "routed_by_threshold": float(np.mean([not r["is_safety"] and r["safety"] < scorer.threshold for r in rows])),
            "safety_threshold": scorer.threshold_note, "standardize_rewards": config.standardize_rewards,
            "best_of_n": best_of_n(bags, sizes), "mean_reward_all": _mean(rows),
            "mean_reward_of_kept_prompts": _mean([r for i in kept for r in bags[i]]), "mean_reward_kept": _mean(kept.values()),
            "answer_tokens": float(np.mean([len(r["ids"]) for r in rows]))}


def _mean(rows) -> float:
    return float(np.mean([r["merged"] for r in rows]))
