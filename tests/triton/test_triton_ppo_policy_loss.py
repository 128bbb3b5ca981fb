"""ppo_policy_loss's Triton kernels against the float64 definition."""

import pytest
import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE, DTYPES
from mutations import mutations
from token_ops import FLOAT32, blocks, golden, helper_mutations, on_device, ops_file

from engine.kernels import ppo_policy_loss as contract
from engine.kernels._backend import backend
from engine.kernels.ppo_policy_loss import ppo_policy_loss_and_sums, ppo_policy_loss_reference
from engine.kernels.triton import _reduce
from engine.kernels.triton import ppo_policy_loss as kernels


def inputs(n, dtype=torch.float32, scale=0.3):
    old, advantage = -torch.rand(n), torch.randn(n)
    new = old + torch.randn(n) * scale
    new, old, advantage = (x.to(dtype).to(DEVICE) for x in (new, old, advantage))
    # away from the edges of the clip, where rounding decides
    ratio = (new.double() - old.double()).exp()
    advantage[((ratio - 1).abs() - 0.2).abs() < 1e-5] = 0
    return new, old, advantage


def defined(new, old, advantage, clamp):
    new = new.clone().requires_grad_()
    loss, sums = ppo_policy_loss_reference(new, old, advantage, 0.2, None, clamp)
    loss.backward()
    return loss.detach(), sums, new.grad


def on_triton(given, shift=0, **options):
    with guarded() as guards, backend("triton"):
        new, old, advantage = (guards.place(x, shift) for x in given)
        new.requires_grad_()
        loss, sums = ppo_policy_loss_and_sums(new, old, advantage, **options)
        loss.backward()
    return loss.detach(), sums, new.grad


def check(n, dtype=torch.float32, scale=0.3, clamp=None):
    given = inputs(n, dtype, scale)
    loss, sums, grad = on_triton(given, log_ratio_clamp=clamp)
    _, _, plain = defined(*given, clamp)
    true_loss, true_sums, true_grad = defined(*(x.double() for x in given), clamp)
    assert loss.dtype == grad.dtype == dtype and sums.dtype == torch.float64
    ratio = (given[0].double() - given[1].double()).clamp(max=clamp or 1e4).exp()
    size = float((given[2].double() * ratio.clamp(min=1)).abs().mean()) if n else 0.0
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), true_loss, rtol=rounding, atol=rounding * size)
    assert_close(grad, plain, true_grad, "grad", units=4)
    torch.testing.assert_close(sums, true_sums, rtol=1e-5, atol=1e-6 * max(n, 1) * min(scale, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 16, 77])
def test_against_float64(n, dtype):
    with blocks(16):
        check(n, dtype)


@pytest.mark.parametrize("scale", [1e-4, 3.0])
@pytest.mark.parametrize("clamp", [None, 2.0])
def test_small_and_large_changes(scale, clamp):
    with blocks(16):
        check(60, scale=scale, clamp=clamp)


def test_blocks_of_the_table():
    check(1500)


@golden("ppo_policy_loss")
def test_golden(case):
    with blocks(4), on_device():
        ops_file("test_ppo_policy_loss").test_golden(case, FLOAT32)


def test_the_cases_of_the_clip_ties_and_nan():
    theirs = ops_file("test_ppo_policy_loss")
    with on_device():
        for advantage in (1.0, -1.0):
            for ratio in (0.7, 1.0, 1.3):
                theirs.test_where_the_gradient_flows(FLOAT32, advantage, ratio)
        theirs.test_equal_policies_have_ratio_one_exactly(FLOAT32)
        theirs.test_overflow_of_a_clipped_ratio_stays_out_of_the_gradient(FLOAT32)
        theirs.test_the_clamp_bounds_a_bad_token(FLOAT32)
        theirs.test_nan_is_not_hidden(FLOAT32)
        theirs.test_without_tokens(FLOAT32)


def test_micro_batches_add_up_to_the_batch():
    with blocks(16), on_device():
        ops_file("test_ppo_policy_loss").test_micro_batches_add_up_to_the_batch(FLOAT32)


def test_extremes():
    given = [torch.tensor(x, device=DEVICE) for x in ([-1e4, 1e4, float("-inf"), 0.0], [0.0] * 4)]
    given.append(torch.tensor([1.0, 1.0, 1.0, -1.0], device=DEVICE))
    loss, sums, grad = on_triton(given)
    want, want_sums, want_grad = defined(*given, None)
    assert torch.equal(loss, want) and torch.equal(grad, want_grad)
    torch.testing.assert_close(sums, want_sums, equal_nan=True)


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
    unread = ppo_policy_loss_and_sums(meta, meta, meta, denominator=torch.empty((), device="meta"))
    assert unread[0].device.type == "meta"  # float() of it would raise
    want = on_triton(given, denominator=torch.tensor(70))
    monkeypatch.setattr(contract, "divided_later", lambda d, _: isinstance(d, torch.Tensor))
    for count in (70, 70.0):
        got = on_triton(given, denominator=torch.tensor(count, device=DEVICE, dtype=None))
        assert got[0].dtype == torch.float32
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(got[2], want[2], rtol=1e-6, atol=0)


DEFECTS = {
    "gradient kept where clipped": ("tl.where(clipped | (u != change)", "tl.where(u != change"),
    "a tie loses the gradient": ("clipped = bounded > free", "clipped = bounded >= free"),
    "clipped the other way": ("clipped = bounded > free", "clipped = bounded < free"),
    "one edge": ("_clamp(rho, low, high)", "_clamp(rho, low, 1e9)"),
    "edges around 0": ("_clamp(rho, low, high)", "_clamp(rho, low - 1, high - 1)"),
    "the clamp is forgotten": ("u = _clamp(change, -limit, limit)", "u = change"),
    "a clamped token has a gradient": ("clipped | (u != change)", "clipped"),
    "sign": ("free = -a * rho", "free = a * rho"),
    "ratio of the old policy": ("change = lp - old", "change = old - lp"),
    "a gradient per batch": ("scale * slope,", "slope,"),
    "k1's sign": ("-tl.sum(wide, 0)", "tl.sum(wide, 0)"),
    "k2 without its square": ("tl.sum(wide * wide, 0)", "tl.sum(wide, 0)"),
    "k3 without its digits": ("expm1_minus(u).to(tl.float64)", "(rho - 1.0 - u).to(tl.float64)"),
    "the excess, not its square": ("tl.sum(excess * excess, 0)", "tl.sum(excess, 0)"),
    "partials overwritten": ("partials += program * 7", "partials += program * 6"),
    "the last token is left out": (
        "store_block(grad, first, n,",
        "store_block(grad, first, n - 1,",
    ),
}


def check_all():
    torch.manual_seed(3)
    with blocks(16):
        check(37, scale=0.3, clamp=0.5)
        check(37, scale=1e-3)


test_defects_are_caught = mutations(kernels, DEFECTS)(check_all)
SUM_DEFECTS = {
    "the first rows only": ("for first in range(0, rows, ROWS)", "for first in range(0, 1, ROWS)"),
    "the last rows only": ("total += tl.sum", "total = tl.sum"),
    "rows of another width": ("* COLUMNS + column[None, :]", "* WIDTH + column[None, :]"),
    "not divided": ("(total / divisor)", "total"),
    "rows behind the end": ("(row < rows)[:, None] &", "(row < rows + 1)[:, None] &"),
    "no tokens": ("column == 0, tl.cast(tokens, tl.float64), total", "column == 0, 0.0, total"),
}


def check_sums():
    torch.manual_seed(3)
    with blocks(16):
        check(77)  # 5 partial sums, 2 rows a block


test_defects_of_the_sums_are_caught = helper_mutations(_reduce, kernels, SUM_DEFECTS)(check_sums)


def test_without_a_defect_the_checks_pass():
    check_all()
    check_sums()
