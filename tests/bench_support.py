"""What the tests of the benchmarks share: one run of a benchmark in a process of its own, as a user starts it, and a shape to count by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

from posttrain.shape import shape_of

ROOT = Path(__file__).parent.parent
ONE_LAYER = shape_of({"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 10, "model_type": "llama"})


def run_bench(name: str, out: Path, *words: str) -> tuple[str, dict]:
    """(what `python -m bench.NAME --model tiny` printed, its JSON), one thread, one untuned repeat, without real data."""
    env = {k: v for k, v in os.environ.items() if k != "POSTTRAIN_REAL_DATA"}
    command = [sys.executable, "-m", f"bench.{name}", "--model", "tiny", "--repeats", "1", "--threads", "1", "--no-tune", *words, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / f"{name}-tiny.json").read_text(encoding="utf-8"))
