"""Metrics of one iteration's episodes, under TRL's names, over real tokens (TRL averages over padding too)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.stages.ppo.batch import Advantages, Rewards, Rollouts, Scores


def segment_sums(x: Tensor, cu: Tensor) -> Tensor:  # (E,)
    """Sum of each episode's tokens."""
    total = torch.cat([x.new_zeros(1, dtype=torch.float64), x.double().cumsum(0)])
    return total[cu[1:].long()] - total[cu[:-1].long()]


def explained_variance(value: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - value) / Var(returns); 0 where the returns do not vary."""
    variance = returns.double().var(unbiased=False)
    if float(variance) == 0.0:
        return 0.0
    return 1.0 - float((returns.double() - value.double()).var(unbiased=False) / variance)


def episode_metrics(
    rollouts: Rollouts, scores: Scores, rewards: Rewards, advantages: Advantages, kl_coef: float
) -> dict[str, float]:
    """What the episodes of this iteration were like. KL is summed over each sequence and averaged over episodes.

    `objective/scores` is what was paid, after the missing-EOS rule, as in TRL: rlhf_reward = non_score_reward + scores.
    `objective/raw_scores` is what the reward sources gave.
    """
    cu, lengths = rollouts.cu, np.array(rollouts.lengths)
    kl = segment_sums(rewards.kl, cu)
    log_ratio = segment_sums(scores.old_logprob - scores.ref_logprob, cu)
    penalty = -kl_coef * kl
    score = rewards.paid_score.double()
    out = {
        "objective/kl": float(log_ratio.mean()),
        "objective/kl_penalty": float(kl.mean()),
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(segment_sums(-scores.old_logprob, cu).mean()),
        "objective/non_score_reward": float(penalty.mean()),
        "objective/rlhf_reward": float((penalty + score).mean()),
        "objective/scores": float(score.mean()),
        "objective/scores_std": float(score.std(unbiased=False)),
        "objective/raw_scores": float(scores.score.double().mean()),
        "policy/token_entropy": float(rollouts.entropy.mean()),
        "val/num_eos_tokens": float(rollouts.ended.sum()),
        "val/eos_rate": float(rollouts.ended.float().mean()),
        "val/explained_variance": explained_variance(scores.value, advantages.returns),
        "val/value_mean": float(scores.value.mean()),
        "val/returns_mean": float(advantages.returns.mean()),
        "completions/mean_length": float(lengths.mean()),
    }
    for percent in (0, 5, 25, 50, 75, 95, 100):
        out[f"completions/length_p{percent}"] = float(np.percentile(lengths, percent))
    return out


def parity_metrics(
    rollouts: Rollouts,
    scores: Scores,
    rows: Tensor,  # (M,)
    logprob: Tensor,  # (M,)
) -> dict[str, float]:
    """The training forward before the first step (log-probs of these answer tokens) against what it should repeat:
    the old log-probs, as a ratio, and the sampler's own log-probs. Zero says: to the bit."""
    if rows.numel() == 0:
        return {}
    excess = torch.expm1((logprob - scores.old_logprob[rows]).double()).abs()
    difference = (logprob - rollouts.behaviour_logprob[rows]).abs()
    return {
        "parity/first_minibatch_ratio_deviation": float(excess.max()),
        "parity/max_abs_logprob_diff": float(difference.max()),
        "parity/mean_abs_logprob_diff": float(difference.mean()),
    }
