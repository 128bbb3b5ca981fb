"""layernorm, alone and with the residual sum: N rows of H. The residual stream is float32, and so is what is normed."""

import torch
from torch import Tensor

from bench.gpu import Case, Variation

EPS = 1e-5
# GPT-2's width, one of 4096, and rows that no program holds in the backward
GPT2, LARGE, WIDE = {"N": 8192, "H": 768}, {"N": 8192, "H": 4096}, {"N": 2048, "H": 16384}
# one for each of the widths that the tables tell apart
MIDDLE, LARGEST = {"N": 8192, "H": 2048}, {"N": 4096, "H": 8192}
UNEVEN = {"N": 2048, "H": 8208}  # fills no block of columns
SMALL, SMALL_WIDE = {"N": 48, "H": 768}, {"N": 2, "H": 8208}
WEIGHT = "each program reads weight and bias anew, from a cache"
PARTS = (
    WEIGHT + "; partial sums of d weight and d bias are written and read, at most 256 rows of them"
)
REREAD = WEIGHT + "; wide rows are read three times, from a cache after the first"
PASSES = PARTS + "; wide rows are read three times, from a cache after the first"


def make(device: str, dtype: torch.dtype, N: int, H: int) -> tuple[Tensor, ...]:
    """x, weight, bias, out: the norm of a float32 stream into the dtype of the products."""
    weight, bias = (torch.randn(H, device=device) for _ in range(2))
    return torch.randn(N, H, device=device), weight, bias, _empty(device, dtype)


def make_backward(device: str, dtype: torch.dtype, N: int, H: int) -> tuple[Tensor, ...]:
    x, weight, *_ = make(device, dtype, N, H)
    mean, rstd = (torch.rand(N, device=device) for _ in range(2))
    return torch.randn(N, H, device=device).to(dtype), x, weight, mean, rstd


def make_residual(device: str, dtype: torch.dtype, N: int, H: int) -> tuple[Tensor, ...]:
    residual, weight, bias, _ = make(device, dtype, N, H)
    return torch.randn(N, H, device=device).to(dtype), residual, weight, bias


def make_residual_backward(device: str, dtype: torch.dtype, N: int, H: int) -> tuple[Tensor, ...]:
    grad, *others = make_backward(device, dtype, N, H)
    return grad, torch.randn(N, H, device=device), *others


def _empty(device: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, device=device, dtype=dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> object:
    from engine.kernels.triton.layernorm import layernorm

    return layernorm(x, weight, bias, EPS, out.dtype)


def forward_without_bias(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> object:
    from engine.kernels.triton.layernorm import layernorm

    return layernorm(x, weight, None, EPS, out.dtype)


def backward(*arguments: Tensor) -> object:
    from engine.kernels.triton.layernorm import layernorm_backward

    return layernorm_backward(*arguments)


def residual_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> object:
    from engine.kernels.triton.layernorm import layernorm_residual

    return layernorm_residual(x, residual, weight, bias, EPS, x.dtype)


def residual_backward(*arguments: Tensor) -> object:
    from engine.kernels.triton.layernorm import layernorm_residual_backward

    return layernorm_residual_backward(*arguments, arguments[0].dtype)


def narrow(size: int) -> int:
    """Bytes of d x where it is not d residual: in another dtype than float32."""
    return size if size < 4 else 0


def forward_case(
    name: str, full: dict[str, int], small: dict[str, int], most: float, why: str
) -> Case:
    return Case(
        "layernorm",
        f"forward{name}",
        make,
        forward,
        full,
        small,
        bytes=lambda size, N, H: (4 + size) * N * H + 8 * N + 8 * H,
        most_traffic=most,
        why=why,
    )


def backward_case(
    name: str, full: dict[str, int], small: dict[str, int], most: float, why: str
) -> Case:
    return Case(
        "layernorm",
        f"backward{name}",
        make_backward,
        backward,
        full,
        small,
        bytes=lambda size, N, H: (8 + size) * N * H + 8 * N + 12 * H,
        most_traffic=most,
        why=why,
    )


CASES = [
    forward_case("", GPT2, SMALL, 1.35, WEIGHT),
    forward_case(", H 2048", MIDDLE, SMALL, 1.35, WEIGHT),
    forward_case(", H 4096", LARGE, SMALL, 1.35, WEIGHT),
    forward_case(", H 16384", WIDE, SMALL_WIDE, 2.3, REREAD),
    backward_case("", GPT2, SMALL, 1.4, PARTS),
    backward_case(", H 2048", MIDDLE, SMALL, 1.4, PARTS),
    backward_case(", H 4096", LARGE, SMALL, 1.4, PARTS),
    backward_case(", H 8192", LARGEST, SMALL, 1.4, PARTS),
    backward_case(", H 16384", WIDE, SMALL_WIDE, 3.6, PASSES),
    Case(
        "layernorm",
        "residual, forward",
        make_residual,
        residual_forward,
        GPT2,
        SMALL,
        bytes=lambda size, N, H: (8 + 2 * size) * N * H + 8 * N + 8 * H,
        most_traffic=1.25,
        why=WEIGHT,
    ),
    Case(
        "layernorm",
        "residual, backward",
        make_residual_backward,
        residual_backward,
        GPT2,
        SMALL,
        bytes=lambda size, N, H: (12 + size + narrow(size)) * N * H + 8 * N + 12 * H,
        most_traffic=1.4,
        why=PARTS,
    ),
]
VARIATIONS = [
    Variation("layernorm", "forward without bias", make, forward_without_bias, GPT2),
    Variation(
        "layernorm", "residual, backward, H 8208", make_residual_backward, residual_backward, UNEVEN
    ),
]
