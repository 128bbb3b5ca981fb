"""rmsnorm and rmsnorm_residual on a GPU. A program holds whole rows in registers where they fit (H <= BLOCK) and reads
them once; wider rows go by blocks of columns and are read again, from the caches.

With n = x rstd and m = grad weight:  d x = rstd (m - n mean(m n)),  d weight = sum over rows of grad n.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, cdiv, config, launch
from ._row_sums import new_parts, sum_parts


@triton.jit
def _summed(x, residual, at, inside, RESIDUAL: tl.constexpr):
    """x, or x + residual, in float32."""
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        row += tl.load(residual + at, mask=inside, other=0.0)
    return row


@triton.jit
def _write(
    row, scale, weight, out, total, at, columns, inside, H: tl.constexpr, RESIDUAL: tl.constexpr
):
    w = tl.load(weight + columns, mask=columns < H, other=0.0)
    y = row * scale[:, None] * w[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    if RESIDUAL:
        tl.store(total + at, row, mask=inside)


@triton.jit
def _forward(
    x, residual, weight, out, total, rstd, N, eps,
    H: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (rows < N)[:, None]
    columns = tl.arange(0, BLOCK)
    at = rows[:, None] * H + columns[None, :]
    inside = live & (columns < H)[None, :]
    row = _summed(x, residual, at, inside, RESIDUAL)
    squares = row * row
    for start in range(BLOCK, H, BLOCK):
        more = _summed(x, residual, at + start, live & (start + columns < H)[None, :], RESIDUAL)
        squares += more * more
    scale = tl.rsqrt(tl.sum(squares, 1) / H + tl.cast(eps, tl.float32))
    tl.store(rstd + rows, scale, mask=rows < N)
    _write(row, scale, weight, out, total, at, columns, inside, H, RESIDUAL)
    for start in range(BLOCK, H, BLOCK):
        inside = live & (start + columns < H)[None, :]
        row = _summed(x, residual, at + start, inside, RESIDUAL)
        _write(row, scale, weight, out, total, at + start, start + columns, inside, H, RESIDUAL)


@triton.jit
def _gradient(
    g, n, w, scale, mean, grad_total, d_x, d_residual, at, inside,
    RESIDUAL: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Writes d x = rstd (m - n mean(m n)), plus the gradient that the sum itself has."""
    d = scale * (g * w - n * mean)
    if RESIDUAL:
        d += tl.load(grad_total + at, mask=inside, other=0.0)
    tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=inside)
    if NARROW:
        tl.store(d_residual + at, d, mask=inside)


@triton.jit
def _read(grad, x, weight, rstd, rows, live, columns, H: tl.constexpr):
    """(grad, n, weight, rstd) of a tile, and where it lies."""
    at = rows[:, None] * H + columns[None, :]
    inside = live[:, None] & (columns < H)[None, :]
    scale = tl.load(rstd + rows, mask=live, other=0.0)[:, None]
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    n = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
    w = tl.load(weight + columns, mask=columns < H, other=0.0)[None, :]
    return g, n, w, scale, at, inside


@triton.jit
def _backward(
    grad, grad_total, x, weight, rstd, d_x, d_residual, parts, N, span,
    H: tl.constexpr, RESIDUAL: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows that fit: one pass. A program goes through the rows of one part."""
    part = tl.program_id(0).to(tl.int64)
    count = tl.minimum(span, N - part * span).to(tl.int32)  # rows of this part
    columns = tl.arange(0, BLOCK)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        of_part = start + tl.arange(0, ROWS)
        rows = part * span + of_part
        live = of_part < count
        g, n, w, scale, at, inside = _read(grad, x, weight, rstd, rows, live, columns, H)
        mean = (tl.sum(g * w * n, 1) / H)[:, None]
        _gradient(g, n, w, scale, mean, grad_total, d_x, d_residual, at, inside, RESIDUAL, NARROW)
        d_weight += tl.sum(g * n, 0)
    tl.store(parts + part * H + columns, d_weight, mask=columns < H)


@triton.jit
def _backward_wide(
    grad, grad_total, x, weight, rstd, d_x, d_residual, parts, N, span,
    H: tl.constexpr, RESIDUAL: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows wider than BLOCK: two passes over a part's rows for d x, then one by blocks of columns for d weight."""
    part = tl.program_id(0).to(tl.int64)
    count = tl.minimum(span, N - part * span).to(tl.int32)  # rows of this part
    for start in range(0, count, ROWS):
        of_part = start + tl.arange(0, ROWS)
        rows = part * span + of_part
        live = of_part < count
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in tl.range(0, H, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)
            g, n, w, scale, at, inside = _read(grad, x, weight, rstd, rows, live, columns, H)
            products += g * w * n
        mean = (tl.sum(products, 1) / H)[:, None]
        for first in tl.range(0, H, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)
            g, n, w, scale, at, inside = _read(grad, x, weight, rstd, rows, live, columns, H)
            _gradient(
                g, n, w, scale, mean, grad_total, d_x, d_residual, at, inside, RESIDUAL, NARROW
            )
    for first in range(0, H, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        d_weight = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, count, ROWS, num_stages=STAGES):
            of_part = start + tl.arange(0, ROWS)
            rows = part * span + of_part
            live = of_part < count
            g, n, w, scale, at, inside = _read(grad, x, weight, rstd, rows, live, columns, H)
            d_weight += tl.sum(g * n, 0)
        tl.store(parts + part * H + columns, d_weight, mask=columns < H)


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, tuned: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Size of the table: H."""
    out = torch.empty_like(x, dtype=out_dtype)
    return out, _normed(x, None, weight, eps, out, out, tuned)


def rmsnorm_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out, total = torch.empty_like(x, dtype=out_dtype), torch.empty_like(residual)
    return out, total, _normed(x, residual, weight, eps, out, total, tuned)


def _normed(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor,
    tuned: Config | None,
) -> Tensor:
    """Fills out and total; rstd. What a kernel does not use it is given in the place of what is not there."""
    N, H = x.shape
    rstd = x.new_empty(N, dtype=torch.float32)
    tuned = tuned or config("rmsnorm", H, x.device)
    constants = {"H": H, "RESIDUAL": residual is not None}
    arguments = (x, x if residual is None else residual, weight, out, total, rstd, N, eps)
    launch(_forward, (cdiv(N, tuned.blocks["ROWS"]),), *arguments, config=tuned, **constants)
    return rstd


def rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, tuned: Config | None = None
) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(x)
    return d_x, _gradients(grad, None, x, weight, rstd, d_x, d_x, tuned)


def rmsnorm_residual_backward(
    grad: Tensor,
    grad_total: Tensor,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_residual = torch.empty_like(total)
    narrow = x_dtype != torch.float32
    d_x = torch.empty_like(total, dtype=x_dtype) if narrow else total.new_empty(0)
    main = d_x if narrow else d_residual
    tensors = (grad, grad_total, total, weight, rstd, main, d_residual)
    return d_x, d_residual, _gradients(*tensors, tuned)


def _gradients(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    d_x: Tensor,
    d_residual: Tensor,
    tuned: Config | None,
) -> Tensor:
    """Fills d_x, and d_residual where it is another tensor; d weight."""
    N, H = x.shape
    tuned = tuned or config("rmsnorm_backward", H, x.device)
    parts, span = new_parts(x, 1)
    constants = {"H": H, "RESIDUAL": grad_total is not None, "NARROW": d_x is not d_residual}
    grad_total = grad if grad_total is None else grad_total
    arguments = (grad, grad_total, x, weight, rstd, d_x, d_residual, parts, N, span)
    kernel = _backward if tuned.blocks["BLOCK"] >= H else _backward_wide
    launch(kernel, (parts.shape[1],), *arguments, config=tuned, **constants)
    return sum_parts(parts)[0]
