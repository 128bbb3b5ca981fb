"""Whitening to mean 0 and variance 1 (Ziegler et al. 2019; InstructGPT C.4 through its code).

    mean = sum(x) / N
    var  = sum((x - mean)^2) / N                    (population variance: one token is enough)
    y    = (x - mean) / sqrt(var + 1e-8)            (+ mean, unless shift_mean)

Packed tokens only, so padding never enters the statistics. Advantages are whitened with
shift_mean=True, rewards (an option, off in the paper) with shift_mean=False. Numerics: statistics
in float64, the result in the dtype of x.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._backend import choose, define, kernel
from ._loss import refuse_second_gradient

EPS = 1e-8


def _sum_over_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        torch.distributed.all_reduce(x, group=group)
    return x


def whiten_reference(
    x: Tensor, shift_mean: bool = True, group: ProcessGroup | None = None
) -> Tensor:
    """The definition, in two passes: squares around the mean keep their digits."""
    wide = x.double()
    count = _sum_over_ranks(wide.new_tensor(x.numel()), group)
    mean = _sum_over_ranks(wide.sum(), group) / count
    centred = wide - mean
    variance = _sum_over_ranks(centred.square().sum(), group) / count
    whitened = centred / (variance + EPS).sqrt()
    return (whitened if shift_mean else whitened + mean).to(x.dtype)


def whiten(
    x: Tensor,  # (N,)
    shift_mean: bool = True,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:  # (N,)
    """y = (x - mean) / sqrt(var + 1e-8), plus the mean again with shift_mean=False.

    Without tokens the result is empty; of one token it is 0 (or the token). With `group` the
    statistics are those of all its processes, each of which must call, those without tokens too; x
    must not need a gradient then, and the torch definition runs on every backend. Differentiable
    (once) in x otherwise. Raises ValueError on a shape that is not (N,).
    Source: Ziegler et al. 2019.
    """
    if x.dim() != 1 or not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, want floats of shape (N,)")
    if group is not None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x: got a tensor that needs a gradient, want x.detach():"
            " statistics over a group have none"
        )
    if choose("whiten", x) == "reference" or group is not None:
        return whiten_reference(x, shift_mean, group)
    return kernel("whiten")(x.contiguous(), shift_mean)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.shift_mean = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    refuse_second_gradient("whiten")
    (x,) = ctx.saved_tensors
    return kernel("whiten_backward")(grad.contiguous(), x, ctx.shift_mean), None


define("whiten(Tensor x, bool shift_mean) -> Tensor", lambda x, shift_mean: torch.empty_like(x))
define(
    "whiten_backward(Tensor grad, Tensor x, bool shift_mean) -> Tensor",
    lambda grad, x, shift_mean: torch.empty_like(x),
)
torch.library.register_autograd("engine::whiten", _backward, setup_context=_setup_context)
