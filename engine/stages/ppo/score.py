"""Rollouts -> Scores: every forward pass without gradient. The only place that knows the reference model."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.heads import ScalarModel
from engine.model.transformer import Model
from engine.run.device import to_device
from engine.stages.ppo.batch import Rollouts, Scores
from engine.stages.ppo.forward import all_values, answer_logprobs, micro_batches


@torch.no_grad()
def score(
    policy: Model,
    reference: Model,
    value_model: ScalarModel,
    rollouts: Rollouts,
    reward: Tensor,  # (E,) on the policy's device, from the reward sources, or from another trainer
    temperature: float,
    budget: int,
) -> Scores:
    """Old log-probs by the policy, the reference's log-probs, and values, at every answer token.

    The old log-probs are the sampler's own where they are the training forward's to the bit: the policy is
    batch-invariant and its weights are still those that sampled. Elsewhere the policy scores its answers again.
    """
    cu, device = rollouts.cu.tolist(), policy.device
    rescore = not (policy.batch_invariant and rollouts.sampled_from(policy.version))
    old_logprob = to_device(rollouts.behaviour_logprob.clone(), device)
    ref_logprob, value = (torch.empty(cu[-1], device=device) for _ in range(2))
    final_value = torch.empty(rollouts.num_episodes, device=device)
    for answers in micro_batches(rollouts, range(len(rollouts.prompts)), budget):
        rows = torch.cat([torch.arange(cu[e], cu[e + 1]) for e in answers.episodes])
        rows, episodes = (to_device(x, device) for x in (rows, torch.tensor(answers.episodes)))
        if rescore:
            old_logprob[rows], _ = answer_logprobs(policy, answers, temperature)
        ref_logprob[rows], _ = answer_logprobs(reference, answers, temperature)
        value[rows], final_value[episodes] = all_values(value_model, answers)
    return Scores(old_logprob, ref_logprob, value, final_value, reward)
