"""PPO for other people's loops, and for ours: `rollout`, then `step` with a score for each episode.

ppo = engine.PPO(policy, value, reference, config)
rollouts = ppo.rollout(prompts)
stats = ppo.step(rollouts, scores)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from engine.config import PPOConfig
from engine.data.prompts import Prompt
from engine.errors import ConfigError, EngineError
from engine.generate.scheduler import Limits
from engine.hybrid import HybridEngine
from engine.hybrid import Prompt as RawPrompt
from engine.model.heads import ScalarModel
from engine.model.transformer import Model
from engine.run.checkpoint import Checkpoint
from engine.run.device import to_device, wait_for
from engine.run.distributed import ALONE, Ranks
from engine.run.ema import EMA
from engine.run.kl_control import AdaptiveKL, FixedKL, KLController
from engine.run.optim import Optimizer, OptimizerConfig
from engine.run.schedule import constant_with_warmup
from engine.stages.ppo.advantages import rewards_and_advantages
from engine.stages.ppo.batch import Rollouts, on_host
from engine.stages.ppo.metrics import episode_metrics
from engine.stages.ppo.rollout import rollout
from engine.stages.ppo.score import checked_scores, score
from engine.stages.ppo.update import Learner, Targets, update
from engine.stages.resources import for_models


@dataclass(frozen=True)
class Iteration:
    """What one iteration gave: its metrics, and the KL estimate of every answer token."""

    stats: dict[str, float]
    kl: Tensor  # (N,) of the host


def check_parity(config: PPOConfig, stats: dict[str, float]) -> None:
    """Raises EngineError where sampler and trainer disagree by more than max_ratio_deviation, if there is one."""
    deviation, limit = stats.get("parity/first_minibatch_ratio_deviation", 0.0), config.max_ratio_deviation
    if limit is not None and deviation > limit:
        raise EngineError(
            f"parity: the first minibatch's ratio is {deviation:.3g} away from 1, max_ratio_deviation is {limit:g};"
            " the log-probs being trained are not those that were scored"
        )


def check_parts(policy: object, value: object, reference: object, config: object) -> None:
    """Raises ConfigError for a part of PPO that is of another type, frozen, or the policy twice."""
    trained = "engine.HybridEngine.from_pretrained(folder, trainable=True)"
    scalar = "engine.load_scalar(folder, trainable=True), or engine.scalar_from_policy(folder, seed)"
    frozen = "engine.load_policy(folder)"
    for name, given, kind, source in (
        ("policy", policy, HybridEngine, trained),
        ("value", value, ScalarModel, scalar),
        ("reference", reference, Model, frozen),
        ("config", config, PPOConfig, "engine.PPOConfig(...)"),
    ):
        if not isinstance(given, kind) or (kind is Model and isinstance(given, ScalarModel)):
            raise ConfigError(f"{name}: got {type(given).__name__}, want {kind.__name__}; give {source}")
        if isinstance(given, HybridEngine | ScalarModel):
            model = given.model if isinstance(given, HybridEngine) else given
            if not model.trainable:
                raise ConfigError(f"{name}: got a frozen model, want a trainable one; give {source}")
        if isinstance(policy, HybridEngine) and isinstance(given, Model) and given.weights is policy.model.weights:
            raise ConfigError(
                f"{name}: got the policy's own model, whose KL to itself is always 0, want another; give {source}"
            )


class PPO:
    """Policy, value model, frozen reference, and their optimizers.

    `policy` is a trainable HybridEngine, `value` a trainable ScalarModel, `reference` a frozen Model.
    `iteration` counts the steps taken, `episodes` the answers handed out, whose random numbers it addresses: no two
    have the same. Rollouts are made within the config's `max_active` and `kv_cache_gb`. With several `ranks`, over
    which policy and value are sharded, all of them make the same calls with the same arguments.

    Raises:
        ConfigError: one of them is something else, frozen where it is trained, or the policy's own model.
    """

    def __init__(
        self,
        policy: HybridEngine,
        value: ScalarModel,
        reference: Model,
        config: PPOConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        check_parts(policy, value, reference, config)
        config = for_models(config, policy.model, ranks)
        limits = Limits(config.max_active, config.kv_cache_gb, policy.limits.prefill_tokens)
        self.policy, self.value, self.reference = policy.with_limits(limits), value, reference
        self.config = config
        self.ranks = ranks
        adam = OptimizerConfig(
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            eps_style=config.adam_eps_style,
            weight_decay=config.weight_decay,
        )
        parameters = policy.model.parameters()
        ema = EMA(parameters, config.ema_decay) if config.ema_decay > 0 else None
        self.learner = Learner(
            policy.model,
            value,
            Optimizer(parameters, adam, policy.model.weights, ema),
            Optimizer(value.parameters(), adam, value.weights),
            ema,
        )
        self.kl: KLController = (
            FixedKL(config.kl_coef)
            if config.kl_target is None
            else AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        )
        self.iteration = 0
        self.episodes = 0
        self.episodes_at_step = 0  # those handed out when the last step was taken
        self.skipped_in_a_row = 0

    @property
    def is_stuck(self) -> bool:
        """So many steps in a row were skipped, `config.max_skipped_steps`, that nothing is learned any more."""
        return self.skipped_in_a_row >= self.config.max_skipped_steps

    def rollout(self, prompts: Sequence[Prompt | RawPrompt]) -> Rollouts:
        """config.num_samples answers to each prompt (text, messages, token ids or a data set's
        Prompt), by the current weights.

        Raises:
            ConfigError: not a list, or one of them is no prompt.
        """
        whole = self.policy.whole()  # for as long as this phase takes
        rollouts = rollout(whole, prompts, self.episodes, self.config.seed, self.config, self.ranks)
        self.episodes += rollouts.num_episodes
        return rollouts

    def step(
        self,
        rollouts: Rollouts,
        scores: Tensor | Sequence[float],  # (E,)
        ptx_rows: Sequence[Sequence[int]] = (),
    ) -> dict[str, float]:
        """Score, reward, advantages, one update; returns the metrics of the iteration.

        `scores` is one finite number an episode, from anywhere; `ptx_rows` are rows of pretraining text for PPO-ptx.

        Raises:
            ConfigError: no episodes; scores of another shape, or one that is None or not finite. Nothing has run then.
            EngineError: config.max_skipped_steps steps in a row were skipped; or the first minibatch's ratio is further
                from 1 than config.max_ratio_deviation. Both are known when the step has been taken.
        """
        stats = self.advance(rollouts, scores, ptx_rows).stats
        if self.is_stuck:
            raise EngineError(
                f"step {self.iteration}: got {self.skipped_in_a_row} optimizer steps in a row with a loss or gradient"
                f" that is not finite, want fewer than max_skipped_steps = {self.config.max_skipped_steps}; none of"
                " them moved a weight. Look at the scores and data of these steps, or lower the learning rate"
            )
        return stats

    def advance(
        self,
        rollouts: Rollouts,
        scores: Tensor | Sequence[float],  # (E,)
        ptx_rows: Sequence[Sequence[int]] = (),
    ) -> Iteration:
        """`step`, with the per-token KL beside the metrics; skipped steps end nothing: see `is_stuck`."""
        if rollouts.num_episodes == 0:
            raise ConfigError("rollouts: got no episodes, want at least one; give `rollout` prompts")
        config, device = self.config, self.policy.model.device
        cu, ended = to_device(rollouts.cu, device), to_device(rollouts.ended, device)
        reward = to_device(checked_scores(scores, rollouts.num_episodes), device)
        started = time.perf_counter()
        passes = score(
            self.policy.model,
            self.reference,
            self.value,
            rollouts,
            reward,
            config.temperature,
            config.token_budget,
            self.ranks,
        )
        rewards, advantages = rewards_and_advantages(passes, ended, cu, self.kl.beta, config)
        wait_for(device)
        scored = time.perf_counter()
        targets = Targets(
            rollouts,
            passes,
            advantages,
            ptx_rows,
            constant_with_warmup(self.iteration, config.learning_rate, config.warmup_iterations),
            config.value_learning_rate,
            self.iteration,
            self.skipped_in_a_row,
        )
        stats = update(self.learner, targets, config, self.ranks)
        rewards = on_host(rewards)
        stats |= episode_metrics(
            rollouts, on_host(passes), rewards, on_host(advantages), self.kl.beta
        )
        stats |= {
            "lr": targets.learning_rate,
            "timing/score": scored - started,
            "timing/update": time.perf_counter() - scored,
        }
        self.kl = self.kl.after(stats["objective/kl"], rollouts.num_episodes)
        self.skipped_in_a_row = int(stats["policy/skipped_in_a_row"])
        self.iteration += 1
        self.episodes_at_step = self.episodes
        check_parity(config, stats)
        return Iteration(stats, rewards.kl)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that the next step depends on: tensors by file, and plain values.

        Rollouts since the last step are not in it; who goes on from here is given the same ones again.
        """
        learner = self.learner
        tensors = {
            "policy": self.policy.model.state(),
            "value": self.value.state(),
            "optimizer_policy": learner.policy_optimizer.state(),
            "optimizer_value": learner.value_optimizer.state(),
        }
        if learner.ema is not None:
            tensors["ema"] = learner.ema.state()
        return tensors, {
            "iteration": self.iteration,
            "episodes": self.episodes_at_step,
            "kl_coef": self.kl.beta,
            "first_kl_coef": self.config.kl_coef,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state(self, saved: Checkpoint) -> None:
        """What `state` gave, read back; the next step is then the one that the saved run would have taken.

        Raises:
            CheckpointError: a part of it is missing or of another model.
        """
        learner = self.learner
        self.policy.model.load_state(saved.group("policy"))
        self.value.load_state(saved.group("value"))
        learner.policy_optimizer.load_state(saved.group("optimizer_policy"))
        learner.value_optimizer.load_state(saved.group("optimizer_value"))
        if learner.ema is not None:
            learner.ema.load_state(saved.group("ema"))
        # One that the config has changed since is the config's, as a fixed one is.
        if isinstance(self.kl, AdaptiveKL) and saved.number("first_kl_coef") == self.config.kl_coef:
            self.kl = replace(self.kl, beta=saved.number("kl_coef"))
        self.iteration = int(saved.number("iteration"))
        # Without the count it is of a run of the stage, from before there was one: a whole batch an iteration.
        counted = "episodes" in saved.state
        self.episodes = int(saved.number("episodes")) if counted else self.iteration * self.config.batch_size
        self.episodes_at_step = self.episodes
        self.skipped_in_a_row = int(saved.number("skipped_in_a_row"))
