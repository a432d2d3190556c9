"""Best of K beside transformers' generation: answers sampled K a prompt, each scored with a reward model, the best kept.

python -m bench.sampling                      the small real model, chat and fixed lengths, bfloat16 and float32
python -m bench.sampling --model tiny         a random 4-layer model

How to read what it prints: bench/README.md.
"""

import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from bench import floors
from bench.harness import (
    Worker,
    checked,
    contenders,
    every_row,
    faster,
    forget_memory,
    judge,
    parser,
    peak_memory,
    report,
    serve,
    shown,
    spread,
    start,
    take_turns,
)
from bench.workload import DTYPES, Words, base_model, draw, end_hf_at, end_ours_at, make_adapter, roles_of, shape_at, tokenizer_of
from posttrain import chat
from posttrain.__main__ import quiet_libraries
from posttrain.log import say

PEERS = ("hf dynamic", "hf static", "hf continuous")
GREEDY = 2  # prompts answered greedily too
PAGE = 32  # tokens of a page of continuous batching's memory
LIMITS = {"bf16": {"greedy": 1.0, "scores": 5e-2, "log-probability": 3.0, "recorded": 2e-2},
          "fp32": {"greedy": 0.01, "scores": 1e-3, "log-probability": 3.0, "recorded": 1e-4}}


def write_work(folder: Path, base: str, data: str, args) -> None:
    """work.json: prompt ids, tokens of each answer, the end token; and the policy's and the reward model's adapters."""
    tokenizer = tokenizer_of(base)
    words = Words(tokenizer, args.seed)
    lengths = draw(data, args.prompts, args.samples, args.mean, args.seed, words.least())
    prompts = [chat.encode_prompt(tokenizer, [{"role": "user", "content": words.prompt(p)}]) for p, _ in lengths]
    folder.mkdir(parents=True)
    (folder / "work.json").write_text(json.dumps({"prompts": prompts, "lengths": [answers for _, answers in lengths], "pad": tokenizer.pad_token_id,
                                                  "end": chat.end_of_turn(tokenizer)}))
    for name, head, seed in (("policy", None, 2), ("reward", "new", 1)):
        if not (folder.parent / name).exists():
            make_adapter(base, folder.parent / name, head, seed)


class Work:
    """What write_work wrote."""

    def __init__(self, folder: Path):
        told = json.loads((folder / "work.json").read_text())
        self.prompts, self.lengths, self.pad, self.end = told["prompts"], told["lengths"], told["pad"], told["end"]
        self.by_prompt = {tuple(p): n for p, n in zip(self.prompts, self.lengths, strict=True)}
        self.samples, self.most = len(self.lengths[0]), max(max(n) for n in self.lengths)


# -- our side -------------------------------------------------------------------------------------------------------------------


class Ours:
    """posttrain.generate and reward.score, as rejection sampling uses them."""

    def __init__(self, base: str, folder: Path, dtype: str, settings: dict):
        from posttrain.training import choose_budget

        self.work, self.rows = Work(folder), settings["rows"]
        self.roles = roles_of(base, DTYPES[dtype])
        self.roles.add("policy", folder.parent / "policy")
        self.roles.add("reward", folder.parent / "reward", head="saved")
        self.budget = choose_budget(self.roles, self.roles["policy"])
        end_ours_at(self.work.by_prompt)

    def generate(self, seed: int, greedy: bool = False) -> list[list[list[int]]]:
        from posttrain.generate import Sampling, sample

        prompts, samples = (self.work.prompts[:GREEDY], 1) if greedy else (self.work.prompts, self.work.samples)
        out = sample(self.roles, "policy", prompts, samples, Sampling(self.work.most, 0.0 if greedy else 1.0), seed, stop=self.work.end, batch=self.rows)
        self.recorded = [a.logprobs for group in out for a in group]
        return [[a.ids for a in group] for group in out]

    def score(self, answers: list[list[list[int]]]) -> list[list[float]]:
        from posttrain.packing import tree
        from reward.score import scores

        return scores(self.roles, "reward", [tree(p, [[*a, self.work.end] for a in group])
                                             for p, group in zip(self.work.prompts, answers, strict=True)], self.budget)

    def look(self, answers: list[list[list[int]]]) -> dict:
        """Of someone's answers: each one's mean log-probability under the policy, and its score; both by us."""
        import torch

        from posttrain.packing import collate, tree

        means = []
        with torch.inference_mode():
            for p, group in zip(self.work.prompts, answers, strict=True):
                for a in group:
                    batch = collate([tree(p, [a])], [0], "rows", self.work.pad).to(self.roles.device)
                    means.append(self.roles.logprobs("policy", batch).mean().item())
        return {"means": means, "scores": [s for group in self.score(answers) for s in group]}


# -- transformers' side ---------------------------------------------------------------------------------------------------------


class HF:
    """AutoModelForCausalLM.generate (or continuous batching) and AutoModelForSequenceClassification, adapters merged beforehand."""

    def __init__(self, base: str, folder: Path, dtype: str, settings: dict):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        self.work, self.kind, self.settings = Work(folder), settings["kind"], dict(settings)
        load = {"dtype": getattr(torch, DTYPES[dtype]), "attn_implementation": "sdpa"}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = AutoModelForCausalLM.from_pretrained(base, **load)
        reward = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **load)
        self.policy = PeftModel.from_pretrained(policy, folder.parent / "policy").merge_and_unload().to(device).eval()
        self.reward = PeftModel.from_pretrained(reward, folder.parent / "reward").merge_and_unload().to(device).eval()
        self.policy.generation_config.pad_token_id = self.reward.config.pad_token_id = self.work.pad
        self.policy.generation_config.eos_token_id = None
        end_hf_at(self.policy, self.work.by_prompt)

    def generate(self, seed: int, greedy: bool = False) -> list[list[list[int]]]:
        import torch

        torch.manual_seed(seed)
        if self.kind == "hf continuous":
            return self._continuous(greedy)
        w, samples = self.work, 1 if greedy else self.work.samples
        order = sorted(range(len(w.prompts))[:GREEDY if greedy else None], key=lambda i: len(w.prompts[i]))
        out: list = [None] * len(order)
        each = self.settings["prompts"]
        for group in (order[i:i + each] for i in range(0, len(order), each)):
            width = max(len(w.prompts[i]) for i in group)
            ids = torch.tensor([[w.pad] * (width - len(w.prompts[i])) + w.prompts[i] for i in group], device=self.policy.device)
            mask = torch.tensor([[0] * (width - len(w.prompts[i])) + [1] * len(w.prompts[i]) for i in group], device=self.policy.device)
            extra = {"cache_implementation": "static"} if self.kind == "hf static" else {}
            how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            with torch.inference_mode():
                made = self.policy.generate(input_ids=ids, attention_mask=mask, max_new_tokens=w.most, num_return_sequences=samples, **how, **extra)
            answers = made[:, width:].tolist()
            for k, i in enumerate(group):
                out[i] = [answers[k * samples + s][:w.lengths[i][s]] for s in range(samples)]
        return out

    def _continuous(self, greedy: bool) -> list[list[list[int]]]:
        """A request a sample, each with its own length: transformers' manager batches them as it sees fit. Its pool of keys and values holds
        the whole work (by itself it takes 60 % of a CPU's memory, with masks as wide) and is kept between rounds."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        w, samples = self.work, 1 if greedy else self.work.samples
        how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(max_new_tokens=w.most, pad_token_id=w.pad, eos_token_id=-1, **how)
        wanted = {f"{i}-{s}": (i, s) for i in range(len(w.prompts))[:GREEDY if greedy else None] for s in range(samples)}
        out: list = [[None] * samples for _ in range(GREEDY if greedy else len(w.prompts))]
        pages = sum(-(-(len(p) + n) // PAGE) + 1 for p, group in zip(w.prompts, w.lengths, strict=True) for n in group)
        pool = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=self.settings["batch_tokens"])
        with self.policy.continuous_batching_context_manager(generation_config=config, continuous_batching_config=pool, timeout=5,
                                                             persistent_manager=not greedy) as manager:
            for name, (i, s) in wanted.items():
                manager.add_request(w.prompts[i], request_id=name, max_new_tokens=w.lengths[i][s], eos_token_id=-1)
            left = len(wanted)
            while left:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    i, s = wanted[result.request_id]
                    out[i][s], left = list(result.generated_tokens), left - 1
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped before all requests were done")
        return out

    def score(self, answers: list[list[list[int]]]) -> list[list[float]]:
        import torch

        rows = [(i, s, [*p, *a, self.work.end]) for i, (p, group) in enumerate(zip(self.work.prompts, answers, strict=True)) for s, a in enumerate(group)]
        rows.sort(key=lambda r: -len(r[2]))
        out, each = [[0.0] * len(group) for group in answers], self.settings["score_batch"]
        with torch.inference_mode():
            for some in (rows[i:i + each] for i in range(0, len(rows), each)):
                width = len(some[0][2])
                ids = torch.tensor([r[2] + [self.work.pad] * (width - len(r[2])) for r in some], device=self.reward.device)
                mask = torch.tensor([[1] * len(r[2]) + [0] * (width - len(r[2])) for r in some], device=self.reward.device)
                for (i, s, _), x in zip(some, self.reward(input_ids=ids, attention_mask=mask).logits[:, 0].tolist(), strict=True):
                    out[i][s] = x
        return out

    def tune(self) -> list[dict]:
        """The best number of prompts a batch (all their samples side by side), or of tokens a pass in continuous
        batching, then of sequences a scoring batch; as long as it pays."""
        tried, answers = [], None

        def climb(key: str, sizes: list[int], run) -> None:
            best_time = float("inf")
            for size in sizes:
                before, self.settings[key] = self.settings[key], size
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
                tried.append({key: size, "seconds": took})
                if took >= best_time:
                    self.settings[key] = before
                    return
                best_time = took

        def run():
            nonlocal answers
            answers = self.generate(0)

        n = len(self.work.prompts)
        if self.kind != "hf continuous":
            climb("prompts", [k for k in (1, 2, 4, 8, 16) if k <= n], run)
        else:
            def anew():
                self.policy.destroy_cached_continuous_batching_manager()
                run()

            climb("batch_tokens", [256, 512, 1024, 2048], anew)
            anew()
        climb("score_batch", [2, 4, 8, 16, 32], lambda: self.score(answers))
        return tried


# -- a contender's process ------------------------------------------------------------------------------------------------------


def work(contender: str) -> None:
    """Answer the parent's requests: 'warm' (load, one short round, greedy answers), 'tune', 'run' (one repeat), 'look' (ours alone)."""
    quiet_libraries()
    import torch

    held: dict = {}

    def answer(do: str, key: str, folder: str, base: str, dtype: str, threads: int, rows: int, repeat: int = 0, answers=None) -> dict:
        torch.set_num_threads(threads)
        if do == "warm":
            start = time.perf_counter()
            held.clear()
            settings = {"kind": contender, "rows": rows, "score_batch": 8, "batch_tokens": 512}
            settings["prompts"] = max(1, rows // Work(Path(folder)).samples)
            forget_memory()
            try:
                held[key] = (Ours if contender == "ours" else HF)(base, Path(folder), dtype, settings)
                side = held[key]
                greedy = side.generate(0, greedy=True)
            except Exception as e:
                if contender == "ours":
                    raise
                return {"failed": f"{type(e).__name__}: {str(e)[:300]}"}
            return {"greedy": greedy, "whole": time.perf_counter() - start}
        side = held[key]
        if do == "tune":
            return {"tried": side.tune(), "settings": {k: side.settings[k] for k in ("prompts", "batch_tokens", "score_batch")}}
        if do == "look":
            return side.look(answers)
        forget_memory()
        start = time.perf_counter()
        made = side.generate(repeat + 1)
        between = time.perf_counter()
        scores = side.score(made)
        best = [max(range(len(s)), key=s.__getitem__) for s in scores]
        told = {"seconds": time.perf_counter() - start, "generate": between - start, "memory": peak_memory(), "best": best,
                "tokens": sum(len(a) for g in made for a in g)}
        if repeat == 0:
            told |= {"answers": made, "scores": [s for group in scores for s in group]}
            told |= {"recorded": [statistics.fmean(r) for r in side.recorded]} if contender == "ours" else {}
        return told

    serve(answer)


# -- comparing ------------------------------------------------------------------------------------------------------------------


def equality(mine: dict, theirs: dict, greedy: tuple, dtype: str, ours: Worker, request: dict) -> dict:
    """mine, theirs: the first repeats; greedy: both sides' greedy answers. What ours says of their answers is beside what they say."""
    look = [ours.ask(do="look", answers=r["answers"], **request) for r in (mine, theirs)]
    pairs = [(a, b) for g, h in zip(*greedy, strict=True) for a, b in zip(g[0], h[0], strict=True)]
    gap = [b - a for a, b in zip(look[0]["means"], look[1]["means"], strict=True)]
    error = statistics.stdev(gap) / len(gap) ** 0.5
    differences = {"greedy": sum(a != b for a, b in pairs) / len(pairs), "scores": _gap(look[1]["scores"], theirs["scores"]),
                   "log-probability": abs(statistics.fmean(gap)) / error if error else 0.0, "recorded": _gap(look[0]["means"], mine["recorded"])}
    shape = [[[len(a) for a in group] for group in r["answers"]] for r in (mine, theirs)]
    return judge(differences, LIMITS[dtype], {"same number of answers and tokens": shape[0] == shape[1]})


def _gap(a: list[float], b: list[float]) -> float:
    return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def compare(args, base: str, data: str, dtype: str, workers: list[Worker], folder: Path) -> dict:
    """One row of the table for every contender: warm-up, tuning, interleaved repeats, checks."""
    write_work(folder, base, data, args)
    request = {"key": f"{data} {dtype}", "folder": str(folder), "base": base, "dtype": dtype, "threads": args.threads, "rows": args.rows}
    first, tuned, failed = {}, {}, {}
    for w in workers:
        first[w.name] = w.ask(do="warm", **request)
        if "failed" in first[w.name]:
            failed[w.name] = first[w.name]["failed"]
            say(f"  {w.name} does not run here: {failed[w.name]}")
        elif w.name != "ours" and not args.no_tune:
            tuned[w.name] = w.ask(do="tune", **request)
            say(f"  {w.name}: {json.dumps(tuned[w.name]['settings'])}")
    workers = [w for w in workers if w.name not in failed]
    results, peak = take_turns(workers, args.repeats, DTYPES[dtype], request)
    task, machine, shape = Work(folder), floors.machine(peak, DTYPES[dtype]), shape_at(base)
    jobs, answers = [(len(p), n) for p, n in zip(task.prompts, task.lengths, strict=True)], len(task.prompts) * task.samples
    floor, floor_shared = (floors.best_of(shape, machine, jobs, args.rows, shared) for shared in (False, True))
    rows = []
    for w in workers:
        runs = results[w.name]
        seconds = [r["seconds"] for r in runs]
        row = {"contender": w.name, "samples_per_second": spread([answers / s for s in seconds]),
               "tokens_per_second": spread([r["tokens"] / r["seconds"] for r in runs]),
               "share_generating": spread([r["generate"] / r["seconds"] for r in runs]),
               "decoded_tokens_per_second": spread([r["tokens"] / r["generate"] for r in runs]), "fraction_of_floor": floor / spread(seconds)["median"],
               "fraction_of_floor_shared": floor_shared / spread(seconds)["median"], "memory": max(r["memory"] for r in runs),
               "time_to_first_result": first[w.name]["whole"]}
        if w.name != "ours":
            ours = next(x for x in workers if x.name == "ours")
            row["equality"] = equality(results["ours"][0], runs[0], (first["ours"]["greedy"], first[w.name]["greedy"]), dtype, ours, request)
            row["ours_is_faster_by"] = faster(results["ours"], runs)
            row["settings"] = tuned.get(w.name, {}).get("settings")
        rows.append(row)
    return {"data": data, "dtype": dtype, "peak": peak, "floor_seconds": floor, "floor_seconds_shared": floor_shared, "answers": answers,
            "answer_tokens": sum(map(sum, task.lengths)), "tuning": {k: v["tried"] for k, v in tuned.items()}, "not_run": failed, "contenders": rows}


HEAD = ["data", "dtype", "contender", "samples/s", "ours is faster by", "same work", "tokens/s", "generating", "of floor", "of floor, shared", "memory"]


def line(row: dict, c: dict) -> list[str]:
    return [row["data"], row["dtype"], c["contender"], shown(c["samples_per_second"], 2), *checked(c), f"{c['tokens_per_second']['median']:.0f}",
            f"{c['share_generating']['median']:.0%}", f"{c['fraction_of_floor']:.1%}", f"{c['fraction_of_floor_shared']:.1%}", f"{c['memory'] / 1e9:.2f} GB"]


def main(words: list[str]) -> int:
    quiet_libraries()
    options = parser("sampling", __doc__)
    options.add_argument("--data", nargs="+", default=["chat", "fixed"], choices=["chat", "fixed"])
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--samples", type=int, default=8, help="answers a prompt")
    options.add_argument("--rows", type=int, default=64, help="answers of ours in flight; the peers' are tuned")
    options.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    args = options.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="bench-sampling-") as tmp:
        base = base_model(args.model, Path(tmp))
        workers = partial(contenders, "bench.sampling", ["ours", *args.peers], args.threads, Path(tmp))
        rows = every_row(args, base, compare, workers, Path(tmp), f"{args.prompts} prompts, best of {args.samples}")
    done = report(args, "sampling", rows, [line(r, c) for r in rows for c in r["contenders"]], HEAD)
    for r in rows:
        for name, why in r["not_run"].items():
            print(f"{r['data']} {r['dtype']}: {name} not run: {why}")
    return done


if __name__ == "__main__":
    start(main, work)
