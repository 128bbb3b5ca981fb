"""swiglu against the float64 definition, at its extremes, and cut anywhere."""

import pytest
import torch
from gradients import DTYPES, check_against_float64, equal, result_and_gradients

from engine.kernels.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 37), (3, 96)])
def test_against_float64(cpu_class, dtype, shape):
    gate, up, grad = (torch.randn(shape, dtype=dtype) * s for s in (4.0, 1.0, 1.0))
    check_against_float64(swiglu, swiglu_reference, (gate, up), grad)


def test_large_gates_and_their_gradients(cpu_class):
    gate = torch.tensor([-1e4, -104.0, -88.5, -20.0, -0.0, 20.0, 88.5, 104.0, 1e4])
    up = torch.full_like(gate, 3.0)
    check_against_float64(swiglu, swiglu_reference, (gate, up), torch.ones_like(gate))
    out, grad_gate, grad_up = result_and_gradients(swiglu, (gate, up), torch.ones_like(gate))
    assert torch.isfinite(torch.stack([out, grad_gate, grad_up])).all()
    assert grad_gate[-1] == 3.0 and grad_gate[0] == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_is_a_function_of_its_own_inputs(cpu_class, threads, dtype):
    inputs = [torch.randn(200, 333).to(dtype) for _ in range(3)]
    whole = result_and_gradients(swiglu, inputs[:2], inputs[2])
    part = [x.flatten()[1001:60002] for x in inputs]
    cut = result_and_gradients(swiglu, part[:2], part[2])
    assert equal([x.flatten()[1001:60002] for x in whole], cut)


def test_strided_inputs(cpu_class):
    both = torch.randn(6, 10)
    gate, up = both.split(5, dim=1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


def test_gradcheck_of_the_definition():
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, inputs)


def test_opcheck():
    grad, gate, up = (torch.randn(4, 9) for _ in range(3))
    torch.library.opcheck(torch.ops.engine.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.engine.swiglu_backward.default, (grad, gate, up))


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="up: got .*want as gate"):
        swiglu(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="gate: got dtype"):
        swiglu(torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.float16))
