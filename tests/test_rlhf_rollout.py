"""Prompts -> scored answers -> mini-batches: nothing lost, nothing twice, the same numbers as one sequence at a time."""

from types import SimpleNamespace

import pytest
import torch

from posttrain import chat
from posttrain.chunks import derive_seed
from posttrain.errors import PosttrainError
from posttrain.formats import Demonstration, Prompt
from posttrain.generate import Completion, Sampling
from posttrain.packing import tree
from rlhf import rollout
from rlhf.rollout import Encoded, Rollout, Scored, encode_prompts, exact_kl, make_batches, sample_and_score

SHAPE = SimpleNamespace(layout="rows", device=torch.device("cpu"), tokenizer=SimpleNamespace(pad_token_id=777))
PACKED = SimpleNamespace(layout="packed", device=torch.device("cpu"), tokenizer=SimpleNamespace(pad_token_id=777))


def answers_of(trees: int = 7, k: int = 3, seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts and their K answers, every length between 1 and 9; token ids tell where they belong."""
    g = torch.Generator().manual_seed(seed)
    prompts = [[1000 + i] * int(torch.randint(1, 12, (1,), generator=g)) for i in range(trees)]
    answers = [[[100 * i + 10 * j + t for t in range(1 + (2 * i + 3 * j) % 9)] for j in range(k)] for i in range(trees)]
    return prompts, answers


ORDER = [4, 0, 6, 2, 5, 1, 3]


def batches_of(roles, mini, budget, k=3):
    prompts, answers = answers_of(k=k)
    return make_batches([tree(p, a) for p, a in zip(prompts, answers, strict=True)], mini, budget, roles, ORDER), answers


# -- mini-batches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [SHAPE, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("budget", [1, 40, 4096])
@pytest.mark.parametrize("mini, k", [(6, 3), (3, 3), (2, 1), (100, 3), (1, 3)])
def test_every_answer_token_is_in_exactly_one_micro_batch_at_its_place(roles, budget, mini, k):
    batches, answers = batches_of(roles, mini, budget, k)
    flat_answers = [a for group in answers for a in group]
    assert batches.response_mask.shape == (7 * k, max(map(len, flat_answers)))
    seen = []
    for batch, where in batches.flat():
        number, slot = where[batch.owner].tolist(), batch.slot.tolist()
        seen += zip(number, slot, strict=True)
        for n, s, target in zip(number, slot, batch.targets.tolist(), strict=True):
            assert flat_answers[n][s] == target
    assert sorted(seen) == [(n, s) for n, a in enumerate(flat_answers) for s in range(len(a))]
    assert batches.response_mask.tolist() == [[s < len(a) for s in range(batches.response_mask.shape[1])] for a in flat_answers]


@pytest.mark.parametrize("mini, k, sizes", [(6, 3, [2, 2, 2, 1]), (7, 3, [2, 2, 2, 1]), (2, 1, [2, 2, 2, 1]), (1, 3, [1] * 7),
                                            (21, 3, [7])])
def test_mini_batches_are_whole_prompts_in_the_given_order(mini, k, sizes):
    for budget in (1, 4096):
        batches, _ = batches_of(SHAPE, mini, budget, k)
        assert len(batches.mini) == len(batches.where) == len(sizes)
        start = 0
        for wheres, size in zip(batches.where, sizes, strict=True):
            expected = {i * k + j for i in ORDER[start:start + size] for j in range(k)}
            assert sorted(n for w in wheres for n in w.tolist()) == sorted(expected)
            start += size


@pytest.mark.parametrize("roles", [SHAPE, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_spread_and_of_are_each_others_inverse(roles, budget):
    batches, _ = batches_of(roles, 6, budget)
    full = torch.randn(batches.response_mask.shape, generator=torch.Generator().manual_seed(3))
    back = torch.zeros_like(full)
    for batch, where in batches.flat():
        flat = batches.of(batch, where, full)
        assert flat.tolist() == [full[n, s].item() for n, s in zip(where[batch.owner].tolist(), batch.slot.tolist(), strict=True)]
        back += batches.spread(batch, where, flat)
    assert torch.equal(back, full * batches.response_mask)


def test_the_answers_of_a_prompt_share_it():
    """On the CPU a prompt of p tokens with answers of a, b, c costs p + a + b + c, not 3 p + a + b + c."""
    prompts, answers = answers_of()
    batches, _ = batches_of(SHAPE, 100, 4096)
    assert sum(b.tokens for b, _ in batches.flat()) == sum(len(p) + sum(map(len, a)) for p, a in zip(prompts, answers, strict=True))
    unrolled, _ = batches_of(PACKED, 100, 4096)
    assert sum(b.tokens for b, _ in unrolled.flat()) == sum(3 * len(p) + sum(map(len, a)) for p, a in zip(prompts, answers, strict=True))


def test_padding_is_never_predicted_nor_predicts():
    padded = 0
    for budget in (40, 80, 4096):
        batches, _ = batches_of(SHAPE, 6, budget)
        for batch, _ in batches.flat():
            flat = batch.input_ids.flatten()
            pads = int((flat == 777).sum())
            assert not (flat[batch.predictors] == 777).any() and not (batch.targets == 777).any() and not (flat[batch.last] == 777).any()
            assert batch.tokens + pads == flat.numel() and (flat.numel() <= budget or len(batch.input_ids) == 1)
            padded += pads
    assert padded


# -- the rollout's check -----------------------------------------------------------------------------------------------------------


def good(**changed) -> Rollout:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    parts = {"response_mask": mask, "old_logprobs": -1.0 * mask, "ref_logprobs": -2.0 * mask, "values": 0.5 * mask}
    return Rollout(**{**parts, "scores": torch.tensor([1.0, -1.0]), **changed})


def put(name: str, at, value: float) -> dict:
    x = getattr(good(), name).clone()
    x[at] = value
    return {name: x}


def test_a_good_rollout_passes_and_comes_back():
    one = good()
    assert one.check() is one


@pytest.mark.parametrize("change", [
    *[put(name, (0, 1), bad) for name in ("old_logprobs", "ref_logprobs", "values") for bad in (float("nan"), float("inf"), -float("inf"))],
    *[put(name, (0, 2), bad) for name in ("old_logprobs", "ref_logprobs", "values") for bad in (-1.0, float("nan"))],  # outside the mask
    {"old_logprobs": -torch.ones(2, 2)}, {"values": torch.zeros(3, 3)}, {"ref_logprobs": torch.zeros(3)},
    put("scores", 0, float("nan")), put("scores", 1, float("inf")), {"scores": torch.zeros(3)}, {"scores": torch.zeros(2, 1)},
    put("old_logprobs", (0, 0), 0.1),  # a probability above 1
    {"response_mask": torch.tensor([[True, True, False], [False, False, False]]), "old_logprobs": torch.tensor([[-1.0, -1, 0], [0, 0, 0]]),
     "ref_logprobs": torch.zeros(2, 3), "values": torch.zeros(2, 3)},  # an empty answer
])
def test_a_bad_rollout_is_refused(change):
    with pytest.raises(PosttrainError, match="PPO rollout"):
        good(**change).check()


# -- seeds and prompts ---------------------------------------------------------------------------------------------------------------


def test_seeds_depend_on_every_part_and_on_nothing_else():
    seeds = {derive_seed(s, what, i) for s in (0, 1, 11) for what in ("sample", "epoch") for i in (-1, 0, 1, 11)}
    assert len(seeds) == 24 and all(0 <= s < 2 ** 56 for s in seeds)
    assert derive_seed(1, "11") != derive_seed(11, "1") and derive_seed(0, "sample", 3) == derive_seed(0, "sample", 3)
    # sha256(b"0:sample:3"), its first 7 bytes, big end first: a change here changes every run
    import hashlib

    assert derive_seed(0, "sample", 3) == int(hashlib.sha256(b"0:sample:3").hexdigest()[:14], 16)


class Teller:
    """Stands for a section: says into a list."""

    def __init__(self):
        self.said, self.place = [], "r.yaml: stages.x"
        self.log = SimpleNamespace(say=self.said.append)


@pytest.fixture(scope="module")
def roles(make_roles, scramble):
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    made = make_roles()
    scramble(made.add("policy", fresh_adapter=True, trainable=True), 1)
    scramble(made.add("reference", fresh_adapter=True), 2)
    return made


def prompt(text: str, **fields) -> Prompt:
    return Prompt([{"role": "user", "content": text}], **fields)


def test_prompts_are_encoded_as_the_template_renders_them_and_long_ones_are_named(roles):
    section, short, long = Teller(), prompt("Why?"), prompt("Why " + "so very " * 20 + "long?")
    ids = roles.tokenizer("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    got = encode_prompts(section, [short, long, short], roles, len(ids))
    assert got == [Encoded(short, ids), Encoded(short, ids)]
    assert len(section.said) == 1 and "1 prompts are longer than max_prompt_tokens" in section.said[0] and "Why so very" in section.said[0]


def test_no_prompt_left_and_no_prompts_at_all_are_told(roles):
    with pytest.raises(PosttrainError, match=r"stages\.x\.prompts: no prompt is left"):
        encode_prompts(Teller(), [prompt("Why?")], roles, 3)
    wrong = Demonstration([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], source="d")
    with pytest.raises(PosttrainError, match="'d' holds demonstrations"):
        encode_prompts(Teller(), [wrong], roles, 99)


# -- sampled and scored ------------------------------------------------------------------------------------------------------------


class FakeScorer:
    """helpfulness: the answer's first id; safety: its remainder by 6, so that about half lie below the threshold."""

    threshold = 2.5

    def __init__(self, spoil: float | None = None, statistics: dict | None = None):
        self.spoil, self.asked, self.statistics = spoil, None, statistics or {}

    def __call__(self, prompts, answers):
        self.asked = (prompts, answers)
        safety = [[float(a[0] % 6) for a in group] for group in answers]
        if self.spoil is not None:
            safety[-1][-1] = self.spoil
        return {"helpfulness": [[float(a[0]) for a in group] for group in answers], "safety": safety}


@pytest.fixture(scope="module")
def encoded(roles):
    section = Teller()
    three = [prompt("Why?"), prompt("Steal it how?", safety=True), prompt("A rather longer question, is it not?")]
    return encode_prompts(section, three, roles, 99)


def scored_by(roles, encoded, scorer, temperature=1.0, samples=4, **more) -> Scored:
    return sample_and_score(roles, "policy", scorer, encoded, samples, Sampling(6, temperature), 7, 8, **more)


def test_scores_and_the_gate_are_laid_out_as_prompts_by_samples(roles, encoded):
    scorer = FakeScorer()
    scored = scored_by(roles, encoded, scorer)
    assert scorer.asked == ([e.ids for e in encoded], [[a.ids for a in group] for group in scored.answers])
    stop = chat.end_of_turn(roles.tokenizer)
    for i, group in enumerate(scored.answers):
        assert len(group) == 4
        for k, a in enumerate(group):
            h, s, tagged = float(a.ids[0]), float(a.ids[0] % 6), i == 1
            assert (scored.helpfulness[i, k].item(), scored.safety[i, k].item()) == (h, s)
            assert scored.merged[i, k].item() == (s if tagged or s < 2.5 else h)
            assert (scored.by_tag[i, k].item(), scored.by_threshold[i, k].item()) == (tagged, s < 2.5 and not tagged)
            assert scored.finished[i, k].item() is (a.ids[-1] == stop) is a.finished
            assert 1 <= len(a.ids) <= 6 and (a.finished or len(a.ids) == 6) and stop not in a.ids[:-1]
    assert scored.by_threshold.any() and not (scored.by_threshold | scored.by_tag).all()


def test_standardized_rewards_leave_the_gate_on_the_raw_score(roles, encoded):
    scales = {"helpfulness": (10.0, 4.0), "safety": (-1.0, 0.5)}
    plain, standard = scored_by(roles, encoded, FakeScorer()), scored_by(roles, encoded, FakeScorer(statistics=scales))
    assert torch.equal(plain.by_threshold, standard.by_threshold) and torch.equal(plain.safety, standard.safety)
    for i in range(3):
        for k in range(4):
            h, s = plain.helpfulness[i, k].item(), plain.safety[i, k].item()
            expected = (s + 1) / 0.5 if i == 1 or s < 2.5 else (h - 10) / 4
            assert standard.merged[i, k].item() == pytest.approx(expected)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_stops_at_once(roles, encoded, spoil):
    """NaN is not below the threshold: left alone, the gate would answer with the helpfulness score."""
    with pytest.raises(PosttrainError, match="not finite"):
        scored_by(roles, encoded, FakeScorer(spoil))


def test_a_policy_that_is_broken_stops_at_once(roles, encoded, monkeypatch):
    monkeypatch.setattr(rollout, "sample", lambda *a, **k: [[Completion([5, 2], [-1.0, float("nan")], True)]] * 3)
    with pytest.raises(PosttrainError, match="not finite"):
        scored_by(roles, encoded, FakeScorer(), samples=1)


def test_rows_for_the_disk_hold_every_answer_once(roles, encoded):
    scored = scored_by(roles, encoded, FakeScorer())
    rows = scored.rows(roles.tokenizer)
    assert len(rows) == 12
    for n, row in enumerate(rows):
        i, k = divmod(n, 4)
        assert row["prompt"] == encoded[i].prompt.messages and row["ids"] == scored.answers[i][k].ids
        assert (row["merged"], row["finished"]) == (scored.merged[i, k].item(), scored.answers[i][k].finished)
        assert "<|im_end|>" not in row["answer"] and row["answer"] == row["answer"].strip()


# -- the same numbers as one sequence at a time ----------------------------------------------------------------------------------------


def distributions(roles, role: str, ids: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities (R, V) before every token of an answer: transformers' own forward on one sequence, softmax in float64."""
    roles.use(role)
    with torch.no_grad():
        logits = roles.base(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0].double() / temperature
    return torch.log_softmax(logits, -1)[len(ids) - 1:-1]


def alone(roles, role: str, ids: list[int], answer: list[int], temperature: float) -> list[float]:
    logp = distributions(roles, role, ids, answer, temperature)
    return [logp[t, token].item() for t, token in enumerate(answer)]


def section_of(budget: int) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(micro_batch_tokens=budget), manifest={})


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_log_probabilities_are_those_of_one_sequence(roles, encoded, temperature):
    for e, group in zip(encoded, scored_by(roles, encoded, FakeScorer(), temperature).answers, strict=True):
        for a in group:
            assert a.logprobs == pytest.approx(alone(roles, "policy", e.ids, a.ids, temperature), abs=1e-4)


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("budget, temperature", [(16, 1.0), (4096, 1.0), (4096, 0.6)])
def test_the_kl_of_an_answer_is_summed_over_the_whole_vocabulary(roles, encoded, budget, temperature, layout, monkeypatch):
    monkeypatch.setattr(roles, "layout", layout)
    scored = scored_by(roles, encoded, FakeScorer(), temperature)
    got = exact_kl(section_of(budget), roles, "policy", "reference", scored, temperature)
    expected = []
    for e, group in zip(encoded, scored.answers, strict=True):
        for a in group:
            p, q = (distributions(roles, role, e.ids, a.ids, temperature) for role in ("policy", "reference"))
            expected.append((p.exp() * (p - q)).sum().item())
    assert got == pytest.approx(expected, abs=2e-4) and min(expected) > 0.01


def test_it_is_far_less_noisy_than_the_log_ratio_of_what_was_drawn(roles, encoded):
    """Both estimate the same; PPO's early stop judges by a few answers' mean."""
    scored = scored_by(roles, encoded, FakeScorer(), samples=64)
    exact = torch.tensor(exact_kl(section_of(4096), roles, "policy", "reference", scored))
    drawn = torch.tensor([sum(alone(roles, "policy", e.ids, a.ids, 1.0)) - sum(alone(roles, "reference", e.ids, a.ids, 1.0))
                          for e, group in zip(encoded, scored.answers, strict=True) for a in group])
    assert exact.std() < drawn.std() / 3
    assert abs(exact.mean() - drawn.mean()) < 4 * drawn.std() / len(drawn) ** 0.5


def test_a_model_is_no_distance_from_itself(roles, encoded):
    assert exact_kl(section_of(64), roles, "policy", "policy", scored_by(roles, encoded, FakeScorer())) == [0.0] * 12
