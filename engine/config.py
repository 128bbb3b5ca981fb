"""One frozen dataclass a stage: what `python -m engine.train` reads and what a run folder records.

Keys that all stages have are in `config_shared.py`. Names follow Hugging Face's TrainingArguments and TRL's trainers
where they have one. Values are checked when the dataclass is made; an error says what was given and what is wanted.
Paper sections are those of InstructGPT (Ouyang et al. 2022).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from engine.config_shared import (
    Device,
    Dtype,
    EpochConfig,
    RunConfig,
    not_negative,
    positive,
    require,
    within_one,
)
from engine.config_types import take_declared
from engine.run.kl_control import LARGEST_ERROR

__all__ = [
    "STAGES",
    "Device",
    "Dtype",
    "EpochConfig",
    "PPOConfig",
    "RMConfig",
    "RewardSource",
    "RunConfig",
    "SFTConfig",
    "not_negative",
    "positive",
    "require",
    "to_dict",
    "within_one",
]

@dataclass(frozen=True, kw_only=True)
class SFTConfig(EpochConfig):
    """Supervised fine-tuning on demonstrations [paper C.1], and the RL-init variant [paper C.3]."""

    num_train_epochs: int = 3
    """Passes over the data; the paper has 16 (RL-init: 2)."""
    completion_only_loss: bool = True
    """Loss on the answer and its end-of-sequence token only; false: on the whole sequence."""
    truncate: bool = False
    """Cut rows longer than max_length (counted and reported) instead of refusing them."""
    residual_dropout: float = 0.0
    """Dropout on each attention and MLP output before the residual is added; the paper has 0.2."""
    ptx_dataset_name: str | None = None
    """Pretraining text mixed into every batch (RL-init)."""
    ptx_dataset_split: str = "train"
    """Its split, when it is a hub id or a folder."""
    ptx_dataset_config: str | None = None
    """Configuration of a hub data set of text, of the held-out one too."""
    ptx_fraction: float = 0.0
    """Share of each batch's rows that is pretraining text; the paper's RL-init has 0.1."""
    ptx_length: int = 512
    """Tokens of one pretraining row."""
    eval_ptx_dataset_name: str | None = None
    """Held-out pretraining text; its loss is logged beside the demonstrations'."""
    eval_ptx_dataset_split: str = "test"
    """Its split, when it is a hub id or a folder."""
    select_by_reward_model: str | None = None
    """A reward-model folder: samples of every kept checkpoint are scored and the best one is marked [paper 3.5]."""
    select_num_prompts: int = 64
    """Validation prompts sampled for that."""
    select_response_length: int = 128
    """Longest sampled answer for that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "ptx_length", "select_num_prompts", "select_response_length")
        within_one(self, "residual_dropout", "ptx_fraction")
        require(
            self.residual_dropout < 1, "residual_dropout", self.residual_dropout, "a number below 1"
        )
        require(
            (self.ptx_fraction > 0) == (self.ptx_dataset_name is not None)
            and self.ptx_fraction < 1,
            "ptx_fraction",
            self.ptx_fraction,
            "a number above 0 and below 1 together with ptx_dataset_name, 0 without",
        )
        rows = self.batch_size
        require(
            self.ptx_fraction == 0 or 1 <= self.ptx_rows <= rows - 1,
            "ptx_fraction",
            self.ptx_fraction,
            f"at least one row of text and one demonstration in each batch: of a batch of {rows} it makes"
            f" {self.ptx_rows} rows text; give another share, or a larger batch"
            " (per_device_train_batch_size x gradient_accumulation_steps)",
        )

    @property
    def num_checkpoints(self) -> int:
        """How many are kept: with a choice among them those of all epochs, as in the paper [C.1]."""
        chosen_from = self.num_train_epochs if self.select_by_reward_model else 0
        return self.save_total_limit or max(2, chosen_from)

    @property
    def ptx_rows(self) -> int:
        """Rows of each batch that are pretraining text."""
        return round(self.batch_size * self.ptx_fraction)

    def texts_beside(self, demonstrations: int) -> int:
        """The same of a batch with so many demonstrations, of which an epoch's last one may have fewer."""
        return round(self.ptx_rows * demonstrations / (self.batch_size - self.ptx_rows))


@dataclass(frozen=True, kw_only=True)
class RMConfig(EpochConfig):
    """Reward model on rankings of K answers [paper 3.5, C.2]."""

    per_device_train_batch_size: int = 64
    """Prompts an optimizer step; each brings all its K answers."""
    learning_rate: float = 5e-5
    """Peak learning rate; the paper's 6B model has 9e-6."""
    loss_reduction: Literal["prompt_mean_valid", "prompt_mean_allpairs", "pair_mean"] = (
        "prompt_mean_valid"
    )
    """Pairs' loss averaged within a prompt (over the pairs that are not ties, or over all C(K,2)), or over pairs."""
    demonstrations_name: str | None = None
    """SFT rows whose mean score becomes 0 after training [paper 3.5]; without it the best-ranked answers serve."""
    demonstrations_split: str = "train"
    """Their split, when they are a hub id or a folder."""
    demonstrations_config: str | None = None
    """Configuration of a hub data set of demonstrations."""
    demonstrations_limit: int = 512
    """Rows of demonstrations that are scored for that."""
    calibration_bins: int = 10
    """Bins of the calibration table: predicted against observed share of wins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "demonstrations_limit", "calibration_bins")


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """One term of the reward: a reward-model folder or a Python function `module:function`."""

    source: str
    """A folder with a reward model, or `module:function` with TRL's signature
    `f(prompts, completions, **columns) -> list[float | None]`."""
    weight: float = 1.0
    """Its factor in the sum."""

    def __post_init__(self) -> None:
        take_declared(self)
        require(math.isfinite(self.weight), f"rewards: weight of {self.source}", self.weight, "a finite number")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """PPO and PPO-ptx [paper 3.5, C.4]. Names are those of TRL's PPO where it has one."""

    max_length: int = 512
    """Longest prompt in tokens; longer ones are left out and counted. The paper has 1024."""
    reward_model_path: str | None = None
    """The reward model; the value model starts as its copy."""
    rewards: list[RewardSource] = field(default_factory=list)
    """Rewards instead of, or beside (weight 1), reward_model_path."""
    value_model_path: str | None = None
    """What the value model starts from (default: reward_model_path, else the policy with a new head)."""
    total_episodes: int = 10_000
    """Episodes in all; the paper has 256k."""
    batch_size: int = 128
    """Episodes an iteration; the paper has 512."""
    num_samples: int = 1
    """Answers to each drawn prompt; batch_size is a multiple of it."""
    num_mini_batches: int = 8
    """Optimizer steps an inner epoch, at most one a prompt; the paper has 8 of 64 episodes."""
    num_ppo_epochs: int = 1
    """Inner epochs; the paper has 1."""
    response_length: int = 128
    """Longest answer in tokens; the paper has 1024."""
    temperature: float = 1.0
    """Of sampling and of scoring alike; the paper has 1."""
    learning_rate: float = 1e-5
    """Policy; constant after the warm-up. The paper scanned 2.55e-6 to 2.55e-5."""
    value_learning_rate: float = 3e-5
    """Value model; the paper has 9e-6."""
    warmup_iterations: int = 10
    """The policy's learning rate rises linearly from a tenth over so many iterations [paper C.4]."""
    adam_epsilon: float = 1e-5
    """Adam's epsilon; 1e-5 as in PPO's predecessors."""
    kl_coef: float = 0.02
    """beta of the KL penalty against the reference [paper C.4]."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator; only k1 sums to the sequence's log-ratio of the paper's Eq. 2."""
    kl_target: float | None = None
    """With it the controller adapts kl_coef (above 0) towards this KL a sequence (Ziegler et al. 2019)."""
    kl_horizon: int = 10_000
    """Episodes of that controller's time constant; more than a fifth of batch_size."""
    score_at: Literal["eos", "eos_plus_one"] = "eos"
    """Where the score is paid: at the last token, or one slot later as TRL does."""
    missing_eos_penalty: float = 1.0
    """What an answer cut at response_length loses (subtract) or gets (replace: minus this value)."""
    missing_eos_mode: Literal["subtract", "replace"] = "subtract"
    """Subtract the penalty from the score, or replace the score by it."""
    bootstrap_truncated: bool = False
    """Answers cut at response_length go on with the value of their last state instead of ending there."""
    gamma: float = 1.0
    """Discount; the paper has none."""
    lam: float = 0.95
    """GAE's lambda; not in the paper, 0.95 in its predecessors."""
    cliprange: float = 0.2
    """Of the policy's ratio [paper C.4]."""
    log_ratio_clamp: float | None = None
    """Largest absolute log of that ratio, beyond which a token has no gradient (20 is usual); null turns it off."""
    cliprange_value: float | None = 0.2
    """Of the value's change; null turns it off."""
    whiten_advantages: bool = True
    """Mean 0, variance 1 over the batch's tokens."""
    whiten_rewards: bool = False
    """Variance 1 over the batch's tokens, mean kept."""
    ema_decay: float = 0.992
    """Of the policy's average, saved as `ema/`; 0 turns it off [paper C.4]."""
    ptx_dataset_name: str | None = None
    """Pretraining text for PPO-ptx; none is plain PPO."""
    ptx_dataset_split: str = "train"
    """Its split, when it is a hub id or a folder."""
    ptx_dataset_config: str | None = None
    """Configuration of a hub data set of text, of the held-out one too."""
    ptx_coef: float = 27.8
    """gamma of the paper's Eq. 2."""
    ptx_per_episode: float = 8.0
    """Pretraining rows an episode [paper C.4]."""
    ptx_length: int = 512
    """Tokens of one pretraining row."""
    eval_ptx_dataset_name: str | None = None
    """Held-out text whose perplexity is logged at every validation."""
    eval_ptx_dataset_split: str = "test"
    """Its split, when it is a hub id or a folder."""
    eval_num_prompts: int = 64
    """Validation prompts sampled at every validation."""
    max_active: int = 64
    """Sequences that are decoded together."""
    kv_cache_gb: float = 2.0
    """Memory for keys and values; what does not fit waits."""
    max_ratio_deviation: float | None = None
    """Stop when a first minibatch's ratio is further from 1 than this: sampler and trainer disagree."""
    reward_timeout_s: float | None = 3600.0
    """Seconds that a reward function may take for the answers of an iteration; null is no limit."""
    save_samples: int = 8
    """Episodes written to samples/ at every iteration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            self,
            "total_episodes",
            "batch_size",
            "num_samples",
            "num_mini_batches",
            "num_ppo_epochs",
            "reward_timeout_s",
            "response_length",
            "temperature",
            "kl_target",
            "kl_horizon",
            "cliprange",
            "log_ratio_clamp",
            "cliprange_value",
            "ptx_length",
            "eval_num_prompts",
            "max_active",
            "kv_cache_gb",
            "max_ratio_deviation",
        )
        not_negative(
            self, "learning_rate", "value_learning_rate", "warmup_iterations", "kl_coef", "ptx_coef"
        )
        not_negative(self, "ptx_per_episode", "missing_eos_penalty", "save_samples")
        within_one(self, "gamma", "lam", "ema_decay")
        require(self.ema_decay < 1, "ema_decay", self.ema_decay, "a number below 1; 0 turns it off")
        self._check_batch()

    def check_rewards(self) -> None:
        """A run of the stage has a reward; in a loop of one's own the scores come from there.

        Raises:
            ConfigError: it has none.
        """
        require(
            bool(self.reward_model_path or self.rewards),
            "reward_model_path",
            self.reward_model_path,
            "a reward-model folder, or `rewards` with at least one source",
        )

    def _check_batch(self) -> None:
        """The numbers that depend on the size of the batch."""
        batch, samples = self.batch_size, self.num_samples
        require(batch % samples == 0, "batch_size", batch, f"a multiple of num_samples = {samples}")
        require(
            self.num_mini_batches <= batch // samples,
            "num_mini_batches",
            self.num_mini_batches,
            f"at most batch_size / num_samples = {batch} / {samples} = {batch // samples}, since the answers to one"
            " prompt stay together; lower num_mini_batches or num_samples, or raise batch_size",
        )
        texts, steps = round(batch * self.ptx_per_episode), self.num_mini_batches * self.num_ppo_epochs
        require(
            self.ptx_dataset_name is None or self.ptx_coef == 0 or texts >= steps,
            "ptx_per_episode",
            self.ptx_per_episode,
            f"a row of text at least for each of an iteration's {steps} policy steps (num_mini_batches x"
            f" num_ppo_epochs), or some would be without the pretraining term; a batch of {batch} has {texts}",
        )
        if self.kl_target is not None:
            wanted = "a number above 0 together with kl_target: the controller multiplies it, and 0 stays 0"
            require(self.kl_coef > 0, "kl_coef", self.kl_coef, f"{wanted}; raise kl_coef, or leave kl_target out")
            least = LARGEST_ERROR * batch
            require(
                least < self.kl_horizon,
                "kl_horizon",
                self.kl_horizon,
                f"more than {LARGEST_ERROR:g} * batch_size = {least:g} together with kl_target: one iteration could"
                " else make kl_coef 0 or negative; raise kl_horizon, or lower batch_size",
            )

    @property
    def num_iterations(self) -> int:
        """Iterations that total_episodes makes, at least one."""
        count = max(1, self.total_episodes // self.batch_size)
        return min(count, self.max_steps) if self.max_steps else count


STAGES: dict[str, type[RunConfig]] = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}


def to_dict(config: RunConfig) -> dict[str, object]:
    """Plain values for YAML and JSON."""
    return dataclasses.asdict(config)
