"""The options of `python -m engine.sample`.

Apart from the command: to resolve annotations jsonargparse carries out a module's imports for type checking, and torch
must not be imported before the machine is settled (engine/train.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import Device, Dtype, not_negative, positive, require
from engine.config_types import take_declared


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample completions of a data set's prompts, and rank them if asked to."""

    model_name_or_path: str
    """A Hugging Face folder or hub id (safetensors)."""
    dataset_name: str
    """Prompts: JSONL (also .gz), parquet, a local folder, or a hub id; `prompt` or `messages`."""
    output: str
    """The candidates file to write (JSONL)."""
    overwrite: bool = False
    """Replace an output that is there already (off: it is refused)."""
    dataset_split: str = "train"
    """Split of a hub data set or of a folder."""
    num_prompts: int | None = None
    """Only so many prompts, the first ones (default: all)."""
    num_samples: int = 4
    """K, completions a prompt."""
    max_new_tokens: int = 128
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Of the sampled law."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that hold this mass only."""
    seed: int = 0
    """With an episode id it fixes a completion, whatever the batch."""
    batch: int = 64
    """Prompts handed to the engine at once; each batch is written when it is done."""
    max_active: int = 64
    """Sequences that are decoded together."""
    kv_cache_gb: float = 2.0
    """Memory for keys and values; what does not fit waits."""
    rank_with: str | None = None
    """`module:function` with `f(prompts, completions, **columns) -> list[float | None]`, higher is
    better. Prompts and completions are text, also of talks, which are the column `messages`.
    """
    tie_margin: float = 0.0
    """Scores no further apart than this are a tie."""
    dtype: Dtype = "auto"
    """Weights of the compute copy. auto: bfloat16 where our kernels do the products."""
    device: Device = "auto"
    """Where the model computes; cuda is AMD's too. auto: the GPU where torch sees one."""
    threads: int | None = None
    """CPU threads (default: the cores that this process may use)."""
    cpu_class: Literal["amx", "avx512", "avx2", "plain"] | None = None
    """A class of CPU kernels below the machine's own (default: the machine's)."""
    bad_rows: Literal["error", "skip"] = "error"
    """A broken row ends the command with file, line and reason, or is skipped and counted."""
    parse_special_tokens: bool = False
    """Let special tokens spelled in prompts act as control tokens (off: they are plain text)."""

    def __post_init__(self) -> None:
        take_declared(self)
        positive(self, "num_prompts", "num_samples", "max_new_tokens", "temperature", "batch")
        positive(self, "max_active", "kv_cache_gb", "threads")
        not_negative(self, "seed", "tie_margin")
        require(
            self.rank_with is None or self.num_samples > 1,
            "num_samples",
            self.num_samples,
            "at least 2 with rank_with: one completion has no rank",
        )
