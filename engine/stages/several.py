"""Before several processes train: one rank's peak memory, said and compared with what is free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import PPOConfig
from engine.errors import ConfigError
from engine.model.footprint import Layout, Phase, epoch_phases, gathered, held, ppo_phases, sizes
from engine.model.names import Head
from engine.model.transformer import Model
from engine.run.distributed import Ranks
from engine.run.session import Session


def layout_of(model: Model, ranks: Ranks, replicate: int) -> Layout:
    """How a model's weights lie over the ranks."""
    packed = model.batch_invariant  # the CPU's kernels read a packed copy
    return Layout(ranks.size // replicate, replicate, model.dtype.itemsize, packed)


def free_memory(device: torch.device, ranks: Ranks) -> float:
    """Bytes that one rank may still take: of its GPU, or its part of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return float(lines["MemAvailable"].split()[0]) * 1024 / ranks.local_size


def check_epochs(session: Session, model: Model, head: Head) -> None:
    """`check_memory` of SFT or the reward model."""
    ranks, config = session.ranks, session.config
    layout = layout_of(model, ranks, config.replicate)
    own = sizes("model", model.architecture, head, model.act_dtype.itemsize)
    phases = epoch_phases(own, config.micro_batch_tokens, layout)
    check_memory(session, phases, held(own, False, layout), free_memory(model.device, ranks))


def check_ppo(
    session: Session, config: PPOConfig, policy: Model, value: Model, frozen: Sequence[Model]
) -> None:
    """`check_memory` of PPO; `frozen` are the reference and the reward models."""
    ranks, act = session.ranks, policy.act_dtype.itemsize
    layout = layout_of(policy, ranks, config.replicate)
    own = sizes("policy", policy.architecture, "lm_head", act)
    judged = sizes("value model", value.architecture, "score", act)
    always = held(own, config.ema_decay > 0, layout) + held(judged, False, layout)
    always += sum(gathered(sizes("frozen", m.architecture, "lm_head", act), layout) for m in frozen)
    kv_bytes = config.kv_cache_gb * 1e9
    phases = ppo_phases(own, judged, kv_bytes, config.micro_batch_tokens, layout)
    check_memory(session, phases, always, free_memory(policy.device, ranks))


def check_memory(session: Session, phases: Sequence[Phase], held: float, free: float) -> None:
    """Prints what a rank will hold at its peak; with one process nothing.

    Args:
        held: bytes of what lies there already, sharded and frozen.
        free: bytes that may still be taken.

    Raises:
        ConfigError: a phase that does not fit, with its items and what to do.
    """
    if session.ranks.size == 1:
        return
    for phase in phases:
        items = ", ".join(f"{what} {size / 1e9:.3f}" for what, size in phase.items)
        session.log.event(
            f"memory of a rank, {phase.name}: {(held + phase.bytes) / 1e9:.3f} GB ({held / 1e9:.3f} always; {items})"
        )
    worst = max(phases, key=lambda phase: phase.bytes)
    if session.ranks.any(worst.bytes > free):
        items = "".join(f"\n  {size / 1e9:8.3f} GB  {what}" for what, size in worst.items)
        raise ConfigError(
            f"memory: {worst.name} needs {worst.bytes / 1e9:.3f} GB more on each rank, {free / 1e9:.3f} GB are free:"
            f"{items}"
            "\nflags that help: --dtype bfloat16, --kv_cache_gb, --micro_batch_tokens; a whole copy is as large on any"
            " number of ranks, so it wants GPUs with more memory, fewer ranks on one CPU machine, or a smaller model"
            " (python -m engine.plan)"
        )
