"""Checks of ops that go by rows, on Triton: results by the tolerance rule where an op has two of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE
from torch import Tensor

from engine.kernels._backend import backend

NAMES = ("y", "sum", "d x", "d residual", "d weight", "d bias")


def _with_gradients(
    op: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    place: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    leaves = [place(x).requires_grad_() for x in inputs]
    results = op(*leaves)
    upstream = [place(g.to(x.dtype)) for g, x in zip(grads, results, strict=True)]
    torch.autograd.backward(results, upstream)
    return [
        *(x.detach() for x in results),
        *(leaf.grad for leaf in leaves if leaf.grad is not None),
    ]


def check_residual_on_triton(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    units: float = 8.0,
) -> None:
    """(y, sum) and all gradients of a norm with a residual stream; `grads` are those of y and of sum."""
    inputs, grads = [x.to(DEVICE) for x in inputs], [g.to(DEVICE) for g in grads]
    with guarded() as guards, backend("triton"):
        ours = _with_gradients(op, inputs, grads, guards.place)

    def copy(x: Tensor) -> Tensor:
        return x.detach().clone()

    plain = _with_gradients(reference, inputs, grads, copy)
    wide = [x.double() for x in inputs], [g.double() for g in grads]
    truth = _with_gradients(reference, *wide, copy)
    assert len(ours) == len(truth) == len(inputs) + 2
    for name, o, r, t in zip(NAMES, ours, plain, truth, strict=False):
        assert o.dtype == r.dtype, f"{name}: got {o.dtype}, want {r.dtype}"
        assert_close(o, r, t, name, units)
