"""rmsnorm, alone and with the residual sum: N rows of H. The residual stream is float32, and so is what is normed."""

import torch
from torch import Tensor

from bench.gpu import Case, Variation

EPS = 1e-5
# SmolLM2-135M, Llama-8B, and rows that no program holds in the backward
SMOL, LLAMA, WIDE = {"N": 8192, "H": 576}, {"N": 8192, "H": 4096}, {"N": 2048, "H": 16384}
# one for each of the widths that the tables tell apart
MIDDLE, LARGEST = {"N": 8192, "H": 2048}, {"N": 4096, "H": 8192}
UNEVEN = {"N": 2048, "H": 8208}  # fills no block of columns
SMALL, SMALL_WIDE = {"N": 48, "H": 576}, {"N": 2, "H": 8208}
WEIGHT = "each program reads the weight anew, from a cache"
PARTS = WEIGHT + "; partial sums of d weight are written and read, at most 256 rows of them"
REREAD = WEIGHT + "; wide rows are read twice, from a cache after the first"
PASSES = PARTS + "; wide rows are read three times, from a cache after the first"


def make(device: str, dtype: torch.dtype, N: int, H: int) -> tuple[Tensor, ...]:
    """x, weight, out: the norm of a float32 stream into the dtype of the products."""
    return torch.randn(N, H, device=device), torch.randn(H, device=device), _empty(device, dtype)


def make_backward(device: str, dtype: torch.dtype, N: int, H: int) -> tuple[Tensor, ...]:
    x, weight, _ = make(device, dtype, N, H)
    return torch.randn(N, H, device=device).to(dtype), x, weight, torch.rand(N, device=device)


def make_residual(device: str, dtype: torch.dtype, N: int, H: int) -> tuple[Tensor, ...]:
    residual, weight, _ = make(device, dtype, N, H)
    return torch.randn(N, H, device=device).to(dtype), residual, weight


def make_residual_backward(device: str, dtype: torch.dtype, N: int, H: int) -> tuple[Tensor, ...]:
    grad, total, weight, rstd = make_backward(device, dtype, N, H)
    return grad, torch.randn(N, H, device=device), total, weight, rstd


def _empty(device: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, device=device, dtype=dtype)


def forward(x: Tensor, weight: Tensor, out: Tensor) -> object:
    from engine.kernels.triton.rmsnorm import rmsnorm

    return rmsnorm(x, weight, EPS, out.dtype)


def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> object:
    from engine.kernels.triton.rmsnorm import rmsnorm_backward

    return rmsnorm_backward(grad, x, weight, rstd)


def residual_forward(x: Tensor, residual: Tensor, weight: Tensor) -> object:
    from engine.kernels.triton.rmsnorm import rmsnorm_residual

    return rmsnorm_residual(x, residual, weight, EPS, x.dtype)


def residual_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> object:
    from engine.kernels.triton.rmsnorm import rmsnorm_residual_backward

    return rmsnorm_residual_backward(grad, grad_total, total, weight, rstd, grad.dtype)


def narrow(size: int) -> int:
    """Bytes of d x where it is not d residual: in another dtype than float32."""
    return size if size < 4 else 0


def forward_case(
    name: str, full: dict[str, int], small: dict[str, int], most: float, why: str
) -> Case:
    return Case(
        "rmsnorm",
        f"forward{name}",
        make,
        forward,
        full,
        small,
        bytes=lambda size, N, H: (4 + size) * N * H + 4 * N + 4 * H,
        most_traffic=most,
        why=why,
    )


def backward_case(
    name: str, full: dict[str, int], small: dict[str, int], most: float, why: str
) -> Case:
    return Case(
        "rmsnorm",
        f"backward{name}",
        make_backward,
        backward,
        full,
        small,
        bytes=lambda size, N, H: (8 + size) * N * H + 4 * N + 8 * H,
        most_traffic=most,
        why=why,
    )


CASES = [
    forward_case("", SMOL, SMALL, 1.25, WEIGHT),
    forward_case(", H 2048", MIDDLE, SMALL, 1.25, WEIGHT),
    forward_case(", H 4096", LLAMA, SMALL, 1.25, WEIGHT),
    forward_case(", H 16384", WIDE, SMALL_WIDE, 1.8, REREAD),
    backward_case("", SMOL, SMALL, 1.4, PARTS),
    backward_case(", H 2048", MIDDLE, SMALL, 1.4, PARTS),
    backward_case(", H 4096", LLAMA, SMALL, 1.4, PARTS),
    backward_case(", H 8192", LARGEST, SMALL, 1.4, PARTS),
    backward_case(", H 16384", WIDE, SMALL_WIDE, 3.6, PASSES),
    Case(
        "rmsnorm",
        "residual, forward",
        make_residual,
        residual_forward,
        SMOL,
        SMALL,
        bytes=lambda size, N, H: (8 + 2 * size) * N * H + 4 * N + 4 * H,
        most_traffic=1.25,
        why=WEIGHT,
    ),
    Case(
        "rmsnorm",
        "residual, backward",
        make_residual_backward,
        residual_backward,
        SMOL,
        SMALL,
        bytes=lambda size, N, H: (12 + size + narrow(size)) * N * H + 4 * N + 8 * H,
        most_traffic=1.4,
        why=PARTS,
    ),
]
VARIATIONS = [
    Variation("rmsnorm", "residual, forward, H 4096", make_residual, residual_forward, LLAMA),
    Variation(
        "rmsnorm", "residual, backward, H 8208", make_residual_backward, residual_backward, UNEVEN
    ),
]
