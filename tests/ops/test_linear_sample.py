"""linear_sample: the inverse of the distribution function, and the bits of linear_logprob."""

import pytest
import torch
from gradients import equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.linear import PackedWeight, pack_weight
from engine.kernels.linear_logprob import linear_logits, linear_logprob
from engine.kernels.linear_sample import linear_sample

STORAGES = [torch.float32, torch.bfloat16]


def uniform(rows: int) -> Tensor:
    return torch.rand(rows, dtype=torch.float64)


def assert_inverts(token: Tensor, u: Tensor, p: Tensor) -> None:
    """sum_{j < token} p_j <= u < sum_{j <= token} p_j, up to the rounding of float32 logits."""
    cumulated = torch.nn.functional.pad(p.cumsum(-1), (1, 0))
    low = cumulated.gather(-1, token[:, None]).squeeze(-1)
    high = cumulated.gather(-1, token[:, None] + 1).squeeze(-1)
    assert (low <= u + 1e-4).all() and (u < high + 1e-4).all()


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 700), st.integers(1, 40)),
    storage=st.sampled_from(STORAGES),
    temperature=st.floats(0.4, 2),
    with_bias=st.booleans(),
)
def test_inverts_the_distribution_function(cpu_class, shape, storage, temperature, with_bias):
    n, v, h = shape
    hidden, bias, u = torch.randn(n, h).bfloat16().float(), torch.randn(v), uniform(n)
    weight = pack_weight(torch.randn(v, h), storage)
    bias = bias if with_bias else None
    token, logprob, entropy = linear_sample(hidden, weight, u, temperature, bias)
    exact = linear_logits(hidden.double(), weight.dense.double(), temperature, bias)
    assert_inverts(token, u, exact.softmax(-1))
    assert equal((logprob, entropy), linear_logprob(hidden, weight, token, temperature, bias))


def test_the_definition_and_the_kernel_draw_the_same(cpu_class):
    hidden, weight, u = torch.randn(200, 6), torch.randn(600, 6), uniform(200)
    ours = linear_sample(hidden, weight, u, 0.8)
    truth = linear_sample(hidden.double(), weight.double(), u, 0.8)
    assert (ours[0] == truth[0]).float().mean() > 0.99  # u may fall on a boundary's rounding
    same = ours[0] == truth[0]
    torch.testing.assert_close(ours[1][same].double(), truth[1][same], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2].double(), truth[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_knows_nothing_of_the_others(cpu_class, storage):
    hidden, weight, u = (
        torch.randn(70, 96),
        pack_weight(torch.randn(1025, 96), storage),
        uniform(70),
    )
    before, wholes = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        whole = linear_sample(hidden, weight, u, 0.9)
        wholes.append(whole)
        assert equal(whole[1:], linear_logprob(hidden, weight, whole[0], 0.9))
        for first, rows in ((0, 1), (3, 2), (17, 16), (1, 33), (69, 1)):
            cut = slice(first, first + rows)
            part = linear_sample(hidden[cut], weight, u[cut], 0.9)
            assert equal(part, [r[cut] for r in whole]), (first, rows)
    torch.set_num_threads(before)
    assert equal(*wholes)


def distribution(logits: Tensor, rows: int) -> tuple[Tensor, PackedWeight]:
    """The same logits (V,) in every row."""
    return torch.ones(rows, 1), pack_weight(logits[:, None], torch.float32)


def test_frequencies(cpu_class):
    """Pearson's chi-square over two and a half blocks of the vocabulary; 0.1 % of seeds fail, this one does not."""
    draws, v = 40_000, 640
    logits = torch.randn(v)
    hidden, weight = distribution(logits, draws)
    token, _, _ = linear_sample(hidden, weight, uniform(draws))
    expected = logits.double().softmax(-1) * draws
    statistic = ((torch.bincount(token, minlength=v) - expected) ** 2 / expected).sum()
    assert statistic < (v - 1) + 3.1 * (2 * (v - 1)) ** 0.5


@pytest.mark.parametrize("v", [1, 5, 300, 1000])
def test_tokens_without_probability_are_never_drawn(cpu_class, v):
    logits = torch.randn(v)
    dead = torch.rand(v) < 0.7
    dead[v // 2] = False
    dead[:1], dead[-1:] = v > 1, v > 1
    if v == 1000:
        dead[256:512] = True  # a whole block
    logits[dead] = -torch.inf
    u = torch.cat([uniform(500), torch.tensor([0.0, 1 - 2.0**-53, 5e-324], dtype=torch.float64)])
    token, logprob, _ = linear_sample(*distribution(logits, len(u)), u)
    alive = (~dead).nonzero().squeeze(-1)
    assert not dead[token].any() and torch.isfinite(logprob).all()
    assert token[-3] == token[-1] == alive[0] and token[-2] == alive[-1]


def test_underflow_at_the_end(cpu_class):
    """Tokens 1e4 below the rest have probability 0 in float32: not even the largest u draws them."""
    logits = torch.cat([torch.zeros(3), torch.full((400,), -1e4)])
    u = torch.full((4,), 1 - 2.0**-53, dtype=torch.float64)
    token, logprob, entropy = linear_sample(*distribution(logits, 4), u)
    assert token.tolist() == [2] * 4
    torch.testing.assert_close(logprob, torch.full((4,), -1.0986123))
    torch.testing.assert_close(entropy, torch.full((4,), 1.0986123))


def test_low_temperature_is_the_largest_logit(cpu_class):
    hidden, weight = torch.randn(30, 8), torch.randn(500, 8)
    token, logprob, _ = linear_sample(hidden, weight, uniform(30), 1e-3)
    assert torch.equal(token, (hidden @ weight.T).argmax(-1)) and (logprob > -0.5).all()


def test_opcheck(cpu_class):
    dense = torch.randn(40, 5)
    data = torch.ops.engine.pack_weight(dense)
    arguments = (torch.randn(3, 5), dense, data, uniform(3), 0.8, torch.randn(40))
    torch.library.opcheck(torch.ops.engine.linear_sample.default, arguments)


def test_what_does_not_fit_is_named(cpu_class):
    hidden, weight = torch.zeros(2, 3), torch.zeros(7, 3)
    with pytest.raises(
        ValueError, match=r"uniform: got torch.float32 of shape \(2,\), want float64"
    ):
        linear_sample(hidden, weight, torch.zeros(2))
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"uniform: got .*, want numbers in \[0, 1\)"):
            linear_sample(hidden, weight, torch.tensor([0.5, wrong], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"hidden\[1\]: its logits are all -inf"):
        rows = torch.tensor([[1.0], [10.0]])  # the second overflows to -inf everywhere
        linear_sample(rows, torch.full((300, 1), -3e38), uniform(2))
    with pytest.raises(ValueError, match="hidden: got shape"):
        linear_sample(torch.zeros(2, 4), weight, uniform(2))
