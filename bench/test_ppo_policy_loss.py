"""ppo_policy_loss: C++ against the torch definition, forward with statistics and backward."""

import pytest
import torch

from engine.kernels._backend import backend
from engine.kernels.ppo_policy_loss import ppo_policy_loss


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_ppo_policy_loss(benchmark, name):
    old, change, advantage = torch.randn(3, 512 * 1024)
    new = (old + 0.1 * change).requires_grad_()
    with backend(name):
        benchmark(lambda: ppo_policy_loss(new, old, advantage)[0].backward())
