"""The gate of the gated feed-forward layer (Shazeer 2020, SwiGLU).

    h = silu(gate) * up,    silu(z) = z / (1 + e^-z)

float32 arithmetic with one rounding into the dtype of the inputs; the backward recomputes the sigmoid.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define, kernel


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in at least float32."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu(
    gate: Tensor,  # (N, I)
    up: Tensor,  # (N, I)
) -> Tensor:  # (N, I), dtype of gate
    """h = silu(gate) * up, element by element. Any one shape.

    Differentiable in both. Raises ValueError on shapes and dtypes that differ. Source: Shazeer 2020, eq. 6.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"up: got {up.dtype} {tuple(up.shape)}, want as gate, {gate.dtype} {tuple(gate.shape)}"
        )
    if choose("swiglu", gate, up) == "reference":
        return swiglu_reference(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return kernel("swiglu")(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernel("swiglu")(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return kernel("swiglu_backward")(grad.contiguous(), *ctx.saved_tensors)


define("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: torch.empty_like(gate))
define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)
