"""Rewards and values -> advantages: GAE over each answer, whitened over all tokens of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import ops
from engine.config import PPOConfig
from engine.kernels.kl_reward_gae import kl_reward_gae
from engine.stages.ppo.batch import Advantages, Rewards, Scores
from engine.stages.ppo.rewards import paid_score, token_rewards, whiten_rewards, with_extra_slot


def rewards_and_advantages(
    scores: Scores,
    ended: Tensor,  # (E,) bool
    cu: Tensor,  # (E+1,) int32
    kl_coef: float,
    config: PPOConfig,
) -> tuple[Rewards, Advantages]:
    """`token_rewards`, `whiten_rewards` if asked for, and `estimate`.

    Where each reward is its advantage's alone, one op does all of it: on a GPU in one walk over the tokens, on the CPU
    by the same two kernels, to the bit. Whitened rewards need the whole batch's first, and with
    score_at="eos_plus_one" rewards have slots that log-probs do not have.
    """
    if config.whiten_rewards or config.score_at != "eos":
        rewards = token_rewards(
            scores.old_logprob, scores.ref_logprob, scores.score, ended, cu, kl_coef, config
        )
        if config.whiten_rewards:
            rewards = whiten_rewards(rewards)
        return rewards, estimate(rewards, scores.value, scores.final_value, ended, cu, config)
    paid = paid_score(scores.score, ended, config.missing_eos_penalty, config.missing_eos_mode)
    advantage, returns, reward, kl = kl_reward_gae(
        scores.old_logprob,
        scores.ref_logprob,
        paid,
        scores.value,
        cu,
        kl_coef,
        config.gamma,
        config.lam,
        cut_values(scores.final_value, ended, config),
        config.kl_estimator,
    )
    return Rewards(reward, kl, cu, paid), whitened(advantage, returns, config)


def cut_values(final_value: Tensor, ended: Tensor, config: PPOConfig) -> Tensor | None:  # (E,)
    """The value behind an answer's last token, where GAE is to go on with it: that of an answer that was cut."""
    return torch.where(ended, 0.0, final_value) if config.bootstrap_truncated else None


def whitened(advantage: Tensor, returns: Tensor, config: PPOConfig) -> Advantages:
    return Advantages(ops.whiten(advantage) if config.whiten_advantages else advantage, returns)


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
    bootstrap = cut_values(final_value, ended, config)
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
    return whitened(advantage, returns, config)
