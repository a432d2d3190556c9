"""The way back from annotators: their choices joined with the tasks and the key of a collect section are preference pairs (paper 3.2.1).

Every row of an annotations file that cannot be used is a finding with its file and number. No torch here: the stage and the command
`python -m posttrain annotations` answer at once.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low

from posttrain import lint
from posttrain.data import Finding, file_kind, held_out_keys, prompt_key, read_rows
from posttrain.errors import PosttrainError
from posttrain.formats import RATINGS, SAFETY_BINS, Annotation, Prompt, RowError, Skip, annotation, show
from posttrain.log import read_lines, say
from posttrain.runs import Section, write_lines
from posttrain.statistics import interval

LEVELS = {level: name for name, level in RATINGS.items()}


@dataclass
class Joined:
    """pairs: rows of the format `preference`, in the tasks' order; findings: what cannot be used; rows: read; told: counts and shares."""

    pairs: list[dict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    rows: int = 0
    told: dict = field(default_factory=dict)


def run(section: Section) -> None:
    config = section.config
    joined = join(section.parent(config.tasks).folder / "tasks.jsonl", [section.file(name) for name in config.annotations], section.name,
                  config.safety)
    if joined.findings:
        first = joined.findings[0]
        raise PosttrainError(f"{section.place}, file {first.file}, row {first.row}", first.detail, "",
                             f"{len(joined.findings)} bad rows in all; `python -m posttrain annotations` shows them all.")
    if not joined.pairs:
        raise PosttrainError(f"{section.place}.annotations", f"no pair from {joined.rows} rows", "at least one task with a choice",
                             "Check the files, and whether the tasks are of the kind that `safety` asks for.")
    keys = [prompt_key(Prompt(p["prompt"])) for p in joined.pairs]
    held = held_out_keys(keys, config.held_out, section.seed, f"{section.place}.held_out")
    write_pairs(section.folder / "data.jsonl", [p | {"held_out": key in held} for p, key in zip(joined.pairs, keys, strict=True)])
    section.finish(joined.told | {"held_out": sum(key in held for key in keys)})
    section.log.say(words(joined.told))


def command(tasks: Path, files: list[Path], out: Path) -> int:
    """`python -m posttrain annotations`: write the pairs, show what is wrong. Returns the exit code."""
    joined = join(tasks, files, tasks.resolve().parent.name)
    write_pairs(out, joined.pairs)
    say(lint.render(lint.Report(str(tasks), [], joined.findings, joined.rows, len(joined.findings))))
    say(f"{words(joined.told)}, in {out}")
    return bool(joined.findings)


def write_pairs(path: Path, pairs: list[dict]) -> None:
    write_lines(path, pairs)


def words(told: dict) -> str:
    return (f"{told['pairs']} pairs from {told['annotations']} annotations of {told['annotated_tasks']} of {told['tasks']} tasks; "
            f"left out: {told['ties']} without a majority, {told['replaced']} replaced by the same annotator")


def join(tasks: Path, files: list[Path], source: str, safety: bool | None = None) -> Joined:
    """tasks: a collect section's tasks.jsonl, whose key lies beside it. source: the name of the pairs' origin. safety: true, safety tasks
    alone count; false, the others alone."""
    known, key = (_by_id(p) for p in (tasks, tasks.with_name("key.jsonl")))
    if known.keys() != key.keys():
        raise PosttrainError(str(tasks), f"{len(known)} tasks that are not those of key.jsonl beside it", "the two files of one collect section",
                             "Name the tasks.jsonl in that section's folder.")
    out, votes, count = Joined(), {}, Counter()
    for file in files:
        for number, row in _rows(file):
            out.rows += number is not None
            try:
                said = _read(row, known)
            except RowError as e:
                out.findings.append(Finding("bad", e.reason, str(file), number, str(e)))
            except Skip:
                count["empty"] += 1
            else:
                if safety not in (None, known[said.id]["is_safety"]):
                    continue
                count["annotations"] += 1
                who = said.annotator or (file, number)  # of one annotator's rows on a task the last counts; those without a name all count
                count["replaced"] += who in votes.setdefault(said.id, {})
                votes[said.id][who] = said
    wanted = [i for i, task in known.items() if safety in (None, task["is_safety"])]
    decided = {i: winners for i in wanted if i in votes and (winners := majority(list(votes[i].values())))}
    for i, winners in decided.items():
        out.pairs += pairs_of(known[i], key[i], winners, source)
    out.told = {"tasks": len(wanted), "annotations": count["annotations"], "empty_rows": count["empty"], "bad_rows": len(out.findings),
                "replaced": count["replaced"], "annotated_tasks": len(votes), "ties": len(votes) - len(decided), "pairs": len(out.pairs),
                **summary(out.pairs, known, key, decided)}
    return out


def _by_id(path: Path) -> dict[str, dict]:
    if not path.is_file():
        raise PosttrainError(str(path), "no such file", "tasks.jsonl and key.jsonl of a collect section",
                             "Name the tasks.jsonl in that section's folder.")
    return {row["id"]: row for row in read_lines(path)}


def _rows(file: Path):
    if not file.is_file() or file_kind(file) is None:
        raise PosttrainError(str(file), "no file of annotations", "a .jsonl, .json, .csv or .parquet file", "Check the path.")
    return read_rows(file)


def _read(row: dict | RowError, tasks: dict[str, dict]) -> Annotation:
    if isinstance(row, RowError):
        raise row
    said = annotation(row)
    if said.id not in tasks:
        raise RowError("unknown_task", f"'id' is {show(said.id)}", "the id of one of the tasks", "These may be annotations of other tasks")
    return said


def majority(votes: list[Annotation]) -> list[Annotation]:
    """The annotations on the side that most chose; none for a tie."""
    a = [v for v in votes if v.choice == "a"]
    b = [v for v in votes if v.choice == "b"]
    return [] if len(a) == len(b) else max(a, b, key=len)


def pairs_of(task: dict, key: dict, winners: list[Annotation], source: str) -> list[dict]:
    """A task's pair and, for every edit of the chosen answer, the edit before it, without a rating.

    rating: the winners' median, the lower one of two. Safety labels: those of the bin that more than half of the winners give."""
    side, other = (winners[0].choice, "b" if winners[0].choice == "a" else "a")
    bins = Counter(w.safety for w in winners)
    top, count = bins.most_common(1)[0]
    safe = SAFETY_BINS[top] if top is not None and 2 * count > len(winners) else (None, None)
    chosen, rejected = task[f"answer_{side}"], task[f"answer_{other}"]
    common = {"source": source, "safety": task["is_safety"], "task": task["id"]}
    out = [{"prompt": task["prompt"], "chosen": chosen, "rejected": rejected, "rating": LEVELS[median_low(w.rating for w in winners)],
            "chosen_safe": safe[0], "rejected_safe": safe[1], "chosen_model": key[side]["variant"], "rejected_model": key[other]["variant"],
            "annotators": len(winners), **common}]
    edits = dict.fromkeys(w.edited for w in winners if w.edited and w.edited not in (chosen, rejected))
    return out + [{"prompt": task["prompt"], "chosen": edit, "rejected": chosen, "edited": True, **common} for edit in edits]


def summary(pairs: list[dict], tasks: dict, key: dict, decided: dict[str, list[Annotation]]) -> dict:
    """Ratings, safety bins, each variant's share of wins with its interval over prompts, and how often a reward model's higher score
    was the annotators' choice too (on the tasks of its own side)."""
    compared = [p for p in pairs if "edited" not in p]
    groups = [prompt_key(Prompt(p["prompt"])) for p in compared]
    names = {value: name for name, value in SAFETY_BINS.items()}
    bins = Counter(names.get((p["chosen_safe"], p["rejected_safe"]), "no bin") for p in compared if p["safety"])
    variants = sorted({k[side]["variant"] for k in key.values() for side in "ab"})
    out = {"ratings": dict(Counter(p["rating"] for p in compared)), "safety_bins": dict(bins), "edited": len(pairs) - len(compared),
           "wins": {v: interval([float(p["chosen_model"] == v) for p in compared], groups) for v in variants} if compared else {}, "agreement": {}}
    for model in ("helpfulness", "safety"):
        seen = [i for i in decided if model in key[i]["a"] and tasks[i]["is_safety"] == (model == "safety")]
        right = [float((key[i]["a"][model] > key[i]["b"][model]) == (decided[i][0].choice == "a")) for i in seen]
        if right:
            out["agreement"][model] = interval(right, [prompt_key(Prompt(tasks[i]["prompt"])) for i in seen])
    return out
