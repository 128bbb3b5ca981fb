"""layernorm: C++ against torch's layer_norm, plain and compiled, forward and with backward (GPT-2's width)."""

import pytest
import torch
from torch.nn.functional import layer_norm

from bench.suite import skip_most_compiled, work
from engine.kernels.layernorm import layernorm


def expression(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, (768,), weight, bias)


RUNS = {"engine": layernorm, "torch": expression, "compiled": torch.compile(expression)}


@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_layernorm(benchmark, name, backward, rows):
    skip_most_compiled(name, rows)
    given = [torch.randn(n, requires_grad=backward) for n in ((rows, 768), (768,), (768,))]
    grad = torch.randn(rows, 768)

    def run(of: str) -> tuple[torch.Tensor, ...]:
        out = RUNS[of](*given)
        return torch.autograd.grad(out, given, grad) if backward else (out,)

    torch.testing.assert_close(run("engine"), run(name), rtol=1e-4, atol=1e-3)
    work(benchmark, (5 if backward else 2) * grad.nbytes)
    benchmark(run, name)
