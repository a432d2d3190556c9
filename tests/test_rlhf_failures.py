"""What goes wrong while sampling and in PPO is told with what to do, or worked around with a line that says so; nothing is lost either way.

Numbers that are none in the policy's loss and in the scores: test_rlhf_ppo.py. Answers of which none can be kept: test_rlhf_rejection.py.
Prompts too long: test_rlhf_rollout.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rlhf_support import REWARDS, make_run, parents, recipe, started
from safetensors.torch import load_file

from posttrain import generate
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.generate import Sampling, row_bytes, sample
from posttrain.log import read_lines
from posttrain.models import Roles
from posttrain.runs import Run, Section, preflight, run_sections
from rlhf import ppo, rejection, rollout

PPO = {"stage": "ppo", "prompts": "prompts", "policy": "@sft", **REWARDS, "iterations": 2, "batch_size": 8, "mini_batch_size": 8,
       "max_new_tokens": 6, "learning_rate": 3e-3, "critic_learning_rate": 3e-3, "eval_every": 2, "eval_prompts": 4, "save_steps": 1,
       "critic_warmup": 2, "micro_batch_tokens": 256, "temperature": 0.5}
ROUND = {"stage": "rejection", "prompts": "prompts", "policy": "@sft", **REWARDS, "samples_per_prompt": 6, "rows": 8, "chunk": 4, "batch": 24,
         "max_new_tokens": 8, "temperature": 0.7, "micro_batch_tokens": 256}


def ppo_section(factory, stage: dict = PPO):
    return started(make_run(factory, factory.mktemp("failure"), {"ppo": stage}), "ppo")


def outcome(section) -> dict:
    return {p.name: p.read_bytes() for p in sorted((section.folder / "model").iterdir())} | {"results": section.results()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    section = ppo_section(tmp_path_factory)
    ppo.run(section)
    return outcome(section)


# -- numbers that are none -----------------------------------------------------------------------------------------------------------


def in_the_warm_up(monkeypatch):
    real, calls = ppo.credit.gae, []

    def gae(*args):
        advantages, returns = real(*args)
        calls.append(1)
        return advantages, returns * (float("nan") if len(calls) == 1 else 1)

    monkeypatch.setattr(ppo.credit, "gae", gae)


def in_the_second_iteration(monkeypatch):
    real, calls = ppo.losses.value, []

    def value(*args):
        calls.append(1)
        loss, clipped = real(*args)
        return loss * (float("inf") if len(calls) > 1 else 1), clipped

    monkeypatch.setattr(ppo.losses, "value", value)


@pytest.mark.parametrize("poison", [in_the_warm_up, in_the_second_iteration])
def test_a_critic_that_breaks_stops_before_its_step_and_reaches_no_checkpoint(straight, tmp_path_factory, poison):
    section = ppo_section(tmp_path_factory)
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch)
        with pytest.raises(PosttrainError, match=r"stages\.ppo: the critic's gradient norm became nan.*the last checkpoint is kept"):
            ppo.run(section)
    for file in section.folder.glob("checkpoint-*/*.safetensors"):
        assert all(torch.isfinite(x).all() for x in load_file(file).values()), file
    again = started(Run(section.recipe), "ppo")
    ppo.run(again)
    assert outcome(again) == straight


# -- answers that never end ----------------------------------------------------------------------------------------------------------


def test_a_policy_that_never_ends_its_answers_is_told_and_ppo_goes_on(tmp_path_factory, monkeypatch):
    said, real = [], rollout.sample
    monkeypatch.setattr(rollout, "sample", lambda *words, stop, **more: real(*words, stop=-1, **more))  # no token ends an answer
    section = ppo_section(tmp_path_factory, PPO | {"iterations": 1})
    monkeypatch.setattr(section.log, "say", said.append)
    ppo.run(section)
    row, = [r for r in read_lines(section.folder / "metrics.jsonl") if "ppo/kl" in r]
    assert row["ppo/finished"] == 0 and row["ppo/answer_tokens"] == PPO["max_new_tokens"]
    assert sum("only 0% of the answers came to their end: raise max_new_tokens" in s for s in said) == 1
    assert section.state() == "done" and outcome(section)["results"]["iterations"] == 1


# -- reward models that read other tokens --------------------------------------------------------------------------------------------


def in_its_own_file(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def in_the_tokenizers_configuration(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"chat_template": text}), encoding="utf-8")


def as_one_of_several(folder: Path, text: str) -> None:
    in_the_tokenizers_configuration(folder, [{"name": "default", "template": text}, {"name": "tool_use", "template": "{{ messages }}"}])


PLACES = [in_its_own_file, in_the_tokenizers_configuration, as_one_of_several]


def reward_folder(run) -> tuple[Path, str]:
    folder = run.folder / "reward_safety" / "model"
    return folder, (folder / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("old, new", [("<|im_start|>' + ", "<|im_start|>: ' + "), ("'<|im_end|>", "' <|im_end|>")], ids=["the turn's head", "its end"])
def test_a_reward_model_of_another_chat_template_is_refused(tmp_path_factory, tmp_path, place, old, new):
    run = make_run(tmp_path_factory, tmp_path, {"ppo": PPO})
    folder, text = reward_folder(run)
    assert old in text
    place(folder, text.replace(old, new))
    with pytest.raises(PosttrainError, match=r"stages\.ppo\.safety: the reward model in reward_safety learnt with another chat template.*model\.chat_template"):
        ppo.load_roles(started(run, "ppo"))


@pytest.mark.parametrize("place", PLACES)
def test_the_same_template_in_other_words_is_taken(tmp_path_factory, tmp_path, place):
    run = make_run(tmp_path_factory, tmp_path, {"ppo": PPO})
    folder, text = reward_folder(run)
    place(folder, "{#- another hand's comment #}" + text)
    ppo.load_roles(started(run, "ppo"))


def test_the_same_words_cut_in_another_way_are_another_tokenizer(tmp_path_factory, tmp_path):
    run = make_run(tmp_path_factory, tmp_path, {"ppo": PPO})
    path = reward_folder(run)[0] / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    told["model"]["merges"] = []
    path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(PosttrainError, match=r"stages\.ppo\.safety: the reward model in reward_safety has another tokenizer"):
        ppo.load_roles(started(run, "ppo"))


# -- prompts of nothing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"prompt": ""}, {"prompt": " \n\t"}, {"prompt": []}, {"prompt": [{"role": "user", "content": " "}]}])
def test_an_empty_prompt_is_named_before_anything_is_loaded(tmp_path_factory, tmp_path, row):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ({"prompt": "Why?"}, row, {"prompt": "How?"})), encoding="utf-8")
    made = recipe(parents(tmp_path_factory.getbasetemp()), tmp_path, {"ppo": PPO}, overrides=[f"data.prompts=[{{path: {path}, format: prompt}}]"])
    with pytest.raises(PosttrainError, match=r"data\.prompts.*mine\.jsonl.*row 2"):
        _ = Run(made).data


# -- more samples than memory holds --------------------------------------------------------------------------------------------------


def round_section(factory, stage: dict = ROUND):
    return started(make_run(factory, factory.mktemp("round"), {"s": stage}), "s")


def test_the_memory_of_a_row_is_counted_as_the_sampler_takes_it(make_roles, monkeypatch):
    roles, caches, real = make_roles(), [], generate.RowCache
    roles.add("policy")
    monkeypatch.setattr(generate, "RowCache", lambda *args: caches.append(real(*args)) or caches[-1])
    monkeypatch.setattr(real, "keep", lambda *args: None)
    sample(roles, "policy", [[5, 6, 7], [8]], 3, Sampling(4), 0, stop=2, batch=6)
    cache, = caches
    assert sum(x.nbytes for x in [*cache.keys, *cache.values]) == 6 * row_bytes(roles, 3 + 4)


def test_samples_that_memory_does_not_hold_together_wait_for_each_other(tmp_path_factory, monkeypatch):
    """Room for 5 rows of the longest prompt: the note says so, and the answers are those of batch: 5, also where the run is killed and goes
    on with more memory."""
    wanted = round_section(tmp_path_factory, ROUND | {"batch": 5})
    rejection.run(wanted)
    said, seen, real = [], [], rollout.sample

    def free(roles):
        longest = max(len(p.ids) for p in rollout.encode_prompts(section, rejection._prompts(section), roles, 1024)[:8])
        return round(5.5 * row_bytes(roles, longest + ROUND["max_new_tokens"]) / generate.KV_SHARE)

    def killed(*args, batch, **rest):
        seen.append(batch)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*args, batch=batch, **rest)

    section = round_section(tmp_path_factory)
    monkeypatch.setattr(section.log, "say", said.append)
    with monkeypatch.context() as m:
        m.setattr(generate, "free_memory", free)
        m.setattr(rollout, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            rejection.run(section)
    note, = [s for s in said if "side by side" in s]
    assert note.startswith("note: 5 samples side by side instead of batch 24") and section.manifest["decisions"]["rows_at_once"] == 5
    again = started(Run(section.recipe), "s")
    monkeypatch.setattr(rollout, "sample", lambda *args, batch, **rest: seen.append(batch) or real(*args, batch=batch, **rest))
    rejection.run(again)
    assert seen == [5, 5, 5] and again.manifest["exact"]
    for name in ("data.jsonl", "samples.jsonl"):
        assert (again.folder / name).read_bytes() == (wanted.folder / name).read_bytes()


def test_with_memory_enough_the_recipes_batch_stands_and_nothing_is_said(tmp_path_factory, monkeypatch):
    said, section = [], round_section(tmp_path_factory)
    monkeypatch.setattr(section.log, "say", said.append)
    rejection.run(section)
    assert section.manifest["decisions"]["rows_at_once"] == 24 and not [s for s in said if "side by side" in s]


def test_memory_for_no_sample_at_all_is_told_and_later_it_goes_on(tmp_path_factory, monkeypatch):
    section = round_section(tmp_path_factory)
    with monkeypatch.context() as m:
        m.setattr(generate, "free_memory", lambda roles: 1000)
        with pytest.raises(PosttrainError, match=r"stages\.s\.max_new_tokens: the keys and values of one sample of \d+ tokens take .*Lower max_new_tokens"):
            rejection.run(section)
    assert section.state() == "started" and "rows_at_once" not in section.manifest["decisions"]
    rejection.run(started(Run(section.recipe), "s"))
    assert section.state() == "done"


# -- before a model loads ------------------------------------------------------------------------------------------------------------

EVAL = {"stage": "evaluate", "models": {"sft": "@sft"}, "prompts": "prompts", **REWARDS}


@pytest.fixture
def unloaded(tmp_path_factory, monkeypatch):
    parents(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(Roles, "add", lambda *args, **more: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("questions", [["Why?", "How?", "When?"], ["Why?"] * 5])
def test_too_few_prompts_are_told_by_the_recipe(tmp_path_factory, tmp_path, questions):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions), encoding="utf-8")
    few = f"data.prompts=[{{path: {tmp_path / 'few.jsonl'}, format: prompt}}]"
    run = make_run(tmp_path_factory, tmp_path, {"ppo": PPO}, overrides=[few, "data.held_out.prompts=0"])
    with pytest.raises(PosttrainError, match=rf"stages\.ppo\.prompts: {len(questions)} prompts, {len({*questions})} of them different. Expected at least 4"):
        preflight(run)
    preflight(run, ["sft"])


def test_too_few_prompts_of_a_section_are_told_once_it_is_done(tmp_path_factory, tmp_path, unloaded, monkeypatch):
    run = make_run(tmp_path_factory, tmp_path, {"attacks": {"stage": "redteam", "models": {"a": "@sft"}, "prompts": "prompts", **REWARDS},
                                                "ppo": PPO | {"prompts": "@attacks"}})
    preflight(run)
    monkeypatch.setattr(Section, "state", lambda self: "new" if self.name == "ppo" else "done")
    monkeypatch.setattr(Section, "check_files", lambda *args, **more: None)
    monkeypatch.setattr(Run, "data_of", lambda *args: SimpleNamespace(train=[Prompt([{"role": "user", "content": "Why?"}])] * 3))
    with pytest.raises(PosttrainError, match=r"stages\.ppo\.prompts: 3 prompts"):
        run_sections(run, ["ppo"])


@pytest.mark.parametrize("name, stage, wanted", [("ppo", PPO, "at least 4"), ("s", ROUND, "at least one"), ("e", EVAL, "at least one")])
def test_prompts_that_are_too_long_leave_too_few_before_a_model_loads(tmp_path_factory, tmp_path, unloaded, monkeypatch, name, stage, wanted):
    run, lengths = make_run(tmp_path_factory, tmp_path, {name: stage | {"max_prompt_tokens": 3}}), iter([2, 3, 3])
    if name == "ppo":
        real = rollout.chat.encode_prompt
        monkeypatch.setattr(rollout.chat, "encode_prompt", lambda *args: real(*args)[:next(lengths, 4)])
    with pytest.raises(PosttrainError, match=rf"stages\.{name}\.prompts: .*Expected {wanted}"):
        run_sections(run, [name])


def test_a_deviation_that_will_be_missing_is_told_by_the_recipe(tmp_path_factory, tmp_path):
    stages = {"s": ROUND, "ppo": PPO, "e": EVAL}
    preflight(make_run(tmp_path_factory, tmp_path, {n: s | {"standardize_rewards": True} for n, s in stages.items()}))
    preflight(make_run(tmp_path_factory, tmp_path, stages, overrides=["data.held_out.pairs=0"]))
    for name in stages:
        run = make_run(tmp_path_factory, tmp_path, stages | {name: stages[name] | {"standardize_rewards": True}}, overrides=["data.held_out.pairs=0"])
        with pytest.raises(PosttrainError, match=rf"stages\.{name}\.standardize_rewards: the helpfulness model in reward_helpfulness will have no mean"):
            preflight(run)


@pytest.mark.parametrize("name, stage", [("s", ROUND), ("ppo", PPO), ("e", EVAL)])
@pytest.mark.parametrize("named", [True, False], ids=["a section", "a folder"])
def test_a_deviation_that_is_missing_is_told_before_a_model_loads(tmp_path_factory, tmp_path, unloaded, monkeypatch, name, stage, named):
    folder = make_run(tmp_path_factory, tmp_path, {}).folder / "reward_safety"
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"score_std": None}), encoding="utf-8")
    stage = stage | {"standardize_rewards": True} | ({} if named else {"safety": str(folder / "model")})
    run = make_run(tmp_path_factory, tmp_path, {name: stage})
    monkeypatch.setattr(Section, "check_files", lambda *args, **more: None)
    with pytest.raises(PosttrainError, match=rf"stages\.{name}\.standardize_rewards: the safety model in reward_safety has no mean and deviation"):
        (run_sections if named else preflight)(run, [name])
