"""The law of sampling: filters, their log-probs, the draw, and what PPO refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.errors import ConfigError
from engine.generate.sampling import Sampling, check_ppo_law, draw, filtered_law

LOGITS = torch.tensor([[2.0, -1.0, 2.0, 0.5, -math.inf, 1.0, 0.0]])


def kept(settings):
    return torch.isfinite(filtered_law(LOGITS, settings))[0].nonzero().flatten().tolist()


def test_top_k_keeps_the_largest_and_a_tie_goes_to_the_lower_id():
    assert kept(Sampling(top_k=1)) == [0]
    assert kept(Sampling(top_k=2)) == [0, 2]
    assert kept(Sampling(top_k=4)) == [0, 2, 3, 5]
    assert kept(Sampling(top_k=99)) == [0, 1, 2, 3, 5, 6]  # -inf has no mass under any law


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    mass = LOGITS.double().softmax(-1)[0]
    two = float(mass[0] + mass[2])
    assert kept(Sampling(top_p=1e-9)) == [0]
    assert kept(Sampling(top_p=two - 1e-6)) == [0, 2]
    assert kept(Sampling(top_p=two + 1e-6)) == [0, 2, 5]
    assert kept(Sampling(top_p=1.0)) == [0, 1, 2, 3, 5, 6]


def test_top_p_is_taken_of_the_law_that_top_k_left():
    inner = LOGITS.double()[0, [0, 2, 5]].softmax(-1)
    assert kept(Sampling(top_k=3, top_p=float(inner[:2].sum()) - 1e-6)) == [0, 2]
    assert kept(Sampling(top_k=3, top_p=float(inner[:2].sum()) + 1e-6)) == [0, 2, 5]


def test_the_filtered_law_is_the_softmax_over_what_is_kept_at_the_temperature():
    law = filtered_law(LOGITS, Sampling(top_k=3, temperature=0.7))[0]
    want = (LOGITS.double()[0, [0, 2, 5]] / 0.7).log_softmax(-1)
    torch.testing.assert_close(law[[0, 2, 5]], want, rtol=0, atol=1e-12)
    assert law.exp().sum() == pytest.approx(1, abs=1e-12)


def test_greedy_is_all_mass_on_the_first_largest_logit():
    token, logprob, entropy = draw(
        filtered_law(LOGITS, Sampling(greedy=True)), torch.tensor([0.999], dtype=torch.float64)
    )
    assert (token.tolist(), logprob.tolist(), entropy.tolist()) == ([0], [0.0], [0.0])


def test_the_draw_is_the_inverse_cdf_and_returns_the_log_prob_and_entropy_of_the_filtered_law():
    law = torch.tensor([[0.5, 0.0, 0.25, 0.25, 0.0]], dtype=torch.float64).log()
    uniform = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    token, logprob, entropy = draw(law.expand(6, -1), uniform)
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprob.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]))
    torch.testing.assert_close(entropy, torch.full((6,), 1.5 * math.log(2)))


def test_a_sum_rounded_below_u_gives_the_last_token_with_mass():
    law = torch.full((1, 1000), 1e-3, dtype=torch.float64).log()
    law[0, 900:] = -math.inf  # not normalised: u may lie above the sum, as after rounding
    token, _, _ = draw(law, torch.tensor([0.95], dtype=torch.float64))
    assert token.item() == 899


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(temperature=0.5, top_k=5),
        Sampling(top_p=0.8),
        Sampling(temperature=2.0, top_k=6, top_p=0.9),
    ],
)
def test_draws_follow_the_filtered_law(settings):
    generator = np.random.default_rng(3)
    logits = torch.from_numpy(generator.normal(size=(1, 11))) * 2
    law = filtered_law(logits, settings)
    count = 20_000
    token, _, _ = draw(law.expand(count, -1), torch.from_numpy(generator.random(count)))
    seen = torch.bincount(token, minlength=11).double()
    expected = law[0].exp() * count
    assert (seen[expected == 0] == 0).all()
    live = expected > 0
    chi2 = ((seen - expected)[live] ** 2 / expected[live]).sum().item()
    freedom = int(live.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"temperature": 0.0}, "greedy=True"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
    ],
)
def test_settings_out_of_range_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**changes)


def test_ppo_refuses_filters_and_says_why_but_takes_a_temperature():
    check_ppo_law(Sampling(temperature=0.7))
    check_ppo_law(Sampling(top_p=1.0))
    for settings, name in [
        (Sampling(top_k=50), "top_k=50"),
        (Sampling(top_p=0.9), "top_p=0.9"),
        (Sampling(greedy=True), "greedy=True"),
    ]:
        with pytest.raises(ConfigError, match=f"PPO cannot use {name}.*ratio"):
            check_ppo_law(settings)
