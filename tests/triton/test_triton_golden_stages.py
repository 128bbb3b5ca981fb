"""Golden losses and rewards on the Triton kernels, forward and backward: through ops, and through the stages."""

import pytest
from golden_models import golden_networks
from golden_runs import launched, small_blocks
from guards import guarded
from launching import DEVICE
from stages import test_golden_stages as stages
from token_ops import FLOAT32, golden, on_device, ops_file

from engine.kernels._backend import backend

FORWARD = {"linear_logprob._statistics", "linear_logprob._merge"}
BOTH = FORWARD | {"linear_logprob._slab_gradient"}
RANKING = {"ranking_loss._prompts", "ranking_loss._batch", "ranking_loss._gradient"}
KL_REWARD = {"kl_reward._forward", "kl_reward._ends"}
WHITEN = {"whiten._statistics", "whiten._merge", "whiten._forward"}
TOKENS = ops_file("test_golden_token_losses")


@golden("sft_loss")
def test_golden_sft_loss(case):
    """Without a token nothing is launched; loss and gradient are 0 all the same."""
    with launched() as seen, small_blocks(), on_device():
        TOKENS.test_golden_sft_loss(case, FLOAT32)
    assert seen == (BOTH if case["outputs"]["n_tokens"] else set())


@golden("grad_accumulation")
def test_golden_accumulation(case):
    with launched() as seen, small_blocks(), on_device():
        TOKENS.test_golden_accumulation(case, FLOAT32)
    assert seen == BOTH


def test_golden_logits_of_the_estimators():
    with launched() as seen, small_blocks(), on_device():
        TOKENS.test_golden_logits_of_the_estimators(FLOAT32)
    assert seen == FORWARD


def test_golden_tokens_of_the_clip():
    with launched() as seen, on_device():
        TOKENS.test_golden_tokens_of_the_clip(FLOAT32)
    assert seen == {"ppo_policy_loss._tokens", "_reduce.add_partials"}


@golden("rank_to_pairs")
def test_golden_pairs_of_a_ranking(case):
    with launched() as seen, on_device():
        ops_file("test_golden_pairs_and_average").test_golden_pairs_of_a_ranking(case, FLOAT32)
    assert seen == RANKING


@golden("sft_loss")
def test_golden_sft_loss_of_the_stage(case):
    with golden_networks(), guarded(), launched() as seen, small_blocks(), backend("triton"):
        stages.check_sft_loss(case, FLOAT32, DEVICE)
    assert seen == (BOTH if case["outputs"]["n_tokens"] else set())


@golden("grad_accumulation")
def test_golden_accumulation_of_the_stage(case, monkeypatch):
    with golden_networks(), guarded(), launched() as seen, small_blocks(), backend("triton"):
        stages.check_accumulation(case, FLOAT32, monkeypatch, DEVICE)
    assert seen == BOTH


@golden("sft_loss")
def test_golden_pretraining_loss_of_the_stage(case):
    with golden_networks(), guarded(), launched() as seen, small_blocks(), backend("triton"):
        stages.check_lm_loss(case, FLOAT32, DEVICE)
    assert seen == (BOTH if case["outputs"]["n_tokens"] else set())


@pytest.mark.parametrize("reduction", stages.REDUCTIONS)
@golden("pairwise_ranking_batch")
def test_golden_ranking_loss_of_the_stage(case, reduction):
    with golden_networks(), guarded(), launched() as seen, small_blocks(), backend("triton"):
        stages.check_ranking_loss(case, reduction, DEVICE)
    assert seen >= RANKING


@golden("kl_penalised_reward")
def test_golden_rewards_of_the_stage(case):
    with guarded(), launched() as seen, small_blocks(), backend("triton"):
        stages.check_rewards(case, FLOAT32, DEVICE)
    assert seen == KL_REWARD


def test_golden_advantages_of_the_stage():
    with guarded(), launched() as seen, small_blocks(), backend("triton"):
        stages.check_advantages(FLOAT32, DEVICE)
    assert seen == {"kl_reward_gae._forward"} | WHITEN
    with guarded(), launched() as seen, small_blocks(), backend("triton"):
        stages.check_advantages_one_slot_later(FLOAT32, DEVICE)
    assert seen == KL_REWARD | {"gae._forward"}
