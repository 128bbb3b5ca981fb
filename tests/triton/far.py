"""Tensors of 2^31 elements and more, whose offsets no 32-bit integer holds, in the interpreter.

Of each launch only the last program runs, and memory that nobody touches costs nothing: the system gives a page of a
large new tensor when it is first written to. A 32-bit sum, difference or product that overflows is an AssertionError
(Triton's own check), and so is an address outside every tensor.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from guards import Guards, accesses, plain_assertions
from torch import Tensor

from engine.kernels.triton import _interpreter, _launch

BEYOND = 2**31
LARGEST = 10e9  # bytes of one tensor, which a system may refuse if its memory is smaller

needs_room = pytest.mark.skipif(
    not _interpreter.active() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < LARGEST,
    reason=f"for the interpreter, on a machine that gives out addresses of {LARGEST:.0e} bytes",
)


def far(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros, of more elements than a 32-bit integer counts."""
    x = torch.empty(shape, dtype=dtype)
    assert x.numel() > BEYOND, f"{shape}: {x.numel()} elements, want more than {BEYOND}"
    return x


def _running(first: bool) -> Callable[..., None]:
    """GridExecutor.__call__ for the last program, and the first."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder

    def call(self: Any, *given: Any, **named: Any) -> None:
        known = inspect.getfullargspec(self.fn)
        named = {k: v for k, v in named.items() if k in known.args or k in known.kwonlyargs}
        bound = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in inspect.getcallargs(self.fn, *given, **named).items()
        }
        grid = (*self.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        scope = interpreter._patch_lang(self.fn)
        try:
            for place in [tuple(n - 1 for n in grid)] + [(0, 0, 0)] * first:
                builder.set_grid_idx(*place)
                self.fn(**bound)
        finally:
            scope.restore()

    return call


@contextmanager
def last_programs(first: bool = False) -> Iterator[None]:
    """Inside, launches run their last program alone, with `first` their first one too; every address is checked."""
    from triton.runtime import interpreter

    guards = Guards()
    token = _launch.observer.set(guards.see)
    try:
        with pytest.MonkeyPatch.context() as patch, plain_assertions(), accesses(guards):
            patch.setattr(interpreter.GridExecutor, "__call__", _running(first))
            yield
    finally:
        _launch.observer.reset(token)
