"""Several processes in step, of which one process is the special case: who I am, and the few exchanges the rest needs.

`accelerate launch` and `torchrun` set RANK, WORLD_SIZE and LOCAL_RANK; accelerate's PartialState joins the processes (NCCL on GPUs,
gloo on CPUs). Models stay unwrapped, without DistributedDataParallel: losses are divided by counts over all processes, so the
gradient of a step is the plain sum of the processes' gradients, which `add_gradients` takes in flat buffers just before the clip. Every process then
makes the same step from the same numbers, and `agree` checks it. All processes read one run folder; the main one alone writes.
Work in chunks on disk is shared otherwise: `turns` hands whole chunks to whoever is free, and each is made `alone`.
Where models are cut over the processes (posttrain/sharding.py), the backward pass sums their gradients, and `add_gradients` the rest; under DeepSpeed
(posttrain/zero.py) its engine sums them all.
Light: imports torch and accelerate only where there is more than one process.
"""

import atexit
import os
import secrets
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec

from posttrain.errors import PosttrainError

FLAT = 1 << 26  # numbers in a buffer of gradients
PATIENCE = timedelta(hours=2)  # what one process waits for another
_alone = False
_launcher_shards = False  # accelerate was told to use FSDP2; `join` keeps it from accelerate's own wrapping
_launcher_zero = 0  # or DeepSpeed's ZeRO of this stage


def _from_launcher(key: str, default: int) -> int:
    return int(os.environ.get(key, default)) if "LOCAL_RANK" in os.environ else default


def rank() -> int:
    return 0 if _alone else _from_launcher("RANK", 0)


def world() -> int:
    """The number of processes."""
    return 1 if _alone else _from_launcher("WORLD_SIZE", 1)


def on_this_machine() -> int:
    """The number of processes that share this machine's cores and memory, also while one works alone."""
    return _from_launcher("LOCAL_WORLD_SIZE", _from_launcher("WORLD_SIZE", 1))


@contextmanager
def alone():
    """What happens inside is this process's own work, done and written as if it were the only one: nothing is shared, exchanged or awaited."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def is_main() -> bool:
    return rank() == 0


def leads() -> bool:
    """Whether this is the launcher's first process, also while it works alone: what all share on disk, it alone writes."""
    return number() == 0


def number() -> int:
    """Which of all processes this is, also while it works alone."""
    return _from_launcher("RANK", 0)


def check_launcher() -> None:
    """Raises PosttrainError where a launcher was asked for what does not happen: several processes of which one came, or another engine's cut models."""
    asked = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") for name in ("CPU", "FSDP", "DEEPSPEED")}
    if asked["DEEPSPEED"]:
        _check_deepspeed()
    if asked["FSDP"] and (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise PosttrainError("accelerate launch", f"FSDP is asked for in version {version}", "version 2 (fsdp_version: 2)",
                             "Use recipes/accelerate/fsdp2.yaml (docs/scaling.md).")
    if asked["CPU"] and "MASTER_ADDR" in os.environ and "LOCAL_RANK" not in os.environ:
        raise PosttrainError("accelerate launch --cpu", "several processes are asked for, and it has started one", "as many as are asked for",
                             "Use torchrun: `torchrun --nproc-per-node 2 -m posttrain run RECIPE`.")


def _check_deepspeed() -> None:
    """Raises PosttrainError where DeepSpeed is asked for what posttrain/zero.py does not do, or is not there."""
    def asked(key: str, default: str) -> str:
        return os.environ.get(f"ACCELERATE_DEEPSPEED_{key}", default)

    found = {"zero_stage": asked("ZERO_STAGE", "2"), "deepspeed_config_file": asked("CONFIG_FILE", "none"),
             "offload_optimizer_device": asked("OFFLOAD_OPTIMIZER_DEVICE", "none"), "offload_param_device": asked("OFFLOAD_PARAM_DEVICE", "none")}
    odd = [f"{k}: {v}" for k, v in found.items() if v not in (("2", "3") if k == "zero_stage" else ("none",))]
    if odd:
        raise PosttrainError("accelerate launch", f"DeepSpeed is asked for with {', '.join(odd)}", "zero_stage 2 or 3, no file, nothing offloaded",
                             "Use recipes/accelerate/deepspeed_zero2.yaml or deepspeed_zero3.yaml (docs/scaling.md).")
    if find_spec("deepspeed") is None:
        raise PosttrainError("accelerate launch", "DeepSpeed is asked for, and it is not installed", "the package deepspeed",
                             "Install it: `pip install -e '.[deepspeed]'`, or use recipes/accelerate/fsdp2.yaml, which needs no package.")


def zero() -> int:
    """The ZeRO stage that the launcher asks for, else 0."""
    return _launcher_zero


def shards(model) -> bool:
    """Whether models are to be cut over the processes: the recipe (model: its ModelConfig) or the launcher says so."""
    return model.sharding == "full" or _launcher_shards or _launcher_zero > 0


def check_sharding(model, kind: str, able: bool, place: str, processes: int | None = None) -> None:
    """Raises PosttrainError where a section of this kind, able to cut its models or not, cannot do what `shards` asks for. Before anything loads.
    processes: how many there will be; None: those that are."""
    if not shards(model):
        return
    asked = f"ZeRO stage {_launcher_zero}" if _launcher_zero else "'full'"
    where = f"{place}: {'accelerate launch' if _launcher_zero else 'model.sharding'}"
    if not able and _launcher_zero:
        why = "takes one model, and PPO trains two (policy, critic) beside frozen ones" if kind == "ppo" else f"trains, and a section of kind {kind} does not"
        raise PosttrainError(where, f"DeepSpeed is asked for; it {why}", "sft or reward", "Run this section with every model whole in each process: "
                             "recipes/accelerate/ddp.yaml or torchrun, with adapters (model.lora) where whole models do not fit.")
    if able and _launcher_zero and model.sharding == "full":
        raise PosttrainError(where, "DeepSpeed is asked for, and model.sharding: full, which is FSDP2", "one of the two",
                             "Set model.sharding: none, or start it with torchrun.")
    if not able and (kind == "ppo" or _launcher_shards):
        raise PosttrainError(where, f"models cut over processes are asked for, and a section of kind {kind} holds them whole", "sft or reward",
                             "Run this section without them: model.sharding=none, and recipes/accelerate/ddp.yaml or torchrun.")
    if able and model.quantization != "none":
        raise PosttrainError(where, f"{asked} with quantization: {model.quantization}", "an unquantized base to cut",
                             "Set model.quantization: none, or model.sharding: none with ddp.yaml or torchrun: each process holds the whole quantized base.")
    if able and (processes or world()) == 1:
        raise PosttrainError(where, f"{asked} in one process", "several processes to cut the model over",
                             "Start it with `torchrun --nproc-per-node N -m posttrain run RECIPE`, or set model.sharding: none.")


def join() -> None:
    """Meet the other processes; each takes its own GPU. Nothing in one process."""
    global _launcher_shards, _launcher_zero
    check_launcher()
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        _launcher_zero = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):  # else accelerate and transformers would wrap the models their way
        _launcher_shards = True
    if world() > 1:
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        atexit.register(state.destroy_process_group)  # gloo's threads must end before the process, or it is aborted at its end


@contextmanager
def _exchange():
    """Where another process has ended, the libraries say so each in its own way, and its own message is easily lost among theirs."""
    try:
        yield
    except RuntimeError as e:  # gloo's; those of torch.distributed are its subclasses
        raise PosttrainError(f"process {rank()} of {world()}", f"no answer from the others ({str(e).split('. ')[0]})", "every process at work",
                             "One of them has ended: look for its message. The same command goes on from here.") from e


def wait() -> None:
    if world() > 1:
        from accelerate import PartialState

        with _exchange():
            PartialState().wait_for_everyone()


def from_main(make):
    """What make() gives on the main process, on all; the others don't call it. Whatever it wrote is there when this returns."""
    if world() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    made = [make() if is_main() else None]
    with _exchange():
        return broadcast_object_list(made)[0]


def gather(value) -> list:
    """Every process's value, in the order of ranks, on all. Any picklable value, of a different length on each if need be."""
    if world() == 1:
        return [value]
    from accelerate.utils import gather_object

    with _exchange():
        return gather_object([value])


def share(n: int) -> list[int]:
    """Which of n pieces of work are this process's."""
    return list(range(rank(), n, world()))


def share_by_length(chosen: list[int], things: list) -> list[int]:
    """Which of the chosen things' numbers are this process's, all processes' about equally long together: the longest first, each to the one with the
    least so far. One process keeps them in their order."""
    shares: list[list[int]] = [[] for _ in range(world())]
    if len(shares) == 1:
        return chosen
    load = [0] * len(shares)
    for i in sorted(chosen, key=lambda i: (-len(things[i]), i)):
        least = load.index(min(load))
        shares[least].append(i)
        load[least] += len(things[i])
    return shares[rank()]


def assemble(mine: list) -> list:
    """The results of everyone's `share`, in the order of the whole, on all."""
    parts = gather(mine)
    out = [None] * sum(map(len, parts))
    for r, part in enumerate(parts):
        out[r::len(parts)] = part
    return out


class Count:
    """A number that all processes add to and read while none waits for another. They make it together; shared: False, each has its own."""

    def __init__(self, shared: bool = True):
        self.total, self.store = 0, None
        if shared and world() > 1:
            from torch.distributed.distributed_c10d import _get_default_store  # the one that joined the processes; torch has no public name for it

            # a key of its own: where the launcher starts the processes again, the store still holds the earlier ones' counts
            self.store, self.key = _get_default_store(), from_main(lambda: f"posttrain/count/{secrets.token_hex(8)}")

    def add(self, n: int) -> int:
        """The total, of all processes so far, after n more."""
        with _exchange():
            self.total = self.store.add(self.key, n) if self.store else self.total + n
        return self.total


def turns(things: list):
    """Each thing to one process, the next one to whoever is free first. All processes call it with the same things."""
    taken = Count()
    while (i := taken.add(1) - 1) < len(things):
        yield things[i]


def add_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Sums over all processes, key by key; a key that a process lacks is 0 there."""
    parts = gather(numbers)
    return {key: sum(part.get(key, 0) for part in parts) for key in dict.fromkeys(key for part in parts for key in part)}


def add(*tensors) -> None:
    """Each tensor becomes its sum over all processes, in place."""
    if world() > 1:
        import torch

        with _exchange():
            for x in tensors:
                torch.distributed.all_reduce(x)


def _replicated(parameters: list) -> list:
    """Those that every process holds whole."""
    return [p for p in parameters if not hasattr(p, "full_tensor")]  # a DTensor's


def add_gradients(parameters: list) -> None:
    """Each parameter's gradient becomes the sum over all processes; one that has none anywhere keeps none. Those of parameters that are cut over the
    processes are sums already."""
    parameters = _replicated(parameters)
    if world() == 1 or not parameters:
        return
    import torch

    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    add(used)
    group, size = [], 0
    for p in [p for p, on in zip(parameters, used.tolist(), strict=True) if on] + [None]:
        if group and (p is None or size + p.numel() > FLAT):
            flat = torch.cat([(torch.zeros_like(q) if q.grad is None else q.grad).flatten() for q in group])
            add(flat)
            for q, g in zip(group, flat.split([q.numel() for q in group]), strict=True):
                q.grad = g.view_as(q).to(q.dtype)
            group, size = [], 0
        if p is not None:
            group.append(p)
            size += p.numel()


def agree(parameters: list, place: str) -> None:
    """Every process holds the same bits of what is not cut over them; where they drifted apart, PPO would go on with several policies at once."""
    if world() == 1:
        return
    import hashlib

    import torch

    mine = hashlib.sha256()
    for p in _replicated(parameters):
        mine.update(p.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    if len(set(gather(mine.hexdigest()))) > 1:
        raise PosttrainError(place, "the processes hold different weights", "the same bits in all of them",
                             "Run the same command again: it goes on from the last checkpoint. If it comes back, use one process and report it.")
