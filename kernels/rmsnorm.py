"""Root-mean-square normalisation (Zhang and Sennrich 2019, eq. 4).

    y = x / sqrt(mean(x^2) + eps) * weight

x float32 or bfloat16, weight float32; the arithmetic is float32 with one rounding, into `out_dtype`.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define
from ._check import check_vector


def rmsnorm_reference(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (H,)
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (N, H)
    """The definition, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(out_dtype or x.dtype)


def rmsnorm(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (H,) float32
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (N, H), out_dtype (None: that of x)
    """y = x / sqrt(mean(x^2) + eps) * weight, row by row.

    Differentiable in x and weight (their gradients in the dtype of each). Raises ValueError on shapes and dtypes
    that do not fit. Source: Zhang and Sennrich 2019, eq. 4.
    """
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (N, H)")
    check_vector("weight", weight, x.shape[1], torch.promote_types(x.dtype, torch.float32))
    out_dtype = out_dtype or x.dtype
    if choose("rmsnorm", x, weight) == "reference":
        return rmsnorm_reference(x, weight, eps, out_dtype)
    x, weight = x.contiguous(), weight.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, out_dtype)
    return torch.ops.engine.rmsnorm(x, weight, eps, out_dtype)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        out, rstd = torch.ops.engine.rmsnorm(x, weight, eps, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.engine.rmsnorm_backward(grad.contiguous(), *ctx.saved_tensors)
        return *gradients, None, None


define(
    "rmsnorm(Tensor x, Tensor weight, float eps, ScalarType out_dtype) -> (Tensor, Tensor)",
    lambda x, weight, eps, out_dtype: (
        torch.empty_like(x, dtype=out_dtype),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
define(
    "rmsnorm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    lambda grad, x, weight, rstd: (torch.empty_like(x), torch.empty_like(weight)),
)
