"""The classes of CPU kernels that this machine runs, and the number of threads, for a block of a test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import setup as builder
from engine.kernels._backend import extension

CLASSES = ("plain", "avx2", "avx512", "amx")  # lowest first; a machine runs its own and all below


def runnable_classes() -> tuple[str, ...]:
    module = extension()
    return CLASSES[: CLASSES.index(module.detected_class()) + 1] if module else ()


def classes_of(test: Path) -> tuple[str, ...]:
    """Those with loops of their own for the op of this file: without products, class amx runs avx512's (dispatch.h)."""
    source = builder.MODULE.with_name(test.name.removeprefix("test_")).with_suffix(".cpp")
    tiled = not source.exists() or any(
        path.stem in builder.TILED for path in builder.made_from(source)
    )
    return tuple(name for name in runnable_classes() if tiled or name != "amx")


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
