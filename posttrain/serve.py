"""`python -m posttrain serve`: a version behind an OpenAI-compatible address. The engine is `transformers serve`, or vLLM where it is installed; it
answers on a free port of this machine alone, and the proxy (serve_proxy.py) is what clients reach."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import psutil
import typer

from posttrain import listen, versions, watch
from posttrain.errors import PosttrainError
from posttrain.log import say

NEEDS = {"transformers": ("fastapi", "openai", "uvicorn", "starlette", "httpx2"), "vllm": ("vllm", "uvicorn", "starlette", "httpx2")}
SHORTEST = 10  # characters of a key
OURS = ("--host", "--port", "--api-key", "--uds", "--served-model-name", "--trust-remote-code", "--enable-cors", "--allowed-origins", "--root-path",
        "--model", "--tokenizer", "--config")
PATIENCE = 10.0  # seconds an engine has to end by itself


def serve(model: Annotated[str, typer.Argument(metavar="RUN", help="a recipe, a run's or a section's folder, a model folder, a built-in or hub name",
                                               show_default=False)],
          options: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTIONS]", show_default=False,
                                                              help="after --: the engine's own, such as -- --max-model-len 4096")] = None,
          section: Annotated[str | None, typer.Option(help="of the recipe or run: SECTION, or base; default its export, else the last that finished",
                                                      show_default=False)] = None,
          engine: Annotated[Literal["auto", "transformers", "vllm"],
                            typer.Option(help="auto: vllm where it is installed and there is a GPU")] = "auto",
          name: Annotated[str | None, typer.Option(help="what clients call the model; default RUN/SECTION, or the folder's name",
                                                   show_default=False)] = None,
          host: Annotated[str, typer.Option(help="the address to answer on; beyond this machine it takes an API key")] = "127.0.0.1",
          port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
          api_key: Annotated[str | None, typer.Option(help="demanded of every client; others on this machine can read it here: rather --api-key-env",
                                                      show_default=False)] = None,
          api_key_env: Annotated[str | None, typer.Option(help="NAME of the variable that holds the API key", show_default=False)] = None,
          tls_certificate: listen.Certificate = None, tls_key: listen.Key = None,
          chat_template: Annotated[str | None, typer.Option(help="of a model that has none: chatml, llama-2, llama-3 or a .jinja file",
                                                            show_default=False)] = None) -> None:
    """Serve a version to OpenAI's clients until Ctrl-C. An adapter is merged into a folder in the cache first, which is used again."""
    # 1. What can be wrong before anything is loaded.
    engine = chosen(engine)
    check_installed(engine)
    key, tls = read_key(host, api_key, api_key_env), listen.tls(tls_certificate, tls_key)
    _check_options(options or [])
    version = versions.find(model, section, chat_template)
    listener = listen.listen(host, port)

    # 2. The folder, the engine on it, the proxy before the engine; whatever happens, the engine ends with this process.
    from posttrain.servable import folder_of
    from posttrain.serve_proxy import Proxy

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))  # the terminal is gone
    say(f"Loading {version.name} into {engine} ...")
    folder, dtype, done = folder_of(version)
    if done:
        say(f"  {done}")
    name = name or version.name
    behind = Engine(engine, folder, dtype, name, options or [])
    try:
        behind.wait()
        server = listen.server(Proxy(behind.url, behind.model, name, key).app, "on", **tls)
        behind.at_end = lambda: setattr(server, "should_exit", True)
        say(f"{name} answers at {listen.address(listener, bool(tls))}/v1 ({engine}, {dtype}{', with the API key' if key else ''}). Ctrl-C stops it.")
        listen.note_unless(tls, key and not listen.is_loopback(host) and "key and text cross", "this address", "they are")
        listen.run(server, listener)
        behind.check()
    except KeyboardInterrupt:
        pass
    finally:
        behind.end()


def chosen(engine: str) -> str:
    if engine != "auto":
        return engine
    if find_spec("vllm") is None:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"


def check_installed(engine: str) -> None:
    if missing := [name for name in NEEDS[engine] if find_spec(name) is None]:
        extra = "serve" if engine == "transformers" else "vllm,serve"
        raise PosttrainError(f"serve --engine {engine}", f"{', '.join(missing)} not installed", f"the extra [{extra}]",
                             f"`pip install -e '.[{extra}]'` in the checkout.")


def read_key(host: str, given: str | None, variable: str | None) -> str | None:
    """Raises PosttrainError where there is none for a host beyond this machine, and for a short one."""
    if given is not None and variable is not None:
        raise PosttrainError("--api-key, --api-key-env", "both given", "one of them", "Leave one out.")
    place = "--api-key" if given is not None else f"--api-key-env {variable}"
    key = given if given is not None else os.environ.get(variable, "") if variable else None
    if key is None and not listen.is_loopback(host):
        raise PosttrainError(f"--host {host}", "others can reach this address, and there is no API key",
                             f"a key of at least {SHORTEST} characters: --api-key, or --api-key-env with a variable's name",
                             f"Give one, such as {secrets.token_urlsafe(24)}, or leave --host out: this machine alone is answered then.")
    if key is not None and (len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key):
        found = "no key" if not key else f"a key of {len(key)} characters" if len(key) < SHORTEST else "a key that fits no header"
        raise PosttrainError(place, found, f"at least {SHORTEST} letters, digits and signs", f"Choose another, such as {secrets.token_urlsafe(24)}.")
    return key


def _check_options(options: list[str]) -> None:
    if options and not options[0].startswith("-"):
        raise PosttrainError(f"serve {options[0]}", "a word beside RUN", "one RUN, and the engine's own options after --",
                             "Leave it out, or write it as -- --OPTION VALUE.")
    for word in options:
        if word.split("=")[0].replace("_", "-") in OURS:
            raise PosttrainError(f"serve -- {word}", "an option that serve sets itself", "options of memory, length and speed",
                                 "Leave it out; `python -m posttrain serve --help` lists ours.")


def _transformers(folder: Path, dtype: str, name: str, port: int) -> tuple[list[str], str]:
    """(command, what the engine calls its model): the folder it is started in, so that no path of this machine is in its answers."""
    return ["transformers.cli.transformers", "serve", ".", "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype], "."


def _vllm(folder: Path, dtype: str, name: str, port: int) -> tuple[list[str], str]:
    """Written against vLLM 0.33.0, seen with a stand-in alone: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/entrypoints/cli/main.py"""
    return ["vllm.entrypoints.cli.main", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype,
            "--served-model-name", name], name


class Engine:
    """The engine's process, in a session of its own: Ctrl-C is for us. watch.py ends it should this process be killed."""

    def __init__(self, kind: str, folder: Path, dtype: str, name: str, options: list[str]):
        with listen.listen("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
        command, self.model = ENGINES[kind](folder, dtype, name, port)
        self.kind, self.url, self.said, self.at_end, self._closing = kind, f"http://127.0.0.1:{port}", deque(maxlen=30), lambda: None, False
        self._watch = watch.begin()
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1",
                 "TRANSFORMERS_VERBOSITY": "warning"}
        # -P: nothing in a model's folder is imported
        self.process = subprocess.Popen([sys.executable, "-P", "-m", *command, *options], cwd=folder, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
                                        env=os.environ | quiet)
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        for line in self.process.stdout:
            self.said.append(line.rstrip())
        self.process.wait()
        self.at_end()

    def wait(self) -> None:
        """Until it answers. Raises PosttrainError where it ends first."""
        while True:
            self.check()
            with suppress(OSError), urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)

    def check(self) -> None:
        if not self._closing and self.process.poll() is not None:
            self._reader.join(5)
            raise PosttrainError(f"serve --engine {self.kind}", f"the engine ended (exit code {self.process.returncode})", "an engine that runs",
                                 "It said last:\n" + "\n".join(self.said))

    def end(self) -> None:
        """Its process and all that came of it."""
        self._closing = True
        family = []
        with suppress(psutil.Error):
            me = psutil.Process(self.process.pid)
            family = [me, *me.children(recursive=True)]
        for how in ("terminate", "kill"):
            for process in family:
                with suppress(psutil.Error):
                    getattr(process, how)()
            _, family = psutil.wait_procs(family, PATIENCE)
        self.process.wait()
        with self._watch:
            self._watch.kill()


ENGINES = {"transformers": _transformers, "vllm": _vllm}
