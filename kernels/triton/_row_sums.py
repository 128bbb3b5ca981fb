"""Sums over the rows of a batch, for gradients of vectors that all rows share: partial sums in a scratch tensor, then
their sum in a fixed order.

    parts[k, p] = sum of the rows span p ... span (p + 1) - 1        a kernel's own work, one program a part
    out[k]      = sum_p parts[k, p]

The partition follows from the number of rows alone, not from the device, so that GPUs with equal tables agree.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, cdiv, launch

MOST_PARTS = 256  # about two programs a multiprocessor; more would write more partial sums
FEWEST_ROWS = 8  # of a part: below it the partial sums are as large as the rows


@triton.jit
def _sum_parts(parts, first, second, P, H: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, PARTS):
        p = start + tl.arange(0, PARTS)
        at = (k * P + p[:, None]) * H + columns[None, :]
        inside = (p < P)[:, None] & (columns < H)[None, :]
        total += tl.sum(tl.load(parts + at, mask=inside, other=0.0), 0)
    if k == 0:
        tl.store(first + columns, total, mask=columns < H)
    else:
        tl.store(second + columns, total, mask=columns < H)


def row_partition(rows: int) -> tuple[int, int]:
    """(number of parts, rows of a part)."""
    span = FEWEST_ROWS * cdiv(rows, MOST_PARTS * FEWEST_ROWS)
    return (cdiv(rows, span), span) if rows else (0, FEWEST_ROWS)


def sum_parts(parts: Tensor, tuned: Config | None = None) -> list[Tensor]:  # (K, P, H), K 1 or 2
    """[sum_p parts[k, p]] (H,) for each k; zeros where there are no parts."""
    count, P, H = parts.shape
    out = [parts.new_empty(H) for _ in range(count)]
    if P == 0:
        return [x.zero_() for x in out]
    tuned = tuned or Config({"PARTS": 64, "BLOCK": 32}, num_warps=4)
    grid = (cdiv(H, tuned.blocks["BLOCK"]), count)
    launch(_sum_parts, grid, parts, out[0], out[-1], P, H=H, config=tuned)
    return out


def new_parts(x: Tensor, count: int) -> tuple[Tensor, int]:  # (count, P, H) float32
    """Memory for `count` partial sums of each part of the rows of x (N, H), and the rows of a part."""
    P, span = row_partition(x.shape[0])
    return x.new_empty((count, P, x.shape[1]), dtype=torch.float32), span
