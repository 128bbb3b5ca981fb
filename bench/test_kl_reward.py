"""kl_reward: C++ against the torch definition, on a large PPO batch (512 answers of 1024 tokens)."""

import pytest
import torch

from bench.suite import work
from engine.kernels.kl_reward import kl_reward, kl_reward_reference

RUNS = {"engine": kl_reward, "torch": kl_reward_reference}


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("name", RUNS)
def test_kl_reward(benchmark, name, estimator):
    answers, length = 512, 1024
    logprob = torch.randn(answers * length)
    ref, score = logprob + 0.1 * torch.randn_like(logprob), torch.randn(answers)
    cu = torch.arange(0, answers * length + 1, length, dtype=torch.int32)
    given = (logprob, ref, score, cu, 0.02, estimator)
    torch.testing.assert_close(RUNS["engine"](*given), RUNS["torch"](*given), rtol=1e-4, atol=1e-5)
    work(benchmark, 4 * logprob.nbytes)
    benchmark(RUNS[name], *given)
