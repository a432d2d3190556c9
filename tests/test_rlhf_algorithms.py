"""TRL's GRPO, RLOO and DPO as algorithms of a ppo section: which ids and rewards they see, what moves, what is left behind, resume."""

import json

import pytest
import torch
from rlhf_support import REWARDS, make_run, started
from safetensors.torch import load_file

from posttrain import chat
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.runs import Run
from rlhf import gate, ppo, trl_algorithms

STAGE = {"stage": "ppo", "prompts": "prompts", "policy": "@sft", **REWARDS, "iterations": 2, "batch_size": 8, "mini_batch_size": 4,
         "samples_per_prompt": 2, "max_new_tokens": 8, "learning_rate": 3e-3, "eval_prompts": 5, "save_steps": 1, "micro_batch_tokens": 128,
         "temperature": 0.5, "safety_threshold": 0.4, "sample_every": 1, "kl_coef": 0.05}
DPO = STAGE | {"algorithm": "dpo", "pairs": "helpful", "max_new_tokens": 64}


def section_of(factory, stage: dict):
    return started(make_run(factory, factory.mktemp(stage["algorithm"]), {"ppo": stage}), "ppo")


def told(section) -> list[dict]:
    return read_lines(section.folder / "metrics.jsonl")


@pytest.mark.parametrize("stage", [STAGE | {"algorithm": "grpo"}, STAGE | {"algorithm": "rloo"}, DPO], ids=lambda s: s["algorithm"])
def test_two_iterations_train_the_policy_alone(tmp_path_factory, monkeypatch, stage):
    seen, real = {}, trl_algorithms.make_trainer

    def watching(section, roles, scorer, prompts):
        trainer = real(section, roles, scorer, prompts)
        seen.update(roles=roles, prompts=prompts, trainer=trainer, rewards=[], before={n: p.detach().clone() for n, p in roles.base.named_parameters()})
        if stage["algorithm"] != "dpo":
            reward = trainer.reward_funcs[0]

            def merged_reward(**given):
                out = reward(**given)
                seen["rewards"].append((given["prompts"], given["completion_ids"], out))
                return out

            trainer.reward_funcs[0] = merged_reward
        return trainer

    monkeypatch.setattr(trl_algorithms, "make_trainer", watching)
    section = section_of(tmp_path_factory, stage)
    ppo.run(section)

    moved = {n for n, p in seen["roles"].base.named_parameters() if not torch.equal(p, seen["before"][n])}
    assert moved == {n for n in seen["before"] if ".policy." in n} and moved
    assert "critic" not in seen["roles"].roles
    saved = load_file(section.folder / "model" / "adapter_model.safetensors")
    now = seen["roles"]._slots("policy")
    assert saved.keys() == {f"base_model.model.{k}" for k in now} and all(torch.equal(saved[f"base_model.model.{k}"], p) for k, p in now.items())
    results, rows = section.results(), told(section)
    assert section.state() == "done" and results["algorithm"] == stage["algorithm"] and results["iterations"] == 2
    assert [r["step"] for r in rows] == [0, 1, 2, 2] and all("ppo/loss" in r for r in rows[1:3])
    assert rows[0]["ppo/watched_kl"] == 0.0 != rows[-1]["ppo/watched_kl"]
    assert results["watched"]["paired_difference"]["mean"] != 0.0 or stage["algorithm"] == "dpo"  # a stale sampler would answer as before
    assert not list(section.folder.glob("checkpoint-*"))

    if stage["algorithm"] == "dpo":
        assert rows[1]["ppo/rewards/accuracies"] >= 0 and seen["trainer"].beta == 0.05
        return
    assert seen["trainer"].beta == 0.05 and len(seen["rewards"]) == 2
    scorer = trl_algorithms.ppo.load_scorer(section, seen["roles"], "@reward_helpfulness", "@reward_safety", 0.4, 256)
    for i, (numbers, answers, rewards) in enumerate(seen["rewards"]):
        chosen = [seen["prompts"][int(n)] for n in numbers]
        assert len(numbers) == 8 and len(set(numbers)) == 4
        raw = scorer([p.ids for p in chosen], [[a] for a in answers])
        h, s = torch.tensor(raw["helpfulness"]).flatten(), torch.tensor(raw["safety"]).flatten()
        expected, _ = gate.merge(s, h, torch.tensor([p.prompt.safety for p in chosen]), scorer.threshold)
        assert rewards == pytest.approx(expected.tolist(), abs=1e-4)
        assert rows[i + 1]["ppo/merged_reward"] == pytest.approx(sum(rewards) / 8, abs=1e-5)
    assert len(read_lines(section.folder / "samples.jsonl")) == 8


def test_what_trl_sees_are_our_ids_and_our_reference(tmp_path_factory):
    section = section_of(tmp_path_factory, STAGE | {"algorithm": "grpo"})
    roles, scorer = ppo.load_roles(section)
    prompts, _ = ppo.split_prompts(section, roles)
    trainer = trl_algorithms.make_trainer(section, roles, scorer, prompts)
    ids, _, _ = trainer._tokenize_prompts(["3", "0"])
    assert ids == [chat.encode_prompt(roles.tokenizer, prompts[i].prompt.messages) for i in (3, 0)]
    for p in roles["policy"].parameters():
        p.data.add_(0.1)
    text = torch.tensor([[*prompts[0].ids, 5, 6, 7]])
    labels = text.clone()
    with torch.no_grad():
        both = [m(input_ids=text, attention_mask=torch.ones_like(text), labels=labels, fused_lm_head=True).log_probs[0]
                for m in (trainer.model, trainer.ref_model)]
        for role, got in zip(("policy", "reference"), both, strict=True):
            roles.use(role)
            logits = roles.base.get_output_embeddings()(roles[role].body(input_ids=text).last_hidden_state)[0] / 0.5
            assert got.tolist() == pytest.approx(torch.log_softmax(logits.float(), -1)[:-1].gather(1, text[0, 1:, None])[:, 0].tolist(), abs=1e-4)
    assert roles.pointer[0] == "reference" and not torch.allclose(*both)
    roles.use("policy")


def test_killed_and_started_again_it_goes_on(tmp_path_factory, monkeypatch):
    """TRL's own checkpoints: the second start trains the second iteration alone, and ends with the straight run's weights."""
    straight, cut = (section_of(tmp_path_factory, DPO) for _ in range(2))
    ppo.run(straight)
    real = trl_algorithms._Watch.on_log

    def dying(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt
        return real(self, args, state, control, logs=logs, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(trl_algorithms._Watch, "on_log", dying)
        with pytest.raises(KeyboardInterrupt):
            ppo.run(cut)
    assert (cut.folder / "checkpoint-2" / "checksums.json").exists() and [r["step"] for r in told(cut)] == [0, 1]
    again = started(Run(cut.recipe), "ppo")
    ppo.run(again)
    assert [r["step"] for r in told(again)] == [0, 1, 2, 2]
    a, b = (load_file(s.folder / "model" / "adapter_model.safetensors") for s in (straight, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("changed, match", [
    ({"algorithm": "grpo", "samples_per_prompt": 1}, "at least 2"), ({"algorithm": "rloo", "mini_batch_size": 3}, "divisor of batch_size 8"),
    ({"algorithm": "dpo"}, "a data set of pairs for dpo"), ({"algorithm": "grpo", "pairs": "helpful"}, "helpful with grpo")])
def test_settings_that_do_not_fit_are_told_before_a_model_is_loaded(tmp_path_factory, monkeypatch, changed, match):
    monkeypatch.setattr(ppo, "roles_for", None)
    with pytest.raises(PosttrainError, match=match):
        ppo.run(section_of(tmp_path_factory, STAGE | changed))


def test_prompts_where_pairs_should_be(tmp_path_factory):
    section = section_of(tmp_path_factory, DPO | {"pairs": "prompts"})
    with pytest.raises(PosttrainError, match="holds prompts"):
        ppo.run(section)


def test_plain_ppo_keeps_its_fingerprint(tmp_path_factory):
    """Keys that do nothing at their defaults are not part of a section's inputs."""
    run = make_run(tmp_path_factory, tmp_path_factory.mktemp("keys"), {"ppo": STAGE})
    dumped = json.dumps(run.section("ppo").config.model_dump())
    assert not [k for k in ("algorithm", "pairs", "passes", "kl_estimator", "score_clip", "entropy") if f'"{k}"' in dumped]
    assert '"passes": 2' in json.dumps(run.section("ppo").config.model_copy(update={"passes": 2}).model_dump())
