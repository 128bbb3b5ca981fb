"""How an iteration is cut into minibatches and its metrics put together; data draws addressed by iteration."""

import dataclasses

import pytest
import torch
from stages.test_ppo_by_hand import CONFIG

from engine.stages.ppo.metrics import explained_variance, segment_sums
from engine.stages.ppo.update import Means, minibatches


@pytest.mark.parametrize("prompts,parts,epochs", [(64, 8, 1), (10, 4, 2), (3, 8, 1), (1, 1, 3)])
def test_each_prompt_is_used_once_an_epoch(prompts, parts, epochs):
    config = dataclasses.replace(
        CONFIG, batch_size=128, num_mini_batches=parts, num_ppo_epochs=epochs
    )
    plan = list(minibatches(prompts, config, iteration=3))
    assert [number for number, _ in plan] == list(range(min(parts, prompts) * epochs))
    per_epoch = len(plan) // epochs
    for epoch in range(epochs):
        used = [i for _, part in plan[epoch * per_epoch : (epoch + 1) * per_epoch] for i in part]
        assert sorted(used) == list(range(prompts))


def test_the_split_is_random_and_addressed():
    config = dataclasses.replace(CONFIG, batch_size=128, num_mini_batches=2, num_ppo_epochs=2)
    plans = [list(minibatches(32, config, iteration)) for iteration in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0][:2] != plans[0][2:]  # another order in the next epoch
    assert list(minibatches(32, dataclasses.replace(config, seed=1), 0)) != plans[0]


def test_means_are_over_tokens_however_the_work_was_cut():
    values = torch.tensor([1.0, 2.0, 6.0, 7.0])
    whole, cut = Means(), Means()
    whole.add(4, x=values.mean())
    cut.add(1, x=values[0])
    cut.add(3, x=values[1:].mean())
    assert whole["x"] == pytest.approx(cut["x"]) == pytest.approx(4.0)


def test_segment_sums_with_an_empty_segment():
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert segment_sums(torch.tensor([1.0, 2.0, 5.0]), cu).tolist() == [3.0, 0.0, 5.0]


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.zeros(3), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(3)) == 0.0
