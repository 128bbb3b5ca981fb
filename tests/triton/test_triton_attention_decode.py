"""attention_decode's Triton kernels: the float64 definition, pages in any place, and rows to the bit in any batch."""

from contextlib import contextmanager

import pytest
import torch
from compare import assert_close
from launching import DEVICE, DTYPES, on_triton
from mutations import mutations
from torch import Tensor

from engine.kernels.attention_decode import (
    PAGE,
    attention_decode,
    attention_decode_reference,
    page_shapes,
    read_pages,
    write_pages,
)
from engine.kernels.triton import _launch
from engine.kernels.triton import attention_decode as kernels


def paged(keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences (T, Hk, D) -> pages in random order with finite rubbish wherever no key lies, and the table."""
    counts = [-(-len(x) // PAGE) for x in keys]
    total, width = sum(counts) + 2, max(counts) + 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).int()
    shapes = page_shapes(*keys[0].shape[1:], keys[0].dtype)
    k_pages, v_pages = ((torch.randn(total, *s) * 50).to(DEVICE, keys[0].dtype) for s in shapes)
    table, used = torch.full((len(keys), width), -7, dtype=torch.int32), 0
    for r, (k, v, count) in enumerate(zip(keys, values, counts, strict=True)):
        table[r, :count] = order[used : used + count]
        used += count
        position = torch.arange(len(k))
        slots = table[r, position // PAGE].long() * PAGE + position % PAGE
        write_pages(k_pages, v_pages, slots.to(DEVICE), k, v)
    return k_pages, v_pages, table.to(DEVICE)


def batch(
    lengths: list[int], heads: tuple[int, int], size: int, dtype, stored=None
) -> list[Tensor]:
    """q, pages of keys and values, their table and the lengths: one sequence a row."""
    k, v = (
        [torch.randn(n, heads[1], size).to(DEVICE, stored or dtype) for n in lengths]
        for _ in range(2)
    )
    q = torch.randn(len(lengths), heads[0], size).to(DEVICE, dtype)
    return [q, *paged(k, v), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)]


@contextmanager
def blocks(chunk: int, n: int):
    """Inside, chunks of `chunk` keys in blocks of n: several of both on few keys."""
    row = {"up_to": None, "CHUNK": chunk, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}
    with pytest.MonkeyPatch.context() as patch:
        every = dict.fromkeys((*_launch.NVIDIA, *_launch.AMD), [row])
        patch.setattr(_launch, "table", lambda op: every)
        yield


def check(lengths, heads, size, dtype, stored=None) -> None:
    q, k_pages, v_pages, table, count = batch(lengths, heads, size, dtype, stored)
    ours = on_triton(attention_decode)(q, k_pages, v_pages, table, count)
    plain = attention_decode_reference(q, k_pages, v_pages, table, count)
    wide = [
        torch.zeros(len(k_pages), *s).to(DEVICE).double()
        for s in page_shapes(heads[1], size, torch.float64)
    ]
    rows = (x.flatten(0, 1).double() for x in read_pages(k_pages, v_pages))
    write_pages(*wide, torch.arange(len(k_pages) * PAGE, device=DEVICE), *rows)
    truth = attention_decode_reference(q.double(), *wide, table, count)
    assert ours.dtype == dtype
    assert_close(ours, plain, truth, units=16 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,size", [((3, 1), 12), ((2, 2), 80)])
def test_against_float64(dtype, heads, size):
    with blocks(64, 32):
        check([1, 17, 64, 65, 131], heads, size, dtype)


def test_bfloat16_pages_under_float32_queries():
    with blocks(64, 32):
        check([1, 33, 70], (3, 1), 12, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_chunks_of_the_table(dtype):
    check([2, 257, 300], (3, 1), 64, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_batch(dtype):
    """Alone, beside longer rows, in another order, over pages in other places: the same bits."""
    q, k_pages, v_pages, table, lengths = batch([70, 1, 150, 64], (4, 2), 20, dtype)
    decode = on_triton(attention_decode)
    with blocks(64, 32):
        together = decode(q, k_pages, v_pages, table, lengths)
        assert torch.equal(decode(q, k_pages, v_pages, table, lengths), together)
        for r in range(3):
            width = -(-int(lengths[r]) // PAGE)
            one = slice(r, r + 1)
            alone = decode(q[one], k_pages, v_pages, table[one, :width], lengths[one])
            assert torch.equal(alone, together[one])
        turned = torch.tensor([3, 0, 2, 1], device=DEVICE)
        back = len(k_pages) - 1 - torch.where(table < 0, 0, table)
        out = decode(q[turned], k_pages.flip(0), v_pages.flip(0), back[turned], lengths[turned])
        assert torch.equal(out, together[turned])


def test_shared_pages_and_what_lies_behind_a_length():
    """Two rows over the same first page; rubbish behind a length and in spare pages changes nothing."""
    q, k_pages, v_pages, table, lengths = batch([40, 16], (2, 1), 16, torch.float32)
    decode = on_triton(attention_decode)
    with blocks(64, 32):
        table[1, 0] = table[0, 0]
        before = decode(q, k_pages, v_pages, table, lengths)
        behind = torch.arange(8, PAGE, device=DEVICE) + table[0, 2].long() * PAGE
        rubbish = torch.full((8, 1, 16), -3e30, device=DEVICE)
        write_pages(k_pages, v_pages, behind, rubbish, rubbish)
        assert torch.equal(decode(q, k_pages, v_pages, table, lengths), before)


def check_large_scores() -> None:
    """A chunk of -inf, one of +-1e4, a maximum in the last: exact scores, so that only the weights are rounded."""
    q, k_pages, v_pages, table, lengths = batch([150], (1, 1), 1, torch.float32)
    q.fill_(1.0)
    keys = torch.arange(150.0, device=DEVICE)[:, None, None] - 1e4
    keys[:64], keys[149] = -torch.inf, 1e4
    values = torch.randn(150, 1, 1, device=DEVICE)
    position = torch.arange(150, device=DEVICE)
    write_pages(
        k_pages, v_pages, table[0, position // PAGE].long() * PAGE + position % PAGE, keys, values
    )
    with blocks(64, 32):
        for length in (150, 149):
            lengths.fill_(length)
            out = on_triton(attention_decode)(q, k_pages, v_pages, table, lengths)
            want = attention_decode_reference(q, k_pages, v_pages, table, lengths)
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def test_large_scores():
    check_large_scores()


def test_no_rows():
    q, k_pages, v_pages, table, lengths = batch([1], (2, 1), 8, torch.float32)
    out = on_triton(attention_decode)(q[:0], k_pages, v_pages, table[:0], lengths[:0])
    assert out.shape == (0, 2, 8)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="lengths and pages on a GPU are not looked at")
def test_inputs_that_do_not_fit():
    q, k_pages, v_pages, table, lengths = batch([17], (2, 1), 8, torch.float32)
    with pytest.raises(ValueError, match=r"lengths\[0\]: got 0, want 1"):
        on_triton(attention_decode)(q, k_pages, v_pages, table, lengths * 0)
    with pytest.raises(ValueError, match="page_table.*got .*want"):
        on_triton(attention_decode)(q, k_pages, v_pages, table - 90, lengths)


DEFECTS = {
    "the last key left out": (
        "score = tl.where((key < length)",
        "score = tl.where((key < length - 1)",
    ),
    "keys behind the length": ("score = tl.where((key < length)", "score = tl.where((key >= 0)"),
    "channels swapped within words": ("word >> (16 * part)", "word >> (16 - 16 * part)"),
    "one page for a block": (
        "tl.load(pages + key // PAGE, mask",
        "tl.load(pages + tl.min(key, 0) // PAGE + key * 0, mask",
    ),
    "the next page of values": (
        "_region(pages, pair, length",
        "_region(pages, pair + 2, length",
    ),
    "another key head": (
        "row.to(tl.int64) * HEADS + key_head * GROUP",
        "row.to(tl.int64) * HEADS + (KEY_HEADS - 1 - key_head) * GROUP",
    ),
    "no rescale of the sum": (
        "total * rescale + tl.sum(p, 1)",
        "total + tl.sum(p, 1)",
    ),
    "no rescale of the values": ("acc *= rescale[:, None]", "acc *= 1.0"),
    "a chunk too few": ("tl.cdiv(length, CHUNK)", "tl.cdiv(length - 1, CHUNK)"),
    "the merge forgets the first chunks": ("acc = acc * before + part * now", "acc = part * now"),
    "the merge's weights are not rescaled": ("tl.load(weight + at) * now", "tl.load(weight + at)"),
    "the scale forgotten": ("(score - zero[:, None]) * scale", "(score - zero[:, None])"),
}
EXTREME_DEFECTS = {
    "-inf - -inf in a chunk": (
        'zero = tl.where(above == -float("inf"), 0.0, above)  # all',
        "zero = above  # all",
    ),
    "-inf - -inf in the merge": (
        'zero = tl.where(above == -float("inf"), 0.0, above)\n        before',
        "zero = above\n        before",
    ),
    "a chunk's maximum starts from 0": (
        'high = tl.full((BLOCK_H,), -float("inf"), tl.float32)',
        "high = tl.zeros((BLOCK_H,), tl.float32)",
    ),
}


@mutations(kernels, DEFECTS)
def test_defects_are_caught():
    with blocks(64, 32):
        check([65, 40], (4, 2), 12, torch.float32, torch.bfloat16)


@mutations(kernels, EXTREME_DEFECTS)
def test_defects_at_large_scores_are_caught():
    check_large_scores()
