"""swiglu: C++ against silu(gate) * up in torch, plain and compiled, forward and backward (SmolLM2-135M's width)."""

import pytest
import torch
from torch.nn.functional import silu

from bench.suite import skip_most_compiled, work
from engine.kernels.swiglu import swiglu


def expression(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate) * up


RUNS = {"engine": swiglu, "torch": expression, "compiled": torch.compile(expression)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_swiglu(benchmark, name, backward, rows, dtype):
    skip_most_compiled(name, rows, dtype == torch.float32)
    given = [torch.randn(rows, 1536).to(dtype).requires_grad_(backward) for _ in range(2)]
    grad = torch.randn(rows, 1536).to(dtype)

    def run(of: str) -> tuple[torch.Tensor, ...]:
        out = RUNS[of](*given)
        return torch.autograd.grad(out, given, grad) if backward else (out,)

    slack = (
        {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    )  # torch rounds in between
    torch.testing.assert_close(run("engine"), run(name), **slack)
    work(benchmark, (8 if backward else 3) * grad.nbytes)
    benchmark(run, name)
