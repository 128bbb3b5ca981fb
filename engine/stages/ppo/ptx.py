"""The pretraining term of PPO-ptx [InstructGPT 3.5, Eq. 2]: language-model loss on rows of plain text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.data.deal import own_passes
from engine.data.pack import cut_by_tokens, pack_sequences, predictions
from engine.model import transformer
from engine.model.checkpointing import Checkpointing
from engine.run.distributed import ALONE, Ranks


def lm_loss(
    model: transformer.Model,
    rows: Sequence[Sequence[int]],
    checkpointing: Checkpointing = "selective",
) -> tuple[Tensor, int]:
    """Summed negative log-prob of all tokens after each row's first, and how many there are."""
    batch = pack_sequences(rows)
    shift = predictions(batch)
    hidden = transformer.forward(model, batch, rows=shift.rows, checkpointing=checkpointing)
    loss, *_ = transformer.logprob_loss(
        model, hidden, shift.targets, lambda logprob, *_: -logprob.sum()
    )
    return loss, shift.targets.numel()


def backward_lm_loss(
    model: transformer.Model,
    rows: Sequence[Sequence[int]],
    coefficient: float,
    budget: int,
    checkpointing: Checkpointing = "selective",
    ranks: Ranks = ALONE,
) -> float:
    """Adds coefficient * gradient of the token-mean loss to the masters' gradients; returns the mean loss."""
    total = sum(max(len(row) - 1, 0) for row in rows)
    losses = []  # read when all is launched
    for one in own_passes([len(row) for row in rows], budget, ranks):
        loss, _ = lm_loss(model, [rows[i] for i in one.items], checkpointing)
        loss = one.loss(loss)
        (loss * (coefficient / max(total, 1))).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    (loss_sum,) = ranks.sums([sum(map(float, losses), 0.0)])
    return loss_sum / max(total, 1)


@torch.no_grad()
def mean_lm_loss(
    model: transformer.Model, rows: Sequence[Sequence[int]], budget: int, ranks: Ranks = ALONE
) -> float:
    """Token-mean loss without gradient; its exponential is the perplexity."""
    loss_sum, count = 0.0, 0.0
    own = [rows[i] for i in ranks.share(len(rows))]
    for cut in cut_by_tokens([len(row) for row in own], budget):
        loss, tokens = lm_loss(model, [own[i] for i in cut])
        loss_sum, count = loss_sum + float(loss), count + tokens
    loss_sum, count = ranks.sums([loss_sum, count])
    return loss_sum / max(count, 1)
