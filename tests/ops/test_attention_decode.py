"""attention_decode: the float64 definition, pages in any place, and the same bits as the row of `attention`."""

import pytest
import torch
from compare import assert_close
from gradients import DTYPES

from engine.kernels.attention import attention
from engine.kernels.attention_decode import attention_decode, attention_decode_reference


def paged(keys: list[torch.Tensor], page: int, spare: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences (T, Hk, D) -> pages in random order with finite rubbish wherever no key lies, and the table."""
    counts = [-(-len(x) // page) for x in keys]
    total, width = sum(counts) + spare, max(counts) + 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).int()
    pages = torch.randn(total, page, *keys[0].shape[1:]).to(keys[0].dtype) * 50
    table, used = torch.full((len(keys), width), -7, dtype=torch.int32), 0
    for r, (x, count) in enumerate(zip(keys, counts, strict=True)):
        table[r, :count] = order[used : used + count]
        used += count
        for i in range(len(x)):
            pages[table[r, i // page], i % page] = x[i]
    return pages, table


def batch(lengths: list[int], heads: tuple[int, int], size: int, dtype: torch.dtype):
    """One sequence a row: its keys, values and the query of its last token."""
    k, v = ([torch.randn(n, heads[1], size).to(dtype) for n in lengths] for _ in range(2))
    return torch.randn(len(lengths), heads[0], size).to(dtype), k, v


LENGTHS = [1, 2, 16, 17, 63, 64, 65, 200]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,size", [((6, 2), 64), ((1, 1), 12), ((8, 1), 80), ((18, 2), 33)])
@pytest.mark.parametrize("page", [16, 5])
def test_against_float64(cpu_class, dtype, heads, size, page):
    q, k, v = batch(LENGTHS, heads, size, dtype)
    (k_pages, table), (v_pages, _) = paged(k, page), paged(v, page)
    arguments = q, k_pages, v_pages
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    ours = attention_decode(*arguments, table, lengths)
    plain = attention_decode_reference(*arguments, table, lengths)
    truth = attention_decode_reference(*(x.double() for x in arguments), table, lengths)
    assert ours.dtype == dtype
    assert_close(ours, plain, truth, units=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,size", [((6, 2), 64), ((3, 3), 20), ((9, 1), 128)])
@pytest.mark.parametrize("page", [16, 64])
def test_equal_to_the_row_of_attention(cpu_class, threads, dtype, heads, size, page):
    q, k, v = batch(LENGTHS, heads, size, dtype)
    (k_pages, table), (v_pages, _) = paged(k, page), paged(v, page)
    out = attention_decode(q, k_pages, v_pages, table, torch.tensor(LENGTHS, dtype=torch.int32))
    for r, n in enumerate(LENGTHS):
        queries = torch.cat([torch.randn(n - 1, *q.shape[1:]).to(dtype), q[r : r + 1]])
        rows = attention(queries, k[r], v[r], torch.tensor([0, n], dtype=torch.int32))
        assert torch.equal(out[r], rows[-1]), n


def test_shared_pages_and_what_lies_behind_a_length(cpu_class):
    """Two rows over the same first page; rubbish behind a length and in spare pages changes nothing."""
    q, k, v = batch([40, 40], (4, 2), 16, torch.float32)
    k[1][:16], v[1][:16], q[1] = k[0][:16], v[0][:16], q[0]
    (k_pages, table), (v_pages, _) = paged(k, 16), paged(v, 16)
    lengths = torch.tensor([40, 16], dtype=torch.int32)
    separate = attention_decode(q, k_pages, v_pages, table, lengths)
    table[1, 0] = table[0, 0]
    shared = attention_decode(q, k_pages, v_pages, table, lengths)
    assert torch.equal(separate, shared)
    for pages in (k_pages, v_pages):
        pages[table[0, 2], 8:] = -3e30
    assert torch.equal(attention_decode(q, k_pages, v_pages, table, lengths), shared)


def test_no_rows(cpu_class):
    table, lengths = torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    pages = torch.zeros(2, 16, 1, 8)
    assert attention_decode(torch.zeros(0, 2, 8), pages, pages, table, lengths).shape == (0, 2, 8)


def test_opcheck():
    q, k, v = batch([20, 3], (4, 2), 8, torch.float32)
    (k_pages, table), (v_pages, _) = paged(k, 16), paged(v, 16)
    arguments = (q, k_pages, v_pages, table, torch.tensor([20, 3], dtype=torch.int32))
    torch.library.opcheck(torch.ops.engine.attention_decode.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_do_not_fit(dtype):
    q, pages = torch.zeros(1, 2, 8, dtype=dtype), torch.zeros(3, 16, 1, 8, dtype=dtype)

    def decode(table: list[int], length: int) -> torch.Tensor:
        row = torch.tensor([table], dtype=torch.int32)
        return attention_decode(q, pages, pages, row, torch.tensor([length], dtype=torch.int32))

    for length in (0, 33):
        with pytest.raises(ValueError, match=rf"lengths\[0\]: got {length}, want 1 ... 32"):
            decode([0, 1], length)
    for page in (-1, 3):
        with pytest.raises(ValueError, match="page_table.*got .*want 0 ... 2"):
            decode([0, page], 17)
    assert decode([0, -1], 16).shape == (1, 2, 8)  # a page beyond the length may be anything
