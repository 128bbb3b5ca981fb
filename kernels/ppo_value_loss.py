"""PPO's clipped value loss, a mean over tokens (Ziegler et al. 2019; InstructGPT C.4).

    v_clip = clamp(value, old_value - clip, old_value + clip)
    loss   = 1/(2N) sum max((value - returns)^2, (v_clip - returns)^2)
    d loss / d value = (value - returns) / N, and 0 where the clipped term is the larger one

`clip=None` leaves the clipped term out. v_clip is the value itself inside the bounds, to the bit:
written as old_value + clamp(value - old_value) its rounding alone would make terms "clipped".
"""

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from ._check import check_vector
from ._loss import check_denominator, divided, divided_later, register_loss


def ppo_value_loss_reference(
    value: Tensor,  # (N,)
    old_value: Tensor,  # (N,)
    returns: Tensor,  # (N,)
    clip: float | None = 0.2,
    denominator: float | None = None,
) -> tuple[Tensor, Tensor]:  # loss (), sums (2,) float64: tokens, clipped
    """The definition."""
    old_value, returns = old_value.detach(), returns.detach()
    error = (value - returns).square()  # (N,)
    clipped = torch.zeros_like(value, dtype=torch.bool)
    if clip is not None:
        bounded = value.detach().clamp(old_value - clip, old_value + clip)
        bounded_error = (bounded - returns).square()
        clipped = bounded_error > error.detach()
        error = torch.where(clipped, bounded_error, error)
    sums = torch.stack(
        [clipped.new_tensor(value.numel(), dtype=torch.float64), clipped.sum().double()]
    )
    return error.sum() / 2 / (max(value.numel(), 1) if denominator is None else denominator), sums


def ppo_value_loss_and_sums(
    value: Tensor,  # (N,)
    old_value: Tensor,  # (N,)
    returns: Tensor,  # (N,)
    clip: float | None = 0.2,
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:  # loss (), sums (2,) float64: tokens, clipped
    """`ppo_value_loss` with statistics as sums.

    Add them over the micro-batches of a batch, then call `ppo_value_stats`.
    """
    for name, x in (("value", value), ("old_value", old_value), ("returns", returns)):
        check_vector(name, x, value.numel(), value.dtype)
    if clip is not None and not 0 <= clip < float("inf"):
        raise ValueError(f"clip: got {clip}, want a finite number >= 0, or None for no clipping")
    if divided_later(denominator, value.dtype):
        loss, sums = ppo_value_loss_and_sums(value, old_value, returns, clip, denominator=1.0)
        return divided(loss, denominator), sums
    divisor = check_denominator(denominator)
    if choose("ppo_value_loss", value, old_value, returns) == "reference":
        return ppo_value_loss_reference(value, old_value, returns, clip, divisor)
    divisor = float(max(value.numel(), 1)) if divisor is None else divisor
    limit = float("inf") if clip is None else clip
    tensors = [x.contiguous() for x in (value, old_value, returns)]
    loss, sums, _ = kernel("ppo_value_loss")(*tensors, limit, divisor)
    return loss, sums


def ppo_value_stats(sums: Tensor) -> dict[str, Tensor]:  # (2,) float64 -> 0-dim float64 each
    """clipfrac: the share of tokens whose clipped term was the larger one; 0 without tokens."""
    return {"clipfrac": sums[1] / sums[0].clamp(min=1)}


def ppo_value_loss(
    value: Tensor,  # (N,)
    old_value: Tensor,  # (N,)
    returns: Tensor,  # (N,)
    clip: float | None = 0.2,
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # loss (), {clipfrac} of these tokens, 0-dim
    """loss = 1/(2 denominator) sum max((value - returns)^2, (v_clip - returns)^2); statistics:
    `ppo_value_stats`.

    `denominator` is the number of tokens, or that of the whole batch when this is a micro-batch of
    it. Differentiable once, in value; old_value and returns are constants. Without tokens the loss
    is 0. Raises ValueError on shapes and settings that do not fit. Source: Ziegler et al. 2019;
    InstructGPT C.4 (clip 0.2).
    """
    loss, sums = ppo_value_loss_and_sums(value, old_value, returns, clip, denominator=denominator)
    return loss, ppo_value_stats(sums)


define(
    "ppo_value_loss(Tensor value, Tensor old_value, Tensor returns, float clip, float denominator)"
    " -> (Tensor loss, Tensor sums, Tensor grad)",
    lambda value, old_value, returns, clip, denominator: (
        value.new_empty(()),
        value.new_empty(2, dtype=torch.float64),
        torch.empty_like(value),
    ),
)
register_loss("ppo_value_loss")
