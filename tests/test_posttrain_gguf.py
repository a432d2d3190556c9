"""GGUF files: transformers' own reader finds the exported model in them; llama.cpp, where it is installed, cuts text and answers as that model."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from posttrain import builtin, chat, export, gguf
from posttrain.errors import PosttrainError

pytest.importorskip("gguf")

TEXTS = ["Hello there, who are you?", "It's 12345 o'clock, we'll see 7 DAYS'LL pass\n\n\n  twice\tand  on ", "ünïcödé 日本語 😀 x²",
         "\n\nfoo_bar(x)==[1231]"]
PROMPTS = ["Why is the sky blue?", "What is 17 plus 25?", "Write two lines about 1789 and the rain's end.", "Name three rivers in Europe.",
           "Explain in one sentence what a compiler does.", "Hello! Who are you?"]
TIE = 0.1  # nats between two tokens, below which float16 arithmetic may choose either


def network(**more):
    """A random Llama with grouped-query attention, an untied head and heads wider than hidden/heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
              "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
              "initializer_range": 0.2} | more
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def byte_level(steps=None, ignore_merges=False, template="chatml", specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    """A byte-level tokenizer as the tiny model's, cutting text by `steps` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer = steps or pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    with open(builtin.__file__, encoding="utf-8") as f:
        lines = [*f, *TEXTS[:2], *["31 45"] * 50]  # so that 1231 shows whether numbers are cut in threes first
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=384, special_tokens=list(specials), show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=specials[1], eos_token=specials[2], pad_token=specials[0])
    chat.prepare(tokenizer, template, "x")
    return tokenizer


def llama_3():
    from tokenizers import Regex, pre_tokenizers

    steps = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(gguf.LLAMA_3), "isolated"),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return byte_level(steps, True, "llama-3", ("<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                               "<|end_header_id|>", "<|eot_id|>"))


def smollm():
    from tokenizers import pre_tokenizers

    return byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def sentence(template="llama-2", **more):
    """transformers' Llama 2 tokenizer, converted from a sentencepiece model of 384 pieces."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    import io
    import tempfile
    from pathlib import Path

    from transformers import LlamaTokenizer

    with open(builtin.__file__, encoding="utf-8") as f:
        text = [line for line in f if line.strip()]
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=made, vocab_size=384, model_type="bpe", byte_fallback=True,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
                                   allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(made.getvalue())
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, **more)
    chat.prepare(tokenizer, template, "x")
    return tokenizer


def written(folder, net, tokenizer, kind="f16"):
    """The model's folder with its GGUF file in it."""
    net.save_pretrained(folder)
    gguf.write(folder, folder / "m.gguf", kind, tokenizer, "a name", "x")
    return folder


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32).eval()


IDS = torch.tensor([[1, 17, 300, 42, 42, 199, 8, 77, 120, 5, 66, 2]])


# -- read by transformers ------------------------------------------------------------------------------------------------------------------------


def rounded(net):
    """With values that float16 holds."""
    for p in net.parameters():
        p.data = p.data.half().float()
    return net.eval()


def same_model(again, net):
    """Bit by bit, but for the norms' epsilon, which the file holds in float32."""
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {k: v.tolist() for k, v in net.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, net(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 4}], ids=["grouped", "tied"])
def test_f16_holds_the_model_itself(tmp_path, more):
    net = rounded(network(**more))
    again = load(written(tmp_path, net, byte_level()))
    same_model(again, net)
    assert again.config.tie_word_embeddings == net.config.tie_word_embeddings


def test_mistral_is_the_same_layout(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    net = rounded(MistralForCausalLM(MistralConfig(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                                   num_key_value_heads=2, head_dim=16, sliding_window=None, initializer_range=0.2)))
    same_model(load(written(tmp_path, net, byte_level())), net)


def test_q8_0_is_close_and_rows_of_odd_width_stay_f16(tmp_path):
    from gguf import GGUFReader

    net = network(intermediate_size=168)
    again = load(written(tmp_path, net, byte_level(), "q8_0"))
    with torch.no_grad():
        p, q = net(IDS).logits.log_softmax(-1), again(IDS).logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert 1e-8 < kl < 0.02
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.1.attn_norm.weight"] == types["output_norm.weight"] == "F32"


@pytest.mark.parametrize("make", [byte_level, smollm, llama_3, sentence])
def test_the_tokenizer_travels(tmp_path, make):
    from transformers import AutoTokenizer

    tokenizer = make()
    again = AutoTokenizer.from_pretrained(written(tmp_path, network(), tokenizer), gguf_file="m.gguf")
    assert (again.bos_token, again.eos_token, again.pad_token) == (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert again.chat_template == tokenizer.chat_template
    assert {t: again.get_vocab()[t] for t in tokenizer.get_vocab()} == tokenizer.get_vocab()
    if make is not smollm:  # which transformers reads without its cut at digits
        for text in TEXTS:
            assert again.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)


def fields(path):
    from gguf import GGUFReader

    return {k: f.contents() for k, f in GGUFReader(path).fields.items()}


def test_flags_and_special_tokens(tmp_path):
    makers = (byte_level, smollm, llama_3, sentence)
    told = {make.__name__: fields(written(tmp_path / make.__name__, network(), make()) / "m.gguf") for make in makers}
    assert [told[k]["tokenizer.ggml.pre"] for k in told] == ["gpt-2", "smollm", "llama-bpe", "default"]
    assert [told[k]["tokenizer.ggml.model"] for k in told] == ["gpt2", "gpt2", "gpt2", "llama"]
    assert told["sentence"]["tokenizer.ggml.add_space_prefix"] is True  # the Llama 2 format has a space before every [INST]
    assert told["sentence"]["tokenizer.ggml.add_bos_token"] is True
    assert told["byte_level"]["tokenizer.ggml.add_bos_token"] is False  # its template writes what its tokenizer never adds
    assert told["llama_3"]["tokenizer.ggml.eot_token_id"] == 5 != told["llama_3"]["tokenizer.ggml.eos_token_id"]
    assert "tokenizer.ggml.eot_token_id" not in told["byte_level"]
    assert told["byte_level"]["general.name"] == "a name" and told["byte_level"]["general.file_type"] == 1


def test_bos_and_space_are_those_of_a_chat():
    assert gguf.adds_bos(sentence()) and gguf.space_before_text(sentence())
    first = sentence(legacy=False)
    metaspace = first.backend_tokenizer.pre_tokenizer
    metaspace.prepend_scheme = "first"  # Mistral's: no space after the BOS that the template writes
    first.backend_tokenizer.pre_tokenizer = metaspace
    assert not gguf.space_before_text(first)


def test_rows_without_a_token_are_named(tmp_path):
    told = fields(written(tmp_path, network(vocab_size=390), byte_level()) / "m.gguf")
    assert told["tokenizer.ggml.tokens"][384:] == [f"[PAD{i}]" for i in range(384, 390)]
    assert told["tokenizer.ggml.token_type"][384:] == [5] * 6


def test_scaled_rotary_frequencies_are_llama_3s():
    """The factors by hand, from the published rule (meta-llama/llama-models, models/llama3/model.py, apply_scaling)."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    found = gguf.rope_factors(network(head_dim=32, rope_parameters=rope).config)
    waves = 2 * np.pi * 500000.0 ** (np.arange(16) / 16)
    smooth = (8192 / waves - 1) / 3
    want = np.where(waves < 2048, 1, np.where(waves > 8192, 8, 1 / ((1 - smooth) / 8 + smooth)))
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert len(set(want)) > 2 and gguf.rope_factors(network().config) is None


# -- refusals ------------------------------------------------------------------------------------------------------------------------------------


def test_other_layouts_get_llama_cpps_command():
    from transformers import LlamaConfig, Qwen2Config

    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    for config, what in ((Qwen2Config(), "the layout 'qwen2'"), (LlamaConfig(attention_bias=True), "'attention_bias'"),
                         (LlamaConfig(rope_parameters=yarn), "the rotary scaling 'yarn'"), (LlamaConfig(hidden_act="gelu"), "the activation 'gelu'")):
        with pytest.raises(PosttrainError, match=f"x.gguf: {what}.*`python convert_hf_to_gguf.py MODEL_FOLDER --outfile NAME-f16.gguf --outtype"):
            gguf.check(config, byte_level(), "x")


def test_an_unknown_cut_of_text_is_refused():
    from tokenizers import pre_tokenizers

    with pytest.raises(PosttrainError, match="cuts text by Whitespace, ByteLevel"):
        gguf.vocabulary(byte_level(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])), "x")
    with pytest.raises(PosttrainError, match="cuts text by ByteLevel"):
        gguf.vocabulary(byte_level(ignore_merges=True), "x")


def test_values_beyond_float16_are_refused(tmp_path):
    net = network()
    net.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PosttrainError, match=r"'blk\.1\.ffn_up\.weight' holds values beyond float16"):
        gguf.write(tmp_path, tmp_path / "m.gguf", "f16", byte_level(), "n", "x")
    gguf.write(tmp_path, tmp_path / "m.gguf", "q8_0", byte_level(), "n", "x")


# -- the stage -------------------------------------------------------------------------------------------------------------------------------------


def test_the_export_stage_writes_them_beside_the_safetensors(make_run, start):
    from transformers import AutoModelForCausalLM

    run = make_run({"chat": {"stage": "export", "model": "base", "gguf": ["f16", "q8_0"], "temperature": 0.5, "top_p": 0.75}}, name="small")
    section = start(run, "chat")
    export.run(section)
    folder = section.folder / "model"
    assert {"small-f16.gguf", "small-q8_0.gguf", "model.safetensors"} <= set(section.results()["files"])
    net, again = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval() for more in ({}, {"gguf_file": "small-f16.gguf"}))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, net(IDS).logits, rtol=0, atol=1e-6)
    told = fields(folder / "small-q8_0.gguf")
    assert [told[f"general.sampling.{k}"] for k in ("temp", "top_p", "top_k", "min_p")] == [0.5, 0.75, 0, 0.0]
    assert "`small-f16.gguf`, `small-q8_0.gguf`" in (folder / "README.md").read_text()
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in folder.iterdir())


def test_a_layout_that_is_not_written_stops_before_the_merge(make_run, start, monkeypatch, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(builtin.folder(builtin.TINY))
    config.attention_bias = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(builtin.folder(builtin.TINY)).save_pretrained(tmp_path / "base")
    run = make_run({"chat": {"stage": "export", "model": "base", "gguf": ["f16"]}}, model={"name_or_path": str(tmp_path / "base")})
    monkeypatch.setattr(export, "whole", lambda *_: pytest.fail("merged"))
    with pytest.raises(PosttrainError, match=r"chat\.gguf: 'attention_bias' is not written here"):
        export.run(start(run, "chat"))


def test_without_the_key_an_export_keeps_its_fingerprint(make_run):
    """A finished export of an earlier version is not made again."""
    run = make_run({"chat": {"stage": "export", "model": "base"}})
    assert [k for k in run.section("chat").inputs() if k.startswith("stages.chat.")] == [
        f"stages.chat.{k}" for k in ("stage", "model", "dtype", "folder", "temperature", "top_p", "max_new_tokens", "evaluation")]
    more = make_run({"chat": {"stage": "export", "model": "base", "gguf": ["f16"]}})
    assert more.section("chat").fingerprint != run.section("chat").fingerprint


# -- llama.cpp -------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    """llama(path) -> the model in llama.cpp, with the logits of every position."""
    package = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python (it compiles for some minutes)")
    opened = []

    def read(path):
        opened.append(package.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False))
        return opened[-1]

    yield read
    for model in opened:
        model.close()


def logits_of(model, ids):
    model.reset()
    model.eval(ids)
    return torch.tensor(np.array(model.scores[:len(ids)]))


def chat_ids(model, told, text, bos):
    """Ids of a rendered chat as llama.cpp's server makes them: a BOS that the template wrote goes where the flag adds one."""
    add = told["tokenizer.ggml.add_bos_token"]
    return model.tokenize(text.removeprefix(bos).encode() if add else text.encode(), add_bos=add, special=True)


@pytest.mark.parametrize("make", [byte_level, smollm, llama_3, sentence])
def test_llama_cpp_cuts_text_as_training_did(tmp_path, llama, make):
    tokenizer = make()
    model, told = llama(written(tmp_path, network(), tokenizer) / "m.gguf"), fields(tmp_path / "m.gguf")
    for text in TEXTS:
        if text[0] != "\n" or make is not sentence:
            assert model.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text, add_special_tokens=False), text
    for dialogue in (gguf.DIALOGUE, gguf.DIALOGUE[:1], [{"role": "system", "content": "Be brief."}, *gguf.DIALOGUE]):
        ids = chat.encode_prompt(tokenizer, dialogue)
        text = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        assert chat_ids(model, told, text, tokenizer.bos_token) == ids
    assert model.detokenize(tokenizer.encode(TEXTS[0], add_special_tokens=False)).decode().strip() == TEXTS[0]


@pytest.mark.parametrize("more", [{}, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                                           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
                                  {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}], ids=["plain", "scaled", "theta"])
def test_llama_cpp_computes_the_same_logits(tmp_path, llama, more):
    net = network(initializer_range=0.05, **more)
    ids = torch.randint(3, 384, (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = net(ids).logits[0].log_softmax(-1)
    theirs = logits_of(llama(written(tmp_path, net, byte_level()) / "m.gguf"), ids[0].tolist()).log_softmax(-1)
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 1e-5
    assert (ours - theirs).abs().max() < 0.03 < ours.std()


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """The folder of an exported run on the real small model: an adapter merged, f16 and q8_0 beside it."""
    from posttrain.config import load_recipe
    from posttrain.models import Roles
    from posttrain.runs import Run

    folder = tmp_path_factory.mktemp("smol")
    (folder / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    recipe = {"run": {"name": "smol", "dir": str(folder / "runs"), "threads": 1},
              "model": {"name_or_path": builtin.SMOLLM2, "chat_template": "chatml", "lora": {"r": 4, "alpha": 8}},
              "data": {"rows": [{"path": "rows.jsonl", "format": "messages"}]},
              "stages": {"sft": {"data": "rows"}, "chat": {"stage": "export", "model": "@sft", "gguf": ["f16", "q8_0"]}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run = Run(load_recipe(folder / "recipe.yaml"))
    sft, section = run.section("sft"), run.section("chat")
    run.start(sft)
    roles = Roles(run.recipe.model, torch.float32, "x")
    roles.add("policy", fresh_adapter=True)
    generator = torch.Generator().manual_seed(5)
    for name, p in roles.base.named_parameters():
        if ".policy." in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.02
    roles.save("policy", sft.folder / "model")
    sft.finish({"steps": 1})
    del roles
    run.start(section)
    export.run(section)
    return section.folder / "model"


@pytest.mark.smollm2
def test_llama_cpp_answers_as_the_merged_model(llama, smol):
    """Greedy tokens on a fixed prompt set: f16 the same up to ties; q8_0 close in its probabilities along the merged model's answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, net = AutoTokenizer.from_pretrained(smol), AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    models = {kind: llama(smol / f"smol-{kind}.gguf") for kind in ("f16", "q8_0")}
    same, kl = 0, {"f16": [], "q8_0": []}
    for prompt in PROMPTS:
        ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
        with torch.no_grad():
            whole = net.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0].tolist()
            ours = net(torch.tensor([whole])).logits[0].log_softmax(-1)
        for kind, model in models.items():
            theirs = logits_of(model, whole).log_softmax(-1)
            kl[kind].append((ours.exp() * (ours - theirs)).sum(-1)[len(ids) - 1:].mean().item())
            if kind == "f16":  # teacher-forced along our answer: each of its tokens is theirs too, or ties with it
                at, want = range(len(ids) - 1, len(whole) - 1), whole[len(ids):]
                picked = [theirs[i].argmax().item() for i in at]
                assert all(p == w or ours[i][w] - ours[i][p] < TIE for i, p, w in zip(at, picked, want, strict=True))
                same += sum(p == w for p, w in zip(picked, want, strict=True)) / len(want)
    assert same / len(PROMPTS) > 0.97
    assert np.mean(kl["f16"]) < 1e-4 < np.mean(kl["q8_0"]) < 0.03
    answer = models["f16"].create_chat_completion([{"role": "user", "content": PROMPTS[0]}], max_tokens=12, temperature=0.0)
    assert answer["choices"][0]["message"]["content"].strip()
