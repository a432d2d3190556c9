"""The desk below the page: who gets which task, what a click does, and that nothing is lost, doubled or given away."""

import json
import sqlite3
import threading
from collections import Counter

import pytest

pytest.importorskip("sqlalchemy", reason="the extra [ui] is not installed: run `make install`")

from annotate_support import Person, filled, quick_folder, reply, rows, slots_of, stored, token, write
from sqlalchemy import select, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from typer.testing import CliRunner

from posttrain.__main__ import app
from posttrain.annotate import figures, tasks
from posttrain.annotate.kinds import KINDS, PREFERENCE, SAFETY
from posttrain.annotate.store import Store, answers, events, facts, metadata, slots
from posttrain.annotate.work import Refused, clean
from posttrain.errors import PosttrainError
from posttrain.formats import RATINGS, SAFETY_BINS

folder = pytest.fixture(quick_folder)


# -- tasks go in -------------------------------------------------------------------------------------------------------------------------


def test_a_collect_sections_tasks_come_with_their_key(folder):
    (folder / "week_1").mkdir()
    task = {"id": "t01", "prompt": [{"role": "user", "content": "Hi?"}], "answer_a": "Yes.", "answer_b": "No.", "is_safety": True}
    path = write(folder / "week_1" / "tasks.jsonl", [task])
    write(folder / "week_1" / "key.jsonl", [{"id": "t01", "swapped": True, "a": {"variant": "v4 at 1"}, "b": {"variant": "v3 at 0.8"}}])
    (found,) = tasks.read(path, "auto")
    assert found["id"] == "t01" and found["kind"] == "safety" and found["collected"]
    assert found["answers"] == [{"text": "Yes.", "model": "v4 at 1"}, {"text": "No.", "model": "v3 at 0.8"}]
    path.with_name("key.jsonl").unlink()
    (found,) = tasks.read(path, "auto")
    assert not found["collected"] and found["answers"][0]["model"] == "unknown"


def test_loading_again_adds_nothing_and_other_text_under_a_known_id_is_refused(folder):
    store = filled(folder, [r | {"id": f"x{i}"} for i, r in enumerate(rows(3))])
    found = tasks.read(folder / "week_1.jsonl", "auto")
    assert tasks.load(store, "week_1", found) == {"added": 0, "there": 3}
    more = tasks.read(write(folder / "more.jsonl", rows(5)), "auto")
    assert tasks.load(store, "week_1", more) == {"added": 5, "there": 0}
    assert [s["place"] for s in slots_of(store)] == list(range(8))
    found[1]["answers"][0]["text"] = "Something else."
    with pytest.raises(PosttrainError, match="x1 of another kind or with other text"):
        tasks.load(store, "week_1", found)


@pytest.mark.parametrize("row, words", [
    ({"answer_a": "x", "answer_b": "y"}, "no 'prompt'"),
    ({"prompt": "Q", "answer_a": "x"}, "no 'answer_b' beside 'answer_a'"),
    ({"prompt": "Q", "answer_a": "x", "answer_b": " x "}, "both answers are the same"),
    ({"prompt": "Q", "answer_a": "x", "answer_b": 3}, "'answer_b' is int 3"),
    ({"prompt": [{"role": "assistant", "content": "Q"}], "answer_a": "x", "answer_b": "y"}, "has the roles"),
    ({"prompt": "Q", "answer_a": "x", "answer_b": "y", "then": {"c": {}}}, "'then' has"),
    ({"prompt": "Q", "answer_a": "x", "answer_b": "y", "then": {"message": "and?"}}, "has no answers"),
])
def test_a_bad_row_is_named_before_anything_is_stored(folder, row, words):
    with pytest.raises(PosttrainError, match=words) as e:
        tasks.read(write(folder / "t.jsonl", [*rows(1), row]), "helpfulness")
    assert "row 2" in str(e.value)


def test_an_evaluations_samples_make_pairs_and_single_answers(folder):
    samples = [{"model": m, "prompt": f"P{i}", "answer": f"{m} {i}.", "sample": 0, "row": i} for m in ("sft", "v4", "chat") for i in range(3)]
    samples[0]["answer"] = "chat 0."  # the same as the other model's: nothing to compare
    path = write(folder / "samples.jsonl", samples)
    pairs = tasks.read(path, "compare", ["sft", "chat"])
    assert [[a["text"] for a in t["answers"]] for t in pairs] == [["sft 1.", "chat 1."], ["sft 2.", "chat 2."]]
    assert len(tasks.read(path, "rate")) == 9
    with pytest.raises(PosttrainError, match="answers of 3 models"):
        tasks.read(path, "compare")
    with pytest.raises(PosttrainError, match="'sft, nobody'"):
        tasks.read(path, "compare", ["sft", "nobody"])


def test_equal_samples_are_judged_each_and_old_ids_stay(folder):
    samples = [{"model": m, "prompt": "P", "answer": said, "sample": i, "row": 0} for m in ("sft", "v4")
               for i, said in enumerate([f"{m}'s.", f"{m}'s.", "Another.", f"{m}'s."])]
    path = write(folder / "samples.jsonl", samples)
    found = tasks.read(path, "rate")
    assert len({t["id"] for t in found}) == 8 and found[0]["id"] == "p212406581728cb3"
    store = Store(folder / "a.db")
    assert tasks.load(store, "eval", [t for t in found if t["answers"][0]["text"] == "sft's."][:1])["added"] == 1  # as an older program did
    assert tasks.load(store, "eval", found) == {"added": 7, "there": 1} and tasks.load(store, "eval", tasks.read(path, "rate"))["added"] == 0
    pairs = tasks.read(path, "compare", ["sft", "v4"])
    assert len(pairs) == 3 == len({t["id"] for t in pairs})
    assert len(tasks.read(write(folder / "rows.jsonl", rows(1) * 2), "auto")) == 2
    assert tasks.load(store, "rows", tasks.read(folder / "rows.jsonl", "auto")) == {"added": 1, "there": 1}  # a row given twice is one task


@pytest.mark.parametrize("kind, row, words", [
    ("rate", {"answer": "A"}, "'then' in a rate task, which has one turn to judge"), ("redteam", {"answer": "A"}, "'then' in a redteam task"),
    ("compare", {"answer_a": "A", "answer_b": "B"}, "'then' in a compare task"), ("safety", {}, "'then' in a row whose own answers are not there"),
])
def test_further_turns_that_nobody_could_reach_are_refused_by_name(folder, kind, row, words):
    path = write(folder / "t.jsonl", [{"prompt": "Q", **row, "then": {"message": "and?", "answer": "C", "answer_a": "C", "answer_b": "D"}}])
    done = CliRunner().invoke(app, ["annotate", str(path), "--task", kind, "--db", str(folder / "a.db")])  # serve
    assert isinstance(done.exception, PosttrainError) and f"t.jsonl, row 1: {words}" in str(done.exception)
    assert slots_of(Store(folder / "a.db")) == []


def test_overlap_for_a_share_of_the_tasks(folder):
    per_task = Counter(Counter(s["task"] for s in slots_of(filled(folder, rows(200), raters=3, share=0.25))).values())
    assert per_task[3] + per_task[1] == 200 and 30 < per_task[3] < 70


# -- who gets what ---------------------------------------------------------------------------------------------------------------------


def test_no_task_is_given_twice_unless_overlap_is_asked_for(folder):
    store = filled(folder, rows(6))
    people = [Person(store, name) for name in ("ann", "bob", "eve")]
    given = [p.look().task for p in people]
    assert len(set(given)) == 3 and [p.look().task for p in people] == given
    for _ in range(2):
        for p in people:
            p.judge()
    assert [p.look() for p in people] == [None] * 3
    assert len({t for _, t, _ in stored(store)}) == 6


def test_with_overlap_each_does_a_task_once(folder):
    store = filled(folder, rows(4), raters=2)
    ann, bob, eve = (Person(store, name) for name in ("ann", "bob", "eve"))
    mine = [ann.judge() for _ in range(4)]
    assert len(set(mine)) == 4 and ann.look() is None
    assert sorted([bob.judge(), eve.judge(), bob.judge(), eve.judge()]) == sorted(mine) and bob.look() is None


def test_a_lease_that_ran_out_goes_to_somebody_else_and_the_late_click_is_told(folder):
    store = filled(folder, rows(1))
    ann, bob = Person(store, "ann"), Person(store, "bob")
    task = ann.look().task
    assert bob.look() is None
    with store.write() as c:
        c.execute(update(slots).values(until=1.0))
    assert bob.look().task == task
    with pytest.raises(Refused, match="went to somebody else"):
        ann.desk.act(1, "ann", token(), task, 1, "answer choice 1")
    assert stored(store) == [] and ann.look() is None


def test_a_click_extends_the_lease(folder):
    store = filled(folder, rows(1))
    ann = Person(store, lease=1000)
    ann.look()
    with store.write() as c:
        c.execute(update(slots).values(until=1.0))
    ann.prefer("a", 1)
    assert slots_of(store)[0]["until"] > 1e9


def test_a_skipped_task_goes_to_others_and_not_back(folder):
    store = filled(folder, rows(2))
    ann, bob = Person(store, "ann"), Person(store, "bob")
    first = ann.look().task
    second = ann.do("skip knowledge", "physics").task
    assert second != first and bob.look().task == first
    ann.judge()
    bob.do("skip broken")
    assert ann.look() is None and slots_of(store)[0]["state"] == "free"
    with pytest.raises(Refused, match="one of the reasons"):
        Person(filled(folder, rows(1), name="b.db")).do("skip unsafe_better")  # of safety tasks alone


def test_many_people_at_once_lose_and_double_nothing(folder):
    store = filled(folder, rows(20), raters=2)
    faults = []

    def work(name):
        try:
            p = Person(store, name)
            while p.look():
                p.judge()
        except Exception as e:
            faults.append(e)

    threads = [threading.Thread(target=work, args=(f"p{i}",)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults
    finished = Counter((t, who) for who, t, action in stored(store) if action == "finish")
    assert set(finished.values()) == {1} and set(Counter(t for t, _ in finished).values()) == {2} and len(finished) == 40


# -- clicks ----------------------------------------------------------------------------------------------------------------------------


def test_a_click_that_is_sent_again_counts_once(folder):
    store = filled(folder, rows(2))
    ann = Person(store)
    state = ann.look()
    for _ in range(3):
        ann.desk.act(1, "ann", "same-token-1", state.task, 1, "answer choice 3")
    ann.desk.act(1, "ann", "same-token-2", state.task, 1, "finish")
    after = ann.desk.act(1, "ann", "same-token-2", state.task, 1, "finish")
    assert [a for _, _, a in stored(store)] == ["answer", "finish"] and after.task != state.task
    with pytest.raises(Refused, match="Another choice had been saved"):
        ann.desk.act(1, "ann", "same-token-1", state.task, 1, "answer choice 4")
    with pytest.raises(Refused, match="Another choice"):
        Person(store, "bob").desk.act(1, "bob", "same-token-1", state.task, 1, "answer choice 3")


def test_the_same_click_from_many_threads_at_once_counts_once(folder):
    store = filled(folder, rows(2))
    ann = Person(store)
    task, faults = ann.look().task, []

    def click():
        try:
            ann.desk.act(1, "ann", "one-token", task, 1, "answer choice 3")
        except Exception as e:
            faults.append(e)

    threads = [threading.Thread(target=click) for _ in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults and [a for _, _, a in stored(store)] == ["answer"]


def test_questions_come_in_order_and_a_task_ends_complete(folder):
    ann = Person(filled(folder, rows(1, safety=True)))
    state = ann.look()
    assert state.kind.name == "safety" and state.question() is PREFERENCE
    for what, words in (("finish", "still open"), ("answer bin 1", "earlier question"), ("answer choice 9", "none of the options"),
                        ("answer nothing 1", "not open"), ("ideal", "once the questions"), ("message", "is empty"), ("dance", "not there")):
        with pytest.raises(Refused, match=words):
            ann.do(what)
    ann.prefer("b", 0)
    assert ann.look().question() is SAFETY
    ann.do("answer bin 3")
    assert ann.look().complete() and ann.look().turn.values == {"choice": ("b", 0), "bin": "both_unsafe"}
    with pytest.raises(Refused, match="cannot go on from here"):
        ann.do("message", "and?")  # nobody would answer
    with pytest.raises(Refused, match="earlier turn"):
        ann.do("finish", turn=0)
    assert ann.do("finish") is None


def test_another_choice_of_side_asks_for_the_bin_again(folder):
    ann = Person(filled(folder, rows(1, safety=True)))
    ann.prefer("a", 2)
    ann.do("answer bin 1")
    ann.prefer("a", 3)
    assert ann.look().turn.values == {"choice": ("a", 3), "bin": "preferred_safe"}
    ann.prefer("b", 3)
    assert ann.look().turn.values == {"choice": ("b", 3)}


def test_sides_are_shuffled_and_a_click_means_the_answer_that_was_shown(folder):
    store = filled(folder, rows(60))
    ann, sides = Person(store), []
    for _ in range(60):
        state = ann.look()
        swapped = state.swapped(0)
        sides.append(swapped)
        shown_first = state.turn.answers[1 if swapped else 0]["text"]
        state = ann.do("answer choice 1")  # A, the answer that stands first, significantly better
        assert state.turn.values["choice"] == ("b" if swapped else "a", 3) and state.turn.answers[state.chosen()]["text"] == shown_first
        ann.do("finish")
    assert 15 < sum(sides) < 45


def test_every_level_and_bin_of_the_native_format_can_be_given():
    for swapped in (False, True):
        values = [PREFERENCE.stored(n, swapped) for n in range(1, 9)]
        assert len(set(values)) == 8 and {d for _, d in values} == set(RATINGS.values())
        assert [PREFERENCE.shown(v, swapped) for v in values] == list(range(1, 9))
        assert values[0] == ("b" if swapped else "a", 3) and values[3:5] == ([("b", 0), ("a", 0)] if swapped else [("a", 0), ("b", 0)])
    assert [SAFETY.stored(n, True) for n in (1, 2, 3)] == list(SAFETY_BINS)
    assert all(len(q.options) == len(q.values) <= 9 for kind in KINDS.values() for q in kind.questions)


def test_undo_steps_back_through_tasks(folder):
    store = filled(folder, rows(3))
    ann = Person(store)
    first = ann.judge(ideal="Better.")
    second = ann.look().task
    assert ann.do("undo").task == first and not ann.look().finished  # the finish
    assert [s["state"] for s in slots_of(store)] == ["open", "free", "free"]  # the task at hand was given back
    assert ann.do("undo").turn.ideal == ""
    assert ann.do("undo").turn.values == {}
    with pytest.raises(Refused, match="nothing to take back"):
        ann.do("undo")
    ann.judge()
    assert ann.look().task == second
    with store.read() as c:  # nothing was deleted
        assert Counter(r[0] for r in c.execute(select(events.c.action))) == {"answer": 2, "ideal": 1, "finish": 2, "undo": 3}


def test_undo_of_a_skip_takes_the_task_back_while_it_is_free(folder):
    store = filled(folder, rows(2))
    ann, bob = Person(store, "ann"), Person(store, "bob")
    first = ann.look().task
    ann.do("skip unclear")
    assert ann.do("undo").task == first
    ann.do("skip unclear")
    assert bob.look().task == first
    with pytest.raises(Refused, match="went to somebody else"):
        ann.do("undo")


def test_an_annotators_text_is_cleaned_and_not_endless(folder):
    assert clean(" a\r\nb\x00\x07\tc\udc80 ") == "a\nb\tc\ufffd"
    ann = Person(filled(folder, rows(1)))
    ann.prefer("a", 1)
    with pytest.raises(Refused, match="20,000 are the most"):
        ann.do("ideal", "x" * 20_001)
    ann.do("ideal", "x" * 20_000)
    ann.do("ideal", "")  # taken out again
    assert ann.look().turn.ideal == ""


def waiting(store: Store) -> list:
    with store.read() as c:
        return c.execute(select(answers.c.key).where(answers.c.state == "waiting")).all()


# -- dialogues -------------------------------------------------------------------------------------------------------------------------


def test_a_dialogue_goes_on_with_the_chosen_answer(folder):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "safety", "w"))
    seen = []
    ann = Person(store, live=True, wake=lambda: seen.append(len(waiting(store))))
    assert ann.look().turns == []
    ann.do("message", "How do I pick a lock?")
    assert ann.look().turn.answers == [] and seen[-1] == 1  # whoever is woken finds it
    with pytest.raises(Refused, match="not open"):
        ann.do("answer choice 1")
    reply(store)
    ann.prefer("b", 1)
    with pytest.raises(Refused, match="cannot go on"):
        ann.do("message", "and?")  # the bin is open
    ann.do("answer bin 2")
    chosen = ann.look().turn.answers[1]["text"]
    ann.do("message", "And a safe?")
    reply(store)
    state = ann.look()
    assert [m["role"] for m in state.turn.prompt] == ["user", "assistant", "user"] and state.turn.prompt[1]["content"] == chosen
    ann.judge("a", 3, 1)
    assert ann.look() is None


def test_undo_of_a_message_takes_its_answers_along(folder):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "helpfulness", "w"))
    ann = Person(store, live=True)
    ann.do("message", "One?")
    reply(store)
    ann.do("undo")
    assert ann.look().turns == []
    ann.do("message", "Two?")
    assert ann.look().turn.answers == []
    reply(store)
    assert ann.look().turn.prompt[0]["content"] == "Two?" and ann.look().turn.answers


def test_a_given_prompt_has_the_same_live_answers_for_everybody_and_the_next_ones_are_made_ahead(folder):
    store = filled(folder, [{"prompt": f"Question {i}?"} for i in range(9)], raters=2)
    ann, bob = Person(store, "ann", live=True), Person(store, "bob", live=True)
    ann.look()
    assert len(reply(store)) == 4
    bob.look()
    assert reply(store) == [] and ann.look().turn.answers == bob.look().turn.answers != []
    ann.judge()
    ann.look()
    assert len(reply(store)) == 1


def test_an_answer_that_failed_can_be_asked_for_again(folder):
    store = filled(folder, [{"prompt": "Question?"}])
    ann = Person(store, live=True)
    ann.look()
    with store.write() as c:
        c.execute(update(answers).values(state="failed", error="the model's answer was cut off"))
    assert ann.look().turn.problem == "the model's answer was cut off"
    ann.do("again")
    assert ann.look().turn.problem == "" and reply(store) and ann.look().turn.answers


def test_prepared_turns_follow_the_choice(folder):
    then = {"a": {"message": "Of A?", "answer_a": "1", "answer_b": "2", "then": {"message": "Last?", "answer_a": "3", "answer_b": "4"}},
            "b": {"message": "Of B?", "answer_a": "5", "answer_b": "6"}}
    ann = Person(filled(folder, rows(2, then=then)))
    ann.prefer("a", 1)
    ann.do("go on")
    assert [m["content"] for m in ann.look().turn.prompt] == ["Question 0?", "First 0.", "Of A?"]
    ann.prefer("b", 1)
    ann.do("go on")
    assert [m["content"] for m in ann.look().turn.prompt][-2:] == ["2", "Last?"]
    ann.prefer("b", 1)
    with pytest.raises(Refused, match="no further turn"):
        ann.do("go on")
    ann.do("finish")
    ann.prefer("b", 1)
    ann.do("go on")
    assert ann.look().turn.prompt[-1]["content"] == "Of B?"


def test_a_red_teams_dialogue_is_labelled_at_its_end(folder):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "redteam", "w"))
    ann = Person(store, live=True)
    ann.do("message", "First try")
    reply(store)
    assert len(ann.look().turn.answers) == 1
    ann.do("message", "Second try")  # without labels of the first
    reply(store)
    for name in ("category", "vector", "degree"):
        ann.do(f"answer {name} 3")
    assert ann.look().turn.values == {"category": "unqualified_advice", "vector": "false_premise", "degree": 3}
    assert ann.do("finish") is None


# -- the database ----------------------------------------------------------------------------------------------------------------------


def test_sqlite_is_asked_for_durable_commits(folder):
    with Store(folder / "a.db").read() as c:
        assert c.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal" and c.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_the_database_is_its_owners_alone(folder):
    store = filled(folder, rows(1))
    Person(store).judge()
    assert {p.stat().st_mode & 0o777 for p in folder.glob("a.db*")} == {0o600} and len(list(folder.glob("a.db*"))) == 3
    store.close()
    assert [p.name for p in folder.glob("a.db*")] == ["a.db"]  # the log is in the file now


def test_what_is_no_database_of_ours_is_told(folder):
    text = folder / "x.txt"
    text.write_text("hello, this is no database")
    for db, words in ((text, "is no SQLite database"), (folder / "no" / "a.db", "no folder"), ("nosuch://host/db", "cannot be used")):
        with pytest.raises(PosttrainError, match=words):
            Store(str(db))
    with pytest.raises(PosttrainError, match="no such file"):
        Store(folder / "absent.db", make=False)
    with pytest.raises(PosttrainError) as e:
        Store("postgresql+nosuchdriver://ann:secret@host/db")
    assert "secret" not in str(e.value)
    store = Store(folder / "a.db")
    with store.write() as c:
        c.execute(update(facts).where(facts.c.name == "schema").values(value="99"))
    store.close()
    with pytest.raises(PosttrainError, match="another version"):
        Store(folder / "a.db")


TIMES = {"until", "began", "ended", "at", "asked", "after", "since"}


def test_times_are_stored_with_double_precision():
    for dialect in (mysql.dialect(), postgresql.dialect(), sqlite.dialect()):
        for table in metadata.tables.values():
            kinds = {c.name: str(c.type.compile(dialect)) for c in table.columns}
            assert {kinds[name] for name in TIMES & kinds.keys()} <= {"DOUBLE", "DOUBLE PRECISION"}, (table.name, dialect.name)
            assert not any("FLOAT" in kind for kind in kinds.values())


def test_a_database_of_an_earlier_version_opens_and_goes_on(folder):
    """Its times are FLOAT, and it has no table of attempts."""
    new = filled(folder, rows(2), name="new.db")
    new.close()
    with sqlite3.connect(folder / "new.db") as made, sqlite3.connect(folder / "a.db") as old:
        for line in made.iterdump():
            old.execute(line.replace("DOUBLE", "FLOAT"))
        old.execute("DROP TABLE attempts")
    store = Store(folder / "a.db", make=False)  # as report and export do
    assert figures.report(store)[0]["wanted"] == 2
    ann = Person(Store(folder / "a.db"), live=True)
    tasks.load(ann.desk.store, "w", tasks.written(1, "safety", "w"))
    assert tasks.load(ann.desk.store, "week_1", tasks.read(folder / "week_1.jsonl", "auto")) == {"added": 0, "there": 2}
    ann.judge()
    eve = Person(ann.desk.store, "eve", queue=2, live=True)
    eve.do("message", "Hello?")
    with ann.desk.store.write() as c:
        c.execute(update(answers).values(state="failed", error="the model was cut off"))
    eve.do("again")
    assert len(reply(ann.desk.store)) == 1 and figures.report(store)[0]["done"] == 1


def test_a_transaction_that_fails_leaves_nothing(folder):
    store = filled(folder, rows(1))
    with pytest.raises(RuntimeError), store.write() as c:
        c.execute(update(slots).values(state="done"))
        raise RuntimeError
    assert slots_of(store)[0]["state"] == "free"


def test_stored_values_are_plain_json(folder):
    store = filled(folder, rows(1))
    Person(store).judge()
    with store.read() as c:
        notes = [json.loads(v) for (v,) in c.execute(select(events.c.value).order_by(events.c.id))]
    assert notes[0]["question"] == "choice" and notes[0]["value"] == ["a", 2] and notes[0]["shown"] in ("ab", "ba")
