"""rope: C++ against the definition in torch expressions, plain and compiled (SmolLM2-135M's queries)."""

import pytest
import torch

from bench.suite import skip_most_compiled, work
from engine.kernels.rope import rope, rope_reference

RUNS = {"engine": rope, "torch": rope_reference, "compiled": torch.compile(rope_reference)}


@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("name", RUNS)
def test_rope(benchmark, name, rows):
    skip_most_compiled(name, rows)
    angle = torch.arange(2048)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
    table = torch.cat([angle.cos(), angle.sin()], dim=1)
    x, positions = torch.randn(rows, 9, 64), torch.randint(0, 2048, (rows,))
    given = (x, positions, table)
    torch.testing.assert_close(rope(*given), RUNS[name](*given), rtol=1e-4, atol=1e-5)
    work(benchmark, 2 * x.nbytes)
    benchmark(RUNS[name], *given)
