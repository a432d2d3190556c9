"""Short attention on a CPU against the definition in float64, and against transformers' own function where it does not apply."""

import pytest
import torch

from posttrain import attention
from posttrain.generate import RowCache


def tensors(b, h, g, t, d, dtype=torch.bfloat16, keys=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, n, m, d, generator=generator).to(dtype) for n, m in ((h, t), (g, keys or t), (g, keys or t)))
    return [x.requires_grad_() for x in (q, k, v)]


def definition(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v in float64, every query head with the key/value head of its group."""
    h, g, d = q.shape[1], k.shape[1], q.shape[3]
    q, k, v = q.double(), k.double().repeat_interleave(h // g, 1), v.double().repeat_interleave(h // g, 1)
    scores = (q @ k.transpose(-1, -2) / d ** 0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


class Layer:
    """What the function reads of a module."""

    num_key_value_groups, is_causal, training = 2, True, False


def tree_mask(b, t):
    """Two answers of a tree: the second does not see the first."""
    mask = torch.ones(t, t, dtype=torch.bool).tril().repeat(b, 1, 1, 1)
    mask[:, 0, 2 * t // 3:, t // 3:2 * t // 3] = False
    return mask


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "tree"])
@pytest.mark.parametrize("t, d", [(2, 16), (9, 16), (65, 16), (300, 16), (2048, 16), (2049, 16), (65, 24), (300, 24)])
def test_output_and_gradients_follow_the_definition(t, d, masked):
    """A width of 24: a scaling that is no power of two, which float32 holds and bfloat16 does not."""
    q, k, v = tensors(2, 4, 2, t, d)
    mask = tree_mask(2, t) if masked else torch.ones(t, t, dtype=torch.bool).tril()
    out, _ = attention.short_attention(Layer, q, k, v, mask if masked else None, scaling=d ** -0.5)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * cotangent).sum().backward()
    got = [out, q.grad, k.grad, v.grad]
    q2, k2, v2 = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = definition(q2, k2, v2, mask)
    (expected * cotangent.double()).sum().backward()
    for a, b in zip(got, [expected, q2.grad, k2.grad, v2.grad], strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).abs().max() <= 0.03 * b.abs().max() + 1e-6


@pytest.mark.parametrize("spans", [[[(5, 40), (40, 300)], [(250, 260), (260, 270), (270, 291)]], [[(1, 2)], [(100, 300)]]], ids=["branching", "single"])
def test_rows_of_a_tree_see_their_prompt_and_their_own_answer(spans):
    """Taken one by one from APART tokens on, to the same numbers as under their mask; padding is nobody's business."""
    t = 300
    assert t >= attention.APART > attention.BLOCK
    mask, real = torch.ones(t, t, dtype=torch.bool).tril().repeat(2, 1, 1, 1), torch.zeros(2, t, dtype=torch.bool)
    for row, of in enumerate(spans):
        real[row, :of[-1][1]] = True
        for a, b in of[1:]:
            mask[row, 0, a:b, of[0][0]:a] = False
    q, k, v = tensors(2, 4, 2, t, 16)
    out, _ = attention.short_attention(Layer, q, k, v, mask, scaling=16 ** -0.5, tree_spans=spans)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) * real[..., None, None]
    (out.float() * cotangent).sum().backward()
    q2, k2, v2 = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = definition(q2, k2, v2, mask)
    (expected * cotangent.double()).sum().backward()
    for a, b in ((out[real], expected[real]), (q.grad, q2.grad), (k.grad, k2.grad), (v.grad, v2.grad)):
        assert a.isfinite().all() and (a.double() - b).abs().max() <= 0.03 * b.abs().max() + 1e-6
    assert not out[~real].any()


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "tree"])
def test_an_offset_that_a_row_s_scores_share_costs_no_digits(masked):
    """Keys with a large bias (Qwen 2 has such): in bfloat16 a score of 400 is rounded to a multiple of 2."""
    q, k, v = tensors(2, 4, 2, 180, 16)
    with torch.no_grad():
        q[..., 0] += 40
        k[..., 0] += 40
    mask = tree_mask(2, 180) if masked else torch.ones(180, 180, dtype=torch.bool).tril()
    out, _ = attention.short_attention(Layer, q, k, v, mask if masked else None, scaling=16 ** -0.5)
    expected = definition(q, k, v, mask)
    assert (out.double() - expected).norm() < 0.02 * expected.norm()


def test_a_decoding_step_keeps_the_digits_too():
    q, k, v = (x.detach() for x in tensors(2, 4, 2, 9, 16))
    q[..., 0] += 40
    k[..., 0] += 40
    cache = RowCache(2, 12)
    cache.fill = [(0, 8, torch.tensor([1])), (1, 6, torch.tensor([0]))]
    cache.update(k[:, :, :8], v[:, :, :8], 0)
    cache.fill, cache.lengths, cache.row_ids, cache.used = None, torch.tensor([6, 8]), torch.arange(2), 9
    keys, values = cache.update(k[[1, 0], :, 8:], v[[1, 0], :, 8:], 0)
    mask = torch.arange(9)[None, :] <= torch.tensor([6, 8])[:, None]
    out, _ = attention.short_attention(Layer, q[[1, 0], :, 8:], keys, values, mask[:, None, None], scaling=16 ** -0.5)
    whole = [torch.cat([x[1:, :, [0, 1, 2, 3, 4, 5, 8, 8, 8]], x[:1]]) for x in (k, v)]
    expected = definition(q[[1, 0], :, 8:], *whole, mask[:, None, None])
    assert (out.double() - expected).norm() < 0.02 * expected.norm()
    cache.keep(torch.tensor([1]))
    assert len(cache.offsets[0]) == 1


def test_one_token_against_the_definition():
    q, k, v = tensors(3, 4, 2, 1, 16, torch.float32, keys=11)
    mask = torch.arange(11)[None, :] <= torch.tensor([0, 4, 10])[:, None]
    out, _ = attention.short_attention(Layer, q, k, v, mask[:, None, None], scaling=16 ** -0.5)
    torch.testing.assert_close(out.double(), definition(q, k, v, mask[:, None, None]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["float32", "long", "a float mask"])
def test_what_it_is_not_made_for_goes_to_transformers(monkeypatch, change):
    from transformers.integrations import sdpa_attention

    called = []
    real = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", lambda *a, **k: called.append(1) or real(*a, **k))
    t = attention.LONGEST + 1 if change == "long" else 8
    q, k, v = tensors(1, 4, 2, t, 16, torch.float32 if change == "float32" else torch.bfloat16)
    mask = torch.zeros(1, 1, t, t, dtype=q.dtype).masked_fill_(~torch.ones(t, t, dtype=torch.bool).tril(), float("-inf"))
    attention.short_attention(Layer, q, k, v, mask if change == "a float mask" else None, scaling=0.25)
    assert called


def test_a_bfloat16_model_gives_the_scores_of_transformers_sdpa(make_roles, scramble):
    """Trees, padded rows and packed rows through the whole model: as near to float32 as sdpa is."""
    from posttrain.packing import collate, tree

    trees = [tree([5, 9, 31, 7], [[60, 61, 62, 2], [70, 2]]), tree([40, 41], [[80, 81, 82, 2], [9, 2]])]
    found = {}
    for dtype in ("bfloat16", "float32"):
        roles = make_roles(dtype=dtype)
        torch.manual_seed(0)
        scramble(roles.add("r", fresh_adapter=True, trainable=True, head="new"))
        for kind in ("short_cpu", "sdpa"):
            roles.base.set_attn_implementation(kind)
            for layout in ("rows", "packed"):
                with torch.no_grad():
                    found[dtype, kind, layout] = roles.logprobs("r", collate(trees, [0, 1], layout))
    exact = found["float32", "sdpa", "rows"]
    for (dtype, kind, layout), got in found.items():
        assert (got - exact).abs().max() < (0.15 if dtype == "bfloat16" else 1e-4), (dtype, kind, layout)


def test_a_long_tree_reaches_it_with_its_spans(make_roles, monkeypatch):
    from transformers import AttentionInterface

    from posttrain.packing import collate, tree

    seen, real = [], attention.short_attention
    one = tree(list(range(3, 150)), [list(range(9, 80)), list(range(50, 90))])
    found = {}
    for dtype in ("bfloat16", "float32"):
        roles = make_roles(dtype=dtype)
        roles.add("base")  # registers the function: it is replaced after that
        monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, lambda *a, **more: seen.append(more.get("tree_spans")) or real(*a, **more))
        with torch.no_grad():
            found[dtype] = roles.logprobs("base", collate([one], [0]))
    assert seen == [[one.spans]] * 4 and (found["bfloat16"] - found["float32"]).abs().max() < 0.15


def test_packed_documents_reach_it_with_a_mask_of_blocks(make_roles, monkeypatch):
    """transformers makes the mask of packed rows for this function too."""
    from transformers import AttentionInterface

    from posttrain.packing import collate, tree

    seen = []
    real = attention.short_attention
    roles = make_roles(dtype="bfloat16")
    roles.add("base")
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME,
                        lambda module, q, k, v, mask, **more: seen.append(mask) or real(module, q, k, v, mask, **more))
    with torch.no_grad():
        roles.hidden("base", collate([tree([5, 9], [[60, 2], [70, 71, 2]])], [0], "packed"))
    blocks = torch.block_diag(torch.ones(4, 4).tril(), torch.ones(5, 5).tril()).bool()
    assert len(seen) == 2 and all(torch.equal(m[0, 0], blocks) for m in seen)
