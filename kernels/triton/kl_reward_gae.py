"""kl_reward and gae in one walk on a GPU: 3 numbers in and 4 out a token (why one program a segment: gae.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, config, launch
from ._scan import halves, last, previous, recurrence, wide
from .kl_reward import estimate


@triton.jit
def _forward(
    logprob, ref_logprob, score, value, cu, bootstrap, advantage, returns, reward, kl, beta,
    gamma_high, gamma_low, decay_high, decay_low, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """r_t = -beta kl_t + score [t is the last], A_t = r_t + gamma V_{t+1} - V_t + decay A_{t+1}."""
    segment = tl.program_id(0)
    start = tl.load(cu + segment).to(tl.int64)
    end = tl.load(cu + segment + 1).to(tl.int64)
    paid = tl.load(score + segment).to(tl.float32)
    gamma, decay = wide(gamma_high, gamma_low), wide(decay_high, decay_low)
    next_value = tl.load(bootstrap + segment).to(tl.float64)
    next_advantage = tl.zeros((), tl.float64)
    for done in range(0, end - start, BLOCK):
        t = end - 1 - done - tl.arange(0, BLOCK)
        inside = t >= start
        lp = tl.load(logprob + t, mask=inside, other=0.0).to(tl.float32)
        ref = tl.load(ref_logprob + t, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + t, mask=inside, other=0.0).to(tl.float64)
        k = estimate(lp - ref, ESTIMATOR)
        r = -beta * k + tl.where(t == end - 1, paid, 0.0)
        delta = r.to(tl.float64) + gamma * previous(v, next_value, BLOCK) - v
        a = recurrence(inside, decay, delta, next_advantage)
        tl.store(kl + t, k.to(kl.dtype.element_ty), mask=inside)
        tl.store(reward + t, r.to(reward.dtype.element_ty), mask=inside)
        tl.store(advantage + t, a.to(advantage.dtype.element_ty), mask=inside)
        tl.store(returns + t, (a + v).to(returns.dtype.element_ty), mask=inside)
        next_value, next_advantage = last(v, BLOCK), last(a, BLOCK)


def kl_reward_gae(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    value: Tensor,
    cu: Tensor,
    bootstrap: Tensor,
    beta: float,
    gamma: float,
    lam: float,
    estimator: int,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The table has one row."""
    advantage, returns, reward, kl = (torch.empty_like(value) for _ in range(4))
    launch(
        _forward, (cu.numel() - 1,), logprob, ref_logprob, score, value, cu, bootstrap,
        advantage, returns, reward, kl, beta, *halves(gamma), *halves(gamma * lam),
        config=tuned or config("kl_reward_gae", value.numel(), value.device), ESTIMATOR=estimator,
    )  # fmt: skip
    return advantage, returns, reward, kl
