"""What a run keeps in memory, predicted from its config, and what to say when that is too much.

Bytes for P parameters of a trained model: masters 4 P, gradients 4 P, Adam's two moments 8 P, the average 4 P, the
compute copy 2 P or 4 P; a checkpoint that is being written holds a copy of all but gradients and compute copy.
"""

from __future__ import annotations

import math
import re

import torch

from engine.config import PPOConfig, RunConfig, SFTConfig
from engine.errors import EngineError
from engine.model.architectures import Architecture, read_architecture
from engine.model.folder import read_json
from engine.model.names import Head, parameter_specs
from engine.model.transformer import activation_dtype
from engine.model.weights import resolve_dtype, resolve_folder
from engine.run.device import choose_device
from engine.run.memory import Dtypes, token_bytes
from engine.stages.inputs import model_folders
from engine.stages.resources import MOST_TOKENS

SHOWN = 5
ALLOCATORS = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's on a GPU, or what torch's and C++'s allocators say on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ALLOCATORS.search(str(error)) is not None


def read_sizes(path: str) -> Architecture:
    """A model's sizes from its config.json."""
    return read_architecture(read_json(resolve_folder(path) / "config.json"))


def count_parameters(a: Architecture, head: Head) -> int:
    return sum(math.prod(spec.shape) for spec in parameter_specs(a, head).values())


def memory_items(config: RunConfig) -> list[tuple[str, float]]:
    """(what, bytes) of the large things that a run holds, the largest first."""
    a = read_sizes(config.model_name_or_path)
    device = choose_device(config.device)
    stored = resolve_dtype(config.dtype, device)
    storage = stored.itemsize
    is_ppo = isinstance(config, PPOConfig)
    trained = count_parameters(a, "lm_head" if is_ppo or isinstance(config, SFTConfig) else "score")
    frozen = 0
    if isinstance(config, PPOConfig):
        value_path = (
            config.value_model_path or config.reward_model_path or config.model_name_or_path
        )
        frozen = trained  # the reference
        trained += count_parameters(read_sizes(value_path), "score")
    for _, path in model_folders(config)[1:]:
        frozen += count_parameters(read_sizes(path), "score")
    average = (
        4.0 * count_parameters(a, "lm_head")
        if isinstance(config, PPOConfig) and config.ema_decay
        else 0.0
    )
    tokens = config.micro_batch_tokens or MOST_TOKENS
    dtypes = Dtypes(stored, activation_dtype(stored, device))
    activations = float(token_bytes(a, dtypes, config.activation_checkpointing) * tokens)
    items = [
        ("masters of the trained weights (float32)", 4.0 * trained),
        ("gradients", 4.0 * trained),
        ("Adam's moments", 8.0 * trained),
        ("compute copies of trained weights", float(storage * trained)),
        ("the policy's average", average),
        ("frozen models", float(storage * frozen)),
        ("a checkpoint while it is written", 12.0 * trained + average),
        (
            "keys and values while sampling",
            config.kv_cache_gb * 1e9 if isinstance(config, PPOConfig) else 0.0,
        ),
        (f"activations of up to {tokens} tokens", activations),
    ]
    return sorted((item for item in items if item[1]), key=lambda item: -item[1])


def helpful_flags(config: RunConfig) -> list[str]:
    """Flags that lower memory, with what they are now. None but the last two changes a run's result."""
    flags = [
        f"--micro_batch_tokens (now {config.micro_batch_tokens or 'by the memory there is'})",
        f"--activation_checkpointing full (now {config.activation_checkpointing})",
        "--peak_memory_gb (which chooses both)",
    ]
    if isinstance(config, PPOConfig):
        flags += [
            f"--kv_cache_gb (now {config.kv_cache_gb:g})",
            f"--max_active (now {config.max_active})",
        ]
        flags += [f"--ema_decay 0 (now {config.ema_decay:g})"]
    return [*flags, f"--dtype bfloat16 (now {config.dtype})"]


def out_of_memory(config: RunConfig, error: BaseException) -> EngineError:
    """The error that names the largest items and the flags that help."""
    items = memory_items(config)
    lines = [f"  {size / 1e9:8.3f} GB  {what}" for what, size in items[:SHOWN]]
    total = sum(size for _, size in items) / 1e9
    said = (str(error) or type(error).__name__).splitlines()[0][:200]
    return EngineError(
        f"out of memory ({said}). This run needs about {total:.3g} GB; its largest items:\n" + "\n".join(lines) +
        f"\nflags that help: {', '.join(helpful_flags(config))}; or a smaller model. Checkpoints are whole: go on with"
        " --resume_from_checkpoint true and other flags"
    )  # fmt: skip
