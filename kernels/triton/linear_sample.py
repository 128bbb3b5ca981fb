"""linear_sample on a GPU: half a tile of the vocabulary by their masses, then the token by its logits, made again.

The statistics of tiles, and what is made of them, are linear_logprob's own kernels on its own tiles. A row without a
distribution (all logits -inf, or nan among them) has the log-probability nan: reading it on the host to raise
an error would wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._head import ROWS, check_vocabulary, table, without_pieces
from ._launch import Config, launch, next_power_of_2
from .linear_logprob import logits, merge, tile_products, tile_statistics


@triton.jit
def _invert(mass, wanted, order, BLOCK: tl.constexpr):
    """The first index whose cumulated mass exceeds `wanted`, else the last one that has mass; 0 without any."""
    cumulated = tl.cumsum(mass, 0)
    alive = mass > 0.0
    reached = tl.min(tl.where(alive & (cumulated > wanted), order, BLOCK), 0)
    last = tl.max(tl.where(alive, order, 0), 0)
    chosen = tl.where(reached < BLOCK, reached, last)
    before = tl.sum(tl.where(order == chosen, cumulated - mass, 0.0), 0)
    return chosen, before


@triton.jit(do_not_specialize=["N"])
def _pick(
    hidden,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    uniform,  # (N,) float64
    statistics,  # (3, TILES, N), of halves of tiles
    token,  # (N,)
    token_z,  # (N,)
    inverse_temperature,
    N,
    V: tl.constexpr,
    H: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    at = statistics + t.to(tl.int64) * N + row
    most = tl.load(at, mask=t < TILES, other=float("-inf"))
    sums = tl.load(at + tl.cast(N, tl.int64) * TILES, mask=t < TILES, other=0.0)
    highest = tl.max(most, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    mass = sums.to(tl.float64) * tl.exp(most - shift).to(tl.float64)
    wanted = tl.load(uniform + row) * tl.sum(mass, 0)
    half, before = _invert(mass, wanted, t, BLOCK_T)
    fraction = (wanted - before) / tl.sum(tl.where(t == half, mass, 0.0), 0)

    # its tile again, this row at its old place, the others and the other half 0: the same sums to the bit
    m, row0 = tl.arange(0, BLOCK_M), row // BLOCK_M * BLOCK_M
    this = m == row - row0
    n, column = tl.arange(0, BLOCK_N), half // 2 * BLOCK_N
    loaded = (n // (BLOCK_N // 2) == half % 2) & (column + n < V)
    sums = tile_products(hidden + row0 * H, weight, this, column, loaded, H, BLOCK_M, BLOCK_N, BLOCK_K)
    sums = tl.sum(tl.where(this[:, None], sums, 0.0), 0)
    z = tl.sum(logits(sums[None, :], bias, inverse_temperature, column, V), 0)
    within = tl.exp(z - tl.sum(tl.where(t == half, most, 0.0), 0)).to(tl.float64)
    within = tl.where(loaded, within, 0.0)
    chosen, _ = _invert(within, fraction * tl.sum(within, 0), n, BLOCK_N)
    tl.store(token + row, (column + chosen).to(tl.int64))
    tl.store(token_z + row, tl.sum(tl.where(n == chosen, z, 0.0), 0))


def linear_sample(
    hidden: Tensor,  # (R, H)
    dense: Tensor,  # (V, H)
    data: Tensor,
    uniform: Tensor,  # (R,) float64
    temperature: float,
    bias: Tensor | None,  # (V,)
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # token (R,) int64, logprob (R,), entropy (R,) float32
    """Size of the tables: V. A row without a distribution: a token of [0, V), nan, nan.

    Tiles are linear_logprob's, and so is `tuned`; of its own, linear_sample has the warps and stages of the last look.
    """
    check_vocabulary(dense)
    tuned, piece, _ = without_pieces(tuned or table("linear_logprob", dense))
    own = table("linear_sample", dense)
    picking = Config(tuned.blocks, own.num_warps, own.num_stages)
    (R, H), V = hidden.shape, dense.shape[0]
    # linear_logprob's kernel to the bit, so it is given targets too: any, until there are tokens
    token = torch.zeros(R, dtype=torch.int64, device=hidden.device)
    results = [hidden.new_empty(R, dtype=torch.float32) for _ in range(4)]
    for first in range(0, R, ROWS):
        rows = slice(first, first + ROWS)
        h, y = hidden[rows], token[rows]
        statistics, z = tile_statistics(h, dense, y, temperature, bias, tuned, piece=1)
        parts = statistics.shape[1]
        arguments = (h, dense, bias, uniform[rows], statistics, y, z, 1.0 / temperature, len(h))
        constants = {"V": V, "H": H, "TILES": parts, "BLOCK_T": next_power_of_2(parts)}
        launch(_pick, (len(h),), *arguments, config=picking, **constants)
        merge(statistics, z, y, [x[rows] for x in results], V, join=2 * piece)
    return token, results[0], results[1]
