"""The best-of-K benchmark: it runs, its contenders sample as much and score alike, it tells what it should. No timings."""


import pytest
import torch
from bench_support import ONE_LAYER, run_bench

from bench import floors
from bench.workload import Words, draw, end_hf_at, end_ours_at
from posttrain import chat, generate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what it printed, its JSON) of the smallest run."""
    return run_bench("sampling", tmp_path_factory.mktemp("bench"), "--prompts", "3", "--samples", "3", "--mean", "40", "--data", "chat", "--dtype", "fp32",
                     "--peers", "hf dynamic")


def test_the_contenders_do_the_same_work(run):
    (row,) = run[1]["rows"]
    ran = [c["contender"] for c in row["contenders"]]
    assert ran == ["ours", "hf dynamic"] and row["answers"] == 9 and not row["not_run"]
    for c in row["contenders"][1:]:
        e = c["equality"]
        assert e["passed"] and e["differences"]["greedy"] == 0 and e["differences"]["scores"] < 1e-3 and e["facts"]["same number of answers and tokens"]
    assert all(c["fraction_of_floor"] > 0 and c["tokens_per_second"]["median"] > 0 for c in row["contenders"])
    assert "| chat | fp32  | hf dynamic" in run[0]


@pytest.fixture
def restored(monkeypatch):
    """The sampler is as before afterwards."""
    monkeypatch.setattr(generate, "Loop", generate.Loop)


def test_our_answers_end_where_they_are_told(restored, make_roles, scramble):
    roles = make_roles()
    scramble(roles.add("policy", fresh_adapter=True))
    prompts = [[5, 6, 7], [8, 9]]
    free = generate.sample(roles, "policy", prompts, 2, generate.Sampling(9), 0, stop=2)
    end_ours_at({(5, 6, 7): [4, 1], (8, 9): [9, 2]})
    told = generate.sample(roles, "policy", prompts, 2, generate.Sampling(9), 0, stop=free[0][0].ids[0])  # a token that would end it
    assert [[len(a.ids) for a in group] for group in told] == [[4, 1], [9, 2]] and not any(a.finished for g in told for a in g)
    assert told[0][0].ids[0] == free[0][0].ids[0]
    end_ours_at({(5, 6, 7): [2], (8, 9): [3]})  # anew, not one upon the other
    assert [len(g[0].ids) for g in generate.sample(roles, "policy", prompts, 1, generate.Sampling(9), 0, stop=2)] == [2, 3]


def test_their_answers_end_where_they_are_told():
    from transformers import AutoModelForCausalLM

    from posttrain import builtin

    model = AutoModelForCausalLM.from_pretrained(builtin.folder(builtin.TINY))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    counted = []
    end_hf_at(model, {(5, 6, 7): [4, 1], (8, 9): [6, 2]}, lambda tokens, seconds: counted.append(tokens))
    ids, mask = torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    torch.manual_seed(0)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=9, num_return_sequences=2, suppress_tokens=[0])
    assert [int((row != 0).sum()) for row in out[:, 3:]] == [4, 1, 6, 2] and counted == [13] and out.shape == (4, 3 + 6)


def test_prompts_have_exactly_their_tokens(make_roles):
    tokenizer = make_roles().tokenizer
    words = Words(tokenizer, 0)
    for kind in ("chat", "fixed"):
        for tokens, answers in draw(kind, 5, 2, 40, 0, words.least()):
            assert len(chat.encode_prompt(tokenizer, [{"role": "user", "content": words.prompt(tokens)}])) == tokens
            assert len(answers) == 2 and all(2 <= a <= 160 for a in answers) and (kind == "chat" or (tokens, answers) == (40, [40, 40]))
    assert draw("chat", 3, 1, 40, 7, 4) == draw("chat", 3, 1, 40, 7, 4) != draw("chat", 3, 1, 40, 8, 4)


def test_the_floor_by_hand():
    """160 weights and a head of 40; one prompt of 3 tokens, two answers of 3 and 2 tokens; 8 bytes of keys and values a float16 token."""
    slow = floors.Machine(flops=1e12, bandwidth=10.0, width=2)  # reading alone takes time
    steps = [(2, 3 * 2 + 2 * 1), (1, 3 + 2)]  # rows alive, tokens of context, before tokens 2 and 3
    read = sum(200 * 2 + context * 16 for _, context in steps)
    assert ONE_LAYER.kv(2) == 16 and floors.decode(ONE_LAYER, slow, [(3, [3, 2])], 8) == pytest.approx(read / 10.0, rel=1e-6)
    assert floors.decode(ONE_LAYER, slow, [(3, [3, 2])], 8, shared=True) == pytest.approx((read - 3 * 16) / 10.0, rel=1e-6)
    assert floors.decode(ONE_LAYER, slow, [(3, [3, 2])], 1) == pytest.approx((3 * 400 + (4 + 5 + 4) * 16) / 10.0, rel=1e-6)  # one after another
    fast = floors.Machine(flops=10.0, bandwidth=1e12, width=2)
    prefill, flop = 2 * 160 * 3 + 2 * 40 + 16 * 6, sum(2 * 200 * rows + 16 * context for rows, context in steps)
    assert floors.decode(ONE_LAYER, fast, [(3, [3, 2])], 8) == pytest.approx((prefill + flop) / 10.0)
    score = 2 * 160 * (3 * 2 + 5) + 16 * (6 * 7 / 2 + 5 * 6 / 2)
    assert floors.best_of(ONE_LAYER, fast, [(3, [3, 2])], 8) == pytest.approx((prefill + flop + score) / 10.0)
    assert floors.forward(ONE_LAYER, [(3, [3, 2])], shared=True) == pytest.approx(score - 2 * 160 * 3 - 16 * 6)
