"""gae against the golden numbers, the float64 definition, and closed forms."""

import pytest
import torch
from compare import assert_close
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.gae import gae, gae_reference

DTYPES = [(torch.float64, 1e-10, 1e-12), (torch.float32, 2e-5, 2e-6)]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def packed(rows: list[list[float]], mask: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(
        [x for row, m in zip(rows, mask, strict=True) for x, keep in zip(row, m, strict=True) if keep], dtype=dtype
    )


@pytest.mark.parametrize("dtype,rtol,atol", DTYPES)
def test_golden(golden, dtype, rtol, atol):
    for case in golden["gae"]:
        given_, want = case["inputs"], case["outputs"]
        mask = given_["mask"]
        cu = offsets([sum(m) for m in mask])
        arguments = [packed(given_[name], mask, dtype) for name in ("rewards", "values")]
        advantage, returns = gae(*arguments, cu, given_["gamma"], given_["lam"])
        for name, ours in (("advantages", advantage), ("returns", returns)):
            torch.testing.assert_close(ours, packed(want[name], mask, dtype), rtol=rtol, atol=atol, msg=case["name"])


@given(lengths=st.lists(st.integers(0, 70), max_size=9), gamma=st.floats(0, 1), lam=st.floats(0, 1),
       seed=st.integers(0, 1000), boot=st.booleans())
def test_ragged_against_float64(lengths, gamma, lam, seed, boot):
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


def test_gradients_against_the_definition():
    cu = offsets([3, 0, 1, 7])
    inputs = [torch.randn(n, requires_grad=True) for n in (11, 11, 4)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    weights = torch.randn(2, 11)
    ours = gae(inputs[0], inputs[1], cu, 0.9, 0.8, inputs[2])
    truth = gae_reference(wide[0], wide[1], cu, 0.9, 0.8, wide[2])
    sum((o * w).sum() for o, w in zip(ours, weights, strict=True)).backward()
    sum((t * w).sum() for t, w in zip(truth, weights.double(), strict=True)).backward()
    for x, t in zip(inputs, wide, strict=True):
        torch.testing.assert_close(x.grad.double(), t.grad, rtol=1e-5, atol=1e-5)


def test_gradcheck_of_the_definition():
    cu = offsets([2, 0, 3])
    inputs = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (5, 5, 3)]
    assert torch.autograd.gradcheck(lambda r, v, b: gae(r, v, cu, 0.97, 0.9, b), inputs)


def test_opcheck():
    cu = offsets([3, 0, 1, 7])
    reward, value = torch.randn(11, requires_grad=True), torch.randn(11, requires_grad=True)
    torch.library.opcheck(torch.ops.engine.gae.default, (reward, value, cu, torch.zeros(4), 0.99, 0.95))


def test_without_discount_is_the_suffix_sum():
    reward, value = torch.randn(6), torch.randn(6)
    advantage, returns = gae(reward, value, offsets([6]), 1.0, 1.0)
    torch.testing.assert_close(returns, reward.flip(0).cumsum(0).flip(0))
    torch.testing.assert_close(advantage, returns - value)


@pytest.mark.parametrize("cu", [[0, 5], [1, 4], [0, 3, 2, 4]])
def test_offsets_that_do_not_fit(cu):
    with pytest.raises(ValueError, match="cu: got .*want"):
        gae(torch.zeros(4), torch.zeros(4), torch.tensor(cu, dtype=torch.int32))
