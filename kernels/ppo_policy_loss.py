"""PPO's clipped policy loss (Schulman et al. 2017, eq. 7), a mean over tokens.

    rho  = exp(logprob - old_logprob)
    loss = 1/N sum max(-A rho, -A clip(rho, 1 - clip, 1 + clip))
    d loss / d logprob = -A rho / N, and 0 where the clipped term is the larger one

so the gradient is 0 just where (A > 0 and rho > 1 + clip) or (A < 0 and rho < 1 - clip). The clip
does not bound the loss of A < 0 with a large rho; `log_ratio_clamp` does: it limits logprob -
old_logprob to +-log_ratio_clamp (20 is usual), beyond which the gradient is 0.

Statistics are kept as sums over tokens (`SUMS`), so that micro-batches add up to exactly those of
the whole batch.
"""

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from ._check import check_vector
from ._loss import check_denominator, divided, divided_later, register_loss

# With u = logprob - old_logprob (after the clamp) and rho = e^u, summed over tokens:
SUMS = ("tokens", "clipped", "-u", "u^2", "rho - 1 - u", "rho - 1", "(rho - 1)^2")


def ppo_policy_loss_reference(
    logprob: Tensor,  # (N,)
    old_logprob: Tensor,  # (N,)
    advantage: Tensor,  # (N,)
    clip: float = 0.2,
    denominator: float | None = None,
    log_ratio_clamp: float | None = None,
) -> tuple[Tensor, Tensor]:  # loss (), sums (7,) float64
    """The definition."""
    old_logprob, advantage = old_logprob.detach(), advantage.detach()
    log_ratio = logprob - old_logprob
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.detach().exp()
    bounded = -advantage * ratio.clamp(1 - clip, 1 + clip)  # (N,)
    clipped = bounded > -advantage * ratio  # (N,) bool
    # A clipped token is a constant; its rho, which may overflow, is kept out of the graph.
    free = -advantage * torch.where(clipped, 0.0, log_ratio).exp()
    total = torch.where(clipped, bounded, free).sum()
    u = log_ratio.detach().double()
    excess = u.expm1()
    per_token = (
        torch.ones_like(u),
        clipped.double(),
        -u,
        u.square(),
        excess - u,
        excess,
        excess.square(),
    )
    sums = torch.stack([x.sum() for x in per_token])
    return total / (max(logprob.numel(), 1) if denominator is None else denominator), sums


def ppo_policy_loss_and_sums(
    logprob: Tensor,  # (N,)
    old_logprob: Tensor,  # (N,)
    advantage: Tensor,  # (N,)
    clip: float = 0.2,
    *,
    denominator: Tensor | float | None = None,
    log_ratio_clamp: float | None = None,
) -> tuple[Tensor, Tensor]:  # loss (), sums (7,) float64
    """`ppo_policy_loss` with statistics as sums.

    Add them over the micro-batches of a batch, then call `ppo_policy_stats`.
    """
    for name, x in (("logprob", logprob), ("old_logprob", old_logprob), ("advantage", advantage)):
        check_vector(name, x, logprob.numel(), logprob.dtype)
    if not 0 <= clip < float("inf"):
        raise ValueError(f"clip: got {clip}, want a finite number >= 0")
    if log_ratio_clamp is not None and not log_ratio_clamp > 0:
        raise ValueError(f"log_ratio_clamp: got {log_ratio_clamp}, want a number > 0, or None")
    if divided_later(denominator, logprob.dtype):
        loss, sums = ppo_policy_loss_and_sums(
            logprob, old_logprob, advantage, clip, denominator=1.0, log_ratio_clamp=log_ratio_clamp
        )
        return divided(loss, denominator), sums
    divisor = check_denominator(denominator)
    if choose("ppo_policy_loss", logprob, old_logprob, advantage) == "reference":
        return ppo_policy_loss_reference(
            logprob, old_logprob, advantage, clip, divisor, log_ratio_clamp
        )
    divisor = float(max(logprob.numel(), 1)) if divisor is None else divisor
    limit = float("inf") if log_ratio_clamp is None else log_ratio_clamp
    tensors = [x.contiguous() for x in (logprob, old_logprob, advantage)]
    loss, sums, _ = kernel("ppo_policy_loss")(*tensors, clip, divisor, limit)
    return loss, sums


def ppo_policy_stats(sums: Tensor) -> dict[str, Tensor]:  # (7,) float64 -> 0-dim float64 each
    """Means over tokens, 0 without tokens.

    clipfrac: tokens whose clipped term was the larger; approxkl: k2 = mean(u^2) / 2 with u = log
    rho, and its other estimators approxkl_k1 = mean(-u), approxkl_k3 = mean(rho - 1 - u);
    ratio_mean and (population) ratio_var of rho.
    """
    tokens = sums[0]
    clipfrac, k1, twice_k2, k3, excess, excess_squared = (sums[1:] / tokens.clamp(min=1)).unbind()
    return {
        "clipfrac": clipfrac,
        "approxkl": twice_k2 / 2,
        "approxkl_k1": k1,
        "approxkl_k3": k3,
        "ratio_mean": torch.where(tokens > 0, 1 + excess, 0.0),
        "ratio_var": (excess_squared - excess.square()).clamp(min=0),
    }


def ppo_policy_loss(
    logprob: Tensor,  # (N,)
    old_logprob: Tensor,  # (N,)
    advantage: Tensor,  # (N,)
    clip: float = 0.2,
    *,
    denominator: Tensor | float | None = None,
    log_ratio_clamp: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # loss (), statistics of these tokens, 0-dim each
    """loss = 1/denominator sum max(-A rho, -A clip(rho, 1 - clip, 1 + clip)); statistics:
    `ppo_policy_stats`.

    `denominator` is the number of tokens, or that of the whole batch when this is a micro-batch of
    it. Differentiable once, in logprob; old_logprob and advantage are constants. Without tokens the
    loss is 0. Raises ValueError on shapes and settings that do not fit. Source: Schulman et al.
    2017, eq. 7; InstructGPT C.4 (clip 0.2).
    """
    loss, sums = ppo_policy_loss_and_sums(
        logprob,
        old_logprob,
        advantage,
        clip,
        denominator=denominator,
        log_ratio_clamp=log_ratio_clamp,
    )
    return loss, ppo_policy_stats(sums)


define(
    "ppo_policy_loss(Tensor logprob, Tensor old_logprob, Tensor advantage, float clip,"
    " float denominator, float log_ratio_clamp) -> (Tensor loss, Tensor sums, Tensor grad)",
    lambda logprob, old_logprob, advantage, clip, denominator, log_ratio_clamp: (
        logprob.new_empty(()),
        logprob.new_empty(len(SUMS), dtype=torch.float64),
        torch.empty_like(logprob),
    ),
)
register_loss("ppo_policy_loss")
