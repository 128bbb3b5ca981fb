"""gelu: C++ against torch's, plain and compiled, both forms, forward and with backward (GPT-2's width)."""

import pytest
import torch
from torch.nn import functional as F

from bench.suite import skip_most_compiled, work
from engine.kernels.gelu import gelu


def expression(x: torch.Tensor, form: str) -> torch.Tensor:
    return F.gelu(x, approximate=form)


RUNS = {"engine": gelu, "torch": expression, "compiled": torch.compile(expression)}


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_gelu(benchmark, name, backward, rows, form):
    skip_most_compiled(name, rows, form == "tanh")
    x, grad = torch.randn(rows, 3072, requires_grad=backward), torch.randn(rows, 3072)

    def run(of: str) -> torch.Tensor:
        out = RUNS[of](x, form)
        return torch.autograd.grad(out, (x,), grad)[0] if backward else out

    torch.testing.assert_close(run("engine"), run(name), rtol=1e-4, atol=1e-5)
    work(benchmark, (5 if backward else 2) * grad.nbytes)
    benchmark(run, name)
