"""An adapter folded into its base: W' = W + scaling * B A, computed in float32, stored in the wanted dtype. Reads the adapter's tensors
itself; peft is not needed. The base is loaded in the dtype it is stored in: float32 holds bfloat16 and float16 exactly, so adding in
float32 one matrix at a time gives what a float32 base would, at half the memory or less.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from posttrain.config import ModelConfig
from posttrain.errors import PosttrainError
from posttrain.models import Roles, load_network

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"  # peft's name for single rows of an embedding; they replace the base's
ELSEWHERE = "Merge it with the program that made it, and export the merged folder."
UNUSUAL = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "alora_invocation_tokens")


def cast(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every parameter in one dtype, one at a time; tied ones stay tied."""
    for p in net.parameters():
        p.data = p.data.to(dtype)
    net.config.dtype = dtype
    return net


def unquantized(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"quantization": "none", "lora": None})


def whole(config: ModelConfig, folder: Path | None, dtype: torch.dtype, place: str) -> nn.Module:
    """The recipe's base (folder None), or a full model folder, unquantized."""
    if folder is not None:
        return cast(load_network(str(folder), unquantized(config), "auto", place), dtype)
    return cast(plain_base(config, place), dtype)


def plain_base(config: ModelConfig, place: str) -> nn.Module:
    """The recipe's base in the dtype it is stored in, with rows for added turn tokens and nothing else of ours."""
    net = Roles(unquantized(config), "auto", place).add("base").net
    table = net.get_input_embeddings()
    for owner, names in ((net, ("heads", "token_rows")), (table, ("forward", "row_pointer", "row_slots", "token_rows"))):
        for name in names:
            owner.__dict__.pop(name, None)
            owner._modules.pop(name, None)
    return net


def merged(config: ModelConfig, folder: Path, dtype: torch.dtype, place: str) -> nn.Module:
    """The recipe's base with the adapter in `folder` merged into it, as one plain model. Raises PosttrainError on an adapter of another
    kind or base, naming the first key that has no place."""
    spec = _spec(folder)
    loras, tables, rows = _sorted(load_file(folder / "adapter_model.safetensors"), folder)
    net = plain_base(config, place)
    scaling = spec["lora_alpha"] / spec["r"]
    with torch.no_grad():
        for name, (a, b) in loras.items():
            weight = _weight(net, name, folder, (b.shape[0], a.shape[1]))
            weight.data = (weight.data.float() + scaling * (b.float() @ a.float()).to(weight.device)).to(dtype)
        for name, table in tables.items():
            weight = _weight(net, name, folder, tuple(table.shape))
            weight.data = table.to(weight.device, dtype)
        for name, values in rows.items():
            weight = _weight(net, name, folder, None)
            weight.data = weight.data.to(dtype)
            weight.data[_indices(spec, name, len(values), folder)] = values.to(weight.device, dtype)
    return cast(net, dtype)


def _spec(folder: Path) -> dict:
    spec = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    odd = [k for k in UNUSUAL if spec.get(k) and (k, spec[k]) != ("modules_to_save", ["score"])]
    if spec.get("peft_type", "LORA") != "LORA" or spec.get("bias", "none") != "none" or odd:
        found = odd[0] if odd else f"peft_type {spec.get('peft_type')}, bias {spec.get('bias')}"
        raise PosttrainError(str(folder / "adapter_config.json"), f"not a plain LoRA adapter ({found})", "LoRA without extras", ELSEWHERE)
    return spec


def _sorted(tensors: dict[str, Tensor], folder: Path) -> tuple[dict, dict, dict]:
    """An adapter's tensors by module: {name: (A, B)}, {name: whole embedding table}, {name: single rows}. A scalar head is left out."""
    halves: dict[str, dict[str, Tensor]] = {}
    tables, rows = {}, {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if found := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            halves.setdefault(found[1], {})[found[2]] = value
        elif name.endswith(ROWS):
            rows[name.removesuffix(ROWS)] = value
        elif re.fullmatch(r"(.+\.)?(embed_tokens|lm_head)\.weight", name):
            tables[name.removesuffix(".weight")] = value
        elif name != "score.weight":
            raise PosttrainError(str(folder / "adapter_model.safetensors"), f"no place for its tensor '{key}'",
                                 "LoRA matrices, embedding rows, a scalar head", ELSEWHERE)
    half = next((n for n, h in halves.items() if set(h) != {"A", "B"}), None)
    if half:
        raise PosttrainError(str(folder / "adapter_model.safetensors"), f"'{half}' has one LoRA matrix of two", "lora_A and lora_B",
                             "Save the adapter again.")
    return {n: (h["A"], h["B"]) for n, h in halves.items()}, tables, rows


def _weight(net: nn.Module, name: str, folder: Path, shape: tuple | None) -> nn.Parameter:
    """The base's matrix of that name."""
    try:
        weight = net.get_submodule(name).weight
    except AttributeError:
        raise PosttrainError(str(folder), f"the base has no layer '{name}'", "an adapter of this base",
                             "Check model.name_or_path.") from None
    if shape is not None and tuple(weight.shape) != shape:
        raise PosttrainError(str(folder), f"'{name}' wants {shape}", f"{tuple(weight.shape)}, the base's",
                             "Check model.name_or_path and its revision.")
    return weight


def _indices(spec: dict, name: str, rows: int, folder: Path) -> list[int]:
    """Which rows of an embedding an adapter brings."""
    told = spec.get("trainable_token_indices") or []
    found = told.get(name.split(".")[-1], []) if isinstance(told, dict) else told
    if len(found) != rows:
        raise PosttrainError(str(folder / "adapter_config.json"), f"trainable_token_indices names {len(found)} rows of '{name}'",
                             f"{rows}, as many as there are", "Save the adapter again.")
    return found
