"""linear_sample: R rows that are drawn at once against V rows of the head, as in a decode step."""

import torch
from torch import Tensor

from bench.gpu import Case, Variation
from bench.gpu.linear_logprob import UNEVEN, exponentials, product


def make(device: str, dtype: torch.dtype, N: int, V: int, H: int) -> tuple[Tensor, ...]:
    hidden = torch.randn(N, H, device=device).to(dtype)
    weight = (torch.randn(V, H, device=device) * H**-0.5).to(dtype)
    return hidden, weight, torch.rand(N, dtype=torch.float64, device=device)


def make_biased(device: str, dtype: torch.dtype, N: int, V: int, H: int) -> tuple[Tensor, ...]:
    return *make(device, dtype, N, V, H), torch.randn(V, device=device)


def run(hidden: Tensor, weight: Tensor, uniform: Tensor, bias: Tensor | None = None) -> object:
    from engine.kernels.triton.linear_sample import linear_sample

    return linear_sample(hidden, weight, weight.new_empty(0, dtype=torch.uint8), uniform, 0.7, bias)


def compulsory(size: int, N: int, V: int, H: int) -> float:
    """Hidden states, weight and uniform numbers in; token, logprob, entropy out."""
    return size * (N * H + V * H) + 8 * N + 16 * N


CASES = [
    Case(
        "linear_sample",
        f"sample{of}",
        make,
        run,
        full,
        small,
        bytes=compulsory,
        flops=product,
        exponentials=exponentials,
        most_traffic=1.3,
        why="each row's tile of the vocabulary is loaded a second time, N BLOCK_N rows of the weight in all, and hidden"
        " states once a tile; 3 numbers a row and tile are stored and loaded twice",
    )
    for of, full, small in (
        ("", {"N": 64, "V": 49152, "H": 576}, {"N": 3, "V": 1500, "H": 576}),
        (", Llama-8B", {"N": 64, "V": 128256, "H": 4096}, {"N": 1, "V": 600, "H": 256}),
    )
]
VARIATIONS = [
    Variation("linear_sample", "sample, bias, uneven", make_biased, run, {**UNEVEN, "N": 64})
]
