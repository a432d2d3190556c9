"""What stands before the engine of `serve`: the key, the routes that are meant for clients and no others, the model by its name, and errors in the
form that OpenAI's clients read.

`transformers serve` has no key, loads any model that a request names (/load_model), and calls its model by the folder. vLLM checks its key under a
few prefixes alone and leaves /invocations, /tokenize, /pause and others open (https://docs.vllm.ai/en/latest/usage/security/), so it stands behind
this one too.
"""

import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from posttrain.annotate.site import Guard

LONGEST_BODY = 4 << 20
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "invalid_request_error",
         422: "invalid_request_error"}
DONE = b"data: [DONE]"


class Proxy:
    """engine: the address behind; engine_name: what it calls its model; name: what clients call it; key: None on this machine alone."""

    def __init__(self, engine: str, engine_name: str, name: str, key: str | None):
        self.engine, self.engine_name, self.name, self.key, self.since = engine, engine_name, name, key, int(time.time())
        self.app = Starlette(
            routes=[Route("/health", self.health), Route("/v1/models", self.models), Route("/v1/models/{model:path}", self.model),
                    *(Route(path, self.forward, methods=["POST"]) for path in ROUTES)],
            middleware=[Middleware(Guard, local_only=key is None)], lifespan=self._client,
            exception_handlers={404: lambda *_: error(404, "There is no such address here."), 405: lambda *_: error(405, "Not by this method.")})

    @asynccontextmanager
    async def _client(self, _):
        async with httpx2.AsyncClient(base_url=self.engine, timeout=None, trust_env=False, limits=httpx2.Limits(max_connections=None)) as self.client:
            yield

    def refused(self, request: Request) -> Response | None:
        """Compared in constant time."""
        if self.key is None:
            return None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(*(hashlib.sha256(text.encode()).digest() for text in (given.strip(), self.key)))
        if kind.lower() == "bearer" and same:
            return None
        return error(401, "The API key is missing or wrong.", "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    async def health(self, _: Request) -> Response:
        try:
            status = (await self.client.get("/health")).status_code
        except httpx2.HTTPError:
            status = 503
        return JSONResponse({"status": "ok" if status == 200 else "the engine does not answer"}, 200 if status == 200 else 503)

    def entry(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.since, "owned_by": "posttrain"}

    async def models(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse({"object": "list", "data": [self.entry()]})

    async def model(self, request: Request) -> Response:
        known = request.path_params["model"] == self.name
        return self.refused(request) or (JSONResponse(self.entry()) if known else self.unknown(request.path_params["model"]))

    def unknown(self, model) -> Response:
        return error(404, f"The model {model!r} is not served here; {self.name!r} is.", "model_not_found")

    async def forward(self, request: Request) -> Response:
        if refused := self.refused(request):
            return refused
        raw = bytearray()
        try:
            async for part in request.stream():
                raw += part
                if len(raw) > LONGEST_BODY:
                    return error(413, "The request is too long.")
        except ClientDisconnect:
            return error(400, "The client went away.")
        try:
            body = json.loads(raw)
        except ValueError:  # of the text, or of its encoding
            body = None
        if not isinstance(body, dict):
            return error(400, "The body is no JSON object.")
        if body.get("model", self.name) != self.name:
            return self.unknown(body["model"])
        sent = self.client.build_request("POST", request.url.path, json={"stream": False} | body | {"model": self.engine_name})
        try:
            answer = await self.client.send(sent, stream=True)
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                return StreamingResponse(self._events(answer, request.url.path), answer.status_code, media_type="text/event-stream")
            content = await answer.aread()
            await answer.aclose()
        except httpx2.HTTPError as e:
            return error(502, f"The engine does not answer ({type(e).__name__}).")
        try:
            value = json.loads(content)
        except ValueError:
            value = {"detail": content.decode("utf-8", "replace")[:500]}
        if answer.status_code >= 400:
            return engine_error(answer.status_code, value)
        return JSONResponse(self.renamed(value), answer.status_code)

    async def _events(self, answer: httpx2.Response, path: str) -> AsyncIterator[bytes]:
        """The engine's events as they come, each with our name of the model. Ends with [DONE], which some clients wait for. Where the client goes
        away, the engine's connection is closed and its work with it."""
        rest, ended, faulty = b"", False, False
        try:
            async for part in answer.aiter_raw():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    event, fault = self._event(line.rstrip(b"\r"))
                    ended, faulty = ended or event == DONE, faulty or fault
                    yield event + b"\n"
        except httpx2.HTTPError as e:
            faulty = True
            yield b"data: " + json.dumps(fault_of(500, f"The engine broke off ({type(e).__name__}).")).encode() + b"\n\n"
        finally:
            await answer.aclose()
        if not ended and not faulty and path != "/v1/responses":
            yield DONE + b"\n\n"

    def _event(self, line: bytes) -> tuple[bytes, bool]:
        """(one line of the stream, whether it tells of a fault)."""
        if not line.startswith(b"data: ") or line == DONE:
            return line, False
        try:
            value = json.loads(line[6:])
        except ValueError:  # transformers puts an exception's text between quotation marks as it is
            value = {"error": line[6:].decode("utf-8", "replace")}
        if isinstance(value, dict) and isinstance(value.get("error"), str):
            value = fault_of(500, value["error"])
        return b"data: " + json.dumps(self.renamed(value), ensure_ascii=False).encode(), isinstance(value, dict) and bool(value.get("error"))

    def renamed(self, value):
        """The model by our name, at the top or in a response that an event carries."""
        if isinstance(value, dict):
            for part in (value, value.get("response")):
                if isinstance(part, dict) and "model" in part:
                    part["model"] = self.name
        return value


def fault_of(status: int, message: str, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": KINDS.get(status, "server_error"), "param": None, "code": code}}


def error(status: int, message: str, code: str | None = None, headers: dict | None = None) -> Response:
    return JSONResponse(fault_of(status, message, code), status, headers=headers)


def engine_error(status: int, value) -> Response:
    """What an engine says went wrong: {"error": {"message"}} of vLLM, {"detail"} of FastAPI."""
    told = value.get("error", value.get("detail", value)) if isinstance(value, dict) else value
    message = told.get("message", told) if isinstance(told, dict) else told
    return error(status, message if isinstance(message, str) else json.dumps(message), told.get("code") if isinstance(told, dict) else None)
