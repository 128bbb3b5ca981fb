"""Memory outside which a kernel must not reach: every tensor lies between guard bands, and is NaN until it is written.

The interpreter writes outside a tensor in silence, and a GPU into its neighbour. Here, in the interpreter, every
address that a mask lets through must lie inside a tensor, or the access is an AssertionError that never happens; on a
GPU the bands are looked at in the end. All bytes of a band, and of fresh memory, are 0xFF: NaN in every floating dtype,
-1 in integers.
"""

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels.triton import _interpreter, _launch

if _interpreter.active():
    import triton

    triton.knobs.compilation.front_end_debugging = (
        True  # errors inside a kernel come out as they are
    )

BAND = 4096  # bytes before and behind
_EMPTY = ("empty.memory_format", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
_ZEROS = ("zeros", "zeros_like", "new_zeros")
_ACCESSES = {
    "create_masked_load": (0, 1),
    "create_masked_store": (0, 2),
    "create_atomic_rmw": (1, 3),
}


class Guards(TorchDispatchMode):
    """Inside, torch's allocations of new tensors are guarded; `place` guards one that exists."""

    def __init__(self) -> None:
        super().__init__()
        self._placed: list[
            tuple[Tensor, int]
        ] = []  # (bands and tensor as bytes, bytes of the tensor)
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._owned: dict[int, tuple[int, int]] = {}  # a guarded storage -> the tensor in it
        self._ranges: list[tuple[int, int]] = []  # what the launch at hand may touch, sorted

    def _allocate(self, like: Tensor, shift: int = 0) -> Tensor:
        """Memory of the shape, strides and dtype of `like`, `shift` elements off its alignment."""
        extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
        size = (extent if like.numel() else 0) * like.element_size()
        before = BAND + shift * like.element_size()
        whole = torch.full((before + size + BAND,), 0xFF, dtype=torch.uint8, device=like.device)
        self._placed.append((whole, size))
        start = whole.data_ptr() + before
        self._owned[whole.data_ptr()] = (start, start + size)
        inside = whole[before : before + size].view(like.dtype)
        return inside.as_strided(like.shape, like.stride()) if size else inside.view(like.shape)

    def place(self, tensor: Tensor, shift: int = 0) -> Tensor:
        """A copy between bands; with `shift` its address is that many elements past an aligned one."""
        with torch.utils._python_dispatch._disable_current_modes():
            copy = self._allocate(tensor.detach(), shift)
            copy.copy_(tensor.detach())
            self._inputs.append((copy, copy.clone()))
            return copy

    def written(self, tensor: Tensor) -> Tensor:
        """`place`, for a tensor that the op writes to."""
        placed = self.place(tensor)
        self._inputs.pop()
        return placed

    def see(self, launch: _launch.Launch) -> bool:
        """An observer of launches: a kernel may touch its arguments, those from elsewhere in their whole storage."""
        ranges = set()
        for x in launch.arguments:
            if isinstance(x, Tensor) and x.device.type == "cpu":
                storage = x.untyped_storage()
                start = storage.data_ptr()
                ranges.add(self._owned.get(start, (start, start + storage.nbytes())))
        self._ranges = sorted(ranges)
        return True

    def inside(self, pointers: Any, mask: Any) -> None:
        """Raises AssertionError for an address outside every tensor."""
        addresses = np.broadcast_to(
            pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        )
        live = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        if live.size == 0:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        ranges = self._ranges
        starts = [start for start, _ in ranges]
        for low in {int(live.min()), int(live.max())}:
            at = bisect.bisect_right(starts, low) - 1
            assert at >= 0 and low + width <= ranges[at][1], "an address outside every tensor"
        ends = np.array([end for _, end in ranges], dtype=np.uint64)
        at = np.searchsorted(np.array(starts, dtype=np.uint64), live, side="right") - 1
        assert bool((live + np.uint64(width) <= ends[at]).all()), "an address between two tensors"

    def check(self) -> None:
        """Raises AssertionError where a band, or a tensor that was placed, was written to."""
        for whole, size in self._placed:
            assert bool((whole[:BAND] == 0xFF).all()), f"written before a tensor of {size} bytes"
            assert bool((whole[whole.numel() - BAND :] == 0xFF).all()), (
                f"written behind a tensor of {size} bytes"
            )
        for tensor, before in self._inputs:
            same = torch.equal(
                tensor.contiguous().flatten().view(torch.uint8),
                before.contiguous().flatten().view(torch.uint8),
            )
            assert same, f"an input of shape {tuple(tensor.shape)} was written to"

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        if func.namespace == "aten" and name.removesuffix(".default") in _EMPTY:
            return self._allocate(result)
        if func.namespace == "aten" and name.removesuffix(".default") in _ZEROS:
            return self._allocate(result).zero_()
        return result


@contextmanager
def accesses(guards: Guards) -> Iterator[None]:
    """Every load and store of the interpreter is checked before it happens."""
    if not _interpreter.active():
        yield
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    for name, (pointer, mask) in _ACCESSES.items():
        original = getattr(builder, name)

        def checked(
            *given: Any, _original: Any = original, _p: int = pointer, _m: int = mask, **named: Any
        ) -> Any:
            guards.inside(given[_p], given[_m])
            return _original(*given, **named)

        setattr(builder, name, checked)
    try:
        yield
    finally:
        for name in _ACCESSES:
            delattr(builder, name)  # the instance's own; the class's method is seen again


@contextmanager
def plain_assertions() -> Iterator[None]:
    """An AssertionError inside a function that a kernel calls comes out as it is: the interpreter wraps such errors."""
    try:
        yield
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, AssertionError):
            inner = inner.__cause__
        if inner is None or not _interpreter.active():
            raise
        raise inner from None


@contextmanager
def guarded() -> Iterator[Guards]:
    """The block's new tensors are guarded; at its end every band is checked."""
    guards = Guards()
    token = _launch.observer.set(guards.see)
    try:
        with plain_assertions(), accesses(guards), guards:
            yield guards
    finally:
        _launch.observer.reset(token)
    guards.check()
