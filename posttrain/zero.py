"""DeepSpeed's ZeRO stages 2 and 3 for the one network that a section trains: the engine owns backward, clipping and step.

`accelerate launch` with recipes/accelerate/deepspeed_zero2.yaml or deepspeed_zero3.yaml asks for it; accelerate and transformers wrap nothing. Stage 2
cuts gradients and Adam's moments over the processes, stage 3 the weights too, gathered a layer at a time. Losses are divided by global counts already
(posttrain/distributed.py), and ZeRO averages over processes, so losses are multiplied by their number; a step's last micro-batch is named to the
engine, since their number changes from step to step. Moments are saved whole, as one process writes them: any number of processes goes on, with
ZeRO or without. Seen with deepspeed 0.19.8 on gloo; the names of its inside used are in `_slices` and `_start_moments`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from posttrain import distributed
from posttrain.errors import PosttrainError

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Run(nn.Module):
    """What the engine takes for the model: its forward is any computation with the network, also with the vocabulary head outside of it."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, compute: Callable):
        return compute()


class _Groups(torch.optim.Optimizer):
    """What transformers' trainer and its schedule take for the optimizer: all groups, also an empty one, which DeepSpeed drops; the engine steps."""

    def __init__(self, groups: list[dict]):
        super().__init__([nn.Parameter(torch.empty(0))], {})
        self.param_groups = groups

    def step(self, closure=None):
        return


def _beside(run: _Run) -> list[tuple[nn.Module, nn.Parameter]]:
    """(module, parameter that it reads though another owns it): ZeRO gathers what a module owns before its forward and backward pass."""
    net = run.net
    head = net.get_output_embeddings()
    out = [(run, p) for p in [*([head.weight] if head is not None else []), *(net.token_rows.parameters() if hasattr(net, "token_rows") else ())]]
    for module in net.modules():
        if hasattr(module, "lora_A"):  # it computes for its group (posttrain/adapted.py)
            out += [(module, p) for member in getattr(module, "group", [module]) for p in member.parameters()]
    return out


class Zero:
    """net: the whole network, the same on all processes, with its heads; optimizer: a torch AdamW over what it trains; max_norm: 0 clips nothing."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, stage: int, max_norm: float, device: torch.device, place: str):
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        self.net, self.optimizer, self.stage, self.inside = net, optimizer, stage, False
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]  # before the groups hold flat slices
        self.sizes = [len(group["params"]) for group in optimizer.param_groups]
        self.groups = _Groups(list(optimizer.param_groups))
        settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": max_norm,
                    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
                    "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_bucket_size": distributed.FLAT,
                                          **({"stage3_prefetch_bucket_size": distributed.FLAT} if stage == 3 else {"allgather_bucket_size": distributed.FLAT})}}
        run = _Run(net)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        if stage == 3:
            deepspeed.zero.Init(module=run, config_dict_or_path=settings)  # slices on the GPU before anything is moved there whole
            net.to(device)  # the buffers
            for module, p in _beside(run):
                deepspeed.zero.register_external_parameter(module, p)
        self.engine = deepspeed.initialize(model=run, optimizer=optimizer, config=settings)[0]
        self._check(place)
        self._start_moments()
        for module in (net, *net.heads.values()):
            module.zero = self  # for posttrain/sharding.py

    def _check(self, place: str) -> None:
        """Raises PosttrainError where it is asked for and not active."""
        whole = [n for n, p in self.net.named_parameters() if not hasattr(p, "ds_id")] if self.stage == 3 else []
        cut = sum(p.numel() for p in self._slices())
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters)
        if self.engine.zero_optimization_stage() != self.stage or whole or (distributed.world() > 1 and cut >= trained):
            found = f"{len(whole)} parameters are whole ({whole[0]} ...)" if whole else f"this process steps {cut:,} of {trained:,} weights"
            raise PosttrainError(f"{place}: accelerate launch", f"ZeRO stage {self.stage} is asked for, and {found}", "a slice in each process",
                                 "Use recipes/accelerate/fsdp2.yaml, and report it.")

    def _slices(self) -> list[Tensor]:
        """The float32 weights that this process steps, flat."""
        inner = self.engine.optimizer
        return inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups

    def _start_moments(self) -> None:
        """Zeros, as Adam starts; DeepSpeed links a stage 2 parameter to its moments once, when the first group has some, and would miss the others."""
        for x in self._slices():
            self.optimizer.state[x] = {"step": torch.tensor(0.0), **{m: torch.zeros_like(x) for m in MOMENTS}}
        if self.stage == 2:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def gradients(self, compute: Callable[[], Tensor], last: bool) -> None:
        """Add the gradients of compute()'s loss, to be summed over the processes. last: it is the step's last. All processes call it equally often."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.inside = True
        try:
            loss = self.engine(compute)
        finally:
            self.inside = False
        self.engine.backward(loss * distributed.world())

    def step(self) -> float:
        """Clip and step; the norm of the whole gradient before the clip. Where it is not finite, DeepSpeed takes no step."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else float("nan")

    def computed(self, compute: Callable):
        """compute(), which runs the network or its heads; under stage 3 with every layer gathered in its turn. See sharding.computed."""
        if self.inside or self.stage == 2:
            return compute()
        grad = torch.is_grad_enabled()
        self.inside = True
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                return self.engine.module(compute)
        finally:
            self.inside = False

    def optimizer_state(self) -> dict:
        """The optimizer's state_dict as one process would write it; on the main process alone it is complete. All call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step, state = self.optimizer.state[self._slices()[0]]["step"], {}
        for i, p in enumerate(self.parameters):
            whole = {m: safe_get_full_optimizer_state(p, m) for m in MOMENTS}
            state[i] = {"step": step.clone(), **{m: x.cpu() for m, x in whole.items()}} if distributed.is_main() else {}
        groups, at = [], 0
        for group, n in zip(self.groups.param_groups, self.sizes, strict=True):
            groups.append(group | {"params": list(range(at, at + n))})
            at += n
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, told: dict) -> None:
        """Load what `optimizer_state` or one process wrote; each process keeps its slice."""
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for i, p in enumerate(self.parameters):
            for m in MOMENTS if i in told["state"] else ():  # one process has none for what never had a gradient
                value = told["state"][i][m].to(self.optimizer.state[self._slices()[0]][m].device)
                if self.stage == 2:
                    safe_set_full_optimizer_state(p, value, m)
                else:
                    n = safe_get_local_optimizer_state(p, m).numel()
                    padded = nn.functional.pad(value.flatten(), (0, n * distributed.world() - value.numel()))
                    safe_set_local_optimizer_state(p, padded.split(n)[distributed.rank()], m)
        for x in self._slices():
            self.optimizer.state[x]["step"] = next(iter(told["state"].values()))["step"].clone()
        for group, saved in zip(self.groups.param_groups, told["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
