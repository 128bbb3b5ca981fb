"""linear_logprob on a GPU: statistics of tiles of the logits, merged in the order of the vocabulary.

    of row n and tile t:  m = max z,  s = sum e^(z - m),  b = sum e^(z - m) (z - m)
    M = max m,  S = sum s e^(m - M),  B = sum e^(m - M) (b + s (m - M))
    logprob = (z_y - M) - log S,  entropy = log S - B / S

A tile lives in registers, and PIECE tiles are joined there one after the other: memory holds 3 numbers a row and
piece. Where that would leave fewer than MANY programs it holds 3 a row and half of a tile, and those of a piece are
joined where pieces are merged, by the same function in the same order. The widths of tiles and pieces depend on the
vocabulary alone, so that a row's result does not depend on the other rows, nor on which of the two it was.
What is made of a tile is made of one half of its columns, then of the other: with half as many registers beside it the
tile itself can be twice as wide, and the tiles of a vocabulary load their hidden states half as often.
The gradient of the logits is made again a slab of the vocabulary at a time; the products with it are the library's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import halves
from ._head import add_product, check_vocabulary, product, rows_at_once, table, without_pieces
from ._launch import Config, cdiv, config, launch


@triton.jit
def tile_products(
    hidden,  # at the first row
    weight,
    row_inside,  # (BLOCK_M,): rows that are loaded; the others are 0
    column,  # the first
    column_inside,  # (BLOCK_N,), as row_inside
    H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden weight^T (BLOCK_M, BLOCK_N) float32."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    h_at = hidden + m[:, None] * H + k[None, :]
    w_at = weight + tl.cast(column, tl.int64) * H + n[None, :] * H + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        h_mask, w_mask = row_inside[:, None], column_inside[None, :]
        if H % BLOCK_K != 0:
            h_mask = h_mask & (k0 + k < H)[None, :]
            w_mask = w_mask & (k0 + k < H)[:, None]
        h = tl.load(h_at + k0, mask=h_mask, other=0.0).to(weight.dtype.element_ty)
        w = tl.load(w_at + k0, mask=w_mask, other=0.0)
        sums = tl.dot(h, w, sums, input_precision="ieee")
    return sums


@triton.jit
def logits(sums, bias, inverse_temperature, column, V: tl.constexpr):
    """z of the products' columns, -inf behind the vocabulary."""
    n = column + tl.arange(0, sums.shape[1])
    if bias is not None:
        sums += tl.load(bias + n, mask=n < V, other=0.0)[None, :]
    z = sums * tl.cast(inverse_temperature, tl.float32)
    return tl.where((n < V)[None, :], z, float("-inf"))


@triton.jit
def _joined(most, total, weighted, m, s, b):
    """(M, S, B) of what was summed so far and of a tile. Where there is no mass nothing is added."""
    higher = tl.maximum(most, m)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    before, lower = most - shift, m - shift
    scale, scales = tl.exp(before), tl.exp(lower)
    weighted = tl.where(scale == 0.0, 0.0, scale * (weighted + total * before))
    weighted += tl.where(scales == 0.0, 0.0, scales * (s * lower + b))
    return higher, scale * total + scales * s, weighted


@triton.jit
def _store_target(target_z, row, inside, target, z, column, V: tl.constexpr):
    """The target's logit, from the same sums as the statistics, where a tile holds it."""
    y = target - column
    here = inside & (y >= 0) & (y < z.shape[1]) & (y + column < V)
    # a gather: comparing each column with y would take more registers
    z_y = tl.gather(z, tl.where(here, y, 0).to(tl.int32)[:, None], 1)
    tl.store(target_z + row, tl.sum(z_y, 1), mask=here)


@triton.jit
def _of_columns(z):
    """(m, s, b) of the columns of z."""
    m = tl.max(z, 1)
    below = z - tl.where(m == float("-inf"), 0.0, m)[:, None]
    e = tl.exp(below)
    b = tl.sum(tl.where(e == 0.0, 0.0, e * below), 1)  # 0 times -inf is 0
    return m, tl.sum(e, 1), b


@triton.jit
def _store_statistics(out, plane, m, s, b, inside):
    tl.store(out, m, mask=inside)
    tl.store(out + plane, s, mask=inside)
    tl.store(out + 2 * plane, b, mask=inside)


# N is not specialised in: a kernel compiled for a multiple of 16 might sum a row in another order.
@triton.jit(do_not_specialize=["N"])
def _statistics(
    hidden,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    targets,  # (N,)
    statistics,  # (3, pieces, N), or of PIECE 1 (3, halves of tiles, N)
    target_z,  # (N,)
    inverse_temperature,
    N,
    PIECE: tl.constexpr,  # tiles
    V: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    row, n = row0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    half: tl.constexpr = BLOCK_N // 2
    inside = row < N
    target = tl.load(targets + row, mask=inside, other=-1)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    for tile in tl.range(0, PIECE, disable_licm=True):
        column = (piece * PIECE + tile) * BLOCK_N
        sums = tile_products(
            hidden + row0 * H, weight, inside, column, column + n < V, H, BLOCK_M, BLOCK_N, BLOCK_K
        )
        left, right = halves(sums)
        left = logits(left, bias, inverse_temperature, column, V)
        _store_target(target_z, row, inside, target, left, column, V)
        m_left, s_left, b_left = _of_columns(left)
        if PIECE > 1:
            most, total, weighted = _joined(most, total, weighted, m_left, s_left, b_left)
        right = logits(right, bias, inverse_temperature, column + half, V)
        _store_target(target_z, row, inside, target, right, column + half, V)
        m_right, s_right, b_right = _of_columns(right)
        if PIECE == 1:
            plane = 2 * tl.cast(pieces, tl.int64) * N
            out = statistics + 2 * tl.cast(piece, tl.int64) * N + row
            _store_statistics(out, plane, m_left, s_left, b_left, inside)
            _store_statistics(out + N, plane, m_right, s_right, b_right, inside)
        else:
            most, total, weighted = _joined(most, total, weighted, m_right, s_right, b_right)
    if PIECE > 1:
        plane = tl.cast(pieces, tl.int64) * N
        out = statistics + tl.cast(piece, tl.int64) * N + row
        _store_statistics(out, plane, most, total, weighted, inside)


@triton.jit(do_not_specialize=["N"])
def _merge(
    statistics,  # (3, TILES, N), of halves of tiles or of pieces
    target_z,  # (N,)
    targets,  # (N,)
    logprob,  # (N,), as the three that follow
    entropy,
    row_max,
    log_sum,
    N,
    JOIN: tl.constexpr,  # so many make a piece
    V: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < N
    plane = tl.cast(N, tl.int64) * TILES
    most = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    weighted = tl.zeros((BLOCK_R,), tl.float32)
    for t0 in range(0, TILES, BLOCK_T * JOIN):
        # as _statistics joins the halves of a piece's tiles
        m = tl.full((BLOCK_T, BLOCK_R), float("-inf"), tl.float32)
        s = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        b = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for i in range(JOIN):
            t = t0 + tl.arange(0, BLOCK_T) * JOIN + i
            at = statistics + t[:, None].to(tl.int64) * N + row[None, :]
            mask = (t < TILES)[:, None] & inside[None, :]
            m_t = tl.load(at, mask=mask, other=float("-inf"))
            s_t = tl.load(at + plane, mask=mask, other=0.0)
            b_t = tl.load(at + 2 * plane, mask=mask, other=0.0)
            m, s, b = _joined(m, s, b, m_t, s_t, b_t)
        higher = tl.maximum(most, tl.max(m, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        # what was summed so far, then the pieces, all below the new maximum; without mass nothing is added
        scale = tl.exp(most - shift)
        weighted = tl.where(scale == 0.0, 0.0, scale * (weighted + total * (most - shift)))
        total = scale * total
        lower = m - shift[None, :]
        scales = tl.exp(lower)
        total += tl.sum(scales * s, 0)
        weighted += tl.sum(tl.where(scales == 0.0, 0.0, scales * (b + s * lower)), 0)
        most = higher
    y = tl.load(targets + row, mask=inside, other=-1)
    z_y = tl.load(target_z + row, mask=inside & (y >= 0) & (y < V), other=float("nan"))
    log_total = tl.log(total)
    tl.store(logprob + row, (z_y - most) - log_total, mask=inside)
    tl.store(entropy + row, log_total - weighted / total, mask=inside)
    tl.store(row_max + row, most, mask=inside)
    tl.store(log_sum + row, log_total, mask=inside)


@triton.jit
def _store_gradient(
    z,  # (BLOCK_M, columns)
    column,  # the first
    dz,  # at the first row and column
    bias_sums,  # at the first column, or None
    of_block,  # rows inside, targets: (BLOCK_M,); at the first row what rows have; inverse_temperature
    V: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dz_j = [ g_logprob (1{j = y} - p_j) - g_entropy p_j (log p_j + entropy) ] / temperature."""
    row_inside, target, of_rows, inverse_temperature = of_block
    grad_logprob, grad_entropy, row_max, log_sum, entropy = of_rows
    m, n = tl.arange(0, z.shape[0]), tl.arange(0, z.shape[1])
    log_p = z - tl.load(row_max + m, mask=row_inside, other=0.0)[:, None]
    log_p = log_p - tl.load(log_sum + m, mask=row_inside, other=0.0)[:, None]
    p = tl.exp(log_p)
    y = target - column
    g_logprob = tl.load(grad_logprob + m, mask=row_inside, other=0.0)[:, None]
    g_entropy = tl.load(grad_entropy + m, mask=row_inside, other=0.0)[:, None]
    mean = tl.load(entropy + m, mask=row_inside, other=0.0)[:, None]
    # 1 - p before the product: where p is 1 the gradient is 0
    slope = g_logprob * (tl.where(y[:, None] == n[None, :], 1.0, 0.0) - p)
    slope -= g_entropy * tl.where(p == 0.0, 0.0, p * (log_p + mean))
    slope = tl.where(row_inside[:, None], slope * tl.cast(inverse_temperature, tl.float32), 0.0)
    live = row_inside[:, None] & (column + n < V)[None, :]
    tl.store(dz + m[:, None] * WIDTH + n[None, :], slope.to(dz.dtype.element_ty), mask=live)
    if bias_sums is not None:
        tl.store(bias_sums + n, tl.sum(slope, 0), mask=column + n < V)


@triton.jit(do_not_specialize=["N"])
def _slab_gradient(
    grad_logprob,  # (N,), as the one that follows
    grad_entropy,
    hidden,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    targets,  # (N,), as the three that follow
    row_max,
    log_sum,
    entropy,
    dz,  # (N, WIDTH): columns first ... first + WIDTH - 1
    bias_sums,  # (row blocks, WIDTH) or None
    inverse_temperature,
    first,
    N,
    V: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of logits. Offsets from its first row are of 32 bits: they take half of the registers."""
    block = tl.program_id(0).to(tl.int64)
    row0 = block * BLOCK_M
    slab_column = tl.program_id(1) * BLOCK_N
    row, column = row0 + tl.arange(0, BLOCK_M), first + slab_column
    inside = row < N
    sums = tile_products(
        hidden + row0 * H, weight, inside, column, column + tl.arange(0, BLOCK_N) < V,
        H, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    target = tl.load(targets + row, mask=inside, other=-1).to(tl.int32)
    of_rows = (grad_logprob + row0, grad_entropy + row0, row_max + row0, log_sum + row0, entropy + row0)  # fmt: skip
    left, right = halves(logits(sums, bias, inverse_temperature, column, V))
    half: tl.constexpr = BLOCK_N // 2
    at, at_sums, right_sums = dz + row0 * WIDTH + slab_column, bias_sums, bias_sums
    if bias_sums is not None:
        at_sums = bias_sums + block * WIDTH + slab_column
        right_sums = at_sums + half
    same = (inside, target, of_rows, inverse_temperature)
    _store_gradient(left, column, at, at_sums, same, V, WIDTH)
    _store_gradient(right, column + half, at + half, right_sums, same, V, WIDTH)


def tile_statistics(
    hidden: Tensor,  # (N, H)
    dense: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    temperature: float,
    bias: Tensor | None,  # (V,)
    tuned: Config,
    piece: int,  # tiles that are joined at once
) -> tuple[Tensor, Tensor]:  # statistics (3, pieces or halves of tiles, N), target_z (N,)
    (N, H), V = hidden.shape, dense.shape[0]
    pieces = cdiv(cdiv(V, tuned.blocks["BLOCK_N"]), piece)
    entries = pieces if piece > 1 else 2 * pieces
    statistics = hidden.new_empty((3, entries, N), dtype=torch.float32)
    target_z = hidden.new_empty(N, dtype=torch.float32)
    grid = (cdiv(N, tuned.blocks["BLOCK_M"]), pieces)
    arguments = (hidden, dense, bias, targets, statistics, target_z, 1.0 / temperature, N)
    launch(_statistics, grid, *arguments, config=tuned, V=V, H=H, PIECE=piece)
    return statistics, target_z


def merge(
    statistics: Tensor,  # (3, halves of tiles or pieces, N)
    target_z: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    results: list[Tensor],  # logprob, entropy, row_max, log_sum: (N,)
    V: int,
    join: int,  # of the statistics make a piece
) -> None:
    _, tiles, N = statistics.shape
    tuned = config("linear_logprob_merge", V, statistics.device)
    grid = (cdiv(N, tuned.blocks["BLOCK_R"]),)
    arguments = (statistics, target_z, targets, *results, N)
    launch(_merge, grid, *arguments, config=tuned, V=V, TILES=tiles, JOIN=join)


def linear_logprob(
    hidden: Tensor,  # (N, H)
    dense: Tensor,  # (V, H)
    data: Tensor,
    targets: Tensor,  # (N,)
    temperature: float,
    bias: Tensor | None,  # (V,)
    master: Tensor | None,
    tuned: Config | None = None,
) -> tuple[Tensor, ...]:  # logprob, entropy, row_max, log_sum: (N,) float32
    """Size of the table: V. A target outside [0, V) has the log-probability nan."""
    check_vocabulary(dense)
    tuned, piece, many = without_pieces(tuned or table("linear_logprob", dense))
    N, V, at_once = hidden.shape[0], dense.shape[0], rows_at_once(hidden)
    pieces = cdiv(V, tuned.blocks["BLOCK_N"] * piece)
    results = tuple(hidden.new_empty(N, dtype=torch.float32) for _ in range(4))
    for first in range(0, N, at_once):
        rows = slice(first, first + at_once)
        programs = cdiv(len(hidden[rows]), tuned.blocks["BLOCK_M"]) * pieces
        joined = piece if programs >= many else 1
        statistics, target_z = tile_statistics(
            hidden[rows], dense, targets[rows], temperature, bias, tuned, joined
        )
        of_rows = [x[rows] for x in results]
        merge(statistics, target_z, targets[rows], of_rows, V, 1 if joined > 1 else 2 * piece)
    return results


def linear_logprob_backward(
    grad_logprob: Tensor,  # (N,)
    grad_entropy: Tensor,  # (N,)
    hidden: Tensor,  # (N, H)
    dense: Tensor,  # (V, H)
    data: Tensor,
    targets: Tensor,  # (N,)
    temperature: float,
    bias: Tensor | None,  # (V,)
    row_max: Tensor,  # (N,)
    log_sum: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # d hidden (dtype of hidden), d weight, d bias (float32)
    """Size of the table: V. SLAB columns of dz are held at once, bfloat16 for a bfloat16 weight, else float32.

    Of few rows twice as many, and twice again, up to GRADIENTS numbers: each slab reads the hidden states anew and adds
    to all of their gradients. A kernel is compiled for each width, since one that is not constant costs registers.
    (float16 would lose the gradients of a mean over many tokens below its smallest number.)
    """
    check_vocabulary(dense)
    tuned = tuned or table("linear_logprob_backward", dense)
    blocks = dict(tuned.blocks)
    slab, gradients = blocks.pop("SLAB"), blocks.pop("GRADIENTS")
    block_m, block_n = blocks["BLOCK_M"], blocks["BLOCK_N"]
    tuned = Config(blocks, tuned.num_warps, tuned.num_stages)
    (N, H), V, at_once = hidden.shape, dense.shape[0], rows_at_once(hidden)
    while 2 * slab * N <= gradients and slab < V:
        slab *= 2
    width = min(slab, cdiv(V, block_n) * block_n)
    operand = torch.bfloat16 if dense.dtype == torch.bfloat16 else torch.float32
    dz, wide = hidden.new_empty((N, width), dtype=operand), torch.float32
    sums = hidden.new_empty((cdiv(N, block_m), width), dtype=wide) if need_bias else None
    dh = hidden.new_zeros((N, H) if need_hidden else (0,), dtype=wide)
    dw = hidden.new_empty((V, H) if need_weight else (0,), dtype=wide)
    db = hidden.new_empty((V,) if need_bias else (0,), dtype=wide)
    h = hidden.to(dense.dtype).to(operand)
    for first in range(0, V, width) if need_hidden or need_weight or need_bias else ():
        columns = slice(first, min(first + width, V))
        used = columns.stop - first
        for row in range(0, N, at_once):
            rows = slice(row, row + at_once)
            of_rows = [x[rows] for x in (targets, row_max, log_sum, entropy)]
            launch(
                _slab_gradient, (cdiv(min(at_once, N - row), block_m), cdiv(used, block_n)),
                grad_logprob[rows], grad_entropy[rows], hidden[rows], dense, bias, *of_rows,
                dz[rows], None if sums is None else sums[row // block_m :],
                1.0 / temperature, first, min(at_once, N - row),
                config=tuned, V=V, H=H, WIDTH=width,
            )  # fmt: skip
        if need_hidden:
            add_product(dh, dz[:, :used], dense[columns])
        if need_weight:
            product(dz[:, :used].T, h, out=dw[columns])
        if sums is not None:
            torch.sum(sums[:, :used], 0, out=db[columns])
    return dh.to(hidden.dtype if need_hidden else wide), dw, db
