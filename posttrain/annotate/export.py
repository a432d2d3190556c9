"""From annotations to data: preference pairs in the native format by batch and kind with a held-out share, rows for the section `annotations`,
demonstrations from ideal answers, the red team's prompts, ratings, and Label Studio's form of all comparisons.

Pairs are made as rlhf/annotations.py makes them: of several annotators the majority's choice, the median of its ratings, the bin that most of it
gave. folder.py writes the files.
"""

import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from sqlalchemy import select

from posttrain.annotate import figures, folder, labelstudio
from posttrain.annotate.figures import LEVELS, Judgement
from posttrain.annotate.kinds import VIOLATION
from posttrain.annotate.store import Store, queues
from posttrain.data import held_out_keys, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Annotation, Prompt
from posttrain.runs import digest

REPORT = "report.json"


def export(store: Store, out: Path, held_out: int = 0, batches: list[str] | None = None, seed: int = 0) -> dict[str, int]:
    """Write the batches' files, and report.json, into the folder `out`. held_out: pairs of every batch and kind that go into a file of their own,
    whole prompts together; a prompt that one batch holds out is in no batch's training files. batches: these alone; files of others that an
    earlier export wrote there stay. Returns the rows by file.

    Raises PosttrainError for a batch that is not there, where too much would be held out, and where a file that no export wrote is in the way.
    """
    with store.read() as c:
        rows = c.execute(select(queues).order_by(queues.c.id)).mappings().all()
        known = {q["id"]: figures.judged(c, q["id"]) for q in rows}
    found = [(q["batch"], q["kind"], known[q["id"]]) for q in rows]
    if missing := [b for b in batches or [] if b not in {batch for batch, _, _ in found}]:
        raise PosttrainError(f"--batch {missing[0]}", "no such batch", f"one of {', '.join(dict.fromkeys(b for b, _, _ in found)) or 'none yet'}",
                             "Check the name.")
    pairs = {(batch, kind): pairs_of(judgements, batch) for batch, kind, judgements in found if kind in ("helpfulness", "safety")}
    kept = held(pairs, held_out, seed)
    files: dict[str, list] = {}
    batch_of: dict[str, str] = {}
    for batch, kind, judgements in found:
        if not batches or batch in batches:
            for name, made in files_of(batch, kind, judgements, pairs.get((batch, kind), []), kept).items():
                files[name], batch_of[name] = files.get(name, []) + made, batch
    texts = {name: as_lines(made) if name.endswith(".jsonl") else as_json(made) for name, made in files.items()}
    folder.write(out, texts | {REPORT: as_json(figures.report(store, known))}, batch_of, digest(store.facts["seed"])[:16], batches,
                 digest(sorted(kept)))
    return {name: len(made) for name, made in files.items()}


def files_of(batch: str, kind: str, found: list[Judgement], pairs: list[dict], kept: set[str]) -> dict[str, list]:
    """Name -> rows of one batch and kind, no name without a row. kept: the keys of the prompts that are held out; rows about them that training
    would read go into files of their own. Records of what people said stay whole."""
    name, out = f"{batch}.{kind}", {}

    def split(what: str, rows: list[dict], keys: Iterable[str]) -> None:
        for row, key in zip(rows, keys, strict=True):
            out.setdefault(f"{what}.held_out.jsonl" if key in kept else f"{what}.jsonl", []).append(row)

    if kind in ("helpfulness", "safety"):
        ideal = [j for j in found if j.turn.ideal]
        first = [j for j in found if j.state.content.get("collected") and j.number == 0]
        split(f"{name}.pairs", pairs, [prompt_key(Prompt(p["prompt"])) for p in pairs])
        split(f"{name}.demonstrations", demonstrations(ideal, batch), [j.key for j in ideal])
        split(f"{batch}.annotations", annotations(first), [j.key for j in first])
        out[f"{name}.label-studio.json"] = labelstudio.completed(found)
    else:
        out[f"{name}.jsonl"] = {"redteam": dialogues, "compare": preferences, "rate": ratings}[kind](found)
        if kind == "redteam":
            split(f"{name}.prompts", attacks(found, batch), [j.key for j in found])
    return {n: rows for n, rows in out.items() if rows}


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_json(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def pairs_of(found: list[Judgement], source: str) -> list[dict]:
    """Rows of the format `preference`: a pair for every turn, and one for every ideal answer before the chosen one, without a rating."""
    made = import_module("rlhf.annotations")
    out = []
    for group in figures.several(found).values():
        winners = made.majority([annotation(j) for j in group])
        if winners:
            j = group[0]
            task = {"id": j.task, "prompt": j.turn.prompt, "answer_a": j.turn.answers[0]["text"], "answer_b": j.turn.answers[1]["text"],
                    "is_safety": j.state.kind.name == "safety"}
            key = {side: {"variant": a["model"]} for side, a in zip("ab", j.turn.answers, strict=True)}
            out += [p | {"turn": j.number} for p in made.pairs_of(task, key, winners, source)]
    return out


def annotation(j: Judgement) -> Annotation:
    side, degree = j.turn.values["choice"]
    return Annotation(j.task, side, degree, j.turn.values.get("bin"), j.turn.ideal, j.annotator)


def held(pairs: dict[tuple[str, str], list[dict]], count: int, seed: int) -> set[str]:
    """The prompts held out: of every batch and kind enough for `count` pairs, those first that another one holds out already."""
    out: set[str] = set()
    for (batch, kind), rows in pairs.items():
        keys = [prompt_key(Prompt(p["prompt"])) for p in rows]
        there = [k for k in keys if k in out]
        if count > len(there) and rows:
            rest = [k for k in keys if k not in out]
            out |= held_out_keys(rest, count - len(there), seed, f"--held-out, {batch} {kind}")
    return out


def annotations(found: list[Judgement]) -> list[dict]:
    """What a section `annotations` reads. found: judgements of first turns of tasks of a collect section, whose id it knows."""
    out = []
    for said in map(annotation, found):
        row = {"id": said.id, "choice": said.choice, "rating": LEVELS[said.rating], "annotator": said.annotator}
        out.append(row | {k: v for k, v in (("safety", said.safety), ("edited", said.edited)) if v})
    return out


def demonstrations(found: list[Judgement], source: str) -> list[dict]:
    """Ideal answers as conversations to imitate, loss on the ideal answer alone. found: judgements with one."""
    return [{"messages": [*j.turn.prompt, {"role": "assistant", "content": j.turn.ideal}], "loss": "last", "source": source,
             "safety": j.state.kind.name == "safety", "annotator": j.annotator} for j in found]


def dialogues(found: list[Judgement]) -> list[dict]:
    """A red team's dialogues with their labels."""
    return [{"task": j.task, "dialogue": [*j.turn.prompt, {"role": "assistant", "content": j.turn.answers[0]["text"]}], **j.turn.values,
             "violation": j.turn.values["degree"] >= VIOLATION, "model": j.turn.answers[0]["model"], "turns": j.number + 1, "annotator": j.annotator,
             "seconds": round(j.seconds, 1)} for j in found]


def attacks(found: list[Judgement], source: str) -> list[dict]:
    """The same as prompts, up to the last answer: for rejection sampling, collect, distillation and evaluation."""
    return [{"prompt": j.turn.prompt, "safety": True, **j.turn.values, "violation": j.turn.values["degree"] >= VIOLATION, "source": source}
            for j in found]


def preferences(found: list[Judgement]) -> list[dict]:
    """Points of the first answer, 1 to 7."""
    return [{"task": j.task, "prompt": j.turn.prompt, "answers": [a["text"] for a in j.turn.answers], "models": [a["model"] for a in j.turn.answers],
             "preference": j.turn.values["preference"], "annotator": j.annotator} for j in found]


def ratings(found: list[Judgement]) -> list[dict]:
    return [{"task": j.task, "prompt": j.turn.prompt, "answer": j.turn.answers[0]["text"], "model": j.turn.answers[0]["model"],
             "rating": j.turn.values["rating"], "annotator": j.annotator} for j in found]
