"""layernorm's Triton kernels against the float64 definition: rows that fit a program, and rows in blocks of columns."""

import pytest
import torch
from guards import guarded
from launching import DEVICE, DTYPES, check_on_triton, on_triton
from mutations import mutations
from row_checks import check_residual_on_triton

from engine.kernels import _backend
from engine.kernels.layernorm import (
    layernorm,
    layernorm_reference,
    layernorm_residual,
    layernorm_residual_reference,
)
from engine.kernels.triton import _row_sums
from engine.kernels.triton import layernorm as kernels
from engine.kernels.triton._launch import Config


def blocks(rows, block):
    """Of the forward and of the backward."""
    both = {"ROWS": rows, "BLOCK": block}
    return {"layernorm": Config(both), "layernorm_backward": Config({**both, "STAGES": 1})}


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 2 rows where there are up to 6, of 4 up to 12, ..."""
    monkeypatch.setattr(_row_sums, "FEWEST_ROWS", 2)
    monkeypatch.setattr(_row_sums, "MOST_PARTS", 3)


def vectors(width):
    """weight, bias"""
    return torch.randn(width), torch.randn(width)


def in_dtype(reference, dtype):
    """The definition with a result of `dtype`; of float64 for the truth."""

    def defined(x, *others):
        return reference(x, *others, 1e-5, None if x.dtype == torch.float64 else dtype)

    return defined


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 9), (9, 37), (3, 576)])
def test_against_float64(dtype, shape):
    x, grad = torch.randn(shape).to(dtype) * 3 + 1, torch.randn(shape).to(dtype)
    check_on_triton(layernorm, layernorm_reference, (x, *vectors(shape[1])), grad, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_stream_into_another_dtype(dtype):
    inputs, grad = (torch.randn(5, 37), *vectors(37)), torch.randn(5, 37).to(dtype)
    defined = in_dtype(layernorm_reference, dtype)
    check_on_triton(lambda x, w, b: layernorm(x, w, b, 1e-5, dtype), defined, inputs, grad, 8)


def test_without_a_bias():
    x, weight, grad = torch.randn(3, 37), torch.randn(37), torch.randn(3, 37)
    check_on_triton(layernorm, layernorm_reference, (x, weight), grad, 8)
    grads = grad, torch.randn(3, 37)
    inputs = x, torch.randn(3, 37), weight
    check_residual_on_triton(layernorm_residual, layernorm_residual_reference, inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 9), (9, 37), (2, 576)])
def test_with_a_residual_stream(dtype, shape):
    """dtype is that of x and y; the stream is float32."""
    inputs = torch.randn(shape).to(dtype), torch.randn(shape) + 1, *vectors(shape[1])
    grads = torch.randn(shape).to(dtype), torch.randn(shape)
    defined = in_dtype(layernorm_residual_reference, dtype)
    check_residual_on_triton(layernorm_residual, defined, inputs, grads)


def check(rows, block, with_residual):
    """37 columns, 5 rows in parts of 2; row 3 is one that eps decides. On the kernels in use, with these blocks."""
    module, tables = _backend.triton_kernels("layernorm"), blocks(rows, block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "config", lambda op, size, device: tables[op])
        x, grad = torch.randn(5, 37) + 1, torch.randn(5, 37)
        x[3] *= 1e-3
        if with_residual:
            inputs, grads = (x.bfloat16(), 1e-3 * x, *vectors(37)), (grad, torch.randn(5, 37))
            defined = in_dtype(layernorm_residual_reference, torch.bfloat16)
            check_residual_on_triton(layernorm_residual, defined, inputs, grads)
        else:
            check_on_triton(layernorm, layernorm_reference, (x, *vectors(37)), grad, 8)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rows, block", [(1, 16), (4, 16), (4, 64)])
def test_every_way_through_the_loops(small_parts, rows, block, with_residual):
    check(rows, block, with_residual)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4, 1e15])
def test_sizes_of_rows(scale):
    x, grad = torch.randn(3, 40) * scale, torch.randn(3, 40)
    check_on_triton(layernorm, layernorm_reference, (x, *vectors(40)), grad, 8)


@pytest.mark.parametrize("block", [16, 64])
def test_a_far_mean_keeps_its_variance(block):
    """The variance is that of x - mean, not E[x^2] - mean^2, which has no digits here."""
    x, one = torch.randn(3, 40, device=DEVICE) + 1e4, torch.ones(40, device=DEVICE)
    tuned = blocks(2, block)["layernorm"]
    out = kernels.layernorm(x, one, None, 1e-5, x.dtype, tuned=tuned)[0].cpu()
    torch.testing.assert_close(out.std(-1, correction=0), torch.ones(3), rtol=1e-5, atol=0)


def test_float16_at_its_ends():
    """Squares of 6e4 and of 6e-8 are outside float16: the arithmetic is float32."""
    x = torch.tensor([[6e4, -6e4, 1.0, 0.0] * 3, [6e-8, 6e-5, -6e-8, 0.0] * 3]).half()
    inputs, grad = (x, *vectors(12)), torch.randn(2, 12).half()
    check_on_triton(layernorm, layernorm_reference, inputs, grad, 8)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_that_are_not_numbers_leave_the_others_alone():
    x, weight = torch.randn(6, 37).to(DEVICE), torch.ones(37, device=DEVICE)
    clean = on_triton(layernorm)(x, weight)
    x[2, 5], x[4, 0] = float("-inf"), float("nan")
    out = on_triton(layernorm)(x, weight)
    assert torch.equal(out[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])
    assert out[2].isnan().all() and out[4].isnan().all()


def run(x, weight, bias, grad, rows, block):
    """[y, mean, rstd, d x, d weight, d bias] from the launchers themselves."""
    forward, backward = blocks(rows, block).values()
    x, weight, bias, grad = (t.to(DEVICE) for t in (x, weight, bias, grad))
    out, mean, rstd = kernels.layernorm(x, weight, bias, 1e-5, x.dtype, tuned=forward)
    gradients = kernels.layernorm_backward(grad, x, weight, mean, rstd, tuned=backward)
    return [out, mean, rstd, *gradients]


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_that_are_not_aligned(dtype):
    inputs = torch.randn(3, 64).to(dtype), *vectors(64), torch.randn(3, 64).to(dtype)
    want = run(*inputs, 2, 64)
    with guarded() as guards:
        ours = run(*(guards.place(t.to(DEVICE), shift=1) for t in inputs), 2, 64)
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


@pytest.mark.parametrize("block", [32, 64])
def test_rows_are_independent_and_runs_are_equal(small_parts, block):
    """To the bit: the whole again, and rows in another place of another batch."""
    x, parameters, grad = torch.randn(11, 37), vectors(37), torch.randn(11, 37)
    whole, again = (run(x, *parameters, grad, 4, block) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for rows in (slice(6, 7), slice(3, 9)):
        part = run(x[rows], *parameters, grad[rows], 4, block)
        assert all(torch.equal(a[rows], b) for a, b in zip(whole[:4], part[:4], strict=True))


def test_the_norm_of_a_sum_is_that_of_layernorm():
    x, residual = torch.randn(5, 37, device=DEVICE), torch.randn(5, 37, device=DEVICE)
    weight, bias = (t.to(DEVICE) for t in vectors(37))
    y, total = on_triton(layernorm_residual)(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, on_triton(layernorm)(total, weight, bias))


LATER_ROWS = "live = of_part < count\n        g"
ON_ROWS_THAT_FIT = {
    "eps forgotten": (" + tl.cast(eps, tl.float32))", ")"),
    "mean over the block": ("tl.sum(sums, 1) / H)[:, None]\n    #", "tl.sum(sums, 1) / BLOCK)[:, None]\n    #"),
    "variance over the block": ("tl.sum(squares, 1) / H", "tl.sum(squares, 1) / BLOCK"),
    "behind the row counts in the variance": ("tl.where(inside, row - centre, 0.0)", "row - centre"),
    "centre forgotten": ("y = (row - centre) * scale", "y = row * scale"),
    "bias forgotten": ("if BIAS:", "if BIAS == 2:"),
    "a row too many": ("live = (rows < N)[:, None]", "live = (rows < N + 1)[:, None]"),
    "columns without a mask": (
        "(columns < H)[None, :]\n    row =",
        "(columns < BLOCK)[None, :]\n    row =",
    ),
    "mean and rstd swapped": ("tl.store(mean + rows[:, None], centre", "tl.store(mean + rows[:, None], scale"),
    "mean of m forgotten": ("g * w - mean_m - n * mean_mn", "g * w - n * mean_mn"),
    "mean of m n forgotten": ("g * w - mean_m - n * mean_mn", "g * w - mean_m"),
    "rows of the next part counted twice": (LATER_ROWS, "live = rows < N\n        g"),
    "a row of the last part left out": (
        "N - part * span).to(tl.int32)  # rows of this part\n    columns",
        "N - 1 - part * span).to(tl.int32)  # rows of this part\n    columns",
    ),
    "d bias is d weight": ("d_bias += tl.sum(g, 0)\n    tl", "d_bias += tl.sum(g * n, 0)\n    tl"),
    "d bias in the place of d weight": (
        "(P + part) * H + columns, d_bias, mask=columns < H)\n\n\n@triton.jit\ndef _backward_wide",
        "part * H + columns, d_bias, mask=columns < H)\n\n\n@triton.jit\ndef _backward_wide",
    ),
}  # fmt: skip
ROW_BY_ROW = {
    "d weight of the last rows only": (
        "d_weight += tl.sum(g * n, 0)\n        d_bias += tl.sum(g, 0)\n    tl",
        "d_weight = tl.sum(g * n, 0)\n        d_bias += tl.sum(g, 0)\n    tl",
    ),
    "d bias of the last rows only": (
        "d_bias += tl.sum(g, 0)\n    tl",
        "d_bias = tl.sum(g, 0)\n    tl",
    ),
}
ON_WIDE_ROWS = {
    "sum of two blocks only": ("sums += _summed(", "sums = row + _summed("),
    "squares of two blocks only": (
        "        squares += off * off",
        "        squares = (row - centre) * (row - centre) + off * off",
    ),
    "behind the row counts in the variance": (
        "tl.where(of_row, more - centre, 0.0)",
        "more - centre",
    ),
    "weight of the first block": ("at + start, start + columns, of", "at + start, columns, of"),
    "products of the last block only": ("products += g * w * n", "products = g * w * n"),
    "sums of the last block only": ("sums += g * w\n", "sums = g * w\n"),
    "d bias of grad n": (
        "d_bias += tl.sum(g, 0)\n        tl",
        "d_bias += tl.sum(g * n, 0)\n        tl",
    ),
}
WITH_A_RESIDUAL = {
    "residual forgotten": ("row += tl.load(residual", "row += 0.0 * tl.load(residual"),
    "sum not written": ("if RESIDUAL:\n        tl.store", "if RESIDUAL == 2:\n        tl.store"),
    "gradient of the sum forgotten": ("d += tl.load(grad_total", "d += 0.0 * tl.load(grad_total"),
    "gradient of the residual not written": ("if NARROW:", "if NARROW == 2:"),
}


@pytest.mark.usefixtures("small_parts")
@mutations(kernels, ON_ROWS_THAT_FIT)
def test_defects_are_caught():
    check(4, 64, with_residual=False)


@pytest.mark.usefixtures("small_parts")
@mutations(kernels, ROW_BY_ROW)
def test_defects_of_the_loop_over_rows_are_caught():
    check(1, 64, with_residual=False)


@pytest.mark.usefixtures("small_parts")
@mutations(kernels, ON_WIDE_ROWS)
def test_defects_on_wide_rows_are_caught():
    check(4, 16, with_residual=False)


@pytest.mark.usefixtures("small_parts")
@mutations(kernels, WITH_A_RESIDUAL)
def test_defects_with_a_residual_are_caught():
    check(4, 64, with_residual=True)
