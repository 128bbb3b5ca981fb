"""linear on a GPU: the library's products and the exact kernel against the float64 definition, and the exact kernel's
rows, which know nothing of the others.

In the interpreter the library's products are float32 ones of the same operands. numpy's product there sums a row in an
order that depends on its place in the tile, which a GPU's tile instructions do not: `ordered_dot` puts one in its
place that treats every row alike, so that what the tests of equal bits see is the kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE, DTYPES, on_triton
from mutations import mutations
from torch import Tensor
from torch._subclasses import FakeTensorMode

from engine.config import SFTConfig
from engine.kernels import _backend
from engine.kernels._backend import backend
from engine.kernels.linear import (
    PackedWeight,
    exact_forced,
    exact_products,
    linear,
    linear_reference,
    pack_weight,
    refresh_weight,
)
from engine.kernels.triton import _interpreter, _launch
from engine.kernels.triton import linear as kernels
from engine.kernels.triton._launch import Config
from engine.run.session import Session

SMALL = Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2})


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    """Tensors are made where kernels run."""
    with DEVICE:
        yield


@contextmanager
def ordered_dot() -> Iterator[None]:
    """The interpreter's dot as one sum over a block's depth, the same for every row and column."""
    if not _interpreter.active():
        yield
        return
    from triton.runtime import interpreter

    def numbers(handle):
        wide = _interpreter.widen if _interpreter._is_bfloat16(handle) else np.float32
        return wide(handle.data)

    def create_dot(a, b, d, *others):
        left, right, total = numbers(a), numbers(b), np.zeros_like(d.data)
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[None, k]
        return interpreter.TensorHandle(d.data + total, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "create_dot", create_dot, raising=False)
        yield


@pytest.fixture(params=[False, True], ids=["library", "exact"])
def exact(request: pytest.FixtureRequest) -> Iterator[bool]:
    with exact_products(request.param):
        yield request.param


def run(x: Tensor, dense: Tensor, bias: Tensor, grad: Tensor, op, storage, out_dtype):
    """[y, dx, dbias, dmaster]; the master stands for the weight."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias, dense)]
    y = op(leaves[0], PackedWeight(dense.to(storage), None, "reference"), *leaves[1:], out_dtype)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check(shape, storage, x_dtype, out_dtype) -> None:
    """On inputs that hold what the products take, so that only sums and results round."""
    m, n, k = shape
    x, bias, master, grad = torch.randn(m, k), torch.randn(n), torch.randn(n, k), torch.randn(m, n)
    x, master, grad = (t.to(storage).float().to(DEVICE) for t in (x, master, grad))
    x, bias, grad = x.to(x_dtype), bias.to(DEVICE), grad.to(out_dtype)
    with guarded() as guards, backend("triton"):
        placed = [guards.place(t) for t in (x, master, bias, grad)]
        ours = run(*placed, linear, storage, out_dtype)
    single = run(x, master, bias, grad, linear_reference, torch.float32, torch.float32)
    wide = [t.double() for t in (x, master, bias, grad)]
    truth = run(*wide, linear_reference, torch.float64, torch.float64)
    dtypes = (out_dtype, x_dtype, torch.float32, torch.float32)
    for name, o, r, t, dtype in zip(
        ("y", "dx", "dbias", "dw"), ours, single, truth, dtypes, strict=True
    ):
        assert o.dtype == dtype, name
        assert_close(o, r.to(dtype), t, f"{name} of {shape}", units=8)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (3, 70, 17), (66, 65, 576), (2, 5, 0)])
def test_against_float64(exact, storage, shape):
    check(shape, storage, storage, storage)


@pytest.mark.parametrize("storage,x_dtype,out_dtype", [
    (torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float32), (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float16),
])  # fmt: skip
def test_dtypes_of_storage_activations_and_results(exact, storage, x_dtype, out_dtype):
    check((5, 33, 40), storage, x_dtype, out_dtype)


def test_the_head_of_a_vocabulary_that_is_a_multiple_of_nothing():
    x, weight = torch.randn(2, 7), pack_weight(torch.randn(49157, 7), torch.float32)
    with exact_products():
        wide = Config({"BLOCK_M": 16, "BLOCK_N": 4096, "BLOCK_K": 16, "GROUP": 8})
        y = kernels.exact_product(x, weight.dense, None, torch.float32, wide)
    torch.testing.assert_close(y, linear_reference(x, weight), rtol=1e-5, atol=1e-5)


def check_rounding(storage: torch.dtype) -> None:
    x, weight = torch.randn(5, 37), PackedWeight(torch.randn(9, 37).to(storage), None, "reference")
    ours = on_triton(linear)(x, weight, out_dtype=torch.float32)
    assert torch.equal(ours, on_triton(linear)(x.to(storage), weight, out_dtype=torch.float32))


@pytest.mark.parametrize("storage", DTYPES)
def test_activations_are_rounded_to_the_storage(exact, storage):
    check_rounding(storage)


@mutations(kernels, {"not rounded": ("a.to(weight.dtype.element_ty), b,", "a, b.to(a.dtype),")})
def test_activations_that_are_not_rounded_are_caught():
    with exact_products():
        check_rounding(torch.bfloat16)


def check_rows(storage: torch.dtype, k: int) -> None:
    x, bias = torch.randn(300, k, device=DEVICE), torch.randn(70, device=DEVICE)
    weight = PackedWeight(torch.randn(70, k, device=DEVICE).to(storage), None, "reference")
    with backend("triton"), exact_products():
        whole = linear(x, weight, bias)
        for first, rows in ((0, 1), (299, 1), (130, 1), (61, 2), (7, 17), (100, 64), (3, 290)):
            part = linear(x[first : first + rows], weight, bias)
            assert torch.equal(part, whole[first : first + rows]), (first, rows)
        shuffled = torch.randperm(300, device=DEVICE)
        assert torch.equal(linear(x[shuffled], weight, bias), whole[shuffled])
        assert torch.equal(linear(x, weight, bias), whole)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("k", [576, 37])
def test_a_row_knows_nothing_of_the_others(storage, k):
    with ordered_dot():
        check_rows(storage, k)


def small(x: Tensor, dense: Tensor, bias: Tensor | None, out_dtype=torch.float32) -> Tensor:
    with guarded() as guards:
        placed = [None if t is None else guards.place(t, shift=1) for t in (x, dense, bias)]
        return kernels.exact_product(*placed, out_dtype, SMALL)


@pytest.mark.parametrize("group", [1, 2, 8])
def test_every_tile_is_made_once_in_any_order(group):
    """Whole numbers, whose sums are exact: five by three tiles, several depths, tails on all sides, unaligned."""
    config = Config({**SMALL.blocks, "GROUP": group})
    x, w = torch.randint(-3, 4, (67, 37)).float(), torch.randint(-3, 4, (45, 37)).float()
    bias = torch.arange(45.0)
    with guarded() as guards:
        placed = (guards.place(t, shift=1) for t in (x, w, bias))
        y = kernels.exact_product(*placed, torch.float32, config)
    assert torch.equal(y, x @ w.T + bias)


def test_infinities_stay_in_their_row_and_column():
    x, w = torch.rand(35, 33) + 0.5, torch.rand(37, 33) + 0.5
    x[20, 7], w[36], w[11, 0] = torch.inf, -torch.inf, -1e38
    y = small(x, w, None)
    others = torch.arange(35) != 20
    assert (y[:, 36] == -torch.inf).all() and (y[20, :36] == torch.inf).all()
    assert torch.isfinite(y[others, :36]).all()
    assert torch.equal(
        small(torch.full((1, 1), 1e4), torch.full((1, 1), -1e4), None), torch.tensor([[-1e8]])
    )


def test_equal_to_the_library_in_every_way_but_the_order_of_sums():
    x, w, bias = (
        torch.randint(-3, 4, (9, 40)).bfloat16(),
        torch.randint(-3, 4, (12, 40)),
        torch.arange(12.0),
    )
    weight = PackedWeight(w.bfloat16(), None, "reference")
    want = on_triton(linear)(x, weight, bias)
    with exact_products():
        assert torch.equal(on_triton(linear)(x, weight, bias), want)


def test_a_frozen_weight_and_one_that_is_refreshed():
    with backend("triton"):
        weight = pack_weight(torch.randn(9, 12), torch.bfloat16)
        assert weight.data is None
        x = torch.randn(5, 12, requires_grad=True)
        linear(x, weight).sum().backward()
        want = weight.dense.float().sum(0).bfloat16().float().expand(5, 12)
        torch.testing.assert_close(x.grad, want, rtol=1e-2, atol=1e-2)
        place, master = weight.dense.data_ptr(), torch.randn(9, 12)
        refresh_weight(weight, master)
        assert weight.dense.data_ptr() == place and torch.equal(weight.dense, master.bfloat16())


def test_only_what_is_needed_is_computed():
    grad, x, dense = torch.randn(4, 9), torch.randn(4, 3), torch.randn(9, 3)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        results = kernels.linear_backward(grad, x.bfloat16(), dense, *needs)
        want = [(4 if needs[0] else 0, 3), (9 if needs[1] else 0, 3), (9 if needs[2] else 0,)]
        assert [t.shape for t in results] == want
        assert [t.dtype for t in results] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("mode", [False, True])
def test_no_value_is_read(mode):
    """On shapes alone, as kernels are compiled ahead of time."""
    x, dense, bias = (torch.empty(*s, device="meta") for s in ((5, 12), (9, 12), (9,)))
    seen = []
    token = _launch.observer.set(lambda launch: seen.append(launch) is not None)
    try:
        with exact_products(mode):
            y = kernels.linear(x, dense, dense, bias, None, torch.bfloat16)
        kernels.linear_backward(y, x, dense, True, True, True)
    finally:
        _launch.observer.reset(token)
    assert y.shape == (5, 9) and y.dtype == torch.bfloat16 and len(seen) == mode


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_shapes_and_dtypes_of_the_library_s_products_on_a_gpu(storage, out_dtype):
    """On tensors that say they lie on a GPU: which overloads are called, without their numbers."""
    with FakeTensorMode():
        x, dense = (torch.empty(n, 12, device="cuda", dtype=storage) for n in (5, 9))
        for bias in (None, torch.empty(9, device="cuda")):
            y = kernels.linear(x, dense, dense, bias, None, out_dtype)
            assert (y.shape, y.dtype, y.is_cuda) == ((5, 9), out_dtype, True)
        dx, dw, db = kernels.linear_backward(y, x.to(out_dtype), dense, True, True, True)
    assert (dx.dtype, dw.dtype, db.dtype) == (out_dtype, torch.float32, torch.float32)
    assert (dx.shape, dw.shape, db.shape) == ((5, 12), (9, 12), (9,))


def test_the_switch_is_the_run_s(tmp_path):
    assert not exact_forced()
    for wanted in (True, False):
        config = SFTConfig(
            model_name_or_path="m",
            output_dir=str(tmp_path / str(wanted)),
            exact_logprobs=wanted,
            progress=False,
        )
        with exact_products(not wanted):
            with Session(config, "sft", 1, ()):
                assert exact_forced() == wanted
            assert exact_forced() != wanted
    assert not exact_forced()


DEFECTS = {
    "rows not masked": ("inside = (rows[:, None] < M) &", "inside = (rows[:, None] < M + 1) &"),
    "columns not masked": ("& (cols[None, :] < N)\n    tl.store", "& (cols[None, :] < N + 1)\n    tl.store"),
    "the tail of the depth read": ("& (depth[None, :] < K - k)", "& (depth[None, :] < K)"),
    "the depth ends one early": (
        "mask=(cols[None, :] < N) & (depth[:, None] < K - k)",
        "mask=(cols[None, :] < N) & (depth[:, None] < K - k - 1)",
    ),
    "no step along the depth": ("left += BLOCK_K", "left += 0"),
    "the last tile of the depth alone": ("b, total, input_precision", "b, input_precision"),
    "bias forgotten": ("if HAS_BIAS:", "if not HAS_BIAS:"),
    "bias of another column": ("tl.load(bias + cols,", "tl.load(bias + tl.arange(0, BLOCK_N),"),
    "a tile of another group": ("first = program // per_group * GROUP", "first = program // per_group"),
    "rows of a ragged group": ("rows = min(tiles_m - first, GROUP)", "rows = GROUP"),
    "a depth that is not whole taken for one": ("WHOLE=k % blocks[\"BLOCK_K\"] == 0", "WHOLE=True"),
    "sums in float16": ("input_precision=\"ieee\")", "input_precision=\"ieee\").to(tl.float16).to(tl.float32)"),
    "rows by columns": ("tl.store(y + rows[:, None] * N", "tl.store(y + rows[:, None] * K"),
}  # fmt: skip


def check_small_tiles() -> None:
    """Five by three tiles, three depths, tails on all sides."""
    x, w, bias = (torch.randn(*shape, device=DEVICE) for shape in ((67, 37), (45, 37), (45,)))
    weight, wide = (PackedWeight(t, None, "reference") for t in (w, w.double()))
    module = _backend.triton_kernels("linear")  # the changed one
    with pytest.MonkeyPatch.context() as patch, exact_products():
        patch.setattr(module, "config", lambda *given: SMALL)
        ours = on_triton(linear)(x, weight, bias)
    plain, truth = (
        linear_reference(x, weight, bias),
        linear_reference(x.double(), wide, bias.double()),
    )
    assert_close(ours, plain, truth, units=8)


def test_small_tiles():
    check_small_tiles()


@mutations(kernels, DEFECTS)
def test_defects_are_caught():
    check_small_tiles()


OF_THE_NUMBER_OF_ROWS = {
    "another depth of tiles for few rows": (
        "blocks = tuned.blocks",
        "tuned = Config({**tuned.blocks, 'BLOCK_K': 32}) if m < 16 else tuned\n    blocks = tuned.blocks",
    ),
    "the depth's start turned by the place": (
        "depth = tl.arange(0, BLOCK_K)",
        "depth = (tl.arange(0, BLOCK_K) + tile_m) % BLOCK_K",
    ),
}


@pytest.mark.skipif(not _interpreter.active(), reason="a GPU's tiles may give the same bits")
@mutations(kernels, OF_THE_NUMBER_OF_ROWS)
def test_rows_that_depend_on_others_are_caught():
    with ordered_dot():
        check_rows(torch.float32, 576)


LIBRARY_DEFECTS = {
    "sign of the gradient of x": ("_product(rounded, dense, x.dtype)", "_product(-rounded, dense, x.dtype)"),
    "another gradient": ("rounded = grad.to(dense.dtype)", "rounded = (grad * 1.01).to(dense.dtype)"),
    "sum over the wrong rows": ("db = grad.sum(0, dtype=wide)", "db = grad[1:].sum(0, dtype=wide)"),
    "bias added twice": (
        "y = a.float() @ b.float()\n        return (y if bias is None else y + bias)",
        "y = a.float() @ b.float()\n        return (y if bias is None else y + 2 * bias)",
    ),
}  # fmt: skip


@mutations(kernels, LIBRARY_DEFECTS)
def test_defects_of_the_library_s_side_are_caught():
    check((5, 33, 40), torch.float32, torch.float32, torch.float32)
