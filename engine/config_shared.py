"""The keys that stages share, and the checks of their values; `config.py` has each stage's own.

Names follow Hugging Face's TrainingArguments and TRL's trainers where they have one. Paper sections are those of
InstructGPT (Ouyang et al. 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from engine.config_types import take_declared
from engine.data.rows import DataSource
from engine.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]


def require(condition: bool, key: str, value: object, want: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: got {value!r}, want {want}")


def positive(config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        require(value is None or value > 0, key, value, "a number above 0")
        require(value is None or value < math.inf, key, value, "a finite number above 0")


def not_negative(config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        require(value is None or value >= 0, key, value, "0 or more")
        require(value is None or value < math.inf, key, value, "a finite number, 0 or more")


def within_one(config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        require(0.0 <= value <= 1.0, key, value, "a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every stage has."""

    model_name_or_path: str
    """A Hugging Face folder or hub id (safetensors); the model that this stage starts from."""
    output_dir: str
    """The run folder: resolved config, metrics, samples, checkpoints, the final model."""
    data_dir: str | None = None
    """Data sets given by relative path are looked up here."""
    dataset_name: str | None = None
    """Training data: JSONL (also .gz), parquet, a local folder, or a hub id."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_mixture: list[DataSource] = field(default_factory=list)
    """Several data sets instead of `dataset_name`, each with `path` and, where they are not the defaults, `split`,
    `name` (the configuration of a hub data set) and `weight` (the share of its rows)."""
    eval_dataset_name: str | None = None
    """Validation data; without it `eval_fraction` of the training rows is held back."""
    dataset_test_split: str = "test"
    """Split of `eval_dataset_name` when it is a hub id or a folder."""
    eval_fraction: float = 0.0
    """Share of the training rows held back for validation, by a hash of the prompt."""
    bad_rows: Literal["error", "skip"] = "error"
    """A broken row ends the run with file, line and reason, or is skipped and counted."""
    max_length: int = 1024
    """Longest prompt plus answer in tokens."""
    parse_special_tokens: bool = False
    """Let special tokens written in the data's text act as control tokens (off: they are plain text)."""
    dtype: Dtype = "auto"
    """Compute copy of the weights; masters are float32. auto: bfloat16 where our kernels do the products."""
    device: Device = "auto"
    """Where models compute; cuda is AMD's too. auto: the GPU where torch sees one."""
    threads: int | None = None
    """CPU threads (default: the cores that this process may use)."""
    cpu_class: Literal["amx", "avx512", "avx2", "plain"] | None = None
    """A class of CPU kernels below the machine's own (default: the machine's)."""
    exact_logprobs: bool = False
    """On a GPU: products whose bits do not depend on the batch, nor then do log-probs; slower. On a CPU always so."""
    micro_batch_tokens: int | None = None
    """Tokens in one forward and backward pass (default: by the memory that is there, and said at the start). Changes
    memory and speed, not the gradient."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What the backward makes again instead of keeping it: nothing; what a pass over kept tensors gives; each layer.
    Changes memory and speed, no bit of a gradient."""
    peak_memory_gb: float | None = None
    """Stay below so many 10^9 bytes a process: micro-batches, checkpointing (at least the one given) and the cache are
    chosen for it."""
    seed: int = 0
    """Keys every random number, by purpose and address."""
    adam_beta1: float = 0.9
    """Adam's first moment decay [paper C]."""
    adam_beta2: float = 0.95
    """Adam's second moment decay [paper C]."""
    adam_epsilon: float = 1e-8
    """Adam's epsilon."""
    adam_eps_style: Literal["torch", "tf"] = "torch"
    """Where epsilon stands: torch's sqrt(v / c) + eps, or TensorFlow's sqrt(v) + eps (smaller first steps)."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; norms, biases and embeddings are left out."""
    max_grad_norm: float = 1.0
    """Clip of the global gradient norm; 0 turns it off."""
    max_steps: int | None = None
    """Stop after so many optimizer steps (SFT, RM) or iterations (PPO)."""
    save_steps: int | None = None
    """Checkpoint every so many steps (default: at the end of each epoch; PPO: every 20 iterations)."""
    save_total_limit: int | None = None
    """Checkpoints kept (default: 2; with select_by_reward_model one an epoch, to choose among)."""
    eval_steps: int | None = None
    """Validate every so many steps (default: at the end of each epoch; PPO: at the start and the end)."""
    logging_steps: int = 1
    """Write metrics every so many steps."""
    resume_from_checkpoint: str | bool | None = None
    """`true`: go on from the newest valid checkpoint of output_dir, if there is one; or a checkpoint's path."""
    allow_config_change: list[str] = field(default_factory=list)
    """Keys that may differ from those of the checkpoint to go on from, though the result changes (repeatable)."""
    max_skipped_steps: int = 10
    """So many optimizer steps in a row with a loss or gradient that is not finite end the run, its state saved."""
    replicate: int = 1
    """Under torchrun: copies of the sharded weights (HSDP); processes = replicate x shards."""
    progress: bool = True
    """Show progress on the terminal."""

    @property
    def goes_on_from(self) -> str | None:
        """`resume_from_checkpoint` in one form: "true", a checkpoint's path, or None."""
        given = self.resume_from_checkpoint
        if given is None or str(given).lower() == "false":
            return None
        return "true" if str(given).lower() == "true" else str(given)

    @property
    def num_checkpoints(self) -> int:
        """How many are kept."""
        return self.save_total_limit or 2

    def __post_init__(self) -> None:
        take_declared(self)
        model = self.model_name_or_path
        require(bool(model), "model_name_or_path", model, "a folder or hub id")
        require(bool(self.output_dir), "output_dir", self.output_dir, "a folder to write to")
        for key in ("output_dir", "data_dir"):
            path = getattr(self, key) or ""
            require(not path.startswith("~"), key, path, "a whole path: no shell has put the home folder for ~")
        positive(
            self,
            "max_length",
            "threads",
            "micro_batch_tokens",
            "peak_memory_gb",
            "max_steps",
            "save_steps",
            "eval_steps",
        )
        positive(self, "save_total_limit", "logging_steps", "adam_epsilon", "max_skipped_steps", "replicate")
        clip, off = self.max_grad_norm, "a finite number above 0, or 0, which turns clipping off"
        require(clip is not None and 0 <= clip < math.inf, "max_grad_norm", clip, off)
        not_negative(self, "weight_decay", "seed")
        within_one(self, "adam_beta1", "adam_beta2", "eval_fraction")
        require(
            not (self.dataset_name and self.dataset_mixture),
            "dataset_mixture",
            [source.path for source in self.dataset_mixture],
            "nothing beside dataset_name; put every data set into the mixture",
        )

    @property
    def token_budget(self) -> int:
        """`micro_batch_tokens`, once it is settled (stages/resources.py)."""
        if self.micro_batch_tokens is None:
            raise ConfigError(
                "micro_batch_tokens: got none, want a number here: only a whole stage chooses it by"
                " the memory that is there"
            )
        return self.micro_batch_tokens


@dataclass(frozen=True, kw_only=True)
class EpochConfig(RunConfig):
    """What SFT and RM share: epochs over a data set with a cosine schedule."""

    num_train_epochs: int = 1
    """Passes over the data."""
    per_device_train_batch_size: int = 32
    """Rows (SFT) or prompts with all their answers (RM) an optimizer step."""
    gradient_accumulation_steps: int = 1
    """Multiplies the batch; memory is bounded by micro_batch_tokens in any case."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_floor: float = 0.1
    """The cosine ends at this share of the peak [paper C.1, C.2]."""
    warmup_steps: int = 0
    """Linear warm-up; the paper has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            self, "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"
        )
        not_negative(self, "learning_rate", "warmup_steps")
        within_one(self, "lr_floor")

    @property
    def batch_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps
