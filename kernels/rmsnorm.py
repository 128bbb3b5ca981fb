"""Root-mean-square normalisation (Zhang and Sennrich 2019, eq. 4).

    y = x / sqrt(mean(x^2) + eps) * weight

x float32 or bfloat16 (float16 on a GPU), weight float32; the arithmetic is float32 with one rounding, into `out_dtype`.
With a residual stream the norm is of its new value, sum = x + residual.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define, kernel
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
    return kernel("rmsnorm")(x, weight, eps, out_dtype)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        out, rstd = kernel("rmsnorm")(x, weight, eps, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = kernel("rmsnorm_backward")(grad.contiguous(), *ctx.saved_tensors)
        return *gradients, None, None


def check_residual(x: Tensor, residual: Tensor) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dim() != 2 or residual.shape != x.shape or residual.dtype != wide:
        raise ValueError(
            f"x, residual: got shapes {tuple(x.shape)}, {tuple(residual.shape)} {residual.dtype}, "
            f"want both (N, H), residual {wide}"
        )


def rmsnorm_residual_reference(
    x: Tensor,  # (N, H)
    residual: Tensor,  # (N, H)
    weight: Tensor,  # (H,)
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # (N, H), (N, H)
    """The definition, in at least float32."""
    total = x + residual
    return rmsnorm_reference(total, weight, eps, out_dtype or x.dtype), total


def rmsnorm_residual(
    x: Tensor,  # (N, H)
    residual: Tensor,  # (N, H) float32
    weight: Tensor,  # (H,) float32
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # (N, H) of out_dtype (None: that of x); (N, H) float32
    """(y, sum): sum = x + residual, y = sum / sqrt(mean(sum^2) + eps) * weight, row by row.

    One pass over memory on a GPU; C++ has no kernel of its own for it and runs the sum, then rmsnorm. Differentiable
    in x, residual and weight (their gradients in the dtype of each). Raises ValueError on shapes and dtypes that do
    not fit. Source: Zhang and Sennrich 2019, eq. 4.
    """
    check_residual(x, residual)
    check_vector("weight", weight, x.shape[1], residual.dtype)
    out_dtype = out_dtype or x.dtype
    chosen = choose("rmsnorm", x, residual, weight)
    if chosen == "reference":
        return rmsnorm_residual_reference(x, residual, weight, eps, out_dtype)
    if chosen == "cpp":
        total = x + residual
        return rmsnorm(total, weight, eps, out_dtype), total
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, weight)):
        return _RMSNormResidual.apply(x, residual, weight, eps, out_dtype)
    return kernel("rmsnorm_residual")(x, residual, weight, eps, out_dtype)[:2]


class _RMSNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        out, total, rstd = kernel("rmsnorm_residual")(x, residual, weight, eps, out_dtype)
        ctx.save_for_backward(total, weight, rstd)
        ctx.x_dtype = x.dtype
        return out, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_residual, grad_weight = kernel("rmsnorm_residual_backward")(
            grad.contiguous(), grad_total.contiguous(), *ctx.saved_tensors, ctx.x_dtype
        )
        same = ctx.x_dtype == torch.float32
        return grad_residual if same else grad_x, grad_residual, grad_weight, None, None


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
define(
    "rmsnorm_residual(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps, out_dtype: (
        torch.empty_like(x, dtype=out_dtype),
        torch.empty_like(residual),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
# d x is empty where it is d residual: x in float32.
define(
    "rmsnorm_residual_backward(Tensor grad, Tensor grad_sum, Tensor sum, Tensor weight, Tensor rstd,"
    " ScalarType x_dtype) -> (Tensor, Tensor, Tensor)",
    lambda grad, grad_sum, total, weight, rstd, x_dtype: (
        total.new_empty(0 if x_dtype == torch.float32 else total.shape, dtype=x_dtype),
        torch.empty_like(total),
        torch.empty_like(weight),
    ),
)
