"""Prompts -> Rollouts: the policy answers, with the weights that training updates."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import PPOConfig
from engine.data.prompts import Prompt
from engine.hybrid import HybridEngine
from engine.stages.ppo.batch import Rollouts


def rollout(
    policy: HybridEngine,
    prompts: Sequence[Prompt],
    first_episode: int,
    seed: int,
    config: PPOConfig,
) -> Rollouts:
    """config.num_samples answers to each prompt; episode ids count from `first_episode` and address the random
    numbers, so that the same episode is the same whatever else runs beside it."""
    count = len(prompts) * config.num_samples
    completions = policy.generate(
        [list(p.tokens) for p in prompts],
        max_new_tokens=config.response_length,
        temperature=config.temperature,
        n=config.num_samples,
        seed=seed,
        episode_ids=list(range(first_episode, first_episode + count)),
    )
    return Rollouts(tuple(prompts), tuple(completions), config.num_samples)
