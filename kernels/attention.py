"""Causal attention over packed sequences, with grouped heads and shared prefixes (Vaswani et al. 2017, eq. 1).

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j        j over the prefix's keys, then the own keys up to i

Query head h reads key head h // (Hq / Hk). `prefix[s] = p < s` puts all of segment p's keys before those of segment
s (K answers to one prompt: the prompt's keys exist once); `prefix[s] = s` means none. Numerics: float32 arithmetic
for float32 and bfloat16 inputs. A row's result depends on its own keys alone: on the CPU it is equal to the bit
however the batch is packed, with a prefix shared or repeated, and to `attention_decode` of that row. On a GPU it is so
too, but for `attention_decode`, which sums in other pieces; in 16 bits the probabilities are rounded to the dtype of v
before they meet it. `ENGINE_ATTENTION=flash` takes flash-attn there instead (kernels/_flash.py).
"""

from typing import Any

import torch
from torch import Tensor

from . import _flash
from ._backend import choose, define, kernel
from ._check import check_offsets


def check_heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    """q (..., Hq, D) with k and v (..., Hk, D) of one shape; Hq a multiple of Hk; one dtype."""
    if k.shape != v.shape:
        raise ValueError(
            f"{names[2]}: got shape {tuple(v.shape)}, want that of {names[1]}, {tuple(k.shape)}"
        )
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(
            f"{names[1]}: got head size {k.shape[-1]}, want that of {names[0]}, {q.shape[-1]}, above 0"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{names[0]}: got {q.shape[-2]} heads, want a multiple of the {k.shape[-2]} key heads"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{', '.join(names)}: got dtypes {q.dtype}, {k.dtype}, {v.dtype}, want one"
        )


def check_prefix(prefix: Tensor, num_segments: int) -> None:
    """int32 (S,), prefix[s] <= s, and a segment that is a prefix has none itself. Values: on the CPU only."""
    if prefix.dtype != torch.int32 or prefix.shape != (num_segments,):
        raise ValueError(
            f"prefix: got {prefix.dtype} of shape {tuple(prefix.shape)}, want int32 ({num_segments},)"
        )
    if prefix.device.type != "cpu":
        return
    for s, p in enumerate(prefix.tolist()):
        if not 0 <= p <= s or prefix[p] != p:
            raise ValueError(
                f"prefix[{s}]: got {p}, want {s} (no prefix) or an earlier segment without a prefix"
            )


def attention_reference(
    q: Tensor,  # (N, Hq, D)
    k: Tensor,  # (N, Hk, D)
    v: Tensor,  # (N, Hk, D)
    cu: Tensor,  # (S+1,) int32
    prefix: Tensor | None = None,  # (S,) int32
) -> Tensor:  # (N, Hq, D)
    """The definition: one segment at a time, scores in at least float32."""
    offsets = cu.tolist()
    prefixes = list(range(len(offsets) - 1)) if prefix is None else prefix.tolist()
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    rows = [q[:0]]
    for s, p in enumerate(prefixes):
        own = slice(offsets[s], offsets[s + 1])
        before = slice(offsets[p], offsets[p + 1]) if p != s else slice(0, 0)
        keys, values = (
            torch.cat([x[before], x[own]]).to(wide).repeat_interleave(group, dim=1) for x in (k, v)
        )
        score = torch.einsum("ihd,jhd->hij", q[own].to(wide), keys) * q.shape[-1] ** -0.5
        shared, length = before.stop - before.start, own.stop - own.start
        visible = torch.ones(length, shared + length, dtype=torch.bool, device=q.device)
        probability = score.masked_fill(~visible.tril(shared), -torch.inf).softmax(-1)
        rows.append(torch.einsum("hij,jhd->ihd", probability, values).to(q.dtype))
    return torch.cat(rows)


def attention(
    q: Tensor,  # (N, Hq, D)
    k: Tensor,  # (N, Hk, D)
    v: Tensor,  # (N, Hk, D)
    cu: Tensor,  # (S+1,) int32
    prefix: Tensor | None = None,  # (S,) int32
) -> Tensor:  # (N, Hq, D), dtype of q
    """out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over the keys that row i sees (module's docstring).

    Differentiable in q, k and v; a prefix collects the gradients of all segments that share it. Raises ValueError on
    shapes, dtypes, offsets or prefixes that do not fit. Source: Vaswani et al. 2017, 3.2.1; grouped heads: Ainslie
    et al. 2023; blocks of keys with a running maximum: Dao et al. 2022.
    """
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q, k: got shapes {tuple(q.shape)}, {tuple(k.shape)}, want (N, Hq, D), (N, Hk, D)"
        )
    check_heads(q, k, v, ("q", "k", "v"))
    if _flash.chosen():
        return _flash.attention(q, k, v, cu, prefix)
    chosen = choose("attention", q, k, v)
    if chosen != "cpp":  # which checks by itself
        check_offsets("cu", cu, q.shape[0])
        if prefix is not None:
            check_prefix(prefix, cu.numel() - 1)
    if chosen == "reference":
        return attention_reference(q, k, v, cu, prefix)
    q, k, v, cu = q.contiguous(), k.contiguous(), v.contiguous(), cu.contiguous()
    prefix = None if prefix is None else prefix.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, cu, prefix)
    return kernel("attention")(q, k, v, cu, prefix)[0]


class _Attention(torch.autograd.Function):
    """Saves the log-sum-exp of each row and head; the backward recomputes the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, prefix: Tensor | None
    ) -> Tensor:
        out, lse = kernel("attention")(q, k, v, cu, prefix)
        ctx.save_for_backward(q, k, v, out, lse, cu, prefix)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = kernel("attention_backward")(grad.contiguous(), *ctx.saved_tensors)
        return *gradients, None, None


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu, Tensor? prefix) -> (Tensor, Tensor)",
    lambda q, k, v, cu, prefix: (
        torch.empty_like(q),
        q.new_empty(q.shape[:2], dtype=torch.float32),
    ),
)
define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu, Tensor? prefix)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, out, lse, cu, prefix: (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
    ),
)
