"""adamw's Triton kernels against the float64 definition, over several steps."""

from collections.abc import Iterator

import pytest
import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE, DTYPES
from mutations import mutations
from torch import Tensor

from engine.kernels import _backend
from engine.kernels._backend import backend
from engine.kernels.adamw import (
    SQUARES,
    adamw_step,
    adamw_step_reference,
    bias_corrections,
    clip_scale_of,
    grad_norm,
)
from engine.kernels.triton import _launch
from engine.kernels.triton import adamw as kernels
from engine.kernels.triton._launch import Config

SMALL = Config({"BLOCK": 16})
NAMES = ("master", "exp_avg", "exp_avg_sq", "copy", "ema")
EMA_DECAY = 0.75


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    """Tensors are made where kernels run."""
    with DEVICE:
        yield


def start(shape, copy: torch.dtype | None, ema: bool) -> list[Tensor | None]:
    """What a step writes, by NAMES; moments of a few steps ago, so that no constant is hidden by a zero."""
    master, exp_avg = torch.randn(shape), torch.randn(shape) * 0.1
    exp_avg_sq, average = torch.rand(shape) * 0.1, torch.randn(shape) if ema else None
    tensors = (master, exp_avg, exp_avg_sq, None if copy is None else master.to(copy), average)
    return [None if t is None else t.to(DEVICE) for t in tensors]


def numbers(step: int, eps: float = 1e-3, decay: float = 0.1) -> tuple[float, ...]:
    return (0.01, 0.9, 0.95, eps, decay, *bias_corrections(0.9, 0.95, step))


def run(op, written: list[Tensor | None], grads: list[Tensor], clip, **options) -> list[Tensor]:
    master, exp_avg, exp_avg_sq, copy, ema = written
    for t, grad in enumerate(grads, start=3):
        op(master, grad, exp_avg, exp_avg_sq, copy, ema, *numbers(t, **options), clip, EMA_DECAY)
    return [t for t in written if t is not None]


def check(
    shape, grad_dtype, copy, ema, clip: float | Tensor = 0.5, scale: float = 1.0, **options
) -> None:
    written = start(shape, copy, ema)
    grads = [(torch.randn(shape) * scale).to(grad_dtype).to(DEVICE) for _ in range(3)]
    wide, single = (
        [None if t is None else t.to(d, copy=True) for t in written] for d in (torch.float64, None)
    )
    with guarded() as guards, backend("triton"):
        placed = [None if t is None else guards.written(t) for t in written]
        given = [guards.place(g) for g in grads]
        ours = run(
            adamw_step,
            placed,
            given,
            guards.place(clip) if isinstance(clip, Tensor) else clip,
            **options,
        )
    plain = run(adamw_step_reference, single, grads, clip, **options)
    truth = run(adamw_step_reference, wide, grads, clip, **options)
    names = [name for name, t in zip(NAMES, written, strict=True) if t is not None]
    for name, o, r, t in zip(names, ours, plain, truth, strict=True):
        assert o.dtype == r.dtype
        assert_close(o, r, t, name, units=4)
    if copy is not None:
        assert torch.equal(ours[3], ours[0].to(copy)), (
            "the copy is the master, rounded to nearest even"
        )


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("copy", [None, *DTYPES])
def test_against_float64(grad_dtype, copy):
    check((3, 577), grad_dtype, copy, ema=copy != torch.float32)


@pytest.mark.parametrize("shape", [(0,), (1,), (), (1023,), (1024,), (1025,)])
def test_sizes(shape):
    check(shape, torch.float32, torch.bfloat16, ema=True)


@pytest.mark.parametrize("clip", [1.0, 0.125, torch.tensor(0.125), torch.tensor(0.3).double()])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_scales_and_decay(clip, decay):
    clip = clip.to(DEVICE) if isinstance(clip, Tensor) else clip
    check((37,), torch.float32, torch.bfloat16, True, clip, decay=decay)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e4, 1e15])
def test_sizes_of_gradients(scale):
    """v is a subnormal of float32 where gradients are 1e-20 and less: sqrt(v) is lost beside eps there and here."""
    check((65,), torch.float32, None, False, scale=scale, eps=1e-8)


def test_infinities_and_nan_arrive():
    for bad in (torch.inf, -torch.inf, torch.nan):
        grad, written = torch.ones(5, device=DEVICE), start(5, None, False)
        grad[2] = bad
        with guarded() as guards, backend("triton"):
            ours = run(
                adamw_step, [None if t is None else guards.written(t) for t in written], [grad], 1.0
            )
        assert [bool(x) for x in torch.isfinite(ours[0])] == [True, True, False, True, True]


@pytest.mark.parametrize("scale", [0.0, torch.zeros(())])
def test_a_scale_of_zero_moves_nothing(scale):
    written = start(37, torch.bfloat16, True)
    before, grad = [t.clone() for t in written], torch.full((37,), torch.nan, device=DEVICE)
    clip = scale.to(DEVICE) if isinstance(scale, Tensor) else scale
    with backend("triton"):
        assert all(map(torch.equal, run(adamw_step, written, [grad], clip), before))


def test_golden(golden):
    for case in golden["adam"]:
        given = case["inputs"]
        state = [torch.full((19,), given["w0"], device=DEVICE), *torch.zeros(2, 19, device=DEVICE)]
        for t, (grad, want) in enumerate(
            zip(given["grads"], case["outputs"]["w"], strict=True), start=1
        ):
            one, two = bias_corrections(given["beta1"], given["beta2"], t)
            eps = given["eps"] / two if given["style"] == "tf" else given["eps"]
            grad = torch.full((19,), grad, device=DEVICE)
            with backend("triton"):
                adamw_step(
                    state[0], grad, *state[1:], None, None,
                    given["lr"], given["beta1"], given["beta2"], eps, 0.0, one, two,
                )  # fmt: skip
            torch.testing.assert_close(
                state[0], torch.full_like(state[0], want), rtol=2e-5, atol=2e-6
            )
            # Of the distance moved, not of the weight: 1 - 1e-3 would hide an error of the step.
            assert (1 - state[0]).tolist() == pytest.approx([1 - want] * 19, rel=1e-3, abs=2e-7)


def test_golden_average(golden):
    """Steps that move nothing but the average, towards the weights of the case."""
    (case,) = golden["ema"]
    given = case["inputs"]
    ema = torch.full((19,), given["init"], device=DEVICE)
    for weight, want in zip(given["weights"], case["outputs"]["ema"], strict=True):
        master, zeros = torch.full((19,), weight, device=DEVICE), torch.zeros(3, 19, device=DEVICE)
        numbers = (0.0, 0.9, 0.95, 1e-8, 0.0, 1.0, 1.0)
        with backend("triton"):
            adamw_step(master, *zeros, None, ema, *numbers, ema_decay=given["decay"])
        torch.testing.assert_close(ema, torch.full_like(ema, want), rtol=1e-6, atol=0)


def test_a_copy_rounds_to_nearest_even():
    master = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, 1e-40, 0.1], device=DEVICE)
    zeros, copy = (
        torch.zeros(3, 6, device=DEVICE),
        torch.zeros(6, dtype=torch.bfloat16, device=DEVICE),
    )
    with backend("triton"):
        adamw_step(master, *zeros, copy, None, 0.0, 0.9, 0.95, 1e-8, 0.0, 1.0, 1.0)
    assert copy[:4].tolist() == [1.0, 1.015625, -1.0, float("inf")] and torch.equal(
        copy, master.bfloat16()
    )


def test_unaligned_tensors_and_many_blocks():
    written, grad = start(61, torch.bfloat16, True), torch.randn(61, device=DEVICE)
    other = [t.clone() for t in written]
    with guarded() as guards:
        placed = [guards.place(t, shift=1) for t in written]
        guards._inputs.clear()  # they are written to
        master, exp_avg, exp_avg_sq, copy, ema = placed
        given = guards.place(grad, shift=1)
        kernels.adamw_step(
            master,
            given,
            exp_avg,
            exp_avg_sq,
            copy,
            ema,
            *numbers(3),
            0.5,
            None,
            EMA_DECAY,
            tuned=SMALL,
        )
    with backend("triton"):
        run(adamw_step, other, [grad], 0.5)
    assert all(map(torch.equal, placed, other)), "an element is its own, whatever the blocks"


def test_what_was_written_to_is_seen():
    written = start(3, torch.bfloat16, True)
    written[0] = torch.nn.Parameter(written[0])
    before = [t._version for t in written]
    with backend("triton"):
        run(adamw_step, written, [torch.ones(3, device=DEVICE)], 1.0)
    assert all(t._version > v for t, v in zip(written, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [SQUARES], [0, SQUARES + 1, 3], [5, 2 * SQUARES - 1]]
)
def test_norm(dtype, sizes):
    tensors = [torch.randn(n).to(dtype).to(DEVICE) for n in sizes]
    truth = torch.cat([torch.zeros(1), *tensors]).double().norm() if sizes else torch.zeros(())
    with guarded() as guards, backend("triton"):
        ours = grad_norm([guards.place(t) for t in tensors])
        again = grad_norm([guards.place(t, shift=1) for t in tensors])
    assert ours.dtype == torch.float64 and torch.equal(ours, again)
    assert float(ours) == pytest.approx(float(truth), rel=1e-13)


def test_norm_of_extremes():
    for values, want in (
        ([3e30, 4e30], 5e30),  # squares beyond float32
        ([3e-30, 4e-30], 5e-30),
        ([1.0, torch.inf], torch.inf),
        ([1.0, -torch.inf], torch.inf),
        ([1.0, torch.nan], torch.nan),
    ):
        with backend("triton"):
            norm = grad_norm([torch.tensor(values, device=DEVICE), torch.zeros(3, device=DEVICE)])
        assert float(norm) == pytest.approx(want, rel=1e-6, nan_ok=True)
        assert (clip_scale_of(norm, 1.0) == 0) == (not torch.isfinite(norm))


def test_partial_sums_of_many_blocks_are_added_in_order():
    x = torch.randn(SQUARES + 50, dtype=torch.float32)
    with guarded() as guards:
        placed = guards.place(x)
        sums = kernels.square_sums(placed, Config({"BLOCK": 4096}))
        total = kernels.ordered_sum(guards.place(x.double()), Config({"BLOCK": 2048}))
    want = torch.stack([part.double().square().sum() for part in (x[:SQUARES], x[SQUARES:])])
    torch.testing.assert_close(sums, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(total, x.double().sum(), rtol=1e-11, atol=1e-11)


def test_no_value_is_read():
    """On shapes alone, as kernels are compiled ahead of time."""
    seen = []
    token = _launch.observer.set(lambda launch: seen.append(launch.kernel.fn.__name__) is not None)
    try:
        x = torch.empty(5, device="meta")
        kernels.adamw_step(x, x, x, x, x, x, *numbers(3), 1.0, torch.empty((), device="meta"), 0.5)
        assert kernels.ordered_sum(kernels.square_sums(x)).shape == ()
    finally:
        _launch.observer.reset(token)
    assert seen == ["_step", "_squares", "_ordered_sum"]


DEFECTS = {
    "gradient not scaled": ("to(tl.float32) * scale", "to(tl.float32)"),
    "the device's scale not read": ("scale = tl.load(clip).to(tl.float32)", "scale = 1.0"),
    "first moment with the other's rate": ("m += tl.cast(gain1,", "m += tl.cast(gain2,"),
    "second moment of the scaled-twice gradient": ("tl.float32) * g * g", "tl.float32) * g * g * scale"),
    "second moment not decayed": ("v = tl.cast(beta2, tl.float32) * v", "v = v"),
    "eps inside the root": (
        "tl.sqrt_rn(v) * tl.cast(inverse_correction2, tl.float32)\n    denominator += tl.cast(eps,",
        "tl.sqrt_rn(v + eps) * tl.cast(inverse_correction2, tl.float32)\n    denominator += tl.cast(0.0,",
    ),
    "second correction without its root": ("1.0 / bias_correction2_sqrt,", "1.0 / bias_correction2_sqrt**2,"),
    "first correction forgotten": ("lr / bias_correction1,", "lr,"),
    "decay of the loss instead of the weight": ("lr * weight_decay,", "weight_decay,"),
    "decay's sign": ("w -= tl.cast(decay, tl.float32) * w + update", "w -= update - tl.cast(decay, tl.float32) * w"),
    "the average of the old master": (
        "average += tl.cast(ema_gain, tl.float32) * (w - average)",
        "average += tl.cast(ema_gain, tl.float32) * (w + update - average)",
    ),
    "the average's weights swapped": ("        1.0 - ema_decay,", "        float(ema_decay),"),
    "the copy of the old master": ("(copy, first, n, w,", "(copy, first, n, w + update,"),
    "the last element left out": ("load_block(master, first, n,", "load_block(master, first, n - 1,"),
    "the copy cut off": (
        "(copy, first, n, w,",
        "(copy, first, n, (w.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True),",
    ),
    "moments swapped": ("(exp_avg_sq, first, n, v,", "(exp_avg_sq, first, n, m,"),
    "stored behind the last": ("store_block(master, first, n,", "store_block(master, first, n + 1,"),
    "average stored behind the last": ("store_block(ema, first, n,", "store_block(ema, first, n + 1,"),
}  # fmt: skip


def check_everything_at_once() -> None:
    check((37, 3), torch.float32, torch.bfloat16, True, torch.tensor(0.3, device=DEVICE))


def test_everything_at_once():
    check_everything_at_once()


@mutations(kernels, DEFECTS)
def test_defects_are_caught():
    check_everything_at_once()


@mutations(kernels, {"a scale of zero is a step": ("if scale == 0.0:\n            return", "pass")})
def test_a_step_that_should_not_be_is_caught():
    test_a_scale_of_zero_moves_nothing(torch.zeros(()))


SQUARE, PARTIAL = "total += element * element", "total += tl.load(x + at, mask=at < n, other=0.0)"
NORM_DEFECTS = {
    "the last element left out": ("tl.minimum(n,", "tl.minimum(n - 1,"),
    "chunks that overlap": ("program * CHUNK + start", "program * (CHUNK - 1) + start"),
    "only the last block": (SQUARE, SQUARE.replace("+=", "=")),
    "no square": (SQUARE, "total += element"),
    "float32 squares": (
        f".to(tl.float64)\n        {SQUARE}",
        f".to(tl.float32)\n        {SQUARE}",
    ),
    "only the last block of partial sums": (PARTIAL, PARTIAL.replace("+=", "=")),
    "partial sums beyond the last": (PARTIAL, PARTIAL.replace("<", "<=")),
    "the last partial sum left out": (PARTIAL, PARTIAL.replace("< n", "< n - 1")),
    "the first block of partial sums again": (
        "at = start + tl.arange(0, BLOCK)",
        "at = tl.arange(0, BLOCK)",
    ),
}


def check_sums() -> None:
    tensors = [torch.randn(n, device=DEVICE) for n in (SQUARES + 7, 3)]
    many = torch.rand(2000, dtype=torch.float64, device=DEVICE)
    with guarded() as guards, backend("triton"):
        ours = grad_norm([guards.place(t) for t in tensors])
        total = _backend.triton_kernels("adamw").ordered_sum(guards.place(many))
    assert float(ours) == pytest.approx(float(torch.cat(tensors).double().norm()), rel=1e-12)
    assert float(total) == pytest.approx(float(many.sum()), rel=1e-12)


def test_sums():
    check_sums()


@mutations(kernels, NORM_DEFECTS)
def test_defects_of_the_norm_are_caught():
    check_sums()
