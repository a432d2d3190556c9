"""What the tests of Ghost Attention share: a policy that ends its answers, made once a session, and recipes with it."""

import json
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain import chat
from posttrain.config import ModelConfig, load_recipe
from posttrain.models import load_tokenizer
from posttrain.runs import Run

MODEL = {"name_or_path": "builtin:tiny-llama", "dtype": "float32", "chat_template": "chatml", "lora": {"r": 4, "alpha": 8}}
THINGS = ["bread", "glass", "the moon", "a kite", "salt", "rain", "a bell", "paper", "honey", "ice"]
ANSWERS = ["Yes.", "No.", "A thing.", "It is."]
LETTERS = "aeostnr"


def talk(i: int, turns: int) -> dict:
    """A dialogue whose every text is its own."""
    out = []
    for t in range(turns):
        out += [{"role": "user", "content": f"{i}.{t} What of {THINGS[(i + 3 * t) % 10]}?"},
                {"role": "assistant", "content": f"{ANSWERS[(i + t) % 4]} ({i}.{t})"}]
    return {"messages": out}


@cache
def policy(base: Path) -> Path:
    """A model folder whose answers are a few random letters and an end, whatever was asked: nothing to train. base: where pytest keeps this
    session's folders.

    The first hidden dimension is the same everywhere and nothing writes to it, so that the first column of the vocabulary head is a bias.
    """
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ModelConfig(**MODEL), "test")
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                       num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False, initializer_range=0.05))
    with torch.no_grad():
        net.model.embed_tokens.weight[:, 0] = 8.0
        for layer in net.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        net.lm_head.weight.mul_(10)[:, 0] = -4.0
        net.lm_head.weight[[tokenizer.encode(c)[0] for c in LETTERS], 0] = 0.0
        net.lm_head.weight[chat.end_of_turn(tokenizer), 0] = 0.05
    net.save_pretrained(base / "gatt-policy")
    return base / "gatt-policy"


def make_run(factory, folder: Path, stages: dict, seed: int = 0, rows: list[dict] | None = None, held_out: int = 10) -> Run:
    """A Run in `folder` with the data set `talks`: 30 dialogues of one to three turns. In stages '@policy' stands for the policy's folder."""
    rows = [talk(i, 1 + i % 3) for i in range(30)] if rows is None else rows
    (folder / "talks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    written = {"run": {"name": "t", "seed": seed, "dir": str(folder), "threads": 1}, "model": MODEL,
               "data": {"talks": [{"path": "talks.jsonl", "format": "messages"}], "held_out": {"demonstrations": held_out}}, "stages": stages}
    text = json.dumps(written).replace("@policy", str(policy(factory.getbasetemp())))
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return Run(load_recipe(path))
