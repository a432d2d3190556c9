"""The plan's arithmetic against hand numbers, and the origin of every number: counted, declared or estimated."""

import json
import subprocess
import sys

import pytest

from posttrain import plan
from posttrain.config import DataEntry, LoraSettings, ModelConfig, load_recipe
from posttrain.errors import PosttrainError
from posttrain.plan import batch_and_steps, mixed_rows, packed_rows, warmup_steps
from posttrain.shape import check_on_meta, read_shape, shape_of

LLAMA = "meta-llama/Llama-2-7b-hf"


def shape(name=LLAMA):
    return read_shape(ModelConfig(name_or_path=name), "x")


# -- shapes: the published sizes of Llama 2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "parameters"), [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)])
def test_parameters_of_llama_2(size, parameters):
    assert shape(f"meta-llama/Llama-2-{size}-hf").parameters == parameters


def test_an_adapter_of_rank_16_on_every_linear_layer_of_7b():
    # a layer: four of 4096+4096, two of 4096+11008, one of 11008+4096 = 78,080; x 16 x 32
    assert shape().lora(LoraSettings(r=16)) == 78_080 * 16 * 32 == 39_976_960
    assert shape().lora(LoraSettings(r=8, target_modules=["q_proj", "v_proj"])) == 2 * 8192 * 8 * 32
    with pytest.raises(PosttrainError, match="no layer 'query'"):
        shape().lora(LoraSettings(target_modules=["query"]))


def test_bytes_of_7b():
    s = shape()
    assert s.body == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) == 6_476_005_376
    assert s.weights("none", 2) == 2 * 6_738_415_616
    # nf4: 0.5159 bytes a body weight; embeddings, head and norms 2 bytes each
    assert s.weights("nf4", 2) == pytest.approx(6_476_005_376 * 0.51587 + 2 * 262_410_240, rel=1e-4)
    assert s.kv(2) == 512 * 1024  # half a mebibyte a token
    assert s.activations(2, True) < s.activations(2, False) / 10


@pytest.mark.parametrize("config", [
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "head_dim": 24},
    {"model_type": "llama", "tie_word_embeddings": True}, {"model_type": "mistral", "num_key_value_heads": 2},
    {"model_type": "qwen2", "num_key_value_heads": 2},
    {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
])
def test_counts_equal_what_transformers_builds(config):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 99, **config}
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    mine = shape_of(config)
    assert mine.exact
    assert mine.parameters == sum(p.numel() for p in built.parameters())
    linear = {n.split(".")[-1]: (m.in_features, m.out_features) for n, m in built.model.named_modules() if hasattr(m, "in_features")}
    assert mine.linears == linear


def test_transformers_reads_the_shipped_shapes():
    assert "6,738,415,616 parameters, as planned" in check_on_meta(load_recipe("recipes/llama2-7b-qlora.yaml"))


def test_a_model_whose_shape_is_nowhere():
    with pytest.raises(PosttrainError, match=r"the shape of 'nobody/nothing' is not here.*hf download nobody/nothing config.json"):
        shape("nobody/nothing")


# -- steps -----------------------------------------------------------------------------------------------------------------------------


def test_steps_of_the_papers_fine_tuning():
    assert batch_and_steps(27_540, 64, None, 2, None) == (64, 861)  # method.md section 2


@pytest.mark.parametrize(("rows", "paper", "requested", "epochs", "ceiling", "want"), [
    (1600, 64, None, 2, None, (64, 50)),  # exactly enough
    (1568, 64, None, 2, None, (63, 50)),  # 49 steps of 64 are one too few
    (200, 64, None, 2, None, (8, 50)),
    (600, 512, None, 1, None, (12, 50)),
    (20, 64, None, 1, None, (1, 20)),  # no batch gives 50
    (200, 64, 64, 2, None, (64, 7)),  # asked for is asked for
    (27_540, 64, None, 2, 100, (64, 100)),
    (200, 64, 64, 2, 100, (64, 7)),  # a ceiling, no more
    (3, 64, 64, 0.5, None, (64, 1)),
])
def test_the_batch_is_lowered_until_there_are_50_steps(rows, paper, requested, epochs, ceiling, want):
    assert batch_and_steps(rows, paper, requested, epochs, ceiling) == want


def test_warm_up_is_3_percent_and_at_least_5():
    assert [warmup_steps(n, 0.03) for n in (5700, 1010, 170, 100, 10, 3, 1)] == [171, 31, 6, 5, 5, 2, 0]
    assert warmup_steps(100, 0.0) == 0


@pytest.mark.parametrize("sizes", [(100, 40, 0.5), (40, 100, 0.5), (100, 100, 0.9), (1000, 5, 0.9), (10, 0, 0.5), (10, 10, 1.0),
                                   (7, 3, 0.3)])
def test_the_mix_is_that_of_reward_training(sizes):
    from posttrain.formats import Pair
    from reward.mix import mix

    own, other, share = sizes
    rows = [[Pair(prompt=[], chosen=f"{side} {i}", rejected="b", source="s") for i in range(n)]
            for side, n in (("own", own), ("other", other))]
    told = mix(*rows, share, 0)[1]
    assert mixed_rows(own, other, share) == (told["own"], told["other"])


def test_packing_is_estimated_close_to_what_next_fit_makes():
    import random

    from posttrain.training import bin_by_length

    rng = random.Random(1)
    lengths = [rng.randint(20, 360) for _ in range(4000)]
    made = len(bin_by_length(lengths, 2048, 0))
    assert packed_rows(4000, sum(lengths) / 4000, 2048) == pytest.approx(made, rel=0.03)


# -- recipes ---------------------------------------------------------------------------------------------------------------------------

RECIPE = """
run: {{name: planned}}
model: {{name_or_path: {model}, lora: {{r: 16, alpha: 32}}, quantization: nf4}}
data:
  shown: [{{path: shown.jsonl, format: messages, weight: 2}}]
  hub: [{{path: owner/Some-Data15k, format: messages, expect: {{rows: 15011, tokens: 190}}}}]
  prompts: [{{path: prompts.jsonl, format: prompt}}]
  pairs: [{{path: owner/pairs, data_dir: part-a, format: preference{expect}}}]
  held_out: {{demonstrations: {held}, prompts: 10}}
stages:
  local: {{stage: sft, data: shown, packing: false, batch_size: 4}}
  far: {{stage: sft, data: hub, packing: false}}
  mixed: {{stage: sft, data: [hub, "@best"]}}
  rm: {{stage: reward, model: "@local", own: pairs}}
  best: {{stage: rejection, prompts: prompts, policy: "@local", helpfulness: "@rm", safety: "@rm", samples_per_prompt: 4, batch: 8,
         max_new_tokens: 100, max_prompt_tokens: 50}}
  ppo: {{prompts: prompts, policy: "@local", helpfulness: "@rm", safety: "@rm", iterations: 3, batch_size: 10, mini_batch_size: 4,
        max_new_tokens: 100}}
  eval: {{stage: evaluate, models: {{a: base, b: "@ppo"}}, prompts: prompts, helpfulness: "@rm", safety: "@rm", samples_per_prompt: 2}}
  out: {{stage: export, model: "@ppo"}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"messages": [{"role": "user", "content": f"number {i} please"}, {"role": "assistant", "content": "here is the answer to it"}]}
            for i in range(30)]
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"two words {i}"}) + "\n" for i in range(50)))

    def make(expect=", expect: {rows: 1000, tokens: 300}", held=10, overrides=()):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(model=LLAMA, expect=expect, held=held))
        return load_recipe(path, list(overrides))

    return make


def rows_of(recipe, **kw):
    return {r["section"]: r for r in plan.plan(recipe, **kw)}


def test_counted_declared_and_estimated(recipe):
    rows = rows_of(recipe())
    local, far, mixed, rm = (rows[n] for n in ("local", "far", "mixed", "rm"))
    assert (local["rows"], local["labels"]["rows"], local["labels"]["steps"]) == (30 * 2 - 10, "counted", "counted")
    assert local["tokens_per_row"] == pytest.approx(1.35 * 9)
    assert local["labels"]["tokens_per_row"] == "estimated"
    assert (local["batch"], local["steps"], local["warmup"]) == (4, 25, 5)
    assert (far["rows"], far["tokens_per_row"]) == (15_001, 190)
    assert {far["labels"][k] for k in ("rows", "tokens_per_row", "steps", "tokens")} == {"declared"}
    assert (far["batch"], far["steps"]) == (64, 469)  # 15,001 x 2 / 64
    assert far["tokens"] == 15_001 * 190 * 2
    assert (mixed["rows"], mixed["labels"]["rows"]) == (15_001 + 40, "estimated")
    assert (rm["rows"], rm["batch"], rm["steps"]) == (1000, 20, 50)
    assert "lowered from 512 for 50 steps" in rm["arithmetic"]


def test_samples_and_passes(recipe):
    rows = rows_of(recipe())
    best, ppo, evaluated = rows["best"], rows["ppo"], rows["eval"]
    assert (best["rows"], best["samples"], best["labels"]["samples"]) == (40, 160, "counted")
    assert best["tokens"] == round(160 * (1.35 * 3 + 100) * 3)  # drawn once, scored twice
    assert (ppo["samples"], ppo["steps"], ppo["batch"]) == (30, 9, 4)
    assert ppo["tokens"] == round(30 * (1.35 * 3 + 100) * 7)  # drawn; reference, two scores, values; policy and critic trained
    assert (evaluated["rows"], evaluated["samples"]) == (10, 10 * 2 * 2)


def test_memory_by_hand(recipe):
    rows = rows_of(recipe())
    lora, base = 39_976_960, shape().weights("nf4", 2)
    local = rows["local"]["memory"]
    assert (local["base"], local["roles"], local["optimizer"]) == (base, 4 * lora, 12 * lora)  # float32 weight; gradient and two moments
    assert local["activations"] == 4096 * 32 * (18 * 4096 + 6 * 11008) * 2
    assert local["total"] == sum(local[k] for k in ("base", "roles", "optimizer", "activations"))
    best, ppo = rows["best"]["memory"], rows["ppo"]["memory"]
    assert best["kv_cache"] == 8 * (37 + 100) * 512 * 1024  # the longest prompt: three words, 4 tokens, and 32 of the template
    assert (best["roles"], best["optimizer"]) == (3 * 4 * lora, 0)
    assert (ppo["roles"], ppo["optimizer"]) == (5 * 4 * lora, 2 * 12 * lora)  # policy and critic learn
    assert ppo["total"] == ppo["base"] + ppo["roles"] + ppo["optimizer"] + max(ppo["kv_cache"], ppo["activations"])
    assert rows["out"]["memory"]["total"] == 2 * 6_738_415_616


def test_adapters_on_an_unquantized_base_decode_from_a_merged_copy(recipe):
    rows = rows_of(recipe(overrides=["model.quantization=none"]), gpu=80)
    best = rows["best"]["memory"]
    assert best["decoder"] == 2 * 6_476_005_376
    assert rows["local"]["memory"]["decoder"] == 0
    assert best["total"] == best["base"] + best["roles"] + best["kv_cache"] + best["decoder"]
    assert rows_of(recipe(overrides=["model.quantization=none"]), gpu=17)["best"]["fits"]  # made only where there is room


def test_full_training_holds_every_role_in_float32(recipe):
    rows = rows_of(recipe(overrides=["model.lora=", "model.quantization=none"]))
    parameters = 6_738_415_616
    assert rows["local"]["memory"]["roles"] + rows["local"]["memory"]["optimizer"] == 16 * parameters
    assert rows["ppo"]["memory"]["roles"] + rows["ppo"]["memory"]["optimizer"] == (5 * 4 + 2 * 12) * parameters


def test_a_hub_data_set_without_declared_size_is_named(recipe):
    with pytest.raises(PosttrainError, match=r"data.pairs\[0\].expect: the hub data set 'owner/pairs' declares no size"):
        rows_of(recipe(expect=""))
    assert rows_of(recipe(expect=""), sections=["local", "far"]).keys() == {"local", "far"}  # only what is needed


def test_declared_rows_give_way_to_counted_ones_once_the_data_is_here(recipe, tmp_path):
    folder = tmp_path / "cache/huggingface/datasets/owner___pairs/default-data_dir=part-a/0.0.0/abc"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"splits": {"train": {"name": "train", "num_examples": 1234}}}))
    row = rows_of(recipe())["rm"]
    assert (row["rows"], row["labels"]["rows"], row["labels"]["tokens_per_row"]) == (1234, "counted", "declared")
    folder = tmp_path / "cache/huggingface/datasets/owner___some-data15k/default/0.0.0/abc"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{")  # damaged: the declared one stays
    assert rows_of(recipe())["far"]["labels"]["rows"] == "declared"


def test_the_cache_names_are_those_of_datasets():
    from datasets import BuilderConfig
    from datasets.naming import camelcase_to_snakecase

    assert BuilderConfig("default").create_config_id(config_kwargs={"data_dir": "helpful-base"}) == "default-data_dir=helpful-base"
    assert camelcase_to_snakecase("HelpSteer3") == "help_steer3"
    assert camelcase_to_snakecase("PKU-SafeRLHF") == "pku-safe_rlhf"


def test_rows_in_the_cache_of_a_data_set_with_capitals(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    folder = tmp_path / "PKU-Alignment___pku-safe_rlhf/default/0.0.0/abc"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"splits": {"train": {"num_examples": 73907}}}))
    assert plan.cached_rows(DataEntry(path="PKU-Alignment/PKU-SafeRLHF", format="safe_rlhf")) == 73907
    assert plan.cached_rows(DataEntry(path="PKU-Alignment/PKU-SafeRLHF", format="safe_rlhf", split="test")) is None


def test_warnings(recipe):
    rows = rows_of(recipe(overrides=["stages.local.batch_size=8"]), gpu="24GB")
    assert rows["local"]["warnings"][0].startswith("13 steps are fewer than five times the 5 warm-up steps")
    assert not rows["local"]["fits"]  # 4096 tokens of activations without checkpointing
    assert "activation_checkpointing: true" in rows["local"]["warnings"][1]
    assert rows["out"]["fits"]
    with pytest.raises(PosttrainError, match="--gpu plenty: not an amount of memory"):
        plan.plan(recipe(), gpu="plenty")


def test_the_page_labels_every_number(recipe):
    text = plan.render(plan.plan(recipe(), gpu=24))
    assert "6.74 B parameters, 39.98 M in an adapter (counted); quantization nf4" in text
    assert "15,001 declared" in text
    assert "fits 24 GB" in text
    assert "warning: local: " in text
    assert "fits" not in plan.render(plan.plan(recipe()))
    assert max(map(len, text.splitlines())) < 180


def test_the_tiny_plan_is_what_a_run_does(tmp_path):
    """All data is here: the plan's rows are those of the run's own split."""
    from posttrain.runs import Run

    loaded = load_recipe("recipes/tiny.yaml", [f"run.dir={tmp_path}"])
    rows, data = rows_of(loaded), Run(loaded).data
    assert rows["sft"]["rows"] == len(data.split("demonstrations").train)
    assert rows["eval"]["rows"] == len(data.split("prompts").held_out)
    assert rows["v1_samples"]["rows"] == len(data.split("prompts").train)
    assert {rows[n]["labels"]["rows"] for n in ("sft", "reward_safety", "v1_samples", "ppo")} == {"counted"}


@pytest.mark.parametrize("name", ["llama2-7b-qlora", "llama2-7b-full"])
def test_the_7b_recipes_are_planned_at_once_without_torch_or_network(name, tmp_path):
    code = (f"import socket\n"
            f"def no(*a, **k): raise OSError('no network here')\n"
            f"socket.socket.connect = no; socket.getaddrinfo = no\n"
            f"import sys\nfrom posttrain import plan\nfrom posttrain.config import load_recipe\n"
            f"print(plan.render(plan.plan(load_recipe('recipes/{name}.yaml'), gpu='24GB')))\n"
            f"assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)")
    env = {"PATH": "/usr/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    assert "6.74 B parameters" in done.stdout
    assert "14,811 declared" in done.stdout  # dolly's 15,011 rows but 200


def test_the_7b_recipes_are_the_papers():
    qlora, full = (load_recipe(f"recipes/llama2-7b-{n}.yaml") for n in ("qlora", "full"))
    from posttrain.stages import STAGES

    kinds = {c.stage for c in qlora.stages.values()}
    assert kinds >= {"sft", "reward", "rejection", "ppo", "evaluate", "export"}
    assert kinds <= set(STAGES)
    for recipe, adapters, rates in ((qlora, True, (2e-4, 1e-4, 1e-5, 1e-4)), (full, False, (2e-5, 1e-5, 1e-6, 1e-5))):
        s = recipe.stages
        assert (recipe.model.lora is not None, recipe.model.quantization) == (adapters, "nf4" if adapters else "none")
        assert (s["sft"].learning_rate, s["reward_safety"].learning_rate, s["ppo"].learning_rate, s["ppo"].critic_learning_rate) == rates
        assert (s["reward_helpfulness"].own_share, s["reward_safety"].own_share) == (0.5, 0.9)
        assert (s["ppo"].iterations, s["ppo"].batch_size, s["ppo"].mini_batch_size, s["ppo"].kl_coef) == (200, 512, 64, 0.01)
        assert s["v1"].model == "base"
    assert all(r["fits"] for r in plan.plan(qlora, gpu="24GB"))
