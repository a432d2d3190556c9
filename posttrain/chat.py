"""The chat-template boundary: text <-> token ids and loss masks. The only caller of apply_chat_template.

An answer's ids are the same wherever it goes (fine-tuning, reward training, scoring, PPO): the prompt as rendered with
add_generation_prompt, the answer, the token that ends the turn, nothing after.
"""

import re
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateError

from posttrain.errors import PosttrainError

TEMPLATES = Path(__file__).parent / "templates"
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def template_names() -> list[str]:
    return sorted(p.stem for p in TEMPLATES.glob("*.jinja"))


def load_template(name: str, place: str = "model.chat_template") -> str:
    """The text of a shipped template, or of a .jinja file the recipe names."""
    path = TEMPLATES / f"{name}.jinja"
    path = path if path.exists() else Path(name)
    if path.suffix != ".jinja" or not path.is_file():
        raise PosttrainError(place, f"no chat template '{name}'", f"one of {', '.join(template_names())}, or a .jinja file",
                             "Name one of these.")
    return path.read_text(encoding="utf-8")


def turn_tokens(name: str) -> list[str]:
    """The strings of a shipped template that must be single tokens of the vocabulary (its first line lists them)."""
    return _header(name)[0].split()


def untrained(name: str) -> bool:
    """Whether base models have a shipped template's turn tokens in their vocabulary, but never learnt them (its first line says so)."""
    return "untrained" in _header(name)[1]


def _header(name: str) -> list[str]:
    """[the turn tokens, what is said about them] of a template's first line."""
    found = re.match(r"\{#-? turn tokens:([^;]*?)(?:;(.*?))?-?#\}", load_template(name))
    return [found[1], found[2] or ""] if found else ["", ""]


def prepare(tokenizer, template: str | None, place: str, add_tokens: bool = False) -> list[str]:
    """Give the tokenizer the named template (or keep its own), a pad token that never ends an answer, and check both.

    Returns the turn tokens whose rows of the vocabulary are new (empty unless add_tokens): those that were added, and those of a template
    whose tokens base models never learnt. Raises PosttrainError when there is no template, or when one of its turn tokens is not a single
    token and add_tokens is off.
    """
    added = []
    if template:
        tokenizer.chat_template = load_template(template, place)
        wanted = turn_tokens(template) if (TEMPLATES / f"{template}.jinja").exists() else []
        missing = [t for t in wanted if len(tokenizer.encode(t, add_special_tokens=False)) != 1]
        if missing and not add_tokens:
            usable = [n for n in template_names() if all(len(tokenizer.encode(t, add_special_tokens=False)) == 1 for t in turn_tokens(n))]
            raise PosttrainError(place, f"the turn tokens {', '.join(missing)} of '{template}' are not single tokens of this vocabulary",
                                 "a template whose turn tokens exist" + (f": {', '.join(usable)}" if usable else ""),
                                 "Name another template, or set model.add_tokens: true to add and train them.")
        if missing:
            tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        if add_tokens:
            added = wanted if wanted and untrained(template) else missing
    if not tokenizer.chat_template:
        raise PosttrainError(place, "the tokenizer has no chat template", "a template",
                             f"Set model.chat_template to one of {', '.join(template_names())}.")
    _space_after_special(tokenizer)
    end = end_of_turn(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (end, tokenizer.eos_token_id):
        tokenizer.pad_token = _spare_token(tokenizer, end, place)
    return added


def _space_after_special(tokenizer) -> None:
    """Meta encodes every turn of the Llama 2 format by itself, so sentencepiece puts its space before each [INST]; transformers'
    LlamaTokenizer does so after a special token only with `legacy`, which is set here and saved with the tokenizer."""
    metaspace = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if "<<SYS>>" in tokenizer.chat_template and type(metaspace).__name__ == "Metaspace" and metaspace.prepend_scheme != "never":
        metaspace.prepend_scheme = "always"
        tokenizer.backend_tokenizer.pre_tokenizer = metaspace
        tokenizer.legacy = tokenizer.init_kwargs["legacy"] = True


def _spare_token(tokenizer, end: int, place: str) -> str:
    """A token that exists and never stands in text: pad-like names first, then unk, then any special one; last the tokenizer's own
    end token, where the template ends turns with another."""
    names = [t for t in tokenizer.get_vocab() if t.strip("<|>[]_").lower() in ("pad", "padding", "finetune_right_pad_id", "endoftext")]
    names += [tokenizer.unk_token] if tokenizer.unk_token else []
    names += [*tokenizer.all_special_tokens, *(str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values())]
    written = {None, end, *_written(tokenizer, tokenizer.chat_template)}
    for name in [n for n in names if n not in (tokenizer.bos_token, tokenizer.eos_token)] + [tokenizer.eos_token]:
        if name and tokenizer.convert_tokens_to_ids(name) not in written:
            return name
    raise PosttrainError(place, "no token can serve as padding", "a special token besides the one that ends a turn",
                         "Add a pad token to the tokenizer.")


def _render(tokenizer, messages: list[dict], generation: bool) -> tuple[str, list[int]]:
    """Raises PosttrainError where the template refuses the messages, or where their text spells a token of the format."""
    for message in messages:
        found = spelled_token(tokenizer, message["content"])
        if found:
            turn = "an assistant turn" if message["role"] == "assistant" else f"a {message['role']} turn"
            raise PosttrainError("chat template", f"{turn} spells the token {found!r}: {message['content'][:60]!r}",
                                 "text that cannot be taken for the end or start of a turn", "Remove or rewrite this row.")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except TemplateError as e:
        raise PosttrainError("chat template", f"it refuses the turns {' '.join(m['role'] for m in messages)} ({e})",
                             "user and assistant in turn, after an optional system text", "Correct the row, or name another template.") from None
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def spelled_token(tokenizer, text: str) -> str | None:
    """The first token of the dialogue's format that a text spells out, if any: such a text can't be a turn."""
    found = _format_tokens(tokenizer, tokenizer.chat_template, tokenizer.pad_token).search(text)
    return found and found[0]


def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a dialogue that ends with the user's turn, ready for an answer."""
    return _render(tokenizer, messages, True)[1]


def encode_answer(tokenizer, messages: list[dict], answer: str) -> list[int]:
    """Token ids that follow `encode_prompt(messages)`: the answer and the token that ends the turn."""
    text, prompt = _render(tokenizer, messages, True)
    full_text, full = _render(tokenizer, [*messages, {"role": "assistant", "content": answer}], False)
    if full[:len(prompt)] == prompt:
        rest = full[len(prompt):]
    elif full_text.startswith(text):  # a merge across the boundary: keep the prompt as the sampler sees it
        rest = tokenizer(full_text[len(text):], add_special_tokens=False)["input_ids"]
    else:
        raise PosttrainError("chat template", "an answer does not continue the rendered prompt",
                             "a template that only appends when an answer is added", "Name another with model.chat_template.")
    end = end_of_turn(tokenizer)
    if end not in rest:
        raise PosttrainError("chat template", "an answer without the token that ends a turn", f"token {end} after every answer",
                             "Name another template with model.chat_template.")
    return rest[:len(rest) - rest[::-1].index(end)]


def encode_dialogue(tokenizer, messages: list[dict], loss: str = "all") -> tuple[list[int], list[bool]]:
    """Ids and loss mask of a demonstration: True on the tokens of every assistant turn and its end token.

    loss='last' counts the last assistant turn alone. Prompts, system text and template tokens never count.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    ids, mask = [], []
    for i in turns if loss == "all" else turns[-1:]:
        prompt = encode_prompt(tokenizer, messages[:i])
        if prompt[:len(ids)] != ids:  # the template rewrote what came before: count only what still stands
            raise PosttrainError("chat template", "a later turn changes how earlier ones are rendered",
                                 "a template that only appends", "Set loss: last in the data, or name another template.")
        mask += [False] * (len(prompt) - len(ids))
        answer = encode_answer(tokenizer, messages[:i], messages[i]["content"])
        ids = prompt + answer
        mask += [True] * len(answer)
    return ids, mask


def end_of_turn(tokenizer) -> int:
    """Id of the token that ends an assistant turn: the last special token the template puts after an answer."""
    return _end_of_turn(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=32)
def _end_of_turn(tokenizer, template: str) -> int:
    try:
        text, _ = _render(tokenizer, PROBE[:1], True)
        full, _ = _render(tokenizer, PROBE, False)
    except Exception as e:
        raise PosttrainError("chat template", f"cannot render a user and an assistant turn ({e})", "a chat template",
                             f"Set model.chat_template to one of {', '.join(template_names())}.") from None
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ends = [i for i in tokenizer(full[len(text):], add_special_tokens=False)["input_ids"] if i in special]
    if not ends:
        raise PosttrainError("chat template", "no special token ends an answer", "an end-of-turn token that is one token of the vocabulary",
                             "Name another template with model.chat_template.")
    return ends[-1]


@lru_cache(maxsize=32)
def _written(tokenizer, template: str) -> frozenset[int]:
    """The special tokens that a template writes."""
    ids = tokenizer(tokenizer.apply_chat_template(PROBE, tokenize=False), add_special_tokens=False)["input_ids"]
    return frozenset({*ids} & {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})})


@lru_cache(maxsize=32)
def _format_tokens(tokenizer, template: str, pad: str | None) -> re.Pattern:
    """The special tokens that shape a dialogue: those the template writes, and those that begin, end or pad a sequence."""
    names = {tokenizer.convert_ids_to_tokens(i) for i in _written(tokenizer, template)} | {tokenizer.bos_token, tokenizer.eos_token, pad}
    return re.compile("|".join(re.escape(n) for n in sorted(names - {None, ""})) or r"(?!)")


def decode(tokenizer, ids: list[int]) -> str:
    """Text of an answer's ids, without its end token."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def coloured(tokenizer, ids: list[int], mask: list[bool]) -> str:
    """The sequence as text with [[...]] around the counted tokens, for a look at the data."""
    out, on = [], False
    for token, count in zip(ids, mask, strict=True):
        if count != on:
            out.append("[[" if count else "]]")
            on = count
        out.append(tokenizer.decode([token]))
    return "".join(out) + ("]]" if on else "")
