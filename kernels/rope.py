"""Rotary position embedding over the first `rot` of D channels (Su et al. 2021, eq. 34; halves as in GPT-NeoX).

    y_i         = x_i         cos_i - x_{i+rot/2} sin_i
    y_{i+rot/2} = x_{i+rot/2} cos_i + x_i         sin_i        i < rot/2; channels from rot on pass unchanged

`table[p]` holds cos in its first half and sin in its second, for position p. The arithmetic is float32 with one
rounding into the dtype of x. The backward is the rotation by the negative angle.

`rope_and_write` is what new tokens need before their attention, in one launch on a GPU: queries rotated, keys rotated
and put into their pages, values put into theirs.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from .attention_decode import PAGE, page_shapes, write_pages


def rope_reference(
    x: Tensor,  # (N, heads, D)
    positions: Tensor,  # (N,) int64
    table: Tensor,  # (P, rot): cos, then sin
) -> Tensor:  # (N, heads, D)
    """The definition, in at least the dtype of the table."""
    half = table.shape[1] // 2
    cos, sin = table[positions][:, None].tensor_split([half], dim=-1)
    wide = x.to(torch.promote_types(x.dtype, table.dtype))
    a, b, rest = wide.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def rope(
    x: Tensor,  # (N, heads, D)
    positions: Tensor,  # (N,) int64, below P
    table: Tensor,  # (P, rot) float32: cos, then sin
) -> Tensor:  # (N, heads, D), dtype of x
    """Rotates channels i and i + rot/2 of each head by the angle of the row's position.

    Differentiable in x. Raises ValueError on shapes, dtypes and positions that do not fit.
    Source: Su et al. 2021, eq. 34.
    """
    _check_shapes(x, positions, table)
    chosen = choose("rope", x, table)
    if chosen != "cpp":  # whose kernel looks at them itself
        check_positions(positions, table.shape[0])
    if chosen == "reference":
        return rope_reference(x, positions, table)
    x, positions, table = x.contiguous(), positions.contiguous(), table.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, positions, table)
    return kernel("rope")(x, positions, table, False)


def _check_shapes(x: Tensor, positions: Tensor, table: Tensor) -> None:
    if x.dim() != 3 or positions.shape != x.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"x, positions: got {tuple(x.shape)}, {positions.dtype} {tuple(positions.shape)}, "
            "want (N, heads, D), int64 (N,)"
        )
    if table.dim() != 2 or table.shape[1] % 2 or table.shape[1] > x.shape[2]:
        raise ValueError(
            f"table: got shape {tuple(table.shape)}, want (P, rot), rot even, at most {x.shape[2]}"
        )


def check_positions(positions: Tensor, num_positions: int) -> None:
    """On the CPU only: on a GPU reading them would wait for all that was launched before."""
    if positions.numel() and positions.device.type == "cpu":
        low, high = (int(p) for p in positions.aminmax())
        if low < 0 or high >= num_positions:
            raise ValueError(
                f"positions: got {low} ... {high}, want 0 ... {num_positions - 1}, the rows of the table"
            )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(positions, table)
        return kernel("rope")(x, positions, table, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return kernel("rope")(grad.contiguous(), *ctx.saved_tensors, True), None, None


define(
    "rope(Tensor x, Tensor positions, Tensor table, bool inverse) -> Tensor",
    lambda x, positions, table, inverse: torch.empty_like(x),
)


def rope_and_write_reference(
    q: Tensor,  # (N, Hq, D)
    k: Tensor,  # (N, Hk, D)
    v: Tensor,  # (N, Hk, D)
    positions: Tensor,  # (N,) int64
    table: Tensor,  # (P, rot)
    k_pages: Tensor,  # (pages, Hk, D / w, PAGE, w)
    v_pages: Tensor,  # (pages, Hk, PAGE / w, D, w)
    slots: Tensor,  # (N,) int64
) -> Tensor:  # (N, Hq, D)
    """The definition: rope, then the write."""
    write_pages(k_pages, v_pages, slots, rope_reference(k, positions, table), v)
    return rope_reference(q, positions, table)


@torch.no_grad()
def rope_and_write(
    q: Tensor,  # (N, Hq, D)
    k: Tensor,  # (N, Hk, D)
    v: Tensor,  # (N, Hk, D)
    positions: Tensor,  # (N,) int64, below P
    table: Tensor,  # (P, rot) float32: cos, then sin
    k_pages: Tensor,  # (pages, Hk, D / w, PAGE, w), written
    v_pages: Tensor,  # (pages, Hk, PAGE / w, D, w), written
    slots: Tensor,  # (N,) int64, all different: page * PAGE + place
) -> Tensor:  # (N, Hq, D), dtype of q
    """q rotated; k rotated and v, rounded to the dtype of the pages, at their slots of the pages.

    One launch on a GPU; C++ has no kernel of its own for it and runs rope twice, then the write. No backward: decoding
    has none. Raises ValueError on shapes, dtypes, positions and slots that do not fit.
    """
    for x in (q, k, v):
        _check_shapes(x, positions, table)
    _check_pages(q, k, v, k_pages, v_pages, slots)
    chosen = choose("rope", q, k, v, table, k_pages, v_pages)
    if chosen == "cpp":
        rotated = rope(q, positions, table)  # first: it looks at the positions
        write_pages(k_pages, v_pages, slots, rope(k, positions, table), v)
        return rotated
    check_positions(positions, table.shape[0])
    if chosen == "reference":
        return rope_and_write_reference(q, k, v, positions, table, k_pages, v_pages, slots)
    return kernel("rope_and_write")(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        positions.contiguous(),
        table.contiguous(),
        k_pages,
        v_pages,
        slots.contiguous(),
    )


def _check_pages(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> None:
    if k.shape != v.shape or k.shape[2] != q.shape[2] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v: got {q.dtype} {tuple(q.shape)}, {k.dtype} {tuple(k.shape)}, {v.dtype} {tuple(v.shape)}, "
            "want one dtype, (N, Hq, D), (N, Hk, D), (N, Hk, D)"
        )
    shapes = page_shapes(k.shape[1], k.shape[2], k_pages.dtype)
    for name, pages, of_page in zip(
        ("k_pages", "v_pages"), (k_pages, v_pages), shapes, strict=True
    ):
        want = [len(k_pages), *of_page]
        if list(pages.shape) != want or pages.dtype != k_pages.dtype or not pages.is_contiguous():
            raise ValueError(
                f"{name}: got {pages.dtype} {tuple(pages.shape)}, want contiguous {k_pages.dtype} {tuple(want)}"
            )
    if slots.shape != k.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(f"slots: got {slots.dtype} {tuple(slots.shape)}, want int64 ({len(k)},)")
    if slots.numel() and slots.device.type == "cpu":
        low, high = (int(slot) for slot in slots.aminmax())
        if low < 0 or high >= len(k_pages) * PAGE:
            raise ValueError(
                f"slots: got {low} ... {high}, want 0 ... {len(k_pages) * PAGE - 1}, {len(k_pages)} pages of {PAGE}"
            )


define(
    "rope_and_write(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor table, Tensor(a!) k_pages,"
    " Tensor(b!) v_pages, Tensor slots) -> Tensor",
    lambda q, k, v, positions, table, k_pages, v_pages, slots: torch.empty_like(q),
)
