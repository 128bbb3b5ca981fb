"""adamw: n elements of one tensor; the step reads and writes master and both moments, reads a float32 gradient and
writes the copy in the case's dtype, and reads and writes the average where there is one; the norm reads a gradient."""

import torch
from torch import Tensor

from bench.gpu import Case, Variation
from engine.kernels.adamw import SQUARES

NUMBERS = (1e-5, 0.9, 0.95, 1e-5, 0.0, 0.1, 0.2236)  # lr ... bias_correction2_sqrt


def make(device: str, dtype: torch.dtype, n: int, ema: int) -> tuple[Tensor | None, ...]:
    master, grad, exp_avg, exp_avg_sq, average = (torch.rand(n, device=device) for _ in range(5))
    clip = torch.ones((), device=device)
    copy = master.to(dtype, copy=True)
    return master, grad, exp_avg, exp_avg_sq, copy, average if ema else None, clip


def step(*tensors: Tensor) -> object:
    from engine.kernels.triton.adamw import adamw_step

    return adamw_step(*tensors[:6], *NUMBERS, 1.0, tensors[6], 0.992)


def plain_step(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> object:
    from engine.kernels.triton.adamw import adamw_step

    return adamw_step(master, grad, exp_avg, exp_avg_sq, None, None, *NUMBERS, 1.0, None, 0.0)


def make_gradient(device: str, dtype: torch.dtype, n: int) -> tuple[Tensor]:
    return (torch.randn(n, device=device).to(dtype),)


def squares(grad: Tensor) -> object:
    from engine.kernels.triton.adamw import square_sums

    return square_sums(grad)


def norm(grad: Tensor) -> object:
    from engine.kernels.triton.adamw import ordered_sum, square_sums

    return ordered_sum(square_sums(grad))


SMOLLM2, LLAMA = 49152 * 576, 128256 * 4096  # an embedding each
CASES = [
    Case(
        "adamw",
        name,
        make,
        step,
        {"n": n, "ema": ema},
        {"n": 20_000, "ema": ema},
        bytes=lambda size, n, ema: (28 + size + 8 * ema) * n,
    )
    for name, n, ema in (
        ("step", SMOLLM2, 0),
        ("step, average", SMOLLM2, 1),
        ("step, Llama-8B", LLAMA, 0),
    )
] + [
    Case(
        "adamw",
        name,
        make_gradient,
        norm,
        {"n": n},
        {"n": 100_000},
        bytes=lambda size, n: size * n + 16 * -(-n // SQUARES) + 8,
    )
    for name, n in (("norm", SMOLLM2), ("norm, Llama-8B", LLAMA))
]
VARIATIONS = [
    Variation(
        "adamw",
        "step without a copy or a clip on the device, uneven",
        lambda device, dtype, n: make(device, dtype, n, 0)[:4],
        plain_step,
        {"n": SMOLLM2 - 1},
    ),
    Variation("adamw", "squares, uneven", make_gradient, squares, {"n": SMOLLM2 - 1}),
]
