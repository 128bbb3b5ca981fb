"""ranking_loss's Triton kernels against the float64 definition."""

import pytest
import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE, DTYPES
from mutations import mutations
from token_ops import FLOAT32, blocks, golden, offsets, on_device, ops_file

from engine.kernels import ranking_loss as contract
from engine.kernels._backend import backend
from engine.kernels.ranking_loss import REDUCTIONS, ranking_loss, ranking_loss_reference
from engine.kernels.triton import ranking_loss as kernels


def inputs(lengths, dtype=torch.float32, levels=4, scale=1.0):
    n = sum(lengths)
    score = (torch.randn(n) * scale).to(dtype)
    return score.to(DEVICE), torch.randint(levels, (n,)).to(DEVICE), offsets(lengths)


def defined(score, rank, cu, reduction):
    score = score.clone().requires_grad_()
    loss, num_pairs, num_correct = ranking_loss_reference(score, rank, cu, reduction)
    loss.backward()
    return loss.detach(), int(num_pairs), int(num_correct), score.grad


def on_triton(given, reduction="prompt_mean_valid", shift=0, **options):
    with guarded() as guards, backend("triton"):
        score, rank, cu = (guards.place(x, shift) for x in given)
        score.requires_grad_()
        loss, num_pairs, num_correct = ranking_loss(score, rank, cu, reduction, **options)
        loss.backward()
    return loss.detach(), int(num_pairs), int(num_correct), score.grad


def check(lengths, reduction, dtype=torch.float32, levels=4, scale=1.0):
    score, rank, cu = inputs(lengths, dtype, levels, scale)
    loss, num_pairs, num_correct, grad = on_triton((score, rank, cu), reduction)
    plain = defined(score, rank, cu, reduction)
    truth = defined(score.double(), rank, cu, reduction)
    assert (num_pairs, num_correct) == truth[1:3]
    assert_close(loss, plain[0], truth[0], "loss")
    assert_close(grad, plain[3], truth[3], "grad")


LENGTHS = [0, 5, 1, 2, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_against_float64(reduction, dtype):
    with blocks(4):
        check(LENGTHS, reduction, dtype)


def test_blocks_of_the_table():
    check([9, 20], "prompt_mean_valid", levels=60)


@pytest.mark.parametrize("scale", [1e-4, 100.0, 1e4])
def test_scores_of_any_size(scale):
    with blocks(4):
        check([6, 7], "pair_mean", levels=9, scale=scale)


def test_pairs_that_are_far_apart_keep_their_digits():
    """-log sigmoid(m) = e^-m: 1 + e^-m would be 1."""
    score, rank = torch.tensor([20.0, -20.0], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    loss, *_ = on_triton((score, rank, offsets([2])))
    want = torch.tensor(-40.0, dtype=torch.float64, device=DEVICE).exp()
    torch.testing.assert_close(loss.double(), want, rtol=1e-7, atol=0)


@golden("pairwise_ranking_prompt")
def test_golden_prompt(case):
    with on_device():
        ops_file("test_ranking_loss").test_golden_prompt(case, FLOAT32)


@golden("pairwise_ranking_batch")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_golden_batch(case, reduction):
    with blocks(2), on_device():
        ops_file("test_ranking_loss").test_golden_batch(case, reduction, FLOAT32)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_prompts_without_pairs(reduction):
    theirs = ops_file("test_ranking_loss")
    with on_device():
        theirs.test_without_pairs_loss_and_gradient_are_zero(reduction, FLOAT32)
        theirs.test_a_prompt_with_one_answer_does_not_count(reduction, FLOAT32)
        theirs.test_micro_batches_add_up_to_the_batch(reduction, FLOAT32)


def test_ranks_of_any_type_equal_scores_and_nan():
    theirs = ops_file("test_ranking_loss")
    with on_device():
        theirs.test_ranks_of_any_type_order_alike(FLOAT32)
        theirs.test_equal_scores_have_the_closed_form(40, FLOAT32)
        theirs.test_a_nan_score_is_not_hidden(FLOAT32)


def test_an_infinite_score():
    score = torch.tensor([float("-inf"), 0.0, 1.0], device=DEVICE)
    worst, best = (torch.tensor(rank, device=DEVICE) for rank in ([2, 1, 0], [0, 1, 2]))
    assert on_triton((score, worst, offsets([3])))[0].isfinite()
    assert on_triton((score, best, offsets([3])))[0] == float("inf")


def test_neighbours_place_and_addresses_do_not_change_a_bit():
    score, rank, cu = given = inputs([3, 9, 0, 5], torch.bfloat16)
    with blocks(4):
        want, again, moved = (on_triton(given, shift=shift, denominator=7) for shift in (0, 0, 1))
        alone = on_triton((score[3:12], rank[3:12], offsets([9])), denominator=7)
    for other in (again, moved):
        assert torch.equal(want[0], other[0]) and torch.equal(want[3], other[3])
    assert torch.equal(want[3][3:12], alone[3])


def test_a_denominator_on_a_gpu_is_not_read(monkeypatch):
    score, rank, cu = given = inputs([5, 6])
    meta = [x.to("meta") for x in given]
    unread = ranking_loss(*meta, denominator=torch.empty((), device="meta"))
    assert unread[0].device.type == "meta"  # float() of it would raise
    want = on_triton(given, denominator=torch.tensor(3))
    monkeypatch.setattr(contract, "divided_later", lambda d, _: isinstance(d, torch.Tensor))
    got = on_triton(given, denominator=torch.tensor(3, device=DEVICE))
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[3], want[3], rtol=1e-6, atol=0)


DEFECTS = {
    "ties are pairs": ("(q_i[:, None] < q_j[None, :])", "(q_i[:, None] <= q_j[None, :])"),
    "higher ranks win": (
        "wins = live & (q_i[:, None] < q_j[None, :])\n            loses = live & (q_i[:, None] > q_j",
        "wins = live & (q_i[:, None] > q_j[None, :])\n            loses = live & (q_i[:, None] < q_j",
    ),
    "losers have no gradient": ("tl.where(loses, wrong, 0.0)", "0.0"),
    "sign": ("tl.where(wins, -wrong,", "tl.where(wins, wrong,"),
    "sigmoid of the other sign": ("margin > 0, e, 1.0", "margin > 0, 1.0, e"),
    "no linear part": ("tl.where(margin < 0, -margin, 0.0) + _log1p(e)", "_log1p(e)"),
    "small e dropped": ("tl.where(e < 1e-5, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))", "tl.log(1.0 + e)"),
    "equal scores are correct": ("wins & (margin > 0)", "wins & (margin >= 0)"),
    "the last column of tiles only": ("total += tl.sum(", "total = tl.sum("),
    "the last tile's loss only": ("loss += tl.sum(", "loss = tl.sum("),
    "answers behind the prompt": ("& (j < answers)[None, :]", "& (j < answers + 1)[None, :]"),
    "a prompt's sum is not divided": ("loss / _divisor(answers, pairs, REDUCTION)", "loss"),
    "pairs for all pairs": ("answers * (answers - 1) // 2", "answers * (answers - 1)"),
    "prompts without pairs count": ("return (pairs > 0).to(tl.float64)", "return (pairs >= 0).to(tl.float64)"),
    "one answer counts": ("return (answers > 1).to(tl.float64)", "return (answers > 0).to(tl.float64)"),
    "the batch's divisor is forgotten": ("REDUCTION) * tl.load(divisor))", "REDUCTION))"),
    "the prompt's own divisor is forgotten": ("1.0 / (_divisor(answers, pairs, REDUCTION) *", "1.0 / ("),
    "a prompt's correct pairs for its pairs": ("pairs = tl.load(partials + 2 *", "pairs = tl.load(partials + 3 *"),
    "slopes of the first prompt": ("tl.load(slope + start + i,", "tl.load(slope + i,"),
    "the last prompts only": ("sums += tl.load", "sums = tl.load"),
    "every pair is correct": ("num_correct, tl.sum(correct, 0)", "num_correct, tl.sum(pairs, 0)"),
    "the denominator is ignored": ("tl.where(denominator > 0, tl.cast(denominator, tl.float64), own)", "own"),
}  # fmt: skip


def check_all():
    torch.manual_seed(3)
    with blocks(4):
        for reduction in REDUCTIONS:
            check(LENGTHS, reduction)
        test_pairs_that_are_far_apart_keep_their_digits()
        equal = torch.zeros(3, device=DEVICE), torch.arange(3, device=DEVICE), offsets([3])
        assert on_triton(equal)[1:3] == (3, 0)
        half = on_triton(equal, denominator=2)
        torch.testing.assert_close(2 * half[0], on_triton(equal)[0])


def test_without_a_defect_the_check_passes():
    check_all()


test_defects_are_caught = mutations(kernels, DEFECTS)(check_all)
