"""What the tests of chat and serve share: a run on disk whose models answer."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SEEDS = {"sft": 4, "v1": 8, "half": 9}  # of adapters under which the tiny model's likeliest answers are letters


def finished_run(folder: Path) -> tuple[Path, Path]:
    """A run with two finished fine-tunings, sft and v1, and one that is not finished. Returns (recipe file, run folder)."""
    import torch

    from posttrain.config import load_recipe
    from posttrain.models import Roles
    from posttrain.runs import Run, write_json

    rows = [{"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer"}]} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stage = {"stage": "sft", "data": "rows"}
    recipe = {"run": {"name": "talk", "dir": str(folder / "runs"), "threads": 1},
              "model": {"name_or_path": "builtin:tiny-llama", "dtype": "float32", "chat_template": "chatml", "lora": {"r": 4, "alpha": 8}},
              "data": {"rows": [{"path": "rows.jsonl", "format": "messages"}]}, "stages": dict.fromkeys(SEEDS, stage)}
    path = folder / "talk.yaml"
    path.write_text(json.dumps(recipe))
    run = Run(load_recipe(path))
    for day, (name, seed) in enumerate(SEEDS.items(), 1):
        section = run.section(name)
        run.start(section)
        roles = Roles(run.recipe.model, torch.float32, name)
        roles.add("policy", fresh_adapter=True)
        generator = torch.Generator().manual_seed(seed)
        for n, p in roles.base.named_parameters():
            if "lora_" in n:
                p.data = torch.randn(p.shape, generator=generator) * 0.1
        roles.save("policy", section.folder / "model")
        if name != "half":
            section.finish({})
            write_json(section.folder / "manifest.json", section.manifest | {"finished": f"2026-01-0{day}T00:00:00"})
    return path, run.folder


def self_signed(folder: Path, name: str = "mine", *options: str) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1. options: of `openssl req`, in the place of a key without a passphrase."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine: install the distribution's package `openssl`")
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2", "-subj", "/CN=127.0.0.1",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate, *(options or ("-noenc",))], check=True,
                   capture_output=True)
    return certificate, key
