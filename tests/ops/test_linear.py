"""linear on packed weights: the float64 definition, bits that depend on nothing but the row, edges of the packing."""

from collections.abc import Callable

import pytest
import torch
from compare import assert_close
from gradients import equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels._backend import backend
from engine.kernels.linear import (
    PackedWeight,
    linear,
    linear_reference,
    pack_weight,
    refresh_weight,
)

STORAGES = [torch.float32, torch.bfloat16]
SHAPES = [  # M, N, K
    (1, 1, 1), (1, 97, 576), (3, 33, 17), (5, 65, 1), (13, 200, 64), (16, 32, 32), (17, 31, 33),
    (33, 577, 96), (70, 40, 1536), (129, 577, 576),
]  # fmt: skip


def threads_agree(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The results of `run`, which are the same bits on one thread and on two."""
    before, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run())
    torch.set_num_threads(before)
    assert equal(*results)
    return results[0]


def product_and_gradients(
    op: Callable[..., Tensor], x: Tensor, weight: PackedWeight, bias: Tensor, master: Tensor,
    grad: Tensor, out_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """y and the gradients of x, bias and master."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias, master)]
    y = op(leaves[0], weight, leaves[1], leaves[2], out_dtype)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check_against_float64(
    cpu_class: str, shape: tuple[int, int, int], storage: torch.dtype,
    x_dtype: torch.dtype = torch.float32, out_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """On inputs that hold what the products take, so that only the sums and the result round."""
    m, n, k = shape
    x, bias, master, grad = torch.randn(m, k), torch.randn(n), torch.randn(n, k), torch.randn(m, n)
    if cpu_class == "amx" and storage == torch.bfloat16:
        x, grad = x.bfloat16().float(), grad.bfloat16().float()
    x, grad = x.to(x_dtype), grad.to(out_dtype)
    weight = pack_weight(master, storage)
    single, double = (
        PackedWeight(weight.dense.to(t), None, "reference") for t in (torch.float32, torch.float64)
    )
    ours = product_and_gradients(linear, x, weight, bias, master, grad, out_dtype)
    plain = product_and_gradients(
        linear_reference, x, single, bias, weight.dense.float(), grad, out_dtype
    )
    wide = [t.double() for t in (bias, weight.dense, grad)]
    truth = product_and_gradients(linear_reference, x.double(), double, *wide, torch.float64)
    for name, depth, o, r, t in zip("yxbw", (k, n, m, m), ours, plain, truth, strict=True):
        assert o.dtype == r.dtype
        # One chain of sums: its rounding grows with the root of the depth, torch's with less.
        assert_close(o, r, t, f"{name} of {shape}", units=4 + depth**0.5 / 2)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(cpu_class, storage, shape):
    check_against_float64(cpu_class, shape, storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_bfloat16_activations_in_and_out(cpu_class, storage):
    for shape in ((1, 40, 64), (18, 97, 96), (35, 64, 33)):
        for out_dtype in STORAGES:
            check_against_float64(cpu_class, shape, storage, torch.bfloat16, out_dtype)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(0, 50), st.integers(1, 80), st.integers(0, 70)),
    storage=st.sampled_from(STORAGES),
)
def test_ragged_shapes_against_float64(cpu_class, shape, storage):
    check_against_float64(cpu_class, shape, storage)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("n,k", [(1, 1), (7, 33), (64, 64), (45, 31), (33, 128)])
def test_packing_keeps_every_weight(cpu_class, storage, n, k):
    weight = pack_weight(torch.randn(n, k), storage)
    assert torch.equal(linear(torch.eye(k), weight), weight.dense.T.float())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("n,k", [(1, 1), (7, 33), (64, 64), (45, 31), (33, 128), (300, 576)])
def test_a_refreshed_weight_is_the_packed_one_in_the_same_memory(cpu_class, storage, n, k):
    torch.manual_seed(n)
    before, after = torch.randn(n, k), torch.randn(n, k)
    after[0, 0] = -torch.inf
    weight, want = pack_weight(before.clone(), storage), pack_weight(after.clone(), storage)
    places = weight.dense.data_ptr(), weight.data.data_ptr()

    def refreshed() -> list[Tensor]:
        refresh_weight(weight, after)
        return [weight.dense.view(torch.uint8).clone(), weight.data.clone()]

    dense, data = threads_agree(refreshed)
    assert torch.equal(dense, want.dense.view(torch.uint8))
    assert torch.equal(data, want.data)
    assert places == (weight.dense.data_ptr(), weight.data.data_ptr())
    with pytest.raises(ValueError, match=rf"master: got shape \(1, {k + 1}\), want"):
        refresh_weight(weight, torch.zeros(1, k + 1))


def test_packing_rounds_to_nearest_even(cpu_class):
    master = torch.tensor([[1.00390625, 1.01171875, -1.00390625, 3.4e38, 1e-40, 0.1]])
    weight = pack_weight(master, torch.bfloat16)
    assert weight.dense[0, :4].tolist() == [1.0, 1.015625, -1.0, float("inf")]
    assert torch.equal(weight.dense, master.bfloat16())
    assert (weight.rows, weight.cols, weight.dtype) == (1, 6, torch.bfloat16)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k", [576, 37, 1536])
def test_a_row_knows_nothing_of_the_others(cpu_class, storage, k):
    n = 200 if k == 1536 else 577
    x, bias = torch.randn(300, k), torch.randn(n)
    weight = pack_weight(torch.randn(n, k), storage)
    (whole,) = threads_agree(lambda: [linear(x, weight, bias)])
    for first in (0, 1, 130):
        for rows in (1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 31, 33, 49, 100):
            part = threads_agree(lambda: [linear(x[first : first + rows], weight, bias)])  # noqa: B023
            assert equal(part, [whole[first : first + rows]]), (first, rows)


@pytest.mark.parametrize("storage", STORAGES)
def test_activations_of_either_dtype_hold_the_same_bits(cpu_class, storage):
    x, weight = torch.randn(37, 96).bfloat16(), pack_weight(torch.randn(50, 96), storage)
    whole = linear(x, weight, out_dtype=torch.float32)
    assert torch.equal(whole, linear(x.float(), weight))
    assert torch.equal(whole.bfloat16(), linear(x, weight))
    assert torch.equal(whole[5:22], linear(x[5:22], weight, out_dtype=torch.float32))


def test_which_products_round_their_activations(cpu_class):
    x, weight = torch.randn(37, 96), pack_weight(torch.randn(50, 96), torch.bfloat16)
    same = torch.equal(linear(x, weight), linear(x.bfloat16(), weight, out_dtype=torch.float32))
    assert same == (cpu_class == "amx")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(300, 577, 96), (2100, 40, 33), (1, 300, 64)])
def test_gradients_do_not_depend_on_the_threads(cpu_class, storage, shape):
    m, n, k = shape
    x, bias, master, grad = torch.randn(m, k), torch.randn(n), torch.randn(n, k), torch.randn(m, n)
    weight = pack_weight(master, storage)
    threads_agree(
        lambda: product_and_gradients(linear, x, weight, bias, master, grad, torch.float32)
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_more_tokens_than_one_piece(cpu_class, storage):
    check_against_float64(cpu_class, (4100, 9, 7), storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_infinities_stay_in_their_row_and_column(cpu_class, storage):
    x, master = torch.rand(5, 33) + 0.5, torch.rand(37, 33) + 0.5
    x[3, 7], master[36], master[11, 0] = torch.inf, -torch.inf, -1e38
    y = linear(x, pack_weight(master, storage))
    others = [0, 1, 2, 4]
    assert (y[others, 36] == -torch.inf).all() and y[3, 36] == -torch.inf
    assert torch.isfinite(y[others, :36]).all() and (y[3, :36] == torch.inf).all()


def test_without_a_master_the_weight_is_frozen(cpu_class):
    x, weight = (
        torch.randn(5, 12, requires_grad=True),
        pack_weight(torch.randn(9, 12), torch.float32),
    )
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dense.sum(0).expand(5, 12))
    assert not weight.dense.requires_grad and not linear(x.detach(), weight).requires_grad


def test_strided_inputs(cpu_class):
    x, grad = torch.randn(12, 6).T, torch.randn(9, 6).T
    weight, master = pack_weight(torch.randn(9, 12), torch.bfloat16), torch.randn(9, 12)
    bias = torch.randn(18)[::2]
    ours = product_and_gradients(linear, x, weight, bias, master, grad, torch.float32)
    whole = [t.contiguous() for t in (x, bias, master, grad)]
    assert equal(ours, product_and_gradients(linear, whole[0], weight, *whole[1:], torch.float32))


def test_gradcheck_of_the_definition():
    master = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    x, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (4,)))
    weight = pack_weight(master, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b, m: linear(a, weight, b, m), (x, bias, master))


@pytest.mark.parametrize("storage", STORAGES)
def test_opcheck(cpu_class, storage):
    ops, dense = torch.ops.engine, torch.randn(9, 33).to(storage)
    x, bias = torch.randn(4, 33, requires_grad=True), torch.randn(9, requires_grad=True)
    master, data = torch.randn(9, 33, requires_grad=True), ops.pack_weight(dense)
    torch.library.opcheck(ops.pack_weight.default, (dense,))
    torch.library.opcheck(ops.linear.default, (x, dense, data, bias, master, torch.float32))
    torch.library.opcheck(ops.linear.default, (x, dense, data, None, None, torch.bfloat16))
    arguments = (torch.randn(4, 9), x.detach(), dense, True, False, True)
    torch.library.opcheck(ops.linear_backward.default, arguments)


def test_what_does_not_fit_is_named(cpu_class):
    weight = pack_weight(torch.randn(4, 5), torch.float32)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 6\), want \(M, 5\)"):
        linear(torch.zeros(2, 6), weight)
    with pytest.raises(ValueError, match=r"bias: got shape \(5,\), want \(4,\)"):
        linear(torch.zeros(2, 5), weight, torch.zeros(5))
    with pytest.raises(ValueError, match=r"master: got shape \(5, 4\), want \(4, 5\)"):
        linear(torch.zeros(2, 5), weight, None, torch.zeros(5, 4))
    with pytest.raises(ValueError, match="master: got shape"):
        pack_weight(torch.zeros(4), torch.float32)
    with pytest.raises(ValueError, match="dtype Half, want float32 or bfloat16"):
        linear(torch.zeros(2, 5, dtype=torch.float16), weight)
    with pytest.raises(ValueError, match="packed bytes, want"):
        torch.ops.engine.linear(
            torch.zeros(2, 5), weight.dense, weight.data[1:], None, None, torch.float32
        )


def test_a_weight_of_another_class_or_backend_is_refused(cpu_class):
    weight = pack_weight(torch.randn(4, 5), torch.float32)
    other = PackedWeight(weight.dense, weight.data, "another")
    with pytest.raises(ValueError, match="packed for 'another', want one for"):
        linear(torch.zeros(2, 5), other)
    with backend("reference"):
        unpacked = pack_weight(torch.randn(4, 5), torch.float32)
        assert unpacked.data is None and linear(torch.zeros(2, 5), weight).shape == (2, 4)
    with pytest.raises(ValueError, match="packed for 'reference'"):
        linear(torch.zeros(2, 5), unpacked)
