"""One or several versions in memory that answer token by token, by the loop that the stages sample with (generate.py)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from threading import Event

import torch

from posttrain import chat, models
from posttrain.errors import PosttrainError
from posttrain.generate import Loop, Sampling
from posttrain.versions import Version


@dataclass(frozen=True)
class Answer:
    """why: 'end' (the model ended its turn), 'length' (cut off), 'stopped' (by the reader)."""

    text: str
    why: str


class _Stopped(Exception):
    pass


class Speaker:
    """Versions of one base share its weights."""

    def __init__(self, versions: list[Version]):
        models.set_threads(None)
        self.versions, self._roles = versions, []
        shared: dict[str, models.Roles] = {}
        for i, version in enumerate(versions):
            key = version.config.model_dump_json(exclude={"chat_template", "lora"})
            if key not in shared:
                dtype = getattr(torch, models.choose_dtype(version.config))
                shared[key] = models.Roles(version.config, dtype, version.name, tokenizer_of(version))
            shared[key].add(f"version_{i}", version.folder)
            self._roles.append(shared[key])

    def answer(self, which: int, messages: list[dict], sampling: Sampling, seed: int | None = None, heard: Callable[[str], None] = lambda _: None,
               stop: Event | None = None) -> Answer:
        """An answer to a dialogue that ends with the user's turn. heard(text): what came since the last call; stop: set from outside to end here.
        Raises PosttrainError where the dialogue cannot be answered."""
        roles, end = self._roles[which], chat.end_of_turn(self._roles[which].tokenizer)
        try:
            prompt = chat.encode_prompt(roles.tokenizer, messages)
        except PosttrainError as e:
            raise PosttrainError("the conversation", e.found, e.expected, "Take that turn back, or write it differently.") from None
        room = self._context(which) - len(prompt)
        if room < 1:
            raise PosttrainError("the conversation", f"has {len(prompt):,} tokens", f"fewer than {self._context(which):,}, what the model reads",
                                 "Begin a new one.")
        shown = ""

        def tick(_) -> None:
            nonlocal shown
            if stop is not None and stop.is_set():
                raise _Stopped
            text = whole(roles.tokenizer, loop.ids[0][0])
            if text.startswith(shown) and text != shown:
                heard(text[len(shown):])
                shown = text

        sampling = Sampling(min(sampling.max_new_tokens, room), sampling.temperature, sampling.top_p)
        seed = int.from_bytes(os.urandom(6), "big") if seed is None else seed
        with torch.inference_mode():
            loop = Loop(roles, f"version_{which}", [prompt], 1, sampling, seed, end, 1, tick, range(1))
            try:
                completion = loop.run()[0][0]
            except _Stopped:
                return Answer(chat.decode(roles.tokenizer, loop.ids[0][0]), "stopped")
        text = chat.decode(roles.tokenizer, completion.ids)
        if text.startswith(shown) and text != shown:
            heard(text[len(shown):])
        return Answer(text, "end" if completion.finished else "length")

    def _context(self, which: int) -> int:
        """Tokens that a version reads at most."""
        config = self._roles[which][f"version_{which}"].net.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or 1 << 20


def tokenizer_of(version: Version):
    """The tokenizer of training where the version's folder has it, else its base's with the configuration's template."""
    try:
        if version.folder is None:
            return models.load_tokenizer(version.config, version.name)
        score = import_module("reward.score_command")
        return score.load_tokenizer(score.Model(version.folder, version.config))
    except PosttrainError as e:
        if "no chat template" not in e.found:
            raise
        raise PosttrainError(version.name, e.found, "the template that the model was trained with",
                             f"Give one with --chat-template: {', '.join(chat.template_names())}, or a .jinja file.") from None


def whole(tokenizer, ids: list[int]) -> str:
    """Their text up to the last whole character: one may take several tokens."""
    return chat.decode(tokenizer, ids).rstrip("\N{REPLACEMENT CHARACTER}")
