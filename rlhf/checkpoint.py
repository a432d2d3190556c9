"""What must survive a kill of PPO, and how it is written: checkpoint-N (weights, optimizers, state) and best-N (the policy to output).

Of several processes each holds the same weights and the same state; the main one writes, all read.
"""

import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from posttrain import distributed, stopping
from posttrain.errors import PosttrainError
from posttrain.models import Roles
from posttrain.runs import Section, read_json, write_json
from posttrain.training import CHECKSUMS, checkpoints, complete, drop_old, newest_checkpoint, restore, seal, sealed

KEPT = 2  # checkpoints: where the newest is damaged there is one before it


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
        complete(work)

    replace(section.folder / f"checkpoint-{state.iteration}", section.folder / "checkpoint.tmp", write)
    drop_old(section.folder, KEPT)
    keep = {f"best-{read_json(p / 'state.json')['best_iteration']}" for p in checkpoints(section.folder)}
    for path in section.folder.glob("best-*"):
        if path.name not in {*keep, f"best-{state.best_iteration}"}:
            shutil.rmtree(path)


@contextmanager
def saved_when_stopped(section: Section, roles: Roles, policy_optimizer, critic_optimizer, state: State):
    """A signal inside waits for `stopping.check`; what was learnt by then becomes a checkpoint."""
    try:
        with stopping.deferred():
            yield
    except stopping.Stopped:
        save(section, roles, policy_optimizer, critic_optimizer, state)
        raise


def resume(section: Section, roles: Roles, policy_optimizer, critic_optimizer) -> State:
    """The state of the newest complete checkpoint, with weights and optimizers put back; a new one if there is none."""
    section.same_processes()
    checkpoint = distributed.from_main(lambda: _newest(section))
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


def _newest(section: Section) -> Path | None:
    """The newest complete checkpoint. Raises PosttrainError where the best policy it speaks of is damaged."""
    path = newest_checkpoint(section.folder, section.log.say)
    told = read_json(path / "state.json") if path else {}
    best = section.folder / f"best-{told.get('best_iteration')}"
    if told.get("best") is not None and not _sound(best):
        raise PosttrainError(str(best), "missing or damaged", f"the best policy so far, that of iteration {told['best_iteration']}",
                             f"Put a copy of it back; or delete {path} to go on from the checkpoint before; or delete the section's folder: it is made again.")
    return path


def _sound(best: Path) -> bool:
    """Without checksums it is an earlier version's."""
    return best.is_dir() and (sealed(best) or not (best / CHECKSUMS).exists())


@contextmanager
def _role_folder(checkpoint: Path, name: str):
    """A checkpoint's files of one role, under the names `restore` reads."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, suffix=".tmp") as temp:
        for file in checkpoint.glob(f"{name}.*"):
            (Path(temp) / file.name.removeprefix(f"{name}.")).hardlink_to(file)
        yield Path(temp)


def keep(section: Section, roles: Roles, iteration: int) -> None:
    """best-N: the policy as it is."""
    def write(work: Path) -> None:
        roles.save("policy", work)
        seal(work)

    if distributed.is_main():
        replace(section.folder / f"best-{iteration}", section.folder / "best.tmp", write)


def output(section: Section, iteration: int) -> None:
    """model: a copy of best-N."""
    def write(work: Path) -> None:
        shutil.copytree(section.folder / f"best-{iteration}", work, ignore=shutil.ignore_patterns(CHECKSUMS))

    if distributed.is_main():
        replace(section.folder / "model", section.folder / "model.tmp", write)


def replace(folder: Path, work: Path, write) -> None:
    """A folder as write(work) makes it, there as a whole or not at all; an earlier one stays until the new one is complete."""
    shutil.rmtree(work, ignore_errors=True)
    write(work)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
