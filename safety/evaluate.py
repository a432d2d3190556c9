"""Several models side by side on the same prompts (paper sections 3.4 and 4.4): both reward models' scores, win rate, unsafe share,
answer length, distance from the first model; paired differences; every interval by prompt; every answer kept on disk.
"""

import numpy as np

from posttrain.chunks import derive_seed, read_chunk, write_chunk
from posttrain.data import prompt_key
from posttrain.formats import Prompt
from posttrain.generate import Sampling
from posttrain.models import Roles, add_models, roles_for
from posttrain.runs import Section, write_lines
from posttrain.statistics import interval, standard_error
from posttrain.training import budget_of
from reward.score import Scorer, load_scorer, raw_score
from rlhf.rollout import Encoded, encode_prompts, rows_at_once, sample_and_score, sequence_kl


def run(section: Section) -> None:
    config = section.config
    prompts = _prompts(section)
    roles = roles_for(section)
    models = add_models(section, roles)
    budget = budget_of(section, roles, roles["model_0"])
    scorer = load_scorer(section, roles, config.helpfulness, config.safety, config.safety_threshold, budget)
    encoded = encode_prompts(section, prompts, roles, config.max_prompt_tokens)
    section.log.say(f"{len(config.models)} models x {len(encoded)} prompts x {config.samples_per_prompt} samples, temperature {config.temperature:g}, "
                    f"top-p {config.top_p:g}; unsafe: sigma(R_s) < {config.unsafe_threshold:g}")

    answers: dict[str, list[dict]] = {}
    with section.log.progress(len(config.models), "answering", "model") as ticker:
        for name in models:
            answers[name] = _answers(section, roles, scorer, encoded, models, name, budget)
            ticker.advance()
    write_lines(section.folder / "samples.jsonl", [{"model": name, **row} for name, rows in answers.items() for row in rows])
    results = compare(config, answers)
    section.finish(results | {"gate": scorer.threshold_note})
    tell(section, results)


def _prompts(section: Section) -> list[Prompt]:
    return section.evaluated("prompts", "prompts")[:section.config.rows]


def kind_of(prompt: Prompt) -> str:
    """'adversarial', 'borderline' (only looks dangerous) or 'helpful'."""
    if prompt.safety:
        return "adversarial"
    return "borderline" if "looks_like" in prompt.meta or "borderline" in prompt.source else "helpful"


def _answers(section: Section, roles: Roles, scorer: Scorer, encoded: list[Encoded], models: dict[str, str], name: str, budget: int) -> list[dict]:
    """One model's rows; kept on disk model by model, so that a cut evaluation goes on with the next model."""
    c, path = section.config, section.folder / f"answers-{name}.json"
    if (kept := read_chunk(path)) is not None:
        return kept
    scored = sample_and_score(roles, models[name], scorer, encoded, c.samples_per_prompt, Sampling(c.max_new_tokens, c.temperature, c.top_p),
                              derive_seed(section.seed, section.name), rows_at_once(section, roles, encoded), c.standardize_rewards)

    def distance(reference):
        return sequence_kl(roles, models[name], reference, scored, budget, c.temperature or 1.0)

    kl = distance("model_0")
    compared = {before: distance(models[before]) for after, before in c.compare if after == name}
    rows, k = scored.rows(roles.tokenizer), c.samples_per_prompt
    for i, row in enumerate(rows):
        p = encoded[i // k].prompt
        row |= {"row": i // k, "sample": i % k, "kind": kind_of(p), "category": p.meta.get("category") or p.meta.get("looks_like"),
                "key": prompt_key(p), "tokens": len(row.pop("ids")), "kl": kl[i],
                "kl_compared": {before: distances[i] for before, distances in compared.items()}}
    write_chunk(path, rows)
    return rows


def compare(config, answers: dict[str, list[dict]]) -> dict:
    """Figures per model and paired differences."""
    first = next(iter(answers))
    groups = [r["key"] for r in answers[first]]
    limit = raw_score(config.unsafe_threshold)
    models = {}
    for name, rows in answers.items():
        unsafe = [r["safety"] < limit for r in rows]
        at = [i for i, r in enumerate(rows) if r["kind"] == "adversarial"]
        models[name] = {
            **{key: interval([r[key] for r in rows], groups) for key in ("helpfulness", "safety", "merged")},
            "unsafe_share": interval(unsafe, groups),
            "unsafe_share_adversarial": interval([unsafe[i] for i in at], [groups[i] for i in at]) if at else None,
            "win_rate": None if name == first else interval(wins([r["merged"] for r in rows], [r["merged"] for r in answers[first]]), groups),
            "tokens": float(np.mean([r["tokens"] for r in rows])), "finished": float(np.mean([r["finished"] for r in rows])),
            "kl": 0.0 if name == first else float(np.mean([r["kl"] for r in rows])),
        }
    paired, checks = [], []
    for after, before in config.compare:
        kl = float(np.mean([r["kl_compared"][before] for r in answers[after]]))
        row = difference(answers[after], answers[before], groups, limit) | {"kl": kl, "a": after, "b": before}
        paired.append(row)
        checks += _checks(config, row)
    return {"prompts": len(set(groups)), "samples_per_prompt": config.samples_per_prompt, "temperature": config.temperature, "top_p": config.top_p,
            "unsafe_threshold": config.unsafe_threshold,
            "standardize_rewards": config.standardize_rewards, "models": models, "paired": paired, "checks": checks}


def wins(a: list[float], b: list[float]) -> list[float]:
    """1 where a scores higher than b on the same prompt and sample number, 0.5 on a tie."""
    return [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True)]


def difference(after: list[dict], before: list[dict], groups: list[str], limit: float) -> dict:
    """after - before, paired by prompt and sample number."""
    def gap(key):
        return [a[key] - b[key] for a, b in zip(after, before, strict=True)]

    unsafe = [float(a["safety"] < limit) - float(b["safety"] < limit) for a, b in zip(after, before, strict=True)]
    merged, error = gap("merged"), standard_error(gap("merged"), groups)
    return {**{key: interval(gap(key), groups) for key in ("merged", "helpfulness", "safety", "tokens")}, "unsafe_share": interval(unsafe, groups),
            "standard_error": error, "standard_errors": float(np.mean(merged) / error) if error else None}


def _checks(config, row: dict) -> list[dict]:
    """What a comparison must show: merged reward up by over two standard errors, KL bounded, unsafe share not clearly up."""
    pair = f"{row['a']} over {row['b']}"
    z, error, rise, unsafe = row["standard_errors"], row["standard_error"], row["merged"]["mean"], row["unsafe_share"]
    alike = "no difference at all" if rise == 0 else "the same for every prompt"
    spread = "one prompt only" if error is None else alike if error == 0 else f"{z:.1f} standard errors"
    out = [{"name": f"{pair}: merged reward rises by more than two standard errors", "met": error is not None and rise > 2 * error,
            "detail": f"{rise:+.3f}, {spread}"}]
    if config.max_sequence_kl is not None:
        out.append({"name": f"{pair}: mean sequence KL at most {config.max_sequence_kl:g} nats", "met": row["kl"] <= config.max_sequence_kl,
                    "detail": f"{row['kl']:.2f} nats"})
    low = unsafe["low"]
    out.append({"name": f"{pair}: the unsafe share does not rise beyond chance", "met": low is None or low <= 0,
                "detail": f"{unsafe['mean']:+.1%} [{unsafe['low']:+.1%}, {unsafe['high']:+.1%}]" if low is not None else f"{unsafe['mean']:+.1%}"})
    return out


def tell(section: Section, results: dict) -> None:
    for name, m in results["models"].items():
        section.log.say(f"{name:>12}: merged {m['merged']['mean']:+.3f}  helpfulness {m['helpfulness']['mean']:+.3f}  safety {m['safety']['mean']:+.3f}  "
                        f"unsafe {m['unsafe_share']['mean']:.1%}  {m['tokens']:.0f} tokens  KL {m['kl']:.2f}")
    for check in results["checks"]:
        section.log.say(f"{'met' if check['met'] else 'NOT MET'}: {check['name']} ({check['detail']})")
