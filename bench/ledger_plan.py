"""A PPO iteration on H100s, on paper: what lies in memory in each phase, and how long each phase takes at least.

PREDICTED, NOT MEASURED. Memory is what must be held: weights of the storage dtype (bf16), float32 masters, both of
Adam's moments, gradients, and the average of the weights (EMA) of what is trained; frozen models hold weights alone.
Keys and values, activations and a slab of the logits' gradient follow from the batch. Times are floors, without
anything but the products and the bytes that must move; nothing overlaps between phases.
"""

from dataclasses import dataclass
from typing import Any

MEMORY = 3.35e12  # bytes a second, H100 SXM
TENSOR = 990e12  # dense bf16 FLOP/s
GB = 1e9
# columns of the vocabulary whose gradients lie in memory at a time, and numbers of them where that is more
SLAB, GRADIENTS = 8192, 2**27  # engine/kernels/configs/linear_logprob_backward.json


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama or GPT kind, by what its memory and products follow from."""

    parameters: float
    layers: int
    hidden: int
    key_width: int  # key heads x head width
    intermediate: int
    vocabulary: int
    gated: bool = True

    @property
    def cache(self) -> float:
        """Bytes of keys and values a token, bf16."""
        return 2 * 2 * self.layers * self.key_width

    @property
    def activations(self) -> float:
        """Bytes a token that the backward reads, bf16 beside a float32 stream: of each layer the stream before both
        halves, the norms' results, q, k, v, attention's result, and what the activation takes and gives."""
        wide = (3 if self.gated else 2) * self.intermediate
        of_layer = 2 * 4 * self.hidden + 2 * (4 * self.hidden + 2 * self.key_width + wide)
        return self.layers * of_layer


MODELS = {
    "SmolLM2-135M": Model(134.5e6, 30, 576, 192, 1536, 49152),
    "SmolLM2-360M": Model(361.8e6, 32, 960, 320, 2560, 49152),
    "GPT-3 1.3B": Model(1.3e9, 24, 2048, 2048, 8192, 50257, gated=False),
    "Llama-3.2-3B": Model(3.21e9, 28, 3072, 1024, 8192, 128256),
    "GPT-3 6B": Model(6.7e9, 32, 4096, 4096, 16384, 50257, gated=False),
    "Llama-3-8B": Model(8.03e9, 32, 4096, 1024, 14336, 128256),
}
PAIRS = [
    ("SmolLM2-135M", "SmolLM2-135M"),
    ("SmolLM2-360M", "SmolLM2-360M"),
    ("GPT-3 1.3B", "GPT-3 6B"),  # the paper's
    ("Llama-3.2-3B", "Llama-3.2-3B"),
    ("Llama-3-8B", "Llama-3-8B"),
]
SIZES = {"24 GB": (24e9, 1), "80 GB": (80e9, 1), "8 x 80 GB": (80e9, 8)}
HELD = 0.92  # of a card's memory; the rest is the driver's, the context's and fragments


@dataclass(frozen=True)
class Batch:
    """One iteration as the paper's: 512 episodes, 4 minibatches, one inner epoch."""

    episodes: int = 512
    prompt: int = 256
    answer: int = 256
    running: int = 256  # sequences that generate at a time
    budget: int = 8192  # tokens of a micro-batch
    epochs: int = 1

    @property
    def tokens(self) -> int:
        return self.episodes * (self.prompt + self.answer)


TRAINED = 2 + 4 + 8 + 4  # bf16 copy, float32 master, two moments, float32 gradient
AVERAGED = 4  # the policy's average


def memory(
    policy: Model, value: Model, batch: Batch, ranks: int = 1, frozen_away: bool = False
) -> dict[str, float]:
    """Bytes a rank by phase. With ranks what is trained and what is frozen is sharded; batches are shared out.

    `frozen_away`: reference and reward model lie in the host's memory while neither scores.
    """
    states = (TRAINED + AVERAGED) * policy.parameters + TRAINED * value.parameters
    frozen = 2 * policy.parameters + 2 * value.parameters  # reference policy, reward model
    away = 0.0 if frozen_away else frozen
    gradients = 4 * (policy.parameters + value.parameters)
    running = -(-batch.running // ranks) * (batch.prompt + batch.answer) * policy.cache
    copy = 2 * policy.parameters * (1 - 1 / ranks)  # a rank that generates holds the whole policy
    layer = (
        2 * max(policy.parameters / policy.layers, value.parameters / value.layers) * (ranks > 1)
    )
    slab = 2 * min(max(SLAB * batch.budget, GRADIENTS), policy.vocabulary * batch.budget)
    stream = batch.budget * 2 * 4 * max(policy.hidden, value.hidden)
    held = states / ranks
    return {
        "rollout": held - gradients / ranks + away / ranks + copy + running,
        "score": held - gradients / ranks + frozen / ranks + layer + stream,
        "update policy": held + away / ranks + layer + batch.budget * policy.activations + slab,
        "update value": held + away / ranks + layer + batch.budget * value.activations,
    }


def seconds(policy: Model, value: Model, batch: Batch, ranks: int = 1) -> dict[str, float]:
    """Least time of each phase: decode reads weights and keys, all else is products or the optimizer's bytes."""

    def forward(model: Model) -> float:
        attention = (
            2 * model.layers * model.hidden * (batch.prompt + batch.answer)
        )  # causal: half of 4
        return 2 * model.parameters + attention

    turns = -(-batch.episodes // (batch.running * ranks))
    rows = min(batch.running, -(-batch.episodes // ranks))
    context = batch.prompt + batch.answer / 2
    step = max(
        (2 * policy.parameters + rows * context * policy.cache) / MEMORY,
        rows * forward(policy) / TENSOR,
    )
    tokens = batch.tokens / ranks
    prefill = batch.episodes * batch.prompt / ranks * forward(policy) / TENSOR
    optimizer = 30 * (policy.parameters + value.parameters) / ranks / MEMORY
    updates = 4 * batch.epochs
    head = 2.0 * policy.hidden * policy.vocabulary  # the backward makes the logits again
    return {
        "rollout": prefill + turns * batch.answer * step,
        "score": tokens * (forward(policy) + 2 * forward(value)) / TENSOR,
        "update policy": batch.epochs * tokens * (3 * forward(policy) + head) / TENSOR,
        "update value": batch.epochs * tokens * 3 * forward(value) / TENSOR,
        "optimizer": updates * optimizer,
    }


def fits(policy: Model, value: Model, batch: Batch, size: str) -> str:
    """Whether the largest phase fits: as it is, with smaller batches and the frozen models away, or not."""
    capacity, ranks = SIZES[size]
    if max(memory(policy, value, batch, ranks).values()) <= HELD * capacity:
        return "yes"
    small = Batch(batch.episodes, batch.prompt, batch.answer, 32, 1024, batch.epochs)
    if max(memory(policy, value, small, ranks).values()) <= HELD * capacity:
        return "with 1,024 tokens a micro-batch and 32 sequences at a time"
    if max(memory(policy, value, small, ranks, frozen_away=True).values()) <= HELD * capacity:
        return "so, and with the frozen models in the host's memory while they wait"
    return "no"


def table() -> list[dict[str, Any]]:
    batch, rows = Batch(), []
    for policy_name, value_name in PAIRS:
        policy, value = MODELS[policy_name], MODELS[value_name]
        times = seconds(policy, value, batch)
        rows.append(
            {
                "policy": policy_name,
                "reward and value": value_name,
                "memory_gb": {k: round(v / GB, 2) for k, v in memory(policy, value, batch).items()},
                "memory_gb_a_rank_of_8": {
                    k: round(v / GB, 2) for k, v in memory(policy, value, batch, 8).items()
                },
                "seconds": {k: round(v, 3) for k, v in times.items()},
                "seconds_total": round(sum(times.values()), 2),
                "fits": {size: fits(policy, value, batch, size) for size in SIZES},
            }
        )
    return rows
