"""The merged copy that decodes: the same numbers as the role it copies, made again when the role changes, the base left alone."""

import pytest
import torch

from posttrain import decoder
from posttrain.generate import Sampling, sample
from posttrain.packing import collate, tree
from posttrain.training import restore

IDS = torch.tensor([[5, 9, 31, 7, 12, 60], [40, 41, 3, 3, 3, 3]])


def hidden(body) -> torch.Tensor:
    with torch.no_grad():
        return body(input_ids=IDS, use_cache=False).last_hidden_state


def agree(roles, name: str, tolerance: float = 2e-5) -> None:
    with torch.inference_mode():
        copy = hidden(roles.decoder(name)).clone()
    own = hidden(roles.use(name).body)
    torch.testing.assert_close(copy, own, rtol=0, atol=tolerance)


@pytest.fixture
def pair(make_roles, scramble):
    roles = make_roles()
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1)
    scramble(roles.add("other", fresh_adapter=True), 2)
    return roles


def test_the_copy_speaks_as_its_role_and_the_base_stays(pair):
    before = {n: p.detach().clone() for n, p in pair.base.named_parameters()}
    for name in ("policy", "other", "policy", "policy"):
        agree(pair, name)
    assert all(torch.equal(p, before[n]) for n, p in pair.base.named_parameters())
    assert (hidden(pair.use("policy").body) - hidden(pair.use("other").body)).abs().max() > 0.01
    first = pair.merged[1]
    with torch.inference_mode():
        assert pair.decoder("policy") is first and pair.decoder("other") is first  # one copy's memory serves all roles


@pytest.mark.parametrize("fused", [False, True])
def test_the_copy_follows_training(pair, fused):
    """A fused optimizer's steps leave no trace in a version counter."""
    agree(pair, "policy")
    optimizer = torch.optim.AdamW(pair["policy"].parameters(), lr=0.05, fused=fused)
    pair.logprobs("policy", collate([tree([5, 9], [[7, 2]])], [0])).sum().backward()
    optimizer.step()
    agree(pair, "policy")


def test_the_copy_follows_a_restored_checkpoint(pair, tmp_path):
    """`restore` writes to .data, which no version counter sees."""
    pair.save("policy", tmp_path)
    with torch.no_grad():
        for p in pair["policy"].parameters():
            p.add_(0.1)
    agree(pair, "policy")
    restore(pair, pair["policy"], tmp_path)
    agree(pair, "policy")


@pytest.mark.skipif(not decoder.packing_pays(torch.zeros(1, dtype=torch.bfloat16)), reason="weights are packed in bfloat16 on x86 processors only")
def test_packed_weights_give_the_same_numbers(make_roles, scramble, monkeypatch):
    """A layer with a bias, and a whole model with its vocabulary; to a rounding of bfloat16, as kernels may differ between processors."""
    x, w, b = (torch.randn(*s, generator=torch.Generator().manual_seed(0)).bfloat16() for s in ((3, 1, 48), (80, 48), (80,)))
    product = decoder.Product(b).write(torch.zeros_like(w)).write(w)
    assert product.packed
    torch.testing.assert_close(product(x), torch.nn.functional.linear(x, w, b), rtol=0.02, atol=0.02)
    found = []
    for pays in (decoder.packing_pays, lambda weight: False):
        monkeypatch.setattr(decoder, "packing_pays", pays)
        roles = make_roles(dtype="bfloat16")
        scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1, 0.1)
        with torch.inference_mode():
            found.append(roles.logits_of("policy")(hidden(roles.decoder("policy"))))
        packed = {m.packed for m in roles.merged[1].modules() if isinstance(m, decoder.Product)}
        assert packed == {roles.packed_head is not None} == {len(found) == 1}
    torch.testing.assert_close(*found, rtol=0.02, atol=0.05)
    assert found[0].std() > 0.1


def test_a_head_that_trains_is_not_packed(make_roles):
    """Its values change under the packed copy."""
    roles = make_roles(lora=None, dtype="bfloat16")
    roles.add("policy", trainable=True)
    hidden, product = torch.randn(2, 64).bfloat16(), roles.logits_of("policy")
    before = product(hidden)
    roles.vocabulary("policy").data.mul_(2)
    assert roles.packed_head is None and not torch.equal(roles.logits_of("policy")(hidden), before)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"], ["o_proj"]])
def test_any_list_of_targets(make_roles, scramble, targets):
    roles = make_roles(lora={"r": 4, "alpha": 8, "target_modules": targets})
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1, 0.2)
    agree(roles, "policy")


def test_layers_with_biases(make_roles, scramble, tmp_path):
    """Qwen's query, key and value have biases; they are fused with their weights."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from posttrain import builtin

    config = Qwen2Config(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    net = Qwen2ForCausalLM(config)
    for n, p in net.named_parameters():
        if n.endswith("bias"):
            torch.nn.init.normal_(p, std=0.5)
    net.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(builtin.folder("builtin:tiny-llama")).save_pretrained(tmp_path)
    roles = make_roles(name_or_path=str(tmp_path))
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1)
    agree(roles, "policy")
    assert any(isinstance(m, decoder._First) and m.bias is not None for m in roles.merged[1].modules())


def test_no_copy_where_it_does_not_pay(make_roles):
    roles = make_roles()
    roles.add("base")
    assert roles.decoder("base") is roles["base"].body
    full = make_roles(lora=None)
    full.add("policy", trainable=True)
    assert full.decoder("policy") is full["policy"].body
    assert not decoder.worth_it(full["policy"], "none") and not decoder.worth_it(roles["base"], "nf4")


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_added_tokens_are_in_the_copy(make_roles, scramble, tmp_path, tied):
    import shutil

    from transformers import AutoModelForCausalLM

    from posttrain import builtin, chat

    shutil.copytree(builtin.folder("builtin:tiny-llama"), tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text(encoding="utf-8").replace("<|im_start|>", "<|bos|>").replace("<|im_end|>", "<|eos|>")
        (tmp_path / name).write_text(text, encoding="utf-8")
    if not tied:
        net = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        net.config.tie_word_embeddings = False
        net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().flip(0).contiguous())
        net.save_pretrained(tmp_path)
    roles = make_roles(name_or_path=str(tmp_path), add_tokens=True)
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1, 0.1)
    scramble(roles.add("other", fresh_adapter=True), 2, 0.1)
    prompt = chat.encode_prompt(roles.tokenizer, [{"role": "user", "content": "Hi"}])
    for name in ("policy", "other", "policy"):
        out = sample(roles, name, [prompt], 4, Sampling(8), 0, stop=chat.end_of_turn(roles.tokenizer))[0]
        with torch.no_grad():
            trained = roles.logprobs(name, collate([tree(prompt, [c.ids for c in out])], [0])).tolist()
        assert [x for c in out for x in c.logprobs] == pytest.approx(trained, abs=2e-4)
