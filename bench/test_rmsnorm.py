"""rmsnorm: C++ against torch's rms_norm, forward and with backward (SmolLM2-135M's width)."""

import pytest
import torch
from torch.nn.functional import rms_norm

from engine.kernels.rmsnorm import rmsnorm


@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_rmsnorm(benchmark, name, backward, rows):
    x = torch.randn(rows, 576, requires_grad=backward)
    weight = torch.randn(576, requires_grad=backward)
    grad = torch.randn(rows, 576)

    def run() -> torch.Tensor:
        return rmsnorm(x, weight) if name == "engine" else rms_norm(x, (576,), weight, 1e-5)

    torch.testing.assert_close(rmsnorm(x, weight), rms_norm(x, (576,), weight, 1e-5))
    benchmark(lambda: torch.autograd.grad(run(), (x, weight), grad) if backward else run())
