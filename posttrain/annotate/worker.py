"""The process that answers: it takes what waits in the store, samples or asks an endpoint, and puts the answers there. The page stays quick, and
what is written outlives both.

Run as a module with one line of JSON on standard input ({"db", "variants"}); every further line says that something new may wait. Standard input
ends with the page's process, and this one with it.
"""

import json
import os
import sys
import threading
from importlib import import_module
from pathlib import Path

from sqlalchemy import select, update

from posttrain.annotate.command import READY
from posttrain.annotate.models import Variant, judge_config
from posttrain.annotate.store import Store, answers, pack, unpack
from posttrain.chunks import derive_seed
from posttrain.config import ModelConfig
from posttrain.errors import PosttrainError
from posttrain.log import say

DRAWS = 4  # of both answers, until they can be compared
AT_ONCE = 8  # prompts
LONGEST = 4096  # tokens of a prompt
PATIENCE = 5.0  # seconds between two looks where nobody says that something waits


class Fault(Exception):
    """Why a prompt has no answer, in words for the person who waits."""


class Local:
    """Models sampled here. Those of one base share its weights."""

    def __init__(self, variants: list[Variant]):
        import torch

        from posttrain import models

        models.set_threads(None)
        score = import_module("reward.score_command")
        self.roles, self.role = {}, {}
        shared: dict[str, object] = {}
        for i, v in enumerate(variants):
            if v.url:
                continue
            config = ModelConfig(**v.config)
            key = pack(v.config)
            if key not in shared:
                tokenizer = score.load_tokenizer(score.Model(Path(v.folder), config)) if v.folder else None
                shared[key] = models.Roles(config, getattr(torch, models.choose_dtype(config, full=True)), f"--model {v.name}", tokenizer)
            self.roles[v.name], self.role[v.name] = shared[key], f"variant_{i}"
            shared[key].add(f"variant_{i}", v.folder)

    def draw(self, v: Variant, prompts: list[list[dict]], seed: int) -> list[str | Fault]:
        """An answer to every prompt; a Fault where there is none that a reward model could learn from."""
        from posttrain import chat
        from posttrain.generate import Sampling, sample

        roles, out, ids = self.roles[v.name], {}, {}
        for i, prompt in enumerate(prompts):
            try:
                ids[i] = chat.encode_prompt(roles.tokenizer, prompt)
                if len(ids[i]) > LONGEST:
                    out[i] = Fault(f"the conversation is too long ({len(ids[i]):,} tokens)")
            except PosttrainError as e:
                out[i] = Fault(f"{e.found}")
        todo = [i for i in ids if i not in out]
        if todo:
            drawn = sample(roles, self.role[v.name], [ids[i] for i in todo], 1, Sampling(v.max_new_tokens, v.temperature), seed,
                           stop=chat.end_of_turn(roles.tokenizer), batch=AT_ONCE)
            for i, (completion,) in zip(todo, drawn, strict=True):
                text = chat.decode(roles.tokenizer, completion.ids)
                good = text and completion.finished and not chat.spelled_token(roles.tokenizer, text)
                out[i] = text if good else Fault("the model's answer was cut off" if not completion.finished else "the model gave no usable answer")
        return [out[i] for i in range(len(prompts))]


class Remote:
    """A model behind an endpoint, asked for one answer at a time."""

    def __init__(self, v: Variant):
        module = import_module("safety.endpoint")
        self.module, self.endpoint = module, module.Endpoint(judge_config(v.url, v.model, v.api_key_env), say)
        self.endpoint.place = f"the model at {v.url}"

    def draw(self, v: Variant, prompts: list[list[dict]], seed: int) -> list[str | Fault]:
        out: list[str | Fault] = []
        for prompt in prompts:
            try:
                text = self.endpoint.reply(prompt, v.temperature).strip()
                out.append(text or Fault("the model gave no answer"))
            except (self.module.Fault, self.module.Refused) as e:
                out.append(Fault(f"the endpoint says: {e}"))
        return out


class Worker:
    def __init__(self, store: Store, variants: list[Variant]):
        self.store, self.variants = store, variants
        local = None if all(v.url for v in variants) else Local(variants)
        self.sources = [Remote(v) if v.url else local for v in variants]

    def step(self) -> int:
        """Answer what waits longest, urgent prompts first. Returns how many prompts were taken."""
        with self.store.read() as c:
            rows = c.execute(select(answers).where(answers.c.state == "waiting").order_by(answers.c.urgent.desc(), answers.c.asked)
                             .limit(AT_ONCE)).mappings().all()
        rows = [r for r in rows if r["urgent"]] or rows[:2]  # few of those that nobody waits for, so that somebody who comes waits little
        if rows:
            self._answer([dict(r) for r in rows])
        return len(rows)

    def _answer(self, rows: list[dict]) -> None:
        drawn: dict[str, list] = {}
        for attempt in range(DRAWS):
            todo = [r for r in rows if r["key"] not in drawn or problem(drawn[r["key"]])]
            if not todo:
                break
            for r in todo:
                drawn[r["key"]] = []
            for i, v in enumerate(self.variants):
                mine = [r for r in todo if r["wanted"] == 2 or self.variant_of(r) == i]
                if mine:
                    seed = derive_seed(mine[0]["key"], mine[0]["tries"], attempt, i)
                    for r, text in zip(mine, self.sources[i].draw(v, [unpack(r["messages"]) for r in mine], seed), strict=True):
                        drawn[r["key"]].append((v, text))
            lasting = [r["key"] for r in todo if attempt == 0 and any(isinstance(t, Fault) and "endpoint" in str(t) for _, t in drawn[r["key"]])]
            if len(lasting) == len(todo):  # the endpoint's own retries are over
                break
        with self.store.write() as c:
            for r in rows:
                why = problem(drawn[r["key"]])
                said = None if why else pack([{"text": text, "model": v.name} for v, text in drawn[r["key"]]])
                c.execute(update(answers).where(answers.c.key == r["key"], answers.c.state == "waiting").values(
                    state="failed" if why else "ready", error=why, answers=said, tries=r["tries"] + 1))

    @staticmethod
    def variant_of(row: dict) -> int:
        """Which variant a red team's dialogue talks to: the same one in every turn."""
        users = [m["content"] for m in unpack(row["messages"]) if m["role"] == "user"]
        return sum(users[0].encode()) & 1


def problem(drawn: list[tuple[Variant, "str | Fault"]]) -> str | None:
    """Why answers make no task."""
    faults = [str(t) for _, t in drawn if isinstance(t, Fault)]
    if faults:
        return faults[0]
    return "both answers are the same" if len(drawn) == 2 and drawn[0][1] == drawn[1][1] else None


def main() -> None:
    order = json.loads(sys.stdin.readline())
    wake = threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            wake.set()
        os._exit(0)  # the page is gone

    threading.Thread(target=listen, daemon=True).start()
    store = Store(order["db"], make=False)
    worker = Worker(store, [Variant(**v) for v in order["variants"]])
    print(READY, flush=True)
    while True:
        wake.clear()
        try:
            if not worker.step():
                wake.wait(PATIENCE)
        except PosttrainError as e:
            say(f"error: {e}")
            wake.wait(PATIENCE)


if __name__ == "__main__":
    from posttrain.__main__ import guarded

    guarded(main)
