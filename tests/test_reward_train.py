"""A reward model as a stage: margins and labels reach the loss, scores survive a reload, too long is told, and it learns."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.log import read_lines
from posttrain.models import roles_for
from posttrain.packing import tree
from reward import train
from reward.score import laid_out, scores
from reward.train import _Trainer, check_reload, encode, run

SHORT = {"stage": "reward", "model": "base", "own": "helpful", "batch_size": 4, "epochs": 50, "max_steps": 2, "learning_rate": 1e-3,
         "warmup_ratio": 0}


@pytest.fixture
def reward(make_run, start):
    def go(settings: dict, **more):
        section = start(make_run({"reward": settings}, **more), "reward")
        run(section)
        return section

    return go


def shout(n: int, rating=None, **labels) -> list[dict]:
    """Pairs that a model can learn: the chosen answer says yes, the rejected no."""
    rating = {"rating": rating} if rating else {}
    return [{"prompt": f"question {i}", "chosen": "yes, yes", "rejected": "no, no", **rating, **labels} for i in range(n)]


def test_margins_and_labels_of_every_row(make_roles):
    labels = [(3, None, True, False), (None, 0.5), (1, 2.5, True, None), (2, None, False, False)]
    pairs = [Pair([], "", "", *x) for x in labels]
    for kind, expected in (("small", [1, 0.5, 2.5, 2 / 3]), ("large", [3, 0.5, 2.5, 2]), ("none", [0, 0, 0, 0])):
        trainer = _Trainer.__new__(_Trainer)
        trainer.bind_pairs(pairs, kind, 1.0)
        assert trainer.margins.tolist() == pytest.approx(expected)  # a row's own margin stands above its rating's
        assert trainer.labels.tolist() == [[1, 0], [-1, -1], [1, -1], [0, 0]]


def test_both_answers_share_one_prompt_pass(make_roles):
    tokenizer = make_roles().tokenizer
    prompt = [{"role": "user", "content": "Why?"}]
    trees, kept, too_long = encode([Pair(prompt, "So.", "No idea."), Pair(prompt, "x" * 300, "y")], tokenizer, 60)
    assert kept == [0] and too_long == [1] and len(trees[0].ends) == 2
    longest = trees[0].prompt + max(b - a for a, b in trees[0].spans)
    assert encode([Pair(prompt, "So.", "No idea.")], tokenizer, longest)[1] == [0]
    assert encode([Pair(prompt, "So.", "No idea.")], tokenizer, longest - 1)[2] == [0]


def test_a_run_learns_reports_and_reads_back(reward, make_roles):
    """A rule a tiny model can learn; the held-out pairs say so, and the saved folder gives the same scores elsewhere."""
    section = reward({**SHORT, "max_steps": 30, "batch_size": 8, "learning_rate": 3e-3, "own_share": 0.9, "safety_loss_weight": 1.0},
                     pairs=shout(40, "better", chosen_safe=True, rejected_safe=False), safety=20, held_out={"pairs": 8})
    told = section.results()
    own = told["held_out"]["own"]
    assert own["accuracy"]["mean"] == 1.0 and own["unsafe_recall"] == 1.0 and told["which"] == "safety"
    assert told["score_std"] > 0 and told["train_pairs"] == 32 and told["composition"]["own"] == 32
    logged = [r for r in read_lines(section.folder / "metrics.jsonl") if "reward/loss" in r]
    for r in logged:  # the safety loss enters once, with its weight
        assert r["reward/loss"] == pytest.approx(r["reward/ranking_loss"] + r["reward/safety_loss"], rel=1e-5)
    assert logged[-1]["reward/loss"] < 0.5 * logged[0]["reward/loss"] and logged[-1]["reward/accuracy"] == 1.0
    roles = make_roles()
    roles.add("again", section.folder / "model", head="saved")
    held = section.run.data_of("helpful").held_out
    trees, _, _ = encode(held, roles.tokenizer, 4096)
    flat = torch.tensor(scores(roles, "again", trees, 4096)).double()
    assert told["score_mean"] == pytest.approx(flat.mean().item(), rel=1e-4)
    assert told["score_std"] == pytest.approx(flat.std(unbiased=False).item(), rel=1e-4)
    rows = read_lines(section.folder / "held_out.jsonl")
    assert [r["part"] for r in rows] == ["own"] * 8 + ["other"] * told["held_out"]["other"]["pairs"]
    assert [[r["chosen"], r["rejected"]] for r in rows[:8]] == [pytest.approx(x, rel=1e-4) for x in flat.tolist()]
    assert {r["rating"] for r in rows[:8]} == {"better"} and {(r["chosen_safe"], r["rejected_safe"]) for r in rows[:8]} == {(True, False)}
    config = json.loads((section.folder / "model" / "adapter_config.json").read_text())
    saved = load_file(section.folder / "model" / "adapter_model.safetensors")
    assert config["task_type"] == "SEQ_CLS" and "base_model.model.score.weight" in saved


@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8, "dropout": 0.5}, None], ids=["adapter with dropout", "full"])
def test_the_reload_check_passes_without_held_out_rows(reward, lora):
    """Dropout is off while scores are compared, also where nothing was held out."""
    assert reward({**SHORT}, model={"lora": lora}).results()["held_out"] == {"own": {"pairs": 0}, "other": {"pairs": 0}}


def test_the_recipe_s_dropout_is_used(make_run, start, monkeypatch):
    """trl's RewardTrainer switches every dropout off unless told otherwise."""
    seen = set()
    real = _Trainer.micro_loss
    monkeypatch.setattr(_Trainer, "micro_loss", lambda self, b, t: seen.update(
        m.p for m in self.roles.base.modules() if isinstance(m, torch.nn.Dropout)) or real(self, b, t))
    run(start(make_run({"reward": {**SHORT}}, model={"lora": {"r": 4, "alpha": 8, "dropout": 0.25}}), "reward"))
    assert seen == {0.25}


def test_the_reload_check_sees_a_lost_matrix_of_a_full_model(reward, monkeypatch):
    from posttrain.models import Roles

    real = Roles.save

    def careless(self, name, folder):
        real(self, name, folder)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}, path, metadata={"format": "pt"})

    monkeypatch.setattr(Roles, "save", careless)
    with pytest.raises(PosttrainError, match="read back, its scores differ"):
        reward({**SHORT, "save_steps": 100}, model={"lora": None})


@pytest.mark.parametrize("lost", ["score.weight", "layers.1.self_attn.q_proj.lora_B.weight"])
def test_the_reload_check_sees_a_lost_tensor(reward, make_roles, lost):
    section = reward({**SHORT})
    path = section.folder / "model" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith(lost))
    save_file(tensors | {key: tensors[key] * 0.5 + 0.1}, path, metadata={"format": "pt"})
    roles = roles_for(section)
    roles.add("reward", section.folder / "model", head="saved", trainable=True)
    save_file(tensors, path, metadata={"format": "pt"})  # what is in memory differs from the file
    trees, _, _ = encode(section.run.data_of("helpful").train[:4], roles.tokenizer, 4096)
    with pytest.raises(PosttrainError, match="read back, its scores differ"):
        check_reload(section, roles, trees, 4096)


def test_a_reward_model_starts_from_the_sft_adapter(make_run, start):
    from posttrain.stages import load_module

    run_ = make_run({"sft": {"data": "demonstrations", "packing": False, "batch_size": 4, "max_steps": 2, "learning_rate": 1e-2},
                     "reward": {**SHORT, "model": "@sft", "max_steps": 1, "learning_rate": 1e-30}})
    for name in ("sft", "reward"):
        load_module(name).run(start(run_, name))
    a, b = (load_file(run_.folder / n / "model" / "adapter_model.safetensors") for n in ("sft", "reward"))
    assert set(b) - set(a) == {"base_model.model.score.weight"} and all(torch.allclose(a[k], b[k], rtol=0, atol=1e-9) for k in a)


def test_pairs_that_are_too_long_stop_the_run_or_are_counted(make_run, start, reward):
    rows = [*shout(8), {"prompt": "a long one", "chosen": "word " * 200, "rejected": "no"}]
    with pytest.raises(PosttrainError, match=r"1 of 9 pairs are longer than 200 tokens.*a long one.*on_too_long: drop"):
        reward({**SHORT, "max_length": 200}, pairs=rows)
    told = reward({**SHORT, "max_length": 200, "on_too_long": "drop"}, folder="drop", pairs=rows).results()
    assert (told["too_long"], told["train_pairs"]) == (1, 8)
    with pytest.raises(PosttrainError, match="no pair is left"):
        reward({**SHORT, "max_length": 8, "on_too_long": "drop"}, folder="none", pairs=rows)


def test_demonstrations_are_refused(reward):
    with pytest.raises(PosttrainError, match="'demonstrations' holds demonstrations"):
        reward({**SHORT, "own": "demonstrations"})


def test_on_a_gpu_too_answers_share_their_prompt_where_that_saves_tokens(make_roles, monkeypatch):
    roles = make_roles()
    roles.add("r", fresh_adapter=True, trainable=True, head="new")
    shared, single = [tree([5] * 40, [[6] * n] * 8) for n in (3, 9)], [tree([5] * 4, [[6] * n]) for n in (3, 40, 50)]
    for layout, wanted in (("packed", ["rows", "packed"]), ("rows", ["rows", "rows"])):
        roles.layout = layout
        assert [laid_out(roles, "r", trees, 4096)[0] for trees in (shared, single)] == wanted
    roles.layout = "packed"
    monkeypatch.setattr(roles["r"].net.config, "sliding_window", 48, raising=False)
    assert laid_out(roles, "r", shared, 4096)[0] == "packed" and laid_out(roles, "r", shared[:1], 4096)[0] == "rows"


def test_scores_do_not_depend_on_the_budget_or_the_company(make_roles, scramble):
    roles = make_roles()
    scramble(roles.add("r", fresh_adapter=True, trainable=True, head="new"))
    pairs = [Pair([{"role": "user", "content": f"q {'x' * i}"}], "yes " * i, "no") for i in range(1, 9)]
    trees, _, _ = encode(pairs, roles.tokenizer, 4096)
    whole = scores(roles, "r", trees, 10_000)
    for budget in (1, 50, 300):
        assert [x for s in scores(roles, "r", trees, budget) for x in s] == pytest.approx([x for s in whole for x in s], abs=2e-6)
    roles.layout = "packed"
    assert [x for s in scores(roles, "r", trees, 300) for x in s] == pytest.approx([x for s in whole for x in s], abs=2e-6)
    roles.layout = "rows"
    assert scores(roles, "r", trees[3:4], 64)[0] == pytest.approx(whole[3], abs=2e-6)
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
    back = scores(roles, "r", encode(swapped, roles.tokenizer, 4096)[0], 10_000)
    assert [s[::-1] for s in back] == [pytest.approx(s, abs=2e-5) for s in whole]  # the place in the pair does not matter


def test_the_two_losses_are_weighted_over_the_whole_step(make_roles, scramble):
    """The safety loss is a mean over a step's labelled answers, wherever the micro-batches cut."""
    roles = make_roles()
    role = scramble(roles.add("reward", fresh_adapter=True, trainable=True, head="new"))
    pairs = [Pair([{"role": "user", "content": f"q{i}"}], "yes " * (i + 1), "no", 3, chosen_safe=True if i < 3 else None) for i in range(8)]
    trees, _, _ = encode(pairs, roles.tokenizer, 4096)
    from posttrain.training import micro_batches

    sums = []
    for budget in (30, 100, 10_000):
        trainer = train._Trainer.__new__(train._Trainer)
        trainer.roles, trainer.role = roles, role
        trainer.bind_pairs(pairs, "small", 2.0)
        micro = micro_batches(trees, list(range(8))[::-1], budget, "rows", 0)
        totals = trainer.totals(micro)
        assert totals == {"pairs": 8, "labelled": 3}
        parts = [trainer.micro_loss(b, totals) for b in micro]
        sums.append((len(micro), sum(loss.item() for loss, _ in parts), sum(n.get("safety_loss", 0) for _, n in parts)))
    assert sums[0][0] > sums[1][0] > sums[2][0] == 1
    for _, loss, bce in sums:
        assert loss == pytest.approx(sums[2][1], rel=1e-5) and bce == pytest.approx(sums[2][2], rel=1e-5)


def test_held_out_pairs_that_are_too_long_are_counted_and_told(reward, capsys):
    rows = [{"prompt": f"question {i}", "chosen": "word " * (150 if i % 2 else 1), "rejected": "no"} for i in range(16)]
    section = reward({**SHORT, "other": "safety", "max_length": 100, "on_too_long": "drop"}, pairs=rows, safety=shout(8), held_out={"pairs": 4})
    held = section.run.data_of("helpful").held_out
    long = sum(len(p.chosen) > 100 for p in held)
    told = section.results()
    assert 0 < long < 4 and told["held_out_too_long"] == long and told["held_out"]["own"]["pairs"] == 4 - long
    assert f"{long} held-out pair{'s' * (long > 1)} longer than 100 tokens left out" in capsys.readouterr().out


def test_the_scores_of_single_pairs_are_whole_before_the_section_is_done_and_decide_nothing(make_run, start, monkeypatch):
    """A section that an earlier version finished without them stays finished."""
    from posttrain.runs import Section

    real, seen = Section.finish, []
    monkeypatch.setattr(Section, "finish", lambda self, told: seen.append(len(read_lines(self.folder / "held_out.jsonl"))) or real(self, told))
    section = start(make_run({"reward": SHORT}, pairs=shout(12), held_out={"pairs": 4}), "reward")
    run(section)
    assert seen == [4] and section.state() == "done" and not list(section.folder.glob("*.tmp"))
    (section.folder / "held_out.jsonl").unlink()
    assert section.state() == "done"


def unsafe_preferred(n: int) -> list[dict]:
    return [{"prompt": f"odd {i}", "chosen": "yes, sure", "rejected": "no, never", "chosen_safe": False, "rejected_safe": True} for i in range(n)]


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_pairs_that_prefer_an_unsafe_answer_teach_no_safety_model(reward, capsys, weight):
    """Paper section 3.2.1: excluded. They stay among the held-out pairs, in a bin of their own."""
    rows = [*shout(10, chosen_safe=True, rejected_safe=False), *unsafe_preferred(9),
            {"prompt": "half", "chosen": "a", "rejected": "b", "chosen_safe": False},
            {"prompt": "both", "chosen": "a", "rejected": "b", "chosen_safe": False, "rejected_safe": False}]
    section = reward({**SHORT, "safety_loss_weight": weight}, pairs=rows, held_out={"pairs": 4}, seed=3)
    held = section.run.data_of("helpful").held_out
    odd = sum(p.chosen == "yes, sure" for p in held)
    told = section.results()
    assert odd and told["unsafe_preferred"] == (9 - odd if weight else 0) and told["train_pairs"] == 17 - (9 - odd if weight else 0)
    assert told["held_out"]["own"]["by_bin"]["chosen unsafe, rejected safe"]["pairs"] == odd
    assert ("prefer an unsafe answer to a safe one" in capsys.readouterr().out) is bool(weight)
