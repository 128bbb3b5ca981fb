"""kl_reward: two vectors in and two out forward, four in and two out backward; scores and offsets beside them."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu import Case, Variation

# A PPO batch: 512 answers of 256 tokens. The cases of the other ops on packed tokens have the same.
FULL, SMALL = {"S": 512, "T": 256}, {"S": 4, "T": 151}
UNEVEN = {"S": 511, "T": 251}  # an odd number of tokens


def tokens(device: str, dtype: torch.dtype, count: int, S: int, T: int) -> tuple[Tensor, ...]:
    """`count` vectors of S * T numbers of a size that log-probs, advantages and values have."""
    return tuple(0.3 * torch.randn(S * T, device=device).to(dtype) for _ in range(count))


def segments(device: str, S: int, T: int) -> Tensor:  # (S+1,) int32
    return T * torch.arange(S + 1, dtype=torch.int32, device=device)


def make(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    score = torch.randn(S, device=device).to(dtype)
    return (*tokens(device, dtype, 2, S, T), score, segments(device, S, T))


def make_backward(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    return (*tokens(device, dtype, 4, S, T), segments(device, S, T))


def forward(estimator: int, after_end: bool = False) -> Callable[..., object]:
    def run(*given: Tensor) -> object:
        from engine.kernels.triton.kl_reward import kl_reward

        return kl_reward(*given, 0.02, estimator, after_end)

    return run


def backward(estimator: int, after_end: bool = False) -> Callable[..., object]:
    def run(*given: Tensor) -> object:
        from engine.kernels.triton.kl_reward import kl_reward_backward

        return kl_reward_backward(*given, 0.02, estimator, after_end)

    return run


CASES = [
    Case(
        "kl_reward",
        "forward, k3",
        make,
        forward(2),
        FULL,
        SMALL,
        bytes=lambda size, S, T: size * (4 * S * T + S) + 4 * (S + 1),
        exponentials=lambda size, S, T: S * T,
    ),
    Case(
        "kl_reward",
        "backward, k3",
        make_backward,
        backward(2),
        FULL,
        SMALL,
        bytes=lambda size, S, T: size * (6 * S * T + S) + 4 * (S + 1),
        exponentials=lambda size, S, T: S * T,
    ),
]
VARIATIONS = [
    Variation("kl_reward", f"{name}, {said}", build, run(estimator, after_end), UNEVEN, "float32")
    for said, estimator, after_end in (
        ("k1", 0, False),
        ("k2", 1, False),
        ("k3, paid after the end", 2, True),
    )
    for name, build, run in (("forward", make, forward), ("backward", make_backward, backward))
]
