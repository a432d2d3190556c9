"""What the safety loss does (paper A.3.4, Table 29): cross-validation over the demo's safety pairs, with and without it.

    POSTTRAIN_REAL_DATA=FOLDER python -m bench.safety_loss [--sft runs/smollm2-135m/sft/model]

The folds part the prompts, each with the same share of every safety bin. For every fold two models are trained as recipes/smollm2-135m.yaml
trains its safety model (mix, batch, rate, length: read from that file), on the other folds, with the same seed: one with the safety
loss, one without. Both score the fold, and safety_labelled_pairs (real answers, never trained on). They start from the base with a fresh
adapter, or from an SFT adapter (--sft) as the demo's does.

Recall at 0.5 alone could be had by calling everything unsafe, and without the safety loss nothing says where 0 lies: the tables show the
share of safe answers called unsafe, the AUC (blind to where 0 lies) and models that put every answer on one side.

A unit is one training with its scoring: OUT/units/NAME.json, written whole. Run again after a cut: what is finished is skipped, a cut
training goes on from its last checkpoint. OUT/pairs.json says what was scored (no text), OUT/results.json and results.md what follows.
"""

import argparse
import random
from pathlib import Path

import numpy as np

from bench import learning_stats as stats
from bench.learning_runs import (
    Unit,
    announce,
    load_items,
    percent,
    publish,
    real_data,
    run_units,
    score_adapter,
    table,
    train_with_stage,
)
from posttrain.config import LoraSettings, load_recipe
from posttrain.data import load_entry, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.log import say
from posttrain.runs import digest, folder_digest, read_json, write_json

RECIPE, STAGE = Path("recipes/smollm2-135m.yaml"), "reward_safety"
ARMS = ("with", "without")
TABLE_29 = {  # percent, Meta Safety, 70B: average, then the bins, then unsafe recall at 0.5
    "without": {"accuracy": 63.7, "chosen safe, rejected unsafe": 93.0, "both safe": 56.0, "both unsafe": 59.5, "unsafe_recall": 73.0},
    "with": {"accuracy": 64.5, "chosen safe, rejected unsafe": 94.3, "both safe": 56.9, "both unsafe": 59.9, "unsafe_recall": 90.4}}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.safety_loss", description=__doc__.split("\n\n")[0])
    p.add_argument("--only", choices=[*ARMS, "report"], default=None)
    p.add_argument("--model", default=None, help="default: the demo's")
    p.add_argument("--sft", type=Path, default=None, help="an SFT adapter to start from, such as runs/smollm2-135m/sft/model")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    p.add_argument("--lora-r", type=int, default=None, help="default: the demo's")
    p.add_argument("--folds", type=int, default=5)
    p.add_argument("--pairs", type=int, default=None, help="safety pairs to use; default: all")
    p.add_argument("--epochs", type=float, default=None, help="default: the demo's")
    p.add_argument("--weight", type=float, default=None, help="of the safety loss in the models with it; default: the demo's")
    p.add_argument("--max-length", type=int, default=None, help="default: the demo's")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--data", type=Path, default=None, help="default: POSTTRAIN_REAL_DATA")
    p.add_argument("--out", type=Path, default=Path("bench/results/safety_loss"))
    p.add_argument("--work", type=Path, default=Path("runs/bench_safety_loss"))
    return p


def folds_of(pairs: list[Pair], count: int, seed: int = 0) -> list[int]:
    """The fold of every pair. Pairs of one prompt share a fold; the prompts of each safety bin are dealt out evenly."""
    bins: dict[str, str] = {}
    for pair in pairs:
        bins.setdefault(prompt_key(pair), f"{pair.chosen_safe} {pair.rejected_safe}")
    prompts = sorted(bins)
    random.Random(seed).shuffle(prompts)
    fold = {key: i % count for i, key in enumerate(sorted(prompts, key=bins.get))}
    return [fold[prompt_key(pair)] for pair in pairs]


def plan(args) -> tuple[dict, list[Unit]]:
    """pairs.json's content and the units. Reads and encodes everything; loads no model."""
    from posttrain.models import choose_dtype, load_tokenizer
    from reward.mix import mix
    from reward.train import encode

    demo = load_recipe(RECIPE)
    model, config = demo.model, demo.stages[STAGE]
    model.name_or_path = args.model or model.name_or_path
    model.lora = LoraSettings(r=args.lora_r, alpha=2 * args.lora_r) if args.lora_r else model.lora
    model.dtype = args.dtype
    model.dtype = choose_dtype(model)
    tokenizer = load_tokenizer(model, "bench")
    stage = {**config.model_dump(exclude_unset=True, exclude={"stage", "safety_loss_weight", "model", "own", "other", "drift"}),
             "own_share": config.own_share, "max_length": args.max_length or config.max_length, "epochs": args.epochs or config.epochs,
             "micro_batch_tokens": 2048, "save_steps": 20}
    own, other = ([p for name in names for entry in demo.data_sets[name] for p in load_entry(entry, RECIPE.parent, demo.run.seed, name).items]
                  for names in (config.own, config.other))
    weight = config.safety_loss_weight if args.weight is None else args.weight
    labelled = load_items(real_data(args.data) / "safety_labelled_pairs.jsonl.gz", "preference")
    trees, counts = {}, {}
    for name, pairs in (("own", own[:args.pairs]), ("other", other), ("labelled", labelled)):
        fitting, kept, long = encode(pairs, tokenizer, stage["max_length"])
        trees[name], counts[name] = ([pairs[i] for i in kept], fitting), len(long)
    own, own_trees = trees["own"]
    labelled, labelled_trees = trees["labelled"]
    if any(p.unsafe_preferred for p in own):
        raise PosttrainError(str(RECIPE), "a safety pair prefers an unsafe answer", "none: the two arms would train on different pairs", "Correct the data.")
    fold = folds_of(own, args.folds)
    rows = [{**_row(p), "set": "own", "fold": f} for p, f in zip(own, fold, strict=True)] + [{**_row(p), "set": "labelled"} for p in labelled]
    shared = {"model": model.name_or_path, "start": folder_digest(args.sft)[:16] if args.sft else "base", "dtype": model.dtype, "lora": model.lora.model_dump(),
              "stage": stage, "weight": weight, "seed": args.seed, "folds": args.folds,
              "data": digest([[t.ids for t in ts] + [as_labels(p) for p in ps] for ps, ts in trees.values()])[:16]}
    told = {"experiment": digest(shared)[:16], **shared, "too_long": counts, "rows": rows}
    units = []
    for f in range(args.folds):
        train = [p for p, at in zip(own, fold, strict=True) if at != f]
        held = {prompt_key(p) for p, at in zip(own, fold, strict=True) if at == f}
        rest = [p for p in trees["other"][0] if prompt_key(p) not in held]
        scored = [t for t, at in zip(own_trees, fold, strict=True) if at == f] + labelled_trees
        lengths = {id(p): len(t) for ps, ts in trees.values() for p, t in zip(ps, ts, strict=True)}
        tokens = sum(lengths[id(p)] for p in mix(train, rest, stage["own_share"], args.seed)[0])
        for arm in ARMS:
            name = f"fold{f}-{arm}"

            def work(name=name, train=train, rest=rest, scored=scored, weight=weight if arm == "with" else 0.0):
                mine = {**stage, "model": str(args.sft.absolute()) if args.sft else "base", "own": "safety", "other": "helpful", "safety_loss_weight": weight}
                done = train_with_stage(args.work / name, model, {"safety": train, "helpful": rest}, mine, args.seed, args.threads)
                return {"losses": done["losses"], "scores": score_adapter(done["model"], model, scored, args.threads)}

            units.append(Unit(name, {"experiment": told["experiment"], "fold": f, "arm": arm}, tokens, sum(map(len, scored)), work))
    return told, units


def as_labels(pair: Pair) -> list:
    return [pair.rating, pair.margin, pair.chosen_safe, pair.rejected_safe]


def _row(pair: Pair) -> dict:
    return {"prompt": digest(prompt_key(pair))[:12], "rating": pair.rating, "chosen_safe": pair.chosen_safe, "rejected_safe": pair.rejected_safe}


def conclude(out: Path) -> dict | None:
    """Everything the finished units say; None while one is missing."""
    told = read_json(out / "pairs.json")
    found = {}
    for path in (out / "units").glob("*.json"):
        unit = read_json(path)
        if unit.get("settings", {}).get("experiment") == told.get("experiment"):
            found[unit["settings"]["fold"], unit["settings"]["arm"]] = unit
    if not told or len(found) < len(ARMS) * told["folds"]:
        return None
    rows, labelled = ([r for r in told["rows"] if r["set"] == name] for name in ("own", "labelled"))
    place = [[i for i, r in enumerate(rows) if r["fold"] == f] for f in range(told["folds"])]
    pooled: dict[str, list] = {arm: [None] * len(rows) for arm in ARMS}
    real: dict[str, list] = {arm: [] for arm in ARMS}
    result = {"settings": {k: v for k, v in told.items() if k != "rows"}, "folds": [], "held_out": {}, "labelled": {}}
    for f, at in enumerate(place):
        for arm in ARMS:
            scores = found[f, arm]["result"]["scores"]
            for i, raw in zip(at, scores, strict=False):
                pooled[arm][i] = raw
            real[arm].append(scores[len(at):])
            result["folds"].append({"fold": f, "arm": arm, "held_out": stats.safety_model(scores[:len(at)], [rows[i] for i in at]),
                                    "labelled": stats.safety_model(scores[len(at):], labelled)})
    for arm in ARMS:
        mine = [x for x in result["folds"] if x["arm"] == arm]
        result["held_out"][arm] = {**stats.safety_model(pooled[arm], rows), "by_bin": stats.by_bin(stats.right(pooled[arm]), rows),
                                   "auc": _mean(x["held_out"]["auc"] for x in mine)}  # scores of different models have no common order
        result["labelled"][arm] = {"pairs": len(labelled), "auc": _mean(x["labelled"]["auc"] for x in mine), **_several(real[arm], labelled)}
    result["held_out"]["difference"] = stats.safety_difference([pooled["with"]], [pooled["without"]], rows)
    result["labelled"]["difference"] = stats.safety_difference(real["with"], real["without"], labelled)
    result["checks"] = stats.safety_checks(result["held_out"]["difference"], result["held_out"]["with"]["answers"])
    result["seconds"] = {f"fold{f}-{arm}": found[f, arm]["seconds"] for f, arm in sorted(found)}
    return result


def _several(scores: list, rows: list[dict]) -> dict:
    """The figures of several models on the same pairs: of every answer the mean over the models."""
    judged = [stats.answers(s, rows) for s in scores]
    return {**stats.at_half(np.mean([raw < 0 for raw, _, _ in judged], axis=0), judged[0][1], judged[0][2]),
            "accuracy": stats.interval(np.mean([stats.right(s) for s in scores], axis=0), stats.column(rows, "prompt"))}


def _mean(values) -> float | None:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def render(result: dict) -> str:
    """results.md"""
    s, held, real = result["settings"], result["held_out"], result["labelled"]
    names = {"without": "without the safety loss", "with": "with it"}
    parts = [f"# The safety loss, {s['folds']}-fold cross-validation over the demo's safety pairs\n\n{s['model']}, {s['dtype']}, LoRA r {s['lora']['r']}, "
             f"started from {'the base' if s['start'] == 'base' else 'an SFT adapter'}; {s['stage']['epochs']:g} epoch(s), batch "
             f"{s['stage']['batch_size']}, rate {s['stage']['learning_rate']:g}, own share {s['stage']['own_share']}, weight {s['weight']:g}, "
             f"seed {s['seed']}. {held['with']['pairs']} pairs, {held['with']['answers']} labelled answers, each judged by the model that did not "
             f"train on its fold. Intervals: 95 %, bootstrap over prompts, all folds pooled. Too long: "
             f"{', '.join(f'{k} {v}' for k, v in s['too_long'].items())}.\n"]
    head = ["", "unsafe recall at 0.5", "safe answers called unsafe", "AUC, mean of the models", "pair accuracy"]

    def line(name, x, gap=False):
        return [name, *(percent(x.get(k), gap) for k in ("unsafe_recall", "safe_called_unsafe", "auc", "accuracy"))]

    for title, x in (("Held-out folds", held), (f"safety_labelled_pairs ({real['with']['pairs']} pairs, never trained on; mean over the models)", real)):
        body = [*(line(names[arm], x[arm]) for arm in reversed(ARMS)), line("difference", x["difference"], True)]
        parts.append(f"\n## {title}\n\n{table(head, body)}\n")
    body = [[f"{names[arm]}, ours", percent(held[arm]["accuracy"]["mean"]), *(percent(held[arm]["by_bin"][b]["accuracy"]["mean"]) for b in stats.BINS),
             percent(held[arm]["unsafe_recall"]["mean"])] for arm in reversed(ARMS)]
    body += [[f"{names[arm]}, the paper's (70B)", *(f"{v} %" for v in TABLE_29[arm].values())] for arm in reversed(ARMS)]
    parts.append("\n## Beside Table 29\n\n" + table(["", "pair accuracy", *stats.BINS, "unsafe recall at 0.5"], body) + "\n")
    body = [[str(x["fold"]), names[x["arm"]], *(cell for part in ("held_out", "labelled") for cell in (
        percent(x[part]["unsafe_recall"]["mean"]), percent(x[part]["safe_called_unsafe"]["mean"]), percent(x[part]["auc"]),
        percent(x[part]["accuracy"]["mean"]), "ALL" if x[part]["one_sided"] else ""))] for x in result["folds"]]
    short = ("recall", "safe called unsafe", "AUC", "pairs", "on one side")
    parts.append("\n## Every model\n\nOn its held-out fold, then on safety_labelled_pairs. ALL: every answer is on one side of 0.5.\n\n"
                 + table(["fold", "", *short, *(f"labelled: {x}" for x in short)], body) + "\n")
    parts.append("\n## Checks\n\n" + "\n".join(f"- {'passed' if ok else 'FAILED'}: {what}" for what, ok in result["checks"].items()) + "\n")
    return "".join(parts)


def report(out: Path, must: bool) -> None:
    result = conclude(out)
    if result is None:
        if must:
            raise PosttrainError(str(out), "not every fold has both models", "all units of one experiment", "Run the experiment first.")
        say("The report waits for the other units.")
        return
    publish(out, result, render(result))


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.only == "report":
        report(args.out, must=True)
        return
    told, units = plan(args)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "pairs.json", told)
    units = [u for u in units if args.only in (None, u.settings["arm"])]
    own = sum(r["set"] == "own" for r in told["rows"])
    say(f"{own} safety pairs in {told['folds']} folds, {len(told['rows']) - own} labelled pairs to test on; {told['dtype']}, from {told['start']}")
    announce(args.out / "units", units)
    run_units(args.out / "units", units)
    report(args.out, must=False)


if __name__ == "__main__":
    from posttrain.__main__ import guarded

    guarded(main)
