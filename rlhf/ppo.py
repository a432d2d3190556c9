"""PPO as in the paper (section 3.2.3; method.md 4.2-4.4 and 10): policy, frozen reference, critic and two reward models as roles
on one base; the gate; scores whitened before the KL term; per-token KL; GAE; clipped losses; one gradient step per mini-batch.

The loop is `run`; the maths is in gate.py, credit.py and losses.py, the sampling in rollout.py, what survives a kill in checkpoint.py.
Several processes walk the loop in step (posttrain/distributed.py): each samples, scores and differentiates its share of the answers, and
everything in between (whitening, rewards, advantages, statistics, decisions) is computed by each from the tensors of the whole batch.
"""

import random
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from posttrain import distributed, stopping
from posttrain.chunks import derive_seed, with_fewer_rows
from posttrain.data import prompt_key
from posttrain.errors import PosttrainError
from posttrain.generate import Sampling
from posttrain.log import read_lines
from posttrain.models import Roles, roles_for, source_of
from posttrain.packing import MicroBatch
from posttrain.runs import Section
from posttrain.statistics import interval, standard_error
from posttrain.tensors import masked_mean, token_entropy, whiten
from posttrain.training import budget_of, memory_taken, smaller_budget
from reward.score import Scorer, load_scorer
from rlhf import checkpoint, credit, gate, losses
from rlhf.checkpoint import State
from rlhf.config import few_prompts
from rlhf.rollout import Batches, Encoded, Rollout, Scored, answer_trees, encode_prompts, exact_kl, make_batches, rows_at_once, sample_and_score, table

PAPER_RATE, ADAPTER_RATE, CRITIC_RATE, ADAPTER_CRITIC_RATE = 1e-6, 1e-5, 1e-5, 1e-4
WHITEN_ALONE = 128  # samples an iteration needs to be whitened by its own statistics (method.md 10.1)
KL_TO_WARN = 50.0  # nats per answer, where the recipe sets no max_kl
FEW_FINISHED = 0.2
RATIO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def run(section: Section) -> None:
    config = section.config
    if config.algorithm != "ppo":
        from rlhf import trl_algorithms

        return trl_algorithms.run(section)
    # 1. five roles on one base
    roles = roles_for(section)
    prompts, watched = split_prompts(section, roles)  # before a model loads
    roles, scorer = load_roles(section, roles)
    policy_optimizer, critic_optimizer = optimizers(section, roles)
    rows_at_once(section, roles, prompts + watched)  # decided here, where all prompts are known
    state = checkpoint.resume(section, roles, policy_optimizer, critic_optimizer)
    announce(section, scorer, prompts, watched)

    # 2. the critic learns what a whitened return is before the policy listens to it
    while not state.warm:
        warm_up(section, roles, scorer, critic_optimizer, prompts, state)
        checkpoint.save(section, roles, policy_optimizer, critic_optimizer, state)

    # 3. how the starting policy does on prompts PPO never trains on
    if not state.start_rows:
        state.start_rows = state.best_rows = evaluate(section, roles, scorer, watched)
        keep_best(section, roles, state, state.start_rows, 0)
        section.log.metrics(0, watched_metrics(state.start_rows))

    warned: set[str] = set()
    with (checkpoint.saved_when_stopped(section, roles, policy_optimizer, critic_optimizer, state),
          section.log.progress(config.iterations, "PPO", "iteration", state.iteration) as ticker):
        while state.iteration < config.iterations and state.worse < config.patience:
            clock = [time.time()]

            # 4. sample answers from the policy and score them with both reward models; a signal ends it, and the policy is still the one before
            scored = collect(section, roles, scorer, prompts, state.iteration + 1)
            state.iteration += 1
            clock.append(time.time())

            # 5. log-probabilities, reference log-probabilities and values, in the batches the update will use
            batches, rollout = make_rollout(section, roles, scored, state)
            clock.append(time.time())

            # 6. rewards per token, advantages, returns
            rewards, kl = credit.token_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, rollout.response_mask, config.kl_coef,
                                               config.kl_estimator)
            advantages, returns = credit.gae(rewards, rollout.values, rollout.response_mask, config.gamma, config.gae_lambda)
            advantages = whiten(advantages, rollout.response_mask)

            # 7. one gradient step per mini-batch, policy and critic
            stats = update(section, roles, batches, rollout, advantages, returns, policy_optimizer, critic_optimizer)
            clock.append(time.time())

            # 8. tell, look, keep
            row = iteration_metrics(scored, rollout, kl, returns, stats, clock)
            warn(section, row, kl, warned)
            if state.iteration % config.eval_every == 0 or state.iteration == config.iterations:
                rows = evaluate(section, roles, scorer, watched)
                row |= watched_metrics(rows)
                keep_best(section, roles, state, rows, state.iteration)
            section.log.metrics(state.iteration, row)
            if state.iteration % config.sample_every == 0 or state.iteration == 1:
                section.log.samples(sample_rows(scored, kl, roles, state.iteration))
            if state.iteration % config.save_steps == 0 or state.iteration == config.iterations:
                checkpoint.save(section, roles, policy_optimizer, critic_optimizer, state)
            ticker.advance(1, note=f"reward {row['ppo/merged_reward']:.3f}, KL {row['ppo/kl']:.2f}")
            stopping.check_together()
    finish(section, roles, scorer, state)


# -- setting up ----------------------------------------------------------------------------------------------------------------


def load_roles(section: Section, roles: Roles | None = None) -> tuple[Roles, Scorer]:
    """policy and critic trainable, the others frozen. The reference is a copy of what the policy starts from (method.md 10.5);
    the critic starts as the helpfulness model with a zero head (10.7)."""
    config = section.config
    roles = roles or roles_for(section)
    start = source_of(section, config.policy)
    torch.manual_seed(section.seed)
    roles.add("policy", start, trainable=True)
    roles.add("reference", start)
    if config.algorithm == "ppo":
        roles.add("critic", source_of(section, config.helpfulness), trainable=True, head="zero", fresh_adapter=False)
    budget = budget_of(section, roles, roles["policy"])
    scorer = load_scorer(section, roles, config.helpfulness, config.safety, config.safety_threshold, budget)
    return roles, scorer


def optimizers(section: Section, roles: Roles) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    c, adapters = section.config, roles["policy"].adapter is not None
    rates = (c.learning_rate or (ADAPTER_RATE if adapters else PAPER_RATE), c.critic_learning_rate or (ADAPTER_CRITIC_RATE if adapters else CRITIC_RATE))
    return tuple(torch.optim.AdamW(roles[name].parameters(), lr=rate, betas=(c.adam_beta1, c.adam_beta2), eps=c.adam_epsilon,
                                   weight_decay=c.weight_decay) for name, rate in zip(("policy", "critic"), rates, strict=True))


def split_prompts(section: Section, roles: Roles) -> tuple[list[Encoded], list[Encoded]]:
    """Prompts to train on, and those kept aside for early stopping. The recipe's held-out prompts are neither: they judge later."""
    config = section.config
    found = [p for name in config.prompts for p in section.run.data_of(name).train]
    encoded = encode_prompts(section, found, roles, config.max_prompt_tokens)
    random.Random(derive_seed(section.seed, "watched")).shuffle(encoded)
    n = min(config.eval_prompts, len(encoded) // 2)
    keys = {prompt_key(e.prompt) for e in encoded[:n]}
    train = [e for e in encoded[n:] if prompt_key(e.prompt) not in keys]
    need = config.batch_size // config.samples_per_prompt
    if not train or n < 2:
        raise few_prompts(section.place, [e.prompt for e in encoded])
    if len(train) < need:
        section.log.say(f"note: {len(train)} prompts for iterations of {need}: every iteration sees each prompt more than once")
    return train, encoded[:n]


def iteration_prompts(prompts: list[Encoded], need: int, seed: int, iteration: int) -> list[Encoded]:
    """Iteration i's prompts: an endless stream of shuffled passes, cut into pieces of `need`; a function of (seed, i) alone."""
    start, out = (iteration - 1) * need, []
    while len(out) < need:
        epoch, at = divmod(start + len(out), len(prompts))
        order = list(range(len(prompts)))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        out += [prompts[i] for i in order[at:at + need - len(out)]]
    return out


def announce(section: Section, scorer: Scorer, prompts, watched) -> None:
    c, processes = section.config, f"{distributed.world()} processes; " if distributed.world() > 1 else ""
    section.log.say(f"{len(prompts)} prompts, {len(watched)} watched for early stopping; {c.iterations} iterations of {c.batch_size} answers, "
                    f"{-(-c.batch_size // c.mini_batch_size) * c.passes} steps each; {processes}beta {c.kl_coef:g}; whitening: {whitening(c)}; "
                    f"gate: {scorer.threshold_note}")


# -- one iteration ---------------------------------------------------------------------------------------------------------------


def collect(section: Section, roles: Roles, scorer: Scorer, prompts: list[Encoded], iteration: int) -> Scored:
    c = section.config
    chosen = iteration_prompts(prompts, c.batch_size // c.samples_per_prompt, section.seed, iteration)
    alone = distributed.world() == 1  # of several processes none may end before the others, nor begin again without them

    def work() -> Scored:
        return sample_and_score(roles, "policy", scorer, chosen, c.samples_per_prompt, Sampling(c.max_new_tokens, c.temperature),
                                derive_seed(section.seed, "sample", iteration), rows_at_once(section, roles, prompts),
                                (lambda tokens: stopping.check()) if alone else None)

    return with_fewer_rows(section, work) if alone else work()


def whitening(config) -> str:
    if config.whiten != "auto":
        return config.whiten
    return "batch" if config.batch_size >= WHITEN_ALONE else "running"


def final_scores(section: Section, scored: Scored, state: State) -> Tensor:
    """(B,) merged scores, whitened, clipped where the recipe says so and, for answers that were cut off, capped."""
    merged, kind = scored.merged.flatten(), whitening(section.config)
    if kind == "batch":
        merged = gate.whiten_scores(merged)
    elif kind == "running":
        state.moments = gate.update_moments(state.moments, merged)
        merged = gate.whiten_running(merged, state.moments)
    if section.config.score_clip is not None:
        merged = merged.clamp(-section.config.score_clip, section.config.score_clip)
    ceiling = section.config.unfinished_score
    return merged if ceiling is None else gate.cap_unfinished(merged, scored.finished.flatten(), ceiling)


def make_rollout(section: Section, roles: Roles, scored: Scored, state: State) -> tuple[Batches, Rollout]:
    c, trees = section.config, answer_trees(scored)
    order = list(range(len(trees)))
    random.Random(derive_seed(section.seed, "mini-batches", state.iteration, state.warmup_rounds)).shuffle(order)
    batches = make_batches(trees, c.mini_batch_size, budget_of(section, roles, roles["policy"]), roles, order)
    entropies = []

    def policy(batch: MicroBatch) -> Tensor:
        hidden = roles.hidden("policy", batch)
        if c.entropy:
            entropies.append(token_entropy(hidden[batch.predictors], roles.vocabulary("policy"), c.temperature).sum().item())
        return roles.logprobs_of("policy", hidden, batch, c.temperature)

    quantized = section.recipe.model.quantization != "none"  # its kernels differ with and without gradients: use the trainer's
    sampled = roles.dtype == torch.float32 and not quantized and not c.entropy and roles.engine is None  # the sampler's are exact: one pass less
    with torch.set_grad_enabled(quantized):
        if sampled:
            old = sampled_logprobs(scored, batches)
        else:
            batches, old = table(section, roles, batches, policy)
        entropies = entropies[len(entropies) - sum(map(len, batches.mini)):]  # of the attempt that memory sufficed for
        batches, ref = table(section, roles, batches, lambda batch: roles.logprobs("reference", batch, c.temperature))
        batches, values = table(section, roles, batches, lambda batch: values_of(roles, batch))
    entropy = sum(distributed.gather(sum(entropies))) / sum(batches.counts) if c.entropy else None
    scores = final_scores(section, scored, state).to(roles.device)
    return batches, Rollout(batches.response_mask, old, ref, values, scores.float(), entropy).check()


def sampled_logprobs(scored: Scored, batches: Batches) -> Tensor:
    """(B, R) what the sampler recorded, at its temperature."""
    mask = batches.response_mask
    full = torch.zeros(mask.shape, device=mask.device)
    full[mask] = torch.tensor([lp for group in scored.answers for a in group for lp in a.logprobs], device=mask.device)
    return full


def values_of(roles: Roles, batch: MicroBatch) -> Tensor:
    """(N,) the critic's value of the state before each counted token."""
    return roles.scalars_at("critic", roles.hidden("critic", batch), batch.predictors)


def update(section: Section, roles: Roles, batches: Batches, rollout: Rollout, advantages: Tensor, returns: Tensor,
           policy_optimizer, critic_optimizer) -> dict[str, float]:
    """Every mini-batch is one step of both optimizers; losses are means over the mini-batch's tokens, of all processes together."""
    c, stats, tokens, steps = section.config, {}, 0, len(batches.mini) * section.config.passes

    def gradients(minis, wheres, count: int) -> dict[str, float]:
        sums = dict.fromkeys(("policy_loss", "value_loss", "ratio", "ratio_deviation", "clip_fraction", "value_clip_fraction", "policy_kl"), 0.0)
        for batch, where in zip(minis, wheres, strict=True):
            def of(full, batch=batch, where=where):
                return batches.of(batch, where, full)

            logprobs = roles.logprobs("policy", batch, c.temperature)
            loss, ratio, clipped = losses.policy(logprobs, of(rollout.old_logprobs), of(advantages), c.clip_range)
            (loss.sum() / count).backward()  # before the critic's forward: with checkpointing a role's backward must end first
            values = values_of(roles, batch)
            value_loss, value_clipped = losses.value(values, of(rollout.values), of(returns), c.value_clip_range)
            (value_loss.sum() / count).backward()
            for key, x in (("policy_loss", loss), ("value_loss", value_loss), ("ratio", ratio), ("ratio_deviation", (ratio - 1).abs()),
                           ("clip_fraction", clipped), ("value_clip_fraction", value_clipped),
                           ("policy_kl", of(rollout.old_logprobs) - logprobs)):
                sums[key] += x.detach().float().sum().item()
        return sums

    for step, (sums, count) in enumerate(mini_batches(section, roles, batches, gradients, c.passes)):
        sums = distributed.add_numbers(sums)
        if step == 0:
            tripwire(section, roles, sums["ratio_deviation"] / count)
        for name, optimizer in (("policy", policy_optimizer), ("critic", critic_optimizer)):
            norm = step_of(section, roles, name, optimizer)
            stats[f"{name}_grad_norm"] = stats.get(f"{name}_grad_norm", 0.0) + norm / steps
        tokens += count
        for key, x in sums.items():
            stats[key] = stats.get(key, 0.0) + x
    return {k: v if k.endswith("grad_norm") else v / tokens for k, v in stats.items()}


def mini_batches(section: Section, roles: Roles, batches: Batches, gradients: Callable, passes: int = 1) -> Iterator[tuple]:
    """What gradients(micro-batches, answers of each, tokens) gives for every mini-batch, and the tokens. Where the GPU's memory runs out, that
    mini-batch and all after it are cut smaller."""
    for i in [*range(len(batches.mini))] * passes:
        while True:
            try:
                told = gradients(batches.mini[i], batches.where[i], batches.counts[i])
                break
            except torch.OutOfMemoryError:
                for p in [*roles["policy"].parameters(), *roles["critic"].parameters()]:
                    p.grad = None
            batches = batches.smaller(smaller_budget(section, budget_of(section, roles, roles["policy"]), batches.mini[i]))
        yield told, batches.counts[i]
    if distributed.world() > 1:
        section.settle("micro_batch_tokens")


def step_of(section: Section, roles: Roles, name: str, optimizer) -> float:
    """One optimizer step of a role from the gradients of all processes, clipped. Returns their norm before the clip; raises where it is no number."""
    distributed.add_gradients(roles[name].parameters())
    norm = torch.nn.utils.clip_grad_norm_(roles[name].parameters(), section.config.max_grad_norm)
    if not torch.isfinite(norm):
        raise PosttrainError(section.place, f"the {name}'s gradient norm became {norm.item()}", "a finite number",
                             "Lower the learning rate or set model.dtype: float32; the last checkpoint is kept.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def tripwire(section: Section, roles: Roles, deviation: float) -> None:
    """Before the first step the policy is the sampler: its ratio must be 1."""
    if deviation > RATIO_TOLERANCE.get(roles.dtype, 2e-2):
        raise PosttrainError(section.place, f"the first mini-batch's ratio differs from 1 by {deviation:.4f} on average", "1 before any step",
                             "Sampler and trainer disagree; please report this.")


def warn(section: Section, row: dict, kl: Tensor, warned: set[str]) -> None:
    """Signs that PPO goes wrong without a number becoming infinite. Each is told once a process; the run goes on.

    row: the iteration's metrics; kl (B,) log p_policy - log p_reference of each sampled answer, whose mean can't be far below 0.
    """
    error = kl.std().item() / len(kl) ** 0.5 if len(kl) > 1 else float("inf")
    mean, limit = row["ppo/kl"], section.config.max_kl or KL_TO_WARN
    signs = {
        "kl_sign": (mean < -3 * error and mean < -0.5, f"the KL estimate is {mean:.2f} nats, {-mean / max(error, 1e-9):.1f} standard errors below 0: "
                    "the sampler's and the trainer's log-probabilities may disagree; compare model.dtype: float32"),
        "kl_size": (mean > limit, f"the policy is {mean:.1f} nats from its start (limit {limit:g}): raise kl_coef or lower learning_rate"),
        "finished": (row["ppo/finished"] < FEW_FINISHED, f"only {row['ppo/finished']:.0%} of the answers came to their end: raise max_new_tokens"
                     + (", or set unfinished_score" if section.config.unfinished_score is None else "")),
    }
    for name, (wrong, text) in signs.items():
        if wrong and name not in warned:
            warned.add(name)
            section.log.say(f"warning: {text}")


# -- the critic's warm-up ----------------------------------------------------------------------------------------------------------


def warm_up(section: Section, roles: Roles, scorer: Scorer, optimizer, prompts, state: State) -> None:
    """Critic-only passes until it explains `critic_warmup_target` of the variance of returns it has not trained on
    (method.md 10.7). Small batches: up to 4 passes over a first rollout, judged on a second; else a fresh rollout a round."""
    c = section.config
    if c.critic_warmup == 0:
        state.warm = True
        return
    if c.batch_size >= WHITEN_ALONE:
        one = [rollout_for_critic(section, roles, scorer, prompts, state, -state.warmup_rounds)]
        explained = critic_fit(*one[0])
        if explained < c.critic_warmup_target:
            critic_pass(section, roles, optimizer, one[0])
        state.warmup_rounds += 1
        state.warm = explained >= c.critic_warmup_target or state.warmup_rounds >= c.critic_warmup
    else:
        first, second = (rollout_for_critic(section, roles, scorer, prompts, state, -i) for i in (0, 1))
        for _ in range(min(4, c.critic_warmup)):
            critic_pass(section, roles, optimizer, first)
            state.warmup_rounds += 1
            explained = critic_fit(*refresh_values(section, roles, second))
            if explained >= c.critic_warmup_target:
                break
        state.warm = True
    section.log.say(f"critic warm-up, round {state.warmup_rounds}: explains {explained:.0%} of the variance of unseen returns")


def rollout_for_critic(section, roles, scorer, prompts, state, number) -> tuple[Batches, Rollout, Tensor]:
    scored = collect(section, roles, scorer, prompts, number)
    batches, rollout = make_rollout(section, roles, scored, state)
    rewards, _ = credit.token_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, rollout.response_mask, section.config.kl_coef,
                                      section.config.kl_estimator)
    # lambda = 1: returns are plain rewards-to-go, the same whatever the untrained critic says
    _, returns = credit.gae(rewards, torch.zeros_like(rollout.values), rollout.response_mask, section.config.gamma, 1.0)
    return batches, rollout, returns


def critic_fit(batches: Batches, rollout: Rollout, returns: Tensor) -> float:
    return credit.explained_variance(rollout.values, returns, rollout.response_mask)


def refresh_values(section: Section, roles: Roles, one) -> tuple[Batches, Rollout, Tensor]:
    batches, rollout, returns = one
    with torch.no_grad():
        batches, values = table(section, roles, batches, lambda batch: values_of(roles, batch))
    return batches, Rollout(rollout.response_mask, rollout.old_logprobs, rollout.ref_logprobs, values, rollout.scores), returns


def critic_pass(section: Section, roles: Roles, optimizer, one) -> None:
    batches, _, returns = one

    def gradients(minis, wheres, count: int) -> None:
        for batch, where in zip(minis, wheres, strict=True):
            (0.5 * (values_of(roles, batch) - batches.of(batch, where, returns)).square().sum() / count).backward()

    for _ in mini_batches(section, roles, batches, gradients):
        step_of(section, roles, "critic", optimizer)


# -- watching ------------------------------------------------------------------------------------------------------------------


def evaluate(section: Section, roles: Roles, scorer: Scorer, watched: list[Encoded]) -> list[dict]:
    """The policy on the watched prompts, with the same seeds every time: one row per answer, with its KL to the reference over the whole vocabulary:
    of few answers the log-ratio of the drawn tokens, which the iterations tell, is too noisy to judge by (method.md 10.4)."""
    c = section.config

    def work() -> Scored:
        return sample_and_score(roles, "policy", scorer, watched, c.eval_samples, Sampling(c.max_new_tokens, c.temperature),
                                derive_seed(section.seed, "watched"), rows_at_once(section, roles, watched))

    scored = with_fewer_rows(section, work) if distributed.world() == 1 else work()
    kl = exact_kl(section, roles, "policy", "reference", scored, c.temperature)
    merged, groups = scored.merged.flatten().tolist(), [prompt_key(p.prompt) for p in watched for _ in range(c.eval_samples)]
    return [{"merged": m, "kl": k, "prompt": g} for m, k, g in zip(merged, kl, groups, strict=True)]


def watched_metrics(rows: list[dict]) -> dict:
    return {"ppo/watched_merged_reward": sum(r["merged"] for r in rows) / len(rows), "ppo/watched_kl": sum(r["kl"] for r in rows) / len(rows)}


def keep_best(section: Section, roles: Roles, state: State, rows: list[dict], iteration: int) -> None:
    """Keep the policy whose watched prompts score highest, of those within max_kl; count evaluations without a better one."""
    now = watched_metrics(rows)
    reward, kl = now["ppo/watched_merged_reward"], now["ppo/watched_kl"]
    within = section.config.max_kl is None or kl <= section.config.max_kl
    if state.best is None or (within and reward > state.best):
        state.best, state.best_iteration, state.best_rows, state.worse = reward, iteration, rows, 0
        checkpoint.keep(section, roles, iteration)
    else:
        state.worse += 1


def iteration_metrics(scored: Scored, rollout: Rollout, kl: Tensor, returns: Tensor, stats: dict, clock: list[float]) -> dict:
    """Everything reported about an iteration. Rewards are raw, never whitened; kl is the drawn tokens' log-ratio (k1); explained_variance is that of
    the returns of GAE, which hold the values themselves, as CleanRL, RLlib and verl tell it.

    clock: when the iteration began, was scored, had its log-probabilities and values, and was updated. seconds_generate is the
    sampling alone; seconds_score is both reward models, log-probabilities and values."""
    lengths = rollout.response_mask.sum(1).float()
    routed = scored.by_tag | scored.by_threshold
    began, _, read, ended = clock
    branches = (("safety_branch", scored.safety, routed), ("helpfulness_branch", scored.helpfulness, ~routed))
    branch = {n: x[m].mean().item() if m.any() else None for n, x, m in branches}
    branch |= {f"{n}_std": x[m].std(unbiased=False).item() if m.any() else None for n, x, m in branches}
    own = {
        "merged_reward": scored.merged.mean().item(), "merged_reward_std": scored.merged.std(unbiased=False).item(),
        "helpfulness": scored.helpfulness.mean().item(), "safety": scored.safety.mean().item(), **branch,
        "kl": kl.mean().item(), "explained_variance": credit.explained_variance(rollout.values, returns, rollout.response_mask),
        "value_mean": masked_mean(rollout.values, rollout.response_mask).item(), "answer_tokens": lengths.mean().item(),
        "finished": scored.finished.float().mean().item(), "routed_by_tag": scored.by_tag.float().mean().item(),
        "routed_by_threshold": scored.by_threshold.float().mean().item(), **stats, **({} if rollout.entropy is None else {"entropy": rollout.entropy}),
        "seconds_generate": scored.sampling_seconds, "seconds_score": read - began - scored.sampling_seconds, "seconds_update": ended - read,
        "tokens_per_second": lengths.sum().item() / max(ended - began, 1e-9), "peak_memory_gb": max(distributed.gather(memory_taken())),
    }
    return {f"ppo/{k}": v for k, v in own.items()}


def sample_rows(scored: Scored, kl: Tensor, roles: Roles, iteration: int, n: int = 4) -> list[dict]:
    k = len(scored.answers[0])
    rows = scored.rows(roles.tokenizer)[::k][:n]
    return [{"step": iteration, **{a: b for a, b in r.items() if a != "ids"}, "kl": kl[i * k].item()} for i, r in enumerate(rows)]


# -- the end -------------------------------------------------------------------------------------------------------------------


def finish(section: Section, roles: Roles, scorer: Scorer, state: State) -> None:
    """Output the best policy; say what PPO gained on the watched prompts. PPO's best is chosen on them, so that its gain there is optimistic."""
    config, chosen = section.config, section.config.algorithm == "ppo"
    checkpoint.output(section, state.best_iteration)
    groups = [r["prompt"] for r in state.start_rows]
    gain = [b["merged"] - a["merged"] for a, b in zip(state.start_rows, state.best_rows, strict=True)]
    kl = sum(r["kl"] for r in state.best_rows) / len(state.best_rows)
    ran = [r for r in read_lines(section.folder / "metrics.jsonl") if "ppo/routed_by_tag" in r]
    section.finish({
        "algorithm": config.algorithm, "iterations": state.iteration, "best_iteration": state.best_iteration,
        "stopped_early": state.iteration < config.iterations,
        "safety_threshold": scorer.threshold_note, "warmup_rounds": state.warmup_rounds,
        "whitening": whitening(config) if config.algorithm == "ppo" else "none", "standardize_rewards": config.standardize_rewards,
        "routed_by_tag": sum(r["ppo/routed_by_tag"] for r in ran) / max(len(ran), 1),
        "routed_by_threshold": sum(r["ppo/routed_by_threshold"] for r in ran) / max(len(ran), 1),
        "watched": {"start": interval([r["merged"] for r in state.start_rows], groups), "best": interval([r["merged"] for r in state.best_rows], groups),
                     "paired_difference": interval(gain, groups), "standard_error": standard_error(gain, groups), "kl": kl,
                     "best_is_chosen_on_them": chosen},
    })
    section.log.say(f"best after iteration {state.best_iteration}{' (stopped early)' if state.iteration < config.iterations else ''}: "
                    f"watched merged reward {sum(r['merged'] for r in state.start_rows) / len(gain):.3f} -> "
                    f"{sum(r['merged'] for r in state.best_rows) / len(gain):.3f} at KL {kl:.2f} nats"
                    f"{' (chosen on these prompts: optimistic)' if chosen else ''}")
