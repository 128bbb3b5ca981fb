"""Keys and values of running sequences, in pages of ``PAGE`` tokens at fixed absolute positions.
Knows no model.

Position t of a sequence with page table ``table`` lies in page ``table[t // PAGE]`` at place ``t %
PAGE``, that is at slot ``table[t // PAGE] * PAGE + t % PAGE`` of the flat cache. How a page holds
its keys and values is the kernel's (``attention_decode``); who holds which page is the scheduler's
business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels._memory import zeros_in_large_pages
from engine.kernels.attention_decode import PAGE, page_shapes, write_pages
from engine.run.device import to_device


def page_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    return 2 * layers * PAGE * kv_heads * head_dim * dtype.itemsize


class PageCache:
    """``keys[layer]``, ``values[layer]``: pages as ``attention_decode`` reads them, in one piece of memory.

    Zero-filled, since rows behind a sequence's end take part in blocked products with weight 0, and
    0 * nan is nan.
    """

    def __init__(
        self,
        layers: int,
        num_pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        of_keys, of_values = page_shapes(kv_heads, head_dim, dtype)
        shape = (2, layers, num_pages * math.prod(of_keys))
        on_cpu = torch.device(device).type == "cpu"
        whole = (
            zeros_in_large_pages(shape, dtype)
            if on_cpu
            else torch.zeros(shape, dtype=dtype, device=device)
        )
        self.keys = [pages.view(num_pages, *of_keys) for pages in whole[0]]
        self.values = [pages.view(num_pages, *of_values) for pages in whole[1]]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put ``k``, ``v`` (N, Hk, D) at ``slots`` (N,) int64 of the flat cache."""
        write_pages(self.keys[layer], self.values[layer], slots, k, v)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, destination), in every layer."""
        if not pairs:
            return
        source, destination = to_device(torch.tensor(pairs), self.keys[0].device).unbind(-1)
        for pages in (*self.keys, *self.values):
            pages.index_copy_(0, destination, pages.index_select(0, source))


def prompt_slots(pages: Sequence[int], length: int) -> Tensor:  # (length,) int64
    """Slots of positions 0 .. length - 1 of a sequence in ``pages``."""
    starts = torch.tensor(pages, dtype=torch.int64)[:, None] * PAGE
    return (starts + torch.arange(PAGE)).flatten()[:length]
