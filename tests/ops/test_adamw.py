"""adamw's definition against torch.optim.AdamW to the bit, the engine's average, its clip and the golden numbers.

Its kernel runs on a GPU (tests/triton/test_triton_adamw.py); on the CPU the definition is what there is.
"""

import math
import warnings

import pytest
import torch
from cpu_classes import use_threads

from engine import ops
from engine.kernels._backend import BackendError, backend
from engine.kernels.adamw import (
    SQUARES,
    adamw_step,
    bias_corrections,
    clip_scale_of,
    grad_norm,
)
from engine.run.ema import EMA
from engine.run.optim import global_norm

SETTINGS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1}


def fresh(shape, dtype=torch.float32):
    """master and the two moments before the first step"""
    return torch.randn(shape).to(dtype), *(torch.zeros(shape, dtype=dtype) for _ in range(2))


def steps(state, grads, copy=None, ema=None, settings=SETTINGS, **more):
    """Steps 1, 2, ... of `grads`."""
    for t, grad in enumerate(grads, start=1):
        one, two = bias_corrections(settings["beta1"], settings["beta2"], t)
        numbers = {**settings, "bias_correction1": one, "bias_correction2_sqrt": two}
        adamw_step(state[0], grad, *state[1:], copy, ema, **numbers, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(37, 21), (5,), (), (0, 3)])
def test_it_is_torch_s_adamw(dtype, decay, shape):
    state = fresh(shape, dtype)
    settings = {**SETTINGS, "weight_decay": decay}
    parameter = torch.nn.Parameter(state[0].clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-5,
        weight_decay=decay,
        foreach=False,
        fused=False,
    )
    copy, ema = torch.zeros(shape, dtype=torch.bfloat16), state[0].clone()
    average = EMA({"w": parameter}, 0.9)
    grads = [torch.randn(shape).to(dtype) for _ in range(5)]
    steps(state, grads, copy, ema, settings, ema_decay=0.9)
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
        average.update()
    torch_s = optimizer.state[parameter]
    assert torch.equal(state[0], parameter)
    assert torch.equal(state[1], torch_s["exp_avg"]) and torch.equal(
        state[2], torch_s["exp_avg_sq"]
    )
    assert torch.equal(copy, parameter.bfloat16()) and torch.equal(ema, average.averages["w"])


def test_golden(golden):
    for case in golden["adam"]:
        given = case["inputs"]
        state = (
            torch.full((19,), given["w0"], dtype=torch.float64),
            *fresh((19,), torch.float64)[1:],
        )
        for t, (grad, want) in enumerate(
            zip(given["grads"], case["outputs"]["w"], strict=True), start=1
        ):
            one, two = bias_corrections(given["beta1"], given["beta2"], t)
            eps = given["eps"] / two if given["style"] == "tf" else given["eps"]
            grad = torch.full((19,), grad, dtype=torch.float64)
            adamw_step(
                state[0],
                grad,
                *state[1:],
                None,
                None,
                given["lr"],
                given["beta1"],
                given["beta2"],
                eps,
                0.0,
                one,
                two,
            )
            torch.testing.assert_close(
                state[0], torch.full_like(state[0], want), rtol=1e-12, atol=1e-12
            )


def test_gradients_of_any_dtype_are_clipped_and_stay():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state, grad = fresh((7, 5)), torch.randn(7, 5).to(dtype)
        other, before = [t.clone() for t in state], grad.clone()
        steps(state, [grad], clip_scale=0.25)
        steps(other, [grad.float() * 0.25], clip_scale=torch.ones(()))
        assert all(map(torch.equal, state, other)) and torch.equal(grad, before)


@pytest.mark.parametrize("scale", [0.0, torch.zeros(())])
def test_a_scale_of_zero_moves_nothing(scale):
    state, copy = fresh(9), torch.zeros(9, dtype=torch.bfloat16)
    ema, before = state[0] + 1, [t.clone() for t in state]
    steps(state, [torch.full((9,), torch.nan)], copy, ema, clip_scale=scale, ema_decay=0.5)
    assert (
        all(map(torch.equal, state, before)) and not copy.any() and torch.equal(ema, state[0] + 1)
    )


def test_norm_and_scale():
    tensors = [
        torch.randn(40_003, 3),
        torch.randn(5),
        torch.zeros(0),
        torch.randn(SQUARES + 1).bfloat16(),
    ]
    truth = torch.cat([t.double().flatten() for t in tensors]).norm()
    norm = grad_norm(tensors)
    torch.testing.assert_close(norm, truth, rtol=1e-13, atol=0)
    assert float(norm) == pytest.approx(global_norm(t.float() for t in tensors), rel=1e-6)
    assert float(clip_scale_of(norm, 1.0)) == pytest.approx(1 / float(truth), rel=1e-7)
    assert (
        clip_scale_of(norm, 1e4) == 1 == clip_scale_of(norm, None) == clip_scale_of(norm * 0, 1.0)
    )
    assert grad_norm([]) == 0 == grad_norm([torch.zeros(0)])
    assert float(grad_norm([torch.tensor([3e30, 4e30])])) == pytest.approx(
        5e30, rel=1e-7
    )  # squares beyond float32
    for bad in (torch.nan, torch.inf, -torch.inf):
        norm = grad_norm([torch.ones(3), torch.tensor([1.0, bad])])
        assert not torch.isfinite(norm)
        assert clip_scale_of(norm, 1.0) == 0 == clip_scale_of(norm, None)


def test_the_norm_does_not_depend_on_the_threads():
    tensors, norms = [torch.randn(3_000_001), torch.randn(17)], []
    for count in (1, 2, 3):
        with use_threads(count):
            norms.append(float(grad_norm(tensors)))
    assert norms[0] == norms[1] == norms[2]


def test_bias_corrections():
    assert bias_corrections(0.9, 0.95, 1) == (1 - 0.9, math.sqrt(1 - 0.95))
    assert bias_corrections(0.9, 0.95, 100_000) == (1.0, 1.0)


def test_on_the_cpu_the_definition_runs_and_nothing_warns():
    assert (
        dict(zip(*(ops.backends_table().columns[i].cells for i in (0, 5)), strict=True))["adamw"]
        == "reference"
    )
    state = fresh(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(state, [torch.ones(3)])
        with backend("cpp"):
            steps(state, [torch.ones(3)])
    with backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        if not torch.cuda.is_available():
            with pytest.raises(BackendError, match="op 'adamw'"):
                steps(state, [torch.ones(3)])


def test_what_was_written_to_is_seen():
    """Model weights tell a stale compute copy by the version of the master."""
    state = [torch.nn.Parameter(torch.ones(3)), torch.zeros(3), torch.zeros(3)]
    before = state[0]._version
    steps(state, [torch.ones(3)])
    assert state[0]._version > before and state[0].grad is None and state[0].is_leaf


def test_what_does_not_fit_is_named():
    state = fresh((3, 4))
    for changes, message in (
        ({1: torch.zeros(4, 3)}, r"grad: got shape \(4, 3\), want \(3, 4\) as master"),
        (
            {2: torch.zeros(3, 4).bfloat16()},
            "exp_avg: got torch.bfloat16, want torch.float32 as master",
        ),
        ({0: state[0].bfloat16()}, "master: got torch.bfloat16, want float32"),
        ({3: torch.zeros(4, 3).T}, r"exp_avg_sq: got strides \(1, 3\), want a contiguous tensor"),
        ({4: torch.zeros(3)}, r"copy: got shape \(3,\), want"),
        ({5: torch.zeros(3, 4).double()}, "ema: got torch.float64, want torch.float32"),
    ):
        given = [state[0], torch.zeros(3, 4), *state[1:], None, None]
        for place, tensor in changes.items():
            given[place] = tensor
        with pytest.raises(ValueError, match=message):
            adamw_step(*given, **SETTINGS, bias_correction1=0.1, bias_correction2_sqrt=0.2)
