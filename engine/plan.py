"""On paper: what InstructGPT's PPO takes on N GPUs, in memory and communication of a rank, before anybody rents them.

    python -m engine.plan --model 6B --gpus 16 --gpu_memory 80 [--replicate R] [--reward_model 6B] ...

A size is a GPT-3 model of that many parameters (Brown et al. 2020, table 2.1); else a Hugging Face folder or hub id.
The value and reward models are 6B, as in the paper (C.2, C.4). Nothing is measured: the formulas are those of
engine/model/footprint.py, and every assumption is printed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from engine.config import PPOConfig
from engine.errors import EngineError
from engine.model.architectures import Architecture, read_architecture
from engine.model.folder import read_json
from engine.model.footprint import (
    Layout,
    Phase,
    Sizes,
    gathered,
    held,
    ppo_phases,
    sent_in_pass,
    sent_to_gather,
    sizes,
)
from engine.model.names import Head
from engine.model.weights import resolve_folder

PAPER = {"1.3B": (24, 2048, 16), "6B": (32, 4096, 32), "175B": (96, 12288, 96)}  # layers, hidden, heads
BFLOAT16 = 2
EPISODES, MINIBATCHES, PTX_PER_EPISODE = 512, 8, 8  # paper C.4
EXIT_CANNOT = 2


def architecture_of(name: str) -> Architecture:
    """Of a paper's size, a folder or a hub id."""
    if name not in PAPER:
        return read_architecture(read_json(resolve_folder(name) / "config.json"))
    layers, hidden, heads = PAPER[name]
    config = {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 2048, "n_embd": hidden, "n_layer": layers,
        "n_head": heads, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    return read_architecture(config)


def sizes_of(name: str, role: str, head: Head) -> Sizes:
    return sizes(role, architecture_of(name), head, BFLOAT16)


def parser() -> argparse.ArgumentParser:
    defaults = PPOConfig.__dataclass_fields__
    found = argparse.ArgumentParser(prog="python -m engine.plan", description=__doc__, allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    found.add_argument("--model", required=True, help=f"policy: {', '.join(PAPER)}, a folder or a hub id")
    found.add_argument("--reward_model", default="6B", help="reward and value model, as --model")
    found.add_argument("--gpus", type=int, required=True, help="ranks, one a GPU")
    found.add_argument("--gpu_memory", type=float, required=True, help="GB (10^9 bytes) of one")
    found.add_argument("--replicate", type=int, default=1, help="copies of the sharded weights (HSDP)")
    tokens, cache = defaults["micro_batch_tokens"].default, defaults["kv_cache_gb"].default
    found.add_argument("--micro_batch_tokens", type=int, default=tokens, help="tokens of a pass")
    found.add_argument("--kv_cache_gb", type=float, default=cache, help="keys and values of a rank")
    found.add_argument("--episode_tokens", type=int, default=1024, help="prompt and answer, on average")
    found.add_argument("--ptx_length", type=int, default=2048, help="tokens of a pretraining row")
    found.add_argument("--link_gb_s", type=float, default=50.0, help="what a rank sends a second")
    return found


def memory_lines(phases: Sequence[Phase], always: Sequence[tuple[str, float]], room: float) -> list[str]:
    """A line a phase, and whether it fits."""
    base = sum(size for _, size in always)
    lines = [f"  always   {base / 1e9:9.1f} GB   " + ", ".join(f"{what} {size / 1e9:.1f}" for what, size in always)]
    for phase in phases:
        total = base + phase.bytes
        said = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in phase.items)
        fits = "fits" if total <= room else f"does not fit: {(total - room) / 1e9:.1f} GB too much"
        lines.append(f"  {phase.name:<8} {total / 1e9:9.1f} GB   {fits}   (+ {said})")
    return lines


def sent_lines(policy: Sizes, value: Sizes, layout: Layout, options: argparse.Namespace) -> list[str]:
    """What a rank sends in an iteration, by phase."""
    tokens = EPISODES // MINIBATCHES * options.episode_tokens / options.gpus
    text = EPISODES // MINIBATCHES * PTX_PER_EPISODE * options.ptx_length / options.gpus
    passes = MINIBATCHES * math.ceil(tokens / options.micro_batch_tokens)
    ptx_passes = MINIBATCHES * math.ceil(text / options.micro_batch_tokens)
    phases = {
        "rollout": sent_to_gather(policy, layout),
        "score": sent_to_gather(value, layout),
        "update": (passes + ptx_passes) * sent_in_pass(policy, layout) + passes * sent_in_pass(value, layout),
    }
    lines = [f"  passes of a rank: {passes} of policy and value, {ptx_passes} of pretraining rows"]
    for name, size in phases.items():
        lines.append(f"  {name:<8} {size / 1e9:9.1f} GB   {size / 1e9 / options.link_gb_s:8.1f} s")
    return lines


def plan(options: argparse.Namespace) -> list[str]:
    """The plan's lines."""
    if options.gpus % options.replicate or min(options.gpus, options.replicate) < 1:
        raise EngineError(f"gpus: got {options.gpus} with --replicate {options.replicate}, want a multiple of it")
    layout = Layout(options.gpus // options.replicate, options.replicate, BFLOAT16, packed=False)
    policy = sizes_of(options.model, "policy", "lm_head")
    value = sizes_of(options.reward_model, "value model", "score")
    always = (
        ("policy's masters, moments, average", held(policy, True, layout)),
        ("value's masters, moments", held(value, False, layout)),
        ("reference, whole", gathered(policy, layout)),
        ("reward model, whole", gathered(value, layout)),
    )
    phases = ppo_phases(policy, value, options.kv_cache_gb * 1e9, options.micro_batch_tokens, layout)
    room = options.gpu_memory * 1e9
    peak = sum(size for _, size in always) + max(phase.bytes for phase in phases)
    lines = [
        f"{options.model}: policy {policy.total / 1e9:.2f}B, value and reward {value.total / 1e9:.2f}B parameters;"
        f" {options.gpus} GPUs of {options.gpu_memory:g} GB: {layout.shards} shards x {layout.replicate} copies",
        "memory of a rank:",
        *memory_lines(phases, always, room),
        f"communication of a rank, an iteration of {EPISODES} episodes:",
        *sent_lines(policy, value, layout, options),
        "assumed:",
        f"  bfloat16 compute copies, float32 masters and gradients; the paper's batch: {EPISODES} episodes,"
        f" {MINIBATCHES} minibatches, {PTX_PER_EPISODE} pretraining rows an episode",
        f"  an episode has {options.episode_tokens} tokens, a pretraining row {options.ptx_length}; a pass has"
        f" {options.micro_batch_tokens}; work is equal over ranks",
        "  the backward reads what the forward saved, nothing is computed again; no waste of allocators, no buffers of"
        " libraries",
        "  the reference and the reward model are whole on every rank, the policy while it generates, the value model"
        " while it scores",
        f"  a rank sends {options.link_gb_s:g} GB/s, with nothing computed meanwhile; collectives in rings",
    ]
    return [*lines, f"verdict: {verdict(peak, room)}"]


def verdict(peak: float, room: float) -> str:
    if peak <= room:
        return f"fits, with {(room - peak) / 1e9:.1f} GB to spare"
    return (
        f"does not fit by {(peak - room) / 1e9:.1f} GB; the update shrinks with more shards and a lower"
        " --micro_batch_tokens; what is whole on every rank does not: it wants GPUs with more memory, a smaller model,"
        " or tensor parallelism, which this engine does not have"
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
