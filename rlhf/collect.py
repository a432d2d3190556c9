"""Tasks for annotators (paper 3.2.1): to every prompt two answers, of two variants of the model. annotations.py makes pairs of what they choose.

tasks.jsonl and tasks.csv are for the annotators and say nothing of who wrote which answer; that is in key.jsonl. As in rejection sampling,
the unit of resume is a chunk of prompts with a seed of its own, and several processes take chunks in turns.
"""

import csv
import io
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from posttrain import chat
from posttrain.chunks import derive_seed, in_parts, through_chunks, usable
from posttrain.data import pick
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.generate import Completion, Sampling, sample
from posttrain.models import Roles, roles_for, source_of
from posttrain.runs import Section, digest, write_atomic, write_lines
from posttrain.training import budget_of
from reward.score import Scorer, load_scorer
from rlhf.rollout import Encoded, encode_prompts, finite, rows_at_once

DRAWS = 4  # of both answers to a prompt, until they can be compared
TO_FILL_IN = ("choice", "rating", "safety", "edited", "annotator")


@dataclass(frozen=True)
class Variant:
    """A policy at a temperature."""

    name: str
    role: str
    temperature: float


def run(section: Section) -> None:
    config = section.config
    prompts = _prompts(section)
    roles = roles_for(section)
    variants = _variants(section, roles)
    scorer = None
    if config.helpfulness:
        budget = budget_of(section, roles, roles[variants[0].role])
        scorer = load_scorer(section, roles, config.helpfulness, config.safety, "auto", budget)
    encoded = encode_prompts(section, prompts, roles, config.max_prompt_tokens)
    rows_at_once(section, roles, encoded)  # decided here, where all prompts are known
    chunks = in_parts(encoded, config.chunk)
    section.log.say(f"{len(encoded)} prompts in {len(chunks)} chunks; {variants[0].name} against {variants[1].name}")

    paths = [section.folder / "chunks" / f"{i:05d}.json" for i in range(len(chunks))]
    rows = through_chunks(section, paths, lambda i, tick: draw(section, roles, variants, scorer, chunks[i], i, tick), "sampling")
    pairs = in_parts(rows, 2)
    write_outputs(section, pairs, variants)
    told = results(pairs, variants)
    section.finish(told)
    left_out = f" (left out: {in_words(told['left_out'])})" if told["left_out"] else ""
    section.log.say(f"{told['tasks']} tasks{left_out}. For the annotators: {section.folder / 'tasks.jsonl'} or "
                    "tasks.csv beside it, and never key.jsonl; docs/weekly-round.md says how they come back")


def _prompts(section: Section) -> list[Prompt]:
    found = [p for name in section.config.prompts for p in section.run.data_of(name).train]
    return pick(found, section.config.rows, random.Random(derive_seed(section.seed, section.name, "prompts")))


def _variants(section: Section, roles: Roles) -> list[Variant]:
    """The first and the last of each list go together."""
    refs, heats = section.config.policies, section.config.temperatures
    for i, ref in enumerate(dict.fromkeys(refs)):
        roles.add(f"policy_{i}", source_of(section, ref))
    role = {ref: f"policy_{i}" for i, ref in enumerate(dict.fromkeys(refs))}
    return [Variant(f"{ref.removeprefix('@')} at {t:g}", role[ref], t) for ref, t in ((refs[0], heats[0]), (refs[-1], heats[-1]))]


def draw(section: Section, roles: Roles, variants: list[Variant], scorer: Scorer | None, chunk: list[Encoded], number: int, tick) -> list[dict]:
    """Two rows a prompt: an answer of each variant. Both are drawn again, at most DRAWS times in all, where they make no task; then
    `left_out` says why."""
    config, pairs = section.config, {}
    for attempt in range(DRAWS):
        todo = [i for i in range(len(chunk)) if i not in pairs or pairs[i][0]["left_out"]]
        if not todo:
            break
        drawn = [sample(roles, v.role, [chunk[i].ids for i in todo], 1, Sampling(config.max_new_tokens, v.temperature),
                        derive_seed(section.seed, section.name, number, side, attempt), stop=chat.end_of_turn(roles.tokenizer),
                        batch=rows_at_once(section, roles, chunk), tick=tick)
                 for side, v in enumerate(variants)]
        for i, *completions in zip(todo, *drawn, strict=True):
            rows = [_row(section, roles, chunk[i].prompt, c) for (c,) in completions]
            pairs[i] = [row | {"draws": attempt + 1, "left_out": no_task(rows)} for row in rows]
    kept = [i for i in pairs if not pairs[i][0]["left_out"]]
    if scorer and kept:
        for name, scores in scorer([chunk[i].ids for i in kept], [[row["ids"] for row in pairs[i]] for i in kept]).items():
            finite(section.place, f"the {name} scores are", torch.tensor(scores))
            for i, both in zip(kept, scores, strict=True):
                for row, score in zip(pairs[i], both, strict=True):
                    row[name] = score
    return [row for i in range(len(chunk)) for row in pairs[i]]


def _row(section: Section, roles: Roles, prompt: Prompt, c: Completion) -> dict:
    finite(section.place, "the policy's log-probabilities are", torch.tensor(c.logprobs))
    text = chat.decode(roles.tokenizer, c.ids)
    return {"prompt": prompt.messages, "is_safety": prompt.safety, "answer": text, "ids": c.ids, "finished": c.finished,
            "spells": chat.spelled_token(roles.tokenizer, text)}


def no_task(answers: list[dict]) -> str | None:
    """Why two answers make no task: one that no reward model could be trained on, or two of one text."""
    if not all(a["answer"] for a in answers):
        return "empty"
    if not all(map(usable, answers)):
        return "spelling a turn token" if all(a["finished"] for a in answers) else "cut off"
    return "identical" if answers[0]["answer"] == answers[1]["answer"] else None


def why_left_out(pairs: list[list[dict]]) -> dict[str, int]:
    return dict(Counter(p[0]["left_out"] for p in pairs if p[0]["left_out"]))


def in_words(reasons: dict[str, int]) -> str:
    """'3 cut off, 1 identical'."""
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items())


def write_outputs(section: Section, pairs: list[list[dict]], variants: list[Variant]) -> None:
    """tasks.jsonl, the same as tasks.csv with empty columns for a spreadsheet, and key.jsonl. An id is a hash of all that its task
    shows, so that annotations of other answers cannot be taken for its own."""
    tasks, key = [], []
    for i, pair in enumerate(pairs):
        if pair[0]["left_out"]:
            continue
        swapped = bool(derive_seed(section.seed, section.name, "side", i) & 1)
        a, b = (row | {"variant": v.name, "tokens": len(row["ids"])} for row, v in zip(pair, variants, strict=True))
        if swapped:
            a, b = b, a
        task = {"prompt": a["prompt"], "answer_a": a["answer"], "answer_b": b["answer"], "is_safety": a["is_safety"]}
        name = "t" + digest([section.name, i, task])[:15]  # a letter first: a spreadsheet takes 12e456 for a number
        tasks.append({"id": name} | task)
        hidden = {side: {k: row[k] for k in ("variant", "tokens", "helpfulness", "safety") if k in row} for side, row in (("a", a), ("b", b))}
        key.append({"id": name, "swapped": swapped, **hidden})
    if not tasks:
        raise PosttrainError(section.place, f"no task from {len(pairs)} prompts ({in_words(why_left_out(pairs))})",
                             "two different finished answers", "Raise max_new_tokens or a temperature, or train the policies to end their answers.")
    table = io.StringIO()
    writer = csv.DictWriter(table, ["id", "prompt", "answer_a", "answer_b", "is_safety", *TO_FILL_IN], lineterminator="\n")
    writer.writeheader()
    for t in tasks:
        said = t["prompt"][0]["content"] if len(t["prompt"]) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in t["prompt"])
        writer.writerow({"id": t["id"], "prompt": _cell(said), "answer_a": _cell(t["answer_a"]), "answer_b": _cell(t["answer_b"]),
                         "is_safety": str(t["is_safety"]).lower()})
    write_atomic(section.folder / "tasks.csv", table.getvalue())
    for name, lines in (("key", key), ("tasks", tasks)):
        write_lines(section.folder / f"{name}.jsonl", lines)


def _cell(text: str) -> str:
    """Text that a spreadsheet will not run as a formula; what comes back in these columns is not read."""
    return " " + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def results(pairs: list[list[dict]], variants: list[Variant]) -> dict:
    kept = [p for p in pairs if not p[0]["left_out"]]
    by_variant = {}
    for side, v in enumerate(variants):
        rows = [p[side] for p in kept]
        by_variant[v.name] = {"tokens": float(np.mean([len(r["ids"]) for r in rows]))} | {
            k: float(np.mean([r[k] for r in rows])) for k in ("helpfulness", "safety") if k in rows[0]}
    return {"prompts": len(pairs), "tasks": len(kept), "safety_tasks": sum(p[0]["is_safety"] for p in kept),
            "left_out": why_left_out(pairs), "share_left_out": 1 - len(kept) / len(pairs),
            "drawn_again": sum(p[0]["draws"] > 1 for p in pairs), "variants": by_variant}
