"""ppo_value_loss's Triton kernels against the float64 definition."""

import pytest
import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE, DTYPES
from mutations import mutations
from token_ops import FLOAT32, blocks, golden, on_device, ops_file

from engine.kernels import ppo_value_loss as contract
from engine.kernels._backend import backend
from engine.kernels.ppo_value_loss import ppo_value_loss_and_sums, ppo_value_loss_reference
from engine.kernels.triton import ppo_value_loss as kernels


def inputs(n, dtype=torch.float32, scale=1.0):
    old, returns, change = torch.randn(3, n) * scale
    value = old + change * torch.tensor([0.01, 1.0])[torch.arange(n) % 2]
    return [x.to(dtype).to(DEVICE) for x in (value, old, returns)]


def defined(value, old, returns, clip):
    value = value.clone().requires_grad_()
    loss, sums = ppo_value_loss_reference(value, old, returns, clip)
    loss.backward()
    return loss.detach(), sums, value.grad


def on_triton(given, clip=0.2, shift=0, **options):
    with guarded() as guards, backend("triton"):
        value, old, returns = (guards.place(x, shift) for x in given)
        value.requires_grad_()
        loss, sums = ppo_value_loss_and_sums(value, old, returns, clip, **options)
        loss.backward()
    return loss.detach(), sums, value.grad


def check(n, dtype=torch.float32, clip=0.2, scale=1.0):
    given = inputs(n, dtype, scale)
    loss, sums, grad = on_triton(given, clip)
    _, _, plain = defined(*given, clip)
    true_loss, true_sums, true_grad = defined(*(x.double() for x in given), clip)
    assert loss.dtype == grad.dtype == dtype
    torch.testing.assert_close(
        loss.double(), true_loss, rtol=4 * torch.finfo(dtype).eps, atol=0
    )  # squares do not cancel
    assert_close(grad, plain, true_grad, "grad", units=4)
    assert torch.equal(sums, true_sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("n", [0, 1, 16, 77])
def test_against_float64(n, clip, dtype):
    with blocks(16):
        check(n, dtype, clip)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_small_and_large_values(scale):
    with blocks(16):
        check(60, clip=scale / 5, scale=scale)


def test_blocks_of_the_table():
    check(1500)


@golden("ppo_value_loss")
def test_golden(case):
    theirs = ops_file("test_ppo_value_loss")
    with blocks(4), on_device():
        theirs.test_golden(case, FLOAT32)
        theirs.test_without_clip_it_is_half_the_mean_square(case, FLOAT32)


def test_ties_bounds_and_nan():
    theirs = ops_file("test_ppo_value_loss")
    with on_device():
        theirs.test_the_value_inside_the_bounds_is_never_clipped(FLOAT32)
        theirs.test_a_tie_of_the_two_terms_keeps_the_gradient(FLOAT32)
        theirs.test_nan_is_not_hidden(FLOAT32)


def test_micro_batches_add_up_to_the_batch():
    with blocks(16), on_device():
        ops_file("test_ppo_value_loss").test_micro_batches_add_up_to_the_batch(FLOAT32)


def test_infinities():
    given = [torch.tensor(x, device=DEVICE) for x in ([float("-inf"), 1.0], [0.0, 0.0], [1.0, 1e4])]
    loss, sums, grad = on_triton(given)
    want, want_sums, want_grad = defined(*given, 0.2)
    assert torch.equal(loss, want) and torch.equal(sums, want_sums) and torch.equal(grad, want_grad)


def test_twice_cut_or_not_aligned_it_is_the_same():
    given = inputs(50, torch.bfloat16)
    with blocks(16):
        want = on_triton(given, denominator=50)
        again = on_triton(given, denominator=50)
        moved = on_triton(given, shift=1, denominator=50)
        cut = on_triton([x[7:30] for x in given], denominator=50)
    assert all(map(torch.equal, want, again)) and all(map(torch.equal, want, moved))
    assert torch.equal(cut[2], want[2][7:30])


def test_a_denominator_on_a_gpu_is_not_read(monkeypatch):
    given, meta = inputs(40), torch.empty(40, device="meta")
    unread = ppo_value_loss_and_sums(meta, meta, meta, denominator=torch.empty((), device="meta"))
    assert unread[0].device.type == "meta"  # float() of it would raise
    want = on_triton(given, denominator=torch.tensor(70))
    monkeypatch.setattr(contract, "divided_later", lambda d, _: isinstance(d, torch.Tensor))
    got = on_triton(given, denominator=torch.tensor([70.0], dtype=torch.float64, device=DEVICE))
    assert got[0].dtype == torch.float32 and got[0].shape == ()
    for o, w in zip(got, want, strict=True):
        torch.testing.assert_close(o, w, rtol=1e-6, atol=0)


DEFECTS = {
    "a tie loses the gradient": ("clipped = bounded_squared > squared", "clipped = bounded_squared >= squared"),
    "the smaller error": ("clipped = bounded_squared > squared", "clipped = bounded_squared < squared"),
    "bounds around the returns": ("v < old - clip, old - clip", "v < target - clip, target - clip"),
    "no upper bound": ("tl.where(v > old + clip, old + clip, v)", "v"),
    "gradient of the clipped": ("scale * tl.where(clipped, 0.0, error)", "scale * error"),
    "sign": ("error = v - target", "error = target - v"),
    "a gradient per batch": ("slope = scale * tl.where", "slope = tl.where"),
    "partials overwritten": ("partials + program * 2, tl", "partials + program, tl"),
    "half of the loss": ("2 * denominator", "denominator"),
    "the last token is left out": ("store_block(grad, first, n,", "store_block(grad, first, n - 1,"),
}  # fmt: skip


def check_all():
    torch.manual_seed(6)
    with blocks(16):
        check(37)


def test_without_a_defect_the_check_passes():
    check_all()


test_defects_are_caught = mutations(kernels, DEFECTS)(check_all)
