"""One PPO-ptx step from golden logits to golden losses and gradients, through the public ops."""

import pytest
import torch

from engine import ops


@pytest.fixture
def case(golden):
    (case,) = golden["ppo_ptx_full_step"]
    return case


PRECISIONS = {"float64": (torch.float64, 1e-10, 1e-12), "float32": (torch.float32, 2e-5, 2e-6)}


@pytest.fixture(params=PRECISIONS.values(), ids=PRECISIONS.keys())
def precision(request):
    return request.param


def logprobs(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of (N, V) logits, through the op with an identity as weight."""
    weight = torch.eye(logits.shape[1], dtype=logits.dtype)
    return ops.linear_logprob(logits, weight, labels)


def test_full_step(case, precision):
    dtype, rtol, atol = precision
    given, want = case["inputs"], case["outputs"]
    mask = torch.tensor(given["mask"])
    real = mask.bool()

    def pack(name, kind=dtype):
        return ops.pack(torch.tensor(given[name], dtype=kind), mask)[0]

    def close(ours, theirs, name):
        expected = torch.as_tensor(theirs, dtype=dtype)
        if expected.shape[:2] == mask.shape:
            expected = expected[real]
        torch.testing.assert_close(
            ours.detach().to(dtype), expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}"
        )

    actions, cu = ops.pack(torch.tensor(given["actions"]), mask)
    new_logits = pack("logits_new").requires_grad_()
    value = pack("values_new").requires_grad_()
    old, _ = logprobs(pack("logits_old"), actions)
    ref, _ = logprobs(pack("logits_ref"), actions)
    new, entropy = logprobs(new_logits, actions)
    close(old, want["logprob_old"], "logprob_old")
    close(ref, want["logprob_ref"], "logprob_ref")
    close(new, want["logprob_new"], "logprob_new")
    close(entropy.mean(), want["entropy_new_masked_mean"], "entropy")

    score = torch.tensor(given["raw_scores"], dtype=dtype) + given["rm_bias"]
    reward, kl = ops.kl_reward(old, ref, score, cu, given["beta"])
    close(kl, want["kl_per_token"], "kl")
    close(reward, want["rewards"], "rewards")
    advantage, returns = ops.gae(reward, pack("values_old"), cu, given["gamma"], given["lam"])
    close(advantage, want["advantages"], "advantages")
    close(returns, want["returns"], "returns")
    whitened = ops.whiten(advantage)
    close(whitened, want["advantages_whitened"], "advantages_whitened")

    policy_loss, stats = ops.ppo_policy_loss(new, old, whitened, given["clip"])
    old_value, value_clip = pack("values_old"), given["value_clip"]
    value_loss, value_stats = ops.ppo_value_loss(value, old_value, returns, value_clip)
    close(policy_loss, want["policy"]["loss"], "policy loss")
    close(stats["clipfrac"], want["policy"]["clipfrac"], "clipfrac")
    close(value_loss, want["value"]["loss"], "value loss")
    close(value_stats["clipfrac"], want["value"]["clipfrac"], "value clipfrac")

    ptx_mask = torch.tensor(given["ptx_mask"])
    ptx_logits, _ = ops.pack(torch.tensor(given["ptx_logits"], dtype=dtype), ptx_mask)
    ptx_logits.requires_grad_()
    ptx_labels, _ = ops.pack(torch.tensor(given["ptx_labels"]), ptx_mask)
    ptx_loss = -logprobs(ptx_logits, ptx_labels)[0].mean()
    total = policy_loss + given["ptx_coef"] * ptx_loss
    close(ptx_loss, want["ptx_loss"], "ptx loss")
    close(total, want["policy_model_total_loss"], "total loss")

    total.backward()
    value_loss.backward()
    close(new_logits.grad, want["grad_logits_new"], "grad_logits_new")
    close(value.grad, want["value"]["grad_v_new"], "grad_v_new")
    expected = torch.tensor(want["grad_ptx_logits"], dtype=dtype)[ptx_mask.bool()]
    torch.testing.assert_close(ptx_logits.grad, expected, rtol=rtol, atol=given["ptx_coef"] * atol)


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
