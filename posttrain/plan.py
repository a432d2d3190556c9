"""What a recipe costs before it runs: rows, tokens, optimizer steps, samples and memory of every section. No torch, no network.

Every number says where it comes from. counted: from files that are here, the recipe's own keys, or exact arithmetic on a model's
published shape. declared: rests on the recipe's `expect:` for data that is not here yet. estimated: rests on a rule of thumb, each
stated where it is used: 1.35 tokens a word, answers as long as `max_new_tokens` allows, activations by hand count.
"""

import json
import math
import os
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote_plus

from posttrain import config as cfg
from posttrain import data
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS
from posttrain.shape import read_shape

TOKENS_PER_WORD, TEMPLATE_TOKENS, OPENING_TOKENS = 1.35, 32, 35  # of a red team's opening, without the request
PAPER_BATCH = {"sft": 64, "reward": 512}
FEWEST_STEPS, FEWEST_WARMUP = 50, 5
RESERVE = 1.0e9  # bytes of a GPU that its driver and the allocator keep
LABELS = ("counted", "declared", "estimated")
USES = ("base", "roles", "optimizer", "decoder", "kv_cache", "activations")


def weakest(*labels: str) -> str:
    """What a number is that was made from several."""
    return max(labels, key=LABELS.index)


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

    def __init__(self, recipe: cfg.Recipe):
        self.recipe, self.model = recipe, recipe.model
        self.shape = read_shape(recipe.model, recipe.path)
        self.lora = self.shape.lora(self.model.lora, f"{recipe.path}: model.lora") if self.model.lora else 0
        self.label = "counted" if self.shape.exact else "estimated"
        full = {"float32": 4, "bfloat16": 2, "auto": 4}  # weights in training stay float32 unless the recipe says otherwise
        self.width = {"float32": 4}.get(self.model.dtype, 2) if self.lora else full[self.model.dtype]

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

    def memory(self, frozen: int, trainable: int, kv_tokens: int = 0, training_tokens: int = 0, checkpointing: bool = False) -> dict:
        """Bytes by use, at their peak. Decoding and training take turns, so the larger of key/value memory and activations counts.
        decoder: the merged copy that adapters on an unquantized base decode from (posttrain.decoder)."""
        shape, roles = self.shape, frozen + trainable
        size = self.lora * 4 if self.lora else shape.parameters * self.width
        out = {"base": shape.weights(self.model.quantization, self.width) if self.lora else 0.0,
               "roles": roles * size, "optimizer": 3 * trainable * size,  # gradient and Adam's two moments
               "decoder": shape.body * self.width if kv_tokens and self.lora and self.model.quantization == "none" else 0,
               "kv_cache": kv_tokens * shape.kv(self.width),
               "activations": training_tokens * shape.activations(self.width, checkpointing)}
        return out | {"total": sum(out[k] for k in USES[:4]) + max(out["kv_cache"], out["activations"])}

    def training(self, config, kind: str, count: Count, unit: str, units: int | None = None) -> dict:
        """What sft and reward share. units: packed sequences, when the batch counts those."""
        n = count.rows if units is None else units
        batch, steps = batch_and_steps(n, PAPER_BATCH[kind], config.batch_size, config.epochs, config.max_steps)
        warmup = warmup_steps(steps, config.warmup_ratio)
        passes = min(config.epochs, steps * batch / n) if n else 0
        paper = PAPER_BATCH[kind]
        whose = "the recipe's" if config.batch_size else "the paper's"
        whose = f"lowered from {paper} for {FEWEST_STEPS} steps" if not config.batch_size and batch < paper else whose
        width = config.micro_batch_tokens or config.max_length
        label = count.rows_are if units is None else weakest(count.rows_are, count.tokens_are, "estimated")
        few = f"{steps} steps are fewer than five times the {warmup} warm-up steps: use more data or epochs, or warmup_ratio: 0"
        return {"rows": count.rows, "tokens_per_row": count.tokens, "batch": batch, "steps": steps, "warmup": warmup,
                "tokens": round(count.rows * count.tokens * passes), "batch_unit": unit,
                "arithmetic": f"{n:,} {unit} x {config.epochs:g} epoch{'s' * (config.epochs != 1)} / {batch} a step ({whose})"
                              + (f", at most {config.max_steps} steps" if config.max_steps else ""),
                "warnings": [few] * (steps < 5 * warmup),
                "memory": self.memory(0, 1, training_tokens=width, checkpointing=config.activation_checkpointing),
                "labels": {"rows": count.rows_are, "tokens_per_row": count.tokens_are, "batch": label, "steps": label, "warmup": label,
                           "tokens": weakest(count.rows_are, count.tokens_are)}}

    def sampling(self, config, prompts: Count, samples: int, forwards: float, frozen: int, trainable: int, **extra) -> dict:
        """What the sampling stages share: `samples` answers, and `forwards` passes over each prompt and answer besides decoding."""
        longest = min(samples, config.batch) * (min(config.max_prompt_tokens, math.ceil(min(prompts.longest, 1e9))) + config.max_new_tokens)
        each = prompts.tokens + config.max_new_tokens
        label = weakest(prompts.rows_are, "estimated")
        return {"rows": prompts.rows, "tokens_per_row": prompts.tokens, "samples": samples,
                "tokens": round(samples * each * (1 + forwards)),
                "memory": self.memory(frozen, trainable, kv_tokens=longest, **extra), "warnings": [],
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

    def reward(self, config) -> dict:
        own, other = self.train(config.own), self.train(config.other)
        rows = [fraction_rows(n, config.fraction) for n in mixed_rows(own.rows, other.rows, config.own_share)]
        both = [c._replace(rows=n) for c, n in zip((own, other), rows, strict=True) if n]
        row = self.training(config, "reward", total(both) if both else own, "pairs")
        return row | {"note": f"{rows[0]:,} own and {rows[1]:,} other pairs ({config.own_share:.0%} own)"
                      + (f", {config.fraction:.3g} of the mix" if config.fraction < 1 else "")}

    def rejection(self, config) -> dict:
        """Answers of a pool are not decoded, but pass through both reward models like those sampled."""
        prompts, k = self.prompts(config), config.samples_per_prompt
        swept = self.swept(config, prompts.rows)
        row = self.sampling(config, prompts, (prompts.rows + swept) * k, 2, 3, 0)
        note = f"{prompts.rows:,} prompts x {k} samples, scored by two models; answers at most {config.max_new_tokens} tokens"
        if swept:
            note += f"; {swept * k:,} samples more to choose among {len(config.temperature)} temperatures"
        pooled = sum(self.pooled(n)[1] for n in config.pool)
        if pooled:
            row["tokens"] += round(2 * pooled * (prompts.tokens + config.max_new_tokens))
            row["labels"]["tokens"] = weakest(row["labels"]["tokens"], "estimated")
            note += f"; {pooled:,} earlier answers scored anew"
        if not prompts.rows:
            row["warnings"].append("no fresh prompt is left: add prompts, or give the earlier rounds fewer rows")
        return row | {"note": note}

    def distill(self, config) -> dict:
        prompts, k = self.prompts(config), config.samples_per_prompt
        row = self.sampling(config, prompts, prompts.rows * k * 3, 2, 3, 0)
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
        row = self.sampling(config, attacks, attacks.rows * models * tries * config.turns, 2, models + 2 + bool(config.attacker), 0)
        row["labels"]["samples"] = "estimated"
        rewrites = f", and as many for each of {config.rewrites} rewrites" if config.attacker else ""
        return row | {"note": f"{models} models x {config.budget:,} attacks of at most {config.turns} messages{rewrites}; answers at most "
                              f"{config.max_new_tokens} tokens"}

    def gatt(self, config) -> dict:
        rows, k = self.instructed(config), config.samples_per_prompt
        row = self.sampling(config, rows, rows.rows * k, 0, 1, 0)
        turns = "" if config.context == "original" else "; every earlier turn is answered too, which is not counted"
        return row | {"note": f"{rows.rows:,} dialogues with an instruction x {k} answers to the last turn, at most {config.max_new_tokens} tokens{turns}"}

    def gatt_eval(self, config) -> dict:
        """Prompts at their longest: as many fillers as the turn allows."""
        turns = sorted({*config.turns})
        tokens = sum(min((t - 1) * config.max_filler_tokens + 40, config.max_prompt_tokens) for t in turns) / len(turns)
        count = Count(config.dialogues * len(turns), tokens, "counted", "estimated")
        row = self.sampling(config, count, count.rows * len(config.models), 0, len(config.models), 0)
        forms = f"; the forms come on top, {config.constraint_dialogues} dialogues each" * bool(config.constraint_dialogues)
        return row | {"note": f"{len(config.models)} models x {config.dialogues:,} dialogues asked at turns {', '.join(map(str, turns))}{forms}"}

    def collect(self, config) -> dict:
        prompts, scored = self.prompts(config), 2 if config.helpfulness else 0
        row = self.sampling(config, prompts, prompts.rows * 2, scored, len(set(config.policies)) + scored, 0)
        return row | {"note": f"{prompts.rows:,} prompts x 2 answers for annotators to compare{', scored by two models' * bool(scored)}; "
                              f"answers at most {config.max_new_tokens} tokens"}

    def annotations(self, config) -> dict:
        count = self.made(config.tasks[1:])
        return {"rows": count.rows, "tokens_per_row": count.tokens, "memory": self.memory(0, 0) | {"base": 0, "total": 0}, "warnings": [],
                "labels": {"rows": count.rows_are, "tokens_per_row": count.tokens_are},
                "note": f"waits for {', '.join(config.annotations)}; at most one pair a task"}

    def ppo(self, config) -> dict:
        """Passes besides decoding: reference, two reward models, critic; then policy and critic in training."""
        prompts, samples = self.prompts(config), config.iterations * config.batch_size
        steps = config.iterations * math.ceil(config.batch_size / config.mini_batch_size)
        width = config.micro_batch_tokens or config.max_prompt_tokens + config.max_new_tokens
        row = self.sampling(config, prompts, samples, 6, 3, 2, training_tokens=width)
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
        row = self.sampling(config, count, samples, 3, models + 2, 0)
        which = "held-out prompts" if config.held_out else "prompts"
        return row | {"note": f"{models} models x {count.rows:,} {which} x {config.samples_per_prompt}, scored by two models"}

    def directions(self, config) -> dict:
        return {"memory": self.memory(0, 0) | {"base": 0, "total": 0}, "warnings": [], "labels": {}, "note": "reads what finished sections stored"}

    def export(self, config) -> dict:
        """The model is merged a matrix at a time in the width it is stored in; the unmerged one is gone by then."""
        size = self.shape.parameters * (4 if config.dtype == "float32" else 2)
        note = f"{size / 1e9:,.2f} GB on disk, {config.dtype}"
        return {"memory": self.memory(0, 0) | {"base": size, "total": size}, "note": note, "warnings": [], "labels": {}}

    def row(self, name: str) -> dict:
        config = self.recipe.stages[name]
        made = PLANS[config.stage](self, config) if config.stage in PLANS else {"warnings": [], "labels": {}, "memory": self.memory(1, 0)}
        made["labels"] |= {"memory": "estimated", "parameters": self.label, "lora_parameters": self.label}
        return {"section": name, "kind": config.stage, "parameters": self.shape.parameters, "lora_parameters": self.lora, **made}


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

    Keys: section, kind, parameters, lora_parameters, and where they apply rows, tokens_per_row, batch, steps, warmup, samples, tokens
    (through the model, each forward pass once), memory (bytes: base, roles, optimizer, decoder, kv_cache, activations, total), note,
    arithmetic, warnings; labels says of each number whether it is counted, declared or estimated. gpu: memory to compare with, adds `fits`.
    """
    names = [n for n in cfg.order(recipe) if sections is None or n in sections]
    planner, room = Planner(recipe), gigabytes(gpu)
    rows = [planner.row(n) for n in names]
    for row in rows:
        row |= {"run": recipe.run.name, "recipe": recipe.path}
        row |= {"model": recipe.model.name_or_path, "quantization": recipe.model.quantization}
        if room is not None:
            row["gpu"] = room
            memory = row["memory"]
            row["fits"] = memory["total"] - memory["decoder"] + RESERVE <= room * 1e9  # the copy is made only where there is room
            if not row["fits"]:
                row["warnings"].append(_too_big(row, room))
    return rows


def _too_big(row: dict, room: float) -> str:
    memory = row["memory"]
    largest = max((u for u in USES if u != "decoder"), key=memory.get)
    cure = {"base": "quantization: nf4", "roles": "adapters (model.lora)", "optimizer": "adapters (model.lora)",
            "kv_cache": "a lower batch or max_new_tokens",
            "activations": "activation_checkpointing: true, or a lower micro_batch_tokens"}[largest]
    return (f"about {memory['total'] / 1e9:.1f} GB and {RESERVE / 1e9:.0f} GB for the driver do not fit {room:g} GB; "
            f"most is {largest.replace('_', ' ')}: try {cure}")


# -- the page ----------------------------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """15011 -> '15,011', 5704180 -> '5.70 M', 6.74e9 -> '6.74 B'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"


def _labelled(row: dict, key: str, form=short) -> str:
    return f"{form(row[key])} {row['labels'].get(key, '')}".rstrip() if row.get(key) is not None else "-"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [head, ["-" * w for w in widths], *rows]]


def render(rows: list[dict]) -> str:
    """The plan as text for a terminal."""
    if not rows:
        return "Nothing to plan."
    first = rows[0]
    trained = f"{short(first['lora_parameters'])} in an adapter" if first["lora_parameters"] else "all of them trained"
    model = f"Model {first['model']}: {short(first['parameters'])} parameters, {trained} ({first['labels']['parameters']})"
    lines = [f"Plan of {first['run']} ({first['recipe']})", f"{model}; quantization {first['quantization']}", "", *_numbers_table(rows), ""]
    for r in rows:
        said = "; ".join(r[k] for k in ("note", "arithmetic") if r.get(k))
        lines += [f"{r['section']}: {said}"] * bool(said)
    lines += ["", *_memory_table(rows), "", *_totals(rows)]
    warnings = [f"warning: {r['section']}: {w}" for r in rows for w in r["warnings"]]
    return "\n".join(lines + ["", *warnings] * bool(warnings))


def _numbers_table(rows: list[dict]) -> list[str]:
    def plain(row: dict, key: str) -> str:
        return f"{row[key]:,}" if row.get(key) is not None else "-"

    return _table(["section", "kind", "rows", "tokens a row", "samples", "batch", "steps", "warm-up", "tokens through the model"], [
        [r["section"], r["kind"], *(_labelled(r, k) for k in ("rows", "tokens_per_row", "samples")), plain(r, "batch"),
         _labelled(r, "steps"), plain(r, "warmup"), _labelled(r, "tokens")] for r in rows])


def _unit(rows: list[dict]) -> tuple[float, str]:
    """The unit that suits the largest section."""
    return (1e9, "GB") if max(r["memory"]["total"] for r in rows) >= 1e8 else (1e6, "MB")


def _memory_table(rows: list[dict]) -> list[str]:
    uses = (*USES, "total")
    size, unit = _unit(rows)
    fits = [f"fits {rows[0]['gpu']:g} GB"] if "fits" in rows[0] else []
    table = _table([f"memory in {unit} (estimated)", *(u.replace("_", " ") for u in uses), *fits], [
        [r["section"], *(f"{r['memory'][u] / size:.2f}" for u in uses), *(["yes" if r.get("fits") else "no"] * len(fits))] for r in rows])
    return [*table, "base: the frozen weights that all adapters share; roles: the models or adapters a section holds; decoder: a merged",
            "copy to decode with, made where there is room; decoding and training take turns: the larger of their memories counts"]


def _totals(rows: list[dict]) -> list[str]:
    def added(key: str) -> tuple[float, str]:
        having = [r for r in rows if r.get(key)]
        return sum(r[key] for r in having), weakest("counted", *(r["labels"][key] for r in having))

    names = {"steps": "optimizer steps", "samples": "samples", "tokens": "tokens through the model"}
    said = [f"{short(added(k)[0])} {what} ({added(k)[1]})" for k, what in names.items() if added(k)[0]]
    largest, (size, unit) = max(rows, key=lambda r: r["memory"]["total"]), _unit(rows)
    whole = (f"In all: {', '.join(said) or 'nothing to train or sample'}; most memory in {largest['section']}, "
             f"about {largest['memory']['total'] / size:.1f} {unit} (estimated).")
    return [whole, "counted: from files and keys that are here; declared: rests on the recipe's expect; estimated: rests on 1.35 tokens",
            "a word, answers at their longest, or even packing. A batch and a warm-up are what their steps are."]


PLANS = {"sft": Planner.sft, "reward": Planner.reward, "rejection": Planner.rejection, "collect": Planner.collect,
         "annotations": Planner.annotations, "ppo": Planner.ppo, "evaluate": Planner.evaluate, "distill": Planner.distill,
         "redteam": Planner.redteam, "gatt": Planner.gatt, "gatt_eval": Planner.gatt_eval,
         "directions": Planner.directions, "export": Planner.export}
