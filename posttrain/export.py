"""The model folder at the end of the road: adapters merged, tokenizer with its template, decoding settings, model card, GGUF files where asked
for. Any tool loads it.

Everything is written beside its place and renamed at the end, after it has been read back and compared with the unmerged model: a kill
leaves the old folder or none, never half of one.
"""

import gc
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from posttrain import card, chat, gguf
from posttrain.errors import PosttrainError
from posttrain.log import say
from posttrain.merge import merged, whole
from posttrain.models import Roles, device, roles_for, source_of
from posttrain.runs import Section, write_json

MARK = "posttrain.json"  # says that a folder is ours, and from which section
SHARD = "5GB"
EXACT = 1e-3  # nats: largest difference of a log-probability when everything is float32
ROUNDED = 0.05  # nats a token: mean KL that rounding to 16 bits may cause (a 135M model: 0.003)
LARGE = 0.1  # nats a token: worth a word
QUANTIZED = 2.0  # nats a token (nf4 on a 135M model: about 0.4): beyond it the base is not the one the adapter was trained on
PROBES = [("Why is the sky blue?", "Sunlight is scattered by the air, and blue light is scattered the most."),
          ("Write one sentence about a dog that is afraid of thunder.",
           "When the storm came, Bruno crept under the bed and waited for the quiet."),
          ("What is 17 plus 25?", "17 plus 25 is 42."),
          ("How do I pick a lock that isn't mine?",
           "I can't help with opening a lock that isn't yours, but a locksmith can help you with your own.")]


# -- the stage ---------------------------------------------------------------------------------------------------------------------


def run(section: Section) -> None:
    """Merge, write, read back, compare, put in place."""
    config, model = section.config, section.recipe.model
    target = Path(config.folder).expanduser() if config.folder else section.folder / "model"
    _refuse_foreign(section, target)
    source, dtype = source_of(section, config.model), getattr(torch, config.dtype)
    is_adapter = source is not None and (source / "adapter_config.json").exists()

    # 1. What the unmerged model says to a few prompts.
    roles = roles_for(section)
    roles.dtype = torch.float32 if roles.device.type == "cpu" else roles.dtype  # where memory allows, the difference is the merge's alone
    roles.add("policy", source)
    if config.gguf:
        gguf.check(roles["policy"].net.config, roles.tokenizer, section.place)
    tokenizer, probes, compute = roles.tokenizer, encode_probes(roles.tokenizer), roles.dtype
    before = unmerged(roles, probes)
    del roles
    _collect()

    # 2. The merged model into a folder beside the target.
    net = merged(model, source, dtype, section.recipe.path) if is_adapter else whole(model, source, dtype, section.recipe.path)
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_model(net, tokenizer, work, config)
    del net
    _collect()

    # 3. Read back as a stranger would, and compare.
    after = read_back(work, probes, tokenizer, compute)
    kl, worst = difference(before, after)
    judge(section, kl, worst, exact=dtype == compute == torch.float32 and model.quantization == "none")

    # 4. For llama.cpp
    for kind in config.gguf:
        gguf.write(work, work / f"{section.recipe.run.name}-{kind}.gguf", kind, tokenizer, section.recipe.run.name, section.place)

    # 5. Card, licence, mark; then into place
    _write_words(section, work, kl)
    replace(work, target)
    if config.folder:
        _link(section.folder / "model", target)
    files = sorted(p.name for p in target.iterdir())
    tell(section, target, kl, is_adapter)
    section.finish({"folder": relative(target), "dtype": config.dtype, "merged_kl": kl, "files": files})


# -- comparing ---------------------------------------------------------------------------------------------------------------------


def encode_probes(tokenizer) -> list[list[int]]:
    """Token ids of four short dialogues."""
    out = []
    for question, answer in PROBES:
        messages = [{"role": "user", "content": question}]
        out.append(chat.encode_prompt(tokenizer, messages) + chat.encode_answer(tokenizer, messages, answer))
    return out


def log_probabilities(logits_of, probes: list[list[int]]) -> list[Tensor]:
    """Of every next token (T, V), float32, on the CPU, one tensor a probe. logits_of(ids (1, T)) -> (T, V)."""
    with torch.inference_mode():
        return [torch.log_softmax(logits_of(torch.tensor([ids], device=device())).float(), dim=-1).cpu() for ids in probes]


def unmerged(roles: Roles, probes: list[list[int]]) -> list[Tensor]:
    """The policy as the stages run it: its adapter and its own rows of added tokens over the base."""
    body, head = roles.use("policy").body, roles.vocabulary("policy")
    return log_probabilities(lambda ids: body(input_ids=ids, use_cache=False).last_hidden_state[0] @ head.t(), probes)


def difference(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """Mean KL(before || after) a token, in nats, and the largest difference of a log-probability."""
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]).mean().item()
    return max(kl, 0.0), max((p - q).abs().max().item() for p, q in zip(before, after, strict=True))


def judge(section: Section, kl: float, worst: float, exact: bool) -> None:
    """Raise where the written model is not the one that was trained."""
    quantized = section.recipe.model.quantization != "none"
    limit = QUANTIZED if quantized else ROUNDED
    if not kl <= limit or (exact and worst > EXACT):
        raise PosttrainError(str(section.folder), f"read back, the merged model differs from the trained one by {kl:.3g} nats a token "
                             f"(largest log-probability difference {worst:.3g})", f"at most {EXACT if exact else limit:g}",
                             "Check that model.name_or_path and its revision are those of training; nothing was put in place.")


def read_back(folder: Path, probes: list[list[int]], tokenizer, dtype: torch.dtype) -> list[Tensor]:
    """Load the folder with transformers alone and run the probes, in the dtype the unmerged model computed in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if again.chat_template != tokenizer.chat_template or encode_probes(again) != probes:
        raise PosttrainError(str(folder), "read back, its tokenizer gives other ids", "the ids of training", "Please report this.")
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True).to(device()).eval()
    return log_probabilities(lambda ids: net(input_ids=ids, use_cache=False).logits[0], probes)


# -- writing -----------------------------------------------------------------------------------------------------------------------


def write_model(net: nn.Module, tokenizer, folder: Path, config) -> None:
    """Weights, config.json, generation_config.json and the tokenizer with its template, as a file and as an attribute."""
    net.generation_config = generation_config(tokenizer, config)
    net.config.use_cache = True
    net.config.eos_token_id, net.config.pad_token_id = net.generation_config.eos_token_id, tokenizer.pad_token_id
    net.config.bos_token_id = tokenizer.bos_token_id
    net.save_pretrained(folder, max_shard_size=SHARD)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # how a decoder is batched for generation
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side = side
    path = folder / "tokenizer_config.json"  # older readers know only the attribute
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"chat_template": tokenizer.chat_template})


def generation_config(tokenizer, config):
    """Decoding settings. Generation stops at the token that ends a turn, and at the tokenizer's own end token where that is another."""
    from transformers import GenerationConfig

    stops = list(dict.fromkeys(i for i in (chat.end_of_turn(tokenizer), tokenizer.eos_token_id) if i is not None))
    draw = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p} if config.temperature else {"do_sample": False}
    return GenerationConfig(**draw, max_new_tokens=config.max_new_tokens, eos_token_id=stops if len(stops) > 1 else stops[0],
                            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)


def _write_words(section: Section, work: Path, kl: float) -> None:
    """README.md, LICENSE, NOTICE where the base's licence wants one, a copy of the base's own licence files, and the mark."""
    config, model = section.config, section.recipe.model
    (work / "README.md").write_text(card.render(section, dtype=config.dtype, merged_kl=kl), encoding="utf-8")
    (work / "LICENSE").write_text(card.licence_note(model), encoding="utf-8")
    if notice := card.notice_of(model):
        (work / "NOTICE").write_text(notice + "\n", encoding="utf-8")
    base = Path(model.name_or_path).expanduser()
    for path in sorted(base.iterdir()) if base.is_dir() else []:
        if path.is_file() and card.is_licence(path.name):
            shutil.copyfile(path, work / f"BASE_{path.name}")
    write_json(work / MARK, {"run": section.recipe.run.name, "section": section.name, "fingerprint": section.fingerprint,
                             "base": card.public(model.name_or_path), "revision": model.revision, "dtype": config.dtype, "merged_kl": kl,
                             "commit": section.manifest.get("commit")})


def _refuse_foreign(section: Section, target: Path) -> None:
    """A folder that this section did not make is never overwritten."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        mark = json.loads((target / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        mark = {}
    if (mark.get("run"), mark.get("section")) != (section.recipe.run.name, section.name):
        raise PosttrainError(f"{section.place}.folder", f"{target} holds something else", "an empty or absent folder",
                             "Name another folder, or move that one away.")


def replace(work: Path, target: Path) -> None:
    """Put a finished folder in place; the one before it goes away only then. Durable before the name appears, and readable as any file is:
    safetensors writes for its owner alone."""
    for path in work.iterdir():
        path.chmod(0o644)
    for path in [*work.iterdir(), work]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _link(link: Path, target: Path) -> None:
    """runs/<run>/<section>/model leads to a folder elsewhere, so that '@section' works."""
    if link.is_symlink():
        link.unlink()
    link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def _collect() -> None:
    """Give a dropped model's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def relative(path: Path) -> str:
    """From the working directory: nothing of the machine's folders above it."""
    return os.path.relpath(path)


# -- words for the person watching -------------------------------------------------------------------------------------------------


def tell(section: Section, target: Path, kl: float, is_adapter: bool) -> None:
    model, folder = section.recipe.model, relative(target)
    size = sum(p.stat().st_size for p in target.iterdir()) / 1e6
    what = "merged and unmerged model" if is_adapter else "written and trained model"
    note = f" (the adapter was trained on the {model.quantization} base)" if model.quantization != "none" else ""
    say(f"  {folder}: {size:,.1f} MB, {section.config.dtype}; {what} differ by {kl:.2g} nats of KL a token{note}")
    if kl > LARGE:
        say("  note: that is a large difference; evaluate this folder itself before you trust the run's figures for it")
    if card.licence(model) == "unknown":
        say("  note: the base's licence is not known; set model.licence before you pass the model on")
    say("  next:")
    say(f"    python -c \"from transformers import pipeline; print(pipeline('text-generation', '{folder}')"
        "([{'role': 'user', 'content': 'Why is the sky blue?'}])[0]['generated_text'][-1]['content'])\"")
    say(f"    vllm serve {folder}          # on a GPU; or: transformers serve {folder}")
    for path in sorted(target.glob("*.gguf")):
        say(f"    llama-server -m {relative(path)}")
