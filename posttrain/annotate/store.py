"""Where tasks and annotations live: SQLite by default, any database that SQLAlchemy knows for a team.

Every click is a row of `events`, which is only ever added to: undoing adds a row too, and marks the one it takes back. What a task looks like
now is read from its events (work.py). A task has as many slots as annotators are to do it; a slot is free, open (somebody has it until
`until`) or done. A unique key on (task, annotator) keeps a task from being given to one annotator twice, whatever races, and a unique key on
an event's token keeps a click that is sent again from counting twice.
"""

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from sqlalchemy import (
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from posttrain.errors import PosttrainError

SCHEMA = "1"
SQLITE = "SQLite format 3\0"
metadata = MetaData()

facts = Table("facts", metadata, Column("name", String(40), primary_key=True), Column("value", Text, nullable=False))

queues = Table(  # the tasks of one kind in one batch
    "queues", metadata, Column("id", Integer, primary_key=True), Column("batch", String(100), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("live", Integer, nullable=False, default=0), UniqueConstraint("batch", "kind"))

tasks = Table(
    "tasks", metadata, Column("id", String(60), primary_key=True), Column("queue", ForeignKey("queues.id"), nullable=False),
    Column("place", Integer, nullable=False), Column("content", Text, nullable=False), Index("tasks_in_order", "queue", "place"))

slots = Table(
    "slots", metadata, Column("id", Integer, primary_key=True), Column("task", ForeignKey("tasks.id"), nullable=False),
    Column("queue", Integer, nullable=False), Column("place", Integer, nullable=False), Column("number", Integer, nullable=False),
    Column("state", String(8), nullable=False, default="free"), Column("annotator", String(100)), Column("until", Double),
    Column("began", Double), Column("ended", Double), UniqueConstraint("task", "annotator"), UniqueConstraint("task", "number"),
    Index("slots_by_state", "queue", "state", "place", "number"), Index("slots_by_annotator", "annotator", "queue", "state"))

events = Table(
    "events", metadata, Column("id", Integer, primary_key=True), Column("token", String(64), nullable=False, unique=True),
    Column("queue", Integer, nullable=False), Column("task", ForeignKey("tasks.id"), nullable=False),
    Column("annotator", String(100), nullable=False),
    Column("action", String(20), nullable=False), Column("value", Text, nullable=False), Column("at", Double, nullable=False),
    Column("undone_by", Integer),
    Index("events_of_task", "task", "annotator"), Index("events_of_annotator", "annotator", "queue", "id"))

skips = Table(  # who is not to be given a task again
    "skips", metadata, Column("task", ForeignKey("tasks.id"), primary_key=True), Column("annotator", String(100), primary_key=True),
    Column("reason", String(40), nullable=False))

answers = Table(  # what live models wrote. key: 'task ID' for a task's first turn, 'event ID' for an annotator's message
    "answers", metadata, Column("key", String(80), primary_key=True), Column("queue", Integer, nullable=False),
    Column("state", String(8), nullable=False),
    Column("messages", Text, nullable=False), Column("wanted", Integer, nullable=False), Column("answers", Text), Column("error", Text),
    Column("urgent", Integer, nullable=False), Column("asked", Double, nullable=False), Column("tries", Integer, nullable=False, default=0),
    Index("answers_to_make", "state", "urgent", "asked"))

attempts = Table(  # of answers that wait: attempts that brought none, each counted before it begins, so that one which ends the process counts too
    "attempts", metadata, Column("key", String(80), primary_key=True), Column("begun", Integer, nullable=False),
    Column("after", Double, nullable=False), Column("worker", String(40), nullable=False))  # when the next one may begin; who began the last one

annotators = Table(  # key: the name without regard to case
    "annotators", metadata, Column("key", String(100), primary_key=True), Column("name", String(100), nullable=False),
    Column("since", Double, nullable=False))


def url_of(db: str) -> str:
    """A file's name -> SQLAlchemy's address of it; an address stays."""
    return db if "://" in db else f"sqlite:///{Path(db).expanduser().absolute()}"


class Store:
    """One database. `read` and `write` are transactions; what `write` did is durable once it ends without an exception."""

    def __init__(self, db: str, make: bool = True):
        """db: a file, or a SQLAlchemy address. make: whether the file and its tables may come into being. Raises PosttrainError where it cannot be
        used."""
        self.place = "--db " + (str(db) if "://" not in str(db) else _without_password(db))
        url = url_of(str(db))
        self.sqlite = url.startswith("sqlite")
        self._turn = threading.Lock() if self.sqlite else nullcontext()  # SQLite takes one writer; a queue here is fairer than its polling
        if self.sqlite:
            self._check_file(Path(make_url(url).database or ""), make)
        try:
            self.engine = create_engine(url, pool_pre_ping=not self.sqlite, connect_args={"timeout": 60} if self.sqlite else {})
            if self.sqlite:
                event.listen(self.engine, "connect", _durable)
                event.listen(self.engine, "begin", lambda c: c.exec_driver_sql(c.get_execution_options().get("begin", "BEGIN")))
            self._open(make)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as e:
            raise PosttrainError(self.place, f"cannot be used ({_first_line(e)})",
                                 "a file, or an address such as postgresql+psycopg://USER@HOST/NAME",
                                 "Correct it, or install that database's driver into this environment.") from None
        except SQLAlchemyError as e:
            raise PosttrainError(self.place, f"cannot be opened ({_first_line(getattr(e, 'orig', None) or e)})", "a database that can be written",
                                 "Check the address, and that the database runs and allows this user to create tables.") from None

    def _check_file(self, path: Path, make: bool) -> None:
        if path.is_dir() or (path.is_file() and path.stat().st_size and path.open("rb").read(16) != SQLITE.encode()):
            raise PosttrainError(self.place, "is no SQLite database", "a file of this command's, or one that is not there yet", "Name another file.")
        if not path.exists() and not make:
            raise PosttrainError(self.place, "no such file", "the database of an annotation page", "Check the path.")
        if not path.parent.is_dir():
            raise PosttrainError(self.place, f"no folder {path.parent}", "a folder that exists", "Make it, or name another one.")
        if not path.exists():
            try:
                path.touch(mode=0o600)  # it holds what people wrote, and the key of their sign-ins; its log files take the same mode
            except OSError as e:
                raise PosttrainError(self.place, f"cannot be made ({e.strerror})", "a folder that can be written", "Name another file.") from None

    def _open(self, make: bool) -> None:
        if make:
            metadata.create_all(self.engine)
            for name, value in (("schema", SCHEMA), ("secret", secrets.token_hex(32)), ("seed", secrets.token_hex(16))):
                try:
                    with self.write() as c:
                        if not c.execute(select(facts.c.value).where(facts.c.name == name)).first():
                            c.execute(insert(facts).values(name=name, value=value))
                except IntegrityError:  # another program was first
                    continue
        with self.read() as c:
            self.facts = dict(c.execute(select(facts.c.name, facts.c.value)).all())
        if self.facts.get("schema") != SCHEMA:
            raise PosttrainError(self.place, f"was made by another version of this program (its tables are of version {self.facts.get('schema')})",
                                 f"version {SCHEMA}", "Use the program that made it, or name another file.")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self.engine.connect() as c:
            yield c

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed at the end, and undone by any exception."""
        with self._turn, self.engine.connect().execution_options(begin="BEGIN IMMEDIATE") as c, c.begin():
            yield c

    def close(self) -> None:
        self.engine.dispose()


def _durable(connection, _) -> None:
    """A commit is on the disk before it returns, also when the power goes; readers never wait for a writer."""
    connection.isolation_level = None  # the driver's own BEGIN comes too late to take the write lock
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0].strip("() ")[:200]


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "(an address that cannot be read)"


def pack(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


unpack = json.loads
now = time.time
