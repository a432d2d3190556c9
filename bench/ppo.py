"""PPO iterations beside TRL 1.12.0, the last release with PPO: samples per second on the same prompts with answers of the same lengths.

python -m bench.ppo                      the small real model, chat and fixed lengths, bfloat16 and float32
python -m bench.ppo --model tiny         a random 4-layer model

How to read what it prints: bench/README.md.
"""

import json
import math
import sys
import tempfile
import time
from functools import partial
from itertools import takewhile
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
    told_memory,
    warm_up,
)
from bench.workload import DTYPES, Words, base_model, digest, draw, end_hf_at, end_ours_at, make_adapter, shape_at, tokenizer_of
from posttrain.__main__ import quiet_libraries
from posttrain.errors import PosttrainError

PEER = Path(sys.prefix) / "trl-1.12"
RATE = 1e-5
WATCHED = 2  # prompts that our stage keeps aside for early stopping: more than are trained on
# in bf16 two right answers are as far apart as both are from float32 (0.04 on the small real model, where the words are random): the check is
# that ours is no farther from float32 than the peer
LIMITS = {"bf16": {"logprobs": 0.2, "ref_logprobs": 0.2, "values": 2e-2, "scores": 5e-2, "answer_tokens": 1e-3, "logprobs off float32, over peer's": 1.1},
          "fp32": {"logprobs": 1e-4, "ref_logprobs": 1e-4, "values": 1e-4, "scores": 1e-3, "answer_tokens": 1e-3}}
NEVER = 1_000_000


# -- the work -------------------------------------------------------------------------------------------------------------------


def write_work(folder: Path, base: str, data: str, dtype: str, args) -> None:
    """prompts.jsonl and lengths.json, a recipe for our stage, and the reward adapter of both sides."""
    tokenizer = tokenizer_of(base)
    words, lengths, lines = Words(tokenizer, args.seed), [], []
    from posttrain import chat

    for p, answers in draw(data, args.samples + WATCHED, 1, args.mean, args.seed, words.least()):
        lines.append({"prompt": words.prompt(p)})
        lengths.append([chat.encode_prompt(tokenizer, [{"role": "user", "content": lines[-1]["prompt"]}]), answers])
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    (folder / "lengths.json").write_text(json.dumps(lengths))
    reward, most = str(folder.parent / "reward" / "model"), max(a for _, (a,) in lengths)
    stage = {"prompts": "prompts", "policy": "base", "helpfulness": reward, "safety": reward, "max_new_tokens": most,
             "max_prompt_tokens": 8 * args.mean, "batch": args.samples, "iterations": NEVER, "batch_size": args.samples,
             "mini_batch_size": args.samples, "learning_rate": RATE, "critic_learning_rate": RATE, "kl_coef": 0.05, "weight_decay": 0.0,
             "adam_beta2": 0.999, "adam_epsilon": 1e-8, "unfinished_score": None, "critic_warmup": 0, "eval_every": NEVER,
             "eval_prompts": WATCHED, "save_steps": NEVER, "sample_every": NEVER}
    recipe = {"run": {"name": "ours", "seed": args.seed, "dir": str(folder / "runs"), "threads": args.threads},
              "model": {"name_or_path": base, "dtype": DTYPES[dtype], "chat_template": "chatml", "lora": {"r": 16, "alpha": 32}},
              "data": {"prompts": [{"path": "prompts.jsonl", "format": "prompt"}]}, "stages": {"ppo": stage}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def lengths_in(folder: Path) -> dict[tuple[int, ...], list[int]]:
    return {tuple(ids): answers for ids, answers in json.loads((folder / "lengths.json").read_text())}


# -- our side -------------------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """The iterations that were asked for are done."""


def run_ours(folder: Path, iterations: int, handover: bool) -> dict:
    """`python -m rlhf` on the recipe, timed between two entries of its metrics.jsonl: an iteration with its statistics and log.
    handover: also write what TRL needs to start from the same, and our numbers of the answers sampled first."""
    import reward.score
    from posttrain.config import load_recipe
    from posttrain.log import Log
    from posttrain.runs import Run, run_sections
    from rlhf import ppo

    section_run = Run(load_recipe(folder / "recipe.yaml", [f"run.name=run-{time.time_ns()}", *first_budget(folder / "runs", "ppo")]))
    told = {"ends": [], "losses": [], "generate": []}
    end_ours_at(lengths_in(folder))
    kept = {"metrics": Log.metrics, "sample": ppo.sample_and_score, "scores": reward.score.scores}
    last, tokens, samples = [], [], []

    def scored_once(roles, role, *rest):
        """TRL takes one reward model: where the same is given twice, it is asked once."""
        if role == "helpfulness":
            last[:] = [kept["scores"](roles, role, *rest)]
        return last[0]

    def sampled(roles, role, *rest, **more):
        out = kept["sample"](roles, role, *rest, **more)
        if len(out.prompts) > WATCHED:
            tokens.append(sum(len(a.ids) for group in out.answers for a in group))
            samples.append(sum(map(len, out.answers)))
            if handover and not (folder / "handover.json").exists():
                write_handover(folder, roles, out)
                told["weights"] = weights(roles)
        return out

    def metrics(log, step, row):
        kept["metrics"](log, step, row)
        told["ends"].append(time.perf_counter())
        if "ppo/policy_loss" in row:
            told["losses"].append([row["ppo/policy_loss"], row["ppo/value_loss"]])
            told["generate"].append(row["ppo/seconds_generate"])
            if len(told["losses"]) == iterations:
                raise Enough

    Log.metrics, ppo.sample_and_score, reward.score.scores = metrics, sampled, scored_once
    try:
        run_sections(section_run, ["ppo"])
    except Enough:
        pass
    finally:
        Log.metrics, ppo.sample_and_score, reward.score.scores = kept["metrics"], kept["sample"], kept["scores"]
    begin, *ends = told.pop("ends")
    return told | {"seconds": ends[-1] - begin, "generate": sum(told["generate"]), "answer_tokens": sum(tokens), "samples": sum(samples)}


def weights(roles) -> dict[str, str]:
    return {name: digest(roles[name].body, name, roles.dtype, roles[name].head) for name in ("policy", "critic")}


def write_handover(folder: Path, roles, scored) -> None:
    """Initial adapters, and for every answer its ids with our log-probabilities, reference log-probabilities, values and score."""
    import torch

    from posttrain.packing import collate
    from rlhf.ppo import values_of
    from rlhf.rollout import answer_trees

    for name in ("policy", "critic"):
        roles.save(name, folder / "init" / name)
    rows = []
    with torch.inference_mode():
        for i, t in enumerate(answer_trees(scored)):
            batch = collate([t], [0], "rows", roles.tokenizer.pad_token_id).to(roles.device)
            rows.append({"prompt": scored.prompts[i].ids, "answer": scored.answers[i][0].ids,
                         "logprobs": roles.logprobs("policy", batch).tolist(), "ref_logprobs": roles.logprobs("reference", batch).tolist(),
                         "values": values_of(roles, batch).tolist(), "scores": [roles.scalars("helpfulness", batch).item()]})
    (folder / "handover.json").write_text(json.dumps(rows))


# -- TRL's side -----------------------------------------------------------------------------------------------------------------


def peer(folder: Path, base: str, dtype: str, settings: dict, iterations: int, count):
    """TRL's PPOTrainer, unpatched, from the same weights: a policy with the adapter, a value model with the critic's adapter and
    head, the reward model with its adapter merged. settings: PPOConfig values, and 'attn_implementation'. Returns (trainer, clock)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings = dict(settings)
    rows = json.loads((folder / "handover.json").read_text())
    load = {"dtype": getattr(torch, DTYPES[dtype]), "attn_implementation": settings.pop("attn_implementation", "sdpa")}
    tokenizer = AutoTokenizer.from_pretrained(folder / "init" / "policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(base, **load)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy = PeftModel.from_pretrained(policy, folder / "init" / "policy", is_trainable=True)
    value, reward = (AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **load) for _ in range(2))
    reward = PeftModel.from_pretrained(reward, folder.parent / "reward" / "model").merge_and_unload().requires_grad_(False).eval()
    critic = load_file(folder / "init" / "critic" / "adapter_model.safetensors")
    told = json.loads((folder / "init" / "critic" / "adapter_config.json").read_text())
    value.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=told["r"], lora_alpha=told["lora_alpha"], target_modules=told["target_modules"]), value)
    value.score.weight.data.copy_(critic.pop("base_model.model.score.weight"))
    set_peft_model_state_dict(value, {k.removeprefix("base_model.model."): v for k, v in critic.items()})
    for name, p in value.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()  # as PeftModel keeps the policy's
    value.score.requires_grad_(True)
    end_hf_at(policy, lengths_in(folder), count)

    n = len(rows)
    each = settings.get("per_device_train_batch_size", min(PPOConfig.per_device_train_batch_size, n))
    args = PPOConfig(**{"output_dir": str(folder / "trl"), "per_device_train_batch_size": each, "gradient_accumulation_steps": n // each,
                        "num_ppo_epochs": 1, "total_episodes": n * iterations, "response_length": max(len(r["answer"]) for r in rows),
                        "temperature": 1.0, "learning_rate": RATE, "vf_coef": 1.0, "num_sample_generations": 0, "bf16": dtype == "bf16",
                        "use_cpu": not torch.cuda.is_available(), "report_to": "none", "save_strategy": "no", "disable_tqdm": True, **settings})
    clock = make_clock(embeddings=[m.get_input_embeddings() for m in (policy, value, reward)])
    trainer = PPOTrainer(args=args, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
                         train_dataset=Dataset.from_list([{"input_ids": r["prompt"]} for r in rows]),
                         eval_dataset=Dataset.from_list([{"input_ids": rows[0]["prompt"]}]), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def run_peer(folder: Path, base: str, dtype: str, settings: dict, iterations: int, compare: bool) -> dict:
    """One training by TRL, told as `run_ours` tells ours. compare: also TRL's numbers of our answers, against ours."""
    counted = []
    trainer, clock = peer(folder, base, dtype, settings, iterations, lambda *x: counted.append(x))
    told = replay(trainer, json.loads((folder / "handover.json").read_text())) if compare else {}
    trainer.train()
    told |= clock.told()
    losses = [[r["loss/policy_avg"], r["loss/value_avg"]] for r in trainer.state.log_history if "loss/policy_avg" in r]
    return told | {"losses": losses, "seconds": told["ends"][-1], "generate": sum(s for _, s in counted), "answer_tokens": sum(t for t, _ in counted),
                   "samples": iterations * trainer.args.batch_size}


def replay(trainer, rows: list[dict]) -> dict:
    """TRL's log-probabilities, reference log-probabilities, values and scores of the answers that ours sampled: mean absolute
    differences from ours, in bf16 also how much farther ours are from float32 than TRL's; and the digests of what it loaded."""
    import copy

    import torch
    from trl.experimental.ppo.ppo_trainer import forward, get_reward
    from trl.trainer.utils import selective_log_softmax

    pad, value = trainer.processing_class.pad_token_id, trainer.model.value_model
    gaps: dict[str, list[float]] = {}
    exact = copy.deepcopy(trainer.model.policy).float() if trainer.policy_model.dtype == torch.bfloat16 else None
    ours_off, peer_off = [], []
    with torch.no_grad():
        for row in rows:
            start, answer = len(row["prompt"]), torch.tensor([row["answer"]])
            ids = torch.tensor([row["prompt"] + row["answer"]])
            found = {"logprobs": forward(trainer.model.policy, ids, pad).logits[:, start - 1:-1]}
            with trainer.null_ref_context():
                found["ref_logprobs"] = forward(trainer.model.policy, ids, pad).logits[:, start - 1:-1]
            found = {k: selective_log_softmax(v.float(), answer) for k, v in found.items()}
            found["values"] = get_reward(value, ids, pad, start)[0][:, start - 1:-1, 0]
            found["scores"] = get_reward(trainer.reward_model, ids, pad, start)[1]
            for key, x in found.items():
                gaps.setdefault(key, []).extend((x.float().flatten() - torch.tensor(row[key])).abs().tolist())
            if exact is not None:
                true = selective_log_softmax(forward(exact, ids, pad).logits[:, start - 1:-1], answer)
                ours_off.append((torch.tensor(row["logprobs"]) - true.flatten()).abs())
                peer_off.append((found["logprobs"] - true).flatten().abs())
    dtype, model = trainer.policy_model.dtype, trainer.model
    told = {"policy": digest(model.policy.get_base_model().model, "default", dtype), "critic": digest(value.model, "default", dtype, value.score)}
    means = {k: sum(v) / len(v) for k, v in gaps.items()}
    if exact is not None:
        means["logprobs off float32, over peer's"] = (torch.cat(ours_off).mean() / torch.cat(peer_off).mean()).item()
    return {"gaps": means, "weights": told}


def settings_of(contender: str, n: int) -> dict:
    """PPOConfig values beyond the shared ones."""
    if contender == "trl default":
        return {}
    return {"gradient_checkpointing": False, "local_rollout_forward_batch_size": max(1, n // 4), "per_device_train_batch_size": min(2, n)}


def tune(folder: Path, base: str, dtype: str, n: int) -> tuple[dict, list]:
    """TRL's best settings here, each by the seconds of one iteration: rows per generation, rows per training step, attention."""
    def measure(settings: dict) -> dict:
        with told_memory() as told:
            told["seconds"] = run_peer(folder, base, dtype, settings, 1, False)["seconds"]
        return {"why_not": told["out_of_memory"]} if "out_of_memory" in told else told

    search = Search(settings_of("trl best", n), measure)
    search.pays({})
    for key, sizes in (("local_rollout_forward_batch_size", [n // 2, n]), ("local_rollout_forward_batch_size", [n // 8, n // 16]),
                       ("per_device_train_batch_size", [4, 8, 16, 32]), ("per_device_train_batch_size", [1])):
        search.climb(key, takewhile(lambda size: size and n % size == 0, sizes))
    search.pays({"attn_implementation": "eager"})
    return search.best, search.tried


# -- a contender's process ------------------------------------------------------------------------------------------------------


def work(contender: str) -> None:
    """Answer the parent's requests: 'warm' (one iteration, and what equality needs), 'tune' (TRL's best), 'run' (one repeat)."""
    quiet_libraries()
    import torch

    settings: dict[str, dict] = {}

    def answer(do: str, key: str, folder: str, base: str, dtype: str, iterations: int, samples: int, threads: int, repeat: int = 0) -> dict:
        start, at, told = time.perf_counter(), Path(folder), {}
        torch.set_num_threads(threads)
        if do == "tune":
            settings[key], told["tried"] = tune(at, base, dtype, samples)
            return told | {"settings": settings[key]}
        forget_memory()
        rounds = 1 if do == "warm" else iterations
        if contender == "ours":
            reward = at.parent / "reward" / "model"
            if not reward.exists():
                make_adapter(base, reward, "new", 1)
            told = run_ours(at, rounds, do == "warm")
        else:
            told = run_peer(at, base, dtype, settings.get(key, settings_of(contender, samples)), rounds, do == "warm")
        return told | {"memory": peak_memory(), "whole": time.perf_counter() - start}

    serve(answer)


# -- comparing ------------------------------------------------------------------------------------------------------------------


def equality(first: dict, ours: list[dict], mine: dict, other: list[dict], dtype: str) -> dict:
    """first: what the contender's first iteration told; mine: ours. The rest are the timed repeats."""
    tokens = [sum(r["answer_tokens"] for r in rs) for rs in (ours, other)]
    differences = {**first["gaps"], "answer_tokens": abs(tokens[1] / tokens[0] - 1)}
    facts = {"same initial weights": first["weights"] == mine["weights"],
             "same number of samples": [r["samples"] for r in ours] == [r["samples"] for r in other],
             "finite losses": all(math.isfinite(x) for r in [*ours, *other] for pair in r["losses"] for x in pair),
             "a loss for every iteration": all(len(r["losses"]) == len(ours[0]["losses"]) for r in [*ours, *other])}
    return judge(differences, LIMITS[dtype], facts) | {"weights": [mine["weights"], first["weights"]]}


def compare(args, base: str, data: str, dtype: str, workers: list[Worker], folder: Path) -> dict:
    """One row of the table for every contender: warm-up and checks, TRL's tuning, then interleaved repeats."""
    write_work(folder, base, data, dtype, args)
    request = {"key": f"{data} {dtype}", "folder": str(folder), "base": base, "dtype": dtype, "iterations": args.iterations, "samples": args.samples,
               "threads": args.threads}
    first, tuned = warm_up(workers, args.no_tune, request)
    results, peak = take_turns([w for w in workers if "out_of_memory" not in first[w.name]], args.repeats, DTYPES[dtype], request)
    jobs = [(len(r["prompt"]), [len(r["answer"])]) for r in json.loads((folder / "handover.json").read_text())]
    floor = floors.ppo(shape_at(base), floors.machine(peak, DTYPES[dtype]), jobs, args.samples)
    rows = []
    for w in workers:
        if w.name not in results:
            rows.append({"contender": w.name, "out_of_memory": first[w.name]["out_of_memory"], "memory_limit": w.memory,
                         "settings": settings_of(w.name, args.samples)})
            continue
        runs = results[w.name]
        seconds = [r["seconds"] / args.iterations for r in runs]
        middle = spread(seconds)["median"]
        row = {"contender": w.name, "samples_per_second": spread([args.samples / s for s in seconds]), "answer_tokens_per_second":
               spread([r["answer_tokens"] / r["seconds"] for r in runs]), "share_generating": spread([r["generate"] / r["seconds"] for r in runs]),
               "fraction_of_floor": floor["total"] / middle, "memory": max(r["memory"] for r in runs), "time_to_first_result": first[w.name]["whole"],
               "losses": runs[0]["losses"]}
        if w.name != "ours":
            row["equality"] = equality(first[w.name], results["ours"], first["ours"], runs, dtype)
            row["ours_is_faster_by"] = faster(results["ours"], runs)
            row["ours_is_faster_by_per_token"] = spread([b["seconds"] / b["answer_tokens"] / (a["seconds"] / a["answer_tokens"])
                                                         for a, b in zip(results["ours"], runs, strict=True)])
            row["settings"] = tuned.get("settings") if w.name == "trl best" and tuned else settings_of(w.name, args.samples)
        rows.append(row)
    return {"data": data, "dtype": dtype, "peak": peak, "floor_seconds": floor, "prompt_tokens": sum(p for p, _ in jobs),
            "answer_tokens": sum(a for _, (a,) in jobs), "tuning": tuned.get("tried"), "contenders": rows}


HEAD = ["data", "dtype", "contender", "samples/s", "ours is faster by", "same work", "answer tokens/s", "generating", "of floor", "memory"]


def line(row: dict, c: dict) -> list[str]:
    if "out_of_memory" in c:
        return [row["data"], row["dtype"], c["contender"], "out of memory", *["-"] * 5, f"> {c['memory_limit'] / 1e9:.0f} GB" if c["memory_limit"] else "-"]
    return [row["data"], row["dtype"], c["contender"], shown(c["samples_per_second"], 3), *checked(c), f"{c['answer_tokens_per_second']['median']:.0f}",
            f"{c['share_generating']['median']:.0%}", f"{c['fraction_of_floor']:.1%}", f"{c['memory'] / 1e9:.2f} GB"]


def main(words: list[str]) -> int:
    quiet_libraries()
    options = parser("ppo", __doc__)
    options.add_argument("--data", nargs="+", default=["chat", "fixed"], choices=["chat", "fixed"])
    options.add_argument("--samples", type=int, default=32, help="samples of an iteration, one a prompt")
    options.add_argument("--iterations", type=int, default=1, help="of a repeat")
    options.add_argument("--memory", type=float, help="GB that each contender's process may take (CPU); one that needs more is told so in its row")
    options.add_argument("--peer", type=Path, default=PEER, help="the folder of TRL 1.12.0")
    args = options.parse_args(words)
    if not (args.peer / "trl").is_dir():
        raise PosttrainError("bench: --peer", f"no TRL in {args.peer.name}", "TRL 1.12.0, the last release with PPO",
                             "Run `make install`, or name its folder.")
    with tempfile.TemporaryDirectory(prefix="bench-ppo-") as tmp:
        base = base_model(args.model, Path(tmp))
        workers = partial(contenders, "bench.ppo", ["ours", "trl default", "trl best"], args.threads, Path(tmp), args.peer.absolute(),
                          args.memory and int(args.memory * 1e9))
        rows = every_row(args, base, compare, workers, Path(tmp), f"{args.samples} samples an iteration, {args.iterations} a repeat")
    version = next((p.name.removesuffix(".dist-info") for p in args.peer.glob("trl-*.dist-info")), None)
    return report(args, "ppo", rows, [line(r, c) for r in rows for c in r["contenders"]], HEAD, peer=version)


if __name__ == "__main__":
    start(main, work)
