"""A merged copy of a role to decode with: W + scaling * B A in a buffer of its own, never in the base that the other roles read.

At a few dozen rows a decoding step is bound by the number of small matrix products, so the copy has none for the adapter, and the
products that read the same input (query, key, value; gate, up) are one. Worth its memory where the base is not quantized.

In bfloat16 on a CPU its weights are packed: oneDNN wants them in another order than torch keeps them in and would reorder all of them at every
product, which at a few rows costs more than the product. (On a processor with AVX-512 the same bits came out.)
"""

import platform

import torch
from torch import Tensor, nn

from posttrain.adapted import TOGETHER

ROWS = 64  # of the products that a packed weight is laid out for; at 1 to 256 rows it makes no difference


class Product(nn.Module):
    """A linear layer without gradients whose weight is written once in a while: x (..., inputs) -> (..., outputs)."""

    def __init__(self, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias, self.packed = None, bias, False

    def write(self, weight: Tensor) -> "Product":
        """weight (outputs, inputs). It is copied, packed where that pays; into the memory of the one before where that is possible."""
        self.packed = packing_pays(weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        elif self.weight is None:
            self.weight = weight.detach().clone()
        else:
            self.weight.copy_(weight)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return nn.functional.linear(x, self.weight, self.bias)


def packing_pays(weight: Tensor) -> bool:
    """The operators are those that torch's own compiler puts in place of linear layers, on x86 processors."""
    return (weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and platform.machine().lower() in ("x86_64", "amd64")
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _First(Product):
    """Computes the products of the whole group and keeps the others' parts for them."""

    def __init__(self, bias: Tensor | None, sizes: list[int]):
        super().__init__(bias)
        self.sizes, self.parts = sizes, []

    def forward(self, x: Tensor) -> Tensor:
        first, *self.parts = super().forward(x).split(self.sizes, dim=-1)
        return first


class _Rest(nn.Module):
    """Hands out the part that `first` has computed from the same input. The model calls the members of a group in their order."""

    def __init__(self, first: _First):
        super().__init__()
        object.__setattr__(self, "first", first)  # not a submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.first.parts.pop(0)


def worth_it(role, quantization: str) -> bool:
    """Adapters on an unquantized base, and room for a second copy of the body."""
    if role.adapter is None or quantization != "none":
        return False
    if role.body.device.type != "cuda":
        return True
    size = sum(p.numel() * p.element_size() for p in role.body.parameters())
    return torch.cuda.mem_get_info()[0] > 2 * size


@torch.no_grad()
def merged_body(role, old: nn.Module | None = None) -> nn.Module:
    """The role's body with its adapter merged. old: an earlier merge of the same body, whose memory is written again."""
    weights = dict(_merged(role))
    if old is None:
        old = _skeleton(role.body, weights)
    for module, keys in old.merged_from:
        parts = [weights[k] for k in keys]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if isinstance(module, Product):
            module.write(whole)
        else:
            module.weight.data.copy_(whole)  # a table of embeddings
    return old


def _merged(role):
    """(name of the layer, merged weight) of every adapted layer of the body."""
    for name, module in role.body.named_modules():
        if hasattr(module, "role_pointer"):
            base = module.base_layer.weight
            if role.adapter in module.lora_A:
                a, b = module.lora_A[role.adapter].weight, module.lora_B[role.adapter].weight
                yield name, (base.float() + module.scaling[role.adapter] * (b @ a)).to(base.dtype)
            else:
                yield name, base
        if hasattr(module, "row_pointer") and role.adapter in module.token_rows:  # the role's own rows of added turn tokens
            slot, rows = module.row_slots[:, None], module.token_rows[role.adapter]["input"]
            yield name, torch.where(slot >= 0, rows[module.row_slots.clamp_min(0)].to(module.weight.dtype), module.weight)


def _skeleton(body: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A body of the same class whose unadapted tensors are the base's own, with fused groups for the adapted ones."""
    with torch.device("meta"):
        copy = type(body)(body.config)
    copy.eval().requires_grad_(False)
    own = {n.replace(".base_layer", ""): t for n, t in [*body.named_parameters(), *body.named_buffers()] if ".lora_" not in n}
    for name, module in copy.named_modules():
        for key in [*module._parameters, *module._buffers]:
            full = f"{name}.{key}" if name else key
            if name not in weights or key != "weight":
                table = module._parameters if key in module._parameters else module._buffers
                if table[key] is not None:
                    table[key] = own[full]
    copy.merged_from = []
    done = set()
    for name, module in list(copy.named_modules()):
        for group in TOGETHER:
            members = [f"{name}.{g}" for g in group]
            if all(m in weights for m in members):
                _fuse(copy, module, group, members, weights)
                done |= set(members)
    for name, weight in weights.items():
        if name not in done:
            layer, (parent, _, key) = copy.get_submodule(name), name.rpartition(".")
            if isinstance(layer, nn.Linear):
                layer = Product(layer.bias)
                setattr(copy.get_submodule(parent), key, layer)
            else:
                layer.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
            copy.merged_from.append((layer, [name]))
    return copy


def _fuse(copy, parent: nn.Module, group, members, weights) -> None:
    layers = [getattr(parent, g) for g in group]
    parts = [weights[m] for m in members]
    biases = [layer.bias for layer in layers]
    bias = torch.cat(biases) if all(b is not None for b in biases) else None
    if bias is None and any(b is not None for b in biases):
        return
    first = _First(bias, [len(p) for p in parts])
    setattr(parent, group[0], first)
    for g in group[1:]:
        setattr(parent, g, _Rest(first))
    copy.merged_from.append((first, members))
