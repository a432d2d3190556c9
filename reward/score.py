"""Scores of answers under the reward models: the only part of `reward` that other stages use."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain import chat
from posttrain.errors import PosttrainError
from posttrain.log import Ticker
from posttrain.models import Roles, source_of
from posttrain.packing import Tree, collate, cost, token_budget, tree
from posttrain.runs import Section, read_json
from posttrain.training import smaller_budget

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
PROBE = "Words of every kind: 3,141 naïve tests\n\t(what else?) and 漢字."
ASKED, ANSWERED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
DIALOGUES = ([ASKED], [ASKED, ANSWERED, ASKED], [{"role": "system", "content": "Be brief."}, ASKED])


def scores(roles: Roles, role: str, trees: list[Tree], budget: int, ticker: Ticker | None = None) -> list[list[float]]:
    """Raw score (the logit) of every answer of every tree, under one reward role. ticker: counts answers."""
    out: list[list[float]] = [[] for _ in trees]
    layout, groups = laid_out(roles, role, trees, budget)
    with torch.inference_mode():
        for group in groups:
            batch = collate(trees, group, layout, roles.tokenizer.pad_token_id).to(roles.device)
            for item, value in zip(batch.items, roles.scalars(role, batch).tolist(), strict=True):
                out[item].append(value)
            if ticker:
                ticker.advance(len(batch.items))
    return out


def laid_out(roles: Roles, role: str, trees: list[Tree], budget: int) -> tuple[str, list[list[int]]]:
    """(layout, micro-batches) of the fewest tokens, padding included: where answers share a prompt mostly rows, on a GPU too. With sdpa both have a
    mask there, which looks at no sliding window in a tree."""
    groups = {layout: token_budget(trees, budget, layout) for layout in (roles.layout, "rows")}
    tokens = {"packed": sum(cost(t, "packed") for t in trees), "rows": sum(len(g) * max(len(trees[i]) for i in g) for g in groups["rows"])}
    window = getattr(roles[role].net.config, "sliding_window", None)
    slides = window is not None and any(t.prompt + b - a > window for t in trees for a, b in t.spans)
    layout = roles.layout if slides else min(groups, key=tokens.get)
    return layout, groups[layout]


def raw_score(share: float) -> float:
    """The raw score whose sigma is `share`."""
    return float(torch.logit(torch.tensor(share, dtype=torch.float64)))


@dataclass
class Scorer:
    """Both reward models on one base. `threshold` is a raw score: the gate's on R_s. statistics: the mean and deviation of each model's held-out
    scores, where scores are standardized before they are merged; else empty. budget: tokens of a micro-batch, fewer once the GPU's memory ran out."""

    section: Section
    roles: Roles
    threshold: float
    threshold_note: str
    statistics: dict[str, tuple[float, float]]
    budget: int

    def __call__(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> dict[str, list[list[float]]]:
        """prompts: ids; answers[i]: id lists that continue prompts[i]. Returns raw scores by model, shaped like answers.

        An answer that was cut off is read as if it ended there: the models were trained at the end-of-turn token, and anywhere
        else their score means nothing (measured: cut answers scored higher than finished ones).
        """
        end = chat.end_of_turn(self.roles.tokenizer)
        closed = [[a if a[-1] == end else [*a, end] for a in group] for group in answers]
        trees = [tree(p, group) for p, group in zip(prompts, closed, strict=True)]
        while True:
            try:
                return {name: scores(self.roles, name, trees, self.budget) for name in ("helpfulness", "safety")}
            except torch.OutOfMemoryError:
                pass
            layout, groups = laid_out(self.roles, "safety", trees, self.budget)
            self.budget = smaller_budget(self.section, self.budget, [collate(trees, group, layout) for group in groups])


def load_scorer(section: Section, roles: Roles, helpfulness: str, safety: str, threshold, budget: int) -> Scorer:
    """Load both reward models as roles and settle the gate's threshold.

    threshold: a share on sigma(R_s), or 'auto': the score at which the safety model's own held-out rows give precision 0.9.
    """
    section.check_deviations(helpfulness, safety, ready=True)
    statistics = {}
    for name, ref in (("helpfulness", helpfulness), ("safety", safety)):
        source = source_of(section, ref)
        if source is None:
            raise PosttrainError(f"{section.place}.{name}", "'base' is no reward model", "a reward section", 'Write "@SECTION".')
        _same_tokenizer(section, roles, source, name)
        roles.add(name, source, head="saved")
        told = read_json(source.parent / "results.json")
        if section.config.standardize_rewards:
            statistics[name] = told["score_mean"], told["score_std"]
        auto = told.get("threshold_precision_90") if name == "safety" else None
    share, note = (0.15, "0.15 (the paper's)") if threshold == "auto" and auto is None else (auto, "precision 0.9 on its held-out rows") \
        if threshold == "auto" else (float(threshold), f"{threshold} (recipe)")
    if threshold == "auto" and auto is None:
        note = "0.15 (no score reaches precision 0.9 on the safety model's held-out rows)"
    return Scorer(section, roles, raw_score(share), f"sigma(R_s) < {share:.3f}, {note}", statistics, budget)


def _same_tokenizer(section: Section, roles: Roles, source: Path, name: str) -> None:
    """A reward model reads the policy's token ids, so it must have learnt on the same tokens and the same chat template, wherever its folder
    keeps them. A folder without a tokenizer, or without a template, can't be asked."""
    from transformers import AutoTokenizer

    if source.is_dir() and not any((source / file).exists() for file in TOKENIZER_FILES):
        return
    mine, other, who = roles.tokenizer, AutoTokenizer.from_pretrained(source, trust_remote_code=False), f"the reward model in {source.parent.name}"
    if other.get_vocab() != mine.get_vocab() or other.encode(PROBE, add_special_tokens=False) != mine.encode(PROBE, add_special_tokens=False):
        raise PosttrainError(f"{section.place}.{name}", f"{who} has another tokenizer", "the policy's tokenizer", "Train the reward model on the same base.")
    template = other.chat_template.get("default") if isinstance(other.chat_template, dict) else other.chat_template
    if template is None or template == mine.chat_template:
        return
    rendering = copy.copy(mine)
    rendering.chat_template = template
    for messages in DIALOGUES:
        theirs, ours = _rendered(rendering, messages), _rendered(mine, messages)
        if theirs != ours:
            raise PosttrainError(f"{section.place}.{name}", f"{who} learnt with another chat template: a dialogue reads {theirs!r} there, {ours!r} here",
                                 "one template for the policy and its reward models", "Train the reward model with this recipe's model.chat_template.")


def _rendered(tokenizer, messages: list[dict]) -> str:
    """A prompt and its answer as the template writes them."""
    try:
        return tokenizer.decode(chat.encode_prompt(tokenizer, messages) + chat.encode_answer(tokenizer, messages, "Because."))
    except PosttrainError as e:
        return f"an error ({e.found})"
