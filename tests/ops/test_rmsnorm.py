"""rmsnorm against the float64 definition, and its rows on their own."""

import pytest
import torch
from gradients import DTYPES, check_against_float64, equal, result_and_gradients
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.rmsnorm import (
    rmsnorm,
    rmsnorm_reference,
    rmsnorm_residual,
    rmsnorm_residual_reference,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 19), (5, 37), (70, 96)])
def test_against_float64(cpu_class, dtype, out_dtype, shape):
    x, weight = torch.randn(shape, dtype=dtype) * 3, torch.randn(shape[1])
    grad = torch.randn(shape).to(out_dtype)

    def wide_or(x, w):  # the truth stays in float64
        return rmsnorm_reference(x, w, 1e-5, None if x.dtype == torch.float64 else out_dtype)

    ours = result_and_gradients(lambda x, w: rmsnorm(x, w, 1e-5, out_dtype), (x, weight), grad)
    assert ours[0].dtype == out_dtype and ours[1].dtype == dtype and ours[2].dtype == torch.float32
    check_against_float64(
        lambda x, w: rmsnorm(x, w, 1e-5, out_dtype), wide_or, (x, weight), grad, units=8
    )


@given(rows=st.integers(0, 5), width=st.integers(8, 70), seed=st.integers(0, 99))
def test_any_width(rows, width, seed):
    # Below a width of 8 the gradient of x is the difference of equal numbers, and no bound on it holds.
    torch.manual_seed(seed)
    x, weight, grad = torch.randn(rows, width), torch.randn(width), torch.randn(rows, width)
    check_against_float64(rmsnorm, rmsnorm_reference, (x, weight), grad, units=8)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e15])
def test_sizes_of_rows(cpu_class, scale):
    x = torch.randn(3, 40) * scale
    check_against_float64(rmsnorm, rmsnorm_reference, (x, torch.randn(40)), torch.randn(3, 40), 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent_and_threads_change_nothing(cpu_class, dtype):
    x, weight, grad = (
        torch.randn(3001, 90).to(dtype),
        torch.randn(90),
        torch.randn(3001, 90).to(dtype),
    )
    whole = result_and_gradients(rmsnorm, (x, weight), grad)
    part = result_and_gradients(rmsnorm, (x[1700:1800], weight), grad[1700:1800])
    assert equal([a[1700:1800] for a in whole[:2]], part[:2])
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    other = result_and_gradients(rmsnorm, (x, weight), grad)
    torch.set_num_threads(before)
    assert equal(whole, other)


def test_gradcheck_of_the_definition():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(rmsnorm, (x, weight))


def test_opcheck():
    x, weight, grad = torch.randn(4, 9), torch.randn(9), torch.randn(4, 9)
    arguments = (x, weight, 1e-6, torch.bfloat16)
    torch.library.opcheck(torch.ops.engine.rmsnorm.default, arguments)
    rstd = torch.rand(4)
    torch.library.opcheck(torch.ops.engine.rmsnorm_backward.default, (grad, x, weight, rstd))


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_a_residual_stream(cpu_class, dtype):
    """y and sum side by side, so that both have a gradient."""

    def joined(op):
        return lambda *inputs: torch.cat(op(*inputs))

    x, residual, weight = torch.randn(5, 37), torch.randn(5, 37), torch.randn(37)
    check_against_float64(
        joined(rmsnorm_residual),
        joined(rmsnorm_residual_reference),
        (x, residual, weight),
        torch.randn(10, 37),
        units=8,
    )
    y, total = rmsnorm_residual(x.to(dtype), residual, weight)
    assert torch.equal(total, x.to(dtype) + residual) and y.dtype == dtype
    assert torch.equal(y, rmsnorm(total, weight, out_dtype=dtype))


def test_residual_stream_on_the_definition():
    shapes = (3, 5), (3, 5), (5,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(rmsnorm_residual, inputs)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_shapes_of_the_residual_ops(x_dtype):
    x, stream, weight, rstd = (torch.empty(s, device="meta") for s in ((4, 9), (4, 9), (9,), (4,)))
    ops = torch.ops.engine
    y, total, scale = ops.rmsnorm_residual(x.to(x_dtype), stream, weight, 1e-6, torch.bfloat16)
    assert (y.dtype, total.dtype, scale.shape) == (torch.bfloat16, torch.float32, (4,))
    d_x, d_residual, d_weight = ops.rmsnorm_residual_backward(
        y, stream, total, weight, rstd, x_dtype
    )
    assert d_x.shape == ((0,) if x_dtype == torch.float32 else (4, 9)) and d_x.dtype == x_dtype
    assert d_residual.shape == (4, 9) and d_weight.shape == (9,)


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"residual: got shapes \(2, 5\), \(2, 4\) .*want both"):
        rmsnorm_residual(torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(5))
    with pytest.raises(ValueError, match="torch.bfloat16, want both .* residual torch.float32"):
        half = torch.zeros(2, 5, dtype=torch.bfloat16)
        rmsnorm_residual(half, half, torch.zeros(5))
    with pytest.raises(ValueError, match=r"weight: got shape \(4,\), want \(5,\)"):
        rmsnorm(torch.zeros(2, 5), torch.zeros(4))
    with pytest.raises(ValueError, match="weight: got dtype torch.bfloat16, want torch.float32"):
        rmsnorm(torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16))
