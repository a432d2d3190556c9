"""What must survive a kill of PPO, and how it is written: checkpoint-N (weights, optimizers, state) and best-N (the policy to output).

Of several processes each holds the same weights and the same state; the main one writes, all read.
"""

import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from posttrain import distributed
from posttrain.models import Roles
from posttrain.runs import Section, read_json, write_json
from posttrain.training import newest_checkpoint, restore, seal


@dataclass
class State:
    """Everything that must survive besides weights and optimizers. All randomness is derived from (seed, iteration)."""

    iteration: int = 0
    warm: bool = False
    warmup_rounds: int = 0
    moments: tuple[float, float, float] = (0, 0.0, 0.0)
    best: float | None = None
    best_iteration: int = 0
    worse: int = 0
    start_rows: list = field(default_factory=list)
    best_rows: list = field(default_factory=list)


def save(section: Section, roles: Roles, policy_optimizer, critic_optimizer, state: State) -> None:
    """checkpoint-N: both adapters, the critic's head, both optimizers, the state; sealed with checksums, written last."""
    distributed.agree([*roles["policy"].parameters(), *roles["critic"].parameters()], section.place)
    if distributed.is_main():
        _write(section, roles, (("policy", policy_optimizer), ("critic", critic_optimizer)), state)
    distributed.wait()


def _write(section: Section, roles: Roles, optimizers, state: State) -> None:
    def write(work: Path) -> None:
        for name, optimizer in optimizers:
            roles.save(name, work / name)
            torch.save(optimizer.state_dict(), work / f"{name}_optimizer.pt")
            for file in (work / name).iterdir():
                file.rename(work / f"{name}.{file.name}")
            (work / name).rmdir()
        write_json(work / "state.json", asdict(state))
        seal(work)

    replace(section.folder / f"checkpoint-{state.iteration}", section.folder / "checkpoint.tmp", write)
    old = sorted(section.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[:-2]
    keep = {f"best-{read_json(p / 'state.json')['best_iteration']}" for p in section.folder.glob("checkpoint-*") if p not in old}
    for path in [*old, *(p for p in section.folder.glob("best-*") if p.name not in keep and p.name != f"best-{state.best_iteration}")]:
        shutil.rmtree(path)


def resume(section: Section, roles: Roles, policy_optimizer, critic_optimizer) -> State:
    """The state of the newest complete checkpoint, with weights and optimizers put back; a new one if there is none."""
    if (before := section.decide("processes", distributed.world)) != distributed.world():
        section.inexact(f"begun with {before} process(es), it goes on with {distributed.world()}")
    checkpoint = distributed.from_main(lambda: newest_checkpoint(section.folder, section.log.say))
    if checkpoint is None:
        section.log.rewind(-1)
        return State()
    for name, optimizer in (("policy", policy_optimizer), ("critic", critic_optimizer)):
        with _role_folder(checkpoint, name) as folder:
            restore(roles, roles[name], folder)
        optimizer.load_state_dict(torch.load(checkpoint / f"{name}_optimizer.pt", weights_only=True, map_location=roles.device))
    told = read_json(checkpoint / "state.json")
    state = State(**{**told, "moments": tuple(told["moments"])})
    section.log.rewind(state.iteration if state.iteration or state.start_rows else -1)
    section.log.say(f"going on after iteration {state.iteration} of {section.config.iterations}")
    return state


@contextmanager
def _role_folder(checkpoint: Path, name: str):
    """A checkpoint's files of one role, under the names `restore` reads."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as temp:
        for file in checkpoint.glob(f"{name}.*"):
            (Path(temp) / file.name.removeprefix(f"{name}.")).hardlink_to(file)
        yield Path(temp)


def keep(section: Section, roles: Roles, iteration: int) -> None:
    """best-N: the policy as it is."""
    if distributed.is_main():
        replace(section.folder / f"best-{iteration}", section.folder / "best.tmp", lambda work: roles.save("policy", work))


def output(section: Section, iteration: int) -> None:
    """model: a copy of best-N."""
    if distributed.is_main():
        replace(section.folder / "model", section.folder / "model.tmp", lambda work: shutil.copytree(section.folder / f"best-{iteration}", work))


def replace(folder: Path, work: Path, write) -> None:
    """A folder as write(work) makes it, there as a whole or not at all; an earlier one stays until the new one is complete."""
    shutil.rmtree(work, ignore_errors=True)
    write(work)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
