"""What PPO reports of an iteration: seconds by what they were spent on, and the gate's branches with their deviations."""

import time
from types import SimpleNamespace

import pytest
import torch

from posttrain.generate import Completion, Sampling
from rlhf import ppo, rollout
from rlhf.rollout import Encoded, Rollout, Scored, sample_and_score


def scored(by_tag, by_threshold, **more) -> Scored:
    answers = [[Completion([1, 2], [-1.0, -1.0], True)] * 2] * 2
    return Scored([Encoded(None, [7])] * 2, answers, torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[-1.0, -3.0], [4.0, 8.0]]),
                  torch.zeros(2, 2), torch.tensor(by_tag), torch.tensor(by_threshold), torch.ones(2, 2, dtype=torch.bool), **more)


def metrics(one: Scored, clock=(10.0, 17.0, 19.0, 23.0)) -> dict:
    mask = torch.ones(4, 2, dtype=torch.bool)
    zeros = torch.zeros(4, 2)
    return ppo.iteration_metrics(one, Rollout(mask, zeros, zeros, zeros, torch.zeros(4)), torch.zeros(4), zeros, {}, list(clock))


def test_scoring_is_no_part_of_the_seconds_generating():
    told = metrics(scored([[False] * 2] * 2, [[False] * 2] * 2, sampling_seconds=4.0))
    assert (told["ppo/seconds_generate"], told["ppo/seconds_score"], told["ppo/seconds_update"]) == (4.0, 5.0, 4.0)


def test_the_sampling_alone_is_timed(monkeypatch):
    def sample(*args, **kw):
        time.sleep(0.2)
        return [[Completion([1], [-1.0], True)]]

    def scorer(prompts, answers):
        time.sleep(0.4)
        return {"helpfulness": [[1.0]], "safety": [[1.0]]}

    scorer.threshold, scorer.statistics = 0.0, {}
    monkeypatch.setattr(rollout, "sample", sample)
    monkeypatch.setattr(rollout.chat, "end_of_turn", lambda tokenizer: 1)
    prompt = Encoded(SimpleNamespace(safety=False), [7])
    told = sample_and_score(SimpleNamespace(tokenizer=None), "policy", scorer, [prompt], 1, Sampling(1), 0, 1)
    assert 0.2 <= told.sampling_seconds < 0.4


@pytest.mark.parametrize(("row", "kl", "said"), [
    ({"ppo/kl": -2.0, "ppo/finished": 1.0}, [-2.1, -1.9, -2.0, -2.0], "standard errors below 0"),
    ({"ppo/kl": -2.0, "ppo/finished": 1.0}, [-20.0, 12.0, 2.0, -2.0], None),  # four answers that scatter: no sign of anything
    ({"ppo/kl": 60.0, "ppo/finished": 1.0}, [60.0] * 4, "raise kl_coef"),
    ({"ppo/kl": 1.0, "ppo/finished": 0.1}, [1.0] * 4, "only 10% of the answers"),
    ({"ppo/kl": 1.0, "ppo/finished": 0.9}, [1.0] * 4, None),
])
def test_signs_of_trouble_are_told_once(row, kl, said):
    lines, warned = [], set()
    section = SimpleNamespace(config=SimpleNamespace(max_kl=None, unfinished_score=None), log=SimpleNamespace(say=lines.append))
    for _ in range(3):
        ppo.warn(section, row, torch.tensor(kl), warned)
    assert len(lines) == (said is not None) and all(said in line and line.startswith("warning: ") for line in lines)


def test_branches_are_told_with_their_deviations():
    told = metrics(scored([[False, True], [False, False]], [[False, False], [True, False]]))
    assert (told["ppo/safety_branch"], told["ppo/safety_branch_std"]) == (0.5, 3.5)  # -3 and 4
    assert (told["ppo/helpfulness_branch"], told["ppo/helpfulness_branch_std"]) == (3.0, 2.0)  # 1 and 5
    told = metrics(scored([[True] * 2] * 2, [[False] * 2] * 2))
    assert told["ppo/safety_branch_std"] == pytest.approx(4.301163)  # of -1, -3, 4, 8: mean 2, variance 18.5
    assert told["ppo/helpfulness_branch"] is None and told["ppo/helpfulness_branch_std"] is None
