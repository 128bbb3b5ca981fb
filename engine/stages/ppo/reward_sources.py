"""Where rewards come from: reward-model folders, Python functions, or a weighted list of both.

A function has TRL's signature: `f(prompts, completions, **columns) -> list[float | None]`; None means that it does not
apply to that answer and its term is left out. Prompts and completions are text, also of talks, where TRL hands over
lists of messages; the talk is the column `messages`, a list of messages an episode (None for a row without one).
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import PPOConfig, RewardSource
from engine.data.prompts import Prompt, reward_columns
from engine.errors import ConfigError, EngineError
from engine.model.heads import ScalarModel
from engine.model.weights import load_scalar
from engine.run.device import to_host
from engine.run.distributed import ALONE, Ranks
from engine.run.time_limit import TimeLimitError, time_limit
from engine.stages.ppo.batch import Rollouts
from engine.stages.ppo.forward import answer_scores, micro_batches

RewardFunction = Callable[..., Sequence[float | None]]
LARGEST = 3.4028234663852886e38  # of float32


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
    for name, source in zip(term_names(sources), sources, strict=True):
        is_function = ":" in source.source
        model = None
        if not is_function:
            model = load_scalar(source.source, dtype=config.dtype, device=config.device)
        function = import_function(source.source) if is_function else None
        rewards.append(Reward(name, source.weight, model, function))
    return rewards


def term_names(sources: Sequence[RewardSource]) -> list[str]:
    """The last part of each source; where one repeats, the later ones are numbered: `reward`, `reward_2`."""
    short = [
        source.source.rpartition(":")[2] if ":" in source.source else Path(source.source).name or "reward"
        for source in sources
    ]
    names: list[str] = []
    for name in short:
        distinct, number = name, 1
        while distinct in names or (number > 1 and distinct in short):
            number += 1
            distinct = f"{name}_{number}"
        names.append(distinct)
    return names


def call_function(
    who: str,
    function: RewardFunction,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    timeout: float | None = None,
) -> Tensor:  # (E,) float64, nan for None
    """The function's values for completion e of prompts[e], checked; `who` names it in messages.

    Raises:
        EngineError: it raised, took longer than `timeout` seconds, or gave something else.
    """
    try:
        with time_limit(timeout):
            values = function(
                prompts=[prompt.text for prompt in prompts],
                completions=list(completions),
                **reward_columns(prompts),
            )
    except TimeLimitError as error:
        raise EngineError(
            f"{who}: no answer within {timeout:g} s for {len(completions)} completions; make the"
            " function faster or give it longer (--reward_timeout_s)"
        ) from error
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise EngineError(
            f"{who}: raised {type(error).__name__}: {error} (line {at.lineno} of {at.filename})"
        ) from error
    return checked(who, values, len(completions))


def called_by_first(
    reward: Reward, rollouts: Rollouts, timeout: float | None, ranks: Ranks
) -> Tensor:  # (E,)
    """`call_function` in the first process; what it gives, or its error, comes to all; float32."""
    function = reward.function
    assert function is not None
    prompts = [rollouts.prompt_of(e) for e in range(rollouts.num_episodes)]
    texts = [completion.text for completion in rollouts.completions]
    values = ranks.by_first(
        lambda: call_function(f"reward {reward.name!r}", function, prompts, texts, timeout).tolist()
    )
    return torch.tensor(values, dtype=torch.float32)


def checked(who: str, values: object, count: int) -> Tensor:  # (count,) float64
    """What a function gave, as numbers with nan for None.

    Raises:
        EngineError: it is not one number that is finite in float32 or None for each of `count` completions.
    """
    wanted = f"want a list of {count} numbers or None, one a completion; None where the reward does not apply"
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise EngineError(f"{who}: got {type(values).__name__}, {wanted}")
    if len(values) != count:
        raise EngineError(f"{who}: got {len(values)} values, {wanted}")
    numbers = []
    for number, given in enumerate(values):
        value = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
        if value is None:
            numbers.append(math.nan)
            continue
        if not isinstance(value, Real) or not abs(float(value)) <= LARGEST:  # false for nan too
            raise EngineError(f"{who}: value {number} is {str(given)[:40]!r}, {wanted}, all finite")
        numbers.append(float(value))
    return torch.tensor(numbers, dtype=torch.float64)


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
    rewards: Sequence[Reward],
    rollouts: Rollouts,
    budget: int,
    timeout: float | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over the terms (E,), and each term by name (nan where a function said None).

    A function is called once, by the first rank, with all episodes.

    Raises:
        EngineError: an episode to which no term applies has no reward to learn from; a term that is not a finite
            number; a function that fails.
    """
    total, terms = torch.zeros(rollouts.num_episodes), {}
    applies = torch.zeros(rollouts.num_episodes, dtype=torch.bool)
    for reward in rewards:
        if reward.model is not None:
            value = model_scores(reward.model, rollouts, budget, ranks)
            if not bool(value.isfinite().all()):
                raise EngineError(
                    f"reward {reward.name!r}: the model scores {int((~value.isfinite()).sum())} of {len(value)} answers"
                    " with a number that is not finite; train it again, or give another one"
                )
        else:
            value = called_by_first(reward, rollouts, timeout, ranks)
        terms[reward.name] = value
        applies |= ~value.isnan()
        total = total + reward.weight * value.nan_to_num(nan=0.0)
    if not bool(applies.all()):
        raise EngineError(
            "rewards: every reward function returned None for an episode; add a reward that applies"
            " to all prompts, or leave such prompts out of the data"
        )
    return total, terms
