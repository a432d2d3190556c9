"""What a page of ours needs whatever it shows: who may reach it, who signed in, and headers that keep foreign text from running.

On this machine alone (a loopback address) a name is enough, and requests that name another host are refused, so that no web page elsewhere can
use a browser here as its way in. Beyond it a password is demanded.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
import unicodedata
from pathlib import Path
from urllib.parse import parse_qsl

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain.errors import PosttrainError
from posttrain.listen import is_loopback

TEMPLATES, SHARED = (Path(__file__).parent / name for name in ("templates", "static"))  # SHARED: what other pages of ours load too
PASSWORD = "POSTTRAIN_PASSWORD"
SHORTEST = 10  # characters of a password
LONGEST_BODY = 1 << 20
SIGNED_IN = 14 * 86400  # seconds
AT_THE_DOOR = 20  # wrong passwords that may wait at once; each is answered after a second
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
                               "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin", "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def read_password(host: str, file: Path | None) -> str | None:
    """The password from --password-file, else from the environment; never from the command line, which others on the machine can read.

    Raises PosttrainError where none is given for a host beyond this machine, and for a short one."""
    if file is not None:
        try:
            password, place = file.read_text(encoding="utf-8").strip("\r\n"), f"--password-file {file}"
        except (OSError, UnicodeDecodeError) as e:
            raise PosttrainError(f"--password-file {file}", f"cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8'})", "a file of one line",
                                 "Check the path and its permissions.") from None
    else:
        password, place = os.environ.get(PASSWORD), PASSWORD
    if file is not None and not password:
        raise PosttrainError(place, "is empty", f"a password of at least {SHORTEST} characters", "Write one into it.")
    if not password and not is_loopback(host):
        raise PosttrainError(f"--host {host}", "others can reach this address, and there is no password",
                             f"a password of at least {SHORTEST} characters in --password-file or in the variable {PASSWORD}",
                             "Give one, or leave --host out: the page then answers on this machine alone (from elsewhere: ssh -L).")
    if password and len(password) < SHORTEST:
        raise PosttrainError(place, f"a password of {len(password)} characters", f"at least {SHORTEST}", "Choose a longer one.")
    return password or None


def name_of(text: str) -> str | None:
    """A name as it is kept; None for what is no name."""
    name = " ".join(unicodedata.normalize("NFC", text).split())
    return name if 0 < len(name) <= 40 and name.isprintable() else None


def templates_in(folder: Path) -> Environment:
    """Pages whose values are escaped, and may not be missing."""
    return Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def version_of(*folders: Path) -> str:
    """Changes with the files that a page loads, so that no browser keeps older ones."""
    return str(int(max(p.stat().st_mtime for folder in folders for p in folder.iterdir())))


def turned_away(right: bool | None) -> tuple[str, int]:
    """What is said to who did not pass Gate.check, and the status."""
    return ("Too many people are trying. Wait a minute.", 429) if right is None else ("That is not the password.", 403)


class Gate:
    """Signed cookies. secret: of the database, so that a sign-in outlives a restart; another password ends all sign-ins."""

    def __init__(self, secret: str, password: str | None, cookie: str):
        self.password, self.cookie = password, cookie
        self._key = hashlib.sha256(f"{secret}:{password or ''}".encode()).digest()
        self._door, self._waiting = asyncio.Lock(), 0

    def opens(self, given: str) -> bool:
        """Compared in constant time."""
        return self.password is None or hmac.compare_digest(*(hashlib.sha256(text.encode()).digest() for text in (given, self.password)))

    async def check(self, given: str) -> bool | None:
        """Whether the password is right. Wrong ones are answered one after another, a second each; None where too many wait."""
        if self.password is None:
            return True
        if self._waiting >= AT_THE_DOOR:
            return None
        self._waiting += 1
        try:
            async with self._door:
                if self.opens(given):
                    return True
                await asyncio.sleep(1)
                return False
        finally:
            self._waiting -= 1

    def admit(self, response: Response, name: str, secure: bool) -> None:
        body = base64.urlsafe_b64encode(f"{int(time.time()) + SIGNED_IN}:{name}".encode()).decode()
        response.set_cookie(self.cookie, f"{body}.{self._sign(body)}", max_age=SIGNED_IN, httponly=True, samesite="strict", secure=secure, path="/")

    def dismiss(self, response: Response) -> None:
        response.delete_cookie(self.cookie, path="/", httponly=True, samesite="strict")

    def who(self, request: Request) -> str | None:
        """The signed-in name; None for no cookie, a forged one or one that is too old."""
        body, _, signature = request.cookies.get(self.cookie, "").partition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(body).encode()):
            return None
        try:
            until, _, name = base64.urlsafe_b64decode(body).decode().partition(":")
            return name if int(until) > time.time() else None
        except (ValueError, binascii.Error):
            return None

    def _sign(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()


class Door:
    """The sign-in of a page that asks for a password and no name, at /sign-in. name, heading: the page's, in the title and above the field."""

    def __init__(self, password: str | None, cookie: str, name: str, heading: str, version: str):
        self.gate, self.page = Gate(secrets.token_hex(16), password, cookie), templates_in(TEMPLATES).get_template("door.html.j2")
        self.values = {"name": name, "heading": heading, "version": version}

    def known(self, request: Request) -> bool:
        return self.gate.password is None or self.gate.who(request) is not None

    def shown(self, status: int = 200, message: str = "") -> HTMLResponse:
        return HTMLResponse(self.page.render(**self.values, message=message), status)

    async def sign_in(self, request: Request) -> Response:
        right = await self.gate.check((await form_of(request)).get("password", ""))
        if not right:
            words, status = turned_away(right)
            return self.shown(status, words)
        response = RedirectResponse("/", 303)
        self.gate.admit(response, "guest", request.url.scheme == "https")
        return response


class Guard:
    """ASGI middleware: our headers on every answer, and no request from another site or, without a password, by another host's name."""

    def __init__(self, app: ASGIApp, local_only: bool):
        self.app, self.local_only = app, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        why = self._refusal(scope["method"], Headers(scope=scope))
        await (PlainTextResponse(why, 403) if why else self.app)(scope, receive, headed)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if self.local_only and not is_loopback(_without_port(host)):
            return "This page answers on its own machine alone. Set a password to reach it under another name.\n"
        if method not in ("GET", "HEAD"):
            origin = headers.get("origin")
            foreign = origin is not None and origin.partition("://")[2] != host
            if foreign or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return "A page of another site sent this.\n"
        return None


def _without_port(host: str) -> str:
    return host[:host.rindex("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


class TooLong(Exception):
    """The body of a request is longer than any form of ours."""


async def too_long(request: Request, _) -> Response:
    return PlainTextResponse("That is too long.\n", 413)


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a posted form (application/x-www-form-urlencoded), the last of each name."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise TooLong
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
