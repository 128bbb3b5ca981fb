"""attention_decode: R rows over T keys each, all pages different. Compulsory: keys, values, q and the result, once."""

import torch
from torch import Tensor

from bench.gpu import Case, Variation
from engine.kernels.attention_decode import PAGE, page_shapes


def make(
    device: str,
    dtype: torch.dtype,
    R: int,
    T: int,
    HQ: int,
    HK: int,
    D: int,  # noqa: N803
) -> tuple[Tensor, ...]:
    width = -(-T // PAGE)
    q = torch.randn(R, HQ, D, device=device).to(dtype)
    k_pages, v_pages = (
        torch.randn(R * width, *s, device=device).to(dtype) for s in page_shapes(HK, D, dtype)
    )
    table = torch.arange(R * width, dtype=torch.int32, device=device).view(R, width)
    return q, k_pages, v_pages, table, torch.full((R,), T, dtype=torch.int32, device=device)


def make_wide(device: str, dtype: torch.dtype, **shape: int) -> tuple[Tensor, ...]:
    """float32 queries over pages of the dtype."""
    q, *others = make(device, dtype, **shape)
    return q.float(), *others


def run(*arguments: Tensor) -> object:
    from engine.kernels.triton.attention_decode import attention_decode

    return attention_decode(*arguments)


def compulsory(size: int, R: int, T: int, HQ: int, HK: int, D: int) -> float:  # noqa: N803
    return R * (size * D * 2 * (HQ + T * HK) + 4 * -(-T // PAGE) + 4)


SMALL = {"R": 2, "T": 512, "HQ": 3, "HK": 1, "D": 64}
CASES = [
    Case(
        "attention_decode",
        name,
        make,
        run,
        full,
        SMALL,
        bytes=compulsory,
        flops=lambda size, R, T, HQ, HK, D: 4 * R * T * HQ * D,
        exponentials=lambda size, R, T, HQ, HK, D: R * T * HQ,
    )
    for name, full in (
        ("135M", {"R": 64, "T": 512, "HQ": 9, "HK": 3, "D": 64}),
        ("8B", {"R": 64, "T": 2048, "HQ": 32, "HK": 8, "D": 128}),
    )
]
PHI = {"R": 64, "T": 2048, "HQ": 32, "HK": 32, "D": 80}  # Phi-2: no power of two
GEMMA = {"R": 64, "T": 2048, "HQ": 16, "HK": 8, "D": 256}
VARIATIONS = [
    Variation("attention_decode", "80 channels", make, run, PHI),
    Variation("attention_decode", "80 channels, float32 queries", make_wide, run, PHI),
    Variation("attention_decode", "256 channels", make, run, GEMMA),
    Variation("attention_decode", "256 channels, float32 queries", make_wide, run, GEMMA),
    Variation("attention_decode", "256 channels, float32", make, run, GEMMA, "float32"),
]
