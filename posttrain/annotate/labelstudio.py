"""Label Studio's forms: tasks and a labelling configuration for it, its completed annotations back into the store, and ours in its export form.

Which answer stands as A there is drawn from the task's id, so that no file has to remember it.
"""

import json
from pathlib import Path
from xml.sax.saxutils import quoteattr

from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from posttrain.annotate.kinds import KINDS, PREFERENCE, SAFETY, Kind, Question
from posttrain.annotate.store import Store, events, now, pack, queues, slots, tasks, unpack
from posttrain.annotate.work import clean
from posttrain.errors import PosttrainError
from posttrain.runs import digest

IDEAL = "ideal"
SUITED = ("helpfulness", "safety")  # kinds that are compared on four levels


def swapped(task: str) -> bool:
    return bool(int(digest(["label-studio", task])[:8], 16) & 1)


def names(question: Question) -> list[str]:
    """The options as Label Studio's choices; each is told from the others by its words."""
    return [f"{o.side} is {o.label}" if o.side else o.label for o in question.options]


def configuration(kind: Kind) -> str:
    """The XML of Settings, Labeling Interface."""
    lines = ["<View>", '  <Header value="Conversation"/>', '  <Text name="prompt" value="$prompt"/>']
    for side in "ab":
        lines += [f'  <Header value="Answer {side.upper()}"/>', f'  <Text name="answer_{side}" value="$answer_{side}"/>']
    for question in kind.questions:
        lines += [f"  <Header value={quoteattr(question.text)}/>",
                  f'  <Choices name="{question.name}" toName="prompt" choice="single-radio" required="true">']
        lines += [f"    <Choice value={quoteattr(name)}/>" for name in names(question)]
        lines += ["  </Choices>"]
    lines += ['  <Header value="An ideal answer (optional)"/>', f'  <TextArea name="{IDEAL}" toName="prompt" rows="6" maxSubmissions="1"/>',
              "</View>"]
    return "\n".join(lines) + "\n"


def task_of(task: str, prompt: list[dict], texts: list[str], turn: int = 0) -> dict:
    """What Label Studio shows of a task; nothing in it says who wrote an answer."""
    said = prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(f"{m['role'].upper()}: {m['content']}" for m in prompt)
    first, second = texts[::-1] if swapped(task) else texts
    return {"data": {"task": task, "turn": turn, "prompt": said, "answer_a": first, "answer_b": second}}


def to_import(found: list[dict]) -> list[dict]:
    """Tasks (as tasks.read gives them) for Label Studio's import. Raises PosttrainError for a task that it cannot show."""
    for task in found:
        if task["kind"] not in SUITED or not task["answers"] or task.get("then"):
            raise PosttrainError(f"task {task['id']}", "needs what Label Studio has no form for here",
                                 "a helpfulness or safety task with two prepared answers "
                                 "and one turn", "Use the page for it.")
    return [task_of(t["id"], t["prompt"], [a["text"] for a in t["answers"]]) for t in found]


def completed(found: list) -> list[dict]:
    """Judgements (figures.judged) in the form of its export, those of the same answers together; `annotators` says whose they are, in order."""
    groups: dict[str, list] = {}
    for j in found:
        groups.setdefault(j.same, []).append(j)
    out = []
    for group in groups.values():
        j = group[0]
        task = task_of(j.task, j.turn.prompt, [a["text"] for a in j.turn.answers], j.number)
        task["data"]["annotators"] = [j.annotator for j in group]
        out.append(task | {"annotations": [{"result": _result(j), "lead_time": round(j.seconds, 1), "was_cancelled": False} for j in group]})
    return out


def _result(j) -> list[dict]:
    def item(name: str, kind: str, value: list[str]) -> dict:
        return {"from_name": name, "to_name": "prompt", "type": kind, "value": {"choices" if kind == "choices" else "text": value}}

    said = [item(q.name, "choices", [names(q)[q.shown(j.turn.values[q.name], swapped(j.task)) - 1]]) for q in j.state.kind.questions
            if q.name in j.turn.values]
    return said + ([item(IDEAL, "textarea", [j.turn.ideal])] if j.turn.ideal else [])


def bring_in(store: Store, path: Path) -> dict[str, int]:
    """Label Studio's JSON export into the store, whose tasks it annotates. Bringing the same file in again changes nothing. Returns
    {'annotations', 'there', 'cancelled'}.

    Raises PosttrainError at the first annotation that cannot be used; nothing is stored then.
    """
    rows = _read(path)
    count = {"annotations": 0, "there": 0, "cancelled": 0}
    with store.write() as c:
        for number, row in enumerate(rows, 1):
            for a in row.get("annotations") or []:
                where = f"{path}, task {number}"
                if a.get("was_cancelled") or not a.get("result"):
                    count["cancelled"] += 1
                    continue
                count["annotations" if _one(c, row.get("data") or {}, a, where) else "there"] += 1
    return count


def _read(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise PosttrainError(str(path), f"cannot be read ({getattr(e, 'strerror', None) or 'not JSON'})", "Label Studio's export in the format JSON",
                             "Export it again, as JSON (not JSON-MIN).") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("data"), dict)
                                             and isinstance(r.get("annotations", []), list) for r in rows):
        raise PosttrainError(str(path), "is not Label Studio's export", "an array of tasks with data and annotations",
                             "Export it again, as JSON (not JSON-MIN).")
    return rows


def _one(c, data: dict, annotation: dict, where: str) -> bool:
    """Store one annotation as the events of a finished task; False where it is there already."""
    task = data.get("task")
    row = c.execute(select(tasks.c.queue, tasks.c.content, queues.c.kind).join(queues, queues.c.id == tasks.c.queue)
                    .where(tasks.c.id == str(task))).first()
    if row is None:
        raise PosttrainError(where, f"task '{task}' is not in the database", "tasks that were loaded into it",
                             "Load them first: annotate load TASKS --db ...")
    queue, content, kind = row[0], unpack(row[1]), KINDS[row[2]]
    if data.get("turn"):
        raise PosttrainError(where, "a further turn of a dialogue", "first turns", "Take it out of the file.")
    texts = [a["text"] for a in content["answers"]]
    if [data.get("answer_a"), data.get("answer_b")] != (texts[::-1] if swapped(task) else texts):
        raise PosttrainError(where, f"shows other answers than task {task} has", "the task as it was given to Label Studio",
                             "Export it from that project.")
    said = _values(kind, annotation["result"], task, where)
    who = _annotator(annotation, data)
    key = digest([task, who, annotation.get("id"), said])[:32]
    if c.execute(select(events.c.id).where(events.c.token == f"{key}-finish")).first():
        return False
    t = now()
    slot = c.execute(select(slots).where(slots.c.task == task, slots.c.annotator == who)).mappings().first()
    slot = slot or c.execute(select(slots).where(slots.c.task == task, slots.c.state == "free").order_by(slots.c.number).limit(1)).mappings().first()
    if slot and slot["state"] == "done":
        raise PosttrainError(where, f"'{who}' has another annotation of task {task} in the database", "one of each annotator",
                             "Take one of them out.")
    if slot is None:
        number = max(n for (n,) in c.execute(select(slots.c.number).where(slots.c.task == task))) + 1
        place = c.execute(select(tasks.c.place).where(tasks.c.id == task)).scalar_one()
        slot = {"id": c.execute(insert(slots).values(task=task, queue=queue, place=place, number=number, state="free")).inserted_primary_key[0]}
    try:
        c.execute(update(slots).where(slots.c.id == slot["id"]).values(
            state="done", annotator=who, until=None, began=t - float(annotation.get("lead_time") or 0), ended=t))
    except IntegrityError:
        raise PosttrainError(where, f"'{who}' is at work on task {task} on the page", "a task that nobody has open",
                             "Wait until it is finished.") from None
    shown = "ba" if swapped(task) else "ab"
    notes = [("answer", {"do": "import", "question": name, "value": value, "shown": shown}) for name, value in said.items() if name != IDEAL]
    notes += [("ideal", {"do": "import", "text": said[IDEAL]})] if said.get(IDEAL) else []
    for action, note in [*notes, ("finish", {"do": "import"})]:
        token = f"{key}-finish" if action == "finish" else f"{key}-{note.get('question', IDEAL)}"
        c.execute(insert(events).values(token=token, queue=queue, task=task, annotator=who, action=action, value=pack(note), at=t))
    return True


def _values(kind: Kind, result: list[dict], task: str, where: str) -> dict:
    given = {}
    for item in result:
        value = item.get("value") or {}
        given[item.get("from_name")] = (value.get("choices") or value.get("text") or [None])
    out = {}
    for question in kind.questions:
        chosen = given.get(question.name, [None])
        if chosen[0] not in names(question):
            raise PosttrainError(where, f"'{question.name}' is {chosen[0]!r}", f"one of the choices of {question.text!r}",
                                 "Use the configuration that this program wrote, and complete the annotation.")
        out[question.name] = question.stored(names(question).index(chosen[0]) + 1, swapped(task))
    ideal = given.get(IDEAL, [""])
    text = clean("\n".join(ideal) if isinstance(ideal, list) else str(ideal))
    return out | ({IDEAL: text} if text else {})


def _annotator(annotation: dict, data: dict) -> str:
    by = annotation.get("completed_by")
    name = by.get("email") or by.get("id") if isinstance(by, dict) else by
    return f"label-studio {name}" if name is not None else "label-studio"


assert not set(names(PREFERENCE)) & set(names(SAFETY))
