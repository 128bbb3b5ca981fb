"""gae: two vectors in and two out, forward and backward; a number and an offset an episode beside them."""

import torch
from torch import Tensor

from bench.gpu import Case
from bench.gpu.kl_reward import FULL, SMALL, segments, tokens


def make(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    bootstrap = torch.randn(S, device=device).to(dtype)
    return (*tokens(device, dtype, 2, S, T), segments(device, S, T), bootstrap)


def make_backward(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    return (*tokens(device, dtype, 2, S, T), segments(device, S, T))


def forward(*given: Tensor) -> object:
    from engine.kernels.triton.gae import gae

    return gae(*given, 0.99, 0.95)


def backward(*given: Tensor) -> object:
    from engine.kernels.triton.gae import gae_backward

    return gae_backward(*given, 0.99, 0.95)


def compulsory(size: int, S: int, T: int) -> float:
    return size * (4 * S * T + S) + 4 * (S + 1)


LONG = {"S": 1, "T": 100_000}
CASES = [
    Case("gae", "forward", make, forward, FULL, SMALL, bytes=compulsory),
    Case("gae", "forward, one episode", make, forward, LONG, {"S": 1, "T": 600}, bytes=compulsory),
    Case("gae", "backward", make_backward, backward, FULL, SMALL, bytes=compulsory),
]
