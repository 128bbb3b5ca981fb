"""rope of N tokens, alone and with the write of keys and values to their pages: SmolLM2-135M and Llama-8B."""

import torch
from torch import Tensor

from bench.gpu import Case, Variation

PAGE = 16
SMOL = {"N": 8192, "heads": 9, "key_heads": 3, "D": 64}
LLAMA = {"N": 8192, "heads": 32, "key_heads": 8, "D": 128}
DECODE = {"N": 64, "heads": 32, "key_heads": 8, "D": 128}
SMALL = {"N": 40, "heads": 9, "key_heads": 3, "D": 64}


def make(
    device: str, dtype: torch.dtype, N: int, heads: int, key_heads: int, D: int
) -> tuple[Tensor, ...]:
    """x, positions, table: every token has another position."""
    x = torch.randn(N, heads, D, device=device).to(dtype)
    return x, torch.arange(N, device=device), torch.randn(N, D, device=device)


def make_write(
    device: str, dtype: torch.dtype, N: int, heads: int, key_heads: int, D: int
) -> tuple[Tensor, ...]:
    q, positions, table = make(device, dtype, N, heads, key_heads, D)
    k, v = (torch.randn(N, key_heads, D, device=device).to(dtype) for _ in range(2))
    pages, w = -(-N // PAGE), max(1, 4 // dtype.itemsize)
    k_pages = torch.zeros(pages, key_heads, D // w, PAGE, w, dtype=dtype, device=device)
    v_pages = torch.zeros(pages, key_heads, PAGE // w, D, w, dtype=dtype, device=device)
    return q, k, v, positions, table, k_pages, v_pages, torch.arange(N, device=device)


def make_part(device: str, dtype: torch.dtype, ROT: int, **shape: int) -> tuple[Tensor, ...]:
    """Where ROT channels of each head are rotated."""
    x, positions, table = make(device, dtype, **shape)
    return x, positions, table[:, :ROT].contiguous()


def make_part_write(device: str, dtype: torch.dtype, ROT: int, **shape: int) -> tuple[Tensor, ...]:
    q, k, v, positions, table, *pages = make_write(device, dtype, **shape)
    return q, k, v, positions, table[:, :ROT].contiguous(), *pages


def rotate(x: Tensor, positions: Tensor, table: Tensor) -> object:
    from engine.kernels.triton.rope import rope

    return rope(x, positions, table, False)


def rotate_back(x: Tensor, positions: Tensor, table: Tensor) -> object:
    from engine.kernels.triton.rope import rope

    return rope(x, positions, table, True)


def rotate_and_write(*arguments: Tensor) -> object:
    from engine.kernels.triton.rope import rope_and_write

    return rope_and_write(*arguments)


def rotate_bytes(size: int, N: int, heads: int, key_heads: int, D: int) -> int:
    return N * (2 * size * heads * D + 4 * D + 8)


def write_bytes(size: int, N: int, heads: int, key_heads: int, D: int) -> int:
    return N * (2 * size * (heads + 2 * key_heads) * D + 4 * D + 16)


CASES = [
    Case("rope", f"D {full['D']}", make, rotate, full, SMALL, bytes=rotate_bytes)
    for full in (SMOL, LLAMA)
] + [
    Case("rope", name, make_write, rotate_and_write, full, SMALL, bytes=write_bytes)
    for name, full in (
        ("and write, D 64", SMOL),
        ("and write, D 128", LLAMA),
        ("and write, D 128, 64 rows", DECODE),
    )
]
NEOX = {"N": 8192, "heads": 64, "key_heads": 64, "D": 96, "ROT": 24}  # GPT-NeoX-20B
VARIATIONS = [
    Variation("rope", "backward, D 128", make, rotate_back, LLAMA),
    Variation("rope", "24 of 96 channels", make_part, rotate, NEOX),
    Variation("rope", "and write, 24 of 96 channels", make_part_write, rotate_and_write, NEOX),
]
