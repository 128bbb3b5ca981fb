"""rmsnorm: C++ against torch's rms_norm, plain and compiled, forward and with backward (SmolLM2-135M's width)."""

import pytest
import torch
from torch.nn.functional import rms_norm

from bench.suite import skip_most_compiled, work
from engine.kernels.rmsnorm import rmsnorm


def expression(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, (576,), weight, 1e-5)


RUNS = {"engine": rmsnorm, "torch": expression, "compiled": torch.compile(expression)}


@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_rmsnorm(benchmark, name, backward, rows):
    skip_most_compiled(name, rows)
    given = [torch.randn(n, requires_grad=backward) for n in ((rows, 576), (576,))]
    grad = torch.randn(rows, 576)

    def run(of: str) -> tuple[torch.Tensor, ...]:
        out = RUNS[of](*given)
        return torch.autograd.grad(out, given, grad) if backward else (out,)

    torch.testing.assert_close(run("engine"), run(name), rtol=1e-4, atol=1e-3)
    work(benchmark, (5 if backward else 2) * grad.nbytes)
    benchmark(run, name)
