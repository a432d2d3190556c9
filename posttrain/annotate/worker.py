"""The process that answers: it takes what waits in the store, samples or asks an endpoint, and puts the answers there. The page stays quick, and
what is written outlives both.

A fault (memory that runs out, an exception of the model's) costs the prompts of that attempt a wait, then each is tried alone; after ATTEMPTS
attempts a prompt is marked as failed with the reason, and the others are answered. An attempt is counted before it begins: one that ends this
process counts too.

Run as a module with one line of JSON on standard input ({"db", "variants", "name"}); every further line says that something new may wait.
Standard input ends with the page's process, and this one with it.
"""

import gc
import json
import os
import re
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from posttrain.annotate.command import READY
from posttrain.annotate.models import Variant, judge_config
from posttrain.annotate.store import Store, answers, attempts, now, pack, unpack
from posttrain.chunks import derive_seed
from posttrain.config import ModelConfig
from posttrain.errors import PosttrainError
from posttrain.log import say

ATTEMPTS = 3  # of a prompt, until it is marked as failed
BACKOFF = 2.0  # seconds before the second attempt; four times as many before the third
HOLD = 600.0  # seconds for which another page's process on the same store leaves a prompt to this one
DRAWS = 4  # of both answers, until they can be compared
AT_ONCE = 8  # prompts
LONGEST = 4096  # tokens of a prompt
PATIENCE = 5.0  # seconds between two looks where nobody says that something waits
MEMORY = re.compile("out of memory|n't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
NO_MEMORY = ("the memory ran out while the model wrote it. Whoever runs the page can begin it again with a smaller --max-new-tokens, a smaller or "
             "quantized model, or an endpoint (--model URL#MODEL); a shorter conversation needs less, too")
ENDED = f"the process that answers ended while it was at this, {ATTEMPTS} times; its last messages are in the terminal of the page"


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
    def __init__(self, store: Store, variants: list[Variant], name: str = ""):
        """name: the same when the process is begun again; another one for another page's process on the same store."""
        self.store, self.variants, self.name = store, variants, name
        local = None if all(v.url for v in variants) else Local(variants)
        self.sources = [Remote(v) if v.url else local for v in variants]
        with store.write() as c:  # what it was at when it ended
            c.execute(update(attempts).where(attempts.c.worker == name).values(after=now() + BACKOFF))

    def step(self) -> int:
        """Answer what waits longest, urgent prompts first. Returns how many prompts were taken. Raises where the accelerator can't be used any
        more in this process, and where the store can't."""
        rows = self._due()
        if rows and rows[0]["begun"] >= ATTEMPTS:
            self._put(rows, {r["key"]: ENDED for r in rows}, {})
        elif rows:
            self._count(rows)
            try:
                drawn, fault = self._draw(rows), None
            except Exception as e:
                if not isinstance(e, PosttrainError) and reason(e) != NO_MEMORY:
                    traceback.print_exc()
                drawn, fault = {}, e.with_traceback(None)  # its frames hold tensors
            if fault is None:
                self._put(rows, {r["key"]: problem(drawn[r["key"]]) for r in rows}, drawn)
            else:
                self._missed(rows, fault)
        return len(rows)

    def _due(self) -> list[dict]:
        """The prompts of the next attempt, with the number of those that were `begun`: several new ones, or one alone that an attempt failed."""
        begun = func.coalesce(attempts.c.begun, 0).label("begun")
        with self.store.read() as c:
            rows = [dict(r) for r in c.execute(
                select(answers, begun).outerjoin(attempts, attempts.c.key == answers.c.key)
                .where(answers.c.state == "waiting", or_(attempts.c.after.is_(None), attempts.c.after <= now()))
                .order_by(answers.c.urgent.desc(), begun, answers.c.asked).limit(AT_ONCE)).mappings()]
        rows = [r for r in rows if r["urgent"]] or rows[:2]  # few of those that nobody waits for, so that somebody who comes waits little
        return [r for r in rows if not r["begun"]] or rows[:1]

    def _count(self, rows: list[dict]) -> None:
        with self.store.write() as c:
            for r in rows:
                r["begun"] += 1
                row = {"begun": r["begun"], "after": now() + HOLD, "worker": self.name}
                if not c.execute(update(attempts).where(attempts.c.key == r["key"]).values(**row)).rowcount:
                    c.execute(insert(attempts).values(key=r["key"], **row))

    def _missed(self, rows: list[dict], fault: Exception) -> None:
        why = reason(fault)
        over = [r for r in rows if r["begun"] >= ATTEMPTS]
        self._put(over, {r["key"]: why for r in over}, {})
        with self.store.write() as c:
            for r in rows:
                c.execute(update(attempts).where(attempts.c.key == r["key"]).values(after=now() + wait(r["begun"])))
        again = len(rows) - len(over)
        then = f"asked again {'one at a time ' if again > 1 else ''}in {wait(rows[0]['begun']):g} s" if again else "marked as failed"
        say(f"note: {len(rows)} prompt{'s' * (len(rows) > 1)} without an answer: {why}; {then}")
        free_memory()
        if type(fault).__name__ == "AcceleratorError" and why != NO_MEMORY:
            raise fault

    def _put(self, rows: list[dict], why: dict[str, str | None], drawn: dict[str, list]) -> None:
        """Store the answers, or why there are none."""
        with self.store.write() as c:
            for r in rows:
                said = None if why[r["key"]] else pack([{"text": text, "model": v.name} for v, text in drawn[r["key"]]])
                c.execute(update(answers).where(answers.c.key == r["key"], answers.c.state == "waiting").values(
                    state="failed" if why[r["key"]] else "ready", error=why[r["key"]], answers=said, tries=r["tries"] + 1))
                c.execute(delete(attempts).where(attempts.c.key == r["key"]))

    def _draw(self, rows: list[dict]) -> dict[str, list]:
        """(variant, text or Fault) of every prompt, by its key."""
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
        return drawn

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


def wait(begun: int) -> float:
    """Seconds until a prompt's next attempt."""
    return BACKOFF * 4 ** (begun - 1)


def reason(fault: Exception) -> str:
    """Why an attempt brought no answer, in words for the page."""
    if isinstance(fault, MemoryError) or MEMORY.search(str(fault)):
        return NO_MEMORY
    words = fault.found if isinstance(fault, PosttrainError) else f"{type(fault).__name__}: {fault}"
    return f"the model could not answer ({' '.join(words.split())[:300]})"


def free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")  # an endpoint needs none
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    order = json.loads(sys.stdin.readline())
    wake = threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            wake.set()
        os._exit(0)  # the page is gone

    threading.Thread(target=listen, daemon=True).start()
    store = Store(order["db"], make=False)
    worker = Worker(store, [Variant(**v) for v in order["variants"]], order["name"])
    print(READY, flush=True)
    while True:
        wake.clear()
        try:
            if not worker.step():
                wake.wait(PATIENCE)
        except SQLAlchemyError as e:
            say(f"error: {store.place}: {getattr(e, 'orig', None) or e}; looking again in {PATIENCE:g} s")
            wake.wait(PATIENCE)


if __name__ == "__main__":
    from posttrain.__main__ import guarded

    guarded(main)
