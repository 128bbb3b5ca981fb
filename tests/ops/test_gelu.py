"""gelu against the float64 definition: the whole axis, the far tails, both forms."""

import pytest
import torch
from gradients import DTYPES, check_against_float64, equal, result_and_gradients

from engine.kernels.gelu import gelu, gelu_reference

FORMS = ["none", "tanh"]


def forms(approximate: str):
    return lambda x: gelu(x, approximate), lambda x: gelu_reference(x, approximate)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1,), (7, 37), (2, 3, 32)])
def test_against_float64(cpu_class, dtype, shape, form):
    x, grad = torch.randn(shape, dtype=dtype) * 2, torch.randn(shape, dtype=dtype)
    check_against_float64(*forms(form), (x,), grad)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_axis(cpu_class, form):
    """Relative error, against forms that keep their digits in the left tail; torch's 1 + erf and 1 + tanh do not."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-30, -1e-30, 0.0])])
    wide = x.double()
    if form == "none":
        truth = wide * torch.special.erfc(-wide * 0.5**0.5) / 2
    else:
        truth = wide * torch.sigmoid((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    error = (gelu(x, form).double() - truth).abs()
    # The argument of the exponential is rounded to float32, which counts by its size in the tail.
    exponent = wide**2 / 2 if form == "none" else 3.2 * wide.abs() * (1 + 0.045 * wide**2)
    bound = truth.abs() * 2**-23 * (3 + exponent) + 1e-37
    assert (error <= bound).all(), x[(error / bound).argmax()]


@pytest.mark.parametrize("form", FORMS)
def test_large_inputs(cpu_class, form):
    x = torch.tensor([-1e4, -100.0, -14.0, 14.0, 100.0, 1e4])
    out, grad = result_and_gradients(lambda x: gelu(x, form), (x,), torch.ones_like(x))
    assert torch.equal(out, x.clamp(min=0)) and torch.equal(grad, (x > 0).float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_is_a_function_of_its_own_input(cpu_class, threads, dtype, form):
    x, grad = (torch.randn(66000).to(dtype) for _ in range(2))
    whole = result_and_gradients(forms(form)[0], (x,), grad)
    cut = result_and_gradients(forms(form)[0], (x[1001:60002],), grad[1001:60002])
    assert equal([a[1001:60002] for a in whole], cut)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_the_definition(form):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gelu(x, form), (x,))


@pytest.mark.parametrize("tanh", [False, True])
def test_opcheck(tanh):
    x, grad = torch.randn(4, 9), torch.randn(4, 9)
    torch.library.opcheck(torch.ops.engine.gelu.default, (x, tanh))
    torch.library.opcheck(torch.ops.engine.gelu_backward.default, (grad, x, tanh))


def test_strided_input_and_unknown_form(cpu_class):
    x = torch.randn(5, 6)
    assert torch.equal(gelu(x.T), gelu(x).T)
    with pytest.raises(ValueError, match="approximate: got 'sigmoid', want one of"):
        gelu(x, "sigmoid")
