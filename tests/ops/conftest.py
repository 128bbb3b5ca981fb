"""Fixtures of the op tests: golden numbers on the definition and on each class of CPU kernels."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from cpu_classes import runnable_classes, use_class


@dataclass(frozen=True)
class Precision:
    """A dtype to compute golden numbers in, and the tolerances that golden.json states for it."""

    dtype: torch.dtype
    rtol: float
    atol: float

    def assert_close(self, ours: torch.Tensor, want: torch.Tensor, name: str) -> None:
        atol = 1e-3 if name.startswith("extreme_") and self.dtype == torch.float32 else self.atol
        ours = ours.detach().to(self.dtype)
        message = f"{name}: {{}}".format
        torch.testing.assert_close(ours, want, rtol=self.rtol, atol=atol, msg=message)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "precision" in metafunc.fixturenames:
        metafunc.parametrize("precision", ["definition", *runnable_classes()], indirect=True)


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[Precision]:
    """float64 on the torch definition, then float32 on each class of C++ kernels."""
    if request.param == "definition":
        yield Precision(torch.float64, 1e-10, 1e-12)
    else:
        with use_class(request.param):
            yield Precision(torch.float32, 2e-5, 2e-6)
