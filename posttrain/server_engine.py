"""Servers that sample, behind the interface of `generate.sample`: `engine: server` of a section, with `servers:` in the recipe.

Two kinds. vLLM servers take a role's adapter whenever its weights changed: written as a peft folder under the section's, loaded by its path (so the
servers see the same storage) under a name that no weights had before, the one before unloaded. Servers with `servers.model` hold the policy already,
under that name, and it never changes: any OpenAI-compatible server with completions.

Every sample is a request of its own with a seed from a table made beforehand, as in our loop, so that one that is asked for again, or elsewhere, is the
same request. Requests go round the servers, `batch` at once; a server that fails is asked again with growing waits, then left out, and the others take
over. Which server a sample comes from, and which requests share a step there, decides its last bits: such a section is not exact, and PPO recomputes
log-probabilities as for vLLM.

Whether a server holds what it is taken for is looked at with the first answers of every server and adapter: log-probabilities that it tells of its
tokens against the role's own here.

What of vLLM is relied on:
- completions take token ids, a seed, stop_token_ids, ignore_eos, and give token_ids with return_token_ids:
  https://github.com/vllm-project/vllm/blob/002032ee2b18e1f7bd924ec47b62504ba3866063/vllm/entrypoints/openai/completion/protocol.py
- adapters come and go where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set (load_lora_adapter, unload_lora_adapter): https://docs.vllm.ai/en/stable/features/lora/
"""

import json
import secrets
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import count
from urllib.error import URLError

import torch

from posttrain import distributed, http_client
from posttrain.config import ModelConfig, ServersConfig
from posttrain.errors import PosttrainError
from posttrain.generate import Completion, Sampling
from posttrain.models import Roles
from posttrain.packing import collate, tree

RETRIES = 4
BACKOFF = 2.0  # seconds before the first retry, doubled for every further one
LONGEST_WAIT = 60.0
LOOK = 15.0  # seconds for a server to say what it serves
PROBED = 4  # answers whose log-probabilities are compared, a server and adapter
FAR = 0.3  # nats a token that they may differ in the mean: bfloat16 and other kernels differ by some hundredths, a top-p of 0.9 by up to a tenth
OURS = "Set engine: ours, or correct servers.base_urls."


def check(servers: ServersConfig, model: ModelConfig, place: str) -> None:
    """Whether servers can sample here under a recipe's model section, before anything is loaded or asked. place: of the key `servers`."""
    http_client.read_key(servers.api_key_env, f"{place}.api_key_env")
    if distributed.world() > 1:
        raise PosttrainError(place, f"servers that sample, in {distributed.world()} processes", "one process", "Start it without the launcher: "
                             "the servers are what there may be several of.")
    if servers.model is not None:
        return
    if model.lora is None:
        raise PosttrainError(place, "servers that take adapters, without model.lora", "adapters: the servers' base never changes",
                             "Add model.lora, name servers.model where they hold the policy already, or set engine: ours.")
    if model.add_tokens:
        raise PosttrainError(place, "servers that take adapters, with model.add_tokens", "a vocabulary that is not extended: they read the base's own rows",
                             "Name servers.model where they hold the policy already, or set engine: ours.")


class _Fault(Exception):
    """A server gave nothing to use. passing: it may the next time, in `after` seconds at least."""

    def __init__(self, found: str, passing: bool, after: float = 0.0):
        self.found, self.passing, self.after = found, passing, after
        super().__init__(found)


class _Stopped(Exception):
    """Another request has failed for good."""


class _Server:
    """One address; several threads may ask at once."""

    def __init__(self, url: str, config: ServersConfig, key: str | None):
        self.url, self.config, self.key, self.opener = url, config, key, http_client.opener(url)
        self.base, self.gone, self.probed = None, None, set()  # its own model's name; why it is left out; (model, ...) looked at

    def ask(self, path: str, body: dict | None = None, timeout: float | None = None) -> str:
        """The text of a reply. Raises _Fault."""
        limit = timeout or self.config.timeout
        try:
            status, text, after = http_client.ask(self.opener, f"{self.url}/{path}", body, self.key, limit)
        except (OSError, HTTPException) as e:
            late = isinstance(e.reason if isinstance(e, URLError) else e, TimeoutError)
            raise _Fault(f"no reply within {limit:g} s" if late else http_client.no_reply(e, self.key), True) from None
        if status != 200:
            raise _Fault(http_client.refusal(status, text, self.key), http_client.passes(status), after)
        return text

    def reads(self, path: str, body: dict | None, read: Callable[[dict], object], timeout: float | None = None):
        """read(JSON of a reply). Raises _Fault, also where it holds something else."""
        text = self.ask(path, body, timeout)
        try:
            return read(json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Fault(f"an answer in no known form, '{http_client.words(text, self.key)}'", False) from None


class Servers:
    """The engine of a section's roles. Raises PosttrainError where no server answers, or one does not hold what it must."""

    def __init__(self, section):
        self.place, self.say, self.folder = f"{section.place}.servers", section.log.say, section.folder / "adapters.tmp"  # dropped with its leftovers
        self.config, self.model = section.config.servers, section.recipe.model
        check(self.config, self.model, self.place)
        key = http_client.read_key(self.config.api_key_env, f"{self.place}.api_key_env")
        self.servers = [_Server(url, self.config, key) for url in self.config.base_urls]
        self.run, self.numbers, self.loaded, self.told, self.lock = secrets.token_hex(4), count(1), {}, set(), threading.Lock()
        self.stop, self.role = threading.Event(), None  # role: that servers.model stands for
        for server in self.servers:
            self._meet(server)
        self._living()
        if (why := "answers are sampled by servers") not in section.manifest.get("inexact_because", []):
            section.inexact(why)
        section.at_end.append(self.end)

    def _meet(self, server: _Server) -> None:
        """Ask what it serves."""
        try:
            models = server.reads("models", None, lambda told: [(m["id"], m.get("parent")) for m in told["data"]], LOOK)
        except _Fault as e:
            return self._leave_out(server, e)
        names = [name for name, _ in models]
        if self.config.model is not None and self.config.model not in names:
            raise PosttrainError(self.place, f"{server.url} serves {', '.join(map(repr, names[:5])) or 'no model'}", f"'{self.config.model}' (servers.model)",
                                 "Start it with that name, or correct servers.model.")
        server.base = self.config.model or next((name for name, parent in models if parent is None), None)
        if server.base is None:
            raise PosttrainError(self.place, f"{server.url} serves no model of its own", "the recipe's base", "Start it on the recipe's base.")

    def sample(self, roles: Roles, role: str, prompts: list[list[int]], samples: int, sampling: Sampling, seed: int, *, stop: int, batch: int, tick,
               only) -> list[list[Completion]]:
        """As generate.sample. Log-probabilities are the server's, of its own making; none where it tells none. tick(tokens) is called for every answer."""
        self._offer(roles, role)
        seeds = torch.randint(2**62, (len(prompts), samples), generator=torch.Generator().manual_seed(seed)).tolist()
        jobs = [(prompts[p], one) for p in only for one in seeds[p]]
        self.stop.clear()

        def answer(job: tuple[int, tuple[list[int], int]]) -> tuple[_Server, Completion]:
            number, (prompt, one) = job
            if self.stop.is_set():
                raise _Stopped
            try:
                return self._answer(roles, role, number, prompt, one, sampling, stop)
            except BaseException as e:
                if not isinstance(e, _Stopped):
                    failed.append(e)
                self.stop.set()  # the others begin nothing more
                raise

        answers: list[tuple[_Server, Completion]] = []
        failed: list[BaseException] = []
        with ThreadPoolExecutor(max(1, min(batch, len(jobs)))) as pool:
            try:
                for told in pool.map(answer, enumerate(jobs)):
                    answers.append(told)
                    if tick:
                        tick(len(told[1].ids))
            except _Stopped:
                raise failed[0] from None
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
        self._probe(roles, role, [prompt for prompt, _ in jobs], answers, sampling)
        found = [c for _, c in answers]
        return [found[i:i + samples] for i in range(0, len(found), samples)]

    def _answer(self, roles: Roles, role: str, number: int, prompt: list[int], seed: int, sampling: Sampling, stop: int) -> tuple[_Server, Completion]:
        body = {"prompt": prompt, "seed": seed, "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
                "n": 1, "logprobs": 0, "stop_token_ids": [stop], "ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False}
        while True:
            living = self._living()
            server = living[number % len(living)]
            try:
                told = self._patiently(server, lambda at=server: at.reads("completions", {"model": self._name(at, role), **body}, lambda x: x["choices"][0]))
            except _Fault as e:
                if self.stop.is_set():
                    raise _Stopped from None
                if not e.passing:
                    raise self._refused(server, e.found) from None
                self._leave_out(server, e)
                continue
            return server, self._completion(roles, server, told, sampling, stop)

    def _patiently(self, server: _Server, work: Callable):
        """work(), again after what may pass by itself."""
        for attempt in range(RETRIES + 1):
            try:
                return work()
            except _Fault as e:
                if not e.passing or attempt == RETRIES or server.gone:
                    raise
                self._tell_once(f"{server.url}: {e.found}; asked again, up to {RETRIES} times")
                if self.stop.wait(min(max(BACKOFF * 2 ** attempt, e.after), LONGEST_WAIT)):
                    raise

    def _completion(self, roles: Roles, server: _Server, told: dict, sampling: Sampling, stop: int) -> Completion:
        """What a server answered. Raises PosttrainError for what no model of this vocabulary says."""
        try:
            ids, ended = told.get("token_ids"), told.get("finish_reason") == "stop"
            logprobs = (told.get("logprobs") or {}).get("token_logprobs") or []
            if ids is None:
                if self.config.model is None:
                    raise self._refused(server, "its answers have no token_ids")
                self._tell_once(f"{server.url} tells no token ids: its texts are read with the recipe's tokenizer")
                ids, logprobs = roles.tokenizer(told["text"], add_special_tokens=False)["input_ids"][:sampling.max_new_tokens], []
            ids = [*ids]
            if ended and (not ids or ids[-1] != stop):
                ids, logprobs = [*ids, stop], []
            size = roles.base.get_input_embeddings().weight.shape[0] if roles.base is not None else len(roles.tokenizer)
            odd = [i for i in ids if type(i) is not int or not 0 <= i < size]
            if not ids or odd or len(ids) > sampling.max_new_tokens + 1:
                found = f"token {odd[0]!r}" if odd else f"{len(ids)} tokens"
                raise self._refused(server, f"an answer with {found}", f"1 to {sampling.max_new_tokens} tokens below {size}")
            numbers = [float(x) for x in logprobs] if len(logprobs) == len(ids) else []
        except (LookupError, TypeError, AttributeError, ValueError):
            raise self._refused(server, f"an answer in no known form, '{http_client.words(json.dumps(told), server.key)}'") from None
        return Completion(ids, numbers, ids[-1] == stop)

    def _probe(self, roles: Roles, role: str, prompts: list[list[int]], answers: list[tuple[_Server, Completion]], sampling: Sampling) -> None:
        """Compare a server's first answers with the role's own log-probabilities, where it tells some. It may tell them before the temperature or after it."""
        for server in self.servers:
            name = self._name(server, role)
            mine = [(p, c) for p, (s, c) in zip(prompts, answers, strict=True) if s is server and c.logprobs][:PROBED]
            if server.gone or name in server.probed or not mine:
                if name not in server.probed and any(s is server for s, _ in answers) and not mine:
                    self._tell_once(f"{server.url} tells no log-probabilities: whether it holds this very model is not known")
                continue
            batch = collate([tree(p, [c.ids]) for p, c in mine], list(range(len(mine))), roles.layout, roles.tokenizer.pad_token_id).to(roles.device)
            told = torch.tensor([x for c in (mine[i][1] for i in batch.items) for x in c.logprobs])
            with torch.inference_mode():
                gaps = [(roles.logprobs(role, batch, t).float().cpu() - told).abs().mean().item() for t in {1.0, sampling.temperature or 1.0}]
            if not min(gaps) <= FAR:
                raise PosttrainError(self.place, f"{server.url} serves '{name}', whose tokens are {min(gaps):.2f} nats from '{role}' in the mean",
                                     f"the same weights: at most {FAR} nats", "See which model it was started on, and whether it sees this run's folder.")
            server.probed.add(name)

    # -- adapters -------------------------------------------------------------------------------------------------------------------

    def _name(self, server: _Server, role: str) -> str:
        """What a server calls a role's present weights."""
        return self.loaded[role][1] if role in self.loaded else server.base

    def _offer(self, roles: Roles, role: str) -> None:
        """Make every living server hold a role's present weights."""
        mine = roles[role]
        if self.config.model is not None:
            if self.role not in (None, role):
                raise PosttrainError(self.place, f"servers.model is one model, and the section samples '{self.role}' and '{role}'", "one policy",
                                     "Leave servers.model out, so that vLLM servers take adapters, or set engine: ours.")
            self.role = role
            return
        if mine.adapter is None and mine.net is not roles.base:
            raise PosttrainError(self.place, f"'{role}' is a whole model", "the recipe's base, or an adapter on it: the servers' base never changes",
                                 "Set engine: ours, or name servers.model where they hold it already.")
        if mine.adapter is None or self.loaded.get(role, (None,))[0] == (stamp := roles.stamp(role)):
            return
        name = f"posttrain-{self.run}-{role}-{next(self.numbers)}"
        roles.save(role, self.folder / name)
        before = self.loaded.get(role, (None, None))[1]
        body = {"lora_name": name, "lora_path": str((self.folder / name).resolve())}
        self.stop.clear()
        for server in self._living():
            try:
                self._patiently(server, lambda at=server: at.ask("load_lora_adapter", body))
            except _Fault as e:
                if not e.passing and self._holds(server, name):  # an answer that was lost on the way: it was asked again
                    continue
                if not e.passing:
                    raise PosttrainError(self.place, f"{server.url} took no adapter: {e.found}", "a vLLM server that takes adapters and sees this run's folder",
                                         "Start it as docs/scaling.md says (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora).") from None
                self._leave_out(server, e)
        self._living()
        self.loaded[role] = (stamp, name)
        if before:
            self._drop(before)

    def _holds(self, server: _Server, name: str) -> bool:
        try:
            return server.reads("models", None, lambda told: name in [m["id"] for m in told["data"]], LOOK)
        except _Fault:
            return False

    def _drop(self, name: str) -> None:
        for server in self.servers:
            if not server.gone:
                try:
                    server.ask("unload_lora_adapter", {"lora_name": name}, LOOK)
                except _Fault as e:  # it takes memory there, and harms nothing
                    self._tell_once(f"{server.url} keeps an adapter that is no longer used: {e.found}")
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def end(self) -> None:
        """Take this section's adapters off the servers."""
        for _, name in self.loaded.values():
            self._drop(name)
        self.loaded = {}

    # -- faults ---------------------------------------------------------------------------------------------------------------------

    def _living(self) -> list[_Server]:
        """The servers that are not left out. Raises PosttrainError where none is."""
        living = [s for s in self.servers if not s.gone]
        if not living:
            raise PosttrainError(self.place, "no server is left: " + "; ".join(f"{s.url}: {s.gone}" for s in self.servers), "one that answers",
                                 f"Start them, then run the same command: finished chunks are kept. {OURS}")
        return living

    def _leave_out(self, server: _Server, fault: _Fault) -> None:
        with self.lock:
            new, server.gone = not server.gone, server.gone or fault.found
        if new:
            self.say(f"  {server.url} is left out from now on: {fault.found}")

    def _refused(self, server: _Server, found: str, expected: str = "completions, with token_ids from a vLLM server") -> PosttrainError:
        return PosttrainError(self.place, f"{server.url}: {found}", expected, f"See what the server's own log says. {OURS}")

    def _tell_once(self, text: str) -> None:
        with self.lock:
            new = text not in self.told
            self.told.add(text)
        if new:
            self.say(f"  {text}")
