"""The reward benchmark: it runs, its contenders train alike, it tells what it should. No timings."""

import json
from pathlib import Path

import pytest
import torch
from bench_support import ROOT, run_bench
from safetensors.torch import save_file

from bench import reward as bench
from posttrain import packing, training
from posttrain.packing import collate, token_budget, tree


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what it printed, its JSON) of the smallest run."""
    return run_bench("reward", tmp_path_factory.mktemp("bench"), "--steps", "2", "--batch", "2", "--data", "chat", "hh_harmless")


def test_the_contenders_train_alike(run):
    rows = run[1]["rows"]
    assert [(r["data"], r["dtype"]) for r in rows] == [("chat", "bf16"), ("chat", "fp32")]
    for row in rows:
        assert [c["contender"] for c in row["contenders"]] == ["ours", "trl default", "trl best"]
        for c in row["contenders"][1:]:
            e = c["equality"]
            assert e["passed"] and e["initial_weights"][0] == e["initial_weights"][1] and e["loss_difference"] < e["loss_tolerance"]
            assert len(c["losses"]) == 2
        ours, default, best = row["contenders"]
        assert ours["positions"] < best["positions"] <= default["positions"]  # shared prompts, then sorted pairs


def test_the_json_says_what_it_should(run):
    told = run[1]
    assert {"benchmark", "commit", "versions", "machine", "processor", "threads", "flags", "skipped", "rows"} <= set(told)
    assert "POSTTRAIN_REAL_DATA is not set" in told["skipped"]["hh_harmless"] and told["flags"]["model"] == "tiny"
    for row in told["rows"]:
        assert {"data", "dtype", "need", "budget", "arguments", "peak", "tuning", "contenders"} <= set(row)
        assert row["need"]["tokens_shared"] < row["need"]["tokens"] and row["need"]["pairs"] == 4 and {"2048x2048x2048", "copy"} <= set(row["peak"])
        for c in row["contenders"]:
            assert set(c["pairs_per_second"]) == {"median", "low", "high", "all"} and len(c["step_ends"][0]) == 2
            assert {"seconds", "tokens_per_second", "positions_per_second", "fraction_of_peak", "fraction_of_peak_shared", "memory",
                    "time_to_first_result"} <= set(c)
    assert str(ROOT) not in json.dumps(told) and str(Path.home()) + "/" not in json.dumps(told)


def test_the_table_and_the_reason_for_a_gap_are_printed(run):
    assert "| chat | fp32  | trl default |" in run[0] and "yes: " in run[0] and "hh_harmless skipped: POSTTRAIN_REAL_DATA" in run[0] and "peak" in run[0]


@pytest.mark.parametrize("fault", ["none", "loss", "weights", "direction", "names"])
def test_a_difference_voids_the_ratio(tmp_path, fault):
    ours = {"weights": "a", "losses": [0.5, 0.4], "accuracies": [1, 1]}
    other = ours | ({"losses": [0.5, 0.4002]} if fault == "loss" else {"weights": "b"} if fault == "weights" else {})
    turned = torch.tensor([1.0, 2.2] if fault == "direction" else [1.1, 2.0])
    files = tuple(tmp_path / f"{n}.safetensors" for n in ("init", "ours", "other"))
    for file, value in zip(files, (torch.tensor([1.0, 2.0]), torch.tensor([1.2, 2.0]), turned), strict=True):
        save_file({"y" if fault == "names" and file is files[2] else "x": value}, file)
    e = bench.equality(ours, other, "fp32", files)
    assert e["passed"] is (fault == "none")
    row = {"contender": "trl", "pairs_per_second": bench.spread([1.0]), "ours_is_faster_by": bench.spread([2.0]), "equality": e, "tokens_per_second": 1,
           "positions_per_second": 1, "fraction_of_peak": 0.5, "fraction_of_peak_shared": 0.5, "memory": 1e9}
    assert ("void" in bench.table([{"data": "chat", "dtype": "fp32", "contenders": [row]}])) is (fault != "none")


def test_useful_work_by_hand(tmp_path):
    """One layer, width 4, feed-forward 8, one head: 4 * 16 + 3 * 32 = 160 weights. Prompt 3, answers 2 and 1."""
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
                                                      "vocab_size": 10, "model_type": "llama"}))
    need = bench.useful(str(tmp_path), {"rows": [{"prompt": 3, "chosen_ids": [1] * 5, "rejected_ids": [1] * 4}], "batches": [[0], [0]]})
    assert need == {"pairs": 2, "tokens": 18, "tokens_shared": 12, "flop": 2 * (4 * 160 * 9 + 12 * 4 * (15 + 10)),
                    "flop_shared": 2 * (4 * 160 * 6 + 12 * 4 * (15 + 10 - 6))}


@pytest.fixture
def restored(monkeypatch):
    """The modules that `switch_off` changes are as before afterwards."""
    for module, name in ((training, "collate"), (training, "token_budget"), (packing, "cost")):
        monkeypatch.setattr(module, name, getattr(module, name))


TREES = [tree([1] * p, [[5 + p] * a, [6 + p] * b]) for p, a, b in ((3, 4, 2), (20, 9, 30), (6, 1, 1), (11, 5, 12))]


def micro_batches(budget: int = 120) -> list:
    return training.micro_batches(TREES, [2, 0, 3, 1], budget, "rows", 0)


@pytest.mark.parametrize("technique", ["shared_prompt", "length_buckets"])
def test_a_technique_switched_off_changes_no_score(restored, make_roles, scramble, technique):
    roles = make_roles()
    scramble(roles.add("reward", fresh_adapter=True, head="new"))

    def scores() -> dict:
        out = {}
        for b in micro_batches():
            for item, value in zip(b.items, roles.scalars("reward", b).tolist(), strict=True):
                out.setdefault(item, []).append(value)
        return out

    with torch.inference_mode():
        before, cut = scores(), micro_batches()
        bench.switch_off(technique)
        after, other = scores(), micro_batches()
    assert {k: pytest.approx(v, abs=2e-6) for k, v in before.items()} == after
    assert all(b.input_ids.numel() <= 120 or len(b.items) == 2 for b in other)
    if technique == "shared_prompt":
        assert all(b.attention_mask is None and len(b.items) == len(b.input_ids) for b in other)
        assert sum(b.tokens for b in other) == sum(b.tokens for b in cut) + sum(t.prompt for t in TREES)
    else:
        assert [i for b in other for i in b.items[::2]] == [2, 0, 3, 1] != [i for b in cut for i in b.items[::2]]


def test_switching_off_leaves_the_package_as_it_was():
    """The fixture above has put everything back."""
    assert training.collate is collate and training.token_budget is token_budget


def test_grouped_batches_hold_pairs_of_like_length():
    lengths = [10, 500, 11, 490, 12, 480, 13, 470] * 4
    batches = bench.grouped(lengths, 4, 8, 0)
    assert sorted(i for b in batches for i in b) == list(range(32))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(s < 50 for s in spread) >= 5
