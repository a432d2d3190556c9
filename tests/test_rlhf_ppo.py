"""PPO as a whole: the loop's own tensors recomputed one sequence at a time, what may and may not change, learning, and kills at every
seam, each followed by the same command and the same final bytes."""

import copy
import json
import math
import shutil
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rlhf_support import REWARDS, Killed, die, make_run, parents, recipe, started
from safetensors.torch import load_file

from posttrain import distributed
from posttrain.data import prompt_key
from posttrain.errors import PosttrainError
from posttrain.log import Log, read_lines
from posttrain.models import Roles
from posttrain.runs import Run, Section, run_sections
from rlhf import ppo

STAGE = {"stage": "ppo", "prompts": "prompts", "policy": "@sft", **REWARDS, "iterations": 4, "batch_size": 16, "mini_batch_size": 8,
         "max_new_tokens": 10, "learning_rate": 3e-3, "critic_learning_rate": 3e-3, "eval_every": 2, "eval_prompts": 6, "save_steps": 2,
         "critic_warmup": 2, "micro_batch_tokens": 256, "temperature": 0.5, "safety_threshold": 0.4, "sample_every": 2, "kl_coef": 0.05}
CLOCK = {"time", "ppo/seconds_generate", "ppo/seconds_score", "ppo/seconds_update", "ppo/tokens_per_second", "ppo/peak_memory_gb"}


class Spy:
    """Lets PPO run and keeps what passes by: (name, arguments, result) of the functions it watches."""

    NAMES = ("load_roles", "optimizers", "collect", "final_scores", "make_rollout", "update", "critic_pass", "tripwire", "finish",
             "keep_best")

    def __init__(self, monkeypatch):
        self.calls, self.steps, self.before, self.after = [], Counter(), None, None
        for name in self.NAMES:
            monkeypatch.setattr(ppo, name, self.wrapped(name, getattr(ppo, name)))

    def wrapped(self, name, real):
        def watching(*args, **kwargs):
            if name == "finish":
                self.after = snapshot(args[1])
            result = real(*args, **kwargs)
            self.calls.append((name, args, result))
            if name == "load_roles":
                self.roles, self.before = result[0], snapshot(result[0])
            if name == "optimizers":
                for role, optimizer in zip(("policy", "critic"), result, strict=True):
                    optimizer.register_step_post_hook(lambda *_, role=role: self.steps.update([role]))
            return result

        return watching

    def of(self, name) -> list:
        return [(args, result) for n, args, result in self.calls if n == name]


def snapshot(roles) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in roles.base.named_parameters()}


def metrics(section) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_lines(section.folder / "metrics.jsonl")]


def iterations(section) -> list[dict]:
    return [r for r in metrics(section) if "ppo/kl" in r]


def outcome(section) -> dict:
    """Everything a finished section leaves that must not depend on kills."""
    return {**{p.name: p.read_bytes() for p in sorted((section.folder / "model").iterdir())}, "metrics": metrics(section),
            "results": section.results(), "samples": (section.folder / "samples.jsonl").read_bytes(),
            "left": sorted(p.name for p in section.folder.iterdir())}


def ran(factory, folder: Path, stage: dict) -> Section:
    section = started(make_run(factory, folder, {"ppo": stage}), "ppo")
    ppo.run(section)
    return section


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """An undisturbed run and what passed by in it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy(monkeypatch)
        return ran(tmp_path_factory, tmp_path_factory.mktemp("straight"), STAGE), spy


# -- what changes ------------------------------------------------------------------------------------------------------------------


def test_policy_and_critic_change_and_nothing_else_does(watched):
    _, spy = watched
    assert spy.before.keys() == spy.after.keys()
    moved = {n for n in spy.before if not torch.equal(spy.before[n], spy.after[n])}
    trained = {n for n in spy.before if ".policy." in n or ".critic." in n}
    assert moved == trained and "heads.critic.weight" in moved
    for role in ("reference", "helpfulness", "safety"):
        assert any(f".{role}." in n for n in spy.before)
    assert any("embed_tokens" in n for n in spy.before) and len(trained) > 20


def test_the_reference_is_what_the_policy_started_from_and_the_critic_what_judges_helpfulness(watched):
    section, spy = watched
    saved = load_file(section.run.folder / "sft" / "model" / "adapter_model.safetensors")
    judge = load_file(section.run.folder / "reward_helpfulness" / "model" / "adapter_model.safetensors")
    pairs = 0
    for name, value in spy.before.items():
        for role, source in (("policy", saved), ("reference", saved), ("critic", judge)):
            if f".{role}.weight" in name and "lora_" in name:
                assert torch.equal(value, source["base_model.model." + name.replace(f".{role}.weight", ".weight")])
                pairs += 1
    assert pairs == 3 * sum("lora_" in k for k in saved)
    assert not spy.before["heads.critic.weight"].any()  # method.md 10.7: a new head, zero


def test_one_step_of_both_optimizers_for_every_mini_batch(watched):
    section, spy = watched
    rounds = section.results()["warmup_rounds"]
    assert rounds == 2 and len(spy.of("critic_pass")) == rounds
    assert spy.steps == {"policy": 4 * 2, "critic": 4 * 2 + rounds * 2}


def test_the_first_mini_batchs_ratio_is_one(watched):
    _, spy = watched
    assert [args[2] for args, _ in spy.of("tripwire")] == pytest.approx([0.0] * 4, abs=2e-6)  # fp32: what the sampler recorded
    assert all(row["ppo/ratio_deviation"] > 1e-4 for row in iterations(watched[0]))  # the second mini-batch's is not


def test_log_probabilities_are_the_samplers_where_they_are_exact_and_else_the_trainers(tmp_path_factory, monkeypatch):
    spy = Spy(monkeypatch)
    ran(tmp_path_factory, tmp_path_factory.mktemp("recomputed"), STAGE | {"entropy": True, "iterations": 1, "critic_warmup": 0})
    ran(tmp_path_factory, tmp_path_factory.mktemp("sampled"), STAGE | {"iterations": 1, "critic_warmup": 0})
    recomputed, sampled = (rollout for _, (_, rollout) in spy.of("make_rollout"))
    (_, mine), (_, told) = spy.of("collect")
    assert mine.answers == told.answers
    assert next(args[2] for args, _ in spy.of("tripwire")) == 0.0 and torch.equal(recomputed.old_logprobs, recomputed.ref_logprobs)
    assert sampled.old_logprobs[sampled.response_mask].tolist() == [lp for group in told.answers for a in group for lp in a.logprobs]
    assert not torch.equal(sampled.old_logprobs, recomputed.old_logprobs)
    assert torch.allclose(sampled.old_logprobs, recomputed.old_logprobs, atol=1e-5, rtol=0)


def test_a_checkpoint_asks_whether_the_processes_hold_the_same_policy_and_critic(tmp_path_factory, monkeypatch):
    spy, asked = Spy(monkeypatch), []
    monkeypatch.setattr(distributed, "agree", lambda parameters, place: asked.append((parameters, place)))
    section = ran(tmp_path_factory, tmp_path_factory.mktemp("agree"), STAGE | {"iterations": 1, "critic_warmup": 0})
    assert len(asked) == 2  # the warm-up's checkpoint and the iteration's
    for parameters, place in asked:
        assert {*map(id, parameters)} == {id(p) for name in ("policy", "critic") for p in spy.roles[name].parameters()} and place == section.place


def test_optimizers_are_the_papers(watched):
    (_, (policy, critic)), = watched[1].of("optimizers")
    for optimizer in (policy, critic):
        group, = optimizer.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 1e-5, 0.1, 3e-3)
    config = watched[0].config.model_copy(update={"learning_rate": None, "critic_learning_rate": None})
    section = SimpleNamespace(config=config)
    assert [o.param_groups[0]["lr"] for o in ppo.optimizers(section, watched[1].roles)] == [1e-5, 1e-4]  # method.md section 2, adapters
    full = {n: SimpleNamespace(adapter=None, parameters=lambda: [torch.nn.Parameter(torch.zeros(1))]) for n in ("policy", "critic")}
    assert ppo.optimizers(section, full)[0].param_groups[0]["lr"] == 1e-6  # the paper's


# -- the loop's tensors, recomputed ------------------------------------------------------------------------------------------------


def by_hand(row_scores, old, ref, values, mask, beta, gamma, lam):
    """Advantages (not whitened) and returns from the definitions, in plain Python over each answer's own tokens."""
    advantages, returns = [], []
    for i, score in enumerate(row_scores):
        n = sum(mask[i])
        rewards = [-beta * (old[i][t] - ref[i][t]) for t in range(n)]
        rewards[-1] += score
        v = [*values[i][:n], 0.0]
        deltas = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        a = [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
        advantages.append(a)
        returns.append([x + y for x, y in zip(a, v, strict=False)])
    return advantages, returns


def test_scores_are_whitened_by_running_moments_and_then_capped(watched):
    """16 answers an iteration: fewer than 128, so the moments run over the warm-up and everything since (method.md 10.1)."""
    section, spy = watched
    calls, seen = spy.of("final_scores"), []
    assert len(calls) == 2 + 4 and section.results()["whitening"] == "running"
    for (_, scored, _), result in calls:
        merged, finished = scored.merged.flatten().tolist(), scored.finished.flatten().tolist()
        seen += merged
        mean, deviation = statistics.fmean(seen), statistics.pstdev(seen)
        whitened = [(m - mean) / deviation for m in merged]
        assert result.tolist() == pytest.approx([w if f else min(w, -1.0) for w, f in zip(whitened, finished, strict=True)], abs=1e-4)
    assert any(f for (_, s, _), _ in calls for f in s.finished.flatten().tolist())
    assert not all(f for (_, s, _), _ in calls for f in s.finished.flatten().tolist())


def test_advantages_and_returns_follow_from_the_rollout_by_the_definitions(watched):
    _, spy = watched
    for (_, _, _, rollout, advantages, returns, *_), _ in spy.of("update"):
        mask = rollout.response_mask.tolist()
        tensors = [x.double().tolist() for x in (rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, rollout.values)]
        expected, to_learn = by_hand(*tensors, mask, beta=0.05, gamma=1.0, lam=0.95)
        flat = [x for row in expected for x in row]
        mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
        for i, row in enumerate(expected):
            n = len(row)
            assert advantages[i, :n].tolist() == pytest.approx([(x - mean) / deviation for x in row], abs=1e-4)
            assert returns[i, :n].tolist() == pytest.approx(to_learn[i], abs=1e-5)
        assert not (advantages * ~rollout.response_mask).any()


def test_the_warm_up_teaches_rewards_to_go(watched):
    """Lambda 1 and no values: what the critic learns first does not depend on what it says."""
    _, spy = watched
    for (_, _, _, (_, rollout, returns)), _ in spy.of("critic_pass"):
        mask = rollout.response_mask.tolist()
        tensors = [x.double().tolist() for x in (rollout.scores, rollout.old_logprobs, rollout.ref_logprobs)]
        _, expected = by_hand(*tensors, torch.zeros_like(rollout.values).tolist(), mask, beta=0.05, gamma=1.0, lam=1.0)
        for i, row in enumerate(expected):
            assert returns[i, :len(row)].tolist() == pytest.approx(row, abs=1e-5)
        assert not (rollout.values).any()  # a zero head


def test_the_policy_starts_as_its_reference_and_leaves_it(watched):
    section, spy = watched
    first = spy.of("update")[0][0][3]
    assert torch.allclose(first.old_logprobs, first.ref_logprobs, atol=1e-5, rtol=0)
    kl = [row["ppo/kl"] for row in iterations(section)]
    assert abs(kl[0]) < 1e-5 and max(kl[1:]) > 0.01
    for row, ((_, _, _, rollout, *_), _) in zip(iterations(section), spy.of("update"), strict=True):
        sums = (rollout.old_logprobs - rollout.ref_logprobs).double().sum(1).tolist()
        assert row["ppo/kl"] == pytest.approx(statistics.fmean(sums), abs=1e-4)


def test_every_iterations_answers_come_from_the_policy_as_it_then_is(watched):
    """The sampler may keep merged copies of weights; a stale one would sample from an earlier policy. What it recorded must be what the
    trainer finds, iteration by iteration, while the policy moves."""
    _, spy = watched
    for (_, _, scored, _), (_, rollout) in spy.of("make_rollout"):
        recorded = [lp for group in scored.answers for a in group for lp in a.logprobs]
        assert rollout.old_logprobs[rollout.response_mask].tolist() == pytest.approx(recorded, abs=1e-3)
    first, last = spy.of("make_rollout")[2][1][1], spy.of("make_rollout")[-1][1][1]
    assert (last.old_logprobs - last.ref_logprobs).abs().max() > 0.05 > (first.old_logprobs - first.ref_logprobs).abs().max()


def test_what_an_iteration_reports_is_what_was_sampled(watched):
    section, spy = watched
    rollouts = [result[1] for (_, _, _, state), result in spy.of("make_rollout")][2:]
    sampled = [result for (*_, number), result in spy.of("collect") if number >= 1]
    assert [r["step"] for r in iterations(section)] == [1, 2, 3, 4] and len(sampled) == 4
    for row, scored, rollout in zip(iterations(section), sampled, rollouts, strict=True):
        merged, tagged = scored.merged.flatten().tolist(), [p.prompt.safety for p in scored.prompts]
        low = [s < math.log(0.4 / 0.6) for s in scored.safety.flatten().tolist()]
        assert row["ppo/merged_reward"] == pytest.approx(statistics.fmean(merged), abs=1e-5)
        assert row["ppo/merged_reward_std"] == pytest.approx(statistics.pstdev(merged), abs=1e-5)
        assert row["ppo/routed_by_tag"] == pytest.approx(sum(tagged) / 16)
        assert row["ppo/routed_by_threshold"] == pytest.approx(sum(lo and not t for lo, t in zip(low, tagged, strict=True)) / 16)
        rows = zip(scored.helpfulness.flatten().tolist(), low, tagged, strict=True)
        branch = [h for h, lo, t in rows if not lo and not t]
        assert row["ppo/helpfulness_branch"] == pytest.approx(statistics.fmean(branch), abs=1e-5)
        lengths = [len(a.ids) for group in scored.answers for a in group]
        assert rollout.response_mask.sum(1).tolist() == lengths
        assert row["ppo/answer_tokens"] == pytest.approx(statistics.fmean(lengths))
        assert row["ppo/finished"] == pytest.approx(sum(a.finished for group in scored.answers for a in group) / 16)
    told = section.results()
    for key in ("routed_by_tag", "routed_by_threshold"):
        assert told[key] == pytest.approx(statistics.fmean(r[f"ppo/{key}"] for r in iterations(section)))


def test_held_out_prompts_are_neither_trained_on_nor_watched(watched):
    section, spy = watched
    held = {prompt_key(p) for p in section.run.data_of("prompts").held_out}
    trained = {prompt_key(e.prompt) for _, scored in spy.of("collect") for e in scored.prompts}
    looked = {r["prompt"] for (_, _, _, rows, _), _ in spy.of("keep_best") for r in rows}
    assert held and trained and len(looked) == 6
    assert not held & trained and not held & looked and not trained & looked


# -- one update against one sequence at a time ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A started section with its roles loaded, the policy moved away from the reference and the critic's head from zero."""
    section = started(make_run(tmp_path_factory, tmp_path_factory.mktemp("engine"), {"ppo": STAGE}), "ppo")
    roles, scorer = ppo.load_roles(section)
    g = torch.Generator().manual_seed(0)
    for name in ("policy", "critic"):
        for p in roles[name].parameters():
            p.data.add_(torch.randn(p.shape, generator=g) * 0.02)
    prompts, _ = ppo.split_prompts(section, roles)
    return SimpleNamespace(section=section, roles=roles, scored=ppo.collect(section, roles, scorer, prompts, 1), start=snapshot(roles))


def one_update(engine, layout="rows", shift=0.0, **changed):
    """make_rollout and update from the same weights; the gradients that each step used, and where the weights came to.

    shift: moves the policy's old log-probabilities, so that ratios leave the clip range."""
    section, roles = engine.section, engine.roles
    for n, p in roles.base.named_parameters():
        p.data.copy_(engine.start[n])
        p.grad = None
    used: dict[str, list] = {"policy": [], "critic": []}
    config, roles.layout = section.config, layout
    section.config = config.model_copy(update=changed)
    try:
        state = ppo.State(warm=True)
        batches, rollout = ppo.make_rollout(section, roles, engine.scored, state)
        g = torch.Generator().manual_seed(1)
        advantages = torch.randn(rollout.response_mask.shape, generator=g) * rollout.response_mask
        returns = torch.randn(rollout.response_mask.shape, generator=g) * rollout.response_mask
        if shift:
            noise = torch.randn(rollout.response_mask.shape, generator=g) * shift * rollout.response_mask
            rollout = type(rollout)(rollout.response_mask, rollout.old_logprobs + noise, rollout.ref_logprobs, rollout.values + noise,
                                    rollout.scores)
        optimizers = ppo.optimizers(section, roles)
        for name, optimizer in zip(used, optimizers, strict=True):
            optimizer.register_step_pre_hook(
                lambda *_, name=name: used[name].append([p.grad.clone() for p in roles[name].parameters()]))
        stats = ppo.update(section, roles, batches, rollout, advantages, returns, *optimizers)
    finally:
        section.config, roles.layout = config, "rows"
    after = [p.detach().clone() for name in used for p in roles[name].parameters()]
    return SimpleNamespace(stats=stats, used=used, after=after, batches=batches, rollout=rollout, advantages=advantages, returns=returns)


def sequences(engine):
    return [(p.ids, a.ids) for p, group in zip(engine.scored.prompts, engine.scored.answers, strict=True) for a in group]


def alone(roles, role: str, ids: list[int], answer: list[int], temperature: float):
    """(log-probabilities, values) of one answer from transformers' own forward on its one sequence."""
    roles.use(role)
    out = roles.base(input_ids=torch.tensor([ids + answer]), use_cache=False, output_hidden_states=True)
    where = torch.arange(len(ids) - 1, len(ids) + len(answer) - 1)
    logp = torch.log_softmax(out.logits[0, where].double() / temperature, -1)
    values = out.hidden_states[-1][0, where].double() @ roles["critic"].head.weight[0].double()
    return logp[torch.arange(len(answer)), torch.tensor(answer)], values


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_the_rollout_is_what_one_sequence_at_a_time_gives(engine, layout):
    got = one_update(engine, layout)
    for n, p in engine.roles.base.named_parameters():
        p.data.copy_(engine.start[n])
    with torch.no_grad():
        for i, (ids, answer) in enumerate(sequences(engine)):
            for tensor, role, which in ((got.rollout.old_logprobs, "policy", 0), (got.rollout.ref_logprobs, "reference", 0),
                                        (got.rollout.values, "critic", 1)):
                expected = alone(engine.roles, role, ids, answer, 0.5)[which].tolist()
                assert tensor[i, :len(answer)].tolist() == pytest.approx(expected, abs=1e-4)
        flat = [a for group in engine.scored.answers for a in group]
        for i, a in enumerate(flat):  # and what the sampler itself recorded
            assert got.rollout.old_logprobs[i, :len(a.ids)].tolist() == pytest.approx(a.logprobs, abs=1e-4)


@pytest.mark.parametrize("step", [0, 1])
def test_the_gradients_of_a_step_are_those_of_the_mean_loss_over_its_tokens(engine, step):
    """Written out answer by answer: clipped ratio times advantage, clipped squared error, each divided by the mini-batch's tokens.
    With a learning rate of nothing the second step starts from the same weights, and from no gradient of the first."""
    got = one_update(engine, max_grad_norm=1e9, shift=0.4, learning_rate=1e-30, critic_learning_rate=1e-30)
    for n, p in engine.roles.base.named_parameters():
        p.data.copy_(engine.start[n])
        p.grad = None
    clipped = value_clipped = 0
    numbers = [n for w in got.batches.where[step] for n in w.tolist()]
    count = sum(len(sequences(engine)[n][1]) for n in numbers)
    for n in numbers:
        ids, answer = sequences(engine)[n]
        logp, _ = alone(engine.roles, "policy", ids, answer, 0.5)
        total = 0.0 * logp.sum()
        for t in range(len(answer)):
            ratio, a = torch.exp(logp[t] - got.rollout.old_logprobs[n, t].item()), got.advantages[n, t].item()
            bites = ratio.item() > 1.2 if a > 0 else ratio.item() < 0.8
            total = total - (min(max(ratio.item(), 0.8), 1.2) if bites else ratio) * a
            clipped += bites
        (total / count).backward()
        _, values = alone(engine.roles, "critic", ids, answer, 0.5)
        total = 0.0 * values.sum()
        for t in range(len(answer)):
            old, target = got.rollout.values[n, t].item(), got.returns[n, t].item()
            gap = values[t].item() - old
            kept = old + min(max(gap, -0.2), 0.2)
            bites = abs(gap) > 0.2 and abs(kept - target) > abs(values[t].item() - target)
            total = total + 0.5 * (kept - target if bites else values[t] - target) ** 2
            value_clipped += bites
        (total / count).backward()
    assert 0.05 < clipped / count < 0.5 and 0.05 < value_clipped / count < 0.6
    for role in ("policy", "critic"):
        for p, used in zip(engine.roles[role].parameters(), got.used[role][step], strict=True):
            torch.testing.assert_close(used, p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item() + 1e-9)


@pytest.fixture(autouse=True)
def ratio_may_differ(monkeypatch, request):
    """Where a test moves the old log-probabilities on purpose, the tripwire would rightly fire."""
    if "gradients_of_a_step" in request.node.name or "micro_batches" in request.node.name:
        monkeypatch.setattr(ppo, "RATIO_TOLERANCE", {torch.float32: 1e9})


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_the_split_into_micro_batches_changes_nothing(engine, layout):
    whole = one_update(engine, micro_batch_tokens=4096, shift=0.3)
    split = one_update(engine, layout, micro_batch_tokens=64, shift=0.3)
    assert len(whole.batches.mini) == len(split.batches.mini) == 2
    assert sum(map(len, split.batches.mini)) >= 3 * sum(map(len, whole.batches.mini))
    for role in ("policy", "critic"):
        for a, b in zip(whole.used[role][0], split.used[role][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item() + 1e-9)
    start = [engine.start[n] for n, p in engine.roles.base.named_parameters() if p.requires_grad]
    moved = max((a - b).abs().max().item() for a, b in zip(whole.after, start, strict=False) if a.shape == b.shape)
    for a, b in zip(whole.after, split.after, strict=True):
        assert (a - b).abs().max() < 0.01 * moved
    for key, value in whole.stats.items():
        assert split.stats[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_gradients_are_clipped_role_by_role(engine):
    got = one_update(engine, max_grad_norm=1e-3)
    for role in ("policy", "critic"):
        for step in got.used[role]:
            assert math.sqrt(sum(g.double().square().sum().item() for g in step)) == pytest.approx(1e-3, rel=1e-3)
    assert got.stats["policy_grad_norm"] > 0.01 and got.stats["critic_grad_norm"] > 0.01  # reported before the clip


def test_statistics_are_means_over_the_tokens(engine):
    got = one_update(engine, learning_rate=1e-30, critic_learning_rate=1e-30)  # nothing moves, so every mini-batch sees ratio 1
    counted = got.rollout.response_mask
    assert (got.stats["ratio"], got.stats["clip_fraction"], got.stats["policy_kl"]) == pytest.approx((1, 0, 0), abs=1e-5)
    assert got.stats["policy_loss"] == pytest.approx(-got.advantages[counted].mean().item(), abs=1e-5)
    assert got.stats["value_loss"] == pytest.approx(0.5 * (got.rollout.values - got.returns)[counted].square().mean().item(), rel=1e-4)


def test_a_policy_that_moved_between_rollout_and_update_trips_the_wire(watched, tmp_path_factory, monkeypatch):
    real = ppo.update

    def disturbed(section, roles, *args):
        roles["policy"].parameters()[0].data.add_(0.05)
        return real(section, roles, *args)

    monkeypatch.setattr(ppo, "update", disturbed)
    with pytest.raises(PosttrainError, match=r"stages\.ppo: the first mini-batch's ratio differs from 1 by 0\.\d+"):
        ran(tmp_path_factory, tmp_path_factory.mktemp("tripped"), STAGE)


# -- prompts -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need", [1, 4, 7, 10, 25])
def test_prompts_come_in_shuffled_passes_each_once(need):
    prompts = list(range(10))
    stream = [p for i in range(1, 41) for p in ppo.iteration_prompts(prompts, need, seed=3, iteration=i)]
    assert len(stream) == 40 * need
    passes = [stream[i:i + 10] for i in range(0, len(stream) - 9, 10)]
    assert all(sorted(p) == prompts for p in passes)
    assert len({tuple(p) for p in passes}) == len(passes) > 1  # shuffled anew
    for i in (1, 2, 17, 40):  # a function of seed and iteration alone
        assert ppo.iteration_prompts(prompts, need, 3, i) == stream[(i - 1) * need:i * need]
    other = [p for i in range(1, 41) for p in ppo.iteration_prompts(prompts, need, 4, i)]
    assert other != stream


def test_the_warm_ups_prompts_come_before_the_stream():
    """Iterations 0, -1, ... are passes of their own."""
    prompts = list(range(6))
    assert sorted(ppo.iteration_prompts(prompts, 3, 0, 0) + ppo.iteration_prompts(prompts, 3, 0, -1)) == prompts


def test_no_prompt_is_both_watched_and_trained_on(engine):
    section, roles = engine.section, engine.roles
    train, looked = ppo.split_prompts(section, roles)
    keys = [{prompt_key(e.prompt) for e in part} for part in (train, looked)]
    assert len(looked) == 6 and not keys[0] & keys[1]
    every = {prompt_key(p) for p in section.run.data_of("prompts").train}
    assert keys[0] | keys[1] == every
    assert [e.ids for e in ppo.split_prompts(section, roles)[0]] == [e.ids for e in train]
    twice = SimpleNamespace(config=section.config, seed=0, log=section.log, place=section.place, run=SimpleNamespace(
        data_of=lambda name: SimpleNamespace(train=section.run.data_of(name).train * 2)))
    train, looked = ppo.split_prompts(twice, roles)
    assert not {prompt_key(e.prompt) for e in train} & {prompt_key(e.prompt) for e in looked}


def test_no_prompt_of_a_fitting_length_is_told(engine):
    section = SimpleNamespace(config=engine.section.config.model_copy(update={"max_prompt_tokens": 3}), seed=0, log=engine.section.log,
                              place="r.yaml: stages.ppo", run=engine.section.run)
    with pytest.raises(PosttrainError, match="no prompt is left"):
        ppo.split_prompts(section, engine.roles)


@pytest.mark.parametrize("samples", [3, 16])
def test_samples_of_a_prompt_stay_in_one_mini_batch_or_the_recipe_is_refused(tmp_path_factory, tmp_path, samples):
    with pytest.raises(PosttrainError, match=rf"stages\.ppo\.samples_per_prompt: got {samples}. Expected a divisor of batch_size 16 and mini_batch_size 8"):
        make_run(tmp_path_factory, tmp_path, {"ppo": STAGE | {"samples_per_prompt": samples}})


def test_the_announced_steps_are_those_that_are_made(engine):
    """A batch that the mini-batch does not divide ends with a smaller one."""
    said, config = [], engine.section.config.model_copy(update={"batch_size": 16, "mini_batch_size": 5})
    ppo.announce(SimpleNamespace(config=config, log=SimpleNamespace(say=said.append)), SimpleNamespace(threshold_note="x"), [], [])
    assert "4 steps each" in said[0] and len(one_update(engine, mini_batch_size=5).batches.mini) == 4


# -- whitening -----------------------------------------------------------------------------------------------------------------------


def scored_as(merged: list[float], finished: list[bool]):
    return SimpleNamespace(merged=torch.tensor(merged)[:, None], finished=torch.tensor(finished)[:, None])


@pytest.mark.parametrize("kind, batch_size, used", [("auto", 127, "running"), ("auto", 128, "batch"), ("batch", 4, "batch"),
                                                    ("running", 512, "running"), ("none", 512, "none")])
def test_how_scores_are_whitened(engine, kind, batch_size, used):
    config = engine.section.config.model_copy(update={"whiten": kind, "batch_size": batch_size})
    section, state = SimpleNamespace(config=config), ppo.State(moments=(2, 5.0, 8.0))  # as after the scores 3 and 7
    assert ppo.whitening(config) == used
    got = ppo.final_scores(section, scored_as([1.0, 3.0, 8.0], [True, True, False]), state).tolist()
    if used == "none":
        assert got == [1.0, 3.0, -1.0] and state.moments == (2, 5.0, 8.0)
        return
    seen = [1.0, 3.0, 8.0] if used == "batch" else [3.0, 7.0, 1.0, 3.0, 8.0]
    mean, deviation = statistics.fmean(seen), statistics.pstdev(seen)
    assert got == pytest.approx([(1 - mean) / deviation, (3 - mean) / deviation, -1.0], abs=1e-5)  # capped after whitening
    assert state.moments == ((2, 5.0, 8.0) if used == "batch" else pytest.approx((5, mean, 5 * deviation ** 2)))


# -- options -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, paid", [("k1", [0.3, -0.2]), ("abs", [0.3, 0.2]), ("k2", [0.045, 0.02]),
                                        ("k3", [math.exp(-0.3) - 1 + 0.3, math.exp(0.2) - 1 - 0.2])])
def test_what_a_tokens_kl_costs(kind, paid):
    """log-ratios 0.3 and -0.2, a third token that does not count; beta 0.1, score 2 on the last. What is told stays the plain sum."""
    old, ref, mask = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.3, -1.8, 0.0]]), torch.tensor([[True, True, False]])
    rewards, kl = ppo.credit.token_rewards(torch.tensor([2.0]), old, ref, mask, 0.1, kind)
    assert rewards[0].tolist() == pytest.approx([-0.1 * paid[0], 2 - 0.1 * paid[1], 0.0], abs=1e-6) and kl.tolist() == pytest.approx([0.1])


def test_values_need_not_be_clipped():
    values, old, returns = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0])
    loss, clipped = ppo.losses.value(values, old, returns, None)
    assert loss.tolist() == [2.0, 0.5] and not clipped.any()
    assert ppo.losses.value(values, old, returns, 0.2)[1].tolist() == [True, False]


def test_scores_may_be_clipped(engine):
    config = engine.section.config.model_copy(update={"whiten": "none", "score_clip": 5.0, "unfinished_score": None})
    got = ppo.final_scores(SimpleNamespace(config=config), scored_as([-7.0, 3.0, 8.0], [True, True, False]), ppo.State())
    assert got.tolist() == [-5.0, 3.0, 5.0]


def test_several_passes_over_an_iteration(engine):
    once, twice = one_update(engine), one_update(engine, passes=2)
    assert [len(x.used["policy"]) for x in (once, twice)] == [2, 4]
    for a, b in zip(once.used["policy"], twice.used["policy"], strict=False):
        assert all(map(torch.equal, a, b))
    assert twice.stats["ratio_deviation"] > once.stats["ratio_deviation"] > 0  # means over all steps


def test_the_entropy_is_that_of_the_policys_distribution(engine):
    got = one_update(engine, entropy=True)
    for n, p in engine.roles.base.named_parameters():
        p.data.copy_(engine.start[n])
    engine.roles.use("policy")
    found = []
    with torch.no_grad():
        for ids, answer in sequences(engine):
            logits = engine.roles.base(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, len(ids) - 1:-1]
            found += torch.distributions.Categorical(logits=logits.double() / 0.5).entropy().tolist()
    assert got.rollout.entropy == pytest.approx(statistics.fmean(found), abs=1e-4)
    assert one_update(engine).rollout.entropy is None


def test_a_rollout_that_memory_cuts_smaller_is_the_same_rollout(engine, monkeypatch):
    """Every pass of it runs out once; the entropy counts no token twice."""
    whole = one_update(engine, entropy=True, micro_batch_tokens=1024)
    manifest, real, left = copy.deepcopy(engine.section.manifest), Roles.hidden, Counter()

    def hidden(self, name, batch):
        left.update([name])
        if left[name] == 2 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, name, batch)

    monkeypatch.setattr(Roles, "hidden", hidden)
    got = one_update(engine, entropy=True, micro_batch_tokens=1024)
    told, engine.section.manifest = engine.section.manifest, manifest
    assert len(told["inexact_because"]) == 3 and len(list(got.batches.flat())) > len(list(whole.batches.flat()))
    for name in ("old_logprobs", "ref_logprobs", "values"):
        assert torch.allclose(getattr(got.rollout, name), getattr(whole.rollout, name), atol=1e-5), name
    assert got.rollout.entropy == pytest.approx(whole.rollout.entropy, abs=1e-5) and got.stats["ratio_deviation"] == pytest.approx(
        whole.stats["ratio_deviation"], rel=1e-2)


# -- it learns -----------------------------------------------------------------------------------------------------------------------


class Toy:
    """Rewards an answer for its share of tokens whose embedding starts with a positive number: half of all tokens, linear in the
    output matrix, so that the tiny model can learn it (its logits cannot grow without bound)."""

    threshold, threshold_note, statistics = -1e9, "toy", {}

    def __init__(self, roles, sign: float):
        table = roles.base.get_input_embeddings().weight
        self.good, self.sign = {i for i, x in enumerate(table[:, 0].tolist()) if x > 0}, sign

    def __call__(self, prompts, answers):
        scores = [[self.sign * sum(t in self.good for t in a) / len(a) for a in group] for group in answers]
        return {"helpfulness": scores, "safety": scores}


def toy_run(factory, monkeypatch, sign: float, **changed):
    monkeypatch.setattr(ppo, "load_scorer", lambda section, roles, *rest: Toy(roles, sign))
    stage = STAGE | {"policy": "base", "iterations": 15, "batch_size": 32, "temperature": 0.25, "unfinished_score": 100.0, "eval_every": 5,
                     "micro_batch_tokens": 2048, "save_steps": 50, "kl_coef": 0.01}
    section = ran(factory, factory.mktemp("toy"), stage | changed)
    return section, iterations(section)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_learns_what_is_rewarded(tmp_path_factory, monkeypatch, sign):
    """At first about half to two thirds of the tokens are good. A batch's share scatters by sqrt(0.25 / (32 * 10)) = 0.03 at most, more
    for whole answers that agree (0.09); the demanded change of 0.25 is out of reach for chance, and both directions must come."""
    section, rows = toy_run(tmp_path_factory, monkeypatch, sign)
    reward, kl = [r["ppo/merged_reward"] for r in rows], [r["ppo/kl"] for r in rows]
    assert statistics.fmean(reward[-3:]) > reward[0] + 0.25
    assert (statistics.fmean(reward[-3:]) > 0.85) if sign > 0 else (statistics.fmean(reward[-3:]) > -0.2)
    assert all(math.isfinite(x) for x in kl) and 0.5 < kl[-1] < 40
    held = section.results()["watched"]
    assert held["paired_difference"]["mean"] == pytest.approx(held["best"]["mean"] - held["start"]["mean"], abs=1e-5)
    assert held["paired_difference"]["mean"] > 2 * held["standard_error"] > 0 and held["paired_difference"]["low"] > 0
    assert section.results()["best_iteration"] >= 5


def test_a_high_price_on_kl_keeps_the_policy_at_home(tmp_path_factory, monkeypatch):
    """beta 1: a nat costs a standard deviation of the score. The same run that went 5 nats and more away stays within one."""
    _, rows = toy_run(tmp_path_factory, monkeypatch, 1.0, kl_coef=1.0)
    assert max(r["ppo/kl"] for r in rows) < 1.5


class PromptLength(Toy):
    """A reward that the prompt alone decides: the critic can know it, the policy can't change it."""

    def __call__(self, prompts, answers):
        scores = [[float(len(p)) for _ in group] for p, group in zip(prompts, answers, strict=True)]
        return {"helpfulness": scores, "safety": scores}


def test_the_critic_learns_and_its_warm_up_ends_when_it_explains_enough(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(ppo, "load_scorer", lambda section, roles, *rest: PromptLength(roles, 1.0))
    stage = STAGE | {"policy": "base", "batch_size": 64, "learning_rate": 1e-4, "critic_learning_rate": 3e-3, "critic_warmup": 4,
                     "unfinished_score": 100.0, "micro_batch_tokens": 2048, "save_steps": 50, "eval_every": 50}
    section = ran(tmp_path_factory, tmp_path_factory.mktemp("critic"), stage)
    assert section.results()["warmup_rounds"] < 4  # it stopped by itself
    explained = [r["ppo/explained_variance"] for r in iterations(section)]
    assert explained[0] > 0.2 and explained[-1] > 0.6


# -- kills -----------------------------------------------------------------------------------------------------------------------------


def renaming(name):
    return lambda self, target: self.name == name


KILLS = {
    "in the warm-up": lambda m: die(m, ppo, "critic_pass", 2),
    "before the warm-up's checkpoint is sealed": lambda m: die(m, ppo.checkpoint, "complete", 1),
    "between seal and rename of the warm-up's checkpoint": lambda m: die(m, Path, "rename", 1, renaming("checkpoint.tmp")),
    "before the first best is in place": lambda m: die(m, Path, "rename", 1, renaming("best.tmp")),
    "while iteration 1 samples": lambda m: die(m, ppo, "collect", 1, lambda *args: args[-1] == 1),
    "in the middle of iteration 2's update": lambda m: die(m, ppo.losses, "value", 1, deep(ppo.losses, 7)),
    "when iteration 2 is told, after its best is kept": lambda m: die(m, Log, "metrics", 1, lambda self, step, row: step == 2),
    "before iteration 2's checkpoint is sealed": lambda m: die(m, ppo.checkpoint, "complete", 2),
    "between seal and rename of iteration 2's checkpoint": lambda m: die(m, Path, "rename", 2, renaming("checkpoint.tmp")),
    "before old checkpoints are dropped": lambda m: die(m, ppo.checkpoint, "drop_old", 2),
    "when iteration 3 is told": lambda m: die(m, Log, "metrics", 1, lambda self, step, row: step == 3),
    "before the model is in place": lambda m: die(m, Path, "rename", 1, renaming("model.tmp")),
    "before DONE": lambda m: die(m, Section, "finish", 1),
}


def deep(owner, n: int):
    """True from the n-th question on."""
    asked = []

    def late(*args):
        asked.append(1)
        return len(asked) >= n

    return late


def again(section) -> Section:
    """The same command once more: a new Run on the same folder."""
    fresh = started(Run(section.recipe), "ppo")
    ppo.run(fresh)
    return fresh


@pytest.mark.parametrize("where", KILLS)
def test_killed_and_started_again_it_ends_in_the_same_bytes(watched, tmp_path_factory, where):
    section = started(make_run(tmp_path_factory, tmp_path_factory.mktemp("killed"), {"ppo": STAGE}), "ppo")
    with pytest.MonkeyPatch.context() as monkeypatch:
        KILLS[where](monkeypatch)
        with pytest.raises(Killed):
            ppo.run(section)
    assert section.state() == "started"
    assert outcome(again(section)) == outcome(watched[0])


def test_killed_three_times_with_a_damaged_checkpoint_it_ends_in_the_same_bytes(watched, tmp_path_factory):
    """Long enough ago for two checkpoints; the newest loses a byte, the one before it serves."""
    section = started(make_run(tmp_path_factory, tmp_path_factory.mktemp("killed"), {"ppo": STAGE}), "ppo")
    for where in ("in the warm-up", "when iteration 3 is told"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            KILLS[where](monkeypatch)
            with pytest.raises(Killed):
                ppo.run(section)
        section = started(Run(section.recipe), "ppo")
    with pytest.MonkeyPatch.context() as monkeypatch:
        KILLS["before the model is in place"](monkeypatch)
        with pytest.raises(Killed):
            ppo.run(section)
    names = sorted(p.name for p in section.folder.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]
    file = section.folder / "checkpoint-4" / "policy_optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert outcome(again(section)) == outcome(watched[0])


def test_going_on_with_another_number_of_processes_is_told(engine, monkeypatch, tmp_path):
    said = []
    section = SimpleNamespace(decide=lambda key, choose: 2, inexact=said.append, folder=tmp_path, log=SimpleNamespace(say=None, rewind=lambda n: None))
    section.same_processes = lambda: Section.same_processes(section)
    ppo.checkpoint.resume(section, None, None, None)
    assert said == ["begun with 2 process(es), it goes on with 1"]


def test_full_fine_tuning_keeps_five_models_apart_and_survives_a_kill(tmp_path_factory):
    """Without adapters every role is a model of its own."""
    shared, changed = parents(tmp_path_factory.getbasetemp()), ["model.lora=null"]
    changed += [f"stages.{name}.learning_rate=1e-3" for name in ("sft", "reward_helpfulness", "reward_safety")]
    stage = {"ppo": STAGE | {"learning_rate": 1e-3, "critic_learning_rate": 1e-3}}
    straight = Run(recipe(shared, tmp_path_factory.mktemp("full"), stage, overrides=changed))
    run_sections(straight, ["sft", "reward_helpfulness", "reward_safety"])
    cut = Run(recipe(shared, tmp_path_factory.mktemp("full"), stage, overrides=changed))
    for name in ("sft", "reward_helpfulness", "reward_safety"):
        shutil.copytree(straight.folder / name, cut.folder / name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = {}
        real_load, real_finish = ppo.load_roles, ppo.finish

        def weights(roles):
            return {name: [p.detach().clone() for p in role.net.parameters()] for name, role in roles.roles.items()}

        def load(*args):
            roles, scorer = real_load(*args)
            seen["before"] = weights(roles)
            return roles, scorer

        def finish(section, roles, *rest):
            seen["after"] = weights(roles)
            real_finish(section, roles, *rest)

        monkeypatch.setattr(ppo, "load_roles", load)
        monkeypatch.setattr(ppo, "finish", finish)
        ppo.run(started(straight, "ppo"))
    same = {name: all(map(torch.equal, seen["before"][name], after)) for name, after in seen["after"].items()}
    assert same == {"policy": False, "critic": False, "reference": True, "helpfulness": True, "safety": True}
    section = started(cut, "ppo")
    with pytest.MonkeyPatch.context() as monkeypatch:
        KILLS["when iteration 3 is told"](monkeypatch)
        with pytest.raises(Killed):
            ppo.run(section)
    assert outcome(again(section)) == outcome(straight.section("ppo"))
    assert abs(iterations(section)[0]["ppo/kl"]) < 1e-5 < iterations(section)[-1]["ppo/kl"]


def test_everything_is_told_once_and_only_what_is_needed_stays(watched):
    section = watched[0]
    rows = read_lines(section.folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in rows if "ppo/watched_merged_reward" in r] == [0, 2, 4]
    assert all(math.isfinite(v) for r in rows for v in r.values() if v is not None)
    kept = ["DONE", "config.yaml", "manifest.json", "metrics.jsonl", "model", "results.json", "samples.jsonl"]
    assert sorted(p.name for p in section.folder.iterdir()) == kept
    samples = read_lines(section.folder / "samples.jsonl")
    assert Counter(r["step"] for r in samples) == {1: 4, 2: 4, 4: 4}
    assert not list((section.folder / "model").glob("*.bin")) and not list((section.folder / "model").glob("*.pt"))


def test_a_large_batch_warms_up_round_by_round_and_survives_a_kill(tmp_path_factory, monkeypatch):
    """At 128 answers and more (here: 16) a batch is whitened by itself; every warm-up round has a rollout and a checkpoint of its own."""
    monkeypatch.setattr(ppo, "WHITEN_ALONE", 16)
    stage = STAGE | {"critic_warmup": 3, "critic_warmup_target": 1.0, "iterations": 2}
    straight = ran(tmp_path_factory, tmp_path_factory.mktemp("rounds"), stage)
    assert straight.results()["warmup_rounds"] == 3 and straight.results()["whitening"] == "batch"
    section = started(make_run(tmp_path_factory, tmp_path_factory.mktemp("rounds"), {"ppo": stage}), "ppo")
    with monkeypatch.context() as m:
        die(m, ppo, "critic_pass", 3)
        with pytest.raises(Killed):
            ppo.run(section)
    told = json.loads((section.folder / "checkpoint-0" / "state.json").read_text())
    assert told["warmup_rounds"] == 2 and not told["warm"]
    assert outcome(again(section)) == outcome(straight)


def test_without_a_warm_up_the_critic_starts_with_the_policy(tmp_path_factory, monkeypatch):
    spy = Spy(monkeypatch)
    section = ran(tmp_path_factory, tmp_path_factory.mktemp("cold"), STAGE | {"critic_warmup": 0, "iterations": 1})
    assert section.results()["warmup_rounds"] == 0 and not spy.of("critic_pass") and spy.steps == {"policy": 2, "critic": 2}


def test_several_samples_a_prompt(tmp_path_factory, monkeypatch):
    spy = Spy(monkeypatch)
    ran(tmp_path_factory, tmp_path_factory.mktemp("several"), STAGE | {"samples_per_prompt": 4, "iterations": 1, "critic_warmup": 0})
    (_, scored), = spy.of("collect")
    (_, (batches, rollout)), = spy.of("make_rollout")
    assert len(scored.prompts) == 4 and scored.merged.shape == (4, 4) and rollout.scores.shape == (16,) and len(batches.mini) == 2
    for wheres in batches.where:  # two prompts with all their answers
        numbers = sorted(n for w in wheres for n in w.tolist())
        assert len(numbers) == 8 and all(c == 4 for c in Counter(n // 4 for n in numbers).values())
    assert spy.steps == {"policy": 2, "critic": 2} and spy.of("tripwire")[0][0][2] == pytest.approx(0, abs=2e-6)


# -- early stop and the best checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_kl, patience, best, stop", [
    (10.0, 2, 2, 4),  # the peak at 3 is too far away; 3 and 4 are no better than 2
    (None, 2, 3, 5),  # 4 and 5 are no better than 3
    (None, 9, 3, 7),  # to the end
])
def test_the_best_checkpoint_within_reach_is_the_output(tmp_path_factory, monkeypatch, max_kl, patience, best, stop):
    """Watched rewards by iteration 0.. : 0, 1, 2, 9 (50 nats away), 1, 1.5, 0, 0."""
    rewards, far, weights, calls = [0.0, 1.0, 2.0, 9.0, 1.0, 1.5, 0.0, 0.0], {3}, {}, []

    def scripted(section, roles, scorer, looked):
        i = len(calls)
        calls.append(i)
        weights[i] = [p.detach().clone() for p in roles["policy"].parameters()]
        return [{"merged": rewards[i] + d, "kl": 50.0 if i in far else 1.0, "prompt": k} for d, k in ((-0.5, "a"), (0.5, "b"))]

    monkeypatch.setattr(ppo, "evaluate", scripted)
    stage = STAGE | {"iterations": 7, "eval_every": 1, "save_steps": 3, "max_kl": max_kl, "patience": patience, "critic_warmup": 0}
    section = ran(tmp_path_factory, tmp_path_factory.mktemp("best"), stage)
    told = section.results()
    assert (told["best_iteration"], told["iterations"], told["stopped_early"]) == (best, stop, stop < 7)
    saved = load_file(section.folder / "model" / "adapter_model.safetensors")
    assert len(saved) == len(weights[best])
    assert all(any(v.shape == p.shape and torch.equal(v, p) for v in saved.values()) for p in weights[best])
    assert not all(any(v.shape == p.shape and torch.equal(v, p) for v in saved.values()) for p in weights[best - 1])
    assert told["watched"]["best"]["mean"] == rewards[best] and told["watched"]["start"]["mean"] == 0.0
    assert told["watched"]["paired_difference"]["mean"] == rewards[best]


# -- numbers that are none -------------------------------------------------------------------------------------------------------------


def test_a_nan_in_the_middle_stops_with_the_last_checkpoint_kept_and_nothing_lost(watched, tmp_path_factory):
    section = started(make_run(tmp_path_factory, tmp_path_factory.mktemp("nan"), {"ppo": STAGE}), "ppo")
    real, late = ppo.losses.policy, deep(None, 14)

    def poisoned(*args):
        loss, *rest = real(*args)
        return (loss * float("nan") if late() else loss, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ppo.losses, "policy", poisoned)
        with pytest.raises(PosttrainError, match=r"the policy's gradient norm became nan.*the last checkpoint is kept"):
            ppo.run(section)
    assert (section.folder / "checkpoint-2").exists()
    assert outcome(again(section)) == outcome(watched[0])


def test_a_reward_model_that_answers_nan_is_told_at_once(tmp_path_factory, monkeypatch):
    class Broken(Toy):
        def __call__(self, prompts, answers):
            return {"helpfulness": [[0.0] * len(g) for g in answers], "safety": [[float("nan")] * len(g) for g in answers]}

    monkeypatch.setattr(ppo, "load_scorer", lambda section, roles, *rest: Broken(roles, 1.0))
    with pytest.raises(PosttrainError, match="safety scores are not finite"):
        ran(tmp_path_factory, tmp_path_factory.mktemp("broken"), STAGE)
