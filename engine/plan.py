"""On paper: what InstructGPT's PPO takes on N GPUs, in memory and communication of a rank, before anybody rents them.

    python -m engine.plan --model 6B --gpus 16 --gpu_memory 80 [--replicate R] [--reward_model 6B] ...

    sent a pass     b (2 P - rest) (S - 1) / S gathered, 4 P (S - 1) / S reduced, 8 P / S (R - 1) / R between copies

P parameters, rest of them outside the layers, b bytes of the storage dtype, S shards, R copies of the shards.

A size is a GPT-3 model of that many parameters (Brown et al. 2020, table 2.1); else a Hugging Face folder or hub id.
The value and reward models are 6B, as in the paper (C.2, C.4). Nothing is measured: memory is what a run itself plans
with (engine/stages/estimates.py), and every assumption is printed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence

import torch

from engine.config import PPOConfig
from engine.errors import EngineError
from engine.model.architectures import read_architecture
from engine.model.checkpointing import MODES
from engine.model.names import REST, Head, parameter_specs, part_of
from engine.run.memory import GB, Dtypes, Estimate, parameters
from engine.stages.estimates import Described, Load, Machine, PPOModels, describe, ppo_estimator
from engine.stages.resources import most_tokens

PAPER = {"1.3B": (24, 2048, 16), "6B": (32, 4096, 32), "175B": (96, 12288, 96)}  # layers, hidden, heads
GPU = torch.device("cuda")
STORAGE = torch.bfloat16
EPISODES, MINIBATCHES, PTX_PER_EPISODE = 512, 8, 8  # paper C.4
POSITIVE = ("gpus", "gpu_memory", "replicate", "micro_batch_tokens", "kv_cache_gb", "episode_tokens", "ptx_length",
            "link_gb_s")  # fmt: skip
EXIT_CANNOT = 2


def described(name: str, head: Head) -> Described:
    """Of a paper's size, a folder or a hub id."""
    if name not in PAPER:
        return describe(name, head)
    layers, hidden, heads = PAPER[name]
    config = {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 2048, "n_embd": hidden, "n_layer": layers,
        "n_head": heads, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    architecture = read_architecture(config)
    return Described(architecture, parameter_specs(architecture, head))


def parser() -> argparse.ArgumentParser:
    defaults = PPOConfig.__dataclass_fields__
    found = argparse.ArgumentParser(prog="python -m engine.plan", description=__doc__, allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    found.add_argument("--model", required=True, help=f"policy: {', '.join(PAPER)}, a folder or a hub id")
    found.add_argument("--reward_model", default="6B", help="reward and value model, as --model")
    found.add_argument("--gpus", type=int, required=True, help="ranks, one a GPU")
    found.add_argument("--gpu_memory", type=float, required=True, help="GB (10^9 bytes) of one")
    found.add_argument("--replicate", type=int, default=1, help="copies of the sharded weights (HSDP)")
    found.add_argument("--micro_batch_tokens", type=int, default=most_tokens(GPU), help="tokens of a pass")
    keep = defaults["activation_checkpointing"].default
    found.add_argument("--activation_checkpointing", choices=MODES, default=keep, help="what a pass keeps")
    cache = defaults["kv_cache_gb"].default
    found.add_argument("--kv_cache_gb", type=float, default=cache, help="keys and values of a rank, at most")
    found.add_argument("--episode_tokens", type=int, default=1024, help="prompt and answer, on average")
    found.add_argument("--ptx_length", type=int, default=2048, help="tokens of a pretraining row")
    found.add_argument("--link_gb_s", type=float, default=50.0, help="what a rank sends a second")
    return found


def machine_of(gpus: int, replicate: int, gpu_memory: float) -> Machine:
    """A GPU that holds nothing yet."""
    free = int(gpu_memory * GB)
    return Machine(GPU, Dtypes(STORAGE, STORAGE), False, 0.0, 0, free, size=gpus, shards=gpus // replicate)


def tokens_of_a_rank(options: argparse.Namespace) -> tuple[float, float]:
    """Of a minibatch: in episodes, in pretraining rows."""
    episodes = EPISODES // MINIBATCHES / options.gpus
    return episodes * options.episode_tokens, episodes * PTX_PER_EPISODE * options.ptx_length


def estimated(machine: Machine, models: PPOModels, options: argparse.Namespace) -> Estimate:
    """A rank's memory, phase by phase."""
    config = PPOConfig(
        model_name_or_path=options.model,
        output_dir="none",
        reward_model_path=options.reward_model,
        ptx_dataset_name="pretraining rows",
        response_length=options.episode_tokens,
    )
    longest = max(options.episode_tokens, options.ptx_length)
    load = Load(longest, math.ceil(max(*tokens_of_a_rank(options), longest)), options.episode_tokens)
    estimate = ppo_estimator(config, machine, load, models)
    return estimate(options.micro_batch_tokens, options.activation_checkpointing, options.kv_cache_gb)


def memory_lines(found: Estimate, room: float) -> list[str]:
    """A line a phase, with what it holds beside what is always held, and whether it fits."""
    phases = list(found.phases.values())
    always = {name: size for name, size in phases[0].items() if all(name in phase for phase in phases)}
    lines = [f"  always   {sum(always.values()) / GB:9.1f} GB   {said(always)}"]
    for phase, items in found.phases.items():
        total = sum(items.values())
        fits = "fits" if total <= room else f"does not fit: {(total - room) / GB:.1f} GB too much"
        own = {name: size for name, size in items.items() if name not in always}
        lines.append(f"  {phase:<8} {total / GB:9.1f} GB   {fits}   (+ {said(own)})")
    return lines


def said(items: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size / GB:.1f}" for name, size in items.items() if size)


def sent_to_gather(model: Described, shards: int) -> float:
    """Bytes that a rank receives for a whole copy."""
    return STORAGE.itemsize * parameters(model.specs) * (shards - 1) / shards


def sent_in_pass(model: Described, shards: int, replicate: int) -> float:
    """Bytes that a rank sends in one training pass: weights twice, layers' at least, gradients once."""
    total = parameters(model.specs)
    rest = parameters({n: s for n, s in model.specs.items() if part_of(n) in (REST, "score")})
    share = (shards - 1) / shards
    between = 8 * total / shards * (replicate - 1) / replicate
    return STORAGE.itemsize * (2 * total - rest) * share + 4 * total * share + between


def sent_lines(models: PPOModels, machine: Machine, options: argparse.Namespace) -> list[str]:
    """What a rank sends in an iteration, by phase."""
    policy, value, shards = models.policy, models.value, machine.shards
    episodes, text = tokens_of_a_rank(options)
    passes = MINIBATCHES * math.ceil(episodes / options.micro_batch_tokens)
    ptx_passes = MINIBATCHES * math.ceil(text / options.micro_batch_tokens)
    trained = (passes + ptx_passes) * sent_in_pass(policy, shards, options.replicate)
    phases = {
        "samples": sent_to_gather(policy, shards),
        "scores": sent_to_gather(policy, shards) + sent_to_gather(value, shards),
        "trains": trained + passes * sent_in_pass(value, shards, options.replicate),
    }
    lines = [f"  passes of a rank: {passes} of policy and value, {ptx_passes} of pretraining rows"]
    for name, size in phases.items():
        lines.append(f"  {name:<8} {size / GB:9.1f} GB   {size / GB / options.link_gb_s:8.1f} s")
    return lines


def plan(options: argparse.Namespace) -> list[str]:
    """The plan's lines.

    Raises:
        EngineError: a number that is not above 0, no such model, copies that do not divide the GPUs.
    """
    for name in POSITIVE:
        if not 0 < getattr(options, name) < math.inf:  # false for nan too
            raise EngineError(f"{name}: got {getattr(options, name)}, want a finite number above 0")
    if options.gpus % options.replicate:
        raise EngineError(f"gpus: got {options.gpus} with --replicate {options.replicate}, want a multiple of it")
    machine = machine_of(options.gpus, options.replicate, options.gpu_memory)
    judged = described(options.reward_model, "score")
    models = PPOModels(described(options.model, "lm_head"), judged, (judged,))
    found = estimated(machine, models, options)
    counts = [parameters(model.specs) / 1e9 for model in (models.policy, judged)]
    return [
        f"{options.model}: policy {counts[0]:.2f}B, value and reward {counts[1]:.2f}B parameters;"
        f" {options.gpus} GPUs of {options.gpu_memory:g} GB: {machine.shards} shards x {options.replicate} copies",
        "memory of a rank, while it",
        *memory_lines(found, machine.free),
        f"communication of a rank, an iteration of {EPISODES} episodes:",
        *sent_lines(models, machine, options),
        "assumed:",
        f"  bfloat16 compute copies, float32 masters and gradients; the paper's batch: {EPISODES} episodes,"
        f" {MINIBATCHES} minibatches, {PTX_PER_EPISODE} pretraining rows an episode",
        f"  an episode has {options.episode_tokens} tokens, a pretraining row {options.ptx_length}; a pass has"
        f" {options.micro_batch_tokens}; work is equal over ranks",
        f"  activation checkpointing {options.activation_checkpointing}; no waste of allocators, no buffers of"
        " libraries",
        "  the reference and the reward model are whole on every rank, the policy while it generates, both trained"
        " models while they score",
        f"  a rank sends {options.link_gb_s:g} GB/s, with nothing computed meanwhile; collectives in rings",
        f"verdict: {verdict(found.peak, machine.free)}",
    ]


def verdict(peak: float, room: float) -> str:
    if peak <= room:
        return f"fits, with {(room - peak) / GB:.1f} GB to spare"
    return (
        f"does not fit by {(peak - room) / GB:.1f} GB; the update shrinks with more shards, a lower"
        " --micro_batch_tokens and --activation_checkpointing full; what is whole on every rank does not: it wants"
        " GPUs with more memory, a smaller model, or tensor parallelism, which this engine does not have"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0 printed, 2 no such model or layout."""
    try:
        print("\n".join(plan(parser().parse_args(argv))))
    except EngineError as error:
        sys.stderr.write(f"python -m engine.plan: {error}\n")
        return EXIT_CANNOT
    return 0


if __name__ == "__main__":
    sys.exit(main())
