"""linear on a GPU: the library's products, or, inside `exact_products()`, one kernel whose rows know nothing of the
others: tiles of one size for every number of rows, and one sum over the depth, in order.

A weight is read as it lies, row-major in its storage dtype; x and the gradient are rounded to it, sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear import exact_forced
from ._launch import Config, cdiv, config, launch


@triton.jit
def _tile(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles are walked GROUP rows of them at a time, column after column, so that neighbours share their operands."""
    per_group = GROUP * tiles_n
    first = program // per_group * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + program % per_group % rows, program % per_group // rows


# One binary for every number of rows: M = 1 and multiples of 16 are not compiled apart.
@triton.jit(do_not_specialize=["M"])
def _forward(
    x,  # (M, K)
    weight,  # (N, K)
    bias,  # (N,)
    y,  # (M, N)
    M,
    N,
    units,  # K / UNIT
    UNIT: tl.constexpr,  # so many elements are 16 bytes, or 1 where K is no multiple of it
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    K = units * UNIT
    program, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = _tile(program, tiles_m, tiles_n, GROUP)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = x + rows[:, None] * K + depth[None, :]
    right = weight + cols[None, :] * K + depth[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if WHOLE:
            a = tl.load(left, mask=rows[:, None] < M, other=0.0)
            b = tl.load(right, mask=cols[None, :] < N, other=0.0)
        else:
            a = tl.load(left, mask=(rows[:, None] < M) & (depth[None, :] < K - k), other=0.0)
            b = tl.load(right, mask=(cols[None, :] < N) & (depth[:, None] < K - k), other=0.0)
        total = tl.dot(a.to(weight.dtype.element_ty), b, total, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(y + rows[:, None] * N + cols[None, :], total.to(y.dtype.element_ty), mask=inside)


def exact_product(
    x: Tensor,  # (M, K)
    dense: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    out_dtype: torch.dtype,
    tuned: Config | None = None,
) -> Tensor:  # (M, N)
    """y = x W^T + bias, a row at a time as far as bits are concerned.

    Size of the table, float32's own where products cannot use tensor cores: the number of columns N. Never of rows: the
    tile of a weight is one.
    """
    (m, k), n = x.shape, dense.shape[0]
    y = x.new_empty((m, n), dtype=out_dtype)
    suffix = "_float32" if dense.dtype == torch.float32 else ""
    tuned = tuned or config("linear" + suffix, n, x.device)
    blocks = tuned.blocks
    unit = 16 // min(x.element_size(), dense.element_size())
    unit = 1 if k % unit else unit  # a row then begins anywhere, and its numbers are loaded one by one
    launch(
        _forward,
        (cdiv(m, blocks["BLOCK_M"]) * cdiv(n, blocks["BLOCK_N"]),),
        x,
        dense,
        dense if bias is None else bias,
        y,
        m,
        n,
        k // unit,
        config=tuned,
        UNIT=unit,
        HAS_BIAS=bias is not None,
        WHOLE=k % blocks["BLOCK_K"] == 0,
    )
    return y


def _product(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N), dtype of a
    out_dtype: torch.dtype,
    bias: Tensor | None = None,  # (N,) float32
) -> Tensor:  # (M, N)
    """The library's product with float32 sums. Where it adds the bias itself, that is rounded to the result's dtype,
    as in the definition."""
    if not a.is_cuda:
        y = a.float() @ b.float()
        return (y if bias is None else y + bias).to(out_dtype)
    if a.dtype == out_dtype:
        return torch.mm(a, b) if bias is None else torch.addmm(bias.to(out_dtype), a, b)
    wide = torch.float32
    y = torch.mm(a, b) if a.dtype == wide else torch.mm(a, b, out_dtype=wide)
    return (y if bias is None else y + bias).to(out_dtype)


def linear(
    x: Tensor,
    dense: Tensor,
    data: Tensor,  # not read: it holds the layout of a CPU
    bias: Tensor | None,
    master: Tensor | None,  # not read: the gradient's only
    out_dtype: torch.dtype,
    tuned: Config | None = None,
) -> Tensor:
    if exact_forced():
        return exact_product(x, dense, bias, out_dtype, tuned)
    return _product(x.to(dense.dtype), dense.t(), out_dtype, bias)


def linear_backward(
    grad: Tensor,  # (M, N)
    x: Tensor,  # (M, K)
    dense: Tensor,  # (N, K)
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's products in either mode: no log-prob comes from a gradient."""
    k, wide = dense.shape[1], torch.float32
    rounded = grad.to(dense.dtype)
    dx = _product(rounded, dense, x.dtype) if need_x else x.new_empty((0, k))
    dw = x.new_empty((0, k), dtype=wide)
    if need_weight:
        dw = _product(rounded.t(), x.to(dense.dtype), wide)
    db = grad.sum(0, dtype=wide) if need_bias else x.new_empty(0, dtype=wide)
    return dx, dw, db


def pack_weight(dense: Tensor) -> Tensor:
    """Nothing: a GPU reads the weight as it lies."""
    return dense.new_empty(0, dtype=torch.uint8)


def refresh_weight(master: Tensor, dense: Tensor, data: Tensor) -> None:
    dense.copy_(master)
