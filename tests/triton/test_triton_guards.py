"""The guards themselves: each way to reach outside a tensor is an error, and fresh memory is NaN."""

import pytest
import torch
import triton
import triton.language as tl
from guards import guarded
from launching import DEVICE

from engine.kernels.triton import _interpreter
from engine.kernels.triton._launch import Config, launch


@triton.jit
def _copy(x, out, first, last, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < last), mask=at < last)


@triton.jit
def _read(x, at):
    return tl.load(x + at)


@triton.jit
def _copy_by_a_helper(x, out, first, last, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    tl.store(out + at, _read(x, at), mask=at < last)


def copy(guards, n, first=0, last=None, shift=0, kernel=_copy):
    x = guards.place(torch.arange(n, dtype=torch.float32, device=DEVICE), shift)
    out = torch.empty_like(x)
    launch(kernel, (1,), x, out, first, n if last is None else last, config=Config({"BLOCK": 64}))
    return out


@pytest.mark.parametrize("shift", [0, 1])
def test_inside_is_allowed(shift):
    with guarded() as guards:
        assert copy(guards, 37, shift=shift).tolist() == [*range(37)]
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert torch.zeros(3, device=DEVICE).eq(0).all()
        assert torch.empty(2, dtype=torch.int32, device=DEVICE).tolist() == [-1, -1]


@pytest.mark.skipif(not _interpreter.active(), reason="a GPU does not look at addresses")
@pytest.mark.parametrize("first, last", [(0, 38), (-1, 37), (-2000, 37), (100000, 100001)])
def test_an_address_outside_is_an_error(first, last):
    with pytest.raises(AssertionError, match="an address"), guarded() as guards:
        copy(guards, 37, first, last)


@pytest.mark.skipif(not _interpreter.active(), reason="a GPU does not look at addresses")
def test_an_error_in_a_function_that_a_kernel_calls_comes_out_as_it_is():
    with pytest.raises(AssertionError, match="an address"), guarded() as guards:
        copy(guards, 37, kernel=_copy_by_a_helper)


def test_writing_to_an_input_or_a_band_is_an_error():
    with (
        pytest.raises(AssertionError, match="an input of shape .* was written to"),
        guarded() as guards,
    ):
        guards.place(torch.zeros(3)).add_(1)
    with pytest.raises(AssertionError, match="written behind"), guarded() as guards:
        x = guards.place(torch.zeros(3))
        x.as_strided((4,), (1,)).fill_(1)
