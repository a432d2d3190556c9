"""Training's bookkeeping: batches, checkpoints, resume to the bit, and one trajectory whatever the micro-batches. The oracle for a
stage's arithmetic is a plain torch loop over one sequence at a time."""

import json
import math
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import reward.train
import sft.train
from posttrain import distributed, training
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.stages import load_module
from posttrain.training import bin_by_length, newest_checkpoint, plan_batches, seal, sealed

SFT = {"data": "demonstrations", "packing": False, "batch_size": 4, "max_steps": 3, "epochs": 5, "learning_rate": 1e-3, "warmup_ratio": 0}
REWARD = {"stage": "reward", "model": "base", "own": "helpful", "other": "safety", "own_share": 0.5, "safety_loss_weight": 1.0,
          "batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "warmup_ratio": 0}


@pytest.fixture
def train(make_run, start):
    """train(settings, folder='a', ...) -> the finished section of a run with one stage."""

    def go(settings: dict, folder: str = "a", **more):
        name = settings.get("stage", "sft")
        run = make_run({name: {**settings}}, folder=folder, **more)
        section = start(run, name)
        load_module(section.kind).run(section)
        return section

    return go


def weights(section) -> dict:
    return {k: v for f in sorted((section.folder / "model").glob("*.safetensors")) for k, v in load_file(f).items()}


def rows(section) -> list[dict]:
    """What was logged, less what a clock decides."""
    logged = read_lines(section.folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "time" and "tokens_per_second" not in k and "peak_memory" not in k} for r in logged]


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def initial(section) -> dict:
    """The weights before the first step: the same stage with a rate of nothing."""
    from posttrain.models import roles_for

    torch.manual_seed(section.seed)
    roles = roles_for(section)
    name = "policy" if section.kind == "sft" else "reward"
    full = section.recipe.model.lora is None
    roles.add(name, None, trainable=True, fresh_adapter=not full, head=None if name == "policy" else "new", seed=section.seed)
    out = section.folder.parent / "initial"
    roles.save(name, out)
    return {k: v for f in sorted(out.glob("*.safetensors")) for k, v in load_file(f).items()}


def close_updates(a: dict, b: dict, start: dict, tolerance: float = 2e-3) -> None:
    """The changes from `start` agree: within a share of the largest change of each tensor."""
    moved = 0
    for k in start:
        da, db = a[k].double() - start[k].double(), b[k].double() - start[k].double()
        moved += int(da.abs().max() > 0)
        assert (da - db).abs().max() <= tolerance * db.abs().max() + 1e-9, k
    assert moved > 0.9 * len(start)


# -- batches -----------------------------------------------------------------------------------------------------------------------------


def test_every_epoch_sees_every_item_once_in_another_order():
    plan = plan_batches(10, 4, 5, seed=0)
    stream = [i for step in plan for i in step]
    assert [len(s) for s in plan] == [4] * 5
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10)) and stream[:10] != stream[10:]
    assert plan == plan_batches(10, 4, 5, seed=0) != plan_batches(10, 4, 5, seed=1)
    assert plan_batches(10, 4, 3, seed=0) == plan[:3]  # more steps change nothing before them


def test_bins_travel_whole():
    bins = [[0, 3], [1], [2, 4, 5]]
    plan = plan_batches(6, 2, 3, seed=0, bins=bins)
    units = [tuple(b) for b in bins]
    for step in plan:
        rest = tuple(step)
        while rest:
            unit = next(u for u in units if rest[:len(u)] == u)
            rest = rest[len(unit):]


def test_bins_hold_at_most_their_width_and_every_document_once():
    lengths = [5, 30, 7, 7, 12, 1, 16, 20, 3, 40]
    bins = bin_by_length(lengths, 20, seed=3)
    assert sorted(i for b in bins for i in b) == list(range(10))
    assert all(sum(lengths[i] for i in b) <= 20 or len(b) == 1 for b in bins)
    assert all(sum(lengths[i] for i in a) + lengths[b[0]] > 20 for a, b in pairwise(bins))  # none is begun too early
    assert bins == bin_by_length(lengths, 20, seed=3) != bin_by_length(lengths, 20, seed=4)


# -- checkpoints -------------------------------------------------------------------------------------------------------------------------


def checkpoint(folder, step: int, sealed_too: bool = True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights %d" % step)
    (path / "optimizer.pt").write_bytes(b"moments %d" % step)
    if sealed_too:
        seal(path)
    return path


@pytest.mark.parametrize("damage", [
    lambda p: (p / "optimizer.pt").write_bytes(b"momentX 9"), lambda p: (p / "optimizer.pt").unlink(),
    lambda p: (p / "checksums.json").unlink(),
    lambda p: (p / "checksums.json").write_text("{}"), lambda p: (p / "checksums.json").write_text("{broken")],
    ids=["a bit flipped", "a file missing", "not sealed", "an empty seal", "a broken seal"])
def test_a_damaged_newest_checkpoint_is_named_removed_and_passed_over(tmp_path, damage):
    for step in (3, 10, 9):  # by number, not by name or date
        checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path, print).name == "checkpoint-10"
    damage(tmp_path / "checkpoint-10")
    told = []
    assert not sealed(tmp_path / "checkpoint-10") and newest_checkpoint(tmp_path, told.append).name == "checkpoint-9"
    assert "checkpoint-10 is incomplete or damaged" in told[0] and not (tmp_path / "checkpoint-10").exists()
    (tmp_path / "checkpoint-best").mkdir()
    shutil.rmtree(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path, told.append) is None


# -- one trajectory ----------------------------------------------------------------------------------------------------------------------


def oracle_sft(section) -> tuple[list[float], dict]:
    """Three steps of AdamW over single sequences, written out with torch and transformers' own logits."""
    from posttrain.models import roles_for

    split = section.run.data_of("demonstrations")
    torch.manual_seed(section.seed)
    roles = roles_for(section)
    role = roles.add("policy", None, trainable=True, fresh_adapter=section.recipe.model.lora is not None)
    trees, _, _ = sft.train.encode(split.train, roles.tokenizer, section.config.max_length)
    plan = plan_batches(len(trees), 4, 3, section.seed)
    return torch_loop(section, roles, role, plan, lambda at: sft_loss(roles, [trees[i] for i in at]))


def sft_loss(roles, trees) -> torch.Tensor:
    total, count = 0.0, 0
    roles.use("policy")
    for t in trees:
        logits = roles["policy"].net(input_ids=torch.tensor([t.ids]), use_cache=False).logits[0]
        at = torch.tensor(t.counted[0])
        total = total + torch.nn.functional.cross_entropy(logits[at - 1], torch.tensor(t.ids)[at], reduction="sum")
        count += len(at)
    return total / count


def torch_loop(section, roles, role, plan, loss_of) -> tuple[list[float], dict]:
    c = section.config
    parameters = role.parameters()
    groups = [{"params": [p for p in parameters if (p.ndim > 1) == matrices], "weight_decay": 0.1 * matrices} for matrices in (True, False)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=c.learning_rate, betas=(0.9, 0.95), eps=1e-5)  # norms do not decay
    losses = []
    for step, at in enumerate(plan):
        lr = c.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / len(plan))))  # cosine to a tenth
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(at)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    out = section.folder.parent / "oracle"
    roles.save(role.name, out)
    return losses, {k: v for f in sorted(out.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8}, None], ids=["adapter", "full"])
def test_sft_follows_a_plain_torch_loop_at_any_micro_batch(train, lora):
    model = {"lora": lora}
    base = train({**SFT, "micro_batch_tokens": 4096}, "base", model=model)
    losses, expected = oracle_sft(base)
    first = initial(base)
    logged = [r["sft/loss"] for r in rows(base) if "sft/loss" in r]
    assert logged == pytest.approx(losses, rel=2e-5) and len(logged) == 3
    close_updates(weights(base), expected, first)
    for budget in (64, 512):
        other = train({**SFT, "micro_batch_tokens": budget}, str(budget), model=model)
        assert [r["sft/loss"] for r in rows(other) if "sft/loss" in r] == pytest.approx(losses, rel=2e-5)
        close_updates(weights(other), weights(base), first)


def reward_loss(roles, trees, pairs, weight: float) -> torch.Tensor:
    """Eq. 2 with the small margin, and the safety loss, in the paper's words, one sequence at a time."""
    margin = {None: 0.0, 0: 0.0, 1: 1 / 3, 2: 2 / 3, 3: 1.0}
    rank, bce, labelled = 0.0, 0.0, 0
    for t, pair in zip(trees, pairs, strict=True):
        roles.use("reward")
        scores = []
        for a, b in t.spans:
            hidden = roles["reward"].body(input_ids=torch.tensor([t.ids[:t.prompt] + t.ids[a:b]]), use_cache=False).last_hidden_state[0, -1]
            scores.append(roles["reward"].head(hidden)[0])
        rank = rank - torch.sigmoid(scores[0] - scores[1] - margin[pair.rating]).log()
        for score, safe in zip(scores, (pair.chosen_safe, pair.rejected_safe), strict=True):
            if safe is not None:
                labelled += 1
                bce = bce - (torch.sigmoid(score).log() if safe else (1 - torch.sigmoid(score)).log())
    return rank / len(trees) + weight * bce / max(labelled, 1)


@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8}, None], ids=["adapter", "full"])
def test_reward_training_follows_a_plain_torch_loop_at_any_micro_batch(train, lora):
    from posttrain.models import roles_for
    from reward.mix import mix

    model = {"lora": lora}
    base = train({**REWARD, "micro_batch_tokens": 4096}, "base", model=model)
    pairs, _ = mix(base.run.data_of("helpful").train, base.run.data_of("safety").train, 0.5, base.seed)
    torch.manual_seed(base.seed)
    roles = roles_for(base)
    role = roles.add("reward", None, trainable=True, head="new", seed=base.seed, fresh_adapter=lora is not None)
    trees, _, _ = reward.train.encode(pairs, roles.tokenizer, base.config.max_length)
    plan = plan_batches(len(trees), 4, 3, base.seed)
    losses, expected = torch_loop(
        base, roles, role, plan, lambda at: reward_loss(roles, [trees[i] for i in at], [pairs[i] for i in at], 1.0))
    first = initial(base)
    logged = [r["reward/loss"] for r in rows(base) if "reward/loss" in r]
    assert logged == pytest.approx(losses, rel=2e-5)
    if lora is None:  # the vocabulary's own table has no part in a score
        expected.pop("lm_head.weight", None)
    close_updates(weights(base), expected, first)
    for budget in (64, 512):
        other = train({**REWARD, "micro_batch_tokens": budget}, str(budget), model=model)
        assert [r["reward/loss"] for r in rows(other) if "reward/loss" in r] == pytest.approx(losses, rel=2e-5)
        close_updates(weights(other), weights(base), first)


@pytest.mark.parametrize("settings", [SFT, {**SFT, "packing": True, "max_length": 1024, "batch_size": 2}, REWARD],
                         ids=["sft", "packed sft", "reward"])
def test_the_gpu_s_layout_follows_the_same_trajectory(train, monkeypatch, settings):
    """One packed row instead of padded ones; here on the CPU, where the numbers must agree."""
    rows_layout = train({**settings, "micro_batch_tokens": 1024}, "rows")
    module = load_module(settings.get("stage", "sft"))
    real = module.roles_for

    def packed(section):
        roles = real(section)
        roles.layout = "packed"
        return roles

    monkeypatch.setattr(module, "roles_for", packed)
    close_updates(weights(train({**settings, "micro_batch_tokens": 1024}, "packed")), weights(rows_layout), initial(rows_layout))


@pytest.mark.parametrize("settings", [SFT, REWARD], ids=["sft", "reward"])
@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8}, None], ids=["adapter", "full"])
def test_activation_checkpointing_changes_no_gradient(train, settings, lora):
    plain = train(settings, "plain", model={"lora": lora})
    same(weights(train({**settings, "activation_checkpointing": True}, "saved", model={"lora": lora})), weights(plain))


def test_full_training_on_hardware_with_bfloat16_computes_in_it(train, monkeypatch):
    """The weights stay float32, the matrix products run in bf16: accelerate's own autocast would not reach a body called directly."""
    seen = set()
    monkeypatch.setattr(training, "_bf16_autocast", lambda roles: True)
    real = sft.train._Trainer.micro_loss

    def watched(self, batch, totals):
        hook = self.role.net.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: seen.add(y.dtype))
        try:
            return real(self, batch, totals)
        finally:
            hook.remove()

    monkeypatch.setattr(sft.train._Trainer, "micro_loss", watched)
    section = train(SFT, "bf16", model={"lora": None, "dtype": "auto"})
    assert seen == {torch.bfloat16} and {v.dtype for v in weights(section).values()} == {torch.float32}
    monkeypatch.undo()
    plain = train(SFT, "plain", model={"lora": None})
    logged = [[r["sft/loss"] for r in rows(s) if "sft/loss" in r] for s in (section, plain)]
    assert logged[0] == pytest.approx(logged[1], rel=0.02) and logged[0] != logged[1]


# -- going on ----------------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a power cut: no handler of ours catches it."""


def kill_after(monkeypatch, step: int):
    real = training._Watch.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        real(self, args, state, control, logs, **kwargs)
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(training._Watch, "on_log", on_log)


LONG = {"max_steps": 7, "save_steps": 2, "epochs": 50}


@pytest.mark.parametrize("settings", [SFT, REWARD], ids=["sft", "reward"])
@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8, "dropout": 0.2}, None], ids=["adapter with dropout", "full"])
def test_stop_and_resume_is_the_straight_run_bit_for_bit(train, monkeypatch, settings, lora):
    more = {"model": {"lora": lora}, "held_out": {"demonstrations": 2, "pairs": 3}}
    straight = train({**settings, **LONG}, "straight", **more)
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            train({**settings, **LONG}, "cut", **more)
    folder = straight.folder.parents[2] / "cut" / "t" / straight.name
    assert not (folder / "DONE").exists() and [p.name for p in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    resumed = train({**settings, **LONG}, "cut", **more)
    assert resumed.folder == folder and (folder / "DONE").exists()
    same(weights(resumed), weights(straight))
    assert rows(resumed) == rows(straight) and [r["step"] for r in rows(resumed)] == list(range(8))
    told, expected = resumed.results(), straight.results()
    assert told == expected
    assert not list(folder.glob("checkpoint-*")) and not list(folder.rglob("training_args.bin"))


def test_resume_falls_back_to_the_checkpoint_before_a_damaged_one(train, monkeypatch):
    straight = train({**SFT, **LONG}, "straight")
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            train({**SFT, **LONG}, "cut")
    folder = straight.folder.parents[2] / "cut" / "t" / "sft"
    file = folder / "checkpoint-4" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    resumed = train({**SFT, **LONG}, "cut")
    same(weights(resumed), weights(straight))
    assert rows(resumed) == rows(straight)


@pytest.mark.parametrize("settings", [SFT, REWARD], ids=["sft", "reward"])
@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8}, None], ids=["adapter", "full"])
def test_a_cut_between_the_last_step_and_the_end_keeps_what_was_learned(train, monkeypatch, settings, lora):
    more = {"model": {"lora": lora}, "held_out": {"demonstrations": 2, "pairs": 3}}
    straight = train({**settings, **LONG}, "straight", **more)
    module = load_module(settings.get("stage", "sft"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", lambda *a, **k: (training.fit(*a, **k), (_ for _ in ()).throw(Killed()))[0])
        with pytest.raises(Killed):
            train({**settings, **LONG}, "cut", **more)
    shutil.rmtree(straight.folder.parents[2] / "cut" / "t" / straight.name / "model")
    resumed = train({**settings, **LONG}, "cut", **more)
    same(weights(resumed), weights(straight))
    assert rows(resumed) == rows(straight) and resumed.results() == straight.results()


def test_a_cut_before_the_first_checkpoint_starts_again(train, monkeypatch):
    straight = train({**SFT, **LONG}, "straight")
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            train({**SFT, **LONG}, "cut")
    resumed = train({**SFT, **LONG}, "cut")
    same(weights(resumed), weights(straight))
    assert rows(resumed) == rows(straight)


def test_a_loss_that_is_not_finite_stops_the_run(train, monkeypatch):
    real = sft.train._Trainer.micro_loss
    monkeypatch.setattr(sft.train._Trainer, "micro_loss", lambda self, b, t: (real(self, b, t)[0] * float("nan"), {"loss": float("nan")}))
    with pytest.raises(PosttrainError, match="became nan at step 1"):
        train(SFT)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(train, monkeypatch):
    """The loss is finite, its gradient is not: 0 * inf where a square root meets 0."""
    real = sft.train._Trainer.micro_loss

    def poisoned(self, batch, totals):
        loss, numbers = real(self, batch, totals)
        at_zero = sum((p * 0).sum() for p in self.role.parameters())
        return (loss + torch.sqrt(at_zero) if self.state.global_step == 3 else loss), numbers

    monkeypatch.setattr(sft.train._Trainer, "micro_loss", poisoned)
    with pytest.raises(PosttrainError, match="gradient's norm became nan at step 4"):
        train({**SFT, **LONG, "save_steps": 1})
    monkeypatch.undo()
    folder = train({**SFT, "max_steps": 1}, "other").folder.parents[2] / "a" / "t" / "sft"
    assert newest_checkpoint(folder, print).name == "checkpoint-3"
    assert all(torch.isfinite(v).all() for v in load_file(folder / "checkpoint-3" / "adapter_model.safetensors").values())


def test_the_paper_s_settings_reach_the_trainer(train, monkeypatch):
    """Section 2.2: AdamW 0.9 / 0.95, eps 1e-5, decay 0.1, clip 1.0, cosine to a tenth, 3 % warm-up of at least five steps."""
    seen = []
    real = training.training_arguments
    monkeypatch.setattr(sft.train, "training_arguments", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    section = train({"data": "demonstrations", "batch_size": 2, "max_steps": 9, "epochs": 50, "packing": False})
    a = seen[0]
    assert (a["adam_beta1"], a["adam_beta2"], a["adam_epsilon"], a["weight_decay"], a["max_grad_norm"]) == (0.9, 0.95, 1e-5, 0.1, 1.0)
    assert (a["learning_rate"], a["warmup_steps"], a["lr_scheduler_kwargs"]) == (2e-4, 5, {"min_lr_rate": 0.1})
    rates = [r["sft/learning_rate"] for r in rows(section) if "sft/loss" in r]
    assert rates[:6] == pytest.approx([2e-4 * i / 5 for i in range(6)]) and rates[-1] < rates[-2] < 2e-4 and min(rates[5:]) > 2e-5


def test_the_manifest_remembers_what_a_machine_decided(train):
    section = train({k: v for k, v in SFT.items() if k != "micro_batch_tokens"})
    told = json.loads((section.folder / "manifest.json").read_text())["decisions"]
    assert told["threads"] == 2 and told["dtype"] == "float32" and 256 <= told["micro_batch_tokens"] <= 2048


# -- memory of another process --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_a_process_takes_over_the_smaller_budget_of_another(monkeypatch, elsewhere):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "add_gradients", lambda parameters: None)
    monkeypatch.setattr(distributed, "add_numbers", lambda numbers: {k: v + (elsewhere if k == "smaller" else 0) for k, v in numbers.items()})
    roles = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(trees=[], batches=[[]], budget=256, roles=roles, zero=None, role=SimpleNamespace(parameters=list),
                              totals=lambda batches: {"tokens": 1}, _micro_batches=lambda items: [],
                              _padding=lambda step, own: [], _gradients=lambda *args: {"loss": 1.0}, section=SimpleNamespace(settle=lambda key: 64))
    training.StepTrainer.training_step(trainer, torch.nn.Linear(1, 1), 0)
    assert trainer.budget == (64 if elsewhere else 256)


def test_ppo_s_processes_settle_once_its_mini_batches_are_done(monkeypatch):
    from rlhf import ppo

    monkeypatch.setattr(distributed, "world", lambda: 2)
    settled, batches = [], SimpleNamespace(mini=[[], []], where=[[], []], counts=[3, 4])
    counts = [count for _, count in ppo.mini_batches(SimpleNamespace(settle=settled.append), None, batches, lambda *args: {})]
    assert counts == [3, 4] and settled == ["micro_batch_tokens"]
