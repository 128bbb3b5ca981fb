"""Layer normalisation (Ba et al. 2016, eq. 4).

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        population variance

x float32 or bfloat16 (float16 on a GPU), weight and bias float32; the arithmetic is float32 with one rounding, into
`out_dtype`. With a residual stream the norm is of its new value, sum = x + residual.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from ._check import check_vector
from .rmsnorm import check_residual


def layernorm_reference(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (H,)
    bias: Tensor | None = None,  # (H,)
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (N, H)
    """The definition, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    scaled = normed * weight
    return (scaled if bias is None else scaled + bias).to(out_dtype or x.dtype)


def layernorm(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (H,) float32
    bias: Tensor | None = None,  # (H,) float32
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (N, H), out_dtype (None: that of x)
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, row by row.

    Differentiable in x, weight and bias (their gradients in the dtype of each). Raises ValueError on shapes and
    dtypes that do not fit. Source: Ba et al. 2016, eq. 4.
    """
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (N, H)")
    wide = torch.promote_types(x.dtype, torch.float32)
    check_vector("weight", weight, x.shape[1], wide)
    if bias is not None:
        check_vector("bias", bias, x.shape[1], wide)
    out_dtype = out_dtype or x.dtype
    if choose("layernorm", x, weight, bias) == "reference":
        return layernorm_reference(x, weight, bias, eps, out_dtype)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    wants_bias = bias is not None and bias.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or wants_bias):
        return _LayerNorm.apply(x, weight, bias, eps, out_dtype)
    return kernel("layernorm")(x, weight, bias, eps, out_dtype)[0]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        out, mean, rstd = kernel("layernorm")(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = kernel("layernorm_backward")(
            grad.contiguous(), *ctx.saved_tensors
        )
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


def layernorm_residual_reference(
    x: Tensor,  # (N, H)
    residual: Tensor,  # (N, H)
    weight: Tensor,  # (H,)
    bias: Tensor | None = None,  # (H,)
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # (N, H), (N, H)
    """The definition, in at least float32."""
    total = x + residual
    return layernorm_reference(total, weight, bias, eps, out_dtype or x.dtype), total


def layernorm_residual(
    x: Tensor,  # (N, H)
    residual: Tensor,  # (N, H) float32
    weight: Tensor,  # (H,) float32
    bias: Tensor | None = None,  # (H,) float32
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # (N, H) of out_dtype (None: that of x); (N, H) float32
    """(y, sum): sum = x + residual, y = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias, row by row.

    One pass over memory on a GPU; C++ has no kernel of its own for it and runs the sum, then layernorm.
    Differentiable in x, residual, weight and bias (their gradients in the dtype of each). Raises ValueError on shapes
    and dtypes that do not fit. Source: Ba et al. 2016, eq. 4.
    """
    check_residual(x, residual)
    check_vector("weight", weight, x.shape[1], residual.dtype)
    if bias is not None:
        check_vector("bias", bias, x.shape[1], residual.dtype)
    out_dtype = out_dtype or x.dtype
    chosen = choose("layernorm", x, residual, weight, bias)
    if chosen == "reference":
        return layernorm_residual_reference(x, residual, weight, bias, eps, out_dtype)
    if chosen == "cpp":
        total = x + residual
        return layernorm(total, weight, bias, eps, out_dtype), total
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    inputs = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _LayerNormResidual.apply(*inputs, eps, out_dtype)
    return kernel("layernorm_residual")(*inputs, eps, out_dtype)[:2]


class _LayerNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        out, total, mean, rstd = kernel("layernorm_residual")(
            x, residual, weight, bias, eps, out_dtype
        )
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.x_dtype, ctx.has_bias = x.dtype, bias is not None
        return out, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_residual, grad_weight, grad_bias = kernel("layernorm_residual_backward")(
            grad.contiguous(), grad_total.contiguous(), *ctx.saved_tensors, ctx.x_dtype
        )
        if ctx.x_dtype == torch.float32:
            grad_x = grad_residual
        if not ctx.has_bias:
            grad_bias = None
        return grad_x, grad_residual, grad_weight, grad_bias, None, None


define(
    "layernorm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    lambda x, weight, bias, eps, out_dtype: (
        torch.empty_like(x, dtype=out_dtype),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
define(
    "layernorm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, weight, mean, rstd: (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
)
define(
    "layernorm_residual(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, residual, weight, bias, eps, out_dtype: (
        torch.empty_like(x, dtype=out_dtype),
        torch.empty_like(residual),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
# d x is empty where it is d residual: x in float32.
define(
    "layernorm_residual_backward(Tensor grad, Tensor grad_sum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd,"
    " ScalarType x_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, grad_sum, total, weight, mean, rstd, x_dtype: (
        total.new_empty(0 if x_dtype == torch.float32 else total.shape, dtype=x_dtype),
        torch.empty_like(total),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
)
