"""Runs an op on its Triton kernel: on a GPU where there is one, else in the interpreter."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from compare import assert_close
from guards import guarded
from torch import Tensor

from engine.kernels._backend import backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_triton(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with the Triton backend, its tensors between guard bands and its fresh memory NaN."""

    def run(*arguments: Any, **options: Any) -> Any:
        with guarded() as guards, backend("triton"):
            placed = [
                guards.place(x).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
                for x in arguments
            ]
            return op(*placed, **options)

    return run


def gradients_on_triton(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    """[op(*inputs), d inputs...] on the Triton kernels, forward and backward, between guard bands."""
    with guarded() as guards, backend("triton"):
        leaves = [guards.place(x).requires_grad_(x.is_floating_point()) for x in inputs]
        out = op(*leaves)
        out.backward(guards.place(grad.to(out.dtype)))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check_on_triton(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    units: float = 4.0,
) -> None:
    """Result and gradients on Triton by the tolerance rule: the definition in the storage dtype is R, in float64 T."""
    inputs = [x.to(DEVICE) for x in inputs]

    def defined(values: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in values]
        out = reference(*leaves)
        out.backward(grad.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    ours = gradients_on_triton(op, inputs, grad.to(DEVICE))
    plain = defined(inputs, grad.to(DEVICE))
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = defined(wide, grad.to(DEVICE).double())
    for i, (o, r, t) in enumerate(zip(ours, plain, truth, strict=True)):
        name = f"gradient {i - 1}" if i else "result"
        assert o.dtype == r.dtype, f"{name}: got {o.dtype}, want {r.dtype}"
        assert_close(o, r, t, name, units)
