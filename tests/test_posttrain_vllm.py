"""vLLM as the engine. What is asked of it is checked on a stand-in, which reads the adapter's folder with peft, keeps an adapter by its number
as vLLM does, and samples from its own copy of the base. The last test runs the real vLLM, where it is installed."""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch
from rlhf_support import REWARDS, Killed, die, make_run, started

from posttrain import distributed, generate, vllm_engine
from posttrain.builtin import folder as builtin_folder
from posttrain.config import ModelConfig
from posttrain.errors import PosttrainError
from posttrain.generate import Sampling, sample
from posttrain.models import Roles, roles_for
from posttrain.packing import collate, tree
from posttrain.runs import Run, preflight, read_json, run_sections
from posttrain.stages import STAGES, load_config_class
from rlhf import ppo

PROMPTS = [[5, 9, 31, 7, 12], [40, 41], [9] * 30, [77]]
LORA = {"r": 4, "alpha": 8}


# -- the stand-in ------------------------------------------------------------------------------------------------------------------


@dataclass
class SamplingParams:
    """The fields that are used, with vLLM's defaults and its limits."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self):
        if not 0 <= self.temperature <= 2 or not 0 < self.top_p <= 1 or self.max_tokens < 1 or self.n != 1:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not -2**63 <= self.seed < 2**63:
            raise ValueError("seed")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """Only what vLLM 0.33 takes. An adapter is read when its number is new; a known number keeps what was read, as vLLM does."""

    made: list = []
    shift = 0.0  # added to the log-probabilities that are told

    def __init__(self, model, *, revision, dtype, quantization, load_format, skip_tokenizer_init, generation_config, logprobs_mode, enable_lora, max_loras,
                 max_lora_rank, max_num_seqs, max_model_len, kv_cache_memory_bytes, gpu_memory_utilization):
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) and 0 < gpu_memory_utilization < 1
        self.calls, self.read = [], {}
        LLM.made.append(self)

    def base(self):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.settings["model"], dtype=getattr(torch, self.settings["dtype"])).eval()

    def network(self, request: LoRARequest | None):
        number = request.lora_int_id if request else 0
        if number not in self.read:
            if request:
                from peft import PeftModel

                assert json.loads((Path(request.lora_path) / "adapter_config.json").read_text())["r"] <= self.settings["max_lora_rank"]
                assert not any(r.lora_name == request.lora_name for _, _, r in self.calls if r), "its cache of prompts goes by the name"
            self.read[number] = PeftModel.from_pretrained(self.base(), request.lora_path).eval() if request else self.base()
        return self.read[number]

    @torch.inference_mode()
    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request=None):
        net = self.network(lora_request)
        self.calls.append((prompts, sampling_params, lora_request))
        assert len(prompts) == len(sampling_params) and use_tqdm is False
        return [SimpleNamespace(outputs=[self.answer(net, p["prompt_token_ids"], s)]) for p, s in zip(prompts, sampling_params, strict=True)]

    def answer(self, net, prompt: list[int], s: SamplingParams):
        generator, ids, told = torch.Generator().manual_seed(s.seed), [], []
        while len(ids) < s.max_tokens and not (ids and (ids[-1] in s.stop_token_ids or (ids[-1] == net.config.eos_token_id and not s.ignore_eos))):
            logits = net(torch.tensor([prompt + ids])).logits[0, -1].float()
            p = torch.softmax(logits / (s.temperature or 1.0), -1)
            if s.top_p < 1 and s.temperature:
                values, order = p.sort(descending=True)
                p[order[values.cumsum(0) - values >= s.top_p]] = 0
                p /= p.sum()
            token = int(p.argmax() if s.temperature == 0 else torch.multinomial(p, 1, generator=generator))
            assert self.settings["logprobs_mode"] == "processed_logprobs" and s.logprobs == 0
            ids.append(token)
            told.append({token: SimpleNamespace(logprob=p[token].log().item() + LLM.shift)})
        return SimpleNamespace(token_ids=tuple(ids), logprobs=told, finish_reason="stop" if ids[-1] in s.stop_token_ids else "length")


@pytest.fixture
def vllm(monkeypatch):
    """`import vllm` gives the stand-in."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    modules["vllm"].__version__, modules["vllm"].LLM, modules["vllm"].SamplingParams = "0.33.0", LLM, SamplingParams
    modules["vllm.lora.request"].LoRARequest = LoRARequest
    for key in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(key, "")  # put back as it was afterwards
        monkeypatch.delenv(key)
    monkeypatch.setattr(LLM, "made", [])
    told = modules["vllm"].watch = []
    monkeypatch.setattr(vllm_engine, "_watch", lambda engine: told.append("begins") or (lambda: told.append("ends")))
    return modules["vllm"]


@pytest.fixture
def section(tmp_path):
    """As much of a section as the engine reads."""
    said, model = [], ModelConfig(name_or_path="builtin:tiny-llama", chat_template="chatml", lora=LORA)
    return SimpleNamespace(place="r.yaml: stages.x", folder=tmp_path, manifest={}, at_end=[], said=said, log=SimpleNamespace(say=said.append),
                           inexact=said.append, recipe=SimpleNamespace(model=model), config=SimpleNamespace(max_prompt_tokens=30, max_new_tokens=6))


@pytest.fixture
def roles(make_roles, scramble, vllm, section):
    """Two adapters and the bare base, sampled by the stand-in."""
    roles = make_roles()
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1, 0.08)
    scramble(roles.add("other", fresh_adapter=True), 2, 0.08)
    roles.add("base", fresh_adapter=False)
    roles.engine = vllm_engine.VLLM(section, roles.dtype)
    return roles


def draw(roles, role="policy", samples=2, sampling=None, seed=0, stop=300, **more):
    return sample(roles, role, PROMPTS, samples, sampling or Sampling(6), seed, stop=stop, batch=8, **more)


def ids(out):
    return [[c.ids for c in group] for group in out]


def by_us(roles, *args, **more):
    engine, roles.engine = roles.engine, None
    try:
        return draw(roles, *args, **more)
    finally:
        roles.engine = engine


# -- answers -----------------------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_ours_for_every_role_and_after_its_weights_change(roles, scramble):
    greedy = {"samples": 1, "sampling": Sampling(6, 0.0)}
    first = {role: ids(draw(roles, role, **greedy)) for role in ("policy", "other", "base", "policy")}
    assert first == {role: ids(by_us(roles, role, **greedy)) for role in first} and len({str(a) for a in first.values()}) == 3
    scramble(roles["policy"], 3, 0.08)  # in place: no optimizer, no new parameter
    second = ids(draw(roles, **greedy))
    assert second == ids(by_us(roles, **greedy)) != first["policy"]
    assert ids(draw(roles, "other", **greedy)) == first["other"]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_log_probabilities_are_those_of_the_trainer_at_the_temperature(roles, temperature):
    for prompt, group in zip(PROMPTS, draw(roles, sampling=Sampling(6, temperature)), strict=True):
        for answer in group:
            batch = collate([tree(prompt, [answer.ids])], [0], roles.layout, roles.tokenizer.pad_token_id)
            with torch.no_grad():
                torch.testing.assert_close(torch.tensor(answer.logprobs), roles.logprobs("policy", batch, temperature), atol=2e-5, rtol=0)


def test_what_a_sample_draws_depends_on_its_seed_and_place_alone(roles):
    whole = draw(roles, samples=3)
    assert draw(roles, samples=3) == whole
    assert draw(roles, samples=3, only=[2, 1]) == [whole[2], whole[1]]
    assert ids(draw(roles, samples=3, seed=1)) != ids(whole)
    seeds = [[s.seed for s in params] for _, params, _ in LLM.made[0].calls]
    assert len({*seeds[0]}) == len(seeds[0]) == 3 * len(PROMPTS) and seeds[1] == seeds[0] and not {*seeds[3]} & {*seeds[0]}
    assert seeds[2] == seeds[0][6:9] + seeds[0][3:6]
    assert len({tuple(c.ids) for group in whole for c in group}) > 2 * len(PROMPTS)


def test_answers_end_with_the_stop_token_or_at_the_limit(roles):
    said = [t for group in ids(draw(roles, samples=6, stop=-1)) for answer in group for t in answer]
    stop = max(set(said), key=said.count)
    answers = [c for group in draw(roles, samples=6, stop=stop) for c in group]
    assert {c.finished for c in answers} == {True, False}
    for c in answers:
        assert c.finished == (c.ids[-1] == stop) and stop not in c.ids[:-1] and len(c.ids) == len(c.logprobs) and (c.finished or len(c.ids) == 6)


def test_the_models_own_end_token_does_not_end_an_answer(roles, monkeypatch):
    said = [t for group in ids(draw(roles, samples=6)) for answer in group for t in answer]
    end = max(set(said), key=said.count)
    net = LLM.made[0].read[1]
    monkeypatch.setattr(net.config, "eos_token_id", end)
    assert any(end in c.ids[:-1] for group in draw(roles, samples=6) for c in group)


def test_ticks_count_the_tokens(roles):
    ticks = []
    out = draw(roles, tick=ticks.append)
    assert sum(ticks) == sum(len(c.ids) for group in out for c in group)


def test_an_empty_prompt_is_refused(roles):
    with pytest.raises(ValueError, match="at least one token"):
        sample(roles, "policy", [[1], []], 1, Sampling(2), 0, stop=1)
    assert not LLM.made


# -- what vLLM is asked for --------------------------------------------------------------------------------------------------------


def test_adapters_change_and_the_base_does_not(roles, scramble, section):
    requests = []
    for role, change in (("policy", 0), ("policy", 0), ("other", 0), ("policy", 0), ("base", 0), ("policy", 7), ("policy", 0), ("policy", 8)):
        if change:
            scramble(roles[role], change, 0.08)
        draw(roles, role, samples=1)
        requests.append(LLM.made[0].calls[-1][2])
    assert len(LLM.made) == 1
    assert [r and (r.lora_name, r.lora_int_id) for r in requests] == [
        ("policy-1", 1), ("policy-1", 1), ("other-2", 2), ("policy-1", 1), None, ("policy-3", 3), ("policy-3", 3), ("policy-4", 4)]
    assert [r.lora_path for r in requests if r] == [str((section.folder / "adapters.tmp" / r.lora_name).resolve()) for r in requests if r]
    assert sorted(p.name for p in (section.folder / "adapters.tmp").iterdir()) == ["other-2", "policy-4"]  # no more than those in use


def test_an_adapter_is_written_once_for_the_same_weights(roles, monkeypatch):
    written, save = [], Roles.save
    monkeypatch.setattr(Roles, "save", lambda self, name, folder: (written.append(name), save(self, name, folder)))
    for _ in range(3):
        draw(roles, samples=1)
    assert written == ["policy"]


def test_vllm_ends_with_its_section_and_can_start_again(roles, section, vllm):
    first = draw(roles)
    gone = weakref.ref(LLM.made.pop())
    assert gone() is roles.engine.llm and vllm.watch == ["begins"]
    for end in section.at_end:
        end()
    assert gone() is None and vllm.watch == ["begins", "ends"]  # no reference is left
    assert draw(roles) == first and len(LLM.made) == 1


def test_the_settings_of_vllm(roles, section, monkeypatch):
    (section.folder / "adapters.tmp" / "left-1").mkdir(parents=True)  # by a run that was killed
    monkeypatch.setattr(vllm_engine, "free_memory", lambda roles: 10**9)
    draw(roles)
    settings = LLM.made[0].settings
    total = settings.pop("gpu_memory_utilization")
    assert 0 < total <= vllm_engine.SHARE
    assert settings == {
        "model": str(builtin_folder("builtin:tiny-llama")), "revision": None, "dtype": "float32", "quantization": None, "load_format": "safetensors",
        "skip_tokenizer_init": True, "generation_config": "vllm", "logprobs_mode": "processed_logprobs", "enable_lora": True, "max_loras": 1,
        "max_lora_rank": 8, "max_num_seqs": 8, "max_model_len": -1,
        "kv_cache_memory_bytes": 8 * generate.row_bytes(roles, 36 + vllm_engine.SPARE)}
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1" and os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert not (section.folder / "adapters.tmp" / "left-1").exists()
    assert section.said[0] == "answers are sampled by vLLM" and "vLLM 0.33.0 samples" in section.said[1]


KILLED = """
import subprocess, sys, time
from posttrain import vllm_engine
class Engine: pass
engine = Engine()
vllm_engine._watch(engine)
child = subprocess.Popen([sys.executable, "-c", "import subprocess, time; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); time.sleep(300)"],
                         stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(4)  # the watch looks twice a second
if sys.argv[1] == "ends":
    del engine
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("engine", ["lives", "ends"])
def test_what_a_killed_process_started_ends_too(engine):
    """The child as vLLM's engine, the grandchild as its worker. Once the engine is dropped nobody watches."""
    trainer = subprocess.Popen([sys.executable, "-c", KILLED, engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd=Path(vllm_engine.__file__).parent.parent)
    family = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
    try:
        assert trainer.stdout.readline() == "ready\n"
        assert sum("watch.py" in " ".join(c.cmdline()) for c in psutil.Process(trainer.pid).children()) == (engine == "lives")
        trainer.kill()
        trainer.wait()
        gone, alive = psutil.wait_procs(family, timeout=30 if engine == "lives" else 2)
        assert (len(gone), len(alive)) == ((2, 0) if engine == "lives" else (0, 2))
    finally:
        for p in family:
            with suppress(psutil.Error):
                p.kill()


def test_keys_and_values_take_what_the_base_leaves_of_the_share(roles, monkeypatch):
    base = (builtin_folder("builtin:tiny-llama") / "model.safetensors").stat().st_size  # float32; its header is the tolerance
    row = generate.row_bytes(roles, 36 + vllm_engine.SPARE)
    monkeypatch.setattr(vllm_engine, "free_memory", lambda roles: int((base + 2.5 * row) / vllm_engine.SHARE))
    draw(roles)
    assert LLM.made[0].settings["kv_cache_memory_bytes"] == pytest.approx(2.5 * row, abs=10_000)


def test_nf4_is_bitsandbytes_in_vllm_too(roles, section, monkeypatch):
    roles.engine.model = section.recipe.model.model_copy(update={"quantization": "nf4"})
    draw(roles)
    assert {k: LLM.made[0].settings[k] for k in ("quantization", "load_format")} == {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}


# -- what is refused ---------------------------------------------------------------------------------------------------------------


def refused(what: str, **model):
    with pytest.raises(PosttrainError, match=what) as e:
        vllm_engine.check(ModelConfig(**{"name_or_path": "x", "lora": LORA} | model), "r.yaml: stages.x.engine")
    assert str(e.value).startswith("r.yaml: stages.x.engine: ")


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    refused(r"vllm is not installed.*pip install posttrain\[vllm\]")


def test_what_vllm_cannot_sample_is_refused_before_anything_is_loaded(vllm, monkeypatch):
    vllm_engine.check(ModelConfig(name_or_path="x", lora=LORA), "p")
    refused("without model.lora.*adapters", lora=None)
    refused("add_tokens", add_tokens=True)
    refused("int8.*none or nf4", quantization="int8")
    real = vllm_engine.find_spec
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None if name == "vllm_bnb_plugin" else real(name))
    refused("vllm-bnb-plugin is not installed", quantization="nf4")
    monkeypatch.setattr(distributed, "world", lambda: 2)
    refused("2 processes.*one process")


def test_float32_on_a_gpu_is_refused(vllm, section, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(PosttrainError, match="float32.*dtype: bfloat16"):
        vllm_engine.VLLM(section, torch.float32)
    vllm_engine.VLLM(section, torch.bfloat16)


def test_a_whole_model_is_refused(roles):
    roles.roles["whole"] = SimpleNamespace(adapter=None, net=torch.nn.Linear(1, 1))
    with pytest.raises(PosttrainError, match="'whole' is a whole model.*engine: ours"):
        draw(roles, "whole")
    assert not LLM.made


def test_a_copy_of_the_base_that_does_not_fit_is_told_in_numbers(roles, monkeypatch):
    monkeypatch.setattr(vllm_engine, "free_memory", lambda roles: 10_000)
    with pytest.raises(PosttrainError, match=r"copy of the base takes .* GB.*40% of the free memory"):
        draw(roles)
    assert not LLM.made


def test_what_vllm_says_is_passed_on(roles, monkeypatch):
    with pytest.raises(PosttrainError, match=r"engine: vLLM could not sample: ValueError: temperature must be in \[0, 2\], got 3"):
        draw(roles, sampling=Sampling(4, 3.0))
    roles.engine.llm = None
    monkeypatch.setattr(LLM, "__init__", lambda self, **kw: (_ for _ in ()).throw(RuntimeError("Engine core initialization failed.\nmore")))
    with pytest.raises(PosttrainError, match=r"vLLM did not start: RuntimeError: Engine core initialization failed\. Expected") as e:
        draw(roles)
    assert isinstance(e.value.__cause__, RuntimeError)


# -- the key -----------------------------------------------------------------------------------------------------------------------


def test_every_stage_that_samples_has_the_key_and_ours_is_not_written():
    """So that a section which names no engine keeps its fingerprint."""
    kinds = {kind for kind in STAGES if "max_prompt_tokens" in load_config_class(kind).model_fields}
    assert kinds >= {"rejection", "ppo", "evaluate", "collect"} and kinds == {k for k in STAGES if "engine" in load_config_class(k).model_fields}
    for cls in map(load_config_class, kinds):
        ours, theirs = (cls.model_construct(stage="x", **engine).model_dump() for engine in ({}, {"engine": "vllm"}))
        assert "engine" not in ours and theirs == ours | {"engine": "vllm"}


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "dpo"])
def test_trl_samples_for_its_own_algorithms(tmp_path_factory, tmp_path, algorithm):
    with pytest.raises(PosttrainError, match="stages.x.algorithm: .*TRL samples"):
        make_run(tmp_path_factory, tmp_path, {"x": PPO | {"algorithm": algorithm}})


PPO = {"stage": "ppo", "prompts": "prompts", "policy": "@sft", **REWARDS, "iterations": 2, "batch_size": 4, "mini_batch_size": 2, "max_new_tokens": 6,
       "critic_warmup": 0, "eval_every": 2, "eval_prompts": 2, "micro_batch_tokens": 512, "learning_rate": 1e-3, "engine": "vllm"}
REJECTION = {"stage": "rejection", "prompts": "prompts", "policy": "@sft", **REWARDS, "samples_per_prompt": 2, "max_new_tokens": 8, "rows": 6, "chunk": 3,
             "batch": 16, "temperature": 0.5, "micro_batch_tokens": 512, "safety_threshold": 0.5, "engine": "vllm"}


def test_preflight_refuses_before_any_stage_runs(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    run = make_run(tmp_path_factory, tmp_path, {"r": REJECTION})
    with pytest.raises(PosttrainError, match="stages.r.engine: vllm is not installed"):
        preflight(run)
    preflight(run, ["sft"])
    with pytest.raises(PosttrainError, match="stages.r.engine: vllm is not installed"):
        roles_for(started(run, "r"))


# -- stages ------------------------------------------------------------------------------------------------------------------------


def test_a_killed_round_goes_on_and_says_that_it_is_not_exact(tmp_path_factory, tmp_path, monkeypatch, vllm):
    run = make_run(tmp_path_factory, tmp_path, {"r": REJECTION})
    with monkeypatch.context() as m:
        die(m, LLM, "generate", 2)
        with pytest.raises(Killed):
            run_sections(run, ["r"])
    folder = run.folder / "r"
    assert len(list((folder / "chunks").iterdir())) == 1 and (folder / "adapters.tmp").exists()
    run_sections(Run(run.recipe), ["r"])
    manifest = read_json(folder / "manifest.json")
    assert manifest["exact"] is False and manifest["inexact_because"] == ["answers are sampled by vLLM"]
    assert vllm.watch == ["begins", "ends"] * 2  # however the stage ends
    assert manifest["inputs"]["stages.r.engine"] == "vllm" and manifest["versions"]["vllm"] is None
    assert len(list((folder / "chunks").iterdir())) == 2 and not (folder / "adapters.tmp").exists()
    assert [len(prompts) for llm in LLM.made for prompts, _, _ in llm.calls] == [6, 6]
    assert len(read_json(folder / "results.json")["best_of_n"]) == 2


def test_ppo_asks_for_a_new_adapter_every_iteration_and_recomputes_old_log_probabilities(tmp_path_factory, tmp_path, monkeypatch, vllm):
    """What vLLM tells is shifted by half a nat here: a ratio made of it would trip the wire."""
    monkeypatch.setattr(LLM, "shift", -0.5)
    run = make_run(tmp_path_factory, tmp_path, {"x": PPO})
    olds, real = [], ppo.make_rollout

    def watching(section, roles, scored, state):
        batches, rollout = real(section, roles, scored, state)
        olds.append((rollout.old_logprobs[rollout.response_mask], torch.tensor([x for g in scored.answers for a in g for x in a.logprobs])))
        return batches, rollout

    monkeypatch.setattr(ppo, "make_rollout", watching)
    run_sections(run, ["x"])
    assert [r.lora_int_id for _, _, r in LLM.made[0].calls] == [1, 1, 2, 3]  # watched, iteration 1, iteration 2, watched
    for old, told in olds:
        torch.testing.assert_close(old - told, torch.full_like(told, 0.5), atol=1e-4, rtol=0)


# -- the real one ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base_for_vllm(tmp_path) -> Path:
    """The tiny model with heads of a size that vLLM has kernels for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "base"
    shutil.copytree(builtin_folder("builtin:tiny-llama"), folder)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.head_dim = 128, 2, 1, 256, 64
    net = AutoModelForCausalLM.from_config(config)
    for i, p in enumerate(p for p in net.parameters() if p.ndim > 1):
        p.data.normal_(0, 0.15, generator=torch.Generator().manual_seed(i))
    net.save_pretrained(folder)
    return folder


@pytest.mark.timeout(1800)
def test_the_real_vllm_agrees_with_our_loop(section, make_roles, scramble, base_for_vllm):
    pytest.importorskip("vllm", reason="vLLM is not installed (extra [vllm])")
    cuda = torch.cuda.is_available()
    dtype, near = ("bfloat16", 0.1) if cuda else ("float32", 1e-4)
    roles = make_roles(dtype=dtype, name_or_path=str(base_for_vllm))
    section.recipe.model = roles.config
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1, 0.15)
    scramble(roles.add("other", fresh_adapter=True), 2, 0.15)
    roles.add("base", fresh_adapter=False)
    roles.engine = vllm_engine.VLLM(section, roles.dtype)
    greedy = {"samples": 1, "sampling": Sampling(16, 0.0)}

    def differ(role: str) -> int:
        return sum(a != b for a, b in zip(ids(draw(roles, role, **greedy)), ids(by_us(roles, role, **greedy)), strict=True))

    assert all(differ(role) <= 2 * cuda for role in ("policy", "other", "base", "policy"))  # bf16: near ties may fall otherwise
    scramble(roles["policy"], 3, 0.15)
    assert differ("policy") <= 2 * cuda
    said = [t for group in ids(draw(roles, samples=6, sampling=Sampling(16))) for answer in group for t in answer]
    stop = max(set(said), key=said.count)
    for temperature in (0.7, 1.0):
        out = draw(roles, samples=6, sampling=Sampling(16, temperature), stop=stop)
        assert {c.finished for group in out for c in group} == {True, False} and len({tuple(c.ids) for group in out for c in group}) > 15
        for prompt, group in zip(PROMPTS, out, strict=True):
            for c in group:
                assert c.finished == (c.ids[-1] == stop) and stop not in c.ids[:-1] and (c.finished or len(c.ids) == 16)
                batch = collate([tree(prompt, [c.ids])], [0], roles.layout, roles.tokenizer.pad_token_id).to(roles.device)
                with torch.no_grad():
                    torch.testing.assert_close(torch.tensor(c.logprobs), roles.logprobs("policy", batch, temperature).float().cpu(), atol=near, rtol=0)
        if not cuda:
            assert ids(draw(roles, samples=6, sampling=Sampling(16, temperature), stop=stop, only=[2, 1])) == ids([out[2], out[1]])
