"""ppo_value_loss: C++ against the torch definition, forward and backward."""

import pytest
import torch

from engine.kernels._backend import backend
from engine.kernels.ppo_value_loss import ppo_value_loss


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_ppo_value_loss(benchmark, name):
    old, change, returns = torch.randn(3, 512 * 1024)
    value = (old + 0.1 * change).requires_grad_()
    with backend(name):
        benchmark(lambda: ppo_value_loss(value, old, returns)[0].backward())
