"""Safety demonstrations at a declared share: which rows are trained on, that smaller shares are nested, and what is told and kept."""

from itertools import pairwise

import pytest

from posttrain import plan
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError
from posttrain.formats import Demonstration
from posttrain.runs import Run, run_sections
from sft.config import SFTStage
from sft.train import mix

SHORT = {"stage": "sft", "data": "demonstrations", "packing": False, "batch_size": 4, "max_steps": 1, "warmup_ratio": 0}
SHARES = (0, 0.01, 0.1, 0.25, 0.5, 1.0)


def rows(n: int, *, safe: bool, each: int = 1) -> list[dict]:
    kind = "safe" if safe else "plain"
    return [{"messages": [{"role": "user", "content": f"{kind} {i // each}"}, {"role": "assistant", "content": f"answer {i}"}], "safety": safe,
             "source": kind} for i in range(n)]


def items(plain: int, safe: int, each: int = 1) -> list[Demonstration]:
    return [Demonstration(**r) for r in [*rows(plain, safe=False), *rows(safe, safe=True, each=each)]]


def answers(kept: list[Demonstration]) -> set[str]:
    return {i.messages[-1]["content"] + i.source for i in kept}


def test_a_share_is_of_the_safety_rows_and_all_others_stay():
    """The paper's percentages (4.2.3): the helpful data are fixed."""
    given = items(30, 200)
    found = [mix(given, share, 0, "x") for share in SHARES]
    assert [told["safety"]["rows"] for _, told in found] == [0, 2, 20, 50, 100, 200]
    for kept, told in found:
        assert [i for i in kept if not i.safety] == given[:30] and kept == [i for i in given if i in kept]  # in their order
        assert told["data"].get("safe", 0) == told["safety"]["rows"] and told["data"]["plain"] == 30 and told["safety"]["given"] == 200
        assert told["safety"]["share"] == pytest.approx(told["safety"]["rows"] / len(kept))
    for (small, _), (large, _) in pairwise(found):
        assert answers(small) < answers(large)
    assert found[-1][0] == given


def test_the_rows_of_a_share_depend_on_the_seed_and_the_prompts_alone():
    given = items(0, 60, each=3)
    half, again, other = (mix(given, 0.5, seed, "x")[0] for seed in (0, 0, 1))
    assert half == again and answers(half) != answers(other)
    assert len(half) == 30 and len({i.messages[0]["content"] for i in half}) == 10  # whole prompts
    assert answers(mix(given[::-1], 0.5, 0, "x")[0]) == answers(half)  # wherever they stand
    assert mix(items(5, 3), 0.01, 0, "x")[1]["safety"]["rows"] == 1  # some of some; 0 alone is none


@pytest.mark.parametrize("plain, safe, share, said", [
    (4, 0, 0.5, ["x.safety_fraction: none of 4 demonstrations is tagged as safety", "safety_prompt: true"]),
    (0, 4, 0.0, ["x.safety_fraction: 0 leaves none of 4 demonstrations"])])
def test_a_share_of_nothing_is_refused(plain, safe, share, said):
    with pytest.raises(PosttrainError) as e:
        mix(items(plain, safe), share, 0, "x")
    assert all(words in str(e.value) for words in said), e.value
    assert mix(items(4, 0), 1.0, 0, "x")[1]["safety"] == {"fraction": 1.0, "rows": 0, "given": 0, "share": 0.0}  # all of nothing is no question


def test_all_of_it_has_the_fingerprint_of_no_share(make_run):
    data = [*rows(4, safe=False), *rows(4, safe=True)]
    run = make_run({"plain": SHORT, "all": {**SHORT, "safety_fraction": 1.0}, "half": {**SHORT, "safety_fraction": 0.5}}, demonstrations=data)
    inputs = {n: {k.replace(f"stages.{n}.", ""): v for k, v in run.section(n).inputs().items()} for n in ("plain", "all", "half")}
    assert inputs["plain"] == inputs["all"] and "safety_fraction" not in inputs["plain"] and inputs["half"]["safety_fraction"] == 0.5
    dumped = [SFTStage(stage="sft", data="x", **keys).model_dump() for keys in ({}, {"safety_fraction": 0.5})]
    assert dumped[0] | {"safety_fraction": 0.5} == dumped[1]
    with pytest.raises(PosttrainError, match=r"stages.half.safety_fraction: got 1.5"):
        load_recipe(run.recipe.path, ["half.safety_fraction=1.5"])


def test_a_sweep_trains_on_nested_rows_and_tells_its_composition(make_run, capsys):
    data = [*rows(10, safe=False), *rows(8, safe=True)]
    run = make_run({"share": {**SHORT, "sweep": {"safety_fraction": [0, 0.25, 1.0]}}}, demonstrations=data, held_out={"demonstrations": 2})
    run_sections(run)
    out = " ".join(capsys.readouterr().out.split())
    found = {n: run.section(n).results() for n in ("share-0", "share-0.25", "share-1")}
    given = found["share-1"]["safety"]["given"]
    plain = found["share-0"]["train_rows"]
    assert [r["safety"]["rows"] for r in found.values()] == [0, 2, given] and plain + given == 16
    assert [r["train_rows"] for r in found.values()] == [plain, plain + 2, plain + given] == [sum(r["data"].values()) for r in found.values()]
    assert f"safety demonstrations: 2 of {given} (25%), {2 / (plain + 2):.1%} of the training rows" in out
    assert len({r["held_out_loss_before"] for r in found.values()}) == 1  # the same held-out rows for all
    assert {r["safety"]["fraction"] for r in found.values()} == {0, 0.25, 1.0}
    assert {r["section"]: (r["rows"], r["steps"]) for r in plan.plan(run.recipe)} == {n: (r["train_rows"], r["steps"]) for n, r in found.items()}
    run_sections(Run(run.recipe))
    assert capsys.readouterr().out.count("done already, skipped") == 3
