"""However a step is cut into micro-batches, its gradient is the same up to the rounding of float32 sums.

The reward model's is in test_rm_metrics.py.
"""

import pytest
import torch
from small_engines import save_tiny
from stages.tiny_data import write_all

import engine
from engine.data.text import Example
from engine.kernels import linear_logprob_loss
from engine.model.transformer import Model
from engine.model.weights import scalar_from_policy
from engine.stages.inputs import SFTData
from engine.stages.ppo import forward
from engine.stages.ppo.batch import Advantages, Scores
from engine.stages.ppo.ptx import backward_lm_loss
from engine.stages.ppo.update import Means, Targets, policy_backward, token_rows, value_backward
from engine.stages.sft import SFTStage

PIECES = 4095  # a budget for all at once, whose head goes piece by piece
ROUNDING = 2e-5  # of a parameter's largest entry: float32 sums over some hundred tokens in another order


def taken(model: Model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.parameters().items()}
    for parameter in model.parameters().values():
        parameter.grad = None
    return found


def assert_same(whole: dict[str, torch.Tensor], cut: dict[str, torch.Tensor]) -> None:
    for name, gradient in whole.items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        worst = float((gradient - cut[name]).abs().max())
        assert worst <= ROUNDING * largest, f"{name}: off by {worst}, largest {largest}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("cuts") / "model")


def in_small_pieces(patch) -> None:
    """Twelve rows at a time go through the head forward and backward."""
    patch.setattr(linear_logprob_loss, "LEAST", 1)
    patch.setattr(linear_logprob_loss, "FEWEST", 12)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_sft(mode, base, monkeypatch):
    model = engine.load_policy(base, "float32", trainable=True)
    rows = [Example(tuple(range(3, 3 + n)), 2, 2, "") for n in (9, 30, 4, 17, 23)]
    found = []
    for budget in (4096, 40, 1, PIECES):
        if budget == PIECES:
            in_small_pieces(monkeypatch)
        config = engine.SFTConfig(
            model_name_or_path="m",
            output_dir="o",
            micro_batch_tokens=budget,
            residual_dropout=0.2,
            activation_checkpointing=mode,
        )
        SFTStage(config, model, SFTData(rows, (), None, (), ())).train_step(range(5), 3)
        found.append(taken(model))
    for cut in found[1:]:
        assert_same(found[0], cut)


def test_ppo_and_its_pretraining_term(base, tmp_path, monkeypatch):
    data = write_all(tmp_path)
    config = engine.PPOConfig(
        model_name_or_path=str(base),
        output_dir="o",
        reward_model_path="r",
        dataset_name=data["prompts"],
        batch_size=8,
        num_samples=2,
        num_mini_batches=1,
        response_length=9,
    )
    policy = engine.HybridEngine.from_pretrained(base, dtype="float32", trainable=True)
    value = scalar_from_policy(base, 1, "float32")
    ppo = engine.PPO(policy, value, engine.load_policy(base, "float32"), config)
    assert ppo.config.token_budget >= 256  # settled by the memory that is free
    rollouts = ppo.rollout(["the cat", "a", "two big dogs", "one"])
    count = sum(rollouts.lengths)
    torch.manual_seed(0)
    scores = Scores(
        rollouts.behaviour_logprob + 0.1 * torch.randn(count),
        *(torch.randn(count) for _ in range(2)),
        *(torch.randn(8) for _ in range(2)),
    )
    advantages = Advantages(torch.randn(count), torch.randn(count))
    targets = Targets(rollouts, scores, advantages, (), 0.0, 0.0, 0, 0)
    text = [list(range(5, 5 + n)) for n in (12, 12, 7)]
    found = []
    for budget in (4096, 40, 1, PIECES):
        if budget == PIECES:
            in_small_pieces(monkeypatch)
        for answers in forward.micro_batches(rollouts, range(4), budget):
            rows = token_rows(rollouts.cu.tolist(), answers)
            policy_backward(policy.model, targets, answers, rows, count, ppo.config, Means())
            value_backward(value, targets, answers, rows, count, ppo.config, Means())
        policy_only = taken(policy.model)
        backward_lm_loss(policy.model, text, 2.0, budget)
        found.append((policy_only, taken(value), taken(policy.model)))
    for cut in found[1:]:
        for one, other in zip(found[0], cut, strict=True):
            assert_same(one, other)
