"""ppo_policy_loss on a GPU: loss, gradient and all statistics in one pass, then one program adds the partial sums.

float32 arithmetic; sums over tokens in float64, so that those of micro-batches add up to those of the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import load_block, store_block
from ._expm1 import expm1, expm1_minus
from ._launch import Config, cdiv, config, launch
from ._reduce import loss_and_sums


@triton.jit
def _clamp(x, low, high):
    """As torch's: nan stays nan, which tl.clamp does not promise."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _tokens(
    logprob, old_logprob, advantage, grad, partials, n, low, high, limit, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """partials: the loss, then kernels/ppo_policy_loss.py's SUMS without the number of tokens.

    Lanes behind the end hold A = 0 and rho = 1, which add nothing.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK
    a = load_block(advantage, first, n, BLOCK).to(tl.float32)
    lp = load_block(logprob, first, n, BLOCK).to(tl.float32)
    old = load_block(old_logprob, first, n, BLOCK).to(tl.float32)
    change = lp - old
    u = _clamp(change, -limit, limit)
    rho = tl.exp(u)
    free = -a * rho
    bounded = -a * _clamp(rho, low, high)
    clipped = bounded > free  # a tie keeps the gradient
    slope = tl.where(clipped | (u != change), 0.0, free)
    slope = tl.where(change == change, slope, change)  # nan is not hidden
    store_block(grad, first, n, scale * slope, BLOCK)

    partials += program * 7
    wide = u.to(tl.float64)
    excess = expm1(u).to(tl.float64)
    tl.store(partials, tl.sum(tl.where(clipped, bounded, free).to(tl.float64), 0))
    tl.store(partials + 1, tl.sum(clipped.to(tl.int32), 0).to(tl.float64))
    tl.store(partials + 2, -tl.sum(wide, 0))
    tl.store(partials + 3, tl.sum(wide * wide, 0))
    tl.store(partials + 4, tl.sum(expm1_minus(u).to(tl.float64), 0))
    tl.store(partials + 5, tl.sum(excess, 0))
    tl.store(partials + 6, tl.sum(excess * excess, 0))


def ppo_policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    clip: float,
    denominator: float,
    log_ratio_clamp: float,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Size of the table: the number of tokens."""
    grad, n = torch.empty_like(logprob), logprob.numel()
    tuned = tuned or config("ppo_policy_loss", n, logprob.device)
    programs = cdiv(n, tuned.blocks["BLOCK"])
    partials = logprob.new_empty(programs, 7, dtype=torch.float64)
    launch(
        _tokens, (programs,), logprob, old_logprob, advantage, grad, partials, n,
        1 - clip, 1 + clip, log_ratio_clamp, 1 / denominator, config=tuned,
    )  # fmt: skip
    return *loss_and_sums(partials, logprob.dtype, n, denominator), grad
