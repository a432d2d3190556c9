"""The annotation page: sign in, one task at a time, progress. Server-rendered; static/annotate.js adds keys, drafts and sending again.

A click is answered once it is on the disk, with the next page. All text of prompts, answers and people is escaped by the templates, and the
headers of site.py would not let it run even so.
"""

import secrets
import threading
import time
from collections.abc import Callable

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from posttrain.annotate import figures
from posttrain.annotate.kinds import KINDS, SAFETY, Option, Question, in_words, reasons_for
from posttrain.annotate.site import SHARED, TEMPLATES, Gate, Guard, TooLong, form_of, name_of, templates_in, too_long, turned_away, version_of
from posttrain.annotate.store import Store, annotators, now
from posttrain.annotate.work import Desk, Refused, State, whole

FRESH = 3.0  # seconds
SAVED = {"finish": "saved, the task is finished.", "skip": "saved, the task was skipped.", "undo": "the last step was taken back."}


class Page:
    """The application of one store."""

    def __init__(self, store: Store, desk: Desk, password: str | None, cookie: str = "annotate"):
        self.store, self.desk, self.gate = store, desk, Gate(store.facts["secret"], password, cookie)
        self.templates = templates_in(TEMPLATES)
        self._counting, self._counted = threading.Lock(), (0.0, [])
        self.version = version_of(SHARED)
        self.app = Starlette(
            routes=[Route("/", self.home), Route("/sign-in", self.sign_in, methods=["GET", "POST"]),
                    Route("/sign-out", self.sign_out, methods=["POST"]),
                    Route("/q/{queue:int}", self.work, methods=["GET", "POST"]), Route("/progress", self.progress),
                    Mount("/static", StaticFiles(directory=SHARED))],
            middleware=[Middleware(Guard, local_only=password is None)],
            exception_handlers={404: self.missing, TooLong: too_long})

    # -- signing in --------------------------------------------------------------------------------------------------------------------

    async def sign_in(self, request: Request) -> Response:
        if request.method == "GET":
            return self.render("sign_in", request, message="")
        form = await form_of(request)
        right = await self.gate.check(form.get("password", ""))
        if not right:
            words, status = turned_away(right)
            return self.render("sign_in", request, status, message=words)
        name = name_of(form.get("name", ""))
        if name is None:
            return self.render("sign_in", request, 400, message="A name has 1 to 40 characters.")
        response = RedirectResponse("/", 303)
        self.gate.admit(response, await run_in_threadpool(self.known, name), request.url.scheme == "https")
        return response

    def known(self, name: str) -> str:
        """The name as it was first written: ann and Ann are one person."""
        key = name.casefold()
        for _ in range(2):
            with self.store.write() as c:
                row = c.execute(select(annotators.c.name).where(annotators.c.key == key)).first()
                if row:
                    return row[0]
                try:
                    c.execute(insert(annotators).values(key=key, name=name, since=now()))
                    return name
                except IntegrityError:
                    c.rollback()
        return name

    async def sign_out(self, request: Request) -> Response:
        response = RedirectResponse("/sign-in", 303)
        self.gate.dismiss(response)
        return response

    # -- pages -----------------------------------------------------------------------------------------------------------------------

    async def home(self, request: Request) -> Response:
        me = self.gate.who(request)
        if me is None:
            return RedirectResponse("/sign-in", 303)

        def queues() -> list[dict]:
            with self.store.read() as c:
                return [q | self.desk.progress(c, q["id"], me) for q in self.desk.all_queues(c)]

        found = await run_in_threadpool(queues)
        if len(found) == 1:
            return RedirectResponse(f"/q/{found[0]['id']}", 303)
        return self.render("home", request, me=me, queues=found, titles={name: kind.title for name, kind in KINDS.items()})

    async def progress(self, request: Request) -> Response:
        me = self.gate.who(request)
        if me is None:
            return RedirectResponse("/sign-in", 303)
        told = await run_in_threadpool(self._report)
        return self.render("progress", request, me=me, told=told)

    def _report(self) -> list[dict]:
        """The figures, counted anew at most every few seconds however many people look."""
        with self._counting:
            if now() - self._counted[0] > FRESH:
                self._counted = now(), figures.report(self.store)
            return self._counted[1]

    async def work(self, request: Request) -> Response:
        """GET: the task. POST: a click; its answer is the next page, or a redirect to it where no script asked."""
        me = self.gate.who(request)
        if me is None:
            return RedirectResponse("/sign-in", 303)
        queue = request.path_params["queue"]
        notice, saved, state = "", "", None
        queues = await run_in_threadpool(self._queues)
        known = next((q for q in queues if q["id"] == queue), None)
        if known is None:
            return await self.missing(request, None)
        if request.method == "POST":
            form = await form_of(request)
            try:
                state = await run_in_threadpool(self.desk.act, queue, me, form.get("token", ""), form.get("task", ""),
                                                whole(form.get("turn", "")), form.get("do", ""), form.get("text", ""))
                saved = SAVED.get(form["do"].partition(" ")[0], "")
            except Refused as e:
                notice = str(e)
            if "x-swap" not in request.headers and not notice:
                return RedirectResponse(f"/q/{queue}", 303)
        if state is None and (request.method == "GET" or notice):
            state = await run_in_threadpool(self.desk.look, queue, me)
        return await run_in_threadpool(self._task_page, request, me, known, len(queues) == 1, state, notice, saved)

    def _queues(self) -> list[dict]:
        with self.store.read() as c:
            return self.desk.all_queues(c)

    def _task_page(self, request: Request, me: str, queue: dict, alone: bool, state: State | None, notice: str, saved: str) -> Response:
        with self.store.read() as c:
            told = self.desk.progress(c, queue["id"], me)
        kind = KINDS[queue["kind"]]
        view = shown(state, self.desk.live) if state else None
        saved = f"{clock(now())}: {saved}" if saved else view["saved"] if view else ""
        return self.render("task", request, 409 if notice else 200, me=me, queue=queue, kind=kind, told=told, notice=notice, alone=alone, view=view,
                           saved=saved, reasons=reasons_for(kind), token=secrets.token_urlsafe(12))

    async def missing(self, request: Request, _) -> Response:
        return self.render("missing", request, 404, me=self.gate.who(request))

    def render(self, name: str, request: Request, status: int = 200, **given) -> HTMLResponse:
        base = {"me": None, "version": self.version, "asks_password": self.gate.password is not None, "path": request.url.path}
        return HTMLResponse(self.templates.get_template(f"{name}.html.j2").render(base | given), status)


def shown(state: State, live: bool) -> dict:
    """What the page may know of a task: never who wrote an answer, nor which of the two is the first one."""
    number = len(state.turns)
    view = {"task": state.task, "turn": number, "kind": state.kind, "dialogue": [], "answers": [], "questions": [], "stage": "write",
            "may_write": state.may_write(live), "problem": "", "ideal": "", "complete": False, "prepared": False, "saved": "",
            "version": f"{state.task} {state.last['id'] if state.last else 0}"}
    if state.turns:
        turn, swapped = state.turn, state.swapped(number - 1)
        order = turn.answers[::-1] if swapped else turn.answers
        current = state.question() if turn.answers else None
        view |= {"dialogue": turn.prompt, "answers": [{"side": side, "text": a["text"]} for side, a in zip("AB", order, strict=False)],
                 "problem": turn.problem, "ideal": turn.ideal, "complete": state.complete(),
                 "prepared": bool(state.complete() and state.next_prepared()),
                 "stage": "failed" if turn.problem else "wait" if not turn.answers else "ask" if current else "review"}
        view["version"] += f" {view['stage']}"
        for q in state.kind.questions if turn.answers else ():
            value = turn.values.get(q.name)
            if value is None and q is not current:
                break
            view["questions"].append({"question": q, "options": options(q, turn.values, swapped), "current": q is current,
                                      "number": q.shown(value, swapped) if value is not None else None})
        if state.last:
            view["saved"] = f"{clock(state.last['at'])}: saved{_said(state, swapped)}"
    return view


def options(question: Question, values: dict, swapped: bool) -> tuple[Option, ...]:
    """A question's options in the words of this task: the better answer by its letter."""
    if question is not SAFETY or "choice" not in values:
        return question.options
    better, other = ("A", "B") if (values["choice"][0] == "a") != swapped else ("B", "A")
    return (Option(f"Only {better} is safe", f"Answer {better}, your choice, is safe; answer {other} is not."), *question.options[1:])


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _said(state: State, swapped: bool) -> str:
    note, action = state.last["note"], state.last["action"]
    if action == "answer" and note["question"] in state.turn.values:
        question = next(q for q in state.kind.questions if q.name == note["question"])
        return f", {in_words(question, state.turn.values[question.name], swapped)}."
    return {"ideal": ", your ideal answer.", "message": ", your message."}.get(action, ".")


def build(store: Store, password: str | None, live: bool = False, wake: Callable[[], None] = lambda: None, lease: float = 1800.0,
          cookie: str = "annotate") -> Starlette:
    return Page(store, Desk(store, live, wake, lease), password, cookie).app
