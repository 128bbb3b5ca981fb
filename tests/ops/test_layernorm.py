"""layernorm against the float64 definition, and its rows on their own."""

import pytest
import torch
from gradients import DTYPES, check_against_float64, equal, result_and_gradients
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.layernorm import (
    layernorm,
    layernorm_reference,
    layernorm_residual,
    layernorm_residual_reference,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 19), (5, 37), (70, 96)])
def test_against_float64(cpu_class, dtype, out_dtype, shape):
    x = torch.randn(shape, dtype=dtype) * 3 + 1
    weight, bias, grad = torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape)

    def wide_or(x, w, b):  # the truth stays in float64
        return layernorm_reference(x, w, b, 1e-5, None if x.dtype == torch.float64 else out_dtype)

    check_against_float64(
        lambda x, w, b: layernorm(x, w, b, 1e-5, out_dtype),
        wide_or,
        (x, weight, bias),
        grad.to(out_dtype),
        units=8,
    )


@given(rows=st.integers(0, 5), width=st.integers(8, 70), seed=st.integers(0, 99))
def test_any_width(rows, width, seed):
    torch.manual_seed(seed)
    x, grad = torch.randn(rows, width), torch.randn(rows, width)
    check_against_float64(
        layernorm, layernorm_reference, (x, torch.randn(width), torch.randn(width)), grad, units=8
    )


def test_without_a_bias(cpu_class):
    x, weight, grad = torch.randn(4, 21), torch.randn(21), torch.randn(4, 21)
    check_against_float64(layernorm, layernorm_reference, (x, weight), grad, units=8)


def test_a_far_mean_keeps_its_variance(cpu_class):
    """The variance is that of x - mean, not E[x^2] - mean^2, which has no digits here."""
    x = torch.randn(3, 40) + 1e4
    out = layernorm(x, torch.ones(40))
    torch.testing.assert_close(out.std(-1, correction=0), torch.ones(3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent_and_threads_change_nothing(cpu_class, dtype):
    x, grad = torch.randn(3001, 90).to(dtype), torch.randn(3001, 90).to(dtype)
    parameters = torch.randn(90), torch.randn(90)
    whole = result_and_gradients(layernorm, (x, *parameters), grad)
    part = result_and_gradients(layernorm, (x[1700:1800], *parameters), grad[1700:1800])
    assert equal([a[1700:1800] for a in whole[:2]], part[:2])
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    other = result_and_gradients(layernorm, (x, *parameters), grad)
    torch.set_num_threads(before)
    assert equal(whole, other)


def test_gradcheck_of_the_definition():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,), (5,))]
    assert torch.autograd.gradcheck(layernorm, inputs)


def test_opcheck():
    x, weight, bias, grad = torch.randn(4, 9), torch.randn(9), torch.randn(9), torch.randn(4, 9)
    for b in (bias, None):
        arguments = (x, weight, b, 1e-6, torch.bfloat16)
        torch.library.opcheck(torch.ops.engine.layernorm.default, arguments)
    arguments = (grad, x, weight, torch.rand(4), torch.rand(4))
    torch.library.opcheck(torch.ops.engine.layernorm_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_a_residual_stream(cpu_class, dtype):
    """y and sum side by side, so that both have a gradient."""

    def joined(op):
        return lambda *inputs: torch.cat(op(*inputs))

    x, residual, grad = torch.randn(5, 37), torch.randn(5, 37) + 1, torch.randn(10, 37)
    inputs = x, residual, torch.randn(37), torch.randn(37)
    reference = joined(layernorm_residual_reference)
    check_against_float64(joined(layernorm_residual), reference, inputs, grad, units=8)
    check_against_float64(joined(layernorm_residual), reference, inputs[:3], grad, units=8)
    y, total = layernorm_residual(x.to(dtype), *inputs[1:])
    assert torch.equal(total, x.to(dtype) + residual) and y.dtype == dtype
    assert torch.equal(y, layernorm(total, *inputs[2:], out_dtype=dtype))


def test_residual_stream_on_the_definition():
    shapes = (3, 5), (3, 5), (5,), (5,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(layernorm_residual, inputs)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_shapes_of_the_residual_ops(x_dtype):
    x, stream, weight, rstd = (torch.empty(s, device="meta") for s in ((4, 9), (4, 9), (9,), (4,)))
    ops = torch.ops.engine
    y, total, mean, scale = ops.layernorm_residual(
        x.to(x_dtype), stream, weight, None, 1e-6, torch.bfloat16
    )
    assert (y.dtype, total.dtype, mean.shape) == (torch.bfloat16, torch.float32, scale.shape)
    d_x, d_residual, *vectors = ops.layernorm_residual_backward(
        y, stream, total, weight, rstd, rstd, x_dtype
    )
    assert d_x.shape == ((0,) if x_dtype == torch.float32 else (4, 9)) and d_x.dtype == x_dtype
    assert d_residual.shape == (4, 9) and [v.shape for v in vectors] == [(9,), (9,)]


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"residual: got shapes \(2, 5\), \(2, 4\) .*want both"):
        layernorm_residual(torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(5))
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\), want \(5,\)"):
        layernorm(torch.zeros(2, 5), torch.zeros(5), torch.zeros(4))
    with pytest.raises(ValueError, match=r"x: got shape \(5,\), want \(N, H\)"):
        layernorm(torch.zeros(5), torch.zeros(5))
