"""Rollouts -> Scores: every forward pass without gradient. The only place that knows the reference model."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.heads import ScalarModel
from engine.model.transformer import Model
from engine.stages.ppo.batch import Rollouts, Scores
from engine.stages.ppo.forward import answer_logprobs, answer_values, micro_batches


@torch.no_grad()
def score(
    policy: Model,
    reference: Model,
    value_model: ScalarModel,
    rollouts: Rollouts,
    reward: Tensor,  # (E,) from the reward sources, or from another trainer
    temperature: float,
    budget: int,
) -> Scores:
    """Old log-probs and entropy by the policy, the reference's log-probs, and values, at every answer token."""
    cu = rollouts.cu.tolist()
    columns = torch.empty(4, cu[-1])  # old log-prob, entropy, reference log-prob, value
    final_value = torch.empty(rollouts.num_episodes)
    for answers in micro_batches(rollouts, range(len(rollouts.prompts)), budget):
        rows = torch.cat([torch.arange(cu[e], cu[e + 1]) for e in answers.episodes])
        columns[0, rows], columns[1, rows] = answer_logprobs(policy, answers, temperature)
        columns[2, rows], _ = answer_logprobs(reference, answers, temperature)
        columns[3, rows], final_value[answers.episodes] = answer_values(value_model, answers)
    old_logprob, entropy, ref_logprob, value = columns
    return Scores(old_logprob, entropy, ref_logprob, value, final_value, reward)
