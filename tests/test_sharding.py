"""Models cut over two processes (gloo, CPU) with FSDP2 against one process that holds them whole: the same numbers and weights, in the same files, also
after a kill; and what is refused before anything loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from posttrain import distributed, models, sharding
from posttrain.config import ModelConfig
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.runs import run_sections
from posttrain.stages import STAGES as STAGES_TABLE

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parent.parent
STAGES = {"tuned": {"stage": "sft", "data": "demonstrations", "packing": False, "batch_size": 5, "max_steps": 4, "epochs": 2, "max_length": 256,
                    "learning_rate": 1e-3, "save_steps": 2, "micro_batch_tokens": 100, "max_grad_norm": 0.5},  # it clips
          "judged": {"stage": "reward", "model": "@tuned", "own": "safety", "other": "helpful", "safety_loss_weight": 1.0, "batch_size": 1, "max_steps": 2,
                     "max_length": 256, "learning_rate": 1e-3, "save_steps": 100}}  # a step of one pair: one process has nothing to do
DATA = {"demonstrations": [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "It is so. " * (1 + i % 5)}]}
                           for i in range(16)],
        "pairs": [{"prompt": f"Why {i}?", "chosen": "Because.", "rejected": "No. " * (1 + i % 3)} for i in range(6)],
        "safety": [{"prompt": f"How {i}?", "chosen": "Never.", "rejected": "So. " * (1 + i % 3), "chosen_safe": True, "rejected_safe": False}
                   for i in range(6)], "held_out": {"pairs": 2, "demonstrations": 2}}
RUN = """
import os, signal, sys
from posttrain import training
real = training.complete
def complete(folder):
    real(folder)
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
training.complete = complete
from posttrain.config import load_recipe
from posttrain.runs import Run, run_sections
run_sections(Run(load_recipe(sys.argv[1])))
"""


def launch(recipe: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable, "-c", RUN,
                           recipe, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)


def numbers(section) -> list[dict]:
    return [{k: v for k, v in row.items() if v is not None and k != "time" and "per_second" not in k and "peak_memory" not in k}
            for row in read_lines(section.folder / "metrics.jsonl")]


def same(whole, cut, file: str, sections=STAGES) -> None:
    """What several processes left of these sections is what one did: numbers, and weights in the same files."""
    for name in sections:
        one, two = whole.section(name), cut.section(name)
        assert two.state() == "done"
        for a, b in zip(numbers(one), numbers(two), strict=True):
            assert b == pytest.approx(a, abs=2e-5, rel=1e-4)
        weights = [load_file(s.folder / "model" / f"{file}.safetensors") for s in (one, two)]
        assert {k: v.shape for k, v in weights[0].items()} == {k: v.shape for k, v in weights[1].items()}
        assert max((v - weights[1][k]).abs().max() for k, v in weights[0].items()) < 5e-5
        assert sorted(p.name for p in (one.folder / "model").iterdir()) == sorted(p.name for p in (two.folder / "model").iterdir())
        if file == "model":
            assert (one.folder / "model" / "config.json").read_text() == (two.folder / "model" / "config.json").read_text()


@pytest.mark.parametrize("lora, file", [(None, "model"), ({"r": 4, "alpha": 8}, "adapter_model")], ids=["full", "adapters"])
def test_a_model_cut_over_two_processes_learns_what_a_whole_one_does_and_goes_on_after_a_kill(make_run, lora, file):
    """Weights within 5e-5, numbers of the log within 1e-4 of their size."""
    whole = make_run(STAGES, folder="whole", model={"lora": lora}, **DATA)
    run_sections(whole)
    cut = make_run(STAGES, folder="cut", model={"lora": lora, "sharding": "full"}, **DATA)
    tuned = cut.section("tuned")
    assert tuned.fingerprint == whole.section("tuned").fingerprint
    killed = launch(cut.recipe.path, "dies")
    assert killed.returncode and tuned.state() == "started" and (tuned.folder / "checkpoint-2" / "checksums.json").exists(), killed.stderr[-3000:]
    done = launch(cut.recipe.path, "lives")
    assert done.returncode == 0 and done.stdout.count("going on after step 2 of 4") == 1, done.stdout + done.stderr[-3000:]
    same(whole, cut, file)
    assert max(row["sft/grad_norm"] for row in numbers(tuned) if "sft/grad_norm" in row) > 0.5  # the norm was clipped


@pytest.mark.parametrize("model, processes, stage, told", [
    ({"sharding": "full"}, 1, "sft", "'full' in one process"),
    ({"sharding": "full", "quantization": "nf4"}, 2, "reward", "'full' with quantization: nf4"),
    ({"sharding": "full"}, 2, "ppo", "a section of kind ppo holds them whole"),
    ({"sharding": "full"}, 2, "rejection", None), ({"sharding": "full"}, 2, "sft", None), ({}, 1, "sft", None)])
def test_what_cannot_be_cut_is_refused(monkeypatch, model, processes, stage, told):
    monkeypatch.setattr(distributed, "world", lambda: processes)
    config = ModelConfig(name_or_path="x", lora={}, **model)
    if told is None:
        return distributed.check_sharding(config, stage, STAGES_TABLE[stage].sharded, "here")
    with pytest.raises(PosttrainError, match=told):
        distributed.check_sharding(config, stage, STAGES_TABLE[stage].sharded, "here")


def test_a_refusal_comes_before_anything_is_loaded(make_run, monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda *args: pytest.fail("loaded"))
    run = make_run({"tuned": STAGES["tuned"]}, model={"sharding": "full"})
    with pytest.raises(PosttrainError, match="in one process"):
        run_sections(run)
    assert not (run.folder / "tuned").exists()


def test_a_section_that_cannot_be_cut_stops_the_run_before_an_earlier_one_trains(make_run, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "join", lambda: None)
    monkeypatch.setattr(distributed, "from_main", lambda choose: choose())
    later = {"stage": "ppo", "policy": "@tuned", "helpfulness": "@judged", "safety": "@judged", "prompts": ["helpful"]}
    run = make_run({**STAGES, "rl": later}, model={"sharding": "full"}, **DATA)
    with pytest.raises(PosttrainError, match="kind ppo holds them whole"):
        run_sections(run)
    assert not (run.folder / "tuned").exists()


def test_the_launcher_asks_for_it_too_and_accelerate_wraps_nothing(monkeypatch):
    """recipes/accelerate/fsdp2.yaml as accelerate hands it on."""
    from types import SimpleNamespace

    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
    assert load_config_from_file(path).fsdp_config["fsdp_version"] == 2
    args = launch_command_parser().parse_args(["--config_file", path, "-m", "sft", "recipe"])
    given = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    asked = {k: given[k] for k in ("ACCELERATE_USE_FSDP", "FSDP_VERSION")}
    assert asked == {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    plain = SimpleNamespace(sharding="none", quantization="none")
    assert not distributed.shards(plain)
    for key in ("LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(key, raising=False)
    for key, value in asked.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(distributed, "_launcher_shards", False)
    distributed.join()
    assert distributed.shards(plain) and "ACCELERATE_USE_FSDP" not in os.environ
    with pytest.raises(PosttrainError, match="in one process"):
        distributed.check_sharding(plain, "sft", True, "here")
    with pytest.raises(PosttrainError, match="of kind rejection holds them whole"):
        distributed.check_sharding(plain, "rejection", False, "here")


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "adapters"])
def test_a_network_that_is_not_cut_though_it_should_be_does_not_start(make_roles, monkeypatch, lora):
    monkeypatch.setattr(sharding, "shard", lambda *args: None)
    roles = make_roles(lora=lora)
    roles.sharded = True
    with pytest.raises(PosttrainError, match="parameters are not cut over the processes"):
        roles.add("policy", trainable=True, head="new")
