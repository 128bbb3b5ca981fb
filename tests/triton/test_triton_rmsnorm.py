"""rmsnorm's Triton kernels against the float64 definition: rows that fit a program, and rows in blocks of columns."""

import pytest
import torch
from guards import guarded
from launching import DEVICE, DTYPES, check_on_triton, on_triton
from mutations import mutations
from row_checks import check_residual_on_triton

from engine.kernels import _backend
from engine.kernels.rmsnorm import (
    rmsnorm,
    rmsnorm_reference,
    rmsnorm_residual,
    rmsnorm_residual_reference,
)
from engine.kernels.triton import _row_sums
from engine.kernels.triton import rmsnorm as kernels
from engine.kernels.triton._launch import Config


def blocks(rows, block):
    """Of the forward and of the backward."""
    both = {"ROWS": rows, "BLOCK": block}
    return {"rmsnorm": Config(both), "rmsnorm_backward": Config({**both, "STAGES": 1})}


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 2 rows where there are up to 6, of 4 up to 12, ..."""
    monkeypatch.setattr(_row_sums, "FEWEST_ROWS", 2)
    monkeypatch.setattr(_row_sums, "MOST_PARTS", 3)


def in_dtype(reference, dtype):
    """The definition with a result of `dtype`; of float64 for the truth."""

    def defined(x, *others):
        return reference(x, *others, 1e-5, None if x.dtype == torch.float64 else dtype)

    return defined


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 9), (9, 37), (3, 576)])
def test_against_float64(dtype, shape):
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[1])
    grad = torch.randn(shape).to(dtype)
    check_on_triton(rmsnorm, rmsnorm_reference, (x, weight), grad, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_stream_into_another_dtype(dtype):
    x, weight, grad = torch.randn(5, 37), torch.randn(37), torch.randn(5, 37).to(dtype)
    defined = in_dtype(rmsnorm_reference, dtype)
    check_on_triton(lambda x, w: rmsnorm(x, w, 1e-5, dtype), defined, (x, weight), grad, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 9), (9, 37), (2, 576)])
def test_with_a_residual_stream(dtype, shape):
    """dtype is that of x and y; the stream is float32."""
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape), torch.randn(shape[1])
    grads = torch.randn(shape).to(dtype), torch.randn(shape)
    defined = in_dtype(rmsnorm_residual_reference, dtype)
    check_residual_on_triton(rmsnorm_residual, defined, (x, residual, weight), grads)


def check(rows, block, with_residual):
    """37 columns, 5 rows in parts of 2; row 3 is one that eps decides. On the kernels in use, with these blocks."""
    module, tables = _backend.triton_kernels("rmsnorm"), blocks(rows, block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "config", lambda op, size, device: tables[op])
        x, weight, grad = torch.randn(5, 37), torch.randn(37), torch.randn(5, 37)
        x[3] *= 1e-3
        if with_residual:
            inputs, grads = (x.bfloat16(), 1e-3 * x, weight), (grad, torch.randn(5, 37))
            defined = in_dtype(rmsnorm_residual_reference, torch.bfloat16)
            check_residual_on_triton(rmsnorm_residual, defined, inputs, grads)
        else:
            check_on_triton(rmsnorm, rmsnorm_reference, (x, weight), grad, 8)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rows, block", [(1, 16), (4, 16), (4, 64)])
def test_every_way_through_the_loops(small_parts, rows, block, with_residual):
    check(rows, block, with_residual)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4, 1e15])
def test_sizes_of_rows(scale):
    x, weight, grad = torch.randn(3, 40) * scale, torch.randn(40), torch.randn(3, 40)
    check_on_triton(rmsnorm, rmsnorm_reference, (x, weight), grad, 8)


def test_float16_at_its_ends():
    """Squares of 6e4 and of 6e-8 are outside float16: the arithmetic is float32."""
    x = torch.tensor([[6e4, -6e4, 1.0, 0.0] * 3, [6e-8, 6e-5, -6e-8, 0.0] * 3]).half()
    check_on_triton(rmsnorm, rmsnorm_reference, (x, torch.randn(12)), torch.randn(2, 12).half(), 8)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_that_are_not_numbers_leave_the_others_alone():
    x, weight = torch.randn(6, 37).to(DEVICE), torch.ones(37, device=DEVICE)
    clean = on_triton(rmsnorm)(x, weight)
    x[2, 5], x[4, 0] = float("-inf"), float("nan")
    out = on_triton(rmsnorm)(x, weight)
    assert torch.equal(out[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])
    assert out[2, 5].isnan() and out[4].isnan().all()
    assert out[2, :5].eq(0).all() and out[2, 6:].eq(0).all()


def run(x, weight, grad, rows, block):
    """[y, rstd, d x, d weight] from the launchers themselves."""
    forward, backward = blocks(rows, block).values()
    x, weight, grad = (t.to(DEVICE) for t in (x, weight, grad))
    out, rstd = kernels.rmsnorm(x, weight, 1e-5, x.dtype, tuned=forward)
    return [out, rstd, *kernels.rmsnorm_backward(grad, x, weight, rstd, tuned=backward)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_that_are_not_aligned(dtype):
    inputs = torch.randn(3, 64).to(dtype), torch.randn(64), torch.randn(3, 64).to(dtype)
    want = run(*inputs, 2, 64)
    with guarded() as guards:
        ours = run(*(guards.place(t.to(DEVICE), shift=1) for t in inputs), 2, 64)
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


@pytest.mark.parametrize("block", [32, 64])
def test_rows_are_independent_and_runs_are_equal(small_parts, block):
    """To the bit: the whole again, and rows in another place of another batch."""
    x, weight, grad = torch.randn(11, 37), torch.randn(37), torch.randn(11, 37)
    whole, again = (run(x, weight, grad, 4, block) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for rows in (slice(6, 7), slice(3, 9)):
        part = run(x[rows], weight, grad[rows], 4, block)
        assert all(torch.equal(a[rows], b) for a, b in zip(whole[:3], part[:3], strict=True))


def test_the_norm_of_a_sum_is_that_of_rmsnorm():
    x, residual, weight = (
        t.to(DEVICE) for t in (torch.randn(5, 37), torch.randn(5, 37), torch.randn(37))
    )
    y, total = on_triton(rmsnorm_residual)(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, on_triton(rmsnorm)(total, weight))


LATER_ROWS = "live = of_part < count\n        g"
ON_ROWS_THAT_FIT = {
    "eps forgotten": (" + tl.cast(eps, tl.float32))", ")"),
    "mean over the block": ("tl.sum(squares, 1) / H", "tl.sum(squares, 1) / BLOCK"),
    "weight forgotten": ("scale[:, None] * w[None, :]", "scale[:, None]"),
    "a row too many": ("live = (rows < N)[:, None]", "live = (rows < N + 1)[:, None]"),
    "columns without a mask": (
        "(columns < H)[None, :]\n    row =",
        "(columns < BLOCK)[None, :]\n    row =",
    ),
    "projection forgotten": ("d = scale * (g * w - n * mean)", "d = scale * (g * w)"),
    "rstd forgotten": ("d = scale * (g * w - n * mean)", "d = g * w - n * mean"),
    "sign of the projection": ("(g * w - n * mean)", "(g * w + n * mean)"),
    "x in the place of n": (".to(tl.float32) * scale\n", ".to(tl.float32)\n"),
    "rows of the next part counted twice": (LATER_ROWS, "live = rows < N\n        g"),
    "a row of the last part left out": (
        "N - part * span).to(tl.int32)  # rows of this part\n    columns",
        "N - 1 - part * span).to(tl.int32)  # rows of this part\n    columns",
    ),
    "a part's rows one too far": (LATER_ROWS, "rows += 1\n        " + LATER_ROWS),
}
ROW_BY_ROW = {
    "d weight of the last rows only": (
        "d_weight += tl.sum(g * n, 0)\n    tl",
        "d_weight = tl.sum(g * n, 0)\n    tl",
    ),
}
ON_WIDE_ROWS = {
    "squares of two blocks only": ("squares += more * more", "squares = row * row + more * more"),
    "weight of the first block": ("at + start, start + columns, in", "at + start, columns, in"),
    "products of the last block only": ("products += g * w * n", "products = g * w * n"),
    "mean of products over the block": ("tl.sum(products, 1) / H", "tl.sum(products, 1) / BLOCK"),
    "d weight of grad": (
        "d_weight += tl.sum(g * n, 0)\n        tl",
        "d_weight += tl.sum(g, 0)\n        tl",
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
