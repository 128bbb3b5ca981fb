"""ppo_policy_loss: C++ against the torch definition, forward with statistics and backward (half a million tokens)."""

import pytest
import torch

from bench.suite import work
from engine.kernels._backend import backend
from engine.kernels.ppo_policy_loss import ppo_policy_loss

BACKENDS = {"engine": "cpp", "torch": "reference"}


@pytest.mark.parametrize("name", BACKENDS)
def test_ppo_policy_loss(benchmark, name):
    old, change, advantage = torch.randn(3, 512 * 1024)
    new = (old + 0.1 * change).requires_grad_()

    def run(of: str) -> torch.Tensor:
        with backend(BACKENDS[of]):
            return torch.autograd.grad(ppo_policy_loss(new, old, advantage)[0], new)[0]

    torch.testing.assert_close(run("engine"), run("torch"), rtol=1e-4, atol=1e-10)
    work(benchmark, 4 * new.nbytes)
    benchmark(run, name)
