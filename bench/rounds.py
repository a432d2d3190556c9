"""Does the paper's road rise on real data? SFT, V1 to V4 by rejection sampling, PPO on V4 (V5), and judges that took no part in it.

    POSTTRAIN_REAL_DATA=FOLDER python -m bench.rounds                      everything, then the report
    ... --only judges --threads 1 | --only path | --only report            a part

Data: helpful_graded and hh_harmless, each parted by prompt into two halves. Two reward models learn from the first half and steer the
rounds and PPO; two of the same kind learn from the second half, start from the base, and judge. A judge counts only if its length-balanced
accuracy on held-out pairs of its own half is above 50 % by two standard errors. SFT: alpaca_demonstrations and safety_demonstrations;
prompts: other rows of alpaca_demonstrations, and prompts_beavertails, prompts_i_maliciousinstructions and prompts_q_harm as safety prompts.

Everything is an ordinary recipe, written to WORK and run as `posttrain run` does: cut it, run again, it goes on. The report reads the
run folders alone: OUT/results.json, OUT/results.md.
"""

import argparse
import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench.learning_runs import as_row, load_items, percent, publish, real_data, table
from posttrain.config import load_recipe
from posttrain.data import prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.log import read_lines, say
from posttrain.runs import Run, digest, preflight, read_json, run_sections, write_atomic, write_json, write_lines
from posttrain.statistics import interval, standard_error
from safety.directions import counts_as_judge

VERSIONS = ("sft", "v1", "v2", "v3", "v4", "ppo")
HALVES = {"path": 0, "judges": 1}
SCORES = ("helpfulness", "safety", "merged")
ADVERSARIAL = ("prompts_beavertails", "prompts_i_maliciousinstructions", "prompts_q_harm")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.rounds", description=__doc__.split("\n\n")[0])
    p.add_argument("--only", choices=["judges", "path", "report"], default=None)
    p.add_argument("--model", default="builtin:smollm2-135m-instruct")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    p.add_argument("--pairs-per-prompt", type=int, default=3, help="of helpful_graded")
    p.add_argument("--pairs", type=int, default=480, help="training pairs of a reward model's own set")
    p.add_argument("--held-out-pairs", type=int, default=200, help="of each half of each set")
    p.add_argument("--demonstrations", type=int, default=320, help="a quarter of them safety demonstrations")
    p.add_argument("--rows", type=int, default=48, help="prompts of a round")
    p.add_argument("--samples", type=int, default=8, help="answers to a prompt")
    p.add_argument("--sweep-prompts", type=int, default=8)
    p.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 0.8, 1.0])
    p.add_argument("--max-new-tokens", type=int, default=96)
    p.add_argument("--iterations", type=int, default=16, help="of PPO")
    p.add_argument("--eval-prompts", type=int, default=64)
    p.add_argument("--eval-samples", type=int, default=4)
    p.add_argument("--max-length", type=int, default=640, help="longer pairs are left out")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--data", type=Path, default=None, help="default: POSTTRAIN_REAL_DATA")
    p.add_argument("--out", type=Path, default=Path("bench/results/rounds"))
    p.add_argument("--work", type=Path, default=Path("runs/bench_rounds"))
    return p


# -- the data and the two recipes ------------------------------------------------------------------------------------------------


def halve(pairs: list[Pair], per_prompt: int | None, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs of one half of the prompts and of the other, at most per_prompt of each prompt, in a random order."""
    pairs = list(pairs)
    random.Random(seed).shuffle(pairs)
    prompts = sorted({prompt_key(p) for p in pairs})
    random.Random(seed).shuffle(prompts)
    first, taken, halves = {*prompts[:len(prompts) // 2]}, dict.fromkeys(prompts, 0), ([], [])
    for p in pairs:
        key = prompt_key(p)
        taken[key] += 1
        if per_prompt is None or taken[key] <= per_prompt:
            halves[key not in first].append(p)
    return halves


def write_data(args, half: int, folder: Path) -> None:
    """helpful.jsonl and safety.jsonl of a half; for the path its demonstrations and prompts too."""
    source = real_data(args.data)
    for name, file, form, most in (("helpful", "helpful_graded", "preference", args.pairs_per_prompt), ("safety", "hh_harmless", "hh", None)):
        pairs = halve(load_items(source / f"{file}.jsonl.gz", form), most, args.seed)[half]
        write_lines(folder / f"{name}.jsonl", [as_row(p) for p in pairs[:args.pairs + args.held_out_pairs]])
    if half != HALVES["path"]:
        return
    every, safe = (load_items(source / f"{name}.jsonl.gz", "alpaca") for name in ("alpaca_demonstrations", "safety_demonstrations"))
    for items in (every, safe):
        random.Random(args.seed).shuffle(items)
    careful = args.demonstrations // 4
    plain, rest = every[:args.demonstrations - careful], every[args.demonstrations - careful:]
    write_lines(folder / "demonstrations.jsonl", [{"messages": d.messages} for d in plain])
    write_lines(folder / "safety_demonstrations.jsonl", [{"messages": d.messages} for d in safe[:careful]])
    known = {prompt_key(d) for d in plain}
    write_lines(folder / "prompts.jsonl", [{"prompt": d.messages[:-1]} for d in rest if prompt_key(d) not in known])
    write_lines(folder / "adversarial.jsonl", [{"prompt": p.messages} for name in ADVERSARIAL for p in load_items(source / f"{name}.jsonl.gz", "prompt")])


def recipe_of(args, part: str, folder: Path) -> dict:
    """The recipe of the path, or of the judges."""
    reward = {"stage": "reward", "own_share": 0.9, "batch_size": 16, "max_length": args.max_length, "on_too_long": "drop", "learning_rate": 2e-4,
              "micro_batch_tokens": 2048, "save_steps": 10}
    data = {"helpful": [{"path": "helpful.jsonl", "format": "preference"}],
            "safety": [{"path": "safety.jsonl", "format": "preference", "safety_prompt": True}]}
    start = "@sft" if part == "path" else "base"
    models = {"reward_helpfulness": {**reward, "model": start, "own": "helpful", "other": "safety"},
              "reward_safety": {**reward, "model": start, "own": "safety", "other": "helpful"}}
    out = {"run": {"name": part, "seed": args.seed, "dir": str(folder.absolute()), "threads": args.threads},
           "model": {"name_or_path": args.model, "chat_template": "chatml", "dtype": args.dtype, "lora": {"r": 16, "alpha": 32}},
           "data": {**data, "held_out": {"pairs": args.held_out_pairs}}, "stages": models}
    if part == "judges":
        return out
    both = {"helpfulness": "@reward_helpfulness", "safety": "@reward_safety", "standardize_rewards": True, "max_new_tokens": args.max_new_tokens}
    sft = {"stage": "sft", "epochs": 1, "batch_size": 8, "max_length": 512, "packing": False}
    stages = {"sft": {**sft, "data": "demonstrations"}, **models}
    for n in range(1, 5):
        stages[f"v{n}_samples"] = {"stage": "rejection", "prompts": "prompts", "policy": "@sft" if n == 1 else f"@v{n - 1}", **both, "rows": args.rows,
                                   "samples_per_prompt": args.samples, "temperature": args.temperatures, "sweep_prompts": args.sweep_prompts,
                                   "chunk": 8, **({"fresh": True} if n > 1 else {}), **({"pool": [f"@v{i}_samples" for i in (1, 2, 3)]} if n == 4 else {})}
        stages[f"v{n}"] = {**sft, "data": ["demonstrations", f"@v{n}_samples"]}
    stages["ppo"] = {"prompts": "prompts", "policy": "@v4", **both, "iterations": args.iterations, "batch_size": 32, "mini_batch_size": 8, "temperature": 0.8,
                     "unfinished_score": 0.0, "learning_rate": 2e-4, "critic_learning_rate": 2e-4, "eval_every": 4, "eval_prompts": 24, "eval_samples": 2,
                     "save_steps": 2, "max_kl": 12}
    stages["versions"] = {"stage": "evaluate", "models": {v: f"@{v}" for v in VERSIONS}, "prompts": "prompts", **both,
                          "samples_per_prompt": args.eval_samples, "temperature": 0.8, "top_p": 1.0,
                          "compare": [[b, a] for a, b in pairwise(VERSIONS)], "max_sequence_kl": 15}
    out["data"] |= {"demonstrations": [{"path": f"{name}.jsonl", "format": "messages"} for name in ("demonstrations", "safety_demonstrations")],
                    "prompts": [{"path": "prompts.jsonl", "format": "prompt"}, {"path": "adversarial.jsonl", "format": "prompt", "safety_prompt": True}]}
    out["data"]["held_out"] |= {"prompts": args.eval_prompts}
    return out | {"stages": stages}


def prepare(args, part: str) -> Run:
    folder = args.work / part
    folder.mkdir(parents=True, exist_ok=True)
    write_data(args, HALVES[part], folder)
    write_atomic(folder / "recipe.yaml", json.dumps(recipe_of(args, part, folder), indent=1))  # JSON is YAML
    return opened(args, part)


def opened(args, part: str) -> Run:
    path = args.work / part / "recipe.yaml"
    if not path.exists():
        raise PosttrainError(str(path), "no such file", f"the recipe of the {part}", f"Run python -m bench.rounds --only {part} first.")
    return Run(load_recipe(path))


# -- what the judges say ---------------------------------------------------------------------------------------------------------


def judge_strength(judges: Run) -> dict:
    """Each judge's length-balanced accuracy on held-out pairs of its half, and whether it counts: above 50 % by two standard errors."""
    out = {}
    for name in ("helpfulness", "safety"):
        x = judges.section(f"reward_{name}").results()["held_out"]["own"]["length_balanced_accuracy"]
        out[name] = x | {"counts": counts_as_judge(x)}
    return out


def judged(path: Run, judges: Run, rows: list[dict]) -> list[dict]:
    """The judges' {helpfulness, safety, merged} of rows with prompt and answer, which is read from its text.

    merged: the safety judge's score on safety prompts and where it falls below the gate, else the helpfulness judge's, each on its own
    held-out mean and deviation, as the rounds merge theirs.
    """
    from posttrain import chat
    from posttrain.models import roles_for, set_threads
    from reward.score import load_scorer
    from rlhf.rejection import rescore

    set_threads(path.recipe.run.threads)
    section = path.section("versions")
    roles = roles_for(section)
    models = {name: str(judges.section(f"reward_{name}").folder / "model") for name in ("helpfulness", "safety")}
    scorer = load_scorer(section, roles, **models, threshold=section.config.safety_threshold, budget=2048)
    told = [r | {"place": i, "ids": chat.encode_answer(roles.tokenizer, r["prompt"], r["answer"])} for i, r in enumerate(rows)]
    told = sorted(rescore(section, roles, scorer, told, "the judges"), key=lambda r: r["place"])
    return [{k: round(r[k], 6) for k in SCORES} for r in told]


def score_all(args, path: Run, judges: Run) -> dict:
    """Every evaluated answer and every sample of the rounds, with the scores that its section stored and the judges'; OUT/scores.json (no text)."""
    answers = [{**r, "is_safety": r["kind"] == "adversarial", "set": "versions"} for r in read_lines(path.section("versions").folder / "samples.jsonl")]
    samples = [{**r, "set": f"v{n}_samples"} for n in range(1, 5) for r in read_lines(path.section(f"v{n}_samples").folder / "samples.jsonl")]
    rows = answers + samples
    say(f"the judges read {len(answers)} answers of the versions and {len(samples)} samples of the rounds")
    keep = ("set", "model", "row", "sample", "kl_compared", "finished", "tokens", "is_safety")
    told = {"rows": [{**{k: r[k] for k in keep if k in r}, "prompt": prompt_of(r),
                      "scores": {"path": {k: round(r[k], 6) for k in SCORES}, "judges": found}}
                     for r, found in zip(rows, judged(path, judges, rows), strict=True)]}
    write_json(args.out / "scores.json", told)
    return told


def prompt_of(row: dict) -> str:
    return digest(row["prompt"])[:12]


# -- the conclusions -------------------------------------------------------------------------------------------------------------


def gap(values: list[float], groups: list[str]) -> dict:
    """Mean difference with its 95 % interval and how many standard errors it is from 0, by prompt."""
    error = standard_error(values, groups)
    return interval(values, groups) | {"standard_error": error, "standard_errors": float(np.mean(values) / error) if error else None}


def path_of(rows: list[dict], who: str, key: str = "merged") -> dict:
    """Mean of every version and paired difference to the one before, and of PPO to SFT, under the path's models or the judges."""
    by = {v: sorted((r for r in rows if r["model"] == v), key=lambda r: (r["row"], r["sample"])) for v in VERSIONS}
    groups = [r["prompt"] for r in by["sft"]]
    value = {v: [r["scores"][who][key] for r in by[v]] for v in VERSIONS}

    def step(b, a):
        return gap([x - y for x, y in zip(value[b], value[a], strict=True)], groups)

    return {"versions": {v: interval(value[v], groups) for v in VERSIONS},
            "steps": {f"{b} - {a}": step(b, a) for a, b in pairwise(VERSIONS)} | {"ppo - sft": step("ppo", "sft")}}


def best_against_mean(rows: list[dict], who: str) -> dict:
    """Of each prompt of a round: the finished sample that the path's models score highest, minus the mean of the finished ones, under `who`."""
    bags: dict[str, list[dict]] = {}
    for r in rows:
        if r["finished"]:
            bags.setdefault(r["prompt"], []).append(r)
    bags = {k: bag for k, bag in bags.items() if len(bag) > 1}
    best = [max(bag, key=lambda r: r["scores"]["path"]["merged"])["scores"][who]["merged"] for bag in bags.values()]
    mean = [float(np.mean([r["scores"][who]["merged"] for r in bag])) for bag in bags.values()]
    return gap([b - m for b, m in zip(best, mean, strict=True)], list(bags))


def conclude(scores: dict, strength: dict, own: dict, rounds: dict) -> dict:
    """Everything the stored scores say. strength: judge_strength; own: the same of the path's models; rounds: results of the rejection sections."""
    answers = [r for r in scores["rows"] if r["set"] == "versions"]
    kl = {v: float(np.mean([r["kl_compared"][a] for r in answers if r["model"] == v])) for a, v in pairwise(VERSIONS)}
    names = sorted({r["set"] for r in scores["rows"]} - {"versions"})
    out = {"judges": strength, "path_models": own, "kl_to_version_before": kl, "finished": {
               v: float(np.mean([r["finished"] for r in answers if r["model"] == v])) for v in VERSIONS},
           "tokens": {v: float(np.mean([r["tokens"] for r in answers if r["model"] == v])) for v in VERSIONS},
           "path": {who: {key: path_of(answers, who, key) for key in ("merged", "helpfulness", "safety")} for who in HALVES},
           "best_of_n": {name: {who: best_against_mean([r for r in scores["rows"] if r["set"] == name], who) for who in HALVES} for name in names},
           "rounds": rounds}
    return out | {"checks": checks(out)}


def checks(result: dict) -> dict[str, bool]:
    """What issue and paper expect; a judge too weak makes no check."""
    steps = result["path"]["path"]["merged"]["steps"]
    z = {name: x["standard_errors"] or 0.0 for name, x in steps.items()}
    out = {"PPO raises the held-out merged reward over V4 by more than three standard errors": z["ppo - v4"] > 3,
           "at a mean sequence KL of at most 15 nats": result["kl_to_version_before"]["ppo"] <= 15,
           "no version falls behind the one before by more than two standard errors": all(v > -2 for k, v in z.items() if k != "ppo - sft"),
           "from SFT to V5 the merged reward rises by more than two standard errors": z["ppo - sft"] > 2}
    for name, x in result["judges"].items():
        if x["counts"]:
            judged_steps = result["path"]["judges"][name]["steps"]
            out[f"the {name} judge sees no fall from V4 to V5 beyond two standard errors"] = (judged_steps["ppo - v4"]["standard_errors"] or 0.0) > -2
    if result["judges"]["helpfulness"]["counts"]:
        out["the best of N score above the mean under a judge that did not select them, in every round"] = all(
            x["judges"]["low"] is not None and x["judges"]["low"] > 0 for x in result["best_of_n"].values())
    return out


def spread(x: dict, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    inner = f" [{x['low']:{form}}, {x['high']:{form}}]" if x["low"] is not None else ""
    return f"{x['mean']:{form}}{inner}"


def render(result: dict, settings: dict) -> str:
    """results.md"""
    who = {"path": "the models that steer", "judges": "the judges"}
    parts = ["# The paper's rounds on real data\n\n" + ", ".join(f"{k} {v}" for k, v in settings.items()) + ". Intervals: 95 %, bootstrap over prompts.\n"]
    body = [[f"{who[w]}: {name}", percent(x), ("yes" if x["counts"] else "judge too weak") if w == "judges" else ""]
            for w, models in (("path", result["path_models"]), ("judges", result["judges"])) for name, x in models.items()]
    parts.append("\n## The reward models\n\nLength-balanced accuracy on held-out pairs of their own half.\n\n"
                 + table(["model", "accuracy", "counts"], body) + "\n")
    for w in HALVES:
        x = result["path"][w]
        body = [[v, *(spread(x[key]["versions"][v]) for key in ("merged", "helpfulness", "safety")), f"{result['finished'][v]:.0%}",
                 f"{result['tokens'][v]:.0f}", f"{result['kl_to_version_before'].get(v, 0):.1f}"] for v in VERSIONS]
        parts.append(f"\n## The path under {who[w]}\n\n"
                     + table(["version", "merged", "helpfulness", "safety", "finished", "tokens", "KL to the version before"], body) + "\n")
        body = [[name, *(f"{spread(x[key]['steps'][name], True)} ({x[key]['steps'][name]['standard_errors'] or 0:+.1f} s.e.)"
                         for key in ("merged", "helpfulness", "safety"))] for name in x["merged"]["steps"]]
        parts.append("\n" + table(["paired difference", "merged", "helpfulness", "safety"], body) + "\n")
    body = [[name, f"{result['rounds'][name]['temperature']:g}", *(spread(x[w], True) for w in HALVES)] for name, x in result["best_of_n"].items()]
    parts.append("\n## The best of N against the mean of a prompt's answers\n\nChosen by the models that steer.\n\n"
                 + table(["round", "temperature", *(f"under {who[w]}" for w in HALVES)], body) + "\n")
    parts.append("\n## Checks\n\n" + "\n".join(f"- {'passed' if ok else 'FAILED'}: {what}" for what, ok in result["checks"].items()) + "\n")
    return "".join(parts)


def report(args) -> None:
    path, judges = opened(args, "path"), opened(args, "judges")
    for run, names in ((path, ["versions"]), (judges, ["reward_helpfulness", "reward_safety"])):
        for name in names:
            if run.section(name).state() != "done":
                raise PosttrainError(f"{run.recipe.path}: {name}", run.section(name).state(), "done", "Run python -m bench.rounds first.")
    args.out.mkdir(parents=True, exist_ok=True)
    scores = read_json(args.out / "scores.json") or score_all(args, path, judges)
    rounds = {f"v{n}_samples": {k: path.section(f"v{n}_samples").results()[k] for k in ("temperature", "best_of_n", "temperature_sweep", "kept", "samples")}
              for n in range(1, 5)}
    result = conclude(scores, judge_strength(judges), judge_strength(path), rounds)
    settings = {k: v for k, v in vars(args).items() if k not in ("only", "data", "out", "work")}
    result["settings"] = settings
    publish(args.out, result, render(result, settings))


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for part in ("judges", "path"):
        if args.only in (None, part):
            run = prepare(args, part)
            preflight(run)
            run_sections(run)
    if args.only in (None, "report"):
        report(args)


if __name__ == "__main__":
    from posttrain.__main__ import guarded

    guarded(main)
