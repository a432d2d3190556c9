"""What side-by-side benchmarks share: one process per contender, a clock in the trainer, the machine's own limits, ratios and tables."""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from posttrain.errors import PosttrainError
from posttrain.log import say

ROOT = Path(__file__).parent.parent
MEMORY = "POSTTRAIN_BENCH_MEMORY"  # bytes that a contender's process may take
MATMULS = ((1024, 576, 1536), (2048, 2048, 2048), (64, 576, 49152))  # (M, K, N) on a CPU: a layer, a square, a vocabulary


# -- processes ----------------------------------------------------------------------------------------------------------------


class OutOfMemory(PosttrainError):
    """A contender needs more than its process may take."""


class Worker:
    """A contender in a process of its own, which waits while others run. One JSON line asks, one answers."""

    def __init__(self, module: str, name: str, threads: int, folder: Path, path: Path | None = None, memory: int | None = None):
        """path: a folder of packages that come before the installed ones. memory: bytes that the process may take."""
        self.name, self.log, self.memory = name, folder / f"{name.replace(' ', '_')}.log", memory
        env = os.environ | {"OMP_NUM_THREADS": str(threads)} | ({"PYTHONPATH": str(path)} if path else {}) | ({MEMORY: str(memory)} if memory else {})
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", module, "--worker", name], cwd=ROOT, env=env, text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def ask(self, **request) -> dict:
        """Raises OutOfMemory, and PosttrainError with the end of the process's log where it dies."""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise PosttrainError(f"bench: {self.name}", f"its process ended: {self.log.read_text()[-1500:]}", "an answer", "See the lines above.")
        told = json.loads(line)
        if why := told.get("out_of_memory"):
            raise OutOfMemory(f"bench: {self.name}", why, "room for the work", "Give --memory more, or --samples fewer.")
        return told

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextmanager
def contenders(module: str, names: list[str], threads: int, folder: Path, path: Path | None = None,
               memory: int | None = None) -> Iterator[list[Worker]]:
    """A process for each, closed at the end. path: of packages that all but ours import first. memory: bytes that each may take."""
    workers = [Worker(module, n, threads, folder, None if n.startswith("ours") else path, memory) for n in names]
    try:
        yield workers
    finally:
        for w in workers:
            w.close()


def start(main: Callable[[list[str]], int], work: Callable[[str], None] | None = None) -> None:
    """What `python -m bench.NAME` does: a contender's process works, any other runs `main` and tells an error in one line."""
    if work and sys.argv[1:2] == ["--worker"]:
        if most := os.environ.get(MEMORY):
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (int(most), int(most)))
        return work(sys.argv[2])
    try:
        sys.exit(main(sys.argv[1:]))
    except PosttrainError as e:
        say(f"error: {e}", style="bold red")
        sys.exit(1)


def serve(answer) -> None:
    """The other end: answer(**request) -> dict until the parent closes the pipe. What anything prints goes to the log."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            with told_memory() as told:
                told |= answer(**json.loads(line))
            out.write(json.dumps(told) + "\n")
            out.flush()


@contextmanager
def told_memory() -> Iterator[dict]:
    """A dictionary that says 'out_of_memory' where what happens inside ran out of it; everything else is raised."""
    told: dict = {}
    try:
        yield told
    except (MemoryError, RuntimeError) as e:  # torch raises a plain RuntimeError on a CPU, and a subclass on a GPU
        if not isinstance(e, MemoryError) and not any(words in str(e) for words in ("can't allocate memory", "out of memory", "could not create a memory")):
            raise
        told["out_of_memory"] = str(e).strip().splitlines()[0][:200] or "out of memory"
    gc.collect()


# -- measuring ----------------------------------------------------------------------------------------------------------------


def make_clock(stop_after: int | None = None, embeddings=None):
    """A TrainerCallback: seconds from the beginning of training to the end of every step (batching and logging included, loading
    and saving not), and the positions, padding included, that entered the model. stop_after: end the training at that step;
    embeddings: the modules whose inputs are counted, where the trained model does not tell its own."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends, self.positions, self.hooks = [], 0, []

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def count(self, module, inputs):
            self.positions += inputs[0].numel()

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for module in embeddings or [model.get_input_embeddings()]:
                self.hooks.append(module.register_forward_pre_hook(self.count))
            self.begin = self.now()

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(self.now() - self.begin)
            control.should_training_stop |= len(self.ends) == stop_after
            return control

        def on_train_end(self, args, state, control, **kwargs):
            for hook in self.hooks:
                hook.remove()

        def told(self) -> dict:
            return {"ends": self.ends, "positions": self.positions, "first_step_at": self.begin + self.ends[0]}

    return Clock()


def forget_memory() -> None:
    """Let the next `peak_memory` start from what is held now."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else the most this process had resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def peaks(dtype: str, seconds: float = 0.2) -> dict[str, float]:
    """FLOP/s of plain matrix products 'MxKxN' in a dtype, and bytes/s of a copy (read and write counted), each the best of several."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"

    def best(work, amount: float) -> float:
        work()
        rate, until = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            rate = max(rate, amount / (time.perf_counter() - start))
        return rate

    out = {}
    for m, k, n in ((8192, 8192, 8192),) if cuda else MATMULS:
        a, b = (torch.randn(s, dtype=getattr(torch, dtype), device=device) for s in ((m, k), (k, n)))
        out[f"{m}x{k}x{n}"] = best(lambda a=a, b=b: a @ b, 2.0 * m * k * n)
    source = torch.zeros((1 << 30) if cuda else (1 << 27), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    out["copy"] = best(lambda: target.copy_(source), 2.0 * source.numel())
    return out


class Search:
    """The best settings of a contender, changed one by one, each change kept where it pays.

    measure(settings) tells 'seconds', or 'why_not' where they are no choice; what it tells is kept in `tried`."""

    def __init__(self, settings: dict, measure: Callable[[dict], dict]):
        self.best, self.measure, self.seconds, self.tried = settings, measure, float("inf"), []

    def pays(self, change: dict) -> bool:
        settings = {**self.best, **change}
        told = self.measure(settings)
        self.tried.append({"settings": settings, **told})
        if "why_not" in told or told["seconds"] >= self.seconds:
            return False
        self.best, self.seconds = settings, told["seconds"]
        return True

    def climb(self, key: str, sizes) -> None:
        """One size after another, as long as it pays."""
        for size in sizes:
            if not self.pays({key: size}):
                break


def warm_up(workers: list[Worker], no_tune: bool, request: dict) -> tuple[dict[str, dict], dict]:
    """Each worker's first answer to 'warm', and TRL's best settings ('settings', 'tried'; empty with no_tune), with which it is warmed again.
    A peer that runs out of memory answers 'out_of_memory'."""
    first, tuned = {}, {}
    for w in workers:
        try:
            first[w.name] = w.ask(do="warm", **request)
        except OutOfMemory as e:
            if w.name == "ours":
                raise
            first[w.name] = {"out_of_memory": e.found}
            say(f"  {w.name}: {e.found}")
            continue
        if w.name == "trl best" and not no_tune:
            tuned = w.ask(do="tune", **request)
            w.ask(do="warm", **request)
            say(f"  trl best: {json.dumps(tuned['settings'])}")
    return first, tuned


def every_row(args, base: str, compare: Callable, start_workers: Callable, folder: Path, what: str) -> list[dict]:
    """compare() for every --dtype and --data, each with new workers: old ones keep memory. what: the work of a repeat in words."""
    rows = []
    for dtype in args.dtype:
        for data in args.data:
            say(f"{data}, {dtype}: {what}, {args.repeats} repeats", style="bold")
            with start_workers() as workers:
                rows.append(compare(args, base, data, dtype, workers, folder / dtype / data))
    return rows


def first_budget(runs: Path, section: str) -> list[str]:
    """What keeps ours at the micro-batches that its first run chose, as a run alone does: by now the peers hold memory. Overrides; none for the first."""
    from posttrain.runs import read_json

    first = min(runs.glob(f"*/{section}/manifest.json"), key=lambda p: p.stat().st_ctime, default=None)
    told = first and read_json(first).get("decisions", {}).get("micro_batch_tokens")
    return [f"stages.{section}.micro_batch_tokens={told}"] if told else []


def take_turns(workers: list[Worker], repeats: int, dtype: str, request: dict) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """Each worker's answers to 'run', one after another within every round, and the machine's peaks over the rounds."""
    results, measured = {w.name: [] for w in workers}, []
    for repeat in range(repeats):
        measured.append(peaks(dtype))
        for w in workers:
            results[w.name].append(w.ask(do="run", repeat=repeat, **request))
            say(f"  repeat {repeat + 1}, {w.name}: {results[w.name][-1]['seconds']:.1f} s")
    return results, {k: max(m[k] for m in measured) for k in measured[0]}


def faster(ours: list[dict], other: list[dict]) -> dict:
    """The ratios of seconds within each round."""
    return spread([b["seconds"] / a["seconds"] for a, b in zip(ours, other, strict=True)])


# -- telling ------------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "all": values}


def shown(values: dict, digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} [{values['low']:.{digits}f}-{values['high']:.{digits}f}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def processor() -> str:
    """What the machine calls its accelerator or processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """The options that the benchmarks of sampling and training share."""
    out = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about.splitlines()[0])
    add = out.add_argument
    add("--model", default="smollm2", help="smollm2, tiny, or a model folder or hub name")
    add("--dtype", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    add("--mean", type=int, default=128, help="tokens of a prompt and of an answer: on average (chat) or exactly (fixed)")
    add("--repeats", type=int, default=3)
    add("--no-tune", action="store_true", help="peers keep settings that are good as a rule instead of trying others")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--out", type=Path, default=ROOT / "bench" / "results")
    return out


def report(args, benchmark: str, rows: list[dict], lines: list[list[str]], head: list[str], note: Callable[[dict], str] = lambda row: "", **more) -> int:
    """Write the JSON, print the table. note: what the line of a row's peaks says besides. Returns 1 where a check failed, else 0."""
    from posttrain.runs import provenance, write_json

    flags = {k: v for k, v in vars(args).items() if k not in ("out", "peer", "profile", "shapes")} | {"model": Path(args.model).name}
    made = {"benchmark": benchmark, **provenance(), "processor": processor(), "threads": args.threads, "flags": flags, **more, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{benchmark}-{Path(args.model).name}.json", made)
    print(f"\n{made['processor']}, {args.threads} threads; commit {made['commit']}; TRL {more.get('peer') or made['versions']['trl']}\n")
    for r in rows:
        told = ", ".join(f"{k} {v / 1e9:.0f} {'GB/s' if k == 'copy' else 'GFLOP/s'}" for k, v in r["peak"].items())
        print(f"{r['data']} {r['dtype']}: peak {told}{note(r)}")
    print("\n" + markdown(head, lines))
    return 0 if all(c["equality"]["passed"] for r in rows for c in r["contenders"] if "equality" in c) else 1


def checked(contender: dict) -> tuple[str, str]:
    """'ours is faster by' and the check, for the table; a ratio without its check is void."""
    if "equality" not in contender:
        return "-", "-"
    e = contender["equality"]
    told = ", ".join(f"{k} {v:.1e}" for k, v in e["differences"].items() if v is not None)
    return shown(contender["ours_is_faster_by"]) if e["passed"] else "void", f"{'yes' if e['passed'] else 'NO (' + '; '.join(e['failed']) + ')'}: {told}"


def worst(values: list[float]) -> float:
    """The largest, or nan where one is not a number (max alone may pass over it)."""
    return max(values) if all(x == x for x in values) else float("nan")


def judge(differences: dict[str, float | None], limits: dict[str, float], facts: dict[str, bool]) -> dict:
    """An equality check: every difference within its limit (nan fails), every fact true."""
    ok = {k: v is None or v <= limits[k] for k, v in differences.items()} | facts
    return {"differences": differences, "limits": limits, "facts": facts, "failed": [k for k, v in ok.items() if not v], "passed": all(ok.values())}
