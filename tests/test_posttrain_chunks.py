"""Chunks on disk: one comes back whole or not at all; those that others write may come a little late."""

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from posttrain import chunks, distributed
from posttrain.chunks import read_chunk, through_chunks, write_chunk
from posttrain.errors import PosttrainError
from posttrain.log import Log
from posttrain.runs import Section, read_json


def answer(merged: float, finished: bool = True, text: str = "x") -> dict:
    return {"prompt": [{"role": "user", "content": "p"}], "answer": text, "merged": merged, "finished": finished}


def test_a_chunk_comes_back_and_a_damaged_one_does_not(tmp_path):
    rows = [answer(0.1 + 0.2, text='ü "q" \u2028 \x00 \n'), answer(-1e-17, finished=False)]
    path = tmp_path / "0.json"
    write_chunk(path, rows)
    whole = path.read_bytes()
    assert read_chunk(path) == rows and read_chunk(tmp_path / "none.json") is None
    assert [p.name for p in tmp_path.iterdir()] == ["0.json"]
    for damaged in (whole[:-1], whole[:40], b"", b"[]", b"null", b'"rows"', b"{}", b'{"rows": []}', whole.replace(b"-1e-17", b"-1e-16"),
                    whole.replace(b"false", b"true"), b"\xff" + whole):
        path.write_bytes(damaged)
        assert read_chunk(path) is None
    for at in range(0, len(whole), 5):  # any byte
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        assert read_chunk(path) in (None, rows)  # rows: the flip hit a space between two tokens of JSON
        if read_chunk(path) == rows:
            assert whole[at:at + 1] == b" "


def test_what_is_absent_or_damaged_is_made_and_all_comes_back_in_order(tmp_path):
    section, made = SimpleNamespace(log=Log(tmp_path, "s")), []

    def make(i, tick):
        assert distributed.world() == 1
        made.append(i)
        tick(3)
        return [{"n": i, "ids": [1, 2, 3]}] * i

    paths = [tmp_path / "chunks" / f"{i}.json" for i in range(4)]
    paths[0].parent.mkdir()
    write_chunk(paths[1], [{"n": "kept"}])
    paths[2].write_text("{")
    rows = through_chunks(section, paths, make, "making")
    assert made == [0, 2, 3] and [r["n"] for r in rows] == ["kept", 2, 2, 3, 3, 3]
    assert through_chunks(section, paths, make, "making") == rows and made == [0, 2, 3]
    assert through_chunks(section, [], make, "making") == []


def test_a_disk_that_loses_what_was_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "write_chunk", lambda path, rows: path.write_text("{"))
    with pytest.raises(PosttrainError, match=r"0.json: absent or damaged, though it was just written.*the sound chunks are kept"):
        through_chunks(SimpleNamespace(log=Log(tmp_path, "s")), [tmp_path / "0.json"], lambda i, tick: [], "making")


def test_a_process_that_is_not_the_first_leaves_the_manifest_and_all_settle_on_the_least(tmp_path, monkeypatch):
    section = Section(SimpleNamespace(folder=tmp_path), "s", None, {"exact": True, "decisions": {"rows_at_once": 8}})
    section.folder.mkdir()
    for key, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)

    def work():
        if section.manifest["decisions"]["rows_at_once"] > 2:
            raise torch.OutOfMemoryError("out of memory")

    with distributed.alone():
        chunks.with_fewer_rows(section, work)
    assert section.manifest["decisions"]["rows_at_once"] == 2 and [p.name for p in section.folder.iterdir()] == [".inexact-1"]

    first = Section(section.run, "s", None, {"exact": True, "decisions": {"rows_at_once": 8}})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "gather", lambda value: [value, (2, section.manifest["inexact_because"])])
    assert first.settle("rows_at_once") == 2
    told = read_json(section.folder / "manifest.json")
    assert told["decisions"] == {"rows_at_once": 2} and told["exact"] is False and told["inexact_because"] == section.manifest["inexact_because"]


def test_processes_settle_once_all_chunks_are_made(tmp_path, monkeypatch):
    settled = []
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "from_main", lambda make: make())
    monkeypatch.setattr(distributed, "turns", iter)
    monkeypatch.setattr(distributed, "wait", lambda: None)
    section = SimpleNamespace(log=SimpleNamespace(progress=lambda *args, **rest: nullcontext(SimpleNamespace(made=None, advance=lambda: None))),
                              settle=settled.append)
    assert through_chunks(section, [tmp_path / "0.json"], lambda i, tick: [answer(1.0)], "making") and settled == ["rows_at_once"]


def test_another_machines_chunk_may_come_late(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    late = threading.Timer(0.7, write_chunk, (tmp_path / "0.json", [answer(1.0)]))
    late.start()
    assert chunks._finished(tmp_path / "0.json") == [answer(1.0)]
    late.join()
    monkeypatch.setattr(chunks, "LATE", 0.2)
    began = time.time()
    with pytest.raises(PosttrainError, match="several machines need run.dir"):
        chunks._finished(tmp_path / "1.json")
    assert time.time() - began < 10
