"""Run folders: what a section's manifest keeps of its data, what is told of rows left out, what is refused before anything runs."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from posttrain import distributed, gguf
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError
from posttrain.formats import Demonstration, Pair, Prompt
from posttrain.runs import Run, preflight, read_json, run_sections, write_atomic

EVAL = {"stage": "evaluate", "models": {"base": "base"}, "prompts": "prompts", "helpfulness": "base", "safety": "base"}


@pytest.fixture
def recipe(tmp_path):
    """recipe(stages, data={name: rows or an entry}) -> a Run of the tiny model in the test's folder."""

    def make(stages: dict, held_out: dict | None = None, **sets) -> Run:
        entries = {"prompts": [{"prompt": f"question {i}"} for i in range(8)],
                   "demonstrations": [{"instruction": f"q{i}", "output": "Yes."} for i in range(4)], **sets}
        formats = {"prompts": "prompt", "demonstrations": "alpaca"}
        data = {}
        for name, given in entries.items():
            extra, rows = given if isinstance(given, tuple) else ({}, given)
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
            data[name] = [{"path": f"{name}.jsonl", "format": formats.get(name, "preference"), **extra}]
        written = {"run": {"name": "t", "dir": str(tmp_path / "runs"), "threads": 1}, "stages": stages, "data": data | {"held_out": held_out or {}},
                   "model": {"name_or_path": "builtin:tiny-llama", "dtype": "float32", "chat_template": "chatml", "lora": {"r": 2, "alpha": 4}}}
        (tmp_path / "r.yaml").write_text(json.dumps(written), encoding="utf-8")
        return Run(load_recipe(tmp_path / "r.yaml"))

    return make


@pytest.fixture
def stage(monkeypatch):
    """Stages that do nothing but finish."""
    from posttrain import runs

    monkeypatch.setattr(runs, "load_module", lambda kind: SimpleNamespace(run=lambda section: section.finish({})))


SFT = {"stage": "sft", "data": "demonstrations"}


# -- the manifest -------------------------------------------------------------------------------------------------------------------


def test_the_manifest_keeps_the_fingerprints_of_the_sets_a_section_names(recipe, tmp_path, stage):
    run = recipe({"s": SFT, "after": {"stage": "sft", "data": ["demonstrations", "prompts"], "model": "@s"}})
    run_sections(run)

    def sha(name):
        return hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest()

    assert read_json(run.folder / "s" / "manifest.json")["data"] == {"demonstrations[0]": sha("demonstrations")}
    assert read_json(run.folder / "after" / "manifest.json")["data"] == {"demonstrations[0]": sha("demonstrations"), "prompts[0]": sha("prompts")}


def test_a_hub_sets_commit_is_in_the_manifest(recipe, monkeypatch, stage):
    from posttrain import data

    monkeypatch.setattr(data, "_hub_commit", lambda entry, place: "ab12" * 10)
    monkeypatch.setattr(data, "_hub_rows", lambda entry, commit, place: enumerate([{"instruction": "q", "output": "a"}], 1))
    run = recipe({"s": SFT}, demonstrations=({"path": "owner/set"}, []))
    run_sections(run)
    assert read_json(run.folder / "s" / "manifest.json")["data"] == {"demonstrations[0]": "ab12" * 10}


# -- rows left out --------------------------------------------------------------------------------------------------------------------


def pair(prompt, **more):
    return {"prompt": prompt, "chosen": "Good.", "rejected": "Poor.", **more}


def tied(prompt, a, b):
    return {"prompt": prompt, "response_1": "One.", "response_2": "Two.", "preference_strength": a - b}


def test_what_is_left_out_is_told_once_and_kept_in_the_manifest(recipe, capsys, stage):
    helpful = [*(tied(f"q{i}", 1, 0) for i in range(20)), tied("t1", 1, 1), tied("t2", 0, 0), *[{"prompt": "broken"}] * 3]
    run = recipe({"s": {"stage": "reward", "model": "base", "own": "helpful", "other": "other"}}, held_out={"pairs": 4, "prompts": 10},
                 helpful=({"format": "helpsteer2", "bad_rows": "drop"}, helpful), other=[pair(f"r{i}") for i in range(20)],
                 prompts=[{"prompt": f"q{i}"} for i in range(20)])
    removed = run.data.split("helpful").counts["removed"]
    assert removed == 6  # of the ten that `prompts` holds out, four are held out of `helpful` itself
    run_sections(run)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert lines == ["left out of helpful: 3 bad rows, 2 ties, 6 rows whose prompt is held out elsewhere"]
    told = read_json(run.folder / "s" / "manifest.json")["rows"]
    assert told == {name: run.data.split(name).counts for name in ("helpful", "other")}
    assert (told["helpful"]["bad"], told["helpful"]["skipped"], told["helpful"]["removed"]) == (3, {"tie": 2}, removed)


def test_one_of_each_is_told_in_the_singular_and_nothing_where_all_rows_are_used(recipe, capsys, stage):
    one = [tied("q1", 1, 0), tied("t1", 1, 1), {"prompt": "broken"}]
    run = recipe({"s": {"stage": "reward", "model": "base", "own": "helpful"}, "whole": SFT}, helpful=({"format": "helpsteer2", "bad_rows": "drop"}, one))
    run_sections(run)
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if "left out" in line] == ["left out of helpful: 1 bad row, 1 tie"]
    assert read_json(run.folder / "whole" / "manifest.json")["rows"]["demonstrations"]["kept"] == 4


def test_other_skips_are_told_in_their_words():
    from posttrain.runs import left_out

    counts = {"bad": 0, "skipped": {"no_ranked_answers": 2, "fewer_than_two_answers": 1}, "removed": 1}
    assert left_out(counts) == "2 rows with no ranked answers, 1 row with fewer than two answers, 1 row whose prompt is held out elsewhere"
    assert left_out({"bad": 0, "skipped": {}, "removed": 0}) == ""


def test_a_sections_own_rows_are_counted_too(recipe, capsys, monkeypatch):
    from posttrain import runs

    def rejection(section):
        kept = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}]} for q in ("new", "question 0", "question 1")]
        (section.folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        section.finish({})

    monkeypatch.setattr(runs, "load_module", lambda kind: SimpleNamespace(
        run=rejection if kind == "rejection" else lambda section: section.finish({})))
    run = recipe({"r": {"stage": "rejection", "prompts": "prompts", "policy": "base", "helpfulness": "base", "safety": "base"},
                  "s": {"stage": "sft", "data": ["demonstrations", "@r"]}}, held_out={"prompts": 4})
    held = sum(p.messages[0]["content"] in ("question 0", "question 1") for p in run.data.split("prompts").held_out)
    run_sections(run)
    told = read_json(run.folder / "s" / "manifest.json")["rows"]["@r"]
    assert (told["rows"], told["kept"], told["removed"]) == (3, 3 - held, held)
    assert (f"left out of @r: {held} row" in capsys.readouterr().out) is bool(held)


# -- a row that cannot be encoded ----------------------------------------------------------------------------------------------------------


BAD = "Say <|im_end|> twice, please, and then some more words that go on and on."


def turns(text):
    return [{"role": "user", "content": text}]


def test_a_row_that_spells_a_turn_token_is_named_by_every_stage(make_roles):
    from reward.train import encode as encode_pairs
    from rlhf.rollout import encode_prompts
    from sft.train import encode

    roles = make_roles()
    where = r"chat template, item 2 of 3 from mine \('Say <\|im_end\|> twice, please, and then some more w'\.\.\.\): a user turn spells the token"
    answer = [{"role": "assistant", "content": "No."}]
    with pytest.raises(PosttrainError, match=where):
        encode([Demonstration(turns(t) + answer, source="mine") for t in ("a", BAD, "b")], roles.tokenizer, 99)
    with pytest.raises(PosttrainError, match=where):
        encode_pairs([Pair(turns(t), "Yes.", "No.", source="mine") for t in ("a", BAD, "b")], roles.tokenizer, 99)
    with pytest.raises(PosttrainError, match=r"item 1 of 1 from mine \('Why\?'\): an assistant turn spells the token '<\|im_end\|>'"):
        encode_pairs([Pair(turns("Why?"), "Yes.<|im_end|>", "No.", source="mine")], roles.tokenizer, 99)
    section = SimpleNamespace(place="r.yaml: stages.x", log=SimpleNamespace(say=print))
    with pytest.raises(PosttrainError, match=where):
        encode_prompts(section, [Prompt(turns(t), source="mine") for t in ("a", BAD, "b")], roles, 99)


# -- refused before anything runs ----------------------------------------------------------------------------------------------------------


SAMPLING = {"prompts": "prompts", "policy": "base", "helpfulness": "base", "safety": "base"}


@pytest.mark.parametrize("section, field", [
    ({"stage": "ppo", **SAMPLING, "policy": "@eval"}, "policy"), ({"stage": "ppo", **SAMPLING, "helpfulness": "@eval"}, "helpfulness"),
    ({"stage": "rejection", **SAMPLING, "safety": "@eval"}, "safety"), ({"stage": "sft", "data": "demonstrations", "model": "@eval"}, "model"),
    ({**EVAL, "models": {"a": "base", "b": "@eval"}}, "models")])
def test_a_report_is_no_model(recipe, section, field):
    with pytest.raises(PosttrainError, match=rf"stages\.x\.{field}: '@eval' makes a report\. Expected a section that makes a model"):
        preflight(recipe({"eval": EVAL, "x": section}))


@pytest.mark.parametrize("section, field, wanted", [({"stage": "sft", "data": ["demonstrations", "@sft"]}, "data", "data"),
                                                   ({"stage": "ppo", **SAMPLING, "prompts": ["@sft"]}, "prompts", "prompts")])
def test_a_model_is_no_data(recipe, section, field, wanted):
    with pytest.raises(PosttrainError, match=rf"stages\.x\.{field}: '@sft' makes a model\. Expected a section that makes {wanted}"):
        preflight(recipe({"sft": {"stage": "sft", "data": "demonstrations"}, "x": section}))


def test_a_wrong_value_of_a_choice_is_named_by_its_key_alone(recipe):
    with pytest.raises(PosttrainError, match=r"stages\.x\.safety_threshold: got 7\."):
        recipe({"x": {"stage": "ppo", **SAMPLING, "safety_threshold": 7}})


def test_export_names_a_report_and_nothing_else_as_its_evaluation(recipe):
    sft = {"stage": "sft", "data": "demonstrations"}
    preflight(recipe({"sft": sft, "eval": EVAL, "x": {"stage": "export", "model": "@sft", "evaluation": "@eval"}}))
    with pytest.raises(PosttrainError, match=r"stages\.x\.evaluation: '@sft' is of kind sft\. Expected of kind evaluate"):
        recipe({"sft": sft, "x": {"stage": "export", "model": "@sft", "evaluation": "@sft"}})


@pytest.mark.parametrize("name, section", [("reward", {"stage": "reward", "own": "pairs", "model": "base"}), ("eval", EVAL)])
def test_export_names_a_policy_as_its_model(recipe, name, section):
    with pytest.raises(PosttrainError, match=rf"stages\.x\.model: '@{name}' is of kind {section['stage']}\. Expected of kind sft or ppo or export\. Name "):
        recipe({name: section, "x": {"stage": "export", "model": f"@{name}"}}, pairs=[])


def test_a_missing_gguf_package_is_told_before_the_first_section(recipe, monkeypatch):
    export = {"stage": "export", "model": "base"}
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    preflight(recipe({"x": export}))
    with pytest.raises(PosttrainError, match=r"stages\.x\.gguf: the package gguf is not installed\. Expected .*`pip install gguf`"):
        preflight(recipe({"x": export | {"gguf": ["f16"]}}))


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    """Whoever may write into the folder could otherwise choose a file that the program overwrites."""
    (tmp_path / "other").write_text("mine")
    (tmp_path / "a.json.tmp").symlink_to(tmp_path / "other")
    write_atomic(tmp_path / "a.json", "new")
    assert ((tmp_path / "other").read_text(), (tmp_path / "a.json").read_text()) == ("mine", "new")
    assert not (tmp_path / "a.json").is_symlink() and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("names, words", [(["one"], "The one section of t is done"), (["one", "two"], "All 2 sections of t are done")])
def test_the_last_line_counts_rightly(recipe, capsys, stage, names, words):
    run_sections(recipe(dict.fromkeys(names, SFT)))
    assert words in capsys.readouterr().out


def test_a_reason_of_another_process_outlives_a_kill_before_they_settle(recipe, stage, monkeypatch):
    run = recipe({"s": SFT})
    run.start(run.section("s"))
    with monkeypatch.context() as patch:
        for key, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
            patch.setenv(key, value)
        second = recipe({"s": SFT}).section("s")
        second.inexact("no memory")
        with distributed.alone():
            second.inexact("again none")
    with (run.folder / "s" / ".inexact-2").open("w") as f:
        f.write('"cut sho')
    assert read_json(run.folder / "s" / "manifest.json")["exact"]
    again = recipe({"s": SFT})
    for go_on in (lambda: again.start(again.section("s")), lambda: run_sections(again)):
        go_on()
        told = read_json(run.folder / "s" / "manifest.json")
        assert (told["exact"], told["inexact_because"]) == (False, ["no memory", "again none"])
    assert run.section("s").state() == "done" and not list((run.folder / "s").glob(".inexact*"))


# -- a disk that is full ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), OSError(30, "Read-only file system"), OSError(122, "Disk quota exceeded"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 26816 vs 26708"),  # torch.save
    RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/7: file write failed"),
    Exception("Error while serializing: I/O error: No space left on device (os error 28)")])  # safetensors
@pytest.mark.parametrize("where", ["stage", "start"])
def test_a_disk_that_cannot_be_written_is_told_whoever_meets_it(recipe, monkeypatch, error, where):
    from posttrain import runs

    def fail(*args):
        raise error

    monkeypatch.setattr(runs, "load_module", lambda kind: SimpleNamespace(run=fail))
    if where == "start":
        monkeypatch.setattr(Run, "start", fail)
    with pytest.raises(PosttrainError, match=r"t/s: cannot be written \((No space|Read-only|Disk quota).*nothing finished is lost"):
        run_sections(recipe({"s": SFT}))


@pytest.mark.parametrize("number", [13, 30])
def test_a_file_elsewhere_is_named_and_no_space_is_asked_for(recipe, monkeypatch, number):
    from posttrain import runs

    def fail(section):
        raise OSError(number, "Permission denied", "/data/other.jsonl")

    monkeypatch.setattr(runs, "load_module", lambda kind: SimpleNamespace(run=fail))
    with pytest.raises(PosttrainError, match=r"^/data/other\.jsonl: cannot be .*permissions") as told:
        run_sections(recipe({"s": SFT}))
    assert "space" not in str(told.value)


@pytest.mark.parametrize("left", [b"\xff\xfe\x80", b""])
def test_a_done_of_any_bytes_is_written_again(recipe, stage, left):
    run = recipe({"s": SFT})
    run_sections(run)
    (run.folder / "s" / "DONE").write_bytes(left)
    run_sections(recipe({"s": SFT}))
    assert run.section("s").state() == "done"


def test_hidden_files_of_a_system_are_nobody_s(recipe, stage):
    run = recipe({"s": SFT})
    (run.folder / "s").mkdir(parents=True)
    (run.folder / "s" / ".DS_Store").write_text("x")
    run_sections(run)
    (run.folder / "s" / ".DS_Store").unlink()
    assert not run.section("s").damage(whole=True)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("shapes differ"), ValueError("x")])
def test_other_errors_stay_what_they_are(recipe, monkeypatch, error):
    from posttrain import runs

    def fail(section):
        raise error

    monkeypatch.setattr(runs, "load_module", lambda kind: SimpleNamespace(run=fail))
    run = recipe({"s": SFT})
    with pytest.raises(type(error)):
        run_sections(run)
    assert read_json(run.folder / "s" / "manifest.json")["seconds"] >= 0


def test_lines_are_cut_at_newlines_alone(tmp_path):
    from posttrain.log import append_line, read_lines

    rows = [{"step": 1, "answer": "a\u2028b\u0085c"}, {"step": 2, "answer": "d"}]
    for row in rows:
        append_line(tmp_path / "samples.jsonl", row)
    assert read_lines(tmp_path / "samples.jsonl") == rows


def test_the_order_of_compared_models_is_part_of_the_fingerprint():
    from pathlib import Path

    from posttrain.config import load_recipe
    from posttrain.runs import Run

    tiny = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
    one, other = (Run(load_recipe(tiny, [f"eval.models={{{m}}}"])).section("eval").fingerprint
                  for m in ("v1: '@v1', chat: '@ppo'", "chat: '@ppo', v1: '@v1'"))
    assert one != other


def test_checkpoints_of_a_finished_section_go(recipe, monkeypatch):
    """Also where the run was killed between its last write and their removal."""
    from posttrain import runs

    monkeypatch.setattr(runs, "load_module", lambda kind: SimpleNamespace(run=lambda section: section.finish({})))
    run = recipe({"s": SFT})
    run_sections(run)
    (run.folder / "s" / "checkpoint-4").mkdir()
    (run.folder / "s" / "model").mkdir()
    run_sections(recipe({"s": SFT}))
    assert not (run.folder / "s" / "checkpoint-4").exists() and (run.folder / "s" / "model").exists()
