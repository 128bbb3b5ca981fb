"""attention: the float64 definition, what a row may see, and equality to the bit however a batch is packed."""

import pytest
import torch
from gradients import DTYPES, check_against_float64, equal, result_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.attention import attention, attention_reference


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def qkv(tokens: int, heads: tuple[int, int], size: int, dtype=torch.float32) -> list[torch.Tensor]:
    """q, k, v and a gradient of the result."""
    query, key = heads
    return [torch.randn(tokens, h, size).to(dtype) for h in (query, key, key, query)]


def segments_of(groups: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[(prompt length, answer lengths)] -> cu, prefix."""
    lengths, prefix = [], []
    for prompt, answers in groups:
        owner = len(lengths)
        lengths += [prompt, *answers]
        prefix += [owner] * (1 + len(answers))
    return offsets(lengths), torch.tensor(prefix, dtype=torch.int32)


SHAPES = [  # lengths, prefix, (Hq, Hk), D
    ([5], None, (1, 1), 12),
    ([0, 1, 70, 0, 17], None, (6, 2), 64),
    ([70, 0, 1, 130, 33, 65], [0, 0, 0, 3, 3, 0], (3, 1), 80),
    ([16, 16, 64, 1], [0, 0, 2, 2], (4, 4), 128),
    ([90, 10, 40], [0, 0, 0], (9, 1), 33),
    ([0, 3, 2], [0, 0, 0], (2, 1), 8),
    ([400], None, (2, 1), 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths,prefix,heads,size", SHAPES)
def test_against_float64(cpu_class, dtype, lengths, prefix, heads, size):
    cu = offsets(lengths)
    prefix = None if prefix is None else torch.tensor(prefix, dtype=torch.int32)
    *inputs, grad = qkv(sum(lengths), heads, size, dtype)
    check_against_float64(
        lambda *x: attention(*x, cu, prefix),
        lambda *x: attention_reference(*x, cu, prefix),
        inputs,
        grad,
        units=16,
    )


@settings(deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(0, 70), st.lists(st.integers(0, 40), max_size=4)),
        min_size=1,
        max_size=4,
    ),
    heads=st.sampled_from([(1, 1), (6, 2), (4, 4), (5, 1)]),
    size=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_ragged_groups(groups, heads, size, dtype, seed):
    torch.manual_seed(seed)
    # the last group: where every row sees one key, the gradients of q and k are 0 by cancellation, and the tolerance
    # would have no scale
    cu, prefix = segments_of([*groups, (3, [2])])
    *inputs, grad = qkv(int(cu[-1]), heads, size, dtype)
    check_against_float64(
        lambda *x: attention(*x, cu, prefix),
        lambda *x: attention_reference(*x, cu, prefix),
        inputs,
        grad,
        units=16,
    )


def test_no_segments(cpu_class):
    *inputs, grad = qkv(0, (2, 1), 8)
    results = result_and_gradients(lambda *x: attention(*x, offsets([])), inputs, grad)
    assert [tuple(x.shape) for x in results] == [(0, 2, 8), (0, 2, 8), (0, 1, 8), (0, 1, 8)]


def test_a_row_sees_its_prefix_and_itself_and_nothing_later(cpu_class):
    """Equal scores, and values that are unit vectors: the result tells who was seen."""
    cu, prefix = segments_of([(2, [3, 2]), (1, [])])
    tokens = int(cu[-1])
    q, k = torch.zeros(tokens, 1, tokens), torch.zeros(tokens, 1, tokens)
    seen = attention(q, k, torch.eye(tokens)[:, None], cu, prefix)[:, 0] > 0
    want = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 5], [0, 1, 5, 6], [7]]
    assert [row.nonzero().flatten().tolist() for row in seen] == want


def test_each_query_head_reads_its_own_key_head(cpu_class):
    q, k = torch.zeros(1, 6, 4), torch.zeros(1, 3, 4)
    v = torch.arange(3.0)[None, :, None].expand(1, 3, 4)
    out = attention(q, k, v, offsets([1]))
    assert out[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,size", [((6, 2), 64), ((2, 2), 20)])
def test_rows_do_not_depend_on_packing(cpu_class, dtype, heads, size):
    lengths = [70, 1, 130, 33, 300]
    *inputs, grad = qkv(sum(lengths), heads, size, dtype)
    cu = offsets(lengths)
    together = result_and_gradients(lambda *x: attention(*x, cu), inputs, grad)
    for s, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        part = [x[begin:end] for x in inputs]
        one = offsets(lengths[s : s + 1])
        alone = result_and_gradients(lambda *x, one=one: attention(*x, one), part, grad[begin:end])
        assert equal([x[begin:end] for x in together], alone)
    last = [x[-300:-100] for x in inputs]  # the rows of a beginning do not know what follows
    assert torch.equal(attention(*last, offsets([200])), together[0][-300:-100])


def repeated(groups, x: torch.Tensor) -> torch.Tensor:
    """The rows of a batch with shared prompts as independent sequences: prompt, then prompt + answer each."""
    cu, prefix = segments_of(groups)
    rows = []
    for s, p in enumerate(prefix.tolist()):
        rows += [x[cu[p] : cu[p + 1]]] * (p != s) + [x[cu[s] : cu[s + 1]]]
    return torch.cat(rows)


def repeated_offsets(groups) -> torch.Tensor:
    return offsets(
        [n for prompt, answers in groups for n in [prompt, *(prompt + a for a in answers)]]
    )


GROUPS = [(23, [40, 7, 0, 90]), (64, [1, 65]), (0, [5]), (100, [])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shared_prefix_equals_a_repeated_one(cpu_class, dtype):
    cu, prefix = segments_of(GROUPS)
    q, k, v, _ = qkv(int(cu[-1]), (6, 2), 24, dtype)
    shared = attention(q, k, v, cu, prefix)
    alone = attention(*(repeated(GROUPS, x) for x in (q, k, v)), repeated_offsets(GROUPS))
    begin = 0
    for s, p in enumerate(prefix.tolist()):
        begin += int(cu[p + 1] - cu[p]) if p != s else 0
        end = begin + int(cu[s + 1] - cu[s])
        assert torch.equal(shared[cu[s] : cu[s + 1]], alone[begin:end]), s
        begin = end


def test_a_prefix_collects_the_gradients_of_its_answers(cpu_class):
    """Through the repeated form, autograd's own gather adds up what the copies of the prompt receive."""
    cu, prefix = segments_of(GROUPS)
    *inputs, grad = qkv(int(cu[-1]), (6, 2), 24)
    _, *shared = result_and_gradients(lambda *x: attention(*x, cu, prefix), inputs, grad)
    # The answers' copies of the prompt are keys only: no gradient enters at their rows.
    own = torch.zeros(0, dtype=torch.bool)
    for s, p in enumerate(prefix.tolist()):
        copy = int(cu[p + 1] - cu[p]) if p != s else 0
        own = torch.cat([own, torch.zeros(copy).bool(), torch.ones(int(cu[s + 1] - cu[s])).bool()])

    def repeated_form(q, k, v):
        return attention(*(repeated(GROUPS, x) for x in (q, k, v)), repeated_offsets(GROUPS))[own]

    _, *alone = result_and_gradients(repeated_form, inputs, grad)
    for ours, want in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(cpu_class, dtype):
    cu, prefix = segments_of([(150, [60, 70, 9]), (300, []), (40, [200, 1])])
    *inputs, grad = qkv(int(cu[-1]), (6, 2), 64, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(result_and_gradients(lambda *x: attention(*x, cu, prefix), inputs, grad))
    torch.set_num_threads(before)
    assert equal(*results)


def test_large_scores(cpu_class):
    """Scores of +-1e4, and a maximum that comes after a block of small ones."""
    q, k, v, grad = qkv(150, (2, 1), 16)
    q, k = q * 100, k * 100
    q[149], k[140] = 100.0, 100.0
    check_against_float64(
        lambda v: attention(q, k, v, offsets([150])),
        lambda v: attention_reference(q.to(v.dtype), k.to(v.dtype), v, offsets([150])),
        (v,),
        grad,
        units=64,  # a score of 1e4 has an absolute error of 1e-3
    )
    results = result_and_gradients(lambda *x: attention(*x, offsets([150])), (q, k, v), grad)
    assert all(torch.isfinite(x).all() for x in results)


def test_gradcheck_of_the_definition():
    cu, prefix = segments_of([(2, [3, 1])])
    inputs = [x.double().requires_grad_() for x in qkv(6, (4, 2), 3)[:3]]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, cu, prefix), inputs)


@pytest.mark.parametrize("shared", [True, False])
def test_opcheck(shared):
    cu, prefix = segments_of([(2, [3, 1])])
    prefix = prefix if shared else None
    q, k, v, grad = qkv(6, (4, 2), 8)
    torch.library.opcheck(torch.ops.engine.attention.default, (q, k, v, cu, prefix))
    out, lse = torch.ops.engine.attention(q, k, v, cu, prefix)
    arguments = (grad, q, k, v, out, lse, cu, prefix)
    torch.library.opcheck(torch.ops.engine.attention_backward.default, arguments)


def test_strided_inputs(cpu_class):
    both = torch.randn(9, 4, 16)
    q, k, v = both.split([2, 1, 1], dim=1)
    copies = (x.contiguous() for x in (q, k, v))
    assert torch.equal(attention(q, k, v, offsets([9])), attention(*copies, offsets([9])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_do_not_fit(dtype):
    q, k, v, _ = (x.to(dtype) for x in qkv(4, (3, 2), 8))
    with pytest.raises(ValueError, match="q: got 3 heads, want a multiple of the 2 key heads"):
        attention(q, k, v, offsets([4]))
    q = q[:, :2]
    with pytest.raises(ValueError, match="cu.*got .*want"):
        attention(q, k, v, offsets([5]))
    for wrong in ([0, 2], [1, 1], [0, -1]):
        with pytest.raises(ValueError, match="prefix.*got .*want"):
            attention(q, k, v, offsets([2, 2]), torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match="head size 4, want that of q, 8"):
        attention(q, k[..., :4], v[..., :4], offsets([4]))
