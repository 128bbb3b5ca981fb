"""kl_reward: two vectors in and two out forward, four in and two out backward; scores and offsets beside them."""

import torch
from torch import Tensor

from bench.gpu import Case

# A PPO batch: 512 answers of 256 tokens. The cases of the other ops on packed tokens have the same.
FULL, SMALL = {"S": 512, "T": 256}, {"S": 4, "T": 151}


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


def forward(logprob: Tensor, ref_logprob: Tensor, score: Tensor, cu: Tensor) -> object:
    from engine.kernels.triton.kl_reward import kl_reward

    return kl_reward(logprob, ref_logprob, score, cu, 0.02, 2, False)


def backward(*given: Tensor) -> object:
    from engine.kernels.triton.kl_reward import kl_reward_backward

    return kl_reward_backward(*given, 0.02, 2, False)


CASES = [
    Case(
        "kl_reward",
        "forward, k3",
        make,
        forward,
        FULL,
        SMALL,
        bytes=lambda size, S, T: size * (4 * S * T + S) + 4 * (S + 1),
        exponentials=lambda size, S, T: S * T,
    ),
    Case(
        "kl_reward",
        "backward, k3",
        make_backward,
        backward,
        FULL,
        SMALL,
        bytes=lambda size, S, T: size * (6 * S * T + S) + 4 * (S + 1),
        exponentials=lambda size, S, T: S * T,
    ),
]
