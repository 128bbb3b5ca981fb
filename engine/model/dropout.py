"""Residual dropout whose masks are addressed, so that cutting a batch otherwise changes nothing.

    out = x * keep / (1 - p)        keep[row, channel] = uniform >= p
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.run.device import to_device


@dataclass(frozen=True)
class Dropout:
    """Residual dropout, on the output of each sub-layer: kept entries are divided by 1 - p.

    ``segments`` are (address, number of rows) of the batch's segments, in order. The mask is a
    function of (seed, step, layer, sub-layer, address, row of the segment, channel) alone: not of
    how a step's sequences were cut into micro-batches, nor of what else drew random numbers.
    """

    p: float
    seed: int
    step: int
    segments: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not 0.0 <= self.p < 1.0:
            raise ModelError(f"dropout: got p = {self.p}, want 0 <= p < 1")

    def __call__(
        self, x: Tensor, layer: int, sublayer: int, rows: Tensor | None = None
    ) -> Tensor:  # (N, H) -> (N, H); with rows (M,) of the batch's N: (M, H) -> (M, H)
        if self.p == 0.0:
            return x
        uniform = torch.cat(
            [
                self._uniform(layer, sublayer, address, count, x.shape[1])
                for address, count in self.segments
            ]
        )
        if rows is not None:
            uniform = uniform.index_select(0, rows.to(uniform.device))
        if len(uniform) != len(x):
            raise ModelError(f"dropout: segments of {len(uniform)} rows, the batch has {len(x)}")
        keep = to_device(uniform >= self.p, x.device)
        dropped: Tensor = _Drop.apply(x, keep, 1.0 - self.p)  # type: ignore[no-untyped-call]
        return dropped

    def _uniform(self, layer: int, sublayer: int, address: int, rows: int, width: int) -> Tensor:
        words = struct.pack("<5q", self.seed, self.step, layer, sublayer, address)
        key = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
        generator = torch.Generator().manual_seed(key & (2**63 - 1))
        return torch.rand(rows, width, generator=generator)  # (rows, width)


class _Drop(torch.autograd.Function):
    """Saves the mask as one byte an entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.share = share
        return x * (keep / share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return grads[0] * (keep / ctx.share), None, None
