"""Advantages -> new weights: random minibatches, clipped losses, the pretraining term, one step each [paper C.4]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import ops
from engine.config import PPOConfig
from engine.data.deal import Pass, counted
from engine.model.heads import ScalarModel
from engine.model.transformer import Model
from engine.run.device import to_device, to_host
from engine.run.distributed import ALONE, Ranks
from engine.run.ema import EMA
from engine.run.optim import Optimizer, global_norm
from engine.run.streams import generator
from engine.stages.ppo.batch import Advantages, Rollouts, Scores, on_host
from engine.stages.ppo.forward import Answers, answer_loss, answer_values, training_passes
from engine.stages.ppo.metrics import parity_metrics
from engine.stages.ppo.ptx import backward_lm_loss

REPORTED = {  # metric -> the mean that it is
    "loss/policy_avg": "policy_loss",
    "loss/value_avg": "value_loss",
    "loss/ptx_avg": "ptx_loss",
    "policy/approxkl_avg": "approxkl",
    "policy/approxkl_k1_avg": "approxkl_k1",
    "policy/approxkl_k3_avg": "approxkl_k3",
    "policy/clipfrac_avg": "clipfrac",
    "policy/entropy_avg": "entropy",
    "val/clipfrac_avg": "value_clipfrac",
    "policy/grad_norm": "grad_norm",
    "policy/grad_norm_ppo": "ppo_grad_norm",
    "policy/grad_norm_ptx": "ptx_grad_norm",
    "val/grad_norm": "value_grad_norm",
}


@dataclass(frozen=True)
class Learner:
    """What an update changes: policy, value model, their optimizers, the policy's average.

    The optimizers hold the models' weights and the average: a step renews all.
    """

    policy: Model
    value: ScalarModel
    policy_optimizer: Optimizer
    value_optimizer: Optimizer
    ema: EMA | None


@dataclass(frozen=True)
class Targets:
    """What the minibatches of one iteration are trained on, and at which learning rates."""

    rollouts: Rollouts
    scores: Scores
    advantages: Advantages
    ptx_rows: Sequence[Sequence[int]]
    learning_rate: float
    value_learning_rate: float
    iteration: int
    skipped_in_a_row: int  # minibatches before this iteration


class Means:
    """Sums over tokens that become means over all of them, however the work was cut.

    On a GPU the sums stay there, in float64, until a mean is asked for: nobody waits between micro-batches.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.weights: dict[str, float] = {}

    def add(self, weight: float, **values: Tensor | float) -> None:
        for name, value in values.items():
            here = not isinstance(value, Tensor) or value.device.type == "cpu"
            wide = float(value) if here else value.double()  # type: ignore[union-attr]
            self.sums[name] = self.sums.get(name, 0.0) + weight * wide
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def over(self, ranks: Ranks) -> Means:
        """The means over the tokens of all ranks; a rank may have none for a name that others have."""
        if ranks.size == 1:
            return self
        names = [*REPORTED.values(), "excess", "excess_squared"]
        sums = ranks.sums([float(self.sums.get(name, 0.0)) for name in names])
        weights = ranks.sums([self.weights.get(name, 0.0) for name in names])
        total = Means()
        for name, value, weight in zip(names, sums, weights, strict=True):
            if weight > 0:
                total.sums[name], total.weights[name] = value, weight
        return total

    def __getitem__(self, name: str) -> float:
        return float(self.sums[name]) / max(self.weights[name], 1e-12)


def minibatches(
    num_prompts: int, config: PPOConfig, iteration: int
) -> Iterator[tuple[int, list[int]]]:
    """(number, prompts) of every minibatch of every inner epoch: a random split, each prompt once an epoch.

    The answers to one prompt stay together, since they are computed together. Rollouts of fewer prompts than
    config.num_mini_batches, which only another loop can make, give a minibatch a prompt.
    """
    number = 0
    for epoch in range(config.num_ppo_epochs):
        order = generator(config.seed, "ppo minibatches", iteration, epoch).permutation(num_prompts)
        for part in np.array_split(order, min(config.num_mini_batches, num_prompts)):
            yield number, [int(i) for i in part]
            number += 1


def token_rows(cu: Sequence[int], answers: Answers) -> Tensor:  # (M,)
    return torch.cat([torch.arange(cu[e], cu[e + 1]) for e in answers.episodes])


def policy_backward(
    policy: Model,
    targets: Targets,
    answers: Answers,
    rows: Tensor,
    count: int,
    config: PPOConfig,
    means: Means,
    counts: bool = True,  # false: only keeps step with other ranks
) -> Tensor:  # (M,)
    """Adds the policy gradient of one micro-batch; returns its log-probs."""
    old = targets.scores.old_logprob[rows]
    advantage = targets.advantages.advantage[rows]

    def clipped(logprob: Tensor, at: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return ops.ppo_policy_loss(
            logprob,
            old[at],
            advantage[at],
            clip=config.cliprange,
            denominator=float(count),
            log_ratio_clamp=config.log_ratio_clamp,
        )

    loss, logprob, entropy = answer_loss(
        policy,
        answers,
        lambda logprob, _entropy, at: clipped(logprob, at)[0],
        config.temperature,
        config.activation_checkpointing,
    )
    counted(loss, counts).backward()  # type: ignore[no-untyped-call]
    n = rows.numel()
    if n == 0 or not counts:
        return logprob
    excess = torch.expm1((logprob - old).double())  # ratio - 1, without losing its digits
    _, stats = clipped(logprob, slice(0, n))
    means.add(n, policy_loss=loss.detach() * (count / n), entropy=entropy.mean())
    means.add(n, **{name: stats[name] for name in ("clipfrac", "approxkl", "approxkl_k1", "approxkl_k3")})
    means.add(n, excess=excess.mean(), excess_squared=excess.square().mean())
    return logprob


def value_backward(
    value: ScalarModel,
    targets: Targets,
    answers: Answers,
    rows: Tensor,
    count: int,
    config: PPOConfig,
    means: Means,
    counts: bool = True,  # false: only keeps step with other ranks
) -> None:
    """Adds the value gradient of one micro-batch."""
    new_value = answer_values(value, answers, config.activation_checkpointing)
    loss, stats = ops.ppo_value_loss(
        new_value,
        targets.scores.value[rows],
        targets.advantages.returns[rows],
        clip=config.cliprange_value,
        denominator=float(count),
    )
    counted(loss, counts).backward()  # type: ignore[no-untyped-call]
    n = rows.numel()
    if n and counts:
        means.add(n, value_loss=loss.detach() * (count / n), value_clipfrac=stats["clipfrac"])


def add_ptx_gradient(
    policy: Model,
    rows: Sequence[Sequence[int]],
    config: PPOConfig,
    means: Means,
    ranks: Ranks,
) -> None:
    """Accumulates ptx_coef * gradient of the language-model loss into the same buffers, before the one clip and the
    one step. The two parts are held apart only as long as it takes to measure their norms."""
    parameters = policy.parameters()
    ppo = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    loss = backward_lm_loss(
        policy, rows, config.ptx_coef, config.token_budget, config.activation_checkpointing, ranks
    )
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    means.add(1, ptx_loss=loss, ptx_grad_norm=global_norm(gradients))
    for name, p in parameters.items():
        gradient = ppo[name]
        if gradient is not None and p.grad is not None:
            p.grad.add_(gradient)
        elif gradient is not None:
            p.grad = gradient


@dataclass(frozen=True)
class Minibatch:
    """Prompts that one step of each model is taken on, in micro-batches; `count` answer tokens on all ranks."""

    number: int
    passes: tuple[tuple[Pass, Answers], ...]
    count: int


def update(
    learner: Learner, targets: Targets, config: PPOConfig, ranks: Ranks = ALONE
) -> dict[str, float]:
    """One iteration's optimizer steps; returns its metrics (means over real tokens of all ranks).

    The two models share nothing: the policy steps first, and its gradients are gone before the value model's come.
    """
    rollouts, means = targets.rollouts, Means()
    cu, n = rollouts.cu.tolist(), rollouts.num_samples
    parity: dict[str, float] = {}
    in_a_row = targets.skipped_in_a_row
    plan = list(minibatches(len(rollouts.prompts), config, targets.iteration))
    for number, prompts in plan:
        passes = tuple(training_passes(rollouts, prompts, config.token_budget, ranks))
        minibatch = Minibatch(number, passes, sum(cu[(i + 1) * n] - cu[i * n] for i in prompts))
        share = targets.ptx_rows[number :: len(plan)]
        policy_skipped, first = policy_step(learner, targets, minibatch, share, config, means, ranks)
        parity |= first
        value_skipped = value_step(learner, targets, minibatch, config, means)
        in_a_row = in_a_row + 1 if policy_skipped or value_skipped else 0
    stats = metrics(means.over(ranks)) | parity
    return stats | {
        "policy/skipped_steps": float(learner.policy_optimizer.skipped),  # of the whole run: no line can miss one
        "val/skipped_steps": float(learner.value_optimizer.skipped),
        "policy/skipped_in_a_row": float(in_a_row),
    }


def policy_step(
    learner: Learner,
    targets: Targets,
    minibatch: Minibatch,
    ptx_rows: Sequence[Sequence[int]],
    config: PPOConfig,
    means: Means,
    ranks: Ranks,
) -> tuple[bool, dict[str, float]]:
    """The policy's gradients, one clip and one step, which renews compute copy and average. Returns whether it was
    skipped and, of an iteration's first minibatch, how far sampled and trained log-probs are apart."""
    optimizer, rollouts = learner.policy_optimizer, targets.rollouts
    cu, parity = rollouts.cu.tolist(), dict[str, float]()
    rows, seen = [], []
    optimizer.zero_grad()
    for one, answers in minibatch.passes:
        at = token_rows(cu, answers)
        given = (to_device(at, learner.policy.device), minibatch.count, config, means, one.counts)
        logprob = policy_backward(learner.policy, targets, answers, *given)
        if one.counts:
            rows.append(at)
            seen.append(logprob)
    if minibatch.number == 0:
        parity = parity_metrics(rollouts, on_host(targets.scores), *of_all_ranks(rows, seen, cu[-1], ranks))
    means.add(1, ppo_grad_norm=optimizer.grad_norm())
    if ptx_rows and config.ptx_coef > 0:
        add_ptx_gradient(learner.policy, ptx_rows, config, means, ranks)
    result = optimizer.step(targets.learning_rate, config.max_grad_norm or None)
    optimizer.zero_grad()
    if not result.skipped:
        means.add(1, grad_norm=result.grad_norm)
    return result.skipped, parity


def value_step(
    learner: Learner, targets: Targets, minibatch: Minibatch, config: PPOConfig, means: Means
) -> bool:
    """The value model's gradients and step; returns whether it was skipped."""
    optimizer, cu = learner.value_optimizer, targets.rollouts.cu.tolist()
    optimizer.zero_grad()
    for one, answers in minibatch.passes:
        rows = to_device(token_rows(cu, answers), learner.policy.device)
        value_backward(learner.value, targets, answers, rows, minibatch.count, config, means, one.counts)
    result = optimizer.step(targets.value_learning_rate, config.max_grad_norm or None)
    optimizer.zero_grad()
    if not result.skipped:
        means.add(1, value_grad_norm=result.grad_norm)
    return result.skipped


def of_all_ranks(
    rows: Sequence[Tensor], seen: Sequence[Tensor], tokens: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:  # (M,), (M,) of the host
    """Rows and log-probs of a minibatch that the ranks have computed in parts."""
    own = torch.cat([*rows, torch.empty(0, dtype=torch.int64)])
    logprob = to_host(torch.cat([*seen])) if seen else torch.empty(0)
    if ranks.size == 1:
        return own, logprob
    wide = torch.zeros(2, tokens)
    wide[0, own], wide[1, own] = 1.0, logprob
    wide = ranks.sum(wide)
    (chosen,) = wide[0].nonzero(as_tuple=True)
    return chosen, wide[1, chosen]


def metrics(means: Means) -> dict[str, float]:
    """TRL's names, over real tokens only."""
    out = {name: means[key] for name, key in REPORTED.items() if key in means.sums}
    if "excess" in means.sums:
        out["val/ratio"] = 1.0 + means["excess"]
        out["val/ratio_var"] = max(means["excess_squared"] - means["excess"] ** 2, 0.0)
    return out
