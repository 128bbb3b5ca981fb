"""Rollouts -> Scores: every forward pass without gradient. The only place that knows the reference model."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.hybrid import is_list
from engine.model.heads import ScalarModel
from engine.model.transformer import Model, whole
from engine.run.device import to_device
from engine.run.distributed import ALONE, Ranks
from engine.stages.ppo.batch import Rollouts, Scores
from engine.stages.ppo.forward import all_values, answer_logprobs, micro_batches

LARGEST = torch.finfo(torch.float32).max


def checked_scores(given: object, count: int) -> Tensor:  # (count,) float32
    """The score of each of `count` episodes, as a list, array or tensor has it.

    Raises:
        ConfigError: it has another shape, or one is no number that is finite in float32.
    """
    wanted = (
        f"want {count} finite numbers, one an episode of the rollouts, in their order; what makes the scores must give"
        " one for every episode"
    )
    if isinstance(given, Tensor | np.ndarray) and given.shape != (count,):
        raise ConfigError(f"scores: got the shape {tuple(given.shape)}, {wanted}")
    values: Any = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if not is_list(values):
        raise ConfigError(f"scores: got {repr(values)[:40]}, {wanted}")
    if len(values) != count:
        raise ConfigError(f"scores: got {len(values)} of them, {wanted}")
    numbers: list[Any] = [v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for v in values]
    for episode, number in enumerate(numbers):
        if not isinstance(number, Real) or not -LARGEST <= number <= LARGEST:  # type: ignore[operator]  # nan too
            raise ConfigError(f"scores: got {repr(number)[:40]} for episode {episode}, {wanted}")
    return torch.tensor([float(number) for number in numbers])


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
