"""gelu's Triton kernels against the float64 definition: the whole axis, the far tails, both forms."""

import pytest
import torch
from guards import guarded
from launching import DEVICE, DTYPES, check_on_triton, gradients_on_triton, on_triton
from mutations import mutations

from engine.kernels import _backend
from engine.kernels.gelu import gelu, gelu_reference
from engine.kernels.triton import gelu as kernels
from engine.kernels.triton._launch import Config

FORMS = ["none", "tanh"]


def forms(approximate):
    return lambda x: gelu(x, approximate), lambda x: gelu_reference(x, approximate)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1,), (3, 37), (2, 3, 576)])
def test_against_float64(dtype, shape, form):
    x, grad = (torch.randn(shape).to(dtype) * 2 for _ in range(2))
    check_on_triton(*forms(form), (x,), grad)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_axis(form):
    """Relative error, against forms that keep their digits in the left tail; torch's 1 + erf and 1 + tanh do not."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-30, -1e-30, 0.0])])
    wide = x.double()
    if form == "none":
        truth = wide * torch.special.erfc(-wide * 0.5**0.5) / 2
    else:
        truth = wide * torch.sigmoid((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    error = (on_triton(gelu)(x.to(DEVICE), form).cpu().double() - truth).abs()
    # The argument of the exponential is rounded to float32, which counts by its size in the tail.
    exponent = wide**2 / 2 if form == "none" else 3.2 * wide.abs() * (1 + 0.045 * wide**2)
    bound = truth.abs() * 2**-23 * (3 + exponent) + 1e-37
    assert (error <= bound).all(), x[(error / bound).argmax()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_large_inputs(form):
    x = torch.tensor([-1e4, -100.0, -14.0, 14.0, 100.0, 1e4])
    out, grad = gradients_on_triton(forms(form)[0], (x.to(DEVICE),), torch.ones(6, device=DEVICE))
    tiny = {"rtol": 0, "atol": 1e-37}  # numbers below it may be 0 on a GPU
    torch.testing.assert_close(out.cpu(), x.clamp(min=0), **tiny)
    torch.testing.assert_close(grad.cpu(), (x > 0).float(), **tiny)
    ends = torch.tensor([float("inf"), float("-inf"), float("nan")], device=DEVICE)
    ours = on_triton(gelu)(ends, form)
    # Said here, not asked of torch: its vectors of 16 lanes make NaN of inf too. At -inf both forms are -inf times 0.
    assert ours[0] == float("inf") and ours[1:].isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_is_a_function_of_its_own_input(dtype, form):
    """To the bit: in another place, at another alignment, in blocks of another size."""
    x, grad = (torch.randn(301, device=DEVICE).to(dtype) for _ in range(2))
    tanh, tuned = form == "tanh", Config({"BLOCK": 64})
    whole = kernels.gelu(x, tanh), kernels.gelu_backward(grad, x, tanh)
    with guarded() as guards:
        some, up = (guards.place(t[100:250], shift=1) for t in (x, grad))
        part = kernels.gelu(some, tanh, tuned), kernels.gelu_backward(up, some, tanh, tuned)
    assert all(torch.equal(a[100:250], b) for a, b in zip(whole, part, strict=True))


DEFECTS = {
    "none": {
        "store without a mask": ("y.to(out.dtype.element_ty), mask=inside)", "y.to(out.dtype.element_ty))"),
        "gradient without a mask": ("d_x.dtype.element_ty), mask=inside)", "d_x.dtype.element_ty))"),
        "an element left out": ("inside = at < n\n    a =", "inside = at < n - 1\n    a ="),
        "block of another program": ("inside = at < n\n    dy", "at %= BLOCK\n    inside = at < n\n    dy"),
        "tails swapped": ("tl.where(x < 0.0, tail, 1.0 - tail)", "tl.where(x > 0.0, tail, 1.0 - tail)"),
        "a coefficient of the fit": ("9.579380602e-02", "9.579480602e-02"),
        "density forgotten": ("slope = below + a * density", "slope = below"),
        "x forgotten": ("slope = below + a * density", "slope = below + density"),
        "gradient of the result forgotten": ("(dy * slope)", "slope"),
    },
    "tanh": {
        "the other form": ("y = a * g", "y = a * _normal(a)[0]"),
        "the other form's gradient": ("slope = g + bend", "slope = _normal(a)[0] + a * _normal(a)[1]"),
        "half of the argument": ("e = tl.exp(-tl.abs(twice))", "e = tl.exp(-0.5 * tl.abs(twice))"),
        "cubic term forgotten": ("twice = scale * x * (1.0 + 0.044715 * (x * x))", "twice = scale * x"),
        "derivative of the cubic term": ("3.0 * 0.044715", "2.0 * 0.044715"),
        "slope of the gate": ("(e * r * r)", "(e * r)"),
        "sides swapped": ("twice < 0.0", "twice > 0.0"),
    },
}  # fmt: skip


def check(form):
    tuned, module = Config({"BLOCK": 64}), _backend.triton_kernels("gelu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "config", lambda op, size, device: tuned)
        check_on_triton(*forms(form), (torch.randn(150) * 2,), torch.randn(150))


@pytest.mark.parametrize("form", FORMS)
def test_blocks(form):
    check(form)


@mutations(kernels, DEFECTS["none"])
def test_defects_are_caught():
    check("none")


@mutations(kernels, DEFECTS["tanh"])
def test_defects_of_the_tanh_form_are_caught():
    check("tanh")
