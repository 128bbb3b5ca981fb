"""Blocks of numbers that lie side by side, the last of which ends at n; and tiles of them.

A mask of an n that need not be a multiple of 16 would have every number loaded and stored on its own; the blocks that
n does not cut need none, and move 128 bits at a time.
"""

import triton
import triton.language as tl


@triton.jit
def load_block(x, first, n, BLOCK: tl.constexpr):
    """x[first ... first + BLOCK - 1], 0 from x[n] on."""
    at = first + tl.arange(0, BLOCK)
    return tl.load(x + at) if first + BLOCK <= n else tl.load(x + at, mask=at < n, other=0.0)


@triton.jit
def store_block(x, first, n, block, BLOCK: tl.constexpr):
    """In x's dtype, up to x[n - 1]."""
    at = first + tl.arange(0, BLOCK)
    block = block.to(x.dtype.element_ty)
    if first + BLOCK <= n:
        tl.store(x + at, block)
    else:
        tl.store(x + at, block, mask=at < n)


@triton.jit
def halves(x):
    """The left and the right half of a tile's columns, for work that would need too many registers on all of them."""
    columns: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, columns)), (0, 2, 1)))
