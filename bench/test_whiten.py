"""whiten: C++ against torch's own mean and variance in float32, half a million tokens."""

import pytest
import torch

from bench.suite import work
from engine.kernels.whiten import whiten


def in_torch(x: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, correction=0)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


@pytest.mark.parametrize("name", ["engine", "torch"])
def test_whiten(benchmark, name):
    x = torch.randn(512 * 1024)
    torch.testing.assert_close(whiten(x), in_torch(x), rtol=1e-4, atol=1e-5)
    work(benchmark, 2 * x.nbytes)
    benchmark(whiten if name == "engine" else in_torch, x)
