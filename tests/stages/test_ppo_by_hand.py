"""Two answers of three and two tokens, every number worked out on paper.

beta = 0.1, gamma = 1, lambda = 0.5, missing-EOS penalty 1.

            answer 0 (ends)                  answer 1 (cut at its limit)
old         -1.0   -2.0   -0.5               -1.0   -1.0
reference   -1.5   -1.0   -0.5               -2.0   -1.0
k1           0.5   -1.0    0.0                1.0    0.0
value        0.2    0.4    0.6                0.0    1.0
score        2.0                              3.0 - 1.0 = 2.0

reward      -0.05   0.1    2.0               -0.1    2.0
delta        0.15   0.3    1.4                0.9    1.0        (delta_t = r_t + V_{t+1} - V_t, V after the last = 0)
advantage    0.65   1.0    1.4                1.4    1.0        (A_t = delta_t + 0.5 A_{t+1})
returns      0.85   1.4    2.0                1.4    2.0
"""

import dataclasses

import pytest
import torch

from engine.config import PPOConfig
from engine.stages.ppo.advantages import estimate, rewards_and_advantages
from engine.stages.ppo.batch import Scores
from engine.stages.ppo.rewards import token_rewards, whiten_rewards, with_extra_slot

CONFIG = PPOConfig(
    model_name_or_path="policy",
    output_dir="run",
    reward_model_path="reward",
    lam=0.5,
    response_length=4,
    whiten_advantages=False,
)
CU = torch.tensor([0, 3, 5], dtype=torch.int32)
OLD = torch.tensor([-1.0, -2.0, -0.5, -1.0, -1.0])
REF = torch.tensor([-1.5, -1.0, -0.5, -2.0, -1.0])
VALUE = torch.tensor([0.2, 0.4, 0.6, 0.0, 1.0])
FINAL = torch.tensor([0.7, 5.0])
SCORE = torch.tensor([2.0, 3.0])
ENDED = torch.tensor([True, False])


def rewards(**changes):
    return token_rewards(OLD, REF, SCORE, ENDED, CU, 0.1, dataclasses.replace(CONFIG, **changes))


def advantages(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return estimate(rewards(**changes), VALUE, FINAL, ENDED, CU, config)


def close(ours, want):
    torch.testing.assert_close(ours, torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_rewards():
    found = rewards()
    close(found.kl, [0.5, -1.0, 0.0, 1.0, 0.0])
    close(found.reward, [-0.05, 0.1, 2.0, -0.1, 2.0])
    close(found.paid_score, [2.0, 2.0])


def test_a_higher_kl_lowers_the_reward():
    """Sum identity of Eq. 2: sum_t reward = score - beta (log pi - log ref)."""
    sums = [rewards().reward[:3].sum(), rewards().reward[3:].sum()]
    log_ratio = [(OLD - REF)[:3].sum(), (OLD - REF)[3:].sum()]
    close(torch.stack(sums), [2.0 - 0.1 * float(log_ratio[0]), 2.0 - 0.1 * float(log_ratio[1])])


def test_missing_eos_can_replace_the_score():
    close(rewards(missing_eos_mode="replace").paid_score, [2.0, -1.0])
    close(rewards(missing_eos_penalty=0.0).paid_score, [2.0, 3.0])


def test_advantages_and_returns():
    found = advantages()
    close(found.advantage, [0.65, 1.0, 1.4, 1.4, 1.0])
    close(found.returns, [0.85, 1.4, 2.0, 1.4, 2.0])


def test_a_cut_answer_can_go_on_with_its_last_value():
    """Only answer 1 was cut: delta of its last token is 2 + 5 - 1 = 6."""
    found = advantages(bootstrap_truncated=True)
    close(found.advantage, [0.65, 1.0, 1.4, 0.9 + 3.0, 6.0])


def test_whitening_leaves_returns_alone():
    found = advantages(whiten_advantages=True)
    close(found.returns, [0.85, 1.4, 2.0, 1.4, 2.0])
    assert float(found.advantage.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(found.advantage.var(unbiased=False)) == pytest.approx(1.0, rel=1e-5)


def test_whitened_rewards_keep_their_mean():
    plain, white = rewards(), whiten_rewards(rewards())
    assert float(white.reward.mean()) == pytest.approx(float(plain.reward.mean()), rel=1e-5)
    assert float(white.reward.var(unbiased=False)) == pytest.approx(1.0, rel=1e-5)


def test_the_score_can_be_paid_one_slot_later():
    """Both answers are shorter than 4: one slot more each, with the value after the last token in it.

    answer 0: delta = 0.15, 0.3, 0 + 0.7 - 0.6 = 0.1, 2 - 0.7 = 1.3; A = 0.4875, 0.675, 0.75 (1.3 in the slot).
    """
    found = rewards(score_at="eos_plus_one")
    close(found.reward, [-0.05, 0.1, 0.0, 2.0, -0.1, 0.0, 2.0])
    assert found.cu.tolist() == [0, 4, 7]
    close(advantages(score_at="eos_plus_one").advantage[:3], [0.4875, 0.675, 0.75])


def test_an_answer_at_its_limit_has_no_extra_slot():
    slots = with_extra_slot(CU, limit=3)
    assert slots.cu.tolist() == [0, 3, 6]
    assert slots.rows.tolist() == [0, 1, 2, 3, 4]
    assert slots.slots.tolist() == [5]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"whiten_advantages": True, "gamma": 0.9},
        {"bootstrap_truncated": True},
        {"kl_estimator": "k3", "missing_eos_mode": "replace"},
        {"whiten_rewards": True},
        {"score_at": "eos_plus_one"},
    ],
    ids=lambda changes: ", ".join(changes) or "defaults",
)
def test_rewards_and_advantages_are_those_of_the_separate_steps(changes):
    """To the bit on the CPU, whichever way they go."""
    config = dataclasses.replace(CONFIG, **changes)
    scores = Scores(OLD, REF, VALUE, FINAL, SCORE)
    found = rewards_and_advantages(scores, ENDED, CU, 0.1, config)
    separate = token_rewards(OLD, REF, SCORE, ENDED, CU, 0.1, config)
    separate = whiten_rewards(separate) if config.whiten_rewards else separate
    want = separate, estimate(separate, VALUE, FINAL, ENDED, CU, config)
    for ours, theirs in zip(found, want, strict=True):
        for name, value in vars(theirs).items():
            assert torch.equal(getattr(ours, name), value), name
