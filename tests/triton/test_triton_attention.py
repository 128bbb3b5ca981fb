"""attention's Triton kernels against the float64 definition, and row by row to the bit however a batch is packed."""

import functools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton.language as tl
from compare import assert_close
from guards import guarded
from launching import DEVICE, check_on_triton, gradients_on_triton, on_triton
from mutations import mutations

from engine.kernels import _backend
from engine.kernels._backend import backend
from engine.kernels.attention import attention, attention_reference
from engine.kernels.triton import _interpreter, _launch
from engine.kernels.triton import attention as kernels


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def owners(prefix: list[int] | None) -> torch.Tensor | None:
    return None if prefix is None else torch.tensor(prefix, dtype=torch.int32, device=DEVICE)


def qkv(tokens: int, heads: tuple[int, int], size: int, dtype=torch.float32) -> list[torch.Tensor]:
    """q, k, v and a gradient of the result."""
    query, key = heads
    return [torch.randn(tokens, h, size).to(DEVICE, dtype) for h in (query, key, key, query)]


@contextmanager
def blocks(m: int, n: int, s: int = 4):
    """Inside, every kernel takes blocks of m rows and n keys, and looks at s segments at a time: all loops run."""
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_S": s}
    row = {"up_to": None, "num_warps": 4, "num_stages": 1, **sizes}
    with pytest.MonkeyPatch.context() as patch:
        every = dict.fromkeys((*_launch.NVIDIA, *_launch.AMD), [row])
        patch.setattr(_launch, "table", lambda op: every)
        yield


def check(lengths, prefix, heads, size, dtype) -> None:
    cu, prefix = offsets(lengths), owners(prefix)
    *inputs, grad = qkv(sum(lengths), heads, size, dtype)
    check_on_triton(
        lambda *x: attention(*x, cu, prefix),
        lambda *x: attention_reference(*x, cu, prefix),
        inputs,
        grad,
        units=16 if dtype == torch.float32 else 2,
    )


@contextmanager
def ordered_products():
    """Inside, the interpreter's products are sums over the depth in order, as each element's is on a GPU.

    The library that numpy multiplies with sums a row differently at another place of the block.
    """
    if not _interpreter.active():
        yield
        return
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    def wide(x):
        return _interpreter.widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(a, b, d, *others):
        product = (wide(a)[:, :, None] * wide(b)[None].astype(np.float32)).sum(1)
        return TensorHandle(product + d.data, d.dtype.scalar)

    interpreter_builder.create_dot = create_dot
    try:
        yield
    finally:
        del interpreter_builder.create_dot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype):
    with blocks(16, 16):
        check([0, 1, 20, 0, 5], None, (4, 2), 37, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefixes_against_float64(dtype):
    """Two prompts, and an answer to the first behind those to the second; in float32 the defects' checks do it."""
    with blocks(16, 32):
        check([19, 0, 1, 18, 9, 20], [0, 0, 0, 3, 3, 0], (2, 1), 12, dtype)


@pytest.mark.parametrize(
    "dtype,heads,size", [(torch.float32, (1, 1), 80), (torch.bfloat16, (3, 1), 64)]
)
def test_with_the_blocks_of_the_tables(dtype, heads, size):
    check([30, 0, 70], [0, 0, 0], heads, size, dtype)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows(lengths):
    *inputs, grad = qkv(0, (2, 1), 8)
    results = gradients_on_triton(lambda *x: attention(*x, offsets(lengths)), inputs, grad)
    assert [tuple(x.shape) for x in results] == [(0, 2, 8), (0, 2, 8), (0, 1, 8), (0, 1, 8)]


def test_a_row_sees_its_prefix_and_itself_and_nothing_later():
    """Equal scores, and values that are unit vectors: the result tells who was seen."""
    cu, prefix = offsets([2, 3, 2, 1]), owners([0, 0, 0, 3])
    q = torch.zeros(8, 1, 8, device=DEVICE)
    out = on_triton(attention)(q, q, torch.eye(8, device=DEVICE)[:, None], cu, prefix)
    want = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 5], [0, 1, 5, 6], [7]]
    assert [row.nonzero().flatten().tolist() for row in out[:, 0] > 0] == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_packing(dtype):
    cu = offsets([17, 1, 0, 20])
    *inputs, grad = qkv(38, (1, 1), 20, dtype)
    with blocks(16, 16):
        together = gradients_on_triton(lambda *x: attention(*x, cu), inputs, grad)
        again = gradients_on_triton(lambda *x: attention(*x, cu), inputs, grad)
        assert all(torch.equal(x, y) for x, y in zip(together, again, strict=True))
        for begin, end in ((0, 17), (18, 38)):
            part = [x[begin:end] for x in inputs]
            one = offsets([end - begin])
            alone = gradients_on_triton(
                lambda *x, one=one: attention(*x, one), part, grad[begin:end]
            )
            assert all(torch.equal(x[begin:end], y) for x, y in zip(together, alone, strict=True))
        beginning = [x[18:35] for x in inputs]  # rows do not know what follows
        out = on_triton(attention)(*beginning, offsets([17]))
        assert torch.equal(out, together[0][18:35])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_prefix_equals_a_repeated_one(dtype):
    """19 keys of a prompt: blocks of keys straddle its end, and answers begin inside blocks of rows."""
    cu = offsets([19, 20, 5])
    q, k, v, _ = qkv(44, (2, 1), 20, dtype)
    prompt = torch.arange(19)
    whole = [torch.cat([prompt, torch.arange(*answer)]) for answer in ((19, 39), (39, 44))]
    rows = torch.cat(whole).to(DEVICE)
    with blocks(16, 16), ordered_products():
        shared = on_triton(attention)(q, k, v, cu, owners([0, 0, 0]))
        apart = on_triton(attention)(q[rows], k[rows], v[rows], offsets([len(r) for r in whole]))
        with blocks(16, 32):
            other = on_triton(attention)(q, k, v, cu, owners([0, 0, 0]))
    assert torch.equal(shared[rows], apart)
    assert not torch.equal(shared, other)  # other blocks of keys would be seen


def test_large_scores():
    """Scores of +-1e4, and a maximum that comes after a block of small ones.

    Of whole numbers, so that every order of their sum is exact: made again by the backward, a score of 1e4 would
    otherwise differ by 1e-3 from the forward's.
    """
    q, k, v, grad = qkv(40, (1, 1), 16)
    q, k = (q * 100).round(), (k * 100).round()
    q[39], k[35] = 100.0, 100.0
    cu = offsets([40])
    with blocks(16, 16):
        check_on_triton(
            lambda v: attention(q, k, v, cu),
            lambda v: attention_reference(q.to(v.dtype), k.to(v.dtype), v, cu),
            (v,),
            grad,
            units=16,
        )
        results = gradients_on_triton(lambda *x: attention(*x, cu), (q, k, v), grad)
    assert all(torch.isfinite(x).all() for x in results)


def check_minus_infinity() -> None:
    """Whole blocks of scores that are -inf, then of -300.

    A row that sees nothing else than -inf is NaN, as softmax has it; others are not.
    """
    q = torch.ones(40, 1, 1, device=DEVICE)
    k, v = torch.randn_like(q) - 300, torch.randn_like(q)
    k[:20] = -torch.inf
    with blocks(16, 16):
        out = on_triton(attention)(q, k, v, offsets([40]))
    assert torch.isnan(out[:20]).all()
    torch.testing.assert_close(out[20:], attention_reference(q, k, v, offsets([40]))[20:])


def test_minus_infinity():
    check_minus_infinity()


def test_unaligned_slices():
    cu, prefix = offsets([19, 6]), owners([0, 0])
    q, k, v, _ = qkv(25, (2, 1), 12, torch.bfloat16)
    with guarded() as guards, backend("triton"):
        out = attention(*(guards.place(x, shift=1) for x in (q, k, v)), cu, prefix)
    assert torch.equal(out, on_triton(attention)(q, k, v, cu, prefix))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="offsets on a GPU are not looked at")
def test_inputs_that_do_not_fit():
    q, k, v, _ = qkv(4, (2, 2), 8)
    with pytest.raises(ValueError, match="cu.*got .*want"):
        on_triton(attention)(q, k, v, offsets([5]))
    with pytest.raises(ValueError, match="prefix.*got .*want"):
        on_triton(attention)(q, k, v, offsets([2, 2]), owners([0, 2]))
    with pytest.raises(ValueError, match="cu: got torch.int64"):
        on_triton(attention)(q, k, v, offsets([4]).long())


LENGTHS, OWNERS = [17, 2, 3, 1], [0, 0, 2, 0]


@functools.cache
def definition(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(0)
    tensors = qkv(sum(LENGTHS), (2, 1), 12)
    tensors[1] *= torch.linspace(0.5, 3, sum(LENGTHS), device=DEVICE)[:, None, None]  # new maxima
    q, k, v, grad = (x.to(dtype).requires_grad_() for x in tensors)
    cu, owner = offsets(LENGTHS), owners(OWNERS)
    out = attention_reference(q, k, v, cu, owner)
    out.backward(grad.detach())
    lse = []
    for s, p in enumerate(OWNERS):
        keys = torch.cat([k[cu[p] : cu[p + 1]], *([k[cu[s] : cu[s + 1]]] if p != s else [])])
        score = torch.einsum("ihd,jd->ihj", q[cu[s] : cu[s + 1]], keys[:, 0]) * 12**-0.5
        ahead = torch.ones(len(score), len(keys), dtype=torch.bool).triu(len(keys) - len(score) + 1)
        masked = score.masked_fill(ahead.to(DEVICE)[:, None], -torch.inf)
        lse.append(masked.logsumexp(-1))
    results = {
        "in": [q, k, v, grad],
        "out": [out, torch.cat(lse)],
        "grad": [q.grad, k.grad, v.grad],
    }
    return {name: [x.detach() for x in tensors] for name, tensors in results.items()}


def compare(name: str, ours) -> None:
    plain, truth = definition(torch.float32)[name], definition(torch.float64)[name]
    for o, r, t in zip(ours, plain, truth, strict=True):
        assert_close(o, r, t, units=16)


def run(op: str, *arguments):
    with guarded() as guards, backend("triton"), blocks(16, 16, 2):
        segments = (offsets(LENGTHS), owners(OWNERS))
        return _backend.kernel(op)(*(guards.place(x) for x in (*arguments, *segments)))


def check_forward() -> None:
    compare("out", run("attention", *definition(torch.float32)["in"][:3]))


def check_backward() -> None:
    given = definition(torch.float32)
    *inputs, grad = given["in"]
    compare("grad", run("attention_backward", grad, *inputs, *given["out"]))


def test_without_defects():
    check_forward()
    check_backward()


BOUND = "cu + p + 1) - shared_begin"
FORWARD_DEFECTS = {
    "blocks of segments overlap": ("begin // BLOCK + s <= tile", "begin // BLOCK <= tile"),
    "only the first segments are looked at": (
        "(0, segments, BLOCK_S):\n        s =",
        "(0, BLOCK_S, BLOCK_S):\n        s =",
    ),
    "channels without a mask": (
        "(rows < length)[:, None] & (tl.arange(0, BLOCK_D) < D)",
        "(rows < length)[:, None] & (tl.arange(0, BLOCK_D) >= 0)",
    ),
    "rows without a mask": ("(rows < length)[:, None] &", "(rows >= 0)[:, None] &"),
    "a segment is its own prefix": (f"tl.where(p == s, 0, tl.load({BOUND})", f"tl.load({BOUND}"),
    "the prefix is one key short": (BOUND, "cu + p + 1) - shared_begin - 1"),
    "every head is the first": ("* HEADS + head) * D + tl", "* HEADS) * D + tl"),
    "no rescale of the sum": ("weight * rescale + tl.sum(p, 1)", "weight + tl.sum(p, 1)"),
    "no rescale of the values": ("acc * rescale[:, None], input", "acc, input"),
    "log-sum-exp in base 2": ("scaled + tl.log(weight)", "scaled + tl.log2(weight)"),
    "log-sum-exp without the maximum": ("scaled + tl.log(weight)", "tl.log(weight)"),
    "the scale forgotten": ("binary = scale * LOG2E", "binary = LOG2E"),
    "keys end with the block's rows": (
        "end = tl.minimum(shared + first + BLOCK_M, total)",
        "end = first + BLOCK_M",
    ),
}
BACKWARD_DEFECTS = {
    "delta forgotten": ("ds = p * (dp - minus[:, None])", "ds = p * dp"),
    "the wrong sign of delta": ("ds = p * (dp - minus[:, None])", "ds = p * (dp + minus[:, None])"),
    "the queries' scale forgotten": (
        "    acc *= tl.cast(scale, tl.float32)\n",
        "",
    ),
    "the keys' scale forgotten": ("acc_k *= tl.cast(scale, tl.float32)\n", ""),
    "the last delta left out": (
        "tl.sum(g * o, 1), mask=rows < count",
        "tl.sum(g * o, 1), mask=rows < count - 1",
    ),
    "delta of the gradient alone": ("tl.sum(g * o, 1)", "tl.sum(g, 1)"),
    "delta by rows of the block's width": (
        "at = rows[:, None] * D +",
        "at = rows[:, None] * BLOCK_D +",
    ),
    "a prefix collects nothing": (
        "last = _last_sharer(prefix, s, segments, PREFIX, BLOCK_S)",
        "last = s",
    ),
    "a prefix collects from all": ("if tl.load(prefix + t) != s:", "if tl.load(prefix + t) == -1:"),
    "the last sharer is not found": (
        "tl.max(tl.where(p == s, i, 0), 0)",
        "tl.min(tl.where(p == s, i, s), 0)",
    ),
    "an answer's rows as the prompt's own": ("start, before = 0, length", "start, before = 0, 0"),
    "an answer's first rows left out": (
        "start, before = 0, length",
        "start, before = BLOCK_M, length",
    ),
    "the last head left out": ("(key_head + 1) * GROUP):", "(key_head + 1) * GROUP - 1):"),
    "the diagonal left out": (
        "keys[:, None] <= (before + rows)",
        "keys[:, None] < (before + rows)",
    ),
    "the values' gradient starts anew": ("g, acc_v, input", "g, acc_v * 0, input"),
    "gradients swapped": ("tl.store(d_v + at, acc_v.to", "tl.store(d_v + at, acc_k.to"),
    "rows start behind the diagonal": (
        "first // BLOCK_M * BLOCK_M, 0",
        "first // BLOCK_M * BLOCK_M + 1, 0",
    ),
}
INFINITY_DEFECTS = {
    "-inf - -inf": ('zero = tl.where(above == -float("inf"), 0.0, above)', "zero = above"),
    "the maximum starts from 0": (
        'most = tl.full((BLOCK_M,), -float("inf"), tl.float32)',
        "most = tl.zeros((BLOCK_M,), tl.float32)",
    ),
}


@mutations(kernels, FORWARD_DEFECTS)
def test_defects_are_caught():
    check_forward()


@mutations(kernels, BACKWARD_DEFECTS)
def test_defects_of_the_backward_are_caught():
    check_backward()


@mutations(kernels, INFINITY_DEFECTS)
def test_defects_at_minus_infinity_are_caught():
    check_minus_infinity()
