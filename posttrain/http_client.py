"""JSON requests to an address that a recipe names, with the standard library alone.

A key is read from the environment and sent to the address alone: no redirect is followed, and no proxy stands before this machine's own addresses.
"""

import json
import os
import re
import time
from contextlib import suppress
from typing import Annotated
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from posttrain.errors import PosttrainError
from posttrain.listen import is_loopback

ENDPOINT = re.compile(r"(https?)://([\w-]{1,63}(?:\.[\w-]{1,63})*|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?(?:/[\w.~%+/-]*)?", re.ASCII | re.IGNORECASE)
MAX_BYTES = 1 << 24  # of a reply's body
PASSING = {408, 409, 425, 429}  # these pass by themselves, as every 5xx may


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def checked_address(url: str) -> str:
    """A recipe's address without a last slash. Raises pydantic's error for one with a user, a key or a query, or plain http beyond this machine."""
    found = ENDPOINT.fullmatch(url)
    if not found or int(found[3] or 0) > 65535:
        raise PydanticCustomError("hidden", "An address such as https://HOST/v1 or http://localhost:8000/v1, without a user, a key or a query in it")
    if found[1].lower() == "http" and not is_local(url):
        raise PydanticCustomError("plain_http", "https, or http on this machine: beyond it, plain http can be read on the way (an ssh tunnel, ssh -L, "
                                                 "brings a port here)")
    return url.rstrip("/")


def checked_variable(name: str | None) -> str | None:
    """The name of an environment variable. Raises pydantic's error for what may be the key itself."""
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise PydanticCustomError("hidden", "The NAME of an environment variable (capitals, digits, _) that holds the key, not the key itself")
    return name


Address = Annotated[str, AfterValidator(checked_address)]
Variable = Annotated[str | None, AfterValidator(checked_variable)]


def is_local(url: str) -> bool:
    """Whether an ENDPOINT is on this machine, by its address or the name localhost."""
    return is_loopback(ENDPOINT.fullmatch(url)[2].lower())


def read_key(variable: str | None, place: str) -> str | None:
    """The key in an environment variable. Raises PosttrainError where it is not there or no key. place: of the key `api_key_env`."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise PosttrainError(place, f"the environment variable {variable} is not set", "the endpoint's key in it",
                             f"Set it (export {variable}=...), or leave api_key_env out for an endpoint without a key.")
    if not (key.isascii() and key.isprintable()) or " " in key:  # the standard library would show it in its error
        raise PosttrainError(place, f"the environment variable {variable} holds characters that can't be sent", "a key of printable ASCII characters",
                             "Copy the key again.")
    return key


def opener(url: str) -> OpenerDirector:
    return build_opener(_NoRedirect, ProxyHandler({} if is_local(url) else None))


def ask(through: OpenerDirector, url: str, body: dict | None, key: str | None, timeout: float) -> tuple[int, str, float]:
    """POST a body as JSON, or GET where it is None: (status, text, seconds to wait before another request, where the other side says so).

    timeout: seconds for the whole reply. Raises OSError (URLError with its reason, TimeoutError) or HTTPException where there is no reply at all."""
    request = Request(url, None if body is None else json.dumps(body).encode(),
                      {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "posttrain"})
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    until = time.monotonic() + timeout
    try:
        got = through.open(request, timeout=timeout)
    except HTTPError as e:
        got = e
    with got:
        return got.status, read(got, until), _seconds(got.headers.get("Retry-After"))


def read(got, until: float) -> str:
    """A body, within the time and size allowed: a socket's own timeout starts anew with every piece."""
    pieces, size = [], 0
    while size <= MAX_BYTES and (piece := got.read1(1 << 16)):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > until:
            raise TimeoutError
    return b"".join(pieces).decode("utf-8", "replace")


def message(text: str) -> str:
    """The message in an error body: {"error": {"message": ...}}, {"error": ...}, {"message": ...}, {"detail": ...}, or the text."""
    with suppress(ValueError, AttributeError, RecursionError):
        value = json.loads(text)
        error = value.get("error") or value
        return str(error if isinstance(error, str) else error.get("message") or error.get("detail") or text)
    return text


def no_reply(error: Exception, key: str | None) -> str:
    """Why there was none, of what `ask` raised other than a timeout."""
    reason = error.reason if isinstance(error, URLError) else error
    return words(str(reason.strerror if isinstance(reason, OSError) and reason.strerror else f"{type(reason).__name__}: {reason}"), key).lower()


def refusal(status: int, text: str, key: str | None) -> str:
    """A status other than 200, with what its body says."""
    said = words(message(text), key)
    return f"HTTP {status}" + (f", '{said}'" if said else "")


def passes(status: int) -> bool:
    """Whether the same request may be answered later."""
    return status in PASSING or status >= 500


def words(text: str, key: str | None) -> str:
    """One short printable line without the key."""
    return " ".join("".join(c if c.isprintable() else " " for c in without_key(text, key)).split())[:200]


def without_key(text: str, key: str | None) -> str:
    return text.replace(key, "***") if key else text


def _seconds(header: str | None) -> float:
    """A Retry-After header in seconds; 0 where it is absent or a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
