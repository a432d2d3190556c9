"""Export: the folder that leaves the program says what the trained model says, and never stands there half."""

import json
import os
import shutil
from unittest.mock import create_autospec

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import card, chat, export, hub
from posttrain.config import ModelConfig, load_recipe
from posttrain.errors import PosttrainError
from posttrain.merge import merged
from posttrain.models import Roles
from posttrain.runs import Run

RECIPE = """
run:   {{name: tiny-export, seed: 3, threads: 1, dir: "{runs}"}}
model: {{name_or_path: "builtin:tiny-llama", dtype: float32, chat_template: chatml, lora: {{r: 4, alpha: 8}}}}
data:
  demonstrations: [{{path: rows.jsonl, format: messages}}]
  pairs: [{{path: pairs.jsonl, format: preference}}]
  prompts: [{{path: prompts.jsonl, format: prompt}}]
  held_out: {{demonstrations: 1}}
stages:
  sft:  {{data: demonstrations, epochs: 1, packing: false, learning_rate: 1e-3}}
  reward: {{model: "@sft", own: pairs}}
  eval: {{stage: evaluate, models: {{before: base, after: "@sft"}}, prompts: prompts, helpfulness: "@reward", safety: "@reward"}}
  chat: {{stage: export, model: "@sft", dtype: float32, temperature: 0.7, max_new_tokens: 40, evaluation: "@eval"}}
"""


def share(mean, low=None, high=None):
    return {"mean": mean, "low": low, "high": high}


EVALUATION = {"prompts": 8, "unsafe_threshold": 0.5, "models": {
    "before": {"helpfulness": share(0.1, 0.0, 0.2), "unsafe_share": share(0.25, 0.1, 0.4), "tokens": 12.0, "kl": 0.0,
               "kinds": {"adversarial": {"unsafe_share": share(0.5, 0.25, 0.75)}, "helpful": {"refusals": share(0.0)}}},
    "after": {"helpfulness": share(1.5, 1.25, 1.75), "unsafe_share": share(0.125, 0.0, 0.25), "win_rate": share(0.75, 0.5, 1.0), "tokens": 15.0,
              "kl": 3.25, "kinds": {"adversarial": {"unsafe_share": share(0.25, 0.125, 0.5)}, "helpful": {"refusals": share(0.0625)}},
              "violations": {"category": {"illicit_and_criminal": share(0.375, 0.25, 0.5)}, "vector": {"plain": share(0.1)}}}},
    "judge": {"model": "some-judge", "models": {"after": {"safety": {"violation_share": share(0.2, 0.1, 0.3)}}}}}


def randomize(roles, name):
    """An adapter far enough from zero that losing it, or scaling it wrongly, shows."""
    generator = torch.Generator().manual_seed(5)
    for n, p in roles.base.named_parameters():
        if f".{name}." in n and ("lora_" in n or "token_rows" in n):
            p.data = torch.randn(p.shape, generator=generator) * 0.1


def make_run(folder, text=RECIPE, overrides=(), full=False):
    """A run whose sft section holds a model, as if trained."""
    folder.mkdir(exist_ok=True)
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]} for i in range(6)]
    pairs = [{"prompt": f"question {i}", "chosen": "good", "rejected": "bad"} for i in range(4)]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (folder / "prompts.jsonl").write_text('{"prompt": "question 1"}\n')
    path = folder / "recipe.yaml"
    path.write_text(text.format(runs=folder / "runs"))
    run = Run(load_recipe(path, list(overrides)))
    sft = run.section("sft")
    run.start(sft)
    roles = Roles(run.recipe.model, torch.float32, str(path))
    roles.add("policy", fresh_adapter=not full)
    if full:
        for p in roles["policy"].net.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    else:
        randomize(roles, "policy")
    roles.save("policy", sft.folder / "model")
    sft.finish({"steps": 7, "held_out_loss_before": 2.5, "held_out_loss_after": 1.25})
    evaluated = run.section("eval")
    run.start(evaluated)
    evaluated.finish(EVALUATION)
    return run, roles


def exported(run):
    section = run.section("chat")
    run.start(section)
    export.run(section)
    return section


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(run, roles with the unmerged policy, export section, its folder)."""
    run, roles = make_run(tmp_path_factory.mktemp("export"))
    section = exported(run)
    return run, roles, section, section.folder / "model"


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def test_transformers_loads_the_folder_and_it_says_what_the_unmerged_model_says(done):
    _, roles, section, folder = done
    net, _ = load(folder)
    ids = torch.tensor([chat.encode_prompt(roles.tokenizer, [{"role": "user", "content": "Tell me about rivers."}])])
    with torch.no_grad():
        base = roles.base
        roles.pointer[0] = None
        plain = base(ids).logits
        ours = roles.use("policy").net(ids).logits
        theirs = net(ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert (theirs - plain).abs().max() > 0.1  # the adapter is in it
    assert section.state() == "done"
    assert section.results()["merged_kl"] == pytest.approx(0, abs=1e-6)


def test_chat_template_travels_as_file_and_attribute_and_gives_the_ids_of_training(done):
    _, roles, _, folder = done
    _, tokenizer = load(folder)
    messages = [{"role": "user", "content": "hello there"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == chat.encode_prompt(roles.tokenizer, messages)
    assert (folder / "chat_template.jinja").read_text() == roles.tokenizer.chat_template
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == roles.tokenizer.chat_template
    assert roles.tokenizer.padding_side == "right"


def test_generation_config_stops_at_the_end_of_a_turn(done):
    _, roles, _, folder = done
    saved = json.loads((folder / "generation_config.json").read_text())
    end = chat.end_of_turn(roles.tokenizer)
    assert saved["eos_token_id"] == end == 2
    assert saved["pad_token_id"] == 0 != saved["eos_token_id"]
    assert (saved["temperature"], saved["top_p"], saved["max_new_tokens"], saved["do_sample"]) == (0.7, 0.9, 40, True)
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config


def test_another_end_token_of_the_tokenizer_stops_too():
    class Config:
        temperature, top_p, max_new_tokens = 0.0, 0.9, 8

    roles = Roles(ModelConfig(name_or_path="builtin:tiny-llama", chat_template="chatml"), torch.float32, "x")
    roles.tokenizer.eos_token = "<|endoftext|>"
    made = export.generation_config(roles.tokenizer, Config)
    assert made.eos_token_id == [2, 0]
    assert made.do_sample is False


def test_the_exported_model_answers_through_its_template(done):
    from transformers import pipeline

    answer = pipeline("text-generation", str(done[3]))([{"role": "user", "content": "hi"}])[0]["generated_text"][-1]
    assert answer["role"] == "assistant"


def test_nothing_in_the_folder_names_this_machine(done, tmp_path):
    home = str(tmp_path.parent.parent)  # where every temporary folder of this session lies
    for path in done[3].iterdir():
        if path.suffix != ".safetensors":
            assert home not in path.read_text(encoding="utf-8"), path.name
            assert os.path.expanduser("~/") not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("moment", ["write_model", "read_back", "replace"])
def test_a_kill_leaves_no_half_folder_and_the_next_start_finishes(tmp_path, monkeypatch, moment):
    run, _ = make_run(tmp_path)
    real = getattr(export, moment)

    def killed(*args, **kwargs):
        if moment == "write_model":
            (args[2] / "config.json").write_text("{}")
        raise KeyboardInterrupt

    section = run.section("chat")
    run.start(section)
    monkeypatch.setattr(export, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        export.run(section)
    assert not (section.folder / "model").exists()
    assert section.state() == "started"
    monkeypatch.setattr(export, moment, real)
    export.run(section)
    assert section.state() == "done"
    assert load(section.folder / "model")
    assert not [p for p in section.folder.iterdir() if p.name.startswith(".model")]


def test_a_wrong_merge_is_caught_before_it_is_in_place(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path)

    def unscaled(config, folder, dtype, place):
        spec = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(spec | {"lora_alpha": spec["lora_alpha"] / 2}))
        return merged(config, folder, dtype, place)

    monkeypatch.setattr(export, "merged", unscaled)
    with pytest.raises(PosttrainError, match="differs from the trained one"):
        exported(run)
    assert not (run.section("chat").folder / "model").exists()


def test_a_full_model_is_exported_too_and_cast(tmp_path):
    run, roles = make_run(tmp_path, overrides=["model.lora=", "stages.chat.dtype=bfloat16"], full=True)
    section = exported(run)
    tensors = load_file(section.folder / "model" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    net, _ = load(section.folder / "model")
    mine = dict(roles["policy"].net.named_parameters())
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, mine[name].to(torch.bfloat16).float(), rtol=0, atol=0)
    assert 0 < section.results()["merged_kl"] < 0.01


def test_bfloat16_merge_rounds_once_at_the_end(tmp_path):
    run, roles = make_run(tmp_path)
    folder = run.section("sft").folder / "model"
    tensors = load_file(folder / "adapter_model.safetensors")
    net = merged(run.recipe.model, folder, torch.bfloat16, "x")
    base = dict(roles.base.named_parameters())
    key = "model.layers.1.mlp.down_proj"
    a, b = (tensors[f"base_model.model.{key}.lora_{x}.weight"].double() for x in "AB")
    want = (base[f"{key}.base_layer.weight"].double() + 2.0 * (b @ a)).float().to(torch.bfloat16)  # alpha 8 / r 4
    assert (net.get_submodule(key).weight == want).float().mean() > 0.999


def test_a_quantized_run_is_merged_into_the_unquantized_base_and_says_how_far_apart_they_are(tmp_path):
    pytest.importorskip("bitsandbytes")
    run, _ = make_run(tmp_path, overrides=["model.quantization=nf4"])
    section = exported(run)
    assert section.results()["merged_kl"] > 1e-5
    net, _ = load(section.folder / "model")
    plain = Roles(run.recipe.model.model_copy(update={"quantization": "none"}), torch.float32, "x")
    plain.add("policy", run.section("sft").folder / "model")
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():
        torch.testing.assert_close(net(ids).logits, plain.use("policy").net(ids).logits, atol=1e-4, rtol=1e-4)
    assert "nf4 base" in (section.folder / "model" / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_of_added_turn_tokens_are_in_the_exported_vocabulary(tmp_path, tied):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from posttrain import builtin

    base = tmp_path / "base"
    config = AutoConfig.from_pretrained(builtin.folder(builtin.TINY))
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(builtin.folder(builtin.TINY)).save_pretrained(base)
    text = RECIPE.replace("builtin:tiny-llama", str(base)).replace("chat_template: chatml", "chat_template: llama-3, add_tokens: true")
    run, roles = make_run(tmp_path / "run", text=text)
    section = exported(run)  # compares with the unmerged model by itself
    folder = section.folder / "model"
    net, tokenizer = load(folder)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    rows = roles.base.token_rows["policy"]
    torch.testing.assert_close(net.get_input_embeddings().weight[roles.added], rows["input"])
    torch.testing.assert_close(net.get_output_embeddings().weight[roles.added], rows["input" if tied else "output"])
    assert end in json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert not [k for f in folder.glob("*.safetensors") for k in load_file(f) if "token_rows" in k or "heads" in k]


# -- adapters that do not fit --------------------------------------------------------------------------------------------------------


def adapter_with(tmp_path, extra=None, spec=None, drop=()):
    run, _ = make_run(tmp_path)
    folder = run.section("sft").folder / "model"
    tensors = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if k not in drop}
    save_file(tensors | (extra or {}), folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | (spec or {})))
    return run.recipe.model, folder


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    model, folder = adapter_with(tmp_path, {"base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector": torch.ones(3)})
    with pytest.raises(PosttrainError, match=r"up_proj\.lora_magnitude_vector"):
        merged(model, folder, torch.float32, "x")


def test_half_a_pair_of_matrices_is_refused(tmp_path):
    model, folder = adapter_with(tmp_path, drop=["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"])
    with pytest.raises(PosttrainError, match="up_proj' has one LoRA matrix of two"):
        merged(model, folder, torch.float32, "x")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    model, folder = adapter_with(tmp_path, {key: torch.ones(4, 65)})
    with pytest.raises(PosttrainError, match=r"up_proj' wants \(160, 65\)"):
        merged(model, folder, torch.float32, "x")
    model, folder = adapter_with(tmp_path, {k.replace("layers.0", "layers.7"): torch.ones(4, 64) for k in (key, key.replace("_A", "_B"))})
    with pytest.raises(PosttrainError, match=r"no layer 'model\.layers\.7\.mlp\.up_proj'"):
        merged(model, folder, torch.float32, "x")


@pytest.mark.parametrize("spec", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}}, {"bias": "all"}])
def test_adapters_of_other_kinds_are_refused(tmp_path, spec):
    model, folder = adapter_with(tmp_path, spec=spec)
    with pytest.raises(PosttrainError, match="not a plain LoRA adapter"):
        merged(model, folder, torch.float32, "x")


def test_a_scalar_head_is_left_out_and_embedding_rows_are_taken_over(tmp_path):
    rows = torch.full((2, 64), 0.5)
    model, folder = adapter_with(tmp_path, {"base_model.model.score.weight": torch.ones(1, 64),
                                            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
                                 {"trainable_token_indices": {"embed_tokens": [7, 11]}})
    table = merged(model, folder, torch.float32, "x").get_input_embeddings().weight
    torch.testing.assert_close(table[[7, 11]], rows)
    assert not torch.allclose(table[8], rows[0])
    whole = torch.full((384, 64), 0.25)
    model, folder = adapter_with(tmp_path, {"base_model.model.model.embed_tokens.weight": whole})
    torch.testing.assert_close(merged(model, folder, torch.float32, "x").get_input_embeddings().weight.data, whole)


def test_peft_merges_to_the_same_weights(done):
    from peft import PeftModel

    from posttrain import builtin

    net, _ = load(done[3])
    base, _ = load(builtin.folder(builtin.TINY))
    theirs = PeftModel.from_pretrained(base, done[0].section("sft").folder / "model").merge_and_unload()
    mine = dict(net.named_parameters())
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(mine[name], p, atol=1e-6, rtol=1e-6)


# -- the section's settings ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, _ = make_run(tmp_path / "a", overrides=["stages.chat.folder=out/model"])
    section = exported(run)
    assert section.results()["folder"] == "out/model"
    assert (section.folder / "model" / "config.json").samefile(tmp_path / "out/model/config.json")  # @chat works
    (section.folder / "DONE").unlink()
    export.run(section)  # its own folder may be made again
    shutil.rmtree("out/model")
    os.mkdir("out/model")
    (tmp_path / "out/model/thesis.txt").write_text("mine")
    with pytest.raises(PosttrainError, match="holds something else"):
        export.run(section)
    assert (tmp_path / "out/model/thesis.txt").exists()


def test_results_name_the_folder_and_its_files(done, monkeypatch):
    _, _, section, folder = done
    results = section.results()
    assert not os.path.isabs(results["folder"])
    assert os.path.samefile(results["folder"], folder)
    assert set(results["files"]) == {p.name for p in folder.iterdir()}
    assert set(results["files"]) >= {"README.md", "LICENSE", "config.json", "model.safetensors", "tokenizer.json"}


# -- the card ------------------------------------------------------------------------------------------------------------------------


def front(text):
    import yaml

    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_the_model_is(done):
    text = (done[3] / "README.md").read_text()
    head = front(text)
    assert head["license"] == "cc0-1.0"
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert "base_model" not in head  # a built-in random model has no place on the hub
    assert "| `sft` | sft | base | held-out loss 1.25 (was 2.50); steps 7 |" in text
    assert "| demonstrations | rows.jsonl | messages | 5 | 1 |" in text
    assert "| **after** (this model) | 1.50 [1.25, 1.75] | 12.5% [0.0%, 25.0%] | 75% [50%, 100%] | 15 | 3.25 |" in text
    assert "| model | unsafe answers to adversarial prompts | violations as judged by some-judge | refusals of harmless prompts |" in text
    assert "| before | 50.0% [25.0%, 75.0%] | - | 0.0% |" in text
    assert "| **after** (this model) | 25.0% [12.5%, 50.0%] | 20.0% [10.0%, 30.0%] | 6.2% |" in text
    assert "| illicit and criminal | 37.5% [25.0%, 50.0%] |" in text
    assert "temperature 0.7, top-p 0.9, at most 40 new tokens" in text
    assert "random model of two layers" in text
    assert "learning_rate: 0.001" in text  # the recipe
    assert "{{" not in text.replace("{{{", "")


def test_the_card_of_the_packaged_model_says_what_stands_in_for_a_base():
    model = ModelConfig(name_or_path="builtin:smollm2-135m-instruct")
    assert card.hub_name(model) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.licence(model) == "apache-2.0"


def test_licence_from_the_recipe_the_base_folder_or_unknown(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    named = ModelConfig(name_or_path=str(folder))
    assert card.licence(named) == "unknown"
    assert "not known" in card.licence_note(named)
    (folder / "README.md").write_text("---\ntags: [a]\nlicense: mit\n---\nlicense: other\n")
    assert card.licence(named) == "mit"
    llama = ModelConfig(name_or_path="meta-llama/Llama-2-7b-hf", licence="llama2")
    assert card.licence(llama) == "llama2"
    assert "LLAMA 2 Community License, Copyright (c) Meta Platforms" in card.licence_note(llama)
    assert card.hub_name(llama) == "meta-llama/Llama-2-7b-hf"


def test_the_recipe_in_the_card_holds_overrides_and_what_it_extends_but_no_folder_of_this_machine(tmp_path):
    run, _ = make_run(tmp_path, overrides=["stages.sft.weight_decay=0.125", f"data.demonstrations.0.path={tmp_path / 'rows.jsonl'}"])
    text = card.recipe_text(run.recipe)
    assert "weight_decay: 0.125" in text
    assert ".../rows.jsonl" in text
    assert str(tmp_path) not in text
    assert "adam_beta1" not in text


def test_attacks_of_a_finished_red_teaming_stand_in_the_card(tmp_path):
    attacks = '  attacks: {{stage: redteam, models: {{before: base, after: "@sft"}}, prompts: prompts, helpfulness: "@reward", safety: "@reward"}}\n'
    run, _ = make_run(tmp_path, text=RECIPE + attacks)
    section, attacked = run.section("chat"), run.section("attacks")
    run.start(section)
    assert "Red teaming" not in card.render(section, dtype="float32")
    run.start(attacked)
    rates = {"before": share(40.0, 30.0, 50.0), "after": share(12.5, 10.0, 15.0)}
    attacked.finish({"models": {name: {"violations_per_100": rate} for name, rate in rates.items()}})
    assert "| **after** (this model) | 12.5 [10.0, 15.0] |" in card.render(section, dtype="float32")


def test_a_card_without_figures_says_so(tmp_path):
    run, _ = make_run(tmp_path, overrides=["stages.chat.evaluation="])
    section = run.section("chat")
    run.start(section)
    text = card.render(section, dtype="float32")
    assert "No safety figures are recorded for this model." in text and "None was named in the recipe" in text


NOTICE = "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."


NOTICE_3 = "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved. Built with Llama."


@pytest.mark.parametrize(("licence", "notice"), [("llama2", NOTICE), ("llama3.1", NOTICE_3)])
def test_the_notice_that_a_licence_demands_is_in_card_licence_and_notice(tmp_path, licence, notice):
    run, _ = make_run(tmp_path, overrides=[f"model.licence={licence}"])
    folder = exported(run).folder / "model"
    text = (folder / "README.md").read_text()
    assert front(text)["license"] == licence and f"**{notice}**" in text
    assert (folder / "NOTICE").read_text() == notice + "\n" and notice in (folder / "LICENSE").read_text()


def test_no_notice_where_none_is_demanded(done):
    assert not (done[3] / "NOTICE").exists()


# -- the hub -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch):
    """A stand-in for the hub with the signatures of the real client; `calls` lists what changed it, in order."""
    import huggingface_hub

    made = create_autospec(huggingface_hub.HfApi, instance=True)
    made.whoami.return_value = {"name": "me"}
    made.repo_info.return_value.private = True
    made.list_repo_files.return_value = ["config.json", "LICENSE.txt", "USE_POLICY.md"]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def changes(api):
    return [c for c in api.method_calls if c[0] in ("create_repo", "upload_file", "upload_folder")]


def test_push_sends_the_card_first_then_the_folder_privately(done, api, capsys):
    hub.push(done[2].folder, "me/small", public=False)
    create, words, weights = changes(api)
    assert create.args == ("me/small",) and create.kwargs == {"private": True, "exist_ok": True}
    text = words.kwargs["path_or_fileobj"].decode()
    assert words.kwargs["path_in_repo"] == "README.md" and 'name = "me/small"' in text and 'name = "."' not in text
    assert weights.kwargs["repo_id"] == "me/small" and weights.kwargs["folder_path"] == done[3] and "README.md" in weights.kwargs["ignore_patterns"]
    assert "https://huggingface.co/me/small" in capsys.readouterr().out
    api.reset_mock()
    hub.push(done[3], "me/small", public=True)
    assert changes(api)[0].kwargs == {"private": False, "exist_ok": True}


def test_push_refuses_what_is_no_export_and_names_that_are_none(done, api, tmp_path):
    with pytest.raises(PosttrainError, match=r"no posttrain\.json"):
        hub.push(tmp_path, "me/small", public=False)
    for name in ("small", "a/b/c", "me/sm all"):
        with pytest.raises(PosttrainError, match="OWNER/NAME"):
            hub.push(done[3], name, public=False)
    assert not changes(api)


def test_a_private_push_never_goes_into_a_public_repository(done, api):
    api.repo_info.return_value.private = False
    with pytest.raises(PosttrainError, match="is public already"):
        hub.push(done[3], "me/small", public=False)
    assert [c[0] for c in changes(api)] == ["create_repo"]


def test_push_keeps_the_licences_rules(tmp_path, api):
    def push(licence, name, public=False, base="meta-llama/Some-Base"):
        folder = tmp_path / f"{licence}-{name.partition('/')[2]}"
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        (folder / export.MARK).write_text(json.dumps({"run": "r", "section": "chat", "base": base}))
        hub.push(folder, name, public)
        return folder

    (tmp_path / "text").write_text("the agreement")
    api.hf_hub_download.return_value = str(tmp_path / "text")
    with pytest.raises(PosttrainError, match="begin with “Llama 3”.*me/Llama-3-my-chat"):
        push("llama3", "me/my-chat")
    with pytest.raises(PosttrainError, match="begin with “Llama”"):
        push("llama3.2", "me/my-Llama-chat")
    with pytest.raises(PosttrainError, match="licence of the base is not known"):
        push("unknown", "me/a", public=True)
    assert not changes(api)
    push("unknown", "me/a")
    api.reset_mock()
    for licence, name in (("llama3", "me/Llama-3-mine"), ("llama3.1", "me/llama_mine"), ("llama2", "me/anything")):
        push(licence, name)
        sent = {c.kwargs["path_in_repo"]: c.kwargs["path_or_fileobj"] for c in changes(api) if c[0] == "upload_file"}
        assert sent["BASE_LICENSE.txt"] == sent["BASE_USE_POLICY.md"] == b"the agreement"
        api.reset_mock()
    with pytest.raises(PosttrainError, match="no copy of the base's licence"):
        push("llama2", "me/local", base=".../llama-2-7b")
    assert not changes(api)
    (tmp_path / "llama2-local" / "BASE_LICENSE").write_text("the agreement")
    push("llama2", "me/local", base=".../llama-2-7b")
    assert [c[0] for c in changes(api)] == ["create_repo", "upload_file", "upload_folder"]


@pytest.mark.parametrize("name", ["BASE_LICENSE", "BASE_license.md", "BASE_LICENSE.txt", "base_Licence.TXT"])
def test_a_licence_beside_the_model_is_found_however_it_is_written(tmp_path, api, name):
    (tmp_path / "README.md").write_text("---\nlicense: llama2\n---\n")
    (tmp_path / export.MARK).write_text(json.dumps({"run": "r", "section": "chat", "base": ".../llama-2-7b"}))
    for other in ("BASE_NOTICE", "BASE_USE_POLICY.md"):  # which are not the licence
        (tmp_path / other).write_text("more words")
    with pytest.raises(PosttrainError, match="no copy of the base's licence"):
        hub.push(tmp_path, "me/mine", public=False)
    (tmp_path / name).write_text("the agreement")
    hub.push(tmp_path, "me/mine", public=False)
    assert [c[0] for c in changes(api)] == ["create_repo", "upload_file", "upload_folder"]


def test_licence_files_of_the_bases_repository_however_they_are_written(tmp_path, api):
    (tmp_path / "README.md").write_text("---\nlicense: llama2\n---\n")
    (tmp_path / export.MARK).write_text(json.dumps({"run": "r", "section": "chat", "base": "meta-llama/Some-Base", "revision": "abc"}))
    (tmp_path / "BASE_notice").write_text("here already")
    api.list_repo_files.return_value = ["license.md", "Use-Policy.md", "NOTICE", "original/LICENSE", "config.json"]
    (tmp_path / "text").write_text("the agreement")
    api.hf_hub_download.return_value = str(tmp_path / "text")
    assert set(hub.licence_copies(api, tmp_path)) == {"BASE_license.md", "BASE_Use-Policy.md"}
    assert all(c.kwargs["revision"] == "abc" for c in api.method_calls if c[0] in ("list_repo_files", "hf_hub_download"))


def test_push_says_what_to_do_when_the_hub_says_no(done, api):
    import httpx2 as httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api.whoami.side_effect = LocalTokenNotFoundError("no token")
    with pytest.raises(PosttrainError, match="nobody is logged in.*`hf auth login`"):
        hub.push(done[3], "me/small", public=False)
    api.whoami.side_effect = None
    api.create_repo.side_effect = HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=httpx.Request("POST", "http://x")))
    with pytest.raises(PosttrainError, match="the hub refused.*token that may write"):
        hub.push(done[3], "me/small", public=False)
    api.create_repo.side_effect = httpx.ConnectError("no route")
    with pytest.raises(PosttrainError, match="cut off .ConnectError: no route.*a connection to the hub"):
        hub.push(done[3], "me/small", public=False)
