"""Safe by default: no name leads out of the run folder, no pickle and no foreign code runs, no secret is written down, and no network is needed
that a recipe did not ask for."""

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from posttrain import confidential
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError

ROOT = Path(__file__).parent.parent
PACKAGES = ("posttrain", "sft", "reward", "rlhf", "safety")
SOURCES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
HOSTILE = ["../x", "..", ".", "/abs", "a/b", "a/../../b", ".hidden", "a\0b", "a\nb", "", "a\\..\\b", "~x"]


def recipe(tmp_path, **changes):
    value = {"run": {"name": "x", "dir": str(tmp_path / "runs")}, "model": {"name_or_path": "builtin:tiny-llama", "chat_template": "chatml", "lora": {}},
             "data": {"demos": [{"path": "d.jsonl", "format": "messages"}], "asked": [{"path": "p.jsonl", "format": "prompt"}]},
             "stages": {"sft": {"data": "demos"}}}
    for key, change in changes.items():
        value[key] = value[key] | change
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(value))
    return load_recipe(path)


# -- paths -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_no_name_of_a_recipe_leads_out_of_the_run_folder(tmp_path, name):
    for changes in ({"run": {"name": name}}, {"stages": {name: {"stage": "sft", "data": "demos"}}},
                    {"stages": {"e": {"stage": "diversity", "models": {name: "base"}, "prompts": "asked"}}}):
        with pytest.raises(PosttrainError):
            recipe(tmp_path, **changes)


@pytest.mark.parametrize("task", ["../x", "a/b", "a\\b", "a\0b", ""], ids=repr)
def test_no_task_of_the_harness_leads_out(tmp_path, task):
    with pytest.raises(PosttrainError):
        recipe(tmp_path, stages={"l": {"stage": "lm_eval", "models": {"a": "base"}, "tasks": [task]}})


def test_a_swept_value_becomes_a_plain_name(tmp_path):
    found = recipe(tmp_path, stages={"s": {"stage": "sft", "data": "demos", "sweep": {"model": ["base", "../../x", "/abs/y"]}}})
    assert [n for n in found.stages if n != "sft"] == ["s-base", "s-x", "s-abs-y"]


@pytest.mark.parametrize("name", [n for n in HOSTILE if n], ids=repr)
def test_no_name_in_a_row_becomes_a_path(name):
    """Categories and attack vectors of rows are looked up among the known ones; only those name files."""
    from posttrain.formats import Prompt
    from safety.distill import preprompts
    from safety.taxonomy import UNKNOWN, category_of, vector_of

    prompt = Prompt([{"role": "user", "content": "hi"}], meta={"category": name, "vector": name})
    assert category_of(prompt) == vector_of(prompt) == UNKNOWN
    assert "template" not in preprompts(prompt, 0)


def test_a_link_in_the_run_folder_is_replaced_and_not_followed(tmp_path):
    from posttrain.runs import write_json

    outside, link = tmp_path / "outside.json", tmp_path / "run" / "results.json"
    outside.write_text("mine")
    link.parent.mkdir()
    link.symlink_to(outside)
    write_json(link, {"a": 1})
    assert outside.read_text() == "mine" and not link.is_symlink()


# -- pickles and foreign code ------------------------------------------------------------------------------------------------------------


def calls():
    """(file and line, dotted name, keywords) of every call in the program."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_that_is_read_can_run():
    """But for builtin.py, which reads the demo's model out of an installed package, every loader says that remote code is off."""
    bad, loads, codes = [], 0, 0
    for place, name, keywords in calls():
        last = name.rpartition(".")[2]
        if name == "torch.load":
            loads += 1
            bad += [f"{place}: torch.load without weights_only=True"] * (keywords.get("weights_only") != "True")
        codes += "trust_remote_code" in keywords
        bad += [f"{place}: remote code"] * (keywords.get("trust_remote_code", "False") != "False")
        bad += [f"{place}: {name}"] * (name in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load") or last in ("Unpickler", "read_pickle")
                                       or name.split(".")[0] in ("pickle", "joblib", "shelve", "marshal", "dill", "cloudpickle"))
        bad += [f"{place}: allow_pickle"] * (keywords.get("allow_pickle", "False") != "False")
        bad += [f"{place}: shell"] * (keywords.get("shell", "False") != "False" or name == "os.system")
        bad += [f"{place}: yaml"] * (name == "yaml.load" and keywords.get("Loader") != "_Loader")
        bad += [f"{place}: from_pretrained of a class that may run foreign code"] * (
            last == "from_pretrained" and "builtin.py" not in place and ("Auto" in name or name.startswith("cls"))
            and keywords.get("trust_remote_code") != "False")
    assert not bad
    assert loads >= 2 and codes >= 5


def test_the_trainer_reads_a_checkpoint_without_running_it():
    """transformers reads the optimizer and the random state of a run's own checkpoint: each with weights_only."""
    from transformers import Trainer

    found = 0
    for method in (Trainer._load_optimizer_and_scheduler, Trainer._load_rng_state, Trainer._load_scaler):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                found += 1
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), method
    assert found


def test_a_model_with_code_of_its_own_is_refused_by_name(tmp_path):
    from posttrain.config import ModelConfig
    from posttrain.models import load_network, load_tokenizer

    folder, mark = tmp_path / "odd", tmp_path / "ran"
    folder.mkdir()
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import PretrainedConfig\nclass C(PretrainedConfig):\n    model_type = 'odd'\n"
    (folder / "code.py").write_text(code)
    (folder / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.C", None]}}))
    (folder / "model.safetensors").write_bytes(b"")
    import torch

    config = ModelConfig(name_or_path=str(folder), chat_template="chatml")
    for load in (lambda: load_network(str(folder), config, torch.float32, "x"), lambda: load_tokenizer(config, "x")):
        with pytest.raises(PosttrainError, match=f"{folder}' (wants to run code from its repository|cannot be loaded)"):
            load()
    with pytest.raises(PosttrainError, match="wants to run code from its repository.*Remote code stays off"):
        load_network(str(folder), config, torch.float32, "x")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path, name):
    from posttrain.models import resolve

    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(PosttrainError, match=r"holds .* but no \.safetensors.*Convert it: .*save_pretrained\('OUT'\)"):
        resolve(str(tmp_path))


# -- secrets and servers -----------------------------------------------------------------------------------------------------------------


def test_what_only_resembles_a_secret_is_none():
    for text in ("data/sk-translations-of-helpful-prompts.jsonl", "en-sk-parallel-corpus-cleaned-V2", "org/sk-legal-instructions-2024",
                 "http://127.0.0.1:8000#Qwen3@main", "https://example.com?u=a:b@c", "https://${USER}:${PASSWORD}@host/", "s3://bucket/a@b:c"):
        confidential.refuse({"key": text}, "here")


@pytest.mark.parametrize("secret", ["https://me:pass@host/model", "hf_" + "a1B2" * 8, "sk-" + "xA9" * 11, "ghp_" + "z" * 36, "AKIA" + "A" * 16,
                                    "-----BEGIN RSA PRIVATE KEY-----"])
def test_a_secret_in_a_recipe_is_refused_and_not_shown(tmp_path, secret):
    for changes in ({"model": {"name_or_path": secret}}, {"model": {"revision": secret}}, {"run": {"dir": f"/x/{secret}"}},
                    {"data": {"demos": [{"path": secret, "format": "messages"}]}}, {"stages": {"sft": {"data": "demos", "model": secret}}}):
        with pytest.raises(PosttrainError, match=r"mine.yaml: \w+\.\S+: an? (address with|access token|private key)") as e:
            recipe(tmp_path, **changes)
        assert secret not in str(e.value)
    with pytest.raises(PosttrainError) as e:
        load_recipe(ROOT / "recipes" / "tiny.yaml", [f"model.name_or_path={secret}"])
    assert secret not in str(e.value)


def test_every_server_answers_on_this_machine_alone_unless_told_otherwise():
    from typer.main import get_command

    from posttrain.__main__ import app

    def hosts(command, name=""):
        for sub in getattr(command, "commands", {}).values():
            yield from hosts(sub, f"{name} {sub.name}")
        yield from ((name.strip(), p.default) for p in command.params if p.name == "host")

    found = dict(hosts(get_command(app)))
    assert len(found) >= 3
    assert set(found.values()) <= {"127.0.0.1", None}, found
    from posttrain import chat_command

    assert chat_command.HOST == "127.0.0.1"


# -- the network -------------------------------------------------------------------------------------------------------------------------

CLOSED = """
import os, sys

def closed(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"):
        with open(os.environ["ATTEMPTS"], "a") as f:
            f.write(f"{event} {args[1:]}\\n")
        raise OSError("no network here")

sys.addaudithook(closed)
"""
SMALL = ["data.demonstrations.0.rows=8", "data.demonstrations.1.rows=4", "data.helpful.0.rows=12", "data.safety.0.rows=12", "data.prompts.0.rows=8",
         "data.prompts.1.rows=6", "data.held_out={demonstrations: 2, pairs: 4, prompts: 3}", "stages.v1_samples.samples_per_prompt=2",
         "stages.ppo.iterations=1", "stages.ppo.critic_warmup=0", "stages.ppo.batch_size=4", "stages.ppo.mini_batch_size=4", "stages.ppo.eval_prompts=2",
         "stages.eval.samples_per_prompt=1"]


@pytest.mark.pipeline
def test_the_tiny_pipeline_needs_no_network_and_writes_no_secret_and_nothing_outside(tmp_path):
    """Every socket is closed from the interpreter's start, also in its children; a swallowed attempt counts."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "sitecustomize.py").write_text(CLOSED)
    rows = [{"prompt": f"Tell me about {n} things.", "category": name, "vector": name, "source": name, "kind": name, "group": name}
            for n, name in enumerate(["../../../escaped", "/tmp/escaped", "..", "a/b", "x\u0000y", "~", ".previous", "DONE"])]
    (tmp_path / "hostile.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    before, secret = {*tmp_path.iterdir()}, "do-not-tell-4711"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | {
        "PYTHONPATH": str(tmp_path / "closed"), "ATTEMPTS": str(tmp_path / "attempts"), "HOME": str(tmp_path / "home"), "HF_TOKEN": secret,
        "OPENAI_API_KEY": secret, "WANDB_API_KEY": secret, "AWS_SECRET_ACCESS_KEY": secret, "XDG_CACHE_HOME": os.environ.get(
            "XDG_CACHE_HOME", str(Path.home() / ".cache"))}
    out = subprocess.run([sys.executable, "-m", "posttrain", "run", "recipes/tiny.yaml", f"run.dir={tmp_path / 'runs'}", *SMALL,
                          f"data.prompts.2={{path: {tmp_path / 'hostile.jsonl'}, format: prompt, safety_prompt: true}}"],
                         cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0 and "All 8 sections" in out.stdout, out.stdout + out.stderr
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()
    assert {*tmp_path.iterdir()} - before <= {tmp_path / "runs", tmp_path / "home"}
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"tiny"}
    written = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert len(written) > 50 and not [p for p in written if secret.encode() in p.read_bytes()]
    assert not [p for p in (tmp_path / "runs").rglob("*") if "escaped" in p.name]
    told = json.loads((tmp_path / "runs" / "tiny" / "sft" / "manifest.json").read_text())
    assert secret not in out.stdout + out.stderr and str(tmp_path / "home") not in json.dumps(told)


def test_the_closed_sockets_are_closed(tmp_path):
    """The control: an attempt fails and is noted."""
    (tmp_path / "sitecustomize.py").write_text(CLOSED)
    code = "import urllib.request\ntry: urllib.request.urlopen('http://localhost:9')\nexcept OSError: pass"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path), "ATTEMPTS": str(tmp_path / "attempts"), "PATH": "/usr/bin"},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "socket." in (tmp_path / "attempts").read_text(), done.stderr
