"""Supervised fine-tuning (paper section 3.1): demonstrations -> a model that answers. Loss on every assistant turn and its end."""

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from posttrain import chat
from posttrain.data import first_prompts, naming, only
from posttrain.errors import PosttrainError
from posttrain.formats import Demonstration
from posttrain.log import read_lines
from posttrain.models import Roles, roles_for, source_of
from posttrain.packing import Tree, collate, dialogue, token_budget
from posttrain.plan import batch_and_steps, fraction_rows
from posttrain.runs import Section
from posttrain.training import StepTrainer, bin_by_length, budget_of, fit, plan_batches, training_arguments

PAPER_BATCH, PAPER_RATE, ADAPTER_RATE = 64, 2e-5, 2e-4


class _Trainer(StepTrainer, SFTTrainer):
    """One step = one global batch; its loss = mean over all its counted tokens, whatever the micro-batches."""

    def totals(self, batch):
        return {"tokens": sum(len(b.targets) for b in batch)}

    def micro_loss(self, batch, totals):
        nll = -self.roles.logprobs(self.role.name, batch).sum() / totals["tokens"]
        return nll, {"loss": nll.item()}

    def log_row(self, stats):
        return {"loss": stats["loss"]}


def encode(items: list[Demonstration], tokenizer, max_length: int) -> tuple[list[Tree], list[int], int]:
    """Demonstrations -> trees, the indices of those kept, and how many are longer than max_length tokens (left out, counted)."""
    trees, kept, too_long = [], [], 0
    for i, item in enumerate(items):
        with naming(items, i):
            ids, mask = chat.encode_dialogue(tokenizer, item.messages, item.loss)
        if len(ids) > max_length:
            too_long += 1
            continue
        trees.append(dialogue(ids, mask))
        kept.append(i)
    return trees, kept, too_long


def held_out_loss(roles: Roles, role: str, trees: list[Tree], budget: int) -> float | None:
    """Mean negative log-likelihood per counted token, in nats."""
    if not trees:
        return None
    total = count = 0.0
    roles[role].net.eval()
    with torch.inference_mode():
        for group in token_budget(trees, budget, roles.layout):
            batch = collate(trees, group, roles.layout, roles.tokenizer.pad_token_id).to(roles.device)
            total -= roles.logprobs(role, batch).sum().item()
            count += len(batch.targets)
    return total / count


def gather(section: Section, names: list[str]) -> tuple[list[Demonstration], list[Demonstration]]:
    """Training and held-out demonstrations of several data sets."""
    train, held_out = [], []
    for name in names:
        split = section.run.data_of(name)
        train += split.train
        held_out += split.held_out
    return only(train, Demonstration, f"{section.place}.data"), held_out


def mix(items: list[Demonstration], fraction: float, seed: int, place: str) -> tuple[list[Demonstration], dict]:
    """All demonstrations but the safety ones, and a fraction of those (paper 4.2.3), in their order; and the composition.

    The fraction's rows are chosen by prompt: those of 0.25 contain those of 0.1."""
    safe = [i for i, item in enumerate(items) if item.safety]
    if fraction < 1 and not safe:
        raise PosttrainError(f"{place}.safety_fraction", f"none of {len(items)} demonstrations is tagged as safety", "safety demonstrations",
                             "Set safety_prompt: true on the data entry that holds them, or give its rows a column safety: true.")
    used = first_prompts([items[i] for i in safe], fraction_rows(len(safe), fraction), seed)
    left_out = {*safe} - {safe[n] for n in used}
    kept = [item for i, item in enumerate(items) if i not in left_out]
    if not kept:
        raise PosttrainError(f"{place}.safety_fraction", f"{fraction:g} leaves none of {len(items)} demonstrations", "at least one",
                             "Name demonstrations beside the safety ones.")
    counts: dict[str, int] = {}
    for item in kept:
        counts[item.source] = counts.get(item.source, 0) + 1
    n = len(safe) - len(left_out)
    return kept, {"data": counts, "safety": {"fraction": fraction, "rows": n, "given": len(safe), "share": n / len(kept)}}


def run(section: Section) -> None:
    config = section.config
    train, held_out = gather(section, config.data)
    train, composition = mix(train, config.safety_fraction, section.seed, section.place)
    safety = composition["safety"]
    roles = roles_for(section)
    trees, kept, too_long = encode(train, roles.tokenizer, config.max_length)
    if not trees:
        raise PosttrainError(f"{section.place}.data", f"no demonstration fits max_length {config.max_length}", "at least one", "Raise max_length.")
    held_trees, _, held_too_long = encode(held_out, roles.tokenizer, config.max_length)

    torch.manual_seed(section.seed)
    full = section.recipe.model.lora is None
    source = source_of(section, config.model)
    role = roles.add("policy", source, trainable=True)
    budget = budget_of(section, roles, role)

    bins = bin_by_length([len(t) for t in trees], config.max_length, section.seed) if config.packing else None
    units = len(bins) if bins else len(trees)
    batch, steps = batch_and_steps(units, PAPER_BATCH, config.batch_size, config.epochs, config.max_steps)
    batches = plan_batches(len(trees), batch, steps, section.seed, bins)
    loss_tokens = sum(len(t.counted[0]) for t in trees)
    section.log.say(f"{len(trees)} demonstrations ({too_long} longer than {config.max_length} tokens left out), {sum(map(len, trees))} tokens, "
                    f"{loss_tokens} with loss; {steps} steps of {batch} {'packed sequences' if bins else 'demonstrations'}; "
                    f"{len(held_trees)} held out; {section.manifest['decisions']['dtype']}, micro-batches of {budget} tokens")
    if safety["given"]:
        section.log.say(f"safety demonstrations: {safety['rows']} of {safety['given']} ({config.safety_fraction:.0%}), {safety['share']:.1%} of the "
                        "training rows")
    if too_long:
        section.log.say(f"the {too_long} that are too long are rows {[i for i in range(len(train)) if i not in set(kept)][:5]} ... of the training part")
    if held_too_long:
        section.log.say(f"{held_too_long} held-out demonstration{'s' * (held_too_long != 1)} longer than {config.max_length} tokens left out")

    data = Dataset.from_dict({"input_ids": [t.ids for t in trees], "labels": [labels(t) for t in trees]})
    args = SFTConfig(**training_arguments(config, section, roles, role, steps, PAPER_RATE if full else ADAPTER_RATE),
                     packing=False, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = _Trainer(model=role.net, args=args, train_dataset=data, processing_class=roles.tokenizer)
    trainer.bind(section, roles, role, trees, batches, budget)
    fit(trainer, section, "sft", lambda: {"held_out_loss": held_out_loss(roles, "policy", held_trees, budget)}, max(1, steps // 5))
    rows = read_lines(section.folder / "metrics.jsonl")
    losses = [r["sft/loss"] for r in rows if "sft/loss" in r]
    held = [r["sft/held_out_loss"] for r in rows if r.get("sft/held_out_loss") is not None]
    head = max(1, len(losses) // 10)
    section.finish({
        "steps": steps, "epochs": config.epochs, "batch_size": batch, "train_rows": len(trees), "too_long": too_long,
        "held_out_too_long": held_too_long,
        "train_tokens": sum(sum(len(trees[i]) for i in b) for b in batches), "loss_tokens": loss_tokens,
        "train_loss_first": sum(losses[:head]) / head, "train_loss_last": sum(losses[-head:]) / head,
        "held_out_loss_before": held[0] if held else None, "held_out_loss_after": held[-1] if held else None, **composition,
    })


def labels(t: Tree) -> list[int]:
    """-100 where no loss is, as transformers writes it."""
    counted = {p for c in t.counted for p in c}
    return [token if p in counted else -100 for p, token in enumerate(t.ids)]
