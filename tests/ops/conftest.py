"""Fixtures of the op tests: every class of CPU kernels that this machine can run, and numbers of threads."""

from collections.abc import Iterator

import pytest
import torch

from engine.kernels._backend import extension

CLASSES = ("plain", "avx2", "avx512", "amx")  # lowest first; a machine runs its own class and all below it


def runnable_classes() -> tuple[str, ...]:
    module = extension()
    return CLASSES[: CLASSES.index(module.detected_class()) + 1] if module else ()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cpu_class" in metafunc.fixturenames:
        metafunc.parametrize("cpu_class", runnable_classes(), indirect=True)


@pytest.fixture
def cpu_class(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once a class, on that class's kernels; without the extension the test is skipped."""
    module = extension()
    assert module is not None
    before = module.cpu_class()
    module.set_cpu_class(request.param)
    yield request.param
    module.set_cpu_class(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
