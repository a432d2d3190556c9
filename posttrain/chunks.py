"""Long work cut into chunks of rows on disk: what is made stays, and a resumed section makes only what is absent or damaged.

A chunk is one JSON file with a checksum, written whole or not at all. It depends on nothing outside it (a seed and a batch schedule of its
own), so it is the same bytes however often, in whatever order and by whichever of several processes it is made.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from posttrain import adapted, distributed, stopping
from posttrain.errors import PosttrainError
from posttrain.runs import Section, digest, write_atomic, write_lines

LATE = 60.0  # seconds a network file system may take to show a file that another machine wrote


def through_chunks(section: Section, paths: list[Path], make: Callable[[int, Callable[[int], None]], list[dict]], what: str) -> list[dict]:
    """The rows of all chunks. make(i, tick) makes those of paths[i] where it is absent or damaged, and calls tick(n) for n tokens more.

    Several processes take the absent chunks in turns and make each alone; what make asks `section.decide` is settled before. All return all
    rows. Raises where a chunk can't be read once all are made.
    """
    processes = f" in {distributed.world()} processes" if distributed.world() > 1 else ""
    have: dict[int, list[dict]] = {}

    def missing() -> list[int]:
        have.update((i, rows) for i, path in enumerate(paths) if (rows := read_chunk(path)) is not None)
        return [i for i in range(len(paths)) if i not in have]

    absent = distributed.from_main(missing)
    with section.log.progress(len(paths), what + processes, "chunk", len(paths) - len(absent), together=True) as ticker:
        for i in distributed.turns(absent):
            stopping.check()
            with distributed.alone():
                paths[i].parent.mkdir(exist_ok=True)
                write_chunk(paths[i], with_fewer_rows(section, partial(make, i, ticker.made)))
            ticker.advance()
        distributed.wait()
    if distributed.world() > 1:
        section.settle("rows_at_once")
    return [r for i, path in enumerate(paths) for r in (have[i] if i in have else _finished(path))]


def with_fewer_rows(section: Section, work: Callable):
    """work(). Where the GPU's memory runs out, again with half as many samples side by side (generate.rows_at_once), from now on."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            rows = section.manifest.get("decisions", {}).get("rows_at_once", 1)
            if rows < 2:
                raise
        section.manifest["decisions"]["rows_at_once"] = rows // 2  # here, where the exception and what it held are gone
        section.inexact(f"the GPU's memory ran out with {rows} samples side by side: {rows // 2} from now on")
        adapted.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _finished(path: Path) -> list[dict]:
    """The rows of a chunk that this process or another has written."""
    until = time.time() + (LATE if distributed.world() > 1 else 0)
    while (rows := read_chunk(path)) is None:
        if time.time() >= until:
            raise PosttrainError(str(path), "absent or damaged, though it was just written", "the chunk", "Check the disk; several machines need run.dir "
                                 "on one that all of them see. Then run the same command again: the sound chunks are kept.")
        time.sleep(0.5)
    return rows


def write_chunk(path: Path, rows: list[dict]) -> None:
    write_atomic(path, json.dumps({"sha256": digest(rows), "rows": rows}, ensure_ascii=False))


def read_chunk(path: Path) -> list[dict] | None:
    """A chunk's rows, or None when it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value["rows"] if digest(value["rows"]) == value["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def in_parts(items: list, size: int) -> list[list]:
    """`size` of them each, in order; the last may be shorter."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def write_samples(section: Section, rows: list[dict], kept: Iterable[dict]) -> None:
    """samples.jsonl: all that was sampled, without ids, and which of it (the same objects) is kept."""
    chosen = {id(r) for r in kept}
    write_lines(section.folder / "samples.jsonl", ({"step": 0, "kept": id(r) in chosen, **{k: v for k, v in r.items() if k != "ids"}} for r in rows))


def derive_seed(*parts) -> int:
    """A seed of its own for every (seed, purpose, number)."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")


def usable(row: dict) -> bool:
    """Whether a sample can become a demonstration: finished, not empty, and not spelling a turn token, which no stage reads as text."""
    return bool(row["finished"] and row["answer"] and not row.get("spells"))


def why_unusable(rows: list[dict]) -> str:
    """'12 were cut off, 1 empty, 0 spelled a turn token'."""
    finished = [r for r in rows if r["finished"]]
    return (f"{len(rows) - len(finished)} were cut off, {sum(not r['answer'] for r in finished)} empty, "
            f"{sum(bool(r.get('spells')) for r in finished)} spelled a turn token")
