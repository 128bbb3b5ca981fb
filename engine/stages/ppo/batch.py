"""The values that flow through one PPO iteration, in order: Rollouts, Scores, Rewards, Advantages.

    prompts -> rollout -> Rollouts -> score -> Scores -> rewards -> Rewards
            -> advantages -> Advantages -> update -> stats

Letters: E episodes of one iteration, N answer tokens of all of them, packed in episode order with offsets cu (E+1,).
Every field exists when its dataclass does; nothing is filled in later. Rollouts are of the host; the tensors of the
others lie where the models compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from engine.data.prompts import Prompt
from engine.hybrid import Completion
from engine.run.device import to_host


def offsets(lengths: Sequence[int]) -> Tensor:  # (len + 1,) int32
    """cu of segments with these lengths."""
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    cu[1:] = torch.tensor(list(lengths), dtype=torch.int64).cumsum(0)
    return cu.to(torch.int32)


@dataclass(frozen=True)
class Rollouts:
    """What the policy answered, and with which probability when it did."""

    prompts: tuple[Prompt, ...]  # E / num_samples
    completions: tuple[Completion, ...]  # E; the answers of one prompt lie together
    num_samples: int

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.prompts) * self.num_samples:
            raise ValueError(
                f"rollouts: got {len(self.completions)} completions, want {self.num_samples} to each of"
                f" {len(self.prompts)} prompts"
            )

    @property
    def num_episodes(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> list[int]:
        return [len(c.tokens) for c in self.completions]

    @property
    def cu(self) -> Tensor:  # (E+1,) int32
        return offsets(self.lengths)

    @property
    def behaviour_logprob(self) -> Tensor:  # (N,)
        """The sampler's own log-probs."""
        return torch.cat([c.logprobs for c in self.completions])

    @property
    def entropy(self) -> Tensor:  # (N,)
        """Of the distribution that each token was drawn from."""
        return torch.cat([c.entropies for c in self.completions])

    def sampled_from(self, version: int) -> bool:
        """Every answer was sampled from this version of the weights."""
        return all(c.weights_version == version for c in self.completions)

    @property
    def ended(self) -> Tensor:  # (E,) bool
        """The answer ends with an end-of-sequence token; otherwise it was cut at its limit."""
        return torch.tensor([c.finish_reason == "stop" for c in self.completions])

    @property
    def groups(self) -> list[tuple[Sequence[int], list[Sequence[int]]]]:
        """(prompt, its answers) for each prompt: one prompt segment and num_samples answer segments."""
        answers = [c.tokens for c in self.completions]
        n = self.num_samples
        return [(p.tokens, list(answers[i * n : (i + 1) * n])) for i, p in enumerate(self.prompts)]

    def prompt_of(self, episode: int) -> Prompt:
        return self.prompts[episode // self.num_samples]


@dataclass(frozen=True)
class Scores:
    """Every forward pass without gradient, and what the reward said."""

    old_logprob: Tensor  # (N,) the policy's, to the bit those of the training forward
    ref_logprob: Tensor  # (N,)
    value: Tensor  # (N,) of the state before each token
    final_value: Tensor  # (E,) of the state after the last token
    score: Tensor  # (E,) the reward before the missing-EOS rule


@dataclass(frozen=True)
class Rewards:
    """The reward of each token: KL penalty, and the score where it is paid."""

    reward: (
        Tensor  # (N,); with score_at="eos_plus_one" (N + E',): one slot more where there was room
    )
    kl: Tensor  # (N,) the estimator's value a token
    cu: Tensor  # (E+1,) int32 offsets of `reward`
    paid_score: Tensor  # (E,) the score after the missing-EOS rule


@dataclass(frozen=True)
class Advantages:
    advantage: Tensor  # (N,) whitened if asked for
    returns: Tensor  # (N,) before whitening


Passed = TypeVar("Passed", Scores, Rewards, Advantages)


def on_host(values: Passed) -> Passed:
    """With every tensor in the host's memory, where metrics are made."""
    return replace(values, **{name: to_host(x) for name, x in vars(values).items()})
