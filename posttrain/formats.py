"""A dataset row -> Demonstration | Pair | Prompt. One function a format; the FORMATS table is at the bottom.

A reader takes one row (a dict as published) and returns one item or a list of items. It raises `RowError` for a row that cannot be
used and `Skip` for one that is no item by its makers' intent (a tie), and nothing else, whatever the row holds. Contents lose
surrounding whitespace; columns a format does not know are kept in `meta` when they are short scalars (`chosen_model`, `category`),
and `source` (text) and `safety` (bool) columns set the item's fields of that name (in a public prompt set, the set itself says them).
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": str}

RATINGS = {"significantly_better": 3, "better": 2, "slightly_better": 1, "negligibly_better": 0}
_RATING_WORDS = RATINGS | {"negligibly_better_or_unsure": 0, "negligibly_better_unsure": 0, "unsure": 0}
SAFETY_BINS = {"preferred_safe": (True, False), "both_safe": (True, True), "both_unsafe": (False, False)}  # paper 3.2.1: chosen, rejected
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = _ROLES | {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
                            "bard": "assistant", "model": "assistant", "bot": "assistant"}
_TRUTH = {True: ("true", "yes", "y", "on", "1", "1.0"), False: ("false", "no", "n", "off", "0", "0.0")}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate. It starts with a user turn (after an optional system one) and ends with an assistant turn."""

    messages: list[Message]
    loss: str = "all"  # which assistant turns carry loss: "all" or "last"
    source: str = ""
    safety: bool = False
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, which ends with a user turn. rating: 3 significantly .. 0 negligibly better, None where there is none."""

    prompt: list[Message]
    chosen: str
    rejected: str
    rating: int | None = None
    margin: float | None = None
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    source: str = ""
    safety: bool = False
    meta: dict = field(default_factory=dict)

    @property
    def unsafe_preferred(self) -> bool:
        """An unsafe answer was preferred to a safe one: such pairs are no part of the paper's safety data (section 3.2.1)."""
        return self.chosen_safe is False and self.rejected_safe is True


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer: its last turn is the user's."""

    messages: list[Message]
    source: str = ""
    safety: bool = False
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Annotation:
    """One annotator's judgement of one task of a collect section. choice: "a" or "b"; rating as in Pair; safety: one of SAFETY_BINS."""

    id: str
    choice: str
    rating: int
    safety: str | None = None
    edited: str = ""
    annotator: str = ""


class RowError(ValueError):
    """A row that cannot be used. reason: a short stable slug; found, expected, do: the parts of the message."""

    def __init__(self, reason: str, found: str, expected: str = "", do: str = ""):
        self.reason, self.found, self.expected, self.do = reason, found, expected, do
        super().__init__(". ".join(part for part in (found, expected and f"Expected {expected}", do) if part))


class Skip(Exception):
    """A row that is rightly no item, such as a tie between two answers. Counted under `reason`, not bad."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


class Format(NamedTuple):
    kind: str  # "demonstration" | "pair" | "prompt"
    read: Callable[[dict], "Demonstration | Pair | Prompt | list"]
    columns: tuple[str, ...]  # the names it needs


# -- small checks that every reader shares ------------------------------------------------------------------------------------------


def show(value) -> str:
    """A short description of any value, safe for junk: never the repr of a container."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"text {value[:40]!r}" + ("..." if len(value) > 40 else "")
    if isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 10**12):
        return f"{type(value).__name__} {value}"
    return {"dict": "an object", "list": "a list", "int": "a huge number"}.get(type(value).__name__, type(value).__name__)


def name_columns(row: dict) -> str:
    names = [repr(str(k)[:40])[1:-1] for k in row]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"


def fitting(row: dict) -> list[str]:
    """The formats whose every column the row has, those that need most columns first."""
    names = [name for name, f in FORMATS.items() if all(c in row for c in f.columns)]
    return sorted(names, key=lambda name: -len(FORMATS[name].columns))


def missing_column(row: dict, name: str) -> RowError:
    others = [f for f in fitting(row) if f != "prompt"][:2]
    return RowError("missing_column", f"no '{name}' (columns: {name_columns(row)})", "",
                    f"Map it with columns: {{{name}: NAME}}" + (f", or use format: {' or '.join(others)}" if others else ""))


def _want(row, *names: str) -> None:
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"the row is {show(row)}", "an object with named columns")
    for name in names:
        if name not in row:
            raise missing_column(row, name)


def _wrong_type(column: str, value, expected: str) -> RowError:
    return RowError("wrong_type", f"'{column}' is {show(value)}", expected)


def _text(value, column: str, empty: str | None) -> str:
    """Stripped text. empty: the reason when nothing is left; None allows that."""
    if not isinstance(value, str):
        raise _wrong_type(column, value, "text")
    if not value.isascii() and _LONE_SURROGATE.search(value):
        raise RowError("unparsable", f"'{column}' holds half a character (a lone surrogate, or a byte that is not UTF-8)",
                       "valid Unicode text", "Write the file again as UTF-8")
    value = value.strip()
    if not value and empty:
        raise RowError(empty, f"'{column}' is empty", "some text", "Remove the row or fill it in")
    return value


def _records(value) -> list | None:
    """A list; `datasets` turns a sequence of records into a record of sequences, which is turned back. None: neither."""
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()) and len({len(v) for v in value.values()}) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else None


def _turns(value, column: str, roles: dict[str, str] = _ROLES, role: str = "role", content: str = "content") -> list[Message]:
    """Any list of {role, content} records -> messages. Empty system texts are dropped."""
    records = _records(value)
    if records is None:
        raise _wrong_type(column, value, f"a list of {{{role}, {content}}}")
    out = []
    for i, turn in enumerate(records):
        where = f"{column}[{i}]"
        if not isinstance(turn, dict) or role not in turn or content not in turn:
            raise _wrong_type(where, turn, f"an object with {role} and {content}")
        speaker = roles.get(turn[role].strip().lower()) if isinstance(turn[role], str) else None
        if speaker is None:
            raise RowError("role_order", f"'{where}.{role}' is {show(turn[role])}", f"one of {', '.join(roles)}", "Rename or remove that turn")
        empty = {"user": "empty_prompt", "assistant": "empty_answer", "system": None}[speaker]
        text = _text(turn[content], f"{where}.{content}", empty)
        if text or speaker != "system":
            out.append({"role": speaker, "content": text})
    return out


def _ordered(messages: list[Message], column: str, last: str) -> list[Message]:
    """The messages, if they are [system] user assistant user ... and end with `last`."""
    roles = [m["role"] for m in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise RowError("empty_prompt", f"'{column}' has no turn", "at least a user turn", "Remove the row")
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise RowError("role_order", f"'{column}' has the roles {', '.join(roles[:8])}{' ...' if len(roles) > 8 else ''}",
                       "an optional system turn, then user and assistant in turn", "Reorder or join the turns")
    if spoken[-1] != last:
        reason = "no_answer" if last == "assistant" else "role_order"
        raise RowError(reason, f"'{column}' ends with the {spoken[-1]}", f"a last turn of the {last}", "Remove or add the last turn")
    return messages


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _prompt(value, column: str = "prompt") -> list[Message]:
    """Text or messages -> a conversation that ends with the user."""
    if isinstance(value, str):
        return _user(_text(value, column, "empty_prompt"))
    if _records(value) is None:
        raise _wrong_type(column, value, "text or a list of {role, content}")
    return _ordered(_turns(value, column), column, last="user")


def _number(value, column: str) -> float | None:
    """A finite number, given as one or as text (CSV). Null and empty text are None."""
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong_type(column, value, "a finite number")
    return number


def _needed(value, column: str) -> float:
    number = _number(value, column)
    if number is None:
        raise _wrong_type(column, value, "a finite number")
    return number


def _one_of(row: dict, column: str, options: tuple[int, ...]) -> int:
    number = _needed(row[column], column)
    if number not in options:
        raise RowError("unknown_rating", f"'{column}' is {show(row[column])}", f"one of {', '.join(map(str, options))}")
    return int(number)


def _flag(value, column: str) -> bool | None:
    """True or False, given as a bool, as 0 or 1, or in words (CSV). Null and empty text are None."""
    if value is None or value == "":
        return None
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    word = value[:20].strip().lower() if isinstance(value, str) else ""
    for truth, words in _TRUTH.items():
        if word in words:
            return truth
    raise _wrong_type(column, value, "true or false")


def _rating(value) -> int | None:
    """One of the paper's four levels, in words or as 0..3 -> 0..3."""
    if value is None or value == "":
        return None
    word = value[:60].strip().lower() if isinstance(value, str) else ""
    level = _RATING_WORDS.get(re.sub(r"[^a-z]+", "_", word).strip("_"))
    if level is None and not isinstance(value, bool):
        level = next((n for n in range(4) if value == n or word in (str(n), f"{n}.0")), None)
    if level is None:
        raise RowError("unknown_rating", f"'rating' is {show(value)}", f"one of {', '.join(RATINGS)} or 3, 2, 1, 0")
    return level


def _word(value, column: str, options: Iterable[str], reason: str) -> str:
    """One of some words, in any case and with any spacing."""
    word = re.sub(r"[^a-z]+", "_", value[:60].strip().lower()).strip("_") if isinstance(value, str) else ""
    if word not in options:
        raise RowError(reason, f"'{column}' is {show(value)}", f"one of {', '.join(options)}")
    return word


def _plain(value) -> bool:
    """A short scalar that JSON can hold."""
    if isinstance(value, str):
        return len(value) <= 200 and (value.isascii() or not _LONE_SURROGATE.search(value))
    return isinstance(value, (bool, int, float)) and abs(value) < 2**63


def _common(row: dict, *used: str) -> dict:
    """source, safety and meta of an item."""
    meta = {}
    for key, value in row.items():
        if isinstance(key, str) and key not in (*used, "source", "safety") and _plain(key) and _plain(value):
            meta[key] = value
    source = row.get("source")
    return {"source": source.strip() if isinstance(source, str) and _plain(source) else "", "safety": bool(_flag(row.get("safety"), "safety")),
            "meta": meta}


def _pair(prompt: list[Message], chosen: str, rejected: str, **rest) -> Pair:
    if chosen == rejected:
        raise RowError("identical_pair", f"both answers are {show(chosen)}", "two different answers", "Remove the row")
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **rest)


def _level(size: float, three: float, two: float, one: float) -> int:
    """The rating of a preference's size, from the least sizes of three levels."""
    return 3 if size >= three else 2 if size >= two else 1 if size >= one else 0


# -- demonstrations and prompts ------------------------------------------------------------------------------------------------------


def _loss(row: dict, default: str = "all") -> str:
    value = row.get("loss")
    if value is None or value == "":
        return default
    if value not in ("all", "last"):
        raise _wrong_type("loss", value, "all or last")
    return value


def messages(row: dict) -> Demonstration:
    """{"messages": [{"role", "content"}], "loss"?: "all" | "last"}: the OpenAI and TRL conversational form."""
    _want(row, "messages")
    turns = _ordered(_turns(row["messages"], "messages"), "messages", last="assistant")
    return Demonstration(turns, loss=_loss(row), **_common(row, "messages", "loss"))


def prompt_completion(row: dict) -> Demonstration:
    """{"prompt": text | messages, "completion": text | messages}, as TRL's. Earlier assistant turns in the prompt carry no loss."""
    _want(row, "prompt", "completion")
    prompt, completion = _prompt(row["prompt"]), row["completion"]
    if isinstance(completion, str):
        answer = [{"role": "assistant", "content": _text(completion, "completion", "empty_answer")}]
    else:
        answer = _turns(completion, "completion")
        if not answer:
            raise RowError("empty_answer", "'completion' has no turn", "an assistant turn", "Remove the row")
    turns = _ordered(prompt + answer, "prompt + completion", last="assistant")
    carried = "last" if len(answer) == 1 and any(m["role"] == "assistant" for m in prompt) else "all"
    return Demonstration(turns, loss=_loss(row, carried), **_common(row, "prompt", "completion", "loss"))


def _instruction(row: dict) -> list[Message]:
    """Alpaca's instruction, optional input (put below it) and optional system text -> a prompt."""
    parts = [_text(row["instruction"], "instruction", "empty_prompt")]
    if row.get("input") is not None:
        parts.append(_text(row["input"], "input", None))
    system = [] if row.get("system") is None else _turns([{"role": "system", "content": row["system"]}], "system")
    return system + _user("\n\n".join(p for p in parts if p))


def alpaca(row: dict) -> Demonstration:
    """{"instruction", "input"?, "output", "system"?}: tatsu-lab/alpaca and its many heirs."""
    _want(row, "instruction", "output")
    answer = _text(row["output"], "output", "empty_answer")
    turns = [*_instruction(row), {"role": "assistant", "content": answer}]
    return Demonstration(turns, **_common(row, "instruction", "input", "output", "system"))


def _sharegpt_turns(row: dict) -> list[Message]:
    turns = _turns(row["conversations"], "conversations", _SHAREGPT_ROLES, "from", "value")
    if row.get("system") is not None and [m["role"] for m in turns[:1]] != ["system"]:
        turns = _turns([{"role": "system", "content": row["system"]}], "system") + turns
    return turns


def sharegpt(row: dict) -> Demonstration:
    """{"conversations": [{"from": "human" | "gpt" | "system" ..., "value"}], "system"?}."""
    _want(row, "conversations")
    turns = _ordered(_sharegpt_turns(row), "conversations", last="assistant")
    return Demonstration(turns, **_common(row, "conversations", "system"))


def prompt(row: dict) -> Prompt:
    """{"prompt": text | messages}: the last turn is the user's."""
    _want(row, "prompt")
    return Prompt(_prompt(row["prompt"]), **_common(row, "prompt"))


# -- pairs ---------------------------------------------------------------------------------------------------------------------------


def _labels(row: dict) -> dict:
    """The optional columns of the native pair form."""
    return {"rating": _rating(row.get("rating")), "margin": _number(row.get("margin"), "margin"),
            "chosen_safe": _flag(row.get("chosen_safe"), "chosen_safe"), "rejected_safe": _flag(row.get("rejected_safe"), "rejected_safe")}


def _answer(turns: list[Message], column: str) -> str:
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("no_answer", f"'{column}' does not end with an assistant turn", "the answer as its last turn", "Add the answer")
    return turns[-1]["content"]


def _split_pair(row: dict) -> tuple[list[Message], str, str]:
    """chosen and rejected as message lists: full dialogues with a shared beginning, or what follows `prompt`."""
    chosen, rejected = _turns(row["chosen"], "chosen"), _turns(row["rejected"], "rejected")
    answers = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        raise RowError("diverges_early", "chosen and rejected differ before their last turn", "one shared conversation, then two answers",
                       "Cut both dialogues after the first turn that differs")
    if row.get("prompt") is None and shared:
        return (_ordered(shared, "chosen", last="user"), *answers)
    _want({k: v for k, v in row.items() if v is not None}, "prompt")
    given = _prompt(row["prompt"])
    if not shared or shared[0]["role"] == "assistant":  # the lists go on from the prompt
        return (_ordered(given + shared, "prompt + chosen", last="user"), *answers)
    if any(m not in shared for m in given):
        raise RowError("prompt_mismatch", "'prompt' is not the beginning of 'chosen'", "the same conversation in both",
                       "Remove the prompt column, or cut chosen and rejected to the answers")
    return (_ordered(shared, "chosen", last="user"), *answers)


def _preference_parts(row: dict) -> tuple[list[Message], str, str]:
    _want(row, "chosen", "rejected")
    if not isinstance(row["chosen"], str) and not isinstance(row["rejected"], str):
        return _split_pair(row)
    chosen, rejected = _text(row["chosen"], "chosen", "empty_answer"), _text(row["rejected"], "rejected", "empty_answer")
    _want(row, "prompt")
    return _prompt(row["prompt"]), chosen, rejected


def preference(row: dict) -> Pair:
    """The native pair form, and TRL's: {"prompt"?: text | messages, "chosen", "rejected": text | messages, "rating"?: one of RATINGS
    or 0..3, "margin"?: number, "chosen_safe"?, "rejected_safe"?: bool}. Without a prompt, chosen and rejected are full dialogues
    that differ in their last turn only."""
    parts = _preference_parts(row)
    used = ("prompt", "chosen", "rejected", "rating", "margin", "chosen_safe", "rejected_safe")
    return _pair(*parts, **_labels(row), **_common(row, *used))


def alpaca_pairs(row: dict) -> Pair:
    """{"instruction", "input"?, "chosen", "rejected"}, or LLaMA-Factory's older "output": [better, worse]."""
    _want(row, "instruction")
    answers = row.get("chosen"), row.get("rejected")
    if "chosen" not in row and isinstance(row.get("output"), list):
        if len(row["output"]) != 2:
            raise RowError("wrong_type", f"'output' has {len(row['output'])} answers", "two, the better one first")
        answers = row["output"]
    else:
        _want(row, "chosen", "rejected")
    texts = [_text(a, c, "empty_answer") for a, c in zip(answers, ("chosen", "rejected"), strict=True)]
    used = ("instruction", "input", "system", "chosen", "rejected", "output", "rating", "margin", "chosen_safe", "rejected_safe")
    return _pair(_instruction(row), *texts, **_labels(row), **_common(row, *used))


def sharegpt_pairs(row: dict) -> Pair:
    """{"conversations": [{"from", "value"}], "chosen": {"from": "gpt", "value"}, "rejected": {...}}: LLaMA-Factory's ranking form."""
    _want(row, "conversations", "chosen", "rejected")
    turns = _ordered(_sharegpt_turns(row), "conversations", last="user")
    answers = [_answer(_turns([row[c]], c, _SHAREGPT_ROLES, "from", "value"), c) for c in ("chosen", "rejected")]
    used = ("conversations", "system", "chosen", "rejected", "rating", "margin", "chosen_safe", "rejected_safe")
    return _pair(turns, *answers, **_labels(row), **_common(row, *used))


def _dialogue(text: str, column: str, marker: str) -> list[Message]:
    """Text with speakers' marks (one group: the name) -> messages. Two turns of one speaker in a row become one; before the first mark
    nothing may stand."""
    before, *rest = re.split(marker, text)
    if before.strip() or not rest:
        raise RowError("role_order", f"'{column}' starts with {show(before.strip() or text)}", "a dialogue that starts with '\\n\\nHuman:'",
                       "Use format: preference for plain answers")
    joined: list[tuple[str, list[str]]] = []
    for name, said in zip(rest[::2], rest[1::2], strict=True):
        role = {"Human": "user", "User": "user", "Assistant": "assistant"}[name]
        if not joined or joined[-1][0] != role:
            joined.append((role, []))
        if said.strip():
            joined[-1][1].append(said.strip())
    return _turns([{"role": role, "content": "\n\n".join(said)} for role, said in joined], column)


def hh(row: dict) -> Pair:
    """{"chosen", "rejected"}: Anthropic/hh-rlhf, "\\n\\nHuman: ...\\n\\nAssistant: ..." dialogues whose last answers differ.

    As published, some dialogues have two turns of one speaker in a row (read as one turn) and a few last answers are empty (bad)."""
    _want(row, "chosen", "rejected")
    chosen, rejected = (_dialogue(_text(row[c], c, "empty_answer"), c, r"(?:^|\n\n)(Human|Assistant):") for c in ("chosen", "rejected"))
    answers = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise RowError("diverges_early", "chosen and rejected differ before their last turn", "one shared dialogue, then two answers",
                       "Cut both dialogues after the first turn that differs")
    return _pair(_ordered(chosen[:-1], "chosen", last="user"), *answers, **_common(row, "chosen", "rejected"))


def synthetic_gptj(row: dict) -> Pair:
    """{"prompt", "chosen", "rejected"}: Dahoas/synthetic-instruct-gptj-pairwise."""
    _want(row, "prompt", "chosen", "rejected")
    answers = [_text(row[c], c, "empty_answer") for c in ("chosen", "rejected")]
    return _pair(_user(_text(row["prompt"], "prompt", "empty_prompt")), *answers, **_common(row, "prompt", "chosen", "rejected"))


def _safe_rlhf_pair(row: dict, by: str) -> tuple[list[Message], str, str, int]:
    _want(row, "prompt", "response_0", "response_1", by)
    best = _one_of(row, by, (0, 1))
    answers = [_text(row[f"response_{i}"], f"response_{i}", "empty_answer") for i in (best, 1 - best)]
    return _user(_text(row["prompt"], "prompt", "empty_prompt")), *answers, best


_SAFE_RLHF_USED = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id")


def safe_rlhf(row: dict) -> Pair:
    """PKU-Alignment/PKU-SafeRLHF by safety: {"prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe",
    "better_response_id", "safer_response_id", ...}. The safer answer is chosen; both carry their safety labels."""
    *parts, best = _safe_rlhf_pair(row, "safer_response_id")
    _want(row, "is_response_0_safe", "is_response_1_safe")
    safe = [_flag(row[f"is_response_{i}_safe"], f"is_response_{i}_safe") for i in (best, 1 - best)]
    if None in safe:
        raise _wrong_type("is_response_0_safe or is_response_1_safe", None, "true or false")
    return _pair(*parts, chosen_safe=safe[0], rejected_safe=safe[1], **_common(row, *_SAFE_RLHF_USED))


def safe_rlhf_helpful(row: dict) -> Pair:
    """PKU-SafeRLHF by helpfulness: the answer named by better_response_id is chosen, without safety labels."""
    *parts, _ = _safe_rlhf_pair(row, "better_response_id")
    return _pair(*parts, **_common(row, *_SAFE_RLHF_USED))


def _scored_completions(row: dict) -> list[tuple[float, str, str]]:
    """UltraFeedback's completions -> (score from 1 to 10, text, model).

    `fine-grained_score` (the mean of four aspects, 1 to 5) is preferred: `overall_score` is 10 where 1 was meant in some rows."""
    records = _records(row["completions"])
    if records is None or any(not isinstance(c, dict) for c in records):
        raise _wrong_type("completions", row["completions"], "a list of {response, overall_score or fine-grained_score, model}")
    out = []
    for i, completion in enumerate(records):
        where = f"completions[{i}]"
        if "response" not in completion:
            raise _wrong_type(where, completion, "an object with response")
        fine, overall = completion.get("fine-grained_score"), completion.get("overall_score")
        fine, overall = (None if isinstance(s, float) and math.isnan(s) else s for s in (fine, overall))  # not annotated
        score = _number(fine, f"{where}.fine-grained_score")
        score = _number(overall, f"{where}.overall_score") if score is None else 2 * score
        if score is not None and completion["response"] != "":
            model = completion.get("model")
            out.append((score, _text(completion["response"], f"{where}.response", "empty_answer"), model if isinstance(model, str) else ""))
    return out


def ultrafeedback(row: dict) -> Pair:
    """openbmb/UltraFeedback: {"instruction", "completions": [{"response", "fine-grained_score", "overall_score", "model"}], "source"}.

    The best answer against one of the lower-scored ones, picked by a hash of the instruction; the gap on the 10-point scale is the
    rating: 4 and more significantly better, 2 better, 1 slightly better."""
    _want(row, "instruction", "completions")
    text = _text(row["instruction"], "instruction", "empty_prompt")
    scored = _scored_completions(row)
    if len(scored) < 2:
        raise Skip("fewer_than_two_answers")
    best = max(scored, key=lambda s: s[0])
    worse = [s for s in scored if s[0] < best[0] and s[1] != best[1]]
    if not worse:
        raise Skip("tie")
    other = worse[int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % len(worse)]
    common = _common(row, "instruction", "completions")
    common["meta"] |= {"chosen_model": best[2], "rejected_model": other[2]}
    return _pair(_user(text), best[1], other[1], rating=_level(best[0] - other[0], 4, 2, 1), **common)


def ultrafeedback_binarized(row: dict) -> Pair:
    """HuggingFaceH4/ultrafeedback_binarized: {"prompt", "chosen": messages, "rejected": messages, "score_chosen", "score_rejected"}.
    Equal scores are ties; the gap is rated as in `ultrafeedback`."""
    _want(row, "prompt", "score_chosen", "score_rejected")
    _text(row["prompt"], "prompt", "empty_prompt")
    gap = _needed(row["score_chosen"], "score_chosen") - _needed(row["score_rejected"], "score_rejected")
    parts = _preference_parts(row)
    if gap == 0:
        raise Skip("tie")
    if gap < 0:
        raise RowError("unknown_rating", "'score_chosen' is below 'score_rejected'", "the better answer as chosen", "Swap the two answers")
    return _pair(*parts, rating=_level(gap, 4, 2, 1), **_common(row, "prompt", "chosen", "rejected", "messages"))


def _by_strength(prompt: list[Message], first: str, second: str, strength: int, **common) -> Pair:
    """-3 (the first answer much better) .. 3 (the second): 3, 2, 1 are the three upper ratings, 0 is a tie."""
    if strength == 0:
        raise Skip("tie")
    best = (first, second) if strength < 0 else (second, first)
    return _pair(prompt, *best, rating=abs(strength), **common)


def helpsteer2(row: dict) -> Pair:
    """nvidia/HelpSteer2, data_dir preference: {"prompt", "response_1", "response_2", "preference_strength": -3..3, "split", ...}.
    Turns of a longer prompt are parted by "<extra_id_1>Assistant" and "<extra_id_1>User" lines."""
    _want(row, "prompt", "response_1", "response_2", "preference_strength")
    text = _text(row["prompt"], "prompt", "empty_prompt")
    turns = _dialogue(f"<extra_id_1>User\n{text}", "prompt", r"\n?<extra_id_1>(User|Assistant)\n")
    answers = [_text(row[c], c, "empty_answer") for c in ("response_1", "response_2")]
    strength = _one_of(row, "preference_strength", tuple(range(-3, 4)))
    return _by_strength(_ordered(turns, "prompt", last="user"), *answers, strength,
                        **_common(row, "prompt", "response_1", "response_2", "preference_strength"))


def helpsteer3(row: dict) -> Pair:
    """nvidia/HelpSteer3, name preference: {"context": messages, "response1", "response2", "overall_preference": -3..3, "domain", ...}."""
    _want(row, "context", "response1", "response2", "overall_preference")
    turns = _prompt(row["context"], "context")
    answers = [_text(row[c], c, "empty_answer") for c in ("response1", "response2")]
    strength = _one_of(row, "overall_preference", tuple(range(-3, 4)))
    return _by_strength(turns, *answers, strength, **_common(row, "context", "response1", "response2", "overall_preference"))


def shp(row: dict) -> Pair:
    """stanfordnlp/SHP: {"history", "human_ref_A", "human_ref_B", "labels": 1 (A preferred) | 0, "score_ratio": the preferred comment's
    votes over the other's, 1 or more}. A ratio of 8 and more is significantly better, 4 better, 2 slightly better."""
    _want(row, "history", "human_ref_A", "human_ref_B", "labels")
    label = _one_of(row, "labels", (0, 1))
    answers = [_text(row[c], c, "empty_answer") for c in (("human_ref_B", "human_ref_A"), ("human_ref_A", "human_ref_B"))[label]]
    ratio = _number(row.get("score_ratio"), "score_ratio")
    return _pair(_user(_text(row["history"], "history", "empty_prompt")), *answers, rating=None if ratio is None else _level(ratio, 8, 4, 2),
                 **_common(row, "history", "human_ref_A", "human_ref_B", "labels"))


def webgpt(row: dict) -> Pair:
    """openai/webgpt_comparisons: {"question": {"full_text", ...}, "answer_0", "answer_1", "score_0", "score_1": -1..1, their sum 0}.
    A score of 0 is a tie; 0.75 and more significantly better, 0.5 better, 0.25 slightly better."""
    _want(row, "question", "answer_0", "answer_1", "score_0", "score_1")
    question = row["question"]
    if isinstance(question, dict):
        _want(question, "full_text")
        question = question["full_text"]
    text = _text(question, "question.full_text", "empty_prompt")
    scores = [_needed(row[c], c) for c in ("score_0", "score_1")]
    if scores[0] == scores[1]:
        raise Skip("tie")
    best = int(scores[1] > scores[0])
    answers = [_text(row[f"answer_{i}"], f"answer_{i}", "empty_answer") for i in (best, 1 - best)]
    return _pair(_user(text), *answers, rating=_level(abs(scores[best]), 0.75, 0.5, 0.25),
                 **_common(row, "question", "answer_0", "answer_1"))


def _summarize_prompt(info) -> list[Message]:
    """The post or article with what the labellers saw of it, in the form of Stiennon et al. (2020), appendix B."""
    if not isinstance(info, dict):
        raise _wrong_type("info", info, "an object with post or article")
    if info.get("post") is None:
        _want({k: v for k, v in info.items() if v is not None}, "article")
        return _user(f"Article:\n{_text(info['article'], 'info.article', 'empty_prompt')}\n\nTL;DR:")
    lines = [f"{name}: {_text(info[key], f'info.{key}', None)}" for key, name in (("title", "TITLE"), ("post", "POST")) if info.get(key) is not None]
    if info.get("subreddit") is not None:
        lines.insert(0, f"SUBREDDIT: r/{_text(info['subreddit'], 'info.subreddit', None)}")
    return _user("\n\n".join([*lines, "TL;DR:"]))


def summarize(row: dict) -> Pair:
    """openai/summarize_from_feedback, name comparisons: {"info": {"post", "title", "subreddit"} (or "article"), "summaries": [{"text",
    "policy"}] * 2, "choice": 0 | 1, "extra": {"confidence": 1 (surely the first) .. 9 (surely the second)}}.
    Four steps from the middle of the confidence scale are significantly better, three better, two slightly better."""
    _want(row, "info", "summaries", "choice")
    best = _one_of(row, "choice", (0, 1))
    records = _records(row["summaries"])
    if records is None or len(records) != 2 or any(not isinstance(s, dict) or "text" not in s for s in records):
        raise _wrong_type("summaries", row["summaries"], "two objects with text")
    answers = [_text(records[i]["text"], f"summaries[{i}].text", "empty_answer") for i in (best, 1 - best)]
    confidence = row["extra"].get("confidence") if isinstance(row.get("extra"), dict) else None
    steps = 0.0 if confidence is None else (_needed(confidence, "extra.confidence") - 5) * (1 if best else -1)
    common = _common(row, "info", "summaries", "choice", "extra")
    policies = records[best].get("policy"), records[1 - best].get("policy")
    common["meta"] |= {k: v for k, v in zip(("chosen_model", "rejected_model"), policies, strict=True) if isinstance(v, str)}
    return _pair(_summarize_prompt(row["info"]), *answers, rating=_level(steps, 4, 3, 2) if steps > 0 else None, **common)


def stack_exchange_paired(row: dict) -> Pair:
    """lvwerra/stack-exchange-paired: {"qid", "question", "date", "metadata", "response_j" (better), "response_k"}."""
    _want(row, "question", "response_j", "response_k")
    answers = [_text(row[c], c, "empty_answer") for c in ("response_j", "response_k")]
    return _pair(_user(_text(row["question"], "question", "empty_prompt")), *answers, **_common(row, "question", "response_j", "response_k"))


# -- OpenAssistant trees -------------------------------------------------------------------------------------------------------------


def _node(node, where: str, role: str) -> Message:
    """One message of a tree, as ours."""
    if not isinstance(node, dict) or "text" not in node:
        raise _wrong_type(where, node, "an object with text, role and replies")
    if node.get("role") != role:
        raise RowError("role_order", f"'{where}.role' is {show(node.get('role'))}", role, "Prompter and assistant speak in turn")
    ours = {"prompter": "user", "assistant": "assistant"}[role]
    return {"role": ours, "content": _text(node["text"], f"{where}.text", "empty_prompt" if ours == "user" else "empty_answer")}


def _replies(node: dict, where: str) -> list[dict]:
    """The replies that were not deleted, best first (rank 0 is the best; those without a rank follow)."""
    replies = [] if node.get("replies") is None else node["replies"]
    if not isinstance(replies, list) or any(not isinstance(r, dict) for r in replies):
        raise _wrong_type(f"{where}.replies", replies, "a list of messages")
    return sorted((r for r in replies if r.get("deleted") is not True), key=_rank)


def _rank(node: dict) -> float:
    rank = node.get("rank")
    return rank if isinstance(rank, (int, float)) and not isinstance(rank, bool) and not math.isnan(rank) else math.inf


def oasst(row: dict) -> list[Pair]:
    """OpenAssistant/oasst1 and oasst2 `ready.trees.jsonl`: {"message_tree_id", "prompt": {"text", "role": "prompter", "rank"?,
    "replies": [...]}}. Every two ranked answers to one turn are a pair."""
    _want(row, "prompt")
    pairs, open_turns = [], [(row["prompt"], "prompt", [])]
    common = _common(row, "prompt")
    while open_turns:
        node, where, before = open_turns.pop(0)
        turns = [*before, _node(node, where, "prompter")]
        answers = [(_rank(r), _node(r, "replies", "assistant"), r) for r in _replies(node, where)]
        for (rank, good, _), (other_rank, bad, _) in combinations(answers, 2):
            if rank < other_rank < math.inf and good != bad:
                pairs.append(_pair(turns, good["content"], bad["content"], **common))
        for _, answer, reply in answers:
            open_turns += [(r, "replies", [*turns, answer]) for r in _replies(reply, where)]
    if not pairs:
        raise Skip("no_ranked_answers")
    return pairs


def oasst_demonstrations(row: dict) -> Demonstration:
    """The same trees: from the prompt along the best-ranked replies to the last answer."""
    _want(row, "prompt")
    turns, node, role = [_node(row["prompt"], "prompt", "prompter")], row["prompt"], "prompter"
    while replies := _replies(node, "replies"):
        node, role = replies[0], "assistant" if role == "prompter" else "prompter"
        turns.append(_node(node, "replies", role))
    if len(turns) < 2:
        raise Skip("no_answer")
    return Demonstration(turns if len(turns) % 2 == 0 else turns[:-1], **_common(row, "prompt"))


# -- public prompt sets ----------------------------------------------------------------------------------------------------------------

XSTEST_TYPES = ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "nons_group_real_discr", "real_group_nons_discr",
                "historical_events", "privacy_public", "privacy_fictional", "contrast_homonyms", "contrast_figurative_language",
                "contrast_safe_targets", "contrast_safe_contexts", "contrast_definitions", "contrast_discr", "contrast_historical_events",
                "contrast_privacy")
BOLD_DOMAINS = {  # a domain of BOLD and its groups
    "gender": ("American_actors", "American_actresses"),
    "race": ("Asian_Americans", "African_Americans", "European_Americans", "Hispanic_and_Latino_Americans"),
    "religious_ideology": ("judaism", "christianity", "islam", "hinduism", "buddhism", "sikhism", "atheism"),
    "political_ideology": ("left-wing", "right-wing", "communism", "socialism", "democracy", "liberalism", "populism", "conservatism",
                           "nationalism", "anarchism", "capitalism", "fascism"),
    "profession": ("metalworking_occupations", "sewing_occupations", "healthcare_occupations", "computer_occupations",
                   "film_and_television_occupations", "artistic_occupations", "scientific_occupations", "entertainer_occupations",
                   "dance_occupations", "nursing_specialties", "writing_occupations", "professional_driver_types", "engineering_branches",
                   "mental_health_occupations", "theatre_personnel", "corporate_titles", "industrial_occupations",
                   "railway_industry_occupations"),
}


def _asked(text: str, row: dict, *used: str, safety: bool = False, **meta: str) -> Prompt:
    """A prompt of a public set. `safety` is what the set says of the row. Its `source` column, if any, says where the row once came from:
    that is kept as `origin`, so that results are split by set."""
    kept = {"origin" if k == "source" else k: v for k, v in row.items() if k not in (*used, "safety")}
    return Prompt(_user(text), safety=safety, meta=_common(kept)["meta"] | meta)


def _name(value, column: str) -> str:
    """A category or group: short text."""
    name = _text(value, column, "wrong_type")
    if not _plain(name):
        raise _wrong_type(column, name, "a name of at most 200 characters")
    return name


def xstest(row: dict) -> Prompt:
    """XSTest's xstest_prompts.csv: {"id", "prompt", "type", "label": "safe" | "unsafe", "focus", "note"}. In xstest_v2_prompts.csv there
    is no label, and the types of unsafe prompts begin with "contrast_". A safe prompt only `looks_like` its type; an unsafe one has it
    as `category` and carries the safety tag."""
    _want(row, "prompt", "type")
    text, kind = _text(row["prompt"], "prompt", "empty_prompt"), _name(row["type"], "type")
    if row.get("label") not in (None, ""):
        label = _word(row["label"], "label", ("safe", "unsafe"), "unknown_label")
    else:
        label = "unsafe" if _word(kind, "type", XSTEST_TYPES, "unknown_label").startswith("contrast_") else "safe"
    about = {"category" if label == "unsafe" else "looks_like": kind.removeprefix("contrast_")}
    return _asked(text, row, "prompt", "category", "looks_like", safety=label == "unsafe", label=label, **about)


def strongreject(row: dict) -> Prompt:
    """StrongREJECT's strongreject_dataset.csv: {"category", "source", "forbidden_prompt"}."""
    _want(row, "forbidden_prompt", "category")
    return _asked(_text(row["forbidden_prompt"], "forbidden_prompt", "empty_prompt"), row, "forbidden_prompt", safety=True,
                  category=_name(row["category"], "category"))


def harmbench(row: dict) -> Prompt:
    """HarmBench's harmbench_behaviors_text_*.csv: {"Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString",
    "BehaviorID"}. A context stands before the behaviour, as in its DirectRequest baseline."""
    _want(row, "Behavior", "SemanticCategory")
    parts = [_text(row["ContextString"], "ContextString", None)] if row.get("ContextString") is not None else []
    parts.append(_text(row["Behavior"], "Behavior", "empty_prompt"))
    return _asked("\n\n---\n\n".join(p for p in parts if p), row, "Behavior", "ContextString", "SemanticCategory", safety=True,
                  category=_name(row["SemanticCategory"], "SemanticCategory"))


def advbench(row: dict) -> Prompt:
    """AdvBench's harmful_behaviors.csv: {"goal", "target"}. The target, the beginning of an unsafe answer, is not used."""
    _want(row, "goal", "target")
    _text(row["target"], "target", "empty_answer")
    return _asked(_text(row["goal"], "goal", "empty_prompt"), row, "goal", "target", safety=True)


def do_not_answer(row: dict) -> Prompt:
    """LibrAI/do-not-answer: {"id", "risk_area", "types_of_harm", "specific_harms", "question", ...}. The risk area is the category."""
    _want(row, "question", "risk_area")
    return _asked(_text(row["question"], "question", "empty_prompt"), row, "question", "risk_area", safety=True,
                  category=_name(row["risk_area"], "risk_area"))


def toxigen(row: dict) -> Prompt:
    """ToxiGen in three layouts: toxigen/toxigen-data, name train ({"prompt", "group", "prompt_label": 0 | 1, ...}) and name annotated
    ({"text", "target_group", "toxicity_ai", "toxicity_human", ...}: toxic where the two sum to more than 5.5, as its authors count), and
    toxiGen.json of microsoft/SafeNLP, the revised set that the paper uses ({"text", "target_groups": [...], "label": "hate" | "neutral"}).

    A statement, or a list of them to go on with, about a `group` (several: parted by commas). Toxic ones carry the safety tag. A line
    break is published as backslash and n, or as _x000D_."""
    _want(row)
    column = "text" if "text" in row and "prompt_label" not in row else "prompt"
    _want(row, column)
    if column == "prompt":
        _want(row, "group", "prompt_label")
        groups, toxic = [row["group"]], _one_of(row, "prompt_label", (0, 1)) == 1
    else:
        groups = row["target_groups"] if isinstance(row.get("target_groups"), list) else [row.get("target_group")]
        if row.get("label") not in (None, ""):
            toxic = _word(row["label"], "label", ("hate", "neutral"), "unknown_label") == "hate"
        else:
            _want(row, "toxicity_ai", "toxicity_human")
            toxic = _needed(row["toxicity_ai"], "toxicity_ai") + _needed(row["toxicity_human"], "toxicity_human") > 5.5
    text = row[column].replace("\\n", "\n").replace("_x000D_", "\n") if isinstance(row[column], str) else row[column]
    group = _name(",".join(_name(g, "group") for g in groups), "group")
    return _asked(_text(text, column, "empty_prompt"), row, column, "generation", "target_group", safety=toxic, group=group,
                  label="hate" if toxic else "neutral")


def bold(row: dict) -> Prompt | list[Prompt]:
    """BOLD, beginnings of sentences to go on with: {"domain", "group", "name", "prompt"}, or AlexaAI/bold on the hub ({"domain", "name",
    "category": its group, "prompts": [...]}), or as published, one file a domain: {group: {name: [prompt, ...]}}, which is one row.

    Of a list's prompts the empty ones (five as published) are left out."""
    _want(row)
    if row and all(isinstance(names, dict) for names in row.values()):
        lists = [(_bold_domain(group), group, name, prompts) for group, names in row.items() for name, prompts in names.items()]
    elif "prompts" in row:
        _want(row, "domain", "category", "name")
        lists = [(row["domain"], row["category"], row["name"], row["prompts"])]
    else:
        _want(row, "domain", "group", "name", "prompt")
        names = {column: _name(row[column], column) for column in ("domain", "group", "name")}
        return _asked(_text(row["prompt"], "prompt", "empty_prompt"), row, "prompt", **names)
    items = [item for four in lists for item in _bold_list(*four)]
    if not items:
        raise RowError("empty_prompt", "no list holds a prompt", "some text", "Remove the row or fill it in")
    return items


def _bold_domain(group) -> str:
    return next((domain for domain, groups in BOLD_DOMAINS.items() if group in groups), "unknown")


def _bold_list(domain, group, name, prompts) -> list[Prompt]:
    names = {"domain": _name(domain, "domain"), "group": _name(group, "group"), "name": _name(name, "name")}
    if not isinstance(prompts, list):
        raise _wrong_type(f"{group}.{name}", prompts, "a list of prompts")
    texts = [_text(prompt, f"{group}.{name}[{i}]", None) for i, prompt in enumerate(prompts)]
    return [_asked(text, {}, **names) for text in texts if text]


def truthfulqa(row: dict) -> Prompt:
    """TruthfulQA.csv ({"Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"}) and
    truthfulqa/truthful_qa on the hub, name generation, with the same names in small letters."""
    _want(row)
    row = {key.lower().replace(" ", "_") if isinstance(key, str) else key: value for key, value in row.items()}
    _want(row, "question", "category", "best_answer")
    _text(row["best_answer"], "best_answer", "empty_answer")
    return _asked(_text(row["question"], "question", "empty_prompt"), row, "question", category=_name(row["category"], "category"))


# -- annotations (no data set by themselves: rlhf/annotations.py joins them with their tasks) -------------------------------------------


def annotation(row: dict) -> Annotation:
    """{"id", "choice": "a" | "b", "rating": one of RATINGS, "safety"?: one of SAFETY_BINS, "edited"?: the chosen answer, made better,
    "annotator"?}. A row without a choice is a task that nobody has looked at yet."""
    _want(row, "id", "choice", "rating")
    if row["choice"] is None or row["choice"] == "":
        raise Skip("not_annotated")
    rating = _rating(row["rating"])
    if rating is None:
        raise RowError("unknown_rating", "'rating' is empty", f"one of {', '.join(RATINGS)}")
    given = {k: _text(row[k], k, None) for k in ("edited", "annotator") if row.get(k) is not None}
    bin_ = row.get("safety")
    return Annotation(_text(row["id"], "id", "unknown_task"), _word(row["choice"], "choice", ("a", "b"), "unknown_choice"), rating,
                      safety=_word(bin_, "safety", SAFETY_BINS, "unknown_safety_bin") if bin_ not in (None, "") else None, **given)


FORMATS: dict[str, Format] = {
    "messages": Format("demonstration", messages, ("messages",)),
    "prompt_completion": Format("demonstration", prompt_completion, ("prompt", "completion")),
    "alpaca": Format("demonstration", alpaca, ("instruction", "output")),
    "sharegpt": Format("demonstration", sharegpt, ("conversations",)),
    "preference": Format("pair", preference, ("prompt", "chosen", "rejected")),
    "alpaca_pairs": Format("pair", alpaca_pairs, ("instruction", "chosen", "rejected")),
    "sharegpt_pairs": Format("pair", sharegpt_pairs, ("conversations", "chosen", "rejected")),
    "hh": Format("pair", hh, ("chosen", "rejected")),
    "prompt": Format("prompt", prompt, ("prompt",)),
    "safe_rlhf": Format("pair", safe_rlhf, ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "safer_response_id")),
    "safe_rlhf_helpful": Format("pair", safe_rlhf_helpful, ("prompt", "response_0", "response_1", "better_response_id")),
    "ultrafeedback": Format("pair", ultrafeedback, ("instruction", "completions")),
    "ultrafeedback_binarized": Format("pair", ultrafeedback_binarized, ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")),
    "helpsteer2": Format("pair", helpsteer2, ("prompt", "response_1", "response_2", "preference_strength")),
    "helpsteer3": Format("pair", helpsteer3, ("context", "response1", "response2", "overall_preference")),
    "shp": Format("pair", shp, ("history", "human_ref_A", "human_ref_B", "labels")),
    "webgpt": Format("pair", webgpt, ("question", "answer_0", "answer_1", "score_0", "score_1")),
    "summarize": Format("pair", summarize, ("info", "summaries", "choice")),
    "stack_exchange_paired": Format("pair", stack_exchange_paired, ("question", "response_j", "response_k")),
    "synthetic_gptj": Format("pair", synthetic_gptj, ("prompt", "chosen", "rejected")),
    "oasst": Format("pair", oasst, ("message_tree_id", "prompt")),
    "oasst_demonstrations": Format("demonstration", oasst_demonstrations, ("message_tree_id", "prompt")),
    "xstest": Format("prompt", xstest, ("prompt", "type", "focus", "note")),
    "strongreject": Format("prompt", strongreject, ("category", "forbidden_prompt")),
    "harmbench": Format("prompt", harmbench, ("Behavior", "SemanticCategory")),
    "advbench": Format("prompt", advbench, ("goal", "target")),
    "do_not_answer": Format("prompt", do_not_answer, ("risk_area", "question")),
    "toxigen": Format("prompt", toxigen, ("prompt", "group", "prompt_label")),
    "bold": Format("prompt", bold, ("domain", "group", "name", "prompt")),
    "truthfulqa": Format("prompt", truthfulqa, ("Category", "Question", "Best Answer")),
}
