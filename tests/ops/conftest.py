"""Fixtures of the op tests: the classes of CPU kernels this machine runs, numbers of threads."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from engine.kernels._backend import extension

CLASSES = ("plain", "avx2", "avx512", "amx")  # lowest first; a machine runs its own and all below


def runnable_classes() -> tuple[str, ...]:
    module = extension()
    return CLASSES[: CLASSES.index(module.detected_class()) + 1] if module else ()


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
    if "cpu_class" in metafunc.fixturenames:
        metafunc.parametrize("cpu_class", runnable_classes(), indirect=True)
    if "precision" in metafunc.fixturenames:
        metafunc.parametrize("precision", ["definition", *runnable_classes()], indirect=True)


def use_class(name: str) -> Iterator[str]:
    module = extension()
    assert module is not None
    before = module.cpu_class()
    module.set_cpu_class(name)
    yield name
    module.set_cpu_class(before)


@pytest.fixture
def cpu_class(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once a class, on that class's kernels; without the extension it is skipped."""
    yield from use_class(request.param)


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[Precision]:
    """float64 on the torch definition, then float32 on each class of C++ kernels."""
    if request.param == "definition":
        yield Precision(torch.float64, 1e-10, 1e-12)
    else:
        for _ in use_class(request.param):
            yield Precision(torch.float32, 2e-5, 2e-6)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
