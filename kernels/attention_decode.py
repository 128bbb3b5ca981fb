"""Attention of one new row a sequence over keys and values that lie in pages.

    out_r = sum_{j < length_r} softmax_j(q_r . k_j / sqrt(D)) v_j
    key j of row r: k_pages[page_table[r, j // page], j % page]

The row's own key is already in its page, so length_r >= 1. What lies behind a row's length, in its last page or in
pages that it does not name, is never used but must be finite. Equal to the bit to the same row of `attention`.
No backward: decoding has none.
"""

import torch
from torch import Tensor

from ._backend import choose, define
from .attention import check_heads


def attention_decode_reference(
    q: Tensor,  # (R, Hq, D)
    k_pages: Tensor,  # (P, page, Hk, D)
    v_pages: Tensor,  # (P, page, Hk, D)
    page_table: Tensor,  # (R, maxpages) int32
    lengths: Tensor,  # (R,) int32
) -> Tensor:  # (R, Hq, D)
    """The definition: one row at a time, its pages put one after the other."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k_pages.shape[2]
    rows = [q[:0]]
    for row, pages, length in zip(q, page_table.long(), lengths.tolist(), strict=True):
        used = pages[: -(-length // k_pages.shape[1])]
        keys, values = (
            x[used].flatten(0, 1)[:length].to(wide).repeat_interleave(group, dim=1)
            for x in (k_pages, v_pages)
        )
        score = torch.einsum("hd,jhd->hj", row.to(wide), keys) * q.shape[-1] ** -0.5
        out = torch.einsum("hj,jhd->hd", score.softmax(-1), values)
        rows.append(out.to(q.dtype)[None])
    return torch.cat(rows)


def attention_decode(
    q: Tensor,  # (R, Hq, D)
    k_pages: Tensor,  # (P, page, Hk, D)
    v_pages: Tensor,  # (P, page, Hk, D)
    page_table: Tensor,  # (R, maxpages) int32
    lengths: Tensor,  # (R,) int32, 1 or more
) -> Tensor:  # (R, Hq, D), dtype of q
    """out_r = sum_{j < length_r} softmax_j(q_r . k_j / sqrt(D)) v_j over the row's pages.

    Raises ValueError on shapes, dtypes, lengths or page numbers that do not fit. Source: Vaswani et al. 2017, 3.2.1;
    pages: Kwon et al. 2023.
    """
    if q.dim() != 3 or k_pages.dim() != 4 or k_pages.shape[1] == 0:
        raise ValueError(
            f"q, k_pages: got shapes {tuple(q.shape)}, {tuple(k_pages.shape)}, want (R, Hq, D), (P, page, Hk, D)"
        )
    check_heads(q, k_pages, v_pages, ("q", "k_pages", "v_pages"))
    for name, x, dims in (("page_table", page_table, 2), ("lengths", lengths, 1)):
        if x.dtype != torch.int32 or x.dim() != dims or x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name}: got {x.dtype} of shape {tuple(x.shape)}, want int32, {dims}-D, {q.shape[0]} rows"
            )
    if choose("attention_decode", q, k_pages, v_pages) == "reference":
        check_pages(page_table, lengths, k_pages.shape[0], k_pages.shape[1])
        return attention_decode_reference(q, k_pages, v_pages, page_table, lengths)
    return torch.ops.engine.attention_decode(
        q.contiguous(),
        k_pages.contiguous(),
        v_pages.contiguous(),
        page_table.contiguous(),
        lengths.contiguous(),
    )


def check_pages(page_table: Tensor, lengths: Tensor, num_pages: int, page: int) -> None:
    """1 <= length <= maxpages * page, and the pages that a length reaches exist."""
    for r, length in enumerate(lengths.tolist()):
        if not 1 <= length <= page_table.shape[1] * page:
            raise ValueError(
                f"lengths[{r}]: got {length}, want 1 ... {page_table.shape[1] * page} (pages x page)"
            )
        used = page_table[r, : -(-length // page)].tolist()
        if min(used) < 0 or max(used) >= num_pages:
            raise ValueError(f"page_table[{r}]: got {used}, want 0 ... {num_pages - 1}")


define(
    "attention_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths) -> Tensor",
    lambda q, k_pages, v_pages, page_table, lengths: torch.empty_like(q),
)
