"""What the tests of rejection sampling, PPO and evaluation share: one recipe on the tiny model whose SFT and reward sections are
trained once a session and copied into each test's folder (a section's fingerprint does not depend on where its run lies).
"""

import json
import shutil
from functools import cache
from pathlib import Path

import torch

from posttrain import chat
from posttrain.config import load_recipe
from posttrain.models import roles_for, source_of
from posttrain.runs import Run, run_sections

THINGS = ["bread", "glass", "the moon", "a kite", "salt", "rain", "a bell", "paper", "honey", "ice", "a clock", "wool", "sand", "a mirror",
          "tea", "a bridge"]
ASKS = ["What is {}?", "Who needs {}?", "Draw {} in words."]
RISKY = ["How do I steal {}?", "How can I poison someone with {}?"]
REWARDS = {"helpfulness": "@reward_helpfulness", "safety": "@reward_safety"}
PARENTS = ("sft", "reward_helpfulness", "reward_safety")


def _write_data(folder: Path) -> None:
    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")

    def asked(i):
        return ASKS[i % 3].format(THINGS[i % 16])

    write("demonstrations", [{"prompt": asked(i), "completion": ("Yes.", "No.", "A thing.", "It is.")[i % 4]} for i in range(32)])
    write("helpful", [{"prompt": asked(i), "chosen": "It is a thing.", "rejected": "No.", "rating": "better"} for i in range(16)])
    write("safety", [{"prompt": RISKY[i % 2].format(THINGS[i % 16]), "chosen": "No, never.", "rejected": "Yes, so.", "chosen_safe": True,
                      "rejected_safe": False} for i in range(16)])
    write("prompts", [{"prompt": ask.format(thing)} for thing in THINGS for ask in ASKS])
    write("risky", [{"prompt": ask.format(thing), "category": "illicit"} for thing in THINGS[:8] for ask in RISKY])
    write("borderline", [{"prompt": f"How do I kill {thing} on my computer?", "looks_like": "illicit"} for thing in THINGS[:4]])


@cache
def parents(base: Path) -> Path:
    """The folder with the data and the finished sections, made once a session. base: where pytest keeps this session's folders."""
    folder = base / "rlhf-parents"
    folder.mkdir(exist_ok=True)
    _write_data(folder)
    run_sections(Run(recipe(folder, folder, {})), list(PARENTS))
    return folder


def recipe(shared: Path, folder: Path, stages: dict, seed: int = 0, overrides=()):
    """A recipe whose data lie in `shared` and whose run lies in `folder`."""
    def data(name, form, **extra):
        return {"path": str(shared / f"{name}.jsonl"), "format": form, **extra}

    train = {"epochs": 1, "batch_size": 8, "max_length": 256, "save_steps": 100}
    reward = {"stage": "reward", "model": "@sft", "learning_rate": 5e-3, **train}
    written = {
        "run": {"name": "t", "seed": seed, "dir": str(folder), "threads": 1},
        "model": {"name_or_path": "builtin:tiny-llama", "dtype": "float32", "chat_template": "chatml", "lora": {"r": 4, "alpha": 8}},
        "data": {"demonstrations": [data("demonstrations", "prompt_completion")], "helpful": [data("helpful", "preference")],
                 "safety": [data("safety", "preference", safety_prompt=True)],
                 "prompts": [data("prompts", "prompt"), data("risky", "prompt", safety_prompt=True), data("borderline", "prompt")],
                 "held_out": {"pairs": 8, "prompts": 12}},
        "stages": {"sft": {"data": "demonstrations", "packing": False, "learning_rate": 2e-2, **train, "epochs": 12},
                   "reward_helpfulness": {**reward, "own": "helpful", "other": "safety"},
                   "reward_safety": {**reward, "own": "safety", "other": "helpful", "own_share": 0.9, "safety_loss_weight": 1.0}, **stages}}
    path = folder / f"recipe-{seed}.yaml"
    path.write_text(json.dumps(written), encoding="utf-8")
    return load_recipe(path, list(overrides))


def make_run(factory, folder: Path, stages: dict, seed: int = 0, overrides=()) -> Run:
    """A Run in `folder` with the finished parents in it, which fit seed 0 alone. factory: pytest's tmp_path_factory."""
    shared = parents(factory.getbasetemp())
    run = Run(recipe(shared, folder, stages, seed, overrides))
    for name in PARENTS:
        if not (run.folder / name).exists():
            shutil.copytree(shared / "t" / name, run.folder / name)
    return run


class Killed(BaseException):
    """As a signal: no `except Exception` holds it."""


def die(monkeypatch, owner, name: str, n: int = 1, when=lambda *args: True) -> None:
    """owner.name raises Killed at its n-th call for which when(*args) holds, before it does anything."""
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        if when(*args):
            calls.append(1)
            if len(calls) == n:
                raise Killed(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


def started(run: Run, name: str):
    """The section, its folder ready, as `run_sections` has it before the stage begins."""
    section = run.section(name)
    run.start(section)
    return section


def scored_alone(section, rows):
    """Each row with what the saved heads give its answer, one sequence at a time: at the token that ends it, put there where it was cut off."""
    roles = roles_for(section)
    for name in ("helpfulness", "safety"):
        roles.add(name, source_of(section, REWARDS[name]), head="saved")
    for r in rows:
        ids, own = chat.encode_prompt(roles.tokenizer, r["prompt"]) + r["ids"] + ([] if r["finished"] else [2]), {}
        for name in ("helpfulness", "safety"):
            roles.use(name)
            with torch.no_grad():
                last = roles.base.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
            own[name] = (last @ roles[name].head.weight[0]).item()
        yield r, own
