"""Two processes (gloo, CPU) against one. PPO: the same answers, metrics and weights, also after a kill. Rejection sampling and collect, which
share whole chunks: the same bytes, also after a kill; an error in one process ends both. And what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rlhf_support import REWARDS, make_run, started
from safetensors.torch import load_file

from posttrain import distributed
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.runs import run_sections
from rlhf import ppo

pytestmark = pytest.mark.timeout(900)  # every launch imports everything twice
ROOT = Path(__file__).parent.parent
STAGE = {"stage": "ppo", "prompts": "prompts", "policy": "@sft", **REWARDS, "iterations": 2, "batch_size": 14, "mini_batch_size": 6,
         "samples_per_prompt": 2, "max_new_tokens": 8, "learning_rate": 3e-3, "critic_learning_rate": 3e-3, "eval_every": 1, "eval_prompts": 5,
         "save_steps": 1, "critic_warmup": 1, "micro_batch_tokens": 256, "temperature": 0.5, "safety_threshold": 0.4, "sample_every": 1,
         "kl_coef": 0.05, "entropy": True}
CLOCK = ("time", "ppo/seconds_generate", "ppo/seconds_score", "ppo/seconds_update", "ppo/tokens_per_second", "ppo/peak_memory_gb")


def launch(recipe: str, *words: str, code: str | None = None) -> subprocess.CompletedProcess:
    """`python -m rlhf RECIPE ...` in two processes; code: run this instead."""
    what = ["--no-python", sys.executable, "-c", code] if code else ["-m", "rlhf"]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *what, recipe, *words],
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)


def metrics(section) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_lines(section.folder / "metrics.jsonl")]


def same(one, two) -> None:
    """Two finished PPO sections: every number within 1e-5 (the order of additions differs), everything else equal."""
    rows, others = metrics(one), metrics(two)
    assert [r.keys() for r in rows] == [r.keys() for r in others] and len(rows) == 3
    for a, b in zip(rows, others, strict=True):
        assert b == pytest.approx(a, abs=2e-5, rel=1e-4)
    assert (two.folder / "samples.jsonl").read_text().count("\n") == 8
    told = [[(r["step"], r["prompt"], r["answer"]) for r in read_lines(s.folder / "samples.jsonl")] for s in (one, two)]
    assert told[0] == told[1]
    weights = [load_file(s.folder / "model" / "adapter_model.safetensors") for s in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert (value - weights[1][key]).abs().max() < 1e-5, key
    assert sorted(p.name for p in one.folder.iterdir()) == sorted(p.name for p in two.folder.iterdir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    section = started(make_run(tmp_path_factory, tmp_path_factory.mktemp("alone"), {"ppo": STAGE}), "ppo")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ppo, "keep_best", ppo.keep_best)
        exec(KEEP_LAST, {})
        ppo.run(section)
    assert section.results()["best_iteration"] == 2
    return section


# The output is the last policy, and not the start's where two iterations gain nothing on the watched prompts.
KEEP_LAST = """
from rlhf import ppo
keep_best = ppo.keep_best
def keep_last(section, roles, state, *rest):
    state.best = None
    keep_best(section, roles, state, *rest)
ppo.keep_best = keep_last
"""
GO_ON = KEEP_LAST + """
import sys
sys.argv[0] = "rlhf"
import rlhf.__main__
"""
KILL = KEEP_LAST + """
import sys
from posttrain import distributed
from rlhf import checkpoint
real = checkpoint.save
def save(section, roles, *rest):
    real(section, roles, *rest)
    if rest[-1].iteration == 1 and distributed.rank() == 1:
        raise SystemExit(3)
checkpoint.save = save
sys.argv[0] = "rlhf"
import rlhf.__main__
"""


def test_two_processes_do_what_one_does_and_go_on_after_a_kill(alone, tmp_path_factory):
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("two"), {"ppo": STAGE})
    section = run.section("ppo")
    cut = launch(run.recipe.path, "ppo", code=KILL)
    assert cut.returncode and section.state() == "started", cut.stderr[-2000:]
    assert (section.folder / "checkpoint-1").exists() and not (section.folder / "checkpoint-2").exists(), cut.stdout + cut.stderr[-3000:]
    done = launch(run.recipe.path, "ppo", code=GO_ON)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("going on after iteration 1 of 2") == 1 and "2 processes" in done.stdout  # one of them speaks
    assert section.state() == "done"
    same(alone, section)


TRAINED = {"tuned": {"stage": "sft", "model": "@sft", "data": "demonstrations", "packing": False, "batch_size": 5, "max_steps": 4, "max_length": 256,
                     "learning_rate": 1e-3, "save_steps": 2},
           "judged": {"stage": "reward", "model": "@sft", "own": "safety", "other": "helpful", "safety_loss_weight": 1.0, "batch_size": 1, "max_steps": 3,
                      "max_length": 256, "learning_rate": 1e-3, "save_steps": 100}}  # a step of one pair: one process has nothing to do
KILL_TRAINING = """
import os, signal, sys
from posttrain import distributed, training
real = training.complete
def complete(folder):
    real(folder)
    os.kill(os.getpid(), signal.SIGKILL)
training.complete = complete
sys.argv[0] = "sft"
import sft.__main__
"""


def test_two_processes_train_as_one_does_and_go_on_after_a_kill(tmp_path_factory):
    """Supervised fine-tuning, killed after its first checkpoint, and a reward model: metrics, adapters and heads of one process."""
    alone = make_run(tmp_path_factory, tmp_path_factory.mktemp("trained-alone"), TRAINED)
    run_sections(alone, list(TRAINED))
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("trained-two"), TRAINED)
    section = run.section("tuned")
    cut = launch(run.recipe.path, "tuned", code=KILL_TRAINING)
    assert cut.returncode and section.state() == "started" and (section.folder / "checkpoint-2" / "checksums.json").exists(), cut.stderr[-3000:]
    done = launch("run", run.recipe.path, code="import sys; from posttrain.__main__ import app, guarded; guarded(app)")
    assert done.returncode == 0 and done.stdout.count("going on after step 2 of 4") == 1, done.stdout + done.stderr[-3000:]
    for name in TRAINED:
        one, two = alone.section(name), run.section(name)
        manifest = json.loads((two.folder / "manifest.json").read_text())
        assert two.state() == "done" and manifest["decisions"]["processes"] == 2 and manifest.get("exact", True)
        rows = [[{k: v for k, v in r.items() if v is not None and k != "time" and "per_second" not in k and "peak_memory" not in k}
                 for r in read_lines(s.folder / "metrics.jsonl")] for s in (one, two)]
        for a, b in zip(*rows, strict=True):
            assert b == pytest.approx(a, abs=2e-5, rel=1e-4)
        weights = [load_file(s.folder / "model" / "adapter_model.safetensors") for s in (one, two)]
        assert weights[0].keys() == weights[1].keys() and all((v - weights[1][k]).abs().max() < 2e-5 for k, v in weights[0].items())
        before = load_file(run.section("sft").folder / "model" / "adapter_model.safetensors")
        assert max((before[k] - v).abs().max() for k, v in weights[1].items() if k in before) > 1e-3  # they trained


ROUND = {"stage": "rejection", "prompts": "prompts", "policy": "@sft", **REWARDS, "samples_per_prompt": 3, "max_new_tokens": 12, "rows": 12,
         "chunk": 4, "batch": 8, "temperature": [1.1, 0.3, 0.7], "sweep_prompts": 6, "micro_batch_tokens": 256, "safety_threshold": 0.5}
CHUNKED = {"first": ROUND, "pooled": ROUND | {"temperature": 0.4, "pool": ["@first", "demonstrations"]},
           "week": {"stage": "collect", "prompts": "prompts", "policies": ["@sft"], "temperatures": [0.3, 0.6], **REWARDS, "rows": 12, "chunk": 3,
                    "batch": 8, "max_new_tokens": 12}}
WATCH = """
import os, signal, sys, time
from pathlib import Path
from posttrain import chunks, distributed
real, rank, log = chunks.write_chunk, distributed.rank(), Path({log!r})
def write(path, rows):
    until = time.time() + 120
    def wait_for(other):
        while not (log / other).exists() and time.time() < until:
            time.sleep(0.02)
    if rank == 0:
        wait_for("1")  # however fast this one is, the other has its turn
    real(path, rows)
    with (log / str(rank)).open("a") as f:
        print(path.relative_to({run!r}), file=f)
    if {dies}:  # one dies after its first chunk, while the other is at work on its second
        wait_for("0")
        os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(900)
chunks.write_chunk = write
sys.argv[0] = "rlhf"
import rlhf.__main__
"""


def made_by(log: Path) -> list[list[str]]:
    return [(log / str(rank)).read_text().splitlines() for rank in (0, 1)]


def contents(run, name: str) -> dict[str, bytes]:
    """Everything a section made, but for the manifest with its clock."""
    folder = run.folder / name
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("manifest.json", "metrics.jsonl")}


def test_two_processes_make_the_chunks_of_one_and_after_a_kill_the_missing_ones(tmp_path_factory, tmp_path):
    alone = make_run(tmp_path_factory, tmp_path_factory.mktemp("chunks-alone"), CHUNKED)
    run_sections(alone, list(CHUNKED))
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("chunks-two"), CHUNKED)
    logs = [tmp_path / name for name in ("cut", "again")]
    for log in logs:
        log.mkdir()

    cut = launch(run.recipe.path, "first", code=WATCH.format(log=str(logs[0]), run=str(run.folder), dies=True))
    assert cut.returncode and run.section("first").state() == "started", cut.stdout + cut.stderr[-2000:]
    kept = {run.folder / name: (run.folder / name).stat().st_mtime_ns for part in made_by(logs[0]) for name in part}
    assert [len(part) for part in made_by(logs[0])] == [1, 1]

    done = launch(run.recipe.path, *CHUNKED, code=WATCH.format(log=str(logs[1]), run=str(run.folder), dies=False))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for name in CHUNKED:
        assert contents(run, name) == contents(alone, name)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # they were not made again
    assert done.stdout.count("first (rejection): goes on where it was cut off") == 1
    zero, one = made_by(logs[1])
    whole = [str(p.relative_to(run.folder)) for name in CHUNKED for p in (run.folder / name).rglob("*.json") if p.parent.name in ("chunks", "pool")]
    assert sorted([*zero, *one, *(str(path.relative_to(run.folder)) for path in kept)]) == sorted(whole) and zero and one
    assert "first: sampling at each temperature in 2 processes: 6 chunks in" in done.stdout and done.stdout.count("week: sampling in") == 1


BROKEN = """
import sys, time
import torch
from pathlib import Path
from posttrain import chunks, distributed
from rlhf import rejection
rank, began, scored, written = distributed.rank(), Path({began!r}), rejection.sample_and_score, chunks.write_chunk
def sample_and_score(roles, *rest):
    if rank == 1:
        began.touch()
        with torch.no_grad():
            next(p for n, p in roles["policy"].net.named_parameters() if f".{{roles['policy'].adapter}}." in n).fill_(float("nan"))
    return scored(roles, *rest)
def write_chunk(path, rows):
    while not began.exists():
        time.sleep(0.02)
    written(path, rows)
rejection.sample_and_score, chunks.write_chunk = sample_and_score, write_chunk
sys.argv[0] = "rlhf"
import rlhf.__main__
"""


def test_an_error_in_one_process_ends_both(tmp_path_factory, tmp_path):
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("chunks-broken"), {"first": ROUND | {"temperature": 0.5}})
    cut = launch(run.recipe.path, "first", code=BROKEN.format(began=str(tmp_path / "began")))
    assert cut.returncode and run.section("first").state() == "started"
    assert "error (process 1): policy: the policy's log-probabilities are not finite" in cut.stderr, cut.stdout + cut.stderr[-3000:]
    assert "[rank0]" not in cut.stderr  # the other was ended by the launcher or says that it stands alone: no traceback of a library


def test_a_section_that_needs_one_process_says_so(tmp_path_factory):
    stage = {"stage": "evaluate", "models": {"sft": "@sft"}, "prompts": "prompts", **REWARDS, "samples_per_prompt": 2}
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("refused"), {"eval": stage})
    done = launch(run.recipe.path, code="import sys; sys.argv[0] = 'safety'; import safety.__main__")
    assert done.returncode and not (run.folder / "eval").exists()
    told = done.stdout + done.stderr
    assert "2 processes for a section of kind evaluate" in told and f"python -m safety {run.recipe.path} eval" in told


EXCHANGES = """
import importlib, json, sys, torch
from posttrain import distributed as d
from posttrain.errors import PosttrainError
d.join()
r = d.rank()
out = {"from_main": d.from_main(lambda: ["only", r]), "gather": d.gather("ab"[r] * (r + 1)), "share": d.share(5),
       "assemble": d.assemble([i * 10 for i in d.share(5)]), "few": d.assemble([i for i in d.share(1)]), "numbers": d.add_numbers({"x": 1.5 + r})}
x = torch.full((2,), 1.0 + r)
d.add(x)
p = [torch.nn.Parameter(torch.zeros(s)) for s in ((2, 3), (4,), (1,))]
p[0].grad = torch.full((2, 3), 1.0 + r)
if r:
    p[1].grad = torch.ones(4)
d.FLAT = 7
d.add_gradients(p)
out |= {"add": x.tolist(), "grads": [None if q.grad is None else q.grad.flatten().tolist() for q in p]}
out |= {"turns": list(d.turns(list("abcdefg")))}
d.wait()
count = d.Count()
count.add(5 + r)
d.wait()
out |= {"count": count.add(0), "again": len(d.gather(list(d.turns([])))), "own": d.Count(shared=False).add(5 + r) - r}
with d.alone():
    out |= {"alone": [d.world(), d.rank(), d.is_main(), d.share(3), d.gather("x"), d.Count().add(1), list(d.turns([1, 2]))], "here": d.on_this_machine()}
out |= {"after": d.world()}
d.agree([torch.zeros(3)], "here")
try:
    d.agree([torch.tensor([float(r)])], "here")
except PosttrainError as e:
    out["drift"] = str(e)
importlib.reload(d)  # the launcher may start both again, on the same store
out |= {"started again": d.Count().add(0)}
open(f"{sys.argv[1]}/{r}.json", "w").write(json.dumps(out))
"""


def test_the_exchanges(tmp_path):
    done = launch(str(tmp_path), code=EXCHANGES)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1)]
    assert [t.pop("share") for t in told] == [[0, 2, 4], [1, 3]]
    assert sorted(x for t in told for x in t.pop("turns")) == list("abcdefg")
    assert told[0] == told[1]
    assert "different weights" in told[0].pop("drift")
    assert told[0] == {"from_main": ["only", 0], "gather": ["a", "bb"], "assemble": [0, 10, 20, 30, 40], "few": [0], "numbers": {"x": 4.0},
                       "add": [3.0, 3.0], "grads": [[3.0] * 6, [1.0] * 4, None], "count": 11, "again": 2, "own": 5, "started again": 0,
                       "alone": [1, 0, True, [0, 1, 2], ["x"], 1, [1, 2]], "here": 2, "after": 2}


def test_one_process_exchanges_nothing():
    assert distributed.world() == 1 and distributed.is_main() and distributed.share(3) == [0, 1, 2]
    x, p = torch.ones(2), torch.nn.Parameter(torch.ones(1))
    distributed.add(x)
    distributed.add_gradients([p])
    distributed.agree([p], "here")
    assert x.tolist() == [1, 1] and p.grad is None and distributed.assemble(["a"]) == ["a"] and distributed.from_main(lambda: 5) == 5
    assert list(distributed.turns(["a", "b"])) == ["a", "b"] and distributed.Count().add(3) == 3


def test_a_launcher_counts_only_where_one_started_us(monkeypatch):
    """A scheduler may export WORLD_SIZE for jobs that run one process."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert distributed.world() == 1 and distributed.is_main()
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.world() == 8 and distributed.rank() == 3 and not distributed.is_main()


@pytest.mark.parametrize("given, told", [
    ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "it has started one"),  # what `accelerate launch --cpu --num_processes 2` sets
    ({"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "FSDP is asked for in version 1"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, None),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "DeepSpeed is asked for"),
    ({"ACCELERATE_USE_CPU": "True"}, None), ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}, None)])
def test_what_a_launcher_was_asked_for_must_happen(monkeypatch, given, told):
    for key in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(key, raising=False)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    if told is None:
        return distributed.check_launcher()
    with pytest.raises(PosttrainError, match=told):
        distributed.join()  # before it meets anybody


@pytest.mark.parametrize("name, kind", [("single", "NO"), ("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED"),
                                        ("deepspeed_zero3", "DEEPSPEED")])
def test_the_launch_files_start_what_they_say(name, kind):
    """accelerate reads them and hands its settings on; the one for several GPUs is only read here, there being none."""
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    told = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert str(told.distributed_type).split(".")[-1] == kind and (told.num_processes > 1) is (name != "single")
    assert {*yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text())} <= {*vars(told)} | {"debug"}


def test_a_mini_batch_is_shared_by_tokens(monkeypatch):
    lengths = [9, 1, 2, 8, 3, 7]
    trees = [list(range(n)) for n in lengths]  # a tree has a length, and nothing else is asked
    monkeypatch.setattr(distributed, "world", lambda: 2)
    parts = []
    for r in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda r=r: r)
        parts.append(distributed.share_by_length([5, 0, 3, 1, 2], trees))
    assert sorted(parts[0] + parts[1]) == [0, 1, 2, 3, 5] and abs(sum(lengths[i] for i in parts[0]) - sum(lengths[i] for i in parts[1])) <= 3
