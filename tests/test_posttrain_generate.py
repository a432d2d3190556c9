"""The decoding loop: the sampler's log-probabilities are the trainer's, its draws follow the softmax, and nobody's answer depends on
who is decoded beside it. transformers' generate is the reference for greedy decoding."""

import math

import pytest
import torch

from posttrain import generate
from posttrain.generate import Completion, Sampling, choose, sample
from posttrain.packing import collate, tree

PROMPTS = [[5, 9, 31, 7, 12], [40, 41], [100, 3, 8, 8, 8, 8, 8, 61, 9], [77], [200, 201, 202, 203], [9] * 30, [1, 2, 3]]


@pytest.fixture(scope="module")
def roles(make_roles, scramble):
    roles = make_roles()
    scramble(roles.add("policy", fresh_adapter=True, trainable=True), 1, 0.08)
    scramble(roles.add("other", fresh_adapter=True), 2, 0.08)
    return roles


def ids(out: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.ids for c in group] for group in out]


def draw(roles, prompts=PROMPTS, samples=3, sampling=None, seed=0, stop=300, role="policy", **more):
    """A stop token of some probability, so that answers end at different lengths."""
    return sample(roles, role, prompts, samples, sampling or Sampling(24), seed, stop=stop, **more)


@pytest.fixture(scope="module")
def stop(roles) -> int:
    """The token that the policy says most often: with it about half of the answers end early."""
    said = [t for group in ids(draw(roles, samples=6, stop=-1)) for answer in group for t in answer]
    return max(set(said), key=said.count)


# -- one choice --------------------------------------------------------------------------------------------------------------------------


def logits_of(v: int, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(1, v, generator=torch.Generator().manual_seed(seed)) * scale


def grid(n: int) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("v", [1, 2, 11, 256, 257, 700])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_draws_follow_the_softmax(v, temperature):
    """Over an even grid of u the inverse of a distribution function gives each token its probability, to one part in the grid."""
    n = 5000
    logits = logits_of(v)
    token, logprob = choose(logits.repeat(n, 1), grid(n), temperature, 1.0)
    p = torch.softmax(logits[0].double() / temperature, -1)
    counts = torch.bincount(token, minlength=v).double()
    assert (counts - n * p).abs().max() <= 1.5
    torch.testing.assert_close(logprob.double(), p.log()[token], rtol=1e-5, atol=1e-5)


def test_draws_of_random_numbers_pass_a_chi_square():
    n, v = 20_000, 9
    logits = logits_of(v, 3)
    u = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    token, _ = choose(logits.repeat(n, 1), u, 1.0, 1.0)
    expected = n * torch.softmax(logits[0].double(), -1)
    chi2 = ((torch.bincount(token, minlength=v) - expected) ** 2 / expected).sum().item()
    assert chi2 < 26.1  # 8 degrees of freedom, p = 0.001
    wrong = n * torch.softmax(logits[0].double() / 1.1, -1)  # the test has teeth
    assert ((torch.bincount(token, minlength=v) - wrong) ** 2 / wrong).sum() > 26.1


@pytest.mark.parametrize("v", [5, 40, 600, 3000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_top_p_keeps_the_smallest_set_that_reaches_it(v, top_p, scale):
    """Flat distributions over more tokens than CANDIDATES need the whole sort."""
    n = 1500
    logits = logits_of(v, v, scale)
    token, logprob = choose(logits.repeat(n, 1), grid(n), 0.8, top_p)
    p = torch.softmax(logits[0].double() / 0.8, -1)
    order = p.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    for t in order:
        if mass >= top_p:
            break
        kept.append(t)
        mass += p[t].item()
    edge = order[len(kept) - 2:len(kept) + 1]  # float32 may put the last one on either side
    seen = set(token.tolist())
    assert seen <= {*kept, *edge}
    counts = torch.bincount(token, minlength=v).double()
    for t in kept[:-1]:
        assert abs(counts[t] - n * p[t] / mass) <= 1.5 + n * p[edge[-1]].item()
    torch.testing.assert_close(logprob.double(), p.log()[token], rtol=1e-5, atol=1e-4)  # over the whole vocabulary, before the cut


def test_temperature_zero_is_the_argmax_and_its_log_probability_at_temperature_one():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    token, logprob = choose(logits.clone(), torch.rand(50, dtype=torch.float64), 0, 0.3)
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logprob, torch.log_softmax(logits, -1).max(-1).values)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_ends_of_the_unit_interval_and_impossible_tokens(top_p):
    """u = 0 and the largest u below 1 give tokens that can be; a token of no probability never comes."""
    logits = torch.full((4, 600), float("-inf"))
    logits[:, 3] = logits[:, 258] = logits[:, 259] = 0.0
    u = torch.tensor([0.0, 1 - 2.0 ** -53, 1 / 3, 2 / 3], dtype=torch.float64)
    token, logprob = choose(logits, u, 1.0, top_p)
    assert set(token.tolist()) <= {3, 258, 259} and token[0] != token[1]
    torch.testing.assert_close(logprob, torch.full((4,), -math.log(3)))


# -- the loop ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(24), Sampling(24, 0.7), Sampling(24, 1.3, 0.8)], ids=["plain", "cool", "hot top-p"])
def test_the_sampler_s_log_probabilities_are_the_trainer_s(roles, stop, sampling):
    out = draw(roles, sampling=sampling, stop=stop, batch=5)
    trees = [tree(p, [c.ids for c in group]) for p, group in zip(PROMPTS, out, strict=True)]
    for i, (t, group) in enumerate(zip(trees, out, strict=True)):
        with torch.no_grad():
            trained = roles.logprobs("policy", collate([t], [0]), sampling.temperature).tolist()
            other = roles.logprobs("other", collate([t], [0]), sampling.temperature).tolist()
        recorded = [x for c in group for x in c.logprobs]
        assert recorded == pytest.approx(trained, abs=2e-4), i
        assert recorded != pytest.approx(other, abs=1e-2)
        assert all(len(c.ids) == len(c.logprobs) for c in group)


@pytest.mark.parametrize("batch", [1, 3, 4, 64])
def test_an_answer_does_not_depend_on_the_batch(roles, stop, batch):
    assert ids(draw(roles, samples=5, stop=stop, batch=batch)) == ids(draw(roles, samples=5, stop=stop, batch=17))


def test_an_answer_does_not_depend_on_later_prompts_or_on_their_order_of_work(roles, stop):
    whole = ids(draw(roles, stop=stop))
    assert ids(draw(roles, PROMPTS[:2], stop=stop)) == whole[:2]
    swapped = [PROMPTS[0], [9] * 40, *PROMPTS[2:]]  # a longer neighbour changes the order in which the queue is served
    assert ids(draw(roles, swapped, stop=stop))[2:] == whole[2:]


def test_seeds_and_samples_differ_and_repeat(roles, stop):
    a, b = draw(roles, stop=stop, seed=1), draw(roles, stop=stop, seed=2)
    assert ids(a) == ids(draw(roles, stop=stop, seed=1)) != ids(b)
    assert all(len({tuple(c) for c in group}) > 1 for group in ids(a))


def test_the_first_token_of_many_samples_follows_the_model(roles):
    n = 3000
    out = sample(roles, "policy", [PROMPTS[0]], n, Sampling(1, 0.5), 0, stop=-1, batch=1000)[0]
    roles.use("policy")
    with torch.no_grad():
        p = torch.softmax(roles.base(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 0.5, -1)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in out]), minlength=len(p)).double()
    likely = n * p >= 5
    cells = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([n * p[likely], n * p[~likely].sum()[None]])
    degrees = len(cells) - 1
    chi2 = ((cells - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - degrees) < 4 * math.sqrt(2 * degrees), (chi2, degrees)


@pytest.mark.parametrize("batch", [2, 64])
def test_greedy_is_transformers_generate(roles, stop, batch):
    out = draw(roles, samples=1, sampling=Sampling(20, 0.0), stop=stop, batch=batch)
    for prompt, (answer,) in zip(PROMPTS, out, strict=True):
        roles.use("policy")
        theirs = roles.base.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                                     max_new_tokens=20, eos_token_id=stop, pad_token_id=0, use_cache=True)[0, len(prompt):].tolist()
        assert answer.ids == theirs
        assert answer.finished == (theirs[-1] == stop)


def test_an_answer_ends_at_the_stop_token_or_is_cut_off(roles, stop):
    out = [c for group in draw(roles, samples=8, sampling=Sampling(16), stop=stop) for c in group]
    assert {c.finished for c in out} == {True, False}
    for c in out:
        assert c.finished == (c.ids[-1] == stop) and stop not in c.ids[:-1]
        assert c.finished or len(c.ids) == 16
    first = out[0].ids[0]  # a stop that is said at once by some
    last = [c for group in draw(roles, samples=40, sampling=Sampling(1), stop=first) for c in group]
    assert all(len(c.ids) == 1 and c.finished == (c.ids == [first]) for c in last) and {c.finished for c in last} == {True, False}


def test_roles_speak_with_their_own_adapters(roles):
    assert ids(draw(roles, role="other")) != ids(draw(roles))


def test_every_token_is_ticked_and_every_prompt_prefilled_once(roles, stop, monkeypatch):
    ticks, prefilled = [], []
    with torch.inference_mode():
        body = roles.decoder("policy")
    real = body.forward

    def watched(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1 or kwargs.get("attention_mask") is None:
            prefilled.append(len(kwargs["input_ids"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(body, "forward", watched)
    out = draw(roles, samples=4, stop=stop, tick=ticks.append)
    assert sum(ticks) == sum(len(c.ids) for group in out for c in group)
    assert sum(prefilled) == len(PROMPTS)  # four samples share their prompt's pass


def test_no_prompt_or_an_empty_one_is_refused(roles):
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            draw(roles, prompts)


def test_prompts_are_grouped_within_the_budget():
    lengths = [1, 1, 2, 5, 9, 30, 31]
    groups = list(generate._groups(list(range(7)), [[0] * n for n in lengths], 40))
    assert [i for g in groups for i in g] == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 40 for g in groups)


def test_no_gradient_is_kept(roles):
    from posttrain.models import Roles

    draw(roles, PROMPTS[:1], samples=1)
    assert isinstance(roles, Roles) and all(p.grad is None and not p.is_inference() for p in roles.base.parameters())
    b = collate([tree(PROMPTS[0], [[3, 4]])], [0])
    roles.logprobs("policy", b).sum().backward()  # training goes on after sampling
    roles.base.zero_grad(set_to_none=True)
