"""Scores -> per-token rewards (InstructGPT 3.5, C.4): a KL penalty at each token and the score at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import ops
from engine.config import PPOConfig
from engine.run.device import to_device, to_host
from engine.stages.ppo.batch import Rewards, offsets


def paid_score(score: Tensor, ended: Tensor, penalty: float, mode: str) -> Tensor:  # (E,)
    """The missing-EOS rule: an answer that was cut loses `penalty`, or is given minus `penalty` instead."""
    missed = -penalty if mode == "replace" else score - penalty
    return torch.where(ended, score, missed)


def token_rewards(
    old_logprob: Tensor,  # (N,)
    ref_logprob: Tensor,  # (N,)
    score: Tensor,  # (E,)
    ended: Tensor,  # (E,) bool
    cu: Tensor,  # (E+1,) int32
    kl_coef: float,
    config: PPOConfig,
) -> Rewards:
    """reward_t = -kl_coef * kl_t, plus the paid score at the answer's last token.

    With score_at="eos_plus_one" an answer shorter than response_length has one slot more, without KL, where its
    score is paid (as TRL does).
    """
    paid = paid_score(score, ended, config.missing_eos_penalty, config.missing_eos_mode)
    if config.score_at == "eos":
        reward, kl = ops.kl_reward(
            old_logprob, ref_logprob, paid, cu, kl_coef, estimator=config.kl_estimator
        )
        return Rewards(reward, kl, cu, paid)
    slots = with_extra_slot(cu, config.response_length)
    zero = old_logprob.new_zeros(slots.total)
    reward, kl = ops.kl_reward(
        zero.index_copy(0, slots.rows, old_logprob),
        zero.index_copy(0, slots.rows, ref_logprob),
        paid,
        slots.cu,
        kl_coef,
        estimator=config.kl_estimator,
    )
    return Rewards(reward, kl[slots.rows], slots.cu, paid)


class with_extra_slot:
    """Offsets in which every answer shorter than `limit` has one slot more, and where its tokens lie in them: made on
    the host, for the device of `cu`."""

    def __init__(self, cu: Tensor, limit: int) -> None:
        device, cu = cu.device, to_host(cu)
        lengths = cu.long().diff()
        has_slot = lengths < limit  # (E,)
        wide = offsets((lengths + has_slot).tolist())  # (E+1,) int32
        shift = torch.repeat_interleave(wide[:-1].long() - cu[:-1].long(), lengths)
        self.total = int(wide[-1])
        self.cu = to_device(wide, device)
        self.rows = to_device(torch.arange(int(cu[-1])) + shift, device)  # (N,)
        self.with_slot = to_device(has_slot.nonzero().squeeze(1), device)  # (E',) the answers
        self.slots = to_device((wide[1:].long() - 1)[has_slot], device)  # (E',) their extra slots


def whiten_rewards(rewards: Rewards) -> Rewards:
    """Variance 1 over the tokens of the batch, mean kept [Ziegler et al. 2019]."""
    scaled = ops.whiten(rewards.reward, shift_mean=False)
    return Rewards(scaled, rewards.kl, rewards.cu, rewards.paid_score)
