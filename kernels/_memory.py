"""Memory in large pages, where the system has them: a step reads every weight once, and with pages of 4 KiB it looks up
a new one every 0.2 microseconds, through two tables where the machine is a virtual one.
"""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

_SLAB = 64 << 20  # bytes; what is not written takes no memory
_LINE = 64


def zeros_in_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like torch.zeros; the memory is the kernel's, in pages of 2 MiB if it gives them (Linux)."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not shared: that has none
    with suppress(OSError):  # a kernel built without them; it is advice, the memory is the same
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


class Slabs:
    """Tensors that are kept together, side by side in large pages. They live as long as any of a slab is used."""

    def __init__(self) -> None:
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0

    def keep(self, data: Tensor) -> Tensor:  # (bytes,) uint8 -> the same
        """A copy of `data` in the slab."""
        if self._used + len(data) > len(self._slab):
            self._slab, self._used = zeros_in_large_pages((max(_SLAB, len(data)),), torch.uint8), 0
        kept = self._slab[self._used : self._used + len(data)]
        self._used += -(-len(data) // _LINE) * _LINE
        return kept.copy_(data)
