"""swiglu's Triton kernels against the float64 definition."""

import pytest
import torch
from launching import DEVICE, DTYPES, check_on_triton, on_triton
from mutations import mutations

from engine.kernels.swiglu import swiglu, swiglu_reference
from engine.kernels.triton import swiglu as kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 37), (5, 576)])
def test_against_float64(dtype, shape):
    gate, up, grad = (torch.randn(shape).to(dtype) * 3 for _ in range(3))
    check_on_triton(swiglu, swiglu_reference, (gate, up), grad)


def test_extremes():
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, 80.0, -80.0, float("inf")], device=DEVICE)
    out = on_triton(swiglu)(gate, torch.ones_like(gate))
    assert out[:4].tolist() == [0.0, 0.0, 1e4, 0.0] and out[6] == float("inf")
    want = swiglu_reference(gate, torch.ones_like(gate))
    assert torch.allclose(out, want, rtol=1e-6, atol=1e-30)


DEFECTS = {
    "store without a mask": (
        "tl.store(out + at, h.to(out.dtype.element_ty), mask=inside)",
        "tl.store(out + at, h)",
    ),
    "the last element left out": ("inside = at < n\n    g =", "inside = at < n - 1\n    g ="),
    "gate and up swapped": ("h = g * tl.sigmoid(g) * u", "h = u * tl.sigmoid(u) * g"),
    "derivative of the sigmoid forgotten": ("(1.0 + g * (1.0 - sigmoid))", "1.0"),
    "sign of a gradient": ("du = dh * g * sigmoid", "du = -dh * g * sigmoid"),
    "gradients swapped": ("tl.store(d_up + at, du.to", "tl.store(d_gate + at, du.to"),
}


@mutations(kernels, DEFECTS)
def test_defects_are_caught():
    gate, up, grad = (torch.randn(3, 37) for _ in range(3))
    check_on_triton(swiglu, swiglu_reference, (gate, up), grad)
