"""Run folders: fingerprints, references between sections, what is done, what changed, what goes on.

runs/<run>/<section>/ holds config.yaml, manifest.json, metrics.jsonl, samples.jsonl, checkpoints, the output and DONE, which is
written last and atomically. A section is skipped when DONE names its fingerprint: the hash of everything that can change its
result (its configuration, the model, the rows of its data, its parents' fingerprints, the seed). A finished section's manifest has the
checksum of every file: one that is no longer what was written is named before anything reads it.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from posttrain import config as cfg
from posttrain import distributed, stopping
from posttrain.errors import PosttrainError
from posttrain.log import Log, duration, read_lines, say
from posttrain.stages import STAGES, load_module

FORMAT = 1  # of the run folder; raised when an older folder can no longer be continued
LEFTOVERS = ("checkpoint-*", "best-*", "*.tmp")  # what a finished section no longer needs
UNCHECKED = {"manifest.json", "DONE", "README.md", "tasks.csv"}  # they check themselves; a person edits or fills them in
LARGE = 64 << 20  # bytes: larger files of a section that is only skipped are checked by their size
NOT_PART_OF_THE_RESULT = {"save_steps", "save_total_limit"}


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or nothing, durable before the name appears. Of several processes one writes. What stands at NAME.tmp is removed: a link
    there is not followed."""
    if not distributed.is_main():
        return
    tmp = path.with_name(path.name + ".tmp")
    tmp.unlink(missing_ok=True)
    with tmp.open("x", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    tmp.replace(path)


def write_json(path: Path, value) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n")


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise PosttrainError(str(path), f"damaged ({e})", "the JSON this program wrote",
                             "Delete the section's folder; it will be made again.") from None


def read_manifest(folder: Path) -> dict:
    """A section's manifest, {} where there is none. Raises PosttrainError where it is not what was written, or of a format that is not FORMAT."""
    path = folder / "manifest.json"
    manifest = read_json(path)
    written = manifest.pop("sha256", None) if isinstance(manifest, dict) else ""  # absent in folders of earlier versions
    if (written is not None and written != digest(manifest)) or (path.exists() and not manifest):
        raise PosttrainError(str(path), "damaged (it is not what was written)", "the JSON this program wrote",
                             "Put a copy of it back, or delete the section's folder; it will be made again.")
    found = manifest.get("inputs", {}).get("format", FORMAT)
    if found != FORMAT:
        by = f" with the version that began it{f' (commit {commit})' if (commit := manifest.get('commit')) else ''}"
        raise PosttrainError(str(folder), f"a run folder of format {found}, {'newer' if found > FORMAT else 'older'} than this program's",
                             f"format {FORMAT}", f"Go on{by}, or set run.name=OTHER and run it anew.")
    return manifest


def is_done(folder: Path, fingerprint: str) -> bool:
    """Whether a section's DONE names the fingerprint. One that is damaged names none."""
    done = folder / "DONE"
    return done.exists() and done.read_bytes().strip() == str(fingerprint).encode()


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def flatten(prefix: str, value) -> dict:
    """Nested configuration -> {'a.b[0].c': value}."""
    if isinstance(value, dict):
        return {k2: v2 for k, v in value.items() for k2, v2 in flatten(f"{prefix}.{k}" if prefix else str(k), v).items()}
    if isinstance(value, list):
        return {k2: v2 for i, v in enumerate(value) for k2, v2 in flatten(f"{prefix}[{i}]", v).items()}
    return {prefix: value}


def folder_digest(path: Path) -> str:
    """Of a local model folder: names, sizes and both ends of every file; fast for many gigabytes."""
    h = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        size = file.stat().st_size
        h.update(f"{file.name}:{size}".encode())
        with file.open("rb") as f:
            h.update(f.read(1 << 16))
            f.seek(max(0, size - (1 << 16)))
            h.update(f.read(1 << 16))
    return h.hexdigest()


@dataclass
class Section:
    """One stage of one run, as its module sees it."""

    run: "Run"
    name: str
    config: cfg.StageConfig
    manifest: dict = field(default_factory=dict)
    at_end: list = field(default_factory=list)  # called when its stage has ended, however it ended

    @property
    def kind(self) -> str:
        return self.config.stage

    @property
    def recipe(self) -> cfg.Recipe:
        return self.run.recipe

    @property
    def seed(self) -> int:
        return self.recipe.run.seed

    @property
    def folder(self) -> Path:
        return self.run.folder / self.name

    @property
    def place(self) -> str:
        return f"{self.recipe.path}: stages.{self.name}"

    @cached_property
    def log(self) -> Log:
        return Log(self.folder, self.name)

    def parent(self, ref: str) -> "Section":
        """The section that '@name' names."""
        return self.run.section(ref.removeprefix("@"))

    def data_names(self) -> list[str]:
        """The data sets and '@section' outputs that the section reads, each once."""
        return list(dict.fromkeys(name for names in cfg.fields_referring_to(self.config, "data").values() for name in names))

    def evaluated(self, field: str, kind: str) -> list:
        """The rows of the data sets that a key names: those kept from training, or all with `held_out: false`. kind: 'prompts', 'demonstrations'.
        Raises PosttrainError where there is none."""
        found = []
        for name in getattr(self.config, field):
            split = self.run.data_of(name)
            found += split.held_out if self.config.held_out else [*split.train, *split.held_out]
        if not found:
            raise PosttrainError(f"{self.place}.{field}", f"no held-out {kind}", "some",
                                 f"Set data.held_out.{kind}, or held_out: false for a set made for evaluation.")
        return found

    def check_deviations(self, helpfulness: str, safety: str, ready: bool) -> None:
        """Raise PosttrainError where standardize_rewards meets a reward model without a mean and deviation of held-out scores. ready: as in
        StageConfig.check."""
        if not self.config.standardize_rewards:
            return
        for name, ref in (("helpfulness", helpfulness), ("safety", safety)):
            if ref == "base":
                continue
            if ready or not ref.startswith("@"):
                folder = self.parent(ref).folder if ref.startswith("@") else Path(ref).expanduser().parent
                known, words = read_json(folder / "results.json").get("score_std"), f"{folder.name} has"
            else:  # what the section will hold out, where that is rows of data sets
                own, words = getattr(self.recipe.stages[ref[1:]], "own", ["@"]), f"{ref[1:]} will have"
                known = any(n.startswith("@") or self.run.data_of(n).held_out for n in own)
            if not known:
                raise PosttrainError(f"{self.place}.standardize_rewards", f"the {name} model in {words} no mean and deviation of held-out scores",
                                     "reward models trained with held-out pairs of their own",
                                     "Set data.held_out.pairs, or standardize_rewards: false.")

    def count_rows(self) -> None:
        """Say what is left out of the section's data, and keep the counts in the manifest."""
        self.manifest["rows"] = {name: self.run.data_of(name).counts for name in self.data_names()}
        self.save_manifest()
        for name, counts in self.manifest["rows"].items():
            if words := left_out(counts):
                self.log.say(f"left out of {name}: {words}")

    def results(self) -> dict:
        """What the section measured, as `finish` stored it."""
        return read_json(self.folder / "results.json")

    def file(self, name: str) -> Path:
        """A file that the configuration names: in the recipe's folder, else in the working directory. It may come into being as a run goes on."""
        tried = [Path(self.recipe.path).parent / name, Path(name)]
        found = next((p for p in tried if p.is_file()), None)
        if found is None:
            raise PosttrainError(self.place, f"no file '{name}' yet", f"it at {' or '.join(dict.fromkeys(str(p) for p in tried))}",
                                 "Put it there and run the same command again: it goes on from here.")
        return found

    def decide(self, key: str, choose):
        """A choice made by clock, machine or free memory: made once, kept in the manifest, the same after a resume."""
        decisions = self.manifest.setdefault("decisions", {})
        if key not in decisions:
            decisions[key] = distributed.from_main(choose)
            self.save_manifest()
        return decisions[key]

    def inexact(self, why: str) -> None:
        """Say and store that bit-identity with an uninterrupted run is off: in the manifest, or beside it where another process writes that one."""
        if self.manifest.get("exact", True):
            say(f"  note: {why}; the result may differ in the last bits from an uninterrupted run")
        self.manifest["exact"] = False
        self.manifest.setdefault("inexact_because", []).append(why)
        if distributed.leads():
            self.save_manifest()
            return
        with (self.folder / f".inexact-{distributed.number()}").open("a", encoding="utf-8") as f:
            f.write(json.dumps(why) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def take_reasons(self) -> None:
        """Into the manifest, what other processes wrote beside it: those of a run that was killed before they could `settle` too."""
        if not (paths := sorted(self.folder.glob(".inexact-*")) if distributed.leads() else []):
            return
        told = self.manifest.get("inexact_because", [])
        self.manifest |= {"exact": False, "inexact_because": list(dict.fromkeys([*told, *(why for path in paths for why in read_lines(path))]))}
        self.save_manifest()
        for path in paths:
            path.unlink()

    def settle(self, key: str) -> int | None:
        """After the processes decided a number each for itself: the smallest, from now on in all. The manifest has it, and every reason. All call it."""
        told = distributed.gather((self.manifest.get("decisions", {}).get(key), self.manifest.get("inexact_because", [])))
        found = [number for number, _ in told if number is not None]
        if found:
            self.manifest.setdefault("decisions", {})[key] = min(found)
        for why in dict.fromkeys(why for _, reasons in told for why in reasons):
            if why not in self.manifest.get("inexact_because", []):
                self.inexact(why)
        self.save_manifest()
        return min(found, default=None)

    def same_processes(self) -> None:
        """Additions over another number of processes round differently."""
        if (before := self.decide("processes", distributed.world)) != distributed.world():
            self.inexact(f"begun with {before} process(es), it goes on with {distributed.world()}")

    def save_manifest(self) -> None:
        if not distributed.leads():
            return
        as_read = json.loads(json.dumps(self.manifest))
        write_json(self.folder / "manifest.json", as_read | {"sha256": digest(as_read)})

    def checksums(self) -> dict[str, list]:
        """{name: [bytes, sha256]} of every file that must stay as it is, now that all are written."""
        found = sorted((Path(at) / name).relative_to(self.folder) for at, _, names in os.walk(self.folder) for name in names)
        kept = [p for p in found if p.name not in UNCHECKED and not any(part.startswith(".") for part in p.parts)
                and not any(fnmatch(p.parts[0], pattern) for pattern in LEFTOVERS)]
        return {str(p): [(self.folder / p).stat().st_size, file_digest(self.folder / p)] for p in kept}

    def damage(self, whole: bool) -> list[tuple[Path, str]]:
        """The files of a finished section that are not what was written, and what is wrong with them. whole: read large ones too."""
        out = []
        for name, (size, told) in read_manifest(self.folder).get("files", {}).items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found is None or found != size:
                out.append((path, "missing" if found is None else "empty" if not found else f"damaged ({found} bytes of {size})"))
            elif (whole or size <= LARGE) and file_digest(path) != told:
                out.append((path, "damaged (its checksum differs)"))
        return out

    def check_files(self, whole: bool = False) -> None:
        """Raise PosttrainError for a file of this finished section that is missing or not what was written. whole: read large ones too."""
        if bad := distributed.from_main(lambda: self.damage(whole)):
            (path, what), more = bad[0], f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise PosttrainError(str(path), f"{what}{more}", "the file its section wrote",
                                 f"Put a copy of it back; or delete it and {self.folder / 'DONE'}: the section makes again what is absent.")

    def mended(self) -> bool:
        """Whether DONE alone is damaged, and every other file what the finished section wrote: it is written again then."""
        if not (self.folder / "DONE").exists() or not self.manifest.get("files") or self.damage(whole=True):
            return False
        write_atomic(self.folder / "DONE", self.fingerprint + "\n")
        return True

    def inputs(self) -> dict:
        """Everything that can change the result, flat, so that a change can be named."""
        recipe = self.recipe
        out = {"run.seed": self.seed, "format": FORMAT, **flatten("model", recipe.model.model_dump(exclude={"sharding"}))}
        stage = {k: v for k, v in self.config.model_dump().items() if k not in NOT_PART_OF_THE_RESULT}
        out |= flatten(f"stages.{self.name}", stage)
        out |= {f"stages.{self.name}.{k} in this order": list(v) for k, v in stage.items() if isinstance(v, dict)}  # the first model is the baseline
        for name in (n for n in self.data_names() if not n.startswith("@")):
            out |= self.run.data_inputs(name)
        for value in cfg.fields_referring_to(self.config, "model").values():
            out |= self.run.model_inputs(value)
        for names in cfg.fields_referring_to(self.config, "file").values():
            out |= {f"{n}: files": file_digest(self.file(n)) for n in names}
        out |= {f"{p.name}: files": file_digest(p) for p in self.config.resources()}
        for ref in dict.fromkeys(cfg.references(self.config.model_dump())):
            out[f"section {ref}"] = self.run.section(ref).fingerprint
        return out

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.inputs())

    def state(self) -> str:
        """'done', 'changed', 'started' or 'new'."""
        manifest = read_manifest(self.folder)
        if not manifest:
            return "new"
        if manifest.get("fingerprint") != self.fingerprint:
            return "changed"
        return "done" if is_done(self.folder, self.fingerprint) else "started"

    def changes(self) -> list[str]:
        """Which inputs differ from those of the folder on disk, in words."""
        old, new = read_json(self.folder / "manifest.json").get("inputs", {}), self.inputs()
        out = []
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                if key.startswith("section ") or key.endswith(("rows in training", "rows held out", "files")):
                    out.append(f"{key} changed")
                else:
                    out.append(f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
        return out

    def finish(self, results: dict) -> None:
        """Store what was measured and mark the section done."""
        write_json(self.folder / "results.json", results)
        self.manifest["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.manifest["seconds"] = round(self.manifest.get("seconds", 0) + time.time() - self.run.clock, 1)
        self.take_reasons()
        self.manifest["files"] = distributed.from_main(self.checksums)
        self.save_manifest()
        write_atomic(self.folder / "DONE", self.fingerprint + "\n")
        self.drop_leftovers()
        distributed.wait()

    def drop_leftovers(self) -> None:
        """A finished section's checkpoints and half-written folders: its output holds what is needed."""
        for pattern in LEFTOVERS if distributed.is_main() else ():
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


class Run:
    """A recipe and its folder."""

    def __init__(self, recipe: cfg.Recipe):
        self.recipe = recipe
        self.folder = Path(recipe.run.dir) / recipe.run.name
        self._sections: dict[str, Section] = {}
        self.clock = time.time()

    @cached_property
    def data(self):
        """The recipe's data sets, split once for all sections."""
        from posttrain.data import DataSets

        return DataSets(self.recipe)

    def section(self, name: str) -> Section:
        if name not in self._sections:
            section = Section(self, name, self.recipe.stages[name])
            section.manifest = read_manifest(section.folder)
            self._sections[name] = section
        return self._sections[name]

    def data_of(self, name: str):
        """The Split of a data set, or of the demonstrations, pairs or prompts that a section made ('@name'). Held-out prompts never come back."""
        if not name.startswith("@"):
            return self.data.split(name)
        from posttrain.data import Split, load_entry

        folder = self.section(name[1:]).folder
        form = {"pairs": "preference", "prompts": "prompt"}.get(STAGES[self.section(name[1:]).kind].makes, "messages")
        loaded = load_entry(cfg.DataEntry(path=str((folder / "data.jsonl").resolve()), format=form), folder, self.recipe.run.seed,
                            f"{self.recipe.path}: stages.{name[1:]}")
        if loaded.findings:
            raise PosttrainError(str(folder / "data.jsonl"), f"row {loaded.findings[0].row}: {loaded.findings[0].detail}", "the rows its section wrote",
                                 "Delete the section's folder; it will be made again.")
        held_out = [i for i in loaded.items if i.meta.get("held_out") is True]
        items = [i for i in loaded.items if i.meta.get("held_out") is not True]
        train = self.data.without_held_out(items)
        counts = {"rows": loaded.rows, "kept": len(train), "bad": 0, "skipped": {}, "removed": len(items) - len(train)}
        return Split(train=train, held_out=held_out, kind=loaded.kind, counts=counts)

    def data_inputs(self, name: str) -> dict:
        entries = [{k: v for k, v in e.items() if k != "expect"} for e in self.recipe.entries_as_written(name)]
        split = self.data.split(name)
        return {**flatten(f"data.{name}", entries),
                f"data.{name}: rows in training": digest([vars(i) for i in split.train]),
                f"data.{name}: rows held out": digest([vars(i) for i in split.held_out])}

    def model_inputs(self, value: str | list | dict) -> dict:
        names = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        names = [self.recipe.model.name_or_path if n == "base" else n for n in names if isinstance(n, str) and not n.startswith("@")]
        return {f"{n}: files": folder_digest(Path(n)) for n in names if Path(n).is_dir()}

    @contextmanager
    def lock(self):
        """Two programs on one run folder exclude each other; the lock dies with its process. Of several processes one holds it."""
        if not distributed.is_main():
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = (self.folder / ".lock").open("w")
        except OSError as e:
            raise PosttrainError(str(self.folder), f"cannot be written ({e.strerror})", "a writable run folder",
                                 "Free the disk, fix the permissions, or set run.dir=OTHER_FOLDER.") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PosttrainError(str(self.folder), "another program works on this run", "one at a time",
                                 "Wait for it, stop it, or set run.name=OTHER.") from None
        try:
            yield
        finally:
            handle.close()

    def start(self, section: Section) -> None:
        """Make the section's folder ready: continue it, or set an outdated one aside and begin. Of several processes one does it."""
        section.manifest = distributed.from_main(lambda: self._start(section))

    def _start(self, section: Section) -> dict:
        state = section.state()
        if state == "changed":
            aside = self.folder / ".previous" / f"{section.name}-{section.manifest['fingerprint'][:10]}"
            if aside.exists():
                shutil.rmtree(aside)
            aside.parent.mkdir(exist_ok=True)
            section.folder.rename(aside)
            kept = self.folder / ".previous" / f"{section.name}-{section.fingerprint[:10]}"
            if kept.exists():
                kept.rename(section.folder)
            section.__dict__.pop("log", None)
            section.manifest = read_manifest(section.folder)
        section.folder.mkdir(parents=True, exist_ok=True)
        if not section.manifest:
            if left := sorted(p.name for p in section.folder.iterdir() if not p.name.endswith(".tmp") and not p.name.startswith(".")):
                raise PosttrainError(str(section.folder / "manifest.json"), f"missing, though its folder holds {', '.join(left[:3])}",
                                     "the manifest that says what these files are", "Put a copy of it back, or delete the section's folder; it will be "
                                     "made again.")
            section.manifest = {
                "kind": section.kind, "section": section.name, "fingerprint": section.fingerprint, "inputs": section.inputs(),
                "parents": {r: self.section(r).fingerprint for r in dict.fromkeys(cfg.references(section.config.model_dump()))},
                "data": {key: value for key, value in self.data.fingerprints.items() if key.rpartition("[")[0] in section.data_names()},
                "seed": section.seed, "base": {"name_or_path": self.recipe.model.name_or_path, "revision": self.recipe.model.revision},
                "started": time.strftime("%Y-%m-%dT%H:%M:%S"), "exact": True, **provenance(),
            }
            section.save_manifest()
        section.take_reasons()
        config = cfg.dump_yaml({"section": section.name, "model": self.recipe.model.model_dump(), "stage": section.config.model_dump()})
        path = section.folder / "config.yaml"
        if section.state() != "done" and (not path.exists() or path.read_bytes() != config.encode()):
            if path.exists():
                say("  config.yaml is not what the recipe says: it is written again")
            write_atomic(path, config)
        return section.manifest


def left_out(counts: dict) -> str:
    """What a Split's counts leave out, in words: '3 bad rows, 2 ties'; empty where every row is used."""
    def rows(n: int, what: str) -> str:
        return f"{n} row{'s' * (n != 1)} {what}"

    bad, removed = counts["bad"], counts["removed"]
    parts = [f"{bad} bad row{'s' * (bad != 1)}"] if bad else []
    for reason, n in counts["skipped"].items():
        parts.append(f"{n} tie{'s' * (n != 1)}" if reason == "tie" else rows(n, f"with {reason.replace('_', ' ')}"))
    return ", ".join(parts + ([rows(removed, "whose prompt is held out elsewhere")] if removed else []))


def provenance() -> dict:
    """Commit, versions and machine, for the manifest. Holds no path and no environment value."""
    try:
        root = Path(__file__).parent.parent
        commit = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
                                capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    versions = {}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "vllm"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"commit": commit, "versions": versions, "python": platform.python_version(),
            "machine": {"system": platform.system(), "processor": platform.machine(), "cores": len(os.sched_getaffinity(0))}}


@contextmanager
def _machine_faults(section: Section):
    """Tell a full or unwritable disk, and a GPU without memory, as one of our errors; torch and safetensors meet them with errors of their own."""
    try:
        yield
    except Exception as e:
        if isinstance(e, PosttrainError):
            raise
        why = e.strerror if isinstance(e, OSError) and e.errno in (28, 122, 30, 13) else None
        if any(words in str(e) for words in ("os error 28", "PytorchStreamWriter failed", "unexpected pos")):
            why = "No space left on device"
        if why:
            named = isinstance(e, OSError) and isinstance(e.filename, (str, bytes)) and Path(os.fsdecode(e.filename))
            ours = not named or named.absolute().is_relative_to(section.folder.absolute())
            found = f"cannot be {'written' if ours or e.errno != 13 else 'read or written'} ({why})"
            if isinstance(e, OSError) and e.errno in (13, 30):
                raise PosttrainError(str(section.folder if ours else named), found + (f" at {named}" if ours and named else ""),
                                     "permission and a writable disk" if ours else "access to it", "Mend its owner, permissions or mount and run "
                                     "the same command again; nothing finished is lost.") from e
            raise PosttrainError(str(section.folder if ours else named), found, "room on a writable disk",
                                 "Free some space and run the same command again; nothing finished is lost.") from e
        if type(e).__name__ == "OutOfMemoryError":  # torch's; torch is not imported here
            raise _no_memory(section, str(e)) from e
        raise


def _no_memory(section: Section, words: str) -> PosttrainError:
    keys = [k for k in ("micro_batch_tokens", "batch", "max_length", "max_new_tokens", "max_prompt_tokens") if hasattr(section.config, k)]
    more = "set activation_checkpointing: true, " if getattr(section.config, "activation_checkpointing", True) is False else ""
    lower = f"Lower {' or '.join(keys)}, " if keys else "Take a smaller model, "
    return PosttrainError(section.place, f"the GPU's memory ran out ({words.split('. ')[0].splitlines()[0][:120]})", "room for one micro-batch",
                          f"{lower}{more}or end what else uses the GPU; `python -m posttrain plan {section.recipe.path}` tells what takes how much. "
                          "The same command goes on; nothing finished is lost.")


def run_sections(run: Run, names: list[str] | None = None) -> None:
    """Walk the recipe's road: skip what is done, continue what was cut off, run what is new or changed."""
    distributed.join()
    whole = names is None
    names = cfg.order(run.recipe) if whole else names
    with run.lock():
        began = time.time()
        for section in map(run.section, names if distributed.shards(run.recipe.model) else ()):  # before the first starts: it may train for days
            if distributed.from_main(section.state) != "done":
                distributed.check_sharding(run.recipe.model, section.kind, STAGES[section.kind].sharded, section.place)
        for i, name in enumerate(names, 1):
            stopping.check_together()
            section = run.section(name)
            title = f"[{i}/{len(names)}] {name} ({section.kind})"
            for ref in cfg.references(section.config.model_dump()):
                if run.section(ref).state() != "done":
                    raise PosttrainError(section.place, f"'@{ref}' is {run.section(ref).state()}", "a finished section",
                                         f"Run it first: `python -m posttrain run {run.recipe.path}`.")
            state = distributed.from_main(section.state)
            if state == "started" and distributed.from_main(section.mended):
                say(f"{title}: DONE was damaged and is written again, all else is as it was", style="dim")
                continue
            if state == "done":
                section.check_files()
                section.drop_leftovers()  # of a run that was killed right after its last write
                say(f"{title}: done already, skipped", style="dim")
                continue
            _refuse_processes(section)
            for ref in dict.fromkeys(cfg.references(section.config.model_dump())):
                run.section(ref).check_files(whole=True)
            section.config.check(section, ready=True)
            if state == "changed":
                shown = section.changes()
                say(f"{title}: runs again, because {'; '.join(shown[:4])}{f' and {len(shown) - 4} more' if len(shown) > 4 else ''}"
                    f" (the earlier result is kept in {run.folder / '.previous'})", style="bold")
            else:
                say(f"{title}{': goes on where it was cut off' if state == 'started' else ''}", style="bold")
            with _machine_faults(section):
                run.start(section)
            if distributed.from_main(section.state) == "done":
                section.check_files()
                say("  found among the earlier results; nothing to do")
                continue
            run.clock = time.time()
            try:
                with _machine_faults(section):
                    section.count_rows()
                    load_module(section.kind).run(section)
            finally:
                while section.at_end:
                    section.at_end.pop()()
                if not (section.folder / "DONE").exists() and section.manifest:
                    section.manifest["seconds"] = round(section.manifest.get("seconds", 0) + time.time() - run.clock, 1)
                    with suppress(OSError):
                        section.save_manifest()
            say(f"  done in {duration(section.manifest['seconds'])}")
        if whole:
            what = f"All {len(names)} sections of {run.recipe.run.name} are" if len(names) > 1 else f"The one section of {run.recipe.run.name} is"
            say(f"{what} done ({duration(time.time() - began)} this time).", style="bold")


def _refuse_processes(section: Section) -> None:
    if distributed.world() > 1 and not STAGES[section.kind].processes:
        able = " and ".join(kind for kind, stage in STAGES.items() if stage.processes)
        raise PosttrainError(section.place, f"{distributed.world()} processes for a section of kind {section.kind}", f"one process ({able} take several)",
                             f"Run it first: `python -m {stage_home(section.kind)} {section.recipe.path} {section.name}`; then this command goes on.")


def sections_of(recipe: cfg.Recipe, kinds: set[str]) -> list[str]:
    return [n for n in cfg.order(recipe) if recipe.stages[n].stage in kinds]


def stage_home(kind: str) -> str:
    return STAGES[kind].module.split(".")[0]


MAKERS = {"data": "Name a rejection, gatt, distill or annotations section, or a data set.", "prompts": "Name a redteam section, or a data set of prompts.",
          "tasks": "Name a collect section.", "a model": "Name an sft, reward or ppo section."}


def preflight(run: Run, names: list[str] | None = None) -> None:
    """Everything that can be wrong and seen without loading a model: data rows, built-in packages, local model folders, references."""
    from posttrain import builtin

    recipe = run.recipe
    run.data  # noqa: B018  reads and splits every data set; raises at the first bad row
    model = recipe.model.name_or_path
    if builtin.is_builtin(model):
        builtin.check(model, f"{recipe.path}: model.name_or_path")
    elif model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise PosttrainError(f"{recipe.path}: model.name_or_path", f"no folder '{model}'", "a model folder", "Check the path.")
    if recipe.model.quantization != "none" and recipe.model.lora is None:
        raise PosttrainError(f"{recipe.path}: model.quantization", f"'{recipe.model.quantization}' without model.lora", "adapters on a quantized base",
                             "Add model.lora: {r: 16, alpha: 32}, or set quantization: none.")
    for name in names or recipe.stages:
        if getattr(recipe.stages[name], "engine", "ours") == "vllm":
            from posttrain import vllm_engine

            vllm_engine.check(recipe.model, f"{recipe.path}: stages.{name}.engine")
        if getattr(recipe.stages[name], "engine", "ours") == "server":
            from posttrain import server_engine

            server_engine.check(recipe.stages[name].servers, recipe.model, f"{recipe.path}: stages.{name}.servers")
        if getattr(recipe.stages[name], "gguf", None):
            from posttrain import gguf

            gguf.check_package(f"{recipe.path}: stages.{name}")
        fields = [(what, *item) for what in ("data", "model", "tasks") for item in cfg.fields_referring_to(recipe.stages[name], what).items()]
        for what, field_name, value in fields:
            wanted = "prompts" if field_name == "prompts" else {"data": "data", "model": "a model", "tasks": "tasks"}[what]
            for ref in cfg.references(value):
                made = STAGES[recipe.stages[ref].stage].makes
                made = {"data": "data", "pairs": "data", "prompts": "prompts", "tasks": "tasks"}.get(made, f"a {made}")
                if made != wanted:
                    raise PosttrainError(f"{recipe.path}: stages.{name}.{field_name}", f"'@{ref}' makes {made}", f"a section that makes {wanted}",
                                         MAKERS[wanted])
        recipe.stages[name].check(Section(run, name, recipe.stages[name]), ready=False)
