"""The golden PPO-ptx step through the PPO stage: scores, rewards, advantages, micro-batches, both optimizers' steps.

Nothing in it calls an op: what is cut, packed, divided, accumulated and clipped is the stage's own. The answer without
tokens is left out, as the golden means over answers leave it out; its gradients are zeros.
"""

import pytest
import torch
from golden_models import context, golden_networks, padded, policy, scalar
from ops.conftest import Precision
from ops.golden_cases import GROUPS, packed

from engine.config import PPOConfig
from engine.data.prompts import Prompt
from engine.hybrid import Completion
from engine.run.device import to_device
from engine.run.ema import EMA
from engine.run.optim import Optimizer
from engine.stages.epochs import adam_settings
from engine.stages.ppo.advantages import rewards_and_advantages
from engine.stages.ppo.batch import Rollouts, on_host
from engine.stages.ppo.metrics import episode_metrics
from engine.stages.ppo.score import score
from engine.stages.ppo.update import Learner, Targets, update

(CASE,) = GROUPS["ppo_ptx_full_step"]
GIVEN, WANT = CASE["inputs"], CASE["outputs"]
ANSWERED = [b for b, length in enumerate(GIVEN["lengths"]) if length]
WIDTH = 5  # slots of a row: its four, and one for the value behind the last
LR, EPS = 0.5, 0.1  # an eps of the gradients' size: a step shows theirs, not only their signs
FLOAT32 = Precision(torch.float32, 2e-5, 2e-6)
REPORTED = {
    "loss/policy_avg": WANT["policy"]["loss"],
    "loss/value_avg": WANT["value"]["loss"],
    "loss/ptx_avg": WANT["ptx_loss"],
    "policy/clipfrac_avg": WANT["policy"]["clipfrac"],
    "policy/approxkl_avg": WANT["policy"]["approx_kl_k2"],
    "policy/approxkl_k1_avg": WANT["policy"]["approx_kl_k1"],
    "policy/approxkl_k3_avg": WANT["policy"]["approx_kl_k3"],
    "policy/entropy_avg": WANT["entropy_new_masked_mean"],
    "val/clipfrac_avg": WANT["value"]["clipfrac"],
    "val/ratio": WANT["policy"]["ratio_mean"],
    "objective/kl": WANT["objective_kl"],
    "objective/entropy": WANT["sequence_entropy_proxy"],
    "objective/rlhf_reward": WANT["rlhf_reward"],
    "objective/scores": WANT["objective_score"],
}


def slots_of(name):  # (B * WIDTH,) or (B * WIDTH, V)
    return padded(GIVEN[name], WIDTH).flatten(0, 1)


def rollouts() -> Rollouts:
    prompts = [Prompt(tuple(context(b * WIDTH)), "", None, {}, "golden") for b in ANSWERED]
    completions = []
    for prompt, b in zip(prompts, ANSWERED, strict=True):
        n = GIVEN["lengths"][b]
        logprob, entropy = (torch.tensor(WANT[k][b][:n]) for k in ("logprob_old", "entropy_new"))
        answer = tuple(GIVEN["actions"][b][:n])
        completions.append(Completion(prompt.tokens, answer, logprob, entropy, "stop", b, 0, ""))
    return Rollouts(tuple(prompts), tuple(completions), 1)


def pretraining_rows(first):
    """Their slots lie behind the policy's own."""
    pairs = zip(GIVEN["ptx_labels"], GIVEN["ptx_mask"], strict=True)
    return [
        [*context(first + i * WIDTH), *labels[: int(sum(mask))]]
        for i, (labels, mask) in enumerate(pairs)
    ]


def config(budget: int, max_grad_norm: float) -> PPOConfig:
    return PPOConfig(
        model_name_or_path="m", output_dir="o", reward_model_path="r", micro_batch_tokens=budget,
        batch_size=len(ANSWERED), num_mini_batches=1, kl_coef=GIVEN["beta"], gamma=GIVEN["gamma"],
        lam=GIVEN["lam"], cliprange=GIVEN["clip"], cliprange_value=GIVEN["value_clip"],
        ptx_coef=GIVEN["ptx_coef"], adam_epsilon=EPS, max_grad_norm=max_grad_norm,
    )  # fmt: skip


def close(ours, want, name, scale=1.0):
    """Packed tokens, or a number."""
    expected = torch.as_tensor(want, dtype=torch.float32)
    precision = Precision(torch.float32, FLOAT32.rtol, scale * FLOAT32.atol)
    precision.assert_close(torch.as_tensor(ours).cpu(), expected, name)


def golden_tokens(rows):
    return packed(rows, GIVEN["mask"], torch.float32)


def before_update(settings, device):
    """Rollouts, scores and advantages, each compared with the golden ones; and the metrics of the answers."""
    answers = rollouts()
    old, ref = (policy(slots_of(f"logits_{k}"), torch.float32, device) for k in ("old", "ref"))
    reward = torch.tensor(GIVEN["raw_scores"])[ANSWERED] + GIVEN["rm_bias"]
    value = scalar(slots_of("values_old"), device)
    given = (answers, to_device(reward, old.device), 1.0, settings.token_budget)
    scores = score(old, ref, value, *given)
    for name in ("old_logprob", "ref_logprob"):
        close(getattr(scores, name), golden_tokens(WANT["logprob_" + name[:3]]), name)
    close(scores.value, golden_tokens(GIVEN["values_old"]), "values")
    ended, cu = (to_device(x, old.device) for x in (answers.ended, answers.cu))
    rewards, advantages = rewards_and_advantages(scores, ended, cu, GIVEN["beta"], settings)
    close(rewards.reward, golden_tokens(WANT["rewards"]), "rewards")
    close(rewards.kl, golden_tokens(WANT["kl_per_token"]), "kl")
    close(advantages.returns, golden_tokens(WANT["returns"]), "returns")
    close(advantages.advantage, golden_tokens(WANT["advantages_whitened"]), "advantages")
    hosted = (on_host(x) for x in (scores, rewards, advantages))
    return answers, scores, advantages, episode_metrics(answers, *hosted, GIVEN["beta"])


def golden_gradients() -> tuple[torch.Tensor, torch.Tensor]:  # float64 (slots, V), (slots, 1)
    """Of all slots: the policy's and behind them the pretraining rows'; the value model's."""
    rows = [padded(WANT[k], WIDTH).flatten(0, 1) for k in ("grad_logits_new", "grad_ptx_logits")]
    return torch.cat(rows), padded(WANT["value"]["grad_v_new"], WIDTH).flatten()[:, None]


def check_step(model, optimizer, start, want, clip, name, scale=1.0):
    """The gradient that the optimizer took, and where it moved: w - lr g / (|g| + eps), Adam's first step."""
    state, key = optimizer.state(), model.head_name
    clipped = want * min(1.0, clip / float(want.norm())) if clip else want
    taken = state[f"exp_avg.{key}"].T / (1 - optimizer.config.betas[0])
    close(taken, clipped, f"{name}: gradient", scale)
    moved = (start - model.weights.masters[key].detach()).T
    close(moved, LR * clipped / (clipped.abs() + EPS), f"{name}: step", 10.0)


def check_iteration(budget, max_grad_norm=0.0, device="cpu"):
    settings = config(budget, max_grad_norm)
    answers, scores, advantages, metrics = before_update(settings, device)
    slots = torch.cat([slots_of("logits_new"), slots_of("ptx_logits")])
    new = policy(slots, torch.float32, device)
    value = scalar(slots_of("values_new"), device)
    starts = [m.weights.masters[m.head_name].detach().clone() for m in (new, value)]
    ema = EMA(new.parameters(), 0.992)
    learner = Learner(
        new,
        value,
        Optimizer(new.parameters(), adam_settings(settings), new.weights, ema),
        Optimizer(value.parameters(), adam_settings(settings), value.weights),
        ema,
    )
    ptx_rows = pretraining_rows(len(slots_of("logits_new")))
    targets = Targets(answers, scores, advantages, ptx_rows, LR, LR, 0, 0)
    metrics |= update(learner, targets, settings)
    for name, want in REPORTED.items():
        close(metrics[name], want, name)
    of_policy, of_value = golden_gradients()
    ppo = len(slots_of("logits_new"))
    norms = {"ppo": of_policy[:ppo], "ptx": of_policy[ppo:]}
    for name, gradient in norms.items():
        close(metrics[f"policy/grad_norm_{name}"], gradient.norm(), f"norm of {name}")
    close(metrics["policy/grad_norm"], of_policy.norm(), "norm")
    close(metrics["val/grad_norm"], of_value.norm(), "norm of the value's")
    given = (max_grad_norm, "policy", GIVEN["ptx_coef"])
    check_step(new, learner.policy_optimizer, starts[0], of_policy, *given)
    check_step(value, learner.value_optimizer, starts[1], of_value, max_grad_norm, "value")
    average = 0.992 * starts[0] + 0.008 * new.weights.masters[new.head_name].detach()
    close(ema.state()[new.head_name], average.cpu(), "average")


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("budget", [10**6, 6, 1])
def test_golden_iteration(budget, max_grad_norm, cpu_class):
    """However it is cut: in one pass, in two, each answer and each row of text alone."""
    with golden_networks():
        check_iteration(budget, max_grad_norm)
