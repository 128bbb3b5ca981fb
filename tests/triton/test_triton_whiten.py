"""whiten's Triton kernels against the float64 definition."""

import pytest
import torch
from guards import guarded
from launching import DEVICE, DTYPES, check_on_triton, gradients_on_triton, on_triton
from mutations import mutations
from token_ops import FLOAT32, blocks, golden, helper_mutations, on_device, ops_file

from engine.kernels._backend import backend
from engine.kernels.triton import _blocks
from engine.kernels.triton import whiten as kernels
from engine.kernels.whiten import whiten, whiten_reference


def check(n, shift_mean, dtype=torch.float32, centre=0.0, scale=1.0):
    x, grad = (torch.randn(n) * scale + centre).to(dtype), torch.randn(n).to(dtype)
    ours, defined = (lambda x, op=op: op(x, shift_mean) for op in (whiten, whiten_reference))
    check_on_triton(ours, defined, (x,), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("n", [1, 3, 16, 151])
def test_against_float64(n, shift_mean, dtype):
    with blocks(16):
        check(n, shift_mean, dtype)


def test_blocks_of_the_table():
    check(2500, True)


@pytest.mark.parametrize("centre,scale", [(1e4, 1.0), (-1e4, 1e4), (0.0, 1e-5), (3.0, 1e-4)])
def test_far_from_zero_the_digits_stay(centre, scale):
    with blocks(16):
        check(100, True, centre=centre, scale=scale)
        check(100, False, centre=centre, scale=scale)


def test_without_tokens_and_of_equal_ones():
    empty = torch.empty(0, device=DEVICE)
    out, grad = gradients_on_triton(whiten, (empty,), empty)
    assert out.shape == grad.shape == (0,)
    with blocks(4):
        equal = torch.full((9,), 3.0, device=DEVICE)
        assert on_triton(whiten)(equal).eq(0).all()
        assert torch.equal(on_triton(whiten)(equal, False), equal)


@golden("whiten")
def test_golden(case):
    with blocks(4), on_device():
        ops_file("test_whiten").test_golden(case, FLOAT32)


def test_infinity_is_not_hidden():
    x = torch.tensor([1.0, float("-inf"), 2.0], device=DEVICE)
    assert on_triton(whiten)(x).isnan().all()


def test_twice_it_is_the_same_and_addresses_may_lie_anywhere():
    x = torch.randn(77, device=DEVICE).bfloat16()
    with blocks(16):
        want = on_triton(whiten)(x)
        assert torch.equal(on_triton(whiten)(x), want)
        with guarded() as guards, backend("triton"):
            assert torch.equal(whiten(guards.place(x, shift=1)), want)


DEFECTS = {
    "the mean of a full block": (
        "tl.minimum(n - first, BLOCK).to(tl.float64)\n    centred",
        "BLOCK\n    centred",
    ),
    "lanes behind the end count": (
        "centred = tl.where(first + tl.arange(0, BLOCK) < n, wide - mean, 0.0)\n    tl.store",
        "centred = wide - mean\n    tl.store",
    ),
    "squares of numbers that are not centred": (
        "tl.sum(centred * centred, 0)",
        "tl.sum(wide * wide, 0)",
    ),
    "products that are not centred": ("tl.sum(g * centred, 0)", "tl.sum(g * wide, 0)"),
    "blocks weigh alike": ("total += size * tl.load", "total += BLOCK * tl.load"),
    "squares around the blocks' own means only": ("within + size * off * off", "within"),
    "spread of the means only": ("within + size * off * off", "size * off * off"),
    "variance over n - 1": ("tl.sum(squares, 0) / count", "tl.sum(squares, 0) / (count - 1.0)"),
    "no eps": (" / count + eps)", " / count)"),
    "the first rows only": (
        "    for first in range(0, blocks, ROWS):\n        row = first + tl.arange(0, ROWS).to(tl.int64)\n        size",
        "    for first in range(0, 1, ROWS):\n        row = first + tl.arange(0, ROWS).to(tl.int64)\n        size",
    ),
    "the mean stays away": ("whitened += mean\n", "whitened += 0.0\n"),
    "the mean is not taken off": ("(wide - mean) * tl.load", "wide * tl.load"),
    "not divided by the deviation": ("(wide - mean) * tl.load(statistics + 1)", "wide - mean"),
    "the last number left out": ("store_block(y, first, n,", "store_block(y, first, n - 1,"),
    "products around the blocks' own means": ("products += g * off +", "products +="),
    "mean of the gradient": ("r * (g - mean_grad)", "r * g"),
    "slope's sign": (" - centred * slope", " + centred * slope"),
    "slope's power": ("slope = r * r * r *", "slope = r * r *"),
    "the kept mean has no gradient": ("d += mean_grad", "d += 0.0"),
}


def check_all():
    torch.manual_seed(3)
    with blocks(8):
        check(21, True, centre=1.0, scale=0.5)
        check(21, False, centre=1.0, scale=0.5)
        check(21, True, scale=1e-4)


def test_without_a_defect_the_check_passes():
    check_all()


test_defects_are_caught = mutations(kernels, DEFECTS)(check_all)
BLOCK_DEFECTS = {
    "every block is the first": ("return tl.load(x + at)", "return tl.load(x + at - first)"),
    "the last number not loaded": ("mask=at < n, other", "mask=at < n - 1, other"),
    "ones behind the end": ("other=0.0", "other=1.0"),
    "whole blocks not stored": ("tl.store(x + at, block)\n", "tl.store(x + at, block * 0.0)\n"),
    "the last number not stored": ("block, mask=at < n)", "block, mask=at < n - 1)"),
}
test_defects_of_the_blocks_are_caught = helper_mutations(_blocks, kernels, BLOCK_DEFECTS)(check_all)
