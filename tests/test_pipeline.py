"""The whole road on the tiny recipe, as a user runs it: once straight, again, changed, killed, damaged, on a full disk."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.soak import digests, soak

ROOT = Path(__file__).parent.parent
TINY = ROOT / "recipes" / "tiny.yaml"
pytestmark = pytest.mark.pipeline


def posttrain(*args, module="posttrain", timeout=280, **kwargs):
    return subprocess.run([sys.executable, "-m", module, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs)


def weights(folder: Path) -> dict[str, bytes]:
    """Every model and adapter file of a run, by section."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/model/*.safetensors"))}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A whole run without interruption."""
    home = tmp_path_factory.mktemp("straight")
    began = time.time()
    out = posttrain("run", TINY, f"run.dir={home}")
    assert out.returncode == 0, out.stdout + out.stderr
    return home / "tiny", out.stdout, time.time() - began


def test_every_section_is_done_within_two_minutes(straight):
    folder, text, seconds = straight
    for name in ("sft", "reward_helpfulness", "reward_safety", "v1_samples", "v1", "ppo", "eval", "chat"):
        assert (folder / name / "DONE").exists(), name
        assert json.loads((folder / name / "results.json").read_text())
    assert "All 8 sections" in text and "Report:" in text
    assert (folder / "report.html").stat().st_size > 10_000
    assert seconds < 120


def test_no_pickled_output(straight):
    """Outputs are safetensors; a trainer's argument pickle never stays behind."""
    folder, _, _ = straight
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_manifests_hold_no_path_of_the_machine(straight):
    folder, _, _ = straight
    for path in folder.glob("*/manifest.json"):
        told = json.loads(path.read_text())
        told["inputs"].pop("run.dir", None)
        assert str(ROOT) not in json.dumps(told), path
        assert told["base"]["name_or_path"] == "builtin:tiny-llama"


def test_a_second_run_skips_everything(straight):
    folder, _, _ = straight
    before = weights(folder)
    out = posttrain("run", TINY, f"run.dir={folder.parent}")
    assert out.returncode == 0 and out.stdout.count("done already, skipped") == 8
    assert weights(folder) == before


def test_a_changed_key_runs_its_dependents_alone_and_comes_back(straight):
    folder, _, _ = straight
    metrics = folder / "ppo" / "metrics.jsonl"  # the policy that is kept may be the one it started from, in both runs
    before, told = weights(folder), metrics.read_bytes()
    out = posttrain("run", TINY, f"run.dir={folder.parent}", "ppo.kl_coef=0.05")
    assert out.returncode == 0, out.stdout + out.stderr
    assert out.stdout.count("done already, skipped") == 5  # sft, two rewards, samples, v1
    assert re.search(r"ppo \(ppo\): runs again, because stages\.ppo\.kl_coef: 0\.01 -> 0\.05", out.stdout)
    assert "eval (evaluate): runs again, because section ppo changed" in out.stdout
    assert metrics.read_bytes() != told
    out = posttrain("run", TINY, f"run.dir={folder.parent}")  # and back: the earlier result was kept
    assert out.returncode == 0 and "found among the earlier results" in out.stdout
    assert weights(folder) == before


def test_the_exported_folder_answers(straight):
    transformers = pytest.importorskip("transformers")
    folder = straight[0] / "chat" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


@pytest.mark.timeout(900)
def test_five_kills_of_sampling_and_ppo_change_nothing(straight, tmp_path):
    told = soak(straight[0], tmp_path, kills=5, seed=20261124)
    assert told["hits"] >= 5 and {"v1_samples", "ppo"} <= {k["section"] for k in told["kills"]}
    assert {f.partition("/")[0] for f in told["sha256"]} == {"sft", "reward_helpfulness", "reward_safety", "v1_samples", "v1", "ppo", "chat"}
    assert told["runs"] and not any(run["different"] for run in told["runs"])


def test_where_an_export_lies_is_no_difference(tmp_path):
    for name, told in (("a", {"folder": "a", "x": 1}), ("b", {"folder": "b", "x": 1}), ("c", {"folder": "a", "x": 2})):
        (tmp_path / name / "chat").mkdir(parents=True)
        (tmp_path / name / "chat" / "results.json").write_text(json.dumps(told))
    a, b, c = (digests(tmp_path / name, ("chat",)) for name in "abc")
    assert a == b != c and [*a] == ["chat/results.json"]


def test_a_soak_of_the_first_sections_starts_in_an_empty_folder(straight, tmp_path, monkeypatch):
    def seen(home, target, seconds):
        assert home.is_dir() and not list(home.iterdir())
        raise StopIteration(target)

    monkeypatch.setattr("bench.soak.kill", seen)
    with pytest.raises(StopIteration, match="sft|reward_helpfulness"):
        soak(straight[0], tmp_path, kills=1, seed=1, sections=("sft", "reward_helpfulness"))


def test_a_stage_alone_asks_for_its_parents(tmp_path):
    out = posttrain(TINY, "reward_safety", f"run.dir={tmp_path}", module="reward")
    assert out.returncode == 1
    assert "'@sft' is new" in out.stdout and "posttrain run" in out.stdout
    assert posttrain(TINY, f"run.dir={tmp_path}", "sft", module="sft").returncode == 0
    assert (tmp_path / "tiny" / "sft" / "DONE").exists()


def test_dry_run_writes_only_the_resolved_recipe(tmp_path):
    out = posttrain("run", TINY, f"run.dir={tmp_path}", "--dry-run")
    assert out.returncode == 0, out.stdout + out.stderr
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == ["resolved.yaml"]


def test_two_programs_exclude_each_other(tmp_path):
    from posttrain.config import load_recipe
    from posttrain.errors import PosttrainError
    from posttrain.runs import Run

    run = Run(load_recipe(TINY, [f"run.dir={tmp_path}"]))
    with run.lock(), pytest.raises(PosttrainError, match="another program works on this run"), Run(run.recipe).lock():
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_stops_with_a_message_and_goes_on_after(straight, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs")
    try:
        out = posttrain("run", TINY, f"run.dir={disk}")
        assert out.returncode == 1, out.stdout + out.stderr
        assert "error:" in out.stdout and "No space left" in out.stdout and "Traceback" not in out.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        out = posttrain("run", TINY, f"run.dir={disk}")
        assert out.returncode == 0, out.stdout + out.stderr
        assert weights(disk / "tiny") == weights(straight[0])
    finally:
        subprocess.run(["umount", disk], check=False)
