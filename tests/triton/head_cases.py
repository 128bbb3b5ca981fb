"""Blocks and inputs of the head's Triton tests (linear_logprob, linear_sample)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from launching import DEVICE
from torch import Tensor

from engine.kernels.triton import _launch


@contextmanager
def blocks(
    m: int = 16, n: int = 16, k: int = 16, slab: int = 32, gradients: int = 1, piece: int = 3, many: int = 1,
    r: int = 16, t: int = 2,
) -> Iterator[None]:  # fmt: skip
    """Inside, the head's tables hold these blocks: small ones, so that every loop goes round and has a tail."""
    original = _launch.table

    def table(op: str) -> dict[str, list[dict[str, Any]]]:
        if not op.startswith("linear_logprob"):
            return original(op)
        tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
        if op.startswith("linear_logprob_backward"):
            tile |= {"SLAB": slab, "GRADIENTS": gradients}
        elif op != "linear_logprob_merge":
            tile |= {"PIECE": piece, "MANY": many}
        if op == "linear_logprob_merge":
            tile = {"BLOCK_R": r, "BLOCK_T": t}
        row = {"up_to": None, **tile, "num_warps": 4, "num_stages": 1}
        return {name: [row] for name in (*_launch.NVIDIA, *_launch.AMD)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "table", table)
        yield


def exact(*shape: int) -> Tensor:
    """Random eighths from -2 to 2: sums of their products have no rounding, so that no order of summing shows.

    The interpreter's product of a row depends on the row's place; on a GPU it does not, and any numbers will do.
    """
    if DEVICE.type == "cuda":
        return torch.randn(shape, device=DEVICE)
    return torch.randint(-16, 17, shape) / 8


def head(
    n: int, v: int, h: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), bias (V,)."""
    hidden, weight, bias = torch.randn(n, h), torch.randn(v, h) * 3 * h**-0.5, torch.randn(v)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE)
