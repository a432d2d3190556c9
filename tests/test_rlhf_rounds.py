"""Rounds of rejection sampling: the temperature is chosen by a sweep, earlier answers compete under new scores, prompts are fresh, and a
smaller model learns from a larger one's answers."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from rlhf_support import REWARDS, Killed, die, make_run, parents, recipe, started
from safetensors.torch import load_file

from posttrain import builtin, chat, plan, report
from posttrain.chunks import read_chunk, write_chunk
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.models import roles_for, source_of
from posttrain.runs import Run, run_sections
from rlhf import rejection
from rlhf.rejection import best_temperature, join, select

ROUND = {"stage": "rejection", "prompts": "prompts", "policy": "@sft", **REWARDS, "samples_per_prompt": 3, "max_new_tokens": 12, "rows": 12,
         "chunk": 4, "batch": 16, "temperature": 0.5, "micro_batch_tokens": 512, "safety_threshold": 0.5}
SWEPT = ROUND | {"temperature": [1.1, 0.3, 0.7], "sweep_prompts": 6}
OTHERS = {"helpfulness": REWARDS["safety"], "safety": REWARDS["helpfulness"]}  # reward models that score otherwise than the earlier round's
STAGES = {"v1_samples": SWEPT,
          "v1": {"stage": "sft", "data": ["demonstrations", "@v1_samples"], "packing": False, "epochs": 1, "batch_size": 8, "max_length": 256,
                 "learning_rate": 1e-3},
          "v2_samples": ROUND | {"policy": "@v1", "fresh": True},
          "pooled": ROUND | {"temperature": 0.4, "samples_per_prompt": 6, "pool": ["@v1_samples", "demonstrations"], **OTHERS}}


def answer(merged: float, finished: bool = True, prompt: str = "p", text: str = "x", **more) -> dict:
    return {"prompt": [{"role": "user", "content": prompt}], "answer": text, "merged": merged, "finished": finished, **more}


def asked(row: dict) -> str:
    return row["prompt"][-1]["content"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """All sections, finished."""
    made = make_run(tmp_path_factory, tmp_path_factory.mktemp("rounds"), STAGES)
    run_sections(made, list(STAGES))
    return made


def stored(section, folder: str, names: str = "*") -> list[dict]:
    return [r for p in sorted((section.folder / folder).glob(f"{names}.json")) for r in read_chunk(p)]


def data_of(section) -> list[dict]:
    return [json.loads(line) for line in (section.folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]


def files(section) -> dict[str, bytes]:
    paths = [section.folder / "data.jsonl", section.folder / "samples.jsonl", *section.folder.glob("chunks/*"), *section.folder.glob("pool/*")]
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in paths}


# -- the temperature -----------------------------------------------------------------------------------------------------------------


def test_the_temperature_with_the_best_kept_answers_is_chosen():
    section = SimpleNamespace(place="here")
    bags = {0.5: [[answer(1.0), answer(2.0)], [answer(0.0), answer(9.0, finished=False)]],  # best of 2: 2 and 0
            1.0: [[answer(3.0), answer(-1.0)], [answer(-4.0), answer(0.5)]],                # 3 and 0.5
            1.5: [[answer(8.0, finished=False), answer(3.5)], [answer(7.0, finished=False), answer(6.0, text="")]]}  # 3.5 and the floor of -4
    chosen, curves = best_temperature(section, bags)
    assert chosen == 1.0 and [c["temperature"] for c in curves] == [0.5, 1.0, 1.5]
    assert [c["best_of_n"][-1]["max"] for c in curves] == [1.0, 1.75, -0.25]
    assert [c["usable"] for c in curves] == [0.75, 1.0, 0.25]
    assert curves[0]["best_of_n"][0]["max"] == (1 + 2 + 0 - 4) / 4  # of one answer: the cut one counts as its prompt's lowest anywhere
    assert best_temperature(section, {0.7: bags[1.0], 1.3: bags[1.0]})[0] == 0.7  # of equals the lowest
    with pytest.raises(PosttrainError, match="no sample can be kept: 1 were cut off"):
        best_temperature(section, {0.5: [[answer(1.0, finished=False)]]})


@pytest.mark.parametrize("value", [0, -1, [], [0.5, 0.5], [0.5, 0], [0.5, float("nan")]])
def test_a_temperature_is_above_zero_and_given_once(tmp_path, tmp_path_factory, value):
    shared = parents(tmp_path_factory.getbasetemp())
    with pytest.raises(PosttrainError, match=r"stages.s.temperature: got .*a number above 0, or a list of different ones"):
        recipe(shared, tmp_path, {"s": ROUND | {"temperature": value}})


def test_a_section_without_the_new_keys_is_the_one_it_was(run):
    """Its fingerprint, seeds and files' names are those of before: a finished section is not run again."""
    config = run.recipe.stages["v2_samples"]
    plain = type(config)(**{**config.model_dump(), "fresh": False})
    assert not {"fresh", "pool", "sweep_prompts"} & plain.model_dump().keys()
    assert {"fresh": True}.items() <= config.model_dump().items() and run.recipe.stages["v1_samples"].model_dump()["sweep_prompts"] == 6
    assert sorted(p.name for p in (run.section("v2_samples").folder / "chunks").iterdir()) == ["00000.json", "00001.json", "00002.json"]


def test_the_sweep_by_hand(run):
    """Every temperature on the same six prompts; the choice; what was sampled at it is part of the round, whose other prompts follow."""
    section, told = run.section("v1_samples"), run.section("v1_samples").results()
    by = {t: stored(section, "chunks", f"sweep-{t}-*") for t in (0.3, 0.7, 1.1)}
    prompts = {t: [asked(r) for r in rows[::3]] for t, rows in by.items()}
    assert prompts[0.3] == prompts[0.7] == prompts[1.1] and len({*prompts[0.3]}) == 6

    def usable(r):
        return r["finished"] and r["answer"] and not r["spells"]

    means = {}
    for t, rows in by.items():
        best = []
        for i in range(0, 18, 3):
            floor = min(r["merged"] for other in by.values() for r in other[i:i + 3])
            best.append(max([r["merged"] for r in rows[i:i + 3] if usable(r)], default=floor))
        means[t] = statistics.fmean(best)
    curves = told["temperature_sweep"]["curves"]
    assert {c["temperature"]: c["best_of_n"][-1]["max"] for c in curves} == pytest.approx(means) and told["temperature_sweep"]["prompts"] == 6
    assert told["temperature"] == max(means, key=means.get) and len({*means.values()}) == 3
    assert len({str([r["ids"] for r in rows]) for rows in by.values()}) == 3  # the temperature tells
    rest = stored(section, "chunks", "0*")
    samples = [json.loads(line) for line in (section.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(asked(s), s["answer"]) for s in samples] == [(asked(r), r["answer"]) for r in by[told["temperature"]] + rest]
    assert len(samples) == told["samples"] == 36 and not {asked(r) for r in rest} & {*prompts[0.3]}


@pytest.mark.parametrize("after", [0, 1, 3, 5, 7])
def test_a_sweep_killed_anywhere_goes_on_to_the_same_bytes(run, tmp_path_factory, monkeypatch, after):
    """Three temperatures x two chunks, then two chunks of the rest: eight chunks."""
    cut = make_run(tmp_path_factory, tmp_path_factory.mktemp("killed"), {"v1_samples": SWEPT})
    with monkeypatch.context() as m, pytest.raises(Killed):
        die(m, rejection, "sample_and_score", after + 1)
        rejection.run(started(cut, "v1_samples"))
    section = started(Run(cut.recipe), "v1_samples")
    assert len(list((section.folder / "chunks").iterdir())) == after and section.state() == "started"
    if after == 5:  # and a damaged one
        path = section.folder / "chunks" / "sweep-0.7-00000.json"
        path.write_bytes(path.read_bytes()[:-9])
    rejection.run(section)
    assert files(section) == files(run.section("v1_samples")) and section.results() == run.section("v1_samples").results()


# -- the pool ------------------------------------------------------------------------------------------------------------------------


def test_pooled_answers_compete_with_a_prompts_own_and_bring_prompts_of_their_own():
    own = [[answer(1.0, prompt="a"), answer(2.0, prompt="a")], [answer(5.0, prompt="b"), answer(4.0, prompt="b", finished=False)]]
    pooled = [answer(3.0, prompt="a", **{"from": "v1"}), answer(5.0, prompt="b", **{"from": "v1"}), answer(0.0, prompt="c", **{"from": "v1"}),
              answer(0.5, prompt="c", **{"from": "v2"})]
    kept = select(join(own, pooled))
    assert [(asked(r), r["merged"], r.get("from")) for r in kept.values()] == [("a", 3.0, "v1"), ("b", 5.0, None), ("c", 0.5, "v2")]
    assert join(own, []) is own


def test_the_pooled_choice_by_hand(run):
    """Every usable answer of the earlier round (its whole sweep) and every demonstration, one sequence at a time under this section's reward
    models; with this round's own samples the best of each prompt is the data."""
    section = run.section("pooled")
    roles = roles_for(section)
    for name in ("helpfulness", "safety"):
        roles.add(name, source_of(section, OTHERS[name]), head="saved")

    def score(name, ids):
        roles.use(name)
        with torch.no_grad():
            last = roles.base.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        return (last @ roles[name].head.weight[0]).item()

    candidates = [("v1_samples", r["prompt"], r["answer"], r["ids"], r["is_safety"]) for r in stored(run.section("v1_samples"), "chunks")
                  if r["finished"] and r["answer"] and not r["spells"]]
    for d in run.data_of("demonstrations").train:
        prompt, text = d.messages[:-1], d.messages[-1]["content"]
        candidates.append(("demonstrations", prompt, text, chat.encode_answer(roles.tokenizer, prompt, text), False))
    best: dict[str, list] = {}
    for r in stored(section, "chunks"):
        if r["finished"] and r["answer"] and not r["spells"]:
            best.setdefault(asked(r), []).append((r["merged"], "pooled", r["answer"]))
    for origin, prompt, text, ids, tagged in candidates:
        ids = chat.encode_prompt(roles.tokenizer, prompt) + ids
        h, s = score("helpfulness", ids), score("safety", ids)
        best.setdefault(prompt[-1]["content"], []).append((s if tagged or s < 0 else h, origin, text))  # 0: the logit of 0.5
    data = {d["messages"][-2]["content"]: d for d in data_of(section)}
    assert data.keys() == best.keys() and len(data_of(section)) == len(best)
    for question, found in best.items():
        top = max(m for m, _, _ in found)
        assert data[question]["merged"] == pytest.approx(top, abs=1e-4)
        assert (data[question]["source"], data[question]["messages"][-1]["content"]) in {(o, t) for m, o, t in found if m > top - 1e-4}
    kept = {o: sum(d["source"] == o for d in data.values()) for o in ("pooled", "v1_samples", "demonstrations")}
    told = section.results()["pool"]
    assert {n: t["kept"] for n, t in told.items()} == kept and all(kept.values())  # each origin wins somewhere
    assert told["v1_samples"]["answers"] + told["demonstrations"]["answers"] == len(candidates) == len(stored(section, "pool"))
    own = {asked(r) for r in stored(section, "chunks")}
    assert any(d["source"] == "v1_samples" for q, d in data.items() if q in own)  # and not only where it has no rival
    before = {(asked(r), r["answer"]): r["merged"] for r in stored(run.section("v1_samples"), "chunks")}
    kept_before = [(d["merged"], before[q, d["messages"][-1]["content"]]) for q, d in data.items() if d["source"] == "v1_samples"]
    assert any(abs(now - then) > 1e-3 for now, then in kept_before)  # so that the comparison above would notice the earlier scores


def test_a_pool_killed_between_chunks_goes_on_to_the_same_bytes(run, monkeypatch):
    section = run.section("pooled")
    before = files(section)
    for path in sorted(section.folder.glob("pool/*"))[2:]:
        path.unlink()
    (section.folder / "DONE").unlink()
    with monkeypatch.context() as m, pytest.raises(Killed):
        die(m, rejection, "rescore", 3)
        rejection.run(started(Run(run.recipe), "pooled"))
    again = started(Run(run.recipe), "pooled")
    rejection.run(again)
    assert files(again) == before and len([n for n in before if n.startswith("pool/")]) >= 9


def test_what_cannot_be_pooled_is_named_before_a_model_is_loaded(run, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(rejection, "roles_for", lambda section: pytest.fail("a model was loaded"))
    other = make_run(tmp_path_factory, tmp_path, {"s": ROUND | {"pool": "helpful"}})
    with pytest.raises(PosttrainError, match=r"stages.s.pool: 'helpful' holds pairs. Expected a rejection section or demonstrations"):
        rejection.run(started(other, "s"))


def test_a_damaged_chunk_of_an_earlier_round_is_named(run):
    path = run.section("v1_samples").folder / "chunks" / "00001.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1])
        with pytest.raises(PosttrainError, match=r"00001.json: damaged.*Delete .*DONE and run again"):
            rejection._prompts(run.section("v2_samples"))
    finally:
        path.write_bytes(whole)


# -- fresh prompts -------------------------------------------------------------------------------------------------------------------


def test_a_fresh_round_samples_no_prompt_of_an_earlier_one(run):
    earlier, later = ({asked(r) for r in stored(run.section(n), "chunks")} for n in ("v1_samples", "v2_samples"))
    assert len(earlier) == len(later) == 12 and not earlier & later
    assert [s.name for s in rejection.earlier_rounds(run.section("v2_samples"))] == ["v1_samples"]  # through its policy
    assert rejection.earlier_rounds(run.section("v1_samples")) == []
    assert {asked(r) for r in stored(run.section("pooled"), "chunks")} & earlier  # one that is not fresh takes what comes


def test_when_no_fresh_prompt_is_left_it_says_so(tmp_path, tmp_path_factory):
    run = make_run(tmp_path_factory, tmp_path, {"a": ROUND, "b": ROUND | {"fresh": True, "pool": ["@a"], "rows": 2}})
    prompts = run.data_of("prompts").train
    write_chunk_of(run.section("a"), prompts[:-1])
    assert rejection._prompts(run.section("b")) == prompts[-1:]
    write_chunk_of(run.section("a"), prompts)
    with pytest.raises(PosttrainError, match=rf"stages.b.fresh: all {len(prompts)} prompts were sampled by a. Expected .*Add prompts"):
        rejection._prompts(run.section("b"))


def write_chunk_of(section, prompts: list[Prompt]) -> None:
    (section.folder / "chunks").mkdir(parents=True, exist_ok=True)
    write_chunk(section.folder / "chunks" / "00000.json", [{"prompt": p.messages} for p in prompts])


# -- distillation --------------------------------------------------------------------------------------------------------------------


def small_model(folder) -> None:
    """A model of another size than the tiny one, with its tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(builtin.folder(builtin.TINY))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_smaller_model_learns_from_a_larger_ones_answers(run, tmp_path):
    """Paper 3.2.3: another recipe, another model; the larger run's kept answers are an ordinary data set, its held-out prompts stay out."""
    small_model(tmp_path / "small")
    large = run.section("v1_samples")
    written = {"run": {"name": "small", "dir": str(tmp_path), "threads": 1},
               "model": {"name_or_path": str(tmp_path / "small"), "dtype": "float32", "chat_template": "chatml", "lora": None},
               "data": {"larger": [{"path": str(large.folder / "data.jsonl"), "format": "messages"}], "held_out": {"demonstrations": 3}},
               "stages": {"sft": {"data": "larger", "epochs": 1, "batch_size": 4, "max_length": 256, "packing": False}}}
    (tmp_path / "small.yaml").write_text(json.dumps(written), encoding="utf-8")
    small = Run(load_recipe(tmp_path / "small.yaml"))
    split, kept = small.data_of("larger"), data_of(large)
    assert sorted([d.messages for d in split.train + split.held_out], key=str) == sorted([d["messages"] for d in kept], key=str)
    assert {(d.loss, d.source) for d in split.train} == {("last", "v1_samples")} and len(split.held_out) == 3
    run_sections(small)
    told = small.section("sft").results()
    roles = roles_for(small.section("sft"))
    answers = [chat.encode_answer(roles.tokenizer, d.messages[:-1], d.messages[-1]["content"]) for d in split.train]
    assert told["loss_tokens"] == sum(map(len, answers)) and told["data"] == {"v1_samples": len(split.train)}
    trained = load_file(small.section("sft").folder / "model" / "model.safetensors")
    assert sum(t.numel() for t in trained.values()) < 60_000 < 110_912  # the larger one's


# -- plan and report -----------------------------------------------------------------------------------------------------------------


def test_the_plan_counts_sweep_pool_and_fresh_prompts(run):
    rows = {r["section"]: r for r in plan.plan(run.recipe)}
    total = len(run.data_of("prompts").train)
    assert (rows["v1_samples"]["rows"], rows["v1_samples"]["samples"]) == (12, 36 + 2 * 6 * 3)
    assert "36 samples more to choose among 3 temperatures" in rows["v1_samples"]["note"]
    shown = len(run.data_of("demonstrations").train)
    assert f"{72 + shown:,} earlier answers scored anew" in rows["pooled"]["note"]
    wide = load_recipe(run.recipe.path, ["v2_samples.rows=null"])
    rows = {r["section"]: r for r in plan.plan(wide)}
    assert (rows["v2_samples"]["rows"], rows["v2_samples"]["labels"]["rows"]) == (total - 12, "estimated")
    none = {r["section"]: r for r in plan.plan(load_recipe(run.recipe.path, ["v1_samples.rows=null"]))}
    assert none["v2_samples"]["rows"] == 0 and any("no fresh prompt is left" in w for w in none["v2_samples"]["warnings"])


def test_the_report_shows_the_rounds(run):
    page = report.render(run)
    assert "The path of the versions" in page and "Where the kept answers of pooled come from" in page
    told = run.section("v1_samples").results()
    assert f"The best of 3 answers scores highest at temperature {told['temperature']:g}" in page
    assert "The best temperature by version" not in page  # one sweep only
