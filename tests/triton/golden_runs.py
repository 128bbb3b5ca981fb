"""How whole golden cases run on Triton: in small blocks, with the kernels noted that are launched."""

from collections.abc import Iterator
from contextlib import contextmanager

import head_cases
import pytest
import token_ops

from engine.kernels.triton import _launch


@contextmanager
def launched() -> Iterator[set[str]]:
    """The kernels that are launched inside, as file.function; whoever watched before still does."""
    seen: set[str] = set()
    before = _launch.observer.get()

    def watch(launch: _launch.Launch) -> bool:
        kernel = launch.kernel.fn
        seen.add(f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}")
        return before is None or before(launch)

    token = _launch.observer.set(watch)
    try:
        yield seen
    finally:
        _launch.observer.reset(token)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks of 4 tokens, so that a case fills several; adamw keeps its own, whose sums would take minutes."""
    own = _launch.table
    with token_ops.blocks(4), head_cases.blocks(), pytest.MonkeyPatch.context() as patch:
        small = _launch.table
        patch.setattr(_launch, "table", lambda op: (own if op == "adamw" else small)(op))
        yield
