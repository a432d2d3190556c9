"""One base, many roles: gradients without cross-talk, adapters that peft and transformers read, added tokens, quantized bases."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from posttrain import builtin, chat, models
from posttrain.config import LoraSettings, ModelConfig
from posttrain.errors import PosttrainError
from posttrain.models import Roles, choose_dtype, load_network, resolve
from posttrain.packing import collate, tree
from posttrain.training import restore

TREES = [tree([5, 9, 31, 7], [[60, 61, 62, 2], [70, 2]]), tree([40, 41], [[80, 81, 82, 83, 84, 2], [9, 2]])]


@pytest.fixture(scope="module")
def tiny_folder():
    return builtin.folder("builtin:tiny-llama")


@pytest.fixture(scope="module")
def untied_folder(tiny_folder, tmp_path_factory):
    """The tiny model with an output table of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("untied")
    net = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    net.config.tie_word_embeddings = False
    net.lm_head.weight = torch.nn.Parameter(torch.randn(net.lm_head.weight.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    net.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare_folder(untied_folder, tiny_folder, tmp_path_factory):
    """bare_folder(tied) -> the tiny model without chatml's tokens: a base that needs add_tokens."""
    from transformers import AutoTokenizer

    def make(tied: bool):
        folder = tmp_path_factory.mktemp("bare")
        shutil.copytree(tiny_folder if tied else untied_folder, folder, dirs_exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (folder / name).read_text(encoding="utf-8").replace("<|im_start|>", "<|bos|>").replace("<|im_end|>", "<|eos|>")
            (folder / name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|bos|>", "<|eos|>") and "<|im_end|>" not in tokenizer.get_vocab()
        return folder

    folders = {tied: make(tied) for tied in (True, False)}
    return folders.get


def batch(layout="rows"):
    return collate(TREES, [0, 1], layout)


def snapshot(net) -> dict:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def gradients(role) -> list:
    return [None if p.grad is None else p.grad.clone() for p in role.parameters()]


# -- roles on one base -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cast(make_roles, scramble):
    """Policy and critic to train, reference, helpfulness and safety frozen, all with something to say, on one base."""
    roles = make_roles()
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1)
    scramble(roles.add("critic", fresh_adapter=True, trainable=True, head="new", seed=3), 2)
    for i, name in enumerate(("reference", "helpfulness", "safety")):
        scramble(roles.add(name, fresh_adapter=True, head=None if name == "reference" else "new", seed=i), 10 + i)
    return roles


def losses(roles):
    b = batch()
    yield "policy", lambda: roles.logprobs("policy", b).sum()
    yield "critic", lambda: (roles.scalars_at("critic", roles.hidden("critic", b), b.predictors) ** 2).sum()


def test_one_backward_for_two_roles_equals_two_separate_ones(cast):
    expected = {}
    for name, loss in losses(cast):
        loss().backward()
        expected[name] = gradients(cast[name])
        other = "critic" if name == "policy" else "policy"
        assert all(g is None for g in gradients(cast[other]))  # no cross-talk
        cast.base.zero_grad(set_to_none=True)
    together = [loss() for _, loss in losses(cast)]
    cast.use("safety")  # whoever is selected last does not matter
    sum(together).backward()
    for name, wanted in expected.items():
        assert all(g is not None and g.abs().sum() > 0 for g in wanted)
        for a, b in zip(gradients(cast[name]), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_frozen_roles_and_the_base_never_get_a_gradient(cast):
    sum(loss() for _, loss in losses(cast)).backward()
    mine = {id(p) for name in ("policy", "critic") for p in cast[name].parameters()}
    for n, p in cast.base.named_parameters():
        assert (p.grad is not None) == (id(p) in mine) == p.requires_grad, n
    assert not cast["helpfulness"].parameters() and len(cast["critic"].parameters()) == len(cast["policy"].parameters()) + 1


def test_switching_changes_what_is_computed_and_nothing_else(cast):
    flags = {n: p.requires_grad for n, p in cast.base.named_parameters()}
    first = {name: cast.hidden(name, batch()).detach().clone() for name in cast.roles}
    for name in reversed(list(cast.roles)):
        torch.testing.assert_close(cast.hidden(name, batch()).detach(), first[name], rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in cast.base.named_parameters()} == flags
    different = list(first.values())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(different) for b in different[:i])


def test_a_step_of_one_role_leaves_the_others_as_they_were(cast):
    before = snapshot(cast.base)
    optimizer = torch.optim.AdamW(cast["policy"].parameters(), lr=0.1)
    sum(loss() for _, loss in losses(cast)).backward()
    optimizer.step()
    for n, p in cast.base.named_parameters():
        assert torch.equal(p, before[n]) == (".policy." not in n), n


def test_peft_itself_would_lose_the_gradients(cast):
    """The control: a switch by peft's set_adapter between a forward and its backward turns requires_grad off."""
    from peft.tuners.lora import LoraLayer

    cast.use("policy")
    loss = dict(losses(cast))["policy"]()
    for module in cast.base.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter("critic")
    loss.backward()
    assert all(p.grad is None or not p.requires_grad for n, p in cast.base.named_parameters() if ".policy." in n and "lora_" in n)


def test_adapters_off_is_the_base(make_roles, cast, tiny_folder):
    from transformers import AutoModelForCausalLM

    cast.roles["base"] = models.Role("base", cast.base, None, None, False)
    ours = cast.hidden("base", batch())
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="sdpa")
    b = batch()
    theirs = plain.model(input_ids=b.input_ids, attention_mask=b.attention_mask, position_ids=b.position_ids,
                         use_cache=False).last_hidden_state
    assert torch.equal(ours, theirs.flatten(0, 1))
    roles = make_roles()
    roles.add("fresh", fresh_adapter=True)  # B is zero: a new adapter says nothing yet
    assert torch.equal(roles.hidden("fresh", batch()), theirs.flatten(0, 1))
    reference = make_roles()
    assert reference.add("reference").adapter is None and torch.equal(reference.hidden("reference", batch()), ours)


def test_a_trainable_role_gets_an_adapter_where_the_recipe_trains_them(make_roles, tiny_folder):
    roles = make_roles()
    assert roles.add("policy", trainable=True).adapter == "policy" and roles.add("reference").adapter is None
    full = make_roles(lora=None)
    assert full.add("policy", trainable=True).adapter is None
    with pytest.raises(PosttrainError, match="is a whole model. Expected an adapter of this recipe's base"):
        make_roles().add("policy", tiny_folder, trainable=True)  # it would train the base and forget the folder


def test_the_adapted_layer_is_peft_s_formula(make_roles, scramble):
    """W x + alpha / r * B A x, by hand on one layer."""
    roles = make_roles(lora={"r": 3, "alpha": 12, "target_modules": ["q_proj"]})
    scramble(roles.add("policy", fresh_adapter=True, trainable=True))
    layer = roles.base.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 64)
    roles.use("policy")
    by_hand = x.double() @ layer.base_layer.weight.double().t() + 4.0 * (
        x.double() @ layer.lora_A["policy"].weight.double().t() @ layer.lora_B["policy"].weight.double().t())
    torch.testing.assert_close(layer(x).double(), by_hand, rtol=1e-5, atol=1e-5)
    assert len(roles["policy"].parameters()) == 2 * 2
    assert {n.split(".")[-4] for n, p in roles.base.named_parameters() if p.requires_grad} == {"q_proj"}


def test_adapters_stay_float32_over_a_bfloat16_base_and_updates_of_1e_5_survive(make_roles, tmp_path):
    roles = make_roles(dtype="bfloat16")
    role = roles.add("policy", fresh_adapter=True, trainable=True, head="new")
    assert {p.dtype for p in role.parameters()} == {torch.float32}
    assert {p.dtype for n, p in roles.base.named_parameters() if "lora_" not in n and ".heads." not in f".{n}"} == {torch.bfloat16}
    before = [p.detach().clone() for p in role.parameters()]
    optimizer = torch.optim.SGD(role.parameters(), lr=1.0)
    for _ in range(3):
        for p in role.parameters():
            p.grad = torch.full_like(p, 1e-5)
        optimizer.step()
    for p, old in zip(role.parameters(), before, strict=True):
        torch.testing.assert_close(old - p, torch.full_like(p, 3e-5), rtol=0.01, atol=1e-9)
        if old.abs().min() > 0.01:  # what bfloat16 would have kept of it
            assert torch.equal((old.bfloat16() - 1e-5).bfloat16(), old.bfloat16())
    b = batch()
    (roles.logprobs("policy", b).sum() + roles.scalars("policy", b).sum()).backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in role.parameters())
    roles.save("policy", tmp_path / "model")
    again = make_roles(dtype="bfloat16")
    loaded = again.add("policy", tmp_path / "model", head="saved")
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    for a, b in zip(role.parameters(), [p for n, p in again.base.named_parameters() if "lora_" in n] + [loaded.head.weight], strict=True):
        assert torch.equal(a, b)


# -- saving, and other programs reading --------------------------------------------------------------------------------------------------


def padded(tokenizer, side: str = "right"):
    """The four sequences of TREES as a padded batch, in the batch's order of answers."""
    rows = [t.ids[:t.prompt] + t.ids[a:b] for t in TREES for a, b in t.spans]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([r + [pad] * (width - len(r)) if side == "right" else [pad] * (width - len(r)) + r for r in rows])
    return ids, (ids != pad).long()


def test_peft_loads_the_policy_and_agrees(cast, tiny_folder, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cast.save("policy", tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (told["task_type"], told["base_model_name_or_path"], told["inference_mode"]) == ("CAUSAL_LM", "builtin:tiny-llama", True)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), tmp_path)
    told["base_model_name_or_path"] = str(tiny_folder)
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    for model in (plain, AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        ids, mask = padded(cast.tokenizer)
        logp = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits.double(), -1)
        ours, k = cast.logprobs("policy", batch()).detach(), 0
        row = 0
        for t in TREES:
            for a, b in t.spans:
                for i in range(t.prompt, t.prompt + b - a):
                    assert ours[k].item() == pytest.approx(logp[row, i - 1, ids[row, i]].item(), abs=2e-5)
                    k += 1
                row += 1
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == cast.tokenizer.chat_template


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["critic", "safety"])
def test_transformers_classifier_with_peft_gives_our_score_on_a_padded_batch(cast, tiny_folder, tmp_path, name, side):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    cast.save(name, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (told["task_type"], told["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    net = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, dtype=torch.float32,
                                                             pad_token_id=tokenizer.pad_token_id)
    model = PeftModel.from_pretrained(net, tmp_path).eval()
    ids, mask = padded(tokenizer, side)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits.squeeze(-1)
    torch.testing.assert_close(cast.scalars(name, batch()).detach(), theirs, rtol=1e-4, atol=2e-5)


def test_a_role_read_back_gives_the_same_numbers_and_its_source_is_left_alone(cast, make_roles, tmp_path):
    cast.save("critic", tmp_path / "critic")
    content = (tmp_path / "critic" / "adapter_model.safetensors").read_bytes()
    again = make_roles()
    again.add("reward", tmp_path / "critic", head="saved")
    role = again.add("critic", tmp_path / "critic", trainable=True, head="zero")
    assert torch.equal(again.scalars("reward", batch()), cast.scalars("critic", batch()))
    assert torch.equal(again.hidden("critic", batch()), cast.hidden("critic", batch())) and not again.scalars("critic", batch()).any()
    optimizer = torch.optim.SGD(role.parameters(), lr=1.0)
    (again.scalars("critic", batch()) - 1).square().sum().backward()
    optimizer.step()
    assert again.scalars("critic", batch()).any() and (tmp_path / "critic" / "adapter_model.safetensors").read_bytes() == content
    assert torch.equal(again.scalars("reward", batch()), cast.scalars("critic", batch()))  # the copy moved, the frozen one did not
    restore(again, role, tmp_path / "critic")
    assert torch.equal(again.scalars("critic", batch()), cast.scalars("critic", batch()))


def test_a_reward_model_may_start_from_the_policy_and_the_policy_from_nothing_else(cast, make_roles, tmp_path):
    cast.save("policy", tmp_path / "sft")
    roles = make_roles()
    role = roles.add("reward", tmp_path / "sft", trainable=True, head="new", seed=4)
    assert torch.equal(roles.hidden("reward", batch()), cast.hidden("policy", batch()))
    expected = torch.empty(1, 64).normal_(0, 0.05, generator=torch.Generator().manual_seed(4))  # the model's initializer range
    assert torch.equal(role.head.weight, expected)
    with pytest.raises(PosttrainError, match="no scalar head"):
        roles.add("helpfulness", tmp_path / "sft", head="saved")


@pytest.mark.parametrize("change, told", [
    ({"r": 8, "alpha": 8}, "rank 8 .* has rank 4"),
    ({"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}, "the same rank and targets")])
def test_another_rank_or_target_list_is_refused(cast, make_roles, tmp_path, change, told):
    cast.save("policy", tmp_path / "model")
    with pytest.raises(PosttrainError, match=told):
        make_roles(lora=change).add("reward", tmp_path / "model", trainable=True, head="new")
    make_roles(lora=change).add("reference", tmp_path / "model")  # to read is fine: its own rank is used


def test_adapters_that_do_not_fit_are_refused(cast, make_roles, tmp_path):
    cast.save("policy", tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, told = load_file(path), json.loads(config.read_text())

    def refused(tensors, words, **keys):
        save_file(tensors, path, metadata={"format": "pt"})
        config.write_text(json.dumps(told | keys))
        with pytest.raises(PosttrainError, match=words):
            make_roles().add("policy", tmp_path)

    key = next(iter(good))
    refused({k: v for k, v in good.items() if k != key}, "do not fit the base")
    refused(good | {key.replace("layers.0", "layers.7"): good[key].clone()}, "do not fit the base")
    refused(good | {key: good[key][:, :-1].contiguous()}, "has shape")
    refused(good, "use_rslora", use_rslora=True)
    refused(good, "alpha_pattern", alpha_pattern={"q_proj": 3})
    refused(good, "biases", bias="all")
    refused(good, "pattern of targets", target_modules=".*q_proj")


# -- full fine-tuning --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untied", [False, True])
def test_full_roles_are_models_of_their_own(make_roles, untied_folder, tmp_path, untied):
    """Policy, reference, reward model and critic without adapters: trained apart, saved, read back by us and by transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    model = {"name_or_path": str(untied_folder)} if untied else {}
    roles = make_roles(lora=None, **model)
    policy, reference = roles.add("policy", trainable=True), roles.add("reference")
    assert policy.net is not reference.net and not reference.parameters() and not any(p.requires_grad for p in reference.net.parameters())
    assert len(policy.parameters()) == len(list(policy.net.parameters()))
    assert torch.equal(roles.logprobs("policy", batch()), roles.logprobs("reference", batch()))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    roles.logprobs("policy", batch()).sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    optimizer.step()
    gap = (roles.logprobs("policy", batch()) - roles.logprobs("reference", batch())).abs().max()
    assert gap > 0.01

    roles.save("policy", tmp_path / "sft")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert net.dtype == torch.float32
    b = batch()
    theirs = net.model(input_ids=b.input_ids, attention_mask=b.attention_mask, position_ids=b.position_ids).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(roles.hidden("policy", b), theirs, rtol=0, atol=1e-6)

    second = make_roles(lora=None, **model)
    reward = second.add("reward", tmp_path / "sft", trainable=True, head="new", seed=1)
    assert torch.equal(second.hidden("reward", batch()), roles.hidden("policy", batch()))
    (second.scalars("reward", batch()) - 1).square().sum().backward()
    torch.optim.SGD(reward.parameters(), lr=0.01).step()
    scores = second.scalars("reward", batch()).detach()
    second.save("reward", tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    for side in ("right", "left"):
        ids, mask = padded(tokenizer, side)
        net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
        assert net.config.pad_token_id == 0 and net.num_labels == 1
        with torch.no_grad():
            theirs = net(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits.squeeze(-1)
        torch.testing.assert_close(scores, theirs, rtol=1e-4, atol=2e-5)

    third = make_roles(lora=None, **model)
    third.add("helpfulness", tmp_path / "reward", head="saved")
    critic = third.add("critic", tmp_path / "reward", trainable=True, head="zero")
    torch.testing.assert_close(third.scalars("helpfulness", batch()), scores, rtol=0, atol=1e-6)
    assert not third.scalars("critic", batch()).any()
    torch.testing.assert_close(third.hidden("critic", batch()), third.hidden("helpfulness", batch()), rtol=0, atol=0)
    (third.scalars("critic", batch()) - 1).square().sum().backward()
    assert critic.head.weight.grad.abs().sum() > 0 and not third["helpfulness"].parameters()
    restore(third, critic, tmp_path / "reward")
    torch.testing.assert_close(third.scalars("critic", batch()), scores, rtol=0, atol=1e-6)


def test_one_backward_for_two_full_roles(make_roles):
    roles = make_roles(lora=None)
    roles.add("policy", trainable=True)
    roles.add("critic", trainable=True, head="new")
    expected = {}
    for name, loss in losses(roles):
        loss().backward()
        expected[name] = gradients(roles[name])
        for role in roles.roles.values():
            role.net.zero_grad(set_to_none=True)
    sum(loss() for _, loss in losses(roles)).backward()
    for name, wanted in expected.items():
        for a, b in zip(gradients(roles[name]), wanted, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_reward_model_keeps_its_float32_head(make_roles, tmp_path):
    roles = make_roles(lora=None, dtype="bfloat16")
    role = roles.add("reward", trainable=True, head="new")
    weight = role.head.weight.detach().clone()
    roles.save("reward", tmp_path)
    role.head.weight.data.zero_()
    restore(roles, role, tmp_path)
    assert torch.equal(role.head.weight, weight)


def test_full_fine_tuning_of_a_quantized_base_is_refused(make_roles):
    with pytest.raises(PosttrainError, match="'nf4' with full fine-tuning"):
        make_roles(lora=None, quantization="nf4")._full_role("policy", None, True, None)


# -- added tokens ------------------------------------------------------------------------------------------------------------------------


MESSAGES = [{"role": "user", "content": "Why?"}]


def grown(make_roles, folder, **more):
    return make_roles(name_or_path=str(folder), add_tokens=True, **more)


def chat_batch(roles):
    prompt = chat.encode_prompt(roles.tokenizer, MESSAGES)
    return collate([tree(prompt, [chat.encode_answer(roles.tokenizer, MESSAGES, a) for a in ("So.", "Because it is.")])], [0])


def test_without_add_tokens_the_refusal_names_the_alternatives(make_roles, bare_folder):
    with pytest.raises(PosttrainError, match=r"<\|im_start\|>, <\|im_end\|>.*add_tokens: true"):
        make_roles(name_or_path=str(bare_folder(True)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_added_tokens_are_trained_per_role_saved_and_read_by_peft(make_roles, scramble, bare_folder, tmp_path, tied):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = bare_folder(tied)
    roles = grown(make_roles, folder)
    role = roles.add("policy", fresh_adapter=True, trainable=True)
    roles.add("reference", fresh_adapter=True)
    size = len(roles.tokenizer)
    assert roles.added == [size - 2, size - 1] and roles.base.get_input_embeddings().weight.shape[0] == size
    table = roles.base.get_input_embeddings().weight
    torch.testing.assert_close(table[-1], table[:-2].mean(0))  # each starts at the mean of the others
    rows = [p for p in role.parameters() if p.shape == (2, 64)]
    assert len(rows) == (1 if tied else 2) and all(p.dtype == torch.float32 for p in rows)

    b = chat_batch(roles)
    assert {*roles.added} <= {*b.input_ids.flatten().tolist()} and roles.added[1] in b.targets.tolist()
    before = roles.logprobs("policy", b).detach()
    assert torch.equal(before, roles.logprobs("reference", b))

    roles.logprobs("policy", b).sum().backward()
    got = [p.grad.clone() for p in rows]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # the oracle: a whole table that is trained
    plain.resize_token_embeddings(size, mean_resizing=False)
    for t in {plain.get_input_embeddings(), plain.get_output_embeddings()}:
        t.weight.data[-2:] = t.weight.data[:-2].mean(0)
    logits = plain(input_ids=b.input_ids, attention_mask=b.attention_mask, position_ids=b.position_ids,
                   use_cache=False).logits.flatten(0, 1)
    F.cross_entropy(logits[b.predictors], b.targets, reduction="sum").neg().backward()
    wanted = [plain.get_input_embeddings().weight.grad[-2:]] + ([] if tied else [plain.lm_head.weight.grad[-2:]])
    for a, c in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)

    frozen = table.detach().clone()
    scramble(role, 1, 0.1)
    after, reference = roles.logprobs("policy", b).detach(), roles.logprobs("reference", b).detach()
    assert (after - before).abs().max() > 0.01 and torch.equal(reference, before) and torch.equal(table, frozen)

    roles.save("policy", tmp_path / "sft")
    names = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    ends = {k: v.shape[0] for k, v in names.items() if k.endswith("token_adapter.trainable_tokens_delta")}
    assert ends == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": 2} | (
        {} if tied else {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": 2})

    def of_peft(model):
        with torch.no_grad():
            out = model(input_ids=b.input_ids[:, :b.last[0] + 1], use_cache=False).logits[0].double()
        first = b.owner == 0
        return torch.log_softmax(out, -1)[b.predictors[first], b.targets[first]], first

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.resize_token_embeddings(size)
    told = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32)  # resizes by the saved tokenizer
    for model in (PeftModel.from_pretrained(base, tmp_path / "sft"), auto, auto.merge_and_unload()):
        theirs, first = of_peft(model.eval())
        torch.testing.assert_close(after[first].double(), theirs, rtol=1e-4, atol=2e-5)
    assert told["trainable_token_indices"] == {"embed_tokens": roles.added} | ({} if tied else {"lm_head": roles.added})

    again = grown(make_roles, folder)  # read back: as policy, as a frozen copy, and as the start of a reward model
    for name in ("policy", "reference"):
        again.add(name, tmp_path / "sft", trainable=name == "policy")
        assert torch.equal(again.logprobs(name, b), after)
    reward = again.add("reward", tmp_path / "sft", trainable=True, head="new")
    assert torch.equal(again.hidden("reward", b), roles.hidden("policy", b))
    again.scalars("reward", b).sum().backward()
    row = [p for p in reward.parameters() if p.shape == (2, 64)]
    assert len(row) == 1 and row[0].grad.abs().sum() > 0 and all(p.grad is None for p in again["policy"].parameters())
    again.save("reward", tmp_path / "reward")
    net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32, pad_token_id=0)
    net.resize_token_embeddings(size)
    model = PeftModel.from_pretrained(net, tmp_path / "reward").eval()
    with torch.no_grad():
        theirs = model(input_ids=b.input_ids[:, :b.last[0] + 1]).logits.item()
    assert again.scalars("reward", b)[0].item() == pytest.approx(theirs, abs=2e-5)
    critic = grown(make_roles, folder)
    critic.add("critic", tmp_path / "reward", trainable=True, head="zero")
    torch.testing.assert_close(critic.hidden("critic", b), again.hidden("reward", b), rtol=0, atol=0)


def test_added_rows_reach_the_sampler(make_roles, scramble, bare_folder):
    from posttrain.generate import Sampling, sample

    roles = grown(make_roles, bare_folder(False))
    role = roles.add("policy", fresh_adapter=True, trainable=True)
    b = chat_batch(roles)
    prompt = b.input_ids[0, :int(b.predictors[0]) + 1].tolist()
    stop = roles.added[1]
    rows = [p for p in role.parameters() if p.shape == (2, 64)][1]  # the output's: make the end of turn certain
    rows.data[1] = 100 * roles.hidden("policy", b)[b.predictors[0]].detach()
    out = sample(roles, "policy", [prompt], 2, Sampling(5), 0, stop=stop)[0]
    assert [c.ids for c in out] == [[stop], [stop]] and all(c.finished for c in out)


def test_full_roles_keep_their_trained_rows(make_roles, bare_folder, tmp_path):
    """A saved full model has its rows already: loading must not put the mean back."""
    from transformers import AutoModelForCausalLM

    roles = grown(make_roles, bare_folder(True), lora=None)
    role = roles.add("policy", trainable=True)
    role.net.get_input_embeddings().weight.data[-2:] += 1.0
    roles.save("policy", tmp_path)
    again = grown(make_roles, bare_folder(True), lora=None)
    again.add("policy", tmp_path, trainable=True)
    b = chat_batch(roles)
    assert torch.equal(again.logprobs("policy", b), roles.logprobs("policy", b))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == len(roles.tokenizer)


def test_a_vocabulary_table_with_spare_rows_is_not_resized(make_roles, bare_folder, tmp_path):
    """Many bases have more rows than tokens: the new tokens take spare ones, and still start at the mean of the known."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(bare_folder(True), tmp_path, dirs_exist_ok=True)
    net = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    size = net.config.vocab_size
    net.resize_token_embeddings(size + 10, mean_resizing=False)
    net.model.embed_tokens.weight.data[size:] = 1e3  # never trained
    net.save_pretrained(tmp_path)
    roles = grown(make_roles, tmp_path)
    roles.add("policy", fresh_adapter=True)
    table = roles.base.get_input_embeddings().weight
    assert len(table) == size + 10 and roles.added == [size, size + 1]
    torch.testing.assert_close(table[size:size + 2], table[:size].mean(0).expand(2, -1))


def test_an_adapter_without_the_rows_is_refused_where_tokens_are_added(make_roles, bare_folder, tmp_path):
    roles = grown(make_roles, bare_folder(True))
    roles.add("policy", fresh_adapter=True)
    roles.save("policy", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "token_adapter" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(PosttrainError, match="do not fit the base"):
        grown(make_roles, bare_folder(True)).add("policy", tmp_path)


# -- quantized bases ---------------------------------------------------------------------------------------------------------------------


def quantized(make_roles, kind, dtype="bfloat16", **more):
    """Roles on a quantized tiny model; skips where a bare bitsandbytes layer cannot train here."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32) if kind == "nf4" else (
        bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False))
    try:
        layer.to(models.device())(torch.randn(3, 64, device=models.device(), requires_grad=True)).sum().backward()
    except (RuntimeError, NotImplementedError, AttributeError) as e:
        pytest.skip(f"bitsandbytes can't run {kind} on this machine: {str(e)[:100]}")
    roles = make_roles(dtype=dtype, quantization=kind, lora={"r": 4, "alpha": 8}, **more)
    roles.add("probe", fresh_adapter=True)
    return roles


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_after_an_evaluation_are_those_before_it(make_roles, scramble, kind, dtype):
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode on CPUs with AVX512-BF16, and gradients vanish; not here."""

    def run(evaluate: bool) -> list:
        roles = quantized(make_roles, kind, dtype)
        role = scramble(roles.add("policy", fresh_adapter=True, trainable=True, head="new", seed=1), 1)
        if evaluate:
            roles.base.eval()
            with torch.inference_mode():
                for _ in range(2):
                    roles.scalars("policy", batch())
        roles.base.train()
        b = batch()
        hidden = roles.hidden("policy", b)
        (roles.logprobs_of("policy", hidden, b).sum() + roles.scalars_at("policy", hidden, b.last).sum()).backward()
        return gradients(role)

    torch.manual_seed(0)
    plain = run(False)
    torch.manual_seed(0)
    after = run(True)
    for a, b in zip(after, plain, strict=True):
        assert torch.isfinite(a).all() and a.abs().sum() > 0 and torch.equal(a, b)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_roles_work_on_a_quantized_base(make_roles, scramble, tmp_path, kind):
    roles = quantized(make_roles, kind)
    kinds = {type(m).__name__ for m in roles.base.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind] in kinds
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1)
    scramble(roles.add("critic", fresh_adapter=True, trainable=True, head="new"), 2)
    assert {p.dtype for r in ("policy", "critic") for p in roles[r].parameters()} == {torch.float32}
    expected = {}
    for name, loss in losses(roles):
        loss().backward()
        expected[name] = gradients(roles[name])
        roles.base.zero_grad(set_to_none=True)
    sum(loss() for _, loss in losses(roles)).backward()
    for name, wanted in expected.items():
        for a, b in zip(gradients(roles[name]), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * b.abs().max().item() + 1e-6)
    frozen = [n for n, p in roles.base.named_parameters() if p.requires_grad and ".policy." not in n and ".critic." not in n]
    assert not frozen
    roles.save("policy", tmp_path)
    again = quantized(make_roles, kind)
    again.add("policy", tmp_path)
    assert torch.equal(again.hidden("policy", batch()), roles.hidden("policy", batch()).detach())
    reference = make_roles(dtype="bfloat16")  # the same adapter on the unquantized base: near, not equal
    reference.add("policy", tmp_path)
    gap = (reference.logprobs("policy", batch()) - again.logprobs("policy", batch())).abs().max()
    assert 0 < gap < 1.0


def test_the_switch_that_keeps_4_bit_gradients_is_off_on_every_layer(make_roles):
    roles = quantized(make_roles, "nf4")
    layers = [m for m in roles.base.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == 2 * 7 and not any(m.support_avx512bf16_for_cpu for m in layers)


def test_peft_loads_an_adapter_that_was_trained_on_nf4(make_roles, scramble, tiny_folder, tmp_path):
    from peft import PeftModel

    roles = quantized(make_roles, "nf4")
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1)
    roles.save("policy", tmp_path)
    net = load_network(str(tiny_folder), roles.config, torch.bfloat16, "x")
    model = PeftModel.from_pretrained(net, tmp_path).eval()
    ids, mask = padded(roles.tokenizer)
    with torch.no_grad():
        theirs = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits.float(), -1)
        ours = roles.logprobs("policy", batch())
    first = theirs[0, 3:7].gather(1, ids[0, 4:8, None]).squeeze(1)
    torch.testing.assert_close(ours[:4], first, rtol=0.05, atol=0.1)  # bfloat16, and peft computes the adapter in float32


# -- loading -----------------------------------------------------------------------------------------------------------------------------


def test_resolve_refuses_pickled_weights_and_missing_folders(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(PosttrainError, match=r"holds pytorch_model.bin but no \.safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PosttrainError, match="holds no weights"):
        resolve(str(tmp_path / "empty"))
    for name in ("./nothing", "/no/such/folder", "~/nothing", "a/b/c"):
        with pytest.raises(PosttrainError, match="no such folder"):
            resolve(name)
    assert resolve("owner/name") == "owner/name"
    (tmp_path / "home" / "m").mkdir(parents=True)
    (tmp_path / "home" / "m" / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve("~/m") == str(tmp_path / "home" / "m")


def test_a_folder_that_is_no_model_is_our_error(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PosttrainError, match="cannot be loaded"):
        load_network(str(tmp_path), ModelConfig(name_or_path=str(tmp_path)), torch.float32, "r.yaml")


@pytest.mark.parametrize("damage", ["cut short", "another width"])
def test_damaged_weights_are_our_error(tmp_path, tiny_folder, damage):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    if damage == "cut short":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    else:
        (folder / "config.json").write_text((folder / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 32'))
    with pytest.raises(PosttrainError, match="damaged or do not fit its config"):
        load_network(str(folder), ModelConfig(name_or_path=str(folder)), torch.float32, "r.yaml")


def test_an_unknown_built_in_model_is_refused():
    with pytest.raises(PosttrainError, match=r"no built-in model 'builtin:x'.*builtin:tiny-llama"):
        resolve("builtin:x")


def test_logits_that_are_more_than_a_matrix_are_refused(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM, PhiConfig, PhiForCausalLM

    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, net in (("scale", CohereForCausalLM(CohereConfig(**small, logit_scale=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0))),
                      ("bias", PhiForCausalLM(PhiConfig(**small, bos_token_id=1, eos_token_id=2)))):
        net.save_pretrained(tmp_path / name)
        with pytest.raises(PosttrainError, match="changes its logits"):
            load_network(str(tmp_path / name), ModelConfig(name_or_path="x"), torch.float32, "r.yaml")


def test_dtype_rules():
    def config(**more):
        return ModelConfig(name_or_path="x", **more)

    assert choose_dtype(config(dtype="bfloat16"), full=True) == "bfloat16" and choose_dtype(config(dtype="float32", lora={})) == "float32"
    assert choose_dtype(config(), full=True) == "float32"  # weights that are trained stay float32
    assert choose_dtype(config(lora={}), full=True) in ("float32", "bfloat16")


def test_all_linear_is_every_matrix_of_the_body(make_roles):
    roles = make_roles()
    targets = roles._targets(LoraSettings(target_modules="all-linear"))
    assert targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    roles.add("policy", fresh_adapter=True)
    assert roles._targets(LoraSettings(target_modules="all-linear")) == targets  # also once layers are wrapped
    assert roles._targets(LoraSettings(target_modules="q_proj")) == ["q_proj"]


def test_the_meta_model_has_the_published_size_and_no_memory(tiny_folder):
    net = models.meta_model(ModelConfig(name_or_path="builtin:tiny-llama"), "x")
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert sum(p.numel() for p in net.parameters()) == sum(v.numel() for v in load_file(tiny_folder / "model.safetensors").values())
    llama = models.meta_model(ModelConfig(name_or_path="meta-llama/Llama-2-7b-hf"), "x")
    assert sum(p.numel() for p in llama.parameters()) == 6_738_415_616  # the size that Meta publishes


def test_a_damaged_built_in_model_is_made_again(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    first = builtin.folder("builtin:tiny-llama")
    weights = (first / "model.safetensors").read_bytes()
    assert weights == (tiny_folder / "model.safetensors").read_bytes()  # the same on every machine and run
    (first / "model.safetensors").write_bytes(weights[:-8] + b"\0" * 8)
    assert (builtin.folder("builtin:tiny-llama") / "model.safetensors").read_bytes() == weights
    (first / "SHA256").unlink()  # cut off before the stamp
    assert (builtin.folder("builtin:tiny-llama") / "SHA256").exists()


def test_roles_start_the_same_whatever_came_before(tmp_path):
    """A fresh adapter depends on the seed that the stage sets, and on nothing else."""
    config = ModelConfig(name_or_path="builtin:tiny-llama", chat_template="chatml", lora={"r": 4, "alpha": 8})

    def fresh():
        torch.manual_seed(7)
        roles = Roles(config, torch.float32, "x")
        return [p.clone() for p in roles.add("policy", fresh_adapter=True, trainable=True).parameters()]

    one = fresh()
    torch.rand(100)
    assert all(torch.equal(a, b) for a, b in zip(one, fresh(), strict=True))


@pytest.mark.smollm2
def test_smollm2_loads_and_speaks():
    config = ModelConfig(name_or_path="builtin:smollm2-135m-instruct", chat_template="chatml", lora={"r": 4, "alpha": 8})
    roles = Roles(config, torch.float32, "x")
    roles.add("base")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = chat.encode_prompt(roles.tokenizer, messages)
    answers = ("The capital of France is Paris.", "The capital of France is a bicycle.")
    b = collate([tree(prompt, [chat.encode_answer(roles.tokenizer, messages, a) for a in answers])], [0])
    with torch.no_grad():
        logprobs = roles.logprobs("base", b)
    paris, bicycle = logprobs[b.owner == 0].sum(), logprobs[b.owner == 1].sum()
    assert paris > bicycle + 5 and logprobs[b.owner == 0].mean() > -2
