"""Supervised fine-tuning beside TRL's SFTTrainer: tokens per second on the same demonstrations, with the same losses.

python -m bench.sft                      the small real model, chat and fixed lengths, bfloat16 and float32
python -m bench.sft --model tiny         a random 4-layer model

How to read what it prints: bench/README.md.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path

from bench import floors
from bench.harness import (
    Search,
    Worker,
    checked,
    contenders,
    every_row,
    faster,
    first_budget,
    forget_memory,
    judge,
    make_clock,
    parser,
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
from bench.reward import SAME, change_cosine, peer_weights, settings_of
from bench.workload import DTYPES, Words, base_model, digest, draw, shape_at, tokenizer_of
from posttrain.__main__ import quiet_libraries
from posttrain.log import read_lines

MAX_LENGTH = 1024  # TRL's default; longer demonstrations are dropped on both sides
LIMITS = {"bf16": {"loss": 2e-2, "1 - cosine": 0.05}, "fp32": {"loss": 1e-4, "1 - cosine": 1e-3}}  # of a step's loss; of the weights' change


def write_work(folder: Path, base: str, data: str, dtype: str, args) -> None:
    """Demonstrations of one turn, and a recipe for our stage."""
    words = Words(tokenizer_of(base), args.seed)
    lengths = draw(data, args.steps * args.batch, 1, args.mean, args.seed, words.least())
    rows = [{"prompt": words.prompt(p), "completion": words.answer(t)} for p, (t,) in lengths]
    folder.mkdir(parents=True)
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    recipe = {
        "run": {"name": "ours", "seed": args.seed, "dir": str(folder / "runs"), "threads": args.threads},
        "model": {"name_or_path": base, "dtype": DTYPES[dtype], "chat_template": "chatml", "lora": {"r": 16, "alpha": 32}},
        "data": {"demonstrations": [{"path": "demonstrations.jsonl", "format": "prompt_completion"}]},
        "stages": {"sft": {"data": "demonstrations", "packing": False, "batch_size": args.batch, "max_steps": args.steps, "epochs": 10_000,
                           "learning_rate": 1e-4, "warmup_ratio": 0, "max_length": MAX_LENGTH, "save_steps": 1_000_000}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


# -- our side -------------------------------------------------------------------------------------------------------------------


def run_ours(folder: Path, stop_after: int | None) -> dict:
    """`python -m sft` on the recipe in `folder`, with a clock in its trainer. Writes the handover where there is none yet, and the
    trained weights after a whole run."""
    import shutil

    from posttrain.config import load_recipe
    from posttrain.runs import Run, run_sections
    from sft import train

    run = Run(load_recipe(folder / "recipe.yaml", [f"run.name=run-{time.time_ns()}", *first_budget(folder / "runs", "sft")]))
    clock, told, fit = make_clock(stop_after), {}, train.fit

    def timed_fit(trainer, *rest):
        if not (folder / "handover.json").exists():
            trainer.roles.save("policy", folder / "init")
            rows = [{"input_ids": t.ids, "labels": train.labels(t)} for t in trainer.trees]
            arguments = {k: getattr(v, "value", v) for k, v in ((k, getattr(trainer.args, k)) for k in SAME)}
            (folder / "handover.json").write_text(json.dumps({"rows": rows, "batches": trainer.batches, "arguments": arguments}))
        if stop_after:
            told["weights"] = digest(trainer.role.body, "policy", trainer.roles.dtype)
        trainer.add_callback(clock)
        fit(trainer, *rest)

    train.fit = timed_fit
    try:
        run_sections(run, ["sft"])
    finally:
        train.fit = fit
    made = run.folder / "sft"
    if not stop_after:
        shutil.copy(made / "model" / "adapter_model.safetensors", folder / "trained.safetensors")
    return told | clock.told() | {"losses": [r["sft/loss"] for r in read_lines(made / "metrics.jsonl") if "sft/loss" in r]}


# -- TRL's side -----------------------------------------------------------------------------------------------------------------


def run_peer(folder: Path, base: str, dtype: str, settings: dict, sort: bool, stop_after: int | None) -> dict:
    """TRL's SFTTrainer, unpatched, on the same weights, demonstrations, order and optimizer. settings: further SFTConfig values;
    sort: longest first within every global batch."""
    import torch
    from datasets import Dataset
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    told, init = json.loads((folder / "handover.json").read_text()), folder / "init"
    rows, batches = told["rows"], told["batches"]
    if sort:
        batches = [sorted(b, key=lambda i: -len(rows[i]["input_ids"])) for b in batches]
    batch, clock = len(batches[0]), make_clock(stop_after)
    each = settings.get("per_device_train_batch_size", min(SFTConfig.per_device_train_batch_size, batch))
    adapter = PeftConfig.from_pretrained(init)
    adapter.inference_mode = False
    args = SFTConfig(**{"output_dir": str(folder / "trl"), "per_device_train_batch_size": each, "gradient_accumulation_steps": batch // each,
                        "train_sampling_strategy": "sequential", "use_cpu": not torch.cuda.is_available(), "logging_steps": 1, "report_to": "none",
                        "save_strategy": "no", "disable_tqdm": True, **told["arguments"], **settings})
    trainer = SFTTrainer(model=base, args=args, train_dataset=Dataset.from_list([rows[i] for b in batches for i in b]), callbacks=[clock],
                         processing_class=AutoTokenizer.from_pretrained(init), peft_config=adapter)
    odd = set_peft_model_state_dict(trainer.model, load_file(init / "adapter_model.safetensors")).unexpected_keys
    assert not odd, odd
    trainer.remove_callback(PrinterCallback)
    out = {"weights": digest(trainer.model.get_base_model().model, "default", getattr(torch, DTYPES[dtype]))} if stop_after else {}
    trainer.train()
    if not stop_after:
        save_file(peer_weights(trainer), folder / "trained.safetensors")
    return out | clock.told() | {"losses": [r["loss"] for r in trainer.state.log_history if "loss" in r]}


def tune(folder: Path, base: str, dtype: str, batch: int) -> tuple[dict, list]:
    """TRL's best settings here, each by the seconds of the first step: demonstrations per device, then padding-free (what packing
    becomes where a step's demonstrations are given), the chunked loss, autocast and attention. One that changes the loss is no choice."""
    losses = []

    def measure(settings: dict) -> dict:
        try:
            told = run_peer(folder, base, dtype, settings, True, 1)
        except Exception as e:  # whatever a setting that does not work here raises
            return {"why_not": f"{type(e).__name__}: {str(e)[:200]}"}
        losses.append(told["losses"][0])
        other = abs(losses[-1] - losses[0]) > LIMITS[dtype]["loss"]
        return {"seconds": told["ends"][0], "loss": losses[-1]} | ({"why_not": "another loss"} if other else {})

    search = Search(settings_of("trl best", dtype), measure)
    search.climb("per_device_train_batch_size", [n for n in (1, 2, 4, 8, 16, 32) if batch % n == 0])
    each, init = search.best["per_device_train_batch_size"], search.best.get("model_init_kwargs", {})
    for n in dict.fromkeys((each, min(4 * each, batch))):
        search.pays({"per_device_train_batch_size": n, "padding_free": True, "max_length": None})
    eager = {"model_init_kwargs": {**init, "attn_implementation": "eager"}}
    for change in ({"loss_type": "chunked_nll"}, *([{"bf16": False}] if dtype == "bf16" else []), eager):
        search.pays(change)
    return search.best, search.tried


# -- a contender's process ------------------------------------------------------------------------------------------------------


def work(contender: str) -> None:
    """Answer the parent's requests: 'warm' (a first step), 'tune' (TRL's best), 'run' (one repeat)."""
    quiet_libraries()
    import torch
    import trl  # noqa: F401  before the first request: all contenders import at once

    settings: dict[str, dict] = {}

    def answer(do: str, key: str, folder: str, base: str, dtype: str, threads: int, batch: int, repeat: int = 0) -> dict:
        start, told, at = time.perf_counter(), {}, Path(folder)
        torch.set_num_threads(threads)
        if do == "tune":
            settings[key], told["tried"] = tune(at, base, dtype, batch)
            return told | {"settings": settings[key]}
        forget_memory()
        stop = 1 if do == "warm" else None
        told = (run_ours(at, stop) if contender == "ours" else
                run_peer(at, base, dtype, settings.get(key, settings_of(contender, dtype)), contender == "trl best", stop))
        if do == "run" and repeat == 0:
            (at / "trained.safetensors").rename(at / f"trained by {contender}.safetensors")
        return told | {"memory": peak_memory(), "seconds": told["ends"][-1], "first_result": told.pop("first_step_at") - start}

    serve(answer)


# -- comparing ------------------------------------------------------------------------------------------------------------------


def equality(ours: dict, other: dict, dtype: str, files: tuple[Path, Path, Path]) -> dict:
    """Our first repeat against another contender's: initial weights, losses of every step, the change of the trained weights."""
    cosine = change_cosine(files)
    differences = {"loss": worst([abs(a - b) for a, b in zip(ours["losses"], other["losses"], strict=False)]),
                   "1 - cosine": None if cosine is None else 1 - cosine}
    return judge(differences, LIMITS[dtype], {"same initial weights": ours["weights"] == other["weights"],
                                              "same tensors and steps": cosine is not None and len(ours["losses"]) == len(other["losses"])})


def compare(args, base: str, data: str, dtype: str, workers: list[Worker], folder: Path) -> dict:
    """One row of the table for every contender: warm-up, TRL's tuning, then interleaved repeats."""
    write_work(folder, base, data, dtype, args)
    request = {"key": f"{data} {dtype}", "folder": str(folder), "base": base, "dtype": dtype, "threads": args.threads, "batch": args.batch}
    first, tuned = warm_up(workers, args.no_tune, request)
    results, peak = take_turns(workers, args.repeats, DTYPES[dtype], request)
    told = json.loads((folder / "handover.json").read_text())
    trained = [told["rows"][i] for b in told["batches"] for i in b]
    jobs = [(len(r["labels"]) - n, [n]) for r in trained for n in [sum(x != -100 for x in r["labels"])]]
    tokens, answers = sum(len(r["labels"]) for r in trained), sum(n for _, (n,) in jobs)
    floor, rows = floors.sft(shape_at(base), floors.machine(peak, DTYPES[dtype]), jobs), []
    for w in workers:
        runs = results[w.name]
        seconds = [r["seconds"] for r in runs]
        row = {"contender": w.name, "tokens_per_second": spread([tokens / s for s in seconds]),
               "loss_tokens_per_second": spread([answers / s for s in seconds]),
               "positions_per_second": spread([r["positions"] / r["seconds"] for r in runs]), "fraction_of_floor": floor / spread(seconds)["median"],
               "memory": max(r["memory"] for r in runs), "time_to_first_result": first[w.name]["first_result"], "losses": runs[0]["losses"]}
        if w.name != "ours":
            files = tuple(folder / f for f in ("init/adapter_model.safetensors", "trained by ours.safetensors", f"trained by {w.name}.safetensors"))
            row["equality"] = equality(*({**results[n][0], "weights": first[n]["weights"]} for n in ("ours", w.name)), dtype, files)
            row["ours_is_faster_by"] = faster(results["ours"], runs)
            row["settings"] = tuned.get("settings") if w.name == "trl best" and tuned else settings_of(w.name, dtype)
        rows.append(row)
    return {"data": data, "dtype": dtype, "peak": peak, "floor_seconds": floor, "tokens": tokens, "loss_tokens": answers, "tuning": tuned.get("tried"),
            "contenders": rows}


HEAD = ["data", "dtype", "contender", "tokens/s", "ours is faster by", "same losses", "positions/s", "of floor", "memory"]


def line(row: dict, c: dict) -> list[str]:
    return [row["data"], row["dtype"], c["contender"], shown(c["tokens_per_second"], 0), *checked(c), f"{c['positions_per_second']['median']:.0f}",
            f"{c['fraction_of_floor']:.1%}", f"{c['memory'] / 1e9:.2f} GB"]


def main(words: list[str]) -> int:
    quiet_libraries()
    options = parser("sft", __doc__)
    options.add_argument("--data", nargs="+", default=["chat", "fixed"], choices=["chat", "fixed"])
    options.add_argument("--steps", type=int, default=4, help="optimizer steps of a repeat")
    options.add_argument("--batch", type=int, default=16, help="demonstrations of a step")
    args = options.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as tmp:
        base = base_model(args.model, Path(tmp))
        workers = partial(contenders, "bench.sft", ["ours", "trl default", "trl best"], args.threads, Path(tmp))
        rows = every_row(args, base, compare, workers, Path(tmp), f"{args.steps} steps of {args.batch} demonstrations")
    return report(args, "sft", rows, [line(r, c) for r in rows for c in r["contenders"]], HEAD)


if __name__ == "__main__":
    start(main, work)
