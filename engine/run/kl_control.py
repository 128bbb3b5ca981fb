"""The KL coefficient beta of the per-token reward: fixed, or steered towards a target KL.

Controllers are frozen values: an iteration's KL goes in, the next iteration's controller comes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from engine.errors import ConfigError

LARGEST_ERROR = 0.2  # what an iteration's relative error is clipped to


@dataclass(frozen=True)
class FixedKL:
    """A constant coefficient (InstructGPT C.4: 0.02)."""

    beta: float

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def after(self, kl: float, episodes: int) -> FixedKL:
        """The controller for the next iteration: this one, whatever the KL was."""
        _check_measurement(kl, episodes)
        return self


@dataclass(frozen=True)
class AdaptiveKL:
    """The adaptive coefficient of Ziegler et al. 2019 (section 2.2).

        error = clip(KL / target - 1, -0.2, 0.2)
        beta <- beta (1 + error n / horizon)

    `target` is in nats a sequence, `horizon` in episodes.
    """

    beta: float
    target: float = 6.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        for name, value in (("target", self.target), ("horizon", self.horizon)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"adaptive KL: got {name} {value}, want a finite number > 0")

    def after(self, kl: float, episodes: int) -> AdaptiveKL:
        """The controller for the next iteration.

        `kl` is the batch mean of the KL summed over each sequence (nats), `episodes` the number of
        sequences of the batch. Raises `ConfigError` for a KL that is not finite, and for a batch so large
        against the horizon that beta could become 0 or negative.
        """
        _check_measurement(kl, episodes)
        if LARGEST_ERROR * episodes >= self.horizon:
            raise ConfigError(
                f"adaptive KL: got {episodes} episodes at once with a horizon of {self.horizon:g}, want a horizon above"
                f" {LARGEST_ERROR * episodes:g}; raise kl_horizon, or give fewer episodes"
            )
        error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        return replace(self, beta=self.beta * (1 + error * episodes / self.horizon))


KLController = FixedKL | AdaptiveKL


def _check_beta(beta: float) -> None:
    if not (math.isfinite(beta) and beta >= 0):
        raise ConfigError(f"KL coefficient: got {beta}, want a finite number >= 0")


def _check_measurement(kl: float, episodes: int) -> None:
    if not math.isfinite(kl) or episodes < 0:
        raise ConfigError(
            f"KL controller: got a KL of {kl} over {episodes} episodes, want a finite KL and a "
            "count >= 0; a KL that is not finite means that a log-prob is not"
        )
