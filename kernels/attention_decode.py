"""Attention of one new row a sequence over keys and values that lie in pages.

    out_r = sum_{j < length_r} softmax_j(q_r . k_j / sqrt(D)) v_j
    key j of row r: place j % PAGE of page page_table[r, j // PAGE]

Pages hold keys and values as the CPU's loops read them, in words of 32 bits: w = 1 float32, or w = 2 bfloat16.

    k_pages (P, Hk, D / w, PAGE, w)    a word: w channels of one key
    v_pages (P, Hk, PAGE / w, D, w)    a word: one channel of w keys

The row's own key is already in its page, so length_r >= 1. What lies behind a row's length, in its last page or in
pages that it does not name, is never used but must be finite. On the CPU equal to the bit to the same row of
`attention` over keys and values that were rounded to the pages' dtype; on a GPU equal to the bit to itself in any
batch. No backward: decoding has none.
"""

import torch
from torch import Tensor

from ._backend import choose, define, kernel

PAGE = 16


def words(dtype: torch.dtype) -> int:
    """Numbers of a word: 2 in bfloat16; 1 in float32, and in the float64 of tests."""
    return max(1, 4 // dtype.itemsize)


def page_shapes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Shapes of one page of keys and of one page of values.

    Raises ValueError for an odd head size in bfloat16, whose channels do not fill words.
    """
    w = words(dtype)
    if head_dim % w:
        raise ValueError(f"head size: got {head_dim}, want an even one for pages of {dtype}")
    return [kv_heads, head_dim // w, PAGE, w], [kv_heads, PAGE // w, head_dim, w]


def write_pages(
    k_pages: Tensor,  # (P, Hk, D / w, PAGE, w)
    v_pages: Tensor,  # (P, Hk, PAGE / w, D, w)
    slots: Tensor,  # (N,) int64: page * PAGE + place
    k: Tensor,  # (N, Hk, D)
    v: Tensor,  # (N, Hk, D)
) -> None:
    """Puts rows of keys and values at their places, rounded to the pages' dtype."""
    page, place, w = slots // PAGE, slots % PAGE, k_pages.shape[-1]
    k_pages[page, :, :, place] = k.to(k_pages.dtype).unflatten(-1, (-1, w))
    v_pages[page, :, place // w, :, place % w] = v.to(v_pages.dtype)


def read_pages(k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
    """Pages as rows of keys and of values: (P, PAGE, Hk, D) each."""
    keys = k_pages.permute(0, 3, 1, 2, 4).flatten(3)
    values = v_pages.permute(0, 2, 4, 1, 3).flatten(1, 2)
    return keys, values


def attention_decode_reference(
    q: Tensor,  # (R, Hq, D)
    k_pages: Tensor,  # (P, Hk, D / w, PAGE, w)
    v_pages: Tensor,  # (P, Hk, PAGE / w, D, w)
    page_table: Tensor,  # (R, maxpages) int32
    lengths: Tensor,  # (R,) int32
) -> Tensor:  # (R, Hq, D)
    """The definition: one row at a time, its pages put one after the other."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k_pages.shape[1]
    rows = [q[:0]]
    for row, pages, length in zip(q, page_table.long(), lengths.tolist(), strict=True):
        used = pages[: -(-length // PAGE)]
        keys, values = (
            x.flatten(0, 1)[:length].to(wide).repeat_interleave(group, dim=1)
            for x in read_pages(k_pages[used], v_pages[used])
        )
        score = torch.einsum("hd,jhd->hj", row.to(wide), keys) * q.shape[-1] ** -0.5
        out = torch.einsum("hj,jhd->hd", score.softmax(-1), values)
        rows.append(out.to(q.dtype)[None])
    return torch.cat(rows)


def attention_decode(
    q: Tensor,  # (R, Hq, D)
    k_pages: Tensor,  # (P, Hk, D / w, PAGE, w), dtype of q or bfloat16
    v_pages: Tensor,  # (P, Hk, PAGE / w, D, w), dtype of k_pages
    page_table: Tensor,  # (R, maxpages) int32
    lengths: Tensor,  # (R,) int32, 1 or more
) -> Tensor:  # (R, Hq, D), dtype of q
    """out_r = sum_{j < length_r} softmax_j(q_r . k_j / sqrt(D)) v_j over the row's pages.

    Raises ValueError on shapes, dtypes, lengths or page numbers that do not fit. Source: Vaswani et al. 2017, 3.2.1;
    pages: Kwon et al. 2023.
    """
    _check_shapes(q, k_pages, v_pages)
    for name, x, dims in (("page_table", page_table, 2), ("lengths", lengths, 1)):
        if x.dtype != torch.int32 or x.dim() != dims or x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name}: got {x.dtype} of shape {tuple(x.shape)}, want int32, {dims}-D, {q.shape[0]} rows"
            )
    chosen = choose("attention_decode", q, k_pages, v_pages)
    if chosen != "cpp":  # which checks by itself
        check_pages(page_table, lengths, k_pages.shape[0])
    if chosen == "reference":
        return attention_decode_reference(q, k_pages, v_pages, page_table, lengths)
    return kernel("attention_decode")(
        q.contiguous(),
        k_pages.contiguous(),
        v_pages.contiguous(),
        page_table.contiguous(),
        lengths.contiguous(),
    )


def _check_shapes(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    if q.dim() != 3 or k_pages.dim() != 5 or k_pages.shape[1] == 0:
        raise ValueError(
            f"q, k_pages: got shapes {tuple(q.shape)}, {tuple(k_pages.shape)}, want (R, Hq, D), (P, Hk, D / w, 16, w)"
        )
    kv_heads = k_pages.shape[1]
    for name, pages, want in zip(
        ("k_pages", "v_pages"),
        (k_pages, v_pages),
        page_shapes(kv_heads, q.shape[2], k_pages.dtype),
        strict=True,
    ):
        if list(pages.shape[1:]) != want or pages.shape[0] != k_pages.shape[0]:
            raise ValueError(
                f"{name}: got shape {tuple(pages.shape)}, want {(k_pages.shape[0], *want)}"
            )
    if q.shape[1] % kv_heads:
        raise ValueError(f"q: got {q.shape[1]} heads, want a multiple of the {kv_heads} key heads")
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (q.dtype, torch.bfloat16):
        raise ValueError(
            f"k_pages, v_pages: got {k_pages.dtype}, {v_pages.dtype}, want both {q.dtype} as q, or bfloat16"
        )


def check_pages(page_table: Tensor, lengths: Tensor, num_pages: int) -> None:
    """1 <= length <= maxpages * PAGE, and the pages that a length reaches exist. Looked at on the CPU only."""
    if lengths.device.type != "cpu" or page_table.device.type != "cpu":
        return
    for r, length in enumerate(lengths.tolist()):
        if not 1 <= length <= page_table.shape[1] * PAGE:
            raise ValueError(
                f"lengths[{r}]: got {length}, want 1 ... {page_table.shape[1] * PAGE} (pages x page)"
            )
        used = page_table[r, : -(-length // PAGE)].tolist()
        if min(used) < 0 or max(used) >= num_pages:
            raise ValueError(f"page_table[{r}]: got {used}, want 0 ... {num_pages - 1}")


define(
    "attention_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths) -> Tensor",
    lambda q, k_pages, v_pages, page_table, lengths: torch.empty_like(q),
)
