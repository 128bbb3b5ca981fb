"""linear's exact kernel: M rows, N columns, depth K. (Without `exact_products()` the products are the library's.)

x is read once a column of tiles and the weight once a row of tiles; caches serve what neighbours share.
"""

import torch
from torch import Tensor

from bench.gpu import Case, Variation


def make(device: str, dtype: torch.dtype, M: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    x, weight = (torch.randn(n, K, device=device).to(dtype) for n in (M, N))
    return x, weight


def forward(x: Tensor, weight: Tensor) -> object:
    from engine.kernels.triton.linear import exact_product

    return exact_product(x, weight, None, x.dtype)


def make_biased(device: str, dtype: torch.dtype, M: int, N: int, K: int) -> tuple[Tensor, ...]:
    return *make(device, dtype, M, N, K), torch.randn(N, device=device)


def biased(x: Tensor, weight: Tensor, bias: Tensor) -> object:
    """Into the residual stream, which is float32."""
    from engine.kernels.triton.linear import exact_product

    return exact_product(x, weight, bias, torch.float32)


SMALL = {"M": 64, "N": 192, "K": 96}  # one row of tiles, three columns
SIZES = {
    "exact": {"M": 8192, "N": 1536, "K": 576},
    "exact, decode": {"M": 64, "N": 49152, "K": 576},
    "exact, Llama-8B": {"M": 2048, "N": 14336, "K": 4096},
}
CASES = [
    Case(
        "linear",
        name,
        make,
        forward,
        full,
        SMALL,
        bytes=lambda size, M, N, K: size * (M * K + N * K + M * N),
        flops=lambda size, M, N, K: 2 * M * N * K,
        most_traffic=1.35,
        why="x is read once a column of tiles: three times on the small shape, (3 M K + N K + M N) / (M K + N K + M N)",
    )
    for name, full in SIZES.items()
]
VARIATIONS = [
    Variation("linear", "exact, bias", make_biased, biased, {"M": 8192, "N": 768, "K": 3072}),
    Variation("linear", "exact, uneven depth", make, forward, {"M": 8192, "N": 1536, "K": 1000}),
    Variation("linear", "exact, odd depth", make, forward, {"M": 8192, "N": 1536, "K": 1001}, "float32"),
]
