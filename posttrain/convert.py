"""Meta's original Llama 2 download (consolidated.NN.pth, params.json, tokenizer.model) -> a model folder in transformers' layout.

Meta cut a model into shards for tensor parallelism: a matrix is split by rows, by columns, or copied into each (LAYER, WHOLE). Its rotary
embedding turns neighbouring rows (2i, 2i+1) of a head together, transformers' turns rows i and i + width/2: query and key rows are reordered.

The shards are memory-mapped and one tensor is put together at a time, so memory holds one output file (FILE_BYTES) and one tensor, whatever the
model's size; measured: 2.3 GB with an output file of 1.95 GB. Mapped pages come on top in what `top` shows; the system takes them back at need.
"""

import hashlib
import json
import math
import pickle
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from posttrain.card import NOTICES, is_licence
from posttrain.errors import PosttrainError
from posttrain.export import replace
from posttrain.log import say
from posttrain.runs import write_atomic, write_json

FILE_BYTES = 2_000_000_000  # of an output file, at most (one tensor may be larger)
CONTEXT = 4096  # tokens Llama 2 was trained on; params.json doesn't say
PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size")
NEEDED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
ELSEWHERE = "Only Llama 2 is converted; later models are on the hub in transformers' layout: name one as model.name_or_path, such as {}."
LLAMA_3, CODE_LLAMA = "meta-llama/Llama-3.1-8B", "codellama/CodeLlama-7b-hf"
LLAMA_1 = ("Take Llama 2. For Llama 1 itself, convert it with transformers 4 (`python -m transformers.models.llama.convert_llama_weights_to_hf "
           "--llama_version 1`), and name that folder as model.name_or_path.")
CODE_THETA, CODE_PIECES, THIRD_THETA, THIRD_TOKENS = 1_000_000, 32016, 500_000, 128256  # of Code Llama's files, and of Llama 3's
DIM_7B, DIM_65B = 4096, 8192  # of Llama 1 and 2
TEXTS = ("Hello there, who are you?", "two  spaces\n\tand a tab ", "In 1789 émeute 日本語 😀", "[INST] x [/INST]")

# Meta's name -> (transformers' name, rows, columns, the side that is split over the shards or None where each has a copy)
WHOLE = {"tok_embeddings.weight": ("model.embed_tokens.weight", "vocab", "dim", 1), "norm.weight": ("model.norm.weight", "dim", None, None),
         "output.weight": ("lm_head.weight", "vocab", "dim", 0)}
LAYER = {"attention.wq.weight": ("self_attn.q_proj.weight", "dim", "dim", 0), "attention.wk.weight": ("self_attn.k_proj.weight", "kv", "dim", 0),
         "attention.wv.weight": ("self_attn.v_proj.weight", "kv", "dim", 0), "attention.wo.weight": ("self_attn.o_proj.weight", "dim", "dim", 1),
         "feed_forward.w1.weight": ("mlp.gate_proj.weight", "ffn", "dim", 0), "feed_forward.w2.weight": ("mlp.down_proj.weight", "dim", "ffn", 1),
         "feed_forward.w3.weight": ("mlp.up_proj.weight", "ffn", "dim", 0), "attention_norm.weight": ("input_layernorm.weight", "dim", None, None),
         "ffn_norm.weight": ("post_attention_layernorm.weight", "dim", None, None)}


@dataclass(frozen=True)
class Place:
    """One tensor: its names here and there, its whole shape, the split side, and how many heads' rows are to be reordered (0: none)."""

    meta: str
    name: str
    shape: tuple[int, ...]
    split: int | None
    heads: int = 0


def run(source: Path, out: Path) -> None:
    """Convert the folder `source` into `out`. Raises PosttrainError on what is missing, damaged or of another kind, before anything is written."""
    # 1. What is there, and whether it is whole
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PosttrainError(str(out), "holds something", "an empty or absent folder", "Name another folder, or move that one away.")
    params = read_params(source)
    tokenizer_model = find_tokenizer(source)
    pieces = sentencepiece_model(tokenizer_model)
    if pieces.get_piece_size() == CODE_PIECES:
        raise _another(str(tokenizer_model), "Code Llama", f"{CODE_PIECES} pieces, 16 of them for infilling", CODE_LLAMA)
    check_sums(source, tokenizer_model)
    shards = read_shards(source)
    refuse_llama_1(params, shards, source)
    places = layout(params, pieces.get_piece_size(), source)
    dtype = check_shapes(places, shards, source)
    files = by_file(places, dtype.itemsize)
    _check_space(out, sum(math.prod(p.shape) for p in places) * dtype.itemsize)

    # 2. The weights, one output file at a time
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    weight_map = {}
    for i, chosen in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        save_file({p.name: joined(p, shards) for p in chosen}, work / name, metadata={"format": "pt"})
        weight_map |= {p.name: name for p in chosen}
        say(f"  {name}: {len(chosen)} tensors")
    if len(files) > 1:
        size = sum((work / name).stat().st_size for name in set(weight_map.values()))
        write_json(work / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})

    # 3. Tokenizer, configuration, licence; then into place
    tokenizer = write_tokenizer(tokenizer_model, pieces, work)
    write_config(params, places, dtype, tokenizer, work)
    licence = copy_licence([source, source.parent], work)
    replace(work, out)
    parameters = sum(math.prod(p.shape) for p in places)
    say(f"{out}: {parameters:,} parameters, {str(dtype).removeprefix('torch.')}, {len(files)} file{'s' * (len(files) > 1)}")
    if licence != "llama2":
        say("  note: no Llama 2 licence text was found beside the download; set model.licence in the recipe before you pass a model on")
    say(f"  next: python -m posttrain plan recipes/llama2-7b-qlora.yaml model.name_or_path={out}")


# -- reading -------------------------------------------------------------------------------------------------------------------------------


def read_params(source: Path) -> dict:
    """params.json, known keys only."""
    path = source / "params.json"
    if not source.is_dir():
        raise PosttrainError(str(source), "a file" if source.exists() else "no such folder", "the folder of Meta's download",
                             "Name the folder that holds consolidated.00.pth and params.json, such as llama-2-7b.")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PosttrainError(str(path), "no such file", "Meta's download: consolidated.NN.pth, params.json, tokenizer.model",
                             "Name the folder that holds them, such as llama-2-7b.") from None
    except (OSError, ValueError) as e:
        raise PosttrainError(str(path), f"cannot be read ({e})", "Meta's params.json", "Download it again.") from None
    params = {k: v for k, v in params.items() if v is not None} if isinstance(params, dict) else {}
    refuse_later(params, path)
    bad = [k for k in NEEDED if k not in params] or [k for k, v in params.items() if isinstance(v, bool) or not isinstance(v, (int, float))]
    if bad:
        raise PosttrainError(str(path), f"'{bad[0]}' is {params.get(bad[0], 'missing')}", "a number", "Download it again.")
    params.setdefault("n_kv_heads", params["n_heads"])
    if params["dim"] % params["n_heads"] or params["n_heads"] % params["n_kv_heads"]:
        raise PosttrainError(str(path), f"dim {params['dim']}, n_heads {params['n_heads']}, n_kv_heads {params['n_kv_heads']}",
                             "numbers that divide each other", "Download it again.")
    return params


def _another(place: str, model: str, found: str, instead: str) -> PosttrainError:
    return PosttrainError(place, f"a {model} model ({found})", "Llama 2", ELSEWHERE.format(instead))


def refuse_later(params: dict, path: Path) -> None:
    """params.json of a model after Llama 2, by what it says."""
    theta, vocab = params.get("rope_theta"), params.get("vocab_size")
    if theta == CODE_THETA or vocab == CODE_PIECES:
        raise _another(str(path), "Code Llama", f"rope_theta {theta:g}" if theta else f"vocab_size {vocab}", CODE_LLAMA)
    if theta == THIRD_THETA or vocab == THIRD_TOKENS:
        name = "Llama 3.1 or later" if "use_scaled_rope" in params else "Llama 3"
        raise _another(str(path), name, f"rope_theta {theta:g}" if theta else f"vocab_size {vocab}", LLAMA_3)
    if other := [k for k in params if k not in PARAMS]:
        raise PosttrainError(str(path), f"'{other[0]}': {params[other[0]]!r} is not supported", f"the keys of Llama 2 ({', '.join(PARAMS)})",
                             ELSEWHERE.format(LLAMA_3))


def refuse_llama_1(params: dict, shards: list[dict[str, Tensor]], source: Path) -> None:
    """Llama 1 has the same keys, tokenizer and tensors, but was trained on 2,048 tokens. What tells it: 7B keeps the rotary frequencies in every
    layer (all others once); norm_eps is 1e-6, but for 65B (1e-6 stood in an early Llama 2 7B chat too:
    https://github.com/meta-llama/llama/issues/771); and 65B has every key-value head, which Llama 2 70B has not."""
    layered = next((k for k in shards[0] if k.startswith("layers.") and k.endswith("rope.freqs")), None)
    if layered:
        found = f"'{layered}' in consolidated.00.pth"
    elif params["norm_eps"] == 1e-6 and (params["dim"] > DIM_7B or "rope.freqs" not in shards[0]):
        found = f"dim {params['dim']} with norm_eps 1e-06"
    elif params["dim"] == DIM_65B and params["n_kv_heads"] == params["n_heads"]:
        found = f"dim {params['dim']} with {params['n_heads']} key-value heads"
    else:
        return
    raise PosttrainError(str(source), f"a Llama 1 model ({found})", "Llama 2", LLAMA_1)


def find_tokenizer(source: Path) -> Path:
    """tokenizer.model in the folder, or where Meta's download script puts it: beside the folder."""
    found = next((p for p in (source / "tokenizer.model", source.parent / "tokenizer.model") if p.is_file()), None)
    if found is None:
        raise PosttrainError(str(source), "no tokenizer.model there or in the folder above",
                             "the file that Meta's download has beside the model folders", "Copy it there.")
    with found.open("rb") as f:
        first = f.readline(200)
    if re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", first):
        raise PosttrainError(str(found), "a tiktoken vocabulary, as Llama 3 has", "a sentencepiece model", ELSEWHERE.format(LLAMA_3))
    return found


def sentencepiece_model(path: Path):
    """The tokenizer as sentencepiece reads it. transformers' converter needs protobuf besides."""
    absent = [name for name, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")) if not _installed(module)]
    if absent:
        raise PosttrainError(str(path), f"reading it needs {' and '.join(absent)}", "the extra [convert]", f"Run `pip install {' '.join(absent)}`.")
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise PosttrainError(str(path), f"not a sentencepiece model ({str(e).splitlines()[0]})", "Llama 2's tokenizer.model",
                             "Download it again.") from None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def check_sums(source: Path, tokenizer_model: Path) -> None:
    """Every file that Meta's checklists name, against its MD5."""
    lists = dict.fromkeys([source / "checklist.chk", tokenizer_model.parent / "tokenizer_checklist.chk"])
    for path in (p for p in lists if p.is_file()):
        for wanted, name in (line.split() for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) == 2):
            file = path.parent / name.lstrip("*")
            if not file.is_file():
                raise PosttrainError(str(file), f"missing, though {path.name} names it", "every file of the download", "Download it again.")
            say(f"  checking {file.name}")
            with file.open("rb") as f:
                found = hashlib.file_digest(f, "md5").hexdigest()
            if found != wanted.lower():
                raise PosttrainError(str(file), f"its MD5 is {found}", f"{wanted}, as {path.name} says",
                                     "Download it again: it is damaged or not whole.")


def read_shards(source: Path) -> list[dict[str, Tensor]]:
    """The shards in order, memory-mapped."""
    numbered = {int(m[1]): p for p in source.glob("consolidated.*.pth") if (m := re.fullmatch(r"consolidated\.(\d+)\.pth", p.name))}
    missing = next((i for i in range(max(numbered, default=0) + 1) if i not in numbered), None)
    if missing is not None:
        raise PosttrainError(str(source), f"no consolidated.{missing:02}.pth", "every shard from consolidated.00.pth on",
                             "Download the missing ones.")
    return [_read_shard(numbered[i]) for i in range(len(numbered))]


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError) as e:
        raise PosttrainError(str(path), f"cannot be read as tensors alone ({str(e).splitlines()[0][:150]})", "a file that torch.save wrote",
                             "Download it again; a file that holds code is never run.") from None
    if not isinstance(shard, dict) or not all(isinstance(v, Tensor) for v in shard.values()):
        raise PosttrainError(str(path), "not a mapping of tensors", "Meta's checkpoint", "Name the folder of Meta's download.")
    return shard


# -- what belongs where ----------------------------------------------------------------------------------------------------------------------


def ffn_size(params: dict) -> int:
    """Width of the feed-forward layers (meta-llama/llama, llama/model.py, FeedForward)."""
    size = int(params.get("ffn_dim_multiplier", 1.0) * int(2 * (4 * params["dim"]) / 3))
    return params["multiple_of"] * math.ceil(size / params["multiple_of"])


def layout(params: dict, vocab: int, source: Path) -> list[Place]:
    """Every tensor of the model in the order it is written. vocab: pieces of the tokenizer."""
    if params.get("vocab_size", -1) not in (-1, vocab):
        raise PosttrainError(str(source / "params.json"), f"vocab_size {params['vocab_size']}, but tokenizer.model has {vocab} pieces", "one number",
                             "Use the tokenizer.model of this model.")
    width = params["dim"] // params["n_heads"]
    sizes = {"vocab": vocab, "dim": params["dim"], "ffn": ffn_size(params), "kv": width * params["n_kv_heads"]}
    heads = {"attention.wq.weight": params["n_heads"], "attention.wk.weight": params["n_kv_heads"]}

    def place(key: str, meta: str, name: str, rows: str, columns: str | None, split: int | None) -> Place:
        return Place(meta, name, (sizes[rows], sizes[columns]) if columns else (sizes[rows],), split, heads.get(key, 0))

    out = [place(k, k, *WHOLE[k]) for k in ("tok_embeddings.weight",)]
    for i in range(params["n_layers"]):
        out += [place(k, f"layers.{i}.{k}", f"model.layers.{i}.{v[0]}", *v[1:]) for k, v in LAYER.items()]
    return out + [place(k, k, *WHOLE[k]) for k in ("norm.weight", "output.weight")]


def check_shapes(places: list[Place], shards: list[dict[str, Tensor]], source: Path) -> torch.dtype:
    """Every tensor is there, in the right shape and in one dtype, and no other is. Returns the dtype."""
    n, dtype = len(shards), shards[0].get(places[0].meta, torch.empty(0)).dtype
    for i, shard in enumerate(shards):
        where = str(source / f"consolidated.{i:02}.pth")
        for p in places:
            wanted = tuple(size // n if side == p.split else size for side, size in enumerate(p.shape))
            found = shard.get(p.meta)
            if found is None:
                raise PosttrainError(where, f"no tensor '{p.meta}'", f"a Llama 2 shard, as params.json describes it, one of {n}",
                                     "Check that params.json is of this model.")
            if tuple(found.shape) != wanted or (p.split is not None and p.shape[p.split] % n):
                raise PosttrainError(where, f"'{p.meta}' is {tuple(found.shape)}", f"{wanted} in one of {n} shards of a matrix {p.shape}",
                                     "Check that params.json is of this model, and that no shard is missing.")
            if found.dtype != dtype or not dtype.is_floating_point or dtype.itemsize not in (2, 4):
                raise PosttrainError(where, f"'{p.meta}' is {found.dtype}", "one of float16, bfloat16 and float32 throughout",
                                     ELSEWHERE.format(LLAMA_3))
        known = {p.meta for p in places}
        if other := [k for k in shard if k not in known and not k.endswith("rope.freqs")]:  # those are computed from the configuration
            raise PosttrainError(where, f"an unknown tensor '{other[0]}'", "those of Llama 2", ELSEWHERE.format(LLAMA_3))
    return dtype


def joined(place: Place, shards: list[dict[str, Tensor]]) -> Tensor:
    """The whole tensor, in transformers' order of rows."""
    parts = [shard[place.meta] for shard in shards]
    whole = parts[0] if place.split is None else torch.cat(parts, dim=place.split)
    if place.heads:  # rows (head, pair, 2) -> (head, 2, pair)
        whole = whole.unflatten(0, (place.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return whole.clone(memory_format=torch.contiguous_format)


def by_file(places: list[Place], itemsize: int) -> list[list[Place]]:
    """The tensors in order, cut into files of at most FILE_BYTES."""
    files, room = [], 0
    for p in places:
        size = math.prod(p.shape) * itemsize
        if not files or size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(p)
        room -= size
    return files


def _check_space(out: Path, wanted: int) -> None:
    above = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(above).free
    if free < 1.01 * wanted:
        raise PosttrainError(str(above), f"{free / 1e9:.1f} GB free", f"{1.01 * wanted / 1e9:.1f} GB for the converted model",
                             "Free some, or name a folder elsewhere.")


# -- writing -------------------------------------------------------------------------------------------------------------------------------


def write_tokenizer(path: Path, pieces, work: Path):
    """tokenizer.json by transformers' own converter, beside a copy of tokenizer.model; checked against sentencepiece on a few texts."""
    from transformers import LlamaTokenizer

    shutil.copyfile(path, work / path.name)
    tokenizer = LlamaTokenizer.from_pretrained(work, add_bos_token=True, add_eos_token=False)
    for text in TEXTS:  # none begins with a space, where transformers' LlamaTokenizer puts one less
        if tokenizer.encode(text, add_special_tokens=False) != pieces.encode(text):
            raise PosttrainError(str(path), f"converted, the tokenizer gives other ids for {text!r}", "those of sentencepiece", "Please report this.")
    tokenizer.save_pretrained(work)
    return tokenizer


def write_config(params: dict, places: list[Place], dtype: torch.dtype, tokenizer, work: Path) -> None:
    """config.json and generation_config.json."""
    from transformers import GenerationConfig, LlamaConfig

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=places[0].shape[0], hidden_size=params["dim"], intermediate_size=ffn_size(params),
                         num_hidden_layers=params["n_layers"], num_attention_heads=params["n_heads"], num_key_value_heads=params["n_kv_heads"],
                         rms_norm_eps=params["norm_eps"], max_position_embeddings=CONTEXT, tie_word_embeddings=False, dtype=dtype, **ends)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(work)
    GenerationConfig(**ends).save_pretrained(work)


def copy_licence(folders: list[Path], work: Path) -> str:
    """The download's licence files, and a README.md that names the Llama 2 licence where they hold it. Returns the licence's name, or 'unknown'."""
    found = False
    for folder in reversed(folders):  # the model's own last
        for path in sorted(p for p in folder.iterdir() if p.is_file() and is_licence(p.name)):
            text = path.read_text(encoding="utf-8", errors="replace")
            if "llama" in text.lower():  # the folder above may be anybody's
                shutil.copyfile(path, work / path.name)
                found = found or "LLAMA 2 COMMUNITY LICENSE" in text
    if not found:
        return "unknown"
    words = "Meta's Llama 2 download in transformers' layout, the weights unchanged."
    write_atomic(work / "README.md", f"---\nlicense: llama2\n---\n\n{words}\n\n{NOTICES['llama2'][0]}\n")
    return "llama2"
