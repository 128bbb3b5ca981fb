"""gelu: N x C elements, of the feed-forward layer of GPT-2 (4 x 768); two tensors forward, three backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu import Case


def make(device: str, dtype: torch.dtype, N: int, C: int) -> tuple[Tensor]:
    return (torch.randn(N, C, device=device).to(dtype),)


def make_backward(device: str, dtype: torch.dtype, N: int, C: int) -> tuple[Tensor, ...]:
    return (torch.randn(N, C, device=device).to(dtype), *make(device, dtype, N, C))


def forward(tanh: bool) -> Callable[[Tensor], object]:
    def run(x: Tensor) -> object:
        from engine.kernels.triton.gelu import gelu

        return gelu(x, tanh)

    return run


def backward(tanh: bool) -> Callable[[Tensor, Tensor], object]:
    def run(grad: Tensor, x: Tensor) -> object:
        from engine.kernels.triton.gelu import gelu_backward

        return gelu_backward(grad, x, tanh)

    return run


FULL, SMALL = {"N": 8192, "C": 3072}, {"N": 7, "C": 3072}
CASES = [
    case
    for tanh, name in ((False, ""), (True, ", tanh"))
    for case in (
        Case(
            "gelu",
            f"forward{name}",
            make,
            forward(tanh),
            FULL,
            SMALL,
            bytes=lambda size, N, C: 2 * size * N * C,
            exponentials=lambda size, N, C: N * C,
        ),
        Case(
            "gelu",
            f"backward{name}",
            make_backward,
            backward(tanh),
            FULL,
            SMALL,
            bytes=lambda size, N, C: 3 * size * N * C,
            exponentials=lambda size, N, C: N * C,
        ),
    )
]
