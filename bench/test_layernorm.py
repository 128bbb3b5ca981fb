"""layernorm: C++ against torch's layer_norm, forward and with backward (GPT-2's width)."""

import pytest
import torch
from torch.nn.functional import layer_norm

from engine.kernels.layernorm import layernorm


@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_layernorm(benchmark, name, backward, rows):
    x = torch.randn(rows, 768, requires_grad=backward)
    weight, bias = (torch.randn(768, requires_grad=backward) for _ in range(2))
    grad = torch.randn(rows, 768)

    def run() -> torch.Tensor:
        if name == "engine":
            return layernorm(x, weight, bias)
        return layer_norm(x, (768,), weight, bias)

    torch.testing.assert_close(layernorm(x, weight, bias), layer_norm(x, (768,), weight, bias))
    benchmark(lambda: torch.autograd.grad(run(), (x, weight, bias), grad) if backward else run())
