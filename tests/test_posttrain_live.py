"""The report while a run goes on: what the bar says, and in a browser that the page follows the folder and the reader keeps their place."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from browser_support import FOCUS, until
from pydantic import ConfigDict

from posttrain import config as cfg
from posttrain import live, log, report
from posttrain.errors import PosttrainError
from posttrain.log import PROGRESS, Log
from posttrain.runs import Run

PROMPTS = [f"Question {i}: {words}" for i, words in enumerate(["how do I bake bread?", "what is a tide?", "who wrote this?"] * 6)]


class Loose(cfg.StageConfig):
    model_config = ConfigDict(extra="allow")


STAGES = {"sft": {"stage": "sft"}, "reward": {"stage": "reward", "model": "@sft"},
          "ppo": {"stage": "ppo", "policy": "@sft", "helpfulness": "@reward"},
          "eval": {"stage": "evaluate", "models": {"sft": "@sft", "chat": "@ppo"}}}


class Folder:
    """A run's folder, written as a run would."""

    def __init__(self, folder: Path):
        self.run = Run(cfg.Recipe(run={"name": "demo", "dir": str(folder)}, model={"name_or_path": "tiny"},
                                  stages={k: Loose(**v) for k, v in STAGES.items()}, path="recipes/demo.yaml"))

    def begin(self, name: str) -> None:
        folder = self.run.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        stage = self.run.recipe.stages[name]
        (folder / "config.yaml").write_text("".join(f"key_{i}: {i}\n" for i in range(60)))
        (folder / "manifest.json").write_text(json.dumps({"kind": stage.stage, "fingerprint": name, "started": "2026-03-01T10:00:00", "seed": 0,
                                                          "seconds": 60.0, "base": {"name_or_path": "tiny"}}))

    def steps(self, name: str, first: int, last: int, **more) -> None:
        kind = self.run.recipe.stages[name].stage
        for step in range(first, last + 1):
            Log(self.run.folder / name, name).metrics(step, {f"{kind}/loss": 2 + 1 / (step + 1), f"{kind}/tokens_per_second": 900.0, **more})

    def finish(self, name: str, results: dict) -> None:
        (self.run.folder / name / "results.json").write_text(json.dumps(results))
        (self.run.folder / name / "DONE").write_text(name + "\n")

    def samples(self, n: int, answer: str = "An answer.") -> None:
        rows = [{"row": i, "step": 1, "prompt": [{"role": "user", "content": p}], "answer": f"{answer} {i} " + "and so on " * 100,
                 "merged": 0.1 * i, "kl": 0.2, "kind": "helpful"} for i, p in enumerate(PROMPTS[:n])]
        (self.run.folder / "ppo" / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def watch(self) -> live.Watch:
        return live.Watch(lambda: self.run, [])


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def locked(folder):
    """As if a program worked on the run."""
    folder.run.folder.mkdir(parents=True, exist_ok=True)
    with (folder.run.folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# -- what the bar says -----------------------------------------------------------------------------------------------------------------


def told(folder: Folder) -> tuple:
    now = folder.watch().now()
    return now["state"], now["section"], now["words"]


def test_a_run_that_has_not_begun(folder):
    assert told(folder) == ("waiting", "", ["begins with: python -m posttrain run recipes/demo.yaml", "0 of 4 sections done"])


def test_a_running_section_with_its_step_its_eta_and_its_speed(folder, locked, monkeypatch):
    """By hand: 10 of 40 steps in 50 s leave 150 s."""
    clock = SimpleNamespace(now=time.time())
    monkeypatch.setattr(log, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setattr(log, "say", lambda *_: None)
    folder.begin("sft")
    assert told(folder) == ("running", "sft", ["0 of 4 sections done"])  # the model is loading
    with Log(folder.run.folder / "sft", "sft").progress(40, "training") as ticker:
        assert told(folder)[2] == ["training", "step 0 of 40", "0 of 4 sections done"]
        folder.steps("sft", 1, 10)
        clock.now += 50
        ticker.advance(10, note="loss 2.100")
        assert told(folder)[2] == ["training", "step 10 of 40", "2 min 30 s left", "900 tokens/s", "loss 2.100", "0 of 4 sections done"]
        assert folder.watch().now()["share"] == 0.25
    assert not (folder.run.folder / PROGRESS).exists() and told(folder)[2] == ["step 10", "900 tokens/s", "0 of 4 sections done"]
    with Log(folder.run.folder / "sft", "sft").progress(4, "sampling", "chunk") as ticker:
        clock.now += 2
        ticker.made(500)
        assert told(folder)[2][:3] == ["sampling", "chunk 0 of 4", "250 tokens/s"]


def test_a_run_that_was_cut_off_and_one_that_is_done(folder):
    folder.begin("sft")
    folder.steps("sft", 1, 3)
    where = {"what": "sft: training", "unit": "step", "done": 3, "total": 9, "left": 5.0}
    (folder.run.folder / PROGRESS).write_text(json.dumps(where | {"time": time.time()}))
    assert told(folder)[0] == "running"  # a machine whose locks are not seen here: it spoke a moment ago
    watch = folder.watch()
    watch.seen = True  # its lock was held, and no longer is
    assert watch.now()["state"] == "stopped"
    (folder.run.folder / PROGRESS).write_text(json.dumps(where | {"time": 0}))
    for file in (folder.run.folder / "sft").iterdir():
        os.utime(file, (time.time() - 300,) * 2)
    state, section, words = told(folder)
    assert (state, section, words[:2]) == ("stopped", "sft", ["training", "step 3 of 9"]) and "last word 5 min 00 s ago" in words
    for name in STAGES:
        folder.begin(name)
        folder.finish(name, {})
    assert told(folder) == ("done", "", ["4 of 4 sections done"])


def test_a_full_disk_does_not_stop_the_work_that_tells_of_itself(folder, monkeypatch):
    """The folder of the progress file is not there, so every write fails."""
    with Log(folder.run.folder / "sft", "sft").progress(4, "training") as ticker:
        ticker.advance(4)
    assert not folder.run.folder.exists()


def test_the_page_is_made_again_only_when_something_changed_and_not_too_often(folder, monkeypatch):
    import asyncio

    made = []
    monkeypatch.setattr(report, "render", lambda *_: made.append(1) or "page")
    watch = folder.watch()
    asyncio.run(watch.latest())
    asyncio.run(watch.latest())
    assert len(made) == 1 and not watch.due()
    folder.begin("sft")
    assert not watch.due()  # it was made a moment ago
    monkeypatch.setattr(live, "LEAST", 0.0)
    assert watch.due()
    asyncio.run(watch.latest())
    assert len(made) == 2 and not watch.due()
    watch.took = 1000.0  # a page that takes long is made seldom
    folder.steps("sft", 1, 1)
    assert not watch.due()


def test_a_recipe_in_the_middle_of_an_edit_keeps_the_page(folder, monkeypatch):
    import asyncio

    def broken():
        raise PosttrainError("recipes/demo.yaml", "not valid YAML", "a YAML mapping", "Check it.")

    watch = folder.watch()
    watch.load = broken
    assert "demo" in asyncio.run(watch.latest())


# -- in a browser ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def visit(browser, folder, monkeypatch):
    """visit(size) -> the live page. Every request is to its own server, and nothing goes wrong in it."""
    from posttrain import listen

    faults, ends = [], []
    monkeypatch.setattr(live, "LEAST", 0.0)
    monkeypatch.setattr(live, "SHARE", 0)
    monkeypatch.setattr(live, "EVERY", 0.3)

    def enter(size=None, password=None):
        listener = listen.listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        server = listen.server(live.build(lambda: folder.run, [], password))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        context = browser.new_context(viewport=size or {"width": 1200, "height": 800})
        page = context.new_page()
        page.set_default_timeout(60_000)
        context.on("request", lambda r: faults.append(f"a request to {r.url}") if urlsplit(r.url).port != port else None)
        page.on("pageerror", lambda e: faults.append(f"an error in the page: {e}"))
        page.on("console", lambda m: faults.append(f"the console says: {m.text}") if m.type == "error" and "ERR_CONNECTION" not in m.text else None)
        ends.append((context, server, thread, listener))
        answer = page.goto(listen.address(listener))
        page.policy = answer.headers["content-security-policy"]
        page.server = server
        return page

    yield enter
    for context, server, thread, listener in ends:
        context.close()
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not faults, faults


def settled(page) -> None:
    """The page has asked once, and knows what it shows."""
    until(page, "document.getElementById('live').dataset.state !== ''")


def says(page, words: str) -> None:
    until(page, "words => document.body.innerText.includes(words)", words)


def picture(page, name: str) -> None:
    if to := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{to}/{name}.png")


def test_the_page_follows_a_run_from_before_it_begins(visit, folder, locked):
    page = visit()
    settled(page)
    assert "default-src 'none'" in page.policy and "script-src 'self' 'sha256-" in page.policy and "unsafe-eval" not in page.policy
    assert page.locator("meta[http-equiv='Content-Security-Policy']").count() == 0  # the header's is the one that counts
    says(page, "0 of 4 sections done")
    picture(page, "live-empty")
    folder.begin("sft")
    folder.steps("sft", 1, 20)
    until(page, "document.querySelectorAll('#sft figure').length > 0")
    says(page, "“sft” is at step 20")
    folder.steps("sft", 21, 40)
    says(page, "“sft” is at step 40")
    (folder.run.folder / PROGRESS).write_text(json.dumps({"what": "sft: training", "unit": "step", "done": 40, "total": 80, "left": 61.0,
                                                          "tokens_per_second": None, "note": "loss <b>2.0</b>", "time": time.time()}))
    says(page, "step 40 of 80")
    says(page, "1 min 01 s left")
    says(page, "loss <b>2.0</b>")  # text is text
    until(page, "document.title.startsWith('50 % sft')")
    picture(page, "live-running")
    folder.finish("sft", {"held_out_loss_before": 2.5, "held_out_loss_after": 2.0})
    folder.begin("reward")
    says(page, "1 of 4 sections done")
    until(page, "document.querySelector('#reward') !== null")
    order = page.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)")
    assert order == ["pipeline", "sft", "reward", "provenance"]


def test_the_reader_keeps_their_place(visit, folder, locked):
    for name in ("sft", "ppo"):
        folder.begin(name)
        folder.steps(name, 1, 10, **({"ppo/merged_reward": 0.5, "ppo/kl": 0.1} if name == "ppo" else {}))
    folder.samples(18)
    page = visit()
    settled(page)
    page.fill("#search", "bread")
    page.select_option("#sort", "up")
    page.click("#provenance details:nth-of-type(2) > summary")
    pre = page.locator("#provenance details:nth-of-type(2) pre >> nth=0")
    pre.evaluate("el => { el.scrollTop = 120; el.closest('details').scrollIntoView(); }")
    page.wait_for_timeout(100)
    box, scrolled = pre.bounding_box(), page.evaluate("scrollY")
    assert scrolled > 300

    folder.samples(18, "Changed")  # new answers above, new curves, a new provenance
    folder.steps("ppo", 11, 30, **{"ppo/merged_reward": 0.7, "ppo/kl": 0.2, "ppo/entropy": 1.0})
    folder.finish("sft", {"held_out_loss_before": 2.5, "held_out_loss_after": 2.0})
    until(page, "document.querySelector('#cards').textContent.includes('Changed')")
    says(page, "step 30")
    assert page.input_value("#search") == "bread" and page.input_value("#sort") == "up"
    assert "6 of 6 prompts that match (18 in all)" in page.inner_text("#count")
    assert page.evaluate("document.querySelectorAll('#provenance details[open]').length") == 1
    assert pre.evaluate("el => el.scrollTop") == 120
    after = pre.bounding_box()
    assert abs(after["y"] - box["y"]) < 2, (box, after, scrolled, page.evaluate("scrollY"))
    picture(page, "live-scrolled")

    page.click("#search")
    page.keyboard.type(" ba")
    folder.samples(18, "Once more")
    until(page, "document.querySelector('#cards').textContent.includes('Once more')")
    page.keyboard.type("ke")  # the field still has the focus, and the cursor is at its end
    assert page.input_value("#search") == "bread bake"


def test_text_that_is_being_marked_stays_until_it_is_let_go(visit, folder, locked):
    folder.begin("ppo")
    folder.samples(3, "First")
    page = visit()
    settled(page)
    page.wait_for_timeout(300)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#cards .answer'))")
    folder.samples(3, "Second")
    folder.begin("sft")
    until(page, "document.querySelectorAll('.flow .unfinished').length === 2")  # the rest of the page goes on
    page.wait_for_timeout(1500)
    assert "First" in page.inner_text("#cards")
    page.evaluate("getSelection().removeAllRanges()")
    until(page, "document.querySelector('#cards').textContent.includes('Second')")


def test_on_a_phone_and_when_the_server_ends(visit, folder, locked):
    folder.begin("sft")
    folder.steps("sft", 1, 20)
    (folder.run.folder / PROGRESS).write_text(json.dumps({"what": "sft: training", "unit": "step", "done": 20, "total": 80, "left": 4000.0,
                                                          "tokens_per_second": 812.0, "note": "loss 2.048", "time": time.time()}))
    page = visit({"width": 360, "height": 740})
    settled(page)
    says(page, "1 h 06 min left")
    picture(page, "live-phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.evaluate("document.querySelector('#sft').scrollIntoView()")
    page.wait_for_timeout(100)
    bar, nav = page.locator("#live").bounding_box(), page.locator("body > nav").bounding_box()
    assert bar["y"] == 0 and abs(nav["y"] - bar["height"]) < 2 and bar["height"] < 120
    assert page.locator("#h-sft").bounding_box()["y"] >= nav["y"] + nav["height"] - 1
    picture(page, "live-phone-scrolled")
    page.server.should_exit = True
    says(page, "No answer")
    assert "loss" in page.inner_text("#sft")  # what it last showed stays
    picture(page, "live-lost")


def test_a_password_and_a_foreign_host(visit, folder):
    from starlette.testclient import TestClient

    page = visit(password="correct horse")
    until(page, FOCUS)
    page.keyboard.type("correct horse")
    page.keyboard.press("Enter")
    page.wait_for_selector("#live")
    settled(page)

    client = TestClient(live.build(lambda: folder.run, [], "correct horse"), base_url="http://demo.example")
    assert "Password of this page" in client.get("/").text and client.get("/now").status_code == 403 and "demo" not in client.get("/").text
    local = TestClient(live.build(lambda: folder.run), base_url="http://demo.example")
    assert local.get("/").status_code == 403
    assert TestClient(live.build(lambda: folder.run), base_url="http://127.0.0.1").get("/").status_code == 200


def test_options_of_the_page_alone(tmp_path):
    from typer.testing import CliRunner

    from posttrain.__main__ import app

    done = CliRunner().invoke(app, ["report", "recipes/tiny.yaml", "--port", "8601"])
    assert isinstance(done.exception, PosttrainError) and "--live" in str(done.exception)
    done = CliRunner().invoke(app, ["report", "recipes/tiny.yaml", "--live", "--host", "0.0.0.0"], env={"POSTTRAIN_PASSWORD": ""})
    assert isinstance(done.exception, PosttrainError) and "password" in str(done.exception)
