"""The law: how logits become the distribution of the next token, for samples and for log-probs.

    z = logits / temperature                                   (R, V)
    kept = the top_k largest z, then, from the largest down, the fewest whose mass is >= top_p
    p_j  = exp(z_j) / sum_{i in kept} exp(z_i)  for j in kept, else 0

Without filters ``kept`` is the whole vocabulary: this is the only law that training can score,
since ``linear_logprob`` computes log softmax(logits / temperature) and nothing else; the ops
``linear_sample`` and ``linear_logprob`` then are the law, with no tensor (R, V) in between. Filters
are for generation alone, and run on the (R, V) logits of one decode step. ``greedy`` puts all mass
on the first largest logit.

A token is drawn by the inverse CDF in vocabulary order: the first j with p_0 + ... + p_j > u, for u
in [0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``top_k``, ``top_p`` None: no filter. Checked when made.

    Raises:
        ConfigError: a value outside its range, with the value.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: got {self.max_new_tokens}; give at least 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"temperature: got {self.temperature}; give a finite number above 0, "
                "or greedy=True for the largest logit"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: got {self.top_k}; give at least 1, or None for no filter")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p: got {self.top_p}; give 0 < top_p <= 1, or None for no filter"
            )

    @property
    def filters(self) -> bool:
        """Whether the law differs from softmax(logits / temperature)."""
        return self.greedy or self.top_k is not None or self.top_p not in (None, 1.0)


def check_ppo_law(settings: Sampling) -> None:
    """PPO needs samples of the law that its update scores: softmax(logits / temperature), whole
    vocabulary.

    Raises:
        ConfigError: the settings filter the law.
    """
    if not settings.filters:
        return
    wrong = [f"top_k={settings.top_k}"] if settings.top_k is not None else []
    wrong += [f"top_p={settings.top_p}"] if settings.top_p not in (None, 1.0) else []
    wrong += ["greedy=True"] if settings.greedy else []
    raise ConfigError(
        f"PPO cannot use {', '.join(wrong)}: the update scores tokens under the whole "
        "softmax(logits / temperature), so samples of a filtered law make the ratio differ from 1 "
        "before any step, and the gradient wrong; remove the filter (temperature is applied on "
        "both sides and may stay)"
    )


def filtered_law(logits: Tensor, settings: Sampling) -> Tensor:  # (R, V) -> (R, V) float64
    """log p of the law above, -inf outside of ``kept``; float64, each row a function of that row
    alone.

    Equal logits at the ``top_k`` border are kept by the lower token id, so exactly min(top_k, V)
    tokens stay.
    """
    z = logits.double() / settings.temperature
    if settings.greedy:
        best = z.argmax(dim=-1, keepdim=True)
        return torch.full_like(z, -math.inf).scatter_(-1, best, 0.0)
    z, order = z.sort(dim=-1, descending=True, stable=True)
    if settings.top_k is not None:
        z[:, settings.top_k :] = -math.inf
    if settings.top_p not in (None, 1.0):
        mass = z.softmax(dim=-1)
        before = mass.cumsum(dim=-1) - mass  # of the tokens ahead: 0 for the first, so it stays
        z = z.masked_fill(before >= settings.top_p, -math.inf)
    law = torch.empty_like(z).scatter_(-1, order, z)
    return law.log_softmax(dim=-1)


def draw(law: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse CDF of ``law`` (R, V) log-probs at ``uniform`` (R,) float64 in [0, 1).

    Returns token (R,) int64, its log-prob (R,) and the entropy of the law (R,), both float32. A
    token of mass 0 is never returned: rounding may leave the sum below u, then the last token that
    has mass is.
    """
    mass = law.exp()
    cdf = mass.cumsum(dim=-1)
    token = torch.searchsorted(cdf, uniform[:, None], right=True).squeeze(-1)
    positive = (mass > 0).long()
    last = mass.shape[-1] - 1 - positive.flip(-1).argmax(dim=-1)
    token = torch.minimum(token, last)
    logprob = law.gather(-1, token[:, None]).squeeze(-1)
    entropy = -torch.where(mass > 0, mass * law, 0.0).sum(dim=-1)
    return token, logprob.float(), entropy.float()
