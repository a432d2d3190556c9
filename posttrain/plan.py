"""What a recipe costs before it runs: rows, tokens, optimizer steps, samples and memory of every section. No torch, no network.

Every number says where it comes from. counted: from files that are here, the recipe's own keys, or exact arithmetic on a model's
published shape. declared: rests on the recipe's `expect:` for data that is not here yet. estimated: rests on a rule of thumb, each
stated where it is used: 1.35 tokens a word, answers as long as `max_new_tokens` allows, activations by hand count (posttrain.memory).
The page that a terminal shows is posttrain.plan_page, what to change where a section does not fit posttrain.plan_cures.
"""

import json
import math
import os
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote_plus

from posttrain import cards, data, distributed, memory, plan_page
from posttrain import config as cfg
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS
from posttrain.shape import read_shape
from posttrain.stages import STAGES

TOKENS_PER_WORD, TEMPLATE_TOKENS, OPENING_TOKENS = 1.35, 32, 35  # of a red team's opening, without the request
PAPER_BATCH = {"sft": 64, "reward": 512}
FEWEST_STEPS, FEWEST_WARMUP = 50, 5
RESERVE = 1.0e9  # bytes of a GPU that its driver and the allocator keep
GROUPED = 0.5  # of free memory that a micro-batch chosen by memory may take (as posttrain.training.choose_budget)


render, short, weakest = plan_page.render, plan_page.short, plan_page.weakest


# -- steps: the same arithmetic as the stages use ----------------------------------------------------------------------------------


def batch_and_steps(rows: int, paper_batch: int, requested: int | None, epochs: float, max_steps: int | None) -> tuple[int, int]:
    """(global batch, optimizer steps) of `epochs` passes over `rows` units (demonstrations, packed sequences or pairs).

    The batch is the requested one, else the paper's, else the largest that gives at least 50 steps. max_steps is a ceiling.
    """
    def steps(batch: int) -> int:
        return max(1, math.ceil(rows * epochs / batch))

    batch = requested or next((b for b in range(paper_batch, 0, -1) if steps(b) >= FEWEST_STEPS), 1)
    return batch, min(steps(batch), max_steps or steps(batch))


def warmup_steps(steps: int, ratio: float) -> int:
    """The share of the steps, at least 5 (paper A.3.3), fewer than all of them; none for ratio 0."""
    return 0 if ratio == 0 else min(max(FEWEST_WARMUP, math.ceil(ratio * steps)), max(steps - 1, 0))


def mixed_rows(own: int, other: int, own_share: float) -> tuple[int, int]:
    """Rows of each side that a reward model's mix uses: own : all = own_share, the larger side sub-sampled (as reward.mix)."""
    if not other or own_share >= 1:
        return own, 0
    wanted = round(own * (1 - own_share) / own_share)
    return (own, wanted) if wanted <= other else (min(own, max(1, round(other * own_share / (1 - own_share)))), other)


def fraction_rows(rows: int, fraction: float) -> int:
    """Rows that `fraction` leaves (as reward.mix and sft.train); never none of some, but for the fraction 0."""
    return min(rows, max(1, round(rows * fraction))) if fraction else 0


def packed_rows(rows: int, tokens: float, width: int) -> int:
    """Bins of `width` tokens that next-fit packing makes of rows of a mean length: each bin ends half a row short."""
    return max(1, math.ceil(rows * tokens / max(width - tokens / 2, tokens)))


# -- the data ----------------------------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """Rows, their mean tokens, and the tokens of the longest where the rows are here."""

    rows: int
    tokens: float
    rows_are: str
    tokens_are: str
    longest: float = math.inf


def total(counts: list[Count]) -> Count:
    rows = sum(c.rows for c in counts)
    mean = sum(c.rows * c.tokens for c in counts) / rows if rows else 0.0
    return Count(rows, mean, weakest("counted", *(c.rows_are for c in counts)), weakest("counted", *(c.tokens_are for c in counts)),
                 max((c.longest for c in counts), default=0))


def words(item) -> int:
    """Words of a row: its turns and its answers."""
    turns = item.prompt if hasattr(item, "chosen") else item.messages
    answers = [item.chosen, item.rejected] if hasattr(item, "chosen") else []
    return sum(len(text.split()) for text in [*(m["content"] for m in turns), *answers])


def count_items(items: list) -> Count:
    lengths = [TOKENS_PER_WORD * words(i) for i in items]
    return Count(len(items), sum(lengths) / max(len(items), 1), "counted", "estimated", max(lengths, default=0) + TEMPLATE_TOKENS)


class Data:
    """Rows in training and held out of every data set: exactly as a run splits them when all files are here, else by arithmetic."""

    def __init__(self, recipe: cfg.Recipe, names: list[str]):
        self.recipe, self.folder = recipe, Path(recipe.path).parent
        here = all(self._is_local(n, i) for n in recipe.data_sets for i in range(len(recipe.data_sets[n])))
        self.split = data.DataSets(recipe, names).split if here else None
        self._known: dict[tuple[str, int], Count] = {}

    def _place(self, name: str, i: int) -> str:
        return f"{self.recipe.path}: data.{name}[{i}]"

    def _is_local(self, name: str, i: int) -> bool:
        return data._local(self.recipe.data_sets[name][i], self.folder, self._place(name, i)) is not None

    def _held(self, name: str) -> int:
        kind = FORMATS[self.recipe.data_sets[name][0].format].kind
        return getattr(self.recipe.held_out, f"{kind}s")

    def train(self, name: str) -> Count:
        if self.split:
            return count_items(self.split(name).train)
        parts = [self._entry(name, i) for i in range(len(self.recipe.data_sets[name]))]
        weighted = [c._replace(rows=round(c.rows * e.weight)) for c, e in zip(parts, self.recipe.data_sets[name], strict=True)]
        whole = total(weighted)
        return whole._replace(rows=max(whole.rows - self._held(name), 0))

    def held_out(self, name: str) -> Count:
        if self.split:
            return count_items(self.split(name).held_out)
        whole = total([self._entry(name, i) for i in range(len(self.recipe.data_sets[name]))])
        return whole._replace(rows=min(self._held(name), whole.rows // 2))

    def everything(self, name: str) -> Count:
        return total([self.train(name), self.held_out(name)])

    def _entry(self, name: str, i: int) -> Count:
        if (name, i) not in self._known:
            self._known[name, i] = self._count(name, i)
        return self._known[name, i]

    def _count(self, name: str, i: int) -> Count:
        entry = self.recipe.data_sets[name][i]
        if self._is_local(name, i):
            return count_items(data.load_entry(entry, self.folder, self.recipe.run.seed, self._place(name, i)).items)
        if entry.expect is None:
            raise PosttrainError(f"{self._place(name, i)}.expect", f"the hub data set '{entry.path}' declares no size",
                                 "expect: {rows: N, tokens: MEAN}",
                                 "Add the rows and the mean tokens of a row that its page gives; the real run counts them itself.")
        rows = cached_rows(entry)
        kept, label = (entry.expect.rows, "declared") if rows is None else (rows, "counted")
        kept = kept if entry.fraction is None else max(1, round(kept * entry.fraction))
        return Count(min(kept, entry.rows or kept), entry.expect.tokens, label, "declared")


def cached_rows(entry: cfg.DataEntry) -> int | None:
    """Rows of a hub data set that `datasets` has prepared on this machine before; None: it has not. Reads one small file."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets")
    owner, _, name = entry.path.rpartition("/")
    name = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)).lower()  # as datasets.naming
    variant = (entry.name or "default") + (f"-data_dir={quote_plus(entry.data_dir)}" if entry.data_dir else "")
    folder = cache / (f"{owner}___{name}" if owner else name) / variant
    found = sorted(folder.glob("*/*/dataset_info.json"), key=lambda p: p.stat().st_mtime)
    try:
        return int(json.loads(found[-1].read_text(encoding="utf-8"))["splits"][entry.split]["num_examples"])
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None


# -- the sections ------------------------------------------------------------------------------------------------------------------


class Planner:
    """One recipe's plan. `rows` of a section, by kind, in PLANS at the bottom."""

    def __init__(self, recipe: cfg.Recipe, card: cards.Card | None = None):
        self.recipe, self.model, self.card = recipe, recipe.model, card
        self.shape = read_shape(recipe.model, recipe.path)
        self.lora = self.shape.lora(self.model.lora, f"{recipe.path}: model.lora") if self.model.lora else 0
        self.label = "counted" if self.shape.exact else "estimated"
        full = {"float32": 4, "bfloat16": 2, "auto": 4}  # weights in training stay float32 unless the recipe says otherwise
        self.width = {"float32": 4}.get(self.model.dtype, 2) if self.lora else full[self.model.dtype]

    def way(self, trainer: bool = False) -> memory.Way:
        """How the model computes. trainer: in transformers' Trainer, which runs float32 weights in bfloat16 unless the recipe names a dtype."""
        if self.lora:
            return memory.Way(self.width, rank=self.model.lora.r, quantized=self.model.quantization != "none", rows=self.model.add_tokens)
        mixed = trainer and self.model.dtype == "auto"
        return memory.Way(2 if mixed else self.width, full=True, mixed=mixed)

    @cached_property
    def data(self) -> Data:
        fields = [names for c in self.recipe.stages.values() for names in cfg.fields_referring_to(c, "data").values()]
        return Data(self.recipe, sorted({n for names in fields for n in names if not n.startswith("@")}))

    def train(self, names: list[str] | None) -> Count:
        """Training rows of data sets and of sections that make data."""
        return total([self.made(n[1:]) if n.startswith("@") else self.data.train(n) for n in names or []])

    def made(self, name: str) -> Count:
        """What a section that samples answers hands on: at most one a prompt (distillation: one a sample), as long as allowed. With a pool, the
        prompts of the pooled rounds count too: beside its own where those are fresh, else they are taken for the same ones. Of annotators'
        tasks: a pair each."""
        config = self.recipe.stages[name]
        if config.stage == "redteam":  # a prompt for every attack on every model at most
            return self.attacks(config)._replace(rows=config.budget * len(config.models), rows_are="estimated", longest=math.inf)
        if config.stage == "annotations":  # a pair has two answers
            made = self.made(config.tasks[1:])
            return made._replace(tokens=made.tokens + self.recipe.stages[config.tasks[1:]].max_new_tokens)
        own = self.instructed(config) if config.stage == "gatt" else self.prompts(config)
        pooled = [self.pooled(n)[0].rows for n in getattr(config, "pool", [])]
        rows = own.rows + sum(pooled) if getattr(config, "fresh", False) else max([own.rows, *pooled])
        rows *= config.samples_per_prompt if config.stage == "distill" else 1
        return Count(rows, own.tokens + config.max_new_tokens, weakest(own.rows_are, "estimated"), "estimated")

    def pooled(self, name: str) -> tuple[Count, int]:
        """(prompts, answers) of an entry of a `pool`. A sweep's answers count too."""
        config = self.recipe.stages.get(name[1:]) if name.startswith("@") else None
        if config is None or config.stage != "rejection":
            count = self.train([name])
            return count, count.rows
        prompts = self.prompts(config)
        return prompts, (prompts.rows + self.swept(config, prompts.rows)) * config.samples_per_prompt

    def swept(self, config, rows: int) -> int:
        """Prompts that a sweep of temperatures samples beyond the round's own: all temperatures but the one that is used."""
        return (len(config.temperature) - 1) * min(config.sweep_prompts, rows) if isinstance(config.temperature, list) else 0

    def prompts(self, config) -> Count:
        """A fresh round's: without those that the rejection sections it descends from sample. A distillation's or red team's: the adversarial ones."""
        count = self.adversarial(config.prompts) if config.stage in ("distill", "redteam") else self.train(config.prompts)
        if getattr(config, "fresh", False):
            used = sum(self.prompts(c).rows for c in self.earlier_rounds(config) if {*c.prompts} & {*config.prompts})
            count = count._replace(rows=max(count.rows - used, 0), rows_are=weakest(count.rows_are, "estimated") if used else count.rows_are)
        return count._replace(rows=min(count.rows, getattr(config, "rows", None) or count.rows))

    def adversarial(self, names: list[str]) -> Count:
        """The prompts of data sets that are tagged; all of them where the rows are not here."""
        if not self.data.split or any(n.startswith("@") for n in names):
            return self.train(names)._replace(rows_are="estimated")
        return count_items([p for n in names for p in self.data.split(n).train if p.safety])

    def dialogues(self, config) -> Count:
        """Ghost Attention's dialogues: without a system text, and of several user turns unless the stage joins them to `turns`; all where the rows
        are not here."""
        if not self.data.split or any(n.startswith("@") for n in config.data):
            return self.train(config.data)._replace(rows_are="estimated")
        roles = [(i, [m["role"] for m in i.messages]) for n in config.data for i in self.data.split(n).train]
        return count_items([i for i, r in roles if "system" not in r and (config.turns or r.count("user") > 1)])

    def instructed(self, config) -> Count:
        """Rows that Ghost Attention samples, and their mean tokens: the dialogue, which joining makes longer, and the instruction."""
        count = self.dialogues(config)
        longer = sum(config.turns) / 2 if config.turns else 1.0  # as if every dialogue had one turn
        return count._replace(rows=min(count.rows, config.rows or count.rows) * config.instructions_per_dialogue, tokens=count.tokens * longer + 20,
                              longest=math.inf if config.turns or config.context == "resampled" else count.longest + 100, tokens_are="estimated")

    def earlier_rounds(self, config) -> list:
        """The rejection sections that a section descends from (as rlhf.rejection)."""
        found = [self.recipe.stages[name] for name in cfg.ancestors(self.recipe, config)]
        return [c for c in found if c.stage == "rejection"]

    def roles(self, frozen: list[str], trained: list[str]) -> list[dict]:
        """What a section holds besides the shared base: parameters and bytes of every role. The base as a compared model holds nothing of its own."""
        out = []
        for name in [*trained, *frozen]:
            size = self.lora or self.shape.parameters
            weights, learns = size * (4 if self.lora else self.width), name in trained
            out.append({"role": name, "parameters": size, "trained": learns, "weights": weights, "gradients": weights * learns,
                        "optimizer": 2 * weights * learns})  # Adam's two moments
        return out

    def cut(self, kind: str) -> int:
        """Over how many cards a section of this kind cuts what it trains (posttrain/sharding.py)."""
        able = self.model.sharding == "full" and self.model.quantization == "none" and STAGES[kind].sharded
        return self.card.count if self.card and able else 1

    def gathered(self) -> float:
        """Bytes that a card holds whole of a model that is cut: embeddings and vocabulary head, a layer and the one fetched ahead, and in full training
        the gradients of the first and of a layer, until they are summed."""
        table, layer = self.shape.embeddings, (self.shape.body + self.shape.small) / self.shape.layers
        return self.width * (table + 2 * layer + (0 if self.lora else table + layer))

    def held(self, roles: list[dict], activations: float = 0.0, kv_tokens: int = 0, decoding: float = 0.0, cut: int = 1) -> dict:
        """Bytes by use, of one card. total: the peak. Decoding, scoring and training take turns, so the largest of them counts.

        decoder: the merged copy that adapters on an unquantized base decode from (posttrain.decoder). The optimizer's step holds one
        more copy of what is trained, after the activations are gone. cut: cards over which the base is cut, or in full training all of these; of more
        cards each holds everything (docs/scaling.md)."""
        shape, share = self.shape, 1 if self.lora else cut  # adapters are not cut
        weights, gradients, optimizer = (sum(r[k] for r in roles) / share for k in ("weights", "gradients", "optimizer"))
        out = {"base": shape.weights(self.model.quantization, self.width) / cut if self.lora else 0.0, "roles": weights, "optimizer": optimizer,
               "decoder": shape.body * self.width if kv_tokens and self.lora and self.model.quantization == "none" else 0,
               "gathered": self.gathered() if cut > 1 else 0.0, "gradients": gradients, "activations": activations,
               "kv_cache": kv_tokens * shape.kv(self.way().width), "decoding": decoding}
        turns = (out["kv_cache"] + decoding, gradients + max(out["activations"], gradients))
        return out | {"total": sum(out[k] for k in ("base", "roles", "optimizer", "decoder", "gathered")) + max(turns)}

    def micro_batch(self, config, way: memory.Way, roles: list[dict], longest: float, cut: int = 1) -> tuple[int, int]:
        """(tokens of a micro-batch as chosen, tokens of the largest that comes). A longer row goes alone."""
        asked = config.micro_batch_tokens if hasattr(config, "micro_batch_tokens") else None
        if asked is None and self.card:
            held = self.held(roles, cut=cut)
            free = self.card.gigabytes * 1e9 - RESERVE - sum(held[k] for k in ("base", "roles", "optimizer", "gradients", "gathered"))
            asked = memory.micro_batch(self.shape, way, max(free, 0) * GROUPED)
        asked = asked or round(longest)
        return asked, max(asked, round(longest))

    def operations(self, tokens: float, length: float, head: float = 1.0) -> float:
        """Floating-point operations of one pass forward over `tokens` of rows of a mean length (2 a weight and token; half of each row's attention).
        head: the share of the tokens whose logits are made."""
        s = self.shape
        return tokens * (2 * s.body + 2 * s.layers * s.q_width * length + 2 * head * s.vocab * s.hidden)

    def learning(self, tokens: float, length: float, head: float, checkpointing: bool) -> float:
        """Operations of a pass forward and backward: three times as many as forward, twice where only adapters learn."""
        one = self.operations(tokens, length, head)
        return one * ((2 if self.lora else 3) + checkpointing)

    def training(self, config, kind: str, count: Count, unit: str, units: int | None = None) -> dict:
        """What sft and reward share. units: packed sequences, when the batch counts those."""
        n = count.rows if units is None else units
        batch, steps = batch_and_steps(n, PAPER_BATCH[kind], config.batch_size, config.epochs, config.max_steps)
        warmup = warmup_steps(steps, config.warmup_ratio)
        passes = min(config.epochs, steps * batch / n) if n else 0
        paper = PAPER_BATCH[kind]
        whose = "the recipe's" if config.batch_size else "the paper's"
        whose = f"lowered from {paper} for {FEWEST_STEPS} steps" if not config.batch_size and batch < paper else whose
        way, roles, pairs = self.way(trainer=True), self.roles([], ["policy" if kind == "sft" else "reward"]), 1 + (kind == "reward")
        longest = pairs * min(config.max_length, math.ceil(min(count.longest, 1e9)))  # of a pair both answers, each with the prompt, go together
        micro, largest = self.micro_batch(config, way, roles, longest, self.cut(kind))
        label = count.rows_are if units is None else weakest(count.rows_are, count.tokens_are, "estimated")
        few = f"{steps} steps are fewer than five times the {warmup} warm-up steps: use more data or epochs, or warmup_ratio: 0"
        tokens, length = count.rows * count.tokens * passes, count.tokens / pairs
        peak = memory.training(self.shape, way, largest, config.activation_checkpointing, logits=kind == "sft")
        return {"rows": count.rows, "tokens_per_row": count.tokens, "batch": batch, "steps": steps, "warmup": warmup,
                "tokens": round(tokens), "batch_unit": unit, "micro_batch": micro, "roles": roles,
                "flop": self.learning(tokens, length, float(kind == "sft"), config.activation_checkpointing), "read": 0.0,
                "arithmetic": f"{n:,} {unit} x {config.epochs:g} epoch{'s' * (config.epochs != 1)} / {batch} a step ({whose})"
                              + (f", at most {config.max_steps} steps" if config.max_steps else ""),
                "warnings": [few] * (steps < 5 * warmup),
                "memory": self.held(roles, peak, cut=self.cut(kind)), "cut": self.cut(kind),
                "labels": {"rows": count.rows_are, "tokens_per_row": count.tokens_are, "batch": label, "steps": label, "warmup": label,
                           "tokens": weakest(count.rows_are, count.tokens_are)}}

    def sampling(self, config, prompts: Count, samples: int, forwards: float, frozen: list[str], trained: tuple = (), together: int = 1) -> dict:
        """What the sampling stages share: `samples` answers, and `forwards` passes over each prompt and answer besides decoding. together: answers
        of a prompt that are scored as one row."""
        prompt = min(config.max_prompt_tokens, math.ceil(min(prompts.longest, 1e9)))
        side_by_side, width, way = min(samples, config.batch), prompt + config.max_new_tokens, self.way()
        each, roles = prompts.tokens + config.max_new_tokens, self.roles(frozen, list(trained))
        label = weakest(prompts.rows_are, "estimated")
        micro, largest = self.micro_batch(config, way, roles, width * together) if forwards else (None, 0)
        peak = memory.training(self.shape, way, largest, False) if trained else memory.forward(self.shape, way, largest) + memory.mask(largest, way)
        passes = samples * each * (1 + forwards)
        # decoding reads the weights once a step, and what each sample has stored so far; 4-bit weights are unpacked: written and read again
        weights = self.shape.weights(self.model.quantization, self.width) + (2 * self.shape.body * self.width if way.quantized else 0)
        stored = (prompts.tokens + config.max_new_tokens / 2) * self.shape.kv(way.width)
        read = samples * config.max_new_tokens * (weights / max(side_by_side, 1) + stored)
        return {"rows": prompts.rows, "tokens_per_row": prompts.tokens, "samples": samples, "tokens": round(passes), "roles": roles,
                "micro_batch": micro, "side_by_side": side_by_side, "flop": self.operations(passes, each), "read": read,
                "memory": self.held(roles, peak, side_by_side * width, memory.decoding(self.shape, way, side_by_side, width, prompt)),
                "warnings": [],
                "labels": {"rows": prompts.rows_are, "tokens_per_row": prompts.tokens_are, "samples": prompts.rows_are, "tokens": label}}

    def demonstrations(self, config) -> Count:
        """Without the safety demonstrations that safety_fraction leaves out (as sft.train); all where the rows are not here."""
        if config.safety_fraction == 1 or not self.data.split or any(n.startswith("@") for n in config.data):
            count = self.train(config.data)
            return count if config.safety_fraction == 1 else count._replace(rows_are="estimated")
        items = [i for n in config.data for i in self.data.split(n).train]
        safe = [i for i in items if i.safety]
        return count_items([i for i in items if not i.safety] + safe[:fraction_rows(len(safe), config.safety_fraction)])

    def sft(self, config) -> dict:
        count = self.demonstrations(config)
        units = packed_rows(count.rows, count.tokens, config.max_length) if config.packing else None
        unit = f"packed sequences of {config.max_length:,} tokens" if units else "demonstrations"
        return self.training(config, "sft", count, unit, units)

    def ranked(self, config, names: list[str] | None) -> Count:
        """Pairs that a reward model learns from: with the safety loss without those that prefer an unsafe answer (as reward.train); all of them
        where the rows are not here."""
        count = self.train(names)
        if not config.safety_loss_weight or not names:
            return count
        if not self.data.split or any(n.startswith("@") for n in names):
            return count._replace(rows_are=weakest(count.rows_are, "declared"))
        return count_items([p for n in names for p in self.data.split(n).train if not p.unsafe_preferred])

    def reward(self, config) -> dict:
        own, other = (self.ranked(config, names) for names in (config.own, config.other))
        rows = [fraction_rows(n, config.fraction) for n in mixed_rows(own.rows, other.rows, config.own_share)]
        both = [c._replace(rows=n) for c, n in zip((own, other), rows, strict=True) if n]
        row = self.training(config, "reward", total(both) if both else own, "pairs")
        return row | {"note": f"{rows[0]:,} own and {rows[1]:,} other pairs ({config.own_share:.0%} own)"
                      + (f", {config.fraction:.3g} of the mix" if config.fraction < 1 else "")}

    def rejection(self, config) -> dict:
        """Answers of a pool are not decoded, but pass through both reward models like those sampled."""
        prompts, k = self.prompts(config), config.samples_per_prompt
        swept = self.swept(config, prompts.rows)
        row = self.sampling(config, prompts, (prompts.rows + swept) * k, 2, ["policy", *SCORERS], together=k)
        note = f"{prompts.rows:,} prompts x {k} samples, scored by two models; answers at most {config.max_new_tokens} tokens"
        if swept:
            note += f"; {swept * k:,} samples more to choose among {len(config.temperature)} temperatures"
        pooled = sum(self.pooled(n)[1] for n in config.pool)
        if pooled:
            anew = 2 * pooled * (prompts.tokens + config.max_new_tokens)
            row |= {"tokens": row["tokens"] + round(anew), "flop": row["flop"] + self.operations(anew, prompts.tokens + config.max_new_tokens, 0)}
            row["labels"]["tokens"] = weakest(row["labels"]["tokens"], "estimated")
            note += f"; {pooled:,} earlier answers scored anew"
        if not prompts.rows:
            row["warnings"].append("no fresh prompt is left: add prompts, or give the earlier rounds fewer rows")
        return row | {"note": note}

    def distill(self, config) -> dict:
        prompts, k = self.prompts(config), config.samples_per_prompt
        row = self.sampling(config, prompts, prompts.rows * k * 3, 2, ["policy", *SCORERS], together=k)
        return row | {"note": f"at most {prompts.rows:,} adversarial prompts x {k} samples without a preprompt, with a generic one and with an answer "
                              f"template, scored by two models; answers at most {config.max_new_tokens} tokens"}

    def attacks(self, config) -> Count:
        """A red team's openings, and about how long its dialogues are: half way through their turns."""
        count = self.prompts(config)
        tokens = min(count.tokens + OPENING_TOKENS + config.max_new_tokens * (config.turns - 1) / 2, config.max_prompt_tokens)
        return Count(config.budget, tokens, "counted", "estimated", math.inf if config.turns > 1 or config.attacker else count.longest + 100)

    def redteam(self, config) -> dict:
        """As if no attack succeeded: then every turn and every rewrite is sent."""
        attacks, models, tries = self.attacks(config), len(config.models), 1 + (config.rewrites if config.attacker else 0)
        row = self.sampling(config, attacks, attacks.rows * models * tries * config.turns, 2,
                            [*compared(config), *SCORERS, *["attacker"] * bool(config.attacker)])
        row["labels"]["samples"] = "estimated"
        rewrites = f", and as many for each of {config.rewrites} rewrites" if config.attacker else ""
        return row | {"note": f"{models} models x {config.budget:,} attacks of at most {config.turns} messages{rewrites}; answers at most "
                              f"{config.max_new_tokens} tokens"}

    def gatt(self, config) -> dict:
        rows, k = self.instructed(config), config.samples_per_prompt
        row = self.sampling(config, rows, rows.rows * k, 0, ["policy"])
        turns = "" if config.context == "original" else "; every earlier turn is answered too, which is not counted"
        return row | {"note": f"{rows.rows:,} dialogues with an instruction x {k} answers to the last turn, at most {config.max_new_tokens} tokens{turns}"}

    def gatt_eval(self, config) -> dict:
        """Prompts at their longest: as many fillers as the turn allows."""
        turns = sorted({*config.turns})
        tokens = sum(min((t - 1) * config.max_filler_tokens + 40, config.max_prompt_tokens) for t in turns) / len(turns)
        count = Count(config.dialogues * len(turns), tokens, "counted", "estimated")
        row = self.sampling(config, count, count.rows * len(config.models), 0, compared(config))
        forms = f"; the forms come on top, {config.constraint_dialogues} dialogues each" * bool(config.constraint_dialogues)
        return row | {"note": f"{len(config.models)} models x {config.dialogues:,} dialogues asked at turns {', '.join(map(str, turns))}{forms}"}

    def collect(self, config) -> dict:
        prompts, scored = self.prompts(config), 2 if config.helpfulness else 0
        row = self.sampling(config, prompts, prompts.rows * 2, scored, [*dict.fromkeys(config.policies), *SCORERS[:scored]], together=2)
        return row | {"note": f"{prompts.rows:,} prompts x 2 answers for annotators to compare{', scored by two models' * bool(scored)}; "
                              f"answers at most {config.max_new_tokens} tokens"}

    def annotations(self, config) -> dict:
        count = self.made(config.tasks[1:])
        return {"rows": count.rows, "tokens_per_row": count.tokens, "memory": self.nothing(), "warnings": [],
                "labels": {"rows": count.rows_are, "tokens_per_row": count.tokens_are},
                "note": f"waits for {', '.join(config.annotations)}; at most one pair a task"}

    def ppo(self, config) -> dict:
        """Passes besides decoding: reference, two reward models, critic, and the policy again where the sampler's log-probabilities are not the
        trainer's (as rlhf.ppo); then policy and critic in training, a role at a time."""
        prompts, samples = self.prompts(config), config.iterations * config.batch_size
        steps = config.iterations * math.ceil(config.batch_size / config.mini_batch_size) * config.passes
        again = self.width < 4 or self.model.quantization != "none" or config.entropy or config.engine != "ours"
        row = self.sampling(config, prompts, samples, 4 + again + 2 * config.passes, ["reference", *SCORERS], ("policy", "critic"))
        each = prompts.tokens + config.max_new_tokens
        row["flop"] += 2 * config.passes * (self.learning(samples * each, each, 0.5, False) - self.operations(samples * each, each, 0.5))
        row["labels"] |= {"samples": "counted", "steps": "counted", "batch": "counted"}
        wanted = samples // config.samples_per_prompt
        if wanted > prompts.rows:
            row["note"] = f"each of the {prompts.rows:,} prompts comes {wanted / max(prompts.rows, 1):,.1f} times"
        return row | {"batch": config.mini_batch_size, "steps": steps,
                      "arithmetic": f"{config.iterations} iterations x {config.batch_size} samples = {samples:,}, in {steps:,} steps of "
                                    f"{config.mini_batch_size}; at most {config.critic_warmup} iterations of the critic alone before"}

    def evaluate(self, config) -> dict:
        names = config.prompts
        count = total([self.made(n[1:]) if n.startswith("@") else self.data.held_out(n) if config.held_out else self.data.everything(n) for n in names])
        count = count._replace(rows=min(count.rows, config.rows or count.rows))
        models, samples = len(config.models), count.rows * config.samples_per_prompt * len(config.models)
        row = self.sampling(config, count, samples, 3, [*compared(config), *SCORERS], together=config.samples_per_prompt)
        which = "held-out prompts" if config.held_out else "prompts"
        return row | {"note": f"{models} models x {count.rows:,} {which} x {config.samples_per_prompt}, scored by two models"}

    def asked(self, config) -> Count:
        """The prompts of a benchmark: held-out ones, or all."""
        return total([self.made(n[1:]) if n.startswith("@") else self.data.held_out(n) if config.held_out else self.data.everything(n)
                      for n in config.prompts])

    def bold(self, config) -> dict:
        """As if no group were left out. A classifier's own weights are not counted: the plan does not know their shape."""
        count = self.asked(config)
        count = count._replace(rows=min(count.rows, config.rows or count.rows))
        samples = count.rows * config.samples_per_prompt * len(config.models)
        row = self.sampling(config, count, samples, 0, compared(config))
        classifier = f"; {config.classifier} besides, which is not counted" if config.classifier else ""
        return row | {"note": f"{len(config.models)} models x {count.rows:,} prompts x {config.samples_per_prompt}, answers at most "
                              f"{config.max_new_tokens} tokens{classifier}"}

    def diversity(self, config) -> dict:
        count, temperatures = self.asked(config), len({*config.temperature})
        samples = count.rows * temperatures * config.samples_per_prompt * len(config.models)
        scorers = SCORERS if config.helpfulness else []
        row = self.sampling(config, count, samples, len(scorers), [*compared(config), *scorers], together=config.samples_per_prompt)
        return row | {"note": f"{len(config.models)} models x {count.rows:,} prompts x {temperatures} temperatures x {config.samples_per_prompt}"
                              f"{', scored by two models' * bool(scorers)}"}

    def lm_eval(self, config) -> dict:
        """One model at a time, merged and unquantized, read by the harness; its tasks' rows are not known here."""
        size = self.shape.parameters * self.width
        texts = memory.forward(self.shape, memory.Way(self.width), config.batch * 1024) + 8 * config.batch * 1024 * self.shape.vocab
        held = self.nothing() | {"base": size, "activations": texts, "total": size + texts}
        return {"memory": held, "warnings": [], "labels": {}, "roles": [],
                "note": f"{len(config.models)} models, one after the other, on {', '.join([*config.tasks, *config.task_files])}; "
                        f"{config.batch} requests side by side, of 1,024 tokens in this count"}

    def nothing(self) -> dict:
        return dict.fromkeys(self.held([]), 0.0)

    def directions(self, config) -> dict:
        """Every answer of the rounds passes through one of the two judges, those of a prompt as one row; nothing else is computed."""
        row = {"memory": self.nothing(), "warnings": [], "labels": {}, "note": "reads what finished sections stored"}
        if not (config.judges and config.rounds):
            return row
        rounds = [(self.recipe.stages[n[1:]], *self.pooled(n)) for n in config.rounds]
        each = [(answers, c.samples_per_prompt, count.tokens + c.max_new_tokens,
                 min(c.max_prompt_tokens, math.ceil(min(count.longest, 1e9))) + c.max_new_tokens)
                for c, count, answers in rounds]
        way, roles = self.way(), self.roles(SCORERS, [])
        micro, largest = self.micro_batch(config, way, roles, max(k * longest for _, k, _, longest in each))
        return row | {"roles": roles, "micro_batch": micro, "tokens": round(sum(answers * mean for answers, _, mean, _ in each)),
                      "flop": sum(self.operations(answers * mean, mean, 0) for answers, _, mean, _ in each), "labels": {"tokens": "estimated"},
                      "memory": self.held(roles, memory.forward(self.shape, way, largest) + memory.mask(largest, way)),
                      "note": f"{row['note']}; {sum(answers for answers, *_ in each):,} answers scored anew by two models"}

    def export(self, config) -> dict:
        """The model is merged a matrix at a time in the width it is stored in; the unmerged one is gone by then."""
        size = self.shape.parameters * (4 if config.dtype == "float32" else 2)
        note = f"{size / 1e9:,.2f} GB on disk, {config.dtype}"
        return {"memory": self.nothing() | {"base": size, "total": size}, "note": note, "warnings": [], "labels": {}}

    def row(self, name: str) -> dict:
        config = self.recipe.stages[name]
        made = PLANS[config.stage](self, config)
        made["labels"] |= {"memory": "estimated", "parameters": self.label, "lora_parameters": self.label}
        return {"section": name, "kind": config.stage, "parameters": self.shape.parameters, "lora_parameters": self.lora, "roles": [], **made}


SCORERS = ["helpfulness", "safety"]


def compared(config) -> list[str]:
    """The models a section compares. The base itself is shared by all adapters."""
    return [name for name, ref in config.models.items() if ref != "base"]


def gigabytes(gpu: str | float | None) -> float | None:
    """'24GB', '24' or 24 -> 24.0."""
    if gpu is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b?)?\s*", str(gpu), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise PosttrainError(f"--gpu {gpu}", "not an amount of memory", "gigabytes, such as 24GB", "Write --gpu 24GB.")
    return float(found[1])


def plan(recipe: cfg.Recipe, gpu: str | float | None = None, sections: list[str] | None = None) -> list[dict]:
    """One dict a section, parents first; with `sections`, only those.

    Keys: section, kind, parameters, lora_parameters, roles (parameters, and bytes of weights, gradients and optimizer, of each), and where they
    apply rows, tokens_per_row, batch, steps, warmup, samples, side_by_side, micro_batch, tokens (through the model, each forward pass once), flop, cut
    (cards over which its models are cut), memory (bytes of one card: base, roles, optimizer, decoder, gathered, gradients, activations, kv_cache,
    decoding, and their peak as total), note, arithmetic, warnings; labels says of each number whether it is counted, declared or estimated. gpu: what
    to compare with (cards.parse), None: the GPU present; adds gpu, fits, headroom (bytes) and seconds (least, most).
    """
    from posttrain import plan_cures

    names = [n for n in cfg.order(recipe) if sections is None or n in sections]
    card = cards.present() if gpu is None else cards.parse(gpu)
    planner = Planner(recipe, card)
    rows = [planner.row(n) for n in names]
    for row in rows:
        row |= {"run": recipe.run.name, "recipe": recipe.path}
        row |= {"model": recipe.model.name_or_path, "quantization": recipe.model.quantization}
        try:
            distributed.check_sharding(recipe.model, row["kind"], STAGES[row["kind"]].sharded, row["section"], card.count if card else None)
        except PosttrainError as e:
            row["warnings"].append(f"it does not start: {e.found}. {e.do}")
        if card is not None:
            row |= {"gpu": card, "headroom": headroom(row["memory"], card)}
            row["fits"] = row["headroom"] >= 0
            row["seconds"] = cards.seconds(card, row.get("flop", 0.0), row.get("read", 0.0))
            if not row["fits"]:
                row["warnings"].append(plan_cures.too_big(planner, row, card))
    return rows


def headroom(memory: dict, card: cards.Card) -> float:
    """Bytes of a card that stay free at a section's peak; negative: it does not fit. The merged copy to decode from is made only where there is room."""
    return card.gigabytes * 1e9 - RESERVE - memory["total"] + memory["decoder"]


PLANS = {"sft": Planner.sft, "reward": Planner.reward, "rejection": Planner.rejection, "collect": Planner.collect,
         "annotations": Planner.annotations, "ppo": Planner.ppo, "evaluate": Planner.evaluate, "distill": Planner.distill,
         "redteam": Planner.redteam, "gatt": Planner.gatt, "gatt_eval": Planner.gatt_eval,
         "bold": Planner.bold, "diversity": Planner.diversity, "lm_eval": Planner.lm_eval,
         "directions": Planner.directions, "export": Planner.export}
