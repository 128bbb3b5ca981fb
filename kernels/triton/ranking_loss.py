"""ranking_loss on a GPU: one warp a prompt over tiles of its K x K pairs, in registers.

    slope_i = sum over j paired with i of sigmoid(s_i - s_j) - [i beats j]

Three launches: the prompts' sums, the batch's, and the gradient divided by what the second one counted. A few dozen
pairs a prompt, in float64 as in C++: exact to the last bit of float32, and far from being what a step waits for.
The table has one row: block sizes decide the order of the sums, which other prompts must not change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, config, launch
from ._reduce import ONE_PROGRAM


@triton.jit
def _log1p(e):
    """Of e in [0, 1], in float64: 1 + e would drop a small e's digits."""
    return tl.where(e < 1e-5, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))


@triton.jit
def _divisor(answers, pairs, REDUCTION: tl.constexpr):
    """What a prompt's own sum is divided by; 1 without pairs."""
    if REDUCTION == 0:  # prompt_mean_valid
        divisor = pairs
    elif REDUCTION == 1:  # prompt_mean_allpairs
        divisor = answers * (answers - 1) // 2
    else:  # pair_mean
        divisor = tl.zeros_like(pairs) + 1
    return tl.maximum(divisor, 1).to(tl.float64)


@triton.jit
def _share(answers, pairs, REDUCTION: tl.constexpr):
    """What a prompt adds to the batch's denominator."""
    if REDUCTION == 0:
        return (pairs > 0).to(tl.float64)
    elif REDUCTION == 1:
        return (answers > 1).to(tl.float64)
    else:
        return pairs.to(tl.float64)


@triton.jit
def _prompts(
    score, rank, cu, slope, partials, prompts, REDUCTION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """slope: the gradient undivided. partials, a row of `prompts` each: loss, share, pairs, correct."""
    prompt = tl.program_id(0)
    start = tl.load(cu + prompt).to(tl.int64)
    answers = tl.load(cu + prompt + 1).to(tl.int64) - start
    score += start
    rank += start
    loss = tl.zeros((), tl.float64)
    pairs = tl.zeros((), tl.int64)
    correct = tl.zeros((), tl.int64)
    for row in range(0, answers, BLOCK):
        i = row + tl.arange(0, BLOCK)
        s_i = tl.load(score + i, mask=i < answers, other=0.0).to(tl.float64)
        q_i = tl.load(rank + i, mask=i < answers, other=0.0)
        total = tl.zeros((BLOCK,), tl.float64)
        for column in range(0, answers, BLOCK):
            j = column + tl.arange(0, BLOCK)
            s_j = tl.load(score + j, mask=j < answers, other=0.0).to(tl.float64)
            q_j = tl.load(rank + j, mask=j < answers, other=0.0)
            live = (i < answers)[:, None] & (j < answers)[None, :]
            wins = live & (q_i[:, None] < q_j[None, :])
            loses = live & (q_i[:, None] > q_j[None, :])
            difference = s_i[:, None] - s_j[None, :]
            margin = tl.where(wins, difference, -difference)  # of the winner
            e = tl.exp(-tl.abs(margin))  # in [0, 1]: nothing overflows
            wrong = tl.where(margin > 0, e, 1.0) / (1.0 + e)  # sigmoid(-margin)
            total += tl.sum(tl.where(wins, -wrong, tl.where(loses, wrong, 0.0)), 1)
            softplus = tl.where(margin < 0, -margin, 0.0) + _log1p(e)
            loss += tl.sum(tl.sum(tl.where(wins, softplus, 0.0), 1), 0)
            pairs += tl.sum(tl.sum(wins.to(tl.int32), 1), 0)
            correct += tl.sum(tl.sum((wins & (margin > 0)).to(tl.int32), 1), 0)
        tl.store(slope + start + i, total.to(tl.float32), mask=i < answers)
    partials += prompt
    tl.store(partials, loss / _divisor(answers, pairs, REDUCTION))
    tl.store(partials + prompts, _share(answers, pairs, REDUCTION))
    tl.store(partials + 2 * prompts, pairs.to(tl.float64))
    tl.store(partials + 3 * prompts, correct.to(tl.float64))


@triton.jit
def _batch(
    partials, loss, num_pairs, num_correct, divisor, prompts, denominator, ROWS: tl.constexpr
):  # fmt: skip
    """loss = sum / divisor, where the divisor is the sum of the shares if `denominator` is 0."""
    sums = tl.zeros((ROWS,), tl.float64)
    shares = tl.zeros((ROWS,), tl.float64)
    pairs = tl.zeros((ROWS,), tl.float64)
    correct = tl.zeros((ROWS,), tl.float64)
    for first in range(0, prompts, ROWS):
        prompt = first + tl.arange(0, ROWS)
        inside = prompt < prompts
        sums += tl.load(partials + prompt, mask=inside, other=0.0)
        shares += tl.load(partials + prompts + prompt, mask=inside, other=0.0)
        pairs += tl.load(partials + 2 * prompts + prompt, mask=inside, other=0.0)
        correct += tl.load(partials + 3 * prompts + prompt, mask=inside, other=0.0)
    own = tl.sum(shares, 0)
    total = tl.where(denominator > 0, tl.cast(denominator, tl.float64), own)
    total = tl.where(total > 0, total, 1.0)  # no pairs: the sum is 0
    tl.store(divisor, total)
    tl.store(loss, (tl.sum(sums, 0) / total).to(loss.dtype.element_ty))
    tl.store(num_pairs, tl.sum(pairs, 0).to(tl.int64))
    tl.store(num_correct, tl.sum(correct, 0).to(tl.int64))


@triton.jit
def _gradient(
    slope, cu, partials, divisor, grad, prompts, REDUCTION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    prompt = tl.program_id(0)
    start = tl.load(cu + prompt).to(tl.int64)
    answers = tl.load(cu + prompt + 1).to(tl.int64) - start
    pairs = tl.load(partials + 2 * prompts + prompt).to(tl.int64)
    weight = 1.0 / (_divisor(answers, pairs, REDUCTION) * tl.load(divisor))
    for first in range(0, answers, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = tl.load(slope + start + i, mask=i < answers, other=0.0).to(tl.float64)
        tl.store(grad + start + i, (weight * s).to(grad.dtype.element_ty), mask=i < answers)


def ranking_loss(
    score: Tensor,
    rank: Tensor,
    cu: Tensor,
    reduction: int,
    denominator: float | None,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The table has one row."""
    prompts, grad = cu.numel() - 1, torch.empty_like(score)
    slope = torch.empty_like(score, dtype=torch.float32)
    partials = score.new_empty(4, prompts, dtype=torch.float64)
    divisor, loss = score.new_empty((), dtype=torch.float64), score.new_empty(())
    num_pairs, num_correct = (score.new_empty((), dtype=torch.int64) for _ in range(2))
    tuned = tuned or config("ranking_loss", score.numel(), score.device)
    given = (score, rank, cu, slope, partials, prompts)
    launch(_prompts, (prompts,), *given, config=tuned, REDUCTION=reduction)
    results = (loss, num_pairs, num_correct, divisor)
    launch(_batch, (1,), partials, *results, prompts, denominator or 0.0, config=ONE_PROGRAM)
    divided = (slope, cu, partials, divisor, grad, prompts)
    launch(_gradient, (prompts,), *divided, config=tuned, REDUCTION=reduction)
    return loss, num_pairs, num_correct, grad
