"""Reward-model metrics on numbers that can be checked by hand, and the batching rule of K answers."""

import math

import pytest
import torch
from small_engines import save_tiny

import engine
from engine import ops
from engine.config import RMConfig
from engine.data.pack import pack_groups
from engine.data.rankings import RankedGroup
from engine.model import transformer
from engine.model.weights import scalar_from_policy
from engine.stages.inputs import RMData
from engine.stages.rm import RMStage, answer_offsets, group_scores, ranks_of
from engine.stages.rm_metrics import count_pairs, ranking_metrics

GROUPS = [
    RankedGroup((1, 2), ((3,), (4,), (5,)), (0.0, 1.0, 1.0), "a"),  # two pairs, one tie
    RankedGroup((1,), ((3,), (4,)), (2.0, 1.0), "b"),
    RankedGroup((1,), ((3,), (4,)), (1.0, 1.0), "b"),  # all tied: no pair
]
SCORES = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 2.5]), torch.tensor([9.0, 9.0])]


def test_metrics_by_hand():
    """Margins +1 and -1 in the first prompt, +2 in the second."""
    found = ranking_metrics(GROUPS, SCORES, bins=2)
    assert found["num_pairs"] == 3 and found["num_prompts"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    losses = [math.log1p(math.exp(-m)) for m in (1.0, -1.0, 2.0)]
    assert found["log_loss"] == pytest.approx(sum(losses) / 3)
    assert found["margin"] == pytest.approx(2 / 3)
    assert (found["min_reward"], found["max_reward"]) == (0.0, 9.0)
    assert found["by_k/3/accuracy"] == 0.5 and found["by_k/2/accuracy"] == 1.0
    assert found["by_source/a/accuracy"] == 0.5 and found["by_source/b/num_pairs"] == 1
    # prompts are the units: residuals 1 - 2/3 * 2 = -1/3 and 1 - 2/3 = 1/3, two clusters
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(2 * 2 / 9) / 3)


def test_calibration_counts_each_pair_once():
    found = ranking_metrics(GROUPS, SCORES, bins=2)
    assert found["calibration/0/num_pairs"] + found["calibration/1/num_pairs"] == 3
    sure = 1 / (1 + math.exp(-2.0))
    assert found["calibration/1/predicted"] == pytest.approx(sure)
    assert found["calibration/1/observed"] == 1.0
    assert found["calibration/0/observed"] == 0.5


def test_ties_are_no_pairs():
    assert [count_pairs(g.ranks) for g in GROUPS] == [2, 1, 0]
    alone = ranking_metrics(GROUPS[2:], SCORES[2:], bins=2)
    assert "accuracy" not in alone and alone["num_pairs"] == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("rm") / "model")
    return scalar_from_policy(folder, seed=3, dtype="float32", trainable=True)


def test_close_ranks_stay_apart():
    """2^24 and the next number are one float32, as are these decimals."""
    close = RankedGroup((1,), ((3,), (4,), (5,)), (2.0**24, 2.0**24 + 1, 2.0**24), "a")
    decimals = RankedGroup((1,), ((3,), (4,)), (0.1 + 1e-12, 0.1), "b")
    ranks = ranks_of([close, decimals])
    assert ranks.dtype == torch.float32 and ranks.tolist() == [0, 1, 0, 1, 0]
    _, num_pairs, _ = ops.ranking_loss(torch.zeros(5), ranks, answer_offsets([close, decimals]))
    assert int(num_pairs) == count_pairs(close.ranks) + count_pairs(decimals.ranks) == 3


def test_each_prompt_goes_through_the_network_once(model, monkeypatch):
    """K answer segments beside one prompt segment: never K (K - 1) rows, never the prompt twice."""
    rows = []
    forward = transformer.forward
    monkeypatch.setattr(
        transformer,
        "forward",
        lambda m, b, **more: rows.append(b.tokens.numel()) or forward(m, b, **more),
    )
    group_scores(model, GROUPS)
    assert rows == [sum(len(g.prompt) + sum(map(len, g.responses)) for g in GROUPS)]
    assert pack_groups([(g.prompt, g.responses) for g in GROUPS]).num_segments == 3 + 7


def test_shared_prompt_scores_equal_separate_ones(model):
    shared = group_scores(model, GROUPS)
    apart = [
        group_scores(model, [RankedGroup(g.prompt, (answer,), (0.0,), g.source)])
        for g in GROUPS
        for answer in g.responses
    ]
    assert torch.equal(shared, torch.cat(apart))


@pytest.mark.parametrize("reduction", ["prompt_mean_valid", "prompt_mean_allpairs", "pair_mean"])
def test_the_gradient_does_not_depend_on_the_cut(model, reduction):
    gradients = []
    for budget in (4096, 1):
        config = RMConfig(
            model_name_or_path="m",
            output_dir="o",
            micro_batch_tokens=budget,
            loss_reduction=reduction,
        )
        for p in model.parameters().values():
            p.grad = None
        metrics = RMStage(config, model, RMData(GROUPS, (), (), ())).train_step([0, 1, 2], 0)
        gradients.append(
            (metrics["loss"], {n: p.grad.clone() for n, p in model.parameters().items()})
        )
    (loss, whole), (other, cut) = gradients
    assert loss == pytest.approx(other, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, cut[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_constant_makes_demonstrations_score_zero(golden):
    """Golden rm_normalisation: the constant is minus the mean."""
    case = golden["rm_normalisation"][0]
    scores = torch.tensor(case["inputs"]["raw_demo_scores"], dtype=torch.float64)
    assert -float(scores.mean()) == pytest.approx(case["outputs"]["bias"])


def test_a_constant_shifts_every_score(model):
    plain = group_scores(model, GROUPS)
    torch.testing.assert_close(group_scores(model.with_constant(1.5), GROUPS), plain + 1.5)
    assert engine.RMConfig(model_name_or_path="m", output_dir="o").batch_size == 64
