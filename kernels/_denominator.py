"""What a loss divides its sum by."""

import math

from torch import Tensor


def check_denominator(denominator: Tensor | float | None) -> float | None:
    """A positive number, from a float or a tensor of one element; None stays None (divide by the
    op's own count).

    The global count of a batch that was cut in micro-batches makes the sum of their losses, and of
    their gradients, that of the whole batch.
    """
    if denominator is None:
        return None
    if isinstance(denominator, Tensor) and denominator.numel() != 1:
        raise ValueError(
            f"denominator: got a tensor of shape {tuple(denominator.shape)}, want one number"
        )
    value = float(denominator)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"denominator: got {value}, want the (positive) count over the whole batch;"
            " a batch without any has no loss: skip it"
        )
    return value
