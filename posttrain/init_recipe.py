"""The recipe that `init` writes: its sections from what was decided, and the numbers that fit memory, by the plan.

`Choice` is what was decided from answers and data, `Numbers` what memory decides; `render` makes the text of both, `choose` finds the numbers.
"""

import json
import math
import os
import re
import tempfile
import textwrap
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain import config as cfg
from posttrain import doctor, plan
from posttrain.errors import PosttrainError

TUNINGS = ("full", "lora", "qlora")
LORA = {"r": 16, "alpha": 32}
SMALL = 1e9  # parameters under which adapters learn at the demo's rates (docs/LOG.md)
YAML_WORDS = ("on", "off", "yes", "no", "true", "false", "null", "y", "n")  # that are no text without quotes
# Seconds of a section over those of 2 x parameters x tokens of the plan at the speed of a plain matrix product. On a CPU: the demo's measured run.
# On a GPU: 35 % of that speed, twice as many products in training with adapters and three times with all weights, and 30 ms a decoding step at
# least. No GPU has been timed yet.
WORK = {"sft": 2.0, "reward": 2.0, "rejection": 0.45, "evaluate": 0.45, "ppo": 1.1}
GPU_EFFICIENCY, STEP_SECONDS, SECTION_SECONDS = 0.35, 0.03, 15
TYPICAL_CARD = {24: 70e12, 48: 150e12, math.inf: 300e12}  # matrix products a second of a card of at most so many GB, where none is here to be timed


@dataclass(frozen=True)
class Source:
    """A data file as the recipe will name it."""

    path: Path
    format: str
    columns: dict[str, str] = field(default_factory=dict)
    safety_prompt: bool = False
    drop: bool = False

    def entry(self, folder: Path) -> dict:
        """The data entry; its path counts from the recipe's folder where the file lies in it or in the working directory."""
        path, home = self.path.absolute(), folder.absolute()
        near = path.is_relative_to(home) or (path.is_relative_to(Path.cwd()) and home.is_relative_to(Path.cwd()))
        out = {"path": os.path.relpath(path, home) if near else str(path), "format": self.format}
        return out | ({"columns": self.columns} if self.columns else {}) | ({"bad_rows": "drop"} if self.drop else {}) | (
            {"safety_prompt": True} if self.safety_prompt else {})


@dataclass(frozen=True)
class Text:
    """How dialogues become tokens. tokenizer None: it is not here, and words are counted. chats: it came with a template of its own."""

    tokenizer: object
    template: str | None
    add_tokens: bool
    why: str
    chats: bool = False


@dataclass(frozen=True)
class Numbers:
    """What is chosen by memory. train_tokens and ppo_tokens: of a micro-batch, None on a CPU (decided there at the first start)."""

    tuning: str
    max_length: int
    prompt_tokens: int
    new_tokens: int
    decoded: int  # samples decoded side by side
    train_tokens: int | None = None
    ppo_tokens: int | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Choice:
    """All that was decided but for memory. sets: the data section; counts: usable rows of each. notes: why, as comments."""

    name: str
    model: str
    machine: str
    cpu: bool
    float32: bool
    small: bool
    text: Text
    sets: dict[str, list[Source]]
    counts: dict[str, int]
    held_out: dict[str, int]
    labels: bool  # safety labels for the safety loss
    notes: dict[str, str]

    @property
    def two(self) -> bool:
        """Two reward models: two sets of pairs, or one whose safety labels make the second one another model."""
        return {"helpful", "safety"} <= {*self.sets} or self.labels


# -- the sections -----------------------------------------------------------------------------------------------------------------------


def up(value: float, step: int) -> int:
    return max(step, math.ceil(value / step) * step)


def own_share(own: int, other: int, least: float) -> float:
    """The paper's share of the own pairs, raised where it would leave out own ones because the others are few."""
    return max(least, math.ceil(100 * own / (own + other)) / 100)


def model_section(c: Choice, n: Numbers) -> dict:
    out = {"name_or_path": c.model} | ({"quantization": "nf4"} if n.tuning == "qlora" else {}) | ({"dtype": "float32"} if c.float32 else {})
    out |= {"lora": LORA} if n.tuning != "full" else {}
    return out | ({"chat_template": c.text.template} if c.text.template else {}) | ({"add_tokens": True} if c.text.add_tokens else {})


def reward_sections(c: Choice, training: dict, policy: str) -> dict[str, dict]:
    both = {"stage": "reward", "model": policy}
    rest = training | {"on_too_long": "drop"} | ({"learning_rate": 3e-4} if c.small else {})  # of many rows only some were measured
    one = next(name for name in ("pairs", "helpful", "safety") if name in c.sets)
    safety_loss = {"safety_loss_weight": 1.0} if c.labels else {}
    if "helpful" in c.sets and "safety" in c.sets:
        h, s = c.counts["helpful"], c.counts["safety"]
        return {"reward_helpfulness": both | {"own": "helpful", "other": "safety", "own_share": own_share(h, s, 0.5)} | rest,
                "reward_safety": both | {"own": "safety", "other": "helpful", "own_share": own_share(s, h, 0.9)} | safety_loss | rest}
    if c.two:
        return {"reward_helpfulness": both | {"own": one} | rest, "reward_safety": both | {"own": one} | safety_loss | rest}
    return {"reward": both | {"own": one} | rest}


def sections(c: Choice, n: Numbers) -> dict[str, dict]:
    """The whole road for these answers."""
    training = {"max_length": n.max_length} | ({"micro_batch_tokens": n.train_tokens} if n.train_tokens else {}) | (
        {"activation_checkpointing": True} if n.checkpointing else {})
    tuning = training | ({"packing": False} if c.cpu else {})
    demonstrations = ["demonstrations"] if "demonstrations" in c.sets else []
    policy = "@sft" if demonstrations else "base"
    rewards = reward_sections(c, training, policy)
    first, last = f"@{next(iter(rewards))}", f"@{list(rewards)[-1]}"
    sampling = {"prompts": "prompts", "helpfulness": first, "safety": last, "max_prompt_tokens": n.prompt_tokens, "max_new_tokens": n.new_tokens,
                "batch": n.decoded}
    scores = ({"standardize_rewards": True} if c.two else {}) | ({"safety_threshold": "auto"} if c.labels else {})
    left = c.counts["prompts"] - c.held_out["prompts"]
    rows, k, batch, most = (64, 8, 32, 10) if c.cpu else (2000, 16, 128, 50)
    ppo = {"policy": "@v1", **sampling, **scores, "iterations": max(2, min(most, math.ceil(8 * left / batch))), "batch_size": batch,
           "mini_batch_size": batch // 4, "eval_prompts": max(2, min(64 if not c.cpu else 24, left // 4)), "unfinished_score": 0.0}
    ppo |= {"learning_rate": 2e-4, "critic_learning_rate": 2e-4} if c.small and n.tuning != "full" else {}
    ppo |= {"micro_batch_tokens": n.ppo_tokens} if n.ppo_tokens else {}
    models = {policy.lstrip("@"): policy, "v1": "@v1", "chat": "@ppo"}
    return ({"sft": {"data": "demonstrations", **tuning}} if demonstrations else {}) | rewards | {
        "v1_samples": {"stage": "rejection", "policy": policy, **sampling, **scores, "rows": min(rows, left), "samples_per_prompt": k},
        "v1": {"stage": "sft", "data": [*demonstrations, "@v1_samples"], **tuning}, "ppo": ppo,
        "eval": {"stage": "evaluate", "models": models, **sampling, **scores, "compare": [["chat", "v1"]]},
        "chat": {"stage": "export", "model": "@ppo", "evaluation": "@eval"}}


def flow(value) -> str:
    """A value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and (not re.fullmatch(r"[A-Za-z_./][\w./-]*", value) or value.lower() in YAML_WORDS):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def comment(text: str | None, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text or "", 140, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def folded(text: str) -> list[str]:
    """A section over several lines, cut after commas."""
    glued = text.replace(": ", ":\u00a0")  # textwrap cuts at ASCII spaces alone
    lines = textwrap.wrap(glued, 140, initial_indent="  ", subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False)
    return [line.replace(":\u00a0", ": ") for line in lines]


def render(c: Choice, n: Numbers, folder: Path, path: Path) -> str:
    """The recipe as text."""
    notes = c.notes
    lines = [f"# Written by `python -m posttrain init` for {c.machine}. Every number can be changed; `plan` says what a change costs.",
             f"# python -m posttrain run {path}", f"run:   {flow({'name': c.name, 'seed': 0})}", *comment(tuning_note(c, n), ""),
             *comment(f"chat template: {c.text.template or 'none named'} ({c.text.why})", ""), f"model: {flow(model_section(c, n))}", "data:"]
    for name, sources in c.sets.items():
        lines += [*comment(notes.get(name)), f"  {name}:", *(f"    - {flow(s.entry(folder))}" for s in sources)]
    lines += [*comment("never trained on: what the reward models and versions are measured on"), f"  held_out: {flow(c.held_out)}", "stages:"]
    said = {"sft": "batch sizes of training are left out: the paper's, lowered where they would give fewer than 50 steps",
            "reward_helpfulness": notes["rewards"], "reward": notes["rewards"], "v1_samples": "K answers to every prompt, the best kept",
            "v1": "starts from the base again, on " + ("demonstrations and kept answers" if "demonstrations" in c.sets else "the kept answers"),
            "ppo": "the paper runs 200 iterations of 512 answers; these sizes are for " + ("a CPU" if c.cpu else "a first run on one GPU")}
    for name, section in sections(c, n).items():
        lines += [*comment(said.get(name)), *folded(f"{name}: {flow(section)}")]
    return "\n".join([*lines, ""])


def tuning_note(c: Choice, n: Numbers) -> str:
    return {"full": "all weights are trained: every role of PPO is a model of its own",
            "lora": "adapters (LoRA) on one shared base", "qlora": "adapters on a 4-bit base (QLoRA): less memory than a base in 16 bits"}[n.tuning] + \
        ("; activation checkpointing saves memory for time" if n.checkpointing else "")


# -- fitting it ----------------------------------------------------------------------------------------------------------------------


class Fitting:
    """Tries numbers with the plan's memory until every section fits. room: bytes."""

    def __init__(self, choice: Choice, path: Path, room: float):
        self.choice, self.path, self.room = choice, path, room
        self.data = None  # read once: memory changes no row

    def planned(self, numbers: Numbers) -> tuple[cfg.Recipe, list[dict]]:
        """The recipe with these numbers and the plan's rows."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=self.path.parent, encoding="utf-8") as f:
            f.write(render(self.choice, numbers, self.path.parent, self.path))
            f.flush()
            recipe = cfg.load_recipe(f.name)
        planner = plan.Planner(recipe)
        planner.data = self.data = self.data or planner.data
        return recipe, [planner.row(name) for name in cfg.order(recipe)]

    def too_big(self, row: dict, explicit: bool) -> bool:
        """As posttrain.plan counts. Unless adapters on an unquantized base were asked for, the merged copy that they decode from has to fit too."""
        memory = row["memory"]
        return memory["total"] - (memory["decoder"] if explicit else 0) + plan.RESERVE > self.room

    def fit(self, numbers: Numbers, explicit: bool, cut: bool) -> tuple[bool, Numbers, list[dict]]:
        """(whether it fits, numbers lowered from those given, the plan's rows). cut: shorter lengths and fewer than 8 samples at a time too."""
        while True:
            rows = self.planned(numbers)[1]
            big = {row["kind"] for row in rows if self.too_big(row, explicit)}
            lowered = self.lowered(numbers, big, cut)
            if lowered == numbers:
                return not big, numbers, rows
            numbers = lowered

    def lowered(self, n: Numbers, big: set[str], cut: bool) -> Numbers:
        if big & {"sft", "reward"}:
            if n.train_tokens and n.train_tokens > n.max_length:
                return replace(n, train_tokens=max(n.max_length, n.train_tokens // 2))
            if not n.checkpointing:
                return replace(n, checkpointing=True)
            if cut and n.max_length > 256:
                shorter = up(n.max_length // 2, 64)
                return replace(n, max_length=shorter, train_tokens=n.train_tokens and shorter)
        if big & {"ppo"} and n.ppo_tokens and n.ppo_tokens > n.prompt_tokens + n.new_tokens:
            return replace(n, ppo_tokens=max(n.prompt_tokens + n.new_tokens, n.ppo_tokens // 2))
        if big & {"ppo", "rejection", "evaluate"}:
            if n.decoded > (2 if cut else 8):
                return replace(n, decoded=n.decoded // 2)
            if cut and n.new_tokens > 64:
                shorter = n.new_tokens // 2
                return replace(n, new_tokens=shorter, ppo_tokens=n.ppo_tokens and n.prompt_tokens + shorter)
        return n


def choose(fitting: Fitting, numbers: Numbers, tuning: str) -> tuple[Numbers, list[dict]]:
    """The first tuning that fits as it is; else the smallest with what has to be cut."""
    tunings = [tuning] if tuning != "auto" else ["lora", "qlora"] if fitting.choice.cpu else list(TUNINGS)
    for cut in (False, True):
        for name in tunings if not cut else tunings[-1:]:
            fits, found, rows = fitting.fit(replace(numbers, tuning=name), tuning != "auto", cut)
            if fits:
                return found, rows
    largest = max(rows, key=lambda r: r["memory"]["total"])
    raise PosttrainError("init", f"{fitting.choice.model} does not fit {fitting.room / 1e9:.1f} GB with {found.tuning}: {largest['section']} needs about "
                         f"{(largest['memory']['total'] + plan.RESERVE) / 1e9:.1f} GB at its smallest", "a model that fits",
                         "Take a smaller model or a larger card" + (", or --tuning auto." if tuning != "auto" else "."))


# -- how long ------------------------------------------------------------------------------------------------------------------------


def measured_speed() -> float:
    """Multiplications and additions a second of plain matrix products here, in the width that models run in."""
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(4096 if here == "cuda" else 1024, 4096 if here == "cuda" else 1024, device=here)
    a = a.to(torch.bfloat16) if here == "cuda" or doctor.bf16_flags() else a

    for _ in range(3):  # the first ones take longer
        a @ a
    a.sum().item()
    began, products = time.perf_counter(), 0
    while products < 10 and time.perf_counter() - began < 1:
        a @ a
        products += 1
    a.sum().item()  # a GPU is done now
    return products * 2 * len(a) ** 3 / (time.perf_counter() - began)


def seconds(recipe: cfg.Recipe, rows: list[dict], speed: float, cpu: bool) -> float:
    """A guess at the whole run: see WORK. rows: the plan's."""
    out, full = 0.0, recipe.model.lora is None
    for row in rows:
        work, stage = 2 * row["parameters"] * row.get("tokens", 0) / speed, recipe.stages[row["section"]]
        out += SECTION_SECONDS
        if cpu:
            out += work * WORK.get(row["kind"], 0)
        else:
            out += work * ({True: 3, False: 2}[full] if row["kind"] in ("sft", "reward") else 1) / GPU_EFFICIENCY
            out += row["samples"] / stage.batch * stage.max_new_tokens * STEP_SECONDS if row.get("samples") else 0
    return out


def speed_of(gigabytes: float, here: bool) -> float:
    """Measured, or that of a typical card with so much memory."""
    return measured_speed() if here else next(speed for most, speed in TYPICAL_CARD.items() if gigabytes <= most)
