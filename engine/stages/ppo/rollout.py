"""Prompts -> Rollouts: the policy answers, with the weights that training updates."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import PPOConfig
from engine.data.prompts import Prompt
from engine.hybrid import HybridEngine
from engine.hybrid import Prompt as RawPrompt
from engine.stages.ppo.batch import Rollouts


def as_prompt(policy: HybridEngine, prompt: Prompt | RawPrompt) -> Prompt:
    """A prompt as it is; text, messages or token ids through the policy's tokenizer."""
    if isinstance(prompt, Prompt):
        return prompt
    tokens = tuple(policy.encode(prompt))
    text = prompt if isinstance(prompt, str) else policy.tokenizer.decode(list(tokens))
    return Prompt(tokens, text, None, {}, "given")


def rollout(
    policy: HybridEngine,
    prompts: Sequence[Prompt | RawPrompt],
    first_episode: int,
    seed: int,
    config: PPOConfig,
) -> Rollouts:
    """config.num_samples answers to each prompt, in order.

    Episode ids count from `first_episode` and address the random numbers, so that an episode is the
    same whatever else runs beside it.
    """
    chosen = tuple(as_prompt(policy, prompt) for prompt in prompts)
    count = len(chosen) * config.num_samples
    completions = policy.generate(
        [list(p.tokens) for p in chosen],
        max_new_tokens=config.response_length,
        temperature=config.temperature,
        n=config.num_samples,
        seed=seed,
        episode_ids=list(range(first_episode, first_episode + count)),
    )
    return Rollouts(chosen, tuple(completions), config.num_samples)
