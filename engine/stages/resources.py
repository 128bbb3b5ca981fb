"""How many tokens a micro-batch has, what its backward makes again, and how large the cache is: by the memory there is.

    given                 micro_batch_tokens is taken as it is
    default               the most tokens whose activations fit ACTIVATION_SHARE of the memory that the weights leave
    peak_memory_gb N      the most tokens, with checkpointing as light as possible and a cache as large as useful, whose
                          estimate stays below N

None of it changes a result beyond the rounding of sums. What was chosen is written to the run's config.yaml, and a
resumed run takes it from there.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import yaml

from engine.config import EpochConfig, PPOConfig, RunConfig, SFTConfig
from engine.errors import ConfigError
from engine.generate.cache import page_bytes
from engine.generate.scheduler import Limits, pages_needed
from engine.kernels._backend import kernels_usable
from engine.kernels.attention_decode import PAGE
from engine.model.architectures import Architecture, read_architecture
from engine.model.checkpointing import MODES, Checkpointing
from engine.model.folder import read_json
from engine.model.names import Head, Spec, parameter_specs
from engine.model.transformer import Model, activation_dtype
from engine.model.weights import resolve_dtype, resolve_folder
from engine.run import memory
from engine.run.device import choose_device
from engine.run.memory import GB, Dtypes, Estimate
from engine.stages.inputs import PPOData

ACTIVATION_SHARE = 0.5  # of what weights, gradients and moments leave
MOST_TOKENS = 4096  # longer micro-batches are no faster
STEP = 256
ENOUGH_TOKENS = 1024  # fewer than these, and heavier checkpointing is the better use of memory
HEADROOM = 0.95  # of peak_memory_gb: an estimate is not a measurement
CHOSEN = ("micro_batch_tokens", "activation_checkpointing", "kv_cache_gb")

Config = TypeVar("Config", bound=RunConfig)
Epochs = TypeVar("Epochs", bound=EpochConfig)
Estimator = Callable[[int, Checkpointing, float], Estimate]  # (tokens, mode, cache in GB)


@dataclass(frozen=True)
class Described:
    """A model by its header alone."""

    architecture: Architecture
    specs: dict[str, Spec]


@dataclass(frozen=True)
class Load:
    """Tokens of the items that micro-batches are made of."""

    longest: int  # one item: no micro-batch is smaller
    step: int  # the most that one step's micro-batches have together
    prompt: int = 0  # the longest prompt that is sampled for


def load_of(lengths: Sequence[int], items: int, prompt: int = 0) -> Load:
    """Of `items` items a step, with these lengths."""
    return Load(max(lengths, default=1), max(sum(heapq.nlargest(items, lengths)), 1), prompt)


def describe(folder: str, head: Head) -> Described:
    a = read_architecture(read_json(resolve_folder(folder) / "config.json"))
    return Described(a, parameter_specs(a, head))


class Machine:
    """Where models compute: dtypes there, what this process holds already, and what is free."""

    def __init__(self, config: RunConfig) -> None:
        self.device = choose_device(config.device)
        storage = resolve_dtype(config.dtype, self.device)
        self.dtypes = Dtypes(storage, activation_dtype(storage, self.device))
        self.packed = self.device.type == "cpu" and kernels_usable()
        given_back = self.device.type != "cpu"
        saving = config.peak_memory_gb is not None or config.activation_checkpointing == "full"
        if saving and not given_back:
            given_back = memory.give_back_freed()
        self.kept_share = 0.0 if given_back else memory.KEPT_BY_MALLOC
        self.held, self.free = held_and_free(self.device)

    def frozen(self, model: Described) -> float:
        return memory.copy_bytes(model.specs, self.dtypes.storage, False, self.packed)

    def trained(self, model: Described, averaged: bool = False) -> dict[str, float]:
        copy = memory.copy_bytes(model.specs, self.dtypes.storage, True, self.packed)
        return {**memory.training_bytes(model.specs, averaged), "compute copy": copy}

    def activations(
        self, a: Architecture, tokens: int, mode: Checkpointing, ranking: bool = False
    ) -> dict[str, float]:
        """Of a micro-batch; `ranking`: of the reward model, which reads an answer's last row only."""
        kept = memory.token_bytes(a, self.dtypes, mode, ranking) * tokens
        return {
            "activations": float(kept),
            "head": memory.head_bytes(a, tokens, ranking),
            "freed and kept by malloc": self.kept_share * kept,
        }


def held_and_free(device: torch.device) -> tuple[int, int]:
    """Bytes of the memory that `device` computes in: this process's, and what it may still take."""
    if device.type == "cpu":
        return memory.resident_bytes(), memory.available_bytes()
    return 0, int(torch.cuda.mem_get_info(device)[0])


def epoch_estimator(config: RunConfig, machine: Machine, head: Head, load: Load) -> Estimator:
    """Of SFT (head "lm_head") and the reward model (head "score")."""
    model = describe(config.model_name_or_path, head)
    weights = {"process": float(machine.held), **machine.trained(model)}
    gradients = 4.0 * memory.parameters(model.specs)
    checkpoint = 3 * gradients  # masters and moments, copied to be written beside the next steps

    def estimate(tokens: int, mode: Checkpointing, cache_gb: float) -> Estimate:
        used = machine.activations(
            model.architecture, min(tokens, load.step), mode, head == "score"
        )
        # with one micro-batch a step, gradients come as activations go
        there = gradients if tokens < load.step else max(0.0, gradients - used["activations"])
        phases = {
            "trains": {**weights, "gradients": there, **used},
            "saves": {**weights, "checkpoint": checkpoint},
        }
        if isinstance(config, SFTConfig) and config.select_by_reward_model:
            scorer = machine.frozen(describe(config.select_by_reward_model, "score"))
            cache = cache_bytes(
                model.architecture,
                machine,
                load,
                Limits().max_active,
                Limits().kv_cache_gb,
                1,
                config.select_response_length,
            )
            phases["selects"] = {**weights, "reward model": scorer, "cache": cache}
        return Estimate(phases)

    return estimate


def ppo_estimator(config: PPOConfig, machine: Machine, load: Load) -> Estimator:
    """Of PPO: policy, value model, reference and reward models, all at once."""
    policy = describe(config.model_name_or_path, "lm_head")
    folders = [source.source for source in config.rewards if ":" not in source.source]
    if config.reward_model_path:
        folders.insert(0, config.reward_model_path)
    origin = config.value_model_path or next(iter(folders), config.model_name_or_path)
    value = describe(origin, "score")
    weights: dict[str, float] = {"process": float(machine.held)}
    for owner, items in (
        ("policy", machine.trained(policy, config.ema_decay > 0)),
        ("value", machine.trained(value)),
    ):
        weights |= {f"{owner} {name}": bytes_ for name, bytes_ in items.items()}
    weights["reference"] = machine.frozen(policy)
    weights["reward models"] = sum(machine.frozen(describe(f, "score")) for f in folders)
    first, second = (4.0 * memory.parameters(m.specs) for m in (policy, value))
    mixed = config.ptx_dataset_name is not None and config.ptx_coef > 0
    apart = 4.0 * memory.parameters(policy.specs) * mixed
    # masters, moments and the average, copied to be written beside the next iteration
    checkpoint = 3 * (first + second) + (first if config.ema_decay > 0 else 0.0)

    def estimate(tokens: int, mode: Checkpointing, cache_gb: float) -> Estimate:
        count = min(tokens, load.step)
        larger = max(
            (policy, value), key=lambda m: memory.token_bytes(m.architecture, machine.dtypes, mode)
        )
        one = (
            tokens >= load.step and not mixed
        )  # micro-batch: the second's gradients come as its activations go
        used = machine.activations(larger.architecture, count, mode)
        scored = memory.scored_token_bytes(policy.architecture, machine.dtypes) * count
        cache = cache_bytes(
            policy.architecture,
            machine,
            load,
            config.max_active,
            cache_gb,
            config.num_samples,
            config.response_length,
        )
        return Estimate(
            {
                "samples": {**weights, "cache": cache},
                "scores": {**weights, "activations": float(scored)},
                "trains": {
                    **weights,
                    "gradients": first + (0.0 if one else second),
                    "gradients of the two terms apart": apart,
                    **used,
                },
                "saves": {**weights, "checkpoint": checkpoint},
            }
        )

    return estimate


def cache_bytes(
    a: Architecture,
    machine: Machine,
    load: Load,
    max_active: int,
    limit_gb: float,
    samples: int,
    new_tokens: int,
) -> float:
    """Of the cache: what the running sequences need at most, up to the limit."""
    need = pages_needed(max(load.prompt, 1), new_tokens, PAGE)
    pages = max_active * need.total + need.prompt
    page = page_bytes(a.num_layers, a.num_kv_heads, a.head_dim, machine.dtypes.storage)
    least = need.alone(samples) * page
    return float(max(least, min(pages * page, limit_gb * GB)))


def candidates(load: Load) -> list[int]:
    """Numbers of tokens to try, the largest first; the last is the longest item."""
    top = max(min(MOST_TOKENS, -(-load.step // STEP) * STEP), load.longest)
    return [*range(top, load.longest, -STEP), load.longest]


def settle(config: Config, machine: Machine, load: Load, estimate: Estimator) -> tuple[Config, str]:
    """The config with every choice made, and a line that says so.

    Raises:
        ConfigError: nothing stays below peak_memory_gb; the message lists the items, and the flags that help.
    """
    config = as_begun(config)
    cache_gb = config.kv_cache_gb if isinstance(config, PPOConfig) else 0.0
    given = config.micro_batch_tokens
    tries = [given] if given is not None else candidates(load)
    mode: Checkpointing = config.activation_checkpointing
    if config.peak_memory_gb is None:
        tokens = (
            tries[0] if given is not None else by_share(machine, tries, mode, cache_gb, estimate)
        )
    else:
        limit = HEADROOM * config.peak_memory_gb * GB
        tokens, mode, cache_gb = within(config, limit, tries, cache_gb, estimate)
    found = estimate(tokens, mode, cache_gb)
    line = (
        f"micro-batches of {tokens} tokens, activation checkpointing {mode}: estimated peak {found}"
    )
    if found.peak > machine.held + machine.free:
        line += (
            f"; {machine.free / GB:.2f} GB are free beside this process's {machine.held / GB:.2f}"
        )
    chosen = replace(config, micro_batch_tokens=tokens, activation_checkpointing=mode)
    if isinstance(chosen, PPOConfig):
        chosen = replace(chosen, kv_cache_gb=cache_gb)
        line += f"; cache up to {cache_gb:.3g} GB"
    return chosen, line


def settle_epochs(
    config: Epochs, head: Head, lengths: Sequence[int], prompt: int = 0
) -> tuple[Epochs, str]:
    """`settle` for SFT (head "lm_head") or the reward model ("score"), whose items have these lengths."""
    machine, load = Machine(config), load_of(lengths, config.batch_size, prompt)
    return settle(config, machine, load, epoch_estimator(config, machine, head, load))


def settle_ppo(config: PPOConfig, data: PPOData) -> tuple[PPOConfig, str]:
    """`settle` for PPO: items are prompts with their answers, of at most response_length, and rows of text."""
    answers = config.num_samples * config.response_length
    texts = [] if data.ptx is None else [data.ptx.length]
    prompts = -(-config.batch_size // config.num_samples)
    load = load_of([len(p.tokens) + answers for p in data.train], prompts, data.longest_prompt)
    rows = round(config.batch_size * config.ptx_per_episode) * sum(texts)
    longest = max([load.longest, *texts, *(len(row) for row in data.eval_ptx)])
    load = replace(load, longest=longest, step=max(load.step, rows))
    machine = Machine(config)
    return settle(config, machine, load, ppo_estimator(config, machine, load))


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


def as_begun(config: Config) -> Config:
    """A run that goes on takes what it began with, where the config leaves the choice open."""
    wanted = config.resume_from_checkpoint
    file = Path(config.output_dir) / "config.yaml"
    if wanted is None or wanted.lower() == "false" or config.micro_batch_tokens is not None:
        return config
    if not file.is_file():
        return config
    begun = yaml.safe_load(file.read_text())
    return replace(config, **{name: begun[name] for name in CHOSEN if begun.get(name) is not None})


def for_models(config: Config, policy: Model) -> Config:
    """For a caller's own loop, whose models are in memory: the default, by the memory that is left for activations."""
    if config.micro_batch_tokens is not None:
        return config
    dtypes, (_, free) = Dtypes(policy.dtype, policy.act_dtype), held_and_free(policy.device)
    each = memory.token_bytes(policy.architecture, dtypes, config.activation_checkpointing)
    tokens = int(ACTIVATION_SHARE * free / each) // STEP * STEP
    return replace(config, micro_batch_tokens=max(STEP, min(MOST_TOKENS, tokens)))
