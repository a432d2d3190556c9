"""Our PPO is TRL's where the settings are the same: given the ids that TRL 1.12 sampled, the same log-probabilities, reference
log-probabilities, values, scores, advantages, returns and losses, and an update in the same direction, in float32.

What stands on purpose differently in ours (method.md 10) is aligned here, in the open:
- whitening of scores, ceiling for cut answers, gate (10.1, 10.9, Eq. 3): off; one reward model reads the answer as it stands;
- clipping of gradients (4.3): TRL has none, so the limit is out of reach;
- the reference (10.5): TRL's is the base without an adapter, so that role is loaded without one;
- the score's place (10.9): TRL puts it one step after the end token and has the critic value that step too, wherever the batch has
  a column left. `longer` gives our functions that step as one more token, on which the policy has no loss;
- TRL whitens advantages with Bessel's correction, and divides logits by temperature + 1e-7.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rlhf_support import make_run, started
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from posttrain import chat
from posttrain.generate import Completion
from posttrain.models import resolve
from posttrain.tensors import whiten
from reward.score import scores
from rlhf import credit, ppo
from rlhf.rollout import Encoded, Scored, answer_trees

TRL = Path(sys.prefix) / "trl-1.12"
B, RATE, CRITIC_RATE = 16, 2e-3, 3e-3
SHARED = {"temperature": 0.5, "kl_coef": 0.07, "gamma": 0.97, "clip": 0.1, "value_clip": 0.15, "lam": 0.9}
STAGE = {"stage": "ppo", "prompts": "prompts", "policy": "@sft", "helpfulness": "@reward_helpfulness", "safety": "@reward_helpfulness",
         "batch_size": B, "mini_batch_size": B, "max_new_tokens": 9, "micro_batch_tokens": 256, "learning_rate": RATE, "critic_learning_rate": CRITIC_RATE,
         "temperature": SHARED["temperature"] + 1e-7, "kl_coef": SHARED["kl_coef"], "gamma": SHARED["gamma"], "gae_lambda": SHARED["lam"],
         "clip_range": SHARED["clip"], "value_clip_range": SHARED["value_clip"], "max_grad_norm": 1e9, "whiten": "none", "unfinished_score": None,
         "entropy": True}  # log-probabilities are computed, not taken from a sampler: TRL drew the answers


def peer(folder: Path, **task) -> None:
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    done = subprocess.run([sys.executable, Path(__file__).with_name("trl_ppo_tape.py"), folder], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(TRL)}, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=[1, 2], ids=["one pass", "two passes"])
def both(request, tmp_path_factory):
    """Both sides started from the same four adapters; TRL's tape."""
    if not TRL.is_dir():
        pytest.skip("TRL 1.12, the last release with PPO, is not in .venv/trl-1.12: run `make install`")
    folder = tmp_path_factory.mktemp("replay")
    section = started(make_run(tmp_path_factory, folder, {"ppo": STAGE | {"passes": request.param}}), "ppo")
    roles, _ = ppo.load_roles(section)
    roles.add("reference")  # the base itself
    g = torch.Generator().manual_seed(0)
    for p in roles["critic"].parameters():  # away from values of 0
        p.data.add_(torch.randn(p.shape, generator=g) * 0.02)
    for name, role in (("policy", "policy"), ("critic", "critic"), ("reward", "helpfulness")):
        roles.save(role, folder / name)
    prompts, _ = ppo.split_prompts(section, roles)
    chosen = prompts[:B]
    c = section.config
    peer(folder, base=resolve("builtin:tiny-llama"), prompts=[p.ids for p in chosen], stop=chat.end_of_turn(roles.tokenizer), seed=3,
         rates={"policy": RATE, "critic": CRITIC_RATE},
         adamw={"betas": [c.adam_beta1, c.adam_beta2], "eps": c.adam_epsilon, "weight_decay": c.weight_decay},
         settings={"num_ppo_epochs": request.param, "response_length": c.max_new_tokens, "temperature": SHARED["temperature"], "kl_coef": c.kl_coef,
                   "gamma": c.gamma, "lam": c.gae_lambda, "cliprange": c.clip_range, "cliprange_value": c.value_clip_range, "vf_coef": 1.0})
    tape = load_file(folder / "tape.safetensors")
    rows, start, blank = tape["query_responses"].tolist(), tape["context_length"].item(), roles.tokenizer.pad_token_id
    ours = SimpleNamespace(section=section, roles=roles, tape=tape, folder=folder, passes=request.param,
                           told=json.loads((folder / "tape.json").read_text()), start=[p.detach().clone() for p in parameters(roles)])
    ours.width = len(rows[0]) - start
    ours.prompts = [Encoded(None, [t for t in row[:start] if t != blank]) for row in rows]
    ours.answers = [row[start:start + n + 1] for row, n in zip(rows, tape["sequence_lengths"].tolist(), strict=True)]
    ours.longer = [a + [blank] * (len(a) < ours.width) for a in ours.answers]
    trees = answer_trees(scored(ours, ours.answers))
    ours.scores = torch.tensor(scores(roles, "helpfulness", trees, c.micro_batch_tokens)).flatten()
    ours.batches, ours.rollout = ppo.make_rollout(section, roles, scored(ours, ours.answers, ours.scores), ppo.State())
    ours.batches_longer, ours.rollout_longer = ppo.make_rollout(section, roles, scored(ours, ours.longer, ours.scores), ppo.State())
    return ours


def parameters(roles) -> list[torch.nn.Parameter]:
    return [p for name in ("policy", "critic") for p in roles[name].parameters()]


def scored(ours, answers: list[list[int]], merged: Tensor | None = None) -> Scored:
    """Answers with what PPO reads of them: TRL's ids, our scores."""
    merged = torch.zeros(len(answers), 1) if merged is None else merged[:, None]
    end, no = chat.end_of_turn(ours.roles.tokenizer), torch.zeros_like(merged, dtype=torch.bool)
    completions = [[Completion(a, [0.0] * len(a), a[-1] == end)] for a in answers]
    return Scored(ours.prompts, completions, merged, merged, merged, no, no, torch.tensor([[a.finished for a in group] for group in completions]))


def wide(ours, x: Tensor) -> Tensor:
    return pad(x, (0, ours.width - x.shape[1]))


def counted(ours, name: str) -> Tensor:
    return ours.tape[name][~ours.tape["padding_mask"]]


def close(mine: Tensor, theirs: Tensor, most: float = 2e-5) -> None:
    assert mine.shape == theirs.shape and theirs.std() > 100 * most, "the numbers are no test"
    assert (mine - theirs).abs().max() < most


def credits(ours) -> tuple[Tensor, Tensor]:
    """(advantages before whitening, returns), (B, width), with the score where TRL has it."""
    r, c = ours.rollout_longer, ours.section.config
    old, ref = (wide(ours, x) for x in (ours.rollout.old_logprobs, ours.rollout.ref_logprobs))
    rewards, _ = credit.token_rewards(r.scores, old, ref, wide(ours, r.response_mask), c.kl_coef)
    return credit.gae(rewards, wide(ours, r.values), wide(ours, r.response_mask), c.gamma, c.gae_lambda)


def whitened(ours) -> Tensor:
    mask = wide(ours, ours.rollout.response_mask)
    n = mask.sum()
    return whiten(credits(ours)[0], mask) * ((n - 1) / n).sqrt()


def test_the_tape_is_worth_replaying(both):
    """Answers that ended and that were cut, in one batch, none with a pad token of its own; the policy is not the reference."""
    lengths, end, blank = [len(a) for a in both.answers], chat.end_of_turn(both.roles.tokenizer), both.roles.tokenizer.pad_token_id
    assert 2 <= sum(a[-1] == end for a in both.answers) <= B - 2 and len(set(lengths)) > 3 and max(lengths) == both.width
    assert not any(blank in a for a in both.answers) and len({len(p.ids) for p in both.prompts}) > 3
    assert all(len(a) == both.width or a[-1] == end for a in both.answers)
    assert (counted(both, "logprobs") - counted(both, "ref_logprobs")).abs().mean() > 0.1


def test_log_probabilities(both):
    mask = wide(both, both.rollout.response_mask)
    assert torch.equal(mask, ~both.tape["padding_mask"])
    close(both.rollout.old_logprobs[both.rollout.response_mask], counted(both, "logprobs"))
    close(both.rollout.ref_logprobs[both.rollout.response_mask], counted(both, "ref_logprobs"))


def test_values_and_scores(both):
    close(both.rollout.values[both.rollout.response_mask], counted(both, "values"))
    close(wide(both, both.rollout_longer.values), both.tape["values"])  # and the step after the end token
    close(both.scores, both.tape["scores"])


def test_advantages_and_returns(both):
    advantages, returns = credits(both)
    longer = wide(both, both.rollout_longer.response_mask)
    close(advantages[longer], both.tape["raw_advantages"][longer])
    close(returns, both.tape["returns"] * longer)
    close(whitened(both), both.tape["advantages"], 1e-4)


def updated(ours, batches, rollout, name: str) -> tuple[dict, dict[str, Tensor]]:
    """(statistics, the role's tensors) after our update, from the weights both began with."""
    for p, value in zip(parameters(ours.roles), ours.start, strict=True):
        p.data.copy_(value)
    policy, critic = ppo.optimizers(ours.section, ours.roles)
    width = rollout.response_mask.shape[1]
    stats = ppo.update(ours.section, ours.roles, batches, rollout, whitened(ours)[:, :width], credits(ours)[1][:, :width], policy, critic)
    ours.roles.save(name, ours.folder / f"{name}-ours")
    return stats, load_file(ours.folder / f"{name}-ours" / "adapter_model.safetensors")


def change(before: dict, after: dict) -> Tensor:
    assert set(before) == set(after)
    return torch.cat([(after[k].double() - before[k].double()).flatten() for k in sorted(before)])


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_the_update(both, name):
    """The critic is also taught the step after the end token, as in TRL; its steps do not touch the policy's."""
    one = (both.batches, both.rollout) if name == "policy" else (both.batches_longer, both.rollout_longer)
    stats, after = updated(both, *one, name)
    before, theirs = (load_file(both.folder / f / "adapter_model.safetensors") for f in (name, f"{name}-after"))
    mine, other = change(before, after), change(before, theirs)
    assert torch.cosine_similarity(mine, other, dim=0) > 0.999
    assert mine.norm() == pytest.approx(other.norm().item(), rel=1e-3)
    assert other.abs().mean() > 1e-4 * both.passes
    ours, trl = ({"policy": ("policy_loss", "clip_fraction"), "critic": ("value_loss", "value_clip_fraction")}[name],
                 {"policy": ("loss/policy_avg", "policy/clipfrac_avg"), "critic": ("loss/value_avg", "val/clipfrac_avg")}[name])
    for a, b in zip(ours, trl, strict=True):
        assert stats[a] == pytest.approx(both.told[b], rel=2e-3, abs=1e-5)
    if both.passes == 2 and name == "policy":
        assert 0.02 < stats["clip_fraction"] < 0.9  # the clip bites in the second pass
