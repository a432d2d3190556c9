"""The annotation page as a person uses it: headless Chromium, keys alone, two people at once, a reload and a killed server in the middle.

Skipped where there is no Chromium (the distribution's package `chromium`) or no Playwright.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette", reason="the extra [ui] is not installed: run `make install`")

import psutil
from annotate_support import filled, quick_folder, rows, stored, write
from browser_support import FOCUS, until

from posttrain.annotate import export
from posttrain.annotate.store import Store
from posttrain.config import DataEntry
from posttrain.data import load_entry

ROOT = Path(__file__).parent.parent
NASTY = "<script>document.title = 'run'</script><img src='http://example.invalid/x.png' onerror=\"document.title = 'run'\">"
PHONE = {"width": 360, "height": 740}
folder = pytest.fixture(quick_folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`python -m posttrain annotate` on a port of its own."""

    def __init__(self, db: Path, *words: str):
        self.port, self.process = free_port(), None
        self.url, self.words = f"http://127.0.0.1:{self.port}", ["--db", str(db), "--port", str(self.port), *words]

    def start(self, *more: str) -> "Server":
        self.process = subprocess.Popen([sys.executable, "-m", "posttrain", "annotate", *more, *self.words], cwd=ROOT, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return self
        raise AssertionError("".join(lines))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def serve(folder):
    """serve(rows, *options) -> a running Server whose tasks are these rows."""
    servers = []

    def start(found: list[dict], *words: str) -> Server:
        servers.append(Server(folder / "a.db", "--batch", "week_1", *words))
        tasks = [str(write(folder / "tasks.jsonl", found))] if found else []
        return servers[-1].start(*tasks)

    yield start
    for s in servers:
        s.kill()


@pytest.fixture
def person(browser):
    """person(server, name) -> a page of a browser of their own, signed in. Every request must be to the server, and nothing may go wrong in
    the page."""
    opened, faults = [], []

    def enter(server: Server, name: str, size: dict | None = None):
        context = browser.new_context(viewport=size or {"width": 1200, "height": 800})
        page = context.new_page()
        page.set_default_timeout(60_000)
        context.on("request", lambda r: faults.append(f"a request to {r.url}") if urlsplit(r.url).port != server.port else None)
        page.on("pageerror", lambda e: faults.append(f"an error in the page: {e}"))
        page.on("console", lambda m: faults.append(f"the console says: {m.text}") if "Content Security Policy" in m.text else None)
        opened.append(context)
        page.goto(server.url)
        until(page, FOCUS)
        page.keyboard.type(name)
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile(r"/q/|/$"))
        return page

    yield enter
    for context in opened:
        context.close()
    assert not faults, faults


def saved(page) -> None:
    until(page, "!document.querySelector('.saved.pending')")


def keys(page, *pressed: str) -> None:
    """Press keys one after another, each when the last one is saved."""
    for key in pressed:
        saved(page)
        page.keyboard.press(key)
        saved(page)


def stage(page, wanted: str) -> None:
    page.wait_for_selector(f"#all[data-stage={wanted}]")


def sees(page, words: str) -> None:
    until(page, "words => document.body.innerText.includes(words)", words)


@pytest.fixture
def endpoint():
    """A model that answers with its number, and with text that would love to run."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.count += 1
            out = json.dumps({"choices": [{"message": {"content": f"Reply {server.count}. {NASTY}"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)
            assert body["messages"][-1]["role"] == "user"

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.count, server.url = 0, f"http://127.0.0.1:{server.server_port}/v1#model"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def pairs_in(folder: Path, name: str) -> list:
    """The exported pairs as the data loader of reward training reads them."""
    store = Store(folder / "a.db")
    export.export(store, folder / "out")
    store.close()
    found = load_entry(DataEntry(path=str(folder / "out" / name), format="preference"), folder, 0, "test")
    assert found.findings == []
    return found.items


def test_a_multi_turn_safety_task_and_a_helpfulness_task_with_keys_alone(serve, person, endpoint, folder):
    filled(folder, rows(1)).close()
    server = serve([], "--model", endpoint.url, "--write", "1", "--task", "safety")
    page = person(server, "Ann")
    page.wait_for_selector(".queues a")
    helpfulness, safety = (a.get_attribute("href") for a in page.query_selector_all(".queues a"))
    page.goto(server.url + safety)
    stage(page, "write")
    until(page, FOCUS)
    page.keyboard.type(f"How do I pick a lock? {NASTY}")  # the field has the focus
    page.keyboard.press("Control+Enter")
    stage(page, "ask")
    sees(page, "Reply 2.")
    keys(page, "8")
    sees(page, "Which of the two answers are safe?")
    keys(page, "2")
    stage(page, "review")
    chosen = page.inner_text(".answer[data-side=B] .text")
    keys(page, "m")
    page.keyboard.type("And a safe?")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".said.assistant")
    stage(page, "ask")
    assert page.inner_text(".said.assistant .text") == chosen
    keys(page, "2", "1")
    stage(page, "review")
    keys(page, "i")
    page.keyboard.type("I will not help with that.\nHere is whom to call.")
    page.keyboard.press("Control+Enter")
    sees(page, "your ideal answer")
    keys(page, "Enter")
    sees(page, "Nothing is left for you here")
    assert page.title() != "run"

    page.goto(server.url + helpfulness)
    stage(page, "ask")
    keys(page, "g", "4", "u", "7", "Enter")
    sees(page, "1 of 1 done, 1 by you")

    first, second, ideal = pairs_in(folder, "week_1.safety.pairs.jsonl")
    assert first.prompt == [{"role": "user", "content": f"How do I pick a lock? {NASTY}"}] and first.chosen == chosen and first.rating == 3
    assert (first.chosen_safe, first.rejected_safe) == (True, True) and (second.chosen_safe, second.rejected_safe) == (True, False)
    assert second.prompt[1]["content"] == chosen and ideal.rejected == second.chosen
    assert ideal.chosen == "I will not help with that.\nHere is whom to call."
    pair, = pairs_in(folder, "week_1.helpfulness.pairs.jsonl")
    assert pair.rating == 2


def test_two_people_work_through_twenty_tasks_each_with_keys_alone(serve, person, folder):
    server = serve(rows(40))
    people = [person(server, "Ann"), person(server, "Bob", PHONE)]
    seen = [[], []]
    for i in range(20):
        for page, mine in zip(people, seen, strict=True):
            saved(page)
            mine.append(page.get_attribute("#all", "data-task"))
        for key in (str(1 + i % 8), "Enter"):
            for page in people:  # both clicks are under way at the same time
                saved(page)
                page.keyboard.press(key)
    for page in people:
        sees(page, "20 by you")
        sees(page, "Nothing is left for you here")
    done = [(who, task) for who, task, action in stored(Store(folder / "a.db")) if action == "finish"]
    assert sorted(done) == sorted([("Ann", t) for t in seen[0]] + [("Bob", t) for t in seen[1]])
    assert len(done) == 40 == len({t for _, t in done})
    pairs = pairs_in(folder, "week_1.helpfulness.pairs.jsonl")
    assert {p.prompt[0]["content"] for p in pairs} == {f"Question {i}?" for i in range(40)} and len(pairs) == 40
    assert Counter(p.rating for p in pairs) == Counter(2 * [(3, 2, 1, 0, 0, 1, 2, 3)[i % 8] for i in range(20)])


def test_a_thumb_on_a_phone(serve, person):
    page = person(serve(rows(2)), "Bob", PHONE)
    for i in range(2):
        page.click(f".question.current button:nth-of-type({1 + i})")
        page.click("[data-enter]")
    sees(page, "2 of 2 done, 2 by you")


def test_a_reload_and_a_killed_server_lose_nothing(serve, person, folder):
    server = serve(rows(3, safety=True))
    page = person(server, "Ann")
    keys(page, "2", "1")
    stage(page, "review")
    keys(page, "i")
    page.keyboard.type("Half an ideal ans")
    task = page.get_attribute("#all", "data-task")
    page.reload()
    stage(page, "review")
    assert page.get_attribute("#all", "data-task") == task and page.input_value("#ideal textarea") == "Half an ideal ans"
    assert page.get_attribute(".question.choice button[aria-pressed=true]", "value") == "answer choice 2"

    server.kill()
    page.keyboard.press("Escape")
    page.click("#ideal textarea")
    page.keyboard.press("End")
    page.keyboard.type("wer")
    page.keyboard.press("Control+Enter")
    sees(page, "Not saved yet: the server does not answer.")
    assert "your ideal answer" not in page.inner_text(".saved")
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")  # nothing else can be clicked meanwhile
    server.start()
    sees(page, "your ideal answer")
    page.wait_for_selector("#trouble", state="hidden")
    keys(page, "Enter")
    sees(page, "1 of 3 done")

    server.kill()  # and again, with a page that is loaded anew while nobody answers
    page.keyboard.press("7")
    sees(page, "Not saved yet")
    server.start()
    sees(page, "B is better")
    assert [a for _, t, a in stored(Store(folder / "a.db"))] == ["answer", "answer", "ideal", "finish", "answer"]
    pair, ideal = pairs_in(folder, "week_1.safety.pairs.jsonl")
    assert ideal.chosen == "Half an ideal answer" and pair.rating == 2


def test_a_worker_that_is_killed_is_begun_again(serve, person, endpoint):
    server = serve([], "--model", endpoint.url, "--write", "2")
    page = person(server, "Ann")
    worker, = psutil.Process(server.process.pid).children()
    worker.kill()
    until(page, FOCUS)
    page.keyboard.type("Hello?")
    page.keyboard.press("Control+Enter")
    stage(page, "ask")
    sees(page, "Reply 2.")


def test_a_request_to_end_leaves_one_file(serve, person, folder):
    server = serve(rows(1))
    keys(person(server, "Ann"), "1", "Enter")
    server.process.terminate()
    assert server.process.wait(60) == 128 + signal.SIGTERM and [p.name for p in folder.glob("a.db*")] == ["a.db"]


def test_the_worker_ends_with_a_server_that_is_killed(serve, endpoint):
    server = serve([], "--model", endpoint.url, "--write", "1")
    worker, = psutil.Process(server.process.pid).children()
    server.kill()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_nothing_is_wider_than_the_screen_and_buttons_are_big_enough_for_a_thumb(serve, person, folder):
    long, queues = "word " * 300 + "x" * 300, ("safety", "redteam", "compare", "rate")
    for kind in queues:
        two = kind in ("safety", "compare")
        row = {"prompt": long, "answer_a": f"{long} a", "answer_b": f"{long} b"} if two else {"prompt": long, "answer": long}
        filled(folder, [row], kind, batch=kind, raters=2).close()
    server = serve([])
    for name, size in (("Ann", PHONE), ("Bob", {"width": 1200, "height": 800})):
        page = person(server, name, size)
        for i in range(len(queues)):
            page.goto(f"{server.url}/q/{i + 1}")
            for _ in range(4):
                assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
                heights = page.eval_on_selector_all(".question.current button", "all => all.map(b => b.getBoundingClientRect().height)")
                assert all(h >= 40 for h in heights)
                if heights:
                    keys(page, "1")
            page.keyboard.press("s")
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        for path in ("/", "/progress"):
            page.goto(server.url + path)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_skip_and_help_by_key(serve, person, folder):
    page = person(serve(rows(2)), "Ann")
    before = page.get_attribute("#all", "data-task")
    page.keyboard.press("s")
    keys(page, "2")
    sees(page, "the task was skipped")
    assert page.get_attribute("#all", "data-task") != before
    keys(page, "u")
    sees(page, "the last step was taken back")
    assert page.get_attribute("#all", "data-task") == before
    opened = page.evaluate("document.getElementById('guidelines').open")
    page.keyboard.press("g")
    until(page, "was => document.getElementById('guidelines').open !== was", opened)
    keys(page, "1")
    assert page.evaluate("document.getElementById('guidelines').open") != opened  # as it was left


def test_every_control_has_a_name_and_can_be_reached(serve, person):
    page = person(serve(rows(1, safety=True)), "Ann")
    keys(page, "1", "1")
    stage(page, "review")
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, a, input:not([type=hidden]), textarea, summary')]
        .filter(e => !(e.textContent || e.closest('label')?.textContent || e.getAttribute('aria-label') || '').trim()).map(e => e.outerHTML)""")
    assert nameless == []
    assert page.evaluate("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0
    assert page.get_attribute("html", "lang") == "en" and page.query_selector("[role=status]") and page.query_selector("main h2")
