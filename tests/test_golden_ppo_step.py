"""One PPO-ptx step from golden logits to golden losses, gradients and the optimizer's step, through the public ops."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.kernels.adamw import adamw_step, bias_corrections, grad_norm

PRECISIONS = {"float64": (torch.float64, 1e-10, 1e-12), "float32": (torch.float32, 2e-5, 2e-6)}
POLICY_STATS = {
    "clipfrac": "clipfrac",
    "approxkl": "approx_kl_k2",
    "approxkl_k1": "approx_kl_k1",
    "approxkl_k3": "approx_kl_k3",
    "ratio_mean": "ratio_mean",
}
LR, BETAS, EPS = (
    0.5,
    (0.9, 0.95),
    0.1,
)  # an eps of the gradients' size: a step shows theirs, not only their signs


@pytest.fixture
def case(golden):
    (case,) = golden["ppo_ptx_full_step"]
    return case


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return request.param


@dataclass(frozen=True)
class Golden:
    """The case in one precision on one device: its inputs packed, and results to compare with."""

    given: dict[str, Any]
    want: dict[str, Any]
    precision: str
    device: Any

    def tensor(self, values: Any, kind: torch.dtype | None = None) -> Tensor:
        return torch.tensor(values, dtype=kind or PRECISIONS[self.precision][0], device=self.device)

    def packed(self, name: str, mask: str = "mask", kind: torch.dtype | None = None) -> Tensor:
        return ops.pack(self.tensor(self.given[name], kind), self.tensor(self.given[mask]))[0]

    def tokens(self, name: str, mask: str = "mask") -> Tensor:
        return self.packed(name, mask, torch.int64)

    @property
    def offsets(self) -> Tensor:  # (B+1,) int32
        mask = self.tensor(self.given["mask"])
        return ops.pack(mask, mask)[1]

    def close(
        self, ours: Tensor, want: Any, name: str, mask: str = "mask", scale: float = 1.0
    ) -> None:
        """`want` is a number, or padded as `mask` is; tolerances are those that golden.json states."""
        dtype, rtol, atol = PRECISIONS[self.precision]
        expected = self.tensor(want)
        if expected.dim():
            expected = ops.pack(expected, self.tensor(self.given[mask]))[0]
        torch.testing.assert_close(
            ours.detach().to(dtype),
            expected,
            rtol=rtol,
            atol=scale * atol,
            msg=f"{name}: {{}}".format,
        )


def logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of (N, V) logits, through the op with an identity as weight."""
    weight = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return ops.linear_logprob(logits, weight, labels)


def check_logprobs(golden: Golden, new_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New, old and the reference's."""
    actions, want = golden.tokens("actions"), golden.want
    old, _ = logprobs(golden.packed("logits_old"), actions)
    ref, _ = logprobs(golden.packed("logits_ref"), actions)
    new, entropy = logprobs(new_logits, actions)
    for ours, name in ((old, "logprob_old"), (ref, "logprob_ref"), (new, "logprob_new")):
        golden.close(ours, want[name], name)
    golden.close(entropy, want["entropy_new"], "entropy")
    golden.close(entropy.mean(), want["entropy_new_masked_mean"], "mean entropy")
    return new, old, ref


def check_advantages(golden: Golden, old: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns."""
    given, want, cu = golden.given, golden.want, golden.offsets
    score = golden.tensor(given["raw_scores"]) + given["rm_bias"]
    reward, kl = ops.kl_reward(old, ref, score, cu, given["beta"])
    golden.close(kl, want["kl_per_token"], "kl")
    golden.close(reward, want["rewards"], "rewards")
    values = golden.packed("values_old")
    advantage, returns = ops.gae(reward, values, cu, given["gamma"], given["lam"])
    golden.close(advantage, want["advantages"], "advantages")
    golden.close(returns, want["returns"], "returns")
    whitened = ops.whiten(advantage)
    golden.close(whitened, want["advantages_whitened"], "advantages_whitened")
    return whitened, returns


def check_policy_loss(golden: Golden, new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    want = golden.want["policy"]
    new.retain_grad()
    loss, stats = ops.ppo_policy_loss(new, old, advantage, golden.given["clip"])
    golden.close((new - old).exp(), want["ratio"], "ratio")
    golden.close(loss, want["loss"], "policy loss")
    for name, theirs in POLICY_STATS.items():
        golden.close(stats[name], want[theirs], name)
    return loss


def check_value_loss(golden: Golden, value: Tensor, returns: Tensor) -> Tensor:
    want, clip = golden.want["value"], golden.given["value_clip"]
    loss, stats = ops.ppo_value_loss(value, golden.packed("values_old"), returns, clip)
    golden.close(loss, want["loss"], "value loss")
    golden.close(stats["clipfrac"], want["clipfrac"], "value clipfrac")
    return loss


def check_steps(golden: Golden, leaves: dict[str, tuple[Tensor, Any, str]]) -> None:
    """The norm of each part's gradient, and Adam's first step, w - lr g / (|g| + eps), by golden gradients."""
    dtype = PRECISIONS[golden.precision][0]
    for name, (leaf, gradient, mask) in leaves.items():
        wide = golden.tensor(gradient, torch.float64)
        wide = ops.pack(wide, golden.tensor(golden.given[mask]))[0]
        golden.close(grad_norm([leaf.grad]), float(wide.norm()), f"norm of {name}")
        state = [
            leaf.detach().clone(),
            *(torch.zeros_like(leaf, requires_grad=False) for _ in range(2)),
        ]
        corrections = bias_corrections(*BETAS, 1)
        adamw_step(state[0], leaf.grad, *state[1:], None, None, LR, *BETAS, EPS, 0.0, *corrections)
        moved = LR * wide / (wide.abs() + EPS)
        _, rtol, atol = PRECISIONS[golden.precision]
        close = {"rtol": 10 * rtol, "atol": atol, "msg": f"step of {name}: {{}}".format}
        torch.testing.assert_close(leaf.detach() - state[0], moved.to(dtype), **close)


def check_full_step(case: dict[str, Any], precision: str, device: Any = "cpu") -> None:
    golden = Golden(case["inputs"], case["outputs"], precision, device)
    want, coefficient = golden.want, golden.given["ptx_coef"]
    new_logits, value = (
        golden.packed(name).requires_grad_() for name in ("logits_new", "values_new")
    )
    ptx_logits = golden.packed("ptx_logits", "ptx_mask").requires_grad_()

    new, old, ref = check_logprobs(golden, new_logits)
    advantage, returns = check_advantages(golden, old, ref)
    policy_loss = check_policy_loss(golden, new, old, advantage)
    value_loss = check_value_loss(golden, value, returns)
    ptx_loss = -logprobs(ptx_logits, golden.tokens("ptx_labels", "ptx_mask"))[0].mean()
    total = policy_loss + coefficient * ptx_loss
    golden.close(ptx_loss, want["ptx_loss"], "ptx loss")
    golden.close(total, want["policy_model_total_loss"], "total loss")

    total.backward()
    value_loss.backward()
    golden.close(new.grad, want["policy"]["grad_logprob_new"], "grad_logprob_new")
    golden.close(new_logits.grad, want["grad_logits_new"], "grad_logits_new")
    golden.close(value.grad, want["value"]["grad_v_new"], "grad_v_new")
    golden.close(
        ptx_logits.grad, want["grad_ptx_logits"], "grad_ptx_logits", "ptx_mask", coefficient
    )
    leaves = {
        "policy": (new_logits, want["grad_logits_new"], "mask"),
        "value": (value, want["value"]["grad_v_new"], "mask"),
        "ptx": (ptx_logits, want["grad_ptx_logits"], "ptx_mask"),
    }
    check_steps(golden, leaves)


def test_full_step(case, precision):
    check_full_step(case, precision)


def test_full_step_on_every_class(case, cpu_class):
    check_full_step(case, "float32")


def test_reported_objectives(case):
    """Means over the answers that have tokens: the empty one is left out of score and KL."""
    given, want = case["inputs"], case["outputs"]
    mask = torch.tensor(given["mask"])
    old, cu = ops.pack(torch.tensor(want["logprob_old"], dtype=torch.float64), mask)
    ref, _ = ops.pack(torch.tensor(want["logprob_ref"], dtype=torch.float64), mask)
    score = torch.tensor(given["raw_scores"], dtype=torch.float64) + given["rm_bias"]
    reward, kl = ops.kl_reward(old, ref, score, cu, given["beta"])
    answered = cu.diff() > 0
    per_answer = {
        "objective_kl": ops.unpack(kl, cu).sum(1),
        "objective_score": score,
        "rlhf_reward": ops.unpack(reward, cu).sum(1),
        "sequence_entropy_proxy": -ops.unpack(old, cu).sum(1),
    }
    for name, x in per_answer.items():
        assert float(x[answered].mean()) == pytest.approx(want[name], rel=1e-10), name
