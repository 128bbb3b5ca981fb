"""gelu: C++ against torch's, both forms, forward and with backward (GPT-2's width)."""

import pytest
import torch
from torch.nn import functional as F

from engine.kernels.gelu import gelu


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_gelu(benchmark, name, backward, rows, form):
    x = torch.randn(rows, 3072, requires_grad=backward)
    grad = torch.randn(rows, 3072)

    def run() -> torch.Tensor:
        return gelu(x, form) if name == "engine" else F.gelu(x, approximate=form)

    torch.testing.assert_close(gelu(x, form), F.gelu(x, approximate=form))
    benchmark(lambda: torch.autograd.grad(run(), (x,), grad) if backward else run())
