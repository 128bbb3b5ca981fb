"""layernorm and layernorm_residual on a GPU. A program holds whole rows in registers where they fit (H <= BLOCK) and
reads them once; wider rows go by blocks of columns and are read again, from the caches.

With n = (x - mean) rstd and m = grad weight:  d x = rstd (m - mean(m) - n mean(m n)),
d weight = sum over rows of grad n,  d bias = sum over rows of grad.
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
    row, centre, scale, weight, bias, out, total, at, columns, inside,
    H: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    w = tl.load(weight + columns, mask=columns < H, other=0.0)
    y = (row - centre) * scale * w[None, :]
    if BIAS:
        y += tl.load(bias + columns, mask=columns < H, other=0.0)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    if RESIDUAL:
        tl.store(total + at, row, mask=inside)


@triton.jit
def _forward(
    x, residual, weight, bias, out, total, mean, rstd, N, eps,
    H: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (rows < N)[:, None]
    columns = tl.arange(0, BLOCK)
    at = rows[:, None] * H + columns[None, :]
    inside = live & (columns < H)[None, :]
    row = _summed(x, residual, at, inside, RESIDUAL)
    sums = row
    for start in range(BLOCK, H, BLOCK):
        of_row = live & (start + columns < H)[None, :]
        sums += _summed(x, residual, at + start, of_row, RESIDUAL)
    centre = (tl.sum(sums, 1) / H)[:, None]
    # from the mean, which E[x^2] - mean^2 is not: where the mean is far from 0 that has no digits
    off = tl.where(inside, row - centre, 0.0)
    squares = off * off
    for start in range(BLOCK, H, BLOCK):
        of_row = live & (start + columns < H)[None, :]
        more = _summed(x, residual, at + start, of_row, RESIDUAL)
        off = tl.where(of_row, more - centre, 0.0)
        squares += off * off
    scale = tl.rsqrt(tl.sum(squares, 1) / H + tl.cast(eps, tl.float32))[:, None]
    tl.store(mean + rows[:, None], centre, mask=live)
    tl.store(rstd + rows[:, None], scale, mask=live)
    _write(row, centre, scale, weight, bias, out, total, at, columns, inside, H, RESIDUAL, BIAS)
    for start in range(BLOCK, H, BLOCK):
        of_row = live & (start + columns < H)[None, :]
        row = _summed(x, residual, at + start, of_row, RESIDUAL)
        _write(
            row, centre, scale, weight, bias, out, total, at + start, start + columns, of_row,
            H, RESIDUAL, BIAS,
        )  # fmt: skip


@triton.jit
def _gradient(
    g, n, w, scale, mean_m, mean_mn, grad_total, d_x, d_residual, at, inside,
    RESIDUAL: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Writes d x = rstd (m - mean(m) - n mean(m n)), plus the gradient that the sum itself has."""
    d = scale * (g * w - mean_m - n * mean_mn)
    if RESIDUAL:
        d += tl.load(grad_total + at, mask=inside, other=0.0)
    tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=inside)
    if NARROW:
        tl.store(d_residual + at, d, mask=inside)


@triton.jit
def _read(grad, x, weight, mean, rstd, rows, live, columns, H: tl.constexpr):
    """(grad, n, weight, rstd) of a tile, and where it lies. Outside of it grad and weight are 0."""
    at = rows[:, None] * H + columns[None, :]
    inside = live[:, None] & (columns < H)[None, :]
    centre = tl.load(mean + rows, mask=live, other=0.0)[:, None]
    scale = tl.load(rstd + rows, mask=live, other=0.0)[:, None]
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    n = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre) * scale
    w = tl.load(weight + columns, mask=columns < H, other=0.0)[None, :]
    return g, n, w, scale, at, inside


@triton.jit
def _backward(
    grad, grad_total, x, weight, mean, rstd, d_x, d_residual, parts, N, P, span,
    H: tl.constexpr, RESIDUAL: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows that fit: one pass. A program goes through the rows of one part."""
    part = tl.program_id(0).to(tl.int64)
    count = tl.minimum(span, N - part * span).to(tl.int32)  # rows of this part
    columns = tl.arange(0, BLOCK)
    d_weight = tl.zeros([BLOCK], tl.float32)
    d_bias = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        of_part = start + tl.arange(0, ROWS)
        rows = part * span + of_part
        live = of_part < count
        g, n, w, scale, at, inside = _read(grad, x, weight, mean, rstd, rows, live, columns, H)
        mean_m = (tl.sum(g * w, 1) / H)[:, None]
        mean_mn = (tl.sum(g * w * n, 1) / H)[:, None]
        _gradient(
            g, n, w, scale, mean_m, mean_mn, grad_total, d_x, d_residual, at, inside,
            RESIDUAL, NARROW,
        )  # fmt: skip
        d_weight += tl.sum(g * n, 0)
        d_bias += tl.sum(g, 0)
    tl.store(parts + part * H + columns, d_weight, mask=columns < H)
    tl.store(parts + (P + part) * H + columns, d_bias, mask=columns < H)


@triton.jit
def _backward_wide(
    grad, grad_total, x, weight, mean, rstd, d_x, d_residual, parts, N, P, span,
    H: tl.constexpr, RESIDUAL: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows wider than BLOCK: two passes over a part's rows for d x, then one by blocks of columns for the vectors."""
    part = tl.program_id(0).to(tl.int64)
    count = tl.minimum(span, N - part * span).to(tl.int32)  # rows of this part
    for start in range(0, count, ROWS):
        of_part = start + tl.arange(0, ROWS)
        rows = part * span + of_part
        live = of_part < count
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in tl.range(0, H, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)
            g, n, w, scale, at, inside = _read(grad, x, weight, mean, rstd, rows, live, columns, H)
            sums += g * w
            products += g * w * n
        mean_m = (tl.sum(sums, 1) / H)[:, None]
        mean_mn = (tl.sum(products, 1) / H)[:, None]
        for first in tl.range(0, H, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)
            g, n, w, scale, at, inside = _read(grad, x, weight, mean, rstd, rows, live, columns, H)
            _gradient(
                g, n, w, scale, mean_m, mean_mn, grad_total, d_x, d_residual, at, inside,
                RESIDUAL, NARROW,
            )  # fmt: skip
    for first in range(0, H, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        d_weight = tl.zeros([BLOCK], tl.float32)
        d_bias = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, count, ROWS, num_stages=STAGES):
            of_part = start + tl.arange(0, ROWS)
            rows = part * span + of_part
            live = of_part < count
            g, n, w, scale, at, inside = _read(grad, x, weight, mean, rstd, rows, live, columns, H)
            d_weight += tl.sum(g * n, 0)
            d_bias += tl.sum(g, 0)
        tl.store(parts + part * H + columns, d_weight, mask=columns < H)
        tl.store(parts + (P + part) * H + columns, d_bias, mask=columns < H)


def layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Size of the table: H."""
    out = torch.empty_like(x, dtype=out_dtype)
    mean, rstd = _normed(x, None, weight, bias, eps, out, out, tuned)
    return out, mean, rstd


def layernorm_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, total = torch.empty_like(x, dtype=out_dtype), torch.empty_like(residual)
    mean, rstd = _normed(x, residual, weight, bias, eps, out, total, tuned)
    return out, total, mean, rstd


def _normed(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    total: Tensor,
    tuned: Config | None,
) -> tuple[Tensor, Tensor]:
    """Fills out and total; (mean, rstd). What a kernel does not use it is given in the place of what is not there."""
    N, H = x.shape
    mean, rstd = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    tuned = tuned or config("layernorm", H, x.device)
    constants = {"H": H, "RESIDUAL": residual is not None, "BIAS": bias is not None}
    residual, bias = x if residual is None else residual, weight if bias is None else bias
    arguments = (x, residual, weight, bias, out, total, mean, rstd, N, eps)
    launch(_forward, (cdiv(N, tuned.blocks["ROWS"]),), *arguments, config=tuned, **constants)
    return mean, rstd


def layernorm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = torch.empty_like(x)
    d_weight, d_bias = _gradients(grad, None, x, weight, mean, rstd, d_x, d_x, tuned)
    return d_x, d_weight, d_bias


def layernorm_residual_backward(
    grad: Tensor,
    grad_total: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_residual = torch.empty_like(total)
    narrow = x_dtype != torch.float32
    d_x = torch.empty_like(total, dtype=x_dtype) if narrow else total.new_empty(0)
    main = d_x if narrow else d_residual
    tensors = (grad, grad_total, total, weight, mean, rstd, main, d_residual)
    d_weight, d_bias = _gradients(*tensors, tuned)
    return d_x, d_residual, d_weight, d_bias


def _gradients(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    d_x: Tensor,
    d_residual: Tensor,
    tuned: Config | None,
) -> list[Tensor]:
    """Fills d_x, and d_residual where it is another tensor; [d weight, d bias]."""
    N, H = x.shape
    tuned = tuned or config("layernorm_backward", H, x.device)
    parts, span = new_parts(x, 2)
    P = parts.shape[1]
    constants = {"H": H, "RESIDUAL": grad_total is not None, "NARROW": d_x is not d_residual}
    grad_total = grad if grad_total is None else grad_total
    arguments = (grad, grad_total, x, weight, mean, rstd, d_x, d_residual, parts, N, P, span)
    kernel = _backward if tuned.blocks["BLOCK"] >= H else _backward_wide
    launch(kernel, (P,), *arguments, config=tuned, **constants)
    return sum_parts(parts)
