"""The plan's arithmetic against hand numbers and measured allocations, and the origin of every number: counted, declared or estimated."""

import json
import shlex
import subprocess
import sys

import pytest

from posttrain import cards, memory, plan
from posttrain.config import DataEntry, LoraSettings, ModelConfig, load_recipe
from posttrain.errors import PosttrainError
from posttrain.memory import Way
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
    # of a layer and token: what two norms scale; 2-byte inputs of matrices, q, k, v, out, and four of the width of the ffn; 7 x 16 low-rank
    # products; a float32 number of each head's softmax
    kept = 2 * 2 * 4096 + 2 * (2 * 4096 + 4 * 4096 + 4 * 11008 + 7 * 16) + 4 * 32
    assert memory.layer(s, Way(2, rank=16)) == kept
    assert memory.training(s, Way(2, rank=16), 4096, True) < memory.training(s, Way(2, rank=16), 4096, False) / 10


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


PRESENT = cards.present


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """As on a machine without one."""
    monkeypatch.setattr(cards, "present", lambda: None)


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


def test_the_judges_of_a_rounds_answers_count(recipe):
    judged = {"stage": "directions", "rounds": ["@best", "@best"], "judges": ["@rm", "@rm"]}
    rows = rows_of(recipe(overrides=[f"stages.checks={json.dumps(judged)}", "stages.idle={stage: directions, rewards: ['@rm', '@rm']}"]))
    idle, checks, best = rows["idle"], rows["checks"], rows["best"]
    assert idle["memory"]["total"] == 0 and idle["roles"] == [] and "scored anew" not in idle["note"]
    assert [r["role"] for r in checks["roles"]] == ["helpfulness", "safety"] and not any(r["trained"] for r in checks["roles"])
    assert checks["memory"]["base"] == best["memory"]["base"] > 0 and checks["memory"]["kv_cache"] == 0
    assert checks["memory"]["activations"] == best["memory"]["activations"]  # the answers of a prompt go together, as they did then
    assert checks["tokens"] == round(2 * 160 * (1.35 * 3 + 100)) and "320 answers scored anew" in checks["note"]


def test_samples_and_passes(recipe):
    rows = rows_of(recipe())
    best, ppo, evaluated = rows["best"], rows["ppo"], rows["eval"]
    assert (best["rows"], best["samples"], best["labels"]["samples"]) == (40, 160, "counted")
    assert best["tokens"] == round(160 * (1.35 * 3 + 100) * 3)  # drawn once, scored twice
    assert (ppo["samples"], ppo["steps"], ppo["batch"]) == (30, 9, 4)
    assert ppo["tokens"] == round(30 * (1.35 * 3 + 100) * 8)  # drawn; policy, reference, two scores, values; policy and critic trained
    exact = rows_of(recipe(overrides=["model.quantization=none", "model.dtype=float32"]))["ppo"]  # the sampler's log-probabilities are the trainer's
    assert exact["tokens"] == round(30 * (1.35 * 3 + 100) * 7)
    assert (evaluated["rows"], evaluated["samples"]) == (10, 10 * 2 * 2)


def test_memory_by_hand(recipe):
    rows = rows_of(recipe())
    lora, base, way = 39_976_960, shape().weights("nf4", 2), Way(2, rank=16, quantized=True)
    local = rows["local"]["memory"]
    assert (local["base"], local["roles"], local["gradients"], local["optimizer"]) == (base, 4 * lora, 4 * lora, 8 * lora)  # float32; two moments
    assert local["activations"] == memory.training(shape(), way, 45, False)  # the longest row: nine words, and 32 tokens of the template
    assert local["total"] == sum(local[k] for k in ("base", "roles", "optimizer", "gradients", "activations"))
    best, ppo = rows["best"]["memory"], rows["ppo"]["memory"]
    assert best["kv_cache"] == 8 * (37 + 100) * 512 * 1024  # the longest prompt: three words, 4 tokens, and 32 of the template
    assert (best["roles"], best["optimizer"], best["gradients"]) == (3 * 4 * lora, 0, 0)
    assert (ppo["roles"], ppo["gradients"], ppo["optimizer"]) == (5 * 4 * lora, 2 * 4 * lora, 2 * 8 * lora)  # policy and critic learn
    assert ppo["total"] == ppo["base"] + ppo["roles"] + ppo["optimizer"] + max(ppo["kv_cache"] + ppo["decoding"], ppo["gradients"] + ppo["activations"])
    assert rows["out"]["memory"]["total"] == 2 * 6_738_415_616


def test_every_role_has_its_bytes(recipe):
    rows = rows_of(recipe())
    assert [(r["role"], r["trained"], r["parameters"], r["weights"], r["gradients"], r["optimizer"]) for r in rows["ppo"]["roles"]] == [
        (name, learns, 39_976_960, 4 * 39_976_960, 4 * 39_976_960 * learns, 8 * 39_976_960 * learns)
        for name, learns in (("policy", True), ("critic", True), ("reference", False), ("helpfulness", False), ("safety", False))]
    assert [r["role"] for r in rows["eval"]["roles"]] == ["b", "helpfulness", "safety"]  # `a` is the base, which all share


def test_a_pair_goes_through_together(recipe):
    """Both answers, each with the prompt, are one micro-batch at least."""
    row = rows_of(recipe(overrides=["stages.rm.max_length=300", "stages.rm.micro_batch_tokens=400"]))["rm"]
    assert row["memory"]["activations"] == memory.training(shape(), Way(2, rank=16, quantized=True), 600, False, logits=False)


def test_adapters_on_an_unquantized_base_decode_from_a_merged_copy(recipe):
    rows = rows_of(recipe(overrides=["model.quantization=none"]), gpu=80)
    best = rows["best"]["memory"]
    assert best["decoder"] == 2 * 6_476_005_376
    assert rows["local"]["memory"]["decoder"] == 0
    assert best["total"] == best["base"] + best["roles"] + best["decoder"] + max(best["kv_cache"] + best["decoding"], best["activations"])
    assert rows_of(recipe(overrides=["model.quantization=none"]), gpu=24)["best"]["fits"]  # made only where there is room


FULL = ["model.lora=", "model.quantization=none"]


def test_full_training_holds_every_role_in_float32_and_cards_share_the_work(recipe):
    rows, parameters = rows_of(recipe(overrides=FULL)), 6_738_415_616

    def held(row):
        return sum(row["memory"][k] for k in ("roles", "gradients", "optimizer"))

    assert held(rows["local"]) == 16 * parameters
    assert held(rows["ppo"]) == (5 * 4 + 2 * 12) * parameters
    local = rows["local"]["memory"]
    assert local["total"] == held(rows["local"]) + local["gradients"]  # the optimizer's step needs one more copy, more than the activations here
    eight = rows_of(recipe(overrides=FULL), gpu="8x80GB")
    assert held(eight["ppo"]) == held(rows["ppo"]) and not eight["ppo"]["fits"]  # each card holds everything
    assert eight["local"]["seconds"][0] * 8 == pytest.approx(rows_of(recipe(overrides=FULL), gpu=80)["local"]["seconds"][0])


def test_a_recipe_that_shards_cuts_what_it_trains_over_the_cards(recipe):
    """Weights, gradients and Adam's moments by eight; whole are embeddings and head with their gradient, two layers, and the gradient of one."""
    shards, s = [*FULL, "model.sharding=full"], shape()
    whole, cut = rows_of(recipe(overrides=FULL), gpu="8x80GB"), rows_of(recipe(overrides=shards), gpu="8x80GB")
    for use in ("roles", "gradients", "optimizer"):
        assert cut["local"]["memory"][use] == whole["local"]["memory"][use] / 8
    layer = (s.body + s.small) / 32
    assert cut["local"]["memory"]["gathered"] == 4 * (2 * s.embeddings + 3 * layer) and whole["local"]["memory"]["gathered"] == 0
    assert cut["local"]["fits"] and not whole["local"]["fits"] and cut["local"]["cut"] == 8
    assert cut["ppo"]["memory"] == whole["ppo"]["memory"]  # it does not cut its models
    assert "it holds its slice of the models" in plan.render([cut["local"]]) and "gathered" not in plan.render([whole["local"]])
    assert "it fits with model.sharding=full" in whole["local"]["warnings"][-1]
    assert cut["local"]["warnings"] == [] and cut["ppo"]["warnings"][0].startswith("it does not start: models cut over processes")
    one = rows_of(recipe(overrides=shards), gpu=80)["local"]
    assert one["memory"] == whole["local"]["memory"]  # one card has nobody to share with
    assert "it does not start: 'full' in one process" in one["warnings"][0]
    nf4 = rows_of(recipe(overrides=["model.sharding=full"]), gpu="8x80GB")["local"]
    assert nf4["cut"] == 1 and "'full' with quantization: nf4" in nf4["warnings"][0]
    frozen = ["model.quantization=none"]
    base, adapters = rows_of(recipe(overrides=frozen), gpu="8x80GB"), rows_of(recipe(overrides=[*frozen, "model.sharding=full"]), gpu="8x80GB")
    assert adapters["local"]["memory"]["base"] == base["local"]["memory"]["base"] / 8
    assert adapters["local"]["memory"]["roles"] == base["local"]["memory"]["roles"]  # adapters are replicated


def test_a_micro_batch_that_is_not_given_is_the_one_that_memory_allows(recipe):
    given = rows_of(recipe(), gpu=24)["rm"]
    free = 23e9 - sum(given["memory"][k] for k in ("base", "roles", "gradients", "optimizer"))
    way = Way(2, rank=16, quantized=True)
    assert memory.training(shape(), way, given["micro_batch"], False) <= free / 2 < memory.training(shape(), way, given["micro_batch"] + 256, False)
    assert rows_of(recipe(overrides=["stages.rm.micro_batch_tokens=777"]), gpu=24)["rm"]["micro_batch"] == 777
    assert rows_of(recipe(), gpu=141)["rm"]["micro_batch"] > 2 * given["micro_batch"]


def test_work_is_the_published_arithmetic(recipe):
    """shared/limits: two operations a weight and token; attention sees half of a row; adapters learn in twice a forward pass, whole models in three."""
    s, rows = shape(), rows_of(recipe())
    tokens, row = rows["far"]["tokens"], 190
    forward = tokens * (2 * s.body + 4 * 32 * 4096 * row / 2 + 2 * 32000 * 4096)
    assert rows["far"]["flop"] == pytest.approx(2 * forward)
    assert rows_of(recipe(overrides=FULL))["far"]["flop"] == pytest.approx(3 * forward)
    assert rows_of(recipe(overrides=["stages.far.activation_checkpointing=true"]))["far"]["flop"] == pytest.approx(3 * forward)
    low, high = rows_of(recipe(), gpu="RTX 4090")["far"]["seconds"]
    assert (low, high) == pytest.approx((2 * forward / 165e12 / 0.6, 2 * forward / 165e12 / 0.2))


@pytest.mark.parametrize(("given", "name", "gigabytes", "count"), [
    ("24GB", "RTX 3090", 24, 1), (24, "RTX 3090", 24, 1), ("8x80GB", "A100 80GB", 80, 8), ("2 x H100", "H100", 80, 2), ("rtx 4090", "RTX 4090", 24, 1),
    ("NVIDIA A100-SXM4-40GB", "A100 40GB", 40, 1), ("NVIDIA A100-SXM4-80GB", "A100 80GB", 80, 1), ("12GB", "RTX 3090", 12, 1), ("999GB", "B200", 999, 1)])
def test_cards(given, name, gigabytes, count):
    card = cards.parse(given)
    assert (card.name, card.gigabytes, card.count) == (name, gigabytes, count)


def test_the_gpu_that_is_here_counts_where_none_is_named(recipe, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '24564, NVIDIA GeForce RTX 4090'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(cards, "present", PRESENT)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    row = rows_of(recipe())["rm"]
    assert row["gpu"].name == "NVIDIA GeForce RTX 4090" and row["gpu"].flops == 165e12 and row["gpu"].gigabytes == pytest.approx(25.76, abs=0.01)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "gpu" not in rows_of(recipe())["rm"]


@pytest.mark.parametrize(("gpu", "section", "overrides"), [
    ("8GB", "best", ["stages.best.batch=64", "stages.best.max_new_tokens=512"]), ("10GB", "ppo", ["stages.ppo.micro_batch_tokens=4096"]),
    ("7GB", "rm", []), ("24GB", "local", FULL), ("24GB", "ppo", FULL)])
def test_what_to_change_makes_it_fit(recipe, gpu, section, overrides):
    row = rows_of(recipe(overrides=overrides), gpu=gpu)[section]
    assert not row["fits"] and row["headroom"] < 0
    found = shlex.split(row["warnings"][-1].partition("it fits with ")[2])
    assert found
    assert rows_of(recipe(overrides=[*overrides, *found]), gpu=gpu)[section]["fits"]
    for i in range(len(found)):  # and each is needed
        assert not rows_of(recipe(overrides=[*overrides, *found[:i], *found[i + 1:]]), gpu=gpu)[section]["fits"]


def test_a_card_that_is_too_small_whatever_is_changed(recipe):
    assert "take a smaller model or a larger card" in rows_of(recipe(), gpu="3GB")["ppo"]["warnings"][-1]


BENCHMARKS = """
  b: {stage: bold, models: {a: base, b: "@ppo"}, prompts: prompts, held_out: false, max_new_tokens: 20, classifier: some/toxicity, label: toxic}
  d: {stage: diversity, models: {b: "@ppo"}, prompts: prompts, temperature: [0.1, 0.9], samples_per_prompt: 5, helpfulness: "@rm", safety: "@rm"}
  l: {stage: lm_eval, models: {a: base, b: "@ppo"}, batch: 4}
"""


def test_the_benchmarks_are_planned(recipe, tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text("extends: recipe.yaml\nstages:" + BENCHMARKS)
    recipe()
    rows = rows_of(load_recipe(path))
    assert (rows["b"]["rows"], rows["b"]["samples"], [r["role"] for r in rows["b"]["roles"]]) == (50, 100, ["b"])
    assert "some/toxicity besides, which is not counted" in rows["b"]["note"]
    assert (rows["d"]["samples"], [r["role"] for r in rows["d"]["roles"]]) == (50 * 2 * 5, ["b", "helpfulness", "safety"])
    assert rows["d"]["memory"]["kv_cache"] == 64 * (37 + 256) * 512 * 1024
    assert rows["l"]["memory"]["base"] == 2 * 6_738_415_616 and "truthfulqa_mc2" in rows["l"]["note"]
    assert plan.render(plan.plan(load_recipe(path), gpu=24))


def test_every_stage_kind_is_planned():
    from posttrain.stages import STAGES

    assert {*plan.PLANS} == {*STAGES}


def test_pairs_that_prefer_an_unsafe_answer_are_no_training_rows(recipe, tmp_path):
    pairs = [{"prompt": f"number {i}", "chosen": "yes", "rejected": "no", "chosen_safe": i % 3 > 0, "rejected_safe": True} for i in range(30)]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    overrides = ["data.pairs=[{path: labelled.jsonl, format: preference}]", "data.hub=[{path: shown.jsonl, format: messages}]"]
    assert rows_of(recipe(overrides=overrides))["rm"]["rows"] == 30
    row = rows_of(recipe(overrides=[*overrides, "stages.rm.safety_loss_weight=1"]))["rm"]
    assert (row["rows"], row["labels"]["rows"]) == (20, "counted")


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
    small = rows_of(recipe(overrides=["stages.far.micro_batch_tokens=8192"]), gpu="24GB")["far"]
    assert not small["fits"] and "it fits with stages.far.activation_checkpointing=true" in small["warnings"][-1]
    assert rows["out"]["fits"]
    for text in ("plenty", "0GB", "0x24GB", "", "x", "1e400GB"):
        with pytest.raises(PosttrainError, match="not an amount of memory and not a card that is known"):
            plan.plan(recipe(), gpu=text)


def test_the_page_labels_every_number(recipe):
    text = plan.render(plan.plan(recipe(overrides=["stages.far.micro_batch_tokens=8192"]), gpu=24))
    assert "6.74 B parameters, 39.98 M in an adapter (counted); quantization nf4" in text
    assert "15,001 declared" in text
    assert "fits 24 GB" in text
    assert "warning: far: " in text
    assert "policy, critic (trained)" in text and "time: as on an RTX 3090 by its data sheet (71 TFLOP/s bf16, 936 GB/s): from 60% to 20%" in text
    assert "Time in all: " in text
    without = plan.render(plan.plan(recipe()))
    assert "headroom" not in without and "No GPU is here" in without
    assert max(len(line) for line in text.splitlines() if not line.startswith("warning")) < 200


# -- predictions against what is allocated -----------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 344}


def peak(work) -> int:
    """Bytes allocated at the same time at most while `work` runs, beside those from before."""
    import gc

    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        work()
    now = most = 0
    for _, size in sorted(((e.start_ns(), e.nbytes()) for e in told.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e[0]):
        now += size
        most = max(most, now)
    return most


@pytest.fixture
def small(tmp_path):
    """small(family, way, ...) -> (Roles with a trained policy, its shape): wide enough that a few fixed bytes do not count, laid out as on a GPU."""
    import shutil

    import torch
    import transformers

    from posttrain import builtin
    from posttrain.models import Roles

    def make(family="llama", dtype="bfloat16", lora=True, quantization="none", head=None, **sizes):
        source = builtin.folder(builtin.TINY, "x")
        for path in source.glob("*token*"):
            shutil.copy(path, tmp_path)
        vocab = json.loads((source / "config.json").read_text())["vocab_size"]
        config = transformers.AutoConfig.for_model(family, vocab_size=vocab, **SIZES | sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        model = ModelConfig(name_or_path=str(tmp_path), dtype=dtype, lora={"r": 16, "alpha": 32} if lora else None, chat_template="chatml",
                            quantization=quantization)
        roles = Roles(model, getattr(torch, dtype), "test")
        roles.layout = "packed"
        role = roles.add("policy", None, trainable=True, head=head)
        role.net.config._attn_implementation = "sdpa"
        return roles, shape_of(config.to_dict())

    return make


@pytest.mark.parametrize("given", [
    {"way": Way(2, rank=16)}, {"way": Way(2, rank=16), "checkpointing": True}, {"way": Way(4, rank=16)}, {"way": Way(4, full=True)},
    {"way": Way(4, full=True), "checkpointing": True}, {"way": Way(2, full=True, mixed=True)}, {"way": Way(2, full=True, mixed=True), "checkpointing": True},
    {"way": Way(2, rank=16, quantized=True)}, {"way": Way(2, rank=16), "family": "qwen3", "head_dim": 32}, {"way": Way(2, rank=16), "head": "new"},
    {"way": Way(2, rank=16), "family": "mistral", "num_key_value_heads": 4, "tokens": 1024},
], ids=lambda g: "-".join(str(v) for k, v in {**vars(g["way"]), **g}.items() if k != "way" and v))
def test_a_micro_batch_takes_what_was_predicted(small, given, quantized_or_skip):
    """A forward and backward pass beside the gradients of an earlier one, within 10 %."""
    import torch

    from posttrain.packing import collate, tree

    way, tokens, checkpointing = given.pop("way"), given.pop("tokens", 512), given.pop("checkpointing", False)
    if way.quantized:
        quantized_or_skip("nf4")
    dtype = "float32" if way.width == 4 or way.mixed else "bfloat16"
    roles, s = small(dtype=dtype, lora=not way.full, quantization="nf4" if way.quantized else "none", **given)
    net = roles["policy"].net.train()
    if checkpointing:
        net.gradient_checkpointing_enable()
        if roles["policy"].adapter:
            net.enable_input_require_grads()
    trees = [tree(list(range(10, 20)), [[20 + i % 50 for i in range(tokens // 4 - 10)]]) for _ in range(4)]
    batch = collate(trees, range(4), "packed", roles.tokenizer.pad_token_id)
    run = roles.scalars if given.get("head") else roles.logprobs

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way.mixed):
            loss = run("policy", batch).sum()
        loss.backward()

    step()
    assert memory.training(s, way, tokens, checkpointing, logits=not given.get("head")) == pytest.approx(peak(step), rel=0.1)


@pytest.mark.parametrize("lora", [True, False])
def test_the_gradients_and_the_optimizer_take_what_was_predicted(small, recipe, lora):
    import torch

    roles, s = small(dtype="float32", lora=lora)
    parameters = roles["policy"].parameters()
    optimizer = torch.optim.AdamW(parameters)

    def step():
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()

    planner = plan.Planner(recipe(overrides=["model.dtype=float32", *([] if lora else FULL)]))
    planner.shape, planner.lora = s, s.lora(planner.model.lora) if lora else 0
    role, = planner.roles([], ["policy"])
    assert role["gradients"] + role["optimizer"] == pytest.approx(peak(step), rel=0.1)


def test_processes_of_one_machine_share_its_memory(small, monkeypatch):
    """The micro-batch that is chosen: a third of the CPU memory that is this process's, or half of its GPU's, less what training will add."""
    from types import SimpleNamespace

    import psutil
    import torch

    from posttrain import distributed, training

    roles, s = small(lora=False, dtype="float32")
    role, way, parameters = roles["policy"], Way(4, full=True), sum(p.numel() for p in roles["policy"].parameters())
    free, coming = 4e8, 3 * 4 * parameters
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    for n in (1, 2, 4):
        monkeypatch.setattr(distributed, "on_this_machine", lambda n=n: n)
        assert training.choose_budget(roles, role) == max(256, min(2048, int((free / n - coming) * 0.3 / (s.layers * memory.layer(s, way)))))
    assert training.choose_budget(roles, role) < 2048
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    roles.device = torch.device("cuda")
    assert training.choose_budget(roles, role) == memory.micro_batch(s, way, (free / 2 - coming) / 2)  # four processes on two GPUs


def test_decoding_takes_what_was_predicted(small):
    from posttrain.generate import Sampling, sample

    roles, s = small(quantization="none")
    roles.config = roles.config.model_copy(update={"quantization": "nf4"})  # no merged copy
    prompts, rows, new = [[10 + i % 50 for i in range(100)]] * 32, 32, 60
    way = Way(2, rank=16)
    predicted = rows * 160 * s.kv(2) + memory.decoding(s, way, rows, 160, 100)
    assert predicted == pytest.approx(peak(lambda: sample(roles, "policy", prompts, 1, Sampling(new), 0, stop=-1, batch=rows)), rel=0.1)


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
