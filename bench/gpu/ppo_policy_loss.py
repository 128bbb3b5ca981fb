"""ppo_policy_loss: three vectors in and the gradient out; the loss and its statistics are a few numbers."""

import torch
from torch import Tensor

from bench.gpu import Case, Variation
from bench.gpu.kl_reward import FULL, SMALL, UNEVEN, tokens


def make(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    return tokens(device, dtype, 3, S, T)


def forward(*given: Tensor) -> object:
    from engine.kernels.triton.ppo_policy_loss import ppo_policy_loss

    return ppo_policy_loss(*given, 0.2, float(given[0].numel()), 20.0)


CASES = [
    Case(
        "ppo_policy_loss",
        "loss and gradient",
        make,
        forward,
        FULL,
        SMALL,
        bytes=lambda size, S, T: size * (4 * S * T + 1) + 8 * 7,
        exponentials=lambda size, S, T: 3 * S * T,
        dtypes=("float32", "bfloat16"),
    ),
]
VARIATIONS = [Variation("ppo_policy_loss", "uneven", make, forward, UNEVEN, "float32")]
