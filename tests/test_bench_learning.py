"""The learning experiments: what they conclude from scores, who may be trained on, and that a cut run goes on to the same result."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from bench import learning_stats as stats
from bench import reward_learning, safety_loss
from posttrain.data import prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.runs import digest

ROOT = Path(__file__).parent.parent


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def row(prompt, longer=True, rating=3, safe=(None, None)) -> dict:
    return {"prompt": str(prompt), "longer": longer, "rating": rating, "chosen_safe": safe[0], "rejected_safe": safe[1]}


def graded(shares: list[float], per_side: int = 20) -> tuple[list[float], list[dict]]:
    """Values and rows: at level k the share shares[k] is right, on the longer and on the shorter side alike; a prompt each."""
    values, rows = [], []
    for level, share in enumerate(shares):
        for longer in (True, False):
            values += [float(i < round(share * per_side)) for i in range(per_side)]
            rows += [row(f"{level} {longer} {i}", longer, level) for i in range(per_side)]
    return values, rows


# -- what follows from scores ---------------------------------------------------------------------------------------------------


def test_accuracy_and_length_balanced_accuracy_by_hand():
    """Longer side: 1, 1, 0 -> 2/3; shorter side: 0.5 -> 1/2; the equally long pair counts in the plain accuracy alone."""
    rows = [row(1), row(2), row(3), row(4, False), row(5, None)]
    values = stats.right([[2, 1], [0.5, -1], [0, 1], [1, 1], [3, 0]])
    assert values.tolist() == [1, 1, 0, 0.5, 1]
    told = stats.figures(values, rows)
    assert told["accuracy"]["mean"] == pytest.approx(3.5 / 5) and told["length_balanced"]["mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert stats.balanced_draws(values, rows)[0] == pytest.approx([(2 / 3 + 1 / 2) / 2])
    rule = stats.longer_rule(rows)
    assert rule["accuracy"]["mean"] == pytest.approx(3.5 / 5) and rule["length_balanced"]["mean"] == 0.5
    alone = stats.figures([1.0, 0.0], [row(1, None, 2), row(2, True, 2)])
    assert alone["length_balanced"]["mean"] is None and list(alone["by_rating"]) == ["better"]


def test_the_difference_is_paired_by_prompt_and_pooled_over_seeds():
    rows = [row(1, True), row(1, False), row(2, True), row(2, False)]
    win, lose = [1, 0], [0, 1]
    scores = {"ours": {0: [win, win, win, lose], 1: [win, lose, win, lose]}, "trl": {0: [win, lose, lose, lose], 1: [win, lose, win, win]}}
    told = stats.compare(scores, rows)
    gaps = told["difference"]
    assert gaps["seeds"]["0"]["accuracy"]["mean"] == pytest.approx(0.5) and gaps["seeds"]["1"]["accuracy"]["mean"] == pytest.approx(-0.25)
    assert gaps["pooled"]["accuracy"]["mean"] == pytest.approx(0.125)  # by pair: 0, 0.5, 0.5, -0.5
    assert (gaps["pooled"]["accuracy"]["low"], gaps["pooled"]["accuracy"]["high"]) == pytest.approx((0.0, 0.25))  # prompt 2 or 1 alone
    assert gaps["seeds"]["0"]["length_balanced"]["mean"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert told["ours"]["pooled"]["accuracy"]["mean"] == pytest.approx(5 / 8) and told["trl"]["pooled"]["accuracy"]["mean"] == pytest.approx(4 / 8)


def test_worse_by_ten_points_fails_and_the_same_passes():
    rows = [row(i, i % 2 == 0) for i in range(400)]
    theirs = [float(i % 10 < 7) for i in range(400)]
    worse = [float(i % 10 < 6) for i in range(400)]
    for ours, fine in ((theirs, True), (worse, False)):
        gap = stats.difference(ours, theirs, rows)
        assert stats.not_worse(gap["accuracy"]) is fine and stats.not_worse(gap["length_balanced"]) is fine
    assert not stats.not_worse({"mean": 0.2, "low": None, "high": None})  # one prompt shows nothing


def test_two_standard_errors_above_half():
    """100 prompts with a pair on either side, both right in a share p of the prompts: the standard error is sqrt(p (1 - p) / 100)."""
    for share, fine in ((0.7, True), (0.56, False)):
        values = [float(i < round(100 * share)) for i in range(100) for _ in range(2)]
        told = stats.above_half(values, [row(i, longer) for i in range(100) for longer in (True, False)])
        assert told["mean"] == pytest.approx(share) and told["passed"] is fine
        assert told["standard_error"] == pytest.approx((share * (1 - share) / 100) ** 0.5, rel=0.03)
    assert not stats.above_half([1.0, 1.0], [row(1), row(2)])["passed"]  # no pair whose chosen answer is the shorter


def test_the_trend_test_sees_a_rise_and_nothing_else():
    told = stats.rises_with_rating(*graded([0.5, 0.6, 0.7, 0.8]))
    assert told["levels"] == pytest.approx([0.5, 0.6, 0.7, 0.8]) and told["slope"] == pytest.approx(0.1)
    assert told["passed"] and 0 < told["low"] < 0.1 and told["p"] < 0.01
    for shares in ([0.6] * 4, [0.8, 0.7, 0.6, 0.5], [0.6, 0.6, 0.6, 0.65]):  # the last rises, but not surely
        assert not stats.rises_with_rating(*graded(shares))["passed"]
    assert stats.rises_with_rating(*graded([0.8, 0.7, 0.6, 0.5]))["p"] > 0.9
    assert stats.rises_with_rating(*graded([0.5, 0.6, 0.7]))["slope"] is None  # a level is missing


def test_a_length_rule_has_no_trend_although_its_accuracy_rises():
    rows = [row(f"{level} {i}", i < 20 + 4 * level, level) for level in range(4) for i in range(40)]
    values = [float(r["longer"]) for r in rows]
    assert [f["accuracy"]["mean"] for f in stats.figures(values, rows)["by_rating"].values()] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert stats.rises_with_rating(values, rows)["levels"] == [0.5] * 4 and not stats.rises_with_rating(values, rows)["passed"]


def test_the_rate_of_the_best_validation_accuracy_is_taken():
    assert stats.best_rate({5e-5: 0.5, 1e-4: 0.61, 2e-4: 0.6}) == 1e-4 and stats.best_rate({2e-4: 0.6, 5e-5: 0.6}) == 5e-5


def test_safety_figures_by_hand():
    """Unsafe answers -1, -2, 1 (two of three found); safe ones 3, -0.5, 2 (one called unsafe); AUC: 9 comparisons, one lost."""
    rows = [row(1, safe=(True, False)), row(2, safe=(True, True)), row(3, safe=(False, False)), row(4)]
    scores = [[3, -1], [-0.5, 2], [-2, 1], [0, -9]]
    told = stats.safety_model(scores, rows)
    assert told["unsafe_recall"]["mean"] == pytest.approx(2 / 3) and told["safe_called_unsafe"]["mean"] == pytest.approx(1 / 3)
    assert told["auc"] == pytest.approx(8 / 9) and told["answers"] == 6 and told["accuracy"]["mean"] == 0.5 and not told["one_sided"]
    shifted = stats.safety_model([[a + 9, b + 9] for a, b in scores], rows)  # the same order, no zero between
    assert shifted["one_sided"] and shifted["auc"] == told["auc"] and shifted["unsafe_recall"]["mean"] == 0
    assert stats.auc([1, 1], [True, False]) == 0.5 and stats.auc([1, 2], [False, False]) is None
    assert [b["accuracy"]["mean"] for b in stats.by_bin(stats.right(scores), rows).values()] == [1, 0, 0]


def test_the_safety_difference_is_paired_and_several_models_are_averaged():
    rows = [row(1, safe=(True, False)), row(2, safe=(True, False))]
    found, missed, lost = [[2, -1], [2, -1]], [[2, 1], [2, -1]], [[-2, -1], [2, -1]]
    gap = stats.safety_difference([found], [missed], rows)
    assert gap["unsafe_recall"]["mean"] == 0.5 and gap["safe_called_unsafe"]["mean"] == 0 and gap["accuracy"]["mean"] == 0
    gap = stats.safety_difference([found, lost], [missed, missed], rows)  # of answer by answer: recall 1/2, one safe answer flagged by half
    assert gap["unsafe_recall"]["mean"] == 0.5 and gap["safe_called_unsafe"]["mean"] == 0.25 and gap["accuracy"]["mean"] == -0.25


@pytest.mark.parametrize("recall, accuracy, failed", [
    ((0.2, 0.1, 0.3), (-0.01, -0.05, 0.03), None), ((0.2, -0.01, 0.4), (0, -0.02, 0.02), "lower bound above 0"),
    ((0.09, 0.05, 0.13), (0, -0.02, 0.02), "at least 10 points"), ((0.2, 0.1, 0.3), (-0.06, -0.1, -0.01), "pair accuracy is not lost")])
def test_the_safety_checks_fail_one_by_one(recall, accuracy, failed):
    gap = {"unsafe_recall": dict(zip(("mean", "low", "high"), recall)), "accuracy": dict(zip(("mean", "low", "high"), accuracy))}
    assert [what for what, ok in stats.safety_checks(gap, 432).items() if not ok] == [
        what for what in stats.safety_checks(gap, 432) if failed and failed in what]
    assert list(stats.safety_checks(gap, 399).values())[-1] is False


# -- who may be trained on ------------------------------------------------------------------------------------------------------


def test_no_prompt_and_no_excluded_model_reaches_training():
    rng, models = random.Random(0), [f"m{i}" for i in range(6)]
    pairs = []
    for i in range(300):
        a, b = rng.sample(models, 2)
        pairs.append(Pair(user(f"{'  ' * (i % 3)}question {i % 60}"), "a", "b", meta={"chosen_model": a, "rejected_model": b}))
    parts = reward_learning.split(pairs, 20, 10, frozenset({"m0", "m1"}))
    prompts = {name: {prompt_key(pairs[i]) for i in at} for name, at in parts.items()}
    assert len(prompts["held_out"]) == 20 and len(prompts["validation"]) <= 10 and len(prompts["train"]) > 20
    assert not prompts["train"] & prompts["held_out"] and not prompts["train"] & prompts["validation"] and not prompts["validation"] & prompts["held_out"]
    for i in parts["train"] + parts["validation"]:
        assert not {"m0", "m1"} & set(pairs[i].meta.values())
    held = [set(pairs[i].meta.values()) for i in parts["held_out"]]
    assert {"m0", "m1"} in held and any("m0" not in models for models in held)
    assert len(parts["held_out"]) == sum(prompt_key(p) in prompts["held_out"] for p in pairs)  # nothing of a held-out prompt is lost
    backwards = reward_learning.split(pairs[::-1], 20, 10, frozenset({"m0", "m1"}))
    assert {prompt_key(pairs[::-1][i]) for i in backwards["held_out"]} == prompts["held_out"]  # the order of the rows does not matter


def test_folds_part_prompts_and_share_out_the_bins():
    labels = [(True, False)] * 40 + [(True, True)] * 30 + [(False, False)] * 20
    pairs = [Pair(user(f"q{i // 2}"), "a", f"b{i}", chosen_safe=c, rejected_safe=r) for i, (c, r) in enumerate(labels)]
    folds = safety_loss.folds_of(pairs, 5)
    assert all(folds[i] == folds[i + 1] for i in range(0, 90, 2)) and set(folds) == set(range(5))
    for part, size in (((0, 40), 8), ((40, 70), 6), ((70, 90), 4)):
        assert [folds[slice(*part)].count(f) for f in range(5)] == [size] * 5


# -- the programs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The three real files' columns, in small."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    plain = ["a", "b", "c", "d"]

    def write(name: str, rows: list[dict]) -> None:
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)

    rows = []
    for i in range(72):
        a, b = rng.sample(sorted(reward_learning.UNSEEN) if i % 3 == 0 else plain, 2)
        rows.append({"prompt": f"question {i // 3}", "chosen": "yes " * rng.randint(1, 6), "rejected": "no " * rng.randint(1, 6),
                     "rating": rng.choice(stats.RATINGS), "chosen_model": a, "rejected_model": b})
    write("helpful_graded", rows)
    write("hh_harmless", [{"chosen": f"\n\nHuman: hi {i}\n\nAssistant: no", "rejected": f"\n\nHuman: hi {i}\n\nAssistant: sure"} for i in range(8)])
    write("safety_labelled_pairs", [{"prompt": f"q{i}", "chosen": "please do not", "rejected": "sure", "chosen_safe": True, "rejected_safe": False}
                                    for i in range(4)])
    return folder


def flags(folder: Path, data: Path, *more) -> list[str]:
    return [str(x) for x in ("--model", "builtin:tiny-llama", "--dtype", "float32", "--lora-r", 4, "--threads", 1, "--data", data,
                             "--out", folder / "out", "--work", folder / "work", *more)]


def results(folder: Path) -> dict:
    """Everything a run wrote but for times and versions."""
    told = json.loads((folder / "out" / "results.json").read_text())
    del told["seconds"]
    units = {p.name: json.loads(p.read_text()) for p in sorted((folder / "out" / "units").iterdir())}
    return {"results": {k: v for k, v in told.items() if k not in ("commit", "versions", "machine", "python")},
            "units": {k: (u["settings"], u["result"]) for k, u in units.items()}}


SMALL = ("--rates", 1e-3, 3e-3, "--seeds", 0, "--train-pairs", 12, "--sweep-pairs", 8, "--batch", 4, "--held-out-prompts", 8, "--validation-prompts", 4,
         "--harmless-pairs", 6)


def test_reward_learning_survives_a_kill(tmp_path, data):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "-m", "bench.reward_learning", *flags(cut, data, *SMALL)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    units = cut / "out" / "units"
    while process.poll() is None and len(list(units.glob("*.json"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in units.glob("*.json")}
    assert 2 <= len(before) < 6 and not (cut / "out" / "results.json").exists()
    with pytest.raises(PosttrainError, match="nothing to report yet"):
        reward_learning.main(["--only", "report", "--out", str(cut / "out")])
    reward_learning.main(flags(cut, data, *SMALL))
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())  # what was finished is not done again
    for part in (("ours", "sweep"), ("trl", "sweep"), ("final", "ours")):
        reward_learning.main(flags(straight, data, *SMALL, "--only", *part))
    assert not (straight / "out" / "results.json").exists()
    reward_learning.main(flags(straight, data, *SMALL, "--only", "final"))
    assert results(straight) == results(cut) and len(results(cut)["units"]) == 6
    check_reward_learning(straight, data)
    text = (straight / "out" / "results.md").read_text()
    assert "| ours - TRL, pooled |" in text and "FAILED: size" in text and "two models not in training (8 of 8 prompts)" in text


def check_reward_learning(folder: Path, data: Path) -> None:
    """Who was trained on, and that both sides had the same shape and saw the same pairs."""
    told = json.loads((folder / "out" / "pairs.json").read_text())
    kept_apart = {r["prompt"] for r in told["rows"] if r["set"] in ("held_out", "validation")}
    found = results(folder)
    rate = {side: found["results"]["sides"][side]["rate"] for side in ("ours", "trl")}
    train = folder / "work" / f"final-ours-{rate['ours']:g}-seed0" / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    assert len(rows) == 12 and not {digest(prompt_key(Pair(r["prompt"], "", "")))[:12] for r in rows} & kept_apart
    with gzip.open(data / "helpful_graded.jsonl.gz", "rt") as f:
        models = {r["prompt"] + r["chosen"].strip() + r["rejected"].strip(): {r["chosen_model"], r["rejected_model"]} for r in map(json.loads, f)}
    assert not any(models[r["prompt"][-1]["content"] + r["chosen"] + r["rejected"]] & reward_learning.UNSEEN for r in rows)
    ours = load_file(train.parent / "run" / "reward" / "model" / "adapter_model.safetensors")
    theirs = load_file(folder / "work" / f"final-trl-{rate['trl']:g}-seed0" / "model" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    heads = [tensors["base_model.model.score.weight"] for tensors in (ours, theirs)]
    assert 0 < (heads[0] - heads[1]).abs().max() < 0.02  # the same start (values of 0.05), three steps of at most 3e-3
    for name, (settings, result) in found["units"].items():
        assert len(result["losses"]) == (2 if settings["phase"] == "sweep" else 3), name
        assert settings["side"] == "ours" or result["trl_own_scores_differ_by"] < 1e-5
        assert np.isfinite(result["scores"]).all()


def test_a_changed_setting_is_another_experiment(tmp_path, data):
    """Without a model: the names and settings of the units."""
    one, two = (reward_learning.prepare(reward_learning.parser().parse_args(flags(tmp_path, data, *SMALL, "--max-length", n))) for n in (1024, 1000))
    a, b = (reward_learning.units(e, "ours", "sweep", [1e-3])[0] for e in (one, two))
    assert a.name == b.name and a.settings != b.settings
    assert [t.ids for t in one.train_trees] == [t.ids for t in two.train_trees]
    with pytest.raises(PosttrainError, match="12 training pairs are left|training pairs are left"):
        reward_learning.prepare(reward_learning.parser().parse_args(flags(tmp_path, data, *SMALL, "--train-pairs", 200)))
    with pytest.raises(PosttrainError, match="whole batches"):
        reward_learning.prepare(reward_learning.parser().parse_args(flags(tmp_path, data, *SMALL, "--batch", 5)))


FOLDS = ("--folds", 2, "--pairs", 12, "--max-length", 1024)


def test_safety_loss_survives_a_cut(tmp_path, data, monkeypatch):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    real, calls = safety_loss.score_adapter, []

    def cut_off(*args):
        calls.append(1)
        if len(calls) == 2:  # after the second training, before its unit is written
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(safety_loss, "score_adapter", cut_off)
    with pytest.raises(KeyboardInterrupt):
        safety_loss.main(flags(cut, data, *FOLDS))
    (first,) = (cut / "out" / "units").glob("*.json")
    when = first.stat().st_mtime_ns
    with pytest.raises(PosttrainError, match="not every fold has both models"):
        safety_loss.main(["--only", "report", "--out", str(cut / "out")])
    safety_loss.main(flags(cut, data, *FOLDS))
    assert first.stat().st_mtime_ns == when and len(calls) == 5
    safety_loss.main(flags(straight, data, *FOLDS, "--only", "with"))
    safety_loss.main(flags(straight, data, *FOLDS, "--only", "without"))
    assert results(straight) == results(cut) and len(results(cut)["units"]) == 4
    told = json.loads((cut / "out" / "pairs.json").read_text())
    for f in range(2):
        held = {r["prompt"] for r in told["rows"] if r.get("fold") == f}
        for arm in safety_loss.ARMS:
            work = cut / "work" / f"fold{f}-{arm}"
            rows = [json.loads(line) for name in ("safety", "helpful") for line in (work / f"{name}.jsonl").read_text().splitlines()]
            assert held and not held & {digest(prompt_key(Pair(r["prompt"], "", "")))[:12] for r in rows}
            assert json.loads((work / "recipe.yaml").read_text())["stages"]["reward"]["safety_loss_weight"] == (1.0 if arm == "with" else 0.0)
    text = (cut / "out" / "results.md").read_text()
    assert "Beside Table 29" in text and "| 90.4 % |" in text and "safe answers called unsafe" in text


def test_the_safety_models_are_trained_as_the_demo_s(tmp_path, data, make_roles):
    """Batch, rate and mix come from the demo's recipe; an SFT adapter is what training starts from."""
    from posttrain.config import load_recipe

    roles = make_roles()
    roles.add("sft", trainable=True, fresh_adapter=True)
    roles.save("sft", tmp_path / "sft")
    told, units = safety_loss.plan(safety_loss.parser().parse_args(flags(tmp_path, data, *FOLDS, "--sft", tmp_path / "sft")))
    demo = load_recipe(ROOT / "recipes" / "smollm2-135m.yaml").stages["reward_safety"]
    assert {k: told["stage"][k] for k in ("batch_size", "learning_rate", "own_share")} == {
        "batch_size": demo.batch_size, "learning_rate": demo.learning_rate, "own_share": 0.9}
    assert told["start"] != "base" and len(units) == 4 and units[0].train_tokens == units[1].train_tokens > 0
    assert np.isfinite(units[0].work()["scores"]).all()
    assert json.loads((tmp_path / "work" / "fold0-with" / "recipe.yaml").read_text())["stages"]["reward"]["model"] == str(tmp_path / "sft")
