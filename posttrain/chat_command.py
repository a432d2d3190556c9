"""`python -m posttrain chat`: talk to a version, or to two side by side, in the terminal, through a pipe, or on a page (chat_web.py)."""

import re
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Annotated

import typer

from posttrain import listen, versions
from posttrain.errors import PosttrainError
from posttrain.log import say
from posttrain.runs import write_lines
from posttrain.versions import Version

HOST, PORT = "127.0.0.1", 8500  # of the page
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could steer a terminal; line feed and tab stay


@dataclass
class Settings:
    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 512
    seed: int | None = None


@dataclass
class Turn:
    """What the user said, and what every version answered; '' where a version was stopped before its first word."""

    user: str
    answers: list[str]


class Refused(Exception):
    """Why a command did nothing."""


@dataclass
class Talk:
    """One conversation with every version: the user's turns are common, the answers each version's own."""

    names: list[str]
    speaker: object
    settings: Settings
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    drawn: int = 0  # answers so far: with a seed, each has a random stream of its own

    def messages(self, which: int, upto: int | None = None) -> list[dict]:
        """The conversation as a version sees it."""
        out = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[:upto]:
            if turn.answers[which]:
                out += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answers[which]}]
        return out

    def ask(self, text: str, heard: Callable[[int, str], None], ended: Callable[[int, str, str], None], stop: Event) -> None:
        """Every version's answer to the next turn. heard(version, text) as it comes, ended(version, whole answer, why) after each."""
        from posttrain.generate import Sampling

        told, answers = self.settings, []
        for i in range(len(self.names)):
            stop.clear()
            seed = None if told.seed is None else told.seed + self.drawn
            self.drawn += 1
            answer = self.speaker.answer(i, [*self.messages(i), {"role": "user", "content": text}],
                                         Sampling(told.max_new_tokens, told.temperature, told.top_p), seed, lambda t, i=i: heard(i, t), stop)
            ended(i, answer.text, answer.why)
            answers.append(answer.text)
        if any(answers):
            self.turns.append(Turn(text, answers))

    # -- commands: each returns what is said about it --------------------------------------------------------------------------------

    def reset(self, _: str) -> str:
        self.turns.clear()
        return "A new conversation."

    def undo(self, _: str) -> str:
        if not self.turns:
            raise Refused("there is nothing to take back")
        return f"Taken back: {self.turns.pop().user[:60]}"

    def set_system(self, text: str) -> str:
        self.system = text
        return f"System prompt: {text}" if text else "No system prompt."

    def set_number(self, name: str, text: str, read, good: Callable[[float], bool], expected: str) -> str:
        if text:
            try:
                value = read(text)
            except ValueError:
                value = None
            if value is None or not good(value):
                raise Refused(f"{name} is {expected}")
            setattr(self.settings, name, value)
        return f"{name} {getattr(self.settings, name):g}"

    def save(self, text: str) -> str:
        """One line a version, in the data format `messages`."""
        if not text or not self.turns:
            raise Refused("it takes the name of a file, as /save talk.jsonl" if not text else "there is nothing to save")
        path = Path(text).expanduser()
        if path.exists():
            raise Refused(f"{path} exists")
        settings = {"temperature": self.settings.temperature, "top_p": self.settings.top_p}
        try:
            write_lines(path, [{"messages": self.messages(i), "model": name, **settings} for i, name in enumerate(self.names) if self.messages(i)])
        except OSError as e:
            raise Refused(f"{path} cannot be written ({e.strerror})") from None
        return f"Saved: {path}, in the data format `messages`."


class Terminal:
    """Lines in, answers out. Without a terminal on standard input: a line is a turn, and standard output carries the answers alone."""

    def __init__(self, talk: Talk):
        self.talk, self.stop = talk, Event()
        self.typed, self.shown = sys.stdin.isatty(), sys.stdout.isatty()
        self.speaking: int | None = None  # the version whose answer is being printed

    def run(self) -> None:
        if self.typed:
            with suppress(ImportError):
                import readline  # noqa: F401  input() then edits and remembers lines
            self.note(f"{' | '.join(self.talk.names)}. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.")
        while True:
            try:
                text = self.read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                self.note("\n/quit or Ctrl-D ends.")
                continue
            if text.startswith("/"):
                if self.command(*text[1:].split(None, 1)):
                    break
            elif text.strip():
                self.ask(text.strip())
        if self.typed:
            self.note("")

    def read(self) -> str:
        """The next turn; a line that ends with a backslash goes on in the next one."""
        lines = []
        while True:
            line = input(("... " if lines else "\n> ") if self.typed else "")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def command(self, name: str = "", text: str = "") -> bool:
        """Whether the conversation ends here."""
        text = text.strip()
        if name in ("quit", "exit"):
            return True
        try:
            if name == "help":
                self.note("\n".join(f"  /{n:<22}{words}" for n, (_, words) in COMMANDS.items()))
            elif name in ("again", "regenerate"):
                self.again()
            elif found := next((do for n, (do, _) in COMMANDS.items() if n.split()[0] == name), None):
                self.note(found(self.talk, text))
            else:
                raise Refused("no such command; /help lists them, and a space before the / makes it text")
        except Refused as e:
            self.note(f"/{name}: {e}")
        return False

    def again(self) -> None:
        if not self.talk.turns:
            raise Refused("there is no answer yet")
        before = self.talk.turns.pop()
        count = len(self.talk.turns)
        self.ask(before.user)
        if len(self.talk.turns) == count:  # stopped before a word: the earlier answers stay
            self.talk.turns.append(before)

    def ask(self, text: str) -> None:
        try:
            with self.interruptions():
                self.talk.ask(text, self.heard, self.ended, self.stop)
        except PosttrainError as e:
            if not self.typed:
                raise
            self.note(f"error: {e}")

    @contextmanager
    def interruptions(self):
        """Ctrl-C asks the loop to stop between two tokens, so that nothing is left half written in memory; a second one ends the program."""
        def asked(*_) -> None:
            if self.stop.is_set():
                raise KeyboardInterrupt
            self.stop.set()

        self.stop.clear()
        before = signal.signal(signal.SIGINT, asked)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def heard(self, which: int, text: str) -> None:
        if not self.typed:  # the whole answer is printed at its end
            return
        if self.speaking != which:
            self.label(which)
        self.write(text)

    def label(self, which: int) -> None:
        self.speaking = which
        if len(self.talk.names) > 1:
            name = self.talk.names[which]
            self.write(f"[{name}]{' ' if not self.typed else chr(10)}")

    def ended(self, which: int, text: str, why: str) -> None:
        if self.speaking != which:
            self.label(which)
        self.write("" if self.typed else text)
        self.write("\n")
        self.speaking = None
        if why != "end" and self.typed:
            self.note(f"({'stopped' if why == 'stopped' else 'cut off at max_new_tokens'})")

    def write(self, text: str) -> None:
        sys.stdout.write(CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if self.shown else text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        if self.typed and self.shown:
            say(text, style="dim")
        else:
            print(text, file=sys.stderr, flush=True)


def _temperature(talk: Talk, text: str) -> str:
    return talk.set_number("temperature", text, float, lambda v: 0 <= v <= 10, "a number from 0 to 10")


def _top_p(talk: Talk, text: str) -> str:
    return talk.set_number("top_p", text, float, lambda v: 0 < v <= 1, "above 0 and at most 1")


def _longest(talk: Talk, text: str) -> str:
    return talk.set_number("max_new_tokens", text, int, lambda v: v >= 1, "a whole number of at least 1")


COMMANDS: dict[str, tuple[Callable[[Talk, str], str] | None, str]] = {
    "reset": (Talk.reset, "begin a new conversation"),
    "undo": (Talk.undo, "take the last turn back"),
    "again": (None, "another answer to the last turn (also /regenerate)"),
    "system TEXT": (Talk.set_system, "the system prompt; without text: none"),
    "temperature X": (_temperature, "0 takes the likeliest token"),
    "top_p X": (_top_p, "share of probability that is drawn from"),
    "max_new_tokens N": (_longest, "longest answer"),
    "save FILE": (Talk.save, "the conversation as JSON lines, in the data format `messages`"),
    "help": (None, "this list"),
    "quit": (None, "end (also Ctrl-D)"),
}


def chat(model: Annotated[str, typer.Argument(metavar="RUN", help="a recipe, a run's or a section's folder, a model folder, a built-in or hub name",
                                              show_default=False)],
         section: Annotated[str | None, typer.Option(help="of the recipe or run: SECTION, or base; default its export, else the last that finished",
                                                     show_default=False)] = None,
         beside: Annotated[str | None, typer.Option(help="a second version that answers too: whatever RUN may be, or another section of it",
                                                    show_default=False)] = None,
         system: Annotated[str, typer.Option(help="system prompt", show_default=False)] = "",
         temperature: Annotated[float, typer.Option(min=0, max=10, help="0 takes the likeliest token")] = Settings.temperature,
         top_p: Annotated[float, typer.Option(min=0.001, max=1)] = Settings.top_p,
         max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = Settings.max_new_tokens,
         seed: Annotated[int | None, typer.Option(help="for the same answers every time", show_default=False)] = None,
         chat_template: Annotated[str | None, typer.Option(help="of a model that has none: chatml, llama-2, llama-3 or a .jinja file",
                                                           show_default=False)] = None,
         web: Annotated[bool, typer.Option("--web", help="a page in the browser in the place of the terminal")] = False,
         host: Annotated[str, typer.Option(help="of --web: the address to answer on; beyond this machine it takes a password")] = HOST,
         port: Annotated[int, typer.Option(min=0, max=65535, help="of --web; 0: any free one")] = PORT,
         password_file: Annotated[Path | None, typer.Option(help="of --web: a file with the password; or the variable POSTTRAIN_PASSWORD",
                                                            show_default=False)] = None,
         tls_certificate: listen.Certificate = None, tls_key: listen.Key = None) -> None:
    """Talk to a version of a run, or to two side by side: in the terminal, with lines from a pipe, or with --web on a page."""
    for_page = {"--host": host != HOST and host, "--port": port != PORT and port, "--password-file": password_file,
                "--tls-certificate": tls_certificate, "--tls-key": tls_key}
    if not web and (stray := next((f"{option} {value}" for option, value in for_page.items() if value), None)):
        raise PosttrainError(stray, "an option of the page, and there is none", "--web beside it", "Add --web, or leave the option out.")
    found = [versions.find(model, section, chat_template)]
    if beside:
        found.append(versions.beside(model, beside, chat_template))
    settings = Settings(temperature, top_p, max_new_tokens, seed)
    if web:
        _on_a_page(found, settings, system, host, port, password_file, tls_certificate, tls_key)
        return
    speaker = _loaded(found)
    Terminal(Talk(names(found), speaker, settings, system)).run()


def names(found: list[Version]) -> list[str]:
    """Different ones, also where both versions bear the same."""
    out = [v.name for v in found]
    return [f"{name} ({i})" for i, name in enumerate(out, 1)] if len(set(out)) < len(out) else out


def _loaded(found: list[Version]):
    if sys.stdin.isatty():
        say(f"Loading {' and '.join(v.name for v in found)} ...", style="dim")
    from posttrain.speaker import Speaker

    return Speaker(found)


def _on_a_page(found: list[Version], settings: Settings, system: str, host: str, port: int, password_file: Path | None,
               certificate: Path | None, key: Path | None) -> None:
    listen.need_ui("chat --web", "starlette", "uvicorn")
    from posttrain.annotate import site
    from posttrain.chat_web import build

    password, tls = site.read_password(host, password_file), listen.tls(certificate, key)
    listener = listen.listen(host, port)
    app = build(_loaded(found), names(found), settings, system, password, f"chat_{listener.getsockname()[1]}")
    say(f"Chat: {listen.address(listener, bool(tls))} ({' | '.join(names(found))}). Ctrl-C stops it.")
    listen.note_unless(tls, password and "the password crosses", "the page")
    listen.run(listen.server(app, **tls), listener)
