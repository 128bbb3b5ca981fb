"""Whether a run ended for want of memory, and what to say then: its largest items, and the flags that help."""

from __future__ import annotations

import re

import torch

from engine.config import PPOConfig, RunConfig, SFTConfig
from engine.errors import EngineError
from engine.model.names import Head
from engine.run.distributed import world
from engine.run.memory import GB, Estimate
from engine.stages.estimates import Load, Machine, epoch_estimator, ppo_estimator
from engine.stages.resources import most_tokens

SHOWN = 5
ALLOCATORS = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's on a GPU, or what torch's and C++'s allocators say on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ALLOCATORS.search(str(error)) is not None


def expected(config: RunConfig) -> Estimate:
    """The estimate of `resources` for items as long as the config lets them be: data that was read is gone by now."""
    machine = Machine.of(config, *world())  # asks no other process: this one is at its end
    tokens = config.micro_batch_tokens or most_tokens(machine.device)
    if isinstance(config, PPOConfig):
        longest = config.max_length + config.num_samples * config.response_length
        prompts = -(-config.batch_size // config.num_samples)
        load = Load(longest, prompts * longest, config.max_length)
        estimate = ppo_estimator(config, machine, load)
        return estimate(tokens, config.activation_checkpointing, config.kv_cache_gb)
    load = Load(config.max_length, max(tokens, config.max_length), config.max_length)
    head: Head = "lm_head" if isinstance(config, SFTConfig) else "score"
    return epoch_estimator(config, machine, head, load)(tokens, config.activation_checkpointing, 0.0)


def memory_items(config: RunConfig) -> list[tuple[str, float]]:
    """(what, bytes) of the phase that needs the most, the largest first; without the process's own, which after a
    failure holds the others."""
    found = expected(config)
    items = {name: size for name, size in found.phases[found.phase].items() if name != "process"}
    return sorted((item for item in items.items() if item[1]), key=lambda item: -item[1])


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
    lines = [f"  {size / GB:8.3f} GB  {what}" for what, size in items[:SHOWN]]
    total = sum(size for _, size in items) / GB
    said = (str(error) or type(error).__name__).splitlines()[0][:200]
    return EngineError(
        f"out of memory ({said}). This run needs about {total:.3g} GB; its largest items:\n" + "\n".join(lines) +
        f"\nflags that help: {', '.join(helpful_flags(config))}; or a smaller model. Checkpoints are whole: go on with"
        " --resume_from_checkpoint true and other flags"
    )  # fmt: skip
