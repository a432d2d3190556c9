"""The instructions of Ghost Attention (paper section 3.3, A.3.5): what the file holds, how they are combined, and how they are attached."""

import random
from dataclasses import dataclass, fields

from posttrain import chat
from posttrain.data import naming, only, read_rows
from posttrain.errors import PosttrainError
from posttrain.formats import Demonstration, Message, RowError, show
from posttrain.runs import Section
from sft import checkers

KINDS = ("hobby", "language", "figure")
NEEDED = {"hobby": ("value",), "figure": ("value",), "language": ("value", "script"), "question": ("of", "text"),
          "constraint": ("value", "check", "text")}
PLAIN = {"hobby": "You enjoy {}.", "language": "Speak in {}.", "figure": "Act as {}."}  # for an entry without a text, as in A.3.5
Exchange = tuple[str, str]  # a user turn and the answer to it


@dataclass(frozen=True)
class Entry:
    """A row of an instructions file. use: 'training' or 'evaluation', never both.

    hobby, language, figure: `value`, `text` (the instruction in full), `accept` (other names of it), `script` and `words` (see checkers.speaks);
    question: `text`, `of` hobby or figure; constraint: `value`, `text`, `check` (see checkers.CHECKS), `argument`.
    """

    kind: str
    value: str = ""
    text: str = ""
    use: str = "training"
    accept: tuple[str, ...] = ()
    script: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    of: str = ""
    check: str = ""
    argument: int | str | None = None

    def said(self, terse: bool) -> str:
        """The instruction in full, or as 'Figure: Napoleon.'"""
        return f"{self.kind.capitalize()}: {self.value}." if terse else self.text or PLAIN[self.kind].format(self.value)

    def kept(self, answer: str, languages: list["Entry"]) -> bool:
        """Whether an answer keeps it: it names the hobby or figure, is in the language (of these), or has the form."""
        if self.kind == "constraint":
            return checkers.CHECKS[self.check](answer, *([] if self.argument is None else [self.argument]))
        if self.kind == "language":
            return checkers.speaks(answer, list(self.script), list(self.words), [list(e.words) for e in languages if e.value != self.value])
        return checkers.names(answer, [self.value, *self.accept])


# -- the file ------------------------------------------------------------------------------------------------------------------------


def read_entries(section: Section) -> list[Entry]:
    """The rows of the section's instructions files. Raises PosttrainError that names the file and row at fault."""
    found = []
    for name in section.config.instructions:
        for number, row in read_rows(section.file(name)):
            try:
                found.append(_entry(row))
            except RowError as e:
                raise PosttrainError(f"{section.place}.instructions, file {name}" + (f", row {number}" if number else ""), e.found, e.expected, e.do) from None
    return found


def _entry(row: dict | RowError) -> Entry:
    if isinstance(row, RowError):
        raise row
    if odd := [k for k in row if k not in {f.name for f in fields(Entry)}]:
        raise RowError("unknown_column", f"an unknown column {odd[0]!r}", ", ".join(f.name for f in fields(Entry)))
    if row.get("kind") not in NEEDED:
        raise RowError("wrong_type", f"'kind' is {show(row.get('kind'))}", f"one of {', '.join(NEEDED)}")
    for key in NEEDED[row["kind"]]:
        if not row.get(key):
            raise RowError("missing_column", f"a {row['kind']} without '{key}'", f"{' and '.join(NEEDED[row['kind']])} of every {row['kind']}")
    for key, value in row.items():
        several = key in ("accept", "script", "words")
        texts = value if several and isinstance(value, list) else [value]
        if key != "argument" and (several != isinstance(value, list) or any(not isinstance(t, str) or not t.strip() for t in texts)):
            raise RowError("wrong_type", f"'{key}' is {show(value)}", "a list of texts" if several else "a text")
    entry = Entry(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    for key, known in (("use", ("training", "evaluation")), ("of", ("", "hobby", "figure")), ("check", ("", *checkers.CHECKS))):
        if getattr(entry, key) not in known:
            raise RowError("unknown_word", f"'{key}' is {getattr(entry, key)!r}", f"one of {', '.join(k for k in known if k)}")
    wanted = checkers.WITH_ARGUMENT.get(entry.check)
    if type(entry.argument) is not (wanted or type(None)):
        raise RowError("wrong_type", f"'argument' is {show(entry.argument)}", f"{wanted.__name__} for '{entry.check}'" if wanted else "none")
    return entry


def of_kind(entries: list[Entry], kind: str, use: str, place: str) -> list[Entry]:
    """Those of a kind and use. Raises PosttrainError where there is none."""
    found = [e for e in entries if e.kind == kind and e.use == use]
    if not found:
        raise PosttrainError(f"{place}.instructions", f"no {kind} for {use}", "at least one", f'Add rows with "kind": "{kind}", "use": "{use}".')
    return found


# -- dialogues -----------------------------------------------------------------------------------------------------------------------


def attach(instruction: str, message: str) -> str:
    """A user turn with the instruction before it."""
    return f"{instruction}\n\n{message}"


def dialogue(instruction: str, exchanges: list[Exchange], last: str, every_turn: bool) -> list[Message]:
    """Exchanges and a last user turn as messages, with the instruction on every user turn or on the first alone."""
    users = [u for u, _ in exchanges] + [last]
    users = [attach(instruction, u) if every_turn or i == 0 else u for i, u in enumerate(users)]
    out = [m for u, (_, a) in zip(users, exchanges, strict=False) for m in ({"role": "user", "content": u}, {"role": "assistant", "content": a})]
    return [*out, {"role": "user", "content": users[-1]}]


def in_first_turn_only(messages: list[Message], instruction: str) -> list[Message]:
    """The messages without the instruction on any user turn but the first (A.3.5)."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    prefix = attach(instruction, "")
    return [m | {"content": m["content"].removeprefix(prefix)} if m["role"] == "user" and i != first else m for i, m in enumerate(messages)]


def dialogues_of(section: Section, items: list[Demonstration], tokenizer, fewest: int) -> tuple[list[list[Exchange]], dict[str, int]]:
    """Demonstrations as exchanges, and how many are left out: those with a system text, which may say otherwise than the instruction, and those
    of fewer user turns than `fewest`. Raises PosttrainError for other data, for turns that no template takes, and where none is left."""
    out, left_out = [], {"with a system text": 0, f"of fewer than {fewest} user turns": 0}
    system, short = left_out
    for i, item in enumerate(only(items, Demonstration, f"{section.place}.data")):
        with naming(items, i):
            chat.encode_prompt(tokenizer, item.messages[:-1])
        turns = [m["content"] for m in item.messages]
        if item.messages[0]["role"] == "system":
            left_out[system] += 1
        elif len(turns) < 2 * fewest:
            left_out[short] += 1
        else:
            out.append(list(zip(turns[::2], turns[1::2], strict=True)))
    if not out:
        raise PosttrainError(f"{section.place}.data", f"no dialogue of {len(items)} can be used ({', '.join(f'{n} {why}' for why, n in left_out.items())})",
                             f"dialogues of {fewest} or more user turns without a system text", "Name other data, or set turns.")
    return out, {why: n for why, n in left_out.items() if n}


def conversation(dialogues: list[list[Exchange]], first: int, turns: int, rng: random.Random) -> list[Exchange]:
    """`turns` exchanges: those of dialogues[first], then of other dialogues by lot, each from its beginning. Fewer where all together have fewer."""
    out = list(dialogues[first])
    for i in rng.sample(range(len(dialogues)), len(dialogues)):
        if len(out) >= turns:
            break
        out += dialogues[i] if i != first else []
    return out[:turns]
