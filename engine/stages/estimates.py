"""What a run needs of one process's memory, phase by phase: by the header of its models, before any of them is read.

    one process      masters, moments, average, compute copy of a trained model; the compute copy of a frozen one
    several          masters, moments, average / shards; a frozen model whole
      samples, scores, validates   + the compute copy of the model at work, gathered
      trains                       + gradients / shards, embeddings and head gathered with their gradient, two layers
                                     gathered with the gradient of one and its reduction

`--dry_run`, a run's own choices (resources.py), out-of-memory messages and the paper plan (engine/plan.py) all say
what stands here. Bytes of the items are in engine/run/memory.py.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from engine.config import PPOConfig, RunConfig, SFTConfig
from engine.generate.cache import page_bytes
from engine.generate.scheduler import Limits, pages_needed
from engine.kernels._backend import kernels_usable
from engine.kernels.attention_decode import PAGE
from engine.model.architectures import Architecture, read_architecture
from engine.model.checkpointing import Checkpointing
from engine.model.folder import read_json
from engine.model.names import REST, Head, Spec, parameter_specs, part_of
from engine.model.transformer import activation_dtype
from engine.model.weights import resolve_dtype, resolve_folder
from engine.run import memory
from engine.run.device import choose_device
from engine.run.distributed import Ranks
from engine.run.memory import GB, Dtypes, Estimate

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


@dataclass(frozen=True)
class Machine:
    """Where models compute: dtypes there, what this process holds already, what is free; and the processes of the run,
    over which trained weights are cut into `shards`."""

    device: torch.device
    dtypes: Dtypes
    packed: bool  # products read a second copy of the weights, as on a CPU
    kept_share: float  # of the activations, freed and kept by malloc
    held: int
    free: int
    size: int = 1
    shards: int = 1

    @classmethod
    def of(cls, config: RunConfig, size: int = 1, local_size: int = 1) -> Machine:
        """This one, with `size` processes of the run, `local_size` of them here."""
        device = choose_device(config.device)
        storage = resolve_dtype(config.dtype, device)
        saving = config.peak_memory_gb is not None or config.activation_checkpointing == "full"
        given_back = device.type != "cpu" or (saving and memory.give_back_freed())
        if not given_back:
            memory.keep_freed()
        held, free = held_and_free(device, local_size)
        return cls(
            device=device,
            dtypes=Dtypes(storage, activation_dtype(storage, device)),
            packed=device.type == "cpu" and kernels_usable(),
            kept_share=0.0 if given_back else memory.KEPT_BY_MALLOC,
            held=held,
            free=free,
            size=size,
            shards=size // config.replicate,
        )

    def agreed(self, ranks: Ranks) -> Machine:
        """The same on all ranks, which then choose the same: the most that one holds, the least that one has free."""
        return replace(self, held=int(ranks.largest(self.held)), free=int(ranks.smallest(self.free)))

    def compute_copy(self, specs: Mapping[str, Spec]) -> float:
        return memory.copy_bytes(specs, self.dtypes.storage, False, self.packed)

    def frozen(self, model: Described) -> float:
        return self.compute_copy(model.specs)

    def whole(self, what: str, model: Described) -> dict[str, float]:
        """Of a phase without gradient: a sharded model is gathered for it."""
        return {} if self.size == 1 else {f"{what}, gathered": self.frozen(model)}

    def trained(self, model: Described, averaged: bool = False) -> dict[str, float]:
        kept = {n: b / self.shards for n, b in memory.training_bytes(model.specs, averaged).items()}
        if self.size > 1:  # gathered when it is read
            return kept
        copy = memory.copy_bytes(model.specs, self.dtypes.storage, True, self.packed)
        return {**kept, "compute copy": copy}

    def training_pass(self, models: Sequence[Described]) -> dict[str, float]:
        """Of a pass through sharded models, one after another: what is gathered for it, and gradients on their way."""
        if self.size == 1:
            return {}
        rest, layers = 0.0, 0.0
        for model in models:
            outer = {n: s for n, s in model.specs.items() if part_of(n) in (REST, "score")}
            layer = {n: s for n, s in model.specs.items() if part_of(n) == "layers.0"}
            largest = max(math.prod(spec.shape) for spec in layer.values())
            rest = max(rest, self.compute_copy(outer) + 4.0 * memory.parameters(outer))
            work = 2 * self.compute_copy(layer) + 8.0 * memory.parameters(layer) + 4.0 * largest
            layers = max(layers, work)
        return {
            "embeddings and head, gathered, with their gradient": rest,
            "two layers gathered, one's gradient and its reduction": layers,
        }

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

    def gradients(self, size: float, activations: float, one_pass: bool) -> float:
        """What is there beside the activations at their most: all, or in a step of one pass what outweighs them, since
        gradients come as activations go. Of a sharded model all: a layer's are on their way to other ranks besides."""
        return max(0.0, size - activations) if one_pass and self.size == 1 else size


def held_and_free(device: torch.device, local_size: int = 1) -> tuple[int, int]:
    """Bytes of the memory that `device` computes in: this process's, and what it may still take, its part of what is
    free for `local_size` processes on a CPU."""
    if device.type == "cpu":
        return memory.resident_bytes(), memory.available_bytes() // local_size
    return 0, int(torch.cuda.mem_get_info(device)[0])


def epoch_estimator(config: RunConfig, machine: Machine, head: Head, load: Load) -> Estimator:
    """Of SFT (head "lm_head") and the reward model (head "score")."""
    model = describe(config.model_name_or_path, head)
    weights = {"process": float(machine.held), **machine.trained(model)}
    gradients = 4.0 * memory.parameters(model.specs) / machine.shards
    checkpoint = 3 * gradients  # masters and moments, copied to be written
    whole = machine.whole("model", model)

    def estimate(tokens: int, mode: Checkpointing, cache_gb: float) -> Estimate:
        used = machine.activations(
            model.architecture, min(tokens, load.step), mode, head == "score"
        )
        there = machine.gradients(gradients, used["activations"], tokens >= load.step)
        phases = {
            "trains": {**weights, "gradients": there, **machine.training_pass([model]), **used},
            "saves": {**weights, "checkpoint": checkpoint},
        }
        if whole:
            phases["validates"] = {**weights, **whole}
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
            phases["selects"] = {**weights, **whole, "reward model": scorer, "cache": cache}
        return Estimate(phases)

    return estimate


@dataclass(frozen=True)
class PPOModels:
    """Of PPO: what is trained, and the reward models; the reference is the policy as it was."""

    policy: Described
    value: Described
    rewards: tuple[Described, ...]


def ppo_models(config: PPOConfig) -> PPOModels:
    folders = [source.source for source in config.rewards if ":" not in source.source]
    if config.reward_model_path:
        folders.insert(0, config.reward_model_path)
    origin = config.value_model_path or next(iter(folders), config.model_name_or_path)
    return PPOModels(
        describe(config.model_name_or_path, "lm_head"),
        describe(origin, "score"),
        tuple(describe(folder, "score") for folder in folders),
    )


def ppo_weights(config: PPOConfig, machine: Machine, models: PPOModels) -> dict[str, float]:
    """What PPO holds in every phase."""
    weights: dict[str, float] = {"process": float(machine.held)}
    for owner, items in (
        ("policy", machine.trained(models.policy, config.ema_decay > 0)),
        ("value", machine.trained(models.value)),
    ):
        weights |= {f"{owner} {name}": bytes_ for name, bytes_ in items.items()}
    weights["reference"] = machine.frozen(models.policy)
    weights["reward models"] = sum(machine.frozen(model) for model in models.rewards)
    return weights


def ppo_estimator(
    config: PPOConfig, machine: Machine, load: Load, models: PPOModels | None = None
) -> Estimator:
    """Of PPO: policy, value model, reference and reward models, all at once (those of the config, if not given)."""
    models = models or ppo_models(config)
    policy, value = models.policy, models.value
    weights = ppo_weights(config, machine, models)
    first, second = (4.0 * memory.parameters(m.specs) / machine.shards for m in (policy, value))
    mixed = config.ptx_dataset_name is not None and config.ptx_coef > 0
    # masters, moments and the average, copied to be written
    checkpoint = 3 * (first + second) + (first if config.ema_decay > 0 else 0.0)
    sampler, judge = machine.whole("policy", policy), machine.whole("value model", value)
    scorers = judge if machine.packed else sampler | judge  # there the sampler's log-probs are not computed again

    def estimate(tokens: int, mode: Checkpointing, cache_gb: float) -> Estimate:
        count = min(tokens, load.step)
        larger = max(
            (policy, value), key=lambda m: memory.token_bytes(m.architecture, machine.dtypes, mode)
        )
        used = machine.activations(larger.architecture, count, mode)
        one = tokens >= load.step and not mixed
        there = machine.gradients(max(first, second), used["activations"], one)  # one model after the other
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
                "samples": {**weights, **sampler, "cache": cache},
                "scores": {**weights, **scorers, "activations": float(scored)},
                "trains": {
                    **weights,
                    "gradients": there,
                    "gradients of the two terms apart": first * mixed,
                    **machine.training_pass([policy, value]),
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
