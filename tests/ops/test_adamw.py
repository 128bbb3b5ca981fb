"""adamw: the definition against torch.optim.AdamW to the bit and the golden numbers; C++ of every class against the
definition in float64, the packed copy against pack_weight, the average against EMA's. On a GPU:
tests/triton/test_triton_adamw.py."""

import math
import warnings

import pytest
import torch
from compare import assert_close
from cpu_classes import runnable_classes, use_class, use_threads

from engine import ops
from engine.kernels._backend import BackendError, backend, extension
from engine.kernels.adamw import (
    SQUARES,
    adamw_step,
    adamw_step_reference,
    bias_corrections,
    clip_scale_of,
    grad_norm,
    grad_norm_reference,
)
from engine.kernels.linear import pack_weight
from engine.run.ema import EMA
from engine.run.optim import global_norm

NAMES = ("master", "exp_avg", "exp_avg_sq", "copy", "ema")
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
    with backend("reference"):
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


def test_golden(golden, precision):
    for case in golden["adam"]:
        given, size = case["inputs"], (19,)
        state = (torch.full(size, given["w0"], dtype=precision.dtype), *fresh(size, precision.dtype)[1:])
        grads = zip(given["grads"], case["outputs"]["w"], strict=True)
        for t, (grad, want) in enumerate(grads, start=1):
            one, two = bias_corrections(given["beta1"], given["beta2"], t)
            eps = given["eps"] / two if given["style"] == "tf" else given["eps"]
            betas = given["beta1"], given["beta2"]
            grad = torch.full(size, grad, dtype=precision.dtype)
            adamw_step(state[0], grad, *state[1:], None, None, given["lr"], *betas, eps, 0.0, one, two)
            precision.assert_close(state[0], torch.full_like(state[0], want), "w")
            if precision.dtype == torch.float32:
                # Of the distance moved, not of the weight: 1 - 1e-3 would hide an error of the step.
                moved = pytest.approx([given["w0"] - want] * 19, rel=1e-3, abs=2e-7)
                assert (given["w0"] - state[0]).tolist() == moved


def begun(shape, copy=None, ema=True):
    """What a step writes, by NAMES; moments of a few steps ago, so that no constant is hidden by a zero."""
    master = torch.randn(shape)
    average = torch.randn(shape) if ema else None
    rounded = None if copy is None else torch.full(shape, torch.nan).to(copy)
    return [master, torch.randn(shape) * 0.1, torch.rand(shape) * 0.1, rounded, average]


def run(written, grads, op=adamw_step, eps=1e-3, decay=0.1, clip=0.5):
    """Steps 3, 4, ..."""
    master, exp_avg, exp_avg_sq, copy, ema = written
    for t, grad in enumerate(grads, start=3):
        one, two = bias_corrections(0.9, 0.95, t)
        op(master, grad, exp_avg, exp_avg_sq, copy, ema, 0.01, 0.9, 0.95, eps, decay, one, two, clip, 0.75)
    return written


def copied(written, dtype=None):
    return [None if t is None else t.to(dtype or t.dtype, copy=True) for t in written]


def check(shape, grad_dtype=torch.float32, copy=torch.bfloat16, ema=True, scale=1.0, **options):
    written = begun(shape, copy, ema)
    wide, single = copied(written, torch.float64), copied(written)
    grads = [(torch.randn(shape) * scale).to(grad_dtype) for _ in range(3)]
    ours = run(written, grads, **options)
    plain = run(single, grads, adamw_step_reference, **options)
    truth = run(wide, grads, adamw_step_reference, **options)
    for name, o, r, t in zip(NAMES, ours, plain, truth, strict=True):
        if t is not None:
            assert o.dtype == r.dtype
            assert_close(o, r, t, name)
    if copy is not None:
        assert torch.equal(ours[3], ours[0].to(copy)), "the copy is the master, rounded to nearest even"


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy", [None, torch.float32, torch.bfloat16])
def test_cpp_against_float64(cpu_class, grad_dtype, copy):
    check((3, 577), grad_dtype, copy, ema=copy != torch.float32)


@pytest.mark.parametrize("shape", [(0,), (1,), (), (3, 0), (7,), (8,), (15,), (17,), (31,), (129,)])
def test_cpp_sizes(cpu_class, shape):
    check(shape)


@pytest.mark.parametrize("clip", [1.0, 0.125, torch.tensor(0.3), torch.tensor(0.3).double()])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_cpp_scales_and_decay(cpu_class, clip, decay):
    check((37,), clip=clip, decay=decay)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e4, 1e15])
def test_cpp_sizes_of_gradients(cpu_class, scale):
    check((65,), copy=None, ema=False, scale=scale, eps=1e-8)


def test_cpp_rows_that_are_not_aligned(cpu_class):
    """Views at an offset, as the weights that a fused copy is made of."""
    whole = [None if t is None else torch.cat([t[:1], t]) for t in begun((70,), torch.bfloat16)]
    grads, alone = [torch.randn(70)], [t[1:].clone() for t in whole]
    before = [t[0].clone() for t in whole]
    run([t[1:] for t in whole], grads)
    assert all(torch.equal(t[1:], o) for t, o in zip(whole, run(alone, grads), strict=True))
    assert all(torch.equal(t[0], b) or t[0].isnan() for t, b in zip(whole, before, strict=True))


def test_a_copy_rounds_to_nearest_even(cpu_class):
    values = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, 1e-40, 0.1]).repeat(5)
    zeros, copy = torch.zeros(3, 30), torch.zeros(30, dtype=torch.bfloat16)
    adamw_step(values, *zeros, copy, None, 0.0, 0.9, 0.95, 1e-8, 0.0, 1.0, 1.0)
    assert copy[:4].tolist() == [1.0, 1.015625, -1.0, math.inf]
    assert torch.equal(copy, values.bfloat16())


def test_infinities_and_nan_stay_where_they_are(cpu_class):
    for bad in (torch.inf, -torch.inf, torch.nan):
        grad, written = torch.ones(40), begun((40,), torch.bfloat16)
        grad[21] = bad
        ours = run(written, [grad])
        for name, tensor in zip(NAMES, ours, strict=True):
            assert (~torch.isfinite(tensor)).nonzero().tolist() == [[21]], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (64, 70), (33, 1), (0, 5), (5, 0), (32, 129)])
def test_the_packed_copy_is_that_of_the_new_master(cpu_class, shape, dtype):
    """All bytes, padding too, in the memory that was there; in float32 the row-major copy is the master's memory."""
    written, grads = begun(shape), [torch.randn(shape), torch.randn(shape).bfloat16()]
    other = copied(written)
    weight = pack_weight(written[0], dtype)
    shared = dtype == torch.float32
    places = weight.data.data_ptr(), weight.dense.data_ptr()
    assert shared == (written[0].data_ptr() == weight.dense.data_ptr()) or 0 in shape
    written[3] = weight
    run(written, grads)
    fresh_one = pack_weight(written[0].clone(), dtype)
    assert torch.equal(weight.dense, written[0].to(dtype)) and torch.equal(weight.data, fresh_one.data)
    assert places == (weight.data.data_ptr(), weight.dense.data_ptr())
    run(other, grads)  # packed or not, the same step
    assert all(torch.equal(written[i], other[i]) for i in (0, 1, 2, 4))


def test_a_float32_copy_of_its_own_is_written_too(cpu_class):
    written = begun((17, 9))
    written[3] = pack_weight(written[0].clone(), torch.float32)
    run(written, [torch.randn(17, 9)])
    assert torch.equal(written[3].dense, written[0])
    assert torch.equal(written[3].data, pack_weight(written[0].clone(), torch.float32).data)


def test_the_average_is_ema_s_to_the_bit(cpu_class):
    written, grad = begun((41, 9)), torch.randn(41, 9)
    parameter = torch.nn.Parameter(written[0].clone())
    ema = EMA({"w": parameter}, 0.75)
    ema.averages["w"].copy_(written[4])
    run(written, [grad])
    with torch.no_grad():
        parameter.copy_(written[0])
    ema.update()
    assert torch.equal(written[4], ema.averages["w"])


def test_every_class_takes_the_same_step():
    written, grads, found = begun((35, 67)), [torch.randn(35, 67)], []
    for name in runnable_classes():
        with use_class(name):
            packed = copied(written)
            packed[3] = pack_weight(packed[0].clone(), torch.bfloat16)
            run(packed, grads)
            found.append([packed[0], packed[1], packed[2], packed[3].dense, packed[4]])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("shape", [(1000, 130), (130_003,)])
def test_a_step_with_threads_of_any_number(cpu_class, shape):
    written, grads, found = begun(shape, torch.bfloat16), [torch.randn(shape)], []
    for count in (1, 2, 3):
        with use_threads(count):
            own = copied(written)
            if len(shape) == 2:
                own[3] = pack_weight(own[0], torch.bfloat16)
            run(own, grads)
            copy = [own[3]] if len(shape) == 1 else [own[3].dense, own[3].data]
            found.append([*own[:3], *copy, own[4]])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_a_packed_copy_on_the_definition_is_renewed_too(cpu_class):
    written, grads = begun((20, 30)), [torch.randn(20, 30)]
    written[3] = pack_weight(written[0], torch.bfloat16)
    with backend("reference"):
        run(written, grads)
    fresh_one = pack_weight(written[0], torch.bfloat16)
    assert torch.equal(written[3].dense, fresh_one.dense) and torch.equal(written[3].data, fresh_one.data)


def test_gradients_of_any_dtype_are_clipped_and_stay():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state, grad = fresh((7, 5)), torch.randn(7, 5).to(dtype)
        other, before = [t.clone() for t in state], grad.clone()
        steps(state, [grad], clip_scale=0.25)
        steps(other, [grad.float() * 0.25], clip_scale=torch.ones(()))
        assert all(map(torch.equal, state, other)) and torch.equal(grad, before)


@pytest.mark.parametrize("scale", [0.0, torch.zeros(())])
def test_a_scale_of_zero_leaves_a_packed_copy(cpu_class, scale):
    for name in ("cpp", "reference"):
        written = begun((9, 5))
        written[3] = weight = pack_weight(written[0] + 1, torch.bfloat16)
        before = [t.clone() for t in (*written[:3], weight.dense, weight.data, written[4])]
        with backend(name):
            run(written, [torch.full((9, 5), torch.nan)], clip=scale)
        after = (*written[:3], weight.dense, weight.data, written[4])
        assert all(map(torch.equal, after, before))


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


@pytest.mark.parametrize("size", [0, 1, 7, 16, 17, 63, SQUARES - 1, SQUARES, SQUARES + 5, 3 * SQUARES + 33])
def test_cpp_norm(cpu_class, size):
    for x in (torch.randn(size), torch.randn(size).bfloat16(), torch.randn(size) * 1e30):
        ours, truth = grad_norm([x, torch.ones(3)]), grad_norm_reference([x.double(), torch.ones(3)])
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, truth, rtol=1e-14, atol=0)


def test_the_norm_does_not_depend_on_the_threads():
    tensors, norms = [torch.randn(3_000_001), torch.randn(17)], []
    for count in (1, 2, 3):
        with use_threads(count):
            norms.append(float(grad_norm(tensors)))
    assert norms[0] == norms[1] == norms[2]


def test_bias_corrections():
    assert bias_corrections(0.9, 0.95, 1) == (1 - 0.9, math.sqrt(1 - 0.95))
    assert bias_corrections(0.9, 0.95, 100_000) == (1.0, 1.0)


def test_the_table_names_the_kernel_and_a_backend_that_cannot_run_is_refused():
    cells = [ops.backends_table().columns[i].cells for i in (0, 5)]
    assert dict(zip(*cells, strict=True))["adamw"] == ("cpp" if extension() else "reference")
    if extension() is None:
        pytest.skip("the extension is not built")
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
