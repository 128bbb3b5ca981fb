"""kl_reward against the golden numbers, the float64 definition, and Eq. 2 of InstructGPT."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from compare import assert_close
from golden_cases import golden_cases, live_slots, mask_offsets, offsets, packed, ragged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.kl_reward import ESTIMATORS, SCORE_AT, kl_reward, kl_reward_reference


@golden_cases("kl_estimators")
def test_golden_estimators(case, precision):
    given_, want = case["inputs"], case["outputs"]
    if "logp_minus_ref" in given_:
        logprob = torch.tensor(given_["logp_minus_ref"], dtype=precision.dtype)
        ref = torch.zeros_like(logprob)
    else:
        names = ("logp_policy", "logp_ref")
        logprob, ref = (torch.tensor(want[k], dtype=precision.dtype) for k in names)
    n = logprob.numel()
    for estimator in ESTIMATORS:
        score = logprob.new_zeros(1)
        reward, kl = kl_reward(logprob, ref, score, offsets([n]), 0.5, estimator)
        expected = torch.tensor(want[estimator], dtype=precision.dtype)
        precision.assert_close(kl, expected, estimator)
        precision.assert_close(reward, -0.5 * expected, estimator)
        if f"E_{estimator}" in want:
            mean = (logprob.exp() * kl).sum()
            expected = torch.tensor(want[f"E_{estimator}"], dtype=precision.dtype)
            precision.assert_close(mean, expected, f"E_{estimator}")


@golden_cases("kl_penalised_reward")
def test_golden_rewards(case, precision):
    given_, want, dtype = case["inputs"], case["outputs"], precision.dtype
    mask = live_slots(case)
    token = [[t < length for t in range(5)] for length in given_["lengths"]]
    logprob = packed(given_["logprob_old"], mask, dtype)
    ref = packed(given_["logprob_ref"], mask, dtype)
    ref = torch.where(packed(token, mask, torch.bool), ref, logprob)
    score, cu = torch.tensor(given_["scores"], dtype=dtype), mask_offsets(mask)
    estimator = given_.get("estimator", "k1")
    reward, kl = kl_reward(logprob, ref, score, cu, given_["beta"], estimator)
    precision.assert_close(reward, packed(want["rewards"], mask, dtype), case["name"])
    if "kl" in want:
        precision.assert_close(kl, packed(want["kl"], mask, dtype), case["name"])
        for s, total in enumerate(want["reward_sum_per_seq"]):
            segment = slice(cu[s], cu[s + 1])
            precision.assert_close(reward[segment].sum(), torch.tensor(total, dtype=dtype), "sum")
            total = torch.tensor(want["kl_sum_per_seq"][s], dtype=dtype)
            precision.assert_close(kl[segment].sum(), total, "kl sum")


@golden_cases("kl_penalised_reward")
def test_eos_plus_one_pays_the_slot_after_the_tokens(case, precision):
    """The rows of TRL's case that do not fill the width, with nonsense in the slot's log-probs."""
    given_, want, dtype = case["inputs"], case["outputs"], precision.dtype
    if case["name"] != "eos_plus_one_placement_TRL":
        return
    rows = [b for b, length in enumerate(given_["lengths"]) if length < 5]
    lengths = [given_["lengths"][b] for b in rows]
    nonsense = [float("nan")]
    logprob, ref = (
        ragged([given_[k][b][:n] + nonsense for b, n in zip(rows, lengths, strict=True)], dtype)
        for k in ("logprob_old", "logprob_ref")
    )
    score = torch.tensor([given_["scores"][b] for b in rows], dtype=dtype)
    cu = offsets([n + 1 for n in lengths])
    reward, kl = kl_reward(logprob, ref, score, cu, given_["beta"], "k1", "eos_plus_one")
    expected = [want["rewards"][b][: n + 1] for b, n in zip(rows, lengths, strict=True)]
    precision.assert_close(reward, ragged(expected, dtype), case["name"])
    assert (kl[cu[1:].long() - 1] == 0).all()


def random_inputs(lengths: list[int], scale: float) -> tuple[torch.Tensor, ...]:
    n = sum(lengths)
    return torch.randn(n) * scale, torch.randn(n) * scale, torch.randn(len(lengths))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=9),
    estimator=st.sampled_from(ESTIMATORS),
    score_at=st.sampled_from(SCORE_AT),
    scale=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 10.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_ragged_against_float64(cpu_class, lengths, estimator, score_at, scale, seed):
    torch.manual_seed(seed)
    logprob, ref, score = random_inputs(lengths, scale)
    # Away from 88, where e^x overflows in float32 and beta e^x, 50 times smaller, does not.
    ref = logprob + torch.where((ref.abs() > 80) & (ref.abs() < 100), 0.0, ref)
    inputs = [x.requires_grad_() for x in (logprob, ref, score)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    settings_ = (offsets(lengths), 0.02, estimator, score_at)
    ours = kl_reward(*inputs, *settings_)
    plain = kl_reward_reference(*[x.detach() for x in inputs], *settings_)
    exact = kl_reward_reference(*wide, *settings_)
    overflow = scale > 10 and estimator == "k3"  # float32 overflows where float64 may not
    truth = [t.detach().float().double() if overflow else t.detach() for t in exact]
    for name, o, r, t in zip(("reward", "kl"), ours, plain, truth, strict=True):
        assert_close(o, r, t, name)
    if overflow or not sum(lengths):
        return
    weights = torch.randn(2, sum(lengths))
    sum((o * w).sum() for o, w in zip(ours, weights, strict=True)).backward()
    sum((t * w).sum() for t, w in zip(exact, weights.double(), strict=True)).backward()
    for name, x, t in zip(("logprob", "ref_logprob", "score"), inputs, wide, strict=True):
        scale_ = max(float(t.grad.abs().max()), 1.0) if t.grad.numel() else 1.0
        message = f"gradient of {name}: {{}}".format
        torch.testing.assert_close(
            x.grad.double(), t.grad, rtol=1e-5, atol=1e-6 * scale_, msg=message
        )


def test_k3_keeps_its_digits_near_zero_and_across_the_series(precision):
    d = torch.cat([torch.logspace(-7, 1, 400), -torch.logspace(-7, 1, 400)]).to(precision.dtype)
    zero = torch.zeros_like(d)
    _, kl = kl_reward(d, zero, zero[:1], offsets([d.numel()]), 1.0, "k3")
    with localcontext(prec=50):
        exact = [float((-x).exp() - 1 + x) for x in map(Decimal, d.tolist())]
    truth = torch.tensor(exact, dtype=torch.float64)
    rtol = 3e-14 if precision.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(kl.double(), truth, rtol=rtol, atol=0)


def test_k3_far_from_zero_has_a_gradient(precision):
    logprob = torch.tensor([1e38, 12345.678, -60.0], dtype=precision.dtype, requires_grad=True)
    zero = torch.zeros(3, dtype=precision.dtype)
    _, kl = kl_reward(logprob, zero, zero[:1], offsets([3]), 1.0, "k3")
    kl.sum().backward()
    e = math.exp(60)
    precision.assert_close(kl, zero.new_tensor([1e38, 12344.678, e - 61]), "kl")
    precision.assert_close(logprob.grad, zero.new_tensor([1.0, 1.0, 1 - e]), "grad")


def test_k1_rewards_add_up_to_the_objective(cpu_class):
    lengths = [4, 0, 1, 9]
    logprob, ref, score = random_inputs(lengths, 1.0)
    reward, _ = kl_reward(logprob, ref, score, offsets(lengths), 0.3)
    segments = zip(reward.split(lengths), (logprob - ref).split(lengths), score, strict=True)
    for r, ratio, paid in segments:
        expected = paid - 0.3 * ratio.sum() if r.numel() else torch.zeros(())
        torch.testing.assert_close(r.sum(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("score_at", SCORE_AT)
def test_gradcheck_of_the_definition(estimator, score_at):
    inputs = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (7, 7, 3)]
    call = lambda lp, ref, s: kl_reward(lp, ref, s, offsets([3, 0, 4]), 0.7, estimator, score_at)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


def test_a_slot_of_nonsense_has_no_gradient(cpu_class):
    logprob = torch.tensor([-1.0, float("nan"), -2.0, float("inf")], requires_grad=True)
    ref = torch.tensor([-1.5, 0.0, -2.5, 1.0])
    reward, kl = kl_reward(logprob, ref, torch.ones(2), offsets([2, 2]), 0.1, "k3", "eos_plus_one")
    (reward.sum() + kl.sum()).backward()
    assert logprob.grad.isfinite().all() and logprob.grad[[1, 3]].eq(0).all()
    assert logprob.grad[[0, 2]].ne(0).all()


def test_opcheck():
    inputs = [torch.randn(n, requires_grad=True) for n in (11, 11, 4)]
    arguments = (*inputs, offsets([3, 0, 1, 7]), 0.1, 2, True)
    torch.library.opcheck(torch.ops.engine.kl_reward.default, arguments)


def test_threads_do_not_change_a_bit(threads):
    torch.manual_seed(5)
    logprob, ref, score = random_inputs([50_001], 1.0)
    together = kl_reward(logprob, ref, score, offsets([50_001]), 0.1, "k3")
    torch.set_num_threads(1)
    alone = kl_reward(logprob, ref, score, offsets([50_001]), 0.1, "k3")
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("backend_dtype", [torch.float32, torch.float64])
def test_what_does_not_fit_is_named(backend_dtype):
    x, cu = torch.zeros(4, dtype=backend_dtype), offsets([1, 3])
    with pytest.raises(ValueError, match=r"ref_logprob: got shape \(3,\), want \(4,\)"):
        kl_reward(x, x[:3], x[:2], cu, 0.1)
    with pytest.raises(ValueError, match=r"score: got shape \(3,\), want \(2,\)"):
        kl_reward(x, x, x[:3], cu, 0.1)
    with pytest.raises(ValueError, match="estimator: got 'k4', want one of k1, k2, k3"):
        kl_reward(x, x, x[:2], cu, 0.1, "k4")
    with pytest.raises(ValueError, match="score_at: got 'bos', want one of eos, eos_plus_one"):
        kl_reward(x, x, x[:2], cu, 0.1, "k1", "bos")
