"""What side-by-side benchmarks share: one process per contender, a clock in the trainer, the machine's own limits, ratios and tables."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from posttrain.errors import PosttrainError

ROOT = Path(__file__).parent.parent
MATMULS = ((1024, 576, 1536), (2048, 2048, 2048), (64, 576, 49152))  # (M, K, N) on a CPU: a layer, a square, a vocabulary


# -- processes ----------------------------------------------------------------------------------------------------------------


class Worker:
    """A contender in a process of its own, which waits while others run. One JSON line asks, one answers."""

    def __init__(self, module: str, name: str, threads: int, folder: Path):
        self.name, self.log = name, folder / f"{name.replace(' ', '_')}.log"
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", module, "--worker", name], cwd=ROOT, env=env, text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def ask(self, **request) -> dict:
        """Raises PosttrainError with the end of the process's log where it dies."""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise PosttrainError(f"bench: {self.name}", f"its process ended: {self.log.read_text()[-1500:]}", "an answer", "See the lines above.")
        return json.loads(line)

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def serve(answer) -> None:
    """The other end: answer(**request) -> dict until the parent closes the pipe. What anything prints goes to the log."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            out.write(json.dumps(answer(**json.loads(line))) + "\n")
            out.flush()


# -- measuring ----------------------------------------------------------------------------------------------------------------


def make_clock(stop_after: int | None = None):
    """A TrainerCallback: seconds from the beginning of training to the end of every step (batching and logging included, loading
    and saving not), and the positions, padding included, that entered the model. stop_after: end the training at that step."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends, self.positions = [], 0

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def count(self, module, inputs):
            self.positions += inputs[0].numel()

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.hook = model.get_input_embeddings().register_forward_pre_hook(self.count)
            self.begin = self.now()

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(self.now() - self.begin)
            control.should_training_stop |= len(self.ends) == stop_after
            return control

        def on_train_end(self, args, state, control, **kwargs):
            self.hook.remove()

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
