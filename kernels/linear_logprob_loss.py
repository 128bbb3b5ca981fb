"""A loss that is a sum over rows of functions of their log-probability and entropy, with its gradients.

    (logprob_n, entropy_n) as in linear_logprob
    loss = sum_n f_n(logprob_n, entropy_n)

Since a row's slopes f_n' follow from that row alone, a few rows go forward and backward at once: their logits are made
once and kept only from the one to the other, where linear_logprob, whose slopes come later, must make them again: three
products instead of four. SFT's loss is such a sum, PPO's clipped one too (InstructGPT 3.1, C.4).

N rows, H hidden, V vocabulary. Memory: O(N H + V H) and the logits of one piece, `rows_of_piece(N)` rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._backend import choose, cpu_class, define, kernel
from .linear import PackedWeight
from .linear_logprob import check_head, check_targets, head_operands, linear_logprob

# (logprob (n,), entropy (n,), which rows) -> () : the sum of these rows' f_n, by torch's autograd
Loss = Callable[[Tensor, Tensor, slice], Tensor]

BLOCK, STRIDE = 256, 272  # of the vocabulary, and floats from a kept row to the next: csrc/cpu/logprob.h
GROUPS = 16  # shares of a piece's dH that are held: csrc/cpu/linear_logprob_loss.cpp
FEWEST, MOST, PART = 60, 192, 32  # rows of a piece: a 32nd of all, whose logits are 3 % of all
LEAST = 4 * FEWEST  # of fewer rows, the logits of a piece would be those of all, or nearly


def rows_of_piece(rows: int) -> int:
    """A multiple of 12, of which every class's passes of rows are a divisor."""
    return max(FEWEST, min(rows // PART // 12 * 12, MOST))


def linear_logprob_loss_reference(
    hidden: Tensor,  # (N, H)
    weight: Tensor | PackedWeight,  # (V, H)
    targets: Tensor,  # (N,)
    loss: Loss,
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    *,
    master: Tensor | None = None,  # (V, H)
) -> tuple[Tensor, Tensor, Tensor]:  # loss (), logprob (N,), entropy (N,)
    """The definition: the loss of linear_logprob's results, all rows at once."""
    logprob, entropy = linear_logprob(hidden, weight, targets, temperature, bias, master=master)
    return loss(logprob, entropy, slice(0, len(targets))), logprob.detach(), entropy.detach()


def linear_logprob_loss(
    hidden: Tensor,  # (N, H) bfloat16 or float32
    weight: Tensor | PackedWeight,  # (V, H)
    targets: Tensor,  # (N,) int64
    loss: Loss,
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    *,
    master: Tensor | None = None,  # (V, H) float32
) -> tuple[Tensor, Tensor, Tensor]:  # loss (), logprob (N,), entropy (N,): float32
    """loss = sum_n f_n(logprob_n, entropy_n), where loss(logprob[rows], entropy[rows], rows) is the sum over rows.

    Gradients of the loss to hidden, bias and weight (or `master`) as linear_logprob's; the other two come without.
    `loss` is called for pieces of the rows and once for all of them, so it must be such a sum: a mean divides by a
    number that it knows beforehand. Differentiable once. On class amx with a bfloat16 weight, on a GPU, where no
    gradient is asked for, and of fewer than LEAST rows, this is linear_logprob and the loss of its results. Raises
    ValueError as linear_logprob does.
    """
    check_head(hidden, weight, temperature, bias, master)
    dense = weight if isinstance(weight, Tensor) else weight.dense
    wanted = hidden, weight if isinstance(weight, Tensor) else master, bias
    asked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
    if not asked or not _in_pieces(hidden, dense):
        return linear_logprob_loss_reference(
            hidden, weight, targets, loss, temperature, bias, master=master
        )
    check_targets(targets, hidden.shape[0], dense.shape[0])
    dense, data = head_operands(weight, "cpp")
    out: tuple[Tensor, Tensor, Tensor] = _Pieces.apply(
        *wanted, dense, data, targets.contiguous(), temperature, loss
    )
    return out


def _in_pieces(hidden: Tensor, dense: Tensor) -> bool:
    """Where a product takes as long as the memory it reads, as on tiles, pieces would read the weight too often."""
    if len(hidden) < LEAST or choose("linear_logprob", hidden, dense) != "cpp":
        return False
    return dense.dtype == torch.float32 or cpu_class() != "amx"


def _slopes(
    loss: Loss, logprob: Tensor, entropy: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:  # (n,), (n,) -> d loss / d logprob (n,), d loss / d entropy (n,)
    with torch.enable_grad():
        inputs = logprob.requires_grad_(), entropy.requires_grad_()
        of_rows = loss(*inputs, rows)
        if not of_rows.requires_grad:
            return torch.zeros_like(logprob), torch.zeros_like(entropy)
        slopes = torch.autograd.grad(of_rows, inputs, allow_unused=True, materialize_grads=True)
    return slopes[0].contiguous(), slopes[1].contiguous()


class _Pieces(torch.autograd.Function):
    """The gradients are made in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        master: Tensor | None,  # (V, H): what gets the weight's gradient
        bias: Tensor | None,  # (V,)
        dense: Tensor,  # (V, H)
        data: Tensor,
        targets: Tensor,  # (N,)
        temperature: float,
        loss: Loss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, wide = len(targets), torch.float32
        piece = min(rows_of_piece(rows), rows)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        make = torch.empty if rows else torch.zeros
        dh = make(hidden.shape, dtype=wide) if need_hidden else None
        dw = make(dense.shape, dtype=wide) if need_weight else None
        db = make(dense.shape[0], dtype=wide) if need_bias else None
        kept = torch.empty(-(-dense.shape[0] // BLOCK) * piece * STRIDE)
        logprob, entropy = torch.empty(rows), torch.empty(rows)
        float_bias = None if bias is None else bias.float().contiguous()
        for first in range(0, rows, max(piece, 1)):
            at = slice(first, min(first + piece, rows))
            own = kept[: len(kept) // piece * (at.stop - first)]
            given = hidden[at].contiguous(), dense, data, targets[at], temperature, float_bias
            of_rows = kernel("linear_logprob_kept")(*given, own)
            logprob[at], entropy[at] = of_rows[:2]
            slopes = _slopes(loss, of_rows[0].clone(), of_rows[1].clone(), at)
            own_dh = None if dh is None else dh[at]
            kernel("linear_logprob_kept_backward")(
                *slopes, *given, *of_rows[2:], of_rows[1], own, own_dh, dw, db, first > 0
            )
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, master, bias)]
        ctx.gradients = dh, dw, db
        ctx.mark_non_differentiable(logprob, entropy)
        return loss(logprob, entropy, slice(0, rows)), logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, *_others: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_logprob_loss: its backward ran before; call it once, it keeps no graph")
        gradients, ctx.gradients = ctx.gradients, None  # what is returned has no other owner: it is not copied
        if float(scale) != 1.0:
            gradients = [None if g is None else g.mul_(scale) for g in gradients]
        own = [None if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return *own, None, None, None, None, None


def _fake(hidden: Tensor, *_others: Any) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


_HEAD = "Tensor hidden, Tensor dense, Tensor data, Tensor targets, float temperature, Tensor? bias"
define(
    f"linear_logprob_kept({_HEAD}, Tensor(a!) kept)"
    " -> (Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum)",
    _fake,
)
define(
    f"linear_logprob_kept_backward(Tensor grad_logprob, Tensor grad_entropy, {_HEAD}, Tensor row_max,"
    " Tensor log_sum, Tensor entropy, Tensor(a!) kept, Tensor(b!)? dh, Tensor(c!)? dw, Tensor(d!)? db,"
    " bool accumulate) -> ()",
    lambda *_inputs: None,
)
