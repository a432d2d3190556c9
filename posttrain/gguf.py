"""A model folder of the Llama layout -> one GGUF file for llama.cpp and what is built on it (f16, q8_0).

What llama.cpp expects is that of its own converter (ggml-org/llama.cpp, conversion/llama.py and base.py): names, query and key rows reordered for
its rotary embedding (neighbouring pairs, where transformers has halves), norms in float32, Llama 3's scaled rotary frequencies as a tensor of
factors. Tensors are read, reordered and written one at a time.

The tokenizer's flags are set so that a chat in llama.cpp has the token ids of training: BOS is added only where the template also writes it
(llama.cpp then keeps one), and a sentencepiece vocabulary gets its space before text or not, as the template's own texts have it.
"""

import json
import math
import re
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from posttrain import chat
from posttrain.errors import PosttrainError
from posttrain.log import say

LAYOUTS = ("llama", "mistral")
BLOCK = 32  # values that share a scale in q8_0; a matrix whose rows are no multiple of it stays f16, as in llama.cpp's converter
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {  # how a byte-level vocabulary cuts text first, and whether whole words skip the merges -> llama.cpp's name for it
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", LLAMA_3, "Isolated"), ("ByteLevel", False)), True): "llama-bpe",
}
DIALOGUE = [{"role": "user", "content": "What is 17 plus 25?"}, {"role": "assistant", "content": "It is 42.\n\nAnything else?"},
            {"role": "user", "content": "No, thanks."}]


# -- what can be written ---------------------------------------------------------------------------------------------------------------------


def check_package(place: str) -> None:
    if find_spec("gguf") is None:
        raise PosttrainError(f"{place}.gguf", "the package gguf is not installed", "the writer of GGUF files", "Run `pip install gguf`.")


def check(config, tokenizer, place: str) -> None:
    """Refuse what is not of the Llama layout. config: the model's; raises PosttrainError with llama.cpp's own command."""
    rope = config.rope_parameters or {}
    wrong = [f"the layout '{config.model_type}'"] * (config.model_type not in LAYOUTS)
    wrong += [f"the activation '{getattr(config, 'hidden_act', None)}'"] * (getattr(config, "hidden_act", "silu") != "silu")
    wrong += [f"'{key}'" for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    wrong += [f"the rotary scaling '{rope.get('rope_type')}'"] * (rope.get("rope_type", "default") not in ("default", "llama3"))
    if wrong:
        raise _unknown(wrong[0], place)
    vocabulary(tokenizer, place)


def _unknown(what: str, place: str) -> PosttrainError:
    return PosttrainError(f"{place}.gguf", f"{what} is not written here", "the Llama layout: Llama 2 and 3, Mistral, SmolLM2", "Leave gguf out, run "
                          "this again, and use llama.cpp's converter in a clone of it: `python convert_hf_to_gguf.py MODEL_FOLDER --outfile "
                          "NAME-f16.gguf --outtype f16`.")


def vocabulary(tokenizer, place: str) -> tuple[str, str]:
    """llama.cpp's names for a tokenizer's kind and pre-tokenizer: ('llama', 'default') is sentencepiece BPE, ('gpt2', NAME) byte-level BPE."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] == "BPE" and spec["model"].get("byte_fallback"):
        return "llama", "default"
    steps = spec["pre_tokenizer"] or {}
    steps = tuple(map(_step, steps.get("pretokenizers", [steps])))
    name = PRE_TOKENIZERS.get((steps, bool(spec["model"].get("ignore_merges"))))
    if spec["model"]["type"] != "BPE" or spec["normalizer"] or name is None:
        raise _unknown(f"a tokenizer that cuts text by {', '.join(str(s[0]) for s in steps)}", place)
    return "gpt2", name


def _step(step: dict) -> tuple:
    """A pre-tokenizer of tokenizer.json by what it does."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and not step["invert"]:
        return kind, step["pattern"].get("Regex"), step["behavior"]
    return (kind,)


# -- writing -----------------------------------------------------------------------------------------------------------------------------------


def write(folder: Path, path: Path, kind: str, tokenizer, name: str, place: str) -> None:
    """The model in `folder` (config.json, safetensors) as the GGUF file `path`. kind: 'f16' or 'q8_0'; name: the model's, for people."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check(config, tokenizer, place)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    add_decoding(writer, folder)
    add_tokenizer(writer, config, tokenizer, place)

    plan, names = [], gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for ours, (file, shape) in tensors_of(folder).items():
        theirs = names.get_name(ours, try_suffixes=(".weight",))
        if theirs is None:
            raise _unknown(f"the tensor '{ours}'", place)
        plan.append((theirs, stored_as(shape, kind), shape, partial(read, file, ours, config)))
    if (factors := rope_factors(config)) is not None:
        plan.append(("rope_freqs.weight", gguf.GGMLQuantizationType.F32, factors.shape, lambda: factors))

    for theirs, stored, shape, _ in plan:
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(stored.name, np.uint8))
        held = gguf.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(theirs, held if dtype == np.uint8 else shape, dtype, math.prod(held), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, stored, _, values in plan:
        with np.errstate(over="ignore"):
            written = gguf.quants.quantize(values(), stored)
        if written.dtype == np.float16 and not np.isfinite(written).all():
            raise PosttrainError(f"{place}.gguf", f"'{theirs}' holds values beyond float16", "at most 65504", "Ask for q8_0 alone.")
        writer.write_tensor_data(written)
    writer.close()
    say(f"  {path.name}: {path.stat().st_size / 1e6:,.1f} MB")


def add_sizes(writer, config) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_decoding(writer, folder: Path) -> None:
    """The folder's decoding settings as llama.cpp's defaults, in place of its own top-k 40 and min-p 0.05."""
    from transformers import GenerationConfig

    told = GenerationConfig.from_pretrained(folder)
    writer.add_sampling_temp((told.temperature or 1.0) if told.do_sample else 0.0)
    writer.add_sampling_top_p((told.top_p or 1.0) if told.do_sample else 1.0)
    writer.add_sampling_top_k(0)
    writer.add_sampling_min_p(0.0)


def rope_factors(config) -> np.ndarray | None:
    """Llama 3's scaled rotary frequencies as the factors (width / 2,) that llama.cpp divides the plain ones by; None without scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return (plain / scaled).float().numpy()


# -- tensors -------------------------------------------------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every tensor's file and shape, layers in order."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {name: (file, tuple(f.get_slice(name).get_shape())) for name in f.keys()}  # noqa: SIM118  no mapping
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\.(\d+)\.", item[0])]))


def stored_as(shape: tuple[int, ...], kind: str):
    """Norms in float32; matrices as asked for."""
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1:
        return Type.F32
    return Type.Q8_0 if kind == "q8_0" and shape[-1] % BLOCK == 0 else Type.F16


def read(file: Path, name: str, config) -> np.ndarray:
    """A tensor in float32; the rows of a query or key matrix (head, 2, pair) as (head, pair, 2)."""
    with safe_open(file, "pt") as f:
        weight = f.get_tensor(name).float()
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    turned = next((n for end, n in heads.items() if name.endswith(end)), None)
    return (weight.unflatten(0, (turned, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous() if turned else weight).numpy()


# -- tokenizer -----------------------------------------------------------------------------------------------------------------------------------


def add_tokenizer(writer, config, tokenizer, place: str) -> None:
    kind, pre = vocabulary(tokenizer, place)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in spec["model"]["merges"]]
    tokens, types = tokens_of(tokenizer, config.vocab_size, kind)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores(scores_of(tokens, types, merges))
        writer.add_add_space_prefix(space_before_text(tokenizer))
    else:
        writer.add_token_merges([" ".join(m) for m in merges])
    end = chat.end_of_turn(tokenizer)
    for add, token in ((writer.add_bos_token_id, tokenizer.bos_token_id), (writer.add_eos_token_id, tokenizer.eos_token_id),
                       (writer.add_unk_token_id, tokenizer.unk_token_id), (writer.add_pad_token_id, tokenizer.pad_token_id),
                       (writer.add_eot_token_id, end if end != tokenizer.eos_token_id else None)):
        if token is not None:
            add(token)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def tokens_of(tokenizer, size: int, kind: str) -> tuple[list[str], list[int]]:
    """Every id's text and llama.cpp's type of it. size: rows of the embedding; rows without a token are named [PADi]."""
    from gguf import TokenType as Type

    names = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(size):
        token = names.get(i)
        if token is None:
            kind_of = Type.UNUSED
        elif kind == "llama" and i == tokenizer.unk_token_id:
            kind_of = Type.UNKNOWN
        elif i in added:
            kind_of = Type.CONTROL if added[i].special else Type.USER_DEFINED
        elif kind == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind_of = Type.BYTE
        else:
            kind_of = Type.NORMAL
        tokens.append(f"[PAD{i}]" if token is None else token)
        types.append(kind_of)
    return tokens, types


def scores_of(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Sentencepiece's scores, which decide what is merged first, from the order of the merges: minus the rank of a piece's first merge."""
    from gguf import TokenType as Type

    rank = {}
    for n, (left, right) in enumerate(merges):
        rank.setdefault(left + right, n)
    return [-float(rank.get(token, len(merges))) if kind == Type.NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)]


def adds_bos(tokenizer) -> bool:
    """Whether llama.cpp should put BOS before a text: where the tokenizer does, and a chat begins with it."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos] == chat.encode_prompt(tokenizer, DIALOGUE)[:1]


def space_before_text(tokenizer) -> bool:
    """Whether llama.cpp, which puts a space before every text between special tokens or before none, should do so: as a chat of training has it."""
    from tokenizers import pre_tokenizers

    wanted, found = chat.encode_prompt(tokenizer, DIALOGUE), {}
    for scheme in ("always", "never"):
        other = deepcopy(tokenizer)
        other.backend_tokenizer.normalizer = None
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        found[scheme] = chat.encode_prompt(other, DIALOGUE)
    if wanted not in found.values():
        say("  note: llama.cpp cuts a chat of this tokenizer a little otherwise than training did (spaces after special tokens)")
    return found["never"] != wanted
