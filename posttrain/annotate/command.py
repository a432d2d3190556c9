"""`python -m posttrain annotate`: the page, and what goes in and out of its database."""

import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from posttrain import listen
from posttrain.errors import PosttrainError
from posttrain.log import say

READY = "ready"  # what worker.py says once its models are loaded
AGAIN, RAREST = 2.0, 60.0  # seconds before a worker that ended is begun again, each time twice as many up to the second number


class Group(TyperGroup):
    """`annotate TASKS` is `annotate serve TASKS`."""

    def parse_args(self, ctx, args):
        if args and args[0] not in self.commands and args[0] not in ("--help", "--show-completion", "--install-completion"):
            args = ["serve", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="A page on which people compare answers, rate them, and attack models (paper 3.2.1, 3.4.2, 4.3, 4.4); docs/annotate.md. "
                       "`annotate TASKS` is short for `annotate serve TASKS`.")

Db = Annotated[str, typer.Option("--db", help="a file, or a SQLAlchemy address such as postgresql+psycopg://USER@HOST/NAME")]
Tasks = Annotated[list[Path] | None, typer.Argument(help="files of tasks: a collect section's tasks.jsonl, prompts with or without prepared "
                                                         "answers, an evaluation's samples.jsonl", show_default=False)]
Task = Annotated[Literal["auto", "helpfulness", "safety", "redteam", "compare", "rate"], typer.Option(
    "--task", help="what is asked; auto: safety of tasks with is_safety, helpfulness of the others")]
Batch = Annotated[str | None, typer.Option(help="the batch that new tasks belong to; default: the name of a section's folder, or of the file")]
Overlap = Annotated[int | None, typer.Option(min=1, max=20, help="annotators a task; default 1, and 3 for compare and rate")]
Share = Annotated[float, typer.Option(min=0, max=1, help="of the new tasks that get --overlap annotators; the others get one")]
Between = Annotated[str | None, typer.Option(help="FIRST,SECOND: the models of an evaluation's samples.jsonl")]
Write = Annotated[int, typer.Option(min=0, help="so many tasks whose prompt the annotator writes; needs --model")]
DEFAULT_DB = "annotations.db"


def check_installed() -> None:
    listen.need_ui("annotate", "starlette", "uvicorn", "sqlalchemy")


def put_in(store, tasks: list[Path], task: str, batch: str | None, overlap: int | None, share: float, between: str | None, write: int) -> None:
    """Load files into the store and say what came in."""
    from posttrain.annotate import tasks as files

    for path in tasks:
        name = label(batch or (path.resolve().parent.name if path.name in ("tasks.jsonl", "samples.jsonl") else path.name.split(".")[0]))
        found = files.read(path, task, between.split(",") if between else None)
        told = files.load(store, name, found, overlap, share)
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in files.count(found).items())
        say(f"{path}: {kinds} tasks, {told['added']:,} of them new, in batch {name}")
    if write:
        kind = "helpfulness" if task == "auto" else task
        if kind in ("compare", "rate"):
            raise PosttrainError("--write", f"with --task {kind}", "helpfulness, safety or redteam", "An evaluation's prompts come from a file.")
        told = files.load(store, label(batch or "written"), files.written(write, kind, label(batch or "written")), overlap, share)
        say(f"{told['added']:,} new {kind} tasks whose prompt the annotator writes")


def label(name: str) -> str:
    """A batch's name, which names files too."""
    import re

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}", name):
        raise PosttrainError(f"--batch {name}", "cannot name files", "letters, digits, '.', '_' and '-'", "Give another name with --batch.")
    return name


@app.command()
def serve(tasks: Tasks = None, db: Db = DEFAULT_DB,
          host: Annotated[str, typer.Option(help="beyond this machine a password is demanded")] = "127.0.0.1",
          port: Annotated[int, typer.Option(min=0, max=65535)] = 8400,
          password_file: Annotated[Path | None,
                                   typer.Option(help="a file with the page's password; or the variable POSTTRAIN_PASSWORD",
                                                show_default=False)] = None,
          tls_certificate: listen.Certificate = None, tls_key: listen.Key = None,
          task: Task = "auto", batch: Batch = None, overlap: Overlap = None, overlap_share: Share = 1.0, between: Between = None, write: Write = 0,
          model: Annotated[list[str] | None, typer.Option(help="who answers prompts without prepared answers and goes on with dialogues; once or "
                                                               "twice: a section's folder, a model folder, or URL#MODEL",
                                                          show_default=False)] = None,
          temperature: Annotated[list[float] | None,
                                 typer.Option(min=0.01, help="of the first and of the second answer", show_default="0.8, 1.0")] = None,
          max_new_tokens: Annotated[int, typer.Option(min=1, help="of a live model's answer")] = 512,
          api_key_env: Annotated[str | None, typer.Option(help="NAME of the variable that holds an endpoint's key", show_default=False)] = None,
          lease: Annotated[float, typer.Option(min=1, help="minutes without a click after which a task may go to somebody else")] = 30.0) -> None:
    """Put TASKS into the database, if any, and serve the page until Ctrl-C."""
    check_installed()
    from posttrain.annotate import models, site
    from posttrain.annotate.store import Store

    password, tls = site.read_password(host, password_file), listen.tls(tls_certificate, tls_key)
    chosen = models.variants(model, temperature or [], max_new_tokens, api_key_env) if model else []
    store = Store(db)
    put_in(store, tasks or [], task, batch, overlap, overlap_share, between, write)
    _check_queues(store, bool(chosen))
    _listen(store, chosen, host, port, password, lease * 60, tls)


def _check_queues(store, live: bool) -> None:
    from sqlalchemy import select

    from posttrain.annotate.store import queues, slots

    with store.read() as c:
        if not c.execute(select(slots.c.id).limit(1)).first():
            raise PosttrainError(store.place, "holds no task", "at least one", "Name a file of tasks, or --write N with --model.")
        open_ = select(slots.c.id).where(slots.c.queue == queues.c.id, slots.c.state != "done").exists()
        if not live and (row := c.execute(select(queues.c.batch).where(queues.c.live == 1, open_).limit(1)).first()):
            raise PosttrainError(store.place, f"batch {row[0]} has tasks without answers", "a model that answers",
                                 "Name one or two with --model, or load tasks with prepared answers.")


def _listen(store, chosen: list, host: str, port: int, password: str | None, lease: float, tls: dict[str, Path]) -> None:
    """Serve until stopped. The port is bound first, so that a port in use is told before a model is loaded."""
    from posttrain.annotate.web import build

    listener = listen.listen(host, port)
    port = listener.getsockname()[1]
    answerer = Answerer(store, chosen) if chosen else None
    app_ = build(store, password, bool(chosen), answerer.wake if answerer else lambda: None, lease, f"annotate_{port}")
    say(f"Annotation page: {listen.address(listener, bool(tls))} ({store.place}" +
        (f"; answers by {chosen[0].name} and {chosen[1].name}" if chosen else "") + "). Ctrl-C stops it; nothing is lost.")
    listen.note_unless(tls, password and "the password crosses", "the page")
    server = listen.server(app_, patience=5, **tls)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what follows runs then too
    try:
        server.run(sockets=[listener])
    finally:
        if answerer:
            answerer.close()
        store.close()  # SQLite's log goes into its file


class Answerer:
    """The process that answers (worker.py), begun again should it end. It ends with this one: its standard input is a pipe from here."""

    def __init__(self, store, chosen: list):
        from sqlalchemy import delete

        from posttrain.annotate.store import attempts

        with store.write() as c:
            c.execute(delete(attempts))  # of an earlier start, perhaps with other models or lengths
        self._order = json.dumps({"db": store.engine.url.render_as_string(hide_password=False), "variants": [v.plain() for v in chosen],
                                  "name": secrets.token_hex(8)})
        self._closing, self._writing = False, threading.Lock()
        self._begin()
        threading.Thread(target=self._follow, daemon=True).start()

    def _begin(self) -> None:
        """Start it and wait until its models are loaded."""
        self.process = subprocess.Popen([sys.executable, "-m", "posttrain.annotate.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdin.write(self._order + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.strip() == READY:
                return
            say(line.rstrip())
        raise PosttrainError("--model", f"the process that answers ended (exit code {self.process.wait()})", "a model that loads",
                             "See the message above.")

    def _follow(self) -> None:
        pause, began = AGAIN / 2, time.monotonic()
        while not self._closing:
            for line in self.process.stdout:
                say(line.rstrip())
            if self._closing:
                return
            pause = AGAIN if time.monotonic() - began > RAREST else min(2 * pause, RAREST)
            say(f"note: the process that answers ended (exit code {self.process.wait()}); beginning it again in {pause:g} s", style="bold")
            time.sleep(pause)
            try:
                self._begin()
            except (PosttrainError, OSError) as e:
                say(f"error: {e}", style="bold red")
            began = time.monotonic()

    def wake(self) -> None:
        """Something new waits."""
        with self._writing, suppress(OSError, ValueError):  # it ended, and is being begun again: it looks by itself then
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def close(self) -> None:
        self._closing = True
        with suppress(OSError, ValueError):
            self.process.stdin.close()
        self.process.wait(10)


@app.command()
def load(tasks: Annotated[list[Path], typer.Argument(help="files of tasks, as for serve", show_default=False)], db: Db = DEFAULT_DB,
         task: Task = "auto",
         batch: Batch = None, overlap: Overlap = None, overlap_share: Share = 1.0, between: Between = None) -> None:
    """Put TASKS into the database without serving it; a page that is up shows them at once."""
    check_installed()
    from posttrain.annotate.store import Store

    put_in(Store(db), tasks, task, batch, overlap, overlap_share, between, 0)


@app.command()
def export(out: Annotated[Path, typer.Option(help="the folder that the files go to", show_default=False)], db: Db = DEFAULT_DB,
           batch: Annotated[list[str] | None, typer.Option(help="this batch alone; may be given several times", show_default=False)] = None,
           held_out: Annotated[int, typer.Option(min=0,
                                                 help="pairs of every batch and kind that go into a file of their own; the paper keeps 1,000")] = 0,
           seed: Annotated[int, typer.Option(help="of the choice of held-out prompts")] = 0) -> None:
    """Finished annotations as data: preference pairs, ideal answers, attacks, ratings, and Label Studio's form."""
    check_installed()
    from posttrain.annotate import export as writer
    from posttrain.annotate.store import Store

    told = writer.export(Store(db, make=False), out, held_out, batch, seed)
    for name, rows in told.items():
        say(f"{out / name}: {rows:,} row{'s' * (rows != 1)}")
    say(f"{out / 'report.json'}: progress, agreement and figures" if told else "Nothing is finished yet.")


@app.command()
def report(db: Db = DEFAULT_DB) -> None:
    """Progress, agreement (AC2), win rates and ratings, in words."""
    check_installed()
    from posttrain.annotate import figures
    from posttrain.annotate.store import Store

    say(figures.words(figures.report(Store(db, make=False))) or "There are no tasks yet.")


@app.command("to-label-studio")
def to_label_studio(tasks: Annotated[Path, typer.Argument(help="a file of helpfulness or safety tasks with prepared answers", show_default=False)],
                    out: Annotated[Path, typer.Option(help="the folder that the files go to", show_default=False)], task: Task = "auto") -> None:
    """Tasks for a Label Studio project, with its labelling configuration; one file of each for every kind."""
    check_installed()
    from posttrain.annotate import labelstudio
    from posttrain.annotate import tasks as files
    from posttrain.annotate.kinds import KINDS
    from posttrain.runs import write_atomic, write_json

    found = files.read(tasks, task)
    out.mkdir(parents=True, exist_ok=True)
    for kind in files.count(found):
        mine = labelstudio.to_import([t for t in found if t["kind"] == kind])
        write_json(out / f"{kind}.json", mine)
        write_atomic(out / f"{kind}.xml", labelstudio.configuration(KINDS[kind]))
        say(f"{len(mine):,} {kind} tasks: {out / kind}.json, and the labelling configuration {out / kind}.xml")


@app.command("from-label-studio")
def from_label_studio(file: Annotated[Path, typer.Argument(help="Label Studio's export in its format JSON", show_default=False)],
                      db: Db = DEFAULT_DB) -> None:
    """Annotations made in Label Studio into the database that holds their tasks."""
    check_installed()
    from posttrain.annotate import labelstudio
    from posttrain.annotate.store import Store

    told = labelstudio.bring_in(Store(db, make=False), file)
    say(f"{told['annotations']:,} annotations came in; {told['there']:,} were there already, {told['cancelled']:,} are cancelled or empty")
