"""Files of tasks -> the store. What may stand in a file:

- tasks of a `collect` section (id, prompt, answer_a, answer_b, is_safety), with who wrote which answer in key.jsonl beside it;
- prompts with prepared answers (prompt, answer_a, answer_b, model_a?, model_b?, is_safety?), and `then`: the turn that follows;
- prompts with one prepared answer (prompt, answer, model?) to rate, or a dialogue of a red team;
- prompts alone, which live models answer;
- an evaluation's samples.jsonl (model, prompt, answer, ...): every answer to rate, or two models' side by side;
- any of these in the form of Label Studio's tasks ({"data": {...}}).

Every row is checked before the first one is stored.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import func, insert, select

from posttrain.annotate.kinds import KINDS
from posttrain.annotate.store import Store, pack, queues, slots, tasks, unpack
from posttrain.data import file_kind, read_rows
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS, RowError, Skip, missing_column, show
from posttrain.log import read_lines
from posttrain.runs import digest

TRUE = (True, 1, "true", "1", "yes")
NAMES = {1: ("answer",), 2: ("answer_a", "answer_b")}  # the columns of so many answers
GO_ON = ("helpfulness", "safety")  # kinds whose dialogues go on with the answer that was chosen
DEEPEST = 20  # prepared turns after the first


def read(path: Path, kind: str, between: list[str] | None = None) -> list[dict]:
    """The tasks of a file: {'id', 'kind', 'prompt': messages, 'answers': [{'text', 'model'}] or [], 'safety', 'then'?}.

    kind: one of KINDS, or 'auto': safety for rows with is_safety, else helpfulness. between: two models of an evaluation's samples. Raises
    PosttrainError at the first row that cannot be used.
    """
    if not path.is_file() or file_kind(path) is None:
        raise PosttrainError(str(path), "no file of tasks", "a .jsonl, .json, .csv or .parquet file, such as the tasks.jsonl of a collect section",
                             "Check the path.")
    rows = []
    for number, row in read_rows(path):
        if isinstance(row, RowError):
            raise _bad(path, number, row)
        rows.append((number, row["data"] if isinstance(row.get("data"), dict) and "prompt" not in row else row))
    samples = bool(rows) and all("model" in row and "answer" in row and "sample" in row for _, row in rows)
    if samples:
        rows = _samples(path, rows, kind, between)
    elif between:
        raise PosttrainError("--between", f"{path} is no evaluation's samples.jsonl", "rows with model, sample, prompt and answer",
                             "Leave --between out.")
    key = {row["id"]: row for row in read_lines(path.with_name("key.jsonl")) if isinstance(row, dict) and "id" in row}
    out, equal = [], Counter()
    for number, row in rows:
        try:
            task = _task(row, kind, key)
        except RowError as e:
            raise _bad(path, number, e) from None
        equal[task["id"]] += 1
        if samples and equal[task["id"]] > 1:  # a model that says the same twice is judged twice; the first keeps the id that a database may hold
            task["id"] = "p" + digest([task["id"], equal[task["id"]]])[:15]
        out.append(task)
    if not out:
        raise PosttrainError(str(path), "no row", "at least one task", "Check the file.")
    return out


def _bad(path: Path, number: int | None, e: RowError) -> PosttrainError:
    return PosttrainError(str(path) if number is None else f"{path}, row {number}", e.found, e.expected, e.do)


def _task(row: dict, kind: str, key: dict[str, dict]) -> dict:
    safe = row.get("is_safety", row.get("safety"))
    kind = kind if kind != "auto" else "safety" if safe in TRUE else "helpfulness"
    wanted = KINDS[kind].answers
    try:
        prompt = FORMATS["prompt"].read({"prompt": row["prompt"]}).messages if "prompt" in row else None
    except Skip as e:
        raise RowError("empty_prompt", f"'prompt' is no prompt ({e.reason})") from None
    if prompt is None:
        raise missing_column(row, "prompt")
    said = _answers(row, wanted, key.get(row.get("id")))
    known = row.get("id")
    if known is not None and (not isinstance(known, str) or not 0 < len(known) <= 60):
        raise RowError("wrong_type", f"'id' is {show(known)}", "a text of at most 60 characters")
    task = {"kind": kind, "prompt": prompt, "answers": said, "safety": safe in TRUE}
    if row.get("then"):
        if kind not in GO_ON:
            raise RowError("unknown_key", f"'then' in a {kind} task, which has one turn to judge", f"it in {' and '.join(GO_ON)} tasks alone",
                           "Give the dialogue whole: its turns as 'prompt', its last answer as the answer")
        if not said:
            raise RowError("no_answer", "'then' in a row whose own answers are not there", f"{' and '.join(NAMES[wanted])} beside it",
                           "Add the answers, or take 'then' out: live models go on by themselves")
        task["then"] = _then(row["then"], wanted)
    return {"id": known or "p" + digest([kind, prompt, said, task.get("then")])[:15], **task, "collected": known is not None and known in key}


def _answers(row: dict, wanted: int, key: dict | None = None) -> list[dict]:
    """The prepared answers, or none. Who wrote them: the key's `variant`, or the row's model_a, model_b or model."""
    names = NAMES[wanted]
    given = [n for n in names if row.get(n) not in (None, "")]
    if not given:
        return []
    out = []
    for name in names:
        if name not in given:
            raise RowError("empty_answer", f"no '{name}' beside '{given[0]}'", f"{' and '.join(names)}, or neither for live models")
        if not isinstance(row[name], str) or not row[name].strip():
            raise RowError("wrong_type", f"'{name}' is {show(row[name])}", "some text")
        side = name.partition("_")[2]
        model = (key or {}).get(side, {}).get("variant") if key else row.get(f"model_{side}" if side else "model")
        out.append({"text": _clean(row[name]), "model": str(model) if model else "unknown"})
    if wanted == 2 and out[0]["text"] == out[1]["text"]:
        raise RowError("identical_pair", "both answers are the same", "two different answers", "Remove the row")
    return out


def _then(then, wanted: int, depth: int = 1) -> dict:
    """{'a': TURN, 'b': TURN}: what follows the choice of each answer. A TURN for both may stand alone. TURN: {'message', answers, 'then'?}."""
    if not isinstance(then, dict) or depth > DEEPEST:
        raise RowError("wrong_type", f"'then' is {show(then)}", f"a turn, or one for each of a and b, at most {DEEPEST} deep")
    if "message" in then:
        then = {"a": then, "b": then}
    out = {}
    for side, turn in then.items():
        if side not in ("a", "b") or not isinstance(turn, dict) or not isinstance(turn.get("message"), str) or not turn["message"].strip():
            raise RowError("wrong_type", f"'then' has '{show(side)}'", "a and b, each with a message and its answers")
        answers = _answers(turn, wanted)
        if not answers:
            raise RowError("no_answer", "a turn of 'then' has no answers", " and ".join(NAMES[wanted]))
        out[side] = {"message": _clean(turn["message"]), "answers": answers}
        if turn.get("then"):
            out[side]["then"] = _then(turn["then"], wanted, depth + 1)
    return out


def _samples(path: Path, rows: list[tuple[int, dict]], kind: str, between: list[str] | None) -> list[tuple[int, dict]]:
    """An evaluation's answers: one a row to rate, or two models' answers to one prompt (and sample number) side by side."""
    if kind not in ("rate", "compare"):
        raise PosttrainError(str(path), "an evaluation's samples", "--task rate or --task compare", "Name the task.")
    models = list(dict.fromkeys(str(row["model"]) for _, row in rows))
    chosen = between or models
    if not set(chosen) <= set(models):
        raise PosttrainError("--between", f"'{', '.join(chosen)}'", f"models of {path}: {', '.join(models)}", "Correct the names.")
    if kind == "rate":
        return [(n, {key: row[key] for key in ("prompt", "answer", "model")}) for n, row in rows if row["model"] in chosen and row["answer"]]
    if len(chosen) != 2:
        raise PosttrainError(str(path), f"answers of {len(models)} models ({', '.join(models)})", "two of them", "Name them: --between FIRST,SECOND.")
    found = {name: {(row.get("row"), pack(row["prompt"]), row["sample"]): (n, row) for n, row in rows if row["model"] == name} for name in chosen}
    out = []
    for at, (n, row) in found[chosen[0]].items():
        other = found[chosen[1]].get(at)
        if other and row["answer"] and other[1]["answer"] and row["answer"] != other[1]["answer"]:
            out.append((n, {"prompt": row["prompt"], "answer_a": row["answer"], "answer_b": other[1]["answer"], "model_a": chosen[0],
                            "model_b": chosen[1]}))
    return out


def _clean(text: str) -> str:
    """Text that every database takes: no NUL, no half of a surrogate pair."""
    return text.replace("\0", "").encode("utf-8", "replace").decode().strip()


def written(count: int, kind: str, batch: str) -> list[dict]:
    """Tasks whose prompt the annotator writes."""
    return [{"id": "w" + digest([batch, kind, i])[:15], "kind": kind, "prompt": [], "answers": [], "safety": kind != "helpfulness",
             "collected": False}
            for i in range(count)]


def load(store: Store, batch: str, found: list[dict], raters: int | None = None, share: float = 1.0) -> dict[str, int]:
    """Put tasks into a batch; those that are there stay as they are. raters: annotators a task, by default the kind's; share: of the tasks
    that get so many (chosen by their ids), the others get one. Returns {'added', 'there'}.

    Raises PosttrainError where a task of that id is there with other content.
    """
    with store.write() as c:
        known = dict(c.execute(select(tasks.c.id, tasks.c.content)).all())
        made = {tuple(row[:2]): row[2] for row in c.execute(select(queues.c.batch, queues.c.kind, queues.c.id))}
        next_place = dict(c.execute(select(tasks.c.queue, func.max(tasks.c.place) + 1).group_by(tasks.c.queue)).all())
        new_tasks, new_slots, live = [], [], set()
        for task in found:
            content = pack({k: task[k] for k in ("kind", "prompt", "answers", "safety", "then", "collected") if k in task})
            if task["id"] in known:
                if unpack(known[task["id"]]) != unpack(content):
                    raise PosttrainError(store.place, f"holds a task {task['id']} of another kind or with other text",
                                         "the same one, or an id of its own",
                                         "Name another --db, or give the task another id.")
                continue
            known[task["id"]] = content
            where = (batch, task["kind"])
            if where not in made:
                made[where] = c.execute(insert(queues).values(batch=batch, kind=task["kind"], live=0)).inserted_primary_key[0]
            queue = made[where]
            place = next_place[queue] = next_place.get(queue, 0)
            next_place[queue] += 1
            if not task["answers"]:
                live.add(queue)
            new_tasks.append({"id": task["id"], "queue": queue, "place": place, "content": content})
            wanted = raters or KINDS[task["kind"]].raters
            several = share >= 1 or int(digest(task["id"])[:12], 16) / 16 ** 12 < share
            new_slots += [{"task": task["id"], "queue": queue, "place": place, "number": n, "state": "free"} for n in range(wanted if several else 1)]
        for rows, table in ((new_tasks, tasks), (new_slots, slots)):
            if rows:
                c.execute(insert(table), rows)
        for queue in live:
            c.execute(queues.update().where(queues.c.id == queue).values(live=1))
    return {"added": len(new_tasks), "there": len(found) - len(new_tasks)}


def count(found: Iterable[dict]) -> dict[str, int]:
    """Tasks by kind."""
    out: dict[str, int] = {}
    for task in found:
        out[task["kind"]] = out.get(task["kind"], 0) + 1
    return out
