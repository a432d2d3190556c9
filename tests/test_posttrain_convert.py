"""Meta's Llama 2 layout -> transformers': the same logits as Meta's model, which is written again here and reads the shards itself."""

import hashlib
import json
import shutil

import pytest
import torch

from posttrain import builtin, convert
from posttrain.config import ModelConfig
from posttrain.errors import PosttrainError

spm = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")

PARAMS = {"dim": 48, "n_layers": 3, "n_heads": 6, "multiple_of": 16, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "vocab_size": -1}
FFN = 176  # 4 * 48 = 192; two thirds: 128; times 1.3: 166; up to a multiple of 16
VOCAB = 420
LICENCE = "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023\n"


# -- Meta's model (meta-llama/llama, llama/model.py), written again: each shard computes its part, as Meta's processes do ---------------------


class MetaModel:
    """Rows-split layers join their outputs, columns-split ones add them; queries and keys turn as complex numbers of neighbouring values."""

    def __init__(self, folder):
        self.params = json.loads((folder / "params.json").read_text())
        self.shards = [torch.load(p, weights_only=True) for p in sorted(folder.glob("consolidated.*.pth"))]
        self.shards = [{k: v.float() for k, v in s.items()} for s in self.shards]

    def rows(self, x, name):
        return torch.cat([x @ s[name].T for s in self.shards], dim=-1)

    def columns(self, x, name):
        return sum(part @ s[name].T for s, part in zip(self.shards, x.chunk(len(self.shards), dim=-1), strict=True))

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.params["norm_eps"]) * self.shards[0][name]

    def turn(self, x):
        """x (T, heads, width)."""
        width = x.shape[-1]
        angles = torch.outer(torch.arange(len(x)).float(), 1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width))
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    def logits(self, ids):
        """ids (T,) -> (T, vocabulary)."""
        p, x = self.params, torch.cat([s["tok_embeddings.weight"][ids] for s in self.shards], dim=-1)
        width, mask = p["dim"] // p["n_heads"], torch.full((len(ids), len(ids)), float("-inf")).triu(1)
        for i in range(p["n_layers"]):
            at, h = f"layers.{i}.attention.", self.norm(x, f"layers.{i}.attention_norm.weight")
            q, k, v = (self.rows(h, f"{at}{n}.weight").view(len(ids), -1, width) for n in ("wq", "wk", "wv"))
            q, k = self.turn(q), self.turn(k)
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / width ** 0.5 + mask
            x = x + self.columns(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), f"{at}wo.weight")
            ff, h = f"layers.{i}.feed_forward.", self.norm(x, f"layers.{i}.ffn_norm.weight")
            x = x + self.columns(torch.nn.functional.silu(self.rows(h, f"{ff}w1.weight")) * self.rows(h, f"{ff}w3.weight"), f"{ff}w2.weight")
        return self.rows(self.norm(x, "norm.weight"), "output.weight")


# -- a synthetic download ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    """A sentencepiece model with Llama 2's settings."""
    folder = tmp_path_factory.mktemp("spm")
    with open(builtin.__file__, encoding="utf-8") as f:
        text = [line for line in f if line.strip()]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
        allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    return folder / "tokenizer.model"


def download(root, tokenizer_model, *, shards=2, kv_heads=None, dtype=torch.float32, params=None):
    """What Meta's download script leaves: llama-2-tiny/ with the shards, and tokenizer.model, LICENSE and a checklist beside it."""
    folder = root / "llama-2-tiny"
    folder.mkdir(parents=True)
    params = PARAMS | ({"n_kv_heads": kv_heads} if kv_heads else {}) | (params or {})
    (folder / "params.json").write_text(json.dumps(params))
    generator = torch.Generator().manual_seed(4)
    dim, kv = 48, 8 * (kv_heads or 6)
    shapes = {"tok_embeddings.weight": (VOCAB, dim, 1), "norm.weight": (dim, 0, None), "output.weight": (VOCAB, dim, 0)}
    for i in range(3):
        shapes |= {f"layers.{i}.{k}.weight": v for k, v in {
            "attention.wq": (dim, dim, 0), "attention.wk": (kv, dim, 0), "attention.wv": (kv, dim, 0), "attention.wo": (dim, dim, 1),
            "feed_forward.w1": (FFN, dim, 0), "feed_forward.w2": (dim, FFN, 1), "feed_forward.w3": (FFN, dim, 0),
            "attention_norm": (dim, 0, None), "ffn_norm": (dim, 0, None)}.items()}
    held = [{"rope.freqs": torch.ones(4)} for _ in range(shards)]
    for name, (rows, columns, split) in shapes.items():
        whole = torch.randn((rows, columns), generator=generator) * 0.3 if columns else 1 + 0.2 * torch.randn(rows, generator=generator)
        for i, part in enumerate([whole] * shards if split is None else whole.chunk(shards, dim=split)):
            held[i][name] = part.to(dtype).clone()
    for i, shard in enumerate(held):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    shutil.copy(tokenizer_model, root)
    (root / "LICENSE").write_text(LICENCE)
    (root / "USE_POLICY.md").write_text("# Llama 2 Acceptable Use Policy\n")
    write_sums(folder)
    return folder


def write_sums(folder):
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".json"))
    (folder / "checklist.chk").write_text("".join(f"{hashlib.md5((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names))


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


IDS = [1, 17, 300, 42, 42, 419, 8, 77, 120, 5, 66, 2]


# -- weights -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "kv_heads"), [(1, None), (2, None), (2, 2), (1, 3)])
def test_logits_are_those_of_metas_model(tmp_path, tokenizer_model, shards, kv_heads):
    folder = download(tmp_path, tokenizer_model, shards=shards, kv_heads=kv_heads)
    convert.run(folder, tmp_path / "out")
    net = load(tmp_path / "out")
    assert (net.config.num_key_value_heads, net.config.intermediate_size) == (kv_heads or 6, FFN)
    assert (net.config.max_position_embeddings, net.config.tie_word_embeddings, net.config.rms_norm_eps) == (4096, False, 1e-5)
    with torch.no_grad():
        ours, metas = net(torch.tensor([IDS])).logits[0], MetaModel(folder).logits(torch.tensor(IDS))
    assert metas.std() > 0.5  # the comparison has something to compare
    torch.testing.assert_close(ours, metas, atol=2e-5, rtol=1e-4)


def test_the_stored_dtype_stays_and_files_are_cut(tmp_path, tokenizer_model, monkeypatch):
    from safetensors import safe_open

    folder = download(tmp_path, tokenizer_model, kv_heads=2, dtype=torch.bfloat16)
    monkeypatch.setattr(convert, "FILE_BYTES", 50_000)
    convert.run(folder, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 3 and set(index.values()) == {f.name for f in files}
    for f in files:
        with safe_open(f, "pt") as tensors:
            names = tensors.keys()
            assert all(index[n] == f.name and tensors.get_tensor(n).dtype == torch.bfloat16 for n in names)
            assert sum(tensors.get_tensor(n).nbytes for n in names) <= 50_000
    net = load(tmp_path / "out", "auto")
    assert net.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(net.float()(torch.tensor([IDS])).logits[0], MetaModel(folder).logits(torch.tensor(IDS)), atol=2e-5, rtol=1e-4)


def test_names_and_shapes_are_those_transformers_expects(tmp_path, tokenizer_model):
    from transformers import AutoConfig, AutoModelForCausalLM

    convert.run(download(tmp_path, tokenizer_model, kv_heads=2), tmp_path / "out")
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out")).state_dict()
    params = convert.read_params(tmp_path / "llama-2-tiny")
    assert {p.name: p.shape for p in convert.layout(params, VOCAB, tmp_path)} == {k: tuple(v.shape) for k, v in wanted.items()}


@pytest.mark.parametrize(("params", "size"), [
    ({"dim": 4096, "multiple_of": 256}, 11008), ({"dim": 5120, "multiple_of": 256}, 13824),
    ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672)])
def test_published_sizes(params, size):
    """Llama 2 7B, 13B, 70B."""
    assert convert.ffn_size(params) == size


# -- tokenizer and words -----------------------------------------------------------------------------------------------------------------------


def test_tokenizer_gives_sentencepieces_ids_and_the_recipe_reads_the_folder(tmp_path, tokenizer_model):
    from posttrain.card import licence
    from posttrain.models import Roles

    convert.run(download(tmp_path, tokenizer_model), tmp_path / "out")
    model = spm.SentencePieceProcessor(model_file=str(tokenizer_model))
    config = ModelConfig(name_or_path=str(tmp_path / "out"), chat_template="llama-2")
    roles = Roles(config, torch.float32, "x")
    roles.add("base")
    text = "def f(x):\n    return 'é 日本' + str(x + 12)  # two  spaces"
    assert roles.tokenizer.encode(text) == [1, *model.encode(text)]
    assert (roles.tokenizer.bos_token_id, roles.tokenizer.eos_token_id, len(roles.tokenizer)) == (1, 2, VOCAB)
    assert licence(config) == "llama2"
    assert (tmp_path / "out" / "LICENSE").read_text() == LICENCE and (tmp_path / "out" / "USE_POLICY.md").exists()


def test_a_stranger_licence_in_the_folder_above_is_left_alone(tmp_path, tokenizer_model, capsys):
    folder = download(tmp_path, tokenizer_model)
    (tmp_path / "LICENSE").write_text("MIT License")
    convert.run(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").exists() and not (tmp_path / "out" / "README.md").exists()
    assert "set model.licence" in capsys.readouterr().out


# -- refusals ----------------------------------------------------------------------------------------------------------------------------------


def refused(folder, out, words):
    with pytest.raises(PosttrainError, match=words):
        convert.run(folder, out)
    assert not out.exists() or not (out / "config.json").exists()
    assert not list(out.parent.glob(".out*"))


def test_what_is_missing_is_named(tmp_path, tokenizer_model):
    def fresh(name):
        folder = download(tmp_path / name, tokenizer_model)
        (folder / "checklist.chk").unlink()
        return folder, tmp_path / name / "out"

    folder, out = fresh("a")
    (folder / "consolidated.00.pth").unlink()
    refused(folder, out, r"no consolidated\.00\.pth")
    folder, out = fresh("b")
    (folder / "params.json").unlink()
    refused(folder, out, r"params\.json: no such file")
    folder, out = fresh("c")
    (tmp_path / "c" / "tokenizer.model").unlink()
    refused(folder, out, r"no tokenizer\.model")
    folder, out = fresh("d")  # the last one is missing: nothing but the shapes can tell
    (folder / "consolidated.01.pth").unlink()
    refused(folder, out, r"'tok_embeddings\.weight' is \(420, 24\).*\(420, 48\) in one of 1 shards.*no shard is missing")


def test_the_checklist_is_checked(tmp_path, tokenizer_model):
    folder = download(tmp_path, tokenizer_model)
    path = folder / "consolidated.01.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    refused(folder, tmp_path / "out", r"consolidated\.01\.pth: its MD5 is")
    path.unlink()
    refused(folder, tmp_path / "out", r"consolidated\.01\.pth: missing, though checklist\.chk names it")
    path.write_bytes(whole)
    (tmp_path / "tokenizer_checklist.chk").write_text(f"{'0' * 32}  tokenizer.model\n")
    refused(folder, tmp_path / "out", r"tokenizer\.model: its MD5 is")


@pytest.mark.parametrize(("params", "told"), [
    ({"rope_theta": 500000.0, "vocab_size": 128256}, r"a Llama 3 model \(rope_theta 500000\).*such as meta-llama/"),
    ({"vocab_size": 128256}, r"a Llama 3 model \(vocab_size 128256\)"),
    ({"rope_theta": 500000.0, "use_scaled_rope": True}, r"a Llama 3\.1 or later model"),
    ({"rope_theta": 1000000}, r"a Code Llama model \(rope_theta 1e\+06\).*such as codellama/CodeLlama-7b-hf"),
    ({"vocab_size": 32016}, r"a Code Llama model \(vocab_size 32016\)"),
    ({"rope_theta": 20000.0}, r"'rope_theta': 20000\.0 is not supported.*Only Llama 2"),
    ({"moe": {"num_experts": 8}}, r"'moe': .* is not supported")])
def test_later_models_are_refused_by_name(tmp_path, tokenizer_model, params, told):
    refused(download(tmp_path, tokenizer_model, params=params), tmp_path / "out", told)


LARGER = {"n_heads": 40, "n_layers": 40, "dim": 5120}


@pytest.mark.parametrize(("params", "frequencies", "told"), [
    ({}, "layers.0.attention.inner_attention.rope.freqs", r"'layers\.0\.attention\.inner_attention\.rope\.freqs' in consolidated\.00\.pth"),
    ({"norm_eps": 1e-6}, None, "dim 48 with norm_eps 1e-06"), (LARGER | {"norm_eps": 1e-6}, "rope.freqs", "dim 5120 with norm_eps 1e-06"),
    ({"dim": 8192, "n_heads": 64, "n_layers": 80}, "rope.freqs", "dim 8192 with 64 key-value heads")])  # 7B, 7B, 13B, 65B
def test_llama_1_is_told_by_its_shards_and_numbers(tmp_path, tokenizer_model, params, frequencies, told):
    folder = download(tmp_path, tokenizer_model, params=params)
    for path in folder.glob("*.pth"):
        shard = torch.load(path, weights_only=True)
        rope = shard.pop("rope.freqs")
        torch.save(({frequencies: rope} if frequencies else {}) | shard, path)
    write_sums(folder)
    refused(folder, tmp_path / "out", rf"a Llama 1 model \({told}\)\. Expected Llama 2\. Take Llama 2\..*--llama_version 1")


@pytest.mark.parametrize("params", [LARGER | {"norm_eps": 1e-5}, {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80}])
def test_llama_2_of_other_sizes_is_not_taken_for_llama_1(tmp_path, tokenizer_model, params):
    """13B and 70B, whose shapes these shards do not have."""
    refused(download(tmp_path, tokenizer_model, params=params), tmp_path / "out", r"'tok_embeddings\.weight' is \(420, 24\)")


def test_an_early_llama_2_with_llama_1s_norm_eps_is_converted(tmp_path, tokenizer_model):
    """As Meta's first 7B chat download: its one table of rotary frequencies says which it is."""
    convert.run(download(tmp_path, tokenizer_model, params={"norm_eps": 1e-6}), tmp_path / "out")
    assert load(tmp_path / "out").config.rms_norm_eps == 1e-6


def test_code_llamas_tokenizer_is_refused_by_its_size(tmp_path, tokenizer_model, monkeypatch):
    monkeypatch.setattr(convert, "CODE_PIECES", VOCAB)
    refused(download(tmp_path, tokenizer_model), tmp_path / "out", r"tokenizer\.model: a Code Llama model \(420 pieces")


def test_a_place_that_is_no_folder_is_told(tmp_path, tokenizer_model):
    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere: no such folder.*such as llama-2-7b")
    refused(tokenizer_model, tmp_path / "out", r"tokenizer\.model: a file\. Expected the folder")


def test_llama_3_tokenizers_are_refused_by_name(tmp_path, tokenizer_model):
    folder = download(tmp_path, tokenizer_model)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    refused(folder, tmp_path / "out", "tiktoken vocabulary, as Llama 3 has")


def test_a_file_that_holds_code_is_not_run(tmp_path, tokenizer_model):
    class Code:
        def __reduce__(self):
            return (tmp_path / "ran").write_text, ("x",)

    folder = download(tmp_path, tokenizer_model)
    torch.save({"tok_embeddings.weight": Code()}, folder / "consolidated.00.pth")
    write_sums(folder)
    refused(folder, tmp_path / "out", "cannot be read as tensors alone")
    assert not (tmp_path / "ran").exists()


def test_wrong_shapes_dtypes_and_strangers_are_refused(tmp_path, tokenizer_model):
    folder, out = download(tmp_path, tokenizer_model, params={"vocab_size": 32000}), tmp_path / "out"
    refused(folder, out, r"vocab_size 32000, but tokenizer\.model has 420 pieces")
    for change, words in (({"dim": 96}, r"'tok_embeddings\.weight' is \(420, 24\).*\(420, 48\)"),
                          ({"n_kv_heads": 2}, r"'layers\.0\.attention\.wk\.weight'"),
                          ({"multiple_of": 256}, r"feed_forward\.w1"), ({"n_layers": 4}, r"no tensor 'layers\.3\.attention\.wq\.weight'"),
                          ({"n_layers": 2}, r"unknown tensor 'layers\.2\."), ({"n_heads": 7}, "divide each other"), ({"dim": "x"}, "'dim' is x")):
        (folder / "params.json").write_text(json.dumps(PARAMS | change))
        write_sums(folder)
        refused(folder, out, words)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save(shard | {"norm.weight": shard["norm.weight"].half()}, folder / "consolidated.01.pth")
    write_sums(folder)
    refused(folder, out, r"consolidated\.01\.pth: 'norm\.weight' is torch\.float16")


def test_packages_are_asked_for_before_anything_is_read(tmp_path, tokenizer_model, monkeypatch):
    folder = download(tmp_path, tokenizer_model)
    monkeypatch.setattr(convert, "_installed", lambda module: module != "google.protobuf")
    monkeypatch.setattr(convert, "read_shards", lambda *_: pytest.fail("read before the packages were checked"))
    refused(folder, tmp_path / "out", r"needs protobuf.*`pip install protobuf`")


def test_nothing_is_written_over_and_a_kill_leaves_nothing(tmp_path, tokenizer_model, monkeypatch):
    folder, out = download(tmp_path, tokenizer_model), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(folder, out, "holds something")
    (out / "thesis.txt").unlink()
    real = convert.write_config
    monkeypatch.setattr(convert, "write_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert.run(folder, out)
    assert not any(out.iterdir())
    monkeypatch.setattr(convert, "write_config", real)
    convert.run(folder, out)
    assert load(out) and not list(tmp_path.glob(".out*"))


def test_a_full_disk_is_seen_before(tmp_path, tokenizer_model, monkeypatch):
    folder = download(tmp_path, tokenizer_model)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    refused(folder, tmp_path / "out", "0.0 GB free")


# -- the way here ------------------------------------------------------------------------------------------------------------------------------


def test_a_recipe_that_names_the_download_is_told_the_command(tmp_path, tokenizer_model):
    from posttrain.models import resolve

    folder = download(tmp_path, tokenizer_model)
    with pytest.raises(PosttrainError, match=f"`python -m posttrain convert {folder} OUT`"):
        resolve(str(folder))


def test_a_gated_base_names_the_licence_step_and_the_login(monkeypatch):
    import transformers

    from posttrain.models import load_tokenizer

    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at ...\n401 Client Error.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", gated)
    with pytest.raises(PosttrainError, match="is gated.*Accept the licence on .*/meta-llama/Llama-2-7b-hf, then `hf auth login`"):
        load_tokenizer(ModelConfig(name_or_path="meta-llama/Llama-2-7b-hf"), "x")


def test_the_command_line(tmp_path, tokenizer_model):
    from typer.testing import CliRunner

    from posttrain.__main__ import app

    folder = download(tmp_path, tokenizer_model)
    done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out")])
    assert done.exit_code == 0 and (tmp_path / "out" / "config.json").exists()
    assert "144,336 parameters, float32, 1 file" in done.output
