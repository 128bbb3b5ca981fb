"""kl_reward: C++ against the torch definition, on a large PPO batch (512 answers of 1024 tokens)."""

import pytest
import torch

from engine.kernels._backend import backend
from engine.kernels.kl_reward import kl_reward


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_kl_reward(benchmark, name, estimator):
    answers, length = 512, 1024
    logprob = torch.randn(answers * length)
    ref, score = logprob + 0.1 * torch.randn_like(logprob), torch.randn(answers)
    cu = torch.arange(0, answers * length + 1, length, dtype=torch.int32)
    with backend(name):
        benchmark(kl_reward, logprob, ref, score, cu, 0.02, estimator)
