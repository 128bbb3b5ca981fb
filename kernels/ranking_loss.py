"""The pairwise ranking loss over all pairs of a prompt's K answers (InstructGPT Eq. 1).

    pairs of a prompt = {(w, l): rank_w < rank_l}
    L_p = sum over its pairs of -log sigmoid(score_w - score_l)
    d L_p / d score_i = sum over j paired with i of sigmoid(score_i - score_j) - [i beats j]

Lower ranks are better; equal ranks are ties and give no pair.
One prompt is one segment, so its K answers are one batch element. What the sum is divided by
(`reduction`; Eq. 1 does not say it once there are ties):

- "prompt_mean_valid": L_p / (pairs of p), averaged over the prompts that have a pair. All prompts
  weigh the same.
- "prompt_mean_allpairs": L_p / C(K, 2), ties adding 0 (Eq. 1 to the letter), averaged over the
  prompts with K >= 2.
- "pair_mean": all pairs of the batch weigh the same.

Without any pair the loss and its gradient are 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import choose, define, kernel
from ._check import check_offsets, check_vector
from ._loss import check_denominator, divided, divided_later, register_loss

REDUCTIONS = ("prompt_mean_valid", "prompt_mean_allpairs", "pair_mean")


def _winners(rank: Tensor) -> Tensor:  # (K,) -> (K, K) bool, [w, l] is a pair
    return rank[:, None] < rank[None, :]


def _pairs_possible(answers: int) -> int:
    return answers * (answers - 1) // 2


def ranking_denominator(rank: Tensor, cu: Tensor, reduction: str = "prompt_mean_valid") -> int:
    """What `ranking_loss` divides by on these ranks: prompts with a pair, prompts with K >= 2, or
    pairs.

    Summed over micro-batches (and processes) it is the `denominator` that makes them add up to the
    whole batch.
    """
    check_ranking(rank, reduction)
    check_values(rank, cu)
    total = 0
    for segment in rank.split(cu.diff().tolist()):
        pairs = int(_winners(segment).sum())
        counts = (int(pairs > 0), int(segment.numel() > 1), pairs)
        total += counts[REDUCTIONS.index(reduction)]
    return total


def ranking_loss_reference(
    score: Tensor,  # (N,)
    rank: Tensor,  # (N,)
    cu: Tensor,  # (S+1,) int32, the answers of prompt s are cu[s]:cu[s+1]
    reduction: str = "prompt_mean_valid",
    denominator: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # loss (), num_pairs () int64, num_correct () int64
    """The definition, a prompt at a time."""
    lengths = cu.diff().tolist()
    total, num_pairs, num_correct = score.sum() * 0, 0, 0
    for s, q in zip(score.split(lengths), rank.split(lengths), strict=True):
        winners = _winners(q)
        margin = (s[:, None] - s[None, :])[winners]  # (pairs,)
        pairs = margin.numel()
        divisor = {
            "prompt_mean_valid": pairs,
            "prompt_mean_allpairs": _pairs_possible(s.numel()),
            "pair_mean": 1,
        }[reduction]
        if pairs:
            total = total - F.logsigmoid(margin).sum() / divisor
        num_pairs += pairs
        num_correct += int((margin > 0).sum())
    own = ranking_denominator(rank, cu, reduction) if denominator is None else denominator
    loss = total / own if own else total
    return loss, torch.tensor(num_pairs), torch.tensor(num_correct)


def check_ranking(rank: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, want one of {', '.join(REDUCTIONS)}")
    if rank.dim() != 1 or rank.dtype == torch.bool or rank.is_complex():
        raise ValueError(
            f"rank: got {rank.dtype} of shape {tuple(rank.shape)}, want (N,) integers or floats"
        )


def check_values(rank: Tensor, cu: Tensor) -> None:
    """On the CPU only: on a GPU reading them would wait for all that was launched before."""
    check_offsets("cu", cu, rank.numel())
    if rank.device.type == "cpu" and rank.is_floating_point() and not rank.isfinite().all():
        at = int((~rank.isfinite()).nonzero()[0])
        raise ValueError(
            f"rank[{at}]: got {float(rank[at])}, want a finite number;"
            " leave an answer without a rank out of the batch"
        )


def ranking_loss(
    score: Tensor,  # (N,)
    rank: Tensor,  # (N,) integers or floats; lower is better
    cu: Tensor,  # (S+1,) int32
    reduction: str = "prompt_mean_valid",
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # loss (), num_pairs () int64, num_correct () int64
    """Loss in nats; num_pairs counts the pairs left after ties, num_correct those with score_w >
    score_l.

    `denominator` replaces the op's own count of prompts (or of pairs, for "pair_mean") by the count
    over the whole batch, see `ranking_denominator`. Differentiable once, in score. Answers may
    stand in any order; best first the CPU's kernel has nothing to sort. Raises ValueError on
    shapes, offsets and names that do not fit, and on ranks that are not finite.
    Source: InstructGPT Eq. 1 and section 3.5.
    """
    check_ranking(rank, reduction)
    check_vector("score", score, rank.numel(), score.dtype)
    if divided_later(denominator, score.dtype):
        loss, num_pairs, num_correct = ranking_loss(score, rank, cu, reduction, denominator=1.0)
        return divided(loss, denominator), num_pairs, num_correct
    divisor = check_denominator(denominator)
    backend = choose("ranking_loss", score)
    if backend != "cpp":  # which checks them while it reads them
        check_values(rank, cu)
    if backend == "reference":
        return ranking_loss_reference(score, rank, cu, reduction, divisor)
    if backend != "cpp" or rank.dtype != torch.float32:
        rank = rank.double()
    loss, num_pairs, num_correct, _ = kernel("ranking_loss")(
        score.contiguous(), rank.contiguous(), cu.contiguous(), REDUCTIONS.index(reduction), divisor
    )
    return loss, num_pairs, num_correct


define(
    "ranking_loss(Tensor score, Tensor rank, Tensor cu, int reduction, float? denominator)"
    " -> (Tensor loss, Tensor num_pairs, Tensor num_correct, Tensor grad)",
    lambda score, rank, cu, reduction, denominator: (
        score.new_empty(()),
        score.new_empty((), dtype=torch.int64),
        score.new_empty((), dtype=torch.int64),
        torch.empty_like(score),
    ),
)
register_loss("ranking_loss")
