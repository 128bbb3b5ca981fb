"""Learning rates as pure functions of the step, so that a resumed run has nothing to restore.

Steps count from 0: the value for step s is the rate of the s-th optimizer step.
"""

from __future__ import annotations

import math

from engine.errors import ConfigError


def cosine_to_floor(
    step: int, total: int, peak: float, floor: float = 0.1, warmup: int = 0
) -> float:
    """Cosine decay from `peak` to `floor * peak` (InstructGPT C.1, C.2: to 10 %, no warm-up).

        lr(s) = peak (floor + (1 - floor) (1 + cos(pi s / total)) / 2),  s = 0..total

    With `warmup` > 0 (not in the paper) the first `warmup` steps rise linearly,
    lr(s) = peak (s + 1) / (warmup + 1), and the cosine runs over the rest. Past `total` the rate
    stays at the floor.
    """
    _check(step, total, peak, warmup)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * _done(step, total, warmup))) / 2)


def linear(step: int, total: int, peak: float, floor: float = 0.0, warmup: int = 0) -> float:
    """Linear decay from `peak` to `floor * peak` (Ziegler et al. 2019: to 0); `warmup` as above.

    lr(s) = peak (1 - (1 - floor) s / total),  s = 0..total
    """
    _check(step, total, peak, warmup)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 - (1 - floor) * _done(step, total, warmup))


def constant_with_warmup(
    iteration: int, peak: float, warmup: int = 10, start: float = 0.1
) -> float:
    """Constant after a linear rise over the first `warmup` *iterations* (InstructGPT C.4).

        lr(i) = peak (start + (1 - start) min(i, warmup) / warmup)

    The paper gives the start (one tenth) and the length; the linear shape is an interpretation.
    `warmup` = 0 is a constant rate.
    """
    _check(iteration, iteration + 1, peak, 0)
    if iteration >= warmup:
        return peak
    return peak * (start + (1 - start) * iteration / warmup)


def _done(step: int, total: int, warmup: int) -> float:
    """The share of the decay that lies behind, in [0, 1]."""
    return min(1.0, (step - warmup) / (total - warmup))


def _check(step: int, total: int, peak: float, warmup: int) -> None:
    if step < 0:
        raise ConfigError(f"learning rate: got step {step}, want a step >= 0")
    if total < 1:
        raise ConfigError(f"learning rate: got {total} steps in all, want at least 1")
    if not 0 <= warmup < total:
        raise ConfigError(
            f"learning rate: got {warmup} warm-up steps of {total}, want 0 <= warm-up < total"
        )
    if not (math.isfinite(peak) and peak >= 0):
        raise ConfigError(f"learning rate: got a peak of {peak}, want a finite number >= 0")
