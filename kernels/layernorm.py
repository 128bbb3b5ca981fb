"""Layer normalisation (Ba et al. 2016, eq. 4).

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        population variance

x float32 or bfloat16, weight and bias float32; the arithmetic is float32 with one rounding, into `out_dtype`.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define
from ._check import check_vector


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
    return torch.ops.engine.layernorm(x, weight, bias, eps, out_dtype)[0]


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
        out, mean, rstd = torch.ops.engine.layernorm(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = torch.ops.engine.layernorm_backward(
            grad.contiguous(), *ctx.saved_tensors
        )
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


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
