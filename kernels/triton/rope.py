"""rope, and rope with the write of keys and values to their pages, on a GPU: a program takes a few tokens with all of
their heads, so that a position's cos and sin are read once.

A GPU does not look at positions and slots before the launch: a position outside the table gives NaN, and a row whose
slot is outside the pages is not written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, cdiv, config, launch, next_power_of_2


@triton.jit
def _angles(positions, table, tokens, live, P, ROT: tl.constexpr, HALF: tl.constexpr):
    """(cos, sin) of the tokens, (TOKENS, 1, HALF) each."""
    position = tl.load(positions + tokens, mask=live, other=0)
    i = tl.arange(0, HALF)
    known = live & (position >= 0) & (position < P)
    inside = known[:, None, None] & (i < ROT // 2)[None, None, :]
    at = position[:, None, None] * ROT + i[None, None, :]
    cos = tl.load(table + at, mask=inside, other=float("nan")).to(tl.float32)
    sin = tl.load(table + at + ROT // 2, mask=inside, other=float("nan")).to(tl.float32)
    return cos, sin


@triton.jit
def _places(
    tokens, live, first, last,
    HEADS: tl.constexpr, D: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where channels first ... last - 1 of the tokens' heads lie, (TOKENS, HEAD_BLOCK, BLOCK), and which exist."""
    head = tl.arange(0, HEAD_BLOCK)[None, :, None]
    channel = first + tl.arange(0, BLOCK)[None, None, :]
    inside = live[:, None, None] & (head < HEADS) & (channel < last)
    return (tokens[:, None, None] * HEADS + head) * D + channel, inside


@triton.jit
def _turned(x, at, inside, cos, sin, ROT: tl.constexpr):
    """Channels i < rot / 2 and i + rot / 2 after the rotation, in float32."""
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + ROT // 2, mask=inside, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _rotate(
    x, out, tokens, live, cos, sin,
    HEADS: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    if ROT > 0:
        at, inside = _places(tokens, live, 0, ROT // 2, HEADS, D, HEAD_BLOCK, HALF)
        first, second = _turned(x, at, inside, cos, sin, ROT)
        tl.store(out + at, first.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + ROT // 2, second.to(out.dtype.element_ty), mask=inside)
    if D > ROT:
        at, inside = _places(tokens, live, ROT, D, HEADS, D, HEAD_BLOCK, REST)
        tl.store(out + at, tl.load(x + at, mask=inside), mask=inside)


@triton.jit
def _forward(
    x, positions, table, out, N, P,
    HEADS: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr, INVERSE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = tokens < N
    cos, sin = _angles(positions, table, tokens, live, P, ROT, HALF)
    if INVERSE:
        sin = -sin
    _rotate(x, out, tokens, live, cos, sin, HEADS, D, ROT, HEAD_BLOCK, HALF, REST)


@triton.jit
def _write_keys(
    k_pages, values, slot, head, channel, inside,
    HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """k_pages (P, Hk, D / w, PAGE, w)"""
    word = ((slot // PAGE * HEADS + head) * (D // W) + channel // W) * PAGE + slot % PAGE
    tl.store(k_pages + word * W + channel % W, values.to(k_pages.dtype.element_ty), mask=inside)


@triton.jit
def _write_values(
    v_pages, values, slot, head, channel, inside,
    HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """v_pages (P, Hk, PAGE / w, D, w)"""
    word = ((slot // PAGE * HEADS + head) * (PAGE // W) + slot % PAGE // W) * D + channel
    tl.store(v_pages + word * W + slot % W, values.to(v_pages.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_write(
    q, k, v, positions, table, k_pages, v_pages, slots, out, N, P, num_slots,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr,
    PAGE: tl.constexpr, W: tl.constexpr, HEAD_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = tokens < N
    cos, sin = _angles(positions, table, tokens, live, P, ROT, HALF)
    _rotate(q, out, tokens, live, cos, sin, HEADS, D, ROT, HEAD_BLOCK, HALF, REST)
    slot = tl.load(slots + tokens, mask=live, other=-1)
    placed = (slot >= 0) & (slot < num_slots)
    slot = slot[:, None, None]
    head = tl.arange(0, KEY_BLOCK)[None, :, None]
    kind = k.dtype.element_ty  # a key is rounded to its own dtype first, as rope rounds it
    if ROT > 0:
        i = tl.arange(0, HALF)[None, None, :]
        at, inside = _places(tokens, placed, 0, ROT // 2, KEY_HEADS, D, KEY_BLOCK, HALF)
        first, second = _turned(k, at, inside, cos, sin, ROT)
        _write_keys(k_pages, first.to(kind), slot, head, i, inside, KEY_HEADS, D, PAGE, W)
        i += ROT // 2
        _write_keys(k_pages, second.to(kind), slot, head, i, inside, KEY_HEADS, D, PAGE, W)
    if D > ROT:
        i = ROT + tl.arange(0, REST)[None, None, :]
        at, inside = _places(tokens, placed, ROT, D, KEY_HEADS, D, KEY_BLOCK, REST)
        rest = tl.load(k + at, mask=inside)
        _write_keys(k_pages, rest, slot, head, i, inside, KEY_HEADS, D, PAGE, W)
    i = tl.arange(0, CHANNELS)[None, None, :]
    at, inside = _places(tokens, placed, 0, D, KEY_HEADS, D, KEY_BLOCK, CHANNELS)
    row = tl.load(v + at, mask=inside)
    _write_values(v_pages, row, slot, head, i, inside, KEY_HEADS, D, PAGE, W)


def _blocks(heads: int, D: int, rot: int) -> dict[str, int]:
    return {
        "HEADS": heads,
        "D": D,
        "ROT": rot,
        "HEAD_BLOCK": next_power_of_2(max(heads, 1)),
        "HALF": next_power_of_2(max(rot // 2, 1)),
        "REST": next_power_of_2(max(D - rot, 1)),
    }


def rope(
    x: Tensor, positions: Tensor, table: Tensor, inverse: bool, tuned: Config | None = None
) -> Tensor:
    """Size of the table of blocks: channels of a token, heads x D."""
    out, (N, heads, D), (P, rot) = torch.empty_like(x), x.shape, table.shape
    tuned = tuned or config("rope", heads * D, x.device)
    grid = (cdiv(N, tuned.blocks["TOKENS"]) if heads * D else 0,)
    constants = {**_blocks(heads, D, rot), "INVERSE": inverse}
    launch(_forward, grid, x, positions, table, out, N, P, config=tuned, **constants)
    return out


def rope_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    tuned: Config | None = None,
) -> Tensor:
    out, (N, heads, D), (P, rot) = torch.empty_like(q), q.shape, table.shape
    num_pages, key_heads, _, page, w = k_pages.shape
    tuned = tuned or config("rope", heads * D, q.device)
    constants = {
        **_blocks(heads, D, rot),
        "KEY_HEADS": key_heads,
        "KEY_BLOCK": next_power_of_2(max(key_heads, 1)),
        "PAGE": page,
        "W": w,
        "CHANNELS": next_power_of_2(D),
    }
    tensors = (q, k, v, positions, table, k_pages, v_pages, slots, out)
    grid = (cdiv(N, tuned.blocks["TOKENS"]),)
    launch(_rotate_and_write, grid, *tensors, N, P, num_pages * page, config=tuned, **constants)
    return out
