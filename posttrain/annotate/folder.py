"""The folder of exports, in which every file is of one export's making and the set of them is whole.

MANIFEST names the files that exports wrote and the text that each may hold, by its sha256. It is written before the first file is touched, with
what is there and what comes, and again at the end with what is there then: after a kill in between the next export knows the files for its
own, replaces or removes them, and the set is whole again. What it does not name, or what holds other text, is not an export's: one that would
write or remove it stops before it touches anything. Several databases may share a folder.
"""

import hashlib
import json
from pathlib import Path

from posttrain.errors import PosttrainError
from posttrain.runs import write_atomic, write_json

MANIFEST = "export.json"


def write(out: Path, texts: dict[str, str], batch_of: dict[str, str], database: str, batches: list[str] | None, held: str) -> None:
    """Write the files of one export, and remove those of the database's earlier ones that it does not write.

    texts: by name; batch_of: the batch of a file, none for what tells of the whole database; batches: those exported, None for all (files of
    others stay); held: what the choice of held-out prompts is known by. Raises PosttrainError before anything is touched.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = _read(out / MANIFEST)
        files, was = before["files"], before["databases"].get(database, {"held_out": held})
        mine = {name for name, f in files.items() if f["database"] == database}
        others = {n for n in mine - texts.keys() if batches and files[n]["batch"] not in batches and (out / n).exists()}
        _check(out, texts, batch_of, files, database, mine - others)
        if others and was["held_out"] != held:
            raise PosttrainError(f"--out {out}", f"holds {min(others)}, of a batch that this export leaves out and with other held-out prompts",
                                 "one choice of held-out prompts in all files of a database", "Export without --batch, or name another folder.")
        new = {name: {"database": database if name in batch_of else None, "batch": batch_of.get(name), "sha256": [_sum(text.encode())]}
               for name, text in texts.items()}
        both = {n: new[n] | {"sha256": [*files.get(n, {"sha256": []})["sha256"], *new[n]["sha256"]]} for n in new}
        _save(out, files | both, before["databases"] | {database: {"complete": False, "held_out": held if was["held_out"] == held else None}})
        for name in mine - others - new.keys():
            for path in (out / name, out / f"{name}.tmp"):
                path.unlink(missing_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text)
        left = {n: f for n, f in files.items() if n not in mine or n in others}
        _save(out, left | new, before["databases"] | {database: {"complete": True, "held_out": held}})
    except OSError as e:
        raise PosttrainError(f"--out {out}", f"cannot be written ({e.strerror})", "a folder that can be written", "Name another one.") from None


def _check(out: Path, texts: dict[str, str], batch_of: dict[str, str], files: dict[str, dict], database: str, mine: set[str]) -> None:
    """Nothing that this export would write or remove may be another's."""
    for name in sorted(mine | texts.keys()):
        path, known = out / name, files.get(name, {"database": None, "sha256": []})
        if name in batch_of and known["database"] not in (None, database):
            raise PosttrainError(str(path), "is of another database's export", "batches of other names", "Name another folder with --out.")
        may = [*known["sha256"], *([_sum(texts[name].encode())] if name in texts else [])]
        if path.exists() and (not path.is_file() or _sum(path.read_bytes()) not in may):
            raise PosttrainError(str(path), "is in the way: no export wrote it, or it was changed since", "a folder for exports alone",
                                 "Move it to another place, or name another folder with --out.")


def _read(path: Path) -> dict:
    """The manifest; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"databases": {}, "files": {}}
        good = all(Path(n).name == n and {"database", "batch", "sha256"} <= f.keys() for n, f in found["files"].items())
        good = good and all("held_out" in d for d in found["databases"].values())
    except (ValueError, TypeError, LookupError, AttributeError):
        good = False
    if not good:
        raise PosttrainError(str(path), "is no list of an export's files", "the one that an export wrote", "Name another folder with --out.")
    return found


def _save(out: Path, files: dict, databases: dict) -> None:
    write_json(out / MANIFEST, {"databases": databases, "files": dict(sorted(files.items()))})


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
