"""ppo_value_loss: three vectors in and the gradient out; the loss and its statistics are a few numbers."""

import torch
from torch import Tensor

from bench.gpu import Case, Variation
from bench.gpu.kl_reward import FULL, SMALL, UNEVEN, tokens


def make(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    return tokens(device, dtype, 3, S, T)


def forward(*given: Tensor) -> object:
    from engine.kernels.triton.ppo_value_loss import ppo_value_loss

    return ppo_value_loss(*given, 0.2, float(given[0].numel()))


CASES = [
    Case(
        "ppo_value_loss",
        "loss and gradient",
        make,
        forward,
        FULL,
        SMALL,
        bytes=lambda size, S, T: size * (4 * S * T + 1) + 8 * 2,
        dtypes=("float32", "bfloat16"),
    ),
]
VARIATIONS = [Variation("ppo_value_loss", "uneven", make, forward, UNEVEN, "float32")]
