"""The PPO benchmark: it runs beside TRL 1.12, both sides do the same work, it tells what it should. No timings."""

import json
import tempfile
from pathlib import Path

import pytest
from bench_support import run_bench

from bench import floors, harness
from bench import ppo as bench
from posttrain.errors import PosttrainError
from posttrain.shape import shape_of

SMALL = shape_of({"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50, "model_type": "llama"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what it printed, its JSON) of the smallest run."""
    if not (bench.PEER / "trl").is_dir():
        pytest.skip("TRL 1.12, the last release with PPO, is not in .venv/trl-1.12: run `make install`")
    return run_bench("ppo", tmp_path_factory.mktemp("bench"), "--samples", "4", "--mean", "40", "--data", "chat", "--dtype", "fp32")


def test_both_sides_do_the_same_work(run):
    (row,) = run[1]["rows"]
    assert [c["contender"] for c in row["contenders"]] == ["ours", "trl default", "trl best"] and run[1]["peer"] == "trl-1.12.0"
    for c in row["contenders"][1:]:
        e = c["equality"]
        assert e["passed"] and all(e["facts"].values()) and {*e["differences"]} == {"logprobs", "ref_logprobs", "values", "scores", "answer_tokens"}
        assert e["differences"]["scores"] < 1e-3 and len(c["losses"]) == 1
    assert all(0 < c["fraction_of_floor"] < 1.2 and c["share_generating"]["median"] < 1 for c in row["contenders"])
    assert "| chat | fp32  | trl best" in run[0] and str(Path.home()) + "/" not in json.dumps(run[1])


def test_an_absent_peer_is_told(tmp_path):
    with pytest.raises(PosttrainError, match="1.12.0"):
        bench.main(["--model", "tiny", "--peer", str(tmp_path)])


def test_a_peer_without_room_has_a_row_that_says_so(monkeypatch):
    """The limit is the process's own: torch cannot have more, and the others go on."""
    script = ("from bench import harness\nimport torch\n"
              "harness.start(None, lambda name: harness.serve(lambda do: {'numbers': len(torch.zeros(1 << 28 if do == 'warm' else 1))}))")
    monkeypatch.setattr(harness.subprocess, "Popen", lambda words, _kept=harness.subprocess.Popen, **more: _kept([words[0], "-c", script, *words[3:]], **more))
    with harness.contenders("unused", ["trl default"], 1, Path(tempfile.mkdtemp()), memory=600_000_000) as (peer,):
        first, _ = harness.warm_up([peer], True, {})
        assert "allocate memory" in first["trl default"]["out_of_memory"] and peer.ask(do="run") == {"numbers": 1}
    row = {"data": "chat", "dtype": "bf16"}
    told = bench.line(row, {"contender": "trl default", "out_of_memory": "told", "memory_limit": 16_000_000_000})
    assert told[3:5] == ["out of memory", "-"] and told[-1] == "> 16 GB" and len(told) == len(bench.HEAD)
    with pytest.raises(ValueError), harness.told_memory():
        raise ValueError("another fault")
    with pytest.raises(RuntimeError), harness.told_memory():
        raise RuntimeError("shapes do not fit")


def repeat(**change) -> dict:
    return {"answer_tokens": 1000, "samples": 4, "losses": [[0.1, 0.2]], "seconds": 1.0} | change


FIRST = {"weights": {"policy": "a", "critic": "b"}, "gaps": {"logprobs": 1e-6, "ref_logprobs": 1e-6, "values": 0.0, "scores": 1e-6}}


@pytest.mark.parametrize("first, other, passed", [
    (FIRST, repeat(), True), (FIRST, repeat(answer_tokens=1002), False), (FIRST, repeat(samples=5), False),
    (FIRST, repeat(losses=[[float("nan"), 0.2]]), False), (FIRST, repeat(losses=[]), False),
    (FIRST | {"weights": {"policy": "a", "critic": "c"}}, repeat(), False), (FIRST | {"gaps": FIRST["gaps"] | {"values": 1e-3}}, repeat(), False)])
def test_a_difference_voids_the_ratio(first, other, passed):
    assert bench.equality(first, [repeat()], {"weights": FIRST["weights"]}, [other], "fp32")["passed"] is passed


def test_the_floor_adds_up():
    """Each part by the count on paper; a second epoch adds one more update."""
    machine, jobs = floors.Machine(1e6, 1e12, 4), [(5, [3]), (2, [4])]
    told = floors.ppo(SMALL, machine, jobs, 8)
    assert told["total"] == pytest.approx(told["generate"] + told["score"] + told["update"])
    body, head, pairs = 2 * SMALL.body * 14, 2 * 50 * 8 * 7, 4 * 2 * 8 * (8 * 9 / 2 + 6 * 7 / 2)
    assert told["score"] == pytest.approx((3 * (body + pairs) + head) / 1e6)
    assert told["update"] == pytest.approx((2 * (2 * body + 3 * pairs) + 2 * head) / 1e6)
    assert floors.ppo(SMALL, machine, jobs, 8, epochs=2)["update"] == pytest.approx(2 * told["update"])
