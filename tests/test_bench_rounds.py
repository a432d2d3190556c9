"""The rounds on real data: who learns and who judges, what follows from stored scores, and the whole of it on the tiny model."""

import gzip
import json

import pytest

from bench import rounds
from bench.learning_runs import as_row
from posttrain.config import DataEntry
from posttrain.data import load_entry, prompt_key
from posttrain.formats import Pair
from posttrain.log import read_lines
from posttrain.runs import read_json

VERSIONS = rounds.VERSIONS


def pair(prompt: str, n: int) -> Pair:
    return Pair([{"role": "user", "content": prompt}], f"yes {n}", f"no {n}")


def test_the_halves_share_no_prompt_and_hold_a_few_pairs_of_each():
    pairs = [pair(f"prompt {i}", n) for i in range(11) for n in range(4)]
    first, second = rounds.halve(pairs, 3, seed=1)
    keys = [{prompt_key(p) for p in half} for half in (first, second)]
    assert not keys[0] & keys[1] and sorted(map(len, keys)) == [5, 6] and len(first) + len(second) == 33
    assert rounds.halve(pairs, 3, seed=1) == (first, second) and rounds.halve(pairs, 3, seed=2) != (first, second)
    assert sum(map(len, rounds.halve(pairs, None, seed=1))) == 44


def test_a_judge_counts_above_half_by_two_standard_errors():
    """An interval of 95 % is 3.92 standard errors wide: 54 % within 0.0392 has an error of 1 point, 4 above half."""
    assert rounds.counts_as_judge({"mean": 0.54, "low": 0.5204, "high": 0.5596, "groups": 5000})
    assert not rounds.counts_as_judge({"mean": 0.5199, "low": 0.5003, "high": 0.5395, "groups": 5000})
    assert not rounds.counts_as_judge({"mean": 0.7, "low": None, "high": None, "groups": 1})


def answer(version: str, i: int, merged: float, judge: float) -> dict:
    scores = {"path": {"merged": merged, "helpfulness": merged, "safety": merged}, "judges": {"merged": judge, "helpfulness": judge, "safety": judge}}
    before = dict(zip(VERSIONS[1:], VERSIONS, strict=False)).get(version)
    return {"set": "versions", "model": version, "row": i, "sample": 0, "prompt": f"p{i}", "kl_compared": {before: 3.0} if before else {},
            "finished": True, "tokens": 10, "is_safety": False, "scores": scores}


def sample(name: str, prompt: str, merged: float, judge: float, finished: bool = True) -> dict:
    return {"set": name, "prompt": prompt, "finished": finished, "scores": {"path": {"merged": merged}, "judges": {"merged": judge}}}


def made(rise: dict[str, float], judge: dict[str, float]) -> dict:
    """Scores whose versions stand at rise[version], with a spread over prompts that pairing takes out but for +-0.01 by turns."""
    rows = [answer(v, i, i + rise[v] + 0.01 * (-1) ** (i + VERSIONS.index(v)), i + judge[v] + 0.01 * (-1) ** (i + VERSIONS.index(v)))
            for v in VERSIONS for i in range(8)]
    bags = [sample(f"v{n}_samples", f"q{i}", m, m / 2) for n in range(1, 5) for i in range(6) for m in (0.0, 1.0, 2.0)]
    return {"rows": rows + bags + [sample("v1_samples", "q0", 9.0, -9.0, finished=False)]}


STRONG = {name: {"mean": 0.6, "low": 0.58, "high": 0.62, "counts": True} for name in ("helpfulness", "safety")}


def test_the_path_and_the_best_of_n_by_hand():
    rise = {v: 0.1 * n for n, v in enumerate(VERSIONS)}
    told = rounds.conclude(made(rise, rise), STRONG, STRONG, {})
    step = told["path"]["path"]["merged"]["steps"]["v1 - sft"]
    assert step["mean"] == pytest.approx(0.1) and step["standard_error"] == pytest.approx(0.02 * (8 / 7) ** 0.5 / 8 ** 0.5)
    assert told["path"]["path"]["merged"]["steps"]["ppo - sft"]["mean"] == pytest.approx(0.5)
    assert told["best_of_n"]["v1_samples"]["path"]["mean"] == pytest.approx(1.0)  # 2 - mean(0, 1, 2); the cut answer counts nowhere
    assert told["best_of_n"]["v1_samples"]["judges"]["mean"] == pytest.approx(0.5)
    assert all(told["checks"].values()) and len(told["checks"]) == 7 and told["kl_to_version_before"]["ppo"] == 3.0


@pytest.mark.parametrize(("change", "judge", "failed"), [
    ({"ppo": 0.41}, {}, "PPO raises the held-out merged reward"),
    ({"v2": -0.5}, {}, "no version falls behind"),
    ({v: -0.1 * n for n, v in enumerate(VERSIONS)}, {}, "from SFT to V5"),
    ({}, {"ppo": -3.0}, "the helpfulness judge sees no fall"),
])
def test_each_check_can_fail(change, judge, failed):
    rise = {v: 0.1 * n for n, v in enumerate(VERSIONS)}
    told = rounds.conclude(made(rise | change, rise | judge), STRONG, STRONG, {})
    assert [ok for name, ok in told["checks"].items() if name.startswith(failed)] == [False]


def test_a_judge_too_weak_checks_nothing():
    rise = {v: 0.1 * n for n, v in enumerate(VERSIONS)}
    weak = {name: x | {"counts": False} for name, x in STRONG.items()}
    told = rounds.conclude(made(rise, rise | {"ppo": -3.0}), weak, STRONG, {})
    assert len(told["checks"]) == 4 and all(told["checks"].values())


@pytest.fixture
def small_data(tmp_path):
    """A folder laid out like the real data, from the demo's rows."""
    folder = tmp_path / "real"
    folder.mkdir()

    def rows(name, form):
        return load_entry(DataEntry(path=f"recipes/data/{name}.jsonl", format=form), rounds.Path(), 0, name).items

    def write(name, items):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in items)

    single = [p for p in rows("helpful_pairs", "preference") if len(p.prompt) == 1]
    write("helpful_graded", [as_row(p) for p in single[:60]])
    write("hh_harmless", [{k: f"\n\nHuman: {p.prompt[-1]['content']}\n\nAssistant: {getattr(p, k)}" for k in ("chosen", "rejected")} for p in single[60:120]])
    for name, source in (("alpaca_demonstrations", "demonstrations"), ("safety_demonstrations", "safety_demonstrations")):
        items = [d for d in rows(source, "messages") if len(d.messages) == 2]
        write(name, [{"instruction": d.messages[0]["content"], "input": "", "output": d.messages[1]["content"]} for d in items[:80]])
    adversarial = [p for p in rows("prompts_adversarial", "prompt") if len(p.messages) == 1]
    for i, name in enumerate(rounds.ADVERSARIAL):
        write(name, [{"prompt": p.messages[0]["content"]} for p in adversarial[i::3]])
    return folder


@pytest.mark.pipeline
def test_the_whole_of_it_on_the_tiny_model(tmp_path, small_data, capsys):
    words = ["--model", "builtin:tiny-llama", "--dtype", "float32", "--pairs", "16", "--held-out-pairs", "8", "--demonstrations", "80", "--rows", "6",
             "--samples", "12", "--sweep-prompts", "3", "--temperatures", "0.8", "1.0", "--max-new-tokens", "128", "--iterations", "1", "--eval-prompts", "6",
             "--eval-samples", "2", "--threads", "1", "--data", str(small_data), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    rounds.main(words)
    told, scores = read_json(tmp_path / "out" / "results.json"), read_json(tmp_path / "out" / "scores.json")
    answers = [r for r in scores["rows"] if r["set"] == "versions"]
    assert len(answers) == 6 * 2 * 6 and len(scores["rows"]) > len(answers)
    stored = read_lines(tmp_path / "work" / "path" / "path" / "versions" / "samples.jsonl")
    assert [r["scores"]["path"]["merged"] for r in answers] == [round(r["merged"], 6) for r in stored]
    assert all(r["scores"]["judges"]["merged"] != r["scores"]["path"]["merged"] for r in answers)
    assert told["path"]["judges"]["merged"]["versions"]["ppo"]["n"] == 12 and "## Checks" in (tmp_path / "out" / "results.md").read_text()
    learnt = [{prompt_key(p) for p in load_entry(DataEntry(path=str(tmp_path / "work" / part / f"{name}.jsonl"), format="preference"), rounds.Path(), 0,
                                                 "x").items} for part in rounds.HALVES for name in ("helpful", "safety")]
    assert not (learnt[0] | learnt[1]) & (learnt[2] | learnt[3])
    capsys.readouterr()
    rounds.main([*words, "--only", "report"])
    assert read_json(tmp_path / "out" / "results.json")["path"] == told["path"]
