"""One annotator's work: which task is theirs, what it looks like now, and what a click does to it.

A task's state is folded from its annotator's events, so that it is the same after a reload, a restart or on another machine. A click names the
task and the turn that its page showed; what does not fit the state any more is refused with a reason, and the page shows the state as it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Connection, and_, case, delete, exists, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from posttrain.annotate.kinds import KINDS, Kind, Question, reasons_for
from posttrain.annotate.store import Store, answers, events, now, pack, queues, skips, slots, tasks, unpack
from posttrain.runs import digest

LONGEST = 20_000  # characters that an annotator may write
AHEAD = 3  # tasks whose first answers live models write before anybody asks for them
TRIES = 4  # of a transaction that met another one
RENEW = 60.0  # seconds after which looking at a task extends the time it is kept
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
HALF = re.compile("[\ud800-\udfff]")


class Refused(Exception):
    """A click that does not count, with the reason in words for the person who clicked."""


@dataclass
class Turn:
    """prompt: messages up to the user's; answers: [{'text', 'model', ...}], empty until they are there; values: question -> stored value."""

    prompt: list[dict]
    answers: list[dict]
    values: dict = field(default_factory=dict)
    ideal: str = ""
    then: dict | None = None
    key: str | None = None  # of live answers
    problem: str = ""  # why there are no answers
    at: float = 0.0  # when its last value was given


@dataclass
class State:
    """A task as one annotator sees it now. turns: the last one is under work; none while the prompt is to be written."""

    task: str
    queue: int
    kind: Kind
    content: dict
    annotator: str
    turns: list[Turn] = field(default_factory=list)
    slot: dict = field(default_factory=dict)
    last: dict | None = None  # the last event that counts
    finished: bool = False
    seed: str = ""

    @property
    def turn(self) -> Turn:
        return self.turns[-1]

    def swapped(self, turn: int) -> bool:
        """Whether side A of the page is the second answer: drawn from the database's seed, for every annotator and turn anew."""
        return self.kind.answers == 2 and bool(int(digest([self.seed, self.task, self.annotator, turn])[:8], 16) & 1)

    def question(self) -> Question | None:
        """The first of the turn's questions without a value."""
        return next((q for q in self.kind.questions if q.name not in self.turn.values), None)

    def complete(self) -> bool:
        return bool(self.turns and self.turn.answers and self.question() is None)

    def chosen(self) -> int:
        """Which of the turn's answers the dialogue goes on with."""
        return 0 if self.kind.answers == 1 or self.turn.values["choice"][0] == "a" else 1

    def next_prepared(self) -> dict | None:
        if not self.turns or not self.turn.then or "choice" not in self.turn.values:
            return None
        return self.turn.then.get("ab"[self.chosen()])

    def may_write(self, live: bool) -> bool:
        """Whether the annotator may write the next message: the first one, or a further one of a dialogue that live models go on with."""
        if not self.turns:
            return True
        ready = self.complete() or (self.kind.name == "redteam" and bool(self.turn.answers))
        return live and self.kind.talks and ready and not self.next_prepared()


class Desk:
    """What the page does for one queue and annotator. live: models that answer are there; wake: called when something new may wait for an answer;
    lease: seconds for which a task is kept for its annotator."""

    def __init__(self, store: Store, live: bool = False, wake: Callable[[], None] = lambda: None, lease: float = 1800.0):
        self.store, self.live, self.wake, self.lease = store, live, wake, lease

    # -- looking ---------------------------------------------------------------------------------------------------------------------

    def look(self, queue: int, annotator: str) -> State | None:
        """The annotator's task, given out where they have none; None where none is left for them."""
        with self.store.read() as c:
            held = self._held(c, queue, annotator)
            fresh = held and held["until"] - self.lease + RENEW > now()
            if fresh:
                return self.state(c, held["task"], annotator, held)
        return self._settled(lambda c: self._hold(c, queue, annotator))

    def _settled(self, do: Callable[[Connection], State | None]) -> State | None:
        """A transaction; once more where another one was first to store the same key."""
        for attempt in range(TRIES):
            try:
                with self.store.write() as c:
                    done = do(c)
            except IntegrityError:
                if attempt == TRIES - 1:
                    raise
            else:
                self.wake()  # after the commit: before it there is nothing to see
                return done
        return None

    def _held(self, c: Connection, queue: int, annotator: str) -> dict | None:
        row = c.execute(select(slots).where(slots.c.annotator == annotator, slots.c.queue == queue, slots.c.state == "open")
                        .order_by(slots.c.began, slots.c.id).limit(1)).mappings().first()
        return dict(row) if row else None

    def _hold(self, c: Connection, queue: int, annotator: str) -> State | None:
        """The task at hand, its time extended, or a new one."""
        held = self._held(c, queue, annotator)
        fresh = held is None
        if fresh:
            held = self._claim(c, queue, annotator)
        else:
            held["until"] = now() + self.lease
            c.execute(update(slots).where(slots.c.id == held["id"]).values(until=held["until"]))
        if held is None:
            return None
        state = self.state(c, held["task"], annotator, held)
        if self.live and not state.content["answers"] and (fresh or (state.turns and not state.turns[0].answers)):
            self._ask_ahead(c, state)
        return state

    def _claim(self, c: Connection, queue: int, annotator: str) -> dict | None:
        """The first slot that is free or whose time ran out, of a task that this annotator neither did nor skipped."""
        mine = slots.alias()
        unseen = and_(~exists().where(mine.c.task == slots.c.task, mine.c.annotator == annotator),
                      ~exists().where(skips.c.task == slots.c.task, skips.c.annotator == annotator))
        while True:
            t = now()
            row = None
            for open_ in (slots.c.state == "free", and_(slots.c.state == "open", slots.c.until < t)):
                row = row or c.execute(select(slots).where(slots.c.queue == queue, open_, unseen)
                                       .order_by(slots.c.place, slots.c.number).limit(1)).mappings().first()
            if row is None:
                return None
            took = {"state": "open", "annotator": annotator, "until": t + self.lease, "began": t, "ended": None}
            try:
                with c.begin_nested():
                    done = c.execute(update(slots).where(slots.c.id == row["id"], or_(slots.c.state == "free", slots.c.until < t),
                                                         slots.c.state != "done").values(**took))
            except IntegrityError:  # this annotator's other window took another slot of the task
                continue
            if done.rowcount == 1:
                return dict(row) | took

    def _ask_ahead(self, c: Connection, state: State) -> None:
        """Order the first answers of this task, and of the next ones in the queue."""
        place = state.slot["place"]
        coming = c.execute(select(tasks.c.id, tasks.c.content).where(tasks.c.queue == state.queue, tasks.c.place >= place)
                           .order_by(tasks.c.place).limit(1 + AHEAD)).all()
        for task, content in coming:
            content = unpack(content)
            if content["prompt"] and not content["answers"]:
                self._order(c, f"task {task}", state, content["prompt"], urgent=task == state.task)

    def _order(self, c: Connection, key: str, state: State, messages: list[dict], urgent: bool) -> None:
        there = c.execute(select(answers.c.urgent).where(answers.c.key == key)).first()
        if there is None:
            c.execute(insert(answers).values(key=key, queue=state.queue, state="waiting", messages=pack(messages), wanted=state.kind.answers,
                                             urgent=int(urgent), asked=now(), tries=0))
        elif urgent and not there[0]:
            c.execute(update(answers).where(answers.c.key == key).values(urgent=1))

    def state(self, c: Connection, task: str, annotator: str, slot: dict | None = None) -> State:
        """Fold the annotator's events on a task."""
        queue, content = c.execute(select(tasks.c.queue, tasks.c.content).where(tasks.c.id == task)).one()
        rows = c.execute(select(events).where(events.c.task == task, events.c.annotator == annotator, events.c.undone_by.is_(None),
                                              events.c.action != "undo").order_by(events.c.id)).mappings().all()
        live = self._live_answers(c, task, rows) if self._needs_live(content, rows) else {}
        return fold(task, queue, unpack(content), annotator, [dict(r) for r in rows], live, self.store.facts["seed"], slot)

    @staticmethod
    def _needs_live(content: str, rows: list) -> bool:
        return '"answers":[]' in content or any(r["action"] == "message" for r in rows)

    @staticmethod
    def _live_answers(c: Connection, task: str, rows: list) -> dict[str, dict]:
        keys = [f"task {task}", *(f"event {r['id']}" for r in rows if r["action"] == "message")]
        return {r["key"]: dict(r) for r in c.execute(select(answers).where(answers.c.key.in_(keys))).mappings()}

    # -- clicking --------------------------------------------------------------------------------------------------------------------

    def act(self, queue: int, annotator: str, token: str, task: str, turn: int, do: str, text: str = "") -> State | None:
        """One click: made durable, and the state after it. turn: how many turns the page showed. do: 'answer NAME NUMBER', 'message', 'ideal',
        'go on', 'finish', 'skip REASON', 'again' (ask the models again) or 'undo'. A token that was seen before changes nothing.

        Raises Refused where the click does not count; nothing is stored then.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{8,64}", token):
            raise Refused("The page sent no proper token. Reload it and try again.")

        def once(c: Connection) -> State | None:
            said = c.execute(select(events.c.annotator, events.c.value).where(events.c.token == token)).first()
            if said is None:
                self._do(c, queue, annotator, token, task, turn, do, clean(text))
            elif said[0] != annotator or unpack(said[1])["do"] != do:
                raise Refused("Another choice had been saved from this page already. Look at what is saved, and change it if it is wrong.")
            return self._hold(c, queue, annotator)

        return self._settled(once)

    def _do(self, c: Connection, queue: int, annotator: str, token: str, task: str, turn: int, do: str, text: str) -> None:
        verb, _, rest = do.partition(" ")
        if do == "undo":
            self._undo(c, queue, annotator, token)
            return
        state = self._mine(c, queue, annotator, task)
        if len(state.turns) != turn:
            raise Refused("That page showed an earlier turn of this dialogue. This is how it stands now.")
        note = {"do": do}
        if do == "again":
            key = state.turns and state.turn.key
            c.execute(update(answers).where(answers.c.key == (key or ""), answers.c.state == "failed")
                      .values(state="waiting", error=None, urgent=1, asked=now()))
            return
        if verb == "answer":
            note |= self._answered(state, rest)
        elif do == "message":
            note |= self._written(state, text, "message")
            if not state.may_write(self.live):
                raise Refused("The dialogue cannot go on from here.")
        elif do == "ideal":
            if not (state.kind.ideal and state.complete()):
                raise Refused("An ideal answer can be written once the questions are answered.")
            note |= self._written(state, text, "ideal answer", empty=bool(state.turn.ideal))
        elif do == "go on":
            if not (state.complete() and state.next_prepared()):
                raise Refused("There is no further turn.")
        elif do == "finish":
            if not state.complete():
                raise Refused("A question is still open.")
            c.execute(update(slots).where(slots.c.id == state.slot["id"]).values(state="done", ended=now()))
        elif verb == "skip":
            if rest not in reasons_for(state.kind):
                raise Refused("Choose one of the reasons.")
            note |= {"reason": rest} | ({"words": text[:1000]} if text else {})
            c.execute(insert(skips).values(task=task, annotator=annotator, reason=rest))
            c.execute(update(slots).where(slots.c.id == state.slot["id"]).values(state="free", annotator=None, until=None, began=None))
        else:
            raise Refused("The page asked for something that is not there. Reload it.")
        made = c.execute(insert(events).values(token=token, queue=queue, task=task, annotator=annotator, action=verb if verb != "go" else "go on",
                                               value=pack(note), at=now()))
        if do == "message":
            prompt = [*self._so_far(state), {"role": "user", "content": note["text"]}]
            self._order(c, f"event {made.inserted_primary_key[0]}", state, prompt, urgent=True)

    def _mine(self, c: Connection, queue: int, annotator: str, task: str) -> State:
        slot = c.execute(select(slots).where(slots.c.task == task, slots.c.annotator == annotator, slots.c.queue == queue)
                         .with_for_update()).mappings().first()
        if slot is None:
            raise Refused("The time for that task ran out and it went to somebody else, so this click was not saved.")
        if slot["state"] != "open":
            raise Refused("That task is finished. To change it, take back the last step.")
        return self.state(c, task, annotator, dict(slot))

    def _answered(self, state: State, rest: str) -> dict:
        name, _, number = rest.partition(" ")
        question = next((q for q in state.kind.questions if q.name == name), None)
        if question is None or not state.turns or not state.turn.answers:
            raise Refused("That question is not open.")
        place = state.kind.questions.index(question)
        if any(q.name not in state.turn.values for q in state.kind.questions[:place]):
            raise Refused("An earlier question is still open.")
        swapped = state.swapped(len(state.turns) - 1)
        try:
            value = question.stored(whole(number), swapped)
        except IndexError:
            raise Refused("That is none of the options.") from None
        return {"question": name, "value": value, "shown": "ba" if swapped else "ab"}

    @staticmethod
    def _written(state: State, text: str, what: str, empty: bool = False) -> dict:
        if len(text) > LONGEST:
            raise Refused(f"The {what} has {len(text):,} characters; {LONGEST:,} are the most.")
        if not text and not empty:
            raise Refused(f"The {what} is empty.")
        return {"text": text}

    @staticmethod
    def _so_far(state: State) -> list[dict]:
        """The dialogue with the answer that it goes on with; empty before the first message."""
        if not state.turns:
            return []
        return [*state.turn.prompt, {"role": "assistant", "content": state.turn.answers[state.chosen()]["text"]}]

    def _undo(self, c: Connection, queue: int, annotator: str, token: str) -> None:
        """Take back the annotator's last step in the queue. A finished task is opened again, a skipped one taken back where it is still free."""
        row = c.execute(select(events).where(events.c.annotator == annotator, events.c.queue == queue, events.c.undone_by.is_(None),
                                             events.c.action != "undo").order_by(events.c.id.desc()).limit(1).with_for_update()).mappings().first()
        if row is None:
            raise Refused("There is nothing to take back.")
        slot = c.execute(select(slots).where(slots.c.task == row["task"], slots.c.annotator == annotator)).mappings().first()
        if row["action"] == "skip" and slot is None:
            free = select(slots).where(slots.c.task == row["task"], slots.c.state == "free").order_by(slots.c.number).limit(1)
            slot = c.execute(free).mappings().first()
        if slot is None:
            raise Refused("The last step cannot be taken back: its task went to somebody else.")
        self._put_back_untouched(c, queue, annotator, row["task"])
        if row["action"] == "skip":
            c.execute(delete(skips).where(skips.c.task == row["task"], skips.c.annotator == annotator))
        t = now()
        opened = c.execute(update(slots).where(slots.c.id == slot["id"], or_(slots.c.annotator == annotator, slots.c.state == "free"))
                           .values(state="open", annotator=annotator, until=t + self.lease, ended=None, began=slot["began"] or t))
        if not opened.rowcount:
            raise Refused("The last step cannot be taken back: its task went to somebody else.")
        made = c.execute(insert(events).values(token=token, queue=queue, task=row["task"], annotator=annotator, action="undo",
                                               value=pack({"do": "undo", "of": row["id"]}), at=t))
        c.execute(update(events).where(events.c.id == row["id"]).values(undone_by=made.inserted_primary_key[0]))

    @staticmethod
    def _put_back_untouched(c: Connection, queue: int, annotator: str, but: str) -> None:
        """Free the other task at hand: nothing was done on it, since the last step was elsewhere."""
        c.execute(update(slots).where(slots.c.queue == queue, slots.c.annotator == annotator, slots.c.state == "open", slots.c.task != but)
                  .values(state="free", annotator=None, until=None, began=None))

    # -- telling ---------------------------------------------------------------------------------------------------------------------

    def progress(self, c: Connection, queue: int, annotator: str) -> dict:
        """{'done', 'all'}: annotations of the queue; 'mine': those of this annotator."""
        done = slots.c.state == "done"
        counts = {"done": case((done, 1)), "all": slots.c.id, "mine": case((and_(done, slots.c.annotator == annotator), 1))}
        row = c.execute(select(*(func.count(what).label(name) for name, what in counts.items())).where(slots.c.queue == queue)).one()
        return dict(row._mapping)

    def all_queues(self, c: Connection) -> list[dict]:
        return [dict(r) for r in c.execute(select(queues).order_by(queues.c.id)).mappings()]


def whole(text: str) -> int:
    """A number that a page sent; -1 for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else -1


def clean(text: str) -> str:
    """What an annotator wrote: line ends as \\n, no control characters, no half characters, no white space around it."""
    return HALF.sub("\ufffd", CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))).strip()


def fold(task: str, queue: int, content: dict, annotator: str, rows: list[dict], live: dict[str, dict], seed: str, slot: dict | None = None) -> State:
    """Events that count, in their order -> State. live: answers of models by their key."""
    state = State(task, queue, KINDS[content["kind"]], content, annotator, slot=slot or {}, seed=seed)
    if content["prompt"]:
        said = content["answers"]
        state.turns.append(Turn(content["prompt"], said, then=content.get("then")) if said else _live_turn(content["prompt"], f"task {task}", live))
    for row in rows:
        note = unpack(row["value"])
        if row["action"] == "answer":
            value = tuple(note["value"]) if isinstance(note["value"], list) else note["value"]
            before = state.turn.values.get("choice")
            if note["question"] == "choice" and before and before[0] != value[0]:
                state.turn.values.pop("bin", None)  # it said which answers are safe by which one is preferred
            state.turn.values[note["question"]], state.turn.at = value, row["at"]
        elif row["action"] == "ideal":
            state.turn.ideal = note["text"]
        elif row["action"] == "message":
            state.turns.append(_live_turn([*Desk._so_far(state), {"role": "user", "content": note["text"]}], f"event {row['id']}", live))
        elif row["action"] == "go on":
            step = state.next_prepared()
            state.turns.append(Turn([*Desk._so_far(state), {"role": "user", "content": step["message"]}], step["answers"], then=step.get("then")))
        elif row["action"] == "finish":
            state.finished = True
        state.last = row | {"note": note}
    return state


def _live_turn(prompt: list[dict], key: str, live: dict[str, dict]) -> Turn:
    row = live.get(key)
    if row is None or row["state"] == "waiting":
        return Turn(prompt, [], key=key)
    if row["state"] == "failed":
        return Turn(prompt, [], key=key, problem=row["error"])
    return Turn(prompt, unpack(row["answers"]), key=key)
