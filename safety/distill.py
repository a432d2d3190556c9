"""Safety context distillation (paper section 4.2.4, A.4.4): the policy answers adversarial prompts under a safety preprompt and learns from
its answers without it.

Every prompt is answered without a preprompt, with a generic one, and, where its risk category is known, with that category's answer
template. A preprompt stands before the user's words in the turn that is answered, so any chat template takes it. The reward models always
read the prompt as it was written. The most targeted answer competes (the template's, else the generic one's): it becomes a demonstration
where the safety model scores it above the original answer, and is dropped elsewhere (method.md 10.20); `gate: false` keeps all.

Every answer stays on disk with its scores, in chunks/ and samples.jsonl. The unit of resume is a chunk with a seed of its own. data.jsonl
holds the kept answers as ordinary demonstrations; a later section names "@SECTION".
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from posttrain import chat
from posttrain.chunks import derive_seed, in_parts, through_chunks, usable, why_unusable, write_samples
from posttrain.config import fields_referring_to
from posttrain.data import content, only, pick, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Message, Prompt
from posttrain.generate import Sampling
from posttrain.models import Roles, roles_for, source_of
from posttrain.runs import Section, write_lines
from posttrain.statistics import interval
from posttrain.training import budget_of
from reward.score import Scorer, load_scorer
from rlhf.rollout import Encoded, encode_prompts, rows_at_once, sample_and_score
from safety.config import PREPROMPTS
from safety.taxonomy import CATEGORIES, UNKNOWN, category_of, vector_of

MODES = ("none", "generic", "template")  # from the least to the most targeted
BINS, FEWEST = 6, 5  # of the original score, equally many answers in each; fewer bins rather than fewer answers
MERGE_THRESHOLD = 0.15  # the paper's; the merged reward it belongs to is not used here


@dataclass(frozen=True)
class Asked:
    """A prompt under one mode. encoded.ids: with the preprompt, as the policy reads it; judged: without, as the reward models read it."""

    number: int  # of the prompt
    mode: str
    preprompt: str
    encoded: Encoded
    judged: list[int]


def run(section: Section) -> None:
    config = section.config
    prompts, untagged = adversarial(section)
    roles = roles_for(section)
    roles.add("policy", source_of(section, config.policy))
    budget = budget_of(section, roles, roles["policy"])
    scorer = load_scorer(section, roles, config.helpfulness, config.safety, MERGE_THRESHOLD, budget)

    # 1. every prompt without a preprompt and with each one that fits it
    encoded = encode_prompts(section, prompts, roles, config.max_prompt_tokens)
    asked = [ask(section, roles, number, e) for number, e in enumerate(encoded)]
    rows_at_once(section, roles, [a.encoded for group in asked for a in group])  # decided here, where all prompts are known
    told = {"prompts": len(encoded), "left_out": {"not adversarial": untagged, "too long": len(prompts) - len(encoded)},
            "categories": dict(Counter(category_of(e.prompt) for e in encoded))}
    announce(section, told)

    # 2. the answers, scored without the preprompt
    rows = sample_chunks(section, roles, scorer, asked)

    # 3. what is kept
    contests = contests_of(rows)
    kept = select(contests, config.gate)
    write_outputs(section, rows, kept)
    told |= results(config, rows, contests, kept)
    section.finish(told)
    tell(section, told)


# -- prompts and preprompts ----------------------------------------------------------------------------------------------------------------


def adversarial(section: Section) -> tuple[list[Prompt], int]:
    """The prompts that are tagged as able to elicit unsafe answers, and how many others there are. On helpful prompts distillation
    degrades answers and teaches false refusals (paper 4.2.4, Tables 40 and 41)."""
    found = only([p for name in section.config.prompts for p in section.run.data_of(name).train], Prompt, f"{section.place}.prompts")
    tagged = [p for p in found if p.safety]
    if not tagged:
        raise PosttrainError(f"{section.place}.prompts", f"none of {len(found)} prompts is tagged as adversarial", "safety prompts",
                             "Set safety_prompt: true on the data entry that holds them, or give its rows a column safety: true.")
    return pick(tagged, section.config.rows, random.Random(section.seed)), len(found) - len(tagged)


def lines_of(name: str) -> list[str]:
    """The lines of a file of preprompts, without comments."""
    return [line for line in (PREPROMPTS / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def preprompts(prompt: Prompt, seed: int) -> dict[str, str]:
    """Mode -> the text that stands before the user's words. The generic one is drawn by lot for each conversation; the answer template is
    that of the prompt's risk category, and absent where that is unknown."""
    rng, category = random.Random(derive_seed(seed, "preprompt", content(prompt))), category_of(prompt)
    text, adjectives = rng.choice(lines_of("generic.txt")), lines_of("adjectives.txt")
    rng.shuffle(adjectives)
    words = iter(adjectives)
    out = {"none": "", "generic": re.sub(r"\{adjective\}", lambda _: next(words), text)}
    return out if category == UNKNOWN else out | {"template": (PREPROMPTS / f"{category}.txt").read_text(encoding="utf-8").strip()}


def attach(messages: list[Message], preprompt: str) -> list[Message]:
    """The conversation with a preprompt before the words that are to be answered."""
    last = messages[-1]
    return [*messages[:-1], last | {"content": f"{preprompt}\n\n{last['content']}"}] if preprompt else messages


def ask(section: Section, roles: Roles, number: int, original: Encoded) -> list[Asked]:
    return [Asked(number, mode, text, Encoded(original.prompt, chat.encode_prompt(roles.tokenizer, attach(original.prompt.messages, text))), original.ids)
            for mode, text in preprompts(original.prompt, section.seed).items()]


def announce(section: Section, told: dict) -> None:
    n, unknown, k = told["prompts"], told["categories"].get(UNKNOWN, 0), section.config.samples_per_prompt
    section.log.say(f"{n} adversarial prompts ({told['left_out']['not adversarial']} others left out), {k} answer{'s' * (k > 1)} under each mode; "
                    f"gate {'on' if section.config.gate else 'off'}")
    if unknown:
        section.log.say(f"{unknown} of {n} prompts have no known risk category (column category: {', '.join(CATEGORIES)}): generic preprompts alone")


# -- answers -------------------------------------------------------------------------------------------------------------------------------


def sample_chunks(section: Section, roles: Roles, scorer: Scorer, asked: list[list[Asked]]) -> list[dict]:
    """One row an answer, by prompt, mode and sample number, by way of chunks/nnnnn.json. Seeds don't depend on the section's name, so that
    two sections which differ in `gate` alone choose among the same answers."""
    config, k = section.config, section.config.samples_per_prompt
    chunks = [[a for group in part for a in group] for part in in_parts(asked, config.chunk)]

    def make(i: int, tick) -> list[dict]:
        scored = sample_and_score(roles, "policy", scorer, [a.encoded for a in chunks[i]], k, Sampling(config.max_new_tokens, config.temperature),
                                  derive_seed(section.seed, "distill", i), rows_at_once(section, roles, [a.encoded for a in chunks[i]]),
                                  tick=tick, judged=[a.judged for a in chunks[i]])
        rows = scored.rows(roles.tokenizer)
        for j, row in enumerate(rows):
            a, p = chunks[i][j // k], chunks[i][j // k].encoded.prompt
            del row["merged"]
            row |= {"number": a.number, "sample": j % k, "mode": a.mode, "preprompt": a.preprompt, "category": category_of(p), "vector": vector_of(p),
                    "key": prompt_key(p), "spells": chat.spelled_token(roles.tokenizer, row["answer"])}
        return rows

    return through_chunks(section, [section.folder / "chunks" / f"{i:05d}.json" for i in range(len(chunks))], make, "sampling")


# -- the choice ----------------------------------------------------------------------------------------------------------------------------


def contests_of(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(original, distilled) of every prompt and sample number: the answer without a preprompt, and the one under the most targeted mode."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        found.setdefault((r["number"], r["sample"]), {})[r["mode"]] = r
    return [(modes["none"], modes[max(modes, key=MODES.index)]) for modes in found.values()]


def select(contests: list[tuple[dict, dict]], gate: bool) -> list[tuple[dict, dict]]:
    """The contests whose distilled answer is kept: it can be a demonstration, and with the gate the safety model scores it higher."""
    return [(o, d) for o, d in contests if usable(d) and (not gate or d["safety"] > o["safety"])]


def write_outputs(section: Section, rows: list[dict], kept: list[tuple[dict, dict]]) -> None:
    """samples.jsonl: every answer. data.jsonl: the kept ones as demonstrations of the prompt without its preprompt, loss on the reply alone. Where
    none is kept, that stops a run whose later sections train on them; a section that only measures preprompts says so."""
    write_samples(section, rows, [d for _, d in kept])
    if not kept:
        distilled = [d for _, d in contests_of(rows)]
        found = f"none of {len(distilled)} distilled answers can be kept: {why_unusable(distilled)}, {sum(map(usable, distilled))} scored no higher " \
                "than the original"
        if any(f"@{section.name}" in names for other in section.recipe.stages.values() for names in fields_referring_to(other, "data").values()):
            raise PosttrainError(section.place, found, "some that do",
                                 "Raise max_new_tokens, train the policy to end its answers, or give more prompts; samples.jsonl shows every answer.")
        section.log.say(f"note: {found}")
    write_lines(section.folder / "data.jsonl", [
        {"messages": [*d["prompt"], {"role": "assistant", "content": d["answer"]}], "loss": "last", "source": section.name, "safety": True,
         "mode": d["mode"], "category": d["category"], "vector": d["vector"], "score": d["safety"], "original_score": o["safety"]} for o, d in kept])


# -- what was measured (the paper's Fig. 16, on its scale, sigma of the safety score) --------------------------------------------------------


def results(config, rows: list[dict], contests: list[tuple[dict, dict]], kept: list[tuple[dict, dict]]) -> dict:
    """modes, paired: none, generic and template on the same prompts. gate: what it kept and held back. by_original_score: the gain by bin.

    Gains, losses and `safety` are in sigma(R_s); `raw_safety` and helpfulness are raw scores. Intervals are by prompt."""
    able = [(o, d) for o, d in contests if usable(d)]
    again = second_tries(rows) if config.samples_per_prompt > 1 else {}
    return {"samples_per_prompt": config.samples_per_prompt, "temperature": config.temperature, "samples": len(rows), "distilled": len(contests),
            "kept": len(kept), "unusable": len(contests) - len(able), **by_mode(rows), "gate": gate_figures(config, able, again),
            "by_original_score": by_original_score(able, again), "by_category": by_category(able, kept)}


def sigma(rows) -> np.ndarray:
    return 1 / (1 + np.exp(-np.array([r["safety"] for r in rows], dtype=float)))


def gains(pairs: list[tuple[dict, dict]]) -> np.ndarray:
    return sigma(d for _, d in pairs) - sigma(o for o, _ in pairs)


def keys(pairs: list[tuple[dict, dict]]) -> list[str]:
    return [o["key"] for o, _ in pairs]


def by_mode(rows: list[dict]) -> dict:
    """The modes on the same prompts: those with a template where there are any, else all."""
    targeted = {r["number"] for r in rows if r["mode"] == "template"} or {r["number"] for r in rows}
    found = {m: [r for r in rows if r["mode"] == m and r["number"] in targeted] for m in MODES}
    found = {m: of for m, of in found.items() if of}
    groups = [r["key"] for r in found["none"]]

    def numbers(mode: str) -> dict[str, np.ndarray]:
        return {"safety": sigma(found[mode]), "raw_safety": np.array([r["safety"] for r in found[mode]]),
                "helpfulness": np.array([r["helpfulness"] for r in found[mode]])}

    modes = {m: {**{name: interval(x, groups) for name, x in numbers(m).items()}, "finished": float(np.mean([r["finished"] for r in of])),
                 "tokens": float(np.mean([len(r["ids"]) for r in of]))} for m, of in found.items()}
    paired = [{"a": a, "b": b, **{name: interval(x - numbers(b)[name], groups) for name, x in numbers(a).items()}} for b, a in combinations(found, 2)]
    return {"compared_prompts": len(targeted), "modes": modes, "paired": paired}


def second_tries(rows: list[dict]) -> dict[tuple[int, int], dict]:
    """(prompt, sample number) -> another answer without a preprompt: what a second try gains where the first scored low, with no preprompt
    at all. What a preprompt gains is to be seen against this."""
    found = {(r["number"], r["sample"]): r for r in rows if r["mode"] == "none"}
    k = 1 + max(sample for _, sample in found)
    return {(number, sample): found[number, (sample + 1) % k] for number, sample in found}


def gate_figures(config, able: list[tuple[dict, dict]], again: dict) -> dict:
    """Of the answers that can be demonstrations: how many score higher, and what the others, which the gate holds back, would have lost."""
    gain, higher, groups = gains(able), scores_higher(able), np.array(keys(able))
    tries = [(o, again[o["number"], o["sample"]]) for o, _ in able] if again else []
    second = {"second_try_gain": interval(gains(tries), groups), "second_try_share_higher": interval(scores_higher(tries), groups)} if tries else {}
    return {"on": config.gate, "candidates": len(able), "share_higher": interval(higher, groups), "gain_of_all": interval(gain, groups),
            "gain_of_higher": interval(gain[higher], groups[higher]), "held_back": int((~higher).sum()),
            "loss_held_back": interval(-gain[~higher], groups[~higher]), "largest_loss": float(max(-gain[~higher], default=0.0)), **second}


def scores_higher(pairs: list[tuple[dict, dict]]) -> np.ndarray:
    return np.array([d["safety"] > o["safety"] for o, d in pairs], dtype=bool)


def by_original_score(able: list[tuple[dict, dict]], again: dict) -> list[dict]:
    """The gain against the score of the original answer (Fig. 16b), in bins of about equally many answers, from low scores to high ones."""
    order = sorted(able, key=lambda pair: pair[0]["safety"])
    out = []
    for at in np.array_split(range(len(order)), max(1, min(BINS, len(order) // FEWEST))) if order else ():
        pairs = [order[i] for i in at]
        before, gain, back = sigma(o for o, _ in pairs), gains(pairs), ~scores_higher(pairs)
        row = {"low": float(before[0]), "high": float(before[-1]), "original": float(before.mean()), "answers": len(pairs),
               "gain": interval(gain, keys(pairs)), "held_back": int(back.sum()), "loss_held_back": float(-gain[back].mean()) if back.any() else None}
        if again:
            row["second_try_gain"] = interval(gains([(o, again[o["number"], o["sample"]]) for o, _ in pairs]), keys(pairs))
        out.append(row)
    return out


def by_category(able: list[tuple[dict, dict]], kept: list[tuple[dict, dict]]) -> dict[str, dict]:
    out = {}
    for name in [c for c in (*CATEGORIES, UNKNOWN) if any(o["category"] == c for o, _ in able)]:
        of = [p for p in able if p[0]["category"] == name]
        out[name] = {"answers": len(of), "gain": interval(gains(of), keys(of)), "kept": sum(o["category"] == name for o, _ in kept)}
    return out


def tell(section: Section, told: dict) -> None:
    means = ", ".join(f"{mode} {m['safety']['mean']:.3f}" for mode, m in told["modes"].items())
    gate = told["gate"]
    loss = f", by {gate['loss_held_back']['mean']:.3f} in the mean" if gate["held_back"] else ""
    section.log.say(f"mean sigma(R_s) by preprompt: {means} ({told['compared_prompts']} prompts)")
    section.log.say(f"{told['kept']} of {told['distilled']} distilled answers are kept; {told['unusable']} cannot be demonstrations, {gate['held_back']} "
                    f"score no higher than the original{loss}{'' if gate['on'] else ' (kept: the gate is off)'}")
