"""ppo_policy_loss against the golden numbers, the float64 definition, and the cases of the clip."""

import pytest
import torch
from compare import assert_close
from golden_cases import golden_cases, packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.ppo_policy_loss import (
    ppo_policy_loss,
    ppo_policy_loss_and_sums,
    ppo_policy_loss_reference,
    ppo_policy_stats,
)

STATS = {
    "clipfrac": "clipfrac",
    "approxkl": "approx_kl_k2",
    "approxkl_k1": "approx_kl_k1",
    "approxkl_k3": "approx_kl_k3",
    "ratio_mean": "ratio_mean",
}


@golden_cases("ppo_policy_loss")
def test_golden(case, precision):
    given_, want, dtype = case["inputs"], case["outputs"], precision.dtype
    mask, name = given_["mask"], case["name"]
    new, old, advantage = (
        packed(given_[k], mask, dtype) for k in ("logprob_new", "logprob_old", "advantages")
    )
    new.requires_grad_()
    loss, stats = ppo_policy_loss(new, old, advantage, given_["eps"])
    loss.backward()
    precision.assert_close(loss, torch.tensor(want["loss"], dtype=dtype), name)
    for ours, theirs in STATS.items():
        if theirs in want:
            precision.assert_close(stats[ours], torch.tensor(want[theirs], dtype=dtype), name)
    if "grad_logprob_new" in want:
        precision.assert_close(new.grad, packed(want["grad_logprob_new"], mask, dtype), name)
    if "ratio" in want and new.numel():
        ratio = packed(want["ratio"], mask, torch.float64)
        precision.assert_close(stats["ratio_var"], ratio.var(correction=0).to(dtype), "ratio_var")
    if "grad_active" in want:  # a ratio of exactly 0.8 or 1.2 is decided by rounding
        off = torch.tensor([abs(r - 0.8) > 1e-9 and abs(r - 1.2) > 1e-9 for r in given_["ratio"]])
        assert torch.equal(new.grad.ne(0)[off], torch.tensor(want["grad_active"]).bool()[off])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(
    n=st.integers(0, 200),
    clip=st.sampled_from([0.0, 0.1, 0.2, 1.0]),
    scale=st.sampled_from([1e-4, 0.3, 5.0]),
    clamp=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 1000),
)
def test_any_size_against_float64(cpu_class, n, clip, scale, clamp, seed):
    torch.manual_seed(seed)
    old, advantage = -torch.rand(n), torch.randn(n)
    new = (old + torch.randn(n) * scale).requires_grad_()
    # Away from the edges of the clip, where rounding decides.
    ratio = (new.detach().double() - old.double()).exp()
    advantage[((ratio - 1).abs() - clip).abs() < 1e-5] = 0
    wide = new.detach().double().requires_grad_()
    plain = new.detach().clone().requires_grad_()
    loss, sums = ppo_policy_loss_and_sums(new, old, advantage, clip, log_ratio_clamp=clamp)
    constants = (old.double(), advantage.double())
    truth, want = ppo_policy_loss_reference(wide, *constants, clip, None, clamp)
    reference, _ = ppo_policy_loss_reference(plain, old, advantage, clip, None, clamp)
    loss.backward()
    truth.backward()
    reference.backward()
    weight = max(float(ratio.max()), 1.0) if n else 1.0  # the sum may cancel, its terms do not
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6 * weight)
    assert_close(new.grad, plain.grad, wide.grad, "grad")
    torch.testing.assert_close(sums, want, rtol=1e-5, atol=1e-5 * max(n, 1) * min(scale, 1.0))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.7, 1.0, 1.3])
def test_where_the_gradient_flows(precision, advantage, ratio):
    flows = (advantage, ratio) not in [(1.0, 1.3), (-1.0, 0.7)]
    logprob = torch.tensor([ratio], dtype=precision.dtype).log().requires_grad_()
    zero = torch.zeros_like(logprob)
    loss, stats = ppo_policy_loss(logprob, zero, zero + advantage)
    loss.backward()
    expected = -advantage * ratio if flows else 0.0
    precision.assert_close(logprob.grad, logprob.new_tensor([expected]), "grad")
    assert bool(stats["clipfrac"]) == (not flows)


def test_equal_policies_have_ratio_one_exactly(precision):
    logprob = (-10 * torch.rand(37, dtype=precision.dtype)).requires_grad_()
    advantage = torch.randn_like(logprob)
    loss, stats = ppo_policy_loss(logprob, logprob.detach(), advantage)
    loss.backward()
    assert stats["ratio_mean"] == 1 and all(stats[k] == 0 for k in stats if k != "ratio_mean")
    precision.assert_close(logprob.grad, -advantage / 37, "grad")


def test_overflow_of_a_clipped_ratio_stays_out_of_the_gradient(precision):
    logprob = torch.tensor([2000.0, 0.0], dtype=precision.dtype, requires_grad=True)
    loss, _ = ppo_policy_loss(logprob, torch.zeros_like(logprob), torch.ones_like(logprob))
    loss.backward()
    precision.assert_close(loss, logprob.new_tensor(-1.1), "loss")
    assert logprob.grad.tolist() == [0.0, -0.5]


def test_the_clamp_bounds_a_bad_token(precision):
    logprob = torch.tensor([50.0, 0.1], dtype=precision.dtype, requires_grad=True)
    zero = torch.zeros_like(logprob)
    loss, stats = ppo_policy_loss(logprob, zero, zero - 1, log_ratio_clamp=2.0)
    loss.backward()
    e = torch.tensor([2.0, 0.1], dtype=torch.float64).exp().to(precision.dtype)
    precision.assert_close(loss, e.mean(), "loss")
    precision.assert_close(logprob.grad, torch.stack([0 * e[0], e[1] / 2]), "grad")
    precision.assert_close(stats["approxkl"], logprob.new_tensor((4 + 0.01) / 4), "approxkl")


def test_micro_batches_add_up_to_the_batch(precision):
    old, change, advantage = (torch.randn(50, dtype=precision.dtype) for _ in range(3))
    new = (old + 0.3 * change).requires_grad_()
    loss, stats = ppo_policy_loss(new, old, advantage)
    (whole,) = torch.autograd.grad(loss, new)
    losses, sums = zip(
        *[
            ppo_policy_loss_and_sums(new[p], old[p], advantage[p], denominator=torch.tensor(50))
            for p in (slice(0, 7), slice(7, 7), slice(7, 50))
        ],
        strict=True,
    )
    (parts,) = torch.autograd.grad(sum(losses), new)
    precision.assert_close(sum(losses), loss.detach(), "loss")
    precision.assert_close(parts, whole, "grad")
    for name, x in ppo_policy_stats(sum(sums)).items():
        torch.testing.assert_close(x, stats[name], rtol=1e-9, atol=1e-12)


def test_without_tokens(precision):
    empty = torch.empty(0, dtype=precision.dtype, requires_grad=True)
    loss, stats = ppo_policy_loss(empty, empty.detach(), empty.detach())
    loss.backward()
    assert loss.detach() == 0 and empty.grad.shape == (0,) and all(x == 0 for x in stats.values())


def test_nan_is_not_hidden(precision):
    zero = torch.zeros(1, dtype=precision.dtype)
    nan = zero + float("nan")
    for arguments in ((nan, zero, zero + 1), (zero, nan, zero + 1), (zero, zero, nan)):
        logprob = arguments[0].clone().requires_grad_()
        loss, _ = ppo_policy_loss(logprob, *arguments[1:])
        loss.backward()
        assert loss.isnan() and logprob.grad.isnan().all()


def test_gradcheck_of_the_definition():
    old, advantage = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    new = (old + 0.5 * torch.randn(9, dtype=torch.float64)).requires_grad_()
    for clamp in (None, 0.3):
        call = lambda x, c=clamp: ppo_policy_loss(x, old, advantage, log_ratio_clamp=c)[0]  # noqa: E731
        assert torch.autograd.gradcheck(call, new)


def test_opcheck():
    logprob = torch.randn(7, requires_grad=True)
    arguments = (logprob, torch.randn(7), torch.randn(7), 0.2, 7.0, float("inf"))
    torch.library.opcheck(torch.ops.engine.ppo_policy_loss.default, arguments)


def test_threads_do_not_change_a_bit(threads):
    torch.manual_seed(2)
    new, old, advantage = torch.randn(3, 50_003)
    together = ppo_policy_loss_and_sums(new, old, advantage)
    torch.set_num_threads(1)
    alone = ppo_policy_loss_and_sums(new, old, advantage)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_what_does_not_fit_is_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"advantage: got shape \(2,\), want \(3,\)"):
        ppo_policy_loss(x, x, x[:2])
    with pytest.raises(ValueError, match="clip: got -0.1, want a finite number >= 0"):
        ppo_policy_loss(x, x, x, -0.1)
    with pytest.raises(ValueError, match="denominator: got nan, want"):
        ppo_policy_loss(x, x, x, denominator=float("nan"))
    with pytest.raises(ValueError, match="log_ratio_clamp: got 0, want a number > 0"):
        ppo_policy_loss(x, x, x, log_ratio_clamp=0)
