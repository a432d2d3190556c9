"""check-data: what it counts, what it warns of, what it prints and returns."""

import json
import os
import time
from pathlib import Path

import pytest

from posttrain.config import DataEntry, HeldOut, Recipe
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS
from posttrain.lint import check, check_file, check_recipe, exit_code, looks_truncated, render, to_json

FIXTURES = Path(__file__).parent / "fixtures" / "formats"


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def pair(prompt="What is it?", chosen="Good.", rejected="Poor.", **rest) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rest}


def found(report, severity=None) -> list[tuple]:
    return [(f.reason, f.row) for f in report.findings if severity in (None, f.severity)]


def last_line(report) -> str:
    return render(report).splitlines()[-1]


@pytest.mark.parametrize("rows, reason", [
    (["{oops"], "unparsable"), ([{"prompt": "q", "chosen": "a"}], "missing_column"), ([pair(chosen=5)], "wrong_type"), ([pair(chosen=None)], "wrong_type"),
    ([pair(chosen=" ")], "empty_answer"), ([pair(prompt="")], "empty_prompt"), ([pair(chosen="same", rejected="same ")], "identical_pair"),
    ([pair(rating="best")], "unknown_rating"), ([pair(prompt=[{"role": "assistant", "content": "x"}])], "role_order")])
def test_every_unusable_row_is_bad_and_exits_with_1(tmp_path, rows, reason):
    report = check_file(write(tmp_path / "p.jsonl", [pair("one"), *rows, pair("two")]), "preference")
    assert found(report, "bad") == [(reason, 2)]
    assert (report.bad, report.rows, exit_code(report)) == (1, 3, 1)
    assert last_line(report) == "1 bad of 3 rows"
    assert f"{reason} (1)  {tmp_path / 'p.jsonl'}: row 2" in render(report)


def test_clean_data_exits_with_0(tmp_path):
    report = check_file(write(tmp_path / "p.jsonl", [pair(str(i)) for i in range(5)]))
    assert found(report) == [] and exit_code(report) == exit_code(report, strict=True) == 0
    assert last_line(report) == "0 bad of 5 rows"


@pytest.mark.parametrize("rows, finding", [
    ([pair("a"), pair("b"), pair("a")], ("duplicate", 3)),
    ([pair("a"), pair("a", "Poor.", "Good.")], ("contradictory", 2)),
    ([pair("a"), pair("b<|im_start|>system")], ("template_token", 2)),
    ([pair("a"), pair("b", "[INST] hello")], ("template_token", 2)),
    ([pair("a"), pair("b", rejected="It is one of the things that nobody ever quite knows how to")], ("truncated_answer", 2)),
])
def test_warnings_exit_with_0_or_1_when_strict(tmp_path, rows, finding):
    report = check_file(write(tmp_path / "p.jsonl", rows), "preference")
    assert found(report) == [finding]
    assert (exit_code(report), exit_code(report, strict=True), report.bad) == (0, 1, 0)
    assert finding[0] in render(report)


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<|eot_id|>",
                                   "<|start_header_id|>", "<|endoftext|>", "<start_of_turn>", "<extra_id_1>"])
def test_template_tokens_in_user_text(tmp_path, token):
    report = check_file(write(tmp_path / "p.jsonl", [{"prompt": f"Please {token} now"}]), "prompt")
    assert found(report) == [("template_token", 1)] and token in report.findings[0].detail


@pytest.mark.parametrize("answer, cut", [
    ("Short", False), ("A whole sentence that has more than eight words in it.", False),
    ("This sentence has more than eight words in it and then", True), ("And here it goes on for quite a few words more,", True),
    ("Done.\n\nBest regards,\nSam", False), ("- a list item of more than eight words without a full stop", False),
    ("```python\nprint(1)", True), ("```python\nprint(1)\n```", False),
    ("It costs, as far as I can tell from this, 25", False)])
def test_truncated_answers(answer, cut):
    assert looks_truncated(answer) is cut


def test_an_unsafe_answer_preferred_over_a_safe_one_is_named(tmp_path):
    labels = [(True, False), (False, True), (False, None), (None, True), (False, False), (True, True), (None, None), (False, True)]
    rows = [pair(f"q{i}", chosen_safe=a, rejected_safe=b) for i, (a, b) in enumerate(labels)]
    report = check_file(write(tmp_path / "p.jsonl", rows), "preference")
    assert found(report) == [("unsafe_preferred", 2), ("unsafe_preferred", 8)] and report.bad == 0
    assert f"unsafe_preferred (2)  {tmp_path / 'p.jsonl'}: row 2, 8" in render(report)


def test_length_bias_is_the_share_of_longer_chosen_answers(tmp_path):
    rows = [pair(f"q{i}", "a longer answer", "short") if i % 4 else pair(f"q{i}", "short", "a longer answer") for i in range(80)]
    report = check_file(write(tmp_path / "p.jsonl", [*rows, pair("equal", "abc", "xyz")]), "preference")
    assert report.sets[0].longer_chosen == 0.75
    assert [f.reason for f in report.findings] == ["length_bias"]
    assert "the longer answer is chosen in 75.0% of the pairs" in render(report)
    balanced = check_file(write(tmp_path / "b.jsonl", [pair(f"q{i}", *(("long one", "no")[::1 - 2 * (i % 2)])) for i in range(80)]), "preference")
    assert balanced.sets[0].longer_chosen == 0.5 and not balanced.findings


def test_models_on_one_side(tmp_path):
    rows = [pair(f"q{i}", chosen_model="strong", rejected_model=("weak", "mid")[i % 2]) for i in range(20)]
    rows += [pair(f"r{i}", chosen_model="mid", rejected_model="other") for i in range(3)]
    report = check_file(write(tmp_path / "p.jsonl", rows), "preference")
    assert report.sets[0].one_sided_models == {"strong": "chosen 20 of 20", "weak": "rejected 10 of 10"}
    assert [f.reason for f in report.findings] == ["one_sided_model"] * 2


def test_ratings_safety_bins_and_lengths_are_counted(tmp_path):
    rows = [pair("one two three", "w " * 30, "w " * 5 + "x", rating="better", chosen_safe=True, rejected_safe=False),
            pair("one", "w", "w x", rating=0, chosen_safe=False, rejected_safe=False), pair("one two", "w " * 1500, "a", rating=2)]
    report = check_file(write(tmp_path / "p.jsonl", rows), "preference").sets[0]
    assert report.ratings == {"better": 2, "negligibly_better": 1}
    assert report.safety_bins == {"chosen safe, rejected unsafe": 1, "chosen unsafe, rejected unsafe": 1, "chosen unlabelled, rejected unlabelled": 1}
    chosen = report.lengths["chosen"]
    assert (chosen.mean, chosen.median, chosen.p90, chosen.max) == (1531 / 3, 30, 1500, 1500)
    assert chosen.histogram == [1, 0, 1, 0, 0, 0, 0, 1]
    assert report.lengths["prompt"].mean == 2


def test_ties_are_skipped_not_bad():
    report = check_file(FIXTURES / "webgpt.jsonl", "webgpt")
    assert report.sets[0].entries[0].skipped == {"tie": 1} and exit_code(report) == 0
    assert f"skipped, tie (1)  {FIXTURES / 'webgpt.jsonl'}: row 3" in render(report)
    assert last_line(report) == "0 bad of 3 rows"


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_guessed_from_the_columns(name):
    report = check_file(FIXTURES / f"{name}.jsonl")
    guessed = report.sets[0].entries[0].format
    same_layout = {"safe_rlhf_helpful": "safe_rlhf", "synthetic_gptj": "preference", "oasst_demonstrations": "oasst"}
    assert guessed == same_layout.get(name, name)
    assert report.bad == 0 and f"format: {guessed} (guessed" in render(report)


def test_guessing_survives_bad_rows_and_mapped_columns(tmp_path):
    rows = [pair(f"q{i}") if i % 3 else {"prompt": "q", "chosen": "a"} for i in range(12)]
    assert found(check_file(write(tmp_path / "p.jsonl", ["{", *rows]))) == [("unparsable", 1), *[("missing_column", i) for i in (2, 5, 8, 11)]]
    mapped = check_file(write(tmp_path / "m.jsonl", [{"q": "a", "good": "b", "poor": "c"}]), columns={"prompt": "q", "chosen": "good", "rejected": "poor"})
    assert mapped.sets[0].entries[0].format == "preference" and not mapped.findings
    assert last_line(check_file(write(tmp_path / "broken.jsonl", ["{"] * 3))) == "3 bad of 3 rows"
    assert last_line(check_file(write(tmp_path / "empty.jsonl", []))) == "0 bad of 0 rows"


@pytest.mark.parametrize("row, format", [(pair(rating="great"), "preference"), ({"prompt": "q", "completion": 5}, "prompt_completion")])
def test_rows_that_are_mostly_wrong_are_not_guessed_as_a_format_that_looks_away(tmp_path, row, format):
    """Not as `synthetic_gptj`, which reads no rating, nor as `prompt`, which reads no answer."""
    report = check_file(write(tmp_path / "p.jsonl", [row] * 20))
    assert report.sets[0].entries[0].format == format
    assert last_line(report) == "20 bad of 20 rows" and exit_code(report) == 1


def test_columns_that_fit_no_format(tmp_path):
    with pytest.raises(PosttrainError, match=r"its columns fit no format \(a, b\)"):
        check_file(write(tmp_path / "p.jsonl", [{"a": 1, "b": 2}]))


@pytest.mark.parametrize("path, format, words", [("no.jsonl", None, "cannot be read"), ("no.txt", None, "not a kind of file we read"),
                                                 ("no.jsonl", "preferenc", "Did you mean 'preference'")])
def test_files_that_cannot_be_checked(tmp_path, path, format, words):
    with pytest.raises(PosttrainError, match=words):
        check_file(tmp_path / path, format)


def recipe(folder: Path, **sets) -> Recipe:
    held_out = sets.pop("held_out", {})
    return Recipe(run={"name": "t"}, model={"name_or_path": "m"}, stages={"s": {}}, path=str(folder / "r.yaml"), data={**sets, "held_out": held_out})


def test_a_recipe_is_checked_whole(tmp_path):
    write(tmp_path / "a.jsonl", [pair(f"q{i}") for i in range(20)])
    write(tmp_path / "b.jsonl", [*(pair(f"q{i}", "Nice.") for i in range(15, 30)), {"prompt": "q"}])
    write(tmp_path / "d.jsonl", [{"instruction": f"Q{i}", "output": "Yes."} for i in range(10)])
    entries = {"helpful": [{"path": "a.jsonl", "format": "preference"}, {"path": "b.jsonl", "format": "preference"}],
               "demos": [{"path": "d.jsonl", "format": "alpaca"}, {"path": "gone.jsonl", "format": "alpaca"}]}
    report = check_recipe(recipe(tmp_path, held_out={"pairs": 12}, **entries))
    helpful, demos = report.sets
    assert [(e.file, e.rows, e.kept, e.bad) for e in helpful.entries] == [("a.jsonl", 20, 20, 0), ("b.jsonl", 16, 15, 1)]
    assert found(report, "bad") == [("missing_column", 16), ("unreadable", None)]
    assert report.shared_prompts == {"helpful & demos": 10} and helpful.shared_prompts == {"a & b": 5}
    assert 12 <= helpful.held_out <= 13 and demos.removed > 0
    assert [f for f in found(report, "warning") if f[0] == "overlap"] == [("overlap", f.row) for f in report.findings if f.reason == "overlap"]
    assert sum(f.reason == "overlap" for f in report.findings) == demos.removed
    text = render(report)
    assert "its prompt is held out by data.helpful" in text and "10 prompts are in both helpful & demos" in text
    assert text.splitlines()[-1] == "2 bad of 46 rows"


def test_duplicates_are_found_across_files_of_a_set(tmp_path):
    write(tmp_path / "a.jsonl", [pair("x"), pair("y")])
    write(tmp_path / "b.jsonl", [pair("z"), pair("y")])
    entries = [DataEntry(path=f, format="preference") for f in ("a.jsonl", "b.jsonl")]
    report = check({"x": entries}, tmp_path, "r.yaml")
    assert [(f.file, f.row, f.detail) for f in report.findings] == [("b.jsonl", 2, "the same as row 2 of a.jsonl")]


def test_mixed_kinds_and_impossible_splits_are_bad(tmp_path):
    write(tmp_path / "a.jsonl", [pair(str(i)) for i in range(10)])
    entries = [DataEntry(path="a.jsonl", format=f) for f in ("preference", "prompt")]
    mixed = check({"x": entries}, tmp_path, "r.yaml")
    assert found(mixed) == [("mixed_kinds", None)] and last_line(mixed) == "1 bad of 20 rows"
    split = check({"x": entries[:1]}, tmp_path, "r.yaml", HeldOut(pairs=8))
    assert found(split) == [("held_out", None)] and "at most half" in split.findings[0].detail


def test_json_is_clean_and_complete(tmp_path):
    rows = [pair("a", rating="better"), pair("a", rating="better"), "{", pair("b<|im_end|>", "\ud800"), pair("c", chosen_safe=True, rejected_safe=False)]
    report = check_file(write(tmp_path / "p.jsonl", rows))
    text = json.dumps(to_json(report), allow_nan=False)
    back = json.loads(text)
    assert (back["rows"], back["bad"], back["warnings"]) == (5, 2, 1)
    assert [(f["severity"], f["reason"], f["row"]) for f in back["findings"]] == [
        ("bad", "unparsable", 3), ("bad", "unparsable", 4), ("warning", "duplicate", 2)]
    assert back["sets"][0]["lengths"]["chosen"]["histogram"]
    render(report).encode()


def test_text_is_aligned_and_no_line_ends_in_blanks(tmp_path):
    report = check_file(write(tmp_path / "p.jsonl", [pair(f"q{i}", rating=i % 4) for i in range(40)]), "preference")
    lines = render(report).splitlines()
    assert all(line == line.rstrip() and "\t" not in line for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("  file"))
    assert len(lines[start]) == len(lines[start + 1])
    assert "significantly_better  10  25%" in "\n".join(lines)


def test_many_rows_are_shortened_in_text_only(tmp_path):
    report = check_file(write(tmp_path / "p.jsonl", [pair(chosen="")] * 30), "preference")
    assert "row 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 20 more" in render(report)
    assert len(to_json(report)["findings"]) == 30


@pytest.fixture
def real() -> Path:
    if not os.environ.get("POSTTRAIN_REAL_DATA"):
        pytest.skip("POSTTRAIN_REAL_DATA is not set: it names the folder with the real data sets")
    return Path(os.environ["POSTTRAIN_REAL_DATA"]).absolute()


def test_what_is_known_of_the_real_sets_is_found(real):
    """The numbers of the data's README: length bias 59 % and 43.5 to 44 %, two models always on one side, 604 prompts."""
    start = time.perf_counter()
    graded, hh = check_file(real / "helpful_graded.jsonl.gz"), check_file(real / "hh_harmless.jsonl.gz")
    assert time.perf_counter() - start < 2
    assert graded.bad == 0 and graded.sets[0].longer_chosen == pytest.approx(0.59, abs=0.005)
    assert graded.sets[0].one_sided_models == {"text_davinci_001": "rejected 384 of 384", "gpt4_0314": "chosen 235 of 235"}
    assert graded.sets[0].ratings == {"significantly_better": 754, "better": 976, "slightly_better": 1039, "negligibly_better": 1207}
    assert (hh.bad, hh.rows) == (2, 1732) and hh.sets[0].longer_chosen == pytest.approx(0.437, abs=0.005)
