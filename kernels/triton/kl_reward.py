"""kl_reward on a GPU: one pass over the tokens, then the segments' ends, whose scores and slots overwrite a few."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import load_block, store_block
from ._expm1 import expm1, expm1_minus
from ._launch import Config, cdiv, config, launch


@triton.jit
def estimate(d, ESTIMATOR: tl.constexpr):
    """k1, k2, k3 of d = logprob - ref_logprob: d, d^2 / 2, e^-d - 1 + d."""
    if ESTIMATOR == 0:
        return d
    elif ESTIMATOR == 1:
        return d * d * 0.5
    else:
        return expm1_minus(-d)


@triton.jit
def _slope(d, ESTIMATOR: tl.constexpr):
    """Its derivative: 1, d, 1 - e^-d."""
    if ESTIMATOR == 0:
        return tl.zeros_like(d) + 1.0
    elif ESTIMATOR == 1:
        return d
    else:
        return -expm1(-d)


@triton.jit
def _forward(
    logprob, ref_logprob, reward, kl, n, beta, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lp = load_block(logprob, first, n, BLOCK).to(tl.float32)
    ref = load_block(ref_logprob, first, n, BLOCK).to(tl.float32)
    k = estimate(lp - ref, ESTIMATOR)
    store_block(kl, first, n, k, BLOCK)
    store_block(reward, first, n, -beta * k, BLOCK)


@triton.jit
def _ends(
    logprob, ref_logprob, score, cu, reward, kl, segments, beta,
    ESTIMATOR: tl.constexpr, AFTER_END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rewards of the paid slots, from the log-probs: added to a stored reward they would be rounded twice."""
    segment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = segment < segments
    start = tl.load(cu + segment, mask=inside, other=0)
    end = tl.load(cu + segment + 1, mask=inside, other=0)
    paid = inside & (end > start)
    paid_score = tl.load(score + segment, mask=paid, other=0.0).to(tl.float32)
    last = end.to(tl.int64) - 1
    if AFTER_END:  # the slot is no token
        r = paid_score
        tl.store(kl + last, tl.zeros_like(r).to(kl.dtype.element_ty), mask=paid)
    else:
        lp = tl.load(logprob + last, mask=paid, other=0.0).to(tl.float32)
        ref = tl.load(ref_logprob + last, mask=paid, other=0.0).to(tl.float32)
        r = -beta * estimate(lp - ref, ESTIMATOR) + paid_score
    tl.store(reward + last, r.to(reward.dtype.element_ty), mask=paid)


@triton.jit
def _backward(
    grad_reward, grad_kl, logprob, ref_logprob, d_logprob, d_ref_logprob, n, beta,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d logprob = (grad_kl - beta grad_reward) dk/dd = -d ref_logprob."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    gr = load_block(grad_reward, first, n, BLOCK).to(tl.float32)
    gk = load_block(grad_kl, first, n, BLOCK).to(tl.float32)
    lp = load_block(logprob, first, n, BLOCK).to(tl.float32)
    ref = load_block(ref_logprob, first, n, BLOCK).to(tl.float32)
    d = (gk - beta * gr) * _slope(lp - ref, ESTIMATOR)
    store_block(d_logprob, first, n, d, BLOCK)
    store_block(d_ref_logprob, first, n, -d, BLOCK)


@triton.jit
def _backward_ends(
    grad_reward, cu, d_logprob, d_ref_logprob, d_score, segments,
    AFTER_END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = segment < segments
    start = tl.load(cu + segment, mask=inside, other=0)
    end = tl.load(cu + segment + 1, mask=inside, other=0)
    paid = inside & (end > start)
    last = end.to(tl.int64) - 1
    gr = tl.load(grad_reward + last, mask=paid, other=0.0).to(tl.float32)
    tl.store(d_score + segment, gr.to(d_score.dtype.element_ty), mask=inside)
    if AFTER_END:
        zero = tl.zeros_like(gr).to(d_logprob.dtype.element_ty)
        tl.store(d_logprob + last, zero, mask=paid)
        tl.store(d_ref_logprob + last, zero, mask=paid)


def kl_reward(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    cu: Tensor,
    beta: float,
    estimator: int,
    after_end: bool,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Size of the table: the number of tokens."""
    reward, kl = torch.empty_like(logprob), torch.empty_like(logprob)
    n, segments = logprob.numel(), cu.numel() - 1
    tuned = tuned or config("kl_reward", n, logprob.device)
    block = tuned.blocks["BLOCK"]
    tokens = (logprob, ref_logprob, reward, kl, n, beta)
    launch(_forward, (cdiv(n, block),), *tokens, config=tuned, ESTIMATOR=estimator)
    if n:
        launch(
            _ends, (cdiv(segments, block),), logprob, ref_logprob, score, cu, reward, kl, segments, beta,
            config=tuned, ESTIMATOR=estimator, AFTER_END=after_end,
        )  # fmt: skip
    return reward, kl


def kl_reward_backward(
    grad_reward: Tensor,
    grad_kl: Tensor,
    logprob: Tensor,
    ref_logprob: Tensor,
    cu: Tensor,
    beta: float,
    estimator: int,
    after_end: bool,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_logprob, d_ref_logprob = torch.empty_like(logprob), torch.empty_like(logprob)
    n, segments = logprob.numel(), cu.numel() - 1
    d_score = logprob.new_empty(segments)
    tuned = tuned or config("kl_reward", n, logprob.device)
    block = tuned.blocks["BLOCK"]
    tokens = (grad_reward, grad_kl, logprob, ref_logprob, d_logprob, d_ref_logprob, n, beta)
    launch(_backward, (cdiv(n, block),), *tokens, config=tuned, ESTIMATOR=estimator)
    ends = (grad_reward, cu, d_logprob, d_ref_logprob, d_score, segments)
    launch(_backward_ends, (cdiv(segments, block),), *ends, config=tuned, AFTER_END=after_end)
    return d_logprob, d_ref_logprob, d_score
