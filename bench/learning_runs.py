"""What the learning experiments share: units of work that outlive a cut, the real reward stage in a work folder, scores of an adapter."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import DataEntry, ModelConfig, load_recipe
from posttrain.data import load_entry
from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.log import Ticker, duration, read_lines, say
from posttrain.runs import Run, preflight, provenance, read_json, run_sections, write_atomic, write_json, write_lines

BUDGET = 2048  # tokens of a forward pass, in training and scoring


@dataclass
class Unit:
    """One training with its scoring: a JSON file when finished. settings: everything that can change the result."""

    name: str
    settings: dict
    train_tokens: int
    score_tokens: int
    work: Callable[[], dict]

    @property
    def cost(self) -> int:
        """In tokens of a forward pass; a training pass counts as three."""
        return 3 * self.train_tokens + self.score_tokens


def finished(folder: Path, unit: Unit) -> dict | None:
    """The stored unit; None where there is none, or one of other settings."""
    kept = read_json(folder / f"{unit.name}.json")
    return kept if kept.get("settings") == unit.settings else None


def announce(folder: Path, units: list[Unit]) -> None:
    say("tokens through the model (a training token costs about three scored ones):")
    for u in units:
        done = ", done already" if finished(folder, u) else ""
        say(f"  {u.name}: {u.train_tokens:,} to train on, {u.score_tokens:,} to score{done}")


def run_units(folder: Path, units: list[Unit], later: int = 0) -> dict[str, dict]:
    """Do what is not done yet, in order; every finished unit is on disk at once. later: the cost of what comes after, for the ETA."""
    folder.mkdir(parents=True, exist_ok=True)
    spent = worked = 0
    for i, unit in enumerate(units, 1):
        if finished(folder, unit):
            say(f"({i}/{len(units)}) {unit.name}: done already, skipped", style="dim")
            continue
        say(f"({i}/{len(units)}) {unit.name}", style="bold")
        began = time.time()
        result = unit.work()
        gc.collect()
        seconds = time.time() - began
        write_json(folder / f"{unit.name}.json", {"settings": unit.settings, "result": result, "seconds": round(seconds, 1), **provenance()})
        spent, worked = spent + seconds, worked + unit.cost
        left = later + sum(u.cost for u in units[i:] if not finished(folder, u))
        say(f"  {unit.name} took {duration(seconds)}; about {duration(left * spent / worked)} left for the rest")
    return {u.name: finished(folder, u)["result"] for u in units}


def load_items(path: Path, form: str, source: str = "") -> list:
    """The usable rows of a file, in order."""
    return load_entry(DataEntry(path=str(path.absolute()), format=form), Path(), 0, source or path.name).items


def real_data(given: Path | None) -> Path:
    """The folder with the real data sets: --data, or POSTTRAIN_REAL_DATA."""
    import os

    folder = given or os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        raise PosttrainError("POSTTRAIN_REAL_DATA", "names no folder" if folder else "not set", "the folder with the real data sets",
                             "Set it, or give --data FOLDER.")
    return Path(folder)


def as_row(pair: Pair) -> dict:
    """A pair in the native form, prompt, answers and labels alone."""
    row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "rating": pair.rating, "margin": pair.margin,
           "chosen_safe": pair.chosen_safe, "rejected_safe": pair.rejected_safe}
    return {k: v for k, v in row.items() if v is not None}


def train_with_stage(work: Path, model: ModelConfig, data: dict[str, list[Pair]], stage: dict, seed: int, threads: int | None) -> dict:
    """One model through the real `reward` stage, as its recipe would: a cut run goes on from its last checkpoint.

    Returns {'model': its folder, 'losses': the loss of every step}. In this process: a program that is killed leaves none behind.
    """
    work.mkdir(parents=True, exist_ok=True)
    for name, pairs in data.items():
        write_lines(work / f"{name}.jsonl", map(as_row, pairs))
    recipe = {"run": {"name": "run", "seed": seed, "dir": str(work.absolute()), "threads": threads}, "model": model.model_dump(),
              "data": {name: [{"path": f"{name}.jsonl", "format": "preference"}] for name in data}, "stages": {"reward": stage}}
    write_atomic(work / "recipe.yaml", json.dumps(recipe, indent=1))  # JSON is YAML
    run = Run(load_recipe(work / "recipe.yaml"))
    preflight(run)
    run_sections(run)
    folder = run.section("reward").folder
    losses = [round(r["reward/loss"], 5) for r in read_lines(folder / "metrics.jsonl") if "reward/loss" in r]
    return {"model": folder / "model", "losses": losses}


def score_adapter(folder: Path, model: ModelConfig, trees: list, threads: int | None) -> list[list[float]]:
    """Raw [chosen, rejected] of every tree under a saved reward adapter, whoever trained it."""
    import torch

    from posttrain.models import Roles, set_threads
    from reward.score import scores

    set_threads(threads)
    roles = Roles(model, getattr(torch, model.dtype), "bench")
    roles.add("reward", folder, head="saved").net.eval()
    out: list = [None] * len(trees)
    order = sorted(range(len(trees)), key=lambda i: (-len(trees[i]), i))
    with Ticker(len(trees), "scoring", "pair") as ticker:
        for start in range(0, len(order), 32):
            chunk = order[start:start + 32]
            for i, raw in zip(chunk, scores(roles, "reward", [trees[i] for i in chunk], BUDGET), strict=True):
                out[i] = [round(x, 6) for x in raw]
            ticker.advance(len(chunk))
    return out


def percent(value: dict | float | None, gap: bool = False) -> str:
    """'62.5 % [60.1, 64.9]' of an interval, '62.5 %' of a number; '+2.5 points [...]' of a difference (gap)."""
    if isinstance(value, dict):
        inner = f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]" if value["low"] is not None else ""
        return percent(value["mean"], gap) + inner
    return "-" if value is None else f"{100 * value:+.1f} points" if gap else f"{100 * value:.1f} %"


def table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body]])


def publish(out: Path, result: dict, text: str) -> None:
    """Write results.json and results.md; say how each check of result["checks"] went."""
    write_json(out / "results.json", {**result, **provenance()})
    write_atomic(out / "results.md", text)
    for what, ok in result["checks"].items():
        say(f"{'passed' if ok else 'FAILED'}: {what}", style=None if ok else "bold red")
    say(f"Report: {out / 'results.md'}")
