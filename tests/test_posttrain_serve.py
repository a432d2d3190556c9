"""`serve` on the tiny model behind OpenAI's own client; the proxy before a stand-in of an engine; the folder that engines are given; how it ends."""

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed: run `make install`")
pytest.importorskip("openai", reason="the extra [serve] is not installed: run `make install`")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed: run `make install`")

import httpx2
import openai
from chat_support import finished_run, self_signed
from safetensors.torch import load_file
from starlette.testclient import TestClient

from posttrain import chat, listen, servable, serve, versions
from posttrain.errors import PosttrainError
from posttrain.generate import Sampling
from posttrain.serve_proxy import Proxy
from posttrain.speaker import Speaker

ROOT = Path(__file__).parent.parent
KEY = "a-key-of-tests"
HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of the module's own, with the built-in model made once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def talk_run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("talk"))


class Served:
    """`python -m posttrain serve` with these words; what it said, and the processes it began."""

    def __init__(self, *words: str):
        self.process = subprocess.Popen([sys.executable, "-m", "posttrain", "serve", *words], cwd=ROOT, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TESTS_KEY": KEY})
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"answers at (\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError(self.said)
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        self.engine, = (p for p in self.children if "transformers.cli.transformers" in p.cmdline())

    def ended(self) -> bool:
        self.process.wait(60)
        return not psutil.wait_procs(self.children, timeout=30)[1]


@pytest.fixture(scope="module")
def served(talk_run, cache):
    server = Served(str(talk_run[0]), "--section", "sft", "--port", "0", "--api-key-env", "TESTS_KEY")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def ours(talk_run, served):
    """What `chat` says without chance."""
    answer = Speaker([versions.find(str(talk_run[0]), "sft")]).answer(0, HELLO, Sampling(24, 0.0))
    assert len(answer.text) > 3
    return answer.text


# -- OpenAI's client ---------------------------------------------------------------------------------------------------------------------


def test_the_client_lists_the_model_and_nothing_else(client):
    assert [m.id for m in client.models.list()] == ["talk/sft"]
    assert client.models.retrieve("talk/sft").owned_by == "posttrain"


def test_an_answer_is_that_of_chat(client, ours):
    answer = client.chat.completions.create(model="talk/sft", messages=HELLO, temperature=0, max_tokens=24)
    assert (answer.choices[0].message.content.strip(), answer.model) == (ours, "talk/sft")
    assert answer.usage.completion_tokens <= 24 and answer.usage.prompt_tokens > 20


def test_an_answer_streams(client, ours):
    pieces, reasons = [], []
    for chunk in client.chat.completions.create(model="talk/sft", messages=HELLO, temperature=0, max_tokens=24, stream=True):
        assert chunk.model == "talk/sft"
        pieces.append(chunk.choices[0].delta.content or "")
        reasons.append(chunk.choices[0].finish_reason)
    assert "".join(pieces).strip() == ours and len([p for p in pieces if p]) > 3 and reasons[-1] in ("length", "stop")


def test_sampling_and_the_other_routes(client):
    drawn = [client.chat.completions.create(model="talk/sft", messages=HELLO, temperature=1.5, max_tokens=12, seed=seed) for seed in range(3)]
    assert len({answer.choices[0].message.content for answer in drawn}) == 3  # the base's own decoding is greedy at any temperature
    assert client.completions.create(model="talk/sft", prompt="Once", temperature=0, max_tokens=4).choices[0].text
    response = client.responses.create(model="talk/sft", input="Hello", temperature=0, max_output_tokens=4)
    assert response.model == "talk/sft" and response.output_text is not None


def test_errors_are_what_the_client_raises_for_them(client, served):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; 'talk/sft' is") as e:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.UnprocessableEntityError, match="Unexpected fields"):
        client.chat.completions.create(model="talk/sft", messages=HELLO, extra_body={"nonsense": 1})
    for key in ("wrong", "", KEY + "x"):
        stranger = openai.OpenAI(base_url=served.url, api_key=key or "x", max_retries=0, default_headers={} if key else {"Authorization": ""})
        for call in (stranger.models.list, lambda c=stranger: c.models.retrieve("talk/sft"),
                     lambda c=stranger: c.chat.completions.create(model="talk/sft", messages=HELLO, stream=True)):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong") as e:
                call()
            assert (e.value.status_code, e.value.code) == (401, "invalid_api_key")


def test_only_the_routes_of_clients_are_there(served):
    root, headers = served.url.removesuffix("/v1"), {"Authorization": f"Bearer {KEY}"}
    assert httpx2.get(f"{root}/health").json() == {"status": "ok"}
    for path in ("/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions", "/docs", "/openapi.json"):
        assert httpx2.post(root + path, json={"model": "x"}, headers=headers).status_code == 404
    assert httpx2.post(f"{root}/v1/chat/completions", content=b"[1", headers=headers).status_code == 400
    headers["Origin"] = "http://evil.example"
    assert httpx2.post(f"{root}/v1/chat/completions", json={"messages": HELLO}, headers=headers).status_code == 403


def test_no_path_of_this_machine_leaves(served, client, cache):
    told = client.chat.completions.with_raw_response.create(model="talk/sft", messages=HELLO, max_tokens=2).text
    assert str(cache) not in told and "@main" not in told


def test_the_engine_ends_with_the_server(served):
    assert served.engine.is_running()
    served.process.terminate()
    assert served.ended() and served.process.returncode == 143


def test_the_folder_is_used_again_https_is_spoken_and_the_server_ends_with_the_engine(talk_run, cache, tmp_path):
    certificate, key = self_signed(tmp_path)
    server = Served(str(talk_run[0]), "--section", "sft", "--port", "0", "--tls-certificate", str(certificate), "--tls-key", str(key))
    try:
        assert "used again" in server.said and server.url.startswith("https://")
        trusting = httpx2.Client(verify=ssl.create_default_context(cafile=certificate), timeout=60)
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, http_client=trusting)
        assert client.chat.completions.create(model="talk/sft", messages=HELLO, max_tokens=2).model == "talk/sft"
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(f"{server.url}/models".replace("https", "http"), timeout=20)
        server.engine.kill()
        assert server.ended() and server.process.returncode == 1
    finally:
        server.process.kill()


# -- what is refused before anything is loaded -------------------------------------------------------------------------------------------


def test_beyond_this_machine_a_key_is_demanded(monkeypatch):
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.delenv("ABSENT", raising=False)
    assert serve.read_key("127.0.0.1", None, None) is None
    assert serve.read_key("0.0.0.0", "long enough"[:4] + "-enough-key", None) == "long-enough-key"
    for given, told in (((None, None), "there is no API key"), (("short", None), "a key of 5 characters"),
                        ((None, "SHORT"), "--api-key-env SHORT: a key of 3"), ((None, "ABSENT"), "--api-key-env ABSENT: no key"),
                        (("x" * 12, "SHORT"), "both given"), (("with a space in it", None), "no header")):
        with pytest.raises(PosttrainError, match=told):
            serve.read_key("0.0.0.0", *given)


def test_options_that_serve_sets_and_what_is_not_installed(monkeypatch):
    serve._check_options(["--max-model-len", "4096"])
    for word in ("--host", "--host=0.0.0.0", "--api_key", "--trust-remote-code"):
        with pytest.raises(PosttrainError, match="serve sets itself"):
            serve._check_options([word])
    with pytest.raises(PosttrainError, match="serve sft: a word beside RUN"):
        serve._check_options(["sft"])
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert serve.chosen("auto") == "transformers"
    with pytest.raises(PosttrainError, match=r"vllm, uvicorn.* not installed.*\[vllm,serve\]"):
        serve.check_installed("vllm")


# -- the folder --------------------------------------------------------------------------------------------------------------------------


def test_a_merged_folder_is_made_once_anew_when_the_adapter_changed_and_never_half(talk_run, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(talk_run[1] / "sft", tmp_path / "talk" / "sft")
    version = versions.find(str(tmp_path / "talk" / "sft"))
    first, dtype, done = servable._folder_of(version)
    assert dtype == "float32" and done.startswith("merged into") and first.parent == tmp_path / "cache" / "served"
    told = json.loads((first / "generation_config.json").read_text())
    assert (told["do_sample"], told["temperature"], told["eos_token_id"]) == (True, 0.6, 2) and (first / "chat_template.jinja").exists()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert servable._folder_of(version) == (first, dtype, f"used again: {first}") and (first / "model.safetensors").stat().st_mtime_ns == stamp

    with (tmp_path / "talk" / "sft" / "model" / "adapter_model.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x01")
    monkeypatch.setattr(os, "sync", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        servable._folder_of(version)
    assert [p.name for p in first.parent.iterdir() if not p.name.startswith(".")] == [first.name]
    monkeypatch.undo()
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    second = servable._folder_of(version)[0]
    assert second != first and not list(first.parent.glob("*.tmp"))
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert any((before[name] != after[name]).any() for name in before)


def test_a_whole_model_is_served_where_it_lies_or_through_links(cache, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    dressed, _, done = servable._folder_of(versions.find("builtin:tiny-llama", None, "chatml"))
    assert done.startswith("linked into") and (dressed / "model.safetensors").is_symlink()
    net, tokenizer = AutoModelForCausalLM.from_pretrained(dressed), AutoTokenizer.from_pretrained(dressed)
    assert net.generation_config.do_sample and net.generation_config.eos_token_id == chat.end_of_turn(tokenizer) == 2
    assert servable._folder_of(versions.find(str(dressed)))[::2] == (dressed.resolve(), "")  # fits as it is

    for name, decoding in (("greedy", {"eos_token_id": 2}), ("endless", {"eos_token_id": 0, "do_sample": True, "temperature": 0.3})):
        folder = tmp_path / name
        net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        GenerationConfig(**decoding).save_pretrained(folder)
        made, _, done = servable._folder_of(versions.find(str(folder)))
        assert done.startswith("linked into") and os.stat(folder / "model.safetensors").st_ino == os.stat(made / "model.safetensors").st_ino
        told = json.loads((made / "generation_config.json").read_text())
        assert (told["do_sample"], told["eos_token_id"], told["temperature"]) == (True, 2, decoding.get("temperature", 0.6))


# -- the proxy, before a stand-in --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    """An engine that answers what `engine.answer = (status, content type, body)` says, and keeps what it was asked."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, kind, body = server.answer
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            try:
                for part in [body] if isinstance(body, bytes) else body:
                    self.wfile.write(part)
                    self.wfile.flush()
            except OSError:
                server.left.set()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.left = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxied(engine):
    with TestClient(Proxy(f"http://127.0.0.1:{engine.server_port}", ".", "talk/sft", None).app, base_url="http://127.0.0.1:8000") as client:
        yield client


def ask(client, **more):
    return client.post("/v1/chat/completions", json={"messages": HELLO, **more})


def test_events_pass_whole_however_they_are_cut(engine, proxied):
    event = json.dumps({"model": ".@main", "choices": [{"delta": {"content": "a\u2028b\x85c .@main"}}]}, ensure_ascii=False).encode()
    stream = b"data: " + event + b"\n\ndata: " + event + b"\n\n"
    engine.answer = (200, "text/event-stream", [stream[i:i + 7] for i in range(0, len(stream), 7)])
    events = ask(proxied, model="talk/sft", stream=True).text.strip().split("\n\n")
    told = json.loads(events[0].removeprefix("data: "))
    assert told == {"model": "talk/sft", "choices": [{"delta": {"content": "a\u2028b\x85c .@main"}}]} and events[1:] == [events[0], "data: [DONE]"]
    assert engine.asked == [{"messages": HELLO, "model": ".", "stream": True}]


def test_a_client_that_goes_away_ends_the_engines_work(engine):
    def forever():
        while True:
            yield b'data: {"choices": []}\n\n'
            time.sleep(0.02)

    engine.answer = (200, "text/event-stream", forever())
    listener = listen.listen("127.0.0.1", 0)
    server = listen.server(Proxy(f"http://127.0.0.1:{engine.server_port}", ".", "talk/sft", None).app, "on")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with httpx2.stream("POST", f"{listen.address(listener)}/v1/chat/completions", json={"messages": HELLO, "stream": True}, timeout=20) as answer:
        assert next(answer.iter_raw()).startswith(b"data: ")  # as it comes: this stream has no end
        assert not engine.left.is_set()
    assert engine.left.wait(10)
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.mark.parametrize("line", [b'data: {"error": "CUDA said "no""}\n\n', b'data: {"error": "out of memory"}\n\n'])
def test_a_fault_within_a_stream_is_an_error_to_the_client(engine, proxied, line):
    engine.answer = (200, "text/event-stream", line)
    events = ask(proxied, stream=True).text.strip().split("\n\n")
    assert len(events) == 1 and json.loads(events[0].removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.parametrize("status,kind,body,message", [
    (422, "application/json", b'{"detail": "no such field"}', "no such field"),
    (500, "text/plain", b"Internal Server Error", "Internal Server Error"),
    (400, "application/json", b'{"error": {"message": "too long", "code": 400}}', "too long"),
    (422, "application/json", b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]')])
def test_an_engines_errors_have_the_form_that_clients_read(engine, proxied, status, kind, body, message):
    engine.answer = (status, kind, body)
    answer = ask(proxied)
    assert answer.status_code == status and answer.json()["error"]["message"] == message
    assert engine.asked[0]["stream"] is False


def test_an_engine_that_is_gone_and_a_page_elsewhere(engine, proxied):
    assert ask(proxied, model=None).status_code == 404
    assert proxied.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    engine.shutdown()
    engine.server_close()
    assert ask(proxied).status_code == 502 and proxied.get("/health").status_code == 503


def test_a_request_that_is_too_long(proxied, engine):
    answer = proxied.post("/v1/chat/completions", content=b"x" * (5 << 20))
    assert answer.status_code == 413 and engine.asked == []


# -- vLLM, by a stand-in -----------------------------------------------------------------------------------------------------------------

STAND_IN = """
import json, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
words = sys.argv[1:]
if "--fail" in words:
    sys.exit("no room for the weights")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([words, child.pid]).encode())
HTTPServer((words[words.index("--host") + 1], int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    folder = tmp_path / "vllm" / "entrypoints" / "cli"
    folder.mkdir(parents=True)
    (folder / "main.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_vllm_gets_the_folder_and_the_name_and_ends_with_its_children(stand_in):
    engine = serve.Engine("vllm", stand_in, "bfloat16", "run/v1", ["--max-model-len", "4096"])
    try:
        engine.wait()
        words, child = httpx2.get(f"{engine.url}/health").json()
        assert words[:2] == ["serve", str(stand_in)] and engine.model == "run/v1"
        options = dict(zip(words[2::2], words[3::2], strict=True))
        assert options["--served-model-name"] == "run/v1" and options["--host"] == "127.0.0.1" and options["--max-model-len"] == "4096"
        assert psutil.pid_exists(child)
    finally:
        engine.end()
    end = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert engine.process.poll() is not None and engine._watch.poll() is not None


def test_the_engine_ends_with_a_killed_process(stand_in):
    code = (f"import sys, time; from posttrain import serve; from pathlib import Path; sys.path.remove({str(stand_in)!r})\n"
            f"engine = serve.Engine('vllm', Path({str(stand_in)!r}), 'bfloat16', 'x', []); engine.wait(); print('up', flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    time.sleep(1.2)  # watch.py looks twice a second
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 3  # the watch, the engine, and what the engine began
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_an_engine_that_does_not_start_is_told_with_its_words(stand_in):
    engine = serve.Engine("vllm", stand_in, "bfloat16", "run/v1", ["--fail"])
    with pytest.raises(PosttrainError, match=r"(?s)exit code 1.*no room for the weights"):
        engine.wait()
    engine.end()
