"""The classes of CPU kernels that this machine runs, and the number of threads, for a block of a test."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.kernels._backend import extension

CLASSES = ("plain", "avx2", "avx512", "amx")  # lowest first; a machine runs its own and all below


def runnable_classes() -> tuple[str, ...]:
    module = extension()
    return CLASSES[: CLASSES.index(module.detected_class()) + 1] if module else ()


@contextmanager
def use_class(name: str) -> Iterator[str]:
    module = extension()
    assert module is not None
    before = module.cpu_class()
    module.set_cpu_class(name)
    try:
        yield name
    finally:
        module.set_cpu_class(before)


@contextmanager
def use_threads(count: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
