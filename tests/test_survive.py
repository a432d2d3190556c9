"""Runs that meet signals, damaged files, full disks, GPUs without memory, other programs and other places: each goes on to the bytes of the run
that met nothing, or is refused by name. Kills at any moment: tests/test_pipeline.py and bench/soak.py."""

import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rlhf_support import PARENTS, REWARDS, Killed, die, make_run

import posttrain.__main__ as command_line
from posttrain import runs, stopping, training
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.models import Roles
from posttrain.runs import Run, flatten, read_json, run_sections
from posttrain.training import newest_checkpoint
from rlhf import checkpoint, ppo, rollout

ROOT = Path(__file__).parent.parent
STAGES = {
    "tune": {"stage": "sft", "data": "demonstrations", "packing": False, "batch_size": 8, "epochs": 9, "max_steps": 8, "max_length": 256,
             "learning_rate": 1e-2, "save_steps": 2, "micro_batch_tokens": 256},
    "round": {"stage": "rejection", "prompts": "prompts", "policy": "@sft", **REWARDS, "samples_per_prompt": 4, "rows": 6, "chunk": 2, "batch": 8,
              "max_new_tokens": 6, "temperature": 0.7, "micro_batch_tokens": 256},
    "ppo": {"prompts": "prompts", "policy": "@sft", **REWARDS, "iterations": 3, "batch_size": 8, "mini_batch_size": 4, "max_new_tokens": 6,
            "learning_rate": 3e-3, "critic_learning_rate": 3e-3, "eval_every": 1, "eval_prompts": 4, "save_steps": 1, "critic_warmup": 1,
            "micro_batch_tokens": 256, "temperature": 0.5, "sample_every": 1},
    "chat": {"stage": "export", "model": "@ppo", "dtype": "float32"}}
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"


def changed(**sections) -> dict:
    """STAGES with other keys in some sections."""
    return STAGES | {name: STAGES[name] | keys for name, keys in sections.items()}


def new_run(factory, stages: dict = STAGES) -> Run:
    return make_run(factory, factory.mktemp("survive"), stages)


def outcome(run: Run, *names: str) -> dict[str, bytes | list]:
    """All that sections leave, but for what a clock decides."""
    out = {}
    for name in names:
        files = [p for p in sorted((run.folder / name).rglob("*")) if p.is_file() and p.name not in ("manifest.json", "metrics.jsonl")]
        out |= {str(p.relative_to(run.folder)): p.read_bytes() for p in files if p.name != "posttrain.json"}
        out[f"{name}/metrics"] = [{k: v for k, v in r.items() if not any(w in k for w in ("time", "second", "memory"))}
                                  for r in read_lines(run.folder / name / "metrics.jsonl")]
    return out


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Run:
    """A run that met nothing."""
    run = new_run(tmp_path_factory)
    run_sections(run, list(STAGES))
    return run


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Run:
    """A run killed in each of its sections."""
    run = new_run(tmp_path_factory)
    for name, owner, what, n in (("tune", training._Watch, "on_log", 6), ("round", rollout, "sample", 3), ("ppo", ppo, "update", 3)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            die(patch, owner, what, n)
            run_sections(Run(run.recipe), [name])
    return run


def copied(run: Run, factory) -> Run:
    """The run in another folder, which is also what moving it is."""
    home = factory.mktemp("copy")
    shutil.copytree(run.folder, home / "t")
    recipe = run.recipe.model_copy(update={"run": run.recipe.run.model_copy(update={"dir": str(home)})})
    return Run(recipe)


# -- signals -------------------------------------------------------------------------------------------------------------------------


def send(patch, owner, name: str, n: int, number=signal.SIGTERM) -> None:
    """The signal arrives as owner.name is called the n-th time."""
    real, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            signal.raise_signal(number)
        return real(*args, **kwargs)

    patch.setattr(owner, name, called)


def stop(run: Run, section: str, owner, name: str, n: int, number=signal.SIGTERM) -> int:
    """Run a section until the signal has ended it. The exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(stopping.Stopped) as stopped, stopping.heeded():
        send(patch, owner, name, n, number)
        run_sections(Run(run.recipe), [section])
    return stopped.value.exit_code


RARELY = changed(tune={"save_steps": 100}, ppo={"save_steps": 100})  # save_steps is no part of a fingerprint


@pytest.mark.parametrize("section, owner, name, n, saved", [
    ("tune", training, "collate", 3, 2), ("tune", training._Watch, "on_log", 8, 8), ("ppo", ppo.losses, "policy", 3, 2), ("ppo", rollout, "sample", 6, 1),
    ("ppo", ppo, "evaluate", 1, 0), ("round", rollout, "sample", 2, None)])
def test_sigterm_keeps_what_was_made_and_the_same_command_ends_in_the_same_bytes(straight, tmp_path_factory, section, owner, name, n, saved):
    """In a step (a checkpoint after it), in the last one, in an update, while PPO samples (the policy before it) or judges its start, in a chunk."""
    run = new_run(tmp_path_factory, RARELY)
    assert stop(run, section, owner, name, n) == 75
    found = newest_checkpoint(run.folder / section, print)
    if section == "round":
        assert [p.name for p in (run.folder / section / "chunks").iterdir()] == ["00000.json"]
    else:
        assert found.name == f"checkpoint-{saved}"
    run_sections(Run(run.recipe), [section])
    got, expected = outcome(run, section), outcome(straight, section)
    config = f"{section}/config.yaml"
    assert got.pop(config) == expected.pop(config) or section != "round"
    assert got == expected


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_the_command_says_that_it_goes_on(tmp_path_factory, capfd, number, code):
    run = new_run(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        send(patch, training._Watch, "on_log", 3, number)
        patch.setattr(sys, "argv", ["sft", run.recipe.path, "tune"])
        command_line.stage_main("sft")
    out, err = capfd.readouterr()
    name = signal.Signals(number).name
    assert end.value.code == code and f"Stopped ({name}). The same command goes on from here" in out
    assert f"{name}: stops after this step, with a checkpoint; a second signal ends it at once" in err
    assert signal.getsignal(number) is not stopping._receive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number):
    code = ("import signal, time; from posttrain import stopping\nwith stopping.heeded(), stopping.deferred():\n"
            f"    for _ in range(2): signal.raise_signal({int(number)}); time.sleep(1.1)\n    print('still here')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -number and "still here" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_twice_at_once_is_one(number):
    """A supervisor signals the whole group, and torchrun in it hands the signal on to its workers."""
    code = ("import signal; from posttrain import stopping\ntry:\n    with stopping.heeded(), stopping.deferred():\n"
            f"        for _ in range(2): signal.raise_signal({int(number)})\n        print('still here')\nexcept stopping.Stopped: print('stopped')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split("\n")[:2] == ["still here", "stopped"]


def test_a_signal_that_a_library_swallows_stops_at_the_next_check():
    with pytest.raises(stopping.Stopped), stopping.heeded():
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        stopping.check()


# -- damaged files -------------------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def flipped_early(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:3] + bytes([data[3] ^ 0x80]) + data[4:])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


FINISHED = [
    ("tune/manifest.json", truncated), ("tune/manifest.json", flipped), ("tune/manifest.json", emptied), ("tune/manifest.json", gone),
    ("tune/config.yaml", flipped), ("tune/results.json", truncated), ("tune/metrics.jsonl", gone), ("tune/model/adapter_config.json", emptied),
    ("tune/model/adapter_model.safetensors", truncated), ("tune/model/adapter_model.safetensors", flipped),
    ("tune/model/adapter_model.safetensors", emptied), ("tune/model/adapter_model.safetensors", gone), ("tune/model/tokenizer.json", truncated),
    ("round/data.jsonl", truncated), ("round/samples.jsonl", flipped), ("round/chunks/00001.json", flipped), ("round/chunks/00001.json", gone),
    ("ppo/metrics.jsonl", flipped), ("ppo/model/adapter_model.safetensors", flipped), ("ppo/results.json", emptied),
    ("chat/model/model.safetensors", flipped), ("chat/model/model.safetensors", truncated), ("chat/model/config.json", emptied),
    ("chat/model/tokenizer.json", gone), ("chat/model/generation_config.json", flipped)]


@pytest.mark.parametrize("name, damage", FINISHED, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_file_of_a_finished_section_is_refused_by_name(straight, tmp_path_factory, name, damage):
    run = copied(straight, tmp_path_factory)
    damage(run.folder / name)
    with pytest.raises(PosttrainError, match=r"missing|damaged|empty") as e:
        run_sections(run, list(STAGES))
    assert e.value.place == str(run.folder / name) and "again" in e.value.do


def test_a_score_head_that_changed_is_noticed_before_a_section_reads_it(straight, tmp_path_factory):
    """Also in a file so large that a section which is only skipped isn't read: its readers read it whole first."""
    run = copied(straight, tmp_path_factory)
    file = run.folder / "reward_safety" / "model" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    shutil.rmtree(run.folder / "round")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "LARGE", 100)
        run_sections(run, ["reward_safety"])
        with pytest.raises(PosttrainError, match=r"reward_safety/model/adapter_model.safetensors: damaged \(its checksum differs\)"):
            run_sections(run, ["round"])
    assert not (run.folder / "round").exists()


@pytest.mark.parametrize("damage", [truncated, flipped, emptied], ids=lambda x: x.__name__)
def test_a_damaged_done_is_written_again_where_all_else_is_sound(straight, tmp_path_factory, capsys, damage):
    run = copied(straight, tmp_path_factory)
    before = (run.folder / "ppo" / "DONE").read_bytes()
    damage(run.folder / "ppo" / "DONE")
    run_sections(run, ["ppo"])
    assert (run.folder / "ppo" / "DONE").read_bytes() == before and "DONE was damaged and is written again" in capsys.readouterr().out


def test_a_section_without_done_makes_again_what_is_absent(straight, tmp_path_factory):
    run = copied(straight, tmp_path_factory)
    for name in ("DONE", "data.jsonl", "chunks/00001.json", "results.json"):
        gone(run.folder / "round" / name)
    run_sections(run, ["round"])
    assert outcome(run, "round") == outcome(straight, "round")


def test_a_card_is_a_persons_to_edit(straight, tmp_path_factory):
    run = copied(straight, tmp_path_factory)
    (run.folder / "chat" / "model" / "README.md").write_text("mine", encoding="utf-8")
    run_sections(run, ["chat"])


CHECKPOINTS = [("tune", "adapter_model.safetensors", flipped), ("tune", "adapter_config.json", gone), ("tune", "optimizer.pt", truncated),
               ("tune", "scheduler.pt", flipped), ("tune", "rng_state.pth", gone), ("tune", "trainer_state.json", emptied),
               ("tune", "checksums.json", truncated), ("tune", "checksums.json", gone), ("tune", "metrics.jsonl", flipped),
               ("ppo", "policy.adapter_model.safetensors", flipped), ("ppo", "critic.adapter_model.safetensors", truncated),
               ("ppo", "critic_optimizer.pt", emptied), ("ppo", "policy_optimizer.pt", gone), ("ppo", "state.json", flipped),
               ("ppo", "checksums.json", flipped)]


@pytest.mark.parametrize("section, name, damage", CHECKPOINTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_checkpoint_falls_back_to_the_one_before(cut, tmp_path_factory, section, name, damage):
    folder, said = copied(cut, tmp_path_factory).folder / section, []
    newest, before = training.checkpoints(folder)[::-1]
    damage(newest / name)
    assert newest_checkpoint(folder, said.append) == before
    assert f"{newest.name} is incomplete or damaged; using the one before" in said[0]


@pytest.mark.parametrize("section, files", [
    ("tune", {"checkpoint-4/optimizer.pt": truncated, "metrics.jsonl": flipped_early, "config.yaml": truncated}),
    ("round", {"chunks/00000.json": flipped, "chunks/00001.json": emptied}),
    ("ppo", {"checkpoint-2/critic.adapter_model.safetensors": flipped, "samples.jsonl": gone, "metrics.jsonl": emptied})])
def test_a_run_with_damaged_files_ends_in_the_same_bytes_and_says_so(straight, cut, tmp_path_factory, capsys, section, files):
    run = copied(cut, tmp_path_factory)
    for name, damage in files.items():
        damage(run.folder / section / name)
    run_sections(run, [section])
    told = capsys.readouterr().out
    assert outcome(run, section) == outcome(straight, section)
    if section != "round":
        assert "is incomplete or damaged; using the one before" in told and "metrics.jsonl is missing or damaged; it is put back" in told
    if section == "tune":
        assert "config.yaml is not what the recipe says: it is written again" in told


@pytest.mark.parametrize("name, damage", [("manifest.json", truncated), ("manifest.json", flipped), ("manifest.json", gone), ("best", flipped),
                                          ("best", gone)], ids=lambda x: getattr(x, "__name__", x))
def test_what_an_unfinished_section_cannot_do_without_is_refused_by_name(cut, tmp_path_factory, name, damage):
    run = copied(cut, tmp_path_factory)
    folder = run.folder / "ppo"
    if name == "best":
        newest = training.checkpoints(folder)[-1]
        file = folder / f"best-{read_json(newest / 'state.json')['best_iteration']}" / "adapter_model.safetensors"
    else:
        file = folder / name
    damage(file)
    with pytest.raises(PosttrainError, match=r"damaged|missing") as e:
        run_sections(run, ["ppo"])
    assert e.value.place == str(file if name != "best" else file.parent) and "it " in e.value.do and "made again" in e.value.do


# -- checkpoints kept ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3])
def test_as_many_checkpoints_stay_as_save_total_limit_says(tmp_path_factory, monkeypatch, limit):
    run, seen, real = new_run(tmp_path_factory, changed(tune={"save_steps": 1, "save_total_limit": limit})), [], training.drop_old
    monkeypatch.setattr(training, "drop_old", lambda folder, keep: (real(folder, keep), seen.append([p.name for p in training.checkpoints(folder)])))
    run_sections(run, ["tune"])
    assert seen == [[f"checkpoint-{i}" for i in range(max(1, n - limit + 1), n + 1)] for n in range(1, 9)]


def test_ppo_keeps_two(tmp_path_factory, monkeypatch):
    run, seen, real = new_run(tmp_path_factory), [], checkpoint.drop_old
    monkeypatch.setattr(checkpoint, "drop_old", lambda folder, keep: (real(folder, keep), seen.append([p.name for p in training.checkpoints(folder)])))
    run_sections(run, ["ppo"])
    assert seen == [["checkpoint-0"], ["checkpoint-0", "checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]


def test_a_kill_before_the_seal_leaves_the_checkpoint_before(tmp_path_factory, monkeypatch):
    """With save_total_limit 1: the old one goes after the new one counts."""
    run = new_run(tmp_path_factory, changed(tune={"save_total_limit": 1}))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, training, "seal", 2)
        run_sections(run, ["tune"])
    assert newest_checkpoint(run.folder / "tune", print).name == "checkpoint-2"


# -- disks ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@contextmanager
def full(disk: Path, left: int):
    """All but `left` bytes of the disk are taken."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            pass
        f.truncate(f.tell() // 4096 * 4096 - left)
    yield
    ballast.unlink()


SHORT = {"prompts": "prompts", "max_new_tokens": 12, "batch": 16}
KINDS = {
    "tune": STAGES["tune"], "rm": {"stage": "reward", "model": "@sft", "own": "helpful", "batch_size": 8, "max_length": 256, "save_steps": 100},
    "round": STAGES["round"], "ppo": STAGES["ppo"], "chat": {"stage": "export", "model": "@sft", "dtype": "float32"},
    "two": {"stage": "collect", "policies": ["@sft"], "temperatures": [0.3, 0.6], "rows": 24, "chunk": 10, **SHORT},
    "judged": {"stage": "evaluate", "models": {"a": "@sft", "b": "base"}, **REWARDS, **SHORT, "samples_per_prompt": 2},
    "distilled": {"stage": "distill", "policy": "@sft", **REWARDS, "samples_per_prompt": 2, "temperature": 0.5, "chunk": 5, **SHORT},
}


@pytest.mark.parametrize("section", [pytest.param(name, marks=[pytest.mark.pipeline] if name == "judged" else []) for name in KINDS])
def test_a_full_disk_is_told_and_with_room_the_stage_goes_on(tmp_path_factory, disk, section):
    run = make_run(tmp_path_factory, disk, KINDS)
    with full(disk, 16 << 10), pytest.raises(PosttrainError, match=rf"t/{section}: cannot be written \(No space left on device\).*nothing finished"):
        run_sections(run, [section])
    run_sections(Run(run.recipe), [section])
    assert not run.section(section).damage(whole=True) and read_json(run.folder / section / "manifest.json")["files"]


def test_a_read_only_folder_is_told_before_anything_is_loaded_and_later_the_run_goes_on(straight, tmp_path_factory, disk):
    run = make_run(tmp_path_factory, disk, STAGES)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(PosttrainError, match=r"/t: cannot be written \(Read-only file system\)\. Expected a writable run folder"):
        run_sections(run, ["round"])
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    run_sections(run, ["round"])
    assert outcome(run, "round") == outcome(straight, "round")


def test_a_report_that_finds_no_room_is_told(straight, monkeypatch):
    from posttrain import report

    def no_room(run):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", no_room)
    with pytest.raises(PosttrainError, match=r"the report cannot be written \(No space left on device\).*posttrain report"):
        command_line._report(straight)


# -- memory --------------------------------------------------------------------------------------------------------------------------


def little_memory(patch, tokens: int) -> None:
    """A GPU that holds the activations of so many tokens."""
    real = Roles.hidden

    def hidden(self, name, batch):
        if torch.is_grad_enabled() and batch.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError(OOM)
        return real(self, name, batch)

    patch.setattr(Roles, "hidden", hidden)


def memory_once_short(patch) -> None:
    """The GPU's memory runs out once, half-way through a step: gradients of its first part are there."""
    real, calls = Roles.hidden, []

    def hidden(self, name, batch):
        if torch.is_grad_enabled() and not calls and any(p.grad is not None for p in self["policy"].parameters()):
            calls.append(1)
            raise torch.OutOfMemoryError(OOM)
        return real(self, name, batch)

    patch.setattr(Roles, "hidden", hidden)


@pytest.mark.parametrize("short", [lambda patch: little_memory(patch, 100), memory_once_short], ids=["little", "once"])
@pytest.mark.parametrize("section", ["tune", "ppo"])
def test_where_a_micro_batch_does_not_fit_smaller_ones_do_and_the_manifest_says_so(straight, tmp_path_factory, monkeypatch, section, short):
    run = new_run(tmp_path_factory)
    with monkeypatch.context() as patch:
        short(patch)
        run_sections(run, [section])
    told = read_json(run.folder / section / "manifest.json")
    assert told["exact"] is False and told["decisions"]["micro_batch_tokens"] < 256
    assert any("memory ran out in a micro-batch of" in why for why in told["inexact_because"])
    for key in {"tune": ("sft/loss", "sft/grad_norm"), "ppo": ("ppo/value_loss", "ppo/policy_grad_norm", "ppo/critic_grad_norm")}[section]:
        got, expected = ([r[key] for r in read_lines(r.folder / section / "metrics.jsonl") if key in r] for r in (run, straight))
        assert got == pytest.approx(expected, rel=1e-3) and len(got) > 2, key


def test_a_resumed_section_keeps_the_smaller_micro_batches(tmp_path_factory, monkeypatch):
    run, seen = new_run(tmp_path_factory), []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        little_memory(patch, 100)
        die(patch, training._Watch, "on_log", 4)
        run_sections(run, ["tune"])
    real = training.token_budget
    monkeypatch.setattr(training, "token_budget", lambda trees, budget, layout: seen.append(budget) or real(trees, budget, layout))
    run_sections(Run(run.recipe), ["tune"])
    assert seen and max(seen) <= 100


def test_a_single_row_that_does_not_fit_says_what_to_change(tmp_path_factory, monkeypatch):
    little_memory(monkeypatch, 5)
    with pytest.raises(PosttrainError, match=r"stages\.tune: the GPU's memory ran out in a micro-batch of one row of \d+ tokens.*Lower max_length, set "
                                             r"activation_checkpointing: true, or quantize"):
        run_sections(new_run(tmp_path_factory), ["tune"])


@pytest.mark.parametrize("section, key", [("round", "mean_reward_kept"), ("ppo", "watched")])
def test_passes_without_gradients_are_cut_smaller_too(straight, tmp_path_factory, monkeypatch, section, key):
    """Both reward models' scores; the reference's log-probabilities, values, the watched prompts' KL."""
    run, real = new_run(tmp_path_factory), Roles.hidden

    def hidden(self, name, batch):
        if not torch.is_grad_enabled() and batch.input_ids.numel() > 100:
            raise torch.OutOfMemoryError(OOM)
        return real(self, name, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Roles, "hidden", hidden)
        run_sections(run, [section])
    told, whole = (read_json(r.folder / section / "manifest.json") for r in (run, straight))
    assert told["exact"] is False and told["decisions"]["micro_batch_tokens"] <= 100
    assert told["decisions"].get("rows_at_once") == whole["decisions"].get("rows_at_once")  # nothing was sampled anew
    got, expected = (flatten("", r.section(section).results()[key]) for r in (run, straight))
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("section", ["round", "ppo"])
def test_where_samples_do_not_fit_fewer_are_drawn_side_by_side(tmp_path_factory, monkeypatch, section):
    run, real = new_run(tmp_path_factory), rollout.sample

    def sample(*args, batch, **rest):
        if batch > 3:
            raise torch.OutOfMemoryError(OOM)
        return real(*args, batch=batch, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "sample", sample)
        run_sections(run, [section])
    told = read_json(run.folder / section / "manifest.json")
    assert told["decisions"]["rows_at_once"] in (2, 3) and told["exact"] is False
    assert any("samples side by side" in why for why in told["inexact_because"])


def test_other_places_without_memory_are_told_with_the_keys_to_lower(tmp_path_factory, monkeypatch):
    def no_memory(section):
        raise torch.OutOfMemoryError(OOM)

    monkeypatch.setattr(runs, "load_module", lambda kind: SimpleNamespace(run=no_memory))
    with pytest.raises(PosttrainError, match=r"stages\.round: the GPU's memory ran out \(CUDA out of memory\).*Lower micro_batch_tokens or batch or"):
        run_sections(new_run(tmp_path_factory), ["round"])


# -- other programs, other folders, other versions ------------------------------------------------------------------------------------


def test_two_programs_exclude_each_other_until_one_dies(straight, tmp_path_factory):
    run = copied(straight, tmp_path_factory)
    code = ("import sys, time; from posttrain.config import load_recipe; from posttrain.runs import Run\n"
            "with Run(load_recipe(sys.argv[1], [f'run.dir={sys.argv[2]}'])).lock():\n    print('locked', flush=True); time.sleep(600)")
    holder = subprocess.Popen([sys.executable, "-c", code, run.recipe.path, run.folder.parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(PosttrainError, match="another program works on this run"):
            run_sections(run, ["tune"])
    finally:
        holder.kill()
        holder.wait()
    run_sections(run, ["tune"])


@pytest.mark.parametrize("section", ["tune", "round", "ppo"])
def test_a_run_moved_to_another_folder_goes_on(straight, cut, tmp_path_factory, capsys, section):
    run = copied(cut, tmp_path_factory)
    run_sections(run, [section])
    assert f"{section} ({run.section(section).kind}): goes on where it was cut off" in capsys.readouterr().out
    assert outcome(run, section) == outcome(straight, section)


@pytest.mark.parametrize("number, words", [(runs.FORMAT + 1, "newer"), (runs.FORMAT - 1, "older")])
@pytest.mark.parametrize("made", ["straight", "cut"])
def test_a_folder_of_another_format_is_refused_and_stays(request, tmp_path_factory, made, number, words):
    run = copied(request.getfixturevalue(made), tmp_path_factory)
    section = run.section("ppo")
    section.manifest["inputs"]["format"] = number
    section.save_manifest()
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    with pytest.raises(PosttrainError, match=rf"t/ppo: a run folder of format {number}, {words} than this program's.*Go on with the version"):
        run_sections(Run(run.recipe), ["ppo"])
    assert {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()} == before


def test_folders_from_before_checksums_of_whole_sections_are_read(straight, cut, tmp_path_factory, capsys):
    """A manifest without checksums; checkpoints without logs; the best policy without a seal."""
    run = copied(cut, tmp_path_factory)
    for name in (*PARENTS, "tune", "ppo"):
        path = run.folder / name / "manifest.json"
        runs.write_json(path, {k: v for k, v in read_json(path).items() if k not in ("files", "sha256")})
    for path in [*run.folder.glob("tune/checkpoint-*"), *run.folder.glob("ppo/checkpoint-*")]:
        for name in training.LOGS:
            (path / name).unlink(missing_ok=True)
        training.seal(path)
    for path in run.folder.glob("ppo/best-*/checksums.json"):
        path.unlink()
    run_sections(run, ["tune", "ppo"])
    told = capsys.readouterr().out
    assert "going on after step 4 of 8" in told and "going on after iteration 2 of 3" in told
    assert outcome(run, "tune", "ppo") == outcome(straight, "tune", "ppo")
