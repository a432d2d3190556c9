"""`chat` on the tiny model: which version is meant, what it says token by token, commands, interruptions, and the page in headless Chromium."""

import json
import os
import pty
import re
import select
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from functools import partial
from html import unescape
from io import StringIO
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser_support import FOCUS
from browser_support import until as wait_until
from chat_support import finished_run, self_signed

from posttrain import chat, chat_command, versions
from posttrain.chat_command import Refused, Settings, Talk, Terminal
from posttrain.config import DataEntry, ModelConfig
from posttrain.data import load_entry
from posttrain.errors import PosttrainError
from posttrain.generate import Sampling, sample
from posttrain.models import Roles
from posttrain.speaker import Answer, Speaker, whole
from posttrain.versions import Version

ROOT = Path(__file__).parent.parent
GREEDY = Settings(temperature=0.0, max_new_tokens=24)
HELLO = [{"role": "user", "content": "Hello there"}]
NASTY = "<script>document.title = 'run'</script><img src='http://example.invalid/x.png' onerror=\"document.title = 'run'\">"


@pytest.fixture(scope="module")
def talk_run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def speaker(talk_run):
    return Speaker([versions.find(str(talk_run[1] / "sft")), versions.find(str(talk_run[1] / "v1"))])


def talking(speaker, settings: Settings = GREEDY, **more) -> Talk:
    return Talk([v.name for v in speaker.versions], speaker, Settings(**vars(settings)), **more)


# -- which version -----------------------------------------------------------------------------------------------------------------------


def test_a_recipe_or_run_means_the_section_that_finished_last_or_the_named_one(talk_run):
    recipe, folder = map(str, talk_run)
    for spec in (recipe, folder):
        found = versions.find(spec)
        assert (found.name, found.folder) == ("talk/v1", Path(folder) / "v1" / "model") and found.config.lora.r == 4
        assert versions.find(spec, "sft").name == "talk/sft"
        assert (versions.find(spec, "base").folder, versions.find(spec, "base").name) == (None, "talk/base")
        assert versions.beside(spec, "sft") == versions.find(spec, "sft") and versions.beside(spec, "base").folder is None
    assert versions.beside(folder, f"{folder}/v1").name == "talk/v1"
    assert versions.find(f"{folder}/sft/model") == versions.find(f"{folder}/sft") == versions.find(folder, "sft")


def test_an_export_goes_before_what_finished_later(talk_run, tmp_path):
    shutil.copytree(talk_run[1], tmp_path / "talk")
    manifest = tmp_path / "talk" / "sft" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"kind": "export"}))
    assert versions.find(str(tmp_path / "talk")).name == "talk/sft"


def test_an_exported_model_of_a_quantized_recipe_is_a_whole_model(talk_run, tmp_path):
    folder = tmp_path / "talk" / "chat"
    shutil.copytree(talk_run[1] / "v1", folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("quantization: none", "quantization: nf4"))
    (folder / "model" / "adapter_config.json").unlink()
    (folder / "model" / "config.json").write_text("{}")
    found = versions.find(str(folder))
    assert (found.folder, found.config.name_or_path, found.config.quantization) == (None, str(folder / "model"), "none")


@pytest.mark.parametrize("words,told", [
    (("RUN", "reward"), "--section reward: .* one of base, half, sft, v1"), (("RUN", "half"), "is not finished"),
    (("nowhere/at/all",), "no such folder"), (("RUN/sft", "v1"), "is no run"), (("RUN/sft", None, "llama-2"), "has the template of its training")])
def test_what_cannot_answer_is_told_before_anything_is_loaded(talk_run, words, told):
    with pytest.raises(PosttrainError, match=told):
        versions.find(words[0].replace("RUN", str(talk_run[1])), *words[1:])


def test_a_recipe_that_has_not_run(talk_run):
    with pytest.raises(PosttrainError, match="python -m posttrain run recipes/llama2-7b-qlora.yaml"):
        versions.find("recipes/llama2-7b-qlora.yaml")


# -- answers -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which,name", [(0, "sft"), (1, "v1")])
def test_an_answer_is_what_the_stages_sample(speaker, talk_run, which, name):
    """Both versions on one base say what each says alone, and not the same; pieces join to the whole."""
    import torch

    alone = Roles(versions.find(str(talk_run[1]), name).config, torch.float32, name)
    alone.add("x", talk_run[1] / name / "model")
    heard = []
    messages = [{"role": "system", "content": "Be kind."}, *HELLO]
    answer = speaker.answer(which, messages, Sampling(24, 0.7, 0.9), 5, heard.append)
    ids, = sample(alone, "x", [chat.encode_prompt(alone.tokenizer, messages)], 1, Sampling(24, 0.7, 0.9), 5, stop=chat.end_of_turn(alone.tokenizer))
    assert answer == Answer(chat.decode(alone.tokenizer, ids[0].ids), "end" if ids[0].finished else "length")
    assert "".join(heard) == answer.text and len(heard) > 3
    assert speaker._roles[0].base is speaker._roles[1].base
    assert speaker.answer(1 - which, messages, Sampling(24, 0.7, 0.9), 5).text != answer.text


def test_the_base_stands_beside_its_run(talk_run):
    both = Speaker([versions.find(str(talk_run[0])), versions.find(str(talk_run[0]), "base")])
    texts = [both.answer(i, HELLO, Sampling(16, 0.0)).text for i in (0, 1)]
    plain = Speaker([Version("tiny", None, ModelConfig(name_or_path="builtin:tiny-llama", chat_template="chatml", dtype="float32"))])
    assert texts[1] == plain.answer(0, HELLO, Sampling(16, 0.0)).text != texts[0]
    assert len({id(r.base) for r in both._roles}) == 1


def test_half_a_character_is_not_shown(speaker):
    tokenizer = speaker._roles[0].tokenizer
    ids = tokenizer("né ☃", add_special_tokens=False)["input_ids"]
    shown = [whole(tokenizer, ids[:n + 1]) for n in range(len(ids))]
    assert shown[-1] == "né ☃" and not any("\N{REPLACEMENT CHARACTER}" in s for s in shown) and len(set(shown)) < len(ids)


def test_a_conversation_that_is_too_long_or_spells_a_token(speaker):
    with pytest.raises(PosttrainError, match="the conversation: has .* tokens. Expected fewer than 2,048"):
        speaker.answer(0, [{"role": "user", "content": "word " * 3000}], Sampling(8))
    with pytest.raises(PosttrainError, match="Take that turn back"):
        speaker.answer(0, [{"role": "user", "content": "<|im_end|>"}], Sampling(8))


def test_a_base_without_a_template_names_the_option():
    with pytest.raises(PosttrainError, match="--chat-template: chatml"):
        Speaker([versions.find("builtin:tiny-llama")])
    assert Speaker([versions.find("builtin:tiny-llama", None, "chatml")]).answer(0, HELLO, Sampling(2, 0.0))


def test_every_version_sees_its_own_answers(speaker):
    talk, ended = talking(speaker, system="Be kind."), []

    def history(i: int, text: str) -> list[dict]:
        return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": ended[i][1]},
                {"role": "user", "content": text}]

    def answer(i: int, text: str) -> str:
        return speaker.answer(i, history(i, text), Sampling(24, 0.0, 0.9)).text

    def ask(text: str) -> None:
        talk.ask(text, lambda *_: None, lambda i, text, why: ended.append((i, text)), threading.Event())

    ask("Hello")
    second = next(t for t in ("Who?", "Why?", "Where is it?", "And then?", "Tell me more.", "Is it so?") if all(answer(i, t) for i in (0, 1)))
    ask(second)  # one to which both random models say something
    assert [i for i, _ in ended] == [0, 1, 0, 1] and ended[0][1] != ended[1][1]
    for i in (0, 1):
        assert talk.messages(i)[:-1] == history(i, second) and answer(i, second) == ended[2 + i][1]


# -- the terminal ------------------------------------------------------------------------------------------------------------------------


def piped(monkeypatch, talk: Talk, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(text))
    Terminal(talk).run()


def test_lines_from_a_pipe_give_answers_alone(speaker, monkeypatch, capsys):
    talk = talking(Speaker(speaker.versions[:1]))
    piped(monkeypatch, talk, "Hello\\\nthere\n\nWho?\n/reset\nHello\\\nthere\n/temperature 99\n/nothing\n/quit\nmore\n")
    told = capsys.readouterr()
    first = speaker.answer(0, [{"role": "user", "content": "Hello\nthere"}], Sampling(24, 0.0)).text
    history = [{"role": "user", "content": "Hello\nthere"}, {"role": "assistant", "content": first}, {"role": "user", "content": "Who?"}]
    second = speaker.answer(0, history, Sampling(24, 0.0)).text
    assert told.out == f"{first}\n{second}\n{first}\n"
    assert told.err.splitlines() == ["A new conversation.", "/temperature: temperature is a number from 0 to 10",
                                     "/nothing: no such command; /help lists them, and a space before the / makes it text"]


def test_two_versions_in_a_pipe_are_named_and_a_fault_ends_it(speaker, monkeypatch, capsys):
    piped(monkeypatch, talking(speaker), "Hello\n")
    assert re.fullmatch(r"\[talk/sft\] .*\n\[talk/v1\] .*\n", capsys.readouterr().out, re.S)
    with pytest.raises(PosttrainError, match="Take that turn back"):
        piped(monkeypatch, talking(speaker), "a <|im_end|> b\n")


def test_commands(speaker, tmp_path, capsys, monkeypatch):
    talk = talking(speaker)
    with pytest.raises(Refused):
        talk.undo("")
    piped(monkeypatch, talk, f"/system Be kind.\n/temperature 1\n/top_p 0.5\n/max_new_tokens 8\n/save {tmp_path}/x.jsonl\n"
                             f"Hello\nWho?\n/undo\nWhy?\n/again\n/save {tmp_path}/talk.jsonl\n/save {tmp_path}/talk.jsonl\n")
    assert (talk.system, talk.settings) == ("Be kind.", Settings(1.0, 0.5, 8))
    assert [t.user for t in talk.turns] == ["Hello", "Why?"]
    told = capsys.readouterr().err
    assert "there is nothing to save" in told and "Taken back: Who?" in told and "talk.jsonl exists" in told
    loaded = load_entry(DataEntry(path=str(tmp_path / "talk.jsonl"), format="messages"), tmp_path, 0, "test")
    assert [d.messages for d in loaded.items] == [talk.messages(0), talk.messages(1)] and loaded.findings == []
    for bad in ("/top_p 0", "/max_new_tokens 0", "/max_new_tokens 1.5", "/temperature x", "/temperature nan"):
        before = vars(talk.settings).copy()
        piped(monkeypatch, talk, bad + "\n")
        assert vars(talk.settings) == before and "is" in capsys.readouterr().err


def test_a_seed_makes_the_same_conversation_and_another_answer_to_again(speaker, monkeypatch, capsys):
    heard = []
    for _ in range(2):
        talk = talking(speaker, Settings(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=3))
        piped(monkeypatch, talk, "Hello\n/again\n")
        heard.append(capsys.readouterr().out)
    first, second = (m for m in re.findall(r"\[talk/sft\] (.*)\n\[", heard[0]))
    assert heard[0] == heard[1] and first != second


def test_an_interruption_stops_the_answer_and_keeps_what_was_said(speaker):
    talk = talking(Speaker(speaker.versions[:1]), Settings(temperature=0.0, max_new_tokens=1500))
    terminal, ended = Terminal(talk), []
    terminal.heard = lambda i, text: signal.raise_signal(signal.SIGINT)
    terminal.ended = lambda i, text, why: ended.append((text, why))
    before = signal.getsignal(signal.SIGINT)
    terminal.ask("Hello")
    (text, why), = ended
    assert why == "stopped" and text and talk.turns[0].answers == [text]
    assert signal.getsignal(signal.SIGINT) is before
    talk.settings.max_new_tokens = 24
    assert talk.speaker.answer(0, [{"role": "user", "content": "Hello"}], Sampling(24, 0.0)).text.startswith(text)


def test_a_terminal_is_not_steered_by_an_answer(speaker, monkeypatch, capsys):
    terminal = Terminal(talking(speaker))
    terminal.shown = True
    terminal.write("a\x1b[2Jb\x9bc\r\x07\td\n")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\ufffd\ufffd\td\n"


def test_in_a_real_terminal_ctrl_c_stops_the_answer_and_not_the_program(talk_run):
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "posttrain", "chat", str(talk_run[0]), "--section", "sft", "--temperature", "2", "--top-p", "1",
                                "--max-new-tokens", "1900", "--seed", "5"], cwd=ROOT, preexec_fn=lambda: os.login_tty(slave))
    os.close(slave)
    seen = ""

    def until(words: str, key: bytes = b"") -> None:
        """key: pressed until it works; readline does not notice an interruption in the moment before it waits."""
        nonlocal seen
        end = time.monotonic() + 200
        while words not in seen:
            assert time.monotonic() < end and process.poll() is None, seen
            os.write(master, key)
            if select.select([master], [], [], 2 if key else 0.2)[0]:
                seen += os.read(master, 65536).decode("utf-8", "replace")
        seen = seen[seen.index(words) + len(words):]

    try:
        until("Ctrl-D ends")
        until("> ")
        os.write(master, b"Hello\n")
        until("Hello\r\n")
        while len(seen) < 5:
            seen += os.read(master, 65536).decode("utf-8", "replace")
        os.write(master, b"\x03")
        until("(stopped)")
        until("> ")
        until("/quit or Ctrl-D ends.", b"\x03")
        until("> ")
        os.write(master, b"/max_new_tokens 3\n")
        until("max_new_tokens 3")
        until("max_new_tokens 3")
        until("> ")
        os.write(master, b"\x04")
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


# -- the page ----------------------------------------------------------------------------------------------------------------------------


class Scripted:
    """In the place of the models: answers word by word, with text that would love to run."""

    def __init__(self, pause: float = 0.0):
        self.pause, self.asked, self.stopped = pause, [], 0

    def answer(self, which, messages, sampling, seed, heard, stop):
        self.asked.append((which, messages, sampling))
        if messages[-1]["content"] == "fail":
            raise PosttrainError("the conversation", "has 9,999 tokens", "fewer", "Begin a new one.")
        said = ""
        for word in f"Version {which}, answer {len(messages)}: {NASTY} and **more**.".split(" "):
            if stop.wait(self.pause):
                self.stopped += 1
                return Answer(said, "stopped")
            said += " " + word if said else word
            heard(" " + word if said != word else word)
        return Answer(said, "length" if sampling.max_new_tokens < 50 else "end")


@pytest.fixture
def page():
    """page(password) -> a test client of the page of two versions."""
    pytest.importorskip("starlette", reason="the extra [ui] is not installed: run `make install`")
    from starlette.testclient import TestClient

    from posttrain.chat_web import build

    return lambda password=None, names=("run/sft", "run/v1"), client=TestClient: client(
        build(Scripted(), list(names), Settings(), "", password), base_url="http://127.0.0.1:8500")


def order(**more) -> dict:
    return {"order": json.dumps({"version": 0, "messages": HELLO, "temperature": 0.5, "top_p": 1, "max_new_tokens": 99} | more)}


def test_the_page_streams_lines_and_refuses_what_is_no_question(page):
    client = page()
    lines = [json.loads(line) for line in client.post("/answer", data=order()).text.splitlines()]
    assert "".join(line["text"] for line in lines[:-1]) == lines[-1]["whole"] and lines[-1]["why"] == "end" and len(lines) > 5
    fault = json.loads(client.post("/answer", data=order(messages=[{"role": "user", "content": "fail"}])).text)
    assert fault["error"].startswith("the conversation: has")
    for bad in (order(version=2), order(version=-1), order(messages=[]), order(messages=[{"role": "assistant", "content": "x"}]),
                order(temperature=-1), order(more=1), order(messages=[{"role": "user", "content": "x", "more": "y"}]), {"order": "{"}, {}):
        assert client.post("/answer", data=bad).status_code == 400
    assert client.post("/answer", data={"order": "x" * (1 << 21)}).status_code == 413


def test_the_page_is_for_this_machine_and_lets_nothing_run(page):
    client = page(names=("<script>1</script>\"'&", "b"))
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"] and "<script>1" not in answer.text
    names = re.search(r'data-names="([^"]*)"', answer.text)[1]
    assert json.loads(unescape(names)) == ["<script>1</script>\"'&", "b"]
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client.post("/answer", data=order(), headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/static/../chat_web.py").status_code == 404


def test_beyond_this_machine_a_password_is_demanded_and_asked(page, tmp_path, monkeypatch):
    monkeypatch.delenv("POSTTRAIN_PASSWORD", raising=False)
    with pytest.raises(PosttrainError, match="there is no password"):
        chat_command._on_a_page([], Settings(), "", "0.0.0.0", 0, None, None, None)
    client = page("correct horse")
    assert "password" in client.get("/").text and client.post("/answer", data=order()).status_code == 403
    assert client.post("/sign-in", data={"password": "wrong"}).status_code == 403
    assert client.post("/sign-in", data={"password": "correct horse"}).status_code == 200  # after the redirect
    assert "composer" in client.get("/").text and client.post("/answer", data=order()).status_code == 200


def test_https_with_a_certificate_of_ones_own_and_a_cookie_for_it_alone(tmp_path):
    httpx2 = pytest.importorskip("httpx2", reason="the extra [serve] is not installed: run `make install`")
    from posttrain import listen
    from posttrain.chat_web import build

    certificate, key = self_signed(tmp_path)
    cookies = {}
    for tls in ({}, listen.tls(certificate, key)):
        listener = listen.listen("127.0.0.1", 0)
        server = listen.server(build(Scripted(), ["run/v1"], Settings(), "", "correct horse"), **tls)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = listen.address(listener, bool(tls))
        with httpx2.Client(base_url=address, verify=ssl.create_default_context(cafile=certificate), timeout=20) as client:
            assert client.post("/answer", data=order()).status_code == 403
            cookies[address.partition(":")[0]] = client.post("/sign-in", data={"password": "correct horse"}).headers["set-cookie"]
            assert json.loads(client.post("/answer", data=order()).text.splitlines()[-1])["why"] == "end"
        if tls:
            with pytest.raises(httpx2.HTTPError):
                httpx2.get(address.replace("https", "http"), timeout=5)
            with pytest.raises(httpx2.ConnectError, match="(?i)certificate"):
                httpx2.get(address, timeout=5)
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert "Secure" in cookies["https"] and "Secure" not in cookies["http"] and all("HttpOnly" in c for c in cookies.values())


def test_certificates_that_cannot_be_used_are_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    certificate, key = self_signed(tmp_path)
    other, _ = self_signed(tmp_path, "other")
    locked, its_key = self_signed(tmp_path, "locked", "-passout", "pass:x1y2z3")
    damaged = tmp_path / "damaged.pem"
    damaged.write_text(certificate.read_text()[:60])
    monkeypatch.setattr(chat_command, "_loaded", lambda found: pytest.fail("a model was loaded"))
    for words, told in (((certificate, None), "one without the other"), ((None, key), "one without the other"),
                        ((tmp_path / "no.pem", key), "No such file"),
                        ((certificate, tmp_path), "--tls-key .*Is a directory"), ((key, key), "--tls-certificate .*no certificate in it"),
                        ((certificate, certificate), "--tls-key .*no private key in it"), ((other, key), "do not belong together"),
                        ((locked, its_key), "locked with a passphrase.*`openssl pkey"), ((damaged, key), "cannot be used")):
        with pytest.raises(PosttrainError, match=told) as e:
            chat_command._on_a_page([], Settings(), "", "127.0.0.1", 0, None, *words)
        assert e.value.expected and e.value.do


@pytest.fixture
def visit(browser):
    """visit(speaker, names, size) -> the page of these versions. Every request is to its own server, and nothing goes wrong in it."""
    pytest.importorskip("starlette", reason="the extra [ui] is not installed: run `make install`")
    from posttrain import listen
    from posttrain.chat_web import build

    faults, ends = [], []

    def enter(speaker, names=("run/v1",), size=None, password=None, **more):
        listener = listen.listen("127.0.0.1", 0)
        server = listen.server(build(speaker, list(names), Settings(**more), "", password))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        context = browser.new_context(viewport=size or {"width": 1200, "height": 800})
        opened = context.new_page()
        opened.set_default_timeout(20_000)
        context.on("request", lambda r: faults.append(f"a request to {r.url}") if urlsplit(r.url).port != listener.getsockname()[1] else None)
        opened.on("pageerror", lambda e: faults.append(f"an error in the page: {e}"))
        opened.on("console", lambda m: faults.append(f"the console says: {m.text}") if "Content Security Policy" in m.text else None)
        ends.append((context, server, thread, listener))
        opened.goto(listen.address(listener))
        until(opened, FOCUS)
        return opened

    yield enter
    for context, server, thread, listener in ends:
        context.close()
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not faults, faults


until = partial(wait_until, seconds=20)
IDLE = "document.getElementById('log').getAttribute('aria-busy') === 'false'"


def picture(page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_the_page_streams_an_answer_of_the_tiny_model(visit, talk_run):
    one = Speaker([versions.find(str(talk_run[0]), "sft")])
    page = visit(one, temperature=0.0, max_new_tokens=200)
    lengths = []
    page.keyboard.type("Hello there")
    page.keyboard.press("Enter")
    while not lengths or page.evaluate(f"!({IDLE})"):
        lengths.append(len(page.inner_text(".reply .text")))
    assert page.evaluate("document.querySelector('.reply .text').textContent") == one.answer(0, HELLO, Sampling(200, 0.0)).text
    assert len(set(lengths)) > 3 and lengths == sorted(lengths)


def test_text_never_runs_and_two_versions_stand_side_by_side(visit):
    speaker = Scripted(0.01)
    page = visit(speaker, ("run/sft", "run/v1"))
    for text in (NASTY, "And then?"):
        page.keyboard.type(text)
        page.keyboard.press("Enter")
        until(page, IDLE)
    assert page.title() != "run" and page.locator("main script, main img").count() == 0
    assert page.inner_text(".said.user .text >> nth=0") == NASTY
    assert page.inner_text(".reply.n2 .text >> nth=1") == f"Version 1, answer 3: {NASTY} and **more**."
    left, right = (page.locator(f".turn >> nth=0 >> .reply.n{i}").bounding_box() for i in (1, 2))
    assert abs(left["y"] - right["y"]) < 2 and right["x"] > left["x"] + left["width"]
    assert speaker.asked[3][1][1]["content"].startswith("Version 1, answer 1")  # each sees its own answers
    picture(page, "two-desktop")
    page.reload()
    until(page, IDLE)
    assert page.locator(".turn").count() == 2  # a reload loses nothing

    page.click("#again")
    until(page, IDLE)
    page.click("#undo")
    assert page.locator(".turn").count() == 1 and page.input_value("#text") == "And then?"
    with page.expect_download() as download:
        page.click("#save")
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [(r["model"], len(r["messages"])) for r in rows] == [("run/sft", 2), ("run/v1", 2)]
    page.click("#reset")
    assert page.locator(".turn").count() == 0


def test_stop_settings_and_faults(visit):
    speaker = Scripted(0.1)
    page = visit(speaker)
    page.click("summary")
    page.fill("[name=system]", "Be kind.")
    page.fill("[name=max_new_tokens]", "7")
    page.fill("[name=temperature]", "1.5")
    picture(page, "settings")
    page.fill("#text", "Hello")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.reply .text')?.textContent.length > 3")
    assert page.is_visible("#stop") and not page.is_visible("#send")
    picture(page, "streaming")
    page.keyboard.press("Escape")
    until(page, IDLE)
    assert "Stopped." in page.inner_text(".reply") and page.is_visible("#send") and not page.is_visible("#stop")
    end = time.monotonic() + 5
    while not speaker.stopped and time.monotonic() < end:
        time.sleep(0.02)
    assert speaker.stopped == 1  # the model too
    _, messages, sampling = speaker.asked[0]
    assert messages[0] == {"role": "system", "content": "Be kind."} and (sampling.max_new_tokens, sampling.temperature) == (7, 1.5)
    page.fill("#text", "fail")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note.error")
    assert "Begin a new one." in page.inner_text(".note.error") and page.input_value("#text") == "fail"
    picture(page, "fault")
    speaker.pause = 0.0
    page.fill("#text", "Hello again")
    page.keyboard.press("Enter")
    until(page, "document.body.innerText.includes('Cut off')")
    assert page.locator(".turn").count() == 2 and [m["role"] for m in speaker.asked[-1][1]] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("names", [("run/v1",), ("a-run-with-a-long-name/reward-weighted", "b")])
def test_on_a_phone_nothing_is_wider_than_the_screen(visit, names):
    page = visit(Scripted(), names, {"width": 360, "height": 740})
    picture(page, f"phone-empty-{len(names)}")
    page.fill("#text", "word " * 40 + "x" * 200)
    page.keyboard.press("Enter")
    page.wait_for_selector(".reply")
    until(page, IDLE)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    picture(page, f"phone-{len(names)}")
    page.click("summary")
    picture(page, f"phone-{len(names)}-closed")
    heights = page.eval_on_selector_all("button", "all => all.map(b => b.offsetHeight).filter(h => h)")
    assert len(heights) == 5 and all(h >= 30 for h in heights)


def test_a_password_in_the_browser(visit):
    page = visit(Scripted(), password="correct horse")
    picture(page, "sign-in")
    page.keyboard.type("correct horse")
    page.keyboard.press("Enter")
    page.wait_for_selector("#composer")
