"""Rotary position embedding over the first `rot` of D channels (Su et al. 2021, eq. 34; halves as in GPT-NeoX).

    y_i         = x_i         cos_i - x_{i+rot/2} sin_i
    y_{i+rot/2} = x_{i+rot/2} cos_i + x_i         sin_i        i < rot/2; channels from rot on pass unchanged

`table[p]` holds cos in its first half and sin in its second, for position p. The arithmetic is float32 with one
rounding into the dtype of x. The backward is the rotation by the negative angle.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define


def rope_reference(
    x: Tensor,  # (N, heads, D)
    positions: Tensor,  # (N,) int64
    table: Tensor,  # (P, rot): cos, then sin
) -> Tensor:  # (N, heads, D)
    """The definition, in at least the dtype of the table."""
    half = table.shape[1] // 2
    cos, sin = table[positions][:, None].tensor_split([half], dim=-1)
    wide = x.to(torch.promote_types(x.dtype, table.dtype))
    a, b, rest = wide.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def rope(
    x: Tensor,  # (N, heads, D)
    positions: Tensor,  # (N,) int64, below P
    table: Tensor,  # (P, rot) float32: cos, then sin
) -> Tensor:  # (N, heads, D), dtype of x
    """Rotates channels i and i + rot/2 of each head by the angle of the row's position.

    Differentiable in x. Raises ValueError on shapes, dtypes and positions that do not fit.
    Source: Su et al. 2021, eq. 34.
    """
    if x.dim() != 3 or positions.shape != x.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"x, positions: got {tuple(x.shape)}, {positions.dtype} {tuple(positions.shape)}, "
            "want (N, heads, D), int64 (N,)"
        )
    if table.dim() != 2 or table.shape[1] % 2 or table.shape[1] > x.shape[2]:
        raise ValueError(
            f"table: got shape {tuple(table.shape)}, want (P, rot), rot even, at most {x.shape[2]}"
        )
    if choose("rope", x, table) == "reference":
        check_positions(positions, table.shape[0])
        return rope_reference(x, positions, table)
    x, positions, table = x.contiguous(), positions.contiguous(), table.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, positions, table)
    return torch.ops.engine.rope(x, positions, table, False)


def check_positions(positions: Tensor, num_positions: int) -> None:
    if positions.numel() and positions.device.type != "meta":
        low, high = (int(p) for p in positions.aminmax())
        if low < 0 or high >= num_positions:
            raise ValueError(
                f"positions: got {low} ... {high}, want 0 ... {num_positions - 1}, the rows of the table"
            )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(positions, table)
        return torch.ops.engine.rope(x, positions, table, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.engine.rope(grad.contiguous(), *ctx.saved_tensors, True), None, None


define(
    "rope(Tensor x, Tensor positions, Tensor table, bool inverse) -> Tensor",
    lambda x, positions, table, inverse: torch.empty_like(x),
)
