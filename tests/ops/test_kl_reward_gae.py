"""kl_reward_gae: the two ops in one, to the bit on the CPU."""

import pytest
import torch
from golden_cases import golden_cases, mask_offsets, offsets, packed

from engine.kernels.gae import gae
from engine.kernels.kl_reward import ESTIMATORS, kl_reward
from engine.kernels.kl_reward_gae import kl_reward_gae, kl_reward_gae_reference


def inputs(lengths):
    n, s = sum(lengths), len(lengths)
    return *(torch.randn(k) for k in (n, n, s, n)), offsets(lengths)


@golden_cases("ppo_ptx_full_step")
def test_golden(case, precision):
    given, want, dtype = case["inputs"], case["outputs"], precision.dtype
    rows = (want["logprob_old"], want["logprob_ref"], given["values_old"])
    logprob, ref, value = (packed(x, given["mask"], dtype) for x in rows)
    score = torch.tensor(given["raw_scores"], dtype=dtype) + given["rm_bias"]
    results = kl_reward_gae(
        logprob, ref, score, value, mask_offsets(given["mask"]), given["beta"], given["gamma"], given["lam"]
    )  # fmt: skip
    names = ("advantages", "returns", "rewards", "kl_per_token")
    for name, ours in zip(names, results, strict=True):
        precision.assert_close(ours, packed(want[name], given["mask"], dtype), name)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [3, 0, 1, 37, 0]])
def test_it_is_the_two_ops_to_the_bit(cpu_class, estimator, lengths):
    logprob, ref, score, value, cu = inputs(lengths)
    for bootstrap in (None, torch.randn(len(lengths))):
        ours = kl_reward_gae(logprob, ref, score, value, cu, 0.3, 0.9, 0.8, bootstrap, estimator)
        reward, kl = kl_reward(logprob, ref, score, cu, 0.3, estimator)
        want = (*gae(reward, value, cu, 0.9, 0.8, bootstrap), reward, kl)
        assert all(map(torch.equal, ours, want))


def test_the_definition_is_that_of_the_two(cpu_class):
    given = inputs([3, 0, 1, 7])
    wide = [x.double() if x.is_floating_point() else x for x in given]
    truth = kl_reward_gae_reference(*wide, 0.3, bootstrap=torch.ones(4, dtype=torch.float64))
    exact = kl_reward_gae(*wide, 0.3, bootstrap=torch.ones(4, dtype=torch.float64))
    ours = kl_reward_gae(*given, 0.3, bootstrap=torch.ones(4))
    assert all(map(torch.equal, exact, truth))
    for o, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(o.double(), t, rtol=1e-5, atol=1e-5)


def test_opcheck():
    options = (torch.randn(4), 0.1, 0.9, 0.8, 2)
    torch.library.opcheck(torch.ops.engine.kl_reward_gae.default, (*inputs([3, 0, 1, 7]), *options))


def test_a_gradient_is_refused():
    logprob, ref, score, value, cu = inputs([4])
    value.requires_grad_()
    with pytest.raises(ValueError, match=r"value: got a tensor that needs .*want value.detach\(\)"):
        kl_reward_gae(logprob, ref, score, value, cu, 0.1)
    with torch.no_grad():
        advantage, *_ = kl_reward_gae(logprob, ref, score, value, cu, 0.1)
    assert not advantage.requires_grad


def test_what_does_not_fit_is_named():
    logprob, ref, score, value, cu = inputs([1, 3])
    with pytest.raises(ValueError, match=r"logprob: got shape \(3,\), want \(4,\)"):
        kl_reward_gae(logprob[:3], ref, score, value, cu, 0.1)
    with pytest.raises(ValueError, match=r"bootstrap: got shape \(4,\), want \(2,\)"):
        kl_reward_gae(logprob, ref, score, value, cu, 0.1, bootstrap=value)
    with pytest.raises(
        ValueError, match="ref_logprob: got dtype torch.float64, want torch.float32"
    ):
        kl_reward_gae(logprob, ref.double(), score, value, cu, 0.1)
    with pytest.raises(ValueError, match="estimator: got 'k4', want one of k1, k2, k3"):
        kl_reward_gae(logprob, ref, score, value, cu, 0.1, estimator="k4")
    with pytest.raises(ValueError, match="cu: got"):
        kl_reward_gae(logprob, ref, score, value, offsets([1, 2]), 0.1)
