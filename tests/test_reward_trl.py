"""Our reward training is TRL's: the same losses, gradients and weights as its RewardTrainer, unpatched, on the same pairs in float32."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bench.reward import handover, peer, peer_weights
from posttrain.log import read_lines
from posttrain.models import resolve
from reward import train

STEPS = 8
STAGE = {"stage": "reward", "model": "base", "own": "helpful", "batch_size": 4, "max_steps": STEPS, "epochs": 100, "warmup_ratio": 0.25,
         "micro_batch_tokens": 300}
LORA = {"r": 8, "alpha": 16}


def pairs(n: int = 24) -> list[dict]:
    """Of many lengths, rated in turn."""
    ratings = ["significantly_better", "better", "slightly_better", "negligibly_better", None]
    return [{"prompt": f"question {i}: " + "why " * (i * 7 % 23), "chosen": "because " * (1 + i * 5 % 17), "rejected": "so " * (1 + i * 3 % 29) + str(i),
             **({"rating": ratings[i % 5]} if ratings[i % 5] else {})} for i in range(n)]


@pytest.fixture
def ours(make_run, start, tmp_path, monkeypatch):
    """ours(stage keys, lora) -> (rows of metrics.jsonl, initial weights, final weights) of a section; the handover is in tmp_path."""

    def go(settings: dict, lora: dict | None):
        real = train.fit
        monkeypatch.setattr(train, "fit", lambda trainer, *rest: (handover(trainer, tmp_path), real(trainer, *rest)))
        section = start(make_run({"reward": STAGE | settings}, pairs=pairs(), model={"lora": lora}), "reward")
        train.run(section)
        rows = [r for r in read_lines(section.folder / "metrics.jsonl") if "reward/loss" in r]
        file = "adapter_model.safetensors" if lora else "model.safetensors"
        return rows, load_file(tmp_path / "init" / file), load_file(section.folder / "model" / file)

    return go


def change(before: dict, after: dict) -> torch.Tensor:
    assert set(before) == set(after)
    return torch.cat([(after[k].double() - before[k].double()).flatten() for k in sorted(before)])


@pytest.mark.parametrize("margin, lora, rate, each", [("small", LORA, 3e-3, 2), ("none", LORA, 3e-3, 4), ("large", None, 3e-4, 1)],
                         ids=["adapter with margin", "adapter without", "full with margin"])
def test_losses_and_weights_are_trl_s(ours, tmp_path, margin, lora, rate, each):
    """each: TRL's pairs per device. Ours shares prompts and cuts micro-batches by tokens; TRL pads all to the longest."""
    logged, before, after = ours({"margin": margin, "learning_rate": rate}, lora)
    theirs = peer(resolve("builtin:tiny-llama"), tmp_path, {"per_device_train_batch_size": each, "bf16": False, "gradient_checkpointing": False})
    start = peer_weights(theirs)
    assert set(start) == set(before) and all(torch.equal(start[k], before[k]) for k in before)
    theirs.train()
    told = [r for r in theirs.state.log_history if "loss" in r]
    assert len(logged) == len(told) == STEPS
    for mine, other in zip(logged, told, strict=True):
        assert mine["reward/loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert mine["reward/accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)
        assert mine["reward/grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["reward/learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-6)
    both = change(before, after), change(before, peer_weights(theirs))
    assert torch.cosine_similarity(*both, dim=0) > 0.999
    assert both[0].norm() == pytest.approx(both[1].norm().item(), rel=1e-3)
    losses = [r["reward/loss"] for r in logged]
    assert max(losses) - min(losses) > 0.1  # the tolerance of 1e-4 means something: the losses move
    margins = {r["margin"] for r in json.loads((tmp_path / "handover.json").read_text())["rows"]}
    assert len(margins) == (1 if margin == "none" else 4)
