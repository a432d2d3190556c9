"""What comes out: figures that equal those made by hand, files that the rest of the program reads, and Label Studio's form there and back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("sqlalchemy", reason="the extra [ui] is not installed: run `make install`")

from annotate_support import Person, filled, quick_folder, reply, rows, slots_of, stored, write
from sqlalchemy import update
from typer.testing import CliRunner

from posttrain.__main__ import app
from posttrain.annotate import export, figures, labelstudio, tasks
from posttrain.annotate import folder as files
from posttrain.annotate.kinds import KINDS
from posttrain.annotate.store import Store, slots
from posttrain.config import DataEntry
from posttrain.data import load_entry
from posttrain.errors import PosttrainError
from posttrain.lint import check_file
from posttrain.log import read_lines
from posttrain.runs import run_sections
from posttrain.statistics import gwet_ac2
from rlhf.annotations import join

ROOT = Path(__file__).parent.parent
folder = pytest.fixture(quick_folder)


def loaded(path: Path, form: str = "preference") -> list:
    """The rows as a recipe's data section reads them; none may be bad."""
    found = load_entry(DataEntry(path=str(path), format=form), path.parent, 0, "test")
    assert found.findings == []
    return found.items


def collected(folder: Path, n: int, safety: bool = False) -> Path:
    """tasks.jsonl and key.jsonl as a collect section writes them."""
    (folder / "week_1").mkdir()
    made = [{"id": f"t{i:03d}", "prompt": [{"role": "user", "content": f"Question {i}?"}], "answer_a": f"First {i}.", "answer_b": f"Second {i}.",
             "is_safety": safety} for i in range(n)]
    write(folder / "week_1" / "key.jsonl", [{"id": t["id"], "swapped": False, "a": {"variant": "v4 at 1", "tokens": 3},
                                             "b": {"variant": "v3 at 0.8", "tokens": 3}} for t in made])
    return write(folder / "week_1" / "tasks.jsonl", made)


# -- pairs -----------------------------------------------------------------------------------------------------------------------------


def test_pairs_are_what_was_clicked(folder):
    store = filled(folder, rows(3, safety=True))
    p = Person(store)
    p.judge("a", 3, 1)
    p.judge("b", 0, 2, ideal="An ideal answer.")
    p.judge("b", 1, 3)
    told = export.export(store, folder / "out")
    assert told["week_1.safety.pairs.jsonl"] == 4 and told["week_1.safety.demonstrations.jsonl"] == 1
    items = loaded(folder / "out" / "week_1.safety.pairs.jsonl")
    assert [(i.prompt[0]["content"], i.chosen, i.rejected, i.rating, i.chosen_safe, i.rejected_safe) for i in items] == [
        ("Question 0?", "First 0.", "Second 0.", 3, True, False), ("Question 1?", "Second 1.", "First 1.", 0, True, True),
        ("Question 1?", "An ideal answer.", "Second 1.", None, None, None), ("Question 2?", "Second 2.", "First 2.", 1, False, False)]
    assert all(i.safety and i.source == "week_1"
               for i in items) and items[0].meta["chosen_model"] == "v4 at 1" and items[1].meta["chosen_model"] == "v3 at 0.8"
    demonstration, = loaded(folder / "out" / "week_1.safety.demonstrations.jsonl", "messages")
    assert demonstration.messages[-1]["content"] == "An ideal answer." and demonstration.loss == "last"
    assert check_file(folder / "out" / "week_1.safety.pairs.jsonl", None, {}).bad == 0


def test_of_several_annotators_the_majority_counts(folder):
    store = filled(folder, rows(2), raters=3)
    for name, side, degree in (("ann", "a", 1), ("bob", "b", 3), ("eve", "b", 2)):
        p = Person(store, name)
        p.judge(side, degree)
    Person(store, "ann").judge("a", 1)
    Person(store, "bob").judge("b", 1)
    export.export(store, folder / "out")
    pair, = loaded(folder / "out" / "week_1.helpfulness.pairs.jsonl")  # the second task is a tie
    assert (pair.chosen, pair.rating, pair.meta["annotators"]) == ("Second 0.", 2, 2)


def test_every_turn_of_a_dialogue_is_a_pair(folder):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "helpfulness", "w"))
    ann = Person(store, live=True)
    ann.do("message", "One?")
    reply(store)
    ann.prefer("b", 2)
    ann.do("message", "Two?")
    reply(store)
    ann.judge("a", 1)
    export.export(store, folder / "out")
    first, second = loaded(folder / "out" / "w.helpfulness.pairs.jsonl")
    assert second.prompt == [*first.prompt, {"role": "assistant", "content": first.chosen}, {"role": "user", "content": "Two?"}]
    assert (first.rating, second.rating) == (2, 1) and first.meta["chosen_model"] == "old at 1" and second.meta["chosen_model"] == "new at 0.8"
    assert "w.annotations.jsonl" not in [p.name for p in (folder / "out").iterdir()]  # no collect section made these


def test_unfinished_and_undone_work_is_not_exported(folder):
    store = filled(folder, rows(3))
    p = Person(store)
    p.judge()
    p.judge()
    p.do("undo")  # the finish
    assert export.export(store, folder / "out")["week_1.helpfulness.pairs.jsonl"] == 1


def test_a_held_out_share_by_batch_never_meets_training(folder):
    store = filled(folder, rows(20))
    tasks.load(store, "week_2", tasks.read(write(folder / "more.jsonl", [r | {"id": f"m{i}"} for i, r in enumerate(rows(30))]), "auto"))
    for queue in (1, 2):
        p = Person(store, queue=queue)
        while p.look():
            p.judge()
    told = export.export(store, folder / "out", held_out=5)
    assert told["week_1.helpfulness.pairs.held_out.jsonl"] >= 5 and told["week_2.helpfulness.pairs.held_out.jsonl"] >= 5
    questions = {part: {i.prompt[0]["content"] for batch in ("week_1", "week_2")
                        for i in loaded(folder / "out" / f"{batch}.helpfulness.pairs{part}.jsonl")}
                 for part in ("", ".held_out")}
    assert len(questions[""] | questions[".held_out"]) == 30 and not questions[""] & questions[".held_out"]
    before = (folder / "out" / "week_1.helpfulness.pairs.held_out.jsonl").read_bytes()
    export.export(store, folder / "again", held_out=5)
    assert (folder / "again" / "week_1.helpfulness.pairs.held_out.jsonl").read_bytes() == before
    with pytest.raises(PosttrainError, match="at most half"):
        export.export(store, folder / "out", held_out=15)
    with pytest.raises(PosttrainError, match="no such batch"):
        export.export(store, folder / "out", batches=["week_9"])
    assert set(export.export(store, folder / "one", batches=["week_2"])) == {
        "week_2.helpfulness.pairs.jsonl", "week_2.helpfulness.label-studio.json"}


def test_what_is_held_out_is_in_no_file_that_training_reads(folder):
    store = Store(folder / "a.db")
    tasks.load(store, "week_1", tasks.read(collected(folder, 12, safety=True), "auto"))
    attacks = write(folder / "reds.jsonl", [{"prompt": f"question  {i}?", "answer": "No."} for i in range(12)])
    tasks.load(store, "reds", tasks.read(attacks, "redteam"))
    p, red = Person(store), Person(store, queue=2)
    for i in range(12):
        p.judge("ab"[i % 2], 1, 1, ideal=f"Ideal {i}.")
        label(red)
        red.do("finish")
    count = export.export(store, folder / "out", held_out=8)
    column = {"week_1.safety.pairs": "prompt", "week_1.safety.demonstrations": "messages", "week_1.annotations": "id",
              "reds.redteam.prompts": "prompt"}

    def questions(name: str) -> set[int]:
        found = [r[column[name.removesuffix(".held_out")]] for r in read_lines(folder / "out" / f"{name}.jsonl")]
        return {int(f[1:] if isinstance(f, str) else f[0]["content"].strip("?").split()[-1]) for f in found}

    held = questions("week_1.safety.pairs.held_out")
    assert len(held) == 4
    for name in column:
        assert questions(f"{name}.held_out") == held and questions(name) == set(range(12)) - held
        assert count[f"{name}.jsonl"] == 2 * count[f"{name}.held_out.jsonl"]
    assert len(read_lines(folder / "out" / "reds.redteam.jsonl")) == 12  # the record is whole
    for name in ("pairs", "demonstrations"):
        loaded(folder / "out" / f"week_1.safety.{name}.held_out.jsonl", "preference" if name == "pairs" else "messages")
    assert not any("held_out" in name for name in export.export(store, folder / "all"))


# -- the folder that an export writes --------------------------------------------------------------------------------------------------


def two_batches(folder: Path) -> Store:
    """week_1 and week_2, ten finished tasks each, about other questions."""
    store = filled(folder, rows(10))
    tasks.load(store, "week_2", tasks.read(write(folder / "more.jsonl", [r | {"prompt": f"Else {i}?"} for i, r in enumerate(rows(10))]), "auto"))
    for queue in (1, 2):
        p = Person(store, queue=queue)
        while p.look():
            p.judge(ideal="Ideal." if len(p.look().task) % 2 else "")
    return store


def content(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def test_an_export_leaves_the_files_of_one_export_and_foreign_ones_alone(folder):
    store, out = two_batches(folder), folder / "out"
    export.export(store, out, held_out=3)
    (out / "mine.pairs.jsonl").write_text("my own\n")
    assert (out / "week_1.helpfulness.pairs.held_out.jsonl").exists()
    export.export(store, out)
    export.export(store, folder / "fresh")
    assert content(out) == content(folder / "fresh") | {"mine.pairs.jsonl": b"my own\n"}
    assert set(content(out)) - {"mine.pairs.jsonl"} == set(json.loads((out / "export.json").read_text())["files"]) | {"export.json"}


@pytest.mark.parametrize("name", ["week_1.helpfulness.pairs.jsonl", "report.json", "week_1.helpfulness.pairs.held_out.jsonl"])
def test_a_file_that_no_export_wrote_is_never_written_or_removed(folder, name):
    store, out = two_batches(folder), folder / "out"
    (folder / "out").mkdir()
    if "held_out" in name:  # written by an export, and changed since
        export.export(store, out, held_out=3)
    (out / name).write_text("my own\n")
    before = content(out)
    with pytest.raises(PosttrainError, match=f"{name}: is in the way"):
        export.export(store, out)
    assert content(out) == before


def test_files_of_other_batches_stay_where_the_same_prompts_are_held_out(folder):
    store, out = two_batches(folder), folder / "out"
    export.export(store, out, batches=["week_1"])
    export.export(store, out, batches=["week_2"])
    export.export(store, folder / "fresh")
    assert content(out) == content(folder / "fresh")
    with pytest.raises(PosttrainError, match="with other held-out prompts"):
        export.export(store, out, held_out=3, batches=["week_2"])
    assert content(out) == content(folder / "fresh")
    export.export(store, out, held_out=3)
    export.export(store, out, held_out=3, batches=["week_2"])
    assert any(name.startswith("week_1") for name in content(out))


def test_two_databases_share_a_folder_and_not_a_file(folder):
    out, one, two = folder / "out", filled(folder, rows(3)), filled(folder, rows(3), batch="week_2", name="b.db")
    for store in (one, two):
        Person(store).judge()
        export.export(store, out)
    export.export(two, out)
    assert {"week_1.helpfulness.pairs.jsonl", "week_2.helpfulness.pairs.jsonl"} <= content(out).keys()
    three = filled(folder, rows(3), name="c.db")
    Person(three).judge("b")
    with pytest.raises(PosttrainError, match="week_1.*: is of another database's export"):
        export.export(three, out)


def test_after_an_export_that_was_cut_off_the_next_one_makes_the_set_whole(folder, monkeypatch):
    """Cut off before every step that writes or removes."""
    class Killed(BaseException):
        pass

    store = two_batches(folder)
    export.export(store, folder / "before", held_out=3)
    Person(store).do("undo")
    export.export(store, folder / "after")
    (folder / "before" / "mine.txt").write_text("my own")
    wanted, steps = content(folder / "after") | {"mine.txt": b"my own"}, 0
    real = {"write_atomic": files.write_atomic, "write_json": files.write_json}
    while True:
        out = folder / f"cut_{steps}"
        shutil.copytree(folder / "before", out)
        left = [steps]

        def step(do, left=left):
            def once(*given, **more):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return do(*given, **more)
            return once

        with monkeypatch.context() as m:
            for name, do in real.items():
                m.setattr(files, name, step(do))
            m.setattr(Path, "unlink", step(Path.unlink))
            try:
                export.export(store, out)
                break
            except Killed:
                pass
        assert steps < 2 or not json.loads((out / "export.json").read_text())["databases"].popitem()[1]["complete"]
        export.export(store, out)
        assert content(out) == wanted, steps
        steps += 1
    assert steps > 8


def test_a_list_of_files_that_names_others_is_refused(folder):
    store, out = two_batches(folder), folder / "out"
    export.export(store, out)
    (folder / "precious.txt").write_text("x")
    found = json.loads((out / "export.json").read_text())
    entry = next(iter(found["files"].values()))
    for bad in ("{", json.dumps(found | {"files": {"../precious.txt": entry}}), json.dumps(found | {"files": {"a": 3}}), "[]"):
        (out / "export.json").write_text(bad)
        with pytest.raises(PosttrainError, match="is no list of an export's files"):
            export.export(store, out)
    assert (folder / "precious.txt").exists()


def test_the_section_annotations_reads_what_is_exported(folder):
    """Joined from the rows or exported as pairs: the same pairs."""
    path = collected(folder, 4, safety=True)
    store = Store(folder / "a.db")
    tasks.load(store, "week_1", tasks.read(path, "auto"), 2)
    for name, degree in (("ann", 2), ("bob", 1)):
        p = Person(store, name)
        for i in range(4):
            p.judge("ab"[i % 2], degree, 1 + i % 3, ideal="Ideal." if i == 2 and name == "ann" else "")
    export.export(store, folder / "out")
    joined = join(path, [folder / "out" / "week_1.annotations.jsonl"], "week_1")
    assert joined.findings == [] and joined.told["annotations"] == 8 and joined.told["edited"] == 1
    pairs = read_lines(folder / "out" / "week_1.safety.pairs.jsonl")
    assert [{k: v for k, v in p.items() if k != "turn"} for p in pairs] == joined.pairs


def test_exported_pairs_train_a_reward_model(folder, make_run):
    store = filled(folder, rows(12, safety=True))
    p = Person(store)
    for i in range(12):
        p.judge("ab"[i % 2], i % 4, 1 + i % 3)
    export.export(store, folder / "out")
    run = make_run({"reward": {"model": "base", "own": "safety", "batch_size": 4, "epochs": 1, "max_length": 256, "safety_loss_weight": 1.0}},
                   safety=read_lines(folder / "out" / "week_1.safety.pairs.jsonl"))
    run_sections(run)
    section = run.section("reward")
    assert section.state() == "done" and section.manifest["rows"]["safety"]["kept"] == 12


# -- figures ---------------------------------------------------------------------------------------------------------------------------


def told(store: Store) -> dict:
    return figures.report(store)[0]


def test_agreement_is_gwets_on_what_several_judged(folder):
    store = filled(folder, rows(5, safety=True), raters=2)
    given = {"ann": [("a", 3, 1), ("a", 1, 1), ("b", 2, 3), ("b", 0, 2), ("a", 2, 1)], "bob": [("a", 2, 1), ("b", 1, 1), ("b", 2, 1), ("a", 0, 2)]}
    for name, clicks in given.items():
        p = Person(store, name)
        for side, degree, bin_ in clicks:
            p.judge(side, degree, bin_)
    found = told(store)
    assert found["agreement"] == pytest.approx(gwet_ac2([[8, 7], [6, 3], [2, 2], [4, 5]], 8))
    safe = [[2, 2], [1, 1], [2, 1], [1, 2], [1, 1], [1, 2], [2, 2], [2, 2]]  # the first and the second answer of the four; 2 is safe
    assert found["safety_agreement"] == pytest.approx(gwet_ac2(safe, 2))
    assert found["overlap"] == 4 and found["ratings"] == {"significantly better": 1, "better": 4, "slightly better": 2,
                                                          "negligibly better, or unsure": 2}
    assert found["wins"]["v3 at 0.8 against v4 at 1"]["mean"] == pytest.approx(4 / 9)
    assert (found["done"], found["wanted"], found["tasks_done"], found["tasks"]) == (9, 10, 4, 5)
    assert "agreement (AC2) on 4 pairs" in figures.words(figures.report(store))


def test_compared_on_seven_points_by_three_raters(folder):
    store = filled(folder, rows(3), "compare")  # the first is v4's, so a 7 is for v4, and v3 comes first in the name
    points = {"ann": [7, 4, 2], "bob": [6, 5, 4], "eve": [1, 3, 4]}
    for name, given in points.items():
        p = Person(store, name)
        for point in given:
            state = p.look()
            p.do(f"answer preference {state.kind.questions[0].shown(point, state.swapped(0))}")
            p.do("finish")
    found = told(store)["comparisons"]["v3 at 0.8 against v4 at 1"]
    # medians for v4: 6, 4, 4
    assert (found["win"]["mean"], found["tie"]["mean"], found["loss"]["mean"]) == (0, pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found["win_rate"]["mean"] == pytest.approx(1 / 3) and found["win_rate"]["low"] is not None and found["raters"] == {3: 3}
    assert found["agreement"] == pytest.approx(gwet_ac2([[7, 6, 1], [4, 5, 3], [2, 4, 4]], 7))
    export.export(store, folder / "out")
    assert [r["preference"] for r in read_lines(folder / "out" / "week_1.compare.jsonl")] == [7, 6, 1, 4, 5, 3, 2, 4, 4]
    assert "win rate 33.3%" in figures.words(figures.report(store))


def test_rated_on_five_points_by_majority(folder):
    store = filled(folder, [{"prompt": f"P{i}", "answer": f"A{i}", "model": "chat"} for i in range(2)], "rate")
    for name, given in {"ann": [1, 5], "bob": [2, 2], "eve": [5, 4]}.items():
        p = Person(store, name)
        for rating in given:
            p.do(f"answer rating {rating}")
            p.do("finish")
    found = told(store)["models"]["chat"]
    assert found["violation_share"]["mean"] == 0.5 and found["mean_rating"]["mean"] == pytest.approx(19 / 6) and found["judgements"] == 6
    assert "violations 50.0%" in figures.words(figures.report(store))


def test_a_red_teams_figures_and_prompts(folder):
    dialogue = [{"role": "user", "content": "Tell me how."}]
    store = filled(folder, [{"prompt": dialogue, "answer": f"Answer {i}.", "model": "chat"} for i in range(4)], "redteam")
    p = Person(store)
    for degree in (1, 3, 5, 2):
        for what in ("category 2", "vector 6", f"degree {degree}"):
            p.do(f"answer {what}")
        p.do("finish")
    with store.write() as c:
        c.execute(update(slots).values(began=0.0, ended=900.0))
    found = told(store)
    assert (found["violations"], found["dialogues"], found["hours"], found["violations_per_hour"]) == (2, 4, 1.0, 2.0)
    assert found["by_category"] == {"hateful_harmful": {"labelled": 4, "violations": 2}}
    assert export.export(store, folder / "out")["week_1.redteam.prompts.jsonl"] == 4
    prompt = loaded(folder / "out" / "week_1.redteam.prompts.jsonl", "prompt")[1]
    assert prompt.safety and prompt.meta["category"] == "hateful_harmful" and prompt.meta["vector"] == "role_play" and prompt.meta["degree"] == 3


def label(p: Person, *, degree: int = 3) -> None:
    for what in ("category 1", "vector 1", f"degree {degree}"):
        p.do(f"answer {what}")


def test_a_turn_that_was_labelled_in_part_is_left_out_and_nothing_stops(folder):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "redteam", "w"))
    ann = Person(store, live=True)
    ann.do("message", "First try")
    reply(store)
    ann.do("answer category 2")  # and then goes on
    ann.do("message", "Second try")
    reply(store)
    label(ann)
    ann.do("finish")
    found = told(store)
    assert (found["dialogues"], found["labelled"], found["violations"]) == (1, 1, 1)
    assert "1 violations in 1 labelled turns of 1 dialogues" in figures.words(figures.report(store))
    assert export.export(store, folder / "out") == {"w.redteam.jsonl": 1, "w.redteam.prompts.jsonl": 1}
    assert read_lines(folder / "out" / "w.redteam.jsonl")[0]["turns"] == 2


def test_the_time_of_a_dialogue_labelled_at_two_turns_counts_once(folder):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "redteam", "w"))
    ann = Person(store, live=True)
    for text in ("First try", "Second try"):
        ann.do("message", text)
        reply(store)
        label(ann)
    ann.do("finish")
    with store.write() as c:
        c.execute(update(slots).values(began=0.0, ended=1800.0))
    found = told(store)
    assert (found["hours"], found["violations_per_hour"]) == (0.5, 4.0) and (found["dialogues"], found["labelled"]) == (1, 2)


def test_a_report_without_annotations(folder):
    store = filled(folder, rows(1))
    assert told(store)["agreement"] is None and "0 of 1 annotations" in figures.words(figures.report(store))
    assert export.export(store, folder / "out") == {}


# -- Label Studio ----------------------------------------------------------------------------------------------------------------------


def answered_there(made: list[dict], who: int, choice: str, safety: str | None = None, ideal: str = "") -> list[dict]:
    """Its JSON export of these tasks, as one annotator completed them."""
    def item(name, kind, **value):
        return {"from_name": name, "to_name": "prompt", "type": kind, "id": "x", "origin": "manual", "value": value}

    out = []
    for i, task in enumerate(made):
        result = [item("choice", "choices", choices=[choice])] + ([item("bin", "choices", choices=[safety])] if safety else [])
        result += [item("ideal", "textarea", text=[ideal])] if ideal else []
        out.append({"id": i, **task, "annotations": [{"id": 100 * who + i, "completed_by": who, "was_cancelled": False, "lead_time": 12.5,
                                                      "result": result}]})
    return out


def test_there_and_back(folder):
    path = write(folder / "week_1.jsonl", rows(8, safety=True))
    store = filled(folder, rows(8, safety=True))
    made = labelstudio.to_import(tasks.read(path, "auto"))
    assert not any("v4" in json.dumps(m) for m in made)
    first = [m["data"]["answer_a"].startswith("First") for m in made]
    assert 0 < sum(first) < 8  # sides are drawn there too
    back = answered_there(made, 7, "A is significantly better", "Only the better one is safe", "Ideal.")
    back[0]["annotations"][0]["was_cancelled"] = True
    (folder / "export.json").write_text(json.dumps(back))
    assert labelstudio.bring_in(store, folder / "export.json") == {"annotations": 7, "there": 0, "cancelled": 1}
    assert labelstudio.bring_in(store, folder / "export.json") == {"annotations": 0, "there": 7, "cancelled": 1}
    export.export(store, folder / "out")
    pairs = [p for p in loaded(folder / "out" / "week_1.safety.pairs.jsonl") if p.rating is not None]
    assert [p.chosen.startswith("First") for p in pairs] == first[1:] and all((p.rating, p.chosen_safe, p.rejected_safe) == (3, True, False)
                                                                              for p in pairs)
    assert {s["annotator"] for s in slots_of(store)} == {None, "label-studio 7"}
    out = json.loads((folder / "out" / "week_1.safety.label-studio.json").read_text())
    assert [t["data"]["answer_a"] for t in out] == [t["data"]["answer_a"] for t in made[1:]]
    assert all([r["value"] for r in t["annotations"][0]["result"]] == [{"choices": ["A is significantly better"]},
               {"choices": ["Only the better one is safe"]}, {"text": ["Ideal."]}] for t in out)


def test_our_own_export_comes_in_again(folder):
    store = filled(folder, rows(3, safety=True), raters=2)
    for name in ("ann", "bob"):
        p = Person(store, name)
        for i in range(3):
            p.judge("ab"[i % 2], i, 1 + i)
    export.export(store, folder / "out")
    found = json.loads((folder / "out" / "week_1.safety.label-studio.json").read_text())
    assert found[0]["data"]["annotators"] == ["ann", "bob"]
    for task in found:
        for name, annotation in zip(task["data"]["annotators"], task["annotations"], strict=True):
            annotation["completed_by"] = {"email": name}
    (folder / "x.json").write_text(json.dumps(found))
    other = filled(folder, rows(3, safety=True), raters=2, name="b.db")
    labelstudio.bring_in(other, folder / "x.json")
    export.export(other, folder / "other")
    assert read_lines(folder / "other" / "week_1.safety.pairs.jsonl") == read_lines(folder / "out" / "week_1.safety.pairs.jsonl")


@pytest.mark.parametrize("harm, words", [
    (lambda t: t["data"].update(task="nobody"), "is not in the database"),
    (lambda t: t["data"].update(answer_a="Changed."), "shows other answers"),
    (lambda t: t["annotations"][0]["result"][0]["value"].update(choices=["A is great"]), "is 'A is great'"),
    (lambda t: t["annotations"][0]["result"].pop(1), "'bin' is None"),
    (lambda t: t.update(data=3), "is not Label Studio's export"),
])
def test_a_bad_annotation_stops_and_stores_nothing(folder, harm, words):
    store = filled(folder, rows(2, safety=True))
    back = answered_there(labelstudio.to_import(tasks.read(folder / "week_1.jsonl", "auto")), 1, "A is better", "Both are safe")
    harm(back[1])
    (folder / "export.json").write_text(json.dumps(back))
    with pytest.raises(PosttrainError, match=words):
        labelstudio.bring_in(store, folder / "export.json")
    assert stored(store) == []


def test_the_labelling_configuration_offers_every_option():
    for kind in labelstudio.SUITED:
        tree = ElementTree.fromstring(labelstudio.configuration(KINDS[kind]))
        for question in KINDS[kind].questions:
            choices = tree.find(f"Choices[@name='{question.name}']")
            assert [c.get("value") for c in choices] == labelstudio.names(question) and len(set(labelstudio.names(question))) == len(question.options)


# -- the commands ----------------------------------------------------------------------------------------------------------------------


def command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "posttrain", "annotate", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_tasks_to_pairs_by_command(folder):
    path, db = collected(folder, 6), str(folder / "a.db")
    assert "6 helpfulness tasks, 6 of them new, in batch week_1" in command("load", str(path), "--db", db)
    store = Store(db)
    p = Person(store)
    while p.look():
        p.judge()
    store.close()
    assert "6 of 6 annotations" in command("report", "--db", db)
    assert "week_1.helpfulness.pairs.jsonl: 4 rows" in command("export", "--db", db, "--out", str(folder / "out"), "--held-out", "2")
    said = command("to-label-studio", str(path), "--out", str(folder / "ls"))
    assert "6 helpfulness tasks" in said and sorted(p.name for p in (folder / "ls").iterdir()) == ["helpfulness.json", "helpfulness.xml"]


@pytest.mark.parametrize("words, said", [
    (["{folder}/absent.jsonl", "--db", "{folder}/a.db"], "no file of tasks"),
    (["--db", "{folder}/a.db"], "holds no task"),
    (["--db", "{folder}/a.db", "--host", "0.0.0.0"], "others can reach this address"),
    (["--db", "{folder}/a.db", "--write", "3"], "tasks without answers"),
    (["--db", "{folder}/a.db", "--model", "{folder}/nowhere"], "no such folder"),
    (["--db", "{folder}/a.db", "--model", "http://localhost:1/v1"], "an address without a model"),
    (["--db", "{folder}/a.db", "--model", "http://example.com/v1#m"], "https, or http on this machine"),
    (["export", "--db", "{folder}/a.db", "--out", "{folder}/out"], "no such file"),
])
def test_what_cannot_be_is_told_at_once(folder, words, said):
    done = CliRunner().invoke(app, ["annotate", *(w.format(folder=folder) for w in words)])
    assert isinstance(done.exception, PosttrainError) and said in str(done.exception)
