"""Ghost Attention's rows: the instruction on every turn for the policy and on the first alone in the data, the loss on the sampled answer alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gatt_support import make_run, policy, talk
from rlhf_support import Killed, die, started

from posttrain import chat
from posttrain.chunks import read_chunk
from posttrain.errors import PosttrainError
from posttrain.generate import Completion
from posttrain.log import read_lines
from posttrain.models import load_tokenizer
from posttrain.runs import Run, read_json
from sft import gatt
from sft.gatt import Planned, choose, read_proposals
from sft.instructions import KINDS, Entry, conversation, dialogue, in_first_turn_only, read_entries

ROOT = Path(__file__).parent.parent
STAGE = {"stage": "gatt", "data": "talks", "policy": "@policy", "instructions_per_dialogue": 3, "max_new_tokens": 16, "max_prompt_tokens": 900, "chunk": 12,
         "batch": 12, "temperature": 0.7}
SHIPPED = "sft/data/gatt_instructions.jsonl"


def section_of(factory, tmp_path, seed=0, rows=None, **more):
    return started(make_run(factory, tmp_path, {"s": STAGE | more}, seed, rows), "s")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run with the data's own answers, and what the sampler was asked."""
    section, asked, real = section_of(tmp_path_factory, tmp_path_factory.mktemp("straight")), [], gatt.sample
    with pytest.MonkeyPatch.context() as m:
        m.setattr(gatt, "sample", lambda roles, role, prompts, *words, **more: asked.extend(prompts) or real(roles, role, prompts, *words, **more))
        gatt.run(section)
    return section, asked


@pytest.fixture(scope="module")
def tokenizer(straight):
    return load_tokenizer(straight[0].recipe.model, "test")


def files(section) -> dict[str, bytes]:
    paths = [section.folder / "data.jsonl", section.folder / "samples.jsonl", *sorted((section.folder / "chunks").iterdir())]
    return {p.name: p.read_bytes() for p in paths}


def samples(section) -> list[dict]:
    return read_lines(section.folder / "samples.jsonl")


def users(messages) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "user"]


def originals() -> dict[str, dict]:
    """The data's turns by their text."""
    return {t["content"]: row for i in range(30) for row in [talk(i, 1 + i % 3)] for t in row["messages"]}


# -- what is asked, and what is learnt -----------------------------------------------------------------------------------------------


def test_the_policy_reads_the_instruction_on_every_user_turn(straight, tokenizer):
    section, asked = straight
    rows = samples(section)
    assert len(rows) == len(asked) == 3 * len({r["prompt"][0]["content"].partition("\n\n")[2] for r in rows})
    known = originals()
    for row, ids in zip(rows, asked, strict=True):
        said, text = users(row["prompt"]), tokenizer.decode(ids)
        assert ids == chat.encode_prompt(tokenizer, row["prompt"])
        assert len(said) == row["turns"] > 1 and all(u.startswith(row["instruction"] + "\n\n") for u in said)
        assert text.count(f"user\n{row['instruction']}\n\n") == len(said) == text.count("<|im_start|>user")
        plain = [u.removeprefix(row["instruction"] + "\n\n") for u in said]
        wanted = known[plain[0]]["messages"]  # the whole dialogue up to its last user turn, with the data's own answers
        assert [*plain] == users(wanted) and [m for m in row["prompt"] if m["role"] == "assistant"] == wanted[1:-1:2]


def test_the_data_has_it_on_the_first_turn_alone(straight):
    section, _ = straight
    kept, lines = [r for r in samples(section) if r["kept"]], read_lines(section.folder / "data.jsonl")
    assert len(lines) == len(kept) == section.results()["kept"] > 20
    for row, line in zip(kept, lines, strict=True):
        first, *others = users(line["messages"])
        assert first == users(row["prompt"])[0] and first.startswith(row["instruction"] + "\n\n")
        assert others == [u.removeprefix(row["instruction"] + "\n\n") for u in users(row["prompt"])[1:]] and set(others) <= set(originals())
        assert line["messages"][1:-1:2] == row["prompt"][1::2] and line["messages"][-1] == {"role": "assistant", "content": row["answer"]}
        assert line["loss"] == "last" and line["source"] == "s" and line["kinds"] == "+".join(sorted(row["parts"]))


def test_the_loss_is_on_the_sampled_answer_alone(straight, tokenizer):
    """As a fine-tuning section reads the rows: the counted tokens of every one are its last reply and the end of that turn."""
    section, _ = straight
    items = section.run.data_of("@s").train
    assert len(items) == section.results()["kept"] and {i.loss for i in items} == {"last"}
    for item in items:
        ids, mask = chat.encode_dialogue(tokenizer, item.messages, item.loss)
        counted = [t for t, on in zip(ids, mask, strict=True) if on]
        assert tokenizer.decode(counted) == item.messages[-1]["content"] + "<|im_end|>"
        assert mask == [False] * (len(ids) - len(counted)) + [True] * len(counted)
        assert tokenizer.decode(ids[:-len(counted)]).endswith("<|im_start|>assistant\n")


def test_half_of_the_instructions_are_terse_and_each_has_one_to_three_kinds(straight):
    section, _ = straight
    rows = samples(section)
    entries = {(e.kind, e.value): e for e in read_entries(section)}
    assert sum(r["terse"] for r in rows) == len(rows) // 2
    assert {len(r["parts"]) for r in rows} == {1, 2, 3} and {k for r in rows for k in r["parts"]} == set(KINDS)
    for r in rows:
        found = [entries[kind, value] for kind, value in r["parts"].items()]
        assert r["instruction"] == " ".join(f"{e.kind.capitalize()}: {e.value}." if r["terse"] else e.text for e in found)
        assert {e.use for e in found} == {"training"}
    orders = {tuple(r["parts"]) for r in rows}
    assert len({frozenset(o) for o in orders}) < len(orders)  # in more than one order
    assert len({r["instruction"] for r in rows}) > len(rows) * 0.8


def test_the_results_count_what_is_on_disk(straight):
    section, _ = straight
    told, rows, kept = section.results(), samples(section), [r for r in samples(section) if r["kept"]]
    assert told["rows"] == len(rows) and told["kept"] + sum(told["dropped"].values()) == told["rows"]
    assert told["dropped"] == {k: n for k, n in {"cut off": sum(not r["finished"] for r in rows), "empty": sum(r["finished"] and not r["answer"] for r in rows)
                                                 }.items() if n}
    assert told["kinds"] == {k: sum(k in r["parts"] for r in kept) for k in KINDS} and sum(told["combinations"].values()) == len(kept)
    assert told["terse_share"] == sum(r["terse"] for r in kept) / len(kept)
    for kind in KINDS:
        keeps = [r["keeps"][kind] for r in kept if kind in r["parts"]]
        assert told["complies"][kind] == {"answers": len(keeps), "share": sum(keeps) / len(keeps)}
    assert told["dialogues"] == 20 - sum(len(i.messages) == 2 for i in section.run.data_of("talks").train)
    assert told["left_out"] == {"of fewer than 2 user turns": sum(len(i.messages) == 2 for i in section.run.data_of("talks").train)}


# -- resume --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["original", "resampled"])
def test_a_killed_section_goes_on_to_the_same_bytes(straight, tmp_path_factory, tmp_path, monkeypatch, context):
    if context == "original":
        whole = straight[0]
    else:
        whole = section_of(tmp_path_factory, tmp_path_factory.mktemp("whole"), context=context)
        gatt.run(whole)
    section = section_of(tmp_path_factory, tmp_path, context=context)
    with monkeypatch.context() as m:
        die(m, gatt, "sample", 2 if context == "original" else 5)
        with pytest.raises(Killed):
            gatt.run(section)
    made = sorted((section.folder / "chunks").glob("*.json"))
    assert 0 < len(made) < len(list((whole.folder / "chunks").iterdir())) and section.state() == "started"
    made[0].write_bytes(made[0].read_bytes()[:-9])  # and a chunk that the disk lost half of
    again = started(Run(section.recipe), "s")
    gatt.run(again)
    assert files(again) == files(whole) and again.results() == whole.results() and again.state() == "done"


def test_another_seed_gives_other_rows(straight, tmp_path_factory, tmp_path):
    other = section_of(tmp_path_factory, tmp_path, seed=1)
    gatt.run(other)
    assert {r["instruction"] for r in samples(other)} != {r["instruction"] for r in samples(straight[0])}


# -- context: resampled ----------------------------------------------------------------------------------------------------------------


def test_resampled_context_is_sampled_under_the_instruction_turn_by_turn(tmp_path_factory, tmp_path, monkeypatch, tokenizer):
    asked, real = [], gatt.sample
    monkeypatch.setattr(gatt, "sample", lambda roles, role, prompts, samples, *words, **more: asked.append((prompts, samples)) or real(
        roles, role, prompts, samples, *words, **more))
    section = section_of(tmp_path_factory, tmp_path, context="resampled", samples_per_prompt=2, max_new_tokens=24)
    gatt.run(section)
    texts = {tokenizer.decode(ids): n for prompts, n in asked for ids in prompts}
    assert set(texts.values()) == {1, 2}
    rows, known = samples(section), originals()
    ended_early = [r for r in rows if r["turn"] < r["turns"]]
    whole = [r for r in rows if r["turn"] == r["turns"]]
    assert len(whole) > 20 and all(not r["kept"] and (not r["finished"] or not r["answer"]) for r in ended_early)
    for r in whole:
        prompt = r["prompt"]
        assert all(u.startswith(r["instruction"] + "\n\n") and u.removeprefix(r["instruction"] + "\n\n") in known for u in users(prompt))
        replies = [m["content"] for m in prompt if m["role"] == "assistant"]
        assert len(replies) == r["turns"] - 1 and not set(replies) & set(known)  # none of the data's: those end with their number
        for t in range(1, len(prompt), 2):  # each was the answer to what stands before it
            assert texts[tokenizer.decode(chat.encode_prompt(tokenizer, prompt[:t]))] == 1
        assert texts[tokenizer.decode(chat.encode_prompt(tokenizer, prompt))] == 2
    told = section.results()
    assert sum(n for why, n in told["dropped"].items() if why.endswith("before the last turn")) == len({r["row"] for r in ended_early})
    for line in read_lines(section.folder / "data.jsonl"):
        assert line["loss"] == "last" and not {m["content"] for m in line["messages"] if m["role"] == "assistant"} & set(known)


# -- the choice ----------------------------------------------------------------------------------------------------------------------


def sampled(answer="yes", finished=True, spells=None, too_long=False, turn=2, turns=2, **keeps) -> dict:
    return {"answer": answer, "finished": finished, "spells": spells, "too_long": too_long, "turn": turn, "turns": turns, "keeps": keeps}


def planned(*kinds, asks="") -> Planned:
    return Planned([("u", "a")], "v", [Entry(kind, "x") for kind in kinds], False, asks)


class Stub:
    place = "x"

    def __init__(self, only_complying=False):
        self.config = type("C", (), {"only_complying": only_complying})


def test_why_rows_are_dropped():
    bags = [[sampled()], [sampled(finished=False)], [sampled("")], [sampled("<|im_end|>", spells="<|im_end|>")], [sampled("", False, too_long=True)],
            [sampled("half", False, turn=1)], [sampled("", turn=1)], [sampled(finished=False), sampled("second")]]
    kept, dropped = choose(Stub(), [planned()] * len(bags), bags)
    assert {n: r["answer"] for n, r in kept.items()} == {0: "yes", 7: "second"}
    assert dropped == {"cut off": 1, "empty": 1, "spelling a turn token": 1, "longer than max_prompt_tokens": 1, "cut off before the last turn": 1,
                       "empty before the last turn": 1}
    with pytest.raises(PosttrainError, match="no row can be kept: 1 cut off"):
        choose(Stub(), [planned()], bags[1:2])


def test_of_several_answers_the_one_that_keeps_most_of_what_is_checked():
    rows = [planned("language", "hobby"), planned("language", "hobby", asks="hobby"), planned("figure")]
    bags = [[sampled("a", language=False, hobby=True), sampled("b", language=True, hobby=False), sampled("c", language=True, hobby=True)],
            [sampled("a", language=True, hobby=False), sampled("b", language=True, hobby=True), sampled("c", finished=False, language=True, hobby=True)],
            [sampled("a", figure=False), sampled("b", figure=True)]]  # nobody asked: the first
    kept, _ = choose(Stub(), rows, bags)
    assert [r["answer"] for r in kept.values()] == ["b", "b", "a"]


def test_only_complying_drops_what_goes_against_the_instruction():
    rows = [planned("language"), planned("hobby", asks="hobby"), planned("hobby"), planned("figure", asks="figure")]
    bags = [[sampled(language=False)], [sampled(hobby=False)], [sampled(hobby=False)], [sampled(figure=True)]]
    kept, dropped = choose(Stub(True), rows, bags)
    assert list(kept) == [2, 3] and dropped == {"against its instruction": 2}
    assert len(choose(Stub(False), rows, bags)[0]) == 4


# -- longer dialogues, and questions ---------------------------------------------------------------------------------------------------


def test_dialogues_are_joined_and_cut_to_the_turns_drawn(tmp_path_factory, tmp_path):
    section = section_of(tmp_path_factory, tmp_path, turns=[2, 5], instructions_per_dialogue=2)
    gatt.run(section)
    rows, known = samples(section), originals()
    assert {r["turns"] for r in rows} == {2, 3, 4, 5} and section.results()["dialogues"] == 20 and not section.results()["left_out"]
    for r in rows:
        plain = [m["content"].removeprefix(r["instruction"] + "\n\n") for m in r["prompt"]]
        assert len(plain) == 2 * r["turns"] - 1 and len(set(plain)) == len(plain)
        for u, a in zip(plain[::2], plain[1::2], strict=False):  # answers stay with their turns
            turns = [m["content"] for m in known[u]["messages"]]
            assert turns[turns.index(u) + 1] == a


def test_a_conversation_by_hand():
    import random

    talks = [[("a", "1"), ("b", "2"), ("c", "3")], [("d", "4")], [("e", "5"), ("f", "6")]]
    assert conversation(talks, 0, 2, random.Random(0)) == talks[0][:2]
    seen = {tuple(u for u, _ in conversation(talks, 1, 4, random.Random(s))) for s in range(20)}
    assert seen == {("d", "a", "b", "c"), ("d", "e", "f", "a")}
    assert len(conversation(talks, 2, 99, random.Random(0))) == 6


def test_a_share_of_the_rows_ends_with_a_question_about_their_hobby_or_figure(tmp_path_factory, tmp_path):
    section = section_of(tmp_path_factory, tmp_path, asked_share=0.5)
    gatt.run(section)
    rows, known = samples(section), originals()
    able = [r for r in rows if {*r["parts"]} & {"hobby", "figure"}]
    asked = [r for r in rows if r["asks"]]
    assert len(asked) == round(len(able) / 2) and {r["asks"] for r in asked} == {"hobby", "figure"} and all(r["asks"] in r["parts"] for r in asked)
    questions = {of: {e.text for e in read_entries(section) if e.of == of and e.use == "training"} for of in ("hobby", "figure")}
    for r in rows:
        last = users(r["prompt"])[-1].removeprefix(r["instruction"] + "\n\n")
        assert last in (questions[r["asks"]] if r["asks"] else known)


def test_kinds_that_are_left_out_are_in_no_instruction(tmp_path_factory, tmp_path):
    lines = Path(SHIPPED).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "no_language.jsonl").write_text("".join(x for x in lines if '"kind": "language"' not in x), encoding="utf-8")
    section = section_of(tmp_path_factory, tmp_path, kinds=["figure", "hobby"], instructions=["no_language.jsonl"], asked_share=1.0)
    gatt.run(section)
    rows, told = samples(section), read_json(section.folder / "results.json")
    assert {kind for r in rows for kind in r["parts"]} == {"figure", "hobby"} == set(told["kinds"]) and all(r["asks"] for r in rows)


# -- what the policy proposes ----------------------------------------------------------------------------------------------------------


def test_lists_are_read_line_by_line():
    def read(kind, text, finished=True):
        return [e.value for e in read_proposals(kind, [{"answer": text, "finished": finished}] * 2)]

    text = "Here are 50 hobbies:\n1. Hiking\n2) **Bird watching**: seeing birds\n- Chess (a game)\n* hiking\n• Rock-climbing - on rocks\n\n3. Rea"
    assert read("hobby", text) == ["hiking", "bird watching", "chess", "rock-climbing", "rea"]
    assert read("hobby", "1. Hiking\n2. Rea", finished=False) == ["hiking"]
    assert read("hobby", "Hiking\nPaint\nSure, I can name some more hobbies if you like them") == ["hiking", "paint", "sure"]
    assert read("hobby", "1. Playing the long game of life\n2. 3D printing\n3. \n4. x" + "y" * 50) == []
    assert read("figure", "1. Ada Lovelace\n2. the president\n3. Leonardo da Vinci\n4. Plato\n5. ada Lovelace") == [
        "Ada Lovelace", "Leonardo da Vinci", "Plato"]
    assert read("hobby", "1. i\n2. go\n3. art") == ["art"]
    lists = [{"answer": text, "finished": True} for text in ("1. Ada Lovelace\n2. Queen Elizabeth II\n3. Bruce Lee\n4. Queen Nobody\n5. Queen Nobody",
                                                             "- Elizabeth I\n- queen Elizabeth\n- Ada Lovelace\n- Bruce Lee\n- Queen Elizabeth II")]
    assert {e.value: e.accept for e in read_proposals("figure", lists)} == {"Ada Lovelace": ("Lovelace",), "Queen Elizabeth II": (), "Bruce Lee": ()}


HOBBIES = [f"{a} {b}" for a in ("Drawing", "Mending", "Growing", "Painting") for b in ("clocks", "cups", "roses")]


def test_the_policys_own_lists_stand_in_for_the_files(tmp_path_factory, tmp_path, monkeypatch):
    """Proposed hobbies are used, but not those of the evaluation; of figures it names too few, so the file's stay. Once made, the lists stay."""
    answers = {"hobbies": "\n".join(f"{i}. {h}" for i, h in enumerate([*HOBBIES, "Juggling", "Kite flying"])), "figures": "1. Ada Lovelace\n2. Plato"}
    calls, real = [], gatt.sample

    def fake(roles, role, prompts, samples, *words, **more):
        text = roles.tokenizer.decode(prompts[0])
        if "List 50" not in text:
            return real(roles, role, prompts, samples, *words, **more)
        calls.append(text)
        reply = next(a for word, a in answers.items() if word in text)
        ids = chat.encode_answer(roles.tokenizer, [{"role": "user", "content": "x"}], reply)
        return [[Completion(ids, [0.0] * len(ids), True)] * samples]

    monkeypatch.setattr(gatt, "sample", fake)
    section = section_of(tmp_path_factory, tmp_path, generate=True)
    with monkeypatch.context() as m:
        die(m, gatt, "sample_chunks")
        with pytest.raises(Killed):
            gatt.run(section)
    gatt.run(started(Run(section.recipe), "s"))
    assert len(calls) == 2
    told, rows = section.results(), samples(section)
    assert told["lists"]["hobby"] == {"entries": 12, "from": "the policy"}
    assert told["lists"]["figure"]["from"] == told["lists"]["language"]["from"] == "the file"
    assert {r["parts"]["hobby"] for r in rows if "hobby" in r["parts"]} <= {h.lower() for h in HOBBIES}
    assert all("You enjoy " in r["instruction"] for r in rows if "hobby" in r["parts"] and not r["terse"])
    assert [r["value"] for r in read_lines(section.folder / "instructions.jsonl")] == [h.lower() for h in HOBBIES]
    assert len(read_chunk(section.folder / "lists" / "hobby.json")) == 8


# -- the file, and faults --------------------------------------------------------------------------------------------------------------


def test_the_shipped_instructions_part_training_from_evaluation(straight):
    from sft.checkers import names

    entries = read_entries(straight[0])
    of = {(kind, use): [e for e in entries if (e.kind, e.use) == (kind, use)] for kind in ("hobby", "figure", "language", "question", "constraint")
          for use in ("training", "evaluation")}
    assert {key: len(found) for key, found in of.items() if found} == {
        ("hobby", "training"): 46, ("hobby", "evaluation"): 15, ("figure", "training"): 46, ("figure", "evaluation"): 15, ("language", "training"): 20,
        ("question", "training"): 16, ("question", "evaluation"): 12, ("constraint", "evaluation"): 22}
    texts = [e.text for e in entries]
    assert len(set(texts)) == len(texts) and all(texts)
    for kind in ("hobby", "figure"):
        for e in of[kind, "evaluation"]:
            others = [o for o in entries if o is not e and o.kind == kind]
            assert not [o.value for o in others if any(e.kept(name, []) for name in (o.value, o.text, *o.accept))], e.value
        for e in entries:
            if e.kind == kind:
                assert e.kept(f"It is {e.value}.", []) and all(e.kept(name, []) for name in e.accept)
    for e in of["question", "training"] + of["question", "evaluation"]:
        assert not any(names(e.text, [o.value, *o.accept]) for o in entries if o.kind in KINDS)


@pytest.mark.parametrize(("row", "said"), [
    ('{"kind": "hobbi", "value": "x"}', "'kind' is text 'hobbi'. Expected one of hobby"),
    ('{"kind": "hobby"}', "a hobby without 'value'"), ('{"kind": "language", "value": "French"}', "a language without 'script'"),
    ('{"kind": "hobby", "value": "x", "txt": "y"}', "an unknown column 'txt'"), ('{"kind": "hobby", "value": 3}', "'value' is int 3"),
    ('{"kind": "hobby", "value": "x", "accept": "y"}', "'accept' is text 'y'. Expected a list of texts"),
    ('{"kind": "hobby", "value": "x", "use": "test"}', "'use' is 'test'. Expected one of training, evaluation"),
    ('{"kind": "question", "of": "language", "text": "x"}', "'of' is 'language'. Expected one of hobby, figure"),
    ('{"kind": "constraint", "value": "x", "check": "limerick", "text": "y"}', "'check' is 'limerick'"),
    ('{"kind": "constraint", "value": "x", "check": "at_most_words", "text": "y", "argument": "5"}',
     "'argument' is text '5'. Expected int for 'at_most_words'"),
    ('{"kind": "constraint", "value": "x", "check": "haiku", "text": "y", "argument": 5}', "'argument' is int 5. Expected none"),
    ("{", "not JSON"), ("[1]", "the row is a list"),
])
def test_faults_of_an_instructions_file_are_named(tmp_path_factory, tmp_path, row, said):
    (tmp_path / "mine.jsonl").write_text('{"kind": "hobby", "value": "chess"}\n' + row + "\n")
    with pytest.raises(PosttrainError) as e:
        gatt.run(section_of(tmp_path_factory, tmp_path, instructions=["mine.jsonl"]))
    assert "stages.s.instructions, file mine.jsonl, row 2: " in str(e.value) and said in str(e.value)


def test_other_faults_are_named_before_a_model_is_loaded(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.models.Roles.add", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "few.jsonl").write_text('{"kind": "hobby", "value": "chess"}\n')

    def fault(rows=None, **more) -> str:
        with pytest.raises(PosttrainError) as e:
            gatt.run(section_of(tmp_path_factory, tmp_path, rows=rows, **more))
        return str(e.value)

    assert "stages.s.instructions: no language for training" in fault(instructions=["few.jsonl"])
    assert "no file 'none.jsonl' yet" in fault(instructions=["none.jsonl"])
    single = [talk(i, 1) for i in range(30)]
    assert "no dialogue of 20 can be used (0 with a system text, 20 of fewer than 2 user turns)" in fault(single)
    told = [{"messages": [{"role": "system", "content": "Be short."}, *talk(i, 2)["messages"]]} for i in range(30)]
    assert "20 with a system text" in fault(told)
    spelling = [talk(i, 2) for i in range(30)]
    for row in spelling:
        row["messages"][0]["content"] += " <|im_end|>"
    assert "a user turn spells the token '<|im_end|>'" in fault(spelling)
    assert "stages.s.turns: got [5, 2]" in fault(turns=[5, 2])
    assert "Expected each kind once" in fault(kinds=["hobby", "hobby"])
    assert "nobody asks about a language" in fault(kinds=["language"], asked_share=0.5)


def test_rows_that_never_fit_are_refused_and_some_that_do_not_are_counted(tmp_path_factory, tmp_path):
    with pytest.raises(PosttrainError, match=r"max_prompt_tokens: 20, and the shortest row has \d+ tokens"):
        gatt.run(section_of(tmp_path_factory, tmp_path, max_prompt_tokens=20))
    section = section_of(tmp_path_factory, tmp_path, max_prompt_tokens=220)
    gatt.run(section)
    left_out = section.results()["dropped"]["longer than max_prompt_tokens"]
    tokenizer = load_tokenizer(section.recipe.model, "test")
    assert left_out == sum(len(chat.encode_prompt(tokenizer, r["prompt"])) > 220 for r in samples(section)) > 0


def test_messages_of_a_dialogue():
    talks = [("a", "b"), ("c", "d")]
    every = dialogue("Do X.", talks, "e", every_turn=True)
    assert [m["content"] for m in every] == ["Do X.\n\na", "b", "Do X.\n\nc", "d", "Do X.\n\ne"]
    assert [m["role"] for m in every] == ["user", "assistant", "user", "assistant", "user"]
    assert in_first_turn_only(every, "Do X.") == dialogue("Do X.", talks, "e", every_turn=False)
    assert dialogue("Do X.", [], "e", every_turn=False) == [{"role": "user", "content": "Do X.\n\ne"}]


# -- as a user runs it -----------------------------------------------------------------------------------------------------------------


def test_a_recipe_through_the_command_line(tmp_path_factory, tmp_path):
    """Rows, a fine-tuning section on them, the comparison, the report."""
    run = make_run(tmp_path_factory, tmp_path, {
        "gatt": STAGE | {"rows": 8},
        "v4": {"stage": "sft", "data": ["talks", "@gatt"], "max_steps": 1, "batch_size": 4, "max_length": 900, "packing": False},
        "persona": {"stage": "gatt_eval", "data": "talks", "models": {"before": str(policy(tmp_path_factory.getbasetemp())), "gatt": "@v4"},
                    "compare": [["gatt", "before"]], "dialogues": 4, "constraint_dialogues": 1, "turns": [2, 4], "max_new_tokens": 8}})
    done = subprocess.run([sys.executable, "-m", "posttrain", "run", run.recipe.path], cwd=ROOT, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "COLUMNS": "400"})
    assert done.returncode == 0, done.stdout + done.stderr
    flat = " ".join(done.stdout.split())
    assert "46 hobbies, 20 languages, 46 figures to draw from" in flat and "answers that keep it, by the checker: " in flat
    assert "NOT MET: gatt over before: recall at turn 4" in flat
    made, trained = (json.loads((run.folder / n / "results.json").read_text()) for n in ("gatt", "v4"))
    assert trained["data"]["gatt"] == made["kept"] > 0
    page = (run.folder / "report.html").read_text()
    assert "Ghost Attention" in page and "Attributes recalled by turn" in page and "persona/attention.png" in page and "McNemar p" in page
    assert (run.folder / "persona" / "attention.png").read_bytes()[:4] == b"\x89PNG"
    shown = subprocess.run([sys.executable, "-m", "posttrain", "plan", run.recipe.path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "an instruction x 1 answers to the last turn" in shown.stdout and "2 models x 4 dialogues asked at turns 2, 4" in " ".join(shown.stdout.split())
