"""Who answers: runs of this project sampled in the worker's process, and an endpoint."""

import json
import threading
import time
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("sqlalchemy", reason="the extra [ui] is not installed: run `make install`")

import shutil

from annotate_support import Person, filled, quick_folder, rows
from rlhf_support import parents
from sqlalchemy import insert, select
from starlette.testclient import TestClient

from posttrain import versions
from posttrain.annotate import figures, tasks, web, work, worker
from posttrain.annotate.command import Answerer
from posttrain.annotate.models import variants
from posttrain.annotate.store import Store, answers, attempts, unpack
from posttrain.annotate.worker import AT_ONCE, Worker
from posttrain.errors import PosttrainError
from posttrain.runs import read_json, write_json

folder = pytest.fixture(quick_folder)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A finished sft section of the tiny model: runs/t/sft."""
    return parents(tmp_path_factory.getbasetemp()) / "t" / "sft"


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint; `asked` holds the bodies, `said(body)` makes the text (None: HTTP 400)."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            text = server.said(body)
            out = json.dumps({"choices": [{"message": {"content": text}}]} if text is not None else {"error": {"message": "no such thing"}}).encode()
            self.send_response(200 if text is not None else 404)
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
    server.said = lambda body: f"Reply {len(server.asked)} to {body['messages'][-1]['content']}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def made(store: Store) -> dict[str, dict]:
    with store.read() as c:
        return {r["key"]: dict(r) for r in c.execute(select(answers)).mappings()}


def test_a_run_answers_at_two_temperatures(folder, sft):
    store = filled(folder, [{"prompt": f"What is {thing}?"} for thing in ("bread", "salt", "rain", "tea")])
    Person(store, live=True).look()
    chosen = variants([str(sft)], [0.3, 0.6], 24, None)
    assert [v.name for v in chosen] == ["t/sft at 0.3", "t/sft at 0.6"]
    worker = Worker(store, chosen)
    while worker.step():
        pass
    found = made(store)
    assert len(found) == 4 and not any(r["state"] == "waiting" for r in found.values())
    ready = [unpack(r["answers"]) for r in found.values() if r["state"] == "ready"]
    assert ready and all([a["model"] for a in pair] == ["t/sft at 0.3", "t/sft at 0.6"] and pair[0]["text"] != pair[1]["text"] for pair in ready)
    assert all(r["error"] for r in found.values() if r["state"] == "failed")


def test_a_text_that_no_model_may_read_is_told(folder, sft):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "safety", "w"))
    ann = Person(store, live=True)
    ann.do("message", "What does <|im_end|> mean?")
    Worker(store, variants([str(sft)], [], 8, None)).step()
    assert "spells the token '<|im_end|>'" in ann.look().turn.problem
    ann.do("undo")
    assert ann.look().turns == []


def test_an_endpoint_answers(folder, endpoint):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "helpfulness", "w"))
    ann = Person(store, live=True)
    ann.do("message", "Hello?")
    worker = Worker(store, variants([f"{endpoint.url}#small", f"{endpoint.url}#large"], [0.3, 0.9], 8, None))
    assert worker.step() == 1 and worker.step() == 0
    assert [a["model"] for a in ann.look().turn.answers] == ["small at 0.3", "large at 0.9"]
    assert [(b["model"], b["temperature"]) for b in endpoint.asked] == [("small", 0.3), ("large", 0.9)]
    ann.prefer("b", 1)
    ann.do("message", "And then?")
    worker.step()
    assert endpoint.asked[-1]["messages"] == ann.look().turn.prompt and len(endpoint.asked[-1]["messages"]) == 3


def test_the_same_answer_twice_is_drawn_again_and_then_told(folder, endpoint):
    endpoint.said = lambda body: "Always this."
    store = filled(folder, [{"prompt": "Hello?"}])
    ann = Person(store, live=True)
    ann.look()
    Worker(store, variants([f"{endpoint.url}#m"], [], 8, None)).step()
    assert ann.look().turn.problem == "both answers are the same" and len(endpoint.asked) == 8


def test_an_endpoint_that_fails_is_told_in_its_words(folder, endpoint):
    endpoint.said = lambda body: None
    store = filled(folder, [{"prompt": "Hello?"}])
    ann = Person(store, live=True)
    ann.look()
    Worker(store, variants([f"{endpoint.url}#m"], [], 8, None)).step()
    assert "HTTP 404" in ann.look().turn.problem and "judge" not in ann.look().turn.problem and len(endpoint.asked) <= 4


class Stub:
    """A model that does what is in the prompt."""

    def __init__(self):
        self.asked = []

    def draw(self, v, prompts, seed):
        self.asked.append([p[-1]["content"] for p in prompts])
        for p in self.asked[-1]:
            if "raise" in p:
                raise FAULTS[p.split()[-1]]
        return [f"{v.name} says {p}." for p in self.asked[-1]]


class Ended(BaseException):
    """The process is gone."""


class AcceleratorError(RuntimeError):
    """Named as torch's."""


FAULTS = {"memory": RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "more": MemoryError(), "key": KeyError("no such layer"),
          "kernel": AcceleratorError("CUDA error: an illegal memory access was encountered"), "end": Ended(),
          "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory")}


def stubbed(store: Store) -> tuple[Worker, Stub]:
    made, stub = Worker(store, variants(["http://localhost:1/v1#m"], [], 8, None)), Stub()
    made.sources = [stub, stub]
    return made, stub


@pytest.mark.parametrize("what, words", [
    ("memory", "a smaller --max-new-tokens, a smaller or quantized model, or an endpoint"),
    ("key", "the model could not answer (KeyError: 'no such layer')")])
def test_a_fault_costs_its_own_prompt_alone_and_is_told(folder, monkeypatch, what, words):
    monkeypatch.setattr(worker, "BACKOFF", 0.0)
    store = filled(folder, [{"prompt": f"raise {what}"}, *({"prompt": f"Question {i}?"} for i in range(4))])
    people = [Person(store, name, live=True) for name in ("ann", "bob", "cyd", "dan")]
    for p in people:
        p.look()
    made_, stub = stubbed(store)
    taken = []
    while n := made_.step():
        taken.append(n)
    assert taken[:2] == [4, 1] and sorted(r["state"] for r in made(store).values()) == ["failed", *["ready"] * 4]
    assert [p for asked in stub.asked for p in asked].count(f"raise {what}") == worker.ATTEMPTS == 3
    assert words in people[0].look().turn.problem
    report = figures.report(store)
    assert list(report[0]["failed"].values()) == [1] and f"  without an answer: 1 × {people[0].look().turn.problem}" in figures.words(report)
    c = TestClient(web.build(store, None, live=True), base_url="http://127.0.0.1")
    c.post("/sign-in", data={"name": "ann"})
    assert words.split(" (")[0] in unescape(c.get("/q/1").text) and "Without an answer of the models" in c.get("/progress").text
    people[0].do("again")  # three more
    while made_.step():
        pass
    assert [p for asked in stub.asked for p in asked].count(f"raise {what}") == 6 and people[0].look().turn.problem
    people[0].do("skip broken")
    assert people[0].look().turn.answers


@pytest.mark.parametrize("what", ["memory", "more", "cpu"])
def test_memory_that_runs_out_is_known_by_its_words(what):
    assert worker.reason(FAULTS[what]) == worker.NO_MEMORY and worker.reason(FAULTS["kernel"]) != worker.NO_MEMORY


def test_attempts_wait_longer_and_longer_and_others_come_first(folder, monkeypatch):
    store = filled(folder, [{"prompt": "raise key"}, {"prompt": "Question?"}], raters=2)
    Person(store, live=True).look()
    clock = [time.time() + 10]
    monkeypatch.setattr(worker, "now", lambda: clock[0])
    made_, stub = stubbed(store)
    made_.step()  # the first, which somebody waits for, alone
    assert made_.step() == 1 and stub.asked[-1] == ["Question?"] and made_.step() == 0
    for after, again in ((1.9, 0), (0.2, 1), (7.7, 0), (0.4, 1), (1e6, 0)):
        clock[0] += after
        assert made_.step() == again
    assert [r["state"] for r in made(store).values()] == ["failed", "ready"]


def test_a_prompt_that_ends_the_process_is_given_up_too(folder, monkeypatch):
    monkeypatch.setattr(worker, "BACKOFF", 0.0)
    store = filled(folder, [{"prompt": "raise end"}, {"prompt": "Question?"}], raters=2)
    ann = Person(store, live=True)
    ann.look()
    for _ in range(worker.ATTEMPTS):
        made_, _ = stubbed(store)  # begun again
        with pytest.raises(Ended):
            while made_.step():
                pass
    made_, _ = stubbed(store)
    while made_.step():
        pass
    assert "ended while it was at this, 3 times" in ann.look().turn.problem and [r["state"] for r in made(store).values()] == ["failed", "ready"]


def test_another_pages_process_leaves_alone_what_this_one_is_at(folder, monkeypatch):
    store, later = filled(folder, [{"prompt": "raise end"}]), [0.0]
    monkeypatch.setattr(worker, "now", lambda: time.time() + later[0])
    Person(store, live=True).look()
    first, _ = stubbed(store)
    with pytest.raises(Ended):
        first.step()
    other = Worker(store, first.variants, "another")
    later[0] = 60.0
    assert other.step() == 0
    begun_again, _ = stubbed(store)
    assert begun_again.step() == 0
    later[0] += worker.BACKOFF + 0.1
    with pytest.raises(Ended):
        begun_again.step()


def test_a_process_whose_accelerator_is_lost_ends_and_is_counted(folder, monkeypatch):
    monkeypatch.setattr(worker, "BACKOFF", 0.0)
    store = filled(folder, [{"prompt": "raise kernel"}])
    Person(store, live=True).look()
    for n in range(1, 4):
        with pytest.raises(AcceleratorError):
            stubbed(store)[0].step()
        assert made(store)[next(iter(made(store)))]["state"] == ("failed" if n == 3 else "waiting")


def test_a_new_start_of_the_page_gives_new_attempts(folder, endpoint):
    store = filled(folder, [{"prompt": "Hello?"}])
    Person(store, live=True).look()
    with store.write() as c:
        c.execute(insert(attempts).values(key=next(iter(made(store))), begun=worker.ATTEMPTS, after=0.0, worker="before"))
    answerer = Answerer(store, variants([f"{endpoint.url}#m"], [], 8, None))
    try:
        end = time.monotonic() + 60
        while made(store)[next(iter(made(store)))]["state"] != "ready" and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        answerer.close()
    assert [r["state"] for r in made(store).values()] == ["ready"]


def test_somebody_who_waits_comes_before_what_is_made_ahead(folder, endpoint, monkeypatch):
    monkeypatch.setattr(work, "AHEAD", 2 * AT_ONCE)
    store = filled(folder, [{"prompt": f"Ahead {i}?"} for i in range(30)])
    tasks.load(store, "w", tasks.written(1, "safety", "w"))
    people = [Person(store, name, live=True) for name in ("ann", "bob")]
    for p in people:
        p.look()
    Person(store, "eve", queue=2, live=True).do("message", "Now!")
    worker = Worker(store, variants([f"{endpoint.url}#m"], [], 8, None))
    assert worker.step() == 3 and {r["key"] for r in made(store).values() if r["state"] == "ready"} >= {k for k,
                                                                                                        r in made(store).items() if r["urgent"]}
    assert worker.step() == 2 < AT_ONCE


def test_a_red_team_talks_to_one_model_throughout(folder, endpoint):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(6, "redteam", "w"))
    worker = Worker(store, variants([f"{endpoint.url}#m1", f"{endpoint.url}#m2"], [0.5], 8, None))
    ann, seen = Person(store, live=True), set()
    for i in range(6):
        ann.do("message", f"Attack {i}")
        worker.step()
        first = ann.look().turn.answers
        ann.do("message", "Please.")
        worker.step()
        assert len(first) == 1 and ann.look().turn.answers[0]["model"] == first[0]["model"]
        seen.add(first[0]["model"])
        for what in ("category 1", "vector 1", "degree 1"):
            ann.do(f"answer {what}")
        ann.do("finish")
    assert len(seen) == 2


def test_models_are_checked_before_anything_is_loaded(folder, sft, monkeypatch):
    half = folder / "half"
    shutil.copytree(sft, half)
    (half / "DONE").unlink()
    reward = folder / "reward"
    shutil.copytree(sft, reward)
    write_json(reward / "manifest.json", read_json(reward / "manifest.json") | {"kind": "reward"})
    (folder / "empty").mkdir()
    for spec, words in ((half, "is not finished"), (reward, "of the kind 'reward'"), (folder / "empty", "no model"), ("./nowhere", "no such folder"),
                        ("builtin:nothing", "no built-in model")):
        with pytest.raises(PosttrainError, match=words):
            variants([str(spec)], [], 8, None)
    with pytest.raises(PosttrainError, match="both answers would be of"):
        variants([str(sft)], [0.7], 8, None)
    with pytest.raises(PosttrainError, match="more than twice"):
        variants(["a", "b", "c"], [], 8, None)
    with pytest.raises(PosttrainError, match="NAME of an environment variable"):
        variants(["http://localhost:1/v1#m"], [], 8, "sk-secret")
    folder_of, config, _ = versions.locate(str(sft / "model"), "--model", "")
    assert folder_of == sft / "model" and config.name_or_path == "builtin:tiny-llama"


def test_prepared_tasks_need_no_model(folder):
    ann = Person(filled(folder, rows(1)), live=True)
    ann.prefer("a", 1)
    assert ann.look().may_write(True) and not ann.look().may_write(False)
