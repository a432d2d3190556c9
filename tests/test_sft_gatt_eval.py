"""How long models keep to the first turn: what is asked, what is counted, the test between two models, where an answer looks."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from gatt_support import make_run, talk
from rlhf_support import Killed, die, started

from posttrain import chat
from posttrain.errors import PosttrainError
from posttrain.generate import Completion
from posttrain.log import read_lines
from posttrain.models import load_tokenizer
from posttrain.report_gatt import gatt_part
from posttrain.report_parts import keys_of
from posttrain.report_views import look
from posttrain.runs import Run
from posttrain.statistics import interval, mcnemar
from sft import attention_map, gatt_eval
from sft.instructions import read_entries

STAGE = {"stage": "gatt_eval", "data": "talks", "models": {"plain": "@policy", "other": "base"}, "compare": [["other", "plain"]], "dialogues": 8,
         "constraint_dialogues": 2, "turns": [2, 4, 6], "max_new_tokens": 8, "chunk": 40, "batch": 40, "temperature": 1.0}
FORMS = 11


def section_of(factory, tmp_path, rows=None, held_out=10, **more):
    return started(make_run(factory, tmp_path, {"s": STAGE | more}, rows=rows, held_out=held_out), "s")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    section = section_of(tmp_path_factory, tmp_path_factory.mktemp("straight"))
    gatt_eval.run(section)
    return section


def rows_of(section, model="plain", **same) -> list[dict]:
    return [r for r in read_lines(section.folder / "samples.jsonl") if r["model"] == model and all(r[k] == v for k, v in same.items())]


def files(section) -> dict[str, bytes]:
    paths = [section.folder / "samples.jsonl", section.folder / "attention.json", *sorted((section.folder / "answers").iterdir())]
    return {p.name: p.read_bytes() for p in paths}


# -- what is asked -------------------------------------------------------------------------------------------------------------------


def test_the_first_turn_sets_the_attributes_and_a_later_one_asks(straight):
    entries = read_entries(straight)
    values = {k: {e.value for e in entries if e.kind == k and e.use == "evaluation"} for k in ("hobby", "figure")}
    questions = {k: {e.text for e in entries if e.of == k and e.use == "evaluation"} for k in values}
    fillers = [i.messages for i in straight.run.data_of("talks").held_out]
    exchanges = {(m[i]["content"], m[i + 1]["content"]) for m in fillers for i in range(0, len(m), 2)}
    rows = rows_of(straight, group="attributes")
    assert len(rows) == 8 * 3 and [r["turn"] for r in rows[:3]] == [2, 4, 6]
    assert [r["kind"] for r in rows[::3]] == ["figure", "hobby"] * 4
    for r in rows:
        said = [m["content"] for m in r["prompt"]]
        assert len(said) == 2 * r["turn"] - 1 and said[0].startswith(r["instruction"] + "\n\n") and said[-1] in questions[r["kind"]]
        assert r["instruction"] not in " ".join(said[1:])
        assert r["value"] in values[r["kind"]]
        talked = [said[0].removeprefix(r["instruction"] + "\n\n"), *said[1:-1]]
        between = list(zip(talked[::2], talked[1::2], strict=True))
        assert set(between) <= exchanges and len(set(between)) == len(between) == r["turn"] - 1
    for one, two, three in zip(rows[::3], rows[1::3], rows[2::3], strict=True):  # the same dialogue and question, ever later
        assert two["prompt"][:2] == one["prompt"][:2] and three["prompt"][:6] == two["prompt"][:6] and one["prompt"][-1] == three["prompt"][-1]
        assert one["dialogue"] == two["dialogue"] == three["dialogue"]
    assert sum("Hobby: " in r["instruction"] and "Figure: " in r["instruction"] for r in rows) == len(rows) // 2


def test_forms_are_asked_for_in_words_that_no_training_row_had(straight):
    entries = read_entries(straight)
    texts = {e.text: e.value for e in entries if e.kind == "constraint"}
    rows = rows_of(straight, group="forms")
    assert len(rows) == FORMS * 2 * 3 and {r["value"] for r in rows} == set(texts.values()) and {r["instruction"] for r in rows} == set(texts)
    users = {m["content"] for i in straight.run.data_of("talks").held_out for m in i.messages if m["role"] == "user"}
    for r in rows:
        assert texts[r["instruction"]] == r["value"] and r["chance"] is None
        assert r["prompt"][-1]["content"] in users and len(r["prompt"]) == 2 * r["turn"] - 1
        assert r["kept"] == next(e for e in entries if e.text == r["instruction"]).kept(r["answer"], [])


def test_every_model_is_asked_the_same(straight):
    plain, other = rows_of(straight, "plain"), rows_of(straight, "other")
    assert [(r["dialogue"], r["turn"], r["prompt"]) for r in plain] == [(r["dialogue"], r["turn"], r["prompt"]) for r in other]
    assert [r["answer"] for r in plain] != [r["answer"] for r in other]


def test_a_filler_never_names_the_attribute(straight):
    fillers = [[("I like golf.", "So do I."), ("And?", "Yes.")], [("u", "a"), ("v", "b"), ("w", "c")], [("x", "d"), ("y", "e"), ("z", "f")]]
    import random

    for s in range(20):
        assert {u for u, _ in gatt_eval.fill(straight, fillers, ["golf", "Golfer"], random.Random(s))} == {*"uvwxyz"}
    with pytest.raises(PosttrainError, match="3 exchanges that do not name golf"):
        gatt_eval.fill(straight, fillers[:2], ["golf"], random.Random(0))


# -- what is counted -----------------------------------------------------------------------------------------------------------------


def oracle(monkeypatch, reply):
    """A sampler whose answers are reply(model's number, messages' text)."""
    def fake(roles, role, prompts, samples, *words, **more):
        out = []
        for ids in prompts:
            text = reply(int(role.rpartition("_")[2]), roles.tokenizer.decode(ids))
            made = chat.encode_answer(roles.tokenizer, [{"role": "user", "content": "x"}], text)
            out.append([Completion(made, [0.0] * len(made), True)])
        return out

    monkeypatch.setattr(gatt_eval, "sample", fake)


def test_recall_chance_and_the_difference_by_hand(tmp_path_factory, tmp_path, monkeypatch):
    """The first model remembers until turn 2 alone, the second always; both keep one form."""
    def reply(model: int, text: str) -> str:
        turn = text.count("<|im_start|>user")
        first = text.split("<|im_end|>")[0]
        return f"{first.partition('user')[2]} indeed" if model == 1 or turn == 2 else "I forget"

    oracle(monkeypatch, reply)
    section = section_of(tmp_path_factory, tmp_path, dialogues=20, attention=False)
    gatt_eval.run(section)
    told = section.results()
    recall = {name: {t: s["mean"] for t, s in m["attributes"].items()} for name, m in told["models"].items()}
    # the instruction says a figure and a hobby, in full or tersely; a full text names them in other words at times
    exact = {t: [r["kept"] for r in rows_of(section, "other", group="attributes", turn=t)] for t in (2, 4, 6)}
    assert recall["plain"]["4"] == recall["plain"]["6"] == 0.0 and recall["plain"]["2"] == recall["other"]["2"] == recall["other"]["4"] >= 0.9
    assert told["models"]["other"]["attributes"]["6"] == interval(exact[6])
    assert all(s["mean"] == 0.0 for m in told["models"].values() for s in m["chance"].values())
    kinds = told["models"]["other"]["by_attribute"]
    assert {k: s["4"]["n"] for k, s in kinds.items()} == {"figure": 10, "hobby": 10}
    n = sum(exact[4])
    pairs = {(p["group"], p["turn"]): p for p in told["paired"]}
    assert set(pairs) == set(itertools.product(("attributes", "forms"), (2, 4, 6)))
    assert (pairs["attributes", 4]["only_a"], pairs["attributes", 4]["only_b"], pairs["attributes", 4]["p"]) == (n, 0, pytest.approx(2 * 0.5 ** n))
    assert pairs["attributes", 2]["p"] == 1.0 and pairs["attributes", 4]["difference"]["mean"] == n / 20
    assert [c["met"] for c in told["checks"]] == [True, True] and "turn 4" in told["checks"][0]["name"] and "turn 6" in told["checks"][1]["name"]
    assert told["attention"] == {} and not (section.folder / "attention.png").exists()


def test_chance_is_another_dialogues_attribute(tmp_path_factory, tmp_path, monkeypatch):
    """A model that lists every hobby and name there is is found out."""
    section = section_of(tmp_path_factory, tmp_path, attention=False, constraint_dialogues=0, compare=[])
    everything = "; ".join(e.value for e in read_entries(section) if e.use == "evaluation" and e.kind in ("hobby", "figure"))
    oracle(monkeypatch, lambda model, text: everything)
    gatt_eval.run(section)
    models = section.results()["models"]
    assert {s["mean"] for m in models.values() for key in ("attributes", "chance") for s in m[key].values()} == {1.0}
    assert {key: m[key] for m in models.values() for key in ("forms", "by_form")} == {"forms": {}, "by_form": {}} and not section.results()["checks"]


@pytest.mark.parametrize(("only_a", "only_b", "p"), [
    (0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (5, 5, 1.0), (10, 2, 2 * (1 + 12 + 66) / 4096), (2, 10, 2 * (1 + 12 + 66) / 4096),
    (3, 1, 2 * (1 + 4) / 16), (21, 9, 0.04277394525706768), (9, 1, 0.021484375)])
def test_mcnemar_against_hand_numbers(only_a, only_b, p):
    """The last two as scipy.stats.binomtest(9, 30) and (1, 10) give them."""
    a = [True] * only_a + [False] * only_b + [True, False, True]
    b = [False] * only_a + [True] * only_b + [True, False, True]
    told = mcnemar(a, b)
    assert (told["only_a"], told["only_b"]) == (only_a, only_b) and told["p"] == pytest.approx(p, rel=1e-12)


def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven():
    for n in range(1, 9):
        for k in range(n + 1):
            as_uneven = [sum(toss) for toss in itertools.product((0, 1), repeat=n) if abs(sum(toss) - n / 2) >= abs(k - n / 2)]
            assert mcnemar([True] * k + [False] * (n - k), [False] * k + [True] * (n - k))["p"] == pytest.approx(len(as_uneven) / 2 ** n)


# -- resume, and faults ----------------------------------------------------------------------------------------------------------------


def test_a_killed_comparison_goes_on_to_the_same_bytes(straight, tmp_path_factory, tmp_path, monkeypatch):
    section = section_of(tmp_path_factory, tmp_path)
    with monkeypatch.context() as m:
        die(m, gatt_eval, "sample", 4)  # in the second model
        with pytest.raises(Killed):
            gatt_eval.run(section)
    made = sorted((section.folder / "answers").iterdir())
    assert len(made) == 3
    made[1].write_bytes(made[1].read_bytes()[:100])
    again = started(Run(section.recipe), "s")
    gatt_eval.run(again)
    assert files(again) == files(straight) and again.results() == straight.results()


def test_faults_are_named(tmp_path_factory, tmp_path):
    def fault(rows=None, held_out=10, **more) -> str:
        with pytest.raises(PosttrainError) as e:
            gatt_eval.run(section_of(tmp_path_factory, tmp_path, rows, held_out, **more))
        return str(e.value)

    assert "no held-out demonstrations" in fault(held_out=0)
    assert "exchanges of at most 150 tokens. Expected 40 for turn 40" in fault(turns=[2, 40])
    assert "0 exchanges of at most 1 tokens" in fault(max_filler_tokens=1)
    assert "of 8 dialogues have at most 90 tokens at their last turn. Expected at least two" in fault(max_prompt_tokens=90)
    assert "compare: got [['a', 'plain']]" in fault(compare=[["a", "plain"]])
    assert "turns[0]: got 1" in fault(turns=[1, 4])
    (tmp_path / "one.jsonl").write_text('{"kind": "hobby", "value": "golf", "use": "evaluation"}\n{"kind": "figure", "value": "Plato", "use": "evaluation"}\n'
                                        '{"kind": "question", "of": "hobby", "text": "Which?", "use": "evaluation"}\n')
    assert "1 figure entries and 0 questions for evaluation" in fault(instructions=["one.jsonl"])


def test_dialogues_that_are_too_long_are_left_out_at_every_turn(tmp_path_factory, tmp_path):
    rows = [talk(i, 3) for i in range(30)]
    for row in rows[::4]:
        row["messages"][0]["content"] += " and more" * 40
    section = section_of(tmp_path_factory, tmp_path, rows, turns=[2, 6], max_filler_tokens=400, max_prompt_tokens=600, attention=False)
    gatt_eval.run(section)
    told, left = section.results(), rows_of(section)
    assert told["too_long"] > 0 and len({r["dialogue"] for r in left}) == 8 + FORMS * 2 - told["too_long"]
    assert sorted(r["dialogue"] for r in left if r["turn"] == 2) == sorted(r["dialogue"] for r in left if r["turn"] == 6)
    assert told["dialogues"] + told["form_dialogues"] == len({r["dialogue"] for r in left})


# -- where an answer looks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [True, False])
def test_the_largest_weight_over_layers_and_heads_is_eager_attentions(make_roles, scramble, adapter):
    roles = make_roles() if adapter else make_roles(lora=None)
    role = scramble(roles.add("policy", fresh_adapter=True, trainable=True) if adapter else roles.add("policy"), scale=0.3)
    ids = [*chat.encode_prompt(roles.tokenizer, [{"role": "user", "content": "What is the moon made of, and why?"}]), 70, 71, 72, 2]
    before, start = role.net.config._attn_implementation, len(ids) - 4
    weights = attention_map.activations(roles, "policy", ids, start)
    assert role.net.config._attn_implementation == before != attention_map.NAME
    roles.use("policy")
    role.net.set_attn_implementation("eager")
    with torch.no_grad():
        found = role.body(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    role.net.set_attn_implementation(before)
    wanted = torch.stack(found).amax((0, 1, 2))[start:]  # over layers, batch and heads
    assert weights.shape == (4, len(ids)) and torch.allclose(weights, wanted, atol=1e-5)
    assert weights[0, start + 1:].abs().max() == 0.0 and len(found) == 2
    assert not torch.allclose(weights, found[0][0].amax(0)[start:], atol=1e-3)  # more than one layer counts


def test_bins_join_neighbours_by_their_maximum():
    weights = torch.tensor([[0.1, 0.5, 0.2, 0.3, 0.0], [0.0, 0.1, 0.9, 0.2, 0.4]])
    cells, begins = attention_map.binned(weights, 3, 1)
    assert cells.tolist() == [[0.5, pytest.approx(0.3), 0.0], [pytest.approx(0.1), pytest.approx(0.9), pytest.approx(0.4)]] and begins == [0, 2, 4]
    assert attention_map.binned(weights, 1, 0)[0].tolist() == [pytest.approx([0.1, 0.5, 0.9, 0.3, 0.4])]


def test_the_instructions_tokens_are_found(straight):
    tokenizer = load_tokenizer(straight.recipe.model, "test")

    class Roles:
        pass

    roles = Roles()
    roles.tokenizer = tokenizer
    for r in rows_of(straight, group="attributes")[::5]:
        asked = gatt_eval.Asked(0, r["turn"], None, None, r["instruction"], r["prompt"], chat.encode_prompt(tokenizer, r["prompt"]))
        first, end = gatt_eval.instruction_span(roles, asked)
        assert tokenizer.decode(asked.ids[first:end]).strip() == r["instruction"]


def test_the_picture_and_its_numbers(straight):
    told, stored = straight.results()["attention"], json.loads((straight.folder / "attention.json").read_text())
    assert told["turn"] == 6 and told["dialogues"] == 8 and list(told["on_instruction"]) == list(stored) == ["plain", "other"]
    assert all(0 < s["mean"] <= 1 and s["n"] == 8 for s in told["on_instruction"].values())
    for name, m in stored.items():
        first = next(r for r in rows_of(straight, name, group="attributes", turn=6))
        assert m["answer"] == first["answer"] and len(m["weights"][0]) <= attention_map.COLUMNS and 0 < max(map(max, m["weights"])) <= 1
        assert m["prompt_tokens"] == len(chat.encode_prompt(load_tokenizer(straight.recipe.model, "test"), first["prompt"]))
    assert (straight.folder / "attention.png").read_bytes().startswith(b"\x89PNG")


# -- the report ------------------------------------------------------------------------------------------------------------------------


def test_the_report_shows_recall_by_turn_and_the_test(straight, tmp_path):
    view = look(straight.folder, "s", "gatt_eval")
    part, told = gatt_part([view]), straight.results()
    figure, = part.figures
    assert "plain " in figure.takeaway and "at turn 2" in figure.takeaway and "<svg" in figure.svg
    recall, forms, pairs = part.tables
    assert recall.head == ["model", "turn 2", "turn 4", "turn 6"] and recall.rows[0][0] == "plain" and "attention.png" in recall.note
    assert recall.rows[0][1][0] == f"{told['models']['plain']['attributes']['2']['mean'] * 100:.0f}\u00a0%"
    assert len(forms.rows) == 2 * (1 + FORMS)
    assert [r[0] for r in pairs.rows][:2] == ["other − plain, attributes at turn 2", "other − plain, attributes at turn 4"]
    assert str(keys_of(view)[0]).startswith("recall of other at turn 6 ")


@pytest.mark.parametrize("results", [{}, {"models": 3}, {"models": {"a": {"attributes": {"2": None, "x": {"mean": 1}}}}, "paired": [None, {}], "attention": []},
                                     {"models": {"a": {"attributes": {"2": {"mean": float("nan")}}, "forms": 4, "by_form": {"haiku": []}}}},
                                     {"kept": None, "dropped": {"a": "b"}, "complies": [], "kinds": 3, "lists": None}])
def test_damaged_results_do_no_harm(tmp_path, results):
    for kind in ("gatt", "gatt_eval"):
        folder = Path(tmp_path) / kind
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps({"kind": kind, "fingerprint": "x"}))
        (folder / "results.json").write_text(json.dumps(results))
        view = look(folder, "s", kind)
        assert gatt_part([view]).title == "Ghost Attention" and isinstance(keys_of(view), list)
