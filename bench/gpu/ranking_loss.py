"""ranking_loss: S prompts of K answers; a score and a rank (float64) in and a gradient out an answer."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu import Case, Variation
from bench.gpu.kl_reward import segments


def make(device: str, dtype: torch.dtype, S: int, K: int) -> tuple[Tensor, ...]:
    score = torch.randn(S * K, device=device).to(dtype)
    rank = torch.arange(S * K, device=device).remainder(K).double()
    return score, rank, segments(device, S, K)


def forward(reduction: int) -> Callable[..., object]:
    def run(score: Tensor, rank: Tensor, cu: Tensor) -> object:
        from engine.kernels.triton.ranking_loss import ranking_loss

        return ranking_loss(score, rank, cu, reduction, None)

    return run


FULL = {"S": 64, "K": 9}
CASES = [
    Case(
        "ranking_loss",
        "loss and gradient",
        make,
        forward(0),
        FULL,
        {"S": 5, "K": 9},
        bytes=lambda size, S, K: S * K * (2 * size + 8) + 4 * (S + 1) + size + 16,
        exponentials=lambda size, S, K: S * K * K,
        dtypes=("float32", "bfloat16"),
        most_traffic=4.0,
        why="a few KB in all: a tile's rows and columns are read apart, and the gradient, whose divisor is known only"
        " after all prompts, lies in memory in between",
    ),
]
VARIATIONS = [
    Variation("ranking_loss", name, make, forward(reduction), FULL, dtype="float32")
    for name, reduction in (("mean over all pairs of a prompt", 1), ("mean over pairs", 2))
]
