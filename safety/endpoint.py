"""Chat completions of an OpenAI-compatible endpoint, with the standard library alone: what may pass by itself is asked for again, the rest is
told.

The key is read from the environment, sent to the endpoint alone (no redirect is followed), and taken out of every text that comes back.
"""

import json
import random
import ssl
import threading
from collections.abc import Callable
from http.client import HTTPException
from urllib.error import URLError

from posttrain import http_client
from safety.config import JudgeConfig

RETRIES = 4
BACKOFF = 1.0  # seconds before the first retry, doubled for every further one
LONGEST_WAIT = 60.0  # seconds, also where the endpoint asks for more
MAX_TOKENS = 2048  # of a reply: a judge that thinks aloud takes a thousand
OPTIONAL = ("temperature", "max_tokens")  # left out for an endpoint that refuses them by name, as some of thinking models do
OF_THE_REQUEST = {400, 403, 413, 422, 451}  # these may be about what was asked: too long, or stopped by a filter
PROBE = [{"role": "user", "content": "Reply with the word yes."}]


class Refused(Exception):
    """The endpoint works, but not for this request."""


class Stopped(Exception):
    """Not asked, because `Endpoint.stop` is set."""


class Fault(Exception):
    """The endpoint gave no reply. found, do: as in PosttrainError; passing: worth asking again, after `after` seconds at least; of_request: the
    request may be the reason."""

    def __init__(self, found: str, do: str, passing: bool = False, of_request: bool = False, after: float = 0.0):
        self.found, self.do, self.passing, self.of_request, self.after = found, do, passing, of_request, after
        super().__init__(found)


class Endpoint:
    """One model at one address; several threads may ask at once. say: tells the person watching one line. Raises PosttrainError for a key
    that is not there."""

    def __init__(self, config: JudgeConfig, say: Callable[[str], None]):
        self.config, self.say = config, say
        self.place = f"the judge at {config.base_url}"
        self.stop = threading.Event()
        self._key = http_client.read_key(config.api_key_env, "judge.api_key_env")
        self._opener = http_client.opener(config.base_url)
        self._left_out: set[str] = set()
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def reply(self, messages: list[dict], temperature: float) -> str:
        """The text of the reply to a conversation; '' where it holds none. What may pass is retried with growing waits.

        Raises Fault where the endpoint can't be used, Refused where it can (it answers a short harmless question) but not for these messages,
        Stopped where `stop` is set meanwhile.
        """
        for attempt in range(RETRIES + 1):
            if self.stop.is_set():
                raise Stopped
            try:
                return self._ask(messages, temperature)
            except Fault as e:
                fault = e
            if not fault.passing:
                break
            if attempt < RETRIES:
                self._tell_once(f"{self.place}: {fault.found}; asking again, up to {RETRIES} times")
                self.stop.wait(min(max(BACKOFF * 2 ** attempt * random.uniform(0.75, 1.25), fault.after), LONGEST_WAIT))
        if fault.of_request and self._works():
            raise Refused(fault.found)
        raise fault

    def _works(self) -> bool:
        try:
            self._ask(PROBE, 0.0)
        except Fault:
            return False
        return True

    def _ask(self, messages: list[dict], temperature: float) -> str:
        """One request, and one more for every optional field that the endpoint refuses."""
        wanted = {"temperature": temperature, "max_tokens": MAX_TOKENS}
        body = {"model": self.config.model, "messages": messages, **{k: v for k, v in wanted.items() if k not in self._left_out}}
        status, text, after = self._post(body)
        if status == 200:
            return self._content(text)
        named = [k for k in OPTIONAL if k in body and k in text] if status in (400, 422) else []
        if named:
            self._left_out.update(named)
            self._tell_once(f"{self.place} refuses {' and '.join(named)}; asked without")
            return self._ask(messages, temperature)
        raise self._fault(status, text, after)

    def _post(self, body: dict) -> tuple[int, str, float]:
        """(status, body, seconds to wait before another request, where the endpoint says so). Raises Fault where there is no reply at all."""
        try:
            return http_client.ask(self._opener, f"{self.config.base_url}/chat/completions", body, self._key, self.config.timeout)
        except (OSError, HTTPException) as e:
            raise self._no_reply(e.reason if isinstance(e, URLError) else e) from None

    def _no_reply(self, reason) -> Fault:
        if isinstance(reason, ssl.SSLCertVerificationError):
            return Fault(f"its certificate is not trusted ({self._words(reason.verify_message)})", "Correct judge.base_url, or the certificate.")
        if isinstance(reason, TimeoutError):
            return Fault(f"no reply within {self.config.timeout:g} s", "See whether it is overloaded, or raise judge.timeout.", passing=True)
        return Fault(http_client.no_reply(reason, self._key), "Start the endpoint, or correct judge.base_url.", passing=True)

    def _fault(self, status: int, text: str, after: float) -> Fault:
        key = f"the key in {self.config.api_key_env}" if self.config.api_key_env else "judge.api_key_env: NAME of the variable that holds the key"
        do = (f"Check {key}." if status in (401, 403) else
              "Check judge.base_url (it mostly ends in /v1) and judge.model." if status in (400, 404, 405) or 300 <= status < 400 else
              "Ask for less at once (judge.concurrency), or wait." if status == 429 else "See what the endpoint's own log says.")
        return Fault(http_client.refusal(status, text, self._key), do, http_client.passes(status), status in OF_THE_REQUEST or status >= 500, after)

    def _content(self, text: str) -> str:
        try:
            content = json.loads(text)["choices"][0]["message"].get("content") or ""
            content = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)  # some reply in parts
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Fault(f"no chat completion in its reply, '{self._words(http_client.message(text))}'",
                        "Check judge.base_url: BASE_URL/chat/completions must speak the OpenAI protocol.", passing=True, of_request=True) from None
        return http_client.without_key(content.encode("utf-8", "replace").decode(), self._key)  # half a character can't be written to disk

    def _words(self, text: str) -> str:
        return http_client.words(text, self._key)

    def _tell_once(self, text: str) -> None:
        with self._lock:
            new = text not in self._told
            self._told.add(text)
        if new:
            self.say(text)
