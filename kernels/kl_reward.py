"""Per-token rewards: a KL penalty on every token, the score of the answer at its end (InstructGPT).

    d_t      = logprob_t - ref_logprob_t
    k1 = d,   k2 = d^2 / 2,   k3 = e^-d - 1 + d        (Schulman's estimators of KL(pi || ref))
    reward_t = -beta * kl_t + score_s * [t is the last slot of segment s]

With k1 the rewards of an answer sum to score - beta * log(pi / ref), the objective of Eq. 2; k2 and
k3 are never negative. k3 near 0 is a series: e^-d - 1 + d would lose every digit there. Large |d|
is not clamped: k3 overflows to inf below d = -88 in float32.

Where the score is paid (`score_at`):

- "eos": a segment is the tokens of an answer; its last, the end-of-sequence token, is paid.
- "eos_plus_one" (TRL's placement): a segment is the tokens of an answer *and one slot after them*,
  which is paid. The slot stands for no token: its KL is 0 and its log-probs are not read, whatever
  they hold. TRL lays answers in rows of a fixed width T and pays an answer that fills its row at
  its last token; a packed segment has no width. A batch that mixes such answers with shorter ones
  is an "eos" call, with equal log-probs in the slots that the shorter ones have.

A segment without slots gets nothing, whatever its score.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from ._check import check_offsets, check_vector
from ._loss import refuse_second_gradient

ESTIMATORS = ("k1", "k2", "k3")
SCORE_AT = ("eos", "eos_plus_one")


def kl_estimate(difference: Tensor, estimator: str) -> Tensor:
    """k1, k2 or k3 of d = logprob - ref_logprob, any shape and floating dtype."""
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    # e^x - 1 - x at x = -d: the series to x^12 is exact to float64 below 0.1. It sees only values
    # near 0: where it is not used its overflow would turn the gradient into nan.
    x = -difference
    near = x.abs() < 0.1
    small = torch.where(near, x, 0.0)
    tail = torch.ones_like(x)
    for k in range(12, 2, -1):
        tail = 1 + small / k * tail
    return torch.where(near, small.square() / 2 * tail, torch.expm1(x) - x)


def kl_reward_reference(
    logprob: Tensor,  # (N,)
    ref_logprob: Tensor,  # (N,)
    score: Tensor,  # (S,)
    cu: Tensor,  # (S+1,) int32, segment s is cu[s]:cu[s+1]
    beta: float,
    estimator: str = "k1",
    score_at: str = "eos",
) -> tuple[Tensor, Tensor]:  # reward (N,), kl (N,)
    """The definition."""
    ends = cu[1:].long()
    paid = ends > cu[:-1]  # (S,) empty segments have no slot to be paid at
    last = ends[paid] - 1
    difference = logprob - ref_logprob
    if score_at == "eos_plus_one":
        difference = difference.index_fill(0, last, 0.0)
    kl = kl_estimate(difference, estimator)
    return (-beta * kl).index_add(0, last, score[paid]), kl


def kl_reward(
    logprob: Tensor,  # (N,)
    ref_logprob: Tensor,  # (N,)
    score: Tensor,  # (S,)
    cu: Tensor,  # (S+1,) int32
    beta: float,
    estimator: str = "k1",
    score_at: str = "eos",
) -> tuple[Tensor, Tensor]:  # reward (N,), kl (N,)
    """reward_t = -beta * kl_t, plus the score of the segment at its last slot; kl in nats.

    Differentiable (once) in logprob, ref_logprob and score; PPO's rewards are constants: a trainer
    passes detached log-probs. Raises ValueError on shapes, offsets and names that do not fit.
    Source: InstructGPT Eq. 2; estimators: Schulman, "Approximating KL divergence" (2020).
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: got {estimator!r}, want one of {', '.join(ESTIMATORS)}")
    if score_at not in SCORE_AT:
        raise ValueError(f"score_at: got {score_at!r}, want one of {', '.join(SCORE_AT)}")
    check_offsets("cu", cu, logprob.numel())
    check_vector("logprob", logprob, logprob.numel(), logprob.dtype)
    check_vector("ref_logprob", ref_logprob, logprob.numel(), logprob.dtype)
    check_vector("score", score, cu.numel() - 1, logprob.dtype)
    if choose("kl_reward", logprob, ref_logprob, score) == "reference":
        return kl_reward_reference(logprob, ref_logprob, score, cu, beta, estimator, score_at)
    tensors = [x.contiguous() for x in (logprob, ref_logprob, score, cu)]
    kind, after_end = ESTIMATORS.index(estimator), score_at == "eos_plus_one"
    return kernel("kl_reward")(*tensors, beta, kind, after_end)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logprob, ref_logprob, _score, cu, ctx.beta, ctx.estimator, ctx.after_end = inputs
    ctx.save_for_backward(logprob, ref_logprob, cu)


def _backward(ctx: Any, grad_reward: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_gradient("kl_reward")
    logprob, ref_logprob, cu = ctx.saved_tensors
    grad_logprob, grad_ref_logprob, grad_score = kernel("kl_reward_backward")(
        grad_reward.contiguous(),
        grad_kl.contiguous(),
        logprob,
        ref_logprob,
        cu,
        ctx.beta,
        ctx.estimator,
        ctx.after_end,
    )
    return grad_logprob, grad_ref_logprob, grad_score, None, None, None, None


define(
    "kl_reward(Tensor logprob, Tensor ref_logprob, Tensor score, Tensor cu, float beta,"
    " int estimator, bool after_end) -> (Tensor, Tensor)",
    lambda logprob, ref_logprob, score, cu, beta, estimator, after_end: (
        torch.empty_like(logprob),
        torch.empty_like(logprob),
    ),
)
define(
    "kl_reward_backward(Tensor grad_reward, Tensor grad_kl, Tensor logprob, Tensor ref_logprob,"
    " Tensor cu, float beta, int estimator, bool after_end) -> (Tensor, Tensor, Tensor)",
    lambda grad_reward, grad_kl, logprob, ref_logprob, cu, beta, estimator, after_end: (
        torch.empty_like(logprob),
        torch.empty_like(logprob),
        logprob.new_empty(cu.numel() - 1),
    ),
)
torch.library.register_autograd("engine::kl_reward", _backward, setup_context=_setup_context)
