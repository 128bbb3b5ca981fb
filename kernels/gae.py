"""Generalised advantage estimation over packed episodes (Schulman et al. 2016; InstructGPT C.4: no discount).

    delta_t     = reward_t + gamma * value_{t+1} - value_t
    advantage_t = delta_t + gamma * lam * advantage_{t+1}
    returns_t   = advantage_t + value_t

value_t is the value of the state *before* token t; after an episode's last token the value is `bootstrap` (0: the
episode has ended there) and the advantage is 0. Episodes of any length, none included, lie one after the other in the
N tokens. Numerics: float32 in and out, the recursion in float64 in C++ and Triton; the definition runs in the
dtype it is given.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from ._check import check_offsets, check_vector


def gae_reference(
    reward: Tensor,  # (N,)
    value: Tensor,  # (N,)
    cu: Tensor,  # (S+1,) int32, episode s is cu[s]:cu[s+1]
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,  # (S,)
) -> tuple[Tensor, Tensor]:  # advantage (N,), returns (N,)
    """The definition: the loop of the paper, one episode at a time."""
    offsets = cu.tolist()
    backwards = []
    for s in reversed(range(len(offsets) - 1)):
        next_value = value.new_zeros(()) if bootstrap is None else bootstrap[s]
        next_advantage = value.new_zeros(())
        for t in reversed(range(offsets[s], offsets[s + 1])):
            delta = reward[t] + gamma * next_value - value[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = value[t]
            backwards.append(next_advantage)
    advantage = torch.stack(backwards[::-1]) if backwards else torch.zeros_like(value)
    return advantage, advantage + value


def gae(
    reward: Tensor,  # (N,)
    value: Tensor,  # (N,)
    cu: Tensor,  # (S+1,) int32
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,  # (S,)
) -> tuple[Tensor, Tensor]:  # advantage (N,), returns (N,)
    """advantage_t = sum_k (gamma lam)^k delta_{t+k} within each episode, and returns = advantage + value.

    Differentiable in reward, value and bootstrap. Raises ValueError on shapes or offsets that do not fit.
    Source: Schulman et al. 2016, eq. 16; spec of the stage: InstructGPT C.4.
    """
    check_vector("reward", reward, value.numel(), value.dtype)
    check_offsets("cu", cu, value.numel())
    if bootstrap is not None:
        check_vector("bootstrap", bootstrap, cu.numel() - 1, value.dtype)
    if choose("gae", reward, value) == "reference":
        return gae_reference(reward, value, cu, gamma, lam, bootstrap)
    if bootstrap is None:
        bootstrap = value.new_zeros(cu.numel() - 1)
    return kernel("gae")(
        reward.contiguous(), value.contiguous(), cu.contiguous(), bootstrap.contiguous(), gamma, lam
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _reward, _value, cu, _bootstrap, ctx.gamma, ctx.lam = inputs
    ctx.save_for_backward(cu)


def _backward(ctx: Any, grad_advantage: Tensor, grad_returns: Tensor) -> tuple[Tensor | None, ...]:
    (cu,) = ctx.saved_tensors
    gradients = kernel("gae_backward")(
        grad_advantage.contiguous(), grad_returns.contiguous(), cu, ctx.gamma, ctx.lam
    )
    grad_reward, grad_value, grad_bootstrap = gradients
    return grad_reward, grad_value, None, grad_bootstrap, None, None


define(
    "gae(Tensor reward, Tensor value, Tensor cu, Tensor bootstrap, float gamma, float lam) -> (Tensor, Tensor)",
    lambda reward, value, cu, bootstrap, gamma, lam: (
        torch.empty_like(value),
        torch.empty_like(value),
    ),
)
define(
    "gae_backward(Tensor grad_advantage, Tensor grad_returns, Tensor cu, float gamma, float lam)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad_advantage, grad_returns, cu, gamma, lam: (
        torch.empty_like(grad_advantage),
        torch.empty_like(grad_advantage),
        grad_advantage.new_empty(cu.numel() - 1),
    ),
)
torch.library.register_autograd("engine::gae", _backward, setup_context=_setup_context)
