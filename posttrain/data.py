"""Data entries -> items -> splits. Local files are read by the standard library so that every fault has its row number.

Row numbers count from 1: the line of a .jsonl file, the record below the header of a .csv, the element of a .json array, the row of a
parquet file or hub data set. Neither `datasets` nor pyarrow is imported unless an entry needs it.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain.config import DataEntry
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS, Demonstration, Pair, Prompt, RowError, Skip, missing_column, show

Item = Demonstration | Pair | Prompt
Row = tuple[int | None, dict | RowError]  # a row number (None: the whole file) and the row or what is wrong with it
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HELD_OUT_FIELD = {"demonstration": "demonstrations", "pair": "pairs", "prompt": "prompts"}
_OTHER_FILES = (".arrow", ".avro", ".bz2", ".doc", ".docx", ".feather", ".gz", ".h5", ".hdf5", ".html", ".jsonlines", ".ndjson", ".npy", ".npz", ".ods",
                ".orc", ".pdf", ".pickle", ".pkl", ".sqlite", ".tar", ".tgz", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".xz", ".yaml", ".yml",
                ".zip", ".zst")  # a file's and no hub name's; not every ending, since hub names hold dots (owner/set-v1.5, owner/xP3.mt)
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
         (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a data set."""

    severity: str  # "bad": the row cannot be used; "warning"
    reason: str  # a stable slug, such as missing_column
    file: str
    row: int | None  # None: the whole file
    detail: str


@dataclass
class Loaded:
    """What one data entry holds. items[i] comes from row row_numbers[i]; skipped_rows has the rows behind each count of `skipped`."""

    items: list[Item]
    findings: list[Finding]
    rows: int  # read, before sampling
    skipped: dict[str, int]
    fingerprint: str
    kind: str
    row_numbers: list[int]
    skipped_rows: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Split:
    """counts: rows read, kept, skipped and bad; rows held out, rows `removed` from training because another data set holds
    their prompt out, and the resulting rows of `train` (weights applied), also `by_source`."""

    train: list[Item]
    held_out: list[Item]
    kind: str
    counts: dict


# -- files -> rows -------------------------------------------------------------------------------------------------------------------


def file_kind(path: str | Path) -> str | None:
    """The suffix that says how to read a file, without .gz; None: not one we read."""
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else None


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a local file, good or bad. Never raises for what the file holds; OSError where it cannot be opened."""
    data, broken = _read_bytes(path)
    if file_kind(path) == ".parquet":
        yield from _parquet(data)
    else:
        text = _decode(data)
        if isinstance(text, RowError):
            yield None, text
        else:
            yield from {".jsonl": _json_lines, ".json": _json, ".csv": _csv}[file_kind(path)](text)
    if broken:
        yield None, broken


def _read_bytes(path: Path) -> tuple[bytes, RowError | None]:
    """A file's bytes, unpacked. Of a damaged .gz: what could be unpacked, and the fault."""
    if not path.name.lower().endswith(".gz"):
        return path.read_bytes(), None
    chunks = []
    with gzip.open(path, "rb") as file:
        try:
            while chunk := file.read1(1 << 20):  # read() would lose what stands before the damage
                chunks.append(chunk)
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            return b"".join(chunks), RowError("unparsable", f"damaged gzip data ({e})", "a whole .gz file", "Copy or compress it again")
    return b"".join(chunks), None


def _decode(data: bytes) -> str | RowError:
    """UTF-8, or what a byte order mark says. Bytes that are not UTF-8 become lone surrogates, which no later step accepts."""
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        if encoding.startswith("utf-8"):
            return data.decode(encoding, "surrogateescape")
        return RowError("unparsable", f"not valid {encoding} at byte {e.start}", "UTF-8 text", "Save the file as UTF-8")


def _loads(text: str) -> object:
    """JSON -> a value, or the RowError that says where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        return RowError("unparsable", f"not JSON ({e.msg} at character {e.pos + 1})", "one JSON object", "Correct or remove the row")
    except (ValueError, RecursionError):
        return RowError("unparsable", "not usable JSON (a number or a nesting without end)", "one JSON object", "Correct or remove the row")


def _as_row(value: object) -> dict | RowError:
    if isinstance(value, (dict, RowError)):
        return value
    return RowError("wrong_type", f"the row is {show(value)}", "an object with named columns", "Write {\"column\": value, ...}")


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if escaped := re.search("[\udc80-\udcff]", line):
            byte = ord(escaped.group()) - 0xDC00
            yield number, RowError("unparsable", f"not UTF-8 (byte 0x{byte:02x} at character {escaped.start() + 1})", "UTF-8 text",
                                   "Save the file as UTF-8")
        elif line.strip():
            yield number, _as_row(_loads(line))


def _json(text: str) -> Iterator[Row]:
    """An array of objects; an object that holds one as data, rows or train; or JSON lines under another name."""
    if text.lstrip().startswith("["):
        yield from _json_array(text)
        return
    value = _loads(text)
    if isinstance(value, RowError):
        yield from _json_lines(text)
        return
    inner = next((value[k] for k in ("data", "rows", "train") if isinstance(value, dict) and isinstance(value.get(k), list)), [value])
    yield from ((number, _as_row(row)) for number, row in enumerate(inner, 1))


def _json_array(text: str) -> Iterator[Row]:
    """Element by element, so that a fault has its row number and what stands before it is read."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, number = gap.match(text, text.index("[") + 1).end(), 1
    while text[position:position + 1] != "]":
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as e:
            line = text.count("\n", 0, getattr(e, "pos", position)) + 1
            yield number, RowError("unparsable", f"not JSON (line {line}: {getattr(e, 'msg', 'no end of it')})", "an array of objects",
                                   "Correct it; the rows after it were not read")
            return
        yield number, _as_row(value)
        position, number = gap.match(text, position).end(), number + 1
    if text[position + 1:].strip():
        yield None, RowError("unparsable", f"more text after the array ({show(text[position + 1:].strip())})", "one array of objects",
                             "Join the arrays, or write one object a line and name the file .jsonl")


def _csv(text: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    records = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, number = None, 0
    while True:
        try:
            record = next(records, None)
        except csv.Error as e:
            number += 1
            yield number if header else None, RowError("unparsable", f"not CSV ({e}, line {records.line_num})", "quoted cells parted by commas",
                                   "Double the quotes inside quoted cells and close every cell")
            if header is None:
                return
            continue
        if record is None:
            return
        if header is None:
            header = [name.strip() for name in record]
        elif record:
            number += 1
            yield number, _csv_row(header, record)


def _csv_row(header: list[str], record: list[str]) -> dict | RowError:
    if len(record) != len(header):
        return RowError("unparsable", f"{len(record)} cells under {len(header)} columns", "one cell for every column",
                        "Quote cells that hold commas or line breaks")
    return {name: _csv_cell(cell) for name, cell in zip(header, record, strict=True)}


def _csv_cell(cell: str):
    """Text; a cell that holds messages as JSON becomes a list of them."""
    if not cell.startswith(("[{", '{"from"', '{"role"')):
        return cell
    value = _loads(cell)
    turns = value if isinstance(value, list) else [value]
    return value if all(isinstance(t, dict) and ("role" in t or "from" in t) for t in turns) else cell


def _parquet(data: bytes) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(batch_size=1024):
            for i in range(batch.num_rows):
                number += 1
                try:
                    yield number, batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield number, RowError("unparsable", "text that is not UTF-8", "UTF-8 text", "Write the file again as UTF-8")
    except (pa.ArrowException, OSError, ValueError) as e:
        yield None, RowError("unparsable", f"not readable as parquet ({str(e).splitlines()[0][:120]})", "a whole parquet file", "Write it again")


# -- entries -------------------------------------------------------------------------------------------------------------------------


def _local(entry: DataEntry, recipe_dir: Path, place: str) -> Path | None:
    """The local file of an entry; None: its path is a hub name."""
    path = Path(entry.path).expanduser()
    tried = [Path(recipe_dir) / path, path]
    found = next((p for p in tried if os.path.exists(p)), None)
    if found is None:
        other = path.suffix.lower() in _OTHER_FILES
        if file_kind(path) is None and not other and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", entry.path):
            return None
        raise PosttrainError(place, f"no file '{entry.path}'", f"it at {' or '.join(dict.fromkeys(str(p.absolute()) for p in tried))}",
                             "Paths count from the recipe's folder, then from the working directory"
                             + ("." if file_kind(path) else f"; files end in {', '.join(SUFFIXES)}, or one of these with .gz."))
    if found.is_dir() or file_kind(found) is None:
        what = "a folder" if found.is_dir() else f"a file of an unknown kind ({found.suffix or 'no suffix'})"
        raise PosttrainError(place, f"'{entry.path}' is {what}", f"a file ending in {', '.join(SUFFIXES)}, or one of these with .gz",
                             "Name the file itself, or the hub data set by its owner/name.")
    return found


def fingerprint_entry(entry: DataEntry, recipe_dir: Path, place: str = "data") -> str:
    """Local: the sha256 of the file's bytes. Hub: the commit that its revision means now."""
    path = _local(entry, recipe_dir, place)
    if path is None:
        return _hub_commit(entry, place)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise _unreadable(place, entry, e) from None


def _unreadable(place: str, entry: DataEntry, error: OSError) -> PosttrainError:
    return PosttrainError(f"{place}, file {entry.path}", f"cannot be read ({error.strerror or error})", "a readable file",
                          "Check its permissions and the disk.")


def _hub_commit(entry: DataEntry, place: str) -> str:
    if entry.revision and re.fullmatch(r"[0-9a-f]{40}", entry.revision):
        return entry.revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(entry.path, revision=entry.revision, timeout=20).sha
    except Exception as e:  # the hub client has no common base for its, httpx's and the socket's errors
        raise _unreachable(place, entry, e) from None


def _unreachable(place: str, entry: DataEntry, error: Exception) -> PosttrainError:
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return PosttrainError(place, f"the hub data set '{entry.path}' cannot be loaded ({type(error).__name__}: {said})",
                          "a data set that can be reached, or a local file of that path",
                          "Check the name, name:, data_dir:, split: and the connection; to work from the cache, give revision: as a commit.")


def _hub_rows(entry: DataEntry, commit: str, place: str) -> Iterator[Row]:
    try:
        from datasets import load_dataset

        rows = load_dataset(entry.path, name=entry.name, data_dir=entry.data_dir, split=entry.split, revision=commit)
    except Exception as e:  # datasets raises whatever its many back ends do
        raise _unreachable(place, entry, e) from None
    yield from enumerate(rows, 1)


def renamed(row: dict, columns: dict[str, str]) -> dict:
    """columns: {ours: theirs}. Raises RowError where theirs is not there."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            error = missing_column(row, ours)
            raise RowError(error.reason, error.found.replace(f"'{ours}'", f"'{theirs}'", 1), "", f"Correct columns: {{{ours}: {theirs}}}")
    kept = {k: v for k, v in row.items() if k not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def content(item: Item) -> tuple:
    """What an item says, without its labels: turns and answers."""
    turns = item.prompt if isinstance(item, Pair) else item.messages
    answers = (item.chosen, item.rejected) if isinstance(item, Pair) else ()
    return (*((m["role"], m["content"]) for m in turns), *answers)


@contextmanager
def naming(items: list[Item], i: int):
    """Say in an error about items[i] which one that is: its source, its place among them, its first words."""
    try:
        yield
    except PosttrainError as e:
        words = next((m["content"] for m in (items[i].prompt if isinstance(items[i], Pair) else items[i].messages) if m["role"] == "user"), "")
        raise PosttrainError(f"{e.place}, item {i + 1} of {len(items)} from {items[i].source or 'this data set'} "
                             f"({words[:50]!r}{'...' * (len(words) > 50)})", e.found, e.expected, e.do) from None


def only(items: list[Item], kind: type, place: str) -> list[Item]:
    """The items. Raises PosttrainError where one is no `kind`: the data set named at `place` is of another."""
    if wrong := next((i for i in items if not isinstance(i, kind)), None):
        wanted = f"{kind.__name__.lower()}s"
        raise PosttrainError(place, f"'{wrong.source}' holds {type(wrong).__name__.lower()}s", wanted, f"Name a data set of {wanted}.")
    return items


def pick(rows, n: int | None, rng: random.Random) -> list:
    """n rows by lot, kept in order; all where n is None or not fewer."""
    return list(rows) if n is None or n >= len(rows) else [rows[i] for i in sorted(rng.sample(range(len(rows)), n))]


def _rank(seed: int, *parts) -> bytes:
    """A place in a random order that depends on the content alone."""
    return hashlib.sha256(repr((seed, *parts)).encode()).digest()


def _take(ranks: list[bytes], count: int) -> list[int]:
    """The indices of the `count` lowest ranks, in order of appearance."""
    return sorted(sorted(range(len(ranks)), key=ranks.__getitem__)[:count])


def _sampled(units: list, entry: DataEntry, seed: int) -> list:
    """`fraction:` then `rows:` of (row number, items) units, the same ones in whatever order they come."""
    count = len(units) if entry.fraction is None else max(1, round(entry.fraction * len(units)))
    count = min(count, entry.rows or count)
    if count >= len(units):
        return units
    return [units[i] for i in _take([_rank(seed, *map(content, items)) for _, items in units], count)]


def _labelled(item: Item, entry: DataEntry, source: str) -> Item:
    return replace(item, source=item.source or source, safety=item.safety or entry.safety_prompt)


_remembered: ContextVar[dict | None] = ContextVar("remembered", default=None)  # what load_entry made of every file


@contextmanager
def remembering():
    """Within it load_entry reads a local file once, by whatever path it is named; one that has changed meanwhile it reads again."""
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def load_entry(entry: DataEntry, recipe_dir: Path, seed: int, place: str) -> Loaded:
    """Read, map, convert and sample one entry. Rows at fault become findings; only a file or data set that cannot be opened raises.

    `weight:` is not applied here but to the training rows of a split, so that held-out rows are counted once."""
    path, memory = _local(entry, recipe_dir, place), _remembered.get()
    if memory is None or path is None:
        return _read_entry(entry, path, recipe_dir, seed, place)
    about = path.stat()
    key = (path.resolve(), about.st_mtime_ns, about.st_size, seed, entry.model_dump_json(exclude={"path", "weight", "bad_rows", "expect"}))
    if key not in memory:
        memory[key] = _read_entry(entry, path, recipe_dir, seed, place)
    return replace(memory[key], findings=[replace(f, file=entry.path) for f in memory[key].findings])


def _read_entry(entry: DataEntry, path: Path | None, recipe_dir: Path, seed: int, place: str) -> Loaded:
    """path: of a local file."""
    fingerprint = fingerprint_entry(entry, recipe_dir, place)
    source = entry.path if path is None else Path(path.name.removesuffix(".gz")).stem
    read, kind = FORMATS[entry.format].read, FORMATS[entry.format].kind
    units, findings, skipped, total = [], [], {}, 0
    try:
        for number, row in read_rows(path) if path else _hub_rows(entry, fingerprint, place):
            total += number is not None
            try:
                if isinstance(row, RowError):
                    raise row
                made = read(renamed(row, entry.columns))
                units.append((number, made if isinstance(made, list) else [made]))
            except RowError as e:
                findings.append(Finding("bad", e.reason, entry.path, number, str(e)))
            except Skip as e:
                skipped.setdefault(e.reason, []).append(number)
    except OSError as e:
        raise _unreadable(place, entry, e) from None
    units = [(number, [_labelled(item, entry, source) for item in items]) for number, items in _sampled(units, entry, seed)]
    return Loaded([i for _, items in units for i in items], findings, total, {k: len(v) for k, v in skipped.items()}, fingerprint, kind,
                  [number for number, items in units for _ in items], skipped)


# -- splits --------------------------------------------------------------------------------------------------------------------------


def prompt_key(item: Item) -> str:
    """What makes two rows the same question: the sha256 of the first user turn, without regard to case and spacing."""
    turns = item.prompt if isinstance(item, Pair) else item.messages
    first = next(m["content"] for m in turns if m["role"] == "user")
    return hashlib.sha256(" ".join(first.split()).casefold().encode()).hexdigest()


def first_prompts(items: list[Item], count: int, seed: int) -> list[int]:
    """The indices of `count` items, in order: those of the first prompts, in an order of prompts that the seed fixes.

    So a smaller count's are among a larger one's, and at most one prompt has some of its items in and some out."""
    return _take([hashlib.sha256(f"{seed}:{prompt_key(i)}".encode()).digest() for i in items], count)


def held_out_keys(keys: list[str], count: int, seed: int, place: str) -> frozenset[str]:
    """Whole groups of rows with one prompt, in an order fixed by the seed, until `count` rows are reached."""
    groups, chosen, taken = Counter(keys), set(), 0
    for key in sorted(groups, key=lambda k: _rank(seed, k)):
        if taken >= count:
            break
        chosen.add(key)
        taken += groups[key]
    if count and (taken > len(keys) / 2 or taken < count):
        raise PosttrainError(place, f"holding out {count} rows takes {taken} of {len(keys)} (rows that share a prompt stay together)",
                             "at most half of the rows", "Lower held_out, or add data.")
    return frozenset(chosen)


def _weighted(items: list[Item], weight: float, seed: int) -> list[Item]:
    """2: every item twice; 0.5: every second one, by a hash of its content."""
    whole = int(weight)
    part = _take([_rank(seed, "weight", content(i)) for i in items], round((weight - whole) * len(items))) if weight > whole else []
    return items * whole + [items[i] for i in part]


class DataSets:
    """The data sets of a recipe. Stops at the first row that cannot be used; `bad_rows: drop` leaves rows out, counted, instead
    (but not a file that is damaged as a whole).

    names: the sets to load (`@section` names are passed over); None: all. Sets that hold rows out are loaded in any case, because a
    prompt that one set holds out is in no set's training rows.
    fingerprints: "name[i]" -> the fingerprint of that entry, for the sets loaded."""

    def __init__(self, recipe, names: list[str] | None = None):
        self.recipe, self.seed = recipe, recipe.run.seed
        wanted = list(recipe.data_sets) if names is None else [n for n in names if not n.startswith("@")]
        needed = [n for n in recipe.data_sets if n in wanted or self._wish(n)]
        self._loaded: dict[str, list[Loaded]] = {name: self._load(name) for name in needed}
        self._stop_at_bad_rows()
        self.fingerprints = {f"{n}[{i}]": part.fingerprint for n, parts in self._loaded.items() for i, part in enumerate(parts)}
        self._keys = {n: [[prompt_key(item) for item in part.items] for part in parts] for n, parts in self._loaded.items()}
        self._held = {name: self._hold_out(name) for name in self._loaded}
        self.held_out_keys: frozenset[str] = frozenset().union(*self._held.values())

    def _place(self, name: str) -> str:
        return f"{self.recipe.path}: data.{name}"

    def _kind(self, name: str) -> str:
        kinds = list(dict.fromkeys(FORMATS[e.format].kind for e in self.recipe.data_sets[name]))
        if len(kinds) != 1:
            raise PosttrainError(self._place(name), f"mixes {' and '.join(k + 's' for k in kinds)}" if kinds else "names no entry",
                                 "entries of one kind", "Make a data set of each kind.")
        return kinds[0]

    def _wish(self, name: str) -> int:
        """How many rows of a data set the recipe wants held out."""
        return getattr(self.recipe.held_out, HELD_OUT_FIELD[self._kind(name)])

    def _load(self, name: str) -> list[Loaded]:
        recipe_dir = Path(self.recipe.path).parent
        entries = enumerate(self.recipe.data_sets[name])
        return [load_entry(entry, recipe_dir, self.seed, f"{self._place(name)}[{i}]") for i, entry in entries]

    def _stop_at_bad_rows(self) -> None:
        bad = [(name, i, finding) for name, parts in self._loaded.items() for i, part in enumerate(parts)
               for finding in part.findings if finding.row is None or self.recipe.data_sets[name][i].bad_rows == "stop"]
        if bad:
            name, i, first = bad[0]
            where = f"{self._place(name)}[{i}], file {first.file}" + (f", row {first.row}" if first.row else "")
            raise PosttrainError(where, first.detail, "", f"{len(bad)} bad row{'s' * (len(bad) != 1)} in all; "
                                 f"`python -m posttrain check-data {self.recipe.path}` shows them all, bad_rows: drop leaves them out.")
        for name, parts in self._loaded.items():
            if not any(part.items for part in parts):
                raise PosttrainError(self._place(name), f"no usable row ({sum(part.rows for part in parts)} read)", "at least one", "Check the files.")

    def _hold_out(self, name: str) -> frozenset[str]:
        return held_out_keys([key for keys in self._keys[name] for key in keys], self._wish(name), self.seed, self._place(name))

    def split(self, name: str) -> Split:
        """The rows of one data set: `train` in the order of its entries and files (not shuffled), `held_out` likewise."""
        train, held_out, removed = [], [], 0
        for entry, part, keys in zip(self.recipe.data_sets[name], self._loaded[name], self._keys[name], strict=True):
            held_out += [item for item, key in zip(part.items, keys, strict=True) if key in self._held[name]]
            free = [item for item, key in zip(part.items, keys, strict=True) if key not in self.held_out_keys]
            removed += sum(key in self.held_out_keys and key not in self._held[name] for key in keys)
            train += _weighted(free, entry.weight, self.seed)
        parts = self._loaded[name]
        counts = {"rows": sum(p.rows for p in parts), "kept": sum(len(p.items) for p in parts), "bad": sum(len(p.findings) for p in parts),
                  "skipped": dict(sum((Counter(p.skipped) for p in parts), Counter())), "held_out": len(held_out), "removed": removed,
                  "train": len(train), "by_source": dict(Counter(item.source for item in train))}
        return Split(train, held_out, parts[0].kind, counts)

    def without_held_out(self, items: list[Item]) -> list[Item]:
        """Items of another origin (a section's output) that training may see."""
        return [item for item in items if prompt_key(item) not in self.held_out_keys]
