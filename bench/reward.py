"""Reward-model training beside TRL's RewardTrainer: pairs per second on the same pairs, with the same losses.

python -m bench.reward                      the small real model, chat lengths, bfloat16 and float32
python -m bench.reward --model tiny         a random 4-layer model, under a minute

How to read what it prints: bench/README.md.
"""

import argparse
import gzip
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from bench import floors
from bench.harness import (
    ROOT,
    Search,
    Worker,
    contenders,
    faster,
    first_budget,
    forget_memory,
    make_clock,
    markdown,
    peak_memory,
    report,
    serve,
    shown,
    spread,
    start,
    take_turns,
    warm_up,
    worst,
)
from bench.workload import DTYPES, Words, base_model, digest, shape_at
from posttrain.__main__ import quiet_libraries
from posttrain.errors import PosttrainError
from posttrain.log import read_lines, say

TOLERANCE = {"bf16": (2e-2, 0.95), "fp32": (1e-4, 0.999)}  # largest difference of a step's loss; least cosine of the weights' change
SAME = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type",
        "lr_scheduler_kwargs", "warmup_steps", "max_steps", "seed")  # of our run's arguments, given to TRL as they are
TECHNIQUES = ("shared_prompt", "length_buckets", "short_attention")
MAX_LENGTH = 1024  # TRL's default; longer pairs are dropped on both sides
PROMPT, ANSWER = (128, 0.6, 512), (128, 0.8, 512)  # tokens of 'chat': lognormal mean, sigma, ceiling
REAL = {"hh_harmless": "hh", "helpful_graded": "preference"}


# -- our side -----------------------------------------------------------------------------------------------------------------


def handover(trainer, folder: Path) -> None:
    """Write what our run is about to train, for TRL: initial adapter (or model) and head, token ids, margins, batches, arguments."""
    trainer.roles.save(trainer.role.name, folder / "init")
    rows = [{"chosen_ids": t.ids[:t.ends[0]], "rejected_ids": t.ids[:t.prompt] + t.ids[t.ends[0]:], "margin": margin, "prompt": t.prompt}
            for t, margin in zip(trainer.trees, trainer.margins.tolist(), strict=True)]
    arguments = {k: getattr(v, "value", v) for k, v in ((k, getattr(trainer.args, k)) for k in SAME)}
    told = {"rows": rows, "batches": trainer.batches, "arguments": arguments, "budget": trainer.budget}
    (folder / "handover.json").write_text(json.dumps(told))


def run_ours(folder: Path, name: str, order: str, stop_after: int | None, callback=None) -> dict:
    """`python -m reward` on the recipe in `folder`, with a clock in its trainer. Writes the handover where there is none yet, and
    the trained weights after a whole run."""
    from posttrain.config import load_recipe
    from posttrain.runs import Run, run_sections
    from reward import train

    run = Run(load_recipe(folder / "recipe.yaml", [f"run.name={name}", *first_budget(folder / "runs", "reward")]))
    clock, told, fit = make_clock(stop_after), {}, train.fit

    def timed_fit(trainer, *rest):
        if order == "grouped":
            trainer.batches = grouped([_longest(t) for t in trainer.trees], len(trainer.batches[0]), len(trainer.batches), trainer.args.seed)
        if not (folder / "handover.json").exists():
            handover(trainer, folder)
        if stop_after:
            told["weights"] = digest(trainer.role.body, "reward", trainer.roles.dtype, trainer.role.head)
        for c in [clock, *([callback] if callback else [])]:
            trainer.add_callback(c)
        fit(trainer, *rest)

    train.fit = timed_fit
    try:
        run_sections(run, ["reward"])
    finally:
        train.fit = fit
    made = run.folder / "reward"
    logged = [r for r in read_lines(made / "metrics.jsonl") if "reward/loss" in r]
    if not stop_after:
        shutil.copy(made / "model" / "adapter_model.safetensors", folder / "trained.safetensors")
    return told | clock.told() | {"losses": [r["reward/loss"] for r in logged], "accuracies": [r["reward/accuracy"] for r in logged]}


def grouped(lengths: list[int], batch: int, steps: int, seed: int) -> list[list[int]]:
    """The global batches that transformers' `group_by_length` draws, one epoch after another."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator, stream = torch.Generator().manual_seed(seed), []
    while len(stream) < steps * batch:
        stream += get_length_grouped_indices(lengths, batch, generator=generator)
    return [stream[s * batch:(s + 1) * batch] for s in range(steps)]


def _longest(t) -> int:
    """Tokens of the longer side of a pair, prompt included."""
    return t.prompt + max(b - a for a, b in t.spans)


def switch_off(technique: str) -> None:
    """Take one of our techniques away from this process."""
    from posttrain import attention, packing, training

    if technique == "shared_prompt":  # every answer is a row with a prompt of its own, as in TRL
        collate = packing.collate

        def separate(trees, indices, layout="rows", pad=0):
            rows = [packing.tree(trees[i].ids[:trees[i].prompt], [trees[i].ids[a:b]]) for i in indices for a, b in trees[i].spans]
            batch = collate(rows, list(range(len(rows))), layout, pad)
            batch.items = [indices[k // 2] for k in batch.items]
            return batch

        training.collate = separate
        packing.cost = lambda t, layout: 2 * _longest(t)
    elif technique == "length_buckets":  # micro-batches of as many tokens, in the order of the data
        def in_order(trees, budget, layout="rows"):
            out = []
            for i, t in enumerate(trees):
                widest = max([packing.cost(trees[j], layout) for j in out[-1]], default=0) if out else 0
                if not out or (len(out[-1]) + 1) * max(widest, packing.cost(t, layout)) > budget:
                    out.append([])
                out[-1].append(i)
            return out

        training.token_budget = in_order
    elif technique == "short_attention":
        attention.register = lambda: "sdpa"


# -- TRL's side ---------------------------------------------------------------------------------------------------------------


def peer(base: str, folder: Path, settings: dict, callbacks=(), sort: bool = False):
    """TRL's RewardTrainer, unpatched, on a handover: the same initial weights, pairs, order and optimizer.

    settings: further RewardConfig values; sort: longest pair first within every global batch.
    """
    import torch
    from datasets import Dataset
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    told, init = json.loads((folder / "handover.json").read_text()), folder / "init"
    rows, batches = told["rows"], told["batches"]
    if sort:
        batches = [sorted(b, key=lambda i: -max(len(rows[i]["chosen_ids"]), len(rows[i]["rejected_ids"]))) for b in batches]
    batch = len(batches[0])
    each = settings.get("per_device_train_batch_size", min(RewardConfig.per_device_train_batch_size, batch))
    if batch % each:
        raise PosttrainError("bench", f"TRL's batch of {each} does not divide {batch}", "a multiple", "Change --batch.")
    adapter = PeftConfig.from_pretrained(init) if (init / "adapter_config.json").exists() else None
    if adapter:
        adapter.inference_mode = False
    args = RewardConfig(**{"output_dir": str(folder / "trl"), "per_device_train_batch_size": each, "gradient_accumulation_steps": batch // each,
                           "train_sampling_strategy": "sequential", "use_cpu": not torch.cuda.is_available(), "logging_steps": 1, "report_to": "none",
                           "save_strategy": "no", "disable_tqdm": True, **told["arguments"], **settings})
    data = Dataset.from_list([{k: rows[i][k] for k in ("chosen_ids", "rejected_ids", "margin")} for b in batches for i in b])
    trainer = RewardTrainer(model=base if adapter else str(init), args=args, train_dataset=data, callbacks=list(callbacks),
                            processing_class=AutoTokenizer.from_pretrained(init), peft_config=adapter)
    if adapter:
        odd = set_peft_model_state_dict(trainer.model, load_file(init / "adapter_model.safetensors")).unexpected_keys
        assert not odd, odd
    return trainer


def peer_weights(trainer) -> dict:
    """What TRL trains, by the names of peft's or transformers' file, float32."""
    from peft import PeftModel, get_peft_model_state_dict

    model = trainer.model
    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return {k: v.detach().float().cpu().clone() for k, v in state.items()}


def run_peer(folder: Path, base: str, dtype: str, settings: dict, sort: bool, stop_after: int | None) -> dict:
    """One training by TRL, told as `run_ours` tells ours."""
    import torch
    from safetensors.torch import save_file
    from transformers.trainer_callback import PrinterCallback

    clock = make_clock(stop_after)
    trainer = peer(base, folder, settings, [clock], sort)
    trainer.remove_callback(PrinterCallback)
    told = {}
    if stop_after:
        base_model = trainer.model.get_base_model()
        told["weights"] = digest(base_model.model, "default", getattr(torch, DTYPES[dtype]), base_model.score.modules_to_save["default"])
    trainer.train()
    if not stop_after:
        save_file(peer_weights(trainer), folder / "trained.safetensors")
    logged = [r for r in trainer.state.log_history if "loss" in r]
    return told | clock.told() | {"losses": [r["loss"] for r in logged], "accuracies": [r["accuracy"] for r in logged]}


def settings_of(contender: str, dtype: str) -> dict:
    """RewardConfig values beyond the shared ones. On a CPU RewardConfig() itself stops unless use_cpu is set; then it means float32
    weights, bf16 autocast, activation checkpointing, 8 pairs per device."""
    if contender == "trl default":
        return {} if dtype == "bf16" else {"bf16": False}
    return {"gradient_checkpointing": False, **({"model_init_kwargs": {"dtype": "bfloat16"}} if dtype == "bf16" else {"bf16": False})}


def tune(folder: Path, base: str, dtype: str, batch: int) -> tuple[dict, list]:
    """TRL's best settings here, each by the seconds of its second step (the first one meets new memory): pairs per device, autocast, attention."""
    def second_step(settings: dict) -> dict:
        first, second = run_peer(folder, base, dtype, settings, True, 2)["ends"]
        return {"seconds": second - first}

    search = Search(settings_of("trl best", dtype), second_step)
    search.climb("per_device_train_batch_size", [n for n in (1, 2, 4, 8, 16, 32) if batch % n == 0])
    init = search.best.get("model_init_kwargs", {})
    options = [{"bf16": False}] if dtype == "bf16" else []
    for change in [*options, {"model_init_kwargs": {**init, "attn_implementation": "eager"}}]:
        search.pays(change)
    return search.best, search.tried


# -- a contender's process ------------------------------------------------------------------------------------------------------


def work(contender: str) -> None:
    """Answer the parent's requests: 'warm' (a first run of a few steps), 'tune' (TRL's best), 'run' (one repeat)."""
    quiet_libraries()
    import torch
    import trl  # noqa: F401  before the first request: all contenders import at once

    settings: dict[str, dict] = {}
    if contender.startswith("ours without "):
        switch_off(contender.removeprefix("ours without "))

    def answer(do: str, key: str, folder: str, base: str, dtype: str, order: str, threads: int, batch: int, warmup: int, repeat: int = 0) -> dict:
        start = time.perf_counter()
        torch.set_num_threads(threads)
        told, at = {}, Path(folder)
        if do == "tune":
            settings[key], told["tried"] = tune(at, base, dtype, batch)
            return told | {"settings": settings[key]}
        forget_memory()
        stop = warmup if do == "warm" else None
        if contender.startswith("ours"):
            told = run_ours(at, f"{contender.replace(' ', '-')}-{time.time_ns()}", order, stop)
        else:
            told = run_peer(at, base, dtype, settings.get(key) or settings_of(contender, dtype), contender == "trl best", stop)
        if do == "run" and repeat == 0:
            (at / "trained.safetensors").rename(at / f"trained by {contender}.safetensors")
        return told | {"memory": peak_memory(), "seconds": told["ends"][-1], "first_result": told.pop("first_step_at") - start}

    serve(answer)


# -- data and model -------------------------------------------------------------------------------------------------------------


def chat_pairs(base: str, n: int, seed: int) -> list[dict]:
    """Pairs of random words of one token each, their numbers lognormal (the template's tokens come on top)."""
    from transformers import AutoTokenizer

    words, rng = Words(AutoTokenizer.from_pretrained(base), seed).words, random.Random(seed)

    def text(mean, sigma, most):
        size = round(rng.lognormvariate(math.log(mean) - sigma ** 2 / 2, sigma))
        return " ".join(rng.choices(words, k=min(max(size, 4), most)))

    return [{"prompt": text(*PROMPT), "chosen": text(*ANSWER), "rejected": text(*ANSWER)} for _ in range(n)]


def real_pairs(name: str, n: int, seed: int) -> list[dict] | str:
    """Rows of a real data set, or why there are none."""
    if not os.environ.get("POSTTRAIN_REAL_DATA"):
        return "POSTTRAIN_REAL_DATA is not set: it names the folder with the real data sets"
    path = Path(os.environ["POSTTRAIN_REAL_DATA"]) / f"{name}.jsonl.gz"
    if not path.exists():
        return f"{path.name} is not in the folder that POSTTRAIN_REAL_DATA names"
    with gzip.open(path, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return random.Random(seed).sample(rows, min(len(rows), n))


def write_recipe(folder: Path, base: str, data: str, rows: list[dict], dtype: str, args) -> None:
    folder.mkdir(parents=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    recipe = {
        "run": {"name": "ours", "seed": args.seed, "dir": str(folder / "runs"), "threads": args.threads},
        "model": {"name_or_path": base, "dtype": DTYPES[dtype], "chat_template": "chatml", "lora": {"r": 16, "alpha": 32}},
        "data": {"pairs": [{"path": "pairs.jsonl", "format": REAL.get(data, "preference"), "bad_rows": "drop"}]},
        "stages": {"reward": {"model": "base", "own": "pairs", "batch_size": args.batch, "max_steps": args.steps, "epochs": 10_000,
                              "learning_rate": args.rate, "warmup_ratio": 0, "max_length": MAX_LENGTH, "on_too_long": "drop", "save_steps": 1_000_000,
                              "micro_batch_tokens": args.micro_batch_tokens}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def useful(base: str, told: dict) -> dict:
    """Tokens and FLOP (bench/floors.py) that training on a handover's batches needs, with the prompt in both answers' passes and with it once."""
    rows = [told["rows"][i] for b in told["batches"] for i in b]
    jobs = [(r["prompt"], [len(r[k]) - r["prompt"] for k in ("chosen_ids", "rejected_ids")]) for r in rows]
    tokens = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    flop, flop_shared = (floors.train(shape_at(base), jobs, 0, shared) for shared in (False, True))
    return {"pairs": len(rows), "tokens": tokens, "flop": flop, "tokens_shared": tokens - sum(p for p, _ in jobs), "flop_shared": flop_shared}


# -- comparing ------------------------------------------------------------------------------------------------------------------


def change_cosine(files: tuple[Path, Path, Path]) -> float | None:
    """Cosine of what two trainings changed. files: the weights before, after one, after the other; None where their tensors are not the same ones."""
    import torch
    from safetensors.torch import load_file

    init, mine, theirs = (load_file(f) for f in files)
    if not set(init) == set(mine) == set(theirs):
        return None
    change = [torch.cat([(x[k].double() - init[k].double()).flatten() for k in sorted(init)]) for x in (mine, theirs)]
    return torch.cosine_similarity(*change, dim=0).item()


def equality(ours: dict, other: dict, dtype: str, files: tuple[Path, Path, Path]) -> dict:
    """Our first repeat against another contender's: initial weights, losses of every step, the change of the trained weights."""
    (loss, least), cosine = TOLERANCE[dtype], change_cosine(files)
    out = {"initial_weights": [ours["weights"], other["weights"]],
           "loss_difference": worst([abs(a - b) for a, b in zip(ours["losses"], other["losses"], strict=True)]), "loss_tolerance": loss,
           "change_cosine": cosine, "cosine_tolerance": least,
           "accuracy_difference": max(abs(a - b) for a, b in zip(ours["accuracies"], other["accuracies"], strict=True))}
    out["passed"] = ours["weights"] == other["weights"] and out["loss_difference"] <= loss and cosine is not None and cosine >= least
    return out


def compare(args, base: str, data: str, dtype: str, workers: list[Worker], folder: Path) -> dict:
    """One row of the table for every contender: warm-up, then interleaved repeats."""
    request = {"key": f"{data} {dtype}", "folder": str(folder), "base": base, "dtype": dtype, "order": args.order, "threads": args.threads,
               "batch": args.batch, "warmup": args.warmup}
    first, tuned = warm_up(workers, args.no_tune, request)
    results, peak = take_turns(workers, args.repeats, DTYPES[dtype], request)
    best = floors.machine(peak, DTYPES[dtype]).flops
    told = json.loads((folder / "handover.json").read_text())
    need = useful(base, told)
    rows = []
    for w in workers:
        seconds = [r["seconds"] for r in results[w.name]]
        middle = statistics.median(seconds)
        row = {"contender": w.name, "pairs_per_second": spread([need["pairs"] / s for s in seconds]), "seconds": seconds,
               "step_ends": [r["ends"] for r in results[w.name]], "losses": results[w.name][0]["losses"],
               "positions": results[w.name][0]["positions"], "positions_per_second": results[w.name][0]["positions"] / middle,
               "tokens_per_second": need["tokens"] / middle, "fraction_of_peak": need["flop"] / middle / best,
               "fraction_of_peak_shared": need["flop_shared"] / middle / best, "memory": max(r["memory"] for r in results[w.name]),
               "time_to_first_result": first[w.name]["first_result"]}
        if w.name != "ours":
            files = tuple(folder / f for f in ("init/adapter_model.safetensors", "trained by ours.safetensors", f"trained by {w.name}.safetensors"))
            row["equality"] = equality(*({**results[n][0], "weights": first[n]["weights"]} for n in ("ours", w.name)), dtype, files)
            row["ours_is_faster_by"] = faster(results["ours"], results[w.name])
        if w.name.startswith("trl"):
            row["settings"] = tuned.get("settings") if w.name == "trl best" and tuned else settings_of(w.name, dtype)
        rows.append(row)
    return {"data": data, "dtype": dtype, "need": need, "budget": told["budget"], "arguments": told["arguments"], "peak": peak,
            "tuning": tuned.get("tried"), "contenders": rows}


HEAD = ["data", "dtype", "contender", "pairs/s", "ours is faster by", "same losses", "tokens/s", "positions/s", "of peak", "of peak, shared", "memory"]


def line(row: dict, c: dict) -> list[str]:
    ratio, check = "-", "-"
    if "equality" in c:
        e = c["equality"]
        check = f"{'yes' if e['passed'] else 'NO'}: {e['loss_difference']:.1e}, cos {e['change_cosine'] or 0:.4f}"
        ratio = shown(c["ours_is_faster_by"]) if e["passed"] else "void"
    return [row["data"], row["dtype"], c["contender"], shown(c["pairs_per_second"]), ratio, check, f"{c['tokens_per_second']:.0f}",
            f"{c['positions_per_second']:.0f}", f"{c['fraction_of_peak']:.0%}", f"{c['fraction_of_peak_shared']:.0%}", f"{c['memory'] / 1e9:.2f} GB"]


def table(rows: list[dict]) -> str:
    return markdown(HEAD, [line(r, c) for r in rows for c in r["contenders"]])


def profile(args, base: str, folder: Path) -> None:
    """Print where the second step of ours spends its time."""
    import torch
    from torch.profiler import profile as profiler
    from transformers import TrainerCallback

    dtype, data = args.dtype[0], args.data[0]
    rows = pairs_of(args, base, data)
    if isinstance(rows, str):
        raise PosttrainError(f"bench: --data {data}", rows, "data", "Set it, or profile --data chat.")
    write_recipe(folder, base, data, rows, dtype, args)
    for technique in args.without:
        switch_off(technique)

    class Profile(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **kwargs):
            if state.global_step == 1:
                self.watch = profiler(record_shapes=True)
                self.watch.__enter__()

        def on_step_end(self, arguments, state, control, **kwargs):
            if state.global_step == 2:
                self.watch.__exit__(None, None, None)

    watcher = Profile()
    run_ours(folder, "profile", args.order, 2, watcher)
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(watcher.watch.key_averages(group_by_input_shape=args.shapes).table(sort_by=by, row_limit=30, max_name_column_width=45))


def pairs_of(args, base: str, data: str) -> list[dict] | str:
    n = args.steps * args.batch
    return chat_pairs(base, n, args.seed) if data == "chat" else real_pairs(data, n + n // 4 + 8, args.seed)


def parse(words: list[str]):
    parser = argparse.ArgumentParser(prog="python -m bench.reward", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny, or a model folder or hub name")
    add("--data", nargs="+", default=["chat"], choices=["chat", *REAL])
    add("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    add("--steps", type=int, help="optimizer steps of a repeat; default 4, for tiny 3")
    add("--batch", type=int, help="pairs of a step; default 8, for tiny 4")
    add("--repeats", type=int, default=3)
    add("--warmup", type=int, default=1, help="steps before anything counts")
    add("--without", nargs="+", default=[], choices=TECHNIQUES, help="also run ours without each of these")
    add("--order", default="random", choices=["random", "grouped"], help="grouped: every contender trains the batches of transformers' group_by_length")
    add("--no-tune", action="store_true", help="TRL's best keeps 8 pairs per device, autocast and sdpa instead of trying others")
    add("--micro-batch-tokens", type=int, help="ours; default: from memory, as in a run")
    add("--rate", type=float, default=1e-4)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--out", type=Path, default=ROOT / "bench" / "results")
    add("--profile", action="store_true", help="print a profile of one step of ours (first --data and --dtype) and stop")
    add("--shapes", action="store_true", help="with --profile: a line for every shape")
    args = parser.parse_args(words)
    args.steps = args.steps or (3 if args.model == "tiny" else 4)
    args.batch = args.batch or (4 if args.model == "tiny" else 8)
    return args


def main(words: list[str]) -> int:
    quiet_libraries()
    args = parse(words)
    with tempfile.TemporaryDirectory(prefix="bench-reward-") as tmp:
        import torch

        torch.set_num_threads(args.threads)
        base = base_model(args.model, Path(tmp))
        if args.profile:
            args.steps = max(args.steps, 2)
            profile(args, base, Path(tmp) / "profile")
            return 0
        names = ["ours", "trl default", "trl best", *(f"ours without {t}" for t in args.without)]
        rows, skipped = [], {}
        for data in args.data:
            pairs = pairs_of(args, base, data)
            if isinstance(pairs, str):
                skipped[data] = pairs
                say(f"{data}: skipped, {pairs}")
                continue
            for dtype in args.dtype:
                say(f"{data}, {dtype}: {args.steps} steps of {args.batch} pairs, {args.repeats} repeats", style="bold")
                folder = Path(tmp) / f"{data}-{dtype}"
                write_recipe(folder, base, data, pairs, dtype, args)
                with contenders("bench.reward", names, args.threads, Path(tmp)) as workers:  # new ones: old ones keep memory
                    rows.append(compare(args, base, data, dtype, workers, folder))
    done = report(args, "reward", rows, [line(r, c) for r in rows for c in r["contenders"]], HEAD, tokens_of, skipped=skipped)
    for data, why in skipped.items():
        print(f"{data} skipped: {why}")
    return done


def tokens_of(row: dict) -> str:
    need = row["need"]
    return f"; {need['tokens'] / need['pairs']:.0f} tokens a pair, {need['tokens_shared'] / need['pairs']:.0f} with the prompt once"


if __name__ == "__main__":
    start(main, work)
