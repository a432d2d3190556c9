"""Servers that sample. A stand-in on this machine's loopback speaks vLLM's completions and takes adapters; it samples with the stand-in of vLLM
(test_posttrain_vllm.py) from its own copy of the base. No real server was asked."""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rlhf_support import REWARDS, Killed, die, make_run
from test_posttrain_vllm import LLM, PPO, PROMPTS, REJECTION, LoRARequest, SamplingParams, by_us, draw, ids, section  # noqa: F401  a fixture

from posttrain import chunks, server_engine
from posttrain.builtin import folder as builtin_folder
from posttrain.config import ModelConfig, ServersConfig
from posttrain.errors import PosttrainError
from posttrain.generate import Sampling
from posttrain.runs import preflight, read_json, run_sections
from posttrain.stages import STAGES, load_config_class

SETTINGS = {"revision": None, "dtype": "float32", "quantization": None, "load_format": "safetensors", "skip_tokenizer_init": True,
            "generation_config": "vllm", "logprobs_mode": "processed_logprobs", "enable_lora": True, "max_loras": 1, "max_lora_rank": 8, "max_num_seqs": 8,
            "max_model_len": -1, "kv_cache_memory_bytes": 1, "gpu_memory_utilization": 0.5}


ONE = threading.Lock()  # transformers loads no two models at once


class Server(ThreadingHTTPServer):
    """change(path, answer) -> answer: what a test does to it; a number is a status instead. names: of its own models."""

    def __init__(self, llm: LLM, names: tuple[str, ...] = ("base",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.llm, self.names, self.adapters, self.asked, self.change = llm, names, {}, [], lambda path, answer: answer
        self.dropped: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, path: str, body: dict | None):
        if path == "/v1/models":
            return {"data": [{"id": n} for n in self.names] + [{"id": n, "parent": self.names[0]} for n in self.adapters]}
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return 400
            self.adapters[body["lora_name"]] = LoRARequest(body["lora_name"], len(self.dropped) + len(self.adapters) + 1, body["lora_path"])
            return "Success"
        if path == "/v1/unload_lora_adapter":
            self.dropped.append(self.adapters.pop(body["lora_name"]).lora_name)
            return "Success"
        if body["model"] not in (*self.names, *self.adapters):
            return 404
        self.asked.append(body)
        assert body["n"] == 1 and body["return_token_ids"] and body["ignore_eos"] and body["logprobs"] == 0 and body["skip_special_tokens"] is False
        told = SamplingParams(temperature=body["temperature"], top_p=body["top_p"], seed=body["seed"], stop_token_ids=body["stop_token_ids"],
                              ignore_eos=True, max_tokens=body["max_tokens"], logprobs=0)
        with ONE:
            out = self.llm.generate([{"prompt_token_ids": body["prompt"]}], [told], use_tqdm=False, lora_request=self.adapters.get(body["model"]))[0].outputs[0]
        return {"choices": [{"index": 0, "text": "words", "token_ids": list(out.token_ids), "finish_reason": out.finish_reason,
                             "logprobs": {"token_logprobs": [told[i].logprob for i, told in zip(out.token_ids, out.logprobs, strict=True)]}}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body):
        told = self.server.change(self.path, self.server.answer(self.path, body))
        status, text = (told, "{}") if isinstance(told, int) else (200, told if isinstance(told, str) else json.dumps(told))
        with suppress(OSError):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def servers(monkeypatch):
    """servers(n=1, names=...) -> n running stand-ins of vLLM on the tiny model."""
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(server_engine, "BACKOFF", 0.01)
    monkeypatch.setattr(server_engine, "FAR", 0.001)  # the tiny model is as far from another as that
    running = []

    def start(n: int = 1, **more) -> list[Server]:
        running.extend(Server(LLM(str(builtin_folder("builtin:tiny-llama")), **SETTINGS), **more) for _ in range(n))
        return running[-n:]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def roles_at(make_roles, scramble, section):  # noqa: F811
    """roles_at(servers, **ServersConfig) -> two adapters and the bare base, sampled there."""

    def make(running: list[Server], **more):
        roles = make_roles()
        scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1, 0.08)
        scramble(roles.add("other", fresh_adapter=True), 2, 0.08)
        roles.add("base", fresh_adapter=False)
        section.config.servers = ServersConfig(base_urls=[s.url for s in running], **more)
        roles.engine = server_engine.Servers(section)
        return roles

    return make


# -- answers -----------------------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_ours_for_every_role_and_after_its_weights_change(servers, roles_at, scramble, section):  # noqa: F811
    running = servers(2)
    roles = roles_at(running)
    greedy = {"samples": 1, "sampling": Sampling(6, 0.0)}
    first = {role: ids(draw(roles, role, **greedy)) for role in ("policy", "other", "base", "policy")}
    assert first == {role: ids(by_us(roles, role, **greedy)) for role in first} and len({str(a) for a in first.values()}) == 3
    scramble(roles["policy"], 3, 0.08)
    second = ids(draw(roles, **greedy))
    assert second == ids(by_us(roles, **greedy)) != first["policy"] and ids(draw(roles, "other", **greedy)) == first["other"]
    for server in running:  # they share the work, and keep no adapter longer than its weights
        assert len(server.asked) >= 10 and len(server.adapters) == 2 and [n.split("-")[2:] for n in server.dropped] == [["policy", "1"]]
    assert len({n for s in running for n in s.adapters}) == 2 and len(list((section.folder / "adapters.tmp").iterdir())) == 2
    roles.engine.end()
    assert not any(s.adapters for s in running) and section.said[0] == "answers are sampled by servers"


def test_samples_depend_on_seed_and_place_alone_whichever_server_gives_them(servers, roles_at):
    running = servers(3)
    whole = draw(roles_at(running), samples=3)
    assert len({b["seed"] for s in running for b in s.asked}) == 3 * len(PROMPTS) < 2 * len({tuple(c.ids) for group in whole for c in group})
    one = roles_at(running[:1])
    assert ids(draw(one, samples=3)) == ids(whole) and ids(draw(one, samples=3, only=[2, 1])) == ids([whole[2], whole[1]])
    assert ids(draw(one, samples=3, seed=1)) != ids(whole)
    ticks = []
    out = draw(one, tick=ticks.append)
    assert ticks == [len(c.ids) for group in out for c in group] and all(len(c.logprobs) == len(c.ids) for group in out for c in group)


def test_a_server_that_fails_is_asked_again_then_left_out(servers, roles_at, section):  # noqa: F811
    good, bad = servers(2)
    roles, faults = roles_at([good, bad]), iter([503, 429])
    whole = ids(by_us(roles, sampling=Sampling(6, 0.0)))
    bad.change = lambda path, answer: next(faults, answer)
    assert ids(draw(roles, sampling=Sampling(6, 0.0))) == whole and not roles.engine.servers[1].gone
    bad.change = lambda path, answer: 500
    assert ids(draw(roles, sampling=Sampling(6, 0.0))) == whole
    assert section.said[-1] == f"  {bad.url} is left out from now on: HTTP 500, '{{}}'"
    good.shutdown()
    good.server_close()
    with pytest.raises(PosttrainError, match=r"no server is left: .*refused.*; .*HTTP 500") as e:
        draw(roles)
    assert "finished chunks are kept" in str(e.value)


def test_a_server_that_is_silent_is_left_out(servers, roles_at):
    slow, good = servers(2)
    gate = threading.Event()
    roles = roles_at([slow, good], timeout=0.2)
    good_timeout = roles.engine.servers[1]
    good_timeout.config = good_timeout.config.model_copy(update={"timeout": 60})
    slow.change = lambda path, answer: gate.wait(20) or answer if path.endswith("completions") else answer
    try:
        assert ids(draw(roles, samples=1, sampling=Sampling(6, 0.0))) == ids(by_us(roles, samples=1, sampling=Sampling(6, 0.0)))
        assert roles.engine.servers[0].gone == "no reply within 0.2 s"
    finally:
        gate.set()


@pytest.mark.parametrize("answer, message", [
    ("nonsense", "no known form"), ({"choices": []}, "no known form"), ({"choices": [{"token_ids": [], "finish_reason": "length"}]}, "with 0 tokens"),
    ({"choices": [{"token_ids": [10**9], "finish_reason": "length"}]}, "token 1000000000"), ({"choices": [{"token_ids": ["a"]}]}, "token 'a'"),
    ({"choices": [{"token_ids": [4] * 9, "finish_reason": "length"}]}, "with 9 tokens"), ({"choices": ["x"]}, "no known form"),
    ({"choices": [{"text": "words"}]}, "no token_ids"), (401, "HTTP 401"), (404, "HTTP 404")])
def test_nonsense_is_refused_with_the_server_s_name(servers, roles_at, answer, message):
    [server] = servers()
    roles = roles_at([server])
    server.change = lambda path, told: answer if path.endswith("completions") else told
    with pytest.raises(PosttrainError, match=message) as e:
        draw(roles)
    assert server.url in str(e.value)


def test_other_weights_than_the_role_s_are_noticed(servers, roles_at, monkeypatch):
    [server] = servers()
    roles = roles_at([server])
    monkeypatch.setattr(server_engine.Servers, "_name", lambda self, at, role: at.base)  # the base answers in the place of the policy
    with pytest.raises(PosttrainError, match=r"serves 'base', whose tokens are \d+\.\d+ nats from 'policy'"):
        draw(roles)


def test_a_model_that_servers_hold_already_is_asked_by_its_name(servers, roles_at, section):  # noqa: F811
    [server] = servers(names=("tiny", "judge"))
    with pytest.raises(PosttrainError, match=r"serves 'tiny', 'judge'.*'chat' \(servers.model\)"):
        roles_at([server], model="chat")
    roles = roles_at([server], model="tiny")
    assert ids(draw(roles, "base", samples=1, sampling=Sampling(6, 0.0))) == ids(by_us(roles, "base", samples=1, sampling=Sampling(6, 0.0)))
    with pytest.raises(PosttrainError, match="'base' and 'policy'"):
        draw(roles, "policy")

    def of_text(path, told):
        if path.endswith("completions"):
            del told["choices"][0]["token_ids"], told["choices"][0]["logprobs"]
            told["choices"][0]["finish_reason"] = "stop"
        return told

    server.change = of_text
    out = draw(roles, "base", samples=1)
    words = roles.tokenizer("words", add_special_tokens=False)["input_ids"]
    assert [c.ids for group in out for c in group] == [[*words, 300]] * len(PROMPTS) and all(c.finished and not c.logprobs for g in out for c in g)
    assert any("tells no token ids" in line for line in section.said)


def test_a_server_that_takes_no_adapter_says_how_to_start_it(servers, roles_at):
    [server] = servers()
    roles = roles_at([server])
    server.change = lambda path, told: (server.adapters.clear(), 404)[1] if "lora" in path else told
    with pytest.raises(PosttrainError, match="took no adapter: HTTP 404.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        draw(roles)


# -- recipes -----------------------------------------------------------------------------------------------------------------------


def test_every_stage_that_samples_has_the_keys_and_idle_ones_are_not_written():
    able = {kind for kind in STAGES if "servers" in load_config_class(kind).model_fields}
    assert able == {kind for kind in STAGES if "engine" in load_config_class(kind).model_fields} and {"rejection", "ppo", "evaluate"} <= able
    rejection = load_config_class("rejection")
    keys = {"stage": "rejection", "policy": "base", **REWARDS, "prompts": ["p"]}
    assert not {"engine", "servers"} & set(rejection(**keys).model_dump())
    one, two = (rejection(**keys, engine="server", servers={"base_urls": [url], "model": "m"}).model_dump() for url in ("http://localhost:1/v1",
                                                                                                                    "https://far.example/v1"))
    assert one == two and one["servers"] == {"model": "m"}
    gatt = load_config_class("gatt")(stage="gatt", data="d", policy="base")
    assert "kinds" not in gatt.model_dump() and gatt.kinds == ["hobby", "language", "figure"]  # finished ones have no such key


@pytest.mark.parametrize("change, message", [
    ({"servers": None}, "addresses with engine: server"), ({"engine": "ours"}, "addresses with engine: server"),
    ({"servers": {"base_urls": []}}, "at least 1 item"), ({"servers": {"base_urls": ["http://far.example/v1"]}}, "https, or http on this machine"),
    ({"servers": {"base_urls": ["http://me:secret@localhost/v1"]}}, "with a user and a password"), ({"servers": {"base_urls": ["http://localhost:1", "http://localhost:1/"]}},
                                                                                          "each server once"),
    ({"servers": {"base_urls": ["http://localhost:1/v1"], "api_key_env": "sk-123"}}, "the NAME"),
    ({"servers": {"base_urls": ["http://localhost:1/v1"], "model": "m"}}, "the policy changes")])
def test_what_is_no_choice_is_refused_as_the_recipe_is_read(tmp_path_factory, tmp_path, change, message):
    stage = {"stage": "ppo", "policy": "base", **REWARDS, "prompts": ["prompts"], "engine": "server", "servers": {"base_urls": ["http://localhost:1/v1"]}}
    with pytest.raises(PosttrainError, match=message):
        make_run(tmp_path_factory, tmp_path, {"ppo": {**stage, **change}})


def test_what_servers_cannot_sample_is_refused_before_anything_is_asked(monkeypatch):
    servers, model = ServersConfig(base_urls=["http://localhost:1/v1"]), {"name_or_path": "builtin:tiny-llama", "chat_template": "chatml"}
    with pytest.raises(PosttrainError, match="without model.lora"):
        server_engine.check(servers, ModelConfig(**model, lora=None), "here")
    with pytest.raises(PosttrainError, match="add_tokens"):
        server_engine.check(servers, ModelConfig(**model, lora={"r": 4}, add_tokens=True), "here")
    server_engine.check(servers.model_copy(update={"model": "m"}), ModelConfig(**model, lora=None), "here")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(PosttrainError, match="NO_SUCH_KEY is not set"):
        server_engine.check(ServersConfig(base_urls=["http://localhost:1/v1"], api_key_env="NO_SUCH_KEY"), ModelConfig(**model, lora={"r": 4}), "here")


def test_a_killed_round_goes_on_at_another_server(tmp_path_factory, tmp_path, monkeypatch, servers):
    first, second = servers(2)

    def made(server: Server):
        return make_run(tmp_path_factory, tmp_path, {"r": {**REJECTION, "engine": "server", "servers": {"base_urls": [server.url]}}})

    run = made(first)
    preflight(run)
    with monkeypatch.context() as m:
        die(m, chunks, "write_chunk", 2)
        with pytest.raises(Killed):
            run_sections(run, ["r"])
    folder = run.folder / "r"
    assert len(list((folder / "chunks").iterdir())) == 1
    run_sections(made(second), ["r"])
    told = read_json(folder / "manifest.json")
    assert told["exact"] is False and told["inexact_because"] == ["answers are sampled by servers"] and not any("base_urls" in k for k in told["inputs"])
    assert [len(s.asked) for s in (first, second)] == [12, 6] and not (folder / "adapters.tmp").exists()
    assert len(read_json(folder / "results.json")["best_of_n"]) == 2 and not second.adapters


def test_ppo_sends_a_new_adapter_every_iteration_and_recomputes_log_probabilities(tmp_path_factory, tmp_path, monkeypatch, servers):
    """What the server tells is shifted by a tenth of a nat: a ratio made of it would trip the wire."""
    monkeypatch.setattr(LLM, "shift", -0.1)
    monkeypatch.setattr(server_engine, "FAR", 0.2)
    [server] = servers()
    run = make_run(tmp_path_factory, tmp_path, {"x": {**PPO, "engine": "server", "servers": {"base_urls": [server.url]}}})
    run_sections(run, ["x"])
    names = list(dict.fromkeys(b["model"] for b in server.asked))
    assert [n.split("-")[2:] for n in names] == [["policy", "1"], ["policy", "2"], ["policy", "3"]] == [n.split("-")[2:] for n in server.dropped]
