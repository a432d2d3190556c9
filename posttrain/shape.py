"""A model's sizes from its config.json: parameters, adapter weights, bytes. Arithmetic on published shapes; no torch, no network."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from posttrain import builtin
from posttrain import config as cfg
from posttrain.errors import PosttrainError

SHAPES = Path(__file__).parent / "shapes"
KNOWN = ("llama", "mistral", "qwen2", "qwen3")  # families whose parameters are counted exactly
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, its block's 8-bit constant, and that constant's own float32 constant


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. linears: the matrices of one layer by name, (inputs, outputs)."""

    layers: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    q_width: int  # query heads times head width
    kv_width: int  # key/value heads times head width
    qk_norm: bool  # queries and keys are normalized
    tied: bool
    linears: dict[str, tuple[int, int]]
    small: int  # norms and biases, all layers
    exact: bool  # False: a family whose details this file does not know

    @property
    def body(self) -> int:
        """Weights of the layers' matrices: what is quantized, and what adapters sit on."""
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def embeddings(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.body + self.embeddings + self.small

    def lora(self, lora: cfg.LoraSettings, place: str = "model.lora") -> int:
        """Weights of one adapter."""
        wanted = lora.target_modules
        names = list(self.linears) if wanted == "all-linear" else [wanted] if isinstance(wanted, str) else wanted
        unknown = [n for n in names if n not in self.linears]
        if unknown:
            raise PosttrainError(f"{place}.target_modules", f"no layer '{unknown[0]}' in this model", f"some of {', '.join(self.linears)}",
                                 "Name these, or all-linear.")
        return self.lora_weights(lora.r, names)

    def lora_weights(self, rank: int, names: list[str] | None = None) -> int:
        """Weights of an adapter of a rank on the layers of these names, or all."""
        return self.layers * rank * sum(sum(self.linears[n]) for n in names or self.linears)

    def weights(self, quantization: str, width: int) -> float:
        """Bytes of the base in memory; embeddings, head and norms are never quantized."""
        each = {"nf4": NF4_BYTES, "int8": 1.0}.get(quantization, width)
        return self.body * each + (self.parameters - self.body) * width

    def kv(self, width: int) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_width * width


def shape_of(config: dict) -> Shape:
    """A transformers config.json -> Shape. Exact for Llama, Mistral and Qwen 2 and 3; elsewhere the Llama arithmetic, marked so."""
    config = config.get("text_config") or config
    d, layers, heads, ffn = (config[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    width = config.get("head_dim") or d // heads
    q, kv = heads * width, (config.get("num_key_value_heads") or heads) * width
    kind = config.get("model_type")
    small = 2 * d + (2 * width if kind == "qwen3" else 0) + (q + 2 * kv if kind == "qwen2" else 0)
    small += q + 2 * kv + d if config.get("attention_bias") else 0
    small += 2 * ffn + d if config.get("mlp_bias") else 0
    tied = config.get("tie_word_embeddings", kind not in KNOWN)
    linears = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d),
               "gate_proj": (d, ffn), "up_proj": (d, ffn), "down_proj": (ffn, d)}
    return Shape(layers, d, ffn, config["vocab_size"], heads, q, kv, kind == "qwen3", tied, linears, layers * small + d, kind in KNOWN)


def read_shape(model: cfg.ModelConfig, place: str) -> Shape:
    """The recipe's model from a local, built-in, shipped or cached config.json. Asks no server."""
    path = _config_file(model, place)
    try:
        return shape_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise PosttrainError(str(path), f"not a decoder's configuration ({type(e).__name__}: {e})", "a transformers config.json",
                             "Check model.name_or_path.") from None


def _config_file(model: cfg.ModelConfig, place: str) -> Path:
    name, key = model.name_or_path, f"{place}: model.name_or_path"
    if builtin.is_builtin(name):
        builtin.check(name, key)
        made = builtin.cache_root() / name.removeprefix("builtin:") / "config.json"
        return made if made.exists() else builtin.folder(name, key) / "config.json"
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser() / "config.json"
    shipped = SHAPES / (name.replace("/", "--") + ".json")
    if shipped.exists():
        return shipped
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=model.revision) if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None
    if isinstance(cached, str):
        return Path(cached)
    raise PosttrainError(key, f"the shape of '{name}' is not here",
                         f"its config.json in the hub cache, or as {shipped.name} in posttrain/shapes",
                         f"Fetch that one small file: `hf download {name} config.json`.")


def check_on_meta(recipe: cfg.Recipe) -> str:
    """One sentence: the model as transformers builds it, without memory or download, against this file's count. Imports torch."""
    from posttrain.models import meta_model

    built = sum(p.numel() for p in meta_model(recipe.model, recipe.path).parameters())
    counted = read_shape(recipe.model, recipe.path).parameters
    off = abs(built - counted) / built
    agrees = "as planned" if built == counted else f"the plan counted {counted:,}: its memory figures are off by {off:.1%}"
    return f"{recipe.model.name_or_path} built on the meta device: {built:,} parameters, {agrees}"
