"""The fine-tuning benchmark: it runs, its contenders train alike, it tells what it should. No timings."""

import json
from pathlib import Path

import pytest
import torch
from bench_support import ONE_LAYER, run_bench
from safetensors.torch import save_file

from bench import floors
from bench import sft as bench
from bench.harness import spread


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what it printed, its JSON) of the smallest run."""
    return run_bench("sft", tmp_path_factory.mktemp("bench"), "--steps", "2", "--batch", "2", "--mean", "40", "--data", "chat", "--dtype", "fp32")


def test_the_contenders_train_alike(run):
    rows = run[1]["rows"]
    assert [(r["data"], r["dtype"]) for r in rows] == [("chat", "fp32")]
    for row in rows:
        assert [c["contender"] for c in row["contenders"]] == ["ours", "trl default", "trl best"]
        for c in row["contenders"][1:]:
            assert c["equality"]["passed"] and c["equality"]["differences"]["loss"] < 1e-4 and len(c["losses"]) == 2
        assert all(0 < c["fraction_of_floor"] < 1.2 and c["memory"] > 1e8 for c in row["contenders"])


def test_it_says_where_the_figures_are_from(run):
    told = run[1]
    assert told["versions"]["trl"] and told["processor"] and told["threads"] == 1 and "commit" in told
    assert str(Path.home()) + "/" not in json.dumps(told) and "| chat | fp32  | trl default |" in run[0] and "peak" in run[0]


@pytest.mark.parametrize("fault", ["none", "loss", "nan", "weights", "direction", "steps"])
def test_a_difference_voids_the_ratio(tmp_path, fault):
    ours = {"weights": "a", "losses": [0.5, 0.4]}
    other = ours | {"loss": {"losses": [0.5, 0.4002]}, "nan": {"losses": [0.5, float("nan")]}, "weights": {"weights": "b"},
                    "steps": {"losses": [0.5]}}.get(fault, {})
    turned = torch.tensor([1.0, 2.2] if fault == "direction" else [1.1, 2.0])
    files = tuple(tmp_path / f"{n}.safetensors" for n in ("init", "ours", "other"))
    for file, value in zip(files, (torch.tensor([1.0, 2.0]), torch.tensor([1.2, 2.0]), turned), strict=True):
        save_file({"x": value}, file)
    e = bench.equality(ours, other, "fp32", files)
    assert e["passed"] is (fault == "none")
    row = {"contender": "trl", "tokens_per_second": spread([1.0]), "positions_per_second": spread([1.0]), "ours_is_faster_by": spread([2.0]),
           "fraction_of_floor": 0.5, "memory": 1e9, "equality": e}
    assert ("void" in bench.line({"data": "chat", "dtype": "fp32"}, row)) is (fault != "none")


def test_the_floor_by_hand():
    """Width 4, feed-forward 8: 160 weights a layer. One demonstration of 3 + 2 tokens, 2 of them through a vocabulary of 10."""
    machine = floors.machine({"1x1x1": 50.0, "2x2x2": 100.0, "copy": 7.0}, "float32")
    assert (machine.flops, machine.bandwidth, machine.width) == (100.0, 7.0, 4)
    products, pairs = 2 * 160 * 5 + 2 * 10 * 4 * 2, 5 * 6 / 2
    assert floors.sft(ONE_LAYER, machine, [(3, [2])]) == pytest.approx((2 * products + 3 * 4 * 4 * pairs) / 100)
