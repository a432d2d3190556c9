"""Reading files and splitting: located findings, deterministic samples, and held-out rows that training never sees."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import data
from posttrain.config import DataEntry, Recipe
from posttrain.data import DataSets, fingerprint_entry, load_entry, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS, Pair, Prompt

FIXTURES = Path(__file__).parent / "fixtures" / "formats"


def load(path: Path, format: str, **entry):
    return load_entry(DataEntry(path=path.name, format=format, **entry), path.parent, 0, "r.yaml: data.x[0]")


def write(path: Path, rows: list) -> Path:
    """Rows as JSON lines; a str or bytes element is written as it is."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def pairs(n: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(start, start + n)]


def recipe(folder: Path, seed: int = 0, held_out: dict | None = None, **sets) -> Recipe:
    return Recipe(run={"name": "t", "seed": seed}, model={"name_or_path": "m"}, stages={"s": {}}, path=str(folder / "r.yaml"),
                  data={**sets, **({"held_out": held_out} if held_out else {})})


# -- files ---------------------------------------------------------------------------------------------------------------------------


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


ROWS = [{"prompt": "Wie spät\nist es?", "chosen": 'He said "noon", \u2028 twice', "rejected": "12, oder 13", "rating": 2},
        {"prompt": "你好", "chosen": "[1, 2]", "rejected": "{}", "rating": 0}]
WRITERS = {
    "a.jsonl": lambda: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode(),
    "crlf.jsonl": lambda: "".join(json.dumps(r) + "\r\n\r\n" for r in ROWS).encode(),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode(),
    "utf16.jsonl": lambda: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode("utf-16"),
    "array.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "object.json": lambda: json.dumps({"version": 1, "data": ROWS}).encode(),
    "lines.json": lambda: "".join(json.dumps(r) + "\n" for r in ROWS).encode(),
    "a.csv": lambda: as_csv(ROWS),
    "bom.csv": lambda: b"\xef\xbb\xbf" + as_csv(ROWS),
    "a.parquet": lambda: as_parquet(ROWS),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_items(tmp_path, name, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(WRITERS[name]()) if packed else WRITERS[name]())
    loaded = load(path, "preference")
    source = name.rsplit(".", 1)[0]
    assert loaded.items == [Pair([{"role": "user", "content": r["prompt"]}], r["chosen"], r["rejected"], r["rating"], source=source) for r in ROWS]
    assert (loaded.rows, loaded.findings, loaded.kind) == (2, [], "pair")
    assert loaded.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest() == fingerprint_entry(DataEntry(path=str(path), format="hh"), tmp_path)


def test_messages_in_csv_cells_are_json(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = tmp_path / "a.csv"
    path.write_bytes(as_csv([{"messages": json.dumps(turns), "loss": "last"}]))
    item = load(path, "messages").items[0]
    assert (item.messages, item.loss) == (turns, "last")


GOOD = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}).encode()


@pytest.mark.parametrize("name, content, findings", [
    ("a.jsonl", GOOD + b"\n{broken\n\n" + GOOD + b"\n[1]\nnull\n", [(2, "unparsable"), (5, "wrong_type"), (6, "wrong_type")]),
    ("a.jsonl", GOOD + b"\n" + '{"prompt": "caf\xe9"}'.encode("latin-1") + b"\n" + GOOD, [(2, "unparsable")]),
    ("a.jsonl", b"[" * 10**5 + b"\n" + b'{"prompt": ' + b"9" * 5000 + b"}\n" + GOOD, [(1, "unparsable"), (2, "unparsable")]),
    ("a.jsonl", GOOD.decode().encode("utf-16-le") + b"\n" + GOOD, [(1, "unparsable")]),
    ("a.jsonl", b"\xff\xfe" + GOOD.decode().encode("utf-16-le") + b"\x00", [(None, "unparsable")]),
    ("a.jsonl", b"\x00\x01\x02\xff\xfe\n" * 3, [(1, "unparsable"), (2, "unparsable"), (3, "unparsable")]),
    ("a.json", b"[" + GOOD + b",\n" + GOOD + b",\n{broken}," + GOOD + b"]", [(3, "unparsable")]),
    ("a.json", b"[" + GOOD, [(2, "unparsable")]),
    ("a.json", b"[" + GOOD + b"][" + GOOD + b"]", [(None, "unparsable")]),
    ("a.json", b"[" + GOOD + b', 5, "x", ' + b"[" * 10**5, [(2, "wrong_type"), (3, "wrong_type"), (4, "unparsable")]),
    ("a.json", b"hello\n" + GOOD, [(1, "unparsable")]),
    ("a.json", b'"hello"', [(1, "wrong_type")]),
    ("a.csv", b"prompt,chosen,rejected\nq,a,b\nq,a\nq,a,b,c\n\nq,x,y\n", [(2, "unparsable"), (3, "unparsable")]),
    ("a.csv", b'prompt,chosen,rejected\nq,"a"x,b\nq,a,b\nq,"a,b\n', [(1, "unparsable"), (3, "unparsable")]),
    ("a.csv", b"prompt,chosen,rejected\nq,a,caf\xe9\nq,a,b\n", [(1, "unparsable")]),
    ("a.csv", b"prompt,chosen,rejected\nq," + b"a" * 10**6 + b",\nq,a,b\n", [(1, "empty_answer")]),
    ("a.csv", b'"prompt,chosen\n', [(None, "unparsable")]),
    ("a.parquet", b"PAR1 no parquet at all", [(None, "unparsable")]),
    ("a.parquet", b"", [(None, "unparsable")]),
    ("a.jsonl.gz", b"not gzip", [(None, "unparsable")]),
    ("a.jsonl.gz", gzip.compress(GOOD + b"\n" + os.urandom(10**5).hex().encode())[:-9000], [(2, "unparsable"), (None, "unparsable")]),
])
def test_damage_is_found_where_it_is(tmp_path, name, content, findings):
    path = tmp_path / name
    path.write_bytes(content)
    loaded = load(path, "preference")
    assert [(f.row, f.reason) for f in loaded.findings] == findings
    assert all(f.severity == "bad" and f.file == name and f.detail for f in loaded.findings)
    assert all(item.prompt[0]["content"] == "q" for item in loaded.items)
    named = sum(f.row is not None for f in loaded.findings)
    assert loaded.rows == len(loaded.items) + named


def test_text_that_is_not_utf8_is_found_in_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xe9q")])
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "a.parquet")
    loaded = load(tmp_path / "a.parquet", "prompt")
    assert [(f.row, f.reason) for f in loaded.findings] == [(1, "unparsable")] and len(loaded.items) == 1


# -- malformed rows, every format ----------------------------------------------------------------------------------------------------

JUNK = {"null": None, "number": 7, "empty": "", "blank": " \n\t", "list": [[]], "object": {"a": {"b": [None, {}]}}, "flag": True, "surrogate": "\ud83d",
        "nested": json.loads("[" * 400 + "]" * 400), "huge": {"x": "y" * 200_000}}
NUMERIC = {"labels", "choice", "preference_strength", "overall_preference", "score_0", "score_1", "score_chosen", "score_rejected",
           "better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe"}


def malformed() -> list:
    """(format, what, good row, bad row): every needed column of every format, missing and with every kind of junk."""
    cases = []
    for name, spec in FORMATS.items():
        good = json.loads((FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for column in spec.columns:
            if column in ("message_tree_id", "focus", "note"):  # named to tell the format, not read
                continue
            cases.append((name, f"{column} missing", good, {k: v for k, v in good.items() if k != column}))
            for kind, value in JUNK.items():
                if column in NUMERIC and kind in ("number", "flag") and column.startswith(("score", "is_")):
                    continue  # a number among scores, a flag among flags
                cases.append((name, f"{column} {kind}", good, {**good, column: value}))
    return cases


def test_every_malformed_row_of_every_format_is_found_and_located(tmp_path):
    cases = malformed()
    assert len(cases) > 600
    rng = random.Random(0)
    for name in FORMATS:
        mine = [(what, good, bad) for n, what, good, bad in cases if n == name]
        rng.shuffle(mine)
        rows = [row for _, good, bad in mine for row in (good, bad)]
        loaded = load(write(tmp_path / f"{name}.jsonl", rows), name)
        found = [f.row for f in loaded.findings]
        missed = [what for i, (what, _, _) in enumerate(mine) if 2 * i + 2 not in found]
        assert not missed and found == [2 * i + 2 for i in range(len(mine))], (name, missed)
        assert loaded.rows == len(rows) and not loaded.skipped
        assert all(f.severity == "bad" and f.reason.isidentifier() and 0 < len(f.detail) < 1000 for f in loaded.findings)


def test_broken_lines_between_good_ones(tmp_path):
    rng = random.Random(1)
    broken = []
    for _ in range(200):
        line = bytearray(GOOD)
        kind = rng.randrange(4)
        if kind == 0:
            line = line[:rng.randrange(1, len(line))]
        elif kind == 1:
            line[rng.randrange(1, len(line))] = rng.randrange(128, 256)
        elif kind == 2:
            line = line.replace(b'"', b"'")
        else:
            line = bytes(rng.choice((b"nan", b"[]", b"1e999", b'"text"', b"{}", b"\xff\xfe", b"<html>", b"a,b,c")))
        broken.append(bytes(line))
    loaded = load(write(tmp_path / "a.jsonl", [row for line in broken for row in (GOOD, line)]), "preference")
    assert [f.row for f in loaded.findings] == [2 * i + 2 for i in range(200)]
    assert len(loaded.items) == 200


# -- entries -------------------------------------------------------------------------------------------------------------------------


def test_columns_map_theirs_to_ours(tmp_path):
    path = write(tmp_path / "dolly.jsonl", [{"instruction": "Sum up.", "context": "Long text.", "response": "Short.", "category": "summary"}])
    item = load(path, "alpaca", columns={"output": "response", "input": "context"}).items[0]
    assert [m["content"] for m in item.messages] == ["Sum up.\n\nLong text.", "Short."]
    assert item.meta == {"category": "summary"}
    swapped = load(write(tmp_path / "p.jsonl", pairs(1)), "preference", columns={"chosen": "rejected", "rejected": "chosen"}).items[0]
    assert (swapped.chosen, swapped.rejected) == ("bad 0", "good 0")


def test_a_mapped_column_that_is_not_there(tmp_path):
    loaded = load(write(tmp_path / "p.jsonl", pairs(1)), "preference", columns={"chosen": "winner"})
    assert loaded.findings[0].detail == "no 'winner' (columns: prompt, chosen, rejected). Correct columns: {chosen: winner}"


def test_source_and_safety(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"prompt": "a"}, {"prompt": "b", "source": "theirs", "safety": True}])
    assert [(i.source, i.safety) for i in load(path, "prompt").items] == [("mine", False), ("theirs", True)]
    assert [i.safety for i in load(path, "prompt", safety_prompt=True).items] == [True, True]


def test_ties_are_counted_with_their_rows(tmp_path):
    path = tmp_path / "webgpt.jsonl"
    path.write_bytes((FIXTURES / "webgpt.jsonl").read_bytes())
    loaded = load(path, "webgpt")
    assert (loaded.rows, len(loaded.items), loaded.skipped, loaded.skipped_rows) == (3, 2, {"tie": 1}, {"tie": [3]})


def texts(loaded) -> list[str]:
    return [i.prompt[0]["content"] for i in loaded.items]


@pytest.mark.parametrize("entry, count", [({"rows": 30}, 30), ({"fraction": 0.25}, 25), ({"fraction": 0.5, "rows": 10}, 10), ({"rows": 500}, 100)])
def test_a_sample_depends_on_content_and_seed_and_not_on_order(tmp_path, entry, count):
    rows = pairs(100)
    first = load(write(tmp_path / "a.jsonl", rows), "preference", **entry)
    kept = [int(t.split()[1]) for t in texts(first)]
    assert len(kept) == count and kept == sorted(kept)  # in file order
    assert first.rows == 100 and first.row_numbers == [k + 1 for k in kept]
    shuffled = random.Random(3).sample(rows, 100)
    again = load(write(tmp_path / "b.jsonl", shuffled), "preference", **entry)
    assert set(texts(again)) == set(texts(first))
    as_other_file = tmp_path / "c.csv"
    as_other_file.write_bytes(as_csv(rows))
    assert texts(load(as_other_file, "preference", **entry)) == texts(first)
    if count < 100:
        other = load_entry(DataEntry(path="a.jsonl", format="preference", **entry), tmp_path, 1, "x")
        assert texts(other) != texts(first)


def test_paths_count_from_the_recipe_then_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "a.jsonl", pairs(1))
    monkeypatch.chdir(tmp_path)
    entry = DataEntry(path="a.jsonl", format="preference")
    assert len(load_entry(entry, tmp_path / "recipes", 0, "x").items) == 1
    write(tmp_path / "recipes" / "a.jsonl", pairs(2))
    assert len(load_entry(entry, tmp_path / "recipes", 0, "x").items) == 2


@pytest.mark.parametrize("path, words", [
    ("missing.jsonl", "no file 'missing.jsonl'"), ("sub/missing.csv.gz", "no file"), ("/nowhere/at all", "no file"), ("x" * 5000 + ".json", "no file"),
    ("folder", "is a folder"), ("a.txt", "a file of an unknown kind (.txt)")])
def test_paths_that_lead_nowhere(tmp_path, path, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(PosttrainError, match=r"r\.yaml: data\.x") as e:
        load_entry(DataEntry(path=path, format="prompt"), tmp_path, 0, "r.yaml: data.x[0]")
    assert words in e.value.found and e.value.expected and e.value.do
    if path == "missing.jsonl":
        assert str(tmp_path / path) in str(e.value) and str(Path(path).absolute()) in str(e.value)


@pytest.mark.parametrize("path", ["answers.xlsx", "my_data/answers.tsv", "answers.txt", "data/train.arrow", "a.ndjson", "data/all.tar.gz", "x.jsonl.zip",
                                  "NOTES.TXT", "./answers.yaml", "../data/answers", "./answers"])
def test_a_missing_file_of_a_kind_we_do_not_read_asks_no_hub(tmp_path, monkeypatch, path):
    monkeypatch.setattr(data, "_hub_commit", lambda *a: pytest.fail("the hub was asked"))
    with pytest.raises(PosttrainError, match=r"r\.yaml: data\.x\[0\]: no file") as e:
        load_entry(DataEntry(path=path, format="prompt"), tmp_path, 0, "r.yaml: data.x[0]")
    assert ".jsonl, .json, .csv, .parquet" in str(e.value) and str((tmp_path / path).absolute()) in str(e.value)


@pytest.mark.parametrize("path", ["owner/set", "set", "owner/set-v1.5", "owner/xP3.mt", "Owner_1/Set.2024.en", "owner/c4.en"])
def test_hub_names_may_hold_dots(tmp_path, monkeypatch, path):
    monkeypatch.setattr(data, "_hub_commit", lambda entry, place: f"commit of {entry.path}")
    assert fingerprint_entry(DataEntry(path=path, format="hh"), tmp_path) == f"commit of {path}"


def test_a_hub_name_is_loaded_at_its_commit_without_remote_code(tmp_path, monkeypatch):
    import datasets

    seen = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kw: seen.update(path=path, **kw) or [*pairs(2), {"prompt": "q"}])
    commit = "ab12" * 10
    entry = DataEntry(path="owner/set", format="preference", name="n", data_dir="d", split="test", revision=commit)
    loaded = load_entry(entry, tmp_path, 0, "x")
    assert seen == {"path": "owner/set", "name": "n", "data_dir": "d", "split": "test", "revision": commit}
    assert loaded.fingerprint == commit and loaded.items[0].source == "owner/set"
    assert [(f.file, f.row, f.reason) for f in loaded.findings] == [("owner/set", 3, "missing_column")]


def test_a_branch_is_resolved_to_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def dataset_info(self, path, revision, timeout):
            return type("Info", (), {"sha": f"{path}@{revision}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert fingerprint_entry(DataEntry(path="owner/set", format="hh", revision="v2"), tmp_path) == "owner/set@v2"


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def dataset_info(self, *args, **kw):
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(PosttrainError) as e:
        load_entry(DataEntry(path="owner/set", format="hh"), tmp_path, 0, "r.yaml: data.x[0]")
    assert "r.yaml: data.x[0]: the hub data set 'owner/set' cannot be loaded (ConnectionError: no route)" in str(e.value) and "revision:" in e.value.do


# -- data sets -----------------------------------------------------------------------------------------------------------------------


def entry(path: str, format: str = "preference", **rest) -> dict:
    return {"path": path, "format": format, **rest}


def test_the_first_bad_row_stops_with_its_place_and_the_count(tmp_path):
    write(tmp_path / "good.jsonl", pairs(3))
    write(tmp_path / "pairs.jsonl", [*pairs(16), {"prompt": "q", "chosen": "a"}, "{", *pairs(2)])
    with pytest.raises(PosttrainError) as e:
        DataSets(recipe(tmp_path, helpful=[entry("good.jsonl"), entry("pairs.jsonl")]))
    r = tmp_path / "r.yaml"
    assert str(e.value) == (
        f"{r}: data.helpful[1], file pairs.jsonl, row 17: no 'rejected' (columns: prompt, chosen). Map it with columns: {{rejected: NAME}}. "
        f"2 bad rows in all; `python -m posttrain check-data {r}` shows them all, bad_rows: drop leaves them out.")


def test_bad_rows_are_left_out_and_counted_where_the_entry_says_so(tmp_path):
    write(tmp_path / "p.jsonl", [*pairs(3), {"prompt": "q"}])
    counts = DataSets(recipe(tmp_path, x=[entry("p.jsonl", bad_rows="drop")])).split("x").counts
    assert (counts["rows"], counts["kept"], counts["bad"]) == (4, 3, 1)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes())[:-6])
    with pytest.raises(PosttrainError, match=r"file p\.jsonl\.gz: damaged gzip data"):
        DataSets(recipe(tmp_path, x=[entry("p.jsonl.gz", bad_rows="drop")]))


def test_a_set_without_a_usable_row(tmp_path):
    write(tmp_path / "p.jsonl", [])
    with pytest.raises(PosttrainError, match=r"data\.x: no usable row \(0 read\)"):
        DataSets(recipe(tmp_path, x=[entry("p.jsonl")]))


def test_entries_of_two_kinds_do_not_mix(tmp_path):
    write(tmp_path / "p.jsonl", pairs(3))
    with pytest.raises(PosttrainError, match="mixes pairs and prompts"):
        DataSets(recipe(tmp_path, x=[entry("p.jsonl"), entry("p.jsonl", "prompt")]))


def keys(items) -> set[str]:
    return {prompt_key(i) for i in items}


def test_prompt_key_sees_the_first_user_turn_without_case_and_spacing():
    def key(*turns):
        return prompt_key(Prompt([{"role": r, "content": c} for r, c in turns]))

    same = key(("user", "What  is\nthis?"))
    assert same == key(("system", "Be brief."), ("user", "what is THIS?"), ("assistant", "A"), ("user", "and that?"))
    assert same != key(("user", "What is that?"))
    assert same == prompt_key(Pair([{"role": "user", "content": " What is this? "}], "a", "b"))


def test_held_out_rows_never_reach_training_in_any_set(tmp_path):
    rng = random.Random(0)
    questions = [f"question {i}" for i in range(200)]
    helpful = [{"prompt": rng.choice(questions), "chosen": f"g{i}", "rejected": f"b{i}"} for i in range(600)]
    safety = [{"prompt": rng.choice(questions).upper() + " ", "chosen": f"s{i}", "rejected": f"u{i}"} for i in range(400)]
    demos = [{"instruction": q, "output": "yes"} for q in questions]
    write(tmp_path / "helpful_a.jsonl", helpful[:300])
    write(tmp_path / "helpful_b.jsonl", helpful[300:])
    write(tmp_path / "safety.jsonl", safety)
    write(tmp_path / "demos.jsonl", demos)
    write(tmp_path / "prompts.jsonl", [{"prompt": q} for q in questions[:50]])
    r = recipe(tmp_path, held_out={"pairs": 60, "prompts": 10}, helpful=[entry("helpful_a.jsonl"), entry("helpful_b.jsonl", weight=2)],
               safety=[entry("safety.jsonl")], demos=[entry("demos.jsonl", "alpaca")], prompts=[entry("prompts.jsonl", "prompt")])
    sets = DataSets(r)
    splits = {name: sets.split(name) for name in r.data_sets}
    every = set().union(*(keys(s.held_out) for s in splits.values()))
    assert every == sets.held_out_keys
    for name, s in splits.items():
        assert not keys(s.train) & every, name
        wish = {"helpful": 60, "safety": 60, "demos": 0, "prompts": 10}[name]
        assert wish <= len(s.held_out) <= wish + 12  # whole groups of one prompt
        assert s.counts["kept"] == len(s.held_out) + s.counts["removed"] + len({id(i) for i in s.train})
    assert splits["demos"].counts["removed"] == len(every)  # every question is in the demonstrations
    assert len({id(i) for i in splits["helpful"].held_out}) == len(splits["helpful"].held_out)
    alone = DataSets(r, ["demos", "@v1_samples"])  # sets that hold rows out count even when they are not asked for
    assert alone.held_out_keys == sets.held_out_keys and alone.split("demos") == splits["demos"]
    assert keys(sets.without_held_out([i for s in splits.values() for i in [*s.train, *s.held_out]])).isdisjoint(every)


def test_a_group_of_one_prompt_is_never_split(tmp_path):
    write(tmp_path / "p.jsonl", [{"prompt": f"q{i % 10}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(100)])
    s = DataSets(recipe(tmp_path, held_out={"pairs": 15}, x=[entry("p.jsonl")])).split("x")
    assert len(s.held_out) == 20 and len(keys(s.held_out)) == 2 and len(s.train) == 80


def test_held_out_rows_do_not_depend_on_order_and_change_with_the_seed(tmp_path):
    rows = pairs(100)
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", random.Random(1).sample(rows, 100))
    a, b = (DataSets(recipe(tmp_path, held_out={"pairs": 20}, x=[entry(f)])).held_out_keys for f in ("a.jsonl", "b.jsonl"))
    assert a == b and len(a) == 20
    assert DataSets(recipe(tmp_path, seed=1, held_out={"pairs": 20}, x=[entry("a.jsonl")])).held_out_keys != a


@pytest.mark.parametrize("rows", [pairs(100), [{**p, "prompt": "the same"} for p in pairs(100)]])
def test_holding_out_more_than_half_is_refused(tmp_path, rows):
    write(tmp_path / "p.jsonl", rows)
    with pytest.raises(PosttrainError, match=r"r\.yaml: data\.x: holding out (60|1) rows takes (60|100) of 100"):
        DataSets(recipe(tmp_path, held_out={"pairs": 60 if rows[0]["prompt"] != "the same" else 1}, x=[entry("p.jsonl")]))


@pytest.mark.parametrize("weight, count", [(2, 200), (0.5, 50), (1.25, 125), (1, 100)])
def test_weights_repeat_or_thin_training_rows(tmp_path, weight, count):
    write(tmp_path / "p.jsonl", pairs(100))
    s = DataSets(recipe(tmp_path, x=[entry("p.jsonl", weight=weight)])).split("x")
    assert len(s.train) == count == s.counts["train"] and s.counts["kept"] == 100
    assert len(keys(s.train)) == min(count, 100)


def test_counts_and_fingerprints(tmp_path):
    write(tmp_path / "a.jsonl", pairs(10))
    write(tmp_path / "b.jsonl", pairs(10, start=10))
    sets = DataSets(recipe(tmp_path, x=[entry("a.jsonl"), entry("b.jsonl", weight=2)]))
    assert sets.split("x").counts == {"rows": 20, "kept": 20, "bad": 0, "skipped": {}, "held_out": 0, "removed": 0, "train": 30,
                                      "by_source": {"a": 10, "b": 20}}
    assert sets.fingerprints == {f"x[{i}]": hashlib.sha256((tmp_path / f).read_bytes()).hexdigest() for i, f in enumerate(("a.jsonl", "b.jsonl"))}


def test_reading_local_rows_imports_nothing_heavy(tmp_path):
    write(tmp_path / "p.jsonl", pairs(3))
    code = ("import sys; from pathlib import Path; from posttrain.lint import check_file; check_file(sys.argv[1]);"
            "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'pyarrow', 'pandas', 'numpy') if m in sys.modules])")
    command = [sys.executable, "-c", code, str(tmp_path / "p.jsonl")]
    done = subprocess.run(command, cwd=Path(data.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# -- the real sets -------------------------------------------------------------------------------------------------------------------

REAL = {"hh_harmless": ("hh", 1732, 1730), "helpful_graded": ("preference", 3976, 3976), "sharegpt_pairs": ("sharegpt_pairs", 222, 222),
        "alpaca_demonstrations": ("alpaca", 736, 736), "safety_demonstrations": ("alpaca", 1844, 1844),
        "safety_labelled_pairs": ("preference", 58, 58), "prompts_beavertails": ("prompt", 536, 536), "bold_prompts": ("prompt", 3000, 3000),
        "prompts_i_maliciousinstructions": ("prompt", 100, 100), "prompts_q_harm": ("prompt", 100, 100),
        "prompts_i_physicalsafetysafe": ("prompt", 100, 100), "prompts_i_physicalsafetyunsafe": ("prompt", 100, 100)}


@pytest.fixture
def real() -> Path:
    if not os.environ.get("POSTTRAIN_REAL_DATA"):
        pytest.skip("POSTTRAIN_REAL_DATA is not set: it names the folder with the real data sets")
    return Path(os.environ["POSTTRAIN_REAL_DATA"]).absolute()


@pytest.mark.parametrize("name", REAL)
def test_real_sets_load_whole(real, name):
    """hh_harmless has two rows whose chosen answer is empty as published: those, and no other row, cannot be used."""
    format, rows, kept = REAL[name]
    loaded = load(real / f"{name}.jsonl.gz", format)
    assert (loaded.rows, len(loaded.items), loaded.skipped) == (rows, kept, {})
    assert [(f.row, f.reason) for f in loaded.findings] == ([(401, "empty_answer"), (829, "empty_answer")] if name == "hh_harmless" else [])


def test_real_pairs_split_by_prompt(real):
    r = recipe(real, held_out={"pairs": 800}, helpful=[entry("helpful_graded.jsonl.gz")])
    s = DataSets(r).split("helpful")
    assert not keys(s.train) & keys(s.held_out) and 800 <= len(s.held_out) < 810
    assert {i.rating for i in s.held_out} == {0, 1, 2, 3} and all(i.meta["chosen_model"] for i in s.train)
