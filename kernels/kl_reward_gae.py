"""kl_reward and gae in one: what PPO makes of its rollouts, read once and written once.

    reward_t    = -beta * kl_t + score_s * [t is the last token of segment s]
    advantage_t = delta_t + gamma * lam * advantage_{t+1},   delta_t = reward_t + gamma * value_{t+1} - value_t
    returns_t   = advantage_t + value_t

The equations, the estimators of kl and the bootstrap are those of kl_reward.py (score_at="eos") and gae.py, whose
C++ kernels run on the CPU, one after the other. On a GPU one kernel does both: apart, the reward would be written and
read again, and both are a launch each. No gradient: PPO's advantages are constants.
"""

import torch
from torch import Tensor

from ._backend import LIBRARY, choose, define, kernel
from ._check import check_offsets, check_vector
from .gae import gae_reference
from .kl_reward import ESTIMATORS, kl_reward_reference

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def kl_reward_gae_reference(
    logprob: Tensor,  # (N,)
    ref_logprob: Tensor,  # (N,)
    score: Tensor,  # (S,)
    value: Tensor,  # (N,)
    cu: Tensor,  # (S+1,) int32, segment s is cu[s]:cu[s+1]
    beta: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,  # (S,)
    estimator: str = "k1",
) -> Four:  # advantage (N,), returns (N,), reward (N,), kl (N,)
    """The definition: of both ops, one after the other."""
    reward, kl = kl_reward_reference(logprob, ref_logprob, score, cu, beta, estimator)
    return *gae_reference(reward, value, cu, gamma, lam, bootstrap), reward, kl


def kl_reward_gae(
    logprob: Tensor,  # (N,)
    ref_logprob: Tensor,  # (N,)
    score: Tensor,  # (S,)
    value: Tensor,  # (N,)
    cu: Tensor,  # (S+1,) int32
    beta: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,  # (S,)
    estimator: str = "k1",
) -> Four:  # advantage (N,), returns (N,), reward (N,), kl (N,)
    """The rewards of `kl_reward` and the advantages of `gae` on them, to the bit on the CPU.

    Raises ValueError on shapes, offsets and names that do not fit, and on a tensor that needs a gradient.
    Sources: InstructGPT Eq. 2 and C.4; Schulman et al. 2016, eq. 16.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: got {estimator!r}, want one of {', '.join(ESTIMATORS)}")
    check_offsets("cu", cu, value.numel())
    given = {"logprob": logprob, "ref_logprob": ref_logprob, "value": value, "score": score}
    if bootstrap is not None:
        given["bootstrap"] = bootstrap
    for name, x in given.items():
        per_segment = name in ("score", "bootstrap")
        check_vector(name, x, cu.numel() - 1 if per_segment else value.numel(), value.dtype)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got a tensor that needs a gradient, want {name}.detach(): rewards and advantages are"
                " constants; kl_reward and gae, apart, have gradients"
            )
    if choose("kl_reward_gae", *given.values()) == "reference":
        return kl_reward_gae_reference(
            logprob, ref_logprob, score, value, cu, beta, gamma, lam, bootstrap, estimator
        )
    if bootstrap is None:
        bootstrap = value.new_zeros(cu.numel() - 1)
    tensors = [x.contiguous() for x in (logprob, ref_logprob, score, value, cu, bootstrap)]
    return kernel("kl_reward_gae")(*tensors, beta, gamma, lam, ESTIMATORS.index(estimator))


def _on_cpu(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    value: Tensor,
    cu: Tensor,
    bootstrap: Tensor,
    beta: float,
    gamma: float,
    lam: float,
    estimator: int,
) -> Four:
    reward, kl = torch.ops.engine.kl_reward(logprob, ref_logprob, score, cu, beta, estimator, False)
    return *torch.ops.engine.gae(reward, value, cu, bootstrap, gamma, lam), reward, kl


define(
    "kl_reward_gae(Tensor logprob, Tensor ref_logprob, Tensor score, Tensor value, Tensor cu, Tensor bootstrap,"
    " float beta, float gamma, float lam, int estimator) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logprob, ref_logprob, score, value, cu, bootstrap, beta, gamma, lam, estimator: (
        torch.empty_like(value),
        torch.empty_like(value),
        torch.empty_like(value),
        torch.empty_like(value),
    ),
)
LIBRARY.impl("kl_reward_gae", _on_cpu, "CPU")
