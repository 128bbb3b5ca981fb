"""Where rewards come from: reward-model folders, Python functions, or a weighted list of both.

A function has TRL's signature: `f(prompts, completions, **columns) -> list[float | None]`; None means that it does not
apply to that answer and its term is left out.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import PPOConfig, RewardSource
from engine.errors import ConfigError, EngineError
from engine.model.heads import ScalarModel
from engine.model.weights import load_scalar
from engine.run.device import to_host
from engine.run.distributed import ALONE, Ranks
from engine.stages.ppo.batch import Rollouts
from engine.stages.ppo.forward import answer_scores, micro_batches

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Reward:
    """One term: its name in the metrics, its weight, and the model or the function behind it."""

    name: str
    weight: float
    model: ScalarModel | None
    function: RewardFunction | None


def import_function(path: str) -> RewardFunction:
    """`module:function` -> the function."""
    module_name, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"reward function: got {path!r}, which cannot be imported ({error}); want module:function"
            " of a module on the Python path"
        ) from error
    if not callable(found):
        raise ConfigError(f"reward function: {path!r} is a {type(found).__name__}, want a function")
    return found  # type: ignore[no-any-return]


def load_rewards(config: PPOConfig) -> list[Reward]:
    """The terms of the reward in the config's order; models are frozen and hold the compute copy only."""
    sources = list(config.rewards)
    if config.reward_model_path:
        sources.insert(0, RewardSource(source=config.reward_model_path))
    rewards = []
    for number, source in enumerate(sources):
        is_function = ":" in source.source
        name = source.source.rpartition(":" if is_function else "/")[2] or f"reward_{number}"
        model = None
        if not is_function:
            model = load_scalar(source.source, dtype=config.dtype, device=config.device)
        function = import_function(source.source) if is_function else None
        rewards.append(Reward(name, source.weight, model, function))
    return rewards


def call_function(reward: Reward, rollouts: Rollouts) -> Tensor:  # (E,) float32, nan where None
    """The function's values, checked: one number or None for each completion."""
    assert reward.function is not None
    prompts = [rollouts.prompt_of(e) for e in range(rollouts.num_episodes)]
    names = sorted({key for prompt in prompts for key in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    values = reward.function(
        prompts=[prompt.text for prompt in prompts],
        completions=[completion.text for completion in rollouts.completions],
        **columns,
    )
    if len(values) != rollouts.num_episodes:
        raise EngineError(
            f"reward {reward.name!r}: got {len(values)} values, want {rollouts.num_episodes},"
            " one a completion; return None where the reward does not apply"
        )
    for value in values:
        if value is not None and not math.isfinite(value):
            raise EngineError(f"reward {reward.name!r}: got {value}, want finite numbers or None")
    return torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float32)


@torch.no_grad()
def model_scores(
    model: ScalarModel, rollouts: Rollouts, budget: int, ranks: Ranks = ALONE
) -> Tensor:  # (E,)
    """The reward model's score of every episode; each rank scores its own prompts."""
    score = torch.zeros(rollouts.num_episodes)
    for answers in micro_batches(rollouts, ranks.share(len(rollouts.prompts)), budget):
        score[answers.episodes] = to_host(answer_scores(model, answers))
    return ranks.sum(score)


def total_reward(
    rewards: Sequence[Reward], rollouts: Rollouts, budget: int, ranks: Ranks = ALONE
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over the terms (E,), and each term by name (nan where a function said None).

    A function is called once, by the first rank, with all episodes.

    Raises:
        EngineError: an episode to which no term applies has no reward to learn from.
    """
    total, terms = torch.zeros(rollouts.num_episodes), {}
    applies = torch.zeros(rollouts.num_episodes, dtype=torch.bool)
    for reward in rewards:
        if reward.model is not None:
            value = model_scores(reward.model, rollouts, budget, ranks)
        else:
            mine = call_function(reward, rollouts) if ranks.is_first else torch.zeros(len(total))
            value = ranks.of_first(mine)
        terms[reward.name] = value
        applies |= ~value.isnan()
        total = total + reward.weight * value.nan_to_num(nan=0.0)
    if not bool(applies.all()):
        raise EngineError(
            "rewards: every reward function returned None for an episode; add a reward that applies"
            " to all prompts, or leave such prompts out of the data"
        )
    return total, terms
