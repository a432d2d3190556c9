"""`data_dir=FOLDER`: the rows and the file names below it are part of a section's fingerprint, the folder's spelling and place are not."""

import json
import shutil
from pathlib import Path

import pytest

from posttrain.config import load_recipe
from posttrain.runs import Run

ROWS = [{"prompt": f"question {i}", "completion": "Yes."} for i in range(6)]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def fingerprint(tmp_path, monkeypatch):
    """fingerprint('data_dir=FOLDER', ...) -> the inputs of a section that reads from there, with its fingerprint."""
    for name in ("more", "other", "below/more"):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name / "a.jsonl", ROWS)
    write(tmp_path / "own.jsonl", [{"prompt": "mine", "completion": "No."}])
    (tmp_path / "link").symlink_to("more")
    (tmp_path / "r.yaml").write_text(json.dumps({
        "run": {"name": "t", "dir": str(tmp_path / "runs")}, "model": {"name_or_path": "builtin:tiny-llama"},
        "data": {"demos": [{"path": "own.jsonl", "format": "prompt_completion"}, {"path": "$data_dir/b.jsonl", "format": "prompt_completion"},
                           {"path": "$data_dir/a.jsonl", "format": "prompt_completion", "rows": 4}]},
        "stages": {"sft": {"data": "demos"}}}), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "below")  # a folder that is not the recipe's

    def of(*overrides: str) -> tuple[str, dict]:
        section = Run(load_recipe(tmp_path / "r.yaml", list(overrides))).section("sft")
        return section.fingerprint, section.inputs()

    return of


def test_every_spelling_of_a_folder_is_one_fingerprint(fingerprint, tmp_path):
    wanted, inputs = fingerprint("data_dir=more")
    assert inputs["data.demos[1].path"] == "$data_dir/a.jsonl" and inputs["data.demos[0].path"] == "own.jsonl"
    for spelling in ("more/", "./more", "more/../more", f"{tmp_path}/more", f"{tmp_path}/more/", "../below/more", "link", "other"):
        assert fingerprint(f"data_dir={spelling}")[0] == wanted, spelling
    assert not any(str(tmp_path) in f"{key}{value}" for key, value in fingerprint(f"data_dir={tmp_path}/more")[1].items())


def test_another_row_and_another_file_name_are_other_fingerprints(fingerprint, tmp_path):
    seen = {fingerprint("data_dir=more")[0], fingerprint()[0]}  # with and without the folder
    write(tmp_path / "other/a.jsonl", [ROWS[0] | {"completion": "No."}, *ROWS[1:4]])
    seen.add(fingerprint("data_dir=other")[0])
    shutil.copy(tmp_path / "more/a.jsonl", tmp_path / "other/b.jsonl")
    (tmp_path / "other/a.jsonl").unlink()
    seen.add(fingerprint("data_dir=other")[0])
    seen.add(fingerprint("data_dir=more", "data.demos.2.rows=3")[0])
    assert len(seen) == 5


def test_a_row_that_is_not_seen_changes_nothing(fingerprint, tmp_path):
    """`rows: 4` of six by a hash of their content: one that isn't taken may be left out."""
    wanted, _ = fingerprint("data_dir=more")
    taken = {i.messages[0]["content"] for i in Run(load_recipe(tmp_path / "r.yaml", ["data_dir=more"])).data.split("demos").train}
    left = [r for r in ROWS if r["prompt"] not in taken]
    write(tmp_path / "other/a.jsonl", [r for r in ROWS if r != left[0]])
    assert len(left) == 2 and fingerprint("data_dir=other")[0] == wanted
