"""What one of several processes holds and sends, in bytes, from the sizes of the models alone.

    always          (4 master + 8 Adam + 4 average) P / shards; a frozen model b P
    rollout         + b P gathered (2 b P with a CPU's packed copy) + keys and values
    score           + b P of the value model, gathered
    update          + 4 P / shards gradients + the rest (embeddings, head) gathered, with its gradient
                    + two layers gathered, with the gradient of one and its reduction + activations
    sent a pass     b (P + layers' P) (S - 1) / S gathered, 4 P (S - 1) / S reduced, 8 P / S (R - 1) / R between copies

P parameters, b bytes of the storage dtype, S shards, R copies of the shards. Activations are what the backward reads,
nothing computed again. Allocators' waste and the libraries' own memory are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .architectures import Architecture
from .names import REST, Head, parameter_specs, part_of

Items = tuple[tuple[str, float], ...]  # (what, bytes)


@dataclass(frozen=True)
class Layout:
    """How weights lie: cut into `shards`, that many ranks, `replicate` times; `storage` bytes a number of the compute
    copy; `packed`: products read a second copy, as on a CPU."""

    shards: int
    replicate: int
    storage: int
    packed: bool

    @property
    def copies(self) -> int:
        return 2 if self.packed else 1


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, and of the parts that are gathered one at a time."""

    name: str
    total: int
    layer: int
    rest: int
    largest: int  # tensor of a layer
    act_bytes: int  # a token, on the way to the backward


def sizes(name: str, a: Architecture, head: Head, act: int) -> Sizes:
    """Of one model; `act` is the bytes of an activation between operations."""
    counts = {n: math.prod(spec.shape) for n, spec in parameter_specs(a, head).items()}
    layer = {n: count for n, count in counts.items() if part_of(n) == "layers.0"}
    rest = sum(count for n, count in counts.items() if part_of(n) in (REST, "score"))
    inputs = 2 * (4 + act) * a.hidden_size  # the residual stream before each norm, and what the norm gives
    heads = act * a.head_dim * (3 * a.num_heads + 4 * a.num_kv_heads)  # q and k before and after rotation, v, output
    inner = act * a.intermediate_size * (3 if a.gated else 2)
    return Sizes(
        name, sum(counts.values()), sum(layer.values()), rest, max(layer.values()),
        a.num_layers * (inputs + heads + inner),
    )  # fmt: skip


def held(model: Sizes, averaged: bool, layout: Layout) -> float:
    """Masters, moments and average of a trained model on one rank."""
    return (16 if averaged else 12) * model.total / layout.shards


def gathered(model: Sizes, layout: Layout) -> float:
    """A whole compute copy, for a phase without gradient."""
    return float(layout.storage * layout.copies * model.total)


def update_items(models: Sequence[Sizes], tokens: int, layout: Layout) -> Items:
    """What training passes of `tokens` tokens take beside what is always there."""
    copy = layout.storage * layout.copies
    work = (2 * copy * m.layer + 8 * m.layer + 4 * m.largest for m in models)
    return (
        ("gradients", sum(4 * m.total / layout.shards for m in models)),
        ("embeddings and head, gathered, with their gradient", max((copy + 4) * m.rest for m in models)),
        ("two layers gathered, one's gradient and its reduction", float(max(work))),
        (f"activations of {tokens} tokens", float(max(tokens * m.act_bytes for m in models))),
    )


@dataclass(frozen=True)
class Phase:
    """What a rank holds in a phase beside what it always holds."""

    name: str
    items: Items

    @property
    def bytes(self) -> float:
        return sum(size for _, size in self.items)


def ppo_phases(policy: Sizes, value: Sizes, kv_bytes: float, tokens: int, layout: Layout) -> tuple[Phase, ...]:
    """The phases of a PPO iteration."""
    return (
        Phase("rollout", (("the policy, whole", gathered(policy, layout)), ("keys and values", kv_bytes))),
        Phase("score", (("the value model, whole", gathered(value, layout)),)),
        Phase("update", update_items((policy, value), tokens, layout)),
    )


def epoch_phases(model: Sizes, tokens: int, layout: Layout) -> tuple[Phase, ...]:
    """The phases of SFT and the reward model."""
    return (
        Phase("validation and saving", ((f"the {model.name}, whole", gathered(model, layout)),)),
        Phase("update", update_items((model,), tokens, layout)),
    )


def sent_to_gather(model: Sizes, layout: Layout) -> float:
    """Bytes that a rank receives for a whole copy."""
    return layout.storage * model.total * (layout.shards - 1) / layout.shards


def sent_in_pass(model: Sizes, layout: Layout) -> float:
    """Bytes that a rank sends in one training pass: weights twice, layers' at least, gradients once."""
    share = (layout.shards - 1) / layout.shards
    weights = layout.storage * (2 * model.total - model.rest) * share
    between = 8 * model.total / layout.shards * (layout.replicate - 1) / layout.replicate
    return weights + 4 * model.total * share + between
