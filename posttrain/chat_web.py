"""The chat page: the conversation is kept in the browser, the server only answers, one answer at a time. Text is never run as HTML: the script
writes it as text, and the headers of annotate/site.py would not let it run even so."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from posttrain.annotate.site import SHARED, Door, Guard, TooLong, form_of, templates_in, too_long, version_of
from posttrain.chat_command import Settings
from posttrain.errors import PosttrainError

HERE = Path(__file__).parent / "chat_page"


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Order(BaseModel):
    """What the page asks for: an answer of one version to a conversation."""

    model_config = ConfigDict(extra="forbid")
    version: int = Field(ge=0)
    messages: list[Said] = Field(min_length=1)
    temperature: float = Field(ge=0, le=10)
    top_p: float = Field(gt=0, le=1)
    max_new_tokens: int = Field(ge=1)


class Page:
    def __init__(self, speaker, names: list[str], settings: Settings, system: str, password: str | None, cookie: str):
        self.speaker, self.names, self.settings, self.system = speaker, names, settings, system
        self.one = ThreadPoolExecutor(1)  # the versions share layers and caches: one answer at a time, the others wait
        self.drawn = 0
        self.page = templates_in(HERE).get_template("chat.html.j2")
        self.version = version_of(HERE, SHARED)
        self.door = Door(password, cookie, "Chat", "Chat", self.version)
        self.app = Starlette(
            routes=[Route("/", self.home), Route("/sign-in", self.door.sign_in, methods=["POST"]), Route("/answer", self.answer, methods=["POST"]),
                    Mount("/static", StaticFiles(directory=HERE)), Mount("/shared", StaticFiles(directory=SHARED))],
            middleware=[Middleware(Guard, local_only=password is None)], exception_handlers={TooLong: too_long})

    async def home(self, request: Request) -> Response:
        if not self.door.known(request):
            return self.door.shown()
        return HTMLResponse(self.page.render(version=self.version, names=self.names, settings=self.settings, system=self.system))

    async def answer(self, request: Request) -> Response:
        """Lines of JSON: {"text"} as it comes, at the end {"whole", "why"} or {"error"}."""
        if not self.door.known(request):
            return JSONResponse({"error": "Sign in again: load this page anew."}, 403)
        try:
            order = Order.model_validate_json((await form_of(request)).get("order", ""))
        except ValidationError as e:
            return JSONResponse({"error": f"This is no question: {e.errors()[0]['msg']}"}, 400)
        if order.version >= len(self.names) or order.messages[-1].role != "user":
            return JSONResponse({"error": "This is no question to a version of this page."}, 400)
        return StreamingResponse(self._lines(order), media_type="application/x-ndjson")

    async def _lines(self, order: Order):
        """Ends early, and with it the answer, when the browser goes away."""
        loop, lines, stop = asyncio.get_running_loop(), asyncio.Queue(), Event()

        def put(value: dict) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(lines.put_nowait, value)

        def work() -> None:
            if not stop.is_set():
                put(self._answer(order, lambda text: put({"text": text}), stop))

        self.one.submit(work)
        try:
            while True:
                value = await lines.get()
                yield json.dumps(value, ensure_ascii=False) + "\n"
                if "text" not in value:
                    return
        finally:
            stop.set()

    def _answer(self, order: Order, heard, stop: Event) -> dict:
        from posttrain.generate import Sampling

        seed = None if self.settings.seed is None else self.settings.seed + self.drawn
        self.drawn += 1
        try:
            answer = self.speaker.answer(order.version, [m.model_dump() for m in order.messages],
                                         Sampling(order.max_new_tokens, order.temperature, order.top_p), seed, heard, stop)
            return {"whole": answer.text, "why": answer.why}
        except PosttrainError as e:
            return {"error": str(e)}
        except Exception as e:  # out of memory, most likely; the page says so and goes on
            return {"error": f"{type(e).__name__}: {e}"[:500]}



def build(speaker, names: list[str], settings: Settings, system: str, password: str | None, cookie: str = "chat") -> Starlette:
    return Page(speaker, names, settings, system, password, cookie).app
