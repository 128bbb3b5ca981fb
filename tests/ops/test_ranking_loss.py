"""ranking_loss against the golden numbers, the float64 definition, and the properties of Eq. 1."""

import math

import pytest
import torch
from compare import assert_close
from golden_cases import golden_cases, offsets, ragged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.ranking_loss import (
    REDUCTIONS,
    _winners,
    ranking_denominator,
    ranking_loss,
    ranking_loss_reference,
)

RAGGED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)


def loss_and_gradient(score, rank, cu, reduction, **keywords):
    score = score.detach().requires_grad_()
    loss, num_pairs, num_correct = ranking_loss(score, rank, cu, reduction, **keywords)
    loss.backward()
    return loss.detach(), score.grad, int(num_pairs), int(num_correct)


def check_against_float64(score, rank, cu, reduction):
    """Loss, gradient and counts by the tolerance rule; returns the gradient."""
    loss, grad, num_pairs, num_correct = loss_and_gradient(score, rank, cu, reduction)
    wide, plain = (score.to(d, copy=True).requires_grad_() for d in (torch.float64, torch.float32))
    truth, want_pairs, want_correct = ranking_loss_reference(wide, rank, cu, reduction)
    reference, _, _ = ranking_loss_reference(plain, rank, cu, reduction)
    truth.backward()
    reference.backward()
    assert_close(loss, reference, truth, "loss")
    assert_close(grad, plain.grad, wide.grad, "grad")
    assert (num_pairs, num_correct) == (int(want_pairs), int(want_correct))
    return grad


@golden_cases("pairwise_ranking_prompt")
def test_golden_prompt(case, precision):
    given_, want, dtype = case["inputs"], case["outputs"], precision.dtype
    score = torch.tensor(given_["scores"], dtype=dtype)
    rank, cu = torch.tensor(given_["ranks"]), offsets([score.numel()])
    for reduction in REDUCTIONS:
        loss, grad, num_pairs, _ = loss_and_gradient(score, rank, cu, reduction)
        literal = reduction == "prompt_mean_allpairs" and "loss_literal_eq1_divisor" in want
        kind = "{}_literal_eq1_divisor" if literal else "{}"
        assert num_pairs == want["n_pairs"]
        for key, ours in (("loss", loss), ("grad", grad)):
            expected = torch.tensor(want[kind.format(key)], dtype=dtype)
            precision.assert_close(ours, expected, f"{case['name']} {key}")


@golden_cases("pairwise_ranking_batch")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_golden_batch(case, reduction, precision):
    given_, want, dtype = case["inputs"], case["outputs"], precision.dtype
    score, rank = ragged(given_["scores"], dtype), ragged(given_["ranks"], torch.int64)
    cu = offsets([len(row) for row in given_["scores"]])
    assert cu.tolist() == given_.get("cu_seqlens", cu.tolist())
    loss, grad, num_pairs, num_correct = loss_and_gradient(score, rank, cu, reduction)
    precision.assert_close(loss, torch.tensor(want[reduction]["loss"], dtype=dtype), "loss")
    precision.assert_close(grad, ragged(want[reduction]["grad"], dtype), "grad")
    assert num_pairs == want["n_valid_pairs"]
    assert num_correct / num_pairs == pytest.approx(want["accuracy_strict"])
    count = {
        "prompt_mean_valid": want["n_prompts_with_pairs"],
        "prompt_mean_allpairs": cu.numel() - 1,
        "pair_mean": want["n_valid_pairs"],
    }
    assert ranking_denominator(rank, cu, reduction) == count[reduction]


@golden_cases("rank_to_pairs")
def test_golden_pairs(case):
    pairs = _winners(torch.tensor(case["inputs"]["ranks"])).nonzero().tolist()
    assert sorted(pairs) == sorted(case["outputs"]["pairs"])


@RAGGED
@given(
    lengths=st.lists(st.integers(0, 9), max_size=8),
    levels=st.integers(1, 9),
    scale=st.sampled_from([1e-4, 1.0, 100.0, 1e4]),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 1000),
)
def test_ragged_against_float64(cpu_class, lengths, levels, scale, reduction, seed):
    """Empty prompts, one answer, K = 2 to 9, ties up to all tied, scores up to 1e4."""
    torch.manual_seed(seed)
    n, cu = sum(lengths), offsets(lengths)
    score, rank = torch.randn(n) * scale, torch.randint(levels, (n,))
    grad = check_against_float64(score, rank, cu, reduction)
    assert grad.isfinite().all()
    for prompt in grad.split(lengths):
        assert abs(float(prompt.sum())) <= 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_prompts_of_many_shapes_in_one_batch(cpu_class, reduction, dtype):
    """Few and many answers, scores near and far apart, in each other's neighbourhood: all ways through the loops."""
    lengths = [9, 9, 2, 9, 12, 0, 1, 9, 4, 10, 9, 3] * 12  # more than a block of prompts
    n, cu = sum(lengths), offsets(lengths)
    spread = torch.tensor([1.0, 7.0, 0.0, 40.0, 1e-20])[torch.arange(len(lengths)) % 5]
    score = torch.randn(n) * spread.repeat_interleave(torch.tensor(lengths))
    rank = torch.randint(6, (n,)).to(dtype)
    check_against_float64(score, rank, cu, reduction)


@pytest.mark.parametrize("margin", [-16.0, -8.1, -8.0, 0.0, 1e-30, 7.9, 8.0, 8.1, 15.9, 16.1])
def test_one_pair_keeps_its_digits(cpu_class, margin):
    """Within 4 units in float32's last place of the float64 loss, also where almost nothing is left of it."""
    score = torch.tensor([0.0, margin / 2, -margin / 2])
    rank = torch.tensor([5.0, 1.0, 5.0])
    loss, grad, num_pairs, num_correct = loss_and_gradient(score, rank, offsets([3]), "pair_mean")
    wide = score.double().requires_grad_()
    truth, _, want_correct = ranking_loss_reference(wide, rank, offsets([3]), "pair_mean")
    truth.backward()
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=5e-7, atol=0)
    torch.testing.assert_close(grad.double(), wide.grad, rtol=5e-7, atol=0)
    assert (num_pairs, num_correct) == (2, int(want_correct))


@pytest.mark.parametrize("scale", [1e-6, 0.3, 3.0])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("answers", range(2, 10))
@pytest.mark.parametrize("order", ["any", "best first", "best first without ties"])
def test_few_answers_keep_their_digits(cpu_class, order, answers, right, scale):
    """Three units: of a loss at its own size, of a gradient at the size of its terms before they cancel.

    `right`: all scores in the order of the ranks and far apart, so that little is left of the loss.
    """
    prompts = 40  # whole groups of lanes and a part of one
    score = torch.randn(prompts, answers) * scale + 3 * torch.randn(prompts, 1)
    rank = torch.rand(prompts, answers).argsort(1)
    if order != "best first without ties":
        rank[::5] //= 2
    if order != "any":
        rank = rank.sort(1)[0]
    if right:
        score = score - rank * (7.5 / answers)
    wide = score.double()
    pair = rank[:, :, None] < rank[:, None, :]
    margin = (wide[:, :, None] - wide[:, None, :]).where(pair, torch.inf)
    truth, wrong = -torch.nn.functional.logsigmoid(margin).sum((1, 2)), torch.sigmoid(-margin)
    cu = offsets([answers] * prompts)
    together, grad, num_pairs, num_correct = loss_and_gradient(
        score.flatten(), rank.flatten().float(), cu, "pair_mean", denominator=1.0
    )
    torch.testing.assert_close(together.double(), truth.sum(), rtol=2e-7, atol=0)
    terms = wrong.sum(1) + wrong.sum(2)
    error = (grad.view(prompts, answers) - wrong.sum(1) + wrong.sum(2)).abs()
    assert (error <= 3.6e-7 * terms).all()
    assert (num_pairs, num_correct) == (int(pair.sum()), int((pair & (margin > 0)).sum()))
    for s, q, want in zip(score, rank, truth, strict=True):
        loss, *_ = ranking_loss(s, q, offsets([answers]), "pair_mean", denominator=1.0)
        torch.testing.assert_close(loss.double(), want, rtol=3.6e-7, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("answers", [2, 4, 5, 9])
def test_best_first_with_some_far_apart(cpu_class, answers, reduction):
    """Groups that are neither sorted nor masked, in which single prompts are left to the loop that takes any."""
    prompts = 150  # more than two blocks, and a part of a group
    spread = torch.tensor([1.0, 0.0, 3.0, 40.0, 1.0, 1e5, 1e-20])[torch.arange(prompts) % 7]
    score = (torch.randn(prompts, answers) * spread[:, None] + 500 * torch.randn(prompts, 1)).flatten()
    rank, cu = torch.arange(answers).float().repeat(prompts), offsets([answers] * prompts)
    grad = check_against_float64(score, rank, cu, reduction)
    score[17 * answers] = float("nan")
    loss, broken, *_ = loss_and_gradient(score, rank, cu, reduction)
    assert loss.isnan() and broken[17 * answers : 18 * answers].isnan().all()
    broken[17 * answers : 18 * answers] = grad[17 * answers : 18 * answers]
    assert torch.equal(broken, grad)


def test_no_neighbour_changes_a_bit(cpu_class):
    """Alone, in even groups of lanes and among prompts of other sizes, with ties, far apart or of one answer."""
    lengths = [5] * 72 + [5, 9, 2, 5, 12, 0, 1, 5, 4, 5] * 4
    n, cu = sum(lengths), offsets(lengths)
    score, rank = torch.randn(n), torch.cat([torch.randperm(k) for k in lengths])
    for s in range(32):  # best first
        rank[cu[s] : cu[s + 1]] = torch.arange(5)
    score[cu[5] : cu[6]] *= 100
    score[cu[62] : cu[63]] *= 100
    for s in (40, 67):
        rank[cu[s] : cu[s + 1]] //= 2
    rank[cu[41] : cu[42]] = torch.tensor([0, 0, 1, 2, 2])
    together = loss_and_gradient(score, rank.float(), cu, "prompt_mean_valid", denominator=7.0)[1]
    for s, k in enumerate(lengths):
        own = slice(int(cu[s]), int(cu[s + 1]))
        for ranks in (rank[own].float(), rank[own].double() * 1e-12 + 1):
            alone = loss_and_gradient(
                score[own], ranks, offsets([k]), "prompt_mean_valid", denominator=7.0
            )[1]
            assert torch.equal(together[own], alone), f"prompt {s}"


def test_a_constant_added_to_a_prompt_changes_nothing(cpu_class):
    score, rank, cu = torch.randn(8), torch.tensor([3, 1, 2, 2, 1, 5, 4, 3]), offsets([4, 4])
    shift = torch.tensor([4.0] * 4 + [-8.0] * 4)
    score = (score * 64).round() / 64  # so that the sums are exact
    for reduction in REDUCTIONS:
        before = loss_and_gradient(score, rank, cu, reduction)
        after = loss_and_gradient(score + shift, rank, cu, reduction)
        wide = score.double().requires_grad_()
        truth, *_ = ranking_loss_reference(wide, rank, cu, reduction)
        truth.backward()
        assert_close(after[0], before[0], truth, "loss")
        assert_close(after[1], before[1], wide.grad, "grad")


def test_two_answers_are_bradley_terry(precision):
    score = torch.randn(6, dtype=precision.dtype)
    loss, *_ = ranking_loss(score, torch.tensor([1, 2, 2, 1, 1, 2]), offsets([2, 2, 2]))
    margin = torch.stack([score[0] - score[1], score[3] - score[2], score[4] - score[5]])
    precision.assert_close(loss, -torch.nn.functional.logsigmoid(margin).mean(), "loss")


@pytest.mark.parametrize("answers", [2, 3, 9, 40, 301])
def test_equal_scores_have_the_closed_form(answers, precision):
    score = torch.full((answers,), 0.7, dtype=precision.dtype)
    loss, grad, num_pairs, num_correct = loss_and_gradient(
        score, torch.arange(answers), offsets([answers]), "prompt_mean_valid"
    )
    k = torch.arange(answers, dtype=precision.dtype)
    precision.assert_close(loss, score.new_tensor(math.log(2)), "loss")
    expected = -(answers - 1 - 2 * k) / (answers * (answers - 1))
    precision.assert_close(grad, expected, "grad")
    assert (num_pairs, num_correct) == (answers * (answers - 1) // 2, 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_pairs_loss_and_gradient_are_zero(reduction, precision):
    for lengths in ([], [0], [1, 0], [3]):
        score = torch.randn(sum(lengths), dtype=precision.dtype)
        rank, cu = torch.ones(sum(lengths)), offsets(lengths)
        loss, grad, num_pairs, num_correct = loss_and_gradient(score, rank, cu, reduction)
        assert float(loss) == 0 and grad.eq(0).all() and (num_pairs, num_correct) == (0, 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_prompt_with_one_answer_does_not_count(reduction, precision):
    score = torch.randn(5, dtype=precision.dtype)
    with_it = ranking_loss(score, torch.tensor([1, 2, 2, 1, 1]), offsets([1, 0, 4]), reduction)
    without = ranking_loss(score[1:], torch.tensor([2, 2, 1, 1]), offsets([4]), reduction)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up_to_the_batch(reduction, precision):
    score = torch.randn(14, dtype=precision.dtype)
    rank = torch.tensor([1, 2, 2, 4, 1, 1, 3, 2, 1, 4, 5, 0, 1, 2])
    cu, cuts = offsets([4, 2, 5, 3]), [(0, 6, [4, 2]), (6, 14, [5, 3])]
    loss, grad, _, _ = loss_and_gradient(score, rank, cu, reduction)
    parts = [(score[a:b], rank[a:b], offsets(lengths)) for a, b, lengths in cuts]
    count = sum(ranking_denominator(r, c, reduction) for _, r, c in parts)
    halves = [loss_and_gradient(*p, reduction, denominator=count) for p in parts]
    precision.assert_close(halves[0][0] + halves[1][0], loss, "loss")
    precision.assert_close(torch.cat([halves[0][1], halves[1][1]]), grad, "grad")


def test_ranks_of_any_type_order_alike(precision):
    score, cu = torch.randn(4, dtype=precision.dtype), offsets([4])
    ranks = torch.tensor([2, -1, 5, 2])
    want = loss_and_gradient(score, ranks, cu, "pair_mean")
    for other in (ranks.float(), ranks.double() * 1e-9 + 1, ranks.to(torch.int8), ranks * 10**12):
        got = loss_and_gradient(score, other, cu, "pair_mean")
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_a_nan_score_is_not_hidden(precision):
    score = torch.tensor([1.0, float("nan"), 0.0], dtype=precision.dtype)
    assert ranking_loss(score, torch.arange(3), offsets([3]))[0].isnan()


def test_gradcheck_of_the_definition():
    score = torch.randn(9, dtype=torch.float64, requires_grad=True)
    rank, cu = torch.tensor([1, 2, 2, 3, 1, 1, 2, 1, 3]), offsets([4, 0, 2, 3])
    for reduction in REDUCTIONS:
        loss = lambda s, r=reduction: ranking_loss(s, rank, cu, r)[0]  # noqa: E731
        assert torch.autograd.gradcheck(loss, score)


def test_opcheck():
    score = torch.randn(5, requires_grad=True)
    rank = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    for denominator in (None, 3.0):
        arguments = (score, rank, offsets([3, 0, 2]), 0, denominator)
        torch.library.opcheck(torch.ops.engine.ranking_loss.default, arguments)


def test_a_second_gradient_is_refused():
    score = torch.randn(3, requires_grad=True)
    loss, *_ = ranking_loss(score, torch.arange(3), offsets([3]))
    with pytest.raises(RuntimeError, match="op 'ranking_loss': a gradient of its gradient"):
        torch.autograd.grad(loss, score, create_graph=True)


def test_threads_and_neighbours_do_not_change_a_bit(threads):
    torch.manual_seed(3)
    score, rank, cu = torch.randn(500 * 6), torch.randint(5, (500 * 6,)), offsets([6] * 500)
    together = loss_and_gradient(score, rank, cu, "prompt_mean_valid")
    torch.set_num_threads(1)
    again = loss_and_gradient(score, rank, cu, "prompt_mean_valid")
    count = ranking_denominator(rank, cu)
    alone = loss_and_gradient(
        score[60:66], rank[60:66], offsets([6]), "prompt_mean_valid", denominator=count
    )
    assert torch.equal(together[0], again[0]) and torch.equal(together[1], again[1])
    assert torch.equal(together[1][60:66], alone[1])


def test_the_bad_rank_of_a_large_batch_is_named(cpu_class):
    for at, bad in ((2995, "-inf"), (1000, "-inf"), (1004, "inf"), (1002, "nan")):
        rank = torch.arange(3000.0)
        rank[at] = float(bad)
        for given_ in (rank, rank.double()):
            with pytest.raises(ValueError, match=rf"rank\[{at}\]: got {bad}, want a finite number"):
                ranking_loss(
                    torch.zeros(3000), given_, offsets([5] * 600), "pair_mean", denominator=1.0
                )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ranks_that_are_not_finite(bad):
    with pytest.raises(ValueError, match=r"rank\[1\]: got (nan|inf), want a finite number"):
        ranking_loss(torch.zeros(3), torch.tensor([1.0, bad, 2.0]), offsets([3]))


def test_what_does_not_fit_is_named():
    score, rank, cu = torch.zeros(3), torch.arange(3), offsets([3])
    with pytest.raises(ValueError, match="reduction: got 'mean', want one of prompt_mean_valid"):
        ranking_loss(score, rank, cu, "mean")
    with pytest.raises(ValueError, match=r"score: got shape \(2,\), want \(3,\)"):
        ranking_loss(score[:2], rank, cu)
    for bad in (offsets([2]), offsets([4]), offsets([3])[:0], offsets([3]).long()):
        with pytest.raises(ValueError, match=r"cu(\[-1\])?: got"):
            ranking_loss(score, rank, bad)
    with pytest.raises(ValueError, match=r"cu\[-1\]: got 2, want the number of answers 3"):
        ranking_loss(score, rank, offsets([2]))
    with pytest.raises(ValueError, match="cu: got .*never decrease"):
        ranking_loss(score, rank, offsets([2, 1])[[0, 1, 0, 2]])
    with pytest.raises(ValueError, match="denominator: got 0.0, want the .positive. count"):
        ranking_loss(score, rank, cu, denominator=0.0)
