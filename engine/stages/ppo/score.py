"""Rollouts -> Scores: every forward pass without gradient. The only place that knows the reference model."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.heads import ScalarModel
from engine.model.transformer import Model, whole
from engine.run.device import to_device
from engine.run.distributed import ALONE, Ranks
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
    ranks: Ranks = ALONE,
) -> Scores:
    """Old log-probs by the policy, the reference's log-probs, and values, at every answer token.

    The old log-probs are the sampler's own where they are the training forward's to the bit: the policy is
    batch-invariant and its weights are still those that sampled. Elsewhere the policy scores its answers again. Each
    rank scores its own prompts; then all know all.
    """
    cu, device = rollouts.cu.tolist(), policy.device
    rescore = not (policy.batch_invariant and rollouts.sampled_from(policy.version))
    scorer, value_model = (whole(policy) if rescore else policy), whole(value_model)
    scored, ref_logprob, value = (torch.zeros(cu[-1], device=device) for _ in range(3))
    final_value = torch.zeros(rollouts.num_episodes, device=device)
    for answers in micro_batches(rollouts, ranks.share(len(rollouts.prompts)), budget):
        rows = torch.cat([torch.arange(cu[e], cu[e + 1]) for e in answers.episodes])
        rows, episodes = (to_device(x, device) for x in (rows, torch.tensor(answers.episodes)))
        if rescore:
            scored[rows], _ = answer_logprobs(scorer, answers, temperature)
        ref_logprob[rows], _ = answer_logprobs(reference, answers, temperature)
        value[rows], final_value[episodes] = all_values(value_model, answers)
    sampled = to_device(rollouts.behaviour_logprob.clone(), device)
    old_logprob = ranks.sum(scored) if rescore else sampled
    return Scores(
        old_logprob, ranks.sum(ref_logprob), ranks.sum(value), ranks.sum(final_value), reward
    )
