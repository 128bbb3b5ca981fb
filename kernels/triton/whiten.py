"""whiten on a GPU: statistics of blocks, their merge in the blocks' order, then the result; all in float64.

A block's squares are around its own mean, and the merge is exact in exact arithmetic:
sum (x - mean)^2 = sum_b [M2_b + n_b (mean_b - mean)^2] (Chan, Golub, LeVeque 1983).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import load_block, store_block
from ._launch import Config, cdiv, config, launch
from ._reduce import ONE_PROGRAM


@triton.jit
def _statistics(x, grad, partials, n, blocks, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Of one block: mean, M2 = sum (x - mean)^2; with GRAD also sum grad and sum grad (x - mean)."""
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    wide = load_block(x, first, n, BLOCK).to(tl.float64)
    mean = tl.sum(wide, 0) / tl.minimum(n - first, BLOCK).to(tl.float64)
    centred = tl.where(first + tl.arange(0, BLOCK) < n, wide - mean, 0.0)
    tl.store(partials + block, mean)
    tl.store(partials + blocks + block, tl.sum(centred * centred, 0))
    if GRAD:
        g = load_block(grad, first, n, BLOCK).to(tl.float64)
        tl.store(partials + 2 * blocks + block, tl.sum(g, 0))
        tl.store(partials + 3 * blocks + block, tl.sum(g * centred, 0))


@triton.jit
def _merge(
    partials, statistics, n, blocks, eps,
    GRAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """statistics = mean, 1 / sqrt(M2 / n + eps), mean of grad, mean of grad (x - mean)."""
    count = tl.cast(n, tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        size = tl.minimum(n - row * BLOCK, BLOCK).to(tl.float64)
        total += size * tl.load(partials + row, mask=row < blocks, other=0.0)
    mean = tl.sum(total, 0) / count
    squares = tl.zeros((ROWS,), tl.float64)
    grads = tl.zeros((ROWS,), tl.float64)
    products = tl.zeros((ROWS,), tl.float64)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = row < blocks
        size = tl.minimum(n - row * BLOCK, BLOCK).to(tl.float64)
        off = tl.load(partials + row, mask=inside, other=0.0) - mean
        within = tl.load(partials + blocks + row, mask=inside, other=0.0)
        squares += tl.where(inside, within + size * off * off, 0.0)
        if GRAD:
            g = tl.load(partials + 2 * blocks + row, mask=inside, other=0.0)
            grads += g
            products += g * off + tl.load(partials + 3 * blocks + row, mask=inside, other=0.0)
    tl.store(statistics, mean)
    tl.store(statistics + 1, 1.0 / tl.sqrt(tl.sum(squares, 0) / count + eps))
    if GRAD:
        tl.store(statistics + 2, tl.sum(grads, 0) / count)
        tl.store(statistics + 3, tl.sum(products, 0) / count)


@triton.jit
def _forward(x, statistics, y, n, SHIFT_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    mean = tl.load(statistics)
    wide = load_block(x, first, n, BLOCK).to(tl.float64)
    whitened = (wide - mean) * tl.load(statistics + 1)
    if not SHIFT_MEAN:
        whitened += mean
    store_block(y, first, n, whitened, BLOCK)


@triton.jit
def _backward(grad, x, statistics, d_x, n, SHIFT_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """With c = x - mean and r = 1 / sqrt(var + eps): r (grad - mean(grad)) - r^3 c mean(grad c), plus mean(grad)
    where the mean was added back."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    r = tl.load(statistics + 1)
    mean_grad = tl.load(statistics + 2)
    slope = r * r * r * tl.load(statistics + 3)
    centred = load_block(x, first, n, BLOCK).to(tl.float64) - tl.load(statistics)
    g = load_block(grad, first, n, BLOCK).to(tl.float64)
    d = r * (g - mean_grad) - centred * slope
    if not SHIFT_MEAN:
        d += mean_grad
    store_block(d_x, first, n, d, BLOCK)


EPS = 1e-8


def _all_statistics(x: Tensor, grad: Tensor | None, tuned: Config) -> Tensor:  # (2,) or (4,)
    n, width, block = x.numel(), 2 if grad is None else 4, tuned.blocks["BLOCK"]
    blocks = cdiv(n, block)
    partials = x.new_empty(width, blocks, dtype=torch.float64)
    statistics = x.new_empty(width, dtype=torch.float64)
    given = (x, x if grad is None else grad, partials, n, blocks)
    launch(_statistics, (blocks,), *given, config=tuned, GRAD=width == 4)
    merged = (partials, statistics, n, blocks, EPS)
    launch(_merge, (1,), *merged, config=ONE_PROGRAM, GRAD=width == 4, BLOCK=block)
    return statistics


def whiten(x: Tensor, shift_mean: bool, tuned: Config | None = None) -> Tensor:
    """Size of the table: the number of tokens."""
    y, n = torch.empty_like(x), x.numel()
    if n == 0:
        return y
    tuned = tuned or config("whiten", n, x.device)
    statistics = _all_statistics(x, None, tuned)
    grid = (cdiv(n, tuned.blocks["BLOCK"]),)
    launch(_forward, grid, x, statistics, y, n, config=tuned, SHIFT_MEAN=shift_mean)
    return y


def whiten_backward(
    grad: Tensor, x: Tensor, shift_mean: bool, tuned: Config | None = None
) -> Tensor:
    d_x, n = torch.empty_like(x), x.numel()
    if n == 0:
        return d_x
    tuned = tuned or config("whiten", n, x.device)
    statistics = _all_statistics(x, grad, tuned)
    grid = (cdiv(n, tuned.blocks["BLOCK"]),)
    launch(_backward, grid, grad, x, statistics, d_x, n, config=tuned, SHIFT_MEAN=shift_mean)
    return d_x
