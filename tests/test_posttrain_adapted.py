"""The written-out layers against autograd's own way through their formulas, in double precision."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from posttrain import adapted, training
from posttrain.builtin import folder
from posttrain.chunks import with_fewer_rows
from posttrain.config import ModelConfig
from posttrain.models import load_network

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def layer(make_roles, scramble):
    """The first decoder layer under a trained role, and a second role beside it."""
    roles = make_roles(lora={"r": 3, "alpha": 12, "target_modules": "all-linear"})
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1)
    scramble(roles.add("other", fresh_adapter=True), 2)
    roles.use("policy")
    return roles, roles.base.model.layers[0]


def by_hand(linear, x, role="policy"):
    a, b = linear.lora_A[role].weight, linear.lora_B[role].weight
    return x @ linear.base_layer.weight.double().t() + 4.0 * (x @ a.double().t() @ b.double().t())


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("part, names", [("self_attn", ["q_proj", "k_proj", "v_proj"]), ("mlp", ["gate_proj", "up_proj"]), ("self_attn", ["o_proj"])])
def test_layers_of_one_input_and_their_gradients_are_the_formula_s(layer, part, names):
    linears = [getattr(getattr(layer[1], part), n) for n in names]
    weights = [p for m in linears for p in (m.lora_A["policy"].weight, m.lora_B["policy"].weight)]
    x, exact = X.clone().requires_grad_(), X.double().requires_grad_()
    outs, right = [m(x) for m in linears], [by_hand(m, exact) for m in linears]
    for ours, theirs in zip(outs, right, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert not adapted._kept
    for ours, theirs in zip(gradients(sum((o ** 3).sum() for o in outs), [x, *weights]),
                            gradients(sum((o ** 3).sum() for o in right), [exact, *weights]), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-4, atol=2e-3)


def test_a_member_called_alone_out_of_order_or_with_another_input_is_right_too(layer):
    roles, attention = layer[0], layer[1].self_attn
    other = X * 2
    attention.q_proj(X)  # keeps key and value of X, which nobody asks for
    torch.testing.assert_close(attention.v_proj(other).double(), by_hand(attention.v_proj, other.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention.k_proj(other).double(), by_hand(attention.k_proj, other.double()), rtol=1e-5, atol=1e-5)
    attention.q_proj(X)
    roles.use("other")
    torch.testing.assert_close(attention.k_proj(X).double(), by_hand(attention.k_proj, X.double(), "other"), rtol=1e-5, atol=1e-5)


def test_a_pass_that_broke_off_leaves_no_graph_once_memory_ran_out(layer, monkeypatch):
    adapted.forget()
    layer[1].mlp.gate_proj(X)  # up_proj is never called
    assert adapted._kept
    section = SimpleNamespace(manifest={}, inexact=lambda why: None, config=None, place="here")
    batch = SimpleNamespace(input_ids=torch.zeros(2, 8), items=[0, 1])
    assert training.smaller_budget(section, 16, [batch]) == 8 and not adapted._kept
    layer[1].mlp.gate_proj(X)
    section.manifest["decisions"], calls = {"rows_at_once": 8}, iter([torch.OutOfMemoryError(), None])

    def work():
        if found := next(calls):
            raise found
        return len(adapted._kept)

    assert with_fewer_rows(section, work) == 0


def test_an_output_that_nobody_uses_has_a_zero_gradient(layer):
    mlp, x = layer[1].mlp, X.clone().requires_grad_()
    gate = mlp.gate_proj(x)
    mlp.up_proj(x)
    up = mlp.up_proj.lora_B["policy"].weight
    d_x, d_up = torch.autograd.grad(gate.sum(), [x, up], allow_unused=True)
    exact = X.double().requires_grad_()
    torch.testing.assert_close(d_x.double(), gradients(by_hand(mlp.gate_proj, exact).sum(), [exact])[0], rtol=1e-5, atol=1e-5)
    assert d_up is None or not d_up.any()


def test_dropout_is_applied_where_a_role_trains_with_it(make_roles, scramble):
    roles = make_roles(lora={"r": 3, "alpha": 12, "dropout": 0.5})
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1)
    roles.use("policy")
    q = roles.base.model.layers[0].self_attn.q_proj
    assert torch.equal(q(X), q(X))
    scramble(roles.add("frozen", fresh_adapter=True), 2)
    q.train()
    roles.use("policy")
    assert not torch.equal(q(X), q(X))
    roles.use("frozen")
    assert torch.equal(q(X), q(X))


# -- norms ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_norm_is_transformers_bit_for_bit_and_its_gradient_autograd_s(dtype, tolerance):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(64).to(dtype)
    theirs.weight.data.normal_(1, 0.2, generator=torch.Generator().manual_seed(1))
    ours = LlamaRMSNorm(64).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    adapted.write_out_norms(nn.Sequential(ours))
    assert "forward" in vars(ours)
    x = (X * 3).to(dtype).requires_grad_()
    exact, weight = x.detach().double().requires_grad_(), ours.weight.detach().double().requires_grad_()
    assert torch.equal(ours(x), theirs(x))
    right = weight * exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6)
    grad = torch.randn(X.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for got, wanted in zip(gradients((ours(x) * grad).sum(), [x, ours.weight]), gradients((right * grad.double()).sum(), [exact, weight]), strict=True):
        assert (got.double() - wanted).norm() < tolerance * wanted.norm()


def test_a_norm_of_another_formula_is_left_alone():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    class OneMoreRMSNorm(GemmaRMSNorm):  # as Gemma's, under the names of Llama's
        def __init__(self):
            super().__init__(64)
            self.weight.data.fill_(0.5)
            self.variance_epsilon = self.eps

    module = OneMoreRMSNorm()
    adapted.write_out_norms(nn.Sequential(module))
    assert "forward" not in vars(module)


def test_every_norm_of_a_loaded_model_is_written_out():
    net = load_network(str(folder("builtin:tiny-llama")), ModelConfig(name_or_path="builtin:tiny-llama"), torch.float32, "here")
    norms = [m for m in net.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(norms) == 2 * net.config.num_hidden_layers + 1 and all("forward" in vars(m) for m in norms)
