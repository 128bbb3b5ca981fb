"""kl_reward_gae: three vectors in and four out; a score, a bootstrap value and an offset a segment beside them."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu import Case, Variation
from bench.gpu.kl_reward import FULL, SMALL, segments, tokens


def make(device: str, dtype: torch.dtype, S: int, T: int) -> tuple[Tensor, ...]:
    logprob, ref_logprob, value = tokens(device, dtype, 3, S, T)
    score, bootstrap = torch.randn(2, S, device=device).to(dtype)
    return logprob, ref_logprob, score, value, segments(device, S, T), bootstrap


def forward(estimator: int) -> Callable[..., object]:
    def run(*given: Tensor) -> object:
        from engine.kernels.triton.kl_reward_gae import kl_reward_gae

        return kl_reward_gae(*given, 0.02, 1.0, 0.95, estimator)

    return run


CASES = [
    Case(
        "kl_reward_gae",
        "forward, k1",
        make,
        forward(0),
        FULL,
        SMALL,
        bytes=lambda size, S, T: size * (7 * S * T + 2 * S) + 4 * (S + 1),
    ),
]
VARIATIONS = [
    Variation("kl_reward_gae", f"forward, k{estimator + 1}", make, forward(estimator), FULL)
    for estimator in (1, 2)
]
