"""What nothing can be faster than: bytes over a measured read rate, FLOP over a measured peak.

    seconds >= max(bytes / read rate, FLOP / peak)

Letters: R rows of a decode step (one a sequence), C keys that each row attends to, H hidden, V vocabulary,
F intermediate, Hq/Hk query/key heads, D head size, L layers. `limits` is what `bench.machine.limits` has measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench import machine
from engine.model.transformer import Model

VOCABULARY_BLOCK = 256  # columns whose logits are made again for a draw: csrc/cpu/logprob.h


def floor(limits: dict[str, Any], size: float, flop: float, among: float | None = None) -> float:
    """Seconds; `size` in bytes, read once. Both kinds of work may overlap, so the larger one counts.

    `among`: bytes of all that is read in turns with these, which decide where they come from (None: nothing else).
    """
    rate = machine.read_rate(limits, size if among is None else among)
    return max(size / rate, flop / machine.product_rate(limits))


@dataclass(frozen=True)
class Sizes:
    """What decides the work of a decode step."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool
    weight_bytes: int  # of one element
    activation_bytes: int  # of one element
    cache_item_bytes: int  # of one element of the cached keys and values

    @classmethod
    def of(cls, model: Model) -> Sizes:
        a = model.architecture
        return cls(
            a.num_layers,
            a.hidden_size,
            a.intermediate_size,
            a.num_heads,
            a.num_kv_heads,
            a.head_dim,
            a.vocab_size,
            a.gated,
            model.dtype.itemsize,
            model.act_dtype.itemsize,
            model.kv_dtype.itemsize,
        )

    @property
    def layer_elements(self) -> int:
        """Of the matrices of all layers: q, k, v, o and the MLP's."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        mlp = (3 if self.gated else 2) * self.intermediate * self.hidden
        return self.layers * (attention + mlp)

    @property
    def head_elements(self) -> int:
        return self.vocabulary * self.hidden

    def cache_bytes(self, rows: int, context: float) -> float:
        """Keys and values of R sequences of C tokens."""
        return (
            2 * self.layers * rows * context * self.kv_heads * self.head_dim * self.cache_item_bytes
        )

    def attention_flop(self, rows: int, context: float) -> float:
        return 4 * self.layers * rows * context * self.heads * self.head_dim

    def between_bytes(self, rows: int) -> float:
        """Of one layer, what has to cross from one product to the next, each value once.

        Two norms with their additions (residual and addend in, residual and normed out: 4 H each); q and k in and
        out, v in, k and v into the cache; gate and up in, inner out. All counted at the activations' size.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlp = (3 if self.gated else 2) * self.intermediate
        return rows * (8 * self.hidden + 2 * query + 5 * key + mlp) * self.activation_bytes


def phase_floors(
    limits: dict[str, Any], sizes: Sizes, rows: int, context: float
) -> dict[str, float]:
    """Seconds of each phase of a decode step, by the names of `kernels/transformer_step.py`."""
    layer, head = sizes.layer_elements, sizes.head_elements
    block = rows * VOCABULARY_BLOCK * sizes.hidden  # each row draws from a block of its own
    keys = sizes.cache_bytes(rows, context), sizes.attention_flop(rows, context)
    step = (layer + head) * sizes.weight_bytes + keys[0]
    return {
        "norms and gates": sizes.layers * floor(limits, sizes.between_bytes(rows), 0),
        "products": floor(limits, layer * sizes.weight_bytes, 2 * layer * rows, step),
        "attention": floor(limits, *keys, step),
        "head": floor(limits, head * sizes.weight_bytes, 2 * head * rows, step),
        "sampling": floor(limits, block * sizes.weight_bytes, 2 * block, step),
    }


def step_floor(limits: dict[str, Any], sizes: Sizes, rows: int, context: float) -> float:
    """Seconds of a decode step: weights, keys and values read once, their products done."""
    elements = sizes.layer_elements + sizes.head_elements
    size = elements * sizes.weight_bytes + sizes.cache_bytes(rows, context)
    return floor(limits, size, 2 * elements * rows + sizes.attention_flop(rows, context))


def rollout_floor(
    limits: dict[str, Any],
    sizes: Sizes,
    prompts: list[int],  # tokens of each prompt that is computed
    samples: int,  # of each prompt
    new_tokens: float,  # in all
    max_active: int,
) -> float:
    """Seconds of a whole rollout: its prefill's products, and decode steps as full as they can be.

    Only a prompt's last row passes through the head.
    """
    sequences = len(prompts) * samples
    rows = min(sequences, max_active)
    context = sum(prompts) / len(prompts) + new_tokens / sequences / 2
    flop = 2 * sizes.layer_elements * sum(prompts) + 2 * sizes.head_elements * len(prompts)
    prefill = flop / machine.product_rate(limits)
    return prefill + new_tokens / rows * step_floor(limits, sizes, rows, context)
