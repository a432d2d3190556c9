"""The same work for both sides of a sampling or training benchmark: lengths drawn beforehand, texts of exactly these lengths,
answers that end at their length whoever samples them, a reward adapter, and a digest of what each side loaded.

Lengths: 'fixed', every prompt and answer `mean` tokens; 'chat', lognormal with that mean, a prompt with sigma 0.6 and an answer with
sigma 0.8, at most four times the mean. A prompt's length counts the template's tokens.
"""

import hashlib
import json
import math
import random
from pathlib import Path

from posttrain.errors import PosttrainError

MODELS = {"smollm2": "builtin:smollm2-135m-instruct"}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SIGMA = {"prompt": 0.6, "answer": 0.8}


def make_tiny(folder: Path) -> str:
    """A random Llama of 4 layers, width 256, feed-forward 688, 4 heads, 49,152 rows of vocabulary, with builtin:tiny-llama's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from posttrain import builtin

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                         max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin.folder(builtin.TINY)).save_pretrained(folder)
    return str(folder)


def base_model(name: str, folder: Path) -> str:
    """--model as a folder or hub name."""
    from posttrain.models import resolve

    return make_tiny(folder / "model") if name == "tiny" else resolve(MODELS.get(name, name), "bench: --model")


def tokenizer_of(base: str):
    """The tokenizer as our stages use it."""
    from posttrain.config import ModelConfig
    from posttrain.models import load_tokenizer

    return load_tokenizer(ModelConfig(name_or_path=base, chat_template="chatml"), "bench")


def roles_of(base: str, dtype: str):
    """Roles on the base with the adapters of every benchmark here: rank 16 on all linear layers."""
    import torch

    from posttrain.config import ModelConfig
    from posttrain.models import Roles

    return Roles(ModelConfig(name_or_path=base, dtype=dtype, chat_template="chatml", lora={"r": 16, "alpha": 32}), getattr(torch, dtype), "bench")


def draw(kind: str, n: int, samples: int, mean: int, seed: int, least: int) -> list[tuple[int, list[int]]]:
    """(prompt tokens, tokens of each answer) of n prompts. least: tokens of the shortest prompt that can be rendered."""
    rng = random.Random(f"{kind}-{seed}")

    def one(what: str, floor: int) -> int:
        if kind == "fixed":
            return max(mean, floor)
        return min(max(round(rng.lognormvariate(math.log(mean) - SIGMA[what] ** 2 / 2, SIGMA[what])), floor), 4 * mean)

    return [(one("prompt", least), [one("answer", 2) for _ in range(samples)]) for _ in range(n)]


class Words:
    """Texts of random words, fitted to exact numbers of tokens."""

    def __init__(self, tokenizer, seed: int):
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        known = sorted(t[1:] for t in tokenizer.get_vocab() if t[0] == "Ġ" and t[1:].isascii() and t[1:].isalpha())
        self.words = [w for w in known if len(tokenizer.encode(" " + w, add_special_tokens=False)) == 1]

    def least(self) -> int:
        """Tokens of a prompt of one short word, and one to spare."""
        return min(self._tokens("a"), self._tokens(self.words[0])) + 1

    def _tokens(self, text: str) -> int:
        from posttrain import chat

        return len(chat.encode_prompt(self.tokenizer, [{"role": "user", "content": text}]))

    def prompt(self, tokens: int) -> str:
        """A user's text whose rendered prompt has exactly this many tokens."""
        for _ in range(200):
            first = self.rng.choice([*self.words, "a"])
            rest = tokens - self._tokens(first)
            text = " ".join([first, *self.rng.choices(self.words, k=max(rest, 0))])
            if self._tokens(text) == tokens:
                return text
        raise PosttrainError("bench: --mean", f"no text of {tokens} tokens with the template", "a few dozen tokens", "Raise --mean.")

    def answer(self, tokens: int) -> str:
        """A text of about this many tokens, the token that ends the turn included."""
        return " ".join(self.rng.choices(self.words, k=max(tokens - 1, 1)))


# -- answers that end at a given length -------------------------------------------------------------------------------------------


def end_ours_at(lengths: dict[tuple[int, ...], list[int]]) -> None:
    """In this process, `posttrain.generate.sample` ends the k-th answer to a prompt after lengths[prompt ids][k] tokens, and never
    because of a token."""
    from posttrain import generate

    plain = getattr(generate.Loop, "plain", generate.Loop)

    class Forced(plain):
        def _choose(self, hidden, rows):
            self.stop, owners = -1, [self.rows[r] for r in rows]
            super()._choose(hidden, rows)
            for row, (p, s) in zip(rows, owners, strict=True):
                if len(self.ids[p][s]) >= lengths[tuple(self.prompts[p])][s]:
                    self.rows[row], self.lengths[row] = None, 0

    Forced.plain, generate.Loop = plain, Forced


def end_hf_at(model, lengths: dict[tuple[int, ...], list[int]], count=None) -> None:
    """The same for a transformers model's `generate`, by the stopping criterion that its users have: a finished row is padded, as
    after its end token, and the batch goes on to its longest row. count(tokens, seconds): called after each batch."""
    import time

    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    plain = model.generate

    class EndAt(StoppingCriteria):
        eos_token_id = None  # an attribute of this name makes `generate` pad finished rows

        def __init__(self, totals):
            self.totals = totals

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= self.totals

    def generate(input_ids, attention_mask, **kwargs):
        start, wanted = time.perf_counter(), []
        for row, on in zip(input_ids, attention_mask.bool(), strict=True):
            wanted += lengths[tuple(row[on].tolist())][:kwargs.get("num_return_sequences", 1)]
        ends = torch.tensor(wanted, device=input_ids.device) + input_ids.shape[1]
        out = plain(input_ids=input_ids, attention_mask=attention_mask, stopping_criteria=StoppingCriteriaList([EndAt(ends)]), **kwargs)
        if count:
            made = getattr(out, "sequences", out)[:, input_ids.shape[1]:] != model.generation_config.pad_token_id
            count(int((made * torch.arange(1, made.shape[1] + 1, device=made.device)).amax(1).sum()), time.perf_counter() - start)
        return out

    model.generate = generate


# -- models -----------------------------------------------------------------------------------------------------------------------


def make_adapter(base: str, folder: Path, head: str | None, seed: int) -> None:
    """An adapter whose B is not zero, with a new scalar head where `head` is 'new', saved as our stages save theirs."""
    import torch

    roles = roles_of(base, "float32")
    role = roles.add("made", fresh_adapter=True, head=head, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in role.net.named_parameters():
        if ".made." in name and "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.005
    roles.save("made", folder)


def digest(body, adapter: str, dtype, head=None) -> str:
    """Of a body's weights with one of its adapters and a head, rounded to a dtype: equal where two sides loaded the same."""
    import torch

    named = {n.replace(f".{adapter}.", ".").replace(".base_layer", ""): p for n, p in body.named_parameters()
             if "lora_" not in n or f".{adapter}." in n}
    h = hashlib.sha256()
    for name in sorted(named):
        h.update(name.encode() + named[name].detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    if head is not None:
        h.update(head.weight.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def shape_at(base: str):
    from posttrain.shape import shape_of

    return shape_of(json.loads((Path(base) / "config.json").read_text()))
