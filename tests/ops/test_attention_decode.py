"""attention_decode: the float64 definition, pages in any place, and the same bits as the row of `attention`."""

import pytest
import torch
from compare import assert_close
from gradients import DTYPES
from torch import Tensor

from engine.kernels.attention import attention
from engine.kernels.attention_decode import (
    PAGE,
    attention_decode,
    attention_decode_reference,
    page_shapes,
    read_pages,
    write_pages,
)


def paged(keys: list[Tensor], values: list[Tensor], spare: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences (T, Hk, D) -> pages in random order with finite rubbish wherever no key lies, and the table."""
    counts = [-(-len(x) // PAGE) for x in keys]
    total, width = sum(counts) + spare, max(counts) + 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).int()
    shapes = page_shapes(*keys[0].shape[1:], keys[0].dtype)
    k_pages, v_pages = ((torch.randn(total, *s) * 50).to(keys[0].dtype) for s in shapes)
    table, used = torch.full((len(keys), width), -7, dtype=torch.int32), 0
    for r, (k, v, count) in enumerate(zip(keys, values, counts, strict=True)):
        table[r, :count] = order[used : used + count]
        used += count
        position = torch.arange(len(k))
        slots = table[r, position // PAGE].long() * PAGE + position % PAGE
        write_pages(k_pages, v_pages, slots, k, v)
    return k_pages, v_pages, table


def batch(lengths: list[int], heads: tuple[int, int], size: int, dtype: torch.dtype):
    """One sequence a row: its keys, values and the query of its last token."""
    k, v = ([torch.randn(n, heads[1], size).to(dtype) for n in lengths] for _ in range(2))
    return torch.randn(len(lengths), heads[0], size).to(dtype), k, v


LENGTHS = [1, 2, 16, 17, 63, 64, 65, 200]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,size", [((6, 2), 64), ((1, 1), 12), ((8, 1), 80), ((18, 2), 34), ((7, 1), 64)])
def test_against_float64(cpu_class, dtype, heads, size):
    q, k, v = batch(LENGTHS, heads, size, dtype)
    k_pages, v_pages, table = paged(k, v)
    arguments = q, k_pages, v_pages
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    ours = attention_decode(*arguments, table, lengths)
    plain = attention_decode_reference(*arguments, table, lengths)
    pages = [torch.zeros(len(k_pages), *s).double() for s in page_shapes(heads[1], size, torch.float64)]
    wide = (x.flatten(0, 1).double() for x in read_pages(k_pages, v_pages))
    write_pages(*pages, torch.arange(len(k_pages) * PAGE), *wide)
    truth = attention_decode_reference(q.double(), *pages, table, lengths)
    assert ours.dtype == dtype
    assert_close(ours, plain, truth, units=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,size", [((6, 2), 64), ((3, 3), 20), ((9, 1), 128), ((4, 2), 80)])
def test_equal_to_the_row_of_attention(cpu_class, threads, dtype, heads, size):
    q, k, v = batch(LENGTHS, heads, size, dtype)
    k_pages, v_pages, table = paged(k, v)
    out = attention_decode(q, k_pages, v_pages, table, torch.tensor(LENGTHS, dtype=torch.int32))
    for r, n in enumerate(LENGTHS):
        queries = torch.cat([torch.randn(n - 1, *q.shape[1:]).to(dtype), q[r : r + 1]])
        rows = attention(queries, k[r], v[r], torch.tensor([0, n], dtype=torch.int32))
        assert torch.equal(out[r], rows[-1]), n


def test_shared_pages_and_what_lies_behind_a_length(cpu_class):
    """Two rows over the same first page; rubbish behind a length and in spare pages changes nothing."""
    q, k, v = batch([40, 40], (4, 2), 16, torch.float32)
    k[1][:16], v[1][:16], q[1] = k[0][:16], v[0][:16], q[0]
    k_pages, v_pages, table = paged(k, v)
    lengths = torch.tensor([40, 16], dtype=torch.int32)
    separate = attention_decode(q, k_pages, v_pages, table, lengths)
    table[1, 0] = table[0, 0]
    shared = attention_decode(q, k_pages, v_pages, table, lengths)
    assert torch.equal(separate, shared)
    behind = torch.arange(8, PAGE) + table[0, 2].long() * PAGE
    write_pages(k_pages, v_pages, behind, *(torch.full((8, 2, 16), -3e30) for _ in "kv"))
    assert torch.equal(attention_decode(q, k_pages, v_pages, table, lengths), shared)


# (keys in common, own keys of each row): one block, several, a block and a part, ends of blocks, one own key
SAMPLES = [(64, [1, 2, 63, 64, 65]), (200, [1, 40, 7]), (130, [5] * 20), (63, [1, 1]), (191, [1, 1, 2])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,size", [((6, 2), 64), ((9, 3), 64), ((3, 3), 20), ((9, 1), 128), ((1, 1), 80)])
def test_rows_that_share_keys_go_over_them_together_to_the_same_bits(cpu_class, threads, dtype, heads, size):
    """Samples of some prompts, and rows alone between them; the pages of each prompt are shared, or copied for each."""
    keys, values, shared = [], [], []
    for common, own in SAMPLES:
        k, v = (torch.randn(common, heads[1], size).to(dtype) for _ in "kv")
        for count in [*own, 0]:
            k_own, v_own = (torch.randn(max(count, 70), heads[1], size).to(dtype)[: count or 70] for _ in "kv")
            keys.append(torch.cat([k, k_own]) if count else k_own)
            values.append(torch.cat([v, v_own]) if count else v_own)
            shared.append(common // PAGE if count else 0)
    q = torch.randn(len(keys), heads[0], size).to(dtype)
    k_pages, v_pages, table = paged(keys, values)
    lengths = torch.tensor([len(k) for k in keys], dtype=torch.int32)
    separate = attention_decode(q, k_pages, v_pages, table, lengths)
    for r in range(1, len(keys)):
        table[r, : shared[r]] = table[r - 1, : shared[r]] if shared[r - 1] else table[r, : shared[r]]
    together = attention_decode(q, k_pages, v_pages, table, lengths)
    assert torch.equal(separate, together)
    for copied in (k_pages, v_pages):  # the pages that only `separate` has read
        unused = set(range(len(copied))) - set(table[table >= 0].tolist())
        copied[sorted(unused)] = 3e30
    assert torch.equal(attention_decode(q, k_pages, v_pages, table, lengths), together)


def test_no_rows(cpu_class):
    table, lengths = torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    pages = [torch.zeros(2, *s) for s in page_shapes(1, 8, torch.float32)]
    assert attention_decode(torch.zeros(0, 2, 8), *pages, table, lengths).shape == (0, 2, 8)


def test_opcheck():
    q, k, v = batch([20, 3], (4, 2), 8, torch.float32)
    k_pages, v_pages, table = paged(k, v)
    arguments = (q, k_pages, v_pages, table, torch.tensor([20, 3], dtype=torch.int32))
    torch.library.opcheck(torch.ops.engine.attention_decode.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_do_not_fit(dtype):
    q = torch.zeros(1, 2, 8, dtype=dtype)
    pages = [torch.zeros(3, *s, dtype=dtype) for s in page_shapes(1, 8, dtype)]

    def decode(table: list[int], length: int) -> torch.Tensor:
        row = torch.tensor([table], dtype=torch.int32)
        return attention_decode(q, *pages, row, torch.tensor([length], dtype=torch.int32))

    for length in (0, 33):
        with pytest.raises(ValueError, match=rf"lengths\[0\]: got {length}, want 1 ... 32"):
            decode([0, 1], length)
    for page in (-1, 3):
        with pytest.raises(ValueError, match="page_table.*got .*want 0 ... 2"):
            decode([0, page], 17)
    assert decode([0, -1], 16).shape == (1, 2, 8)  # a page beyond the length may be anything
    for place, name in enumerate(("k_pages", "v_pages")):
        wrong = [p[:, :, :-1] if i == place else p for i, p in enumerate(pages)]
        with pytest.raises(ValueError, match=f"{name}: got shape"):
            attention_decode(q, *wrong, torch.zeros(1, 1).int(), torch.ones(1).int())
    with pytest.raises(ValueError, match="head size: got 9, want an even one"):
        page_shapes(1, 9, torch.bfloat16)


@pytest.mark.parametrize("heads,size", [((9, 3), 64), ((4, 2), 10)])
def test_bfloat16_pages_under_float32_queries_are_their_rounded_numbers(cpu_class, heads, size):
    """A cache of half the size: equal to `attention` over keys and values rounded to bfloat16."""
    q, k, v = batch(LENGTHS, heads, size, torch.float32)
    k_pages, v_pages, table = paged([x.bfloat16() for x in k], [x.bfloat16() for x in v])
    out = attention_decode(q, k_pages, v_pages, table, torch.tensor(LENGTHS, dtype=torch.int32))
    for r, n in enumerate(LENGTHS):
        queries = torch.cat([torch.randn(n - 1, *q.shape[1:]), q[r : r + 1]])
        rounded = (x[r].bfloat16().float() for x in (k, v))
        rows = attention(queries, *rounded, torch.tensor([0, n], dtype=torch.int32))
        assert torch.equal(out[r], rows[-1]), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pages_give_back_what_was_written(dtype):
    shapes = page_shapes(2, 6, dtype)
    pages = [torch.zeros(3, *s, dtype=dtype) for s in shapes]
    k, v = (torch.randn(2, 48, 2, 6).to(dtype)).unbind()
    slots = torch.randperm(48)
    write_pages(*pages, slots, k, v)
    for rows, given in zip(read_pages(*pages), (k, v), strict=True):
        assert torch.equal(rows.flatten(0, 1)[slots], given)
