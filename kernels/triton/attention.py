"""attention on a GPU: a block of rows of one segment and one head goes over its keys with a running maximum.

A row block finds its segment by itself: segment s has its blocks from number cu[s] // BLOCK + s on, which is one more
than it needs at most, so that the grid follows from N and S alone and the offsets stay on the device.

Keys are counted as if the prefix's were copied before the own ones, and blocks of keys start at multiples of BLOCK_N of
that count. A block of keys that a row does not see adds nothing to it, to the bit: a row's result is that of its own
keys, however the batch is packed and wherever the prefix lies. (Values must be finite: a row multiplies those of later
keys in its block by 0.) No mask is left out where it could be: one loop body, one rounding of every row.

Products of 16-bit inputs are those of the tensor cores: 16-bit operands, float32 sums; probabilities and their
gradients are rounded to 16 bits between two products, as in Dao et al. 2022. float32 inputs keep float32 operands.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, cdiv, config, launch, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _segment_of(cu, segments, tile, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    """The segment of a tile: the last whose first tile it is or follows. BLOCK_S segments are looked at together."""
    count = 0
    for first in range(0, segments, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        begin = tl.load(cu + s, mask=s < segments, other=0)
        count += tl.sum(((begin // BLOCK + s <= tile) & (s < segments)).to(tl.int32))
    return count - 1


@triton.jit
def _bounds(cu, prefix, s, PREFIX: tl.constexpr):
    """Of segment s: its first row and length, the first row and length of its prefix."""
    begin = tl.load(cu + s)
    length = tl.load(cu + s + 1) - begin
    shared_begin, shared = begin, begin * 0
    if PREFIX:
        p = tl.load(prefix + s)
        shared_begin = tl.load(cu + p)
        shared = tl.where(p == s, 0, tl.load(cu + p + 1) - shared_begin)
    return begin, length, shared_begin, shared


@triton.jit
def _at(token, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of one head's channels in (N, HEADS, D) -> (tokens, BLOCK_D)."""
    return (token.to(tl.int64)[:, None] * HEADS + head) * D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _inside(rows, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return (rows < length)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def _forward(
    q,  # (N, HEADS, D)
    k,  # (N, KEY_HEADS, D)
    v,
    out,  # (N, HEADS, D)
    lse,  # (N, HEADS) float32
    cu,
    prefix,
    segments,
    scale,  # 1 / sqrt(D)
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    head = tl.program_id(0) % HEADS  # heads that read the same keys run side by side
    # the last rows of a sequence see the most keys: they start first
    tile = tl.num_programs(0) // HEADS - 1 - tl.program_id(0) // HEADS
    s = _segment_of(cu, segments, tile, BLOCK_M, BLOCK_S)
    begin, length, shared_begin, shared = _bounds(cu, prefix, s, PREFIX)
    first = (tile - begin // BLOCK_M - s) * BLOCK_M
    if first >= length:
        return
    rows = first + tl.arange(0, BLOCK_M)
    at = _at(begin + rows, head, HEADS, D, BLOCK_D)
    inside = _inside(rows, length, D, BLOCK_D)
    query = tl.load(q + at, mask=inside, other=0.0)
    scale = tl.cast(scale, tl.float32)
    binary = scale * LOG2E
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = shared + length
    key_head = head // (HEADS // KEY_HEADS)
    end = tl.minimum(shared + first + BLOCK_M, total)
    for start in range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        token = tl.where(keys < shared, shared_begin, begin - shared) + keys
        k_at = _at(token, key_head, KEY_HEADS, D, BLOCK_D)
        k_inside = _inside(keys, total, D, BLOCK_D)
        key = tl.load(k + k_at, mask=k_inside, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        score = tl.where(keys[None, :] <= (shared + rows)[:, None], score, -float("inf"))
        above = tl.maximum(most, tl.max(score, 1))
        zero = tl.where(above == -float("inf"), 0.0, above)  # all scores so far are -inf
        p = tl.exp2((score - zero[:, None]) * binary)  # differences first: large scores lose less
        rescale = tl.exp2((most - zero) * binary)
        value = tl.load(v + k_at, mask=k_inside, other=0.0)
        weight = weight * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        most = above
    tl.store(out + at, (acc / weight[:, None]).to(out.dtype.element_ty), mask=inside)
    lse_at = (begin + rows).to(tl.int64) * HEADS + head
    # the maximum is rounded as the backward rounds its score, before the sum: the where keeps the two from being fused
    scaled = tl.where(weight > 0.0, most * scale, most)
    tl.store(lse + lse_at, scaled + tl.log(weight), mask=rows < length)


@triton.jit
def _delta(grad, out, delta, count, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """delta = sum_d grad * out: what the softmax's backward takes off, for each row and head."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = rows[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    inside = _inside(rows, count, D, BLOCK_D)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + rows, tl.sum(g * o, 1), mask=rows < count)


@triton.jit
def _load_rows(
    grad,
    q,
    lse,
    delta,
    token,
    head,
    inside,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What both backward kernels read of a block of rows; 0 for rows that are not there, which then add nothing."""
    at = _at(token, head, HEADS, D, BLOCK_D)
    channels = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    query = tl.load(q + at, mask=channels, other=0.0)
    g = tl.load(grad + at, mask=channels, other=0.0)
    lse_at = token.to(tl.int64) * HEADS + head
    log_sum = tl.load(lse + lse_at, mask=inside, other=0.0)
    return query, g, log_sum, tl.load(delta + lse_at, mask=inside, other=0.0)


@triton.jit
def _backward_queries(
    grad,
    q,
    k,
    v,
    lse,
    delta,
    d_q,
    cu,
    prefix,
    segments,
    scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """d_q = sum_j p_j (grad . v_j - delta) k_j / sqrt(D), over the blocks of keys of the forward."""
    head = tl.program_id(0) % HEADS
    tile = tl.num_programs(0) // HEADS - 1 - tl.program_id(0) // HEADS
    s = _segment_of(cu, segments, tile, BLOCK_M, BLOCK_S)
    begin, length, shared_begin, shared = _bounds(cu, prefix, s, PREFIX)
    first = (tile - begin // BLOCK_M - s) * BLOCK_M
    if first >= length:
        return
    rows = first + tl.arange(0, BLOCK_M)
    query, g, log_sum, minus = _load_rows(
        grad, q, lse, delta, begin + rows, head, rows < length, HEADS, D, BLOCK_D
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = shared + length
    key_head = head // (HEADS // KEY_HEADS)
    for start in range(0, tl.minimum(shared + first + BLOCK_M, total), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        token = tl.where(keys < shared, shared_begin, begin - shared) + keys
        k_at = _at(token, key_head, KEY_HEADS, D, BLOCK_D)
        k_inside = _inside(keys, total, D, BLOCK_D)
        key = tl.load(k + k_at, mask=k_inside, other=0.0)
        value = tl.load(v + k_at, mask=k_inside, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * tl.cast(scale, tl.float32)
        score = tl.where(keys[None, :] <= (shared + rows)[:, None], score, -float("inf"))
        p = tl.exp(score - log_sum[:, None])
        dp = tl.dot(g, tl.trans(value), input_precision="ieee")
        ds = p * (dp - minus[:, None])
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")
    acc *= tl.cast(scale, tl.float32)
    at = _at(begin + rows, head, HEADS, D, BLOCK_D)
    inside = _inside(rows, length, D, BLOCK_D)
    tl.store(d_q + at, acc.to(d_q.dtype.element_ty), mask=inside)


@triton.jit
def _last_sharer(prefix, s, segments, PREFIX: tl.constexpr, BLOCK_S: tl.constexpr):
    """The last segment whose prefix is s; s itself if there is none."""
    last = s
    if PREFIX:
        for first in range(0, segments, BLOCK_S):
            i = first + tl.arange(0, BLOCK_S)
            p = tl.load(prefix + i, mask=i < segments, other=-1)
            last = tl.maximum(last, tl.max(tl.where(p == s, i, 0), 0))
    return last


@triton.jit
def _add_rows(acc_k, acc_v, key, value, query, g, log_sum, minus, visible, scale):
    """What a block of rows adds to the gradients of a block of keys."""
    score = tl.dot(key, tl.trans(query), input_precision="ieee") * tl.cast(scale, tl.float32)
    p = tl.exp(tl.where(visible, score, -float("inf")) - log_sum[None, :])
    acc_v = tl.dot(p.to(g.dtype), g, acc_v, input_precision="ieee")
    dp = tl.dot(value, tl.trans(g), input_precision="ieee")
    ds = p * (dp - minus[None, :])
    acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision="ieee")
    return acc_k, acc_v


@triton.jit
def _backward_keys(
    grad,
    q,
    k,
    v,
    lse,
    delta,
    d_k,
    d_v,
    cu,
    prefix,
    segments,
    scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """d_v_j = sum_i p_ij grad_i,  d_k_j = sum_i p_ij (grad_i . v_j - delta_i) q_i / sqrt(D)."""
    # over the rows of the own segment, then of those that share it: each sum has one program and one order
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    key_head = tl.program_id(0) % KEY_HEADS
    tile = tl.program_id(0) // KEY_HEADS  # the first keys of a sequence are seen by the most rows
    s = _segment_of(cu, segments, tile, BLOCK_N, BLOCK_S)
    begin, length, _, _ = _bounds(cu, prefix, s, False)
    first = (tile - begin // BLOCK_N - s) * BLOCK_N
    if first >= length:
        return
    keys = first + tl.arange(0, BLOCK_N)
    at = _at(begin + keys, key_head, KEY_HEADS, D, BLOCK_D)
    inside = _inside(keys, length, D, BLOCK_D)
    key = tl.load(k + at, mask=inside, other=0.0)
    value = tl.load(v + at, mask=inside, other=0.0)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    last = _last_sharer(prefix, s, segments, PREFIX, BLOCK_S)
    for t in range(s, last + 1):
        row0, count, _, _ = _bounds(cu, prefix, t, False)
        start, before = first // BLOCK_M * BLOCK_M, 0
        if t != s:  # these rows come behind all keys of the prefix
            start, before = 0, length
            if tl.load(prefix + t) != s:
                count = 0
        for head in range(key_head * GROUP, (key_head + 1) * GROUP):
            for i in range(start, count, BLOCK_M):
                rows = i + tl.arange(0, BLOCK_M)
                visible = keys[:, None] <= (before + rows)[None, :]
                query, g, log_sum, minus = _load_rows(
                    grad, q, lse, delta, row0 + rows, head, rows < count, HEADS, D, BLOCK_D
                )
                acc_k, acc_v = _add_rows(
                    acc_k, acc_v, key, value, query, g, log_sum, minus, visible, scale
                )
    acc_k *= tl.cast(scale, tl.float32)
    tl.store(d_k + at, acc_k.to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + at, acc_v.to(d_v.dtype.element_ty), mask=inside)


def _tuned(table: str, q: Tensor) -> Config:
    """Size of the tables: the head size. float32 operands take other blocks: no tensor cores, twice the memory."""
    return config(table + "_float32" * (q.dtype == torch.float32), q.shape[2], q.device)


def _constants(q: Tensor, k: Tensor, prefix: Tensor | None) -> dict[str, int | bool]:
    size = q.shape[2]
    block = max(16, next_power_of_2(size))  # a product's least depth
    heads = {"HEADS": q.shape[1], "KEY_HEADS": k.shape[1]}
    return {**heads, "D": size, "BLOCK_D": block, "PREFIX": prefix is not None}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    prefix: Tensor | None,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor]:
    tokens, heads, size = q.shape
    out, lse = torch.empty_like(q), q.new_empty((tokens, heads), dtype=torch.float32)
    tuned = tuned or _tuned("attention", q)
    segments = cu.numel() - 1
    owner = cu if prefix is None else prefix
    tiles = tokens // tuned.blocks["BLOCK_M"] + segments if tokens else 0
    launch(
        _forward,
        (tiles * heads,),
        *(q, k, v, out, lse, cu, owner, segments, size**-0.5),
        config=tuned,
        **_constants(q, k, prefix),
    )
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    prefix: Tensor | None,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    constants = _constants(q, k, prefix)
    tokens, heads, size = q.shape
    by_row = Config({"BLOCK": 4096 // constants["BLOCK_D"] or 1})
    rows = cdiv(tokens * heads, by_row.blocks["BLOCK"])
    each = {name: constants[name] for name in ("D", "BLOCK_D")}
    launch(_delta, (rows,), grad, out, delta, tokens * heads, config=by_row, **each)
    segments = cu.numel() - 1
    rest = (cu, cu if prefix is None else prefix, segments, size**-0.5)
    by_query = tuned or _tuned("attention_backward", q)
    tiles = tokens // by_query.blocks["BLOCK_M"] + segments if tokens else 0
    launch(
        _backward_queries,
        (tiles * heads,),
        *(grad, q, k, v, lse, delta, d_q, *rest),
        config=by_query,
        **constants,
    )
    by_key = tuned or _tuned("attention_backward_keys", q)
    tiles = tokens // by_key.blocks["BLOCK_N"] + segments if tokens else 0
    launch(
        _backward_keys,
        (tiles * k.shape[1],),
        *(grad, q, k, v, lse, delta, d_k, d_v, *rest),
        config=by_key,
        **constants,
    )
    return d_q, d_k, d_v
