"""swiglu: C++ against silu(gate) * up in torch, forward and with backward (SmolLM2-135M's width)."""

import pytest
import torch
from torch.nn.functional import silu

from engine.kernels.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_swiglu(benchmark, name, backward, rows, dtype):
    gate, up = (torch.randn(rows, 1536).to(dtype).requires_grad_(backward) for _ in range(2))
    grad = torch.randn(rows, 1536).to(dtype)

    def run() -> torch.Tensor:
        return swiglu(gate, up) if name == "engine" else silu(gate) * up

    torch.testing.assert_close(swiglu(gate, up), silu(gate) * up)
    benchmark(lambda: torch.autograd.grad(run(), (gate, up), grad) if backward else run())
