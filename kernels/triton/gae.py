"""gae on a GPU: one program an episode, which walks its tokens in blocks from the end, carrying advantage and value.

Blocks start at the episode's own end, so that neither its neighbours nor its place in the batch change a bit of the
result; a scan over all packed tokens would let both shift its blocks. Such a scan would also have to read every token
twice, or wait for another program. The price is an episode alone, which one multiprocessor walks; the bulk of a batch
is hundreds of them. The table has one row for the same reason: block sizes decide the order of the sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, config, launch
from ._scan import halves, last, previous, recurrence, wide


@triton.jit
def _forward(
    reward, value, cu, bootstrap, advantage, returns,
    gamma_high, gamma_low, decay_high, decay_low, BLOCK: tl.constexpr,
):  # fmt: skip
    """A_t = r_t + gamma V_{t+1} - V_t + decay A_{t+1}; lane i of a block is the i-th token from its end."""
    episode = tl.program_id(0)
    start = tl.load(cu + episode).to(tl.int64)
    end = tl.load(cu + episode + 1).to(tl.int64)
    gamma, decay = wide(gamma_high, gamma_low), wide(decay_high, decay_low)
    next_value = tl.load(bootstrap + episode).to(tl.float64)  # of the token behind the block
    next_advantage = tl.zeros((), tl.float64)
    for done in range(0, end - start, BLOCK):
        t = end - 1 - done - tl.arange(0, BLOCK)
        inside = t >= start
        r = tl.load(reward + t, mask=inside, other=0.0).to(tl.float64)
        v = tl.load(value + t, mask=inside, other=0.0).to(tl.float64)
        delta = r + gamma * previous(v, next_value, BLOCK) - v
        a = recurrence(inside, decay, delta, next_advantage)
        tl.store(advantage + t, a.to(advantage.dtype.element_ty), mask=inside)
        tl.store(returns + t, (a + v).to(returns.dtype.element_ty), mask=inside)
        next_value, next_advantage = last(v, BLOCK), last(a, BLOCK)


@triton.jit
def _backward(
    grad_advantage, grad_returns, cu, d_reward, d_value, d_bootstrap,
    gamma_high, gamma_low, decay_high, decay_low, BLOCK: tl.constexpr,
):  # fmt: skip
    """With g = grad_advantage + grad_returns and G_t = g_t + decay G_{t-1}, from an episode's first token on:
    d reward = G_t, d value = grad_returns_t - G_t + gamma G_{t-1}, d bootstrap = gamma G_last."""
    episode = tl.program_id(0)
    start = tl.load(cu + episode).to(tl.int64)
    end = tl.load(cu + episode + 1).to(tl.int64)
    gamma, decay = wide(gamma_high, gamma_low), wide(decay_high, decay_low)
    before = tl.zeros((), tl.float64)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        inside = t < end
        ga = tl.load(grad_advantage + t, mask=inside, other=0.0).to(tl.float64)
        gr = tl.load(grad_returns + t, mask=inside, other=0.0).to(tl.float64)
        g = recurrence(inside, decay, ga + gr, before)
        dv = gr - g + gamma * previous(g, before, BLOCK)
        tl.store(d_reward + t, g.to(d_reward.dtype.element_ty), mask=inside)
        tl.store(d_value + t, dv.to(d_value.dtype.element_ty), mask=inside)
        before = last(g, BLOCK)  # lanes behind the end pass the last one on
    tl.store(d_bootstrap + episode, (gamma * before).to(d_bootstrap.dtype.element_ty))


def gae(
    reward: Tensor,
    value: Tensor,
    cu: Tensor,
    bootstrap: Tensor,
    gamma: float,
    lam: float,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The table has one row."""
    advantage, returns, episodes = torch.empty_like(value), torch.empty_like(value), cu.numel() - 1
    launch(
        _forward, (episodes,), reward, value, cu, bootstrap, advantage, returns,
        *halves(gamma), *halves(gamma * lam),
        config=tuned or config("gae", value.numel(), value.device),
    )  # fmt: skip
    return advantage, returns


def gae_backward(
    grad_advantage: Tensor,
    grad_returns: Tensor,
    cu: Tensor,
    gamma: float,
    lam: float,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_reward, d_value = torch.empty_like(grad_advantage), torch.empty_like(grad_advantage)
    episodes = cu.numel() - 1
    d_bootstrap = grad_advantage.new_empty(episodes)
    launch(
        _backward, (episodes,), grad_advantage, grad_returns, cu, d_reward, d_value, d_bootstrap,
        *halves(gamma), *halves(gamma * lam),
        config=tuned or config("gae", grad_advantage.numel(), cu.device),
    )  # fmt: skip
    return d_reward, d_value, d_bootstrap
