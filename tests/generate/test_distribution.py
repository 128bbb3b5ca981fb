"""Many draws against the law that they should follow: Pearson's chi-square, by its p-value, at fixed seeds."""

from __future__ import annotations

import math

import pytest
import torch
from small_engines import save_tiny
from torch import Tensor

from engine.data.pack import pack_sequences
from engine.generate.cache import PageCache
from engine.generate.sampling import Sampling
from engine.generate.steps import KernelSteps, Rows
from engine.kernels._backend import kernels_usable
from engine.kernels.linear_sample import linear_sample
from engine.model import transformer
from engine.model.weights import load_policy
from engine.run import streams

DRAWS, ROWS = 100_000, 5_000  # in all, and at once
TOKEN = 77  # whose successors are drawn
# Two-sided: too good a fit is not chance either. The seeds are fixed, so this either holds or does not.
LOWEST, HIGHEST = 1e-3, 1 - 1e-3


def p_value(chi2: float, freedom: int) -> float:
    """P(chi-square of `freedom` degrees >= chi2), by the cube root that Wilson and Hilferty (1931) found nearly normal:
    good to a tenth of it from 10 degrees on; scipy is not a dependency."""
    spread = 2.0 / (9.0 * freedom)
    z = ((chi2 / freedom) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2.0))


@pytest.mark.parametrize(
    "freedom, five_percent, one_in_a_thousand",
    [(10, 18.307, 29.588), (50, 67.505, 86.661), (100, 124.342, 149.449)],  # of printed tables
)
def test_p_values_are_those_of_the_tables(freedom, five_percent, one_in_a_thousand):
    assert p_value(five_percent, freedom) == pytest.approx(0.05, abs=5e-4)
    assert p_value(one_in_a_thousand, freedom) == pytest.approx(0.001, abs=1e-4)


def assert_follow(tokens: Tensor, law: Tensor) -> None:
    """Draws (N,) against probabilities (V,); tokens that 5 draws or fewer are expected of are one class."""
    assert not (law[tokens] == 0).any(), "a token without probability was drawn"
    expected = law * len(tokens)
    seen = torch.bincount(tokens, minlength=len(law)).double()
    often = expected >= 5
    rest = [x[~often].sum().reshape(1) for x in (seen, expected)]
    keep = rest[1] >= 5  # a rest that is itself too rare says nothing
    seen, expected = (
        torch.cat([x[often], r[keep]]) for x, r in zip((seen, expected), rest, strict=True)
    )
    freedom = len(seen) - 1
    assert freedom >= 3
    p = p_value(float(((seen - expected) ** 2 / expected).sum()), freedom)
    assert LOWEST < p < HIGHEST, f"p = {p:.3g} with {freedom} degrees of freedom"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("distribution") / "llama")


def logits_after(model, prompt) -> Tensor:  # (V,) float64
    """The training forward's, of the tokens' own hidden row in float64: what transformers says too (tests/model)."""
    with torch.no_grad():
        hidden = transformer.forward(model, pack_sequences([prompt]))[-1]
    return model.head.dense.double() @ hidden.double()


def uniform(seed: int) -> list[Tensor]:
    """The sampler's own random numbers: one token of many episodes."""
    drawn = torch.from_numpy(streams.uniform(seed, "sample", range(DRAWS), [0] * DRAWS))
    return list(drawn.split(ROWS))


def steps_and_rows(model, settings) -> tuple[KernelSteps, Rows]:
    """ROWS sequences of the one token TOKEN, each with a page of its own."""
    a = model.architecture
    cache = PageCache(a.num_layers, ROWS, a.num_kv_heads, a.head_dim, model.kv_dtype)
    table = torch.arange(ROWS, dtype=torch.int32)[:, None]
    zeros = torch.zeros(ROWS, dtype=torch.int64)
    return KernelSteps(model, cache, settings, 16), Rows(zeros + TOKEN, zeros, table)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_draws_from_the_softmax(folder, dtype, temperature, cpu_class):
    model, prompt = load_policy(folder, dtype), [5, 9, 200, 31]
    with torch.no_grad():
        last = transformer.forward(model, pack_sequences([prompt]))[-1:]
    rows = last.expand(ROWS, -1)
    tokens = [linear_sample(rows, model.head, u, temperature)[0] for u in uniform(1)]
    assert_follow(torch.cat(tokens), (logits_after(model, prompt) / temperature).softmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_step_draws_from_the_softmax(folder, dtype, temperature, cpu_class):
    model = load_policy(folder, dtype)
    steps, rows = steps_and_rows(model, Sampling(1, temperature))
    drawn = [steps.decode(rows, u) for u in uniform(2)]
    tokens, logprobs, entropies = (
        torch.cat([getattr(d, name) for d in drawn]) for name in ("tokens", "logprobs", "entropies")
    )
    law = (logits_after(model, [TOKEN]) / temperature).softmax(-1)
    assert_follow(tokens, law)
    assert_reports(tokens, logprobs, entropies, law)


def assert_reports(tokens: Tensor, logprobs: Tensor, entropies: Tensor, law: Tensor) -> None:
    """The returned log-prob and entropy are those of the law."""
    entropy = torch.special.entr(law).sum()
    want = law[tokens].log()
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        entropies.double(), entropy.expand(len(tokens)), rtol=1e-5, atol=1e-5
    )


def filtered(z: Tensor, settings: Sampling) -> Tensor:  # (V,) -> (V,)
    """Tokens from the likeliest down: at most top_k, and none once the mass of those before reaches top_p."""
    order = (-z).argsort().tolist()[: settings.top_k]
    law, total = (z / settings.temperature)[order].softmax(-1), 0.0
    kept = []
    for token, mass in zip(order, law.tolist(), strict=True):
        if settings.top_p is not None and total >= settings.top_p:
            break
        kept.append(token)
        total += mass
    p = torch.zeros_like(z)
    p[kept] = (z / settings.temperature)[kept].softmax(-1)
    return p


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(1, 1.7, top_k=12),
        Sampling(1, 0.7, top_p=0.9),
        Sampling(1, 2.0, top_k=40, top_p=0.6),
    ],
    ids=["top_k", "top_p", "both"],
)
def test_a_filtered_step_draws_from_its_law_and_reports_it(folder, settings):
    if not kernels_usable():
        pytest.skip("a step of the C++ kernels")
    model = load_policy(folder, "float32")
    steps, rows = steps_and_rows(model, settings)
    drawn = [steps.decode(rows, u) for u in uniform(3)[:6]]
    tokens, logprobs, entropies = (
        torch.cat([getattr(d, name) for d in drawn]) for name in ("tokens", "logprobs", "entropies")
    )
    law = filtered(logits_after(model, [TOKEN]), settings)
    assert 4 <= int((law > 0).sum()) < 100
    assert torch.equal(tokens.unique(), law.nonzero().squeeze(-1))
    assert_follow(tokens, law)
    assert_reports(tokens, logprobs, entropies, law)


def test_a_greedy_step_takes_the_largest_logit_for_certain(folder):
    if not kernels_usable():
        pytest.skip("a step of the C++ kernels")
    model = load_policy(folder, "float32")
    steps, rows = steps_and_rows(model, Sampling(1, 1.3, greedy=True))
    drawn = steps.decode(rows, uniform(4)[0])
    assert drawn.tokens.unique().tolist() == [int(logits_after(model, [TOKEN]).argmax())]
    assert (drawn.logprobs == 0).all() and (drawn.entropies == 0).all()
