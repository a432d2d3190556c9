"""Do our reward models learn as well as TRL's? Real pairs, the same ids, the same optimizer, the rate chosen alike.

    POSTTRAIN_REAL_DATA=FOLDER python -m bench.reward_learning                      everything, then the report
    ... --only ours sweep | --only trl final | --only report                        a part (sides and phases may be combined)

Data: helpful_graded (604 prompts). 200 prompts are held out and 60 more validate the rate; no pair of the ten models in UNSEEN is
trained on or validates, so that held-out pairs of two such models show what carries over. Both sides: LoRA on every linear layer, a
head of the same first values, the same AdamW, schedule and margins, one epoch, batches of 16. Ours is the `reward` stage as a recipe runs it.
TRL's is its unpatched RewardTrainer at its best settings: bf16 weights under its bf16 autocast, no gradient checkpointing, grouped
by length, a float32 head. Every score is computed by reward.score from the saved adapter, and TRL's are compared with its own model's.

A unit is one training with its scoring: OUT/units/NAME.json, written whole. Run again after a cut: what is finished is skipped, a cut
training goes on from its last checkpoint. OUT/pairs.json says what was scored (no text), OUT/results.json and results.md what follows.
"""

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

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
from posttrain.config import LoraSettings, ModelConfig
from posttrain.data import pick, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.log import Ticker, say
from posttrain.runs import digest, read_json, write_json
from reward.config import RewardStage

# Ten of 34 models, from strong to weak (78 % to 22 % of their pairs won), chosen so that many pairs join two of them (311 of 3,976, in three
# ratings) while over 2,100 pairs join none.
UNSEEN = frozenset({"claude-2", "tulu-2-dpo-7b", "ultralm-13b-v2.0", "phi-2-dpo", "platolm-7b", "guanaco-65b", "llama-2-13b-chat-hf", "phi-2-sft",
                    "oasst-rlhf-llama-33b", "minichat-3b"})
SIDES, PHASES = ("ours", "trl"), ("sweep", "final")
SETS = {"held_out": "Held-out pairs", "unseen": "Held-out pairs of two models not in training", "harmless": "hh_harmless"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.reward_learning", description=__doc__.split("\n\n")[0])
    p.add_argument("--only", nargs="+", choices=[*SIDES, *PHASES, "report"], default=[], help="a side, a phase, or the report alone")
    p.add_argument("--model", default="builtin:smollm2-135m-instruct")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    p.add_argument("--lora-r", type=int, default=16)
    p.add_argument("--rates", nargs="+", type=float, default=[5e-5, 1e-4, 2e-4], help="one rate alone: no sweep")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--train-pairs", type=int, default=1200)
    p.add_argument("--sweep-pairs", type=int, default=400, help="training pairs of a run of the sweep")
    p.add_argument("--held-out-pairs", type=int, default=0, help="0: every pair of the held-out prompts")
    p.add_argument("--harmless-pairs", type=int, default=400)
    p.add_argument("--held-out-prompts", type=int, default=200)
    p.add_argument("--validation-prompts", type=int, default=60)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--trl-micro-batch", type=int, default=1, help="pairs in one forward pass of TRL's, its fastest on two CPU cores")
    p.add_argument("--max-length", type=int, default=1024)
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--data", type=Path, default=None, help="default: POSTTRAIN_REAL_DATA")
    p.add_argument("--out", type=Path, default=Path("bench/results/reward_learning"))
    p.add_argument("--work", type=Path, default=Path("runs/bench_reward_learning"))
    return p


# -- the data -----------------------------------------------------------------------------------------------------------------


def split(pairs: list[Pair], held_out_prompts: int, validation_prompts: int, unseen: frozenset[str] = UNSEEN, seed: int = 0) -> dict[str, list[int]]:
    """Indices of pairs by use. Prompts are parted at random; training and validation hold no answer of an unseen model."""
    prompts = sorted({prompt_key(p) for p in pairs})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[:held_out_prompts])
    validation = set(prompts[held_out_prompts:held_out_prompts + validation_prompts])
    out: dict[str, list[int]] = {"train": [], "validation": [], "held_out": []}
    for i, pair in enumerate(pairs):
        key = prompt_key(pair)
        if key in held:
            out["held_out"].append(i)
        elif not {pair.meta["chosen_model"], pair.meta["rejected_model"]} & unseen:
            out["validation" if key in validation else "train"].append(i)
    return out


def some(items: list, count: int, seed: int = 0) -> list:
    """`count` of them at random, kept in order; all where count is 0 or more than there are."""
    return pick(items, count or None, random.Random(seed))


@dataclass
class Experiment:
    """train: pairs and their trees in a random order; scored: pairs of the sets validation, harmless and held_out, in this order."""

    args: argparse.Namespace
    model: ModelConfig
    tokenizer: object
    train: list[Pair]
    train_trees: list
    scored_trees: list
    rows: list[dict]
    name: str  # a digest of everything that all units share

    def take(self, sets: tuple[str, ...]) -> list:
        return [t for t, row in zip(self.scored_trees, self.rows, strict=True) if row["set"] in sets]


def prepare(args) -> Experiment:
    """Read, encode, split; write pairs.json."""
    from posttrain.models import choose_dtype, load_tokenizer
    from reward.train import encode

    if args.batch % args.trl_micro_batch or args.train_pairs % args.batch or args.sweep_pairs % args.batch:
        raise PosttrainError("bench.reward_learning", f"batches of {args.batch} do not divide {args.train_pairs} and {args.sweep_pairs} pairs, or are no "
                             f"multiple of {args.trl_micro_batch}", "whole batches", "Change --batch, --train-pairs, --sweep-pairs or --trl-micro-batch.")
    folder = real_data(args.data)
    model = ModelConfig(name_or_path=args.model, chat_template="chatml", dtype=args.dtype, lora=LoraSettings(r=args.lora_r, alpha=2 * args.lora_r))
    model.dtype = choose_dtype(model)
    tokenizer = load_tokenizer(model, "bench")
    graded, harmless = load_items(folder / "helpful_graded.jsonl.gz", "preference"), load_items(folder / "hh_harmless.jsonl.gz", "hh")
    parts = split(graded, args.held_out_prompts, args.validation_prompts)
    fitting, too_long = {}, {}
    for name, pairs in [*((k, [graded[i] for i in v]) for k, v in parts.items()), ("harmless", some(harmless, 2 * args.harmless_pairs))]:
        trees, kept, long = encode(pairs, tokenizer, args.max_length)
        fitting[name], too_long[name] = [(pairs[i], t) for i, t in zip(kept, trees, strict=True)], len(long)
    random.Random(0).shuffle(fitting["train"])
    train = fitting["train"][:args.train_pairs]
    if len(train) < max(args.train_pairs, args.sweep_pairs):
        raise PosttrainError("bench.reward_learning", f"{len(train)} training pairs are left", f"{max(args.train_pairs, args.sweep_pairs)}",
                             "Lower --train-pairs or --validation-prompts, or raise --max-length.")
    scored = [("validation", *x) for x in fitting["validation"]] + [("harmless", *x) for x in some(fitting["harmless"], args.harmless_pairs)] \
        + [("held_out", *x) for x in some(fitting["held_out"], args.held_out_pairs)]
    rows = [_row(name, pair, t) for name, pair, t in scored]
    shared = {"model": args.model, "dtype": model.dtype, "lora_r": args.lora_r, "batch": args.batch, "margin": "small", "max_length": args.max_length,
              "trl_micro_batch": args.trl_micro_batch, "train_pairs": args.train_pairs, "sweep_pairs": args.sweep_pairs,
              "train": digest([(t.ids, p.rating) for p, t in train])[:16], "scored": digest([t.ids for _, _, t in scored])[:16]}
    name = digest(shared)[:16]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "pairs.json", {"experiment": name, **shared, "too_long": too_long, "unseen_models": sorted(UNSEEN), "rows": rows})
    return Experiment(args, model, tokenizer, [p for p, _ in train], [t for _, t in train], [t for _, _, t in scored], rows, name)


def _row(name: str, pair: Pair, t) -> dict:
    chosen, rejected = (b - a for a, b in t.spans)
    models = {pair.meta.get("chosen_model"), pair.meta.get("rejected_model")}
    return {"set": name, "prompt": digest(prompt_key(pair))[:12], "rating": pair.rating, "longer": None if chosen == rejected else chosen > rejected,
            "unseen": models <= UNSEEN}


# -- the units ----------------------------------------------------------------------------------------------------------------


def units(e: Experiment, side: str, phase: str, rates: list[float]) -> list[Unit]:
    """Of one side: a run at every rate (sweep), or at the one rate with every seed (final)."""
    count = e.args.sweep_pairs if phase == "sweep" else e.args.train_pairs
    sets = ("validation", "harmless") if phase == "sweep" else ("validation", "harmless", "held_out")
    scored = e.take(sets)
    tokens = sum(len(t) + (t.prompt if side == "trl" else 0) for t in e.train_trees[:count])
    out = []
    for rate in rates:
        for seed in e.args.seeds[:1] if phase == "sweep" else e.args.seeds:
            name = f"{phase}-{side}-{rate:g}-seed{seed}"
            settings = {"experiment": e.name, "phase": phase, "side": side, "rate": rate, "seed": seed}

            def work(name=name, rate=rate, seed=seed):
                train = train_ours if side == "ours" else train_trl
                told = train(e, e.args.work / name, count, rate, seed)
                scores = score_adapter(told.pop("model"), e.model, scored, e.args.threads)
                own = told.pop("first_scores", None)
                if own is not None:
                    told["trl_own_scores_differ_by"] = _same_scores(own, scores, e.model.dtype)
                return {**told, "scores": scores}

            out.append(Unit(name, settings, tokens, sum(map(len, scored)), work))
    return out


def train_ours(e: Experiment, work: Path, count: int, rate: float, seed: int) -> dict:
    stage = {"model": "base", "own": "train", "margin": "small", "epochs": 1, "batch_size": e.args.batch, "learning_rate": rate,
             "max_length": e.args.max_length, "micro_batch_tokens": 2048, "save_steps": 10}
    return train_with_stage(work, e.model, {"train": e.train[:count]}, stage, seed, e.args.threads)


def train_trl(e: Experiment, work: Path, count: int, rate: float, seed: int) -> dict:
    """TRL's RewardTrainer, unpatched. Returns {'model': folder, 'losses', 'first_scores': its own of the first scored pairs}."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    from posttrain.models import device, resolve, set_threads
    from posttrain.plan import batch_and_steps, warmup_steps
    from reward import losses

    set_threads(e.args.threads)
    torch.manual_seed(seed)
    bf16, settings = e.model.dtype == "bfloat16", RewardStage(stage="reward", model="base", own="train")
    net = AutoModelForSequenceClassification.from_pretrained(resolve(e.model.name_or_path), num_labels=1, dtype=getattr(torch, e.model.dtype),
                                                             use_safetensors=True, attn_implementation="eager" if device().type == "cpu" else "sdpa")
    linear = sorted({n.split(".")[-1] for n, m in net.base_model.named_modules() if isinstance(m, torch.nn.Linear)})
    net = get_peft_model(net, LoraConfig(r=e.model.lora.r, lora_alpha=e.model.lora.alpha, lora_dropout=0.0, target_modules=linear, bias="none",
                                         task_type="SEQ_CLS", modules_to_save=["score"]))
    head = next(p for n, p in net.named_parameters() if n.endswith("score.modules_to_save.default.weight"))
    first = torch.empty(head.shape).normal_(0, net.config.initializer_range, generator=torch.Generator().manual_seed(seed))
    head.data = first.to(head.device)  # float32, and the values that our head starts from
    steps = batch_and_steps(count, 0, e.args.batch, 1, None)[1]
    args = RewardConfig(
        output_dir=str(work), num_train_epochs=1, per_device_train_batch_size=e.args.trl_micro_batch,
        gradient_accumulation_steps=e.args.batch // e.args.trl_micro_batch, learning_rate=rate, weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1, adam_beta2=settings.adam_beta2, adam_epsilon=settings.adam_epsilon, max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch", lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": settings.min_lr_ratio},
        warmup_steps=warmup_steps(steps, settings.warmup_ratio), bf16=bf16, gradient_checkpointing=False, train_sampling_strategy="group_by_length",
        remove_unused_columns=False, max_length=None, seed=seed, data_seed=seed, use_cpu=device().type == "cpu", save_steps=15, save_total_limit=1,
        logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
    sequences = [[t.ids[:t.prompt] + t.ids[a:b] for a, b in t.spans] for t in e.train_trees[:count]]
    data = Dataset.from_dict({"chosen_ids": [c for c, _ in sequences], "rejected_ids": [r for _, r in sequences],
                              "margin": [losses.margin(p.rating, "small") for p in e.train[:count]], "length": [max(map(len, s)) for s in sequences]})
    trainer = RewardTrainer(model=net, args=args, train_dataset=data, processing_class=e.tokenizer)
    trainer.remove_callback(PrinterCallback)
    with Ticker(steps, f"trl: {rate:g}, seed {seed}", "step") as ticker:

        class Tick(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                ticker.advance()

        trainer.add_callback(Tick())
        trainer.train(resume_from_checkpoint=any(work.glob("checkpoint-*")) or None)
    net.save_pretrained(work / "model")
    return {"model": work / "model", "losses": [round(r["loss"], 5) for r in trainer.state.log_history if "loss" in r],
            "first_scores": _own_scores(net, e.scored_trees[:4], e.tokenizer.pad_token_id, bf16)}


def _own_scores(net, trees: list, pad: int, bf16: bool) -> list[list[float]]:
    """TRL's model's own logits of both answers of a few pairs, on a padded batch."""
    import torch

    rows = [t.ids[:t.prompt] + t.ids[a:b] for t in trees for a, b in t.spans]
    width = max(map(len, rows))
    ids, mask = (torch.tensor([r + [fill] * (width - len(r)) for r in values]) for values, fill in ((rows, pad), ([[1] * len(r) for r in rows], 0)))
    net.eval()
    with torch.inference_mode(), torch.autocast(net.device.type, torch.bfloat16, enabled=bf16):
        flat = net(input_ids=ids.to(net.device), attention_mask=mask.to(net.device)).logits.float().flatten().tolist()
    return [flat[i:i + 2] for i in range(0, len(flat), 2)]


def _same_scores(own: list, scores: list, dtype: str) -> float:
    worst = max(abs(a - b) for x, y in zip(own, scores, strict=False) for a, b in zip(x, y, strict=True))
    if worst > (1e-3 if dtype == "float32" else 0.5):
        raise PosttrainError("bench.reward_learning", f"TRL's model and its saved adapter give scores that differ by {worst:.3f}", "the same scores",
                             "The adapter's layout may have changed.")
    return round(worst, 6)


# -- the report ---------------------------------------------------------------------------------------------------------------


def stored(out: Path) -> tuple[dict, dict]:
    """pairs.json and the finished units of its experiment: {(phase, side): {(rate, seed): unit}}."""
    told, found = read_json(out / "pairs.json"), {(phase, side): {} for phase in PHASES for side in SIDES}
    for path in sorted((out / "units").glob("*.json")):
        unit = read_json(path)
        s = unit.get("settings", {})
        if s.get("experiment") == told.get("experiment"):
            found[s["phase"], s["side"]][s["rate"], s["seed"]] = unit
    return told, found


def of_set(told: dict, unit: dict, name: str) -> tuple[list, list[dict]]:
    """(scores, rows) of one set of pairs in a unit."""
    rows = [r for r in told["rows"] if unit["settings"]["phase"] == "final" or r["set"] != "held_out"]
    picked = [i for i, r in enumerate(rows) if (r["set"] == "held_out" and r["unseen"] if name == "unseen" else r["set"] == name)]
    return [unit["result"]["scores"][i] for i in picked], [rows[i] for i in picked]


def validation_accuracy(told: dict, unit: dict) -> float:
    return float(stats.right(of_set(told, unit, "validation")[0]).mean())


def sweep_accuracy(told: dict, found: dict, side: str) -> dict[float, float]:
    """Validation accuracy by rate."""
    return {rate: validation_accuracy(told, unit) for (rate, _), unit in sorted(found["sweep", side].items(), key=lambda x: x[0])}


def chosen_rate(told: dict, found: dict, side: str) -> float | None:
    """The sweep's best; without a sweep the one rate of the final runs; None where neither says."""
    swept, rates = sweep_accuracy(told, found, side), {rate for rate, _ in found["final", side]}
    return stats.best_rate(swept) if swept else rates.pop() if len(rates) == 1 else None


def conclude(out: Path) -> dict | None:
    """Everything the finished units say; None while a side has no final run, or the sides have different seeds."""
    told, found = stored(out)
    rates = {side: chosen_rate(told, found, side) for side in SIDES}
    final = {side: {seed: unit for (rate, seed), unit in sorted(found["final", side].items(), key=lambda x: x[0]) if rate == rates[side]} for side in SIDES}
    if not final["ours"] or set(final["ours"]) != set(final["trl"]):
        return None
    result = {"settings": {k: v for k, v in told.items() if k != "rows"}, "sides": {}}
    for side in SIDES:
        result["sides"][side] = {
            "rate": rates[side], "seeds": sorted(final[side]), 
            "validation_accuracy_by_rate": {f"{rate:g}": v for rate, v in sweep_accuracy(told, found, side).items()},
            "more_data": {n: {f"{told['sweep_pairs']} pairs": _mean(told, [u for (r, _), u in found["sweep", side].items() if r == rates[side]], n),
                              f"{told['train_pairs']} pairs": _mean(told, final[side].values(), n)} for n in ("validation", "harmless")},
            "last_losses": {str(seed): sum(unit["result"]["losses"][-10:]) / len(unit["result"]["losses"][-10:]) for seed, unit in final[side].items()}}
    result["sides"]["trl"]["own_scores_differ_by"] = max(u["result"]["trl_own_scores_differ_by"] for u in final["trl"].values())
    for name in SETS:
        rows = of_set(told, final["ours"][min(final["ours"])], name)[1]
        scores = {side: {seed: of_set(told, unit, name)[0] for seed, unit in final[side].items()} for side in SIDES}
        result[name] = stats.compare(scores, rows) if rows else None
    result["checks"] = checks(result)
    result["seconds"] = {unit: u["seconds"] for unit, u in
                         ((f"{p}-{s}-{r:g}-seed{seed}", u) for (p, s), by in found.items() for (r, seed), u in by.items())}
    return result


def _mean(told: dict, some_units, name: str) -> float | None:
    values = [stats.right(of_set(told, unit, name)[0]).mean() for unit in some_units]
    return float(sum(values) / len(values)) if values else None


def checks(result: dict) -> dict[str, bool]:
    held, gap = result["held_out"], result["held_out"]["difference"]["pooled"]
    return {"ours - TRL, accuracy: lower bound above -3 points": stats.not_worse(gap["accuracy"]),
            "ours - TRL, length-balanced accuracy: lower bound above -3 points": stats.not_worse(gap["length_balanced"]),
            "ours, length-balanced accuracy above 50 % by two standard errors": held["above_half"]["ours"]["passed"],
            "ours, length-balanced accuracy rises with the rating (one-sided, p < 0.05)": held["trend"]["ours"]["passed"],
            "size: 1,200 training pairs, 800 held-out pairs, two seeds, a sweep": result["settings"]["train_pairs"] >= 1200
            and held["ours"]["pooled"]["pairs"] >= 800 and len(result["sides"]["ours"]["seeds"]) >= 2
            and all(len(s["validation_accuracy_by_rate"]) >= 3 for s in result["sides"].values())}


def render(result: dict) -> str:
    """results.md"""
    s, sides = result["settings"], result["sides"]
    seeds = [str(x) for x in sides["ours"]["seeds"]]
    parts = [f"# Reward models on helpful_graded: ours and TRL's\n\n{s['model']}, {s['dtype']}, LoRA r {s['lora_r']}, {s['train_pairs']} training pairs, "
             f"batch {s['batch']}, margin {s['margin']}, one epoch, at most {s['max_length']} tokens; seeds {', '.join(seeds)}. Intervals: 95 %, "
             f"bootstrap over prompts; pooled: of every pair the mean over the seeds. Pairs too long for both: "
             f"{', '.join(f'{k} {v}' for k, v in s['too_long'].items())}.\n"]
    for name, words in SETS.items():
        r = result[name]
        if not r:
            continue
        head = ["", "accuracy", "length-balanced"]
        body = [[f"{side}, {'pooled' if k == 'pooled' else f'seed {k}'}", percent(f["accuracy"]), percent(f["length_balanced"])]
                for side in SIDES for k, f in [*r[side]["seeds"].items(), ("pooled", r[side]["pooled"])]]
        body += [[f"ours - TRL, {'pooled' if k == 'pooled' else f'seed {k}'}", percent(d["accuracy"], True), percent(d["length_balanced"], True)]
                 for k, d in [*r["difference"]["seeds"].items(), ("pooled", r["difference"]["pooled"])]]
        body.append(["the longer answer wins", percent(r["longer_rule"]["accuracy"]), percent(r["longer_rule"]["length_balanced"])])
        pooled = r["ours"]["pooled"]
        parts.append(f"\n## {words} ({pooled['pairs']} of {pooled['prompts']} prompts)\n\n{table(head, body)}\n")
    held = result["held_out"]
    body = [[level.replace("_", " "), str(f["pairs"]), percent(f["accuracy"]), percent(f["length_balanced"]),
             percent(held["trl"]["pooled"]["by_rating"][level]["length_balanced"]), percent(held["longer_rule"]["by_rating"][level]["accuracy"]["mean"])]
            for level, f in reversed(held["ours"]["pooled"]["by_rating"].items())]
    parts.append("\n## By rating (held-out pairs, pooled)\n\n" + table(
        ["rating", "pairs", "ours", "ours, length-balanced", "TRL, length-balanced", "the longer answer wins"], body) + "\n\nTrend: least-squares slope of the "
        "length-balanced accuracy over the four levels, one-sided, p = share of bootstrap resamples over prompts with a slope of 0 or less.\n\n" + table(
            ["", "slope, points a level", "p", "length-balanced accuracy - 50 %, in standard errors"],
            [[side, "-" if held["trend"][side]["slope"] is None else f"{100 * held['trend'][side]['slope']:+.1f}", _p(held["trend"][side]["p"]),
              _errors(held["above_half"][side])] for side in SIDES]) + "\n")
    parts.append("\n## Rate and amount of data\n\n" + table(
        ["", "rate", "validation accuracy by rate", *(f"{n}, {k}" for n in ("validation", "harmless") for k in sides["ours"]["more_data"][n])],
        [[side, f"{sides[side]['rate']:g}", ", ".join(f"{k}: {percent(v)}" for k, v in sides[side]["validation_accuracy_by_rate"].items()) or "no sweep",
          *(percent(v) for n in ("validation", "harmless") for v in sides[side]["more_data"][n].values())] for side in SIDES])
        + "\n\nhh_harmless is another task than the one trained on, and a model of this size is near chance on it; the last two columns say what "
        f"{s['train_pairs'] / s['sweep_pairs']:g} times the data changes. TRL's model's own scores and those computed here from its saved adapter "
        f"differ by at most {sides['trl']['own_scores_differ_by']:g}.\n")
    parts.append("\n## Checks\n\n" + "\n".join(f"- {'passed' if ok else 'FAILED'}: {what}" for what, ok in result["checks"].items()) + "\n")
    return "".join(parts)


def _errors(x: dict) -> str:
    return f"{(x['mean'] - 0.5) / x['standard_error']:.1f}" if x["standard_error"] else "-"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.4f}"


def report(out: Path, must: bool) -> None:
    result = conclude(out)
    if result is None:
        waits = "a final run of ours and of TRL's with the same seeds, at the rate that the sweep chose"
        if must:
            raise PosttrainError(str(out), "there is nothing to report yet", waits, "Run the experiment first.")
        say(f"The report waits for {waits}.")
        return
    publish(out, result, render(result))


def _rate(args, told: dict, found: dict, side: str) -> float:
    """The one rate given, or the sweep's best once it has every rate."""
    if len(args.rates) == 1:
        return args.rates[0]
    swept = sweep_accuracy(told, found, side)
    if missing := sorted(set(args.rates) - set(swept)):
        raise PosttrainError("bench.reward_learning", f"the sweep of {side} has no run at {', '.join(f'{r:g}' for r in missing)}", "a finished sweep",
                             f"Run --only {side} sweep first, or give one rate: --rates RATE.")
    say(f"{side}: rate {stats.best_rate(swept):g} ({', '.join(f'{r:g}: {percent(v)}' for r, v in swept.items())} of the validation pairs)")
    return stats.best_rate(swept)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if "report" in args.only:
        report(args.out, must=True)
        return
    sides = [s for s in SIDES if s in args.only] or list(SIDES)
    phases = [p for p in PHASES if p in args.only] or list(PHASES)
    e, folder = prepare(args), args.out / "units"
    sizes = {name: sum(r["set"] == name for r in e.rows) for name in ("validation", "held_out", "harmless")}
    say(f"{len(e.train)} training pairs; scored: {sizes['validation']} validation, {sizes['held_out']} held out (of which "
        f"{sum(r['unseen'] for r in e.rows)} of two models not in training), {sizes['harmless']} harmless; {e.model.dtype}")
    sweep = [u for side in sides for u in units(e, side, "sweep", args.rates)] if "sweep" in phases and len(args.rates) > 1 else []
    planned = [u for side in sides for u in units(e, side, "final", args.rates[:1])] if "final" in phases else []
    announce(folder, sweep + ([replace(u, name=u.name.replace(f"-{args.rates[0]:g}-", "-RATE-")) for u in planned] if len(args.rates) > 1 else planned))
    run_units(folder, sweep, later=sum(u.cost for u in planned))
    if "final" in phases:
        told, found = stored(args.out)
        run_units(folder, [u for side in sides for u in units(e, side, "final", [_rate(args, told, found, side)])])
    report(args.out, must=False)


if __name__ == "__main__":
    from posttrain.__main__ import guarded

    guarded(main)
