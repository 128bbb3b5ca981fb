"""The Gaussian error linear unit (Hendrycks and Gimpel 2016).

    "none":  y = x Phi(x),    Phi the normal distribution function
    "tanh":  y = x / (1 + e^(-2u)),    u = sqrt(2 / pi) (x + 0.044715 x^3),    equal to x (1 + tanh u) / 2

float32 arithmetic with one rounding into the dtype of x.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define, kernel

APPROXIMATIONS = ("none", "tanh")


def gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """The definition, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.gelu(wide, approximate=approximate).to(x.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """y = x Phi(x), or its tanh approximation, element by element; any shape, the dtype of x.

    Differentiable. Raises ValueError on another name than "none" or "tanh". Source: Hendrycks and Gimpel 2016,
    section 2.
    """
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate: got {approximate!r}, want one of {APPROXIMATIONS}")
    if choose("gelu", x) == "reference":
        return gelu_reference(x, approximate)
    x = x.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x, approximate == "tanh")
    return kernel("gelu")(x, approximate == "tanh")


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        return kernel("gelu")(x, tanh)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return kernel("gelu_backward")(grad.contiguous(), x, ctx.tanh), None


define("gelu(Tensor x, bool tanh) -> Tensor", lambda x, tanh: torch.empty_like(x))
define(
    "gelu_backward(Tensor grad, Tensor x, bool tanh) -> Tensor",
    lambda grad, x, tanh: torch.empty_like(x),
)
