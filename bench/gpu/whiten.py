"""whiten: a vector in and one out forward, two in and one out backward."""

from functools import partial

import torch
from torch import Tensor

from bench.gpu import Case, Variation
from bench.gpu.kl_reward import FULL, SMALL, UNEVEN, tokens


def make(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    return tokens(device, dtype, 1, S, T)


def make_backward(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    return tokens(device, dtype, 2, S, T)


def forward(x: Tensor, shift_mean: bool = True) -> object:
    from engine.kernels.triton.whiten import whiten

    return whiten(x, shift_mean)


def backward(grad: Tensor, x: Tensor, shift_mean: bool = True) -> object:
    from engine.kernels.triton.whiten import whiten_backward

    return whiten_backward(grad, x, shift_mean)


CASES = [
    Case(
        "whiten",
        "forward",
        make,
        forward,
        FULL,
        SMALL,
        bytes=lambda size, S, T: 2 * size * S * T,
        most_traffic=1.6,
        why="the first result needs all tokens: they are read for the statistics and again for the result",
    ),
    Case(
        "whiten",
        "backward",
        make_backward,
        backward,
        FULL,
        SMALL,
        bytes=lambda size, S, T: 3 * size * S * T,
        most_traffic=1.8,
        why="tokens and gradients are read for the statistics and again for the result",
    ),
]
VARIATIONS = [
    Variation(
        "whiten",
        f"{name}, mean kept, uneven",
        build,
        partial(run, shift_mean=False),
        UNEVEN,
        "float32",
    )
    for name, build, run in (("forward", make, forward), ("backward", make_backward, backward))
]
