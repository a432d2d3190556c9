"""Rejection sampling: the best finished answer is kept, everything stays on disk, a chunk is the same bytes however often it is made."""

import itertools
import json
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from rlhf_support import REWARDS, Killed, die, make_run, scored_alone, started

from posttrain import distributed
from posttrain.chunks import read_chunk, write_chunk
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from rlhf import rejection
from rlhf.rejection import best_of_n, select

STAGE = {"stage": "rejection", "prompts": "prompts", "policy": "@sft", **REWARDS, "samples_per_prompt": 4, "max_new_tokens": 12, "rows": 20,
         "chunk": 8, "batch": 16, "temperature": 0.5, "micro_batch_tokens": 512, "safety_threshold": 0.5}


def answer(merged: float, finished: bool = True, text: str = "x", prompt: str = "p", **more) -> dict:
    return {"prompt": [{"role": "user", "content": prompt}], "answer": text, "merged": merged, "finished": finished, **more}


# -- the choice --------------------------------------------------------------------------------------------------------------------


def test_the_best_finished_answer_is_kept():
    bags = [[answer(1.0), answer(3.0), answer(2.0)],
            [answer(9.0, finished=False), answer(-5.0), answer(-4.0)],  # the best was cut off
            [answer(1.0, finished=False), answer(2.0, finished=False)],  # none came to its end
            [answer(7.0, text=""), answer(0.0)],  # the best says nothing
            [answer(2.0, text="first"), answer(2.0, text="second")],
            [answer(9.0, text="<|im_end|>", spells="<|im_end|>"), answer(-9.0)]]  # no later stage could read the best as text
    kept = select(bags)
    assert {i: (r["merged"], r["answer"]) for i, r in kept.items()} == {0: (3.0, "x"), 1: (-4.0, "x"), 3: (0.0, "x"), 4: (2.0, "first"), 5: (-9.0, "x")}
    assert all(kept[i] in bags[i] and kept[i]["finished"] for i in kept)


def test_best_of_n_against_every_subset():
    """The expected maximum and median of n answers are the means over all subsets of n."""
    rng = np.random.default_rng(3)
    values = [rng.normal(size=6).round(1).tolist() for _ in range(5)]  # rounded: ties happen
    bags = [[answer(v, prompt=f"p{i}") for v in row] for i, row in enumerate(values)]
    rows = best_of_n(bags, [1, 2, 3, 4, 6])
    assert [r["n"] for r in rows] == [1, 2, 3, 4, 6]
    for row in rows:
        subsets = [[list(c) for c in itertools.combinations(v, row["n"])] for v in values]
        assert row["max"] == pytest.approx(statistics.fmean(statistics.fmean(map(max, s)) for s in subsets), abs=1e-12)
        assert row["median"] == pytest.approx(statistics.fmean(statistics.fmean(map(np.median, s)) for s in subsets), abs=0.05)
        assert row["max_low"] <= row["max"] <= row["max_high"]
    means = [r["max"] for r in rows]
    assert means == sorted(means) and rows[0]["max"] == pytest.approx(statistics.fmean(x for v in values for x in v))
    assert rows[-1]["max"] == pytest.approx(statistics.fmean(map(max, values)))


def test_a_cut_answer_counts_as_its_prompts_lowest():
    """It is never kept, so it must not raise the curve of what keeping the best of n gives."""
    bags = [[answer(5.0, finished=False), answer(1.0), answer(0.0)]]
    assert [r["max"] for r in best_of_n(bags, [1, 3])] == [pytest.approx(1 / 3), 1.0]


def test_best_of_n_counts_a_prompt_given_twice_as_one():
    """Sixteen bags of two prompts: resampled by prompt the mean is 0, 1/2 or 1; by bag it would stay near 1/2."""
    bags = [[answer(v, prompt=p)] * 2 for p, v in (("a", 0.0), ("A ", 0.0), ("b", 1.0), ("b", 1.0)) * 4]
    row = best_of_n(bags, [2])[0]
    assert (row["max"], row["max_low"], row["max_high"]) == (0.5, 0.0, 1.0)


# -- the stage -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run: its section."""
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("straight"), {"s": STAGE})
    section = started(run, "s")
    rejection.run(section)
    return section


def files(section, *names) -> dict[str, bytes]:
    paths = [*(section.folder / n for n in ("data.jsonl", "samples.jsonl", *names)), *sorted((section.folder / "chunks").iterdir())]
    return {p.name: p.read_bytes() for p in paths}


def rows_of(section) -> list[dict]:
    return [r for p in sorted((section.folder / "chunks").iterdir()) for r in read_chunk(p)]


def test_everything_sampled_is_on_disk_with_what_the_gate_made_of_it(straight):
    rows, samples = rows_of(straight), read_lines(straight.folder / "samples.jsonl")
    assert len(rows) == len(samples) == 80 and len(list((straight.folder / "chunks").iterdir())) == 3
    threshold = 0.0  # the logit of 0.5
    tags = {p.messages[0]["content"]: p.safety for p in straight.run.data_of("prompts").train}
    assert 0 < sum(r["is_safety"] for r in rows) < 80 and 0 < sum(r["safety"] < threshold for r in rows) < 80
    for row, sample in zip(rows, samples, strict=True):
        assert row["is_safety"] is tags[row["prompt"][0]["content"]]
        assert row["merged"] == (row["safety"] if row["is_safety"] or row["safety"] < threshold else row["helpfulness"])
        assert sample == {"step": 0, "kept": sample["kept"], **{k: v for k, v in row.items() if k != "ids"}}
        assert row["finished"] == (row["ids"][-1] == 2) and 1 <= len(row["ids"]) <= 12  # 2: <|im_end|> of the tiny model


def test_stored_scores_are_the_reward_models_own(straight):
    """One sequence at a time: the saved head at the token that ends the answer, put there where the answer was cut off."""
    for r, own in scored_alone(straight, rows_of(straight)[::3]):
        assert {name: r[name] for name in own} == pytest.approx(own, abs=1e-4)


def test_the_data_are_the_best_finished_answers_in_the_ordinary_format(straight):
    rows = rows_of(straight)
    bags = [rows[i:i + 4] for i in range(0, 80, 4)]
    data = [json.loads(line) for line in (straight.folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = []
    for bag in bags:
        finished = [r for r in bag if r["finished"] and r["answer"]]
        if finished:
            best = sorted(finished, key=lambda r: -r["merged"])[0]
            expected.append({"messages": [*best["prompt"], {"role": "assistant", "content": best["answer"]}], "loss": "last", "source": "s",
                             "merged": best["merged"]})
    assert data == expected and 5 < len(data) <= 20
    assert sum(r["kept"] for r in read_lines(straight.folder / "samples.jsonl")) == len(data)
    split = straight.run.data_of("@s")
    assert [(d.messages, d.loss, d.source) for d in split.train] == [(e["messages"], "last", "s") for e in expected] and not split.held_out


def test_the_results_say_what_was_measured(straight):
    rows, told = rows_of(straight), straight.results()
    threshold = 0.0
    by_tag, low = np.array([r["is_safety"] for r in rows]), np.array([r["safety"] < threshold for r in rows])
    assert (low & by_tag).any() and (low & ~by_tag).any()
    assert told["routed_by_tag"] == by_tag.mean() and told["routed_by_threshold"] == (low & ~by_tag).mean()
    assert told["share_routed_safety"] == pytest.approx(told["routed_by_tag"] + told["routed_by_threshold"])
    assert told["unfinished"] == sum(not r["finished"] for r in rows) and told["samples"] == 80 and told["prompts"] == 20
    assert told["mean_reward_all"] == pytest.approx(statistics.fmean(r["merged"] for r in rows))
    bags = [rows[i:i + 4] for i in range(0, 80, 4)]
    usable = [bag for bag in bags if any(r["finished"] and r["answer"] for r in bag)]  # both means are over the same prompts
    assert told["mean_reward_of_kept_prompts"] == pytest.approx(statistics.fmean(r["merged"] for bag in usable for r in bag))
    best = [max(r["merged"] for r in bag if r["finished"] and r["answer"]) for bag in usable]
    assert told["mean_reward_kept"] == pytest.approx(statistics.fmean(best)) and told["kept"] == len(usable)
    assert [r["n"] for r in told["best_of_n"]] == [1, 2, 4] and told["best_of_n"][0]["max"] == pytest.approx(
        statistics.fmean(r["merged"] if r["finished"] and r["answer"] else min(x["merged"] for x in bag) for bag in bags for r in bag))
    assert "0.5 (recipe)" in told["safety_threshold"] and straight.state() == "done"


def test_no_held_out_prompt_is_sampled(straight):
    held = {p.messages[0]["content"].casefold() for p in straight.run.data_of("prompts").held_out}
    assert len(held) == 12 and not held & {r["prompt"][0]["content"].casefold() for r in rows_of(straight)}


def again(straight, monkeypatch=None, kill: int | None = None):
    """A fresh Run on the same folder; kill: die when that many chunks of this run are on disk."""
    run = type(straight.run)(straight.recipe)
    section = started(run, straight.name)
    made = []
    real = rejection.sample_and_score

    def counting(*args, **kwargs):
        if kill is not None and len(made) == kill:
            raise Killed
        made.append(args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(rejection, "sample_and_score", counting)
    if kill is None:
        rejection.run(section)
    else:
        with pytest.raises(Killed):
            rejection.run(section)
    return section, made


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "empty", "all"])
def test_damaged_chunks_are_sampled_again_to_the_same_bytes(straight, monkeypatch, damage):
    before = files(straight)
    chunks = sorted((straight.folder / "chunks").iterdir())
    whole = chunks[1].read_bytes()
    at = re.search(rb'"merged": -?\d+\.(\d)', whole).start(1)  # a digit, to another digit
    changed = {"cut": whole[:len(whole) // 2], "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], "empty": b""}
    if damage in changed:
        chunks[1].write_bytes(changed[damage])
    for path in {"missing": chunks[1:2], "all": chunks}.get(damage, []):
        path.unlink()
    (straight.folder / "DONE").unlink()
    section, made = again(straight, monkeypatch)
    assert files(section) == before and section.state() == "done"
    assert len(made) == (3 if damage == "all" else 1)  # the sound ones are not made again


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_killed_between_chunks_goes_on_to_the_same_bytes(straight, tmp_path_factory, monkeypatch, after):
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("killed"), {"s": STAGE})
    cut = SimpleNamespace(run=run, recipe=run.recipe, name="s")
    section, made = again(cut, monkeypatch, kill=after)
    assert len(made) == after and not (section.folder / "data.jsonl").exists() and section.state() == "started"
    monkeypatch.undo()
    section, made = again(cut, monkeypatch)
    assert len(made) == 3 - after and files(section) == files(straight)
    assert section.results() == straight.results()


def test_a_run_killed_while_it_writes_its_outputs_goes_on_to_the_same_bytes(straight, monkeypatch):
    before = files(straight)
    for name in ("DONE", "data.jsonl", "samples.jsonl"):
        (straight.folder / name).unlink()
    with monkeypatch.context() as m:
        die(m, rejection, "write_samples")
        with pytest.raises(Killed):
            rejection.run(started(type(straight.run)(straight.recipe), "s"))
    assert (straight.folder / "data.jsonl").exists() and not (straight.folder / "samples.jsonl").exists()
    section, made = again(straight, monkeypatch)
    assert made == [] and files(section) == before


def test_of_several_processes_the_main_one_alone_writes_the_outputs(straight, monkeypatch):
    before, rows = files(straight, "results.json"), rows_of(straight)
    bags = [rows[i:i + 4] for i in range(0, 40, 4)]  # fewer than were written
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    rejection.write_outputs(straight, bags, bags, select(bags))
    assert files(straight, "results.json") == before


def test_a_chunk_depends_on_no_other_chunk(straight, tmp_path_factory, monkeypatch):
    """The last chunk made first and alone, by a run that finds the others already there (with other contents)."""
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("alone"), {"s": STAGE})
    section = started(run, "s")
    (section.folder / "chunks").mkdir()
    for name in ("00000.json", "00001.json"):
        rows = read_chunk(straight.folder / "chunks" / name)
        write_chunk(section.folder / "chunks" / name, [r | {"answer": "other", "merged": 0.0} for r in rows])
    rejection.run(section)
    assert (section.folder / "chunks" / "00002.json").read_bytes() == (straight.folder / "chunks" / "00002.json").read_bytes()


def test_another_seed_draws_other_prompts_and_samples(straight):
    found = straight.run.data_of("prompts").train

    def chosen(seed):
        section = SimpleNamespace(config=straight.config, seed=seed, run=straight.run)
        return rejection._prompts(section)

    assert chosen(0) == chosen(0) != chosen(1) and len(chosen(1)) == 20
    order = [found.index(p) for p in chosen(0)]
    assert order == sorted(order)


def test_when_no_answer_ends_nothing_is_made_up(tmp_path_factory, tmp_path):
    run = make_run(tmp_path_factory, tmp_path, {"s": STAGE | {"rows": 4, "max_new_tokens": 1, "samples_per_prompt": 1}})
    section = started(run, "s")
    with pytest.raises(PosttrainError, match=r"no sample can be kept: 4 were cut off.*Raise max_new_tokens"):
        rejection.run(section)
    assert section.state() == "started" and not (section.folder / "data.jsonl").exists()
