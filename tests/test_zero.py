"""DeepSpeed's ZeRO in two processes (gloo, CPU) against one process without it: the same numbers and weights, in the same files, also after a kill and
then in one process; and what is refused before anything loads. What trains is skipped where deepspeed is not installed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from test_sharding import DATA, ROOT, STAGES, numbers, same

from posttrain import distributed, models
from posttrain.errors import PosttrainError
from posttrain.runs import run_sections
from posttrain.stages import STAGES as KINDS

pytestmark = pytest.mark.timeout(900)
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed (pip install -e '.[deepspeed]')")
RUN = """
import os, signal, sys
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a faster exchange on CPUs, compiled for minutes at the first start
from posttrain import training, zero
if sys.argv[2] == "dies":
    real = training.complete
    def complete(folder):
        real(folder)
        os.kill(os.getpid(), signal.SIGKILL)
    training.complete = complete
if sys.argv[2] == "replicated":
    zero.Zero._slices = lambda self: self.parameters
from posttrain.config import load_recipe
from posttrain.__main__ import guarded
from posttrain.runs import Run, run_sections
guarded(lambda: run_sections(Run(load_recipe(sys.argv[1]))))
"""


def launch(recipe: str, word: str, stage: int, processes: int = 2) -> subprocess.CompletedProcess:
    """As `accelerate launch` with a deepspeed configuration starts it."""
    asked = {"ACCELERATE_USE_DEEPSPEED": str(stage > 0), "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--no-python", sys.executable,
                           "-c", RUN, recipe, word], cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, timeout=600)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("lora, file", [(None, "model"), ({"r": 4, "alpha": 8}, "adapter_model")], ids=["full", "adapters"])
def test_zero_in_two_processes_learns_what_one_does_and_goes_on_after_a_kill(make_run, lora, file, stage):
    """Weights within 5e-5, numbers of the log within 1e-4 of their size."""
    whole = make_run(STAGES, folder="whole", model={"lora": lora}, **DATA)
    run_sections(whole)
    cut = make_run(STAGES, folder="cut", model={"lora": lora}, **DATA)
    tuned = cut.section("tuned")
    killed = launch(cut.recipe.path, "dies", stage)
    assert killed.returncode and tuned.state() == "started" and (tuned.folder / "checkpoint-2" / "checksums.json").exists(), killed.stderr[-3000:]
    done = launch(cut.recipe.path, "lives", stage)
    assert done.returncode == 0 and done.stdout.count("going on after step 2 of 4") == 1, done.stdout + done.stderr[-3000:]
    same(whole, cut, file)
    assert max(row["sft/grad_norm"] for row in numbers(tuned) if "sft/grad_norm" in row) > 0.5  # the norm was clipped


@needs_deepspeed
@pytest.mark.parametrize("first, then", [(3, 0), (0, 2)], ids=["zero to one process", "one process to zero"])
def test_a_run_goes_on_with_zero_or_without(make_run, first, then):
    """The checkpoint holds weights and moments whole, in the layout of one process."""
    one = {"tuned": STAGES["tuned"]}
    whole, moved = (make_run(one, folder=folder, model={"lora": None}, **DATA) for folder in ("whole", "moved"))
    run_sections(whole)
    for word, stage in (("dies", first), ("lives", then)):
        told = launch(moved.recipe.path, word, stage, processes=2 if stage else 1)
        assert told.returncode == (0 if word == "lives" else 1), told.stderr[-3000:]
    assert "going on after step 2 of 4" in told.stdout
    same(whole, moved, "model", one)


@needs_deepspeed
def test_zero_that_is_not_active_though_asked_for_does_not_start(make_run):
    run = make_run({"tuned": STAGES["tuned"]}, model={"lora": None}, **DATA)
    told = launch(run.recipe.path, "replicated", 2)
    assert told.returncode and "ZeRO stage 2 is asked for, and this process steps" in told.stderr and run.section("tuned").state() == "started"


@pytest.fixture
def asked(monkeypatch):
    """What accelerate hands on is what a test gives it; nobody else's."""
    for key in [k for k in os.environ if k.startswith("ACCELERATE_") or k in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")]:
        monkeypatch.delenv(key)
    monkeypatch.setattr(distributed, "_launcher_zero", 0)

    def give(**values):
        for key, value in {"USE_DEEPSPEED": "true", **values}.items():
            monkeypatch.setenv(f"ACCELERATE_{key}", value)
    return give


def installed(monkeypatch, there: bool) -> None:
    monkeypatch.setattr(distributed, "find_spec", lambda name: object() if there else None)


@pytest.mark.parametrize("values, there, told", [
    ({}, False, "it is not installed"), ({"DEEPSPEED_ZERO_STAGE": "1"}, True, "with zero_stage: 1"),
    ({"DEEPSPEED_CONFIG_FILE": "mine.json"}, True, "deepspeed_config_file: mine.json"),
    ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, True, "offload_optimizer_device: cpu"),
    ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, True, "offload_param_device: nvme")])
def test_what_deepspeed_is_asked_for_and_is_not_done_is_refused(asked, monkeypatch, values, there, told):
    asked(**values)
    installed(monkeypatch, there)
    with pytest.raises(PosttrainError, match=told):
        distributed.join()


@pytest.mark.parametrize("model, processes, stage, told", [
    ({}, 2, "ppo", "takes one model, and PPO trains two"), ({}, 2, "rejection", "a section of kind rejection does not"), ({}, 1, "sft", "ZeRO stage 3 in one"),
    ({"quantization": "nf4"}, 2, "reward", "ZeRO stage 3 with quantization: nf4"), ({"sharding": "full"}, 2, "sft", "one of the two"), ({}, 2, "sft", None)])
def test_what_zero_cannot_do_is_refused(monkeypatch, model, processes, stage, told):
    monkeypatch.setattr(distributed, "world", lambda: processes)
    monkeypatch.setattr(distributed, "_launcher_zero", 3)
    config = SimpleNamespace(**{"sharding": "none", "quantization": "none", **model})
    if told is None:
        return distributed.check_sharding(config, stage, KINDS[stage].sharded, "here")
    with pytest.raises(PosttrainError, match=told):
        distributed.check_sharding(config, stage, KINDS[stage].sharded, "here")


def test_ppo_under_deepspeed_stops_before_anything_is_loaded(make_run, asked, monkeypatch, tmp_path):
    asked(DEEPSPEED_ZERO_STAGE="2")
    installed(monkeypatch, True)
    monkeypatch.setattr(models, "load_tokenizer", lambda *args: pytest.fail("loaded"))
    outside = str(tmp_path / "reward-model")
    stage = {"stage": "ppo", "prompts": "demonstrations", "policy": "base", "helpfulness": outside, "safety": outside}
    run = make_run({"ppo": stage}, **DATA)
    with pytest.raises(PosttrainError, match="DeepSpeed is asked for; it takes one model, and PPO trains two") as told:
        run_sections(run)
    assert "recipes/accelerate/ddp.yaml" in str(told.value) and not (run.folder / "ppo").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_launcher_asks_for_it_and_accelerate_wraps_nothing(asked, monkeypatch, stage):
    """recipes/accelerate/deepspeed_zero*.yaml as accelerate hands it on."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args = launch_command_parser().parse_args(["--config_file", str(ROOT / "recipes" / "accelerate" / f"deepspeed_zero{stage}.yaml"), "-m", "sft", "recipe"])
    args = _validate_launch_command(args)[0]
    args.deepspeed_fields_from_accelerate_config = ""  # accelerate fills it as it starts DeepSpeed
    _, given = prepare_deepspeed_cmd_env(args)
    installed(monkeypatch, True)
    asked(**{k.removeprefix("ACCELERATE_"): v for k, v in given.items() if k.startswith("ACCELERATE_")})
    distributed.join()
    assert distributed.zero() == stage and distributed.shards(SimpleNamespace(sharding="none")) and "ACCELERATE_USE_DEEPSPEED" not in os.environ
