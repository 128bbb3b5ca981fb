"""gae against the golden numbers, the float64 definition, and closed forms."""

from itertools import pairwise

import pytest
import torch
from compare import assert_close
from golden_cases import golden_cases, live_slots, mask_offsets, offsets, packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.gae import gae, gae_reference


@golden_cases("gae")
def test_golden(case, precision):
    given_, want, mask = case["inputs"], case["outputs"], live_slots(case)
    arguments = [packed(given_[name], mask, precision.dtype) for name in ("rewards", "values")]
    advantage, returns = gae(*arguments, mask_offsets(mask), given_["gamma"], given_["lam"])
    key = "advantages" if "advantages" in want else "advantages_before_whiten"
    precision.assert_close(advantage, packed(want[key], mask, precision.dtype), case["name"])
    precision.assert_close(returns, packed(want["returns"], mask, precision.dtype), case["name"])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=9),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 1000),
    boot=st.booleans(),
)
def test_ragged_against_float64(cpu_class, lengths, gamma, lam, seed, boot):
    torch.manual_seed(seed)
    cu, n = offsets(lengths), sum(lengths)
    reward, value = torch.randn(n), torch.randn(n)
    bootstrap = torch.randn(len(lengths)) if boot else None
    wide = [x.double() if x is not None else None for x in (reward, value, bootstrap)]
    truth = gae_reference(wide[0], wide[1], cu, gamma, lam, wide[2])
    plain = gae_reference(reward, value, cu, gamma, lam, bootstrap)
    ours = gae(reward, value, cu, gamma, lam, bootstrap)
    for name, o, r, t in zip(("advantage", "returns"), ours, plain, truth, strict=True):
        assert_close(o, r, t, name, units=8)


def test_what_is_not_finite_spreads_to_earlier_tokens_only(cpu_class):
    """As in the loop of the definition, wherever in a vector of tokens it stands."""
    for at in range(20):
        reward, value, cu = torch.randn(40), torch.randn(40), offsets([21, 19])
        reward[at] = float("nan")
        advantage, _ = gae(reward, value, cu, 0.9, 0.95)
        assert advantage[: at + 1].isnan().all() and advantage[at + 1 :].isfinite().all()


@pytest.mark.parametrize("lengths", [[3, 0, 1, 7], [16, 33, 8, 40]])
def test_gradients_against_the_definition(cpu_class, lengths):
    cu, total = offsets(lengths), sum(lengths)
    inputs = [torch.randn(n, requires_grad=True) for n in (total, total, 4)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    weights = torch.randn(2, total)
    ours = gae(inputs[0], inputs[1], cu, 0.9, 0.8, inputs[2])
    truth = gae_reference(wide[0], wide[1], cu, 0.9, 0.8, wide[2])
    sum((o * w).sum() for o, w in zip(ours, weights, strict=True)).backward()
    sum((t * w).sum() for t, w in zip(truth, weights.double(), strict=True)).backward()
    for x, t in zip(inputs, wide, strict=True):
        torch.testing.assert_close(x.grad.double(), t.grad, rtol=1e-5, atol=1e-5)


def test_threads_and_neighbours_do_not_change_a_bit(threads):
    lengths = [0, 40_000, 1, 25_000, 3]
    cu = offsets(lengths).tolist()
    reward, value = torch.randn(cu[-1]), torch.randn(cu[-1])
    together = gae(reward, value, offsets(lengths), 0.99, 0.95)
    for begin, end in pairwise(cu):
        alone = gae(reward[begin:end], value[begin:end], offsets([end - begin]), 0.99, 0.95)
        assert all(torch.equal(a, t[begin:end]) for a, t in zip(alone, together, strict=True))


def test_gradcheck_of_the_definition():
    cu = offsets([2, 0, 3])
    inputs = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (5, 5, 3)]
    assert torch.autograd.gradcheck(lambda r, v, b: gae(r, v, cu, 0.97, 0.9, b), inputs)


def test_opcheck():
    reward, value = torch.randn(11, requires_grad=True), torch.randn(11, requires_grad=True)
    arguments = (reward, value, offsets([3, 0, 1, 7]), torch.zeros(4), 0.99, 0.95)
    torch.library.opcheck(torch.ops.engine.gae.default, arguments)


def test_without_discount_is_the_suffix_sum():
    reward, value = torch.randn(6), torch.randn(6)
    advantage, returns = gae(reward, value, offsets([6]), 1.0, 1.0)
    torch.testing.assert_close(returns, reward.flip(0).cumsum(0).flip(0))
    torch.testing.assert_close(advantage, returns - value)


@pytest.mark.parametrize("cu", [[0, 5], [1, 4], [0, 3, 2, 4]])
def test_offsets_that_do_not_fit(cu):
    with pytest.raises(ValueError, match="cu: got .*want"):
        gae(torch.zeros(4), torch.zeros(4), torch.tensor(cu, dtype=torch.int32))
