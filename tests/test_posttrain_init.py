"""`init`: recipes from three layouts of pairs run to the end on the tiny model; what is chosen by memory; what it refuses and never overwrites."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from posttrain import builtin, data, init, init_recipe, plan, runs
from posttrain.__main__ import app
from posttrain.config import DataEntry, load_recipe
from posttrain.errors import PosttrainError
from posttrain.init_recipe import flow, own_share

ROOT = Path(__file__).parent.parent
TINY = ("--model", "builtin:tiny-llama", "--gpu", "cpu", "--yes")
QUICK = ["model.dtype=float32", "v1_samples.rows=8", "v1_samples.samples_per_prompt=16", "v1_samples.max_new_tokens=32", "ppo.iterations=1",
         "ppo.batch_size=4", "ppo.mini_batch_size=4", "ppo.max_new_tokens=6", "ppo.critic_warmup=1", "ppo.eval_prompts=2", "eval.max_new_tokens=6",
         "run.threads=1"]  # 128 answers of 32 tokens: some come to their end


def shipped(name: str, n: int = 24) -> list[dict]:
    rows = [json.loads(line) for line in (ROOT / "recipes" / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [r for r in rows if isinstance(r["prompt"], str)][:n] if "prompt" in rows[0] else rows[:n]


def hh(name: str = "helpful_pairs") -> list[dict]:
    return [{k: f"\n\nHuman: {r['prompt']}\n\nAssistant: {r[k]}" for k in ("chosen", "rejected")} for r in shipped(name)]


def pku() -> list[dict]:
    return [{"prompt": r["prompt"], "response_0": r["chosen"], "response_1": r["rejected"], "is_response_0_safe": True, "is_response_1_safe": i % 3 == 0,
             "better_response_id": i % 2, "safer_response_id": 0} for i, r in enumerate(shipped("safety_pairs"))]


def native(name: str = "helpful_pairs", labels: bool = False) -> list[dict]:
    kept = ("prompt", "chosen", "rejected", "rating") + (("chosen_safe", "rejected_safe") if labels else ())
    return [{k: v for k, v in r.items() if k in kept} for r in shipped(name)]


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    """The matrix products that are timed for a guess at hours take long on a busy machine."""
    monkeypatch.setattr(init_recipe, "measured_speed", lambda: 5e10)


@pytest.fixture
def write(tmp_path):
    """write('a.jsonl', rows) -> its path."""
    def put(name: str, rows: list[dict]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return tmp_path / name
    return put


def command(*words, answers: str | None = None):
    """What `init` prints; our errors are raised, as `guarded` sees them."""
    result = CliRunner().invoke(app, ["init", *map(str, words)], input=answers)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def walked(path: Path, *overrides: str) -> runs.Run:
    """The recipe's whole road, with fewer and shorter samples."""
    loaded = load_recipe(path)
    steps = [f"{n}.max_steps=2" for n, c in loaded.stages.items() if c.stage in ("sft", "reward")]
    run = runs.Run(load_recipe(path, [*QUICK, *steps, *overrides, f"run.dir={path.parent / 'runs'}"]))
    runs.preflight(run)
    runs.run_sections(run)
    assert all(run.section(name).state() == "done" for name in run.recipe.stages)
    return run


# -- to the end ----------------------------------------------------------------------------------------------------------------------


def test_hh_alone_one_reward_model_and_the_chosen_answers_stand_in(write, tmp_path):
    path = tmp_path / "mine.yaml"
    told = command(path, *TINY, "--pairs", write("hh.jsonl", hh()))
    assert "format hh (columns chosen, rejected), 24 pairs" in told and shipped("helpful_pairs")[0]["prompt"][:40] in told
    assert "the pairs carry no safety labels, so the safety gate changes nothing" in told and "chosen answers stand in" in told
    assert re.search(r"Memory: most in ppo, about [\d.]+ of", told) and "Time: about" in told
    for words in ("check-data", "plan", "run"):
        assert f"python -m posttrain {words} {path}" in told
    recipe = load_recipe(path)
    assert list(recipe.stages) == ["sft", "reward", "v1_samples", "v1", "ppo", "eval", "chat"]
    assert recipe.stages["ppo"].helpfulness == recipe.stages["ppo"].safety == "@reward" and recipe.stages["reward"].own == ["pairs"]
    asked = [json.loads(line) for line in (tmp_path / "mine.prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [a["prompt"][0]["content"] for a in asked] == [r["prompt"] for r in shipped("helpful_pairs")] and not any("safety" in a for a in asked)
    walked(path)


def test_pku_layout_with_demonstrations_two_reward_models_of_one_file(write, tmp_path):
    path = tmp_path / "mine.yaml"
    told = command(path, *TINY, "--pairs", write("pku.jsonl", pku()), "--demonstrations", write("d.jsonl", shipped("demonstrations")))
    assert "two comparisons that one file holds" in told and "stand in" not in told
    recipe = load_recipe(path)
    assert {n: [e.format for e in entries] for n, entries in recipe.data_sets.items() if n != "prompts"} == {
        "helpful": ["safe_rlhf_helpful"], "safety": ["safe_rlhf"], "demonstrations": ["messages"]}
    assert recipe.stages["reward_safety"].safety_loss_weight == 1.0 and recipe.stages["ppo"].safety_threshold == "auto"
    assert all(json.loads(line)["safety"] for line in (tmp_path / "mine.prompts.jsonl").read_text(encoding="utf-8").splitlines())
    assert not (tmp_path / "mine.demonstrations.jsonl").exists()
    run = walked(path)
    assert run.section("reward_safety").results()["composition"]


def test_native_pairs_on_a_model_that_chats_already_leave_sft_out(write, tmp_path):
    folder = tmp_path / "chats"
    shutil.copytree(builtin.folder(builtin.TINY), folder)
    shutil.copy(ROOT / "posttrain" / "templates" / "chatml.jinja", folder / "chat_template.jinja")
    path = tmp_path / "mine.yaml"
    told = command(path, "--model", folder, "--gpu", "cpu", "--yes", "--helpful", write("h.jsonl", native()),
                   "--safety", write("s.jsonl", native("safety_pairs", labels=True)))
    assert "chat template: its own" in told and "sft is left out" in told
    recipe = load_recipe(path)
    assert "sft" not in recipe.stages and recipe.stages["v1_samples"].policy == "base" and recipe.stages["v1"].data == ["@v1_samples"]
    assert recipe.model.chat_template is None and recipe.stages["eval"].models["base"] == "base"
    walked(path)


# -- what is chosen ------------------------------------------------------------------------------------------------------------------


def shape_folder(tmp_path: Path, **changes) -> Path:
    """A folder with nothing but a config.json: Llama 2 7B's, changed."""
    config = json.loads((ROOT / "posttrain" / "shapes" / "meta-llama--Llama-2-7b-hf.json").read_text(encoding="utf-8"))
    folder = tmp_path / "shape"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


ONE_BILLION = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}


@pytest.mark.parametrize("changes, gpu, quantization, lora", [
    ({}, "24GB", "nf4", True), ({}, "80GB", "none", True), (ONE_BILLION, "80GB", "none", False), (ONE_BILLION, "24GB", "none", True),
    (ONE_BILLION, "5GB", "nf4", True)])
def test_tuning_by_memory_and_the_plan_agrees(write, tmp_path, changes, gpu, quantization, lora):
    folder, path = shape_folder(tmp_path, **changes), tmp_path / "mine.yaml"
    told = command(path, "--model", folder, "--gpu", gpu, "--yes", "--helpful", write("h.jsonl", native()), "--safety", write("s.jsonl", hh("safety_pairs")))
    recipe = load_recipe(path)
    assert (recipe.model.quantization, recipe.model.lora is not None) == (quantization, lora)
    assert recipe.model.chat_template == "llama-2" and "the tokenizer is not on this machine" in told
    rows = plan.plan(recipe, gpu=gpu)
    assert all(r["fits"] for r in rows)
    for stage in recipe.stages.values():
        if stage.stage in ("sft", "reward"):
            assert stage.micro_batch_tokens >= stage.max_length
        if stage.stage == "ppo":
            assert stage.micro_batch_tokens >= stage.max_prompt_tokens + stage.max_new_tokens and stage.batch >= 8
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert sum(p.numel() for p in built.parameters()) == rows[0]["parameters"]


def test_what_does_not_fit_says_how_much_it_needs_and_leaves_nothing(write, tmp_path):
    path = tmp_path / "mine.yaml"
    words = (path, "--model", shape_folder(tmp_path), "--yes", "--pairs", write("h.jsonl", native()))
    with pytest.raises(PosttrainError, match=r"does not fit 4\.5 GB with qlora: chat needs about 14\.5 GB at its smallest"):
        command(*words, "--gpu", "5GB")
    with pytest.raises(PosttrainError, match="does not fit 72.0 GB with full.*--tuning auto"):
        command(*words, "--gpu", "80GB", "--tuning", "full")
    assert {p.name for p in tmp_path.iterdir()} == {"shape", "h.jsonl"}
    command(*words, "--gpu", "24GB", "--tuning", "lora")
    assert load_recipe(path).model.quantization == "none"  # asked for: the copy to decode from need not fit


def test_one_file_with_safety_labels_trains_two_models(write, tmp_path):
    path = tmp_path / "mine.yaml"
    command(path, *TINY, "--pairs", write("s.jsonl", native("safety_pairs", labels=True)))
    stages = load_recipe(path).stages
    assert stages["reward_helpfulness"].own == stages["reward_safety"].own == ["pairs"]
    assert (stages["reward_helpfulness"].safety_loss_weight, stages["reward_safety"].safety_loss_weight) == (0, 1)
    for line in (tmp_path / "mine.demonstrations.jsonl").read_text(encoding="utf-8").splitlines():  # no answer labelled unsafe is imitated
        said = json.loads(line)["messages"]
        assert all(r["chosen_safe"] for r in shipped("safety_pairs") if r["prompt"] == said[0]["content"] and r["chosen"] == said[1]["content"])


def test_the_files_given_are_named_from_the_recipes_folder(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("h.jsonl", native())
    write("p.jsonl", [{"prompt": f"What is {i} and {i}?"} for i in range(20)])
    command("recipes/new.yaml", *TINY, "--pairs", "h.jsonl", "--prompts", "p.jsonl")
    recipe = load_recipe("recipes/new.yaml")
    assert [e.path for entries in recipe.data_sets.values() for e in entries] == ["../h.jsonl", "../p.jsonl", "new.demonstrations.jsonl"] and \
        recipe.run.name == "new" and recipe.held_out.prompts == 5
    runs.preflight(runs.Run(recipe))


def test_few_others_take_no_own_pairs_away():
    assert own_share(40, 40, 0.5) == 0.5 and own_share(1000, 100, 0.5) == 0.91 and own_share(40, 1000, 0.9) == 0.9
    for own, other in ((1000, 100), (37, 5), (100_000, 3)):
        assert plan.mixed_rows(own, other, own_share(own, other, 0.5))[0] == own


def test_every_row_is_read_once(write, tmp_path, monkeypatch):
    """Looking, check-data, lengths and the plan share what was read, of the given files and of those that are written."""
    read, real = [], data.renamed
    monkeypatch.setattr(data, "renamed", lambda row, columns: read.append(row) or real(row, columns))
    command(tmp_path / "mine.yaml", *TINY, "--helpful", write("h.jsonl", native()), "--safety", write("s.jsonl", native("safety_pairs", labels=True)),
            "--demonstrations", write("d.jsonl", shipped("demonstrations")))
    prompts = (tmp_path / "mine.prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(read) == 24 + 24 + 24 + len(prompts)


def test_a_file_that_changes_is_read_again(write):
    entry, place = DataEntry(path=str(write("h.jsonl", native())), format="preference"), Path()
    with data.remembering():
        first = data.load_entry(entry, place, 0, "x")
        assert data.load_entry(entry, place, 0, "x").items is first.items and data.load_entry(entry, place, 1, "x").items is not first.items
        write("h.jsonl", native()[:20])
        assert len(data.load_entry(entry, place, 0, "x").items) == 20
    assert data.load_entry(entry, place, 0, "x").items is not data.load_entry(entry, place, 0, "x").items


def test_what_a_reward_model_judges_does_not_hang_on_its_share_of_own_pairs(write, tmp_path):
    """One file of many helpful pairs beside few of safety: the share of the own ones is raised above the paper's."""
    from reward.train import judges

    path = tmp_path / "mine.yaml"
    few = write("s.jsonl", [{k: v for k, v in r.items() if not k.endswith("_safe")} for r in native("safety_pairs")[:12]])
    command(path, *TINY, "--helpful", write("h.jsonl", [r | {"prompt": f"{r['prompt']} ({i})"} for i in range(6) for r in native()]), "--safety", few)
    recipe = load_recipe(path)
    assert recipe.stages["reward_helpfulness"].own_share > 0.9 and recipe.stages["reward_safety"].safety_loss_weight == 0
    assert [judges(recipe, n) for n in ("reward_helpfulness", "reward_safety")] == ["helpfulness", "safety"]
    kept = {n: c for n, c in recipe.stages.items() if c.stage != "reward"}
    rewards = {n: c for n, c in recipe.stages.items() if c.stage == "reward"}
    swept = recipe.model_copy(update={"stages": recipe.stages | {"other_size": rewards["reward_helpfulness"].model_copy(update={"fraction": 0.5})}})
    assert judges(swept, "other_size") == "helpfulness"  # as the one of the same pairs
    alone = recipe.model_copy(update={"stages": rewards})
    assert judges(alone, "reward_helpfulness") is None  # nothing tells: it goes by its section's name
    labelled = rewards["reward_safety"].model_copy(update={"safety_loss_weight": 1.0})
    assert judges(recipe.model_copy(update={"stages": {"rm": labelled}}), "rm") == "safety"
    both = recipe.model_copy(update={"stages": {"rm": rewards["reward_helpfulness"],
                                                "ppo": kept["ppo"].model_copy(update={"helpfulness": "@rm", "safety": "@rm"})}})
    assert judges(both, "rm") is None


def test_values_come_back_from_the_text_as_they_were(tmp_path):
    values = {"a": "@x", "b": "it's: {odd} # \"text\"", "c": [1, 0.0003, True, "no", "x/y-z.jsonl"], "d": {"e": "24", "f": "größe"}, "g": "null"}
    path = tmp_path / "v.yaml"
    path.write_text(flow(values), encoding="utf-8")
    from posttrain.config import read_yaml

    assert read_yaml(path) == values


# -- what is asked -------------------------------------------------------------------------------------------------------------------


def test_a_conversation_with_columns_that_no_layout_has(write, tmp_path):
    odd = [{"frage": r["prompt"], "gut": r["chosen"], "schlecht": r["rejected"]} for r in shipped("helpful_pairs")]
    path, pairs = tmp_path / "mine.yaml", write("odd.jsonl", odd)
    answers = ["builtin:tiny-llama", str(pairs), "frage", "gut", "schlecht", "", "nonsense", "helpful", "", "", ""]
    told = command(path, "--gpu", "cpu", answers="\n".join(answers) + "\n")
    assert "Which is which?" in told and told.count("What do they compare") == 2
    entry = load_recipe(path).data["helpful"][0]
    assert (entry.format, entry.columns) == ("preference", {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"})
    assert "no pairs compare safety" in " ".join(path.read_text(encoding="utf-8").replace("#", "").split())


# -- what is refused -----------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(write, tmp_path):
    pairs, path = write("h.jsonl", native()), tmp_path / "mine.yaml"
    for name in ("mine.yaml", "mine.prompts.jsonl", "mine.demonstrations.jsonl"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
        with pytest.raises(PosttrainError, match=rf"{re.escape(name)}: is there already"):
            command(path, *TINY, "--pairs", pairs)
        assert (tmp_path / name).read_text(encoding="utf-8") == "mine" and {p.name for p in tmp_path.iterdir()} == {"h.jsonl", name}
        (tmp_path / name).unlink()


def test_a_row_that_cannot_be_used_stops_with_its_place_or_is_left_out(write, tmp_path):
    pairs, path = write("h.jsonl", [*native(), {"prompt": "Why?", "chosen": "So.", "rejected": "So."}]), tmp_path / "mine.yaml"
    with pytest.raises(PosttrainError, match=r"h\.jsonl, row 25: both answers are .*1 of 25 rows.*--drop-bad-rows"):
        command(path, *TINY, "--pairs", pairs)
    assert {p.name for p in tmp_path.iterdir()} == {"h.jsonl"}
    command(path, *TINY, "--pairs", pairs, "--drop-bad-rows")
    recipe = load_recipe(path)
    assert recipe.data["pairs"][0].bad_rows == "drop"
    runs.preflight(runs.Run(recipe))


@pytest.mark.parametrize("options, said", [
    ((), "no answer to: Preference pairs"), (("--pairs", "nope.jsonl"), r"nope\.jsonl: no such file.*docs/custom-data\.md"),
    (("--pairs", "{d}"), "reads as demonstrations"), (("--pairs", "{few}"), "3 usable pairs"), (("--pairs", "{h}", "--safety", "{h}"), "pairs for both beside"),
    (("--pairs", "{odd}"), "its columns fit no format"), (("--pairs", "{h}", "--tuning", "half"), "--tuning: got 'half'"),
    (("--pairs", "{h}", "--gpu", "big"), "not an amount of memory"), (("--pairs", "{h}", "--columns", "prompt"), "not two names"),
])
def test_faults_are_named_and_nothing_is_written(write, tmp_path, options, said):
    files = {"d": write("d.jsonl", shipped("demonstrations")), "few": write("few.jsonl", native()[:3]), "h": write("h.jsonl", native()),
             "odd": write("odd.jsonl", [{"x": 1}])}
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(PosttrainError, match=said):
        command(tmp_path / "mine.yaml", "--model", "builtin:tiny-llama", "--yes", *(o.format(**files) for o in options))
    assert {p.name for p in tmp_path.iterdir()} == before
    with pytest.raises(PosttrainError, match=r"mine\.txt: not the name of a recipe"):
        command(tmp_path / "mine.txt", *TINY)


def test_templates_by_what_the_vocabulary_has(tmp_path):
    """Turn tokens that are there; none: they are added; no tokenizer: by the vocabulary's size."""
    assert init.choose_template("builtin:tiny-llama", {}).template == "chatml"
    folder = tmp_path / "plain"
    shutil.copytree(builtin.folder(builtin.TINY), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text(encoding="utf-8").replace("<|im_start|>", "<a>").replace("<|im_end|>", "<b>"), encoding="utf-8")
    found = init.choose_template(str(folder), {})
    assert (found.template, found.add_tokens) == ("chatml", True)
    for size, template, add in ((32000, "llama-2", False), (128256, "llama-3", False), (50000, "chatml", True)):
        found = init.choose_template(str(tmp_path), {"model_type": "llama", "vocab_size": size})
        assert (found.tokenizer, found.template, found.add_tokens) == (None, template, add)
