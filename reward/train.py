"""A reward model (paper section 3.2.2): the SFT model with a scalar head, trained on preference pairs with the rating's margin and,
for the safety model, the safety loss. The prompt that chosen and rejected share goes through the model once."""

import numpy as np
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from posttrain import chat, sharding
from posttrain.config import Recipe
from posttrain.data import naming, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.models import Roles, roles_for, source_of
from posttrain.packing import Tree, tree
from posttrain.plan import batch_and_steps
from posttrain.runs import Section, write_lines
from posttrain.shape import shape_of
from posttrain.training import StepTrainer, budget_of, fit, plan_batches, training_arguments
from reward import losses
from reward.evaluate import evaluate, pair_rows
from reward.mix import mix, without_unsafe_preferred
from reward.score import scores

PAPER_BATCH, PAPER_RATE, PAPER_RATE_70B, ADAPTER_RATE = 512, 1e-5, 5e-6, 1e-4


class _Trainer(StepTrainer, RewardTrainer):
    """One step = one global batch of pairs; the ranking loss is a mean over its pairs, the safety loss over its labelled answers."""

    def bind_pairs(self, pairs: list[Pair], margin: str, weight: float) -> None:
        self.margins = torch.tensor([losses.margin(p.rating, margin) if p.margin is None or margin == "none" else p.margin for p in pairs])
        self.labels = torch.tensor([[-1 if safe is None else int(safe) for safe in (p.chosen_safe, p.rejected_safe)] for p in pairs])
        self.weight = weight

    def totals(self, batch):
        items = [i for b in batch for i in b.items[::2]]
        return {"pairs": len(items), "labelled": int((self.labels[items] >= 0).sum())}

    def micro_loss(self, batch, totals):
        items = batch.items[::2]  # answers come as chosen, rejected, chosen, rejected, ...
        raw = self.roles.scalars(self.role.name, batch)
        chosen, rejected = raw[0::2], raw[1::2]
        rank = losses.ranking(chosen, rejected, self.margins[items].to(raw)).sum() / totals["pairs"]
        numbers = {"ranking_loss": rank.item(), "accuracy": ((chosen > rejected).sum() / totals["pairs"]).item()}
        loss = rank
        if self.weight and totals["labelled"]:
            bce = losses.safety(raw, self.labels[items].flatten().to(raw.device)).sum() / totals["labelled"]
            numbers["safety_loss"] = bce.item()
            loss = loss + self.weight * bce
        return loss, numbers | {"loss": loss.item()}

    def log_row(self, stats):
        return stats


def encode(pairs: list[Pair], tokenizer, max_length: int) -> tuple[list[Tree], list[int], list[int]]:
    """Pairs -> trees (prompt; chosen, rejected); indices of those that fit max_length tokens and of those that do not."""
    trees, kept, too_long = [], [], []
    for i, pair in enumerate(pairs):
        with naming(pairs, i):
            prompt = chat.encode_prompt(tokenizer, pair.prompt)
            t = tree(prompt, [chat.encode_answer(tokenizer, pair.prompt, a) for a in (pair.chosen, pair.rejected)])
        if t.prompt + max(b - a for a, b in t.spans) > max_length:
            too_long.append(i)
        else:
            trees.append(t)
            kept.append(i)
    return trees, kept, too_long


def gather(section: Section, names: list[str] | None, field: str) -> tuple[list[Pair], list[Pair]]:
    train, held_out = [], []
    for name in names or []:
        split = section.run.data_of(name)
        if split.kind != "pair":
            raise PosttrainError(f"{section.place}.{field}", f"'{name}' holds {split.kind}s", "preference pairs", "Name a data set of pairs.")
        train += split.train
        held_out += split.held_out
    return train, held_out


def judge(roles: Roles, role: str, trees: list[Tree], pairs: list[Pair], budget: int) -> tuple[dict, list[list[float]]]:
    """Scores of held-out pairs and everything they say."""
    roles[role].net.eval()
    raw = scores(roles, role, trees, budget)
    return evaluate(pairs, raw, lengths(trees)), raw


def lengths(trees: list[Tree]) -> list[tuple[int, int]]:
    """Tokens of the chosen and the rejected answer."""
    return [tuple(b - a for a, b in t.spans) for t in trees]


def run(section: Section) -> None:
    config, weight = section.config, section.config.safety_loss_weight
    seed = section.seed if config.seed is None else config.seed
    own, own_held = gather(section, config.own, "own")
    other, other_held = gather(section, config.other, "other")
    unsafe_preferred = 0
    if weight:  # the ranking loss would ask for one order, the safety loss for the other
        (own, n), (other, m) = map(without_unsafe_preferred, (own, other))
        unsafe_preferred = n + m
    pairs, composition = mix(own, other, config.own_share, seed, config.fraction)
    roles = roles_for(section)
    trees, kept, too_long = encode(pairs, roles.tokenizer, config.max_length)
    if too_long and config.on_too_long == "error":
        first = pairs[too_long[0]]
        raise PosttrainError(f"{section.place}.max_length", f"{len(too_long)} of {len(pairs)} pairs are longer than {config.max_length} tokens "
                             f"(the first is from {first.source}: {first.prompt[-1]['content'][:60]!r}...)", "pairs that fit",
                             "Raise max_length, or set on_too_long: drop (they are counted in the report).")
    pairs = [pairs[i] for i in kept]
    if not pairs:
        raise PosttrainError(f"{section.place}.own", "no pair is left to train on", "at least one", "Check the data and max_length.")
    held, held_too_long = {}, 0
    drift, drift_known = drift_pairs(section, [*own, *other])
    for name, rows in (("own", own_held), ("other", other_held), *([("drift", drift)] if config.drift else [])):
        held_trees, held_kept, long = encode(rows, roles.tokenizer, config.max_length)
        held[name] = (held_trees, [rows[i] for i in held_kept])
        held_too_long += len(long)

    full = section.recipe.model.lora is None
    torch.manual_seed(seed)
    source = source_of(section, config.model)
    role = roles.add("reward", source, trainable=True, head="new", seed=seed)
    role.net.config.num_labels = 1
    budget = budget_of(section, roles, role)
    batch, steps = batch_and_steps(len(pairs), PAPER_BATCH, config.batch_size, config.epochs, config.max_steps)
    section.log.say(f"{len(pairs)} pairs: {composition['own']} own, {composition['other']} other; margin {config.margin}"
                    f"{f', safety loss x {weight:g}' if weight else ''}{f', {config.fraction:g} of the mix' if config.fraction < 1 else ''}; "
                    f"{len(too_long)} too long; {steps} steps of {batch}; "
                    f"held out: {len(held['own'][1])} own, {len(held['other'][1])} other"
                    f"{f', {len(drift)} of the newest policy' if config.drift else ''}")
    if drift_known:
        section.log.say(f"{drift_known} pair{'s' * (drift_known != 1)} of drift left out: the training data has their prompts")
    if unsafe_preferred:
        section.log.say(f"{unsafe_preferred} pair{'s' * (unsafe_preferred != 1)} that prefer an unsafe answer to a safe one left out of training (paper 3.2.1)")
    if held_too_long:
        section.log.say(f"{held_too_long} held-out pair{'s' * (held_too_long != 1)} longer than {config.max_length} tokens left out")

    data = Dataset.from_dict({"chosen_ids": [t.ids[:t.ends[0]] for t in trees[:1]], "rejected_ids": [t.ids[:t.prompt] + t.ids[t.ends[0]:] for t in trees[:1]]})
    rate = ADAPTER_RATE if not full else PAPER_RATE_70B if sum(p.numel() for p in role.net.parameters()) > 5e10 else PAPER_RATE
    args = RewardConfig(**training_arguments(config, section, roles, role, steps, rate) | {"seed": seed, "data_seed": seed},
                        disable_dropout=False)  # model.lora.dropout decides
    trainer = _Trainer(model=role.net, args=args, train_dataset=data, processing_class=roles.tokenizer)
    trainer.bind(section, roles, role, trees, plan_batches(len(pairs), batch, steps, seed), budget)
    trainer.bind_pairs(pairs, config.margin, weight)

    def held_out_accuracy():
        return {"held_out_accuracy": judge(roles, "reward", *held["own"], budget)[0]["accuracy"]["mean"] if held["own"][1] else None}

    fit(trainer, section, "reward", held_out_accuracy, max(1, steps // 4))
    results, raw = {}, {}
    for name, (held_trees, rows) in held.items():
        results[name], raw[name] = judge(roles, "reward", held_trees, rows, budget) if rows else ({"pairs": 0}, [])
    write_lines(section.folder / "held_out.jsonl", [row for name, (held_trees, rows) in held.items()
                                                    for row in pair_rows(name, rows, raw[name], lengths(held_trees))])
    flat = [s for pair in raw["own"] for s in pair] or [0.0]
    check_reload(section, roles, trees[:4], budget)
    section.finish({
        "which": judges(section.recipe, section.name), "margin": config.margin, "safety_loss_weight": weight,
        "parameters": parameters(role.net.config), "fraction": config.fraction, "seed": seed,
        "composition": composition, "too_long": len(too_long), "held_out_too_long": held_too_long,
        "unsafe_preferred": unsafe_preferred, "train_pairs": len(pairs), "steps": steps, "batch_size": batch,
        "score_mean": float(np.mean(flat)) if raw["own"] else None, "score_std": float(np.std(flat)) if raw["own"] else None, "held_out": results,
        "score_range_98": np.percentile(flat, [1, 99]).tolist() if raw["own"] else None,
        **({"drift_prompts_in_training": drift_known} if config.drift else {}),
        "threshold_precision_90": results["own"].get("threshold_precision_90"),
    })
    tell(section, results["own"])


def judges(recipe: Recipe, name: str) -> str | None:
    """What the recipe has a reward model judge, helpfulness or safety: what a section reads it for, else safety where it learns the safety loss, else
    what a section reads another model of the same pairs for. None where all this does not tell: it is then called by its section's name."""
    def read_for(names: set[str]) -> set[str]:
        return {what for config in recipe.stages.values() for what in ("helpfulness", "safety") if getattr(config, what, None) in names}

    config = recipe.stages[name]
    alike = {f"@{n}" for n, other in recipe.stages.items() if other.stage == "reward" and other.own == config.own}
    found = [read_for({f"@{name}"}), {"safety"} if config.safety_loss_weight else set(), read_for(alike)]
    return next((next(iter(f)) for f in found if len(f) == 1), None)


def drift_pairs(section: Section, trained: list[Pair]) -> tuple[list[Pair], int]:
    """Every pair of the `drift` data sets whose prompt no training data has, and how many are left out because theirs is there."""
    pairs = [p for part in gather(section, section.config.drift, "drift") for p in part]
    known = {prompt_key(p) for p in trained}
    kept = [p for p in pairs if prompt_key(p) not in known]
    return kept, len(pairs) - len(kept)


def parameters(config) -> int | None:
    """Weights of the base as published, without adapters and head; None where its configuration has other names for its sizes."""
    try:
        return shape_of(config.to_dict()).parameters
    except (KeyError, TypeError):
        return None


def check_reload(section: Section, roles: Roles, trees: list[Tree], budget: int) -> None:
    """The saved head and adapter give the same scores when read back: nobody loses a score head here."""
    from posttrain.training import restore

    roles["reward"].net.eval()
    before = scores(roles, "reward", trees, budget)
    for p in roles["reward"].parameters():  # what the file lacks stays zero and shows
        sharding.fill(p, torch.zeros(sharding.shape(p)))
    restore(roles, roles["reward"], section.folder / "model")
    after = scores(roles, "reward", trees, budget)
    worst = max(abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    if worst > (1e-5 if roles.dtype == torch.float32 else 1e-2):
        raise PosttrainError(str(section.folder / "model"), f"read back, its scores differ by {worst:.4f}", "the same scores", "Please report this.")


def tell(section: Section, own: dict) -> None:
    if not own.get("pairs"):
        section.log.say("no pairs are held out: set data.held_out.pairs to know how good this model is")
        return
    balanced, plain = own["length_balanced_accuracy"], own["accuracy"]
    shown = "not defined" if balanced["mean"] is None else f"{balanced['mean']:.1%} [{balanced['low'] or 0:.1%}, {balanced['high'] or 1:.1%}]"
    section.log.say(f"held-out accuracy {plain['mean']:.1%}, length-balanced {shown} (the longer answer wins {own['longer_wins']:.1%} of {own['pairs']} pairs)")
