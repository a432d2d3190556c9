"""What a model's layers compute with here: linear layers with a role's adapter, and norms whose backward pass is written out.

They take the place of what peft and transformers put there, with the same results: autograd's own way through these formulas passes over
the activations two to three times as often.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that read the same input, in the order of their calls
_kept: dict = {}  # (id of a layer, role) -> the input that its group's first layer had, and this layer's output for it


# -- adapters -----------------------------------------------------------------------------------------------------------------


class _Adapted(torch.autograd.Function):
    """x W_i^T + scaling * (x A_i^T) B_i^T for layers i of one input: x (..., d); frozen W_i (n_i, d), A_i (r, d), B_i (n_i, r) ->
    (..., n_i) each. `tensors` are all W, then all A, then all B. The products with A are one, and so are those with it on the way back,
    where the layers' parts of x's gradient are added as they are made."""

    @staticmethod
    def forward(ctx, x, scaling, layers, *tensors):
        flat = x.flatten(0, -2)
        weights, a, b = tensors[:layers], _stacked(tensors[layers:2 * layers], x.dtype), [t.to(x.dtype) for t in tensors[2 * layers:]]
        low = flat @ a.t()
        out = tuple((flat @ w.t()).addmm_(part, up.t(), alpha=scaling).view(*x.shape[:-1], -1)
                    for w, up, part in zip(weights, b, low.chunk(layers, 1), strict=True))
        ctx.save_for_backward(flat, low, a, *weights, *b)
        ctx.scaling, ctx.layers, ctx.shape = scaling, layers, x.shape
        return out

    @staticmethod
    def backward(ctx, *grads):
        flat, low, a, *rest = ctx.saved_tensors
        layers, grads = ctx.layers, [g.flatten(0, -2) for g in grads]
        weights, b = rest[:layers], rest[layers:]
        d_low = _beside([(g @ up).mul_(ctx.scaling) for g, up in zip(grads, b, strict=True)])
        d_x, d_a, d_b = None, [None] * layers, [None] * layers
        if ctx.needs_input_grad[0]:
            d_x = grads[0] @ weights[0]
            for g, w in zip(grads[1:], weights[1:], strict=True):
                d_x.addmm_(g, w)
            d_x = d_x.addmm_(d_low, a).view(ctx.shape)
        if ctx.needs_input_grad[3 + layers]:
            d_a = (d_low.t() @ flat).float().chunk(layers)
            d_b = [(g.t() @ part).float().mul_(ctx.scaling) for g, part in zip(grads, low.chunk(layers, 1), strict=True)]
        return d_x, None, None, *[None] * layers, *d_a, *d_b


def _stacked(parts, dtype: torch.dtype) -> Tensor:
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat(parts).to(dtype)


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def read_roles(net: nn.Module, pointer: list) -> None:
    """Make every layer of `net` that holds peft adapters compute with those of the role that `pointer` names (None: the base's own)."""
    for module in net.modules():
        if hasattr(module, "lora_A"):
            module.role_pointer = pointer
            module.forward = MethodType(_adapted_forward, module)
    for module in net.modules():
        for names in TOGETHER:
            group = [getattr(module, n, None) for n in names]
            if all(hasattr(m, "lora_A") for m in group):
                for member in group:
                    object.__setattr__(member, "group", group)  # references, not submodules


def _adapted_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
    """base(x) + scaling * B(A(x)) for the role named by the pointer. Adapters are float32 and compute in x's dtype. The first of a
    group that is called computes for all; the others take what was kept for the same input."""
    layer, role = self.base_layer, self.role_pointer[0]
    if role is None or role not in self.lora_A:
        return layer(x, *args, **kwargs)
    if not _plain(self, role):
        low = F.linear(self.lora_dropout[role](x), self.lora_A[role].weight.to(x.dtype)) * self.scaling[role]
        result = layer(x, *args, **kwargs)
        return result + F.linear(low, self.lora_B[role].weight.to(x.dtype)).to(result.dtype)
    source, made = _kept.pop((id(self), role), (None, None))
    if source is x:
        return made
    group = getattr(self, "group", [self])
    if not all(role in m.lora_A and _plain(m, role) and m.scaling[role] == self.scaling[role] for m in group):
        group = [self]
    outs = _Adapted.apply(x, self.scaling[role], len(group), *(m.base_layer.weight for m in group), *(m.lora_A[role].weight for m in group),
                          *(m.lora_B[role].weight for m in group))
    for member, out in zip(group, outs, strict=True):
        if member is self:
            result = out
        else:
            _kept[id(member), role] = (x, out)
    return result


def forget() -> None:
    """After a pass that broke off: what it computed ahead would hold its whole graph in memory."""
    _kept.clear()


def _plain(layer, role: str) -> bool:
    drop = layer.lora_dropout[role]
    return type(layer.base_layer) is nn.Linear and layer.base_layer.bias is None and not (drop.training and getattr(drop, "p", 0))


# -- norms --------------------------------------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """Root-mean-square norm as Llama's: w * (x / sqrt(mean(x^2) + eps)) with float32 inside; x (..., d), w (d)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
        d_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        d_normed, wide = (grad * weight).float(), normed.float()
        along = torch.linalg.vecdot(d_normed, wide).unsqueeze(-1)
        return d_normed.addcmul_(wide, along, value=-1 / wide.shape[-1]).mul_(scale).to(normed.dtype), d_weight, None


def write_out_norms(net: nn.Module) -> None:
    """Give the norms of `net` whose formula is Llama's, bit for bit on a sample, the function above."""
    for module in net.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and getattr(module, "weight", None) is not None:
            sample = torch.linspace(-3, 3, 2 * len(module.weight), dtype=module.weight.dtype, device=module.weight.device).view(2, -1)
            with torch.no_grad():
                if torch.equal(module(sample), _Norm.apply(sample, module.weight, module.variance_epsilon)):
                    module.forward = MethodType(_norm_forward, module)


def _norm_forward(self, x: Tensor) -> Tensor:
    return _Norm.apply(x, self.weight, self.variance_epsilon)
