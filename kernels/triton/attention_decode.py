"""attention_decode on a GPU: chunks of a row's keys side by side, then merged in their order.

A program takes one key head of one row, with all its query heads, over one chunk of keys; chunks start at multiples of
CHUNK whatever the batch, so that a row's result does not depend on the rows beside it (a chunk size found from the
number of rows, as elsewhere, would make it). Chunks behind a row's length return at once: lengths stay on the device.

Pages are read in their words of 32 bits (kernels/attention_decode.py). In 16 bits a word of keys holds channels 2 i and
2 i + 1 of one key, and a word of values one channel of keys 2 j and 2 j + 1: two products of half the depth each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_decode import PAGE
from ._launch import Config, cdiv, config, launch, next_power_of_2

LOG2E = 1.4426950408889634


@triton.jit
def _part(word, part: tl.constexpr, STORED: tl.constexpr, OPERAND: tl.constexpr):
    """Number `part` of words that hold two 16-bit ones, the lower bits first."""
    bits = (word >> (16 * part)).to(tl.int16)
    return bits.to(STORED, bitcast=True).to(OPERAND)


@triton.jit
def _query(
    q,
    head,
    present,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """The heads' queries: the first and the second channel of each word, (heads, BLOCK_W) each."""
    word = tl.arange(0, BLOCK_W)
    at = q + head[:, None] * D + word[None, :] * WORDS
    inside = present[:, None] & (word < D // WORDS)[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(OPERAND)
    high = low
    if WORDS == 2:
        high = tl.load(at + 1, mask=inside, other=0.0).to(OPERAND)
    return low, high


@triton.jit
def _region(
    pages, key, length, key_head, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr
):
    """Where the head's SIZE words of the page of each key begin."""
    page = tl.load(pages + key // PAGE, mask=key < length, other=0).to(tl.int64)
    return (page * KEY_HEADS + key_head) * SIZE


@triton.jit
def _soften(score, high, total, scale):
    """Weights of a block of keys against the new maximum; the factor of what came before; maximum and sum."""
    above = tl.maximum(high, tl.max(score, 1))
    zero = tl.where(above == -float("inf"), 0.0, above)  # all scores so far are -inf
    p = tl.exp2((score - zero[:, None]) * scale)  # differences first: large scores lose less
    rescale = tl.exp2((high - zero) * scale)
    return p, rescale, above, total * rescale + tl.sum(p, 1)


@triton.jit
def _scores(
    query_low,
    query_high,
    k_pages,
    k_at,
    seen,
    WORDS: tl.constexpr,
    STORED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """q . k of the heads and a block of keys."""
    word = tl.load(k_pages + k_at, mask=seen, other=0)  # (BLOCK_W, BLOCK_N)
    if WORDS == 1:
        score = tl.dot(query_low, word.to(OPERAND), input_precision="ieee")
    else:
        score = tl.dot(query_low, _part(word, 0, STORED, OPERAND), input_precision="ieee")
        high = _part(word, 1, STORED, OPERAND)
        score = tl.dot(query_high, high, score, input_precision="ieee")
    return score


@triton.jit
def _add_values(
    acc,
    p,
    v_pages,
    v_at,
    seen,
    WORDS: tl.constexpr,
    STORED: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc + p v over a block of keys."""
    word = tl.load(v_pages + v_at, mask=seen, other=0)  # (BLOCK_N / WORDS, BLOCK_D)
    if WORDS == 1:
        acc = tl.dot(p.to(OPERAND), word.to(OPERAND), acc, input_precision="ieee")
    else:
        low, high = tl.split(tl.reshape(p.to(OPERAND), (BLOCK_H, BLOCK_N // 2, 2)))
        acc = tl.dot(low, _part(word, 0, STORED, OPERAND), acc, input_precision="ieee")
        acc = tl.dot(high, _part(word, 1, STORED, OPERAND), acc, input_precision="ieee")
    return acc


@triton.jit
def _chunk(
    q,  # (R, HEADS, D)
    k_pages,  # (P, KEY_HEADS, D / WORDS, PAGE) words
    v_pages,  # (P, KEY_HEADS, PAGE / WORDS, D) words
    table,  # (R, width)
    lengths,
    most,  # (R, HEADS, chunks) float32: a chunk's maximum, sum of weights, weighted values
    weight,
    values,  # (R, HEADS, chunks, D) float32
    width,
    scale,  # log2(e) / sqrt(D): weights are powers of 2
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,
    STORED: tl.constexpr,
    OPERAND: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, key_head = tl.program_id(0) // KEY_HEADS, tl.program_id(0) % KEY_HEADS
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    length = tl.load(lengths + row)
    if chunk * CHUNK >= length:
        return
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    member = tl.arange(0, BLOCK_H)
    head = row.to(tl.int64) * HEADS + key_head * GROUP + member
    channel = tl.arange(0, BLOCK_D)
    word = tl.arange(0, BLOCK_W)
    query_low, query_high = _query(q, head, member < GROUP, D, WORDS, BLOCK_W, OPERAND)
    high = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    pages = table + row.to(tl.int64) * width
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        region = _region(pages, key, length, key_head, KEY_HEADS, PAGE * D // WORDS, PAGE)
        k_at = region[None, :] + word[:, None] * PAGE + (key % PAGE)[None, :]
        k_at = tl.max_contiguous(tl.multiple_of(k_at, (1, PAGE)), (1, PAGE))
        # whole pages: a mask that changes inside one would split its loads
        k_seen = (word < D // WORDS)[:, None] & (key // PAGE * PAGE < length)[None, :]
        score = _scores(query_low, query_high, k_pages, k_at, k_seen, WORDS, STORED, OPERAND)
        score = tl.where((key < length)[None, :], score, -float("inf"))
        p, rescale, high, total = _soften(score, high, total, tl.cast(scale, tl.float32))
        pair = start + tl.arange(0, BLOCK_N // WORDS) * WORDS
        region = _region(pages, pair, length, key_head, KEY_HEADS, PAGE * D // WORDS, PAGE)
        v_at = (region + pair % PAGE // WORDS * D)[:, None] + channel[None, :]
        v_seen = (pair < length)[:, None] & (channel < D)[None, :]
        acc *= rescale[:, None]
        acc = _add_values(acc, p, v_pages, v_at, v_seen, WORDS, STORED, OPERAND, BLOCK_H, BLOCK_N)
    at = head * chunks + chunk
    tl.store(most + at, high, mask=member < GROUP)
    tl.store(weight + at, total, mask=member < GROUP)
    acc_inside = (member < GROUP)[:, None] & (channel < D)[None, :]
    tl.store(values + at[:, None] * D + channel[None, :], acc, mask=acc_inside)


@triton.jit
def _merge(
    most,
    weight,
    values,
    lengths,
    out,  # (R, HEADS, D)
    chunks,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out = sum_c w_c values_c / sum_c w_c weight_c, w_c = e^((m_c - m) / sqrt(D)), over the row's chunks in order."""
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + head // HEADS)
    channel = tl.arange(0, BLOCK_D)
    scale = tl.cast(scale, tl.float32)
    high = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for chunk in range(0, tl.cdiv(length, CHUNK)):
        at = head * chunks + chunk
        m = tl.load(most + at)
        above = tl.maximum(high, m)
        zero = tl.where(above == -float("inf"), 0.0, above)
        before, now = tl.exp2((high - zero) * scale), tl.exp2((m - zero) * scale)
        total = total * before + tl.load(weight + at) * now
        part = tl.load(values + at * D + channel, mask=channel < D, other=0.0)
        acc = acc * before + part * now
        high = above
    result = (acc / total).to(out.dtype.element_ty)
    tl.store(out + head * D + channel, result, mask=channel < D)


_KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _in_words(pages: Tensor) -> Tensor:
    return pages if pages.dtype == torch.float32 else pages.view(torch.int32)


def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    tuned: Config | None = None,
) -> Tensor:
    """Size of the tables: the head size. float32 operands take other blocks, as in attention.py."""
    rows, heads, size = q.shape
    key_heads, w, width = k_pages.shape[1], k_pages.shape[-1], page_table.shape[1]
    out = torch.empty_like(q)
    same = q.dtype == k_pages.dtype  # else the pages' numbers are widened to float32
    operand = _KINDS[q.dtype] if same else tl.float32
    table = "attention_decode" + "_float32" * (operand == tl.float32)
    tuned = tuned or config(table, size, q.device)
    chunks = cdiv(width * PAGE, tuned.blocks["CHUNK"])
    most, weight = (q.new_empty((rows, heads, chunks), dtype=torch.float32) for _ in range(2))
    values = q.new_empty((rows, heads, chunks, size), dtype=torch.float32)
    launch(
        _chunk,
        (rows * key_heads, chunks),
        *(q, _in_words(k_pages), _in_words(v_pages), page_table, lengths),
        *(most, weight, values, width, LOG2E * size**-0.5),
        config=tuned,
        HEADS=heads,
        KEY_HEADS=key_heads,
        D=size,
        BLOCK_H=max(16, next_power_of_2(heads // key_heads)),
        BLOCK_D=max(16, next_power_of_2(size)),
        BLOCK_W=max(16, next_power_of_2(size // w)),
        PAGE=PAGE,
        WORDS=w,
        STORED=_KINDS[k_pages.dtype],
        OPERAND=operand,
    )
    launch(
        _merge,
        (rows * heads,),
        *(most, weight, values, lengths, out, chunks, LOG2E * size**-0.5),
        config=Config({"CHUNK": tuned.blocks["CHUNK"]}, num_warps=1),
        HEADS=heads,
        D=size,
        BLOCK_D=max(16, next_power_of_2(size)),
    )
    return out
