"""How many tokens a micro-batch has, what its backward makes again, and how large the cache is: by the memory there is.

    given                 micro_batch_tokens is taken as it is
    default               the most tokens whose activations fit ACTIVATION_SHARE of the memory that the weights leave
    peak_memory_gb N      the most tokens, with checkpointing as light as possible and a cache as large as useful, whose
                          estimate stays below N

None of it changes a result beyond the rounding of sums. What was chosen is written to the run's config.yaml, and a
resumed run takes from there what its own config leaves open. Several processes choose the same, for the one that has
the least memory, and do not begin where the estimate does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from engine.config import EpochConfig, PPOConfig, RunConfig
from engine.errors import ConfigError
from engine.model.checkpointing import MODES, Checkpointing
from engine.model.names import Head
from engine.model.transformer import Model
from engine.run import memory
from engine.run.distributed import ALONE, Ranks
from engine.run.memory import GB, Dtypes, Estimate
from engine.stages.estimates import (
    Estimator,
    Load,
    Machine,
    epoch_estimator,
    held_and_free,
    load_of,
    ppo_estimator,
)
from engine.stages.inputs import PPOData

ACTIVATION_SHARE = 0.5  # of what weights, gradients and moments leave
STEP = 256
ENOUGH_TOKENS = 1024  # fewer than these, and heavier checkpointing is the better use of memory
HEADROOM = 0.95  # of peak_memory_gb: an estimate is not a measurement
TOKENS, BOUND = "micro_batch_tokens", "peak_memory_gb"
CHOSEN = (TOKENS, "activation_checkpointing", "kv_cache_gb")

Config = TypeVar("Config", bound=RunConfig)
Epochs = TypeVar("Epochs", bound=EpochConfig)


def most_tokens(device: torch.device) -> int:
    """Longer micro-batches are no faster: on two cores 512, 1,024 and 2,048 tokens took as long; of a GPU, a guess."""
    return 1024 if device.type == "cpu" else 4096


def candidates(load: Load, device: torch.device) -> list[int]:
    """Numbers of tokens to try, the largest first; the last is the longest item."""
    top = max(min(most_tokens(device), -(-load.step // STEP) * STEP), load.longest)
    return [*range(top, load.longest, -STEP), load.longest]


def settle(config: Config, machine: Machine, load: Load, estimate: Estimator) -> tuple[Config, str]:
    """The config with every choice made, and a line that says so.

    Raises:
        ConfigError: nothing stays below peak_memory_gb; the message lists the items, and the flags that help.
    """
    cache_gb = config.kv_cache_gb if isinstance(config, PPOConfig) else 0.0
    given = config.micro_batch_tokens
    tries = [given] if given is not None else candidates(load, machine.device)
    mode: Checkpointing = config.activation_checkpointing
    if config.peak_memory_gb is None:
        tokens = (
            tries[0] if given is not None else by_share(machine, tries, mode, cache_gb, estimate)
        )
    else:
        limit = HEADROOM * config.peak_memory_gb * GB
        tokens, mode, cache_gb = within(config, limit, tries, cache_gb, estimate)
    found = estimate(tokens, mode, cache_gb)
    whose = "" if machine.size == 1 else f"of each of {machine.size} processes "
    line = (
        f"micro-batches of {tokens} tokens, activation checkpointing {mode}: estimated peak {whose}{found}"
    )
    if found.peak > machine.held + machine.free:
        if machine.size > 1:
            raise does_not_fit(machine, found)
        line += (
            f"; {machine.free / GB:.2f} GB are free beside this process's {machine.held / GB:.2f}"
        )
    chosen = replace(config, micro_batch_tokens=tokens, activation_checkpointing=mode)
    if isinstance(chosen, PPOConfig):
        chosen = replace(chosen, kv_cache_gb=cache_gb)
        line += f"; cache up to {cache_gb:.3g} GB"
    return chosen, line


def does_not_fit(machine: Machine, found: Estimate) -> ConfigError:
    """What ends a run of several processes before it begins: one that dies for want of memory would end all."""
    items = sorted(found.phases[found.phase].items(), key=lambda item: -item[1])
    lines = "".join(f"\n  {size / GB:8.3f} GB  {what}" for what, size in items if size)
    return ConfigError(
        f"memory: each of {machine.size} processes needs {found.peak / GB:.3f} GB while it {found.phase}, it has"
        f" {machine.held / GB:.3f} GB and {machine.free / GB:.3f} GB are free:{lines}\nflags that help: --dtype"
        " bfloat16, --kv_cache_gb, --micro_batch_tokens, --activation_checkpointing full; what is gathered is as large"
        " with any number of processes, so it wants GPUs with more memory, fewer processes on one CPU machine, or a"
        " smaller model (python -m engine.plan)"
    )


def settle_epochs(
    config: Epochs, head: Head, lengths: Sequence[int], prompt: int = 0, ranks: Ranks = ALONE
) -> tuple[Epochs, str]:
    """`settle` for SFT (head "lm_head") or the reward model ("score"), whose items have these lengths."""
    config, machine = as_begun(config, ranks), machine_of(config, ranks)
    load = load_of(lengths, -(-config.batch_size // ranks.size), prompt)
    return settle(config, machine, load, epoch_estimator(config, machine, head, load))


def settle_ppo(config: PPOConfig, data: PPOData, ranks: Ranks = ALONE) -> tuple[PPOConfig, str]:
    """`settle` for PPO: items are prompts with their answers, of at most response_length, and rows of text."""
    config, machine = as_begun(config, ranks), machine_of(config, ranks)
    answers = config.num_samples * config.response_length
    texts = [] if data.ptx is None else [data.ptx.length]
    prompts = -(-config.batch_size // (config.num_samples * ranks.size))
    load = load_of([len(p.tokens) + answers for p in data.train], prompts, data.longest_prompt)
    rows = -(-round(config.batch_size * config.ptx_per_episode) // ranks.size) * sum(texts)
    longest = max([load.longest, *texts, *(len(row) for row in data.eval_ptx)])
    load = replace(load, longest=longest, step=max(load.step, rows))
    return settle(config, machine, load, ppo_estimator(config, machine, load))


def machine_of(config: RunConfig, ranks: Ranks) -> Machine:
    """What each of the ranks plans with."""
    return Machine.of(config, ranks.size, ranks.local_size).agreed(ranks)


def by_share(
    machine: Machine,
    tries: Sequence[int],
    mode: Checkpointing,
    cache_gb: float,
    estimate: Estimator,
) -> int:
    """The most tokens whose activations take no more than their share of what the rest leaves."""
    for tokens in tries:
        items = estimate(tokens, mode, cache_gb).phases["trains"]
        used = items["activations"] + items["freed and kept by malloc"]
        rest = sum(items.values()) - used - items["process"]
        if used <= ACTIVATION_SHARE * (machine.free - rest):
            return tokens
    return tries[-1]


def within(
    config: RunConfig, limit: float, tries: Sequence[int], cache_gb: float, estimate: Estimator
) -> tuple[int, Checkpointing, float]:
    """(tokens, mode, cache in GB) below `limit` bytes: the lightest mode with enough tokens, else the most tokens."""
    modes = MODES[MODES.index(config.activation_checkpointing) :]
    fits: list[tuple[int, Checkpointing]] = []
    for mode in modes:
        fits += [(n, mode) for n in tries if training_peak(estimate(n, mode, 0.0)) <= limit][:1]
    enough = [fit for fit in fits if fit[0] >= min(ENOUGH_TOKENS, tries[0])]
    least = estimate(tries[-1], modes[-1], 0.0)
    sampling = sum(least.phases.get("samples", {}).values())
    if not fits or sampling > limit:
        assert config.peak_memory_gb is not None
        shorter = "shorten max_length (and response_length), leave micro_batch_tokens unset, "
        raise ConfigError(
            f"peak_memory_gb: got {config.peak_memory_gb:g}, the least that this run needs is {least}"
            f" ({limit / GB:.2f} GB are planned with); {'' if least.phase == 'saves' else shorter}set ema_decay 0 where"
            " it is not, use a smaller model or reward model, or allow more"
        )
    tokens, mode = enough[0] if enough else max(fits, key=lambda fit: fit[0])
    room = limit - (sampling - least.phases.get("samples", {}).get("cache", 0.0))
    return tokens, mode, min(cache_gb, room / GB)


def training_peak(found: Estimate) -> float:
    return max(sum(items.values()) for name, items in found.phases.items() if name != "samples")


def as_begun(config: Config, ranks: Ranks = ALONE) -> Config:
    """A run that goes on takes what it began with, where the config leaves the choice open.

    Open are a mode and a cache at their defaults. The tokens were chosen for a bound, a mode and a cache: with another
    one given they are chosen again, as is everything with another bound.
    """
    if config.goes_on_from is None or config.micro_batch_tokens is not None:
        return config
    begun = ranks.by_first(lambda: chosen_before(Path(config.output_dir) / "config.yaml"))
    bound, tokens = begun.pop(BOUND, None), begun.pop(TOKENS, None)
    if config.peak_memory_gb not in (None, bound):
        return config
    default = {field.name: field.default for field in fields(config)}
    begun = {name: value for name, value in begun.items() if name in default}
    config = replace(config, **{n: v for n, v in begun.items() if getattr(config, n) == default[n]})
    is_as_begun = all(getattr(config, name) == value for name, value in begun.items())
    return replace(config, micro_batch_tokens=tokens) if is_as_begun else config


def chosen_before(file: Path) -> dict[str, Any]:
    """The choices in the config.yaml of the run as it began, and its bound; none where there is no such file."""
    begun = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return {name: begun[name] for name in (*CHOSEN, BOUND) if begun.get(name) is not None}


def for_models(config: Config, policy: Model, ranks: Ranks = ALONE) -> Config:
    """For a caller's own loop, whose models are in memory: the default, by the memory that is left for activations."""
    if config.micro_batch_tokens is not None:
        return config
    dtypes, (_, here) = Dtypes(policy.dtype, policy.act_dtype), held_and_free(policy.device, ranks.local_size)
    free = ranks.smallest(here)
    each = memory.token_bytes(policy.architecture, dtypes, config.activation_checkpointing)
    tokens = int(ACTIVATION_SHARE * free / each) // STEP * STEP
    return replace(config, micro_batch_tokens=max(STEP, min(most_tokens(policy.device), tokens)))
