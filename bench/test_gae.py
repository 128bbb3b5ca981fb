"""gae: C++ against the definition's loop vectorised over padded rows (what other trainers run)."""

import pytest
import torch

from bench.suite import work
from engine.kernels.gae import gae


def padded_loop(
    reward: torch.Tensor, value: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """The (B, T) loop over time of TRL and OpenRLHF."""
    last, out = torch.zeros(reward.shape[0]), []
    for t in reversed(range(reward.shape[1])):
        next_value = value[:, t + 1] if t + 1 < reward.shape[1] else 0.0
        delta = reward[:, t] + gamma * next_value - value[:, t]
        last = delta + gamma * lam * last
        out.append(last)
    return torch.stack(out[::-1], dim=1)


@pytest.mark.parametrize("name", ["engine", "padded loop"])
def test_gae(benchmark, name):
    episodes, length = 512, 1024
    reward, value = torch.randn(episodes, length), torch.randn(episodes, length)
    cu = torch.arange(0, episodes * length + 1, length, dtype=torch.int32)
    flat = reward.flatten(), value.flatten()
    torch.testing.assert_close(
        gae(*flat, cu)[0].view(episodes, length),
        padded_loop(reward, value, 1.0, 0.95),
        rtol=1e-3,
        atol=1e-3,
    )
    work(benchmark, 4 * reward.nbytes)
    if name == "engine":
        benchmark(gae, *flat, cu)
    else:
        benchmark(padded_loop, reward, value, 1.0, 0.95)
