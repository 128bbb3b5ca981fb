"""Operations of one iteration by phase, and what padded batches would have had of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import PPOConfig
from engine.model.heads import ScalarModel
from engine.model.transformer import Model
from engine.run.flops import Work, forward_flops, grouped, padded_tokens
from engine.stages.ppo.batch import Rollouts

PHASES = ("rollout", "reward", "score", "update")


def iteration_work(
    policy: Model,
    value: ScalarModel,
    reward_models: Sequence[ScalarModel],
    rollouts: Rollouts,
    ptx_rows: Sequence[Sequence[int]],
    config: PPOConfig,
) -> dict[str, Work]:
    """By phase of PHASES: answers sampled, reward models, reference and values, then the update.

    A padded batch has a row an episode, as long as the longest prompt and the longest answer together.
    """
    prompts = [len(p.tokens) for p in rollouts.prompts]
    answers = [[len(a) for a in own] for _, own in rollouts.groups]
    segments, count = grouped(prompts, answers), sum(rollouts.lengths)
    tokens, episodes = sum(prompts) + count, rollouts.num_episodes
    padded = episodes * (max(prompts) + max(rollouts.lengths))
    a, vocabulary = policy.architecture, policy.architecture.vocab_size
    law = forward_flops(a, segments, count, vocabulary)
    values = forward_flops(value.architecture, segments, count, 1)
    rewards = sum(forward_flops(m.architecture, segments, episodes, 1) for m in reward_models)
    text = [len(row) for row in ptx_rows] if config.ptx_coef > 0 else []
    lm = forward_flops(a, [(0, n) for n in text], sum(text) - len(text), vocabulary)
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
