"""Operations of one iteration by phase, and what padded batches would have had of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import PPOConfig
from engine.run.flops import Work, forward_flops, grouped, padded_tokens
from engine.run.memory import Sizes

PHASES = ("rollout", "reward", "score", "update")


def iteration_work(
    policy: Sizes,
    value: Sizes,
    reward_models: Sequence[Sizes],
    prompts: Sequence[int],
    answers: Sequence[Sequence[int]],
    ptx_rows: Sequence[int],
    config: PPOConfig,
) -> dict[str, Work]:
    """By phase of PHASES: answers sampled, reward models, reference and values, then the update.

    Of models of these sizes, and of prompts, their answers and pretraining rows of these lengths. A padded batch has a
    row an episode, as long as the longest prompt and the longest answer together.
    """
    lengths = [length for own in answers for length in own]
    segments, count = grouped(prompts, answers), sum(lengths)
    tokens, episodes = sum(prompts) + count, len(lengths)
    padded = episodes * (max(prompts) + max(lengths))
    law = forward_flops(policy, segments, count, policy.vocab_size)
    values = forward_flops(value, segments, count, 1)
    rewards = sum(forward_flops(sizes, segments, episodes, 1) for sizes in reward_models)
    text = ptx_rows if config.ptx_coef > 0 else []
    lm = forward_flops(policy, [(0, n) for n in text], sum(text) - len(text), policy.vocab_size)
    epochs = config.num_ppo_epochs
    return {
        "rollout": Work(law, tokens, padded),
        "reward": Work(rewards, tokens * len(reward_models), padded * len(reward_models)),
        "score": Work(law + values, 2 * tokens, 2 * padded),
        "update": Work(
            3 * (epochs * (law + values) + lm),
            2 * epochs * tokens + sum(text),
            2 * epochs * padded + padded_tokens(text),
        ),
    }
