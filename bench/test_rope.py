"""rope: C++ against the definition in torch expressions (SmolLM2-135M's queries)."""

import pytest
import torch

from engine.kernels._backend import backend
from engine.kernels.rope import rope


@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_rope(benchmark, name, rows):
    angle = torch.arange(2048)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
    table = torch.cat([angle.cos(), angle.sin()], dim=1)
    x, positions = torch.randn(rows, 9, 64), torch.randint(0, 2048, (rows,))
    with backend(name):
        benchmark(rope, x, positions, table)
