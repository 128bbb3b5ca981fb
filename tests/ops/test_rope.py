"""rope against the float64 definition, as a rotation, and by relative position."""

import pytest
import torch
from compare import assert_close
from gradients import DTYPES, check_against_float64, equal, result_and_gradients

from engine.kernels.attention_decode import PAGE, page_shapes, read_pages, write_pages
from engine.kernels.rope import rope, rope_and_write, rope_and_write_reference, rope_reference


def angles(positions: int, rot: int) -> torch.Tensor:
    """(positions, rot): cos, then sin, of p 10000^(-2i/rot)."""
    frequency = 10000.0 ** (-torch.arange(0, rot, 2, dtype=torch.float64) / max(rot, 1))
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens,heads,size,rot",
    [(0, 2, 8, 8), (1, 1, 2, 2), (9, 3, 64, 64), (5, 2, 80, 20), (4, 1, 12, 0)],
)
def test_against_float64(cpu_class, dtype, tokens, heads, size, rot):
    table, positions = angles(50, rot), torch.randint(0, 50, (tokens,))
    x, grad = (torch.randn(tokens, heads, size).to(dtype) for _ in range(2))
    check_against_float64(
        lambda x: rope(x, positions, table),
        lambda x: rope_reference(
            x, positions, table.double() if x.dtype == torch.float64 else table
        ),
        (x,),
        grad,
    )


def test_one_pair_by_hand(cpu_class):
    """Position 1, angle 0.3: (1, 0) -> (cos, sin); channels past rot stay."""
    table = torch.tensor([[1.0, 0.0], [0.955336, 0.295520]])
    x = torch.tensor([[[1.0, 0.0, 7.0]], [[1.0, 0.0, 7.0]]])
    want = torch.tensor([[[1.0, 0.0, 7.0]], [[0.955336, 0.295520, 7.0]]])
    assert torch.equal(rope(x, torch.tensor([0, 1]), table), want)


def test_scores_depend_on_the_distance_alone(cpu_class):
    table, q, k = angles(100, 32), torch.randn(1, 1, 32), torch.randn(1, 1, 32)
    at = [
        (rope(q, torch.tensor([p + 5]), table) * rope(k, torch.tensor([p]), table)).sum()
        for p in (0, 40, 94)
    ]
    torch.testing.assert_close(at[1:], [at[0], at[0]], rtol=1e-4, atol=1e-4)


def test_gradient_is_the_rotation_back(cpu_class):
    table, positions = angles(30, 16), torch.randint(0, 30, (6,))
    x, grad = torch.randn(6, 2, 20), torch.randn(6, 2, 20)
    _, back = result_and_gradients(lambda x: rope(x, positions, table), (x,), grad)
    torch.testing.assert_close(rope(back, positions, table), grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_independent(cpu_class, threads, dtype):
    table, positions = angles(64, 24), torch.randint(0, 64, (2000,))
    x = torch.randn(2000, 3, 24).to(dtype)
    part = rope(x[777:900], positions[777:900], table)
    assert equal([rope(x, positions, table)[777:900]], [part])


def new_tokens(dtype):
    """q, k, v, positions, table of 7 tokens, and their slots in 2 pages."""
    q, k, v = (torch.randn(7, heads, 20).to(dtype) for heads in (6, 2, 2))
    slots = torch.randperm(2 * PAGE)[:7]
    return q, k, v, torch.randint(0, 50, (7,)), angles(50, 16), slots


def pages(dtype):
    return [torch.zeros(2, *shape, dtype=dtype) for shape in page_shapes(2, 20, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_dtype", DTYPES)
def test_rope_and_write(cpu_class, dtype, page_dtype):
    *inputs, slots = new_tokens(dtype)
    wide, results = [x.double() if x.is_floating_point() else x for x in inputs], []
    for op, values, kind in (
        (rope_and_write, inputs, page_dtype),
        (rope_and_write_reference, inputs, page_dtype),
        (rope_and_write, wide, torch.float64),
    ):
        cache = pages(kind)
        out = op(*values, *cache, slots)
        results.append([out, *read_pages(*cache)])
    for name, ours, plain, truth in zip(("q", "keys", "values"), *results, strict=True):
        assert ours.dtype == plain.dtype
        assert_close(ours, plain, truth, name)
    assert torch.equal(results[0][2], results[1][2])


def test_rope_and_write_is_rope_and_the_write(cpu_class):
    q, k, v, positions, table, slots = new_tokens(torch.bfloat16)
    k.requires_grad_()
    ours, theirs = pages(torch.bfloat16), pages(torch.bfloat16)
    out = rope_and_write(q, k, v, positions, table, *ours, slots)
    write_pages(*theirs, slots, rope(k.detach(), positions, table), v)
    assert equal([out, *ours], [rope(q, positions, table), *theirs])
    assert not ours[0].requires_grad, "the cache has no gradient"


def test_what_rope_and_write_refuses(cpu_class):
    q, k, v, positions, table, slots = new_tokens(torch.bfloat16)
    k_pages, v_pages = pages(torch.bfloat16)
    good = (q, k, v, positions, table, k_pages, v_pages, slots)

    def refused(message, **changes):
        names = ("q", "k", "v", "positions", "table", "k_pages", "v_pages", "slots")
        with pytest.raises(ValueError, match=message):
            rope_and_write(**{**dict(zip(names, good, strict=True)), **changes})

    refused("slots: got 32 ... 32, want 0 ... 31", slots=torch.full((7,), 32))
    refused("slots: got -1 ... 6", slots=torch.arange(7) - (torch.arange(7) == 0).long())
    refused("slots: got torch.int32", slots=slots.int())
    refused("positions.*got .*want 0 ... 49", positions=torch.full((7,), 50))
    refused("k_pages: got torch.float32 .*want contiguous", k_pages=k_pages.float())
    refused("v_pages: got .*want contiguous", v_pages=v_pages.mT.contiguous().mT)
    refused("q, k, v: got .*want one dtype", v=v.float())
    refused("q, k, v: got .*want one dtype", k=k[:, :1])
    assert k_pages.eq(0).all() and v_pages.eq(0).all()


def test_gradcheck_of_the_definition():
    x, table = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True), angles(9, 4).double()
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.tensor([0, 8, 3]), table), (x,))


@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(inverse):
    arguments = (torch.randn(3, 2, 8), torch.tensor([0, 8, 3]), angles(9, 8), inverse)
    torch.library.opcheck(torch.ops.engine.rope.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("position", [-1, 9])
def test_positions_outside_the_table(position, dtype):
    x, table = torch.randn(2, 1, 4, dtype=dtype), angles(9, 4)
    with pytest.raises(ValueError, match="positions.*got .*want 0 ... 8"):
        rope(x, torch.tensor([0, position]), table)


def test_tables_that_do_not_fit():
    with pytest.raises(ValueError, match="table: got shape .*want .*at most 4"):
        rope(torch.zeros(1, 1, 4), torch.tensor([0]), angles(9, 6))
