"""swiglu: N x F elements; three tensors forward, five backward."""

import torch
from torch import Tensor

from bench.gpu import Case


def make(device: str, dtype: torch.dtype, N: int, F: int) -> tuple[Tensor, Tensor]:
    gate, up = (torch.randn(N, F, device=device).to(dtype) for _ in range(2))
    return gate, up


def make_backward(device: str, dtype: torch.dtype, N: int, F: int) -> tuple[Tensor, ...]:
    return (torch.randn(N, F, device=device).to(dtype), *make(device, dtype, N, F))


def forward(gate: Tensor, up: Tensor) -> object:
    from engine.kernels.triton.swiglu import swiglu

    return swiglu(gate, up)


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> object:
    from engine.kernels.triton.swiglu import swiglu_backward

    return swiglu_backward(grad, gate, up)


FULL, SMALL = {"N": 8192, "F": 1536}, {"N": 7, "F": 1536}
CASES = [
    Case(
        "swiglu",
        "forward",
        make,
        forward,
        FULL,
        SMALL,
        bytes=lambda size, N, F: 3 * size * N * F,
        exponentials=lambda size, N, F: N * F,
    ),
    Case(
        "swiglu",
        "backward",
        make_backward,
        backward,
        FULL,
        SMALL,
        bytes=lambda size, N, F: 5 * size * N * F,
        exponentials=lambda size, N, F: N * F,
    ),
]
