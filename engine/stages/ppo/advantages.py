"""Rewards and values -> advantages: GAE over each answer, whitened over all tokens of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import ops
from engine.config import PPOConfig
from engine.stages.ppo.batch import Advantages, Rewards
from engine.stages.ppo.rewards import with_extra_slot


def estimate(
    rewards: Rewards,
    value: Tensor,  # (N,)
    final_value: Tensor,  # (E,)
    ended: Tensor,  # (E,) bool
    cu: Tensor,  # (E+1,) int32
    config: PPOConfig,
) -> Advantages:
    """A_t = sum_k (gamma lam)^k delta_{t+k}; returns = A + V, taken before whitening.

    An answer that was cut ends there (the paper's episodes do), or goes on with the value of its last state
    (`bootstrap_truncated`).
    """
    bootstrap = torch.where(ended, 0.0, final_value) if config.bootstrap_truncated else None
    if config.score_at == "eos":
        advantage, returns = ops.gae(rewards.reward, value, cu, config.gamma, config.lam, bootstrap)
    else:
        slots = with_extra_slot(cu, config.response_length)
        wide = value.new_zeros(slots.total).index_copy(0, slots.rows, value)
        wide = wide.index_copy(0, slots.slots, final_value[slots.with_slot])
        advantage, returns = ops.gae(
            rewards.reward, wide, slots.cu, config.gamma, config.lam, bootstrap
        )
        advantage, returns = advantage[slots.rows], returns[slots.rows]
    if config.whiten_advantages:
        advantage = ops.whiten(advantage)
    return Advantages(advantage, returns)
