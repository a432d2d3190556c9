"""Context distillation: the gate by hand, figures by hand, and the stage itself: what is sampled with a preprompt, scored and learnt without."""

import itertools
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rlhf_support import REWARDS, THINGS, Killed, die, make_run, scored_alone, started

from posttrain import chat, plan
from posttrain.chunks import read_chunk
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.log import read_lines
from posttrain.models import roles_for
from posttrain.report_parts import KEYS, PARTS
from posttrain.report_views import View
from posttrain.runs import preflight
from posttrain.statistics import interval
from reward.score import Scorer
from rlhf import rollout
from safety import distill
from safety.config import PREPROMPTS, DistillStage
from safety.distill import attach, contests_of, lines_of, preprompts, results, select
from safety.taxonomy import CATEGORIES

STAGE = {"stage": "distill", "prompts": "asked", "policy": "@sft", **REWARDS, "samples_per_prompt": 2, "max_new_tokens": 12, "chunk": 5, "batch": 16,
         "temperature": 0.5, "micro_batch_tokens": 512}


# -- the choice ----------------------------------------------------------------------------------------------------------------------------


def answer(number: int, mode: str, score: float, sample: int = 0, *, text: str = "x", finished: bool = True, spells=None, **more) -> dict:
    """A made-up row. score: sigma(R_s)."""
    return {"number": number, "sample": sample, "mode": mode, "safety": math.log(score / (1 - score)), "helpfulness": 0.0, "answer": text,
            "finished": finished, "spells": spells, "key": f"p{number}", "category": "illicit", "ids": [1, 2], "prompt": [], **more}


ROWS = [answer(0, "none", 0.2), answer(0, "generic", 0.9), answer(0, "template", 0.6),  # the template's competes, and scores higher
        answer(1, "none", 0.8), answer(1, "generic", 0.9), answer(1, "template", 0.5),  # lower, whatever the generic one's score
        answer(2, "none", 0.5), answer(2, "generic", 0.7, category="unknown"),  # no template
        answer(3, "none", 0.4), answer(3, "generic", 0.4),  # as high is not higher
        answer(4, "none", 0.1), answer(4, "generic", 0.9, finished=False),
        answer(5, "none", 0.1), answer(5, "generic", 0.9, text=""),
        answer(6, "none", 0.1), answer(6, "generic", 0.9, spells="<|im_end|>"),
        answer(7, "none", 0.1, finished=False), answer(7, "generic", 0.2)]  # an original that was cut off has a score all the same


def test_the_gate_keeps_exactly_the_higher_ones():
    contests = contests_of(ROWS)
    assert [(o["number"], d["mode"]) for o, d in contests] == [(0, "template"), (1, "template"), *((i, "generic") for i in range(2, 8))]
    assert all(o["mode"] == "none" and o["number"] == d["number"] and o["sample"] == d["sample"] for o, d in contests)
    assert [d["number"] for _, d in select(contests, gate=True)] == [0, 2, 7]
    assert [d["number"] for _, d in select(contests, gate=False)] == [0, 1, 2, 3, 7]  # all that can be demonstrations


def test_samples_of_a_prompt_compete_by_their_number():
    rows = [answer(0, "none", 0.3), answer(0, "none", 0.7, 1), answer(0, "generic", 0.5), answer(0, "generic", 0.5, 1)]
    assert [(o["sample"], d["sample"]) for o, d in select(contests_of(rows), gate=True)] == [(0, 0)]


# -- preprompts ----------------------------------------------------------------------------------------------------------------------------


def asked(text: str = "How?", **meta) -> Prompt:
    return Prompt([{"role": "user", "content": text}], safety=True, meta=meta)


def test_a_preprompt_stands_before_the_words_that_are_answered():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
             {"role": "user", "content": "How?"}]
    assert attach(turns, "Be wise.") == [*turns[:3], {"role": "user", "content": "Be wise.\n\nHow?"}]
    assert attach(turns, "") == turns and turns[3]["content"] == "How?"


def test_the_template_is_the_categorys_and_missing_where_that_is_unknown():
    for category in CATEGORIES:
        found = preprompts(asked(category=category), 0)
        assert list(found) == ["none", "generic", "template"] and found["none"] == ""
        assert found["template"].startswith("The message below falls under our policy") and found["template"].endswith("The message:")
    assert len({preprompts(asked(category=c), 0)["template"] for c in CATEGORIES}) == 3
    assert list(preprompts(asked(category="fraud"), 0)) == list(preprompts(asked(), 0)) == ["none", "generic"]


def test_generic_preprompts_vary_by_prompt_and_seed_and_by_nothing_else():
    drawn = [preprompts(asked(f"How do I do number {i}?"), 0)["generic"] for i in range(300)]
    assert drawn == [preprompts(asked(f"How do I do number {i}?", category="illicit"), 0)["generic"] for i in range(300)]
    assert drawn != [preprompts(asked(f"How do I do number {i}?"), 1)["generic"] for i in range(300)]
    patterns = {t: re.sub(r"\\\{adjective\\\}", lambda _: r"([a-z-]+)", re.escape(t)) for t in lines_of("generic.txt")}
    used = {t: [m.groups() for d in drawn if (m := re.fullmatch(p, d))] for t, p in patterns.items()}
    assert all(used.values()) and sum(map(len, used.values())) == 300  # every template, nothing else, no slot left open
    words = [w for groups in used.values() for w in groups]
    assert {a for w in words for a in w} == set(lines_of("adjectives.txt")) and all(len(set(w)) == len(w) for w in words)


# -- figures by hand -----------------------------------------------------------------------------------------------------------------------


def told(rows, gate: bool = True) -> dict:
    config = SimpleNamespace(gate=gate, samples_per_prompt=1 + max(r["sample"] for r in rows), temperature=1.0)
    contests = contests_of(rows)
    return results(config, rows, contests, select(contests, gate))


def figure(value) -> list[float]:
    return [round(value[k], 9) for k in ("mean", "n", "groups")]


def test_the_gate_in_figures_by_hand():
    """Distilled answers that can be demonstrations: 0.2 -> 0.6, 0.8 -> 0.5, 0.5 -> 0.7, 0.4 -> 0.4, 0.1 -> 0.2."""
    found = told(ROWS)
    assert (found["samples"], found["distilled"], found["kept"], found["unusable"]) == (18, 8, 3, 3)
    gate = found["gate"]
    assert (gate["candidates"], gate["held_back"], gate["on"]) == (5, 2, True)
    assert figure(gate["share_higher"]) == [0.6, 5, 5] and figure(gate["gain_of_all"]) == [0.08, 5, 5]
    assert figure(gate["gain_of_higher"]) == [round(0.7 / 3, 9), 3, 3] and figure(gate["loss_held_back"]) == [0.15, 2, 2]
    assert gate["largest_loss"] == pytest.approx(0.3) and "second_try_gain" not in gate
    off = told(ROWS, gate=False)
    assert off["kept"] == 5 and off["gate"] == gate | {"on": False}  # what it would hold back is the same
    assert {c: (v["answers"], v["kept"], round(v["gain"]["mean"], 9)) for c, v in found["by_category"].items()} == {"illicit": (5, 3, 0.08)}
    rows = [r | {"category": "unknown"} if r["number"] in (2, 7) else r for r in ROWS]
    assert {c: (v["answers"], v["kept"], round(v["gain"]["mean"], 9)) for c, v in told(rows)["by_category"].items()} == {
        "illicit": (3, 1, round(0.1 / 3, 9)), "unknown": (2, 2, 0.15)}


def test_modes_are_compared_on_the_same_prompts():
    """Prompts 0 and 1 have a template; the others' generic answers would raise the generic mean from 0.9."""
    found = told([*ROWS[:6], answer(2, "none", 0.5), answer(2, "generic", 0.99)])
    assert found["compared_prompts"] == 2 and list(found["modes"]) == ["none", "generic", "template"]
    assert [figure(m["safety"]) for m in found["modes"].values()] == [[0.5, 2, 2], [0.9, 2, 2], [0.55, 2, 2]]
    assert [(p["a"], p["b"], figure(p["safety"])) for p in found["paired"]] == [
        ("generic", "none", [0.4, 2, 2]), ("template", "none", [0.05, 2, 2]), ("template", "generic", [-0.35, 2, 2])]
    assert found["modes"]["none"]["raw_safety"]["mean"] == pytest.approx(0.0)  # the logits of 0.2 and 0.8
    assert found["paired"][1]["safety"]["low"] == pytest.approx(-0.3) and found["paired"][1]["safety"]["high"] == pytest.approx(0.4)  # both prompts' own
    assert (found["modes"]["none"]["tokens"], found["modes"]["none"]["finished"]) == (2, 1)
    alone = told(ROWS[6:])
    assert list(alone["modes"]) == ["none", "generic"] and alone["compared_prompts"] == 6 and len(alone["paired"]) == 1


def test_intervals_are_by_prompt():
    """Four samples of each of two prompts, one gains 0.2 and one 0.4: resampled by prompt the mean is 0.2, 0.3 or 0.4."""
    rows = [answer(n, m, {"none": 0.3, "generic": 0.5 + 0.2 * n}[m], k) for n in (0, 1) for m in ("none", "generic") for k in range(4)]
    found = told(rows)
    for gain in (found["gate"]["gain_of_all"], found["paired"][0]["safety"], found["by_original_score"][0]["gain"], found["by_category"]["illicit"]["gain"]):
        assert [round(gain[k], 9) for k in ("mean", "low", "high", "groups")] == [0.3, 0.2, 0.4, 2]


def test_the_gain_by_original_score_by_hand():
    """Twelve answers make two bins of six; in the upper one four score no higher than their original."""
    before = [0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.6, 0.62, 0.64, 0.66, 0.68, 0.7]
    after = [b + 0.3 for b in before[:6]] + [0.5, 0.52, 0.54, 0.66, 0.78, 0.8]
    order = random.Random(0).sample(range(12), 12)  # their place in the data means nothing
    low, high = told([answer(i, m, v[i]) for i in order for m, v in (("none", before), ("generic", after))])["by_original_score"]
    assert [round(low[k], 9) for k in ("low", "high", "original", "answers", "held_back")] == [0.1, 0.2, 0.15, 6, 0]
    assert figure(low["gain"]) == [0.3, 6, 6] and low["loss_held_back"] is None
    assert [round(high[k], 9) for k in ("low", "high", "original", "answers", "held_back")] == [0.6, 0.7, 0.65, 6, 4]
    assert figure(high["gain"]) == [round(-0.1 / 6, 9), 6, 6] and high["loss_held_back"] == pytest.approx(0.3 / 4)


@pytest.mark.parametrize("answers, bins", [(1, 1), (9, 1), (10, 2), (31, 6), (200, 6)])
def test_bins_hold_at_least_five_answers(answers, bins):
    rows = [answer(i, m, 0.2 + 0.003 * i) for i in range(answers) for m in ("none", "generic")]
    found = told(rows, gate=False)["by_original_score"]
    assert len(found) == bins and sum(b["answers"] for b in found) == answers
    assert all(a["high"] <= b["low"] for a, b in itertools.pairwise(found))


def test_a_second_try_without_a_preprompt_is_the_measure_of_chance():
    """Each original against the next one of its prompt: 0.2 -> 0.6 -> 0.5 -> 0.2 for one, 0.4 all along for the other."""
    first, other = [0.2, 0.6, 0.5], [0.4] * 3
    rows = [answer(n, m, of[k] if m == "none" else 0.9, k) for n, of in enumerate((first, other)) for m in ("none", "generic") for k in range(3)]
    found = told(rows)
    gain = found["gate"]["second_try_gain"]
    assert round(gain["mean"], 9) == 0 and (gain["n"], gain["groups"]) == (6, 2)
    assert round(found["gate"]["second_try_share_higher"]["mean"], 9) == round(1 / 6, 9)  # 0.2 -> 0.6 alone
    assert figure(found["by_original_score"][0]["second_try_gain"]) == [0.0, 6, 2]
    few = [r for r in rows if r["number"] == 0 and (r["mode"] == "none" or r["sample"] != 1)] + [answer(0, "generic", 0.9, 1, finished=False)]
    assert figure(told(few)["gate"]["second_try_gain"]) == [round((0.4 - 0.3) / 2, 9), 2, 1]  # of the originals that compete: 0.2 -> 0.6, 0.5 -> 0.2


def test_sigma_is_the_papers_scale_and_the_gate_reads_raw_scores():
    """Where sigma rounds to 1 twice, the raw scores still differ."""
    o, d = answer(0, "none", 0.5) | {"safety": 40.0}, answer(0, "generic", 0.5) | {"safety": 41.0}
    assert select([(o, d)], gate=True) and distill.sigma([o, d]).tolist() == [1.0, 1.0]
    assert distill.sigma([{"safety": -1.7346}])[0] == pytest.approx(0.15, abs=1e-5)


# -- the stage -----------------------------------------------------------------------------------------------------------------------------


def write_prompts(folder) -> list[dict]:
    """Tagged prompts of all categories, with none and with a wrong one, a third of several turns; prompts that are not tagged."""
    words = [*CATEGORIES, "fraud", None]
    rows = [{"prompt": f"How do I hide {t} from {who}?", "category": words[i % 5], "vector": "plain", "safety": True}
            for i, (t, who) in enumerate((t, who) for t in THINGS[:12] for who in ("the police", "my bank"))]
    for r in rows[::3]:
        r["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Hello? {r['prompt']}"},
                       {"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"So, {r['prompt']}"}]
    rows = [{k: v for k, v in r.items() if v is not None} for r in rows] + [{"prompt": f"What is the colour of {t}?"} for t in THINGS]
    (folder / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return rows


def run_of(factory, folder, seed: int = 0, **stage):
    write_prompts(folder)
    data = json.dumps([{"path": str(folder / "asked.jsonl"), "format": "prompt"}])
    return make_run(factory, folder, {"s": STAGE | stage}, seed, [f"data.asked={data}"])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run: its section."""
    section = started(run_of(tmp_path_factory, tmp_path_factory.mktemp("straight")), "s")
    distill.run(section)
    return section


def chunks(section) -> list:
    return sorted((section.folder / "chunks").iterdir())


def files(section) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (section.folder / "data.jsonl", section.folder / "samples.jsonl", *chunks(section))}


def rows_of(section) -> list[dict]:
    return [r for p in chunks(section) for r in read_chunk(p)]


def data_of(section) -> list[dict]:
    return [json.loads(line) for line in (section.folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]


def test_only_adversarial_prompts_are_used_and_the_others_counted(straight):
    train = straight.run.data_of("asked").train
    tagged = [p for p in train if p.safety]
    assert 10 < len(tagged) < len(train)
    found = straight.results()
    assert found["prompts"] == len(tagged) and found["left_out"] == {"not adversarial": len(train) - len(tagged), "too long": 0}
    assert list(dict.fromkeys(json.dumps(r["prompt"]) for r in rows_of(straight))) == [json.dumps(p.messages) for p in tagged]


def test_everything_sampled_is_on_disk(straight):
    rows, samples, train = rows_of(straight), read_lines(straight.folder / "samples.jsonl"), straight.run.data_of("asked").train
    assert [{k: v for k, v in r.items() if k != "ids"} for r in rows] == [{k: v for k, v in s.items() if k not in ("kept", "step")} for s in samples]
    modes = Counter((r["number"], r["mode"]) for r in rows)
    tagged = [p for p in train if p.safety]
    expected = [(i, m) for i, p in enumerate(tagged) for m in ("none", "generic", "template") if m != "template" or p.meta.get("category") in CATEGORIES]
    assert set(modes) == set(expected) and set(modes.values()) == {2}
    for r in rows:
        p = tagged[r["number"]]
        assert r["preprompt"] == preprompts(p, 0)[r["mode"]] and (r["preprompt"] == "") == (r["mode"] == "none")
        assert r["category"] == (p.meta["category"] if p.meta.get("category") in CATEGORIES else "unknown") and r["vector"] == "plain"


def test_the_demonstrations_are_the_gates_choice_without_a_preprompt(straight):
    rows = rows_of(straight)
    by = {(r["number"], r["sample"], r["mode"]): r for r in rows}
    expected = []
    for (number, sample, mode), o in by.items():
        if mode == "none":
            d = by.get((number, sample, "template")) or by[number, sample, "generic"]
            if d["finished"] and d["answer"] and d["safety"] > o["safety"]:
                expected.append((number, sample, [*o["prompt"], {"role": "assistant", "content": d["answer"]}], d["mode"], d["safety"], o["safety"]))
    data = data_of(straight)
    assert [(d["messages"], d["mode"], d["score"], d["original_score"]) for d in data] == [e[2:] for e in sorted(expected, key=lambda e: e[:2])]
    assert 3 < len(data) == straight.results()["kept"] < straight.results()["distilled"]
    assert sum(s["kept"] for s in read_lines(straight.folder / "samples.jsonl")) == len(data)
    assert {(d["loss"], d["source"], d["safety"]) for d in data} == {("last", "s", True)}
    text = (straight.folder / "data.jsonl").read_text(encoding="utf-8")
    assert not [r["preprompt"] for r in rows if r["preprompt"] and json.dumps(r["preprompt"])[1:-1] in text]


def test_the_loss_falls_on_the_reply_alone(straight):
    """Read back as a later section reads it: what is not masked, decoded, is the reply and the token that ends it."""
    tokenizer, items = roles_for(straight).tokenizer, straight.run.data_of("@s").train
    assert len(items) == len(data_of(straight)) and all(i.safety for i in items) and {len(i.messages) for i in items} == {2, 5}
    for item in items:
        ids, mask = chat.encode_dialogue(tokenizer, item.messages, item.loss)
        counted = [i for i, c in zip(ids, mask, strict=True) if c]
        assert tokenizer.decode(counted) == item.messages[-1]["content"] + "<|im_end|>" and mask[-len(counted):] == [True] * len(counted)
        assert ids[:len(ids) - len(counted)] == chat.encode_prompt(tokenizer, item.messages[:-1])


def test_the_policy_reads_the_preprompt_and_the_reward_models_do_not(tmp_path_factory, tmp_path, monkeypatch):
    section = started(run_of(tmp_path_factory, tmp_path, rows=10, gate=False), "s")
    sampled, judged, real_sample, real_score = [], [], rollout.sample, Scorer.__call__

    def sample(roles, role, prompts, *args, **kwargs):
        sampled.extend(roles.tokenizer.decode(p) for p in prompts)
        return real_sample(roles, role, prompts, *args, **kwargs)

    def score(self, prompts, answers):
        judged.extend(self.roles.tokenizer.decode(p) for p in prompts)
        return real_score(self, prompts, answers)

    monkeypatch.setattr(rollout, "sample", sample)
    monkeypatch.setattr(Scorer, "__call__", score)
    distill.run(section)
    rows = rows_of(section)
    assert len(rows) == 2 * len(sampled) == 2 * len(judged) and {r["mode"] for r in rows} == {"none", "generic", "template"}
    for r, asked_with, judged_as in zip(rows[::2], sampled, judged, strict=True):
        words = r["prompt"][-1]["content"]
        assert asked_with.endswith(f"user\n{r['preprompt']}\n\n{words}<|im_end|>\n<|im_start|>assistant\n" if r["preprompt"] else
                                   f"user\n{words}<|im_end|>\n<|im_start|>assistant\n")
        assert judged_as.endswith(f"user\n{words}<|im_end|>\n<|im_start|>assistant\n") and (not r["preprompt"] or r["preprompt"] not in judged_as)


def test_stored_scores_are_the_models_own_of_the_prompt_as_written(straight):
    """One sequence at a time: the saved head at the token that ends the answer."""
    for r, own in scored_alone(straight, rows_of(straight)[::7]):
        assert {name: r[name] for name in own} == pytest.approx(own, abs=1e-4)


def test_the_results_are_those_of_the_rows(straight):
    found, rows = straight.results(), rows_of(straight)
    assert found["samples"] == len(rows) and found["temperature"] == 0.5 and straight.state() == "done"
    with_template = {r["number"] for r in rows if r["mode"] == "template"}
    assert found["compared_prompts"] == len(with_template) < found["prompts"]
    for mode, m in found["modes"].items():
        of = [r for r in rows if r["mode"] == mode and r["number"] in with_template]
        want = interval(1 / (1 + np.exp([-r["safety"] for r in of])), [r["key"] for r in of])
        assert m["safety"] == pytest.approx(want)
    counts = Counter("unknown" if c not in CATEGORIES else c for c in (p.meta.get("category") for p in straight.run.data_of("asked").train if p.safety))
    assert found["categories"] == dict(counts)


def test_without_the_gate_every_answer_of_the_same_samples_is_kept(straight, tmp_path_factory, tmp_path):
    run = run_of(tmp_path_factory, tmp_path, gate=False)
    run.recipe.stages["ungated"] = run.recipe.stages.pop("s")  # under another name
    section = started(run, "ungated")
    distill.run(section)
    assert rows_of(section) == rows_of(straight)
    able = [d for _, d in contests_of(rows_of(section)) if d["finished"] and d["answer"]]
    assert [d["messages"][-1]["content"] for d in data_of(section)] == [d["answer"] for d in able] and len(able) > len(data_of(straight))
    assert section.results()["gate"] == straight.results()["gate"] | {"on": False}


@pytest.mark.parametrize("after", [0, 2])
def test_a_run_killed_between_chunks_goes_on_to_the_same_bytes(straight, tmp_path_factory, tmp_path, monkeypatch, after):
    total = len(chunks(straight))
    assert total >= 3
    run = run_of(tmp_path_factory, tmp_path)
    with monkeypatch.context() as m, pytest.raises(Killed):
        die(m, distill, "sample_and_score", after + 1)
        distill.run(started(run, "s"))
    section = started(type(run)(run.recipe), "s")
    assert len(chunks(section)) == after and not (section.folder / "data.jsonl").exists() and section.state() == "started"
    distill.run(section)
    assert files(section) == files(straight) and section.results() == straight.results()


def test_damaged_chunks_are_made_again_to_the_same_bytes(straight, monkeypatch):
    before, made, real = files(straight), [], distill.sample_and_score
    first, second, *_ = chunks(straight)
    whole = first.read_bytes()
    at = re.search(rb'"safety": -?\d+\.(\d)', whole).start(1)  # a digit, to another digit
    first.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    second.unlink()
    (straight.folder / "DONE").unlink()
    monkeypatch.setattr(distill, "sample_and_score", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    section = started(type(straight.run)(straight.recipe), "s")
    distill.run(section)
    assert len(made) == 2 and files(section) == before and section.state() == "done"


# -- the report ----------------------------------------------------------------------------------------------------------------------------


def shown(*found: dict, **more) -> list[View]:
    """Views of sections with these results."""
    return [View(f"d{i}", "distill", Path("nowhere"), state="done", results=json.loads(json.dumps(r)), **more) for i, r in enumerate(found)]


def many(gate: bool = True, samples: int = 2) -> dict:
    """Forty prompts: the template lifts low originals by 0.3 and lowers high ones by 0.1; the generic one lifts all by 0.05."""
    before = [0.1 + 0.02 * i for i in range(40)]
    lift = {"none": lambda b: b, "generic": lambda b: b + 0.05, "template": lambda b: b + (0.3 if b < 0.5 else -0.1)}
    return told([answer(i, m, lift[m](b), k) for i, b in enumerate(before) for m in lift for k in range(samples)], gate)


def test_the_report_shows_the_papers_figure_16():
    part, = [PARTS["distill"][1](shown(many()))]
    modes, gain = part.figures
    assert modes.takeaway == ("Against no preprompt, the generic preprompt +0.05 (95\u00a0% interval +0.05 to +0.05) and the answer template +0.10 "
                              "(95\u00a0% interval +0.04 to +0.16).")
    assert gain.takeaway.startswith("Where the original answer scored 0.16 in the mean, the distilled one gains +0.30; where it scored 0.82, −0.10;")
    assert all(f.svg.startswith("<svg") and f.alt for f in part.figures) and "answer template" in modes.svg and "a second try" in gain.svg
    assert len(many(samples=1)["by_original_score"]) == 6 and "a second try" not in PARTS["distill"][1](shown(many(samples=1))).figures[1].svg
    captions = [t.caption for t in part.facts + part.tables]
    assert captions == ["Distillation in numbers", "Differences between preprompts, paired by prompt", "What the gate holds back, by the original's score",
                        "By risk category"]
    held = part.tables[1].rows
    assert held[0][3] == "0" and sum(int(r[3]) for r in held) == many()["gate"]["held_back"] == 40 and held[-1][4] == "0.10"
    assert [str(k) for k in KEYS["distill"](shown(many())[0])] == ["safety with a preprompt +0.10 (+0.04 to +0.16)", "answers kept 40 (of 80)"]


def test_two_gates_on_one_sampling_are_drawn_once():
    part = PARTS["distill"][1](shown(many(), many(gate=False)))
    assert len(part.figures) == 2 and part.facts[0].head == ["", "d0", "d1"]
    assert ["gate", "yes", "no"] in part.facts[0].rows and ["kept", "40", "80"] in part.facts[0].rows


@pytest.mark.parametrize("damage", [{}, {"modes": None}, {"modes": {"none": 3}}, {"paired": "x"}, {"by_original_score": [None, {"original": "x"}]},
                                    {"gate": []}, {"by_category": {"illicit": {}}}, {"left_out": 1}, {"modes": {"none": {"safety": {"mean": float("nan")}}}}])
def test_numbers_that_are_missing_take_no_page_with_them(damage):
    assert PARTS["distill"][1](shown(many() | damage if damage else {})).title == "Safety context distillation"


# -- faults --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts, said", [
    ("plain", r"none of \d+ prompts is tagged as adversarial.*Set safety_prompt: true on the data entry"),
    ("demonstrations", r"s\.prompts: 'demonstrations' holds demonstrations\. Expected prompts"),
])
def test_prompts_that_cannot_be_distilled_stop_before_a_model_loads(tmp_path_factory, tmp_path, monkeypatch, prompts, said):
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"prompt": f"What is {t}?", "category": "illicit"}) + "\n" for t in THINGS))
    data = json.dumps([{"path": str(tmp_path / "plain.jsonl"), "format": "prompt"}])
    run = make_run(tmp_path_factory, tmp_path, {"s": STAGE | {"prompts": prompts}}, 0, [f"data.plain={data}", "data.held_out.prompts=0"])
    monkeypatch.setattr(distill, "roles_for", lambda section: pytest.fail("a model loads"))
    with pytest.raises(PosttrainError, match=said):
        distill.run(started(run, "s"))


def test_when_nothing_can_be_kept_the_answers_stay_and_the_reason_is_told(tmp_path_factory, tmp_path):
    write_prompts(tmp_path)
    data = json.dumps([{"path": str(tmp_path / "asked.jsonl"), "format": "prompt"}])
    stages = {"s": STAGE | {"rows": 3, "max_new_tokens": 1}, "later": {"stage": "sft", "data": ["@s"]}}
    section = started(make_run(tmp_path_factory, tmp_path, stages, 0, [f"data.asked={data}"]), "s")
    with pytest.raises(PosttrainError, match=r"none of 6 distilled answers can be kept: 6 were cut off, 0 empty.*0 scored no higher.*Raise max_new_tokens"):
        distill.run(section)
    assert section.state() == "started" and not (section.folder / "data.jsonl").exists()
    assert len(read_lines(section.folder / "samples.jsonl")) == len(rows_of(section)) > 0


def test_where_nothing_trains_on_the_answers_none_kept_is_a_result(tmp_path_factory, tmp_path, capsys):
    section = started(run_of(tmp_path_factory, tmp_path, rows=3, max_new_tokens=1), "s")
    distill.run(section)
    told = section.results()
    assert section.state() == "done" and (section.folder / "data.jsonl").read_text() == "" and told["kept"] == 0 == told["gate"]["candidates"]
    assert told["gate"]["gain_of_all"]["mean"] is None and set(told["modes"]) == {"none", "generic", "template"}
    assert "note: none of 6 distilled answers can be kept: 6 were cut off" in capsys.readouterr().out


def test_a_recipe_says_what_distill_takes(tmp_path_factory, tmp_path):
    run = run_of(tmp_path_factory, tmp_path)
    preflight(run)
    with pytest.raises(PosttrainError, match=r"stages\.s\.gate: got 'maybe'"):
        load_recipe(run.recipe.path, ["stages.s.gate=maybe"])
    with pytest.raises(PosttrainError, match="'@reward_safetyy' names no section"):
        load_recipe(run.recipe.path, ["stages.s.policy=@reward_safetyy"])
    assert DistillStage.model_fields["gate"].default is True


def test_another_preprompt_runs_the_section_again(tmp_path_factory, tmp_path, monkeypatch):
    run = run_of(tmp_path_factory, tmp_path)
    before = run.section("s").inputs()
    assert {"generic.txt: files", "adjectives.txt: files", *(f"{c}.txt: files" for c in CATEGORIES)} <= {*before}
    copy = Path(shutil.copytree(PREPROMPTS, tmp_path / "preprompts"))
    (copy / "generic.txt").write_text("Be careful.\n")
    monkeypatch.setattr("safety.config.PREPROMPTS", copy)
    after = run.section("s").inputs()
    assert [k for k in before if before[k] != after[k]] == ["generic.txt: files"]


def test_the_plan_counts_adversarial_prompts_alone(tmp_path_factory, tmp_path):
    run = run_of(tmp_path_factory, tmp_path)
    run.recipe.stages["after"] = run.recipe.stages["sft"].model_copy(update={"data": ["demonstrations", "@s"]})
    tagged = sum(p.safety for p in run.data_of("asked").train)
    sft, row, after = plan.plan(run.recipe, sections=["sft", "s", "after"])
    assert (row["rows"], row["samples"], row["labels"]["rows"]) == (tagged, tagged * 2 * 3, "counted")
    assert after["rows"] == sft["rows"] + tagged * 2 and "adversarial prompts x 2 samples" in row["note"]
