"""Prompts -> Rollouts: the policy answers, with the weights that training updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import PPOConfig
from engine.data.prompts import Prompt
from engine.hybrid import Completion, HybridEngine, check_prompts
from engine.hybrid import Prompt as RawPrompt
from engine.run.distributed import ALONE, Ranks
from engine.stages.ppo.batch import Rollouts


def as_prompt(policy: HybridEngine, prompt: Prompt | RawPrompt) -> Prompt:
    """A prompt as it is; text, messages or token ids through the policy's tokenizer."""
    if isinstance(prompt, Prompt):
        return prompt
    tokens = tuple(policy.encode(prompt))
    text = prompt if isinstance(prompt, str) else policy.tokenizer.decode(list(tokens))
    return Prompt(tokens, text, None, {}, "given")


def complete(
    policy: HybridEngine,
    prompts: Sequence[Sequence[int]],
    episode_ids: Sequence[int],  # n a prompt
    n: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    ranks: Ranks,
) -> list[Completion]:
    """n answers to each prompt, made by the prompt's rank and then known to all; policy is whole on every rank."""
    own = ranks.share(len(prompts))
    made: list[Completion] = []
    if own:
        made = policy.generate(
            [list(prompts[i]) for i in own],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            n=n,
            seed=seed,
            episode_ids=[episode_ids[i * n + k] for i in own for k in range(n)],
        )
    if ranks.size == 1:
        return made
    sent = [as_vector(made[i * n : (i + 1) * n]) for i in range(len(own))]
    parts = [part for x in ranks.ragged(sent, len(prompts)) for part in from_vector(x)]
    tokens = [[int(token) for token in part[0]] for part in parts]
    texts = policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        Completion(
            prompt_tokens=tuple(prompts[e // n]),
            tokens=tuple(tokens[e]),
            logprobs=parts[e][1].float(),
            entropies=parts[e][2].float(),
            finish_reason="stop" if tokens[e][-1] in policy.eos_ids else "length",
            episode_id=episode_ids[e],
            weights_version=policy.version,
            text=texts[e],
        )
        for e in range(len(parts))
    ]


def as_vector(answers: Sequence[Completion]) -> Tensor:  # (sum of 1 + 3 T,) float64
    """The numbers of a prompt's answers, for the other ranks: T, tokens, log-probs, entropies of each."""
    parts = []
    for answer in answers:
        tokens = torch.tensor([len(answer.tokens), *answer.tokens], dtype=torch.float64)
        parts += [tokens, answer.logprobs.double(), answer.entropies.double()]
    return torch.cat(parts)


def from_vector(x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:  # each (T,) three times
    """Tokens, log-probs and entropies of each answer."""
    answers, at = [], 0
    while at < len(x):
        length = int(x[at])
        tokens, logprobs, entropies = x[at + 1 : at + 1 + 3 * length].view(3, length)
        answers.append((tokens, logprobs, entropies))
        at += 1 + 3 * length
    return answers


def rollout(
    policy: HybridEngine,
    prompts: Sequence[Prompt | RawPrompt],
    first_episode: int,
    seed: int,
    config: PPOConfig,
    ranks: Ranks = ALONE,
) -> Rollouts:
    """config.num_samples answers to each prompt, in order.

    Episode ids count from `first_episode` and address the random numbers, so that an episode is the
    same whatever else runs beside it.

    Raises:
        ConfigError: not a list, or one of them is no prompt.
    """
    check_prompts(prompts)
    chosen = tuple(as_prompt(policy, prompt) for prompt in prompts)
    count = len(chosen) * config.num_samples
    completions = complete(
        policy,
        [p.tokens for p in chosen],
        range(first_episode, first_episode + count),
        config.num_samples,
        config.response_length,
        config.temperature,
        seed,
        ranks,
    )
    return Rollouts(chosen, tuple(completions), config.num_samples)
