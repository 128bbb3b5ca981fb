"""The golden PPO-ptx step with every op on its Triton kernels: op by op, and through the PPO stage."""

import pytest
from golden_models import golden_networks
from golden_runs import launched, small_blocks
from guards import guarded
from launching import DEVICE
from stages.test_golden_ppo_iteration import check_iteration
from test_golden_ppo_step import check_full_step
from token_ops import GROUPS

from engine.kernels._backend import backend

SHARED = {
    "linear_logprob._statistics", "linear_logprob._merge", "linear_logprob._slab_gradient",
    "whiten._statistics", "whiten._merge", "whiten._forward",
    "ppo_policy_loss._tokens", "ppo_value_loss._tokens", "_reduce.add_partials",
    "adamw._step", "adamw._squares", "adamw._ordered_sum",
}  # fmt: skip
OP_BY_OP = SHARED | {"kl_reward._forward", "kl_reward._ends", "gae._forward"}
STAGE = SHARED | {"kl_reward_gae._forward"}


def test_golden_step_op_by_op():
    (case,) = GROUPS["ppo_ptx_full_step"]
    with guarded(), launched() as seen, backend("triton"), small_blocks():
        check_full_step(case, "float32", DEVICE)
    assert seen == OP_BY_OP


@pytest.mark.parametrize("budget", [10**6, 6])
def test_golden_step_through_the_stage(budget):
    """In one pass, and in micro-batches; with the gradient clipped."""
    with golden_networks(), guarded(), launched() as seen, backend("triton"), small_blocks():
        check_iteration(budget, 0.1, DEVICE)
    assert seen == STAGE
