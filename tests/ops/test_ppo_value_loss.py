"""ppo_value_loss against the golden numbers, the float64 definition, and ties of its maximum."""

import pytest
import torch
from compare import assert_close
from golden_cases import golden_cases, packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.ppo_value_loss import (
    ppo_value_loss,
    ppo_value_loss_and_sums,
    ppo_value_loss_reference,
    ppo_value_stats,
)

NAMES = ("values_new", "values_old", "returns")


@golden_cases("ppo_value_loss")
def test_golden(case, precision):
    given_, want, mask = case["inputs"], case["outputs"], case["inputs"]["mask"]
    new, old, returns = (packed(given_[k], mask, precision.dtype) for k in NAMES)
    new.requires_grad_()
    loss, stats = ppo_value_loss(new, old, returns, given_["eps"])
    loss.backward()
    for key, ours in (("loss", loss), ("clipfrac", stats["clipfrac"])):
        precision.assert_close(ours, torch.tensor(want[key], dtype=precision.dtype), key)
    expected = packed(want["grad_v_new"], mask, precision.dtype)
    precision.assert_close(new.grad, expected, case["name"])


@golden_cases("ppo_value_loss")
def test_without_clip_it_is_half_the_mean_square(case, precision):
    given_, mask = case["inputs"], case["inputs"]["mask"]
    new, old, returns = (packed(given_[k], mask, precision.dtype) for k in NAMES)
    new.requires_grad_()
    loss, stats = ppo_value_loss(new, old, returns, None)
    loss.backward()
    n = max(new.numel(), 1)
    want = (new.detach() - returns).square().sum() / 2 / n
    if case["name"] == "ragged_clip0.2":
        assert float(want) == pytest.approx(1.2809059417142128, rel=1e-6)
    precision.assert_close(loss, want, "loss")
    precision.assert_close(new.grad, (new.detach() - returns) / n, "grad")
    assert stats["clipfrac"] == 0


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(
    n=st.integers(0, 200),
    clip=st.sampled_from([0.05, 0.2, 3.0, None]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_size_against_float64(cpu_class, n, clip, scale, seed):
    torch.manual_seed(seed)
    value, old, returns = torch.randn(3, n) * scale
    value = (old + value * torch.tensor([0.01, 1.0])[torch.randint(2, (n,))]).requires_grad_()
    wide = value.detach().double().requires_grad_()
    plain = value.detach().clone().requires_grad_()
    loss, sums = ppo_value_loss_and_sums(value, old, returns, clip)
    truth, _ = ppo_value_loss_reference(wide, old.double(), returns.double(), clip)
    reference, want = ppo_value_loss_reference(plain, old, returns, clip)
    loss.backward()
    truth.backward()
    reference.backward()
    assert_close(loss, reference, truth, "loss", units=8)
    assert torch.equal(sums, want)
    assert torch.equal(value.grad.eq(0), plain.grad.eq(0))
    torch.testing.assert_close(value.grad, plain.grad, rtol=1e-6, atol=0)


def test_the_value_inside_the_bounds_is_never_clipped(precision):
    """old + (value - old) is often not value: that rounding must not switch gradients off."""
    old = 0.15 * torch.rand(1000, dtype=precision.dtype)
    value = (0.001 * torch.randn_like(old)).requires_grad_()
    returns = torch.zeros_like(old)
    loss, stats = ppo_value_loss(value, old, returns)
    loss.backward()
    assert stats["clipfrac"] == 0 and value.grad.ne(0).all()


def test_a_tie_of_the_two_terms_keeps_the_gradient(precision):
    """value 1, bounded 0.25, returns 0.625: both errors are 0.375, exactly."""
    value = torch.tensor([1.0], dtype=precision.dtype, requires_grad=True)
    zero = torch.zeros_like(value)
    loss, stats = ppo_value_loss(value, zero, zero + 0.625, 0.25)
    loss.backward()
    assert value.grad.tolist() == [0.375] and stats["clipfrac"] == 0


def test_micro_batches_add_up_to_the_batch(precision):
    value, old, returns = torch.randn(3, 50, dtype=precision.dtype)
    value.requires_grad_()
    loss, stats = ppo_value_loss(value, old, returns)
    (whole,) = torch.autograd.grad(loss, value)
    losses, sums = zip(
        *[
            ppo_value_loss_and_sums(value[p], old[p], returns[p], denominator=50)
            for p in (slice(0, 7), slice(7, 7), slice(7, 50))
        ],
        strict=True,
    )
    (parts,) = torch.autograd.grad(sum(losses), value)
    precision.assert_close(sum(losses), loss.detach(), "loss")
    precision.assert_close(parts, whole, "grad")
    assert ppo_value_stats(sum(sums)) == stats


def test_nan_is_not_hidden(precision):
    zero = torch.zeros(1, dtype=precision.dtype)
    nan = zero + float("nan")
    for arguments in ((nan, zero, zero), (zero, zero, nan)):
        assert ppo_value_loss(*arguments)[0].isnan()


def test_gradcheck_of_the_definition():
    value, old, returns = torch.randn(3, 9, dtype=torch.float64)
    value.requires_grad_()
    for clip in (0.2, None):
        call = lambda x, c=clip: ppo_value_loss(x, old, returns, c)[0]  # noqa: E731
        assert torch.autograd.gradcheck(call, value)


def test_opcheck():
    value = torch.randn(7, requires_grad=True)
    arguments = (value, torch.randn(7), torch.randn(7), 0.2, 7.0)
    torch.library.opcheck(torch.ops.engine.ppo_value_loss.default, arguments)


def test_threads_do_not_change_a_bit(threads):
    torch.manual_seed(2)
    arguments = torch.randn(3, 50_003)
    together = ppo_value_loss_and_sums(*arguments)
    torch.set_num_threads(1)
    alone = ppo_value_loss_and_sums(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_what_does_not_fit_is_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"returns: got shape \(2,\), want \(3,\)"):
        ppo_value_loss(x, x, x[:2])
    with pytest.raises(ValueError, match="old_value: got dtype torch.float64, want torch.float32"):
        ppo_value_loss(x, x.double(), x)
    with pytest.raises(ValueError, match="clip: got -1, want a finite number >= 0, or None"):
        ppo_value_loss(x, x, x, -1)
