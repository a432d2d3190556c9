"""Networks cut over the processes with PyTorch's FSDP2: each holds a slice of every matrix, and a layer is whole only while it computes.

`fully_shard` is called here directly, once for every decoder layer, once for a scalar head, once for the network, whose own group is what is left:
embeddings, last norm, vocabulary head. That group is gathered by `computed` and stays whole until the backward pass is over or `rest`, so that the
vocabulary head can be multiplied by outside the network. Gradients are summed, not averaged: losses are divided by global counts already
(posttrain/distributed.py). Adapters are put in after the cut and stay replicated. What is saved is whole, so one process can read it.
"""

from functools import cache

import torch
from torch import Tensor, nn

from posttrain import distributed
from posttrain.errors import PosttrainError


@cache
def _mesh(device: str):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (distributed.world(),))


def shard(net: nn.Module, head: nn.Module | None, device: torch.device) -> None:
    """Cut a loaded network over all processes, a layer at a time; the slices go to `device`. head: a role's own trained scalar head."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in net.modules() if isinstance(m, GradientCheckpointingLayer)]  # the decoder layers of transformers' models
    if not layers:
        raise PosttrainError("model.sharding", f"no decoder layer to cut at in {type(net).__name__}", "a decoder as transformers writes it",
                             "Set model.sharding: none, or choose another base.")
    parts = [*layers, *([head] if head is not None else [])]
    for part in parts:
        fully_shard(part, mesh=_mesh(device.type))
    fully_shard(net, mesh=_mesh(device.type), reshard_after_forward=False)
    for part in (*parts, net):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    net.computing = lambda compute: compute()
    register_fsdp_forward_method(net, "computing")


def check(net: nn.Module, place: str) -> None:
    """Raises PosttrainError where a base that is asked to be cut holds a whole parameter."""
    replicated = ("lora_", "heads.", "token_rows.")
    plain = [n for n, p in net.named_parameters() if not is_cut(p) and not any(r in n for r in replicated)]
    if plain:
        raise PosttrainError(f"{place}: model.sharding", f"{len(plain)} parameters are not cut over the processes ({plain[0]} ...)",
                             "a slice of every matrix in each process", "Set model.sharding: none, and report it.")


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "reshard")  # of fully_shard's FSDPModule, whose import would cost every other run a second


def is_cut(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")  # a DTensor


def computed(module: nn.Module, compute):
    """compute(), which runs the body of a network or its head; of one that is cut, with its own group gathered.

    Gathering in inference mode would leave buffers from which no backward pass can start, so that mode is off inside; gradients stay off."""
    if hasattr(module, "zero"):
        return module.zero.computed(compute)
    if not is_sharded(module):
        return compute()
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        return module.computing(compute) if hasattr(module, "computing") else compute()


def multiplied(net: nn.Module, compute):
    """compute(), which multiplies by the vocabulary head outside the network, after `computed`: FSDP2 has it gathered still, ZeRO gathers it again."""
    return net.zero.computed(compute) if hasattr(net, "zero") else compute()


def rest(net: nn.Module) -> None:
    """Give back what is gathered: every parameter is its slice again."""
    if is_sharded(net):
        for module in net.modules():
            if is_sharded(module):
                module.reshard()


def whole(x: Tensor) -> Tensor:
    """A parameter or gradient as if it were not cut. All processes call it."""
    if hasattr(x, "ds_id"):  # ZeRO stage 3
        from deepspeed import zero

        with zero.GatheredParameters([x]):
            return x.detach().clone()
    return x.full_tensor() if is_cut(x) else x


def shape(x: Tensor) -> torch.Size:
    """Of the whole, also where ZeRO stage 3 has cut it."""
    return getattr(x, "ds_shape", x.shape)


def here(x: Tensor) -> Tensor:
    """The part of it that this process holds."""
    return x.to_local() if is_cut(x) else x


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, cut as `like` is. Nothing is exchanged."""
    if not is_cut(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def fill(parameter: Tensor, value: Tensor) -> None:
    """Put a whole tensor's values into a parameter, cut or not. All processes call it."""
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter], modifier_rank=0):
            if distributed.is_main():
                parameter.data.copy_(value)
        return
    here(parameter.data).copy_(here(part_of(value, parameter.data)))


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    """A network's state on the CPU of the main process, empty on the others; a tensor with two names is one tensor. All processes call it."""
    rest(net)
    done: dict[int, Tensor] = {}
    out = {}
    for key, value in net.state_dict(keep_vars=True).items():
        if id(value) not in done:
            gathered = whole(value).detach()
            done[id(value)] = gathered.cpu().contiguous() if distributed.is_main() else torch.empty(0)
        out[key] = done[id(value)]
    return out if distributed.is_main() else {}


def whole_optimizer(optimizer) -> dict:
    """An optimizer's state_dict as one process would write it; on the main process alone it is complete. All call it."""
    def gathered(value):
        if not (torch.is_tensor(value) and is_cut(value)):
            return value
        value = value.full_tensor()
        return value.cpu() if distributed.is_main() else None

    told = optimizer.state_dict()
    return told | {"state": {i: {k: gathered(v) for k, v in moments.items()} for i, moments in told["state"].items()}}


def fill_optimizer(optimizer, told: dict) -> None:
    """Load what `whole_optimizer` or one process wrote; each process keeps its slice."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in told["state"].items():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameters[i].shape:
                moments[key] = part_of(value, parameters[i].data)
    optimizer.load_state_dict(told)
