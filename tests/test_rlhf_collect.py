"""The weekly loop: tasks that tell annotators nothing, their choices joined exactly, and reward models trained again on the pairs."""

import csv
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from rlhf_support import REWARDS, Killed, die, make_run, started

from posttrain import report
from posttrain.chunks import read_chunk
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.runs import Run, preflight, run_sections
from rlhf import annotations, collect
from rlhf.annotations import join
from rlhf.collect import Variant, no_task, write_outputs

STAGE = {"stage": "collect", "prompts": "prompts", "policies": ["@sft"], "temperatures": [0.3, 0.6], **REWARDS, "rows": 24, "chunk": 10,
         "batch": 16, "max_new_tokens": 12}
OUTPUTS = ("tasks.jsonl", "tasks.csv", "key.jsonl")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed collect section."""
    section = started(make_run(tmp_path_factory, tmp_path_factory.mktemp("straight"), {"week": STAGE}), "week")
    collect.run(section)
    return section


def files(section) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in [*(section.folder / n for n in OUTPUTS), *sorted((section.folder / "chunks").iterdir())]}


def drawn(section) -> list[list[dict]]:
    rows = [r for p in sorted((section.folder / "chunks").iterdir()) for r in read_chunk(p)]
    return [rows[i:i + 2] for i in range(0, len(rows), 2)]


# -- collect -------------------------------------------------------------------------------------------------------------------------


def test_tasks_say_nothing_of_who_wrote_an_answer(straight):
    tasks = read_lines(straight.folder / "tasks.jsonl")
    assert len(tasks) > 5 and all(list(t) == ["id", "prompt", "answer_a", "answer_b", "is_safety"] for t in tasks)
    assert all(type(t["is_safety"]) is bool and set(t["prompt"][0]) == {"role", "content"} for t in tasks) and len({t["id"] for t in tasks}) == len(tasks)
    for name in ("tasks.jsonl", "tasks.csv"):
        assert "sft at" not in (straight.folder / name).read_text(encoding="utf-8")
    with (straight.folder / "tasks.csv").open(encoding="utf-8", newline="") as f:
        table = list(csv.DictReader(f))
    assert list(table[0]) == ["id", "prompt", "answer_a", "answer_b", "is_safety", "choice", "rating", "safety", "edited", "annotator"]
    assert [(r["id"], r["answer_a"].strip(), r["choice"]) for r in table] == [(t["id"], t["answer_a"], "") for t in tasks]


def test_the_key_names_each_answers_variant_and_scores(straight):
    tasks, key, kept = read_lines(straight.folder / "tasks.jsonl"), read_lines(straight.folder / "key.jsonl"), [
        p for p in drawn(straight) if not p[0]["left_out"]]
    assert [k["id"] for k in key] == [t["id"] for t in tasks] and len(kept) == len(tasks) and {k["swapped"] for k in key} == {True, False}
    for task, k, (cool, hot) in zip(tasks, key, kept, strict=True):
        a, b = (hot, cool) if k["swapped"] else (cool, hot)
        assert (task["answer_a"], task["answer_b"]) == (a["answer"], b["answer"]) and task["prompt"] == a["prompt"] == b["prompt"]
        for side, row, variant in (("a", a, "sft at 0.6" if k["swapped"] else "sft at 0.3"), ("b", b, "sft at 0.3" if k["swapped"] else "sft at 0.6")):
            assert k[side] == {"variant": variant, "tokens": len(row["ids"]), "helpfulness": row["helpfulness"], "safety": row["safety"]}
        assert a["finished"] and b["finished"] and a["answer"] and b["answer"] and a["answer"] != b["answer"]


def test_what_cannot_be_compared_is_drawn_again_then_left_out_and_counted(straight):
    pairs, told = drawn(straight), straight.results()
    out = [p for p in pairs if p[0]["left_out"]]
    assert told["prompts"] == 24 == len(pairs) and told["tasks"] == 24 - len(out) and told["share_left_out"] == pytest.approx(len(out) / 24)
    assert told["left_out"] == dict(Counter(p[0]["left_out"] for p in out)) and all(p[0]["draws"] == collect.DRAWS for p in out)
    assert told["drawn_again"] == sum(p[0]["draws"] > 1 for p in pairs) > len(out)
    assert all("helpfulness" not in r for p in out for r in p)

    def row(answer="x", finished=True, spells=None):
        return {"answer": answer, "finished": finished, "spells": spells}

    assert [no_task([row(), other]) for other in (row("y"), row(), row(""), row("y", finished=False), row("y", spells="<|im_end|>"))] == [
        None, "identical", "empty", "cut off", "spelling a turn token"]


def test_left_and_right_are_even_and_go_by_the_seed(tmp_path):
    """Each variant stands left in half of 400 tasks, within three standard deviations; another seed deals otherwise."""
    pairs = [[{"prompt": [{"role": "user", "content": f"q{i}"}], "is_safety": False, "answer": side, "ids": [1], "left_out": None}
              for side in ("old", "new")] for i in range(400)]
    dealt = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_outputs(SimpleNamespace(folder=folder, seed=seed, name="week", place="x"), pairs, [Variant("v3", "p", 1.0), Variant("v4", "q", 1.0)])
        left = [t["answer_a"] == "new" for t in read_lines(folder / "tasks.jsonl")]
        assert left == [k["swapped"] for k in read_lines(folder / "key.jsonl")]
        assert abs(sum(left) - 200) < 3 * math.sqrt(400 / 4)
        changes = sum(a != b for a, b in itertools.pairwise(left))  # no pattern in the order either
        assert abs(changes - 199.5) < 3 * math.sqrt(399 / 4)
        dealt[seed] = left
    assert dealt[0] != dealt[1]


def test_a_spreadsheet_runs_no_answer(tmp_path):
    pair = [{"prompt": [{"role": "user", "content": "@q"}], "is_safety": True, "answer": a, "ids": [1], "left_out": None} for a in ("=1+1", "- a\n- b, \"c\"")]
    write_outputs(SimpleNamespace(folder=tmp_path, seed=0, name="w", place="x"), [pair], [Variant("v", "p", 1.0), Variant("w", "p", 2.0)])
    with (tmp_path / "tasks.csv").open(encoding="utf-8", newline="") as f:
        (row,) = csv.DictReader(f)
    assert row["prompt"] == " @q" and {row["answer_a"], row["answer_b"]} == {" =1+1", " - a\n- b, \"c\""} and row["is_safety"] == "true"


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_killed_between_chunks_goes_on_to_the_same_bytes(straight, tmp_path_factory, monkeypatch, after):
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("killed"), {"week": STAGE})
    with monkeypatch.context() as m, pytest.raises(Killed):
        die(m, collect, "draw", after + 1)
        collect.run(started(run, "week"))
    section = started(Run(run.recipe), "week")
    assert sorted(p.name for p in (section.folder / "chunks").iterdir()) == [f"{i:05d}.json" for i in range(after)]
    assert section.state() == "started" and not (section.folder / "tasks.jsonl").exists()
    collect.run(section)
    assert files(section) == files(straight) and section.results() == straight.results()


def test_a_damaged_chunk_alone_is_drawn_again(straight, monkeypatch):
    before, path = files(straight), straight.folder / "chunks" / "00001.json"
    path.write_bytes(path.read_bytes()[:-9])
    (straight.folder / "DONE").unlink()
    real, made = collect.draw, []
    monkeypatch.setattr(collect, "draw", lambda *args: made.append(args[5]) or real(*args))
    collect.run(started(Run(straight.recipe), "week"))
    assert made == [1] and files(straight) == before


@pytest.mark.parametrize("change, said", [
    ({"temperatures": [1.0]}, "two different variants"), ({"policies": ["@sft", "@sft"], "temperatures": [1.0, 1.0]}, "two different variants"),
    ({"policies": ["@sft", "@sft", "base"]}, "at most 2"), ({"temperatures": [0.0, 1.0]}, "greater than 0"),
    ({"safety": None}, "both reward models"), ({"policies": ["@reward_safetyy"]}, "names no section")])
def test_a_wrong_configuration_is_refused_before_a_model_loads(tmp_path_factory, tmp_path, change, said):
    with pytest.raises(PosttrainError, match=said):
        make_run(tmp_path_factory, tmp_path, {"week": STAGE | change})


@pytest.mark.parametrize("stages, said", [
    ({"back": {"stage": "annotations", "tasks": "@sft", "annotations": ["x.jsonl"]}}, "back.tasks: '@sft' makes a model. Expected a section that makes tasks"),
    ({"r": {"stage": "reward", "model": "@sft", "own": ["helpful", "@week"]}}, "r.own: '@week' makes tasks"),
    ({"back": {"stage": "annotations", "tasks": "week", "annotations": ["x.jsonl"]}}, "back.tasks")])
def test_sections_meet_where_they_fit(tmp_path_factory, tmp_path, stages, said):
    with pytest.raises(PosttrainError) as e:
        preflight(make_run(tmp_path_factory, tmp_path, {"week": STAGE} | stages))
    assert said in str(e.value)


# -- the way back --------------------------------------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}]


@pytest.fixture
def batch(tmp_path):
    """Three tasks on disk: ids t0, t1 (a safety task), t2; on the left stands v4, v3, v4. Returns joined(rows...) of annotations."""
    tasks = [{"id": f"t{i}", "prompt": ASKED if i == 2 else ASKED[:1], "answer_a": f"left {i}", "answer_b": f"right {i}", "is_safety": i == 1}
             for i in range(3)]
    key = [{"id": f"t{i}", "swapped": i != 1, "a": {"variant": "v3" if i == 1 else "v4", "helpfulness": 2.0, "safety": -1.0},
            "b": {"variant": "v4" if i == 1 else "v3", "helpfulness": 1.0, "safety": 0.0}} for i in range(3)]
    for name, rows in (("tasks", tasks), ("key", key)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def joined(*rows, name="said.jsonl"):
        (tmp_path / name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return join(tmp_path / "tasks.jsonl", [tmp_path / name], "week")

    return joined


def vote(task, choice, rating="better", **more):
    return {"id": task, "choice": choice, "rating": rating, **more}


def test_choices_become_pairs_exactly(batch):
    found = batch(vote("t2", "b", "negligibly_better"), vote("t0", "a", "Significantly better", annotator="ann"),
                  vote("t1", "b", "slightly_better", safety="preferred_safe"))
    assert not found.findings and found.pairs == [
        {"prompt": ASKED[:1], "chosen": "left 0", "rejected": "right 0", "rating": "significantly_better", "chosen_safe": None, "rejected_safe": None,
         "chosen_model": "v4", "rejected_model": "v3", "annotators": 1, "source": "week", "safety": False, "task": "t0"},
        {"prompt": ASKED[:1], "chosen": "right 1", "rejected": "left 1", "rating": "slightly_better", "chosen_safe": True, "rejected_safe": False,
         "chosen_model": "v4", "rejected_model": "v3", "annotators": 1, "source": "week", "safety": True, "task": "t1"},
        {"prompt": ASKED, "chosen": "right 2", "rejected": "left 2", "rating": "negligibly_better", "chosen_safe": None, "rejected_safe": None,
         "chosen_model": "v3", "rejected_model": "v4", "annotators": 1, "source": "week", "safety": False, "task": "t2"}]
    told = found.told
    assert (told["tasks"], told["annotations"], told["annotated_tasks"], told["pairs"], told["ties"]) == (3, 3, 3, 3, 0)
    assert told["safety_bins"] == {"preferred_safe": 1} and told["ratings"] == {"significantly_better": 1, "slightly_better": 1, "negligibly_better": 1}
    assert told["wins"]["v4"]["mean"] == pytest.approx(2 / 3) and told["wins"]["v3"]["mean"] == pytest.approx(1 / 3)
    # helpfulness puts the left answer first (t0 right, t2 wrong); safety the right one (t1 right)
    assert told["agreement"]["helpfulness"]["mean"] == 0.5 and told["agreement"]["safety"]["mean"] == 1.0


@pytest.mark.parametrize("safety, tasks", [(None, ["t0", "t1"]), (True, ["t1"]), (False, ["t0"])])
def test_one_side_of_a_batch(batch, tmp_path, safety, tasks):
    batch(vote("t0", "a"), vote("t1", "b"))
    found = join(tmp_path / "tasks.jsonl", [tmp_path / "said.jsonl"], "week", safety)
    assert [p["task"] for p in found.pairs] == tasks and found.told["tasks"] == {None: 3, True: 1, False: 2}[safety] and not found.findings
    assert found.told["annotations"] == found.told["annotated_tasks"] == sum(found.told["ratings"].values()) == len(tasks)


@pytest.mark.parametrize("given, labels", [("both_safe", (True, True)), ("Both unsafe", (False, False)), (None, (None, None)), ("", (None, None))])
def test_safety_bins_are_labels_of_both_answers(batch, given, labels):
    (pair,) = batch(vote("t1", "a", safety=given)).pairs
    assert (pair["chosen_safe"], pair["rejected_safe"]) == labels


MALFORMED = [
    (vote("t9", "a"), "unknown_task", "'id' is text 't9'"), (vote("t0", "c"), "unknown_choice", "'choice' is text 'c'. Expected one of a, b"),
    (vote("t0", 1), "unknown_choice", "'choice' is int 1"), (vote("t0", "a", "great"), "unknown_rating", "'rating' is text 'great'"),
    (vote("t0", "a", None), "unknown_rating", "'rating' is empty"), (vote("t0", "a", safety="unsafe_preferred"), "unknown_safety_bin", "both_unsafe"),
    ({"id": "t0", "choice": "a"}, "missing_column", "no 'rating'"), (vote(None, "a"), "wrong_type", "'id' is null"),
    (vote("t0", "a", edited=3), "wrong_type", "'edited' is int 3"), ("{broken", "unparsable", "not JSON"), ("[]", "wrong_type", "a list")]


@pytest.mark.parametrize("row, reason, said", MALFORMED, ids=range(len(MALFORMED)))
def test_every_malformed_annotation_is_found_and_located(batch, row, reason, said):
    found = batch(vote("t0", "a"), vote("t1", "b"), row)
    (fault,) = found.findings
    assert (fault.severity, fault.reason, fault.row) == ("bad", reason, 3) and fault.file.endswith("said.jsonl") and said in fault.detail
    assert len(found.pairs) == 2 and found.told["bad_rows"] == 1 and found.told["annotations"] == 2


def test_annotators_who_disagree(batch):
    found = batch(vote("t0", "a", "better"), vote("t0", "b", "significantly_better"),  # a tie
                  vote("t1", "b", "significantly_better", safety="both_safe"), vote("t1", "a", "better"),
                  vote("t1", "b", "slightly_better", safety="both_safe"),
                  vote("t1", "b", "better", safety="both_unsafe"),  # three to one; the middle rating; two of three bins
                  vote("t2", "a", annotator="ann"), vote("t2", "b", annotator="bob"), vote("t2", "b", annotator="ann"))  # ann thought again
    assert [(p["task"], p["chosen"], p["rating"], p["annotators"]) for p in found.pairs] == [("t1", "right 1", "better", 3), ("t2", "right 2", "better", 2)]
    assert (found.pairs[0]["chosen_safe"], found.pairs[0]["rejected_safe"]) == (True, True)
    assert (found.told["ties"], found.told["replaced"], found.told["annotated_tasks"], found.told["annotations"]) == (1, 1, 3, 9)
    split = batch(vote("t1", "b", safety="both_safe"), vote("t1", "b", "negligibly_better", safety="both_unsafe")).pairs
    assert [(p["chosen_safe"], p["rejected_safe"], p["rating"]) for p in split] == [(None, None, "negligibly_better")]


def test_an_edit_is_a_pair_of_its_own(batch):
    found = batch(vote("t0", "a", edited=" better left "), vote("t2", "b", edited="right 2"))  # the second changes nothing
    assert [(p["chosen"], p["rejected"], p.get("rating"), p.get("edited")) for p in found.pairs] == [
        ("left 0", "right 0", "better", None), ("better left", "left 0", None, True), ("right 2", "left 2", "better", None)]
    assert found.told["edited"] == 1 and found.told["ratings"] == {"better": 2}


def test_a_filled_in_spreadsheet_is_read_as_it_is(batch):
    found = batch("id,prompt,answer_a,answer_b,is_safety,choice,rating,safety,edited,annotator", "t1,x,y,z,true,B,better,both safe,,ann",
                  "t0,x,y,z,false,,,,,", name="said.csv")
    assert not found.findings and [(p["task"], p["chosen"]) for p in found.pairs] == [("t1", "right 1")]
    assert found.told["empty_rows"] == 1 and found.rows == 2


def test_another_sections_key_is_refused(batch, tmp_path):
    batch(vote("t0", "a"))
    (tmp_path / "key.jsonl").write_text(json.dumps({"id": "t0"}) + "\n")
    with pytest.raises(PosttrainError, match=r"not those of key\.jsonl"):
        join(tmp_path / "tasks.jsonl", [tmp_path / "said.jsonl"], "week")
    (tmp_path / "key.jsonl").unlink()
    with pytest.raises(PosttrainError, match="no such file"):
        join(tmp_path / "tasks.jsonl", [tmp_path / "said.jsonl"], "week")


def test_the_command_shows_what_is_wrong_and_writes_what_is_sound(batch, tmp_path):
    batch(vote("t0", "a"), vote("t1", "x"))
    out = tmp_path / "pairs.jsonl"
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "posttrain", "annotations", tmp_path / "tasks.jsonl", tmp_path / "said.jsonl",
                           "--out", out], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60)
    flat = " ".join(done.stdout.split())
    assert done.returncode == 1 and "unknown_choice (1)" in flat and "row 2" in flat and "1 bad of 2 rows" in flat and "1 pairs from" in flat, done.stdout
    assert [p["chosen"] for p in read_lines(out)] == ["left 0"]
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())


# -- the loop ------------------------------------------------------------------------------------------------------------------------


def test_one_week(tmp_path_factory, tmp_path, capsys):
    """collect -> the annotator (takes the longer answer) -> pairs -> reward models trained again, by the same command said twice."""
    reward = {"stage": "reward", "model": "@sft", "learning_rate": 5e-3, "epochs": 1, "batch_size": 8, "max_length": 256, "save_steps": 100}
    stages = {"week": STAGE | {"rows": 43, "max_new_tokens": 40, "temperatures": [0.2, 0.5]},
              "week_helpful": {"stage": "annotations", "tasks": "@week", "annotations": ["week.jsonl"], "safety": False, "held_out": 2},
              "week_safety": {"stage": "annotations", "tasks": "@week", "annotations": ["week.jsonl"], "safety": True},
              "reward_helpfulness_2": {**reward, "own": ["helpful", "@week_helpful"], "other": ["safety", "@week_safety"]},
              "reward_safety_2": {**reward, "own": ["safety", "@week_safety"], "other": ["helpful", "@week_helpful"], "own_share": 0.9,
                                  "safety_loss_weight": 1.0}}
    run = make_run(tmp_path_factory, tmp_path, stages)
    with pytest.raises(PosttrainError, match=r"week_helpful: no file 'week\.jsonl' yet"):
        run_sections(run)
    tasks, before = read_lines(run.folder / "week" / "tasks.jsonl"), files(run.section("week"))
    said = [vote(t["id"], "a" if len(t["answer_a"]) > len(t["answer_b"]) else "b", safety="both_safe" if t["is_safety"] else None) for t in tasks]
    (tmp_path / "week.jsonl").write_text("".join(json.dumps(r) + "\n" for r in said))

    run = Run(run.recipe)
    run_sections(run)
    assert "runs again" not in capsys.readouterr().out and files(run.section("week")) == before
    helpful, safety = (run.data_of(f"@week_{side}") for side in ("helpful", "safety"))
    assert len(helpful.train) + len(helpful.held_out) + len(safety.train) == len(tasks) and len(helpful.held_out) >= 2 and safety.train
    longer = {json.dumps(t["prompt"]): sorted((t["answer_a"], t["answer_b"]), key=len) for t in tasks}
    for pair in [*helpful.train, *helpful.held_out, *safety.train]:
        short, long = longer[json.dumps(pair.prompt)]
        assert {pair.chosen, pair.rejected} == {short, long} and len(pair.chosen) >= len(pair.rejected) and pair.rating == 2
        assert (pair.chosen_safe, pair.rejected_safe) == ((True, True) if pair.safety else (None, None)) and pair.meta["chosen_model"].startswith("sft at ")
    asked = {p.prompt[0]["content"] for p in helpful.held_out}
    assert not asked & {p.prompt[0]["content"] for p in helpful.train}
    told = run.section("reward_helpfulness_2").results()
    assert told["held_out"]["own"]["pairs"] == 8 + len(helpful.held_out)
    assert run.section("week_safety").results()["tasks"] == len(safety.train) == sum(t["is_safety"] for t in tasks)
    assert run.section("reward_safety_2").state() == "done"
    page = report.render(run)
    assert "Tasks for annotators" in page and "What came back" in page and "Which variant was chosen" in page

    (tmp_path / "week.jsonl").write_text("".join(json.dumps(r) + "\n" for r in said[1:]))  # a changed file: from the join on, again
    run = Run(run.recipe)
    assert [run.section(n).state() for n in ("week", "week_helpful", "reward_safety_2")] == ["done", "changed", "changed"]
    assert "week.jsonl: files changed" in run.section("week_helpful").changes()


def test_a_bad_annotation_stops_the_section_by_name_and_row(straight, tmp_path):
    said = tmp_path / "said.jsonl"
    said.write_text(json.dumps(vote("t0", "a")) + "\n")
    section = SimpleNamespace(config=SimpleNamespace(tasks="@week", annotations=["said.jsonl"], safety=None, held_out=0), parent=lambda ref: straight,
                              file=lambda name: said, place="r: stages.back", name="back", seed=0, folder=tmp_path)
    with pytest.raises(PosttrainError, match=r"stages\.back, file .*said\.jsonl, row 1: 'id' is text 't0'.*1 bad rows in all"):
        annotations.run(section)
    said.write_text("")
    with pytest.raises(PosttrainError, match="no pair from 0 rows"):
        annotations.run(section)
