"""linear_sample on a GPU: a tile of the vocabulary by the tiles' masses, then the token by its logits, made again.

The statistics of tiles, and what is made of them, are linear_logprob's own kernels on its own tiles. A row without a
distribution (all logits -inf, or nan among them) has the log-probability nan: reading it on the host to raise
an error would wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, launch, next_power_of_2
from .linear_logprob import (
    ROWS,
    check_vocabulary,
    merge,
    table,
    tile_logits,
    tile_statistics,
    without_pieces,
)


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
    statistics,  # (3, TILES, N)
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
    tile, before = _invert(mass, wanted, t, BLOCK_T)
    fraction = (wanted - before) / tl.sum(tl.where(t == tile, mass, 0.0), 0)

    # the tile again, this row at its old place and the others 0: the same sums to the bit
    m, row0 = tl.arange(0, BLOCK_M), row // BLOCK_M * BLOCK_M
    this = m == row - row0
    z = tile_logits(
        hidden + row0 * H, weight, bias, inverse_temperature, this, tile * BLOCK_N,
        V, H, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    z = tl.sum(tl.where(this[:, None], z, 0.0), 0)
    n = tl.arange(0, BLOCK_N)
    within = tl.exp(z - tl.sum(tl.where(t == tile, most, 0.0), 0)).to(tl.float64)
    chosen, _ = _invert(within, fraction * tl.sum(within, 0), n, BLOCK_N)
    tl.store(token + row, (tile * BLOCK_N + chosen).to(tl.int64))
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
        tiles = statistics.shape[1]
        arguments = (h, dense, bias, uniform[rows], statistics, y, z, 1.0 / temperature, len(h))
        constants = {"V": V, "H": H, "TILES": tiles, "BLOCK_T": next_power_of_2(tiles)}
        launch(_pick, (len(h),), *arguments, config=picking, **constants)
        merge(statistics, z, y, [x[rows] for x in results], V, join=piece)
    return token, results[0], results[1]
