"""Counts what a Triton kernel does in the interpreter: bytes loaded and stored, products, exponentials.

A load or store counts each address that its mask lets through, once an instruction: a broadcast load of one address
is one element. What is loaded again by another instruction or program counts again, as it would leave the registers
(caches may serve it on a GPU: the count is an upper bound of the memory's traffic).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

METHODS = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_dot")
EXPONENTIALS = ("create_exp", "create_exp2")


@dataclass
class Traffic:
    """Totals of one block; `kernels` counts launches by kernel name."""

    loaded: int = 0  # bytes
    stored: int = 0  # bytes
    atomics: int = 0  # bytes read and written under a lock
    dot_flops: int = 0
    exponentials: int = 0
    kernels: Counter[str] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored + 2 * self.atomics


def _touched(pointers: Any, mask: Any) -> int:
    """Bytes at distinct addresses that the mask lets through."""
    addresses = np.broadcast_to(
        pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    )
    live = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    return int(np.unique(live).size) * width


def _counting(builder: Any, name: str, original: Any, traffic: Traffic) -> Any:
    def load(pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        traffic.loaded += _touched(pointers, mask)
        return original(pointers, mask, *others, **named)

    def store(pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        traffic.stored += _touched(pointers, mask)
        return original(pointers, value, mask, *others)

    def atomic(operation: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        traffic.atomics += _touched(pointers, mask)
        return original(operation, pointers, value, mask, *others)

    def dot(a: Any, b: Any, *others: Any) -> Any:
        traffic.dot_flops += 2 * int(np.prod(a.data.shape)) * b.data.shape[-1]
        return original(a, b, *others)

    def exponential(x: Any) -> Any:
        traffic.exponentials += x.data.size
        return original(x)

    if name in EXPONENTIALS:
        return exponential
    return dict(zip(METHODS, (load, store, atomic, dot), strict=True))[name]


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts every interpreted launch of the block. Raises RuntimeError where kernels are not interpreted."""
    from engine.kernels.triton import _interpreter, _launch

    if not _interpreter.active():
        raise RuntimeError(
            "traffic is counted in the interpreter: set TRITON_INTERPRET=1 before the start"
        )
    from triton.runtime import interpreter

    builder, traffic = interpreter.interpreter_builder, Traffic()
    for name in (*METHODS, *EXPONENTIALS):
        setattr(builder, name, _counting(builder, name, getattr(builder, name), traffic))

    def observe(launch: _launch.Launch) -> bool:
        traffic.kernels[launch.kernel.fn.__name__] += 1
        return True

    token = _launch.observer.set(observe)
    try:
        yield traffic
    finally:
        _launch.observer.reset(token)
        for name in (*METHODS, *EXPONENTIALS):
            delattr(builder, name)  # the instance's own; the class's methods are seen again
