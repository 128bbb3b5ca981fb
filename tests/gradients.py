"""An op's result and gradients against its definition in float64, by the one tolerance rule (tests/compare.py)."""

from collections.abc import Callable, Sequence

import torch
from compare import assert_close
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def result_and_gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    """[op(*inputs), d inputs...] with `grad` as the gradient of the result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check_against_float64(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    units: float = 4.0,
) -> None:
    """op on the inputs as they are; the definition on them (R) and on their float64 values (T)."""
    ours = result_and_gradients(op, inputs, grad)
    plain = result_and_gradients(reference, inputs, grad)
    truth = result_and_gradients(reference, [x.double() for x in inputs], grad.double())
    names = ["result", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, o, r, t in zip(names, ours, plain, truth, strict=True):
        assert o.dtype == r.dtype, f"{name}: got {o.dtype}, want {r.dtype}"
        assert_close(o, r, t, name, units)


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
