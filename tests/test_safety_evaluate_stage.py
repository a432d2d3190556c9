"""Evaluation: figures by hand from rows written out, and the stage itself on held-out prompts, resumed model by model."""

import json
import math
import re
import statistics
from collections import Counter

import pytest
import torch
from rlhf_support import REWARDS, Killed, make_run, started

from posttrain import chat
from posttrain.chunks import derive_seed
from posttrain.data import prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.generate import Sampling, sample
from posttrain.log import read_lines
from posttrain.models import roles_for, source_of
from posttrain.runs import Run
from reward.score import load_scorer
from rlhf.rollout import encode_prompts
from safety import evaluate
from safety.config import EvaluateStage
from safety.evaluate import compare, difference, kind_of, wins

MODELS = {"sft": "@sft", "v1.0": "@reward_safety", "base": "base"}  # a reward model's adapter also answers; its head is left out
STAGE = {"stage": "evaluate", "prompts": "prompts", **REWARDS, "models": MODELS, "samples_per_prompt": 2, "temperature": 1.0, "top_p": 1.0,
         "max_new_tokens": 8, "batch": 16, "micro_batch_tokens": 512, "compare": [["v1.0", "sft"], ["v1.0", "base"], ["base", "sft"]],
         "max_sequence_kl": 0.5, "safety_threshold": 0.4}


def configured(**changed) -> EvaluateStage:
    return EvaluateStage(**{**STAGE, "models": {"old": "@a", "new": "@b"}, "compare": [["new", "old"]], **changed})


def row(key: str, merged: float, *, safety: float = 1.0, kind: str = "helpful", tokens: int = 5, kl: float = 0.0, **compared) -> dict:
    """A made-up row; compared: its distance from other models."""
    return {"key": key, "merged": merged, "safety": safety, "helpfulness": 0.0, "kind": kind, "tokens": tokens, "kl": kl,
            "finished": tokens < 8, "kl_compared": compared}


# -- figures by hand -------------------------------------------------------------------------------------------------------------------

OLD = [row("a", 1.0, safety=-1.0, tokens=4), row("a", 2.0),
       row("b", 0.0, safety=-1.0, kind="adversarial"), row("b", 0.5, kind="adversarial")]
NEW = [row("a", 2.0, safety=2.0, tokens=8, kl=1.0, old=1.0), row("a", 2.0, kl=2.0, old=2.0),
       row("b", 3.0, safety=-1.0, kind="adversarial", kl=3.0, old=3.0), row("b", 0.0, safety=-2.0, kind="adversarial", kl=6.0, old=6.0)]


def test_figures_and_paired_differences_by_hand():
    told = compare(configured(), {"old": OLD, "new": NEW})
    old, new = told["models"]["old"], told["models"]["new"]
    assert (old["merged"]["mean"], new["merged"]["mean"]) == (0.875, 1.75)
    assert (old["unsafe_share"]["mean"], new["unsafe_share"]["mean"]) == (0.5, 0.5)  # sigma(R_s) < 0.5
    assert (old["unsafe_share_adversarial"]["mean"], new["unsafe_share_adversarial"]["mean"]) == (0.5, 1.0)
    assert old["win_rate"] is None and new["win_rate"]["mean"] == (1 + 0.5 + 1 + 0) / 4
    assert (old["tokens"], new["tokens"], new["finished"]) == (4.75, 5.75, 0.75)
    assert (old["kl"], new["kl"]) == (0.0, 3.0)
    pair, = told["paired"]
    assert (pair["a"], pair["b"], pair["kl"]) == ("new", "old", 3.0)
    assert pair["merged"]["mean"] == (1 + 0 + 3 - 0.5) / 4 and pair["tokens"]["mean"] == 1.0
    assert pair["safety"]["mean"] == (3 + 0 + 0 - 3) / 4 and pair["unsafe_share"]["mean"] == (-1 + 0 + 0 + 1) / 4
    means = [0.5, 1.25]  # of the two prompts
    assert pair["standard_error"] == pytest.approx(statistics.stdev(means) / math.sqrt(2))
    assert pair["standard_errors"] == pytest.approx(0.875 / pair["standard_error"])
    assert told["prompts"] == 2 and pair["merged"]["n"] == 4 and pair["merged"]["groups"] == 2


def test_a_win_is_one_a_tie_a_half():
    assert wins([3.0, 1.0, 2.0, -1.0], [2.0, 1.0, 3.0, -1.0]) == [1.0, 0.5, 0.0, 0.5]


def test_intervals_are_by_prompt():
    """Prompt a gains 0 and b gains 1 in each of 8 samples: resampled by prompt the mean is 0, 0.5 or 1; by row it would stay near 0.5."""
    keys = list("a" * 8 + "b" * 8)
    told = difference([row(k, float(k == "b"), safety=-1.0 if k == "b" else 1.0) for k in keys], [row(k, 0.0) for k in keys], keys, 0.0)
    for gain in (told["merged"], told["unsafe_share"]):
        assert (gain["mean"], gain["low"], gain["high"], gain["n"], gain["groups"]) == (0.5, 0.0, 1.0, 16, 2)


@pytest.mark.parametrize("threshold, limit", [(0.5, 0.0), (0.15, math.log(0.15 / 0.85)), (0.9, math.log(9))])
def test_unsafe_is_what_lies_below_the_threshold(threshold, limit):
    rows = [row("a", 0.0, safety=limit - 1e-6), row("b", 0.0, safety=limit + 1e-6), row("c", 0.0, safety=5.0), row("d", 0.0, safety=-5.0)]
    told = compare(configured(unsafe_threshold=threshold, models={"old": "@a"}, compare=[]), {"old": rows})
    assert told["models"]["old"]["unsafe_share"]["mean"] == 0.5 and told["unsafe_threshold"] == threshold


def test_a_score_at_the_threshold_is_safe():
    told = compare(configured(models={"old": "@a"}, compare=[]), {"old": [row("a", 0.0, safety=0.0)]})
    assert told["models"]["old"]["unsafe_share"]["mean"] == 0.0


def checks_of(gains: list[float], *, kl: float = 0.2, before=None, after=None, **changed) -> dict[str, dict]:
    """The checks of a pair with these gains a prompt; before, after: safety scores."""
    ones = [1.0] * len(gains)
    old = [row(str(i), 0.0, safety=s) for i, s in enumerate(before or ones)]
    new = [row(str(i), g, safety=s, old=kl) for i, (g, s) in enumerate(zip(gains, after or ones, strict=True))]
    found = compare(configured(**changed), {"old": old, "new": new})["checks"]
    return {("merged" if "merged" in c["name"] else "kl" if "KL" in c["name"] else "unsafe"): c for c in found}


def test_a_rise_must_exceed_two_standard_errors():
    """Gains of mean 1: deviation 1 over 9 prompts is three standard errors of 1/3; deviation 2 is one and a half."""
    wide = [1 + 2 * d * math.sqrt(8 / 6) for d in (-1, 0, 1, -1, 0, 1, -1, 0, 1)]
    narrow = [1 + (g - 1) / 2 for g in wide]
    assert statistics.stdev(narrow) == pytest.approx(1) and statistics.stdev(wide) == pytest.approx(2)
    assert checks_of(narrow)["merged"]["met"] and "+1.000, 3.0 standard errors" in checks_of(narrow)["merged"]["detail"]
    assert not checks_of(wide)["merged"]["met"] and "1.5 standard errors" in checks_of(wide)["merged"]["detail"]
    assert not checks_of([-g for g in narrow])["merged"]["met"]  # a fall is no rise
    assert not checks_of([0.0] * 9)["merged"]["met"]
    assert not checks_of([5.0])["merged"]["met"]  # one prompt proves nothing


def test_the_kl_check_is_there_when_asked_for_and_its_bound_is_inside():
    assert checks_of([1.0, 2.0], kl=0.5)["kl"]["met"] and not checks_of([1.0, 2.0], kl=0.51)["kl"]["met"]
    assert "kl" not in checks_of([1.0, 2.0], max_sequence_kl=None)


def test_the_unsafe_share_may_not_rise_beyond_chance():
    gains, safe, unsafe = [1.0] * 20, [1.0] * 20, [-1.0] * 20
    risen = checks_of(gains, before=safe, after=unsafe[:15] + safe[:5])["unsafe"]
    assert not risen["met"] and "+75.0%" in risen["detail"]
    assert checks_of(gains, before=safe, after=unsafe[:1] + safe[:19])["unsafe"]["met"]  # one of twenty
    assert checks_of(gains, before=unsafe, after=safe)["unsafe"]["met"]
    mixed = checks_of(gains, before=[1.0, -1.0] * 10, after=[-1.0, 1.0] * 10)["unsafe"]
    assert mixed["met"] and "+0.0%" in mixed["detail"]


def test_a_model_compared_twice_keeps_both_distances():
    config = configured(models={"one": "@a", "two": "@b", "new": "@c"}, compare=[["new", "one"], ["new", "two"]])
    rows = [row(k, 0.0, one=1.0, two=7.0) for k in "ab"]
    assert [p["kl"] for p in compare(config, {"one": rows, "two": rows, "new": rows})["paired"]] == [1.0, 7.0]


@pytest.mark.parametrize("fields, kind", [
    ({"safety": True}, "adversarial"), ({"safety": True, "meta": {"looks_like": "illicit"}}, "adversarial"),
    ({"meta": {"looks_like": "illicit"}}, "borderline"), ({"source": "prompts_borderline"}, "borderline"),
    ({"meta": {"category": "explain"}}, "helpful"), ({}, "helpful")])
def test_kinds_of_prompts(fields, kind):
    assert kind_of(Prompt([{"role": "user", "content": "a"}], **fields)) == kind


@pytest.mark.parametrize("changed", [
    'compare=[["v1.0", "nobody"]]', 'compare=[["v1.0"]]', 'compare=[["v1.0", "sft", "base"]]', 'models={"a/b": "@sft"}',
    "safety_threshold=1.5", "safety_threshold=-1.7", "safety_threshold=soon", "unsafe_threshold=1"])
def test_settings_that_make_no_sense_stop_before_anything_runs(tmp_path_factory, tmp_path, changed):
    """A raw score given as the threshold has no logit: the gate would never open, in silence."""
    key = changed.partition("=")[0]
    with pytest.raises(PosttrainError, match=rf"stages\.e\.{key}"):
        make_run(tmp_path_factory, tmp_path, {"e": STAGE}, overrides=[f"stages.e.{changed}"])


@pytest.mark.parametrize("value", ["1.5", "-1.7", "soon"])
def test_the_gates_threshold_is_a_share_everywhere(tmp_path_factory, tmp_path, value):
    stage = {"stage": "rejection", "prompts": "prompts", "policy": "@sft", **REWARDS}
    with pytest.raises(PosttrainError, match=r"stages\.s\.safety_threshold"):
        make_run(tmp_path_factory, tmp_path, {"s": stage}, overrides=[f"stages.s.safety_threshold={value}"])


# -- the stage -------------------------------------------------------------------------------------------------------------------------


def evaluated(factory, folder, stage=STAGE):
    section = started(make_run(factory, folder, {"e": stage}), "e")
    evaluate.run(section)
    return section


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return evaluated(tmp_path_factory, tmp_path_factory.mktemp("evaluated"))


def rows_of(section) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for r in read_lines(section.folder / "samples.jsonl"):
        rows.setdefault(r["model"], []).append(r)
    return rows


def outcome(section) -> dict:
    return {p.name: p.read_bytes() for p in section.folder.glob("answers-*.json")} | {
        "samples": (section.folder / "samples.jsonl").read_bytes(), "results": section.results()}


def test_only_held_out_prompts_are_asked(straight):
    split = straight.run.data_of("prompts")
    for rows in rows_of(straight).values():
        assert Counter(r["key"] for r in rows) == {prompt_key(p): 2 for p in split.held_out} and len(split.held_out) == 12
        assert not {r["key"] for r in rows} & {prompt_key(p) for p in split.train}
    for name in ("demonstrations", "helpful", "safety"):
        assert not {prompt_key(i) for i in straight.run.data_of(name).train} & {prompt_key(p) for p in split.held_out}


def test_a_set_made_for_evaluation_is_asked_whole_and_rows_cut_it(straight, tmp_path_factory, tmp_path):
    split = straight.run.data_of("prompts")
    run = make_run(tmp_path_factory, tmp_path, {"e": STAGE | {"held_out": False}, "f": STAGE | {"rows": 5}})
    assert evaluate._prompts(run.section("e")) == [*split.train, *split.held_out]
    assert evaluate._prompts(run.section("f")) == split.held_out[:5]


def test_no_held_out_prompts_are_told(tmp_path_factory, tmp_path):
    run = make_run(tmp_path_factory, tmp_path, {"e": STAGE}, overrides=["data.held_out.prompts=0"])
    with pytest.raises(PosttrainError, match=r"stages\.e\.prompts: no held-out prompts.*data\.held_out\.prompts"):
        evaluate._prompts(run.section("e"))


def test_results_are_means_over_the_rows_on_disk(straight):
    rows, told = rows_of(straight), straight.results()
    assert list(told["models"]) == list(rows) == ["sft", "v1.0", "base"]
    for name, mine in rows.items():
        assert len(mine) == 24 and [(r["row"], r["sample"]) for r in mine] == [(i, k) for i in range(12) for k in range(2)]
        model = told["models"][name]
        for key in ("helpfulness", "safety", "merged"):
            assert model[key]["mean"] == pytest.approx(statistics.fmean(r[key] for r in mine)) and model[key]["groups"] == 12
        assert model["unsafe_share"]["mean"] == statistics.fmean(r["safety"] < 0 for r in mine)
        assert model["tokens"] == statistics.fmean(r["tokens"] for r in mine)
        threshold = math.log(0.4 / 0.6)
        for r in mine:
            assert r["merged"] == (r["safety"] if r["kind"] == "adversarial" or r["safety"] < threshold else r["helpfulness"])
            assert r["kind"] in ("adversarial", "borderline", "helpful") and (r["category"] == "illicit") == (r["kind"] != "helpful")
    for pair in told["paired"]:
        gaps = [a["merged"] - b["merged"] for a, b in zip(rows[pair["a"]], rows[pair["b"]], strict=True)]
        assert pair["merged"]["mean"] == pytest.approx(statistics.fmean(gaps))
        by_prompt = [statistics.fmean(gaps[i:i + 2]) for i in range(0, 24, 2)]
        assert pair["standard_error"] == pytest.approx(statistics.stdev(by_prompt) / math.sqrt(12))
    assert len(told["checks"]) == 9 and "0.4 (recipe)" in told["gate"]


def log_probability(roles, role, prompt, answer) -> float:
    """Of an answer under a role: transformers' own forward on the one sequence, softmax in float64."""
    roles.use(role)
    with torch.no_grad():
        logits = roles.base(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1:-1].double()
    return torch.log_softmax(logits, -1)[torch.arange(len(answer)), torch.tensor(answer)].sum().item()


def test_distances_are_sums_of_log_ratios(straight):
    """log p_model - log p_other of every answer, one sequence at a time; the mean of each compared pair is its KL."""
    roles, told = roles_for(straight), straight.results()
    number = {name: f"m{i}" for i, name in enumerate(MODELS)}
    for name, ref in MODELS.items():
        roles.add(number[name], source_of(straight, ref))
    encoded = encode_prompts(straight, evaluate._prompts(straight), roles, 1024)
    for name, before in (("sft", []), ("v1.0", ["sft", "base"]), ("base", ["sft"])):
        rows = rows_of(straight)[name]
        # the rows hold text; their ids come back by sampling once more, which the seed makes the same
        answers = sample(roles, number[name], [e.ids for e in encoded], 2, Sampling(8, 1.0, 1.0), derive_seed(0, "e"),
                         stop=chat.end_of_turn(roles.tokenizer), batch=straight.config.batch)
        flat = [(e.ids, a.ids) for e, group in zip(encoded, answers, strict=True) for a in group]
        assert [chat.decode(roles.tokenizer, ids) for _, ids in flat] == [r["answer"] for r in rows]
        for (prompt, ids), r in zip(flat, rows, strict=True):
            assert set(r["kl_compared"]) == set(before)
            own = log_probability(roles, number[name], prompt, ids)
            for other, value in {**r["kl_compared"], "sft": r["kl"]}.items():
                assert value == pytest.approx(own - log_probability(roles, number[other], prompt, ids), abs=2e-4)
        for other in before:
            pair, = (p for p in told["paired"] if (p["a"], p["b"]) == (name, other))
            assert pair["kl"] == pytest.approx(statistics.fmean(r["kl_compared"][other] for r in rows))
    assert told["models"]["sft"]["kl"] == 0.0
    assert abs(told["models"]["v1.0"]["kl"] - told["paired"][1]["kl"]) > 0.1  # far enough apart for a mix-up to show


def test_a_model_beside_itself_differs_in_nothing(tmp_path_factory, tmp_path):
    """Both answer the same prompts with the same seeds, so that differences are paired."""
    section = evaluated(tmp_path_factory, tmp_path, STAGE | {"models": {"one": "@sft", "two": "@sft"}, "compare": [["two", "one"]]})
    one, two = rows_of(section).values()
    assert [r["answer"] for r in one] == [r["answer"] for r in two] and len({r["answer"] for r in one}) > 12
    told = section.results()
    pair, = told["paired"]
    assert told["models"]["two"]["win_rate"]["mean"] == 0.5 and pair["kl"] == pytest.approx(0, abs=1e-6)
    assert [pair[k]["mean"] for k in ("merged", "helpfulness", "safety", "unsafe_share", "tokens")] == [0.0] * 5
    assert [c["met"] for c in told["checks"]] == [False, True, True]


def again(section, monkeypatch, kill: int | None = None):
    """The same command on the same folder, and the roles it asked to answer; kill: it dies when that many have answered."""
    fresh, asked, real = started(Run(section.recipe), "e"), [], evaluate.sample_and_score

    def answering(roles, role, *args, **kwargs):
        if len(asked) == kill:
            raise Killed
        asked.append(role)
        return real(roles, role, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(evaluate, "sample_and_score", answering)
        if kill is None:
            evaluate.run(fresh)
        else:
            with pytest.raises(Killed):
                evaluate.run(fresh)
    return fresh, asked


@pytest.mark.parametrize("after", [1, 2])
def test_a_cut_evaluation_goes_on_with_the_next_model(straight, tmp_path_factory, tmp_path, monkeypatch, after):
    section = make_run(tmp_path_factory, tmp_path, {"e": STAGE}).section("e")
    cut, asked = again(section, monkeypatch, kill=after)
    assert len(asked) == after and cut.state() == "started" and len(list(cut.folder.glob("answers-*.json"))) == after
    fresh, asked = again(section, monkeypatch)
    assert asked == ["model_0", "model_1", "model_2"][after:]
    assert outcome(fresh) == outcome(straight) and fresh.state() == "done"


@pytest.mark.parametrize("damage", ["cut", "flip", "null", "list", "missing"])
def test_damaged_answers_are_asked_for_again(straight, monkeypatch, damage):
    before, path = outcome(straight), straight.folder / "answers-v1.0.json"
    whole = path.read_bytes()
    at = re.search(rb'"merged": -?\d+\.(\d)', whole).start(1)  # a digit, to another digit
    path.write_bytes({"cut": whole[:-2], "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], "null": b"null", "list": b"[]",
                      "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    (straight.folder / "DONE").unlink()
    fresh, asked = again(straight, monkeypatch)
    assert asked == ["model_1"] and outcome(fresh) == before and fresh.state() == "done"


# -- the reward models and the gate's threshold ------------------------------------------------------------------------------------------


def scorer_of(factory, folder, told: dict | None, threshold="auto", **stage):
    """A Scorer on a copy of the reward sections whose safety model's results say `told`."""
    run = make_run(factory, folder, {"e": STAGE | stage})
    path = run.folder / "reward_safety" / "results.json"
    if told is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | told))
    section = started(run, "e")
    return load_scorer(section, roles_for(section), section.config.helpfulness, section.config.safety, threshold, 512)


@pytest.mark.parametrize("told, threshold, share, note", [
    ({"threshold_precision_90": 0.42}, "auto", 0.42, "precision 0.9 on its held-out rows"),
    ({"threshold_precision_90": None}, "auto", 0.15, "no score reaches precision 0.9"),
    ({"threshold_precision_90": 0.42}, 0.3, 0.3, "0.3 (recipe)"), ({"threshold_precision_90": 0.42}, 0.15, 0.15, "0.15 (recipe)")])
def test_the_gates_threshold(tmp_path_factory, tmp_path, told, threshold, share, note):
    scorer = scorer_of(tmp_path_factory, tmp_path, told | {"score_mean": 2.0, "score_std": 0.5}, threshold)
    assert scorer.threshold == pytest.approx(math.log(share / (1 - share)), abs=1e-12)
    assert note in scorer.threshold_note and f"{share:.3f}" in scorer.threshold_note
    assert scorer.statistics["safety"] == (2.0, 0.5)


def test_auto_reads_what_the_safety_model_measured_on_its_own_rows(tmp_path_factory, tmp_path):
    """Recomputed from scratch: the highest cut below which at least 90 % of at least five labelled answers are unsafe."""
    scorer = scorer_of(tmp_path_factory, tmp_path, None)
    pairs = make_run(tmp_path_factory, tmp_path, {"e": STAGE}).data_of("safety").held_out
    tokenizer = scorer.roles.tokenizer
    raw = scorer([chat.encode_prompt(tokenizer, p.prompt) for p in pairs],
                 [[chat.encode_answer(tokenizer, p.prompt, a) for a in (p.chosen, p.rejected)] for p in pairs])["safety"]
    labels = [(p.chosen_safe, p.rejected_safe) for p in pairs]
    ranked = sorted((s, not safe) for scores, two in zip(raw, labels, strict=True) for s, safe in zip(scores, two, strict=True))
    cuts = [(ranked[i - 1][0] + ranked[i][0]) / 2 for i in range(5, len(ranked))
            if ranked[i - 1][0] < ranked[i][0] and statistics.fmean(unsafe for _, unsafe in ranked[:i]) >= 0.9]
    assert cuts and scorer.threshold == pytest.approx(max(cuts), abs=1e-4)


def test_a_scale_needs_held_out_scores(tmp_path_factory, tmp_path):
    with pytest.raises(PosttrainError, match=r"standardize_rewards: the safety model in .* has no mean and deviation of held-out scores"):
        scorer_of(tmp_path_factory, tmp_path, {"score_mean": None, "score_std": None}, 0.15, standardize_rewards=True)


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path_factory, tmp_path):
    run = make_run(tmp_path_factory, tmp_path, {"e": STAGE})
    path = run.folder / "reward_safety" / "model" / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = told["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]  # the same words, two ids changed
    path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(PosttrainError, match=r"stages\.e\.safety: the reward model in reward_safety has another tokenizer.*same base"):
        evaluate.run(started(run, "e"))


@pytest.mark.parametrize("ref, match", [("base", r"stages\.e\.helpfulness: 'base' is no reward model"), ("@sft", "no scalar head")])
def test_what_is_no_reward_model_is_refused(tmp_path_factory, tmp_path, ref, match):
    with pytest.raises(PosttrainError, match=match):
        scorer_of(tmp_path_factory, tmp_path, None, helpfulness=ref)
