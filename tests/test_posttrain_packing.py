"""Which tokens share a forward pass must not change a number: rows, trees, packed sequences, padding, neighbours and budgets."""

import itertools
import random

import pytest
import torch

from posttrain.packing import PASS_COST, MicroBatch, collate, cost, dialogue, token_budget, tree

PROMPTS = [[5, 9, 31, 7, 12], [40, 41], [100, 3, 8, 8, 8, 8, 8, 61, 9]]
ANSWERS = [[[60, 61, 62, 2], [70, 2], [60, 61, 2]], [[80, 81, 82, 83, 84, 85, 2], [9, 2]], [[2], [55, 56, 57, 2]]]
TREES = [tree(p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
DIALOGUE = dialogue([1, 7, 9, 20, 21, 2, 8, 30, 31, 2], [False, False, False, True, True, True, False, True, True, True])


@pytest.fixture(scope="module")
def roles(make_roles, scramble):
    roles = make_roles()
    scramble(roles.add("policy", fresh_adapter=True, trainable=True, head="new"))
    return roles


def alone(roles, ids: list[int]):
    """Reference: transformers' own forward on one sequence -> (log-probabilities (T-1,) of ids[1:], hidden states (T, d))."""
    roles.use("policy")
    net = roles.base
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        hidden = net.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    logp = torch.log_softmax(logits, -1)
    return torch.stack([logp[t - 1, ids[t]] for t in range(1, len(ids))]), hidden


def expected(roles, trees) -> tuple[list[list[float]], list[float]]:
    """Of every answer in order: log-probabilities of its counted tokens and its score, one sequence at a time."""
    logprobs, scores = [], []
    for t in trees:
        for (a, b), counted in zip(t.spans, t.counted, strict=True):
            ids = t.ids[:t.prompt] + t.ids[a:b]
            logp, hidden = alone(roles, ids)
            logprobs.append([logp[t.prompt + p - a - 1].item() for p in counted])
            scores.append(roles["policy"].head(hidden[-1]).item())
    return logprobs, scores


def measured(roles, trees, groups, layout) -> tuple[list[list[float]], list[float]]:
    """The same through our batches, back in the trees' order."""
    logprobs, scores = {}, {}
    with torch.no_grad():
        for group in groups:
            batch = collate(trees, group, layout)
            assert batch.tokens == sum(cost(trees[i], layout) for i in group)
            values, rewards = roles.logprobs("policy", batch).tolist(), roles.scalars("policy", batch).tolist()
            seen: dict[int, int] = {}
            names = []
            for item in batch.items:
                names.append((item, seen.setdefault(item, 0)))
                seen[item] += 1
            for owner, slot, value in zip(batch.owner.tolist(), batch.slot.tolist(), values, strict=True):
                assert slot == len(logprobs.setdefault(names[owner], []))
                logprobs[names[owner]].append(value)
            scores.update(zip(names, rewards, strict=True))
    order = sorted(scores)
    return [logprobs[k] for k in order], [scores[k] for k in order]


def close(a, b, tolerance=2e-5):
    assert [len(x) for x in a[0]] == [len(x) for x in b[0]]
    for x, y in zip(a[0], b[0], strict=True):
        assert x == pytest.approx(y, abs=tolerance)
    assert a[1] == pytest.approx(b[1], abs=tolerance)


# -- layouts -----------------------------------------------------------------------------------------------------------------------


def test_a_tree_by_hand():
    t = tree([5, 9], [[60, 2], [70, 71, 2]])
    assert (t.ids, t.prompt, t.ends, t.spans) == ([5, 9, 60, 2, 70, 71, 2], 2, (4, 7), [(2, 4), (4, 7)])
    assert t.counted == ((2, 3), (4, 5, 6))
    rows = collate([t], [0])
    assert rows.predictors.tolist() == [1, 2, 1, 4, 5] and rows.targets.tolist() == [60, 2, 70, 71, 2]
    assert rows.owner.tolist() == [0, 0, 1, 1, 1] and rows.slot.tolist() == [0, 1, 0, 1, 2] and rows.last.tolist() == [3, 6]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    seen = [[c for c in range(7) if rows.attention_mask[0, 0, r, c]] for r in range(7)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
    packed = collate([t], [0], "packed")
    assert packed.input_ids.tolist() == [[5, 9, 60, 2, 5, 9, 70, 71, 2]] and packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert packed.predictors.tolist() == [1, 2, 5, 6, 7] and packed.last.tolist() == [3, 8] and packed.attention_mask is None
    assert (cost(t, "rows"), cost(t, "packed")) == (7, 9)


def test_a_dialogue_by_hand():
    rows = collate([DIALOGUE, dialogue([1, 4], [False, True])], [0, 1])
    assert rows.targets.tolist() == [20, 21, 2, 30, 31, 2, 4]
    assert rows.predictors.tolist() == [2, 3, 4, 6, 7, 8, 10] and rows.last.tolist() == [9, 11]
    assert rows.attention_mask is None and rows.position_ids is None and rows.tokens == 12
    assert rows.input_ids[1].tolist() == [1, 4] + [0] * 8


@pytest.mark.parametrize("make", [
    lambda: tree([], [[1]]), lambda: tree([1], []), lambda: tree([1], [[2], []]), lambda: dialogue([1, 2], [False, False]),
    lambda: dialogue([1, 2], [True, True]), lambda: dialogue([1, 2], [True]), lambda: dialogue([], [])])
def test_what_counts_nothing_is_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("budget", [1, 14, 30, 10_000])
def test_every_tree_is_in_one_micro_batch_within_the_budget(layout, budget):
    trees = [*TREES, DIALOGUE, *[dialogue([1] * n, [False] * (n - 1) + [True]) for n in (3, 4, 4, 12, 30, 2)]]
    groups = token_budget(trees, budget, layout)
    assert sorted(i for g in groups for i in g) == list(range(len(trees)))
    for g in groups:
        batch = collate(trees, g, layout)
        assert batch.input_ids.numel() <= budget or len(g) == 1
    sizes = [collate(trees, g, layout).input_ids.shape[1] for g in groups]
    assert sizes == sorted(sizes, reverse=True) or layout == "packed"
    assert groups == token_budget(trees, budget, layout)


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_split_with_the_least_padding(seed):
    """Against every way to cut the sorted lengths into neighbours."""
    rng = random.Random(seed)
    lengths, budget = [rng.choice((rng.randint(2, 90), rng.randint(300, 600))) for _ in range(9)], 900
    trees = [dialogue([1] * n, [False] * (n - 1) + [True]) for n in lengths]

    def price(groups):
        sizes = [len(g) * max(lengths[i] for i in g) for g in groups]
        return sum(sizes) + PASS_COST * len(groups) if all(s <= budget or len(g) == 1 for s, g in zip(sizes, groups, strict=True)) else float("inf")

    order = sorted(range(9), key=lambda i: -lengths[i])
    ways = [[order[a:b] for a, b in itertools.pairwise((0, *cuts, 9))] for n in range(9) for cuts in itertools.combinations(range(1, 9), n)]
    assert price(token_budget(trees, budget)) == min(map(price, ways))


# -- the same numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_any_batch_equals_separate_sequences(roles, layout, budget):
    trees = [*TREES, DIALOGUE]
    close(measured(roles, trees, token_budget(trees, budget, layout), layout), expected(roles, trees))


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_answers_do_not_see_each_other(roles, layout):
    one = measured(roles, [tree(PROMPTS[0], [[60, 61, 62, 2], [70, 71, 2]])], [[0]], layout)
    other = measured(roles, [tree(PROMPTS[0], [[99, 98, 97, 96, 95, 94, 2], [70, 71, 2]])], [[0]], layout)
    assert one[0][1] == pytest.approx(other[0][1], abs=2e-6) and one[1][1] == pytest.approx(other[1][1], abs=2e-6)
    assert one[1][0] != pytest.approx(other[1][0], abs=1e-3)


def test_neighbours_and_padding_change_no_score(roles):
    """Alone, beside a longer one (padded), first or last in the batch."""
    long = tree(list(range(3, 90)), [[7, 2]])
    base = measured(roles, [TREES[0]], [[0]], "rows")
    for trees, at in (([TREES[0], long], 0), ([long, TREES[0]], 1), ([TREES[1], long, TREES[0], DIALOGUE], 2)):
        for layout in ("rows", "packed"):
            got = measured(roles, trees, [list(range(len(trees)))], layout)
            first = sum(len(t.ends) for t in trees[:at])
            close((got[0][first:first + 3], got[1][first:first + 3]), base, 2e-6 if layout == "rows" else 2e-5)


def test_padding_on_the_left_gives_the_same_scores(roles):
    """transformers with left padding, a mask and shifted positions is the independent path."""
    sequences = [PROMPTS[0] + ANSWERS[0][0], PROMPTS[1] + ANSWERS[1][1], PROMPTS[2] + ANSWERS[2][1]]
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    roles.use("policy")
    with torch.no_grad():
        hidden = roles.base.model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False)
        left = roles["policy"].head(hidden.last_hidden_state[:, -1]).squeeze(-1).tolist()
    ours = measured(roles, [tree(s[:2], [s[2:]]) for s in sequences], [[0, 1, 2]], "rows")[1]
    assert ours == pytest.approx(left, abs=2e-5)


# -- packed sequences and transformers -----------------------------------------------------------------------------------------------


def packed_logits(roles, sequences, **call):
    roles.use("policy")
    ids = torch.tensor([[t for s in sequences for t in s]])
    positions = torch.tensor([[i for s in sequences for i in range(len(s))]])
    with torch.no_grad():
        return roles.base(input_ids=ids, position_ids=positions, **call).logits[0]


def leak(roles, **call) -> float:
    """Largest difference between packed and separate logits, beyond the first document (which has nothing before it)."""
    sequences = [PROMPTS[0] + ANSWERS[0][0], PROMPTS[2] + ANSWERS[2][1], PROMPTS[1] + ANSWERS[1][0]]
    with torch.no_grad():
        separate = torch.cat([roles.base(input_ids=torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    return (packed_logits(roles, sequences, **call) - separate)[len(sequences[0]):].abs().max().item()


def test_packed_documents_do_not_see_each_other_and_the_careless_calls_do(roles):
    """transformers keeps documents apart only with restarting positions, no attention mask and no cache (shared/peers.md)."""
    roles.use("policy")
    total = sum(len(p) + len(a) for p, a in ((PROMPTS[0], ANSWERS[0][0]), (PROMPTS[2], ANSWERS[2][1]), (PROMPTS[1], ANSWERS[1][0])))
    for kind in (roles.base.config._attn_implementation, "sdpa"):
        roles.base.set_attn_implementation(kind)
        assert leak(roles, use_cache=False) < 2e-5
        assert leak(roles, use_cache=False, attention_mask=torch.ones(1, total, dtype=torch.long)) > 0.02
        assert leak(roles, use_cache=True) > 0.02


def test_our_packed_call_is_the_safe_one(roles, monkeypatch):
    """What `hidden` passes to transformers: positions that restart, no mask, no cache."""
    calls = []
    body = roles["policy"].body
    real = body.forward
    monkeypatch.setattr(body, "forward", lambda *args, **kwargs: calls.append(kwargs) or real(*args, **kwargs))
    with torch.no_grad():
        roles.hidden("policy", collate(TREES, [0, 1, 2], "packed"))
    call = calls[0]
    assert call["attention_mask"] is None and call["use_cache"] is False and (call["position_ids"] == 0).sum() == 7


def test_gradients_of_trees_and_packed_rows_are_those_of_separate_sequences(roles):
    role = roles["policy"]

    def gradients(groups, trees, layout):
        roles.base.zero_grad()
        for group in groups:
            batch = collate(trees, group, layout)
            hidden = roles.hidden("policy", batch)
            (roles.logprobs_of("policy", hidden, batch).sum() + roles.scalars_at("policy", hidden, batch.last).sum()).backward()
        out = [p.grad.clone() for p in role.parameters()]
        roles.base.zero_grad()
        return out

    singles = [tree(p, [a]) for p, answers in zip(PROMPTS, ANSWERS, strict=True) for a in answers]
    reference = gradients([[i] for i in range(len(singles))], singles, "rows")
    for layout in ("rows", "packed"):
        for a, b in zip(gradients([[0, 1, 2]], TREES, layout), reference, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-4 * b.abs().max().item() + 1e-7)


def test_to_moves_every_tensor():
    batch = collate(TREES, [0, 1])
    moved = batch.to("meta")
    assert isinstance(moved, MicroBatch) and all(t.device.type == "meta" for t in vars(moved).values() if isinstance(t, torch.Tensor))
