"""One base, many roles: policy, reference, critic, helpfulness and safety as adapters and scalar heads on ONE model in memory.

With full fine-tuning every role is a model of its own; the rest of the program can't tell. The only importer of peft and
bitsandbytes. A role switch writes one name into a list that every adapted layer reads: it costs nothing and never touches
requires_grad, which is set once, at load (peft's set_adapter does touch it, and silently loses gradients between a forward and
its backward).
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain import adapted, attention, builtin, chat, decoder, distributed, sharding
from posttrain.config import LoraSettings, ModelConfig
from posttrain.doctor import bf16_flags
from posttrain.errors import PosttrainError
from posttrain.packing import MicroBatch
from posttrain.stages import STAGES
from posttrain.tensors import token_logprobs

SHAPES = Path(__file__).parent / "shapes"
ROWS = "token_adapter.trainable_tokens_delta"  # peft's name for the trained rows of single tokens


def choose_dtype(config: ModelConfig, full: bool = False) -> str:
    """'float32' or 'bfloat16': the fastest correct one. Weights under full fine-tuning stay float32 (bf16 loses small updates)."""
    if config.dtype != "auto":
        return config.dtype
    if full and config.lora is None:
        return "float32"
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and bf16_flags() else "float32"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(wanted: int | None) -> int:
    """CPU threads: the recipe's, or every core this process may use, shared with its like. Returns the number set."""
    n = wanted or max(1, len(os.sched_getaffinity(0)) // distributed.on_this_machine())
    torch.set_num_threads(n)
    return n


def resolve(name_or_path: str, place: str = "model.name_or_path") -> str:
    """A built-in name -> its folder; a local folder or hub name stays. Refuses folders whose weights are not safetensors."""
    if builtin.is_builtin(name_or_path):
        return str(builtin.folder(name_or_path, place))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not list(path.glob("*.safetensors")):
            pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            found = f"holds {', '.join(pickled)} but no .safetensors" if pickled else "holds no weights"
            do = f"load it where you trust it: `python -c \"from transformers import AutoModelForCausalLM as M; " \
                 f"M.from_pretrained('{path}', use_safetensors=False).save_pretrained('OUT')\"`, and copy its tokenizer files."
            do = f"`python -m posttrain convert {path} OUT`." if "consolidated.00.pth" in pickled else do
            raise PosttrainError(f"{place}: {path}", found, "a folder with model.safetensors", f"Convert it: {do}")
        return str(path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise PosttrainError(f"{place}: {name_or_path}", "no such folder", "a model folder, a hub name or a built-in name", "Check the path.")
    return name_or_path


def load_tokenizer(config: ModelConfig, place: str):
    """The recipe's tokenizer with its chat template; its attribute `added_turn_tokens` lists tokens added to the vocabulary."""
    from transformers import AutoTokenizer

    name = resolve(config.name_or_path, f"{place}: model.name_or_path")
    tokenizer = _from_hub(lambda: AutoTokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=False), config, place)
    tokenizer.padding_side = "right"
    tokenizer.added_turn_tokens = chat.prepare(tokenizer, config.chat_template, f"{place}: model.chat_template", config.add_tokens)
    return tokenizer


def _from_hub(load, config: ModelConfig, place: str):
    try:
        return load()
    except PosttrainError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as e:
        text = str(e)
        if isinstance(e, RuntimeError) and "mismatched" not in text:
            raise
        if isinstance(e, (SafetensorError, RuntimeError)):
            raise PosttrainError(f"{place}: model.name_or_path", f"the weights of '{config.name_or_path}' are damaged or do not fit its config.json "
                                 f"({text.splitlines()[0][:100]})", "a complete model", "Copy or download it again.") from None
        if "trust_remote_code" in text:
            raise PosttrainError(f"{place}: model.name_or_path", f"'{config.name_or_path}' wants to run code from its repository",
                                 "a model whose code is part of transformers", "Remote code stays off; choose another model.") from None
        if "gated" in text.lower() or "401" in text:
            raise PosttrainError(f"{place}: model.name_or_path", f"'{config.name_or_path}' is gated", "accepted licence and a login",
                                 f"Accept the licence on https://huggingface.co/{config.name_or_path}, then `hf auth login`.") from None
        raise PosttrainError(f"{place}: model.name_or_path", f"'{config.name_or_path}' cannot be loaded ({text.splitlines()[0][:200]})",
                             "a local folder, a built-in name or a reachable hub name", "Check the name, the revision and the network.") from None


def load_network(name: str, config: ModelConfig, dtype: torch.dtype, place: str, classification: bool = False, sharded: bool = False) -> nn.Module:
    """A causal language model (or a sequence classifier with one label) in eval mode, frozen. safetensors only, no remote code. sharded: it stays on
    the CPU, from where its slices are taken."""
    import transformers

    cls = transformers.AutoModelForSequenceClassification if classification else transformers.AutoModelForCausalLM
    extra = {"num_labels": 1} if classification else {}
    if config.quantization != "none":
        extra["quantization_config"] = _quantization(config.quantization, dtype)
        extra["device_map"] = {"": str(device())}
    local = Path(name).is_dir()
    net = _from_hub(lambda: cls.from_pretrained(
        name, revision=None if local else config.revision, dtype=dtype, trust_remote_code=False, use_safetensors=True,
        attn_implementation=attention.register() if device().type == "cpu" else "sdpa", **extra), config, place)
    if config.quantization == "none" and not sharded:
        net.to(device())
    for module in net.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # else the first eval forward repacks the weights and training loses gradients
    adapted.write_out_norms(net)
    net.config.use_cache = False
    net.requires_grad_(False)
    net.eval()
    _check_head(net, name, place)
    return net


def _quantization(kind: str, dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True)


def _check_head(net: nn.Module, name: str, place: str) -> None:
    """Our log-probabilities multiply by the vocabulary head directly, so it must be a plain matrix."""
    head = net.get_output_embeddings() if hasattr(net, "lm_head") else None
    soft = getattr(net.config, "final_logit_softcapping", None)
    scale = getattr(net.config, "logits_scaling", getattr(net.config, "logit_scale", 1.0)) or 1.0
    if head is not None and (getattr(head, "bias", None) is not None or soft or scale != 1.0):
        raise PosttrainError(f"{place}: model.name_or_path", f"'{name}' changes its logits after the vocabulary matrix (bias, soft cap or scale)",
                             "a plain vocabulary head, as in Llama, Mistral, Qwen and SmolLM models", "Choose another base model.")


def meta_model(config: ModelConfig, place: str) -> nn.Module:
    """The model on the meta device (no memory, no download), from a built-in or local config.json or a shipped published shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES / (config.name_or_path.replace("/", "--") + ".json")
    if builtin.is_builtin(config.name_or_path) or Path(config.name_or_path).is_dir():
        source = resolve(config.name_or_path, f"{place}: model.name_or_path")
    else:
        source = str(shape) if shape.exists() else config.name_or_path
    model_config = _from_hub(lambda: AutoConfig.from_pretrained(source, trust_remote_code=False), config, place)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def _embedded(self, ids: Tensor) -> Tensor:
    """The embedding of ids, with the added turn tokens' rows taken from the role named by the pointer."""
    result, role = type(self).forward(self, ids), self.row_pointer[0]
    if role is None or role not in self.token_rows:
        return result
    slot, rows = self.row_slots[ids], self.token_rows[role]["input"] * getattr(self, "embed_scale", 1.0)
    return torch.where((slot >= 0)[..., None], rows[slot.clamp_min(0)].to(result.dtype), result)


@dataclass
class Role:
    """net: the model it runs on (shared between adapter roles); adapter: its name in the layers or None; head: scalar or None."""

    name: str
    net: nn.Module
    adapter: str | None
    head: nn.Linear | None
    trainable: bool
    lora: LoraSettings | None = None

    @property
    def body(self) -> nn.Module:
        return getattr(self.net, self.net.base_model_prefix)

    def parameters(self) -> list[nn.Parameter]:
        """Trainable ones, in a fixed order; of a net that is cut over processes, the slices."""
        if not self.trainable:
            return []
        sharding.rest(self.net)
        mine = [p for n, p in self.net.named_parameters() if p.requires_grad and ".heads." not in f".{n}" and (
            self.adapter is None or f".{self.adapter}." in n)]
        return mine + (list(self.head.parameters()) if self.head is not None else [])


@dataclass
class Roles:
    """The models of a stage. `add` loads a role; `hidden`, `logprobs`, `scalars` run one."""

    config: ModelConfig
    dtype: torch.dtype
    place: str
    tokenizer: object = None
    roles: dict[str, Role] = field(default_factory=dict)
    base: nn.Module | None = None
    pointer: list = field(default_factory=lambda: [None])
    packed_head: tuple | None = None  # (vocabulary head, its product for decoding)
    merged: tuple | None = None  # (which role with which weights, its merged copy for decoding)
    sharded: bool = False  # whether models are cut over the processes (posttrain/sharding.py)
    zero: int = 0  # by DeepSpeed's ZeRO of this stage, when training starts (posttrain/zero.py)
    engine: object = None  # what samples in the place of generate.py's loop (vllm_engine.VLLM)

    def __post_init__(self):
        self.tokenizer = self.tokenizer or load_tokenizer(self.config, self.place)
        self.added = self.tokenizer.convert_tokens_to_ids(getattr(self.tokenizer, "added_turn_tokens", []))
        self.device = device()
        self.layout = "packed" if self.device.type == "cuda" else "rows"

    def __getitem__(self, name: str) -> Role:
        return self.roles[name]

    # -- loading -------------------------------------------------------------------------------------------------------------

    def add(self, name: str, source: str | Path | None = None, *, trainable: bool = False, head: str | None = None, seed: int = 0,
            fresh_adapter: bool | None = None) -> Role:
        """Load a role.

        source: None for the recipe's base, an adapter folder, or a full model folder. head: None, 'saved' (from source), 'new'
        (normal, the model's initializer range), 'zero'. fresh_adapter: put a new adapter on the base; None: where the recipe
        trains adapters, the role is trainable and its source is the base. With an adapter as source and trainable, the adapter's
        tensors are copied: the source folder stays as it is.
        """
        source = Path(source) if source else None
        is_adapter = source is not None and (source / "adapter_config.json").exists()
        if fresh_adapter is None:
            fresh_adapter = trainable and self.config.lora is not None and not is_adapter
        if fresh_adapter and source is not None:
            raise PosttrainError(f"{self.place}: model.lora", f"{source} is a whole model", "an adapter of this recipe's base, or 'base'",
                                 "Name that folder as model.name_or_path to put adapters on it, or remove model.lora.")
        if is_adapter or fresh_adapter or (source is None and (self.config.lora or self.config.quantization != "none")):
            role = self._adapter_role(name, source if is_adapter else None, fresh_adapter, trainable, bool(head))
        elif source is None and not trainable and self.base is None and not self.roles:
            role = Role(name, self._base(), None, None, trainable)
        else:
            role = self._full_role(name, source, trainable, head)
        if head:
            self._head(role, source, head, seed)
        if self.sharded:
            if not self.zero and not sharding.is_sharded(role.net):
                sharding.shard(role.net, role.head, self.device)
            if not self.zero:
                sharding.check(role.net, self.place)
        self.roles[name] = role
        return role

    def _base(self) -> nn.Module:
        if self.base is None:
            path = resolve(self.config.name_or_path, f"{self.place}: model.name_or_path")
            self.base = load_network(path, self.config, self.dtype, self.place, sharded=self.sharded)
            self._grow(self.base, fresh=True)
            self.base.heads = nn.ModuleDict()
            if self.added:
                self._add_rows(self.base)
            if self.sharded and not self.zero:
                sharding.shard(self.base, None, self.device)
        return self.base

    def _grow(self, net: nn.Module, fresh: bool) -> None:
        """Rows for turn tokens that were added to the vocabulary, each started at the mean of the others. fresh: net never had them."""
        size = net.get_input_embeddings().weight.shape[0]
        new = sorted({*range(size, len(self.tokenizer)), *self.added}) if fresh else list(range(size, len(self.tokenizer)))
        if not new:
            return
        if len(self.tokenizer) > size:
            net.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        for table in {net.get_input_embeddings(), net.get_output_embeddings()} - {None}:
            old = torch.ones(len(table.weight), dtype=torch.bool, device=table.weight.device)
            old[new] = old[len(self.tokenizer):] = False  # rows past the vocabulary were never trained
            table.weight.data[new] = table.weight.data[old].float().mean(0).to(table.weight.dtype)
        net.requires_grad_(False)

    def _add_rows(self, net: nn.Module) -> None:
        """A place for each role's own rows of the added turn tokens; the embedding reads them through the role pointer."""
        table = net.get_input_embeddings()
        net.token_rows = nn.ModuleDict()
        slots = torch.full((len(table.weight),), -1, device=self.device)
        slots[self.added] = torch.arange(len(self.added), device=self.device)
        table.row_pointer, table.row_slots = self.pointer, slots
        object.__setattr__(table, "token_rows", net.token_rows)  # a reference, not a second owner
        table.forward = MethodType(_embedded, table)

    def _tables(self, head: bool) -> dict[str, str]:
        """The tables whose added rows a role trains and their module names: the input's, and the output's where it is another one."""
        names = {id(m): n for n, m in self.base.named_modules()}
        inp, out = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        return {"input": names[id(inp)]} | ({} if head or out is None or out.weight is inp.weight else {"output": names[id(out)]})

    def _adapter_role(self, name: str, source: Path | None, fresh: bool, trainable: bool, head: bool) -> Role:
        net = self._base()
        if source is None and not fresh:
            return Role(name, net, None, None, False)
        lora = self.config.lora or LoraSettings()
        tensors = {}
        if source is not None:
            saved = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
            odd = [k for k in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if saved.get(k)]
            if odd or saved.get("bias", "none") != "none" or isinstance(saved["target_modules"], str):
                raise PosttrainError(str(source), f"an adapter with {', '.join(odd) or 'biases or a pattern of targets'}",
                                     "a plain LoRA adapter whose targets are listed", "Merge it into its base and name the merged folder.")
            mine = LoraSettings(r=saved["r"], alpha=saved["lora_alpha"], dropout=lora.dropout, target_modules=sorted(saved["target_modules"]))
            if trainable and self.config.lora and (mine.r, mine.target_modules) != (lora.r, self._targets(lora)):
                raise PosttrainError(f"{self.place}: model.lora", f"rank {lora.r} on {self._targets(lora)}, but the adapter it starts from "
                                     f"({source.parent.name}) has rank {mine.r} on {mine.target_modules}", "the same rank and targets",
                                     "Change model.lora or train the earlier stage again.")
            lora, tensors = mine, load_file(source / "adapter_model.safetensors")
        self._inject(name, lora, lora.dropout if trainable else 0.0)
        if self.added:
            sharding.rest(net)
            net.token_rows[name] = nn.ParameterDict({k: sharding.whole(net.get_submodule(m).weight.data)[self.added].float()
                                                     for k, m in self._tables(head).items()})
        self._fill(name, tensors, source)
        for p in self._slots(name).values():
            p.requires_grad_(trainable)
        return Role(name, net, name, None, trainable, lora)

    def _targets(self, lora: LoraSettings) -> list[str]:
        """'all-linear' spelled out as the names of the body's linear layers."""
        if lora.target_modules != "all-linear":
            return sorted([lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules)
        body = getattr(self._base(), self._base().base_model_prefix)
        return sorted({n.split(".")[-1] for n, m in body.named_modules()
                       if hasattr(m, "in_features") and ".lora_" not in n and not n.endswith("base_layer")}
                      | {n.split(".")[-1] for n, m in body.named_modules() if hasattr(m, "role_pointer")})

    def peft_config(self, lora: LoraSettings, head: bool):
        from peft import LoraConfig

        rows = {m.split(".")[-1]: list(self.added) for m in self._tables(head).values()} if self.added else None
        return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=self._targets(lora), bias="none",
                          task_type="SEQ_CLS" if head else "CAUSAL_LM", modules_to_save=["score"] if head else None, trainable_token_indices=rows)

    def _inject(self, name: str, lora: LoraSettings, dropout: float) -> None:
        """dropout: 0 for a frozen role, whose layers a trainer of another role puts in training mode too."""
        from peft import LoraConfig, inject_adapter_in_model

        frozen = {n: p.requires_grad for n, p in self.base.named_parameters()}
        inject_adapter_in_model(LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=dropout, bias="none",
                                           target_modules=self._targets(lora)), self.base, name)
        adapted.read_roles(self.base, self.pointer)
        self.base.eval()  # new adapters come in training mode, with their dropout on
        for n, p in self.base.named_parameters():
            if f".{name}." in n and "lora_" in n:
                p.data = p.data.float()
            else:  # peft switches gradients on and off as it injects; ours are set once per role
                p.requires_grad_(frozen.get(n, frozen.get(n.replace(".base_layer", ""), False)))
        self.base._hf_peft_config_loaded = True  # transformers' trainer asks this before it trains adapters on a quantized base

    def _slots(self, name: str) -> dict[str, nn.Parameter]:
        """A role's adapter parameters by their names in peft's file, less the prefix `base_model.model.`."""
        slots = {n.replace(f".{name}.weight", ".weight"): p for n, p in self.base.named_parameters() if f".{name}." in n and "lora_" in n}
        if self.added:
            rows = self.base.token_rows[name]
            slots |= {f"{m}.{ROWS}": rows[k] for k, m in self._tables(head=False).items() if k in rows}
        return slots

    def _fill(self, name: str, tensors: dict[str, Tensor], source: Path | None) -> None:
        if source is None:
            return
        slots, output = self._slots(name), f"{self._tables(head=False).get('output')}.{ROWS}"
        found = {k.removeprefix("base_model.model."): v for k, v in tensors.items() if "lora_" in k or ROWS in k}
        if output not in slots:  # a scalar head has no use for the vocabulary's rows
            found.pop(output, None)
        if set(slots) != set(found):
            odd = sorted(set(slots) ^ set(found))[:2]
            raise PosttrainError(str(source), f"its tensors do not fit the base ({odd[0]} ...)", "an adapter of this base", "Check model.name_or_path.")
        for key, p in slots.items():
            if sharding.shape(p) != found[key].shape:
                raise PosttrainError(str(source), f"{key} has shape {tuple(found[key].shape)}", f"{tuple(sharding.shape(p))}",
                                     "Check model.name_or_path.")
            sharding.fill(p, found[key].float())

    def _full_role(self, name: str, source: Path | None, trainable: bool, head: str | None) -> Role:
        if self.config.quantization != "none":
            raise PosttrainError(f"{self.place}: model.quantization", f"'{self.config.quantization}' with full fine-tuning", "adapters",
                                 "Add model.lora, or set quantization: none.")
        path = str(source) if source else resolve(self.config.name_or_path, f"{self.place}: model.name_or_path")
        net = load_network(path, self.config, self.dtype, self.place, classification=head == "saved", sharded=self.sharded)
        if head != "saved":
            self._grow(net, fresh=source is None)
        net.heads = nn.ModuleDict()
        net.requires_grad_(trainable)
        return Role(name, net, None, None, trainable)

    def _head(self, role: Role, source: Path | None, kind: str, seed: int) -> None:
        width = role.net.config.get_text_config().hidden_size
        head = nn.Linear(width, 1, bias=False, dtype=torch.float32, device=self.device)
        if kind == "new":
            std = getattr(role.net.config, "initializer_range", 0.02)
            head.weight.data = torch.empty(1, width).normal_(0, std, generator=torch.Generator().manual_seed(seed)).to(self.device)
        elif kind == "zero":
            head.weight.data.zero_()
        elif role.adapter:
            tensors = load_file(source / "adapter_model.safetensors")
            if "base_model.model.score.weight" not in tensors:
                raise PosttrainError(str(source), "the adapter has no scalar head", "a reward adapter (score.weight)", "Name a reward section.")
            head.weight.data.copy_(tensors["base_model.model.score.weight"])
        else:
            head.weight.data.copy_(role.net.score.weight)
        head.requires_grad_(role.trainable)
        role.net.heads[role.name] = head
        role.head = head

    # -- running -------------------------------------------------------------------------------------------------------------

    def use(self, name: str) -> Role:
        """Select the role whose adapter the layers read."""
        role = self.roles[name]
        self.pointer[0] = role.adapter
        return role

    def decoder(self, name: str) -> nn.Module:
        """The body to decode a role with: a merged copy where that pays (see decoder.py), else the role's own. The copy is made
        again only when the adapter has changed since."""
        role = self.use(name)
        if not decoder.worth_it(role, self.config.quantization):
            return role.body
        stamp = (name, self.stamp(name))
        if self.merged is None or self.merged[0] != stamp:
            self.merged = (stamp, decoder.merged_body(role, self.merged[1] if self.merged else None))
        return self.merged[1]

    def stamp(self, name: str) -> list[float]:
        """Numbers that change with the weights of a role's adapter. A version counter does not see fused optimizers and .data."""
        role = self.roles[name]
        return torch.stack([p.detach().norm() for n, p in role.net.named_parameters() if f".{role.adapter}." in n]).tolist()

    def hidden(self, name: str, batch: MicroBatch) -> Tensor:
        """Last hidden states (B*T, d) of a micro-batch under a role."""
        role = self.use(name)
        extra = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        if batch.tree_spans is not None and role.net.config._attn_implementation == attention.NAME:
            extra["tree_spans"] = batch.tree_spans  # what the mask says, for our attention on a CPU
        return sharding.computed(role.net, lambda: role.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                                                             **extra).last_hidden_state).flatten(0, 1)

    def logprobs(self, name: str, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
        """Log-probabilities (N,) of the micro-batch's targets under a role, in nats."""
        return self.logprobs_of(name, self.hidden(name, batch), batch, temperature)

    def logprobs_of(self, name: str, hidden: Tensor, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
        return sharding.multiplied(self.roles[name].net, lambda: token_logprobs(hidden[batch.predictors], self.vocabulary(name), batch.targets, temperature))

    def vocabulary(self, name: str) -> Tensor:
        """The vocabulary head (V, d) of a role."""
        role = self.roles[name]
        weight = role.net.get_output_embeddings().weight
        if role.adapter is None or not self.added:
            return weight
        rows = role.net.token_rows[role.adapter]
        new = rows["output" if "output" in rows else "input"].to(weight.dtype)
        return weight.index_copy(0, torch.tensor(self.added, device=weight.device), new)

    def logits_of(self, name: str) -> Callable[[Tensor], Tensor]:
        """The function to decode a role with, last hidden states (N, d) -> logits (N, V) float32. Where packed weights pay (see decoder.py), they
        are made once for all roles that share the head."""
        weight = self.vocabulary(name)
        product = partial(nn.functional.linear, weight=weight)
        if not weight.requires_grad and decoder.packing_pays(weight):
            if self.packed_head is None or self.packed_head[0] is not weight:
                self.packed_head = (weight, decoder.Product().write(weight))
            product = self.packed_head[1]
        return lambda hidden: product(hidden.to(weight.dtype)).float()

    def scalars(self, name: str, batch: MicroBatch) -> Tensor:
        """The head's value (S,) float32 at the last token of every answer: a reward model's score, the logit."""
        return self.scalars_at(name, self.hidden(name, batch), batch.last)

    def scalars_at(self, name: str, hidden: Tensor, where: Tensor) -> Tensor:
        head = self.roles[name].head
        return sharding.computed(head, lambda: head(hidden[where].float()).squeeze(-1))

    # -- saving --------------------------------------------------------------------------------------------------------------

    def save(self, name: str, folder: Path) -> None:
        """Write a role: an adapter (and head) in peft's layout, or a whole model in transformers'. With the tokenizer."""
        role = self.roles[name]
        folder.mkdir(parents=True, exist_ok=True)
        if role.adapter:
            tensors = {f"base_model.model.{n}": sharding.whole(p).detach().cpu().contiguous() for n, p in self._slots(name).items()}
            if role.head is not None:
                tensors["base_model.model.score.weight"] = sharding.whole(role.head.weight).detach().cpu().contiguous()
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config = self.peft_config(role.lora, role.head is not None)
            config.inference_mode = True
            config.base_model_name_or_path, config.revision = self.config.name_or_path, self.config.revision
            config.save_pretrained(folder)
        else:
            self._save_full(role, folder)
        if self.sharded and not distributed.is_main():
            return
        self.tokenizer.save_pretrained(folder)

    def _save_full(self, role: Role, folder: Path) -> None:
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        net, heads = role.net, role.net.heads
        del net.heads  # not part of transformers' layout
        try:
            state = sharding.whole_state(net if role.head is None else role.body) if self.sharded else None
            score = None if role.head is None else sharding.whole(role.head.weight).detach()
            if self.sharded and not distributed.is_main():
                return
            if role.head is None:
                net.save_pretrained(folder, state_dict=state)
                return
            prefix = net.base_model_prefix
            state = {f"{prefix}.{k}": v.detach().cpu().contiguous() for k, v in (state or role.body.state_dict()).items()}
            state["score.weight"] = score.cpu().contiguous()  # float32: a resumed run goes on with every bit
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            config = type(net.config).from_dict(net.config.to_dict())
            config.num_labels, config.pad_token_id = 1, self.tokenizer.pad_token_id
            config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(net.config)].__name__]
            config.save_pretrained(folder)
        finally:
            net.heads = heads


def source_of(section, ref: str) -> Path | None:
    """The model folder a `ModelRef` names: None for the recipe's base, a section's output, or a folder or hub name."""
    if ref == "base":
        return None
    if ref.startswith("@"):
        return section.parent(ref).folder / "model"
    return Path(resolve(ref, section.place))


def add_models(section, roles: Roles) -> dict[str, str]:
    """The models that a section compares as frozen roles: name -> role. A role is a number, since a torch module's name holds no dots."""
    out = {}
    for i, (name, ref) in enumerate(section.config.models.items()):
        out[name] = f"model_{i}"
        roles.add(out[name], source_of(section, ref))
    return out


def roles_for(section) -> Roles:
    """The Roles of a section, with dtype and threads decided once and kept in its manifest, and the engine that the section samples with."""
    config = section.recipe.model
    dtype = section.decide("dtype", lambda: choose_dtype(config, full=True))
    section.decide("threads", lambda: set_threads(section.recipe.run.threads))
    set_threads(section.manifest["decisions"]["threads"])
    roles = Roles(config, getattr(torch, dtype), section.recipe.path, sharded=distributed.shards(config) and STAGES[section.kind].sharded,
                  zero=distributed.zero())
    if getattr(section.config, "engine", "ours") == "vllm":
        from posttrain import vllm_engine

        roles.engine = vllm_engine.VLLM(section, roles.dtype)
    if getattr(section.config, "engine", "ours") == "server":
        from posttrain import server_engine

        roles.engine = server_engine.Servers(section)
    return roles
