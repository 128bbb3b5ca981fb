"""kl_reward's Triton kernels against the float64 definition."""

import math

import pytest
import torch
from guards import guarded
from launching import DEVICE, DTYPES, check_on_triton, gradients_on_triton, on_triton
from mutations import mutations
from token_ops import FLOAT32, blocks, golden, helper_mutations, offsets, on_device, ops_file

from engine.kernels._backend import backend
from engine.kernels.kl_reward import ESTIMATORS, SCORE_AT, kl_reward, kl_reward_reference
from engine.kernels.triton import _expm1
from engine.kernels.triton import kl_reward as kernels


def call(op, estimator, score_at):
    return lambda lp, ref, score, cu: torch.cat(op(lp, ref, score, cu, 0.3, estimator, score_at))


def inputs(lengths, scale=1.0):
    n = sum(lengths)
    return (
        torch.randn(n) * scale,
        torch.randn(n) * scale,
        torch.randn(len(lengths)),
        offsets(lengths),
    )


def check(lengths, estimator, score_at, dtype=torch.float32, scale=1.0):
    ours, defined = (call(op, estimator, score_at) for op in (kl_reward, kl_reward_reference))
    vectors = [x.to(dtype) if x.is_floating_point() else x for x in inputs(lengths, scale)]
    check_on_triton(ours, defined, vectors, torch.randn(2 * sum(lengths)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("score_at", SCORE_AT)
def test_against_float64(estimator, score_at, dtype):
    with blocks(16):
        check([3, 0, 1, 37, 0], estimator, score_at, dtype)


def test_more_segments_than_a_block_holds():
    with blocks(4):
        check([1, 0, 2, 1, 0, 1, 3, 1, 0], "k2", "eos")
        check([1], "k3", "eos_plus_one")


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 10.0])
def test_k3_of_any_size(scale):
    check([50], "k3", "eos", scale=scale)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_without_tokens(lengths):
    ours = call(kl_reward, "k1", "eos")
    given = [x.to(DEVICE) for x in inputs(lengths)]
    out, *gradients = gradients_on_triton(ours, given, torch.empty(0, device=DEVICE))
    assert out.shape == (0,) and gradients[2].shape == (len(lengths),) and gradients[2].eq(0).all()


@golden("kl_estimators")
def test_golden_estimators(case):
    with on_device():
        ops_file("test_kl_reward").test_golden_estimators(case, FLOAT32)


@golden("kl_penalised_reward")
def test_golden_rewards(case):
    with on_device():
        ops_file("test_kl_reward").test_golden_rewards(case, FLOAT32)
        ops_file("test_kl_reward").test_eos_plus_one_pays_the_slot_after_the_tokens(case, FLOAT32)


def test_extremes():
    """k3 keeps its digits near 0, its gradient far away, and overflows to inf only."""
    with on_device():
        theirs = ops_file("test_kl_reward")
        theirs.test_k3_keeps_its_digits_near_zero_and_across_the_series(FLOAT32)
        theirs.test_k3_far_from_zero_has_a_gradient(FLOAT32)
        theirs.test_a_slot_of_nonsense_has_no_gradient("any")
    logprob = torch.tensor([-math.inf, 1e4, -1e4, -math.inf], device=DEVICE)
    ref = torch.tensor([0.0, 0.0, 0.0, -math.inf], device=DEVICE)
    score, cu = torch.zeros(1, device=DEVICE), offsets([4])
    for estimator in ESTIMATORS:
        want = kl_reward_reference(logprob, ref, score, cu, 1.0, estimator)
        got = on_triton(kl_reward)(logprob, ref, score, cu, 1.0, estimator)
        for o, w in zip(got, want, strict=True):
            torch.testing.assert_close(o, w, equal_nan=True, rtol=1e-6, atol=0)


def test_a_paid_slot_is_rounded_once():
    """-0.3 and 1 + k / 128 in bfloat16: a sum of rounded terms would end elsewhere."""
    logprob, score = torch.ones(64), 1 + torch.arange(64) / 128
    logprob, score, zero = (x.bfloat16().to(DEVICE) for x in (logprob, score, 0 * logprob))
    reward, _ = on_triton(kl_reward)(logprob, zero, score, offsets([1] * 64), 0.3)
    assert torch.equal(reward, (score.double() - 0.3).bfloat16())


def test_cut_anywhere_and_twice_it_is_the_same():
    lp, ref, score, cu = (x.to(DEVICE) for x in inputs([5, 0, 30]))
    run = on_triton(kl_reward)
    with blocks(8):
        together, again = (run(lp, ref, score, cu, 0.3, "k3") for _ in range(2))
        alone = run(lp[5:], ref[5:], score[2:], offsets([30]), 0.3, "k3")
    assert all(map(torch.equal, together, again))
    assert all(torch.equal(x, y[5:]) for x, y in zip(alone, together, strict=True))


def test_addresses_that_are_not_aligned():
    given = [x.bfloat16() if x.is_floating_point() else x for x in inputs([5, 13])]
    run = call(kl_reward, "k2", "eos")
    with blocks(8):
        want = on_triton(run)(*(x.to(DEVICE) for x in given))
        with guarded() as guards, backend("triton"):
            assert torch.equal(run(*(guards.place(x.to(DEVICE), shift=1) for x in given)), want)


DEFECTS = {
    "the penalty is a bonus": ("n, -beta * k,", "n, beta * k,"),
    "the last token is left out": ("store_block(kl, first, n,", "store_block(kl, first, n - 1,"),
    "k1 for every kl": ("(kl, first, n, k,", "(kl, first, n, lp - ref,"),
    "half of k2": ("return d * d * 0.5", "return d * d"),
    "k3 of the other sign": ("return expm1_minus(-d)", "return expm1_minus(d)"),
    "the penalty at the end": ("r = -beta * estimate(lp - ref, ESTIMATOR) + paid_score", "r = paid_score"),
    "the slot has a penalty": (
        "r = paid_score\n        tl.store",
        "r = paid_score - beta\n        tl.store",
    ),
    "the slot has a kl": ("tl.zeros_like(r).to(kl", "(tl.zeros_like(r) + 1).to(kl"),
    "slope of k3": ("return -expm1(-d)", "return expm1(-d)"),
    "slope of k2": ("return d\n    else:\n        return -expm1", "return d * 2\n    else:\n        return -expm1"),
    "beta forgotten in the gradient": ("(gk - beta * gr)", "(gk - gr)"),
    "slope at the other sign": ("_slope(lp - ref, ESTIMATOR)", "_slope(ref - lp, ESTIMATOR)"),
    "both gradients of one sign": ("first, n, -d,", "first, n, d,"),
    "gradient of the wrong score": ("tl.store(d_score + segment, gr", "tl.store(d_score + segment, 0 * gr"),
    "gradient of the first token": ("last = end.to(tl.int64) - 1\n    gr", "last = start.to(tl.int64)\n    gr"),
    "the slot keeps its gradient": ("tl.store(d_logprob + last, zero", "tl.store(d_logprob + last, zero + 1"),
}  # fmt: skip


def check_all():
    torch.manual_seed(3)
    with blocks(8):
        for estimator in ESTIMATORS:
            check([5, 0, 7], estimator, "eos")
        check([5, 0, 7], "k3", "eos_plus_one")


test_defects_are_caught = mutations(kernels, DEFECTS)(check_all)
EXPM1_DEFECTS = {
    "a short series": ("static_range(12, 2, -1)", "static_range(6, 2, -1)"),
    "half of the series": ("x * x * 0.5 * tail", "x * x * tail"),
    "the series far away": (
        "expm1_series(x), tl.exp(x) - 1.0 - x)",
        "expm1_series(x), expm1_series(x))",
    ),
    "no series": (
        "tl.where(tl.abs(x) < 1.0, expm1_series(x), tl.exp(x) - 1.0 - x)",
        "tl.exp(x) - 1.0 - x",
    ),
    "a term forgotten": ("expm1_series(x) + x", "expm1_series(x)"),
}


def check_digits():
    torch.manual_seed(3)
    with on_device():
        ops_file("test_kl_reward").test_k3_keeps_its_digits_near_zero_and_across_the_series(FLOAT32)
    check([40], "k3", "eos")


test_defects_of_the_series_are_caught = helper_mutations(_expm1, kernels, EXPM1_DEFECTS)(
    check_digits
)


def test_without_a_defect_the_checks_pass():
    check_all()
    check_digits()
