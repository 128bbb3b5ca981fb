"""ppo_value_loss on a GPU: loss, gradient and statistics in one pass, then one program adds the partial sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import load_block, store_block
from ._launch import Config, cdiv, config, launch
from ._reduce import loss_and_sums


@triton.jit
def _tokens(
    value, old_value, returns, grad, partials, n, clip, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """partials: the larger squared errors, clipped tokens. Lanes behind the end hold three zeros."""
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK
    v = load_block(value, first, n, BLOCK).to(tl.float32)
    old = load_block(old_value, first, n, BLOCK).to(tl.float32)
    target = load_block(returns, first, n, BLOCK).to(tl.float32)
    # comparisons, so that nan stays nan and a value inside the bounds stays itself
    bounded = tl.where(v < old - clip, old - clip, tl.where(v > old + clip, old + clip, v))
    error = v - target
    bounded_error = bounded - target
    squared = error * error
    bounded_squared = bounded_error * bounded_error
    clipped = bounded_squared > squared  # a tie keeps the gradient
    slope = scale * tl.where(clipped, 0.0, error)
    store_block(grad, first, n, slope, BLOCK)
    larger = tl.where(clipped, bounded_squared, squared)
    tl.store(partials + program * 2, tl.sum(larger.to(tl.float64), 0))
    tl.store(partials + program * 2 + 1, tl.sum(clipped.to(tl.int32), 0).to(tl.float64))


def ppo_value_loss(
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    clip: float,
    denominator: float,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Size of the table: the number of tokens. An infinite clip is none."""
    grad, n = torch.empty_like(value), value.numel()
    tuned = tuned or config("ppo_value_loss", n, value.device)
    programs = cdiv(n, tuned.blocks["BLOCK"])
    partials = value.new_empty(programs, 2, dtype=torch.float64)
    launch(
        _tokens, (programs,), value, old_value, returns, grad, partials, n, clip, 1 / denominator,
        config=tuned,
    )  # fmt: skip
    return *loss_and_sums(partials, value.dtype, n, 2 * denominator), grad
