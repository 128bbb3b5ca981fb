"""Padded rows and packed tokens: the border between other people's tensors and this engine's.

A padded tensor is (B, T, ...) with a mask (B, T) of its real tokens: on the right, on the left, or
anywhere. Packed, the real tokens lie one after the other, row by row, and row b is cu[b]:cu[b+1].
Rows without a token are empty segments.
"""

import torch
from torch import Tensor

from ._check import check_offsets


def _as_bool(mask: Tensor) -> Tensor:  # (B, T)
    if mask.dim() != 2:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, want (B, T)")
    if mask.dtype == torch.bool:
        return mask
    real = mask == 1
    if not (real | (mask == 0)).all():
        at = (~real & (mask != 0)).nonzero()[0].tolist()
        raise ValueError(f"mask{at}: got {mask[tuple(at)].item()}, want 0 or 1")
    return real


def _lengths_to_offsets(lengths: Tensor) -> Tensor:  # (B,) -> (B+1,) int32
    start = lengths.new_zeros(1, dtype=torch.int32)
    return torch.cat([start, lengths.cumsum(0, dtype=torch.int32)])


def pack(
    padded: Tensor,  # (B, T, ...)
    mask: Tensor,  # (B, T) bool, or 0 and 1
) -> tuple[Tensor, Tensor]:  # packed (N, ...), cu (B+1,) int32
    """The tokens under the mask, row by row. Any dtype; differentiable.

    Raises ValueError on a mask of another shape than padded's first two dimensions, or with values
    besides 0 and 1.
    """
    real = _as_bool(mask)
    if padded.shape[:2] != mask.shape:
        want = f"({mask.shape[0]}, {mask.shape[1]}, ...)"
        raise ValueError(f"padded: got shape {tuple(padded.shape)}, want {want}")
    return padded[real], _lengths_to_offsets(real.sum(1))


def unpack(
    packed: Tensor,  # (N, ...)
    cu: Tensor,  # (B+1,) int32
    mask: Tensor | None = None,  # (B, T) bool, or 0 and 1
    fill: float = 0.0,
) -> Tensor:  # (B, T, ...)
    """The inverse of `pack`, with `fill` where the mask is 0. Without a mask rows start at the
    left, and T is the longest.

    Any dtype; differentiable. Raises ValueError on a mask whose rows do not hold as many tokens as
    the segments.
    """
    check_offsets("cu", cu, packed.shape[0])
    lengths = cu.diff().long()
    if mask is None:
        width = int(lengths.max()) if lengths.numel() else 0
        mask = torch.arange(width, device=cu.device) < lengths[:, None]
    real = _as_bool(mask)
    held = real.sum(1)
    if held.shape != lengths.shape or not torch.equal(held, lengths):
        raise ValueError(
            f"mask: got rows of {held.tolist()[:16]} tokens, want those of cu,"
            f" {lengths.tolist()[:16]}"
        )
    rows, columns = real.nonzero(as_tuple=True)
    padded = packed.new_full((*real.shape, *packed.shape[1:]), fill)
    return padded.index_put((rows, columns), packed)
