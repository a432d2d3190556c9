"""`report --live`: the report's page, made anew as the run's folder changes while another program works on the run, and where that one stands.

The run knows nothing of it: everything is read from the folder. The page is the report as `report.render` makes it, with a bar on top and a script of
ours that asks again and again where the run stands and puts in the place of the parts that changed what they are now.
"""

import asyncio
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jinja2 import Environment
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain import config as cfg
from posttrain import listen, report
from posttrain.annotate.site import SHARED, Door, Guard, TooLong, read_password, templates_in, too_long, version_of
from posttrain.errors import PosttrainError
from posttrain.log import PROGRESS, duration, rate_words, read_whole, say
from posttrain.report_views import View, look, number, plural, word
from posttrain.runs import Run

HERE = Path(__file__).parent / "live_page"
EVERY = 2.0  # seconds between two questions of the page
LEAST, SHARE = 3.0, 10  # a page is made again after so many seconds, and after so many times what making it took: the run needs the processor
FRESH = 60.0  # seconds since its last word in which a run counts as at work where its lock cannot be seen
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">\n')
HASH = re.compile(r"'sha256-[^']+'")


def held(lock: Path) -> bool:
    """Whether a program holds the run's lock, without taking it: a run that begins at that moment would be refused. Linux tells in /proc/locks."""
    try:
        inode, lines = lock.stat().st_ino, Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    return any((words := line.split())[1:4] == ["FLOCK", "ADVISORY", "WRITE"] and words[5].endswith(f":{inode}") for line in lines)


class Watch:
    """The run's folder, read again where it changed."""

    def __init__(self, load: Callable[[], Run], beside: list[Run]):
        self.load, self.beside, self.run = load, beside, load()
        self.views: dict[str, tuple[list, View]] = {}
        self.page, self.shown, self.number, self.made, self.took = "", None, secrets.token_hex(4), 0.0, 0.0
        self.making, self.seen = asyncio.Lock(), False  # seen: a program at work on it, so that its lock is one that this machine sees

    def sections(self) -> list[View]:
        """The recipe's sections, parents first; those whose files did not change as they were."""
        for name in cfg.order(self.run.recipe):
            folder = self.run.folder / name
            state = files_of(folder)
            if name not in self.views or self.views[name][0] != state:
                self.views[name] = (state, look(folder, name, self.run.recipe.stages[name].stage))
        return [self.views[n][1] for n in cfg.order(self.run.recipe)]

    def state(self) -> list:
        """What the page shows, as dates and sizes."""
        folders = sorted(p.parent for p in self.run.folder.glob("[!.]*/manifest.json")) if self.run.folder.is_dir() else []
        return [(f.name, files_of(f)) for f in folders]

    def due(self) -> bool:
        return time.time() - self.made >= max(LEAST, SHARE * self.took) and self.state() != self.shown

    async def latest(self) -> str:
        """The page; made again where that is due, by one request for all."""
        async with self.making:
            if not self.page or self.due():
                await asyncio.to_thread(self._make)
        return self.page

    def _make(self) -> None:
        began, state = time.time(), self.state()
        with suppress(PosttrainError):  # the recipe is being edited: the page stays with what it was
            self.run = self.load()
        first, self.page = not self.page, report.render(self.run, self.beside)
        self.shown, self.number, self.made = state, secrets.token_hex(4), time.time()
        self.took = 0.0 if first else self.made - began  # the first one loads what draws the figures

    def now(self) -> dict:
        """Where the run stands, in the words of the bar."""
        vs, told = self.sections(), read_whole(self.run.folder / PROGRESS)
        said = number(told.get("time"))
        done = sum(v.state == "done" for v in vs)
        begun = [v for v in vs if v.state == "unfinished"]
        work = held(self.run.folder / ".lock")
        self.seen = self.seen or work
        work = work or (not self.seen and bool(begun) and said is not None and time.time() - said < FRESH)
        at = max(begun, key=lambda v: newest(v.folder), default=None)
        state = "running" if work else "done" if done == len(vs) else "stopped" if begun or done else "waiting"
        words = [f"{done} of {plural(len(vs), 'section')} done"]
        out = {"state": state, "section": "", "share": None, "words": words, "page": self.number, "due": self.due()}
        if at is not None:
            out["section"] = at.name
            name, _, what = word(told.get("what"), "").partition(": ")
            mine = told if name == at.name else {}
            words[:0] = step_words(at, mine, what) + ([] if state == "running" else [f"last word {ago(time.time() - newest(at.folder))}"])
            steps, total = number(mine.get("done")), number(mine.get("total"))
            out["share"] = steps / total if steps is not None and total else None
        elif state == "waiting":
            words[:0] = [f"begins with: python -m posttrain run {self.run.recipe.path}"]
        return out


def step_words(v: View, told: dict, what: str) -> list[str]:
    """'training', 'step 12 of 40', '4 min 10 s left', '812 tokens/s', 'loss 1.234', as far as the section says so."""
    done, total, left = (number(told.get(k)) for k in ("done", "total", "left"))
    out = [what] if what else []
    if done is not None and total is not None:
        out.append(f"{word(told.get('unit'), 'step')} {done:,.0f} of {total:,.0f}")
    elif v.last_step is not None:
        out.append(f"step {v.last_step:,}")
    if left is not None:
        out.append(f"{duration(left)} left")
    rates = [x for r in v.metrics[-5:] for k, x in r.items() if k.endswith("tokens_per_second") and number(x)]
    rate = number(told.get("tokens_per_second")) or (sum(rates) / len(rates) if rates else None)
    note = told.get("note")
    return [*out, *rate_words(rate), *([note] if isinstance(note, str) and note else [])]


def ago(seconds: float) -> str:
    return f"{duration(seconds)} ago" if seconds >= 2 else "just now"


def files_of(folder: Path) -> list:
    """Names, dates and sizes of the files in a section's folder; not of its checkpoints and models."""
    try:
        return sorted((e.name, e.stat().st_mtime_ns, e.stat().st_size) for e in os.scandir(folder) if e.is_file())
    except OSError:
        return []


def newest(folder: Path) -> float:
    return max((when / 1e9 for _, when, _ in files_of(folder)), default=0.0)


class Policed:
    """ASGI middleware round Guard: the report brings a policy of its own, for its inline styles and its one inline script."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start" and "policy" in scope:
                MutableHeaders(scope=message)["Content-Security-Policy"] = scope["policy"]
            await send(message)

        await self.app(scope, receive, headed)


def alive(page: str, templates: Environment, **values) -> tuple[str, str]:
    """(the report's page with the bar and its script, the policy under which it is sent)."""
    found = POLICY.search(page)
    policy = (f"default-src 'none'; script-src 'self' {' '.join(HASH.findall(found[1]))}; style-src 'self' 'unsafe-inline'; img-src 'self'; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    head, bar = (templates.get_template(f"{name}.html.j2").render(**values) for name in ("head", "bar"))
    page = page[:found.start()] + page[found.end():]
    return page.replace("</head>", head + "</head>", 1).replace("<body>", "<body>\n" + bar, 1), policy


class Page:
    def __init__(self, watch: Watch, password: str | None, cookie: str):
        self.watch, self.templates, self.version = watch, templates_in(HERE), version_of(HERE, SHARED)
        self.door = Door(password, cookie, "Report", "Report of a run", self.version)
        self.app = Starlette(
            routes=[Route("/", self.home), Route("/now", self.now), Route("/sign-in", self.door.sign_in, methods=["POST"]),
                    Mount("/static", StaticFiles(directory=HERE)), Mount("/shared", StaticFiles(directory=SHARED))],
            middleware=[Middleware(Policed), Middleware(Guard, local_only=password is None)], exception_handlers={TooLong: too_long})

    async def home(self, request: Request) -> Response:
        if not self.door.known(request):
            return self.door.shown()
        page, request.scope["policy"] = alive(await self.watch.latest(), self.templates, version=self.version, number=self.watch.number, every=EVERY)
        return HTMLResponse(page)

    async def now(self, request: Request) -> Response:
        if not self.door.known(request):
            return JSONResponse({}, 403)
        return JSONResponse(await asyncio.to_thread(self.watch.now))


def build(load: Callable[[], Run], beside: list[Run] = (), password: str | None = None, cookie: str = "report") -> Starlette:
    return Page(Watch(load, list(beside)), password, cookie).app


def serve(load: Callable[[], Run], beside: list[Run], host: str, port: int, password_file: Path | None, certificate: Path | None,
          key: Path | None) -> None:
    """Show the page until Ctrl-C. Raises PosttrainError for what is wrong with the recipe or the address."""
    password, tls = read_password(host, password_file), listen.tls(certificate, key)
    run = load()
    listener = listen.listen(host, port)
    app = build(load, beside, password, f"report_{listener.getsockname()[1]}")
    say(f"Report of {run.recipe.run.name}, live: {listen.address(listener, bool(tls))} (from {run.folder}). Ctrl-C stops it.")
    listen.note_unless(tls, password and "the password crosses", "the page")
    listen.run(listen.server(app, **tls), listener)
