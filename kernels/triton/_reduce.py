"""The second half of a loss: the programs' partial sums, added in their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, launch, next_power_of_2

# One program over a few KB: it waits for memory once, whatever the blocks are.
ONE_PROGRAM = Config({"ROWS": 128}, num_warps=4)


@triton.jit
def add_partials(
    partials, loss, sums, rows, tokens, divisor,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """loss = (sum of column 0) / divisor; sums = tokens, then the sums of the other columns."""
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        total += tl.sum(tl.load(partials + at, mask=inside, other=0.0), 0)
    tl.store(loss + column, (total / divisor).to(loss.dtype.element_ty), mask=column == 0)
    counted = tl.where(column == 0, tl.cast(tokens, tl.float64), total)
    tl.store(sums + column, counted, mask=column < COLUMNS)


def loss_and_sums(
    partials: Tensor,  # (programs, columns) float64
    dtype: torch.dtype,
    tokens: int,
    divisor: float,
) -> tuple[Tensor, Tensor]:  # loss (), sums (columns,) float64
    rows, columns = partials.shape
    loss, sums = partials.new_empty((), dtype=dtype), partials.new_empty(columns)
    launch(
        add_partials, (1,), partials, loss, sums, rows, tokens, divisor,
        config=ONE_PROGRAM, COLUMNS=columns, WIDTH=next_power_of_2(columns),
    )  # fmt: skip
    return loss, sums
